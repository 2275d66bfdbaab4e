"""SIGKILL at random moments, hundreds of times: also while an outbox is opened, recovered, migrated and vacuumed.

``DURABLEWS_TEST_KILLS`` says how many, 300 unless it is set; ``DURABLEWS_TEST_SEED`` repeats the schedule (not the
scheduler). `killer` says how it is done, `broken_builds` what it has to find.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from killer import EVERY_PHASE
from servers import ENVIRONMENT

KILLS = int(os.environ.get("DURABLEWS_TEST_KILLS", "300"))
#: Seconds for a run that hangs: each of its waits has a deadline of its own.
DEADLINE = 300 + KILLS

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("DURABLEWS_TEST_SEED") or random.randrange(2**32))


def fight(folder: Path, *, seed: int, kills: int, build: str = "genuine") -> dict[str, Any]:
    """Run the killer, whose forks want a process without threads, and return its report."""
    command = [sys.executable, str(Path(__file__).with_name("killer.py")), "--folder", str(folder)]
    command += ["--kills", str(kills), "--seed", str(seed), "--build", build]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=DEADLINE)
    assert done.returncode in (0, 1), done.stderr
    assert done.stderr == ""
    print(done.stdout)  # noqa: T201 - pytest shows it on failure, and with -rP
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_hundreds_of_kills_lose_nothing_and_double_nothing(tmp_path: Path, seed: int) -> None:
    """P1, P2, P3, P4, P5, P9: what `send` confirmed arrives once, in order, however often either end is killed."""
    report = fight(tmp_path, seed=seed, kills=KILLS)
    assert report["findings"] == []
    assert report["kills"] >= KILLS
    assert set(report["during"]) >= EVERY_PHASE
    assert report["promised"] >= KILLS, "the harness: too little was sent to prove anything"
    assert report["redelivered"] > 0, "the harness: nobody was killed while something was unanswered"


@pytest.mark.parametrize(
    ("build", "findings"),
    [
        ("answers_early", "lost"),
        # The next frame may name what it has lost, and the receiver sees that by itself (PROTOCOL.md S3).
        ("acks_early", ("lost", "the receiver ended by itself")),
        ("deletes_on_sending", "lost"),
        ("reuses_sequences", "sequence"),
        ("forgets_to_raise", "sequence not raised"),
        ("applies_repeats", "twice"),
        # What it holds back for the lowest, it may pass over.
        ("sends_the_lowest_first", ("out of order", "lost")),
        ("migrates_piecemeal", "the agent ended by itself"),
    ],
)
def test_a_broken_build_is_found(tmp_path: Path, seed: int, build: str, findings: str | tuple[str, ...]) -> None:
    """The kills prove something: each of these builds loses, doubles, misnumbers or misorders, and they say so."""
    report = fight(tmp_path, seed=seed, kills=300, build=build)
    assert any(found.startswith(findings) for found in report["findings"]), report
