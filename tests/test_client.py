"""The client against real servers and real files: what `async with durablews.connect(...)` promises."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support
from servers import COMMAND, ENVIRONMENT, FAST, Inbox, PlainServer, until, until_true
from websockets.asyncio.server import ServerConnection

import durablews
from durablews import Dropped, Expired, OutboxClosed, OutboxInUse, Rejected, cli, draining, housekeeping
from durablews.client import Client
from durablews.events import Connected, Event, MessageRejected, MessagesDropped, MessagesExpired
from durablews.outbox import Outbox

NOWHERE = "ws://127.0.0.1:9/"  # the discard port: nobody listens


def client(server: PlainServer | Inbox | str, path: Path, **settings: Any) -> Client:
    url = server if isinstance(server, str) else server.url
    return durablews.connect(url, path / "agent.db", **{"reconnect": FAST, "proxy": None, **settings})


async def pending(ws: Client) -> int:
    return (await ws.stats()).pending


@pytest.mark.parametrize("dialect", ["durablews.v1.json", "durablews.v1.msgpack"])
async def test_what_was_sent_without_a_server_arrives_in_order_once_there_is_one(tmp_path: Path, dialect: str) -> None:
    """P1, P3, P7: send returns without any server; then priority and sequence decide, in either encoding."""
    inbox = Inbox(tmp_path / "inbox.db")
    async with inbox.serving():
        pass  # its port is known now, and nobody listens there
    sent: list[tuple[int, Any]] = []
    async with client(inbox, tmp_path, dialect=dialect, delivery={"drain_timeout": 0.05}) as ws:
        for i in range(300):
            priority = (0, 1, -1, 100, -100)[i % 5]
            payload: Any = b"\x00\xff%d" % i if i % 7 == 0 else {"i": i, "text": "süß\u2028 \ud83d\ude00"[:5]}
            receipt = await ws.send(payload, priority=priority, topic="t" if i % 2 else None)
            assert receipt.seq is not None
            sent.append((priority, payload))
        assert await pending(ws) == 300
    ordered = [payload for _, payload in sorted(sent, key=lambda pair: -pair[0])]
    async with inbox.serving(), client(inbox, tmp_path, dialect=dialect) as ws:
        assert await ws.flush(20)
        assert await pending(ws) == 0
        assert (await ws.stats()).acked == 300
    assert inbox.payloads() == ordered
    sequences = [(-priority, seq) for priority, seq, _ in inbox.rows()]
    assert sequences == sorted(sequences)


async def test_a_receipt_is_acked_when_the_server_has_answered(tmp_path: Path) -> None:
    """`await receipt.acked()` returns once the server has the message, and not before."""
    inbox = Inbox(tmp_path / "inbox.db")
    async with inbox.serving(window=0) as receiver, client(inbox, tmp_path) as ws:
        receipt = await ws.send({"celsius": 21.4})
        await until(lambda: ws.state.value == "CONNECTED")
        with pytest.raises(TimeoutError):
            await receipt.acked(timeout=0.05)
        waiting = [asyncio.create_task(receipt.acked()) for _ in range(20)]
        await receiver.flow(10)
        await asyncio.wait_for(asyncio.gather(*waiting), 10)
        await receipt.acked()  # known for ever
        assert inbox.payloads() == [{"celsius": 21.4}]
        assert receipt.stream == inbox_stream(inbox)


def inbox_stream(inbox: Inbox) -> str:
    with closing(sqlite3.connect(inbox.store)) as connection:
        return str(connection.execute("SELECT stream FROM durablews_inbox").fetchone()[0])


async def test_a_refusal_reaches_the_receipt_and_the_events(tmp_path: Path) -> None:
    """P2: `acked` raises Rejected with the server's code and reason; the others go on; a dead letter is counted."""

    async def refuse_the_second(server: PlainServer, ws: ServerConnection) -> None:
        stream = await server.greet(ws)
        while True:
            frame = await server.hear(ws)
            bad = next((i for i, (_, payload, *_) in enumerate(frame["m"]) if payload == "bad"), None)
            if bad is not None:
                seq = frame["m"][bad][0]
                if bad:
                    await server.take(ws, stream, {**frame, "m": frame["m"][:bad]})
                await server.say(ws, t="nack", p=frame["p"], s=seq, code="invalid", final=True, reason="no such field")
            else:
                await server.take(ws, stream, frame)

    seen: list[Event] = []
    async with PlainServer(refuse_the_second) as server, client(server, tmp_path) as ws:
        reading = asyncio.create_task(collect(ws, seen))
        receipts = await ws.send_many(["a", "bad", "c", "d"])
        with pytest.raises(Rejected) as refused:
            await receipts[1].acked(10)
        assert (refused.value.code, refused.value.reason, refused.value.seq) == (
            "invalid",
            "no such field",
            receipts[1].seq,
        )
        assert refused.value.unknown is False
        for receipt in (receipts[0], *receipts[2:]):
            await receipt.acked(10)
        assert await ws.flush(10)
        assert server.payloads == ["a", "c", "d"]
        stats = await ws.stats()
        assert (stats.dead, stats.refused, stats.acked, stats.pending) == (1, 1, 3, 0)
    await reading
    assert MessageRejected(receipts[1].seq or 0, "invalid", "no such field") in seen


