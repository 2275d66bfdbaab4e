"""One connection's rules and its ledger together, synchronously: a frame in, one transaction, the answers out.

Promises: what `apply` did, the number and the right to ack commit together (S1, S2); whatever happens in the
transaction there is an answer or a close, never silence (S4). Knows no sockets and no event loop: the shells in
`receiver` run these functions as jobs on the database's thread, tests call them with a plain `sqlite3` connection.

    exchange = Exchange(Session(Codec(JSON), window=64, max_bytes=65_536), connection_id="c1")
    outcome = exchange.handle(connection, frame, apply)     # connection: autocommit, ledger.install()ed
    for answer in outcome.frames: ...                       # then, when outcome.close is set, close
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable, Sequence
from typing import TypeAlias

from msgspec import Struct

from durablews.clock import Clock, SystemClock
from durablews.errors import ProtocolError
from durablews.receiver import ledger
from durablews.receiver.messages import Message, message_of
from durablews.receiver.session import Close, Refusal, Reply, Session, StateLost, Wire
from durablews.wire.frames import Hello, Item, Msgs

__all__ = ["Apply", "ApplyFrame", "Exchange", "Opening", "Outcome", "one_by_one"]


class Outcome(Struct, frozen=True, kw_only=True):
    """What became of one frame, and what is to be done now.

    Attributes:
        frames: to send, in this order.
        close: then close with this; None to go on.
        greeted: the hello that the ledger took: the stream's older connection, if any, is to be closed with 4409 now.
        applied: how many messages were applied and committed.
        refused: the sequence that was refused, or None.
        error: what made the transaction fail, or shows that the store has lost state. It was answered as PROTOCOL.md
            says; it is the caller's to report.
    """

    frames: Sequence[Wire] = ()
    close: Close | None = None
    greeted: Hello | None = None
    applied: int = 0
    refused: int | None = None
    error: Exception | None = None


class Opening(Struct, frozen=True, kw_only=True):
    """An open transaction for one frame.

    Attributes:
        items: what is to be applied: repeats are left out.
        number: the highest sequence applied so far.
        outcome: set when nothing may be applied, whatever else: `finish` rolls back and returns it.
    """

    frame: Msgs
    items: Sequence[Item] = ()
    number: int = 0
    outcome: Outcome | None = None


#: Apply messages of one priority in order; return the refused one's sequence and why, or None when all were taken. What
#: it wrote for the refused message and after must be undone when it returns.
ApplyFrame: TypeAlias = Callable[[sqlite3.Connection, str, int, Sequence[Item]], tuple[int, Refusal] | None]
#: Apply one message; return why it is refused, or None when it was taken.
Apply: TypeAlias = Callable[[sqlite3.Connection, Message], Refusal | None]


def one_by_one(apply: Apply, *, savepoints: bool = True) -> ApplyFrame:
    """Return an ApplyFrame that calls `apply` for each message.

    Args:
        savepoints: give each message a savepoint of its own, so that what a refused one wrote is rolled back (S3).
            False saves two statements a message where `apply` refuses before it writes.
    """

    def apply_frame(
        connection: sqlite3.Connection, stream: str, priority: int, items: Sequence[Item]
    ) -> tuple[int, Refusal] | None:
        for item in items:
            if savepoints:
                connection.execute("SAVEPOINT durablews_message")
            refusal = apply(connection, message_of(stream, priority, item))
            if savepoints:
                if refusal is not None:
                    connection.execute("ROLLBACK TO durablews_message")
                connection.execute("RELEASE durablews_message")
            if refusal is not None:
                return item.seq, refusal
        return None

    return apply_frame


class Exchange:
    """The server's side of one connection.

    Args:
        session: the rules for this connection, fresh.
        owner: who authenticated on this connection; None when nobody had to (S8).
        connection_id: names this connection in the stream's row; random unless given.
        clock: only `wall` is used, for `last_seen_at`.
    """

    def __init__(
        self,
        session: Session,
        *,
        owner: str | None = None,
        connection_id: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.session = session
        self.owner = owner
        self.connection_id = connection_id or secrets.token_hex(16)
        self._clock = clock or SystemClock()

    @property
    def stream(self) -> str:
        """Return the stream that said hello; an empty string before."""
        return "" if self.session.hello is None else self.session.hello.stream

    def handle(self, connection: sqlite3.Connection, data: Wire, apply: Apply, *, savepoints: bool = True) -> Outcome:
        """Do everything that one frame asks for, its transaction included, with `apply` for each fresh message.

        `apply` may raise: the transaction is rolled back, the outcome carries the exception as `error` and the answer
        that S4 asks for.
        """
        return self.handle_frame(connection, data, one_by_one(apply, savepoints=savepoints))

    def handle_frame(self, connection: sqlite3.Connection, data: Wire, apply: ApplyFrame) -> Outcome:
        """Do as `handle` does, with all fresh messages of the frame applied in one call."""
        received = self.receive(data)
        if isinstance(received, Hello):
            return self.greet(connection, received)
        if isinstance(received, Msgs):
            return self.apply(connection, received, apply)
        return received

    def receive(self, data: Wire) -> Hello | Msgs | Outcome:
        """Return the hello or the messages in a frame, or what all else leads to; the ledger is not touched."""
        try:
            received = self.session.receive(data)
        except ProtocolError as exc:
            return Outcome(close=Close.because(exc.close_code, str(exc)))
        if received is None:
            return Outcome()
        if isinstance(received, Reply):
            return Outcome(frames=[received.frame])
        return received

    def greet(self, connection: sqlite3.Connection, hello: Hello) -> Outcome:
        """Answer a hello: one transaction that makes this the stream's newest connection (S6, S8)."""
        try:
            rewound = ledger.hello(
                connection,
                hello.stream,
                self.connection_id,
                hello.last,
                self.owner,
                instance=hello.instance,
                now=self._clock.wall(),
            )
        except ledger.Forbidden:
            return Outcome(close=Close(4403, "the stream belongs to somebody else"))
        except sqlite3.Error as exc:
            return Outcome(close=Close(1013, "the transaction failed"), error=exc)
        try:
            welcome = self.session.welcome(hello, rewound=rewound)
        except ProtocolError as exc:
            return Outcome(close=Close.because(exc.close_code, str(exc)), greeted=hello)
        return Outcome(frames=[welcome], greeted=hello)

    def apply(self, connection: sqlite3.Connection, frame: Msgs, apply: ApplyFrame) -> Outcome:
        """Apply what is fresh in `frame` in one transaction."""
        try:
            opening = self.begin(connection, frame)
            refused = None
            if opening.outcome is None and opening.items:
                refused = apply(connection, self.stream, frame.priority, opening.items)
        except Exception as exc:
            return self.fail(connection, frame, exc)
        except BaseException:
            _roll_back(connection)
            raise
        return self.finish(connection, opening, refused)

    def begin(self, connection: sqlite3.Connection, frame: Msgs) -> Opening:
        """Open the transaction for `frame`: fence, number, what is fresh. `finish` or `fail` must follow.

        Raises:
            sqlite3.Error: it could not be opened; call `fail`.
        """
        connection.execute("BEGIN IMMEDIATE")
        try:
            number = ledger.number(connection, self.stream, self.connection_id, frame.priority)
            items = self.session.judge(frame, number)
        except (ledger.Overtaken, ledger.Forgotten) as exc:
            return Opening(frame=frame, outcome=Outcome(close=_close_of(exc)))
        except StateLost as exc:
            close = Close.because(1012, "the server has lost state")
            return Opening(frame=frame, outcome=Outcome(close=close, error=exc))
        if items is None:
            return Opening(frame=frame, outcome=Outcome())
        return Opening(frame=frame, items=items, number=number)

    def finish(
        self,
        connection: sqlite3.Connection,
        opening: Opening,
        refused: tuple[int, Refusal] | None = None,
        *,
        up_to: int | None = None,
    ) -> Outcome:
        """Write the number, commit, and return the answers.

        Args:
            refused: the sequence that was refused, and why; it and what follows it do not count as applied.
            up_to: only the messages up to this sequence count as applied; None for all.
        """
        frame = opening.frame
        if opening.outcome is not None:
            _roll_back(connection)
            return opening.outcome
        if not connection.in_transaction:
            # Somebody committed the effect without the number: it may be applied twice, and no answer would be true.
            error = RuntimeError(
                "the receiver's transaction was ended by the application: leave COMMIT to the receiver"
            )
            return Outcome(close=Close(1013, "the transaction failed"), error=error)
        applied = [
            item.seq
            for item in opening.items
            if (refused is None or item.seq < refused[0]) and (up_to is None or item.seq <= up_to)
        ]
        number = applied[-1] if applied else opening.number
        try:
            if applied:
                ledger.raise_number(connection, self.stream, frame.priority, number, now=self._clock.wall())
        except sqlite3.Error as exc:
            return self.fail(connection, frame, exc)
        try:
            # Nothing was fresh: whatever was written is not an effect of a message, and would be repeated with it.
            connection.execute("COMMIT" if opening.items else "ROLLBACK")
        except sqlite3.IntegrityError as exc:  # a deferred constraint of the application's: certainly not committed
            return self.fail(connection, frame, exc)
        except sqlite3.Error as exc:
            # A nack would say "not taken", and after a failed sync that cannot be known: the log may hold the commit.
            _roll_back(connection)
            return Outcome(close=Close(1013, "the transaction failed"), error=exc)
        return Outcome(
            frames=self.session.settled(frame, number, refused),
            applied=len(applied),
            refused=None if refused is None else refused[0],
        )

    def fail(
        self, connection: sqlite3.Connection, frame: Msgs, error: Exception | None, reason: str | None = None
    ) -> Outcome:
        """Roll back and return what follows for the client (S4). `reason` is text for people there."""
        number: int | None = None
        try:
            _roll_back(connection)
            number = ledger.number(connection, self.stream, self.connection_id, frame.priority)
        except (ledger.Overtaken, ledger.Forgotten) as exc:
            return Outcome(close=_close_of(exc), error=error)
        except sqlite3.Error as exc:
            # Unknown stays unknown: the answer is 1013. Keep what failed first, and show this one beside it.
            if error is None:
                error = exc
            else:
                error.add_note(f"then the number could not be read: {exc}")
        answer = self.session.failed(frame, number, reason)
        if isinstance(answer, Close):
            return Outcome(close=answer, error=error)
        return Outcome(frames=answer, error=error)


def _close_of(exc: ledger.Overtaken | ledger.Forgotten) -> Close:
    if isinstance(exc, ledger.Overtaken):
        return Close.because(4409, f"instance={exc.instance}")
    return Close(1012, "the stream was forgotten: say hello again")


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:  # SQLite rolls back by itself on a full disk and on I/O errors
        connection.execute("ROLLBACK")
