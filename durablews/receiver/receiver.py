"""The server side of durablews.v1 for asyncio: WebSockets in, messages out, each applied once (PROTOCOL.md section 4).

Promises: `session` and `serve` apply each message once, however often either end dies (P5); `messages` delivers at
least once. One receiver serves any number of connections; several processes may share one store. Does not listen,
speak TLS or authenticate: that is the WebSocket server's, which hands over connections and says who each one is.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

from msgspec import Struct

from durablews.clock import Clock, SystemClock
from durablews.errors import ConfigError, PayloadError
from durablews.messages import encode_payload
from durablews.receiver import ledger
from durablews.receiver.batch import Batch
from durablews.receiver.deliveries import Course, Delivery
from durablews.receiver.exchange import ApplyFrame, Exchange, Outcome
from durablews.receiver.link import Link, WebSocket
from durablews.receiver.session import Close, Session, Wire
from durablews.receiver.store import Store
from durablews.wire.frames import SMALLEST_MAX_BYTES, SUBPROTOCOLS, Codec, Hello, Msgs

__all__ = ["Receiver", "Served"]

_HELLO_TIMEOUT: Final = 10.0  # seconds (PROTOCOL.md S7)


class Served(Struct, kw_only=True):
    """What one connection brought, as `Receiver.serve` counts it.

    Attributes:
        stream: the client's outbox; empty when it never said hello.
        frames: WebSocket messages read, hello and pings included.
        applied: messages applied and committed.
        refused: messages refused, for good or for now.
    """

    stream: str = ""
    frames: int = 0
    applied: int = 0
    refused: int = 0


class Receiver:
    """Receives what durablews clients send.

        async with Receiver("inbox.db") as receiver:
            async with websockets.serve(handler, host, port, subprotocols=SUBPROTOCOLS, max_size=receiver.max_bytes,
                                        select_subprotocol=select_subprotocol): ...

        async def handler(websocket):
            async for batch in receiver.session(websocket):
                async with batch.applying() as connection:
                    for message in batch: ...

    Args:
        store: the SQLite file that remembers what was applied, or a `Store`: the application's own database, for
            effects that commit together with it. A store that is open already stays open.
        window: the most messages that one client may have unanswered; 0 pauses all.
        max_bytes: the largest frame that is accepted, at least 65 536 (PROTOCOL.md C5). Give it to the WebSocket server
            too (`max_size`), so that a larger one is refused before it is read (S7).
        hello_timeout: seconds in which a new connection must say hello (S7: 10).
        clock: its `wall` says when a stream was last heard of; the machine's own unless given.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | Store,
        *,
        window: int = 1024,
        max_bytes: int = 1024 * 1024,
        hello_timeout: float = _HELLO_TIMEOUT,
        clock: Clock | None = None,
    ) -> None:
        if not 0 <= window < 2**53:
            raise ConfigError(f"window must be 0 or more messages, not {window}")
        if not SMALLEST_MAX_BYTES <= max_bytes < 2**53:
            raise ConfigError(f"max_bytes must be at least {SMALLEST_MAX_BYTES} bytes, not {max_bytes}")
        self.store = store if isinstance(store, Store) else Store(store)
        self.max_bytes = max_bytes
        self._window = window
        self._hello_timeout = hello_timeout
        self._clock = clock or SystemClock()
        self._links: dict[str, Link] = {}  # stream -> its newest connection in this process
        self._closings: set[asyncio.Task[None]] = set()
        self._opened_store = False

    async def __aenter__(self) -> Self:
        """Open the store. Raises what `Store` raises."""
        if not self.store.opened:
            await self.store.__aenter__()
            self._opened_store = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connections that still talk (1001) and the store. Close the WebSocket server first."""
        try:
            for link in list(self._links.values()):
                link.close_soon(Close(1001, "the receiver is closing"))
            while self._closings:
                await asyncio.wait(self._closings)
        finally:
            if self._opened_store:
                self._opened_store = False
                await self.store.__aexit__(kind, exc, traceback)

    async def session(self, websocket: WebSocket, *, owner: str | None = None) -> AsyncGenerator[Batch, None]:
        """Iterate over the frames of messages that a client sends: one frame, one transaction (`Batch.applying`).

        Ends when the connection is closed, by either side and for whatever reason: `websocket.close_code` says which.
        A batch that was not applied when the next one is asked for has failed: the client is told to try again.

        Args:
            owner: who authenticated. A stream belongs to its first owner; anybody else is closed with 4403 (S8). None
                when nobody has to; a stream without an owner becomes that of the first who authenticates.
        """
        async with aclosing(self._frames(websocket, owner)) as frames:
            async for link, frame in frames:
                batch = Batch(link.exchange, self.store, frame, partial(self._deliver, link))
                yield batch
                outcome = await batch.conclude()
                if outcome is not None:
                    await self._deliver(link, outcome)
                    self._raise_error_of(outcome)

    async def messages(self, websocket: WebSocket, *, owner: str | None = None) -> AsyncGenerator[Delivery, None]:
        """Iterate over a client's messages, for effects outside the store: at least once.

        Each is to be answered by ``await message.ack()`` or ``await message.refuse(…)`` before the next one is asked
        for; one that is not counts as not taken and comes again. A crash between the effect and the commit of the
        number, at most 0.5 s after the ack, makes the message come again. `owner` as for `session`.

        Raises:
            StorageFailed, OutboxLocked: a number could not be committed, or the store has lost state.
        """
        async with aclosing(self._frames(websocket, owner)) as frames:
            async for link, frame in frames:
                course = Course(link.exchange, self.store, frame, partial(self._deliver, link))
                async with aclosing(course.messages()) as deliveries:
                    async for delivery in deliveries:
                        yield delivery

    async def serve(
        self,
        websocket: WebSocket,
        apply: ApplyFrame,
        *,
        owner: str | None = None,
        on_hello: Callable[[Hello], None] | None = None,
        on_error: Callable[[Exception], None] | None = None,
    ) -> Served:
        """Apply what a client sends with a plain function until the connection is closed: the fast way.

        A frame costs one hop to the database's thread, where `apply` is called with the `sqlite3` connection, the
        stream, the priority and the fresh messages, inside the transaction (`exchange.ApplyFrame`;
        `exchange.one_by_one` makes one of a function that takes single messages). `owner` as for `session`.

        Args:
            on_hello: called when the client has been welcomed.
            on_error: called with what made a transaction fail, after the client was told to try again; the connection
                goes on where PROTOCOL.md S4 allows it. Without it the error is raised.

        Raises:
            StorageFailed, OutboxLocked: the store failed, or has lost state.
            Exception: whatever `apply` raises.
        """
        served = Served()
        link = await self._link(websocket, owner)
        if link is None:
            return served
        try:
            while (data := await self._receive(link)) is not None:
                served.frames += 1
                outcome = await self._run(link, partial(_handle_frame, link.exchange, data, apply))
                served.applied += outcome.applied
                served.refused += outcome.refused is not None
                if outcome.greeted is not None and link.exchange.session.open:
                    served.stream = link.exchange.stream
                    if on_hello is not None:
                        on_hello(outcome.greeted)
                if on_error is None:
                    self._raise_error_of(outcome)
                elif outcome.error is not None:
                    on_error(self.store.failure_of(outcome.error))
        finally:
            self._unregister(link)
        await link.wait_closed()
        return served

    async def push(self, stream: str, payload: Any) -> bool:
        """Send a push to the newest connection of `stream`; return False when it is not connected to this process.

        Not acknowledged: True means that it was handed to the socket. `payload` is anything msgspec encodes as JSON, or
        bytes.

        Raises:
            PayloadError: it cannot be encoded, or its frame is larger than the client takes.
        """
        stored = encode_payload(payload)
        link = self._links.get(stream)
        if link is None or link.closed or not link.exchange.session.open:
            return False
        hello = link.exchange.session.hello
        frame = link.exchange.session.push(stored)
        size = _size(frame)
        if hello is not None and size > hello.max_bytes:
            raise PayloadError(f"the push needs a frame of {size} bytes, this client takes {hello.max_bytes}")
        # Another process may have a newer connection, and this one not know it yet. A read: no lock, so that a push can
        # be sent from inside `applying`.
        mine = link.exchange.connection_id
        if not await self.store.run(lambda connection: ledger.is_newest(connection, stream, mine)):
            return False
        return await link.send([frame])

    async def flow(self, window: int, *, stream: str | None = None) -> int:
        """Give a new window to `stream`, or to all clients, future ones included; 0 pauses. Return how many were told.

        What is in flight already is not held against the new window (PROTOCOL.md section 2, flow).

        Raises:
            ConfigError: `window` is negative.
        """
        if not 0 <= window < 2**53:
            raise ConfigError(f"window must be 0 or more messages, not {window}")
        if stream is None:
            self._window = window
            links = list(self._links.values())
        else:
            links = [self._links[stream]] if stream in self._links else []
        told = 0
        for link in links:
            if link.exchange.session.open:
                told += await link.send([link.exchange.session.flow(window)])
        return told

    async def forget(self) -> list[str]:
        """Forget the streams not heard of for 90 days or more, and return them (PROTOCOL.md section 5).

        By this machine's clock: do not call it where that may be wrong.
        """
        async with self.store.lock:
            return await self.store.run(lambda connection: ledger.forget(connection, now=self._clock.wall()))

    async def _link(self, websocket: WebSocket, owner: str | None) -> Link | None:
        subprotocol = websocket.subprotocol
        if subprotocol is None or subprotocol not in SUBPROTOCOLS:
            # Mostly a server that was set up without `select_subprotocol`: say so rather than just hang up.
            await websocket.close(4400, "no durablews subprotocol was selected")
            return None
        session = Session(Codec(subprotocol), window=self._window, max_bytes=self.max_bytes)
        return Link(websocket, Exchange(session, owner=owner, clock=self._clock), self._closings, self._hello_by())

    async def _frames(self, websocket: WebSocket, owner: str | None) -> AsyncGenerator[tuple[Link, Msgs], None]:
        """Do all that a connection asks for, except for its messages: these are yielded."""
        link = await self._link(websocket, owner)
        if link is None:
            return
        try:
            while (data := await self._receive(link)) is not None:
                received = link.exchange.receive(data)
                if isinstance(received, Msgs):
                    yield link, received
                elif isinstance(received, Hello):
                    self._raise_error_of(await self._run(link, partial(_greet, link.exchange, received)))
                else:
                    await self._deliver(link, received)
        finally:
            self._unregister(link)
        await link.wait_closed()

    async def _receive(self, link: Link) -> Wire | None:
        """Return the next frame; None when the connection is over."""
        if link.exchange.session.open:
            data = await link.receive()
        else:
            timeout = asyncio.timeout_at(link.hello_by)
            try:
                async with timeout:
                    data = await link.receive()
            except TimeoutError:
                if not timeout.expired():
                    raise
                link.close_soon(Close(4400, f"no hello within {self._hello_timeout:g} s"))
                data = None
        if data is not None and _size(data) > self.max_bytes:
            link.close_soon(Close(4413, f"a frame may have {self.max_bytes} bytes"))
            data = None
        if data is None:
            await link.wait_closed()
        return data

    async def _run(self, link: Link, job: Callable[[sqlite3.Connection], Outcome]) -> Outcome:
        """Do what a frame asks for in one job, and tell the client."""
        async with self.store.lock:
            outcome = await self.store.run(job)
            if outcome.greeted is not None:
                # Still under the lock: two hellos of a stream are registered in the order of their transactions.
                self._register(link, outcome.greeted)
        await self._deliver(link, outcome)
        return outcome

    async def _deliver(self, link: Link, outcome: Outcome) -> None:
        if outcome.frames:
            await link.send(outcome.frames)
        if outcome.close is not None:
            link.close_soon(outcome.close)
            # One turn of the loop: the close frame is out before a handler that ends now closes with another code.
            await asyncio.sleep(0)

    def _register(self, link: Link, hello: Hello) -> None:
        """Make this the stream's connection and close the older one, without waiting (S6)."""
        self._unregister(link)
        older = self._links.get(hello.stream)
        if older is not None:
            older.close_soon(Close.because(4409, f"instance={hello.instance}"))
        self._links[hello.stream] = link
        link.stream = hello.stream
        # Rewound: the client makes a new stream id durable first, and has as long again for that.
        link.hello_by = self._hello_by()

    def _unregister(self, link: Link) -> None:
        if link.stream is not None and self._links.get(link.stream) is link:
            del self._links[link.stream]
        link.stream = None

    def _hello_by(self) -> float:
        return asyncio.get_running_loop().time() + self._hello_timeout

    def _raise_error_of(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            raise self.store.failure_of(outcome.error) from outcome.error


def _size(frame: Wire) -> int:
    return len(frame) if isinstance(frame, bytes) or frame.isascii() else len(frame.encode())


def _handle_frame(exchange: Exchange, data: Wire, apply: ApplyFrame, connection: sqlite3.Connection) -> Outcome:
    return exchange.handle_frame(connection, data, apply)


def _greet(exchange: Exchange, hello: Hello, connection: sqlite3.Connection) -> Outcome:
    return exchange.greet(connection, hello)
