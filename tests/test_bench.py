"""`tools/bench` measures what it says: every row there is to be, with its goal, in a table and as JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from servers import ENVIRONMENT

TOOLS = Path(__file__).resolve().parents[1] / "tools"
BENCH = TOOLS / "bench.py"

#: What is to be measured, and how good it must be. None: no goal is set.
GOALS = {
    "sends": 0.60,
    "send-many": 0.80,
    "awaited": 0.60,
    "drain": 4.0,
    "drain-serve": None,
    "drain-single": 0.9,
    "online": 1.6,
    "depth": 0.9,
    "memory": 12.0,
    "inspect": 150.0,
    "ticker": 10.0,
    "wear-1": None,
    "wear-100": None,
    "wear-50ms": None,
    "wear-bulk": None,
}


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), "--folder", str(folder), *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    said = bench(folder, "--json", "--rounds", "1", *arguments)
    assert said.returncode == 0, said.stderr
    rows: dict[str, Any] = json.loads(said.stdout)["rows"]
    return rows


def test_every_row_is_measured_against_its_goal(tmp_path: Path) -> None:
    """Each row has a goal, a baseline of the same run, and says whether the goal is reached; a little work shows it."""
    rows = measured(tmp_path, "--long", "--scale", "0.01", "--rows", "2000")
    if shutil.which("cc") is None and os.environ.get("CI") != "true":
        assert "C compiler" in rows.pop("ticker")["failed"]
        rows["ticker"] = rows["sends"] | {"goal": GOALS["ticker"]}
    assert {name: row.get("goal") for name, row in rows.items() if "failed" not in row} == GOALS
    for name, row in rows.items():
        assert row["durablews"]["median"] > 0, name
        assert row["baseline"]["median"] > 0, name
        assert row["value"]["min"] <= row["value"]["median"] <= row["value"]["max"]
        assert row["reached"] in (True, False, None)


def test_one_row_is_a_table(tmp_path: Path) -> None:
    """`--only` measures what is named, and says with what and against what."""
    said = bench(tmp_path, "--only", "send-many", "--rounds", "1", "--scale", "0.01")
    assert said.returncode == 0
    assert "send-many" in said.stdout
    assert "executemany" in said.stdout
    assert "drain" not in said.stdout


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--rounds", "0"], ["--rows", "many"]])
def test_what_is_not_there_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    """An unknown row, no rounds, no number: wrong usage, and nothing measured."""
    said = bench(tmp_path, *arguments)
    assert (said.returncode, said.stdout) == (2, "")


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the benchmark's modules be imported, as they are when it runs."""
    monkeypatch.syspath_prepend(TOOLS)


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(
    ("name", "ours", "baseline", "value", "reached"),
    [
        ("drain", [300.0, 500.0, 800.0], [100.0, 100.0, 100.0], 5.0, True),
        ("drain", [300.0, 100.0, 800.0], [100.0, 100.0, 100.0], 3.0, False),
        ("online", [3.0, 1.5, 1.0], [1.0, 1.0, 1.0], 1.5, True),
        ("online", [3.0, 1.7, 1.0], [1.0, 1.0, 1.0], 1.7, False),
        ("memory", [40.0, 39.0, 90.0], [28.0, 28.0, 28.0], 12.0, True),
        ("memory", [41.0, 39.0, 90.0], [28.0, 28.0, 28.0], 13.0, False),
        ("drain-serve", [1.0, 1.0, 1.0], [2.0, 2.0, 2.0], 0.5, None),
    ],
)
def test_a_goal_is_judged_by_its_kind(
    name: str, ours: list[float], baseline: list[float], value: float, reached: bool | None
) -> None:
    """More is better for a rate, less for a latency and for memory; each round is compared with its own baseline."""
    from bench_rows import ROWS
    from bench_table import compare

    figures = compare(next(row for row in ROWS if row.name == name), ours, baseline)
    assert (figures.value.median, figures.reached) == (value, reached)


@pytest.mark.usefixtures("tools")
def test_every_peer_has_its_work_and_says_what_it_promises() -> None:
    """A peer of the table is one that can be run, and what it promises for a message that was put stands there."""
    from bench_peer_work import PEERS as WORK
    from bench_peers import PEERS

    assert {peer.name for peer in PEERS if peer.run is None} == set(WORK)
    assert all(peer.durability and peer.work for peer in PEERS)


def test_a_peer_that_is_not_there_costs_nobody_else_a_line(tmp_path: Path) -> None:
    """Without its server a peer is skipped with a word; durablews has its figures all the same."""
    (tmp_path / "bin").mkdir()
    command = [sys.executable, str(TOOLS / "bench_peers.py"), "--only", "durablews", "--only", "paho-c", "--json"]
    said = subprocess.run(
        [*command, "--folder", str(tmp_path), "--rounds", "1", "--messages", "200"],
        env={**ENVIRONMENT, "PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert said.returncode == 0, said.stderr
    peers = json.loads(said.stdout)["peers"]
    assert list(peers) == ["durablews", "paho-c"]
    assert peers["durablews"]["through_per_second"]["median"] > 0
    assert peers["paho-c"]["skipped"] == "cc is not installed (apt install gcc)"
