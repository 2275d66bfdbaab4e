"""Power loss, for real: a kernel's own file system loses what it had not written, and the outbox does not.

An ext4 in a file is shut down under a busy agent without writing its journal out (EXT4_IOC_SHUTDOWN), the agent is
killed, the file system mounted again: everything that was promised before the cut is there. Only root can do that.
``DURABLEWS_TEST_CUTS`` says how many cuts each file system takes, ``DURABLEWS_TEST_SEED`` repeats their moments.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from powerloss_life import AGENT, FAST, SERVER, TAGS, Sender, is_refused, serving, tag_of
from support import answer, fork, integrity

import durablews

SEED = os.environ.get("DURABLEWS_TEST_SEED") or str(random.randrange(2**32))
CUTS = int(os.environ.get("DURABLEWS_TEST_CUTS", "55"))

#: Linux' EXT4_IOC_SHUTDOWN, and its EXT4_GOING_FLAGS_NOLOGFLUSH: the journal is not written out either.
_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, struct.pack("I", 2)
#: The largest file system of the two: a 4 KiB block journal alone takes 4 MiB.
_SIZE = 48 * 1024 * 1024
#: Nobody listens at the port of discard.
NOWHERE = "ws://127.0.0.1:9/"


#: Cuts after which an agent starts with a new outbox, which is cut for the first time while it is hardly there.
CUTS_OF_AN_OUTBOX = 11


class Medium:
    """An ext4 in a file, mounted while it has power."""

    def __init__(self, folder: Path, block_size: int) -> None:
        self.image, self.mount = folder / "medium", folder / "mounted"
        self.mount.mkdir()
        with self.image.open("wb") as file:
            file.truncate(_SIZE)
        run("mkfs.ext4", "-q", "-F", "-b", str(block_size), str(self.image))

    def power_on(self) -> None:
        run("mount", "-o", "loop", str(self.image), str(self.mount))

    def cut(self) -> None:
        """From here on nothing reaches the medium."""
        folder = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(folder)

    def power_off(self) -> None:
        run("umount", str(self.mount))


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.fixture(name="medium", params=[4096, 1024], ids=["4 KiB blocks", "1 KiB blocks"])
def medium_fixture(request: pytest.FixtureRequest) -> Iterator[Medium]:
    """A medium with power; skipped where none can be made, except in CI, which must be able to."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        try:
            if not sys.platform.startswith("linux") or os.geteuid() != 0:
                raise OSError("only Linux' root can mount a file system")
            medium = Medium(Path(folder), request.param)
            medium.power_on()
        except (OSError, subprocess.CalledProcessError) as exc:
            said = f"no file system to cut off (apt install e2fsprogs mount): {getattr(exc, 'stderr', '')} {exc}"
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(said)
        try:
            yield medium
        finally:
            with suppress(subprocess.CalledProcessError):  # the test failed while the power was off
                medium.power_off()


