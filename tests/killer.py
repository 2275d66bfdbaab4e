"""Kills an agent and a receiver at random moments, hundreds of times, and judges what has arrived (P1 to P5, P9).

    python tests/killer.py [--kills N] [--seed S] [--build NAME] [--folder F]

prints one line of JSON: what was killed during what, and what is wrong. This process imports everything, opens nothing
and forks the two, which costs 5 ms where a new interpreter would cost 400. The oracle is what the agents promised
through a pipe, and the table that the receiver keeps in its own database.

A fight is one outbox and one store through some kills: the outbox begins as a file that is not there, and each agent
that has opened it is followed by one that knows one migration more. At the end everything is drained and counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import select
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from broken_builds import BUILDS
from victims import DRAINING, PRIORITIES, REAL_SCHEMA, Voice, agent, receiver

__all__ = ["EVERY_PHASE", "Report", "run"]

#: Kills of one fight, and of one in which something is to be found.
_FIGHT, _SHORT_FIGHT = 30, 15
#: Seconds after which what should happen counts as never happening.
_PATIENCE = 60.0
#: At each opening the sequence is raised by up to 2^32: a smaller step than this is none (one in forty million).
_LEAST_RAISE = 100
_EARLY_PHASES = ("recovering", "opening", "migrating")
#: In each of these somebody has to be killed at least once.
EVERY_PHASE = frozenset(f"agent {phase}" for phase in ("starting", *_EARLY_PHASES, "running", "vacuuming")) | {
    "receiver recovering",
    "receiver running",
}


@dataclass
class Report:
    """What a run did and found."""

    seed: int
    build: str
    kills: int = 0
    #: Kills by who, and by what was under way.
    during: Counter[str] = field(default_factory=Counter)
    promised: int = 0
    arrived: int = 0
    redelivered: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)


class Child:
    """A forked process and what it has said."""

    def __init__(self, who: str, life: int, role: str, job: Callable[[Voice], None], close: list[int]) -> None:
        self.who, self.life, self.role = who, life, role
        self.phase, self.seen = "starting", {"starting"}
        self.empty = self.opened = False
        self.attempts: dict[int, int] = {}
        self.promises: list[tuple[int, int, int]] = []  # priority, number, sequence
        self.failure: str | None = None
        self._rest = b""
        self.pipe, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for descriptor in [self.pipe, *close]:
                    os.close(descriptor)
                voice = Voice(writer)
                try:
                    job(voice)
                except BaseException as exc:
                    voice.say("x", f"{type(exc).__name__}: {exc}"[:400].replace("\n", " "))
            finally:
                os._exit(0)
        os.close(writer)

    def listen(self) -> bool:
        """Take in what the pipe holds; False at its end."""
        data = os.read(self.pipe, 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._hear(line.decode())
        return bool(data)

    def _hear(self, line: str) -> None:
        kind, _, rest = line.partition(" ")
        if kind == "p":
            self.phase = rest
            self.seen.add(rest)
            self.opened = self.opened or rest == "running"
        elif kind == "a":
            priority, first, count = map(int, rest.split())
            self.attempts[priority] = first + count
        elif kind == "c":
            priority, first, count, seq = map(int, rest.split())
            self.promises += [(priority, first + i, seq + i) for i in range(count)]
        elif kind == "e":
            self.empty = True
        else:
            self.failure = rest

    def end(self, number: int = 0) -> None:
        """Kill it, if `number` says so, and hear its last words."""
        if number:
            os.kill(self.pid, number)
        while self.listen():
            pass
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        if self.failure is None and os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
            self.failure = f"ended by signal {os.WTERMSIG(status)}"


class Fight:
    """One outbox, one store, many lives."""

    def __init__(self, folder: Path, report: Report, chance: random.Random) -> None:
        self.outbox, self.store = folder / "agent.db", folder / "store.db"
        self.report, self.chance = report, chance
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"ws://127.0.0.1:{self.listening.getsockname()[1]}/"
        self.newest = 1
        self.agents: list[Child] = []
        self.agent: Child | None = None
        self.receiver: Child | None = None
        self.receivers = 0

    def run(self, kills: int) -> None:
        alone = False
        for _ in range(kills):
            # Without a receiver now and then: a backlog, to be drained next, and space to give back once it has gone.
            role = "drain" if alone else self.chance.choices(("send", "drain"), (3, 1))[0]
            alone = role == "send" and self.chance.random() < 0.4
            self._start(role, alone=alone)
            self._kill(self.chance.choices(("agent", "receiver", "both"), (6, 3, 1))[0])
        if self.agent is not None:
            self._end("agent")
        self._start("last")
        assert self.agent is not None
        self._wait(_PATIENCE, lambda: self.agent is None)
        if self.agent is not None:
            self.report.findings.append(f"not everything was acknowledged in {_PATIENCE:g} s")
            self._end("agent")
        self._end("receiver")
        self.listening.close()
        self.report.findings += self._judge()

    def _start(self, role: str, *, alone: bool = False) -> None:
        """Fork who is not there; the receiver may wait when the agent is to be alone."""
        others = [child.pipe for child in (self.agent, self.receiver) if child is not None]
        if self.receiver is None and not alone:
            self.receivers += 1
            life = self.receivers
            self.receiver = Child(
                "receiver",
                life,
                "",
                lambda voice: receiver(self.store, self.listening, voice, life=life),
                others,
            )
            others.append(self.receiver.pipe)
        if self.agent is None:
            number, newest = len(self.agents) + 1, self.newest

            def live(voice: Voice) -> None:
                agent(self.outbox, self.url, voice, life=number, role=role, newest=newest, seed=self.report.seed)

            self.agent = Child("agent", number, role, live, [*others, self.listening.fileno()])
            self.agents.append(self.agent)

    def _kill(self, whom: str) -> None:
        """Wait for a moment, then kill."""
        assert self.agent is not None
        phase = self._moment() if whom != "receiver" else None
        if phase is None:
            if self.chance.random() < 0.7:  # most of the work is done by who runs
                self._wait(0.5, lambda: self.agent is None or self.agent.opened)
            # As many moments in the first milliseconds, in which much happens, as in the long rest.
            self._wait(10 ** self.chance.uniform(-3, -0.6))
        else:
            self._wait(0.3, lambda: self.agent is None or phase in self.agent.seen)
            self._wait(self.chance.random() * 0.002)
        for who in ("agent", "receiver") if whom == "both" else (whom,):
            self._end(who, signal.SIGKILL)

    def _moment(self) -> str | None:
        """Choose what the agent is to be killed in; None for any moment."""
        assert self.agent is not None
        if self.agent.role == "drain" and self.receiver is not None:
            return self.chance.choice(("vacuuming", None))
        return self.chance.choice((*_EARLY_PHASES, None, None, None)) if not self.agent.opened else None

    def _end(self, who: str, number: int = signal.SIGKILL) -> None:
        child = self.agent if who == "agent" else self.receiver
        if child is None:  # it has ended by itself, and that is in the report
            return
        child.end(number)
        self.report.kills += 1
        self.report.during[f"{who} {child.phase}"] += 1
        self._gone(child)

    def _gone(self, child: Child) -> None:
        if child is self.agent:
            self.agent = None
            if child.opened and child.role != "last":
                self.newest += 1
        else:
            self.receiver = None
        if child.failure is not None:
            self.report.findings.append(f"the {child.who} ended by itself: {child.failure}")

    def _wait(self, seconds: float, condition: Callable[[], bool] = lambda: False) -> None:
        """Listen to both for so long, or until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition() and (left := deadline - time.monotonic()) > 0:
            children = {child.pipe: child for child in (self.agent, self.receiver) if child is not None}
            for pipe in select.select(list(children), [], [], left)[0]:
                if not children[pipe].listen():
                    children[pipe].end()
                    self._gone(children[pipe])

    # -- what arrived

    def _judge(self) -> list[str]:
        with closing(sqlite3.connect(self.store)) as connection:
            rows = connection.execute(
                "SELECT link, role, stream, priority, seq, json_extract(payload, '$[0]'), json_extract(payload, '$[1]')"
                " FROM arrived ORDER BY id"
            ).fetchall()
            integrity = connection.execute("PRAGMA integrity_check").fetchone()[0]
        self.report.arrived += len(rows)
        self.report.promised += sum(len(child.promises) for child in self.agents)
        found = [] if integrity == "ok" else [f"the store: {integrity}"]
        found += _missing(self.agents, [(row[3], row[5], row[6]) for row in rows])
        for priority in PRIORITIES:
            found += _disorder(f"priority {priority}", [(*row[5:7], row[4]) for row in rows if row[3] == priority])
        for link in dict.fromkeys(row[0] for row in rows if row[1] in DRAINING):
            found += _disorder(f"link {link}", [(-row[3], row[4]) for row in rows if row[0] == link])
        if len({row[2] for row in rows}) > 1:
            found.append("the stream changed")
        return [*found, *_sequences(self.agents), *self._judge_outbox(len(rows))]

    def _judge_outbox(self, arrived: int) -> Iterator[str]:
        with closing(sqlite3.connect(self.outbox)) as connection:
            (integrity,) = connection.execute("PRAGMA integrity_check").fetchone()
            counts = dict(
                zip(
                    ("waiting", "dead", "enqueued", "acked"),
                    connection.execute(
                        "SELECT messages, dead_messages, enqueued, acked FROM durablews_totals"
                    ).fetchone(),
                    strict=True,
                )
            )
            (redelivered,) = connection.execute("SELECT redelivered FROM durablews_totals").fetchone()
            (present,) = connection.execute("SELECT schema FROM durablews_meta").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            steps = [
                name
                for (name,) in connection.execute(
                    "SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE 'durablews_step_%'"
                )
            ]
        self.report.redelivered += redelivered
        if integrity != "ok":
            yield f"the outbox: {integrity}"
        if counts != (expected := {"waiting": 0, "dead": 0, "enqueued": arrived, "acked": arrived}):
            yield f"counts: {counts} instead of {expected}"
        if present != version or steps != ([f"durablews_step_{present}"] if present > REAL_SCHEMA else []):
            yield f"migration: schema {present}, user_version {version}, tables {steps}"


