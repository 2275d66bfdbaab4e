"""Opening outbox files: created whole or not at all, every PRAGMA asked, every fault with its own error."""

from __future__ import annotations

import os
import random
import re
import select
import signal
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import (
    FakeClock,
    answer,
    application_database,
    enqueue,
    fork,
    in_child,
    integrity,
    new_outbox,
    open_again,
    sized,
    store,
    totals,
    waiting,
)

from durablews import database, schema
from durablews.errors import (
    DurablewsError,
    NotAnOutbox,
    OutboxError,
    OutboxFull,
    OutboxLocked,
    OutboxMissing,
    StorageFailed,
)
from durablews.jobs import transaction
from durablews.messages import draft

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and POSIX permissions")

SECRET = "the contents of a message"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user can reach, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder
        folder.chmod(0o777)


def write_something(path: Path) -> None:
    """Do what a producer does, from opening to commit."""
    with database.storage_errors(str(path)):
        connection = database.open_outbox(str(path))
        try:
            enqueue(connection, FakeClock(), [draft(SECRET)])
        finally:
            connection.close()


# -- creation


@posix
def test_a_kill_during_creation_leaves_a_whole_outbox_or_none(tmp_path: Path) -> None:
    """Whenever the creating process dies, the path holds a valid outbox or nothing, and the next one can create it."""
    dice = random.Random(20261122)
    finished = 0
    for life in range(60):
        folder = tmp_path / str(life)
        folder.mkdir()
        path = folder / "agent.db"
        pid, reader = fork(lambda path=path: database.create(str(path)))  # type: ignore[misc]
        select.select([reader], [], [], dice.uniform(0.0, 0.015))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        if path.exists():
            finished += 1
            assert integrity(path) == "ok"
            open_again(path).close()
        for left in folder.iterdir():
            # Named after the outbox and the process, hidden: easy to tell, and never taken for an outbox.
            ours = left in (path, path.with_name("agent.db-reserve"))
            assert ours or re.fullmatch(rf"\.agent\.db\.{pid}\.[0-9a-f]{{8}}(-journal|-wal|-shm)?", left.name)
        database.create(str(path))
        write_something(path)
    assert 0 < finished < 60, "the kills came all too early or all too late to tell anything"


@posix
def test_processes_that_create_at_once_share_one_outbox(tmp_path: Path) -> None:
    """Whoever is quicker creates the file, everyone else opens that one: no message goes to a file that is replaced."""
    path = tmp_path / "agent.db"
    ready, go = os.pipe()

    def life() -> str:
        os.close(go)
        os.read(ready, 1)  # ends when the parent closes its end: all at once
        database.create(str(path))
        connection = database.open_outbox(str(path))
        store(connection, FakeClock(), sized(10))
        return str(connection.execute("SELECT stream FROM durablews_meta").fetchone()[0])

    children = [fork(life) for _ in range(8)]
    os.close(ready)
    os.close(go)
    streams = {answer(child) for child in children}
    connection = open_again(path)
    assert streams == {connection.execute("SELECT stream FROM durablews_meta").fetchone()[0]}
    assert totals(connection)["messages"] == 8
    connection.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["agent.db", "agent.db-reserve"]


@posix
def test_nobody_else_may_read_an_outbox(tmp_path: Path) -> None:
    """The file, its log and its index are for their owner only, whatever the umask allows."""
    before = os.umask(0)
    try:
        connection = new_outbox(tmp_path)
        store(connection, FakeClock(), sized(10))
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == {f"agent.db{suffix}": 0o600 for suffix in ("", "-wal", "-shm", "-reserve")}
    connection.close()


@pytest.mark.parametrize("content", [b"", b"not yours", None], ids=["empty", "text", "outbox"])
def test_creating_replaces_nothing(tmp_path: Path, content: bytes | None) -> None:
    """What is at the path already stays there, byte for byte, be it an outbox, a text or an empty file (P10)."""
    path = tmp_path / "agent.db"
    if content is None:
        new_outbox(tmp_path).close()
    else:
        path.write_bytes(content)
    before = path.read_bytes(), list(tmp_path.iterdir())
    database.create(str(path))
    assert (path.read_bytes(), list(tmp_path.iterdir())) == before


