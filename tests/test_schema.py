"""Migrations: what a fresh file gets is what an old one becomes, and a newer file is left alone."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import FakeClock, application_database, enqueue, new_outbox, open_again, sized, totals, waiting

from durablews import database, schema
from durablews.errors import NotAnOutbox, OutboxTooNew, StorageFailed
from durablews.jobs import transaction

NAMES = sorted(path.name for path in (Path(__file__).resolve().parents[1] / "migrations").glob("*.sql"))

#: SHA-256 of every migration that a release contains: add one at its release, and never change a line here.
#: 0001 is not in it, because it may still change until 0.1.0 is out.
RELEASED: dict[str, str] = {}

NEXT = "CREATE TABLE durablews_later (a TEXT) STRICT; -- a table; added\nUPDATE durablews_caps SET max_age = 9;"


@pytest.fixture
def memory() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    yield connection
    connection.close()


def later_version(monkeypatch: pytest.MonkeyPatch, script: str = NEXT) -> int:
    """Pretend to be the next version of durablews, and return its schema."""
    known = schema.migrations()
    known.append((known[-1][0] + 1, script))
    for module in (schema, database):
        monkeypatch.setattr(module, "migrations", lambda: known)
    return known[-1][0]


def described(connection: sqlite3.Connection) -> list[tuple[str, str, str]]:
    return connection.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY type, name").fetchall()


def test_migrations_are_numbered_from_one_without_a_gap() -> None:
    """The numbers of the files are 1, 2, 3 and so on, each once, and every file of the folder is one of them."""
    assert [int(name[:4]) for name in NAMES] == list(range(1, len(NAMES) + 1))
    assert [number for number, _ in schema.migrations()] == list(range(1, len(NAMES) + 1))


@pytest.mark.parametrize("stop", range(1, len(NAMES) + 1))
def test_an_old_outbox_becomes_what_a_fresh_one_is(
    memory: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Whatever schema a file has reached, migrations make the same tables, indexes and triggers of it (P9)."""
    fresh = sqlite3.connect(":memory:", isolation_level=None)
    schema.apply_migrations(fresh, "fresh")
    known = schema.migrations()
    monkeypatch.setattr(schema, "migrations", lambda: known[:stop])
    assert schema.apply_migrations(memory, "old") == 0
    monkeypatch.setattr(schema, "migrations", lambda: known)
    assert schema.apply_migrations(memory, "old") == stop
    assert schema.schema_of(memory) == known[-1][0]
    assert described(memory) == described(fresh)
    fresh.close()


def test_nothing_is_done_to_an_outbox_that_is_up_to_date(memory: sqlite3.Connection) -> None:
    """Running the migrations again changes nothing and says which schema it found."""
    schema.apply_migrations(memory, "new")
    before = (described(memory), memory.total_changes)
    assert schema.apply_migrations(memory, "new") == schema.migrations()[-1][0]
    assert (described(memory), memory.total_changes) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_migration_leaves_the_transaction_to_its_runner(memory: sqlite3.Connection, name: str) -> None:
    """No statement of a migration begins or ends a transaction, and rolling one back leaves no trace."""
    memory.execute("BEGIN")
    for number, script in schema.migrations():
        for statement in schema.split_statements(script):
            memory.execute(statement)
            assert memory.in_transaction, statement
        if number == int(name[:4]):
            break
    memory.execute("ROLLBACK")
    assert described(memory) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_released_migration_never_changes(name: str) -> None:
    """What a release has run on its users' files is the same in every later release."""
    content = (Path(__file__).resolve().parents[1] / "migrations" / name).read_bytes()
    assert RELEASED.get(name, hashlib.sha256(content).hexdigest()) == hashlib.sha256(content).hexdigest()
    assert set(RELEASED) <= set(NAMES)


def test_a_later_version_opens_an_older_outbox_and_keeps_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer durablews migrates the file in place: every message, count and sequence is as it was (P9)."""
    old = new_outbox(tmp_path)
    enqueue(old, FakeClock(), [sized(10) for _ in range(20)])
    before = (waiting(old), totals(old))
    old.close()
    newest = later_version(monkeypatch)
    connection = open_again(tmp_path / "agent.db")
    assert (waiting(connection), totals(connection)) == before
    assert connection.execute("SELECT max_age FROM durablews_caps").fetchone() == (9,)
    assert connection.execute("PRAGMA user_version").fetchone() == (newest,)
    connection.close()


def test_a_migration_that_fails_leaves_the_outbox_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All missing migrations run in one transaction: after an error the older version goes on with the file (P9)."""
    new_outbox(tmp_path).close()
    later_version(monkeypatch, NEXT + "\nINSERT INTO no_such_table VALUES (1);")
    with pytest.raises(StorageFailed):
        open_again(tmp_path / "agent.db")
    monkeypatch.undo()
    connection = open_again(tmp_path / "agent.db")
    assert schema.schema_of(connection) == schema.migrations()[-1][0]
    assert connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'durablews_later'").fetchone() == (0,)
    connection.close()