async def collect(ws: Client, seen: list[Event]) -> None:
    async for event in ws.events():
        seen.append(event)  # noqa: PERF401 - it is read while the test runs


async def test_expiry_and_drops_reach_the_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P2: Expired and Dropped say which message, and the events and stats count them."""
    monkeypatch.setattr(housekeeping, "_UPKEEP_INTERVAL", 0.05)
    seen: list[Event] = []
    settings: dict[str, Any] = {
        "caps": {"max_messages": 2, "overflow": "drop_oldest"},
        "delivery": {"drain_timeout": 0},
    }
    async with client(NOWHERE, tmp_path, **settings) as ws:
        reading = asyncio.create_task(collect(ws, seen))
        short = await ws.send("short", ttl=0.01)
        with pytest.raises(Expired) as expired:
            await short.acked(10)
        assert (expired.value.seq, expired.value.unknown) == (short.seq, False)
        first, _, _ = [await ws.send(i) for i in range(3)]
        with pytest.raises(Dropped) as dropped:
            await first.acked(10)
        assert (dropped.value.seq, dropped.value.unknown) == (first.seq, False)
        await until(lambda: MessagesDropped(1, "oldest") in seen and MessagesExpired(1, False) in seen)
        stats = await ws.stats()
        assert (stats.expired, stats.dropped, stats.pending) == (1, 1, 2)
    await reading


async def test_what_expired_while_nobody_drained_is_an_event(tmp_path: Path) -> None:
    """P2: a departure that the very first look finds is reported like any other."""
    async with Outbox(tmp_path / "agent.db") as box:
        await box.send("old", ttl=0.001)
    seen: list[Event] = []
    ws = client(NOWHERE, tmp_path, delivery={"drain_timeout": 0})
    reading = asyncio.create_task(collect(ws, seen))
    await asyncio.sleep(0.01)  # the age of the message, and the reader's start
    async with ws:
        await until(lambda: MessagesExpired(1, False) in seen)
    await reading


async def test_drop_new_gives_a_receipt_that_says_so(tmp_path: Path) -> None:
    """P2: under drop_new a message that finds no room has a receipt without a sequence; `acked` raises Dropped."""
    settings: dict[str, Any] = {"caps": {"max_messages": 1, "overflow": "drop_new"}, "delivery": {"drain_timeout": 0}}
    async with client(NOWHERE, tmp_path, **settings) as ws:
        await ws.send("kept")
        receipt = await ws.send("dropped")
        assert receipt.seq is None
        with pytest.raises(Dropped):
            await receipt.acked()
        assert (await ws.stats()).dropped_new == 1


async def test_flush_says_whether_it_is_empty(tmp_path: Path) -> None:
    """flush() is False at its timeout and True once everything was answered, for any number of waiters."""
    inbox = Inbox(tmp_path / "inbox.db")
    async with inbox.serving(window=0) as receiver, client(inbox, tmp_path) as ws:
        assert await ws.flush(0.5)
        await ws.send("a")
        assert not await ws.flush(0.05)
        waiting = [asyncio.create_task(ws.flush(10)) for _ in range(50)]
        await until(lambda: ws.state.value == "CONNECTED")
        await receiver.flow(10)
        assert await asyncio.gather(*waiting) == [True] * 50


async def test_flushes_do_not_take_each_others_wake_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P8: the news that the outbox is empty reaches a flush that another flush has overtaken."""
    monkeypatch.setattr(housekeeping, "_UPKEEP_INTERVAL", 1000.0)
    monkeypatch.setattr(housekeeping, "_WATCH_INTERVAL", 1000.0)
    inbox = Inbox(tmp_path / "inbox.db")
    async with inbox.serving(window=0) as receiver, client(inbox, tmp_path) as ws:
        await until(lambda: ws.state.value == "CONNECTED")
        await ws.send("a")
        real, held = ws._outbox.counts, asyncio.Event()

        async def late() -> Any:
            counts = await real()
            if counts.pending:
                await held.wait()  # what it read is stale when it comes back
            return counts

        monkeypatch.setattr(ws._outbox, "counts", late)
        slow = asyncio.create_task(ws.flush())
        await asyncio.sleep(0)
        await receiver.flow(10)
        monkeypatch.setattr(ws._outbox, "counts", real)
        await until_true(lambda: is_empty(ws))
        assert await ws.flush(5)
        held.set()
        assert await asyncio.wait_for(slow, 5)


