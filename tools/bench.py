"""Measures durablews against baselines on the same machine, in the same run, interleaved: only ratios mean anything.

Each row runs its baseline and durablews in turn, several rounds, and prints medians with the smallest and largest. The
files lie in a folder on the disk of `--folder` (default: the system's temporary folder), synced for real.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import durablews
from durablews.schema import split_statements

if TYPE_CHECKING:
    from websockets.asyncio.server import Server

PAYLOAD = b"x" * 256
CALLERS = 1000


class Row(NamedTuple):
    """One line of the table."""

    name: str
    what: str
    against: str
    goal: float
    measure: Callable[[Path, int], float]
    baseline: Callable[[Path, int], float]
    messages: int


# -- what durablews does


def send_concurrently(folder: Path, messages: int) -> float:
    """Messages a second through `Outbox.send` by 1000 callers at once."""

    async def run() -> float:
        async with durablews.Outbox(folder / "sends.db") as outbox:

            async def caller(count: int) -> None:
                for _ in range(count):
                    await outbox.send(PAYLOAD)

            started = time.perf_counter()
            await asyncio.gather(*(caller(messages // CALLERS) for _ in range(CALLERS)))
            return messages / (time.perf_counter() - started)

    return asyncio.run(run())


def send_many(folder: Path, messages: int) -> float:
    """Messages a second through `Outbox.send_many`, a thousand at a time."""

    async def run() -> float:
        async with durablews.Outbox(folder / "many.db") as outbox:
            started = time.perf_counter()
            for _ in range(messages // 1000):
                await outbox.send_many([PAYLOAD] * 1000)
            return messages / (time.perf_counter() - started)

    return asyncio.run(run())


def drain(folder: Path, messages: int) -> float:
    """Messages a second from an outbox to a receiver that stores nothing, until the last is acknowledged."""
    return _drain(folder, messages, [sys.executable, __file__, "--receiver"])


def drain_to_serve(folder: Path, messages: int) -> float:
    """Messages a second from an outbox to `durablews serve`, which stores them, until the last is acknowledged."""
    command = [sys.executable, "-m", "durablews", "serve", "--port", "0", "--store", str(folder / "inbox.db")]
    return _drain(folder, messages, command)


def _drain(folder: Path, messages: int, command: list[str]) -> float:
    path = folder / "drain.db"

    async def fill() -> None:
        async with durablews.Outbox(path) as outbox:
            for _ in range(messages // 1000):
                await outbox.send_many([PAYLOAD] * 1000)

    async def run(url: str) -> float:
        async with durablews.connect(url, path) as client:
            started = time.perf_counter()
            if not await client.flush(120):
                raise SystemExit("bench: the outbox did not empty in 120 s")
            return messages / (time.perf_counter() - started)

    asyncio.run(fill())
    with _server(command) as url:
        return asyncio.run(run(url))


# -- what the machine does


def insert_directly(folder: Path, messages: int) -> float:
    """Rows a second through sqlite3 executemany: same columns and indexes, 1000 rows a transaction, FULL."""
    connection = sqlite3.connect(folder / "direct.db", isolation_level=None)
    for statement in split_statements(_migration()):
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
    for _ in range(messages // 1000):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(insert, [row] * 1000)
        connection.execute("COMMIT")
    rate = messages / (time.perf_counter() - started)
    connection.close()
    return rate


def send_raw(folder: Path, messages: int) -> float:
    """Messages a second through `websockets` alone: one frame each, one ack for 64, nothing stored."""

    async def run(url: str) -> float:
        from websockets.asyncio.client import connect

        async with connect(url, compression=None, max_size=None) as websocket:

            async def read() -> None:
                acked = 0
                while acked < messages // 64 * 64:
                    acked = int(await websocket.recv())

            reader = asyncio.create_task(read())
            started = time.perf_counter()
            for _ in range(messages):
                await websocket.send(PAYLOAD)
            await reader
            return messages / (time.perf_counter() - started)

    with _server([sys.executable, __file__, "--raw-server"]) as url:
        return asyncio.run(run(url))


async def receiver() -> None:
    """Take what a client sends, once each and in order, by the library's own rules with its numbers in memory."""
    from websockets.asyncio.server import ServerConnection, serve

    from durablews.receiver import ledger, select_subprotocol
    from durablews.receiver.exchange import Exchange
    from durablews.receiver.session import Session
    from durablews.wire.frames import Codec

    numbers = sqlite3.connect(":memory:", isolation_level=None)
    ledger.install(numbers)
    counted = [0]

    def count(connection: sqlite3.Connection, stream: str, priority: int, items: Sequence[object]) -> None:
        counted[0] += len(items)

    async def handle(websocket: ServerConnection) -> None:
        exchange = Exchange(Session(Codec(websocket.subprotocol or ""), window=1024, max_bytes=2**20))
        async for data in websocket:
            for frame in exchange.handle_frame(numbers, data, count).frames:
                await websocket.send(frame)

    async with serve(
        handle, "127.0.0.1", 0, compression=None, max_size=None, select_subprotocol=select_subprotocol
    ) as server:
        await _until_stdin_ends(server)


