"""What a load comes to: every sum by hand once, and the file's size against real outboxes."""

from __future__ import annotations

import math
import os
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import new_outbox

from durablews import Outbox
from durablews.analysis.load import (
    RESERVE,
    WAL,
    Backlog,
    FirstLoss,
    Load,
    backlog,
    disk_bytes,
    drain_speed,
    drain_time,
    first_loss,
    heartbeat_traffic,
    parse_rate,
    row_bytes,
    sums,
    wear,
)
from durablews.config import Settings, read_settings
from durablews.entries import read_caps
from durablews.errors import ConfigError

HOUR, DAY = 3600.0, 86_400.0


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("2/s", 2.0),
        ("120/min", 2.0),
        ("7200/h", 2.0),
        ("86400/d", 1.0),
        ("5", 5.0),
        ("0.5/s", 0.5),
        (" 2 / s ", 2.0),
    ],
)
def test_a_rate_is_messages_a_second(text: str, rate: float) -> None:
    """Whatever a rate is given per, it is kept per second."""
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "x", "2/", "/s", "-1/s", "2/fortnight", "2/m", "2s", "1e3", "nan", "2/s/s"])
def test_what_is_no_rate_gets_a_hint(text: str) -> None:
    """A rate that cannot be read is answered with how one is written."""
    with pytest.raises(ConfigError, match=r'is not a rate; write "2/s", "120/min" or "7200/h"'):
        parse_rate(text)


@pytest.mark.parametrize("text", ["0", "0/s", "2000000000/s", "9" * 400])
def test_a_rate_has_a_range(text: str) -> None:
    """Nothing a second is no load, and a billion a second is a slip of the pen."""
    with pytest.raises(ConfigError, match="a rate is above 0 and at most 1e9 a second"):
        parse_rate(text)


def test_a_backlog_by_hand() -> None:
    """72 hours of 2 messages of 400 bytes a second are 518,400 messages, 207 MB of payload and 241 MB of file."""
    gathered = backlog(2, 72 * HOUR, 400)
    # Nine rows of 400 + 32 + 7 bytes in the 4088 of a page, and 10 bytes of index for each row.
    expected = 131_072 + math.ceil(518_400 * (4096 / 9 + 10))
    assert gathered == Backlog(messages=518_400, payload_bytes=207_360_000, disk_bytes=expected)
    assert backlog(2, 72 * HOUR) == Backlog(messages=518_400)
    assert backlog(0.1, 30).messages == 3
    assert backlog(0.1, 29.9).messages == 2


@pytest.mark.parametrize(
    ("payload", "size"),
    [
        (4029, 4096 + 10),  # the largest record that stays whole: 4061
        (4030, 4096 / 8 + 4096 + 10),  # one byte more: 489 of it stay, the rest goes to a page of its own
        (20_000, 4096 + 4 * 4096 + 10),
    ],
)
def test_a_large_row_by_hand(payload: int, size: float) -> None:
    """A record that does not fit its leaf is split as SQLite's file format says."""
    assert row_bytes(payload) == pytest.approx(size)


@pytest.mark.parametrize(("payload", "as_bytes"), [(400, False), (1500, True), (6000, False)])
async def test_a_real_outbox_is_as_large_as_it_is_said_to_be(tmp_path: Path, payload: int, as_bytes: bool) -> None:
    """2000 messages take the disk that the sum says, within 15 %."""
    path = tmp_path / "agent.db"
    message = b"x" * payload if as_bytes else "x" * (payload - 2)
    async with Outbox(path) as outbox:
        await outbox.send_many([message] * 2000)
        assert (await outbox.counts()).pending_bytes == 2000 * payload
    connection = sqlite3.connect(path)
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        connection.close()
    assert disk_bytes(2000, payload) == pytest.approx(os.stat(path).st_size, rel=0.15)


