"""What `tools/bench` measures: on one side durablews at work, on the other what the machine does without it.

Every function does its work once, in files of its own, and returns one figure: messages a second, milliseconds or
megabytes.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from bench_servers import serving, stamped
from bench_ticker import lateness

import durablews
from durablews.schema import migrations, split_statements

__all__ = [
    "PAYLOAD",
    "Failed",
    "Work",
    "append_and_sync",
    "busy_ticker",
    "drain",
    "drain_deep",
    "drain_file",
    "drain_shallow",
    "drain_single",
    "drain_to_serve",
    "fill_both",
    "fill_one",
    "idle_ticker",
    "imports_peak",
    "insert_directly",
    "inspect_time",
    "online",
    "python_time",
    "resident_peak",
    "send_awaited",
    "send_concurrently",
    "send_many",
    "send_raw",
    "store_concurrently",
    "sync_and_one_way",
]

PAYLOAD = b"x" * 256
_CALLERS = 1000
# One message each so many seconds where latency is measured: a link that is used and not full.
_PACE = 0.005
_DRAINER = str(Path(__file__).with_name("bench_drainer.py"))
_LIMIT = 120.0


class Failed(Exception):
    """What was to be measured did not happen."""


class Work(NamedTuple):
    """What one measurement is about.

    Attributes:
        folder: empty, and gone after it.
        kept: the row's own for the whole run: what its preparation has made lies there.
        messages: how many to send.
        rows: how many wait in a prepared outbox.
        rounds: how often the row is measured in this run.
        say: shows how far it is.
    """

    folder: Path
    kept: Path
    messages: int
    rows: int
    rounds: int
    say: Callable[[str], None]


# -- what durablews does: sends


async def store_concurrently(path: Path, messages: int) -> float:
    """Send by 1000 callers at once; return messages a second."""
    callers = min(_CALLERS, messages)
    async with durablews.Outbox(path) as outbox:

        async def caller(count: int) -> None:
            for _ in range(count):
                await outbox.send(PAYLOAD)

        shares = [messages // callers + (number < messages % callers) for number in range(callers)]
        started = time.perf_counter()
        await asyncio.gather(*map(caller, shares))
        return messages / (time.perf_counter() - started)


def send_concurrently(work: Work) -> float:
    """Messages a second through `Outbox.send` by 1000 callers at once."""
    return asyncio.run(store_concurrently(work.folder / "sends.db", work.messages))


async def _store_many(path: Path, messages: int, **settings: object) -> float:
    async with durablews.Outbox(path, **settings) as outbox:  # type: ignore[arg-type]
        started = time.perf_counter()
        for done in range(0, messages, 1000):
            await outbox.send_many([PAYLOAD] * min(1000, messages - done))
        return messages / (time.perf_counter() - started)


def send_many(work: Work) -> float:
    """Messages a second through `Outbox.send_many`, a thousand at a time."""
    return asyncio.run(_store_many(work.folder / "many.db", work.messages))


def send_awaited(work: Work) -> float:
    """Messages a second through `Outbox.send`, each awaited before the next."""

    async def run() -> float:
        async with durablews.Outbox(work.folder / "awaited.db") as outbox:
            started = time.perf_counter()
            for _ in range(work.messages):
                await outbox.send(PAYLOAD)
            return work.messages / (time.perf_counter() - started)

    return asyncio.run(run())


# -- what durablews does: deliveries


async def drain_file(url: str, path: Path, messages: int) -> float:
    """Drain an outbox that holds `messages`; return messages a second from the opening to the last ack."""
    async with durablews.connect(url, path) as client:
        started = time.perf_counter()
        if not await client.flush(_LIMIT):
            raise Failed(f"the outbox did not empty in {_LIMIT:.0f} s")
        return messages / (time.perf_counter() - started)


def drain(work: Work) -> float:
    """Messages a second from an outbox to a receiver that stores nothing, until the last is acknowledged."""
    path = work.folder / "drain.db"
    asyncio.run(_store_many(path, work.messages))
    with serving("receiver") as server:
        return asyncio.run(drain_file(server.url, path, work.messages))


def drain_to_serve(work: Work) -> float:
    """Messages a second from an outbox to `durablews serve`, which stores them, until the last is acknowledged."""
    path, store = work.folder / "drain.db", work.folder / "inbox.db"
    asyncio.run(_store_many(path, work.messages))
    with serving(
        command=[sys.executable, "-m", "durablews", "serve", "--port", "0", "--store", str(store)],
    ) as server:
        return asyncio.run(drain_file(server.url, path, work.messages))


def drain_single(work: Work) -> float:
    """Messages a second as `drain`, with one message a frame, which the server's count of frames has to confirm.

    No dialect forbids batches yet, and a `Wire` returns one frame for all that it is given: so the library's own size
    of a batch is set to 1 in this process while it drains.
    """
    path = work.folder / "single.db"
    messages = max(64, work.messages // 64 * 64)  # every 64th frame is acknowledged, and so must be the last
    asyncio.run(_store_many(path, messages))
    with serving("plain", "--every", "64") as server:
        # Created, so that where the name is gone the count below says so.
        with mock.patch("durablews.delivery.delivery.BATCH_MESSAGES", 1, create=True):
            rate = asyncio.run(drain_file(server.url, path, messages))
        frames = server.report()["frames"]
    if frames != messages:
        raise Failed(f"{messages} messages came in {frames} frames: a batch of 1 is no longer set this way")
    return rate


def online(work: Work) -> float:
    """Milliseconds (p50) from the call of `send` to the arrival at the server, one message each 5 ms."""

    async def run(url: str) -> None:
        async with durablews.connect(url, work.folder / "online.db") as client:
            await (await client.send(b"warm")).acked(_LIMIT)
            for _ in range(work.messages):
                await asyncio.sleep(_PACE)
                await client.send(stamped(len(PAYLOAD)))
            await client.flush(_LIMIT)

    with serving("plain", "--every", "1", "--clock") as server:
        asyncio.run(run(server.url))
        return float(server.report()["p50"]) * 1000


# -- what durablews does: backlogs


def _fill(path: Path, rows: int, say: Callable[[str], None]) -> None:
    """Make an outbox in which `rows` messages wait."""
    caps = {"max_messages": max(rows, 1_000_000), "max_bytes": rows * 1024 + 2**30}
    step = 50_000
    for done in range(0, rows, step):
        say(f"filling {done:,} of {rows:,}")
        # Not synced: only what is made of it is measured.
        asyncio.run(_store_many(path, min(step, rows - done), durability="process", caps=caps))


def fill_one(work: Work) -> None:
    """Make an outbox in which `rows` messages wait."""
    _fill(work.kept / "backlog.db", work.rows, work.say)


def _shallow(work: Work) -> int:
    return min(1_000_000, work.rows // 10)


def fill_both(work: Work) -> None:
    """Make an outbox of `rows` and one of a million, or of a tenth when that is less."""
    _fill(work.kept / "backlog.db", work.rows, work.say)
    _fill(work.kept / "shallow.db", _shallow(work), work.say)


def _drain_some(path: Path, messages: int) -> dict[str, float]:
    with serving("receiver") as server:
        return _figures([sys.executable, _DRAINER, server.url, str(path), str(messages)])


def _figures(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise Failed(said[-1] if said else f"{command[1]} ended with {done.returncode}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def drain_deep(work: Work) -> float:
    """Messages a second of `messages` from the front of the deep backlog, from the opening of the file on."""
    return _drain_some(work.kept / "backlog.db", min(work.messages, _shallow(work) // work.rounds))["per_second"]


def drain_shallow(work: Work) -> float:
    """Messages a second of as many from the front of the shallow one."""
    return _drain_some(work.kept / "shallow.db", min(work.messages, _shallow(work) // work.rounds))["per_second"]


def resident_peak(work: Work) -> float:
    """Megabytes that a process has resident at most (VmHWM) while it drains its round's share of the backlog."""
    return _drain_some(work.kept / "backlog.db", work.rows // work.rounds)["peak"]


def inspect_time(work: Work) -> float:
    """Milliseconds of a whole process of `durablews inspect` beside the backlog; median of five."""
    # The command as it is installed; `-m durablews` where it is not.
    script = Path(sys.executable).with_name("durablews")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "durablews"]
    return _process_time([*command, "inspect", str(work.kept / "backlog.db")])


