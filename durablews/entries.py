"""What enters the outbox, and what waits there: SQL on a connection whose transaction the caller holds.

Caps are enforced by one UPDATE that reserves room or changes nothing, so that they hold whichever process writes; a
foreign INSERT obeys the same caps through the view `durablews_outbox` (migrations/0001_outbox.sql).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import msgspec

from durablews.clock import Clock
from durablews.errors import DurablewsError, MessageTooLarge, OutboxFull
from durablews.messages import Draft, Entry
from durablews.page import read_page

__all__ = [
    "Caps",
    "Claims",
    "Gap",
    "enqueue",
    "last_sequence",
    "outbox_time",
    "peek",
    "read_caps",
    "write_caps",
]

#: What its own drainer holds, and no policy may take: priority -> first and last sequence.
Claims = Mapping[int, tuple[int, int]]

# 64 rows a statement cost 2.9 µs each, executemany 4.9 (1000 rows a transaction, measured); and each step of SQLite
# gives up the interpreter lock, which a busy event loop returns after 5 ms. Powers of two: seven steps for any rest.
_LARGEST_INSERT = 64
_SIZES = [_LARGEST_INSERT >> shift for shift in range(7)]


def _insertion(rows: int, row: str) -> str:
    """Return the statement that inserts so many rows; in `row` a # stands for a value of its own.

    ?1 and ?2 are the times, which a transaction's rows share: each value that is bound costs 80 ns (measured).
    """
    first, *rest = ",".join([row] * rows).split("#")
    values = first + "".join(f"?{number}{part}" for number, part in enumerate(rest, 3))
    return (
        "INSERT INTO durablews_entries (priority, created_at, born, ttl, topic, headers, bytes, checksum, payload)"
        f" VALUES {values}"
    )


_INSERTS = {rows: _insertion(rows, "(#,?1,?2,#,#,#,#,#,#)") for rows in _SIZES}
# As most messages are, with no ttl, topic or headers: a row for 2.3 µs instead of 3.0.
_PLAIN_INSERTS = {rows: _insertion(rows, "(#,?1,?2,NULL,NULL,NULL,#,#,#)") for rows in _SIZES}

_RESERVE = """
UPDATE durablews_totals SET messages = messages + :n, bytes = bytes + :b, enqueued = enqueued + :n
WHERE EXISTS (SELECT 1 FROM durablews_caps WHERE durablews_totals.messages + :n <= max_messages
                                             AND durablews_totals.bytes + :b <= max_bytes)"""

# The two halves of drop_oldest's order, each read along an index.
_NEVER_SENT = """
SELECT seq, priority, bytes, ack_state FROM durablews_entries
WHERE ack_state < 2 AND ack_state = 0 AND (priority > :p OR (priority = :p AND seq > :s))
ORDER BY priority, seq LIMIT :limit"""
_UNANSWERED = """
SELECT seq, priority, bytes, ack_state FROM durablews_entries
WHERE ack_state > 0 AND ack_state = 1 ORDER BY priority, seq LIMIT :limit"""

# The callers' own ids of entries that have left stay known for so long.
_REMEMBERED_IDS = 10_000


class Caps(msgspec.Struct, frozen=True, kw_only=True):
    """How much may wait in an outbox, as its file has it. `max_age` is in milliseconds, or None."""

    max_messages: int
    max_bytes: int
    max_age: int | None
    overflow: str


class Gap(msgspec.Struct, frozen=True):
    """A message that found no room under `drop_new`: it was counted, not stored."""


def read_caps(connection: sqlite3.Connection) -> Caps:
    """Return the caps of this outbox."""
    row = connection.execute("SELECT max_messages, max_bytes, max_age, overflow FROM durablews_caps").fetchone()
    return Caps(max_messages=row[0], max_bytes=row[1], max_age=row[2], overflow=row[3])


def write_caps(connection: sqlite3.Connection, explicit: Mapping[str, object]) -> None:
    """Change the caps that are given; what waits already stays, even when it is more."""
    for name in ("max_messages", "max_bytes", "max_age", "overflow"):
        if name in explicit:
            connection.execute(f"UPDATE durablews_caps SET {name} = ?", (explicit[name],))


def outbox_time(connection: sqlite3.Connection, clock: Clock) -> int:
    """Return the outbox clock: milliseconds that this file has lived through, as far as a boot clock vouched for them.

    Time while the machine was off is not in it, unless a server's Date confirmed the wall clock before and after. The
    first to ask after a boot writes down where that boot's clock stood.
    """
    saved, boot, boot_clock = connection.execute("SELECT clock, boot, boot_clock FROM durablews_meta").fetchone()
    now = clock.boot()
    if boot == clock.boot_id:
        return int(saved + max(0, now - boot_clock))
    # What was stored last before the power went shows that the clock had come at least so far.
    newest = connection.execute(
        "SELECT born FROM durablews_entries WHERE born IS NOT NULL ORDER BY seq DESC LIMIT 1"
    ).fetchone()
    reading = max(saved, newest[0] if newest else 0)
    connection.execute("UPDATE durablews_meta SET clock = ?, boot = ?, boot_clock = ?", (reading, clock.boot_id, now))
    return int(reading)


def last_sequence(connection: sqlite3.Connection) -> int:
    """Return the highest sequence that this outbox ever gave out, or was raised to."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'durablews_entries'").fetchone()
    return int(row[0]) if row else 0


