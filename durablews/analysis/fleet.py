"""What a returning server meets: a fleet that lost its link at one moment, played through with the real backoff. Pure.

The model is a simple one, and it is on the server's side: a try reaches it at once, it accepts so many in each whole
second and refuses the rest at once, and who is in stays in. Devices differ in nothing but what they draw.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

from msgspec import Struct

from durablews.backoff import Backoff
from durablews.errors import ConfigError

__all__ = ["Course", "Outage", "Policy", "comparisons", "simulate"]

# Three minutes of work or so. A tenth of the fleet against a tenth of the rate takes the same course.
_MOST_ATTEMPTS = 300_000_000
# Some 115 days: a course has a figure for every second.
_LONGEST = 10_000_000
# Devices between two calls of `progress`: a tenth of a second.
_TOGETHER = 10_000


class Outage(Struct, frozen=True, kw_only=True):
    """A server that is away, and the fleet that waits for it.

    Attributes:
        devices: how many lose their link, all at second 0.
        accept_rate: connections that the server accepts in each whole second after its return.
        seconds: the server is away from 0 until then.
    """

    devices: int
    accept_rate: int
    seconds: float


class Course(Struct, frozen=True, kw_only=True):
    """How it went.

    Attributes:
        outage: what was played through.
        attempts: tries to connect in each whole second from 0 on, refused ones included.
        accepted: those of them that the server accepted.
        peak: the most tries in one second, from the moment on at which the server was back.
        given_up: devices that used up `max_retries`.
    """

    outage: Outage
    attempts: list[int]
    accepted: list[int]
    peak: int
    given_up: int

    def back_after(self, share: float) -> float | None:
        """Return the seconds from the server's return until this share of the devices (0 to 1) was back.

        To the second: it is the beginning of the second in which the last of them came. None: so many never came.
        """
        # 0.07 * 100 is a hair above 7, and seven devices are 7 % of a hundred all the same.
        wanted = max(1, math.ceil(share * self.outage.devices * (1 - 1e-12)))
        back = 0
        for second, accepted in enumerate(self.accepted):
            back += accepted
            if back >= wanted:
                return max(0.0, second - self.outage.seconds)
        return None

    @property
    def attempts_a_device(self) -> float:
        """How often a device tried, on average, the last time included."""
        return sum(self.attempts) / self.outage.devices


class Policy(NamedTuple):
    """A way to wait: what `simulate` takes."""

    backoff: Backoff
    first: Callable[[], float] | None = None


def comparisons(random: Callable[[], float]) -> dict[str, Policy]:
    """Return what other clients do, by name; their first wait is drawn as all the others are."""
    backoffs = {
        "fixed 5 s": Backoff(base_delay=5, max_delay=5, factor=1, jitter=0.0, random=random),
        "exponential 1..60 s, no jitter": Backoff(base_delay=1, max_delay=60, factor=2, jitter=0.0, random=random),
        "full jitter 1..60 s": Backoff(base_delay=1, max_delay=60, factor=2, jitter="full", random=random),
    }
    return {name: Policy(backoff, backoff.next_delay) for name, backoff in backoffs.items()}


def simulate(
    backoff: Backoff,
    outage: Outage,
    *,
    first: Callable[[], float] | None = None,
    max_retries: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Course:
    """Play an outage through: who tries when, and who is accepted.

    A device waits for `first` after the loss and for ``backoff.next_delay`` after each refusal. A try at the very
    moment of the return is served. Of the tries in a whole second the first `accept_rate` are accepted, by time; of
    tries at one time, those of devices that tried less often.

    Args:
        backoff: how they wait. All share it: its `attempt` is set to the count of the device whose turn it is.
        first: draws the first wait in seconds; None: ``backoff.delay_after_success``, as the library does.
        max_retries: tries after which a device gives up; None: never.
        progress: called with the work done and the whole of it. Each device counts twice: when its tries during the
            outage are played through, and when it is back or has given up.

    Raises:
        ConfigError: the outage is none that can be, or takes more than 300 million tries or 115 days to play through.
    """
    _check(backoff, outage, max_retries)
    play = _Play(backoff, outage, max_retries, progress or _nobody_looks)
    play.outage(first or backoff.delay_after_success)
    play.the_return()
    return Course(outage=outage, attempts=play.attempts, accepted=play.accepted, peak=play.peak, given_up=play.given_up)


def _nobody_looks(_done: int, _whole: int) -> None:
    pass


class _Play:
    """The fleet, between loss and return."""

    def __init__(
        self, backoff: Backoff, outage: Outage, max_retries: int | None, progress: Callable[[int, int], None]
    ) -> None:
        self._backoff = backoff
        self._outage = outage
        self._most = _MOST_ATTEMPTS + 1 if max_retries is None else min(max_retries, _MOST_ATTEMPTS + 1)
        self._progress = progress
        self._waiting = _Waiting()
        self._made = 0
        self.attempts = [0] * math.ceil(outage.seconds)
        self.accepted = [0] * math.ceil(outage.seconds)
        self.peak = 0
        self.given_up = 0

    def outage(self, first: Callable[[], float]) -> None:
        """Play the tries while the server is away: none is accepted, so no device is in another's way."""
        devices = self._outage.devices
        for begin in range(0, devices, _TOGETHER):
            end = min(begin + _TOGETHER, devices)
            for _ in range(begin, end):
                self._until_the_return(first)
            # Each device will try once more at least.
            if (self._made / end + (self._most > 0)) * devices > _MOST_ATTEMPTS:
                raise _too_much()
            self._progress(end, 2 * devices)

    def _until_the_return(self, first: Callable[[], float]) -> None:
        backoff, seconds, attempts, most = self._backoff, self._outage.seconds, self.attempts, self._most
        next_delay = backoff.next_delay
        backoff.attempt = 0
        at = max(first(), 0.0)
        # Whatever drew the wait, this is the first try; from here on the backoff counts for itself.
        backoff.attempt = 1
        for attempt in range(1, most + 1):
            if not at < seconds:
                self._waiting.add(at, attempt)
                self._count(attempt - 1)
                return
            attempts[int(at)] += 1
            at += next_delay()
        # One more than may be made, where nothing else ends it.
        self._count(most)
        self.given_up += 1

    def the_return(self) -> None:
        """Play second after second until no device waits any more."""
        rate, devices = self._outage.accept_rate, self._outage.devices
        back = 0
        for second, times, counts in self._waiting:
            gap = [0] * (second + 1 - len(self.attempts))
            self.attempts += gap
            self.accepted += gap
            tries = len(times)
            # Who is refused and comes again within the second comes after these: a refusal means that they were enough.
            self.accepted[second] = min(tries, rate)
            back += self.accepted[second]
            self._count(tries)
            if tries > rate:
                for at, attempt in sorted(zip(times, counts, strict=True))[rate:]:
                    tries += self._refused(second, at, attempt)
            self.attempts[second] += tries
            self.peak = max(self.peak, tries)
            self._progress(devices + back + self.given_up, 2 * devices)

    def _refused(self, second: int, at: float, attempt: int) -> int:
        """Send a refused device to its next second; return how often it tried again before this one was over."""
        self._backoff.attempt = attempt
        again = 0
        while attempt < self._most:
            at += self._backoff.next_delay()
            attempt += 1
            if not at < second + 1:
                self._waiting.add(at, attempt)
                return again
            again += 1
            self._count(1)
        self.given_up += 1
        return again

    def _count(self, tries: int) -> None:
        self._made += tries
        if self._made > _MOST_ATTEMPTS:
            raise _too_much()


