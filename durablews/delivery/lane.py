"""One priority on one connection: what was read for it, what is in flight, what holds it back."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from durablews.messages import Entry, Run

__all__ = ["Hold", "InFlight", "Lane", "Transmission", "run_of"]


class Hold(NamedTuple):
    """A nack's delay. It holds `seq` and what is after it, not what is before it, and outlives the connection."""

    seq: int
    until: float


class Transmission:
    """One frame on its way. `progress` is when the socket last took bytes of the frames up to and including it."""

    __slots__ = ("end", "messages", "progress")

    def __init__(self, end: int, messages: int, now: float) -> None:
        self.end = end
        self.messages = messages
        self.progress = now


class InFlight(NamedTuple):
    """An entry that was sent on this connection and not yet answered."""

    entry: Entry
    transmission: Transmission


class Lane:
    """The state of one priority. All of it is forgotten when the connection ends."""

    def __init__(self, priority: int) -> None:
        self.priority = priority
        #: The highest sequence that was read from the outbox.
        self.cursor = 0
        #: Read and not sent.
        self.ready: deque[Entry] = deque()
        #: Sent and not answered, in sequence.
        self.flight: deque[InFlight] = deque()
        #: Sequences whose standing is being written; what follows them waits (PROTOCOL.md C8).
        self.recording: set[int] = set()
        #: `a` of the next frame: the highest sequence sent on this connection that no nack took back.
        self.after: int | None = None
        self.last_ack = 0.0
        self._answered: int | None = None

    def send(self, batch: list[Entry], transmission: Transmission) -> None:
        """Move the first entries of `ready` into flight."""
        for entry in batch:
            self.ready.popleft()
            self.flight.append(InFlight(entry, transmission))
        self.after = batch[-1].seq

    def settle(self, seq: int, now: float) -> list[Entry]:
        """Take everything in flight up to `seq` out of flight, answered."""
        settled: list[Entry] = []
        while self.flight and self.flight[0].entry.seq <= seq:
            settled.append(self.flight.popleft().entry)
        if settled:
            self.last_ack = now
            self._answered = settled[-1].seq
        return settled

    def take_back(self, seq: int) -> list[Entry]:
        """Take `seq` and everything sent after it out of flight, unanswered; nothing when `seq` is not in flight."""
        if all(sent.entry.seq != seq for sent in self.flight):
            return []
        taken: list[Entry] = []
        while self.flight and self.flight[-1].entry.seq >= seq:
            taken.append(self.flight.pop().entry)
        taken.reverse()
        self.after = self.flight[-1].entry.seq if self.flight else self._answered
        return taken

    def rewind(self, seq: int) -> None:
        """Read again from the outbox what comes after `seq`."""
        self.ready.clear()
        self.cursor = seq

    def unread_last(self) -> None:
        """Forget the last entry that was read; it will be read again."""
        self.cursor = self.ready.pop().seq - 1


def run_of(entries: list[Entry]) -> Run:
    """Return entries of one priority that stand together in the queue as the run that settles them."""
    return Run(
        entries[0].priority, entries[0].seq, entries[-1].seq, len(entries), sum(entry.bytes for entry in entries)
    )