class Agent:
    """A process that sends, and drains where there is a server, until the power goes; and what it was promised."""

    def __init__(self, folder: Path, *, durability: str = "power") -> None:
        self.folder, self.durability = folder, durability
        self.server = folder / SERVER
        self.outbox = Path()
        self.begun: set[int] = set()
        self.sent: set[int] = set()
        self.acked: set[int] = set()
        self.refused: set[int] = set()
        self.lives = 0

    def live(self, medium: Medium, chance: random.Random, promises: int, *, online: bool) -> None:
        """Live until so many messages were stored, and then for some moments more, and the power goes."""
        reader, writer = os.pipe()
        child = fork(lambda: asyncio.run(self._live(writer, chance, online)))
        self.lives += 1
        os.close(writer)
        with os.fdopen(reader, "rb") as marks:
            heard = 0
            while heard < promises:
                line = marks.readline()
                assert line, f"the agent ended: {answer(child)}"
                heard += self.note(line)
            time.sleep(chance.random() * (0.004 if promises else 0.04))  # anywhere in a commit, or in an opening
            os.set_blocking(reader, False)
            # Only what was said before the cut was promised. What is said later may be true as well.
            while line := marks.readline():
                self.note(line)
            # Stopped first: where there is no power nobody goes on, and sends what a failing sync only seemed to store.
            os.kill(child[0], signal.SIGSTOP)
            medium.cut()
            os.kill(child[0], signal.SIGKILL)
            answer(child)
            os.set_blocking(reader, True)
            for line in marks:
                if line.endswith(b"\n") and json.loads(line)[0] == "begun":
                    self.note(line)

    def note(self, line: bytes) -> bool:
        """Remember what was promised; say whether a message was stored."""
        what, *facts = json.loads(line)
        known = {"begun": self.begun, "sent": self.sent, "acked": self.acked, "refused": self.refused}
        if what in known:
            known[what].add(facts[0])
        return bool(what == "sent")

    async def _live(self, writer: int, chance: random.Random, online: bool) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what it says of the disk once that is gone is of no interest

        def mark(*facts: object) -> None:
            os.write(writer, json.dumps(facts).encode() + b"\n")

        sender = Sender(mark, self.lives * TAGS, chance)
        async with serving(self.server, lambda *facts: None) as url:
            settings: Any = {"durability": self.durability, "reconnect": FAST, "proxy": None}
            async with durablews.connect(url if online else NOWHERE, self.outbox, **settings) as ws:
                while True:
                    await sender.burst(ws, 2)
                    sender.watch()

    def broken_promises(self) -> Counter[str]:
        """Return what is wrong with the outbox as the medium kept it, by looking at a copy."""
        wrong = Counter[str]()
        there: dict[int, int] = {}
        if self.outbox.exists():
            for name in (self.outbox.name, f"{self.outbox.name}-wal"):
                (self.folder / name).unlink(missing_ok=True)
                if self.outbox.with_name(name).exists():
                    shutil.copy(self.outbox.with_name(name), self.folder)
            copy = self.folder / self.outbox.name
            wrong["corrupt"] += integrity(copy) != "ok"
            with closing(sqlite3.connect(copy)) as connection:
                rows = connection.execute("SELECT payload, ack_state FROM durablews_entries").fetchall()
            there = {tag_of(payload): ack_state for payload, ack_state in rows}
            wrong["corrupt"] += len(there) < len(rows)
        delivered = {tag for _, tag in self.delivered()}
        dead = {tag for tag, ack_state in there.items() if ack_state == 2}
        wrong["lost"] += len(self.sent - there.keys() - delivered) + len(self.refused - dead)
        wrong["resurrected"] += len(self.acked & there.keys())
        wrong["never sent"] += len((there.keys() | delivered) - self.begun)
        return +wrong

    def delivered(self) -> list[tuple[int, int]]:
        """Return sequence and tag of what the server has, in its order."""
        with closing(sqlite3.connect(self.server)) as connection:
            if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'kept'").fetchone():
                return []  # cut before it began
            return list(connection.execute("SELECT seq, tag FROM kept ORDER BY id"))

    def start_anew(self, outbox: Path) -> None:
        """Go on with a new outbox, which was promised nothing, and a new server."""
        self.outbox, self.server = outbox, self.folder / f"{outbox.name}-server"
        for promised in (self.begun, self.sent, self.acked, self.refused):
            promised.clear()

    async def finish(self) -> None:
        """Deliver what is left."""
        async with (
            serving(self.server, lambda *facts: None) as url,
            durablews.connect(url, self.outbox, reconnect=FAST, proxy=None) as ws,
        ):
            assert await ws.flush(60)


def test_nothing_is_lost_when_the_power_goes(medium: Medium) -> None:
    """P1, P2, P5: cut after cut, under open, recovery, sends and acks: everything stored arrives, and arrives once."""
    print(f"seed {SEED}")  # noqa: T201 - pytest -rP shows it
    chance, agent = random.Random(SEED), Agent(medium.image.parent)
    promised = 0
    for cut in range(CUTS):
        first = cut % CUTS_OF_AN_OUTBOX == 0
        if first:
            agent.start_anew(medium.mount / f"{cut}-{AGENT}")
        agent.live(medium, chance, chance.randrange(3 if first else 25), online=chance.random() < 0.7)
        medium.power_off()
        medium.power_on()
        assert not agent.broken_promises(), f"seed {SEED}, cut {cut}: {agent.broken_promises()}"
        if (cut + 1) % CUTS_OF_AN_OUTBOX == 0:
            asyncio.run(agent.finish())
            delivered = Counter(tag for _, tag in agent.delivered())
            assert max(delivered.values()) == 1, f"seed {SEED}, cut {cut}: {delivered.most_common(3)}"
            assert {tag for tag in agent.sent if not is_refused(tag)} <= delivered.keys(), f"seed {SEED}, cut {cut}"
            promised += len(agent.sent)
    print(f"{CUTS} cuts, {promised} messages, 0 lost")  # noqa: T201


def test_process_durability_is_found_to_lose(medium: Medium) -> None:
    """The harness proves itself: with durability="process" the same cuts lose what was stored, and damage nothing."""
    chance, agent = random.Random(SEED), Agent(medium.image.parent, durability="process")
    wrong = Counter[str]()
    for cut in range(8):
        agent.start_anew(medium.mount / f"{cut}-{AGENT}")
        agent.live(medium, chance, 30, online=False)
        medium.power_off()
        medium.power_on()
        wrong += agent.broken_promises()
    assert set(wrong) == {"lost"}, f"seed {SEED}: {wrong}"
