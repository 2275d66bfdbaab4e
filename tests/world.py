"""A device, its server and what lies between them: whatever may happen, one step at a time.

The server is the library's `Exchange` and `Session` over one ledger. It takes, refuses, puts off or fails over each
message as it is told, dies before or after it has committed, and reads on where a client has left.
"""

from __future__ import annotations

import random
import sqlite3
from functools import cache
from typing import Literal

from device import Device
from simulation import Violation
from traffic import Connection
from websockets.frames import Close

from durablews.endpoint import Target
from durablews.receiver import ledger
from durablews.receiver.messages import Message
from durablews.receiver.session import Refusal
from durablews.wire.frames import Ack, Bye, Hello, Msgs, Nack, Ping

__all__ = ["Mood", "World"]

#: What the server does with a message, or with the answer to its frame.
Mood = Literal["takes", "puts off", "fails", "dies before it answers", "never answers"]

#: Simulated seconds in which everything must have arrived once nothing goes wrong any more.
PATIENCE = 3 * 3600.0
_TARGET = Target(url="wss://server/", headers={})


@cache
def _new_ledger() -> bytes:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    ledger.install(connection)
    connection.execute("CREATE TABLE applied (id INTEGER PRIMARY KEY, stream, priority, seq, message)")
    image = connection.serialize()
    connection.close()
    return image


