"""Draw the states of the link from their transition table, into `durablews/docs/link.md`.

Without arguments it writes the picture between its two marks; with --check it says, by exit code 1, that the picture is
not what the table says.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from durablews.lifecycle import TRANSITIONS, State  # noqa: E402

PAGE = ROOT / "durablews" / "docs" / "link.md"
BEGIN, END = "<!-- drawn by tools/diagram.py -->", "<!-- end of the drawing -->"


def drawing() -> str:
    """Return the table as a Mermaid state diagram: one arrow for each pair of states, in the order of the table."""
    arrows: dict[tuple[State, State], list[str]] = {}
    for (before, event), after in TRANSITIONS.items():
        arrows.setdefault((before, after), []).append(event.value)
    lines = [f"    [*] --> {next(iter(State)).value}"]
    lines += [f"    {pair[0].value} --> {pair[1].value}: {', '.join(events)}" for pair, events in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def drawn(page: str) -> str:
    """Return a page with the drawing as it should be.

    Raises:
        ValueError: the page has no place for it.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{drawing()}\n\n{END}{after}"


def main(argv: list[str]) -> int:
    page = PAGE.read_text(encoding="utf-8")
    wanted = drawn(page)
    if page == wanted:
        return 0
    if "--check" in argv:
        print(f"{PAGE} is not what the transition table says; run tools/diagram.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
