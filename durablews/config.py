"""Every setting: its name, unit, default and range, once. The same names in a file, in the environment, as keywords.

Durations are seconds as numbers, or texts such as ``"30s"``, ``"5m"``, ``"72h"``; sizes are bytes, or ``"50MB"``,
``"1GiB"``; ``"none"`` switches off what may be off. Nothing here reads the environment or a file by itself.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from durablews.backoff import Backoff
from durablews.errors import ConfigError

__all__ = [
    "AuthConfig",
    "CapsConfig",
    "DeliveryConfig",
    "HeartbeatConfig",
    "ReconnectConfig",
    "Settings",
    "TLSConfig",
    "did_you_mean",
    "merge",
    "parse_duration",
    "parse_size",
    "read_environment",
    "read_settings",
]

S = TypeVar("S", bound=Struct)


class _Duration:
    """Marks a setting that is given in seconds."""


class _Size:
    """Marks a setting that is given in bytes."""


Seconds = Annotated[float, Meta(gt=0, le=1e9, extra={"kind": _Duration})]
SecondsOrZero = Annotated[float, Meta(ge=0, le=1e9, extra={"kind": _Duration})]
Size = Annotated[int, Meta(gt=0, lt=2**62, extra={"kind": _Size})]
Count = Annotated[int, Meta(gt=0, lt=2**53)]

_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


class ReconnectConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When to try again. Delays are ``min(base_delay * factor ** attempt, max_delay)``, jittered."""

    #: Seconds: the first window.
    base_delay: Seconds = 1.0
    #: Seconds: the longest window.
    max_delay: Seconds = 30.0
    #: How much longer each next window is.
    factor: Annotated[float, Meta(ge=1, le=100)] = 2.0
    #: "full", "equal", or a fraction such as 0.25 for plus or minus a quarter.
    jitter: Literal["full", "equal"] | Annotated[float, Meta(ge=0, le=1)] = "full"
    #: Failed tries in a row after which the link stays DISCONNECTED, everything kept; None: never.
    max_retries: Annotated[int, Meta(ge=0)] | None = None
    #: Seconds over which the first try after a good connection is spread; None: base_delay. A fleet whose server takes
    #: 500 connections a second wants its number of devices / 500 here.
    first_delay: Seconds | None = None
    #: Seconds after which a connection is left between two messages and made anew; None: never. For paths that cut
    #: after a fixed time: it is drawn anew for each connection, between 80 % of this and this.
    max_connection_age: Seconds | None = None
    #: Seconds for dialling, the handshake and the server's welcome together.
    connect_timeout: Seconds = 10.0
    #: Seconds connected after which the backoff starts anew; an ack does that at once.
    stable_after: Seconds = 60.0

    def backoff(self, random: Callable[[], float]) -> Backoff:
        """Return the delays that these settings make; `random` is a source of floats in [0, 1)."""
        return Backoff(
            base_delay=self.base_delay,
            max_delay=self.max_delay,
            factor=self.factor,
            jitter=self.jitter,
            first_delay=self.first_delay,
            random=random,
        )


class HeartbeatConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a dead link is noticed: within ``interval * max_missed + timeout`` seconds of the last sign of life."""

    #: Seconds of silence after which a ping is sent.
    interval: Seconds = 30.0
    #: Seconds to wait for anything to arrive after a ping.
    timeout: Seconds = 10.0
    #: Pings without an answer after which the link is closed with 4408.
    max_missed: Annotated[int, Meta(ge=1, le=1000)] = 3
    #: Whether the interval follows the measured latency, between 15 and 60 s: an average of the last ten above 5 s
    #: doubles it, one below 1 s halves it. `interval` is where it begins.
    adaptive: bool = False
    #: Whether pings are messages of the dialect instead of WebSocket pings, for paths that lose or fake those.
    application: bool = False


class CapsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much may wait. The caps live in the outbox file: only what is given here changes them."""

    #: Messages; a new outbox has 1 000 000.
    max_messages: Count | UnsetType = UNSET
    #: Bytes of payloads, topics and headers; a new outbox has 1 GiB.
    max_bytes: Size | UnsetType = UNSET
    #: Seconds on the outbox clock; a new outbox has none.
    max_age: Seconds | UnsetType | None = UNSET
    #: What happens to a message that finds no room; a new outbox has "reject".
    overflow: Literal["reject", "drop_oldest", "drop_new"] | UnsetType = UNSET

    def explicit(self) -> dict[str, object]:
        """Return what was given, as the columns of `durablews_caps` (ages in ms)."""
        given = {name: getattr(self, name) for name in self.__struct_fields__ if getattr(self, name) is not UNSET}
        if given.get("max_age") is not None:
            given["max_age"] = max(1, int(given["max_age"] * 1000))
        return given


class DeliveryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How messages are sent and answers waited for."""

    #: Messages in flight at a time; the server may allow fewer.
    window: Annotated[int, Meta(ge=1, le=1_000_000)] = 1024
    #: Bytes in flight at a time; one message always goes.
    window_bytes: Size = 1024 * 1024
    #: Seconds without an ack, counted from the last byte that the socket took, after which the link is left.
    ack_timeout: Seconds = 30.0
    #: Messages a second; None: as fast as the server answers.
    rate_limit: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    #: What a "try again later" does: hold its priority back in order, or send the message to the back of its queue.
    on_retry: Literal["block", "requeue"] = "block"
    #: Such answers after which a message becomes a dead letter; None: never.
    max_attempts: Annotated[int, Meta(ge=1)] | None = None
    #: Seconds for which closing waits for the outbox to empty; the rest stays on disk.
    drain_timeout: SecondsOrZero = 5.0


class AuthConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is shown to the server. Read anew on every attempt."""

    #: A file that holds a bearer token.
    token_file: str | None = None
    #: Headers of the handshake.
    headers: dict[str, str] = {}
    #: Seconds for which a callable that gives the url, the headers, the token or a veto may take to answer.
    provider_timeout: Seconds = 10.0


class TLSConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whom to trust, and as whom to appear. Verification cannot be switched off."""

    #: PEM file of the authorities to trust instead of the system's.
    ca_file: str | None = None
    #: PEM files of a client certificate and its key.
    cert_file: str | None = None
    key_file: str | None = None


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of one client."""

    url: str | None = None
    outbox: str | None = None
    #: "durablews.v1", or with ".json" or ".msgpack" to insist on an encoding.
    dialect: str = "durablews.v1"
    #: "power": a commit is synced before `send` returns. "process": it survives a kill, not a power loss.
    durability: Literal["power", "process"] = "power"
    #: Seconds for which a message may wait for others to share its commit; `send` still returns when it is committed.
    #: 0.05 makes 20 commits a second at most: flash wears less, and a message takes up to that much longer.
    commit_interval: Annotated[float, Meta(ge=0, le=10, extra={"kind": _Duration})] = 0.0
    reconnect: ReconnectConfig = ReconnectConfig()
    heartbeat: HeartbeatConfig = HeartbeatConfig()
    caps: CapsConfig = CapsConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    auth: AuthConfig = AuthConfig()
    tls: TLSConfig = TLSConfig()
    #: A proxy's URL; "env": what HTTPS_PROXY and its kin say; None: none.
    proxy: str | None = "env"
    #: "deflate" offers permessage-deflate.
    compression: Literal["deflate"] | None = None
    #: The largest frame that the server may send, in bytes.
    max_message_size: Annotated[int, Meta(ge=1024, lt=2**31, extra={"kind": _Size})] = 1024 * 1024

    def __post_init__(self) -> None:
        if self.reconnect.base_delay > self.reconnect.max_delay:
            raise ValueError("reconnect.base_delay is above reconnect.max_delay")
        if (self.tls.cert_file is None) != (self.tls.key_file is None):
            raise ValueError("tls.cert_file and tls.key_file go together")


def read_settings(value: S | Mapping[str, Any] | None, kind: type[S], where: str) -> S:
    """Return `kind` from a mapping, from an instance, or from its defaults.

    Raises:
        ConfigError: a name is unknown, or a value is of the wrong type or out of range; says which.
    """
    if value is None:
        return kind()
    if isinstance(value, kind):
        value = {name: getattr(value, name) for name in kind.__struct_fields__ if getattr(value, name) is not UNSET}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a table of settings, not {type(value).__name__}")
    try:
        return msgspec.convert(_plain(value, kind, where), kind)
    except (msgspec.ValidationError, ValueError, TypeError) as exc:
        text, _, place = str(exc).partition(" - at `$")
        setting = where + place.rstrip("`") if where else place.strip(".`")
        raise ConfigError(f"{setting}: {text}" if setting else text) from None


