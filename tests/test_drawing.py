"""The drawings of a fleet: they fit, they say what the figures are, and no name can break them."""

from __future__ import annotations

import random
import re
import unicodedata
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durablews.analysis.drawing import svg, terminal
from durablews.analysis.fleet import Course, Outage, comparisons, simulate

SVG = "{http://www.w3.org/2000/svg}"
OUTAGE = Outage(devices=10_000, accept_rate=500, seconds=60)


def compared(outage: Outage = OUTAGE, *, max_retries: int | None = None) -> dict[str, Course]:
    policies = comparisons(random.Random(1).random)
    return {
        name: simulate(policy.backoff, outage, first=policy.first, max_retries=max_retries)
        for name, policy in policies.items()
    }


COMPARED = compared()
FULL_JITTER = "full jitter 1..60 s"


def course(attempts: list[int], *, rate: int = 10, seconds: float = 2, given_up: int = 0) -> Course:
    """A course of which only the drawing matters."""
    back = int(seconds)
    accepted = [0 if second < back else min(tries, rate) for second, tries in enumerate(attempts)]
    outage = Outage(devices=sum(accepted) + given_up or 1, accept_rate=rate, seconds=seconds)
    return Course(
        outage=outage, attempts=attempts, accepted=accepted, peak=max(attempts[back:], default=0), given_up=given_up
    )


