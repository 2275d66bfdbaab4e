"""The SQL interface: an INSERT into durablews_outbox, from any language, is a valid enqueue or an error."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import (
    FakeClock,
    application_database,
    column,
    departed,
    enqueue,
    new_outbox,
    set_caps,
    sized,
    store,
    totals,
    waiting,
)

from durablews import entries, schema
from durablews.jobs import transaction
from durablews.settlement import stamp_unseen


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = new_outbox(tmp_path)
    yield connection
    connection.close()


def insert(connection: sqlite3.Connection, **values: object) -> None:
    names = ", ".join(values)
    marks = ", ".join("?" for _ in values)
    connection.execute(f"INSERT INTO durablews_outbox ({names}) VALUES ({marks})", list(values.values()))


def only_row(connection: sqlite3.Connection) -> dict[str, object]:
    cursor = connection.execute("SELECT * FROM durablews_entries")
    (row,) = cursor.fetchall()
    return dict(zip([name for name, *_ in cursor.description], row, strict=True))


def test_the_command_line_of_sqlite_can_enqueue(tmp_path: Path) -> None:
    """`INSERT INTO durablews_outbox (payload)` in a shell needs nothing but the payload: all else has its default."""
    new_outbox(tmp_path).close()
    sql = "INSERT INTO durablews_outbox (payload) VALUES ('{\"celsius\": 21.4}')"
    command = shutil.which("sqlite3")
    if command is not None:
        done = subprocess.run([command, tmp_path / "agent.db", sql], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    else:
        with sqlite3.connect(tmp_path / "agent.db") as plain:
            plain.execute(sql)
        plain.close()
    connection = sqlite3.connect(tmp_path / "agent.db")
    row = only_row(connection)
    created = row.pop("created_at")
    now = connection.execute("SELECT unixepoch() * 1000").fetchone()[0]
    assert isinstance(created, int)
    assert now - 60_000 < created <= now + 1000
    assert row == {
        "seq": 1,
        "priority": 0,
        "ack_state": 0,
        "transmissions": 0,
        "nacks": 0,
        "sent_at": None,
        "refusal": None,
        "born": None,
        "ttl": None,
        "topic": None,
        "headers": None,
        "bytes": 17,
        "checksum": None,
        "payload": '{"celsius": 21.4}',
    }
    counts = totals(connection)
    assert (counts["messages"], counts["bytes"], counts["enqueued"]) == (1, 17, 1)
    connection.close()


def test_a_row_of_plain_sql_is_sent_like_any_other(outbox: sqlite3.Connection) -> None:
    """With every column given, what peek returns is what was inserted; ttl is in seconds."""
    insert(outbox, payload='{"a": "ä"}', priority=7, topic="t", headers='{"k": "v"}', ttl=2.5)
    insert(outbox, payload=b"\x00\xff", priority=-100)
    (first, second), unfit = entries.peek(outbox, after={}, limit=10, max_bytes=1000)
    assert unfit == []
    assert (first.priority, first.payload, first.topic, first.headers) == (7, '{"a": "ä"}', "t", '{"k": "v"}')
    assert (second.priority, second.payload, second.bytes) == (-100, b"\x00\xff", 2)
    assert column(outbox, "SELECT ttl FROM durablews_entries ORDER BY seq") == [2500, None]
    assert column(outbox, "SELECT ttl FROM durablews_outbox ORDER BY seq") == [2.5, None]


def test_a_null_stands_for_the_default(outbox: sqlite3.Connection) -> None:
    """A language that always names every column may give NULL for what it does not care about."""
    insert(
        outbox, seq=None, payload="1", priority=None, topic=None, headers=None, ttl=None, created_at=None, bytes=None
    )
    row = only_row(outbox)
    assert (row["priority"], row["topic"], row["headers"], row["ttl"], row["bytes"]) == (0, None, None, None, 1)
    assert row["created_at"] is not None


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "no payload": ({"payload": None}, "payload must be JSON text or a BLOB"),
    "number": ({"payload": 12}, "payload must be JSON text or a BLOB"),
    "fraction": ({"payload": 1.5}, "payload must be JSON text or a BLOB"),
    "no JSON": ({"payload": "hello"}, "must be valid JSON"),
    "half of JSON": ({"payload": '{"a":'}, "must be valid JSON"),
    "two of JSON": ({"payload": "1 2"}, "must be valid JSON"),
    "empty text": ({"payload": ""}, "must be valid JSON"),
    "JSON and NUL": ({"payload": "1\0"}, "must be valid JSON"),
    "NUL in a string": ({"payload": '"a\0b"'}, "must be valid JSON"),
    "JSON, NUL, more": ({"payload": '{"a":1}\0{"b":2}'}, "must be valid JSON"),
    "seq": ({"payload": "1", "seq": 5}, "gives out seq"),
    "priority too high": ({"payload": "1", "priority": 101}, "priority must be an integer"),
    "priority too low": ({"payload": "1", "priority": -101}, "priority must be an integer"),
    "priority text": ({"payload": "1", "priority": "high"}, "priority must be an integer"),
    "priority fraction": ({"payload": "1", "priority": 0.5}, "priority must be an integer"),
    "topic number": ({"payload": "1", "topic": 5}, "topic must be text"),
    "topic bytes": ({"payload": "1", "topic": b"t"}, "topic must be text"),
    "headers list": ({"payload": "1", "headers": "[]"}, "headers must be"),
    "headers number": ({"payload": "1", "headers": '{"a": 1}'}, "headers must be"),
    "headers deep": ({"payload": "1", "headers": '{"a": {"b": "c"}}'}, "headers must be"),
    "headers no JSON": ({"payload": "1", "headers": "a: b"}, "headers must be"),
    "headers bytes": ({"payload": "1", "headers": b"{}"}, "headers must be"),
    "headers and NUL": ({"payload": "1", "headers": "{}\0"}, "headers must be"),
    "ttl nothing": ({"payload": "1", "ttl": 0}, "ttl must be"),
    "ttl before": ({"payload": "1", "ttl": -1}, "ttl must be"),
    "ttl text": ({"payload": "1", "ttl": "5s"}, "ttl must be"),
    "ttl forever": ({"payload": "1", "ttl": float("inf")}, "ttl must be"),
}


@pytest.mark.parametrize("verb", ["INSERT", "INSERT OR IGNORE", "INSERT OR REPLACE", "INSERT OR FAIL"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sent_is_refused(outbox: sqlite3.Connection, name: str, verb: str) -> None:
    """A row that no frame could carry is an error that says why, whatever conflict clause stands before it."""
    values, says = REFUSED[name]
    with pytest.raises(sqlite3.IntegrityError, match=f"durablews: .*{says}") as caught:
        outbox.execute(
            f"{verb} INTO durablews_outbox ({', '.join(values)}) VALUES ({', '.join('?' for _ in values)})",
            list(values.values()),
        )
    assert "hello" not in str(caught.value)
    assert waiting(outbox) == []
    assert totals(outbox)["enqueued"] == 0


@pytest.mark.parametrize(
    "payload", ['{"a":[1,2.5e3,null,true,"\\u0000"]}', '"text"', "12", "null", " [1] ", '"\\ud800"']
)
def test_any_json_is_a_payload(outbox: sqlite3.Connection, payload: str) -> None:
    """Every JSON value is taken as it is written, to the last space."""
    insert(outbox, payload=payload)
    (entry,), _ = entries.peek(outbox, after={}, limit=1, max_bytes=1000)
    assert entry.payload == payload


def test_what_was_sent_cannot_be_changed_or_removed(outbox: sqlite3.Connection) -> None:
    """UPDATE and DELETE on the view are refused, and an upsert is no way around it."""
    insert(outbox, payload="1")
    for sql in ("UPDATE durablews_outbox SET payload = '2'", "DELETE FROM durablews_outbox"):
        with pytest.raises(sqlite3.IntegrityError, match=r"durablews: .* is refused"):
            outbox.execute(sql)
    with pytest.raises(sqlite3.OperationalError, match="cannot UPSERT a view"):
        outbox.execute("INSERT INTO durablews_outbox (payload) VALUES ('2') ON CONFLICT DO NOTHING")
    assert column(outbox, "SELECT payload FROM durablews_outbox") == ["1"]


def test_returning_says_only_what_was_given(outbox: sqlite3.Connection) -> None:
    """RETURNING works and shows the statement's own values: the sequence is NULL there, and stored all the same."""
    rows = outbox.execute(
        "INSERT INTO durablews_outbox (payload, priority) VALUES ('1', 5) RETURNING seq, payload, priority, ack_state"
    ).fetchall()
    assert rows == [(None, "1", 5, None)]
    assert waiting(outbox) == [1]


