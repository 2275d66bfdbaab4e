"""Proxies: messages go through them, their troubles are sentences that name them, and their passwords stay secret."""

from __future__ import annotations

import base64
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from certificates import Certificates, SecureServer, certificates_fixture  # noqa: F401 - pytest looks for it here
from looking import Look, look_fixture, shown  # noqa: F401 - pytest looks for it here
from proxies import HttpProxy, Proxy, SocksProxy
from servers import ENVIRONMENT, FAST, PlainServer, until
from support import named

import durablews
from durablews import cli
from durablews.client import Client
from durablews.events import Failed

USER, PASSWORD = "conspicuous", "unmistakable"


@pytest.fixture(autouse=True)
def _no_proxy_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the machine's own environment says about proxies out of the tests."""
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def client(url: str, path: Path, **settings: Any) -> Client:
    given = {"reconnect": FAST, "dialect": "durablews.v1.json", "delivery": {"drain_timeout": 0}}
    return durablews.connect(url, path / "agent.db", **{**given, **settings})


# -- through them

KINDS: dict[str, Callable[[Certificates], Proxy]] = {
    "http": lambda certificates: HttpProxy(),
    "http with a password": lambda certificates: HttpProxy(USER, PASSWORD),
    "https": lambda certificates: HttpProxy(USER, PASSWORD, context=certificates.server_context()),
    "socks": lambda certificates: SocksProxy(),
    "socks with a password": lambda certificates: SocksProxy(USER, PASSWORD),
}


@pytest.mark.parametrize("secure", [False, True], ids=["ws", "wss"])
@pytest.mark.parametrize("kind", KINDS)
async def test_messages_arrive_through_a_proxy(
    tmp_path: Path, certificates: Certificates, kind: str, secure: bool
) -> None:
    """Everything arrives, all of it through the proxy; what is for the server the proxy is not told, nor vice versa."""
    server = SecureServer(certificates.server_context()) if secure else PlainServer()
    settings = {"tls": {"ca_file": certificates.ca_file}, "token": "for the server"}
    async with server, KINDS[kind](certificates) as proxy:
        async with client(server.url, tmp_path, proxy=proxy.url, **settings) as ws:
            await ws.send_many(["x" * 1000] * 5)
            assert await ws.flush(10)
        assert len(server.payloads) == 5
        assert (proxy.visits, proxy.targets) == (1, [f"127.0.0.1:{server.port}"])
        assert proxy.carried > 5000
        (request,) = server.requests
        assert "for the server" in request.headers["Authorization"]
        assert "Proxy-Authorization" not in request.headers
        assert not any("\r\nauthorization" in head.lower() for head in getattr(proxy, "heads", []))


@pytest.mark.parametrize(("scheme", "host"), [("socks5h", "localhost"), ("socks5", "127.0.0.1")])
async def test_who_resolves_the_name(tmp_path: Path, scheme: str, host: str) -> None:
    """With socks5h the proxy looks the server's name up, which a device may not be able to; with socks5 the client."""
    async with PlainServer() as server, SocksProxy() as proxy:
        url, through = f"ws://localhost:{server.port}/", proxy.url.replace("socks5h", scheme)
        async with client(url, tmp_path, proxy=through) as ws:
            await ws.send("x")
            assert await ws.flush(10)
        assert proxy.targets == [f"{host}:{server.port}"]


# -- from the environment


