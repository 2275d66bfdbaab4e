"""A message that is stored while the drainer has nothing else to send goes out without a look into the file.

That is an order of its own, beside the one of `entries.peek`: whatever else could stand before the message sends it the
long way (P3), and nothing is sent that is not synced (PROTOCOL.md C8).
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from servers import FAST, Inbox, until

import durablews
from durablews.config import DeliveryConfig
from durablews.delivery.actions import Requeue, Want
from durablews.delivery.backlog import READ_AHEAD_BYTES, READ_AHEAD_MESSAGES, Backlog
from durablews.delivery.delivery import Delivery
from durablews.messages import Entry, Run, draft
from durablews.outbox import Outbox
from durablews.wire.dialect import Introduction
from durablews.wire.frames import JSON, Codec, Welcome
from durablews.wire.native import NativeDialect

SEED = int(os.environ.get("DURABLEWS_TEST_SEED", "0")) or random.randrange(1 << 32)


def entry(seq: int, priority: int = 0, size: int = 2) -> Entry:
    return Entry(seq, priority, "{}", None, None, 0, size, 0, 0)


def wanted(backlog: Backlog) -> Want:
    want = backlog.wanted(0.0)
    assert want is not None
    return want


def caught_up() -> Backlog:
    """Return a backlog whose last read found nothing after sequence 5."""
    backlog = Backlog(DeliveryConfig())
    backlog.stored()
    backlog.supply(wanted(backlog), [entry(5)], [], 0.0)
    backlog.supply(wanted(backlog), [], [], 0.0)
    assert backlog.wanted(0.0) is None
    return backlog


# -- when it may go at once


def test_what_is_stored_after_everything_was_read_is_taken_in_order() -> None:
    """P3: by priority, whatever order the senders came in."""
    backlog = caught_up()
    assert backlog.append([entry(6), entry(7, 1), entry(8)])
    assert backlog.wanted(0.0) is None
    assert {priority: [one.seq for one in lane.ready] for priority, lane in backlog.lanes.items()} == {
        0: [5, 6, 8],
        1: [7],
    }
    backlog.stored()
    assert wanted(backlog).after == {0: 8, 1: 7}


def unread(backlog: Backlog) -> None:
    backlog.stored()


def being_read(backlog: Backlog) -> None:
    backlog.stored()
    wanted(backlog)


def held(backlog: Backlog) -> None:
    backlog.hold(0, 6, until=10.0)


def recording(backlog: Backlog) -> None:
    backlog.pass_over(backlog.lanes[0], Requeue(0, 5))


def read_already(backlog: Backlog) -> None:
    backlog.lanes[0].read([entry(6)])


def full_of_messages(backlog: Backlog) -> None:
    backlog.lanes[0].read([entry(5)] * (READ_AHEAD_MESSAGES - 1))


def full_of_bytes(backlog: Backlog) -> None:
    backlog.lanes[0].read([entry(5, size=READ_AHEAD_BYTES - 3)])


@pytest.mark.parametrize(
    "trouble", [unread, being_read, held, recording, read_already, full_of_messages, full_of_bytes]
)
def test_what_may_have_something_before_it_is_read_like_the_rest(trouble: Callable[[Backlog], None]) -> None:
    """P3, P6: it is not taken, and neither is another of the same moment."""
    backlog = caught_up()
    trouble(backlog)
    before = {priority: list(lane.ready) for priority, lane in backlog.lanes.items()}
    assert not backlog.append([entry(6), entry(7, 3)])
    assert {priority: list(lane.ready) for priority, lane in backlog.lanes.items() if lane.ready} == {
        priority: ready for priority, ready in before.items() if ready
    }


def test_before_the_welcome_nothing_was_read_that_it_could_follow() -> None:
    delivery = Delivery(DeliveryConfig(), instance="0123456789abcdef")
    delivery.connected(NativeDialect().connection(JSON), Introduction("0" * 32, "0123456789abcdef", 7, 1 << 20, "test"))
    delivery.stored([entry(6)])
    delivery.receive(Codec(JSON).encode(Welcome(1024, 1 << 20)).decode(), 0.0)
    want = delivery.wanted(0.0)
    assert want is not None
    assert want.after == {}


# -- what the writer hands over


class Draining(Outbox):
    """An outbox whose writer is a drainer's, with nobody who drains."""

    _drains = True

    def __init__(self, path: Path, **settings: Any) -> None:
        super().__init__(path, **settings)
        self.told: list[list[int]] = []
        self.storage.on_stored = self._note

    def _note(self, entries: Sequence[Entry]) -> None:
        self.told.append([entry.seq for entry in entries])


