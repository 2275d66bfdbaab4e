"""Findings as people and machines read them: text, JSON, GitHub's annotations, SARIF. Values in, text out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from durablews.analysis.findings import Finding, Rule, score

__all__ = ["as_github", "as_json", "as_sarif", "as_text", "explained", "summary"]

_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"
_SARIF_LEVELS = {"error": "error", "warning": "warning", "info": "note"}
_GITHUB_LEVELS = {"error": "error", "warning": "warning", "info": "notice"}


def summary(findings: Sequence[Finding]) -> str:
    """Return the line at the end: ``score 75 of 100: 1 error, 1 warning, 2 notes``."""
    counts = Counter[str](finding.severity for finding in findings)
    words = [
        f"{counts[severity] or 'no'} {word}{'' if counts[severity] == 1 else 's'}"
        for severity, word in (("error", "error"), ("warning", "warning"), ("info", "note"))
    ]
    return f"score {score(findings)} of 100: {', '.join(words)}"


def as_text(findings: Sequence[Finding]) -> str:
    """Return a line for each finding, as compilers write them."""
    return "".join(f"{finding}\n" for finding in findings)


def as_json(findings: Sequence[Finding], more: Mapping[str, Any]) -> str:
    """Return one object: the score, the findings, and whatever else was asked for."""
    document = {"score": score(findings), "findings": [msgspec.to_builtins(finding) for finding in findings], **more}
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n"


def as_github(findings: Sequence[Finding]) -> str:
    """Return workflow commands, which GitHub shows beside the lines of a pull request."""
    return "".join(
        f"::{_GITHUB_LEVELS[finding.severity]} file={_escaped(finding.path or '', more=':,')},line={finding.line or 1},"
        f"col={finding.column or 1},title={finding.code}::{_escaped(finding.message)}\n"
        for finding in findings
    )


def _escaped(text: str, more: str = "") -> str:
    """Escape what ends a command or one of its properties (docs.github.com, workflow commands)."""
    for character in "%\r\n" + more:  # the percent sign first: it is what the others become
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def as_sarif(findings: Sequence[Finding], rules: Sequence[Rule], version: str) -> str:
    """Return a SARIF 2.1.0 log, for tools that gather findings."""
    index = {rule.code: number for number, rule in enumerate(rules)}
    results = [
        {
            "ruleId": finding.code,
            "ruleIndex": index[finding.code],
            "level": _SARIF_LEVELS[finding.severity],
            "message": {"text": finding.message},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": quote((finding.path or "").replace("\\", "/"))},
                        "region": {"startLine": finding.line or 1, "startColumn": finding.column or 1},
                    }
                }
            ],
        }
        for finding in findings
    ]
    driver = {
        "name": "durablews",
        "version": version,
        "rules": [
            {
                "id": rule.code,
                "shortDescription": {"text": rule.title},
                "fullDescription": {"text": rule.why},
                "defaultConfiguration": {"level": _SARIF_LEVELS[rule.severity]},
            }
            for rule in rules
        ],
    }
    log = {"$schema": _SARIF, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
    return msgspec.json.format(msgspec.json.encode(log), indent=2).decode() + "\n"


def explained(rule: Rule) -> str:
    """Return a rule for people: what is wrong, why that matters, the arithmetic, and where it comes from."""
    parts = [f"{rule.code} {rule.severity}: {rule.title}", rule.why]
    if rule.sums:
        parts.append(f"The sum: {rule.sums}")
    parts.append(f"Source: {rule.source}")
    return "\n\n".join(parts) + "\n"
