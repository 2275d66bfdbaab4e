"""The servers that `tools/bench` measures against, each a process of its own: ``python bench_servers.py KIND``.

Each prints its address first. When its standard input ends it prints one JSON object and ends: `frames` and `messages`
that it took, and `p50`: the median of the seconds from the moment that is written in a message to its arrival here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from websockets.asyncio.server import ServerConnection, serve

from durablews.receiver import ledger, select_subprotocol
from durablews.receiver.exchange import Exchange
from durablews.receiver.session import Session
from durablews.wire.frames import Ack, Codec, Hello, Item, Msgs, Welcome

__all__ = ["ServerFailed", "Serving", "serving", "stamped"]

_WINDOW = 1024
_STAMP = struct.Struct(">Q")


class ServerFailed(Exception):
    """A server did not start."""


def stamped(size: int) -> bytes:
    """Return a message that says when it was made. All processes of a Linux machine share this clock."""
    return _STAMP.pack(time.monotonic_ns()) + bytes(size - _STAMP.size)


class _Taken:
    """What a server has taken so far."""

    def __init__(self, clock: bool) -> None:
        self.frames = self.messages = 0
        self._clock = clock
        self._delays: list[float] = []

    def frame(self, payloads: Sequence[str | bytes], arrived: int) -> None:
        self.frames += 1
        self.messages += len(payloads)
        if self._clock:
            # What is too short for a moment is there to warm up.
            made = [_STAMP.unpack_from(each)[0] for each in payloads if isinstance(each, bytes) and len(each) > 8]
            self._delays += [(arrived - each) / 1e9 for each in made]

    def report(self) -> dict[str, Any]:
        p50 = statistics.median(self._delays) if self._delays else None
        return {"frames": self.frames, "messages": self.messages, "p50": p50}


Handler = Callable[[ServerConnection], Awaitable[None]]


def raw(taken: _Taken, every: int) -> Handler:
    """Take any frames and answer every `every`-th with their number."""

    async def handle(websocket: ServerConnection) -> None:
        async for data in websocket:
            taken.frame([data], time.monotonic_ns())
            if taken.frames % every == 0:
                await websocket.send(str(taken.frames))

    return handle


def receiver(taken: _Taken, every: int) -> Handler:
    """Take what a client sends, once each and in order, by the library's own rules with its numbers in memory."""
    numbers = sqlite3.connect(":memory:", isolation_level=None)
    ledger.install(numbers)

    def count(connection: sqlite3.Connection, stream: str, priority: int, items: Sequence[Item]) -> None:
        taken.frame([item.payload for item in items], time.monotonic_ns())

    async def handle(websocket: ServerConnection) -> None:
        exchange = Exchange(Session(Codec(websocket.subprotocol or ""), window=_WINDOW, max_bytes=2**20))
        async for data in websocket:
            for frame in exchange.handle_frame(numbers, data, count).frames:
                await websocket.send(frame)

    return handle


def plain(taken: _Taken, every: int) -> Handler:
    """Check the order of what a client sends, no more, and acknowledge every `every`-th frame.

    As little as a server of durablews.v1 can do, so that with a frame a message it is the client that is measured.
    """

    async def handle(websocket: ServerConnection) -> None:
        codec, last = Codec(websocket.subprotocol or ""), 0

        async def answer(frame: Welcome | Ack) -> None:
            await websocket.send(codec.encode(frame), text=codec.text)

        async for data in websocket:
            arrived = time.monotonic_ns()
            frame = codec.decode_client(data)
            if isinstance(frame, Hello):
                await answer(Welcome(_WINDOW, 2**20))
            elif isinstance(frame, Msgs):
                if frame.items[0].seq <= last:
                    raise SystemExit(f"sequence {frame.items[0].seq} after {last}")
                last = frame.items[-1].seq
                taken.frame([item.payload for item in frame.items], arrived)
                if taken.frames % every == 0:
                    await answer(Ack(frame.priority, last))

    return handle


_KINDS: dict[str, Callable[[_Taken, int], Handler]] = {"raw": raw, "receiver": receiver, "plain": plain}


# -- from the side that starts them


class Serving:
    """A server that runs."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self._process = process
        self.url = url

    def report(self) -> dict[str, Any]:
        """End a server of this module and return what it took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        said = self._process.stdout.read()
        if not said:
            raise ServerFailed("the server had ended before it was asked what it took")
        report: dict[str, Any] = json.loads(said)
        return report


@contextmanager
def serving(*args: str, command: Sequence[str] | None = None) -> Iterator[Serving]:
    """Run a server of this module, or `command`, which prints its address first as well; and end it.

    Raises:
        ServerFailed: it printed none.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command or [sys.executable, __file__, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            url = process.stdout.readline().strip()
            if not url:
                errors.seek(0)
                said = errors.read().strip().splitlines()
                raise ServerFailed(f"a server did not start: {said[-1] if said else 'it said nothing'}")
            yield Serving(process, url)
        finally:
            process.stdin.close()
            process.terminate()
            process.wait()
            process.stdout.close()


# -- the process


async def _run(kind: str, every: int, clock: bool) -> None:
    taken = _Taken(clock)
    handler = _KINDS[kind](taken, every)
    select = None if kind == "raw" else select_subprotocol
    async with serve(handler, "127.0.0.1", 0, compression=None, max_size=None, select_subprotocol=select) as server:
        print(f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    print(json.dumps(taken.report()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=_KINDS)
    parser.add_argument("--every", type=int, default=64, help="answer every so many frames")
    parser.add_argument("--clock", action="store_true", help="messages say when they were made")
    args = parser.parse_args()
    asyncio.run(_run(args.kind, args.every, args.clock))


if __name__ == "__main__":
    main()
