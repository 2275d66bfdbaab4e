"""What the tests of broken files share: outboxes with messages of every kind, ways to damage them, a verdict."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import FakeClock, new_outbox, run_of, store

from durablews import btree, settlement
from durablews.carryover import Salvage
from durablews.jobs import transaction
from durablews.messages import Refusal, draft
from durablews.remains import Remains, Source
from durablews.salvage import reference_layout

__all__ = [
    "PAGE",
    "SEED",
    "Kept",
    "Wreck",
    "closed_fixture",
    "crashed_fixture",
    "flip",
    "judge",
    "make_wreck",
    "noise_on_a_leaf",
    "noise_on_pages",
    "remains_of",
    "rows",
    "say_seed",
]

PAGE = 4096
SEED = int(os.environ.get("DURABLEWS_TEST_SEED") or random.randrange(2**32))
_ROWS = "SELECT seq, priority, CAST(payload AS BLOB), typeof(payload), ack_state FROM durablews_entries ORDER BY seq"


class Kept(NamedTuple):
    """One row of an outbox. `state` is `ack_state`."""

    seq: int
    priority: int
    payload: bytes
    kind: str
    state: int


class Wreck(NamedTuple):
    """An outbox as it lay on the disk before it was damaged: its files, its rows, and what had been acknowledged."""

    files: dict[str, bytes]
    rows: list[Kept]
    acked: set[bytes]

    def lay(self, folder: Path) -> Path:
        """Put the files into an empty folder; return the outbox."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
            (folder / name).chmod(0o600)
        return folder / "agent.db"


def rows(path: Path) -> list[Kept]:
    with closing(sqlite3.connect(path)) as connection:
        return [Kept(*row) for row in connection.execute(_ROWS)]


