"""The command ``durablews``: its verbs, what it says when something is wrong, and its exit codes.

Each verb is a module with ``add_parser(subparsers)`` and ``run(args) -> exit code``. Nothing here loads asyncio or
websockets: verbs that need the network import them when they run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper

from durablews import __version__
from durablews.errors import ConfigError, DurablewsError, OutboxError, OutboxFull, PayloadError
from durablews.visible import printable

__all__ = ["build_parser", "main"]

# In the order of a newcomer's questions.
_NAMES = ("demo", "send", "inspect", "run", "check", "explain", "doctor", "serve")
_VERBS = {name: import_module(f"durablews.cli.{name}") for name in _NAMES}

_EPILOG = """\
examples:
  durablews demo                                     the promise, shown in 20 seconds
  durablews send agent.db '{"celsius": 21.4}'        store a message, online or not
  journalctl -f -o cat | durablews send agent.db --lines
  durablews inspect agent.db                         what waits, and how the link stands
  durablews run --url wss://example.com/ingest --outbox agent.db
  durablews check agent.toml                         what is wrong with a configuration, and why
  durablews doctor agent.db                          what ails an outbox; --salvage for a damaged one

exit codes:
  0    done
  1    not all of it: the outbox is full, there is no such entry, or check or doctor found something
  2    wrong usage, configuration or message
  3    the outbox is missing, not an outbox, too new, locked or in use, or its disk failed
  4    the network gave up
  130  ended by Ctrl-C
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="durablews",
        description="A durable outbox for WebSocket clients: a message is on disk before it is sent,"
        " and leaves only when the server has acknowledged it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"durablews {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in _VERBS.values():
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. What is expected to go wrong is one line on stderr."""
    _prepare_streams()
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read has seen enough, as `head` does.
        _discard_output()
        return 0
    except KeyboardInterrupt:
        return 130
    except DurablewsError as exc:
        _complain(str(exc))
        return _exit_code(exc)
    except OSError as exc:
        _discard_output()
        _complain(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc))
        return 3


def _prepare_streams() -> None:
    """Make stdout and stderr take whatever is printed: closed ones too, and characters that they cannot show."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Send what stdout still holds nowhere: Python would fail once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(what: str) -> None:
    print(f"durablews: {printable(what)}", file=sys.stderr)


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as exc:  # --help, --version and wrong usage have been answered
        return exc.code if isinstance(exc.code, int) else 0
    return int(_VERBS[args.verb].run(args))


def _exit_code(exc: DurablewsError) -> int:
    if isinstance(exc, ConfigError | PayloadError):
        return 2
    if isinstance(exc, OutboxFull):
        return 1
    return 3 if isinstance(exc, OutboxError) else 1
