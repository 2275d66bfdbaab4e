"""What the receiver says on its own, and how blocks, connections and the receiver itself end."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from independent_client import dial, hello_frame, msgs_frame, read
from test_receiver import STREAM, applied, applying, closed, greeted, listening, path, receiver
from websockets.asyncio.server import ServerConnection, serve

from durablews.errors import (
    OutboxClosed,
    PayloadError,
)
from durablews.receiver import Receiver, select_subprotocol

__all__ = ["path", "receiver"]  # fixtures


async def test_pushes_go_to_the_newest_connection(receiver: Receiver) -> None:
    """A push reaches the stream's connection; without one, or over the client's limit, the caller is told."""
    assert await receiver.push(STREAM, {"a": 1}) is False
    async with listening(applying(receiver)) as url:
        async with greeted(url, max_bytes=100) as ws:
            assert await receiver.push(STREAM, {"a": 1}) is True
            assert await read(ws) == {"t": "push", "d": {"a": 1}}
            assert await receiver.push(STREAM, b"\x00") is True
            assert await read(ws) == {"t": "push", "d": "AA==", "b": 1}
            with pytest.raises(PayloadError, match="this client takes 100"):
                await receiver.push(STREAM, "x" * 200)
        assert await receiver.push(STREAM, {"a": 1}) is False


async def test_flow_gives_a_new_window(receiver: Receiver) -> None:
    """A new window is told to who is connected and to who comes later."""
    async with listening(applying(receiver)) as url:
        async with greeted(url) as ws:
            assert await receiver.flow(0) == 1
            assert await read(ws) == {"t": "flow", "window": 0}
            assert await receiver.flow(3, stream="cd" * 16) == 0
            assert await receiver.flow(3, stream=STREAM) == 1
            assert await read(ws) == {"t": "flow", "window": 3}
        async with dial(url) as ws:
            await ws.send(hello_frame(STREAM))
            assert (await read(ws))["window"] == 0


async def test_a_client_that_pings_is_answered(receiver: Receiver) -> None:
    """A ping frame is answered by a pong frame."""
    async with listening(applying(receiver)) as url, greeted(url) as ws:
        await ws.send(json.dumps({"t": "ping", "n": 4}))
        assert await read(ws) == {"t": "pong", "n": 4}


async def test_a_rewound_client_goes_on_with_a_new_stream(receiver: Receiver, path: Path) -> None:
    """Section 5: rewound, then hello with a new stream on the same connection."""
    async with listening(applying(receiver)) as url:
        async with greeted(url) as ws:
            await ws.send(msgs_frame(0, None, [900, 1]))
            await read(ws)
        async with dial(url) as ws:
            await ws.send(hello_frame(STREAM, 20))
            assert (await read(ws))["rewound"] is True
            assert await receiver.push(STREAM, 1) is False
            await ws.send(hello_frame("cd" * 16, 20))
            assert "rewound" not in await read(ws)
            await ws.send(msgs_frame(0, None, [20, 1]))
            assert (await read(ws))["t"] == "ack"
            assert await receiver.push("cd" * 16, 1) is True
    assert applied(path) == [900, 20]


async def test_the_receiver_closes_what_is_open(path: Path) -> None:
    """Leaving the receiver closes its connections with 1001 and the store, and is usable no more."""
    async with Receiver(path) as receiver:
        server = await serve(applying(receiver), "127.0.0.1", 0, select_subprotocol=select_subprotocol)
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ws = await dial(url)
        await ws.send(hello_frame(STREAM))
        await read(ws)
    assert (await closed(ws))[0] == 1001
    with pytest.raises(OutboxClosed):
        await receiver.push(STREAM, 1) or receiver.store.connection
    server.close()
    await server.wait_closed()


async def test_a_cancelled_block_leaves_no_open_transaction(receiver: Receiver, path: Path) -> None:
    """A handler that is cancelled inside its block, at any point, leaves the store free for the others."""
    inside = asyncio.Event()
    tasks: list[asyncio.Task[Any]] = []

    async def handler(websocket: ServerConnection) -> None:
        if tasks:
            await applying(receiver)(websocket)
            return
        tasks.append(asyncio.current_task())  # type: ignore[arg-type]
        async for batch in receiver.session(websocket):
            async with batch.applying() as connection:
                await connection.execute("INSERT INTO applied (seq) VALUES (1)")
                inside.set()
                await asyncio.Event().wait()

    async with listening(handler) as url:
        async with greeted(url) as ws:
            await ws.send(msgs_frame(0, None, [1, 1]))
            await inside.wait()
            tasks[0].cancel()
            await ws.wait_closed()
        async with greeted(url) as ws:
            await ws.send(msgs_frame(0, None, [1, 1]))
            assert (await read(ws))["t"] == "ack"
    assert applied(path) == [1]


async def test_a_timeout_in_the_block_is_a_failure(receiver: Receiver, path: Path) -> None:
    """A block that is timed out by its application is rolled back and nacked, and the session goes on."""
    slow = True

    async def handler(websocket: ServerConnection) -> None:
        async for batch in receiver.session(websocket):
            try:
                async with asyncio.timeout(0.05 if slow else None), batch.applying() as connection:
                    for message in batch:
                        await connection.execute("INSERT INTO applied (seq) VALUES (?)", (message.seq,))
                    if slow:
                        await asyncio.Event().wait()
            except TimeoutError:
                pass

    async with listening(handler) as url, greeted(url) as ws:
        await ws.send(msgs_frame(0, None, [1, 1]))
        assert (await read(ws))["t"] == "nack"
        slow = False
        await ws.send(msgs_frame(0, None, [1, 1]))
        assert (await read(ws))["t"] == "ack"
    assert applied(path) == [1]
