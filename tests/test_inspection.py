"""A look from outside: everything that waits, in sending order, without a trace and without getting in the way."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from durablews import inspection, ownership
from durablews.clock import SystemClock
from durablews.database import create, open_outbox, uri
from durablews.entries import enqueue
from durablews.errors import OutboxLocked
from durablews.inspection import inspect, stream_entries, summarize
from durablews.jobs import transaction
from durablews.messages import Refusal, draft
from durablews.schema import apply_migrations
from durablews.settlement import refuse, set_aside
from durablews.snapshot import to_json


class Clock:
    """A clock that stands still until it is told otherwise."""

    boot_id = "this boot"

    def __init__(self, boot: int = 0) -> None:
        self.now = boot

    def monotonic(self) -> float:
        return self.now / 1000

    def wall(self) -> int:
        return 1_700_000_000_000

    def boot(self) -> int:
        return self.now


@pytest.fixture
def outbox(tmp_path: Path) -> str:
    path = str(tmp_path / "agent.db")
    create(path)
    return path


def store(path: str, *messages: Any, clock: Any = None, **options: Any) -> None:
    with closing(open_outbox(path)) as connection, transaction(connection):
        drafts = [draft(message, **options) for message in messages]
        (result,) = enqueue(connection, path, [drafts], clock=clock or SystemClock())
        assert isinstance(result, list)


def execute(path: str, sql: str, *parameters: Any) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(sql, parameters)


def seqs(entries: Any) -> list[int]:
    return [entry.seq for entry in entries]


@pytest.fixture
def mixed(outbox: str) -> str:
    """Priorities 0, 5, -1, 0, 5, 0, 0, 5; of these 4 is a dead letter, 2 and 6 wait aside."""
    for priority in (0, 5, -1, 0, 5, 0, 0, 5):
        store(outbox, {"priority": priority}, priority=priority, topic="odd" if priority % 2 else "even")
    with closing(open_outbox(outbox)) as connection, transaction(connection):
        refuse(connection, 4, Refusal("invalid", "no such field"), 0)
        set_aside(connection, 2, Refusal("too_large", needs=10))
        set_aside(connection, 6, Refusal("too_large", needs=10))
    return outbox


IN_ORDER = [5, 8, 1, 7, 3, 2, 6]


def test_entries_come_in_sending_order(mixed: str) -> None:
    """Higher priority first, then by sequence; what waits aside comes last, and dead letters are not among them."""
    snapshot = inspect(mixed)
    assert seqs(snapshot.entries) == IN_ORDER
    assert [entry.state for entry in snapshot.entries] == ["pending"] * 5 + ["aside"] * 2
    assert (snapshot.pending, snapshot.dead, snapshot.departed.refused, snapshot.enqueued) == (7, 1, 1, 8)


@pytest.mark.parametrize("page", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("limit", [0, 1, 4, 6, 7])
def test_a_stream_is_the_same_list(mixed: str, monkeypatch: pytest.MonkeyPatch, page: int, limit: int) -> None:
    """However many looks a stream takes, it yields what one look shows, up to its limit."""
    monkeypatch.setattr(inspection, "_PAGE", page)
    assert seqs(stream_entries(mixed, limit=limit)) == (IN_ORDER[:limit] if limit else IN_ORDER)
    assert seqs(stream_entries(mixed, limit=limit, priority=0)) == ([1, 7, 6][:limit] if limit else [1, 7, 6])
    assert seqs(stream_entries(mixed, dead=True)) == [4]
    monkeypatch.setattr(inspection, "_PAGE_BYTES", 1)
    assert seqs(stream_entries(mixed, limit=limit, payload=True)) == (IN_ORDER[:limit] if limit else IN_ORDER)


def test_filters_keep_the_order_and_stop_at_the_limit(mixed: str) -> None:
    """A topic, a priority and a limit leave out entries and change nothing else."""
    assert seqs(inspect(mixed, topic="odd").entries) == [5, 8, 3, 2]
    assert seqs(inspect(mixed, topic="odd", priority=5, limit=2).entries) == [5, 8]
    assert seqs(inspect(mixed, topic="odd", limit=3).entries) == [5, 8, 3]
    assert seqs(inspect(mixed, priority=77).entries) == []
    assert seqs(inspect(mixed, seq=4).entries) == [4]
    assert seqs(inspect(mixed, seq=99).entries) == []


def test_dead_letters_come_oldest_first_with_their_reason(outbox: str) -> None:
    """Dead letters are in the order of their sequences, whatever their priorities were."""
    store(outbox, 1, priority="low")
    store(outbox, 2, priority="high")
    store(outbox, 3)
    with closing(open_outbox(outbox)) as connection, transaction(connection):
        for seq in (3, 1, 2):
            refuse(connection, seq, Refusal("invalid", f"reason {seq}"), 0)
    dead = inspect(outbox, dead=True).entries
    assert seqs(dead) == [1, 2, 3]
    assert [entry.refusal for entry in dead] == [Refusal("invalid", f"reason {seq}") for seq in (1, 2, 3)]
    assert seqs(inspect(outbox, dead=True, priority=1).entries) == [2]
    assert inspect(outbox).entries == []


def test_age_is_told_by_the_outbox_clock_of_this_boot(outbox: str) -> None:
    """Age is what the boot's clock vouches for; after a restart that nobody wrote down yet it does not move."""
    clock = Clock(5_000)
    store(outbox, "first", clock=clock)
    clock.now = 9_000
    store(outbox, "second", clock=clock)
    execute(outbox, "INSERT INTO durablews_outbox (payload) VALUES ('3')")
    clock.now = 12_500
    snapshot = inspect(outbox, clock=clock)
    assert [entry.age for entry in snapshot.entries] == [7.5, 3.5, None]
    assert snapshot.oldest_age == 7.5
    clock.boot_id, clock.now = "next boot", 700_000
    assert [entry.age for entry in inspect(outbox, clock=clock).entries] == [4.0, 0.0, None]


