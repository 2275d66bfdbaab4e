"""The file behind a receiver: one aiosqlite connection, one transaction at a time.

Promises: a commit that returned survives power loss (WAL, ``synchronous=FULL``, both read back); a file that it creates
is readable by its owner only; the connection is closed whatever happens to the task. It may be the application's own
database: only ``durablews_*`` tables are added, and the file is put into WAL mode.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TypeVar, cast

import aiosqlite

from durablews.connecting import open_connection
from durablews.errors import (
    DurablewsError,
    NotAnOutbox,
    OutboxClosed,
    OutboxLocked,
    OutboxMissing,
    OutboxTooNew,
    StorageFailed,
)
from durablews.jobs import run_job, transaction
from durablews.receiver import ledger
from durablews.receiver.session import StateLost

__all__ = ["Store"]

T = TypeVar("T")

_FULL: Final = 2  # PRAGMA synchronous


class Store:
    """A SQLite file that keeps the receiver's ledger, beside whatever the application keeps there.

        async with Store("app.db", prepare=create_my_tables) as store, Receiver(store) as receiver: ...

    Args:
        path: the file; created with mode 0600 when it is missing.
        busy_timeout: how long to wait for another program's transaction, in seconds.
        prepare: called with the `sqlite3` connection at every opening, inside the transaction that creates the ledger's
            tables: the place for the application's own ``CREATE TABLE IF NOT EXISTS``. What it raises undoes both.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        busy_timeout: float = 5.0,
        prepare: Callable[[sqlite3.Connection], None] | None = None,
    ) -> None:
        self.path = os.fspath(path)
        #: Held for the length of each transaction: they share one connection.
        self.lock = asyncio.Lock()
        self._busy_timeout = busy_timeout
        self._prepare = prepare
        self._connection: aiosqlite.Connection | None = None

    @property
    def opened(self) -> bool:
        """Return whether it is open."""
        return self._connection is not None

    @property
    def connection(self) -> aiosqlite.Connection:
        """Return the connection, in autocommit mode. Hold `lock` around transactions of your own.

        Raises:
            OutboxClosed: the store is not open.
        """
        if self._connection is None:
            raise OutboxClosed(self.path, "the receiver's store is not open")
        return self._connection

    async def run(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run `job` on the database's thread. One that opens a transaction wants `lock` held."""
        return await run_job(self.connection, job)

    async def __aenter__(self) -> Self:
        """Open the file and create what is missing.

        Raises:
            OutboxMissing: its folder does not exist.
            NotAnOutbox: it is not a SQLite database.
            OutboxTooNew: a newer durablews wrote it.
            OutboxLocked: another program held it for longer than the busy timeout.
            StorageFailed: it cannot be opened, or refuses WAL or FULL.
        """
        if self.opened:
            raise RuntimeError(f"{self.path}: the store is open already")
        connection: aiosqlite.Connection | None = None
        try:
            await asyncio.to_thread(_create, self.path)
            connection = await open_connection(self.path, timeout=self._busy_timeout)
            await run_job(connection, self._set_up)
        except BaseException as exc:
            if connection is not None:
                await _close(connection)
            if isinstance(exc, sqlite3.Error | OSError):
                raise self.error_of(exc) from exc
            raise
        self._connection = connection
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await _close(connection)

    def error_of(self, exc: sqlite3.Error | OSError, *, stored: bool | None = False) -> DurablewsError:
        """Return the error of durablews that says what `exc` means for this file."""
        if isinstance(exc, FileNotFoundError):
            return OutboxMissing(self.path, "its folder does not exist")
        if isinstance(exc, OSError):
            return StorageFailed(self.path, exc.strerror or str(exc), stored)
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF  # the primary code of an extended one
        if code == sqlite3.SQLITE_NOTADB:
            return NotAnOutbox(self.path, "not a SQLite database")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return OutboxLocked(self.path, f"locked by another program for more than {self._busy_timeout:g} s")
        return StorageFailed(self.path, str(exc), stored)

    def failure_of(self, error: Exception) -> Exception:
        """Return what to raise for the `error` of an outcome: durablews' own errors for what is the store's fault."""
        if isinstance(error, StateLost):
            return StorageFailed(self.path, str(error), None)
        # The subclasses (IntegrityError and so on) are the application's statements, and its to understand.
        if type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError):
            return self.error_of(cast(sqlite3.Error, error), stored=None)
        return error

    def _set_up(self, connection: sqlite3.Connection) -> None:
        # The tables come first: a file that turns out not to be ours is left as it was, its journal mode too.
        with transaction(connection):
            present = ledger.installed_schema(connection)
            if present is not None and present > ledger.SCHEMA:
                raise OutboxTooNew(
                    self.path,
                    f"its receiver tables have version {present}, this durablews knows up to {ledger.SCHEMA}; "
                    "nothing was touched, update durablews",
                )
            if self._prepare is not None:
                self._prepare(connection)
            ledger.install(connection)
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        connection.execute("PRAGMA synchronous=FULL")
        level = connection.execute("PRAGMA synchronous").fetchone()[0]
        if mode != "wal" or level != _FULL:
            # An ack is a promise (S1): better no receiver than one that may take it back.
            raise StorageFailed(self.path, f"needs WAL and synchronous=FULL, got {mode} and {level}")


def _create(path: str) -> None:
    """Create the file for its owner only; SQLite gives its -wal and -shm the same mode. An existing one is not opened:
    closing a descriptor of it would drop SQLite's locks in this process."""
    if path == ":memory:":
        return
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600))
    except FileExistsError:
        return


async def _close(connection: aiosqlite.Connection) -> None:
    """Close to the end even when cancelled: an open aiosqlite connection keeps the interpreter from exiting."""
    closing = asyncio.ensure_future(connection.close())
    cancelled: asyncio.CancelledError | None = None
    while not closing.done():
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError as exc:
            cancelled = exc
    closing.result()
    if cancelled is not None:
        raise cancelled
