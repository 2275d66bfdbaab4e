"""What real network paths do to a connection: how long it may be silent, how long it may live, what it may carry.

The figures are in ``profiles.toml`` beside this module, each with its source. One without a source is not loaded.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from durablews.config import did_you_mean, parse_duration, parse_size
from durablews.errors import ConfigError

__all__ = ["Figure", "Profile", "parse_profiles", "profile_named", "profiles"]

_FILE = Path(__file__).with_name("profiles.toml")
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# How the text of each figure is read.
_READERS: dict[str, Callable[[str], float]] = {
    "idle_limit": parse_duration,
    "lifetime": parse_duration,
    "largest_message": parse_size,
}


class Figure(Struct, frozen=True):
    """A number, and who says so. Seconds or bytes."""

    value: float
    source: str


class Profile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One network path, as it is unless its owner has set it otherwise; None where it is not known to have a limit."""

    name: str
    title: str
    #: Seconds without a byte after which the connection is cut, or forgotten.
    idle_limit: Figure | None = None
    #: Seconds after which a connection is cut whatever it does.
    lifetime: Figure | None = None
    #: Bytes; a larger message closes the connection.
    largest_message: Figure | None = None
    #: Whether it is a proxy or a balancer that looks at what passes, and not a server or an address translator.
    proxy: bool = False


@cache
def profiles() -> dict[str, Profile]:
    """Return every profile by its name, in the order of the file.

    Raises:
        ConfigError: the file that came with durablews is not what it should be; says where.
    """
    return parse_profiles(_FILE.read_text(encoding="utf-8"))


def profile_named(name: str) -> Profile:
    """Return one profile.

    Raises:
        ConfigError: there is none of that name; says which there are.
    """
    known = profiles()
    if name in known:
        return known[name]
    hint = did_you_mean(name.lower(), known) or ";"
    raise ConfigError(f"there is no profile {name!r}{hint} there are: {', '.join(sorted(known))}")


def parse_profiles(text: str) -> dict[str, Profile]:
    """Return the profiles that a TOML text describes, by their names.

    Raises:
        ConfigError: it is not TOML, or a profile has no figure, or a figure no source; says which.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"profiles: not TOML: {exc}") from exc
    return {name: _profile(name, table) for name, table in document.items()}


def _profile(name: str, table: Any) -> Profile:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"profile {name!r}: a name is small letters, digits and single hyphens between them")
    if not isinstance(table, Mapping):
        raise ConfigError(f"profile {name}: must be a table")
    fields: dict[str, Any] = dict(table)
    given = [field for field in _READERS if field in fields]
    if not given:
        raise ConfigError(f"profile {name}: has no figure; give {', '.join(_READERS)}")
    for field in given:
        fields[field] = _figure(f"profile {name}, {field}", fields[field], _READERS[field])
    try:
        return msgspec.convert({**fields, "name": name}, Profile)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"profile {name}: {exc}") from None


def _figure(where: str, entry: Any, read: Callable[[str], float]) -> Figure:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("value"), str):
        raise ConfigError(f'{where}: must be {{ value = "60s", source = "who says so" }}')
    if unknown := set(entry) - {"value", "source"}:
        raise ConfigError(f"{where}: has a value and a source, not {', '.join(sorted(unknown))}")
    source = entry.get("source")
    if not isinstance(source, str) or not source.strip():
        raise ConfigError(f"{where}: has no source; a figure that nobody vouches for is not used")
    try:
        value = float(read(entry["value"]))
    except ConfigError as exc:
        raise ConfigError(f"{where}: {exc}") from None
    return Figure(value, source)
