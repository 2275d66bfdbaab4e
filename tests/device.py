"""A device in simulated time: the library's own outbox, attempts, link and delivery on a SQLite file, and its owner.

Only who dials, the clock, the disk's thread and the socket are simulated (`simulation`). Each method is one thing that
may happen; a crash may come between any two. `Witness` judges what the file shows after each.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from simulation import DiskThread, SimulatedLoop, Violation
from support import new_outbox
from traffic import Connection
from witness import Witness

from durablews import entries, settlement
from durablews.attempt import Attempts
from durablews.config import DeliveryConfig, Settings
from durablews.draining import DrainedOutbox
from durablews.errors import MessageTooLarge, OutboxFull, OutboxLocked
from durablews.events import EventLog
from durablews.jobs import transaction
from durablews.messages import Entry
from durablews.wire.frames import JSON, MSGPACK, Codec
from durablews.wire.native import NativeDialect

__all__ = ["Clock", "Device"]

_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None


@cache
def _new_outbox() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        new_outbox(Path(folder)).close()
        return (Path(folder) / "agent.db").read_bytes()


class Clock:
    """The device's time, as its outbox reads it."""

    boot_id = "boot"

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return self._loop.now

    def wall(self) -> int:
        return int(self._loop.now * 1000)

    def boot(self) -> int:
        return int(self._loop.now * 1000)


