"""Cancelling a client at whatever step: no task, no thread and no open file stays behind, and what was stored stays."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from servers import FAST, PlainServer, until
from websockets.asyncio.server import ServerConnection

import durablews

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def threads() -> int:
    """Count the threads but for the loop's own workers, which it keeps for the next job."""
    return len([thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")])


async def use(url: Any, path: Path, stored: list[int], **settings: Any) -> None:
    """Live a whole life: connect, speak first, send, be answered, drain, close."""

    async def hello(websocket: Any) -> None:
        await asyncio.sleep(0)

    given = {"reconnect": FAST, "proxy": None, "dialect": "durablews.v1.json", "on_open": hello, **settings}
    async with durablews.connect(url, path / "agent.db", token=lambda: "t", **given) as ws:
        for number in range(3):
            receipt = await ws.send(number)
            stored.append(number)
            if url is not None and number == 1:
                await receipt.acked()


async def cancelled_after(steps: int, life: asyncio.Task[None], times: int) -> bool:
    """Cancel a task after so many turns of the loop, `times` times; return whether it was still alive."""
    for _ in range(steps):
        if life.done():
            return False
        await asyncio.sleep(0)
    for _ in range(times):
        life.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(life, return_exceptions=True)
    return True


async def welcoming(server: PlainServer, ws: ServerConnection) -> None:
    await server.behave(ws)


async def refusing(server: PlainServer, ws: ServerConnection) -> None:
    await ws.close(1013)


async def mute(server: PlainServer, ws: ServerConnection) -> None:
    await ws.wait_closed()


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("trouble", [welcoming, refusing, mute])
async def test_wherever_a_client_is_cancelled_nothing_is_left(tmp_path: Path, trouble: Any, times: int) -> None:
    """P7: after each turn of the loop in the life of a client, once and again and again, against three servers."""
    async with PlainServer(trouble) as server:
        tasks, files, workers = len(asyncio.all_tasks()), descriptors(), threads()
        steps, alive = 0, True
        while alive and steps < (1_000_000 if trouble is welcoming else 4000):
            folder = tmp_path / str(steps)
            folder.mkdir()
            stored: list[int] = []
            alive = await cancelled_after(steps, asyncio.create_task(use(server.url, folder, stored)), times)
            await until(lambda: not server.connections)
            await until(lambda: len(asyncio.all_tasks()) <= tasks)
            await until(lambda: (descriptors(), threads()) <= (files, workers))
            await everything_is_kept(folder, stored)
            steps += 1 + steps // 10  # the first turns one by one, then ever wider apart
        assert alive == (trouble is not welcoming)  # it was let live to its end, and cancelled at every stage before


async def everything_is_kept(folder: Path, stored: list[int]) -> None:
    """What `send` had confirmed waits in the outbox, or was acknowledged; at most one more may have been stored."""
    if not (folder / "agent.db").exists():
        assert stored == []
        return
    async with durablews.Outbox(folder / "agent.db") as outbox:
        counts = await outbox.counts()
    assert len(stored) <= counts.pending + counts.acked <= len(stored) + 1
