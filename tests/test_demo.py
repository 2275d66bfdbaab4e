"""`durablews demo`: it ends well only when everything arrived, and leaves nothing behind."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from durablews import cli
from durablews.cli import evidence
from durablews.cli.evidence import Item, judge, lines_of, lines_of_this_machine, read_inbox
from durablews.cli.play import complaint
from durablews.cli.theatre import Timeline
from durablews.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
ODD = [
    b"",
    b"plain",
    "ünïcode ☃ \u2028".encode(),
    b"\xff\xfe not UTF-8",
    b"x" * 100_000,
    b"\x00\x1b[31m\r",
    b"  ",
    b"end",
]
FIGURES = re.compile(
    r"sent ([\d,]+)  applied ([\d,]+)  redelivered ([\d,]+)  lost ([\d,]+)  twice ([\d,]+)  seconds ([\d.]+)"
)


def start(folder: Path, *options: str, hooks: Path | None = None) -> subprocess.Popen[str]:
    """Start the command with `folder` as the place for temporary files."""
    paths = [str(hooks)] if hooks else []
    paths += [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "durablews", "demo", "--lines", "8000", "--pace", "2", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(folder), "PYTHONIOENCODING": "utf-8"},
        start_new_session=True,
    )


def actors(folder: Path) -> list[str]:
    """Return the processes that the demo has started in `folder` and that still run."""
    if Path("/proc/self/cmdline").exists():
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue  # it has ended
    else:
        found = subprocess.run(["ps", "-axo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in found if "durablews.cli.actors" in line and str(folder) in line]


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    """Look until it is so."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def figures(line: str) -> tuple[int, ...]:
    """Return the whole numbers of the last line."""
    found = FIGURES.fullmatch(line)
    assert found is not None, line
    return tuple(int(found[number].replace(",", "")) for number in range(1, 6))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str, str]:
    """One performance with odd lines: where, exit code, standard output, standard error."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "odd.txt").write_bytes(b"\n".join(ODD))
    process = start(folder, "--file", str(folder / "odd.txt"), "--keep")
    out, err = process.communicate(timeout=100)
    return folder, process.returncode, out, err


def test_nothing_is_lost_or_applied_twice(played: tuple[Path, int, str, str]) -> None:
    """P3, P5: the last line says so, and so does the exit code."""
    _, code, out, err = played
    assert (code, err) == (0, ""), out
    sent, applied, redelivered, lost, twice = figures(out.splitlines()[-1])
    assert sent == applied == 8003  # three alarms
    assert (lost, twice) == (0, 0)
    assert redelivered >= 4  # each break had some that were applied and not answered


def test_the_link_is_cut_twice_and_each_process_killed_once_with_a_thousand_waiting(
    played: tuple[Path, int, str, str],
) -> None:
    """Every break is one that the promise is about: messages wait, and some are applied and not answered."""
    _, _, out, _ = played
    breaks = re.findall(
        r"^ *[\d.]+ s  (LINK CUT|AGENT KILLED|SERVER KILLED) .* ([\d,]+) waiting\n +([\d,]+) were", out, re.M
    )
    assert [what for what, *_ in breaks] == ["LINK CUT", "AGENT KILLED", "LINK CUT", "SERVER KILLED"]
    assert all(int(waiting.replace(",", "")) >= 1000 for _, waiting, _ in breaks)
    assert all(int(doubtful.replace(",", "")) >= 1 for *_, doubtful in breaks)
    assert "\x1b" not in out  # no terminal, no colour


def test_lines_arrive_byte_for_byte(played: tuple[Path, int, str, str]) -> None:
    """Empty, without UTF-8, with control characters, 100 kB long, without an end: a line is its bytes."""
    folder, _, out, _ = played
    assert "It has 8: they are repeated" in out
    (store,) = folder.glob("durablews-demo-*/inbox.db")
    normal = [item.payload for item in read_inbox(str(store)) if item.priority == 0]
    assert normal[: len(ODD)] == ODD
    assert normal == lines_of(str(folder / "odd.txt"), 8000).lines


def test_no_process_is_left(played: tuple[Path, int, str, str]) -> None:
    """What the demo started has ended when it ends."""
    assert actors(played[0]) == []


def test_a_receiver_that_loses_and_repeats_is_found_out(tmp_path: Path) -> None:
    """The demo can fail: with a server that drops some messages and keeps others twice it ends with 1, and says so."""
    (tmp_path / "sitecustomize.py").write_text(
        "from durablews.receiver import inbox\n"
        "make = inbox.keeper\n"
        "def keeper():\n"
        "    keep = make()\n"
        "    def broken(connection, stream, priority, items):\n"
        "        keep(connection, stream, priority, [i for i in items if int(i.meta.topic) % 1000 != 7])\n"
        "        keep(connection, stream, priority, [i for i in items if int(i.meta.topic) % 1000 == 8])\n"
        "    return broken\n"
        "inbox.keeper = keeper\n"
    )
    process = start(tmp_path, hooks=tmp_path)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 1, out
    *_, lost, twice = figures(next(line for line in out.splitlines() if line.startswith("sent ")))
    assert (lost, twice) == (8, 8)  # 7 to 7007 and 8 to 7008: there are 8003
    assert "NOT THE SAME: 8 lost, 8 applied twice" in out
    assert [path.name for path in tmp_path.glob("durablews-demo-*")]  # to be looked at


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["", "server started", "LINK CUT", "AGENT KILLED"])
def test_an_interrupted_demo_cleans_up(number: signal.Signals, moment: str, tmp_path: Path) -> None:
    """Ctrl-C ends both processes, removes the folder and is exit code 130, whenever it comes."""
    process = start(tmp_path)
    assert process.stdout is not None
    while moment not in process.stdout.readline():
        assert process.poll() is None
    wait_for(lambda: list(tmp_path.iterdir()) != [])
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    # While asyncio is still being set up it leaves a warning about itself behind.
    assert err == "" or not moment
    assert actors(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_demo_leaves_no_process(tmp_path: Path) -> None:
    """Its processes see that it is gone, and go."""
    process = start(tmp_path)
    wait_for(lambda: len(actors(tmp_path)) == 2)
    process.kill()
    process.communicate(timeout=20)
    wait_for(lambda: actors(tmp_path) == [])


def test_a_process_that_dies_by_itself_is_reported(tmp_path: Path) -> None:
    """Exit code 1, the reason and its last words on standard error."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nif 'agent' in sys.orig_argv: sys.exit('out of coffee')\n")
    process = start(tmp_path, hooks=tmp_path)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "durablews demo: the agent did not start\n" in err
    assert re.search(r"^  agent: .*out of coffee$", err, re.M)
    assert actors(tmp_path) == []


