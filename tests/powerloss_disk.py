"""A disk that loses power: what of a recorded life is on it for certain, and what may be.

A write is durable when its file is synced, a name when its folder is; until then a loss of power keeps any of it, in
any order, down to sectors. That is more than most file systems do and less than POSIX allows, which knows no sectors.
The files of the server and the marks never lose power: they say what the world had seen by then.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

from powerloss_life import AGENT, MARKS

__all__ = ["MODES", "Change", "Disk", "Record", "restore"]

#: What a loss of power keeps of the writes that were not synced.
MODES = ("nothing", "everything", "prefix", "subset", "torn")
SECTOR = 512
_FOLDER = 0


class Record(NamedTuple):
    """One call, as tests/powerloss_recorder.c describes it."""

    kind: str
    file: int
    number: int
    data: bytes


class Write(NamedTuple):
    """Bytes that go to a file at an offset."""

    file: int
    offset: int
    data: bytes


class Cut(NamedTuple):
    """A file gets another size."""

    file: int
    size: int


class Names(NamedTuple):
    """Names in the folder change in one step; None takes one away."""

    names: Mapping[str, int | None]


Change: TypeAlias = Write | Cut | Names


def loses_power(name: str) -> bool:
    """Whether a file is the agent's."""
    return AGENT in name


class Disk:
    """A folder on a disk: what is durable, and what waits to be."""

    def __init__(self, before: Mapping[str, bytes]) -> None:
        self.files: dict[int, bytes] = {}
        self.names: dict[str, int] = {}
        self.pending: list[Change] = []
        # The names as running programs see them, and what the log calls the files that were there before.
        self._seen: dict[str, int] = {}
        self._lasting: set[int] = set()
        self._marks = 0
        for number, (name, data) in enumerate(before.items(), start=1):
            self.files[-number] = data
            self._seen[name] = self.names[name] = -number
        self._known: dict[int, int] = {}

    def lasts(self, step: Record) -> bool:
        """Whether a call is about files that do not lose power: those of the server, and the marks."""
        if step.kind in "WTS":
            return self._known.get(step.file, step.file) in self._lasting
        return step.kind == "O" or not loses_power(step.data.decode())

    def is_mark(self, step: Record) -> bool:
        """Whether a call wrote a mark."""
        return step.kind == "W" and self._known.get(step.file, step.file) == self._marks

    def step(self, step: Record) -> None:
        """Take one recorded call."""
        file = self._known.get(step.file, step.file)
        if step.kind == "O":
            self._open(step.file, step.data.decode())
        elif step.kind == "S":
            self._sync(file)
        else:
            change = self._change(step, file)
            if self.lasts(step):
                self.files, self.names = self._after([change])
            else:
                self.pending.append(change)

    def _open(self, number: int, name: str) -> None:
        self._known[number] = self._seen[name]
        self._note_name(self._seen[name], name)

    def _note_name(self, file: int, name: str) -> None:
        if not loses_power(name):
            self._lasting.add(file)
        if name == MARKS:
            self._marks = file

    def _change(self, step: Record, file: int) -> Change:
        if step.kind == "W":
            return Write(file, step.number, step.data)
        if step.kind == "T":
            return Cut(file, step.number)
        name, _, other = step.data.decode().partition("\0")
        if step.kind == "C":
            self.files[file] = b""
            self._note_name(file, name)
            names: dict[str, int | None] = {name: file}
        elif step.kind == "U":
            names = {name: None}
        else:
            names = {other: self._seen[name]} | ({name: None} if step.kind == "R" else {})
        for changed, there in names.items():
            if there is None:
                del self._seen[changed]
            else:
                self._seen[changed] = there
        return Names(names)

    def _sync(self, file: int) -> None:
        def concerned(change: Change) -> bool:
            return isinstance(change, Names) if file == _FOLDER else getattr(change, "file", None) == file

        self.files, self.names = self._after([change for change in self.pending if concerned(change)])
        self.pending = [change for change in self.pending if not concerned(change)]

    def _after(self, changes: Iterable[Change]) -> tuple[dict[int, bytes], dict[str, int]]:
        files, names = dict(self.files), dict(self.names)
        changed: dict[int, bytearray] = {}
        for change in changes:
            if isinstance(change, Names):
                for name, file in change.names.items():
                    if file is None:
                        names.pop(name, None)
                    else:
                        names[name] = file
                continue
            data = changed.setdefault(change.file, bytearray(files[change.file]))
            if isinstance(change, Cut):
                del data[change.size :]
                data.extend(bytes(change.size - len(data)))
            else:
                data.extend(bytes(max(0, change.offset - len(data))))
                data[change.offset : change.offset + len(change.data)] = change.data
        files.update({file: bytes(data) for file, data in changed.items()})
        return files, names

    def image(self, kept: Iterable[Change]) -> dict[str, bytes]:
        """Return what lies in the folder when the power comes back, if `kept` is what survived of what waits."""
        files, names = self._after(kept)
        return {name: files[file] for name, file in names.items()}

    def keep(self, mode: str, chance: random.Random) -> list[Change]:
        """Choose what survives."""
        if mode in ("nothing", "everything"):
            return self.pending if mode == "everything" else []
        if mode == "prefix":
            return self.pending[: chance.randrange(1, len(self.pending))]
        share = chance.choice((0.2, 0.5, 0.8))
        kept = [change for change in self.pending if chance.random() < share]
        if mode == "subset":
            return kept
        return [piece for change in kept for piece in self._torn(change, chance)]

    def _torn(self, change: Change, chance: random.Random) -> Iterator[Change]:
        """Yield what is left of a write: some of its sectors, and rubbish where a file grew and its data never came."""
        if not isinstance(change, Write):
            yield change
            return
        size, start, end = len(self.files[change.file]), change.offset, change.offset + len(change.data)
        while start < end:
            stop = min(end, (start // SECTOR + 1) * SECTOR)
            if chance.random() < 0.7:
                yield Write(change.file, start, change.data[start - change.offset : stop - change.offset])
            elif start >= size and chance.random() < 0.5:
                yield Write(change.file, start, chance.randbytes(stop - start))
            start = stop


def restore(image: Mapping[str, bytes], folder: Path) -> None:
    """Put an image into a folder; a file that is there already keeps its inode, as it does when the power goes."""
    for path in list(folder.iterdir()):
        if path.name not in image:
            path.unlink()
    for name, data in image.items():
        (folder / name).write_bytes(data)
