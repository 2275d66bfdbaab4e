"""Other processes at one outbox: many that write, those that look, one that dies with the lock, one that never ends
its transaction. ``DURABLEWS_TEST_SEED`` repeats a schedule."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import COMMAND, ENVIRONMENT, FAST, Inbox, PlainServer, until, until_true, wait_for
from support import integrity

import durablews
from durablews import housekeeping, upkeep
from durablews.database import wal_bytes
from durablews.events import LogHeld
from durablews.inspection import summarize

#: Seconds for many processes on a machine that is busy; only what hangs takes so long.
DEADLINE = 120.0
PRODUCERS, MESSAGES = 10, 60

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("DURABLEWS_TEST_SEED") or random.randrange(2**32))


async def produce(path: Path, seed: int, *, build: str = "genuine", messages: int = MESSAGES) -> dict[str, Any]:
    """Let ten processes write to an outbox, and return their report."""
    command = [sys.executable, str(Path(__file__).with_name("producers.py")), str(path), "--seed", str(seed)]
    command += ["--producers", str(PRODUCERS), "--messages", str(messages), "--build", build]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, err) == (0, b"")
    print(out.decode())  # noqa: T201 - pytest shows it on failure, and with -rP
    report: dict[str, Any] = json.loads(out)
    return report


@posix
async def test_ten_producers_beside_a_busy_agent_lose_nothing_and_see_no_lock(tmp_path: Path, seed: int) -> None:
    """P1, P2, P3, P5: ours, SQL and the command in ten processes, `inspect` in a loop, lock holders that are killed."""
    path, inbox, own, troubles = tmp_path / "agent.db", Inbox(tmp_path / "inbox.db"), 0, set[str | None]()
    async with (
        inbox.serving(),
        durablews.connect(inbox.url, path, reconnect=FAST, proxy=None, delivery={"drain_timeout": 0}) as ws,
    ):
        producing = asyncio.create_task(produce(path, seed))
        while not producing.done():
            await ws.send([-1, own])
            own += 1
            troubles.add((await ws.stats()).trouble)
        report = await producing
        assert await ws.flush(DEADLINE)
    assert report["errors"] == []
    assert troubles == {None}
    assert report["killed_holders"] > 0
    arrived: dict[int, list[int]] = {}
    for producer, number in inbox.payloads():  # and what no killed holder committed is not among them
        arrived.setdefault(producer, []).append(number)
    assert arrived == {-1: list(range(own)), **{n: list(range(MESSAGES)) for n in range(PRODUCERS)}}
    assert integrity(path) == "ok"


@posix
@pytest.mark.parametrize("build", ["waits_for_no_lock", "upgrades_its_lock"])
async def test_a_build_that_does_not_wait_for_locks_is_found(tmp_path: Path, seed: int, build: str) -> None:
    """The producers prove something: without the busy timeout, or with BEGIN for BEGIN IMMEDIATE, some see a lock."""
    async with durablews.Outbox(tmp_path / "agent.db"):
        report = await produce(tmp_path / "agent.db", seed, build=build, messages=30)
    assert any("held its write lock" in error for error in report["errors"]), report


# -- a reader that never ends


@contextmanager
def snapshot_held(path: Path) -> Iterator[None]:
    """Keep a read transaction open on a database, in another process."""
    program = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN');"
        "c.execute('SELECT count(*) FROM sqlite_schema').fetchone(); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield
        process.communicate()


def run_verb(*arguments: str, said: bytes = b"") -> bytes:
    """Run a command and return what it prints."""
    return subprocess.run(
        [*COMMAND, *arguments], input=said, stdout=subprocess.PIPE, check=True, env=ENVIRONMENT, timeout=DEADLINE
    ).stdout


def log_can_be_emptied(path: Path) -> bool:
    """Say whether nobody holds a state of this database."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0.2)) as connection:
        return not connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]


