"""A full disk: senders are told, what was accepted is delivered and deleted all the same, and no write ends in SIGBUS.

Every scene plays in a forked child on a file system of its own, filled to a given number of free bytes.
``DURABLEWS_TEST_DISK_STEP`` is the distance of the levels in KiB (5), ``DURABLEWS_TEST_DISK_LEVELS`` how
many of them are drained on each file system (2), and ``DURABLEWS_TEST_SEED`` says which.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from disks import Disk, disk_fixture, mounted  # noqa: F401 - pytest looks for the fixture here
from servers import FAST, PlainServer, until, until_true
from support import fate, integrity

import durablews
from durablews import OutboxFull, database, reservefile, walindex
from durablews.outbox import Outbox
from durablews.reserve import Reserve

STEP = int(os.environ.get("DURABLEWS_TEST_DISK_STEP", "5"))
SEED = int(os.environ.get("DURABLEWS_TEST_SEED", "0")) or random.randrange(2**32)
KIB = 1024
#: KiB free: from nothing to where an outbox works again, the window of the SIGBUS (18 to 37) in the middle.
LEVELS = [0, 3, *range(8, 72, STEP), 90, 140, 200, 300, 600]
MESSAGE = 400


def text(number: int) -> str:
    return f"{number:06d}" + "x" * (MESSAGE - 6)


@contextlib.contextmanager
def no_index() -> Iterator[None]:
    """The broken build: the shared memory is left to SQLite, and nothing is looked at beforehand."""

    @contextlib.contextmanager
    def nothing(path: str, *_: object) -> Iterator[None]:
        yield

    with mock.patch.object(database, "room_to_open", nothing), mock.patch.object(Reserve, "admit", return_value=None):
        yield


def new_outbox(disk: Disk, messages: int = 0) -> Path:
    """Make an outbox with some messages in it, closed, on an empty disk."""
    disk.clear()
    path = disk.path / "agent.db"

    async def fill() -> None:
        async with Outbox(path) as box:
            await box.send_many([text(number) for number in range(messages)])

    result = fate(lambda: asyncio.run(fill()))
    assert result == "None", result
    return path


def old_outbox(disk: Disk, path: Path, content: bytes) -> None:
    """Put a closed outbox on an empty disk, as an older version left it: without a reserve."""
    disk.clear()
    path.write_bytes(content)


# -- opening


def open_and_send(path: Path) -> str:
    """Open the outbox, store what goes in, and say how that went."""

    async def use() -> str:
        stored = 0
        try:
            async with Outbox(path) as box:
                for number in range(20):
                    await box.send(text(number))
                    stored += 1
        except OutboxFull:
            return f"OutboxFull after {stored}"
        return f"stored {stored}"

    return asyncio.run(use())


@pytest.mark.parametrize("reserve", [True, False], ids=["with a reserve", "without one"])
def test_an_outbox_opens_on_a_full_disk_or_says_that_it_is_full(disk: Disk, reserve: bool) -> None:
    """P1, P8: at every level of free space, opening and sending end in success or `OutboxFull`, never in a signal.

    One of an older version has no reserve, and may not even be opened.
    """
    path = new_outbox(disk, 10)
    content = path.read_bytes()
    fates = {}
    for level in LEVELS:
        old_outbox(disk, path, content)
        if reserve:
            reservefile.fill(str(path))
            assert reservefile.is_whole(str(path))
        disk.fill(level * KIB)
        fates[level] = fate(partial(open_and_send, path))
        disk.make_room()
        assert integrity(path) == "ok"
    assert all(said.startswith(("OutboxFull", "stored 20")) for said in fates.values()), fates
    assert all(said == "stored 20" for level, said in fates.items() if reserve and level >= 600), fates


def test_without_allocation_the_process_dies() -> None:
    """P8: the harness finds SIGBUS when the shared memory is left to SQLite on ext4 with blocks of 1 KiB."""

    def broken(path: Path) -> str:
        with no_index():
            return open_and_send(path)

    for disk in mounted("ext4-1024"):
        path = new_outbox(disk, 10)
        content = path.read_bytes()
        fates = {}
        for level in range(8, 72, STEP):
            old_outbox(disk, path, content)
            disk.fill(level * KIB)
            fates[level] = fate(partial(broken, path))
        assert "SIGBUS" in fates.values(), fates


# -- the log behind a reader


def cross(path: Path, prepare: Callable[[], None], broken: bool) -> str:
    """Let the log grow, behind a reader, to just below the end of the first block of its index, then fill and send."""

    async def use() -> str:
        async with Outbox(path) as box:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as reader:
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM durablews_meta").fetchone()
                index = walindex.index_of(str(path)) or walindex._hold(f"{path}-shm", str(path), create=False)
                assert index is not None
                while (frames := index.log().frames) < 4050:
                    await box.send_many([text(number) for number in range(100 if frames < 3900 else 1)])
                prepare()
                stored = 0
                try:
                    for number in range(12):
                        await box.send(text(number))
                        stored += 1
                except OutboxFull:
                    return f"OutboxFull after {stored} in {index.log().frames}"
                return f"stored {stored} in {index.log().frames}"

    with no_index() if broken else contextlib.nullcontext():
        return asyncio.run(use())


def test_the_log_crosses_into_a_new_block_of_its_index_without_a_signal() -> None:
    """P8: a log of more than 4062 frames behind a reader, on a full disk: stored or `OutboxFull`; found if broken."""
    for disk in mounted("ext4-1024"):
        fates: dict[tuple[bool, int], str] = {}
        for broken in (False, True):
            for level in range(30, 110, 20):
                path = new_outbox(disk)
                fates[broken, level] = fate(partial(cross, path, partial(disk.fill, level * KIB), broken))
                disk.make_room()
                assert integrity(path) == "ok"
        whole = [said for (broken, _), said in fates.items() if not broken]
        assert all(said.startswith(("OutboxFull", "stored")) for said in whole), fates
        assert "SIGBUS" in [said for (broken, _), said in fates.items() if broken], fates


# -- draining


class Scene:
    """An agent that sends while the disk is full, and drains it then."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self.disk = disk
        self.accepted: list[str] = []
        self.refused = 0
        self.begun: list[float] = []

    async def send_until_refused(self, ws: durablews.Client, refusals: int = 3, at_most: int = 4000) -> None:
        """Send, twenty at once, until so many were told that there is no room; anything else is an error."""
        refused = self.refused + refusals
        number = len(self.accepted)
        while self.refused < refused and number < at_most:
            batch = [text(number + offset) for offset in range(20)]
            number += len(batch)
            for message, result in zip(
                batch, await asyncio.gather(*map(ws.send, batch), return_exceptions=True), strict=True
            ):
                if isinstance(result, OutboxFull):
                    self.refused += 1
                else:
                    assert isinstance(result, durablews.Receipt), result
                    self.accepted.append(message)

    async def count_transactions(self, ws: durablews.Client) -> None:
        loop = asyncio.get_running_loop()

        def note(statement: str) -> None:
            if statement == "BEGIN IMMEDIATE":
                self.begun.append(loop.time())

        await ws._outbox.storage.read(lambda connection: connection.set_trace_callback(note))

    async def pending(self, ws: durablews.Client) -> int:
        return (await ws.stats()).pending


