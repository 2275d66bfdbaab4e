"""What `Delivery` sends, when, and what an answer settles: PROTOCOL.md section 3, without a socket."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from durablews.config import DeliveryConfig
from durablews.delivery.actions import (
    Action,
    Close,
    Deliver,
    MarkUnanswered,
    Postpone,
    Refuse,
    RenewStream,
    Requeue,
    SetAside,
    Settle,
    TakeBack,
    Want,
    Welcomed,
)
from durablews.delivery.backlog import BATCH_BYTES, BATCH_MESSAGES, READ_AHEAD_BYTES, READ_AHEAD_MESSAGES
from durablews.delivery.delivery import Delivery
from durablews.delivery.suspicion import Closed
from durablews.messages import Entry
from durablews.wire.dialect import Introduction
from durablews.wire.frames import JSON, Ack, Bye, Codec, Flow, Hello, Msgs, Nack, Ping, Pong, Welcome
from durablews.wire.native import NativeDialect

CODEC = Codec(JSON)
INSTANCE = "0123456789abcdef"
HELLO = Introduction("0" * 32, INSTANCE, 7, 1 << 20, "test")
LOST = Closed(code=1006)


class Shell:
    """Does what the real shell does, at once, over an outbox in memory; counts what it is asked for."""

    def __init__(self, *, records: bool = True, **config: Any) -> None:
        self.config = DeliveryConfig(**config)
        self.delivery = Delivery(self.config, instance=INSTANCE)
        self.now = 1000.0
        self.rows: dict[int, Entry] = {}
        self.aside: dict[int, Entry] = {}
        self.unfit: dict[int, str] = {}
        self.last = 0
        #: Whether what is to be recorded is on the medium at once.
        self.records = records
        self.fetches = 0
        self.done: list[Action] = []
        self.frames: list[Hello | Msgs | Pong] = []
        self.handed = 0
        #: What a link carries at a time; most stories are about other limits.
        self.limit = 1 << 30

    # -- the outbox

    def put(self, count: int = 1, *, priority: int = 0, size: int = 10, tell: bool = True) -> list[int]:
        """Store messages and return their sequences."""
        payload = '"' + "x" * (size - 2) + '"'
        seqs = []
        for _ in range(count):
            self.last += 1
            self.rows[self.last] = Entry(self.last, priority, payload, None, None, 0, size, 0, 0)
            seqs.append(self.last)
        if tell:
            self.stored()
        return seqs

    def stored(self) -> None:
        self.delivery.stored()
        self.pump()

    def page(self, want: Want) -> list[Entry]:
        """Return what `entries.peek` would."""
        found: list[Entry] = []
        size = 0
        for entry in sorted(self.rows.values(), key=lambda entry: (-entry.priority, entry.seq)):
            if entry.priority in want.closed or entry.seq <= want.after.get(entry.priority, 0):
                continue
            if entry.priority <= want.above or len(found) >= want.limit:
                break
            if found and size + entry.bytes > want.max_bytes:
                break
            found.append(entry)
            size += entry.bytes
        return found

    # -- the connection

    def connect(self, *, window: int = 1024, max_bytes: int = 1 << 20) -> None:
        self.delivery.connected(NativeDialect().connection(JSON), HELLO)
        self.delivery._transit.limit = self.limit
        self.handed = 0
        self.pump()
        self.frames.clear()
        self.done.clear()
        self.say(Welcome(window, max_bytes))

    def say(self, frame: Welcome | Ack | Nack | Flow | Ping | Bye) -> None:
        """Let the server say something, and do what follows."""
        self.delivery.receive(CODEC.encode(frame).decode(), self.now)
        self.pump()

    def lose(self, closed: Closed = LOST) -> None:
        self.delivery.disconnected(closed, self.now)
        self.pump()

    def pump(self) -> None:
        """Do what is asked and send what may go, until nothing is left; more than a few rounds would be a busy loop."""
        for _ in range(2 * len(self.rows) + 40):
            actions = self.delivery.actions()
            for action in actions:
                self._do(action)
            want = self.delivery.wanted(self.now)
            if want is not None:
                self.fetches += 1
                page = self.page(want)
                unfit = [(e.priority, e.seq, self.unfit[e.seq]) for e in page if e.seq in self.unfit]
                self.delivery.supply(want, [e for e in page if e.seq not in self.unfit], unfit, self.now)
            frame = self.delivery.frame_to_send(self.now)
            if frame is not None:
                self.handed += len(frame)
                decoded = CODEC.decode_client(frame.decode())
                assert isinstance(decoded, Hello | Msgs | Pong)
                self.frames.append(decoded)
            if not actions and want is None and frame is None:
                return
        raise AssertionError("the shell is kept busy for nothing")

    def _do(self, action: Action) -> None:
        self.done.append(action)
        if isinstance(action, Settle):
            self._each(action.run, lambda entry: None)
        elif isinstance(action, MarkUnanswered):
            for run in action.runs:
                self._each(run, lambda entry: entry._replace(transmissions=entry.transmissions + 1))
        elif isinstance(action, TakeBack):
            self._each(action.run, lambda entry: entry._replace(transmissions=entry.transmissions + 1))
            first = self.rows[action.run.first]
            self.rows[first.seq] = first._replace(nacks=first.nacks + 1)
        elif isinstance(action, Refuse | Requeue | SetAside) and self.records:
            self.record(action)

    def _each(self, run: Any, change: Any) -> None:
        for seq in range(run.first, run.last + 1):
            entry = self.rows.get(seq)
            if entry is not None and entry.priority == run.priority:
                changed = change(entry)
                if changed is None:
                    del self.rows[seq]
                else:
                    self.rows[seq] = changed

    def record(self, action: Refuse | Requeue | SetAside) -> None:
        """Have what became of an entry on the medium."""
        entry = self.rows.pop(action.seq)
        if isinstance(action, Requeue):
            self.last += 1
            self.rows[self.last] = entry._replace(seq=self.last)
        elif isinstance(action, SetAside):
            self.aside[entry.seq] = entry
        self.delivery.recorded(action.priority, action.seq)

    def wait(self, seconds: float) -> None:
        """Let time pass, with every timer at its time."""
        until = self.now + seconds
        for _ in range(10_000):
            timer = self.delivery.timer(self.now)
            if timer is None or timer > until:
                break
            self.now = max(self.now, timer)
            self.delivery.handle_timer(self.now)
            self.pump()
        self.now = until
        self.delivery.handle_timer(self.now)
        self.pump()

    # -- what happened

    def take(self) -> list[list[int]]:
        """Return the sequences of the frames of messages since the last call."""
        frames = [[item.seq for item in frame.items] for frame in self.frames if isinstance(frame, Msgs)]
        self.frames.clear()
        return frames

    def taken(self) -> None:
        self.delivery.taken(self.handed, self.now)

    def told(self, kind: type[Any]) -> list[Any]:
        """Return the actions of one kind so far."""
        return [action for action in self.done if isinstance(action, kind)]


def connected(*, window: int = 1024, max_bytes: int = 1 << 20, **config: Any) -> Shell:
    shell = Shell(**config)
    shell.connect(window=window, max_bytes=max_bytes)
    return shell


# -- C1


def test_hello_comes_first_and_messages_wait_for_the_welcome() -> None:
    """Nothing but hello is sent, and nothing read, before the server's welcome (C1)."""
    shell = Shell()
    shell.put(3)
    shell.delivery.connected(NativeDialect().connection(JSON), HELLO)
    shell.pump()
    assert [type(frame) for frame in shell.frames] == [Hello]
    assert shell.fetches == 0
    assert not shell.delivery.ready
    shell.say(Welcome(10, 65_536))
    assert shell.told(Welcomed) == [Welcomed(65_536)]
    assert shell.take() == [[1, 2, 3]]


