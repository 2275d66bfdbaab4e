"""Reads a page of waiting entries of one priority, in two steps of SQLite however many rows it has.

Python's sqlite3 gives up the interpreter lock for every row that it steps to, and while the event loop is busy it gets
it back after the switch interval only: 5 ms a row, measured 3.3 ms a row beside a busy loop against 15 µs for a page in
one value. So the rows' facts come as one JSON text and their payloads as one blob.
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_right
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, repeat
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

from durablews.messages import Entry, checksum

__all__ = ["Page", "read_page"]

# Named, because between two sequences SQLite would rather walk the rows: all those of other priorities in between.
_WAITING = """
FROM durablews_entries INDEXED BY durablews_queue
WHERE priority = :priority AND seq > :after AND ack_state < 2 ORDER BY seq"""

# What every row has, a list a column, and what few have. Nothing here touches a payload: a large one lies on pages of
# its own.
_FACTS = f"""
SELECT json_group_array(seq), json_group_array(created_at), json_group_array(bytes), json_group_array(checksum),
       json_group_array(typeof(payload) = 'text'),
       json_group_array(json_array(
           seq, topic, headers, transmissions, nacks,
           coalesce(length(CAST(topic AS BLOB)), 0) + coalesce(length(CAST(headers AS BLOB)), 0)))
           FILTER (WHERE topic IS NOT NULL OR headers IS NOT NULL OR transmissions + nacks > 0)
