"""When a link is dead: not later than the settings say, and never while anything arrives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durablews.config import HeartbeatConfig
from durablews.heartbeat import Beat, Heartbeat

configs = st.builds(
    HeartbeatConfig,
    interval=st.floats(0.01, 1000.0),
    timeout=st.floats(0.01, 1000.0),
    max_missed=st.integers(1, 20),
)


def silence(heartbeat: Heartbeat) -> tuple[list[float], float]:
    """Keep the timer in silence; return when pings went, and when the link was found dead."""
    pings: list[float] = []
    now = heartbeat.timer()
    for _ in range(1000):
        beat = heartbeat.due(now)
        if beat is Beat.DEAD:
            return pings, now
        if beat is Beat.PING:
            pings.append(now)
        assert heartbeat.timer() > now, "the timer stands still"
        now = heartbeat.timer()
    raise AssertionError("never found dead")


def test_with_the_defaults_silence_is_found_after_a_hundred_seconds() -> None:
    """Pings after 30, 60 and 90 s, dead after 100."""
    assert silence(Heartbeat(HeartbeatConfig(), 1000.0)) == ([1030.0, 1060.0, 1090.0], 1100.0)


@pytest.mark.parametrize(
    ("interval", "timeout", "max_missed", "pings", "dead"),
    [
        (30.0, 10.0, 1, [30.0], 40.0),
        (10.0, 25.0, 3, [10.0, 20.0, 30.0], 55.0),
        (10.0, 10.0, 2, [10.0, 20.0], 30.0),
        (10.0, 1000.0, 1, [10.0], 1010.0),
    ],
)
def test_odd_settings_keep_the_same_bound(
    interval: float, timeout: float, max_missed: int, pings: list[float], dead: float
) -> None:
    """One miss, timeouts as long as the interval or longer: interval * max_missed + timeout all the same."""
    config = HeartbeatConfig(interval=interval, timeout=timeout, max_missed=max_missed)
    assert silence(Heartbeat(config, 0.0)) == (pings, dead)


@given(config=configs, arrivals=st.lists(st.floats(0.0, 0.99), max_size=20))
def test_dead_no_later_than_the_settings_say_after_the_last_traffic(
    config: HeartbeatConfig, arrivals: list[float]
) -> None:
    """Whenever something arrived last, `interval * max_missed + timeout` later it is dead, after so many pings."""
    heartbeat, now = Heartbeat(config, 0.0), 0.0
    for part in arrivals:
        until = now + part * (config.interval * config.max_missed + config.timeout)
        for _ in range(1000):
            if heartbeat.timer() > until:
                break
            now = heartbeat.timer()
            assert heartbeat.due(now) is not Beat.DEAD
        now = until
        heartbeat.received(now)
    pings, dead = silence(heartbeat)
    assert len(pings) == config.max_missed
    assert dead == pytest.approx(now + config.interval * config.max_missed + config.timeout)


def test_any_traffic_counts_as_alive() -> None:
    """While something arrives at least once an interval no ping is sent, for ever."""
    heartbeat = Heartbeat(HeartbeatConfig(), 0.0)
    for second in range(0, 3600, 29):
        assert heartbeat.due(float(second)) is Beat.NOTHING
        heartbeat.received(float(second))
    assert heartbeat.timer() > 3600.0


def test_traffic_at_the_last_moment_saves_the_link() -> None:
    """What arrives just before the deadline starts everything anew."""
    heartbeat = Heartbeat(HeartbeatConfig(), 0.0)
    for at in (30.0, 40.0, 60.0, 70.0, 90.0):
        assert heartbeat.due(at) is not Beat.DEAD
    heartbeat.received(99.9)
    assert heartbeat.due(100.0) is Beat.NOTHING
    assert silence(heartbeat)[1] == pytest.approx(199.9)


def test_a_process_that_slept_asks_before_it_gives_up() -> None:
    """After a suspend of an hour one late look pings first: the link is not dead unasked."""
    heartbeat = Heartbeat(HeartbeatConfig(), 0.0)
    assert heartbeat.due(3600.0) is Beat.PING
    assert heartbeat.timer() > 3600.0