SENT = [Item("1", 0, b"a"), Item("2", 0, b"b"), Item("3", 1, b"!"), Item("4", 0, b"a")]
ONE, TWO, ALARM, FOUR = SENT


@pytest.mark.parametrize(
    "arrived", [[ONE, TWO, ALARM, FOUR], [ALARM, ONE, TWO, FOUR], [ONE, TWO, FOUR, ALARM], [ONE, ALARM, TWO, FOUR]]
)
def test_all_of_it_once_and_in_order_is_good(arrived: list[Item]) -> None:
    """The order is that of each priority: between two of them there is none to keep."""
    verdict = judge(SENT, arrived)
    assert verdict.good
    assert complaint(verdict) == ""
    assert verdict.overtaken == (SENT.index(ALARM) - arrived.index(ALARM) if arrived.index(ALARM) < 2 else 0)


@pytest.mark.parametrize(
    ("arrived", "what"),
    [
        ([], "4 lost"),
        ([ONE, ALARM, FOUR], "1 lost"),
        ([ONE, TWO, ALARM], "1 lost"),
        ([ONE, TWO, ALARM, FOUR, ONE], "1 applied twice"),
        ([ONE, ONE, TWO, ALARM, ALARM, FOUR], "2 applied twice"),
        ([TWO, ONE, ALARM, FOUR], "1 out of order"),
        ([ONE, FOUR, ALARM, TWO], "1 out of order"),
        ([ONE, Item("2", 0, b"B"), ALARM, FOUR], "1 with other bytes"),
        ([ONE, TWO, Item("3", 0, b"!"), FOUR], "1 with other bytes"),
        ([ONE, TWO, ALARM, FOUR, Item("9", 0, b"a")], "1 never sent"),
        # Equal lines are told apart: one lost and the other there twice is not nothing.
        ([ONE, TWO, ALARM, ONE], "1 lost, 1 applied twice"),
    ],
)
def test_a_loss_a_repeat_or_a_swap_is_a_failure(arrived: list[Item], what: str) -> None:
    """The verdict names what is wrong, and nothing else."""
    verdict = judge(SENT, arrived)
    assert not verdict.good
    assert complaint(verdict) == what


