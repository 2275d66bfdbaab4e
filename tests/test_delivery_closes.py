"""What the end of a connection says about messages: found by sending less at a time, never guessed (PROTOCOL.md 6)."""

from __future__ import annotations

import pytest
from test_delivery import INSTANCE, Shell, connected

from durablews.delivery.actions import MarkUnanswered, Refuse, RenewStream
from durablews.delivery.suspicion import Closed
from durablews.wire.frames import Ack, Flow, Nack


def received(code: int, reason: str = "") -> Closed:
    return Closed(code=code, reason=reason, received=True)


def poisoned(shell: Shell, culprit: int, code: int, *, most: int = 60) -> int:
    """Play a server that closes whenever it is sent `culprit`; return after how many connections it was refused."""
    for connection in range(1, most):
        shell.connect(window=64)
        for frame in shell.take():
            if culprit in frame:
                shell.lose(received(code))
                break
            shell.say(Ack(0, frame[-1]))
        if shell.told(Refuse):
            return connection
    raise AssertionError("never found")


@pytest.mark.parametrize("code", [1009, 4413])
@pytest.mark.parametrize("culprit", [1, 2, 37, 200])
def test_too_large_halves_and_refuses_only_what_was_alone(code: int, culprit: int) -> None:
    """1009 and 4413 halve the batch down to one message alone; only that becomes a dead letter (C5, section 6)."""
    shell = Shell()
    shell.put(200)
    assert poisoned(shell, culprit, code) <= 30
    assert [(action.seq, action.refusal.code, action.refusal.unknown) for action in shell.told(Refuse)] == [
        (culprit, "too_large", True)
    ]
    shell.connect()
    left = sorted(shell.rows)
    while left and shell.delivery.in_flight:
        shell.say(Ack(0, left[-1]))
        left = sorted(shell.rows)
    assert left == []


def test_too_large_with_one_in_flight_refuses_it_at_once() -> None:
    """What was alone already needs no second try."""
    shell = connected()
    shell.put(1)
    shell.lose(received(1009, "frame too large"))
    (action,) = shell.told(Refuse)
    assert (action.seq, action.refusal.reason) == (1, "frame too large")


def test_what_a_nack_took_back_may_still_be_what_the_server_closes_for() -> None:
    """A frame that was taken back may lie unread at the server: the one in flight meanwhile is not blamed for it."""
    shell = Shell(window=3)
    shell.connect()
    shell.put(1)
    shell.put(1)
    shell.take()
    shell.say(Nack(0, 1, retry=100))
    shell.say(Flow(1))
    shell.wait(0.2)
    assert shell.take() == [[1]]
    shell.lose(received(1009))
    assert shell.told(Refuse) == []


@pytest.mark.parametrize("code", [1003, 1007, 4400])
@pytest.mark.parametrize("culprit", [1, 5])
def test_poison_is_refused_after_three_closes_and_then_alone(code: int, culprit: int) -> None:
    """Three closes running with the same oldest entry, then one message at a time, then the one that was alone."""
    shell = Shell()
    shell.put(8)
    connections = poisoned(shell, culprit, code)
    assert connections >= 4
    assert [(action.seq, action.refusal.code, action.refusal.unknown) for action in shell.told(Refuse)] == [
        (culprit, "poison", True)
    ]


def test_poison_needs_three_closes_even_when_it_was_alone_from_the_start() -> None:
    """One close too early proves nothing: the fourth counts."""
    shell = Shell()
    shell.put(1)
    for _ in range(3):
        shell.connect()
        shell.lose(received(4400))
        assert shell.told(Refuse) == []
    shell.connect()
    shell.lose(received(4400))
    assert [action.seq for action in shell.told(Refuse)] == [1]


def test_an_answer_clears_the_suspect_and_batches_come_back() -> None:
    """Whoever is answered was not it; once all that were in flight were answered, messages go together again."""
    shell = Shell()
    shell.put(5)
    for _ in range(3):
        shell.connect()
        shell.lose(received(4400))
    shell.take()
    shell.connect()
    assert shell.take() == [[1]]
    for seq in range(1, 5):
        shell.say(Ack(0, seq))
        assert shell.take() == [[seq + 1]]
    shell.put(3)
    assert shell.take() == []
    shell.say(Ack(0, 5))
    assert shell.take() == [[6, 7, 8]]
    shell.lose(received(4400))
    shell.connect()
    shell.lose(received(4400))
    assert shell.told(Refuse) == []


def test_a_culprit_behind_many_is_found_in_a_few_closes() -> None:
    """With the poison at place 40, the innocent before it cost no close each: eight closes are enough."""
    shell = Shell()
    shell.put(60)
    for _ in range(8):
        shell.connect()
        for _ in range(60):
            frames = shell.take()
            flying = [seq for frame in frames for seq in frame]
            if 40 in flying or not flying:
                break
            shell.say(Ack(0, flying[-1]))
        shell.lose(received(4400))
        refused = [action.seq for action in shell.told(Refuse)]
        if refused:
            break
    assert refused == [40]


@pytest.mark.parametrize(
    "closed",
    [
        Closed(code=1006),
        received(1000),
        received(1001),
        received(1002),
        received(1011),
        received(1012),
        received(1013),
        received(1008),
        received(4401),
        received(4408),
        received(4429),
        Closed(code=1009),
        Closed(code=4400, received=False, leaving=True),
    ],
    ids=lambda closed: f"{closed.code}{'' if closed.received else ' not received'}",
)
def test_cuts_and_a_servers_bad_night_never_count_against_a_message(closed: Closed) -> None:
    """However often it happens: nothing is refused, and everything goes out together again (section 6)."""
    shell = Shell()
    shell.put(4)
    for _ in range(12):
        shell.connect()
        assert shell.take() == [[1, 2, 3, 4]]
        shell.lose(closed)
        assert shell.told(Refuse) == []
        assert len(shell.told(MarkUnanswered)) == 1


def test_three_takeovers_in_ten_minutes_renew_the_stream() -> None:
    """4409 by another instance, three times within 600 s: two clients share the stream (section 5)."""
    shell = Shell()
    for number in range(3):
        shell.connect()
        shell.lose(received(4409, "instance=ffffffffffffffff"))
        assert (len(shell.told(RenewStream)) == 1) == (number == 2)
        shell.now += 299.0
    shell.connect()
    shell.lose(received(4409, "instance=ffffffffffffffff"))
    assert shell.told(RenewStream) == []


@pytest.mark.parametrize(
    ("closed", "apart"),
    [
        (received(4409, "instance=ffffffffffffffff"), 301.0),
        (received(4409, f"instance={INSTANCE}"), 1.0),
        (Closed(code=4409, reason="instance=ffffffffffffffff", received=True, leaving=True), 1.0),
        (Closed(code=4409, reason="instance=ffffffffffffffff"), 1.0),
    ],
    ids=["too far apart", "our own newer connection", "we were closing", "not received"],
)
def test_other_takeovers_do_not(closed: Closed, apart: float) -> None:
    """Our own newer connection, one that we had begun to close, or takeovers far apart show nothing."""
    shell = Shell()
    for _ in range(9):
        shell.connect()
        shell.lose(closed)
        assert shell.told(RenewStream) == []
        shell.now += apart
