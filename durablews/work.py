"""What waits for the writer of an outbox, and how much of it goes into one transaction. No I/O."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from durablews.entries import Gap
from durablews.messages import Draft, Run

__all__ = ["SETTLE_DELAY", "SETTLE_MESSAGES", "Work", "resolve", "resolve_all", "resolve_soon"]

# Messages in one transaction at most, unless one request or one run has more: 4000 keep the write lock for some 15 ms,
# and to delete them takes no more log than the reserve has room for (durablews/reserve.py).
_LARGEST_TRANSACTION = 4000
#: Acknowledged messages wait for company while others are read to be sent, at most so many and so long (seconds): the
#: fewer transactions, the fewer pages written twice. A crash meanwhile means that the server sees them again.
SETTLE_MESSAGES, SETTLE_DELAY = 2000, 0.05


class Work:
    """What one transaction does, and the reads after it."""

    def __init__(self) -> None:
        self.requests: list[tuple[Sequence[Draft], asyncio.Future[list[int | Gap]]]] = []
        self.changes: list[tuple[Callable[[sqlite3.Connection], Any], asyncio.Future[Any]]] = []
        self.reads: list[tuple[Callable[[sqlite3.Connection], Any], asyncio.Future[Any]]] = []
        #: Since when the first request waits (the loop's time); kept only where requests wait for company.
        self.requests_since = 0.0
        #: Acknowledged, and since when the first of them waits (the loop's time).
        self.runs: list[Run] = []
        self.runs_since = 0.0

    def __bool__(self) -> bool:
        return bool(self.requests or self.changes or self.runs or self.reads)

    @property
    def is_urgent(self) -> bool:
        """Whether someone waits for it; acknowledged runs wait for nobody."""
        return bool(self.requests or self.changes or self.reads)

    def is_due(self, now: float, commit_interval: float) -> bool:
        """Whether there is something to do that must not wait for company, or has waited for it long enough."""
        return bool(
            self.changes
            or self.reads
            or not self.requests
            or now >= self.requests_since + commit_interval
            or len(self.requests) >= _LARGEST_TRANSACTION
        )

    def settle(self, run: Run, now: float) -> None:
        """Add an acknowledged run, joined to the one before it where they touch."""
        if not self.runs:
            self.runs_since = now
        elif (
            self.runs[-1].priority == run.priority
            and self.runs[-1].last + 1 == run.first
            and self.runs[-1].messages + run.messages <= _LARGEST_TRANSACTION
        ):
            last = self.runs.pop()
            run = Run(run.priority, last.first, run.last, last.messages + run.messages, last.bytes + run.bytes)
        self.runs.append(run)

    def split(self, now: float, commit_interval: float = 0.0) -> Work:
        """Take out and return what is left for a later transaction."""
        later = Work()
        later.requests_since = self.requests_since
        if self.requests and not self.changes and now < self.requests_since + commit_interval:
            later.requests, self.requests = self.requests, []  # only reads are urgent, which commit nothing
        if self.reads and not self.requests and not self.changes and not self._settling_is_due(now):
            later.runs, self.runs = self.runs, []
            later.runs_since = self.runs_since
        count = 0
        for position, run in enumerate(self.runs):
            count += run.messages
            if count > _LARGEST_TRANSACTION and position > 0:
                later.runs, self.runs = self.runs[position:], self.runs[:position]
                later.runs_since = self.runs_since
                break
        count = 0
        for position, (drafts, _) in enumerate(self.requests):
            count += len(drafts)
            if count > _LARGEST_TRANSACTION and position > 0:
                later.requests = self.requests[position:]
                del self.requests[position:]
                break
        return later

    def _settling_is_due(self, now: float) -> bool:
        return now - self.runs_since >= SETTLE_DELAY or sum(run.messages for run in self.runs) >= SETTLE_MESSAGES

    def put_back(self, other: Work, *, requests: bool = False) -> None:
        """Put what could not be done before what is here: the changes and runs, which are owed, or everything."""
        if other.runs:
            self.runs_since = other.runs_since
        self.changes[:0] = other.changes
        self.runs[:0] = other.runs
        if requests:
            self.requests[:0] = other.requests
            self.reads[:0] = other.reads

    def abandon(self, error: Exception) -> None:
        """Tell everyone who waits that it will not be done."""
        for _, future in [*self.changes, *self.requests, *self.reads]:
            resolve(future, error)
            if not future.cancelled():
                future.exception()  # looked at: most of them are nobody's to wait for


def resolve_all(
    requests: Sequence[tuple[Sequence[Draft], asyncio.Future[Any]]], results: Sequence[list[int | Gap] | Exception]
) -> bool:
    """Give each caller what became of its request; return whether anything was stored."""
    stored = False
    for (_, future), result in zip(requests, results, strict=True):
        if type(result) is list:
            stored = True
            if not future.done():  # or its caller was cancelled, and cannot know
                future.set_result(result)
        else:
            resolve(future, result)
    return stored


def resolve(future: asyncio.Future[Any], outcome: Any) -> None:
    """Give a future its outcome, unless its caller was cancelled: stored or not, that is what it cannot know."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def resolve_soon(future: asyncio.Future[Any], outcome: Any) -> None:
    """Resolve a future of the loop from another thread."""
    future.get_loop().call_soon_threadsafe(resolve, future, outcome)
