"""A durablews.v1.json server written from PROTOCOL.md alone: plain `websockets` and `json`, nothing of durablews.

    python independent_server.py STATE_FILE [PORT]

Prints its port. What it applied and its numbers are in STATE_FILE, written whole under another name and renamed before
anything is acked. It cuts every connection after a number of frames that grows, with the ack unsent every other time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

CUTS = 12


class Server:
    def __init__(self, path: str) -> None:
        self.path = path
        self.state: dict[str, Any] = {"seen": {}, "applied": [], "connections": 0}
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                self.state = json.load(file)
        self.newest: dict[str, ServerConnection] = {}

    def save(self) -> None:
        made = f"{self.path}.new"
        with open(made, "w", encoding="utf-8") as file:
            json.dump(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, self.path)

    async def handle(self, ws: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self.serve(ws)

    async def serve(self, ws: ServerConnection) -> None:
        hello = json.loads(await ws.recv())
        if hello["t"] != "hello":
            await ws.close(4400)
            return
        stream = hello["stream"]
        older, self.newest[stream] = self.newest.get(stream), ws
        if older is not None:
            older.transport.abort()
        self.state["connections"] += 1
        number = self.state["connections"]
        await ws.send(json.dumps({"t": "welcome", "window": 64, "max_bytes": 65536}))
        frames = 0
        async for data in ws:
            frame = json.loads(data)
            if frame["t"] != "msgs":
                continue
            if self.newest[stream] is not ws:
                return
            frames += 1
            answer = self.take(stream, frame)
            if number <= CUTS and frames == number:
                if number % 2 and answer is not None:
                    await ws.send(json.dumps(answer))
                ws.transport.abort()
                return
            if answer is not None:
                await ws.send(json.dumps(answer))

    def take(self, stream: str, frame: dict[str, Any]) -> dict[str, Any] | None:
        key = f"{stream} {frame['p']}"
        last = self.state["seen"].get(key, 0)
        if frame.get("a", 0) > last:
            return None
        for seq, payload, *_ in frame["m"]:
            if seq > last:
                self.state["applied"].append([frame["p"], payload])
                last = seq
        self.state["seen"][key] = last
        self.save()
        return {"t": "ack", "p": frame["p"], "s": last} if frame["m"][0][0] <= last else None


async def main() -> None:
    server = Server(sys.argv[1])
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    names = [Subprotocol("durablews.v1.json")]
    async with serve(server.handle, "127.0.0.1", port, subprotocols=names, max_size=65536) as listening:
        print(listening.sockets[0].getsockname()[1], flush=True)  # noqa: T201 - who started it reads this
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
