"""Draws the courses of a fleet, for a terminal and as SVG. Values in, text out.

Tries in a second go from a handful to the whole fleet at once, and what matters is how they stand to what the server
accepts. So every course of a drawing has the same two axes and the tries are on a logarithmic scale, one that begins at
zero: ``log(1 + tries)``. Where several seconds share a column it shows the worst of them, for a mean would hide the
spikes.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from textwrap import wrap
from typing import NamedTuple

from durablews.analysis.fleet import Course, Outage
from durablews.visible import printable

__all__ = ["svg", "terminal"]

_BLOCKS = " ▁▂▃▄▅▆▇█"
_MAIN_ROWS, _OTHER_ROWS = 8, 5
# What the table takes with every figure at its widest.
_NARROWEST = 60
_SHARES = (0.5, 0.95, 1.0)


class _Axes(NamedTuple):
    """The axes that all courses of a drawing share: seconds from 0 to `end`, tries in a second from 0 to `top`."""

    end: int
    top: int
    rate: int
    back: float

    @classmethod
    def of(cls, courses: Mapping[str, Course]) -> _Axes:
        """Return axes on which the first course is whole, and another one if it takes not much longer."""
        main, *others = courses.values()
        whole = len(main.attempts)
        enough = max(2 * whole, math.ceil(2 * main.outage.seconds))
        end = max(whole, *(min(len(course.attempts), enough) for course in others), int(main.outage.seconds) + 1, 10)
        top = max(main.outage.accept_rate, *(max(course.attempts, default=0) for course in courses.values()))
        return cls(end, top, main.outage.accept_rate, main.outage.seconds)

    def height(self, tries: int) -> float:
        """Return how high that is, from 0 to 1."""
        return math.log1p(tries) / math.log1p(self.top)

    def marks(self) -> list[int]:
        """Return the figures to write on the axis of tries, the most important one first."""
        decades = [10**power for power in range(1, len(str(self.top)))]
        return [self.rate, *(mark for mark in reversed(decades) if mark != self.rate)]

    def gutter(self) -> int:
        """Return the cells that the widest of these takes in a terminal, with its tick."""
        return max(len(f"{mark:,}") for mark in self.marks()) + 2


def terminal(courses: Mapping[str, Course], *, columns: int = 80, colour: Callable[..., str] | None = None) -> str:
    """Draw the courses of one outage below each other, and a table of them.

    Args:
        courses: by the name of their policy, at least one; the first is drawn largest, and whole.
        columns: the width of the terminal; less than 60 is taken for 60.
        colour: called with a text and names of styles (``dim``, ``bold``, ``red``, ``green``); None: plain text.
    """
    columns = max(columns, _NARROWEST)
    paint = colour or _plain
    axes = _Axes.of(courses)
    gutter = axes.gutter()
    grid = _Grid.of(axes.end, columns - gutter - 1)
    lines = wrap(_subject(next(iter(courses.values())).outage), columns)
    lines += wrap(f"Tries in a second, on a logarithmic scale; ┄┄ is what the server accepts. {grid.legend()}", columns)
    rows = _MAIN_ROWS
    for name, course in courses.items():
        lines += ["", *_chart(name, course, axes, grid, rows, columns, paint)]
        rows = _OTHER_ROWS
    return "\n".join([*lines, "", *_table(courses, columns, paint)]) + "\n"


def _plain(text: str, *_styles: str) -> str:
    return text


class _Grid(NamedTuple):
    """How seconds become columns: so many seconds share one, or a second has so many."""

    columns: int
    seconds: int
    repeat: int

    @classmethod
    def of(cls, seconds: int, columns: int) -> _Grid:
        shared = math.ceil(seconds / columns)
        repeat = columns // seconds if shared == 1 else 1
        return cls(math.ceil(seconds / shared) * repeat, shared, repeat)

    def legend(self) -> str:
        if self.seconds > 1:
            return f"A column is the worst of {self.seconds} seconds."
        return "A column is one second." if self.repeat == 1 else f"{self.repeat} columns are one second."

    def values(self, figures: Sequence[int]) -> list[int]:
        """Return the figure of each column."""
        each = self.seconds
        worst = [max(figures[at : at + each], default=0) for at in range(0, self.columns // self.repeat * each, each)]
        return [figure for figure in worst for _ in range(self.repeat)]

    def column(self, second: float) -> int:
        """Return in which column a second begins."""
        return int(second / self.seconds) * self.repeat


def _chart(
    name: str, course: Course, axes: _Axes, grid: _Grid, rows: int, columns: int, paint: Callable[..., str]
) -> Iterator[str]:
    gutter = axes.gutter()
    values, back = grid.values(course.attempts), grid.column(axes.back)
    styles = [_style(value, column < back, axes.rate) for column, value in enumerate(values)]
    eighths = [math.ceil(axes.height(value) * rows * 8) for value in values]
    labels = _labels(axes, rows)
    beyond = "" if len(course.attempts) <= axes.end else f" (goes on until {_seconds(len(course.attempts) - 1)})"
    yield paint(_fit(name, columns - len(beyond)), "bold") + beyond
    for row in range(rows - 1, -1, -1):
        line_here = labels.get(row) == axes.rate
        cells = []
        for column, filled in enumerate(eighths):
            block = _BLOCKS[min(max(filled - 8 * row, 0), 8)]
            if block == " " and line_here and column >= back:
                cells.append(("┄", "dim"))
            else:
                cells.append((block, styles[column]))
        label = f"{labels[row]:,} ┤" if row in labels else "│"
        yield paint(label.rjust(gutter), "dim") + _painted(cells, paint)
    axis = "─" * back + "▲" + "─" * (grid.columns - back - 1)
    yield paint("0 └".rjust(gutter) + axis, "dim")
    yield paint(_time_labels(axes, grid, gutter), "dim")


def _style(tries: int, away: bool, rate: int) -> str:
    return "dim" if away else "red" if tries > rate else "green"


def _labels(axes: _Axes, rows: int) -> dict[int, int]:
    """Return the figure that is written beside each row; the accept rate goes first where two want the same."""
    labels: dict[int, int] = {}
    for mark in axes.marks():
        labels.setdefault(max(0, math.ceil(axes.height(mark) * rows) - 1), mark)
    return labels


def _painted(cells: Sequence[tuple[str, str]], paint: Callable[..., str]) -> str:
    used = len("".join(block for block, _ in cells).rstrip())
    runs = groupby(cells[:used], key=lambda cell: cell[1])
    texts = ((style, "".join(block for block, _ in run)) for style, run in runs)
    return "".join(text if text.isspace() else paint(text, style) for style, text in texts)


def _time_labels(axes: _Axes, grid: _Grid, gutter: int) -> str:
    """Return the line below the axis: its beginning, the server's return, its end, as far as there is room."""
    back = gutter + grid.column(axes.back)
    text = f"{_seconds(axes.back)}: the server is back"
    start = min(back, gutter + grid.columns - len(text))
    line = "0 s".rjust(gutter + 2) if start > gutter + 4 else ""
    line = line.ljust(start) + text
    end = _seconds(axes.end)
    room = gutter + grid.columns - len(line) - len(end)
    return line + " " * room + end if room > 2 else line


