"""The durable queue: `send` returns when the message is on the medium. No network here.

When `send` returns, the message is in a committed transaction whose log was synced (``durability="power"``): it
survives kill -9 and power loss, on a disk that keeps what it reported as synced. Cancelling `send` leaves nothing half
done: the message is stored or it is not, and the caller cannot know which; to be certain of one, send again with the
same `id`.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import msgspec

from durablews import database, entries, upkeep
from durablews.clock import Clock, SystemClock
from durablews.config import CapsConfig, Settings, read_settings
from durablews.errors import Dropped, Expired, OutboxClosed, Rejected, Undelivered
from durablews.messages import Entry, Refusal, Run, draft
from durablews.process import same_process, this_process
from durablews.storage import Storage

__all__ = ["Counts", "Outbox", "Receipt", "read_counts"]


class _News:
    """Someone waits for what becomes of one message."""

    __slots__ = ("future", "seq")

    def __init__(self, seq: int, future: asyncio.Future[None]) -> None:
        self.seq = seq
        self.future = future


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What waits in an outbox and what has left it, by reason, over its whole life."""

    pending: int
    pending_bytes: int
    dead: int
    dead_bytes: int
    enqueued: int
    acked: int
    refused: int
    expired: int
    expired_unanswered: int
    dropped: int
    dropped_unanswered: int
    dropped_new: int
    dead_dropped: int
    lost: int
    redelivered: int


class Receipt:
    """What `send` returns: where the message stands in its outbox, and how to wait for its fate.

    Attributes:
        seq: its sequence, or None when the overflow policy dropped it (``drop_new``).
        stream: the outbox's id at the time; a server knows the message by (stream, seq).
    """

    __slots__ = ("_outbox", "seq", "stream")

    def __init__(self, outbox: Outbox, seq: int | None) -> None:
        self._outbox = outbox
        self.seq = seq
        self.stream = outbox.stream

    def __repr__(self) -> str:
        return f"<Receipt seq={self.seq} stream={self.stream[:8]}>"

    async def acked(self, timeout: float | None = None) -> None:
        """Return when the server has acknowledged the message.

        Args:
            timeout: seconds; None waits for as long as it takes.

        Raises:
            Rejected, Expired, Dropped: it left the outbox, or became a dead letter, without an ack.
            Undelivered: it left so long ago that what became of it is no longer known.
            TimeoutError: it still waits.
            OutboxClosed: the outbox was closed while it still waited.
        """
        async with asyncio.timeout(timeout):
            await self._outbox.wait_acked(self.seq)


