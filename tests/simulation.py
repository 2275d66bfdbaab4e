"""What a simulated machine has instead of a clock, a disk's thread and a network: each does one thing when told to.

The library's own tasks run on `SimulatedLoop`, whose time stands still until somebody sets it. A job of the outbox
waits in `DiskThread` until `work` runs it, on a real SQLite connection. A frame waits in `SimulatedSocket` for `read`.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from websockets.exceptions import ConnectionClosedError
from websockets.frames import Close

__all__ = ["DiskThread", "SimulatedLoop", "SimulatedSocket", "Violation"]


class Violation(AssertionError):
    """A promise was broken."""


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop that runs what is ready, and then returns. What is meant for other threads it does at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        #: What nobody caught: a defect.
        self.defects: list[str] = []
        self.set_exception_handler(lambda _, context: self.defects.append(f"{context}"))

    def time(self) -> float:
        return self.now

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as exc:
            future.set_exception(exc)
        return future

    @property
    def next_timer(self) -> float | None:
        """When something is to happen by itself; None: never."""
        scheduled = [handle._when for handle in self._scheduled if not handle._cancelled]  # type: ignore[attr-defined]
        return min(scheduled, default=None)

    def run_until_idle(self) -> None:
        """Run what is ready, and what that makes ready, until all tasks wait."""
        for _ in range(10_000):
            self.call_soon(self.stop)
            self.run_forever()
            timer = self.next_timer
            if not self._ready and (timer is None or timer > self.now):  # type: ignore[attr-defined]
                return
        raise Violation("P8: somebody is kept busy for nothing")

    def kill(self) -> None:
        """End every task, as the end of a process does; whatever they do on their way out must reach nobody."""
        for _ in range(20):
            tasks = asyncio.all_tasks(self)
            if not tasks:
                return
            for task in tasks:
                task.cancel()
            self.run_until_idle()
        raise Violation(f"P7: tasks that cannot be cancelled: {asyncio.all_tasks(self)}")


class DiskThread:
    """An `aiosqlite.Connection` as `durablews.jobs.run_job` needs it: jobs wait for `work`."""

    def __init__(self, connection: sqlite3.Connection, loop: SimulatedLoop) -> None:
        self.connection, self._loop = connection, loop
        self.jobs: deque[tuple[Callable[[sqlite3.Connection], Any], asyncio.Future[Any]]] = deque()
        self.dead = False

    def execute_fetchall(self, job: Callable[[sqlite3.Connection], Any]) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        if not self.dead:
            self.jobs.append((job, future))
        return future

    def work(self) -> None:
        """Run the next job to its end. Its caller hears of it when the loop runs."""
        job, future = self.jobs.popleft()
        try:
            result = job(self.connection)
        except Exception as exc:
            if not future.done():
                future.set_exception(exc)
        else:
            if not future.done():
                future.set_result(result)

    def die(self) -> None:
        """End as a killed process does: what was begun is not committed, what waits is not begun."""
        self.dead = True
        self.jobs.clear()
        self.connection.close()

    async def close(self) -> None:
        self.die()

    def stop(self) -> None:
        self.die()


class SimulatedSocket:
    """The client's end of a WebSocket, as `attempt` and `link` use it.

    `to_server` and `to_client` are on their way. `sent` is called with each frame as it is handed over.
    """

    response = None

    def __init__(self, loop: SimulatedLoop, subprotocol: str, sent: Callable[[str | bytes], None]) -> None:
        self.subprotocol = subprotocol
        self._loop, self._sent = loop, sent
        self._arrived: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self.to_server: deque[str | bytes] = deque()
        #: Frames, or how the server closes.
        self.to_client: deque[str | bytes | Close] = deque()
        self.protocol = SimpleNamespace(
            close_rcvd=None,
            close_sent=None,
            send_text=lambda frame: self._hand_over(frame.decode()),
            send_binary=self._hand_over,
            data_to_send=list,
        )
        self.transport = SimpleNamespace(
            abort=self.lose, get_write_buffer_size=lambda: 0, get_extra_info=lambda name: None, write=bytes
        )
        self.lost = False

    # -- what the library calls

    async def recv(self) -> str | bytes:
        if not self.lost:
            data = await self._arrived.get()
            if data is not None:
                return data
        raise ConnectionClosedError(self.protocol.close_rcvd, self.protocol.close_sent)

    async def send(self, frame: bytes, text: bool) -> None:
        async with self.send_context():
            self._hand_over(frame.decode() if text else frame)

    @asynccontextmanager
    async def send_context(self) -> AsyncIterator[None]:
        if self.lost:
            raise ConnectionClosedError(None, None)
        yield

    def _hand_over(self, data: str | bytes) -> None:
        self._sent(data)
        self.to_server.append(data)

    async def ping(self) -> asyncio.Future[float]:
        pong: asyncio.Future[float] = self._loop.create_future()
        pong.set_result(0.01)
        return pong

    async def close(self, code: int, reason: str) -> None:
        self.lose()

    # -- what the network does

    def read(self) -> None:
        """Let the next frame arrive at the client."""
        frame = self.to_client.popleft()
        if isinstance(frame, Close):
            self.protocol.close_rcvd = frame
            self.lose()
        elif not self.lost:
            self._arrived.put_nowait(frame)

    def lose(self) -> None:
        """End the connection for the client. What it has sent may still reach the server."""
        if not self.lost:
            self.lost = True
            self.to_client.clear()
            self._arrived.put_nowait(None)
