"""`durablews check`: judge a configuration before a fleet goes out with it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from durablews.cli.formats import Palette, columns

if TYPE_CHECKING:
    from durablews.analysis.findings import Finding
    from durablews.analysis.fleet import Course
    from durablews.analysis.subject import Subject

__all__ = ["add_parser", "run"]

# Other ways to wait are played through beside the configured one for fleets up to this size: they take longer.
_LARGEST_COMPARED = 100_000
_STYLES = {"error": ("bold", "red"), "warning": ("bold", "yellow"), "info": ("dim",)}
_KNOWN = ("profile", "rate", "payload", "max_outage", "disk", "rtt", "data_budget", "stale_after")

_EPILOG = """\
examples:
  durablews check agent.toml
  durablews check agent.toml --profile aws-alb --rate 2/s --payload 400B --max-outage 72h --disk 200MB
  durablews check agent.toml --fleet 10000 --accept-rate 500/s --outage 60s --plot fleet.svg
  durablews check config.json --write agent.toml     from the names of the TypeScript client
  durablews explain DWS202

A comment `# durablews: ignore[DWS202]` at the end of a line of TOML switches a rule off there.
exit codes: 0 no errors (with --strict: and no warnings), 1 findings, 2 it could not be judged
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "check",
        help="judge a configuration, and say what will happen to a fleet with it",
        description="Judge a configuration by rules with a reason each, and say what follows from it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a TOML or JSON file, or a pyproject.toml")
    parser.add_argument("--format", choices=["text", "json", "github", "sarif"], default="text")
    parser.add_argument("--select", metavar="CODES", action="append", default=[], help="only these: DWS2,DWS305")
    parser.add_argument("--ignore", metavar="CODES", action="append", default=[], help="all but these")
    parser.add_argument("--strict", action="store_true", help="a warning is enough for exit code 1")
    parser.add_argument("--list-rules", action="store_true", help="list the rules and stop")
    parser.add_argument("--list-profiles", action="store_true", help="list the paths that --profile knows, and stop")
    parser.add_argument("--write", metavar="FILE", help="write it as a new TOML file in the names of durablews")
    known = parser.add_argument_group("what you know of the devices")
    known.add_argument("--profile", metavar="NAME", help="the path to the server, such as aws-alb or nginx")
    known.add_argument("--rate", metavar="N/s", help="messages of one device, such as 2/s or 90/h")
    known.add_argument("--payload", metavar="SIZE", help="one message, such as 400B")
    known.add_argument("--max-outage", metavar="DURATION", help="the longest time without a link, such as 72h")
    known.add_argument("--disk", metavar="SIZE", help="what the outbox may take, such as 200MB")
    known.add_argument("--rtt", metavar="DURATION", help="a round trip to the server, such as 600ms")
    known.add_argument("--data-budget", metavar="SIZE", help="what the heartbeat may cost a month, such as 20MB")
    known.add_argument("--stale-after", metavar="DURATION", default="120s", help="find a dead link by then (120s)")
    fleet = parser.add_argument_group("a fleet whose server comes back")
    fleet.add_argument("--fleet", metavar="N", type=int, help="how many devices lose it at once")
    fleet.add_argument("--accept-rate", metavar="N/s", help="connections that it takes, such as 500/s")
    fleet.add_argument("--outage", metavar="DURATION", default="60s", help="how long it is away (60s)")
    fleet.add_argument("--plot", metavar="FILE", help="draw the return as an SVG")
    fleet.add_argument("--seed", type=int, default=1, help="of what the devices draw; the same seed, the same picture")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Judge and report."""
    from durablews.errors import ConfigError

    if args.list_rules or args.list_profiles:
        print(_rules() if args.list_rules else _profiles(), end="")
        return 0
    if args.config is None:
        raise ConfigError("CONFIG is missing: which file is to be judged?")
    if args.plot is not None and args.fleet is None:
        raise ConfigError("--plot draws a fleet: say how many devices with --fleet, and --accept-rate")
    from durablews.analysis.judging import circumstances, judge
    from durablews.analysis.subject import Subject
    from durablews.analysis.surroundings import ThisMachine
    from durablews.configfile import read_config

    known = circumstances(
        **{name: getattr(args, name) for name in _KNOWN},
        fleet=args.fleet,
        accept_rate=args.accept_rate,
        outage=args.outage,
    )
    file = read_config(args.config)
    if not file.settings and os.path.basename(args.config) == "pyproject.toml":
        raise ConfigError(f"{args.config}: has no table [tool.durablews]")
    subject = Subject(file, known, ThisMachine())
    findings = judge(subject, select=_codes(args.select), ignore=_codes(args.ignore))
    courses = _courses(subject, args.seed) if subject.fleet is not None else {}
    _REPORTS[args.format](subject, findings, courses)
    sys.stdout.flush()
    if args.write is not None:
        _write(subject, args.write)
    if args.plot is not None:
        _plot(args.plot, args.config, courses)
    worst = {"error", "warning"} if args.strict else {"error"}
    return 1 if any(finding.severity in worst for finding in findings) else 0


def _codes(given: Sequence[str]) -> list[str]:
    return [code for text in given for code in text.split(",") if code.strip()]


# -- reports


def _text(subject: Subject, findings: list[Finding], courses: dict[str, Course]) -> None:
    from durablews.analysis.drawing import terminal
    from durablews.analysis.load import Load, sums
    from durablews.analysis.reports import summary

    paint = Palette(sys.stdout)
    for finding in findings:
        where = f"{finding.path}:{finding.line}:{finding.column}: "  # printable already, as all of a finding is
        print(f"{where}{paint(f'{finding.code} {finding.severity}', *_STYLES[finding.severity])}: {finding.message}")
    if findings:
        print()
    print(paint(summary(findings), "bold"))
    if subject.load != Load():
        print()
        print("\n".join(each.text for each in sums(subject.settings, subject.load)))
    if courses:
        print()
        print(terminal(courses, columns=columns(sys.stdout) or 100, colour=paint if paint.on else None), end="")


def _json(subject: Subject, findings: list[Finding], courses: dict[str, Course]) -> None:
    from durablews.analysis.load import sums
    from durablews.analysis.reports import as_json

    more: dict[str, Any] = {"sums": {each.name: each.value for each in sums(subject.settings, subject.load)}}
    if courses:
        more["fleet"] = {name: _figures(course) for name, course in courses.items()}
    print(as_json(findings, more), end="")


def _figures(course: Course) -> dict[str, Any]:
    return {
        "peak": course.peak,
        "back_after": {f"{share * 100:g}%": course.back_after(share) for share in (0.5, 0.95, 1.0)},
        "attempts_a_device": course.attempts_a_device,
        "given_up": course.given_up,
    }


def _github(subject: Subject, findings: list[Finding], courses: dict[str, Course]) -> None:
    from durablews.analysis.reports import as_github

    print(as_github(findings), end="")


def _sarif(subject: Subject, findings: list[Finding], courses: dict[str, Course]) -> None:
    from durablews import __version__
    from durablews.analysis.reports import as_sarif
    from durablews.analysis.rules.catalogue import RULES

    print(as_sarif(findings, list(RULES.values()), __version__), end="")


_REPORTS = {"text": _text, "json": _json, "github": _github, "sarif": _sarif}


def _rules() -> str:
    from durablews.analysis.rules.catalogue import RULES

    return "".join(f"{rule.code}  {rule.severity:<7}  {rule.title}\n" for rule in RULES.values())


def _profiles() -> str:
    from durablews.analysis.profiles import profiles

    return "".join(f"{name:<18}  {profile.title}\n" for name, profile in profiles().items())


# -- files


def _write(subject: Subject, path: str) -> None:
    from durablews.analysis.rewriting import as_toml

    _create(path, as_toml(subject.file))
    print(f"durablews: wrote {path}", file=sys.stderr)


def _plot(path: str, config: str, courses: dict[str, Course]) -> None:
    from durablews.analysis.drawing import svg
    from durablews.errors import ConfigError

    try:
        if os.path.exists(path) and os.path.samefile(path, config):
            raise ConfigError(f"--plot {path} would overwrite the configuration itself")
        with open(path, "w", encoding="utf-8") as file:
            file.write(svg(courses))
    except OSError as exc:
        raise ConfigError(f"--plot {path}: {exc.strerror}") from exc
    print(f"durablews: drew {path}", file=sys.stderr)


def _create(path: str, text: str) -> None:
    """Write a new file that only its owner can read, for it may hold what the old one held."""
    from durablews.errors import ConfigError

    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path} is there already; --write makes a new file") from None
    except OSError as exc:
        raise ConfigError(f"--write {path}: {exc.strerror}") from exc
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


# -- the fleet


def _courses(subject: Subject, seed: int) -> dict[str, Course]:
    from random import Random

    from durablews.analysis.fleet import comparisons, simulate

    outage, reconnect = subject.fleet, subject.settings.reconnect
    assert outage is not None
    ours = reconnect.backoff(Random(seed).random)
    with _Progress() as progress:
        courses = {
            "this configuration": simulate(
                ours, outage, max_retries=reconnect.max_retries, progress=progress("this configuration")
            )
        }
        if outage.devices <= _LARGEST_COMPARED:
            for name, policy in comparisons(Random(seed).random).items():
                courses[name] = simulate(policy.backoff, outage, first=policy.first, progress=progress(name))
    return courses


class _Progress:
    """A bar on standard error, on a terminal only, that leaves nothing behind."""

    def __init__(self) -> None:
        self._shown = ""
        self._on = sys.stderr.isatty()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __call__(self, what: str) -> Callable[[int, int], None]:
        def show(done: int, whole: int) -> None:
            cells = done * 30 // max(1, whole)
            line = f"{what}  [{'#' * cells}{'.' * (30 - cells)}] {done * 100 // max(1, whole)} %"
            if self._on and line != self._shown:
                self._shown = line
                print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

        return show