def _table(courses: Mapping[str, Course], columns: int, paint: Callable[..., str]) -> Iterator[str]:
    head = [("", "policy"), ("peak", "a second"), ("50 %", "back"), ("95 %", "back"), ("100 %", "back")]
    head += [("attempts", "a device")]
    rows = [[name, *_figures(course)] for name, course in courses.items()]
    if any(course.given_up for course in courses.values()):
        head.append(("given", "up"))
        rows = [[*row, f"{course.given_up:,}"] for row, course in zip(rows, courses.values(), strict=True)]
    table = [[above for above, _ in head], [below for _, below in head], *rows]
    widths = [max(len(row[number]) for row in table) for number in range(1, len(head))]
    names = min(max(_width(printable(row[0])) for row in table), columns - sum(widths) - 2 * len(widths))
    for number, (name, *figures) in enumerate(table):
        name = _fit(name, names)
        line = name + " " * (names - _width(name))
        line += "".join(f"  {figure:>{width}}" for figure, width in zip(figures, widths, strict=True))
        yield paint(line, "dim") if number < 2 else line


def _figures(course: Course) -> list[str]:
    back = [_back(course.back_after(share)) for share in _SHARES]
    return [f"{course.peak:,}", *back, f"{course.attempts_a_device:,.1f}"]