def test_oldest_age_is_of_the_lowest_sequence_that_waits(outbox: str) -> None:
    """A dead letter or a higher priority in front does not hide how long the oldest waits; nothing has no age."""
    clock = Clock()
    assert inspect(outbox, clock=clock).oldest_age is None
    for boot, priority in ((1_000, 0), (3_000, 0), (4_000, 9)):
        clock.now = boot
        store(outbox, boot, clock=clock, priority=priority)
    with closing(open_outbox(outbox)) as connection, transaction(connection):
        refuse(connection, 1, Refusal("invalid"), 0)
    clock.now = 10_000
    assert inspect(outbox, clock=clock).oldest_age == 7.0


def test_a_payload_is_shown_as_it_was_stored(outbox: str) -> None:
    """JSON stays JSON to the last digit, bytes are base64, and without being asked for nothing is shown."""
    store(outbox, msgspec.Raw(b'{"n": 1.10,\n "m": 123456789012345678901234567890}'), b"\x00\xff", "text")
    assert [entry.payload for entry in inspect(outbox).entries] == [msgspec.UNSET] * 3
    texts = [bytes(entry.payload) for entry in inspect(outbox, payload=True).entries]
    assert texts == [b'{"n":1.10,"m":123456789012345678901234567890}', b'{"base64":"AP8="}', b'"text"']


def test_text_that_is_not_utf8_hides_nothing(outbox: str) -> None:
    """One bad row is shown as well as can be, and so are the others."""
    store(outbox, "before")
    execute(
        outbox,
        "INSERT INTO durablews_entries (created_at, bytes, topic, payload, refusal)"
        " VALUES (0, 3, CAST(x'61ff62' AS TEXT), CAST(x'fffe' AS TEXT), '{not json')",
    )
    store(outbox, "after")
    before, bad, after = inspect(outbox, payload=True).entries
    assert (bytes(before.payload), bytes(after.payload)) == (b'"before"', b'"after"')
    assert bad.topic == "a\ufffdb"
    assert bytes(bad.payload) == '{"text":"\ufffd\ufffd"}'.encode()
    assert bad.refusal == Refusal("unreadable", "{not json")
    assert msgspec.json.decode(to_json(bad))["topic"] == "a\ufffdb"