class Device:
    """One device's life. Each step returns when the library waits for the next one.

    Args:
        rng: for what nobody chooses, such as the raise of the sequence.
        server: the server's database, for the witness.
        delivery: the client's configuration.
        caps: of the outbox.
        packed: MessagePack instead of JSON.
        durability: of the outbox.
    """

    def __init__(
        self,
        rng: random.Random,
        server: sqlite3.Connection,
        *,
        delivery: DeliveryConfig,
        caps: dict[str, object],
        packed: bool = False,
        durability: str = "power",
    ) -> None:
        self._rng, self._durability = rng, durability
        self.loop = SimulatedLoop()
        self.clock = Clock(self.loop)
        self.codec = Codec(MSGPACK if packed else JSON)
        self.settings = Settings(delivery=delivery)
        self.folder = Path(tempfile.mkdtemp(dir=_FOLDER))
        self.path = self.folder / "agent.db"
        self.path.write_bytes(_new_outbox())
        self.witness = Witness(server)
        self.produced = 0
        #: What was seen while the library ran.
        self.violations: list[Violation] = []
        self.connection: Connection | None = None
        #: Connections that this end has left, and that the server may still read.
        self.late: list[Connection] = []
        self.backup: tuple[bytes, frozenset[int]] | None = None
        self.locker: sqlite3.Connection | None = None
        self.sends: dict[int, asyncio.Task[Any]] = {}
        self.foreign = self._connect()
        with transaction(self.foreign):
            entries.write_caps(self.foreign, caps)
        self.open()

    def end(self) -> None:
        """Leave nothing behind."""
        self._die()
        self.loop.close()
        self.foreign.close()
        shutil.rmtree(self.folder)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, isolation_level=None, timeout=0)

    def go_on(self) -> None:
        """Let the client do what it can do now, and look at what its callers were told."""
        self.loop.run_until_idle()
        if self.violations:
            raise self.violations[0]
        if self.loop.defects:
            raise Violation(f"P8: a defect: {self.loop.defects}")
        for number, task in list(self.sends.items()):
            if task.done():
                del self.sends[number]
                self._told(number, task)
        if self.connection is not None and self.connection.task.done():
            self.connection.task.result()
            self._left(self.connection)

    def _left(self, connection: Connection) -> None:
        if connection.socket.to_server and not connection.closed:
            self.late.append(connection)
        self.connection = None

    def _told(self, number: int, task: asyncio.Task[Any]) -> None:
        try:
            seq = task.result().seq
        except (OutboxFull, OutboxLocked, MessageTooLarge):
            self.witness.turned_away.add(number)
        except asyncio.CancelledError:
            pass  # stored or not: its caller cannot know
        else:
            self.witness.took(number, seq)

    # -- the device's process

    def open(self) -> None:
        """Begin a process on what is on the disk."""
        self.unlock()
        self.outbox = DrainedOutbox(self.path, durability=self._durability, clock=self.clock)
        self.outbox.window = self.settings.delivery.window
        self.attempts = Attempts(
            self.settings,
            self.outbox,
            NativeDialect(),
            events=EventLog(),
            leave_at=lambda started: None,
            on_welcome=lambda shown: None,
            on_push=lambda payload: None,
            on_moved=lambda: None,
        )
        with (
            patch("durablews.storage.open_connection", self._open_connection),
            patch("durablews.draining.secrets", SimpleNamespace(randbelow=self._rng.randrange)),
        ):
            opening = self.loop.create_task(self.outbox.open())
            self.loop.run_until_idle()
            while not opening.done():
                self.disk.work()
                self.loop.run_until_idle()
            opening.result()
        self.outbox.storage.on_stored = self._stored
        self.witness.begin(self.foreign)

    async def _open_connection(self, path: str, **options: Any) -> DiskThread:
        connection = sqlite3.connect(path, isolation_level=None, uri=True, timeout=0)
        self.disk = DiskThread(connection, self.loop)
        return self.disk

    def _stored(self, entries: Sequence[Entry] = ()) -> None:
        if self.attempts.link is not None:
            self.attempts.link.stored(entries)

    def _die(self) -> None:
        self.disk.die()
        if self.connection is not None:
            self.connection.socket.lose()
        self.loop.kill()
        self.loop.defects.clear()
        self.outbox._ownership.release()
        self.sends.clear()
        self.connection = None

    def crash(self, *, read_on: bool = False) -> None:
        """End the process, with everything that it kept in memory only, and begin another one."""
        if read_on and self.connection is not None:
            self._left(self.connection)
        self._die()
        self.open()

    def restart(self) -> None:
        """Close as the client's `close` does, and open again."""
        if self.connection is not None:
            self.connection.task.cancel()
            self._until(self.connection.task)
            self._left(self.connection)
        self.outbox.leave()
        self._until(self.loop.create_task(self.outbox.close()))
        self.loop.run_until_idle()
        self.go_on()
        self._die()
        self.open()

    def _until(self, task: asyncio.Task[Any]) -> None:
        self.unlock()
        self.loop.run_until_idle()
        while not task.done():
            if self.disk.jobs:
                self.work()
            else:
                self.wait()
            self.loop.run_until_idle()

    def work(self) -> None:
        """Let the disk's thread do one job."""
        self.disk.work()
        self.witness.look()
        self.go_on()

    def wait(self, seconds: float | None = None) -> None:
        """Let time pass: so much, or until a timer fires."""
        timer = self.loop.next_timer
        self.loop.now = max(self.loop.now, timer or 0.0) if seconds is None else self.loop.now + seconds
        self.go_on()

    # -- messages come and go

    def send(self, count: int, priority: int, ttl: float | None = None, kind: str = "plain", code: int = 0) -> None:
        """Let callers send messages. `kind`: "plain", "refused" by the server, or "poison" that it closes for."""
        for _ in range(count):
            self.produced = number = self.produced + 1
            if kind == "refused":
                self.witness.refused.add(number)
            elif kind == "poison":
                self.witness.poison[number] = code
                self.witness.poisoned.add(number)
            payload = str(number).encode() if number % 3 == 0 else number
            self.sends[number] = self.loop.create_task(self.outbox.send(payload, priority=priority, ttl=ttl))
            self.loop.run_until_idle()
        self.go_on()

    def cancel(self) -> None:
        """Let every caller that waits lose its patience."""
        for task in self.sends.values():
            task.cancel()
        self.go_on()

    def insert(self, priority: int) -> None:
        """Let another process insert with plain SQL; what it drops to make room may be in flight here."""
        self.produced = number = self.produced + 1
        last = entries.last_sequence(self.foreign)
        try:
            self.foreign.execute(
                "INSERT INTO durablews_outbox (payload, priority) VALUES (?, ?)", (str(number), priority)
            )
        except sqlite3.Error:
            return  # full, or locked
        self.witness.look(foreign=True)
        if entries.last_sequence(self.foreign) > last:
            self.witness.took(number, entries.last_sequence(self.foreign))
        self._stored()
        self.go_on()

    def expire(self) -> None:
        """Let the upkeep look for what is too old."""
        self.loop.create_task(self.outbox.expire()).add_done_callback(lambda done: done.cancelled() or done.exception())
        self.go_on()

    def change_caps(self, caps: dict[str, object]) -> None:
        """Let the owner change the caps."""
        if self.locker is None:
            with transaction(self.foreign):
                entries.write_caps(self.foreign, caps)

    def revive(self) -> None:
        """Let the owner send a dead letter again, under a new sequence, as C3 wants it. No interface does it yet."""
        row = self.foreign.execute(
            "SELECT seq, refusal, bytes, payload FROM durablews_entries WHERE ack_state = 2 LIMIT 1"
        ).fetchone()
        if row is None or self.locker is not None:
            return
        seq, refusal, size, payload = row
        witness, number = self.witness, int(payload)
        if '"unknown":true' in refusal:
            witness.may_repeat.add(number)
        witness.refused.discard(number)
        witness.poison.pop(number, None)
        with transaction(self.foreign):
            self.foreign.execute(
                "UPDATE durablews_entries SET ack_state = 0, refusal = NULL, nacks = 0 WHERE seq = ?", (seq,)
            )
            self.foreign.execute(
                "UPDATE durablews_totals SET messages = messages + 1, bytes = bytes + :b,"
                " dead_messages = dead_messages - 1, dead_bytes = dead_bytes - :b",
                {"b": size},
            )
            settlement.requeue(self.foreign, seq, self.clock.wall())
        witness.look(foreign=True, revived=True)
        self._stored()
        self.go_on()

    def lock(self) -> None:
        """Let another program hold the write lock."""
        if self.locker is None:
            self.locker = self._connect()
            try:
                self.locker.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                self.unlock()

    def unlock(self) -> None:
        if self.locker is not None:
            self.locker.close()
            self.locker = None

    def back_up(self) -> None:
        """Let the owner make a backup."""
        self.backup = self.foreign.serialize(), frozenset(self.witness.names.values())

    def restore(self) -> None:
        """End the process, put the backup in the file's place, and begin another process."""
        assert self.backup is not None
        (image, known), self.backup = self.backup, None
        witness = self.witness
        passed_over = {row[0] for row in self.foreign.execute("SELECT seq FROM durablews_departed")}
        held = {int(row[0]) for row in self.foreign.execute("SELECT payload FROM durablews_entries")}
        self.witness.restored = True
        self._die()
        self.unlock()
        self.foreign.close()
        for name in ("agent.db-wal", "agent.db-shm"):
            (self.folder / name).unlink(missing_ok=True)
        with self.path.open("r+b") as file:  # the same inode: nothing but the server's memory gives it away
            file.write(image)
            file.truncate()
        self.foreign = self._connect()
        rows = self.foreign.execute("SELECT seq, payload FROM durablews_entries").fetchall()
        # What was sent after the backup went with the disk, which nobody promised; what came back may repeat.
        witness.may_repeat |= held | {int(payload) for _, payload in rows}
        witness.erased |= witness.accepted - known
        # Named in section 5 as not covered: what the erased life refused or renumbered while later ones were applied.
        witness.erased |= {int(payload) for seq, payload in rows if seq in passed_over}
        self.open()
