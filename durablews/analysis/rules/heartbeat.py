"""DWS2xx: whether a dead link is noticed, and a quiet one left alone by what lies on the way."""

from __future__ import annotations

from collections.abc import Iterator

from durablews.analysis.findings import Problem, Rule
from durablews.analysis.load import heartbeat_traffic
from durablews.analysis.subject import Subject, span

__all__ = ["RULES"]

# The shortest idle limit of a path that many use without knowing it: Heroku's router.
_UNKNOWN_IDLE_LIMIT = 55.0
_UNKNOWN_SAFE_INTERVAL = 45.0
_SAFE_SHARE = 0.75
# Bytes a month from which the traffic is worth a word without a budget.
_NOTEWORTHY = 25_000_000
_OFF = (0, False, None, "none", "off", "false", "no", "0", "0s")


def _off(subject: Subject) -> Iterator[Problem]:
    offs = [path for path, value in subject.unusable("interval", table="heartbeat") if value in _OFF]
    offs += [path for path, value in subject.unusable("enabled", table="heartbeat") if value in _OFF]
    offs += [path for path, value in subject.unusable("heartbeat") if value in _OFF]
    for path in offs:
        what = f"{subject.name(*path)} switches the heartbeat off: a link that dies silently is never noticed"
        yield Problem(path, f"{what}; use 30s")


def _idle_limit(subject: Subject) -> Iterator[Problem]:
    silence, path = subject.longest_interval, ("heartbeat", "interval")
    adapts = " (adaptive: it may grow to that)" if subject.settings.heartbeat.adaptive else ""
    what = f"{subject.name(*path)} {span(silence)}{adapts}"
    if subject.profile is None:
        if silence > _UNKNOWN_SAFE_INTERVAL:
            why = f"many paths end a connection after {span(_UNKNOWN_IDLE_LIMIT)} to 60s of silence"
            yield Problem(
                path,
                f"{what}: {why}; use {span(_UNKNOWN_SAFE_INTERVAL)} or less, or name the path with --profile",
                "warning",
            )
        return
    if subject.profile.idle_limit is None:
        return
    limit = subject.profile.idle_limit.value
    safe = f"use {span(int(limit * _SAFE_SHARE))} or less"
    whose = f"the {span(limit)} idle limit of {subject.profile.name}"
    if silence >= limit:
        yield Problem(path, f"{what} is not below {whose}; {safe}")
    elif silence > limit * _SAFE_SHARE:
        yield Problem(path, f"{what} is close below {whose}: one late ping loses the link; {safe}", "warning")


def _timeout(subject: Subject) -> Iterator[Problem]:
    heartbeat, path = subject.settings.heartbeat, ("heartbeat", "timeout")
    what = f"{subject.name(*path)} {span(heartbeat.timeout)}"
    if heartbeat.timeout >= heartbeat.interval:
        interval = f"{subject.name('heartbeat', 'interval')} {span(heartbeat.interval)}"
        yield Problem(path, f"{what} is not below {interval}: the next ping goes out before the last one is judged")
    trip = subject.load.rtt
    if trip is not None and heartbeat.timeout < 3 * trip:
        yield Problem(
            path,
            f"{what} is below 3 round trips of {span(trip)}: an answer that is a little late counts as none;"
            f" use {span(3 * trip)} or more",
        )


def _detection(subject: Subject) -> Iterator[Problem]:
    heartbeat, interval = subject.settings.heartbeat, subject.longest_interval
    found_after = interval * heartbeat.max_missed + heartbeat.timeout
    if found_after > subject.stale_after:
        sum_ = f"{span(interval)} x {heartbeat.max_missed} + {span(heartbeat.timeout)}"
        yield Problem(
            ("heartbeat", "interval"),
            f"a dead link is found only after {sum_} = {span(found_after)}, and {span(subject.stale_after)} is"
            " asked for (--stale-after); use a shorter interval, or fewer misses",
        )


