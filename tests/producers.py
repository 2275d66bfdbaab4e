"""Many processes that write to one outbox at once, beside those who look into it and one that dies holding its lock.

    python tests/producers.py OUTBOX --producers 10 --messages 100 [--build NAME] [--seed S]

prints one line of JSON: how many messages were confirmed, and every error that reached a caller. A payload is
[producer, number]; each producer has numbered its messages from 0 and had each confirmed before the next.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from broken_builds import BUILDS

from durablews import cli, database, entries
from durablews.cli import inspect, send
from durablews.clock import SystemClock
from durablews.jobs import transaction
from durablews.messages import draft
from durablews.outbox import Outbox

#: A message of a producer by one of these: our own outbox, our function in a transaction, SQL of another language.
_LONGEST_HOLD = 0.05


def through_an_outbox(path: str, producer: int, messages: int) -> None:
    async def produce() -> None:
        async with Outbox(path) as outbox:
            for number in range(messages):
                await outbox.send([producer, number])

    asyncio.run(produce())


def through_a_transaction(path: str, producer: int, messages: int) -> None:
    clock = SystemClock()
    with closing(database.open_outbox(path)) as connection:
        for number in range(messages):
            with database.storage_errors(path), transaction(connection):
                (result,) = entries.enqueue(connection, path, [[draft([producer, number])]], clock=clock)
            if isinstance(result, Exception):
                raise result


def through_sql(path: str, producer: int, messages: int) -> None:
    with closing(sqlite3.connect(path, isolation_level=None, timeout=5.0)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        for number in range(messages):
            connection.execute("INSERT INTO durablews_outbox (payload) VALUES (?)", (json.dumps([producer, number]),))


def through_the_command(path: str, producer: int, messages: int) -> None:
    for number in range(messages):
        run_command("send", path, json.dumps([producer, number]))


WAYS = (through_an_outbox, through_a_transaction, through_sql, through_the_command)


def run_command(*arguments: str) -> None:
    """Run a verb of the command line, and raise what it says when it fails."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(arguments))
    if code:
        raise RuntimeError(f"{arguments[0]} ended with {code}: {err.getvalue()}")


def looks(path: str) -> None:
    """Inspect the outbox for ever."""
    while True:
        run_command("inspect", path, "--json", "--limit", "0")


def holds(path: str) -> None:
    """Take the write lock, write, and never commit."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO durablews_outbox (payload) VALUES ('\"never committed\"')")
    time.sleep(60)


def fork(job: Callable[[], None]) -> tuple[int, int]:
    """Return the child's id and a pipe that ends with its error, or with nothing."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    try:
        os.close(reader)
        job()
    except BaseException as exc:
        os.write(writer, f"{type(exc).__name__}: {exc}".encode()[:2000])
    finally:
        os._exit(0)


def said(child: tuple[int, int]) -> list[str]:
    """Wait for a child and return its error, if it had one."""
    with os.fdopen(child[1]) as pipe:
        text = pipe.read()
    os.waitpid(child[0], 0)
    return [text] if text else []


def run(path: str, *, producers: int, messages: int, seed: int) -> dict[str, object]:
    chance, kills = random.Random(seed), 0
    watcher = fork(lambda: looks(path))
    children = []
    for number in range(producers):
        way = WAYS[number % len(WAYS)]
        children.append(fork(lambda way=way, number=number: way(path, number, messages)))  # type: ignore[misc]
    errors: list[str] = []
    running = {pid: (pid, reader) for pid, reader in children}
    while running:
        holder = fork(lambda: holds(path))
        time.sleep(chance.uniform(0, _LONGEST_HOLD))  # dies before it has the lock, or with it
        os.kill(holder[0], signal.SIGKILL)
        kills += 1
        errors += said(holder)
        time.sleep(chance.uniform(0, 2 * _LONGEST_HOLD))
        for pid in list(running):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                errors += said(running.pop(pid))
    os.kill(watcher[0], signal.SIGKILL)
    errors += said(watcher)
    return {"seed": seed, "messages": producers * messages, "killed_holders": kills, "errors": errors}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outbox", type=Path)
    parser.add_argument("--producers", type=int, default=10)
    parser.add_argument("--messages", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--build", choices=BUILDS, default="genuine")
    args = parser.parse_args()
    assert inspect
    assert send
    BUILDS[args.build]()
    print(  # noqa: T201
        json.dumps(run(str(args.outbox), producers=args.producers, messages=args.messages, seed=args.seed))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
