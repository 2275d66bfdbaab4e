"""The two processes that `killer` kills: an agent that sends and drains, and a receiver that applies and acks.

Each is forked from a process that has imported everything and opened nothing, and says what it does through a pipe:
what `os.write` took there is known whatever becomes of the process a moment later. A line is

    p PHASE                      what is under way from now on
    a PRIORITY FIRST COUNT       these messages are handed to `send_many` now
    c PRIORITY FIRST COUNT SEQ   ... and it has returned: they were promised, from this sequence on
    e                            everything was acknowledged
    x WHAT                       it ended by itself
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from servers import FAST, silent
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

import durablews
from durablews import database, housekeeping, schema, upkeep
from durablews.client import Client, connect
from durablews.jobs import JobConnection
from durablews.receiver import SUBPROTOCOLS, Receiver, Store, select_subprotocol
from durablews.wire.frames import Item

__all__ = ["DRAINING", "PRIORITIES", "REAL_SCHEMA", "Voice", "agent", "migrations_up_to", "receiver"]

PRIORITIES = (1, 0, -1)
#: The roles of an agent that sends nothing: "drain" stays when all is acknowledged, "last" ends.
DRAINING = ("drain", "last")
#: What a life stores at most of each priority: a backlog that the next ones can drain.
_MOST = 250

_ARRIVED = """
CREATE TABLE IF NOT EXISTS arrived (
    id INTEGER PRIMARY KEY, link TEXT, life INTEGER, role TEXT,
    stream TEXT, priority INTEGER, seq INTEGER, payload TEXT
) STRICT"""


class Voice:
    """The child's end of its pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def say(self, *words: object) -> None:
        # Below PIPE_BUF: whole or not at all, whichever thread writes.
        os.write(self._descriptor, (" ".join(map(str, words)) + "\n").encode())

    def phase(self, name: str) -> None:
        self.say("p", name)


def migrations_up_to(newest: int) -> list[tuple[int, str]]:
    """Return the real migrations and made-up ones after them, each of which works on every entry.

    `newest` counts from the last real one, which is 1.

    Each leaves one table with its own number behind, and takes the one before away: a file that was migrated by halves
    shows it.
    """
    known, first = list(_REAL), _REAL[-1][0] + 1
    for number in range(first, first + newest - 1):
        before = f"DROP TABLE durablews_step_{number - 1};" if number > first else ""
        script = (
            f"CREATE TABLE durablews_step_{number} (seq INTEGER PRIMARY KEY, checksum INTEGER) STRICT;"
            f"INSERT INTO durablews_step_{number} SELECT seq, checksum FROM durablews_entries;"
            f"CREATE INDEX durablews_step_{number}_checksum ON durablews_step_{number} (checksum);"
            f"UPDATE durablews_entries SET created_at = created_at;{before}"
        )
        known.append((number, script))
    return known


_REAL = schema.migrations()
#: The schema of this version; made-up ones are above it.
REAL_SCHEMA = _REAL[-1][0]


def agent(path: Path, url: str, voice: Voice, *, life: int, role: str, newest: int, seed: int) -> None:
    """Live as an agent, until killed unless the role is "last".

    Args:
        life: its number; what it sends carries it.
        newest: the highest schema that it knows.
    """
    voice.phase("starting")
    _show_phases(voice, newest)
    asyncio.run(_agent(path, url, voice, life, role, random.Random(seed * 1000 + life)))


async def _agent(path: Path, url: str, voice: Voice, life: int, role: str, chance: random.Random) -> None:
    client = connect(
        url,
        path,
        headers={"X-Life": str(life), "X-Role": role},
        reconnect={**FAST, "max_delay": 0.01},
        delivery={"window": 64, "drain_timeout": 0},
        proxy=None,
    )
    async with client as ws:
        voice.phase("running")
        if role in DRAINING:
            while not await ws.flush(5.0):
                pass
            voice.say("e")
            if role == "last":
                return
        else:
            await asyncio.gather(*(_send(ws, voice, life, priority, chance) for priority in PRIORITIES))
        await asyncio.get_running_loop().create_future()


async def _send(ws: Client, voice: Voice, life: int, priority: int, chance: random.Random) -> None:
    number = 0
    while number < _MOST:
        count = chance.choice((1, 1, 1, 4, 20))
        payloads = [[life, number + i, "x" * int(chance.expovariate(1 / 1500))] for i in range(count)]
        voice.say("a", priority, number, count)
        receipts = await ws.send_many(payloads, priority=priority)
        voice.say("c", priority, number, count, receipts[0].seq)
        number += count
        await asyncio.sleep(chance.choice((0, 0, 0.001, 0.005)))


def _show_phases(voice: Voice, newest: int) -> None:
    """Say when recovery, migration and vacuum begin; let migration and vacuum happen often."""
    look, apply = schema.require_outbox, schema.apply_migrations

    def require_outbox(connection: sqlite3.Connection, path: str) -> int:
        voice.phase("recovering")  # the first statement of a connection reads the log that a killed one has left
        present = look(connection, path)
        voice.phase("opening")
        return present

    def apply_migrations(connection: sqlite3.Connection, path: str) -> int:
        voice.phase("migrating")
        return apply(connection, path)

    def executescript(self: JobConnection, script: str, /) -> Any:
        voice.phase("vacuuming")
        try:
            return sqlite3.Connection.executescript(self, script)
        finally:
            voice.phase("running")

    schema.migrations = lambda: migrations_up_to(newest)
    for name, patched in (
        ("migrations", schema.migrations),
        ("require_outbox", require_outbox),
        ("apply_migrations", apply_migrations),
    ):
        setattr(database, name, patched)
    JobConnection.executescript = executescript  # type: ignore[method-assign,assignment]
    upkeep._KEPT, upkeep._STEP = 4, 4
    housekeeping._SPACE_INTERVAL, housekeeping._SPACE_PAUSE = 0.02, 0.001


def receiver(path: Path, listening: socket.socket, voice: Voice, *, life: int) -> None:
    """Live as a receiver on a socket that listens already, until killed."""
    voice.phase("starting")
    asyncio.run(_receiver(path, listening, voice, life))


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute(_ARRIVED)


async def _receiver(path: Path, listening: socket.socket, voice: Voice, life: int) -> None:
    links = 0

    async def handle(websocket: ServerConnection) -> None:
        nonlocal links
        links += 1
        assert websocket.request is not None
        headers = websocket.request.headers
        origin = (f"{life}.{links}", int(headers["X-Life"]), headers["X-Role"])

        def apply(connection: sqlite3.Connection, stream: str, priority: int, items: Sequence[Item]) -> None:
            connection.executemany(
                "INSERT INTO arrived (link, life, role, stream, priority, seq, payload) VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(*origin, stream, priority, item.seq, item.payload) for item in items],
            )

        await receiving.serve(websocket, apply)

    voice.phase("recovering")
    store = Store(path, prepare=_prepare)
    async with (
        Receiver(store) as receiving,
        serve(
            handle,
            sock=listening,
            subprotocols=[Subprotocol(name) for name in SUBPROTOCOLS],
            select_subprotocol=select_subprotocol,
            compression=None,
            logger=silent,
        ),
    ):
        voice.phase("running")
        await asyncio.get_running_loop().create_future()


assert durablews.Receiver is Receiver, "imported before the first fork, like all that is loaded lazily"
assert "websockets.asyncio.client" in sys.modules
