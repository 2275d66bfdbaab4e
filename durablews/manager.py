"""Keeps one link alive: dials, runs it, waits, dials again. Nothing that the network answers ends it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

from durablews.attempt import Attempts, OnOpen
from durablews.config import Settings
from durablews.draining import DrainedOutbox, LinkNote
from durablews.endpoint import Endpoint, Target
from durablews.events import Connected, Disconnected, EventLog, Exhausted, Failed, Reconnecting, Vetoed
from durablews.heartbeat import Heartbeat
from durablews.housekeeping import Housekeeping
from durablews.lifecycle import Lifecycle, LinkEvent, State
from durablews.messages import Entry
from durablews.providers import Provider, ProviderFailed
from durablews.reconnection import Outcome, Pause, Reconnection
from durablews.wire.dialect import Dialect

__all__ = ["ConnectionManager"]

_log = logging.getLogger("durablews.manager")

# How often a token file is looked at while the server does not accept what was in it (seconds).
_FILE_LOOK = 1.0


class ConnectionManager:
    """The life of one client's link.

    Args:
        settings: all of them.
        endpoint: where to connect, asked anew on every attempt.
        outbox: open, and ours to drain.
        dialect: what the server speaks.
        events: where to report.
        on_push: called with each pushed message.
        on_open: speaks first on each new WebSocket.
        veto: asked about each `Failed` and `Disconnected`; a true answer stops the link for good.
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
        on_open: OnOpen | None = None,
        veto: Callable[[Failed | Disconnected], Any] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._outbox = outbox
        self._events = events
        self._veto = Provider("veto", veto, settings.auth.provider_timeout, bool)
        self._lifecycle = Lifecycle(self._state_changed)
        self._reconnection = Reconnection(settings.reconnect, random.random)
        self._attempts = Attempts(
            settings,
            outbox,
            dialect,
            events=events,
            leave_at=self._reconnection.leave_at,
            on_welcome=self._welcomed,
            on_push=on_push,
            on_moved=self.moved,
            on_open=on_open,
        )
        self.housekeeping = Housekeeping(
            outbox,
            events,
            note=lambda: LinkNote(self.state.value, self.reason, self.blocked, self.next_attempt),
            on_stored=self.stored,
            on_moved=self.moved,
            on_return=lambda: self._rouse(firmly=False),
        )
        self._wake = asyncio.Event()
        self._woken_firmly = self._firm = False
        self._target: Target | None = None  # of the last attempt
        self._next_target: Target | None = None  # asked for already, for the next one
        self._blocked: str | None = None
        #: Why the link is as it is, as a sentence.
        self.reason: str | None = None
        #: When the next try is due, in ms since 1970 UTC, while one is waited for.
        self.next_attempt: int | None = None
        self.connects = 0
        #: Whether it makes no more tries, by `max_retries` or by the veto.
        self.given_up = False
        #: Set, and replaced by a new one, when something is settled, stored or changed: for who waits for emptiness.
        self.moves = asyncio.Event()

    @property
    def state(self) -> State:
        return self._lifecycle.state

    @property
    def blocked(self) -> str | None:
        """What only the owner can mend, as a sentence."""
        found = self.housekeeping
        return self._blocked or self._outbox.damage or found.misplaced or found.defect or found.log_held

    @property
    def stray_answers(self) -> int:
        return self._attempts.delivery.stray_answers

    @property
    def heartbeat(self) -> Heartbeat:
        return self._attempts.heartbeat

    def wake(self) -> None:
        """Dial now instead of waiting for the next try; a link that stands is asked at once whether it does."""
        self._rouse(firmly=True)

    def _rouse(self, *, firmly: bool) -> None:
        """Look whether the network is back. Where a server asked for a delay, only the owner may end it (`firmly`)."""
        if self._attempts.link is not None:
            self._attempts.link.probe()
        elif firmly or not self._firm:
            self._woken_firmly = self._woken_firmly or firmly
            self._wake.set()

    def moved(self) -> None:
        """Let those who wait for emptiness look again. Each has the event that it saw: none takes another's news."""
        self.moves.set()
        self.moves = asyncio.Event()

    def stored(self, entries: Sequence[Entry] = ()) -> None:
        """Take note that the outbox may hold more than before: `entries`, if they were stored here just now."""
        self.moved()
        if self._attempts.link is not None:
            self._attempts.link.stored(entries)

    async def leave(self) -> None:
        """Close the connection, if there is one, as a client does that goes away."""
        link = self._attempts.link
        if link is not None:
            link.close(1000, "the client is closing")
            await link.ended.wait()

    async def run(self) -> None:
        """Run until cancelled."""
        try:
            self.housekeeping.start()
            while not await self._dial_until_given_up():
                await self._wake.wait()
                self._calm()
            await asyncio.get_running_loop().create_future()  # vetoed: nothing wakes it, what is stored stays
        except Exception as exc:
            # Nothing that is known of leads here. If it happens all the same, it must not look like a long attempt.
            _log.exception("a defect in durablews ended the link for good; everything is kept")
            self.reason = self._blocked = f"a defect in durablews ended the link for good: {type(exc).__name__}"
            self.given_up = True
        finally:
            await self.housekeeping.stop()
            if self.state is not State.DISCONNECTED:
                self._lifecycle.apply(LinkEvent.STOP)
            if self.given_up:
                await self.housekeeping.write_note()

    async def _dial_until_given_up(self) -> bool:
        """Return whether that is for good."""
        self.given_up = False
        self._reconnection.restart()
        event = LinkEvent.START
        while True:
            self._lifecycle.apply(event)
            outcome, pause = self._reconnection.ended(await self._tried())
            self.reason, self._blocked = outcome.reason, outcome.blocked
            self._lifecycle.apply(LinkEvent.LOST)
            vetoed = not outcome.renewal and await self._is_vetoed()
            if vetoed or pause is None:
                # Firm, so that only the owner begins anew.
                self._firm = self.given_up = True
                if not self._woken_firmly:
                    self._wake.clear()
                self._lifecycle.apply(LinkEvent.VETOED if vetoed else LinkEvent.EXHAUSTED)
                await self.housekeeping.write_note()  # at once: who hears of the end may end the program
                self._events.put(Vetoed(outcome.reason) if vetoed else Exhausted(self._reconnection.failures))
                return vetoed
            await self._wait(pause)
            event = LinkEvent.RETRY

    async def _is_vetoed(self) -> bool:
        try:
            return bool(await self._veto.ask(self._attempts.ended_with))
        except ProviderFailed as exc:
            self._blocked = exc.reason
            return False

    # -- between two attempts

    async def _wait(self, pause: Pause) -> None:
        """Wait for the next try, for `wake`, or for other credentials."""
        self._firm = pause.firm
        if pause.firm and not self._woken_firmly:
            self._wake.clear()
        looks = pause.ask_every if self._endpoint.may_change else None
        if looks is not None and self._endpoint.is_cheap:
            looks = min(looks, _FILE_LOOK)
        if looks is not None and pause.ask_first and await self._look_until_woken():
            self._calm()
            return
        deadline = asyncio.get_running_loop().time() + pause.delay
        self.next_attempt = self._outbox.clock.wall() + int(pause.delay * 1000)
        self._events.put(Reconnecting(pause.attempt, pause.delay, self.next_attempt))
        self.housekeeping.link_changed()
        while True:
            if await self._woken_by(deadline, looks):
                self._reconnection.restart()
                break
            if asyncio.get_running_loop().time() >= deadline or await self._look_until_woken():
                break
        self.next_attempt = None
        self._calm()

    async def _woken_by(self, deadline: float, at_most: float | None) -> bool:
        """Wait until `deadline`, or for `at_most` seconds if that is shorter; return whether `wake` ended it."""
        until = deadline
        if at_most is not None:
            until = min(until, asyncio.get_running_loop().time() + at_most)
        try:
            async with asyncio.timeout_at(until):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True

    async def _look_until_woken(self) -> bool:
        """Return whether the application has other credentials; False as soon as `wake` wants a try now."""
        look = asyncio.create_task(self._has_other_credentials(), name="durablews look")
        woken = asyncio.create_task(self._wake.wait(), name="durablews woken")
        try:
            await asyncio.wait({look, woken}, return_when=asyncio.FIRST_COMPLETED)
            return look.done() and look.result()
        finally:
            for task in (look, woken):
                task.cancel()
            await asyncio.gather(look, woken, return_exceptions=True)

    async def _has_other_credentials(self) -> bool:
        """Ask the application; keep a new answer for the next attempt, for it may be good only once."""
        try:
            target = await self._endpoint.ask()
        except ProviderFailed:
            return False  # the next attempt asks again, and says why it fails
        if target == self._target:
            return False
        self._next_target = target
        return True

    def _calm(self) -> None:
        self._firm = self._woken_firmly = False
        self._wake.clear()

    # -- one attempt

    async def _tried(self) -> Outcome:
        """Make one attempt; a defect of this library is a visible reason and not the end of the link."""
        try:
            return await self._attempt()
        except Exception as exc:
            _log.exception("a defect in durablews ended an attempt; it will be tried again")
            reason = f"a defect in durablews: {type(exc).__name__}"
            return self._attempts.failed(Outcome(kind="defect", reason=reason, blocked=reason))

    async def _attempt(self) -> Outcome:
        target, self._next_target = self._next_target, None
        try:
            target = self._target = target or await self._endpoint.ask()
        except ProviderFailed as exc:
            blocked = exc.reason if exc.defect else None
            return self._attempts.failed(Outcome(kind="provider", reason=exc.reason, blocked=blocked, slow=exc.defect))
        return await self._attempts.make(target)

    def _welcomed(self, shown: str) -> None:
        self.reason = self._blocked = None
        self._calm()
        self._lifecycle.apply(LinkEvent.WELCOMED)
        self.connects += 1
        self._events.put(Connected(shown))

    def _state_changed(self, before: State, after: State) -> None:
        _log.info("%s -> %s%s", before.value, after.value, f": {self.reason}" if self.reason else "")
        self.housekeeping.link_changed()
        self.moved()
