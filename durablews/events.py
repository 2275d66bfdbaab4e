"""What happens to a client, for an application that wants to know."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from msgspec import Struct

__all__ = [
    "Connected",
    "Departed",
    "Disconnected",
    "Event",
    "EventLog",
    "Exhausted",
    "Failed",
    "Reconnecting",
    "Refused",
]

#: An iterator that nobody reads keeps so many events; the oldest goes.
_MOST_EVENTS = 1000


class Connected(Struct, frozen=True):
    """The server has welcomed this client."""

    url: str


class Disconnected(Struct, frozen=True):
    """A connection has ended. `code` is the close code, 1006 when there was none."""

    code: int
    reason: str


class Failed(Struct, frozen=True):
    """An attempt to connect failed; `reason` is a sentence."""

    reason: str


class Reconnecting(Struct, frozen=True):
    """The next try is number `attempt` in a row, in `delay` seconds."""

    attempt: int
    delay: float


class Exhausted(Struct, frozen=True):
    """The tries that `max_retries` allows have failed. Everything is kept."""

    attempts: int


class Refused(Struct, frozen=True):
    """A message became a dead letter."""

    seq: int
    code: str
    reason: str | None


class Departed(Struct, frozen=True):
    """So many messages left without an ack, by the policy named by `reason`: the counts of `Client.stats`."""

    reason: str
    messages: int


Event = Connected | Disconnected | Failed | Reconnecting | Exhausted | Refused | Departed


class EventLog:
    """Hands every event to every reader. Readers that do not read lose their oldest events, never memory."""

    def __init__(self) -> None:
        self._readers: list[tuple[deque[Event], asyncio.Event]] = []
        self._closed = False

    def put(self, event: Event) -> None:
        for events, news in self._readers:
            events.append(event)
            news.set()

    def close(self) -> None:
        """End every reader once it has read what is there."""
        self._closed = True
        for _, news in self._readers:
            news.set()

    def read(self) -> AsyncIterator[Event]:
        """Return an iterator over the events from now on, until the client is closed."""
        reader: tuple[deque[Event], asyncio.Event] = (deque(maxlen=_MOST_EVENTS), asyncio.Event())
        self._readers.append(reader)
        return self._iterate(reader)

    async def _iterate(self, reader: tuple[deque[Event], asyncio.Event]) -> AsyncIterator[Event]:
        events, news = reader
        try:
            while True:
                while events:
                    yield events.popleft()
                if self._closed:
                    return
                await news.wait()
                news.clear()
        finally:
            self._readers.remove(reader)
