"""Whole transactions as one job: what a caller's cancellation cannot break, and an error takes back."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiosqlite
import pytest
from support import FakeClock, integrity, new_outbox, open_again, sized, totals, waiting

from durablews import database, entries
from durablews.jobs import JobConnection, UncertainCommit, run_job, transaction


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[aiosqlite.Connection]:
    """An outbox on a thread of its own, as the writer has it."""
    new_outbox(tmp_path).close()
    path = database.uri(str(tmp_path / "agent.db"), "rw")
    async with aiosqlite.connect(path, uri=True, isolation_level=None, factory=JobConnection) as connection:
        yield connection


def attempt(connection: sqlite3.Connection, job: Callable[[], object]) -> None:
    with transaction(connection):
        job()


# -- transaction


def test_a_transaction_holds_the_write_lock_from_its_start(tmp_path: Path) -> None:
    """BEGIN IMMEDIATE: nobody else writes between its first read and its commit."""
    connection = new_outbox(tmp_path)
    other = open_again(tmp_path / "agent.db")
    other.execute("PRAGMA busy_timeout = 0")
    with transaction(connection):
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        assert not other.in_transaction
    with transaction(other):
        pass
    other.close()
    connection.close()


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit()])
def test_an_error_takes_everything_back(tmp_path: Path, error: BaseException) -> None:
    """Whatever leaves the block, the transaction is rolled back and the connection can go on (P7)."""
    connection = new_outbox(tmp_path)

    def fail() -> None:
        entries.enqueue(connection, "x", [[sized(1)]], clock=FakeClock())
        raise error

    with pytest.raises(type(error)):
        attempt(connection, fail)
    assert not connection.in_transaction
    assert (waiting(connection), totals(connection)["enqueued"]) == ([], 0)
    with transaction(connection):
        entries.enqueue(connection, "x", [[sized(1)]], clock=FakeClock())
    assert waiting(connection) == [1]
    connection.close()


def test_a_commit_that_fails_takes_everything_back(tmp_path: Path) -> None:
    """A COMMIT that is refused, here by a deferred constraint, leaves no transaction open and nothing stored."""
    connection = new_outbox(tmp_path)
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
    connection.execute("CREATE TABLE child (id REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")

    def orphan() -> None:
        entries.enqueue(connection, "x", [[sized(1)]], clock=FakeClock())
        connection.execute("INSERT INTO child VALUES (1)")

    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        attempt(connection, orphan)
    assert not connection.in_transaction
    assert waiting(connection) == []
    connection.close()


def test_a_commit_that_must_wait_too_long_takes_everything_back(tmp_path: Path) -> None:
    """In rollback mode a reader can keep a COMMIT from happening: it fails as busy, whole, and can be tried again."""
    connection = new_outbox(tmp_path)
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("PRAGMA busy_timeout = 1")
    reader = sqlite3.connect(tmp_path / "agent.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM durablews_meta").fetchall()

    def write() -> None:
        entries.enqueue(connection, "x", [[sized(1)]], clock=FakeClock())

    with pytest.raises(sqlite3.OperationalError, match="locked"):
        attempt(connection, write)
    assert not connection.in_transaction
    reader.execute("COMMIT")
    attempt(connection, write)
    assert waiting(connection) == [1]
    reader.close()
    connection.close()


def test_a_full_disk_that_has_rolled_back_by_itself_is_no_second_error(tmp_path: Path) -> None:
    """The error that comes out is the disk's, also where SQLite has ended the transaction on its own."""
    connection = new_outbox(tmp_path)
    connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0]}")

    def too_much() -> None:
        entries.enqueue(connection, "x", [[sized(5000)] * 20], clock=FakeClock())

    with pytest.raises(sqlite3.OperationalError, match="full"):
        attempt(connection, too_much)

    def ended_already() -> None:
        connection.execute("ROLLBACK")
        raise ValueError("the first error")

    with pytest.raises(ValueError, match="the first error"):
        attempt(connection, ended_already)
    connection.close()


def test_an_uncertain_commit_names_its_error() -> None:
    """What nobody can know is an error of its own, with SQLite's name for it."""
    assert UncertainCommit("SQLITE_IOERR_FSYNC").name == str(UncertainCommit("SQLITE_IOERR_FSYNC"))


# -- jobs


async def test_a_job_returns_and_raises_what_it_does(db: aiosqlite.Connection) -> None:
    """A job runs with the connection itself, on its thread, and its caller gets its value or its error."""

    def fail(connection: sqlite3.Connection) -> None:
        raise LookupError("of the job's own")

    assert await run_job(db, lambda connection: connection.execute("SELECT 1, 2").fetchone()) == (1, 2)
    with pytest.raises(LookupError, match="of the job's own"):
        await run_job(db, fail)
    assert list(await db.execute_fetchall("SELECT ?", (5,))) == [(5,)]


async def test_a_cancelled_caller_leaves_nothing_half_done(db: aiosqlite.Connection, tmp_path: Path) -> None:
    """Cancelled at any moment, 200 times: every job ran whole or not at all, no transaction stays open (P7)."""
    dice = random.Random(20261122)
    clock = FakeClock()
    begun: list[int] = []
    ended: list[int] = []
    told: list[int] = []

    def job(connection: sqlite3.Connection, number: int) -> int:
        begun.append(number)
        with transaction(connection):
            entries.enqueue(connection, "x", [[sized(number + 1)] * 3], clock=clock)
        ended.append(number)
        return number

    async def caller(number: int) -> None:
        told.append(await run_job(db, lambda connection: job(connection, number)))

    cancelled = 0
    for number in range(200):
        task = asyncio.create_task(caller(number))
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        for _ in range(10_000):  # so that every other one is cancelled while its job runs
            if number % 2 == 0 or number in begun:
                break
            await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            cancelled += 1
    assert cancelled > 50
    assert not await run_job(db, lambda connection: connection.in_transaction)
    sizes = await run_job(
        db, lambda connection: connection.execute("SELECT bytes - 1 FROM durablews_entries ORDER BY seq").fetchall()
    )
    assert [size for (size,) in sizes] == [number for number in ended for _ in range(3)]
    assert begun == ended
    assert set(told) <= set(ended)
    await run_job(db, totals)
    assert integrity(tmp_path / "agent.db") == "ok"
