"""What a rule is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from msgspec import Struct

from durablews.places import Path

if TYPE_CHECKING:
    from durablews.analysis.subject import Subject

__all__ = ["Finding", "Problem", "Rule", "Severity", "score"]

#: "error": it will fail, or lose something. "warning": it will do worse than it could. "info": to be known.
Severity = Literal["error", "warning", "info"]

# 100, less so much for each: the rule of the other client's own analyser, so that its scores compare.
_PRICES = {"error": 20, "warning": 5, "info": 0}


class Problem(NamedTuple):
    """What a rule says of one setting. `severity` is that of the rule when None."""

    path: Path
    message: str
    severity: Severity | None = None


class Rule(Struct, frozen=True, kw_only=True):
    """One thing that is looked at.

    Attributes:
        code: ``DWS`` and three digits; the first of them names the part of a configuration.
        severity: what its findings are, unless they say otherwise.
        title: what is wrong, in a few words.
        why: what comes of it.
        sums: the arithmetic, as it is computed; empty where there is none.
        source: where rule and figures come from.
        judge: looks, and tells.
    """

    code: str
    severity: Severity
    title: str
    why: str
    sums: str = ""
    source: str
    judge: Callable[[Subject], Iterable[Problem]]


class Finding(Struct, frozen=True, kw_only=True):
    """One thing that is wrong, or to be known, with a configuration.

    Attributes:
        code: which rule; ``durablews explain CODE`` says why.
        severity: ``"error"``, ``"warning"`` or ``"info"``.
        setting: its name, such as ``heartbeat.interval``, as the file spells it.
        message: what, how much, and what to do.
        path: the file; None when the configuration came from no file.
        line: from 1 on; the first line where the setting is missing; None without a file.
        column: likewise.
    """

    code: str
    severity: Severity
    setting: str
    message: str
    path: str | None = None
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}:{self.column}: " if self.path is not None else ""
        return f"{where}{self.code} {self.severity}: {self.message}"


def score(findings: Sequence[Finding]) -> int:
    """Return 100, less 20 for each error and 5 for each warning; 0 at the least."""
    return max(0, 100 - sum(_PRICES[finding.severity] for finding in findings))