def _back(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return _seconds(seconds) if seconds >= 1 else "<1 s"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds == int(seconds) or seconds >= 10 else f"{seconds:.1f} s"


def _subject(outage: Outage) -> str:
    devices = "1 device loses its link" if outage.devices == 1 else f"{outage.devices:,} devices lose their link"
    return (
        f"{devices} at 0 s. The server is back at {_seconds(outage.seconds)}"
        f" and accepts {outage.accept_rate:,} connections a second."
    )


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _fit(text: str, cells: int) -> str:
    """Return `text` made visible, and cut to so many cells of a terminal."""
    text = printable(text)
    if _width(text) <= cells:
        return text
    while text and _width(text) >= cells:
        text = text[:-1]
    return text + "…"


# The SVG, in its own units. Fonts are the viewer's; the background is opaque, for pages that are dark.
_WIDE, _LEFT, _RIGHT = 960, 76, 24
_HEAD, _PANEL, _PLOT = 92, 196, 112
_FINEST = 800
_FONTS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
_INK, _SOFT, _RULE = "#1f2933", "#52606d", "#e4e7eb"
_AWAY, _REFUSED, _ACCEPTED = "#9aa5b1", "#e07a5f", "#2f855a"
_STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 604800, 2592000)


def svg(courses: Mapping[str, Course]) -> str:
    """Draw the courses of one outage below each other as one SVG, without scripts, links and fonts.

    Args:
        courses: by the name of their policy, at least one; the time axis is as long as the first one takes.
    """
    axes = _Axes.of(courses)
    high = _HEAD + _PANEL * len(courses)
    subject = escape(_subject(next(iter(courses.values())).outage))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE} {high}" width="{_WIDE}" height="{high}"',
        f' role="img" font-family="{_FONTS}">',
        f"<title>Tries to connect in a second</title><desc>{subject}</desc>",
        f'<rect width="{_WIDE}" height="{high}" rx="8" fill="#ffffff"/>',
        _text(20, 30, subject, size=15 if len(subject) <= 96 else 13, weight=600),
        *_legend(axes),
    ]
    for number, (name, course) in enumerate(courses.items()):
        parts += _panel(name, course, axes, _HEAD + number * _PANEL)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(
    x: float, y: float, escaped: str, *, size: int = 13, fill: str = _INK, weight: int = 400, at: str = ""
) -> str:
    anchor = f' text-anchor="{at}"' if at else ""
    bold = f' font-weight="{weight}"' if weight != 400 else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}"{bold}{anchor}>{escaped}</text>'


def _legend(axes: _Axes) -> Iterator[str]:
    each = math.ceil(axes.end / _FINEST)
    what = "Tries in a second" if each == 1 else f"Tries in a second, the worst of each {each:,} s"
    yield _text(20, 56, f"{what}; the scale is logarithmic", fill=_SOFT)
    x = 480
    for fill, meaning in ((_AWAY, "server away"), (_REFUSED, "refused"), (_ACCEPTED, "accepted")):
        yield f'<rect x="{x}" y="46" width="12" height="12" fill="{fill}"/>'
        yield _text(x + 18, 56, meaning, fill=_SOFT)
        x += 34 + 8 * len(meaning)
    yield _line(x, 52, x + 24, 52, _INK, ' stroke-dasharray="5 3"')
    yield _text(x + 30, 56, "accept rate", fill=_SOFT)


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str, more: str = "") -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{stroke}"{more}/>'