def test_a_second_welcome_changes_nothing() -> None:
    """What is in flight and the window stay as they are when a server welcomes twice."""
    shell = connected(window=3)
    shell.put(5)
    shell.say(Welcome(100, 65_536))
    assert shell.take() == [[1, 2]]
    assert len(shell.told(Welcomed)) == 1


# -- C2, C6


def test_every_frame_names_its_predecessor() -> None:
    """`a` is the last sequence of the priority sent on this connection that no nack took back; absent for none (C2)."""
    shell = connected()
    shell.put(2)
    shell.put(1, priority=5)
    shell.put(2)
    assert [(f.priority, f.after) for f in shell.frames if isinstance(f, Msgs)] == [(0, None), (5, None), (0, 2)]
    shell.frames.clear()
    shell.say(Ack(0, 1))
    shell.say(Nack(0, 2, retry=100))
    shell.wait(0.2)
    assert [f.after for f in shell.frames if isinstance(f, Msgs)] == [1]
    shell.lose()
    shell.connect()
    assert [f.after for f in shell.frames if isinstance(f, Msgs)] == [None, None]


def test_what_was_unanswered_is_sent_again_in_order_before_anything_newer() -> None:
    """After a reconnect: higher priority first, then by sequence, the unanswered before what came since (C6, P3)."""
    shell = connected()
    shell.put(3)
    shell.put(2, priority=5)
    shell.say(Ack(0, 1))
    shell.take()
    shell.lose()
    assert {run.priority: (run.first, run.last, run.messages) for run in shell.told(MarkUnanswered)[0].runs} == {
        0: (2, 3, 2),
        5: (4, 5, 2),
    }
    shell.put(1)
    shell.connect()
    assert shell.take() == [[4, 5], [2, 3, 6]]


def test_a_lost_connection_without_messages_marks_nothing() -> None:
    """Where nothing was in flight there is nothing to note."""
    shell = connected()
    shell.lose()
    assert shell.told(MarkUnanswered) == []


# -- C4


