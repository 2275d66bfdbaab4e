"""Who drains an outbox: one client per file, by a lock that the kernel frees when its holder dies.

A POSIX record lock on a file beside the outbox that nothing else opens: closing any descriptor of a locked file in the
process that holds the lock would drop it. A record lock belongs to the process and does not pass to a forked child,
which is why it is not `flock`; and because it would be granted twice within one process, a registry keeps count there.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["Ownership", "holder_of", "lock_path"]

_held: dict[str, str] = {}  # resolved lock path -> who, in this process
# To close any descriptor of the lock file drops the lock, also one that another thread has just taken.
_guard = threading.Lock()


def _forget() -> None:
    global _guard
    _held.clear()
    _guard = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def lock_path(outbox: str | os.PathLike[str]) -> Path:
    """Return the lock file of an outbox: ``agent.db-lock`` beside ``agent.db``."""
    resolved = Path(os.path.realpath(outbox))
    return resolved.with_name(resolved.name + "-lock")


class Ownership:
    """The right to drain one outbox, from `acquire` to `release`."""

    def __init__(self, outbox: str | os.PathLike[str]) -> None:
        self._path = lock_path(outbox)
        self._descriptor: int | None = None
        self._pid = os.getpid()

    def acquire(self) -> str | None:
        """Take the right and return None, or return who has it. Never waits.

        Raises:
            OSError: the lock file cannot be opened.
        """
        with _guard:
            return self._acquire()

    def _acquire(self) -> str | None:
        key = str(self._path)
        if key in _held:
            return _held[key]
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            if not _lock(descriptor):
                return _read(descriptor)
            who = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            with suppress(OSError):  # a full disk takes no name, and must be drained all the same
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, who.encode())
            _held[key] = who
            self._descriptor, descriptor = descriptor, -1
            return None
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def release(self) -> None:
        """Give the right back. In a forked child this does nothing: the right stayed with the parent."""
        if self._descriptor is None or os.getpid() != self._pid:
            return
        with _guard:
            os.close(self._descriptor)
            self._descriptor = None
            _held.pop(str(self._path), None)


def holder_of(outbox: str | os.PathLike[str]) -> str | None:
    """Return who drains an outbox now, or None. Takes nothing, creates nothing."""
    path = lock_path(outbox)
    with _guard:
        if str(path) in _held:
            return _held[str(path)]
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError:
            return None
        try:
            return None if _lock(descriptor, shared=True) else _read(descriptor)
        finally:
            os.close(descriptor)


def _read(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 500).decode(errors="replace") or "another process"


def _lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock the whole file without waiting; closing the descriptor frees it."""
    try:
        if sys.platform == "win32":
            # Byte 1 000 000: a lock on Windows also forbids reading, and the holder's name stands at the start.
            os.lseek(descriptor, 1_000_000, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
