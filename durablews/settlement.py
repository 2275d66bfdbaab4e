"""How entries leave the outbox, or change their standing in it: SQL in a transaction that the caller holds.

Every departure is counted by its reason in the same transaction, and one without an ack is remembered so that its
sender can be told.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from durablews.entries import Claims
from durablews.messages import Refusal, Run

__all__ = [
    "CountsDiffer",
    "expire",
    "is_due",
    "is_unanswered",
    "mark_first_as_sent",
    "mark_unanswered",
    "refuse",
    "requeue",
    "return_aside",
    "set_aside",
    "settle",
    "settle_at_once",
    "stamp_unseen",
    "take_back",
]

# Dead letters have caps of their own and never take room from what waits (DESIGN section 5).
_MAX_DEAD_MESSAGES = 10_000
_MAX_DEAD_BYTES = 64 * 1024 * 1024
# One expiry statement takes so many rows: the write lock is not held for a backlog of millions.
_EXPIRY_PAGE = 5_000


_DELETE_ALONG_INDEX = "DELETE FROM durablews_entries WHERE priority = ? AND seq BETWEEN ? AND ? AND ack_state < 2"
_DELETE_ALONG_ROWS = "DELETE FROM durablews_entries WHERE +priority = ? AND seq BETWEEN ? AND ? AND ack_state < 2"

# A ttl is found through its index. The age cap takes rows from the lowest sequence on while none of them is younger:
# one that was requeued keeps its age and its turn, and may go a little after its time.
_EXPIRE = """
DELETE FROM durablews_entries WHERE seq IN (
    SELECT seq FROM durablews_entries WHERE ttl IS NOT NULL AND born + ttl <= :now AND ack_state <> 2
    UNION ALL
    SELECT seq FROM (
        SELECT seq, max(coalesce(born, :now)) OVER (ORDER BY seq ROWS UNBOUNDED PRECEDING) AS youngest
        FROM (SELECT seq, born FROM durablews_entries WHERE :oldest >= 0 AND ack_state <> 2 ORDER BY seq LIMIT :page))
    WHERE youngest <= :oldest
    LIMIT :page){free}
