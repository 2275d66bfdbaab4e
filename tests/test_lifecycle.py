"""The states of a link: what the table allows happens, everything else raises and changes nothing."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from durablews.lifecycle import TRANSITIONS, Lifecycle, LinkEvent, State

ROOT = Path(__file__).resolve().parents[1]

#: How to get to each state from the start.
WAYS = {
    State.DISCONNECTED: [],
    State.CONNECTING: [LinkEvent.START],
    State.CONNECTED: [LinkEvent.START, LinkEvent.WELCOMED],
    State.RECONNECTING: [LinkEvent.START, LinkEvent.LOST],
}
PAIRS = list(itertools.product(State, LinkEvent))

#: The table once more, as the documentation tells it: state -> event -> state.
STORY = {
    State.DISCONNECTED: {LinkEvent.START: State.CONNECTING},
    State.CONNECTING: {LinkEvent.WELCOMED: State.CONNECTED, LinkEvent.LOST: State.RECONNECTING},
    State.CONNECTED: {LinkEvent.LOST: State.RECONNECTING},
    State.RECONNECTING: {
        LinkEvent.RETRY: State.CONNECTING,
        LinkEvent.EXHAUSTED: State.DISCONNECTED,
        LinkEvent.VETOED: State.DISCONNECTED,
    },
}


def link_at(state: State) -> tuple[Lifecycle, list[tuple[State, State]]]:
    told: list[tuple[State, State]] = []
    link = Lifecycle(lambda before, after: told.append((before, after)))
    for event in WAYS[state]:
        link.apply(event)
    told.clear()
    assert link.state is state
    return link, told


def test_the_table_is_the_story() -> None:
    """Every transition of the documentation is in the table, and no other; STOP ends any state."""
    told = {(state, event): after for state, events in STORY.items() for event, after in events.items()}
    told |= {(state, LinkEvent.STOP): State.DISCONNECTED for state in State}
    assert told == TRANSITIONS


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=lambda value: value.name)
def test_only_the_table_moves_a_link(state: State, event: LinkEvent) -> None:
    """A pair in the table leads where it says and is told once; one that is missing raises and changes nothing."""
    link, told = link_at(state)
    after = TRANSITIONS.get((state, event))
    if after is None:
        with pytest.raises(AssertionError, match=f"{event.value} cannot happen while {state.value}"):
            link.apply(event)
        assert (link.state, told) == (state, [])
    else:
        assert link.apply(event) is link.state is after
        assert told == ([] if after is state else [(state, after)])


def test_a_link_starts_disconnected_and_nobody_need_listen() -> None:
    """Before START nothing runs; without a listener the states change all the same."""
    link = Lifecycle()
    assert link.state is State.DISCONNECTED
    assert link.apply(LinkEvent.START) is State.CONNECTING


def test_every_state_can_be_reached_and_left() -> None:
    """No state is a trap: from each one there is a way to CONNECTED, and STOP."""
    reach = {State.CONNECTED}
    for _ in State:
        reach |= {state for (state, _), after in TRANSITIONS.items() if after in reach}
    assert reach == set(State)
    assert set(TRANSITIONS.values()) == set(State)


def test_a_state_has_no_setter() -> None:
    """`apply` is the only way to change it."""
    with pytest.raises(AttributeError):
        Lifecycle().state = State.CONNECTED  # type: ignore[misc]


def test_the_drawing_in_the_documentation_is_the_table() -> None:
    """`tools/pages.py` finds nothing to draw anew; it would, after any change of the table."""
    check = [sys.executable, str(ROOT / "tools" / "pages.py"), "--check"]
    assert subprocess.run(check, capture_output=True, text=True).returncode == 0
    page = (ROOT / "durablews" / "docs" / "link.md").read_text(encoding="utf-8")
    arrows = set(re.findall(r"^    (\w+) --> (\w+): (.+)$", page, re.MULTILINE))
    told = {(State(a), LinkEvent(event)): State(b) for a, b, events in arrows for event in events.split(", ")}
    assert told == TRANSITIONS
