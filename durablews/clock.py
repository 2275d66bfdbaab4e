"""Time as the rest of durablews sees it: injected, so that tests own it.

Three clocks, never mixed: `monotonic` for waiting, `wall` for people, and `boot` for age. Age is counted by the boot
clock because edge devices start in 1970 and jump decades when NTP answers.
"""

from __future__ import annotations

import sys
import time
import uuid
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """What durablews asks of time."""

    #: Differs after every boot: readings of `boot` compare only where this is equal.
    boot_id: str

    def monotonic(self) -> float:
        """Seconds from any origin, for durations within this process."""

    def wall(self) -> int:
        """Milliseconds since 1970 UTC, as this machine believes."""

    def boot(self) -> int:
        """Milliseconds since boot, suspended time included where the system can tell."""


class SystemClock:
    """The machine's own clocks."""

    def __init__(self) -> None:
        self.boot_id = _boot_id()

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> int:
        return time.time_ns() // 1_000_000

    def boot(self) -> int:
        if sys.platform == "linux":
            return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
        return time.monotonic_ns() // 1_000_000


def _boot_id() -> str:
    """Name this boot. Where the system does not, each process is a boot of its own: age then only counts less."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return uuid.uuid4().hex
