"""One attempt: dials, lets the application speak first, runs the link, and writes down what its end has shown."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from msgspec.structs import replace
from websockets.exceptions import ConnectionClosed

from durablews import __version__
from durablews.addresses import redacted
from durablews.closing import close_in_time, how_closed
from durablews.config import Settings
from durablews.delivery.actions import MarkUnanswered, Refuse, RenewStream, Requeue, SetAside, TakeBack
from durablews.delivery.delivery import Delivery
from durablews.delivery.suspicion import Closed
from durablews.dialling import DialFailed, dial, server_date
from durablews.draining import DrainedOutbox
from durablews.endpoint import Target
from durablews.errors import OutboxError, ProtocolError
from durablews.events import Disconnected, EventLog, Failed, MessageRejected
from durablews.heartbeat import Heartbeat
from durablews.link import Link
from durablews.providers import raise_if_cancelled
from durablews.reconnection import Outcome, closed_outcome
from durablews.wire.dialect import Dialect, Introduction

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

__all__ = ["Attempts", "OnOpen"]

_log = logging.getLogger("durablews.attempt")

#: Called with each new WebSocket before anything else is said on it.
OnOpen = Callable[["ClientConnection"], Awaitable[object]]


class Attempts:
    """What one attempt after the other needs, and what is kept from one to the next.

    Args:
        settings: all of them.
        outbox: open, and ours to drain.
        dialect: what the server speaks.
        events: where to report.
        leave_at: when a connection that began at a given moment is to be left; None: never.
        on_welcome: called with the shown address when the server has welcomed this client.
        on_push: called with each pushed message.
        on_moved: called when something has left, or may have.
        on_open: speaks first on each new WebSocket.

    Attributes:
        link: the connection, while one stands.
        ended_with: how the last attempt or connection ended.
    """

    def __init__(
        self,
        settings: Settings,
        outbox: DrainedOutbox,
        dialect: Dialect,
        *,
        events: EventLog,
        leave_at: Callable[[float], float | None],
        on_welcome: Callable[[str], None],
        on_push: Callable[[str | bytes], None],
        on_moved: Callable[[], None],
        on_open: OnOpen | None = None,
    ) -> None:
        self._settings = settings
        self._outbox = outbox
        self._dialect = dialect
        self._events = events
        self._leave_at = leave_at
        self._on_welcome = on_welcome
        self._on_push = on_push
        self._on_moved = on_moved
        self._on_open = on_open
        self._instance = secrets.token_hex(8)
        self.delivery = Delivery(settings.delivery, instance=self._instance)
        outbox.storage.claims = lambda: outbox.claims(self.delivery.claims())
        outbox.storage.unread = self.delivery.unread
        self.heartbeat = Heartbeat(settings.heartbeat)
        self.link: Link | None = None
        self.ended_with: Failed | Disconnected | None = None

    async def make(self, target: Target) -> Outcome:
        """Dial `target`, and run the connection until it has ended. Raises nothing that the network or a hook does."""
        welcome_by = asyncio.get_running_loop().time() + self._settings.reconnect.connect_timeout
        try:
            websocket = await dial(target, self._settings, self._dialect.subprotocols, until=welcome_by)
        except DialFailed as exc:
            return self.failed(exc.outcome)
        return await self._run_connection(websocket, target, welcome_by)

    def failed(self, outcome: Outcome) -> Outcome:
        """Report an attempt of which no connection came."""
        self.ended_with = Failed(outcome.kind, outcome.reason, outcome.code)
        self._events.put(self.ended_with)
        return outcome

    async def _run_connection(self, websocket: ClientConnection, target: Target, welcome_by: float) -> Outcome:
        """Run one WebSocket until it has ended, and say how."""
        now = asyncio.get_running_loop().time
        shown, started = redacted(target.url), now()
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
                delivery=self.delivery,
                outbox=self._outbox,
                heartbeat=self.heartbeat,
                introduction=self._introduction,
                discreet=target.discreet,
                leave_at=self._leave_at(started),
                events=self._events,
                on_welcome=lambda: self._on_welcome(shown),
                on_push=self._on_push,
            )
            self.link = link
            closed = await link.run(welcome_by)
        except ProtocolError as exc:
            await close_in_time(websocket, 1002, "no subprotocol of durablews")
            return self.failed(Outcome(kind="subprotocol", reason=str(exc), blocked=str(exc), slow=True))
        except DialFailed as exc:  # on_open
            await close_in_time(websocket, 1000, "the client gave up")
            return self.failed(exc.outcome)
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
            self.link = None
            self.delivery.disconnected(closed, now())
            websocket.transport.abort()
            try:
                await asyncio.shield(self._settle_accounts())
            except OutboxError:
                pass  # the outbox is closing: its next opening counts what was in flight as sent
        closed = replace(closed, reason=target.discreet(closed.reason))
        self.ended_with = Disconnected(closed.code, closed.reason)
        self._events.put(self.ended_with)
        return closed_outcome(
            closed,
            progressed=link is not None and link.progressed,
            # A handshake alone proves nothing: it counts from the welcome.
            connected_for=now() - link.welcomed_at if link is not None and link.welcomed_at is not None else 0.0,
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
        except asyncio.CancelledError as exc:
            raise_if_cancelled(exc)
            raise DialFailed(Outcome(kind="on_open", reason="on_open failed: CancelledError")) from exc
        except PermissionError as exc:
            what = "on_open says that the server does not accept the credentials"
            raise DialFailed(Outcome(kind="credentials", reason=what, blocked=what, credentials=True)) from exc
        except Exception as exc:
            # Its text may hold what it said.
            why = "was not done within connect_timeout" if limit.expired() else f"failed: {type(exc).__name__}"
            raise DialFailed(Outcome(kind="on_open", reason=f"on_open {why}")) from exc

    async def _settle_accounts(self) -> None:
        """Write what the end of a connection showed, before the next one sends anything (PROTOCOL.md C8)."""
        for action in self.delivery.actions():
            if isinstance(action, MarkUnanswered | TakeBack):
                self._outbox.mark(action)
            elif isinstance(action, Refuse | Requeue | SetAside):
                refusal = await self._outbox.record(action)
                self._outbox.look_again()
                if refusal is not None:
                    self._events.put(MessageRejected(action.seq, refusal.code, refusal.reason))
            elif isinstance(action, RenewStream):
                await self._outbox.renew_stream()
        self._on_moved()

    def _introduction(self, stream: str, last: int) -> Introduction:
        return Introduction(stream, self._instance, last, self._settings.max_message_size, f"durablews/{__version__}")
