"""A soak: one client through hundreds of broken connections, while it is given messages; then everything is counted.

``DURABLEWS_TEST_CYCLES`` says how many connections are broken, 500 unless it is set; ``DURABLEWS_TEST_SEED`` repeats a
schedule of faults.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chaos import DECK, ChaosProxy, Direction, Tunnel, chaos
from servers import FAST, Inbox, until

import durablews
from durablews.client import Client
from durablews.delivery.actions import Settle
from durablews.delivery.delivery import Delivery
from durablews.events import Connected, Disconnected, Event, Failed, HeartbeatTimeout
from durablews.link import Link
from durablews.receiver.session import Session

CYCLES = int(os.environ.get("DURABLEWS_TEST_CYCLES", "500"))
#: Messages a second: what is asked of the sender, and the least that proves anything.
PACE, LEAST = 320, 200
#: Cycles that show a soak's own checks at work: on leaks, and on what one broken connection in five or so brings about.
SHORT, LONGER = 20, 100
PRIORITIES = (1, 0, -1)
#: So many connections of which only the client knows that they are over stand at the server.
LINGERING = 3
# A heartbeat that finds a dead link in 0.4 s, and acks that are late after one.
QUICK = {
    "heartbeat": {"interval": 0.2, "timeout": 0.2, "max_missed": 1},
    "delivery": {"ack_timeout": 1.0, "drain_timeout": 0},
    "reconnect": FAST,
    "proxy": None,
}


# -- what there is: tasks, threads, descriptors


def census() -> Counter[str]:
    """Count what could leak, by what it is."""
    found = Counter(f"task {task.get_coro().__qualname__}" for task in asyncio.all_tasks())
    found.update(f"thread {thread.name.rstrip('-_0123456789')}" for thread in threading.enumerate())
    if os.path.isdir("/proc/self"):
        found["native threads"] = len(os.listdir("/proc/self/task"))
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # the one that listed them
                found["descriptor " + os.readlink(f"/proc/self/fd/{descriptor}").partition(":[")[0]] += 1
    return found


async def at_rest() -> Counter[str]:
    """Return what there is most of the time: a ping now and then is none of it."""
    gc.collect()
    seen: Counter[tuple[tuple[str, int], ...]] = Counter()
    for _ in range(40):
        seen[tuple(sorted(census().items()))] += 1
        await asyncio.sleep(0.005)
    return Counter(dict(seen.most_common(1)[0][0]))


async def leaks(where: str, before: Counter[str], patience: float) -> list[str]:
    """Wait until there is what there was before; return what there is more and less of."""
    gc.collect()
    with suppress(TimeoutError):
        await until(lambda: census() == before, patience)
        return []
    now = await at_rest()
    return [
        f"leaked: {now[what] - before[what]:+} {what}, {where}" for what in now | before if now[what] != before[what]
    ]


# -- what arrived


def losses(sent: dict[int, int], arrived: Sequence[tuple[int, int]]) -> list[str]:
    """Return what is wrong with what arrived: of each priority the numbers from 0 on were sent, in that order."""
    found = []
    for priority, count in sent.items():
        numbers = [number for level, number in arrived if level == priority]
        times = Counter(numbers)
        wrong = {
            "lost": sorted(set(range(count)) - set(numbers)),
            "twice": [number for number in times if times[number] > 1],
            "never sent": sorted(set(numbers) - set(range(count))),
            "out of order": [after for before, after in pairwise(dict.fromkeys(numbers)) if after < before],
        }
        for what, which in wrong.items():
            if which:
                found.append(f"{what}: {len(which)} of {count} with priority {priority}, such as {which[:5]}")
    return found


@dataclass
class Report:
    """What a soak found; nothing, when all is well."""

    seed: int
    findings: list[str] = field(default_factory=list)
    cycles: int = 0
    sent: dict[int, int] = field(default_factory=lambda: dict.fromkeys(PRIORITIES, 0))
    seconds: float = 0.0
    total_seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    #: Connections that ended before the fault that was meant for them.
    unprovoked: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    redelivered: int = 0

    @property
    def messages(self) -> int:
        return sum(self.sent.values())

    @property
    def rate(self) -> float:
        return self.messages / max(self.seconds, 0.001)

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.cycles} cycles in {self.seconds:.1f} s (all: {self.total_seconds:.1f} s), "
            f"{self.messages} messages, {self.rate:.0f} a second, {self.redelivered} sent again\n"
            f"faults: {dict(self.faults)}, ended before one: {self.unprovoked}\nends: {dict(self.ends)}\n"
            + "\n".join(self.findings)
        )


class Soak:
    """One run.

    Args:
        folder: for the files.
        seed: of the faults and the messages.
        cycles: how many connections are broken and come up again.
        patience: seconds in which everything has to arrive, and to be gone, at the end.
    """

    def __init__(self, folder: Path, seed: int, cycles: int, *, patience: float = 20.0) -> None:
        self.report = Report(seed)
        self._chance = random.Random(seed)
        self._faults = chaos(seed)
        self._inbox = Inbox(folder / "inbox.db")
        self._outbox = folder / "agent.db"
        self._cycles, self._patience = cycles, patience
        self._breaking = True

    async def run(self) -> Report:
        report, started = self.report, time.monotonic()
        await asyncio.to_thread(gc.collect)  # the loop's own thread, which it keeps
        nothing = await at_rest()
        async with self._inbox.serving() as receiver, ChaosProxy(lambda: self._inbox.port) as proxy:
            await receiver.store.run(lambda connection: connection.execute("DELETE FROM durablews_inbox"))
            servers = await at_rest()
            async with durablews.connect(f"ws://127.0.0.1:{proxy.port}/", self._outbox, **QUICK) as ws:
                await self._in_peace(ws)
                first = await at_rest()
                await self._in_chaos(ws, proxy)
                if not await ws.flush(self._patience):
                    report.findings.append("not everything was answered")
                report.findings += await leaks("the first and the last connection", first, self._patience)
                stats = await ws.stats()
                report.redelivered = stats.redelivered
                if stats.dead:
                    report.findings.append(f"{stats.dead} dead letters")
            report.findings += await leaks("before and after the client", servers, self._patience)
        report.findings += await leaks("before and after everything", nothing, self._patience)
        payloads = self._inbox.payloads()
        arrived = [(row[0], payload[0]) for row, payload in zip(self._inbox.rows(), payloads, strict=True)]
        report.findings += losses(report.sent, arrived)
        report.total_seconds = time.monotonic() - started
        return report

    async def _in_peace(self, ws: Client) -> None:
        """Let the first connection come up, do everything once, and fall idle."""
        for priority in PRIORITIES:
            await self._send_some(ws, priority, 10)
        assert await ws.flush(20)
        await ws.stats()

    async def _in_chaos(self, ws: Client, proxy: ChaosProxy) -> None:
        started, sender = time.monotonic(), asyncio.create_task(self._send(ws))
        try:
            await self._break(ws, proxy)
        finally:
            self._breaking = False
            await sender
            self.report.seconds = time.monotonic() - started

    async def _send(self, ws: Client) -> None:
        chance, count, started = random.Random(self.report.seed), 0, time.monotonic()
        while self._breaking:
            size = chance.randint(5, 30)
            await self._send_some(ws, chance.choice(PRIORITIES), size)
            count += size
            await asyncio.sleep(max(0.0, started + count / PACE - time.monotonic()))

    async def _send_some(self, ws: Client, priority: int, count: int) -> None:
        first = self.report.sent[priority]
        payloads = [[first + i, "x" * int(self._chance.expovariate(1 / 300))] for i in range(count)]
        await ws.send_many(payloads, priority=priority)
        self.report.sent[priority] += count

    async def _break(self, ws: Client, proxy: ChaosProxy) -> None:
        """Break one connection after the other, each once the server has welcomed it."""
        events, broken = ws.events(), deque[Tunnel]()
        while self.report.cycles < self._cycles:
            tunnel, fault = proxy.newest, next(self._faults)
            striking = asyncio.create_task(fault.strike(proxy, tunnel))
            try:
                end = await self._next(events, Disconnected | HeartbeatTimeout)
                if isinstance(end, HeartbeatTimeout):
                    if self._chance.random() < 0.9:
                        tunnel.cut()  # it has noticed; the closing handshake that follows would take 2 s
                    end = await self._next(events, Disconnected)
                if not tunnel.over.is_set():
                    tunnel.cut("reset", Direction.DOWN)  # the client is gone and the server does not know
                struck = await striking
            finally:
                striking.cancel()
            await self._next(events, Connected)
            self.report.faults[fault.kind] += 1
            self.report.cycles += struck
            self.report.unprovoked += not struck
            broken.append(tunnel)
            if len(broken) > LINGERING:
                broken.popleft().cut()
        for tunnel in broken:
            tunnel.cut()

    async def _next(self, events: AsyncIterator[Event], kinds: Any) -> Any:
        async with asyncio.timeout(20):
            async for event in events:
                if isinstance(event, Disconnected):
                    self.report.ends[f"{event.code} {event.reason}"] += 1
                elif isinstance(event, Failed):
                    self.report.ends[f"not connected: {event.error}"] += 1
                if isinstance(event, kinds):
                    return event
        raise AssertionError("the client has stopped")


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("DURABLEWS_TEST_SEED") or random.randrange(2**32))


async def soaked(folder: Path, seed: int, cycles: int, **options: Any) -> Report:
    """Run a soak and show what it found, also when it breaks down."""
    soak, loop = Soak(folder, seed, cycles, **options), asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: soak.report.findings.append(f"the loop: {context}"))
    try:
        return await soak.run()
    finally:
        loop.set_exception_handler(None)
        print(soak.report)  # noqa: T201 - pytest shows it on failure, and with -s


async def test_nothing_is_lost_doubled_or_leaked_in_hundreds_of_broken_connections(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """P5, P6, P8: cuts, silence, stalls and crawls while messages come: each arrives once, in order; nothing stays."""
    report = await soaked(tmp_path, seed, CYCLES)
    assert report.findings == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert report.cycles >= CYCLES
    assert report.unprovoked <= CYCLES / 20, "the harness: too many connections ended before their fault"
    assert report.rate >= LEAST, "the harness: the machine is too slow to prove anything"
    assert CYCLES < 100 or set(report.faults) == set(DECK)


# -- what would be found


@pytest.mark.parametrize(
    ("arrived", "found"),
    [
        ([(0, 0), (0, 1), (0, 2)], None),
        ([(0, 0), (0, 2)], "lost: 1 of 3 with priority 0, such as [1]"),
        ([], "lost: 3 of 3 with priority 0, such as [0, 1, 2]"),
        ([(0, 0), (0, 1), (0, 1), (0, 2)], "twice: 1 of 3 with priority 0, such as [1]"),
        ([(0, 0), (0, 1), (0, 2), (0, 0)], "twice: 1 of 3 with priority 0, such as [0]"),
        ([(0, 1), (0, 0), (0, 2)], "out of order: 1 of 3 with priority 0, such as [0]"),
        ([(0, 0), (0, 1), (0, 2), (0, 3)], "never sent: 1 of 3 with priority 0, such as [3]"),
    ],
)
def test_the_count_sees_what_is_wrong(arrived: list[tuple[int, int]], found: str | None) -> None:
    """A message that is missing, there twice, late or nobody's is found."""
    assert losses({0: 3}, arrived) == ([] if found is None else [found])


