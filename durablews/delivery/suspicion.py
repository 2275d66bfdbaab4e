"""What a close says about messages and about the stream (PROTOCOL.md section 6): never that one may be deleted.

A close frame names no message. The culprit is found by sending less at a time, and only what was in flight alone is
ever blamed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import Enum

from msgspec import Struct

__all__ = ["Closed", "Suspicion", "Verdict"]

_SENSELESS = frozenset({1003, 1007, 4400})
_TOO_LARGE = frozenset({1009, 4413})
_TAKEN_OVER = 4409
#: So many closes 1003, 1007 or 4400 in a row with the same oldest unanswered entry, and it is sent alone.
_CLOSES_BEFORE_PROBE = 3
#: So many takeovers by another instance within so many seconds, and the stream is shared.
_TAKEOVERS, _TAKEOVER_SPAN = 3, 600.0


class Closed(Struct, frozen=True, kw_only=True):
    """How a connection ended. `received`: the server sent the close frame; `leaving`: we had begun to close."""

    code: int
    reason: str = ""
    received: bool = False
    leaving: bool = False


class Verdict(Enum):
    """What follows for the messages."""

    NOTHING = "nothing"
    #: Send less at a time.
    SHRINK = "shrink"
    #: The one that was in flight alone becomes a dead letter.
    POISON = "poison"
    TOO_LARGE = "too_large"
    #: Another client uses this stream: take a new one.
    SHARED = "shared"


class Suspicion:
    """What earlier closes of this client have shown."""

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._suspect: tuple[int, int] | None = None
        self._closes = 0
        self._takeovers: deque[float] = deque()
        # While one at a time goes: up to where in each priority, for what was in flight then held the culprit.
        self._probing: dict[int, int] = {}
        #: Whether messages go one at a time.
        self.alone = False

    def judge(
        self,
        closed: Closed,
        oldest: tuple[int, int] | None,
        in_flight: int,
        now: float,
        *,
        last: Mapping[int, int] | None = None,
    ) -> Verdict:
        """Weigh how a connection ended.

        Args:
            oldest: priority and sequence of the entry that was unanswered for longest, or None.
            in_flight: how many were unanswered.
            last: priority -> the last sequence of those.
        """
        if not closed.received:
            return Verdict.NOTHING
        if closed.code == _TAKEN_OVER:
            return self._taken_over(closed, now)
        if oldest is None:
            return Verdict.NOTHING
        if closed.code in _TOO_LARGE:
            return Verdict.TOO_LARGE if in_flight == 1 else Verdict.SHRINK
        if closed.code in _SENSELESS:
            return self._senseless(oldest, in_flight, last or {})
        return Verdict.NOTHING

    def answered(self, priority: int, last: int) -> None:
        """Note that the server answered for everything of this priority up to `last`."""
        if self._suspect is not None and self._suspect[0] == priority and self._suspect[1] <= last:
            self._suspect, self._closes = None, 0
        if self._probing.get(priority, last + 1) <= last:
            del self._probing[priority]
        # Not before all of them were answered: otherwise each innocent one before the culprit costs three more closes.
        self.alone = bool(self._probing)

    def forget(self) -> None:
        """Suspect nobody any more: everything that waited was answered, or has left."""
        self._suspect, self._closes, self.alone = None, 0, False
        self._probing = {}

    def _senseless(self, oldest: tuple[int, int], in_flight: int, last: Mapping[int, int]) -> Verdict:
        if oldest != self._suspect:
            self._suspect, self._closes = oldest, 0
        elif self.alone and in_flight == 1 and self._closes >= _CLOSES_BEFORE_PROBE:
            self.forget()
            return Verdict.POISON
        self._closes += 1
        if self._closes >= _CLOSES_BEFORE_PROBE and not self.alone:
            self.alone, self._probing = True, {oldest[0]: oldest[1], **last}
        return Verdict.NOTHING

    def _taken_over(self, closed: Closed, now: float) -> Verdict:
        if closed.leaving or closed.reason == f"instance={self._instance}":
            return Verdict.NOTHING
        self._takeovers.append(now)
        while self._takeovers[0] < now - _TAKEOVER_SPAN:
            self._takeovers.popleft()
        if len(self._takeovers) < _TAKEOVERS:
            return Verdict.NOTHING
        self._takeovers.clear()
        return Verdict.SHARED
