"""One client through very many messages and reconnects, and what it takes afterwards: memory, descriptors, files.

    python tests/leaks.py --messages 1000000 --reconnects 10000 [--build NAME]

prints a line for each sample on stderr and one line of JSON on stdout. The receiver is a real one in a process of its
own, watched as well. What grows between the first tenth and the end is a leak: the first tenth fills what is cached.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from broken_builds import BUILDS
from servers import silent
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

from durablews.client import Client, connect
from durablews.receiver import SUBPROTOCOLS, Receiver, select_subprotocol

__all__ = ["LIMITS", "run"]

_TENTHS = 10
#: Messages in one transaction, and how many may wait before it is waited for the server.
_TOGETHER, _BACKLOG = 500, 5000
_PATIENCE = 120.0
#: What may grow after the first tenth, by so much: resident bytes of either process (a leak of 100 bytes a message is
#: 10 MB here, one of 10 kB a connection as well), files by what the log takes more or less; nothing else may.
LIMITS = {
    "messages": {"client_rss": 2 << 20, "receiver_rss": 2 << 20, "files": 8 << 20},
    "reconnects": {"client_rss": 1 << 20, "receiver_rss": 1 << 20, "files": 8 << 20},
}
_CUT = b"cut"

Sample = dict[str, int]


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def size_of(folder: Path, name: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{name}*"))


async def receive(store: Path, listening: socket.socket) -> None:
    """Take everything, keep nothing but the numbers; cut the connection after each frame that asks for it."""
    cuts = 0

    async def handle(websocket: ServerConnection) -> None:
        nonlocal cuts
        async for batch in receiver.session(websocket):
            async with batch.applying():
                cut = _CUT in [message.raw for message in batch]
            if cut:
                cuts += 1
                if cuts % 2:
                    websocket.transport.abort()
                else:
                    await websocket.close(1001)

    async with (
        Receiver(store) as receiver,
        serve(
            handle,
            sock=listening,
            subprotocols=[Subprotocol(name) for name in SUBPROTOCOLS],
            select_subprotocol=select_subprotocol,
            logger=silent,
        ),
    ):
        await asyncio.get_running_loop().create_future()


class Run:
    """One client's life, with a look at what it takes after every tenth."""

    def __init__(self, folder: Path, receiver: int) -> None:
        self._folder, self._receiver = folder, receiver
        self.samples: dict[str, list[Sample]] = {"messages": [], "reconnects": []}

    async def run(self, url: str, messages: int, reconnects: int) -> None:
        settings: dict[str, Any] = {"base_delay": 0.001, "max_delay": 0.005}
        async with connect(url, self._folder / "agent.db", reconnect=settings, proxy=None) as ws:
            for _ in range(_TENTHS):
                await self._send(ws, messages // _TENTHS)
                await self._look(ws, "messages")
            for _ in range(_TENTHS):
                await self._reconnect(ws, reconnects // _TENTHS)
                await self._look(ws, "reconnects")

    async def _send(self, ws: Client, count: int) -> None:
        for first in range(0, count, _TOGETHER):
            payloads = [{"number": first + i, "reading": "x" * 100} for i in range(min(_TOGETHER, count - first))]
            await ws.send_many(payloads)
            if first % _BACKLOG == 0 and not await ws.flush(_PATIENCE):
                raise TimeoutError("not everything was acknowledged")

    async def _reconnect(self, ws: Client, count: int) -> None:
        for _ in range(count):
            before = (await ws.stats()).connects
            await ws.send(_CUT)
            async with asyncio.timeout(_PATIENCE):
                while (await ws.stats()).connects == before:  # noqa: ASYNC110 - nothing else says it
                    await asyncio.sleep(0.001)

    async def _look(self, ws: Client, part: str) -> None:
        if not await ws.flush(_PATIENCE):
            raise TimeoutError("not everything was acknowledged")
        gc.collect()
        pid = os.getpid()
        seen: list[Sample] = []
        for _ in range(5):  # the least of some: a ping, a handshake or a look at the files is under way now and then
            await asyncio.sleep(0.02)
            seen.append(
                {
                    "client_rss": resident(pid),
                    "client_descriptors": descriptors(pid),
                    "client_threads": threading.active_count(),
                    "client_tasks": len(asyncio.all_tasks()),
                    "receiver_rss": resident(self._receiver),
                    "receiver_descriptors": descriptors(self._receiver),
                    "files": size_of(self._folder, "agent.db") + size_of(self._folder, "store.db"),
                }
            )
        sample = {name: min(one[name] for one in seen) for name in seen[0]}
        self.samples[part].append(sample)
        print(part, len(self.samples[part]), json.dumps(sample), file=sys.stderr)  # noqa: T201


def growth(samples: Sequence[Sample]) -> Sample:
    """Return what there is more at the end (the least of the last three looks) than after the first tenth."""
    first = samples[0]
    return {name: min(sample[name] for sample in samples[-3:]) - first[name] for name in first}


def run(folder: Path, *, messages: int, reconnects: int, build: str = "genuine") -> dict[str, Any]:
    """Run it all and return what has grown, and by how much too much."""
    BUILDS[build]()
    started = time.monotonic()
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    receiver = os.fork()
    if receiver == 0:
        try:
            asyncio.run(receive(folder / "store.db", listening))
        finally:
            os._exit(1)
    url = f"ws://127.0.0.1:{listening.getsockname()[1]}/"
    listening.close()
    life = Run(folder, receiver)
    try:
        asyncio.run(life.run(url, messages, reconnects))
    finally:
        os.kill(receiver, signal.SIGKILL)
        os.waitpid(receiver, 0)
    grown = {part: growth(samples) for part, samples in life.samples.items()}
    findings = [
        f"{name} grew by {by} in the {part}"
        for part, growths in grown.items()
        for name, by in growths.items()
        if by > LIMITS[part].get(name, 0)
    ]
    seconds = round(time.monotonic() - started, 1)
    return {"messages": messages, "reconnects": reconnects, "seconds": seconds, "grown": grown, "findings": findings}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--reconnects", type=int, default=1000)
    parser.add_argument("--build", choices=BUILDS, default="genuine")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = run(Path(name), messages=args.messages, reconnects=args.reconnects, build=args.build)
    print(json.dumps(report))  # noqa: T201
    return 1 if report["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
