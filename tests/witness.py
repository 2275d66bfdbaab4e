"""What a device and its server may never show, judged after every step from both databases and from the wire."""

from __future__ import annotations

import sqlite3
from collections import Counter

from simulation import Violation
from support import totals
from traffic import Traffic

from durablews.receiver.exchange import Outcome
from durablews.wire.frames import Ack, Codec, Msgs, Nack

__all__ = ["Witness"]


class Witness:
    """Knows what became of every message.

    Messages are numbers, and their payloads say which. `device` and `server` are connections of its own.
    """

    def __init__(self, server: sqlite3.Connection) -> None:
        self.server = server
        self.device: sqlite3.Connection
        #: Sequence -> message, as seen in the outbox; what was accepted, and what was refused by the outbox itself.
        self.names: dict[int, int] = {}
        self.accepted: set[int] = set()
        self.turned_away: set[int] = set()
        #: Messages that section 5 or C3 excuses: perhaps twice; not known to a restored backup.
        self.may_repeat: set[int] = set()
        self.erased: set[int] = set()
        #: What the server thinks of some messages: refuses them, closes with a code for them, or did so once.
        self.refused: set[int] = set()
        self.poison: dict[int, int] = {}
        self.poisoned: set[int] = set()
        #: Sequences whose ack this process of the client has read.
        self.answered: set[int] = set()
        #: Whether a backup came back, ever.
        self.restored = False
        self._stream: str | None = None
        self._sent: dict[tuple[str, int], tuple[int, int]] = {}
        self._applied: Counter[int] = Counter()
        self._top: dict[tuple[str, int], int] = {}
        self._seen_applied = 0

    # -- the outbox

    def begin(self, device: sqlite3.Connection) -> None:
        """Look at an outbox that was just opened."""
        self.device = device
        self.answered = set()
        self._rows: dict[int, int] = self._read()
        self._look_at_stream()
        self._enqueued = totals(device)["enqueued"]
        self._departed = self._newest_departure()
        self._version = -1

    def _read(self) -> dict[int, int]:
        rows = {seq: int(payload) for seq, payload in self.device.execute("SELECT seq, payload FROM durablews_entries")}
        self.names |= rows
        return rows

    def _look_at_stream(self) -> None:
        """Under a new stream what waits may be applied twice (PROTOCOL.md section 5); it must have a reason."""
        stream = self.device.execute("SELECT stream FROM durablews_meta").fetchone()[0]
        if self._stream not in (None, stream):
            if not self.restored:
                raise Violation("P4: a new stream without a reason")
            self.may_repeat |= set(self._rows.values())
        self._stream = stream

    def _newest_departure(self) -> int:
        return int(self.device.execute("SELECT coalesce(max(id), 0) FROM durablews_departed").fetchone()[0])

    def look(self, *, foreign: bool = False, revived: bool = False) -> None:
        """Judge what a transaction did to the outbox. `foreign`: it was not one of the drainer's own."""
        version = self.device.execute("PRAGMA data_version").fetchone()[0]
        if version == self._version and not foreign:
            return
        self._version = version
        self._look_at_stream()
        before, self._rows = self._rows, self._read()
        left = self.device.execute(
            "SELECT seq, reason, unknown FROM durablews_departed WHERE id > ?", (self._departed,)
        ).fetchall()
        self._departed = self._newest_departure()
        unseen = before.keys() - self._rows.keys() - self.answered - {seq for seq, _, _ in left}
        if unseen:
            raise Violation(f"P2: {sorted(unseen)} left without a reason")
        for seq, reason, unknown in left:
            number = self.names.get(seq)
            if reason == "expired" and not unknown and self._applied[number or 0] and number not in self.may_repeat:
                raise Violation(f"P2: message {number} was applied, and is reported as expired before it was sent")
        self._count(revived=revived)

    def _count(self, *, revived: bool) -> None:
        kept = totals(self.device)
        gone = sum(kept[name] for name in ("acked", "expired", "expired_unanswered", "dropped", "dropped_unanswered"))
        if kept["enqueued"] != kept["messages"] + kept["dead_messages"] + kept["dead_dropped"] + gone:
            raise Violation(f"P2: departures were not counted: {kept}")
        grew = kept["enqueued"] > self._enqueued
        self._enqueued = kept["enqueued"]
        if grew and not revived:
            most, size = self.device.execute("SELECT max_messages, max_bytes FROM durablews_caps").fetchone()
            if kept["messages"] > most or kept["bytes"] > size:
                raise Violation(f"P6: {kept['messages']} messages of {kept['bytes']} bytes wait, {most} may")

    def took(self, number: int, seq: int | None) -> None:
        """Take note that `send` has returned, with a sequence unless the policy dropped the message."""
        if seq is None:
            return
        self.accepted.add(number)
        self.names.setdefault(seq, number)
        if self.names[seq] != number:
            raise Violation(f"P4: {seq} was given to {self.names[seq]} and to {number}")
        gone = "SELECT 1 FROM durablews_departed WHERE seq = ?"
        if seq not in self._rows and seq not in self.answered and not self.device.execute(gone, (seq,)).fetchone():
            raise Violation(f"P1: send returned, and message {number} is not in the outbox")

    # -- the wire

    def sent(self, traffic: Traffic, stream: str, frame: Msgs) -> None:
        """Judge a frame of messages as the client hands it over."""
        traffic.send(frame)
        seqs = {item.seq for item in frame.items}
        for item in frame.items:
            number = int(item.payload)
            if self._sent.setdefault((stream, item.seq), (frame.priority, number)) != (frame.priority, number):
                raise Violation(f"P4: {item.seq} was {self._sent[stream, item.seq]} and is message {number} now")
        waiting = self.device.execute(
            "SELECT seq FROM durablews_entries WHERE priority = ? AND ack_state < 2 AND seq <= ?",
            (frame.priority, max(seqs)),
        )
        passed = {seq for (seq,) in waiting} - seqs - self.answered - set(traffic.unanswered[frame.priority])
        if passed:
            raise Violation(f"P3, C6, C8: {sorted(seqs)} were sent, and {sorted(passed)} before them were not")

    def read(self, traffic: Traffic, codec: Codec, data: str | bytes) -> None:
        """Take note of an answer that the client reads."""
        self.answered.update(traffic.read(codec.decode_server(data)))

    # -- the server

    def number(self, stream: str, priority: int) -> int:
        """Return the highest sequence that the server has committed."""
        row = self.server.execute(
            "SELECT seq FROM durablews_seen WHERE stream = ? AND priority = ?", (stream, priority)
        ).fetchone()
        return int(row[0]) if row else 0

    def applied(self) -> int:
        """Judge what the server has applied since the last look; return how many messages that were."""
        rows = self.server.execute(
            "SELECT id, stream, priority, seq, message FROM applied WHERE id > ?", (self._seen_applied,)
        ).fetchall()
        for row, stream, priority, seq, number in rows:
            self._seen_applied = row
            self._applied[number] += 1
            if self._applied[number] > 1 and number not in self.may_repeat:
                raise Violation(f"P5: message {number} was applied twice")
            if seq <= self._top.get((stream, priority), 0):
                raise Violation(f"P3: message {number} was applied out of order")
            self._top[stream, priority] = seq
            if number in self.refused:
                raise Violation(f"S3: message {number} was refused, and what was written for it stays")
            if number in self.turned_away:
                raise Violation(f"P7: message {number} was applied, and its sender was told that it was not stored")
        return len(rows)

    def answers(self, stream: str, frame: object, outcome: Outcome, codec: Codec, before: int) -> None:
        """Judge what the server answers to a frame; `before`: the number as it was."""
        if outcome.close is not None and outcome.close.code in (1012, 4400):
            raise Violation(f"S3: the server closed with {outcome.close}: {outcome.error}")
        if not isinstance(frame, Msgs):
            return
        number = self.number(stream, frame.priority)
        fresh = self.applied()
        if number < before:
            raise Violation(f"S2: the number went from {before} to {number}")
        if not outcome.frames and outcome.close is None and (outcome.error or frame.items[0].seq <= before):
            raise Violation(f"S4: no answer to {frame}")
        for answer in map(codec.decode_server, outcome.frames):
            if isinstance(answer, Ack) and answer.s > number:
                raise Violation(f"S1: acked up to {answer.s}, applied up to {number}")
            if isinstance(answer, Nack) and answer.s <= number:
                raise Violation(f"S2: {answer.s} is refused, and was applied")
        if fresh and frame.after is not None and frame.after > before:
            raise Violation(f"S3: applied {frame}, and something before it was not taken")

    # -- the end

    def verdict(self) -> None:
        """Judge what is left when nothing waits any more."""
        self.applied()
        dead = self.device.execute("SELECT payload, refusal FROM durablews_entries WHERE ack_state = 2").fetchall()
        departed = self.device.execute("SELECT seq FROM durablews_departed WHERE reason IN ('expired', 'dropped')")
        gone = {self.names[seq] for (seq,) in departed if seq in self.names}
        lost = self.accepted - self.erased - self._applied.keys() - {int(payload) for payload, _ in dead} - gone
        if lost:
            raise Violation(f"P5: {sorted(lost)} were accepted and did not arrive")
        for payload, refusal in dead:
            if ('"poison"' in refusal or '"too_large"' in refusal) and int(payload) not in self.poisoned:
                raise Violation(f"P2: message {payload!r} was blamed for what another one did: {refusal}")
