"""One frame of messages for effects outside the receiver's store: at least once.

Promises: a message is only answered after the application has called `ack` or `refuse`; the number follows at most
0.5 s later. Between the effect and that commit a crash makes the message come again: an effect that must not happen
twice needs `Batch`, or a check of its own by (stream, priority, seq).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final

from durablews.receiver.exchange import Exchange, Opening, Outcome
from durablews.receiver.messages import Message
from durablews.receiver.session import FAILURE_RETRY, Close, Refusal
from durablews.receiver.store import Store
from durablews.wire.frames import Item, Msgs

__all__ = ["COMMIT_INTERVAL", "Course", "Delivery"]

#: How long an acknowledged message may wait for its number to be committed and its ack to be sent, in seconds. Half of
#: what PROTOCOL.md S5 allows, so that the commit has the other half.
COMMIT_INTERVAL: Final = 0.5


class Delivery(Message, frozen=True, kw_only=True, dict=True):
    """A message that waits for `ack` or `refuse`. Not created by applications."""

    course: Any

    async def ack(self) -> None:
        """Say that the effect has happened. The client is told within 1 s, together with others.

        Raises:
            RuntimeError: it is not the message at hand, or was answered already.
            StorageFailed, OutboxLocked: an earlier number could not be committed; the connection is closed.
        """
        await self.course.ack(self.seq)

    async def refuse(self, code: str = "invalid", reason: str | None = None, *, retry: float | None = None) -> None:
        """Refuse it, for good or for `retry` seconds; arguments and errors as in `Batch.refuse` and `ack`.

        The messages behind it in the same frame are not delivered now: the client sends them again.
        """
        await self.course.refuse(self.seq, Refusal(code, reason, retry))


class Course:
    """What becomes of one frame, message by message."""

    def __init__(
        self, exchange: Exchange, store: Store, frame: Msgs, deliver: Callable[[Outcome], Awaitable[None]]
    ) -> None:
        self._exchange = exchange
        self._store = store
        self._frame = frame
        self._deliver = deliver
        self._current: int | None = None  # delivered, not answered
        self._done = 0  # acknowledged by the application up to here
        self._committed = 0
        self._refused: tuple[int, Refusal] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._commit: asyncio.Task[None] | None = None
        self._over = False

    async def messages(self) -> AsyncGenerator[Delivery, None]:
        """Deliver what is fresh, one by one; then commit and answer."""
        opening = await self._look()
        if opening is None:
            return
        try:
            for item in opening.items:
                self._current = item.seq
                yield self._delivery(item)
                if self._current is not None and self._refused is None:
                    # Neither acknowledged nor refused: not taken. Silence would leave the client waiting (S4).
                    self._refused = (item.seq, Refusal("busy", "not acknowledged", FAILURE_RETRY))
                if self._refused is not None or self._over:
                    break
        finally:
            # Also when the application leaves the loop: what it acknowledged need not come again.
            await self._stop_timer()
            if not self._over and (self._done > self._committed or self._refused is not None or not opening.items):
                await self._commit_done(last=True)

    async def ack(self, seq: int) -> None:
        self._take(seq)
        self._done = seq
        if self._timer is None and self._commit is None:
            self._timer = asyncio.get_running_loop().call_later(COMMIT_INTERVAL, self._start_commit)

    async def refuse(self, seq: int, refusal: Refusal) -> None:
        self._take(seq)
        self._refused = (seq, refusal)

    def _take(self, seq: int) -> None:
        if self._commit is not None and self._commit.done():
            self._commit.result()
        if seq != self._current:
            raise RuntimeError(f"message {seq} was answered already, or the loop has gone on to another one")
        self._current = None

    async def _look(self) -> Opening | None:
        """Return what is fresh as of now; None when the frame is not to be delivered."""

        def look(connection: sqlite3.Connection) -> tuple[Opening, Outcome | None]:
            opening = self._exchange.begin(connection, self._frame)
            if opening.outcome is not None:
                return opening, self._exchange.finish(connection, opening)
            connection.execute("ROLLBACK")
            return opening, None

        async with self._store.lock:
            try:
                opening, outcome = await self._store.run(look)
            except sqlite3.Error as exc:
                opening, outcome = Opening(frame=self._frame), await self._store.run(self._failed(exc))
        if outcome is None:
            return opening
        await self._conclude(outcome)
        return None

    def _delivery(self, item: Item) -> Delivery:
        meta = item.meta
        return Delivery(
            stream=self._exchange.stream,
            priority=self._frame.priority,
            seq=item.seq,
            raw=item.payload,
            topic=meta.topic,
            headers=meta.h or {},
            enqueued_at=meta.ts,
            transmission=max(1, meta.n),
            course=self,
        )

    def _start_commit(self) -> None:
        self._timer = None
        self._commit = asyncio.create_task(self._commit_done(last=False), name="durablews number")
        self._commit.add_done_callback(self._next_commit)

    def _next_commit(self, task: asyncio.Task[None]) -> None:
        # A failure stays in the task until ack(), refuse() or the end of the frame raises it.
        if not task.cancelled() and task.exception() is None and self._commit is task:
            self._commit = None
            if self._done > self._committed:
                self._timer = asyncio.get_running_loop().call_later(COMMIT_INTERVAL, self._start_commit)

    async def _stop_timer(self) -> None:
        running, self._commit = self._commit, None
        if running is not None:
            await running
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _commit_done(self, *, last: bool) -> None:
        done, refused = self._done, self._refused if last else None

        def commit(connection: sqlite3.Connection) -> Outcome:
            try:
                opening = self._exchange.begin(connection, self._frame)
            except sqlite3.Error as exc:
                return self._failed(exc)(connection)
            return self._exchange.finish(connection, opening, refused, up_to=done)

        async with self._store.lock:
            outcome = await self._store.run(commit)
        self._committed = done
        await self._conclude(outcome)

    def _failed(self, exc: Exception) -> Callable[[sqlite3.Connection], Outcome]:
        def failed(connection: sqlite3.Connection) -> Outcome:
            outcome = self._exchange.fail(connection, self._frame, exc)
            # Not a nack: it would say "not taken", and the effect may have happened.
            return Outcome(close=outcome.close or Close(1013, "the transaction failed"), error=exc)

        return failed

    async def _conclude(self, outcome: Outcome) -> None:
        self._over = self._over or outcome.close is not None
        await self._deliver(outcome)
        if outcome.error is not None:
            raise self._store.failure_of(outcome.error) from outcome.error