class Outbox:
    """One outbox file, to write to. Any number of processes may; one `durablews.connect` drains it.

    Args:
        path: the file; created when there is none.
        durability: ``"power"`` (default) or ``"process"``: a commit that only a power loss can take back.
        caps: `max_messages`, `max_bytes`, `max_age` (seconds), `overflow`; only those given change the file's.
        commit_interval: seconds, at most 10, for which a `send` may wait for others to share its commit: less wear on
            flash, more latency.
        clock: for tests.
    """

    _drains = False
    # Seconds between looks at a message that is waited for: here another process drains.
    _poll_interval = 0.1

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durability: str = "power",
        caps: CapsConfig | Mapping[str, Any] | None = None,
        commit_interval: float | str = 0.0,
        clock: Clock | None = None,
    ) -> None:
        # Real, because SQLite puts the log beside the real file, and because a program may change its folder.
        self.path = os.path.realpath(path)
        self.clock: Clock = clock or SystemClock()
        self.stream = ""
        self._caps = read_settings(caps, CapsConfig, "caps").explicit()
        self._process = this_process()
        self._opened = False
        self.storage = Storage(
            self.path,
            durability=durability,
            drainer=self._drains,
            clock=self.clock,
            commit_interval=read_settings({"commit_interval": commit_interval}, Settings, "").commit_interval,
        )
        self.storage.on_settled = self.look_again
        self.storage.on_stored = self._stored
        self._waiting: set[_News] = set()
        # Bytes of log above which one who only writes looks whether it may tidy up.
        self._log_limit = upkeep.LARGEST_LOG

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Open the file; `async with` does it.

        Raises:
            OutboxClosed: it was opened before.
            OutboxError: whatever keeps it from being opened; then it may be tried again.
        """
        if self._opened:
            raise OutboxClosed(self.path, "an outbox is opened once; make another one")
        self._opened = True
        try:
            await self._open()
        except BaseException:
            self._opened = False
            raise

    async def _open(self) -> None:
        self.stream = await self.storage.open(self._first_job)

    async def close(self) -> None:
        """Finish what was handed over and close the file. Safe to call twice."""
        if not self._opened or not same_process(self._process):
            return  # a forked child must not touch its parent's connection (sqlite.org, "How to corrupt", 2.6)
        await self.storage.close()
        for news in self._waiting:
            if not news.future.done():
                news.future.set_exception(OutboxClosed(self.path, "closed while the message still waited"))

    def _first_job(self, connection: sqlite3.Connection) -> str:
        entries.write_caps(connection, self._caps)
        return str(connection.execute("SELECT stream FROM durablews_meta").fetchone()[0])

    async def send(
        self,
        payload: Any,
        *,
        priority: int | str = "normal",
        topic: str | None = None,
        headers: Mapping[str, str] | None = None,
        ttl: float | None = None,
        id: str | None = None,
    ) -> Receipt:
        """Store one message and return when it is on the medium. Never waits for the network.

        Args:
            payload: anything msgspec encodes as JSON (NaN becomes null), or bytes.
            priority: ``"low"``, ``"normal"``, ``"high"``, or -100 to 100; bigger is sooner.
            topic: a word for the server and for the owner's policies.
            headers: strings by name, carried to the server.
            ttl: seconds; older than that, it expires instead of being sent.
            id: your own; a second send with it stores nothing new, also after the first was acknowledged
                (the last 10 000 are remembered).

        Raises:
            PayloadError: it cannot be stored as it is.
            OutboxFull: the caps or the disk have no room (``overflow="reject"``).
            MessageTooLarge: it alone is over the byte cap.
            OutboxLocked: another program held the file for longer than 5 s.
            StorageFailed: the disk failed; `stored` says whether that is known.
            OutboxClosed: the outbox is closed.
        """
        one = draft(payload, priority=priority, topic=topic, headers=headers, ttl=ttl, id=id)
        self._check_process()
        (seq,) = await self.storage.enqueue((one,))
        return Receipt(self, seq if isinstance(seq, int) else None)

    async def send_many(
        self,
        payloads: Iterable[Any],
        *,
        priority: int | str = "normal",
        topic: str | None = None,
        headers: Mapping[str, str] | None = None,
        ttl: float | None = None,
    ) -> list[Receipt]:
        """Store several messages in one transaction: all of them or none, in their order.

        Under ``overflow="drop_new"`` those that fit are stored and the rest is dropped and counted. Arguments and
        errors are those of `send`.
        """
        drafts = [draft(payload, priority=priority, topic=topic, headers=headers, ttl=ttl) for payload in payloads]
        self._check_process()
        if not drafts:
            return []
        return [Receipt(self, seq if isinstance(seq, int) else None) for seq in await self.storage.enqueue(drafts)]

    async def counts(self) -> Counts:
        """Return what waits and what has left."""
        self._check_process()
        return await self.storage.read(read_counts)

    async def wait_acked(self, seq: int | None) -> None:
        """Return when the entry `seq` was acknowledged; raise what became of it instead."""
        if seq is None:
            raise Dropped("the outbox was full: the message was not stored (overflow is drop_new)")
        while True:
            news = self._news_of(seq)
            try:
                fate = await self.storage.read(partial(_fate, seq=seq))
                if isinstance(fate, Undelivered):
                    raise fate
                if fate is None:
                    return
                if fate == seq:
                    await asyncio.wait([news.future], timeout=self._poll_interval)
                    if news.future.done():
                        news.future.result()
                seq = fate  # renumbered, perhaps
            finally:
                self._waiting.discard(news)

    def _news_of(self, seq: int) -> _News:
        news = _News(seq, asyncio.get_running_loop().create_future())
        self._waiting.add(news)
        return news

    def look_again(self, runs: Sequence[Run] | None = None) -> None:
        """Let receipts that are waited for look at their fate again: those in `runs`, or all of them."""
        for news in self._waiting:
            if not news.future.done() and (runs is None or any(run.first <= news.seq <= run.last for run in runs)):
                news.future.set_result(None)

    def _stored(self, entries: Sequence[Entry]) -> None:
        size = database.wal_stamp(self.path)[1]
        if size > self._log_limit and not self.storage.closing:
            # Someone may read the log or drain it, and a try waits for readers: not again for every commit.
            self._log_limit = size + upkeep.LARGEST_LOG
            tidied = self.storage.read(lambda connection: upkeep.checkpoint_if_alone(connection, self.path))
            # Whether it worked is told by the next commit.
            tidied.add_done_callback(self._tidied)

    def _tidied(self, done: asyncio.Future[bool]) -> None:
        if not done.cancelled() and done.exception() is None and done.result():
            self._log_limit = upkeep.LARGEST_LOG

    def _check_process(self) -> None:
        if not same_process(self._process):
            raise OutboxClosed(self.path, "this outbox was opened before a fork: a child must be a program of its own")


def read_counts(connection: sqlite3.Connection) -> Counts:
    """Return the totals of an outbox."""
    row = connection.execute(
        "SELECT messages, bytes, dead_messages, dead_bytes, enqueued, acked, refused, expired, expired_unanswered,"
        " dropped, dropped_unanswered, dropped_new, dead_dropped, lost, redelivered FROM durablews_totals"
    ).fetchone()
    return Counts(**dict(zip(Counts.__struct_fields__, row, strict=True)))


def _fate(connection: sqlite3.Connection, seq: int) -> int | Undelivered | None:
    """Return the sequence under which a message still waits, None when it was acknowledged, or what became of it."""
    while True:
        row = connection.execute("SELECT ack_state, refusal FROM durablews_entries WHERE seq = ?", (seq,)).fetchone()
        if row is not None and row[0] != 2:
            return seq
        if row is not None:
            refusal = msgspec.json.decode(row[1], type=Refusal)
            said = f": {refusal.reason}" if refusal.reason else ""
            return Rejected(
                f"message {seq} was refused ({refusal.code}){said}",
                seq,
                code=refusal.code,
                reason=refusal.reason,
                unknown=refusal.unknown,
            )
        left = connection.execute(
            "SELECT reason, unknown, became FROM durablews_departed WHERE seq = ? ORDER BY id DESC LIMIT 1", (seq,)
        ).fetchone()
        if left is None:
            forgotten = connection.execute("SELECT forgotten FROM durablews_meta").fetchone()[0]
            if seq > forgotten:
                return None
            what = (
                "left the outbox, and whether it was acknowledged is no longer known (10 000 have left without since)"
            )
            return Undelivered(f"message {seq} {what}", seq, unknown=True)
        reason, unknown, became = left
        if reason == "renumbered":
            seq = became
            continue
        sent = "; it had been sent, so the server may have it" if unknown else ""
        if reason == "expired":
            return Expired(f"message {seq} expired before it was acknowledged{sent}", seq, unknown=bool(unknown))
        if reason == "refused":
            return Rejected(f"message {seq} was refused{sent}", seq, code="refused", unknown=bool(unknown))
        return Dropped(f"message {seq} was dropped to make room{sent}", seq, unknown=bool(unknown))
