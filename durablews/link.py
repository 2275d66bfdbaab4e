"""One connection, from its welcome to its end: the thin shell around `Delivery`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from websockets.exceptions import ConnectionClosed

from durablews.closing import close_in_time, how_closed
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
from durablews.delivery.deadlines import RENEWAL
from durablews.delivery.delivery import Delivery
from durablews.delivery.suspicion import Closed
from durablews.draining import DrainedOutbox, Page
from durablews.errors import OutboxError
from durablews.events import (
    EventLog,
    HeartbeatTimeout,
    Latency,
    MessagePushed,
    MessageRejected,
    MessagesAcked,
    MessagesSent,
)
from durablews.heartbeat import Beat, Heartbeat
from durablews.messages import Entry, Refusal, Run
from durablews.wire.dialect import Introduction, Wire
from durablews.writing import queued_bytes, write_messages

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

__all__ = ["Link"]

# While frames are still to be taken by a slow socket, look so often how far it is (seconds).
_PROGRESS_LOOK = 0.1
# Frames are written together, a system call for so many or so many bytes: more would not make them cheaper.
_WRITE_FRAMES, _WRITE_BYTES = 64, 64 * 1024


class Link:
    """Runs one WebSocket until it ends. Every wait in here has a deadline or a wake-up."""

    def __init__(
        self,
        websocket: ClientConnection,
        wire: Wire,
        *,
        delivery: Delivery,
        outbox: DrainedOutbox,
        heartbeat: Heartbeat,
        introduction: Callable[[str, int], Introduction],
        discreet: Callable[[str], str],
        leave_at: float | None,
        events: EventLog,
        on_welcome: Callable[[], None],
        on_push: Callable[[str | bytes], None],
    ) -> None:
        self._websocket = websocket
        self._wire = wire
        self._delivery = delivery
        self._outbox = outbox
        self._heartbeat = heartbeat
        self._introduction = introduction
        self._discreet = discreet
        self._leave_at = leave_at
        self._events = events
        self._on_welcome = on_welcome
        self._on_push = on_push
        self._now = asyncio.get_running_loop().time
        self._sendable = asyncio.Event()
        self._changed = asyncio.Event()
        self._close: Close | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # Bytes of frames: handed to the socket, taken by the other end, and handed before the last ping; what the last
        # look found; and when the queue moved, or was pinged behind, for the last time.
        self._handed = self._taken = self._before_ping = 0
        self._seen_handed = self._seen_queued = 0
        self._moved_at = 0.0
        self._pings: dict[int, float] = {}
        # What is being written and will be an event.
        self._sent: list[Run] = []
        self._ping_number = 0
        self._defect: Exception | None = None
        #: Seconds that the server asked the client to stay away.
        self.postponed = 0.0
        self.progressed = False
        #: When the server welcomed this connection.
        self.welcomed_at: float | None = None
        #: Set when the connection is over.
        self.ended = asyncio.Event()

    async def run(self, welcome_by: float) -> Closed:
        """Say hello, drain, and return how it ended; without a welcome by `welcome_by` it is closed with 4408."""
        try:
            stream, last = await self._outbox.introduce()
            self._delivery.connected(self._wire, self._introduction(stream, last), self._discreet)
            reader = self._spawn(self._read(), "reader")
            self._spawn(self._send(), "sender")
            return await self._steer(reader, welcome_by)
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.ended.set()

    def stored(self, entries: Sequence[Entry] = ()) -> None:
        """Take note that there may be more to send: `entries`, if they were stored just now."""
        self._delivery.stored(entries)
        self._act()

    def probe(self) -> None:
        """Ask at once whether the other side is still there."""
        self._heartbeat.probe(self._now())
        self._changed.set()

    @property
    def retired(self) -> bool:
        """Whether this side left because the connection had reached its age."""
        return self._close is not None and self._close.reason == RENEWAL

    def close(self, code: int, reason: str) -> None:
        """Begin to close from this side."""
        if self._close is None:
            self._close = Close(code, reason)
            self._changed.set()

    # -- the three tasks

    async def _steer(self, reader: asyncio.Task[None], welcome_by: float) -> Closed:
        """Keep the timers, until the connection has ended."""
        while not reader.done() and self._close is None:
            now = self._now()
            if not self._delivery.ready and now >= welcome_by:
                self._close = Close(4408, "no welcome in time")
                break
            self._report_taken(now)
            self._beat(now)
            if self._leave_at is not None and now >= self._leave_at:
                self._leave_at = None
                self._delivery.retire()
            self._delivery.handle_timer(now)
            self._act()
            if self._close is not None:
                break
            self._changed.clear()
            await self._wait(reader, self._next_look(welcome_by) - self._now())
        return await self._end(reader)

    def _next_look(self, welcome_by: float) -> float:
        now = self._now()
        times = [self._heartbeat.timer()]
        timer = self._delivery.timer(now)
        if timer is not None:
            times.append(timer)
        if not self._delivery.ready:
            times.append(welcome_by)
        if self._leave_at is not None:
            times.append(self._leave_at)
        if self._delivery.untaken or self._taken < max(self._handed, self._before_ping):
            times.append(now + _PROGRESS_LOOK)
        return min(times)

    async def _wait(self, reader: asyncio.Task[None], timeout: float) -> None:
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({reader, changed}, timeout=max(0.0, timeout), return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()

    async def _end(self, reader: asyncio.Task[None]) -> Closed:
        close = self._close
        if close is not None and not reader.done():
            await close_in_time(self._websocket, close.code, close.reason)
        await asyncio.wait({reader})
        self.progressed = self._delivery.progressed
        if self._defect is not None:
            raise self._defect
        if close is not None:
            return Closed(code=close.code, reason=close.reason, received=False, leaving=True)
        return how_closed(self._websocket)

    async def _read(self) -> None:
        """Read for as long as the server sends: acks are read whatever the application does (C10)."""
        while True:
            data = await self._websocket.recv()
            now = self._now()
            self._heartbeat.received(now)
            self._report_taken(now)
            self._delivery.receive(data, now)
            self._act()

    async def _send(self) -> None:
        """Send whatever may go; a socket that takes nothing holds up only this task."""
        while True:
            self._sendable.clear()
            while frames := self._frames_to_send():
                self._changed.set()
                await write_messages(self._websocket, frames, text=self._wire.text)
                self._report_taken(self._now())
                for run in self._sent:
                    self._events.put(MessagesSent(run.priority, run.first, run.last, run.messages))
            await self._sendable.wait()

    def _frames_to_send(self) -> list[bytes]:
        """Return the frames that may go now, as far as they are written together."""
        frames: list[bytes] = []
        room, now, is_told = _WRITE_BYTES, self._now(), self._events.wanted
        self._sent.clear()
        while len(frames) < _WRITE_FRAMES and room > 0:
            frame = self._delivery.frame_to_send(now)
            if frame is None:
                break
            frames.append(frame)
            room -= len(frame)
            self._handed += len(frame)
            if is_told and (run := self._delivery.sent) is not None:
                self._sent.append(run)
        self._carry_out()
        return frames

    # -- between them

    def _report_taken(self, now: float) -> None:
        queued = queued_bytes(self._websocket)
        # Only a queue that shrinks while nothing is added proves that the other end takes something: under compression
        # a frame adds less to the queue than to what was handed.
        shrinks = queued < self._seen_queued and self._handed == self._seen_handed
        self._seen_handed, self._seen_queued = self._handed, queued
        if shrinks and self._taken < self._before_ping:
            self._heartbeat.delayed(now - self._moved_at)
            self._moved_at = now
        taken = self._handed - min(queued, self._handed)
        if taken > self._taken:
            self._taken = taken
            self._delivery.taken(taken, now)
            self._sendable.set()

    def _beat(self, now: float) -> None:
        beat = self._heartbeat.due(now)
        if beat is Beat.DEAD:
            self._events.put(HeartbeatTimeout(self._heartbeat.silence(now)))
            self.close(4408, "nothing was heard for too long")
        elif beat is Beat.PING:
            self._before_ping, self._moved_at = self._handed, now
            if self._heartbeat.application:
                if self._delivery.ping(self._ping_number + 1):
                    self._ping_number += 1
                    self._pings = {self._ping_number: now, **dict(list(self._pings.items())[:9])}
                    self._sendable.set()
                    return
            self._spawn(self._ping(), "ping")

    async def _ping(self) -> None:
        latency = await (await self._websocket.ping())
        self._heartbeat.received(self._now())
        self._measured(latency)

    def _measured(self, latency: float) -> None:
        self._heartbeat.measured(latency)
        self._events.put(Latency(latency))

    def _act(self) -> None:
        """Do what `Delivery` asks, read what it wants, and let the sender look again."""
        if self.ended.is_set():
            return  # a write that was late: what `Delivery` wants now is the next connection's to do
        self._carry_out()
        self._sendable.set()
        self._changed.set()

    def _carry_out(self) -> None:
        for action in self._delivery.actions():
            self._do(action)
        want = self._delivery.wanted(self._now())
        if want is not None:
            self._outbox.fetch(want).add_done_callback(lambda page: self._supply(want, page))

    def _do(self, action: Action) -> None:
        if isinstance(action, Settle):
            run = action.run
            self._outbox.settle(run)
            if self._events.wanted:
                self._events.put(MessagesAcked(run.priority, run.first, run.last, run.messages))
        elif isinstance(action, MarkUnanswered | TakeBack):
            self._outbox.mark(action)
        elif isinstance(action, Refuse | Requeue | SetAside):
            self.record(action)
        elif isinstance(action, Deliver):
            self._on_push(action.payload)
            self._events.put(MessagePushed(len(action.payload)))
        elif isinstance(action, Echoed):
            if (asked := self._pings.pop(action.number, None)) is not None:
                self._measured(self._now() - asked)
        elif isinstance(action, Postpone):
            self.postponed = action.delay
        elif isinstance(action, Close):
            self.close(action.code, action.reason)
        elif isinstance(action, Welcomed):
            self._welcomed(action)
        else:
            assert isinstance(action, RenewStream)
            self._spawn(self._renew_stream(), "renew stream")

    def record(self, action: Refuse | Requeue | SetAside) -> None:
        """Write what became of an entry, and let its priority go on after that."""
        self._outbox.record(action).add_done_callback(lambda done: self._recorded(action, done))

    def _recorded(self, action: Refuse | Requeue | SetAside, done: asyncio.Future[Refusal | None]) -> None:
        if done.cancelled() or done.exception() is not None:
            return  # the outbox is closing; nothing passed over it
        self._outbox.look_again()
        refusal = done.result()
        if refusal is not None:
            self._events.put(MessageRejected(action.seq, refusal.code, refusal.reason))
        self._delivery.recorded(action.priority, action.seq)
        self._act()

    def _welcomed(self, action: Welcomed) -> None:
        def returned(done: asyncio.Future[list[tuple[int, Refusal]]]) -> None:
            if not done.cancelled() and done.exception() is None:
                for seq, _ in done.result():
                    self._events.put(MessageRejected(seq, "too_large", None))
                self._outbox.look_again()
                self.stored()

        self.welcomed_at = self._now()
        self._outbox.welcomed(action.max_bytes).add_done_callback(returned)
        self._on_welcome()

    def _supply(self, want: Want, page: asyncio.Future[Page]) -> None:
        if page.cancelled():
            return
        error = page.exception()
        if error is not None:
            self.close(1011, "the outbox cannot be read")
            self._outbox.storage.trouble = error.what if isinstance(error, OutboxError) else repr(error)
            return
        found = page.result()
        self._delivery.supply(want, found.entries, found.unfit, self._now())
        self._act()

    async def _renew_stream(self) -> None:
        await self._outbox.renew_stream()
        stream, last = await self._outbox.introduce()
        self._delivery.introduce(self._introduction(stream, last))
        self._act()

    def _spawn(self, coroutine: object, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine, name=f"durablews {name}")  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            error = task.exception()  # a lost connection ends every task; the reader's end is the one that counts
            if isinstance(error, Exception) and not isinstance(error, ConnectionClosed):
                self._defect = error
                self.close(1011, "an internal error")
        self._changed.set()
