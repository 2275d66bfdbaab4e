"""What is broken on purpose is found, and nothing that was promised is left out. `tools/mutants` tries all of it."""

from __future__ import annotations

import os
import random
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

import mutants  # noqa: E402 - it stands beside the tools
import promises  # noqa: E402

LIST = mutants.read()
#: So many in each run, others each time; all of them take some minutes.
SAMPLE = 4
#: Found in a walk that comes late, and so only by `tools/mutants`.
SLOW = {"what is in flight may be dropped or expire", "what is new is sent before the welcome is on the medium"}


def test_every_mutant_still_applies() -> None:
    """What each replaces stands exactly once in the code, and each of its tests is there."""
    for mutant in LIST:
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        assert mutants.broken(mutant, text) != text
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert re.search(rf"def {name}\(", (ROOT / file).read_text(encoding="utf-8")), test
    assert len({mutant.name for mutant in LIST}) == len(LIST)


def test_a_mutant_that_no_longer_applies_is_said_so() -> None:
    """A text that is gone, or stands there twice, is an error and no mutant that happens to be found."""
    for text in ("", LIST[0].old * 2):
        with pytest.raises(ValueError, match=r"stands [02] times"):
            mutants.broken(LIST[0], text)


@pytest.mark.parametrize("kept", mutants.KEPT)
def test_every_promise_and_rule_has_a_mutant(kept: str) -> None:
    """Nothing that was promised, and nothing that either end owes, is left out."""
    assert [mutant.name for mutant in LIST if kept in mutant.keeps]


def test_some_mutants_are_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A few of the list, others in each run: each breaks its tests, which pass on the code as it is."""
    seed = int(os.environ.get("DURABLEWS_TEST_SEED") or random.randrange(2**32))
    print(f"DURABLEWS_TEST_SEED={seed}")  # noqa: T201 - pytest shows it on failure
    monkeypatch.delenv("DURABLEWS_TEST_SEED", raising=False)  # the walks of the model have seeds of their own
    monkeypatch.setenv("DURABLEWS_TEST_WALKS", "40")
    quick = [mutant for mutant in LIST if mutant.name not in SLOW]
    assert mutants.run(random.Random(seed).sample(quick, SAMPLE), at_a_time=2) == []


def test_every_promise_has_its_proofs() -> None:
    """`tools/promises` names at least two tests for each promise."""
    assert [promise for promise, tests in promises.proofs().items() if len(tests) < 2] == []


@pytest.mark.parametrize(
    ("docstring", "found"),
    [
        ("It holds (P2 to P5, P8).", {"P2", "P3", "P4", "P5", "P8"}),
        ("P10: salvaged.", {"P10"}),
        ("HTTP1 to P", set()),
    ],
)
def test_a_docstring_names_promises(docstring: str, found: set[str]) -> None:
    """Single ones and ranges are read, and nothing else."""
    assert promises.named(docstring) == found
