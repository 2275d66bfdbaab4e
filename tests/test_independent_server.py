"""The client against servers written from PROTOCOL.md alone: the page, and not our own habits, is the wire."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from servers import DEADLINE, Process, until

import durablews

HERE = Path(__file__).resolve().parent
COUNT = 5000
#: How often the server is killed, beside the links that it cuts itself.
RESTARTS = 4


def command(kind: str) -> list[str]:
    if kind == "python":
        return [sys.executable, str(HERE / "independent_server.py")]
    node = shutil.which("node")
    if node is None and os.environ.get("CI") == "true":
        pytest.fail("node is missing, and CI must have it: the other implementation of the protocol runs on it")
    if node is None:
        pytest.skip("node is missing")
    return [node, str(HERE / "independent_server.mjs")]


def state(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"applied": [], "connections": 0, "seen": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def has_applied(path: Path, count: int) -> bool:
    return len(state(path)["applied"]) >= count


def payload(i: int) -> Any:
    return [i, {"i": i, "text": "süß \u2028 \U0001f600"}, f"text {i}", None, [i, [i]], i / 7, -i, True, "", 2**53 - i][
        i % 10
    ]


@pytest.mark.parametrize("kind", ["python", "node"])
async def test_a_server_written_from_the_page_gets_every_message_once(tmp_path: Path, kind: str) -> None:
    """P3, P5: 5000 messages of five priorities, links cut twelve times and the server killed: once each, in order."""
    start, path = command(kind), tmp_path / "state.json"
    server = Process(tmp_path, "server0", [*start, str(path)])
    try:
        port = int(await asyncio.to_thread(server.first_line))
        retry = {"base_delay": 0.01, "max_delay": 0.05}
        settings: dict[str, Any] = {"reconnect": retry, "proxy": None, "delivery": {"rate_limit": 4000}}
        async with durablews.connect(f"ws://127.0.0.1:{port}/", tmp_path / "agent.db", **settings) as ws:

            async def send() -> None:
                for first in range(0, COUNT, 50):
                    for i in range(first, first + 50, 10):
                        await ws.send_many(
                            [payload(i + j) for j in range(10)], priority=(0, 1, -1, 50, -50)[i // 10 % 5]
                        )

            sending = asyncio.create_task(send())
            for number in range(1, RESTARTS + 1):
                done = len(state(path)["applied"])
                await until(partial(has_applied, path, min(done + 500, COUNT - 500)))
                server.kill()
                assert (await ws.stats()).pending > 0
                server = Process(tmp_path, f"server{number}", [*start, str(path), str(port)])
            await sending
            assert await ws.flush(DEADLINE), f"{await ws.stats()} {server.err.read_text()}"
            stats = await ws.stats()
            assert (stats.acked, stats.dead, stats.enqueued) == (COUNT, 0, COUNT)
            assert stats.connects >= 12
            assert stats.redelivered > 0
    finally:
        server.kill()
    found = state(path)
    assert found["connections"] >= 12
    by_priority: dict[int, list[Any]] = {}
    for i in range(COUNT):
        by_priority.setdefault((0, 1, -1, 50, -50)[i // 10 % 5], []).append(payload(i))
    for priority, expected in by_priority.items():
        assert [message for p, message in found["applied"] if p == priority] == expected
    assert len(found["applied"]) == COUNT


@pytest.mark.parametrize("kind", ["python", "node"])
async def test_bytes_and_topics_are_what_the_page_says(tmp_path: Path, kind: str) -> None:
    """Bytes go as base64, and a server that ignores what it does not know needs no topic or header."""
    path = tmp_path / "state.json"
    with Process(tmp_path, "server", [*command(kind), str(path)]) as server:
        port = int(await asyncio.to_thread(server.first_line))
        retry = {"base_delay": 0.01, "max_delay": 0.05}
        async with durablews.connect(
            f"ws://127.0.0.1:{port}/", tmp_path / "agent.db", reconnect=retry, proxy=None
        ) as ws:
            await ws.send(b"\x00\xff", topic="t", headers={"a": "b"})
            assert await ws.flush(DEADLINE)
    assert [message for _, message in state(path)["applied"]] == ["AP8="]
