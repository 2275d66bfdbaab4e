"""Small file systems that can be filled to the last block: tmpfs, and ext4 on a loop device with either block size.

Only root can mount one. They are made without blocks kept for root (``-m 0``), as on a data partition.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import pytest

__all__ = ["KINDS", "Disk", "NoDisk", "disk_fixture"]

#: What `Disk` can make: the kind and, for ext4, the block size in bytes.
KINDS = ("tmpfs", "ext4-4096", "ext4-1024")
_MIB = 1024 * 1024


class NoDisk(Exception):
    """This machine does not let us mount one; the text says why."""


class Disk:
    """A mounted file system of `size` bytes; use it with ``with``. At the end nothing is left of it.

    Attributes:
        path: where it is mounted.

    Raises:
        NoDisk: we are not root, or the machine lacks what it takes.
    """

    def __init__(self, kind: str, size: int = 48 * _MIB) -> None:
        self.kind = kind
        self._size = size
        self._mounted = False

    def __enter__(self) -> Self:
        if not sys.platform.startswith("linux"):
            raise NoDisk("loop devices are Linux's")
        if os.geteuid() != 0:
            raise NoDisk("only root can mount a file system")
        # In memory where that is to be had: it is written over and over again.
        self._folder = Path(tempfile.mkdtemp(prefix="dws-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.path = self._folder / "disk"
        self.path.mkdir()
        try:
            self._mount()
        except BaseException as exc:
            self.__exit__()
            if isinstance(exc, FileNotFoundError | subprocess.CalledProcessError):
                said = str(getattr(exc, "stderr", "")).strip() or exc
                raise NoDisk(f"no {self.kind} can be mounted: {said}") from exc
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._mounted:
            with suppress(subprocess.CalledProcessError):
                # Lazily: what a failed test left open must not keep it for ever.
                _run("umount", "--lazy", str(self.path))
            self._mounted = False
        shutil.rmtree(self._folder, ignore_errors=True)

    def _mount(self) -> None:
        if self.kind == "tmpfs":
            _run("mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", str(self.path))
        else:
            image = self._folder / "image"
            with image.open("wb") as file:
                file.truncate(self._size)
            block = self.kind.partition("-")[2]
            _run("mkfs.ext4", "-q", "-m", "0", "-b", block, str(image))
            _run("mount", "-o", "loop", str(image), str(self.path))
        self._mounted = True

    # -- what can be done to it

    def fill(self, free: int) -> None:
        """Leave `free` bytes to everybody else, as near as the blocks allow."""
        self.make_room()
        with self._filling.open("wb") as file:
            less = 0
            while (surplus := self.free() - free - less) > 0:
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, surplus)
                except OSError:
                    less += 1024  # the book-keeping of an allocation takes a block now and then

    def make_room(self) -> None:
        """Give everything back that `fill` took."""
        self._filling.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove every file."""
        for file in self.path.iterdir():
            if file.name != "lost+found":
                file.unlink()

    def free(self) -> int:
        """Return the free bytes."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    @property
    def _filling(self) -> Path:
        return self.path / "filling"


@pytest.fixture(name="disk", scope="module", params=KINDS)
def disk_fixture(request: pytest.FixtureRequest) -> Iterator[Disk]:
    """A file system of each kind; skipped where none can be mounted, except in CI, which must be able to."""
    yield from mounted(request.param)


def mounted(kind: str) -> Iterator[Disk]:
    """Yield a file system of a kind, or skip the test; in CI fail it."""
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(Disk(kind))
        except NoDisk as exc:
            if os.environ.get("CI") == "true":
                pytest.fail(f"{exc}, and CI must mount one: no other disk can be filled")
            pytest.skip(str(exc))
        yield disk


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)
