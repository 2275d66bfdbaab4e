"""`durablews inspect`: what a person at a terminal and a script behind a pipe get to see."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from durablews import cli
from durablews.cli import inspect as verb
from durablews.clock import SystemClock
from durablews.database import create, open_outbox
from durablews.entries import enqueue
from durablews.jobs import transaction
from durablews.messages import Refusal, draft
from durablews.ownership import Ownership
from durablews.settlement import refuse

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": ""}
HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\n\x9b31m\u202egnp.exe"


@pytest.fixture
def outbox(tmp_path: Path) -> str:
    path = str(tmp_path / "agent.db")
    create(path)
    return path


def store(path: str, *messages: Any, **options: Any) -> None:
    with closing(open_outbox(path)) as connection, transaction(connection):
        enqueue(connection, path, [[draft(message, **options) for message in messages]], clock=SystemClock())


def bury(path: str, seq: int, reason: str | None) -> None:
    with closing(open_outbox(path)) as connection, transaction(connection):
        assert refuse(connection, seq, Refusal("invalid", reason), 0)


def execute(path: str, sql: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(sql)


def shown(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["inspect", *arguments])
    sys.stdout.flush()
    out, err = capfd.readouterr()
    return code, out, err


def parsed(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code, out, err = shown(capfd, *arguments, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    return json.loads(out)


def test_json_is_one_object_with_the_promised_names(outbox: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Scripts find what the documentation lists, each time under the same name."""
    store(outbox, {"celsius": 21.4}, topic="t", priority="high")
    found = parsed(capfd, outbox)
    names = "outbox schema stream owner pending pending_bytes caps oldest_age dead departed enqueued redelivered"
    assert list(found) == [*names.split(), "file_bytes", "link", "entries"]
    assert list(found["caps"]) == ["max_messages", "max_bytes", "max_age", "overflow"]
    reasons = "acked refused expired expired_unanswered dropped dropped_unanswered dropped_new dead_dropped lost"
    assert list(found["departed"]) == reasons.split()
    assert list(found["link"]) == ["state", "since", "reason", "next_attempt", "blocked"]
    (entry,) = found["entries"]
    assert list(entry) == ["seq", "priority", "topic", "created_at", "age", "bytes", "transmissions", "state"]
    assert (found["outbox"], found["pending"], found["pending_bytes"], entry["bytes"]) == (outbox, 1, 17, 17)
    assert (entry["priority"], entry["state"]) == (1, "pending")
    assert found["owner"] is found["caps"]["max_age"] is None


