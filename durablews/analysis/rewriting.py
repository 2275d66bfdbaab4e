"""Writes a configuration as an `agent.toml`. Values in, text out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from durablews.analysis.subject import span
from durablews.config import Settings, parse_duration, read_settings
from durablews.configfile import ConfigFile
from durablews.errors import ConfigError

__all__ = ["as_toml"]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_DURATION_TEXT = re.compile(r"\d+(\.\d+)?[smh]")
_DURATION = re.compile(r".*_(delay|timeout|age|interval|after)")


def as_toml(file: ConfigFile) -> str:
    """Return what a file says as TOML in the names of durablews, with units people can read.

    Raises:
        ConfigError: it holds a setting that cannot be used; nothing that was meant may be left out in silence.
    """
    read_settings(file.settings, Settings, "")
    settings = dict(file.settings)
    settings.setdefault("outbox", "agent.db")
    plain = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    tables = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    lines = [_pair(name, value) for name, value in plain.items()]
    for name, table in tables.items():
        lines += ["", f"[{_key(name)}]", *(_pair(key, value, table=name) for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _pair(name: str, value: Any, table: str | None = None) -> str:
    is_duration = table != "auth" and (_DURATION.fullmatch(name) or name in ("interval", "timeout"))
    if is_duration and isinstance(value, int | float) and not isinstance(value, bool):
        # With its unit, unless that rounds it: the file must say the same.
        value = text if _DURATION_TEXT.fullmatch(text := span(value)) and parse_duration(text) == value else value
    return f"{_key(name)} = {_value(value)}"


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _text(name)


def _value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(inner)}" for key, inner in value.items()) + " }"
    raise ConfigError(f"a {type(value).__name__} has no place in a configuration")


def _text(text: str) -> str:
    # A basic string of TOML is one of JSON, but for DEL, which must be escaped too.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
