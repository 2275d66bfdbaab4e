"""Random histories: the real client logic and the real server logic over links that break, with crashes everywhere.

Client: `Delivery` and the outbox's own SQL, driven as `link`, `manager` and `storage` drive them, but with any delay
and a crash between any two steps. Server: one `Exchange` per connection over one ledger. The rules are those of
PROTOCOL.md; with any one of them switched off (`MUTANTS`) some history goes wrong, which is tested too.

Not played: two copies of one outbox, several streams at a time, a lost tail of the log (all of PROTOCOL.md section 5
but the restored backup), sizes. There is no interface yet that revives a dead letter; the history does it in SQL,
under a new sequence.
"""

from __future__ import annotations

import random
import sqlite3
from collections import Counter, deque
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import totals

from durablews import entries, identity, settlement
from durablews.config import DeliveryConfig
from durablews.delivery.actions import (
    Action,
    Close,
    MarkUnanswered,
    Postpone,
    Refuse,
    RenewStream,
    Requeue,
    Settle,
    TakeBack,
    Want,
    Welcomed,
)
from durablews.delivery.backlog import BATCH_MESSAGES, READ_AHEAD_MESSAGES
from durablews.delivery.delivery import Delivery
from durablews.delivery.lane import Lane, Transmission
from durablews.delivery.suspicion import Closed
from durablews.draining import exposure
from durablews.entries import Gap
from durablews.jobs import transaction
from durablews.messages import Run, draft
from durablews.receiver import ledger
from durablews.receiver.exchange import Exchange
from durablews.receiver.messages import Message
from durablews.receiver.session import Close as ServerClose
from durablews.receiver.session import Refusal, Session
from durablews.schema import apply_migrations
from durablews.wire.dialect import Introduction, Wire
from durablews.wire.frames import JSON, MSGPACK, Ack, Bye, Codec, Msgs, Nack, Ping, Welcome
from durablews.wire.native import NativeDialect

HISTORIES = 300
STEP_LIMIT = 30_000
#: What a drainer may have sent beyond its window when it dies: answered, and the deletion not yet committed.
READ_AHEAD = READ_AHEAD_MESSAGES + BATCH_MESSAGES
INSTANCE = "0123456789abcdef"

#: What is switched off, and what that means. Each must be found.
MUTANTS = {
    "C2": "a frame names no predecessor",
    "C3 revive": "a dead letter comes back under its old sequence",
    "C3 renumber": "anything waiting may be renumbered",
    "C3 restart": "after a crash nothing counts as transmitted",
    "C4": "an ack settles what is not in flight",
    "C6": "what was never sent goes before what is sent again",
    "C8": "what let a sequence be passed over is forgotten in a crash",
    "S2": "a repeat is refused",
    "S6": "an older connection is not fenced",
    "ack": "the client settles what it has sent",
}


class Violation(AssertionError):
    """A history broke a promise."""


class Clock:
    """The history's time, as the outbox reads it."""

    boot_id = "boot"

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> int:
        return int(self.now * 1000)

    def boot(self) -> int:
        return int(self.now * 1000)


@cache
def _new_outbox() -> bytes:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    with transaction(connection):
        apply_migrations(connection, "histories.db")
    image = connection.serialize()
    connection.close()
    return image


@cache
def _new_ledger() -> bytes:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    ledger.install(connection)
    connection.execute("CREATE TABLE applied (id INTEGER PRIMARY KEY, stream, priority, seq, message)")
    image = connection.serialize()
    connection.close()
    return image


def _opened(image: bytes) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(image)
    return connection


