"""Room on the disk for the acknowledgements: an outbox can be emptied although the disk is full.

To delete takes space too: the log of the deletion and, before the log can start again, the place in the database for
what it holds already. So 4 MiB are held in a file beside the outbox. At most half of it is for bringing the log home,
which leaves the log the room that it has then. 4000 messages, the most that are deleted at once, need 2.9 MB for that
(measured: 685 frames, with 1000 bytes a message; fewer with less or more). When the drainer meets a full disk it gives
up 512 KiB of them, moves the log into the database, and tries again, up to eight times; not all at once, because others
wait for every byte of it.

What senders store never takes from it. While it is not whole they have only the free pages within the file, and
`OutboxFull` after those. While it is whole, what is in the log and not yet in the database is counted against the half
that is meant for it, and what is beyond that must be free on the disk at the time. So it goes when another program's
reader keeps a snapshot, and with it the log. The drainer makes the reserve whole as soon as there is room; while nobody
drains, whoever writes does.

Before each transaction the shared memory that the log will need is allocated as well (`durablews.walindex`). A program
that inserts with SQL of its own does none of this. Only a file of our own has a reserve: an application's database is
its owner's business. Without `posix_fallocate` (macOS, Windows) there is none.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from durablews import database
from durablews.errors import OutboxError, OutboxFull
from durablews.messages import Draft
from durablews.ownership import holder_of
from durablews.reservefile import RESERVE, fill, free_bytes, give_part, is_whole
from durablews.walindex import LogIndex, index_of

__all__ = ["Reserve"]

T = TypeVar("T")

# Frames ahead of the log for which the shared memory is there: three blocks. No change of ours writes as many, the
# expiry of 5000 entries that lie scattered included.
_AHEAD = 12_000
_PAGE = 4096
# Of what is set aside, the part that brings the log home.
_FOR_LOG = RESERVE // 2


class Reserve:
    """The reserve of one outbox as one of its writers uses it, on the thread of the connection.

    Args:
        path: the outbox.
        drainer: whether this process deletes, and so may take from the reserve.
    """

    def __init__(self, path: str, *, drainer: bool) -> None:
        self._path = path
        self._drainer = drainer
        self._index: LogIndex | None = None
        self._ours = self._kept = False
        #: What is wrong, as a sentence; None while the reserve is whole.
        self.trouble: str | None = None

    def open(self, connection: sqlite3.Connection) -> None:
        """Begin; the connection has read from the outbox."""
        self._index = index_of(self._path)
        self._ours = database.is_ours(connection)
        self._kept = self._ours and hasattr(os, "posix_fallocate")
        with suppress(OutboxError):  # then each transaction tries again
            self._cover(_AHEAD)
        self.restore()

    def admit(self, connection: sqlite3.Connection, requests: Sequence[Sequence[Draft]]) -> None:
        """Let a transaction begin that stores `requests` and what is owed.

        Raises:
            OutboxFull: the disk has no room for it that is safe to use. Nothing was begun.
            StorageFailed: the disk failed.
        """
        # A row of a little more than half a page has one to itself. Each message may also stand in the indexes of ids
        # and of deadlines, and as much may have to go for it as comes.
        growth = 2 * sum([draft.bytes + 64 for drafts in requests for draft in drafts]) // _PAGE + 16
        self._cover(max(_AHEAD, 2 * growth + 2 * sum(map(len, requests))))
        if not requests or not self._kept:
            return
        if not is_whole(self._path) and not self.restore():
            if connection.execute("PRAGMA freelist_count").fetchone()[0] < growth:
                raise self._full("what is left is kept for acknowledgements")
        elif self._index is not None and not self._has_room(self._index, growth):
            if self._drainer:
                _move(connection)
            if not self._has_room(self._index, growth):
                raise self._full("its log could not be moved into it")

    def insist(self, connection: sqlite3.Connection, job: Callable[[], T], *, owed: bool = True) -> T:
        """Run `job`; when the disk is full, in the room that the log has and, if it is `owed`, that the reserve gives.

        Raises:
            OutboxFull: there was none.
        """
        while True:
            try:
                with database.storage_errors(self._path):
                    return job()
            except OutboxFull:
                if not (self._restart_log(connection) or (owed and self._give(connection))):
                    raise

    def restore(self) -> bool:
        """Make the reserve whole, if there is room and it is for us to do; return whether it is whole."""
        whole = not self._kept or is_whole(self._path)
        if not whole and (self._drainer or holder_of(self._path) is None):
            fill(self._path)
            whole = is_whole(self._path)
        self.trouble = None if whole else "the disk is full: only acknowledgements are written"
        return whole

    # -- inside

    def _cover(self, frames: int) -> None:
        if self._index is None:
            return
        try:
            self._index.cover(self._index.log().frames + frames)
        except OSError as exc:
            raise database.unallocated(self._path, exc, "the index of its log has no room") from exc

    def _has_room(self, index: LogIndex, growth: int) -> bool:
        """Say whether, after `growth` more pages, the whole log can be moved into the database."""
        owed = (index.log().owed + growth) * _PAGE
        return owed <= _FOR_LOG or owed + growth * _PAGE <= _FOR_LOG + free_bytes(self._path)

    def _restart_log(self, connection: sqlite3.Connection) -> bool:
        """Move all of the log, if there is anything to move, so that it starts again in the room that it has."""
        if not self._drainer or self._index is None or not self._index.log().owed:
            return False
        return _home(connection) and not self._index.log().owed

    def _give(self, connection: sqlite3.Connection) -> bool:
        """Give up some of the reserve; return whether there was any, so that it is worth another try."""
        given = False
        while self._drainer and self._kept and give_part(self._path):
            given = True
            if _home(connection):
                break
        self.trouble = None if is_whole(self._path) else "the disk is full: only acknowledgements are written"
        return given

    def _full(self, why: str) -> OutboxFull:
        return OutboxFull(self._path, f"the disk is full: {why}; nothing was stored")


def _move(connection: sqlite3.Connection) -> tuple[int, int]:
    """Move what no reader keeps into the database; return the frames of the log, and those that are moved now."""
    _, frames, moved = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return frames, moved


def _home(connection: sqlite3.Connection) -> bool:
    """Move the log, and say whether the disk had room for that."""
    try:
        _move(connection)
    except sqlite3.OperationalError as exc:
        if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_FULL:
            raise
        return False
    return True