@pytest.mark.parametrize("answer", [Ack(0, 2), Ack(9, 50), Nack(0, 1, True), Nack(0, 9), Nack(9, 3, True)])
def test_an_answer_for_what_is_not_in_flight_changes_nothing(answer: Ack | Nack) -> None:
    """It is counted, and neither settles, refuses nor takes anything back (C4)."""
    shell = connected(window=3)
    shell.put(6)
    shell.say(Ack(0, 2))
    before, rows = list(shell.done), dict(shell.rows)
    shell.take()
    shell.say(answer)
    assert shell.delivery.stray_answers == 1
    assert (shell.done, shell.rows, shell.take()) == (before, rows, [])


def test_an_ack_of_an_older_connection_settles_nothing_on_the_next() -> None:
    """What is read and not sent on this connection is not settled by an ack (C4)."""
    shell = connected()
    shell.put(3)
    shell.lose()
    shell.connect(window=0)
    shell.say(Ack(0, 3))
    assert len(shell.rows) == 3
    assert shell.delivery.stray_answers == 1


# -- C5: windows


def test_the_window_counts_messages_and_one_place_is_kept_for_higher_priorities() -> None:
    """With W above 1 the lowest priority in flight has W - 1 places, what is above it the last one (C5)."""
    shell = connected(window=4)
    shell.put(9)
    assert shell.take() == [[1, 2, 3]]
    shell.put(3, priority=1)
    assert shell.take() == [[10]]
    shell.say(Ack(0, 1))
    assert shell.take() == [[11]]
    shell.say(Ack(0, 3))
    assert shell.delivery.in_flight <= 4


@pytest.mark.parametrize(("ours", "theirs"), [(1, 50), (50, 1)])
def test_the_smaller_window_counts_and_a_window_of_one_lets_one_go(ours: int, theirs: int) -> None:
    """The client's and the server's window both hold."""
    shell = Shell(window=ours)
    shell.connect(window=theirs)
    shell.put(3)
    assert shell.take() == [[1]]
    shell.say(Ack(0, 1))
    assert shell.take() == [[2]]


def test_the_window_counts_bytes_but_one_message_always_goes() -> None:
    """Bytes in flight stay within `window_bytes`, except that with nothing in flight one message goes (C5)."""
    shell = connected(window_bytes=100)
    shell.put(3, size=40)
    assert shell.take() == [[1, 2]]
    shell.say(Ack(0, 2))
    shell.put(1, size=5000)
    shell.put(1, size=10)
    assert shell.take() == [[3]]
    shell.say(Ack(0, 3))
    assert shell.take() == [[4]]
    shell.say(Ack(0, 4))
    assert shell.take() == [[5]]


def test_a_batch_has_at_most_256_messages() -> None:
    """One frame carries 256 messages at most."""
    shell = connected()
    shell.put(600)
    assert [len(frame) for frame in shell.take()] == [256, 256, 88]


def test_a_batch_has_at_most_256_kib() -> None:
    """One frame carries 256 KiB at most."""
    shell = connected(max_bytes=1 << 22)
    shell.put(10, size=60_000)
    assert max(len(frame) for frame in shell.take()) == BATCH_BYTES // 60_064


def test_no_frame_is_larger_than_the_server_takes() -> None:
    """max_bytes holds for every frame as it is encoded, framing and escapes included (C5)."""
    shell = Shell()
    sizes = []
    shell.delivery.connected(NativeDialect().connection(JSON), HELLO)
    shell.delivery.frame_to_send(0.0)
    shell.delivery.receive(CODEC.encode(Welcome(1024, 65_536)).decode(), 0.0)
    headers = '{"k":"' + "v" * 500 + '"}'
    for _ in range(300):
        seq = shell.put(1, size=300, tell=False)[0]
        shell.rows[seq] = shell.rows[seq]._replace(headers=headers)
    shell.delivery.stored()
    while (want := shell.delivery.wanted(0.0)) is not None:
        shell.delivery.supply(want, shell.page(want), [], 0.0)
    while (frame := shell.delivery.frame_to_send(0.0)) is not None:
        sizes.append(len(frame))
    assert sizes
    assert max(sizes) <= 65_536


def test_a_higher_priority_overtakes_all_that_is_not_in_flight() -> None:
    """What is more urgent goes next, however much was read already (P3)."""
    shell = connected(window=2)
    shell.put(1000)
    assert shell.take() == [[1]]
    shell.put(1, priority=7)
    assert shell.take() == [[1001]]
    shell.put(2, priority=50)
    shell.say(Ack(0, 1))
    shell.say(Ack(7, 1001))
    assert shell.take()[0] == [1002]


def test_flow_changes_the_window_and_what_is_in_flight_is_not_held_against_it() -> None:
    """A smaller window stops new messages until enough is answered; 0 pauses; a larger one goes on at once (C5)."""
    shell = connected(window=5)
    shell.put(20)
    shell.take()
    shell.say(Flow(2))
    shell.say(Ack(0, 2))
    assert shell.take() == []
    shell.say(Ack(0, 4))
    assert shell.take() == [[5]]
    shell.say(Flow(0))
    shell.say(Ack(0, 5))
    assert shell.take() == []
    shell.say(Flow(9))
    assert shell.take() == [[6, 7, 8, 9, 10, 11, 12, 13]]


