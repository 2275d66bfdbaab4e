"""TLS: whom the client trusts, as whom it appears, and what it says when a server is not who it should be."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import pytest
from certificates import Certificates, Pair, SecureServer, certificates_fixture  # noqa: F401 - pytest looks for it here
from looking import Look, look_fixture, shown  # noqa: F401 - pytest looks for it here
from servers import ENVIRONMENT, FAST, PlainServer, until
from support import named

import durablews
from durablews.client import Client
from durablews.errors import ConfigError


def client(url: str, path: Path, certificates: Certificates | None, **settings: Any) -> Client:
    if certificates is not None:
        settings.setdefault("tls", {"ca_file": certificates.ca_file})
    given = {"reconnect": FAST, "proxy": None, "dialect": "durablews.v1.json", "delivery": {"drain_timeout": 0}}
    return durablews.connect(url, path / "agent.db", **{**given, **settings})


# -- servers that are not who they should be

BAD_CERTIFICATES = {
    "stranger": "unable to get local issuer certificate",
    "expired": "certificate has expired",
    "misnamed": "certificate is not valid for '127.0.0.1'",
}


@pytest.mark.parametrize("name", BAD_CERTIFICATES)
async def test_a_bad_certificate_is_the_owners_to_mend(
    tmp_path: Path, look: Look, certificates: Certificates, name: str
) -> None:
    """Nothing is sent to who cannot prove who it is; it says so, is tried again, and all arrives at the right one."""
    server = SecureServer(certificates.server_context(getattr(certificates, name)))
    async with server, client(server.url, tmp_path, certificates, token="secret") as ws:
        await ws.send_many(range(5))
        await shown(ws, look, BAD_CERTIFICATES[name], blocked=True)
        assert f"the certificate of {server.url} is not trusted" in str((await ws.stats()).reason)
        assert (server.requests, (await ws.stats()).pending) == ([], 5)
        await server.stop()
        server.context = certificates.server_context()
        await server.start()
        assert await ws.flush(10)
        assert server.payloads == [0, 1, 2, 3, 4]
        assert (await ws.stats()).blocked is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_messages_arrive_at_a_server_of_a_private_authority(
    tmp_path: Path, certificates: Certificates, host: str
) -> None:
    """With `tls.ca_file` a certificate of one's own authority is good, for a name and for an address."""
    async with SecureServer(certificates.server_context()) as server:
        async with client(f"wss://{host}:{server.port}/", tmp_path, certificates) as ws:
            await ws.send("x")
            assert await ws.flush(10)
        assert server.payloads == ["x"]
        assert server.peers == []


async def test_the_systems_authorities_do_not_know_a_private_one(
    tmp_path: Path, look: Look, certificates: Certificates
) -> None:
    """Without `tls.ca_file` a private authority is not trusted: there is no trust by default beyond the system's."""
    async with SecureServer(certificates.server_context()) as server, client(server.url, tmp_path, None) as ws:
        await shown(ws, look, "is not trusted", blocked=True)
        assert server.requests == []


# -- servers that do not speak TLS, or not to the end

Speaker = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


@asynccontextmanager
async def speaking(speaker: Speaker, port: int) -> AsyncIterator[list[int]]:
    """A TCP server that does what `speaker` does with each connection; yields a list that grows with each."""
    visits: list[int] = []
    visitors: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visits.append(len(visits))
        with closing(writer), suppress(ConnectionError):
            await speaker(reader, writer)

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(handle(reader, writer), name="speaker")
        visitors[task] = writer

    server = await asyncio.start_server(accept, "127.0.0.1", port)
    try:
        async with server:
            yield visits
    finally:
        # Nobody may outlive it: a transport that the loop never closes is a warning in some later test.
        for task, writer in visitors.items():
            task.cancel()
            writer.transport.abort()
        await asyncio.gather(*visitors, return_exceptions=True)
        await asyncio.sleep(0)