class _Waiting:
    """The tries to come, by the second: when, and which of its device it is. 12 bytes a device."""

    def __init__(self) -> None:
        self._buckets: dict[int, tuple[array[float], array[int]]] = {}
        self._seconds: list[int] = []

    def add(self, at: float, attempt: int) -> None:
        if not at < _LONGEST:
            raise ConfigError(f"devices would still wait after {_LONGEST:,} seconds; the simulation ends there")
        second = int(at)
        bucket = self._buckets.get(second)
        if bucket is None:
            bucket = self._buckets[second] = array("d"), array("I")
            heapq.heappush(self._seconds, second)
        times, counts = bucket
        times.append(at)
        counts.append(attempt)

    def __iter__(self) -> Iterator[tuple[int, array[float], array[int]]]:
        """Yield the seconds in order, those too that are added meanwhile."""
        while self._seconds:
            second = heapq.heappop(self._seconds)
            yield second, *self._buckets.pop(second)


def _check(backoff: Backoff, outage: Outage, max_retries: int | None) -> None:
    devices, rate, seconds = outage.devices, outage.accept_rate, outage.seconds
    if devices < 1:
        raise ConfigError(f"a fleet has at least one device, not {devices}")
    if rate < 1:
        raise ConfigError(f"a server that accepts {rate} connections a second never has its fleet back")
    if not 0 <= seconds < _LONGEST:
        raise ConfigError(f"an outage lasts from 0 to {_LONGEST:,} seconds, not {seconds}")
    if max_retries is not None and max_retries < 0:
        raise ConfigError(f"max_retries cannot be {max_retries}")
    window = backoff.max_delay if backoff.factor > 1 else min(backoff.base_delay, backoff.max_delay)
    if not window > 0:
        raise ConfigError("devices that do not wait at all try without end")
    # The outage and then, on average, half of the queue are waited for, with delays that are no longer than this. Said
    # at once, and not after minutes of work.
    delay = window * {"full": 0.5, "equal": 0.75}.get(str(backoff.jitter), 1.0)
    tries = (seconds + devices / rate / 2) / delay
    if max_retries is not None:
        tries = min(tries, max_retries)
    if devices * tries > _MOST_ATTEMPTS:
        raise _too_much()


def _too_much() -> ConfigError:
    return ConfigError(
        f"this fleet would try more than {_MOST_ATTEMPTS:,} times, too often to play through; a tenth of the devices at"
        " a tenth of the accept rate takes the same course"
    )
