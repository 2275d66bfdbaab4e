"""Which process this is, without a system call: `os.getpid` costs as much as the checksum of a message.

And which files it must not open. SQLite keeps a process's locks in memory, and a fork copies that: the child takes
its parent's locks for its own, so that the parent may remove a log that the child still writes to. No new
connection in the child is safe from that (sqlite.org, "How to corrupt", section 2.6), only a program of its own is.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable

__all__ = ["note_closed", "note_opened", "same_process", "this_process", "was_open_before_fork"]

_token = object()
_open: Counter[Hashable] = Counter()
_inherited: set[Hashable] = set()


def this_process() -> object:
    """Return what stands for this process: the same until a fork, and another one in the child."""
    return _token


def same_process(token: object) -> bool:
    """Whether `token` was given out in this process, and not in one that it was forked from."""
    return token is _token


def note_opened(file: Hashable) -> None:
    """Take note that a connection to this file is open from now on."""
    _open[file] += 1


def note_closed(file: Hashable) -> None:
    """Take note that one of them is closed."""
    _open[file] -= 1


def was_open_before_fork(file: Hashable) -> bool:
    """Whether this process was forked from one that had the file open."""
    return file in _inherited


def _forked() -> None:
    global _token
    _token = object()
    _inherited.update(+_open)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
