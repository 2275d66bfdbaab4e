"""Servers, networks and callables that do what nobody expects: the link neither ends, nor spins, nor tells secrets."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from namespaces import Network, network_fixture  # noqa: F401 - pytest looks for it here
from servers import FAST, PlainServer, until
from support import named
from test_answers import SLOW, client, inspected, listening, quick_notes  # noqa: F401 - a fixture that acts by itself
from websockets.asyncio.server import ServerConnection

from durablews import manager as managing
from durablews.attempt import Attempts
from durablews.client import Client
from durablews.config import DeliveryConfig, ReconnectConfig
from durablews.delivery.actions import Close
from durablews.delivery.delivery import Delivery
from durablews.delivery.suspicion import Closed
from durablews.events import Connected, Disconnected, Event, Failed, Reconnecting
from durablews.housekeeping import Housekeeping
from durablews.providers import Provider, ProviderFailed
from durablews.reconnection import Reconnection, closed_outcome, refused_outcome
from durablews.wire.dialect import Introduction
from durablews.wire.native import NativeDialect

TOKEN = "a-token-that-nobody-may-see"


def failures(seen: list[Event], error: str) -> list[Failed]:
    return [event for event in seen if isinstance(event, Failed) and event.error == error]


# -- answers that no server should give

NONSENSE = [
    ("503 Busy\r\nRetry-After: 1\r\nRetry-After: 2", "http"),
    ("302 Found\r\nLocation: ws://a/\r\nLocation: ws://b/", "redirect"),
    ("302 Found\r\nLocation: http://[bad/", "redirect"),
    ("302 Found\r\nLocation: ws://a:99999/", "redirect"),
]


@pytest.mark.parametrize(("answer", "error"), NONSENSE)
async def test_an_answer_that_makes_no_sense_is_tried_again(tmp_path: Path, answer: str, error: str) -> None:
    """P8: a header that stands there twice, or names no address, is the server's trouble, and one more try."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n".encode())
        writer.close()

    async with await asyncio.start_server(say, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        async with client(f"ws://127.0.0.1:{port}/", tmp_path) as ws:
            seen = listening(ws)
            await until(lambda: len(failures(seen, error)) >= 3)
            assert (await ws.stats()).blocked is None


async def test_a_welcome_with_two_dates_is_a_welcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that adds a Date to the one that is there must not keep a client out."""
    accepted = PlainServer._request

    def request(self: PlainServer, connection: ServerConnection, request: Any) -> Any:
        connection.protocol.accept = doubled(connection.protocol.accept)  # type: ignore[method-assign]
        return accepted(self, connection, request)

    def doubled(accept: Callable[..., Any]) -> Callable[..., Any]:
        def respond(*arguments: Any) -> Any:
            response = accept(*arguments)
            response.headers["Date"] = "Tue, 24 Nov 2026 16:00:00 GMT"
            return response

        return respond

    monkeypatch.setattr(PlainServer, "_request", request)
    async with PlainServer() as server, client(server.url, tmp_path) as ws:
        await ws.send("x")
        assert await ws.flush(10)


async def test_a_defect_of_ours_is_a_reason_and_not_the_end(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """P8: whatever an attempt raises is visible, logged, and tried again."""
    genuine, calls = Attempts.make, 0

    async def broken(self: Attempts, target: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise ZeroDivisionError(TOKEN)
        return await genuine(self, target)

    monkeypatch.setattr(Attempts, "make", broken)
    async with PlainServer() as server, client(server.url, tmp_path) as ws:
        seen = listening(ws)
        await ws.send("x")
        assert await ws.flush(10)
        assert {event.reason for event in failures(seen, "defect")} == {"a defect in durablews: ZeroDivisionError"}
        assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"] * 3


async def test_a_manager_that_ends_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a defect ended the link for good, that would not look like a long attempt: state, reason and note say it."""

    async def broken(self: Any, *arguments: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(managing.ConnectionManager, "_wait", broken)
    async with client("ws://127.0.0.1:1/", tmp_path) as ws:
        await ws.send("x")
        assert await ws.flush(10) is False
        stats = await ws.stats()
        assert (stats.state, stats.pending) == ("DISCONNECTED", 1)
        assert stats.blocked == "a defect in durablews ended the link for good: ZeroDivisionError"
        await until(lambda: inspected(tmp_path, capsys)["blocked"] == stats.blocked)


# -- loops that spin


async def test_a_full_window_under_a_rate_limit_waits(tmp_path: Path) -> None:
    """P8 and no busy loop: with a rate limit and a window that is full, the client sleeps until something happens."""

    async def deaf(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        while True:
            await server.hear(ws)

    async with PlainServer(deaf) as server:
        delivery = {"rate_limit": 10, "window": 4, "ack_timeout": 30}
        async with client(server.url, tmp_path, delivery=delivery) as ws:
            await ws.send_many(range(50))
            await until(lambda: sum(len(frame["m"]) for frame in server.frames) == 3)
            looks, genuine = 0, Delivery.handle_timer

            def counted(self: Delivery, now: float) -> None:
                nonlocal looks
                looks += 1
                genuine(self, now)

            Delivery.handle_timer = counted  # type: ignore[method-assign]
            try:
                await asyncio.sleep(0.5)
            finally:
                Delivery.handle_timer = genuine  # type: ignore[method-assign]
            assert looks < 20


def test_a_server_that_asks_and_does_not_read_is_left() -> None:
    """P6: what a server asks for and does not take is not gathered without end."""
    delivery = Delivery(DeliveryConfig(), instance="0" * 16)
    wire = NativeDialect("durablews.v1.json").connection("durablews.v1.json")
    delivery.connected(wire, Introduction("0" * 32, "0" * 16, 0, 1 << 20, "test"))
    for number in range(10_000):
        delivery.receive(f'{{"t":"ping","n":{number}}}', 0.0)
    closes = [action for action in delivery.actions() if isinstance(action, Close)]
    assert [close.code for close in closes] == [4408]
    frames = 0
    while delivery.frame_to_send(0.0) is not None:
        frames += 1
    assert frames <= 110


async def test_on_open_that_fills_the_socket_is_left_in_time(tmp_path: Path) -> None:
    """P8: a server that does not read what `on_open` says holds up neither the close nor the next try."""

    async def mute(server: PlainServer, ws: ServerConnection) -> None:
        ws.transport.pause_reading()
        await ws.wait_closed()

    async def shout(websocket: Any) -> None:
        await websocket.send(b"x" * 20_000_000)

    async with PlainServer(mute) as server:
        retry = {**FAST, "connect_timeout": 0.3}
        async with client(server.url, tmp_path, reconnect=retry, on_open=shout) as ws:
            seen = listening(ws)
            await until(lambda: len(failures(seen, "on_open")) >= 2)
            assert failures(seen, "on_open")[0].reason == "on_open was not done within connect_timeout"


async def test_a_server_that_never_welcomes_is_no_progress(tmp_path: Path) -> None:
    """A handshake alone proves nothing, however long it lasts: `max_retries` and the backoff count on."""

    async def mute(server: PlainServer, ws: ServerConnection) -> None:
        await ws.wait_closed()

    retry = {**FAST, "connect_timeout": 0.1, "stable_after": 0.02, "max_retries": 2}
    async with PlainServer(mute) as server, client(server.url, tmp_path, reconnect=retry) as ws:
        await ws.send("x")
        assert await ws.flush(20) is False
        assert (len(server.times), (await ws.stats()).state) == (3, "DISCONNECTED")


async def test_a_connection_that_lasted_begins_the_backoff_anew(tmp_path: Path) -> None:
    """Counted from the welcome: `stable_after` seconds are progress, also when there was nothing to acknowledge."""

    async def leave(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        await asyncio.sleep(0.1)

    retry = {**FAST, "stable_after": 0.05}
    async with PlainServer(leave) as server, client(server.url, tmp_path, reconnect=retry) as ws:
        seen = listening(ws)
        await until(lambda: len([event for event in seen if isinstance(event, Reconnecting)]) >= 4)
        assert {event.attempt for event in seen if isinstance(event, Reconnecting)} == {1}


# -- callables that do what they should not


async def _cancelled(*arguments: object) -> str:
    raise asyncio.CancelledError


def _cancelled_at_once(*arguments: object) -> str:
    raise asyncio.CancelledError


async def _ended(*arguments: object) -> str:
    raise GeneratorExit


class _NoText:
    def __str__(self) -> str:
        raise ZeroDivisionError


class _NoMapping(Mapping[str, str]):
    def __getitem__(self, name: str) -> str:
        raise ZeroDivisionError

    def __iter__(self) -> Iterator[str]:
        raise ZeroDivisionError

    def __len__(self) -> int:
        return 1


class _NeitherTrueNorFalse:
    def __bool__(self) -> bool:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("hook", "error"),
    [
        ({"token": _cancelled}, "provider"),
        ({"token": _cancelled_at_once}, "provider"),
        ({"token": _ended}, "provider"),
        ({"token": _NoText}, "provider"),
        ({"token": lambda: b"abc"}, "provider"),
        ({"token": lambda: "a\nb"}, "provider"),
        ({"headers": lambda: _NoMapping()}, "provider"),
        ({"headers": _NoMapping()}, "provider"),
        ({"headers": {"X": "a\r\nb"}}, "provider"),
        ({"headers": {"X": 1}}, "provider"),
        ({"on_open": _cancelled}, "on_open"),
    ],
    ids=named,
)
async def test_a_callable_that_breaks_is_a_reason_and_not_the_end(
    tmp_path: Path, hook: dict[str, Any], error: str
) -> None:
    """P8: a cancellation that is not for us, an answer that is none: said, tried again, and closing still works."""
    async with PlainServer() as server, client(server.url, tmp_path, **hook) as ws:
        seen = listening(ws)
        await until(lambda: len(failures(seen, error)) >= 2)
        assert ws.state.value != "DISCONNECTED"
        assert server.payloads == []


@pytest.mark.parametrize("answer", [_cancelled, _cancelled_at_once, lambda _: _NeitherTrueNorFalse()])
async def test_a_veto_that_breaks_stops_nothing(tmp_path: Path, answer: Any) -> None:
    """Only a true answer is a veto; what is none is what its owner has to mend."""
    async with client("ws://127.0.0.1:1/", tmp_path, veto=answer) as ws:
        seen = listening(ws)
        await until(lambda: len(failures(seen, "network")) >= 3)
        assert "veto" in ((await ws.stats()).blocked or "")


async def test_who_was_answered_may_ask_again_at_once() -> None:
    """The thread of the last answer may still be ending: that is no callable that hangs."""
    provider = Provider("token", lambda: "x", 5.0)
    for _ in range(300):
        assert await provider.ask() == "x"


async def test_a_cancelled_task_is_cancelled() -> None:
    """A cancellation that is for us ends the asking, as ever."""

    async def hang() -> str:
        await asyncio.get_running_loop().create_future()
        return ""

    asking = asyncio.create_task(Provider("token", hang, 5.0).ask())
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


@pytest.mark.parametrize("url", ["ws://127.0.0.1:1/#part", "ws://user@127.0.0.1:1/", "ws://127.0.0.1:99999/"])
async def test_an_address_that_cannot_be_is_its_owners(tmp_path: Path, url: str) -> None:
    """A fragment, a user without a password, a port that is none: not a redirect, and not the server's fault."""
    async with client(lambda: url, tmp_path) as ws:
        seen = listening(ws)
        await until(lambda: failures(seen, "provider"))
        assert (await ws.stats()).blocked is not None
        assert "user" not in failures(seen, "provider")[0].reason.replace("names a user", "")


async def test_a_token_may_end_with_a_line_end(tmp_path: Path) -> None:
    """So does nearly every file that holds one."""
    async with PlainServer() as server, client(server.url, tmp_path, token=lambda: f" {TOKEN}\n") as ws:
        await ws.send("x")
        assert await ws.flush(10)
        assert server.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"


# -- secrets in other people's words


async def test_a_server_that_repeats_the_token_does_not_spread_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A close reason or a refusal that quotes token or query is shown, logged and stored without them."""
    caplog.set_level(logging.DEBUG, logger="durablews")
    refuse = True

    async def rude(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        frame = await server.hear(ws)
        (first, *_), *_ = frame["m"]
        if refuse:
            await server.say(ws, t="nack", p=0, s=first, code="forbidden", final=True, reason=f"no right for {TOKEN}")
        await asyncio.sleep(0.05)
        await ws.close(4401, f"bad Bearer {TOKEN} or key-in-query")

    async with PlainServer(rude) as server:
        async with client(f"{server.url}?key=key-in-query", tmp_path, token=lambda: TOKEN) as ws:
            seen = listening(ws)
            await ws.send_many(range(3))
            await until(lambda: [event for event in seen if isinstance(event, Disconnected)])
            stats = await ws.stats()
            assert stats.reason == "closed with 4401: bad ... or ..."
            assert stats.dead == 1
            told = f"{seen} {stats} {inspected(tmp_path, capsys)} {caplog.text}"
    told += "".join(str(path.read_bytes()) for path in sorted(tmp_path.glob("agent.db*")))  # noqa: ASYNC240
    assert TOKEN not in told
    assert "key-in-query" not in told
    assert "no right for ..." in told


def test_debug_mode_does_not_log_the_token(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio's debug mode logs the arguments of slow callbacks: a token is none."""
    caplog.set_level(logging.DEBUG)

    async def ask() -> None:
        asyncio.get_running_loop().slow_callback_duration = 0
        assert await Provider("token", lambda: TOKEN, 5.0).ask() == TOKEN
        with pytest.raises(ProviderFailed):
            await Provider("token", lambda: int(TOKEN), 5.0).ask()

    asyncio.run(ask(), debug=True)
    assert "Executing" in caplog.text
    assert TOKEN not in caplog.text


# -- waking up


async def test_a_wake_does_not_wait_for_a_look_at_the_credentials(tmp_path: Path) -> None:
    """`wake` dials now, though a provider hangs that is being asked whether it has others."""
    asked = 0

    async def token() -> str:
        nonlocal asked
        asked += 1
        if asked == 2:
            await asyncio.get_running_loop().create_future()
        return f"token-{asked}"

    async with PlainServer() as server:
        server.refusal = 401, {}
        auth = {"provider_timeout": 1000}
        async with client(server.url, tmp_path, token=token, auth=auth, reconnect=SLOW) as ws:
            await until(lambda: asked == 2)
            server.refusal = None
            started = time.monotonic()
            ws.wake()
            await until(lambda: ws.state.value == "CONNECTED")
            assert time.monotonic() - started < 15


async def test_a_wake_begins_the_backoff_anew(tmp_path: Path) -> None:
    """The tries before it do not count any more."""
    retry = {**FAST, "max_delay": 1000, "factor": 10.0, "jitter": 0.0}
    async with client("ws://127.0.0.1:1/", tmp_path, reconnect=retry) as ws:
        seen = listening(ws)

        def attempts() -> list[int]:
            return [event.attempt for event in seen if isinstance(event, Reconnecting)]

        await until(lambda: attempts()[-1:] == [4])  # the next one is due in 10 s
        ws.wake()
        await until(lambda: len(attempts()) > 4)
        assert attempts()[4] == 1


def test_a_new_address_ends_the_wait_of_a_client(tmp_path: Path, network: Network) -> None:
    """On Linux the kernel's word that the network is back reaches the link: it dials without anybody's `wake`."""

    async def story() -> None:
        async with client("ws://127.0.0.1:1/", tmp_path, reconnect=SLOW) as ws:
            seen = listening(ws)
            await until(lambda: [event for event in seen if isinstance(event, Reconnecting)])
            assert (await ws.stats()).network_watch is None
            subprocess.run(["ip", "addr", "add", "10.77.0.1/24", "dev", "lo"], check=True)  # noqa: ASYNC221
            await until(lambda: len([event for event in seen if isinstance(event, Reconnecting)]) >= 2)

    network.in_client(lambda: asyncio.run(story()))


@pytest.mark.parametrize("status", [403, 401])
async def test_news_of_the_network_ends_the_wait_of_who_was_not_allowed(tmp_path: Path, status: int) -> None:
    """A captive portal answers 403 as well: on another network the answer may be another one."""
    async with PlainServer() as server:
        server.refusal = status, {}
        async with client(server.url, tmp_path, reconnect=SLOW) as ws:
            seen = listening(ws)
            await until(lambda: [event for event in seen if isinstance(event, Reconnecting)])
            server.refusal = None
            _housekeeping(ws)._network_changed()
            await until(lambda: [event for event in seen if isinstance(event, Connected)])


def _housekeeping(ws: Client) -> Housekeeping:
    assert ws._manager is not None
    return ws._manager.housekeeping


def test_a_disk_that_fails_is_not_called_the_servers_fault() -> None:
    """Our own closes with 1011 do not add up to a server that is blocked."""
    reconnection = Reconnection(ReconnectConfig(), lambda: 0.5)
    for _ in range(10):
        ours = Closed(code=1011, reason="the outbox cannot be read", leaving=True)
        outcome = closed_outcome(ours, progressed=False, connected_for=0.0, asked=0.0, renewal=False)
        assert reconnection.ended(outcome)[0].blocked is None


def test_tokens_that_end_every_hour_are_asked_for_at_once_each_time() -> None:
    """A server that ends good connections with 4401 sees its client back at once, the tenth time as the first."""
    reconnection = Reconnection(ReconnectConfig(), lambda: 0.5)
    for _ in range(10):
        expired = Closed(code=4401, reason="expired", received=True)
        outcome = closed_outcome(expired, progressed=True, connected_for=3600.0, asked=0.0, renewal=False)
        pause = reconnection.ended(outcome)[1]
        assert pause is not None
        assert pause.ask_first
    # But one that takes a message and ends it, again and again, is not dialled in a loop.
    quick = closed_outcome(expired, progressed=True, connected_for=1.0, asked=0.0, renewal=False)
    for _ in range(3):
        pause = reconnection.ended(quick)[1]
        assert pause is not None
        assert not pause.ask_first
        assert pause.delay > 60


def test_who_is_refused_and_told_when_to_come_back_comes_then() -> None:
    """A 401 with a Retry-After of a second is no reason to stay away for minutes."""
    pause = Reconnection(ReconnectConfig(), lambda: 0.5).ended(refused_outcome("wss://x/", 401, {"Retry-After": "1"}))[
        1
    ]
    assert pause is not None
    assert (pause.delay, pause.firm) == (1.0, True)
