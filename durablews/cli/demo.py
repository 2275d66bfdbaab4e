"""`durablews demo`: the promise, shown in 20 seconds.

Promises: it exits with 0 only when all that was sent has arrived once, whole and in order; nothing that it starts
outlives it; and it ends within a minute. What happens in it is in `play`.
"""

from __future__ import annotations

import argparse
import signal
from typing import TYPE_CHECKING, Any

from durablews.cli.formats import count
from durablews.visible import printable

if TYPE_CHECKING:
    from pathlib import Path

    from durablews.cli.evidence import Lines
    from durablews.cli.play import Play
    from durablews.cli.theatre import Timeline

__all__ = ["add_parser", "run"]

# Fewer, or faster, and there would not always be a thousand that wait.
_FEWEST, _MOST = 8000, 20_000
_FASTEST = 4000.0  # messages a second
#: Seconds after which the demo has failed, whatever it is waiting for.
_DEADLINE = 60.0
_ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

_EPILOG = """\
exit codes: 0 nothing was lost, nothing was applied twice and the order held; 1 it was not so, or not done in 60 s;
2 the file cannot be used; 130 Ctrl-C
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="show the promise in 20 seconds, on this machine alone",
        description="Start a server and an agent that sends it real lines, cut the link twice, kill each of the two"
        " with SIGKILL once, and compare what was sent with what arrived, byte for byte. Nothing leaves this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--file", metavar="FILE", help="send the lines of this file instead of the machine's own package list or log"
    )
    parser.add_argument(
        "--lines",
        type=_number,
        default=10_000,
        metavar="N",
        help=f"how many, {_FEWEST} to {_MOST}; a shorter source is repeated (default: %(default)s)",
    )
    parser.add_argument(
        "--pace",
        type=_pace,
        default=5.0,
        metavar="SECONDS",
        help="how long delivery takes while nothing is broken, 2 to 30 (default: %(default)g)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder with the outbox, the inbox and the logs")
    parser.set_defaults(run=run)


def _number(text: str) -> int:
    if not text.isdecimal() or not _FEWEST <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"a number of lines from {_FEWEST} to {_MOST}, not {text!r}")
    return int(text)


def _pace(text: str) -> float:
    try:
        if 2 <= (seconds := float(text)) <= 30:
            return seconds
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"a number of seconds from 2 to 30, not {text!r}")


def run(args: argparse.Namespace) -> int:
    """Play, and return 0 only when everything arrived once, whole and in order.

    Raises:
        ConfigError: the file cannot be used.
    """
    # Here, because no other verb should wait for them.
    import asyncio
    import shutil
    import tempfile
    from pathlib import Path

    from durablews.cli.evidence import lines_of, lines_of_this_machine
    from durablews.cli.play import Play
    from durablews.cli.theatre import Timeline

    timeline = Timeline()
    lines = lines_of(args.file, args.lines) if args.file is not None else lines_of_this_machine(args.lines)
    # As Ctrl-C: the processes and the folder go first.
    before = {number: signal.signal(number, signal.default_int_handler) for number in _ENDINGS}
    folder = Path(tempfile.mkdtemp(prefix="durablews-demo-"))
    keep = args.keep
    try:
        _announce(timeline, lines, folder, keep=keep)
        good = asyncio.run(_perform(Play(folder, lines.lines, timeline, rate=min(_FASTEST, args.lines / args.pace))))
        if not good and not keep:
            keep = True
            timeline.say(f"Everything is kept for a look: {folder}")
        return 0 if good else 1
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        timeline.clear()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(timeline: Timeline, lines: Lines, folder: Path, *, keep: bool) -> None:
    timeline.say(f"{count(len(lines.lines))} lines of {printable(lines.source)} go from an agent to a server.", "bold")
    if lines.own < len(lines.lines):
        timeline.say(f"It has {count(lines.own)}: they are repeated, cut short, with a number before each.")
    timeline.say("The link is cut twice, agent and server are killed once each, with 1,000 and more")
    timeline.say("messages waiting every time. None may be lost, applied twice or out of order.")
    timeline.say(f"Files: {folder}{'' if keep else ' (removed at the end; --keep keeps it)'}", "dim")
    timeline.say()


async def _perform(play: Play) -> bool:
    """Run the play to its end, or to what goes wrong, and leave no process behind."""
    import asyncio

    from durablews.cli.play import Failed

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in _ENDINGS:
        try:
            loop.add_signal_handler(number, _end, task)
        except NotImplementedError:
            pass  # Windows: the plain handler stays
    try:
        async with asyncio.timeout(_DEADLINE):
            return await play.perform()
    except TimeoutError:
        play.explain(f"not done after {_DEADLINE:g} s")
    except Failed as exc:
        play.explain(str(exc))
    return False


def _end(task: Any) -> None:
    task.cancel()