def test_a_statement_of_many_rows_is_whole_or_nothing(outbox: sqlite3.Connection) -> None:
    """One bad row takes its statement back, and leaves the transaction around it as it was."""
    with transaction(outbox):
        insert(outbox, payload="1")
        with pytest.raises(sqlite3.IntegrityError, match="valid JSON"):
            outbox.execute("INSERT INTO durablews_outbox (payload) VALUES ('2'), ('bad'), ('3')")
        insert(outbox, payload="4")
    assert column(outbox, "SELECT payload FROM durablews_entries ORDER BY seq") == ["1", "4"]
    assert totals(outbox)["messages"] == 2


def test_caps_of_a_full_outbox_say_so_under_any_conflict_clause(outbox: sqlite3.Connection) -> None:
    """`INSERT OR IGNORE` does not turn a full outbox into silence."""
    set_caps(outbox, max_messages=1)
    insert(outbox, payload="1")
    for verb in ("INSERT", "INSERT OR IGNORE", "INSERT OR REPLACE"):
        with pytest.raises(sqlite3.IntegrityError, match=r"the outbox is full \(message cap\)"):
            outbox.execute(f"{verb} INTO durablews_outbox (payload) VALUES ('2')")
    assert totals(outbox)["messages"] == 1


def test_an_insert_in_the_applications_transaction_goes_with_it(tmp_path: Path) -> None:
    """In the application's own database, its row and our message are committed, or rolled back, together."""
    path = application_database(tmp_path)
    connection = sqlite3.connect(path, isolation_level=None)
    with transaction(connection):
        schema.apply_migrations(connection, str(path))
    connection.execute(
        "CREATE TRIGGER tell AFTER INSERT ON orders BEGIN"
        " INSERT INTO durablews_outbox (payload, topic) VALUES (json_object('id', NEW.id, 'what', NEW.what), 'orders');"
        " END"
    )
    connection.execute("BEGIN")
    connection.execute("INSERT INTO orders (what) VALUES ('lost')")
    connection.execute("ROLLBACK")
    connection.execute("INSERT INTO orders (what) VALUES ('kept')")
    (entry,), _ = entries.peek(connection, after={}, limit=10, max_bytes=1000)
    assert (entry.topic, json.loads(entry.payload)) == ("orders", {"id": 1, "what": "kept"})
    assert totals(connection)["messages"] == 1
    connection.close()


