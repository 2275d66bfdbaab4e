"""How many messages may go now, for an owner who set `rate_limit`."""

from __future__ import annotations

import math

__all__ = ["Pacing"]

# Seconds whose messages may go at once: enough to batch, too little to burst.
_BURST = 0.1


class Pacing:
    """A token bucket of messages; without a rate everything may go."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._capacity = max(1.0, (rate or 0.0) * _BURST)
        self._tokens = self._capacity
        self._at: float | None = None
        self._wish = 1.0

    def allowed(self, now: float, most: int) -> int:
        """Return how many of `most` messages, all that there are to send, may go now.

        Half a burst is gathered first where there is as much to send: a frame for each single message would cost both
        ends a transaction each.
        """
        if self._rate is None or most <= 0:
            return most
        self._wish = min(float(most), max(1.0, self._capacity / 2))
        if self._at is not None:
            self._tokens = min(self._capacity, self._tokens + (now - self._at) * self._rate)
        self._at = now
        # A timer that fires a hair early, or a clock too coarse for the rate, must not find 0.9999 tokens and wait for
        # ever shorter times.
        tokens = self._tokens + 1e-6 + 2 * self._rate * math.ulp(now)
        return min(most, int(tokens)) if tokens >= self._wish else 0

    def spend(self, messages: int) -> None:
        """Count messages that went."""
        if self._rate is not None:
            self._tokens -= messages

    def next_at(self) -> float | None:
        """Return when what `allowed` was asked for last may go, or None when it may go now or no rate is set."""
        if self._rate is None or self._at is None or self._tokens >= self._wish:
            return None
        return self._at + (self._wish - self._tokens) / self._rate
