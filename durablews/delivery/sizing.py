"""How much is sent at a time: what is allowed, or less by powers of two after a server could not cope. Pure."""

from __future__ import annotations

from durablews.messages import Entry, Refusal

__all__ = ["Sizing", "too_large"]


class Sizing:
    """The scale of batches and windows, over connections.

    Args:
        largest_batch: messages, a power of two; after so many halvings a frame holds one.
    """

    def __init__(self, largest_batch: int) -> None:
        self._largest_batch = largest_batch
        self._most = largest_batch.bit_length() - 1
        # A close for size sets a floor that acks do not lower: the limit that it met is still there.
        self._halvings = self._floor = 0
        # Bytes that had been handed out on this connection when the scale last changed.
        self._changed_at = 0

    def begin(self) -> None:
        """Start a connection."""
        self._changed_at = 0

    def scaled(self, amount: int) -> int:
        """Return what is left of an amount of messages or bytes."""
        return amount >> self._halvings

    def answered(self, end: int, handed: int) -> None:
        """Send twice as much again (PROTOCOL.md C9): an ack came in good time.

        Only what was sent at this scale shows whether the link can take it: the acks of many small frames on their way
        would raise it to the top at once, and a slow link would be timed out again.

        Args:
            end: bytes handed out up to and including the frame that was answered.
            handed: bytes handed out by now.
        """
        if self._halvings > self._floor and end > self._changed_at:
            self._halvings -= 1
            self._changed_at = handed

    def timed_out(self) -> None:
        """Send half as much from now on."""
        self._halvings = min(self._halvings + 1, self._most)

    def was_too_much(self, largest: int) -> bool:
        """Send half of what the largest frame in flight held; return whether a frame held one message already."""
        was_single = self._halvings >= self._most
        while self._halvings < self._most:
            self._halvings += 1
            if self._largest_batch >> self._halvings < max(largest, 2):
                break
        self._floor = self._halvings
        return was_single

    def culprit_found(self) -> None:
        """Let acks raise it again to what is allowed."""
        self._floor = 0


def too_large(entry: Entry, needs: int, limit: int) -> Refusal:
    """Say that a message needs a frame of `needs` bytes, alone, and the server takes `limit`."""
    return Refusal(
        "too_large",
        f"its frame of {needs} bytes is over the server's limit of {limit}",
        unknown=entry.transmissions > 0,
        needs=needs,
    )
