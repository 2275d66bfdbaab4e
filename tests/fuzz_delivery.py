"""`Delivery` under a server that says anything at all, in a state machine that keeps its own books."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from durablews.config import DeliveryConfig
from durablews.delivery.actions import (
    Action,
    Close,
    MarkUnanswered,
    Refuse,
    RenewStream,
    Requeue,
    SetAside,
    Settle,
    TakeBack,
    Want,
)
from durablews.delivery.backlog import BATCH_MESSAGES, READ_AHEAD_MESSAGES
from durablews.delivery.delivery import Delivery
from durablews.delivery.suspicion import Closed
from durablews.messages import Entry, Run
from durablews.wire.dialect import Introduction
from durablews.wire.frames import JSON, MSGPACK, Ack, Bye, Codec, Flow, Hello, Msgs, Nack, Ping, Pong, Welcome
from durablews.wire.native import NativeDialect

__all__ = ["delivery"]

_CODES = (1000, 1003, 1006, 1007, 1009, 1011, 4400, 4408, 4409, 4413)
_INSTANCE = "0" * 16
#: No step may lead to more frames than this; it would be a loop.
_MOST_FRAMES = 2000


class _Decisions:
    """Bytes, one decision after the other; then zeros."""

    def __init__(self, data: bytes) -> None:
        self._rest = iter(data)
        self.left = len(data)

    def byte(self) -> int:
        self.left -= 1
        return next(self._rest, 0)

    def piece(self) -> bytes:
        return bytes(self.byte() for _ in range(min(self.byte(), max(0, self.left))))


class _Books:
    """A shell over rows in memory. Every answer is checked against what was really in flight."""

    def __init__(self, script: _Decisions) -> None:
        self._script = script
        choice = script.byte()
        self._codec = Codec(JSON if choice % 2 else MSGPACK)
        self.delivery = Delivery(
            DeliveryConfig(
                window=(1, 2, 5, 1024)[choice // 2 % 4],
                window_bytes=(1, 500, 1 << 20)[choice // 8 % 3],
                on_retry="requeue" if choice & 64 else "block",
                max_attempts=2 if choice & 128 else None,
            ),
            instance=_INSTANCE,
        )
        self.now = 1000.0
        self.rows: dict[tuple[int, int], Entry] = {}
        self._last = 0
        for _ in range(20):
            self._store(self._last % 3 - 1, b"x" * (self._last * self._last))
        #: Sent on this connection and not answered, in that order.
        self.flight: list[tuple[int, int]] = []
        self._taken_back: tuple[int, int] | None = None
        self._wants: list[Want] = []
        self._unrecorded: list[Refuse | Requeue | SetAside] = []
        self._handed = 0
        self._closing = True
        self._welcomes = 0

    def _store(self, priority: int, payload: bytes) -> None:
        self._last += 1
        entry = Entry(self._last, priority, payload, None, None, 0, max(1, len(payload)), 0, 0)
        self.rows[priority, self._last] = entry

    def connect(self) -> None:
        wire = NativeDialect().connection(self._codec.subprotocol)
        self.delivery.connected(wire, Introduction("0" * 32, _INSTANCE, self._last, 1 << 20, "fuzz"))
        self._closing, self._handed, self._wants = False, 0, []

    def disconnect(self) -> None:
        code = _CODES[self._script.byte() % len(_CODES)]
        received = self._script.byte() % 4 > 0
        flight = list(self.flight)
        self.delivery.disconnected(Closed(code=code, reason="why", received=received), self.now)
        actions = self.delivery.actions()
        marked = [key for action in actions if isinstance(action, MarkUnanswered) for key in self._keys(*action.runs)]
        assert sorted(marked) == sorted(flight), "what was in flight is not what is unanswered"
        for action in actions:
            if isinstance(action, Refuse):
                assert [(action.priority, action.seq)] == flight or code in (1003, 1007, 4400), "blamed without proof"
                assert (action.priority, action.seq) in flight
                self.rows.pop((action.priority, action.seq))
            else:
                assert isinstance(action, MarkUnanswered | RenewStream)
        self.flight.clear()
        self._unrecorded.clear()
        self.connect()

    def _keys(self, *runs: Run) -> list[tuple[int, int]]:
        found = []
        for run in runs:
            keys = [key for key in self.flight if key[0] == run.priority and run.first <= key[1] <= run.last]
            assert len(keys) == run.messages, "a run names what is not in flight"
            found += keys
        return found

    # -- what the server says

    def hear(self) -> None:
        """Receive one frame: raw bytes, or one that makes sense as far as it goes."""
        script = self._script
        kind = script.byte() % 9
        if kind == 0:
            data = script.piece()
            self.delivery.receive(data.decode(errors="replace") if self._codec.text else data, self.now)
            return
        priority = script.byte() % 4 - 1
        pick = script.byte()
        seq = self.flight[pick % len(self.flight)][1] if self.flight and pick < 200 else pick
        frames: dict[int, Callable[[], Any]] = {
            1: lambda: Welcome(script.byte(), 65_536, script.byte() % 4 == 1),
            2: lambda: Ack(priority, seq),
            3: lambda: Ack(priority, 2**53 - 1),
            4: lambda: Nack(priority, seq, retry=script.byte() * 100),
            5: lambda: Nack(priority, seq, final=True),
            6: lambda: Flow(script.byte() % 5),
            7: lambda: Ping(pick) if pick % 2 else Pong(pick),
            8: lambda: Bye(pick) if pick % 8 == 0 else Flow(1024),
        }
        encoded = self._codec.encode(frames[kind]())
        self.delivery.receive(encoded.decode() if self._codec.text else encoded, self.now)

    # -- what the shell does

    def carry_out(self) -> None:
        for action in self.delivery.actions():
            self._do(action)
        want = self.delivery.wanted(self.now)
        if want is not None:
            self._wants.append(want)
        assert len(self._wants) <= 2, "reads without end"

    def _do(self, action: Action) -> None:
        if isinstance(action, Settle):
            for key in self._keys(action.run):
                self.flight.remove(key)
                del self.rows[key]
        elif isinstance(action, TakeBack):
            keys = self._keys(action.run)
            self._taken_back = keys[0]
            for key in keys:
                self.flight.remove(key)
        elif isinstance(action, Refuse | Requeue | SetAside):
            key = (action.priority, action.seq)
            assert key in self.rows, "something became of what is not there"
            assert key not in self.flight
            if not isinstance(action, SetAside):
                assert key == self._taken_back, "passed over without a nack"
            self._unrecorded.append(action)
        elif isinstance(action, Close):
            assert action.code in (1000, 4400, 4408)
            self._closing = True
        elif isinstance(action, RenewStream):
            self._welcomes += 1
            self.delivery.introduce(Introduction("1" * 32, _INSTANCE, 0, 1 << 20, "fuzz"))

    def record(self) -> None:
        """Write what became of an entry, at last."""
        if not self._unrecorded:
            return
        action = self._unrecorded.pop(0)
        entry = self.rows.pop((action.priority, action.seq))
        if isinstance(action, Requeue):
            assert isinstance(entry.payload, bytes)
            self._store(entry.priority, entry.payload)
        self.delivery.recorded(action.priority, action.seq)

    def read(self) -> None:
        """Answer the oldest read."""
        if not self._wants:
            return
        want = self._wants.pop(0)
        entries = [
            self.rows[priority, seq]
            for priority, seq in sorted(self.rows, key=lambda key: (-key[0], key[1]))
            if priority not in want.closed and priority > want.above and seq > want.after.get(priority, 0)
        ]
        self.delivery.supply(want, entries[: want.limit], [], self.now)

    def send(self) -> None:
        for _ in range(_MOST_FRAMES):
            frame = self.delivery.frame_to_send(self.now)
            self.carry_out()
            if frame is None:
                return
            self._handed += len(frame)
            decoded = self._codec.decode_client(frame.decode() if self._codec.text else frame)
            assert isinstance(decoded, Hello | Msgs | Pong | Ping)
            if isinstance(decoded, Msgs):
                assert len(decoded.items) <= BATCH_MESSAGES
                before = [seq for priority, seq in self.flight if priority == decoded.priority]
                assert decoded.items[0].seq > max(before, default=0), "not in order"
                for item in decoded.items:
                    assert (decoded.priority, item.seq) in self.rows, "sent what has left"
                    self.flight.append((decoded.priority, item.seq))
        raise AssertionError("frames without end")

    def pass_time(self) -> None:
        self.now += self._script.byte() ** 2 / 10
        timer = self.delivery.timer(self.now)
        assert timer is None or timer >= self.now
        self.delivery.handle_timer(self.now)

    def take(self) -> None:
        self.delivery.taken(self._handed * self._script.byte() // 255, self.now)

    def look(self) -> None:
        assert self.delivery.in_flight == len(self.flight), "the books differ"
        assert self.delivery._backlog.waiting <= READ_AHEAD_MESSAGES + BATCH_MESSAGES


def delivery(data: bytes) -> None:
    """Whatever a server answers, in any order with the shell's own steps: only what was in flight is settled, taken
    back or refused, nothing is sent out of order or after it has left, and nothing but ProtocolError is raised."""
    script = _Decisions(data)
    books = _Books(script)
    books.connect()
    steps = [
        books.hear,
        books.read,
        books.send,
        books.record,
        books.pass_time,
        books.take,
        books.delivery.stored,
        books.disconnect,
        books.hear,
        books.send,
    ]
    while script.left > 0:
        steps[script.byte() % len(steps)]()
        books.carry_out()
        books.look()
