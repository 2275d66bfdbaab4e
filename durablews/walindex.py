"""The shared memory beside an outbox (``agent.db-shm``): all of it on the disk before SQLite writes into it.

SQLite maps that file and writes one byte into each 4 KiB of it. On a file system of 1 KiB blocks the rest are holes,
and when the disk is full the kernel answers a write into one with SIGBUS, which ends the process (measured on ext4 with
18 to 37 KiB free). So it is allocated here, in whole, through a descriptor of our own.

To close any descriptor of a file drops every lock that this process has on it (sqlite.org, "How to corrupt", 2.2), and
connections that we know nothing of may be open. SQLite removes the file when its last user leaves: only then, when the
file has gone from its folder, is the descriptor closed. A process keeps one for each outbox at most.

The first to open a database cuts this file to nothing. Who finds byte 128 unlocked takes himself for the first; so we
lock it while a database is opened, having been the first in his place: the file is emptied, and then allocated. Linux
has the lock that this needs, one that holds against our own process. Elsewhere the file is allocated just after the
opening, and without `posix_fallocate` (macOS, Windows) nothing is done here at all.

Format and sizes: sqlite.org/walformat.html, section 2.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

if sys.platform != "win32":
    import fcntl

__all__ = ["Log", "LogIndex", "allocate", "belongs_as", "close_gone", "index_of", "opening"]

# One block of the index, and the frames of the log that the first block and each further one has room for.
_BLOCK, _FIRST_FRAMES, _MORE_FRAMES = 32_768, 4062, 4096
# The byte that every user of the file keeps locked (SQLite's os_unix.c, UNIX_SHM_DMS).
_IN_USE = 128
# What a file system says that allocates nothing ahead.
_CANNOT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)


class Log(NamedTuple):
    """What the index says of the log: frames in it, how many of them the database has already, its size in pages."""

    frames: int
    moved: int
    pages: int

    @property
    def owed(self) -> int:
        """Frames that the database does not have yet."""
        return max(0, self.frames - self.moved)


class LogIndex:
    """The shared memory of one outbox, held open by this process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._blocks = 0
        #: How many are opening the database just now.
        self.opening = 0

    def log(self) -> Log:
        """Return how the log stands. Costs one system call, and no lock."""
        header = os.pread(self._descriptor, 100, 0)
        if len(header) < 100:
            return Log(0, 0, 0)
        (frames, pages), (moved,) = struct.unpack_from("=II", header, 16), struct.unpack_from("=I", header, 96)
        return Log(frames, moved, pages)

    def cover(self, frames: int) -> None:
        """Allocate what a log of so many frames needs.

        Raises:
            OSError: the disk is full; SQLite must not write so much.
        """
        blocks = 1 + max(0, -((_FIRST_FRAMES - frames) // _MORE_FRAMES))
        if blocks > self._blocks:
            allocate(self._descriptor, blocks * _BLOCK)
            self._blocks = blocks

    # -- for `opening`

    def is_at(self, path: str) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        except OSError:
            return False

    def become_first(self) -> None:
        """Empty and allocate the file if nobody uses it, and let SQLite believe that somebody does."""
        if _lock(self._descriptor, fcntl.F_WRLCK):
            # What a crash left there must not be believed. It keeps its room: there may be none to be had again.
            if os.fstat(self._descriptor).st_size > _BLOCK:
                os.ftruncate(self._descriptor, _BLOCK)
            allocate(self._descriptor, _BLOCK)
            os.pwrite(self._descriptor, bytes(_BLOCK), 0)
        _lock(self._descriptor, fcntl.F_RDLCK)

    def opened(self) -> None:
        self._blocks = 0
        self.cover(0)

    def let_go(self) -> None:
        _lock(self._descriptor, fcntl.F_UNLCK)

    def close(self) -> None:
        os.close(self._descriptor)


_held: dict[str, LogIndex] = {}
_guard = threading.Lock()


def _forget() -> None:
    # A child has none of its parent's locks, so that closing drops none.
    global _guard
    _guard = threading.Lock()
    for index in _held.values():
        index.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def opening(database: str, *, ours: bool) -> Iterator[None]:
    """Hold the shared memory of a database while a connection is opened inside, and has read from it.

    Args:
        database: its path.
        ours: whether it is known to be in WAL mode, so that the file may be created.

    Raises:
        OSError: it cannot be allocated, the disk is full.
    """
    path = f"{os.path.realpath(database)}-shm"
    with _guard:
        _close_gone()
        index = _enter(path, database, ours)
    try:
        yield
    finally:
        with _guard:
            if index is not None:
                index.opening -= 1
                if not index.opening:
                    index.let_go()
    with _guard:
        _close_gone()
        # Its last user may have removed the file just before SQLite opened it, and then this is another one.
        index = _held.get(path) or _hold(path, database, create=False)
        if index is not None:
            index.opened()


def close_gone() -> None:
    """Close what belongs to files that have gone: nobody has those open."""
    with _guard:
        _close_gone()


def index_of(database: str) -> LogIndex | None:
    """Return the shared memory that `opening` held; None where that is not done."""
    return _held.get(f"{os.path.realpath(database)}-shm")


def _enter(path: str, database: str, ours: bool) -> LogIndex | None:
    index = _held.get(path) or _hold(path, database, create=ours)
    if index is None or not hasattr(fcntl, "F_OFD_SETLK"):
        return None
    if not index.opening:
        try:
            index.become_first()
        except OSError:
            index.let_go()
            raise
    index.opening += 1
    return index


def _hold(path: str, database: str, *, create: bool) -> LogIndex | None:
    if not hasattr(os, "posix_fallocate"):
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except OSError:
        return None  # SQLite will say what is wrong, if anything is
    if create and os.fstat(descriptor).st_size == 0:
        belongs_as(descriptor, database)
    _held[path] = LogIndex(descriptor)
    return _held[path]


def _close_gone() -> None:
    for path, index in list(_held.items()):
        if not index.opening and not index.is_at(path):
            index.close()
            del _held[path]


def belongs_as(descriptor: int, database: str) -> None:
    """Let whoever may use the database use this new file beside it, as SQLite does with those that it makes."""
    with suppress(OSError):
        status = os.stat(database)
        os.fchmod(descriptor, stat.S_IMODE(status.st_mode) & 0o777)
        if os.geteuid() == 0:
            os.fchown(descriptor, status.st_uid, status.st_gid)


def allocate(descriptor: int, size: int) -> None:
    """Let the first `size` bytes of a file have their room on the disk; nothing where that cannot be done.

    Raises:
        OSError: there is no such room.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    while True:
        try:
            return os.posix_fallocate(descriptor, 0, size)
        except InterruptedError:
            continue
        except OSError as exc:
            if exc.errno not in _CANNOT:
                raise
            return


def _lock(descriptor: int, kind: int) -> bool:
    """Lock the byte for this descriptor, or unlock it, without waiting; say whether that was possible."""
    wanted = struct.pack("hhqqi0q", kind, os.SEEK_SET, _IN_USE, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
    except OSError:
        return False
    return True
