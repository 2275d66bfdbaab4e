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

BENCH = Path(__file__).resolve().parents[1] / "tools" / "bench.py"

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