def _process_time(command: list[str]) -> float:
    times: list[float] = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


# -- what the machine does


def insert_directly(work: Work) -> float:
    """Rows a second through sqlite3 executemany: same columns and indexes, 1000 rows a transaction, FULL."""
    connection = sqlite3.connect(work.folder / "direct.db", isolation_level=None)
    for statement in split_statements(migrations()[0][1]):
        if (
            statement.lstrip().startswith(("CREATE TABLE durablews_entries", "CREATE INDEX"))
            or "-- seq is" in statement
        ):
            if "durablews_departed" in statement or "durablews_ids" in statement:
                continue
            connection.execute(statement)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    row = (0, 0, 1, 1, None, None, None, len(PAYLOAD), 0, PAYLOAD)
    insert = (
        "INSERT INTO durablews_entries (priority, ack_state, created_at, born, ttl, topic, headers, bytes, checksum,"
        " payload) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    )
    started = time.perf_counter()
    for done in range(0, work.messages, 1000):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(insert, [row] * min(1000, work.messages - done))
        connection.execute("COMMIT")
    rate = work.messages / (time.perf_counter() - started)
    connection.close()
    return rate


def append_and_sync(work: Work) -> float:
    """Times a second that 8 KiB can be appended to a file and synced."""
    return 1 / statistics.mean(_sync_times(work, pause=0))


def _sync_times(work: Work, *, pause: float) -> list[float]:
    block, times = bytes(8192), []
    descriptor = os.open(work.folder / "appended", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for number in range(work.messages):
            if pause:
                time.sleep(pause)
            started = time.perf_counter()
            os.pwrite(descriptor, block, number * len(block))
            os.fdatasync(descriptor)
            times.append(time.perf_counter() - started)
    finally:
        os.close(descriptor)
    return times


def send_raw(work: Work) -> float:
    """Messages a second through `websockets` alone: one frame each, one ack for 64, nothing stored."""

    async def run(url: str) -> float:
        from websockets.asyncio.client import connect

        async with connect(url, compression=None, max_size=None) as websocket:

            async def read() -> None:
                acked = 0
                while acked < work.messages // 64 * 64:
                    acked = int(await websocket.recv())

            reader = asyncio.create_task(read())
            started = time.perf_counter()
            for _ in range(work.messages):
                await websocket.send(PAYLOAD)
            await reader
            return work.messages / (time.perf_counter() - started)

    with serving("raw", "--every", "64") as server:
        return asyncio.run(run(server.url))


def sync_and_one_way(work: Work) -> float:
    """Milliseconds: p50 of 8 KiB appended and synced, and p50 of one way through `websockets`, one each 5 ms."""

    async def run(url: str) -> None:
        from websockets.asyncio.client import connect

        async with connect(url, compression=None, max_size=None) as websocket:
            await websocket.send(b"warm")
            await websocket.recv()
            for _ in range(work.messages):
                await asyncio.sleep(_PACE)
                await websocket.send(stamped(len(PAYLOAD)))
                await websocket.recv()

    synced = statistics.median(_sync_times(work, pause=_PACE))
    with serving("raw", "--every", "1", "--clock") as server:
        asyncio.run(run(server.url))
        return (synced + float(server.report()["p50"])) * 1000


def imports_peak(work: Work) -> float:
    """Megabytes of a process that imports asyncio, sqlite3, websockets' client, aiosqlite and msgspec, and ends."""
    return _figures([sys.executable, _DRAINER, "imports"])["peak"]


def python_time(work: Work) -> float:
    """Milliseconds of a whole process of `python -c pass`; median of five."""
    return _process_time([sys.executable, "-c", "pass"])


def busy_ticker(work: Work) -> float:
    """Milliseconds by which one tick in a thousand is late beside 1000 sends a second, each sync 20 ms late."""
    return lateness(work.folder, busy=True, seconds=max(0.2, work.messages / 1000))


def idle_ticker(work: Work) -> float:
    """The same beside an outbox that does nothing."""
    return lateness(work.folder, busy=False, seconds=max(0.2, work.messages / 1000))
