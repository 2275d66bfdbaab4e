"""Where to connect, and as whom: asked of the application anew on every attempt."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from urllib.parse import urlsplit, urlunsplit

from msgspec import Struct

from durablews.config import Settings
from durablews.errors import ConfigError
from durablews.providers import Provided, Provider, ProviderFailed

__all__ = ["Endpoint", "Target", "check_url", "redacted"]


class Target(Struct, frozen=True, kw_only=True):
    """One answer of the application: a URL, and the headers of a handshake with the token among them."""

    url: str
    headers: dict[str, str]

    def __repr__(self) -> str:
        return f"<Target {redacted(self.url)}>"  # the rest may be secret


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
        self._url = Provider("url", url, limit)
        self._headers = Provider("headers", headers, limit)
        self._token = Provider("token", token if file is None else partial(_read_token, file), limit)
        #: Whether a later answer may be another one.
        self.may_change = any(provider.is_callable for provider in (self._url, self._headers, self._token))
        #: Whether asking costs no more than a look at a file.
        self.is_cheap = file is not None and not self._url.is_callable and not self._headers.is_callable

    async def ask(self) -> Target:
        """Return where to connect now.

        Raises:
            ProviderFailed: a callable failed, or gave what cannot be used.
        """
        url = await self._url.ask()
        if not _is_usable(url):
            raise ProviderFailed("the url must begin with ws:// or wss:// and name a host", defect=True)
        headers = await self._headers.ask()
        if headers is not None and not isinstance(headers, Mapping):
            raise ProviderFailed("headers must be a mapping", defect=True)
        together = {**self._fixed, **(headers or {})}
        token = await self._token.ask()
        if token is not None and str(token):
            together["Authorization"] = f"Bearer {token}"
            url = _without_user(url)  # websockets would send its user and password as a second Authorization
        return Target(url=url, headers=together)


def redacted(url: str) -> str:
    """Return a URL without what may be secret in it: user, password, query, fragment."""
    parts = urlsplit(_without_user(url))
    return urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


def check_url(url: Provided) -> None:
    """Check what can be checked of a URL before the first attempt.

    Raises:
        ConfigError: it is not one for a WebSocket.
    """
    if not callable(url) and not _is_usable(url):
        raise ConfigError("url must begin with ws:// or wss:// and name a host")


def _is_usable(url: object) -> bool:
    try:
        return isinstance(url, str) and url.startswith(("ws://", "wss://")) and bool(urlsplit(url).hostname)
    except ValueError:  # half an IPv6 address
        return False


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _read_token(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise ProviderFailed(f"the token file cannot be read: {why}", defect=True) from exc