def test_a_short_file_is_repeated_with_numbers(tmp_path: Path) -> None:
    """Its own lines come first as they are; repeats are numbered and cut, so that they stay small."""
    path = tmp_path / "short"
    path.write_bytes(b"one\n\n" + b"y" * 1000 + b"\n")
    lines = lines_of(str(path), 7)
    assert lines.own == 3
    assert lines.lines[:5] == [b"one", b"", b"y" * 1000, b"4: one", b"5: "]
    assert lines.lines[5] == b"6: " + b"y" * 200
    assert len(lines.lines) == 7


def test_a_long_file_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of what was read may be half of one, and is left out."""
    monkeypatch.setattr(evidence, "_MOST_BYTES", 10)
    path = tmp_path / "long"
    path.write_bytes(b"12345\n67890\nabc\n")
    assert lines_of(str(path), 1).lines == [b"12345"]
    assert lines_of(str(path), 2).lines == [b"12345", b"2: 12345"]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [(b"", "it is empty"), (b"a\n" + b"z" * 200_000, "line 2 has 200,000 bytes"), (None, "No such file")],
)
def test_a_file_that_cannot_be_sent_is_wrong_usage(
    data: bytes | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 before anything is started."""
    path = tmp_path / "lines"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=complaint):
        lines_of(str(path), 5000)
    assert cli.main(["demo", "--file", str(path)]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--lines", "10"], ["--lines", "many"], ["--pace", "1"], ["--pace", "nan"]])
def test_too_little_is_no_demonstration(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A thousand must wait at each break, for long enough to be seen: other numbers are wrong usage."""
    assert cli.main(["demo", *options]) == 2
    assert "usage: durablews demo" in capsys.readouterr().err


def test_every_machine_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no log and no list of packages, this Python's sources are lines too."""
    assert len(lines_of_this_machine(5000).lines) == 5000
    monkeypatch.setattr(evidence, "_sources", lambda: iter([("/var/log/syslog", b"a\nb\n")]))
    lines = lines_of_this_machine(5000)
    assert lines.source == "the sources of this Python"
    assert lines.own == 5000


class Screen(io.StringIO):
    """A terminal that remembers."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_that_is_redrawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events go above the bar; it is taken away in the end, and NO_COLOR is respected."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Screen())
    timeline = Timeline()
    timeline.backlog(500, 1000, 20, 5000, flows=True)
    timeline.event("LINK CUT", "now", "red")
    drawn = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert re.fullmatch(r"(\r\x1b\[K[^\r]*){2}", drawn)
    assert "\x1b[31mLINK CUT" in drawn
    assert drawn.count("500 waiting") == 2
    timeline.clear()
    assert sys.stdout.getvalue().endswith("\r\x1b[K")  # type: ignore[attr-defined]

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", Screen())
    Timeline().backlog(500, 1000, 20, 5000, flows=False)
    plain = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert "500 waiting" in plain
    assert "m" not in plain.replace("acknowledged", "").replace("waiting", "")
