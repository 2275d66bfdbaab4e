"""The rows of `tools/bench`: what is measured, against what, and how good it must be (DESIGN.md section 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import bench_wear as wear
import bench_work as work
from bench_work import Work

__all__ = ["ROWS", "Kind", "Row"]

#: How durablews and its baseline make one figure: their ratio, of which more is better or less; or what durablews needs
#: more than the baseline, of which less is better.
Kind = Literal["ratio", "ratio, less is better", "difference, less is better"]


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        goal: None when none is set.
        unit: of both sides' figures.
        messages: how many one measurement sends.
        prepare: makes, once in a run, what all rounds use.
        rows: how many wait in what it makes.
        long: takes minutes, so it is measured only when it is asked for.
    """

    name: str
    what: str
    against: str
    goal: float | None
    ours: Callable[[Work], float]
    baseline: Callable[[Work], float]
    messages: int = 0
    kind: Kind = "ratio"
    unit: str = "/s"
    prepare: Callable[[Work], None] | None = None
    rows: int = 0
    long: bool = False


_INSERTS = "sqlite3 executemany, same columns and indexes, 1000 rows a transaction, FULL"
_ALONE = "the same messages appended to a file, each by itself and synced"
_RAW = "raw ws.send of the same messages, a frame each, an ack for 64, nothing stored"

ROWS = [
    Row(
        "sends",
        "durable sends by 1000 concurrent callers, FULL",
        _INSERTS,
        0.60,
        work.send_concurrently,
        work.insert_directly,
        50_000,
    ),
    Row("send-many", "send_many(1000), FULL", _INSERTS, 0.80, work.send_many, work.insert_directly, 100_000),
    Row(
        "awaited",
        "sends awaited one after another, FULL",
        "8 KiB appended (os.pwrite) and os.fdatasync",
        0.60,
        work.send_awaited,
        work.append_and_sync,
        2_000,
    ),
    Row(
        "drain",
        "drain 100 000 in batches to a receiver in another process, which numbers them and stores nothing",
        _RAW,
        4.0,
        work.drain,
        work.send_raw,
        100_000,
    ),
    Row(
        "drain-serve",
        "drain 100 000 in batches to `durablews serve`, which stores them on the same disk",
        _RAW,
        None,
        work.drain_to_serve,
        work.send_raw,
        100_000,
    ),
    Row(
        "drain-single",
        "drain with a message a frame and an ack for 64: durablews.v1, its batch size set to 1 by the bench",
        _RAW,
        0.9,
        work.drain_single,
        work.send_raw,
        50_048,
    ),
    Row(
        "online",
        "call of send() to arrival at the server, p50, FULL, one message each 5 ms",
        "p50 of 8 KiB appended and synced + p50 of one way through websockets, one each 5 ms",
        1.6,
        work.online,
        work.sync_and_one_way,
        400,
        "ratio, less is better",
        "ms",
    ),
    Row(
        "depth",
        "drain 200 000 of 10 million (--rows), opening included",
        "the same with a tenth of that waiting, a million at most",
        0.9,
        work.drain_deep,
        work.drain_shallow,
        200_000,
        prepare=work.fill_both,
        rows=10_000_000,
        long=True,
    ),
    Row(
        "memory",
        "most memory resident in a process that drains a million (--rows), a share of it each round",
        "imports of asyncio, sqlite3, websockets' client, aiosqlite and msgspec alone",
        12.0,
        work.resident_peak,
        work.imports_peak,
        kind="difference, less is better",
        unit="MB",
        prepare=work.fill_one,
        rows=1_000_000,
    ),
    Row(
        "inspect",
        "a whole process of `durablews inspect` on a million (--rows), median of five",
        "a whole process of `python -c pass`, median of five",
        150.0,
        work.inspect_time,
        work.python_time,
        kind="difference, less is better",
        unit="ms",
        prepare=work.fill_one,
        rows=1_000_000,
    ),
    Row(
        "ticker",
        "lateness of a 1 ms ticker, p99.9, in the loop of 1000 sends a second whose every sync takes 20 ms longer",
        "the same ticker beside an outbox that does nothing",
        10.0,
        work.busy_ticker,
        work.idle_ticker,
        4_000,
        "difference, less is better",
        "ms",
    ),
    Row(
        "wear-1",
        "bytes written to the disk a message that is sent and acknowledged, one a second",
        _ALONE,
        None,
        wear.at_one_a_second,
        wear.appended_alone,
        5,
        "ratio, less is better",
        "B",
    ),
    Row(
        "wear-100",
        "the same at 100 a second",
        _ALONE,
        None,
        wear.at_a_hundred_a_second,
        wear.appended_alone,
        300,
        "ratio, less is better",
        "B",
    ),
    Row(
        "wear-50ms",
        "the same at 100 a second with commit_interval=0.05",
        _ALONE,
        None,
        wear.at_a_hundred_in_company,
        wear.appended_alone,
        300,
        "ratio, less is better",
        "B",
    ),
    Row(
        "wear-bulk",
        "the same by send_many(1000)",
        "the same messages appended to a file, 1000 at a time and synced",
        None,
        wear.in_bulk,
        wear.appended_together,
        50_000,
        "ratio, less is better",
        "B",
    ),
]
