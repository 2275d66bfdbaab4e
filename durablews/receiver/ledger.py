"""What the server must remember, as SQL over one `sqlite3` connection (PROTOCOL.md sections 3 to 5).

Promises: the number of a (stream, priority) never decreases, and is only written inside a transaction that the caller
holds, so that it commits or vanishes together with the effect (S2); a stream's row names its newest connection and
owner (S6, S8). Does not open files, set pragmas or decide anything about frames. The connection must be in autocommit
mode (``isolation_level=None``).
"""

from __future__ import annotations

import sqlite3
from typing import Final

from durablews.jobs import transaction

__all__ = [
    "FORGET_AFTER",
    "SCHEMA",
    "Forbidden",
    "Forgotten",
    "Overtaken",
    "forget",
    "hello",
    "install",
    "installed_schema",
    "is_newest",
    "number",
    "raise_number",
]

#: The version of these tables; a store with a higher one belongs to a newer durablews.
SCHEMA: Final = 1
#: A stream may be forgotten when it was not heard of for this long: 90 days, in ms (PROTOCOL.md section 5).
FORGET_AFTER: Final = 90 * 24 * 3600 * 1000
# How stale `last_seen_at` may get while messages arrive, in ms: one row write an hour instead of one a frame.
_SEEN_GRANULARITY: Final = 3600 * 1000

_TABLES: Final = (
    """
CREATE TABLE IF NOT EXISTS durablews_receiver (
    -- That this file keeps a receiver's memory, and in which version. One row.
    one    INTEGER PRIMARY KEY CONSTRAINT one_row CHECK (one = 1),
    schema INTEGER NOT NULL
) STRICT""",
    """
CREATE TABLE IF NOT EXISTS durablews_streams (
    -- The clients' outboxes: whose each is, and which connection of it is the newest (PROTOCOL.md S6, S8).
    stream       TEXT PRIMARY KEY CONSTRAINT stream_is_hex CHECK (length(stream) = 32),
    owner        TEXT,              -- who authenticated when it was first used; NULL: nobody yet
    connection   TEXT NOT NULL,     -- every transaction checks that this is still its own
    instance     TEXT NOT NULL,     -- the client's process on that connection
    last_seen_at INTEGER NOT NULL   -- ms UTC, to the hour while messages arrive
) STRICT, WITHOUT ROWID""",
    """
CREATE TABLE IF NOT EXISTS durablews_seen (
    -- The highest sequence applied, written in the same transaction as the effect, never decreasing (PROTOCOL.md S2).
    stream   TEXT NOT NULL,
    priority INTEGER NOT NULL CONSTRAINT priority_range CHECK (priority BETWEEN -100 AND 100),
    seq      INTEGER NOT NULL CONSTRAINT seq_is_positive CHECK (seq > 0),
    PRIMARY KEY (stream, priority)
) STRICT, WITHOUT ROWID""",
    f"INSERT OR IGNORE INTO durablews_receiver (one, schema) VALUES (1, {SCHEMA})",
)


class Overtaken(Exception):
    """The stream said hello on a newer connection: nothing more of this one may be applied (S6)."""

    def __init__(self, instance: str) -> None:
        super().__init__(instance)
        self.instance = instance


class Forgotten(Exception):
    """The stream's row is gone: it was forgotten while this connection was open. It must say hello again."""


class Forbidden(Exception):
    """The stream belongs to somebody else (S8)."""


def installed_schema(connection: sqlite3.Connection) -> int | None:
    """Return the version of the receiver's tables in this file; None when there are none."""
    query = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'durablews_receiver'"
    if connection.execute(query).fetchone() is None:
        return None
    row = connection.execute("SELECT schema FROM durablews_receiver").fetchone()
    return None if row is None else int(row[0])


def install(connection: sqlite3.Connection) -> None:
    """Create the tables where they are missing. Call it inside a transaction, or each statement is one of its own."""
    for statement in _TABLES:
        connection.execute(statement)


