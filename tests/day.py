"""The client of `test_day`: every pure part, and their shells without asyncio, in simulated time.

Nothing in here sleeps or asks a clock: an `Agenda` holds what happens next. `Link` and `Manager` wire the pure parts
together as `durablews.link`, `attempt` and `manager` do: the same steps in the same order, under the same names.
Whoever changes those changes these. What happens is told to `note`, which keeps the trace and judges it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from typing import Protocol

from durablews.config import DeliveryConfig, HeartbeatConfig, ReconnectConfig
from durablews.delivery import actions as asked
from durablews.delivery.deadlines import RENEWAL
from durablews.delivery.delivery import Delivery
from durablews.delivery.suspicion import Closed
from durablews.failures import Way, timed_out
from durablews.heartbeat import Beat, Heartbeat
from durablews.lifecycle import Lifecycle, LinkEvent, State
from durablews.messages import Entry, Run
from durablews.reconnection import Outcome, Pause, Reconnection, closed_outcome
from durablews.wire.dialect import Introduction
from durablews.wire.native import NativeDialect

STREAM, INSTANCE = "0" * 32, "0123456789abcdef"
WAY = Way(server="server", proxy=None, reached=True)
# As in `link`: how often it looks what the other end has taken. A close handshake may take 2 s (`dialling`), and less
# with who was not heard.
PROGRESS_LOOK, LONGEST_CLOSE, LONGEST_CLOSE_UNHEARD = 0.1, 2.0, 0.5
# What a kernel and a transport take before a `send` waits (bytes), and how long the outbox takes for a job (seconds).
SOCKET_TAKES, JOB = 256 * 1024, 0.002

Call = Callable[[], object]
#: Told what happened: a word, and the facts.
Note = Callable[..., None]


class Violation(AssertionError):
    """A promise was broken."""


class Agenda:
    """What happens, in order of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Call]] = []
        self._number = itertools.count()

    def at(self, when: float, call: Call) -> None:
        heappush(self._heap, (max(when, self.now), next(self._number), call))

    def after(self, delay: float, call: Call) -> None:
        self.at(self.now + delay, call)

    def run(self, until: float) -> None:
        at_once = 0
        while self._heap and self._heap[0][0] <= until:
            when, _, call = heappop(self._heap)
            at_once = at_once + 1 if when == self.now else 0
            if at_once > 10_000:
                raise Violation("time stands still: somebody is kept busy for nothing")
            self.now = when
            call()


class Machine:
    """The client's computer: while it sleeps no timer fires and nothing arrives, and its clock may stand still."""

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda
        self._stood = self._reached = self._slept_at = 0.0
        self._missed: list[Call] = []
        self.asleep = False

    @property
    def now(self) -> float:
        return max(self._agenda.now - self._stood, self._reached)

    def at(self, when: float, call: Call) -> None:
        """Call at a time of this machine's clock."""
        self._agenda.at(when + self._stood, partial(self.deliver, partial(self._fire, when, call)))

    def _fire(self, when: float, call: Call) -> None:
        if when > self.now + 1e-6:  # the clock stood still meanwhile
            self.at(when, call)
        else:
            self._reached = max(self._reached, when)  # floats: no timer may find that it is early
            call()

    def deliver(self, call: Call) -> None:
        """Let something arrive, now or when the machine wakes."""
        if self.asleep:
            self._missed.append(call)
        else:
            call()

    def sleep(self) -> None:
        self.asleep, self._slept_at = True, self._agenda.now

    def wake(self, *, stood_still: bool) -> None:
        """Go on. In a suspend Linux's monotonic clock stands still, others run on."""
        self.asleep = False
        self._stood += (self._agenda.now - self._slept_at) * stood_still
        for call in self._missed:
            self._agenda.after(0.0, call)
        self._missed = []


