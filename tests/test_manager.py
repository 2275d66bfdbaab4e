"""The connection manager against servers that misbehave: nothing that a network answers ends it, nothing gets lost."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import sqlite3
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from looking import Look, look_fixture  # noqa: F401 - pytest looks for it here
from servers import FAST, VISIBLE, PlainServer, until, until_true
from support import named
from websockets.asyncio.server import ServerConnection

import durablews
from durablews.client import Client
from durablews.dialling import server_date
from durablews.errors import StorageFailed


def client(server: PlainServer, path: Path, **settings: Any) -> Client:
    given = {"reconnect": FAST, "proxy": None, "dialect": "durablews.v1.json", **settings}
    given["delivery"] = {"drain_timeout": 0, **settings.get("delivery", {})}
    return durablews.connect(given.pop("url", server.url), path / "agent.db", **given)


async def send_all(ws: Client, count: int = 30) -> list[tuple[int, Any]]:
    """Send messages of three priorities; return priority and payload in the order in which they must arrive."""
    sent = []
    for i in range(count):
        priority = (0, 1, -1)[i % 3]
        await ws.send(i, priority=priority)
        sent.append((priority, i))
    return sorted(sent, key=lambda pair: -pair[0])


async def shown(ws: Client, look: Look, text: str) -> None:
    """Wait until a reason is in `stats` and in `durablews inspect`."""

    async def in_stats() -> bool:
        return text in ((await ws.stats()).reason or "")

    await until_true(in_stats)
    await until(lambda: text in (look()["reason"] or ""))


async def nothing(server: PlainServer, ws: ServerConnection) -> None:
    """Accept and close at once."""


async def silence(server: PlainServer, ws: ServerConnection) -> None:
    """Never send a welcome."""
    await ws.wait_closed()


async def deaf(server: PlainServer, ws: ServerConnection) -> None:
    """Welcome, read and never answer."""
    await server.greet(ws)
    while True:
        await server.hear(ws)


async def garbage(server: PlainServer, ws: ServerConnection) -> None:
    await server.greet(ws)
    await ws.send('{"t": "ack", "p": ')
    await ws.wait_closed()


async def binary(server: PlainServer, ws: ServerConnection) -> None:
    await ws.recv()
    await ws.send(b"\xff\xfe\x00")
    await ws.wait_closed()


async def not_utf8(server: PlainServer, ws: ServerConnection) -> None:
    await server.greet(ws)
    await ws.send(b"\xff\xfe", text=True)
    await ws.wait_closed()


async def huge(server: PlainServer, ws: ServerConnection) -> None:
    await server.greet(ws)
    await ws.send("x" * (2 << 20))
    await ws.wait_closed()


async def dies(server: PlainServer, ws: ServerConnection) -> None:
    """Apply one frame and die before it is acked."""
    stream = await server.greet(ws)
    frame = await server.hear(ws)
    last = server.seen.get((stream, frame["p"]), 0)
    for seq, payload, *_ in frame["m"]:
        if seq > last:
            server.applied.append((frame["p"], payload))
            server.seen[stream, frame["p"]] = seq
    ws.transport.abort()
    await ws.wait_closed()


def closes(code: int, reason: str = "") -> Any:
    async def close(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        await ws.close(code, reason)

    return close


TROUBLES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "closes at once": (nothing, "closed with 1000", {}),
    "silence": (silence, "closed with 4408: no welcome in time", {"reconnect": {**FAST, "connect_timeout": 0.1}}),
    "deaf": (deaf, "closed with 4408: no ack for 0.1 s", {"delivery": {"ack_timeout": 0.1}}),
    "garbage": (garbage, "closed with 4400", {}),
    "binary in text": (binary, "closed with 4400", {}),
    "not UTF-8": (not_utf8, "closed with 1007", {}),
    "huge": (huge, "closed with 1009", {}),
    "dies": (dies, "closed with 1006", {}),
    **{f"closes {code}": (closes(code), f"closed with {code}", {}) for code in (1001, 1002, 1008, 1011, 1012, 1013)},
    **{f"closes {code}": (closes(code, "r"), f"closed with {code}: r", {}) for code in (4401, 4408, 4429, 4999)},
}


@pytest.mark.parametrize("name", TROUBLES)
async def test_every_message_arrives_once_after_a_trouble(tmp_path: Path, look: Look, name: str) -> None:
    """P8, P5: whatever a connection ends with is a visible reason; the link comes back; nothing is lost or doubled."""
    trouble, reason, settings = TROUBLES[name]
    settings = {"reconnect": VISIBLE, **settings}
    async with PlainServer(trouble) as server, client(server, tmp_path, **settings) as ws:
        expected = await send_all(ws)
        await shown(ws, look, reason)
        await until(lambda: len(server.times) >= 4)  # it keeps coming
        server.trouble = None
        assert await ws.flush(15)
        await until(lambda: look()["state"] == "CONNECTED")
        assert look()["reason"] is None
        stats = await ws.stats()
        assert (stats.acked, stats.dead, stats.trouble) == (30, 0, None)
        # What a dying server has applied came in an order of its own connections.
        assert sorted(server.applied) == sorted(expected)
        for priority in (1, 0, -1):
            assert [p for p in server.applied if p[0] == priority] == [p for p in expected if p[0] == priority]
    if name in ("garbage", "binary in text"):
        assert 4400 in {code for code, _ in server.closes}


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (200, {}, "HTTP 200 instead of a WebSocket: a captive portal"),
        (302, {"Location": "http://login.example/"}, "redirects to an address that is not allowed"),
        (302, {"Location": "ws://127.0.0.1:1/elsewhere"}, "redirects to an address that is not allowed"),
        (401, {}, "HTTP 401"),
        (403, {}, "HTTP 403"),
        (404, {}, "HTTP 404"),
        (429, {"Retry-After": "0"}, "HTTP 429"),
        (503, {}, "HTTP 503"),
    ],
)
async def test_every_message_arrives_after_a_refused_handshake(
    tmp_path: Path, look: Look, status: int, headers: dict[str, str], reason: str
) -> None:
    """P8: an answer that is no WebSocket is a visible reason, and the link comes up once the server is well."""
    async with PlainServer() as server, client(server, tmp_path, token="secret") as ws:
        server.refusal = status, headers
        expected = await send_all(ws)
        await shown(ws, look, reason)
        assert look()["state"] in ("RECONNECTING", "CONNECTING")
        assert (look()["blocked"] is not None) == (status in (401, 403))
        await until(lambda: len(server.times) >= 4)
        server.refusal = None
        assert await ws.flush(15)
        assert server.applied == expected


@pytest.mark.parametrize(("status", "after"), [(429, "1"), (503, "1")])
async def test_retry_after_is_honoured(tmp_path: Path, status: int, after: str) -> None:
    """A server that says when to come back is not asked before."""
    async with PlainServer() as server:
        server.refusal = status, {"Retry-After": after}
        async with client(server, tmp_path) as ws:
            await until(lambda: len(server.times) == 1)
            server.refusal = None
            await ws.send("x")
            assert await ws.flush(10)
        assert server.times[1] - server.times[0] >= 1
        assert len(server.times) == 2


@pytest.mark.parametrize("how", ["close", "bye"])
async def test_the_servers_retry_is_a_minimum(tmp_path: Path, how: str) -> None:
    """A close reason `retry=MS`, and a bye, keep the client away for at least so long."""

    async def leave(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        if how == "bye":
            await server.say(ws, t="bye", retry=400)
            await ws.close(1001)
        else:
            await ws.close(1013, "retry=400")

    async with PlainServer(leave) as server, client(server, tmp_path) as ws:
        await until(lambda: len(server.times) == 1)
        server.trouble = None
        await ws.send("x")
        assert await ws.flush(10)
        assert server.times[1] - server.times[0] >= 0.4


async def test_a_server_that_accepts_and_closes_is_not_hammered(tmp_path: Path) -> None:
    """The backoff grows although every dial succeeds: a connection is no progress, an ack is."""
    retry = {"base_delay": 0.05, "max_delay": 10, "jitter": 0.0}
    async with PlainServer(nothing) as server, client(server, tmp_path, reconnect=retry) as ws:
        await until(lambda: len(server.times) >= 5)
        waits = [after - before for before, after in pairwise(server.times)]
        for attempt, wait in enumerate(waits):
            assert wait >= 0.05 * 2**attempt
        server.trouble = None
        await ws.send("x")
        ws.wake()
        assert await ws.flush(10)
        server.trouble = nothing
        count = len(server.times)
        server.connections[0].transport.abort()
        await until(lambda: len(server.times) >= count + 3)
        # The first try after a good connection comes within the first window, the ones after it as before.
        assert server.times[count + 2] - server.times[count + 1] >= 0.1


async def test_a_server_that_refuses_connections(tmp_path: Path, look: Look) -> None:
    """P8: with nobody listening the reason says so, and everything arrives when somebody does."""
    server = PlainServer()
    await server.start()
    await server.stop()
    async with client(server, tmp_path) as ws:
        expected = await send_all(ws)
        await shown(ws, look, "cannot be reached")
        await server.start()
        try:
            assert await ws.flush(10)
            assert server.applied == expected
            # Died, back, died: the same again on a link that was up.
            await server.stop()
            await shown(ws, look, "cannot be reached")
            await ws.send("late")
            await server.start()
            assert await ws.flush(10)
            assert server.payloads[-1] == "late"
        finally:
            await server.stop()


async def test_a_server_that_selects_no_subprotocol(tmp_path: Path, look: Look) -> None:
    """A 101 without a subprotocol of ours is closed with 1002 and said, and tried again."""
    async with PlainServer() as server, client(server, tmp_path) as ws:
        server.select = False
        await ws.send("x")
        await shown(ws, look, "does not speak durablews")
        assert look()["blocked"] is not None
        server.select = True
        assert await ws.flush(10)
        assert (server.payloads, server.closes[0][0]) == (["x"], 1002)


async def test_acks_for_what_is_not_in_flight_settle_nothing(tmp_path: Path) -> None:
    """C4: a server that acks everything before anything was sent, and other priorities later, changes nothing."""

    async def eager(server: PlainServer, ws: ServerConnection) -> None:
        for priority in (1, 0, -1, 7):
            await server.say(ws, t="ack", p=priority, s=2**52)
        await server.say(ws, t="nack", p=0, s=2**52, code="invalid", final=True)
        stream = await server.greet(ws)
        while True:
            frame = await server.hear(ws)
            await server.say(ws, t="ack", p=7, s=2**52)
            await server.say(ws, t="ack", p=frame["p"], s=frame["m"][0][0] - 1)
            await server.take(ws, stream, frame)

    async with PlainServer(eager) as server, client(server, tmp_path) as ws:
        expected = await send_all(ws)
        assert await ws.flush(10)
        stats = await ws.stats()
        assert (stats.acked, stats.dead) == (30, 0)
        assert stats.stray_answers >= 5
    assert sorted(server.applied) == sorted(expected)


async def test_a_server_that_nacks_everything_for_a_while(tmp_path: Path) -> None:
    """C7: after each nack the client waits as long as it was told and goes on in order; nothing is given up."""
    nacks: list[float] = []

    async def busy(server: PlainServer, ws: ServerConnection) -> None:
        stream, last = await server.greet(ws), 0
        while True:
            frame = await server.hear(ws)
            now = asyncio.get_running_loop().time()
            if nacks and frame.get("a", 0) > last:
                continue  # behind what was nacked
            if len(nacks) < 3:
                nacks.append(now)
                await server.say(ws, t="nack", p=frame["p"], s=frame["m"][0][0], code="busy", retry=150)
            else:
                if len(nacks) == 3:
                    nacks.append(now)
                await server.take(ws, stream, frame)
                last = frame["m"][-1][0]

    async with PlainServer(busy) as server, client(server, tmp_path) as ws:
        await ws.send_many(range(50))
        assert await ws.flush(10)
        stats = await ws.stats()
        assert (stats.acked, stats.dead, stats.redelivered) == (50, 0, 0)
    assert server.payloads == list(range(50))
    assert all(after - before >= 0.15 for before, after in pairwise(nacks))


async def test_a_welcome_twice_is_one_welcome(tmp_path: Path) -> None:
    """A second welcome changes nothing."""

    async def twice(server: PlainServer, ws: ServerConnection) -> None:
        stream = await server.greet(ws)
        await server.say(ws, t="welcome", window=0, max_bytes=65536)
        while True:
            await server.take(ws, stream, await server.hear(ws))

    async with PlainServer(twice) as server, client(server, tmp_path) as ws:
        expected = await send_all(ws)
        assert await ws.flush(10)
        assert (await ws.stats()).connects == 1
    assert sorted(server.applied) == sorted(expected)


async def test_a_window_of_zero_that_opens(tmp_path: Path) -> None:
    """Nothing is sent while the window is 0; a flow frame lets everything go on the same connection."""
    opened = asyncio.Event()

    async def pausing(server: PlainServer, ws: ServerConnection) -> None:
        stream = await server.greet(ws, window=0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await server.hear(ws)
        opened.set()
        await server.say(ws, t="flow", window=5)
        while True:
            frame = await server.hear(ws)
            assert len(frame["m"]) <= 5
            await server.take(ws, stream, frame)

    async with PlainServer(pausing) as server, client(server, tmp_path) as ws:
        expected = await send_all(ws)
        assert not opened.is_set()
        assert await ws.flush(10)
        assert server.applied == expected
        assert (await ws.stats()).connects == 1


async def test_a_link_that_is_cut_fifty_times(tmp_path: Path) -> None:
    """P3, P5: aborts at random moments of a stream lose nothing, double nothing and keep the order."""

    async def cutting(server: PlainServer, ws: ServerConnection) -> None:
        stream, frames = await server.greet(ws), len(server.times) % 4
        for _ in range(frames):
            await server.take(ws, stream, await server.hear(ws))
        frame = await server.hear(ws)
        if len(server.times) % 2:
            await server.take(ws, stream, frame)
        ws.transport.abort()
        await ws.wait_closed()

    settings = {"reconnect": {"base_delay": 0.001, "max_delay": 0.002}, "delivery": {"window": 50}}
    async with PlainServer(cutting, window=20) as server, client(server, tmp_path, **settings) as ws:
        sending = asyncio.create_task(send_all(ws, 3000))
        await until(lambda: len(server.times) >= 50)
        server.trouble = None
        expected = await sending
        assert await ws.flush(20)
        assert (await ws.stats()).redelivered > 0
    assert len(server.applied) == len(expected)
    for priority in (1, 0, -1):
        assert [p for p in server.applied if p[0] == priority] == [p for p in expected if p[0] == priority]


async def test_a_link_whose_packets_vanish_is_left(tmp_path: Path, look: Look) -> None:
    """P8: a peer that neither answers pings nor says anything is left within the heartbeat's time."""

    async def frozen(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        ws.transport.pause_reading()
        await until(lambda: len(server.times) > 1)
        ws.transport.abort()

    heartbeat = {"interval": 0.1, "timeout": 0.1, "max_missed": 2}
    async with PlainServer(frozen) as server, client(server, tmp_path, heartbeat=heartbeat, reconnect=VISIBLE) as ws:
        await shown(ws, look, "closed with 4408: nothing was heard for too long")
        await until(lambda: len(server.times) > 1)
        # interval * max_missed + timeout, the next try, the close handshake, and a machine that is busy
        assert server.times[1] - server.times[0] < 0.3 + 0.3 + 2 + 3
        server.trouble = None
        await ws.send("x")
        assert await ws.flush(10)


@pytest.mark.parametrize("trouble", [None, 401])
async def test_secrets_show_nowhere(
    tmp_path: Path, look: Look, caplog: pytest.LogCaptureFixture, trouble: int | None
) -> None:
    """No token, header, password or query is in a log at DEBUG, a reason, an event, the files or in inspect."""
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    said: list[str] = []

    async def listen(ws: Client) -> None:
        async for event in ws.events():
            said.append(repr(event))

    async with PlainServer() as server:
        user, token = ("user:SECRET-pw@", None) if trouble else ("", "SECRET-token")
        url = f"ws://{user}127.0.0.1:{server.port}/path?key=SECRET-query"
        if trouble:
            server.refusal = trouble, {}
        headers = {"X-Api-Key": "SECRET-header"}
        async with client(server, tmp_path, url=url, token=token, headers=headers) as ws:
            listening = asyncio.create_task(listen(ws))
            await ws.send("x")
            if trouble:
                await shown(ws, look, "HTTP 401")
                server.refusal = None
            assert await ws.flush(10)
            said += [repr(await ws.stats()), repr(ws), repr(look())]
        await listening
        request = server.requests[-1]
    assert request.headers["X-Api-Key"] == "SECRET-header"
    basic = base64.b64encode(b"user:SECRET-pw").decode()
    assert request.headers["Authorization"] == (f"Basic {basic}" if trouble else "Bearer SECRET-token")
    assert "SECRET-query" in request.path
    said.append(caplog.text)
    said += contents(tmp_path)
    for secret in ("SECRET", basic):
        assert not [text for text in said if secret in text]


def contents(folder: Path) -> list[str]:
    return [path.read_bytes().decode("latin-1") for path in folder.iterdir() if path.is_file()]


async def test_headers_do_not_follow_a_redirect_to_another_server(tmp_path: Path, look: Look) -> None:
    """A captive portal or a wrong proxy that redirects to another address gets no header and no token of ours."""
    async with PlainServer() as other, PlainServer() as server:
        server.refusal = 302, {"Location": other.url}
        async with client(server, tmp_path, headers={"X-Api-Key": "secret"}) as ws:
            await shown(ws, look, "redirects to an address that is not allowed")
        assert other.requests == []


async def test_a_redirect_on_the_same_server_is_followed(tmp_path: Path) -> None:
    """What a server answers about its own paths is honoured, with the token."""

    async with PlainServer() as server:
        request = server._request

        def redirect(connection: ServerConnection, asked: Any) -> Any:
            server.refusal = None if asked.path == "/there" else (302, {"Location": "/there"})
            return request(connection, asked)

        server._request = redirect  # type: ignore[method-assign,assignment]
        await server.stop()
        await server.start()
        async with client(server, tmp_path, token="t") as ws:
            await ws.send("x")
            assert await ws.flush(10)
        assert [(r.path, r.headers["Authorization"]) for r in server.requests] == [
            ("/", "Bearer t"),
            ("/there", "Bearer t"),
        ]


@pytest.mark.parametrize(
    "given",
    [
        {"url": lambda: "ws://["},
        {"url": lambda: "http://x"},
        {"url": lambda: None},
        {"url": lambda: 1 / 0},
        {"headers": lambda: 5},
        {"headers": {"X\nY": "a"}},
        {"token": lambda: 1 / 0},
        {"token": "a\nb"},
        {"proxy": "nonsense"},
        {"proxy": "socks5h://127.0.0.1:1"},
        {"url": "wss://127.0.0.1:1/", "tls": {"ca_file": "/nowhere"}},
        {"auth": {"token_file": "/nowhere"}},
    ],
    ids=named,
)
async def test_what_cannot_be_dialled_is_a_reason_and_not_the_end(
    tmp_path: Path, look: Look, given: dict[str, Any]
) -> None:
    """P8: a provider, an address, a header or a proxy that cannot be used is visible, and tried again."""
    async with PlainServer() as server, client(server, tmp_path, **given) as ws:
        await ws.send("kept")
        await until(lambda: ws.reason is not None)
        await until(lambda: look()["reason"] is not None)
        first = ws.reason
        assert first is not None
        assert "secret" not in first
        assert ws._running is not None
        await until_true(lambda: attempts(ws))
        assert not ws._running.done()
        assert (await ws.stats()).pending == 1


async def attempts(ws: Client) -> bool:
    """Wait for one more try."""
    async for _ in ws.events():
        return True
    return False


async def test_providers_are_asked_on_every_attempt(tmp_path: Path) -> None:
    """`url`, `headers` and `token` may be callables, sync or async: a new token is shown after a 401."""
    async with PlainServer() as server:
        server.refusal = 401, {}

        async def token() -> str:
            if server.requests:
                server.refusal = None
            return "new" if server.requests else "old"

        given = {"url": lambda: server.url, "token": token, "headers": lambda: {"X-N": str(len(server.requests))}}
        async with client(server, tmp_path, **given) as ws:
            await ws.send("x")
            assert await ws.flush(10)
        assert [request.headers["Authorization"] for request in server.requests] == ["Bearer old", "Bearer new"]
        assert [request.headers["X-N"] for request in server.requests] == ["0", "1"]


async def test_retries_that_are_used_up_keep_everything(tmp_path: Path, look: Look) -> None:
    """`max_retries` ends in DISCONNECTED with the reason; sending goes on to work, and closing does not wait."""
    server = PlainServer()
    await server.start()
    await server.stop()
    retry = {**FAST, "max_retries": 2}
    async with client(server, tmp_path, reconnect=retry, delivery={"drain_timeout": 60}) as ws:
        await ws.send("a")
        await until(lambda: ws._manager is not None and ws._manager.given_up)
        await ws.send("b")
        stats = await ws.stats()
        assert (stats.state, stats.pending) == ("DISCONNECTED", 2)
        assert "cannot be reached" in (stats.reason or "")
        assert (look()["state"], "cannot be reached" in look()["reason"]) == ("DISCONNECTED", True)


async def test_a_stuck_server_does_not_hold_up_close(tmp_path: Path) -> None:
    """P7, P8: closing ends within its time although the server reads nothing and the socket is full."""

    async def stuck(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws, max_bytes=1 << 30)
        ws.transport.pause_reading()
        await ws.wait_closed()

    def full(ws: Client) -> bool:
        link = ws._manager._attempts.link if ws._manager is not None else None
        return link is not None and link._websocket.transport.get_write_buffer_size() > 1_000_000

    async with PlainServer(stuck) as server:
        async with client(server, tmp_path, delivery={"drain_timeout": 0.1}) as ws:
            await ws.send(b"x" * 12_000_000)
            await until(lambda: full(ws))
            started = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - started < 10


async def test_closing_does_not_wait_for_a_link_that_never_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P8: a disk that fails just when hello is to be said is a visible trouble, and closing ends all the same."""
    asked, fail = asyncio.Event(), asyncio.Event()

    async def broken() -> tuple[str, int]:
        asked.set()
        await fail.wait()
        raise StorageFailed("agent.db", "the disk is on fire")

    async with PlainServer() as server, client(server, tmp_path) as ws:
        monkeypatch.setattr(ws._outbox, "introduce", broken)
        await asked.wait()
        closing = asyncio.create_task(ws.close())
        await asyncio.sleep(0)
        fail.set()
        await asyncio.wait_for(closing, 5)


async def test_a_disk_that_cannot_be_read_is_a_visible_trouble(
    tmp_path: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P8: reads that fail end the connection, not the manager; the reason is visible, and it goes on afterwards."""
    async with PlainServer() as server, client(server, tmp_path) as ws:
        await until(lambda: ws.state.value == "CONNECTED")
        real = ws._outbox._fetch

        def broken(*_: object) -> Any:
            raise sqlite3.OperationalError("disk I/O error")

        monkeypatch.setattr(ws._outbox, "_fetch", broken)
        await ws.send("x")
        await shown(ws, look, "closed with 1011: the outbox cannot be read")
        monkeypatch.setattr(ws._outbox, "_fetch", real)
        assert await ws.flush(10)
        assert server.payloads == ["x"]


@pytest.mark.parametrize(
    "text", ["", "nonsense", "Mon, 01 Jan 0001 00:00:00 -0000", "Mon, 99 Foo 99999 00:00:00 GMT", "Thu, 1 Jan 1970"]
)
def test_a_strange_date_is_no_date(text: str) -> None:
    """A server with a Date that cannot be one is connected to all the same."""

    class Response:
        headers = {"Date": text}  # noqa: RUF012

    class WebSocket:
        response = Response()

    found = server_date(WebSocket())  # type: ignore[arg-type]
    assert found is None or math.isfinite(found)
