"""How entries leave, or change their standing: each departure counted, and none that nobody asked for."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support import (
    FakeClock,
    column,
    departed,
    new_outbox,
    run_of,
    set_caps,
    sized,
    store,
    totals,
    waiting,
)

from durablews import entries, settlement
from durablews.entries import Claims
from durablews.jobs import transaction
from durablews.messages import Refusal, Run, draft
from durablews.settlement import (
    expire,
    mark_first_as_sent,
    mark_unanswered,
    refuse,
    requeue,
    return_aside,
    set_aside,
    settle,
    stamp_unseen,
)

YEAR = 365 * 86_400_000


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = new_outbox(tmp_path)
    yield connection
    connection.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


# -- settle


def test_an_ack_deletes_its_run_and_nothing_else(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """Of one priority and up to one sequence: other priorities, later ones and dead letters between them stay."""
    seqs = store(outbox, clock, *(sized(10, priority=number % 2) for number in range(10)))
    with transaction(outbox):
        refuse(outbox, seqs[2], Refusal("invalid"), clock.wall())
        set_aside(outbox, seqs[4], Refusal("too_large", needs=1))
    run = run_of(outbox, 0, seqs[0], seqs[6])
    assert (run.messages, run.bytes) == (2, 20)
    with transaction(outbox):
        settle(outbox, [run, run_of(outbox, 1, seqs[1], seqs[1])])
    left = column(outbox, "SELECT seq FROM durablews_entries ORDER BY seq")
    assert left == [seqs[2], seqs[3], seqs[4], seqs[5], *seqs[7:]]
    counts = totals(outbox)
    assert (counts["acked"], counts["messages"]) == (3, 6)
    assert [reason for _, reason, _ in departed(outbox)] == ["refused"]


def test_an_ack_for_what_another_process_dropped_counts_what_was_left(
    outbox: sqlite3.Connection, clock: FakeClock
) -> None:
    """A foreign INSERT that makes room while messages are in flight counts them as dropped: once, and not as acked."""
    seqs = store(outbox, clock, *(sized(10, priority=priority) for priority in (0, 0, 0, 1, 1)))
    runs = [run_of(outbox, 0, seqs[0], seqs[2]), run_of(outbox, 1, seqs[3], seqs[4])]
    set_caps(outbox, max_messages=5, overflow="drop_oldest")
    outbox.execute("INSERT INTO durablews_outbox (payload, priority) VALUES ('1', 5), ('2', 5)")
    with transaction(outbox):
        settle(outbox, runs)
    counts = totals(outbox)
    assert (counts["acked"], counts["dropped"], counts["messages"], counts["enqueued"]) == (3, 2, 2, 7)
    with transaction(outbox):
        settle(outbox, runs)
    assert totals(outbox) == counts


def test_an_ack_of_nothing_changes_nothing(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """No runs, or runs whose messages have all left: no count moves."""
    store(outbox, clock, sized(10))
    before = totals(outbox)
    with transaction(outbox):
        settle(outbox, [])
        settle(outbox, [Run(5, 1, 1, 1, 10), Run(0, 100, 200, 3, 30)])
    assert totals(outbox) == before


# -- unanswered


def test_a_lost_connection_leaves_its_messages_unanswered(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """What was in flight is marked as perhaps applied, with the time, and stays in its place in the order."""
    seqs = store(outbox, clock, *(sized(10) for _ in range(4)))
    for count in (1, 2):
        with transaction(outbox):
            mark_unanswered(outbox, [run_of(outbox, 0, seqs[0], seqs[1])], clock.wall())
        rows = outbox.execute("SELECT ack_state, transmissions, sent_at FROM durablews_entries ORDER BY seq").fetchall()
        assert rows == [(1, count, clock.wall())] * 2 + [(0, 0, None)] * 2
        assert totals(outbox)["redelivered"] == 2 * count
        clock.advance(1000)
    found, _ = entries.peek(outbox, after={}, limit=10, max_bytes=1000)
    assert [entry.seq for entry in found] == seqs
    assert [entry.transmissions for entry in found] == [2, 2, 0, 0]


def test_after_a_crash_the_first_of_each_priority_count_as_sent(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """A window of each priority is marked as perhaps applied; dead letters and what is aside are no part of it (C3)."""
    seqs = store(outbox, clock, *(sized(1, priority=priority) for priority in (5, 5, 5, -5, -5, 0)))
    with transaction(outbox):
        refuse(outbox, seqs[0], Refusal("invalid"), clock.wall())
        set_aside(outbox, seqs[3], Refusal("too_large"))
        mark_first_as_sent(outbox, 1)
    assert column(outbox, "SELECT ack_state FROM durablews_entries ORDER BY seq") == [2, 1, 0, 3, 1, 1]
    before = totals(outbox)
    with transaction(outbox):
        mark_first_as_sent(outbox, 100)
    assert column(outbox, "SELECT ack_state FROM durablews_entries ORDER BY seq") == [2, 1, 1, 3, 1, 1]
    assert totals(outbox) == before


# -- dead letters


def test_a_refused_message_is_kept_with_its_reason(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """A dead letter keeps its payload and why, is told to its sender, and is refused only once."""
    (seq,) = store(outbox, clock, draft("kept"))
    for done in (True, False):
        with transaction(outbox):
            assert refuse(outbox, seq, Refusal("invalid", "no such topic", unknown=True), clock.wall()) == done
    with transaction(outbox):
        assert not refuse(outbox, 4711, Refusal("invalid"), clock.wall())
    state, text, payload = outbox.execute("SELECT ack_state, refusal, payload FROM durablews_entries").fetchone()
    assert (state, payload) == (2, '"kept"')
    assert msgspec.json.decode(text) == {"code": "invalid", "reason": "no such topic", "unknown": True}
    assert departed(outbox) == [(seq, "refused", 1)]
    assert (totals(outbox)["refused"], totals(outbox)["dead_bytes"]) == (1, 6)


def test_dead_letters_over_their_own_caps_go_the_oldest_first(
    outbox: sqlite3.Connection, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More dead letters, or bytes of them, than their caps: the oldest are dropped and counted, what waits is not."""
    monkeypatch.setattr(settlement, "_MAX_DEAD_MESSAGES", 3)
    monkeypatch.setattr(settlement, "_MAX_DEAD_BYTES", 100)
    seqs = store(outbox, clock, *(sized(10) for _ in range(6)), sized(95), sized(200), sized(1))

    def dead(seq: int) -> list[int]:
        with transaction(outbox):
            assert refuse(outbox, seq, Refusal("invalid"), clock.wall())
        totals(outbox)
        return column(outbox, "SELECT seq FROM durablews_entries WHERE ack_state = 2 ORDER BY seq")

    assert [dead(seq) for seq in seqs[:5]][-1] == seqs[2:5]
    assert totals(outbox)["dead_dropped"] == 2
    assert dead(seqs[6]) == [seqs[6]], "95 bytes leave no room for another ten"
    assert dead(seqs[7]) == [seqs[7]], "the newest stays, even when it alone is over the cap"
    counts = totals(outbox)
    assert (counts["dead_dropped"], counts["refused"], counts["dead_messages"], counts["messages"]) == (6, 7, 1, 2)
    assert waiting(outbox) == [seqs[5], seqs[8]]