def test_the_caps_of_a_new_outbox_are_those_of_the_file(tmp_path: Path) -> None:
    """A cap that nobody gave is judged by what a new outbox really has."""
    connection = new_outbox(tmp_path)
    try:
        caps = read_caps(connection)
    finally:
        connection.close()
    assert caps.max_age is None
    assert first_loss(1, 1e12) == FirstLoss("max_messages", caps.max_messages)
    assert first_loss(1, 1e12, payload=caps.max_bytes // 10) == FirstLoss("max_bytes", 10.0)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_messages": 100_000}, FirstLoss("max_messages", 50_000.0)),
        ({"max_bytes": 40_000_399}, FirstLoss("max_bytes", 50_000.0)),  # the 399 bytes hold no message
        ({"max_age": DAY}, FirstLoss("max_age", DAY)),
        # 9 rows take 4096 + 90 bytes.
        ({"disk": 131_072 + WAL + RESERVE + 4186 * 10_000}, FirstLoss("disk", 45_000.0)),
        ({"disk": 1_000_000}, FirstLoss("disk", 0.0)),
        ({"max_bytes": 399}, FirstLoss("max_bytes", 0.0)),  # a message that never fits
        ({"max_messages": 518_400}, None),  # just enough
        ({}, None),
        ({"max_messages": 100_000, "max_age": 40_000.0}, FirstLoss("max_age", 40_000.0)),
    ],
)
def test_each_cap_is_met_first_once(limits: dict[str, float], expected: FirstLoss | None) -> None:
    """Of 72 hours at 2 messages of 400 bytes a second, the first loss is that of the limit that is met first."""
    assert first_loss(2, 72 * HOUR, payload=400, **limits) == expected  # type: ignore[arg-type]


def test_without_a_size_only_messages_and_age_are_judged() -> None:
    """Bytes and disk need to know how large a message is."""
    assert first_loss(2, 72 * HOUR, max_bytes=1, disk=1) is None


loads = st.fixed_dictionaries(
    {
        "payload": st.none() | st.integers(0, 10**6),
        "max_messages": st.integers(1, 10**7),
        "max_bytes": st.integers(1, 10**10),
        "max_age": st.none() | st.floats(1, 1e7),
        "disk": st.none() | st.integers(0, 10**10),
    }
)
rates = st.floats(1e-3, 1e5)


@given(rate=rates, more=st.floats(1.0, 100.0), outage=st.floats(1, 1e7), limits=loads)
def test_a_loss_is_within_the_outage_and_sooner_at_a_higher_rate(
    rate: float, more: float, outage: float, limits: dict[str, int | float | None]
) -> None:
    """No message goes after the outage is over, and none goes later because more come in."""
    slow = first_loss(rate, outage, **limits)  # type: ignore[arg-type]
    fast = first_loss(rate * more, outage, **limits)  # type: ignore[arg-type]
    for loss in (slow, fast):
        assert loss is None or 0 <= loss.after < outage
    if slow is not None:
        assert fast is not None
        assert fast.after <= slow.after


@given(rate=rates, outage=st.floats(1, 1e6), limits=loads)
def test_what_has_gathered_when_the_first_goes_is_within_the_caps(
    rate: float, outage: float, limits: dict[str, int | float | None]
) -> None:
    """Up to the moment that is named, everything fits."""
    loss = first_loss(rate, outage, **limits)  # type: ignore[arg-type]
    messages = round(rate * (outage if loss is None else loss.after), 6)
    assert messages <= limits["max_messages"] + 1e-3  # type: ignore[operator]
    if limits["payload"]:
        assert messages * limits["payload"] <= limits["max_bytes"] + limits["payload"]  # type: ignore[operator]


@given(payload=st.integers(0, 10**6))
def test_a_row_is_never_smaller_than_what_is_in_it(payload: int) -> None:
    """A file holds the payload, and at most a page and a third of it besides."""
    assert payload < row_bytes(payload) <= payload * 4 / 3 + 4096 + 512 + 10


