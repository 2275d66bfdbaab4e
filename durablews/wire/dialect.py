"""What a dialect is: how entries become frames on one connection, and what the server's frames mean. Sans I/O.

A dialect only translates. Windows, order, retries, timeouts and what an answer settles are `delivery`'s, once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from durablews.messages import Entry

__all__ = [
    "Acked",
    "Answer",
    "Capabilities",
    "Dialect",
    "Farewell",
    "Flowed",
    "Introduction",
    "Nacked",
    "Ponged",
    "Pushed",
    "Ready",
    "Reply",
    "Wire",
]


class Capabilities(Struct, frozen=True, kw_only=True):
    """What a server of this dialect can be relied on for."""

    #: Messages in flight at a time; None: as many as it says.
    largest_window: int | None
    #: Messages of one priority are applied in sequence.
    ordered: bool
    #: The server removes repeats.
    deduplicates: bool
    #: A refusal names its message.
    names_refusals: bool
    #: What an acknowledgement says, for people.
    ack_means: str


class Introduction(Struct, frozen=True):
    """Who the client is on this connection (PROTOCOL.md section 2, hello)."""

    stream: str
    instance: str
    last: int
    max_bytes: int
    agent: str


class Ready(Struct, frozen=True):
    """The server takes messages: so many, in frames so large. `rewound`: it knows a later life of the stream."""

    window: int | None
    max_bytes: int | None
    rewound: bool = False


class Acked(Struct, frozen=True):
    """Everything of this priority in flight up to `seq` is safe at the server."""

    priority: int
    seq: int


class Nacked(Struct, frozen=True):
    """`seq`, and what was sent after it in its priority, was not taken. `retry` is in seconds, or None."""

    priority: int
    seq: int
    code: str
    final: bool = False
    retry: float | None = None
    reason: str | None = None


class Flowed(Struct, frozen=True):
    """A new window."""

    window: int


class Pushed(Struct, frozen=True):
    """A message to the application: JSON text, or bytes."""

    payload: str | bytes


class Ponged(Struct, frozen=True):
    """The answer to a ping of this client."""

    number: int


class Reply(Struct, frozen=True):
    """A frame that the dialect itself owes the server, such as a pong."""

    frame: bytes


class Farewell(Struct, frozen=True):
    """The server is about to close and asks the client to come back after `retry` seconds."""

    retry: float


Answer = Ready | Acked | Nacked | Flowed | Ponged | Pushed | Reply | Farewell


class Wire(Protocol):
    """A dialect on one connection."""

    #: Whether frames travel as WebSocket text messages.
    text: bool

    def open(self, introduction: Introduction) -> list[bytes]:
        """Return the frames that come first; messages wait for `Ready`."""

    def encode(self, priority: int, after: int | None, entries: Sequence[Entry]) -> bytes:
        """Return one frame of entries of one priority. `after`: the sequence sent before them on this connection."""

    def ping(self, number: int) -> bytes | None:
        """Return a frame that the server answers with `Ponged`; None when the dialect has none."""

    def feed(self, data: str | bytes) -> list[Answer]:
        """Return what one WebSocket message from the server says.

        Raises:
            ProtocolError: it is malformed. Nothing else is ever raised.
        """


class Dialect(Protocol):
    """A way of speaking to a server."""

    name: str
    #: Offered in this order.
    subprotocols: tuple[str, ...]
    capabilities: Capabilities

    def connection(self, subprotocol: str | None) -> Wire:
        """Return the dialect on a new connection for which the server selected `subprotocol`.

        Raises:
            ProtocolError: it cannot be spoken there.
        """
