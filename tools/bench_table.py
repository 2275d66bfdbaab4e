"""How `tools/bench` and `tools/bench-peers` show what they measured: figures, lines of a table, a progress bar."""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench_rows import Row

__all__ = ["Figures", "Progress", "Spread", "compare", "machine", "print_rows", "print_table"]


class Spread(NamedTuple):
    """What several rounds gave."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        return cls(statistics.median(figures), min(figures), max(figures))


class Figures(NamedTuple):
    """What the rounds of one row gave. `value` is the ratio or the difference; `reached` is None without a goal."""

    value: Spread
    durablews: Spread
    baseline: Spread
    rounds: int
    reached: bool | None

    def to_json(self, row: Row) -> dict[str, object]:
        return {
            "what": row.what,
            "against": row.against,
            "kind": row.kind,
            "unit": row.unit,
            "goal": row.goal,
            "reached": self.reached,
            "rounds": self.rounds,
            "value": self.value._asdict(),
            "durablews": self.durablews._asdict(),
            "baseline": self.baseline._asdict(),
        }


def compare(row: Row, ours: Sequence[float], baseline: Sequence[float]) -> Figures:
    """Compare each round with its own baseline: the machine may be another one a minute later."""
    pairs = list(zip(ours, baseline, strict=True))
    difference = row.kind == "difference, less is better"
    value = Spread.of([mine - theirs if difference else mine / theirs for mine, theirs in pairs])
    reached = None
    if row.goal is not None:
        reached = value.median >= row.goal if row.kind == "ratio" else value.median <= row.goal
    return Figures(value, Spread.of(ours), Spread.of(baseline), len(pairs), reached)


def machine(folder: Path) -> dict[str, object]:
    """Say what all this was measured on."""
    return {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "files_on": _file_system(folder),
    }


def _file_system(folder: Path) -> str:
    """Return the kind of file system: on a tmpfs a sync costs nothing, and no figure about durability means a thing."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    path = folder.resolve()
    # The longest wins, and of equals the last: that one covers the others.
    over = [(len(mount[1]), number, mount[2]) for number, mount in enumerate(mounts) if path.is_relative_to(mount[1])]
    return max(over)[2] if over else "unknown"


def print_rows(rows: Sequence[Row], results: dict[str, Figures | str]) -> None:
    """Print what was measured, a line each, and below what it means. A `str` says why a row has no figures."""
    lines = [["", "measured", "(min..max)", "goal", "", "durablews", "baseline"]]
    for row in rows:
        figures = results[row.name]
        if isinstance(figures, str):
            lines.append([row.name, "failed"])
        else:
            lines.append(_cells(row, figures))
    print_table(lines, left=(0, 2, 4))
    print()
    for row in rows:
        figures = results[row.name]
        print(f"{row.name}: {figures if isinstance(figures, str) else f'{row.what}; against {row.against}'}")


def _cells(row: Row, figures: Figures) -> list[str]:
    difference = row.kind == "difference, less is better"

    def shown(value: float) -> str:
        return f"{value:+.1f}" if difference else f"{value:.2f}"

    value = figures.value
    goal = "" if row.goal is None else f"{'>=' if row.kind == 'ratio' else '<='} {shown(row.goal)}"
    digits = 0 if row.unit == "/s" else 2 if row.unit == "ms" else 1
    return [
        row.name,
        shown(value.median) + (f" {row.unit}" if difference else ""),
        f"({shown(value.min)}..{shown(value.max)})",
        goal,
        {None: "", True: "reached", False: "MISSED"}[figures.reached],
        *(f"{each.median:,.{digits}f} {row.unit}" for each in (figures.durablews, figures.baseline)),
    ]


def print_table(lines: Sequence[Sequence[str]], *, left: Sequence[int]) -> None:
    """Print cells in columns, those named by `left` to the left and the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*_filled(lines), strict=True)]
    for line in _filled(lines):
        cells = [
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _filled(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    most = max(len(line) for line in lines)
    return [[*line, *[""] * (most - len(line))] for line in lines]


class Progress:
    """A bar on standard error, when that is a terminal."""

    def __init__(self, steps: int) -> None:
        self._steps = max(1, steps)
        self._done = 0
        self._shown = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Show what is being done."""
        if self._shown:
            bar = "█" * (20 * self._done // self._steps)
            line = f"{bar:<20} {self._done}/{self._steps} {text}"
            print(f"\r\x1b[K{line[:79]}", end="", file=sys.stderr, flush=True)

    def step(self) -> None:
        """Take note that one more is done."""
        self._done += 1

    def end(self) -> None:
        """Remove the bar: what follows is the table."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
