"""`durablews run` in a process of its own: settings, signals, exit codes."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from servers import COMMAND, ENVIRONMENT, Inbox, PlainServer, Process, inbox_rows, running, until, wait_for
from websockets.asyncio.server import ServerConnection

import durablews


def send(path: Path, *payloads: str) -> None:
    for payload in payloads:
        done = subprocess.run([*COMMAND, "send", str(path), payload], env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def waiting(path: Path) -> int:
    if not path.exists():
        return -1
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT messages FROM durablews_totals").fetchone()[0])


def run(folder: Path, *options: str, **environment: str) -> tuple[int, str]:
    """Run it to its end; return the exit code and what it said."""
    with running(folder, "run", [*COMMAND, "run", *options], **environment) as process:
        return process.end(timeout=30)


@pytest.fixture
def inbox(tmp_path: Path) -> Any:
    """Return the address of a `durablews serve`, and its store."""
    store = tmp_path / "inbox.db"
    with running(tmp_path, "serve", [*COMMAND, "serve", "--port", "0", "--store", str(store)]) as process:
        yield process.first_line(), store


def test_until_empty_delivers_and_ends_with_0(tmp_path: Path, inbox: tuple[str, Path]) -> None:
    """--until-empty stops once nothing waits any more, and what waited is at the server."""
    url, store = inbox
    send(tmp_path / "agent.db", "1", "2", "3")
    code, said = run(tmp_path, "--url", url, "--outbox", str(tmp_path / "agent.db"), "--until-empty")
    assert (code, said) == (0, f"durablews: connected to {url}\n")
    assert [payload for _, _, payload in inbox_rows(store)] == ["1", "2", "3"]
    assert waiting(tmp_path / "agent.db") == 0


def test_flags_count_more_than_the_environment_and_that_more_than_the_file(
    tmp_path: Path, inbox: tuple[str, Path]
) -> None:
    """The same settings in TOML, in DURABLEWS_ variables and as flags, the nearer the stronger."""
    url, _ = inbox
    for name in ("file", "environment", "flag"):
        send(tmp_path / f"{name}.db", "1")
    config = tmp_path / "agent.toml"
    # The file's server does not exist; its caps reach the outbox that is used.
    config.write_text(f'url = "ws://127.0.0.1:9/"\noutbox = "{tmp_path}/file.db"\n[caps]\nmax_messages = 77\n')
    environment = {"DURABLEWS_URL": url, "DURABLEWS_OUTBOX": f"{tmp_path}/environment.db"}
    flag = str(tmp_path / "flag.db")
    assert run(tmp_path, str(config), "--until-empty", "--outbox", flag, **environment)[0] == 0
    assert [waiting(tmp_path / f"{name}.db") for name in ("file", "environment", "flag")] == [1, 1, 0]
    assert run(tmp_path, str(config), "--until-empty", **environment)[0] == 0
    assert [waiting(tmp_path / f"{name}.db") for name in ("file", "environment", "flag")] == [1, 0, 0]
    assert run(tmp_path, str(config), "--until-empty", "--url", url)[0] == 0
    assert waiting(tmp_path / "file.db") == 0
    with closing(sqlite3.connect(flag)) as connection:
        assert connection.execute("SELECT max_messages FROM durablews_caps").fetchone() == (77,)


def test_time_that_is_up_is_exit_code_4(tmp_path: Path) -> None:
    """--timeout gives up with 4, says why, and keeps everything."""
    send(tmp_path / "agent.db", "1")
    outbox = str(tmp_path / "agent.db")
    code, said = run(tmp_path, "--url", "ws://127.0.0.1:9/", "--outbox", outbox, "--until-empty", "--timeout", "300ms")
    assert code == 4
    assert said.splitlines()[-1].startswith("durablews: gave up with 1 waiting: ws://127.0.0.1:9/ cannot be reached")
    assert waiting(tmp_path / "agent.db") == 1


@pytest.mark.parametrize("until_empty", [True, False])
@pytest.mark.parametrize("tls", [True, False])
def test_retries_that_are_used_up_are_exit_code_4(tmp_path: Path, until_empty: bool, tls: bool) -> None:
    """max_retries gives up with 4 without any timeout, also when the very first attempt fails at once."""
    send(tmp_path / "agent.db", "1")
    config = tmp_path / "agent.toml"
    text = f'outbox = "{tmp_path}/agent.db"\n[reconnect]\nmax_retries = 0\n'
    if tls:
        text = f'url = "wss://127.0.0.1:9/"\n{text}[tls]\nca_file = "/nowhere"\n'
    else:
        text = f'url = "ws://127.0.0.1:9/"\n{text}'
    config.write_text(text)
    code, said = run(tmp_path, str(config), *(["--until-empty"] if until_empty else []))
    assert code == 4
    assert "gave up after 1 attempts; everything is kept" in said
    assert "gave up with 1 waiting" in said
    assert waiting(tmp_path / "agent.db") == 1


def test_sigterm_drains_and_ends_with_0(tmp_path: Path, inbox: tuple[str, Path]) -> None:
    """SIGTERM delivers what waits before it ends; messages that came just before are not left behind."""
    url, store = inbox
    path = tmp_path / "agent.db"
    with running(tmp_path, "run", [*COMMAND, "run", "--url", url, "--outbox", str(path)]) as process:
        wait_for(lambda: "connected" in process.err.read_text())
        with closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as other:
            other.executemany("INSERT INTO durablews_outbox (payload) VALUES (?)", [("1",), ("2",)])
        code, said = process.end(signal.SIGTERM)
    assert (code, "Traceback" in said) == (0, False)
    assert [payload for _, _, payload in inbox_rows(store)] == ["1", "2"]


def test_sigterm_without_a_server_ends_after_drain_timeout(tmp_path: Path) -> None:
    """SIGTERM ends with 0 within drain_timeout although nobody answers; the rest is on disk."""
    send(tmp_path / "agent.db", "1")
    outbox = str(tmp_path / "agent.db")
    command = [*COMMAND, "run", "--url", "ws://127.0.0.1:9/", "--outbox", outbox]
    with running(tmp_path, "run", command, DURABLEWS_DELIVERY_DRAIN_TIMEOUT="0.2") as process:
        wait_for(lambda: "cannot be reached" in process.err.read_text())
        code, _ = process.end(signal.SIGTERM, timeout=5)
    assert code == 0
    assert waiting(tmp_path / "agent.db") == 1


@pytest.mark.parametrize("until_empty", [True, False])
def test_ctrl_c_is_130(tmp_path: Path, until_empty: bool) -> None:
    """Ctrl-C ends with 130 and without a traceback."""
    send(tmp_path / "agent.db", "1")
    command = [*COMMAND, "run", "--url", "ws://127.0.0.1:9/", "--outbox", str(tmp_path / "agent.db")]
    options = ["--until-empty"] if until_empty else []
    with running(tmp_path, "run", [*command, *options], DURABLEWS_DELIVERY_DRAIN_TIMEOUT="0.1") as process:
        wait_for(lambda: "cannot be reached" in process.err.read_text())
        code, said = process.end(signal.SIGINT, timeout=5)
    assert (code, "Traceback" in said) == (130, False)


@pytest.mark.parametrize(
    ("text", "options", "complaint"),
    [
        ("url = 5", (), "url"),
        ("nonsense = 1", (), "nonsense is not a setting"),
        ("[reconnect]\nbase_dela = 1", (), "did you mean base_delay?"),
        ("url = [", (), "not TOML"),
        (None, ("/nowhere/agent.toml",), "No such file"),
        (None, ("--url", "http://x/", "--outbox", "a.db"), "ws:// or wss://"),
        (None, ("--url", "ws://x/"), "outbox is missing"),
        (None, ("--outbox", "a.db"), "url is missing"),
        (None, ("--timeout", "soon"), "not a duration"),
        (None, ("--nonsense",), "unrecognized"),
    ],
)
def test_a_bad_configuration_is_exit_code_2(
    tmp_path: Path, text: str | None, options: tuple[str, ...], complaint: str
) -> None:
    """What is wrong with the settings is said in a line, and no file is made."""
    if text is not None:
        (tmp_path / "agent.toml").write_text(text)
        options = (str(tmp_path / "agent.toml"),)
    code, said = run(tmp_path, *options)
    assert (code, complaint in said, "Traceback" in said) == (2, True, False), said
    assert not list(tmp_path.glob("*.db"))


def test_an_unknown_variable_is_exit_code_2(tmp_path: Path) -> None:
    """A misspelt DURABLEWS_ variable does not pass in silence."""
    options = ("--url", "ws://127.0.0.1:9/", "--outbox", str(tmp_path / "agent.db"))
    code, said = run(tmp_path, *options, DURABLEWS_HEARTBEAT_INTERVALL="5")
    assert (code, "did you mean DURABLEWS_HEARTBEAT_INTERVAL?" in said) == (2, True)


def test_a_foreign_file_is_exit_code_3(tmp_path: Path) -> None:
    """A file that is something else is left as it is."""
    path = tmp_path / "agent.db"
    path.write_text("a text that is long enough to be looked at\n" * 50)
    before = path.read_bytes()
    code, said = run(tmp_path, "--url", "ws://127.0.0.1:9/", "--outbox", str(path))
    assert (code, said.count("\n"), path.read_bytes() == before) == (3, 1, True), said


async def test_an_outbox_in_use_is_exit_code_3(tmp_path: Path) -> None:
    """The second drainer says who the first one is, and ends."""
    path = tmp_path / "agent.db"
    async with durablews.connect("ws://127.0.0.1:9/", path, delivery={"drain_timeout": 0}):
        with Process(
            tmp_path, "run", [*COMMAND, "run", "--url", "ws://127.0.0.1:9/", "--outbox", str(path)]
        ) as process:
            code, said = await asyncio.to_thread(process.end)
    assert (code, f"already in use by pid {os.getpid()} on" in said, said.count("\n")) == (3, True, 1), said


async def test_what_a_server_says_moves_no_cursor(tmp_path: Path) -> None:
    """Close reasons come from the network: nothing in them is obeyed by the terminal that shows them."""

    async def rude(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        await ws.close(4000, "\x1b[2J\x07 come \u202e back")

    async with PlainServer(rude) as server:
        command = [*COMMAND, "run", "--url", server.url, "--outbox", str(tmp_path / "agent.db")]
        with Process(tmp_path, "run", command, DURABLEWS_DELIVERY_DRAIN_TIMEOUT="0") as process:
            await until(lambda: "come" in process.err.read_text())
            code, said = await asyncio.to_thread(process.end, signal.SIGTERM)
    assert code == 0
    assert r"\x1b[2J\x07 come \u202e back" in said


async def test_run_survives_its_server(tmp_path: Path) -> None:
    """The agent delivers what other processes add, through a server that goes and comes back."""
    inbox, path = Inbox(tmp_path / "inbox.db"), tmp_path / "agent.db"
    async with inbox.serving():
        pass
    environment = {"DURABLEWS_RECONNECT_BASE_DELAY": "0.02", "DURABLEWS_RECONNECT_MAX_DELAY": "0.05"}
    command = [*COMMAND, "run", "--url", inbox.url, "--outbox", str(path)]
    with Process(tmp_path, "run", command, **environment) as process:
        await until(lambda: "cannot be reached" in process.err.read_text())
        for i in range(3):
            async with inbox.serving():
                await asyncio.to_thread(send, path, str(i))
                await until(partial(inbox.has, i + 1))
        code, _ = await asyncio.to_thread(process.end, signal.SIGTERM)
    assert code == 0
    assert inbox.payloads() == [0, 1, 2]
