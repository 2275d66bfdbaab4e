"""What happens to a client, for an application that wants to know.

Each event has a `kind`, the word for it in logs and metrics.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from typing import ClassVar, Self

from msgspec import Struct

__all__ = [
    "Connected",
    "Disconnected",
    "Event",
    "EventLog",
    "Events",
    "Exhausted",
    "Failed",
    "HeartbeatTimeout",
    "Latency",
    "LogHeld",
    "MessagePushed",
    "MessageRejected",
    "MessagesAcked",
    "MessagesDropped",
    "MessagesExpired",
    "MessagesSent",
    "Reconnecting",
    "Vetoed",
]

#: A reader that does not read keeps so many events; the oldest goes.
_MOST_EVENTS = 1000


class Connected(Struct, frozen=True):
    """The server has welcomed this client."""

    kind: ClassVar[str] = "connected"
    url: str


class Disconnected(Struct, frozen=True):
    """A connection has ended. `code` is the close code, 1006 when there was none."""

    kind: ClassVar[str] = "disconnected"
    code: int
    reason: str


class Failed(Struct, frozen=True):
    """An attempt to connect failed; `reason` is a sentence, `status` the HTTP status when there was one.

    `error` is one of ``credentials`` (401, 403, or an `on_open` that raised PermissionError), ``http`` (another
    status), ``redirect``, ``handshake`` (no WebSocket server), ``subprotocol``, ``dns``, ``network`` (refused, reset,
    unreachable), ``timeout``, ``tls``, ``certificate``, ``proxy``, ``provider`` (a callable for url, headers or token),
    ``on_open``, ``settings``, ``defect`` (one of durablews' own).
    """

    kind: ClassVar[str] = "error"
    error: str
    reason: str
    status: int | None = None


class Reconnecting(Struct, frozen=True):
    """The next try is number `attempt` in a row, in `delay` seconds, which is `at` milliseconds since 1970 UTC."""

    kind: ClassVar[str] = "reconnecting"
    attempt: int
    delay: float
    at: int


class HeartbeatTimeout(Struct, frozen=True):
    """Nothing has arrived for `silence` seconds, in spite of pings; the connection is closed with 4408."""

    kind: ClassVar[str] = "heartbeat_timeout"
    silence: float


class Latency(Struct, frozen=True):
    """A ping was answered after so many seconds."""

    kind: ClassVar[str] = "latency"
    seconds: float


class LogHeld(Struct, frozen=True):
    """Another program keeps a transaction open on the outbox, and its log takes so many bytes of the disk meanwhile.

    Said again when they have doubled, and with 0 when the log is short again.
    """

    kind: ClassVar[str] = "log_held"
    bytes: int


class Exhausted(Struct, frozen=True):
    """The tries that `max_retries` allows have failed. Everything is kept; `Client.wake` begins anew."""

    kind: ClassVar[str] = "retries_exhausted"
    attempts: int


class Vetoed(Struct, frozen=True):
    """The veto of the application has stopped the link for good. Everything is kept."""

    kind: ClassVar[str] = "vetoed"
    reason: str


class MessagePushed(Struct, frozen=True):
    """The server has pushed a message; iterating over the client yields it."""

    kind: ClassVar[str] = "message"
    bytes: int


class MessagesSent(Struct, frozen=True):
    """So many messages of a priority went to the server, from sequence `first` to `last`; not acknowledged yet."""

    kind: ClassVar[str] = "sent"
    priority: int
    first: int
    last: int
    messages: int


class MessagesAcked(Struct, frozen=True):
    """So many messages of a priority were acknowledged, from sequence `first` to `last`."""

    kind: ClassVar[str] = "acked"
    priority: int
    first: int
    last: int
    messages: int


class MessageRejected(Struct, frozen=True):
    """A message became a dead letter."""

    kind: ClassVar[str] = "rejected"
    seq: int
    code: str
    reason: str | None


class MessagesExpired(Struct, frozen=True):
    """So many messages became too old. `unanswered`: they had been sent, so the server may have them."""

    kind: ClassVar[str] = "expired"
    messages: int
    unanswered: bool


class MessagesDropped(Struct, frozen=True):
    """So many messages went because a cap was reached, in this process or another.

    `which` is ``oldest`` (never sent), ``unanswered`` (sent; the server may have them), ``new`` (dropped on arrival),
    or ``dead`` (dead letters over their own cap).
    """

    kind: ClassVar[str] = "dropped"
    messages: int
    which: str


Event = (
    Connected
    | Disconnected
    | Failed
    | Reconnecting
    | HeartbeatTimeout
    | Latency
    | LogHeld
    | Exhausted
    | Vetoed
    | MessagePushed
    | MessagesSent
    | MessagesAcked
    | MessageRejected
    | MessagesExpired
    | MessagesDropped
)


class Events:
    """An iterator over the events from when it was made until the client is closed.

    Who does not read loses the oldest beyond a thousand, never memory; `lost` counts them. One that is thrown away,
    read or not, is forgotten.
    """

    def __init__(self, waiting: set[Events]) -> None:
        # Whoever waits for an event is kept alive by the log, for nothing else may hold its task: asyncio does not.
        self._waiting = waiting
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()
        self._closed = False
        self.lost = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            self._news.clear()
            self._waiting.add(self)
            try:
                await self._news.wait()
            finally:
                self._waiting.discard(self)
        return self._events.popleft()

    async def aclose(self) -> None:
        """Read no more."""
        self._events.clear()
        self._closed = True
        self._news.set()

    def put(self, event: Event) -> None:
        if self._closed:
            return
        if len(self._events) == _MOST_EVENTS:
            self._events.popleft()
            self.lost += 1
        self._events.append(event)
        self._news.set()

    def end(self) -> None:
        """Let the reader read what is there, and no more."""
        self._closed = True
        self._news.set()


class EventLog:
    """Hands every event to every reader."""

    def __init__(self) -> None:
        self._readers: weakref.WeakSet[Events] = weakref.WeakSet()
        self._waiting: set[Events] = set()
        self._closed = False

    @property
    def wanted(self) -> bool:
        """Whether anybody reads: what is told of every frame need not be made otherwise."""
        return bool(self._readers)

    def put(self, event: Event) -> None:
        for reader in self._readers:
            reader.put(event)

    def close(self) -> None:
        """End every reader once it has read what is there."""
        self._closed = True
        for reader in self._readers:
            reader.end()

    def read(self) -> Events:
        """Return an iterator over the events from now on."""
        reader = Events(self._waiting)
        if self._closed:
            reader.end()
        else:
            self._readers.add(reader)
        return reader