def saying(text: bytes) -> Speaker:
    """Say that, and wait for the other side to go."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text)
        await reader.read()

    return say


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def goodbye(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close in the middle of the handshake, properly."""
    await reader.read(1)


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reset in the middle of the handshake."""
    await reader.read(1)
    writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))


def answering(context: ssl.SSLContext, *, cut: bool = False) -> Speaker:
    """Shake hands as a TLS server does, alerts included, and close; `cut` half-way through the first answer.

    asyncio's own servers send no alert to a client that they refuse.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)
        refused = False
        while not refused and (data := await reader.read(1 << 16)):
            incoming.write(data)
            try:
                tls.do_handshake()
                tls.read(1 << 16)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                refused = True
            said = outgoing.read()
            writer.write(said[: len(said) // 2] if cut else said)
            await writer.drain()
            if cut:
                return
        await reader.read()  # a close with something unread would be a reset, which may overtake the alert

    return answer


ENDED = "ended the connection during the TLS handshake"
NOT_TLS: dict[str, tuple[Callable[[Certificates], Speaker], str]] = {
    "mail": (lambda _: saying(b"220 mail.example ESMTP\r\n"), "TLS with "),
    "web": (lambda _: saying(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"), "TLS with "),
    "silence": (lambda _: silence, "did not answer within 0.5 s"),
    "goodbye": (lambda _: goodbye, ENDED),
    "reset": (lambda _: reset, ENDED),
    "half an answer": (lambda certificates: answering(certificates.server_context(), cut=True), ENDED),
}


@pytest.mark.parametrize("name", NOT_TLS)
async def test_a_handshake_that_fails_is_tried_again(
    tmp_path: Path, look: Look, certificates: Certificates, name: str
) -> None:
    """P8: who speaks no TLS, or breaks off, is a reason and nobody's fault; from a well server all is delivered."""
    make, reason = NOT_TLS[name]
    await visited(tmp_path, look, certificates, make(certificates), reason, blocked=False)


async def visited(
    path: Path,
    look: Look,
    certificates: Certificates,
    speaker: Speaker,
    reason: str,
    *,
    blocked: bool,
    **settings: Any,
) -> None:
    """Let a client meet `speaker` until it says `reason`, and then a well server at the same address."""
    server = SecureServer(certificates.server_context())
    await server.start()
    await server.stop()  # the address is what it leaves
    retry = {**FAST, "connect_timeout": 0.5 if speaker is silence else 5}
    async with client(server.url, path, certificates, reconnect=retry, **settings) as ws:
        await ws.send_many(range(5))
        async with speaking(speaker, server.port) as visits:
            await shown(ws, look, reason, blocked=blocked)
            assert server.url in str((await ws.stats()).reason)
            await until(lambda: len(visits) >= 3)
            assert (await ws.stats()).pending == 5
        async with server:
            assert await ws.flush(10)
            assert (server.payloads, (await ws.stats()).blocked) == ([0, 1, 2, 3, 4], None)


async def test_a_web_socket_server_without_tls(tmp_path: Path, look: Look, certificates: Certificates) -> None:
    """A server that speaks ws:// at an address of wss:// gets no message in the clear."""
    async with PlainServer() as server:
        url = server.url.replace("ws:", "wss:")
        async with client(url, tmp_path, certificates, token="secret") as ws:
            await ws.send("x")
            await shown(ws, look, url, blocked=False)
            assert (server.requests, (await ws.stats()).pending) == ([], 1)


# -- as whom the client appears


async def test_a_client_certificate_is_shown(tmp_path: Path, certificates: Certificates) -> None:
    """A server that wants to know who comes gets the certificate of `tls.cert_file`."""
    async with SecureServer(certificates.server_context(wants_clients=True)) as server:
        async with client(server.url, tmp_path, certificates, tls=files(certificates, certificates.client)) as ws:
            await ws.send("x")
            assert await ws.flush(10)
        assert server.payloads == ["x"]
        assert (("commonName", "agent"),) in server.peers[0]["subject"]


def files(certificates: Certificates, pair: Pair) -> dict[str, str]:
    return {"ca_file": certificates.ca_file, "cert_file": pair.cert_file, "key_file": pair.key_file}


@pytest.mark.parametrize(
    ("pair", "why"), [(None, "certificate required"), ("stranger", "unknown ca"), ("expired", "certificate expired")]
)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_client_certificate_that_is_not_accepted(
    tmp_path: Path, look: Look, certificates: Certificates, version: ssl.TLSVersion, pair: str | None, why: str
) -> None:
    """The server's word about this client's certificate reaches its owner, who alone can mend it."""
    context = certificates.server_context(wants_clients=True)
    context.minimum_version = context.maximum_version = version
    tls = {"ca_file": certificates.ca_file} if pair is None else files(certificates, getattr(certificates, pair))
    reason, blocked = f"does not accept the client certificate: {why}", True
    if pair is None and version is ssl.TLSVersion.TLSv1_2:  # which has no word for that
        reason, blocked = "failed: handshake failure", False
    await visited(tmp_path, look, certificates, answering(context), reason, blocked=blocked, tls=tls)


# -- the files


async def test_files_are_read_at_every_try(tmp_path: Path, look: Look, certificates: Certificates) -> None:
    """A renewed certificate, or an authority that is added, counts at the next try: nothing need be restarted."""
    mine = {name: str(tmp_path / name) for name in ("ca_file", "cert_file", "key_file")}
    theirs = files(certificates, certificates.client)
    shutil.copy(certificates.stranger.cert_file, mine["ca_file"])
    async with SecureServer(certificates.server_context(wants_clients=True)) as server:
        async with client(server.url, tmp_path, None, tls=mine) as ws:
            await ws.send("x")
            why = "tls.cert_file and tls.key_file cannot be used: No such file or directory"
            await shown(ws, look, why, blocked=True)
            for name in ("cert_file", "key_file"):
                shutil.copy(theirs[name], mine[name])
            await shown(ws, look, "is not trusted", blocked=True)
            shutil.copy(theirs["ca_file"], mine["ca_file"])
            assert await ws.flush(10)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"ca_file": "/nowhere/ca.pem"}, "tls.ca_file cannot be used: No such file or directory"),
        ({"ca_file": "a\0b"}, "tls.ca_file cannot be used: ValueError"),
        ({"ca_file": "{good.key_file}"}, "tls.ca_file cannot be used: no certificate or crl found"),
        ({"key_file": "{good.key_file}"}, "tls.cert_file and tls.key_file cannot be used: key values mismatch"),
        ({"key_file": "/nowhere/my.key"}, "tls.cert_file and tls.key_file cannot be used: No such file or directory"),
    ],
)
async def test_a_file_that_cannot_be_used(
    tmp_path: Path, look: Look, certificates: Certificates, wrong: dict[str, str], reason: str
) -> None:
    """The reason names the setting; the link is not given up, and nothing goes out without TLS."""
    wrong = {name: text.format(good=certificates.good) for name, text in wrong.items()}
    tls = {**files(certificates, certificates.client), **wrong}
    async with client("wss://127.0.0.1:1/", tmp_path, None, tls=tls) as ws:
        await shown(ws, look, reason, blocked=True)
        assert look()["state"] in ("CONNECTING", "RECONNECTING")


