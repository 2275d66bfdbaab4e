"""Worlds in which outboxes are copied: a real client, a real receiver that keeps what it applied, real disks."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import FAST, Inbox, Process, until
from websockets.asyncio.server import ServerConnection

import durablews
from durablews.client import Client
from durablews.receiver import Refusal, receiver
from durablews.wire.frames import Item

SEED = int(os.environ.get("DURABLEWS_TEST_SEED", random.randrange(1, 2**31)))
HISTORIES = int(os.environ.get("DURABLEWS_TEST_HISTORIES", "40"))
#: Seconds for anything to happen.
DEADLINE = 60.0
NOWHERE = "ws://127.0.0.1:1/"


class _Pulled(Exception):
    """The client is to end without draining."""


class World:
    """A server and the outboxes that speak to it."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        self.folder = folder
        self.dice = dice
        self.inbox = Inbox(folder / "inbox.db")
        self.receiver: receiver.Receiver
        #: What `send` confirmed, and no restore has erased before it was applied.
        self.owed: set[int] = set()
        self._next = 0

    @property
    def applied(self) -> list[tuple[str, int]]:
        """Stream and number of every message that was applied."""
        with closing(sqlite3.connect(self.inbox.store)) as connection:
            rows = connection.execute("SELECT stream, payload FROM durablews_inbox ORDER BY id").fetchall()
        return [(stream, int(payload)) for stream, payload in rows]

    def known(self) -> set[int]:
        return {number for _, number in self.applied}

    def client(self, path: Path, *, online: bool = True, **settings: Any) -> Client:
        url = self.inbox.url if online else NOWHERE
        return durablews.connect(url, path, proxy=None, **{"reconnect": FAST, **settings})

    async def send(self, ws: Client, count: int) -> list[int]:
        """Send so many messages of random priorities; each is owed once `send` has returned."""
        numbers = list(range(self._next, self._next + count))
        self._next += count
        for number in numbers:
            await ws.send(number, priority=self.dice.choice((0, 0, 0, 1)))
            self.owed.add(number)
        return numbers

    async def live(self, path: Path, count: int, *, online: bool = True, drain: bool = True) -> list[int]:
        """Open an outbox, send, and close it: when all is delivered, or at once, in the middle of things."""
        numbers: list[int] = []
        try:
            async with self.client(path, online=online) as ws:
                if online and not drain:
                    await until(lambda: ws.state.value == "CONNECTED", DEADLINE)
                numbers = await self.send(ws, count)
                if online and drain:
                    assert await ws.flush(DEADLINE)
                raise _Pulled
        except _Pulled:
            return numbers

    def judge(self) -> int:
        """Fail where something was lost, or repeated under its own stream; return how many repeats there were."""
        applied = self.applied
        lost = self.owed - self.known()
        assert not lost, f"{len(lost)} lost"
        assert max(Counter(applied).values(), default=1) == 1, "applied twice under one stream"
        return len(applied) - len(self.known())


