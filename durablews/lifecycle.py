"""The states of a link and every transition there is.

Rules of this file: all that may happen to a state stands in `TRANSITIONS`; a pair that is missing there cannot happen
and raises. `Lifecycle.apply` is the only setter.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

__all__ = ["TRANSITIONS", "Lifecycle", "LinkEvent", "State"]


class State(enum.Enum):
    """Where the link stands."""

    #: Not running: not yet started, closed, or given up with everything kept.
    DISCONNECTED = "DISCONNECTED"
    #: Dialling, shaking hands, waiting for the server's welcome.
    CONNECTING = "CONNECTING"
    #: Welcomed: messages flow.
    CONNECTED = "CONNECTED"
    #: Waiting for the next try.
    RECONNECTING = "RECONNECTING"


class LinkEvent(enum.Enum):
    """What happens to a link."""

    START = "start"
    WELCOMED = "welcomed"
    LOST = "lost"
    RETRY = "retry"
    EXHAUSTED = "exhausted"
    VETOED = "vetoed"
    STOP = "stop"


TRANSITIONS: dict[tuple[State, LinkEvent], State] = {
    (State.DISCONNECTED, LinkEvent.START): State.CONNECTING,
    (State.CONNECTING, LinkEvent.WELCOMED): State.CONNECTED,
    (State.CONNECTING, LinkEvent.LOST): State.RECONNECTING,
    (State.CONNECTED, LinkEvent.LOST): State.RECONNECTING,
    (State.RECONNECTING, LinkEvent.RETRY): State.CONNECTING,
    (State.RECONNECTING, LinkEvent.EXHAUSTED): State.DISCONNECTED,
    (State.RECONNECTING, LinkEvent.VETOED): State.DISCONNECTED,
    (State.DISCONNECTED, LinkEvent.STOP): State.DISCONNECTED,
    (State.CONNECTING, LinkEvent.STOP): State.DISCONNECTED,
    (State.CONNECTED, LinkEvent.STOP): State.DISCONNECTED,
    (State.RECONNECTING, LinkEvent.STOP): State.DISCONNECTED,
}


class Lifecycle:
    """One link's state, and whom to tell when it changes."""

    def __init__(self, on_change: Callable[[State, State], None] | None = None) -> None:
        self._state = State.DISCONNECTED
        self._on_change = on_change

    @property
    def state(self) -> State:
        return self._state

    def apply(self, event: LinkEvent) -> State:
        """Move to the next state and return it; an event that the table does not know here is a bug, and raises."""
        try:
            following = TRANSITIONS[self._state, event]
        except KeyError:
            raise AssertionError(f"{event.value} cannot happen while {self._state.value}") from None
        before, self._state = self._state, following
        if following is not before and self._on_change is not None:
            self._on_change(before, following)
        return following
