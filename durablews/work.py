"""What waits for the writer of an outbox, and how much of it goes into one transaction. No I/O."""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from durablews.entries import Gap
from durablews.errors import DurablewsError
from durablews.messages import Draft, Entry, Run

__all__ = ["SETTLE_DELAY", "SETTLE_MESSAGES", "Work", "as_entries", "resolve", "resolve_all", "resolve_soon"]

# Messages in one transaction at most, unless one request or one run has more: 4000 keep the write lock for some 15 ms,
# and to delete them takes no more log than the reserve has room for (durablews/reserve.py).
_LARGEST_TRANSACTION = 4000
#: Acknowledged messages wait for company while others are read to be sent, at most so many and so long (seconds): the
#: fewer transactions, the fewer pages written twice. A crash meanwhile means that the server sees them again.
SETTLE_MESSAGES, SETTLE_DELAY = 2000, 0.05


# So many new messages are handed to the drainer as they are: more are no matter of a moment.
_FEW = 64


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

    def due_at(self, commit_interval: float) -> float:
        """Return the loop's time from which on nothing here waits for company any more; -inf where nothing does."""
        if self.changes or self.reads or len(self.requests) >= _LARGEST_TRANSACTION or self._many_were_acked():
            return -math.inf
        since = [self.requests_since] if self.requests else []
        if self.runs:
            since.append(self.runs_since)
        return min(since, default=-math.inf) + commit_interval

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
        if not self._something_is_due(now, commit_interval):  # only reads are urgent, which commit nothing
            later.requests, self.requests = self.requests, []
            if self.reads:
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

    def _something_is_due(self, now: float, commit_interval: float) -> bool:
        """Whether a transaction is due, which then takes everything along."""
        storing = self.requests and now >= self.requests_since + commit_interval
        settling = self.runs and now >= self.runs_since + max(SETTLE_DELAY, commit_interval)
        return bool(self.changes or storing or settling or self._many_were_acked())

    def _many_were_acked(self) -> bool:
        return sum([run.messages for run in self.runs]) >= SETTLE_MESSAGES

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


def as_entries(
    requests: Sequence[Sequence[Draft]], results: Sequence[list[int | Gap] | DurablewsError], created_at: int
) -> list[Entry]:
    """Return what was stored as it would be read back, without a look at the file.

    Nothing when it is much, which is read by the page, or when not all of it is new: an id that was known, a request
    that found no room.
    """
    if sum(map(len, requests)) > _FEW:
        return []
    entries: list[Entry] = []
    for request, result in zip(requests, results, strict=True):
        if not isinstance(result, list):
            return []
        for draft, seq in zip(request, result, strict=True):
            if isinstance(seq, Gap) or draft.id is not None:
                return []
            beside = (draft.topic, draft.headers, created_at, draft.bytes, 0, 0)
            entries.append(Entry(seq, draft.priority, draft.payload, *beside))
    return entries


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
