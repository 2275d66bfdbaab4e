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


def begun(config: HeartbeatConfig, now: float) -> Heartbeat:
    heartbeat = Heartbeat(config)
    heartbeat.begin(now)
    return heartbeat


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
    assert silence(begun(HeartbeatConfig(), 1000.0)) == ([1030.0, 1060.0, 1090.0], 1100.0)


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
    assert silence(begun(config, 0.0)) == (pings, dead)


@given(config=configs, arrivals=st.lists(st.floats(0.0, 0.99), max_size=20))
def test_dead_no_later_than_the_settings_say_after_the_last_traffic(
    config: HeartbeatConfig, arrivals: list[float]
) -> None:
    """Whenever something arrived last, `interval * max_missed + timeout` later it is dead, after so many pings (P8)."""
    heartbeat, now = begun(config, 0.0), 0.0
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
    heartbeat = begun(HeartbeatConfig(), 0.0)
    for second in range(0, 3600, 29):
        assert heartbeat.due(float(second)) is Beat.NOTHING
        heartbeat.received(float(second))
    assert heartbeat.timer() > 3600.0


def test_traffic_at_the_last_moment_saves_the_link() -> None:
    """What arrives just before the deadline starts everything anew."""
    heartbeat = begun(HeartbeatConfig(), 0.0)
    for at in (30.0, 40.0, 60.0, 70.0, 90.0):
        assert heartbeat.due(at) is not Beat.DEAD
    heartbeat.received(99.9)
    assert heartbeat.due(100.0) is Beat.NOTHING
    assert silence(heartbeat)[1] == pytest.approx(199.9)


def test_a_process_that_slept_asks_before_it_gives_up() -> None:
    """After a suspend of an hour one late look pings first: the link is not dead unasked."""
    heartbeat = begun(HeartbeatConfig(), 0.0)
    assert heartbeat.due(3600.0) is Beat.PING
    assert heartbeat.timer() > 3600.0


# -- latency


def test_the_latency_is_that_of_the_last_ten_pings() -> None:
    """Older ones are forgotten; before the first there is none."""
    heartbeat = Heartbeat(HeartbeatConfig())
    assert heartbeat.latency is None
    for number in range(20):
        heartbeat.measured(float(number))
    assert heartbeat.latency == pytest.approx(14.5)
    heartbeat.begin(5.0)
    assert heartbeat.latency == pytest.approx(14.5)


def test_an_adaptive_interval_follows_the_latency_within_its_bounds() -> None:
    """Above 5 s on average it doubles up to 60 s, below 1 s it halves down to 15 s, between them it stays."""
    heartbeat = Heartbeat(HeartbeatConfig(adaptive=True))
    seen = []
    for latency in [6.0] * 3 + [2.0] * 10 + [0.1] * 12:
        heartbeat.measured(latency)
        seen.append(heartbeat.interval)
    # Three slow ones: 60 at the most. The average stays above 1 s until the tenth quick one follows the slower ones.
    assert seen[:3] == [60, 60, 60]
    assert seen[12] == 60
    assert seen[-1] == 15
    assert set(seen) == {60, 30, 15}
    for latency in [5.0, 1.0]:
        steady = Heartbeat(HeartbeatConfig(adaptive=True))
        steady.measured(latency)
        assert steady.interval == 30


def test_the_interval_is_the_owners_unless_it_is_adaptive() -> None:
    """Latency changes nothing then; an adaptive one begins within its bounds."""
    heartbeat = Heartbeat(HeartbeatConfig(interval=5.0))
    heartbeat.measured(100.0)
    assert heartbeat.interval == 5
    assert Heartbeat(HeartbeatConfig(interval=5.0, adaptive=True)).interval == 15
    assert Heartbeat(HeartbeatConfig(interval=500.0, adaptive=True)).interval == 60


def test_an_adapted_interval_is_the_next_pings() -> None:
    """What a pong showed counts from the next sign of life on."""
    heartbeat = begun(HeartbeatConfig(adaptive=True, interval=30.0), 0.0)
    assert heartbeat.due(30.0) is Beat.PING
    heartbeat.measured(6.0)
    heartbeat.received(36.0)
    assert heartbeat.timer() == 96


# -- a slow link, a machine that slept


@given(config=configs, waits=st.lists(st.floats(0.001, 0.999), max_size=30))
def test_a_ping_that_waits_behind_a_frame_is_not_missed(config: HeartbeatConfig, waits: list[float]) -> None:
    """While the other side takes what lies before a ping its time does not run; after that it runs as ever."""
    heartbeat = begun(config, 0.0)
    now = heartbeat.timer()
    assert heartbeat.due(now) is Beat.PING
    left = heartbeat.timer() - now
    for part in waits:
        now += part * config.timeout
        heartbeat.delayed(part * config.timeout)
        assert heartbeat.timer() - now == pytest.approx(left)
    waited = now - config.interval
    pings, dead = silence(heartbeat)
    assert len(pings) == config.max_missed - 1
    assert dead == pytest.approx(config.interval * config.max_missed + config.timeout + waited)


def test_what_moves_before_any_ping_changes_nothing() -> None:
    """A link that swallows everything that is sent is found all the same: only a ping that waits is waited for."""
    heartbeat = begun(HeartbeatConfig(), 0.0)
    for _ in range(30):
        heartbeat.delayed(1.0)
    assert silence(heartbeat) == ([30.0, 60.0, 90.0], 100.0)


def test_a_probe_asks_at_once_and_does_not_wait_long() -> None:
    """After a sleep, or on a new network: pings follow one another after `timeout` until something arrives."""
    heartbeat = begun(HeartbeatConfig(), 0.0)
    heartbeat.probe(5.0)
    assert silence(heartbeat) == ([5.0, 15.0, 25.0], 35.0)
    heartbeat = begun(HeartbeatConfig(), 0.0)
    heartbeat.probe(5.0)
    assert heartbeat.due(5.0) is Beat.PING
    heartbeat.received(5.1)
    assert silence(heartbeat)[1] == pytest.approx(105.1)


@given(config=configs, when=st.floats(0.0, 1.0), again=st.lists(st.floats(0.0, 1.0), max_size=5))
def test_a_probe_never_finds_a_dead_link_later(config: HeartbeatConfig, when: float, again: list[float]) -> None:
    """However often the machine or the network wakes it, the bound of the settings holds."""
    heartbeat = begun(config, 0.0)
    bound = config.interval * config.max_missed + config.timeout
    for at in sorted([when, *again]):
        for _ in range(100):
            if heartbeat.timer() > at * bound:
                break
            if heartbeat.due(heartbeat.timer()) is Beat.DEAD:
                return
        heartbeat.probe(at * bound)
    assert silence(heartbeat)[1] <= bound * (1 + 1e-9)


def test_silence_is_told() -> None:
    """How long nothing has arrived, for the event."""
    heartbeat = begun(HeartbeatConfig(), 10.0)
    heartbeat.received(20.0)
    assert heartbeat.silence(25.0) == 5
