"""The session: windows, order, batches, what an answer settles, and every deadline of PROTOCOL.md section 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from durablews.config import DeliveryConfig
from durablews.delivery.actions import (
    Action,
    Close,
    Deliver,
    Echoed,
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
from durablews.delivery.backlog import BATCH_BYTES, BATCH_MESSAGES, Backlog
from durablews.delivery.deadlines import LONGEST_RETRY, Deadlines, retry_delay
from durablews.delivery.lane import Lane, Transmission, run_of
from durablews.delivery.pacing import Pacing
from durablews.delivery.sizing import Sizing, too_large
from durablews.delivery.suspicion import Closed, Suspicion, Verdict
from durablews.delivery.transit import Transit
from durablews.errors import ProtocolError
from durablews.messages import Entry, Refusal, Run
from durablews.wire.dialect import (
    Acked,
    Answer,
    Farewell,
    Flowed,
    Introduction,
    Nacked,
    Ponged,
    Pushed,
    Ready,
    Reply,
    Wire,
)

__all__ = ["Delivery"]

# So many frames of the dialect's own may wait for a socket that takes none: memory is bounded (P6).
_MOST_REPLIES = 100
_NO_LIMIT = 2**62


class Delivery:
    """One client's exchange with its server, over as many connections as it takes.

    The shell calls `connected`, then `receive`, `supply`, `taken` and `handle_timer` as things happen, and after each
    call does what `actions` asks, sends what `frame_to_send` gives, reads what is `wanted`, and sets its one timer to
    `timer`.

    Args:
        config: windows, timeouts, policies.
        instance: this process's id, as its hello says it.
    """

    def __init__(self, config: DeliveryConfig, *, instance: str) -> None:
        self._config = config
        self._backlog = Backlog(config)
        self._pacing = Pacing(config.rate_limit)
        self._suspicion = Suspicion(instance)
        self._sizing = Sizing(BATCH_MESSAGES)
        self._transit = Transit(config.ack_timeout)
        self._actions: list[Action] = []
        #: Answers for what was not in flight: ignored, and counted here (C4).
        self.stray_answers = 0
        self._reset()

    def _reset(self) -> None:
        self._backlog.reset()
        self._sizing.begin()
        self._transit.begin()
        self._wire: Wire | None = None
        self._discreet: Callable[[str], str] = str
        self._frames: list[bytes] = []
        self._ready = self._closing = self._rewound = False
        self._deadlines = Deadlines(self._config.ack_timeout)
        self._window = self._astray = 0
        self._max_bytes = _NO_LIMIT
        #: Whether nothing but `rate_limit` kept messages back when `frame_to_send` looked last.
        self._is_paced = False
        #: Whether this connection brought an ack.
        self.progressed = False
        # The messages of the frame that `frame_to_send` gave last.
        self._sent: list[Entry] = []

    # -- the connection

    @property
    def ready(self) -> bool:
        """Whether the server has welcomed this connection."""
        return self._ready

    @property
    def in_flight(self) -> int:
        """How many messages were sent on this connection and not answered."""
        return self._backlog.messages

    @property
    def idle(self) -> bool:
        """Whether nothing that was read waits to be sent or answered, and nothing is left to be read."""
        return self._ready and self._backlog.idle

    def connected(self, wire: Wire, introduction: Introduction, discreet: Callable[[str], str] = str) -> None:
        """Begin a connection: the dialect's first frames go out, messages wait for its welcome.

        `discreet` takes out of the server's words what must be written nowhere, such as the token that it was shown.
        """
        self._reset()
        self._wire = wire
        self._discreet = discreet
        self._frames.extend(wire.open(introduction))

    def introduce(self, introduction: Introduction) -> None:
        """Say hello again, on the same connection, after `RenewStream` was done."""
        if self._wire is not None and not self._closing:
            self._frames.extend(self._wire.open(introduction))

    def ping(self, number: int) -> bool:
        """Send a ping of the dialect's own next; return False where it has none, or before the welcome."""
        frame = self._wire.ping(number) if self._wire is not None and self._ready and not self._closing else None
        if frame is not None:
            self._frames.append(frame)
        return frame is not None

    def retire(self) -> None:
        """Send nothing more on this connection, and leave it when all that is in flight is answered."""
        self._deadlines.retire()

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
        lanes = [lane for lane in self._backlog.lanes.values() if lane.flight]
        runs = tuple(run_of(lane.in_flight()) for lane in lanes)
        # The frame that ends at the fewest bytes was sent first.
        first = min(lanes, key=lambda lane: lane.flight[0].end, default=None)
        entry = first.oldest if first else None
        largest = max((len(transmission.entries) for lane in lanes for transmission in lane.flight), default=0)
        # What a nack took back from behind the nacked one may still lie unread at the server, and be why it closes.
        unread = self._backlog.messages + self._astray
        verdict = self._suspicion.judge(
            closed,
            (entry.priority, entry.seq) if entry else None,
            unread,
            now,
            last={run.priority: run.last for run in runs},
        )
        if runs:
            self._actions.append(MarkUnanswered(runs))
        if verdict is Verdict.SHARED:
            self._actions.append(RenewStream())
        elif verdict is Verdict.SHRINK:
            self._suspicion.alone |= self._sizing.was_too_much(largest)
        elif entry is not None and verdict in (Verdict.POISON, Verdict.TOO_LARGE):
            self._sizing.culprit_found()
            reason = closed.reason or f"the server closed with {closed.code} whenever it was sent"
            self._actions.append(Refuse(entry.priority, entry.seq, Refusal(verdict.value, reason, True)))
        self._reset()

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
            if len(self._frames) > _MOST_REPLIES:
                self._close(4408, "the server asks and asks, and does not read the answers")
        elif isinstance(answer, Pushed):
            self._actions.append(Deliver(answer.payload))
        elif isinstance(answer, Ponged):
            self._actions.append(Echoed(answer.number))
        elif isinstance(answer, Flowed):
            self._window = min(answer.window, self._config.window)
        elif isinstance(answer, Ready):
            self._welcomed(answer)
        elif isinstance(answer, Farewell):
            self._deadlines.bye(now)
            self._actions.append(Postpone(min(answer.retry, LONGEST_RETRY)))

    def _welcomed(self, answer: Ready) -> None:
        if self._ready:
            return
        if answer.rewound:
            if self._rewound:
                self._close(4400, "rewound twice, the second time with a new stream")
            else:
                self._rewound = True
                self._actions.append(RenewStream())
            return
        self._ready = True
        self._backlog.stored()
        self._max_bytes = _NO_LIMIT if answer.max_bytes is None else answer.max_bytes
        self._window = self._config.window if answer.window is None else min(answer.window, self._config.window)
        self._actions.append(Welcomed(answer.max_bytes))

    def _acked(self, answer: Acked, now: float) -> None:
        lane = self._backlog.lanes.get(answer.priority)
        oldest = lane.flight[0] if lane and lane.flight else None
        # Not from the last byte taken, as the deadline is counted: a proxy may have taken it, and keep it.
        waited = now - max(lane.last_ack, oldest.sent_at) if lane and oldest else 0.0
        if oldest is not None and answer.seq >= oldest.entries[0].seq:
            self.taken(oldest.end, now)
        run = lane.settle(answer.seq, now) if lane else None
        if run is None:
            self.stray_answers += 1
            return
        self._backlog.landed(run)
        self.progressed = True
        if oldest is not None and waited < self._config.ack_timeout / 2:  # twice as much will not be late either
            self._sizing.answered(oldest.end, self._transit.handed)
        self._suspicion.answered(run.priority, run.last)
        self._actions.append(Settle(run))
        if self.idle:
            self._suspicion.forget()

    def _nacked(self, answer: Nacked, now: float) -> None:
        lane = self._backlog.lanes.get(answer.priority)
        taken = lane.take_back(answer.seq) if lane else []
        if lane is None or not taken:
            self.stray_answers += 1
            return
        run, first = run_of(taken), taken[0]
        self._astray += len(taken) - 1
        self._backlog.landed(run)
        self._suspicion.answered(first.priority, first.seq)
        self._actions.append(TakeBack(run))
        code, said = self._discreet(answer.code), answer.reason and self._discreet(answer.reason)
        if answer.final:
            self._pass_over(lane, Refuse(lane.priority, first.seq, Refusal(code, said), nacked=True))
            return
        until = now + retry_delay(answer.retry)
        attempts = first.nacks + 1
        if self._config.max_attempts is not None and attempts >= self._config.max_attempts:
            reason = f"the server asked {attempts} times to try again{f': {said}' if said else ''}"
            self._pass_over(lane, Refuse(lane.priority, first.seq, Refusal(code, reason), nacked=True))
        elif self._config.on_retry == "requeue":
            self._pass_over(lane, Requeue(lane.priority, first.seq))
        else:
            lane.rewind(first.seq - 1)
            self._backlog.hold(lane.priority, first.seq, until)
            return
        self._backlog.hold(lane.priority, first.seq + 1, until)

    def _pass_over(self, lane: Lane, action: Refuse | Requeue | SetAside) -> None:
        self._backlog.pass_over(lane, action)
        self._actions.append(action)

    def recorded(self, priority: int, seq: int) -> None:
        """Take note that what became of this entry is on the medium."""
        self._backlog.recorded(priority, seq)

    # -- entries

    def stored(self, entries: Sequence[Entry] = ()) -> None:
        """Take note that the outbox may hold more than was read: `entries`, if they were stored here just now."""
        if not (entries and self._ready and self._backlog.append(entries)):
            self._backlog.stored()

    def unread(self) -> bool:
        """Forget what was read and not sent, so that a policy may take it; return whether there was any."""
        return self._backlog.unread()

    def claims(self) -> dict[int, tuple[int, int]]:
        """Return what no policy of the owner may take now: priority -> first and last sequence."""
        return self._backlog.claims()

    def wanted(self, now: float) -> Want | None:
        """Return what to read from the outbox now, or None. The answer goes to `supply`."""
        return self._backlog.wanted(now) if self._sending() else None

    def supply(self, want: Want, entries: Sequence[Entry], unfit: Iterable[tuple[int, int, str]], now: float) -> None:
        """Take what was read for `want`.

        Args:
            unfit: entries that must not be sent: priority, sequence, why.
        """
        self._actions.extend(self._backlog.supply(want, entries, unfit, now))

    # -- frames

    def _sending(self) -> bool:
        return self._ready and not self._closing and not self._deadlines.leaving

    def frame_to_send(self, now: float) -> bytes | None:
        """Return the next frame for the server, or None when there is none now."""
        self._sent = []
        if (frame := self._frames.pop(0) if self._frames else self._next_messages(now)) is not None:
            self._transit.hand(len(frame), now)
        return frame

    @property
    def sent(self) -> Run | None:
        """The run of the frame that `frame_to_send` gave just now; None when it held no messages."""
        return run_of(self._sent) if self._sent else None

    def _next_messages(self, now: float) -> bytes | None:
        self._is_paced = False
        while self._sending() and self._wire is not None and not self._transit.is_full:
            lane = self._backlog.next_lane(now)
            batch = self._batch(lane, now) if lane else []
            if lane is None or not batch:
                return None
            limit = self._max_bytes
            while len(frame := self._wire.encode(lane.priority, lane.after, batch)) > limit and len(batch) > 1:
                del batch[(len(batch) + 1) // 2 :]
            if len(frame) > limit:
                self._pass_over(lane, SetAside(lane.priority, batch[0].seq, too_large(batch[0], len(frame), limit)))
                continue
            transmission = Transmission(batch, self._transit.handed + len(frame), now)
            self._transit.track(transmission)
            self._backlog.sent(lane, transmission)
            self._sent = batch
            self._pacing.spend(len(batch))
            return frame
        return None

    def _batch(self, lane: Lane, now: float) -> list[Entry]:
        """Return the first entries of a lane that may go in one frame now."""
        scaled = self._sizing.scaled
        window = max(1, scaled(self._window)) if self._window else 0
        if self._suspicion.alone:
            window = min(window, 1)
        most = min(self._backlog.places(lane, window), scaled(BATCH_MESSAGES), len(lane.ready))
        allowed = self._pacing.allowed(now, most)
        self._is_paced = allowed < 1 <= most
        frame_room = min(scaled(BATCH_BYTES), self._transit.frame, self._max_bytes)
        room = scaled(self._config.window_bytes) - self._backlog.bytes
        return self._backlog.batch(lane, now, most=allowed, room=room, frame_room=frame_room)

    def taken(self, total: int, now: float) -> None:
        """Take note that the other end, or at least the socket, has taken `total` bytes (C9). More may be sent then."""
        self._transit.take(total, now)

    @property
    def untaken(self) -> bool:
        """Whether the socket has frames of messages still to take: the shell then reports `taken` before its timers."""
        return self._transit.untaken

    # -- timers

    def timer(self, now: float) -> float | None:
        """Return when `handle_timer` should be called next, or None."""
        if self._wire is None or self._closing:
            return None
        times = self._backlog.hold_timers()
        self._deadlines.pausing(now, self._is_pausing())
        times.extend(self._deadlines.timers(self._backlog.lanes.values()))
        paced = self._pacing.next_at() if self._is_paced else None
        if paced is not None and self._sending() and self._backlog.waiting:
            times.append(paced)
        return max(now, min(times)) if times else None

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        self._backlog.release(now)
        if self._wire is None or self._closing:
            return
        self._deadlines.pausing(now, self._is_pausing())
        lanes = self._backlog.lanes.values()
        if self._deadlines.is_late(lanes, now):
            self._sizing.timed_out()
        if (close := self._deadlines.due(lanes, now)) is not None:
            self._close(close.code, close.reason)

    def _is_pausing(self) -> bool:
        """Whether a window of 0 keeps messages waiting (C5)."""
        return self._ready and not self._window and not self._backlog.messages and self._backlog.waiting > 0
