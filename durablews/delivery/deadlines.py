"""When this side ends a connection that still stands: no acks, a pause without end, a bye, its age. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from durablews.delivery.actions import Close
from durablews.delivery.lane import Lane

__all__ = ["LONGEST_RETRY", "RENEWAL", "Deadlines", "retry_delay"]

# C5: paused by a window of 0 for so long; bye: the server has not closed after so long.
_LONGEST_PAUSE, _LONGEST_BYE = 300.0, 10.0

# "A client waits at least 100 ms and at most 1 h", and 5 s when nothing is said (PROTOCOL.md section 2).
_SHORTEST_RETRY, LONGEST_RETRY, _USUAL_RETRY = 0.1, 3600.0, 5.0

#: The reason with which a connection is left that has reached `max_connection_age`.
RENEWAL = "renewing the connection"


def retry_delay(asked: float | None) -> float:
    """Return the seconds that a nack holds its priority back; `asked` is what the server said."""
    return min(max(_USUAL_RETRY if asked is None else asked, _SHORTEST_RETRY), LONGEST_RETRY)


class Deadlines:
    """The deadlines of one connection.

    Args:
        ack_timeout: seconds, C9.
    """

    def __init__(self, ack_timeout: float) -> None:
        self._ack_timeout = ack_timeout
        self._bye_by: float | None = None
        self._paused_since: float | None = None
        self._retiring = False

    @property
    def leaving(self) -> bool:
        """Whether nothing new is sent any more."""
        return self._retiring or self._bye_by is not None

    def bye(self, now: float) -> None:
        """Take note that the server is about to close."""
        if self._bye_by is None:
            self._bye_by = now + _LONGEST_BYE

    def retire(self) -> None:
        """Leave as soon as nothing is in flight."""
        self._retiring = True

    def pausing(self, now: float, is_pausing: bool) -> None:
        """Take note whether a window of 0 keeps messages waiting and nothing is in flight."""
        if not is_pausing:
            self._paused_since = None
        elif self._paused_since is None:
            self._paused_since = now

    def timers(self, lanes: Iterable[Lane]) -> list[float]:
        """Return when `due` may have something to say."""
        times = [max(lane.last_ack, lane.flight[0].progress) + self._ack_timeout for lane in lanes if lane.flight]
        if self._bye_by is not None:
            times.append(self._bye_by)
        if self._paused_since is not None:
            times.append(self._paused_since + _LONGEST_PAUSE)
        return times

    def is_late(self, lanes: Iterable[Lane], now: float) -> bool:
        """Whether an ack is overdue."""
        # Compared as `timers` computes it: a sum and a difference of floats differ.
        return any(
            lane.flight and now >= max(lane.last_ack, lane.flight[0].progress) + self._ack_timeout for lane in lanes
        )

    def due(self, lanes: Iterable[Lane], now: float) -> Close | None:
        """Return how to close now, if a deadline has passed."""
        lanes = tuple(lanes)
        if self.is_late(lanes, now):
            return Close(4408, f"no ack for {self._ack_timeout:g} s")
        if self._bye_by is not None and now >= self._bye_by:
            return Close(1000, "bye")
        if self._paused_since is not None and now >= self._paused_since + _LONGEST_PAUSE:
            return Close(4408, "paused for 5 minutes with messages to send")
        if self._retiring and not any(lane.flight for lane in lanes):
            return Close(1000, RENEWAL)
        return None
