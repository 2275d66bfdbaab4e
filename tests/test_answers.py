"""What servers answer: each answer is a sentence in `stats`, in `inspect` and in an event, and none is the end."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import FAST, PlainServer, until, until_true
from websockets.asyncio.server import ServerConnection

import durablews
from durablews import cli, housekeeping
from durablews.client import Client
from durablews.events import Disconnected, Event, Failed, Reconnecting, Vetoed

# Long enough that nothing but what a test does ends the wait for the next try.
SLOW = {"base_delay": 1000, "max_delay": 1000, "jitter": 0.0, "connect_timeout": 5}
SECRET = "SECRET"


@pytest.fixture(autouse=True)
def quick_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "_NOTE_INTERVAL", 0.01)


def client(url: Any, path: Path, **settings: Any) -> Client:
    given = {"reconnect": FAST, "proxy": None, "dialect": "durablews.v1.json", **settings}
    given["delivery"] = {"drain_timeout": 0, **settings.get("delivery", {})}
    return durablews.connect(url, path / "agent.db", **given)


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["inspect", str(path / "agent.db"), "--json"]) == 0
    link: dict[str, Any] = json.loads(capsys.readouterr().out)["link"]
    return link


def listening(ws: Client) -> list[Event]:
    """Gather the events of a client from now on."""
    seen: list[Event] = []
    events = ws.events()

    async def listen() -> None:
        async for event in events:
            seen.append(event)  # noqa: PERF401 - what was read before a cancellation counts

    ws._listening = asyncio.create_task(listen())  # type: ignore[attr-defined] # kept for as long as the client is
    return seen


# -- answers to the handshake


STATUSES = {
    200: ("a captive portal or a web page", "http", False),
    302: ("redirects to an address that is not allowed", "redirect", False),
    400: ("HTTP 400", "http", True),
    401: ("HTTP 401: the token is missing or not accepted", "credentials", True),
    403: ("HTTP 403: not allowed", "credentials", True),
    404: ("HTTP 404: there is nothing at this path", "http", False),
    408: ("HTTP 408", "http", False),
    429: ("HTTP 429: too many connections", "http", False),
    500: ("HTTP 500: the server failed", "http", False),
    501: ("HTTP 501", "http", False),
    502: ("HTTP 502: a gateway cannot reach the server", "http", False),
    503: ("HTTP 503: the server is not available", "http", False),
    504: ("HTTP 504: the server did not answer its gateway", "http", False),
}


@pytest.mark.parametrize("status", STATUSES)
async def test_every_status_is_visible_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    """P8: the status is a sentence in stats, inspect and an event; the link stays RECONNECTING; then it recovers."""
    sentence, error, blocked = STATUSES[status]
    async with PlainServer() as server:
        server.refusal = status, {"Location": "http://login.example/"} if status == 302 else {}
        async with client(server.url, tmp_path, reconnect=SLOW) as ws:
            seen = listening(ws)
            await ws.send("kept")
            await until(lambda: sentence in (inspected(tmp_path, capsys)["reason"] or ""))
            stats, link = await ws.stats(), inspected(tmp_path, capsys)
            assert sentence in (stats.reason or "")
            assert (stats.state, link["state"]) == ("RECONNECTING", "RECONNECTING")
            assert ((stats.blocked is not None), (link["blocked"] is not None)) == (blocked, blocked)
            assert stats.next_attempt == link["next_attempt"] is not None
            (failed,) = [event for event in seen if isinstance(event, Failed)]
            assert (failed.error, failed.status) == (error, None if status == 302 else status)
            assert sentence in failed.reason
            server.refusal = None
            ws.wake()
            assert await ws.flush(10)
        assert server.payloads == ["kept"]


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")


async def no_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"220 mail.example ESMTP\r\n")
    await writer.drain()


async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer so slowly that something always moves."""
    for byte in b"HTTP/1.1 101 Switching Protocols\r\n" * 1000:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.01)


async def no_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 100_000 + b"\r\n")
    await writer.drain()


