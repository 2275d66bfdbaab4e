"""When to ping, and when silence means that the link is dead. Pure."""

from __future__ import annotations

from enum import Enum

from durablews.config import HeartbeatConfig

__all__ = ["Beat", "Heartbeat"]


class Beat(Enum):
    """What is due."""

    NOTHING = "nothing"
    PING = "ping"
    DEAD = "dead"


class Heartbeat:
    """The heartbeat of one connection: a ping after `interval` seconds of silence, and again after each further one.

    Anything that arrives counts as alive. A link whose packets vanish is found ``interval * max_missed + timeout``
    seconds after the last of them: 100 s with the defaults.
    """

    def __init__(self, config: HeartbeatConfig, now: float) -> None:
        self._config = config
        self._unanswered = 0
        self._deadline: float | None = None
        self._next_ping = now + config.interval

    def received(self, now: float) -> None:
        """Take note that something arrived."""
        self._unanswered = 0
        self._deadline = None
        self._next_ping = now + self._config.interval

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
            self._next_ping = now + self._config.interval
            if self._unanswered == self._config.max_missed:
                self._next_ping = self._deadline
            return Beat.PING
        if self._deadline is not None and now >= self._deadline:
            self._deadline = None  # a miss, counted above; the next ping follows
        return Beat.NOTHING
