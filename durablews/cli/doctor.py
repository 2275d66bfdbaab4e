"""``durablews doctor``: what ails an outbox, and a new one made of what can be read of a damaged one."""

from __future__ import annotations

import argparse
import sys

import msgspec

from durablews.carryover import Salvage
from durablews.cli.formats import Palette, count
from durablews.diagnosis import Diagnosis, diagnose
from durablews.errors import OutboxInUse, OutboxMissing
from durablews.ownership import holder_of
from durablews.salvage import is_interrupted, salvage
from durablews.visible import printable

__all__ = ["add_parser", "run"]

_STYLES = {"damage": ("red",), "warning": ("yellow",), "note": ("dim",)}

_EPILOG = """\
Without --salvage nothing is changed. With it, when the file is damaged, the file is moved aside whole, its log with it,
and a new outbox with everything that can be read takes its place: in its order, under a new stream, so that what was
sent and not answered may arrive twice. What cannot be trusted becomes a dead letter and is never sent; what is lost is
counted. End every program that uses the outbox before.

examples:
  durablews doctor agent.db
  durablews doctor agent.db --json | jq '.findings[] | select(.level != "note")'
  durablews doctor agent.db --salvage

exit codes: 0 healthy, or everything came over; 1 findings, or something is lost; 2 wrong usage; 3 the outbox is
missing, something else, locked or in use
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what ails an outbox, and salvage a damaged one",
        description="Say what ails an outbox and what to do about it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("outbox", metavar="OUTBOX", help="the outbox file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--salvage", action="store_true", help="make a new outbox of what can be read of a damaged one, which is kept"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was found or done, and return the exit code.

    Raises:
        OutboxError: there is nothing to look at, or it is in use.
    """
    if args.salvage:
        if (holder := holder_of(args.outbox)) is not None:
            raise OutboxInUse(args.outbox, holder)
        if is_interrupted(args.outbox):
            return _salvage(args)
    try:
        diagnosis = diagnose(args.outbox, progress=_progress)
    except OutboxMissing as exc:
        if is_interrupted(args.outbox):
            what = "the file is gone, and its log or what an interrupted salvage moved aside is here"
            raise OutboxMissing(args.outbox, f"{what}; run `durablews doctor {args.outbox} --salvage`") from exc
        raise
    finally:
        _progress("", 0, 0)
    if args.salvage and diagnosis.damaged:
        return _salvage(args)
    if args.json:
        _write(diagnosis, healthy=diagnosis.healthy)
    else:
        _print(diagnosis, salvage=args.salvage)
    return 0 if diagnosis.healthy else 1


def _salvage(args: argparse.Namespace) -> int:
    try:
        found = salvage(args.outbox, progress=_progress)
    finally:
        _progress("", 0, 0)
    if args.json:
        _write(found)
    else:
        _print_salvage(found)
    return 0 if found.lost == 0 and not found.damaged_count else 1


def _write(value: Diagnosis | Salvage, **more: object) -> None:
    print(msgspec.json.encode({**msgspec.to_builtins(value), **more}).decode())


def _print(diagnosis: Diagnosis, *, salvage: bool) -> None:
    paint = Palette(sys.stdout)
    for finding in diagnosis.findings:
        line = f"{paint(finding.level.ljust(8), *_STYLES[finding.level])}{finding.name}: {printable(finding.what)}"
        print(line + (f"; to do: {printable(finding.remedy)}" if finding.remedy else ""))
    if diagnosis.healthy:
        print(paint("healthy", "green"))
    elif salvage:
        print("nothing is damaged that a salvage would mend; nothing was touched")


def _print_salvage(found: Salvage) -> None:
    paint = Palette(sys.stdout)
    print(f"{count(found.carried)} entries came over into {printable(found.outbox)}, in order, under a new stream")
    if found.damaged_count:
        names = _names(found.damaged_entries, found.damaged_count)
        print(paint(f"{count(found.damaged_count)} of them are damaged: dead letters, never sent: {names}", "yellow"))
    if found.lost is None:
        at_least = f", at least {count(found.missing_count)}" if found.missing_count else ""
        print(paint(f"lost: unknown{at_least}; the file no longer says how many there were", "red"))
    else:
        print(paint(f"lost: {count(found.lost)}", "red" if found.lost else "green"))
    if found.missing_count:
        print(f"missing: {_names(found.missing, found.missing_count)}")
    if found.log_broken:
        print(f"its log had {count(found.log_broken)} damaged frames")
    if found.unreadable:
        print(f"could not be read: {', '.join(found.unreadable)}")
    print(f"the damaged file is kept whole: {printable(found.damaged)}")


def _names(named: list[int], number: int) -> str:
    return ", ".join(map(str, named)) + (", …" if number > len(named) else "")


def _progress(what: str, done: int, whole: int) -> None:
    if sys.stderr.isatty():
        share = f" {100 * done // whole}%" if whole else ""
        print(f"\r\x1b[K{what}{share}", end="", file=sys.stderr, flush=True)