def cells(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def chart(text: str, name: str) -> list[str]:
    """Return the lines of one chart, from below its title to its times."""
    _, _, rest = text.partition(f"\n\n{name}")
    return rest.split("\n\n")[0].splitlines()[1:]


def plots(lines: list[str]) -> list[str]:
    """Return the rows of a chart without its figures and its axis of time."""
    return [re.split("[│┤]", line, maxsplit=1)[1] for line in lines if "│" in line or "┤" in line]


names = st.text(min_size=1, max_size=150)
shapes = st.builds(
    course,
    st.lists(st.one_of(st.integers(0, 30), st.integers(0, 10**7)), max_size=300),
    rate=st.integers(1, 10**6),
    seconds=st.one_of(st.integers(0, 400).map(float), st.floats(0, 400)),
    given_up=st.integers(0, 10**6),
)


@given(courses=st.dictionaries(names, shapes, min_size=1, max_size=4), columns=st.integers(60, 200))
def test_every_line_fits_its_terminal(courses: dict[str, Course], columns: int) -> None:
    """Whatever the figures and the names are, no line is wider than the terminal, and none has an escape code."""
    text = terminal(courses, columns=columns, colour=None)
    assert text.endswith("\n")
    for line in text.removesuffix("\n").split("\n"):
        assert cells(line) <= columns
        assert line.isprintable()


@pytest.mark.parametrize("outage", [OUTAGE, Outage(devices=10**6, accept_rate=50_000, seconds=3600)])
@pytest.mark.parametrize("columns", [80, 120])
def test_the_drawing_uses_the_width_that_there_is(outage: Outage, columns: int) -> None:
    """At 80 and at 120 columns the charts fill most of the terminal."""
    text = terminal({FULL_JITTER: COMPARED[FULL_JITTER], "fixed 5 s": COMPARED["fixed 5 s"]}, columns=columns)
    assert columns * 0.7 <= max(map(len, text.splitlines())) <= columns


def test_a_narrower_terminal_is_drawn_for_sixty_columns() -> None:
    """Below 60 columns a table of seven columns cannot be read: lines wrap instead."""
    assert terminal(COMPARED, columns=20) == terminal(COMPARED, columns=60)


def test_the_table_has_the_figures() -> None:
    """Peak, 50, 95 and 100 % back and attempts a device stand in one line behind the name; given up when some did."""

    def table(courses: dict[str, Course]) -> list[list[str]]:
        return [re.split("  +", line) for line in terminal(courses, columns=80).rpartition("\n\n")[2].splitlines()]

    above, below, *rows = table(COMPARED)
    assert above == ["", "peak", "50 %", "95 %", "100 %", "attempts"]
    assert below == ["policy", "a second", "back", "back", "back", "a device"]
    assert rows[0] == ["fixed 5 s", "10,000", "45 s", "90 s", "95 s", "21.5"]
    assert rows[1] == ["exponential 1..60 s, no jitter", "10,000", "543 s", "1,083 s", "1,143 s", "15.5"]
    full = COMPARED[FULL_JITTER]
    back = [f"{full.back_after(share):.0f} s" for share in (0.5, 0.95, 1)]
    assert rows[2] == [FULL_JITTER, f"{full.peak}", *back, f"{full.attempts_a_device:.1f}"]

    above, below, fixed, *_ = table(compared(max_retries=24))
    assert (above[-1], below[-1]) == ("given", "up")
    assert fixed == ["fixed 5 s", "10,000", "45 s", "never", "never", "20.1", "3,500"]


def test_the_first_course_is_the_largest() -> None:
    """The owner's own configuration is drawn highest."""
    text = terminal(COMPARED, columns=100)
    assert len(plots(chart(text, "fixed 5 s"))) > len(plots(chart(text, FULL_JITTER))) >= 3


def test_bars_are_as_high_as_the_tries_were() -> None:
    """A column is blank for none, full for the most, and never lower for more; the worst of what shares it counts."""
    figures = [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000]

    def heights(text: str) -> list[int]:
        rows = [row.replace("┄", " ").ljust(70) for row in plots(chart(text, "mine"))]
        return [sum(" ▁▂▃▄▅▆▇█".index(row[column]) for row in rows) for column in range(70)]

    wide = heights(terminal({"mine": course(figures)}, columns=80))
    each = 7  # columns a second
    drawn = [wide[second * each] for second in range(10)]
    assert drawn[0] == 0 < drawn[1]
    assert drawn == sorted(drawn)
    assert len(set(drawn)) == 10
    assert drawn[-1] == 64
    assert all(wide[second * each : (second + 1) * each] == [drawn[second]] * each for second in range(10))

    spikes = [0] * 500
    spikes[123] = spikes[457] = 10_000
    shared = heights(terminal({"mine": course(spikes)}, columns=80))
    assert [column for column, height in enumerate(shared) if height] == [123 // 8, 457 // 8]
    assert max(shared) == 64


def test_the_return_and_the_accept_rate_are_marked() -> None:
    """An arrow stands under the second of the return, and the line of the accept rate begins there, with its figure."""
    for seconds, columns in ((60, 80), (60, 120), (0, 80), (7.5, 100)):
        courses = compared(Outage(devices=2000, accept_rate=700, seconds=seconds))
        lines = chart(terminal(courses, columns=columns), "full jitter 1..60 s")
        arrow = lines[-2].index("▲")
        assert lines[-1][arrow:].startswith(f"{seconds} s: the server is back")
        (rated,) = (line for line in lines if "┄" in line)
        assert rated.startswith("  700 ┤")
        assert rated.index("┄") >= arrow
        assert rated[arrow] != " "


def test_what_goes_on_beyond_the_drawing_is_said() -> None:
    """The first course is whole; one that takes far longer is cut, and the drawing says until when it goes on."""
    assert "exponential 1..60 s, no jitter (goes on until 1,203 s)\n" in terminal(COMPARED, columns=80)
    assert "goes on until 1,203 s" in svg(COMPARED)
    turned = dict(reversed(COMPARED.items()))
    first = {"exponential 1..60 s, no jitter": turned.pop("exponential 1..60 s, no jitter"), **turned}
    for text in (terminal(first, columns=80), svg(first)):
        assert "goes on" not in text


def test_colour_adds_nothing_but_colour() -> None:
    """Without its codes the coloured drawing is the plain one; refused tries are red, accepted ones green."""
    used: set[str] = set()

    def paint(text: str, *styles: str) -> str:
        used.update(styles)
        return f"\x1b[1m{text}\x1b[0m"

    coloured = terminal(COMPARED, columns=80, colour=paint)
    plain = re.sub(r"\x1b\[[0-9]+m", "", coloured)
    assert plain == terminal(COMPARED, columns=80)
    assert coloured != plain
    assert not re.search(" $", plain, re.MULTILINE)
    assert used == {"bold", "dim", "red", "green"}
    below = course([5] * 20, rate=10)
    used.clear()
    terminal({"mine": below}, columns=80, colour=paint)
    assert used == {"bold", "dim", "green"}


@given(courses=st.dictionaries(names, shapes, min_size=1, max_size=4))
def test_the_svg_is_well_formed_and_inside_itself(courses: dict[str, Course]) -> None:
    """Any name and any figures make an XML document that parses, with nothing drawn outside its frame."""
    root = ElementTree.fromstring(svg(courses))
    assert root.tag == f"{SVG}svg"
    _, _, wide, high = map(float, root.attrib["viewBox"].split())
    for line in root.iter(f"{SVG}line"):
        assert all(0 <= float(line.attrib[x]) <= wide for x in ("x1", "x2"))
        assert all(0 <= float(line.attrib[y]) <= high for y in ("y1", "y2"))
    for path in root.iter(f"{SVG}path"):
        steps = re.findall(r"([MHV])([-0-9.]+)", path.attrib["d"])
        across = [float(at) for letter, at in steps if letter != "V"]
        assert across == sorted(across)
        assert all(0 <= at <= wide for at in across)
        assert all(0 <= float(at) <= high for letter, at in steps if letter == "V")


def test_names_are_text_in_the_svg() -> None:
    """A name with markup in it is shown as it is, and does nothing."""
    name = "<script>alert('&amp;')</script>\x1b[31m"
    root = ElementTree.fromstring(svg({name: COMPARED[FULL_JITTER]}))
    assert r"<script>alert('&amp;')</script>\x1b[31m" in [text.text for text in root.iter(f"{SVG}text")]
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {
        *("svg", "title", "desc", "rect", "text", "line", "path")
    }


def test_the_svg_needs_nothing_else() -> None:
    """No scripts, links or fonts from elsewhere, and a light background for pages that are dark."""
    text = svg(COMPARED)
    assert re.findall("https?://[^\"' ]*", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search("<script|href|url\\(|@import|<style", text)
    background = next(iter(ElementTree.fromstring(text).iter(f"{SVG}rect")))
    assert background.attrib["fill"] == "#ffffff"
    assert len(text) < 30_000
    assert len(svg({"a day": course([1, 1000] * 43_200)})) < 30_000
    assert len(svg({"a day": course([*[0] * 500, *[1000] * 500] * 86)})) < 60_000


def test_the_svg_says_what_the_terminal_says() -> None:
    """Title, return, accept rate and the figures of each course are words in the drawing."""
    words = [text.text for text in ElementTree.fromstring(svg(COMPARED)).iter(f"{SVG}text")]
    assert (
        "10,000 devices lose their link at 0 s. The server is back at 60 s and accepts 500 connections a second."
    ) in words
    assert words.count("60 s: the server is back") == 3
    assert words.count("500") == 3
    assert (
        "peak 10,000 a second; back: 50 % after 45 s, 95 % after 90 s, 100 % after 95 s; 21.5 tries a device" in words
    )
    gone = svg({"mine": course([0, 0, 5, 5], given_up=1234)})
    assert "back: 50 % never, 95 % never, 100 % never; 0.0 tries a device; 1,234 gave up" in gone
