"""Opens one WebSocket, and says in a sentence why that failed. No retries here: that is the manager's."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from email.utils import parsedate_to_datetime
from typing import Any

import websockets
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import (
    InvalidProxy,
    InvalidProxyStatus,
    InvalidStatus,
    InvalidURI,
    NegotiationError,
    ProxyError,
    SecurityError,
)
from websockets.uri import parse_uri

from durablews import __version__
from durablews.config import Settings
from durablews.endpoint import Target, redacted
from durablews.reconnection import Outcome, refused_outcome

__all__ = ["DialFailed", "dial", "server_date"]

# The close handshake with a server that may be gone: it must not hold up the next attempt.
_CLOSE_TIMEOUT = 2.0


class DialFailed(Exception):
    """An attempt failed; `outcome` says how, and what follows."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


class _NoSecrets(logging.LoggerAdapter[logging.Logger]):
    """A logger for websockets that never shows headers: at DEBUG it would log the token."""

    def isEnabledFor(self, level: int) -> bool:
        return level > logging.DEBUG and super().isEnabledFor(level)


class _Connect(connect):
    """Follows redirects, but takes no headers of ours to another server: any of them may be a credential."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        before, headers = self.ws_uri, self.additional_headers
        target = super().process_redirect(exc)
        if isinstance(target, str) and headers:
            after = parse_uri(target)
            if (before.secure, before.host, before.port) != (after.secure, after.host, after.port):
                return SecurityError("a redirect to another server")
        return target


async def dial(target: Target, settings: Settings, subprotocols: tuple[str, ...]) -> ClientConnection:
    """Open a WebSocket. The caller limits the time.

    Raises:
        DialFailed: it did not work. Nothing else but cancellation is raised for what the network answers.
    """
    shown = redacted(target.url)
    options: dict[str, Any] = {}
    if target.url.startswith("wss://"):
        options["ssl"] = await asyncio.to_thread(_tls, settings)  # reads the system's authorities: 20 ms of disk
    try:
        return await _Connect(
            target.url,
            additional_headers=target.headers,
            subprotocols=[websockets.Subprotocol(name) for name in subprotocols],
            user_agent_header=f"durablews/{__version__}",
            compression=settings.compression,
            proxy={"env": True, None: None}.get(settings.proxy, settings.proxy),
            max_size=settings.max_message_size,
            open_timeout=None,
            ping_interval=None,  # the manager's heartbeat counts any traffic, which this one does not
            close_timeout=_CLOSE_TIMEOUT,
            logger=_NoSecrets(logging.getLogger("durablews.websocket")),
            **options,
        )
    except InvalidStatus as exc:
        raise DialFailed(refused_outcome(shown, exc.response.status_code, exc.response.headers)) from exc
    except Exception as exc:
        raise DialFailed(_failed(exc, shown)) from exc


def _failed(exc: Exception, shown: str) -> Outcome:
    """Say in a sentence why no WebSocket came about. No texts of others where they may hold what is secret."""
    name = type(exc).__name__
    if isinstance(exc, InvalidProxyStatus):
        status = exc.response.status_code
        why = "HTTP 407: it wants credentials" if status == 407 else f"HTTP {status}"
        return _outcome("proxy", f"the proxy answered {why} for {shown}", owners=status == 407, code=status)
    if isinstance(exc, InvalidProxy):
        return _outcome("proxy", "the proxy's address cannot be used", owners=True)
    if isinstance(exc, ProxyError):
        return _outcome("proxy", f"the proxy did not connect to {shown}")
    if isinstance(exc, ImportError):  # connecting through SOCKS is an extra
        return _outcome("proxy", 'a SOCKS proxy needs a package: pip install "durablews[socks]"', owners=True)
    if isinstance(exc, NegotiationError):
        return _outcome("subprotocol", f"{shown} selected a subprotocol that was not offered", owners=True)
    if isinstance(exc, InvalidURI | SecurityError):
        return _outcome("redirect", f"{shown} redirects to an address that is not allowed (a login page?)")
    if isinstance(exc, ssl.SSLCertVerificationError):
        what = f"the certificate of {shown} is not trusted: {exc.verify_message}"
        return _outcome("certificate", what, owners=True)
    if isinstance(exc, ssl.SSLError):
        return _outcome("tls", f"TLS with {shown} failed: {exc.reason or name}")
    if isinstance(exc, socket.gaierror):
        return _outcome("dns", f"the name of {shown} cannot be resolved: {exc.strerror}")
    if isinstance(exc, OSError):
        return _outcome("network", f"{shown} cannot be reached: {exc.strerror or name}")
    if isinstance(exc, EOFError) or isinstance(exc.__cause__, EOFError):  # a reset looks the same to websockets
        return _outcome("network", f"{shown} ended the connection without an answer")
    if isinstance(exc, websockets.WebSocketException):
        return _outcome("handshake", f"{shown} did not answer as a WebSocket server: {name}")
    # An address, a header or a proxy that cannot be used.
    return _outcome("settings", f"the url, headers or proxy cannot be used: {name}", owners=True)


def _outcome(kind: str, reason: str, *, owners: bool = False, code: int | None = None) -> Outcome:
    return Outcome(kind=kind, reason=reason, code=code, blocked=reason if owners else None, slow=owners)


def server_date(websocket: ClientConnection) -> int | None:
    """Return the Date of the handshake's answer, in ms since 1970 UTC, or None."""
    text = websocket.response.headers.get("Date") if websocket.response else None
    try:
        return int(parsedate_to_datetime(text).timestamp() * 1000) if text else None
    except (ValueError, OverflowError, OSError):
        return None


def _tls(settings: Settings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.tls.ca_file)
        if settings.tls.cert_file is not None:
            context.load_cert_chain(settings.tls.cert_file, settings.tls.key_file)
    except OSError as exc:
        what = f"the TLS files cannot be used: {exc.strerror or type(exc).__name__}"
        raise DialFailed(_outcome("settings", what, owners=True)) from exc
    return context
