"""Which process this is, without a system call: `os.getpid` costs as much as the checksum of a message."""

from __future__ import annotations

import os

__all__ = ["same_process", "this_process"]

_token = object()


def this_process() -> object:
    """Return what stands for this process: the same until a fork, and another one in the child."""
    return _token


def same_process(token: object) -> bool:
    """Whether `token` was given out in this process, and not in one that it was forked from."""
    return token is _token


def _forked() -> None:
    global _token
    _token = object()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