def enqueue(
    connection: sqlite3.Connection,
    path: str,
    requests: Sequence[Sequence[Draft]],
    *,
    clock: Clock,
    claims: Claims | None = None,
    wall: int | None = None,
) -> list[list[int | Gap] | DurablewsError]:
    """Store what several callers want to send, each request whole or not at all, in their order.

    Under `drop_new` a request of several messages is stored as far as it fits.

    Args:
        requests: one for each caller.
        claims: what the drainer of this process holds.
        wall: when they were made, in ms since 1970 UTC; now, unless it is given.

    Returns:
        For each request its sequences (`Gap` for a message that was dropped), or the error for its caller.
    """
    born = outbox_time(connection, clock)
    wall = clock.wall() if wall is None else wall
    everything = [draft for request in requests for draft in request]
    if all(draft.id is None for draft in everything) and _reserve(connection, everything):
        first = _insert(connection, everything, born, wall)
        results: list[list[int | Gap] | DurablewsError] = []
        for request in requests:
            results.append(list(range(first, first + len(request))))
            first += len(request)
        return results
    caps = read_caps(connection)
    return [_enqueue_one(connection, path, request, caps, claims or {}, born, wall) for request in requests]


def _enqueue_one(
    connection: sqlite3.Connection,
    path: str,
    request: Sequence[Draft],
    caps: Caps,
    claims: Claims,
    born: int,
    wall: int,
) -> list[int | Gap] | DurablewsError:
    known = _known_ids(connection, request)
    fresh: list[Draft] = []
    places: list[int | None] = []
    asked = set(known)
    for draft in request:
        # An id that stands twice in one request is one message.
        places.append(None if draft.id in asked else len(fresh))
        if draft.id not in asked:
            fresh.append(draft)
        if draft.id is not None:
            asked.add(draft.id)
    for draft in fresh:
        if draft.bytes > caps.max_bytes:
            return MessageTooLarge(
                path,
                f"a message of {draft.bytes} bytes is larger than the cap of {caps.max_bytes} bytes; it was not stored",
            )
    if not _reserve(connection, fresh):
        if caps.overflow == "drop_new":
            fitting = _fitting(connection, fresh, caps)
            connection.execute("UPDATE durablews_totals SET dropped_new = dropped_new + ?", (len(fresh) - fitting,))
            del fresh[fitting:]
            _reserve(connection, fresh)
        elif caps.overflow == "reject" or not _make_room(connection, fresh, caps, claims, wall):
            full = OutboxFull(path, _why_full(connection, caps, fresh))
            full.droppable = caps.overflow == "drop_oldest" and bool(claims)
            return full
    first = _insert(connection, fresh, born, wall) if fresh else 0
    named = {draft.id: first + offset for offset, draft in enumerate(fresh) if draft.id is not None}
    if named:
        _remember_ids(connection, named)
        known |= named
    return [
        known[draft.id]
        if draft.id is not None and draft.id in known
        else Gap()
        if place is None or place >= len(fresh)
        else first + place
        for draft, place in zip(request, places, strict=True)
    ]