def test_creating_where_links_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without hard links an outbox is created all the same, and replaces nothing there either."""

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    connection = new_outbox(tmp_path)
    store(connection, FakeClock(), sized(10))
    connection.close()
    before = (tmp_path / "agent.db").read_bytes()
    database._publish(tmp_path / "other", tmp_path / "agent.db")
    assert (tmp_path / "agent.db").read_bytes() == before


@posix
def test_a_disk_that_fails_during_creation_leaves_nothing(tmp_path: Path) -> None:
    """A creation that the disk does not allow raises `StorageFailed` or `OutboxFull`, and takes back what it wrote."""

    def life() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        database.create(str(tmp_path / "agent.db"))

    assert in_child(life).startswith("StorageFailed")
    assert list(tmp_path.iterdir()) == []


# -- every PRAGMA is asked for what it did

OURS = {
    "journal_mode": "wal",
    "locking_mode": "normal",
    "auto_vacuum": 2,
    "journal_size_limit": 4 * 1024 * 1024,
    "fullfsync": 1,
    "checkpoint_fullfsync": 1,
    "secure_delete": 0,
    "cell_size_check": 1,
    "application_id": schema.APPLICATION_ID,
    "busy_timeout": 5000,
}


def pragmas(connection: sqlite3.Connection, *names: str) -> dict[str, object]:
    return {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names}


@pytest.mark.parametrize(("durability", "synchronous"), [("power", 2), ("process", 1)])
def test_an_outbox_is_opened_with_every_setting_it_needs(tmp_path: Path, durability: str, synchronous: int) -> None:
    """After opening, SQLite itself answers each setting with the value that the promises rest on (P1)."""
    database.create(str(tmp_path / "agent.db"))
    connection = database.open_outbox(str(tmp_path / "agent.db"), durability=durability)
    assert pragmas(connection, *OURS) == OURS
    assert pragmas(connection, "synchronous", "wal_autocheckpoint", "user_version") == {
        "synchronous": synchronous,
        "wal_autocheckpoint": 0,
        "user_version": schema.migrations()[-1][0],
    }
    assert connection.isolation_level is None
    connection.close()


def test_only_the_drainer_checkpoints(tmp_path: Path) -> None:
    """The drainer's connection moves the log into the file every 1000 pages; a producer's never does."""
    connection = new_outbox(tmp_path)
    database.prepare(connection, "agent.db", drainer=True)
    assert pragmas(connection, "wal_autocheckpoint", "synchronous") == {"wal_autocheckpoint": 1000, "synchronous": 2}
    connection.close()


def test_nothing_that_lasts_changes_in_an_applications_database(tmp_path: Path) -> None:
    """Opened inside the application's own database, not one byte of it changes: no mode, no id, no version."""
    path = application_database(tmp_path)
    connection = sqlite3.connect(path, isolation_level=None)
    with transaction(connection):
        schema.apply_migrations(connection, str(path))
    connection.close()
    before = path.read_bytes()
    assert before[18:20] == b"\x01\x01", "the application's own journal mode"
    connection = open_again(path, fast=False)
    assert pragmas(connection, "journal_mode", "auto_vacuum", "application_id", "user_version", "synchronous") == {
        "journal_mode": "delete",
        "auto_vacuum": 0,
        "application_id": 305419896,
        "user_version": 7,
        "synchronous": 2,
    }
    connection.close()
    assert path.read_bytes() == before
    connection = open_again(path, fast=False)
    store(connection, FakeClock(), sized(10))
    connection.close()
    # All of the header but the counters of changes, of pages and of the version that wrote last.
    after = path.read_bytes()
    assert (after[:24], after[44:92]) == (before[:24], before[44:92])
    assert [file.name for file in tmp_path.iterdir()] == ["application.db"]


