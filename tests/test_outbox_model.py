"""Random histories of one outbox beside a model of it in memory: rows, counts, order, sequences, departures."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import FakeClock, departed, new_outbox, open_again, run_of, totals

from durablews import entries, identity, settlement
from durablews.entries import Claims, Gap
from durablews.errors import MessageTooLarge, OutboxFull
from durablews.jobs import transaction
from durablews.messages import Draft, Refusal, draft

PENDING, UNANSWERED, REFUSED, ASIDE = range(4)

priorities = st.sampled_from([-1, 0, 1])
sizes = st.integers(1, 30)
messages = st.builds(
    lambda size, priority, ttl, name: draft(b"x" * size, priority=priority, ttl=ttl, id=name),
    sizes,
    priorities,
    st.sampled_from([None, None, 2.0, 20.0]),
    st.sampled_from([None, None, None, "a", "b", "c"]),
)


@dataclass(frozen=True)
class Row:
    """What the model knows of an entry."""

    priority: int
    bytes: int
    born: int | None
    ttl: int | None
    state: int = PENDING
    needs: int = 0
    tries: tuple[int, ...] = ()


@cache
def _fresh() -> bytes:
    """Return the bytes of an outbox that was just created: to create one a thousand times takes its time."""
    with tempfile.TemporaryDirectory() as folder:
        new_outbox(Path(folder)).close()
        return (Path(folder) / "agent.db").read_bytes()


class Model(RuleBasedStateMachine):
    """Does to an outbox, and to a dictionary, whatever hypothesis thinks of."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = FakeClock()
        (self.folder / "agent.db").write_bytes(_fresh())
        self.connection: sqlite3.Connection = open_again(self.folder / "agent.db")
        self.rows: dict[int, Row] = {}
        self.ids: dict[str, int] = {}
        self.last = 0
        self.now = 0
        self.counts: dict[str, int] = dict.fromkeys(totals(self.connection), 0)
        self.departed: list[tuple[int, str, int]] = []
        self.max_messages, self.max_bytes, self.overflow = 0, 0, ""
        self.max_age: int | None = None

    def teardown(self) -> None:
        self.connection.close()
        shutil.rmtree(self.folder)

    # -- what the model does

    def waiting(self) -> dict[int, Row]:
        return {seq: row for seq, row in self.rows.items() if row.state != REFUSED}

    def room(self) -> tuple[int, int]:
        rows = self.waiting().values()
        return self.max_messages - len(rows), self.max_bytes - sum(row.bytes for row in rows)

    def fits(self, sizes: list[int]) -> bool:
        places, size = self.room()
        return not sizes or (len(sizes) <= places and sum(sizes) <= size)

    def leave(self, seq: int, reason: str) -> None:
        row = self.rows.pop(seq)
        unknown = row.state == UNANSWERED
        self.counts[reason + ("_unanswered" if unknown else "")] += 1
        self.departed.append((seq, reason, int(unknown)))

    def make_room(self, sizes: list[int], claims: Claims) -> bool:
        """Drop what drop_oldest would, or nothing when that does not help."""
        candidates = sorted(
            (row.state, row.priority, seq) for seq, row in self.rows.items() if row.state in (PENDING, UNANSWERED)
        )
        places, size = self.room()
        victims = []
        for _, priority, seq in candidates:
            if len(sizes) <= places and sum(sizes) <= size:
                break
            first, last = claims.get(priority, (0, -1))
            if not first <= seq <= last:
                victims.append(seq)
                places, size = places + 1, size + self.rows[seq].bytes
        if len(sizes) > places or sum(sizes) > size:
            return False
        for seq in victims:
            self.leave(seq, "dropped")
        return True

    def add(self, row: Row) -> int:
        self.last += 1
        self.rows[self.last] = row
        return self.last

    def expected(self, request: list[Draft], claims: Claims) -> list[int | Gap] | type[Exception]:
        fresh: list[Draft] = []
        for one in request:
            if one.id is None or (one.id not in self.ids and one.id not in [other.id for other in fresh]):
                fresh.append(one)
        if any(one.bytes > self.max_bytes for one in fresh):
            return MessageTooLarge
        if not self.fits([one.bytes for one in fresh]):
            if self.overflow == "reject" or (
                self.overflow == "drop_oldest" and not self.make_room([one.bytes for one in fresh], claims)
            ):
                return OutboxFull
            while not self.fits([one.bytes for one in fresh]):
                fresh.pop()
                self.counts["dropped_new"] += 1
        numbers = {}
        for one in fresh:
            numbers[id(one)] = self.add(Row(one.priority, one.bytes, self.now, one.ttl))
            self.counts["enqueued"] += 1
            if one.id is not None:
                self.ids[one.id] = self.last
        result: list[int | Gap] = []
        for one in request:
            if one.id is not None and one.id in self.ids:
                result.append(self.ids[one.id])
            else:
                result.append(numbers.get(id(one), Gap()))
        return result

    # -- what is done to both

    @initialize()
    def begin(self) -> None:
        self.change_caps(max_messages=8, max_bytes=100, max_age=None, overflow="reject")
        assert entries.outbox_time(self.connection, self.clock) == 0

    @rule(requests=st.lists(st.lists(messages, max_size=4), min_size=1, max_size=3), claim=st.booleans())
    def enqueue(self, requests: list[list[Draft]], claim: bool) -> None:
        # Every message an object of its own, as callers make them.
        requests = [
            [Draft(*(getattr(one, name) for name in Draft.__struct_fields__)) for one in request]
            for request in requests
        ]
        claims = {priority: run[:2] for priority in (-1, 0, 1) if claim and (run := self.front(priority, 2))}
        with transaction(self.connection):
            results = entries.enqueue(self.connection, "x", requests, clock=self.clock, claims=claims)
        for request, result in zip(requests, results, strict=True):
            expected = self.expected(request, claims)
            assert (result if isinstance(result, list) else type(result)) == expected

    @rule(size=sizes, priority=priorities, ttl=st.sampled_from([None, 2.0]))
    def insert(self, size: int, priority: int, ttl: float | None) -> None:
        try:
            self.connection.execute(
                "INSERT INTO durablews_outbox (payload, priority, ttl) VALUES (?, ?, ?)", (b"x" * size, priority, ttl)
            )
            failed = False
        except sqlite3.IntegrityError:
            failed = True
        fits = size <= self.max_bytes and (
            self.fits([size]) or (self.overflow == "drop_oldest" and self.make_room([size], {}))
        )
        if fits:
            self.add(Row(priority, size, None, None if ttl is None else int(ttl * 1000)))
            self.counts["enqueued"] += 1
        elif size <= self.max_bytes and self.overflow == "drop_new":
            self.counts["dropped_new"] += 1
            fits = True
        assert failed == (not fits)

    def front(self, priority: int, most: int) -> tuple[int, int, list[int]] | None:
        """Return the first and last of the run that would be in flight, and what it holds."""
        found = sorted(s for s, row in self.rows.items() if row.priority == priority and row.state < REFUSED)[:most]
        return (found[0], found[-1], found) if found else None

    @rule(priority=priorities, most=st.integers(1, 4), stolen=st.integers(0, 1))
    def settle(self, priority: int, most: int, stolen: int) -> None:
        run = self.front(priority, most)
        if run is None:
            return
        described = run_of(self.connection, priority, run[0], run[1])
        if stolen:  # another process drops one of them before the ack comes
            seq = run[2][0]
            self.connection.execute("DELETE FROM durablews_entries WHERE seq = ?", (seq,))
            self.connection.execute(
                "UPDATE durablews_totals SET messages = messages - 1, bytes = bytes - ?", (self.rows[seq].bytes,)
            )
            del self.rows[seq]
        with transaction(self.connection):
            settlement.settle(self.connection, [described])
        for seq in run[2][stolen:]:
            del self.rows[seq]
            self.counts["acked"] += 1

    @rule(priority=priorities, most=st.integers(1, 4))
    def lose(self, priority: int, most: int) -> None:
        run = self.front(priority, most)
        if run is not None:
            with transaction(self.connection):
                settlement.mark_unanswered(
                    self.connection, [run_of(self.connection, priority, run[0], run[1])], self.clock.wall()
                )
            for seq in run[2]:
                self.rows[seq] = replace(self.rows[seq], state=UNANSWERED)
                self.counts["redelivered"] += 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), unknown=st.booleans())
    def refuse(self, data: st.DataObject, unknown: bool) -> None:
        seq = data.draw(st.sampled_from(sorted(self.rows)))
        with transaction(self.connection):
            done = settlement.refuse(self.connection, seq, Refusal("invalid", unknown=unknown), self.clock.wall())
        assert done == (self.rows[seq].state != REFUSED)
        if done:
            self.rows[seq] = replace(self.rows[seq], state=REFUSED)
            self.counts["refused"] += 1
            self.departed.append((seq, "refused", int(unknown)))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.rows)))
        with transaction(self.connection):
            became = settlement.requeue(self.connection, seq, self.clock.wall(), nacked=True)
        assert (became is None) == (self.rows[seq].state == REFUSED)
        if became is not None:
            assert became == self.requeued(seq)

    def requeued(self, seq: int) -> int:
        became = self.add(replace(self.rows.pop(seq), state=PENDING, tries=()))
        self.ids = {name: became if known == seq else known for name, known in self.ids.items()}
        self.departed.append((seq, "renumbered", 0))
        return became

    @precondition(lambda self: self.waiting())
    @rule(data=st.data(), needs=st.integers(1, 3))
    def set_aside(self, data: st.DataObject, needs: int) -> None:
        seq = data.draw(st.sampled_from(sorted(self.waiting())))
        with transaction(self.connection):
            settlement.set_aside(self.connection, seq, Refusal("too_large", needs=needs, tries=[self.now]))
        self.rows[seq] = replace(self.rows[seq], state=ASIDE, needs=needs, tries=(self.now,))

    @rule(takes=st.integers(0, 3))
    def return_aside(self, takes: int) -> None:
        with transaction(self.connection):
            dead = settlement.return_aside(self.connection, takes, self.now, self.clock.wall(), between=5000, tries=3)
        expected = []
        for seq, row in sorted(self.rows.items(), key=lambda item: (-item[1].priority, item[0])):
            if row.state == ASIDE and row.needs <= takes:
                self.requeued(seq)
            elif row.state == ASIDE and self.now - row.tries[-1] >= 5000:
                self.rows[seq] = replace(row, tries=(*row.tries, self.now))
                if len(row.tries) == 2:
                    expected.append(seq)
                    self.rows[seq] = replace(row, state=REFUSED)
                    self.counts["refused"] += 1
                    self.departed.append((seq, "refused", 0))
        assert [seq for seq, _ in dead] == expected

    @rule(milliseconds=st.sampled_from([0, 1, 1000, 6000, 30_000]), stamp=st.booleans(), claim=st.booleans())
    def expire(self, milliseconds: int, stamp: bool, claim: bool) -> None:
        self.clock.advance(milliseconds)
        self.now += milliseconds
        claims = {priority: run[:2] for priority in (-1, 0, 1) if claim and (run := self.front(priority, 1))}
        with transaction(self.connection):
            now = entries.outbox_time(self.connection, self.clock)
            if stamp:
                settlement.stamp_unseen(self.connection, now)
            gone = settlement.expire(self.connection, now, self.max_age, claims, self.clock.wall())
        assert now == self.now
        if stamp:
            self.rows = {s: replace(row, born=now if row.born is None else row.born) for s, row in self.rows.items()}
        over = {
            seq
            for seq, row in self.waiting().items()
            if row.ttl is not None and row.born is not None and row.born + row.ttl <= now
        }
        for seq, row in sorted(self.waiting().items()):
            if self.max_age is None or row.born is None or row.born > now - self.max_age:
                break
            over.add(seq)
        over = {s for s in over if not (c := claims.get(self.rows[s].priority)) or not c[0] <= s <= c[1]}
        assert sorted(gone) == sorted(over)
        assert len(gone) == len(set(gone))
        for seq in gone:
            self.leave(seq, "expired")

    @rule(
        max_messages=st.integers(1, 10),
        max_bytes=st.integers(10, 120),
        max_age=st.sampled_from([None, 10_000]),
        overflow=st.sampled_from(["reject", "drop_oldest", "drop_new"]),
    )
    def change_caps(self, max_messages: int, max_bytes: int, max_age: int | None, overflow: str) -> None:
        with transaction(self.connection):
            entries.write_caps(
                self.connection,
                {"max_messages": max_messages, "max_bytes": max_bytes, "max_age": max_age, "overflow": overflow},
            )
        self.max_messages, self.max_bytes, self.max_age, self.overflow = max_messages, max_bytes, max_age, overflow

    @rule(draining=st.booleans(), reboot=st.booleans())
    def open_again(self, draining: bool, reboot: bool) -> None:
        now = entries.outbox_time(self.connection, self.clock)
        self.connection.execute("UPDATE durablews_meta SET clock = ?, boot_clock = ?", (now, self.clock.boot()))
        self.connection.close()
        if reboot:
            self.clock.reboot(off=10**9)
        self.connection = open_again(self.folder / "agent.db")
        assert entries.outbox_time(self.connection, self.clock) == now
        if draining:
            with transaction(self.connection):
                path = str(self.folder / "agent.db")
                identity.take_over(self.connection, path, machine="m", window=1, draw=lambda _: 9)
                identity.leave(self.connection)
            self.last += 10

    # -- what must always hold

    @invariant()
    def the_rows_are_those_of_the_model(self) -> None:
        found = self.connection.execute(
            "SELECT seq, priority, bytes, born, ttl, ack_state FROM durablews_entries ORDER BY seq"
        ).fetchall()
        assert found == [
            (seq, row.priority, row.bytes, row.born, row.ttl, row.state) for seq, row in sorted(self.rows.items())
        ]

    @invariant()
    def the_counts_are_those_of_the_model(self) -> None:
        kept = totals(self.connection)
        for name, count in self.counts.items():
            if name not in ("messages", "bytes", "dead_messages", "dead_bytes"):
                assert (name, kept[name]) == (name, count)
        assert sorted(departed(self.connection)) == sorted(self.departed)

    @invariant()
    def no_sequence_comes_twice(self) -> None:
        assert entries.last_sequence(self.connection) == self.last

    @invariant()
    def ids_lead_to_their_messages(self) -> None:
        assert dict(self.connection.execute("SELECT id, seq FROM durablews_ids").fetchall()) == self.ids

    @invariant()
    def what_is_next_is_in_order(self) -> None:
        expected = sorted((-row.priority, seq) for seq, row in self.rows.items() if row.state < REFUSED)
        found, unfit = entries.peek(self.connection, after={}, limit=100, max_bytes=1 << 20)
        assert [(-entry.priority, entry.seq) for entry in found] == expected
        assert unfit == []


class TestModel(Model.TestCase):  # type: ignore[misc,valid-type]
    """An outbox does what its model does, whatever happens to it in whatever order (P2, P3, P4, P6)."""

    settings = settings(
        max_examples=60,
        stateful_step_count=30,
        deadline=None,
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    )
