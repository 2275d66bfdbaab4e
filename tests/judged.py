"""What the tests of the analyser share: a machine that they own, and fixtures that say what is known of the devices."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from durablews.analysis.findings import Finding
from durablews.analysis.judging import circumstances, judge
from durablews.analysis.subject import Subject
from durablews.configfile import read_config

__all__ = ["NOW", "FakeMachine", "findings_of", "fixture"]

#: 2026-11-22 20:30:00 UTC.
NOW = 1_795_379_400.0
RULES = Path(__file__).parent / "rules"


class FakeMachine:
    """A machine with an ordinary disk, whose every folder may be written to."""

    def __init__(self) -> None:
        self.environment: Mapping[str, str] = {}
        self.modes: dict[str, int] = {}
        self.file_systems: dict[str, str] = {}
        self.folders: dict[str, bool] = {}

    def now(self) -> float:
        return NOW

    def mode(self, path: str) -> int | None:
        return self.modes.get(path)

    def is_folder(self, path: str) -> bool:
        return self.folders.get(path) is None and path.endswith("/")

    def file_system(self, path: str) -> str | None:
        return self.file_systems.get(path, "ext4")

    def writable_folder(self, path: str) -> bool | None:
        return self.folders.get(path, True)


def fixture(name: str) -> list[Finding]:
    """Judge one of the files in ``tests/rules``; its lines that begin with ``#!`` say what is known besides.

    Flags of ``durablews check``, or ``environment NAME=TEXT``, ``mode FILE 0644``, ``file-system FILE TYPE``.
    """
    machine, known = FakeMachine(), {}
    path = RULES / name
    for line in path.read_text(encoding="utf-8").splitlines():
        match shlex.split(line.removeprefix("#!")) if line.startswith("#!") else []:
            case ["environment", variable]:
                machine.environment = dict([variable.split("=", 1)])
            case ["mode", file, mode]:
                machine.modes[file] = int(mode, 8)
            case ["file-system", file, kind]:
                machine.file_systems[file] = kind
            case flags:
                pairs = zip(flags[::2], flags[1::2], strict=True)
                known.update({flag.lstrip("-").replace("-", "_"): text for flag, text in pairs})
    if "fleet" in known:
        known["fleet"] = int(known["fleet"])
    return findings_of(path, machine, **known)


def findings_of(path: Path, machine: FakeMachine | None = None, **known: object) -> list[Finding]:
    """Judge a file on a machine of the test's own."""
    return judge(Subject(read_config(str(path)), circumstances(**known), machine or FakeMachine()))  # type: ignore[arg-type]
