"""Each way to break an outbox, and what `durablews doctor --salvage` makes of it; and a salvage that is itself killed.

``DURABLEWS_TEST_SEED`` repeats a run.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from servers import FAST, PlainServer
from support import integrity, totals
from wreckage import (  # noqa: F401 - pytest looks for the fixtures here
    PAGE,
    SEED,
    Wreck,
    closed_fixture,
    crashed_fixture,
    judge,
    noise_on_a_leaf,
    noise_on_pages,
    remains_of,
    rows,
    say_seed,
)

import durablews
from durablews import btree, cli, database, remains, writeahead
from durablews.errors import (
    OutboxError,
    OutboxMissing,
)
from durablews.inspection import inspect
from durablews.remains import Remains
from durablews.salvage import salvage


def noise_on_root(name: str) -> Callable[[Path, random.Random], None]:
    def damage(path: Path, chance: random.Random) -> None:
        noise_on_pages(path, chance, remains_of(path).roots[name])

    return damage


def noise_on_schema(path: Path, chance: random.Random) -> None:
    tree = btree.Tree(remains_of(path).page, 1)
    assert list(tree.walk()) == []
    noise_on_pages(path, chance, *tree.seen)


def noise_on_map_and_root(path: Path, chance: random.Random) -> None:
    noise_on_pages(path, chance, 2, remains_of(path).roots["durablews_entries"])


def noise_at(start: int, end: int, suffix: str = "") -> Callable[[Path, random.Random], None]:
    def damage(path: Path, chance: random.Random) -> None:
        with path.with_name(path.name + suffix).open("r+b") as file:
            file.seek(start)
            file.write(chance.randbytes(end - start))

    return damage


def cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_to_a_page(path: Path, chance: random.Random) -> None:
    os.truncate(path, PAGE)


def cut_log(path: Path, chance: random.Random) -> None:
    log = path.with_name("agent.db-wal")
    os.truncate(log, log.stat().st_size // 2)


def without_log(path: Path, chance: random.Random) -> None:
    path.with_name("agent.db-wal").unlink()


def without_file(path: Path, chance: random.Random) -> None:
    path.unlink()


#: What `doctor` cannot see: a page that is whole in the log, and what a log that is gone, or ends early, had held.
UNSEEN = {"noise in the header, with a log": (0,), "half of the log": (0, 1), "no log": (0,)}
LEAF = 60  # more entries than a page holds
Damage = Callable[[Path, random.Random], None]

#: What is done to which files, how many messages it may cost, and whether the salvage knows how many it cost.
CASES: dict[str, tuple[str, Damage, int, bool]] = {
    "noise in the first bytes": ("closed", noise_at(0, 16), 0, True),
    "noise in the header": ("closed", noise_at(0, 100), 0, True),
    "noise on the first page": ("closed", noise_at(0, PAGE), 0, True),
    "noise on the schema": ("closed", noise_on_schema, 0, True),
    "noise on the root of the entries": ("closed", noise_on_root("durablews_entries"), 0, True),
    "noise on the root of the queue": ("closed", noise_on_root("durablews_queue"), 0, True),
    "noise on the counts": ("closed", noise_on_root("durablews_totals"), 0, True),
    "noise on the stream": ("closed", noise_on_root("durablews_meta"), 0, True),
    "noise on the caps": ("closed", noise_on_root("durablews_caps"), 0, True),
    "noise on the ids": ("closed", noise_on_root("durablews_ids"), 0, True),
    "noise on the page map and the root": ("closed", noise_on_map_and_root, 0, True),
    "noise on a page of entries": ("closed", noise_on_a_leaf, LEAF, True),
    "half of the file": ("closed", cut, 250, True),
    "one page of the file": ("closed", cut_to_a_page, 250, False),
    "noise in the header, with a log": ("crashed", noise_at(0, 100), 0, True),
    "noise in the log's header": ("crashed", noise_at(0, 32, "-wal"), 0, True),
    "noise on the log's first frame": ("crashed", noise_at(32, 32 + 24 + PAGE, "-wal"), LEAF, True),
    "half of the log": ("crashed", cut_log, 100, False),
    "no log": ("crashed", without_log, 100, False),
    "no file, only the log": ("crashed", without_file, 250, False),
}


def open_it(path: str) -> None:
    database.create(path)
    database.open_outbox(path).close()


def what_is_said(use: Callable[[str], object], path: Path) -> str:
    """Return the error of a use, or nothing where there is none."""
    try:
        use(str(path))
    except OutboxMissing:
        return "no such outbox"
    except OutboxError as exc:
        return str(exc)
    return ""


async def drained(path: Path) -> list[Any]:
    """Let a client drain an outbox; return the sequences that the server got, in order."""
    async with PlainServer() as server:
        async with durablews.connect(server.url, path, reconnect=FAST, proxy=None) as ws:
            assert await ws.flush(60)
        return [entry[0] for frame in server.frames for entry in frame["m"]]


@pytest.mark.parametrize("case", CASES)
def test_a_broken_file_is_said_so_and_salvaged(
    case: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """P10: opening and looking work or say what is wrong; a salvage loses at most what was hit, and counts it."""
    name, damage, cost, knows = CASES[case]
    wreck: Wreck = request.getfixturevalue(name)
    path = wreck.lay(tmp_path / "box")
    damage(path, random.Random(SEED + 2))
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    for use in (open_it, inspect):
        shutil.copytree(path.parent, tmp_path / "used")
        said = what_is_said(use, tmp_path / "used" / path.name)
        assert "doctor" in said or said in ("", "no such outbox"), said
        shutil.rmtree(tmp_path / "used")
    assert cli.main(["doctor", str(path)]) in UNSEEN.get(case, (1, 3))
    assert {file.name: file.read_bytes() for file in path.parent.iterdir() if file.suffix != ".db-shm"} == before

    found = salvage(str(path))
    altered = judge(wreck, path, found, resurrected=not knows)
    assert altered <= cost, found
    if knows:
        assert found.lost == len(wreck.rows) - found.carried
        assert found.missing_count <= found.lost  # the index does not name dead letters
    assert integrity(path) == "ok"
    kept = Path(found.damaged)
    if "agent.db" in before:
        assert kept.read_bytes() == before["agent.db"]
    if "agent.db-wal" in before:
        assert kept.with_name(kept.name + "-wal").read_bytes() == before["agent.db-wal"]
    with closing(database.open_outbox(str(path))) as connection:
        totals(connection)
        (stored,) = connection.execute("SELECT salvage FROM durablews_meta").fetchone()
        assert msgspec.json.decode(stored, type=type(found)) == found
    assert inspect(str(path)).departed.lost == (found.missing_count if found.lost is None else found.lost)
    capsys.readouterr()
    assert cli.main(["doctor", str(path), "--json"]) == 0, capsys.readouterr().out
    good = [row.seq for row in sorted(rows(path), key=lambda row: (-row.priority, row.seq)) if row.state != 2]
    assert asyncio.run(drained(path)) == good


# -- a build that is broken is found


def _gives_up_at_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remains, "page_kinds", lambda pages, count, size: iter(()))


def _believes_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Remains, "_root", lambda self, name: self.roots[name])


def _ends_at_the_first_bad_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = writeahead.read_log

    def as_sqlite(read: Any, length: int, size: int) -> Any:
        log = whole(read, length, size)
        return log if not log.broken else log._replace(pages={}, size=None)

    monkeypatch.setattr(remains, "read_log", as_sqlite)


@pytest.mark.parametrize(
    ("break_it", "case"),
    [
        (_gives_up_at_a_page, "noise on the root of the entries"),
        (_believes_the_header, "noise on the first page"),
        (_ends_at_the_first_bad_frame, "noise on the log's first frame"),
    ],
)
def test_the_matrix_finds_a_broken_salvage(
    break_it: Callable[[pytest.MonkeyPatch], None],
    case: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """P10: a salvage that gives up at a page, at the header or at a frame fails the case that it is made for."""
    break_it(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        test_a_broken_file_is_said_so_and_salvaged(case, tmp_path, request, capsys)