async def test_a_soak_finds_a_client_that_takes_sending_for_delivery(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that settles what it has handed to a socket loses messages, and the soak says so."""
    genuine = Delivery.frame_to_send

    def careless(self: Delivery, now: float) -> bytes | None:
        frame = genuine(self, now)
        if self.sent is not None:
            self._actions.append(Settle(self.sent))
        return frame

    monkeypatch.setattr(Delivery, "frame_to_send", careless)
    report = await soaked(tmp_path, seed, LONGER, patience=2.0)
    assert any(finding.startswith("lost") for finding in report.findings)


async def test_a_soak_finds_a_server_that_applies_repeats(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not know what it has applied applies some of it twice, and the soak says so."""
    monkeypatch.setattr(Session, "judge", lambda self, frame, number: frame.items)
    report = await soaked(tmp_path, seed, LONGER, patience=2.0)
    assert any(finding.startswith("twice") for finding in report.findings)
    assert not any(finding.startswith("lost") for finding in report.findings)


async def test_a_soak_finds_leaks(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One task, thread and descriptor more for each connection, and the soak says what they are and how many."""
    genuine, over = Link.run, threading.Event()
    tasks: list[asyncio.Task[None]] = []
    descriptors: list[int] = []

    async def leaky(self: Link, *args: Any) -> Any:
        tasks.append(asyncio.create_task(asyncio.sleep(3600)))
        threading.Thread(target=over.wait, name="forgotten").start()
        descriptors.append(os.open(os.devnull, os.O_RDONLY))
        return await genuine(self, *args)

    monkeypatch.setattr(Link, "run", leaky)
    try:
        report = await soaked(tmp_path, seed, SHORT, patience=0.3)
    finally:
        over.set()
        for descriptor in descriptors:
            os.close(descriptor)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    count = len(tasks)
    for leaked, where in (
        (count - 1, "the first and the last connection"),
        (count, "before and after the client"),
        (count, "before and after everything"),
    ):
        expected = {f"leaked: +{leaked} {what}, {where}" for what in ("task sleep", "thread forgotten")}
        if "native threads" in census():
            expected |= {
                f"leaked: +{leaked} descriptor {os.devnull}, {where}",
                f"leaked: +{leaked} native threads, {where}",
            }
        assert expected <= set(report.findings)