async def is_empty(ws: Client) -> bool:
    return await pending(ws) == 0


async def test_flush_sees_that_another_program_emptied_the_outbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P8: flush() does not wait for ever for messages that somebody else removed, unseen by the watch."""
    monkeypatch.setattr(housekeeping, "_WATCH_INTERVAL", 1000.0)
    async with PlainServer(window=0) as server, client(server, tmp_path, delivery={"drain_timeout": 0}) as ws:
        await until(lambda: ws.state.value == "CONNECTED")
        await ws.send("a")
        waiting = asyncio.create_task(ws.flush())
        assert not await is_empty(ws)  # looks after flush has looked
        with closing(sqlite3.connect(tmp_path / "agent.db", isolation_level=None)) as other:
            other.execute("DELETE FROM durablews_entries")
            other.execute("UPDATE durablews_totals SET messages = 0, bytes = 0")
        assert await asyncio.wait_for(waiting, 10)


async def test_pushes_arrive_by_iteration(tmp_path: Path) -> None:
    """`async for message in ws` gives JSON values and bytes in order and ends when the client is closed."""
    inbox = Inbox(tmp_path / "inbox.db")
    got: list[Any] = []

    async def iterate(ws: Client) -> None:
        async for message in ws:
            got.append(message)  # noqa: PERF401 - it is read while the test runs

    async with inbox.serving() as receiver:
        async with client(inbox, tmp_path) as ws:
            reading = asyncio.create_task(iterate(ws))
            receipt = await ws.send("x")
            await receipt.acked(10)
            for payload in ({"set": 5}, b"\x00\x01", None, "text"):
                assert await receiver.push(receipt.stream, payload)
            await until(lambda: len(got) == 4)
        await asyncio.wait_for(reading, 5)
    assert got == [{"set": 5}, b"\x00\x01", None, "text"]


@pytest.mark.parametrize(("size", "kept"), [(1, 1000), (10_000, 104)])
async def test_pushes_beyond_the_buffer_go_and_acks_do_not_wait_for_them(tmp_path: Path, size: int, kept: int) -> None:
    """C10: nobody iterates, acks are read all the same; the newest 1000 or 1 MiB stay and the others are counted."""

    async def flood(server: PlainServer, ws: ServerConnection) -> None:
        stream = await server.greet(ws)
        for i in range(1500):
            await server.say(ws, t="push", d=str(i).zfill(size))
        while True:
            await server.take(ws, stream, await server.hear(ws))

    async with PlainServer(flood) as server, client(server, tmp_path) as ws:
        await (await ws.send("x")).acked(20)
        assert (await ws.stats()).pushes_dropped == 1500 - kept
        got: list[int] = []
        async for message in ws:
            got.append(int(message.lstrip("0") or 0))
            if len(got) == kept:
                break
        assert got == list(range(1500 - kept, 1500))


async def test_an_event_reader_that_does_not_read_costs_no_memory(tmp_path: Path) -> None:
    """events() keeps the newest 1000 for each reader and ends when the client is closed."""
    async with client(NOWHERE, tmp_path) as ws:
        reader = ws.events()
        first = asyncio.ensure_future(anext(reader))
        await first
        for i in range(3000):
            ws._events.put(Connected(str(i)))
    seen = [event async for event in reader]
    assert len(seen) <= 1000
    assert any(event == Connected("2999") for event in seen)
    assert [event async for event in ws.events()] == []


async def test_close_drains_for_its_time_and_leaves_the_rest_on_disk(tmp_path: Path) -> None:
    """close() delivers what it can within drain_timeout; the rest is there at the next opening."""
    inbox = Inbox(tmp_path / "inbox.db")
    async with inbox.serving():
        async with client(inbox, tmp_path) as ws:
            await ws.send_many(range(2000))
        assert inbox.payloads() == list(range(2000))  # drained by leaving the block
    async with client(inbox, tmp_path, delivery={"drain_timeout": 0.2}) as ws:
        await ws.send_many(range(2000, 2100))
        started = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - started < 4
    async with inbox.serving(), client(inbox, tmp_path) as ws:
        assert await ws.flush(10)
    assert inbox.payloads() == list(range(2100))


async def test_an_exception_in_the_block_is_not_held_up_by_a_drain(tmp_path: Path) -> None:
    """An exception leaves the block at once; what was sent stays on disk."""
    started = asyncio.get_running_loop().time()

    async def fail() -> None:
        async with client(NOWHERE, tmp_path, delivery={"drain_timeout": 60}) as ws:
            await ws.send("a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert asyncio.get_running_loop().time() - started < 10
    with closing(sqlite3.connect(tmp_path / "agent.db")) as connection:
        assert connection.execute("SELECT payload FROM durablews_outbox").fetchall() == [('"a"',)]


async def test_a_client_is_used_once(tmp_path: Path) -> None:
    """A client before its block, after it, and in a second block raises OutboxClosed."""
    ws = client(NOWHERE, tmp_path)
    with pytest.raises(OutboxClosed):
        await ws.send("early")
    with pytest.raises(OutboxClosed):
        await ws.flush()
    async with ws:
        pass
    for use in (ws.send("late"), ws.send_many(["late"]), ws.flush(), ws.stats()):
        with pytest.raises(OutboxClosed):
            await use
    with pytest.raises(OutboxClosed):
        ws.wake()
    with pytest.raises(OutboxClosed):
        async with ws:
            pass
    await ws.close()
    assert [message async for message in ws] == []


async def test_close_may_be_called_by_several(tmp_path: Path) -> None:
    """close() is safe to call twice, one after the other and at the same time, inside the block too."""
    async with client(NOWHERE, tmp_path, delivery={"drain_timeout": 0.1}) as ws:
        await ws.send("a")
        await asyncio.gather(*(ws.close() for _ in range(5)))
        await ws.close()
    await ws.close()


async def test_a_receipt_that_waits_hears_that_the_outbox_closes(tmp_path: Path) -> None:
    """P8: `acked` of a message that stays behind ends with OutboxClosed when the client does."""
    async with client(NOWHERE, tmp_path, delivery={"drain_timeout": 0}) as ws:
        waiting = asyncio.create_task((await ws.send("a")).acked())
        await asyncio.sleep(0)
    with pytest.raises(OutboxClosed):
        await asyncio.wait_for(waiting, 5)


async def test_a_second_client_is_told_who_has_the_outbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OutboxInUse names the holder, in the same process and in another; the first client is not disturbed."""
    monkeypatch.setattr(draining, "_OWNERSHIP_WAIT", 0.2)
    async with client(NOWHERE, tmp_path, delivery={"drain_timeout": 0}) as ws:
        with pytest.raises(OutboxInUse) as used:
            async with client(NOWHERE, tmp_path):
                pass
        assert f"pid {os.getpid()} on " in used.value.holder
        program = (
            "import asyncio, sys, durablews\nfrom durablews import draining\ndraining._OWNERSHIP_WAIT = 0.2\n"
            "async def main():\n    async with durablews.connect('ws://127.0.0.1:9/', sys.argv[1]): pass\n"
            "asyncio.run(main())\n"
        )
        other = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, str(tmp_path / "agent.db"), env=ENVIRONMENT, stderr=subprocess.PIPE
        )
        _, errors = await asyncio.wait_for(other.communicate(), 20)
        assert other.returncode == 1
        assert f"already in use by pid {os.getpid()} on".encode() in errors
        await ws.send("undisturbed")
        assert await pending(ws) == 1


