"""What enters the outbox and what waits there: caps, overflow, order, ids, and rows that must not be sent."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support import (
    FakeClock,
    column,
    departed,
    enqueue,
    new_outbox,
    open_again,
    run_of,
    set_caps,
    sized,
    store,
    totals,
    waiting,
)

from durablews import database, entries
from durablews.entries import Gap
from durablews.errors import DurablewsError, MessageTooLarge, OutboxFull
from durablews.jobs import transaction
from durablews.messages import Draft, Refusal, draft
from durablews.settlement import mark_unanswered, refuse, settle

CAPS_PAGE = Path(__file__).resolve().parents[1] / "durablews" / "docs" / "caps.md"


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = new_outbox(tmp_path)
    yield connection
    connection.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def peek(connection: sqlite3.Connection, limit: int = 1000, max_bytes: int = 1 << 30, **options: object) -> list[int]:
    found, unfit = entries.peek(connection, after={}, limit=limit, max_bytes=max_bytes, **options)  # type: ignore[arg-type]
    assert unfit == []
    return [entry.seq for entry in found]


# -- the table of caps.md


class Outcome(NamedTuple):
    """What happens to an entry of messages of which some find no room, as the page says it and as numbers."""

    says: str
    error: bool = False
    all_stored: bool = False
    makes_room: bool = False


REJECTED = Outcome("`OutboxFull`; nothing is stored", error=True)
DROPS_OLDEST = Outcome("stored; the oldest go", all_stored=True, makes_room=True)
COUNTED = Outcome("not stored, but counted; no error")
FIRST_FIT = Outcome("the first that fit are stored, the rest is counted; no error")
SQL_ERROR = Outcome("error; nothing is stored", error=True)
TOO_LARGE = Outcome("`MessageTooLarge`; nothing is stored", error=True)

ONE, SEVERAL = "`send`, `enqueue`: one message", "`send_many`: several at once"
INSERT, INSERTS = "`INSERT INTO durablews_outbox`: one row", "`INSERT INTO durablews_outbox`: several rows"
OVERFLOWS = ("reject", "drop_oldest", "drop_new")
COLUMNS = ("message cap", "byte cap", "one message over the byte cap")

#: (entry point, overflow) -> what happens at the message cap, at the byte cap, and to what can never fit.
TABLE: dict[tuple[str, str], tuple[Outcome, Outcome, Outcome]] = {
    (ONE, "reject"): (REJECTED, REJECTED, TOO_LARGE),
    (ONE, "drop_oldest"): (DROPS_OLDEST, DROPS_OLDEST, TOO_LARGE),
    (ONE, "drop_new"): (COUNTED, COUNTED, TOO_LARGE),
    (SEVERAL, "reject"): (REJECTED, REJECTED, TOO_LARGE),
    (SEVERAL, "drop_oldest"): (DROPS_OLDEST, DROPS_OLDEST, TOO_LARGE),
    (SEVERAL, "drop_new"): (FIRST_FIT, FIRST_FIT, TOO_LARGE),
    (INSERT, "reject"): (SQL_ERROR, SQL_ERROR, SQL_ERROR),
    (INSERT, "drop_oldest"): (DROPS_OLDEST, DROPS_OLDEST, SQL_ERROR),
    (INSERT, "drop_new"): (COUNTED, COUNTED, SQL_ERROR),
    (INSERTS, "reject"): (SQL_ERROR, SQL_ERROR, SQL_ERROR),
    (INSERTS, "drop_oldest"): (DROPS_OLDEST, DROPS_OLDEST, SQL_ERROR),
    (INSERTS, "drop_new"): (FIRST_FIT, FIRST_FIT, SQL_ERROR),
}


def put(connection: sqlite3.Connection, clock: FakeClock, entry_point: str, sizes: list[int]) -> None:
    """Let messages of these sizes in by one of the entry points; raise what its caller would see."""
    if entry_point in (ONE, SEVERAL):
        (result,) = enqueue(connection, clock, [sized(size) for size in sizes])
        if isinstance(result, DurablewsError):
            raise result
    else:
        rows = ",".join("(?)" for _ in sizes)
        connection.execute(f"INSERT INTO durablews_outbox (payload) VALUES {rows}", [b"x" * size for size in sizes])


@pytest.mark.parametrize("cap", ["message cap", "byte cap"])
@pytest.mark.parametrize(("entry_point", "overflow"), TABLE)
def test_a_full_outbox_does_what_the_table_says(
    outbox: sqlite3.Connection, clock: FakeClock, entry_point: str, overflow: str, cap: str
) -> None:
    """At either cap, each way in does exactly what caps.md says: who is stored, who goes, what is counted."""
    outcome = TABLE[entry_point, overflow][COLUMNS.index(cap)]
    set_caps(outbox, overflow=overflow, **({"max_messages": 4} if cap == "message cap" else {"max_bytes": 40}))
    new = 3 if entry_point in (SEVERAL, INSERTS) else 1
    over = 2 if new == 3 else 1
    old = store(outbox, clock, *(sized(10) for _ in range(4 - new + over)))
    before = totals(outbox)
    if outcome.error:
        with pytest.raises((OutboxFull, sqlite3.IntegrityError), match="the outbox is full") as caught:
            put(outbox, clock, entry_point, [10] * new)
        assert isinstance(caught.value, OutboxFull) == ("OutboxFull" in outcome.says)
        assert not isinstance(caught.value, MessageTooLarge)
    else:
        put(outbox, clock, entry_point, [10] * new)
    after = totals(outbox)
    gone, stored = len(set(old) - set(waiting(outbox))), len(set(waiting(outbox)) - set(old))
    expected_gone = over if outcome.makes_room else 0
    expected_stored = 0 if outcome.error else new if outcome.all_stored else new - over
    assert (gone, stored) == (expected_gone, expected_stored)
    assert waiting(outbox)[: 4 - stored] == old[gone:]
    assert departed(outbox) == [(seq, "dropped", 0) for seq in old[:gone]]
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    counted = 0 if outcome.error or outcome.all_stored else over
    expected = {
        "messages": stored - gone,
        "bytes": 10 * (stored - gone),
        "enqueued": stored,
        "dropped": gone,
        "dropped_new": counted,
    }
    assert changed == {name: value for name, value in expected.items() if value}


@pytest.mark.parametrize(("entry_point", "overflow"), TABLE)
def test_what_can_never_fit_is_an_error_and_drops_nothing(
    outbox: sqlite3.Connection, clock: FakeClock, entry_point: str, overflow: str
) -> None:
    """A message larger than the byte cap is an error under every policy, and nothing makes room for it in vain."""
    outcome = TABLE[entry_point, overflow][COLUMNS.index("one message over the byte cap")]
    set_caps(outbox, overflow=overflow, max_bytes=40)
    old = store(outbox, clock, sized(10), sized(10))
    before = totals(outbox)
    with pytest.raises((MessageTooLarge, sqlite3.IntegrityError), match=r"larger than the (byte )?cap") as caught:
        put(outbox, clock, entry_point, [10, 41, 10] if entry_point in (SEVERAL, INSERTS) else [41])
    assert isinstance(caught.value, MessageTooLarge) == ("MessageTooLarge" in outcome.says)
    assert (waiting(outbox), totals(outbox), departed(outbox)) == (old, before, [])


def test_the_page_about_caps_is_the_table_that_is_tested() -> None:
    """Row for row and word for word, caps.md says what the tests above prove."""
    lines = [line for line in CAPS_PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    assert rows[0] == ("way in", "overflow", *COLUMNS)
    assert set(rows[1]) == {"---"}
    assert rows[2:] == [
        (way, f"`{overflow}`", *(outcome.says for outcome in outcomes)) for (way, overflow), outcomes in TABLE.items()
    ]


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_the_last_place_and_the_last_byte_can_be_used(
    outbox: sqlite3.Connection, clock: FakeClock, overflow: str
) -> None:
    """A cap is what may wait, not one less: exactly full is stored by every way in, and drops nothing."""
    set_caps(outbox, overflow=overflow, max_messages=6, max_bytes=60)
    for way, sizes in ((ONE, [10]), (SEVERAL, [10, 10]), (INSERT, [10]), (INSERTS, [10, 10])):
        put(outbox, clock, way, sizes)
    assert (totals(outbox)["messages"], totals(outbox)["bytes"], totals(outbox)["dropped"]) == (6, 60, 0)


def test_bytes_count_payload_topic_and_headers(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """The same message has the same size, in UTF-8 bytes, whoever stores it."""
    one = draft({"a": "ä"}, topic="tö", headers={"k": "ü"})
    store(outbox, clock, one)
    outbox.execute(
        "INSERT INTO durablews_outbox (payload, topic, headers) VALUES (?, ?, ?)", (one.payload, one.topic, one.headers)
    )
    assert column(outbox, "SELECT bytes FROM durablews_entries") == [one.bytes] * 2
    assert one.bytes == len('{"a":"ä"}'.encode()) + len("tö".encode()) + len('{"k":"ü"}'.encode())


def test_lowered_caps_take_nothing_that_waits(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """Changing the caps drops nothing by itself; only the next message meets them, and values not given stay."""
    old = store(outbox, clock, *(sized(10) for _ in range(20)))
    set_caps(outbox, max_messages=5)
    assert waiting(outbox) == old
    (result,) = enqueue(outbox, clock, [sized(10)])
    assert isinstance(result, OutboxFull)
    set_caps(outbox, overflow="drop_oldest")
    (new,) = store(outbox, clock, sized(10))
    assert waiting(outbox) == [*old[-4:], new]
    caps = entries.read_caps(outbox)
    assert (caps.max_messages, caps.max_bytes, caps.max_age, caps.overflow) == (5, 1 << 30, None, "drop_oldest")
    set_caps(outbox, max_age=1000)
    set_caps(outbox, max_age=None)
    assert entries.read_caps(outbox).max_age is None


@pytest.mark.parametrize("bad", [{"max_messages": 0}, {"max_bytes": -1}, {"max_age": 0}, {"overflow": "perhaps"}])
def test_a_cap_that_makes_no_sense_is_refused(outbox: sqlite3.Connection, bad: dict[str, object]) -> None:
    """The file itself refuses caps that would store nothing, or mean nothing."""
    before = entries.read_caps(outbox)
    with pytest.raises(sqlite3.IntegrityError, match="CHECK constraint failed"):
        set_caps(outbox, **bad)
    assert entries.read_caps(outbox) == before


def test_requests_of_one_transaction_stand_or_fall_alone(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """Several callers share a transaction: one that finds no room does not take the others with it."""
    set_caps(outbox, max_messages=3)
    results = enqueue(outbox, clock, [sized(1)], [sized(1)] * 3, [sized(1)], [sized(1)], [sized(1)])
    assert [type(result) for result in results] == [list, OutboxFull, list, list, OutboxFull]
    assert [seq for result in results if isinstance(result, list) for seq in result] == waiting(outbox)
    assert "none of the 3 messages was stored" in str(results[1])
    assert "3 of 3 messages and 3 of 1073741824 bytes wait; the message was not stored" in str(results[4])


def test_what_is_stored_keeps_the_order_of_its_requests(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """Sequences follow each other through requests of every size, whichever statement writes them."""
    requests = [[draft([number, position]) for position in range(number)] for number in (1, 63, 64, 65, 0, 200, 1)]
    results = enqueue(outbox, clock, *requests)
    flat = [seq for result in results if isinstance(result, list) for seq in result]
    assert flat == list(range(1, len(flat) + 1)) == waiting(outbox)
    stored = column(outbox, "SELECT payload FROM durablews_entries ORDER BY seq")
    assert stored == [one.payload for request in requests for one in request]


@pytest.mark.parametrize("odd", ["ttl", "topic", "headers", "bytes", "priority"])
def test_one_message_among_many_keeps_what_it_alone_has(outbox: sqlite3.Connection, clock: FakeClock, odd: str) -> None:
    """Whatever statement stores it with its neighbours, wherever it stands among them."""
    extra: dict[str, object] = {"ttl": 7.5, "topic": "t", "headers": {"h": "1"}, "priority": 5}
    for place in (0, 63, 64, 99, 126):
        settings = {odd: extra[odd]} if odd in extra else {}
        drafts = [draft({"n": number}) for number in range(127)]
        drafts[place] = draft(b"\x00odd", **settings)  # type: ignore[arg-type]
        seqs = store(outbox, clock, *drafts)
        rows = outbox.execute(
            "SELECT priority, created_at, born, ttl, topic, headers, bytes, checksum, payload FROM durablews_entries"
            " WHERE seq BETWEEN ? AND ? ORDER BY seq",
            (seqs[0], seqs[-1]),
        ).fetchall()
        born = entries.outbox_time(outbox, clock)
        assert rows == [
            (d.priority, clock.wall(), born, d.ttl, d.topic, d.headers, d.bytes, d.checksum, d.payload) for d in drafts
        ]


def test_one_draft_may_be_stored_twice(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """A caller that puts the very same message object in a request twice gets two messages, also at the caps."""
    set_caps(outbox, max_messages=3, overflow="drop_new")
    one = sized(5)
    ((*seqs,),) = enqueue(outbox, clock, [one, one, one, one])  # type: ignore[misc]
    assert seqs == [1, 2, 3, Gap()]


def test_dropping_new_ones_of_a_large_request_is_quick(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """Under `drop_new` the work for a request that finds little room grows with its size, not with its square."""
    set_caps(outbox, max_messages=10, overflow="drop_new")
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    outbox.set_progress_handler(count, 100)
    (result,) = enqueue(outbox, clock, [sized(1)] * 20_000)
    outbox.set_progress_handler(None, 0)
    assert isinstance(result, list)
    assert result[9:11] == [10, Gap()]
    assert (totals(outbox)["messages"], totals(outbox)["dropped_new"]) == (10, 19_990)
    assert steps < 100


# -- drop_oldest


def standing(connection: sqlite3.Connection, clock: FakeClock) -> dict[str, int]:
    """Store one message of each priority and standing; return their sequences by name."""
    names = {}
    for priority in (1, 0, -1):
        for state in ("sent", "new", "newer"):
            names[f"{state} {priority}"] = store(connection, clock, sized(10, priority=priority))[0]
    with transaction(connection):
        for priority in (1, 0, -1):
            seq = names[f"sent {priority}"]
            mark_unanswered(connection, [run_of(connection, priority, seq, seq)], clock.wall())
    return names


EXPECTED = [f"{state} {priority}" for priority in (-1, 0, 1) for state in ("new", "newer")] + [
    f"sent {priority}" for priority in (-1, 0, 1)
]


@pytest.mark.parametrize("way", [ONE, INSERT])
def test_the_oldest_of_the_lowest_priority_that_was_never_sent_goes_first(
    outbox: sqlite3.Connection, clock: FakeClock, way: str
) -> None:
    """`drop_oldest` takes what was never sent before what may be on its way, lower priority first, then older."""
    names = standing(outbox, clock)
    for count in range(1, len(EXPECTED) + 1):
        outbox.execute("SAVEPOINT one")
        outbox.execute("UPDATE durablews_caps SET max_bytes = ?, overflow = 'drop_oldest'", (90,))
        if way == ONE:
            entries.enqueue(outbox, "x", [[sized(10 * count)]], clock=clock)
        else:
            put(outbox, clock, INSERT, [10 * count])
        assert departed(outbox) == [
            (names[name], "dropped", int(name.startswith("sent")))
            for name in sorted(EXPECTED[:count], key=lambda name: EXPECTED.index(name) if way == ONE else names[name])
        ]
        counts = totals(outbox)
        assert (counts["dropped"], counts["dropped_unanswered"]) == (min(count, 6), max(0, count - 6))
        outbox.execute("ROLLBACK TO one")
        outbox.execute("RELEASE one")


def test_what_is_in_flight_is_never_dropped(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """What the dropping process has claimed stays, whatever its standing; when nothing else is left, it rejects."""
    names = standing(outbox, clock)
    set_caps(outbox, max_messages=9, overflow="drop_oldest")
    claims = {-1: (names["sent -1"], names["newer -1"]), 0: (names["sent 0"], names["new 0"])}
    held = {names[name] for name in ("sent -1", "new -1", "newer -1", "sent 0", "new 0")}
    left = ["newer 0", "new 1", "newer 1", "sent 1"]
    for count in range(1, 5):
        store(outbox, clock, sized(10, priority=100), claims={**claims, 100: (0, 1 << 60)})
        assert [seq for seq, *_ in departed(outbox)] == [names[name] for name in left[:count]]
        assert held <= set(waiting(outbox))
    before = totals(outbox)
    (result,) = enqueue(outbox, clock, [sized(10)], claims={**claims, 100: (0, 1 << 60)})
    assert isinstance(result, OutboxFull)
    assert totals(outbox) == before
    assert len(departed(outbox)) == 4


def test_a_request_that_cannot_fit_drops_nothing(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """More messages in one request than the cap are rejected before anything makes room for them."""
    set_caps(outbox, max_messages=5, overflow="drop_oldest")
    old = store(outbox, clock, *(sized(10) for _ in range(5)))
    (result,) = enqueue(outbox, clock, [sized(10)] * 6)
    assert isinstance(result, OutboxFull)
    assert (waiting(outbox), departed(outbox)) == (old, [])


def test_dead_letters_take_no_room_from_what_waits(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """A dead letter is neither in the way of new messages nor dropped for them."""
    set_caps(outbox, max_messages=2, overflow="drop_oldest")
    first, second = store(outbox, clock, sized(10), sized(10))
    with transaction(outbox):
        refuse(outbox, first, Refusal("invalid"), clock.wall())
    (third,) = store(outbox, clock, sized(10))
    assert waiting(outbox) == [second, third]
    (fourth,) = store(outbox, clock, sized(10))
    assert waiting(outbox) == [third, fourth]
    assert (totals(outbox)["dead_messages"], totals(outbox)["dropped"]) == (1, 1)


def test_making_room_does_not_walk_the_backlog(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """One message that finds an outbox of twenty thousand full reads a page of them, not all, by either way in."""
    store(outbox, clock, *(sized(1) for _ in range(20_000)))
    set_caps(outbox, max_messages=20_000, overflow="drop_oldest")
    for way, most in ((ONE, 40), (INSERT, 1500)):
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        outbox.set_progress_handler(count, 100)
        put(outbox, clock, way, [1])
        outbox.set_progress_handler(None, 0)
        assert steps < most, way
    assert totals(outbox)["dropped"] == 2


# -- sequences


def test_a_sequence_is_never_given_out_twice(tmp_path: Path, clock: FakeClock) -> None:
    """Also after the queue was empty, and the file was closed and opened again, numbers go on where they were (P4)."""
    given: list[int] = []
    for _ in range(3):
        connection = new_outbox(tmp_path)
        given += store(connection, clock, sized(1), sized(1))
        outbox_rows = given[-2:]
        with transaction(connection):
            settle(connection, [run_of(connection, 0, outbox_rows[0], outbox_rows[1])])
        assert waiting(connection) == []
        assert entries.last_sequence(connection) == given[-1]
        put(connection, clock, INSERT, [1])
        given += waiting(connection)
        with transaction(connection):
            refuse(connection, given[-1], Refusal("invalid"), clock.wall())
        connection.execute("DELETE FROM durablews_entries")
        connection.execute("UPDATE durablews_totals SET dead_messages = 0, dead_bytes = 0")
        connection.close()
    assert given == list(range(1, 10))


def test_a_new_outbox_has_given_out_nothing(outbox: sqlite3.Connection) -> None:
    """Before its first message the last sequence of an outbox is 0."""
    assert entries.last_sequence(outbox) == 0


# -- ids


def test_a_second_send_with_the_same_id_stores_nothing_new(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """Whoever cannot know whether a send was stored sends again with the same id, and gets the first one's sequence."""
    (first,) = store(outbox, clock, draft("a", id="x"))
    assert store(outbox, clock, draft("b", id="x")) == [first]
    results = enqueue(outbox, clock, [draft("c", id="x"), draft("d", id="y"), draft("e", id="y")], [draft("f", id="y")])
    assert results == [[first, 2, 2], [2]]
    assert column(outbox, "SELECT payload FROM durablews_entries") == ['"a"', '"d"']
    assert totals(outbox)["enqueued"] == 2


