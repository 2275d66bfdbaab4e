"""The README says what is so: its code runs, its tests exist, its defaults are the defaults."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

import durablews
from durablews.config import Settings
from durablews.receiver import Receiver, select_subprotocol

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@asynccontextmanager
async def a_server(folder: Path) -> AsyncIterator[tuple[str, asyncio.Queue[Any]]]:
    """Run a receiver that puts what it applies into a queue and pushes one message to whoever comes."""
    applied: asyncio.Queue[Any] = asyncio.Queue()
    async with Receiver(folder / "seen.db") as receiver:

        async def handle(websocket: ServerConnection) -> None:
            async for batch in receiver.session(websocket):
                async with batch.applying():
                    messages = list(batch)
                for message in messages:
                    applied.put_nowait((message.priority, message.payload))
                if messages:
                    await receiver.push(batch.stream, {"hello": "there"})

        async with serve(handle, "127.0.0.1", 0, select_subprotocol=select_subprotocol) as server:
            yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}", applied


def test_every_block_of_python_compiles() -> None:
    """Each Python block of the README is valid Python."""
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        ast.parse(block)


async def test_the_first_screen_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first code of the README delivers its two messages and prints what the server says."""
    monkeypatch.chdir(tmp_path)
    async with a_server(tmp_path) as (url, applied):
        block = BLOCKS[0].replace("wss://example.com/ingest", url).replace("asyncio.run(main())", "")
        printed: asyncio.Queue[Any] = asyncio.Queue()
        names: dict[str, Any] = {"print": printed.put_nowait}
        exec(compile(block, "README.md", "exec"), names)
        running = asyncio.create_task(names["main"]())
        async with asyncio.timeout(20):
            got = {(await applied.get())[0] for _ in range(2)}
            assert await printed.get() == {"hello": "there"}
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert got == {0, 1}


async def test_the_second_block_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings, the receipt and the stats of the README's example are those that exist."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").write_text("secret\n")
    async with a_server(tmp_path) as (url, applied):
        block = BLOCKS[1].replace("wss://example.com/ingest", url)
        block = block.replace('open("/run/secrets/token").read().strip()', '"secret"')
        names: dict[str, Any] = {}
        exec(compile(block, "README.md", "exec"), names)
        async with asyncio.timeout(20):
            await names["agent"]()
        assert applied.get_nowait() == (0, {"type": "sale", "cents": 1299})


async def test_an_authentication_message_and_a_token_that_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third block: a server that wants a login first, and a fresh token, gets both before any message."""
    monkeypatch.chdir(tmp_path)
    logins: list[Any] = []
    tokens = iter(["expired", "fresh"])

    async def fetch(url: str) -> dict[str, str]:
        return {"access_token": next(tokens)}

    def check(connection: ServerConnection, request: Request) -> Response | None:
        fresh = request.headers["Authorization"] == "Bearer fresh"
        return None if fresh else connection.respond(HTTPStatus.UNAUTHORIZED, "")

    async with Receiver(tmp_path / "seen.db") as receiver:

        async def handle(websocket: ServerConnection) -> None:
            logins.append(json.loads(await websocket.recv()))
            await websocket.send('{"ok": true}')
            async for batch in receiver.session(websocket):
                async with batch.applying():
                    list(batch)

        async with serve(
            handle, "127.0.0.1", 0, select_subprotocol=select_subprotocol, process_request=check
        ) as server:
            url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            async with durablews.Outbox("agent.db") as outbox:
                await outbox.send("x")
            names: dict[str, Any] = {"fetch": fetch}
            exec(compile(BLOCKS[2].replace("wss://example.com/ingest", url), "README.md", "exec"), names)
            async with asyncio.timeout(20):
                await names["agent"]()
    assert logins == [{"login": "till-7"}]
    async with durablews.Outbox("agent.db") as outbox:
        assert (await outbox.counts()).acked == 1


async def test_a_wake_up_from_the_operating_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth block: the signal of a network manager's hook ends the wait for the next try."""
    monkeypatch.chdir(tmp_path)
    told: asyncio.Queue[str] = asyncio.Queue()
    names: dict[str, Any] = {"print": lambda kind, event: told.put_nowait(kind)}
    slow = 'reconnect={"base_delay": 1000, "max_delay": 1000, "jitter": 0.0}'
    block = BLOCKS[3].replace('"wss://example.com/ingest", "agent.db"', f'"ws://127.0.0.1:1", "agent.db", {slow}')
    exec(compile(block, "README.md", "exec"), names)
    running = asyncio.create_task(names["agent"]())
    try:
        async with asyncio.timeout(20):
            for _ in range(3):
                while await told.get() != "reconnecting":
                    pass
                os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        asyncio.get_running_loop().remove_signal_handler(signal.SIGUSR1)