@pytest.mark.parametrize(
    ("variables", "through"),
    [
        ({"HTTP_PROXY": "{http}"}, "http"),
        ({"http_proxy": "{http}"}, "http"),
        ({"HTTPS_PROXY": "{http}"}, "http"),
        ({"HTTPS_PROXY": "{http}", "HTTP_PROXY": "{socks}"}, "http"),
        ({"HTTPS_PROXY": "{socks}"}, "socks"),
        ({"SOCKS_PROXY": "{socks}", "HTTPS_PROXY": "{http}"}, "socks"),
        ({"WS_PROXY": "{socks}", "HTTPS_PROXY": "{http}"}, "socks"),
        ({"HTTP_PROXY": "{http}", "NO_PROXY": "elsewhere.example"}, "http"),
        ({"HTTP_PROXY": "{http}", "NO_PROXY": "elsewhere.example, 127.0.0.1"}, None),
        ({"HTTP_PROXY": "{http}", "NO_PROXY": "127.0.0.1:{port}"}, None),
        ({"HTTP_PROXY": "{http}", "NO_PROXY": "*"}, None),
        ({"WSS_PROXY": "{http}"}, None),
        ({}, None),
    ],
    ids=named,
)
async def test_the_environment_says_which_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], through: str | None
) -> None:
    """Without a setting the variables that others obey are obeyed as well, NO_PROXY among them."""
    async with PlainServer() as server, HttpProxy() as http, SocksProxy() as socks:
        for name, text in variables.items():
            monkeypatch.setenv(name, text.format(http=http.url, socks=socks.url, port=server.port))
        async with client(server.url, tmp_path) as ws:
            await ws.send("x")
            assert await ws.flush(10)
        assert server.payloads == ["x"]
        assert (http.visits, socks.visits) == (through == "http", through == "socks")


async def test_a_setting_counts_more_than_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`proxy=None` goes straight, and a proxy of one's own is used, whatever the environment says."""
    async with PlainServer() as server, HttpProxy() as theirs, HttpProxy() as ours:
        monkeypatch.setenv("HTTP_PROXY", theirs.url)
        for proxy in (None, ours.url):
            async with client(server.url, tmp_path, proxy=proxy) as ws:
                await ws.send("x")
                assert await ws.flush(10)
        assert (theirs.visits, ours.visits) == (0, 1)


# -- their troubles


class Trouble(NamedTuple):
    """A proxy that does not do what it should.

    Attributes:
        make: the proxy.
        ails: what is changed about it to make it ill.
        sentence: the reason, with {proxy} for the proxy and {server} for the server's address.
        blocked: whether only the owner can mend it.
    """

    make: Callable[[], Proxy]
    ails: dict[str, Any]
    sentence: str
    blocked: bool = False


OTHERS = {"user": "somebody", "password": "else"}
TROUBLES = {
    "407": Trouble(HttpProxy, OTHERS, "{proxy} answered HTTP 407: it wants credentials", blocked=True),
    "502": Trouble(HttpProxy, {"refusal": 502}, "{proxy} answered HTTP 502 for {server}"),
    "403": Trouble(HttpProxy, {"refusal": 403}, "{proxy} answered HTTP 403 for {server}"),
    "silent": Trouble(HttpProxy, {"silent": True}, "{proxy} did not connect to {server} within 0.5 s"),
    "socks silent": Trouble(SocksProxy, {"silent": True}, "{proxy} did not connect to {server} within 0.5 s"),
    "socks refuses": Trouble(
        SocksProxy, {"refusal": 2}, "{proxy} did not connect to {server}: Connection not allowed by ruleset"
    ),
    "socks wants another": Trouble(
        SocksProxy, OTHERS, "{proxy} does not accept the user and the password", blocked=True
    ),
}


@pytest.mark.parametrize("name", TROUBLES)
async def test_a_proxy_that_refuses_is_named_and_tried_again(tmp_path: Path, look: Look, name: str) -> None:
    """P8: the reason says that it is the proxy, and which; all is kept and arrives once the proxy lets it through."""
    trouble = TROUBLES[name]
    retry = {**FAST, "connect_timeout": 0.5 if "silent" in name else 5}
    async with PlainServer() as server, trouble.make() as proxy:
        sentence = trouble.sentence.format(proxy=f"the proxy {proxy.url}", server=server.url)
        well = {name: getattr(proxy, name) for name in trouble.ails}
        vars(proxy).update(trouble.ails)
        async with client(server.url, tmp_path, proxy=proxy.url_for(USER, PASSWORD), reconnect=retry) as ws:
            await ws.send_many(range(5))
            await shown(ws, look, sentence, blocked=trouble.blocked)
            await until(lambda: proxy.visits >= 3)
            assert (await ws.stats()).pending == 5
            assert proxy.targets == server.requests == []
            vars(proxy).update(well)
            assert await ws.flush(10)
            assert (server.payloads, (await ws.stats()).blocked) == ([0, 1, 2, 3, 4], None)


