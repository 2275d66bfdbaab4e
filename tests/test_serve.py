"""`durablews serve`: the command in a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from independent_client import IndependentClient, dial, hello_frame, read
from test_receiver import STREAM, closed

from durablews.cli import serve

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import argparse, sys
from durablews.cli import serve
parser = argparse.ArgumentParser()
serve.add_parser(parser.add_subparsers(required=True))
args = parser.parse_args(sys.argv[1:])
sys.exit(serve.run(args))
"""


def command(*options: str) -> list[str]:
    return [sys.executable, "-W", "error", "-c", SCRIPT, "serve", *options]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@contextmanager
def serving(store: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        command("--port", "0", "--store", str(store)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


async def end(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    process.send_signal(number)
    _, errors = await asyncio.to_thread(process.communicate, timeout=20)
    return process.returncode, errors


def rows(store: Path) -> list[tuple[int, int, str]]:
    with closing(sqlite3.connect(store)) as connection:
        return connection.execute("SELECT priority, seq, payload FROM durablews_inbox ORDER BY id").fetchall()


async def test_what_is_sent_is_in_the_inbox_and_the_address_is_the_first_line(tmp_path: Path) -> None:
    """The first line of stdout is the address; messages are rows; stderr has a line for the opening and the closing."""
    with serving(tmp_path / "inbox.db") as (process, url):
        assert url.startswith("ws://127.0.0.1:")
        client = IndependentClient(url, STREAM)
        for i in range(20):
            client.enqueue({"secret": i}, priority=i % 2)
        await client.drain(batch=3, cut_after=2)
        await client.drain(batch=3)
        code, errors = await end(process, signal.SIGTERM)
    assert code == 0
    found = rows(tmp_path / "inbox.db")
    assert sorted(seq for _, seq, _ in found) == list(range(1, 21))
    assert {payload for _, seq, payload in found if seq == 1} == {'{"secret": 0}'}
    assert "abababab opened from 127.0.0.1:" in errors
    assert "abababab closed 1000" in errors
    assert "secret" not in errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_a_signal_closes_connections_with_1001(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """SIGTERM ends with exit code 0, Ctrl-C with 130, and clients are told that the server goes away."""
    with serving(tmp_path / "inbox.db") as (process, url):
        async with dial(url) as ws:
            await ws.send(hello_frame(STREAM))
            await read(ws)
            ended = asyncio.create_task(end(process, number))
            assert (await closed(ws))[0] == 1001
            returned, errors = await ended
        assert (returned, "Traceback" in errors) == (code, False)


async def test_a_killed_server_goes_on_where_it_was(tmp_path: Path) -> None:
    """P5: after kill -9 between frames nothing is missing and nothing is there twice."""
    store = tmp_path / "inbox.db"
    with serving(store) as (process, url):
        client = IndependentClient(url, STREAM)
        for i in range(40):
            client.enqueue(i)
        await client.drain(batch=5, cut_after=4)
        process.kill()
        process.wait()
    with serving(store) as (process, url):
        client.url = url
        await client.drain(batch=5)
    assert [seq for _, seq, _ in rows(store)] == list(range(1, 41))


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    """Exit code 2 and one line when the address is taken."""
    with serving(tmp_path / "a.db") as (_, url):
        port = url.rpartition(":")[2]
        options = command("--port", port, "--store", str(tmp_path / "b.db"))
        result = subprocess.run(options, capture_output=True, text=True, env=environment(), timeout=20)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"durablews serve: cannot listen on 127.0.0.1:{port}: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["text", "outbox", "foreign", "nowhere"])
def test_a_foreign_store_is_refused_and_left(tmp_path: Path, kind: str) -> None:
    """Exit code 3 and one line for a store that is something else, which stays as it was."""
    store = tmp_path / "s.db"
    if kind == "text":
        store.write_text("a long text that is no database at all\n" * 10)
    elif kind == "nowhere":
        store = tmp_path / "nowhere" / "s.db"
    else:
        with closing(sqlite3.connect(store)) as connection:
            connection.execute(f"CREATE TABLE {'durablews_meta' if kind == 'outbox' else 'notes'} (x)")
    before = store.read_bytes() if store.exists() else None
    options = command("--port", "0", "--store", str(store))
    result = subprocess.run(options, capture_output=True, text=True, env=environment(), timeout=20)
    assert (result.returncode, result.stdout) == (3, "")
    assert str(store) in result.stderr
    assert result.stderr.count("\n") == 1
    assert (store.read_bytes() if store.exists() else None) == before


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["serve", *options])


def test_options_have_their_defaults_and_units() -> None:
    """The defaults are what the design says, and sizes may carry a unit."""
    args = parse()
    assert (args.host, args.port, args.store, args.window, args.max_bytes) == (
        "127.0.0.1", 8765, "inbox.db", 1024, 1048576,
    )  # fmt: skip
    assert parse("--max-bytes", "64KiB").max_bytes == 65_536
    assert parse("--max-bytes", "2MB").max_bytes == 2_000_000


@pytest.mark.parametrize(
    "options", [("--port", "70000"), ("--window", "-1"), ("--max-bytes", "1KB"), ("--max-bytes", "big")]
)
def test_options_out_of_range_are_usage_errors(options: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong option is exit code 2 and a line that says what is allowed."""
    with pytest.raises(SystemExit) as ended:
        parse(*options)
    assert ended.value.code == 2
    assert options[1] in capsys.readouterr().err
