"""The event log: every reader sees everything, and nobody's silence costs memory."""

from __future__ import annotations

import asyncio
import gc
from typing import get_args

from durablews.events import Event, EventLog, MessagesExpired


async def collect(log: EventLog, into: list[Event]) -> None:
    async for event in log.read():
        into.append(event)  # noqa: PERF401 - what was read before a cancellation counts


async def settled() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_every_reader_sees_every_event_in_order() -> None:
    """Readers do not take events from one another."""
    log = EventLog()
    first: list[Event] = []
    second: list[Event] = []
    readers = [asyncio.create_task(collect(log, first)), asyncio.create_task(collect(log, second))]
    await settled()
    events = [MessagesExpired(number, False) for number in range(50)]
    for number, event in enumerate(events):
        log.put(event)
        if number % 7 == 0:
            await settled()
    log.close()
    await asyncio.gather(*readers)
    assert first == second == events


async def test_a_reader_that_does_not_read_keeps_a_thousand_events() -> None:
    """The oldest go; memory does not grow (P6)."""
    log = EventLog()
    reader = log.read()
    waiting = asyncio.ensure_future(anext(reader))
    await settled()
    for number in range(5000):
        log.put(MessagesExpired(number, False))
    first = await waiting
    log.close()
    rest = [event async for event in reader]
    assert len([first, *rest]) == 1000
    assert rest[-1] == MessagesExpired(4999, False)


def test_without_readers_nothing_is_wanted() -> None:
    """Events that nobody asked for cost nothing."""
    log = EventLog()
    assert not log.wanted
    for number in range(5000):
        log.put(MessagesExpired(number, False))


async def test_close_ends_readers_after_what_is_there_and_later_ones_at_once() -> None:
    """What was put before the end is still read; a reader that comes later ends at once."""
    log = EventLog()
    seen: list[Event] = []
    reader = asyncio.create_task(collect(log, seen))
    await settled()
    log.put(MessagesExpired(1, False))
    log.close()
    await reader
    assert seen == [MessagesExpired(1, False)]
    late: list[Event] = []
    await collect(log, late)
    assert late == []


async def test_a_reader_that_leaves_is_forgotten() -> None:
    """One that was made and never read, one whose loop was left, one that was cancelled: all are gone, and closed."""
    log = EventLog()
    for _ in range(100):
        log.read()
    assert not log.wanted
    reader = log.read()
    waiting = asyncio.ensure_future(anext(reader))
    await settled()
    assert log.wanted
    log.put(MessagesExpired(1, False))
    log.put(MessagesExpired(2, False))
    await waiting
    await reader.aclose()
    log.put(MessagesExpired(3, False))
    assert [event async for event in reader] == []
    del reader, waiting
    cancelled = asyncio.create_task(collect(log, []))
    await settled()
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    del cancelled
    await settled()  # the loop itself still held the task
    gc.collect()
    assert not log.wanted


async def test_a_reader_that_waits_lives_although_nobody_holds_its_task() -> None:
    """asyncio holds tasks weakly: one that does nothing but listen must not vanish with its reader."""
    log = EventLog()
    seen: list[Event] = []
    asyncio.create_task(collect(log, seen))  # noqa: RUF006 - that is the point
    await settled()
    gc.collect()
    log.put(MessagesExpired(1, False))
    await settled()
    gc.collect()
    log.put(MessagesExpired(2, False))
    await settled()
    assert [event.messages for event in seen if isinstance(event, MessagesExpired)] == [1, 2]
    log.close()
    await settled()


async def test_a_reader_knows_what_it_lost() -> None:
    """The events that went unread are counted."""
    log = EventLog()
    reader = log.read()
    for number in range(1250):
        log.put(MessagesExpired(number, False))
    assert reader.lost == 250
    assert await anext(reader) == MessagesExpired(250, False)


def test_every_event_has_a_word_of_its_own() -> None:
    """`kind` is what logs and metrics call it."""
    kinds = [event.kind for event in get_args(Event)]
    assert len(set(kinds)) == len(kinds)
    words = "connected disconnected reconnecting message error heartbeat_timeout retries_exhausted sent acked rejected"
    assert set(f"{words} expired dropped latency log_held vetoed".split()) == set(kinds)
