"""Measures durablews against baselines on the same machine, in the same run, interleaved: only ratios mean anything.

Each row runs its baseline and durablews in turn, several rounds, and prints medians with the smallest and largest. The
files lie in a folder on the disk of `--folder` (default: the system's temporary folder), synced for real. A missed goal
is shown and changes no exit code: a benchmark is no test.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench_rows import ROWS, Row
from bench_servers import ServerFailed
from bench_table import Figures, Progress, compare, machine, print_rows
from bench_work import Failed, Work

from durablews.errors import DurablewsError

# What may go wrong with one row and leaves the others their figures.
_FAILURES = (Failed, ServerFailed, DurablewsError, OSError, subprocess.SubprocessError)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    rows = [row for row in ROWS if (row.name in args.only if args.only else args.long or not row.long)]
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="durablews-bench-") as folder:
        on = machine(Path(folder))
        results = _measure(rows, Path(folder), args)
    if args.json:
        shown = {
            row.name: {"failed": figures} if isinstance(figures, str) else figures.to_json(row)
            for row in rows
            for figures in [results[row.name]]
        }
        print(json.dumps({"machine": on, "scale": args.scale, "rows": shown}, indent=2))
    else:
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in on.items()))
        print_rows(rows, results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    names = [row.name for row in ROWS]
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME", help=f"measure this row only: {', '.join(names)}"
    )
    parser.add_argument(
        "--rounds", type=_count, default=3, help="rounds of baseline and durablews in turn (default: %(default)s)"
    )
    parser.add_argument("--long", action="store_true", help="measure depth as well, which fills 11 million rows first")
    parser.add_argument(
        "--rows", type=_count, help="how many wait for depth (default: 10000000), memory and inspect (1000000)"
    )
    parser.add_argument("--folder", help="where the files lie; its disk is what is measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object with all figures")
    # For the tests of this command: the figures of less work mean nothing.
    parser.add_argument("--scale", type=float, default=1.0, help=argparse.SUPPRESS)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _measure(rows: Sequence[Row], folder: Path, args: argparse.Namespace) -> dict[str, Figures | str]:
    """Measure the rows, all of them once in each round, and return what each gave, or why it gave nothing."""
    ours: dict[str, list[float]] = {row.name: [] for row in rows}
    baseline: dict[str, list[float]] = {row.name: [] for row in rows}
    failed: dict[str, str] = {}
    progress = Progress(sum(args.rounds * 2 + (row.prepare is not None) for row in rows))

    def work(row: Row, measured: Path) -> Work:
        kept = folder / row.name
        kept.mkdir(exist_ok=True)
        return Work(
            folder=measured,
            kept=kept,
            messages=max(1, int(row.messages * args.scale)),
            rows=max(args.rounds * 10, int((args.rows or row.rows) * args.scale)),
            rounds=args.rounds,
            say=lambda text: progress.say(f"{row.name}: {text}"),
        )

    try:
        for round_number in range(-1, args.rounds):  # round -1 prepares
            for row in rows:
                # The side that goes first changes, so that what the first one leaves behind favours neither.
                sides = [(baseline, row.baseline), (ours, row.ours)][:: -1 if round_number % 2 else 1]
                for results, measure in sides if round_number >= 0 else [(None, row.prepare)]:
                    if measure is None:
                        continue
                    progress.say(row.name)
                    if row.name not in failed:
                        try:
                            with tempfile.TemporaryDirectory(dir=folder) as measured:
                                figure = measure(work(row, Path(measured)))
                            if results is not None and figure is not None:
                                results[row.name].append(figure)
                        except _FAILURES as exc:
                            failed[row.name] = f"failed: {exc or type(exc).__name__}"
                    progress.step()
    finally:
        progress.end()
    return {row.name: failed.get(row.name) or compare(row, ours[row.name], baseline[row.name]) for row in rows}


if __name__ == "__main__":
    raise SystemExit(main())
