"""`durablews send`: what was given to it is in the outbox, whole lines and nothing else, or it says why not."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from durablews.database import create, open_outbox, wal_bytes
from durablews.entries import write_caps
from durablews.inspection import inspect
from durablews.ownership import Ownership
from durablews.upkeep import checkpoint_if_alone

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
COMMAND = [sys.executable, "-m", "durablews", "send"]
DEADLINE = 30.0


@pytest.fixture
def outbox(tmp_path: Path) -> str:
    return str(tmp_path / "agent.db")


def send(path: str, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
    done = subprocess.run([*COMMAND, path, *arguments], input=stdin, capture_output=True, env=ENVIRONMENT, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def rows(path: str, columns: str = "payload") -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute(f"SELECT {columns} FROM durablews_entries ORDER BY seq").fetchall()
    return [row[0] if len(row) == 1 else row for row in found]


def set_caps(path: str, **caps: Any) -> None:
    create(path)
    with closing(open_outbox(path)) as connection:
        write_caps(connection, caps)


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for a state of the file, as long as the process lives."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        assert process.poll() is None, "the command ended"
        time.sleep(0.005)


def test_a_message_is_stored_and_its_sequence_printed(outbox: str) -> None:
    """The outbox is created, and stdout has the sequence and nothing else."""
    assert send(outbox, '{"celsius": 21.4}') == (0, "1\n", "")
    assert send(outbox, "-5", "--priority", "high", "--topic", "t", "--ttl", "1.5h") == (0, "2\n", "")
    assert send(outbox, "[]", "--priority", "-100") == (0, "3\n", "")
    stored = rows(outbox, "payload, priority, topic, ttl")
    assert stored == [('{"celsius":21.4}', 0, None, None), ("-5", 1, "t", 5_400_000), ("[]", -100, None, None)]
    if os.name == "posix":
        assert os.stat(outbox).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_one_document_is_read_from_a_pipe(outbox: str, arguments: list[str]) -> None:
    """Without an argument the message is what standard input holds, over as many lines as it likes."""
    assert send(outbox, *arguments, stdin='\n{"name":\n "Zoë"}\n'.encode()) == (0, "1\n", "")
    assert rows(outbox) == ['{"name":"Zoë"}']


@pytest.mark.parametrize(
    ("argument", "stdin", "complaint"),
    [
        ("{'celsius': 21}", b"", "not JSON"),
        ("hello", b"", "a text needs its quotes: '\"hello\"'"),
        ('{"a": 1} {"b": 2}', b"", "not JSON"),
        ("NaN", b"", "not JSON"),
        ("1e999", b"", "not JSON"),
        ("[" * 100_000, b"", "not JSON"),
        ('"\\ud800"', b"", "not JSON"),
        ("", b"", "got nothing"),
        ("-", b"", "got nothing"),
        ("-", b" \n", "got nothing"),
        ("-", b'"\xff"', "not UTF-8"),
    ],
)
def test_what_is_not_json_is_not_stored(outbox: str, argument: str, stdin: bytes, complaint: str) -> None:
    """It is one clear line and exit code 2, and not even the file is made."""
    code, out, err = send(outbox, argument, stdin=stdin)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert complaint in err
    assert not os.path.exists(outbox)


@pytest.mark.parametrize(
    "arguments",
    [
        ["1", "--priority", "101"],
        ["1", "--ttl", "soon"],
        ["1", "--lines"],
        ["--lines", "--id", "x"],
        ["1", "--ttl", "0"],
    ],
)
def test_wrong_usage_stores_nothing(outbox: str, arguments: list[str]) -> None:
    """Arguments that make no sense are exit code 2 before anything is touched."""
    code, out, err = send(outbox, *arguments, stdin=b"line\n")
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert not os.path.exists(outbox)


def test_a_number_keeps_its_digits(outbox: str) -> None:
    """An integer that no machine word holds is stored whole."""
    assert send(outbox, "1" * 30) == (0, "1\n", "")
    assert rows(outbox) == ["1" * 30]


def test_an_id_is_stored_once(outbox: str) -> None:
    """A script that is not sure whether it sent something sends it again and gets the first one's sequence."""
    assert [send(outbox, "1", "--id", "boot-7")[1] for _ in range(3)] == ["1\n"] * 3
    assert rows(outbox) == ["1"]