@pytest.mark.parametrize("reminders", [False, True])
def test_a_pause_of_five_minutes_with_something_to_send_ends_the_connection(reminders: bool) -> None:
    """Window 0 for 300 s closes with 4408, also when the server repeats it meanwhile (C5, P8)."""
    shell = connected(window=0)
    shell.put(1)
    for _ in range(299):
        if reminders:
            shell.say(Flow(0))
        shell.wait(1.0)
    assert shell.told(Close) == []
    shell.wait(1.5)
    assert [close.code for close in shell.told(Close)] == [4408]


def test_a_pause_with_nothing_to_send_lasts() -> None:
    """A server may pause an idle client for as long as it likes."""
    shell = connected(window=0)
    shell.wait(3000.0)
    assert shell.told(Close) == []


# -- C5: too large


def test_what_is_too_large_alone_steps_aside_and_the_rest_goes_on() -> None:
    """An entry over the server's limit is set aside; what follows waits only until that is recorded (C5, C8)."""
    shell = Shell(records=False)
    shell.connect(max_bytes=65_536)
    shell.put(1)
    shell.put(1, size=70_000)
    shell.put(2)
    shell.put(1, priority=3)
    assert shell.take() == [[1], [5]]
    (action,) = shell.told(SetAside)
    assert (action.seq, action.refusal.code, action.refusal.unknown) == (2, "too_large", False)
    assert action.refusal.needs > 70_000
    shell.record(action)
    shell.pump()
    assert shell.take() == [[3, 4]]


def test_a_limit_that_only_batches_exceed_makes_smaller_batches() -> None:
    """Frames are halved until they fit; nothing steps aside that fits alone."""
    shell = connected(max_bytes=65_536)
    shell.put(20, size=30_000)
    frames = shell.take()
    assert [seq for frame in frames for seq in frame] == list(range(1, 21))
    assert shell.told(SetAside) == []


# -- C7: nacks


def test_a_nack_takes_back_what_follows_and_holds_it_but_not_what_is_before() -> None:
    """`seq` and everything after it go again after the delay, what is before it and other priorities at once (C7)."""
    shell = connected()
    shell.put(4)
    shell.put(1, priority=1)
    shell.take()
    shell.say(Nack(0, 3, retry=2000))
    assert [(action.run.first, action.run.last) for action in shell.told(TakeBack)] == [(3, 4)]
    shell.put(1)
    shell.put(1, priority=1)
    assert shell.take() == [[7]]
    shell.wait(1.9)
    assert shell.take() == []
    shell.wait(0.2)
    assert shell.take() == [[3, 4, 6]]


def test_a_delay_goes_on_across_connections() -> None:
    """After a reconnect what is before the nacked one is sent again at once, the rest when the delay is over."""
    shell = connected()
    shell.put(4)
    shell.say(Nack(0, 3, retry=5000))
    shell.take()
    shell.lose()
    shell.now += 1.0
    shell.connect()
    assert shell.take() == [[1, 2]]
    shell.wait(3.9)
    assert shell.take() == []
    shell.wait(0.2)
    assert shell.take() == [[3, 4]]


@pytest.mark.parametrize(("retry", "delay"), [(0, 0.1), (None, 5.0), (99, 0.1), (10_000_000, 3600.0), (250, 0.25)])
def test_delays_are_at_least_100_ms_and_at_most_an_hour(retry: int | None, delay: float) -> None:
    """Whatever `retry` says; 5 s when it says nothing (PROTOCOL.md section 2)."""
    shell = connected()
    shell.put(1)
    shell.take()
    shell.say(Nack(0, 1, retry=retry))
    assert shell.delivery.timer(shell.now) == pytest.approx(shell.now + delay)
    shell.wait(delay * 0.99)
    assert shell.take() == []
    shell.wait(delay * 0.02)
    assert shell.take() == [[1]]


def test_a_refused_message_is_passed_over_only_once_that_is_recorded() -> None:
    """A final nack makes a dead letter; what follows waits until that is on the medium, then goes at once (C7, C8)."""
    shell = Shell(records=False)
    shell.connect()
    shell.put(3)
    shell.put(1, priority=-1)
    shell.take()
    shell.say(Nack(0, 1, True, "invalid", "no such meter"))
    (action,) = shell.told(Refuse)
    assert (action.seq, action.refusal.code, action.refusal.reason, action.refusal.unknown) == (
        1,
        "invalid",
        "no such meter",
        False,
    )
    shell.put(1)
    shell.wait(20.0)
    assert shell.take() == []
    shell.record(action)
    shell.pump()
    assert shell.take() == [[2, 3, 5]]


def test_a_second_nack_while_one_is_recorded_loses_nothing() -> None:
    """A nack of an earlier message while a later one's refusal is being written: both are heeded."""
    shell = Shell(records=False)
    shell.connect()
    shell.put(4)
    shell.take()
    shell.say(Nack(0, 3, True))
    shell.say(Nack(0, 2, retry=100))
    (action,) = shell.told(Refuse)
    shell.wait(1.0)
    assert shell.take() == []
    shell.record(action)
    shell.pump()
    assert shell.take() == [[2, 4]]


