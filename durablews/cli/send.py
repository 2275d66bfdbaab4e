"""``durablews send``: store messages in an outbox from a shell or a pipe, whether anything drains it or not."""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from durablews.cli.formats import count, duration_argument
from durablews.clock import SystemClock
from durablews.database import create, open_outbox, storage_errors, wal_bytes
from durablews.entries import Gap, enqueue, read_caps
from durablews.errors import ConfigError, DurablewsError, MessageTooLarge, OutboxFull, PayloadError
from durablews.jobs import transaction
from durablews.messages import Draft, decode_payload, draft, priority_number
from durablews.reserve import Reserve
from durablews.upkeep import checkpoint_if_alone

__all__ = ["add_parser", "run"]

# What is read at once. A pipe gives what is there: a slow one line by line, a fast one as much as fits.
_CHUNK = 256 * 1024
# Lines in one transaction: it holds the write lock for some 15 ms.
_GROUP = 4000
# The log may grow so far before it is emptied.
_LONG_LOG = 8 * 1024 * 1024

_EPILOG = """\
The outbox is created when there is none. A message is on disk when this returns.

examples:
  durablews send agent.db '{"celsius": 21.4}'
  durablews send agent.db '{"type": "alarm"}' --priority high --topic alarms --ttl 1h
  jq -c . reading.json | durablews send agent.db
  journalctl -f -o cat | durablews send agent.db --lines --topic logs

With --lines each line becomes one message: a JSON string of its text, or bytes where it is not UTF-8. Lines end at
"\\n" only.

exit codes: 0 stored; 1 the outbox is full; 2 not JSON, or wrong usage; 3 the outbox cannot be used; 130 Ctrl-C
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `send`."""
    parser = subparsers.add_parser(
        "send",
        help="store a message, or each line of a pipe",
        description="Store a message in an outbox and print its sequence.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("outbox", metavar="OUTBOX", help="the outbox file")
    parser.add_argument(
        "json", metavar="JSON", nargs="?", default="-", help="the message; - or nothing reads it from standard input"
    )
    parser.add_argument("--lines", action="store_true", help="one message for each line of standard input")
    parser.add_argument(
        "--priority", type=_priority, default=0, metavar="P", help="low, normal, high, or a number from -100 to 100"
    )
    parser.add_argument("--topic", metavar="T", help="a word for the server")
    parser.add_argument("--ttl", type=duration_argument, metavar="D", help="not worth sending after: 30s, 5m, 72h")
    parser.add_argument("--id", metavar="ID", help="your own id: sending it again stores nothing new")
    parser.set_defaults(run=run)


def _priority(text: str) -> int:
    try:
        return priority_number(int(text) if text.lstrip("+-").isdecimal() else text)
    except PayloadError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def run(args: argparse.Namespace) -> int:
    """Store what the arguments say, and return the exit code.

    Raises:
        ConfigError, PayloadError: nothing was stored.
        OutboxError: the outbox could not take it; stderr has said how many lines went in before.
    """
    options = {"priority": args.priority, "topic": args.topic, "ttl": args.ttl}
    if args.lines:
        if args.json != "-" or args.id is not None:
            raise ConfigError("--lines reads standard input, and goes with neither a JSON argument nor --id")
        return _send_lines(args.outbox, options)
    return _send_one(args.outbox, draft(_document(args.json), id=args.id, **options))


def _document(argument: str) -> Any:
    """Return the message that was given, or the one on standard input."""
    text = argument
    if argument == "-":
        if sys.stdin is not None and sys.stdin.isatty():
            print("durablews: type one JSON document, then Ctrl-D on a line of its own", file=sys.stderr)
        try:
            text = b"".join(_chunks()).decode()
        except UnicodeDecodeError as exc:
            raise PayloadError(f"standard input is not UTF-8 (byte {exc.start + 1}); nothing was stored") from None
    if not text.strip():
        raise PayloadError("there is no message: expected one JSON document, got nothing")
    try:
        return decode_payload(text)
    except (ValueError, RecursionError) as exc:
        hint = f""" (a text needs its quotes: '"{text}"')""" if text.isalpha() else ""
        raise PayloadError(f"the message is not JSON: {exc}; nothing was stored{hint}") from None


def _chunks() -> Iterator[bytes]:
    """Yield what standard input has, as it comes."""
    if sys.stdin is None:
        raise ConfigError("there is no standard input to read")
    descriptor = sys.stdin.fileno()
    while chunk := os.read(descriptor, _CHUNK):
        yield chunk


def _send_one(path: str, message: Draft) -> int:
    create(path)
    with closing(open_outbox(path)) as connection:
        (sequence,) = _store(connection, _reserve(connection, path), path, [message])
    if isinstance(sequence, Gap):
        raise OutboxFull(path, "the outbox is full; the message was dropped and counted (overflow is drop_new)")
    print(sequence)
    return 0


def _reserve(connection: sqlite3.Connection, path: str) -> Reserve:
    reserve = Reserve(path, drainer=False)
    with storage_errors(path):
        reserve.open(connection)
    return reserve


def _store(connection: sqlite3.Connection, reserve: Reserve, path: str, messages: Sequence[Draft]) -> list[int | Gap]:
    """Store all of these in one transaction, or none."""
    with storage_errors(path):
        reserve.admit(connection, [messages])
        with transaction(connection):
            (result,) = enqueue(connection, path, [messages], clock=SystemClock())
            if isinstance(result, DurablewsError):
                raise result
    return result


class _Lines:
    """Stores lines as they come, and knows how far it is."""

    def __init__(self, connection: sqlite3.Connection, path: str, options: dict[str, Any]) -> None:
        self._connection = connection
        self._reserve = _reserve(connection, path)
        self._path = path
        self._options = options
        self._log_limit = _LONG_LOG
        with storage_errors(path):
            self._longest = read_caps(connection).max_bytes
        self.stored = 0
        self.dropped = 0

    @property
    def line(self) -> int:
        """The number of the line that comes next."""
        return self.stored + self.dropped + 1

    def read(self, chunks: Iterator[bytes]) -> None:
        """Store every line of `chunks`, each as soon as its end was read."""
        pending: list[bytes] = []
        waiting = 0
        for chunk in chunks:
            *lines, rest = chunk.split(b"\n")
            if lines:
                lines[0] = b"".join([*pending, lines[0]])
                self._store(lines)
                pending, waiting = [], 0
            if rest:
                pending.append(rest)
                waiting += len(rest)
            if waiting > self._longest:
                raise MessageTooLarge(
                    self._path, f"line {self.line} is longer than the cap of {self._longest} bytes; it was not stored"
                )
        if pending:
            self._store([b"".join(pending)])

    def _store(self, lines: Sequence[bytes]) -> None:
        for start in range(0, len(lines), _GROUP):
            self._store_group([draft(_text_or_bytes(line), **self._options) for line in lines[start : start + _GROUP]])
            _progress(self)
        if wal_bytes(self._path) > self._log_limit:
            with storage_errors(self._path):
                checkpoint_if_alone(self._connection, self._path)
            # Someone may read the log or drain it: not again for every chunk.
            self._log_limit = wal_bytes(self._path) + _LONG_LOG

    def _store_group(self, messages: list[Draft]) -> None:
        try:
            self._count(_store(self._connection, self._reserve, self._path, messages))
        except OutboxFull:
            if len(messages) == 1:
                raise
            # One of them does not fit: store what comes before it, and nothing after, or the order would have a hole.
            half = len(messages) // 2
            self._store_group(messages[:half])
            self._store_group(messages[half:])

    def _count(self, results: Sequence[int | Gap]) -> None:
        dropped = sum(isinstance(result, Gap) for result in results)
        self.dropped += dropped
        self.stored += len(results) - dropped


def _send_lines(path: str, options: dict[str, Any]) -> int:
    draft("", **options)  # a topic that cannot be stored is found before a file is made
    create(path)
    with closing(open_outbox(path)) as connection:
        lines = _Lines(connection, path, options)
        complete = False
        try:
            lines.read(_chunks())
            complete = True
        finally:
            _talk(_summary(lines, complete))
    return 1 if lines.dropped else 0


def _summary(lines: _Lines, complete: bool) -> str:
    text = f"{count(lines.stored)} {'message' if lines.stored == 1 else 'messages'} stored"
    if lines.dropped:
        text += f", {count(lines.dropped)} dropped because the outbox is full (overflow is drop_new)"
    return text if complete else f"{text}; stopped at line {count(lines.line)}"


def _text_or_bytes(line: bytes) -> str | bytes:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line


def _progress(lines: _Lines) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{count(lines.stored)} stored", end="", file=sys.stderr, flush=True)


def _talk(text: str) -> None:
    print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, file=sys.stderr)