def test_json_holds_nothing_that_a_terminal_obeys(outbox: str) -> None:
    """Controls that JSON allows inside a string are escaped, and the value is the same."""
    hostile = "\x1b[2J\x9b31m\u202e\u2066 \x7f\u200f"
    store(outbox, {hostile: hostile}, topic=hostile)
    text = to_json(inspect(outbox, payload=True)).decode()
    assert all(c.isprintable() for c in text)
    (entry,) = msgspec.json.decode(text)["entries"]
    assert (entry["topic"], entry["payload"]) == (hostile, {hostile: hostile})


def test_a_writer_that_holds_the_lock_is_not_disturbed(outbox: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look beside an open transaction neither waits nor sees what is not committed, and the commit goes through."""
    monkeypatch.setattr(inspection, "BUSY_TIMEOUT", 0)
    store(outbox, 1)
    with closing(open_outbox(outbox)) as writer:
        with transaction(writer):
            enqueue(writer, outbox, [[draft(2)]], clock=SystemClock())
            assert seqs(inspect(outbox).entries) == [1]
        assert seqs(inspect(outbox).entries) == [1, 2]


def test_nothing_is_held_after_a_look(outbox: str) -> None:
    """The log can be emptied between two looks of a stream, and after `inspect` has returned."""
    store(outbox, *range(10))
    with closing(open_outbox(outbox)) as writer:
        for taken in (inspect(outbox).entries, next(stream_entries(outbox, limit=5))):
            assert taken
            enqueue(writer, outbox, [[draft(0)]], clock=SystemClock())
            writer.execute("PRAGMA busy_timeout = 0")
            assert writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)


def test_a_look_leaves_no_trace(outbox: str) -> None:
    """A clean outbox has the same content and the same neighbours afterwards: no log, no index of it."""
    store(outbox, 1, 2)
    before = Path(outbox).read_bytes(), os.stat(outbox).st_mtime_ns, os.listdir(os.path.dirname(outbox))
    assert sorted(before[2]) == ["agent.db", "agent.db-reserve"]
    assert seqs(inspect(outbox).entries) == [1, 2]
    assert (Path(outbox).read_bytes(), os.stat(outbox).st_mtime_ns, os.listdir(os.path.dirname(outbox))) == before


def test_a_writer_that_comes_meanwhile_is_noticed(outbox: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read without locks does not count when somebody opened the outbox before it was read to the end."""
    store(outbox, 1)
    real, modes = inspection._open, []

    def interrupted(path: str, mode: str) -> sqlite3.Connection:
        connection = real(path, mode)
        modes.append(mode)
        if len(modes) == 1:
            connection.execute("SELECT * FROM durablews_meta").fetchall()
            store(path, 2)
        return connection

    monkeypatch.setattr(inspection, "_open", interrupted)
    assert seqs(inspect(outbox).entries) == [1, 2]
    assert modes == ["ro&immutable=1", "ro"]


LOCK_TAKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=0)
try:
    connection.execute("BEGIN IMMEDIATE")
except sqlite3.OperationalError as exc:
    print(exc)
"""


def test_this_process_keeps_the_locks_it_has(tmp_path: Path) -> None:
    """A look does not drop the lock that an application in the same process holds on its own database."""
    path = str(tmp_path / "application.db")
    application = sqlite3.connect(path, isolation_level=None)
    with closing(application):
        application.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
        with transaction(application):
            apply_migrations(application, path)
        with transaction(application):
            assert inspect(path).pending == 0
            command = [sys.executable, "-c", LOCK_TAKER, path]
            taken = subprocess.run(command, capture_output=True, text=True, check=True)
            assert taken.stdout.strip() == "database is locked"


def test_an_outbox_in_an_applications_database_is_shown(tmp_path: Path) -> None:
    """The outbox may live beside other tables, in a database that has no write-ahead log."""
    path = str(tmp_path / "application.db")
    with closing(sqlite3.connect(path, isolation_level=None)) as application, transaction(application):
        application.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
        apply_migrations(application, path)
        application.execute("INSERT INTO durablews_outbox (payload, priority) VALUES ('[1]', 1), ('[2]', 7)")
    assert seqs(inspect(path).entries) == [2, 1]
    assert os.listdir(tmp_path) == ["application.db"]


def test_a_database_that_stays_locked_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a write-ahead log a writer can keep readers out; that is said, and nothing waits for ever."""
    monkeypatch.setattr(inspection, "BUSY_TIMEOUT", 0.01)
    path = str(tmp_path / "application.db")
    with closing(sqlite3.connect(path, isolation_level=None)) as application:
        with transaction(application):
            apply_migrations(application, path)
        application.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OutboxLocked, match="kept it locked"):
            inspect(path)


