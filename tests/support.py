"""What the tests of the storage share: a clock that they own, outboxes to break, children to kill."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sqlite3
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from durablews import database, entries
from durablews.entries import Claims, Gap
from durablews.errors import DurablewsError
from durablews.jobs import transaction
from durablews.messages import Draft, Run, draft

#: 2026-11-22 20:24:00 UTC, in milliseconds.
TODAY = 1_795_379_040_000


class FakeClock:
    """Time as a test says. `wall` and `boot` are in milliseconds, as durablews reads them."""

    def __init__(self, *, wall: int = TODAY, boot: int = 5_000, boot_id: str = "boot-1") -> None:
        self.boot_id = boot_id
        self._wall = wall
        self._boot = boot
        self._monotonic = 100.0

    def monotonic(self) -> float:
        return self._monotonic

    def wall(self) -> int:
        return self._wall

    def boot(self) -> int:
        return self._boot

    def advance(self, milliseconds: int) -> None:
        """Let time pass, on every clock."""
        self._wall += milliseconds
        self._boot += milliseconds
        self._monotonic += milliseconds / 1000

    def jump(self, milliseconds: int) -> None:
        """Set the wall clock forward or back, as NTP does."""
        self._wall += milliseconds

    def suspend(self, milliseconds: int) -> None:
        """Let the machine sleep: the clock for waiting stands still meanwhile."""
        self._wall += milliseconds
        self._boot += milliseconds

    def reboot(self, *, off: int = 0, wall: int | None = None) -> None:
        """Switch the machine off for some milliseconds and on again; without a battery it comes up at `wall`."""
        number = int(self.boot_id.rpartition("-")[2])
        self.boot_id = f"boot-{number + 1}"
        self._wall = self._wall + off if wall is None else wall
        self._boot = 1_000
        self._monotonic = 1.0


def new_outbox(folder: Path, name: str = "agent.db", *, fast: bool = True, **caps: object) -> sqlite3.Connection:
    """Create an outbox and open it. `fast` leaves out the syncs, which no test of logic can tell."""
    path = str(folder / name)
    database.create(path)
    return open_again(path, fast=fast, **caps)


def open_again(path: str | Path, *, fast: bool = True, **caps: object) -> sqlite3.Connection:
    """Open an outbox that is there, as a producer would."""
    connection = database.open_outbox(str(path))
    if fast:
        connection.execute("PRAGMA synchronous = OFF")
    if caps:
        set_caps(connection, **caps)
    return connection


def set_caps(connection: sqlite3.Connection, **caps: object) -> None:
    with transaction(connection):
        entries.write_caps(connection, caps)


def application_database(folder: Path, name: str = "application.db") -> Path:
    """Make a database of an application's own, in rollback mode, without an outbox in it."""
    path = folder / name
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA application_id = 305419896")
    connection.execute("PRAGMA user_version = 7")
    connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, what TEXT)")
    connection.close()
    return path


def sized(size: int, **options: Any) -> Draft:
    """Make a message whose size, as the caps count it, is `size` bytes without topic and headers."""
    return draft(b"x" * size, **options)


def enqueue(
    connection: sqlite3.Connection, clock: FakeClock, *requests: Sequence[Draft], claims: Claims | None = None
) -> list[list[int | Gap] | DurablewsError]:
    """Enqueue in one transaction."""
    with transaction(connection):
        return entries.enqueue(connection, "agent.db", requests, clock=clock, claims=claims)


def store(connection: sqlite3.Connection, clock: FakeClock, *drafts: Draft, claims: Claims | None = None) -> list[int]:
    """Enqueue one request that must be taken, and return its sequences."""
    (result,) = enqueue(connection, clock, drafts, claims=claims)
    assert isinstance(result, list), result
    assert not any(isinstance(seq, Gap) for seq in result), result
    return [seq for seq in result if isinstance(seq, int)]


def run_of(connection: sqlite3.Connection, priority: int, first: int, last: int) -> Run:
    """Describe what waits between two sequences as the drainer would that has it in flight."""
    count, size = connection.execute(
        "SELECT count(*), coalesce(sum(bytes), 0) FROM durablews_entries"
        " WHERE priority = ? AND seq BETWEEN ? AND ? AND ack_state < 2",
        (priority, first, last),
    ).fetchone()
    return Run(priority, first, last, count, size)


def column(connection: sqlite3.Connection, sql: str, parameters: Sequence[object] = ()) -> list[Any]:
    """Return the first column of a query."""
    return [row[0] for row in connection.execute(sql, parameters)]


def waiting(connection: sqlite3.Connection) -> list[int]:
    """Return the sequences of all that is no dead letter."""
    return column(connection, "SELECT seq FROM durablews_entries WHERE ack_state <> 2 ORDER BY seq")


def departed(connection: sqlite3.Connection) -> list[tuple[int, str, int]]:
    """Return who left without an ack: sequence, reason, whether it may have been applied all the same."""
    return connection.execute("SELECT seq, reason, unknown FROM durablews_departed ORDER BY id").fetchall()


def totals(connection: sqlite3.Connection) -> dict[str, int]:
    """Return the totals, after checking that they are what the rows say."""
    cursor = connection.execute("SELECT * FROM durablews_totals")
    kept = dict(zip([name for name, *_ in cursor.description], cursor.fetchone(), strict=True))
    counted = connection.execute(
        "SELECT count(*) FILTER (WHERE ack_state <> 2), coalesce(sum(bytes) FILTER (WHERE ack_state <> 2), 0),"
        " count(*) FILTER (WHERE ack_state = 2), coalesce(sum(bytes) FILTER (WHERE ack_state = 2), 0)"
        " FROM durablews_entries"
    ).fetchone()
    assert (kept["messages"], kept["bytes"], kept["dead_messages"], kept["dead_bytes"]) == counted
    assert connection.execute("SELECT count(*) FROM durablews_evicted").fetchone() == (0,)
    return {name: value for name, value in kept.items() if name != "one"}


def integrity(path: str | Path) -> str:
    """Ask SQLite itself, without the library under test, whether a file is whole."""
    connection = sqlite3.connect(path)
    try:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])
    finally:
        connection.close()


def fork(job: Callable[[], object]) -> tuple[int, int]:
    """Run `job` in a forked child; return its id and a pipe that ends with what it returned, or its error."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    try:
        os.close(reader)
        try:
            said = str(job())
        except BaseException as exc:
            said = f"{type(exc).__name__}: {exc}"
        os.write(writer, said.encode(errors="backslashreplace"))
    finally:
        os._exit(0)


def answer(child: tuple[int, int]) -> str:
    """Wait for a child of `fork` and return what it said."""
    pid, reader = child
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


def in_child(job: Callable[[], object], *, unprivileged: bool = False) -> str:
    """Run `job` in a forked child, as nobody where we are root, and return what it returned or its error."""

    def run() -> object:
        if unprivileged and os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        return job()

    return answer(fork(run))


def fate(job: Callable[[], object]) -> str:
    """Run `job` in a forked child and return what it returned, its error, or the name of the signal that ended it."""

    def run() -> object:
        faulthandler.disable()
        return job()

    pid, reader = fork(run)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else said


def named(value: object) -> str:
    """Return what a case of a test is called: the same in every process, so without addresses."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))
