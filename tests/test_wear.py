"""What an outbox does to its disk: how many commits it makes, and that it gives space back after a backlog."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import FAST, PlainServer, until
from support import application_database, integrity, new_outbox

import durablews
from durablews import housekeeping, upkeep
from durablews.client import Client
from durablews.committing import Committer
from durablews.errors import ConfigError
from durablews.jobs import transaction
from durablews.messages import Run
from durablews.work import Work


def client(server: PlainServer, path: Path, **settings: Any) -> Client:
    given = {"reconnect": FAST, "proxy": None, "dialect": "durablews.v1.json", **settings}
    return durablews.connect(server.url, path / "agent.db", **given)


# -- commits


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of messages in each transaction that stored any."""
    counted: list[int] = []
    genuine = Committer._transaction

    def transaction(self: Committer, connection: Any, work: Any, requests: Any) -> Any:
        if requests:
            counted.append(sum(len(drafts) for drafts in requests))
        return genuine(self, connection, work, requests)

    monkeypatch.setattr(Committer, "_transaction", transaction)
    return counted


async def test_without_an_interval_nobody_waits_for_company(tmp_path: Path, commits: list[int]) -> None:
    """Each message that is awaited alone is committed alone, at once."""
    async with durablews.Outbox(tmp_path / "agent.db") as outbox:
        for number in range(5):
            await outbox.send(number)
    assert commits == [1] * 5


async def test_messages_that_come_within_the_interval_share_a_commit(tmp_path: Path, commits: list[int]) -> None:
    """Fewer commits wear flash less; each `send` still returns only when its message is committed."""
    async with durablews.Outbox(tmp_path / "agent.db", commit_interval=0.2) as outbox:
        looks, genuine = 0, outbox.storage._take

        def take() -> Any:
            nonlocal looks
            looks += 1
            return genuine()

        outbox.storage._take = take  # type: ignore[method-assign]

        async def later(number: int) -> None:
            await asyncio.sleep(number * 0.01)
            receipt = await outbox.send(number)
            # It is there, for anybody, as soon as it is said to be.
            other = sqlite3.connect(tmp_path / "agent.db")
            found = other.execute("SELECT count(*) FROM durablews_entries WHERE seq = ?", (receipt.seq,)).fetchone()
            other.close()
            assert found == (1,)

        await asyncio.gather(*(later(number) for number in range(10)))
    assert sum(commits) == 10
    assert len(commits) <= 3
    assert looks < 10  # it sleeps while it waits


async def test_the_first_waits_for_the_interval_and_no_longer(tmp_path: Path, commits: list[int]) -> None:
    """Messages that keep coming do not put off the commit of the first."""
    async with durablews.Outbox(tmp_path / "agent.db", commit_interval=0.1) as outbox:
        sends = [asyncio.create_task(outbox.send("first"))]
        for number in range(100):
            await asyncio.sleep(0.01)
            sends.append(asyncio.create_task(outbox.send(number)))
            if sends[0].done():
                break
        assert sends[0].done()
        await asyncio.gather(*sends)


async def test_closing_waits_for_nobody(tmp_path: Path, commits: list[int]) -> None:
    """What waits for company when the outbox is closed is committed then."""
    outbox = durablews.Outbox(tmp_path / "agent.db", commit_interval=10)
    await outbox.open()
    sending = asyncio.create_task(outbox.send("x"))
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await outbox.close()
        assert (await sending).seq is not None


async def test_looking_at_an_outbox_does_not_hurry_its_commits(tmp_path: Path, commits: list[int]) -> None:
    """A read beside messages that wait for company is answered at once, and leaves them waiting."""
    async with durablews.Outbox(tmp_path / "agent.db", commit_interval=0.5) as outbox:
        sends = [asyncio.create_task(outbox.send(number)) for number in range(3)]
        await asyncio.sleep(0)
        assert (await outbox.counts()).pending == 0
        sends += [asyncio.create_task(outbox.send(number)) for number in range(3)]
        await asyncio.gather(*sends)
    assert commits == [6]


