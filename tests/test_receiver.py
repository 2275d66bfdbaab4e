"""The receiver on real WebSockets and a real file."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from independent_client import IndependentClient, dial, hello_frame, msgs_frame, read
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from durablews.errors import (
    StorageFailed,
)
from durablews.receiver import Batch, Receiver, Store, select_subprotocol
from durablews.wire.frames import JSON, MSGPACK, Codec, Hello

STREAM = "ab" * 16
Handler = Callable[[ServerConnection], Awaitable[None]]


def table(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE IF NOT EXISTS applied (id INTEGER PRIMARY KEY, seq, raw)")


def applied(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute("SELECT seq FROM applied ORDER BY id")]


@asynccontextmanager
async def listening(handler: Handler, **settings: Any) -> AsyncIterator[str]:
    settings = {"select_subprotocol": select_subprotocol, "compression": None} | settings
    async with serve(handler, "127.0.0.1", 0, **settings) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "server.db"


@pytest.fixture
async def receiver(path: Path) -> AsyncIterator[Receiver]:
    async with Store(path, prepare=table) as store, Receiver(store, hello_timeout=10) as receiver:
        yield receiver


async def apply_all(batch: Batch) -> None:
    async with batch.applying() as connection:
        for message in batch:
            await connection.execute("INSERT INTO applied (seq, raw) VALUES (?, ?)", (message.seq, message.raw))


def applying(receiver: Receiver, owner: str | None = None) -> Handler:
    async def handler(websocket: ServerConnection) -> None:
        async for batch in receiver.session(websocket, owner=owner):
            await apply_all(batch)

    return handler


@asynccontextmanager
async def greeted(url: str, stream: str = STREAM, **settings: Any) -> AsyncIterator[ClientConnection]:
    async with dial(url) as ws:
        await ws.send(hello_frame(stream, 1000, **settings))
        assert (await read(ws))["t"] == "welcome"
        yield ws


async def closed(ws: ClientConnection) -> tuple[int, str]:
    """Read to the end and return how it was closed."""
    async with asyncio.timeout(5):
        async for _ in unread(ws):
            pass
    assert ws.close_code is not None
    return ws.close_code, ws.close_reason or ""


async def unread(ws: ClientConnection) -> AsyncIterator[str | bytes]:
    """Yield what the server sent before it closed, whatever the close code."""
    with suppress(ConnectionClosed):
        while True:
            yield await ws.recv()


async def test_an_independent_client_is_served_once_over_broken_links(receiver: Receiver, path: Path) -> None:
    """A client written from PROTOCOL.md alone gets everything applied once, in order, although its links break."""
    async with listening(applying(receiver)) as url:
        client = IndependentClient(url, STREAM)
        sent = [client.enqueue({"reading": i}, priority=i % 2) for i in range(60)]
        for cut_after in (1, 3, 2):
            await client.drain(batch=4, cut_after=cut_after)
        await client.drain(batch=4)
    assert not any(client.waiting.values())
    done = applied(path)
    assert sorted(done) == sent
    for priority in (0, 1):
        mine = [seq for seq in done if (seq - 1) % 2 == priority]
        assert mine == sorted(mine)


async def test_messagepack_is_preferred_and_served(receiver: Receiver, path: Path) -> None:
    """A client that offers both encodings is served in MessagePack."""
    async with (
        listening(applying(receiver)) as url,
        connect(url, subprotocols=[JSON, MSGPACK]) as ws,  # type: ignore[list-item]
    ):
        assert ws.subprotocol == MSGPACK
        codec = Codec(MSGPACK)
        await ws.send(codec.encode(Hello(STREAM, "0" * 16, 9, 1 << 20)))
        codec.decode_server(await ws.recv())
        await ws.send(codec.encode_msgs(0, None, [(9, b"\x00")]))
        assert "Ack" in repr(codec.decode_server(await ws.recv()))
    assert applied(path) == [9]


async def test_a_connection_without_subprotocol_is_closed(receiver: Receiver) -> None:
    """A client that speaks no durablews is told so, and handed no batch."""
    async with listening(applying(receiver)) as url, connect(url) as ws:
        assert await closed(ws) == (4400, "no durablews subprotocol was selected")


async def test_a_message_shows_what_the_client_sent(receiver: Receiver) -> None:
    """Stream, priority, sequence, payload, topic, headers, time and transmission arrive; the payload is not in repr."""
    seen: asyncio.Queue[Any] = asyncio.Queue()

    async def handler(websocket: ServerConnection) -> None:
        async for batch in receiver.session(websocket):
            async with batch.applying():
                for message in batch:
                    seen.put_nowait(message)

    async with listening(handler) as url, greeted(url) as ws:
        meta = {"topic": "log", "ts": 17, "n": 3, "h": {"k": "v"}}
        await ws.send(msgs_frame(5, None, [7, {"secret": 1}, meta], [8, "AAE=", {"b": 1}]))
        first, second = await seen.get(), await seen.get()
    assert (first.stream, first.priority, first.seq, first.payload) == (STREAM, 5, 7, {"secret": 1})
    assert (first.raw, first.topic, first.headers) == ('{"secret": 1}', "log", {"k": "v"})
    assert (first.enqueued_at, first.transmission) == (17, 3)
    assert (second.payload, second.topic, second.headers, second.enqueued_at) == (b"\x00\x01", None, {}, None)
    assert "secret" not in repr(first)


async def test_s7_no_hello_in_time_closes_with_4400(path: Path) -> None:
    """S7: a connection that never says hello is closed, pings and unknown frames notwithstanding."""
    async with (
        Receiver(path, hello_timeout=0.2) as receiver,
        listening(applying(receiver)) as url,
        dial(url) as ws,
    ):
        await ws.send('{"t":"later"}')
        async with asyncio.timeout(2):
            assert await closed(ws) == (4400, "no hello within 0.2 s")


async def test_s7_malformed_frames_close_with_4400(receiver: Receiver) -> None:
    """S7: messages before hello and nonsense after it close with 4400, without quoting the frame."""
    async with listening(applying(receiver)) as url:
        async with dial(url) as ws:
            await ws.send(msgs_frame(0, None, [1, "secret"]))
            assert (await closed(ws))[0] == 4400
        async with greeted(url) as ws:
            await ws.send(msgs_frame(0, None, ["secret", 1]))
            code, reason = await closed(ws)
            assert code == 4400
            assert "secret" not in reason


async def test_s7_a_frame_over_the_limit_is_refused(path: Path) -> None:
    """S7: a frame over max_bytes is refused before it is parsed, also where the WebSocket server lets it through."""
    async with (
        Receiver(path, max_bytes=65_536) as receiver,
        listening(applying(receiver)) as url,
        greeted(url) as ws,
    ):
        await ws.send(msgs_frame(0, None, [1, "ä" * 40_000]))
        assert (await closed(ws))[0] == 4413


async def test_s6_a_second_connection_closes_the_first_at_once(receiver: Receiver, path: Path) -> None:
    """S6: the older connection gets 4409 with the winner's instance, and the newer one is welcomed without waiting."""
    async with listening(applying(receiver)) as url, greeted(url) as older:
        await older.send(msgs_frame(0, None, [1, 1]))
        assert (await read(older))["t"] == "ack"
        async with asyncio.timeout(5), greeted(url, instance="f" * 16) as newer:
            assert await closed(older) == (4409, "instance=" + "f" * 16)
            await newer.send(msgs_frame(0, None, [1, 1], [2, 1]))
            assert await read(newer) == {"t": "ack", "p": 0, "s": 2}
    assert applied(path) == [1, 2]