def test_on_retry_requeue_sends_the_message_to_the_back() -> None:
    """The nacked message gets a new sequence; the next one goes after the delay, once that is recorded (C7, C8)."""
    shell = connected(on_retry="requeue")
    shell.put(3)
    shell.take()
    shell.say(Nack(0, 1, retry=1000))
    assert shell.told(Requeue) == [Requeue(0, 1)]
    assert shell.take() == []
    shell.wait(1.1)
    assert shell.take() == [[2, 3, 4]]


def test_max_attempts_nacks_make_a_dead_letter() -> None:
    """The third "try again" of three ends it, with the server's code and reason, and it was certainly not applied."""
    shell = connected(max_attempts=3)
    shell.put(2)
    for _ in range(3):
        assert shell.told(Refuse) == []
        shell.say(Nack(0, 1, retry=100, code="busy", reason="later"))
        shell.wait(0.2)
    (action,) = shell.told(Refuse)
    assert (action.seq, action.refusal.code, action.refusal.unknown) == (1, "busy", False)
    assert "later" in action.refusal.reason
    assert shell.take()[-1] == [2]


def test_unfit_entries_become_dead_letters_and_never_part_of_a_frame() -> None:
    """What the disk damaged is refused with its fault; the rest goes on after that is recorded."""
    shell = Shell(records=False)
    shell.connect()
    shell.unfit[2] = "damaged"
    shell.put(3)
    assert shell.take() == []
    (action,) = shell.told(Refuse)
    assert (action.seq, action.refusal.code) == (2, "damaged")
    shell.record(action)
    shell.pump()
    assert shell.take() == [[1, 3]]


# -- C9


def test_no_ack_in_time_closes_and_comes_back_with_half() -> None:
    """`ack_timeout` after the later of the last ack and the last byte taken: 4408, then half of each (C9)."""
    shell = connected(window=300, ack_timeout=30.0)
    shell.put(600)
    assert [len(frame) for frame in shell.take()] == [256, 43]
    shell.wait(20.0)
    shell.taken()
    shell.wait(29.0)
    assert shell.told(Close) == []
    shell.wait(1.5)
    assert [close.code for close in shell.told(Close)] == [4408]
    shell.lose()
    shell.connect(window=300)
    assert [len(frame) for frame in shell.take()] == [128, 21]
    shell.say(Ack(0, 10))
    assert shell.delivery.in_flight == 299


def test_each_ack_doubles_again_what_was_halved() -> None:
    """A quarter after two timeouts, a half after one ack, everything after the next (C9)."""
    shell = Shell(ack_timeout=1.0)
    shell.put(4000)
    for _ in range(2):
        shell.connect()
        shell.wait(2.0)
        assert [close.code for close in shell.told(Close)] == [4408]
        shell.lose()
    shell.connect()
    for size in (64, 128, 256, 256):
        assert [len(frame) for frame in shell.take()] == [size, size, size, size - 1]
        shell.say(Ack(0, min(shell.rows) + shell.delivery.in_flight - 1))


def test_acks_of_what_was_sent_before_double_nothing() -> None:
    """After a timeout the scale doubles once for each round: the acks of many small frames are one piece of news."""
    shell = Shell(ack_timeout=1.0)
    shell.put(4000)
    for _ in range(3):
        shell.connect()
        shell.wait(2.0)
        shell.lose()
    shell.connect()
    assert [len(frame) for frame in shell.take()] == [32, 32, 32, 31]
    seq = min(shell.rows)
    shell.say(Ack(0, seq + 31))
    assert [len(frame) for frame in shell.take()] == [64, 64, 32]  # twice the window now
    for more in (63, 95, 126):
        shell.say(Ack(0, seq + more))
    assert {len(frame) for frame in shell.take()} == {32, 31}  # what had room within the same window
    shell.say(Ack(0, seq + 127 + 63))
    assert max(len(frame) for frame in shell.take()) > 64


def test_an_ack_that_came_late_doubles_nothing() -> None:
    """Twice as much would take twice as long: more than half of the timeout is no reason to send more."""
    shell = Shell(ack_timeout=1.0)
    shell.put(4000)
    shell.connect()
    shell.wait(2.0)
    shell.lose()
    shell.connect()
    for late, size in ((0.6, 128), (0.6, 128), (0.4, 256)):
        assert len(shell.take()[0]) == 128
        shell.wait(late)
        shell.say(Ack(0, min(shell.rows) + shell.delivery.in_flight - 1))
        assert shell.delivery._sizing.scaled(256) == size


def test_an_ack_gives_its_priority_more_time_and_no_other() -> None:
    """Other priorities, pings and newer frames are no progress (C9)."""
    shell = connected(ack_timeout=30.0)
    shell.put(5)
    shell.put(5, priority=1)
    shell.taken()
    for seq in range(6, 9):
        shell.wait(9.0)
        shell.say(Ack(1, seq))
        shell.say(Ping(1))
        shell.put(1)
        shell.taken()
    assert shell.told(Close) == []
    shell.wait(3.1)
    assert [close.code for close in shell.told(Close)] == [4408]