def drain(path: Path, disk: Disk, level: int, boots: bool) -> str:
    """The whole story, on one level; returns how it went."""

    async def play() -> str:
        scene = Scene(path, disk)
        if boots:
            disk.fill(level * KIB)
        async with PlainServer() as server:
            await server.stop()
            settings: dict[str, Any] = {"reconnect": FAST, "proxy": None, "delivery": {"drain_timeout": 0}}
            async with durablews.connect(server.url, path, **settings) as ws:
                if not boots:
                    disk.fill(level * KIB)
                before = await scene.pending(ws)
                await scene.send_until_refused(ws)
                assert scene.refused, "the disk was not full"
                assert await scene.pending(ws) == before + len(scene.accepted)
                await server.start()
                assert await ws.flush(60), ws.stats
                assert await scene.pending(ws) == 0
                # Nobody else got any of it: the disk is as full as it was, but for what the deletions needed.
                assert disk.free() <= level * KIB + reservefile.RESERVE
                delivered = len(server.applied)
                # The file has room within itself now; only the index of its log may want for a block.
                with contextlib.suppress(OutboxFull):
                    inside = await ws.send("there is room again")
                    await inside.acked(60)
                disk.make_room()
                await until(lambda: reservefile.is_whole(str(path)), 60)
                await scene.send_until_refused(ws, at_most=len(scene.accepted) + 200)
                assert await ws.flush(60)
                await until_true(lambda: trouble_is_over(ws), 60)
            texts = [payload for payload in server.payloads if payload != "there is room again"]
            assert len(texts) == len(set(texts))
            assert set(scene.accepted) <= set(texts), "lost"
            assert len(texts) == before + len(set(scene.accepted)), (len(texts), before, len(scene.accepted))
        return f"delivered {delivered}"

    return asyncio.run(play())