@pytest.mark.parametrize(
    ("rate_limit", "window", "payload", "rtt", "speed"),
    [
        (20.0, 1024, None, None, 20.0),
        (None, 1024, None, 0.5, 2048.0),
        (20.0, 5, None, 0.5, 10.0),
        (None, 1024, 100_000, 0.5, 20.0),  # 10 messages of 100 kB in a window of 1 MB
        (None, 1024, 5_000_000, 0.5, 2.0),  # one always goes
        (None, 1024, None, None, None),
    ],
)
def test_the_speed_of_a_drain_by_hand(
    rate_limit: float | None, window: int, payload: int | None, rtt: float | None, speed: float | None
) -> None:
    """What drains is held by the rate limit, or by a window each round trip, whichever is less."""
    found = drain_speed(rate_limit=rate_limit, window=window, window_bytes=1_000_000, payload=payload, rtt=rtt)
    assert found == speed


def test_the_time_of_a_drain_by_hand() -> None:
    """A backlog shrinks by what goes less what comes in, and never where no more goes than comes."""
    assert drain_time(518_400, 2, 20) == 28_800
    assert drain_time(1, 2, 2) == drain_time(1, 2, 1) == math.inf
    assert drain_time(0, 2, 2) == 0


def test_wear_by_hand() -> None:
    """A message alone writes 39.5 kB, more when it is larger than a page; above 50 a second they share."""
    assert wear(1, 50) == wear(1, 4000) == 39_500 * DAY
    assert wear(1, 20_000) == (39_500 + 4 * 8_900) * DAY
    assert wear(51, 400) == pytest.approx((50 * 39_500 + 3 * row_bytes(400)) * DAY)


@given(rate=rates, more=st.floats(0, 1e5), payload=st.integers(0, 10**6))
def test_more_messages_never_wear_less(rate: float, more: float, payload: int) -> None:
    """A higher rate writes no less, and no message costs more in company than alone."""
    assert wear(rate, payload) <= wear(rate + more, payload) * (1 + 1e-9)
    assert wear(rate, payload) <= rate * wear(1, payload) * (1 + 1e-9)


@pytest.mark.parametrize(("interval", "megabytes"), [(20, 28.0), (30, 18.7), (45, 12.4), (60, 9.3), (240, 2.3)])
def test_heartbeats_cost_what_the_research_says(interval: float, megabytes: float) -> None:
    """The price of a heartbeat is that of the table in the research."""
    assert round(heartbeat_traffic(interval) / 1e6, 1) == megabytes


def settings(**tables: object) -> Settings:
    return read_settings(tables, Settings, "")


def test_every_sum_has_a_line_with_its_arithmetic() -> None:
    """With everything given, each sum is there, and its line shows how it came about."""
    load = Load(rate=2, payload=400, max_outage=72 * HOUR, disk=200_000_000, rtt=0.6, data_budget=50_000_000)
    found = sums(settings(delivery={"rate_limit": 20}, caps={"max_bytes": "100MB"}), load)
    assert [(each.name, each.text) for each in found] == [
        (
            "backlog",
            "backlog after 72 h: 2 a second x 259,200 s = 518,400 messages, 207 MB of payload, 241 MB on disk",
        ),
        ("backlog_bytes", "its payload: 518,400 messages x 400 B = 207 MB"),
        (
            "backlog_disk",
            "its file: 518,400 messages x 465 B + 131 kB = 241 MB; its log takes up to 8.39 MB more",
        ),
        (
            "first_loss",
            "messages begin to go 34.7 h into the outage, for max_bytes: 250,000 messages / 2 a second = 125,000 s",
        ),
        (
            "drain_time",
            "drained 3.86 h after the outage: 250,000 messages / (20 - 2 a second), delivery.rate_limit",
        ),
        (
            "wear_per_day",
            (
                "written to disk in a day: 2 a second x 39.5 kB x 86,400 s = 6.83 GB,"
                " each committed alone, and its ack too"
            ),
        ),
        ("heartbeat_traffic", "heartbeats in a month: 216 B x 2,592,000 s / 30 s = 18.7 MB on a silent link"),
        (
            "data_budget_left",
            "left of the data of a month: 50 MB - 18.7 MB of heartbeats - 2.07 GB of payload = -2.04 GB",
        ),
    ]
    values = {each.name: each.value for each in found}
    assert values["backlog"] == 518_400
    assert values["backlog_bytes"] == 207_360_000
    assert values["first_loss"] == 125_000
    assert values["drain_time"] == pytest.approx(250_000 / 18)
    assert values["wear_per_day"] == 2 * 39_500 * DAY
    assert values["data_budget_left"] == 50_000_000 - 216 * 86_400 - 2 * 400 * 30 * DAY


