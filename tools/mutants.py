"""Applies each mutant of ``tests/mutants.toml`` to a copy of the code and runs the tests that must find it.

A mutant is one thing broken on purpose: a text that stands exactly once in a file, and what stands there instead. It is
found when one of its tests fails on the copy; the same tests pass on the code as it is, which is tried first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from msgspec import Struct, convert

__all__ = ["KEPT", "Mutant", "broken", "failed", "matching", "read", "run"]

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "mutants.toml"
#: What must be kept, and so what each must have a mutant for: the promises, what the client and what the server owes.
KEPT = [f"{kind}{number}" for kind, last in (("P", 10), ("C", 10), ("S", 6)) for number in range(1, last + 1)]
#: Seconds after which a mutant counts as one that hangs: no test of those named takes a tenth of that.
_LIMIT = 300.0
#: pytest's exit codes: all passed, some failed.
_PASSED, _FAILED = 0, 1


class Mutant(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing broken."""

    name: str
    keeps: list[str]
    file: str
    old: str
    new: str
    tests: list[str]


def read(path: Path = LIST) -> list[Mutant]:
    """Return the mutants of the list."""
    return convert(tomllib.loads(path.read_text(encoding="utf-8"))["mutant"], list[Mutant])


def matching(mutants: Sequence[Mutant], words: Sequence[str]) -> list[Mutant]:
    """Return those that a word names, wholly or in part, or that break a promise or rule of that name."""
    if not words:
        return list(mutants)
    return [one for one in mutants if any(word in one.keeps or (len(word) > 3 and word in one.name) for word in words)]


def broken(mutant: Mutant, text: str) -> str:
    """Return the text of its file with the mutant in it.

    Raises:
        ValueError: what it replaces does not stand there exactly once: the code has changed, and the list must follow.
    """
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name}: the old text stands {count} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


def failed(tests: Sequence[str], mutant: Mutant | None = None) -> bool:
    """Run tests on a copy of the code, with a mutant in it, and return whether one of them failed.

    Raises:
        RuntimeError: they could not be run, or a test is not there; the message holds what pytest said.
    """
    with tempfile.TemporaryDirectory(prefix="durablews-mutant-") as folder:
        copy = Path(folder)
        for name in ("durablews", "migrations", "tests", "tools"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"):
            shutil.copy(ROOT / name, copy / name)
        if mutant is not None:
            path = copy / mutant.file
            path.write_text(broken(mutant, path.read_text(encoding="utf-8")), encoding="utf-8")
        # The copy comes before the checkout, which is installed as editable. The walks of the model are more here: some
        # of what is broken shows in one of thirty only.
        environment = {"DURABLEWS_TEST_WALKS": "150", **os.environ, "PYTHONPATH": folder}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests]
        try:
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=_LIMIT)
        except subprocess.TimeoutExpired:
            return True
    if done.returncode not in (_PASSED, _FAILED):
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == _FAILED


def run(mutants: Sequence[Mutant], *, at_a_time: int) -> list[str]:
    """Try every mutant; print and return what is wrong."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    wrong = []
    if failed(tests):
        wrong.append("some of the tests fail on the code as it is: they would find anything")
        print(wrong[-1], flush=True)
    with ThreadPoolExecutor(at_a_time) as threads:
        for fault in threads.map(partial(_try, width=max(len(one.name) for one in mutants)), mutants):
            wrong += [fault] if fault else []
    return wrong


def _try(mutant: Mutant, width: int) -> str | None:
    started = time.monotonic()
    try:
        fault = None if failed(mutant.tests, mutant) else f"{mutant.name}: NOT FOUND"
    except (RuntimeError, ValueError) as exc:
        fault = str(exc)
    took, what = time.monotonic() - started, "found" if fault is None else fault
    print(f"{','.join(mutant.keeps):<8} {mutant.name:<{width}} {took:5.1f} s  {what}", flush=True)
    return fault


def main() -> int:
    """Do as the arguments say; 1 when a mutant was not found, 2 when none has such a name."""
    parser = argparse.ArgumentParser(prog="tools/mutants", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="part of a name, or a promise or rule such as P5 or C8"
    )
    parser.add_argument("--list", action="store_true", help="show them, and run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time (%(default)s)")
    asked = parser.parse_args()
    mutants = matching(read(), asked.names)
    if not mutants:
        print("no mutant has such a name", file=sys.stderr)
        return 2
    if asked.list:
        for mutant in mutants:
            print(f"{','.join(mutant.keeps):<8} {mutant.name}: {mutant.file}, {' '.join(mutant.tests)}")
        return 0
    wrong = run(mutants, at_a_time=asked.jobs)
    print(f"{len(mutants)} mutants, {len(mutants) - sum('NOT FOUND' in fault for fault in wrong)} found")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