def _panel(name: str, course: Course, axes: _Axes, top: float) -> Iterator[str]:
    """Yield one course: its title, its figures in words, its plot."""
    right, floor = _WIDE - _RIGHT, top + 40 + _PLOT
    back = _x(axes.back, axes)
    yield _text(20, top + 10, escape(_fit(name, 84)), size=15, weight=600)
    yield _text(20, top + 29, escape(_in_words(course)), fill=_SOFT)
    if len(course.attempts) > axes.end:
        yield _text(right, top + 10, f"goes on until {_seconds(len(course.attempts) - 1)} →", fill=_SOFT, at="end")
    written: list[float] = []
    for mark in axes.marks():
        y = floor - axes.height(mark) * _PLOT
        if all(abs(y - other) >= 13 for other in written):
            written.append(y)
            yield _text(_LEFT - 8, y + 4, f"{mark:,}", size=11, fill=_INK if mark == axes.rate else _SOFT, at="end")
        if mark != axes.rate:
            yield _line(_LEFT, round(y, 1), right, round(y, 1), _RULE)
    yield _text(_LEFT - 8, floor + 4, "0", size=11, fill=_SOFT, at="end")
    away = int(axes.back)
    yield _area(course.attempts[:away], 0, axes, floor, _AWAY)
    yield _area(course.attempts[away:], away, axes, floor, _REFUSED)
    yield _area(course.accepted[away:], away, axes, floor, _ACCEPTED)
    y = round(floor - axes.height(axes.rate) * _PLOT, 1)
    yield _line(back, y, right, y, _INK, ' stroke-dasharray="5 3"')
    yield _line(_LEFT, floor, right, floor, _SOFT)
    yield _line(back, top + 38, back, floor + 6, _INK)
    yield _text(back, floor + 18, f"{_seconds(axes.back)}: the server is back", size=11, at=_anchor(back))
    step = next((step for step in _STEPS if axes.end / step <= 10), axes.end)
    for second in range(0, axes.end, step):
        x = _x(second, axes)
        # The return's label is to the right of its line or, near the end, to the left of it.
        clear = x < back - 30 or x > back + 150 if _anchor(back) == "start" else x < back - 150
        if clear:
            yield _line(x, floor, x, floor + 4, _SOFT)
            yield _text(x, floor + 18, _seconds(second), size=11, fill=_SOFT, at="middle")


def _anchor(x: float) -> str:
    return "start" if x < _WIDE - 200 else "end"


def _x(second: float, axes: _Axes) -> float:
    return round(_LEFT + (_WIDE - _LEFT - _RIGHT) * min(second / axes.end, 1.0), 1)


def _area(figures: Sequence[int], begin: int, axes: _Axes, floor: float, fill: str) -> str:
    """Return a stepped area from second `begin` on; as many steps as can be seen."""
    each = math.ceil(axes.end / _FINEST)
    path, last = [f"M{_x(begin, axes):g} {floor:g}"], 0
    for at in range(0, min(len(figures), axes.end - begin), each):
        figure = max(figures[at : at + each])
        if figure != last:
            path.append(f"H{_x(begin + at, axes):g}V{floor - axes.height(figure) * _PLOT:.1f}")
            last = figure
    path.append(f"H{_x(begin + len(figures), axes):g}V{floor:g}Z")
    return f'<path d="{"".join(path)}" fill="{fill}"/>'


def _in_words(course: Course) -> str:
    after = [_back(course.back_after(share)) for share in _SHARES]
    half, most, every = (word if word == "never" else f"after {word}" for word in after)
    words = f"peak {course.peak:,} a second; back: 50 % {half}, 95 % {most}, 100 % {every}"
    words += f"; {course.attempts_a_device:,.1f} tries a device"
    return words + (f"; {course.given_up:,} gave up" if course.given_up else "")
