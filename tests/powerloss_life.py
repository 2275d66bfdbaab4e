"""One life of an agent whose writes are recorded: it sends, drains and is switched off. Run by `powerloss.record`.

The real library through its real interface, and a real receiver on loopback in the same process, so that what the agent
writes, what it was told and what the server knows stand in one order. What was promised goes to the file ``marks`` in
the same folder. Only thresholds are smaller than they are in the world, so that a short life sees checkpoints, a log
that is reset and a file that shrinks.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

import durablews
from durablews import database, housekeeping, upkeep
from durablews.committing import Committer
from durablews.entries import Gap
from durablews.errors import Rejected
from durablews.outbox import Outbox, Receipt
from durablews.receiver import SUBPROTOCOLS, Message, Receiver, Refusal, Store, select_subprotocol
from durablews.receiver.exchange import one_by_one
from durablews.storage import Storage

__all__ = ["AGENT", "BROKEN", "FAST", "SERVER", "is_refused", "payload_of", "serving", "tag_of"]

#: The agent's outbox and the server's store, and where its promises stand, in the folder that is recorded.
AGENT, SERVER, MARKS = "agent.db", "server.db", "marks"
#: Tags of one life; a life's first is its number times this.
TAGS = 100_000
FAST = {"base_delay": 0.01, "max_delay": 0.05, "connect_timeout": 20}
_PRIORITIES = (-1, 0, 0, 0, 1, 7)

Mark = Callable[..., None]


def payload_of(tag: int) -> Any:
    """Return what the message `tag` says: mostly little; some are bytes.

    The first of a life are larger than a page of the file, so that there is a backlog whose end lets the file shrink.
    """
    filling = f"süß-{tag} " * (1200 if tag % TAGS < 12 else tag % 13)
    return b"%d %s" % (tag, filling.encode()) if tag % 7 == 3 else {"n": tag, "text": filling}


@cache
def tag_of(raw: str | bytes) -> int:
    """Return whose payload this is, after looking that it is whole.

    Raises:
        ValueError, AttributeError, TypeError: it is nobody's.
    """
    tag = int(raw.partition(b" ")[0]) if isinstance(raw, bytes) else int(json.loads(raw)["n"])
    if payload_of(tag) != (raw if isinstance(raw, bytes) else json.loads(raw)):
        raise ValueError(f"not what message {tag} said")
    return tag


def is_refused(tag: int) -> bool:
    """Whether the server refuses this message for good."""
    return tag % 41 == 7


# -- the server


@asynccontextmanager
async def serving(store: Path, mark: Mark) -> AsyncIterator[str]:
    """A receiver that keeps each message once and marks it before it does; gives its URL."""

    def prepare(connection: sqlite3.Connection) -> None:
        columns = "id INTEGER PRIMARY KEY, priority INTEGER, seq INTEGER, tag INTEGER"
        connection.execute(f"CREATE TABLE IF NOT EXISTS kept ({columns}) STRICT")

    def apply(connection: sqlite3.Connection, message: Message) -> Refusal | None:
        tag = tag_of(message.raw)
        mark("received", tag, message.stream, message.seq)
        if is_refused(tag):
            return Refusal("invalid")
        row = (message.priority, message.seq, tag)
        connection.execute("INSERT INTO kept (priority, seq, tag) VALUES (?, ?, ?)", row)
        return None

    async with Receiver(Store(store, prepare=prepare)) as receiver:

        async def handle(websocket: ServerConnection) -> None:
            await receiver.serve(websocket, one_by_one(apply, savepoints=False))

        async with serve(
            handle,
            "127.0.0.1",
            0,
            subprotocols=[Subprotocol(name) for name in SUBPROTOCOLS],
            select_subprotocol=select_subprotocol,
            logger=logging.Logger("silent", logging.CRITICAL),
        ) as server:
            yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


# -- the agent


class Sender:
    """Sends messages in every way there is, and marks what was promised about each."""

    def __init__(self, mark: Mark, first: int, chance: random.Random) -> None:
        self.mark, self.next, self.chance = mark, first, chance
        self.receipts: dict[int, Receipt] = {}
        self.watchers: set[asyncio.Task[None]] = set()

    def begin(self) -> int:
        tag, self.next = self.next, self.next + 1
        self.mark("begun", tag)
        return tag

    def sent(self, tag: int, receipt: Receipt) -> None:
        self.mark("sent", tag, receipt.stream, receipt.seq)
        self.receipts[tag] = receipt

    async def one(self, to: Any, priority: int) -> None:
        tag = self.begin()
        self.sent(tag, await to.send(payload_of(tag), priority=priority))

    async def twice(self, to: Any, priority: int) -> None:
        """Send one message twice under one id, as after a cancelled send."""
        tag = self.begin()
        for _ in range(2):
            self.sent(tag, await to.send(payload_of(tag), priority=priority, id=f"id of {tag}", topic="named"))

    async def many(self, to: Any, priority: int, count: int) -> None:
        tags = [self.begin() for _ in range(count)]
        for tag, receipt in zip(tags, await to.send_many(map(payload_of, tags), priority=priority), strict=True):
            self.sent(tag, receipt)

    async def burst(self, to: Any, rounds: int) -> None:
        """One after another, several at once that share a commit, and many as one."""
        for _ in range(rounds):
            priority = self.chance.choice(_PRIORITIES)
            ways: list[Awaitable[None]] = [
                self.one(to, priority),
                self.twice(to, priority),
                self.many(to, priority, self.chance.randrange(2, 12)),
                self.together(to, self.chance.randrange(2, 6)),
            ]
            chosen = self.chance.randrange(len(ways))
            for number, way in enumerate(ways):
                if number == chosen:
                    await way
                else:
                    way.close()  # type: ignore[attr-defined]

    async def together(self, to: Any, count: int) -> None:
        await asyncio.gather(*(self.one(to, self.chance.choice(_PRIORITIES)) for _ in range(count)))

    def watch(self) -> None:
        """Mark it when a message is known to have left for good, or to be a dead letter."""
        for tag, receipt in self.receipts.items():
            if receipt.seq is not None:
                watcher = asyncio.create_task(self.await_fate(tag, receipt))
                self.watchers.add(watcher)
                watcher.add_done_callback(self.watchers.discard)
        self.receipts.clear()

    async def await_fate(self, tag: int, receipt: Receipt) -> None:
        try:
            await receipt.acked()
        except Rejected:
            self.mark("refused", tag)
        else:
            self.mark("acked", tag)


async def live(folder: Path, number: int, seed: str, durability: str, mark: Mark) -> None:
    """Live once: offline, online, offline again; then the power goes, in the middle of a transaction."""
    sender = Sender(mark, number * TAGS, random.Random(seed))
    path = folder / AGENT
    for rounds in (6, 3):
        async with Outbox(path, durability=durability) as store:
            if rounds == 6:
                await sender.many(store, 0, 12)
            await sender.burst(store, rounds)
        sender.receipts.clear()  # what this outbox stored the client delivers: nobody waits for it here
    async with serving(folder / SERVER, mark) as url:
        client = durablews.connect(url, path, durability=durability, reconnect=FAST, delivery={"window": 16})
        await client.__aenter__()
        async with Outbox(path, durability="process") as neighbour:
            for _ in range(8):
                await sender.burst(client, 3)
                sender.watch()
                # Not promised to survive; but what the server has seen of it must.
                await neighbour.send(payload_of(sender.begin()))
        await asyncio.gather(*sender.watchers)
        await client.flush(60)
        # The file gives back what the first backlog took.
        while (await client.stats()).pending or shrinks(path):  # noqa: ASYNC110 - only the file tells
            await asyncio.sleep(0.02)
        await sender.burst(client, 5)
        sender.watch()
    await sender.burst(client, 8)
    # No close: this is where it is switched off, with a commit under way.
    last = asyncio.create_task(sender.burst(client, 1))
    await asyncio.sleep(0)
    del last
    os._exit(0)


def shrinks(path: Path) -> bool:
    """Whether there is more to give back than the file keeps."""
    connection = sqlite3.connect(path)
    try:
        (free,), (pages,) = (connection.execute(f"PRAGMA {name}_count").fetchone() for name in ("freelist", "page"))
    finally:
        connection.close()
    return bool(free > upkeep._KEPT and 2 * free >= pages)


# -- deliberately broken builds


def answer_early() -> None:
    """`send` returns before its commit."""
    real = Storage.enqueue

    def enqueue(self: Storage, drafts: Any) -> asyncio.Future[Any]:
        real(self, drafts)
        answer = asyncio.get_running_loop().create_future()
        answer.set_result([Gap()] * len(drafts))
        return answer

    Storage.enqueue = enqueue  # type: ignore[method-assign]


def forget_the_folder() -> None:
    """A new outbox is linked, and the folder is not synced."""
    os.fsync = lambda fd: None


def sync_nothing() -> None:
    """``durability="power"`` is SQLite's synchronous=OFF."""
    database.SYNCHRONOUS["power"] = 0


def send_what_is_not_synced() -> None:
    """The drainer sends what it reads, on the medium or not (PROTOCOL.md C8)."""
    Committer.synced_read = lambda self, connection, job: job(connection)  # type: ignore[method-assign]


#: By name, what a life can be told to break in the library before it begins.
BROKEN: dict[str, Callable[[], None]] = {
    function.__name__: function for function in (answer_early, forget_the_folder, sync_nothing, send_what_is_not_synced)
}


def main(folder: Path, number: int, seed: str, durability: str, broken: str) -> None:
    database._CHECKPOINT_PAGES = 60
    upkeep._KEPT, upkeep._STEP = 4, 4
    housekeeping._SPACE_INTERVAL = 0.02
    upkeep.LARGEST_LOG = 128 * 1024
    marks = os.open(folder / MARKS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def mark(*facts: object) -> None:
        os.write(marks, json.dumps(facts).encode())

    create = database.create

    def create_and_say_so(path: str) -> None:
        create(path)
        mark("created")

    database.create = create_and_say_so
    if broken:
        BROKEN[broken]()
    asyncio.run(live(folder, number, seed, durability, mark))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6])
