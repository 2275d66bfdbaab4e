"""What a user sends and what the queue holds: payloads, priorities, entries."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from durablews.errors import PayloadError

__all__ = [
    "HIGH",
    "LOW",
    "NORMAL",
    "PRIORITIES",
    "Draft",
    "Entry",
    "Refusal",
    "Run",
    "checksum",
    "decode_payload",
    "draft",
    "encode_payload",
    "priority_name",
    "priority_number",
]

LOW, NORMAL, HIGH = -1, 0, 1
PRIORITIES = {"low": LOW, "normal": NORMAL, "high": HIGH}
_PRIORITY_RANGE = range(-100, 101)

# One encoder for all: it keeps its buffer, which halves the cost of a small message.
_encoder = msgspec.json.Encoder()


class Draft(msgspec.Struct, frozen=True):
    """A message that is ready to be stored: checked, encoded, measured.

    Attributes:
        payload: JSON text, or bytes.
        bytes: what the caps count: payload, topic and headers in UTF-8.
        checksum: CRC-32 of the payload, so that a flipped bit on the disk is never sent.
        ttl: milliseconds, or None.
        headers: the text of a JSON object of strings, or None.
        id: the caller's own, or None.
    """

    payload: str | bytes
    bytes: int
    checksum: int
    priority: int = NORMAL
    topic: str | None = None
    headers: str | None = None
    ttl: int | None = None
    id: str | None = None


class Entry(NamedTuple):
    """A row on its way out: a tuple, because every message passes here. `created_at` is in ms since 1970 UTC."""

    seq: int
    priority: int
    payload: str | bytes
    topic: str | None
    headers: str | None
    created_at: int
    bytes: int
    transmissions: int
    nacks: int


class Refusal(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why an entry is a dead letter, as it is kept in the `refusal` column.

    Attributes:
        code: the server's (``"invalid"``) or ours (``"too_large"``, ``"poison"``, ``"not_utf8"``, ``"damaged"``).
        reason: text for people.
        unknown: True when it was transmitted and not nacked: the server may have applied it.
        needs: for one that is aside: the frame size in bytes that it needs.
        tries: for one that is aside: when connections were too small for it, in ms of the outbox clock.
    """

    code: str
    reason: str | None = None
    unknown: bool = False
    needs: int | None = None
    tries: list[int] = []


class Run(msgspec.Struct, frozen=True):
    """Entries of one priority that were in flight together: every waiting row from `first` to `last`."""

    priority: int
    first: int
    last: int
    messages: int
    bytes: int


def encode_payload(payload: Any) -> str | bytes:
    """Return what is stored for `payload`: bytes as they are, everything else as JSON text.

    Raises:
        PayloadError: msgspec cannot encode it as JSON.
    """
    if isinstance(payload, bytes):
        return payload
    if isinstance(payload, bytearray | memoryview):
        return bytes(payload)
    try:
        return _encoder.encode(payload).decode()
    except (TypeError, ValueError, RecursionError, OverflowError, msgspec.MsgspecError) as exc:
        raise PayloadError(f"a payload of type {type(payload).__name__} cannot be stored as JSON: {exc}") from exc


def decode_payload(stored: str | bytes) -> Any:
    """Return what `encode_payload` was given, as far as JSON can tell."""
    return stored if isinstance(stored, bytes) else msgspec.json.decode(stored)


def checksum(stored: str | bytes) -> int:
    """Return the CRC-32 that is kept beside a payload."""
    return zlib.crc32(stored if isinstance(stored, bytes) else stored.encode())


def priority_number(priority: int | str) -> int:
    """Return the number of a priority: ``"low"``, ``"normal"``, ``"high"`` are -1, 0, 1; bigger is sooner.

    Raises:
        PayloadError: neither one of these names nor an integer from -100 to 100.
    """
    # Names first: a text is looked for in a range number by number, which costs ten times as much as all the rest.
    if isinstance(priority, str):
        if priority in PRIORITIES:
            return PRIORITIES[priority]
    elif priority in _PRIORITY_RANGE and not isinstance(priority, bool | float):
        return int(priority)
    raise PayloadError(f"priority must be low, normal, high or an integer from -100 to 100, not {priority!r}")


def priority_name(priority: int) -> str:
    """Return ``"high"`` for 1 and so on; the number itself where it has no name."""
    return next((name for name, number in PRIORITIES.items() if number == priority), str(priority))


def draft(
    payload: Any,
    *,
    priority: int | str = NORMAL,
    topic: str | None = None,
    headers: Mapping[str, str] | None = None,
    ttl: float | None = None,
    id: str | None = None,
) -> Draft:
    """Check and encode one message.

    Args:
        payload: anything msgspec encodes as JSON, or bytes.
        priority: ``"low"``, ``"normal"``, ``"high"``, or an integer from -100 to 100; bigger is sooner.
        topic: a word for the server and for the owner's policies.
        headers: strings by name, carried to the server.
        ttl: seconds after which it is no longer worth sending.
        id: the caller's own, for sending again after a cancelled or failed send.

    Raises:
        PayloadError: any of them cannot be stored.
    """
    stored = encode_payload(payload)
    if isinstance(stored, bytes):
        encoded = stored
    else:
        encoded = stored.encode()
    size = len(encoded)
    kept = None
    if topic is not None:
        size += len(_text("topic", topic))
    if headers is not None:
        kept = _headers(headers)
        size += len(kept.encode()) if kept else 0
    if ttl is not None and not (isinstance(ttl, int | float) and 0.001 <= ttl <= 1e11 and math.isfinite(ttl)):
        raise PayloadError(f"ttl must be a number of seconds from 0.001, not {ttl!r}")
    if id is not None:
        _text("id", id)
    return Draft(
        stored,
        size,
        zlib.crc32(encoded),
        NORMAL if priority == NORMAL and type(priority) is int else priority_number(priority),
        topic,
        kept,
        None if ttl is None else int(ttl * 1000),
        id,
    )


def _text(what: str, value: object) -> bytes:
    if not isinstance(value, str):
        raise PayloadError(f"{what} must be a string, not {type(value).__name__}")
    try:
        return value.encode()
    except UnicodeEncodeError as exc:
        raise PayloadError(f"{what} {value!r} is not valid Unicode: {exc.reason}") from exc


def _headers(headers: Mapping[str, str]) -> str | None:
    if not isinstance(headers, Mapping):
        raise PayloadError(f"headers must be a mapping of strings to strings, not {type(headers).__name__}")
    if not headers:
        return None
    try:
        return _encoder.encode(msgspec.convert(dict(headers), dict[str, str])).decode()
    except (TypeError, ValueError) as exc:
        raise PayloadError(f"headers must be a mapping of strings to strings: {exc}") from exc
