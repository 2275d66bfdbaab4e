"""Whatever happens to a device and its server, in whatever order: each message is applied once, in order, or counted.

`Story` lets hypothesis think of what happens; `walk` is a long story that a seed repeats (``DURABLEWS_TEST_SEED``).
Both take their steps on a `World`, in which everything but the clock, the disk's thread and the socket is the library's
own. That they find what is broken is shown by `tools/mutants`.

Not played: two copies of one outbox, a lost tail of the log (all of PROTOCOL.md section 5 but the restored backup),
sizes. There is no interface yet that revives a dead letter; the world does it in SQL, under a new sequence.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from simulation import Violation
from traffic import Connection
from world import Mood, World

from durablews.config import DeliveryConfig

MOODS = get_args(Mood)
KINDS = ("plain", "plain", "plain", "plain", "refused", "poison")
SAYS = ("flow", "flow", "ping", "bye", "close", "stray answers")
OVERFLOWS = ("reject", "drop_oldest", "drop_new")
MOST = (4, 12, 1000)
DISASTERS = ("cut", "crash", "crash", "restart", "crash of the server", "backup")
#: Walks in this run, and steps in each; `tools/mutants` and a seed ask for others.
WALKS = int(os.environ.get("DURABLEWS_TEST_WALKS", "60"))
STEPS = 1000

priorities = st.sampled_from((0, 0, 1, -1))
windows = st.sampled_from((1, 2, 3, 8, 32))
moods = st.sampled_from(("takes", "takes", *MOODS))


def connected(story: Story) -> bool:
    return story.world.connection is not None


def something_to_read(story: Story) -> bool:
    return story.world.connection is not None and bool(story.world.connection.socket.to_client)


def something_to_serve(story: Story) -> bool:
    connection = story.world.connection
    return connection is not None and bool(connection.socket.to_server) and not connection.closed


def own(world: World, what: str, caps: dict[str, object]) -> None:
    """Let the owner, or another program of the device, do something."""
    if what == "caps":
        world.change_caps(caps)
    elif what == "lock":
        (world.lock if world.locker is None else world.unlock)()
    else:
        (world.expire if what == "expire" else world.revive)()


def strike(world: World, what: str, read_on: bool) -> None:
    """Let something break. `read_on`: the server still reads what is on its way."""
    if what == "crash":
        world.crash(read_on=read_on)
    elif what == "restart":
        world.restart()
    elif what == "backup":
        (world.back_up if world.backup is None else world.restore)()
    elif what == "crash of the server":
        world.crash_server()
    elif world.connection is not None:
        world.cut(read_on=read_on)


class Story(RuleBasedStateMachine):
    """One step after the other; then everything goes well, until nothing waits."""

    world: World

    @initialize(
        seed=st.integers(0, 2**32),
        own_window=windows,
        on_retry=st.sampled_from(("block", "requeue")),
        max_attempts=st.sampled_from((None, None, 2)),
        rate_limit=st.sampled_from((None, None, 200.0)),
        max_messages=st.sampled_from(MOST),
        overflow=st.sampled_from(OVERFLOWS),
        packed=st.booleans(),
        durability=st.sampled_from(("power", "process")),
    )
    def begin(
        self,
        *,
        seed: int,
        own_window: int,
        on_retry: Any,
        max_attempts: int | None,
        rate_limit: float | None,
        max_messages: int,
        overflow: str,
        packed: bool,
        durability: str,
    ) -> None:
        self.world = World(
            random.Random(seed),
            delivery=DeliveryConfig(
                window=own_window, on_retry=on_retry, max_attempts=max_attempts, rate_limit=rate_limit
            ),
            caps={"max_messages": max_messages, "overflow": overflow},
            packed=packed,
            durability=durability,
        )

    def teardown(self) -> None:
        if hasattr(self, "world"):
            try:
                self.world.finish()
            finally:
                self.world.end()

    # -- the device

    @rule(
        count=st.integers(1, 6),
        priority=priorities,
        ttl=st.sampled_from((None, None, None, 5.0)),
        kind=st.sampled_from(KINDS),
        code=st.sampled_from((1009, 4400)),
    )
    def send(self, count: int, priority: int, ttl: float | None, kind: str, code: int) -> None:
        self.world.send(count, priority, ttl, kind, code)

    @rule(priority=priorities)
    def insert(self, priority: int) -> None:
        self.world.insert(priority)

    @precondition(lambda self: self.world.sends)
    @rule()
    def cancel(self) -> None:
        self.world.cancel()

    @precondition(lambda self: self.world.disk.jobs)
    @rule(everything=st.booleans())
    def work(self, everything: bool) -> None:
        self.world.work()
        while everything and self.world.disk.jobs and self.world.locker is None:
            self.world.work()

    @rule(seconds=st.sampled_from((None, None, 0.01, 0.5, 6.0)))
    def wait(self, seconds: float | None) -> None:
        self.world.wait(seconds)

    @rule(
        what=st.sampled_from(("expire", "revive", "lock", "caps")),
        max_messages=st.sampled_from(MOST),
        overflow=st.sampled_from(OVERFLOWS),
    )
    def owner(self, what: str, max_messages: int, overflow: str) -> None:
        own(self.world, what, {"max_messages": max_messages, "overflow": overflow})

    @rule(what=st.sampled_from(DISASTERS), read_on=st.booleans())
    def disaster(self, what: str, read_on: bool) -> None:
        strike(self.world, what, read_on)

    # -- the network

    @precondition(lambda self: not connected(self))
    @rule(window=windows)
    def connect(self, window: int) -> None:
        self.world.connect(window)

    @precondition(something_to_read)
    @rule(everything=st.booleans())
    def read(self, everything: bool) -> None:
        self.world.read()
        while everything and something_to_read(self):
            self.world.read()

    @precondition(something_to_read)
    @rule()
    def lose_answer(self) -> None:
        self.world.lose_answer()

    @precondition(connected)
    @rule(which=st.integers(0, 20))
    def repeat_answer(self, which: int) -> None:
        self.world.repeat_answer(which)

    @precondition(something_to_read)
    @rule()
    def swap_answers(self) -> None:
        self.world.swap_answers()

    # -- the server

    @precondition(something_to_serve)
    @rule(mood=moods, at=st.integers(0, 3))
    def serve(self, mood: Mood, at: int) -> None:
        self.world.serve(mood, at)

    @precondition(something_to_serve)
    @rule()
    def serve_everything(self) -> None:
        while something_to_serve(self):
            self.world.serve()

    @precondition(lambda self: self.world.late)
    @rule(which=st.integers(0, 5), mood=moods)
    def serve_late(self, which: int, mood: Mood) -> None:
        self.world.serve_late(which, mood)

    @precondition(connected)
    @rule(what=st.sampled_from(SAYS), window=st.integers(0, 8))
    def speak(self, what: str, window: int) -> None:
        self.world.speak(what, window)


class TestStory(Story.TestCase):  # type: ignore[misc,valid-type]
    """With crashes of both ends, cuts, lost, repeated and swapped answers, refusals, delays, poison, expiry, caps of
    every policy, foreign writers, cancelled callers and restored backups: nothing is lost or applied twice, order
    holds, every departure is counted, and the outbox drains (P1 to P8)."""

    settings = settings(
        max_examples=int(os.environ.get("DURABLEWS_TEST_EXAMPLES", "500")),
        stateful_step_count=50,
        deadline=None,
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    )


# -- long walks


def walk(seed: int, steps: int, *, restores: bool = False) -> World:
    """Take so many steps and finish; return the world, which has ended. Without backups fewer excuses count."""
    rng = random.Random(seed)
    world = World(
        rng,
        delivery=DeliveryConfig(
            window=rng.choice((1, 2, 8, 40)),
            on_retry=rng.choice(("block", "requeue")),
            max_attempts=rng.choice((None, None, 3)),
            rate_limit=rng.choice((None, None, None, 200.0)),
        ),
        caps={"max_messages": rng.choice((10, 30, 10_000)), "overflow": rng.choice(OVERFLOWS)},
        packed=rng.random() < 0.5,
        durability=rng.choice(("power", "process")),
    )
    try:
        for _ in range(steps):
            wander(world, rng, restores)
        world.finish()
    except Violation as exc:
        raise Violation(f"DURABLEWS_TEST_SEED={seed}: {exc}") from exc
    finally:
        world.end()
    return world


def wander(world: World, rng: random.Random, restores: bool) -> None:
    """Take one step: now and then somebody does something, else whatever can move moves, in any order."""
    dice, connection = rng.random(), world.connection
    if dice < 0.06:
        kind = rng.choice(("plain",) * 30 + ("refused", "refused", "poison"))
        ttl = 5.0 if rng.random() < 0.05 else None
        world.send(rng.choice((1, 1, 5, 20)), rng.choice((0, 0, 1, -1)), ttl, kind, rng.choice((1009, 4400)))
    elif dice < 0.07:
        world.insert(rng.choice((0, 0, 1, -1)))
    elif dice < 0.08:
        own(world, rng.choice(("expire", "revive", "lock")), {})
    elif dice < 0.095:
        what = rng.choice([each for each in DISASTERS if restores or each != "backup"])
        strike(world, what, rng.random() < 0.5)
    elif dice < 0.10:
        world.cancel()
    elif dice < 0.12:
        world.speak(rng.choice(SAYS[:3] * 4 + SAYS), rng.choice((0, 1, 2, 8, 100)))
    elif dice < 0.14:
        step = rng.choice((world.lose_answer, world.swap_answers, partial(world.repeat_answer, rng.randrange(9))))
        step()
    else:
        move(world, rng, connection)


def move(world: World, rng: random.Random, connection: Connection | None) -> None:
    """Let something move that can."""
    mood: Mood = rng.choice(MOODS) if rng.random() < 0.1 else "takes"
    possible: list[Callable[[], None]] = []
    if world.disk.jobs:
        possible.append(world.work)
    if world.late:
        possible.append(partial(world.serve_late, rng.randrange(9), mood) if rng.random() < 0.5 else world.forget_late)
    if connection is None:
        possible.append(partial(world.connect, rng.choice((1, 3, 8, 32))))
    else:
        if connection.socket.to_client:
            possible.append(world.read)
        if connection.socket.to_server and not connection.closed:
            possible.append(partial(world.serve, mood, rng.randrange(4)))
    if not possible or rng.random() < 0.1:
        possible = [partial(world.wait, rng.choice((None, None, 0.01, 0.5)))]
    rng.choice(possible)()


def seeds() -> list[int]:
    """Return the walks of this run, or the one that the environment asks for."""
    chosen = os.environ.get("DURABLEWS_TEST_SEED")
    return [int(chosen)] if chosen else [*range(WALKS)]


@pytest.mark.parametrize("seed", seeds())
def test_a_long_walk_loses_nothing(seed: int) -> None:
    """A thousand steps, most of which move something: what holds for short stories holds for long ones (P1 to P8)."""
    walk(seed, STEPS, restores=seed % 3 == 2)


# -- what was found


@pytest.mark.parametrize("on_retry", ["requeue", "block"])
def test_what_a_nack_made_of_a_message_is_written_before_it_is_read_again(on_retry: Any) -> None:
    """While the disk cannot take a renumbering, not even the next connection sends the message, or what follows it,
    under the old number: it would be applied under both (P5, PROTOCOL.md C8)."""
    world = World(random.Random(1), delivery=DeliveryConfig(on_retry=on_retry), caps={})
    try:
        world.send(2, 0)
        settle_down(world)
        world.connect(8)
        settle_down(world, moods=("takes", "puts off"))  # hello, then the messages
        world.lock()
        world.read()
        world.cut(read_on=False)
        settle_down(world)
        world.connect(8)
        settle_down(world, moods=("takes", "takes"))
        world.unlock()
        world.wait(1.0)
        settle_down(world, moods=("takes",))
        world.finish()
    finally:
        world.end()


def test_after_a_crash_everything_that_was_sent_counts_as_sent() -> None:
    """Also what was sent after an ack whose deletion the crash undid: the window counts what is unanswered, the disk
    still holds what was answered (C3, P4)."""
    world = World(random.Random(1), delivery=DeliveryConfig(window=1), caps={})
    try:
        world.send(3, 0)
        settle_down(world)
        world.connect(8)
        settle_down(world, moods=("takes", "takes"))
        world.read()  # the ack of the first: the second is sent, and nothing is deleted yet
        assert world.connection is not None
        assert len(world.connection.socket.to_server) == 1
        world.crash()
        states = [row[0] for row in world.foreign.execute("SELECT ack_state FROM durablews_entries ORDER BY seq")]
        assert states[:2] == [1, 1]
    finally:
        world.end()


def test_an_expiry_that_had_to_wait_knows_what_was_sent_meanwhile() -> None:
    """A lost connection whose messages cannot be marked yet takes none of them from its count: what was sent does not
    expire as never sent (P2, PROTOCOL.md C3)."""
    world = World(random.Random(1), delivery=DeliveryConfig(), caps={})
    try:
        world.connect(8)  # the first welcome has to be written down before anything is sent
        settle_down(world)
        world.cut(read_on=False)
        settle_down(world)
        world.send(3, 0, ttl=5.0)
        settle_down(world)
        world.wait(6.0)
        world.lock()
        world.expire()
        settle_down(world)
        world.connect(8)
        settle_down(world, moods=("takes", "takes"))
        world.cut(read_on=False)
        settle_down(world)
        world.finish()
    finally:
        world.end()


def settle_down(world: World, moods: tuple[Mood, ...] = ()) -> None:
    """Let everything move that can without time; the answers to the last of `moods` are left unread."""
    left = list(moods)
    for _ in range(200):
        connection = world.connection
        if world.disk.jobs:
            world.work()
        elif connection is not None and connection.socket.to_client and (left or not moods):
            world.read()
        elif connection is not None and connection.socket.to_server and not connection.closed:
            world.serve(left.pop(0) if left else "takes")
