"""Deliberately broken builds of durablews: each must be found by the harness that claims to prove the opposite.

A build is a function that patches the modules of the process in which it is called, before anything is forked.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from durablews import connecting, database, entries, identity, messages, outbox, schema
from durablews.committing import Committer
from durablews.delivery.actions import Settle
from durablews.delivery.delivery import Delivery
from durablews.link import Link
from durablews.messages import Run
from durablews.receiver.exchange import Exchange, Opening, Outcome
from durablews.receiver.session import Session
from durablews.work import Work, resolve_all

__all__ = ["BUILDS"]


def answers_early() -> None:
    """A `send` that returns before the commit."""
    genuine = Committer._write

    def write(
        self: Committer,
        connection: sqlite3.Connection,
        work: Work,
        requests: Sequence[Any],
        settle_runs: Callable[[sqlite3.Connection, Sequence[Run]], None],
    ) -> Any:
        def enqueue(*args: Any, **options: Any) -> Any:
            results = enqueued(*args, **options)
            work.requests[0][1].get_loop().call_soon_threadsafe(resolve_all, work.requests, results)
            time.sleep(0.005)  # the answer is on its way, the commit is not: a kill must be able to come between them
            return results

        enqueued, entries.enqueue = entries.enqueue, enqueue
        try:
            return genuine(self, connection, work, requests, settle_runs)
        finally:
            entries.enqueue = enqueued

    Committer._write = write  # type: ignore[method-assign]


class _Uncommitting:
    """A connection that leaves its transaction open."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, *parameters: Any) -> Any:
        return None if sql == "COMMIT" else self._connection.execute(sql, *parameters)


def acks_early() -> None:
    """A receiver that acks before it commits: the commit comes with the next frame."""
    finish, begin, greet = Exchange.finish, Exchange.begin, Exchange.greet

    def late_finish(self: Exchange, connection: Any, opening: Opening, refused: Any = None, **options: Any) -> Outcome:
        return finish(self, _Uncommitting(connection), opening, refused, **options)  # type: ignore[arg-type]

    def committed_first(genuine: Any) -> Any:
        def job(self: Exchange, connection: sqlite3.Connection, what: Any) -> Any:
            if connection.in_transaction:
                connection.execute("COMMIT")
            return genuine(self, connection, what)

        return job

    Exchange.finish = late_finish  # type: ignore[method-assign]
    Exchange.begin = committed_first(begin)  # type: ignore[method-assign]
    Exchange.greet = committed_first(greet)  # type: ignore[method-assign]


def deletes_on_sending() -> None:
    """An agent that settles what it has handed to a socket."""
    genuine = Delivery.frame_to_send

    def careless(self: Delivery, now: float) -> bytes | None:
        frame = genuine(self, now)
        if self.sent is not None:
            self._actions.append(Settle(self.sent))
        return frame

    Delivery.frame_to_send = careless  # type: ignore[method-assign]


def reuses_sequences() -> None:
    """An agent that numbers on from what still waits in its outbox, as a table without AUTOINCREMENT does."""
    genuine = identity.take_over

    def take_over(connection: sqlite3.Connection, path: str, **options: Any) -> str:
        stream = genuine(connection, path, **options)
        connection.execute("UPDATE sqlite_sequence SET seq = (SELECT coalesce(max(seq), 0) FROM durablews_entries)")
        return stream

    identity.take_over = take_over


def forgets_to_raise() -> None:
    """An agent that does not raise the sequence when it opens."""
    identity._set_last_sequence = lambda connection, last: None


def applies_repeats() -> None:
    """A receiver that does not know what it has applied."""
    Session.judge = lambda self, frame, number: frame.items  # type: ignore[method-assign]


def sends_the_lowest_first() -> None:
    """An agent that drains the lowest priority first."""
    genuine = entries.peek

    def peek(connection: sqlite3.Connection, **options: Any) -> Any:
        row = connection.execute("SELECT min(priority) FROM durablews_entries WHERE ack_state < 2").fetchone()
        others = () if row[0] is None else range(row[0] + 1, 101)
        return genuine(connection, **{**options, "closed": [*options["closed"], *others], "above": -101})

    entries.peek = peek


def migrates_piecemeal() -> None:
    """An agent whose migrations are committed statement by statement."""

    def apply_migrations(connection: sqlite3.Connection, path: str) -> int:
        present = schema.schema_of(connection)
        for number, script in schema.migrations():
            if number > present:
                for statement in schema.split_statements(script):
                    connection.execute(statement)
                    if present:  # a new file is still made as a whole
                        connection.execute("COMMIT")
                        connection.execute("BEGIN IMMEDIATE")
                connection.execute("UPDATE durablews_meta SET schema = ?", (number,))
        return present

    schema.apply_migrations = apply_migrations


def waits_for_no_lock() -> None:
    """A build without a busy timeout."""
    database.BUSY_TIMEOUT = 0.0


def upgrades_its_lock() -> None:
    """A build whose transactions begin by reading and take the write lock later."""

    class Deferred(connecting._Connection):
        def execute(self, sql: Any, parameters: Any = (), /) -> Any:
            return super().execute("BEGIN" if sql == "BEGIN IMMEDIATE" else sql, parameters)

    connecting._Connection = Deferred  # type: ignore[attr-defined]


def keeps_payloads() -> None:
    """A client that keeps every payload."""
    genuine, kept = messages.draft, list[Any]()

    def keep(payload: Any, **options: Any) -> Any:
        made = genuine(payload, **options)
        kept.append(made.payload)
        return made

    outbox.draft = keep  # type: ignore[attr-defined]


def keeps_links() -> None:
    """A client that keeps every connection it has had."""
    genuine, kept = Link.run, list[Link]()

    async def run(self: Link, *args: Any) -> Any:
        kept.append(self)
        return await genuine(self, *args)

    Link.run = run  # type: ignore[method-assign,assignment]


BUILDS: Mapping[str, Callable[[], None]] = {
    "genuine": lambda: None,
    **{
        build.__name__: build
        for build in (
            answers_early,
            acks_early,
            deletes_on_sending,
            reuses_sequences,
            forgets_to_raise,
            applies_repeats,
            sends_the_lowest_first,
            migrates_piecemeal,
            waits_for_no_lock,
            upgrades_its_lock,
            keeps_payloads,
            keeps_links,
        )
    },
}
