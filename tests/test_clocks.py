"""Clocks that lie: a boot in 1970 and then NTP, ten years forward and back, sleep, reboots without a battery.

No message expires before its age, none lives for ever, and no loop stops. First with a clock that the test owns, on the
outbox as its drainer has it; then with the real agent under libfaketime, which moves the clock of the wall while it
runs, and in a time namespace, where the machine has slept.

``DURABLEWS_TEST_SEED`` repeats a run, ``DURABLEWS_TEST_HISTORIES`` makes it longer: 30 unless it is set.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import COMMAND, ENVIRONMENT, PlainServer, Process, running, until
from support import FakeClock

from durablews import draining
from durablews.draining import DrainedOutbox
from durablews.outbox import Counts

SEED = int(os.environ.get("DURABLEWS_TEST_SEED", random.randrange(1, 2**31)))
HISTORIES = int(os.environ.get("DURABLEWS_TEST_HISTORIES", "30"))
DEADLINE = 60.0
SECOND, MINUTE, YEAR = 1000, 60_000, 31_557_600_000
#: ms between two looks at age, as the housekeeping has it.
LOOK = SECOND


class Machine:
    """A machine with an agent on it, and its own books of how long each message has waited while it was on."""

    def __init__(self, path: Path, dice: random.Random, *, ttl: int | None, max_age: int | None) -> None:
        self.path, self.dice = path, dice
        self.ttl = ttl
        self.age = ttl or max_age or 0
        self.caps = {} if max_age is None else {"max_age": max_age / SECOND}
        self.clock = FakeClock(wall=dice.choice((5 * SECOND, 56 * YEAR)), boot=SECOND)
        self.outbox: DrainedOutbox
        #: For each message: ms for which the machine was on since, and how many of them may have been forgotten.
        self.lived: dict[int, int] = {}
        self.forgotten: dict[int, int] = {}
        self._booted = 0

    async def start(self) -> None:
        self.outbox = DrainedOutbox(self.path, clock=self.clock, caps=self.caps)
        await self.outbox.open()

    async def send(self) -> None:
        (receipt,) = await self.outbox.send_many([1], ttl=None if self.ttl is None else self.ttl / SECOND)
        assert receipt.seq is not None
        self.lived[receipt.seq] = self.forgotten[receipt.seq] = 0

    async def pass_time(self, milliseconds: int, *, asleep: bool = False) -> None:
        """Let the agent look at age as its housekeeping does; while the machine sleeps nobody looks."""
        steps = [milliseconds] if asleep or milliseconds > 300 * LOOK else [LOOK] * (milliseconds // LOOK)
        for step in steps:
            (self.clock.suspend if asleep else self.clock.advance)(step)
            self._booted += step
            for seq in self.lived:
                self.lived[seq] += step
            await self.look()

    async def look(self) -> Counts:
        counts = await self.outbox.expire()
        left = await self.outbox.storage.read(
            lambda connection: {seq for (seq,) in connection.execute("SELECT seq FROM durablews_entries")}
        )
        for seq in set(self.lived) - left:
            lived = self.lived.pop(seq)
            assert lived >= self.age, f"expired after {lived} of {self.age} ms"
        for seq in left:
            over = self.lived[seq] - self.forgotten[seq] - self.age
            assert over <= 2 * LOOK, f"lives {over} ms too long"
        return counts

    async def stop(self, *, crash: bool) -> None:
        if crash:
            await self.outbox.storage.close()
            self.outbox._ownership.release()
        else:
            await self.outbox.leave()
            await self.outbox.close()

    async def reboot(self, *, crash: bool) -> None:
        """Switch it off for a while; without a battery it comes up in 1970. A crash may forget a little."""
        await self.stop(crash=crash)
        if crash:
            for seq in self.lived:
                self.forgotten[seq] += min(MINUTE, (self._booted + SECOND) // 2) + 2 * LOOK
        self.clock.reboot(off=self.dice.choice((0, MINUTE, 20 * YEAR)), wall=self.dice.choice((None, 0, 56 * YEAR)))
        self._booted = 0
        await self.start()


async def history(folder: Path, number: object) -> None:
    """Whatever the clocks do."""
    dice = random.Random(f"{SEED}-{number}")
    age = dice.choice((30, 90, 600)) * SECOND
    machine = (
        Machine(folder / f"{number}.db", dice, ttl=age, max_age=None)
        if dice.random() < 0.5
        else Machine(folder / f"{number}.db", dice, ttl=None, max_age=age)
    )
    await machine.start()
    try:
        for _ in range(dice.randrange(4, 12)):
            for _ in range(dice.randrange(0, 3)):
                await machine.send()
            what = dice.randrange(7)
            if what == 0:
                machine.clock.jump(dice.choice((56, 10, -10)) * YEAR)
                await machine.look()
            elif what == 1:
                await machine.pass_time(dice.choice((MINUTE, age, YEAR)), asleep=True)
            elif what in (2, 3):
                await machine.reboot(crash=what == 2)
            elif what == 4:
                await machine.stop(crash=dice.random() < 0.5)
                await machine.start()
            else:
                await machine.pass_time(dice.choice((5, 20, 50)) * SECOND)
    except AssertionError as exc:
        raise AssertionError(f"{exc} (seed {SEED}, history {number})") from exc
    finally:
        await machine.stop(crash=False)


async def test_whatever_the_clocks_do_a_message_has_its_age(tmp_path: Path) -> None:
    """P2: jumps, sleep, restarts and reboots of every kind: nothing expires early, and nothing outlives its age."""
    print(f"seed {SEED}, {HISTORIES} histories")  # noqa: T201
    await histories(tmp_path, HISTORIES)


async def power_cycles(folder: Path) -> None:
    """Cut a machine's power every 40 seconds while a message waits whose age is a minute."""
    machine = Machine(folder / "agent.db", random.Random(SEED), ttl=MINUTE, max_age=None)
    await machine.start()
    try:
        await machine.send()
        for _ in range(4):
            await machine.pass_time(40 * SECOND)
            await machine.reboot(crash=True)
        counts = await machine.look()
        assert counts.expired + counts.expired_unanswered == 1, "it lives for ever"
    finally:
        await machine.stop(crash=False)