async def test_s6_buffered_frames_of_an_older_connection_are_not_applied(receiver: Receiver, path: Path) -> None:
    """S6: what the older connection had sent and the server not yet looked at is left, and the newer one's hello waits
    for the transaction that runs."""
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def handler(websocket: ServerConnection) -> None:
        async for batch in receiver.session(websocket):
            async with batch.applying() as connection:
                for message in batch:
                    await connection.execute("INSERT INTO applied (seq, raw) VALUES (?, ?)", (message.seq, message.raw))
                inside.set()
                await go_on.wait()

    async with listening(handler) as url, greeted(url) as older:
        await older.send(msgs_frame(0, None, [1, 1]))
        await older.send(msgs_frame(0, 1, [2, 2]))
        await inside.wait()
        async with dial(url) as newer:
            await newer.send(hello_frame(STREAM, 2))
            welcome = asyncio.create_task(read(newer))
            # A round trip on the newer connection: its hello is at the server, and still unanswered.
            await (await newer.ping())
            assert not welcome.done()
            go_on.set()
            assert (await welcome)["t"] == "welcome"
            assert (await closed(older))[0] == 4409
            assert applied(path) == [1]


async def test_s6_holds_across_processes_that_share_a_store(receiver: Receiver, path: Path) -> None:
    """S6: a newer connection to another receiver on the same file fences this one's."""
    async with (
        Store(path, prepare=table) as store,
        Receiver(store) as other,
        listening(applying(receiver)) as url,
        listening(applying(other)) as other_url,
        greeted(url) as older,
        greeted(other_url, instance="f" * 16) as newer,
    ):
        assert await receiver.push(STREAM, 1) is False
        await older.send(msgs_frame(0, None, [1, 1]))
        assert await closed(older) == (4409, "instance=" + "f" * 16)
        await newer.send(msgs_frame(0, None, [1, 1]))
        assert await read(newer) == {"t": "ack", "p": 0, "s": 1}
    assert applied(path) == [1]