async def test_a_client_shares_commits_while_it_delivers(tmp_path: Path, commits: list[int]) -> None:
    """With a link the same holds, and everything arrives once, in order."""
    async with PlainServer() as server:
        async with client(server, tmp_path, commit_interval="100ms") as ws:
            await until(lambda: ws.state.value == "CONNECTED")

            async def later(number: int) -> None:
                await asyncio.sleep(number * 0.01)
                await ws.send(number)

            await asyncio.gather(*(later(number) for number in range(50)))
            assert await ws.flush(10)
        assert server.payloads == list(range(50))
    assert len(commits) <= 20


async def test_what_was_acknowledged_is_deleted_in_the_commit_of_what_is_sent_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One commit a message instead of two: the first deletes nothing, the second the first, the third the second."""
    done: list[tuple[int, int]] = []
    genuine = Committer._transaction

    def transaction(self: Committer, connection: Any, work: Any, requests: Any) -> Any:
        if work.runs or requests:
            done.append((sum(map(len, requests)), sum(run.messages for run in work.runs)))
        return genuine(self, connection, work, requests)

    monkeypatch.setattr(Committer, "_transaction", transaction)
    async with PlainServer() as server, client(server, tmp_path, commit_interval=0.3) as ws:
        await until(lambda: ws.state.value == "CONNECTED")
        for number in range(3):
            await ws.send(number)
            await until(lambda: len(server.payloads) > number)  # noqa: B023
            await until(lambda: ws._outbox.storage._next.runs or not ws._manager._attempts.delivery.in_flight)
        assert await ws.flush(10)
    assert done == [(1, 0), (1, 1), (1, 1), (0, 1)]


def test_what_is_due_takes_along_what_is_not() -> None:
    """Requests and deletions wait from when the first of each came, and whichever is due first takes both."""

    def work(*, requests_since: float | None = None, runs_since: float | None = None) -> Work:
        made = Work()
        if requests_since is not None:
            made.requests.append(((), loop.create_future()))
            made.requests_since = requests_since
        if runs_since is not None:
            made.settle(Run(0, 1, 1, 1, 1), runs_since)
        return made

    loop = asyncio.new_event_loop()
    assert work(requests_since=1.0).due_at(5.0) == 6.0
    assert work(runs_since=2.0).due_at(5.0) == 7.0
    both = work(requests_since=1.0, runs_since=2.0)
    assert both.due_at(5.0) == 6.0
    later = both.split(6.0, 5.0)
    assert (len(both.requests), len(both.runs), bool(later)) == (1, 1, False)
    both = work(requests_since=2.0, runs_since=1.0)
    both.reads.append((lambda connection: None, loop.create_future()))
    assert both.due_at(5.0) < 0
    later = both.split(5.9, 5.0)
    assert (len(both.requests), len(both.runs), len(both.reads)) == (0, 0, 1)
    assert (len(later.requests), len(later.runs), later.due_at(5.0)) == (1, 1, 6.0)
    later = later.split(6.0, 5.0)
    assert not later
    many = Work()
    many.settle(Run(0, 1, 2000, 2000, 1), 1.0)
    assert many.due_at(5.0) < 0
    loop.close()


@pytest.mark.parametrize("interval", [-1, 11, "soon", float("nan")])
def test_an_interval_that_is_none(tmp_path: Path, interval: Any) -> None:
    """A message waits for ten seconds at most, and never for less than nothing."""
    with pytest.raises(ConfigError, match="commit_interval"):
        durablews.Outbox(tmp_path / "agent.db", commit_interval=interval)


# -- space


def emptied(folder: Path, rows: int = 4000) -> sqlite3.Connection:
    """Return an outbox whose backlog has gone, with its pages still in the file."""
    connection = new_outbox(folder)
    with transaction(connection):
        connection.executemany(
            "INSERT INTO durablews_outbox (payload) VALUES (?)", ((b"x" * 3000,) for _ in range(rows))
        )
    with transaction(connection):
        connection.execute("DELETE FROM durablews_entries WHERE seq > 100")
        connection.execute("UPDATE durablews_totals SET messages = 100")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return connection


def pages(connection: sqlite3.Connection) -> tuple[int, int]:
    return tuple(connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))  # type: ignore[return-value]


def test_a_file_that_was_moved_away_is_no_defect(tmp_path: Path) -> None:
    """Housekeeping goes on, and tells of the file when it looks at that."""
    connection = new_outbox(tmp_path)
    os.rename(tmp_path / "agent.db", tmp_path / "away.db")
    assert not upkeep.give_back(connection)
    os.rename(tmp_path / "away.db", tmp_path / "agent.db")
    connection.close()


def test_a_file_shrinks_in_small_steps(tmp_path: Path) -> None:
    """Each step gives a megabyte back at most; some is kept for the next backlog, and what waits is untouched."""
    connection = emptied(tmp_path)
    before, steps = pages(connection), 0
    while upkeep.give_back(connection):
        steps += 1
        after = pages(connection)
        assert 0 < before[0] - after[0] <= 260
        before = after
    assert steps > 5
    assert before[1] == 1024
    assert os.path.getsize(tmp_path / "agent.db") == before[0] * 4096
    assert connection.execute("SELECT count(*), sum(length(payload)) FROM durablews_entries").fetchone() == (
        100,
        300_000,
    )
    connection.close()
    assert integrity(tmp_path / "agent.db") == "ok"


def test_nothing_is_given_back_while_much_waits_or_is_used(tmp_path: Path) -> None:
    """Draining needs the disk; and a file that is half full will need its pages again."""
    connection = emptied(tmp_path)
    connection.execute("UPDATE durablews_totals SET messages = 10001")
    assert not upkeep.give_back(connection)
    connection.execute("UPDATE durablews_totals SET messages = 10000")
    assert upkeep.give_back(connection)
    connection.close()


def test_somebody_who_writes_is_not_waited_for(tmp_path: Path) -> None:
    """While another program holds the write lock nothing is given back, and nobody waits; later it goes on."""
    connection, other = emptied(tmp_path), sqlite3.connect(tmp_path / "agent.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    before = pages(connection)
    assert upkeep.give_back(connection)
    assert pages(connection) == before
    assert connection.execute("PRAGMA busy_timeout").fetchone()[0] > 0
    other.execute("ROLLBACK")
    assert upkeep.give_back(connection)
    assert pages(connection) < before
    other.close()
    connection.close()


def test_an_applications_database_keeps_its_free_pages(tmp_path: Path) -> None:
    """What is free there is the application's to use."""
    connection = sqlite3.connect(application_database(tmp_path), isolation_level=None)
    connection.execute("CREATE TABLE durablews_totals (messages)")
    connection.execute("INSERT INTO durablews_totals VALUES (0)")
    connection.execute("CREATE TABLE big AS SELECT zeroblob(20000000) AS blob")
    connection.execute("DROP TABLE big")
    before = pages(connection)
    assert before[1] > 4000
    assert not upkeep.give_back(connection)
    assert pages(connection) == before
    connection.close()


async def test_after_a_drain_the_file_gives_its_space_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has emptied a backlog shrinks the file by itself, and delivers as before."""
    monkeypatch.setattr(housekeeping, "_SPACE_INTERVAL", 0.05)
    async with PlainServer() as server:
        async with client(server, tmp_path) as ws:
            await ws.send_many([b"x" * 4000] * 5000)
            assert await ws.flush(60)

            await until(lambda: os.path.getsize(tmp_path / "agent.db") < 6_000_000, 30)
            await ws.send("after")
            assert await ws.flush(10)
        assert server.payloads[-1] == "after"
        assert len(server.payloads) == 5001
