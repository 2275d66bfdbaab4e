"""A message as the server's application sees it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from msgspec import Struct

from durablews.messages import decode_payload
from durablews.wire.frames import Item

__all__ = ["Message", "message_of"]


class Message(Struct, frozen=True, kw_only=True, dict=True):
    """One message of a client's outbox.

    Attributes:
        stream: the outbox it comes from, 32 hex digits.
        priority: -100 to 100.
        seq: its sequence in the stream; (stream, priority, seq) names it once and for all.
        raw: the payload as it travelled: JSON text, or bytes.
        topic: the client's word for what this is, or None.
        headers: strings by name.
        enqueued_at: when the client stored it, ms UTC by the client's clock, or None. Information only: nothing may be
            ordered or expired by it (PROTOCOL.md section 1).
        transmission: how often it was sent, this time included.
    """

    stream: str
    priority: int
    seq: int
    raw: str | bytes
    topic: str | None = None
    headers: dict[str, str] = {}
    enqueued_at: int | None = None
    transmission: int = 1

    @cached_property
    def payload(self) -> Any:
        """Return the decoded JSON value, or the bytes; decoded when it is first asked for.

        Raises:
            ValueError: JSON that no Python value holds. Refuse such a message: it will not become better.
        """
        return decode_payload(self.raw)

    def __repr__(self) -> str:
        # Without the payload: this ends up in logs.
        return f"{type(self).__name__}(stream={self.stream!r}, priority={self.priority}, seq={self.seq})"


def message_of(stream: str, priority: int, item: Item) -> Message:
    """Return what stands in a frame as a Message."""
    meta = item.meta
    return Message(
        stream=stream,
        priority=priority,
        seq=item.seq,
        raw=item.payload,
        topic=meta.topic,
        headers=meta.h or {},
        enqueued_at=meta.ts,
        transmission=max(1, meta.n),
    )
