"""A hundred thousand messages and a thousand reconnects take no more memory, descriptors or disk than the first tenth.

``DURABLEWS_TEST_SOAK=1`` runs the long form of `tools/soak`: a million messages and ten thousand reconnects.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from servers import ENVIRONMENT

MESSAGES, RECONNECTS = (1_000_000, 10_000) if os.environ.get("DURABLEWS_TEST_SOAK") else (100_000, 1000)

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")


def soak(messages: int, reconnects: int, build: str = "genuine") -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("leaks.py")), "--build", build]
    command += ["--messages", str(messages), "--reconnects", str(reconnects)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=3600)
    print(done.stderr, done.stdout)  # noqa: T201 - pytest shows it on failure, and with -rP
    assert done.returncode in (0, 1), done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_nothing_grows_with_messages_and_reconnects(tmp_path: Path) -> None:
    """P6: resident memory, descriptors, threads, tasks and files are flat after the first tenth, at both ends."""
    assert soak(MESSAGES, RECONNECTS)["findings"] == []


@pytest.mark.parametrize(
    ("build", "messages", "reconnects", "part"),
    [("keeps_payloads", 50_000, 10, "messages"), ("keeps_links", 500, 200, "reconnects")],
)
def test_a_leak_is_found(build: str, messages: int, reconnects: int, part: str) -> None:
    """A build that keeps each payload, or each connection, grows, and the soak says so."""
    findings = soak(messages, reconnects, build)["findings"]
    assert any(found.startswith("client_rss") and found.endswith(part) for found in findings), findings