def test_an_ack_of_the_same_priority_is_progress() -> None:
    """A slow server that acks now and then is not left (C9)."""
    shell = connected(ack_timeout=30.0)
    shell.put(10)
    shell.taken()
    for seq in range(1, 9):
        shell.wait(25.0)
        shell.say(Ack(0, seq))
    assert shell.told(Close) == []


def test_a_slow_socket_that_takes_bytes_is_not_a_dead_server() -> None:
    """The timeout counts from the last byte that the socket took of the oldest frame and what is before it (C9)."""
    shell = connected(ack_timeout=30.0)
    shell.put(100, size=2000)
    for part in range(20):
        shell.wait(25.0)
        assert shell.delivery.untaken
        shell.delivery.taken(1000 * (part + 1), shell.now)
    assert shell.told(Close) == []
    shell.taken()
    assert not shell.delivery.untaken
    shell.wait(31.0)
    assert [close.code for close in shell.told(Close)] == [4408]


def test_halving_never_goes_below_one_message() -> None:
    """However often acks stay out, one message goes (C9)."""
    shell = connected(ack_timeout=1.0)
    shell.put(20)
    for _ in range(15):
        shell.wait(2.0)
        shell.lose()
        shell.take()
        shell.connect()
    assert len(shell.take()[0]) == 1


# -- bye, protocol errors, pushes, replies


def test_after_a_bye_nothing_more_is_sent_and_answers_still_count() -> None:
    """The client stops sending, heeds acks, postpones its return, and closes after 10 s (PROTOCOL.md section 2)."""
    shell = connected()
    shell.put(2)
    shell.take()
    shell.say(Bye(7000))
    assert shell.told(Postpone) == [Postpone(7.0)]
    shell.put(1)
    assert shell.take() == []
    shell.say(Ack(0, 2))
    assert list(shell.rows) == [3]
    shell.wait(9.0)
    shell.say(Bye(7000))
    assert shell.told(Close) == []
    shell.wait(1.1)
    assert [close.code for close in shell.told(Close)] == [1000]


def test_a_bye_postpones_for_an_hour_at_most() -> None:
    """No server can switch a client off."""
    shell = connected()
    shell.say(Bye(2**40))
    assert shell.told(Postpone) == [Postpone(3600.0)]


@pytest.mark.parametrize(
    "data", ["", "[]", '{"t":"ack"}', '{"t":"welcome","window":1,"max_bytes":100}', b"{}", '{"t":"nack","p":101,"s":1}']
)
def test_a_malformed_frame_closes_with_4400_and_nothing_else_is_heeded(data: str | bytes) -> None:
    """What makes no sense ends the connection, and settles nothing."""
    shell = connected()
    shell.put(1)
    shell.delivery.receive(data, shell.now)
    shell.pump()
    assert [close.code for close in shell.told(Close)] == [4400]
    shell.say(Ack(0, 1))
    assert list(shell.rows) == [1]


def test_a_frame_of_a_later_version_is_ignored() -> None:
    """Unknown types change nothing (PROTOCOL.md section 1)."""
    shell = connected()
    shell.delivery.receive('{"t":"later","x":[1]}', shell.now)
    shell.pump()
    assert shell.told(Close) == []


def test_pushes_are_handed_on_and_pings_answered() -> None:
    """A push becomes `Deliver`, a ping its pong, before and after the welcome."""
    shell = connected()
    shell.delivery.receive(CODEC.encode_push('{"a":1}').decode(), shell.now)
    shell.say(Ping(42))
    assert shell.told(Deliver) == [Deliver('{"a":1}')]
    assert shell.frames == [Pong(42)]


# -- section 5


def test_a_rewound_welcome_renews_the_stream_and_says_hello_again() -> None:
    """Nothing is sent under the old stream; after the second hello everything goes (PROTOCOL.md section 5)."""
    shell = Shell()
    shell.put(2)
    shell.delivery.connected(NativeDialect().connection(JSON), HELLO)
    shell.say(Welcome(10, 65_536, True))
    assert shell.told(RenewStream) == [RenewStream()]
    assert not shell.delivery.ready
    assert shell.take() == []
    shell.delivery.introduce(replace_stream("1" * 32))
    shell.pump()
    assert [frame.stream for frame in shell.frames if isinstance(frame, Hello)] == ["1" * 32]
    shell.say(Welcome(10, 65_536))
    assert shell.take() == [[1, 2]]


def test_a_second_rewound_running_closes_with_4400() -> None:
    """A new stream that is not new is the server's mistake (PROTOCOL.md section 5)."""
    shell = Shell()
    shell.delivery.connected(NativeDialect().connection(JSON), HELLO)
    shell.say(Welcome(10, 65_536, True))
    shell.delivery.introduce(replace_stream("1" * 32))
    shell.say(Welcome(10, 65_536, True))
    assert [close.code for close in shell.told(Close)] == [4400]


def replace_stream(stream: str) -> Introduction:
    return Introduction(stream, INSTANCE, HELLO.last, HELLO.max_bytes, HELLO.agent)


