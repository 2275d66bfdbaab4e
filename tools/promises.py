"""Lists the tests that prove each promise: those whose docstring names it, as P4, or within P2 to P5."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["PROMISES", "named", "proofs"]

TESTS = Path(__file__).resolve().parents[1] / "tests"
PROMISES = {
    "P1": "durable",
    "P2": "acked",
    "P3": "order",
    "P4": "identity",
    "P5": "once",
    "P6": "bounded",
    "P7": "unblocked",
    "P8": "never stuck",
    "P9": "upgrade",
    "P10": "salvage",
}

_NAMED = re.compile(r"\bP(10|[1-9])\b(?:\s+to\s+P(10|[1-9])\b)?")


def named(docstring: str) -> set[str]:
    """Return the promises that a docstring names."""
    ranges = [(int(first), int(last or first)) for first, last in _NAMED.findall(docstring)]
    return {f"P{number}" for first, last in ranges for number in range(first, last + 1)}


def proofs(folder: Path = TESTS) -> dict[str, list[str]]:
    """Return for each promise the ids of its tests, as pytest takes them."""
    found: dict[str, list[str]] = {promise: [] for promise in PROMISES}
    for path in sorted(folder.glob("test_*.py")):
        for name, docstring in _tests(ast.parse(path.read_text(encoding="utf-8"))):
            for promise in sorted(named(docstring)):
                found[promise].append(f"{folder.name}/{path.name}::{name}")
    return found


def _tests(module: ast.Module) -> Iterator[tuple[str, str]]:
    for node in module.body:
        is_test = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        if is_test or (isinstance(node, ast.ClassDef) and node.name.startswith("Test")):
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield node.name, ast.get_docstring(node) or ""


def main(asked: Sequence[str]) -> int:
    """Print them; 1 when a promise has none, 2 when there is no such promise."""
    unknown = [name for name in asked if name not in PROMISES]
    if unknown:
        print(f"no such promise: {', '.join(unknown)}; there are {', '.join(PROMISES)}", file=sys.stderr)
        return 2
    missing = 0
    for promise, tests in proofs().items():
        if not asked or promise in asked:
            print(f"{promise} {PROMISES[promise]}: {len(tests)}")
            print("".join(f"    {test}\n" for test in tests), end="")
            missing += not tests
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