@asynccontextmanager
async def world(
    folder: Path, seed: object, *, refuse: Callable[[], set[int]] = set, window: int | None = None
) -> AsyncIterator[World]:
    """A world whose server refuses for good, once, what it is told to."""
    made = World(folder, random.Random(str(seed)))
    genuine = receiver.Receiver.serve

    async def serve(self: receiver.Receiver, websocket: ServerConnection, keep: Any, **more: Any) -> Any:
        def picky(
            connection: sqlite3.Connection, stream: str, priority: int, items: Sequence[Item]
        ) -> tuple[int, Refusal] | None:
            for place, item in enumerate(items):
                if int(item.payload) in refuse():
                    refuse().discard(int(item.payload))
                    keep(connection, stream, priority, items[:place])
                    return item.seq, Refusal("invalid")
            keep(connection, stream, priority, items)
            return None

        return await genuine(self, websocket, picky, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(receiver.Receiver, "serve", serve)
        async with made.inbox.serving(window=window or made.dice.choice((1, 8, 1024))) as made.receiver:
            yield made


def backup(path: Path) -> dict[str, bytes]:
    """Copy a closed outbox as a backup program does: the database, and the log if there is one."""
    return {suffix: Path(f"{path}{suffix}").read_bytes() for suffix in ("", "-wal") if Path(f"{path}{suffix}").exists()}


def restore(path: Path, saved: dict[str, bytes]) -> None:
    """Put it back in place: the inode stays, and nothing tells."""
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    for suffix, data in saved.items():
        Path(f"{path}{suffix}").write_bytes(data)


# -- histories


async def restored(w: World) -> None:
    """A backup, another life, the backup again; offline more or fewer messages than the other life had sent since."""
    dice, path = w.dice, w.folder / "agent.db"
    await w.live(path, dice.randrange(0, 6), drain=dice.random() < 0.7)
    saved = backup(path)
    since: list[int] = []
    for _ in range(dice.randrange(1, 3)):
        since += await w.live(path, dice.randrange(1, 6), drain=dice.random() < 0.7)
    more = dice.random() < 0.5
    restore(path, saved)
    w.owed -= set(since) - w.known()
    count = len(since) + dice.randrange(1, 8) if more else dice.randrange(0, len(since))
    for _ in range(dice.randrange(1, 3)):
        await w.live(path, count, online=False)
    await w.live(path, dice.randrange(0, 3))


async def copied(w: World, refuse: set[int]) -> None:
    """A copy beside the original, with the same messages waiting in both; the server refuses one of the original's."""
    dice, path, copy = w.dice, w.folder / "agent.db", w.folder / "copy.db"
    await w.live(path, dice.randrange(0, 4))
    await w.receiver.flow(0)  # what is sent after the welcome waits: its numbers are given out, and not raised above
    waiting = await w.live(path, dice.randrange(3, 9), drain=False)
    await w.receiver.flow(1024)
    for suffix in backup(path):
        shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
    # A dead letter in the original, it is still owed by the copy. Not the last: what follows it must be applied.
    refuse.add(dice.choice(waiting[:-1]))
    await w.live(path, dice.randrange(0, 2))
    refuse.clear()
    await w.live(copy, dice.randrange(0, 4))
    await w.live(path, dice.randrange(0, 3))


async def kept_in_place(w: World, refuse: set[int]) -> None:
    """No copy at all: lives that end anyhow, so that nothing may be repeated under another stream."""
    dice, path = w.dice, w.folder / "agent.db"
    for _ in range(dice.randrange(2, 5)):
        await w.live(path, dice.randrange(0, 5), online=dice.random() < 0.8, drain=dice.random() < 0.5)
    await w.live(path, 1)
    assert len({stream for stream, _ in w.applied}) == 1, "a new stream without a reason"


async def play(folder: Path, kind: str, number: int) -> int:
    """Play one history and judge it; return how many messages were applied twice."""
    refuse: set[int] = set()
    home = folder / f"{kind}-{number}"
    home.mkdir(parents=True)
    async with world(home, f"{SEED}-{kind}-{number}", refuse=lambda: refuse) as w:
        try:
            if kind == "restored":
                await restored(w)
            else:
                await {"copied": copied, "kept": kept_in_place}[kind](w, refuse)
            repeats = w.judge()
        except AssertionError as exc:
            raise AssertionError(f"{exc} (seed {SEED}, {kind} {number})") from exc
    shutil.rmtree(home)
    return repeats


async def play_many(folder: Path, kind: str, count: int) -> list[int]:
    """Play so many histories of a kind; return for each how many messages were applied twice."""
    return [await play(folder, kind, number) for number in range(count)]


# -- the same files on two disks


class Disk:
    """An ext4 file system in a file, mounted."""

    def __init__(self, image: Path, where: Path) -> None:
        self.image, self.where = image, where

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        self.where.mkdir(exist_ok=True)
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.where)], check=True, capture_output=True)
        try:
            yield self.where
        finally:
            subprocess.run(["umount", str(self.where)], check=True, capture_output=True)

    def cut(self) -> None:
        """Take its power away: what was not synced is gone (FS_IOC_SHUTDOWN, without a flush of the journal)."""
        folder = os.open(self.where, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, 0x8004587D, struct.pack("I", 2))
        finally:
            os.close(folder)