RETURNING seq, bytes, ack_state"""


class CountsDiffer(Exception):
    """Another process dropped, and counted, some of what was in flight here: the transaction must be done again."""


def settle_at_once(connection: sqlite3.Connection, runs: Sequence[Run]) -> None:
    """Delete what the server acknowledged, all of it still there, and count it.

    One statement for each run: to count first costs a quarter of the deletion again.

    Raises:
        CountsDiffer: some of it was gone. Roll back, and `settle` instead.
    """
    for run in runs:
        if _delete(connection, run) != run.messages:
            raise CountsDiffer
    _count_acked(connection, sum(run.messages for run in runs), sum(run.bytes for run in runs))


def settle(connection: sqlite3.Connection, runs: Sequence[Run]) -> None:
    """Delete what is left of what the server acknowledged, and count that."""
    messages = size = 0
    for run in runs:
        present = connection.execute(
            "SELECT count(*), coalesce(sum(bytes), 0) FROM durablews_entries"
            " WHERE priority = ? AND seq BETWEEN ? AND ? AND ack_state < 2",
            (run.priority, run.first, run.last),
        ).fetchone()
        messages, size = messages + present[0], size + present[1]
        _delete(connection, run)
    _count_acked(connection, messages, size)


def _count_acked(connection: sqlite3.Connection, messages: int, size: int) -> None:
    connection.execute(
        "UPDATE durablews_totals SET messages = messages - :n, bytes = bytes - :b, acked = acked + :n",
        {"n": messages, "b": size},
    )


def _delete(connection: sqlite3.Connection, run: Run) -> int:
    # Where hardly anything else lies between, a walk along the rows costs a fifth less than one along the index.
    dense = run.last - run.first < 4 * run.messages
    statement = _DELETE_ALONG_ROWS if dense else _DELETE_ALONG_INDEX
    return connection.execute(statement, (run.priority, run.first, run.last)).rowcount


def mark_unanswered(connection: sqlite3.Connection, runs: Sequence[Run], wall: int) -> None:
    """Note that a connection was lost before these were answered: they may have been applied."""
    for run in runs:
        marked = connection.execute(
            "UPDATE durablews_entries SET ack_state = 1, transmissions = transmissions + 1, sent_at = ?"
            " WHERE priority = ? AND seq BETWEEN ? AND ? AND ack_state < 2",
            (wall, run.priority, run.first, run.last),
        ).rowcount
        connection.execute("UPDATE durablews_totals SET redelivered = redelivered + ?", (marked,))


def take_back(connection: sqlite3.Connection, run: Run, wall: int) -> None:
    """Note that the server did not take these, sent once more, and that the first of them got the nack."""
    connection.execute(
        "UPDATE durablews_entries SET transmissions = transmissions + 1, sent_at = ?, nacks = nacks + (seq = ?)"
        " WHERE priority = ? AND seq BETWEEN ? AND ? AND ack_state < 2",
        (wall, run.first, run.priority, run.first, run.last),
    )


def mark_first_as_sent(connection: sqlite3.Connection, window: int) -> None:
    """Count the first `window` of each priority as transmitted: a drainer died without saying what was in flight.

    PROTOCOL.md C3. In flight is in memory only, so that sending costs no write; this is its price, paid at a crash.
    """
    priority = 101
    while True:
        row = connection.execute(
            "SELECT max(priority) FROM durablews_entries WHERE priority < ? AND ack_state < 2", (priority,)
        ).fetchone()
        if row[0] is None:
            return
        priority = row[0]
        connection.execute(
            "UPDATE durablews_entries SET ack_state = 1 WHERE seq IN (SELECT seq FROM durablews_entries"
            " WHERE priority = ? AND ack_state < 2 ORDER BY seq LIMIT ?)",
            (priority, window),
        )


def is_unanswered(connection: sqlite3.Connection, seq: int) -> bool:
    """Tell whether an entry was sent on a connection that was lost before the answer came, as far as is known."""
    return (
        connection.execute(
            "SELECT 1 FROM durablews_entries WHERE seq = ? AND (ack_state = 1 OR transmissions > 0)", (seq,)
        ).fetchone()
        is not None
    )


def refuse(connection: sqlite3.Connection, seq: int, refusal: Refusal, wall: int) -> bool:
    """Make an entry a dead letter; False when it is no longer there."""
    size = _restate(connection, seq, 2, refusal)
    if size is None:
        return False
    connection.execute(
        "UPDATE durablews_totals SET messages = messages - 1, bytes = bytes - :b, refused = refused + 1,"
        " dead_messages = dead_messages + 1, dead_bytes = dead_bytes + :b",
        {"b": size},
    )
    _remember_departure(connection, seq, "refused", wall, unknown=refusal.unknown)
    _bury_over_cap(connection)
    return True


def _restate(connection: sqlite3.Connection, seq: int, ack_state: int, refusal: Refusal) -> int | None:
    """Give a waiting entry another standing and return its size; None when it is no longer there."""
    row = connection.execute(
        "UPDATE durablews_entries SET ack_state = ?, refusal = ? WHERE seq = ? AND ack_state <> 2 RETURNING bytes",
        (ack_state, msgspec.json.encode(refusal).decode(), seq),
    ).fetchone()
    return None if row is None else int(row[0])


def _bury_over_cap(connection: sqlite3.Connection) -> None:
    """Drop the oldest dead letters over their own cap, counted."""
    while True:
        dead, size = connection.execute("SELECT dead_messages, dead_bytes FROM durablews_totals").fetchone()
        if dead <= _MAX_DEAD_MESSAGES and (size <= _MAX_DEAD_BYTES or dead == 1):
            return
        row = connection.execute(
            "DELETE FROM durablews_entries WHERE seq ="
            " (SELECT min(seq) FROM durablews_entries WHERE ack_state > 0 AND ack_state = 2) RETURNING bytes"
        ).fetchone()
        connection.execute(
            "UPDATE durablews_totals SET dead_messages = dead_messages - 1, dead_bytes = dead_bytes - ?,"
            " dead_dropped = dead_dropped + 1",
            (row[0],),
        )


def requeue(connection: sqlite3.Connection, seq: int, wall: int, *, nacked: bool = False) -> int | None:
    """Move an entry to the back of its priority under a new sequence, and return that; None when it is gone.

    Only what was never transmitted, or what a nack took back, may be given here (PROTOCOL.md C3).
    """
    new = connection.execute(
        "INSERT INTO durablews_entries (priority, transmissions, nacks, sent_at, created_at, born, ttl, topic, headers,"
        " bytes, checksum, payload)"
        " SELECT priority, transmissions, nacks + ?, sent_at, created_at, born, ttl, topic, headers,"
        " bytes, checksum, payload FROM durablews_entries WHERE seq = ? AND ack_state <> 2",
        (int(nacked), seq),
    )
    if new.rowcount != 1:
        return None
    became = new.lastrowid
    connection.execute("DELETE FROM durablews_entries WHERE seq = ?", (seq,))
    connection.execute("UPDATE durablews_ids SET seq = ? WHERE seq = ?", (became, seq))
    _remember_departure(connection, seq, "renumbered", wall, became=became)
    return became


def set_aside(connection: sqlite3.Connection, seq: int, refusal: Refusal) -> None:
    """Let an entry that is too large for this server wait beside the queue (PROTOCOL.md C5)."""
    _restate(connection, seq, 3, refusal)


def return_aside(
    connection: sqlite3.Connection, max_bytes: int, now: int, wall: int, *, between: int, tries: int
) -> list[tuple[int, Refusal]]:
    """Look at what waits aside, at the start of a connection that takes frames of `max_bytes`.

    What fits comes back under a new sequence; what did not fit on `tries` connections, each at least `between` ms of
    the outbox clock after the one before, becomes a dead letter.

    Returns:
        The new dead letters.
    """
    dead: list[tuple[int, Refusal]] = []
    rows = connection.execute(
        "SELECT seq, refusal FROM durablews_entries WHERE ack_state > 0 AND ack_state = 3 ORDER BY priority DESC, seq"
    ).fetchall()
    for seq, text in rows:
        refusal = msgspec.json.decode(text, type=Refusal)
        if refusal.needs is None or refusal.needs <= max_bytes:
            requeue(connection, seq, wall)
        elif not refusal.tries or now - refusal.tries[-1] >= between:
            refusal = msgspec.structs.replace(refusal, tries=[*refusal.tries, now])
            if len(refusal.tries) >= tries:
                refuse(connection, seq, refusal, wall)
                dead.append((seq, refusal))
            else:
                set_aside(connection, seq, refusal)
    return dead


def stamp_unseen(connection: sqlite3.Connection, now: int) -> None:
    """Start the age of rows that plain SQL inserted: the drainer sees them now."""
    connection.execute("UPDATE durablews_entries SET born = ? WHERE born IS NULL", (now,))


def is_due(connection: sqlite3.Connection, now: int, max_age: int | None, save_every: int) -> bool:
    """Tell cheaply whether `expire` would find something, or the clock is worth writing down.

    It is while the age of something matters, when `save_every` ms have passed since: so much is forgotten by a power
    cut.
    """
    ttl = connection.execute(
        "SELECT 1 FROM durablews_entries WHERE ttl IS NOT NULL AND born + ttl <= ? AND ack_state <> 2 LIMIT 1", (now,)
    ).fetchone()
    if ttl:
        return True
    ages = "SELECT 1 FROM durablews_entries WHERE ttl IS NOT NULL LIMIT 1"
    oldest = connection.execute(
        "SELECT born FROM durablews_entries WHERE ack_state <> 2 ORDER BY seq LIMIT 1"
    ).fetchone()
    if max_age is not None and oldest and oldest[0] is not None and oldest[0] <= now - max_age:
        return True
    matters = (max_age is not None and oldest is not None) or connection.execute(ages).fetchone() is not None
    saved = connection.execute("SELECT clock FROM durablews_meta").fetchone()[0]
    return matters and now - saved >= save_every


def expire(connection: sqlite3.Connection, now: int, max_age: int | None, claims: Claims, wall: int) -> list[int]:
    """Delete up to 5000 entries that are older than their ttl or `max_age` ms, counted; what is in flight stays.

    Returns:
        Their sequences.
    """
    free = "".join(
        f" AND NOT (priority = {priority} AND seq BETWEEN {first} AND {last})"
        for priority, (first, last) in claims.items()
    )
    oldest = now - max_age if max_age is not None else -1
    parameters = {"now": now, "oldest": oldest, "page": _EXPIRY_PAGE}
    rows = connection.execute(_EXPIRE.format(free=free), parameters).fetchall()
    if rows:
        unanswered = sum(ack_state == 1 for _, _, ack_state in rows)
        connection.execute(
            "UPDATE durablews_totals SET messages = messages - ?, bytes = bytes - ?, expired = expired + ?,"
            " expired_unanswered = expired_unanswered + ?",
            (len(rows), sum(size for _, size, _ in rows), len(rows) - unanswered, unanswered),
        )
        for seq, _, ack_state in rows:
            _remember_departure(connection, seq, "expired", wall, unknown=ack_state == 1)
    return [seq for seq, _, _ in rows]


def _remember_departure(
    connection: sqlite3.Connection,
    seq: int,
    reason: str,
    wall: int,
    *,
    unknown: bool = False,
    became: int | None = None,
) -> None:
    connection.execute(
        "INSERT INTO durablews_departed (seq, reason, unknown, became, at) VALUES (?, ?, ?, ?, ?)",
        (seq, reason, unknown, became, wall),
    )