def _missing(agents: list[Child], arrived: list[tuple[int, int, int]]) -> Iterator[str]:
    """Compare what arrived (priority, life, number) with what was promised and what was attempted."""
    times = Counter(arrived)
    promised = {(priority, child.life, number) for child in agents for priority, number, _ in child.promises}
    attempts = {(priority, child.life): count for child in agents for priority, count in child.attempts.items()}
    for what, which in (
        ("lost", promised - times.keys()),
        ("twice", {message for message, count in times.items() if count > 1}),
        ("never sent", {message for message in times if message[2] >= attempts.get(message[:2], 0)}),
    ):
        if which:
            yield f"{what}: {len(which)} of {len(promised)}, such as {sorted(which)[:3]}"


def _disorder(where: str, keys: list[tuple[int, ...]]) -> Iterator[str]:
    wrong = [(before, after) for before, after in pairwise(keys) if before > after]
    if wrong:
        yield f"out of order in {where}: {len(wrong)} times, such as {wrong[0]}"


def _sequences(agents: list[Child]) -> Iterator[str]:
    """Each life numbers above all that the lives before it gave out, by a random raise (P4)."""
    highest = 0
    for child in agents:
        numbers = [seq for _, _, seq in child.promises]
        if not numbers:
            continue
        if min(numbers) <= highest:
            yield f"sequence given out again: {min(numbers)} in life {child.life}, {highest} before it"
        elif highest and min(numbers) - highest < _LEAST_RAISE:
            yield f"sequence not raised: {min(numbers)} in life {child.life}, {highest} before it"
        highest = max(highest, *numbers)


def run(folder: Path, *, seed: int, kills: int, build: str = "genuine") -> Report:
    """Fight until there were so many kills, some in every phase, or something was found."""
    report, chance, started = Report(seed, build), random.Random(seed), time.monotonic()
    BUILDS[build]()
    gc.freeze()  # what is shared with the children stays shared
    number, length = 0, _FIGHT if build == "genuine" else _SHORT_FIGHT
    while not report.findings and (
        report.kills < kills or (report.kills < 2 * kills and not EVERY_PHASE <= set(report.during))
    ):
        number += 1
        place = folder / str(number)
        place.mkdir()
        Fight(place, report, chance).run(min(length, max(5, kills - report.kills)))
    report.seconds = round(time.monotonic() - started, 1)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--build", choices=BUILDS, default="genuine")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = run(args.folder or Path(name), seed=args.seed, kills=args.kills, build=args.build)
    print(json.dumps(vars(report)))  # noqa: T201
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
