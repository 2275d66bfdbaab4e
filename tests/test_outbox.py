"""`Outbox`: a producer without a network."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from servers import FAST, PlainServer

import durablews
from durablews import Dropped, MessageTooLarge, OutboxClosed, OutboxFull, PayloadError, upkeep
from durablews.outbox import Outbox


async def test_any_number_write_and_one_drains(tmp_path: Path) -> None:
    """Producers and a client share a file; receipts of producers hear of acks in another's hands."""
    path = tmp_path / "agent.db"
    async with (
        PlainServer() as server,
        Outbox(path) as one,
        Outbox(path) as two,
        durablews.connect(server.url, path, reconnect=FAST, proxy=None) as ws,
    ):
        sends = [one.send, two.send, ws.send] * 5
        receipts = [await send(i) for i, send in enumerate(sends)]
        for receipt in receipts:
            await receipt.acked(10)
        assert (await one.counts()).pending == 0
    assert sorted(server.payloads) == list(range(15))


async def test_send_many_is_all_or_nothing(tmp_path: Path) -> None:
    """A batch that does not fit stores none of it and says so; an empty one is nothing."""
    async with Outbox(tmp_path / "agent.db", caps={"max_messages": 5, "max_bytes": 1000}) as box:
        assert await box.send_many([]) == []
        await box.send_many(range(4))
        with pytest.raises(OutboxFull):
            await box.send_many(range(2))
        with pytest.raises(MessageTooLarge):
            await box.send(b"x" * 1001)
        with pytest.raises(PayloadError):
            await box.send_many([1, object()])
        assert (await box.counts()).pending == 4
        await box.send(4)


async def test_a_full_outbox_fails_only_those_who_do_not_fit(tmp_path: Path) -> None:
    """Senders that share a transaction each hear of their own message."""
    async with Outbox(tmp_path / "agent.db", caps={"max_messages": 10}) as box:
        results = await asyncio.gather(*(box.send(i) for i in range(30)), return_exceptions=True)
        assert sum(isinstance(result, OutboxFull) for result in results) == 20
        assert (await box.counts()).pending == 10


async def test_caps_are_kept_until_somebody_gives_others(tmp_path: Path) -> None:
    """Caps live in the file: opening without them changes nothing."""
    path = tmp_path / "agent.db"
    async with Outbox(path, caps={"max_messages": 3, "overflow": "drop_new"}):
        pass
    async with Outbox(path) as box:
        receipts = [await box.send(i) for i in range(5)]
        assert [receipt.seq is None for receipt in receipts] == [False, False, False, True, True]
        with pytest.raises(Dropped):
            await receipts[4].acked()
    async with Outbox(path, caps={"max_messages": 100}) as box:
        assert (await box.send("more")).seq is not None


async def test_an_outbox_is_closed_once_and_for_all(tmp_path: Path) -> None:
    """Use before, after and in a second opening is OutboxClosed; closing twice is not an error."""
    box = Outbox(tmp_path / "agent.db")
    with pytest.raises(OutboxClosed):
        await box.send("early")
    async with box:
        with pytest.raises(OutboxClosed):
            await box.open()
        await box.send("x")
    await box.close()
    with pytest.raises(OutboxClosed):
        await box.send("late")
    with pytest.raises(OutboxClosed):
        await box.open()
    await box.close()


async def test_a_receipt_that_waits_hears_that_its_outbox_closes(tmp_path: Path) -> None:
    """P8: `acked` ends with OutboxClosed when the outbox closes, and with TimeoutError when its time is up."""
    async with Outbox(tmp_path / "agent.db") as box:
        receipt = await box.send("x")
        with pytest.raises(TimeoutError):
            await receipt.acked(0.01)
        waiting = [asyncio.create_task(receipt.acked()) for _ in range(20)]
        await asyncio.sleep(0)
    for task in waiting:
        with pytest.raises(OutboxClosed):
            await asyncio.wait_for(task, 5)


async def test_a_producer_alone_keeps_its_log_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P6: without a drainer, the log does not grow without end; with one, the producer leaves it alone."""
    monkeypatch.setattr(upkeep, "LARGEST_LOG", 256 * 1024)
    path = tmp_path / "agent.db"
    wal = tmp_path / "agent.db-wal"
    longest = 0
    async with Outbox(path) as box:
        for i in range(60):
            await box.send(b"x" * 50_000, topic=str(i))
            longest = max(longest, wal.stat().st_size)
    assert longest < 1024 * 1024
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM durablews_entries").fetchone() == (60,)


async def test_a_path_is_one_outbox_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path, a link and a name with odd characters lead to the same file, wherever the program goes."""
    folder = tmp_path / "a b?#%é"
    folder.mkdir()
    (tmp_path / "link.db").symlink_to(folder / "agent.db")
    monkeypatch.chdir(folder)
    async with Outbox("agent.db") as box:
        monkeypatch.chdir(tmp_path)
        await box.send(1)
        async with Outbox(tmp_path / "link.db") as other:
            await other.send(2)
            assert (await box.counts()).pending == 2