async def test_a_second_client_waits_for_the_first_to_go(tmp_path: Path) -> None:
    """A program that restarts its client need not time it: the second waits some seconds for the outbox."""
    async with client(NOWHERE, tmp_path, delivery={"drain_timeout": 0}) as ws:
        await ws.send("a")
        second = client(NOWHERE, tmp_path, delivery={"drain_timeout": 0})
        opening = asyncio.create_task(second.__aenter__())
        await asyncio.sleep(0.1)
        assert not opening.done()
    async with asyncio.timeout(5):
        await opening
        assert await pending(second) == 1
    await second.close()


async def test_other_processes_wake_the_drainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `durablews send` and a plain INSERT commit is delivered by the watch on the log, not by the upkeep."""
    monkeypatch.setattr(housekeeping, "_UPKEEP_INTERVAL", 1000.0)
    async with PlainServer() as server, client(server, tmp_path) as ws:
        await (await ws.send("first")).acked(10)
        path = str(tmp_path / "agent.db")
        for i in range(5):
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("INSERT INTO durablews_outbox (payload) VALUES (?)", (json.dumps(i),))
            committed = asyncio.get_running_loop().time()
            await until(partial(server.payloads_have, i), timeout=10)
            assert asyncio.get_running_loop().time() - committed < 1
        sender = await asyncio.create_subprocess_exec(
            *COMMAND, "send", path, '"from a shell"', env=ENVIRONMENT, stdout=subprocess.PIPE
        )
        await asyncio.wait_for(sender.communicate(), 20)
        await until(lambda: "from a shell" in server.payloads, timeout=2)
        assert await ws.flush(5)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
async def test_nothing_is_left_of_fifty_clients(tmp_path: Path) -> None:
    """Fifty opens and closes leave no task, thread or descriptor (the fixtures look at tasks and threads)."""
    inbox = Inbox(tmp_path / "inbox.db")
    async with inbox.serving():

        async def once(i: int) -> None:
            async with client(inbox, tmp_path) as ws:
                await (await ws.send(i)).acked(10)

        await once(-1)
        tasks, before = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
        for i in range(50):
            await once(i)
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
    assert inbox.payloads() == list(range(-1, 50))


async def test_inspect_shows_the_link_while_it_lives_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`durablews inspect --json` beside a running client names its owner and state; after it, there is none."""
    path = str(tmp_path / "agent.db")

    def look() -> dict[str, Any]:
        assert cli.main(["inspect", path, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    monkeypatch.setattr(housekeeping, "_NOTE_INTERVAL", 0.05)
    async with PlainServer() as server, client(server, tmp_path) as ws:
        await (await ws.send("x")).acked(10)
        await until(lambda: look()["link"]["state"] == "CONNECTED")
        assert f"pid {os.getpid()}" in look()["owner"]
    assert (look()["owner"], look()["link"]["state"], look()["pending"]) == (None, "DISCONNECTED", 0)


@pytest.mark.parametrize("url", ["ws://[", "http://x/", "ws://", "x", 5])
def test_an_address_that_cannot_be_one_is_said_at_once(tmp_path: Path, url: Any) -> None:
    """A URL that no WebSocket can have is a ConfigError of `connect`, not a riddle later."""
    with pytest.raises(durablews.ConfigError):
        durablews.connect(url, tmp_path / "agent.db")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
async def test_a_forked_child_leaves_its_parents_client_alone(tmp_path: Path) -> None:
    """In a forked child every use raises OutboxClosed and close() returns; the parent goes on unharmed."""
    async with PlainServer() as server, client(server, tmp_path) as ws:
        await (await ws.send("before")).acked(10)

        async def use() -> list[str]:
            said = []
            for name, call in (("send", ws.send("child")), ("stats", ws.stats()), ("close", ws.close())):
                try:
                    await asyncio.wait_for(call, 5)
                    said.append(name)
                except Exception as exc:
                    said.append(f"{name} {type(exc).__name__}")
            return said

        said = support.answer(support.fork(lambda: asyncio.run(use())))
        assert said == "['send OutboxClosed', 'stats OutboxClosed', 'close']"
        await (await ws.send("after")).acked(10)
        assert server.payloads == ["before", "after"]
        assert (ws.state.value, len(server.connections)) == ("CONNECTED", 1)