def make_wreck(folder: Path, chance: random.Random, *, log: bool, messages: int = 250) -> Wreck:
    """Fill an outbox with three priorities and every kind of payload; some acknowledged, refused, unanswered.

    Args:
        log: leave the last third of the messages, and what was acknowledged last, in the log, as a crash does.
    """
    folder.mkdir()
    connection, clock = new_outbox(folder), FakeClock()
    late = messages // 3 if log else 0
    _fill(connection, clock, chance, messages - late)
    before = {row[0] for row in connection.execute("SELECT CAST(payload AS BLOB) FROM durablews_entries")}
    with transaction(connection):
        settlement.settle(connection, [run_of(connection, 0, 1, messages // 3)])
        for seq in (messages // 2, messages // 2 + 7):
            settlement.refuse(connection, seq, Refusal("invalid", "no"), 0)
        settlement.mark_unanswered(connection, [run_of(connection, 1, 90, 110)], 0)
    if log:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        for _ in range(5):
            _fill(connection, clock, chance, late // 5, together=True)
        with transaction(connection):
            settlement.settle(connection, [run_of(connection, -1, 1, 40)])
    there = [Kept(*row) for row in connection.execute(_ROWS)]
    if not log:
        connection.close()
    files = {name: (folder / name).read_bytes() for name in ("agent.db", "agent.db-wal") if (folder / name).exists()}
    connection.close()
    assert len({row.payload for row in there}) == len(there)
    assert ("agent.db-wal" in files) == log
    return Wreck(files, there, before - {row.payload for row in there})


def _fill(
    connection: sqlite3.Connection, clock: FakeClock, chance: random.Random, number: int, *, together: bool = False
) -> None:
    kinds: list[Callable[[], Any]] = [
        lambda: {"n": chance.random()},
        lambda: f"text ü {chance.random()}",
        lambda: {"n": chance.random(), "long": "z" * chance.randrange(200)},
        lambda: chance.randbytes(30),
        lambda: chance.randbytes(9000) if chance.random() < 0.15 else chance.randbytes(12),
    ]
    drafts = [
        draft(
            chance.choice(kinds)(),
            priority=chance.randrange(-1, 2),
            topic="topic" if chance.random() < 0.2 else None,
            headers={"a": "b"} if chance.random() < 0.1 else None,
            id=f"id {chance.random()}" if chance.random() < 0.3 else None,
        )
        for _ in range(number)
    ]
    for some in [drafts] if together else [[one] for one in drafts]:
        store(connection, clock, *some)


# -- damage


def flip(file: Path, chance: random.Random, times: int = 1) -> str:
    """Change some bytes of a file; return which, as a sentence."""
    content = bytearray(file.read_bytes())
    said: list[str] = []
    for _ in range(times):
        at, by = chance.randrange(len(content)), chance.randrange(1, 256)
        said.append(f"{file.name} at {at}: {content[at]:02x} became {content[at] ^ by:02x}")
        content[at] ^= by
    file.write_bytes(content)
    return ", ".join(said)


def noise_on_pages(file: Path, chance: random.Random, *numbers: int) -> None:
    """Overwrite whole pages, from 1 on, with noise."""
    with file.open("r+b") as opened:
        for number in numbers:
            opened.seek((number - 1) * PAGE)
            opened.write(chance.randbytes(PAGE))


def remains_of(path: Path) -> Remains:
    content = path.read_bytes()
    file = Source(lambda offset, size: content[offset : offset + size], len(content))
    return Remains(file, Source(lambda offset, size: b"", 0), reference_layout())


def noise_on_a_leaf(path: Path, chance: random.Random) -> None:
    tree = btree.Tree(remains_of(path).page, remains_of(path).roots["durablews_entries"])
    assert list(tree.walk()) == []
    noise_on_pages(path, chance, tree.leaves[len(tree.leaves) // 2])


# -- the verdict


def judge(wreck: Wreck, path: Path, found: Salvage, *, resurrected: bool = False) -> int:
    """Check a salvage against the originals, and return how many messages did not come over as they were.

    What may be sent is an original, with its own priority, in the originals' order; what is not is a dead letter; and
    everything that is missing is counted, or the salvage says that it cannot know.

    Args:
        resurrected: whether what had been acknowledged may be back, which a log that is gone cannot prevent.
    """
    place = {row.payload: position for position, row in enumerate(wreck.rows)}
    present = rows(path)
    whole = [row for row in present if row.payload in place]
    strange = [row for row in present if row.payload not in place]
    if resurrected:
        strange = [row for row in strange if row.payload not in wreck.acked]
    assert [row for row in strange if row.state != 2] == [], "an altered message could be sent"
    order = [place[row.payload] for row in whole]
    assert order == sorted(set(order)), "the order is not the originals'"
    originals = [wreck.rows[position] for position in order]
    assert [row.priority for row in whole] == [row.priority for row in originals], "a priority is another"
    revived = [row for row, was in zip(whole, originals, strict=True) if was.state == 2 and row.state != 2]
    assert revived == [], "a dead letter came back to life"
    assert found.carried == len(present)
    missing = len(wreck.rows) - len(present)
    assert found.lost is None or resurrected or found.lost == missing, f"{missing} are missing, it says {found.lost}"
    with closing(sqlite3.connect(path)) as connection:
        (lost,) = connection.execute("SELECT lost FROM durablews_totals").fetchone()
        assert lost == (found.missing_count if found.lost is None else found.lost)
        (last,) = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'durablews_entries'").fetchone()
        assert last >= max((row.seq for row in present), default=0)
    kept = Path(os.fsencode(found.damaged).decode())
    assert kept.exists() or kept.with_name(kept.name + "-wal").exists(), "the damaged file is gone"
    unchanged = [row for row, was in zip(whole, originals, strict=True) if (row.state == 2) == (was.state == 2)]
    return len(wreck.rows) - len(unchanged)


# -- fixtures, for the files that import them


@pytest.fixture(autouse=True)
def say_seed() -> None:
    sys.stdout.write(f"DURABLEWS_TEST_SEED={SEED}\n")


@pytest.fixture(scope="module", name="closed")
def closed_fixture(tmp_path_factory: pytest.TempPathFactory) -> Wreck:
    """An outbox that was closed: one file."""
    return make_wreck(tmp_path_factory.mktemp("closed") / "made", random.Random(SEED), log=False)


@pytest.fixture(scope="module", name="crashed")
def crashed_fixture(tmp_path_factory: pytest.TempPathFactory) -> Wreck:
    """An outbox whose program was killed: a file and its log."""
    return make_wreck(tmp_path_factory.mktemp("crashed") / "made", random.Random(SEED + 1), log=True)
