"""One client's WebSocket as the receiver uses it: end of connection as a value, closing without waiting.

Works with any object that has what `WebSocket` lists, as the connections of `websockets` have. Knows nothing of frames.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from durablews.receiver.exchange import Exchange
from durablews.receiver.session import Close, Wire
from durablews.wire.frames import JSON, MSGPACK

__all__ = ["Link", "WebSocket", "select_subprotocol"]


class WebSocket(Protocol):
    """What the receiver asks of a server's WebSocket; `websockets.asyncio.server.ServerConnection` has it."""

    @property
    def subprotocol(self) -> str | None:
        """Return the subprotocol that was selected."""

    @property
    def close_code(self) -> int | None:
        """Return the code with which it was closed; None while it is open."""

    async def recv(self) -> str | bytes:
        """Return the next message; raise, with `close_code` set, when the connection is closed."""

    async def send(self, message: str | bytes, /) -> None:
        """Send a message: text when it is a str."""

    async def close(self, code: int, reason: str) -> None:
        """Close the connection, waiting for the other side in bounds."""


def select_subprotocol(connection: Any, offered: Sequence[Any]) -> Any:
    """Choose the encoding: MessagePack where the client can, else JSON; None when it speaks neither.

    For `websockets.serve(select_subprotocol=…)`. A client that is selected nothing for closes and says so (PROTOCOL.md
    section 1).
    """
    return next((name for name in (MSGPACK, JSON) if name in offered), None)


class Link:
    """One connection of one client.

    Args:
        closings: where the tasks are kept that close connections, until they end.
        hello_by: the loop time until which it must have said hello.
    """

    def __init__(
        self, websocket: WebSocket, exchange: Exchange, closings: set[asyncio.Task[None]], hello_by: float
    ) -> None:
        self.websocket = websocket
        self.exchange = exchange
        #: Under which stream it is registered for pushes; None before hello.
        self.stream: str | None = None
        self.hello_by = hello_by
        self._closings = closings
        self._closing: asyncio.Task[None] | None = None

    @property
    def closed(self) -> bool:
        """Return whether it is closed or about to be: nothing more is to be read from it."""
        return self._closing is not None or self.websocket.close_code is not None

    async def receive(self) -> Wire | None:
        """Return the next WebSocket message; None when the connection is over."""
        if self._closing is not None:
            return None
        try:
            data = await self.websocket.recv()
        except Exception:
            # The receiver imports no WebSocket library, so it knows "closed" by the connection, not by the class.
            if self.websocket.close_code is None:
                raise
            return None
        # A newer connection of the stream may have closed this one while it waited (S6).
        return None if self._closing is not None else data

    async def send(self, frames: Iterable[Wire]) -> bool:
        """Send frames in order; return False when the connection was over before the last one."""
        for frame in frames:
            if self.closed:
                return False
            try:
                await self.websocket.send(frame)
            except Exception:
                if not self.closed:
                    raise
                return False
        return True

    def close_soon(self, close: Close) -> None:
        """Send a close frame without waiting for its answer; the first reason wins."""
        if self._closing is None:
            task = asyncio.create_task(self.websocket.close(close.code, close.reason), name="durablews close")
            self._closing = task
            self._closings.add(task)
            task.add_done_callback(self._closed)

    async def wait_closed(self) -> None:
        """Wait for a close that was begun here."""
        if self._closing is not None:
            await asyncio.wait([self._closing])

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._closings.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            # Nobody awaits this task: hand the error to the loop, which shows it.
            context = {"message": "closing a durablews connection failed", "exception": exc}
            task.get_loop().call_exception_handler(context)
