"""Messages for effects elsewhere: at least once, answered by the application."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from independent_client import IndependentClient, dial, hello_frame, msgs_frame, read
from test_receiver import STREAM, Handler, closed, greeted, listening
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection

from durablews.errors import StorageFailed
from durablews.receiver import Delivery, Receiver


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "server.db"


@pytest.fixture
async def receiver(path: Path) -> AsyncIterator[Receiver]:
    async with Receiver(path) as receiver:
        yield receiver


def number(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        row = connection.execute("SELECT seq FROM durablews_seen").fetchone()
    return row[0] if row else 0


class Handing:
    """A handler that hands each message to the test and waits for it to say what becomes of it."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.messages: asyncio.Queue[Delivery] = asyncio.Queue()
        self.go_on: asyncio.Queue[None] = asyncio.Queue()
        self.errors: asyncio.Queue[Exception] = asyncio.Queue()

    async def __call__(self, websocket: ServerConnection) -> None:
        try:
            async for message in self.receiver.messages(websocket):
                self.messages.put_nowait(message)
                await self.go_on.get()
        except StorageFailed as exc:
            self.errors.put_nowait(exc)

    def release(self) -> None:
        """Let the handler go through all that is left, so that the server can close."""
        for _ in range(10):
            self.go_on.put_nowait(None)

    async def next(self) -> Delivery:
        return await self.messages.get()


@asynccontextmanager
async def talking(handler: Handler) -> AsyncIterator[ClientConnection]:
    async with asyncio.timeout(20), listening(handler) as url:
        try:
            async with greeted(url) as ws:
                yield ws
        finally:
            if isinstance(handler, Handing):
                handler.release()


async def test_everything_arrives_and_repeats_do_not(receiver: Receiver, path: Path) -> None:
    """Acknowledged messages are acked to the client, and a repeat is not delivered again."""
    seen: list[int] = []

    async def handler(websocket: ServerConnection) -> None:
        async for message in receiver.messages(websocket):
            seen.append(message.seq)
            await message.ack()

    async with listening(handler) as url:
        client = IndependentClient(url, STREAM)
        sent = [client.enqueue(i) for i in range(30)]
        await client.drain(batch=7)
        assert number(path) == 30
        async with dial(url) as ws:
            await ws.send(hello_frame(STREAM, 30))
            await read(ws)
            await ws.send(msgs_frame(0, None, [29, 28], [30, 29]))
            assert await read(ws) == {"t": "ack", "p": 0, "s": 30}
    assert seen == sent


async def test_s1_nothing_is_acked_before_the_application_has(receiver: Receiver, path: Path) -> None:
    """S1 and S5: the ack follows the application's within a second, while it works on the next message of the frame."""
    handler = Handing(receiver)
    async with talking(handler) as ws:
        await ws.send(msgs_frame(0, None, [1, 1], [2, 2]))
        answer = asyncio.create_task(read(ws))
        first = await handler.next()
        await (await ws.ping())
        assert not answer.done()
        assert number(path) == 0
        await first.ack()
        handler.go_on.put_nowait(None)
        await handler.next()  # in work, and not acknowledged
        async with asyncio.timeout(1):
            assert await answer == {"t": "ack", "p": 0, "s": 1}
        assert number(path) == 1


async def test_a_message_without_answer_comes_again(receiver: Receiver) -> None:
    """A message that the loop passes over is nacked, and what came before it acked."""
    handler = Handing(receiver)
    async with talking(handler) as ws:
        await ws.send(msgs_frame(0, None, [1, 1], [2, 2], [3, 3]))
        await (await handler.next()).ack()
        handler.go_on.put_nowait(None)
        assert (await handler.next()).seq == 2
        handler.go_on.put_nowait(None)
        assert await read(ws) == {"t": "ack", "p": 0, "s": 1}
        nack = await read(ws)
        assert (nack["t"], nack["s"], nack.get("final")) == ("nack", 2, None)
        await ws.send(msgs_frame(0, 1, [2, 2]))
        assert (await handler.next()).seq == 2


