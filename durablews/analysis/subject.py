"""One configuration as the rules see it: its settings one by one, and what its owner knows besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Struct

from durablews.addresses import proxy_fault
from durablews.analysis.fleet import Outage
from durablews.analysis.load import MAX_BYTES, MAX_MESSAGES, Load
from durablews.analysis.profiles import Profile
from durablews.analysis.surroundings import Surroundings
from durablews.config import CapsConfig, Settings, read_settings
from durablews.configfile import ConfigFile
from durablews.errors import ConfigError
from durablews.heartbeat import LONGEST_INTERVAL, SHORTEST_INTERVAL
from durablews.places import Path, Place
from durablews.wire.native import dialect_named

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
        self._look_closer()

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

    def _look_closer(self) -> None:
        """Refuse what is of the right type and cannot be used all the same: `connect` refuses it too."""
        tls, proxy = self.settings.tls, self.settings.proxy
        if (tls.cert_file is None) != (tls.key_file is None):
            path = ("tls", "key_file" if tls.cert_file is None else "cert_file")
            self.rejected[path] = Rejected(None, "tls.cert_file and tls.key_file go together")
        if proxy not in (None, "env") and (fault := proxy_fault(str(proxy))) is not None:
            self.rejected[("proxy",)] = Rejected(proxy, f"proxy {fault}")
        try:
            dialect_named(self.settings.dialect)
        except ConfigError as exc:
            self.rejected[("dialect",)] = Rejected(self.settings.dialect, str(exc))

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
        for length in range(len(path), -1, -1):
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
    def shortest_interval(self) -> float:
        """Seconds between two pings on a quick link."""
        return SHORTEST_INTERVAL if self.settings.heartbeat.adaptive else self.settings.heartbeat.interval

    @property
    def longest_interval(self) -> float:
        """Seconds between two pings on a slow link: an adaptive heartbeat grows to that, wherever it begins."""
        return LONGEST_INTERVAL if self.settings.heartbeat.adaptive else self.settings.heartbeat.interval


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def span(seconds: float) -> str:
    """Return seconds as a configuration would say them: ``0.5s``, ``45s``, ``5m``, ``72h``."""
    if abs(seconds) >= 1e15:
        return "an endless number of seconds"
    for unit, length, least in (("h", 3600, 7200), ("m", 60, 300)):
        if seconds >= least and seconds % length == 0:
            return f"{int(seconds // length)}{unit}"
    return f"{int(seconds)}s" if seconds == int(seconds) else f"{seconds:g}s"
