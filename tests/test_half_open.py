"""Links on which packets vanish, and links that are only slow: the first are left in time, the second never.

Seen by the kernel, in namespaces (no packet arrives, no error comes), and by proxies that take everything and hand on
nothing. The bound is that of the settings: interval * max_missed + timeout after the last sign of life, and a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from chaos import CLEAN, SWALLOW, ChaosProxy, Direction, Manner
from namespaces import Network, network_fixture
from servers import PlainServer, serve, until
from test_answers import client, listening
from websockets.asyncio.server import ServerConnection

from durablews.client import Client
from durablews.events import Connected, Disconnected, HeartbeatTimeout

__all__ = ["network_fixture"]  # what pytest looks for by the name of an argument

HEARTBEAT = {"interval": 0.4, "timeout": 0.3, "max_missed": 2}
BOUND = 0.4 * 2 + 0.3
BACK = {"base_delay": 0.05, "max_delay": 0.1, "connect_timeout": 5}


class Lateness:
    """How late this machine wakes a sleeper, at worst: no promise of ours can be kept better than that."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def __aenter__(self) -> Lateness:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(0.01)
            self.worst = max(self.worst, loop.time() - before - 0.01)


async def is_found_in_time(ws: Client, vanish: Callable[[], None], *, talks: bool) -> None:
    """Let packets vanish; the link must be found dead within its bound and closed with 4408, however much is sent."""
    seen = listening(ws)
    loop = asyncio.get_running_loop()
    async with Lateness() as lateness:
        if talks:
            await (await ws.send("before")).acked(10)
        vanish()
        vanished = loop.time()
        sending = asyncio.create_task(keep_sending(ws)) if talks else None
        try:
            await until(lambda: [event for event in seen if isinstance(event, Disconnected)])
            found = loop.time()
        finally:
            if sending is not None:
                sending.cancel()
        assert found - vanished <= BOUND + 1 + lateness.worst
    assert [event for event in seen if isinstance(event, HeartbeatTimeout)]
    (end,) = [event for event in seen if isinstance(event, Disconnected)]
    assert (end.code, end.reason) == (4408, "nothing was heard for too long")


async def keep_sending(ws: Client) -> None:
    """Send a hundred messages a second, some of them large: writes that a dead socket takes are no sign of life."""
    number = 0
    while True:
        await ws.send({"number": number, "blob": "x" * (number % 7) * 4000})
        number += 1
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("talks", [False, True], ids=["silent", "talking"])
def test_a_link_whose_packets_vanish_is_found_in_time(tmp_path: Path, network: Network, talks: bool) -> None:
    """P8: a router drops every packet without a word; the link is found, and everything arrives once it is mended."""

    async def story() -> None:
        async with served(network, PlainServer()) as (server, url):
            async with client(url, tmp_path, heartbeat=HEARTBEAT, reconnect=BACK) as ws:
                await until(lambda: ws.state.value == "CONNECTED")
                await is_found_in_time(ws, network.vanish, talks=talks)
                network.restore()
                await ws.send("after")
                assert await ws.flush(20)
            assert server.payloads[-1] == "after"
            numbers = [payload["number"] for payload in server.payloads if isinstance(payload, dict)]
            assert numbers == list(range(len(numbers)))

    network.in_client(lambda: asyncio.run(story()))


@asynccontextmanager
async def served(network: Network, server: PlainServer) -> AsyncIterator[tuple[PlainServer, str]]:
    """Run a server on the far side of the network."""
    listener = network.server_socket()
    async with serve(
        server._handle,
        sock=listener,
        process_request=server._request,
        select_subprotocol=server._select,
        compression=None,
        ping_interval=None,
        close_timeout=0.1,
    ):
        address, port = listener.getsockname()
        yield server, f"ws://{address}:{port}/"