async def test_a_refusal_is_final_or_for_now(receiver: Receiver) -> None:
    """A refused message becomes the client's dead letter, or comes again after the delay."""
    handler = Handing(receiver)
    async with talking(handler) as ws:
        await ws.send(msgs_frame(0, None, [1, 1], [2, 2]))
        await (await handler.next()).refuse("invalid", "no")
        handler.go_on.put_nowait(None)
        assert await read(ws) == {"t": "nack", "p": 0, "s": 1, "final": True, "code": "invalid", "reason": "no"}
        await ws.send(msgs_frame(0, None, [2, 2]))
        await (await handler.next()).refuse("rate", retry=2)
        handler.go_on.put_nowait(None)
        assert await read(ws) == {"t": "nack", "p": 0, "s": 2, "code": "rate", "retry": 2000}


async def test_a_message_is_answered_once(receiver: Receiver) -> None:
    """A second answer to a message, or one that comes too late, is an error."""
    handler = Handing(receiver)
    async with talking(handler) as ws:
        await ws.send(msgs_frame(0, None, [1, 1], [2, 2]))
        first = await handler.next()
        await first.ack()
        with pytest.raises(RuntimeError, match="answered already"):
            await first.refuse()
        handler.go_on.put_nowait(None)
        await handler.next()
        with pytest.raises(RuntimeError, match="answered already"):
            await first.ack()


async def test_what_was_acknowledged_is_kept_when_the_application_leaves(receiver: Receiver, path: Path) -> None:
    """A loop that ends in an error keeps the numbers of what it had acknowledged."""
    left = asyncio.Event()

    async def handler(websocket: ServerConnection) -> None:
        messages = receiver.messages(websocket)
        async for message in messages:
            if message.seq == 2:
                break
            await message.ack()
        await messages.aclose()
        left.set()

    async with talking(handler) as ws:
        await ws.send(msgs_frame(0, None, [1, 1], [2, 2]))
        await left.wait()
        assert number(path) == 1


async def test_s6_an_overtaken_connection_commits_no_number(receiver: Receiver, path: Path) -> None:
    """S6: what an older connection acknowledges after a newer hello does not count, and comes to the newer one."""
    handler = Handing(receiver)
    async with asyncio.timeout(20), listening(handler) as url, greeted(url) as older:
        await older.send(msgs_frame(0, None, [1, 1]))
        first = await handler.next()
        async with greeted(url) as newer:
            await first.ack()
            handler.go_on.put_nowait(None)
            assert (await closed(older))[0] == 4409
            await newer.send(msgs_frame(0, None, [1, 1]))
            assert (await handler.next()).seq == 1
            assert number(path) == 0
        handler.release()


async def test_s3_lost_state_is_raised(receiver: Receiver, path: Path) -> None:
    """S3: a store that lost what it acked closes with 1012 and raises."""
    handler = Handing(receiver)
    async with talking(handler) as ws:
        await ws.send(msgs_frame(0, None, [1, 1]))
        await (await handler.next()).ack()
        handler.go_on.put_nowait(None)
        await read(ws)
        with closing(sqlite3.connect(path)) as vandal:
            vandal.execute("DELETE FROM durablews_seen")
            vandal.commit()
        await ws.send(msgs_frame(0, 1, [2, 2]))
        assert (await closed(ws))[0] == 1012
        assert "lost" in str(await handler.errors.get())


async def test_s4_a_number_that_cannot_be_committed_closes_with_1013(path: Path) -> None:
    """S4: when the store is locked for too long the client is closed with 1013, not nacked: the effect has happened."""
    from durablews.errors import OutboxLocked
    from durablews.receiver import Store

    raised: asyncio.Queue[Exception] = asyncio.Queue()
    async with Store(path, busy_timeout=0.05) as store, Receiver(store) as receiver:

        async def handler(websocket: ServerConnection) -> None:
            try:
                async for message in receiver.messages(websocket):
                    locker.execute("BEGIN IMMEDIATE")
                    await message.ack()
            except OutboxLocked as exc:
                raised.put_nowait(exc)

        with closing(sqlite3.connect(path, isolation_level=None)) as locker:
            async with talking(handler) as ws:
                await ws.send(msgs_frame(0, None, [1, 1]))
                assert (await closed(ws))[0] == 1013
                assert "locked" in str(await raised.get())
