"""What `inspection` reports: data, and its JSON (DESIGN section 9)."""

from __future__ import annotations

import re

import msgspec

from durablews.messages import Refusal

__all__ = ["Departures", "EntrySummary", "Limits", "Link", "Snapshot", "to_json"]

# JSON strings may hold these as they are, and terminals obey some of them or show text in another order by them.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The caps of the outbox. `max_age` is in seconds, or None."""

    max_messages: int
    max_bytes: int
    max_age: float | None
    overflow: str


class Departures(msgspec.Struct, frozen=True, kw_only=True):
    """How many have left by which reason, ever.

    `dead_dropped` are dead letters over their own cap; `lost` went with a damaged file (`durablews doctor --salvage`).
    """

    acked: int
    refused: int
    expired: int
    expired_unanswered: int
    dropped: int
    dropped_unanswered: int
    dropped_new: int
    dead_dropped: int
    lost: int


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """How the drainer's link stood when that last changed. `since` and `next_attempt` are milliseconds UTC."""

    state: str
    since: int | None
    reason: str | None
    next_attempt: int | None
    blocked: str | None


class EntrySummary(msgspec.Struct, frozen=True, kw_only=True):
    """One entry. `created_at` is in milliseconds UTC, `age` in seconds; None until a drainer has seen it.

    `payload` is JSON: the message itself, ``{"base64": …}`` for bytes, ``{"text": …}`` for text that is not JSON.
    """

    seq: int
    priority: int
    topic: str | None
    created_at: int
    age: float | None
    bytes: int
    transmissions: int
    state: str
    refusal: Refusal | msgspec.UnsetType = msgspec.UNSET
    payload: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """An outbox as it was at one moment. Ages are in seconds on the outbox clock, sizes in bytes.

    Attributes:
        owner: who drains it now, or None.
        oldest_age: of the lowest sequence that waits; None when nothing waits or no drainer has seen it yet.
        departed: counts by reason since the outbox was made.
        file_bytes: the database and its log.
    """

    outbox: str
    schema: int
    stream: str
    owner: str | None
    pending: int
    pending_bytes: int
    caps: Limits
    oldest_age: float | None
    dead: int
    departed: Departures
    enqueued: int
    redelivered: int
    file_bytes: int
    link: Link
    entries: list[EntrySummary]

    def without_entries(self) -> Snapshot:
        """Return the same with no entries."""
        return msgspec.structs.replace(self, entries=[])


def to_json(value: Snapshot | EntrySummary) -> bytes:
    """Return one line of JSON without the characters that a terminal would obey."""
    text = msgspec.json.encode(value).decode()
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()
