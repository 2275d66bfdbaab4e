"""Drives one target of `fuzz_targets` with atheris: ``python tests/fuzz.py TARGET SECONDS FOUND CORPUS [libFuzzer's]``.

New inputs that reach new code go to the folder FOUND; one that breaks a target goes to ``FOUND/crash-...`` and ends it
with an exit code that is not 0. `tests/test_fuzz.py` runs all targets; ``DURABLEWS_FUZZ_SECONDS=3600`` makes it the
long form.
"""

from __future__ import annotations

import importlib
import os
import sys

atheris = importlib.import_module("atheris")  # it has no types, and is not everywhere

with atheris.instrument_imports(include=["durablews", "fuzz_targets", "fuzz_delivery"]):
    from fuzz_faults import plant_fault

    if fault := os.environ.get("DURABLEWS_FUZZ_FAULT"):
        plant_fault(fault)
    from fuzz_targets import TARGETS


def main() -> None:
    target, seconds, found, corpus, *more = sys.argv[1:]
    options = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={found}/",
        "-max_len=4096",
        "-timeout=20",
        "-rss_limit_mb=1024",
    ]
    atheris.Setup([sys.argv[0], *options, *more, found, corpus], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
