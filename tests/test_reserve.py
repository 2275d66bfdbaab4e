"""The room that is held for acknowledgements: who takes from it, who may not, and what a long log counts against it."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from servers import ENVIRONMENT, FAST, PlainServer, until, until_true
from support import fate, integrity

import durablews
from durablews import OutboxFull, StorageFailed, database, reserve, reservefile, walindex
from durablews.analysis import load

posix = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")


def client(server: PlainServer, path: Path) -> durablews.Client:
    settings: dict[str, Any] = {"reconnect": FAST, "proxy": None, "delivery": {"drain_timeout": 0}}
    return durablews.connect(server.url, path, **settings)


async def trouble(ws: durablews.Client) -> str:
    return (await ws.stats()).trouble or ""


def test_the_analyser_counts_the_reserve_that_there_is() -> None:
    """DWS402 adds up what durablews really takes."""
    assert load.RESERVE == reservefile.RESERVE


@posix
async def test_a_database_that_may_not_grow_is_emptied(tmp_path: Path) -> None:
    """P2, P8: at `max_page_count` senders get `OutboxFull`, and draining and deleting go on."""
    async with PlainServer() as server:
        await server.stop()
        async with client(server, tmp_path / "agent.db") as ws:

            def limit(connection: sqlite3.Connection) -> None:
                pages = connection.execute("PRAGMA page_count").fetchone()[0]
                connection.execute(f"PRAGMA max_page_count = {pages + 20}").fetchall()

            await ws._outbox.storage.read(limit)
            accepted = 0
            with suppress(OutboxFull):
                while True:
                    await ws.send(f"{accepted:04d}" + "x" * 400)
                    accepted += 1
            await server.start()
            assert await ws.flush(60)
            assert (await ws.stats()).pending == 0
            assert len(server.payloads) == accepted > 0
            await ws.send("there is room again")
            assert await ws.flush(60)
            assert reservefile.is_whole(ws._outbox.path)  # the disk had room: none of it was needed
    assert integrity(tmp_path / "agent.db") == "ok"


@posix
async def test_a_log_behind_a_foreign_reader_is_reported_and_goes_with_it(tmp_path: Path) -> None:
    """P6, P8: a reader that keeps a snapshot lets the log grow; that is said while it lasts, then the log is cut."""
    path = tmp_path / "agent.db"
    async with PlainServer() as server, client(server, path) as ws:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM durablews_meta").fetchone()
            while database.wal_bytes(str(path)) < 12_000_000:
                await ws.send_many(["x" * 20_000] * 50)
            await until_true(lambda: _says(ws, "log has grown"), 60)
            index = walindex.index_of(str(path))
            assert index is not None
            assert index.log().owed * 4096 > reservefile.RESERVE
            # Counted: with nothing else free, nothing more may be stored that the reserve could not bring home.
            with mock.patch.object(reserve, "free_bytes", return_value=0), pytest.raises(OutboxFull, match="log"):
                await ws.send("more")
            await ws.send("more")
        await until_true(lambda: _says_nothing(ws), 60)
        await until(lambda: database.wal_bytes(str(path)) <= 8_400_000, 60)
        assert await ws.flush(60)


async def _says(ws: durablews.Client, word: str) -> bool:
    return word in await trouble(ws)


async def _says_nothing(ws: durablews.Client) -> bool:
    return not await trouble(ws)


@posix
async def test_only_the_drainer_takes_and_gives_back(tmp_path: Path) -> None:
    """P6: while somebody drains, another writer leaves a reserve that is in use alone, and has the free pages only."""
    path = tmp_path / "agent.db"
    async with PlainServer() as server, client(server, path) as ws:
        assert await ws.flush(60)
        with mock.patch.object(reserve, "fill"):  # as on a full disk
            reservefile.give_part(str(path))
            # A program of its own: SQLite must not be used on this file by a fork of who has it open.
            program = (
                "import asyncio, sys, durablews\nfrom unittest import mock\n"
                "async def store():\n    async with durablews.Outbox(sys.argv[1]) as box:\n"
                "        await box.send('x' * 100_000)\n"
                "with mock.patch('durablews.reserve.fill'):\n    asyncio.run(store())\n"
            )
            command = [sys.executable, "-c", program, str(path)]
            said = await asyncio.to_thread(subprocess.run, command, env=ENVIRONMENT, capture_output=True, text=True)
            assert "OutboxFull" in said.stderr, said.stderr
            assert not reservefile.is_whole(str(path))
        await until(lambda: reservefile.is_whole(str(path)), 60)


@posix
def test_one_descriptor_is_kept_until_the_file_has_gone(tmp_path: Path) -> None:
    """The lock of an open connection outlives every other opening and closing in its process."""
    path = str(tmp_path / "agent.db")
    database.create(path)
    first = database.open_outbox(path)
    index = walindex.index_of(path)
    assert index is not None
    second = database.open_outbox(path)
    second.close()
    walindex.close_gone()
    assert walindex.index_of(path) is index
    # Another process must find the shared memory in use: it may not cut what is mapped here.
    before = os.stat(f"{path}-shm")
    assert fate(lambda: database.open_outbox(path).close()) == "None"
    assert (os.stat(f"{path}-shm").st_ino, os.stat(f"{path}-shm").st_size) == (before.st_ino, before.st_size)
    first.close()
    walindex.close_gone()
    assert walindex.index_of(path) is None


@posix
def test_what_a_crash_left_in_the_shared_memory_is_not_believed(tmp_path: Path) -> None:
    """P1: the shared memory of a machine that lost power describes a log that is not there; it is made anew."""
    path = str(tmp_path / "agent.db")
    database.create(path)

    def crash() -> None:
        connection = database.open_outbox(path)
        connection.execute("INSERT INTO durablews_outbox (payload) VALUES ('1')")
        os._exit(0)

    fate(crash)
    log = Path(f"{path}-wal").read_bytes()
    fate(crash)
    Path(f"{path}-wal").write_bytes(log)  # the second never reached the medium, and -shm says that it is there
    with closing(database.open_outbox(path)) as connection:
        assert connection.execute("SELECT count(*) FROM durablews_outbox").fetchone() == (1,)
        connection.execute("INSERT INTO durablews_outbox (payload) VALUES ('2')")
    assert integrity(path) == "ok"


@posix
def test_a_disk_that_fails_beside_the_outbox_is_named(tmp_path: Path) -> None:
    """P8: an error of the disk while room is allocated is a failure of the storage, and not a full disk."""
    path = str(tmp_path / "agent.db")
    database.create(path)
    with (
        mock.patch.object(os, "posix_fallocate", side_effect=OSError(5, "Input/output error")),
        pytest.raises(StorageFailed, match="Input/output error"),
    ):
        database.open_outbox(path)
