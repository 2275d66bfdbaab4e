"""Writes what is left of a damaged outbox into a fresh one, and counts what is missing."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import msgspec

from durablews import database
from durablews.entries import last_sequence
from durablews.errors import StorageFailed
from durablews.jobs import transaction
from durablews.messages import Refusal
from durablews.remains import Remains, Row

__all__ = ["Progress", "Salvage", "carry_over"]

_TOGETHER = 1000
# So many missing sequences are named; the others are counted.
_NAMED = 100
_COUNTERS = (
    *("acked", "expired", "expired_unanswered", "dropped", "dropped_unanswered", "dead_dropped", "lost"),
    *("refused", "dropped_new", "redelivered"),
)
_LEFT = _COUNTERS[:7]

Progress = Callable[[str, int, int], None]


class Salvage(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a damaged outbox.

    Attributes:
        outbox: the new outbox, where the damaged one was.
        damaged: the damaged file now; its log beside it as ``…-wal``.
        at: when, in ms since 1970 UTC.
        stream: the new stream.
        carried: entries that came over, dead letters and `damaged_entries` among them.
        damaged_entries: sequences of entries that cannot be trusted: dead letters now, never sent. The first 100.
        damaged_count: how many these are.
        lost: entries that did not come over; None when the file no longer says how many there were.
        missing: their sequences, as far as the index names them. The first 100.
        missing_count: how many it names.
        log_broken: damaged frames of the log.
        unreadable: what else could not be read.
    """

    outbox: str
    damaged: str
    at: int
    stream: str
    carried: int
    damaged_entries: list[int]
    damaged_count: int
    lost: int | None
    missing: list[int]
    missing_count: int
    log_broken: int
    unreadable: list[str]