@pytest.mark.parametrize("make", [HttpProxy, SocksProxy])
async def test_a_proxy_that_is_not_there(tmp_path: Path, look: Look, make: Callable[[], Proxy]) -> None:
    """With nobody at the proxy's address the reason says that of the proxy, not of the server."""
    async with PlainServer() as server:
        proxy = make()
        await proxy.start()
        await proxy.stop()
        async with client(server.url, tmp_path, proxy=proxy.url_for(USER, PASSWORD)) as ws:
            await ws.send("x")
            await shown(ws, look, f"the proxy {proxy.url} cannot be reached", blocked=False)
            async with proxy:
                assert await ws.flush(10)


@pytest.mark.parametrize("make", [HttpProxy, SocksProxy])
async def test_a_server_behind_a_proxy_that_is_not_there(tmp_path: Path, look: Look, make: Callable[[], Proxy]) -> None:
    """A proxy that hangs up, because it cannot reach the server itself, is named."""
    async with PlainServer() as server, make() as proxy:
        await server.stop()
        async with client(server.url, tmp_path, proxy=proxy.url) as ws:
            await ws.send("x")
            await shown(ws, look, f"the proxy {proxy.url} did not connect to {server.url}", blocked=False)
            async with server:
                assert await ws.flush(10)


async def test_a_name_that_cannot_be_resolved_is_the_proxys(tmp_path: Path, look: Look) -> None:
    """The name that nobody knows is not taken for the server's."""
    async with client("ws://127.0.0.1:1/", tmp_path, proxy="http://proxy.invalid:1") as ws:
        await shown(ws, look, "the name of the proxy http://proxy.invalid:1 cannot be resolved", blocked=False)


async def test_a_proxy_that_nobody_vouches_for(tmp_path: Path, look: Look, certificates: Certificates) -> None:
    """The proxy's own certificate is verified against `tls.ca_file` too, and the reason says whose is bad."""
    strange = HttpProxy(USER, PASSWORD, context=certificates.server_context(certificates.stranger))
    async with PlainServer() as server, strange as proxy:
        settings = {"proxy": proxy.url, "tls": {"ca_file": certificates.ca_file}}
        async with client(server.url, tmp_path, **settings) as ws:
            await ws.send("x")
            address = proxy.url_for(None, "")
            await shown(ws, look, f"the certificate of the proxy {address} is not trusted", blocked=True)
            assert strange.heads == []
            await proxy.stop()
            strange.context = certificates.server_context()
            await proxy.start()
            assert await ws.flush(10)


async def test_a_server_behind_a_proxy_that_nobody_vouches_for(
    tmp_path: Path, look: Look, certificates: Certificates
) -> None:
    """Through a proxy the server's certificate is verified as ever, and the proxy is not blamed."""
    server = SecureServer(certificates.server_context(certificates.stranger))
    async with server, HttpProxy() as proxy:
        async with client(server.url, tmp_path, proxy=proxy.url, tls={"ca_file": certificates.ca_file}) as ws:
            await shown(ws, look, f"the certificate of {server.url} is not trusted", blocked=True)
            assert server.requests == []


