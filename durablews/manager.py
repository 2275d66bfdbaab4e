"""Keeps one link alive: dials, runs it, waits, dials again. Nothing that the network answers ends it."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from websockets.exceptions import ConnectionClosed

from durablews import __version__
from durablews.config import Settings
from durablews.delivery.actions import MarkUnanswered, Refuse, RenewStream, Requeue, SetAside, TakeBack
from durablews.delivery.delivery import Delivery
from durablews.delivery.suspicion import Closed
from durablews.dialling import DialFailed, dial, server_date
from durablews.draining import DrainedOutbox, LinkNote
from durablews.endpoint import Endpoint, Target, redacted
from durablews.errors import OutboxError, ProtocolError
from durablews.events import Connected, Disconnected, EventLog, Exhausted, Failed, MessageRejected, Reconnecting, Vetoed
from durablews.heartbeat import Heartbeat
from durablews.housekeeping import Housekeeping
from durablews.lifecycle import Lifecycle, LinkEvent, State
from durablews.link import Link, how_closed
from durablews.providers import Provider, ProviderFailed
from durablews.reconnection import Outcome, Pause, Reconnection, closed_outcome
from durablews.wire.dialect import Dialect, Introduction

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

__all__ = ["ConnectionManager", "OnOpen"]

_log = logging.getLogger("durablews.manager")

#: Called with each new WebSocket before anything else is said on it.
OnOpen = Callable[["ClientConnection"], Awaitable[object]]

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
        self._settings = settings
        self._endpoint = endpoint
        self._outbox = outbox
        self._dialect = dialect
        self._events = events
        self._on_push = on_push
        self._on_open = on_open
        self._veto = Provider("veto", veto, settings.auth.provider_timeout)
        self._instance = secrets.token_hex(8)
        self._delivery = Delivery(settings.delivery, instance=self._instance)
        outbox.storage.claims = self._delivery.claims
        outbox.storage.unread = self._delivery.unread
        self._lifecycle = Lifecycle(self._state_changed)
        self._reconnection = Reconnection(settings.reconnect, random.random)
        self.heartbeat = Heartbeat(settings.heartbeat)
        self.housekeeping = Housekeeping(
            outbox,
            events,
            note=lambda: LinkNote(self.state.value, self.reason, self.blocked, self.next_attempt),
            on_stored=self.stored,
            on_moved=self.moved,
            on_return=lambda: self._rouse(firmly=False),
        )
        self._link: Link | None = None
        self._wake = asyncio.Event()
        self._woken_firmly = self._firm = False
        self._target: Target | None = None  # of the last attempt
        self._next_target: Target | None = None  # asked for already, for the next one
        self._ended_with: Failed | Disconnected | None = None
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
        return self._blocked or self.housekeeping.defect

    @property
    def stray_answers(self) -> int:
        return self._delivery.stray_answers

    def wake(self) -> None:
        """Dial now instead of waiting for the next try; a link that stands is asked at once whether it does."""
        self._rouse(firmly=True)

    def _rouse(self, *, firmly: bool) -> None:
        """Look whether the network is back. Where a server asked for a delay, only the owner may end it (`firmly`)."""
        if self._link is not None:
            self._link.probe()
        elif firmly or not self._firm:
            self._woken_firmly = self._woken_firmly or firmly
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
        """Run until cancelled."""
        try:
            self.housekeeping.start()
            while not await self._dial_until_given_up():
                await self._wake.wait()
                self._calm()
            await asyncio.get_running_loop().create_future()  # vetoed: nothing wakes it, what is stored stays
        finally:
            await self.housekeeping.stop()
            if self.state is not State.DISCONNECTED:
                self._lifecycle.apply(LinkEvent.STOP)

    async def _dial_until_given_up(self) -> bool:
        """Return whether that is for good."""
        self.given_up = False
        self._reconnection.restart()
        event = LinkEvent.START
        while True:
            self._lifecycle.apply(event)
            outcome, pause = self._reconnection.ended(await self._attempt())
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
            return bool(await self._veto.ask(self._ended_with))
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
        if looks is not None and pause.ask_first and await self._has_other_credentials():
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
            if asyncio.get_running_loop().time() >= deadline or await self._has_other_credentials():
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

    async def _attempt(self) -> Outcome:
        target, self._next_target = self._next_target, None
        try:
            target = self._target = target or await self._endpoint.ask()
        except ProviderFailed as exc:
            blocked = exc.reason if exc.defect else None
            return self._failed(Outcome(kind="provider", reason=exc.reason, blocked=blocked, slow=exc.defect))
        welcome_by = asyncio.get_running_loop().time() + self._settings.reconnect.connect_timeout
        try:
            websocket = await dial(target, self._settings, self._dialect.subprotocols, until=welcome_by)
        except DialFailed as exc:
            return self._failed(exc.outcome)
        return await self._run_connection(websocket, redacted(target.url), welcome_by)

    async def _run_connection(self, websocket: ClientConnection, shown: str, welcome_by: float) -> Outcome:
        """Run one WebSocket until it has ended, and say how."""
        now = asyncio.get_running_loop().time
        started = now()
        closed, link = Closed(code=1006, reason="the link was lost"), None
        try:
            wire = self._dialect.connection(websocket.subprotocol)
            await self._speak_first(websocket, welcome_by)
            date = server_date(websocket)
            if date is not None:
                self._outbox.confirm_wall_clock(date)
            self.heartbeat.begin(now())
            link = Link(
                websocket,
                wire,
                delivery=self._delivery,
                outbox=self._outbox,
                heartbeat=self.heartbeat,
                introduction=self._introduction,
                leave_at=self._reconnection.leave_at(started),
                events=self._events,
                on_welcome=lambda: self._welcomed(shown),
                on_push=self._on_push,
            )
            self._link = link
            closed = await link.run(welcome_by)
        except ProtocolError as exc:
            await websocket.close(1002, "no subprotocol of durablews")
            return self._failed(Outcome(kind="subprotocol", reason=str(exc), blocked=str(exc), slow=True))
        except DialFailed as exc:  # on_open
            await websocket.close(1000, "the client gave up")
            return self._failed(exc.outcome)
        except ConnectionClosed:  # in on_open
            closed = how_closed(websocket)
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
        self._ended_with = Disconnected(closed.code, closed.reason)
        self._events.put(self._ended_with)
        return closed_outcome(
            closed,
            progressed=link is not None and link.progressed,
            connected_for=now() - started,
            asked=link.postponed if link is not None else 0.0,
            renewal=link is not None and link.retired,
        )

    async def _speak_first(self, websocket: ClientConnection, welcome_by: float) -> None:
        """Let the application say what must come first, such as who it is.

        Raises:
            DialFailed: it could not.
            ConnectionClosed: the server has left meanwhile.
        """
        if self._on_open is None:
            return
        limit = asyncio.timeout_at(welcome_by)
        try:
            async with limit:
                await self._on_open(websocket)
        except ConnectionClosed:
            raise
        except PermissionError as exc:
            what = "on_open says that the server does not accept the credentials"
            raise DialFailed(Outcome(kind="credentials", reason=what, blocked=what, credentials=True)) from exc
        except Exception as exc:
            # Its text may hold what it said.
            why = "was not done within connect_timeout" if limit.expired() else f"failed: {type(exc).__name__}"
            raise DialFailed(Outcome(kind="on_open", reason=f"on_open {why}")) from exc

    async def _settle_accounts(self) -> None:
        """Write what the end of a connection showed, before the next one sends anything (PROTOCOL.md C8)."""
        for action in self._delivery.actions():
            if isinstance(action, MarkUnanswered | TakeBack):
                self._outbox.mark(action)
            elif isinstance(action, Refuse | Requeue | SetAside):
                refusal = await self._outbox.record(action)
                self._outbox.look_again()
                if refusal is not None:
                    self._events.put(MessageRejected(action.seq, refusal.code, refusal.reason))
            elif isinstance(action, RenewStream):
                await self._outbox.renew_stream()
        self.moved()

    def _introduction(self, stream: str, last: int) -> Introduction:
        return Introduction(stream, self._instance, last, self._settings.max_message_size, f"durablews/{__version__}")

    def _welcomed(self, shown: str) -> None:
        self.reason = self._blocked = None
        self._calm()
        self._lifecycle.apply(LinkEvent.WELCOMED)
        self.connects += 1
        self._events.put(Connected(shown))

    def _failed(self, outcome: Outcome) -> Outcome:
        self._ended_with = Failed(outcome.kind, outcome.reason, outcome.code)
        self._events.put(self._ended_with)
        return outcome

    def _state_changed(self, before: State, after: State) -> None:
        _log.info("%s -> %s%s", before.value, after.value, f": {self.reason}" if self.reason else "")
        self.housekeeping.link_changed()
        self.moved()
