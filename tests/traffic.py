"""One simulated WebSocket: both ends of it, and a count of what went over it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from simulation import SimulatedLoop, SimulatedSocket, Violation
from websockets.frames import Close

from durablews.clock import Clock
from durablews.receiver.exchange import Exchange
from durablews.receiver.session import Session
from durablews.wire.frames import Ack, Codec, Flow, Msgs, Nack, Welcome

__all__ = ["Connection", "Traffic"]


class Traffic:
    """What went over one connection, as a client that knows PROTOCOL.md would count it."""

    def __init__(self, window: int) -> None:
        self._own_window = window
        #: As the client read it last; None before the welcome.
        self.window: int | None = None
        #: By priority: what was sent and not taken back, and what of that was not answered.
        self.sent: dict[int, list[int]] = {}
        self.unanswered: dict[int, list[int]] = {}

    def read(self, frame: object) -> list[int]:
        """Take note of an answer that the client reads; return what it settles."""
        if isinstance(frame, Welcome) and not frame.rewound:
            self.window = min(self._own_window, frame.window)
        elif isinstance(frame, Flow):
            self.window = min(self._own_window, frame.window)
        elif isinstance(frame, Ack):
            flight = self.unanswered.get(frame.p, [])
            self.unanswered[frame.p] = [seq for seq in flight if seq > frame.s]
            return [seq for seq in flight if seq <= frame.s]
        elif isinstance(frame, Nack) and frame.s in self.unanswered.get(frame.p, []):
            for seqs in (self.unanswered, self.sent):
                seqs[frame.p] = [seq for seq in seqs[frame.p] if seq < frame.s]
        return []

    def send(self, frame: Msgs) -> None:
        """Judge and count a frame that the client hands over."""
        if self.window is None:
            raise Violation("C1: messages before the welcome")
        before = self.sent.setdefault(frame.priority, [])
        if frame.after != (before[-1] if before else None):
            raise Violation(f"C2: a frame names {frame.after} and follows {before[-1:]}")
        flight = sum(map(len, self.unanswered.values()))
        if flight + len(frame.items) > self.window:
            raise Violation(f"C5: {flight} + {len(frame.items)} in flight, {self.window} allowed")
        for seqs in (before, self.unanswered.setdefault(frame.priority, [])):
            seqs.extend(item.seq for item in frame.items)


class Connection:
    """One WebSocket: the client's end, the server's `Exchange`, and what the witness counts.

    Args:
        name: for the server, one for each connection.
        window: what the server welcomes with.
        own_window: the client's.
        sent: called with each frame that the client hands over.
    """

    def __init__(
        self,
        loop: SimulatedLoop,
        clock: Clock,
        codec: Codec,
        name: str,
        *,
        window: int,
        own_window: int,
        sent: Callable[[Connection, str | bytes], None],
    ) -> None:
        self.codec, self.name = codec, name
        self.socket = SimulatedSocket(loop, codec.subprotocol, lambda data: sent(self, data))
        self.exchange = Exchange(Session(codec, window=window, max_bytes=65_536), connection_id=name, clock=clock)
        self.traffic = Traffic(own_window)
        #: Every ack that the server gave here.
        self.acks: list[str | bytes] = []
        #: The server reads nothing more of it.
        self.closed = False
        self.task: asyncio.Task[Any]

    def say(self, frame: Any) -> None:
        """Let the server say something out of turn."""
        data = self.codec.encode(frame)
        self.socket.to_client.append(data.decode() if self.codec.text else data)

    def close(self, code: int, reason: str) -> None:
        """Let the server close."""
        self.socket.to_client.append(Close(code, reason))
        self.socket.to_server.clear()
        self.closed = True
