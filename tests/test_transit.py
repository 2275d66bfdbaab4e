"""What may be on its way: little at first, more as soon as a link proves that it carries more, less if it does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durablews.delivery.transit import Transit

KIB = 1024


def drained(transit: Transit, size: int, *, rate: float, latency: float = 0.0) -> tuple[float, float]:
    """Send `size` bytes in such frames over a link; return the seconds that it took, and the longest wait on it."""
    now, sent, longest = 0.0, 0, 0.0
    arrivals: list[tuple[float, int]] = []
    free_at = 0.0
    while sent < size or arrivals:
        while sent < size and not transit.is_full:
            frame = min(transit.frame, 256 * KIB, size - sent)
            transit.hand(frame, now)
            sent += frame
            free_at = max(free_at, now) + frame / rate
            arrivals.append((free_at + latency, transit.handed))
        longest = max(longest, free_at - now)
        now, total = arrivals.pop(0)
        transit.take(total, now)
    return now, longest


def test_a_slow_link_never_has_more_before_it_than_it_carries_in_some_seconds() -> None:
    """16 kbit/s: a pong never waits for more than 17 s, and for 5 s later on; a megabyte takes what it must."""
    transit = Transit(30)
    seconds, longest = drained(transit, KIB * KIB, rate=2000, latency=0.3)
    assert seconds == pytest.approx(KIB * KIB / 2000, rel=0.01)
    assert longest <= 17
    transit.begin()
    assert drained(transit, KIB * KIB, rate=2000, latency=0.3)[1] <= 5
    transit = Transit(30)
    drained(transit, 64 * KIB, rate=300)  # an Iridium modem
    assert transit.limit == 8 * KIB


@pytest.mark.parametrize(("rate", "latency"), [(1e9, 0.0), (1.25e6, 0.3), (1e7, 0.04), (12_500, 0.3)])
def test_a_quick_link_is_soon_not_held_up(rate: float, latency: float) -> None:
    """Broadband, a satellite, a mobile link: eight megabytes take little longer than the link itself needs."""
    seconds, _ = drained(Transit(30), 8 * KIB * KIB, rate=rate, latency=latency)
    assert seconds <= 8 * KIB * KIB / rate * 1.1 + 12 * latency


def test_small_talk_proves_nothing() -> None:
    """A hundred little messages that arrive at once do not open the link for a megabyte."""
    transit = Transit(30)
    for second in range(100):
        transit.hand(200, float(second))
        transit.take(transit.handed, second + 0.01)
    assert transit.limit == 32 * KIB


def test_many_small_frames_at_once_open_a_quick_link_as_large_ones_do() -> None:
    """A message a frame: what is written together is one round, or the link would stay at what it begins with."""
    transit, now = Transit(30), 0.0
    for _ in range(10):
        while not transit.is_full:
            transit.hand(300, now)
        now += 0.001
        transit.take(transit.handed, now)
    assert transit.limit >= 1024 * KIB


def test_a_new_connection_begins_small_again() -> None:
    """It may be another path: with 128 KiB at most, and with what a slow one had taught."""
    transit = Transit(30)
    drained(transit, 8 * KIB * KIB, rate=1e9)
    assert transit.limit > 1000 * KIB
    transit.begin()
    assert (transit.limit, transit.handed, transit.is_full, transit.untaken) == (128 * KIB, 0, False, False)
    transit.hand(100, 0.0)
    transit.take(100, 10.0)
    transit.begin()
    assert transit.limit == 64 * KIB


@given(st.lists(st.tuples(st.integers(1, 300_000), st.floats(0, 100), st.floats(0, 1)), max_size=60))
def test_whatever_happens_the_link_opens_again(steps: list[tuple[int, float, float]]) -> None:
    """P8: as soon as everything was taken something may go, and the limit is never below 8 KiB."""
    transit, now, taken = Transit(30), 0.0, 0
    for size, pause, part in steps:
        if not transit.is_full:
            transit.hand(size, now)
        now += pause
        taken += int((transit.handed - taken) * part)
        transit.take(taken, now)
        assert transit.limit >= 8 * KIB
    transit.take(transit.handed, now)
    assert not transit.is_full


def test_older_news_is_no_news() -> None:
    """Fewer bytes than before, as a queue that grew makes it look, change nothing."""
    transit = Transit(30)
    transit.hand(20 * KIB, 0.0)
    transit.take(10 * KIB, 0.5)
    transit.take(5 * KIB, 0.6)
    assert not transit.is_full
    transit.hand(7 * KIB, 0.7)
    assert transit.is_full


def test_a_short_ack_timeout_makes_it_careful() -> None:
    """What lies in the way delays acks too: where they must come in 0.9 s, a queue of a second would be their end."""
    quick, careful = Transit(30), Transit(0.9)
    for transit in (quick, careful):
        _, longest = drained(transit, KIB * KIB, rate=64_000)
        assert (longest <= 0.9) == (transit is careful)
