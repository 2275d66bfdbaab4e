"""The writer of one outbox file: everything that waits becomes one transaction, concurrent senders share one sync.

Two kinds of work come in. A *request* to enqueue has a caller who is told what became of it. A *change* (an
acknowledgement to settle, a dead letter) is owed: the server has acted on it already, so that a full or failing disk
only delays it, visibly in `trouble`, until it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import aiosqlite

from durablews import database
from durablews.clock import Clock
from durablews.committing import Committer
from durablews.connecting import open_connection
from durablews.entries import Claims, Gap
from durablews.errors import OutboxClosed, OutboxError, OutboxFull, StorageFailed
from durablews.jobs import run_job
from durablews.messages import Draft, Entry, Run
from durablews.process import note_closed, note_opened, was_open_before_fork
from durablews.work import SETTLE_DELAY, Work, resolve_all

__all__ = ["Storage"]

T = TypeVar("T")

# Seconds between tries of owed changes while the disk fails: doubling from the first to the second.
_RETRY_DELAYS = (0.5, 30.0)


class Storage:
    """One open outbox file.

    Args:
        path: the outbox; created when there is none.
        durability: ``"power"``: a commit is synced before it is reported. ``"process"``: it survives a kill only.
        drainer: whether this process drains it, and so checkpoints.
        clock: time.
        commit_interval: seconds for which requests and deletions wait for others to share their commit.
    """

    def __init__(
        self, path: str, *, durability: str, drainer: bool, clock: Clock, commit_interval: float = 0.0
    ) -> None:
        self.path = path
        self.clock = clock
        #: What its own drainer is about to send or has sent: no policy of this process takes it. Asked in the loop
        #: before each transaction, when everything that was read by the transactions before it has arrived there.
        self.claims: Callable[[], Claims] = dict
        #: Gives up what was read and not sent, so that a policy may take it; says whether there was any.
        self.unread: Callable[[], bool] = lambda: False
        #: Called in the loop after messages were stored, with those that need not be read back, and after runs were
        #: settled.
        self.on_stored: Callable[[Sequence[Entry]], None] = lambda entries: None
        self.on_settled: Callable[[Sequence[Run]], None] = lambda runs: None
        self.committer = Committer(path, durability=durability, drainer=drainer, clock=clock)
        self._trouble: str | None = None
        self._commit_interval = commit_interval
        self._db: aiosqlite.Connection | None = None
        self._writer: asyncio.Task[None] | None = None
        self._next = Work()
        self._wake = asyncio.Event()
        self._closing = False
        self._deferred = False

    async def open(self, first: Callable[[sqlite3.Connection], T]) -> T:
        """Open the file and run `first` in one synced transaction before anything else.

        Raises:
            OutboxError: whatever keeps it from being opened.
        """
        await asyncio.to_thread(self._create)
        with database.storage_errors(self.path):
            self._db = await open_connection(database.uri(self.path, "rw"), uri=True, timeout=database.BUSY_TIMEOUT)
        note_opened(self.committer.file)
        try:
            with database.storage_errors(self.path):
                result = await run_job(self._db, lambda connection: self.committer.begin(connection, first))
        except BaseException:
            await self._stop()
            raise
        self._loop = asyncio.get_running_loop()
        self._writer = asyncio.create_task(self._write_loop(), name=f"durablews writer {self.path}")
        return result

    async def close(self) -> None:
        """Finish what was handed over, then close the file. Owed changes that fail now are left to the next opening."""
        self._closing = True
        self._wake.set()
        # A task of its own: who is cancelled while it waits must not take the file away from under the writer.
        await asyncio.shield(asyncio.create_task(self._finish(), name=f"durablews closing {self.path}"))

    async def _finish(self) -> None:
        try:
            if self._writer is not None:
                await self._writer
        finally:
            await self._stop()

    def check_file(self) -> None:
        """Raise StorageFailed when the file was removed, moved away or replaced since it was opened."""
        database.require_same_file(self.path, self.committer.file)

    @property
    def trouble(self) -> str | None:
        """What ails the disk, as a sentence: why owed changes cannot be written just now, or new messages; or None."""
        return self._trouble or self.committer.reserve.trouble

    @trouble.setter
    def trouble(self, trouble: str | None) -> None:
        self._trouble = trouble

    @property
    def closing(self) -> bool:
        """Whether it takes nothing more."""
        return self._closing

    def enqueue(self, drafts: Sequence[Draft]) -> asyncio.Future[list[int | Gap]]:
        """Store messages in the next transaction; the future gives their sequences once it is committed."""
        # Written out, for every message passes here: see `_future`.
        if self._closing or self._writer is None or self._writer.done():
            raise OutboxClosed(self.path, "the outbox is closed")
        future: asyncio.Future[list[int | Gap]] = self._loop.create_future()
        if self._commit_interval and not self._next.requests:
            self._next.requests_since = self._loop.time()
        self._next.requests.append((drafts, future))
        self._wake.set()
        return future

    def change(self, job: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Run `job` in the next transaction; the future gives what it returned once that is committed."""
        future = self._future()
        self._next.changes.append((job, future))
        self._wake.set()
        return future

    def settle(self, run: Run) -> None:
        """Delete acknowledged entries in the next transaction."""
        self._next.settle(run, asyncio.get_running_loop().time())
        self._wake.set()

    def read(self, job: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Run `job`, which only reads, after everything that was handed over before it."""
        future = self._future()
        self._next.reads.append((job, future))
        self._wake.set()
        return future

    # -- in the loop

    def _future(self) -> asyncio.Future[Any]:
        if self._closing or self._writer is None or self._writer.done():
            raise OutboxClosed(self.path, "the outbox is closed")
        return self._loop.create_future()

    async def _write_loop(self) -> None:
        delay = _RETRY_DELAYS[0]
        try:
            while True:
                if not self._next and self._closing:
                    return
                await self._wait_for_work()
                self._wake.clear()
                work = self._take()
                error = await self._perform(work)
                if error is None:
                    delay, self.trouble = _RETRY_DELAYS[0], None
                    continue
                self.trouble = error.what
                if self._closing:
                    self._next.abandon(error)
                    return
                # New requests are tried at once, each with the owed changes; only those alone wait.
                await self._pause(delay)
                delay = min(delay * 2, _RETRY_DELAYS[1])
        except asyncio.CancelledError:
            # The loop is going down without close(): the connection's thread would keep the interpreter alive.
            if self._db is not None and (stopped := self._db.stop()) is not None:
                await stopped  # while there is a loop to be told
            raise
        except BaseException as exc:
            # A defect of ours: nobody may wait for ever for a writer that is gone.
            self._next.abandon(
                StorageFailed(self.path, f"a defect in durablews ended its writer: {exc!r}", stored=None)
            )
            raise

    async def _wait_for_work(self) -> None:
        """Return when there is something to do now: acknowledged runs may wait for company."""
        work = self._next
        if self._closing or work.is_urgent:
            pass
        elif not work.runs:
            await self._wake.wait()
        elif self._deferred:
            # They were left out of a transaction of reads: more acks will come, and whatever comes next ends this.
            self._deferred = False
            self._wake.clear()
            left = work.runs_since + SETTLE_DELAY - asyncio.get_running_loop().time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, left)):
                    await self._wake.wait()
        while self._commit_interval and not self._closing and self._loop.time() < work.due_at(self._commit_interval):
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(work.due_at(self._commit_interval)):
                    await self._wake.wait()

    async def _pause(self, delay: float) -> None:
        deadline = asyncio.get_running_loop().time() + delay
        while not (self._next.requests or self._next.reads or self._closing):
            self._wake.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._wake.wait()
            except TimeoutError:
                return

    def _take(self) -> Work:
        work = self._next
        self._next = work.split(self._loop.time(), 0.0 if self._closing else self._commit_interval)
        self._deferred = bool(self._next.runs)
        return work

    async def _perform(self, work: Work) -> OutboxError | None:
        """Do one transaction's work; return why what is owed could not be written, after putting it back."""
        assert self._db is not None
        waiting = list(self._next.runs)
        self.committer.claimed = self.claims()
        try:
            results, error = await run_job(self._db, lambda connection: self.committer.run(connection, work, waiting))
        except BaseException:
            self._next.put_back(work, requests=True)
            raise
        requests = work.requests
        full = {n for n, result in enumerate(results) if isinstance(result, OutboxFull) and result.droppable}
        if full and self.unread():  # there is something now that may be dropped for them
            self._next.requests[:0] = [requests[n] for n in sorted(full)]
            requests = [request for n, request in enumerate(requests) if n not in full]
            results = [result for n, result in enumerate(results) if n not in full]
        stored = resolve_all(requests, results)
        if error is None:
            if work.runs:
                self.on_settled(work.runs)
        else:
            self._next.put_back(work)
        if self.committer.others_wrote:
            self.committer.others_wrote = False
            self.on_stored(())  # theirs may stand before what is stored next
        elif stored:
            self.on_stored(self.committer.tail)
        return error

    async def _stop(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            try:
                if database.file_id(self.path) != self.committer.file:
                    await run_job(db, _spare_the_log)
                await db.close()
            finally:
                note_closed(self.committer.file)

    # -- on the connection's thread

    def _create(self) -> None:
        database.create(self.path)
        database.require_file(self.path)
        self.committer.file = database.file_id(self.path)
        if was_open_before_fork(self.committer.file):
            raise StorageFailed(
                self.path,
                "the process that this one was forked from had it open, and SQLite cannot share it: start a program of"
                " its own (multiprocessing: spawn), or close the outbox before the fork",
            )


def _spare_the_log(connection: sqlite3.Connection) -> None:
    """Keep SQLite from removing, by its name, a log that is another file's by now. Python 3.11 has no way to say so."""
    if sys.version_info >= (3, 12):
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, True)