@pytest.mark.parametrize(
    ("load", "names"),
    [
        (Load(), ["heartbeat_traffic"]),
        (Load(data_budget=10), ["heartbeat_traffic", "data_budget_left"]),
        (Load(rate=2), ["heartbeat_traffic"]),
        (Load(rate=2, payload=400), ["wear_per_day", "heartbeat_traffic"]),
        (Load(payload=400, max_outage=60, disk=1, rtt=1), ["heartbeat_traffic"]),
        (Load(rate=2, max_outage=60), ["backlog", "first_loss", "heartbeat_traffic"]),
        (Load(rate=2, max_outage=60, rtt=1), ["backlog", "first_loss", "drain_time", "heartbeat_traffic"]),
    ],
)
def test_only_the_sums_that_the_figures_allow(load: Load, names: list[str]) -> None:
    """Nothing is guessed: a sum with a missing term is not made."""
    assert [each.name for each in sums(settings(), load)] == names


def test_a_drain_that_never_ends_says_so() -> None:
    """What comes in as fast as it goes is no number of seconds."""
    found = {each.name: each for each in sums(settings(delivery={"rate_limit": 2}), Load(rate=2, max_outage=60))}
    assert found["drain_time"].value is None
    assert found["drain_time"].text == "never drained: 2 a second come in, and 2 go, delivery.rate_limit"


def test_only_what_was_kept_is_drained() -> None:
    """What went at a cap, or by its age, is not sent later: 10 minutes of age at 2 a second leave 1200."""
    found = {
        each.name: each for each in sums(settings(caps={"max_age": "10m"}), Load(rate=2, max_outage=HOUR, rtt=2.048))
    }
    assert found["first_loss"].text == "messages begin to go 10 min into the outage, for max_age"
    assert found["drain_time"].value == pytest.approx(1200 / 498)
    assert found["drain_time"].text.endswith(
        "1,200 messages / (500 - 2 a second), a window of 1,024 messages / 2.048 s"
    )


def test_caps_that_are_given_are_those_that_count() -> None:
    """A cap of the configuration takes the place of a new outbox's."""
    load = Load(rate=2, payload=400, max_outage=HOUR)
    for caps in ({"max_messages": 100}, {"max_bytes": 40_000}, {"max_age": 50}):
        found = {each.name: each.value for each in sums(settings(caps=caps), load)}
        assert found["first_loss"] == 50


def test_wear_is_told_only_where_each_commit_is_synced() -> None:
    """What `durability="process"` writes was not measured, so it is not said."""
    names = [each.name for each in sums(settings(durability="process"), Load(rate=2, payload=400))]
    assert names == ["heartbeat_traffic"]


def test_an_adaptive_heartbeat_is_counted_at_its_shortest() -> None:
    """On a quick link the adaptive interval goes down to 15 s, and that is what it costs."""
    (found,) = sums(settings(heartbeat={"adaptive": True, "interval": 60}), Load())
    assert found.value == heartbeat_traffic(15)
