"""A fleet after an outage: the table of the documentation, and a model that agrees with a simpler one."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durablews.analysis import fleet
from durablews.analysis.fleet import Course, Outage, comparisons, simulate
from durablews.backoff import Backoff
from durablews.errors import ConfigError

TEN_THOUSAND = Outage(devices=10_000, accept_rate=500, seconds=60)


def backoff(
    *, base: float = 1, most: float = 30, factor: float = 2, jitter: str | float = "full", seed: int = 1
) -> Backoff:
    return Backoff(base_delay=base, max_delay=most, factor=factor, jitter=jitter, random=random.Random(seed).random)


def by_heap(
    policy: Backoff, outage: Outage, first: Callable[[], float], max_retries: int | None
) -> tuple[list[int], list[int], int, int]:
    """Play the same one try at a time, as the promise reads; return attempts, accepted, peak and given_up."""
    queue: list[tuple[float, int]] = []
    attempts: dict[int, int] = {}
    accepted: dict[int, int] = {}
    after: dict[int, int] = {}
    given_up = 0
    for _ in range(outage.devices):
        policy.attempt = 0
        at = first()
        if max_retries == 0:
            given_up += 1
        else:
            queue.append((at, 1))
    heapq.heapify(queue)
    while queue:
        at, attempt = heapq.heappop(queue)
        second = int(at)
        attempts[second] = attempts.get(second, 0) + 1
        if at >= outage.seconds:
            after[second] = after.get(second, 0) + 1
            if accepted.get(second, 0) < outage.accept_rate:
                accepted[second] = accepted.get(second, 0) + 1
                continue
        if attempt == max_retries:
            given_up += 1
            continue
        policy.attempt = attempt
        heapq.heappush(queue, (at + policy.next_delay(), attempt + 1))
    end = max(attempts, default=-1) + 1
    return (
        [attempts.get(second, 0) for second in range(end)],
        [accepted.get(second, 0) for second in range(end)],
        max(after.values(), default=0),
        given_up,
    )


def without_end(figures: list[int], length: int) -> list[int]:
    """Return the figures up to `length`; what is beyond has to be nothing."""
    assert not any(figures[length:])
    return figures[:length]


@pytest.mark.parametrize(
    ("policy", "peak", "back", "attempts"),
    [
        ("fixed 5 s", 10_000, 95, 21.5),
        ("exponential 1..60 s, no jitter", 10_000, 1143, 15.5),
        ("full jitter 1..60 s", 295, 59, 7.6),
    ],
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_table_of_the_documentation(policy: str, peak: int, back: float, attempts: float, seed: int) -> None:
    """10 000 devices, 500 accepted a second, 60 s away: what the documentation says of each policy, within 15 %."""
    waits = comparisons(random.Random(seed).random)[policy]
    course = simulate(waits.backoff, TEN_THOUSAND, first=waits.first)
    assert course.peak == pytest.approx(peak, rel=0.15)
    assert course.back_after(1) == pytest.approx(back, rel=0.15)
    assert course.attempts_a_device == pytest.approx(attempts, rel=0.15)


firsts = st.one_of(st.floats(0, 12), st.integers(0, 24).map(lambda halves: halves / 2))


@given(
    waits=st.lists(firsts, min_size=1, max_size=30),
    rate=st.integers(1, 6),
    seconds=st.one_of(st.floats(0, 9), st.integers(0, 9).map(float)),
    base=st.floats(0.05, 3),
    factor=st.floats(1, 3),
    jitter=st.sampled_from(["full", "equal", 0.0, 0.5]),
    drawn=st.lists(st.floats(0.1, 1, exclude_max=True), min_size=1, max_size=5),
    max_retries=st.one_of(st.none(), st.integers(0, 12)),
)
def test_a_simpler_simulation_takes_the_same_course(
    waits: list[float],
    rate: int,
    seconds: float,
    base: float,
    factor: float,
    jitter: str | float,
    drawn: list[float],
    max_retries: int | None,
) -> None:
    """A queue that plays one try after the other, in order of time, counts the same in every second."""

    def draw() -> float:
        # By the device's count, so that the order in which devices draw does not matter.
        return drawn[policy.attempt % len(drawn)]

    policy = Backoff(base_delay=base, max_delay=8, factor=factor, jitter=jitter, random=draw)
    outage = Outage(devices=len(waits), accept_rate=rate, seconds=seconds)
    course = simulate(policy, outage, first=iter(waits).__next__, max_retries=max_retries)
    attempts, accepted, peak, given_up = by_heap(policy, outage, iter(waits).__next__, max_retries)
    assert without_end(course.attempts, len(attempts)) == attempts
    assert without_end(course.accepted, len(attempts)) == accepted
    assert (course.peak, course.given_up) == (peak, given_up)


@given(
    devices=st.integers(1, 300),
    rate=st.integers(1, 20),
    seconds=st.floats(0, 40),
    jitter=st.sampled_from(["full", "equal", 0.0, 0.3, 1.0]),
    max_retries=st.one_of(st.none(), st.integers(0, 12)),
    seed=st.integers(0, 1000),
)
def test_every_device_is_back_once_or_has_given_up(
    devices: int, rate: int, seconds: float, jitter: str | float, max_retries: int | None, seed: int
) -> None:
    """None is lost or counted twice, the server never accepts above its rate, and not before it is back."""
    outage = Outage(devices=devices, accept_rate=rate, seconds=seconds)
    course = simulate(backoff(jitter=jitter, seed=seed), outage, max_retries=max_retries)
    assert sum(course.accepted) + course.given_up == devices
    assert course.given_up == 0 or max_retries is not None
    assert max(course.accepted, default=0) <= rate
    assert not any(course.accepted[: int(seconds)])
    assert len(course.accepted) == len(course.attempts)
    assert all(one <= all_ for one, all_ in zip(course.accepted, course.attempts, strict=True))
    if max_retries is not None:
        assert sum(course.attempts) <= devices * max_retries


def test_the_same_seed_takes_the_same_course() -> None:
    """All chance is in the injected source: a figure that was printed can be had again."""
    outage = Outage(devices=500, accept_rate=20, seconds=20)
    assert simulate(backoff(seed=7), outage) == simulate(backoff(seed=7), outage)
    assert simulate(backoff(seed=7), outage) != simulate(backoff(seed=8), outage)


def test_the_first_wait_is_the_one_of_the_library() -> None:
    """Unless told otherwise a device waits as the library does after a good connection: spread over `first_delay`."""
    spread = Backoff(
        base_delay=1, max_delay=30, factor=2, jitter="full", first_delay=20, random=random.Random(1).random
    )
    course = simulate(spread, Outage(devices=10_000, accept_rate=10_000, seconds=0))
    assert max(course.attempts) == pytest.approx(500, rel=0.2)
    assert len(course.attempts) == 20
    assert course.attempts_a_device == 1


def test_the_second_wait_is_drawn_from_the_second_window() -> None:
    """The count of each device is its own: however many share the backoff, delays are 1, 2, 4, 8 for every one."""
    waits = Backoff(base_delay=1, max_delay=60, factor=2, jitter=0.0, random=random.Random(1).random)
    course = simulate(waits, Outage(devices=3, accept_rate=10, seconds=20), first=lambda: 1.0)
    assert [second for second, tries in enumerate(course.attempts) if tries] == [1, 3, 7, 15, 31]
    assert set(course.attempts) == {0, 3}


def test_a_try_at_the_moment_of_the_return_is_served() -> None:
    """The server is back at 60 s, not after them."""
    waits = comparisons(random.Random(1).random)["fixed 5 s"]
    course = simulate(waits.backoff, Outage(devices=2, accept_rate=5, seconds=60), first=waits.first)
    assert course.accepted[60] == 2
    assert course.back_after(1) == 0


@pytest.mark.parametrize(("seconds", "peak"), [(0, 100), (1, 100), (1.2, 10), (1.25, 10), (1.5, 0)])
def test_the_peak_is_what_the_server_meets(seconds: float, peak: int) -> None:
    """Tries while the server is away load nobody: the peak counts from its return on, within that second too."""
    waits = Backoff(base_delay=1, max_delay=1, factor=1, jitter=0.0, random=random.Random(1).random)
    first = iter([*[1.25] * 10, *[1.0] * 90]).__next__
    course = simulate(waits, Outage(devices=100, accept_rate=10, seconds=seconds), first=first, max_retries=1)
    assert course.attempts[1] == 100
    assert course.peak == peak


def test_who_used_up_its_tries_gives_up() -> None:
    """With `max_retries` a device tries so often and no more, and the share that never came is told apart."""
    waits = Backoff(base_delay=1, max_delay=1, factor=1, jitter=0.0, random=random.Random(1).random)
    outage = Outage(devices=100, accept_rate=30, seconds=2)
    course = simulate(waits, outage, first=lambda: 1.0, max_retries=3)
    assert course.attempts == [0, 100, 100, 70]
    assert course.accepted == [0, 0, 30, 30]
    assert course.given_up == 40
    assert [course.back_after(share) for share in (0.3, 0.5, 0.6, 0.61, 1)] == [0, 1, 1, None, None]
    assert simulate(waits, outage, max_retries=0).given_up == 100


def test_a_share_is_back_when_its_last_device_is() -> None:
    """Half of three devices are two, seven per cent of a hundred are seven; to the second."""

    def course(devices: int, accepted: list[int]) -> Course:
        outage = Outage(devices=devices, accept_rate=100, seconds=1.5)
        return Course(outage=outage, attempts=accepted, accepted=accepted, peak=1, given_up=0)

    three = course(3, [0, 1, 0, 1, 1])
    assert [three.back_after(share) for share in (0, 0.33, 0.5, 0.66, 0.67, 1)] == [0, 0, 1.5, 1.5, 2.5, 2.5]
    assert course(100, [0, 0, 7, 93]).back_after(0.07) == 0.5


def test_progress_grows_to_the_whole() -> None:
    """A progress bar moves forwards only, during the outage and after it, and ends full."""
    seen: list[tuple[int, int]] = []
    outage = Outage(devices=25_000, accept_rate=5000, seconds=10)
    simulate(backoff(), outage, max_retries=6, progress=lambda done, whole: seen.append((done, whole)))
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert {whole for _, whole in seen} == {50_000}
    assert done[:3] == [10_000, 20_000, 25_000]
    assert done[-1] == 50_000
    assert len(done) > 10


@pytest.mark.parametrize(
    ("outage", "options", "complaint"),
    [
        (Outage(devices=0, accept_rate=1, seconds=1), {}, "at least one device"),
        (Outage(devices=1, accept_rate=0, seconds=1), {}, "never has its fleet back"),
        (Outage(devices=1, accept_rate=1, seconds=-1), {}, "an outage lasts"),
        (Outage(devices=1, accept_rate=1, seconds=float("nan")), {}, "an outage lasts"),
        (Outage(devices=1, accept_rate=1, seconds=float("inf")), {}, "an outage lasts"),
        (Outage(devices=1, accept_rate=1, seconds=1), {"max_retries": -1}, "max_retries cannot be -1"),
        (Outage(devices=1, accept_rate=1, seconds=1), {"first": lambda: 1e9}, "the simulation ends there"),
        (Outage(devices=1, accept_rate=1, seconds=1), {"first": lambda: float("nan")}, "the simulation ends there"),
        (Outage(devices=10**6, accept_rate=1, seconds=1), {}, "more than 300,000,000 times"),
        (Outage(devices=10**6, accept_rate=10**6, seconds=10**5), {}, "more than 300,000,000 times"),
    ],
)
def test_what_cannot_be_played_is_refused(outage: Outage, options: dict[str, object], complaint: str) -> None:
    """Nonsense, and fleets that would take hours, end in one sentence at once."""
    with pytest.raises(ConfigError, match=complaint):
        simulate(backoff(), outage, **options)  # type: ignore[arg-type]


def test_few_tries_are_played_however_long_the_queue_is() -> None:
    """What would take too many tries does not when the devices give up first."""
    course = simulate(backoff(), Outage(devices=10_000, accept_rate=1, seconds=10**6), max_retries=5)
    assert course.given_up == 10_000


def test_too_much_work_is_known_from_the_first_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the delays come out far shorter than expected, the first 10 000 devices tell it of all."""
    monkeypatch.setattr(fleet, "_MOST_ATTEMPTS", 100_000)
    seen: list[int] = []
    short = Backoff(base_delay=1, max_delay=30, factor=2, jitter="full", random=lambda: 0.05)
    outage = Outage(devices=20_000, accept_rate=20_000, seconds=5)
    with pytest.raises(ConfigError, match="more than 100,000 times"):
        simulate(short, outage, progress=lambda done, _whole: seen.append(done))
    assert seen == []