@pytest.mark.skipif(sys.platform == "win32", reason="terminals")
def test_nobody_is_asked_for_the_password_of_a_key(tmp_path: Path, certificates: Certificates) -> None:
    """An encrypted key is a reason; OpenSSL would ask for its password at the terminal, and the client would hang."""
    script = """if True:
        import asyncio, os, sys
        os.open(sys.argv[1], os.O_RDWR)  # a session that has no terminal takes the first that it opens
        import durablews

        async def main():
            outbox, ca_file, cert_file, key_file = sys.argv[2:]
            tls = {"ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
            async with durablews.connect("wss://127.0.0.1:1/", outbox, tls=tls) as ws:
                while not (stats := await ws.stats()).blocked:
                    await asyncio.sleep(0.01)
                print(stats.blocked)

        asyncio.run(main())
    """
    tls = {**files(certificates, certificates.client), "key_file": certificates.encrypted_key}
    terminal, slave = os.openpty()
    try:
        command = [sys.executable, "-W", "error", "-c", script, os.ttyname(slave), str(tmp_path / "agent.db")]
        said = subprocess.run(
            [*command, *tls.values()], env=ENVIRONMENT, capture_output=True, timeout=20, start_new_session=True
        )
    finally:
        os.close(slave)
        os.close(terminal)
    assert said.stdout.startswith(b"tls.cert_file and tls.key_file cannot be used: "), said.stderr


# -- no way round it


@pytest.mark.parametrize(
    "settings",
    [
        {"tls": {"verify": False}},
        {"tls": {"ca_file": False}},
        {"tls": {"check_hostname": False}},
        {"tls": False},
        {"ssl": ssl._create_unverified_context()},
        {"verify": False},
    ],
    ids=named,
)
def test_no_setting_switches_verification_off(tmp_path: Path, settings: dict[str, Any]) -> None:
    """There is no such setting, and what other libraries call it is an error and not ignored."""
    with pytest.raises(ConfigError):
        durablews.connect("wss://127.0.0.1:1/", tmp_path / "agent.db", **settings)


async def test_no_habit_of_python_switches_verification_off(
    tmp_path: Path, look: Look, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done to Python's own HTTPS client, in a program or in its environment, does not reach this one."""
    monkeypatch.setenv("PYTHONHTTPSVERIFY", "0")
    monkeypatch.setattr(ssl, "_create_default_https_context", ssl._create_unverified_context)
    server = SecureServer(certificates.server_context(certificates.stranger))
    async with server, client(server.url, tmp_path, certificates) as ws:
        await shown(ws, look, "is not trusted", blocked=True)
        assert server.requests == []


async def test_no_redirect_leads_out_of_tls(tmp_path: Path, look: Look, certificates: Certificates) -> None:
    """A server may not send a client from wss:// to ws://."""
    async with PlainServer() as plain, SecureServer(certificates.server_context()) as server:
        server.refusal = 302, {"Location": plain.url}
        async with client(server.url, tmp_path, certificates) as ws:
            await shown(ws, look, "redirects to an address that is not allowed", blocked=False)
        assert plain.requests == []
