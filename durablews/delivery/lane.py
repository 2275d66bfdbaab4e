"""One priority on one connection: what was read for it, what is in flight, what holds it back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from durablews.messages import Entry, Run

__all__ = ["Hold", "Lane", "Transmission", "run_of"]


class Hold(NamedTuple):
    """A nack's delay. It holds `seq` and what is after it, not what is before it, and outlives the connection."""

    seq: int
    until: float


class Transmission:
    """One frame on its way: its entries that are not answered yet.

    `end` is the number of bytes handed out up to and including it, `sent_at` when it was, `progress` when the socket
    last took some of those.
    """

    __slots__ = ("end", "entries", "progress", "sent_at")

    def __init__(self, entries: list[Entry], end: int, now: float) -> None:
        self.entries = entries
        self.end = end
        self.sent_at = self.progress = now


class Lane:
    """The state of one priority. All of it is forgotten when the connection ends."""

    def __init__(self, priority: int) -> None:
        self.priority = priority
        #: The highest sequence that was read from the outbox.
        self.cursor = 0
        #: Read and not sent, and its bytes.
        self.ready: deque[Entry] = deque()
        self.ready_bytes = 0
        #: Sent and not answered, in sequence.
        self.flight: deque[Transmission] = deque()
        #: Sequences whose standing is being written; what follows them waits (PROTOCOL.md C8).
        self.recording: set[int] = set()
        #: `a` of the next frame: the highest sequence sent on this connection that no nack took back.
        self.after: int | None = None
        self.last_ack = 0.0
        self._answered: int | None = None

    @property
    def oldest(self) -> Entry:
        """The entry that is unanswered for longest; only asked while something is in flight."""
        return self.flight[0].entries[0]

    def in_flight(self) -> list[Entry]:
        """Return everything that was sent and not answered."""
        return [entry for transmission in self.flight for entry in transmission.entries]

    def read(self, entries: Sequence[Entry]) -> None:
        """Append what was read from the outbox."""
        self.ready.extend(entries)
        self.ready_bytes += sum([entry.bytes for entry in entries])
        self.cursor = entries[-1].seq

    def send(self, transmission: Transmission) -> None:
        """Move the first entries of `ready` into flight."""
        popleft = self.ready.popleft
        self.ready_bytes -= sum([popleft().bytes for _ in transmission.entries])
        self.flight.append(transmission)
        self.after = transmission.entries[-1].seq

    def settle(self, seq: int, now: float) -> Run | None:
        """Take everything in flight up to `seq` out of flight, answered; None when there was nothing."""
        settled: list[Entry] = []
        while self.flight and self.oldest.seq <= seq:
            entries = self.flight[0].entries
            if entries[-1].seq <= seq:
                settled += entries
                self.flight.popleft()
            else:
                answered = sum(entry.seq <= seq for entry in entries)
                settled += entries[:answered]
                del entries[:answered]
        if not settled:
            return None
        self.last_ack = now
        self._answered = settled[-1].seq
        return run_of(settled)

    def take_back(self, seq: int) -> list[Entry]:
        """Take `seq` and everything sent after it out of flight, unanswered; nothing when `seq` is not in flight."""
        if all(entry.seq != seq for transmission in self.flight for entry in transmission.entries):
            return []
        taken: list[Entry] = []
        while self.flight and self.flight[-1].entries[-1].seq >= seq:
            entries = self.flight[-1].entries
            kept = sum(entry.seq < seq for entry in entries)
            taken[:0] = entries[kept:]
            del entries[kept:]
            if not entries:
                self.flight.pop()
        self.after = self.flight[-1].entries[-1].seq if self.flight else self._answered
        return taken

    def rewind(self, seq: int) -> None:
        """Read again from the outbox what comes after `seq`."""
        self.ready.clear()
        self.ready_bytes = 0
        self.cursor = seq

    def unread_last(self) -> None:
        """Forget the last entry that was read; it will be read again."""
        last = self.ready.pop()
        self.ready_bytes -= last.bytes
        self.cursor = last.seq - 1


def run_of(entries: list[Entry]) -> Run:
    """Return entries of one priority that stand together in the queue as the run that settles them."""
    size = sum([entry.bytes for entry in entries])
    return Run(entries[0].priority, entries[0].seq, entries[-1].seq, len(entries), size)