# -- rate


def test_a_rate_limit_spreads_messages() -> None:
    """`rate_limit` messages a second, by a timer and not by chance."""
    shell = connected(rate_limit=10.0)
    shell.put(30)
    shell.wait(1.0)
    assert 9 <= sum(len(frame) for frame in shell.take()) <= 12
    shell.wait(2.5)
    assert len([seq for frame in shell.take() for seq in frame]) >= 18


# -- reading: P6 and no busy loops


def test_memory_is_bounded_by_the_window_whatever_waits() -> None:
    """The window and what is read ahead, also when ever higher priorities come (P6)."""
    shell = Shell(window=100)
    shell.connect(window=100)
    for priority in range(-50, 50):
        shell.put(300, priority=priority)
        held = shell.delivery.in_flight + shell.delivery._backlog.waiting
        assert held <= 100 + READ_AHEAD_MESSAGES + BATCH_MESSAGES
    shell.take()
    shell.say(Ack(-50, 99))
    assert shell.take()[0][0] > 99 * 300, "the most urgent goes next"


@pytest.mark.parametrize("size", [50_000, 250_000])
def test_memory_is_bounded_in_bytes_whatever_waits(size: int) -> None:
    """The window's bytes and what is read ahead, also when larger and more urgent messages keep coming (P6)."""
    shell = Shell(window_bytes=100_000)
    shell.connect(max_bytes=1 << 22)
    shell.put(500, size=size)
    for number in range(200):
        shell.put(1, size=size, priority=1 + number % 3)
        backlog = shell.delivery._backlog
        held = sum(lane.ready_bytes for lane in backlog.lanes.values()) + backlog.bytes
        assert held <= 100_000 + READ_AHEAD_BYTES + 2 * BATCH_BYTES + size


def test_a_held_priority_is_not_read_again_and_again() -> None:
    """While a delay runs the shell is not asked to read what may not go (no busy loop)."""
    shell = connected()
    shell.put(50)
    shell.say(Nack(0, 1, retry=60_000))
    shell.fetches = 0
    shell.wait(30.0)
    assert shell.fetches <= 1
    for _ in range(10):
        shell.put(1)
    assert shell.fetches <= 20
    shell.take()
    shell.wait(31.0)
    assert sum(len(frame) for frame in shell.take()) == 60


def test_a_priority_whose_dead_letter_is_being_written_is_not_read_again_and_again() -> None:
    """While something is recorded the shell is not asked to read what may not go (no busy loop)."""
    shell = Shell(records=False)
    shell.connect()
    shell.put(50)
    shell.say(Nack(0, 1, True))
    shell.fetches = 0
    for _ in range(10):
        shell.stored()
    assert shell.fetches <= 20
    shell.wait(60.0)
    assert shell.fetches <= 20


def test_what_is_stored_while_a_page_is_read_is_not_overlooked() -> None:
    """A message that came after the read and before its answer is read next, without another wake-up (P8)."""
    shell = connected()
    shell.delivery.stored()
    want = shell.delivery.wanted(shell.now)
    assert want is not None
    shell.put(1, tell=False)
    shell.delivery.stored()
    shell.delivery.supply(want, [], [], shell.now)
    shell.pump()
    assert shell.take() == [[1]]


def test_what_is_recorded_while_a_page_is_read_lets_its_priority_go_on() -> None:
    """A page that left a priority out because of a dead letter does not close it for good (P8)."""
    shell = Shell(records=False)
    shell.connect()
    shell.put(2)
    shell.take()
    shell.say(Nack(0, 1, True))
    (action,) = shell.told(Refuse)
    shell.delivery.stored()
    want = shell.delivery.wanted(shell.now)
    assert want is not None
    assert want.closed == {0}
    shell.record(action)
    shell.delivery.supply(want, [], [], shell.now)
    shell.pump()
    assert shell.take() == [[2]]


def test_a_delay_that_ends_while_a_page_is_read_is_not_overlooked() -> None:
    """A page that left a priority out because of a delay does not close it for good (P8)."""
    shell = connected()
    shell.put(2)
    shell.take()
    shell.say(Nack(0, 1, retry=1000))
    shell.delivery.stored()
    want = shell.delivery.wanted(shell.now)
    assert want is not None
    shell.now += 2.0
    shell.delivery.handle_timer(shell.now)
    shell.delivery.supply(want, [], [], shell.now)
    shell.pump()
    assert shell.take() == [[1, 2]]


def test_a_large_message_behind_small_ones_is_read_without_a_wake_up() -> None:
    """A page that stops before a large message is not taken for the end of the outbox (P8)."""
    shell = connected(max_bytes=1 << 24)
    shell.put(3, tell=False)
    shell.put(1, size=3_000_000, tell=False)
    shell.stored()
    shell.say(Ack(0, 3))
    assert shell.take()[-1] == [4]