class Timer:
    """A timer that is set anew all the time: only an earlier time costs an entry in the agenda."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._entry: float | None = None
        self._call: Call = lambda: None
        #: When it fires, on the machine's clock; None: never.
        self.due: float | None = None

    def set(self, when: float, call: Call) -> None:
        self.due, self._call = when, call
        if self._entry is None or when < self._entry:
            self._entry = when
            self._machine.at(when, partial(self._fire, when))

    def _fire(self, entry: float) -> None:
        if entry != self._entry or self.due is None:
            return
        self._entry = None
        if self.due > self._machine.now:
            self.set(self.due, self._call)
        else:
            self.due = None
            self._call()


class Outbox:
    """What waits, in memory: the entries of each priority in sequence."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self.rows: dict[int, list[Entry]] = {}
        self.last = 0

    def put(self, priority: int, payload: str) -> None:
        self.last += 1
        entry = Entry(self.last, priority, payload, None, None, 0, len(payload), 0, 0)
        self.rows.setdefault(priority, []).append(entry)

    def fetch(self, want: asked.Want) -> list[Entry]:
        """Return what `entries.peek` would."""
        found: list[Entry] = []
        size = 0
        for priority in sorted(self.rows.keys() - want.closed, reverse=True):
            if priority <= want.above:
                break
            after = want.after.get(priority, 0)
            for entry in self.rows[priority][self._between(priority, after + 1, 2**60)][: want.limit - len(found)]:
                size += entry.bytes
                if found and size > want.max_bytes:
                    return found
                found.append(entry)
        return found

    def settle(self, run: Run) -> None:
        gone = self._between(run.priority, run.first, run.last)
        self._note("settled", run, [entry.seq for entry in self.rows[run.priority][gone]])
        del self.rows[run.priority][gone]

    def refuse(self, action: asked.Refuse) -> None:
        self._note("dead", action.seq, action.nacked)
        del self.rows[action.priority][self._between(action.priority, action.seq, action.seq)]

    def transmitted(self, run: Run) -> None:
        """Count a transmission of each, answered or not."""
        these = self._between(run.priority, run.first, run.last)
        rows = self.rows[run.priority]
        rows[these] = [entry._replace(transmissions=entry.transmissions + 1) for entry in rows[these]]

    def _between(self, priority: int, first: int, last: int) -> slice:
        rows = self.rows[priority]
        return slice(*(bisect_right(rows, seq, key=lambda entry: entry.seq) for seq in (first - 1, last)))


class Socket(Protocol):
    """A WebSocket, as the client's end sees it. It tells `link` what arrives, and when it is lost."""

    link: Link | None

    @property
    def queued(self) -> int:
        """Bytes that the other end's system has not acknowledged."""

    def send(self, data: bytes) -> None: ...
    def ping(self, answered: Call) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


