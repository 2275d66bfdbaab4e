"""The file that holds room on the disk beside an outbox, for when there is no other: ``agent.db-reserve``.

What it is for and who may take from it is `durablews.reserve`. It is no database: anyone may open and close it.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from durablews.walindex import allocate, belongs_as

__all__ = ["DISK_FULL", "RESERVE", "fill", "free_bytes", "give_part", "is_whole", "make_room", "reserve_path"]

#: Bytes. `durablews.reserve` says why so many.
RESERVE = 4 * 1024 * 1024
#: What is given up at a time.
_PART = 512 * 1024
#: The errors of a disk, or a user's share of it, without room.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def reserve_path(outbox: str) -> str:
    """Return the reserve of an outbox."""
    return f"{os.path.realpath(outbox)}-reserve"


def is_whole(outbox: str) -> bool:
    """Say whether nothing of it is in use. Costs one system call."""
    return _size(outbox) >= RESERVE


def fill(outbox: str) -> None:
    """Make it, or make it whole, if there is room."""
    path = reserve_path(outbox)
    with suppress(OSError):
        if free_bytes(outbox) < RESERVE - _size(outbox):
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            belongs_as(descriptor, outbox)
            allocate(descriptor, RESERVE)
        finally:
            os.close(descriptor)


def give_part(outbox: str) -> bool:
    """Give a part of it back to the disk; return whether there was any."""
    size = _size(outbox)
    try:
        if size > 0:
            os.truncate(reserve_path(outbox), max(0, size - _PART))
    except OSError:
        return False
    return size > 0


def make_room(outbox: str) -> None:
    """Give up a part if hardly anything else is free: to open an outbox takes some room too."""
    with suppress(OSError):
        if free_bytes(outbox) < _PART:
            give_part(outbox)


def free_bytes(outbox: str) -> int:
    """Return the bytes that this user may still write on the disk of an outbox."""
    status = os.statvfs(os.path.dirname(os.path.realpath(outbox)))
    return status.f_bavail * status.f_frsize


def _size(outbox: str) -> int:
    try:
        return os.stat(reserve_path(outbox)).st_size
    except OSError:
        return 0