def carry_over(path: str, made: str, remains: Remains, damaged: str, progress: Progress) -> Salvage:
    """Write everything that can be read into a fresh outbox, and how much is missing.

    Args:
        path: the outbox, as people name it.
        made: the fresh outbox.
        damaged: where the damaged file will be.

    Raises:
        OutboxError: the disk failed.
    """
    with database.storage_errors(path), closing(database.open_outbox(made)) as connection:
        with transaction(connection):
            found = _write(connection, path, remains, damaged, progress)
        if (answer := connection.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
            raise StorageFailed(path, f"the new outbox is not whole ({answer}); what was there is kept")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return found


def _write(connection: sqlite3.Connection, path: str, remains: Remains, damaged: str, progress: Progress) -> Salvage:
    meta = remains.single("durablews_meta", "its stream and its windows")
    totals = remains.single("durablews_totals", "its counts")
    expected = _expected(totals)
    index_damage: list[int] = []
    connection.execute("CREATE TEMP TABLE listed (seq INTEGER PRIMARY KEY, priority INTEGER NOT NULL)")
    connection.executemany(
        "INSERT OR IGNORE INTO listed (priority, seq) VALUES (?, ?)", _plausible(remains.listed(index_damage))
    )
    unclean = not meta or bool(meta.get("draining"))
    bad, bad_count = list[int](), 0
    rows: list[dict[str, Any]] = []
    for row in remains.entries(expected, lambda done, whole: progress("reading", done, whole)):
        if row.fault is not None:
            bad_count += 1
            bad += [row.seq] if len(bad) < _NAMED else []
        rows.append(_values(connection, row, unclean, known=bool(meta)))
        if len(rows) == _TOGETHER:
            _insert(connection, rows)
            rows.clear()
    _insert(connection, rows)
    carried = connection.execute("SELECT count(*) FROM durablews_entries").fetchone()[0]
    missing = "FROM listed WHERE seq NOT IN (SELECT seq FROM durablews_entries)"
    missing_count = connection.execute(f"SELECT count(*) {missing}").fetchone()[0]
    named = [seq for (seq,) in connection.execute(f"SELECT seq {missing} ORDER BY seq LIMIT {_NAMED}")]
    lost = None if expected is None else max(0, expected - carried)
    if expected is None and not index_damage:
        lost = missing_count
    _write_counts(connection, totals if expected is not None else {}, lost if lost is not None else missing_count)
    _write_rest(connection, remains, meta, lost, known=not index_damage)
    if remains.log.doubtful:
        remains.unreadable.append(f"{len(remains.log.doubtful)} pages of its log")
    found = Salvage(
        outbox=os.fsencode(path).decode(errors="replace"),
        damaged=os.fsencode(damaged).decode(errors="replace"),
        at=time.time_ns() // 1_000_000,
        stream=connection.execute("SELECT stream FROM durablews_meta").fetchone()[0],
        carried=carried,
        damaged_entries=bad,
        damaged_count=bad_count,
        lost=lost,
        missing=named,
        missing_count=missing_count,
        log_broken=len(remains.log.broken),
        unreadable=remains.unreadable,
    )
    connection.execute("UPDATE durablews_meta SET salvage = ?", (msgspec.json.encode(found).decode(),))
    return found


def _expected(totals: dict[str, Any]) -> int | None:
    """Return how many entries there were; None when the counts do not agree with one another."""
    if not all(isinstance(value, int) and value >= 0 for value in totals.values()) or "messages" not in totals:
        return None
    here = int(totals["messages"] + totals["dead_messages"])
    left = sum(totals.get(name, 0) for name in _LEFT)
    return here if totals["enqueued"] == here + left else None


def _plausible(listed: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    return ((priority, seq) for priority, seq in listed if -100 <= priority <= 100 and 0 < seq <= 2**52)


def _values(connection: sqlite3.Connection, row: Row, unclean: bool, *, known: bool) -> dict[str, Any]:
    """Return what goes into the new file for one entry."""
    values = dict(row.values, seq=row.seq, text=row.text)
    listed = connection.execute("SELECT priority FROM listed WHERE seq = ?", (row.seq,)).fetchone()
    if listed is not None:
        values["priority"] = listed[0]
    if not known and values["ack_state"] == 0:
        values["ack_state"] = 1  # nobody knows any more what was on its way
    if row.fault is not None:
        sent = unclean or values["ack_state"] == 1 or values["transmissions"] > 0
        refusal = Refusal(code="damaged", reason=row.fault, unknown=sent)
        values["refusal"] = msgspec.json.encode(refusal).decode()
        values["ack_state"] = 2
        if values["checksum"] is None or "payload" not in row.fault:
            values["checksum"] = -1  # no payload has it: whatever becomes of this entry, it is not sent
    return values


def _insert(connection: sqlite3.Connection, rows: list[dict[str, Any]]) -> None:
    connection.executemany(
        "INSERT OR IGNORE INTO durablews_entries (seq, priority, ack_state, transmissions, nacks, sent_at, refusal,"
        " created_at, born, ttl, topic, headers, bytes, checksum, payload)"
        " VALUES (:seq, :priority, :ack_state, :transmissions, :nacks, :sent_at, :refusal, :created_at,"
        # Age begins anew: a clock that is damaged must not expire what came over.
        " 0, :ttl, :topic, :headers, :bytes, :checksum, CASE WHEN :text THEN CAST(:payload AS TEXT) ELSE :payload END)",
        rows,
    )


def _write_counts(connection: sqlite3.Connection, totals: dict[str, Any], lost: int) -> None:
    """Count what came over, and let everything that was ever enqueued add up again."""
    counts = {name: totals.get(name, 0) for name in _COUNTERS}
    counts["lost"] += lost
    connection.execute(
        f"UPDATE durablews_totals SET {', '.join(f'{name} = :{name}' for name in counts)},"
        " messages = (SELECT count(*) FROM durablews_entries WHERE ack_state <> 2),"
        " bytes = (SELECT coalesce(sum(bytes), 0) FROM durablews_entries WHERE ack_state <> 2),"
        " dead_messages = (SELECT count(*) FROM durablews_entries WHERE ack_state = 2),"
        " dead_bytes = (SELECT coalesce(sum(bytes), 0) FROM durablews_entries WHERE ack_state = 2)",
        counts,
    )
    left = sum(counts[name] for name in _LEFT)
    connection.execute("UPDATE durablews_totals SET enqueued = messages + dead_messages + ?", (left,))


def _write_rest(
    connection: sqlite3.Connection, remains: Remains, meta: dict[str, Any], lost: int | None, *, known: bool
) -> None:
    """Carry over caps, the callers' ids, who has left, and the last sequence."""
    caps = remains.single("durablews_caps", "its caps")
    if caps:
        try:
            connection.execute(
                "UPDATE durablews_caps SET max_messages = :max_messages, max_bytes = :max_bytes, max_age = :max_age,"
                " overflow = :overflow",
                caps,
            )
        except sqlite3.Error:
            remains.unreadable.append("its caps")
    for row in remains.table("durablews_departed"):
        with suppress(sqlite3.Error, KeyError):
            connection.execute(
                "INSERT INTO durablews_departed (seq, reason, unknown, became, at)"
                " VALUES (:seq, :reason, :unknown, :became, :at)",
                row,
            )
    connection.executemany("INSERT OR IGNORE INTO durablews_ids (id, seq) VALUES (?, ?)", remains.ids())
    if lost != 0:
        # Whoever sends a lost message again under its id must not be told that it is there already.
        among = "seq IN (SELECT seq FROM listed)" if known else "1"
        connection.execute(
            f"DELETE FROM durablews_ids WHERE {among} AND seq NOT IN (SELECT seq FROM durablews_entries)"
        )
    last = max(remains.last_sequence(), last_sequence(connection))
    connection.execute("DELETE FROM sqlite_sequence WHERE name = 'durablews_entries'")
    connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('durablews_entries', ?)", (last,))
    window, forgotten = meta.get("largest_window"), meta.get("forgotten")
    connection.execute(
        "UPDATE durablews_meta SET largest_window = ?, draining = ?, forgotten = ?",
        (
            window if isinstance(window, int) and 0 <= window <= 10_000_000 else 0,
            int(bool(meta.get("draining"))),
            # Whether what is missing was acknowledged cannot be told any more.
            last if lost != 0 else forgotten if isinstance(forgotten, int) and 0 <= forgotten <= last else 0,
        ),
    )
