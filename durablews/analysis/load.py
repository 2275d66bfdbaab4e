"""What a load comes to: backlog, disk, when messages begin to go, how long draining takes, flash wear, data. Pure.

Figures that were measured say on what. Sizes are decimal here (1 MB is 1,000,000 bytes), a month has 30 days.
"""

from __future__ import annotations

import math
import re

from msgspec import UNSET, Struct

from durablews.config import CapsConfig, Settings
from durablews.errors import ConfigError
from durablews.heartbeat import SHORTEST_INTERVAL

__all__ = [
    "MAX_BYTES",
    "MAX_MESSAGES",
    "RESERVE",
    "WAL",
    "Backlog",
    "FirstLoss",
    "Load",
    "Sum",
    "backlog",
    "disk_bytes",
    "drain_speed",
    "drain_time",
    "first_loss",
    "heartbeat_traffic",
    "kept",
    "parse_rate",
    "row_bytes",
    "sums",
    "wear",
]

_DAY, _MONTH = 86_400, 30 * 86_400

#: The caps of a new outbox (migrations/0001_outbox.sql, durablews_caps).
MAX_MESSAGES, MAX_BYTES = 1_000_000, 2**30

# -- The file. Measured 2026-11-24 with Outbox.send_many, SQLite 3.40.1, pages of 4096 bytes, 10 000 rows (5000 to 2000
# of 2000 bytes and more), the log checkpointed. File size / rows, the same for JSON and for bytes:
#
#     payload   50    200    400   1000   1500   2000   3000   4000   5000   8000   20000
#     a row  103.6  260.1  475.1   1389   2073   2082   4137   4137   5155   8242   20568
#
# and 467.6 a row for 100 000 rows of 400. No line fits that, because whole rows share a page: 3 of 1000 bytes, 1 of
# 3000. So pages are counted, as sqlite.org/fileformat2.html has them; dbstat says the same.
_PAGE = 4096
# Beside the payload, the record takes 30.4 bytes at the smallest; 32 leaves room for larger numbers. A cell adds its
# pointer, its length and the sequence.
_RECORD, _CELL = 32, 7
# What of a page its cells may have; the largest and the smallest part of a record that stays in its leaf; what an
# overflow page holds.
_LEAF, _LARGEST_LOCAL, _SMALLEST_LOCAL, _OVERFLOW = 4088, 4061, 489, 4092
# durablews_queue: 9.4 to 10.0 bytes a row. A ttl adds 13 (durablews_deadline), which is not counted here.
_QUEUE = 10
# The tables and indexes of an empty outbox.
_EMPTY_FILE = 131_072
#: Bytes for the log beside the file: who only writes tidies it up above 8 MiB (durablews/outbox.py), a drainer at 4.
WAL = 8 * 2**20
#: Bytes that are held beside the file so that it can be emptied on a full disk (durablews/reserve.py says why so many).
RESERVE = 4 * 2**20

# -- Wear. Measured 2026-11-24 with durablews.connect and `durablews serve` in another process: virtual machine, Linux
# 6.18, ext4 on a loop device of its own, SQLite 3.40.1, synchronous FULL. Bytes a message, sent and then settled by its
# ack, checkpoints among them: write_bytes of /proc/self/io / what the device was given, which has ext4's journal in it.
#
#     messages a commit          1                 10               100
#     payload    50      37,143 / 39,055     3,718 / 4,359       789 / 871
#               400      37,147 / 39,455     6,638 / 7,030     1,511 / 1,562
#              4000      37,143 / 39,434   10,887 / 11,360     5,593 / 5,733
#             20000      74,795 / 75,090   28,690 / 29,054   35,761 / 33,559
#
# Alone, a message up to a page writes nine pages, whatever its size; in an outage, sends only: 23, 25, 39 and 72 kB.
# Each overflow page is written about twice. A message that joins a commit costs 1.1 to 6.6 times its row; 3 is used.
_ALONE, _OVERFLOW_WRITTEN, _SHARED = 39_500, 8_900, 3
# Up to so many messages a second each is taken to have two commits to itself, its own and its ack's. They share when
# they meet in a sync: at 50 a second that needs syncs of 10 ms. A choice: the machine above made 430 a second.
_LONELY = 50.0

