"""``durablews inspect``: what an outbox holds and how its link stands, read beside whatever uses it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from durablews.cli.formats import (
    Palette,
    aligned,
    column_widths,
    columns,
    count,
    duration,
    moment,
    share,
    shorten,
    size,
)
from durablews.clock import SystemClock
from durablews.errors import ConfigError, PayloadError
from durablews.inspection import inspect, stream_entries, summarize
from durablews.messages import Refusal, priority_name, priority_number
from durablews.snapshot import EntrySummary, Snapshot, to_json
from durablews.visible import printable

__all__ = ["add_parser", "run"]

# Up to here all is shown from one moment; more is read and printed page by page.
_ONE_LOOK = 1000
_ROWS_TOGETHER = 500
_LONGEST_TOPIC = 24
_LONGEST_REASON = 48
_NARROWEST_PAYLOAD = 20

_EPILOG = """\
Entries are listed in sending order: higher priority first, then by sequence; what waits aside because it is too large
for the server comes last. Nothing is changed, and no program that uses the outbox is disturbed. Payloads are hidden
unless asked for.

examples:
  durablews inspect agent.db
  durablews inspect agent.db 4711 --payload
  durablews inspect agent.db --dead
  durablews inspect agent.db --json --limit 0 | jq '.entries[] | select(.age > 3600)'

exit codes: 0 shown; 1 there is no entry SEQ; 2 wrong usage; 3 the outbox is missing, something else or locked
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `inspect`."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what waits, and how the link stands",
        description="Show what an outbox holds and how its link stands.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("outbox", metavar="OUTBOX", help="the outbox file, or a database with an outbox in it")
    parser.add_argument("seq", metavar="SEQ", nargs="?", type=int, help="show this entry alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object; ages in seconds, times in ms UTC")
    parser.add_argument(
        "--limit", type=_limit, default=20, metavar="N", help="how many entries; 0 for all (default: %(default)s)"
    )
    parser.add_argument("--topic", metavar="T", help="only entries of this topic")
    parser.add_argument("--priority", type=_priority, metavar="P", help="only this priority: a name or a number")
    parser.add_argument("--dead", action="store_true", help="dead letters, oldest first")
    parser.add_argument("--payload", action="store_true", help="show payloads")
    parser.set_defaults(run=run)


