"""When to ping, and when silence means that the link is dead. Pure."""

from __future__ import annotations

from collections import deque
from enum import Enum

from durablews.config import HeartbeatConfig

__all__ = ["LONGEST_INTERVAL", "SHORTEST_INTERVAL", "Beat", "Heartbeat"]

#: The bounds of an adaptive interval, in seconds.
SHORTEST_INTERVAL, LONGEST_INTERVAL = 15.0, 60.0
# The latencies (seconds, averaged over so many) that double and halve it.
_SLOW_LATENCY, _QUICK_LATENCY = 5.0, 1.0
_LATENCIES = 10


class Beat(Enum):
    """What is due."""

    NOTHING = "nothing"
    PING = "ping"
    DEAD = "dead"


class Heartbeat:
    """The heartbeat of a link: a ping after `interval` seconds of silence, and again after each further one.

    Anything that arrives counts as alive. A connection whose packets vanish is found ``interval * max_missed +
    timeout`` seconds after the last of them: 100 s with the defaults. What was learnt about the latency is kept from
    one connection to the next; `begin` starts each of them.
    """

    def __init__(self, config: HeartbeatConfig) -> None:
        self._config = config
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        #: Whether pings are messages of the dialect.
        self.application = config.application
        #: Seconds of silence before a ping.
        self.interval = config.interval
        if config.adaptive:
            self.interval = min(max(config.interval, SHORTEST_INTERVAL), LONGEST_INTERVAL)
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """Start a connection."""
        self._unanswered = 0
        self._hurried = False
        self._deadline: float | None = None
        self._next_ping = now + self.interval
        self._heard = now

    @property
    def latency(self) -> float | None:
        """Seconds from a ping to its pong, averaged over the last ten; None before the first."""
        return sum(self._latencies) / len(self._latencies) if self._latencies else None

    def silence(self, now: float) -> float:
        """Return for how many seconds nothing has arrived."""
        return now - self._heard

    def received(self, now: float) -> None:
        """Take note that something arrived."""
        self._heard = now
        self._unanswered = 0
        self._hurried = False
        self._deadline = None
        self._next_ping = now + self.interval

    def measured(self, latency: float) -> None:
        """Take note of a ping's round trip, in seconds, and adapt the interval to it."""
        self._latencies.append(latency)
        average = self.latency
        if not self._config.adaptive or average is None:
            return
        if average > _SLOW_LATENCY:
            self.interval = min(self.interval * 2, LONGEST_INTERVAL)
        elif average < _QUICK_LATENCY:
            self.interval = max(self.interval / 2, SHORTEST_INTERVAL)

    def delayed(self, seconds: float) -> None:
        """Take note that the last ping has spent so much of its time behind older bytes, which the other side took.

        A frame of 256 KiB takes 131 s at 16 kbit/s, and the ping behind it cannot be answered sooner. Only the time
        that it waits is given back: on a link that takes everything and answers nothing, that is next to none.
        """
        if self._deadline is not None:
            self._deadline += seconds
            self._next_ping += seconds

    def probe(self, now: float) -> None:
        """Ask at once whether the link still stands, and do not wait long: the machine slept, or its network changed.

        Until something arrives, pings follow one another after `timeout` instead of `interval` where that is shorter.
        """
        self._hurried = True
        if self._unanswered < self._config.max_missed:
            self._next_ping = now

    def timer(self) -> float:
        """Return when `due` has something to say."""
        return self._next_ping if self._deadline is None else min(self._deadline, self._next_ping)

    def due(self, now: float) -> Beat:
        """Return what to do now."""
        if self._deadline is not None and now >= self._deadline and self._unanswered >= self._config.max_missed:
            return Beat.DEAD
        if now >= self._next_ping and self._unanswered < self._config.max_missed:
            self._unanswered += 1
            self._deadline = now + self._config.timeout
            self._next_ping = now + self._pace()
            if self._unanswered == self._config.max_missed:
                self._next_ping = self._deadline
            return Beat.PING
        if self._deadline is not None and now >= self._deadline:
            self._deadline = None  # a miss, counted above; the next ping follows
        return Beat.NOTHING

    def _pace(self) -> float:
        return min(self.interval, self._config.timeout) if self._hurried else self.interval