async def test_a_log_that_a_reader_holds_is_reported_and_short_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P2, P6, P8: draining goes on beside a foreign snapshot, the log's growth is told, and it goes by itself."""
    monkeypatch.setattr(housekeeping, "_SPACE_INTERVAL", 0.05)
    monkeypatch.setattr(housekeeping, "_NOTE_INTERVAL", 0.05)
    monkeypatch.setattr(upkeep, "give_back", lambda connection: False)  # a commit, which would also cut the log
    path = tmp_path / "agent.db"

    async def blocked() -> bool:
        return "log has grown" in (summarize(str(path)).link.blocked or "")

    async with (
        PlainServer() as server,
        durablews.connect(server.url, path, reconnect=FAST, proxy=None, dialect="durablews.v1.json") as ws,
    ):
        seen = ws.events()
        await ws.send("first")
        assert await ws.flush(20)
        with snapshot_held(path):
            for _ in range(10):
                await ws.send_many(["x" * 20_000] * 60)
            assert await ws.flush(60)
            assert len(server.applied) == 601
            held = await next_held(seen)
            assert held > upkeep.LARGEST_LOG
            assert "log has grown" in ((await ws.stats()).trouble or "")
            await until_true(blocked)
            shown = await asyncio.to_thread(run_verb, "inspect", str(path))
            assert b"another program keeps a transaction open" in shown
            assert wal_bytes(str(path)) >= held
        while await next_held(seen):
            pass
        assert wal_bytes(str(path)) < 1_000_000
        assert (await ws.stats()).trouble is None

        async def free() -> bool:
            return summarize(str(path)).link.blocked is None

        await until_true(free)
        assert (await ws.stats()).enqueued == 601  # no message was needed for it


async def next_held(events: Any) -> int:
    """Return what the next word about the log says."""
    async with asyncio.timeout(60):
        async for event in events:
            if isinstance(event, LogHeld):
                return event.bytes
    raise AssertionError("the client has ended")


async def test_a_build_that_leaves_the_log_alone_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above proves something: without the look at the log it stays long when the reader has ended."""
    looks = 0

    def nothing(connection: sqlite3.Connection, path: str) -> int:
        nonlocal looks
        looks += 1
        return 0

    monkeypatch.setattr(housekeeping, "_SPACE_INTERVAL", 0.05)
    monkeypatch.setattr(upkeep, "shorten_log", nothing)
    monkeypatch.setattr(upkeep, "give_back", lambda connection: False)
    path = tmp_path / "agent.db"
    async with (
        PlainServer() as server,
        durablews.connect(server.url, path, reconnect=FAST, proxy=None, dialect="durablews.v1.json") as ws,
    ):
        with snapshot_held(path):
            await ws.send_many(["x" * 20_000] * 600)
            assert await ws.flush(60)
        before = looks
        await until(lambda: looks > before + 3)
        assert wal_bytes(str(path)) > upkeep.LARGEST_LOG


@pytest.mark.parametrize("verb", ["inspect", "inspect --json", "inspect --payload", "send --lines"])
def test_our_own_verbs_hold_no_snapshot(tmp_path: Path, verb: str) -> None:
    """A verb that waits for who reads its output, or for its next line, keeps nobody from emptying the log."""
    path = tmp_path / "agent.db"
    lines = b"".join(b"line %d %s\n" % (number, b"x" * 300) for number in range(6000))
    subprocess.run(
        [*COMMAND, "send", str(path), "--lines"], input=lines, capture_output=True, check=True, env=ENVIRONMENT
    )
    name, *options = verb.split()
    options += ["--limit", "0"] if name == "inspect" else []
    with subprocess.Popen(
        [*COMMAND, name, str(path), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            if name == "inspect":
                assert process.stdout.read(1)  # it is on its way, and the pipe takes far less than it has to say
            else:
                process.stdin.write(b"the first of many\n")
                process.stdin.flush()
                wait_for(lambda: summarize(str(path)).pending == 6001, DEADLINE)
            # It may be in the middle of a look, and those end by themselves.
            wait_for(lambda: log_can_be_emptied(path), DEADLINE)
            assert process.poll() is None, "the harness: it did not wait"
        finally:
            process.kill()
    with snapshot_held(path):
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("INSERT INTO durablews_outbox (payload) VALUES ('1')")
            connection.commit()
        assert not log_can_be_emptied(path), "the harness: it does not see a snapshot that is held"
