"""DWS4xx: whether what waits has room, on the disk and in time."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import UNSET

from durablews.analysis.findings import Problem, Rule
from durablews.analysis.load import RESERVE, WAL, disk_bytes, first_loss, wear
from durablews.analysis.subject import Subject, span

__all__ = ["RULES"]

_NO_CAP = (0, -1, False, None, "none", "off", "unlimited", "inf", "infinite")
# What websockets, the library of many servers, takes unless it is told otherwise.
_USUAL_LARGEST = 1024 * 1024
# More commits a second than that are worth a word about flash.
_MANY_COMMITS = 1.0


def _no_cap(subject: Subject) -> Iterator[Problem]:
    for path, value in subject.unusable("max_messages", "max_bytes", table="caps"):
        if value in _NO_CAP:
            yield Problem(
                path, f"{subject.name(*path)} is to be without limit: a long outage then fills the disk; give a cap"
            )


def _disk(subject: Subject) -> Iterator[Problem]:
    disk, payload = subject.load.disk, subject.load.payload
    if disk is None or not payload:
        return
    messages = min(subject.max_messages, max(1, subject.max_bytes // payload))
    file = disk_bytes(messages, payload)
    needed = file + WAL + RESERVE
    if needed > disk:
        path = ("caps", "max_messages" if messages == subject.max_messages else "max_bytes")
        yield Problem(
            path,
            f"{subject.name(*path)} allows {messages:,} messages of {payload:,} bytes: {_megabytes(file)} on disk +"
            f" {_megabytes(WAL)} of log + {_megabytes(RESERVE)} to spare = {_megabytes(needed)}, and there are"
            f" {_megabytes(disk)} (--disk): the disk is full before the outbox is; lower it",
        )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def _cap_reached(subject: Subject) -> Iterator[Problem]:
    load = subject.load
    if load.rate is None or load.max_outage is None:
        return
    loss = first_loss(
        load.rate,
        load.max_outage,
        payload=load.payload,
        max_messages=subject.max_messages,
        max_bytes=subject.max_bytes,
        disk=load.disk,
    )
    if loss is None:
        return
    rejects = subject.caps.overflow is UNSET or subject.caps.overflow == "reject"
    follows = "send() raises OutboxFull" if rejects else "messages go"
    limits = {
        "max_messages": f"{subject.name('caps', 'max_messages')} {subject.max_messages:,}",
        "max_bytes": f"{subject.name('caps', 'max_bytes')} {_megabytes(subject.max_bytes)}",
        "disk": f"the end of the disk of {_megabytes(load.disk or 0)}",
    }
    yield Problem(
        ("caps", "max_bytes" if loss.cap == "disk" else loss.cap),
        f"{limits[loss.cap]} is reached {_into(loss.after)} into an outage of {span(load.max_outage)}: from then on"
        f" {follows}",
    )


def _into(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else span(round(seconds))


def _drops_new(subject: Subject) -> Iterator[Problem]:
    if subject.caps.overflow == "drop_new":
        yield Problem(
            ("caps", "overflow"),
            'caps.overflow is "drop_new": when the outbox is full the newest message goes, though send() returns; an'
            ' alarm is the newest; use "reject", or "drop_oldest"',
        )


def _too_old(subject: Subject) -> Iterator[Problem]:
    age, outage, path = subject.caps.max_age, subject.load.max_outage, ("caps", "max_age")
    if age is UNSET or age is None or outage is None or age >= outage:
        return
    yield Problem(
        path,
        f"{subject.name(*path)} {span(age)} is shorter than an outage of {span(outage)} (--max-outage): what was said"
        f" before the last {span(age)} of it is never delivered",
    )


def _too_large(subject: Subject) -> Iterator[Problem]:
    payload = subject.load.payload
    if payload is None:
        return
    largest = subject.max_bytes
    if payload > largest / 10:
        yield Problem(
            ("caps", "max_bytes"),
            f"one message of {payload:,} bytes is more than a tenth of {subject.name('caps', 'max_bytes')}"
            f" {largest:,}: the outbox holds {largest // payload}",
        )
    figure = subject.profile.largest_message if subject.profile is not None else None
    limit = _USUAL_LARGEST if figure is None else figure.value
    if payload > limit:
        whose = "what many servers take" if figure is None or subject.profile is None else subject.profile.name
        yield Problem(
            ("url",),
            f"one message of {payload:,} bytes is over the {limit:,.0f} bytes of {whose}: it closes each connection"
            " with 1009 until it is a dead letter; split it",
        )


def _durability(subject: Subject) -> Iterator[Problem]:
    rate, path = subject.load.rate, ("durability",)
    if subject.settings.durability == "process":
        yield Problem(
            path,
            'durability is "process": a power cut takes the last messages that send() had confirmed; use "power" unless'
            " the device has a battery",
        )
    elif rate is not None and rate > _MANY_COMMITS:
        a_day = wear(rate, subject.load.payload or 200, subject.settings.commit_interval)
        yield Problem(
            path,
            f"{rate:g} messages a second, each synced, write about {a_day / 1e9:.1f} GB to flash a day; send_many"
            " commits several at once, and so does commit_interval (it waits for them)",
            "info",
        )


RULES = (
    Rule(
        code="DWS401",
        severity="error",
        title="no cap",
        why="An outbox without a limit fills the disk during a long outage, and takes everything else on it down too.",
        source="SQLite reports SQLITE_FULL, and so does whatever else writes there. The defaults here are 1,000,000"
        " messages and 1 GiB.",
        judge=_no_cap,
    ),
    Rule(
        code="DWS402",
        severity="error",
        title="the caps do not fit on the disk",
        why="A disk that is full is a worse end than a cap: others write to it as well, and they do not expect it.",
        sums="messages x (payload + measured overhead of a row) + log + reserve <= --disk. The messages are those that"
        " max_bytes or max_messages allow, whichever is fewer.",
        source="Measured with this schema (durablews/analysis/load.py).",
        judge=_disk,
    ),
    Rule(
        code="DWS403",
        severity="warning",
        title="the outage is longer than the outbox",
        why="Whoever plans for three days without a network wants to hear beforehand that the second night is the end.",
        sums="rate x payload x time, against max_messages, max_bytes and --disk; needs --rate, --payload and"
        " --max-outage.",
        source="Arithmetic; the bytes of a row as measured (durablews/analysis/load.py).",
        judge=_cap_reached,
    ),
    Rule(
        code="DWS404",
        severity="warning",
        title="the newest message is dropped",
        why="What just happened is mostly what matters. durablews counts and reports each drop, but send() has returned"
        " as if all were well.",
        source="Seen in moonraker-obico and thingsboard-gateway, which drop the newest in silence.",
        judge=_drops_new,
    ),
    Rule(
        code="DWS405",
        severity="warning",
        title="messages grow too old before the link is back",
        why="An age limit that is shorter than the outage deletes what the outbox was there to keep.",
        sums="max_age >= --max-outage.",
        source="Arithmetic. For some messages it is right all the same: a position of yesterday helps nobody.",
        judge=_too_old,
    ),
    Rule(
        code="DWS406",
        severity="warning",
        title="one message is very large",
        why="A server closes the connection over a message that is too large for it. The link then comes back and sends"
        " it again, until it has been found out and made a dead letter.",
        sums="payload <= max_bytes / 10, and payload <= the largest message of the profile, or 1 MiB without one.",
        source="The profile's own source; websockets' default for max_size is 1 MiB.",
        judge=_too_large,
    ),
    Rule(
        code="DWS407",
        severity="warning",
        title="durability and what it costs",
        why='"process" survives a kill, not a power cut. "power" syncs each commit, which flash wears from.',
        sums="bytes a day = rate x measured bytes a message; a note above 1 message a second (--rate).",
        source="sqlite.org/pragma.html#pragma_synchronous; bytes measured with /proc/self/io"
        " (durablews/analysis/load.py).",
        judge=_durability,
    ),
)