# Computed, TLS 1.3 over IPv4: a ping and a pong with 4 bytes each, masked one way (10 + 6), with 22 of TLS and 52 of
# TCP and IP, and one bare TCP ack: 84 + 80 + 52.
_HEARTBEAT = 216


class Load(Struct, frozen=True, kw_only=True):
    """What the owner knows of the load; None is not known."""

    #: Messages a second.
    rate: float | None = None
    #: Bytes of one message as the caps count it: payload, topic and headers.
    payload: int | None = None
    #: Seconds without a connection, at the longest.
    max_outage: float | None = None
    #: Bytes that the outbox may have of the disk.
    disk: int | None = None
    #: Seconds of a round trip.
    rtt: float | None = None
    #: Bytes a month.
    data_budget: int | None = None


class Backlog(Struct, frozen=True, kw_only=True):
    """What has gathered at the end of an outage; bytes are None when the size of a message is not known."""

    messages: int
    payload_bytes: int | None = None
    disk_bytes: int | None = None


class FirstLoss(Struct, frozen=True):
    """When a message goes for the first time (seconds into the outage), and for what: a cap, or ``"disk"``."""

    cap: str
    after: float


class Sum(Struct, frozen=True, kw_only=True):
    """One result: its name in ``--json``, its value (None: it does not happen, or never ends), and a line to read."""

    name: str
    value: float | None
    text: str