@asynccontextmanager
async def raw_server(handle: Handler) -> AsyncIterator[str]:
    async def handled(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort() if handle is reset else writer.close()

    server = await asyncio.start_server(handled, "127.0.0.1", 0)
    try:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    finally:
        server.close()


@pytest.mark.parametrize(
    ("handle", "sentence", "error"),
    [
        (reset, "ended the connection without an answer", "network"),
        (hang_up, "ended the connection without an answer", "network"),
        (no_http, "did not answer as a WebSocket server", "handshake"),
        (no_end, "did not answer as a WebSocket server", "handshake"),
        (mute, "did not answer within 0.2 s", "timeout"),
        (drip, "did not answer within 0.2 s", "timeout"),
    ],
)
async def test_what_is_no_answer_is_visible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], handle: Handler, sentence: str, error: str
) -> None:
    """P8: a reset, a server of something else, one that says nothing, or too slowly: a sentence, and another try."""
    retry = {**FAST, "connect_timeout": 0.2 if error == "timeout" else 5}
    async with raw_server(handle) as url, client(url, tmp_path, reconnect=retry) as ws:
        seen = listening(ws)
        await until(lambda: len([event for event in seen if isinstance(event, Failed)]) >= 3)
        assert {event.error for event in seen if isinstance(event, Failed)} == {error}
        assert sentence in (ws.reason or "")
        await until(lambda: sentence in (inspected(tmp_path, capsys)["reason"] or ""))
        assert (await ws.stats()).blocked is None


@pytest.mark.parametrize(
    ("url", "sentence", "error"),
    [
        ("ws://nowhere.invalid/", "the name of ws://nowhere.invalid/ cannot be resolved", "dns"),
        ("ws://127.0.0.1:1/", "ws://127.0.0.1:1/ cannot be reached", "network"),
    ],
)
async def test_a_name_or_a_port_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str, sentence: str, error: str
) -> None:
    """P8: DNS that knows no such name (RFC 6761 reserves .invalid), and a port where nobody listens."""
    async with client(url, tmp_path) as ws:
        seen = listening(ws)
        await until(lambda: len([event for event in seen if isinstance(event, Failed)]) >= 2, timeout=60)
        assert sentence in (ws.reason or "")
        assert error in {event.error for event in seen if isinstance(event, Failed)}
        await until(lambda: sentence in (inspected(tmp_path, capsys)["reason"] or ""))


async def test_reconnecting_says_when(tmp_path: Path) -> None:
    """The event has the number of the try, the delay, and the same moment as `stats`."""
    async with client("ws://127.0.0.1:1/", tmp_path, reconnect=SLOW) as ws:
        seen = listening(ws)
        await until(lambda: [event for event in seen if isinstance(event, Reconnecting)])
        (event,) = [event for event in seen if isinstance(event, Reconnecting)]
        assert (event.attempt, event.delay, event.at) == (1, 1000, (await ws.stats()).next_attempt)


# -- credentials


async def test_a_refused_token_is_asked_for_again_at_once(tmp_path: Path) -> None:
    """An expired token costs one refused try: the provider's next one is used, without any wait."""
    tokens = iter(["old", "new", "newer"])
    async with PlainServer() as server:
        refuse = server._request

        def check(connection: ServerConnection, request: Any) -> Any:
            server.refusal = None if request.headers["Authorization"] == "Bearer new" else (401, {})
            return refuse(connection, request)

        server._request = check  # type: ignore[method-assign]
        await server.stop()
        await server.start()
        async with client(server.url, tmp_path, token=lambda: next(tokens), reconnect=SLOW) as ws:
            await ws.send("x")
            assert await ws.flush(10)
    assert [request.headers["Authorization"] for request in server.requests] == ["Bearer old", "Bearer new"]
    assert next(tokens) == "newer"  # asked twice, not three times


