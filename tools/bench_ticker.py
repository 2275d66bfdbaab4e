"""A ticker in an event loop beside an outbox whose every sync takes 20 ms longer: does the loop stay free?

Every fsync and fdatasync of the process is delayed by a small library that the linker loads first, so it runs in a
process of its own; where there is no C compiler it cannot. A thousand messages a second are sent while the busy ticker
runs; the idle one runs beside an outbox that does nothing. By itself it prints the milliseconds by which one tick in a
thousand is late: ``python bench_ticker.py PATH idle|busy SECONDS``.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import durablews

__all__ = ["lateness"]

DELAY_MS, RATE, TICK = 20, 1000, 0.001
SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
static void wait_a_little(void) { struct timespec t = {0, DELAY_MS * 1000000L}; nanosleep(&t, 0); }
int fsync(int fd) { wait_a_little(); return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd); }
int fdatasync(int fd) { wait_a_little(); return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd); }
"""


def lateness(folder: Path, *, busy: bool, seconds: float) -> float:
    """Return by how many milliseconds one tick in a thousand is late, at least.

    Raises:
        OSError: there is no C compiler, or nothing that it makes can be loaded first.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        raise OSError("needs Linux and a C compiler, to delay syncs")
    source, shim = folder / "slow_sync.c", folder / "slow_sync.so"
    source.write_text(SOURCE, encoding="utf-8")
    flags = ["-O2", "-shared", "-fPIC", f"-DDELAY_MS={DELAY_MS}", "-o", str(shim), str(source), "-ldl"]
    subprocess.run([compiler, *flags], check=True)
    command = [sys.executable, __file__, str(folder / "ticker.db"), "busy" if busy else "idle", str(seconds)]
    said = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(shim)}, check=True, capture_output=True)
    return float(said.stdout)


async def tick(seconds: float) -> list[float]:
    """Sleep a millisecond again and again; return by how much each was late."""
    loop, late = asyncio.get_running_loop(), []
    end = loop.time() + seconds
    while (before := loop.time()) < end:
        await asyncio.sleep(TICK)
        late.append(loop.time() - before - TICK)
    return late


async def send(outbox: durablews.Outbox, seconds: float) -> None:
    """Send a thousand messages a second, each by a caller of its own that waits until it is on the medium."""
    loop, sends = asyncio.get_running_loop(), set[asyncio.Task[object]]()
    started, sent = loop.time(), 0
    while (passed := loop.time() - started) < seconds:
        while sent < passed * RATE:
            task: asyncio.Task[object] = asyncio.create_task(outbox.send({"number": sent, "celsius": 21.4}))
            sends.add(task)
            task.add_done_callback(sends.discard)
            sent += 1
        await asyncio.sleep(0.005)
    await asyncio.gather(*sends)


async def run(path: str, mode: str, seconds: float) -> float:
    async with durablews.Outbox(path) as outbox:
        await outbox.send("the first opens what is opened once")
        if mode == "busy":
            late, _ = await asyncio.gather(tick(seconds), send(outbox, seconds))
        else:
            late = await tick(seconds)
    return sorted(late)[int(len(late) * 0.999)] * 1000


if __name__ == "__main__":
    print(asyncio.run(run(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
