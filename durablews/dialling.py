"""Opens one WebSocket, and says in a sentence why that failed. No retries here: that is the manager's."""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import websockets
from msgspec import Struct
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidProxyStatus, InvalidStatus, InvalidURI, NegotiationError, SecurityError
from websockets.uri import parse_uri

from durablews import __version__
from durablews.config import Settings
from durablews.errors import ConfigError

__all__ = ["DialFailed", "Endpoint", "Provided", "check_endpoint", "dial", "redacted", "server_date"]

#: A value, or a callable that gives it, sync or async, asked on every attempt.
Provided = Any

#: The longest Retry-After that is honoured, in seconds.
_LONGEST_RETRY_AFTER = 3600.0
# What only the owner can mend: the credentials, the address.
_OWNERS = frozenset({401, 403})
# The close handshake with a server that may be gone: it must not hold up the next attempt.
_CLOSE_TIMEOUT = 2.0


class Endpoint(Struct, frozen=True, kw_only=True):
    """Where to connect, and as whom."""

    url: Provided
    headers: Provided = None
    token: Provided = None


class DialFailed(Exception):
    """An attempt failed.

    Attributes:
        retry_after: seconds that the server asked for, or None.
        blocked: whether only the owner can mend it.
    """

    def __init__(self, reason: str, *, retry_after: float | None = None, blocked: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after
        self.blocked = blocked


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


def redacted(url: str) -> str:
    """Return a URL without what may be secret in it: user, password, query, fragment."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


async def dial(endpoint: Endpoint, settings: Settings, subprotocols: tuple[str, ...]) -> tuple[ClientConnection, str]:
    """Open a WebSocket; return it and its redacted URL. The caller limits the time.

    Raises:
        DialFailed: it did not work. Nothing else but cancellation is raised for what the network answers.
    """
    try:
        url = await _ask(endpoint.url)
        headers = {**settings.auth.headers, **(await _ask(endpoint.headers) or {})}
        token = await _token(endpoint, settings)
    except asyncio.CancelledError:
        raise
    except Exception as exc:
        # Its text may hold what it was about to give.
        raise DialFailed(f"a provider of url, headers or token failed: {type(exc).__name__}", blocked=True) from exc
    if not isinstance(url, str) or not url.startswith(("ws://", "wss://")):
        raise DialFailed("the url must begin with ws:// or wss://", blocked=True)
    if token:
        headers["Authorization"] = f"Bearer {token}"
    options: dict[str, Any] = {}
    if url.startswith("wss://"):
        options["ssl"] = await asyncio.to_thread(_tls, settings)  # reads the system's authorities: 20 ms of disk
    try:
        shown = redacted(url)
        websocket = await _Connect(
            url,
            additional_headers=headers,
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
        raise _refused(exc.response.status_code, exc.response.headers, shown) from exc
    except InvalidProxyStatus as exc:
        raise DialFailed(f"the proxy answered HTTP {exc.response.status_code} for {shown}") from exc
    except NegotiationError as exc:
        raise DialFailed(f"{shown} selected a subprotocol that was not offered", blocked=True) from exc
    except (InvalidURI, SecurityError) as exc:
        raise DialFailed(f"{shown} redirects to an address that is not allowed (a login page?)") from exc
    except ssl.SSLCertVerificationError as exc:
        raise DialFailed(f"the certificate of {shown} is not trusted: {exc.verify_message}", blocked=True) from exc
    except ssl.SSLError as exc:
        raise DialFailed(f"TLS with {shown} failed: {exc.reason or type(exc).__name__}") from exc
    except socket.gaierror as exc:
        raise DialFailed(f"the name of {shown} cannot be resolved: {exc.strerror}") from exc
    except OSError as exc:
        raise DialFailed(f"{shown} cannot be reached: {exc.strerror or type(exc).__name__}") from exc
    except (websockets.WebSocketException, EOFError) as exc:
        raise DialFailed(f"{shown} did not answer as a WebSocket server: {type(exc).__name__}") from exc
    except Exception as exc:
        # An address, a header or a proxy that cannot be used, or a package that a proxy needs; no texts: they may hold
        # what is secret.
        raise DialFailed(f"the url, headers or proxy cannot be used: {type(exc).__name__}", blocked=True) from exc
    return websocket, shown


def server_date(websocket: ClientConnection) -> int | None:
    """Return the Date of the handshake's answer, in ms since 1970 UTC, or None."""
    text = websocket.response.headers.get("Date") if websocket.response else None
    try:
        return int(parsedate_to_datetime(text).timestamp() * 1000) if text else None
    except (ValueError, OverflowError, OSError):
        return None


def check_endpoint(url: Provided) -> None:
    """Check what can be checked of a URL before the first attempt.

    Raises:
        ConfigError: it is not one for a WebSocket.
    """
    if callable(url):
        return
    try:
        usable = isinstance(url, str) and url.startswith(("ws://", "wss://")) and bool(urlsplit(url).hostname)
    except ValueError:  # half an IPv6 address
        usable = False
    if not usable:
        raise ConfigError("url must begin with ws:// or wss:// and name a host")


async def _ask(provided: Provided) -> Any:
    if not callable(provided):
        return provided
    provider: Callable[[], Any] | Callable[[], Awaitable[Any]] = provided
    answer = provider()
    return await answer if inspect.isawaitable(answer) else answer


async def _token(endpoint: Endpoint, settings: Settings) -> str | None:
    if endpoint.token is not None:
        token = await _ask(endpoint.token)
    elif settings.auth.token_file is not None:
        token = await asyncio.to_thread(_read_token, settings.auth.token_file)
    else:
        return None
    return None if token is None else str(token)


def _read_token(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def _tls(settings: Settings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.tls.ca_file)
        if settings.tls.cert_file is not None:
            context.load_cert_chain(settings.tls.cert_file, settings.tls.key_file)
    except OSError as exc:
        raise DialFailed(f"the TLS files cannot be used: {exc.strerror or type(exc).__name__}", blocked=True) from exc
    return context


def _refused(status: int, headers: Mapping[str, str], shown: str) -> DialFailed:
    meaning = {
        200: "HTTP 200 instead of a WebSocket: a captive portal or a web page",
        401: "HTTP 401: the token is missing or not accepted",
        403: "HTTP 403: not allowed",
        404: "HTTP 404: there is nothing at this path",
        429: "HTTP 429: too many connections",
    }.get(status, f"HTTP {status}")
    return DialFailed(f"{shown} answered {meaning}", retry_after=_retry_after(headers), blocked=status in _OWNERS)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    text = headers.get("Retry-After", "")
    if text.isdecimal():
        return min(float(text), _LONGEST_RETRY_AFTER)
    try:
        at = parsedate_to_datetime(text)
        now = parsedate_to_datetime(headers["Date"])  # the server's clock, for the machine's may be off
        return min(max(0.0, (at - now).total_seconds()), _LONGEST_RETRY_AFTER)
    except (ValueError, KeyError, TypeError):
        return None