def parse_rate(text: str) -> float:
    """Return the messages a second of ``"2/s"``, ``"120/min"``, ``"7200/h"``, ``"500/d"``, or a bare number.

    Raises:
        ConfigError: it is none of these, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*(s|min|h|d))?\s*", text)
    if not match:
        raise ConfigError(f'{text!r} is not a rate; write "2/s", "120/min" or "7200/h"')
    rate = float(match[1]) / {"s": 1, None: 1, "min": 60, "h": 3600, "d": _DAY}[match[2]]
    if not 0 < rate <= 1e9:
        raise ConfigError(f"{text!r}: a rate is above 0 and at most 1e9 a second")
    return rate


def row_bytes(payload: int) -> float:
    """Return what one message takes of the file.

    4096 / whole rows in a page, and 4096 for each overflow page of a record that is larger than its leaf may hold, and
    10 in the index of the queue.
    """
    local, overflow = _split(payload)
    return _PAGE / (_LEAF // (local + _CELL)) + _PAGE * overflow + _QUEUE


def _split(payload: int) -> tuple[int, int]:
    """Return the bytes of a record that stay in its leaf, and the overflow pages that have the rest."""
    record = payload + _RECORD
    if record <= _LARGEST_LOCAL:
        return record, 0
    local = _SMALLEST_LOCAL + (record - _SMALLEST_LOCAL) % _OVERFLOW
    if local > _LARGEST_LOCAL:
        local = _SMALLEST_LOCAL
    return local, math.ceil((record - local) / _OVERFLOW)


def disk_bytes(messages: int, payload: int) -> int:
    """Return the size of an outbox file: that of an empty one + messages x `row_bytes`. The log is beside it."""
    return _EMPTY_FILE + math.ceil(messages * row_bytes(payload))


def backlog(rate: float, outage: float, payload: int | None = None) -> Backlog:
    """Return what gathers in an outage when nothing is dropped: rate x outage, and that x payload or as a file."""
    # 0.1 a second for 30 s are 3, and 3.0000000000000004 too.
    messages = math.floor(round(rate * outage, 6))
    if payload is None:
        return Backlog(messages=messages)
    return Backlog(messages=messages, payload_bytes=messages * payload, disk_bytes=disk_bytes(messages, payload))


def first_loss(
    rate: float,
    outage: float,
    *,
    payload: int | None = None,
    max_messages: int = MAX_MESSAGES,
    max_bytes: int = MAX_BYTES,
    max_age: float | None = None,
    disk: int | None = None,
) -> FirstLoss | None:
    """Return the first moment of an outage at which a message goes, or is refused; None when everything fits.

    The least of max_messages / rate, (max_bytes / payload) / rate, max_age, and (disk - log - reserve - empty file) /
    `row_bytes` / rate, messages counted whole; of two at once the one named first.
    """
    fitting: dict[str, int] = {"max_messages": max_messages}
    if payload:
        fitting["max_bytes"] = max_bytes // payload
    moments = {cap: messages / rate for cap, messages in fitting.items()}
    if max_age is not None:
        moments["max_age"] = max_age
    if payload is not None and disk is not None:
        moments["disk"] = _rows_on(disk, payload) / rate
    cap = min(moments, key=moments.__getitem__)
    return FirstLoss(cap, moments[cap]) if moments[cap] < outage else None


def _rows_on(disk: int, payload: int) -> int:
    return max(0, math.floor((disk - WAL - RESERVE - _EMPTY_FILE) / row_bytes(payload)))


def drain_speed(
    *, rate_limit: float | None, window: int, window_bytes: int, payload: int | None, rtt: float | None
) -> float | None:
    """Return the messages a second that may go at most: the lesser of the rate limit and window / rtt.

    The window is in messages, or window_bytes / payload when that is less, and never below one. None when neither a
    rate limit nor a round trip is known.
    """
    speeds = [] if rate_limit is None else [rate_limit]
    if rtt:
        speeds.append(_window(window, window_bytes, payload) / rtt)
    return min(speeds, default=None)


def _window(window: int, window_bytes: int, payload: int | None) -> int:
    return max(1, min(window, window_bytes // payload)) if payload else window


def drain_time(messages: int, rate: float, speed: float) -> float:
    """Return the seconds until a backlog is gone while more comes in: messages / (speed - rate), or infinity."""
    if messages == 0:
        return 0.0
    return messages / (speed - rate) if speed > rate else math.inf


def wear(rate: float, payload: int, commit_interval: float = 0.0) -> float:
    """Return the bytes that the medium is given to write in a day, at ``durability="power"``.

    Up to 50 messages a second: rate x (39,500 + 8,900 for each overflow page) x 86,400, for each message is taken to be
    committed alone, and so is its ack. What comes above that shares their commits, at 3 times `row_bytes` each. A flash
    card that erases in large blocks wears by more than it is given; that is not in it. A commit_interval makes 1 /
    commit_interval commits a second at most.
    """
    lonely = min(_LONELY, 1 / commit_interval) if commit_interval else _LONELY
    alone = _ALONE + _OVERFLOW_WRITTEN * _split(payload)[1]
    shared = min(alone, _SHARED * row_bytes(payload))
    return _DAY * (min(rate, lonely) * alone + max(0.0, rate - lonely) * shared)


def heartbeat_traffic(interval: float) -> float:
    """Return the bytes of heartbeats in a month on a link that is otherwise silent: 216 x 2,592,000 s / interval."""
    return _HEARTBEAT * _MONTH / interval


def sums(settings: Settings, load: Load) -> list[Sum]:
    """Return every sum that the given figures allow, in the order in which they build on each other."""
    found: list[Sum] = []
    rate, payload, outage = load.rate, load.payload, load.max_outage
    if rate is not None and outage is not None:
        gathered = backlog(rate, outage, payload)
        found.extend(_backlog_sums(gathered, rate, outage, payload))
        loss = _first_loss(settings.caps, load, rate, outage)
        found.append(_loss_sum(loss, rate, outage))
        found.extend(_drain_sums(settings, load, rate, kept(settings.caps, load, rate, outage)))
    if rate is not None and payload is not None and settings.durability == "power":
        found.append(_wear_sum(rate, payload, settings.commit_interval))
    found.extend(_traffic_sums(settings, load))
    return found


def _backlog_sums(gathered: Backlog, rate: float, outage: float, payload: int | None) -> list[Sum]:
    messages = f"{gathered.messages:,} messages"
    text = f"backlog after {_span(outage)}: {rate:g} a second x {outage:,.0f} s = {messages}"
    if payload is None or gathered.payload_bytes is None or gathered.disk_bytes is None:
        return [Sum(name="backlog", value=gathered.messages, text=text)]
    text += f", {_size(gathered.payload_bytes)} of payload, {_size(gathered.disk_bytes)} on disk"
    row = f"{row_bytes(payload):,.0f} B"
    return [
        Sum(name="backlog", value=gathered.messages, text=text),
        Sum(
            name="backlog_bytes",
            value=gathered.payload_bytes,
            text=f"its payload: {messages} x {payload:,} B = {_size(gathered.payload_bytes)}",
        ),
        Sum(
            name="backlog_disk",
            value=gathered.disk_bytes,
            text=f"its file: {messages} x {row} + {_size(_EMPTY_FILE)} = {_size(gathered.disk_bytes)};"
            f" its log takes up to {_size(WAL)} more",
        ),
    ]


def kept(caps: CapsConfig, load: Load, rate: float, outage: float) -> int:
    """Return the messages that wait at the end of an outage: all, or as many as were there at the first loss."""
    gathered, loss = backlog(rate, outage).messages, _first_loss(caps, load, rate, outage)
    return gathered if loss is None else min(gathered, math.floor(round(rate * loss.after, 6)))


def _first_loss(caps: CapsConfig, load: Load, rate: float, outage: float) -> FirstLoss | None:
    return first_loss(
        rate,
        outage,
        payload=load.payload,
        max_messages=MAX_MESSAGES if caps.max_messages is UNSET else caps.max_messages,
        max_bytes=MAX_BYTES if caps.max_bytes is UNSET else caps.max_bytes,
        max_age=None if caps.max_age is UNSET else caps.max_age,
        disk=load.disk,
    )


def _loss_sum(loss: FirstLoss | None, rate: float, outage: float) -> Sum:
    if loss is None:
        return Sum(name="first_loss", value=None, text=f"nothing goes in an outage of {_span(outage)}")
    text = f"messages begin to go {_span(loss.after)} into the outage, for {loss.cap}"
    if loss.cap != "max_age":
        text += f": {rate * loss.after:,.0f} messages / {rate:g} a second = {loss.after:,.0f} s"
    return Sum(name="first_loss", value=loss.after, text=text)


def _drain_sums(settings: Settings, load: Load, rate: float, messages: int) -> list[Sum]:
    delivery = settings.delivery
    speed = drain_speed(
        rate_limit=delivery.rate_limit,
        window=delivery.window,
        window_bytes=delivery.window_bytes,
        payload=load.payload,
        rtt=load.rtt,
    )
    if speed is None:
        return []
    why = "delivery.rate_limit"
    if speed != delivery.rate_limit:
        window = _window(delivery.window, delivery.window_bytes, load.payload)
        why = f"a window of {window:,} messages / {load.rtt:g} s"
    seconds = drain_time(messages, rate, speed)
    text = (
        f"drained {_span(seconds)} after the outage: {messages:,} messages / ({speed:,.6g} - {rate:g} a second), {why}"
    )
    if seconds == math.inf:
        text = f"never drained: {rate:g} a second come in, and {speed:,.6g} go, {why}"
    return [Sum(name="drain_time", value=None if seconds == math.inf else seconds, text=text)]


def _wear_sum(rate: float, payload: int, commit_interval: float) -> Sum:
    written = wear(rate, payload, commit_interval)
    lonely = min(_LONELY, 1 / commit_interval) if commit_interval else _LONELY
    how = "each committed alone, and its ack too" if rate <= lonely else f"those above {lonely:g} a second together"
    each = written / rate / _DAY
    return Sum(
        name="wear_per_day",
        value=written,
        text=f"written to disk in a day: {rate:g} a second x {_size(each)} x {_DAY:,} s = {_size(written)}, {how}",
    )


def _traffic_sums(settings: Settings, load: Load) -> list[Sum]:
    interval = SHORTEST_INTERVAL if settings.heartbeat.adaptive else settings.heartbeat.interval
    beats = heartbeat_traffic(interval)
    text = f"heartbeats in a month: {_HEARTBEAT} B x {_MONTH:,} s / {interval:g} s = {_size(beats)} on a silent link"
    found = [Sum(name="heartbeat_traffic", value=beats, text=text)]
    if load.data_budget is None:
        return found
    left, terms = load.data_budget - beats, f"{_size(load.data_budget)} - {_size(beats)} of heartbeats"
    if load.rate is not None and load.payload is not None:
        payloads = load.rate * load.payload * _MONTH
        left, terms = left - payloads, f"{terms} - {_size(payloads)} of payload"
    text = f"left of the data of a month: {terms} = {'-' if left < 0 else ''}{_size(abs(left))}"
    return [*found, Sum(name="data_budget_left", value=left, text=text)]


def _size(number: float) -> str:
    """Return bytes as ``812 B``, ``1.4 kB``, ``207 MB``: decimal, as they are given."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" or number >= 99.5 else f"{number:.3g} {unit}"


def _span(seconds: float) -> str:
    """Return seconds as ``45 s``, ``90 min``, ``27.8 h``."""
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 120 * length or unit == "h":
            break
    return f"{seconds / length:.3g} {unit}"