@pytest.mark.parametrize("pragma", ["recursive_triggers = ON", "reverse_unordered_selects = ON", "foreign_keys = ON"])
def test_the_settings_of_the_inserting_program_do_not_matter(outbox: sqlite3.Connection, pragma: str) -> None:
    """A program with PRAGMAs of its own enqueues, and makes room, like any other."""
    outbox.execute(f"PRAGMA {pragma}")
    set_caps(outbox, max_messages=2, overflow="drop_oldest")
    for number in range(4):
        insert(outbox, payload=str(number))
    assert column(outbox, "SELECT payload FROM durablews_entries ORDER BY seq") == ["2", "3"]
    assert totals(outbox)["dropped"] == 2


def test_a_program_that_trusts_no_schema_is_told(outbox: sqlite3.Connection) -> None:
    """SQLite up to 3.40 calls its own json_valid unsafe under `trusted_schema = OFF`: then an error, never silence."""
    outbox.execute("PRAGMA trusted_schema = OFF")
    said = ""
    try:
        insert(outbox, payload="1")
    except sqlite3.OperationalError as exc:
        said = str(exc)
    assert (said, totals(outbox)["enqueued"]) in [("", 1), ("unsafe use of json_valid()", 0)]


def test_last_insert_rowid_of_the_program_is_left_alone(outbox: sqlite3.Connection) -> None:
    """A trigger that enqueues does not change what `last_insert_rowid()` says to the application."""
    outbox.execute("CREATE TEMP TABLE mine (id INTEGER PRIMARY KEY)")
    outbox.execute("INSERT INTO mine VALUES (4711)")
    insert(outbox, payload="1")
    assert column(outbox, "SELECT last_insert_rowid()") == [4711]


