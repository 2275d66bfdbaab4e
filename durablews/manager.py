"""Keeps one link alive: dials, runs it, waits, dials again. Nothing that the network answers ends it."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import secrets
from collections.abc import Callable

from msgspec import Struct

from durablews import __version__
from durablews.backoff import Backoff
from durablews.config import Settings
from durablews.database import wal_stamp
from durablews.delivery.actions import MarkUnanswered, Refuse, RenewStream, Requeue, SetAside, TakeBack
from durablews.delivery.delivery import Delivery
from durablews.delivery.suspicion import Closed
from durablews.dialling import DialFailed, Endpoint, dial, server_date
from durablews.draining import DrainedOutbox, LinkNote
from durablews.errors import OutboxError, ProtocolError
from durablews.events import Connected, Departed, Disconnected, EventLog, Exhausted, Failed, Reconnecting, Refused
from durablews.heartbeat import Heartbeat
from durablews.lifecycle import Lifecycle, LinkEvent, State
from durablews.link import Link
from durablews.outbox import Counts
from durablews.wire.dialect import Dialect, Introduction

__all__ = ["ConnectionManager", "Outcome"]

_log = logging.getLogger("durablews.manager")

# How often the log of the outbox is looked at for what other processes enqueued: they wait for 100 ms at most.
_WATCH_INTERVAL = 0.08
# How often age, counts and the link's note are seen to.
_UPKEEP_INTERVAL = 1.0
_NOTE_INTERVAL = 5.0
# Closes that mean the same trouble again: so many in a row without progress are a `blocked` reason (PROTOCOL.md 6).
_BLOCKED_AFTER = 5
_SERVER_FAULTS = frozenset({1002, 1011})
_NOT_ALLOWED = frozenset({1008, 4401, 4403})
_SLOW_DOWN = 4429
_LONGEST_RETRY = 3600.0
_DEPARTURES = (
    "refused",
    "expired",
    "expired_unanswered",
    "dropped",
    "dropped_unanswered",
    "dropped_new",
    "dead_dropped",
)


class Outcome(Struct, frozen=True, kw_only=True):
    """How one attempt ended, and what that means for the next."""

    reason: str
    progressed: bool = False
    connected_for: float = 0.0
    at_least: float = 0.0
    blocked: str | None = None
    longest: bool = False


class ConnectionManager:
    """The life of one client's link.

    Args:
        settings: all of them.
        endpoint: where to connect, asked anew on every attempt.
        outbox: open, and ours to drain.
        dialect: what the server speaks.
        events: where to report.
        on_push: called with each pushed message.
    """

    def __init__(
        self,
        settings: Settings,
        endpoint: Endpoint,
        outbox: DrainedOutbox,
        dialect: Dialect,
        *,
        events: EventLog,
        on_push: Callable[[str | bytes], None],
    ) -> None:
        self._settings = settings
        self._endpoint = endpoint
        self._outbox = outbox
        self._dialect = dialect
        self._events = events
        self._on_push = on_push
        self._instance = secrets.token_hex(8)
        self._delivery = Delivery(settings.delivery, instance=self._instance)
        outbox.storage.claims = self._delivery.claims
        outbox.storage.unread = self._delivery.unread
        self._lifecycle = Lifecycle(self._state_changed)
        retry = settings.reconnect
        self._backoff = Backoff(
            base_delay=retry.base_delay,
            max_delay=retry.max_delay,
            factor=retry.factor,
            jitter=retry.jitter,
            random=random.random,
        )
        self._link: Link | None = None
        self._wake = asyncio.Event()
        self._note_due = asyncio.Event()
        self._faults = 0
        self._counts: Counts | None = None
        #: Why the link is as it is, as a sentence; and what only the owner can mend.
        self.reason: str | None = None
        self.blocked: str | None = None
        self._next_attempt: int | None = None
        self.connects = 0
        #: Set, and replaced by a new one, when something is settled, stored or changed: for who waits for emptiness.
        self.moves = asyncio.Event()

    @property
    def state(self) -> State:
        return self._lifecycle.state

    @property
    def stray_answers(self) -> int:
        return self._delivery.stray_answers

    def wake(self) -> None:
        """Dial now instead of waiting for the next try."""
        self._wake.set()

    def moved(self) -> None:
        """Let those who wait for emptiness look again. Each has the event that it saw: none takes another's news."""
        self.moves.set()
        self.moves = asyncio.Event()

    def stored(self) -> None:
        """Take note that the outbox may hold more than before."""
        self.moved()
        if self._link is not None:
            self._link.stored()

    async def leave(self) -> None:
        """Close the connection, if there is one, as a client does that goes away."""
        link = self._link
        if link is not None:
            link.close(1000, "the client is closing")
            await link.ended.wait()

    async def run(self) -> None:
        """Run until cancelled, or until `max_retries` is exhausted."""
        watchers = [
            asyncio.create_task(self._watch(), name="durablews watch"),
            asyncio.create_task(self._keep_up(), name="durablews upkeep"),
            asyncio.create_task(self._note_changes(), name="durablews note"),
        ]
        try:
            for watcher in watchers:
                watcher.add_done_callback(self._watcher_ended)
            await self._dial_for_ever()
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            if self.state is not State.DISCONNECTED:
                self._lifecycle.apply(LinkEvent.STOP)

    async def _dial_for_ever(self) -> None:
        failures = 0
        event = LinkEvent.START
        while True:
            self._lifecycle.apply(event)
            outcome = await self._attempt()
            self.reason, self.blocked = outcome.reason, outcome.blocked
            self._lifecycle.apply(LinkEvent.LOST)
            stable = outcome.connected_for >= self._settings.reconnect.stable_after
            if outcome.progressed or stable:
                self._backoff.reset()
                failures = 0
            failures += 1
            most = self._settings.reconnect.max_retries
            if most is not None and failures > most:
                self._lifecycle.apply(LinkEvent.EXHAUSTED)
                self._events.put(Exhausted(failures))
                await self._note()
                return
            await self._pause(outcome, failures)
            event = LinkEvent.RETRY

    async def _pause(self, outcome: Outcome, attempt: int) -> None:
        """Wait for the next try, or for `wake`."""
        delay = self._backoff.longest_delay() if outcome.longest else self._backoff.next_delay()
        if outcome.at_least:
            # Everybody was told the same figure: spread them beyond it.
            delay = outcome.at_least + delay
        self._next_attempt = self._outbox.clock.wall() + int(delay * 1000)
        self._events.put(Reconnecting(attempt, delay))
        self._note_due.set()
        self._wake.clear()
        try:
            async with asyncio.timeout(delay):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._next_attempt = None

    # -- one attempt

    async def _attempt(self) -> Outcome:
        now = asyncio.get_running_loop().time
        welcome_by = now() + self._settings.reconnect.connect_timeout
        try:
            async with asyncio.timeout_at(welcome_by):
                websocket, shown = await dial(self._endpoint, self._settings, self._dialect.subprotocols)
        except TimeoutError:
            return self._failed(DialFailed(f"no answer within {self._settings.reconnect.connect_timeout:g} s"))
        except DialFailed as exc:
            return self._failed(exc)
        started = now()
        closed, link = Closed(code=1006, reason="the link was lost"), None
        try:
            try:
                wire = self._dialect.connection(websocket.subprotocol)
            except ProtocolError as exc:
                await websocket.close(1002, "no subprotocol of durablews")
                return self._failed(DialFailed(str(exc), blocked=True))
            date = server_date(websocket)
            if date is not None:
                self._outbox.confirm_wall_clock(date)
            link = Link(
                websocket,
                wire,
                delivery=self._delivery,
                outbox=self._outbox,
                heartbeat=Heartbeat(self._settings.heartbeat, started),
                introduction=self._introduction,
                events=self._events,
                on_welcome=lambda: self._welcomed(shown),
                on_push=self._on_push,
            )
            self._link = link
            closed = await link.run(welcome_by)
        except asyncio.CancelledError:
            closed = Closed(code=1001, reason="the client is closing", leaving=True)
            raise
        except OutboxError as exc:
            self._outbox.storage.trouble = exc.what
            closed = Closed(code=1011, reason="the outbox cannot be used", leaving=True)
        except Exception as exc:
            _log.exception("a defect in durablews ended a connection; it will be tried again")
            closed = Closed(code=1011, reason=f"a defect in durablews: {exc!r}", leaving=True)
        finally:
            self._link = None
            self._delivery.disconnected(closed, now())
            websocket.transport.abort()
            try:
                await asyncio.shield(self._settle_accounts())
            except OutboxError:
                pass  # the outbox is closing: its next opening counts what was in flight as sent
        self._events.put(Disconnected(closed.code, closed.reason))
        return self._judge(closed, link, now() - started)

    async def _settle_accounts(self) -> None:
        """Write what the end of a connection showed, before the next one sends anything (PROTOCOL.md C8)."""
        for action in self._delivery.actions():
            if isinstance(action, MarkUnanswered | TakeBack):
                self._outbox.mark(action)
            elif isinstance(action, Refuse | Requeue | SetAside):
                refusal = await self._outbox.record(action)
                self._outbox.look_again()
                if refusal is not None:
                    self._events.put(Refused(action.seq, refusal.code, refusal.reason))
            elif isinstance(action, RenewStream):
                await self._outbox.renew_stream()
        self.moved()

    def _introduction(self, stream: str, last: int) -> Introduction:
        return Introduction(stream, self._instance, last, self._settings.max_message_size, f"durablews/{__version__}")

    def _welcomed(self, shown: str) -> None:
        self.reason = self.blocked = None
        self._lifecycle.apply(LinkEvent.WELCOMED)
        self.connects += 1
        self._events.put(Connected(shown))

    def _failed(self, exc: DialFailed) -> Outcome:
        self._events.put(Failed(exc.reason))
        return Outcome(
            reason=exc.reason,
            at_least=exc.retry_after or 0.0,
            blocked=exc.reason if exc.blocked else None,
            longest=exc.blocked,
        )

    def _judge(self, closed: Closed, link: Link | None, connected_for: float) -> Outcome:
        progressed = link is not None and link.progressed
        reason = f"closed with {closed.code}" + (f": {closed.reason}" if closed.reason else "")
        self._faults = 0 if progressed or closed.code not in _SERVER_FAULTS else self._faults + 1
        blocked = None
        if closed.code in _NOT_ALLOWED:
            blocked = f"the server does not allow this client ({reason})"
        elif self._faults >= _BLOCKED_AFTER:
            blocked = f"the server failed {self._faults} times running ({reason})"
        asked = re.fullmatch(r"retry=(\d{1,12})", closed.reason)
        at_least = max(link.postponed if link else 0.0, int(asked[1]) / 1000 if asked else 0.0)
        return Outcome(
            reason=reason,
            progressed=progressed,
            connected_for=connected_for,
            at_least=min(at_least, _LONGEST_RETRY),
            blocked=blocked,
            longest=blocked is not None or closed.code == _SLOW_DOWN,
        )

    # -- beside the link

    def _watcher_ended(self, watcher: asyncio.Task[None]) -> None:
        """Make a defect visible that ended a watcher: it must not stop in silence."""
        if not watcher.cancelled() and (defect := watcher.exception()) is not None:
            _log.error("a defect in durablews ended its %s", watcher.get_name(), exc_info=defect)
            self.blocked = f"a defect in durablews ended its {watcher.get_name()}: {defect!r}"

    def _state_changed(self, before: State, after: State) -> None:
        _log.info("%s -> %s%s", before.value, after.value, f": {self.reason}" if self.reason else "")
        self._note_due.set()
        self.moved()

    async def _watch(self) -> None:
        """Notice within 100 ms what other processes commit: the log's size or time changes.

        A stat in the loop costs 2 µs; asking SQLite on its thread a hundred times as much. A file system whose times
        are too coarse is covered by the upkeep's look once a second.
        """
        seen = wal_stamp(self._outbox.path)
        while True:
            await asyncio.sleep(_WATCH_INTERVAL)
            stamp = wal_stamp(self._outbox.path)
            if stamp != seen:
                seen = stamp
                self.stored()

    async def _keep_up(self) -> None:
        """Expire what is too old, report what left, and look for foreign messages that the watch cannot see."""
        while True:
            try:
                if self._counts is None:  # before the first look takes anything, so that this is reported too
                    self._counts = await self._outbox.counts()
                counts = await self._outbox.expire()
            except OutboxError as exc:
                self._outbox.storage.trouble = exc.what
            else:
                self._report_departures(counts)
                if counts.pending:
                    self.stored()
                else:
                    self.moved()
            await asyncio.sleep(_UPKEEP_INTERVAL)

    def _report_departures(self, counts: Counts) -> None:
        before, self._counts = self._counts, counts
        for reason in _DEPARTURES if before is not None else ():
            left = getattr(counts, reason) - getattr(before, reason)
            if left > 0:
                self._events.put(Departed(reason, left))
                self._outbox.look_again()
                self.moved()

    async def _note_changes(self) -> None:
        """Write how the link stands when that changes, at most every 5 s."""
        while True:
            await self._note_due.wait()
            self._note_due.clear()
            await self._note()
            await asyncio.sleep(_NOTE_INTERVAL)

    async def _note(self) -> None:
        note = LinkNote(self.state.value, self.reason, self.blocked, self._next_attempt)
        try:
            await self._outbox.note_link(note)
        except OutboxError as exc:
            self._outbox.storage.trouble = exc.what
