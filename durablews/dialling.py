"""Opens one WebSocket, straight or through a proxy. No retries here: that is the manager's."""

from __future__ import annotations

import asyncio
import logging
import ssl
from email.utils import parsedate_to_datetime
from typing import Any

import websockets
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidProxy, InvalidStatus, SecurityError
from websockets.proxy import get_proxy, parse_proxy
from websockets.uri import parse_uri

from durablews import __version__
from durablews.addresses import redacted
from durablews.config import Settings
from durablews.endpoint import Target
from durablews.failures import Way, failed_outcome, timed_out, unusable
from durablews.reconnection import Outcome, refused_outcome
from durablews.trust import FilesUnusable, tls_context

__all__ = ["DialFailed", "dial", "server_date"]

# The close handshake with a server that may be gone: it must not hold up the next attempt.
_CLOSE_TIMEOUT = 2.0
# Bytes of pongs that may wait for a server that asks and does not read; at its largest, one has 131.
_MOST_UNREAD = 1024 * 1024


class DialFailed(Exception):
    """An attempt failed; `outcome` says how, and what follows."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


class _NoSecrets(logging.LoggerAdapter[logging.Logger]):
    """A logger for websockets that never shows headers: at DEBUG it would log the token."""

    def isEnabledFor(self, level: int) -> bool:
        return level > logging.DEBUG and super().isEnabledFor(level)


class _Connection(ClientConnection):
    """Remembers what ended it: a TLS 1.3 server refuses a client's certificate only after the handshake.

    And leaves a server that pings without end and does not read the pongs: websockets would gather them all (P6).
    """

    lost_by: Exception | None = None
    _unread = 0

    def data_received(self, data: bytes) -> None:
        before = self.transport.get_write_buffer_size()
        super().data_received(data)
        # Nobody else writes meanwhile: what was added is what this data asked for.
        waiting = self.transport.get_write_buffer_size()
        self._unread = self._unread + max(0, waiting - before) if waiting else 0
        if self._unread > _MOST_UNREAD and not self.transport.is_closing():
            self.protocol.fail(4408, "the server pings and pings, and does not read the pongs")
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost_by = exc
        super().connection_lost(exc)


class _Connect(connect):
    """Follows redirects, but takes no headers of ours to another server: any of them may be a credential."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        before, headers = self.ws_uri, self.additional_headers
        try:
            target = super().process_redirect(exc)
        except (LookupError, ValueError):  # two Locations, or one that is no address
            return SecurityError("a redirect to nowhere")
        if isinstance(target, str) and headers:
            after = parse_uri(target)
            if (before.secure, before.host, before.port) != (after.secure, after.host, after.port):
                return SecurityError("a redirect to another server")
        return target


class _Attempt:
    """One attempt, and how far it came.

    Args:
        target: where to, and with which headers.
        settings: for the proxy, TLS and limits.
    """

    def __init__(self, target: Target, settings: Settings) -> None:
        self._target = target
        self._settings = settings
        self._proxy: str | None = None
        self._connection: _Connection | None = None

    @property
    def way(self) -> Way:
        shown = None if self._proxy is None else redacted(self._proxy)
        return Way(redacted(self._target.url), shown, self._connection is not None)

    def failed(self, exc: Exception) -> Outcome:
        """Say what went wrong."""
        if isinstance(exc, InvalidStatus):
            return refused_outcome(self.way.server, exc.response.status_code, exc.response.headers)
        lost_by = self._connection.lost_by if self._connection is not None else None
        return failed_outcome(lost_by if isinstance(lost_by, ssl.SSLError) else exc, self.way)

    async def open(self, subprotocols: tuple[str, ...]) -> ClientConnection:
        # A redirect is followed along the same way: through this proxy, or through none.
        self._proxy = self._proxy_for(self._target.url)
        return await _Connect(
            self._target.url,
            additional_headers=self._target.headers,
            subprotocols=[websockets.Subprotocol(name) for name in subprotocols],
            user_agent_header=f"durablews/{__version__}",
            compression=self._settings.compression,
            proxy=self._proxy,
            max_size=self._settings.max_message_size,
            open_timeout=None,
            ping_interval=None,  # the manager's heartbeat counts any traffic, which this one does not
            close_timeout=_CLOSE_TIMEOUT,
            logger=_NoSecrets(logging.getLogger("durablews.websocket")),
            **{**await self._security(), "create_connection": self._reached},
        )

    def _proxy_for(self, url: str) -> str | None:
        proxy = get_proxy(parse_uri(url)) if self._settings.proxy == "env" else self._settings.proxy
        if proxy is not None:
            try:
                parse_proxy(proxy)
            except ValueError as exc:  # a port above 65535, half an IPv6 address: its text would show the password
                raise InvalidProxy("", type(exc).__name__) from None
        return proxy

    async def _security(self) -> dict[str, Any]:
        secure = self._target.url.startswith("wss://")
        proxy_secure = self._proxy is not None and self._proxy.startswith("https://")
        if not (secure or proxy_secure):
            return {}
        context = await asyncio.to_thread(tls_context, self._settings.tls)
        return {**({"ssl": context} if secure else {}), **({"proxy_ssl": context} if proxy_secure else {})}

    def _reached(self, *arguments: Any, **options: Any) -> _Connection:
        """Make what websockets makes once there is a connection with the server, before TLS on it."""
        self._connection = _Connection(*arguments, **options)
        return self._connection


async def dial(target: Target, settings: Settings, subprotocols: tuple[str, ...], *, until: float) -> ClientConnection:
    """Open a WebSocket.

    Args:
        until: the moment, by the running loop's clock, at which the attempt is given up.

    Raises:
        DialFailed: it did not work. Nothing else but cancellation is raised for what the network answers.
    """
    attempt = _Attempt(target, settings)
    limit = asyncio.timeout_at(until)
    try:
        async with limit:
            return await attempt.open(subprotocols)
    except FilesUnusable as exc:
        raise DialFailed(unusable("settings", str(exc))) from exc
    except Exception as exc:
        if limit.expired():
            raise DialFailed(timed_out(attempt.way, settings.reconnect.connect_timeout)) from exc
        raise DialFailed(attempt.failed(exc)) from exc


def server_date(websocket: ClientConnection) -> int | None:
    """Return the Date of the handshake's answer, in ms since 1970 UTC, or None."""
    try:
        text = websocket.response.headers["Date"] if websocket.response else ""
        return int(parsedate_to_datetime(text).timestamp() * 1000)
    except (LookupError, ValueError, OverflowError, OSError):  # none, or several; or it is no date
        return None
