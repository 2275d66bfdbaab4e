"""What `Delivery` asks of its shell."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from durablews.messages import Refusal, Run

__all__ = [
    "Action",
    "Close",
    "Deliver",
    "Echoed",
    "MarkUnanswered",
    "Postpone",
    "Refuse",
    "RenewStream",
    "Requeue",
    "SetAside",
    "Settle",
    "TakeBack",
    "Want",
    "Welcomed",
]


class Settle(Struct, frozen=True):
    """Delete what the server acknowledged."""

    run: Run


class MarkUnanswered(Struct, frozen=True):
    """Note that the connection was lost before these were answered."""

    runs: tuple[Run, ...]


class TakeBack(Struct, frozen=True):
    """Note that the server did not take these, and that the first of them got the nack. Nothing waits for it."""

    run: Run


class Refuse(Struct, frozen=True):
    """Make an entry a dead letter; then call `recorded`. `nacked`: the server said so, and so has not applied it."""

    priority: int
    seq: int
    refusal: Refusal
    nacked: bool = False


class Requeue(Struct, frozen=True):
    """Send an entry to the back of its queue under a new sequence; then call `recorded`."""

    priority: int
    seq: int


class SetAside(Struct, frozen=True):
    """Let an entry wait beside the queue that is too large for this server; then call `recorded`."""

    priority: int
    seq: int
    refusal: Refusal


class RenewStream(Struct, frozen=True):
    """Give the outbox a new stream; then call `introduce` again, on this connection or the next."""


class Welcomed(Struct, frozen=True):
    """The server takes messages, in frames of `max_bytes` at most (None: any)."""

    max_bytes: int | None


class Deliver(Struct, frozen=True):
    """Hand a pushed message to the application: JSON text, or bytes."""

    payload: str | bytes


class Echoed(Struct, frozen=True):
    """Ping number `number` was answered."""

    number: int


class Postpone(Struct, frozen=True):
    """Do not come back before `delay` seconds after this connection has ended."""

    delay: float


class Close(Struct, frozen=True):
    """Close the connection."""

    code: int
    reason: str


Action = (
    Settle
    | MarkUnanswered
    | TakeBack
    | Refuse
    | Requeue
    | SetAside
    | RenewStream
    | Welcomed
    | Deliver
    | Echoed
    | Postpone
    | Close
)


class Want(Struct, frozen=True):
    """What to read from the outbox next; the arguments of `entries.peek`."""

    generation: int
    after: Mapping[int, int]
    closed: frozenset[int]
    limit: int
    max_bytes: int
    above: int