async def test_a_token_that_stays_refused_is_not_shown_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The provider is asked once more at once; the same token again is not worth a try: blocked, ten longest delays."""
    asked = 0

    def token() -> str:
        nonlocal asked
        asked += 1
        return "same"

    async with PlainServer() as server:
        server.refusal = 403, {}
        async with client(server.url, tmp_path, token=token, reconnect=SLOW) as ws:
            seen = listening(ws)
            await until(lambda: [event for event in seen if isinstance(event, Reconnecting)])
            (event,) = [event for event in seen if isinstance(event, Reconnecting)]
            assert event.delay >= 10_000
            assert (asked, len(server.times)) == (2, 1)
            assert "HTTP 403" in ((await ws.stats()).blocked or "")
            await until(lambda: "HTTP 403" in (inspected(tmp_path, capsys)["blocked"] or ""))
            # Its owner may say that all is well now.
            server.refusal = None
            ws.wake()
            await ws.send("x")
            assert await ws.flush(10)
            assert (await ws.stats()).blocked is None


async def test_a_new_token_in_the_file_ends_the_wait(tmp_path: Path) -> None:
    """Who writes the right token into the file is connected within a second or two, not after ten longest delays."""
    file = tmp_path / "token"
    file.write_text("wrong")
    async with PlainServer() as server:
        server.refusal = 401, {}
        async with client(server.url, tmp_path, auth={"token_file": str(file)}, reconnect=SLOW) as ws:
            seen = listening(ws)
            await until(lambda: [event for event in seen if isinstance(event, Reconnecting)])
            server.refusal = None
            file.write_text("right")
            await ws.send("x")
            assert await ws.flush(10)
    assert [request.headers["Authorization"] for request in server.requests] == ["Bearer wrong", "Bearer right"]


async def test_a_provider_that_mends_itself_ends_the_wait(tmp_path: Path) -> None:
    """Also a callable is asked again, every longest delay, while the server does not accept what it gave."""
    good = asyncio.Event()
    retry = {**FAST, "base_delay": 0.05, "max_delay": 0.05}
    async with PlainServer() as server:
        server.refusal = 401, {}
        async with client(server.url, tmp_path, token=lambda: f"{good.is_set()}", reconnect=retry) as ws:
            await until(lambda: ws.reason and "401" in ws.reason)
            before = len(server.times)
            server.refusal = None
            good.set()
            await ws.send("x")
            assert await ws.flush(10)
            assert len(server.times) == before + 1


@pytest.mark.parametrize("code", [1008, 4401, 4403])
async def test_a_close_for_credentials_asks_for_others(tmp_path: Path, code: int) -> None:
    """PROTOCOL.md section 6: a server that says after the handshake that it does not know us gets the next token."""

    async def strict(server: PlainServer, ws: ServerConnection) -> None:
        if server.requests[-1].headers["Authorization"] == "Bearer new":
            await server.behave(ws)
        else:
            await ws.close(code, "who are you")

    tokens = iter(["old", "new"])
    async with PlainServer(strict) as server:
        async with client(server.url, tmp_path, token=lambda: next(tokens), reconnect=SLOW) as ws:
            await ws.send("x")
            assert await ws.flush(10)
            assert len(server.times) == 2


async def test_a_provider_that_fails_is_visible_and_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Offline, a token server cannot be reached either: a sentence without its words, ordinary backoff, not blocked."""
    caplog.set_level(logging.DEBUG)
    asked = 0

    async def token() -> str:
        nonlocal asked
        asked += 1
        if asked < 4:
            raise ConnectionError(SECRET)
        return "t"

    async with PlainServer() as server, client(server.url, tmp_path, token=token) as ws:
        seen = listening(ws)
        await ws.send("x")
        assert await ws.flush(10)
        failed = [event for event in seen if isinstance(event, Failed)]
    assert [(event.error, event.reason) for event in failed] == [
        ("provider", "the callable for token failed: ConnectionError")
    ] * 3
    assert SECRET not in caplog.text
    assert len(server.times) == 1


async def test_a_provider_that_hangs_has_a_time_limit_of_its_own(tmp_path: Path) -> None:
    """`provider_timeout` is not `connect_timeout`: the attempt fails, and the next one asks again."""
    asked = 0

    async def url() -> str:
        nonlocal asked
        asked += 1
        if asked == 1:
            await asyncio.get_running_loop().create_future()
        return server.url

    async with PlainServer() as server:
        retry = {**FAST, "connect_timeout": 1000}
        async with client(url, tmp_path, auth={"provider_timeout": 0.1}, reconnect=retry) as ws:
            seen = listening(ws)
            await ws.send("x")
            assert await ws.flush(10)
            (failed,) = [event for event in seen if isinstance(event, Failed)]
            assert failed.reason == "the callable for url did not answer within 0.1 s"


# -- the first word


async def test_on_open_speaks_first(tmp_path: Path) -> None:
    """An authentication message and its answer come before the hello, on every connection."""
    heard: list[Any] = []

    async def guarded(server: PlainServer, ws: ServerConnection) -> None:
        heard.append(await ws.recv())
        await ws.send('{"welcome": "friend"}')
        if len(heard) == 1:
            await ws.close(1012)
        else:
            await server.behave(ws)

    async def sign_in(ws: Any) -> None:
        await ws.send('{"token": "t"}')
        assert await ws.recv() == '{"welcome": "friend"}'

    async with PlainServer(guarded) as server, client(server.url, tmp_path, on_open=sign_in) as ws:
        await ws.send("x")
        assert await ws.flush(10)
        assert heard == ['{"token": "t"}'] * 2
        assert server.payloads == ["x"]


async def raises(ws: Any) -> None:
    raise RuntimeError(SECRET)


async def hangs(ws: Any) -> None:
    await ws.recv()


async def not_allowed(ws: Any) -> None:
    raise PermissionError(SECRET)


