"""The owner's policies hold for what a client has read ahead, and who waits is told the truth."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import until
from websockets.asyncio.server import ServerConnection, serve

import durablews
from durablews import Undelivered
from durablews.messages import Refusal
from durablews.settlement import refuse


class Paused:
    """A server, written from the protocol alone, that takes nothing until it is told to."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.asked = asyncio.Event()
        self._socket: ServerConnection | None = None

    async def handle(self, websocket: ServerConnection) -> None:
        self._socket = websocket
        async for data in websocket:
            frame = json.loads(data)
            if frame["t"] == "hello":
                await websocket.send('{"t":"welcome","window":0,"max_bytes":1048576}')
                self.asked.set()
            elif frame["t"] == "msgs":
                self.taken += [payload for _, payload, *_ in frame["m"]]
                await websocket.send(json.dumps({"t": "ack", "p": frame["p"], "s": frame["m"][-1][0]}))

    async def go(self) -> None:
        assert self._socket is not None
        await self._socket.send('{"t":"flow","window":100}')

    async def push(self, text: str) -> None:
        assert self._socket is not None
        await self._socket.send('{"t":"push","d":' + text + "}")


@asynccontextmanager
async def paused() -> AsyncIterator[tuple[str, Paused]]:
    server = Paused()
    async with serve(server.handle, "127.0.0.1", 0, subprotocols=["durablews.v1.json"]) as listening:  # type: ignore[list-item]
        yield f"ws://127.0.0.1:{next(iter(listening.sockets)).getsockname()[1]}", server


async def test_drop_oldest_takes_what_was_only_read_ahead(tmp_path: Path) -> None:
    """P2: nothing is in flight, so the oldest make room although the client had read them; the newest arrive."""
    caps = {"max_messages": 100, "overflow": "drop_oldest"}
    async with (
        paused() as (url, server),
        durablews.connect(url, tmp_path / "agent.db", caps=caps, delivery={"drain_timeout": 0}) as ws,
    ):
        await ws.send_many(range(100))
        await server.asked.wait()
        await until(lambda: ws._manager._attempts.delivery._backlog.waiting)  # type: ignore[union-attr]
        for number in range(100, 120):
            await ws.send(number)
        counts = await ws.stats()
        assert (counts.pending, counts.dropped) == (100, 20)
        await server.go()
        assert await ws.flush(10)
        assert server.taken == list(range(20, 120))


async def test_what_was_read_ahead_expires(tmp_path: Path) -> None:
    """P2: a ttl counts as well for what waits in memory while the server takes nothing; it is never sent."""
    async with (
        paused() as (url, server),
        durablews.connect(url, tmp_path / "agent.db", delivery={"drain_timeout": 0}) as ws,
    ):
        receipt = await ws.send("stale", ttl=0.2)
        with pytest.raises(durablews.Expired):
            await receipt.acked(10)
        await ws.send("fresh")
        await server.go()
        assert await ws.flush(10)
        assert server.taken == ["fresh"]


async def test_a_receipt_does_not_take_the_forgotten_for_acknowledged(tmp_path: Path) -> None:
    """P2: when ten thousand others have left without an ack since, a receipt says that it no longer knows."""
    async with durablews.Outbox(tmp_path / "agent.db") as outbox:
        receipt = await outbox.send("refused")
        await outbox.send_many(range(10_100))

        def bury(connection: Any) -> None:
            for seq in range(1, 10_102):
                refuse(connection, seq, Refusal("invalid"), 0)

        await outbox.storage.change(bury)
        assert (await outbox.counts()).dead_dropped == 101
        with pytest.raises(Undelivered, match="no longer known") as told:
            await receipt.acked(10)
        assert told.value.unknown


@pytest.mark.parametrize("ends", ["exhausted", "closed"])
async def test_flush_ends_when_emptiness_is_not_to_be(tmp_path: Path, ends: str) -> None:
    """P8: who waits for an empty outbox without a timeout is told False when the client gives up or is closed."""
    reconnect = {"max_retries": 0} if ends == "exhausted" else {}
    nowhere = "ws://127.0.0.1:9"
    client = durablews.connect(nowhere, tmp_path / "agent.db", reconnect=reconnect, delivery={"drain_timeout": 0})
    async with asyncio.timeout(20), client as ws:
        await ws.send("waits")
        flushing = asyncio.create_task(ws.flush())
        await asyncio.sleep(0)  # let it begin
        if ends == "exhausted":
            assert await flushing is False
    async with asyncio.timeout(20):
        assert await flushing is False


async def test_a_push_that_python_cannot_hold_does_not_end_the_iteration(tmp_path: Path) -> None:
    """C10: valid JSON such as 1e400 is left out and counted; what follows it arrives."""
    async with (
        paused() as (url, server),
        durablews.connect(url, tmp_path / "agent.db") as ws,
    ):
        await server.asked.wait()
        await server.push("1e400")
        await server.push('"good"')
        async with asyncio.timeout(10):
            assert await anext(aiter(ws)) == "good"
        assert (await ws.stats()).pushes_dropped == 1
