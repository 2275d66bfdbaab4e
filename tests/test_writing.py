"""Messages that are written together arrive as they would one by one."""

from __future__ import annotations

import asyncio

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from durablews.writing import queued_bytes, write_messages

# Empty, of one byte, and around the lengths at which a frame's header grows (RFC 6455, section 5.2).
MESSAGES = [
    b"",
    b"a",
    *(b"%d" % size + b"x" * (size - len(str(size))) for size in (125, 126, 65_535, 65_536)),
    "ü".encode(),
]


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("text", [True, False])
async def test_messages_written_together_arrive_apart_and_in_order(text: bool, compression: str | None) -> None:
    arrived: list[str | bytes] = []

    async def take(websocket: ServerConnection) -> None:
        arrived.extend([message async for message in websocket])

    async with serve(take, "127.0.0.1", 0, compression=compression) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with connect(f"ws://127.0.0.1:{port}", compression=compression) as websocket:
            await write_messages(websocket, MESSAGES, text=text)
            await write_messages(websocket, MESSAGES[1:2], text=text)
            await write_messages(websocket, MESSAGES * 20, text=text)
        server.close()
        await server.wait_closed()

    expected = MESSAGES + MESSAGES[1:2] + MESSAGES * 20
    assert arrived == ([message.decode() for message in expected] if text else expected)


async def test_writing_to_a_connection_that_ended_says_so() -> None:
    async def leave(websocket: ServerConnection) -> None:
        await websocket.close(4000)

    async with serve(leave, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with connect(f"ws://127.0.0.1:{port}") as websocket:
            await websocket.wait_closed()
            with pytest.raises(ConnectionClosed) as closed:
                await write_messages(websocket, [b"one", b"two"], text=True)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4000


async def test_a_server_that_reads_nothing_holds_up_who_writes_and_shows_as_queued() -> None:
    go_on = asyncio.Event()
    arrived = 0

    async def wait(websocket: ServerConnection) -> None:
        nonlocal arrived
        await go_on.wait()
        async for message in websocket:
            arrived += len(message)

    async with serve(wait, "127.0.0.1", 0, compression=None, max_queue=1) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with connect(f"ws://127.0.0.1:{port}", compression=None) as websocket:
            frames = [bytes(1024 * 1024)] * 64
            writing = asyncio.create_task(write_messages(websocket, frames, text=False))
            await asyncio.wait([writing], timeout=0.5)
            assert not writing.done()
            assert queued_bytes(websocket) > 32 * 1024 * 1024
            go_on.set()
            await asyncio.wait_for(writing, 60)
        server.close()
        await server.wait_closed()
    assert arrived == 64 * 1024 * 1024
