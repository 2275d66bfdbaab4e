"""The writer of an outbox file: shared transactions, cancellation, locks, full disks, forks."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import ENVIRONMENT, FAST, PlainServer, until, until_true
from support import in_child, integrity

import durablews
from durablews import OutboxClosed, OutboxFull, OutboxLocked, StorageFailed, database, upkeep
from durablews.client import Client
from durablews.draining import DrainedOutbox
from durablews.outbox import Outbox


def client(server: PlainServer, path: Path, **settings: Any) -> Client:
    return durablews.connect(server.url, path / "agent.db", **{"reconnect": FAST, "proxy": None, **settings})


def stored(path: Path) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return [json.loads(text) for (text,) in connection.execute("SELECT payload FROM durablews_outbox ORDER BY seq")]


async def traced(box: Outbox, log: list[str]) -> None:
    """Write down every statement from now on."""
    await box.storage.read(lambda connection: connection.set_trace_callback(log.append))


@contextmanager
def write_lock_held(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Hold the write lock of an outbox in another process."""
    program = (
        "import sqlite3, sys\nconnection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "connection.execute('BEGIN IMMEDIATE')\nprint('held', flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        try:
            yield holder
        finally:
            assert holder.stdin is not None
            holder.stdin.close()
            holder.wait(10)


async def test_cancelled_senders_leave_nothing_half_done(tmp_path: Path) -> None:
    """P7: 300 sends cancelled at random moments: no open transaction, no wedge, every confirmed message there once."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    path = tmp_path / "agent.db"
    confirmed: list[int] = []
    async with Outbox(path) as box:

        async def send(i: int) -> None:
            await box.send(i)
            confirmed.append(i)

        for i in range(300):
            task = asyncio.create_task(send(i))
            if chance.random() < 0.5:
                await asyncio.sleep(chance.random() * 0.002)
            else:
                for _ in range(chance.randrange(6)):
                    await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert not await box.storage.read(lambda connection: connection.in_transaction), f"seed {seed}"
        await box.send("after")
        assert await box.storage.read(lambda connection: connection.in_transaction) is False
    found = stored(path)
    assert found[-1] == "after"
    assert 0 < len(confirmed) < 300, f"seed {seed}: the cancellations hit no moment that matters"
    assert len(found) == len(set(found)), f"seed {seed}"
    assert set(confirmed) <= set(found), f"seed {seed}"
    assert found[:-1] == sorted(found[:-1])
    assert integrity(path) == "ok"


async def test_concurrent_senders_share_transactions(tmp_path: Path) -> None:
    """P1: a thousand senders at once need far fewer than a hundred transactions, and each has its own sequence."""
    log: list[str] = []
    async with Outbox(tmp_path / "agent.db") as box:
        await traced(box, log)
        receipts = await asyncio.gather(*(box.send(i) for i in range(1000)))
        commits = log.count("COMMIT")
    assert len({receipt.seq for receipt in receipts}) == 1000
    assert [receipt.seq for receipt in receipts] == sorted(receipt.seq or 0 for receipt in receipts)
    assert 1 <= commits < 100
    assert stored(tmp_path / "agent.db") == list(range(1000))


async def test_an_id_makes_a_second_send_harmless(tmp_path: Path) -> None:
    """P7: after a cancelled send, the same again with the same id stores one message, even after its ack."""
    async with PlainServer() as server, client(server, tmp_path) as ws:
        for i in range(30):
            task = asyncio.create_task(ws.send(i, id=f"id-{i}"))
            for _ in range(i % 5):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            receipts = [await ws.send(i, id=f"id-{i}") for _ in range(2)]
            assert receipts[0].seq == receipts[1].seq
        assert await ws.flush(10)
        again = await ws.send(0, id="id-0")
        await again.acked(10)
        assert (await ws.stats()).enqueued == 30
    assert server.payloads == list(range(30))


async def test_a_lock_held_by_another_program_is_said_to_senders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P8: senders get OutboxLocked after the busy timeout, nothing is half written, and everything works afterwards."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.2)
    path = tmp_path / "agent.db"
    async with Outbox(path) as box:
        await box.send("before")
        with write_lock_held(path):
            started = asyncio.get_running_loop().time()
            results = await asyncio.gather(*(box.send(i) for i in range(50)), return_exceptions=True)
            assert all(isinstance(result, OutboxLocked) for result in results)
            assert asyncio.get_running_loop().time() - started < 5
            assert (await box.counts()).pending == 1  # reading goes on
        await box.send("after")
    assert stored(path) == ["before", "after"]


async def test_acks_are_kept_while_another_program_holds_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P2, P8: what was acknowledged while nothing can be written is deleted later, and the trouble shows until then."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.2)
    go = asyncio.Event()

    async def held_back(server: PlainServer, ws: Any) -> None:
        stream = await server.greet(ws)
        while True:
            frame = await server.hear(ws)
            await go.wait()
            await server.take(ws, stream, frame)

    async with PlainServer(held_back) as server, client(server, tmp_path) as ws:
        await ws.send_many(range(20))
        await until(lambda: server.frames)
        with write_lock_held(tmp_path / "agent.db"):
            go.set()

            async def troubled() -> bool:
                return "held its write lock" in ((await ws.stats()).trouble or "")

            await until_true(troubled)
            assert (await ws.stats()).pending == 20
            # A new connection in the middle of it: what was acked and is owed is not sent again.
            server.connections[0].transport.abort()
            await until(lambda: len(server.times) == 2)
            await until(lambda: ws.state.value == "CONNECTED")
        assert await ws.flush(10)
        stats = await ws.stats()
        assert (stats.trouble, stats.acked, stats.pending) == (None, 20, 0)
        frames = [entry[0] for frame in server.frames for entry in frame["m"]]
        assert len(frames) == len(set(frames)) == 20
    assert server.payloads == list(range(20))


async def test_a_full_disk_is_said_to_senders_and_does_not_stop_draining(tmp_path: Path) -> None:
    """P2, P8: OutboxFull while there is no room; what waits is sent and acked all the same; then there is room."""
    go = asyncio.Event()

    async def held_back(server: PlainServer, ws: Any) -> None:
        await go.wait()
        await server.behave(ws)

    async with PlainServer(held_back) as server, client(server, tmp_path) as ws:
        storage = ws._outbox.storage
        await ws.send_many(["x" * 1000] * 500)

        def fill(connection: sqlite3.Connection) -> None:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {pages}")

        await storage.read(fill)

        async def send_for_ever() -> None:
            while True:
                await ws.send_many(["y" * 10_000] * 10)

        with pytest.raises(OutboxFull, match="disk is full"):
            await send_for_ever()
        before = (await ws.stats()).pending
        assert before >= 500
        go.set()
        assert await ws.flush(10)
        await ws.send("there is room again")
        assert await ws.flush(10)
        assert len(server.applied) == before + 1
        assert (await ws.stats()).trouble is None
    assert integrity(tmp_path / "agent.db") == "ok"


async def test_deletes_that_fail_are_owed_and_tried_without_a_busy_loop(tmp_path: Path) -> None:
    """P2, P8: while acked rows cannot be deleted sending goes on, nothing is sent twice, and tries are few."""
    log: list[str] = []
    denied = True

    def authorize(action: int, *_: object) -> int:
        return sqlite3.SQLITE_DENY if denied and action == sqlite3.SQLITE_DELETE else sqlite3.SQLITE_OK

    async with PlainServer() as server, client(server, tmp_path) as ws:
        await (await ws.send("first")).acked(10)
        assert await ws.flush(10)
        storage = ws._outbox.storage
        await storage.read(lambda connection: connection.set_authorizer(authorize))
        await ws.send_many(range(3000))
        await until(lambda: len(server.applied) == 3001)
        assert (await ws.stats()).pending == 3000
        assert (await ws.stats()).trouble is not None
        await traced(ws._outbox, log)
        await until(lambda: log.count("ROLLBACK") >= 2)  # it is tried again, by time alone
        log.clear()
        await asyncio.sleep(0.5)  # no condition: what is shown is that little happens
        assert log.count("ROLLBACK") <= 10
        # A new connection: what was acked is not sent again.
        server.connections[0].transport.abort()
        await until(lambda: len(server.times) == 2 and ws.state.value == "CONNECTED")
        denied = False
        assert await ws.flush(20)
        await storage.read(lambda connection: connection.set_authorizer(None))
        assert (await ws.stats()).trouble is None
        assert (await ws.stats()).acked == 3001
    sent = [entry[0] for frame in server.frames for entry in frame["m"]]
    assert len(sent) == len(set(sent)) == 3001


async def test_nothing_new_is_sent_while_the_disk_cannot_say_that_a_welcome_came(tmp_path: Path) -> None:
    """P5: or a crash would make the next hello claim less than the server has seen, and all would be sent anew."""
    path = tmp_path / "agent.db"
    async with Outbox(path) as box:
        await box.send("old")
    log: list[str] = []
    denied = True

    def authorize(action: int, table: str | None, column: str | None, *_: object) -> int:
        hit = denied and action == sqlite3.SQLITE_UPDATE and column == "raised_to"
        return sqlite3.SQLITE_DENY if hit else sqlite3.SQLITE_OK

    server = PlainServer()
    async with server:
        await server.stop()
        async with client(server, tmp_path) as ws:
            storage = ws._outbox.storage
            await storage.read(lambda connection: connection.set_authorizer(authorize))
            await ws.send("new")
            await traced(ws._outbox, log)
            await server.start()
            await until(lambda: server.payloads == ["old"] and log.count("ROLLBACK") >= 2)
            await ws.send("newer")
            await asyncio.sleep(0.3)  # no condition: what is shown is that nothing happens
            assert server.payloads == ["old"]
            denied = False
            assert await ws.flush(20)
            await storage.read(lambda connection: connection.set_authorizer(None))
        assert server.payloads == ["old", "new", "newer"]


async def test_closing_ends_although_nothing_can_be_written(tmp_path: Path) -> None:
    """P8: a disk that fails at the end does not keep `async with` from ending; what was sent before is on disk."""

    def deny(action: int, *_: object) -> int:
        writes = (sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE, sqlite3.SQLITE_INSERT)
        return sqlite3.SQLITE_DENY if action in writes else sqlite3.SQLITE_OK

    async with PlainServer() as server:
        async with asyncio.timeout(15):
            async with client(server, tmp_path, delivery={"drain_timeout": 0.1}) as ws:
                await until(lambda: ws.state.value == "CONNECTED")
                server.trouble = None
                await ws._outbox.storage.read(lambda connection: connection.set_authorizer(deny))
        async with client(server, tmp_path) as ws:
            await ws.send("works again")
            assert await ws.flush(10)


async def test_closing_while_sending_keeps_what_was_handed_over(tmp_path: Path) -> None:
    """P1: sends that were under way when the outbox closes are stored or told; none waits for ever."""
    path = tmp_path / "agent.db"
    box = Outbox(path)
    await box.open()
    sending = [asyncio.create_task(box.send_many([i] * 500)) for i in range(20)]
    await asyncio.sleep(0)
    await box.close()
    async with asyncio.timeout(10):
        results = await asyncio.gather(*sending, return_exceptions=True)
    confirmed = [result for result in results if isinstance(result, list)]
    assert len(confirmed) * 500 == len(stored(path))
    assert all(isinstance(result, list | OutboxClosed) for result in results)


async def test_a_cancelled_close_still_finishes_what_was_handed_over(tmp_path: Path) -> None:
    """P7: cancelling `close` takes the file away from nobody: senders are answered, and the file is closed."""
    path = tmp_path / "agent.db"
    box = Outbox(path)
    await box.open()
    sending = [asyncio.create_task(box.send_many([i] * 4000)) for i in range(5)]
    await asyncio.sleep(0)
    closing_ = asyncio.create_task(box.close())
    await asyncio.sleep(0)
    closing_.cancel()
    async with asyncio.timeout(10):
        results = await asyncio.gather(*sending, return_exceptions=True)
    assert all(isinstance(result, list) for result in results)
    await box.close()
    assert len(stored(path)) == 20_000


async def test_closing_a_writer_with_a_long_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A producer whose log wants tidying when it closes stores what it was handed and closes without an error."""
    monkeypatch.setattr(upkeep, "LARGEST_LOG", 0)
    path = tmp_path / "agent.db"
    box = Outbox(path)
    await box.open()
    sending = [asyncio.create_task(box.send_many([i] * 4000)) for i in range(3)]
    await asyncio.sleep(0)
    await box.close()
    assert [len(receipts) for receipts in await asyncio.gather(*sending)] == [4000] * 3
    assert len(stored(path)) == 12_000


async def test_process_durability_syncs_before_it_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C8, P1: under durability="process" commits are not synced, but one synced commit comes before what is sent."""
    levels: list[int] = []
    real = database.set_synchronous

    def record(connection: sqlite3.Connection, path: str, level: int) -> None:
        levels.append(level)
        real(connection, path, level)

    monkeypatch.setattr(database, "set_synchronous", record)
    seen: list[list[int]] = []

    class Noting(PlainServer):
        async def hear(self, ws: Any) -> dict[str, Any]:
            frame = await super().hear(ws)
            seen.append(list(levels))
            return frame

    async with Noting() as server, client(server, tmp_path, durability="process") as ws:
        await until(lambda: ws.state.value == "CONNECTED")
        assert await ws._outbox.storage.read(lambda c: c.execute("PRAGMA synchronous").fetchone()[0]) == 1
        opened = len(levels)
        await ws.send("x")
        assert await ws.flush(10)
        assert seen[0][opened:][-2:] == [2, 1]
        assert levels[-1] == 1


async def test_the_synced_commit_before_a_send_writes_a_page(tmp_path: Path) -> None:
    """C8: a commit that has nothing to write is not synced, and SQLite writes no row that stays as it is."""
    path = tmp_path / "agent.db"
    async with DrainedOutbox(path, durability="process") as box:
        for number in range(3):
            await box.send(number)
            before = database.wal_bytes(str(path))
            await box.storage.read(lambda connection: box.storage.committer.synced_read(connection, lambda _: None))
            assert database.wal_bytes(str(path)) > before


async def test_a_new_stream_is_synced_before_its_hello(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P4: under durability="process" too, a new stream is on the medium before any server hears of it."""
    levels: list[int] = []
    real = database.set_synchronous

    def record(connection: sqlite3.Connection, path: str, level: int) -> None:
        levels.append(level)
        real(connection, path, level)

    async with PlainServer() as server, client(server, tmp_path, durability="process") as ws:
        await until(lambda: ws.state.value == "CONNECTED")
        before = ws._outbox.stream
        await ws._outbox.counts()  # what the welcome asked for is done
        await ws._outbox.counts()
        monkeypatch.setattr(database, "set_synchronous", record)
        await ws._outbox.renew_stream()
        assert ws._outbox.stream != before
        assert levels[:2] == [2, 1]  # one commit with every sync there is, then as the owner wants it


async def test_a_file_that_cannot_be_used_leaves_nothing_behind(tmp_path: Path) -> None:
    """An opening that fails gives back the file, its thread and the right to drain; the same path works afterwards."""
    path = tmp_path / "agent.db"
    path.write_bytes(b"not a database, but long enough to look at" * 100)
    for _ in range(3):
        with pytest.raises(durablews.NotAnOutbox):
            async with durablews.connect("ws://127.0.0.1:9/", path):
                pass
        with pytest.raises(durablews.NotAnOutbox):
            async with Outbox(path):
                pass
    assert path.read_bytes().startswith(b"not a database")
    path.unlink()
    async with durablews.connect("ws://127.0.0.1:9/", path, delivery={"drain_timeout": 0}) as ws:
        await ws.send("x")


async def test_openings_that_are_cancelled_leave_nothing_behind(tmp_path: Path) -> None:
    """P7: cancelling `async with` at random moments of the opening leaves no thread, no lock and a usable file."""
    path = tmp_path / "agent.db"

    async def open_and_stay() -> None:
        async with durablews.connect("ws://127.0.0.1:9/", path, delivery={"drain_timeout": 0}):
            await asyncio.Event().wait()

    for i in range(40):
        task = asyncio.create_task(open_and_stay())
        await asyncio.sleep(i * 0.0003)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    async with durablews.connect("ws://127.0.0.1:9/", path, delivery={"drain_timeout": 0}) as ws:
        await ws.send("x")
    assert stored(path) == ["x"]
    assert integrity(path) == "ok"


def leave_at_once(box: Outbox) -> None:
    """Use and close a parent's outbox in a forked child, then end as a program does, finalizers and all."""

    async def use() -> None:
        for use in (box.send("child"), box.counts()):
            try:
                await use
            except OutboxClosed:
                continue
            raise AssertionError("a child used its parent's connection")
        await box.close()

    asyncio.run(use())


def open_again(path: Path) -> None:
    """Open what the parent has open, as a child that knows no better does."""

    async def use() -> None:
        with pytest.raises(StorageFailed, match=r"forked from had it open.*spawn"):
            async with Outbox(path) as box:
                await box.send("child")

    asyncio.run(use())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
async def test_a_forked_child_may_not_open_what_its_parent_has_open(tmp_path: Path) -> None:
    """P1: SQLite would take the parent's locks for the child's, and what it stores might go with the parent's log."""
    path, closed = tmp_path / "agent.db", tmp_path / "closed.db"
    async with Outbox(closed) as box:
        await box.send("before")
    async with Outbox(path) as box:
        await box.send("before")
        child = multiprocessing.get_context("fork").Process(target=open_again, args=(path,))
        child.start()
        await asyncio.to_thread(child.join, 20)
        assert child.exitcode == 0
        said = await asyncio.to_thread(in_child, lambda: asyncio.run(send_from_child(closed)))
        assert said == "sent"
    assert stored(path) == ["before"]
    assert stored(closed) == ["before", "child"]


async def send_from_child(path: Path) -> str:
    async with Outbox(path) as box:
        await box.send("child")
    return "sent"


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
async def test_a_forked_child_leaves_its_parents_file_alone(tmp_path: Path) -> None:
    """A forked child that uses, closes and ends takes no row and no lock from its parent."""
    path = tmp_path / "agent.db"
    async with Outbox(path) as box:
        await box.send("before")
        child = multiprocessing.get_context("fork").Process(target=leave_at_once, args=(box,))
        child.start()
        await asyncio.to_thread(child.join, 20)
        assert child.exitcode == 0
        await box.send("after")
    assert stored(path) == ["before", "after"]
    assert integrity(path) == "ok"
