"""`send` and `flush` cancelled at random moments, a thousand times, while a server answers and other senders send.

``DURABLEWS_TEST_CANCELS`` says how many, 1000 unless it is set; ``DURABLEWS_TEST_SEED`` repeats a schedule.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from servers import FAST, PlainServer
from support import integrity

import durablews
from durablews import entries
from durablews.client import Client
from durablews.jobs import run_job
from durablews.messages import draft
from durablews.outbox import Outbox, Receipt
from durablews.storage import Storage

CANCELS = int(os.environ.get("DURABLEWS_TEST_CANCELS", "1000"))
CALLERS = 8
#: Seconds in which a call that is not wedged returns, however busy the machine is.
PATIENCE = 60.0


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("DURABLEWS_TEST_SEED") or random.randrange(2**32))


@dataclass
class Report:
    seed: int
    cancelled: Counter[str] = field(default_factory=Counter)
    #: [caller, number] of what `send` confirmed, and of what it was cancelled in.
    confirmed: set[tuple[int, int]] = field(default_factory=set)
    unknown: set[tuple[int, int]] = field(default_factory=set)
    findings: list[str] = field(default_factory=list)


class Cancels:
    """One run: callers that are cancelled at random turns of the loop, or random times."""

    def __init__(self, ws: Client, report: Report) -> None:
        self._ws, self._report = ws, report
        self._chance = random.Random(report.seed)

    async def run(self, cancels: int) -> None:
        await asyncio.gather(*(self._call(caller, cancels // CALLERS) for caller in range(CALLERS)))

    async def _call(self, caller: int, cancels: int) -> None:
        number = cancelled = 0
        while cancelled < cancels:
            if self._chance.random() < 0.25:
                cancelled += await self._cancel("flush", self._ws.flush(PATIENCE))
                continue
            message = (caller, number)
            number += 1
            # The caller's own id: what it cannot know it may send again, and it is stored once.
            retried = self._chance.random() < 0.5
            name = f"{caller}/{number}" if retried else None
            if not await self._cancel("send", self._send(message, name)):
                continue
            cancelled += 1
            if retried:
                await asyncio.wait_for(self._send(message, name), PATIENCE)
            elif message not in self._report.confirmed:
                self._report.unknown.add(message)

    async def _send(self, message: tuple[int, int], name: str | None) -> None:
        await self._ws.send(message, id=name)
        self._report.confirmed.add(message)

    async def _cancel(self, what: str, call: Any) -> bool:
        """Start a call and cancel it some time later; return whether it was still under way."""
        task = asyncio.create_task(call)
        if self._chance.random() < 0.5:
            for _ in range(self._chance.randrange(6)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(self._chance.expovariate(1 / 0.003))
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=PATIENCE)
        if not done:
            raise TimeoutError(f"{what} does not end when it is cancelled")
        if not task.cancelled():
            task.result()
            return False
        self._report.cancelled[what] += 1
        return True


async def cancels(folder: Path, seed: int, count: int, *, patience: float = PATIENCE) -> Report:
    """Cancel so often; then judge what the server has applied, and whether the client still works."""
    report, path = Report(seed), folder / "agent.db"
    settings: dict[str, Any] = {"reconnect": FAST, "proxy": None, "delivery": {"drain_timeout": 0}}
    async with (
        PlainServer() as server,
        durablews.connect(server.url, path, dialect="durablews.v1.json", **settings) as ws,
    ):
        try:
            async with asyncio.timeout(patience):
                await Cancels(ws, report).run(count)
        except Exception as exc:
            report.findings.append(f"a call failed: {type(exc).__name__}: {exc}")
        try:
            async with asyncio.timeout(patience):
                if await ws._outbox.storage.read(lambda connection: connection.in_transaction):
                    report.findings.append("a transaction is open")
                await ws.send((CALLERS, 0))
                report.confirmed.add((CALLERS, 0))
                if not await ws.flush(patience):
                    report.findings.append("not everything was acknowledged")
                stats = await ws.stats()
        except Exception as exc:
            report.findings.append(f"wedged: {type(exc).__name__}: {exc}")
        else:
            if (stats.pending, stats.acked, stats.trouble) != (0, len(server.applied), None):
                report.findings.append(f"counts: {stats}")
        arrived = Counter((caller, number) for caller, number in server.payloads)
    for what, which in (
        ("lost", report.confirmed - arrived.keys()),
        ("twice", {message for message, times in arrived.items() if times > 1}),
        ("never sent", arrived.keys() - report.confirmed - report.unknown),
    ):
        if which:
            report.findings.append(f"{what}: {len(which)}, such as {sorted(which)[:3]}")
    for caller in range(CALLERS):
        numbers = [number for name, number in arrived if name == caller]
        report.findings += [f"out of order: {pair}" for pair in pairwise(numbers) if pair[0] > pair[1]]
    if integrity(path) != "ok":
        report.findings.append("the file is damaged")
    stored = len(report.unknown & arrived.keys())
    print(  # noqa: T201 - pytest shows it on failure, and with -rP
        f"seed {seed}: cancelled {dict(report.cancelled)}, confirmed {len(report.confirmed)}, of"
        f" {len(report.unknown)} cancelled and not sent again {stored} were stored\n" + "\n".join(report.findings)
    )
    return report


async def test_a_thousand_cancelled_calls_wedge_nothing_and_lose_nothing(tmp_path: Path, seed: int) -> None:
    """P1, P2, P7: no open transaction, no wedge; what was confirmed arrives, what was sent again with its id once."""
    report = await cancels(tmp_path, seed, CANCELS)
    assert report.findings == []
    assert report.cancelled.total() >= CANCELS
    assert report.cancelled["send"] >= CANCELS / 5
    assert report.cancelled["flush"] >= CANCELS / 20
    assert report.unknown, "the harness: no call was cancelled halfway"


async def test_a_build_with_a_transaction_in_steps_is_found(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BEGIN, INSERT and COMMIT as three awaits of the caller wedge the connection, and the cancels say so."""
    lock, perform = asyncio.Lock(), Storage._perform

    async def alone(self: Storage, work: Any) -> Any:
        async with lock:
            return await perform(self, work)

    async def send(self: Outbox, payload: Any, **options: Any) -> Receipt:
        db, one = self.storage._db, draft(payload, id=options["id"])
        assert db is not None
        async with lock:
            await db.execute("BEGIN IMMEDIATE")
            (result,) = await run_job(db, lambda c: entries.enqueue(c, self.path, [[one]], clock=self.clock))
            await db.execute("COMMIT")
        self.storage.on_stored()
        assert isinstance(result, list)
        (seq,) = result
        return Receipt(self, seq if isinstance(seq, int) else None)

    monkeypatch.setattr(Storage, "_perform", alone)
    monkeypatch.setattr(Outbox, "send", send)
    for name in ("whole", "cancelled"):
        (tmp_path / name).mkdir()
    assert (await cancels(tmp_path / "whole", seed, 0)).findings == []  # it works while nobody is cancelled
    report = await cancels(tmp_path / "cancelled", seed, 1000, patience=5.0)
    assert any("a transaction is open" in found or "within a transaction" in found for found in report.findings)


async def test_a_build_that_answers_before_it_stores_is_found(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `send` that is done as soon as it is asked, and drops what nobody waits for, loses what it confirmed."""
    genuine = Storage._take

    def forgetful(self: Storage) -> Any:
        work = genuine(self)
        work.requests = [request for request in work.requests if not request[1].cancelled()]
        return work

    async def send(self: Outbox, payload: Any, **options: Any) -> Receipt:
        try:
            (seq,) = await self.storage.enqueue((draft(payload, id=options["id"]),))
        except asyncio.CancelledError:
            return Receipt(self, None)
        return Receipt(self, seq if isinstance(seq, int) else None)

    monkeypatch.setattr(Storage, "_take", forgetful)
    monkeypatch.setattr(Outbox, "send", send)
    # Here a cancelled send ends as if it were confirmed, so that it is not counted as cancelled: a few flushes are.
    report = await cancels(tmp_path, seed, 80)
    assert any(found.startswith("lost") for found in report.findings)
