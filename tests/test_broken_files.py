"""Files that the disk, or somebody, has broken: an error that says so, or a salvage that loses only what it counts.

``DURABLEWS_TEST_FLIPS`` says how many times a byte of a file is flipped; 300 unless it is set, and a third of that in a
log. ``DURABLEWS_TEST_SEED`` repeats a run.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from servers import FAST, PlainServer
from support import integrity
from wreckage import (  # noqa: F401 - pytest looks for the fixtures here
    SEED,
    Wreck,
    closed_fixture,
    crashed_fixture,
    flip,
    judge,
    rows,
    say_seed,
)

import durablews
from durablews import carryover, remains
from durablews.errors import OutboxError
from durablews.salvage import salvage

FLIPS = int(os.environ.get("DURABLEWS_TEST_FLIPS", "300"))
#: Of the flips, each so many-eth goes on to a server, before and after the salvage.
DRAINED = 10


@pytest.fixture
def quick() -> Iterator[Path]:
    """A folder in memory where there is one: a disk's syncs are most of a salvage's time, and tell nothing here."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield folder / "box"
    shutil.rmtree(folder)


async def delivered(path: Path, *, timeout: float = 0.5) -> list[tuple[int, Any]]:
    """Let a client drain an outbox for a moment; return priority and payload of what the server got, in order.

    What cannot be opened delivers nothing; anything but an error of ours fails the test.
    """
    async with PlainServer() as server:
        try:
            settings: dict[str, Any] = {"reconnect": FAST, "proxy": None, "delivery": {"drain_timeout": 0}}
            async with durablews.connect(server.url, path, **settings) as ws:
                await ws.flush(timeout)
        except OutboxError:
            pass
        sent = [(frame["p"], entry) for frame in server.frames for entry in frame["m"]]
    return [(p, base64.b64decode(e[1]) if len(e) > 2 and e[2].get("b") else e[1]) for p, e in sent]


def messages_of(wreck: Wreck, priority: int) -> list[Any]:
    """Return the payloads of a priority that may be sent, in order."""
    return [
        row.payload if row.kind == "blob" else json.loads(row.payload)
        for row in wreck.rows
        if row.priority == priority and row.state != 2
    ]


def assert_nothing_altered(wreck: Wreck, sent: list[tuple[int, Any]]) -> None:
    """Check that all that a server got are originals, those of each priority in their order."""
    for priority in (-1, 0, 1):
        originals = messages_of(wreck, priority)
        got = [payload for p, payload in sent if p == priority]
        assert [payload for payload in got if payload not in originals] == [], "an altered message was sent"
        places = [originals.index(payload) for payload in got]
        assert places == sorted(places)


def assert_all_known(wreck: Wreck, sent: list[tuple[int, Any]]) -> None:
    """Check that a server got only what was once stored: a log that SQLite does not see may bring back the acked."""
    known = wreck.acked | {row.payload for row in wreck.rows}
    blobs = list(known)
    texts = [json.loads(payload) for payload in known if payload[:1] in b'{"' and is_json(payload)]
    strange = [payload for _, payload in sent if payload not in texts and payload not in blobs]
    assert strange == [], "an altered message was sent"


def is_json(payload: bytes) -> bool:
    try:
        json.loads(payload)
    except ValueError:
        return False
    return True


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


async def fuzz(wreck: Wreck, folder: Path, flips: int, times: int = 1) -> int:
    """Flip bytes, and salvage, again and again; return how many messages did not come over as they were."""
    chance = random.Random(SEED + 2)
    altered = 0
    for trial in range(flips):
        path = wreck.lay(folder)
        said = flip(folder / chance.choice(sorted(wreck.files)), chance, times)
        try:
            if trial % DRAINED == 0:
                damaged = Wreck(files_of(folder), [], set())
                assert_all_known(wreck, await delivered(path, timeout=0.2))
                damaged.lay(folder)
            found = salvage(str(path))
            altered += judge(wreck, path, found)
            assert integrity(path) == "ok"
            if trial % DRAINED == 1:
                good = [row for row in rows(path) if row.state != 2]
                sent = await delivered(path, timeout=20)
                assert_nothing_altered(wreck, sent)
                assert len(sent) == len(good), "what came over was not sent"
        except AssertionError as exc:
            raise AssertionError(f"seed {SEED}, flip {trial}: {said}: {exc}") from exc
    return altered


def report(wreck: Wreck, flips: int, altered: int) -> None:
    sys.stdout.write(f"{flips} damaged files, {altered} of {flips * len(wreck.rows)} messages did not come over\n")


@pytest.mark.parametrize(("times", "share"), [(1, 1), (8, 6)], ids=["one byte", "eight bytes"])
async def test_a_flipped_byte_costs_at_most_what_it_hits(closed: Wreck, quick: Path, times: int, share: int) -> None:
    """P10, P4: wherever bytes of the file flip, what comes over is whole and in order, and what does not is counted."""
    flips = max(1, FLIPS // share)
    altered = await fuzz(closed, quick, flips, times)
    sys.stdout.write(
        f"{flips} damaged files, {altered} of {flips * len(closed.rows)} messages did not come over as they were" + "\n"
    )
    # A page holds some thirty of them; a flip that cost one would mean that whole pages are given up.
    assert altered <= 4 * times * flips


async def test_a_flipped_byte_of_the_log_hides_nothing(crashed: Wreck, quick: Path) -> None:
    """P10: SQLite forgets in silence all that was committed after a damaged frame; a salvage carries it over."""
    flips = max(1, FLIPS // 3)
    altered = await fuzz(crashed, quick, flips)
    sys.stdout.write(
        f"{flips} damaged files, {altered} of {flips * len(crashed.rows)} messages did not come over as they were\n"
    )
    assert altered <= 4 * flips


# -- the harness finds a broken build


def _sends_what_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = remains._row
    monkeypatch.setattr(remains, "_row", lambda seq, values: whole(seq, values)._replace(fault=None))


def _counts_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carryover, "_expected", lambda totals: 0)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (_sends_what_is_damaged, "an altered message could be sent"),
        (_counts_no_loss, "are missing, it says"),
    ],
)
async def test_the_harness_finds_a_broken_salvage(
    closed: Wreck, quick: Path, monkeypatch: pytest.MonkeyPatch, break_it: Callable[[Any], None], says: str
) -> None:
    """P10: a salvage that trusts every payload, or does not count what is missing, fails the fuzz above."""
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match=says):
        await fuzz(closed, quick, 100, 4)


async def test_the_harness_finds_a_library_without_checksums(closed: Wreck, quick: Path) -> None:
    """P10: what is sent of a file whose checksums were taken out is found to be altered."""
    path = closed.lay(quick)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE durablews_entries SET checksum = NULL")
    text = next(row.payload for row in closed.rows if row.state == 0 and b"text" in row.payload)
    path.write_bytes(path.read_bytes().replace(text, text.replace(b"text", b"test")))
    sent = await delivered(path, timeout=20)
    with pytest.raises(AssertionError, match="an altered message was sent"):
        assert_nothing_altered(closed, sent)