@pytest.mark.parametrize(
    "address",
    [
        f"{USER}:{PASSWORD}@127.0.0.1:1",
        f"ftp://{USER}:{PASSWORD}@127.0.0.1:1",
        f"http://{USER}:{PASSWORD}@127.0.0.1:99999",
        f"http://{USER}:{PASSWORD}@127.0.0.1:1/path",
        f"http://{USER}{PASSWORD}@127.0.0.1:1",
    ],
)
async def test_an_address_that_is_none(tmp_path: Path, look: Look, address: str) -> None:
    """A proxy that cannot be meant so is the owner's to mend, and is not quoted: a password may be in it."""
    async with client("ws://127.0.0.1:1/", tmp_path, proxy=address) as ws:
        await shown(ws, look, "the proxy's address cannot be used", blocked=True)
        assert USER not in f"{await ws.stats()} {look()}"


def test_without_python_socks_the_reason_says_what_to_install(tmp_path: Path) -> None:
    """The package for SOCKS is an extra; who lacks it is told so, keeps everything, and is not stopped."""
    script = """if True:
        import asyncio, sys
        sys.modules["python_socks"] = None
        import durablews

        async def main():
            options = {"proxy": "socks5h://127.0.0.1:1", "delivery": {"drain_timeout": 0}}
            async with durablews.connect("ws://127.0.0.1:1/", sys.argv[1], **options) as ws:
                await ws.send("x")
                while not (stats := await ws.stats()).blocked:
                    await asyncio.sleep(0.01)
                print(stats.state, stats.pending, stats.reason)

        asyncio.run(main())
    """
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path / "agent.db")]
    said = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=30)
    assert said.stdout == 'RECONNECTING 1 a SOCKS proxy needs a package: pip install "durablews[socks]"\n', said.stderr


# -- their passwords

LEAKS = {
    "through http": (HttpProxy, {}),
    "through socks": (SocksProxy, {}),
    "407": (HttpProxy, {"password": "other"}),
    "502": (HttpProxy, {"refusal": 502}),
    "silent": (HttpProxy, {"silent": True}),
    "socks wants another": (SocksProxy, {"password": "other"}),
    "socks refuses": (SocksProxy, {"refusal": 1}),
    "absent": (HttpProxy, None),
    "socks absent": (SocksProxy, None),
}


@pytest.mark.parametrize("where", ["setting", "environment"])
@pytest.mark.parametrize("name", LEAKS)
async def test_the_password_of_a_proxy_is_shown_nowhere(
    tmp_path: Path,
    look: Look,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    where: str,
) -> None:
    """User and password are in no stats, event, log, inspection or file, whether the proxy lets us through or not."""
    caplog.set_level(logging.DEBUG)
    kind, ails = LEAKS[name]

    def files() -> bytes:
        return b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.name.startswith("agent.db"))

    retry = {**FAST, "connect_timeout": 0.3}
    seen: list[object] = []
    async with PlainServer() as server, kind(USER, PASSWORD) as proxy:
        through = proxy.url
        monkeypatch.setenv("HTTP_PROXY", through) if where == "environment" else None
        setting = {"proxy": through} if where == "setting" else {}
        if ails is None:
            await proxy.stop()
        else:
            vars(proxy).update(ails)
        async with client(server.url, tmp_path, reconnect=retry, **setting) as ws:
            happening = ws.events()
            await ws.send("x")
            if ails == {}:
                assert await ws.flush(10)
            else:
                await until(lambda: look()["reason"])
            seen += [await ws.stats(), ws, ws.reason, files()]
        events = [event async for event in happening]
    assert any(isinstance(event, Failed) for event in events) == (ails != {})
    seen += [events, files()]
    for flags in ([], ["--json"]):
        assert cli.main(["inspect", str(tmp_path / "agent.db"), *flags]) == 0
        seen.append(capsys.readouterr())
    seen += [(record.getMessage(), record.args, record.exc_text) for record in caplog.records]
    text = "\n".join(repr(thing) for thing in seen)
    assert "127.0.0.1" in text
    basic = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    for secret in (USER, PASSWORD, basic):
        assert secret not in text
        assert secret not in caplog.text
