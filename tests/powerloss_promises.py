"""What an outbox was promised to hold at some moment of a recorded life, and what is wrong with one that does not."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from powerloss_life import tag_of

__all__ = ["Ledger", "broken_promises"]


@dataclass
class Ledger:
    """What the agent was told, and what the server has seen, up to some moment. Messages are named by their tags."""

    notes: int = 0
    created: bool = False
    begun: set[int] = field(default_factory=set)
    sent: dict[int, tuple[str, int | None]] = field(default_factory=dict)
    received: dict[tuple[str, int], int] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    acked: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)

    def note(self, mark: bytes) -> None:
        """Read one mark of tests/powerloss_life.py."""
        what, *facts = json.loads(mark)
        self.notes += 1
        if what == "created":
            self.created = True
        elif what == "sent":
            self.sent[facts[0]] = (facts[1], facts[2])
        elif what == "received":
            self.received[facts[1], facts[2]] = facts[0]
            self.seen.add(facts[0])
        else:
            {"begun": self.begun, "acked": self.acked, "refused": self.refused}[what].add(facts[0])

    def copy(self) -> Ledger:
        """Return what was promised until now."""
        return deepcopy(self)


def broken_promises(path: Path, ledger: Ledger) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the outbox at `path`: a word for the promise, and a sentence."""
    if not path.exists():
        if ledger.created:
            yield "lost", "the outbox itself is gone"
        return
    try:
        # One who only reads would not see what the log holds.
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            yield from _broken_promises(connection, ledger)
        finally:
            connection.close()
    except sqlite3.DatabaseError as exc:
        yield "corrupt", str(exc)


def _broken_promises(connection: sqlite3.Connection, ledger: Ledger) -> Iterator[tuple[str, str]]:
    (said,) = connection.execute("PRAGMA integrity_check").fetchone()
    if said != "ok":
        yield "corrupt", said
    (stream,) = connection.execute("SELECT stream FROM durablews_meta").fetchone()
    found: dict[int, int] = {}  # tag -> ack_state
    counts = Counter[str]()
    for seq, ack_state, size, checksum, payload in connection.execute(
        "SELECT seq, ack_state, bytes, checksum, payload FROM durablews_entries"
    ):
        try:
            tag = tag_of(payload)
            intact = checksum == zlib.crc32(payload if isinstance(payload, bytes) else payload.encode())
        except (ValueError, AttributeError, TypeError) as exc:
            yield "corrupt", f"entry {seq} says what nobody sent: {exc}"
            continue
        if not intact or tag in found or tag not in ledger.begun:
            yield "corrupt", f"entry {seq}, message {tag}: its checksum differs, or it is there twice or was never sent"
        kind = "dead_" if ack_state == 2 else ""
        counts.update({f"{kind}messages": 1, f"{kind}bytes": size})
        found[tag] = ack_state
        if tag in ledger.acked:
            yield "resurrected", f"message {tag}, whose deletion was known, is back as {seq}"
        if ledger.received.get((stream, seq), tag) != tag:
            yield "reused", f"sequence {seq} is message {tag}; the server knows it as {ledger.received[stream, seq]}"
        if tag in ledger.sent and ledger.sent[tag][1] not in (seq, None):
            yield "reused", f"message {tag} was given {ledger.sent[tag][1]} and has {seq}"
    for tag in ledger.sent.keys() - found.keys() - ledger.seen:
        yield "lost", f"message {tag} was stored and is gone"
    for tag in ledger.refused:
        if found.get(tag) != 2:
            yield "lost", f"message {tag} is no dead letter any more"
    given = max((seq for at, seq in ledger.received if at == stream), default=0)
    last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'durablews_entries'").fetchone()
    if given > (last[0] if last else 0):
        yield "reused", f"the server knows {given}, and the next one is given what follows {last}"
    yield from _miscounted(connection, counts)


def _miscounted(connection: sqlite3.Connection, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    cursor = connection.execute("SELECT * FROM durablews_totals")
    totals = dict(zip([name for name, *_ in cursor.description], cursor.fetchone(), strict=True))
    wrong = {name: totals[name] for name in ("messages", "bytes", "dead_messages", "dead_bytes")}
    if wrong != {name: counts[name] for name in wrong}:
        yield "miscounted", f"{wrong} stand for {dict(counts)}"
    if totals["enqueued"] != totals["messages"] + totals["acked"] + totals["refused"]:
        yield "miscounted", f"of {totals['enqueued']} messages some left uncounted: {totals}"
