"""Write into the pages of `durablews/docs` what the code says: the states of the link, the rules, the profiles.

Without arguments it writes each part between its two marks; with --check it says, by exit code 1, which page does not
say what the code says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from durablews.analysis.profiles import Figure, profiles  # noqa: E402
from durablews.analysis.rules.catalogue import RULES  # noqa: E402
from durablews.analysis.subject import span  # noqa: E402
from durablews.lifecycle import TRANSITIONS, State  # noqa: E402

DOCS = ROOT / "durablews" / "docs"
BEGIN, END = "<!-- {} by tools/pages.py -->", "<!-- end of {} -->"


def states() -> str:
    """Return the transition table as a Mermaid state diagram: one arrow for each pair of states, in its order."""
    arrows: dict[tuple[State, State], list[str]] = {}
    for (before, event), after in TRANSITIONS.items():
        arrows.setdefault((before, after), []).append(event.value)
    lines = [f"    [*] --> {next(iter(State)).value}"]
    lines += [f"    {pair[0].value} --> {pair[1].value}: {', '.join(events)}" for pair, events in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def rules() -> str:
    """Return the rules as a table."""
    rows = [f"| {rule.code} | {rule.severity} | {rule.title} | {rule.sums or '-'} |" for rule in RULES.values()]
    return "\n".join(["| code | severity | what is wrong | the sum |", "|---|---|---|---|", *rows])


def paths() -> str:
    """Return the profiles as a table; their sources stand in the data file."""

    def shown(figure: Figure | None, write: Callable[[float], str]) -> str:
        return "-" if figure is None else write(figure.value)

    rows = [
        f"| `{name}` | {each.title} | {shown(each.idle_limit, span)} | {shown(each.lifetime, span)} |"
        f" {shown(each.largest_message, lambda size: f'{size:,.0f} B')} |"
        for name, each in profiles().items()
    ]
    head = ["| profile | what it is | idle limit | lifetime | largest message |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "states": ("link.md", states),
    "rules": ("check.md", rules),
    "profiles": ("check.md", paths),
}


def written(page: str, name: str, text: str) -> str:
    """Return a page with one part as it should be.

    Raises:
        ValueError: the page has no place for it.
    """
    begin_mark, end_mark = BEGIN.format(name), END.format(name)
    before, begin, rest = page.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise ValueError(f"a page lacks {begin_mark} or {end_mark}")
    return f"{before}{begin_mark}\n\n{text}\n\n{end_mark}{after}"


def main(argv: list[str]) -> int:
    code = 0
    for name, (page_name, make) in PARTS.items():
        path = DOCS / page_name
        page = path.read_text(encoding="utf-8")
        wanted = written(page, name, make())
        if page == wanted:
            continue
        if "--check" in argv:
            print(f"{path}: {name} are not what the code says; run tools/pages.py", file=sys.stderr)
            code = 1
        else:
            path.write_text(wanted, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