async def test_a_machine_that_is_never_on_for_long_forgets_half_at_most(tmp_path: Path) -> None:
    """P2: where power goes before the clock's minute is over, that minute comes all the same, after two or three."""
    await power_cycles(tmp_path)


class _ByTheWall(FakeClock):
    """A clock that takes the wall's for the one that counts age, as naive outboxes do."""

    def boot(self) -> int:
        return self.wall()


async def test_a_clock_that_is_believed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is proven: age by the wall clock expires what is fresh."""
    monkeypatch.setattr(sys.modules[__name__], "FakeClock", _ByTheWall)
    with pytest.raises(AssertionError, match="expired after"):
        await histories(tmp_path, 300)


async def test_a_clock_that_is_not_kept_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is proven: what is written down once a minute only lets a message live for ever."""
    monkeypatch.setattr(draining, "_save_every", lambda boot: MINUTE)
    with pytest.raises(AssertionError, match=r"too long|for ever"):
        await power_cycles(tmp_path)


async def histories(folder: Path, count: int) -> None:
    for number in range(count):
        await history(folder, number)


# -- the real agent, and the real clocks


@pytest.fixture(scope="module")
def faketime() -> str:
    """The library; skipped where it is missing, except in CI, which must have it and may install it."""
    for attempt in range(2):
        for folder in Path("/usr/lib").glob("*/faketime"):
            if (folder / "libfaketime.so.1").exists():
                return str(folder / "libfaketime.so.1")
        if attempt == 0 and os.environ.get("CI") == "true" and shutil.which("apt-get"):
            subprocess.run(["apt-get", "install", "-y", "libfaketime"], check=False, capture_output=True)
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("libfaketime is missing (apt install libfaketime)")


class Wall:
    """The wall clock of some processes, moved while they run; all other clocks are the machine's."""

    def __init__(self, folder: Path, library: str) -> None:
        self._file = folder / "wall"
        self.environment = {
            "LD_PRELOAD": library,
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            # Else a step back would stop the clock that loops wait by, which no real step of a clock does.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "TZ": "UTC",
        }

    def set(self, moment: str) -> None:
        made = self._file.with_suffix(".new")
        made.write_text(f"@{moment}\n")
        made.replace(self._file)