def test_the_caps_of_dead_letters_are_as_documented() -> None:
    """Ten thousand, and 64 MiB."""
    assert (settlement._MAX_DEAD_MESSAGES, settlement._MAX_DEAD_BYTES) == (10_000, 64 * 1024 * 1024)


# -- requeue


def test_a_requeued_message_is_the_same_under_a_new_sequence(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """It goes to the back of its priority with its age, topic, headers and nacks, and its sender can follow it."""
    one = draft({"a": 1}, topic="t", headers={"k": "v"}, ttl=60, id="mine", priority=3)
    (old,) = store(outbox, clock, one)
    clock.advance(5000)
    (other,) = store(outbox, clock, sized(1, priority=3))
    with transaction(outbox):
        mark_unanswered(outbox, [run_of(outbox, 3, old, old)], clock.wall())
    columns = "priority, transmissions, nacks, sent_at, created_at, born, ttl, topic, headers, bytes, checksum, payload"
    before = outbox.execute(f"SELECT {columns} FROM durablews_entries WHERE seq = ?", (old,)).fetchone()
    counts = totals(outbox)
    with transaction(outbox):
        new = requeue(outbox, old, clock.wall(), nacked=True)
    assert new == other + 1
    after = outbox.execute(f"SELECT {columns} FROM durablews_entries WHERE seq = ?", (new,)).fetchone()
    assert after == (*before[:2], before[2] + 1, *before[3:])
    assert outbox.execute("SELECT seq, reason, became FROM durablews_departed").fetchall() == [(old, "renumbered", new)]
    assert totals(outbox) == counts
    assert store(outbox, clock, one) == [new], "its id leads to it still"
    found, _ = entries.peek(outbox, after={}, limit=10, max_bytes=1000)
    assert [entry.seq for entry in found] == [other, new]
    assert column(outbox, "SELECT ack_state FROM durablews_entries WHERE seq = ?", (new,)) == [0]


def test_what_is_gone_or_dead_is_not_requeued(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """There is nothing to move: None, and no count or sequence changes."""
    (seq,) = store(outbox, clock, sized(1))
    with transaction(outbox):
        refuse(outbox, seq, Refusal("invalid"), clock.wall())
    before = (totals(outbox), entries.last_sequence(outbox))
    with transaction(outbox):
        assert requeue(outbox, seq, clock.wall()) is None
        assert requeue(outbox, 4711, clock.wall()) is None
    assert (totals(outbox), entries.last_sequence(outbox)) == before


# -- aside


def aside(connection: sqlite3.Connection) -> list[tuple[int, list[int]]]:
    rows = connection.execute("SELECT seq, refusal FROM durablews_entries WHERE ack_state = 3 ORDER BY seq").fetchall()
    return [(seq, msgspec.json.decode(text, type=Refusal).tries) for seq, text in rows]


def test_what_is_aside_blocks_nothing_and_comes_back_when_it_fits(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """A message that is too large for a server waits beside the queue, counted as waiting, until a larger one comes."""
    large, small, larger = store(outbox, clock, sized(900), sized(10), sized(2000))
    with transaction(outbox):
        set_aside(outbox, large, Refusal("too_large", needs=1000))
        set_aside(outbox, larger, Refusal("too_large", needs=2100))
    assert totals(outbox)["messages"] == 3
    found, _ = entries.peek(outbox, after={}, limit=10, max_bytes=10_000)
    assert [entry.seq for entry in found] == [small]
    with transaction(outbox):
        assert return_aside(outbox, 999, 0, clock.wall(), between=600_000, tries=3) == []
    assert waiting(outbox) == [large, small, larger]
    with transaction(outbox):
        assert return_aside(outbox, 1000, 0, clock.wall(), between=600_000, tries=3) == []
    found, _ = entries.peek(outbox, after={}, limit=10, max_bytes=10_000)
    assert [entry.seq for entry in found] == [small, larger + 1]
    assert departed(outbox) == [(large, "renumbered", 0)]
    assert [seq for seq, _ in aside(outbox)] == [larger]


def test_three_connections_ten_minutes_apart_make_a_dead_letter(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """Tries count only when they are far enough apart on the outbox clock; the third one is the last (C5)."""
    (seq,) = store(outbox, clock, sized(900))
    with transaction(outbox):
        set_aside(outbox, seq, Refusal("too_large", needs=1000, tries=[0]))
    for now, tries in ((1, [0]), (599_999, [0]), (600_000, [0, 600_000]), (1_199_999, [0, 600_000])):
        with transaction(outbox):
            assert return_aside(outbox, 999, now, clock.wall(), between=600_000, tries=3) == []
        assert aside(outbox) == [(seq, tries)]
    with transaction(outbox):
        ((dead, refusal),) = return_aside(outbox, 999, 1_200_000, clock.wall(), between=600_000, tries=3)
    assert (dead, refusal.code, refusal.tries) == (seq, "too_large", [0, 600_000, 1_200_000])
    assert (totals(outbox)["dead_messages"], totals(outbox)["messages"]) == (1, 0)
    assert departed(outbox) == [(seq, "refused", 0)]


# -- expiry


def expired(
    connection: sqlite3.Connection, clock: FakeClock, max_age: int | None = None, claims: Claims | None = None
) -> list[int]:
    """Do what the drainer does from time to time."""
    with transaction(connection):
        now = entries.outbox_time(connection, clock)
        stamp_unseen(connection, now)
        return sorted(expire(connection, now, max_age, claims or {}, clock.wall()))


def test_a_ttl_ends_at_its_millisecond(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """A message expires when its own ttl has passed, not before; those without one stay."""
    seqs = store(outbox, clock, sized(1, ttl=10), sized(1), sized(1, ttl=0.001), sized(1, ttl=20))
    assert expired(outbox, clock) == []
    clock.advance(1)
    assert expired(outbox, clock) == [seqs[2]]
    clock.advance(9998)
    assert expired(outbox, clock) == []
    clock.advance(1)
    assert expired(outbox, clock) == [seqs[0]]
    clock.advance(100 * YEAR)
    assert expired(outbox, clock) == [seqs[3]]
    assert waiting(outbox) == [seqs[1]]
    assert totals(outbox)["expired"] == 3
    assert departed(outbox) == [(seqs[2], "expired", 0), (seqs[0], "expired", 0), (seqs[3], "expired", 0)]


def test_the_age_cap_takes_everything_that_is_older(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """With `max_age`, what has waited so long expires, of every priority and with or without a ttl."""
    first = store(outbox, clock, sized(1, priority=1), sized(1, ttl=3600), sized(1, priority=-1))
    clock.advance(1000)
    second = store(outbox, clock, sized(1))
    clock.advance(8999)
    assert expired(outbox, clock, 10_000) == []
    clock.advance(1)
    assert expired(outbox, clock, 10_000) == first
    clock.advance(999)
    assert expired(outbox, clock, 10_000) == []
    clock.advance(1)
    assert expired(outbox, clock, 10_000) == second


@pytest.mark.parametrize("jump", [56 * YEAR, 10 * YEAR, -10 * YEAR], ids=["NTP after 1970", "+10 years", "-10 years"])
@pytest.mark.parametrize("max_age", [None, 60_000], ids=["ttl", "max_age"])
def test_a_jump_of_the_wall_clock_expires_nothing(outbox: sqlite3.Connection, jump: int, max_age: int | None) -> None:
    """A device that boots in 1970 and hears from NTP, or any jump of years, makes no message older or younger."""
    clock = FakeClock(wall=5_000 if jump == 56 * YEAR else 50 * YEAR)
    options = {"ttl": 60} if max_age is None else {}
    seqs = store(outbox, clock, sized(1, **options))
    clock.advance(30_000)
    clock.jump(jump)
    seqs += store(outbox, clock, sized(1, **options))
    assert expired(outbox, clock, max_age) == []
    clock.advance(29_999)
    assert expired(outbox, clock, max_age) == []
    clock.advance(1)
    assert expired(outbox, clock, max_age) == seqs[:1]
    clock.jump(-jump)
    clock.advance(29_999)
    assert expired(outbox, clock, max_age) == []
    clock.advance(1)
    assert expired(outbox, clock, max_age) == seqs[1:]


@pytest.mark.parametrize("max_age", [None, 60_000], ids=["ttl", "max_age"])
def test_time_switched_off_does_not_count(outbox: sqlite3.Connection, clock: FakeClock, max_age: int | None) -> None:
    """Through reboots a message ages by the time that the machine was on, as far as the file knows it."""
    options = {"ttl": 60} if max_age is None else {}
    seqs = store(outbox, clock, sized(1, **options))
    clock.advance(20_000)
    seqs += store(outbox, clock, sized(1, **options))
    clock.reboot(off=10 * YEAR, wall=0)
    assert expired(outbox, clock, max_age) == []
    clock.advance(39_999)
    assert expired(outbox, clock, max_age) == []
    clock.advance(1)
    assert expired(outbox, clock, max_age) == seqs[:1]
    clock.advance(20_000)
    assert expired(outbox, clock, max_age) == seqs[1:]


@pytest.mark.parametrize("before", [0, 1], ids=["alone", "behind an old one"])
def test_the_age_of_a_foreign_row_starts_when_the_drainer_sees_it(
    outbox: sqlite3.Connection, clock: FakeClock, before: int
) -> None:
    """However long a row of plain SQL waited unseen, it has its whole ttl and age before it."""
    store(outbox, clock, *(sized(1, ttl=1) for _ in range(before)))
    clock.advance(10 * YEAR)
    outbox.execute("INSERT INTO durablews_outbox (payload, ttl) VALUES ('1', 10)")
    outbox.execute("INSERT INTO durablews_outbox (payload) VALUES ('2')")
    foreign = waiting(outbox)[before:]
    with transaction(outbox):  # not yet seen: no age at all
        now = entries.outbox_time(outbox, clock)
        gone = expire(outbox, now, 10_000, {}, clock.wall())
    assert set(gone).isdisjoint(foreign)
    assert expired(outbox, clock, 20_000) == []
    clock.advance(10_000)
    assert expired(outbox, clock, 20_000) == foreign[:1]
    clock.advance(10_000)
    assert expired(outbox, clock, 20_000) == foreign[1:]


@pytest.mark.parametrize("max_age", [None, 5_000], ids=["ttl", "max_age"])
def test_what_is_in_flight_does_not_expire(outbox: sqlite3.Connection, clock: FakeClock, max_age: int | None) -> None:
    """Claimed entries stay until they are answered; the same sequences of another priority do not."""
    seqs = store(outbox, clock, *(sized(1, ttl=1 if max_age is None else None) for _ in range(4)))
    other = store(outbox, clock, sized(1, ttl=1 if max_age is None else None, priority=1))
    clock.advance(10_000)
    assert expired(outbox, clock, max_age, {0: (seqs[0], seqs[1]), 1: (0, seqs[0])}) == [*seqs[2:], *other]
    assert waiting(outbox) == seqs[:2]
    assert expired(outbox, clock, max_age) == seqs[:2]


def test_an_expiry_after_a_transmission_says_so(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """What may have been applied is counted apart; dead letters do not expire, what is aside does."""
    sent, new, dead, large = store(outbox, clock, *(sized(10, ttl=1) for _ in range(4)))
    with transaction(outbox):
        mark_unanswered(outbox, [run_of(outbox, 0, sent, sent)], clock.wall())
        refuse(outbox, dead, Refusal("invalid"), clock.wall())
        set_aside(outbox, large, Refusal("too_large", needs=1 << 30))
    clock.advance(1000)
    assert expired(outbox, clock, 1000) == [sent, new, large]
    counts = totals(outbox)
    assert (counts["expired"], counts["expired_unanswered"], counts["dead_messages"]) == (2, 1, 1)
    assert sorted(departed(outbox))[:2] == [(sent, "expired", 1), (new, "expired", 0)]


def test_a_large_expiry_goes_by_pages(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """One statement takes at most 5000, the oldest first, until none is left; all of them are counted."""
    seqs = store(outbox, clock, *(sized(1) for _ in range(12_000)))
    clock.advance(1000)
    assert expired(outbox, clock, 1000) == seqs[:5000]
    assert expired(outbox, clock, 1000) == seqs[5000:10_000]
    assert expired(outbox, clock, 1000) == seqs[10_000:]
    assert expired(outbox, clock, 1000) == []
    assert totals(outbox)["expired"] == 12_000
    assert len(departed(outbox)) == 10_000


def test_looking_for_the_expired_does_not_walk_the_backlog(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """With twenty thousand young messages, a look for old ones reads a page at most."""
    store(outbox, clock, *(sized(1, ttl=3600) for _ in range(20_000)))
    for max_age, most in ((None, 10), (1000, 1500)):
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        outbox.set_progress_handler(count, 100)
        assert expired(outbox, clock, max_age) == []
        outbox.set_progress_handler(None, 0)
        assert steps <= most


def test_settling_at_once_refuses_what_is_partly_gone(outbox: sqlite3.Connection, clock: FakeClock) -> None:
    """Where another process dropped some of a run the quick way raises, and the careful one counts the rest."""
    store(outbox, clock, *(draft("y") for _ in range(3)))
    run = Run(0, 1, 4, 4, 12)
    with pytest.raises(settlement.CountsDiffer), transaction(outbox):
        settlement.settle_at_once(outbox, [run])
    with transaction(outbox):
        settlement.settle(outbox, [run])
    assert (totals(outbox)["acked"], totals(outbox)["messages"]) == (3, 0)
