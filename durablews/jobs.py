"""Whole transactions as one job on an aiosqlite connection's thread.

A hop to that thread costs about 300 µs (measured), as much as the sync itself, and BEGIN, INSERT and COMMIT as three
awaits wedge the connection when the caller is cancelled between them. A job is one hop, and once handed over it runs to
its end whatever becomes of the task that awaits it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import aiosqlite  # it brings asyncio, and `durablews send` needs only `transaction`

__all__ = ["JobConnection", "UncertainCommit", "run_job", "transaction"]

T = TypeVar("T")


class UncertainCommit(Exception):
    """The disk failed while a commit was written: this process sees it rolled back, the next may find it there."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Result:
    """What a job returned, in the shape of the cursor that aiosqlite expects from `execute`."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def fetchall(self) -> Any:
        return self._value


class JobConnection(sqlite3.Connection):
    """A connection whose `execute` also takes a callable: pass it as `factory` to `aiosqlite.connect`."""

    def execute(self, sql: Any, parameters: Any = (), /) -> Any:
        if callable(sql):
            return _Result(sql(self))
        return super().execute(sql, parameters)


async def run_job(connection: aiosqlite.Connection, job: Callable[[sqlite3.Connection], T]) -> T:
    """Run `job` with the underlying connection on its thread and return what it returns, or raise what it raises.

    Cancelling the await does not stop the job.
    """
    return await connection.execute_fetchall(job)  # type: ignore[return-value]


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock from the first statement to the commit; roll back on an error.

    BEGIN IMMEDIATE: a transaction that starts by reading and then writes fails at once, without waiting for the busy
    timeout, when another connection has written meanwhile (SQLITE_BUSY_SNAPSHOT).
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        try:
            connection.execute("COMMIT")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF == sqlite3.SQLITE_IOERR:
                raise UncertainCommit(exc.sqlite_errorname) from exc
            raise
    except BaseException:
        # A full disk makes SQLite roll back by itself.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
