"""DWS6xx: the ranges that the other client's analyser recommends, and where a durable outbox differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from msgspec import UNSET

from durablews.analysis.findings import Problem, Rule
from durablews.analysis.subject import Subject, span
from durablews.places import Path

__all__ = ["RULES"]

_SOURCE = "The recommended ranges of the reference client's own configuration analyser."
_LONGEST_BEHIND_PROXY = 30.0
_FEWEST, _MOST_IN_MEMORY = 100, 10_000
_SHORTEST_AGE, _LONGEST_AGE_IN_MEMORY = 60.0, 600.0


def _within(
    path: Path, least: float, most: float, shown: Callable[[float], str] = span
) -> Callable[[Subject], Iterator[Problem]]:
    """Return a judge for a range of numbers; what is not given as a number is not its business."""

    def judge(subject: Subject) -> Iterator[Problem]:
        value = getattr(getattr(subject.settings, path[0]), path[1])
        if path == ("heartbeat", "interval") and subject.settings.heartbeat.adaptive:
            return  # it keeps to that range by itself
        if value is not None and value is not UNSET and not least <= value <= most:
            side = "below" if value < least else "above"
            yield Problem(
                path,
                f"{subject.name(*path)} {shown(value)} is {side} the recommended {shown(least)} to {shown(most)}",
            )

    return judge


def _retries(subject: Subject) -> Iterator[Problem]:
    if subject.settings.reconnect.max_retries:  # none is DWS308's
        yield from _within(("reconnect", "max_retries"), 5, 20, _plain)(subject)


def _plain(number: float) -> str:
    return f"{number:,.0f}"


def _queue_size(subject: Subject) -> Iterator[Problem]:
    size, path = subject.caps.max_messages, ("caps", "max_messages")
    if size is UNSET:
        return
    if size < _FEWEST:
        yield Problem(path, f"{subject.name(*path)} {size:,} is below the recommended {_FEWEST:,}: an outage fills it")
    elif subject.file.is_reference:
        yield Problem(
            path,
            f"{subject.name(*path)} {size:,}: {_FEWEST:,} to {_MOST_IN_MEMORY:,} is meant for a queue in memory; an"
            " outbox on disk may hold 1,000,000",
            "info",
        )


def _queue_age(subject: Subject) -> Iterator[Problem]:
    age, path = subject.caps.max_age, ("caps", "max_age")
    if age is UNSET or age is None:
        return
    if age < _SHORTEST_AGE:
        yield Problem(
            path,
            f"{subject.name(*path)} {span(age)} is below the recommended {span(_SHORTEST_AGE)}: any outage outlasts it",
        )
    elif age <= _LONGEST_AGE_IN_MEMORY:
        yield Problem(
            path,
            f"{subject.name(*path)} {span(age)}: {span(_SHORTEST_AGE)} to {span(_LONGEST_AGE_IN_MEMORY)} is meant for a"
            " queue in memory, which is small; an outbox on disk can keep messages for longer than any outage",
            "info",
        )


def _behind_proxy(subject: Subject) -> Iterator[Problem]:
    interval, path = subject.longest_interval, ("heartbeat", "interval")
    proxy = subject.settings.proxy
    behind = subject.profile.name if subject.profile is not None and subject.profile.proxy else None
    if behind is None and proxy not in (None, "env"):
        behind = "a proxy"
    if behind is not None and interval > _LONGEST_BEHIND_PROXY:
        yield Problem(
            path,
            f"{subject.name(*path)} {span(interval)} is above the recommended {span(_LONGEST_BEHIND_PROXY)} behind"
            f" {behind}",
        )


RULES = (
    Rule(
        code="DWS601",
        severity="warning",
        title="retries outside of 5 to 20",
        why="Fewer than five end in a minute. Above twenty nobody waits any more, says the range, which was made for a"
        " page in a browser; an unattended device should have no limit at all (DWS305).",
        sums="5 <= max_retries <= 20, when there is a limit.",
        source=_SOURCE,
        judge=_retries,
    ),
    Rule(
        code="DWS602",
        severity="warning",
        title="base delay outside of 0.5 s to 5 s",
        why="A shorter one hammers, a longer one makes each small disturbance a long one.",
        sums="0.5 s <= base_delay <= 5 s.",
        source=_SOURCE,
        judge=_within(("reconnect", "base_delay"), 0.5, 5),
    ),
    Rule(
        code="DWS603",
        severity="warning",
        title="longest delay outside of 10 s to 60 s",
        why="Below it a long outage costs thousands of tries; above it devices stay away when the server is back.",
        sums="10 s <= max_delay <= 60 s.",
        source=_SOURCE,
        judge=_within(("reconnect", "max_delay"), 10, 60),
    ),
    Rule(
        code="DWS604",
        severity="warning",
        title="connect timeout outside of 5 s to 30 s",
        why="A slow link needs seconds for TLS; an attempt that hangs for longer keeps the next one waiting.",
        sums="5 s <= connect_timeout <= 30 s.",
        source=_SOURCE,
        judge=_within(("reconnect", "connect_timeout"), 5, 30),
    ),
    Rule(
        code="DWS605",
        severity="warning",
        title="heartbeat interval outside of 15 s to 60 s",
        why="A shorter one costs traffic and battery, a longer one outlives the patience of most paths.",
        sums="15 s <= interval <= 60 s.",
        source=_SOURCE,
        judge=_within(("heartbeat", "interval"), 15, 60),
    ),
    Rule(
        code="DWS606",
        severity="warning",
        title="heartbeat timeout outside of 5 s to 15 s",
        why="A busy moment takes seconds; a link that is silent for much longer is dead.",
        sums="5 s <= timeout <= 15 s.",
        source=_SOURCE,
        judge=_within(("heartbeat", "timeout"), 5, 15),
    ),
    Rule(
        code="DWS607",
        severity="warning",
        title="missed heartbeats outside of 2 to 5",
        why="One lost packet is no dead link; six lost pings are no accident.",
        sums="2 <= max_missed <= 5.",
        source=_SOURCE,
        judge=_within(("heartbeat", "max_missed"), 2, 5, _plain),
    ),
    Rule(
        code="DWS608",
        severity="warning",
        title="queue size",
        why="A queue in memory must be small, and is lost with its process. An outbox on disk need not be, and is not:"
        " its upper limit is the disk (DWS402).",
        sums="max_messages >= 100. In memory at most 10,000; on disk the default is 1,000,000.",
        source=_SOURCE,
        judge=_queue_size,
    ),
    Rule(
        code="DWS609",
        severity="warning",
        title="queue age",
        why="What waits in memory for long is either lost or of no use, says the range. What waits on disk survives,"
        " and is of use for as long as its owner says (DWS405).",
        sums="max_age >= 1 min. In memory at most 10 min; on disk there is none unless it is set.",
        source=_SOURCE,
        judge=_queue_age,
    ),
    Rule(
        code="DWS610",
        severity="warning",
        title="heartbeat above 30 s behind a proxy",
        why="Proxies end what is silent. Two pings within the usual 60 s survive the loss of one.",
        sums="interval <= 30 s with the --profile of a proxy or balancer, or with a proxy setting.",
        source=_SOURCE,
        judge=_behind_proxy,
    ),
)