class Link:
    """`durablews.link.Link`: one connection, from its welcome to its end."""

    def __init__(self, manager: Manager, socket: Socket, *, leave_at: float | None, welcome_by: float) -> None:
        self._manager, self._socket, self._machine, self._note = manager, socket, manager.machine, manager.note
        self._delivery, self._heartbeat, self._outbox = manager.delivery, manager.heartbeat, manager.outbox
        self._leave_at, self._welcome_by = leave_at, welcome_by
        self._close: asked.Close | None = None
        self._ending = False
        self._handed = self._taken = self._before_ping = self._seen_handed = self._seen_queued = 0
        self._moved_at = self.postponed = 0.0
        self.welcomed_at: float | None = None
        socket.link = self

    def run(self) -> None:
        hello = Introduction(STREAM, INSTANCE, self._outbox.last, 1 << 20, "test")
        self._delivery.connected(NativeDialect().connection(self._manager.subprotocol), hello)
        self.steer()

    def stored(self) -> None:
        self._delivery.stored()
        self.steer()

    def probe(self) -> None:
        self._heartbeat.probe(self._machine.now)
        self.steer()

    @property
    def retired(self) -> bool:
        return self._close is not None and self._close.reason == RENEWAL

    def steer(self) -> None:
        """One turn of all three tasks: keep the timers, do what is asked, send what may go."""
        if self._ending:
            return
        if self._close is None:
            self._turn(self._machine.now)
        if self._close is None:
            self._manager.timer.set(self._next_look(), self.steer)
        else:
            self._end(self._close)

    def _turn(self, now: float) -> None:
        if not self._delivery.ready and now >= self._welcome_by:
            self._close = asked.Close(4408, "no welcome in time")
            return
        self._report_taken(now)
        self._beat(now)
        if self._leave_at is not None and now >= self._leave_at:
            self._leave_at = None
            self._delivery.retire()
        self._delivery.handle_timer(now)
        self._carry_out()
        self._send()

    def _next_look(self) -> float:
        now = self._machine.now
        times = [self._heartbeat.timer()]
        timer = self._delivery.timer(now)
        if timer is not None:
            times.append(timer)
        if not self._delivery.ready:
            times.append(self._welcome_by)
        if self._leave_at is not None:
            times.append(self._leave_at)
        if self._delivery.untaken or self._taken < max(self._handed, self._before_ping):
            times.append(now + PROGRESS_LOOK)
        return min(times)

    def _end(self, close: asked.Close) -> None:
        self._ending = True
        self._note("left", close.code, close.reason)
        self._socket.close()
        longest = LONGEST_CLOSE_UNHEARD if close.code == 4408 else LONGEST_CLOSE
        self._manager.timer.set(self._machine.now + longest, partial(self.lost, Closed(code=1006)))

    def lost(self, closed: Closed) -> None:
        """Take note that the socket is closed; who closed it first, says why."""
        self._ending = True
        self._socket.abort()
        if self._close is not None:
            closed = Closed(code=self._close.code, reason=self._close.reason, leaving=True)
        self._manager.closed(closed)

    def received(self, data: str | bytes) -> None:
        now = self._machine.now
        self._heard()
        self._report_taken(now)
        self._delivery.receive(data, now)
        self._carry_out()
        self.steer()

    def _heard(self) -> None:
        self._note("heard")
        self._heartbeat.received(self._machine.now)

    def _send(self) -> None:
        while self._close is None and self._socket.queued < SOCKET_TAKES:
            frame = self._delivery.frame_to_send(self._machine.now)
            if frame is None:
                break
            sent = self._delivery.sent
            self._carry_out()
            self._handed += len(frame)
            if sent is not None:
                self._note("sent", sent, self._handed)
            self._socket.send(frame)
            self._report_taken(self._machine.now)
        self._carry_out()

    def _report_taken(self, now: float) -> None:
        queued = self._socket.queued
        shrinks = queued < self._seen_queued and self._handed == self._seen_handed
        self._seen_handed, self._seen_queued = self._handed, queued
        if shrinks and self._taken < self._before_ping:
            self._heartbeat.delayed(now - self._moved_at)
            self._moved_at = now
        taken = self._handed - min(queued, self._handed)
        if taken > self._taken:
            self._taken = taken
            self._note("taken", taken)
            self._delivery.taken(taken, now)

    def _beat(self, now: float) -> None:
        beat = self._heartbeat.due(now)
        if beat is Beat.DEAD:
            self._close = self._close or asked.Close(4408, "nothing was heard for too long")
        elif beat is Beat.PING:
            self._before_ping, self._moved_at = self._handed, now
            self._socket.ping(partial(self._ponged, now))

    def _ponged(self, asked_at: float) -> None:
        self._heard()
        self._heartbeat.measured(self._machine.now - asked_at)
        self.steer()

    def _carry_out(self) -> None:
        for action in self._delivery.actions():
            if isinstance(action, asked.Refuse):
                self._manager.job(partial(self._record, action))
            elif isinstance(action, asked.Postpone):
                self.postponed = action.delay
            elif isinstance(action, asked.Close):
                self._close = self._close or action
            elif isinstance(action, asked.Welcomed):
                self.welcomed_at = self._machine.now
                self._manager.welcomed()
                self._manager.job(self.stored)
            else:
                self._manager.mark(action)
        want = self._delivery.wanted(self._machine.now)
        if want is not None:
            self._manager.job(partial(self._supply, want))

    def _record(self, action: asked.Refuse) -> None:
        self._outbox.refuse(action)
        self._delivery.recorded(action.priority, action.seq)
        self.steer()

    def _supply(self, want: asked.Want) -> None:
        self._delivery.supply(want, self._outbox.fetch(want), [], self._machine.now)
        self.steer()


