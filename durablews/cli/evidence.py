"""What the demo sends, and whether that is what arrived: real lines in, a verdict out."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from durablews.database import uri
from durablews.errors import ConfigError
from durablews.messages import decode_payload

__all__ = ["Item", "Lines", "Verdict", "applied_up_to", "judge", "lines_of", "lines_of_this_machine", "read_inbox"]

#: A source with fewer lines than this is not worth repeating when the machine has another.
_WORTHWHILE = 500
#: Bytes that are taken of a source; more could not be sent within the demo's time.
_MOST_BYTES = 16 * 1024 * 1024
#: Bytes of one line. JSON may need six times as many, and `serve` takes frames of 1 MiB.
_LONGEST_LINE = 160 * 1024
# A repeated line is cut to this, so that one long line in a short file is not sent thousands of times.
_REPEATED = 200

# Text that a machine has anyway and that changes with it, best first.
_FILES = ("/var/lib/dpkg/status", "/var/log/syslog", "/var/log/messages", "/var/log/dpkg.log", "/var/log/install.log")
_COMMANDS = (("journalctl", "--quiet", "--no-pager", "--lines=20000"), ("rpm", "-qa"))
_WORDS = "/usr/share/dict/words"


@dataclass(frozen=True)
class Lines:
    """What is going to be sent, and where it comes from.

    Attributes:
        own: how many of the lines the source has; the rest repeats them, numbered.
    """

    source: str
    lines: list[bytes]
    own: int


@dataclass(frozen=True)
class Item:
    """One message, as it was sent or as it arrived. `label` is its topic: it tells equal lines apart."""

    label: str
    priority: int
    payload: bytes


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Attributes:
        lost: sent, and not there.
        twice: how many times too often something is there.
        altered: there with other bytes, or another priority.
        unknown: there, and never sent.
        swapped: there after something of its priority that was sent later.
        overtaken: how many lines an urgent message passed that had been sent before it, all together.
    """

    sent: int
    applied: int
    lost: int
    twice: int
    altered: int
    unknown: int
    swapped: int
    overtaken: int

    @property
    def good(self) -> bool:
        """Whether everything arrived as it was sent: once, whole, in order."""
        return not (self.lost or self.twice or self.altered or self.unknown or self.swapped)


def judge(sent: Sequence[Item], arrived: Sequence[Item]) -> Verdict:
    """Compare what arrived with what was sent, both in their order."""
    known = {item.label: (position, item) for position, item in enumerate(sent)}
    times = Counter(item.label for item in arrived)
    altered = swapped = overtaken = 0
    latest: dict[int, int] = {}  # priority -> the last position in `sent` that has arrived
    seen: set[str] = set()
    for item in arrived:
        if item.label not in known or item.label in seen:
            continue
        seen.add(item.label)
        position, original = known[item.label]
        altered += item != original
        swapped += position < latest.get(item.priority, -1)
        overtaken += any(position < there for priority, there in latest.items() if priority > item.priority)
        latest[item.priority] = max(position, latest.get(item.priority, -1))
    return Verdict(
        sent=len(sent),
        applied=len(arrived),
        lost=sum(label not in times for label in known),
        twice=sum(number - 1 for number in times.values()),
        altered=altered,
        unknown=sum(label not in known for label in times),
        swapped=swapped,
        overtaken=overtaken,
    )


def read_inbox(path: str) -> list[Item]:
    """Return what `durablews serve` has applied, in the order in which it did."""
    with closing(sqlite3.connect(uri(path, "ro"), uri=True)) as connection:
        rows = connection.execute("SELECT topic, priority, payload FROM durablews_inbox ORDER BY id")
        return [Item(topic, priority, _line(payload)) for topic, priority, payload in rows]


def applied_up_to(path: str) -> dict[int, int]:
    """Return the highest sequence of each priority in the inbox of one client."""
    with closing(sqlite3.connect(uri(path, "ro"), uri=True)) as connection:
        return dict(connection.execute("SELECT priority, max(seq) FROM durablews_inbox GROUP BY priority"))


def _line(payload: str | bytes) -> bytes:
    if isinstance(payload, bytes):
        return payload
    text = decode_payload(payload)
    # Something else than a line was applied: let it differ from every line there can be.
    return text.encode() if isinstance(text, str) else b"\n" + payload.encode()


def lines_of(path: str, number: int) -> Lines:
    """Return `number` lines of a file, repeated where it has fewer.

    Raises:
        ConfigError: it cannot be read, is empty, or has a line that is too long.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    lines = _split(data)
    if not lines:
        raise ConfigError(f"{path}: it is empty; the demo needs a line to send")
    for position, line in enumerate(lines[:number], start=1):
        if len(line) > _LONGEST_LINE:
            raise ConfigError(f"{path}: line {position} has {len(line):,} bytes; the demo takes {_LONGEST_LINE:,}")
    return _filled(path, lines, number)


def lines_of_this_machine(number: int) -> Lines:
    """Return `number` lines of the first thing this machine has: its packages, its log, its words."""
    for source, data in _sources():
        lines = [line for line in _split(data)[:number] if len(line) <= _LONGEST_LINE]
        if len(lines) >= _WORTHWHILE:
            return _filled(source, lines, number)
    return _filled("the sources of this Python", _python(number), number)


def _sources() -> Iterator[tuple[str, bytes]]:
    for path in _FILES:
        yield path, _head(path)
    for command in _COMMANDS:
        if shutil.which(command[0]):
            yield " ".join(command[:2]), _output(command)
    yield _WORDS, _head(_WORDS)


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MOST_BYTES)
    except OSError:
        return b""


def _output(command: Sequence[str]) -> bytes:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=3, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return b""


def _python(number: int) -> list[bytes]:
    lines: list[bytes] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        if len(lines) < number:
            lines += _split(_head(str(path)))
    return lines[:number] or [b"not even the sources of this Python are here"]


def _split(data: bytes) -> list[bytes]:
    """Return the lines: they end at \\n only, and the last may lack it."""
    lines = data.split(b"\n")
    # Nothing follows the last end, or what follows was not read whole.
    if not lines[-1] or (len(data) > _MOST_BYTES and len(lines) > 1):
        lines.pop()
    return lines


def _filled(source: str, lines: list[bytes], number: int) -> Lines:
    own = lines[:number]
    filled = list(own)
    while len(filled) < number:
        position = len(filled)
        filled.append(b"%d: %s" % (position + 1, own[position % len(own)][:_REPEATED]))
    return Lines(source, filled, len(own))
