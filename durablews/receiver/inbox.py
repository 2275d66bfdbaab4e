"""What `durablews serve` does with messages: it keeps them in the table `durablews_inbox`, beside the ledger.

Promises: one row for each message, in the transaction that raises the number, so none is missing or there twice. Does
not read, trim or interpret them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

from durablews.clock import Clock, SystemClock
from durablews.errors import NotAnOutbox
from durablews.receiver.exchange import ApplyFrame
from durablews.receiver.ledger import installed_schema
from durablews.wire.frames import Item

__all__ = ["inbox_tables", "keeper"]

_TABLE = """
CREATE TABLE IF NOT EXISTS durablews_inbox (
    -- What was received, in the order of arrival.
    id          INTEGER PRIMARY KEY,
    stream      TEXT NOT NULL,     -- the client's outbox
    priority    INTEGER NOT NULL,
    seq         INTEGER NOT NULL,  -- (stream, priority, seq) is one message
    topic       TEXT,
    payload     ANY NOT NULL,      -- TEXT is JSON text, BLOB is bytes
    received_at INTEGER NOT NULL   -- ms UTC by this machine's clock
) STRICT"""

_INSERT = "INSERT INTO durablews_inbox (stream, priority, seq, topic, payload, received_at) VALUES (?, ?, ?, ?, ?, ?)"


def inbox_tables(path: str) -> Callable[[sqlite3.Connection], None]:
    """Return what creates the table in the store at `path`, to be given to `Store(prepare=…)`.

    It raises NotAnOutbox, having changed nothing, for a file that holds other tables and no inbox.
    """

    def prepare(connection: sqlite3.Connection) -> None:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if "durablews_meta" in names:
            raise NotAnOutbox(path, "this is a client's outbox; serve needs a file of its own")
        if names and (installed_schema(connection) is None or "durablews_inbox" not in names):
            raise NotAnOutbox(path, "this is another program's database; serve needs a file of its own")
        connection.execute(_TABLE)

    return prepare


def keeper(*, clock: Clock | None = None) -> ApplyFrame:
    """Return what stores a whole frame and refuses nothing; `clock` gives `received_at`."""
    wall = (clock or SystemClock()).wall

    def keep(connection: sqlite3.Connection, stream: str, priority: int, items: Sequence[Item]) -> None:
        now = wall()
        rows = [(stream, priority, item.seq, item.meta.topic, item.payload, now) for item in items]
        connection.executemany(_INSERT, rows)

    return keep
