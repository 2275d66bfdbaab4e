"""What is on its way to the other end, and how much may be: what a link carries in about a second. Pure."""

from __future__ import annotations

from durablews.delivery.lane import Transmission

__all__ = ["Transit"]

# Bytes with which a link begins, and the least that it is given: 32 KiB take 16 s at 16 kbit/s.
_FIRST, _LEAST = 32 * 1024, 8 * 1024
# A new connection may be another, slower path: it begins with no more than this.
_MOST_AT_FIRST = 128 * 1024
# Seconds that a frame took to arrive: below the first four times as much may be on its way, below the second twice as
# much; above the third it must be half. So for an ack_timeout of 30 s and above; in proportion for a shorter one, for
# what lies in the way delays acks too: one that waits for the acknowledgement of the segment before it (Nagle's
# algorithm, at servers without TCP_NODELAY) comes only after all of it.
_QUICK, _GOOD, _SLOW = 0.1, 1.0, 4.0
_USUAL_ACK_TIMEOUT = 30.0


class Transit:
    """The bytes that were handed to a connection, and how many of them the other end has taken.

    Whatever lies between delays everything behind it: an alarm, a ping, the pong that the server waits for. A server
    whose library pings every 20 s and waits 20 s for the pong (websockets and uvicorn do) would cut a link of 16 kbit/s
    again and again, with nothing delivered, if a megabyte lay before that pong.

    Args:
        ack_timeout: seconds in which an ack must come.
    """

    def __init__(self, ack_timeout: float) -> None:
        self._pace = min(1.0, ack_timeout / _USUAL_ACK_TIMEOUT)
        #: Bytes that may be on their way.
        self.limit = _FIRST
        self.begin()

    def begin(self) -> None:
        """Start a connection."""
        self.limit = min(self.limit, _MOST_AT_FIRST)
        self.handed = self._taken = 0
        # Frames of messages that the other end has not taken whole (PROTOCOL.md C9).
        self._transmissions: list[Transmission] = []
        # One round: what had been handed out at some moment, how much of that was on its way, and when that was.
        self._round: tuple[int, int, float] | None = None

    @property
    def is_full(self) -> bool:
        """Whether no more messages should go now."""
        return self.handed - self._taken > self.limit - self.frame

    @property
    def frame(self) -> int:
        """The bytes of a frame that may go: two of them keep the link busy while the first is acknowledged."""
        return self.limit // 2

    @property
    def untaken(self) -> bool:
        """Whether frames of messages are still to be taken."""
        return bool(self._transmissions)

    def hand(self, size: int, now: float) -> None:
        """Take note that a frame of `size` bytes was handed out."""
        self.handed += size
        # What is handed out at one moment is written together, and one round: the first of many small frames by itself
        # would never show what the link can carry.
        if self._round is None or self._round[2] == now:
            self._begin_round(now)

    def track(self, transmission: Transmission) -> None:
        """Keep the progress of a frame of messages."""
        self._transmissions.append(transmission)

    def take(self, total: int, now: float) -> None:
        """Take note that the other end has taken the first `total` bytes of this connection."""
        if total <= self._taken:
            return
        self._taken = total
        for transmission in self._transmissions:
            transmission.progress = now
        self._transmissions = [transmission for transmission in self._transmissions if transmission.end > total]
        if self._round is not None and total >= self._round[0]:
            self._end_round(self._round[1], now - self._round[2])
            self._round = None
            if self.handed > total:
                self._begin_round(now)

    def _end_round(self, volume: int, took: float) -> None:
        if took > _SLOW * self._pace:
            self.limit = max(self.limit // 2, _LEAST)
        elif volume >= self.frame // 2 and took < _GOOD * self._pace:  # less does not show what the link could carry
            self.limit *= 4 if took < _QUICK * self._pace else 2

    def _begin_round(self, now: float) -> None:
        self._round = (self.handed, self.handed - self._taken, now)