# -- drop_oldest


def test_one_insert_drops_at_most_a_thousand(outbox: sqlite3.Connection) -> None:
    """A row that would have to destroy more fails and destroys nothing; the library's own send makes the room."""
    clock = FakeClock()
    store(outbox, clock, *(sized(1) for _ in range(1205)))
    set_caps(outbox, overflow="drop_oldest", max_bytes=1205)
    insert(outbox, payload=b"x" * 1000)
    assert (totals(outbox)["dropped"], totals(outbox)["bytes"]) == (1000, 1205)
    set_caps(outbox, max_bytes=1 << 20)
    store(outbox, clock, *(sized(1) for _ in range(900)))
    set_caps(outbox, max_messages=5)
    before = (totals(outbox), waiting(outbox))
    with pytest.raises(sqlite3.IntegrityError, match="the outbox is full"):
        insert(outbox, payload="1")
    assert (totals(outbox), waiting(outbox)) == before
    store(outbox, clock, sized(1))
    insert(outbox, payload="1")
    assert totals(outbox)["messages"] == 5


def test_a_thousand_are_the_right_thousand(outbox: sqlite3.Connection) -> None:
    """Also with thousands in every standing, the first to go is the oldest never sent of the lowest priority."""
    clock = FakeClock()
    store(outbox, clock, *(sized(1, priority=1) for _ in range(1500)))
    low = store(outbox, clock, *(sized(1, priority=-1) for _ in range(1500)))
    outbox.execute("UPDATE durablews_entries SET ack_state = 1 WHERE seq % 3 = 0")
    unsent = [seq for seq in low if seq % 3]
    set_caps(outbox, overflow="drop_oldest", max_messages=3000)
    insert(outbox, payload="1", priority=100)
    assert departed(outbox) == [(unsent[0], "dropped", 0)]
    set_caps(outbox, max_bytes=3000)
    insert(outbox, payload=b"x" * 1000, priority=100)
    assert {seq for seq, *_ in departed(outbox)} == {*unsent, 1}


def test_the_departed_are_remembered_up_to_ten_thousand(outbox: sqlite3.Connection) -> None:
    """The list of what left without an ack keeps its newest 10 000 whichever way in drops them."""
    clock = FakeClock()
    set_caps(outbox, max_messages=100, overflow="drop_oldest")
    store(outbox, clock, *(sized(1) for _ in range(100)))
    for _ in range(101):
        store(outbox, clock, *(sized(1) for _ in range(100)))
    for _ in range(50):
        insert(outbox, payload="1")
    left = [seq for seq, *_ in departed(outbox)]
    assert left == list(range(151, 10_151))
    assert totals(outbox)["dropped"] == 10_150


def test_an_insert_costs_the_same_however_much_waits(outbox: sqlite3.Connection) -> None:
    """While there is room, no INSERT looks at what waits, under any policy."""
    clock = FakeClock()
    enqueue(outbox, clock, [sized(1) for _ in range(5000)])
    for overflow in ("reject", "drop_oldest", "drop_new"):
        set_caps(outbox, overflow=overflow)
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        outbox.set_progress_handler(count, 100)
        insert(outbox, payload="1")
        outbox.set_progress_handler(None, 0)
        assert steps <= 5, overflow


def test_the_age_of_a_foreign_row_starts_when_it_is_seen(outbox: sqlite3.Connection) -> None:
    """The drainer stamps what plain SQL inserted, once; rows that have an age keep it."""
    clock = FakeClock()
    insert(outbox, payload="1")
    store(outbox, clock, sized(1))
    with transaction(outbox):
        stamp_unseen(outbox, 777)
        stamp_unseen(outbox, 888)
    assert column(outbox, "SELECT born FROM durablews_entries ORDER BY seq") == [777, 0]


def test_the_view_shows_what_waits_in_words(outbox: sqlite3.Connection) -> None:
    """SELECT from durablews_outbox names each standing."""
    for state in range(4):
        insert(outbox, payload=str(state))
        outbox.execute("UPDATE durablews_entries SET ack_state = ? WHERE seq = ?", (state, state + 1))
    shown = column(outbox, "SELECT ack_state FROM durablews_outbox ORDER BY seq")
    assert shown == ["pending", "unanswered", "refused", "aside"]
