"""What follows when a try has ended: storms that do not happen, waits that are honoured, ends that are none."""

from __future__ import annotations

import random
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durablews.config import ReconnectConfig
from durablews.delivery.suspicion import Closed
from durablews.reconnection import Outcome, Pause, Reconnection, closed_outcome, refused_outcome

SEEDS = range(1000)
NOBODY = Outcome(kind="network", reason="nobody listens")


def link(seed: int = 1, **settings: Any) -> Reconnection:
    return Reconnection(ReconnectConfig(**settings), random.Random(seed).random)


def fixed(drawn: float, **settings: Any) -> Reconnection:
    return Reconnection(ReconnectConfig(**settings), lambda: drawn)


def closed(code: int = 1000, reason: str = "", **more: Any) -> Outcome:
    given = {"progressed": False, "connected_for": 0.0, "asked": 0.0, "renewal": False, **more}
    return closed_outcome(Closed(code=code, reason=reason, received=True), **given)


def pause(of: Reconnection, outcome: Outcome) -> Pause:
    following = of.ended(outcome)[1]
    assert following is not None
    return following


def connections_in(seconds: float, reconnection: Reconnection, outcome: Outcome) -> int:
    """Count the tries of a client against a server that ends each of them in the same way, at once."""
    now, tries = 0.0, 0
    while now < seconds:
        tries += 1
        now += pause(reconnection, outcome).delay
    return tries


# -- storms


@pytest.mark.parametrize(
    "outcome", [closed(), closed(1001), closed(1011), closed(1006), NOBODY], ids=lambda o: o.reason
)
def test_a_server_that_accepts_and_closes_is_not_hammered(outcome: Outcome) -> None:
    """Over 1 000 seeds its first minute sees 10 connections on average, and never more than 20."""
    counts = [connections_in(60, link(seed), outcome) for seed in SEEDS]
    assert statistics.mean(counts) <= 10
    assert max(counts) <= 20


@pytest.mark.parametrize("jitter", ["full", "equal", 0.25, 0.0])
def test_a_fleet_does_not_return_in_one_moment(jitter: str | float) -> None:
    """Whatever the jitter, the first tries of 1 000 clients whose good connections ended together fill the window."""
    for settings, window in (({}, 1.0), ({"first_delay": 60.0}, 60.0)):
        fleet = [link(seed, jitter=jitter, **settings) for seed in SEEDS]
        delays = sorted(pause(one, closed(1006, connected_for=3600.0)).delay for one in fleet)
        assert 0 <= delays[0]
        assert delays[-1] < window
        for tenth in range(10):
            share = [delay for delay in delays if window * tenth / 10 <= delay < window * (tenth + 1) / 10]
            assert 60 <= len(share) <= 140


