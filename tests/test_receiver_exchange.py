"""Rules and ledger together: what is applied, what is remembered, what is answered."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from durablews.receiver import ledger
from durablews.receiver.exchange import Exchange, Outcome
from durablews.receiver.inbox import inbox_tables, keeper
from durablews.receiver.messages import Message
from durablews.receiver.session import Refusal, Session
from durablews.wire.frames import JSON, Codec, Hello, Item, ItemMeta

STREAM = "ab" * 16
DAY = 24 * 3600 * 1000


def database(path: str | Path = ":memory:") -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=0.05)
    if path != ":memory:":
        connection.execute("PRAGMA journal_mode=WAL")
    ledger.install(connection)
    connection.execute("CREATE TABLE IF NOT EXISTS applied (id INTEGER PRIMARY KEY, priority, seq)")
    return connection


class Client:
    """One connection of a client that says what it is told to."""

    def __init__(self, connection: sqlite3.Connection, *, stream: str = STREAM, owner: str | None = None) -> None:
        self.connection = connection
        self.stream = stream
        self.exchange = Exchange(Session(Codec(JSON), window=64, max_bytes=65_536), owner=owner)

    def hello(self, last: int = 1000, instance: str = "0" * 16) -> Outcome:
        data = Codec(JSON).encode(Hello(self.stream, instance, last, 1 << 20)).decode()
        return self.exchange.handle(self.connection, data, insert)

    def msgs(
        self,
        *seqs: int,
        after: int | None = None,
        priority: int = 0,
        apply: Callable[[sqlite3.Connection, Message], Refusal | None] | None = None,
        savepoints: bool = True,
    ) -> Outcome:
        items = [Item(seq, "1", ItemMeta()) for seq in seqs]
        data = Codec(JSON).encode_msgs(priority, after, [item.outgoing() for item in items]).decode()
        return self.exchange.handle(self.connection, data, apply or insert, savepoints=savepoints)


def insert(connection: sqlite3.Connection, message: Message) -> Refusal | None:
    connection.execute("INSERT INTO applied (priority, seq) VALUES (?, ?)", (message.priority, message.seq))
    return None


def refuse(*seqs: int, retry: float | None = None) -> Callable[[sqlite3.Connection, Message], Refusal | None]:
    def apply(connection: sqlite3.Connection, message: Message) -> Refusal | None:
        insert(connection, message)
        return Refusal("invalid", retry=retry) if message.seq in seqs else None

    return apply


def failing(connection: sqlite3.Connection, message: Message) -> Refusal | None:
    insert(connection, message)
    raise ValueError("the application failed")


def told(outcome: Outcome) -> list[dict[str, Any]]:
    return [json.loads(frame) for frame in outcome.frames]


def applied(connection: sqlite3.Connection) -> list[int]:
    return [row[0] for row in connection.execute("SELECT seq FROM applied ORDER BY id")]


def number(connection: sqlite3.Connection, priority: int = 0) -> int:
    row = connection.execute("SELECT seq FROM durablews_seen WHERE priority = ?", (priority,)).fetchone()
    return row[0] if row else 0


def test_s1_what_is_acked_is_committed(tmp_path: Path) -> None:
    """S1: when the ack is there, another connection to the file sees the effect and the number."""
    client = Client(database(tmp_path / "s.db"))
    client.hello()
    assert told(client.msgs(1, 2)) == [{"t": "ack", "p": 0, "s": 2}]
    other = sqlite3.connect(tmp_path / "s.db")
    assert applied(other) == [1, 2]
    assert number(other) == 2
    other.close()
    client.connection.close()


def test_s2_a_repeat_is_acked_and_applied_no_more() -> None:
    """S2: a repeat changes nothing and is acked, also when the application would refuse it now (P5)."""
    client = Client(database())
    client.hello()
    client.msgs(1, 2)
    for _ in range(2):
        outcome = client.msgs(1, 2, apply=refuse(1, 2))
        assert told(outcome) == [{"t": "ack", "p": 0, "s": 2}]
    assert applied(client.connection) == [1, 2]


def test_s2_each_priority_has_a_number_of_its_own() -> None:
    """S2: a higher sequence in one priority makes no repeat of a lower one in another."""
    client = Client(database())
    client.hello()
    client.msgs(9, priority=1)
    client.msgs(3)
    assert applied(client.connection) == [9, 3]
    assert (number(client.connection, 1), number(client.connection)) == (9, 3)


def test_s2_the_number_never_decreases() -> None:
    """S2: raising the number to a lower one leaves it."""
    connection = database()
    ledger.raise_number(connection, STREAM, 0, 9, now=0)
    ledger.raise_number(connection, STREAM, 0, 4, now=0)
    assert number(connection) == 9


def test_s3_a_refused_message_is_rolled_back_and_what_came_before_stays() -> None:
    """S3: what a refused message wrote is gone, its frame's earlier ones stay and are acked before the nack."""
    client = Client(database())
    client.hello()
    outcome = client.msgs(1, 2, 3, apply=refuse(2))
    assert told(outcome) == [
        {"t": "ack", "p": 0, "s": 1},
        {"t": "nack", "p": 0, "s": 2, "final": True, "code": "invalid"},
    ]
    assert (outcome.applied, outcome.refused) == (1, 2)
    assert applied(client.connection) == [1]


