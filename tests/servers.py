"""What the integration tests share: servers to misbehave, receivers to be right, processes to kill, deadlines."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from durablews.receiver import SUBPROTOCOLS, Receiver, Store, select_subprotocol
from durablews.receiver.inbox import inbox_tables, keeper

__all__ = [
    "COMMAND",
    "ENVIRONMENT",
    "FAST",
    "Inbox",
    "PlainServer",
    "Process",
    "inbox_rows",
    "running",
    "silent",
    "until",
    "wait_for",
]

#: Seconds after which a condition that should come true counts as never coming true.
DEADLINE = 20.0
#: Reconnects that a test need not wait for.
# Long enough between two tries for a look at why the last one ended, also on a machine that is busy.
VISIBLE = {"base_delay": 0.3, "max_delay": 0.3, "jitter": 0.0, "connect_timeout": 5}
FAST = {"base_delay": 0.01, "max_delay": 0.05, "connect_timeout": 5}

ENVIRONMENT = {
    **{name: text for name, text in os.environ.items() if not name.startswith("DURABLEWS_")},
    "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), *sys.path])),
}
COMMAND = [sys.executable, "-W", "error", "-m", "durablews"]

# The servers of a test log nothing: a test that looks for secrets in the logs means those of the client.
silent = logging.Logger("silent", logging.CRITICAL)


async def until(condition: Callable[[], object], timeout: float = DEADLINE) -> None:
    """Wait until a condition holds; fail at the deadline."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 - what is waited for is in files and other processes
            await asyncio.sleep(0.003)


async def until_true(condition: Callable[[], Awaitable[object]], timeout: float = DEADLINE) -> None:
    """Wait until a condition that has to be awaited holds; fail at the deadline."""
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.003)


def wait_for(condition: Callable[[], object], timeout: float = DEADLINE) -> None:
    """Wait, without a loop, until a condition holds; fail at the deadline."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the deadline has passed"
        time.sleep(0.003)


# -- in this process


class Inbox:
    """A real `Receiver` with the table of `durablews serve`, on a port that stays the same when it is restarted."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.port = 0

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/"

    @asynccontextmanager
    async def serving(self, **options: Any) -> AsyncIterator[Receiver]:
        keep = keeper()
        path = str(self.store)
        async with Receiver(Store(path, prepare=inbox_tables(path)), **options) as receiver:

            async def handle(websocket: ServerConnection) -> None:
                await receiver.serve(websocket, keep)

            async with serve(
                handle,
                "127.0.0.1",
                self.port,
                subprotocols=[Subprotocol(name) for name in SUBPROTOCOLS],
                select_subprotocol=select_subprotocol,
                logger=silent,
            ) as server:
                self.port = server.sockets[0].getsockname()[1]
                yield receiver

    def rows(self) -> list[tuple[int, int, Any]]:
        """Return priority, sequence and payload of what was applied, in that order."""
        return inbox_rows(self.store)

    def has(self, count: int) -> bool:
        return len(self.rows()) == count

    def payloads(self) -> list[Any]:
        return [payload if isinstance(payload, bytes) else json.loads(payload) for _, _, payload in self.rows()]


def inbox_rows(store: Path) -> list[tuple[int, int, Any]]:
    """Return priority, sequence and payload of what `durablews serve` applied, in that order."""
    if not store.exists():
        return []
    with closing(sqlite3.connect(store)) as connection:
        return list(connection.execute("SELECT priority, seq, payload FROM durablews_inbox ORDER BY id"))


Trouble = Callable[["PlainServer", ServerConnection], Awaitable[None]]