def test_the_link_of_a_dead_drainer_is_disconnected(outbox: str) -> None:
    """What a drainer wrote about its link counts while it lives; one that was killed could not take it back."""
    execute(
        outbox,
        "UPDATE durablews_link SET state = 'CONNECTED', since = 5, reason = 'welcome', next_attempt = 9, blocked = 'x'",
    )
    right = ownership.Ownership(outbox)
    assert right.acquire() is None
    try:
        snapshot = summarize(outbox)
        assert snapshot.owner is not None
        assert f"pid {os.getpid()}" in snapshot.owner
        assert (snapshot.link.state, snapshot.link.next_attempt, snapshot.link.blocked) == ("CONNECTED", 9, "x")
    finally:
        right.release()
    snapshot = summarize(outbox)
    assert snapshot.owner is None
    assert (snapshot.link.state, snapshot.link.next_attempt, snapshot.link.reason) == ("DISCONNECTED", None, "welcome")


ROWS = 100_000


@pytest.fixture(scope="module")
def long_queue(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("long") / "agent.db")
    create(path)
    with closing(open_outbox(path)) as connection, transaction(connection):
        drafts = [draft(n, priority=n % 3, topic="all") for n in range(ROWS)]
        enqueue(connection, path, [drafts], clock=SystemClock())
    return path


def traced(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[int]]:
    """Collect the statements that looks run, and a one for every thousand steps that SQLite takes."""
    real, statements, steps = inspection._open, list[str](), list[int]()

    def opened(path: str, mode: str) -> sqlite3.Connection:
        connection = real(path, mode)
        connection.set_trace_callback(statements.append)
        connection.set_progress_handler(lambda: steps.append(1), 1000)
        return connection

    monkeypatch.setattr(inspection, "_open", opened)
    return statements, steps


def test_a_long_queue_costs_what_is_shown_of_it(long_queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred thousand entries only those that are listed are read: no scan, no sort, no count of rows."""
    statements, steps = traced(monkeypatch)
    snapshot = inspect(long_queue)
    assert (snapshot.pending, len(snapshot.entries)) == (ROWS, 20)
    assert len(steps) < 10
    inspect(long_queue, dead=True, payload=True)
    inspect(long_queue, priority=1, limit=5)
    inspect(long_queue, seq=5)
    assert len(steps) < 20
    with closing(sqlite3.connect(uri(long_queue, "ro"), uri=True)) as connection:
        asked = [sql for sql in statements if sql.startswith("SELECT") and "durablews_entries" in sql]
        assert len(asked) > 10
        for sql in asked:
            if "LIMIT 100" in sql:
                continue  # the newest hundred, off the end of the table
            plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}"))
            assert "SCAN" not in plan, sql
            assert "TEMP B-TREE" not in plan or "INDEXED BY durablews_answered" in sql, sql
            assert "count(" not in sql


def test_a_topic_is_searched_no_further_than_the_limit(long_queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter reads until it has found enough; only one that matches nothing reads everything."""
    _, steps = traced(monkeypatch)
    assert len(inspect(long_queue, topic="all").entries) == 20
    assert len(steps) < 10
    assert inspect(long_queue, topic="none").entries == []
    assert len(steps) > ROWS / 1000