def test_a_setting_that_does_not_take_is_an_error(tmp_path: Path) -> None:
    """Where SQLite ignores a setting in silence, as it does in memory for WAL, opening fails and says which."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    schema.apply_migrations(connection, "agent.db")
    connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    with pytest.raises(StorageFailed, match="answers 'memory' for journal_mode, and an outbox needs 'wal'"):
        database.prepare(connection, "agent.db")
    connection.close()


# -- what is not an outbox


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    """Opening creates nothing: `OutboxMissing`, also below a folder that is not there."""
    for path in (tmp_path / "agent.db", tmp_path / "nowhere" / "agent.db"):
        with pytest.raises(OutboxMissing, match="there is no such outbox") as caught:
            database.open_outbox(str(path))
        assert caught.value.path == str(path)
    with pytest.raises(OutboxMissing, match=r"the folder .*nowhere does not exist"):
        database.create(str(tmp_path / "nowhere" / "agent.db"))
    assert list(tmp_path.iterdir()) == []


def _folder(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _empty(path: Path) -> None:
    path.touch()


def _text(path: Path) -> None:
    path.write_text(SECRET * 100)


def _foreign(path: Path) -> None:
    application_database(path.parent, path.name)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_folder, "a folder, not an outbox"),
        pytest.param(_pipe, "a device or a pipe, not an outbox", marks=posix),
        (_empty, "an empty file, not an outbox"),
        (_text, "not a SQLite database"),
        (_foreign, "a SQLite database, but it holds no durablews outbox"),
    ],
)
def test_what_is_not_an_outbox_is_said_so(tmp_path: Path, make: object, says: str) -> None:
    """Each thing that is no outbox is `NotAnOutbox` with what it is instead, and stays as it was (P10)."""
    path = tmp_path / "agent.db"
    assert callable(make)
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(NotAnOutbox, match=says) as caught:
        database.open_outbox(str(path))
    assert SECRET not in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert [file.name for file in tmp_path.iterdir()] == ["agent.db"]


@pytest.mark.parametrize("damage", ["half", "stub", "page"])
def test_a_damaged_outbox_is_said_so(tmp_path: Path, damage: str) -> None:
    """A file that lost its end or has a page of noise is `StorageFailed` with the word damaged, and stays (P10)."""
    connection = new_outbox(tmp_path)
    enqueue(connection, FakeClock(), [draft(SECRET) for _ in range(2000)])
    connection.close()
    path = tmp_path / "agent.db"
    if damage != "page":
        os.truncate(path, path.stat().st_size // 2 if damage == "half" else 60)
    else:
        noise = random.Random(1).randbytes(4096)
        with path.open("r+b") as file:
            for page in range(1, 30):
                file.seek(page * 4096)
                file.write(noise)
    before = path.read_bytes()
    with pytest.raises(StorageFailed, match="the file is damaged; nothing was stored"):
        write_something(path)
    assert path.read_bytes() == before


def test_an_outbox_that_is_all_in_its_log_is_no_empty_file(tmp_path: Path) -> None:
    """A file of no bytes with a log beside it is left to SQLite to judge, not called empty."""
    (tmp_path / "agent.db").touch()
    (tmp_path / "agent.db-wal").write_bytes(b"x" * 100)
    assert database.wal_bytes(str(tmp_path / "agent.db")) == 100
    database.require_file(str(tmp_path / "agent.db"))


# -- permissions and names


@posix
@pytest.mark.parametrize(
    ("file_mode", "folder_mode", "says"),
    [
        (0o444, 0o777, "cannot be written"),
        (0o666, 0o555, "cannot be written|cannot be opened"),
        (0o000, 0o777, "cannot be opened"),
        (0o666, 0o666, "cannot be reached: Permission denied"),
    ],
    ids=["read-only file", "read-only folder", "unreadable file", "closed folder"],
)
def test_what_may_not_be_written_is_said_so(open_folder: Path, file_mode: int, folder_mode: int, says: str) -> None:
    """A file or folder without permission is an error that says so, and nothing is stored or lost."""
    connection = new_outbox(open_folder)
    store(connection, FakeClock(), sized(10))
    connection.close()
    path = open_folder / "agent.db"
    path.chmod(file_mode)
    open_folder.chmod(folder_mode)
    said = in_child(lambda: write_something(path), unprivileged=True)
    open_folder.chmod(0o777)
    path.chmod(0o600)
    assert re.match(rf"(StorageFailed|OutboxMissing): .*({says})", said), said
    assert SECRET not in said
    connection = open_again(path)
    assert totals(connection)["messages"] == 1
    connection.close()


@posix
@pytest.mark.parametrize(
    ("mode", "says"),
    [(0o555, "StorageFailed: .*cannot be created: Permission denied"), (0o666, "StorageFailed|OutboxMissing")],
)
def test_a_folder_that_may_not_be_written_gets_no_outbox(open_folder: Path, mode: int, says: str) -> None:
    """Creating without permission is an error of ours that names the path, and leaves nothing."""
    open_folder.chmod(mode)
    said = in_child(lambda: database.create(str(open_folder / "agent.db")), unprivileged=True)
    open_folder.chmod(0o777)
    assert re.match(says, said), said
    assert list(open_folder.iterdir()) == []


@posix
def test_a_folder_that_may_not_be_listed_takes_an_outbox(open_folder: Path) -> None:
    """A drop box, writable but not readable, gets its outbox or a clear error: never half of one."""
    open_folder.chmod(0o333)
    said = in_child(lambda: database.create(str(open_folder / "agent.db")), unprivileged=True)
    open_folder.chmod(0o777)
    assert said == "None" or re.match("StorageFailed: .*Permission denied", said), said
    assert [file.name for file in open_folder.iterdir()] == ["agent.db"]
    assert integrity(open_folder / "agent.db") == "ok"


NAMES = [
    "a?mode=ro.db",
    "a#b.db",
    "100%41%.db",
    "with space.db",
    "Überlauf-日本.db",
    "'q\";--.db",
    "-dash.db",
    "a&b=c.db",
]


@pytest.mark.parametrize("name", [*NAMES, os.fsdecode(b"not utf-8 \xff.db")])
def test_any_name_is_one_file(tmp_path: Path, name: str) -> None:
    """Characters that mean something in a URI or in SQL are part of the name: no other file is touched."""
    if os.name != "posix" and set(name) & set('?"'):
        pytest.skip("not a name here")
    connection = new_outbox(tmp_path, name)
    store(connection, FakeClock(), sized(10))
    connection.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([name, f"{name}-reserve"])
    connection = open_again(tmp_path / name)
    assert totals(connection)["messages"] == 1
    connection.close()


def test_a_relative_path_is_this_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name is a file of the current folder."""
    monkeypatch.chdir(tmp_path)
    database.create("agent.db")
    connection = database.open_outbox("agent.db")
    assert (tmp_path / "agent.db").exists()
    connection.close()