@pytest.mark.parametrize("fate", ["acked", "refused"])
def test_an_id_stays_known_after_its_message_has_left(outbox: sqlite3.Connection, clock: FakeClock, fate: str) -> None:
    """A repeat that comes after the first one's answer is still a repeat."""
    (seq,) = store(outbox, clock, draft("a", id="x"))
    with transaction(outbox):
        if fate == "acked":
            settle(outbox, [run_of(outbox, 0, seq, seq)])
        else:
            refuse(outbox, seq, Refusal("invalid"), clock.wall())
    assert store(outbox, clock, draft("a", id="x")) == [seq]
    assert (waiting(outbox), totals(outbox)["enqueued"]) == ([], 1)


def test_an_id_that_found_no_room_is_not_known(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """What was rejected or dropped as new was never stored, so the same id is stored later."""
    set_caps(outbox, max_messages=1, overflow="drop_new")
    assert enqueue(outbox, clock, [draft(1, id="a"), draft(2, id="b"), draft(3, id="b"), draft(4, id="a")]) == [
        [1, Gap(), Gap(), 1]
    ]
    set_caps(outbox, overflow="reject")
    assert isinstance(enqueue(outbox, clock, [draft(2, id="b")])[0], OutboxFull)
    set_caps(outbox, max_messages=2)
    assert store(outbox, clock, draft(2, id="b")) == [2]


def test_a_known_id_needs_no_room(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """A repeat of what is stored succeeds in a full outbox, and makes nothing go."""
    set_caps(outbox, max_messages=1, overflow="drop_oldest")
    (seq,) = store(outbox, clock, draft(1, id="a"))
    assert store(outbox, clock, draft(1, id="a")) == [seq]
    assert (waiting(outbox), totals(outbox)["dropped"]) == ([seq], 0)


def test_ten_thousand_ids_that_left_are_remembered_and_no_file_full(
    outbox: sqlite3.Connection, clock: FakeClock
) -> None:
    """The last 10 000 ids stay known after their messages left, a few thousand more at most, and all that wait."""
    (kept,) = store(outbox, clock, draft("waits", id="waits", priority=1))
    for start in range(0, 30_000, 1000):
        seqs = store(outbox, clock, *(draft(number, id=f"id {number}") for number in range(start, start + 1000)))
        with transaction(outbox):
            settle(outbox, [run_of(outbox, 0, seqs[0], seqs[-1])])
        known = set(column(outbox, "SELECT id FROM durablews_ids"))
        assert {f"id {number}" for number in range(max(0, start - 9000), start + 1000)} <= known
        assert "waits" in known
        assert len(known) <= 10_000 + 4096 + 1
    assert store(outbox, clock, draft("again", id="waits")) == [kept]


def test_an_id_costs_no_walk_through_what_waits(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """With thirty thousand ids waiting, the next thousand cost on average a few steps each, not a walk through all."""
    store(outbox, clock, *(draft(number, id=f"old {number}") for number in range(30_000)))
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    outbox.set_progress_handler(count, 1000)
    for number in range(1000):
        store(outbox, clock, draft(number, id=f"new {number}"))
    outbox.set_progress_handler(None, 0)
    assert steps < 2000


# -- peek


def test_what_is_sent_next_is_the_highest_priority_then_the_oldest(
    outbox: sqlite3.Connection, clock: FakeClock
) -> None:
    """Sending order is by priority down, then by sequence, for any mixture, and in pages nothing is missed (P3)."""
    dice = random.Random(7)
    drafts = [sized(dice.randrange(1, 50), priority=dice.choice([-100, -3, -1, 0, 1, 2, 100])) for _ in range(600)]
    seqs = store(outbox, clock, *drafts)
    left = dict(zip(seqs, drafts, strict=True))
    with transaction(outbox):
        for seq in dice.sample(seqs, 200):
            fate = dice.randrange(3)
            if fate == 0:
                refuse(outbox, seq, Refusal("invalid"), clock.wall())
                del left[seq]
            elif fate == 1:
                settle(outbox, [run_of(outbox, left[seq].priority, seq, seq)])
                del left[seq]
            else:
                mark_unanswered(outbox, [run_of(outbox, left[seq].priority, seq, seq)], clock.wall())
    expected = sorted(left, key=lambda seq: (-left[seq].priority, seq))
    assert peek(outbox) == expected
    for limit, max_bytes in ((1, 1), (7, 1 << 20), (50, 300), (1000, 1)):
        found: list[int] = []
        after: dict[int, int] = {}
        while True:
            page, unfit = entries.peek(outbox, after=after, limit=limit, max_bytes=max_bytes)
            assert unfit == []
            assert len(page) <= limit
            assert sum(entry.bytes for entry in page) <= max_bytes or len(page) == 1
            if not page:
                break
            found += [entry.seq for entry in page]
            after |= {entry.priority: entry.seq for entry in page}
        assert found == expected


def test_only_the_priorities_that_are_asked_for_come(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """`closed` leaves priorities out and `above` everything at or below one; the others come in their order."""
    seqs = {priority: store(outbox, clock, sized(1, priority=priority))[0] for priority in range(-2, 3)}
    assert peek(outbox, closed=[1, -2]) == [seqs[2], seqs[0], seqs[-1]]
    assert peek(outbox, above=0) == [seqs[2], seqs[1]]
    assert peek(outbox, above=0, closed=[2]) == [seqs[1]]
    assert peek(outbox, limit=0) == []


def test_an_entry_is_what_was_stored(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """What is read back for sending is, field by field, what its sender gave."""
    one = draft({"ä": [1, None]}, topic="t", headers={"h": "v"}, priority="high")
    two = draft(b"\x00\xff", ttl=5)
    seqs = store(outbox, clock, one, two)
    (first, second), _ = entries.peek(outbox, after={}, limit=10, max_bytes=1000)
    assert (first.seq, first.priority, first.payload, first.topic, first.headers) == (
        seqs[0],
        1,
        '{"ä":[1,null]}',
        "t",
        '{"h":"v"}',
    )
    assert (second.seq, second.payload, second.topic, second.headers) == (seqs[1], b"\x00\xff", None, None)
    assert (first.bytes, first.created_at, first.transmissions, first.nacks) == (one.bytes, clock.wall(), 0, 0)


def test_the_next_entries_are_found_along_an_index(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """No query of the drain scans or sorts: each one searches the index of waiting entries, to the row."""
    asked: list[str] = []
    store(outbox, clock, draft(1), draft(2, priority="high"))
    outbox.set_trace_callback(asked.append)
    entries.peek(outbox, after={}, limit=10, max_bytes=1000)
    outbox.set_trace_callback(None)
    looks = [sql for sql in asked if sql.lstrip().startswith("SELECT") and "FROM durablews_entries" in sql]
    assert len(looks) >= 6  # two priorities: which there are, the facts of their rows, the payloads
    for sql in looks:
        plan = [row[3] for row in outbox.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall()]
        on_rows = [step for step in plan if "durablews_entries" in step]
        assert on_rows
        assert all(
            "SEARCH" in step and "USING" in step and "INDEX durablews_queue (priority" in step for step in on_rows
        )
        assert not [step for step in plan if "TEMP B-TREE" in step]


def test_looking_reads_no_more_than_it_returns(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """With megabytes waiting, a look for little decodes little: memory is bounded by the window (P6)."""
    store(outbox, clock, *(draft("y" * 10_000) for _ in range(50)))
    decoded = 0

    def decode(text: bytes) -> str:
        nonlocal decoded
        decoded += len(text)
        return text.decode()

    outbox.text_factory = decode
    assert len(peek(outbox, max_bytes=20_100)) == 2
    assert decoded <= 3 * 10_100


# -- what must not be sent


def test_text_that_is_not_utf8_is_never_part_of_an_entry(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """A foreign row with invalid UTF-8 in any text is named as unfit, and those around it come as they are."""
    good = [store(outbox, clock, sized(5))[0]]
    bad = []
    for where in ("payload", "topic", "headers"):
        values = {"payload": "'\"ok\"'", "topic": "NULL", "headers": "NULL"}
        values[where] = "CAST(x'7b2261223a22ff227d' AS TEXT)"  # {"a":"\\xff"}
        outbox.execute(f"INSERT INTO durablews_outbox ({', '.join(values)}) VALUES ({', '.join(values.values())})")
        bad.append(entries.last_sequence(outbox))
        good += store(outbox, clock, sized(5))
    found, unfit = entries.peek(outbox, after={}, limit=100, max_bytes=1000)
    assert [entry.seq for entry in found] == good
    assert unfit == [(seq, "not_utf8") for seq in bad]
    assert outbox.text_factory is str
    assert column(outbox, "SELECT '\u00e4'") == ["ä"]


@pytest.mark.parametrize("payload", ["text", b"bytes"])
@pytest.mark.parametrize("flip", [0x01, 0x80], ids=["low bit", "high bit"])
def test_a_flipped_bit_is_never_sent(
    outbox: sqlite3.Connection, clock: FakeClock, payload: str | bytes, flip: int
) -> None:
    """A payload that the disk changed is named as damaged, also where it is no longer UTF-8 (P10)."""
    first, second, third = store(outbox, clock, draft(payload), draft(payload), draft(payload))
    stored = outbox.execute("SELECT CAST(payload AS BLOB) FROM durablews_entries WHERE seq = ?", (second,)).fetchone()[
        0
    ]
    broken = stored[:2] + bytes([stored[2] ^ flip]) + stored[3:]
    kind = "TEXT" if isinstance(payload, str) else "BLOB"
    outbox.execute(f"UPDATE durablews_entries SET payload = CAST(? AS {kind}) WHERE seq = ?", (broken, second))
    found, unfit = entries.peek(outbox, after={}, limit=100, max_bytes=1000)
    assert ([entry.seq for entry in found], unfit) == ([first, third], [(second, "damaged")])


def test_a_byte_flipped_in_the_file_is_never_sent(tmp_path: Path, clock: FakeClock) -> None:
    """SQLite does not see a changed payload byte; the checksum does (P10)."""
    connection = new_outbox(tmp_path)
    seqs = store(connection, clock, *(draft(f"message number {number}") for number in range(3)))
    connection.close()
    path = tmp_path / "agent.db"
    path.write_bytes(path.read_bytes().replace(b"message number 1", b"massage number 1"))
    connection = open_again(path)
    found, unfit = entries.peek(connection, after={}, limit=100, max_bytes=1000)
    assert ([entry.seq for entry in found], unfit) == ([seqs[0], seqs[2]], [(seqs[1], "damaged")])
    connection.close()


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 10])
def test_unfit_entries_let_nothing_overtake(outbox: sqlite3.Connection, clock: FakeClock, limit: int) -> None:
    """However many unfit entries stand before it, nothing of a lower priority comes before a fit one of a higher."""
    rows = store(outbox, clock, *(sized(5, priority=1) for _ in range(6)), sized(5))
    for seq in rows[:3] + rows[4:5]:
        outbox.execute("UPDATE durablews_entries SET payload = x'00' WHERE seq = ?", (seq,))
    sent: list[int] = []
    after: dict[int, int] = {}
    for _ in range(20):
        found, unfit = entries.peek(outbox, after=after, limit=limit, max_bytes=1000)
        assert len(found) + len(unfit) <= limit
        sent += [entry.seq for entry in found]
        after |= {entry.priority: entry.seq for entry in found}
        with transaction(outbox):
            for seq, why in unfit:
                assert refuse(outbox, seq, Refusal(why), clock.wall())
    assert sent == [rows[3], rows[5], rows[6]]
    assert totals(outbox)["dead_messages"] == 4


# -- the outbox clock


def test_the_outbox_clock_counts_what_the_boot_clock_vouches_for(outbox: sqlite3.Connection) -> None:
    """The outbox clock goes on with the boot clock, whatever the wall clock does, and never backwards."""
    clock = FakeClock(wall=0)
    start = entries.outbox_time(outbox, clock)
    clock.advance(1000)
    clock.jump(56 * 365 * 86_400_000)
    assert entries.outbox_time(outbox, clock) == start + 1000
    clock.jump(-90 * 365 * 86_400_000)
    clock.advance(500)
    assert entries.outbox_time(outbox, clock) == start + 1500
    clock._boot -= 10_000
    assert entries.outbox_time(outbox, clock) == start


def test_a_reboot_takes_nothing_back_from_the_outbox_clock(outbox: sqlite3.Connection) -> None:
    """After a power cut the clock goes on from the newest message at the earliest; off time is not in it."""
    clock = FakeClock()
    store(outbox, clock, sized(1))
    clock.advance(3_600_000)
    store(outbox, clock, sized(1))
    last = column(outbox, "SELECT max(born) FROM durablews_entries")[0]
    clock.reboot(off=86_400_000, wall=0)
    assert entries.outbox_time(outbox, clock) == last
    clock.advance(250)
    assert entries.outbox_time(outbox, clock) == last + 250
    outbox.execute("DELETE FROM durablews_entries")
    assert entries.outbox_time(outbox, clock) == last + 250
    outbox.execute("UPDATE durablews_totals SET messages = 0, bytes = 0")


def test_looking_at_the_clock_writes_once_a_boot(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """Only the first look after a boot writes: a producer that asks for the time costs no other commit."""
    entries.outbox_time(outbox, clock)
    before = outbox.total_changes
    entries.outbox_time(outbox, clock)
    assert outbox.total_changes == before
    clock.reboot()
    entries.outbox_time(outbox, clock)
    assert outbox.total_changes == before + 1


def test_whole_transactions_or_nothing(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """An error after messages were written takes the messages, the counts and the ids back."""
    before = totals(outbox)

    def half_done() -> None:
        with transaction(outbox):
            entries.enqueue(outbox, "x", [[draft(1, id="a")], [draft(2)]], clock=clock)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half_done()
    assert (totals(outbox), waiting(outbox), column(outbox, "SELECT id FROM durablews_ids")) == (before, [], [])
    assert store(outbox, clock, Draft("1", 1, 0x83DCEFB7)) == [1]
    assert database.wal_bytes("no such file") == 0
