"""`rate_limit`: never faster, and never stuck."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from durablews.delivery.pacing import Pacing

rates = st.floats(0.01, 1e5)
starts = st.floats(0.0, 1e7)


def test_without_a_rate_everything_may_go() -> None:
    """No limit means no timer and no count."""
    pacing = Pacing(None)
    assert pacing.allowed(0.0, 1000) == 1000
    pacing.spend(1000)
    assert pacing.allowed(0.0, 1000) == 1000
    assert pacing.next_at() is None


@given(rate=rates, start=starts, steps=st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(1, 500)), max_size=40))
def test_never_more_than_the_rate_and_one_burst(rate: float, start: float, steps: list[tuple[float, int]]) -> None:
    """Over any span of T seconds at most rate * T messages go, and a burst of a tenth of a second, or of one."""
    pacing, now = Pacing(rate), start
    sent: list[tuple[float, int]] = []
    for pause, wish in steps:
        now += pause
        allowed = pacing.allowed(now, wish)
        assert 0 <= allowed <= wish
        pacing.spend(allowed)
        sent.append((now, allowed))
    burst = max(1.0, rate * 0.1)
    for first, (begin, _) in enumerate(sent):
        for end, _ in sent[first:]:
            count = sum(messages for at, messages in sent if begin <= at <= end)
            assert count <= rate * (end - begin) + burst + 1e-3


@given(rate=rates, start=starts)
def test_whoever_waits_until_the_time_that_was_named_may_send(rate: float, start: float) -> None:
    """No rounding of floats starves a message: at `next_at` one may go, again and again, and the rate is kept up."""
    pacing, now = Pacing(rate), start
    sent = 0
    for _ in range(200):
        allowed = pacing.allowed(now, 1)
        pacing.spend(allowed)
        sent += allowed
        due = pacing.next_at()
        if due is not None:
            assert due >= now
            now = due
            assert pacing.allowed(now, 1) == 1
    assert sent == 200
    assert sent >= rate * (now - start) - 1e-3 * rate - 1


@given(rate=st.floats(100, 1e5), start=starts)
def test_messages_are_gathered_into_frames(rate: float, start: float) -> None:
    """With much to send, each frame holds half a burst at least: a slow rate does not mean a frame for each message."""
    pacing, now = Pacing(rate), start
    for _ in range(50):
        allowed = pacing.allowed(now, 256)
        assert allowed == 0 or allowed >= int(min(256, rate * 0.05))
        pacing.spend(allowed)
        now = max(now, pacing.next_at() or now)