async def _until_stdin_ends(server: Server) -> None:
    print(f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def raw_server() -> None:
    """Receive frames and acknowledge every 64th."""
    from websockets.asyncio.server import ServerConnection, serve

    async def handle(websocket: ServerConnection) -> None:
        count = 0
        async for _ in websocket:
            count += 1
            if count % 64 == 0:
                await websocket.send(str(count))

    async with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        await _until_stdin_ends(server)


ROWS = [
    Row(
        "sends",
        "durable sends, 1000 concurrent callers",
        "sqlite3 executemany, 1000 rows a transaction",
        0.60,
        send_concurrently,
        insert_directly,
        50_000,
    ),
    Row(
        "send-many",
        "send_many(1000)",
        "sqlite3 executemany, 1000 rows a transaction",
        0.80,
        send_many,
        insert_directly,
        100_000,
    ),
    Row(
        "drain",
        "drain 100 000 to a receiver in another process, which stores nothing",
        "raw ws.send, a frame each, an ack for 64",
        4.0,
        drain,
        send_raw,
        100_000,
    ),
    Row(
        "drain-serve",
        "drain 100 000 to `durablews serve`, which stores them on the same disk",
        "raw ws.send, a frame each, an ack for 64, nothing stored",
        0.0,
        drain_to_serve,
        send_raw,
        100_000,
    ),
]


# -- the run


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=[row.name for row in ROWS], help="measure this row only")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of baseline and durablews in turn (default: 3)")
    parser.add_argument("--folder", help="where the files lie; its disk is what is measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--raw-server", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--receiver", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.raw_server:
        asyncio.run(raw_server())
        return 0
    if args.receiver:
        asyncio.run(receiver())
        return 0
    rows = [row for row in ROWS if args.only is None or row.name in args.only]
    results = {row.name: ([], []) for row in rows}  # type: dict[str, tuple[list[float], list[float]]]
    steps = args.rounds * len(rows) * 2
    done = 0
    for _ in range(args.rounds):
        for row in rows:
            for position, measure in enumerate((row.baseline, row.measure)):
                _progress(done, steps, row.name)
                with tempfile.TemporaryDirectory(dir=args.folder, prefix="durablews-bench-") as folder:
                    results[row.name][position].append(measure(Path(folder), row.messages))
                done += 1
    _progress(done, steps, "")
    if args.json:
        print(json.dumps({row.name: _figures(row, *results[row.name]) for row in rows}, indent=2))
    else:
        _table(rows, results)
    return 0


def _figures(row: Row, baseline: list[float], ours: list[float]) -> dict[str, object]:
    ratios = [mine / theirs for mine, theirs in zip(ours, baseline, strict=True)]
    return {
        "what": row.what,
        "against": row.against,
        "goal": row.goal,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "per_second": statistics.median(ours),
        "baseline_per_second": statistics.median(baseline),
        "rounds": len(ours),
    }


def _table(rows: list[Row], results: dict[str, tuple[list[float], list[float]]]) -> None:
    machine = f"{os.cpu_count()} CPUs, {platform.system()} {platform.machine()}"
    print(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {machine}")
    print(f"{'':<11}{'ratio':>7}  {'(min..max)':<14}{'goal':>6}{'a second':>11}{'baseline':>11}")
    for row in rows:
        figures = _figures(row, *results[row.name])
        spread = f"({figures['ratio_min']:.2f}..{figures['ratio_max']:.2f})"
        print(
            f"{row.name:<11}{figures['ratio']:>7.2f}  {spread:<14}{row.goal or '':>6}"
            f"{figures['per_second']:>11,.0f}{figures['baseline_per_second']:>11,.0f}"
        )
    for row in rows:
        print(f"{row.name}: {row.what}, against {row.against}")


def _progress(done: int, steps: int, name: str) -> None:
    if sys.stderr.isatty():
        bar = "█" * (20 * done // steps)
        print(f"\r{bar:<20} {done}/{steps} {name:<12}", end="\n" if done == steps else "", file=sys.stderr, flush=True)


def _migration() -> str:
    from durablews.schema import migrations

    return migrations()[0][1]


@contextmanager
def _server(command: list[str]) -> Iterator[str]:
    """Run a server that prints its address first, and end it."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.terminate()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    raise SystemExit(main())