def test_payloads_are_shown_only_when_asked_for(outbox: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What a message says stays hidden, also from --json and from one entry, unless --payload stands there."""
    store(outbox, {"secret": "hunter2"}, b"hunter2")
    for arguments in ([], ["--json"], ["1"], ["1", "--json"], ["--limit", "0"]):
        assert "hunter2" not in shown(capfd, outbox, *arguments)[1]
    first, second = parsed(capfd, outbox, "--payload")["entries"]
    assert first["payload"] == {"secret": "hunter2"}
    assert second["payload"] == {"base64": "aHVudGVyMg=="}
    assert '{"secret":"hunter2"}' in shown(capfd, outbox, "--payload")[1]
    assert '{"secret":"hunter2"}' in shown(capfd, outbox, "1", "--payload")[1]
    assert parsed(capfd, outbox, "1", "--payload")["payload"] == {"secret": "hunter2"}


def test_all_entries_are_the_same_shown_at_once_or_page_by_page(
    outbox: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--limit 0`` shows everything, as one valid object and one table, whatever the pages are."""
    store(outbox, *range(30), priority=-1)
    store(outbox, *range(30), priority=1)
    monkeypatch.setattr(verb, "_ONE_LOOK", 40)
    monkeypatch.setattr(verb, "_ROWS_TOGETHER", 7)
    order = [*range(31, 61), *range(1, 31)]
    for limit, expected in (("0", order), ("59", order[:59]), ("40", order[:40]), ("20", order[:20])):
        assert [entry["seq"] for entry in parsed(capfd, outbox, "--limit", limit)["entries"]] == expected
        _, out, _ = shown(capfd, outbox, "--limit", limit)
        listed = out.partition("state\n")[2].partition("\n\n")[0]
        assert [int(line.split()[0]) for line in listed.splitlines()] == expected
        assert ("more; --limit 0 shows all" in out) == (len(expected) < 60)
    assert parsed(capfd, outbox, "--limit", "0", "--topic", "none")["entries"] == []


def test_a_person_sees_what_matters(outbox: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The summary names counts, caps, age, link, drainer, dead letters and departures, and leaves out zeros."""
    _, out, _ = shown(capfd, outbox)
    assert "waiting   nothing" in out
    assert "DISCONNECTED: no program drains this outbox now" in out
    assert not any(word in out for word in ("dead", "left", "oldest", "drainer"))
    store(outbox, *range(3), topic="readings")
    bury(outbox, 2, "no such field")
    execute(outbox, "UPDATE durablews_caps SET max_messages = 4")
    execute(outbox, "UPDATE durablews_totals SET acked = 12345, expired = 2")
    execute(outbox, "UPDATE durablews_link SET state = 'RECONNECTING', reason = 'connection refused', since = 1")
    right = Ownership(outbox)
    assert right.acquire() is None
    _, out, _ = shown(capfd, outbox)
    right.release()
    assert "waiting   2 messages (50% of 4), 18 B (<0.1% of 1.0 GiB)" in out
    assert "RECONNECTING for" in out
    assert ": connection refused" in out
    assert f"drainer   pid {os.getpid()} on " in out
    assert "dead      1 message refused for good; see --dead" in out
    assert "left      12,345 acknowledged, 1 refused, 2 expired" in out
    _, out, _ = shown(capfd, outbox, "--dead")
    assert "invalid: no such field" in out


def test_a_table_is_aligned(outbox: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Columns stand under their names also where letters are two cells wide."""
    store(outbox, 1, topic="温度")
    store(outbox, 2, topic="temp", priority="low")
    lines = shown(capfd, outbox)[1].splitlines()[-3:]
    assert lines[0].split() == ["seq", "priority", "topic", "age", "bytes", "sent", "state"]
    assert lines[1].endswith("  pending")
    assert len(lines[1]) == len(lines[2]) - 2


@pytest.mark.parametrize("arguments", [[], ["--payload"], ["--limit", "0"], ["--dead"], ["1", "--payload"], ["2"]])
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_message_cannot_control_the_terminal(
    outbox: str, capfd: pytest.CaptureFixture[str], arguments: list[str], as_json: list[str]
) -> None:
    """Whatever topics, payloads, reasons and names hold, only visible characters and newlines are printed."""
    store(outbox, HOSTILE, topic=HOSTILE)
    store(outbox, HOSTILE, topic=HOSTILE)
    bury(outbox, 2, HOSTILE)
    with closing(sqlite3.connect(outbox, isolation_level=None)) as connection:
        connection.execute("UPDATE durablews_link SET reason = ?, blocked = ?, state = ?", (HOSTILE,) * 3)
    right = Ownership(outbox)
    assert right.acquire() is None
    code, out, err = shown(capfd, outbox, *arguments, *as_json)
    right.release()
    assert (code, err) == (0, "")
    assert [c for c in out if not c.isprintable() and c != "\n"] == []
    assert out.count("\n") < 25
    code, out, err = shown(capfd, f"{outbox}{HOSTILE}")
    assert (code, out) == (3, "")
    assert [c for c in err if not c.isprintable()] == ["\n"]


def test_an_entry_that_is_not_there_is_said(outbox: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Asking for a sequence that has left is exit code 1 and one line, with --json too."""
    for arguments in ([], ["--json"]):
        code, out, err = shown(capfd, outbox, "4711", *arguments)
        assert (code, out) == (1, "")
        assert err == f"durablews: {outbox}: there is no entry 4711; it has left, or never was\n"


@pytest.mark.parametrize(
    "arguments", [["--limit", "-1"], ["--limit", "x"], ["--priority", "101"], ["1", "--dead"], ["1", "--topic", "t"]]
)
def test_wrong_usage_is_exit_code_2(outbox: str, capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """What makes no sense is said, and nothing is shown."""
    code, out, err = shown(capfd, outbox, *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_what_is_no_outbox_is_one_line(
    tmp_path: Path, outbox: str, capfd: pytest.CaptureFixture[str], as_json: list[str]
) -> None:
    """Missing, empty, a text, a folder, another database, a newer schema: exit code 3, and none is touched."""
    empty, text, foreign = (tmp_path / name for name in ("empty", "notes.txt", "foreign.db"))
    empty.touch()
    text.write_text("dear diary, " * 100)
    execute(str(foreign), "CREATE TABLE t (a)")
    execute(outbox, "UPDATE durablews_meta SET schema = 9999")
    files = sorted(os.listdir(tmp_path))
    for path, complaint in (
        (str(tmp_path / "missing"), "there is no such outbox"),
        (str(empty), "an empty file"),
        (str(text), "not a SQLite database"),
        (str(foreign), "holds no durablews outbox"),
        (str(tmp_path), "a folder"),
        (outbox, "schema is 9999"),
    ):
        code, out, err = shown(capfd, path, *as_json)
        assert (code, out, err.count("\n")) == (3, "", 1)
        assert err.startswith(f"durablews: {path}: ")
        assert complaint in err
    assert sorted(os.listdir(tmp_path)) == files


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "durablews", "inspect", *arguments]
    return subprocess.run(
        command, env={**ENVIRONMENT, **environment}, capture_output=True, encoding="utf-8", check=False
    )


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_colour_is_for_terminals_and_never_with_no_color(outbox: str) -> None:
    """A terminal gets colour; a pipe, NO_COLOR and a dumb terminal get none; the words are the same."""
    import pty

    store(outbox, 1)

    def on_terminal(**environment: str) -> str:
        leader, follower = pty.openpty()
        command = [sys.executable, "-m", "durablews", "inspect", outbox, "--payload"]
        with subprocess.Popen(
            command, stdout=follower, stdin=follower, env={**ENVIRONMENT, "TERM": "xterm", **environment}
        ) as process:
            os.close(follower)
            output = b""
            while True:
                try:
                    chunk = os.read(leader, 65536)
                except OSError:  # Linux: the other end was closed
                    break
                if not chunk:
                    break
                output += chunk
            os.close(leader)
        assert process.returncode == 0
        return output.decode()

    assert "\x1b[" in on_terminal(NO_COLOR="")
    assert "\x1b" not in on_terminal(NO_COLOR="1")
    assert "\x1b" not in on_terminal(NO_COLOR="", TERM="dumb")
    assert "\x1b" not in run(outbox).stdout


def test_a_reader_that_has_seen_enough_ends_it_quietly(outbox: str) -> None:
    """``durablews inspect … | head -1`` says nothing on stderr, and its exit code is 0."""
    store(outbox, *range(20_000))
    for arguments in (["--json", "--limit", "0"], ["--limit", "0"]):
        command = [sys.executable, "-m", "durablews", "inspect", outbox, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.read(1)
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 0


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_nobody_to_read_is_no_fault(outbox: str, as_json: list[str]) -> None:
    """Output that is short enough to be flushed only at the end ends as quietly."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "durablews", "inspect", outbox, *as_json]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=ENVIRONMENT, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_json_is_utf8_and_text_is_readable_in_any_locale(outbox: str) -> None:
    """A C locale neither breaks the JSON nor the table."""
    store(outbox, "漢 \U0001f600", topic="Zoë")
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = run(outbox, "--json", "--payload", **ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["entries"][0]["payload"] == "漢 \U0001f600"
    done = run(outbox, "--payload", **ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Zo\\xeb" in done.stdout


def test_inspecting_needs_no_network_code(outbox: str) -> None:
    """It answers before asyncio alone would be loaded: neither that nor aiosqlite nor websockets is."""
    program = (
        "import sys; from durablews.cli import main; code = main(['inspect', sys.argv[1]]);"
        "print(code, sorted({'asyncio', 'aiosqlite', 'websockets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, outbox], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("0 []", "")


READER = """
import os, sys
from durablews import inspection, schema
schema.migrations = lambda known=schema.migrations(): known
if os.geteuid() == 0:
    inspection.inspect(sys.argv[1])  # loads what another user might not be able to read
    os.setuid(65534)
assert not os.access(os.path.dirname(sys.argv[1]), os.W_OK)
print(*(entry.seq for entry in inspection.inspect(sys.argv[1]).entries))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.skipif(os.name != "posix", reason="folders without write permission are POSIX")
def test_an_outbox_in_a_folder_that_cannot_be_written_is_read(open_folder: Path) -> None:
    """A clean outbox on a read-only medium or in another user's folder is shown, where SQLite alone refuses."""
    path = open_folder / "agent.db"
    create(str(path))
    store(str(path), 1, 2)
    path.chmod(0o644)
    open_folder.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 2\n", "")