class PlainServer:
    """A durablews.v1.json server in memory, written from PROTOCOL.md; while it has a `trouble` it has that instead.

    Attributes:
        applied: (priority, payload) of every message, in order.
        times: loop times at which connections came, refused handshakes included.
        closes: how the connections ended: close code and reason as this side received them.
    """

    def __init__(self, trouble: Trouble | None = None, *, window: int = 1024) -> None:
        self.trouble = trouble
        #: What the handshake is answered with instead of 101: status and headers.
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.select = True
        self.compression: str | None = None
        self.window = window
        self.applied: list[tuple[int, Any]] = []
        self.seen: dict[tuple[str, int], int] = {}
        self.times: list[float] = []
        self.closes: list[tuple[int, str]] = []
        self.requests: list[Request] = []
        self.frames: list[dict[str, Any]] = []
        self.connections: list[ServerConnection] = []
        self._server: Server | None = None
        self.port = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._server = await serve(
            self._handle,
            "127.0.0.1",
            self.port,
            process_request=self._request,
            select_subprotocol=self._select,
            compression=self.compression,
            logger=silent,
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Break every connection and listen no more."""
        server, self._server = self._server, None
        if server is not None:
            for connection in self.connections:
                connection.transport.abort()
            server.close()
            await server.wait_closed()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/"

    @property
    def payloads(self) -> list[Any]:
        return [payload for _, payload in self.applied]

    def payloads_have(self, payload: Any) -> bool:
        return payload in self.payloads

    def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        self.times.append(asyncio.get_running_loop().time())
        self.requests.append(request)
        if self.refusal is None:
            return None
        status, headers = self.refusal
        response = connection.respond(HTTPStatus(status), "no\n")
        for name, value in headers.items():
            response.headers[name] = value
        return response

    def _select(self, connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
        return Subprotocol("durablews.v1.json") if self.select else None

    async def _handle(self, ws: ServerConnection) -> None:
        self.connections.append(ws)
        try:
            if self.trouble is not None:
                await self.trouble(self, ws)
            else:
                await self.behave(ws)
        except ConnectionClosed:
            pass
        finally:
            self.connections.remove(ws)
            received = ws.protocol.close_rcvd
            if received is not None:
                self.closes.append((received.code, received.reason))

    async def greet(self, ws: ServerConnection, **more: Any) -> str:
        """Take the hello and answer it; return the stream."""
        hello = json.loads(await ws.recv())
        assert hello["t"] == "hello"
        stream = str(hello["stream"])
        await self.say(ws, t="welcome", **{"window": self.window, "max_bytes": 1 << 20, **more})
        return stream

    async def say(self, ws: ServerConnection, **frame: Any) -> None:
        await ws.send(json.dumps(frame))

    async def hear(self, ws: ServerConnection) -> dict[str, Any]:
        """Return the next frame that is one of messages."""
        while True:
            frame: dict[str, Any] = json.loads(await ws.recv())
            if frame["t"] == "msgs":
                self.frames.append(frame)
                return frame

    async def behave(self, ws: ServerConnection) -> None:
        """Do what PROTOCOL.md section 4 says, until the connection ends."""
        stream = await self.greet(ws)
        while True:
            await self.take(ws, stream, await self.hear(ws))

    async def take(self, ws: ServerConnection, stream: str, frame: dict[str, Any]) -> None:
        """Apply one frame, once, and ack it."""
        last = self.seen.get((stream, frame["p"]), 0)
        if frame.get("a", 0) > last:
            return
        for seq, payload, *_ in frame["m"]:
            if seq > last:
                self.applied.append((frame["p"], payload))
                last = seq
        self.seen[stream, frame["p"]] = last
        if frame["m"][0][0] <= last:
            await self.say(ws, t="ack", p=frame["p"], s=last)


# -- in other processes


class Process:
    """A command in a process of its own; what it says goes to files, so that it never waits for a reader."""

    def __init__(self, folder: Path, name: str, command: Sequence[str], **environment: str) -> None:
        self.out = folder / f"{name}.out"
        self.err = folder / f"{name}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**ENVIRONMENT, **environment}
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def first_line(self) -> str:
        """Wait for the first line of its standard output and return it."""
        wait_for(lambda: b"\n" in self.out.read_bytes() or not self.running)
        line, newline, _ = self.out.read_text().partition("\n")
        assert newline, f"ended with {self.popen.returncode}: {self.err.read_text()}"
        return line

    def end(self, number: int | None = None, timeout: float = DEADLINE) -> tuple[int, str]:
        """Send a signal, if one is given, wait, and return the exit code and what stderr holds."""
        if number is not None:
            self.popen.send_signal(number)
        code = self.popen.wait(timeout)
        return code, self.err.read_text()

    def kill(self) -> None:
        """End it as a power cut does."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()


@contextmanager
def running(folder: Path, name: str, command: Sequence[str], **environment: str) -> Iterator[Process]:
    """Run a command for as long as the block does; then it is killed."""
    process = Process(folder, name, command, **environment)
    try:
        yield process
    finally:
        process.kill()
