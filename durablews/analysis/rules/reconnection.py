"""DWS3xx: how a device comes back, and a fleet."""

from __future__ import annotations

from collections.abc import Iterator

from durablews.analysis.findings import Problem, Rule
from durablews.analysis.subject import Subject, span
from durablews.config import ReconnectConfig

__all__ = ["RULES"]

_FATAL = ("fatal", "fatal_statuses", "fatal_status_codes", "fatal_codes", "non_retryable", "no_retry_on", "stop_on")
# What a fraction must be to spread tries over half of the window, as "equal" jitter does.
_LEAST_JITTER = 0.25
_SLOWEST_MAX, _QUICKEST_MAX = 300.0, 10.0
# A connection that lasted so long was not one of a server that accepts and closes (seconds).
_LEAST_STABLE = 10.0


def _delays(subject: Subject) -> Iterator[Problem]:
    reconnect = subject.settings.reconnect
    for name in ("base_delay", "max_delay", "factor"):
        path = ("reconnect", name)
        if path in subject.rejected:
            value = subject.rejected[path].value
            least = "above 1" if name == "factor" else "above 0"
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15:
                shown = f"{value:g}" if name == "factor" else span(value)
                yield Problem(path, f"{subject.name(*path)} {shown} must be {least}")
    if reconnect.base_delay >= reconnect.max_delay and not {("reconnect", "base_delay"), ("reconnect", "max_delay")} & (
        subject.rejected.keys()
    ):
        path = ("reconnect", "base_delay")
        longest = f"{subject.name('reconnect', 'max_delay')} {span(reconnect.max_delay)}"
        yield Problem(
            path,
            f"{subject.name(*path)} {span(reconnect.base_delay)} is not below {longest}: the wait never grows, however"
            " long the server is away; use 1s and 30s",
        )
    if reconnect.factor == 1 and reconnect.base_delay < reconnect.max_delay:
        path = ("reconnect", "factor")
        yield Problem(path, f"{subject.name(*path)} 1: the wait never grows, however long the server is away; use 2")


def _jitter(subject: Subject) -> Iterator[Problem]:
    jitter = subject.settings.reconnect.jitter
    if not isinstance(jitter, str) and jitter < _LEAST_JITTER:
        what = "none" if jitter == 0 else f"only ± {jitter * 100:g} %"
        yield Problem(
            ("reconnect", "jitter"),
            f"{subject.name('reconnect', 'jitter')} is {what}: devices that failed together try again together;"
            ' use "full"',
        )


def _first_window(subject: Subject) -> Iterator[Problem]:
    fleet, reconnect = subject.fleet, subject.settings.reconnect
    if fleet is None:
        return
    window = reconnect.base_delay if reconnect.first_delay is None else reconnect.first_delay
    peak = fleet.devices / window
    if peak > fleet.accept_rate:
        enough = fleet.devices / fleet.accept_rate
        path = ("reconnect", "base_delay" if reconnect.first_delay is None else "first_delay")
        yield Problem(
            path,
            f"{fleet.devices:,} devices / {subject.name(*path)} {span(window)} = {peak:,.0f} tries a second when the"
            f" server restarts, and it takes {fleet.accept_rate:,} (--accept-rate): {peak / fleet.accept_rate:,.0f}"
            f" times as many; use reconnect.first_delay = {span(round(enough + 0.5))} or more",
        )


def _longest(subject: Subject) -> Iterator[Problem]:
    longest, path = subject.settings.reconnect.max_delay, ("reconnect", "max_delay")
    if longest > _SLOWEST_MAX:
        yield Problem(path, f"{subject.name(*path)} {span(longest)}: a server is back for so long, and nobody comes")
    elif longest < _QUICKEST_MAX:
        yield Problem(
            path,
            f"{subject.name(*path)} {span(longest)}: through a long outage each device tries"
            f" {3600 / longest * 2:,.0f} times an hour (with full jitter); use {span(_QUICKEST_MAX)} or more",
        )


def _gives_up(subject: Subject) -> Iterator[Problem]:
    reconnect, path = subject.settings.reconnect, ("reconnect", "max_retries")
    if not reconnect.max_retries:
        return
    lasts = _longest_wait(reconnect)
    yield Problem(
        path,
        f"{subject.name(*path)} {reconnect.max_retries}: after about {span(round(lasts))} of waiting, at the longest,"
        " the link stays down until somebody comes; leave it out, everything is kept either way",
    )


def _longest_wait(reconnect: ReconnectConfig) -> float:
    """Return the sum of the windows of all tries that `max_retries` allows; jitter only makes it less."""
    retries = reconnect.max_retries or 0
    backoff = reconnect.backoff(lambda: 1.0)
    total, last = backoff.first_delay, backoff.first_delay
    for attempt in range(1, retries):
        window = backoff.window(attempt)
        if window == last:  # and so are all that follow
            return total + (retries - attempt) * window
        total, last = total + window, window
    return total