def insert_as_others_do(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("INSERT INTO durablews_outbox (payload) VALUES ('{}')")


async def test_the_writer_hands_over_what_it_alone_has_stored(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    async with Draining(path) as box:
        await box.send({})
        box.told.clear()
        await box.send_many([{}, {}])
        assert box.told.pop() == [2, 3]
        insert_as_others_do(path)
        await box.send({})
        assert box.told.pop() == []  # 4 is not known here
        await box.send({})
        assert box.told.pop() == [6]
        # Seen by a transaction that stores nothing: the next one must not pass over it.
        insert_as_others_do(path)
        box.storage.settle(Run(0, 1, 1, 1, 2))
        await until(lambda: box.told)
        assert box.told.pop() == []
        await asyncio.gather(box.storage.change(lambda connection: None), box.storage.enqueue([draft({})]))
        assert box.told.pop() == []  # the change may have stored something, too
        await box.send({}, id="mine")
        assert box.told.pop() == []
        await box.send_many([{}] * 65)
        assert box.told.pop() == []
        assert not box.told


async def test_what_overtakes_a_change_that_the_disk_holds_up_is_not_handed_over(tmp_path: Path) -> None:
    """C8: the change may give an earlier message its place back, or another one."""
    denied = True

    def authorize(action: int, *_: object) -> int:
        return sqlite3.SQLITE_DENY if denied and action == sqlite3.SQLITE_DELETE else sqlite3.SQLITE_OK

    async with Draining(tmp_path / "agent.db") as box:
        await box.send({})
        await box.storage.read(lambda connection: connection.set_authorizer(authorize))
        changing = box.storage.change(lambda connection: connection.execute("DELETE FROM durablews_departed"))
        await box.storage.enqueue([draft({})])
        assert box.told[-1] == []
        assert not changing.done()
        denied = False
        await changing
        await box.send({})
        assert box.told[-1] == [3]


async def test_what_is_not_synced_is_not_handed_over(tmp_path: Path) -> None:
    """C8: under durability="process" it goes the way that syncs it first."""
    async with Draining(tmp_path / "agent.db", durability="process") as box:
        await box.send({})
        await box.send({})
        assert box.told == [[], []]


async def test_what_finds_no_room_is_not_handed_over(tmp_path: Path) -> None:
    async with Draining(tmp_path / "agent.db", caps={"max_messages": 2, "overflow": "drop_new"}) as box:
        await box.send({})
        await box.send_many([{}, {}, {}])
        assert box.told[-1] == []


# -- all of it together


async def test_messages_of_many_writers_arrive_in_order_and_none_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1, P3: own and foreign ones of three priorities, while acknowledgements come in."""
    chance = random.Random(SEED)
    taken = 0
    real = Backlog.append

    def append(self: Backlog, entries: Sequence[Entry]) -> bool:
        nonlocal taken
        done = real(self, entries)
        taken += done
        return done

    monkeypatch.setattr(Backlog, "append", append)
    path, inbox = tmp_path / "agent.db", Inbox(tmp_path / "inbox.db")
    async with inbox.serving(), durablews.connect(inbox.url, path, reconnect=FAST, proxy=None) as client:
        await until(lambda: client.state.value == "CONNECTED")
        with closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as other:
            for number in range(400):
                priority = chance.choice([-1, 0, 0, 0, 1])
                if chance.random() < 0.25:
                    other.execute(
                        "INSERT INTO durablews_outbox (payload, priority) VALUES (?, ?)", (str(number), priority)
                    )
                else:
                    await client.send(number, priority=priority)
                if chance.random() < 0.2:
                    await asyncio.sleep(chance.random() / 100)  # acknowledgements come, and find others' messages
        assert await client.flush(60)
    rows = inbox.rows()
    assert sorted(int(payload) for _, _, payload in rows) == list(range(400)), f"DURABLEWS_TEST_SEED={SEED}"
    for wanted_priority in (-1, 0, 1):
        seqs = [seq for priority, seq, _ in rows if priority == wanted_priority]
        assert seqs == sorted(seqs), f"DURABLEWS_TEST_SEED={SEED}"
    assert taken > 50