def test_a_migration_in_an_applications_database_leaves_its_user_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`user_version` belongs to the application wherever the file is the application's."""
    path = application_database(tmp_path)
    connection = sqlite3.connect(path, isolation_level=None)
    with transaction(connection):
        schema.apply_migrations(connection, str(path))
    connection.close()
    newest = later_version(monkeypatch)
    connection = open_again(path)
    assert schema.schema_of(connection) == newest
    assert connection.execute("PRAGMA user_version").fetchone() == (7,)
    assert connection.execute("PRAGMA application_id").fetchone() == (305419896,)
    connection.close()


def test_a_newer_outbox_is_refused_and_not_touched(tmp_path: Path) -> None:
    """An older durablews raises `OutboxTooNew` and not one byte of the file is different afterwards (P9)."""
    connection = new_outbox(tmp_path)
    connection.execute("UPDATE durablews_meta SET schema = 99")
    connection.close()
    path = tmp_path / "agent.db"
    before = path.read_bytes()
    with pytest.raises(OutboxTooNew, match=r"schema is 99.*update durablews"):
        database.open_outbox(str(path))
    with sqlite3.connect(path) as connection, pytest.raises(OutboxTooNew, match="nothing was touched"):
        schema.apply_migrations(connection, str(path))
    connection.close()
    database.create(str(path))
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["agent.db", "agent.db-reserve"]


def test_a_database_without_an_outbox_is_told_apart(memory: sqlite3.Connection) -> None:
    """A database without our tables, or with an empty one of that name, is no outbox."""
    assert schema.schema_of(memory) == 0
    with pytest.raises(NotAnOutbox, match="holds no durablews outbox"):
        schema.require_outbox(memory, "x")
    memory.execute("CREATE TABLE durablews_meta (schema INTEGER)")
    with pytest.raises(NotAnOutbox, match="holds no durablews outbox"):
        schema.require_outbox(memory, "x")


STATEMENTS = [
    "CREATE TABLE a (b TEXT DEFAULT 'x;y', c)",
    "CREATE TABLE d (\n    -- a comment; with a semicolon\n    e TEXT  -- and ';' one\n)",
    "INSERT INTO a VALUES ('it''s; quoted', \"b;\", [c;], `d;`)",
    "/* a; comment; */ SELECT 1",
    "CREATE TRIGGER t AFTER INSERT ON a BEGIN\n    UPDATE a SET b = ';';\n    SELECT CASE WHEN 1 THEN 2 END;\nEND",
    "CREATE TEMP TRIGGER u AFTER INSERT ON a BEGIN SELECT 1; END",
    "UPDATE a SET b = 1 -- the end;\n",
]


@given(st.lists(st.sampled_from(STATEMENTS)), st.sampled_from(["\n", " ", "", "\n-- between;\n", "  -- after;\n\n"]))
def test_a_script_is_split_as_sqlite_would(statements: list[str], between: str) -> None:
    """Triggers, quoted semicolons and comments end no statement; two on one line are two."""
    found = schema.split_statements("".join(f"{statement};{between}" for statement in statements))
    if between.strip() and found:
        found = [part for part in found if part.replace("-- between;", "").replace("-- after;", "").strip()]
    assert [part.endswith(f"{statement};") for part, statement in zip(found, statements, strict=True)] == [True] * len(
        statements
    )


def test_a_split_script_can_be_executed(memory: sqlite3.Connection) -> None:
    """Each part is one statement, and a comment at the end or a missing last semicolon is no error."""
    for statement in schema.split_statements("CREATE TABLE a (b, c); CREATE TABLE d (e); -- done;\n-- really\n"):
        memory.execute(statement)
    for statement in schema.split_statements("INSERT INTO a VALUES (';', 1);INSERT INTO d VALUES (2)"):
        memory.execute(statement)
    assert memory.execute("SELECT b, c, e FROM a, d").fetchall() == [(";", 1, 2)]