class Connection:
    """One WebSocket with what is on its way in both directions, and the server's side of it."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.to_server: deque[str | bytes] = deque()
        self.to_client: deque[str | bytes | ServerClose] = deque()
        self.closed = False  # by the server
        self.handed = 0


class History:
    """One random history. `off` names the rule that is not kept; `restores` lets backups come back."""

    def __init__(
        self, rng: random.Random, *, messages: int = 150, off: str | None = None, restores: bool = False
    ) -> None:
        self.rng, self.off, self.restores = rng, off, restores
        self.clock = Clock()
        self.codec = Codec(rng.choice((JSON, MSGPACK)))
        self.remaining, self.produced = messages, 0
        self.names: dict[int, int] = {}  # sequence -> message, as given out
        self.may_repeat: set[int] = set()  # messages that section 5 or C3 excuses
        self.erased: set[int] = set()  # messages that a restored backup does not know, or not as they were
        # What the server thinks of some messages.
        self.refused: set[int] = set()
        self.poison: dict[int, int] = {}
        self.poisoned: set[int] = set()  # what ever was poison, though the owner mended it since
        # The two disks.
        self.disk = _opened(_new_outbox())
        self.server = _opened(_new_ledger())
        self.backup: tuple[bytes, int] | None = None
        overflow = rng.choice(("reject", "drop_oldest", "drop_oldest", "drop_new"))
        entries.write_caps(self.disk, {"max_messages": rng.choice((30, 60, 10_000)), "overflow": overflow})
        self.config = DeliveryConfig(
            window=rng.choice((1, 2, 8, 40)),
            on_retry=rng.choice(("block", "requeue")),
            max_attempts=rng.choice((None, None, 3)),
            rate_limit=rng.choice((None, None, None, 200.0)),
        )
        self.link: Connection | None = None
        self.late: list[Connection] = []
        self.connections = 0
        self.forgetful: dict[int, Callable[[], None]] = {}
        self._open()

    def play(self) -> None:
        """Run to the end and judge."""
        for _ in range(STEP_LIMIT):
            if not self.remaining and not self._waiting() and not self.forgetful:
                self._verdict()
                return
            self._step()
        raise Violation(f"stuck with {self._waiting()} messages")

    def _waiting(self) -> int:
        return int(self.disk.execute("SELECT messages FROM durablews_totals").fetchone()[0])

    def _chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def _step(self) -> None:
        self.clock.now += self.rng.choice((0.0, 0.0, 0.001, 0.01, 0.1, 0.5))
        dice = self.rng.random()
        if dice < 0.015:
            self._owner_acts()
        elif dice < 0.025:
            self._drop_link(Closed(code=1006), keep=self._chance(0.5))
        elif dice < 0.030:
            self._crash()
        elif dice < 0.045:
            self._server_speaks()
        elif dice < 0.050:
            self._stray_answer()
        elif dice < 0.100 and self.remaining:
            self._produce()
        else:
            possible = self._possible()
            if possible:
                self.rng.choice(possible)()
            else:
                self._quiet()

    def _possible(self) -> list[Callable[[], None]]:
        link = self.link
        possible: list[Callable[[], None]] = []
        if self.changes or self.runs or self.wants:
            possible.append(self._commit)
        if self.news:
            possible.append(self._next_news)
        if self.late and (self.off != "S6" or self._chance(0.05)):
            possible.append(self._serve_late)
        if link is None:
            possible.append(self._connect)
            return possible
        if self.sendable:
            possible.append(self._send)
        if link.to_server:
            possible.append(self._serve)
        if link.to_client:
            possible.append(self._read)
        timer = self.delivery.timer(self.clock.now)
        if timer is not None and timer <= self.clock.now:
            possible.append(self._timer)
        return possible

    def _quiet(self) -> None:
        """Nothing moves by itself: whatever still waits must wait for a timer (P8)."""
        timer = self.delivery.timer(self.clock.now)
        if timer is None:
            queued = self.disk.execute("SELECT count(*) FROM durablews_entries WHERE ack_state < 2").fetchone()[0]
            if queued and self.delivery.ready and not self.forgetful:
                raise Violation(f"{queued} messages wait for nothing")
        else:
            self.clock.now = max(self.clock.now, timer)

    # -- the client's process

    def _open(self) -> None:
        """Begin a process on what is on the disk."""
        self.changes: list[tuple[Callable[[], object], Callable[[], None] | None]] = []
        self.runs: list[Run] = []
        self.wants: list[Want] = []
        self.news: deque[Callable[[], None]] = deque()
        self.claims: dict[int, tuple[int, int]] = {}
        self.sendable = False
        if self.off == "C3 restart":
            self.disk.execute("UPDATE durablews_meta SET draining = 0")
        with transaction(self.disk):
            self.stream = identity.take_over(
                self.disk, __file__, machine="m", window=self.config.window + READ_AHEAD, draw=self.rng.randrange
            )
        self.delivery = Delivery(self.config, instance=INSTANCE)

    def _crash(self) -> None:
        """The process dies, with everything that it kept in memory only."""
        if self.link is not None and not self.link.closed and self._chance(0.5):
            self.late.append(self.link)
        self.link = None
        self.forgetful.clear()
        if self.restores and self._chance(0.5):
            self._restore()
        self._open()

    def _restore(self) -> None:
        if self.backup is None:
            self.backup = (self.disk.serialize(), self.produced)
            return
        image, produced = self.backup
        self.backup = None
        passed_over = {row[0] for row in self.disk.execute("SELECT seq FROM durablews_departed")}
        held = {int(row[0]) for row in self.disk.execute("SELECT payload FROM durablews_entries")}
        self.disk.close()
        self.disk = _opened(image)
        rows = self.disk.execute("SELECT seq, payload FROM durablews_entries").fetchall()
        # What was sent after the backup went with the disk, which nobody promised; what came back may repeat.
        self.may_repeat |= held | {int(payload) for _, payload in rows}
        self.erased |= set(range(produced + 1, self.produced + 1))
        # Named in section 5 as not covered: what the erased life refused or renumbered while later ones were applied.
        self.erased |= {int(payload) for seq, payload in rows if seq in passed_over}

    def _commit(self, job: Callable[[], object] | None = None) -> None:
        """One transaction of `Storage`: what was settled, changes, requests; then the reads."""
        runs, self.runs = self.runs, []
        changes, self.changes = self.changes, []
        wants, self.wants = self.wants, []
        with transaction(self.disk):
            if runs:
                settlement.settle(self.disk, runs)
            for change, _ in changes:
                change()
            if job is not None:
                job()
        for _, done in changes:
            if done is not None:
                self.news.append(done)
        for want in wants:
            self._fetch(want)

    def _fetch(self, want: Want) -> None:
        found, unfit = entries.peek(
            self.disk,
            after=want.after,
            closed=want.closed,
            limit=want.limit,
            max_bytes=want.max_bytes,
            above=want.above,
        )
        assert not unfit
        for entry in found:
            self.claims[entry.priority] = (0, entry.seq)
        if self.forgetful:
            found = [entry for entry in found if entry.seq not in self.forgetful]
        if self.off == "C6" and not all(entry.transmissions for entry in found):
            found = [entry for entry in found if not entry.transmissions]
        delivery = self.delivery
        self.news.append(lambda: delivery.supply(want, found, [], self.clock.now))

    def _next_news(self) -> None:
        self.news.popleft()()
        self._act()

    def _act(self) -> None:
        """Do what `Delivery` asks, as `Link` does."""
        for action in self.delivery.actions():
            self._do(action)
        if self.link is not None:
            self.sendable = True
            want = self.delivery.wanted(self.clock.now)
            if want is not None:
                self.wants.append(want)

    def _do(self, action: Action) -> None:
        if isinstance(action, Settle):
            if self.off != "ack":
                self.runs.append(action.run)
        elif isinstance(action, MarkUnanswered):
            self._change(lambda: settlement.mark_unanswered(self.disk, action.runs, self.clock.wall()))
        elif isinstance(action, TakeBack):
            self._change(lambda: settlement.take_back(self.disk, action.run, self.clock.wall()))
        elif isinstance(action, Refuse | Requeue):
            self._record(action)
        elif isinstance(action, RenewStream):
            self._renew()
        elif isinstance(action, Welcomed):
            self._change(lambda: identity.confirm_raise(self.disk))
        elif isinstance(action, Close):
            self._drop_link(Closed(code=action.code, reason=action.reason, leaving=True), keep=True)
        else:
            assert isinstance(action, Postpone), action

    def _change(self, change: Callable[[], object], done: Callable[[], None] | None = None) -> None:
        self.changes.append((change, done))

    def _record(self, action: Refuse | Requeue) -> None:
        delivery = self.delivery

        def change() -> None:
            if isinstance(action, Refuse):
                settlement.refuse(self.disk, action.seq, action.refusal, self.clock.wall())
            else:
                settlement.requeue(self.disk, action.seq, self.clock.wall())

        def done() -> None:
            delivery.recorded(action.priority, action.seq)

        if self.off == "C8":
            self.forgetful[action.seq] = change
            self.news.append(done)
        else:
            self._change(change, done)

    def _renew(self) -> None:
        def renew() -> None:
            self.stream = identity.renew_stream(self.disk)
            # What was unanswered may be applied twice (PROTOCOL.md section 5).
            self.may_repeat |= {int(row[0]) for row in self.disk.execute("SELECT payload FROM durablews_entries")}

        self._commit(renew)
        self.delivery.introduce(self._introduction())

    def _introduction(self) -> Introduction:
        return Introduction(self.stream, INSTANCE, identity.claimed_last(self.disk), 1 << 20, "test")

    # -- messages come and go

    def _produce(self) -> None:
        for _ in range(min(self.rng.choice((1, 1, 5, 20)), self.remaining)):
            number = self.produced + 1
            priority = self.rng.choice((0, 0, 1, -1))
            if self._chance(0.05):
                self.refused.add(number)
            elif self._chance(0.01):
                self.poison[number] = self.rng.choice((1009, 4400))
                self.poisoned.add(number)
            if self._chance(0.1):
                self._insert(number, priority)
            else:
                self._enqueue(number, priority, 20.0 if self._chance(0.05) else None)
        self.delivery.stored()
        self._act()

    def _enqueue(self, number: int, priority: int, ttl: float | None) -> None:
        payload = str(number).encode() if number % 3 == 0 else number
        request = [draft(payload, priority=priority, ttl=ttl)]
        results: list[object] = []
        self._commit(
            lambda: results.extend(entries.enqueue(self.disk, "x", [request], clock=self.clock, claims=self.claims))
        )
        (result,) = results
        if isinstance(result, list) and not isinstance(result[0], Gap):
            self._accepted(number, result[0])

    def _insert(self, number: int, priority: int) -> None:
        """Another process inserts with plain SQL; what it drops to make room may be in flight here."""
        last = entries.last_sequence(self.disk)
        try:
            self.disk.execute("INSERT INTO durablews_outbox (payload, priority) VALUES (?, ?)", (str(number), priority))
        except sqlite3.IntegrityError:
            return
        if entries.last_sequence(self.disk) > last:
            self._accepted(number, entries.last_sequence(self.disk))

    def _accepted(self, number: int, seq: int) -> None:
        self.produced, self.remaining = number, self.remaining - 1
        self.names[seq] = number

    def _owner_acts(self) -> None:
        act = self.rng.choice((self._expire, self._renumber, self._revive, self._finish_forgetful))
        act()

    def _expire(self) -> None:
        def expire() -> None:
            settlement.stamp_unseen(self.disk, entries.outbox_time(self.disk, self.clock))
            now = entries.outbox_time(self.disk, self.clock)
            for seq in settlement.expire(self.disk, now, None, self.claims, self.clock.wall()):
                state = self.disk.execute("SELECT unknown FROM durablews_departed WHERE seq = ?", (seq,)).fetchone()
                number = self.names_now()[seq]
                if (
                    not state[0]
                    and self.server.execute("SELECT 1 FROM applied WHERE message = ?", (number,)).fetchone()
                ):
                    if number not in self.may_repeat:
                        raise Violation(f"message {number} was applied and is reported as expired unsent")

        self._commit(expire)

    def _renumber(self) -> None:
        """Move something to the back of its queue that was never transmitted (C3), or anything when that is off."""

        def renumber() -> None:
            state = "< 2" if self.off == "C3 renumber" else "= 0"
            rows = self.disk.execute(f"SELECT seq, priority FROM durablews_entries WHERE ack_state {state}").fetchall()
            free = [
                seq for seq, priority in rows if self.off == "C3 renumber" or seq > self.claims.get(priority, (0, 0))[1]
            ]
            if free:
                settlement.requeue(self.disk, self.rng.choice(free), self.clock.wall())

        self._commit(renumber)
        self.delivery.stored()
        self._act()

    def _revive(self) -> None:
        def revive() -> None:
            row = self.disk.execute(
                "SELECT seq, refusal, bytes, payload FROM durablews_entries WHERE ack_state = 2 LIMIT 1"
            ).fetchone()
            if row is None:
                return
            seq, refusal, size, payload = row
            number = int(payload)
            if '"unknown":true' in refusal:
                self.may_repeat.add(number)
            self.refused.discard(number)
            self.poison.pop(number, None)
            self.disk.execute(
                "UPDATE durablews_entries SET ack_state = 0, refusal = NULL, nacks = 0 WHERE seq = ?", (seq,)
            )
            self.disk.execute(
                "UPDATE durablews_totals SET messages = messages + 1, bytes = bytes + :b,"
                " dead_messages = dead_messages - 1, dead_bytes = dead_bytes - :b",
                {"b": size},
            )
            if self.off != "C3 revive":
                settlement.requeue(self.disk, seq, self.clock.wall())

        self._commit(revive)
        self.delivery.stored()
        self._act()

    def _finish_forgetful(self) -> None:
        """With C8 off: what was kept in memory only reaches the disk at last."""
        lazy, self.forgetful = self.forgetful, {}
        with transaction(self.disk):
            for change in lazy.values():
                change()
        if lazy:
            self.delivery.stored()
            self._act()

    # -- the link

    def _connect(self) -> None:
        self._commit()
        name = "same" if self.off == "S6" else f"connection {self.connections}"
        self.connections += 1
        session = Session(self.codec, window=self.rng.choice((1, 3, 8, 32)), max_bytes=65_536)
        self.link = Connection(Exchange(session, connection_id=name, clock=self.clock))
        wire: Wire = NativeDialect().connection(self.codec.subprotocol)
        if self.off == "C2":
            encode = wire.encode
            wire.encode = lambda priority, after, batch: encode(priority, None, batch)  # type: ignore[method-assign]
        self.delivery.connected(wire, self._introduction())
        self._act()

    def _drop_link(self, closed: Closed, *, keep: bool) -> None:
        """The connection ends; half of the time the server still has to read what was on its way."""
        link, self.link = self.link, None
        if link is None:
            return
        if keep and not link.closed and link.to_server:
            self.late.append(link)
        self.delivery.disconnected(closed, self.clock.now)
        self.claims = {}
        self.sendable = False
        for action in self.delivery.actions():
            self._do(action)

    def _send(self) -> None:
        assert self.link is not None
        frame = self.delivery.frame_to_send(self.clock.now)
        if frame is None:
            self.sendable = False
            if self._chance(0.5):
                self.delivery.taken(self.link.handed, self.clock.now)
        else:
            self.link.handed += len(frame)
            sent = frame.decode() if self.codec.text else frame
            if not self.link.closed:
                self.link.to_server.append(sent)
            if self.off == "ack":
                self._settle_on_send(sent)
        link = self.link
        self._act()
        if frame is None and self.link is link:
            self.sendable = False

    def _settle_on_send(self, sent: str | bytes) -> None:
        decoded = self.codec.decode_client(sent)
        if isinstance(decoded, Msgs):
            for item in decoded.items:
                self.runs.append(Run(decoded.priority, item.seq, item.seq, 1, -1))

    def _timer(self) -> None:
        self.delivery.handle_timer(self.clock.now)
        self._act()

    def _read(self) -> None:
        assert self.link is not None
        frame = self.link.to_client.popleft()
        if isinstance(frame, ServerClose):
            self._drop_link(Closed(code=frame.code, reason=frame.reason, received=True), keep=False)
        else:
            self.delivery.receive(frame, self.clock.now)
            self._act()

    def _stray_answer(self) -> None:
        """An answer comes for what is not in flight: it must change nothing (C4)."""
        if self.link is None or not self.delivery.ready:
            return
        lanes = self.delivery._backlog.lanes
        priority = self.rng.choice((-1, 0, 1, 7))
        lane = lanes.get(priority)
        if lane is not None and lane.flight:
            return
        answer = self.rng.choice((Ack(priority, 2**52), Nack(priority, 1, True, "invalid"), Nack(priority, 2**52)))
        self.delivery.receive(self._wire(answer), self.clock.now)
        self._act()

    # -- the server

    def _wire(self, frame: Ack | Nack | Bye | Ping) -> str | bytes:
        data = self.codec.encode(frame)
        return data.decode() if self.codec.text else data

    def _apply(self, connection: sqlite3.Connection, message: Message) -> Refusal | None:
        number = int(message.raw)
        connection.execute(
            "INSERT INTO applied (stream, priority, seq, message) VALUES (?, ?, ?, ?)",
            (message.stream, message.priority, message.seq, number),
        )
        if number in self.refused:
            return Refusal("invalid", "never")
        if self._chance(0.03):
            return Refusal("busy", retry=self.rng.choice((0.0, 0.2, 7.0)))
        if self._chance(0.02):
            raise RuntimeError("the transaction failed")
        return None

    def _serve(self) -> None:
        link = self.link
        assert link is not None
        self._serve_one(link, crashes=True)

    def _serve_late(self) -> None:
        """The server reads on, on a connection that the client has left."""
        old = self.rng.choice(self.late)
        if not old.to_server or old.closed or self._chance(0.02):
            self.late.remove(old)
            return
        self._serve_one(old, crashes=False)

    def _serve_one(self, link: Connection, *, crashes: bool) -> None:
        frame = link.to_server.popleft()
        decoded = self.codec.decode_client(frame)
        if isinstance(decoded, Msgs):
            codes = [self.poison[int(item.payload)] for item in decoded.items if int(item.payload) in self.poison]
            if codes:  # like a frame over its limit: nobody looks at what it would have said
                self._server_closes(link, ServerClose(codes[0], "poison"))
                return
            if self.off == "S2" and self._chance(0.1) and self._is_repeat(link, decoded):
                link.to_client.append(self._wire(Nack(decoded.priority, decoded.items[0].seq, False, "busy")))
                return
        outcome = link.exchange.handle(self.server, frame, self._apply)
        if crashes and self._chance(0.02):  # after the commit, before the answer
            self._drop_link(Closed(code=1006), keep=False)
            return
        for answer in outcome.frames:
            link.to_client.append(answer)
        if outcome.close is not None:
            if outcome.close.code in (1012, 4400):
                raise Violation(f"the server closed with {outcome.close}: {outcome.error}")
            self._server_closes(link, outcome.close)

    def _is_repeat(self, link: Connection, frame: Msgs) -> bool:
        row = self.server.execute(
            "SELECT seq FROM durablews_seen WHERE stream = ? AND priority = ?", (link.exchange.stream, frame.priority)
        ).fetchone()
        return row is not None and frame.items[0].seq <= int(row[0])

    def _server_closes(self, link: Connection, close: ServerClose) -> None:
        link.to_client.append(close)
        link.to_server.clear()
        link.closed = True

    def _server_speaks(self) -> None:
        link = self.link
        if link is None or link.closed or not link.exchange.session.open:
            return
        kind = self.rng.choice(("flow", "flow", "pause", "bye", "ping"))
        if kind == "flow":
            link.to_client.append(link.exchange.session.flow(self.rng.choice((1, 2, 8, 100))))
        elif kind == "pause":
            link.to_client.append(link.exchange.session.flow(0))
        elif kind == "ping":
            link.to_client.append(self._wire(Ping(5)))
        elif self._chance(0.2):
            link.to_client.append(self._wire(Bye(1000)))

    # -- the end

    def names_now(self) -> dict[int, int]:
        """Return the message of every sequence that was ever given out."""
        names = dict(self.names)
        for seq, became in self.disk.execute(
            "SELECT seq, became FROM durablews_departed WHERE became IS NOT NULL ORDER BY id"
        ):
            names[became] = names[seq]
        return names

    def _verdict(self) -> None:
        rows = self.server.execute("SELECT stream, priority, seq, message FROM applied ORDER BY id").fetchall()
        times = Counter(row[3] for row in rows)
        names = self.names_now()
        dead = {int(row[0]) for row in self.disk.execute("SELECT payload FROM durablews_entries WHERE ack_state = 2")}
        gone = {
            names[row[0]]
            for row in self.disk.execute("SELECT seq FROM durablews_departed WHERE reason IN ('expired', 'dropped')")
        }
        twice = {number for number, count in times.items() if count > 1} - self.may_repeat
        if twice:
            raise Violation(f"applied twice: {sorted(twice)}")
        accepted = set(self.names.values()) - self.erased
        lost = accepted - set(times) - dead - gone
        if lost:
            raise Violation(f"settled without having been applied: {sorted(lost)}")
        top: dict[tuple[str, int], int] = {}
        for stream, priority, seq, number in rows:
            if seq <= top.get((stream, priority), 0):
                raise Violation(f"message {number} was applied out of order")
            top[stream, priority] = seq
        for payload, refusal in self.disk.execute("SELECT payload, refusal FROM durablews_entries WHERE ack_state = 2"):
            if ('"poison"' in refusal or '"too_large"' in refusal) and int(payload) not in self.poisoned:
                raise Violation(f"message {payload!r} was blamed for what another one did: {refusal}")
        kept = totals(self.disk)
        if self.off is None and not self.restores:
            departures = sum(kept[name] for name in ("expired", "expired_unanswered", "dropped", "dropped_unanswered"))
            if kept["enqueued"] != len(self.names) or departures != len(gone):
                raise Violation(f"departures were not counted: {kept}")


def play(seed: int, **options: object) -> None:
    """Play one history; a failure names it."""
    try:
        History(random.Random(seed), **options).play()  # type: ignore[arg-type]
    except AssertionError as exc:
        raise Violation(f"history {seed} with {options}: {exc}") from exc


def first_violation(histories: int, off: str) -> str | None:
    """Return how a mutant was found, or None."""
    for seed in range(histories):
        try:
            play(seed, off=off)
        except Violation as exc:
            return str(exc)
    return None


@pytest.mark.parametrize("part", range(3))
def test_whatever_happens_each_message_is_applied_once_in_order_or_counted(part: int) -> None:
    """Over links that break, crashes of both ends, refusals, failures, pauses, expiry and caps: no message is lost or
    applied twice, order holds, every departure is counted, and the outbox drains (P2 to P5, P8)."""
    for seed in range(part * HISTORIES // 3, (part + 1) * HISTORIES // 3):
        play(seed)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(min_value=HISTORIES), messages=st.integers(1, 60))
def test_histories_that_nobody_has_seen_hold_too(seed: int, messages: int) -> None:
    """The same for new histories on every run."""
    play(seed, messages=messages)


def test_a_restored_backup_repeats_at_most_what_it_held_and_loses_nothing_that_it_held() -> None:
    """An outbox that goes back in time takes a new stream: what it holds is applied, perhaps twice, never not at all,
    and what comes after it is never taken for something older (P4, PROTOCOL.md section 5)."""
    for seed in range(60):
        play(seed, restores=True)


@pytest.mark.parametrize("off", MUTANTS)
def test_a_rule_that_is_not_kept_is_found(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any one rule switched off some history goes wrong: these histories can fail."""
    if off == "C4":
        settle = Lane.settle

        def settle_what_was_never_sent(lane: Lane, seq: int, now: float) -> Run | None:
            batch = [entry for entry in lane.ready if entry.seq <= seq]
            if batch and not lane.flight:
                lane.send(Transmission(batch, 0, now))
            return settle(lane, seq, now)

        monkeypatch.setattr(Lane, "settle", settle_what_was_never_sent)
    assert first_violation(400, off) is not None, MUTANTS[off]


