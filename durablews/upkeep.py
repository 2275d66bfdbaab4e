"""Keeps the files of an outbox small: the log while nobody drains, and the database after a backlog has gone.

Only the drainer checkpoints (`database.prepare` says why), so a producer that writes much and alone takes the drainer's
place for as long as one checkpoint takes. Only the drainer gives pages back to the file system, a few at a time.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress

from durablews.database import BUSY_TIMEOUT, wal_bytes
from durablews.ownership import Ownership, lock_path
from durablews.schema import APPLICATION_ID

__all__ = ["LARGEST_LOG", "checkpoint_if_alone", "give_back", "shorten_log"]

#: Bytes of log above which it is looked why: twice what the drainer lets it grow to before it moves it.
LARGEST_LOG = 8 * 1024 * 1024

# Milliseconds to wait for others. The log can wait until the next time; the caller has messages to store.
_PATIENCE = 100
# Pages of a step: 256 of 4 KiB take some 5 ms (measured), for which a message may have to wait. So many free ones are
# kept for the next backlog, which would only make the file grow again. While more messages wait than this, none are
# given back: draining needs the disk, and pages that are in use would have to be moved.
_STEP, _KEPT, _NEARLY_EMPTY = 256, 1024, 10_000


def checkpoint_if_alone(connection: sqlite3.Connection, path: str) -> bool:
    """Move the log into the database and empty it, if nobody drains this outbox.

    Returns:
        Whether the log is empty now; False when there is a drainer, whose work it is, or someone reads the log.

    Raises:
        sqlite3.Error: the disk failed.
    """
    if not _lock_stays_usable(path):
        return False
    ownership = Ownership(path)
    try:
        if ownership.acquire() is not None:
            return False
    except OSError:
        return False
    try:
        connection.execute(f"PRAGMA busy_timeout = {_PATIENCE}")
        busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        return not busy
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT * 1000)}")
        ownership.release()


def shorten_log(connection: sqlite3.Connection, path: str) -> int:
    """Empty a log that has grown far beyond what a checkpoint leaves, for its drainer.

    A program that keeps a transaction open on the outbox keeps the log from starting anew: it grows by all that is
    written. When that program has ended, this empties it, also when no message ever comes again. In an application's
    database the log is the application's own.

    Returns:
        The bytes of log that another program holds; 0 when it is short.

    Raises:
        sqlite3.Error: the disk failed.
    """
    if wal_bytes(path) <= LARGEST_LOG or _ask(connection, "application_id") != APPLICATION_ID:
        return 0
    try:
        # Long enough for a writer, who needs milliseconds; a reader that has held it until now is not waited for.
        connection.execute(f"PRAGMA busy_timeout = {_PATIENCE}")
        busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        return wal_bytes(path) if busy else 0
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT * 1000)}")


def give_back(connection: sqlite3.Connection) -> bool:
    """Give some free pages back to the file system, when most of the file is free and the outbox nearly empty.

    Only from a file of our own, which was made with ``auto_vacuum = INCREMENTAL``; an application's database keeps its
    free pages for itself. Waits for nobody: while another program writes, nothing is given back.

    Returns:
        Whether there is more to give back.

    Raises:
        sqlite3.Error: the disk failed.
    """
    free, pages = _ask(connection, "freelist_count"), _ask(connection, "page_count")
    if _ask(connection, "auto_vacuum") != 2:
        return False
    if free <= _KEPT or 2 * free < pages:
        _cut(connection, pages)
        return False
    if connection.execute("SELECT messages FROM durablews_totals").fetchone()[0] > _NEARLY_EMPTY:
        return False
    try:
        connection.execute("PRAGMA busy_timeout = 0")
        # Not `execute`, which frees a single page: the statement frees one with each step (measured).
        connection.executescript(f"PRAGMA incremental_vacuum({min(_STEP, free - _KEPT)})")
    except sqlite3.OperationalError as exc:
        if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT * 1000)}")
    return True


def _cut(connection: sqlite3.Connection, pages: int) -> None:
    """Let the file end where the database does: a checkpoint brings that about, unless someone reads the log."""
    path = connection.execute("PRAGMA database_list").fetchone()[2]
    size = pages * _ask(connection, "page_size")
    with suppress(FileNotFoundError):  # moved away meanwhile, which is for others to tell
        if not path or os.stat(path).st_size <= size:
            return
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


def _ask(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])


def _lock_stays_usable(path: str) -> bool:
    """Say whether taking the lock leaves no file behind that the outbox's own user could not open."""
    if os.name != "posix" or lock_path(path).exists():
        return True
    return os.stat(path).st_uid == os.geteuid()
