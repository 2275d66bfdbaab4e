"""URLs of servers and of proxies: whether they can be one, and how they are shown. Pure."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

__all__ = ["proxy_fault", "redacted", "url_fault", "without_user"]

_PROXIES = frozenset({"http", "https", "socks4", "socks4a", "socks5", "socks5h"})


def redacted(url: str) -> str:
    """Return a URL without what may be secret in it: user, password, query, fragment."""
    parts = urlsplit(without_user(url))
    return urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


def without_user(url: str) -> str:
    """Return a URL without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def url_fault(url: object) -> str | None:
    """Say why something is no URL of a WebSocket (RFC 6455 section 3), without quoting it; None when it is one."""
    unusable = "must begin with ws:// or wss:// and name a host"
    if not isinstance(url, str) or not url.startswith(("ws://", "wss://")):
        return unusable
    try:
        parts = urlsplit(url)
        if not parts.hostname or parts.port == 0:
            return unusable
    except ValueError:  # half an IPv6 address, a port above 65535
        return unusable
    if "#" in url:
        return "must not have a fragment (#)"
    if parts.username is not None and parts.password is None:
        return "names a user without a password"
    return None


def proxy_fault(proxy: str) -> str | None:
    """Say why a text is no URL of a proxy, without quoting it; None when it is one."""
    unusable = "must be the URL of a proxy, such as http://host:3128 or socks5h://host:1080"
    try:
        parts = urlsplit(proxy)
        usable = parts.scheme in _PROXIES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return unusable
    return None if usable and parts.path in ("", "/") and not parts.query else unusable