async def test_s8_another_owner_is_closed_with_4403(receiver: Receiver, path: Path) -> None:
    """S8: a stream that anna used first is closed to bert, and anna's connection stays."""
    async with (
        listening(applying(receiver, "anna")) as annas,
        listening(applying(receiver, "bert")) as berts,
        greeted(annas) as anna,
    ):
        async with dial(berts) as bert:
            await bert.send(hello_frame(STREAM))
            assert (await closed(bert))[0] == 4403
        await anna.send(msgs_frame(0, None, [1, 1]))
        assert (await read(anna))["t"] == "ack"
    assert applied(path) == [1]


async def test_s4_an_exception_rolls_back_nacks_and_reaches_the_application(receiver: Receiver, path: Path) -> None:
    """S4: the block's writes are gone, the client is told, the application sees its error and may go on."""
    errors: list[Exception] = []

    async def failing(websocket: ServerConnection) -> None:
        async for batch in receiver.session(websocket):
            try:
                async with batch.applying() as connection:
                    await connection.execute("INSERT INTO applied (seq, raw) VALUES (0, 'gone')")
                    for message in batch:
                        if not errors:
                            raise ValueError(message.seq)
            except ValueError as exc:
                errors.append(exc)

    async with listening(failing) as url, greeted(url) as ws:
        await ws.send(msgs_frame(0, None, [1, 1]))
        nack = await read(ws)
        assert (nack["t"], nack["s"], nack["retry"]) == ("nack", 1, 5000)
        assert applied(path) == []
        await ws.send(msgs_frame(0, None, [1, 1]))
        assert await read(ws) == {"t": "ack", "p": 0, "s": 1}
    assert [str(error) for error in errors] == ["1"]
    assert applied(path) == [0]


async def test_s4_a_batch_that_is_not_applied_is_nacked(receiver: Receiver) -> None:
    """S4: a batch that the loop passes over is never acked; a repeat in it closes with 1013 instead of a nack."""
    ignore = True

    async def handler(websocket: ServerConnection) -> None:
        async for batch in receiver.session(websocket):
            if not ignore:
                await apply_all(batch)

    async with listening(handler) as url, greeted(url) as ws:
        await ws.send(msgs_frame(0, None, [1, 1]))
        assert (await read(ws))["t"] == "nack"
        ignore = False
        await ws.send(msgs_frame(0, None, [1, 1]))
        assert (await read(ws))["t"] == "ack"
        ignore = True
        await ws.send(msgs_frame(0, None, [1, 1]))
        assert (await closed(ws))[0] == 1013


