"""What a configuration is judged against besides itself: this machine's files, environment and clock."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Protocol

__all__ = ["Surroundings", "ThisMachine"]


class Surroundings(Protocol):
    """What the rules ask."""

    environment: Mapping[str, str]

    def now(self) -> float:
        """Seconds since 1970 UTC."""

    def mode(self, path: str) -> int | None:
        """Return the permission bits of a file; None where there is none, or where they say nothing."""

    def is_folder(self, path: str) -> bool:
        """Whether there is a folder of that name."""

    def file_system(self, path: str) -> str | None:
        """Return the type of the file system that a file is on or would be on, such as ``ext4``; None: not known."""

    def writable_folder(self, path: str) -> bool | None:
        """Whether this process may write into the folder of a file; None when there is no such folder."""


class ThisMachine:
    """The machine that the analyser runs on.

    Args:
        mounts: the kernel's list of what is mounted where.
    """

    def __init__(self, mounts: str = "/proc/self/mounts") -> None:
        self.environment: Mapping[str, str] = os.environ
        self._mounts = mounts

    def now(self) -> float:
        return time.time()

    def mode(self, path: str) -> int | None:
        if os.name != "posix":
            return None
        try:
            return os.stat(path).st_mode & 0o777
        except (OSError, ValueError):
            return None

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def file_system(self, path: str) -> str | None:
        try:
            wanted = os.path.realpath(path)
            with open(self._mounts, encoding="utf-8", errors="surrogateescape") as file:
                mounts = [line.split() for line in file]
        except (OSError, ValueError):
            return None
        # The longest mount point that holds the file; the last one of a point hides the others. proc(5) writes a
        # blank as \040.
        found, length = None, -1
        for _, point, kind, *_ in mounts:
            point = point.replace("\\040", " ")
            if (wanted == point or wanted.startswith(point.rstrip("/") + "/")) and len(point) >= length:
                found, length = kind, len(point)
        return found

    def writable_folder(self, path: str) -> bool | None:
        folder = os.path.dirname(os.path.abspath(path))
        return os.access(folder, os.W_OK | os.X_OK) if os.path.isdir(folder) else None
