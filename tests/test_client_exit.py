"""The interpreter always exits: programs that forget to close their client, in processes of their own."""

from __future__ import annotations

import signal
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
from servers import Inbox, inbox_rows, running, wait_for

HEAD = """
import asyncio, sys
import durablews

def connect():
    return durablews.connect(sys.argv[1], sys.argv[2], proxy=None,
                             reconnect={"base_delay": 0.01, "max_delay": 0.05}, delivery={"drain_timeout": 0.2})
"""
FORGOTTEN = """
async def main():
    client = await connect().__aenter__()
    await client.send("kept")
    %s
asyncio.run(main())
"""
BLOCK = """
async def main():
    async with connect() as ws:
        await ws.send("kept")
        %s
asyncio.run(main())
"""
WAITING = "receipts = [asyncio.create_task((await client.send(i)).acked()) for i in range(3)]; await asyncio.sleep(0.1)"
PROGRAMS = {
    "forgotten": (FORGOTTEN % "pass", 0, ""),
    "forgotten at work": (FORGOTTEN % WAITING, 0, ""),
    "forgotten while it iterates": (
        FORGOTTEN % "task = asyncio.create_task(anext(aiter(client))); await asyncio.sleep(0.1)",
        0,
        "",
    ),
    "exception": (BLOCK % "raise ZeroDivisionError", 1, "ZeroDivisionError"),
    "exception forgotten": (FORGOTTEN % "raise ZeroDivisionError", 1, "ZeroDivisionError"),
    "sys.exit": (BLOCK % "sys.exit(7)", 7, ""),
    "sys.exit forgotten": (FORGOTTEN % "sys.exit(7)", 7, ""),
    "wrong url provider": (
        FORGOTTEN.replace("connect()", "durablews.connect(lambda: 1 / 0, sys.argv[2])") % "pass",
        0,
        "",
    ),
    "outbox forgotten": (
        """
async def main():
    box = durablews.Outbox(sys.argv[2])
    await box.open()
    await box.send("kept")
asyncio.run(main())
""",
        0,
        "",
    ),
}


def stored(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [payload for (payload,) in connection.execute("SELECT payload FROM durablews_outbox")]


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("server", [False, True])
def test_a_program_that_forgets_its_client_ends(tmp_path: Path, name: str, server: bool) -> None:
    """P7: the process ends soon, says nothing of its own, and what was sent is on disk or delivered."""
    program, code, complaint = PROGRAMS[name]
    path, store = tmp_path / "agent.db", tmp_path / "inbox.db"
    serve = [sys.executable, "-m", "durablews", "serve", "--port", "0", "--store", str(store)]
    with running(tmp_path, "serve", serve if server else [sys.executable, "-c", "print('ws://127.0.0.1:9/')"]) as other:
        url = other.first_line()
        command = [sys.executable, "-W", "error", "-c", HEAD + program, url, str(path)]
        with running(tmp_path, "program", command) as process:
            returned, errors = process.end(timeout=15)
        assert returned == code, errors
        assert (errors == "") if not complaint else errors.strip().endswith(complaint), errors
        left = stored(path)
        assert '"kept"' in left or '"kept"' in [payload for _, _, payload in inbox_rows(store)]


def test_ctrl_c_ends_a_program_in_its_block(tmp_path: Path) -> None:
    """KeyboardInterrupt leaves the block, closes the client and ends the process; the message is on disk."""
    program = HEAD + BLOCK % 'print("ready", flush=True); await asyncio.sleep(60)'
    command = [sys.executable, "-W", "error", "-c", program, "ws://127.0.0.1:9/", str(tmp_path / "agent.db")]
    with running(tmp_path, "program", command) as process:
        assert process.first_line() == "ready"
        code, errors = process.end(signal.SIGINT)
    assert code in (1, 130, -signal.SIGINT)
    assert errors.strip().endswith("KeyboardInterrupt")
    assert stored(tmp_path / "agent.db") == ['"kept"']


def test_a_killed_program_lost_nothing_that_send_returned_for(tmp_path: Path) -> None:
    """P1: SIGKILL right after `send` returned leaves the message on disk, for the next client to deliver."""
    program = HEAD + BLOCK % 'print("ready", flush=True); await asyncio.sleep(60)'
    command = [sys.executable, "-c", program, "ws://127.0.0.1:9/", str(tmp_path / "agent.db")]
    with running(tmp_path, "program", command) as process:
        assert process.first_line() == "ready"
        process.kill()
    wait_for(lambda: not process.running)
    assert stored(tmp_path / "agent.db") == ['"kept"']
    assert Inbox(tmp_path / "inbox.db").rows() == []
