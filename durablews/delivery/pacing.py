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

    def allowed(self, now: float, most: int) -> int:
        """Return how many of `most` messages may go now."""
        if self._rate is None:
            return most
        if self._at is not None:
            self._tokens = min(self._capacity, self._tokens + (now - self._at) * self._rate)
        self._at = now
        # A timer that fires a hair early, or a clock too coarse for the rate, must not find 0.9999 tokens and wait for
        # ever shorter times.
        return min(most, int(self._tokens + 1e-6 + 2 * self._rate * math.ulp(now)))

    def spend(self, messages: int) -> None:
        """Count messages that went."""
        if self._rate is not None:
            self._tokens -= messages

    def next_at(self) -> float | None:
        """Return when the next message may go, or None when one may go now or no rate is set."""
        if self._rate is None or self._at is None or self._tokens >= 1:
            return None
        return self._at + (1 - self._tokens) / self._rate