def _fitting(connection: sqlite3.Connection, drafts: Sequence[Draft], caps: Caps) -> int:
    """Return how many of the drafts, from the first on, the caps have room for."""
    waiting, size = connection.execute("SELECT messages, bytes FROM durablews_totals").fetchone()
    for count, draft in enumerate(drafts):
        size += draft.bytes
        if waiting + count + 1 > caps.max_messages or size > caps.max_bytes:
            return count
    return len(drafts)


def _reserve(connection: sqlite3.Connection, drafts: Sequence[Draft]) -> bool:
    """Count the drafts as waiting if the caps allow all of them; otherwise change nothing."""
    if not drafts:
        return True
    size = sum(draft.bytes for draft in drafts)
    return connection.execute(_RESERVE, {"n": len(drafts), "b": size}).rowcount == 1


def _insert(connection: sqlite3.Connection, drafts: Sequence[Draft], born: int, wall: int) -> int:
    """Write the rows and return the first sequence; the write lock makes the others follow it without a gap."""
    start, size = 0, _LARGEST_INSERT
    while start < len(drafts):
        while size > len(drafts) - start:
            size >>= 1
        chunk = drafts[start : start + size]
        values: list[object] = [wall, born]
        for d in chunk:
            if d.ttl is not None or d.topic is not None or d.headers is not None:
                rows = [(d.priority, d.ttl, d.topic, d.headers, d.bytes, d.checksum, d.payload) for d in chunk]
                connection.execute(_INSERTS[size], [wall, born, *chain.from_iterable(rows)])
                break
            values += (d.priority, d.bytes, d.checksum, d.payload)
        else:
            connection.execute(_PLAIN_INSERTS[size], values)
        start += size
    last: int = connection.execute("SELECT last_insert_rowid()").fetchone()[0]
    return last - len(drafts) + 1


def _make_room(connection: sqlite3.Connection, drafts: Sequence[Draft], caps: Caps, claims: Claims, wall: int) -> bool:
    """Drop the oldest of the lowest priority until the drafts fit; False, with nothing dropped, when they cannot."""
    size = sum(draft.bytes for draft in drafts)
    waiting, bytes_waiting = connection.execute("SELECT messages, bytes FROM durablews_totals").fetchone()
    messages_over = waiting + len(drafts) - caps.max_messages
    bytes_over = bytes_waiting + size - caps.max_bytes
    victims: list[tuple[int, int, int]] = []
    for seq, priority, row_bytes, ack_state in _droppable(connection, max(64, messages_over)):
        if messages_over <= 0 and bytes_over <= 0:
            break
        first, last = claims.get(priority, (0, -1))
        if first <= seq <= last:
            continue
        victims.append((seq, row_bytes, ack_state))
        messages_over -= 1
        bytes_over -= row_bytes
    if messages_over > 0 or bytes_over > 0:
        return False
    connection.executemany("DELETE FROM durablews_entries WHERE seq = ?", [(seq,) for seq, _, _ in victims])
    connection.executemany(
        "INSERT INTO durablews_departed (seq, reason, unknown, at) VALUES (?, 'dropped', ?, ?)",
        [(seq, ack_state == 1, wall) for seq, _, ack_state in victims],
    )
    unanswered = sum(ack_state == 1 for _, _, ack_state in victims)
    connection.execute(
        "UPDATE durablews_totals SET messages = messages - ?, bytes = bytes - ?, dropped = dropped + ?,"
        " dropped_unanswered = dropped_unanswered + ?",
        (len(victims), sum(row_bytes for _, row_bytes, _ in victims), len(victims) - unanswered, unanswered),
    )
    return _reserve(connection, drafts)


