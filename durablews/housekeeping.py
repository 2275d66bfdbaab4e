"""What goes on beside a link, connected or not: other processes' messages, age, the note for `durablews inspect`, and
the signs that the network or the machine is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from durablews.database import wal_stamp
from durablews.draining import DrainedOutbox, LinkNote
from durablews.errors import OutboxError
from durablews.events import EventLog, LogHeld, MessagesDropped, MessagesExpired
from durablews.network import NetworkWatcher
from durablews.outbox import Counts

__all__ = ["Housekeeping"]

_log = logging.getLogger("durablews.housekeeping")

# How often the log of the outbox is looked at for what other processes enqueued: they wait for 100 ms at most.
_WATCH_INTERVAL = 0.08
# How often age, counts and the link's note are seen to.
_UPKEEP_INTERVAL = 1.0
_NOTE_INTERVAL = 5.0
# How often it is looked for free pages to be given back and for a log that has grown, and the pause between two steps
# of giving back: whoever wants the outbox meanwhile has it for nine tenths of the time.
_SPACE_INTERVAL, _SPACE_PAUSE = 5.0, 0.05
# The clock that counts suspended time has got ahead of the other by so many seconds: the machine slept.
_SLEPT = 1.0
# The counts of what a cap has cost, and the words for them.
_DROPS = {"dropped": "oldest", "dropped_unanswered": "unanswered", "dropped_new": "new", "dead_dropped": "dead"}


class Housekeeping:
    """The watchers of one client.

    Args:
        outbox: open, and ours to drain.
        events: where to report what left.
        note: how the link stands now.
        on_stored: called when the outbox may hold more than before.
        on_moved: called when something has left, or may have.
        on_return: called when the network has changed, or the machine has woken from sleep.
    """

    def __init__(
        self,
        outbox: DrainedOutbox,
        events: EventLog,
        *,
        note: Callable[[], LinkNote],
        on_stored: Callable[[], None],
        on_moved: Callable[[], None],
        on_return: Callable[[], None],
    ) -> None:
        self._outbox = outbox
        self._events = events
        self._note = note
        self._on_stored = on_stored
        self._on_moved = on_moved
        self._on_return = on_return
        self._note_due = asyncio.Event()
        self._counts: Counts | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.network = NetworkWatcher(self._network_changed)
        #: What ended a watcher, as a sentence; None while all of them run.
        self.defect: str | None = None
        #: Why the log takes more and more of the disk, as a sentence; None while it does not.
        self.log_held: str | None = None
        self._held_bytes = 0
        #: That the file was removed or replaced, as a sentence: nothing can be stored until it is opened again.
        self.misplaced: str | None = None

    def start(self) -> None:
        """Start every watcher."""
        watchers = {
            "watch": self._watch(),
            "upkeep": self._keep_up(),
            "note": self._note_changes(),
            "space": self._keep_small(),
        }
        for name, watcher in watchers.items():
            task = asyncio.create_task(watcher, name=f"durablews {name}")
            task.add_done_callback(self._ended)
            self._tasks.append(task)
        self.network.start()

    async def stop(self) -> None:
        """Stop all of them."""
        self.network.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def link_changed(self) -> None:
        """Let the note be written soon."""
        self._note_due.set()

    async def write_note(self) -> None:
        """Write how the link stands, for `durablews inspect`."""
        try:
            await self._outbox.note_link(self._note())
        except OutboxError as exc:
            self._outbox.storage.trouble = exc.what

    def _ended(self, watcher: asyncio.Task[None]) -> None:
        """Make a defect visible that ended a watcher: it must not stop in silence."""
        if not watcher.cancelled() and (defect := watcher.exception()) is not None:
            _log.error("a defect in durablews ended its %s", watcher.get_name(), exc_info=defect)
            self.defect = f"a defect in durablews ended its {watcher.get_name()}: {defect!r}"

    def _network_changed(self) -> None:
        _log.info("the network has changed")
        self._on_return()

    async def _watch(self) -> None:
        """Notice within 100 ms what other processes commit, by the log's size or time, and that the machine slept.

        A stat in the loop costs 2 µs; asking SQLite on its thread a hundred times as much. A file system whose times
        are too coarse is covered by the upkeep's look once a second.
        """
        seen, asleep = wal_stamp(self._outbox.path), self._asleep()
        while True:
            await asyncio.sleep(_WATCH_INTERVAL)
            stamp = wal_stamp(self._outbox.path)
            if stamp != seen:
                seen = stamp
                self._on_stored()
            before, asleep = asleep, self._asleep()
            if asleep - before > _SLEPT:
                _log.info("the machine slept for %.0f s", asleep - before)
                self._on_return()

    def _asleep(self) -> float:
        """Return the seconds that the machine has slept since its boot, plus a constant."""
        return self._outbox.clock.boot() / 1000 - self._outbox.clock.monotonic()

    async def _keep_up(self) -> None:
        """Expire what is too old, report what left, and look for foreign messages that the watch cannot see."""
        while True:
            self._look_at_file()
            try:
                await self._outbox.restore_reserve()
                if self._counts is None:  # before the first look takes anything, so that this is reported too
                    self._counts = await self._outbox.counts()
                counts = await self._outbox.expire()
            except OutboxError as exc:
                self._outbox.storage.trouble = exc.what
            else:
                self._report_departures(self._counts, counts)
                self._counts = counts
                if counts.pending:
                    self._on_stored()
                else:
                    self._on_moved()
            await asyncio.sleep(_UPKEEP_INTERVAL)

    def _look_at_file(self) -> None:
        before = self.misplaced
        try:
            self._outbox.storage.check_file()
            self.misplaced = None
        except OutboxError as exc:
            self.misplaced = exc.what
        if self.misplaced != before:
            _log.log(logging.ERROR if self.misplaced else logging.INFO, "%s", self.misplaced or "the file is back")

    async def _keep_small(self) -> None:
        """Let the file shrink again after a backlog has gone, and the log after a reader has."""
        while True:
            more = False
            try:
                self._report_log(await self._outbox.shorten_log())
                more = await self._outbox.give_back()
            except OutboxError as exc:
                self._outbox.storage.trouble = exc.what
            await asyncio.sleep(_SPACE_PAUSE if more else _SPACE_INTERVAL)

    def _report_log(self, held: int) -> None:
        """Make visible that another program keeps the log from being emptied, and how much it takes."""
        if held == self._held_bytes or 0 < held < 2 * self._held_bytes:
            return
        self._held_bytes = held
        self.log_held = None
        if held:
            self.log_held = (
                f"another program keeps a transaction open on the outbox: its log has grown to {held / 1e6:.0f} MB,"
                " and grows until that program ends it"
            )
        self._events.put(LogHeld(held))
        self.link_changed()

    def _report_departures(self, before: Counts, now: Counts) -> None:
        left: list[MessagesExpired | MessagesDropped] = []
        for name, unanswered in (("expired", False), ("expired_unanswered", True)):
            if (messages := getattr(now, name) - getattr(before, name)) > 0:
                left.append(MessagesExpired(messages, unanswered))
        for name, how in _DROPS.items():
            if (messages := getattr(now, name) - getattr(before, name)) > 0:
                left.append(MessagesDropped(messages, how))
        for event in left:
            self._events.put(event)
        if left or now.refused > before.refused:
            self._outbox.look_again()
            self._on_moved()

    async def _note_changes(self) -> None:
        """Write how the link stands when that changes, at most every 5 s."""
        while True:
            await self._note_due.wait()
            self._note_due.clear()
            await self.write_note()
            await asyncio.sleep(_NOTE_INTERVAL)
