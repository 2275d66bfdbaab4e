"""One configuration as the rules see it: its settings one by one, and what its owner knows besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Struct

from durablews.analysis.fleet import Outage
from durablews.analysis.load import MAX_BYTES, MAX_MESSAGES, Load
from durablews.analysis.profiles import Profile
from durablews.analysis.surroundings import Surroundings
from durablews.config import CapsConfig, Settings, read_settings
from durablews.configfile import ConfigFile
from durablews.errors import ConfigError
from durablews.places import Path, Place

__all__ = ["Circumstances", "Rejected", "Subject", "span"]


class Circumstances(Struct, frozen=True, kw_only=True):
    """What the owner knows of the devices.

    Attributes:
        profile: the path to the server.
        load: what they send, and over what.
        fleet: how many there are, and what the server takes after an outage.
        stale_after: seconds after which the server's side must know that a device is gone.
    """

    profile: Profile | None = None
    load: Load = Load()
    fleet: Outage | None = None
    stale_after: float = 120.0


class Rejected(NamedTuple):
    """A value that cannot be used, and why not."""

    value: Any
    message: str


class _AsGiven(Settings, frozen=True, kw_only=True):
    """Settings that may contradict one another: that is what the rules are to find."""

    def __post_init__(self) -> None:
        pass


class Subject:
    """A configuration to be judged.

    Args:
        file: what it says.
        circumstances: what its owner knows.
        surroundings: the machine.

    Attributes:
        settings: what it comes to; a value that cannot be used counts as not given.
        given: each setting that it names.
        rejected: each value that cannot be used.
    """

    def __init__(self, file: ConfigFile, circumstances: Circumstances, surroundings: Surroundings) -> None:
        self.file = file
        self.profile = circumstances.profile
        self.load = circumstances.load
        self.fleet = circumstances.fleet
        self.stale_after = circumstances.stale_after
        self.surroundings = surroundings
        self.given: set[Path] = set()
        self.rejected: dict[Path, Rejected] = {}
        self.settings = _AsGiven(**self._read(file.settings))

    def _read(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for field in msgspec.structs.fields(Settings):
            value = settings.get(field.name)
            is_table = isinstance(field.type, type) and issubclass(field.type, Struct)
            if is_table and isinstance(value, Mapping):
                good = {name: v for name, v in value.items() if self._accept((field.name, name), v, field.type)}
                read[field.name] = read_settings(good, field.type, field.name)
            elif field.name in settings and self._accept((field.name,), value, Settings):
                read[field.name] = getattr(read_settings({field.name: value}, Settings, ""), field.name)
        for name in settings:
            if name not in Settings.__struct_fields__:
                self._accept((name,), settings[name], Settings)
        return read

    def _accept(self, path: Path, value: Any, kind: type[Struct]) -> bool:
        """Take note of one setting, and return whether it can be used."""
        self.given.add(path)
        try:
            read_settings({path[-1]: value}, kind, ".".join(path[:-1]))
        except ConfigError as exc:
            self.rejected[path] = Rejected(value, str(exc))
            return False
        return True

    def unusable(self, *names: str, table: str | None = None) -> Iterator[tuple[Path, Any]]:
        """Yield the values that cannot be used of settings, known or not, that are called so, in any case and style."""
        wanted = {_plain(name) for name in names}
        for path, rejected in self.rejected.items():
            if _plain(path[-1]) in wanted and table in (None, path[0]):
                yield path, rejected.value

    def name(self, *path: str) -> str:
        """Return what the file calls a setting."""
        return self.file.spelled.get(path, ".".join(path))

    def place(self, path: Path) -> Place:
        """Return where a setting stands; where its table does, when it is not given; else the beginning."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.file.places:
                return self.file.places[path[:length]]
        return Place(1, 1)

    @property
    def caps(self) -> CapsConfig:
        return self.settings.caps

    @property
    def max_messages(self) -> int:
        """The cap on messages, of a new outbox when it is not given."""
        return MAX_MESSAGES if self.caps.max_messages is UNSET else self.caps.max_messages

    @property
    def max_bytes(self) -> int:
        """The cap on bytes, of a new outbox when it is not given."""
        return MAX_BYTES if self.caps.max_bytes is UNSET else self.caps.max_bytes

    @property
    def detection(self) -> float:
        """Seconds after which a dead link is found, at the latest."""
        heartbeat = self.settings.heartbeat
        return heartbeat.interval * heartbeat.max_missed + heartbeat.timeout


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def span(seconds: float) -> str:
    """Return seconds as a configuration would say them: ``0.5s``, ``45s``, ``5m``, ``72h``."""
    for unit, length, least in (("h", 3600, 7200), ("m", 60, 300)):
        if seconds >= least and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:g}s"
