"""The command as a whole: its verbs, its exit codes, one line for what goes wrong; and how it writes figures."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import durablews
from durablews import cli, errors
from durablews.cli import formats
from durablews.visible import printable

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
COMMAND = [sys.executable, "-m", "durablews"]


def verb_that(act: Callable[[], int]) -> SimpleNamespace:
    return SimpleNamespace(add_parser=lambda subparsers: subparsers.add_parser("try"), run=lambda args: act())


def attempt(monkeypatch: pytest.MonkeyPatch, act: Callable[[], int]) -> int:
    monkeypatch.setattr(cli, "_VERBS", {"try": verb_that(act)})
    return cli.main(["try"])


def test_help_names_every_verb_example_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody who knows nothing finds the verbs, a line to try, and what the exit codes mean."""
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in ("inspect", "send", "run", "serve", "demo"):
        assert f"\n    {verb} " in text
        assert f"durablews {verb}" in text or verb == "serve"
    assert [line.split()[0] for line in text.partition("exit codes:\n")[2].splitlines()] == [*"01234", "130"]


@pytest.mark.parametrize("verb", ["inspect", "send", "run", "serve", "demo"])
def test_each_verb_has_its_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every verb explains itself and ends with 0."""
    assert cli.main([verb, "--help"]) == 0
    assert f"usage: durablews {verb}" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    """``durablews --version`` says which one runs."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"durablews {durablews.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["juggle"], ["inspect"], ["inspect", "a", "b"], ["send", "--nonsense"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It is said on stderr, and stdout stays empty for who reads data there."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: durablews")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 2),
        (errors.PayloadError("x"), 2),
        (errors.OutboxFull("a.db", "x"), 1),
        (errors.MessageTooLarge("a.db", "x"), 1),
        (errors.OutboxMissing("a.db", "x"), 3),
        (errors.NotAnOutbox("a.db", "x"), 3),
        (errors.OutboxTooNew("a.db", "x"), 3),
        (errors.OutboxLocked("a.db", "x"), 3),
        (errors.OutboxInUse("a.db", "pid 1"), 3),
        (errors.StorageFailed("a.db", "x"), 3),
        (PermissionError(13, "Permission denied", "a.db"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code_and_is_one_line(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A script can tell them apart, and a person reads one sentence, never a traceback."""

    def fail() -> int:
        raise error

    stdout = os.dup(1)
    try:
        assert attempt(monkeypatch, fail) == code
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    err = capfd.readouterr().err
    if isinstance(error, KeyboardInterrupt):
        assert err == ""
    else:
        assert (err.count("\n"), err.startswith("durablews: ")) == (1, True)


def test_an_error_that_nobody_expected_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of our own keeps its traceback."""

    def fail() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attempt(monkeypatch, fail)


def test_an_exit_code_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a verb returns is what the shell sees."""
    assert attempt(monkeypatch, lambda: 4) == 4


@pytest.mark.skipif(os.name != "posix", reason="closes standard streams by their numbers")
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_streams_are_no_fault(closed: tuple[int, ...]) -> None:
    """A service manager may start it without standard streams; it works, and says nothing."""

    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    done = subprocess.run([*COMMAND, "--version"], preexec_fn=close, capture_output=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_an_error(tmp_path: Path, unbuffered: str) -> None:
    """A report that was cut off by a full disk is not a success."""
    path = str(tmp_path / "agent.db")
    assert cli.main(["send", path, "1"]) == 0
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}
    for arguments in ([], ["--json"]):
        with open("/dev/full", "wb") as full:
            command = [*COMMAND, "inspect", path, *arguments]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, check=False)
        assert done.returncode == 3
        assert done.stderr.count(b"\n") == 1


def test_the_parser_needs_no_network_code() -> None:
    """``--help`` and completion do not load asyncio, aiosqlite or websockets."""
    program = (
        "import sys; from durablews.cli import build_parser; build_parser();"
        "print(sorted({'asyncio', 'aiosqlite', 'websockets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (185, "3 min 5 s"),
        (3599.9, "1 h"),
        (7440, "2 h 4 min"),
        (86400 * 9 + 3600 * 3 + 59, "9 d 3 h"),
    ],
)
def test_durations_are_short_and_carry_over(seconds: float, text: str) -> None:
    """Two units at most, and never sixty of one."""
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (10 * 1024, "10 KiB"),
        (10 * 1024 - 1, "10 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1024**2, "1.0 MiB"),
        (37 * 1024**2, "37 MiB"),
        (5000 * 1024**3, "5000 GiB"),
    ],
)
def test_sizes_are_short(number: int, text: str) -> None:
    """Binary units, as in the configuration; never 1024 of one."""
    assert formats.size(number) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 5, "0%"), (1, 10_000, "<0.1%"), (3, 1000, "0.3%"), (999, 1000, "99%"), (1000, 1000, "100%"), (3, 2, "150%")],
)
def test_full_is_said_of_what_is_full(part: int, whole: int, text: str) -> None:
    """Something is never shown as nothing, and nearly full never as full."""
    assert formats.share(part, whole) == text


def test_control_characters_are_escaped_and_letters_are_not() -> None:
    """What a person can read stays as it is."""
    assert printable("Zoë 漢 €") == "Zoë 漢 €"
    assert printable("a\x1b[31m\n\x9b\u202e\udcff") == "a\\x1b[31m\\n\\x9b\\u202e\\udcff"


def test_what_is_too_wide_is_cut_to_the_cell() -> None:
    """Wide letters count twice, and the ellipsis is part of the width."""
    assert formats.shorten("abcdef", 6) == "abcdef"
    assert formats.shorten("abcdefg", 6) == "abcde…"
    assert formats.shorten("漢字漢字", 6) == "漢字…"
    assert formats.width("漢a\u0301") == 3


def test_durations_on_the_command_line_are_those_of_the_configuration() -> None:
    """The same words mean the same in both."""
    assert formats.duration_argument("1.5h") == 5400
    with pytest.raises(argparse.ArgumentTypeError, match="30s"):
        formats.duration_argument("soon")


def test_colour_is_not_for_files() -> None:
    """What is no terminal gets plain text."""
    assert formats.Palette(io.StringIO())("x", "red") == "x"


@pytest.mark.parametrize("milliseconds", [-(2**62), 2**62, 0])
def test_any_time_can_be_shown(milliseconds: int) -> None:
    """A wall clock that was nonsense when a message was stored breaks nothing."""
    assert formats.moment(milliseconds)