def _droppable(connection: sqlite3.Connection, page: int) -> Iterable[tuple[int, int, int, int]]:
    """Yield what drop_oldest may take, in its order, a page at a time."""
    priority, seq = -101, 0
    while rows := connection.execute(_NEVER_SENT, {"p": priority, "s": seq, "limit": page}).fetchall():
        yield from rows
        seq, priority = rows[-1][0], rows[-1][1]
    yield from connection.execute(_UNANSWERED, {"limit": -1})


def _why_full(connection: sqlite3.Connection, caps: Caps, drafts: Sequence[Draft]) -> str:
    waiting, size = connection.execute("SELECT messages, bytes FROM durablews_totals").fetchone()
    what = "the message was not stored" if len(drafts) == 1 else f"none of the {len(drafts)} messages was stored"
    return (
        f"the outbox is full: {waiting} of {caps.max_messages} messages and {size} of {caps.max_bytes} bytes wait;"
        f" {what} (overflow is {caps.overflow})"
    )


def _known_ids(connection: sqlite3.Connection, request: Sequence[Draft]) -> dict[str, int]:
    known: dict[str, int] = {}
    for draft in request:
        if draft.id is not None:
            row = connection.execute("SELECT seq FROM durablews_ids WHERE id = ?", (draft.id,)).fetchone()
            if row:
                known[draft.id] = row[0]
    return known


def _remember_ids(connection: sqlite3.Connection, named: Mapping[str, int]) -> None:
    """Remember ids, and now and then forget those of entries that have left, but for the newest ten thousand ids.

    To forget takes a look at each id of what waits, so it is done once for a number of new ids that grows with that.
    """
    newest, waiting = connection.execute(
        "SELECT coalesce((SELECT max(seq) FROM durablews_ids), 0), messages + dead_messages FROM durablews_totals"
    ).fetchone()
    connection.executemany("INSERT INTO durablews_ids (id, seq) VALUES (?, ?)", list(named.items()))
    period = 1 << ((waiting + _REMEMBERED_IDS) // 8).bit_length()
    if newest // period == max(named.values()) // period:
        return
    connection.execute(
        "DELETE FROM durablews_ids WHERE seq < (SELECT seq FROM durablews_ids ORDER BY seq DESC LIMIT 1 OFFSET ?)"
        " AND NOT EXISTS (SELECT 1 FROM durablews_entries AS e WHERE e.seq = durablews_ids.seq)",
        (_REMEMBERED_IDS,),
    )


def peek(
    connection: sqlite3.Connection,
    *,
    after: Mapping[int, int],
    closed: Iterable[int] = (),
    limit: int,
    max_bytes: int,
    above: int = -101,
) -> tuple[list[Entry], list[tuple[int, str]]]:
    """Return the next entries in sending order: higher priority first, then by sequence.

    Each priority is walked along its index from `after`; neither time nor memory depends on how much waits, and no
    payload is read beyond the first that is too many.

    Args:
        after: priority -> the last sequence that the caller has already.
        closed: priorities that the caller does not want now.
        limit: at most so many rows, those that must not be sent among them.
        max_bytes: stop once the entries have so many bytes; at least one is returned.
        above: only priorities above this one.

    Returns:
        The entries, and those that must not be sent: sequence and why (``"damaged"``, ``"not_utf8"``).
    """
    entries: list[Entry] = []
    unfit: list[tuple[int, str]] = []
    skipped = set(closed)
    priority = 101
    while limit > 0:
        row = connection.execute(
            "SELECT max(priority) FROM durablews_entries WHERE priority < ? AND ack_state < 2", (priority,)
        ).fetchone()
        if row[0] is None or row[0] <= above:
            break
        priority = row[0]
        if priority in skipped:
            continue
        page = read_page(
            connection,
            priority,
            after.get(priority, 0),
            limit=limit,
            max_bytes=max_bytes,
            at_least_one=not entries,
        )
        entries += page.entries
        unfit += page.unfit
        if page.full:
            break
        limit -= len(page.entries) + len(page.unfit)
        max_bytes -= sum(entry.bytes for entry in page.entries)
    return entries, unfit
