"""What happens in the demo, from the first process to the verdict.

Whatever breaks, breaks while messages wait that the server has applied and the agent has no answer to: these come
again, and only the server's memory keeps them from being applied twice. Every figure printed here was measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from durablews.cli.evidence import Item, Verdict, applied_up_to, judge, read_inbox
from durablews.cli.formats import count
from durablews.cli.theatre import Actor, Relay, Timeline
from durablews.inspection import stream_entries, summarize
from durablews.snapshot import Snapshot

if TYPE_CHECKING:
    import asyncio

__all__ = ["Failed", "Play", "complaint"]

#: So many must wait when something breaks, and for as long as it is broken.
_WAITING = 1000
_NORMAL, _HIGH = 0, 1
# One in each break that the agent lives through.
_ALARMS = 3
# Seconds: between looks at the outbox; for which answers are lost before a break; a break lasts; for which a dead
# process is mourned. Long enough to be seen, short enough not to bore.
_LOOK, _MUTE, _OUTAGE, _MOURNING = 0.08, 0.12, 0.9, 0.5
# Seconds into its next transaction at which the agent is killed: with luck that is stored, and it could not say so.
_STORING = 0.006
# Bytes that a message needs on the wire besides its line, about.
_FRAMING = 45
# So many lines the agent has in its hands when it is killed. No more than its window can be in doubt.
_IN_ITS_HANDS, _MOST_DOUBTFUL = 600, 4096


class Failed(Exception):
    """The play cannot go on; the text says why."""


class Play:
    """One performance.

    Args:
        folder: for the outbox, the inbox and the logs.
        lines: what the agent is to send.
        rate: how many messages a second the link lets through, about.
    """

    def __init__(self, folder: Path, lines: Sequence[bytes], timeline: Timeline, *, rate: float) -> None:
        self._folder = folder
        self._outbox, self._inbox = str(folder / "agent.db"), str(folder / "inbox.db")
        self._lines = iter(lines)
        self._more = True
        self._timeline = timeline
        self._rate = rate
        self._of = len(lines)
        self._bytes = sum(map(len, lines)) / len(lines) + _FRAMING
        # What is acknowledged between one break and the next, so that enough is left for the last stretch.
        self._act = min(0.18 * self._of, (self._of - 3.2 * _WAITING) / 4)
        # How many may wait while all is well; half as many more may gather while it is not.
        self._usual = self._room = max(1600, len(lines) // 5)
        self._sent: list[Item] = []
        self._stored = 0  # of these, as far as the agent has said
        self._server: Actor | None = None
        self._agent: Actor | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._actors: dict[str, Actor] = {}  # the last of each part
        self._flows = True
        self._seen: Snapshot | None = None
        self._again = 0

    async def perform(self) -> bool:
        """Play to the end and return whether the promise was kept.

        Raises:
            Failed: something ended that should not, or could not begin.
        """
        import asyncio

        story = asyncio.create_task(self._story())
        tasks = [story, asyncio.create_task(self._watch()), asyncio.create_task(self._feed())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            return story.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for actor in self._actors.values():
                await actor.kill()
            if self._hearing is not None:
                await self._hearing

    def explain(self, what: str) -> None:
        """Say on standard error what went wrong, with the last words of both processes."""
        self._timeline.clear()
        print(f"durablews demo: {what}", file=sys.stderr)
        for actor in self._actors.values():
            for line in actor.last_words():
                print(f"  {actor.name}: {line}", file=sys.stderr)

    async def _story(self) -> bool:
        tell = self._timeline.event
        self._server = await self._start("server", "0", self._inbox)
        tell("server started", f"process {self._server.process.pid}, {self._server.greeting}", "bold")
        port = self._server.greeting.rpartition(":")[2]
        async with Relay(int(port), rate=self._rate * self._bytes) as relay:
            agent = await self._start_agent(relay)
            tell("agent started", f"process {agent.process.pid}, behind a link that can be cut", "bold")
            await self._cut_the_link(relay, act=1)
            await self._kill_the_agent(relay, act=2)
            await self._cut_the_link(relay, act=3)
            await self._kill_the_server(relay, act=4, port=port)
            await self._until(lambda: not self._more and self._stored == len(self._sent) and not self._pending())
            tell("all delivered", f"{count(len(self._sent))} messages acknowledged, nothing waits", "green")
            await self._leave()
        return await self._verdict()

    async def _cut_the_link(self, relay: Relay, *, act: int) -> None:
        await self._ready(relay, act)
        relay.cut()
        await self._report("LINK CUT", "connections reset and refused")
        await self._outage("the link is down")
        relay.mend()
        self._timeline.event("link mended", f"{count(self._pending())} waiting", "green")
        await self._flowing()

    async def _kill_the_agent(self, relay: Relay, *, act: int) -> None:
        await self._ready(relay, act)
        agent, hearing = self._agent, self._hearing
        assert agent is not None
        assert hearing is not None
        # It dies while it stores: it has said of the first of these that they are safe, and not of the others.
        before = len(self._sent)
        self._hand(self._next(_IN_ITS_HANDS))
        while self._stored <= before:
            await self._sleep(0.001)
        await self._sleep(_STORING)
        self._agent = None
        await agent.kill()
        await hearing
        await self._report("AGENT KILLED", "kill -9")
        unsaid = self._sent[self._stored :]
        kept = self._snapshot().enqueued - self._stored
        if unsaid:
            self._timeline.more(
                f"{count(len(unsaid))} more lines in its hands unconfirmed, {count(kept)} of them stored"
            )
        await self._sleep(_MOURNING)
        agent = await self._start_agent(relay)
        again = f"; those {count(len(unsaid))} sent again with the same ids" if unsaid else ""
        self._timeline.event("agent started", f"process {agent.process.pid}{again}", "green")
        self._write(unsaid)
        await self._flowing()

    async def _kill_the_server(self, relay: Relay, *, act: int, port: str) -> None:
        await self._ready(relay, act)
        server, self._server = self._server, None
        assert server is not None
        await server.kill()
        await self._report("SERVER KILLED", "kill -9")
        await self._outage("the server is down")
        self._server = await self._start("server", port, self._inbox)
        text = f"process {self._server.process.pid}; {count(self._pending())} waiting"
        self._timeline.event("server started", text, "green")
        await self._flowing()

    async def _ready(self, relay: Relay, act: int) -> None:
        """Wait for the act's moment: enough delivered, enough waiting, and some of it applied but not answered."""
        import asyncio

        def now() -> bool:
            if self._acked() < act * self._act or not self._flows:
                return False
            if not self._more and self._stored == len(self._sent):
                self._check_waiting("all lines were sent")
            return self._pending() >= _WAITING

        await self._until(now)
        relay.mute()
        await self._sleep(_MUTE)
        while not await asyncio.to_thread(self._overlap, await asyncio.to_thread(applied_up_to, self._inbox)):
            await self._sleep(_LOOK)

    async def _report(self, what: str, how: str) -> None:
        """Say that something broke, how much waits, and what of it will be delivered twice."""
        self._flows = False
        await self._look()
        self._check_waiting(what)
        self._timeline.event(what, f"{how}; {count(self._pending())} waiting", "bold", "red")
        doubtful = await self._doubtful()
        self._again += doubtful
        self._timeline.more(f"{count(doubtful)} were applied, their answers lost: they come again")

    async def _outage(self, why: str) -> None:
        """Let more gather, and something urgent among it, for as long as the break lasts."""
        self._room = self._usual * 3 // 2
        await self._sleep(_OUTAGE / 2)
        self._timeline.event("urgent", f"an alarm is sent, behind {count(self._pending())} that wait", "yellow")
        self._hand([(_HIGH, f"ALARM: {why}".encode())])
        await self._sleep(_OUTAGE / 2)
        await self._look()
        self._check_waiting(why)
        self._room = self._usual

    def _check_waiting(self, when: str) -> None:
        if self._pending() < _WAITING:
            raise Failed(f"only {self._pending()} messages waited ({when}); a slower --pace lets more gather")

    async def _doubtful(self) -> int:
        """Return how many wait that the server has applied. Once the link is gone, that is what it will see again."""
        import asyncio

        before, applied = None, await asyncio.to_thread(applied_up_to, self._inbox)
        while applied != before:  # what had reached the server may still be on its way into its file
            await self._sleep(_MUTE)
            before, applied = applied, await asyncio.to_thread(applied_up_to, self._inbox)
        return await asyncio.to_thread(self._overlap, applied)

    def _overlap(self, applied: dict[int, int]) -> int:
        return sum(
            entry.seq <= highest
            for priority, highest in applied.items()
            for entry in stream_entries(self._outbox, priority=priority, limit=_MOST_DOUBTFUL)
        )

    async def _flowing(self) -> None:
        """Wait until messages are acknowledged again."""
        before = self._acked()
        await self._until(lambda: self._acked() > before)
        self._flows = True

    async def _start(self, part: str, *words: str) -> Actor:
        actor = await Actor.start(self._folder, part, *words)
        self._actors[part] = actor
        if not actor.greeting:
            raise Failed(f"the {part} did not start")
        return actor

    async def _start_agent(self, relay: Relay) -> Actor:
        import asyncio

        self._agent = agent = await self._start("agent", relay.url, self._outbox)
        self._hearing = asyncio.create_task(self._hear(agent))
        return agent

    async def _hear(self, agent: Actor) -> None:
        while said := await agent.hear():
            self._stored = int(said)

    async def _feed(self) -> None:
        """Hand lines to the agent as long as there are any, so that some always wait."""
        while True:
            if self._agent is not None and self._seen is not None and len(self._sent) - self._acked() < self._room:
                self._hand(self._next(20 + int(self._rate * _LOOK)))
            await self._sleep(_LOOK / 2)

    def _next(self, number: int) -> list[tuple[int, bytes]]:
        """Return the next lines of the source, each with its priority."""
        lines = [(_NORMAL, line) for line in islice(self._lines, number)]
        self._more = len(lines) == number
        return lines

    def _hand(self, lines: Sequence[tuple[int, bytes]]) -> None:
        items = [
            Item(str(number), priority, line)
            for number, (priority, line) in enumerate(lines, start=len(self._sent) + 1)
        ]
        self._sent += items
        self._write(items)

    def _write(self, items: Sequence[Item]) -> None:
        if self._agent is not None:
            data = b"".join(b"%s %d %s\n" % (item.label.encode(), item.priority, item.payload) for item in items)
            self._agent.tell(data)

    async def _watch(self) -> None:
        """Look at the outbox all the time, as anybody may, and see that both processes live."""
        while True:
            for actor in (self._server, self._agent):
                if actor is not None and not actor.alive:
                    raise Failed(f"the {actor.name} ended with exit code {actor.process.returncode}")
            if self._agent is not None:
                seen = await self._look()
                self._timeline.backlog(
                    seen.pending, self._usual * 3 // 2, seen.departed.acked, self._of + _ALARMS, flows=self._flows
                )
            await self._sleep(_LOOK)

    async def _look(self) -> Snapshot:
        import asyncio

        self._seen = await asyncio.to_thread(summarize, self._outbox)
        return self._seen

    def _snapshot(self) -> Snapshot:
        assert self._seen is not None
        return self._seen

    def _pending(self) -> int:
        return self._snapshot().pending

    def _acked(self) -> int:
        return self._seen.departed.acked if self._seen is not None else 0

    async def _until(self, true: Callable[[], bool]) -> None:
        while self._seen is None or not true():
            await self._sleep(_LOOK / 4)

    async def _sleep(self, seconds: float) -> None:
        import asyncio

        await asyncio.sleep(seconds)

    async def _leave(self) -> None:
        """Let both processes end as they do when nobody kills them."""
        agent, server, self._agent, self._server = self._agent, self._server, None, None
        assert agent is not None
        assert server is not None
        for actor, code in ((agent, await agent.leave()), (server, await server.leave(terminate=True))):
            if code:
                raise Failed(f"the {actor.name} ended with exit code {code}")

    async def _verdict(self) -> bool:
        """Compare what was sent with what is in the server's file, and print what came of it."""
        import asyncio

        arrived = await asyncio.to_thread(read_inbox, self._inbox)
        verdict = judge(self._sent, arrived)
        self._timeline.clear()
        if verdict.overtaken:
            text = f"{_ALARMS} alarms went first, past {count(verdict.overtaken)} lines that waited"
            self._timeline.event("overtaken", text, "yellow")
        if verdict.good:
            self._timeline.event("compared", "byte for byte the same, in the same order", "bold", "green")
        else:
            self._timeline.event("compared", f"NOT THE SAME: {complaint(verdict)}", "bold", "red")
        self._timeline.figures(
            {
                "sent": count(verdict.sent),
                "applied": count(verdict.applied),
                "redelivered": count(self._again),
                "lost": count(verdict.lost),
                "twice": count(verdict.twice),
                "seconds": f"{self._timeline.elapsed:.1f}",
            },
            good=verdict.good,
        )
        return verdict.good


def complaint(verdict: Verdict) -> str:
    """Return what is wrong, as a sentence's end."""
    found = (
        (verdict.lost, "lost"),
        (verdict.twice, "applied twice"),
        (verdict.altered, "with other bytes"),
        (verdict.unknown, "never sent"),
        (verdict.swapped, "out of order"),
    )
    return ", ".join(f"{count(number)} {what}" for number, what in found if number)
