"""What was read from the outbox for one connection, and what may be sent of it now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from operator import attrgetter

from durablews.config import DeliveryConfig
from durablews.delivery.actions import Refuse, Requeue, SetAside, Want
from durablews.delivery.lane import Hold, Lane, Transmission
from durablews.messages import Entry, Refusal, Run

__all__ = ["BATCH_BYTES", "BATCH_MESSAGES", "READ_AHEAD_BYTES", "READ_AHEAD_MESSAGES", "Backlog"]

#: One frame carries so many messages or bytes at most: 187 000 to 296 000 messages a second against 35 000 with a frame
#: each (measured).
BATCH_MESSAGES = 256
BATCH_BYTES = 256 * 1024
#: So much is read ahead of the window, a page at a time: while one page is read, the others are sent.
READ_AHEAD_MESSAGES, READ_AHEAD_BYTES = 16 * BATCH_MESSAGES, 8 * BATCH_BYTES
_PAGE_MESSAGES, _PAGE_BYTES = 8 * BATCH_MESSAGES, 4 * BATCH_BYTES
# What a frame needs beside payload, topic and headers of a message: sequence, meta, punctuation.
_FRAMING = 64

_PRIORITY = attrgetter("priority")

_FAULTS = {
    "not_utf8": "its text is not UTF-8",
    "damaged": "its payload does not match its checksum: the file was damaged",
}


class Backlog:
    """The lanes of one client. Memory is bounded by the window, whatever waits in the outbox (P6).

    Args:
        config: windows, in messages and bytes.
    """

    def __init__(self, config: DeliveryConfig) -> None:
        self._config = config
        self._holds: dict[int, Hold] = {}
        self._generation = 0
        self.reset()

    def reset(self) -> None:
        """Forget what belonged to a connection; the delays that servers asked for go on."""
        self._generation += 1
        self._reading = self._stale = self._stale_above = False
        self.lanes: dict[int, Lane] = {}
        #: In flight: messages and bytes.
        self.messages = self.bytes = 0

    @property
    def waiting(self) -> int:
        """How many entries were read and not sent."""
        return sum(len(lane.ready) for lane in self.lanes.values())

    @property
    def waiting_bytes(self) -> int:
        """And their bytes."""
        return sum(lane.ready_bytes for lane in self.lanes.values())

    @property
    def idle(self) -> bool:
        """Whether nothing is left to be read, sent, answered or written down."""
        busy = self.messages or self._stale or self._reading or self._holds
        return not busy and not any(lane.ready or lane.recording for lane in self.lanes.values())

    # -- reading

    def stored(self) -> None:
        """Take note that the outbox may hold more than was read."""
        self._stale = self._stale_above = True

    def append(self, entries: Sequence[Entry]) -> bool:
        """Take entries that were stored just now as if they had been read; False when they must be read like others.

        When nothing is left to be read before them, a look into the outbox could find nothing else.
        """
        size = sum([entry.bytes for entry in entries])
        room = self.waiting + len(entries) <= READ_AHEAD_MESSAGES and self.waiting_bytes + size <= READ_AHEAD_BYTES
        if self._stale or self._reading or not room:
            return False
        by_priority = [list(group) for _, group in groupby(sorted(entries, key=_PRIORITY), key=_PRIORITY)]
        lanes = [self._lane(group[0].priority) for group in by_priority]
        for lane, group in zip(lanes, by_priority, strict=True):
            # What is held back, or waits for a record, was not read.
            if lane.recording or lane.priority in self._holds or group[0].seq <= lane.cursor:
                return False
        for lane, group in zip(lanes, by_priority, strict=True):
            lane.read(group)
        return True

    def wanted(self, now: float) -> Want | None:
        """Return what to read from the outbox now, or None. The answer goes to `supply`."""
        if self._reading or not self._stale:
            return None
        room, room_bytes = READ_AHEAD_MESSAGES - self.waiting, READ_AHEAD_BYTES - self.waiting_bytes
        above = -101
        if room < _PAGE_MESSAGES or room_bytes < _PAGE_BYTES:
            # Full of what may go later: look only for what would overtake it.
            if not self._stale_above:
                return None
            above = min((lane.priority for lane in self.lanes.values() if lane.ready), default=-101)
        # Cleared before the read: what is stored, recorded or released while it runs asks for another one.
        self._reading, self._stale, self._stale_above = True, above != -101, False
        after = {priority: lane.cursor for priority, lane in self.lanes.items()}
        return Want(self._generation, after, self._closed(now), _PAGE_MESSAGES, _PAGE_BYTES, above)

    def _closed(self, now: float) -> frozenset[int]:
        """Return the priorities of which nothing more may go just now."""
        recording = {lane.priority for lane in self.lanes.values() if lane.recording}
        held = {
            priority
            for priority, hold in self._holds.items()
            if now < hold.until and priority in self.lanes and self.lanes[priority].cursor >= hold.seq - 1
        }
        return frozenset(recording | held)

    def supply(
        self, want: Want, entries: Sequence[Entry], unfit: Iterable[tuple[int, int, str]], now: float
    ) -> list[Refuse]:
        """Take what was read for `want`, and return what is to be made a dead letter.

        Args:
            unfit: entries that must not be sent: priority, sequence, why.
        """
        if want.generation != self._generation:
            return []
        self._reading = False
        unfit = list(unfit)
        if entries or unfit:
            self._stale = True  # a read gives at least one entry of whatever waits: only an empty one shows the end
        moved = {
            priority
            for priority, lane in self.lanes.items()
            if priority not in want.closed and (lane.cursor != want.after.get(priority, 0) or lane.recording)
        }
        if moved:
            self._stale = True  # a nack came meanwhile
        for priority, group in groupby(entries, key=_PRIORITY):
            if priority not in moved:
                self._take(priority, list(group), now)
        refusals: list[Refuse] = []
        for priority, seq, fault in unfit:
            if priority not in moved:
                self._lane(priority).recording.add(seq)
                refusals.append(Refuse(priority, seq, Refusal(fault, _FAULTS.get(fault))))
        self._trim(want.above)
        return refusals

    def _take(self, priority: int, entries: list[Entry], now: float) -> None:
        lane, hold = self._lane(priority), self._holds.get(priority)
        if hold is not None and now < hold.until and entries[-1].seq >= hold.seq:
            free = [entry for entry in entries if entry.seq < hold.seq]
            if free:
                lane.read(free)
            lane.cursor = max(lane.cursor, hold.seq - 1)  # all that may go before the delay ends was read
        else:
            lane.read(entries)

    def _trim(self, above: int) -> None:
        """Forget what was read last for the lowest priority until it fits the bounds again.

        For bytes only what priorities above `above` have just overtaken: a page by itself fits, or is one message.
        """
        most = READ_AHEAD_MESSAGES + BATCH_MESSAGES
        while waiting := [lane for lane in self.lanes.values() if lane.ready]:
            lowest = min(waiting, key=lambda lane: lane.priority)
            too_large = sum(lane.ready_bytes for lane in waiting) > READ_AHEAD_BYTES + BATCH_BYTES
            if self.waiting <= most and not (too_large and lowest.priority <= above):
                return
            lowest.unread_last()
            self._stale = True

    def unread(self) -> bool:
        """Forget what was read and not sent, so that a policy may take it; return whether there was any."""
        unread = [lane for lane in self.lanes.values() if lane.ready]
        for lane in unread:
            lane.rewind(lane.ready[0].seq - 1)
        if unread or self._reading:
            self._generation += 1  # what is being read just now comes too late
            self._reading = False
            self.stored()
        return bool(unread)

    def claims(self) -> dict[int, tuple[int, int]]:
        """Return what is in flight or about to be, which no policy may take: priority -> first and last sequence."""
        return {lane.priority: (0, lane.cursor) for lane in self.lanes.values() if lane.flight or lane.ready}

    def _lane(self, priority: int) -> Lane:
        if priority not in self.lanes:
            self.lanes[priority] = Lane(priority)
        return self.lanes[priority]

    # -- sending

    def next_lane(self, now: float) -> Lane | None:
        """Return the highest priority that has something to send."""
        for priority in sorted(self.lanes, reverse=True):
            lane = self.lanes[priority]
            if lane.ready and not lane.recording and not self._held(lane.ready[0], now):
                return lane
        return None

    def batch(self, lane: Lane, now: float, *, most: int, room: int, frame_room: int) -> list[Entry]:
        """Return the first entries of a lane that fit.

        Args:
            most: messages.
            room: bytes that the window has left; with nothing in flight one message goes all the same.
            frame_room: bytes of the frame; one message goes all the same.
        """
        hold = self._holds.get(lane.priority)
        held_from = hold.seq if hold is not None and now < hold.until else None
        candidates = list(islice(lane.ready, max(0, most)))
        size = sum([entry.bytes for entry in candidates])
        if held_from is None and size <= room and size + _FRAMING * len(candidates) <= frame_room:
            return candidates  # as nearly always: all of them fit
        batch: list[Entry] = []
        for entry in candidates:
            room -= entry.bytes
            frame_room -= entry.bytes + _FRAMING
            if room < 0 or frame_room < 0:
                if batch or (room < 0 and self.messages):
                    break
            if held_from is not None and entry.seq >= held_from:
                break
            batch.append(entry)
        return batch

    def places(self, lane: Lane, window: int) -> int:
        """Return how many messages of a lane the window has place for; one is kept for what is more urgent (C5)."""
        lowest = min((priority for priority, other in self.lanes.items() if other.flight), default=lane.priority)
        reserved = 1 if window > 1 and lane.priority <= lowest else 0
        return window - self.messages - reserved

    def sent(self, lane: Lane, transmission: Transmission) -> None:
        """Move a batch into flight."""
        before = lane.ready_bytes
        lane.send(transmission)
        self.messages += len(transmission.entries)
        self.bytes += before - lane.ready_bytes

    def landed(self, run: Run) -> None:
        """Take note that these are no longer in flight."""
        self.messages -= run.messages
        self.bytes -= run.bytes

    # -- what holds a lane back

    def hold(self, priority: int, seq: int, until: float) -> None:
        """Let `seq` and what is after it wait until then."""
        self._holds[priority] = Hold(seq, until)

    def _held(self, entry: Entry, now: float) -> bool:
        hold = self._holds.get(entry.priority)
        return hold is not None and now < hold.until and entry.seq >= hold.seq

    def release(self, now: float) -> None:
        """End the delays that are over."""
        for priority, hold in list(self._holds.items()):
            if now >= hold.until:
                del self._holds[priority]
                self.stored()  # it may be more urgent than all that was read

    def hold_timers(self) -> list[float]:
        """Return when delays end."""
        return [hold.until for hold in self._holds.values()]

    def pass_over(self, lane: Lane, action: Refuse | Requeue | SetAside) -> None:
        """Go on after an entry only once what became of it is on the medium (PROTOCOL.md C8)."""
        lane.recording.add(action.seq)
        lane.rewind(action.seq)

    def recorded(self, priority: int, seq: int) -> None:
        """Take note that what became of this entry is on the medium."""
        if priority in self.lanes:
            self.lanes[priority].recording.discard(seq)
        self.stored()