class Manager:
    """`durablews.manager.ConnectionManager` and its `Attempts`: dials, runs the link, waits, dials again."""

    def __init__(
        self,
        machine: Machine,
        note: Note,
        random: Callable[[], float],
        *,
        subprotocol: str,
        token: Callable[[], str],
        dial: Callable[[str, Callable[[Outcome | Socket], None]], None],
    ) -> None:
        self.machine, self.note, self.subprotocol = machine, note, subprotocol
        self.config = ReconnectConfig(max_connection_age=2400.0)
        self.delivery = Delivery(DeliveryConfig(), instance=INSTANCE)
        self.heartbeat = Heartbeat(HeartbeatConfig())
        self.outbox = Outbox(note)
        #: The one timer of the client: of the link while there is one, of an attempt, of the wait for the next.
        self.timer = Timer(machine)
        self.link: Link | None = None
        self.lifecycle = Lifecycle()
        self._reconnection = Reconnection(self.config, random)
        self._token, self._dial = token, dial
        self._target, self._next_target = "", ""
        self._attempts = 0
        self._welcome_by = self._looked = 0.0
        self._wake = self._firm = self._woken_firmly = False

    def run(self) -> None:
        self._reconnection.restart()
        self._attempt(LinkEvent.START)

    def stored(self) -> None:
        if self.link is not None:
            self.link.stored()

    def job(self, call: Call) -> None:
        """Let the outbox's thread do something."""
        self.machine.at(self.machine.now + JOB, call)

    def rouse(self, *, firmly: bool) -> None:
        """`wake` of the owner, or news of the network."""
        if self.link is not None:
            self.note("probed")
            self.link.probe()
        elif firmly or not self._firm:
            self.note("woken", firmly)
            self._wake, self._woken_firmly = True, self._woken_firmly or firmly
            if self.lifecycle.state is State.RECONNECTING:
                self._look(self.machine.now, None)

    # -- one attempt

    def _attempt(self, event: LinkEvent) -> None:
        self.lifecycle.apply(event)
        self._target, self._next_target = self._next_target or self._token(), ""
        self._attempts += 1
        self._welcome_by = self.machine.now + self.config.connect_timeout
        self.note("dial")
        answered = partial(self._answered, self._attempts)
        self.timer.set(self._welcome_by, partial(answered, timed_out(WAY, self.config.connect_timeout)))
        self._dial(self._target, answered)

    def _answered(self, attempt: int, answer: Outcome | Socket) -> None:
        current = attempt == self._attempts and self.link is None and self.lifecycle.state is State.CONNECTING
        if isinstance(answer, Outcome):
            if current:
                self._over(answer)
        elif not current:
            answer.abort()
        else:
            now = self.machine.now
            self.note("open")
            self.heartbeat.begin(now)
            leave_at = self._reconnection.leave_at(now)
            self.link = Link(self, answer, leave_at=leave_at, welcome_by=self._welcome_by)
            self.link.run()

    def welcomed(self) -> None:
        self._calm()
        self.lifecycle.apply(LinkEvent.WELCOMED)
        self.note("connected")

    def closed(self, closed: Closed) -> None:
        link, self.link = self.link, None
        assert link is not None
        now, progressed = self.machine.now, self.delivery.progressed
        lasted = 0.0 if link.welcomed_at is None else now - link.welcomed_at
        self.delivery.disconnected(closed, now)
        for action in self.delivery.actions():
            self.mark(action)
        self.note("closed", closed.code, closed.reason)
        self._over(
            closed_outcome(
                closed, progressed=progressed, connected_for=lasted, asked=link.postponed, renewal=link.retired
            )
        )

    def mark(self, action: asked.Action) -> None:
        """Write what an answer or a loss showed."""
        if isinstance(action, asked.Settle):
            self.outbox.settle(action.run)
        elif isinstance(action, asked.TakeBack):
            self.note("taken back", action.run)
            self.outbox.transmitted(action.run)
        elif isinstance(action, asked.MarkUnanswered):
            for run in action.runs:
                self.outbox.transmitted(run)
        elif isinstance(action, asked.Refuse):
            self.outbox.refuse(action)
        else:
            raise Violation(f"nobody gave cause for {action}")

    # -- between two attempts

    def _over(self, outcome: Outcome) -> None:
        outcome, pause = self._reconnection.ended(outcome)
        self.note("over", outcome.kind, outcome.code, outcome.credentials)
        self.lifecycle.apply(LinkEvent.LOST)
        if pause is None:
            self.lifecycle.apply(LinkEvent.EXHAUSTED)
        else:
            self._wait(pause)

    def _wait(self, pause: Pause) -> None:
        self._firm = pause.firm
        if pause.firm and not self._woken_firmly:
            self._wake = False
        if pause.ask_every is not None and pause.ask_first and self._has_other_credentials():
            self._retry()
            return
        self.note("pause", pause.delay, pause.firm)
        self._looked = self.machine.now
        self._look(self.machine.now + pause.delay, pause.ask_every)

    def _look(self, deadline: float, looks: float | None) -> None:
        """Try again if it is time or something is new, else wait on."""
        now = self.machine.now
        if self._wake:
            self._reconnection.restart()
            self._retry()
        elif now >= deadline or (now > self._looked and self._has_other_credentials()):
            self._retry()
        else:
            self._looked = now
            until = deadline if looks is None else min(deadline, now + looks)
            self.timer.set(until, partial(self._look, deadline, looks))

    def _has_other_credentials(self) -> bool:
        """Ask the application; keep a new answer for the next attempt."""
        token = self._token()
        if token == self._target:
            return False
        self._next_target = token
        return True

    def _retry(self) -> None:
        self._calm()
        self._attempt(LinkEvent.RETRY)

    def _calm(self) -> None:
        self._wake = self._firm = self._woken_firmly = False
