"""The event log: every reader sees everything, and nobody's silence costs memory."""

from __future__ import annotations

import asyncio

from durablews.events import Departed, Event, EventLog


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
    events = [Departed("expired", number) for number in range(50)]
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
        log.put(Departed("expired", number))
    first = await waiting
    log.close()
    rest = [event async for event in reader]
    assert len([first, *rest]) == 1000
    assert rest[-1] == Departed("expired", 4999)


def test_without_readers_nothing_is_kept() -> None:
    """Events that nobody asked for cost nothing."""
    log = EventLog()
    for number in range(5000):
        log.put(Departed("expired", number))
    assert log._readers == []


async def test_close_ends_readers_after_what_is_there_and_later_ones_at_once() -> None:
    """What was put before the end is still read; a reader that comes later ends at once."""
    log = EventLog()
    seen: list[Event] = []
    reader = asyncio.create_task(collect(log, seen))
    await settled()
    log.put(Departed("expired", 1))
    log.close()
    await reader
    assert seen == [Departed("expired", 1)]
    late: list[Event] = []
    await collect(log, late)
    assert late == []


async def test_a_reader_that_leaves_is_forgotten() -> None:
    """Breaking out of the loop, or being cancelled, frees what was kept."""
    log = EventLog()
    reader = log.read()
    task = asyncio.ensure_future(anext(reader))
    await settled()
    assert len(log._readers) == 1
    log.put(Departed("expired", 1))
    await task
    await reader.aclose()  # type: ignore[attr-defined]
    assert log._readers == []
    cancelled = asyncio.create_task(collect(log, []))
    await settled()
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    assert log._readers == []
