"""DWS5xx: whether what waits gets out in time."""

from __future__ import annotations

from collections.abc import Iterator

from durablews.analysis.findings import Problem, Rule
from durablews.analysis.load import drain_speed, drain_time, kept
from durablews.analysis.subject import Subject, span

__all__ = ["RULES"]

# A round trip that no path on Earth needs much more than: assumed without --rtt (seconds).
_USUAL_TRIP = 1.0
_MUCH_IN_FLIGHT = 16 * 1024 * 1024
_END_TO_END = ("server", "end-to-end", "end_to_end", "app", "application")
# What a nack without a delay of its own waits (PROTOCOL.md section 2), and what a server may need to recover.
_USUAL_RETRY, _SHORT_TROUBLE = 5.0, 60.0


def _ack_timeout(subject: Subject) -> Iterator[Problem]:
    timeout, path = subject.settings.delivery.ack_timeout, ("delivery", "ack_timeout")
    trip = _USUAL_TRIP if subject.load.rtt is None else subject.load.rtt
    if timeout <= 2 * trip:
        assumed = "assumed" if subject.load.rtt is None else "--rtt"
        yield Problem(
            path,
            f"{subject.name(*path)} {span(timeout)} is not above 2 round trips of {span(trip)} ({assumed}): the link is"
            " left before the answer can be there, and everything is sent again, for ever",
        )


def _window(subject: Subject) -> Iterator[Problem]:
    delivery, load = subject.settings.delivery, subject.load
    speed = drain_speed(
        rate_limit=None,
        window=delivery.window,
        window_bytes=delivery.window_bytes,
        payload=load.payload,
        rtt=load.rtt,
    )
    if speed is not None and load.rtt is not None and load.rate is not None and speed < load.rate:
        by_bytes = round(speed * load.rtt) < delivery.window
        path = ("delivery", "window_bytes" if by_bytes else "window")
        needed = int(load.rate * load.rtt * 4) + 1
        enough = f"{needed * (load.payload or 1):,} bytes" if by_bytes else f"{needed:,}"
        yield Problem(
            path,
            f"{subject.name(*path)}: {speed * load.rtt:,.0f} messages / {span(load.rtt)} = {speed:,.1f} a second at"
            f" most, and {load.rate:g} come in: the outbox never empties; use {enough} or more",
        )
    if delivery.window_bytes > _MUCH_IN_FLIGHT:
        path = ("delivery", "window_bytes")
        yield Problem(
            path,
            f"{subject.name(*path)} {delivery.window_bytes:,} is held in memory on both sides, and sent again whole"
            " after each cut; 1MiB keeps any link busy that takes less than 8 s for it",
        )


def _drain(subject: Subject) -> Iterator[Problem]:
    limit, load, path = subject.settings.delivery.rate_limit, subject.load, ("delivery", "rate_limit")
    if limit is None or load.rate is None:
        return
    if limit <= load.rate:
        yield Problem(
            path,
            f"{subject.name(*path)} {limit:g} is not above the {load.rate:g} a second that come in: a backlog"
            " never drains",
        )
    elif load.max_outage is not None:
        waiting = kept(subject.caps, load, load.rate, load.max_outage)
        seconds = drain_time(waiting, load.rate, limit)
        if seconds > load.max_outage:
            yield Problem(
                path,
                f"{waiting:,} messages of an outage of {span(load.max_outage)} drain in {waiting:,} / ({limit:g} -"
                f" {load.rate:g}) = {span(round(seconds))}, longer than the outage itself",
            )


def _ack_means(subject: Subject) -> Iterator[Problem]:
    for path, value in subject.unusable("ack", "ack_mode", "acks"):
        if value not in _END_TO_END:
            yield Problem(
                path,
                f"{subject.name(*path)} {value!r}: durablews counts only the server's own word that a message is safe;"
                " a pong or a written byte says nothing of that",
            )


def _attempts(subject: Subject) -> Iterator[Problem]:
    attempts, path = subject.settings.delivery.max_attempts, ("delivery", "max_attempts")
    if attempts is not None and attempts * _USUAL_RETRY < _SHORT_TROUBLE:
        yield Problem(
            path,
            f'{subject.name(*path)} {attempts}: after {attempts} x 5s = {span(attempts * _USUAL_RETRY)} of "try again"'
            " a message becomes a dead letter; a server that is busy for a minute refuses the first ones for good; use"
            " 12 or more. Failed connections do not count",
        )


RULES = (
    Rule(
        code="DWS501",
        severity="error",
        title="acknowledgements cannot be in time",
        why="A client that leaves before the answer can be there comes back, sends the same again, and leaves again.",
        sums="ack_timeout > 2 x the round trip (--rtt, or 1 s). It counts from the last byte that the other end took,"
        " so the size of what is sent does not matter.",
        source="PROTOCOL.md C9.",
        judge=_ack_timeout,
    ),
    Rule(
        code="DWS502",
        severity="warning",
        title="the window is too small, or very large",
        why="No more than a window goes out in a round trip. And what is in flight when the link is cut is sent again.",
        sums="the lesser of window and window_bytes / payload, / round trip >= rate (--rtt, --rate, --payload);"
        " window_bytes <= 16 MiB.",
        source="Little's law: messages in flight = rate x round trip.",
        judge=_window,
    ),
    Rule(
        code="DWS503",
        severity="warning",
        title="a backlog drains too slowly, or never",
        why="While the backlog goes out, new messages come in. What is left for the backlog is the difference.",
        sums="time to drain = what the caps kept of rate x max outage / (rate_limit - rate), at most the outage.",
        source="Arithmetic.",
        judge=_drain,
    ),
    Rule(
        code="DWS504",
        severity="info",
        title="an acknowledgement that is none",
        why="A pong proves that a library has read a frame, a returned send() that the kernel has taken some bytes. Up"
        " to 50 s of messages are lost in between when a link dies.",
        source="Measured: 3,242 messages at 100 a second went into a dead link before websockets noticed. Seen in"
        " PrefectHQ/prefect, where a pong confirms 700 events.",
        judge=_ack_means,
    ),
    Rule(
        code="DWS505",
        severity="warning",
        title="attempts run out in a short trouble",
        why="A count of attempts is meant for messages that a server can never take. A server that is busy refuses good"
        " ones as well.",
        sums="max_attempts x 5 s >= 60 s.",
        source="PROTOCOL.md section 2: a nack without a delay waits 5 s. Seen in FindingJohnny/baby-macropad, which"
        " counts failed connections too and so deletes an event for each 50 s offline; durablews never counts those.",
        judge=_attempts,
    ),
)