@pytest.mark.parametrize("talks", [False, True], ids=["silent", "talking"])
@pytest.mark.parametrize("way", [Direction.UP, Direction.DOWN, Direction.BOTH], ids=str)
async def test_a_link_that_is_swallowed_is_found_in_time(tmp_path: Path, way: Direction, talks: bool) -> None:
    """P8: a proxy takes everything and hands on nothing, in one direction or both: that it takes is no sign of life."""
    async with PlainServer() as server, ChaosProxy(server.port) as proxy:
        url = f"ws://127.0.0.1:{proxy.port}/"
        async with client(url, tmp_path, heartbeat=HEARTBEAT, reconnect=BACK) as ws:
            await until(lambda: ws.state.value == "CONNECTED")
            await is_found_in_time(ws, lambda: proxy.behave(SWALLOW, way), talks=talks)
            proxy.behave(CLEAN)
            await ws.send("after")
            assert await ws.flush(20)
            proxy.cut()
        numbers = [payload["number"] for payload in server.payloads if isinstance(payload, dict)]
        assert numbers == list(range(len(numbers)))


# -- slow, and alive

# 16 kbit/s and the defaults, thirty-two times as fast: what takes 524 s takes 16.
TIMES = 32
SLOW_HEARTBEAT = {"interval": 30 / TIMES, "timeout": 10 / TIMES, "max_missed": 3}
BACKLOG = [b"x" * 4096] * 256


async def drains(ws: Client, server: PlainServer, slow: Callable[[], None]) -> list[Any]:
    """Let a link become slow, send 1 MiB, and wait until it has arrived; return what connections it took."""
    seen = listening(ws)
    await until(lambda: ws.state.value == "CONNECTED")
    slow()
    await ws.send_many(BACKLOG)
    assert await ws.flush(100)
    assert len(server.payloads) == len(BACKLOG)
    return [event for event in seen if isinstance(event, Connected | Disconnected)]


def test_a_slow_link_is_not_a_dead_one(tmp_path: Path, network: Network) -> None:
    """A megabyte drains through 16 kbit/s, scaled, on one connection; the first ack takes longer than any timeout.

    A frame of 256 KiB takes 131 s there, more than interval * max_missed + timeout and than ack_timeout.
    """

    async def story() -> None:
        async with served(network, PlainServer()) as (server, url):
            settings = {"heartbeat": SLOW_HEARTBEAT, "delivery": {"ack_timeout": 30 / TIMES}, "reconnect": BACK}
            async with client(url, tmp_path, **settings) as ws:
                # Without loss: a retransmission timeout of TCP is not thirty-two times as fast.
                rate = f"{16 * TIMES}kbit"
                ends = await drains(ws, server, lambda: network.limit(rate, patience="60s"))
                assert [event for event in ends if isinstance(event, Disconnected)] == []
                assert (await ws.stats()).redelivered == 0

    network.in_client(lambda: asyncio.run(story()))


async def test_a_slow_link_behind_a_proxy_drains_as_well(tmp_path: Path) -> None:
    """A proxy that takes more than it can carry hides how slow the path is: smaller frames find a way through."""
    async with PlainServer() as server, ChaosProxy(server.port, receive_buffer=65536) as proxy:
        settings = {"heartbeat": SLOW_HEARTBEAT, "delivery": {"ack_timeout": 30 / TIMES}, "reconnect": BACK}
        async with client(f"ws://127.0.0.1:{proxy.port}/", tmp_path, **settings) as ws:
            slow = Manner(rate=2000.0 * TIMES)
            ends = await drains(ws, server, lambda: proxy.behave(slow, Direction.UP))
            assert len([event for event in ends if isinstance(event, Disconnected)]) <= 15
            proxy.behave(CLEAN)


async def test_a_server_that_answers_pings_and_never_acknowledges_is_left(tmp_path: Path) -> None:
    """C9: the link is alive and useless: 4408 after ack_timeout, and the next server gets everything."""

    async def deaf(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        while True:
            await server.hear(ws)

    heartbeat = {"interval": 0.05, "timeout": 5, "max_missed": 3}
    async with PlainServer(deaf) as server:
        settings: dict[str, Any] = {"heartbeat": heartbeat, "delivery": {"ack_timeout": 0.5}, "reconnect": BACK}
        async with client(server.url, tmp_path, **settings) as ws:
            seen = listening(ws)
            await ws.send("x")
            await until(lambda: [event for event in seen if isinstance(event, Disconnected)])
            (end,) = [event for event in seen if isinstance(event, Disconnected)][:1]
            assert (end.code, end.reason) == (4408, "no ack for 0.5 s")
            assert not [event for event in seen if isinstance(event, HeartbeatTimeout)]
            server.trouble = None
            assert await ws.flush(10)
