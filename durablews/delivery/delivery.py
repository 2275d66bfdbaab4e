"""The session: windows, order, batches, what an answer settles, and every deadline of PROTOCOL.md section 3."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from durablews.config import DeliveryConfig
from durablews.delivery.actions import (
    Action,
    Close,
    Deliver,
    MarkUnanswered,
    Postpone,
    Refuse,
    RenewStream,
    Requeue,
    SetAside,
    Settle,
    TakeBack,
    Want,
    Welcomed,
)
from durablews.delivery.lane import Hold, Lane, Transmission, run_of
from durablews.delivery.pacing import Pacing
from durablews.delivery.suspicion import Closed, Suspicion, Verdict
from durablews.errors import ProtocolError
from durablews.messages import Entry, Refusal
from durablews.wire.dialect import (
    Acked,
    Answer,
    Farewell,
    Flowed,
    Introduction,
    Nacked,
    Pushed,
    Ready,
    Reply,
    Wire,
)

__all__ = ["BATCH_BYTES", "BATCH_MESSAGES", "Delivery"]

#: One frame carries so many messages or bytes at most: 187 000 to 296 000 messages a second against 35 000 with a frame
#: each (measured).
BATCH_MESSAGES = 256
BATCH_BYTES = 256 * 1024
# What a frame needs beside payload, topic and headers of a message: sequence, meta, punctuation.
_FRAMING = 64

# "A client waits at least 100 ms and at most 1 h" (PROTOCOL.md section 2).
_SHORTEST_RETRY, _LONGEST_RETRY = 0.1, 3600.0
_DEFAULT_RETRY = 5.0
# C5: paused by a window of 0 for so long; bye: the server has not closed after so long.
_LONGEST_PAUSE, _LONGEST_BYE = 300.0, 10.0
# Halvings after which one message goes at a time.
_MOST_HALVINGS = BATCH_MESSAGES.bit_length() - 1


class Delivery:
    """One client's exchange with its server, over as many connections as it takes.

    The shell calls `connected`, then `receive`, `supply`, `taken` and `handle_timer` as things happen, and after each
    call does what `actions` asks, sends what `frame_to_send` gives, reads what is `wanted`, and sets its one timer to
    `timer`.
    """

    def __init__(self, config: DeliveryConfig, *, instance: str) -> None:
        self._config = config
        self._pacing = Pacing(config.rate_limit)
        self._suspicion = Suspicion(instance)
        self._holds: dict[int, Hold] = {}
        self._halvings = 0
        self._actions: list[Action] = []
        #: Answers for what was not in flight: ignored, and counted here (C4).
        self.stray_answers = 0
        self._generation = 0
        self._reset()

    def _reset(self) -> None:
        self._wire: Wire | None = None
        self._lanes: dict[int, Lane] = {}
        self._frames: list[bytes] = []
        self._transmissions: list[Transmission] = []
        self._ready = self._closing = self._rewound = False
        self._bye_by: float | None = None
        self._paused_since: float | None = None
        self._window = 0
        self._max_bytes: int | None = None
        self._messages = self._bytes = self._offset = self._taken = 0
        self._generation += 1
        self._fetching = self._stale = self._stale_above = False
        #: Whether this connection brought an ack.
        self.progressed = False

    # -- the connection

    @property
    def ready(self) -> bool:
        """Whether the server has welcomed this connection."""
        return self._ready

    @property
    def in_flight(self) -> int:
        """How many messages were sent on this connection and not answered."""
        return self._messages

    @property
    def idle(self) -> bool:
        """Whether nothing that was read waits to be sent or answered, and nothing is left to be read."""
        return self._ready and not (
            self._messages
            or self._stale
            or self._fetching
            or any(lane.ready or lane.recording for lane in self._lanes.values())
            or self._holds
        )

    def connected(self, wire: Wire, introduction: Introduction) -> None:
        """Begin a connection: the dialect's first frames go out, messages wait for its welcome."""
        self._reset()
        self._wire = wire
        self._frames.extend(wire.open(introduction))

    def introduce(self, introduction: Introduction) -> None:
        """Say hello again, on the same connection, after `RenewStream` was done."""
        if self._wire is not None and not self._closing:
            self._frames.extend(self._wire.open(introduction))

    def receive(self, data: str | bytes, now: float) -> None:
        """Take one WebSocket message from the server."""
        if self._wire is None or self._closing:
            return
        try:
            answers = self._wire.feed(data)
        except ProtocolError as exc:
            self._close(exc.close_code, str(exc))
            return
        for answer in answers:
            self._answer(answer, now)

    def disconnected(self, closed: Closed, now: float) -> None:
        """End a connection: what was in flight is unanswered and will be sent again."""
        flights = [lane.flight for lane in self._lanes.values() if lane.flight]
        runs = tuple(run_of([sent.entry for sent in flight]) for flight in flights)
        # Transmissions are numbered by the bytes before them: the smallest is the oldest.
        oldest = min((flight[0] for flight in flights), key=lambda sent: sent.transmission.end, default=None)
        entry = oldest.entry if oldest else None
        largest = max((sent.transmission.messages for flight in flights for sent in flight), default=0)
        verdict = self._suspicion.judge(closed, (entry.priority, entry.seq) if entry else None, self._messages, now)
        if runs:
            self._actions.append(MarkUnanswered(runs))
        if verdict is Verdict.SHARED:
            self._actions.append(RenewStream())
        elif verdict is Verdict.SHRINK:
            self._shrink(largest)
        elif entry is not None and verdict in (Verdict.POISON, Verdict.TOO_LARGE):
            reason = closed.reason or f"the server closed with {closed.code} whenever it was sent"
            self._actions.append(Refuse(entry.priority, entry.seq, Refusal(verdict.value, reason, True)))
        self._reset()

    def _shrink(self, largest: int) -> None:
        """Send half as much at a time as the largest frame in flight held; then one message alone."""
        if self._halvings >= _MOST_HALVINGS:
            self._suspicion.alone = True
        while self._halvings < _MOST_HALVINGS:
            self._halvings += 1
            if BATCH_MESSAGES >> self._halvings < max(largest, 2):
                break

    def _close(self, code: int, reason: str) -> None:
        if not self._closing:
            self._closing = True
            self._actions.append(Close(code, reason))

    def actions(self) -> list[Action]:
        """Return what is asked of the shell since the last call, in order."""
        asked, self._actions = self._actions, []
        return asked

    # -- answers

    def _answer(self, answer: Answer, now: float) -> None:
        if isinstance(answer, Acked):
            self._acked(answer, now)
        elif isinstance(answer, Nacked):
            self._nacked(answer, now)
        elif isinstance(answer, Reply):
            self._frames.append(answer.frame)
        elif isinstance(answer, Pushed):
            self._actions.append(Deliver(answer.payload))
        elif isinstance(answer, Flowed):
            self._set_window(answer.window, now)
        elif isinstance(answer, Ready):
            self._welcomed(answer, now)
        elif isinstance(answer, Farewell):
            self._bye_by = now + _LONGEST_BYE
            self._actions.append(Postpone(min(answer.retry, _LONGEST_RETRY)))

    def _welcomed(self, answer: Ready, now: float) -> None:
        if self._ready:
            return
        if answer.rewound:
            if self._rewound:
                self._close(4400, "rewound twice, the second time with a new stream")
                return
            self._rewound = True
            self._actions.append(RenewStream())
            return
        self._ready = self._stale = self._stale_above = True
        self._max_bytes = answer.max_bytes
        self._set_window(self._config.window if answer.window is None else answer.window, now)
        self._actions.append(Welcomed(answer.max_bytes))

    def _set_window(self, window: int, now: float) -> None:
        self._window = min(window, self._config.window)
        self._paused_since = now if window == 0 else None

    def _acked(self, answer: Acked, now: float) -> None:
        lane = self._lanes.get(answer.priority)
        settled = lane.settle(answer.seq, now) if lane else []
        if not settled:
            self.stray_answers += 1
            return
        run = run_of(settled)
        self._messages -= run.messages
        self._bytes -= run.bytes
        self.progressed = True
        self._halvings = max(0, self._halvings - 1)
        self._suspicion.answered(run.priority, run.last)
        self._actions.append(Settle(run))
        if self.idle:
            self._suspicion.forget()

    def _nacked(self, answer: Nacked, now: float) -> None:
        lane = self._lanes.get(answer.priority)
        taken = lane.take_back(answer.seq) if lane else []
        if lane is None or not taken:
            self.stray_answers += 1
            return
        run, first = run_of(taken), taken[0]
        self._messages -= run.messages
        self._bytes -= run.bytes
        self._suspicion.answered(first.priority, first.seq)
        self._actions.append(TakeBack(run))
        attempts = first.nacks + 1
        most = self._config.max_attempts
        if answer.final or (most is not None and attempts >= most):
            reason = answer.reason
            if not answer.final:
                reason = f"the server asked to try again {attempts} times" + (f": {reason}" if reason else "")
            self._pass_over(lane, Refuse(lane.priority, first.seq, Refusal(answer.code, reason)))
            if answer.final:
                return
        delay = min(max(_DEFAULT_RETRY if answer.retry is None else answer.retry, _SHORTEST_RETRY), _LONGEST_RETRY)
        if first.seq in lane.recording:
            self._holds[lane.priority] = Hold(first.seq + 1, now + delay)
        elif self._config.on_retry == "requeue":
            self._pass_over(lane, Requeue(lane.priority, first.seq))
            self._holds[lane.priority] = Hold(first.seq + 1, now + delay)
        else:
            lane.rewind(first.seq - 1)
            self._holds[lane.priority] = Hold(first.seq, now + delay)

    def _pass_over(self, lane: Lane, action: Refuse | Requeue | SetAside) -> None:
        """Go on after an entry once what became of it is on the medium."""
        lane.recording.add(action.seq)
        lane.rewind(action.seq)
        self._actions.append(action)

    def recorded(self, priority: int, seq: int) -> None:
        """Take note that what became of this entry is on the medium."""
        lane = self._lanes.get(priority)
        if lane is not None:
            lane.recording.discard(seq)
        self._stale = True

    # -- entries

    def stored(self) -> None:
        """Take note that the outbox may hold more than was read."""
        self._stale = self._stale_above = self._ready

    def wanted(self, now: float) -> Want | None:
        """Return what to read from the outbox now, or None. The answer goes to `supply`."""
        if not self._sending() or self._fetching or not self._stale:
            return None
        closed = frozenset(
            {lane.priority for lane in self._lanes.values() if lane.recording}
            | {p for p, hold in self._holds.items() if now < hold.until and self._cursor(p) >= hold.seq - 1}
        )
        room = self._config.window + BATCH_MESSAGES - self._messages - self._waiting()
        room_bytes = self._config.window_bytes + BATCH_BYTES - self._bytes - self._waiting_bytes()
        above = -101
        if room <= 0 or room_bytes <= 0:
            # Full of what may go later: look only for what would overtake it.
            if not self._stale_above:
                return None
            above = min((lane.priority for lane in self._lanes.values() if lane.ready), default=-101)
            room, room_bytes = BATCH_MESSAGES, BATCH_BYTES
        self._fetching = True
        after = {priority: lane.cursor for priority, lane in self._lanes.items()}
        return Want(self._generation, after, closed, min(room, 4 * BATCH_MESSAGES), room_bytes, above)

    def supply(self, want: Want, entries: Sequence[Entry], unfit: Iterable[tuple[int, int, str]], now: float) -> None:
        """Take what was read for `want`.

        Args:
            unfit: entries that must not be sent: priority, sequence, why.
        """
        if want.generation != self._generation:
            return
        self._fetching = self._stale_above = False
        unfit = list(unfit)
        size = sum(entry.bytes for entry in entries)
        if len(entries) + len(unfit) < want.limit and size * 2 <= want.max_bytes and want.above == -101:
            self._stale = False
        moved = {
            p
            for p, lane in self._lanes.items()
            if p not in want.closed and (lane.cursor != want.after.get(p, 0) or lane.recording)
        }
        if moved:
            self._stale = True  # a nack came meanwhile
        for entry in entries:
            if entry.priority in moved:
                continue
            lane, hold = self._lane(entry.priority), self._holds.get(entry.priority)
            if hold and now < hold.until and entry.seq >= hold.seq:
                lane.cursor = max(lane.cursor, hold.seq - 1)  # all that may go before the delay ends was read
                continue
            lane.ready.append(entry)
            lane.cursor = entry.seq
        for priority, seq, fault in unfit:
            if priority not in moved:
                lane = self._lane(priority)
                lane.recording.add(seq)
                self._actions.append(Refuse(priority, seq, Refusal(fault, _FAULTS.get(fault))))
        self._trim()

    def _trim(self) -> None:
        """Forget what was read last for the lowest priority until it fits the bounds again."""
        most = self._config.window + 2 * BATCH_MESSAGES
        while self._waiting() > most:
            lowest = min((lane for lane in self._lanes.values() if lane.ready), key=lambda lane: lane.priority)
            lowest.unread_last()
            self._stale = True

    def _lane(self, priority: int) -> Lane:
        if priority not in self._lanes:
            self._lanes[priority] = Lane(priority)
        return self._lanes[priority]

    def _cursor(self, priority: int) -> int:
        lane = self._lanes.get(priority)
        return lane.cursor if lane else 0

    def _waiting(self) -> int:
        return sum(len(lane.ready) for lane in self._lanes.values())

    def _waiting_bytes(self) -> int:
        return sum(entry.bytes for lane in self._lanes.values() for entry in lane.ready)

    # -- frames

    def _sending(self) -> bool:
        return self._ready and not self._closing and self._bye_by is None

    def frame_to_send(self, now: float) -> bytes | None:
        """Return the next frame for the server, or None when there is none now."""
        frame = self._frames.pop(0) if self._frames else self._next_messages(now)
        if frame is not None:
            self._offset += len(frame)
        return frame

    def _next_messages(self, now: float) -> bytes | None:
        assert self._wire is not None or not self._sending()
        while self._sending() and self._wire is not None:
            lane = self._next_lane(now)
            batch = self._batch(lane, now) if lane else []
            if lane is None or not batch:
                return None
            frame = self._wire.encode(lane.priority, lane.after, batch)
            while self._max_bytes is not None and len(frame) > self._max_bytes and len(batch) > 1:
                del batch[(len(batch) + 1) // 2 :]
                frame = self._wire.encode(lane.priority, lane.after, batch)
            if self._max_bytes is not None and len(frame) > self._max_bytes:
                refusal = Refusal(
                    "too_large",
                    f"its frame of {len(frame)} bytes is over the server's limit of {self._max_bytes}",
                    unknown=batch[0].transmissions > 0,
                    needs=len(frame),
                )
                self._pass_over(lane, SetAside(lane.priority, batch[0].seq, refusal))
                continue
            transmission = Transmission(self._offset + len(frame), len(batch), now)
            self._transmissions.append(transmission)
            lane.send(batch, transmission)
            self._messages += len(batch)
            self._bytes += sum(entry.bytes for entry in batch)
            self._pacing.spend(len(batch))
            return frame
        return None

    def _next_lane(self, now: float) -> Lane | None:
        """Return the highest priority that has something to send."""
        for priority in sorted(self._lanes, reverse=True):
            lane = self._lanes[priority]
            if not lane.ready or lane.recording:
                continue
            hold = self._holds.get(priority)
            if hold is not None and now < hold.until and lane.ready[0].seq >= hold.seq:
                continue
            return lane
        return None

    def _batch(self, lane: Lane, now: float) -> list[Entry]:
        """Return the first entries of a lane that may go in one frame now."""
        window = max(1, self._window >> self._halvings) if self._window else 0
        if self._suspicion.alone:
            window = min(window, 1)
        free = window - self._messages
        lowest = min((p for p, other in self._lanes.items() if other.flight), default=lane.priority)
        if window > 1 and lane.priority <= lowest:
            free -= 1  # a place for what is more urgent (C5)
        most = self._pacing.allowed(now, min(free, max(1, BATCH_MESSAGES >> self._halvings)))
        room = (self._config.window_bytes >> self._halvings) - self._bytes
        frame_room = BATCH_BYTES >> self._halvings
        if self._max_bytes is not None:
            frame_room = min(frame_room, self._max_bytes)
        batch: list[Entry] = []
        for entry in lane.ready:
            if len(batch) >= most:
                break
            hold = self._holds.get(lane.priority)
            if hold is not None and now < hold.until and entry.seq >= hold.seq:
                break
            room -= entry.bytes
            frame_room -= entry.bytes + _FRAMING
            if batch and frame_room < 0:
                break
            if room < 0 and (batch or self._messages):
                break  # with nothing in flight one goes whatever its size
            batch.append(entry)
        return batch

    def taken(self, total: int, now: float) -> None:
        """Take note that the socket has taken `total` bytes of this connection's frames (C9)."""
        if total <= self._taken:
            return
        self._taken = total
        for transmission in self._transmissions:
            transmission.progress = now
            transmission.taken = transmission.end <= total
        self._transmissions = [t for t in self._transmissions if not t.taken]

    @property
    def untaken(self) -> bool:
        """Whether the socket has frames of messages still to take: the shell then reports `taken` before its timers."""
        return bool(self._transmissions)

    # -- timers

    def timer(self, now: float) -> float | None:
        """Return when `handle_timer` should be called next, or None."""
        times = [hold.until for hold in self._holds.values()]
        if self._wire is None or self._closing:
            return None
        times.extend(self._ack_deadline(lane) for lane in self._lanes.values() if lane.flight)
        if self._bye_by is not None:
            times.append(self._bye_by)
        if self._paused_since is not None and self._waiting() and not self._messages:
            times.append(self._paused_since + _LONGEST_PAUSE)
        paced = self._pacing.next_at()
        if paced is not None and self._waiting() and self._sending():
            times.append(paced)
        return max(now, min(times)) if times else None

    def _ack_deadline(self, lane: Lane) -> float:
        oldest = lane.flight[0].transmission
        return max(lane.last_ack, oldest.progress) + self._config.ack_timeout

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        for priority, hold in list(self._holds.items()):
            if now >= hold.until:
                del self._holds[priority]
                self._stale = self._stale or self._ready
        if self._wire is None or self._closing:
            return
        if any(lane.flight and now >= self._ack_deadline(lane) for lane in self._lanes.values()):
            self._halvings = min(self._halvings + 1, _MOST_HALVINGS)
            self._close(4408, f"no ack for {self._config.ack_timeout:g} s")
        elif self._bye_by is not None and now >= self._bye_by:
            self._close(1000, "bye")
        elif (
            self._paused_since is not None
            and self._waiting()
            and not self._messages
            and now >= self._paused_since + _LONGEST_PAUSE
        ):
            self._close(4408, "paused for 5 minutes with messages to send")


_FAULTS = {
    "not_utf8": "its text is not UTF-8",
    "damaged": "its payload does not match its checksum: the file was damaged",
}