async def cloned(disk: Disk, folder: Path, *, sends: int, waiting: int = 0) -> None:
    """Let a disk and its clone, inodes and all, be drained by two clients at once, until both links stand.

    Args:
        sends: messages that each sends twice, once both have been welcomed.
        waiting: messages that wait in both when the clone is made.
    """
    with ExitStack() as stack:
        async with world(folder, f"{SEED}-cloned") as w:
            with disk.mounted() as where:
                await w.live(where / "agent.db", 5)
                await w.live(where / "agent.db", waiting, online=False)
            shutil.copy(disk.image, folder / "clone.img")
            where = stack.enter_context(disk.mounted())
            other = stack.enter_context(Disk(folder / "clone.img", folder / "clone").mounted())
            assert (where / "agent.db").stat().st_ino == (other / "agent.db").stat().st_ino
            calm = {**FAST, "base_delay": 0.2, "max_delay": 0.2} if sends else FAST  # time to send between two tries
            async with w.client(where / "agent.db", reconnect=calm) as one:
                await until(lambda: one.state.value == "CONNECTED", DEADLINE)
                async with w.client(other / "agent.db", reconnect=calm) as two:
                    await until(lambda: two.state.value == "CONNECTED", DEADLINE)
                    for ws in (one, two, one, two):
                        await w.send(ws, sends)
                    await until_both_stand(one, two)
                    for ws in (one, two):
                        assert await ws.flush(DEADLINE)
            w.judge()


async def until_both_stand(one: Client, two: Client) -> None:
    """Wait until neither is closed any more; fail when they go on driving one another out."""
    connects, quiet = 0, 0
    while quiet < 100:
        before, connects = connects, sum([(await ws.stats()).connects for ws in (one, two)])
        both = one.state.value == two.state.value == "CONNECTED"
        quiet = quiet + 1 if both and connects == before else 0
        assert connects < 40, "two clients drive one another out without end"
        await asyncio.sleep(0.005)


_CHILD = """
import asyncio, os, sys, durablews
from durablews.committing import Committer
if os.environ.get("DURABLEWS_TEST_UNSYNCED"):
    Committer.synced_read = lambda self, connection, job: job(connection)
async def main(url, path):
    async with durablews.connect(url, path, durability="process", proxy=None) as ws:
        number = int(sys.argv[3])
        while number < int(sys.argv[3]) + 3000:
            await asyncio.gather(*(ws.send(number + n) for n in range(20)))
            number += 20
        await asyncio.sleep(1000)
asyncio.run(main(*sys.argv[1:3]))
"""


async def lose_power(disk: Disk, folder: Path, *, cuts: int, **environment: str) -> None:
    """Let a client that does not sync lose power while it sends and delivers, and go on with what is left."""
    async with world(folder, f"{SEED}-power", window=1024) as w:
        for life in range(cuts):
            first = 1_000_000 * (life + 1)
            with disk.mounted() as where:
                command = [sys.executable, "-c", _CHILD, w.inbox.url, str(where / "agent.db"), str(first)]
                child = Process(folder, f"child{life}", command, **environment)
                enough = first + w.dice.randrange(40, 400)
                while max(w.known(), default=0) < enough:
                    assert child.running, child.err.read_text()
                    await asyncio.sleep(0.003)
                disk.cut()
                child.kill()
            with disk.mounted() as where:
                path = where / "agent.db"
                with closing(sqlite3.connect(path)) as connection:
                    w.owed |= {int(row[0]) for row in connection.execute("SELECT payload FROM durablews_entries")}
                await w.live(path, w.dice.randrange(0, 900), online=False)
                await w.live(path, 5)
        w.judge()
