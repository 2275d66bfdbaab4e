"""What follows when an attempt or a connection has ended: when to try again, whom to ask first, when to stop. Pure.

Nothing that the network answers is final (PROTOCOL.md section 6). What only the owner can mend is tried again slowly,
and says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime

from msgspec import Struct
from msgspec.structs import replace

from durablews.config import ReconnectConfig
from durablews.delivery.suspicion import Closed

__all__ = ["Outcome", "Pause", "Reconnection", "closed_outcome", "refused_outcome"]

#: The longest that a server may ask a client to stay away, in seconds (PROTOCOL.md section 6).
LONGEST_RETRY = 3600.0
# Closes that mean the same trouble again: so many in a row without progress are a `blocked` reason (PROTOCOL.md 6).
_BLOCKED_AFTER = 5
_SERVER_FAULTS = frozenset({1002, 1011})
_NOT_ALLOWED = frozenset({1008, 3000, 3003, 4401, 4403})
_SLOW_DOWN = 4429
# Who is not allowed in waits for so many of the longest delays, or until its credentials change.
_PATIENCE = 10.0

_STATUSES = {
    200: "HTTP 200 instead of a WebSocket: a captive portal or a web page",
    400: "HTTP 400: it does not understand the request",
    401: "HTTP 401: the token is missing or not accepted",
    403: "HTTP 403: not allowed",
    404: "HTTP 404: there is nothing at this path",
    405: "HTTP 405: there is no WebSocket at this path",
    407: "HTTP 407: a proxy wants credentials",
    408: "HTTP 408: it waited too long for the request",
    410: "HTTP 410: what was at this path is gone",
    426: "HTTP 426: it wants another protocol",
    429: "HTTP 429: too many connections",
    500: "HTTP 500: the server failed",
    502: "HTTP 502: a gateway cannot reach the server",
    503: "HTTP 503: the server is not available",
    504: "HTTP 504: the server did not answer its gateway",
}
_CREDENTIALS = frozenset({401, 403})
# The address or the client is wrong, and stays so until its owner mends it. Not 404: a load balancer whose servers are
# being replaced answers that as well.
_OWNERS = frozenset({400, 405, 407, 410, 426})


class Outcome(Struct, frozen=True, kw_only=True):
    """How one attempt or connection ended.

    Attributes:
        kind: what failed, in one word: `events.Failed` lists them; ``"closed"`` for a connection that stood.
        reason: the same for people, without secrets.
        code: the HTTP status or the close code, when there was one.
        progressed: the server acknowledged something.
        connected_for: seconds.
        at_least: seconds that the server asked for.
        blocked: what only the owner can mend.
        slow: to be tried again at the longest delay.
        credentials: the server does not accept them.
        ours: this side ended the connection.
        renewal: this side left, because the connection had reached its age.
    """

    kind: str
    reason: str
    code: int | None = None
    progressed: bool = False
    connected_for: float = 0.0
    at_least: float = 0.0
    blocked: str | None = None
    slow: bool = False
    credentials: bool = False
    ours: bool = False
    renewal: bool = False


class Pause(Struct, frozen=True, kw_only=True):
    """Wait `delay` seconds, then make try number `attempt` in a row.

    Attributes:
        firm: the server asked for it: news of the network does not end it, only the owner does.
        ask_first: ask the providers of credentials at once, and dial at once when they give others.
        ask_every: seconds between looks whether they give others; None: do not look.
    """

    attempt: int
    delay: float
    firm: bool = False
    ask_first: bool = False
    ask_every: float | None = None


class Reconnection:
    """The memory and the policy of one link.

    Args:
        config: the owner's settings.
        random: a source of floats in [0, 1).
    """

    def __init__(self, config: ReconnectConfig, random: Callable[[], float]) -> None:
        self._config = config
        self._backoff = config.backoff(random)
        self._random = random
        #: Tries that failed in a row.
        self.failures = 0
        self._faults = 0
        self._not_allowed = 0

    def restart(self) -> None:
        """Begin anew: the owner asks for it, or the network has changed."""
        self._backoff.reset()
        self.failures = 0

    def leave_at(self, connected_at: float) -> float | None:
        """Return when to leave a connection that has reached its age; None: never.

        Between 80 and 100 % of `max_connection_age`: never above it, because the path cuts there, and spread, because
        a fleet that came together would leave together.
        """
        age = self._config.max_connection_age
        return None if age is None else connected_at + age * (0.8 + 0.2 * self._random())

    def ended(self, outcome: Outcome) -> tuple[Outcome, Pause | None]:
        """Take note of how a try ended; return it as it is to be shown, and what follows: None when it is the end."""
        good = outcome.progressed or outcome.connected_for >= self._config.stable_after
        is_fault = outcome.code in _SERVER_FAULTS and not outcome.ours and not good
        self._faults = self._faults + 1 if is_fault else 0
        if outcome.connected_for >= self._config.stable_after:
            self._not_allowed = 0  # they were good for so long: it is not the same trouble again
        self._not_allowed = self._not_allowed + 1 if outcome.credentials else 0
        if self._faults >= _BLOCKED_AFTER:
            blocked = f"the server failed {self._faults} times running ({outcome.reason})"
            outcome = replace(outcome, blocked=blocked, slow=True)
        if outcome.renewal:
            self.failures = 0
            self._backoff.reset()
            return outcome, Pause(attempt=1, delay=0.0)
        if good:
            self.failures = 0
        self.failures += 1
        most = self._config.max_retries
        if most is not None and self.failures > most:
            return outcome, None
        return outcome, self._pause(outcome, good)

    def _pause(self, outcome: Outcome, good: bool) -> Pause:
        if outcome.credentials and outcome.at_least and self._not_allowed == 1:
            # The next try asks the providers in any case.
            delay = max(outcome.at_least, self._backoff.next_delay())
            return Pause(attempt=self.failures, delay=delay, firm=True)
        if outcome.credentials:
            # At once, then after 1, 2, 4 ... of the longest delays: a provider that makes a new token each time it is
            # asked must not turn this wait into a quick one.
            most = self._config.max_delay
            every = most * min(2.0 ** (max(0, self._not_allowed - 2)), _PATIENCE)
            delay = max(most * (_PATIENCE + self._random()), outcome.at_least)
            return Pause(
                attempt=self.failures,
                delay=delay,
                firm=outcome.at_least > 0,
                ask_first=self._not_allowed == 1,
                ask_every=None if outcome.at_least else every,
            )
        if outcome.slow:
            delay = self._backoff.longest_delay()
        elif good:
            delay = self._backoff.delay_after_success()
        else:
            delay = self._backoff.next_delay()
        # Everybody was told the same figure: spread them beyond it.
        return Pause(
            attempt=self.failures,
            delay=outcome.at_least + delay,
            firm=outcome.at_least > 0 or outcome.code in (_SLOW_DOWN, 429),
        )


def closed_outcome(closed: Closed, *, progressed: bool, connected_for: float, asked: float, renewal: bool) -> Outcome:
    """Say what the end of a connection means (PROTOCOL.md section 6).

    Args:
        asked: seconds for which the server's farewell asked the client to stay away.
        renewal: this side left because of the connection's age.
    """
    reason = f"closed with {closed.code}" + (f": {closed.reason}" if closed.reason else "")
    not_allowed = closed.code in _NOT_ALLOWED and not closed.leaving
    said = re.fullmatch(r"retry=(\d{1,12})", closed.reason)
    return Outcome(
        kind="closed",
        reason=reason,
        code=closed.code,
        progressed=progressed,
        connected_for=connected_for,
        at_least=min(max(asked, int(said[1]) / 1000 if said else 0.0), LONGEST_RETRY),
        blocked=f"the server does not allow this client ({reason})" if not_allowed else None,
        slow=closed.code == _SLOW_DOWN,
        credentials=not_allowed,
        ours=closed.leaving,
        renewal=renewal,
    )


def refused_outcome(shown: str, status: int, headers: Mapping[str, str]) -> Outcome:
    """Say what an HTTP answer to the handshake with the URL `shown` means."""
    reason = f"{shown} answered {_STATUSES.get(status, f'HTTP {status}')}"
    owners = status in _OWNERS or status in _CREDENTIALS
    return Outcome(
        kind="credentials" if status in _CREDENTIALS else "http",
        reason=reason,
        code=status,
        at_least=_retry_after(headers),
        blocked=reason if owners else None,
        slow=status in _OWNERS,
        credentials=status in _CREDENTIALS,
    )


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds of a Retry-After (RFC 9110, section 10.2.3), at most an hour; 0 when there is none."""
    try:
        # Two of a name, as a proxy may make of one, are a LookupError of websockets' own.
        text = headers["Retry-After"].strip()
    except LookupError:
        return 0.0
    if text.isascii() and text.isdecimal():
        return min(float(text), LONGEST_RETRY)
    try:
        at = parsedate_to_datetime(text)
        now = parsedate_to_datetime(headers["Date"])  # the server's clock, for the machine's may be off
        return min(max(0.0, (at - now).total_seconds()), LONGEST_RETRY)
    except (ValueError, LookupError, TypeError, OverflowError):
        return 0.0