def merge(*layers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Lay settings over one another, the later over the earlier; tables are merged name by name."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in (layer or {}).items():
            if isinstance(value, Struct):
                value = {n: getattr(value, n) for n in value.__struct_fields__ if getattr(value, n) is not UNSET}
            if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
                merged[name] = {**merged[name], **value}
            else:
                merged[name] = value
    return merged


def read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what ``DURABLEWS_URL``, ``DURABLEWS_HEARTBEAT_INTERVAL`` and their like say.

    Raises:
        ConfigError: a variable begins with DURABLEWS_ and names no setting.
    """
    names: dict[str, tuple[str, ...]] = {}
    for name in Settings.__struct_fields__:
        table = _table(Settings, name)
        for key in table.__struct_fields__ if table else ():
            names[f"DURABLEWS_{name}_{key}".upper()] = (name, key)
        if table is None:
            names[f"DURABLEWS_{name}".upper()] = (name,)
    found: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith("DURABLEWS_"):
            continue
        if variable not in names:
            raise ConfigError(f"{variable} is not a setting{did_you_mean(variable, names)}")
        *tables, key = names[variable]
        target = found
        for name in tables:
            target = target.setdefault(name, {})
        kind = _table(Settings, tables[0]) if tables else Settings
        target[key] = text if kind is not None and _is_text(kind, key) else _number(text)
    return found


def parse_duration(text: str) -> float:
    """Return the seconds of ``"1500ms"``, ``"30s"``, ``"5m"``, ``"72h"``, ``"7d"`` or a bare number.

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)\s*", text)
    if not match:
        raise ConfigError(f'{text!r} is not a duration; write "30s", "5m" or "72h"')
    return float(match[1]) * {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def parse_size(text: str) -> int:
    """Return the bytes of ``"400B"``, ``"50MB"``, ``"1GiB"`` or a bare number.

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ConfigError(f'{text!r} is not a size; write "50MB" or "1GiB"')
    power = " KMGT".index((match[2] or " ").upper())
    size = float(match[1]) * (1024 if match[3] else 1000) ** power
    if size == math.inf:
        raise ConfigError("a size is less than 4 EiB")
    return int(size)


def _plain(value: Mapping[str, Any], kind: type[Struct], where: str) -> dict[str, Any]:
    """Turn texts for durations and sizes, and "none", into what the structs hold; find unknown names."""
    plain: dict[str, Any] = {}
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    prefix = f"{where}." if where else ""
    for name, given in value.items():
        if name not in fields:
            raise ConfigError(f"{prefix}{name} is not a setting{did_you_mean(str(name), fields)}")
        table = _table(kind, name)
        if table is not None:
            plain[name] = read_settings(given, table, prefix + name)
            continue
        try:
            plain[name] = _value(given, fields[name])
        except ConfigError as exc:
            raise ConfigError(f"{prefix}{name}: {exc}") from None
    return plain


def _value(given: Any, annotation: Any) -> Any:
    if not isinstance(given, str):
        return given
    if annotation is bool:
        if given.lower() not in _BOOLEANS:
            raise ConfigError(f"{given!r} is neither true nor false")
        return _BOOLEANS[given.lower()]
    options = get_args(annotation) if type(None) in get_args(annotation) or UnsetType in get_args(annotation) else ()
    if given.lower() == "none" and type(None) in options:
        return None
    for option in (annotation, *options):
        for meta in getattr(option, "__metadata__", ()):
            kind = (meta.extra or {}).get("kind")
            if kind is _Duration:
                return parse_duration(given)
            if kind is _Size:
                return parse_size(given)
    return given


def _table(kind: type[Struct], name: str) -> type[Struct] | None:
    annotation = next(field.type for field in msgspec.structs.fields(kind) if field.name == name)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Struct) else None


def _is_text(kind: type[Struct], name: str) -> bool:
    """Whether an environment variable's text is kept as it is: `_value` knows what a text may mean there."""
    annotation = next(field.type for field in msgspec.structs.fields(kind) if field.name == name)
    return annotation is bool or str in (annotation, *get_args(annotation))


def _number(text: str) -> Any:
    """Return the number that an environment variable's text is, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that offers the nearest of the `known` names; nothing when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
