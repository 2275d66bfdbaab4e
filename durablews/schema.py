"""Finds the migrations, runs them, and says whether a database holds an outbox and of which schema.

A migration is a file ``NNNN_name.sql`` without BEGIN or COMMIT of its own; NNNN is the `schema` that it leads to. All
that a database lacks is run in one transaction, and a released file never changes.
"""

from __future__ import annotations

import re
import sqlite3
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from durablews.errors import NotAnOutbox, OutboxTooNew

__all__ = ["APPLICATION_ID", "apply_migrations", "migrations", "require_outbox", "schema_of", "split_statements"]

#: "dwso" in the header of a file of our own (SQLite's application_id); an application's file keeps its own.
APPLICATION_ID = 0x6477736F

_NAME = re.compile(r"^(\d{4})_[a-z0-9_]+\.sql$")


def _folder() -> Traversable:
    """Return the folder of migrations: inside an installed package, or beside it in a checkout."""
    packaged = files("durablews") / "_migrations"
    if packaged.is_dir():
        return packaged
    checkout = Path(__file__).resolve().parents[1]
    # Without this guard a broken wheel would run whatever site-packages/migrations belongs to.
    if (checkout / "pyproject.toml").is_file():
        return checkout / "migrations"
    raise RuntimeError("durablews was installed without its migrations; install it again")


def migrations() -> list[tuple[int, str]]:
    """Return every migration as its number and its SQL, in order."""
    found = sorted((item.name, item) for item in _folder().iterdir() if _NAME.match(item.name))
    return [(int(name[:4]), item.read_text(encoding="utf-8")) for name, item in found]


def split_statements(script: str) -> list[str]:
    """Split a script as SQLite does, triggers and quoted semicolons included.

    Not `executescript`: that commits whatever transaction is open before it begins.
    """
    statements, pending = [], ""
    for piece in re.split(r"(?<=;)", script):
        pending += piece
        if sqlite3.complete_statement(pending):
            statements.append(pending.strip())
            pending = ""
    if pending.strip():  # comments at the end, or a last statement without its semicolon
        statements.append(pending.strip())
    return statements


def schema_of(connection: sqlite3.Connection) -> int:
    """Return the schema of the outbox in this database; 0 when it holds none."""
    if connection.execute("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'durablews_meta'").fetchone():
        row = connection.execute("SELECT schema FROM durablews_meta").fetchone()
        return int(row[0]) if row else 0
    return 0


def apply_migrations(connection: sqlite3.Connection, path: str) -> int:
    """Bring the outbox of this database to the newest schema; the caller holds the transaction.

    Returns:
        The schema before; the newest one means that nothing was done.

    Raises:
        OutboxTooNew: a newer durablews wrote it. Nothing was touched.
    """
    present, known = schema_of(connection), migrations()
    newest = known[-1][0]
    if present > newest:
        raise OutboxTooNew(
            path,
            f"its schema is {present} and this durablews knows up to {newest}; nothing was touched, update durablews",
        )
    for number, script in known:
        if number > present:
            for statement in split_statements(script):
                connection.execute(statement)
            connection.execute("UPDATE durablews_meta SET schema = ?", (number,))
    return present


def require_outbox(connection: sqlite3.Connection, path: str) -> int:
    """Return the schema of the outbox in this database, for who only reads or writes what is there.

    Raises:
        NotAnOutbox: it holds none.
        OutboxTooNew: a newer durablews wrote it.
    """
    present = schema_of(connection)
    if present == 0:
        raise NotAnOutbox(path, "a SQLite database, but it holds no durablews outbox")
    newest = migrations()[-1][0]
    if present > newest:
        raise OutboxTooNew(path, f"its schema is {present} and this durablews knows up to {newest}; update durablews")
    return present