def _progress(subject: Subject) -> Iterator[Problem]:
    stable, path = subject.settings.reconnect.stable_after, ("reconnect", "stable_after")
    if stable < _LEAST_STABLE:
        yield Problem(
            path,
            f"{subject.name(*path)} {span(stable)}: a server that accepts and closes is tried again every"
            f" {span(stable)} without end; use {span(_LEAST_STABLE)} or more (the default is 60s)",
        )


def _fatal(subject: Subject) -> Iterator[Problem]:
    for path, _ in subject.unusable(*_FATAL):
        yield Problem(
            path,
            f"{subject.name(*path)}: no answer of a server ends a link for good here; connect(veto=) may",
        )


def _never(subject: Subject) -> Iterator[Problem]:
    path = ("reconnect", "max_retries")
    if subject.settings.reconnect.max_retries == 0:
        yield Problem(path, f"{subject.name(*path)} switches reconnecting off: the first lost link is the last")


RULES = (
    Rule(
        code="DWS301",
        severity="error",
        title="the delays make no backoff",
        why="A wait that does not grow hammers a server that is down; one of nothing is a busy loop.",
        sums="delay = min(base_delay x factor ^ attempt, max_delay): 0 < base_delay < max_delay, factor > 1.",
        source="RFC 6455 section 7.2.3: increasingly longer delays, such as truncated binary exponential backoff.",
        judge=_delays,
    ),
    Rule(
        code="DWS302",
        severity="warning",
        title="little or no jitter",
        why="Everybody who lost the same server waits for the same time, and comes back in the same moment.",
        sums="A fraction f spreads a try over 2 x f of its window; full jitter over all of it, equal jitter over half:"
        " f >= 0.25 is as much as equal.",
        source="Simulated for 10,000 devices at a server that accepts 500 a second: peaks of 10,000 tries a second"
        " without jitter, 805 with 20 %, 373 with equal, 295 with full.",
        judge=_jitter,
    ),
    Rule(
        code="DWS303",
        severity="warning",
        title="the first window is too short for the fleet",
        why="When a server restarts, it loses all of its devices in one moment. They come back spread over the first"
        " window, and whoever is refused then comes again.",
        sums="devices / first window <= accept rate (--fleet, --accept-rate). The first window is first_delay, or"
        " base_delay without one. `durablews check --fleet ...` simulates what follows.",
        source="Simulated with the library's own backoff (durablews/analysis/fleet.py).",
        judge=_first_window,
    ),
    Rule(
        code="DWS304",
        severity="warning",
        title="the longest delay is very long, or very short",
        why="A very long one leaves devices away long after the server is back. A very short one costs battery, and"
        " load that a struggling server cannot take.",
        sums="10 s <= max_delay <= 300 s.",
        source="A choice of durablews; RFC 6455 section 7.2.3 leaves the figure to the client.",
        judge=_longest,
    ),
    Rule(
        code="DWS305",
        severity="warning",
        title="the link gives up",
        why="Nobody sits beside an unattended device. When it has stopped trying, somebody has to go there.",
        sums="the longest wait = the sum of min(base_delay x factor ^ n, max_delay) over max_retries tries; a try that"
        " hangs adds up to connect_timeout.",
        source="Seen in products that give up after 3, 5, 10 and 16 tries (microsoft/UFO, python-binance, prefect,"
        " livekit). The other client's analyser recommends 5 to 20, for a page that a person can reload: DWS601.",
        judge=_gives_up,
    ),
    Rule(
        code="DWS306",
        severity="warning",
        title="the backoff begins anew too soon",
        why="A server that accepts and closes would be taken for one that works, and be hammered.",
        sums="stable_after >= 10 s. An acknowledgement begins it anew at once, whatever this says.",
        source="websockets' own reconnecting begins anew on connect, as its source shows;"
        " durablews simulates 1,000 such clients.",
        judge=_progress,
    ),
    Rule(
        code="DWS307",
        severity="warning",
        title="some answers are to be fatal",
        why="404 is what a load balancer says while its servers are replaced, 401 what an expired token brings, 429"
        " what a busy minute does. None of them is a reason to stop for ever.",
        source="websockets' own loop ends on 200, 302, 401, 403, 404 and 429 (measured).",
        judge=_fatal,
    ),
    Rule(
        code="DWS308",
        severity="error",
        title="reconnecting is off",
        why="Every link is lost sooner or later. This device then stays away, with its outbox filling up.",
        source="The other client's autoReconnect = false, and max_retries = 0 here.",
        judge=_never,
    ),
)
