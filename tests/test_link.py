"""What one link does on its own: it feels its pulse, grows old, wakes up, and tells of all that."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import FAST, Inbox, PlainServer, until, until_true
from support import FakeClock
from test_answers import SLOW, client, listening
from websockets.asyncio.server import ServerConnection

from durablews.client import Client
from durablews.events import (
    Connected,
    Disconnected,
    Event,
    Exhausted,
    HeartbeatTimeout,
    Latency,
    MessagePushed,
    MessagesAcked,
    MessagesSent,
    Reconnecting,
)

QUICK = {"interval": 0.05, "timeout": 5, "max_missed": 3}


def kinds(seen: list[Event], kind: type) -> list[Any]:
    return [event for event in seen if isinstance(event, kind)]


async def connected(ws: Client) -> None:
    await until(lambda: ws.state.value == "CONNECTED")


# -- the pulse


async def test_the_latency_is_in_stats_and_told(tmp_path: Path) -> None:
    """A ping's round trip is an event each time, and its average stands in `stats`."""
    async with PlainServer() as server, client(server.url, tmp_path, heartbeat=QUICK) as ws:
        assert (await ws.stats()).latency is None
        seen = listening(ws)
        await until(lambda: len(kinds(seen, Latency)) >= 3)
        latency = (await ws.stats()).latency
        assert latency is not None
        assert 0 < latency < 5
        assert all(0 < event.seconds < 5 for event in kinds(seen, Latency))


async def test_an_adaptive_interval_shows_in_stats(tmp_path: Path) -> None:
    """It begins within its bounds, and a quick link's is the shortest after some pings."""
    heartbeat = {"interval": 40, "adaptive": True}
    async with PlainServer() as server, client(server.url, tmp_path, heartbeat=heartbeat) as ws:
        await connected(ws)
        assert (await ws.stats()).heartbeat_interval == 40
        for interval in (20, 15):
            ws.wake()  # pings at once

            async def adapted(interval: float = interval) -> bool:
                return (await ws.stats()).heartbeat_interval == interval

            await until_true(adapted)


@pytest.mark.parametrize("dialect", ["durablews.v1.json", "durablews.v1.msgpack"])
async def test_application_pings_are_messages_that_are_answered(tmp_path: Path, dialect: str) -> None:
    """For paths that lose WebSocket pings: our receiver answers those of the dialect, and the latency is theirs."""
    inbox = Inbox(tmp_path / "inbox.db")
    heartbeat = {**QUICK, "application": True}
    async with inbox.serving():
        async with client(inbox.url, tmp_path, heartbeat=heartbeat, dialect=dialect) as ws:
            seen = listening(ws)
            await until(lambda: len(kinds(seen, Latency)) >= 3)
            assert (await ws.stats()).latency is not None
            await (await ws.send("x")).acked(10)
            assert kinds(seen, Disconnected) == []