def test_after_the_first_try_the_windows_go_on_growing() -> None:
    """A good connection, then nobody: the window after the first is the second, not the first again."""
    one = fixed(0.5, jitter=0.0)
    delays = [pause(one, closed(1006, progressed=True)).delay] + [pause(one, NOBODY).delay for _ in range(6)]
    assert delays == [0.5, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize(
    ("more", "good"),
    [({"progressed": True}, True), ({"connected_for": 60.0}, True), ({"connected_for": 59.9}, False), ({}, False)],
)
def test_only_progress_starts_the_backoff_anew(more: dict[str, Any], good: bool) -> None:
    """An ack, or a minute connected, is progress; a connection alone is none."""
    one = fixed(0.5, jitter=0.0)
    for _ in range(4):
        pause(one, NOBODY)
    assert pause(one, closed(1006, **more)).delay == (0.5 if good else 16)


# -- what a server asks for


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": " 7 "}, 7),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": "99999999999999999999"}, 3600),
        ({"Retry-After": "Mon, 23 Nov 2026 08:00:20 GMT", "Date": "Mon, 23 Nov 2026 08:00:00 GMT"}, 20),
        ({"Retry-After": "Mon, 23 Nov 2026 07:00:20 GMT", "Date": "Mon, 23 Nov 2026 08:00:00 GMT"}, 0),
        ({"Retry-After": "Wed, 23 Dec 2026 08:00:20 GMT", "Date": "Mon, 23 Nov 2026 08:00:00 GMT"}, 3600),
        ({"Retry-After": "Mon, 23 Nov 2026 08:00:20 GMT"}, 0),
        ({"Retry-After": "-5"}, 0),
        ({"Retry-After": "1.5"}, 0),
        ({"Retry-After": "²"}, 0),
        ({"Retry-After": "soon", "Date": "now"}, 0),
        ({"Retry-After": "Mon, 99 Foo 99999 00:00:00 GMT", "Date": "Mon, 23 Nov 2026 08:00:00 GMT"}, 0),
        ({"Retry-After": "Mon, 23 Nov 2026 08:00:20", "Date": "Mon, 23 Nov 2026 08:00:00 GMT"}, 0),
        ({}, 0),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float) -> None:
    """Seconds and dates are honoured up to an hour, by the server's own clock; nonsense is not a delay."""
    outcome = refused_outcome("wss://x/", 503, headers)
    assert outcome.at_least == seconds
    following = pause(fixed(0.5), outcome)
    assert following.delay == seconds + 0.5
    assert following.firm == (seconds > 0)


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_header_raises(after: str, date: str) -> None:
    """Whatever stands in Retry-After and Date is a delay between 0 and an hour."""
    assert 0 <= refused_outcome("wss://x/", 429, {"Retry-After": after, "Date": date}).at_least <= 3600


@pytest.mark.parametrize(
    ("reason", "seconds"),
    [("retry=2500", 2.5), ("retry=0", 0), ("retry=999999999999", 3600), ("retry=x", 0), ("please retry=5", 0)],
)
def test_retry_in_a_close_reason(reason: str, seconds: float) -> None:
    """`retry=MS` is a minimum, up to an hour; everybody was told the same, so each waits a little longer."""
    following = pause(fixed(0.5), closed(1013, reason))
    assert (following.delay, following.firm) == (seconds + 0.5, seconds > 0)


def test_the_longer_of_two_wishes_counts() -> None:
    """A farewell frame and a close reason may both ask."""
    assert closed(1001, "retry=1000", asked=9.0).at_least == 9.0
    assert closed(1001, "retry=10000", asked=9.0).at_least == 10.0


@pytest.mark.parametrize("outcome", [closed(4429), refused_outcome("wss://x/", 426, {})], ids=lambda o: o.reason)
def test_who_shall_slow_down_does(outcome: Outcome) -> None:
    """4429, and what only the owner can mend: half of the longest delay at least, from the first time on."""
    delays = [pause(link(seed), outcome).delay for seed in SEEDS]
    assert 15 <= min(delays)
    assert max(delays) <= 30


# -- credentials


@pytest.mark.parametrize(
    "outcome",
    [refused_outcome("wss://x/", status, {}) for status in (401, 403)] + [closed(code) for code in (1008, 4401, 4403)],
    ids=lambda o: o.reason,
)
def test_who_is_not_allowed_asks_once_and_waits_long(outcome: Outcome) -> None:
    """The provider is asked at once, once; then ten longest delays pass, with ever rarer looks at the credentials."""
    one = fixed(0.5)
    told, following = one.ended(outcome)
    assert following is not None
    assert told.blocked is not None
    assert (following.ask_first, following.ask_every, following.delay) == (True, 30, 315)
    later = [pause(one, outcome) for _ in range(6)]
    assert [p.ask_first for p in later] == [False] * 6
    assert [p.ask_every for p in later] == [30, 60, 120, 240, 300, 300]
    assert {p.delay for p in later} == {315}
    # Once it was let in, all that is forgotten.
    pause(one, closed(1006, progressed=True))
    assert pause(one, outcome).ask_first


def test_who_is_not_allowed_and_told_when_to_come_back_waits_for_that() -> None:
    """Retry-After counts more than a new token."""
    following = pause(fixed(0.5), refused_outcome("wss://x/", 403, {"Retry-After": "900"}))
    assert (following.delay, following.ask_first, following.ask_every) == (900, False, None)