async def test_the_server_of_the_readme_applies_what_a_client_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server in the README stores each message once, in the application's own table."""
    monkeypatch.chdir(tmp_path)
    with sqlite3.connect("seen.db") as connection:
        connection.execute("CREATE TABLE reading (body)")
    connection.close()
    listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    block = BLOCKS[4].replace("asyncio.run(main())", "").replace("8765", "0")
    block = block.replace(
        "select_subprotocol=select_subprotocol):", "select_subprotocol=select_subprotocol) as server:"
    )
    block = block.replace(
        "            await asyncio.get_running_loop()",
        "            told(server)\n            await asyncio.get_running_loop()",
    )
    names: dict[str, Any] = {"told": lambda server: listening.set_result(next(iter(server.sockets)).getsockname()[1])}
    exec(compile(block, "README.md", "exec"), names)
    running = asyncio.create_task(names["main"]())
    async with asyncio.timeout(20):
        port = await listening
        async with durablews.connect(f"ws://127.0.0.1:{port}", "agent.db") as ws:
            await (await ws.send({"celsius": 21.4})).acked()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    connection = sqlite3.connect("seen.db")
    rows = connection.execute("SELECT body FROM reading").fetchall()
    connection.close()
    assert rows == [('{"celsius":21.4}',)]


def test_every_test_that_is_named_exists() -> None:
    """A promise of the README names tests that are there."""
    named = set(re.findall(r"`(test_[a-z_*]+)`", README))
    assert len(named) > 10
    for pattern in named:
        assert list((ROOT / "tests").glob(f"{pattern}.py")), f"{pattern} is named and does not exist"


def test_the_defaults_are_those_of_the_code() -> None:
    """Each `name=value` of the README's table of settings is the default of that name."""
    code = Settings()
    caps = {"max_messages": 1_000_000, "max_bytes": "1GiB", "max_age": None, "overflow": "reject"}
    for table in ("reconnect", "heartbeat", "caps", "delivery", "auth"):
        row = re.search(rf"^\| `{table}` \| `(.*?)` \|", README, re.MULTILINE)
        assert row, table
        told = dict(pair.split("=", 1) for pair in row[1].split())
        values = (
            caps
            if table == "caps"
            else {name: getattr(getattr(code, table), name) for name in getattr(code, table).__struct_fields__}
        )
        assert set(told) == set(values), table
        for name, text in told.items():
            assert _plain(text) == _plain(str(values[name])), f"{table}.{name}"


def test_the_defaults_in_the_table_of_the_link_are_those_of_the_code() -> None:
    """Each `table.name=value` there is the default of that name, and every setting of the link stands there."""
    section = README[README.index("### The link") : README.index("## The server's side")]
    told = dict(re.findall(r"`((?:reconnect|heartbeat|auth)\.\w+|delivery\.\w+)=(.*?)`", section))
    code = Settings()
    for name, text in told.items():
        table, _, setting = name.partition(".")
        assert _plain(text) == _plain(str(getattr(getattr(code, table), setting))), name
    for table in ("reconnect", "heartbeat", "auth"):
        for setting in getattr(code, table).__struct_fields__:
            assert f"{table}.{setting}" in told
    assert '`proxy="env"`' in section


def _plain(text: str) -> object:
    text = text.strip('"').lower()
    text = {"1gib": "1073741824", "1mib": "1048576"}.get(text, text)
    try:
        return float(text)
    except ValueError:
        return text
