"""Two small proxies on loopback, HTTP CONNECT and SOCKS5, that count what goes through and misbehave on demand."""

from __future__ import annotations

import asyncio
import base64
import ssl
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Self

__all__ = ["HttpProxy", "Proxy", "SocksProxy"]


class Refused(Exception):
    """The client was told no."""


class Proxy(ABC):
    """What both have; use it with ``async with``. The port stays the same when it is started again.

    Args:
        user: what clients must say, with `password`; None lets everybody in.

    Attributes:
        silent: accept connections and never say anything.
        visits: connections so far.
        targets: ``host:port`` of each connection that was made for a client.
        carried: bytes that went through, in both directions together.
    """

    scheme = ""

    def __init__(self, user: str | None = None, password: str = "") -> None:
        self.user = user
        self.password = password
        self.silent = False
        self.visits = 0
        self.targets: list[str] = []
        self.carried = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._visitors: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, ssl=self._context())
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Break every connection and listen no more."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            for task, writer in self._visitors.items():
                task.cancel()
                writer.transport.abort()  # one that is cancelled before its first step does not do it
            await asyncio.gather(*self._visitors, return_exceptions=True)
            await server.wait_closed()

    @property
    def url(self) -> str:
        """Its address with what it wants to hear."""
        return self.url_for(self.user, self.password)

    def url_for(self, user: str | None, password: str) -> str:
        """Its address with what a client may say instead."""
        return f"{self.scheme}://{'' if user is None else f'{user}:{password}@'}127.0.0.1:{self.port}"

    @abstractmethod
    async def _agree(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, int]:
        """Hear where a client wants to go; raise Refused after having told it no."""

    @abstractmethod
    async def _connected(self, writer: asyncio.StreamWriter) -> None:
        """Tell a client that it is through."""

    def _context(self) -> ssl.SSLContext | None:
        return None

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visits += 1
        task = asyncio.create_task(self._serve(reader, writer), name="proxy")
        self._visitors[task] = writer
        task.add_done_callback(self._visitors.pop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            if self.silent:
                await reader.read()
                return
            host, port = await self._agree(reader, writer)
            far_reader, far_writer = await asyncio.open_connection(host, port)
            writers.append(far_writer)
            await self._connected(writer)
            self.targets.append(f"{host}:{port}")
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer))
                group.create_task(self._pump(far_reader, writer))
        except (Refused, OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for each in writers:
                each.close()
                with suppress(OSError):
                    await each.wait_closed()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # the other direction ends as well then
            while data := await reader.read(1 << 16):
                self.carried += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()


class HttpProxy(Proxy):
    """An HTTP proxy that knows CONNECT, with Basic authentication if it has a `user`; with a `context` it is on TLS.

    Attributes:
        refusal: the status that it answers everybody with, such as 502.
        heads: what clients have said to it, as it came.
    """

    def __init__(self, user: str | None = None, password: str = "", *, context: ssl.SSLContext | None = None) -> None:
        super().__init__(user, password)
        self.context = context
        self.scheme = "http" if context is None else "https"
        self.refusal: int | None = None
        self.heads: list[str] = []

    def _context(self) -> ssl.SSLContext | None:
        return self.context

    async def _agree(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, int]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.heads.append(head)
        (method, target, _), *lines = (line.split(maxsplit=2) for line in head.split("\r\n") if line)
        if self.refusal is not None:
            await self._refuse(writer, self.refusal)
        if method != "CONNECT":
            await self._refuse(writer, 405)
        said = {name.lower(): " ".join(rest) for name, *rest in lines}.get("proxy-authorization:")
        wanted = "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        if self.user is not None and said != wanted:
            await self._refuse(writer, 407)
        host, _, port = target.rpartition(":")
        return host.strip("[]"), int(port)

    async def _refuse(self, writer: asyncio.StreamWriter, status: int) -> None:
        writer.write(
            f'HTTP/1.1 {status} No\r\nProxy-Authenticate: Basic realm="x"\r\nContent-Length: 0\r\n\r\n'.encode()
        )
        await writer.drain()
        raise Refused

    async def _connected(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await writer.drain()


class SocksProxy(Proxy):
    """A SOCKS5 proxy (RFC 1928), with user and password (RFC 1929) if it has a `user`.

    Attributes:
        refusal: the reply code that it answers everybody with, such as 2: not allowed.
    """

    scheme = "socks5h"

    def __init__(self, user: str | None = None, password: str = "") -> None:
        super().__init__(user, password)
        self.refusal: int | None = None

    async def _agree(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, int]:
        _, count = await reader.readexactly(2)
        method = 0 if self.user is None else 2
        offered = method in await reader.readexactly(count)
        writer.write(bytes([5, method if offered else 255]))
        if not offered:
            await self._refuse(writer)
        if self.user is not None:
            await reader.readexactly(1)
            said = [(await reader.readexactly((await reader.readexactly(1))[0])).decode() for _ in range(2)]
            good = said == [self.user, self.password]
            writer.write(bytes([1, 0 if good else 1]))
            if not good:
                await self._refuse(writer)
        kind = (await reader.readexactly(4))[3]
        if kind == 1:
            host = ".".join(str(byte) for byte in await reader.readexactly(4))
        else:
            host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        port = int.from_bytes(await reader.readexactly(2))
        if self.refusal is not None:
            self._reply(writer, self.refusal)
            await self._refuse(writer)
        return host, port

    def _reply(self, writer: asyncio.StreamWriter, code: int) -> None:
        writer.write(bytes([5, code, 0, 1, 127, 0, 0, 1, 0, 0]))

    async def _refuse(self, writer: asyncio.StreamWriter) -> None:
        await writer.drain()
        raise Refused

    async def _connected(self, writer: asyncio.StreamWriter) -> None:
        self._reply(writer, 0)
        await writer.drain()