def test_s3_frames_behind_a_refusal_are_ignored_in_silence() -> None:
    """S3: what was sent behind a refused message is not applied, acked or nacked until it comes again."""
    client = Client(database())
    client.hello()
    client.msgs(1, 2, apply=refuse(2))
    outcome = client.msgs(3, after=2)
    assert (outcome.frames, outcome.close) == ((), None)
    assert applied(client.connection) == [1]
    assert told(client.msgs(3, after=1)) == [{"t": "ack", "p": 0, "s": 3}]


def test_s3_lost_state_is_reported_and_closed_with_1012() -> None:
    """S3: a predecessor that was acked and is not known any more ends the connection, visibly."""
    client = Client(database())
    client.hello()
    client.msgs(1, 2)
    client.connection.execute("DELETE FROM durablews_seen")
    outcome = client.msgs(3, after=2)
    assert outcome.close is not None
    assert outcome.close.code == 1012
    assert "lost" in str(outcome.error)
    assert applied(client.connection) == [1, 2]
    assert not client.connection.in_transaction


def test_s4_a_failed_transaction_is_nacked_and_leaves_nothing() -> None:
    """S4: a failure rolls the whole frame back, nacks its first message, and carries the error to the caller."""
    client = Client(database())
    client.hello()
    outcome = client.msgs(1, 2, apply=failing)
    assert told(outcome)[0]["s"] == 1
    assert isinstance(outcome.error, ValueError)
    assert applied(client.connection) == []
    assert number(client.connection) == 0
    assert client.msgs(3, after=2).frames == ()
    client.msgs(1, 2, 3)
    assert applied(client.connection) == [1, 2, 3]


def test_s4_a_failure_behind_a_repeat_closes() -> None:
    """S4: when the failed frame starts with a repeat there is nothing to nack: 1013."""
    client = Client(database())
    client.hello()
    client.msgs(1)
    outcome = client.msgs(1, 2, apply=failing)
    assert outcome.frames == ()
    assert outcome.close is not None
    assert outcome.close.code == 1013


def test_s4_a_locked_store_is_nacked(tmp_path: Path) -> None:
    """S4: when another program holds the write lock the client is told to come again, and nothing hangs."""
    client = Client(database(tmp_path / "s.db"))
    client.hello()
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    outcome = client.msgs(1)
    assert [f["t"] for f in told(outcome)] == ["nack"]
    assert isinstance(outcome.error, sqlite3.OperationalError)
    other.close()
    client.connection.close()


def test_a_commit_that_fails_for_unknown_reasons_is_not_nacked() -> None:
    """A nack says "not taken"; when a commit fails that cannot be known, so the connection is closed with 1013."""

    class FailingCommit(sqlite3.Connection):
        broken = False

        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            if self.broken and sql == "COMMIT":
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(sql, parameters)

    connection = sqlite3.connect(":memory:", isolation_level=None, factory=FailingCommit)
    ledger.install(connection)
    connection.execute("CREATE TABLE applied (id INTEGER PRIMARY KEY, priority, seq)")
    client = Client(connection)
    client.hello()
    connection.broken = True
    outcome = client.msgs(1)
    assert outcome.frames == ()
    assert outcome.close is not None
    assert outcome.close.code == 1013
    assert not connection.in_transaction


def test_an_application_that_commits_by_itself_is_told() -> None:
    """An effect committed without its number is an error, never an ack."""

    def commit(connection: sqlite3.Connection, message: Message) -> Refusal | None:
        connection.execute("COMMIT")
        return None

    client = Client(database())
    client.hello()
    outcome = client.msgs(1, apply=commit, savepoints=False)
    assert outcome.frames == ()
    assert isinstance(outcome.error, RuntimeError)


def test_s6_the_newest_connection_wins() -> None:
    """S6, P5: after a second hello nothing of the older one is applied; it is closed with the winner's instance."""
    connection = database()
    older, newer = Client(connection), Client(connection)
    older.hello(instance="1" * 16)
    older.msgs(1)
    newer.hello(instance="2" * 16)
    outcome = older.msgs(2, after=1)
    assert outcome.frames == ()
    assert outcome.close is not None
    assert (outcome.close.code, outcome.close.reason) == (4409, "instance=" + "2" * 16)
    assert applied(connection) == [1]
    assert told(newer.msgs(2)) == [{"t": "ack", "p": 0, "s": 2}]


def test_s6_a_hello_waits_for_the_older_transaction(tmp_path: Path) -> None:
    """S6: while the older connection's transaction runs, in another process too, no welcome is given."""
    mine, other = database(tmp_path / "s.db"), database(tmp_path / "s.db")
    older, newer = Client(mine), Client(other)
    older.hello()

    def meanwhile(connection: sqlite3.Connection, message: Message) -> Refusal | None:
        outcome = newer.hello()
        assert outcome.frames == ()
        assert isinstance(outcome.error, sqlite3.OperationalError)
        return insert(connection, message)

    assert told(older.msgs(1, apply=meanwhile)) == [{"t": "ack", "p": 0, "s": 1}]
    assert told(newer.hello())[0]["t"] == "welcome"
    assert older.msgs(2, after=1).frames == ()
    mine.close()
    other.close()