def test_a_page_of_an_older_connection_is_not_taken() -> None:
    """What was read before a reconnect is read again: it may have been answered meanwhile."""
    shell = connected()
    shell.put(1)
    shell.delivery.stored()
    want = shell.delivery.wanted(shell.now)
    assert want is not None
    shell.lose()
    shell.connect()
    assert shell.take() == [[1]]
    shell.delivery.supply(want, [shell.rows[1]], [], shell.now)
    shell.pump()
    assert shell.take() == []


def test_a_page_that_a_nack_has_overtaken_is_not_taken() -> None:
    """Entries read after what a nack took back would go before it: they are read again (C7)."""
    shell = connected()
    shell.put(2)
    shell.take()
    shell.put(1, tell=False)
    shell.delivery.stored()
    want = shell.delivery.wanted(shell.now)
    assert want is not None
    page = shell.page(want)
    assert [entry.seq for entry in page] == [3]
    shell.delivery.receive(CODEC.encode(Nack(0, 1, True)).decode(), shell.now)
    shell.delivery.supply(want, page, [], shell.now)
    shell.pump()
    assert shell.take() == [[2, 3]]


def test_idle_means_that_nothing_is_left() -> None:
    """Idle only once everything is read, sent, answered and written down."""
    shell = Shell(records=False)
    assert not shell.delivery.idle
    shell.connect()
    assert shell.delivery.idle
    shell.put(2)
    assert not shell.delivery.idle
    shell.say(Ack(0, 1))
    shell.say(Nack(0, 2, True))
    assert not shell.delivery.idle
    shell.record(shell.told(Refuse)[0])
    shell.pump()
    assert shell.delivery.idle


# -- P8: whatever happens, something that waits has a timer

Step = st.one_of(
    st.tuples(st.just("put"), st.integers(-1, 1), st.integers(1, 40)),
    st.tuples(st.just("ack"), st.integers(-1, 1), st.integers(0, 5)),
    st.tuples(st.just("nack"), st.integers(-1, 1), st.integers(0, 5)),
    st.tuples(st.just("refuse"), st.integers(-1, 1), st.integers(0, 5)),
    st.tuples(st.just("flow"), st.sampled_from([0, 1, 2, 30]), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 60), st.just(0)),
    st.tuples(st.just("record"), st.just(0), st.just(0)),
    st.tuples(st.just("lose"), st.just(0), st.just(0)),
    st.tuples(st.just("bye"), st.just(0), st.just(0)),
)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(Step, max_size=30),
    window=st.sampled_from([1, 2, 7, 100]),
    on_retry=st.sampled_from(["block", "requeue"]),
    rate=st.sampled_from([None, 3.0]),
)
def test_whatever_waits_has_a_timer_or_is_being_written(
    steps: list[tuple[str, int, int]], window: int, on_retry: str, rate: float | None
) -> None:
    """Whenever something is unsent or unanswered and nothing else is to be done, a timer runs or a record is awaited
    (P8); the window holds (C5)."""
    shell = Shell(records=False, window=window, on_retry=on_retry, rate_limit=rate)
    shell.connect()
    for kind, first, second in steps:
        lane = shell.delivery._backlog.lanes.get(first)
        flight = [entry.seq for entry in lane.in_flight()] if lane else []
        chosen = flight[second % len(flight)] if flight else 10**6
        if kind == "put":
            shell.put(second, priority=first)
        elif kind == "ack":
            shell.say(Ack(first, chosen if flight else 0))
        elif kind in ("nack", "refuse"):
            shell.say(Nack(first, chosen, kind == "refuse", retry=1000 * second))
        elif kind == "flow":
            shell.say(Flow(first))
        elif kind == "wait":
            shell.wait(float(first))
        elif kind == "bye":
            shell.say(Bye(5))
        if kind in ("record", "lose") or shell.told(Close):
            for action in shell.told(Refuse) + shell.told(Requeue):
                if action.seq in shell.rows:
                    shell.record(action)
            shell.pump()
        if kind == "lose" or shell.told(Close):
            shell.lose()
            shell.connect()
        assert shell.delivery.in_flight <= window
        awaited = any(lane.recording for lane in shell.delivery._backlog.lanes.values())
        assert not shell.rows or awaited or shell.delivery.timer(shell.now) is not None


def test_the_pause_counts_from_when_something_waits() -> None:
    """C5: a window of 0 over an empty outbox is no pause; the five minutes begin with the first message."""
    shell = connected(window=0)
    shell.wait(1000.0)
    shell.put(1)
    shell.wait(299.0)
    assert shell.told(Close) == []
    shell.wait(1.5)
    assert [close.code for close in shell.told(Close)] == [4408]


def test_a_delay_that_ends_lets_the_urgent_overtake_what_was_read() -> None:
    """P3: with the read-ahead full of lower ones, a higher priority whose nack delay is over is looked for at once."""
    shell = connected(window=0)
    shell.put(READ_AHEAD_MESSAGES + 1000)
    (urgent,) = shell.put(1, priority=1)
    shell.say(Flow(1024))
    assert shell.take()[0] == [urgent]
    shell.say(Flow(0))
    shell.say(Nack(1, urgent, retry=5000, code="busy"))
    shell.wait(5.1)
    assert shell.delivery._backlog.lanes[1].ready