async def test_application_pings_find_what_websocket_pings_do_not(tmp_path: Path) -> None:
    """A path that answers WebSocket pings by itself hides a dead server from them, and not from the dialect's."""

    async def only_pongs(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        async for data in ws:
            server.frames.append(json.loads(data))

    heartbeat = {"interval": 0.05, "timeout": 0.1, "max_missed": 2}
    async with PlainServer(only_pongs) as server:
        async with client(server.url, tmp_path, heartbeat=heartbeat) as ws:
            seen = listening(ws)
            await until(lambda: len(kinds(seen, Latency)) >= 5)
            assert kinds(seen, HeartbeatTimeout) == []
        assert server.frames == []
        heartbeat["application"] = True
        async with client(server.url, tmp_path, heartbeat=heartbeat) as ws:
            seen = listening(ws)
            await until(lambda: kinds(seen, HeartbeatTimeout))
            (timeout, *_) = kinds(seen, HeartbeatTimeout)
            assert timeout.silence >= 0.2
            await until(lambda: kinds(seen, Disconnected))
            assert kinds(seen, Disconnected)[0].code == 4408
        assert [frame["t"] for frame in server.frames[:2]] == ["ping", "ping"]
        assert [frame["n"] for frame in server.frames[:2]] == [1, 2]


# -- what is told


async def test_sent_acked_and_pushed_are_told(tmp_path: Path) -> None:
    """Whoever listens learns which sequences went and which were acknowledged, in that order, and of pushes."""

    async def pushing(server: PlainServer, ws: ServerConnection) -> None:
        stream = await server.greet(ws)
        await server.say(ws, t="push", d={"hello": "there"})
        while True:
            await server.take(ws, stream, await server.hear(ws))

    async with PlainServer(pushing) as server, client(server.url, tmp_path) as ws:
        seen = listening(ws)
        receipts = await ws.send_many(range(5), priority="high")
        await receipts[-1].acked(10)
        await until(lambda: sum(event.messages for event in kinds(seen, MessagesAcked)) == 5)
        first, last = receipts[0].seq, receipts[-1].seq
        assert [(e.priority, e.first, e.last, e.messages) for e in kinds(seen, MessagesSent)] == [(1, first, last, 5)]
        assert [(e.priority, e.first, e.last, e.messages) for e in kinds(seen, MessagesAcked)] == [(1, first, last, 5)]
        assert seen.index(kinds(seen, MessagesSent)[0]) < seen.index(kinds(seen, MessagesAcked)[0])
        assert [event.bytes for event in kinds(seen, MessagePushed)] == [len('{"hello": "there"}')]


async def test_a_clean_close_is_not_the_end(tmp_path: Path) -> None:
    """1000 and 1001 from a server are followed by another connection, as any other end is."""

    async def polite(server: PlainServer, ws: ServerConnection) -> None:
        stream = await server.greet(ws)
        await server.take(ws, stream, await server.hear(ws))
        await ws.close(1000 if len(server.times) % 2 else 1001)

    async with PlainServer(polite) as server, client(server.url, tmp_path) as ws:
        seen = listening(ws)
        for number in range(6):
            await (await ws.send(number)).acked(10)
            await until(lambda count=number: len(kinds(seen, Disconnected)) > count)  # type: ignore[misc]
        assert server.payloads == list(range(6))
        assert {event.code for event in kinds(seen, Disconnected)} == {1000, 1001}


# -- ages


async def test_the_client_leaves_an_old_connection_first_and_between_messages(tmp_path: Path) -> None:
    """`max_connection_age`: closed with 1000 by the client, nothing sent twice, the next connection at once."""
    retry = {**SLOW, "max_connection_age": 0.2}
    async with PlainServer() as server, client(server.url, tmp_path, reconnect=retry) as ws:
        seen = listening(ws)

        async def talk() -> int:
            number = 0
            while len(kinds(seen, Connected)) < 5:
                await ws.send(number)
                number += 1
            return number

        sent = await asyncio.wait_for(talk(), 30)
        assert await ws.flush(10)
        assert server.payloads == list(range(sent))
        assert (await ws.stats()).redelivered == 0
        assert {(event.code, event.reason) for event in kinds(seen, Disconnected)} == {
            (1000, "renewing the connection")
        }
        assert {event.delay for event in kinds(seen, Reconnecting)} == {0}
        assert set(server.closes) == {(1000, "renewing the connection")}


async def test_an_old_connection_waits_for_its_answers(tmp_path: Path) -> None:
    """What is in flight is answered first; nothing new is sent meanwhile; without an answer the ack timeout decides."""
    answer = asyncio.Event()

    async def slow(server: PlainServer, ws: ServerConnection) -> None:
        stream = await server.greet(ws)
        frame = await server.hear(ws)
        await answer.wait()
        await server.take(ws, stream, frame)
        while True:
            await server.take(ws, stream, await server.hear(ws))

    retry = {**SLOW, "max_connection_age": 0.2}
    async with PlainServer(slow) as server, client(server.url, tmp_path, reconnect=retry) as ws:
        seen = listening(ws)
        await ws.send("first")
        await until(lambda: server.frames)
        loop = asyncio.get_running_loop()
        await until(lambda: loop.time() > server.times[0] + 0.3)  # it is old now
        await ws.send("second")
        assert await ws.flush(0.1) is False
        assert (len(server.frames), kinds(seen, Disconnected)) == (1, [])
        server.trouble = None
        answer.set()
        assert await ws.flush(10)
        assert server.payloads == ["first", "second"]
        assert [len(frame["m"]) for frame in server.frames] == [1, 1]
        assert (await ws.stats()).redelivered == 0


# -- waking up


async def test_wake_ends_the_wait(tmp_path: Path) -> None:
    """An owner who knows that the network is back need not wait for the backoff."""
    server = PlainServer()
    await server.start()
    await server.stop()
    async with client(server.url, tmp_path, reconnect=SLOW) as ws:
        seen = listening(ws)
        await until(lambda: kinds(seen, Reconnecting))
        await server.start()
        ws.wake()
        await connected(ws)
        await server.stop()


async def test_a_wake_during_an_attempt_is_not_lost(tmp_path: Path) -> None:
    """The network comes back while an attempt still hangs in the old one: the next follows at once."""
    asked, go = asyncio.Event(), asyncio.Event()

    async def url() -> str:
        if not asked.is_set():
            asked.set()
            await go.wait()
            raise ConnectionError
        return server.url

    async with PlainServer() as server, client(url, tmp_path, reconnect=SLOW) as ws:
        await asked.wait()
        ws.wake()
        go.set()
        await connected(ws)


async def test_the_end_of_the_retries_is_not_the_end_of_the_client(tmp_path: Path) -> None:
    """After `max_retries` the owner's `wake` begins anew, and what became too old meanwhile has expired."""
    server = PlainServer()
    await server.start()
    await server.stop()
    retry = {**FAST, "max_retries": 1}
    async with client(server.url, tmp_path, reconnect=retry) as ws:
        seen = listening(ws)
        await until(lambda: kinds(seen, Exhausted))
        await ws.send("kept")
        await ws.send("short-lived", ttl=0.01)
        assert not await ws.flush()  # waits for nothing that will not come

        async def expired() -> bool:
            return (await ws.stats()).expired == 1

        await until_true(expired)
        await server.start()
        ws.wake()
        assert await ws.flush(10)
        assert server.payloads == ["kept"]
        await server.stop()
        await until(lambda: len(kinds(seen, Exhausted)) == 2)
        assert [event.attempts for event in kinds(seen, Exhausted)] == [2, 2]


def sleeps(ws: Client, clock: FakeClock) -> Callable[[], None]:
    """Return a function that lets the machine of a client sleep for an hour."""
    ws._outbox.clock = clock

    def sleep() -> None:
        clock._boot += 3_600_000  # CLOCK_BOOTTIME counts it, CLOCK_MONOTONIC does not

    return sleep


async def test_a_machine_that_slept_dials_at_once(tmp_path: Path) -> None:
    """A laptop's lid: the wait for the next try is over when the clock of suspended time has jumped."""
    server = PlainServer()
    await server.start()
    await server.stop()
    ws = client(server.url, tmp_path, reconnect=SLOW)
    sleep = sleeps(ws, FakeClock())
    async with ws:
        seen = listening(ws)
        await until(lambda: kinds(seen, Reconnecting))
        await server.start()
        sleep()
        await connected(ws)
    await server.stop()


async def test_a_machine_that_slept_asks_whether_its_link_stands(tmp_path: Path) -> None:
    """A connection that survived a sleep is pinged at once; one that did not is left after a few timeouts."""
    frozen = asyncio.Event()

    async def freezing(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        await frozen.wait()
        ws.transport.pause_reading()
        await until(lambda: len(server.times) > 1)
        ws.transport.abort()

    heartbeat = {"interval": 1000, "timeout": 0.1, "max_missed": 2}
    async with PlainServer(freezing) as server:
        ws = client(server.url, tmp_path, heartbeat=heartbeat)
        sleep = sleeps(ws, FakeClock())
        async with ws:
            seen = listening(ws)
            await connected(ws)
            sleep()
            await until(lambda: kinds(seen, Latency))
            frozen.set()
            server.trouble = None
            await asyncio.sleep(0)
            sleep()
            await until(lambda: kinds(seen, HeartbeatTimeout))
            await ws.send("x")
            assert await ws.flush(10)


async def test_a_server_that_asked_for_a_delay_is_not_woken_by_the_network(tmp_path: Path) -> None:
    """Retry-After holds when an address appears; only the owner's `wake` counts more."""
    async with PlainServer() as server:
        server.refusal = 503, {"Retry-After": "1000"}
        async with client(server.url, tmp_path) as ws:
            seen = listening(ws)
            await until(lambda: kinds(seen, Reconnecting))
            server.refusal = None
            assert ws._manager is not None
            ws._manager.housekeeping._on_return()
            await until_true(lambda: ws.flush(0.2))  # empty; time for an attempt that must not come
            await ws.send("x")
            assert await ws.flush(0.3) is False
            assert len(server.times) == 1
            ws.wake()
            assert await ws.flush(10)