def test_s6_a_failure_of_an_overtaken_connection_is_not_nacked() -> None:
    """S6: a connection that lost is closed even when its frame failed."""
    connection = database()
    older, newer = Client(connection), Client(connection)
    older.hello()
    newer.hello()
    frame = older.exchange.session.receive('{"t":"msgs","p":0,"m":[[1,1]]}')
    outcome = older.exchange.fail(connection, frame, None)  # type: ignore[arg-type]
    assert outcome.close is not None
    assert outcome.close.code == 4409


def test_s8_a_stream_belongs_to_its_first_owner() -> None:
    """S8: anyone else is closed with 4403 and does not take the connection over."""
    connection = database()
    owner, thief, nobody = (Client(connection, owner=name) for name in ("anna", "bert", None))
    owner.hello()
    for other in (thief, nobody):
        outcome = other.hello()
        assert outcome.frames == ()
        assert outcome.close is not None
        assert outcome.close.code == 4403
    assert told(owner.msgs(1)) == [{"t": "ack", "p": 0, "s": 1}]


def test_s8_a_stream_without_owner_is_claimed_by_the_first_who_authenticates() -> None:
    """S8: a server that introduces authentication keeps its clients."""
    connection = database()
    Client(connection).hello()
    assert Client(connection, owner="anna").hello().frames
    assert Client(connection, owner="bert").hello().close is not None


def test_a_stream_that_went_back_in_time_is_told() -> None:
    """Section 5: `last` below what was seen gives rewound, nothing is applied, and a new stream goes on."""
    connection = database()
    first = Client(connection)
    first.hello()
    first.msgs(500, priority=-3)
    again = Client(connection)
    assert told(again.hello(last=499))[0]["rewound"] is True
    assert again.msgs(1).close is not None
    again.stream = "cd" * 16
    assert "rewound" not in told(again.hello(last=3))[0]
    assert told(again.msgs(1)) == [{"t": "ack", "p": 0, "s": 1}]
    assert "rewound" not in told(Client(connection).hello(last=500))[0]


def test_forgetting_takes_all_priorities_of_a_stream_at_once() -> None:
    """Section 5: a stream unheard of for 90 days is forgotten whole, a younger one is not touched."""
    connection = database()
    young = "cd" * 16
    for stream, now in ((STREAM, 0), (young, 5)):
        ledger.hello(connection, stream, "c", 0, None, instance="0" * 16, now=now)
        for priority in (0, 1):
            ledger.raise_number(connection, stream, priority, 7, now=now)
    assert ledger.forget(connection, now=90 * DAY - 1) == []
    assert ledger.forget(connection, now=90 * DAY) == [STREAM]
    assert {row[0] for row in connection.execute("SELECT stream FROM durablews_seen")} == {young}
    with pytest.raises(ValueError, match="90 days"):
        ledger.forget(connection, now=0, unheard_for=DAY)


def test_messages_count_as_being_heard_of() -> None:
    """Section 5: a connection that stays open for 90 days and sends is not forgotten."""
    connection = database()
    ledger.hello(connection, STREAM, "c", 0, None, instance="0" * 16, now=0)
    ledger.raise_number(connection, STREAM, 0, 7, now=89 * DAY)
    assert ledger.forget(connection, now=91 * DAY) == []


def test_a_forgotten_stream_says_hello_again() -> None:
    """A connection whose stream is forgotten under it is closed with 1012, and nothing is applied."""
    client = Client(database())
    client.hello()
    client.connection.execute("DELETE FROM durablews_streams")
    outcome = client.msgs(1)
    assert outcome.close is not None
    assert outcome.close.code == 1012
    assert applied(client.connection) == []


def test_the_inbox_keeps_text_and_bytes_as_they_came(tmp_path: Path) -> None:
    """`serve` stores JSON text as TEXT and bytes as BLOB, in order, with the number."""
    connection = sqlite3.connect(tmp_path / "inbox.db", isolation_level=None)
    inbox_tables("inbox.db")(connection)
    ledger.install(connection)
    client = Client(connection)
    client.hello()
    items = [Item(4, '{"a": 1.0}', ItemMeta(topic="t")), Item(7, b"\x00\xff", ItemMeta())]
    data = Codec(JSON).encode_msgs(1, None, [item.outgoing() for item in items]).decode()
    assert told(client.exchange.handle_frame(connection, data, keeper())) == [{"t": "ack", "p": 1, "s": 7}]
    query = "SELECT id, stream, priority, seq, topic, payload, typeof(payload) FROM durablews_inbox ORDER BY id"
    assert connection.execute(query).fetchall() == [
        (1, STREAM, 1, 4, "t", '{"a": 1.0}', "text"),
        (2, STREAM, 1, 7, None, b"\x00\xff", "blob"),
    ]
    connection.close()
