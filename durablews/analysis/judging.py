"""Judges a configuration by every rule."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from msgspec import UNSET, Struct

from durablews.analysis.findings import Finding, Problem, Rule
from durablews.analysis.fleet import Outage
from durablews.analysis.load import Load, parse_rate
from durablews.analysis.profiles import profile_named
from durablews.analysis.rules.catalogue import RULES, selected
from durablews.analysis.rules.form import UNUSABLE
from durablews.analysis.subject import Circumstances, Subject
from durablews.analysis.surroundings import Surroundings, ThisMachine
from durablews.config import Settings, did_you_mean, merge, parse_duration, parse_size
from durablews.configfile import REFERENCE_NAMES, ConfigFile, read_config
from durablews.errors import ConfigError
from durablews.places import Path
from durablews.visible import printable

__all__ = ["check", "circumstances", "judge"]

_ORDER = {"error": 0, "warning": 1, "info": 2}


def check(
    config: str | os.PathLike[str] | Mapping[str, Any] | Settings,
    *,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    surroundings: Surroundings | None = None,
    **known: Any,
) -> list[Finding]:
    """Judge a configuration, and return what is wrong with it, in the order of the file.

    Args:
        config: a TOML or JSON file, a mapping, or `Settings`.
        select: codes of rules, or their beginnings; nothing else is looked at. Empty: all rules.
        ignore: codes, or their beginnings, that are left out.
        surroundings: the machine whose files, environment and clock count; None: this one.
        known: what the owner knows of the devices, as for `circumstances`: ``profile="aws-alb"``, ``rate="2/s"``,
            ``payload="400B"``, ``max_outage="72h"``, ``fleet=10_000``, ``accept_rate="500/s"`` and so on.

    Raises:
        ConfigError: the file cannot be read or is no configuration, or a code, a profile or a figure is none.
    """
    subject = Subject(_file(config), circumstances(**known), surroundings or ThisMachine())
    return judge(subject, select=select, ignore=ignore)


def judge(subject: Subject, *, select: Iterable[str] = (), ignore: Iterable[str] = ()) -> list[Finding]:
    """Return what the rules find, in the order of the file; the worst first where several stand in one place."""
    select, ignore = list(select), list(ignore)
    wanted = (selected(select) if select else frozenset(RULES)) - selected(ignore)
    problems = [(rule, problem) for rule in RULES.values() for problem in rule.judge(subject)]
    # A value that cannot be used is reported once: by the rule that knows what was meant, or as what it is. Looked
    # for before the selection, so that a rule that is left out does not bring the other one up.
    spoken_of = {problem.path for _, problem in problems}
    for path, rejected in subject.rejected.items():
        if path not in spoken_of:
            problems.append((UNUSABLE, Problem(path, _in_the_files_words(subject, path, rejected.message))))
    findings = [
        _finding(subject, rule, problem)
        for rule, problem in problems
        if rule.code in wanted and not _ignored_in_file(subject, rule, problem)
    ]
    return sorted(findings, key=lambda each: (each.line or 0, each.column or 0, _ORDER[each.severity], each.code))


def circumstances(
    *,
    profile: str | None = None,
    rate: str | float | None = None,
    payload: str | int | None = None,
    max_outage: str | float | None = None,
    disk: str | int | None = None,
    rtt: str | float | None = None,
    data_budget: str | int | None = None,
    fleet: int | None = None,
    accept_rate: str | float | None = None,
    outage: str | float = 60.0,
    stale_after: str | float = 120.0,
) -> Circumstances:
    """Return what an owner knows, from numbers or from what people write.

    Args:
        profile: the path to the server, by its name in ``profiles.toml``.
        rate: messages a second, or ``"2/s"``, ``"120/min"``.
        payload: bytes of one message, or ``"400B"``.
        max_outage: seconds of the longest outage, or ``"72h"``.
        disk: bytes that the outbox may take, or ``"200MB"``.
        rtt: seconds of a round trip, or ``"600ms"``.
        data_budget: bytes a month for the heartbeat, or ``"20MB"``.
        fleet: how many devices lose the server at once; needs `accept_rate`.
        accept_rate: connections that the server takes a second, or ``"500/s"``.
        outage: seconds for which it is away, or ``"60s"``.
        stale_after: seconds after which a dead link must have been found, or ``"5m"``.

    Raises:
        ConfigError: a figure or a profile is none; says which.
    """
    if fleet is not None and not isinstance(fleet, int):
        raise ConfigError("fleet must be a whole number of devices")
    if (fleet is None) != (accept_rate is None):
        raise ConfigError("fleet and accept_rate go together: how many devices, and how many a second the server takes")
    load = Load(
        rate=_figure("rate", rate, parse_rate),
        payload=_whole("payload", payload),
        max_outage=_figure("max_outage", max_outage, parse_duration),
        disk=_whole("disk", disk),
        rtt=_figure("rtt", rtt, parse_duration),
        data_budget=_whole("data_budget", data_budget),
    )
    accepted = _figure("accept_rate", accept_rate, parse_rate)
    away = _figure("outage", outage, parse_duration, least=0.0) or 0.0
    stale = _figure("stale_after", stale_after, parse_duration) or 0.0
    crowd = None
    if fleet is not None and accepted is not None:
        if fleet < 1 or accepted < 1:
            raise ConfigError("fleet and accept_rate must be 1 or more")
        if accepted != int(accepted):
            raise ConfigError(f"accept_rate must be a whole number of connections a second, not {accepted:g}")
        crowd = Outage(devices=int(fleet), accept_rate=int(accepted), seconds=away)
    return Circumstances(
        profile=None if profile is None else profile_named(profile), load=load, fleet=crowd, stale_after=stale
    )


def _figure(name: str, given: str | float | None, parse: Any, least: float | None = None) -> float | None:
    if given is None:
        return None
    try:
        figure = float(parse(given) if isinstance(given, str) else given)
    except ConfigError as exc:
        raise ConfigError(f"{name}: {exc}") from None
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} must be a number, or a text with a unit") from None
    if not (0 < figure < 1e15 or figure == least):
        raise ConfigError(f"{name}: must be above 0, and no more than a machine can mean")
    return figure


def _whole(name: str, given: str | int | None) -> int | None:
    figure = _figure(name, given, parse_size)
    return None if figure is None else max(1, int(figure))


def _file(config: str | os.PathLike[str] | Mapping[str, Any] | Settings) -> ConfigFile:
    if isinstance(config, str | os.PathLike):
        return read_config(os.fsdecode(config))
    if isinstance(config, Settings):
        # Only what is not a default: a default was not given, and is not a choice.
        config = _given(config)
    if not isinstance(config, Mapping):
        raise ConfigError(f"a configuration is a file, a mapping or Settings, not {type(config).__name__}")
    plain = {str(name): _given(value) if isinstance(value, Struct) else value for name, value in merge(config).items()}
    return ConfigFile(path="", settings=plain, places={}, spelled={}, ignored={}, is_reference=False)


def _given(settings: Struct) -> dict[str, Any]:
    defaults = type(settings)()
    values = {name: getattr(settings, name) for name in settings.__struct_fields__}
    return {
        name: _given(value) if isinstance(value, Struct) else value
        for name, value in values.items()
        if value is not UNSET and value != getattr(defaults, name)
    }


def _in_the_files_words(subject: Subject, path: Path, message: str) -> str:
    """Say why a value cannot be used with the names that the file has, and no others."""
    if subject.file.is_reference and path[0] in REFERENCE_NAMES:
        return f"{path[0]} must be true or false"
    if subject.file.is_reference and len(path) == 1 and path[0] not in Settings.__struct_fields__:
        return f"{path[0]} is not a setting{did_you_mean(path[0], REFERENCE_NAMES)}"
    ours = ".".join(path)
    return message.replace(ours, subject.name(*path), 1)


def _ignored_in_file(subject: Subject, rule: Rule, problem: Problem) -> bool:
    codes: Collection[str] | None = subject.file.ignored.get(subject.place(problem.path).line)
    return codes is not None and (not codes or rule.code in codes)


def _finding(subject: Subject, rule: Rule, problem: Problem) -> Finding:
    place = subject.place(problem.path)
    in_file = bool(subject.file.path)
    return Finding(
        code=rule.code,
        severity=problem.severity or rule.severity,
        setting=printable(subject.name(*problem.path)),
        message=printable(problem.message),
        path=printable(subject.file.path) if in_file else None,
        line=place.line if in_file else None,
        column=place.column if in_file else None,
    )
