"""The promise against SIGKILL: real processes, a real file, both ends killed while messages are unanswered (P1 to P5).

``DURABLEWS_TEST_LINES`` says how many lines go through the kills; 20 000 unless it is set.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from servers import COMMAND, ENVIRONMENT, Process, inbox_rows, running, wait_for

LINES = int(os.environ.get("DURABLEWS_TEST_LINES", "20000"))
KILLS = 10
#: Seconds that the delivery of everything takes at the rate limit, kills not counted.
SPAN = 10.0
#: A thousand lines a second more than that would be too slow on a small machine: seconds for all of it.
DEADLINE = 60.0 + LINES / 1000


def lines(count: int) -> list[bytes]:
    """Make lines of every kind: empty, long, not ASCII, not UTF-8, with carriage returns, JSON and nearly JSON."""
    kinds = [
        b"",
        "süß \u2028 \U0001f600 %d".encode(),
        b'{"celsius": %d}',
        b"\xff\xfe %d",
        b"carriage %d\r",
        b'"half of a text %d',
        b"\x00 %d \x1b",
        b"plain %d",
    ]
    made = [kind % i if b"%d" in kind else kind for i in range(count) for kind in [kinds[i % len(kinds)]]]
    for i in range(500, count, 5000):
        made[i] = b"%d " % i + b"x" * 100_000
    return made


def send_lines(folder: Path, made: list[bytes]) -> Path:
    """Store the lines with `durablews send --lines`, while no server runs; return the outbox."""
    source, outbox = folder / "lines.txt", folder / "agent.db"
    source.write_bytes(b"".join(line + b"\n" for line in made))
    with source.open("rb") as stdin:
        command = [*COMMAND, "send", str(outbox), "--lines"]
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, env=ENVIRONMENT, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, f"{len(made):,} messages stored\n")
    return outbox


def inspect(outbox: Path) -> dict[str, Any]:
    done = subprocess.run(
        [*COMMAND, "inspect", str(outbox), "--json", "--limit", "0"], capture_output=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def messages(made: list[bytes]) -> Iterator[str | bytes]:
    """Return what each line is as a message: text, or bytes where it is not UTF-8."""
    for line in made:
        try:
            yield line.decode()
        except UnicodeDecodeError:
            yield line


def assert_delivered(store: Path, made: list[bytes]) -> None:
    """Check that the inbox has exactly these lines in this order: nothing missing, nothing twice."""
    rows = inbox_rows(store)
    assert len(rows) == len(made)
    assert all(before[1] < after[1] for before, after in pairwise(rows))
    for row, message in zip(rows, messages(made), strict=True):
        assert row[2] == message if isinstance(message, bytes) else json.loads(row[2]) == message


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_every_line_of_a_pipe_is_a_message_and_arrives(tmp_path: Path) -> None:
    """P2, P3: `send --lines` without a server, then serve and `run --until-empty`: exactly those lines, in order."""
    made = lines(10_000)
    outbox = send_lines(tmp_path, made)
    before = inspect(outbox)
    assert (before["pending"], before["enqueued"]) == (10_000, 10_000)
    store = tmp_path / "inbox.db"
    with running(tmp_path, "serve", [*COMMAND, "serve", "--port", "0", "--store", str(store)]) as serve:
        url = serve.first_line()
        command = [*COMMAND, "run", "--url", url, "--outbox", str(outbox), "--until-empty"]
        with running(tmp_path, "run", command) as run:
            assert run.end(timeout=DEADLINE)[0] == 0, run.err.read_text()
    after = inspect(outbox)
    assert (after["pending"], after["dead"], after["departed"]["acked"]) == (0, 0, 10_000)
    assert_delivered(store, made)


class Fight:
    """An agent and a server, each killed and started again, while the agent drains at a limited rate."""

    def __init__(self, folder: Path, outbox: Path, count: int) -> None:
        self.folder, self.outbox, self.count = folder, outbox, count
        self.store = folder / "inbox.db"
        self.port = free_port()
        self.config = folder / "agent.toml"
        self.config.write_text(
            f'url = "ws://127.0.0.1:{self.port}/"\noutbox = "{outbox}"\nproxy = "none"\n'
            "[reconnect]\nbase_delay = 0.02\nmax_delay = 0.05\n"
            f"[delivery]\nrate_limit = {count / SPAN}\nwindow = 4096\n"
        )
        self.started = 0
        self.agent = self.start_agent()
        self.server = self.start_server()

    def start_agent(self) -> Process:
        self.started += 1
        return Process(self.folder, f"agent{self.started}", [*COMMAND, "run", str(self.config), "--until-empty"])

    def start_server(self) -> Process:
        self.started += 1
        command = [*COMMAND, "serve", "--port", str(self.port), "--store", str(self.store)]
        return Process(self.folder, f"server{self.started}", command)

    def applied(self) -> int:
        if not self.store.exists():
            return 0
        with closing(sqlite3.connect(self.store)) as connection:
            try:
                return int(connection.execute("SELECT coalesce(max(id), 0) FROM durablews_inbox").fetchone()[0])
            except sqlite3.OperationalError:
                return 0  # it is just being created

    def goes_on(self, before: int) -> bool:
        """Return whether more was applied than before."""
        return self.applied() > before

    def stop(self) -> None:
        self.agent.kill()
        self.server.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_kills_of_both_ends_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    """P5: SIGKILL of the agent and of the server, ten times each, while messages are unanswered: every line once."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    made = lines(LINES)
    outbox = send_lines(tmp_path, made)
    fight = Fight(tmp_path, outbox, LINES)
    kills = {"agent": 0, "server": 0}
    deadline = time.monotonic() + DEADLINE
    try:
        for number in range(2 * KILLS):
            who = ("agent", "server")[number % 2]
            # It has delivered something since the last kill, and is in the middle of more.
            wait_for(partial(fight.goes_on, fight.applied()), timeout=DEADLINE)
            time.sleep(chance.random() * 0.1)  # the moment of the kill, anywhere in a batch
            process = fight.agent if who == "agent" else fight.server
            process.kill()
            unanswered = inspect(outbox)["pending"]
            applied = fight.applied()
            assert unanswered > 0, f"seed {seed}: everything was delivered before kill {number}"
            assert applied < LINES, f"seed {seed}"
            kills[who] += 1
            if who == "agent":
                fight.agent = fight.start_agent()
            else:
                fight.server = fight.start_server()
        code, said = fight.agent.end(timeout=max(1.0, deadline - time.monotonic()))
        assert code == 0, said
    finally:
        fight.stop()
    assert kills == {"agent": KILLS, "server": KILLS}
    after = inspect(outbox)
    assert (after["pending"], after["dead"]) == (0, 0), f"seed {seed}"
    assert after["enqueued"] == LINES
    assert_delivered(fight.store, made)
    said = f"{LINES} lines, {kills}, {after['redelivered']} sent again after a lost connection, seed {seed}"
    print(said)  # noqa: T201 - pytest -rP shows it


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_sender_that_is_killed_has_stored_a_beginning_of_its_lines(tmp_path: Path) -> None:
    """P1: SIGKILL in the middle of `send --lines` leaves the first lines whole and in order, and a file that works."""
    made = lines(50_000)
    source, outbox = tmp_path / "lines.txt", tmp_path / "agent.db"
    source.write_bytes(b"".join(line + b"\n" for line in made))
    with source.open("rb") as stdin:
        sender = subprocess.Popen([*COMMAND, "send", str(outbox), "--lines"], stdin=stdin, env=ENVIRONMENT)
        wal = tmp_path / "agent.db-wal"
        wait_for(lambda: wal.exists() and wal.stat().st_size > 200_000)
        sender.kill()
        sender.wait()
    stored = inspect(outbox)["pending"]
    assert 0 < stored < 50_000
    store = tmp_path / "inbox.db"
    with running(tmp_path, "serve", [*COMMAND, "serve", "--port", "0", "--store", str(store)]) as serve:
        command = [*COMMAND, "run", "--url", serve.first_line(), "--outbox", str(outbox), "--until-empty"]
        with running(tmp_path, "run", command) as run:
            assert run.end(timeout=DEADLINE)[0] == 0, run.err.read_text()
    assert_delivered(store, made[:stored])