def always(figure: float) -> Callable[[], float]:
    return lambda: figure


@pytest.mark.parametrize(
    ("outage", "first"),
    [
        (Outage(devices=1, accept_rate=1, seconds=5), always(0.0)),
        (Outage(devices=100, accept_rate=1, seconds=0), always(0.0)),
        (Outage(devices=20_000, accept_rate=20_000, seconds=5), always(9.0)),
    ],
)
def test_no_source_of_chance_makes_it_endless(
    monkeypatch: pytest.MonkeyPatch, outage: Outage, first: Callable[[], float]
) -> None:
    """A delay that is always zero ends in the error as well, during the outage and after it."""
    monkeypatch.setattr(fleet, "_MOST_ATTEMPTS", 10_000)
    zero = Backoff(base_delay=1, max_delay=30, factor=2, jitter="full", random=always(0.0))
    with pytest.raises(ConfigError, match="more than 10,000 times"):
        simulate(zero, outage, first=first)


@pytest.mark.parametrize(("base", "most"), [(0, 0), (0, 30), (-1, 30)])
def test_a_backoff_that_never_waits_is_refused(base: float, most: float) -> None:
    """Devices that do not wait at all would try without end."""
    with pytest.raises(ConfigError, match="try without end"):
        simulate(backoff(base=base, most=most, factor=1), Outage(devices=1, accept_rate=1, seconds=1))
