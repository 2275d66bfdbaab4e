"""A configuration file: TOML, or JSON, or the JSON of a TypeScript client whose names many configurations use.

That client counts in milliseconds and keeps all its settings in one object: `REFERENCE` says what its names mean here.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from typing import Any, NoReturn

from msgspec import Struct

from durablews.errors import ConfigError
from durablews.places import Path, Place, Scan, scan_json, scan_toml

__all__ = ["REFERENCE", "REFERENCE_NAMES", "ConfigFile", "load", "read_config"]

# A configuration has some hundred bytes. What is larger is something else, and is not read.
_LARGEST = 1024 * 1024

#: What the other client calls a setting, what it is called here, and how many of its units are one of ours.
REFERENCE: dict[str, tuple[Path, int]] = {
    "url": (("url",), 0),
    "maxRetries": (("reconnect", "max_retries"), 0),
    "baseDelay": (("reconnect", "base_delay"), 1000),
    "maxDelay": (("reconnect", "max_delay"), 1000),
    "connectionTimeout": (("reconnect", "connect_timeout"), 1000),
    "heartbeatInterval": (("heartbeat", "interval"), 1000),
    "heartbeatTimeout": (("heartbeat", "timeout"), 1000),
    "maxMissedHeartbeats": (("heartbeat", "max_missed"), 0),
    "queueMaxSize": (("caps", "max_messages"), 0),
    "queueMaxAge": (("caps", "max_age"), 1000),
}
_AUTOMATIC = "autoReconnect"
#: All names of the other client.
REFERENCE_NAMES = (*REFERENCE, _AUTOMATIC)
_RETRIES: Path = ("reconnect", "max_retries")

_IGNORE = re.compile(r"#\s*durablews:\s*ignore\s*(?:\[([^\]]*)\])?", re.IGNORECASE)


class ConfigFile(Struct, frozen=True, kw_only=True):
    """What a file says, in the names of `Settings`; nothing is judged yet.

    Attributes:
        path: the file, as the caller named it.
        settings: nested names and values.
        places: where each of them stands.
        spelled: how the file spells a setting, where that is not its name here.
        ignored: the codes whose findings a comment switches off, by line; an empty set is all of them.
        is_reference: whether it is written in the names of `REFERENCE`.
    """

    path: str
    settings: dict[str, Any]
    places: dict[Path, Place]
    spelled: dict[Path, str]
    ignored: dict[int, frozenset[str]]
    is_reference: bool


def load(path: str) -> dict[str, Any]:
    """Return the settings of a file as nested names; `config.read_settings` judges them.

    Raises:
        ConfigError: it cannot be read, or is neither TOML nor JSON.
    """
    return read_config(path).settings


def read_config(path: str) -> ConfigFile:
    """Read a file. In a ``pyproject.toml`` the table ``[tool.durablews]`` counts.

    Raises:
        ConfigError: it cannot be read, is larger than 1 MiB, is neither TOML nor JSON, or is no table.
    """
    data = _bytes(path)
    # By its name; without one that tells, by its first character.
    begins = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    is_json = path.lower().endswith(".json") or (not path.lower().endswith(".toml") and begins.startswith(b"{"))
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: not {'JSON' if is_json else 'TOML'}: it is not UTF-8") from exc
    document, scan = _json(path, text) if is_json else _toml(path, text)
    places = dict(scan.places)
    if os.path.basename(path) == "pyproject.toml":
        document, places = _table_of_project(path, document, places)
    ignored = {
        line: frozenset(code.strip().upper() for code in (match[1] or "").split(",") if code.strip())
        for line, comment in scan.comments.items()
        if (match := _IGNORE.search(comment))
    }
    is_reference = any(name in document for name in REFERENCE_NAMES if name != "url")
    spelled: dict[Path, str] = {}
    if is_reference:
        document, places, spelled = _translated(path, document, places)
    return ConfigFile(
        path=path, settings=document, places=places, spelled=spelled, ignored=ignored, is_reference=is_reference
    )


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST + 1)
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "not a file name"
        raise ConfigError(f"{path}: {why}") from exc
    if len(data) > _LARGEST:
        raise ConfigError(f"{path}: larger than 1 MiB, so no configuration")
    return data


def _json(path: str, text: str) -> tuple[dict[str, Any], Scan]:
    def refuse(constant: str) -> NoReturn:
        raise ConfigError(f"{path}: not JSON: {constant} is no number of JSON")

    try:
        document = json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as exc:
        raise ConfigError(f"{path}: not JSON: {exc.msg} (at line {exc.lineno}, column {exc.colno})") from exc
    except (RecursionError, ValueError) as exc:  # a number of 5 000 digits
        raise ConfigError(f"{path}: not a configuration: nested too deeply, or a number without end") from exc
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must hold one object with settings, not {_kind(document)}")
    scan = scan_json(text)
    if scan.twice is not None:
        place = scan.places[scan.twice]
        what = f"{'.'.join(scan.twice)} is given twice (at line {place.line}, column {place.column})"
        raise ConfigError(f"{path}: {what}")
    return document, scan


def _kind(value: object) -> str:
    return {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _toml(path: str, text: str) -> tuple[dict[str, Any], Scan]:
    try:
        return tomllib.loads(text), scan_toml(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path}: not TOML: {exc}") from exc
    except (RecursionError, ValueError) as exc:
        raise ConfigError(f"{path}: not a configuration: nested too deeply, or a number without end") from exc


def _table_of_project(
    path: str, document: Mapping[str, Any], places: Mapping[Path, Place]
) -> tuple[dict[str, Any], dict[Path, Place]]:
    tool = document.get("tool", {})
    table = tool.get("durablews", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: tool.durablews must be a table")
    inside = {place[2:]: where for place, where in places.items() if place[:2] == ("tool", "durablews")}
    return table, inside


def _translated(
    file: str, document: Mapping[str, Any], places: Mapping[Path, Place]
) -> tuple[dict[str, Any], dict[Path, Place], dict[Path, str]]:
    """Put what the other client's names say under the names of `Settings`; leave what it does not know as it is."""
    settings: dict[str, Any] = {}
    moved: dict[Path, Place] = {}
    spelled: dict[Path, str] = {}

    def put(name: str, path: Path, value: Any) -> None:
        table = settings
        for step in path[:-1]:
            inner = table.get(step, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{file}: {step} must be a table of settings, not {_kind(inner)}")
            table[step] = table = dict(inner)
        if path[-1] in table and len(path) > 1 and path not in spelled:
            raise ConfigError(f"{file}: {name} and {'.'.join(path)} are the same setting; keep one of them")
        table[path[-1]] = value
        spelled[path] = name
        if (name,) in places:
            moved[path] = places[(name,)]

    for name, value in document.items():
        if name not in REFERENCE_NAMES:
            settings[name] = value
            moved.update({path: place for path, place in places.items() if path[0] == name})
    for name, (path, unit) in REFERENCE.items():
        if name in document:
            put(name, path, _in_units(document[name], unit))
    switch = document.get(_AUTOMATIC, True)
    if switch is False:  # here a link that is not to be made anew is one without retries
        put(_AUTOMATIC, _RETRIES, 0)
    elif switch is not True:
        settings[_AUTOMATIC] = switch  # no setting of ours: a finding
        moved[(_AUTOMATIC,)] = places.get((_AUTOMATIC,), Place(1, 1))
    return settings, moved, spelled


def _in_units(value: Any, unit: int) -> Any:
    """Return milliseconds as seconds; what is no number, or one that no float can hold, as it is."""
    if not unit or not isinstance(value, int | float) or isinstance(value, bool):
        return value
    try:
        return value / unit
    except OverflowError:
        return value