@pytest.mark.parametrize(
    ("on_open", "sentence", "error"),
    [
        (raises, "on_open failed: RuntimeError", "on_open"),
        (hangs, "on_open was not done within connect_timeout", "on_open"),
        (not_allowed, "on_open says that the server does not accept the credentials", "credentials"),
    ],
)
async def test_on_open_that_fails_is_visible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], on_open: Any, sentence: str, error: str
) -> None:
    """It is a failed attempt with a sentence, never its words; nothing is sent; the next try calls it again."""
    calls = 0

    async def hook(ws: Any) -> None:
        nonlocal calls
        calls += 1
        await on_open(ws)

    async def quiet(server: PlainServer, ws: ServerConnection) -> None:
        server.frames.extend([json.loads(data) async for data in ws])

    retry = {**FAST, "connect_timeout": 0.2 if on_open is hangs else 5}
    async with PlainServer(quiet) as server, client(server.url, tmp_path, on_open=hook, reconnect=retry) as ws:
        seen = listening(ws)
        await ws.send("kept")
        await until(lambda: calls >= 2)
        await until(lambda: inspected(tmp_path, capsys)["reason"] == sentence)
        assert {event.error for event in seen if isinstance(event, Failed)} == {error}
        assert SECRET not in repr(seen)
        assert (server.frames, (await ws.stats()).pending) == ([], 1)


async def test_a_server_that_leaves_during_on_open(tmp_path: Path) -> None:
    """Its close code counts as after a welcome: 4401 asks for other credentials, 1012 comes back."""

    async def leaves(server: PlainServer, ws: ServerConnection) -> None:
        await ws.close(4401 if len(server.times) == 1 else 1012)

    tokens = iter("abcdef")
    async with PlainServer(leaves) as server:
        async with client(server.url, tmp_path, on_open=hangs, token=lambda: next(tokens)) as ws:
            seen = listening(ws)
            await until(lambda: len(server.times) >= 3)
            codes = [event.code for event in seen if isinstance(event, Disconnected)]
            assert codes[:2] == [4401, 1012]


# -- the last word


@pytest.mark.parametrize("sync", [True, False])
async def test_a_veto_stops_for_good(tmp_path: Path, capsys: pytest.CaptureFixture[str], sync: bool) -> None:
    """DISCONNECTED, everything kept and told; sending goes on to work, and not even `wake` dials again."""
    asked: list[Any] = []

    def veto(event: Failed | Disconnected) -> bool:
        asked.append(event)
        return isinstance(event, Failed) and event.status == 404

    async def veto_later(event: Failed | Disconnected) -> bool:
        return veto(event)

    async with PlainServer() as server:
        server.refusal = 503, {}
        async with client(server.url, tmp_path, veto=veto if sync else veto_later) as ws:
            seen = listening(ws)
            await ws.send("a")
            await until(lambda: len(server.times) >= 3)
            server.refusal = 404, {}
            await until(lambda: [event for event in seen if isinstance(event, Vetoed)])
            tries = len(server.times)
            assert "HTTP 404" in next(event.reason for event in seen if isinstance(event, Vetoed))
            ws.wake()
            await ws.send("b")
            assert not await ws.flush()
            stats = await ws.stats()
            assert (stats.state, stats.pending, len(server.times)) == ("DISCONNECTED", 2, tries)
            assert "HTTP 404" in (stats.reason or "")
            assert inspected(tmp_path, capsys)["state"] == "DISCONNECTED"
    assert {event.status for event in asked} == {503, 404}


async def test_a_veto_that_fails_stops_nothing(tmp_path: Path) -> None:
    """What it raises is visible, and the link goes on."""

    def veto(event: object) -> bool:
        raise ZeroDivisionError(SECRET)

    async with PlainServer() as server, client(server.url, tmp_path, veto=veto) as ws:
        server.refusal = 503, {}
        await until(lambda: len(server.times) >= 2)

        async def visible() -> bool:
            return (await ws.stats()).blocked == "the callable for veto failed: ZeroDivisionError"

        await until_true(visible)
        server.refusal = None
        await ws.send("x")
        assert await ws.flush(10)


@pytest.mark.parametrize("name", ["on_open", "veto"])
def test_a_hook_that_cannot_be_called_is_said_at_once(tmp_path: Path, name: str) -> None:
    """A mistake in the program is an error of `connect`."""
    with pytest.raises(durablews.ConfigError, match=f"{name} must be a callable, not str"):
        durablews.connect("ws://x", tmp_path / "agent.db", **{name: "x"})