def _limit(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of entries")
    return int(text)


def _priority(text: str) -> int:
    try:
        return priority_number(int(text) if text.lstrip("+-").isdecimal() else text)
    except PayloadError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def run(args: argparse.Namespace) -> int:
    """Print what the arguments ask for, and return the exit code.

    Raises:
        ConfigError: the arguments contradict each other.
        OutboxError: the outbox cannot be read.
    """
    if args.seq is not None:
        if args.dead or args.topic is not None or args.priority is not None:
            raise ConfigError("SEQ shows one entry; it does not go with --dead, --topic or --priority")
        return _one(args)
    which: dict[str, Any] = {name: getattr(args, name) for name in ("limit", "topic", "priority", "dead", "payload")}
    if 0 < args.limit <= _ONE_LOOK:
        snapshot = inspect(args.outbox, **which)
        listed: Iterable[EntrySummary] = snapshot.entries
    else:
        snapshot, listed = summarize(args.outbox), stream_entries(args.outbox, **which)
    if args.json:
        _print_json(snapshot, listed)
    else:
        _print_summary(snapshot)
        _print_entries(snapshot, args, listed)
    return 0


def _one(args: argparse.Namespace) -> int:
    entries = inspect(args.outbox, seq=args.seq, payload=args.payload).entries
    if not entries:
        print(
            f"durablews: {printable(args.outbox)}: there is no entry {args.seq}; it has left, or never was",
            file=sys.stderr,
        )
        return 1
    if args.json:
        _write(to_json(entries[0]) + b"\n")
        return 0
    paint = Palette(sys.stdout)
    for name, value in _details(entries[0]):
        print(f"{paint(name.ljust(14), 'dim')}{value}")
    return 0


def _details(entry: EntrySummary) -> Iterator[tuple[str, str]]:
    yield "sequence", str(entry.seq)
    yield "priority", priority_name(entry.priority)
    if entry.topic is not None:
        yield "topic", printable(entry.topic)
    yield "created", moment(entry.created_at)
    yield "age", "no drainer has seen it yet" if entry.age is None else duration(entry.age)
    yield "size", size(entry.bytes)
    yield "transmissions", str(entry.transmissions)
    yield "state", entry.state
    if isinstance(entry.refusal, Refusal):
        yield "refusal", _reason(entry.refusal)
    if entry.payload:
        yield "payload", _payload(entry)


def _print_json(snapshot: Snapshot, listed: Iterable[EntrySummary]) -> None:
    """Print one object, its entries one by one: a million of them are never in memory together."""
    # `entries` is its last field: an empty list ends the text.
    head = to_json(snapshot.without_entries()).removesuffix(b"]}")
    _write(head)
    entries, between = iter(listed), b""
    while page := list(islice(entries, _ROWS_TOGETHER)):
        _write(between + b",".join(map(to_json, page)))
        between = b","
    _write(b"]}\n")


def _write(data: bytes) -> None:
    """Write JSON as UTF-8, whatever the locale is: an escape for an unknown character would not be JSON."""
    left = memoryview(data)
    while left:
        # Under PYTHONUNBUFFERED this is the bare descriptor, which may take less than it is given.
        left = left[sys.stdout.buffer.write(left) :]


def _print_summary(snapshot: Snapshot) -> None:
    paint = Palette(sys.stdout)
    for name, value in _summary(snapshot, paint):
        print(f"{paint(name.ljust(8), 'dim')}  {value}")


def _summary(snapshot: Snapshot, paint: Palette) -> Iterator[tuple[str, str]]:
    caps = snapshot.caps
    yield "outbox", paint(printable(snapshot.outbox), "bold")
    if snapshot.pending:
        fullest = max(snapshot.pending / caps.max_messages, snapshot.pending_bytes / caps.max_bytes)
        alarm = ("red",) if fullest >= 0.9 else ("yellow",) if fullest >= 0.5 else ()
        yield (
            "waiting",
            paint(
                f"{_number(snapshot.pending, 'message')} ({share(snapshot.pending, caps.max_messages)}"
                f" of {count(caps.max_messages)}), {size(snapshot.pending_bytes)}"
                f" ({share(snapshot.pending_bytes, caps.max_bytes)} of {size(caps.max_bytes)})",
                "bold",
                *alarm,
            ),
        )
        yield "oldest", "not seen by a drainer yet" if snapshot.oldest_age is None else duration(snapshot.oldest_age)
    else:
        yield "waiting", paint("nothing", "green")
    yield "link", _link(snapshot, paint)
    if snapshot.owner:
        yield "drainer", printable(snapshot.owner)
    if snapshot.dead:
        yield "dead", paint(f"{_number(snapshot.dead, 'message')} refused for good; see --dead", "red")
    if departures := _departures(snapshot):
        yield "left", departures
    yield "file", size(snapshot.file_bytes)


def _number(number: int, what: str) -> str:
    return f"{count(number)} {what}" if number == 1 else f"{count(number)} {what}s"


def _link(snapshot: Snapshot, paint: Palette) -> str:
    """Say in a sentence how the link stands."""
    link, now = snapshot.link, SystemClock().wall()
    style = "green" if link.state == "CONNECTED" else "yellow"
    text = paint(printable(link.state), style)
    if not snapshot.owner:
        text += ": no program drains this outbox now"
        if link.reason:
            text += f"; the last word was: {printable(link.reason)}"
        return text
    if link.since is not None and now >= link.since:
        text += f" for {duration((now - link.since) / 1000)}"
    if link.reason:
        text += f": {printable(link.reason)}"
    if link.next_attempt is not None:
        wait = (link.next_attempt - now) / 1000
        text += f"; next attempt in {duration(wait)}" if wait > 0 else "; next attempt is due"
    if link.blocked:
        text += f"; {paint(f'blocked: {printable(link.blocked)}', 'red')}"
    return text


def _departures(snapshot: Snapshot) -> str:
    departed = snapshot.departed
    counted = (
        (departed.acked, "acknowledged"),
        (departed.refused, "refused"),
        (departed.expired, "expired"),
        (departed.expired_unanswered, "expired unanswered"),
        (departed.dropped, "dropped for newer ones"),
        (departed.dropped_unanswered, "dropped unanswered"),
        (departed.dropped_new, "dropped on arrival"),
        (departed.dead_dropped, "dead letters over their cap"),
        (departed.lost, "lost with a damaged file"),
    )
    return ", ".join(f"{count(number)} {what}" for number, what in counted if number)


def _print_entries(snapshot: Snapshot, args: argparse.Namespace, listed: Iterable[EntrySummary]) -> None:
    paint, terminal = Palette(sys.stdout), columns(sys.stdout)
    header = ["seq", "priority", "topic", "age", "bytes", "sent", "state"]
    header += (["reason"] if args.dead else []) + (["payload"] if args.payload else [])
    right = (0, 3, 4, 5)
    widths: list[int] = []
    shown = 0
    entries = iter(listed)
    while page := list(islice(entries, _ROWS_TOGETHER)):
        rows = [_row(entry, args, cut=terminal is not None) for entry in page]
        plain = len(header) - args.payload  # the payload is last, and as wide as it is
        widths = column_widths([row[:plain] for row in [header, *rows]], widths)
        if not shown:
            print(f"\n{paint(_line(header, widths, right, None), 'dim')}")
        for entry, row in zip(page, rows, strict=True):
            style = {"refused": ("red",), "unanswered": ("yellow",), "aside": ("yellow",)}.get(entry.state, ())
            print(paint(_line(row, widths, right, terminal), *style))
        shown += len(page)
    filtered = args.topic is not None or args.priority is not None
    more = (snapshot.dead if args.dead else snapshot.pending) - shown
    if not shown and (args.dead or filtered):
        what = "dead letters" if args.dead else "messages waiting"
        print(f"\nno {what}" + (" like that" if filtered else ""))
    elif more > 0 and shown == args.limit and not filtered:
        print(paint(f"\n{count(more)} more; --limit 0 shows all", "dim"))


def _line(row: list[str], widths: list[int], right: tuple[int, ...], terminal: int | None) -> str:
    """Return a line of the table; the payload behind its columns takes what a terminal has left."""
    line = aligned(row[: len(widths)], widths, right)
    if len(row) == len(widths):
        return line
    start = sum(widths) + 2 * len(widths)
    payload = row[-1]
    if terminal is not None:
        payload = shorten(payload, max(_NARROWEST_PAYLOAD, terminal - start))
    return line.ljust(start) + payload


def _row(entry: EntrySummary, args: argparse.Namespace, *, cut: bool) -> list[str]:
    topic = "-" if entry.topic is None else printable(entry.topic)
    row = [
        str(entry.seq),
        priority_name(entry.priority),
        shorten(topic, _LONGEST_TOPIC) if cut else topic,
        "-" if entry.age is None else duration(entry.age),
        str(entry.bytes),
        str(entry.transmissions),
        entry.state,
    ]
    if args.dead:
        reason = _reason(entry.refusal) if isinstance(entry.refusal, Refusal) else "-"
        row.append(shorten(reason, _LONGEST_REASON) if cut else reason)
    if args.payload:
        row.append(_payload(entry))
    return row


def _reason(refusal: Refusal) -> str:
    text = refusal.code + (f": {refusal.reason}" if refusal.reason else "")
    return printable(text + (" (it may have been applied)" if refusal.unknown else ""))


def _payload(entry: EntrySummary) -> str:
    return printable(bytes(entry.payload).decode()) if entry.payload else "-"
