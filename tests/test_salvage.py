"""Each way to break an outbox, and what `durablews doctor --salvage` makes of it; and a salvage that is itself killed.

``DURABLEWS_TEST_SEED`` repeats a run.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from servers import ENVIRONMENT, FAST, PlainServer
from support import FakeClock, application_database, in_child, integrity, new_outbox, store, totals
from wreckage import PAGE, Wreck, judge, make_wreck, noise_on_pages, rows

import durablews
from durablews import btree, cli, database, entries, remains
from durablews.errors import (
    NotAnOutbox,
    OutboxError,
    OutboxInUse,
    OutboxLocked,
    OutboxMissing,
    OutboxTooNew,
    StorageFailed,
)
from durablews.inspection import inspect
from durablews.jobs import transaction
from durablews.messages import draft
from durablews.ownership import Ownership
from durablews.remains import Remains, Source
from durablews.salvage import reference_layout, salvage

SEED = int(os.environ.get("DURABLEWS_TEST_SEED") or random.randrange(2**32))
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files and processes")


@pytest.fixture(autouse=True)
def say_seed() -> None:
    sys.stdout.write(f"DURABLEWS_TEST_SEED={SEED}\n")


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Wreck:
    """An outbox that was closed: one file."""
    return make_wreck(tmp_path_factory.mktemp("closed") / "made", random.Random(SEED), log=False)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Wreck:
    """An outbox whose program was killed: a file and its log."""
    return make_wreck(tmp_path_factory.mktemp("crashed") / "made", random.Random(SEED + 1), log=True)


def remains_of(path: Path) -> Remains:
    content = path.read_bytes()
    file = Source(lambda offset, size: content[offset : offset + size], len(content))
    return Remains(file, Source(lambda offset, size: b"", 0), reference_layout())


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


def noise_on_a_leaf(path: Path, chance: random.Random) -> None:
    tree = btree.Tree(remains_of(path).page, remains_of(path).roots["durablews_entries"])
    assert list(tree.walk()) == []
    noise_on_pages(path, chance, tree.leaves[len(tree.leaves) // 2])


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
    whole = remains.read_log

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


# -- what is not salvaged


def test_an_empty_file_is_not_made_an_outbox(tmp_path: Path) -> None:
    """P10: of a file of no bytes nothing is salvaged, and nothing is put in its place."""
    path = tmp_path / "agent.db"
    path.touch()
    for use in (database.open_outbox, inspect, salvage):
        with pytest.raises(NotAnOutbox):
            use(str(path))
    assert path.stat().st_size == 0
    assert sorted(file.name for file in tmp_path.iterdir()) in (["agent.db"], ["agent.db", "agent.db-lock"])


@pytest.mark.parametrize("outbox", [False, True], ids=["without an outbox", "with an outbox"])
def test_an_applications_database_is_left_to_its_owner(tmp_path: Path, outbox: bool) -> None:
    """P10: a database with other tables is never moved, damaged or not."""
    path = application_database(tmp_path)
    if outbox:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            durablews_install(connection)
    before = path.read_bytes()
    with pytest.raises((NotAnOutbox, StorageFailed), match="nothing was touched"):
        salvage(str(path))
    assert path.read_bytes() == before


def durablews_install(connection: sqlite3.Connection) -> None:
    from durablews.schema import apply_migrations

    with transaction(connection):
        apply_migrations(connection, "application.db")


def test_a_newer_outbox_is_left_alone(tmp_path: Path) -> None:
    """P9, P10: what a newer version wrote is not salvaged by an older one."""
    connection = new_outbox(tmp_path)
    connection.execute("UPDATE durablews_meta SET schema = 99")
    connection.close()
    path = tmp_path / "agent.db"
    before = path.read_bytes()
    for use in (database.open_outbox, inspect, salvage):
        with pytest.raises(OutboxTooNew):
            use(str(path))
    assert path.read_bytes() == before
    assert cli.main(["doctor", str(path)]) == 3


def test_what_is_missing_is_said_so(tmp_path: Path) -> None:
    """Where there is neither a file nor a log, nothing is made."""
    with pytest.raises(OutboxMissing):
        salvage(str(tmp_path / "agent.db"))
    assert cli.main(["doctor", str(tmp_path / "agent.db"), "--salvage"]) == 3
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith("-lock")] == []


@posix
def test_a_file_in_use_is_not_moved(closed: Wreck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P10: while it is drained, or any program has it open, a salvage refuses and touches nothing."""
    monkeypatch.setattr("durablews.salvage._PATIENCE", 0.1)
    path = closed.lay(tmp_path / "box")
    ownership = Ownership(path)
    assert ownership.acquire() is None
    with pytest.raises(OutboxInUse):
        salvage(str(path))
    ownership.release()
    connection = database.open_outbox(str(path))
    with pytest.raises(OutboxLocked, match="this process has it open"):
        salvage(str(path))
    said = in_child(lambda: salvage(str(path)))  # the child has its parent's descriptors, but not its locks
    assert "OutboxLocked" in said
    connection.close()
    program = (
        "import sqlite3, sys\nconnection = sqlite3.connect(sys.argv[1])\n"
        "connection.execute('SELECT count(*) FROM durablews_entries').fetchone()\nprint('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(OutboxLocked, match="another program has it open"):
            salvage(str(path))
        holder.stdin.close()
        holder.wait(60)
    assert salvage(str(path)).lost == 0


# -- identity


def test_a_salvage_takes_a_new_stream_and_keeps_the_numbers(closed: Wreck, tmp_path: Path) -> None:
    """P4: no server knows the new stream, the entries keep their sequences, and no later one is below them."""
    path = closed.lay(tmp_path / "box")
    with closing(sqlite3.connect(path)) as connection:
        (stream,) = connection.execute("SELECT stream FROM durablews_meta").fetchone()
    found = salvage(str(path))
    assert found.stream != stream
    assert [row.seq for row in rows(path)] == [row.seq for row in closed.rows]
    with closing(database.open_outbox(str(path))) as connection:
        (new,) = store(connection, FakeClock(), draft("new"))
    assert new > max(row.seq for row in closed.rows)


def test_a_lost_message_can_be_sent_again_with_its_id(tmp_path: Path) -> None:
    """P2, P7: the id of what was lost is forgotten, or a second send would say that it is stored; others stay known."""
    (tmp_path / "box").mkdir()
    connection, clock = new_outbox(tmp_path / "box"), FakeClock()
    for number in range(200):
        store(connection, clock, draft({"number": number, "fill": "x" * 100}, id=f"id {number}"))
    connection.close()
    path = tmp_path / "box" / "agent.db"
    noise_on_a_leaf(path, random.Random(SEED))
    found = salvage(str(path))
    assert found.lost == found.missing_count == len(found.missing)
    with closing(database.open_outbox(str(path))) as connection:
        known = {seq for (seq,) in connection.execute("SELECT seq FROM durablews_ids")}
        assert known == set(range(1, 201)) - set(found.missing)
        last = entries.last_sequence(connection)
        (again,) = store(connection, clock, draft("again", id=f"id {found.missing[0] - 1}"))
        assert again > last
        (same,) = store(connection, clock, draft("again", id="id 0"))
        assert same == 1


@posix
def test_the_new_file_belongs_to_whom_the_old_one_did(closed: Wreck, tmp_path: Path) -> None:
    """An administrator's salvage leaves files that the agent's user can open."""
    if os.geteuid() != 0:
        assert os.environ.get("CI") != "true", "only root can give files away"
        pytest.skip("only root can give files away")
    path = closed.lay(tmp_path / "box")
    os.chown(path, 65534, 65534)
    salvage(str(path))
    for file in path.parent.iterdir():
        assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (65534, 0o600), file


# -- killed in the middle


@posix
@pytest.mark.parametrize("name", ["closed", "crashed"])
def test_a_salvage_killed_at_any_step_can_be_done_again(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """P10: killed before any change of a name, nothing takes the place for free, and a salvage finds everything."""
    wreck: Wreck = request.getfixturevalue(name)
    for step in range(40):
        path = wreck.lay(tmp_path / "box")
        said = in_child(partial(_salvage_until, path, step))
        assert said in ("", "done"), said
        refused = ""
        try:
            database.create(str(path))
        except StorageFailed as exc:
            refused = str(exc)
        if refused:
            assert "doctor --salvage" in refused
        else:
            assert len(rows(path)) == len(wreck.rows), f"at step {step} an outbox without its messages is in the place"
        found = salvage(str(path))
        assert (judge(wreck, path, found), found.lost) == (0, 0)
        assert integrity(path) == "ok"
        assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []
        if said == "done":
            break
    assert 3 < step < 39


def _salvage_until(path: Path, step: int) -> str:
    """Salvage, and die at the change of a name number `step`."""
    count = 0

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            if count == step:
                os._exit(0)
            count += 1
            return change(*arguments, **named)

        return changed

    for change in ("link", "replace", "unlink", "rename"):
        setattr(os, change, dying(getattr(os, change)))
    salvage(str(path))
    return "done"