@pytest.mark.parametrize(
    ("stdin", "stored"),
    [
        (b"", []),
        (b"\n", ['""']),
        (b"a", ['"a"']),
        (b"a\n", ['"a"']),
        (b"a\n\nb", ['"a"', '""', '"b"']),
        (b"\n\n\n", ['""', '""', '""']),
        (b"dos\r\nmac\rmac\n", ['"dos\\r"', '"mac\\rmac"']),
        ("Zoë \u2028 \x85 \x0c 漢\n".encode(), ['"Zoë \u2028 \x85 \\f 漢"']),
        (b"ok\n\xff\xfe\nok\n", ['"ok"', b"\xff\xfe", '"ok"']),
        (b"a\x00b\n", ['"a\\u0000b"']),
        (b'{"not": "parsed"}\n', ['"{\\"not\\": \\"parsed\\"}"']),
    ],
)
def test_each_line_is_a_message(outbox: str, stdin: bytes, stored: list[str | bytes]) -> None:
    """A line ends at a newline and nowhere else; it is a text, or bytes where it is not UTF-8; empty ones count."""
    code, out, err = send(outbox, "--lines", stdin=stdin)
    assert (code, out) == (0, "")
    assert err == f"{len(stored)} message{'' if len(stored) == 1 else 's'} stored\n"
    assert rows(outbox) == stored


def test_many_and_long_lines_go_through_whole(outbox: str) -> None:
    """Twenty thousand lines and lines longer than what is read at once arrive unchanged, in order."""
    lines = [f"line {n}" for n in range(20_000)]
    lines[77:77] = ["x" * 100_000, "ë" * 300_000, "", "y" * 700_000]
    code, _, err = send(outbox, "--lines", "--topic", "t", stdin="\n".join(lines).encode())
    assert (code, err) == (0, "20,004 messages stored\n")
    assert rows(outbox) == [f'"{line}"' for line in lines]
    assert set(rows(outbox, "topic")) == {"t"}


@pytest.fixture
def pipe(outbox: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*COMMAND, outbox, "--lines"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        bufsize=0,
    )
    with process:
        yield process
        process.kill()


def test_a_slow_pipe_is_stored_line_by_line(outbox: str, pipe: subprocess.Popen[bytes]) -> None:
    """A line is in the outbox when its newline was read, not when the pipe ends; what has no end yet waits."""
    assert pipe.stdin is not None
    for number in range(1, 4):
        pipe.stdin.write(f"{number}\nhal".encode())
        until(lambda number=number: os.path.exists(outbox) and len(rows(outbox)) == number, pipe)
        pipe.stdin.write(b"f\r")
    pipe.stdin.close()
    assert pipe.wait(DEADLINE) == 0
    assert rows(outbox) == ['"1"', '"half\\r2"', '"half\\r3"', '"half\\r"']


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_keeps_what_was_read(outbox: str, pipe: subprocess.Popen[bytes]) -> None:
    """Ctrl-C ends with 130, says how far it came, and has stored every whole line."""
    assert pipe.stdin is not None
    assert pipe.stderr is not None
    pipe.stdin.write(b"one\ntwo\nthr")
    until(lambda: os.path.exists(outbox) and len(rows(outbox)) == 2, pipe)
    pipe.send_signal(signal.SIGINT)
    assert pipe.wait(DEADLINE) == 130
    assert pipe.stderr.read() == b"2 messages stored; stopped at line 3\n"
    assert rows(outbox) == ['"one"', '"two"']


@pytest.mark.parametrize("at", [1, 2, 1234, 3999, 4001, 4999])
def test_a_full_outbox_stops_at_the_line_that_does_not_fit(outbox: str, at: int) -> None:
    """Everything before that line is stored, nothing after it, and the line is named; exit code 1."""
    set_caps(outbox, max_messages=5000, max_bytes=1_000_000)
    lines = ["line"] * 5000
    lines[at - 1] = "x" * 999_999
    code, out, err = send(outbox, "--lines", stdin="\n".join(lines).encode())
    assert (code, out) == (1, "")
    summary, error = err.splitlines()
    assert summary == f"{at - 1:,} message{'' if at == 2 else 's'} stored; stopped at line {at:,}"
    assert error.startswith(f"durablews: {outbox}: ")
    assert rows(outbox) == ['"line"'] * (at - 1)


def test_a_full_outbox_refuses_one_message(outbox: str) -> None:
    """Exit code 1, one line that tells the caps, no sequence."""
    set_caps(outbox, max_messages=1)
    assert send(outbox, "1")[0] == 0
    code, out, err = send(outbox, "2")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "1 of 1 messages" in err