def _traffic(subject: Subject) -> Iterator[Problem]:
    interval, budget = subject.shortest_interval, subject.load.data_budget
    bytes_a_month = heartbeat_traffic(interval)
    path = ("heartbeat", "interval")
    what = f"{subject.name(*path)} {span(interval)} costs {bytes_a_month / 1e6:.1f} MB a month on a quiet link"
    if budget is not None and bytes_a_month > budget:
        yield Problem(path, f"{what}, above the budget of {budget / 1e6:g} MB (--data-budget)", "warning")
    elif bytes_a_month > _NOTEWORTHY:
        yield Problem(path, what)


def _lifetime(subject: Subject) -> Iterator[Problem]:
    if subject.profile is None or subject.profile.lifetime is None:
        return
    lifetime, age = subject.profile.lifetime.value, subject.settings.reconnect.max_connection_age
    path = ("reconnect", "max_connection_age")
    advice = f"use {span(int(lifetime * 0.9))}"
    whose = f"{subject.profile.name} cuts every connection after {span(lifetime)}"
    if age is None:
        yield Problem(path, f"{whose}, in the middle of whatever is said, and all of a fleet at once; {advice}")
    elif age >= lifetime:
        yield Problem(path, f"{subject.name(*path)} {span(age)}: {whose}, which is sooner; {advice}")


RULES = (
    Rule(
        code="DWS201",
        severity="error",
        title="the heartbeat is off",
        why="A cable that is pulled and a router that forgets send no word. Without a heartbeat TCP takes the messages"
        " for two hours and more, and nothing arrives.",
        source="Linux, tcp(7): tcp_keepalive_time is 7200 s. Measured: websockets' send() went on returning success for"
        " 45 s after the link was cut, for 3,242 messages at 100 a second.",
        judge=_off,
    ),
    Rule(
        code="DWS202",
        severity="error",
        title="the heartbeat is slower than the path's patience",
        why="Load balancers, proxies and NATs end a connection, or just forget it, when nothing passed for a while. A"
        " ping that comes after that comes too late.",
        sums="error: interval >= idle limit of the profile. warning: interval > 75 % of it. Without --profile: warning"
        " above 45 s, as if the limit were 55 s. An adaptive interval counts as 60 s.",
        source="The profile's own source (durablews/analysis/profiles.toml). 55 s: Heroku's router"
        " (help.heroku.com BZGH6WMY). A ping of 60 s at a limit of 60 s: mattermost/docs #8929, 61 % of timeouts.",
        judge=_idle_limit,
    ),
    Rule(
        code="DWS203",
        severity="warning",
        title="the heartbeat does not wait long enough, or too long",
        why="A timeout that is not below the interval has two pings on their way at once. One below three round trips"
        " takes a busy moment for the end.",
        sums="timeout < interval, and timeout >= 3 x the round trip (--rtt; a satellite has 600 ms, a mobile link up to"
        " 2 s).",
        source="RFC 6298 section 2: a first retransmission after three times the round trip.",
        judge=_timeout,
    ),
    Rule(
        code="DWS204",
        severity="warning",
        title="a dead link is found late",
        why="Until it is found, nothing is delivered, though the network may have been back for long.",
        sums="interval x max_missed + timeout <= --stale-after (120 s). The defaults: 30 x 3 + 10 = 100 s.",
        source="durablews' own heartbeat (durablews/docs/link.md); the limit is the owner's.",
        judge=_detection,
    ),
    Rule(
        code="DWS205",
        severity="info",
        title="the heartbeat's traffic",
        why="On a metered link it may cost more than the messages.",
        sums="216 bytes x 30 days / interval: 18.7 MB at 30 s. A warning above --data-budget; else a note above 25 MB.",
        source="Computed for TLS 1.3 over IPv4: a ping, a pong, and the TCP acknowledgements of both.",
        judge=_traffic,
    ),
    Rule(
        code="DWS206",
        severity="warning",
        title="the path cuts connections at a fixed age",
        why="A client that leaves first does so between two messages, and at a moment of its own: the others of its"
        " fleet, which came together, do not leave together.",
        sums="max_connection_age < lifetime of the profile.",
        source="The profile's own source (durablews/analysis/profiles.toml).",
        judge=_lifetime,
    ),
)
