"""How the command shows things to people: durations, sizes, times, colour, tables. Values in, text out."""

from __future__ import annotations

import argparse
import os
import unicodedata
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import TextIO

from durablews.errors import ConfigError

__all__ = [
    "Palette",
    "aligned",
    "column_widths",
    "columns",
    "count",
    "duration",
    "duration_argument",
    "moment",
    "share",
    "shorten",
    "size",
    "width",
]

_ANSI = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


class Palette:
    """Colours for one stream: none unless it is a terminal, and none with NO_COLOR (https://no-color.org)."""

    def __init__(self, stream: TextIO) -> None:
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.on = stream.isatty() and not plain

    def __call__(self, text: str, *styles: str) -> str:
        """Return `text` in these styles; as it is when colour is off."""
        if not self.on or not styles or not text:
            return text
        return f"\x1b[{';'.join(_ANSI[style] for style in styles)}m{text}\x1b[0m"


def count(number: int) -> str:
    """Return 12345 as ``12,345``."""
    return f"{number:,}"


def share(part: int, whole: int) -> str:
    """Return how much of `whole` that is: ``0%``, ``<0.1%``, ``0.3%``, ``97%``."""
    percent = 100 * part / whole
    if percent == 0:
        return "0%"
    if percent < 0.1:
        return "<0.1%"
    # Full is said only of what is full.
    return f"{percent:.1f}%" if percent < 10 else f"{int(percent)}%"


def size(number: int) -> str:
    """Return bytes as ``812 B``, ``1.4 KiB``, ``37 MiB``."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 9.95 else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """Return seconds as ``0.4 s``, ``12 s``, ``3 min 5 s``, ``2 h 4 min``, ``9 d 3 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    rest = round(seconds)
    for unit, length, smaller, step in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if rest >= length:
            fraction = rest % length // step
            return f"{rest // length} {unit}" + (f" {fraction} {smaller}" if fraction else "")
    return f"{rest} s"


def moment(milliseconds: int) -> str:
    """Return a time of the wall clock as this machine's local one, to the second, with its offset from UTC."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000).astimezone().isoformat(" ", "seconds")
    except (OverflowError, OSError, ValueError):
        return f"{milliseconds} ms"


def duration_argument(text: str) -> float:
    """Read ``30s``, ``5m`` or ``72h`` as seconds, for argparse."""
    from durablews.config import parse_duration  # every setting there is: a third of what `inspect` needs to start

    try:
        return parse_duration(text)
    except ConfigError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def width(text: str) -> int:
    """Return how many cells of a terminal `text` takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, cells: int) -> str:
    """Return `text`, cut to so many cells with an ellipsis where it is longer."""
    if width(text) <= cells:
        return text
    kept, used = [], 1
    for c in text:
        used += width(c)
        if used > cells:
            break
        kept.append(c)
    return "".join(kept) + "…"


def columns(stream: TextIO) -> int | None:
    """Return the width of a terminal; None for a file or a pipe, where nothing is cut."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else None
    except (OSError, ValueError):
        return None


def column_widths(rows: Sequence[Sequence[str]], least: Sequence[int] = ()) -> list[int]:
    """Return the width of each column of a table, none below its `least`."""
    widest = [max(map(width, column)) for column in zip(*rows, strict=True)]
    return [max(pair) for pair in zip(widest, least, strict=True)] if least else widest


def aligned(row: Sequence[str], widths: Sequence[int], right: Collection[int]) -> str:
    """Return one line of a table, two spaces between columns; numbers, named in `right`, are flush right."""
    cells = []
    for number, (cell, cells_wide) in enumerate(zip(row, widths, strict=True)):
        gap = " " * (cells_wide - width(cell))
        cells.append(gap + cell if number in right else cell + gap)
    return "  ".join(cells).rstrip()
