"""An outbox as its drainer holds it: the right to drain, what to send next, and what became of what was sent."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sqlite3
from collections import Counter

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from durablews import database, entries, identity, settlement, upkeep
from durablews.delivery.actions import MarkUnanswered, Refuse, Requeue, SetAside, TakeBack, Want
from durablews.delivery.backlog import READ_AHEAD_MESSAGES
from durablews.errors import OutboxDamaged, OutboxInUse, StorageFailed
from durablews.messages import Entry, Refusal, Run
from durablews.outbox import Counts, Outbox, read_counts
from durablews.ownership import Ownership
from durablews.process import same_process
from durablews.work import SETTLE_MESSAGES

__all__ = ["DrainedOutbox", "LinkNote", "Page", "exposure"]

# Seconds that a second client waits for the first to go, and between its looks.
_OWNERSHIP_WAIT, _OWNERSHIP_LOOK = 5.0, 0.05
# A message that is too large for three servers' limits, ten minutes apart, becomes a dead letter (PROTOCOL.md C5).
_TOO_LARGE_TRIES, _TOO_LARGE_BETWEEN = 3, 600_000
# The server's Date and the machine's clock confirm one another when they differ by at most so many ms.
_CONFIRMING = 120_000
# ms of age that a power cut may cost.
_LONGEST_UNSAVED = 60_000


class Page(Struct, frozen=True):
    """What was read for a `Want`. `unfit`: priority, sequence and fault of entries that must not be sent."""

    entries: list[Entry]
    unfit: list[tuple[int, int, str]]


class LinkNote(Struct, frozen=True):
    """How the link stands, for `durablews inspect`. `next_attempt` is in ms since 1970 UTC."""

    state: str
    reason: str | None = None
    blocked: str | None = None
    next_attempt: int | None = None


def exposure(window: int) -> int:
    """Return how many entries of one priority may lie first in the file although they were sent.

    PROTOCOL.md C3 counts those in flight, `window` at most. But what was acknowledged lies there as well until its
    deletion is committed: what waits for company, what is being written, and what is acknowledged while it is, which
    the read-ahead bounds, for nothing more is read meanwhile.
    """
    return window + 2 * (window + READ_AHEAD_MESSAGES) + SETTLE_MESSAGES


def _save_every(boot: int) -> int:
    """Return after how many ms the outbox clock is written down, so many after the machine's boot.

    A machine whose power goes every half minute must not stay in the same minute for ever: half of each time that it
    was on is kept at least. That is seven more commits for a boot.
    """
    return min(_LONGEST_UNSAVED, max(1000, boot // 2))


class DrainedOutbox(Outbox):
    """An outbox that this process, and no other, drains.

    Args are those of `Outbox`, and `window`: the most that will ever be in flight.
    """

    _drains = True
    # Its own settlements wake receipts at once; only what other processes drop has to be looked for.
    _poll_interval = 5.0

    window = 1024
    #: That what waits cannot be read, as a sentence; only its owner can mend that.
    damage: str | None = None

    async def _open(self) -> None:
        """Take the right to drain and open the file.

        Raises:
            OutboxInUse: another client drains it, and did not go within 5 s.
        """
        # By priority: entries whose fate is not written yet, and whether a read has left out their priority for that.
        self._unwritten = Counter[int]()
        self._withheld = False
        # In flight on connections that were lost, which is not written yet.
        self._unmarked: list[Run] = []
        self._ownership = Ownership(self.path)
        deadline = asyncio.get_running_loop().time() + _OWNERSHIP_WAIT
        while (holder := self._acquire()) is not None:
            if asyncio.get_running_loop().time() >= deadline:
                raise OutboxInUse(self.path, holder)
            await asyncio.sleep(_OWNERSHIP_LOOK)
        try:
            await super()._open()
        except BaseException:
            self._ownership.release()
            raise

    def _acquire(self) -> str | None:
        try:
            return self._ownership.acquire()
        except OSError as exc:
            raise StorageFailed(self.path, f"its lock file cannot be written: {exc.strerror}") from exc

    def _first_job(self, connection: sqlite3.Connection) -> str:
        super()._first_job(connection)
        connection.execute(
            "UPDATE durablews_link SET pid = ?, host = ?, started_at = ?, state = 'DISCONNECTED', since = ?,"
            " reason = NULL, blocked = NULL, next_attempt = NULL",
            (os.getpid(), socket.gethostname(), self.clock.wall(), self.clock.wall()),
        )
        return identity.take_over(
            connection,
            self.path,
            machine=identity.machine_id(),
            window=exposure(self.window),
            draw=secrets.randbelow,
        )

    async def close(self) -> None:
        """Finish what was handed over, close the file, give the right to drain back."""
        if not self._opened or not same_process(self._process):
            return
        try:
            await super().close()
        finally:
            self._ownership.release()

    def leave(self) -> asyncio.Future[None]:
        """Note, as the last change, that nothing was in flight any more, and how late it is."""

        def job(connection: sqlite3.Connection) -> None:
            identity.leave(connection)
            self._save_clock(connection)

        return self.storage.change(job)

    # -- what to send

    def fetch(self, want: Want) -> asyncio.Future[Page]:
        """Read what a `Delivery` wants, all of it on the medium already.

        A nack of an earlier connection may not be written yet, where the disk is full or locked. Its message must not
        go under its old sequence any more, and what follows it must wait (PROTOCOL.md C8): a `Delivery` knows that of
        the connection that it has.
        """
        closed = want.closed | {priority for priority, unwritten in self._unwritten.items() if unwritten}
        self._withheld = self._withheld or closed != want.closed
        return self.storage.read(lambda connection: self._fetch(connection, want, closed))

    def _fetch(self, connection: sqlite3.Connection, want: Want, closed: frozenset[int]) -> Page:
        after = dict(want.after)
        for run in self.storage.committer.owed:  # acknowledged, and the disk could not say so yet
            after[run.priority] = max(after.get(run.priority, 0), run.last)

        def peek(connection: sqlite3.Connection) -> Page:
            found, unfit = entries.peek(
                connection,
                after=after,
                closed=closed,
                limit=want.limit,
                max_bytes=want.max_bytes,
                above=want.above,
            )
            unfit += [(entry.seq, "damaged") for entry in found if entry.headers is not None and not _is_whole(entry)]
            if unfit:
                bad = {seq for seq, _ in unfit}
                found = [entry for entry in found if entry.seq not in bad]
            highest = identity.sendable_last(connection)
            if highest is not None:
                found = [entry for entry in found if entry.seq <= highest]
            return Page(found, [(_priority_of(connection, seq), seq, fault) for seq, fault in unfit])

        try:
            with database.storage_errors(self.path):
                return self.storage.committer.synced_read(connection, peek)
        except OutboxDamaged as exc:
            self.damage = exc.what
            raise

    async def introduce(self) -> tuple[str, int]:
        """Return the stream and the `last` of a hello that is sent now."""
        return self.stream, await self.storage.read(identity.claimed_last)

    # -- what became of it

    def record(self, action: Refuse | Requeue | SetAside) -> asyncio.Future[Refusal | None]:
        """Write what becomes of one entry, before anything that follows it is read and sent.

        Under ``durability="process"`` its commit is not synced by itself; `Committer.synced_read`, through which every
        later entry comes, does that first (PROTOCOL.md C8).

        Returns:
            Why it is a dead letter now, or None.
        """
        written = self.storage.change(lambda connection: self._record(connection, action))
        self._unwritten[action.priority] += 1
        written.add_done_callback(lambda _: self._written(action.priority))
        return written

    def _written(self, priority: int) -> None:
        self._unwritten[priority] -= 1
        if self._withheld and not self._unwritten[priority]:
            self._withheld = any(self._unwritten.values())
            self.storage.on_stored(())

    def _record(self, connection: sqlite3.Connection, action: Refuse | Requeue | SetAside) -> Refusal | None:
        wall = self.clock.wall()
        if isinstance(action, Requeue):
            settlement.requeue(connection, action.seq, wall)
            return None
        refusal = action.refusal
        nacked = isinstance(action, Refuse) and action.nacked
        if not nacked and settlement.is_unanswered(connection, action.seq):
            refusal = replace(refusal, unknown=True)
        if isinstance(action, SetAside) and not refusal.unknown:
            now = entries.outbox_time(connection, self.clock)
            settlement.set_aside(connection, action.seq, replace(refusal, tries=[now]))
            return None
        # What may have been applied cannot come back under a new sequence (C3), and may not hold up the rest (C5).
        settlement.refuse(connection, action.seq, refusal, wall)
        return refusal

    def mark(self, action: MarkUnanswered | TakeBack) -> None:
        """Write what an answer or a loss showed about entries that stay."""
        wall = self.clock.wall()
        if isinstance(action, MarkUnanswered):
            marked = self.storage.change(lambda connection: settlement.mark_unanswered(connection, action.runs, wall))
            self._unmarked += action.runs
            marked.add_done_callback(lambda _: self._forget(action))
        else:
            self.storage.change(lambda connection: settlement.take_back(connection, action.run, wall))

    def _forget(self, action: MarkUnanswered) -> None:
        for run in action.runs:
            self._unmarked.remove(run)

    def claims(self, in_flight: entries.Claims) -> entries.Claims:
        """Return what no policy may take: what is in flight, and what was on a lost connection and is not marked yet.

        An expiry that a full or locked disk held up runs before the marks: it would report what was sent as never sent.
        """
        claims = dict(in_flight)
        for run in self._unmarked:
            first, last = claims.get(run.priority, (run.first, run.last))
            claims[run.priority] = min(first, run.first), max(last, run.last)
        return claims

    def settle(self, run: Run) -> None:
        """Delete what the server acknowledged."""
        self.storage.settle(run)

    async def renew_stream(self) -> None:
        """Give the outbox a new stream, on the medium when this returns, whatever the durability setting."""
        self.stream = await self.storage.change(identity.renew_stream)
        await self.storage.read(lambda connection: self.storage.committer.synced_read(connection, lambda _: None))

    def welcomed(self, max_bytes: int | None) -> asyncio.Future[list[tuple[int, Refusal]]]:
        """Note that a server takes frames of `max_bytes`; the future gives what was too large for too long."""

        def job(connection: sqlite3.Connection) -> list[tuple[int, Refusal]]:
            identity.confirm_raise(connection)
            return settlement.return_aside(
                connection,
                2**62 if max_bytes is None else max_bytes,
                entries.outbox_time(connection, self.clock),
                self.clock.wall(),
                between=_TOO_LARGE_BETWEEN,
                tries=_TOO_LARGE_TRIES,
            )

        return self.storage.change(job)

    # -- upkeep

    def note_link(self, note: LinkNote) -> asyncio.Future[None]:
        """Write how the link stands, for `durablews inspect`."""
        since = self.clock.wall()

        def job(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE durablews_link SET since = CASE state WHEN :state THEN since ELSE :since END, state = :state,"
                " reason = :reason, blocked = :blocked, next_attempt = :next",
                {
                    "state": note.state,
                    "since": since,
                    "reason": note.reason,
                    "blocked": note.blocked,
                    "next": note.next_attempt,
                },
            )

        return self.storage.change(job)

    async def expire(self) -> Counts:
        """Delete what is too old, and return what waits and what has left."""
        counts, due = await self.storage.read(self._something_is_due)
        if due:
            self.storage.unread()
            await self.storage.change(self._expire)
            self.look_again()
            counts = await self.storage.read(read_counts)
        return counts

    def _something_is_due(self, connection: sqlite3.Connection) -> tuple[Counts, bool]:
        now = entries.outbox_time(connection, self.clock)
        max_age = entries.read_caps(connection).max_age
        return read_counts(connection), settlement.is_due(connection, now, max_age, _save_every(self.clock.boot()))

    def _expire(self, connection: sqlite3.Connection) -> None:
        # Written down whenever age matters, so that it goes on counting after a reboot.
        now = self._save_clock(connection)
        max_age = entries.read_caps(connection).max_age
        settlement.expire(connection, now, max_age, self.storage.committer.claimed, self.clock.wall())

    def _save_clock(self, connection: sqlite3.Connection) -> int:
        """Write the outbox clock down, and return it."""
        now = entries.outbox_time(connection, self.clock)
        connection.execute(
            "UPDATE durablews_meta SET clock = ?, boot = ?, boot_clock = ?",
            (now, self.clock.boot_id, self.clock.boot()),
        )
        return now

    def restore_reserve(self) -> asyncio.Future[bool]:
        """Make the reserve whole if there is room; the future says whether it is."""
        return self.storage.read(lambda connection: self.storage.committer.reserve.restore())

    def give_back(self) -> asyncio.Future[bool]:
        """Give some free pages of the file back; the future says whether there are more."""
        return self.storage.read(upkeep.give_back)

    def shorten_log(self) -> asyncio.Future[int]:
        """Empty a log that has grown; the future gives the bytes of it that another program holds, mostly 0."""
        return self.storage.read(lambda connection: upkeep.shorten_log(connection, self.path))

    def confirm_wall_clock(self, server_date: int) -> None:
        """Take a server's Date (ms since 1970 UTC) as a witness of the wall clock.

        Time that the machine was switched off counts as age once a server's Date agreed with the wall clock both
        before and after.
        """
        wall = self.clock.wall()
        if abs(wall - server_date) <= _CONFIRMING:
            self.storage.change(lambda connection: self._confirm(connection, wall))

    def _confirm(self, connection: sqlite3.Connection, wall: int) -> None:
        now = entries.outbox_time(connection, self.clock)
        boot, confirmed_wall, confirmed_at = connection.execute(
            "SELECT confirmed_boot, confirmed_wall, confirmed_at FROM durablews_meta"
        ).fetchone()
        if boot is not None and boot != self.clock.boot_id:
            now += max(0, (wall - confirmed_wall) - (now - confirmed_at))
        connection.execute(
            "UPDATE durablews_meta SET clock = ?, boot = ?, boot_clock = ?, confirmed_boot = ?, confirmed_wall = ?,"
            " confirmed_at = ?",
            (now, self.clock.boot_id, self.clock.boot(), self.clock.boot_id, wall, now),
        )


def _is_whole(entry: Entry) -> bool:
    """Whether the headers, for which there is no checksum, are still what a frame can take."""
    try:
        msgspec.json.decode(entry.headers or "{}", type=dict[str, str])
    except (ValueError, RecursionError):
        return False
    return True


def _priority_of(connection: sqlite3.Connection, seq: int) -> int:
    return int(connection.execute("SELECT priority FROM durablews_entries WHERE seq = ?", (seq,)).fetchone()[0])
