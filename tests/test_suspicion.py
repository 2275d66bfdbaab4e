"""`Suspicion` by itself: what a close proves, and what it does not."""

from __future__ import annotations

import pytest

from durablews.delivery.suspicion import Closed, Suspicion, Verdict

POISON = Closed(code=4400, received=True)


def test_a_close_that_names_nobody_in_flight_accuses_nobody() -> None:
    """With nothing unanswered neither size nor sense is a message's fault."""
    suspicion = Suspicion("a")
    for code in (1009, 4413, 1003, 1007, 4400):
        assert suspicion.judge(Closed(code=code, received=True), None, 0, 0.0) is Verdict.NOTHING
    assert not suspicion.alone


@pytest.mark.parametrize(("in_flight", "verdict"), [(1, Verdict.TOO_LARGE), (2, Verdict.SHRINK)])
def test_size_is_blamed_on_what_was_alone_only(in_flight: int, verdict: Verdict) -> None:
    """With several in flight less is sent at a time instead."""
    assert Suspicion("a").judge(Closed(code=1009, received=True), (0, 1), in_flight, 0.0) is verdict


def test_another_oldest_entry_starts_the_count_anew() -> None:
    """Three times running with the same oldest unanswered entry, not three times in all."""
    suspicion = Suspicion("a")
    for seq in (1, 1, 2, 2, 1):
        assert suspicion.judge(POISON, (0, seq), 5, 0.0) is Verdict.NOTHING
        assert not suspicion.alone


def test_an_answer_of_another_priority_clears_nobody() -> None:
    """Sequences of other priorities say nothing about the suspect."""
    suspicion = Suspicion("a")
    for _ in range(3):
        suspicion.judge(POISON, (0, 5), 5, 0.0)
    suspicion.answered(1, 99)
    suspicion.answered(0, 4)
    assert suspicion.alone
    suspicion.answered(0, 5)
    assert not suspicion.alone


def test_the_suspect_is_blamed_only_when_it_was_alone() -> None:
    """With another one in flight beside it nothing is proven."""
    suspicion = Suspicion("a")
    for _ in range(6):
        assert suspicion.judge(POISON, (0, 5), 2, 0.0) is Verdict.NOTHING
    assert suspicion.judge(POISON, (0, 5), 1, 0.0) is Verdict.POISON
    assert not suspicion.alone