def hello(
    connection: sqlite3.Connection,
    stream: str,
    connection_id: str,
    last: int,
    owner: str | None,
    *,
    instance: str,
    now: int,
) -> bool:
    """Make `connection_id` the stream's newest connection and return whether the stream went back in time.

    One transaction. It waits for a running transaction of an older connection to end, and from its commit on nothing
    more of that one is applied (S6).

    Args:
        last: the highest sequence that the client has given out.
        owner: who authenticated; None when nobody had to. A stream that nobody owns yet becomes theirs.
        instance: the client's process, told to the connection that loses.
        now: ms UTC.

    Raises:
        Forbidden: somebody else used the stream first; nothing was changed.
    """
    with transaction(connection):
        row = connection.execute("SELECT owner FROM durablews_streams WHERE stream = ?", (stream,)).fetchone()
        if row is not None and row[0] is not None and row[0] != owner:
            raise Forbidden
        connection.execute(
            "INSERT INTO durablews_streams (stream, owner, connection, instance, last_seen_at) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (stream) DO UPDATE SET owner = coalesce(owner, excluded.owner),"
            " connection = excluded.connection, instance = excluded.instance, last_seen_at = excluded.last_seen_at",
            (stream, owner, connection_id, instance, now),
        )
        highest = connection.execute("SELECT max(seq) FROM durablews_seen WHERE stream = ?", (stream,)).fetchone()[0]
    return highest is not None and highest > last


def number(connection: sqlite3.Connection, stream: str, connection_id: str, priority: int) -> int:
    """Check that this connection is still the stream's newest; return the highest sequence applied, 0 for none.

    Inside BEGIN IMMEDIATE the answer holds until the transaction ends.

    Raises:
        Overtaken: another connection is newer.
        Forgotten: the stream was forgotten.
    """
    # One statement: the fence test and the number are of the same moment even outside a transaction.
    row = connection.execute(
        "SELECT s.connection, s.instance, coalesce(n.seq, 0) FROM durablews_streams AS s"
        " LEFT JOIN durablews_seen AS n ON n.stream = s.stream AND n.priority = ? WHERE s.stream = ?",
        (priority, stream),
    ).fetchone()
    if row is None:
        raise Forgotten
    newest, instance, seq = row
    if newest != connection_id:
        raise Overtaken(instance)
    return int(seq)


def is_newest(connection: sqlite3.Connection, stream: str, connection_id: str) -> bool:
    """Return whether no other connection of the stream said hello since this one did."""
    query = "SELECT 1 FROM durablews_streams WHERE stream = ? AND connection = ?"
    return connection.execute(query, (stream, connection_id)).fetchone() is not None


def raise_number(connection: sqlite3.Connection, stream: str, priority: int, seq: int, *, now: int) -> None:
    """Remember that everything up to `seq` is applied; a number that is already higher stays.

    Call it in the transaction that holds the effect. `now` is in ms UTC.
    """
    connection.execute(
        "INSERT INTO durablews_seen (stream, priority, seq) VALUES (?, ?, ?)"
        " ON CONFLICT (stream, priority) DO UPDATE SET seq = excluded.seq WHERE excluded.seq > seq",
        (stream, priority, seq),
    )
    connection.execute(
        "UPDATE durablews_streams SET last_seen_at = ? WHERE stream = ? AND last_seen_at < ?",
        (now, stream, now - _SEEN_GRANULARITY),
    )


def forget(connection: sqlite3.Connection, *, now: int, unheard_for: int = FORGET_AFTER) -> list[str]:
    """Forget the streams not heard of for `unheard_for` ms, each with all its priorities; return which.

    What such a client had unanswered may be applied twice when it comes back (PROTOCOL.md section 5).

    Args:
        now: ms UTC. A machine whose clock jumped forward forgets too much: only call this with a clock you trust.

    Raises:
        ValueError: `unheard_for` is less than 90 days.
    """
    if unheard_for < FORGET_AFTER:
        raise ValueError("a stream must be remembered for at least 90 days (PROTOCOL.md section 5)")
    limit = (now - unheard_for,)
    with transaction(connection):
        rows = connection.execute("SELECT stream FROM durablews_streams WHERE last_seen_at <= ?", limit).fetchall()
        connection.execute(
            "DELETE FROM durablews_seen WHERE stream IN (SELECT stream FROM durablews_streams WHERE last_seen_at <= ?)",
            limit,
        )
        connection.execute("DELETE FROM durablews_streams WHERE last_seen_at <= ?", limit)
    return [row[0] for row in rows]
