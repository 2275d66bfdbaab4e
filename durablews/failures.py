"""Why no WebSocket came about: a sentence, and what follows. No texts of others where they may hold what is secret."""

from __future__ import annotations

import socket
import ssl

import websockets
from msgspec import Struct
from websockets.exceptions import (
    InvalidProxy,
    InvalidProxyStatus,
    InvalidURI,
    NegotiationError,
    ProxyError,
    SecurityError,
)

from durablews.reconnection import Outcome
from durablews.trust import in_words

__all__ = ["Way", "failed_outcome", "timed_out", "unusable"]

# What a server says of a client's certificate in an alert (RFC 8446 section 6.2; RFC 5246 section 7.2.2).
_CERTIFICATE_ALERTS = frozenset(
    {
        "access denied",
        "bad certificate",
        "certificate expired",
        "certificate required",
        "certificate revoked",
        "certificate unknown",
        "unknown ca",
        "unsupported certificate",
    }
)


class Way(Struct, frozen=True):
    """How far an attempt came, with addresses to be shown.

    Attributes:
        server: where it wants to.
        proxy: what it has to pass first, if anything.
        reached: whether there was a connection with the server, through the proxy or straight.
    """

    server: str
    proxy: str | None
    reached: bool

    @property
    def at_proxy(self) -> bool:
        """Whether it came no further than to the proxy."""
        return self.proxy is not None and not self.reached

    @property
    def nearest(self) -> str:
        """Who it had to do with last."""
        return f"the proxy {self.proxy}" if self.at_proxy else self.server


def failed_outcome(exc: Exception, way: Way) -> Outcome:
    """Say what went wrong, and with whom."""
    if isinstance(exc, ssl.SSLError):
        return _tls_failed(exc, way)
    if isinstance(exc, InvalidProxy):
        return unusable("proxy", "the proxy's address cannot be used")
    if isinstance(exc, ImportError):  # connecting through SOCKS is an extra
        return unusable("proxy", 'a SOCKS proxy needs a package: pip install "durablews[socks]"')
    if way.at_proxy:
        return _proxy_failed(exc, way)
    if isinstance(exc, NegotiationError):
        return unusable("subprotocol", f"{way.server} selected a subprotocol that was not offered")
    if isinstance(exc, InvalidURI | SecurityError):
        return _trouble("redirect", f"{way.server} redirects to an address that is not allowed (a login page?)")
    if isinstance(exc, ConnectionError) and way.reached:
        return _trouble("tls", f"{way.server} ended the connection during the TLS handshake")
    if isinstance(exc, OSError):
        return _trouble("dns" if isinstance(exc, socket.gaierror) else "network", _unreachable(exc, way))
    if isinstance(exc, EOFError) or isinstance(exc.__cause__, EOFError):  # a reset looks the same to websockets
        return _trouble("network", f"{way.server} ended the connection without an answer")
    if isinstance(exc, websockets.WebSocketException):
        return _trouble("handshake", f"{way.server} did not answer as a WebSocket server: {type(exc).__name__}")
    return unusable("settings", f"the url or the headers cannot be used: {type(exc).__name__}")


def timed_out(way: Way, limit: float) -> Outcome:
    """Say who did not answer within `limit` seconds."""
    what = f"did not connect to {way.server}" if way.at_proxy else "did not answer"
    return _trouble("timeout", f"{way.nearest} {what} within {limit:g} s")


def unusable(kind: str, reason: str) -> Outcome:
    """Say what only the owner can mend."""
    return Outcome(kind=kind, reason=reason, blocked=reason, slow=True)


def _trouble(kind: str, reason: str, code: int | None = None) -> Outcome:
    return Outcome(kind=kind, reason=reason, code=code)


def _tls_failed(exc: ssl.SSLError, way: Way) -> Outcome:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return unusable("certificate", f"the certificate of {way.nearest} is not trusted: {exc.verify_message}")
    if isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return _trouble("tls", f"{way.nearest} ended the connection during the TLS handshake")
    why = in_words(exc)
    if why in _CERTIFICATE_ALERTS:
        return unusable("certificate", f"{way.nearest} does not accept the client certificate: {why}")
    return _trouble("tls", f"TLS with {way.nearest} failed: {why}")


def _proxy_failed(exc: Exception, way: Way) -> Outcome:
    if isinstance(exc, InvalidProxyStatus):
        status = exc.response.status_code
        if status == 407:
            return unusable("proxy", f"{way.nearest} answered HTTP 407: it wants credentials")
        return _trouble("proxy", f"{way.nearest} answered HTTP {status} for {way.server}", status)
    if isinstance(exc, OSError) and not isinstance(exc.__cause__, EOFError):
        return _trouble("proxy", _unreachable(exc, way))
    # SOCKS: python-socks has words, from the protocol and never from us, for what the proxy answered.
    said = str(exc.__cause__) if isinstance(exc, ProxyError) and exc.__cause__ is not None else ""
    if said == "Username and password authentication failure":
        return unusable("proxy", f"{way.nearest} does not accept the user and the password")
    if said == "No acceptable authentication methods were offered":
        return unusable("proxy", f"{way.nearest} wants credentials")
    why = f": {said}" if getattr(exc.__cause__, "error_code", None) else ""
    return _trouble("proxy", f"{way.nearest} did not connect to {way.server}{why}")


def _unreachable(exc: OSError, way: Way) -> str:
    if isinstance(exc, socket.gaierror):
        return f"the name of {way.nearest} cannot be resolved: {exc.strerror}"
    return f"{way.nearest} cannot be reached: {exc.strerror or type(exc).__name__}"