@posix
def test_a_symbolic_link_leads_to_one_outbox(tmp_path: Path) -> None:
    """Through a link, dangling or not, the target is created and opened, with its log beside the target."""
    (tmp_path / "data").mkdir()
    (tmp_path / "link.db").symlink_to("data/agent.db")
    connection = new_outbox(tmp_path, "link.db")
    store(connection, FakeClock(), sized(10))
    beside = [f"agent.db{suffix}" for suffix in ("", "-reserve", "-shm", "-wal")]
    assert sorted(file.name for file in (tmp_path / "data").iterdir()) == beside
    assert database.wal_bytes(str(tmp_path / "link.db")) == (tmp_path / "data" / "agent.db-wal").stat().st_size > 0
    other = open_again(tmp_path / "data" / "agent.db")
    assert waiting(other) == waiting(connection)
    other.close()
    connection.close()


@posix
def test_a_link_that_leads_to_itself_is_an_error(tmp_path: Path) -> None:
    """A loop of links is `OutboxMissing`, not an endless search."""
    (tmp_path / "agent.db").symlink_to("agent.db")
    database.create(str(tmp_path / "agent.db"))
    with pytest.raises(OutboxMissing, match="cannot be reached"):
        database.open_outbox(str(tmp_path / "agent.db"))


