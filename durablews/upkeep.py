"""Keeps the log of an outbox short while nobody drains it.

Only the drainer checkpoints (`database.prepare` says why), so a producer that writes much and alone takes the drainer's
place for as long as one checkpoint takes.
"""

from __future__ import annotations

import os
import sqlite3

from durablews.database import BUSY_TIMEOUT
from durablews.ownership import Ownership, lock_path

__all__ = ["checkpoint_if_alone"]

# Milliseconds to wait for readers. The log can wait until the next time; the caller has messages to store.
_PATIENCE = 100


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


def _lock_stays_usable(path: str) -> bool:
    """Say whether taking the lock leaves no file behind that the outbox's own user could not open."""
    if os.name != "posix" or lock_path(path).exists():
        return True
    return os.stat(path).st_uid == os.geteuid()
