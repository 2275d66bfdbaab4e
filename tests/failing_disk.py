"""Runs a workload with one write or sync failing, for each of them in turn: ``python failing_disk.py`` under the shim.

Reads a line of JSON for each run, ``[number, errno, end]``, from standard input and writes what became of it. `end` is
"close", "kill", or "kill at once": when the first send has failed, before anything else is written over it.
A run is a forked child, so that nothing has to be imported again; a second child is what starts after it.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from servers import FAST, PlainServer

import durablews
from durablews import DurablewsError, OutboxFull, StorageFailed, committing, jobs
from durablews.outbox import Outbox

SOURCE = Path(__file__).with_suffix(".c")
MESSAGES = 9
BROKEN = os.environ.get("DURABLEWS_TEST_BROKEN")
#: Seconds for everything to go out; a build that is known to be broken may never get there.
PATIENCE = 3 if BROKEN else 60


def build(folder: Path) -> Path:
    """Compile the shim.

    Raises:
        OSError, CalledProcessError: there is no compiler.
    """
    library = folder / "failing_disk.so"
    command = ["gcc", "-O2", "-fPIC", "-shared", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


class Fates:
    """What the senders of one run were told."""

    def __init__(self) -> None:
        self.accepted: list[str] = []
        self.unknown: list[str] = []
        self.refused: list[str] = []
        self.other: list[str] = []
        #: Whether everything went out although the disk failed once.
        self.emptied = False

    def result(self, shim: ctypes.CDLL, server: PlainServer) -> dict[str, Any]:
        return {
            "calls": shim.disk_calls(),
            "failed": shim.disk_failed().decode(),
            "emptied": self.emptied,
            "accepted": self.accepted,
            "unknown": self.unknown,
            "refused": self.refused,
            "other": self.other,
            "applied": server.payloads,
        }

    async def send(self, ws: durablews.Client, text: str) -> None:
        try:
            await ws.send(text)
        except OutboxFull:
            self.refused.append(text)
        except StorageFailed as exc:
            (self.unknown if exc.stored is None else self.refused).append(text)
        except DurablewsError as exc:
            self.other.append(f"{text}: {exc!r}")
        else:
            self.accepted.append(text)


def settings() -> dict[str, Any]:
    return {"reconnect": FAST, "proxy": None, "delivery": {"drain_timeout": 0.2}}


async def work(path: Path, shim: ctypes.CDLL, number: int, error: int, ends: str) -> dict[str, Any]:
    """Open, send offline, drain, send online, checkpoint often; then close, or end as a kill does."""
    fates = Fates()
    async with PlainServer() as server:
        await server.stop()

        async def send(text: str) -> None:
            await fates.send(client, text)
            if ends == "kill at once" and (fates.unknown or fates.refused):
                fates.emptied = True  # as far as it could be
                end(fates.result(shim, server))

        shim.disk_fails_at(number, error)
        client = durablews.connect(server.url, path, **settings())
        try:
            await client.__aenter__()
        except DurablewsError:
            fates.emptied = True
            return fates.result(shim, server)
        storage = client._outbox.storage
        await storage.read(lambda connection: connection.execute("PRAGMA wal_autocheckpoint = 20").fetchall())
        for name in range(MESSAGES // 3):
            await send(f"offline {name}")
        await asyncio.gather(*(send(f"together {name}") for name in range(MESSAGES // 3)))
        await server.start()
        for name in range(MESSAGES // 3):
            await send(f"online {name}")
        fates.emptied = await client.flush(PATIENCE)
        if ends != "close":
            end(fates.result(shim, server))
        with suppress(DurablewsError):
            await client.close()
        return fates.result(shim, server)


async def later(path: Path) -> list[str]:
    """Start again on what is there, as another process does, and return what waits to be sent."""
    async with Outbox(path) as box:
        await box.send("after all")
        waiting = await box.storage.read(
            lambda connection: connection.execute("SELECT payload FROM durablews_outbox").fetchall()
        )
    return [payload for (text,) in waiting if (payload := json.loads(text)) != "after all"]


def end(result: object) -> None:
    """Say it, and end at once, as a kill does."""
    os.write(1, json.dumps(result).encode())
    os._exit(0)


def in_fork(job: Callable[[], object]) -> Any:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(writer, 1)
        try:
            end(job())
        except BaseException as exc:
            end({"error": repr(exc)})
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(said) if said else {"error": f"ended with status {status}"}


def main() -> None:
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    shim.disk_calls.restype = ctypes.c_long
    shim.disk_failed.restype = ctypes.c_char_p
    shim.disk_fails_at.argtypes = [ctypes.c_long, ctypes.c_int]
    if BROKEN:
        break_it(BROKEN)
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as warm:
        # What is imported, compiled and cached in here is not again in each child: a tenth of the time is left.
        asyncio.run(work(Path(warm) / "agent.db", shim, -1, 0, "close"))
    gc.freeze()
    for line in sys.stdin:
        number, error, ends = json.loads(line)
        folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
        try:
            path = folder / "agent.db"
            result = in_fork(lambda: asyncio.run(work(path, shim, number, error, ends)))  # noqa: B023
            if "error" not in result:
                after = in_fork(lambda: asyncio.run(later(path)))  # noqa: B023
                result["later"] = after if isinstance(after, list) else []
                if not isinstance(after, list):
                    result["error"] = after["error"]
        finally:
            shutil.rmtree(folder)
        print(json.dumps(result), flush=True)  # noqa: T201 - this is what it is for


def break_it(how: str) -> None:
    """Break the library, in this process only, for the harness to find."""
    if how == "always sure":

        def sure(self: StorageFailed, path: str, what: str, stored: bool | None = False) -> None:
            real(self, path, what, False)

        real = StorageFailed.__init__
        StorageFailed.__init__ = sure  # type: ignore[method-assign]
    elif how == "a failed commit counts":

        @contextmanager
        def careless(connection: sqlite3.Connection) -> Iterator[None]:
            with suppress(jobs.UncertainCommit), jobs.transaction(connection):
                yield

        committing.transaction = careless  # type: ignore[attr-defined]
    else:
        raise ValueError(how)


if __name__ == "__main__":
    main()
