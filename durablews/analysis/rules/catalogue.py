"""All rules, by code."""

from __future__ import annotations

from collections.abc import Iterable

from durablews.analysis.findings import Rule
from durablews.analysis.rules import delivery, form, heartbeat, recommended, reconnection, security, storage
from durablews.config import did_you_mean
from durablews.errors import ConfigError

__all__ = ["RULES", "rule_named", "selected"]

_PARTS = (form, security, heartbeat, reconnection, storage, delivery, recommended)

RULES: dict[str, Rule] = {rule.code: rule for part in _PARTS for rule in part.RULES}


def rule_named(code: str) -> Rule:
    """Return one rule.

    Raises:
        ConfigError: there is no such code.
    """
    try:
        return RULES[code.strip().upper()]
    except KeyError:
        hint = did_you_mean(code.strip().upper(), RULES) or ";"
        raise ConfigError(f"there is no rule {code!r}{hint} `durablews check --list-rules` lists them") from None


def selected(codes: Iterable[str]) -> frozenset[str]:
    """Return the rules that these codes, or beginnings of codes such as ``DWS2``, name.

    Raises:
        ConfigError: one of them names none.
    """
    found: set[str] = set()
    for code in codes:
        matches = {known for known in RULES if known.startswith(code.strip().upper())} if code.strip() else set()
        found |= matches or {rule_named(code).code}
    return frozenset(found)
