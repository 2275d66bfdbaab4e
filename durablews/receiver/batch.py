"""One frame of messages for an application that keeps its rows in the receiver's own store: applied once (P5).

Promises: the rows that the block wrote, the number and the ack commit together or not at all; a message is never
counted as applied that the block has not iterated over. Effects outside the store are not covered: see `deliveries`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import aiosqlite

from durablews.receiver.exchange import Exchange, Opening, Outcome
from durablews.receiver.messages import Message, message_of
from durablews.receiver.session import Close, Refusal
from durablews.receiver.store import Store
from durablews.wire.frames import Msgs

__all__ = ["Batch"]


class Batch:
    """The messages of one frame.

        async for batch in receiver.session(websocket):
            async with batch.applying() as connection:
                for message in batch:
                    await connection.execute("INSERT INTO readings VALUES (?)", (message.raw,))

    Two iterations, both only inside `applying`, both over what is not a repeat:

    - ``for message in batch``: a message must be refused before anything is written for it. Costs nothing.
    - ``async for message in batch``: each message has a savepoint of its own, and refusing it undoes what was written
      for it. Costs one hop to the database's thread a message.

    Not created by applications.
    """

    def __init__(
        self, exchange: Exchange, store: Store, frame: Msgs, deliver: Callable[[Outcome], Awaitable[None]]
    ) -> None:
        self._exchange = exchange
        self._store = store
        self._frame = frame
        self._deliver = deliver
        self._opening: Opening | None = None  # while the block is open
        self._begun = False
        self._seen_all = False
        self._current: int | None = None  # the sequence whose savepoint is open
        self._refused: tuple[int, Refusal] | None = None
        self._pending: Outcome | None = None  # what is still to be delivered when the loop comes back

    @property
    def stream(self) -> str:
        """Return the outbox that the messages come from, 32 hex digits."""
        return self._exchange.stream

    @property
    def priority(self) -> int:
        """Return the priority that all messages of the batch have."""
        return self._frame.priority

    @asynccontextmanager
    async def applying(self) -> AsyncIterator[aiosqlite.Connection]:
        """Open the transaction in which the batch is applied; leaving the block commits it and sends the ack.

        The connection is the store's own. Leave BEGIN, COMMIT and ROLLBACK to the receiver. All other connections wait
        meanwhile: do no slow work in the block. When nothing is to be applied (repeats only, or the stream has a newer
        connection) the batch is empty in there, and what the block writes is rolled back.

        An exception in the block rolls everything back, tells the client to try again in 5 s, or closes the connection
        with 1013 where PROTOCOL.md S4 asks for it, and goes on to the application. Catch it around the block to go on
        with the session.

        Raises:
            RuntimeError: called twice; or the block was left before it had seen all messages, without refusing one;
                or it ended the transaction by itself.
            OutboxLocked: another program held the store for longer than the busy timeout.
            StorageFailed: the commit failed (closed with 1013), or the store has lost what it acknowledged (1012, S3).
        """
        if self._begun:
            raise RuntimeError("a batch is applied once: applying() was called before")
        self._begun = True
        failure: BaseException | None = None
        async with self._store.lock:
            try:
                self._opening = opening = await self._begin()
                yield self._store.connection
                if opening.items and not self._seen_all and self._refused is None:
                    raise RuntimeError(
                        "the block was left before it had seen every message of the batch: refuse the one at which it "
                        "stops, or iterate to the end"
                    )
                outcome = await self._store.run(self._finish)
            except BaseException as exc:
                failure = exc
                # If this await is cancelled too the rollback still runs, before any other job of this store.
                self._pending = Outcome(close=Close(1013, "the transaction failed"))
                outcome = await self._fail(exc)
            finally:
                self._opening = None
        if failure is None or isinstance(failure, Exception):
            self._pending = None
            await self._deliver(outcome)
        else:
            self._pending = outcome  # cancelled: this is no time to wait for a socket
        if failure is not None:
            raise failure
        if outcome.error is not None:
            raise self._store.failure_of(outcome.error) from outcome.error

    def __iter__(self) -> Iterator[Message]:
        """Iterate over the messages that are not repeats, in order, up to the refused one."""
        for item in self._applying().items:
            if self._refused is not None:
                return
            yield message_of(self.stream, self.priority, item)
        self._seen_all = True

    async def __aiter__(self) -> AsyncIterator[Message]:
        """Iterate over the same, each message in a savepoint of its own."""
        for item in self._applying().items:
            await self._store.run(self._next_savepoint)
            if self._refused is not None:
                return
            self._current = item.seq
            yield message_of(self.stream, self.priority, item)
        self._seen_all = True

    def refuse(
        self, message: Message, code: str = "invalid", reason: str | None = None, *, retry: float | None = None
    ) -> None:
        """Refuse `message`: the batch ends before it, and what came before it stays.

        In a plain ``for`` call it before anything is written for the message; in ``async for`` what was written for it
        is rolled back.

        Args:
            code: the client's word for it: invalid, too_large, forbidden, unknown_topic, busy, rate (PROTOCOL.md
                section 2).
            reason: text for people. It is kept by the client and shown there: no secrets.
            retry: seconds after which the client should try again; None, the default, refuses for good: the message
                becomes a dead letter at the client.

        Raises:
            ValueError: `message` is not one that this batch is about to apply.
            RuntimeError: called outside the block, or after another refusal.
        """
        items = self._applying().items
        if self._refused is not None:
            raise RuntimeError("a batch ends at the first message that is refused")
        if message.seq not in {item.seq for item in items} or self._current not in (None, message.seq):
            raise ValueError(f"{message!r} is not the message that is being applied")
        self._refused = (message.seq, Refusal(code, reason, retry))

    async def conclude(self) -> Outcome | None:
        """Return what is still to be told to the client when the application asks for the next batch.

        A batch that was never applied has failed: it is not acked, and the client tries again (S4).
        """
        if self._opening is not None:
            raise RuntimeError("the next batch was asked for inside the block that applies this one")
        if not self._begun:
            self._begun = True
            async with self._store.lock:
                return await self._store.run(
                    lambda connection: self._exchange.fail(connection, self._frame, None, "not applied")
                )
        pending, self._pending = self._pending, None
        return pending

    def _applying(self) -> Opening:
        if self._opening is None:
            raise RuntimeError("use the batch inside `async with batch.applying()`")
        return self._opening

    def _next_savepoint(self, connection: sqlite3.Connection) -> None:
        self._end_savepoint(connection)
        if self._refused is None:
            connection.execute("SAVEPOINT durablews_message")

    def _end_savepoint(self, connection: sqlite3.Connection) -> None:
        if self._current is not None:
            if self._refused is not None:
                connection.execute("ROLLBACK TO durablews_message")
            connection.execute("RELEASE durablews_message")
            self._current = None

    def _finish(self, connection: sqlite3.Connection) -> Outcome:
        if connection.in_transaction:
            self._end_savepoint(connection)
        return self._exchange.finish(connection, self._applying(), self._refused)

    async def _begin(self) -> Opening:
        try:
            return await self._store.run(lambda connection: self._exchange.begin(connection, self._frame))
        except sqlite3.Error as exc:
            raise self._store.error_of(exc) from exc

    async def _fail(self, exc: BaseException) -> Outcome:
        error = exc if isinstance(exc, Exception) else None
        return await self._store.run(lambda connection: self._exchange.fail(connection, self._frame, error))