# -- no room, no lock


def test_a_full_disk_stores_nothing_and_says_so(tmp_path: Path) -> None:
    """Without room for a message `OutboxFull` is raised, what waits stays, and there is room again after a settle."""
    connection = new_outbox(tmp_path)
    clock = FakeClock()
    first = store(connection, clock, *(sized(500) for _ in range(100)))
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    before = totals(connection)
    big = draft(SECRET * 1000)
    with (
        pytest.raises(OutboxFull, match="the disk is full; nothing was stored") as caught,
        database.storage_errors("agent.db"),
    ):
        enqueue(connection, clock, [big] * 4)
    assert SECRET not in str(caught.value)
    assert not connection.in_transaction
    assert (totals(connection), waiting(connection)) == (before, first)
    connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
    store(connection, clock, big, big)
    connection.close()


def test_a_lock_that_is_held_too_long_is_said_so(tmp_path: Path) -> None:
    """While another program keeps the write lock, a write raises `OutboxLocked` after the timeout; then it works."""
    connection = new_outbox(tmp_path)
    other = sqlite3.connect(tmp_path / "agent.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    connection.execute("PRAGMA busy_timeout = 10")
    with pytest.raises(OutboxLocked, match="held its write lock"), database.storage_errors("agent.db"):
        enqueue(connection, FakeClock(), [draft(SECRET)])
    other.execute("COMMIT")
    store(connection, FakeClock(), draft(SECRET))
    other.close()
    connection.close()


@posix
def test_a_commit_that_the_disk_broke_says_that_nobody_knows(tmp_path: Path) -> None:
    """When writing the commit itself fails, `StorageFailed.stored` is None: nobody knows (P1, P7)."""
    new_outbox(tmp_path).close()

    def life() -> str:
        import resource

        connection = open_again(tmp_path / "agent.db", fast=False)
        store(connection, FakeClock(), sized(10))
        limit = database.wal_bytes(str(tmp_path / "agent.db")) + 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            with database.storage_errors("agent.db"):
                enqueue(connection, FakeClock(), [draft(SECRET)])
        except StorageFailed as exc:
            return f"{exc} {exc.stored} {connection.in_transaction} {totals(connection)['messages']}"
        return "stored"

    said = in_child(life)
    assert re.fullmatch(r"agent.db: the disk failed during the commit \(SQLITE_IOERR_WRITE\).* None False 1", said), (
        said
    )
    connection = open_again(tmp_path / "agent.db")
    assert totals(connection)["messages"] in (1, 2)
    connection.close()


def test_every_error_of_sqlite_becomes_one_of_ours(tmp_path: Path) -> None:
    """Whatever SQLite raises inside `storage_errors` comes out as an `OutboxError` with its cause; ours pass."""
    connection = new_outbox(tmp_path)
    for sql in (
        "SELECT no_such_column FROM durablews_meta",
        "INSERT INTO durablews_caps VALUES (2, 1, 1, 1, 'reject')",
    ):
        with pytest.raises(OutboxError) as caught, database.storage_errors("agent.db"):
            connection.execute(sql)
        assert isinstance(caught.value.__cause__, sqlite3.Error)
        assert str(caught.value).startswith("agent.db: ")
    connection.close()
    with pytest.raises(StorageFailed), database.storage_errors("agent.db"):
        connection.execute("SELECT 1")
    with pytest.raises(DurablewsError, match="ours"), database.storage_errors("agent.db"):
        raise DurablewsError("ours")