async def trouble_is_over(ws: durablews.Client) -> bool:
    return (await ws.stats()).trouble is None


@pytest.mark.parametrize("boots", [False, True], ids=["fills", "boots"])
def test_a_full_disk_is_drained(disk: Disk, boots: bool) -> None:
    """P1, P2, P8: senders get `OutboxFull`; all that was accepted is delivered once and deleted on the full disk."""
    levels = random.Random(SEED).sample(LEVELS, int(os.environ.get("DURABLEWS_TEST_DISK_LEVELS", "2")))
    for level in levels:
        path = new_outbox(disk)
        old = fate(lambda path=path: asyncio.run(preload(path)))  # type: ignore[misc]
        assert old == "None", old
        said = fate(partial(drain, path, disk, level, boots))
        assert said.startswith("delivered"), f"seed {SEED}, {level} KiB free: {said}"
        disk.make_room()
        assert integrity(path) == "ok"


async def preload(path: Path) -> None:
    async with Outbox(path) as box:
        await box.send_many([f"before {number:05d}" + "y" * MESSAGE for number in range(3000)])


def stuck(path: Path, disk: Disk) -> str:
    """Drain with no byte free, and the reserve gone as well."""

    async def play() -> str:
        scene = Scene(path, disk)
        async with PlainServer() as server:
            settings: dict[str, Any] = {"reconnect": FAST, "proxy": None, "delivery": {"drain_timeout": 0}}
            async with durablews.connect(server.url, path, **settings) as ws:
                # The first welcome after an opening has to be written down before anything new is sent.
                await (await ws.send("welcomed")).acked(60)
                await server.stop()
                disk.fill(600 * KIB)
                await scene.send_until_refused(ws)
                os.unlink(reservefile.reserve_path(str(path)))
                disk.fill(0)
                await server.start()
                await until(lambda: set(scene.accepted) <= set(server.payloads), 60)
                await until_true(lambda: trouble_is_there(ws), 60)
                assert await scene.pending(ws) > 0
                await scene.count_transactions(ws)
                await until(lambda: len(scene.begun) >= 2, 60)  # it is tried again
                del scene.begun[:]
                await asyncio.sleep(0.5)  # no condition: what is shown is that little happens
                tries = len(scene.begun)
                assert tries <= 20, tries
                disk.make_room()
                assert await ws.flush(60)
                assert await scene.pending(ws) == 0
                await until_true(lambda: trouble_is_over(ws), 60)
            assert len(server.payloads) == len(set(server.payloads))
        return "emptied"

    return asyncio.run(play())


async def trouble_is_there(ws: durablews.Client) -> bool:
    return (await ws.stats()).trouble is not None


def test_what_cannot_be_deleted_is_kept_in_mind_and_tried_at_leisure(disk: Disk) -> None:
    """P2, P8: with no byte left, and no reserve, all goes out, once; deletions wait, visibly, without haste."""
    path = new_outbox(disk)
    assert fate(partial(stuck, path, disk)) == "emptied", disk.kind
    disk.make_room()
    assert integrity(path) == "ok"