class World(Device):
    """A device and the rest of the world. Arguments are those of `Device`, without the server."""

    def __init__(self, rng: random.Random, **options: object) -> None:
        self.server = sqlite3.connect(":memory:", isolation_level=None)
        self.server.deserialize(_new_ledger())
        self._connections = 0
        self._newest: dict[str, str] = {}
        super().__init__(rng, self.server, **options)  # type: ignore[arg-type]

    def end(self) -> None:
        super().end()
        self.server.close()

    # -- the network

    def connect(self, window: int) -> None:
        """Let the client reach the server, which allows so many messages in flight."""
        self._connections += 1
        connection = self.connection = Connection(
            self.loop,
            self.clock,
            self.codec,
            f"connection {self._connections}",
            window=window,
            own_window=self.settings.delivery.window,
            sent=self._sent,
        )
        welcome_by = self.loop.now + self.settings.reconnect.connect_timeout
        running = self.attempts._run_connection(connection.socket, _TARGET, welcome_by)  # type: ignore[arg-type]
        connection.task = self.loop.create_task(running)
        self.go_on()

    def _sent(self, connection: Connection, data: str | bytes) -> None:
        """Judge what the client hands over; `go_on` raises it, for the library survives what is raised here."""
        try:
            self._judge(connection, data)
        except Violation as exc:
            self.violations.append(exc)

    def _judge(self, connection: Connection, data: str | bytes) -> None:
        frame = self.codec.decode_client(data)
        if isinstance(frame, Msgs):
            self.witness.sent(connection.traffic, self.outbox.stream, frame)
            lanes = self.attempts.delivery._backlog.lanes
            above = [lane for lane in lanes.values() if lane.priority > frame.priority and lane.ready]
            held = self.attempts.delivery._backlog._holds
            if any(not lane.recording and lane.priority not in held for lane in above):
                raise Violation(f"P3: {frame} goes before something of a higher priority")

    def read(self) -> None:
        """Let the next answer arrive at the client."""
        assert self.connection is not None
        self._read(self.connection)

    def _read(self, connection: Connection) -> None:
        if not connection.socket.to_client:
            return
        frame = connection.socket.to_client[0]
        if not isinstance(frame, Close):
            self.witness.read(connection.traffic, self.codec, frame)
        connection.socket.read()
        self.go_on()

    def lose_answer(self) -> None:
        """Let the next answer be lost, if it is an ack or a nack: the rest may come all the same."""
        if self._next_answer() is not None:
            assert self.connection is not None
            self.connection.socket.to_client.popleft()

    def _next_answer(self, position: int = 0) -> Ack | Nack | None:
        waiting = self.connection.socket.to_client if self.connection is not None else ()
        if len(waiting) <= position:
            return None
        data = waiting[position]
        frame = None if isinstance(data, Close) else self.codec.decode_server(data)
        return frame if isinstance(frame, Ack | Nack) else None

    def repeat_answer(self, which: int) -> None:
        """Let an ack that came on this connection, at whatever time, come again."""
        connection = self.connection
        if connection is not None and connection.acks and not connection.closed:
            connection.socket.to_client.append(connection.acks[which % len(connection.acks)])

    def swap_answers(self) -> None:
        """Let two acks, or answers to different priorities, come in the other order."""
        first, second = self._next_answer(0), self._next_answer(1)
        if first is None or second is None:
            return
        if first.p != second.p or (isinstance(first, Ack) and isinstance(second, Ack)):
            assert self.connection is not None
            waiting = self.connection.socket.to_client
            waiting[0], waiting[1] = waiting[1], waiting[0]

    def cut(self, *, read_on: bool) -> None:
        """Let the connection end for the client; the server may still read what is on its way."""
        connection = self.connection
        assert connection is not None
        if not read_on:
            connection.closed = True
        connection.socket.lose()
        self.go_on()

    # -- the server

    def serve(self, mood: Mood = "takes", at: int = 0) -> None:
        """Let the server read one frame; `mood` is for the message at that place in it."""
        assert self.connection is not None
        self._serve(self.connection, mood, at)

    def serve_late(self, which: int, mood: Mood = "takes") -> None:
        """Let the server read one frame of a connection that the client has left."""
        connection = self.late[which % len(self.late)]
        self._serve(connection, mood, 0)
        if connection.closed or not connection.socket.to_server:
            self.late.remove(connection)

    def forget_late(self) -> None:
        """Let the server find out that the client has left all of them."""
        self.late.clear()

    def _serve(self, connection: Connection, mood: Mood, at: int) -> None:
        witness, exchange = self.witness, connection.exchange
        data = connection.socket.to_server.popleft()
        frame = self.codec.decode_client(data)
        before = 0
        if isinstance(frame, Msgs):
            codes = [witness.poison[int(i.payload)] for i in frame.items if int(i.payload) in witness.poison]
            if codes:  # as with a frame over its limit, nobody looks at what it would have said
                connection.close(codes[0], "poison")
                return
            before = witness.number(exchange.stream, frame.priority)

        def apply(database: sqlite3.Connection, message: Message) -> Refusal | None:
            nonlocal at
            number = int(message.raw)
            database.execute(
                "INSERT INTO applied (stream, priority, seq, message) VALUES (?, ?, ?, ?)",
                (message.stream, message.priority, message.seq, number),
            )
            at -= 1
            if number in witness.refused:
                return Refusal("invalid", "never")
            if at < 0 and mood == "puts off":
                return Refusal("busy", retry=(0.0, 0.2, 7.0)[number % 3])
            if at < 0 and mood == "fails":
                raise RuntimeError("the transaction failed")
            return None

        outcome = exchange.handle(self.server, data, apply)
        if isinstance(frame, Hello) and outcome.greeted is not None:
            self._newest[frame.stream] = connection.name
        if isinstance(frame, Msgs) and self._newest[exchange.stream] != connection.name and witness.applied():
            raise Violation("S6: an older connection was applied from")
        witness.answers(exchange.stream, frame, outcome, self.codec, before)
        if mood == "dies before it answers":
            connection.closed = True
            connection.socket.lose()
        elif mood != "never answers" or isinstance(frame, Hello):
            for answer in outcome.frames:
                connection.socket.to_client.append(answer)
                if isinstance(self.codec.decode_server(answer), Ack):
                    connection.acks.append(answer)
            if outcome.close is not None:
                connection.close(outcome.close.code, outcome.close.reason)
        self.go_on()

    def crash_server(self) -> None:
        """End the server's process: every connection breaks, what was committed stays."""
        self.late.clear()
        if self.connection is not None:
            self.cut(read_on=False)

    def speak(self, what: str, window: int) -> None:
        """Let the server say something: "flow", "ping", "bye", "close", or answers for what is not in flight."""
        connection = self.connection
        if connection is None or connection.closed or not connection.exchange.session.open:
            return
        if what == "flow":
            connection.socket.to_client.append(connection.exchange.session.flow(window))
        elif what == "ping":
            connection.say(Ping(5))
        elif what == "bye":
            connection.say(Bye(1000))
        elif what == "close":
            connection.close((1000, 1006, 1011, 1012, 4429)[window % 5], "as servers do")
        elif not connection.socket.to_client:
            for priority in (-1, 0, 1, 7):
                if not connection.traffic.unanswered.get(priority):
                    for answer in (Ack(priority, 2**52), Nack(priority, 1, True, "invalid"), Nack(priority, 2**52)):
                        connection.say(answer)
                        self._read(connection)

    # -- the end

    def finish(self) -> None:
        """Let nothing go wrong any more: everything must arrive, or be counted."""
        self.unlock()
        for connection in self.late:
            connection.closed = True
        self.late.clear()
        self.go_on()
        deadline = self.loop.now + PATIENCE
        while self._busy():
            self._move()
            if self.loop.now > deadline:
                raise Violation(f"P8: stuck with {self._busy()} messages")
        self.witness.verdict()

    def _busy(self) -> int:
        waiting = int(self.foreign.execute("SELECT messages FROM durablews_totals").fetchone()[0])
        return waiting + len(self.sends)

    def _move(self) -> None:
        connection = self.connection
        if self.disk.jobs:
            self.work()
        elif connection is None:
            self.connect(8)
        elif connection.socket.to_client:
            self.read()
        elif connection.socket.to_server and not connection.closed:
            self.serve()
        elif connection.exchange.session.open and not connection.exchange.session.window and not connection.closed:
            self.speak("flow", 8)
        else:
            self.wait()