def test_a_fleet_with_a_provider_that_makes_new_tokens_does_not_storm() -> None:
    """Each ask gives another token and each is refused: at most a dozen tries in the first ten minutes."""
    for seed in range(100):
        one, now, tries = link(seed), 0.0, 0
        while now < 600:
            tries += 1
            following = pause(one, refused_outcome("wss://x/", 401, {}))
            now += 0.0 if following.ask_first else min(following.ask_every or 1e9, following.delay)
        assert tries <= 7


# -- the end, and what is none


@pytest.mark.parametrize("most", [0, 1, 5])
def test_max_retries_counts_tries_in_a_row(most: int) -> None:
    """So many tries after the first failure, then it is the end; progress begins the count anew."""
    one = link(max_retries=most)
    for _ in range(3):
        for _ in range(most):
            pause(one, NOBODY)
        assert one.ended(NOBODY)[1] is None
        one.restart()
    if most:
        for _ in range(20):
            pause(one, closed(progressed=True))


def test_without_max_retries_it_never_ends() -> None:
    """Ten thousand failures later there is another try, within the longest delay (P8)."""
    one = link()
    assert max(pause(one, NOBODY).delay for _ in range(10_000)) <= 30


@pytest.mark.parametrize("code", [1000, 1001, 1005, 1006, 1012, 1013, 1014, 4408, 4409, 4999])
def test_no_close_is_the_end(code: int) -> None:
    """Also not a clean one: 1000 comes from servers that restart, and from some for poison."""
    told, following = link().ended(closed(code))
    assert (told.blocked, following is not None) == (None, True)


@pytest.mark.parametrize("code", [1002, 1011])
def test_the_fifth_server_fault_in_a_row_is_blocked(code: int) -> None:
    """PROTOCOL.md section 6: visible, at the longest delay; progress ends it."""
    one = fixed(0.0)
    blocked = [one.ended(closed(code))[0].blocked is not None for _ in range(6)]
    assert blocked == [False] * 4 + [True] * 2
    assert pause(one, closed(code)).delay == 15
    one.ended(closed(code, progressed=True))
    assert one.ended(closed(code))[0].blocked is None


@pytest.mark.parametrize(
    ("status", "blocked", "slow"),
    [(s, s in (400, 405, 410, 426), s in (400, 405, 410, 426)) for s in (200, 302, 400, 404, 405, 408, 410, 426, 418)]
    + [(s, False, False) for s in (429, 500, 501, 502, 503, 504)]
    + [(s, True, False) for s in (401, 403)],
)
def test_every_status_is_a_sentence(status: int, blocked: bool, slow: bool) -> None:
    """What only the owner can mend is marked; all of it is tried again."""
    outcome = refused_outcome("wss://example.com/x", status, {})
    assert outcome.reason.startswith(f"wss://example.com/x answered HTTP {status}")
    assert ((outcome.blocked is not None), outcome.slow, outcome.code) == (blocked, slow, status)
    assert link().ended(outcome)[1] is not None


def test_a_close_that_this_side_began_is_no_refusal() -> None:
    """Only the server can say that a client is not allowed."""
    ours = Closed(code=1008, reason="", leaving=True)
    assert closed_outcome(ours, progressed=False, connected_for=0, asked=0, renewal=False).blocked is None


# -- ages


def test_connections_are_left_before_their_age_and_not_together() -> None:
    """Between 80 and 100 % of max_connection_age, spread; without the setting never."""
    leaves = [link(seed, max_connection_age=7200.0).leave_at(100.0) or 0 for seed in SEEDS]
    assert 100 + 5760 <= min(leaves) < 100 + 5800
    assert 100 + 7160 < max(leaves) <= 100 + 7200
    assert link().leave_at(100.0) is None


def test_a_renewal_is_no_failure() -> None:
    """It dials at once, also when `max_retries` is 0, and the backoff begins anew."""
    one = fixed(0.5, max_retries=0)
    for _ in range(3):
        following = pause(one, closed(1000, renewal=True))
        assert (following.delay, following.attempt) == (0, 1)
    assert one.ended(NOBODY)[1] is None
