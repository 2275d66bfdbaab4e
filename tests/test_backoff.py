"""How long to wait: windows that grow to their cap and stay there, and jitter within its bounds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durablews.backoff import Backoff

fractions = st.floats(0, 1, exclude_max=True)


def backoff(
    *, base: float = 1, most: float = 30, factor: float = 2, jitter: str | float = 0.0, drawn: float = 0.0
) -> Backoff:
    return Backoff(base_delay=base, max_delay=most, factor=factor, jitter=jitter, random=lambda: drawn)


def test_the_windows_double_up_to_the_longest() -> None:
    """1, 2, 4, 8, 16 and then 30 seconds, for ever: the formula of the documentation."""
    link = backoff()
    assert [link.next_delay() for _ in range(8)] == [1, 2, 4, 8, 16, 30, 30, 30]


@pytest.mark.parametrize("factor", [1, 1.0, 1.01, 1.5, 2, 10, 1e6, 1e300])
def test_ten_thousand_attempts_neither_overflow_nor_shrink(factor: float) -> None:
    """Whatever the factor, every window is min(base * factor ** attempt, max), from the first to the ten thousandth."""
    link = backoff(factor=factor)
    delays = [link.next_delay() for _ in range(10_001)]
    assert delays == sorted(delays)
    assert delays[0] == 1
    assert delays[-1] == (30 if factor > 1 else 1)
    for attempt in (1, 2, 65, 342, 400):
        exponent = attempt * math.log(factor)
        expected = 30 if exponent > 300 else min(math.exp(exponent), 30)
        assert delays[attempt] == pytest.approx(expected)


def test_progress_starts_again_from_the_first_window() -> None:
    """After `reset` the next wait is the shortest one."""
    link = backoff()
    for _ in range(100):
        link.next_delay()
    assert link.attempt == 100
    link.reset()
    assert link.next_delay() == 1


@pytest.mark.parametrize(("drawn", "delay"), [(0.0, 15), (0.5, 22.5)])
@pytest.mark.parametrize("jitter", ["full", 0.0])
def test_a_server_that_asks_for_it_is_left_alone_longest(jitter: str | float, drawn: float, delay: float) -> None:
    """`longest_delay` is half of the longest window at least, whatever the jitter, and counts as an attempt."""
    link = backoff(jitter=jitter, drawn=drawn)
    assert link.longest_delay() == delay
    assert link.attempt == 1


@pytest.mark.parametrize("jitter", ["full", "equal", 0.25])
def test_the_first_try_after_success_is_anywhere_in_the_first_window(jitter: str | float) -> None:
    """Uniform over `first_delay`, or `base_delay`; the window after it is the second."""
    for first, window in ((None, 1), (60.0, 60)):
        link = Backoff(base_delay=1, max_delay=30, factor=2, jitter=jitter, first_delay=first, random=lambda: 0.75)
        for _ in range(5):
            link.next_delay()
        assert link.delay_after_success() == 0.75 * window
        assert link.attempt == 1


@given(st.integers(0, 10_000), fractions, st.floats(0.01, 10), st.floats(10, 1000), st.floats(1, 10))
def test_jitter_stays_within_its_bounds(attempt: int, drawn: float, base: float, most: float, factor: float) -> None:
    """Full: zero to the window. Equal: its upper half. A fraction: that much to either side."""

    def delay(jitter: str | float) -> float:
        link = backoff(base=base, most=most, factor=factor, jitter=jitter, drawn=drawn)
        link.attempt = attempt
        return link.next_delay()

    window = delay(0.0)
    assert base <= window <= most
    assert 0 <= delay("full") < window
    assert window / 2 <= delay("equal") < window
    assert window * 0.75 * 0.999999 <= delay(0.25) <= window * 1.25
    assert 0 <= delay(1.0) <= window * 2


@given(fractions)
def test_what_is_drawn_decides(drawn: float) -> None:
    """The delay moves with the random number across the whole range: the fleet is spread, not shifted."""
    assert backoff(jitter="full", drawn=drawn).next_delay() == pytest.approx(drawn)
    assert backoff(jitter="equal", drawn=drawn).next_delay() == pytest.approx(0.5 + drawn / 2)
    assert backoff(jitter=0.5, drawn=drawn).next_delay() == pytest.approx(0.5 + drawn)
    assert backoff(jitter=2.0, drawn=0.0).next_delay() == 0
