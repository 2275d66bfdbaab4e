"""What the writer of an outbox does on its connection's thread: whole transactions, and reads of what is synced."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from durablews import database, entries
from durablews.clock import Clock
from durablews.entries import Claims, Gap
from durablews.errors import DurablewsError, OutboxError, StorageFailed
from durablews.jobs import transaction
from durablews.messages import Draft, Entry, Run
from durablews.reserve import Reserve
from durablews.settlement import CountsDiffer, settle, settle_at_once, stamp_unseen
from durablews.work import Work, as_entries, resolve_soon

__all__ = ["Committer", "Enqueued"]

T = TypeVar("T")
#: What became of one request to enqueue.
Enqueued = list[int | Gap] | DurablewsError


class Committer:
    """The transactions of one open outbox, one at a time.

    Args:
        path: the outbox.
        durability: ``"power"`` or ``"process"``.
        drainer: whether this process drains it, and so checkpoints.
        clock: time.
    """

    def __init__(self, path: str, *, durability: str, drainer: bool, clock: Clock) -> None:
        self._path = path
        self._durability = durability
        self._drainer = drainer
        self._clock = clock
        self.reserve = Reserve(path, drainer=drainer)
        #: The claims of the transaction that runs.
        self.claimed: Claims = {}
        #: Acknowledged runs that are still in the file, for the reads of the same job.
        self.owed: Sequence[Run] = ()
        #: What the transaction of the last job stored, where nothing else can stand before it.
        self.tail: Sequence[Entry] = ()
        #: Which file it is, wherever its path leads by now (`database.file_id`).
        self.file: tuple[int, int] | None = None
        #: Whether other connections were seen to have written; whoever acts on it takes it back.
        self.others_wrote = False
        # Everything up to this data_version is synced, unless `_unsynced`.
        self._synced_version = -1
        self._unsynced = False

    def begin(self, connection: sqlite3.Connection, first: Callable[[sqlite3.Connection], T]) -> T:
        """Set the connection up, and run `first` in one synced transaction before anything else."""
        with database.room_to_open(self._path):
            database.prepare(connection, self._path, drainer=self._drainer)
        self.reserve.open(connection)

        def opening() -> T:
            with transaction(connection):
                entries.outbox_time(connection, self._clock)
                self._synced_version = self._absorb(connection)
                return first(connection)

        result = self.reserve.insist(connection, opening)
        if self._durability != "power":
            database.set_synchronous(connection, self._path, database.SYNCHRONOUS[self._durability])
        return result

    def run(
        self, connection: sqlite3.Connection, work: Work, waiting: Sequence[Run]
    ) -> tuple[list[Enqueued], OutboxError | None]:
        """One transaction, then the reads. When it fails, what is owed is tried again without the requests."""
        requests = [drafts for drafts, _ in work.requests]
        owed = partial(self._transaction, connection, work, ())
        results: list[Enqueued] = []
        error: OutboxError | None = None
        self.tail = ()
        if work.requests or work.changes or work.runs:
            try:
                if requests:
                    storing = partial(self._transaction, connection, work, requests)
                    results = self.reserve.insist(connection, storing, owed=False)
                else:
                    self.reserve.insist(connection, owed)
            except OutboxError as exc:
                results, error = [exc] * len(requests), exc
                if requests and (work.changes or work.runs):
                    try:
                        self.reserve.insist(connection, owed)
                    except OutboxError as again:
                        error = again
                        with contextlib.suppress(OutboxError):  # what is owed must not keep others from storing
                            results = self._transaction(connection, Work(), requests)
                        self.tail = ()  # what is owed may come to stand before it
                    else:
                        error = None
                elif requests:
                    error = None
        self.owed = [*waiting, *work.runs] if error else waiting
        for job, future in work.reads:
            try:
                outcome: Any = self.reserve.insist(connection, partial(job, connection))
            except Exception as exc:
                outcome = exc
            resolve_soon(future, outcome)
        return results, error

    def synced_read(self, connection: sqlite3.Connection, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run `job` so that all it sees is on the medium (PROTOCOL.md C8).

        What another connection committed may be in the operating system's cache only, and so may our own commits under
        ``durability="process"``: then one synced commit that writes something comes first, which syncs the log up to
        and including everything before it.
        """
        connection.execute("BEGIN")
        try:
            result = job(connection)
            version = _data_version(connection)
        finally:
            connection.execute("COMMIT")
        if version == self._synced_version and not self._unsynced:
            return result
        database.set_synchronous(connection, self._path, database.SYNCHRONOUS["power"])
        try:
            with transaction(connection):
                version = self._absorb(connection)
                # There and back: SQLite writes no row that stays as it is, and what writes no page is not synced.
                for step in (1, -1):
                    connection.execute("UPDATE durablews_meta SET boot_clock = boot_clock + ?", (step,))
                result = job(connection)
        finally:
            database.set_synchronous(connection, self._path, database.SYNCHRONOUS[self._durability])
        self._synced_version, self._unsynced = version, False
        return result

    def _transaction(
        self, connection: sqlite3.Connection, work: Work, requests: Sequence[Sequence[Draft]]
    ) -> list[Enqueued]:
        try:
            with database.storage_errors(self._path):
                try:
                    results, outcomes = self._write(connection, work, requests, settle_at_once)
                except CountsDiffer:
                    results, outcomes = self._write(connection, work, requests, settle)
        except DurablewsError:
            raise
        except Exception as exc:  # a defect of ours: its callers must hear of it, and the writer must live on
            raise StorageFailed(self._path, f"a defect in durablews: {exc!r}; nothing was stored") from exc
        for (_, future), outcome in zip(work.changes, outcomes, strict=True):
            resolve_soon(future, outcome)
        return results

    def _write(
        self,
        connection: sqlite3.Connection,
        work: Work,
        requests: Sequence[Sequence[Draft]],
        settle_runs: Callable[[sqlite3.Connection, Sequence[Run]], None],
    ) -> tuple[list[Enqueued], list[Any]]:
        results: list[Enqueued] = []
        self.reserve.admit(connection, requests)
        with transaction(connection):
            version = self._absorb(connection) if self._drainer else -1
            if work.runs:
                settle_runs(connection, work.runs)
            outcomes = [job(connection) for job, _ in work.changes]
            if requests:
                wall = self._clock.wall()
                results = entries.enqueue(
                    connection, self._path, requests, clock=self._clock, claims=self.claimed, wall=wall
                )
            # Under the write lock, so that a salvage cannot come between; a stat costs 2 µs.
            database.require_same_file(self._path, self.file)
        self._synced_version = version
        self._unsynced = self._durability != "power"
        # Changes may have put something before it, and so may others; and nothing is sent that is not synced.
        if requests and self._drainer and not (work.changes or self.others_wrote or self._unsynced):
            self.tail = as_entries(requests, results, wall)
        return results, outcomes

    def _absorb(self, connection: sqlite3.Connection) -> int:
        """Start the age of what others inserted; return the data_version that this transaction stands on."""
        version = _data_version(connection)
        if version != self._synced_version:
            self.others_wrote = True
            stamp_unseen(connection, entries.outbox_time(connection, self._clock))
        return version


def _data_version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA data_version").fetchone()[0])