def send(outbox: Path, count: int, *options: str, **environment: str) -> None:
    command = [*COMMAND, "send", str(outbox), "--lines", *options]
    lines = "".join(f"{number}\n" for number in range(count)).encode()
    subprocess.run(
        command, input=lines, check=True, capture_output=True, env={**ENVIRONMENT, **environment}, timeout=60
    )


def inspect(outbox: Path, **environment: str) -> dict[str, Any]:
    command = [*COMMAND, "inspect", str(outbox), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, env={**ENVIRONMENT, **environment}, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def agent(folder: Path, url: str, environment: dict[str, str], *prefix: str) -> Iterator[Process]:
    (folder / "agent.toml").write_text(
        f'url = "{url}"\noutbox = "{folder / "agent.db"}"\n[reconnect]\nbase_delay = 0.1\nmax_delay = 0.3\n'
    )
    with running(folder, "agent", [*prefix, *COMMAND, "run", str(folder / "agent.toml")], **environment) as process:
        yield process


async def through_the_ages(folder: Path, library: str, **more: str) -> None:
    """Boot in 1970, hear from NTP, jump ten years forward and twenty back; then let a server come."""
    wall, path = Wall(folder, library), folder / "agent.db"
    environment = {**wall.environment, **more}
    wall.set("1970-01-01 00:00:07")
    server = PlainServer()
    async with server:
        url = server.url
    send(path, 20, "--ttl", "1h", **environment)
    with agent(folder, url, environment) as process:
        for moment in ("2026-11-24 12:00:00", "2036-11-24 12:00:00", "2016-11-24 12:00:00", "2026-11-24 12:00:00"):
            wall.set(moment)
            # Its age shows that the agent's loops go on: it is over in a second, whatever the wall says.
            send(path, 1, "--ttl", "500ms", **environment)
            await until(lambda: inspect(path, **environment)["pending"] <= 20, DEADLINE)
            found = inspect(path, **environment)
            assert found["pending"] == 20, f"expired early: {found['departed']}"
            assert process.running, process.err.read_text()
        async with server:
            await until(lambda: len(server.payloads) == 20, DEADLINE)
            wall.set("1999-12-31 23:59:59")
            send(path, 5, "--ttl", "1h", **environment)
            await until(lambda: len(server.payloads) == 25, DEADLINE)
    assert inspect(path)["departed"]["expired"] == 4


async def test_the_agent_does_not_believe_the_wall_clock(tmp_path: Path, faketime: str) -> None:
    """P2, P8: from 1970 to 2026, ten years on and twenty back: what is fresh stays, what is due goes, all arrives."""
    await through_the_ages(tmp_path, faketime)


async def test_an_agent_that_believes_it_is_found(tmp_path: Path, faketime: str) -> None:
    """The harness is proven: with age by the wall clock the first news from NTP costs all messages."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "from durablews.clock import SystemClock\nSystemClock.boot = SystemClock.wall\n"
    )
    with pytest.raises(AssertionError, match="expired early"):
        await through_the_ages(tmp_path, faketime, PYTHONPATH=f"{broken}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}")


async def test_time_asleep_counts(tmp_path: Path) -> None:
    """P2: after two hours of sleep (CLOCK_BOOTTIME, here of a time namespace) an hour is over and three are not."""
    slept = ("unshare", "--time", "--boottime", "7200")
    if not sys.platform.startswith("linux") or subprocess.run([*slept, "true"], capture_output=True).returncode:  # noqa: ASYNC221
        reason = "no time namespace can be made here"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    path = tmp_path / "agent.db"
    server = PlainServer()
    async with server:
        url = server.url
    send(path, 3, "--ttl", "1h")
    send(path, 4, "--ttl", "3h")
    with agent(tmp_path, url, {}, *slept) as process:
        await until(lambda: inspect(path)["departed"]["expired"] == 3, DEADLINE)
        async with server:
            await until(lambda: len(server.payloads) == 4, DEADLINE)
        assert process.running
    assert inspect(path)["departed"]["expired"] == 3