def test_after_a_crash_everything_that_was_sent_counts_as_transmitted() -> None:
    """Also what was sent after an ack whose deletion the crash undid: the window counts what is unanswered, the disk
    still holds what was answered (C3, P4)."""
    disk, clock = _opened(_new_outbox()), Clock()
    with transaction(disk):
        identity.take_over(disk, __file__, machine="m", window=exposure(1), draw=lambda _: 0)
        (seqs,) = entries.enqueue(disk, "x", [[draft(1), draft(2), draft(3)]], clock=clock)
    delivery = Delivery(DeliveryConfig(window=1), instance=INSTANCE)
    delivery.connected(NativeDialect().connection(JSON), Introduction("0" * 32, INSTANCE, 3, 1 << 20, "test"))
    codec = Codec(JSON)
    delivery.receive(codec.encode(Welcome(1, 65_536)).decode(), clock.now)
    want = delivery.wanted(clock.now)
    assert want is not None
    found, _ = entries.peek(disk, after={}, limit=want.limit, max_bytes=want.max_bytes)
    delivery.supply(want, found, [], clock.now)
    assert delivery.frame_to_send(clock.now) is not None  # hello
    assert delivery.frame_to_send(clock.now) is not None
    assert isinstance(seqs, list)
    delivery.receive(codec.encode(Ack(0, found[0].seq)).decode(), clock.now)
    assert delivery.frame_to_send(clock.now) is not None  # the second is sent; the process dies before it deletes
    with transaction(disk):
        identity.take_over(disk, __file__, machine="m", window=exposure(1), draw=lambda _: 0)
    states = [row[0] for row in disk.execute("SELECT ack_state FROM durablews_entries ORDER BY seq")]
    assert states[:2] == [1, 1]
