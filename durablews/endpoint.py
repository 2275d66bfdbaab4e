"""Where to connect, and as whom: asked of the application anew on every attempt."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from msgspec import Struct

from durablews.addresses import redacted, url_fault, without_user
from durablews.config import Settings
from durablews.errors import ConfigError
from durablews.providers import Provided, Provider, ProviderFailed

__all__ = ["Endpoint", "Target", "check_url"]

# What is shorter may be a word that the server means: "no" is no secret.
_SHORTEST_SECRET = 6


class Target(Struct, frozen=True, kw_only=True):
    """One answer of the application: a URL, and the headers of a handshake with the token among them."""

    url: str
    headers: dict[str, str]

    def __repr__(self) -> str:
        return f"<Target {redacted(self.url)}>"  # the rest may be secret

    def discreet(self, text: str) -> str:
        """Return what a server says without what it was told: some repeat the token that they refuse."""
        parts = urlsplit(self.url)
        query = [value for _, value in parse_qsl(parts.query)] + [
            pair.partition("=")[2] for pair in parts.query.split("&")
        ]
        told = [*self.headers.values(), *query, parts.username or "", parts.password or ""]
        # "Bearer abc" is also "abc". Longest first, so that no rest is left of one that begins another.
        words = {word for value in told for word in (value, value.rpartition(" ")[2])}
        secrets = {word for word in words if len(word) >= _SHORTEST_SECRET}
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, "...")
        return text


class Endpoint:
    """The url, the headers and the token of one client.

    Args:
        settings: for the headers and the token file of the configuration, and the time limit.
        url: the address; this and the two others are values, or callables that give them, sync or async.
        headers: a mapping for the handshake.
        token: a bearer token.
    """

    def __init__(self, settings: Settings, *, url: Provided, headers: Provided = None, token: Provided = None) -> None:
        limit = settings.auth.provider_timeout
        self._fixed = settings.auth.headers
        file = settings.auth.token_file if token is None else None
        self._url = Provider("url", url, limit, _checked_url)
        self._headers = Provider("headers", headers, limit, _checked_headers)
        self._token = Provider("token", token if file is None else partial(_read_token, file), limit, _checked_token)
        #: Whether a later answer may be another one.
        self.may_change = any(provider.is_callable for provider in (self._url, self._headers, self._token))
        #: Whether asking costs no more than a look at a file.
        self.is_cheap = file is not None and not self._url.is_callable and not self._headers.is_callable

    async def ask(self) -> Target:
        """Return where to connect now.

        Raises:
            ProviderFailed: a callable failed, or gave what cannot be used.
        """
        url: str = await self._url.ask()
        together: dict[str, str] = {**self._fixed, **(await self._headers.ask())}
        token: str = await self._token.ask()
        if token:
            together["Authorization"] = f"Bearer {token}"
            url = without_user(url)  # websockets would send its user and password as a second Authorization
        return Target(url=url, headers=together)


def check_url(url: Provided) -> None:
    """Check what can be checked of a URL before the first attempt.

    Raises:
        ConfigError: it is not one for a WebSocket.
    """
    if not callable(url) and (fault := url_fault(url)) is not None:
        raise ConfigError(f"url {fault}")


def _checked_url(url: Any) -> str:
    if (fault := url_fault(url)) is not None:
        raise ProviderFailed(f"the url {fault}", defect=True)
    return str(url)


def _checked_headers(headers: Any) -> dict[str, str]:
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise ProviderFailed("headers must be a mapping", defect=True)
    checked = dict(headers)
    if not all(_is_sendable(name) and _is_sendable(value) for name, value in checked.items()):
        raise ProviderFailed("headers must be texts of one line", defect=True)
    return checked


def _checked_token(token: Any) -> str:
    """Return a token without the white space around it: a file that holds one mostly ends with a line end."""
    if token is None:
        return ""
    if not isinstance(token, str) or not _is_sendable(token.strip()):
        raise ProviderFailed("the token must be a text of one line", defect=True)
    return token.strip()


def _is_sendable(text: Any) -> bool:
    """Whether a text may be part of a header (RFC 9110 section 5.5)."""
    return isinstance(text, str) and text.isprintable() and text.isascii()


def _read_token(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise ProviderFailed(f"the token file cannot be read: {why}", defect=True) from exc