FROM (SELECT * {_WAITING} LIMIT :limit)"""

_PAYLOADS = """
SELECT CAST(group_concat(payload, '') AS BLOB) FROM (
    SELECT payload FROM durablews_entries INDEXED BY durablews_queue
    WHERE priority = :priority AND seq BETWEEN :first AND :last AND ack_state < 2 ORDER BY seq LIMIT :limit)"""

_ROWS = f"SELECT seq, priority, payload, topic, headers, created_at, bytes, transmissions, nacks, checksum {_WAITING}"

_decode_column = msgspec.json.Decoder(list[int]).decode
_decode_checksums = msgspec.json.Decoder(list[int | None]).decode
_decode_extras = msgspec.json.Decoder(list[tuple[int, str | None, str | None, int, int, int]]).decode
_NO_EXTRAS = (None, None, 0, 0, 0)
# Bulk steps in C: a loop of Python statements over the rows costs as much again as all of SQLite's work.
_as_entry = partial(tuple.__new__, Entry)
_NONE, _ZERO = repeat(None), repeat(0)


class Page(NamedTuple):
    """What was read: entries, and the sequences that must not be sent with why; `full`: a bound ended it."""

    entries: list[Entry]
    unfit: list[tuple[int, str]]
    full: bool


def read_page(
    connection: sqlite3.Connection, priority: int, after: int, *, limit: int, max_bytes: int, at_least_one: bool
) -> Page:
    """Return the next entries of one priority, along its index: the cost does not depend on how much waits.

    Args:
        limit: at most so many rows.
        max_bytes: at most so many bytes of payloads, topics and headers.
        at_least_one: return the first entry whatever its size.
    """
    try:
        return _read_at_once(connection, priority, after, limit, max_bytes, at_least_one)
    except (_Irregular, sqlite3.OperationalError, msgspec.DecodeError) as exc:
        if isinstance(exc, sqlite3.OperationalError) and "UTF-8" not in str(exc):
            raise
        # Text that is not UTF-8, sizes or checksums that are off: row by row shows which one it is.
        return _read_by_row(connection, priority, after, limit, max_bytes, at_least_one)


class _Irregular(Exception):
    """A page is not what its rows say."""


def _read_at_once(
    connection: sqlite3.Connection, priority: int, after: int, limit: int, max_bytes: int, at_least_one: bool
) -> Page:
    columns = connection.execute(_FACTS, {"priority": priority, "after": after, "limit": limit}).fetchone()
    seqs, created, sizes = map(_decode_column, columns[:3])
    taken = bisect_right(list(accumulate(sizes)), max_bytes)
    if at_least_one and seqs:
        taken = max(taken, 1)
    full = taken < len(seqs) or len(seqs) == limit
    if not taken:
        return Page([], [], full)
    del seqs[taken:], created[taken:], sizes[taken:]
    kept, are_text = _decode_checksums(columns[3])[:taken], _decode_column(columns[4])[:taken]
    extras = {seq: rest for seq, *rest in _decode_extras(columns[5])} if columns[5] != "[]" else {}
    bounds = {"priority": priority, "first": seqs[0], "last": seqs[-1], "limit": taken}
    payloads: bytes = connection.execute(_PAYLOADS, bounds).fetchone()[0] or b""
    lengths = sizes
    if extras:
        lengths = [size - int(extras.get(seq, _NO_EXTRAS)[4] or 0) for seq, size in zip(seqs, sizes, strict=True)]
    ends = list(accumulate(lengths))
    if ends[-1] != len(payloads):
        raise _Irregular
    slices: list[Any] = [payloads[end - length : end] for length, end in zip(lengths, ends, strict=True)]
    found = list(map(crc32, slices))
    if found != kept and any(one not in (None, other) for one, other in zip(kept, found, strict=True)):
        raise _Irregular
    try:
        slices = [part.decode() if is_text else part for part, is_text in zip(slices, are_text, strict=True)]
    except UnicodeDecodeError:
        raise _Irregular from None
    if extras:
        beside = [extras.get(seq, _NO_EXTRAS) for seq in seqs]
        topics, headers, transmissions, nacks, _ = zip(*beside, strict=True)
        rows = zip(seqs, repeat(priority), slices, topics, headers, created, sizes, transmissions, nacks)
    else:
        rows = zip(seqs, repeat(priority), slices, _NONE, _NONE, created, sizes, _ZERO, _ZERO)
    return Page(list(map(_as_entry, rows)), [], full)


def _read_by_row(
    connection: sqlite3.Connection, priority: int, after: int, limit: int, max_bytes: int, at_least_one: bool
) -> Page:
    entries: list[Entry] = []
    unfit: list[tuple[int, str]] = []
    size = 0
    for entry, fault in _rows(connection, priority, after):
        if fault is not None:
            unfit.append((entry.seq, fault))
        elif size + entry.bytes > max_bytes and (entries or not at_least_one):
            return Page(entries, unfit, True)
        else:
            entries.append(entry)
            size += entry.bytes
        if len(entries) + len(unfit) >= limit:
            return Page(entries, unfit, True)
    return Page(entries, unfit, False)


def _rows(connection: sqlite3.Connection, priority: int, after: int) -> Iterator[tuple[Entry, str | None]]:
    """Yield the rows of one priority as they are asked for, each with why it must not be sent, or None."""
    while True:
        cursor = connection.execute(_ROWS, {"priority": priority, "after": after})
        try:
            for row in cursor:
                after = row[0]
                fault = "damaged" if row[9] is not None and checksum(row[2]) != row[9] else None
                yield Entry(*row[:9]), fault
            return
        except sqlite3.OperationalError as exc:
            if "UTF-8" not in str(exc):
                raise
        finally:
            cursor.close()
        entry, fault = _row_with_bad_text(connection, priority, after)
        after = entry.seq
        yield entry, fault


def _row_with_bad_text(connection: sqlite3.Connection, priority: int, after: int) -> tuple[Entry, str]:
    """Read the next row where some of its text is not UTF-8, which SQLite does not check."""
    factory = connection.text_factory
    connection.text_factory = bytes
    try:
        row = connection.execute(f"{_ROWS} LIMIT 1", {"priority": priority, "after": after}).fetchone()
    finally:
        connection.text_factory = factory
    # What has a checksum was valid when this library stored it.
    return Entry(row[0], row[1], "", None, None, *row[5:9]), "not_utf8" if row[9] is None else "damaged"