async def test_a_block_that_skips_messages_is_not_acked(receiver: Receiver) -> None:
    """Messages that the block never looked at do not count as applied: the block fails, visibly."""
    errors: asyncio.Queue[Exception] = asyncio.Queue()

    async def handler(websocket: ServerConnection) -> None:
        async for batch in receiver.session(websocket):
            try:
                async with batch.applying():
                    for _ in batch:
                        break
            except RuntimeError as exc:
                errors.put_nowait(exc)

    async with listening(handler) as url, greeted(url) as ws:
        await ws.send(msgs_frame(0, None, [1, 1], [2, 2]))
        assert (await read(ws))["t"] == "nack"
        assert "before it had seen every message" in str(await errors.get())


@pytest.mark.parametrize("savepoints", [False, True], ids=["for", "async for"])
async def test_s3_a_refusal_ends_the_batch_before_it(receiver: Receiver, path: Path, savepoints: bool) -> None:
    """S3: what came before stays, and with `async for` what was written for the refused one is gone."""

    async def handler(websocket: ServerConnection) -> None:
        async for batch in receiver.session(websocket):
            async with batch.applying() as connection:
                if savepoints:
                    async for message in batch:
                        await connection.execute("INSERT INTO applied (seq) VALUES (?)", (message.seq,))
                        if message.seq == 3:
                            batch.refuse(message, "forbidden", "not this one")
                else:
                    for message in batch:
                        if message.seq == 3:
                            batch.refuse(message, "forbidden", "not this one")
                            continue
                        await connection.execute("INSERT INTO applied (seq) VALUES (?)", (message.seq,))

    async with listening(handler) as url, greeted(url) as ws:
        await ws.send(msgs_frame(0, None, [1, 1], [2, 2], [3, 3], [4, 4]))
        assert await read(ws) == {"t": "ack", "p": 0, "s": 2}
        assert await read(ws) == {
            "t": "nack", "p": 0, "s": 3, "final": True, "code": "forbidden", "reason": "not this one",
        }  # fmt: skip
        await ws.send(msgs_frame(0, 4, [5, 5]))  # behind the refusal: ignored
        await ws.send(msgs_frame(0, 2, [4, 4], [5, 5]))
        assert await read(ws) == {"t": "ack", "p": 0, "s": 5}
    assert applied(path) == [1, 2, 4, 5]


async def test_s3_lost_state_closes_with_1012_and_is_raised(receiver: Receiver, path: Path) -> None:
    """S3: a store that lost what it acked is no secret: 1012, and StorageFailed for the application."""
    raised: asyncio.Queue[Exception] = asyncio.Queue()

    async def handler(websocket: ServerConnection) -> None:
        try:
            await applying(receiver)(websocket)
        except StorageFailed as exc:
            raised.put_nowait(exc)

    async with listening(handler) as url, greeted(url) as ws:
        await ws.send(msgs_frame(0, None, [1, 1]))
        assert (await read(ws))["t"] == "ack"
        with closing(sqlite3.connect(path)) as vandal:
            vandal.execute("DELETE FROM durablews_seen")
            vandal.commit()
        await ws.send(msgs_frame(0, 1, [2, 2]))
        assert (await closed(ws))[0] == 1012
        assert "lost" in str(await raised.get())
    assert applied(path) == [1]


async def test_a_repeat_is_acked_and_not_seen_by_the_application(receiver: Receiver, path: Path) -> None:
    """S2: the application iterates over fresh messages only, and what its block writes for repeats is not kept."""

    async def handler(websocket: ServerConnection) -> None:
        async for batch in receiver.session(websocket):
            async with batch.applying() as connection:
                await connection.execute("INSERT INTO applied (seq) VALUES (?)", (-1,))
                for message in batch:
                    await connection.execute("INSERT INTO applied (seq) VALUES (?)", (message.seq,))

    async with listening(handler) as url, greeted(url) as ws:
        for _ in range(2):
            await ws.send(msgs_frame(0, None, [1, 1], [2, 2]))
            assert await read(ws) == {"t": "ack", "p": 0, "s": 2}
    assert applied(path) == [-1, 1, 2]