def test_a_line_without_end_does_not_fill_the_memory(outbox: str) -> None:
    """A line over the byte cap is given up when it gets there, not when its newline comes."""
    set_caps(outbox, max_bytes=1_000_000)
    code, _, err = send(outbox, "--lines", stdin=b"first\n" + b"x" * 50_000_000)
    assert code == 1
    assert err.startswith("1 message stored; stopped at line 2\n")
    assert "line 2 is longer than the cap of 1000000 bytes" in err
    assert rows(outbox) == ['"first"']


def test_what_drop_new_drops_is_said(outbox: str) -> None:
    """Under drop_new the newest messages are counted, not stored, and that is no silent success."""
    set_caps(outbox, max_messages=3, overflow="drop_new")
    code, _, err = send(outbox, "--lines", stdin=b"1\n2\n3\n4\n5\n")
    assert (code, err) == (1, "3 messages stored, 2 dropped because the outbox is full (overflow is drop_new)\n")
    code, out, err = send(outbox, "6")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "dropped" in err
    assert inspect(outbox).departed.dropped_new == 3


def test_a_file_that_is_no_outbox_is_left_alone(tmp_path: Path) -> None:
    """A text, an empty file or a missing folder is exit code 3 and one line, and stays as it is."""
    text = tmp_path / "notes.txt"
    text.write_text("dear diary, " * 100)
    empty = tmp_path / "empty"
    empty.touch()
    for path in (text, empty, tmp_path / "no" / "such" / "folder.db", tmp_path):
        before = path.read_bytes() if path.is_file() else None
        code, out, err = send(str(path), "1")
        assert (code, out, err.count("\n")) == (3, "", 1)
        assert (path.read_bytes() if path.is_file() else None) == before
    assert sorted(os.listdir(tmp_path)) == ["empty", "notes.txt"]


def test_a_lock_is_waited_for(outbox: str) -> None:
    """Another program's transaction delays a message and does not lose it."""
    create(outbox)
    with closing(open_outbox(outbox)) as other:
        other.execute("BEGIN IMMEDIATE")
        process = subprocess.Popen([*COMMAND, outbox, "1"], stdout=subprocess.PIPE, env=ENVIRONMENT)
        with process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            other.execute("COMMIT")
            assert process.wait(DEADLINE) == 0
    assert rows(outbox) == ["1"]


def test_the_log_stays_short_without_a_drainer(outbox: str) -> None:
    """Fifty megabytes of lines leave a log of at most some megabytes at any time, though nobody drains."""
    largest = 0
    process = subprocess.Popen(
        [*COMMAND, outbox, "--lines"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    with process:
        assert process.stdin is not None
        for _ in range(500):
            process.stdin.write(b"x" * 100_000 + b"\n")
            largest = max(largest, wal_bytes(outbox))
        process.stdin.close()
        assert process.wait(DEADLINE) == 0
    assert len(rows(outbox, "seq")) == 500
    assert 4 * 2**20 < largest < 12 * 2**20


def test_the_log_is_the_drainers_work_where_there_is_one(outbox: str) -> None:
    """A checkpoint beside a drainer's could damage the log: it is done only by who holds the drainer's place."""
    create(outbox)
    with closing(open_outbox(outbox)) as connection:
        connection.execute("INSERT INTO durablews_outbox (payload) VALUES ('1')")
        right = Ownership(outbox)
        assert right.acquire() is None
        assert not checkpoint_if_alone(connection, outbox)
        assert wal_bytes(outbox) > 0
        right.release()
        assert checkpoint_if_alone(connection, outbox)
        assert wal_bytes(outbox) == 0
        assert right.acquire() is None  # it was given back
        right.release()


def test_a_reader_of_the_log_is_not_waited_for(outbox: str) -> None:
    """While somebody reads the log stays as it is, and the connection's patience for locks is what it was."""
    create(outbox)
    with closing(open_outbox(outbox)) as connection, closing(sqlite3.connect(outbox, isolation_level=None)) as reader:
        before = connection.execute("PRAGMA busy_timeout").fetchone()
        connection.execute("INSERT INTO durablews_outbox (payload) VALUES ('1')")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM durablews_entries").fetchall()
        connection.execute("INSERT INTO durablews_outbox (payload) VALUES ('2')")
        assert not checkpoint_if_alone(connection, outbox)
        assert connection.execute("PRAGMA busy_timeout").fetchone() == before


def test_sending_needs_no_network_code(outbox: str) -> None:
    """A shell script that sends in a loop does not load asyncio, aiosqlite or websockets each time."""
    program = (
        "import sys; from durablews.cli import main; code = main(['send', sys.argv[1], '1']);"
        "print(code, sorted({'asyncio', 'aiosqlite', 'websockets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, outbox], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.stdout, done.stderr) == ("1\n0 []\n", "")
