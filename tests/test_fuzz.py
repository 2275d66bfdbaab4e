"""Arbitrary bytes on every decoder, and on the two state machines behind them: a fuzzer that is led by coverage, and
the corpus that it found, replayed.

``DURABLEWS_FUZZ_SECONDS`` is how long each target is fuzzed; unless it is set, 15 s for the two decoders of the wire
and 2 s for each of the others. Two run at a time. ``DURABLEWS_TEST_SEED`` repeats a run; each prints its own.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzz_targets
import pytest
from fuzz_faults import FAULTS
from fuzz_targets import TARGETS
from servers import ENVIRONMENT

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
SEED = int(os.environ.get("DURABLEWS_TEST_SEED", random.randrange(1, 2**31)))
SECONDS = {name: 15 if name in ("json_frames", "msgpack_frames") else 2 for name in TARGETS}
if "DURABLEWS_FUZZ_SECONDS" in os.environ:
    SECONDS = dict.fromkeys(TARGETS, int(os.environ["DURABLEWS_FUZZ_SECONDS"]))


@pytest.fixture(scope="module")
def fuzzer() -> None:
    """There is atheris; without it a test is skipped, except in CI, which must have it."""
    if importlib.util.find_spec("atheris") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("atheris is missing, and CI must have it: tools/setup.sh says how it is installed")
        pytest.skip("atheris has no wheel here")


def fuzz(folder: Path, target: str, seconds: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Fuzz one target in a process of its own; what it finds lies in `folder`."""
    found = folder / target
    found.mkdir()
    command = [sys.executable, str(HERE / "fuzz.py"), target, str(seconds), str(found), str(CORPUS / target)]
    return subprocess.run(
        [*command, f"-seed={SEED}"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**ENVIRONMENT, **environment},
        timeout=seconds + 60,
    )


def inputs(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


def replay(target: str) -> None:
    for path in inputs(target):
        TARGETS[target](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_found_once_is_found_no_more(target: str) -> None:
    """Every input of the committed corpus: a frame, an answer or the one error, and every rule of the books kept."""
    assert len(inputs(target)) >= 24
    replay(target)


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_finds_a_fault(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is proven: with a fault in what a target is about, its corpus alone finds it."""

    def put(where: object, name: str, what: object) -> None:
        monkeypatch.setattr(where, name, what)
        if hasattr(fuzz_targets, name):  # it was imported by its name
            monkeypatch.setattr(fuzz_targets, name, what)

    FAULTS[target](put)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is, it is a finding
        replay(target)


def test_nesting_without_end_is_the_one_error() -> None:
    """A hundred thousand levels, in either encoding, in a known frame or in one of a later version."""
    for target, head, opening, rest in (
        ("json_frames", b'{"t":"push","d":', b"[", b""),
        ("json_frames", b'{"t":"later","d":', b'{"a":', b""),
        ("json_frames", b'{"t":', b"[", b""),
        ("msgpack_frames", b"\x82\xa1t\xa4push\xa1d", b"\x91", b"\xc0"),
        ("msgpack_frames", b"\x82\xa1t\xa5later\xa1d", b"\x81\xa1a", b"\xc0"),
        ("msgpack_frames", b"\x81\xa1t", b"\x91", b"\xc0"),
    ):
        TARGETS[target](head + opening * 100_000 + rest)


def test_the_fuzzer_finds_nothing(tmp_path: Path, fuzzer: None) -> None:
    """Each target is fuzzed for its time, from the corpus on; what breaks one is printed, and lies in a file."""
    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(TARGETS, pool.map(lambda name: fuzz(tmp_path, name, SECONDS[name]), TARGETS), strict=True))
    for target, process in done.items():
        runs = re.search(r"Done (\d+) runs", process.stderr + process.stdout)
        print(f"{target}: seed {SEED}, {runs[1] if runs else 'no'} runs")  # noqa: T201
        assert process.returncode == 0, f"{target}, seed {SEED}: {process.stdout[-2000:]}{process.stderr[-3000:]}"
        assert runs is not None
        assert int(runs[1]) > len(inputs(target))


def test_the_fuzzer_finds_a_fault(tmp_path: Path, fuzzer: None) -> None:
    """It is led by coverage, and finds what no input of the corpus shows: here from an empty one."""
    target = "receiver"
    found = tmp_path / target
    found.mkdir()
    (tmp_path / "empty").mkdir()
    command = [sys.executable, str(HERE / "fuzz.py"), target, "60", str(found), str(tmp_path / "empty")]
    environment = {**ENVIRONMENT, "DURABLEWS_FUZZ_FAULT": target}
    process = subprocess.run([*command, f"-seed={SEED}"], capture_output=True, env=environment, timeout=120)
    assert process.returncode != 0
    (crash,) = found.glob("crash-*")
    assert b"Error" in process.stderr + process.stdout
    TARGETS[target](crash.read_bytes())  # the library as it is takes it
