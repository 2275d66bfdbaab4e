"""The server's rules for one connection, sans I/O: frames and numbers in, decisions out (PROTOCOL.md section 4).

Promises: no ack for what is above the number (S1), no nack for a repeat (S2) or for an ignored frame (S4). Knows no
clock, socket or database: who drives it reads the number, applies what `judge` returns, in one transaction, and reports
how that ended.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from durablews.errors import ProtocolError
from durablews.wire.frames import Ack, Codec, Flow, Hello, Item, Msgs, Nack, Ping, Pong, Welcome

__all__ = ["FAILURE_RETRY", "Close", "Refusal", "Reply", "Session", "StateLost", "Wire"]

#: A frame as a WebSocket library takes it: str for a text message, bytes for a binary one.
Wire = str | bytes

#: After how many seconds a client may repeat what a failed transaction did not take (S4).
FAILURE_RETRY: Final = 5.0

_LONGEST_REASON: Final = 123  # bytes of UTF-8 that fit into a close frame (RFC 6455 section 5.5)


class Close(Struct, frozen=True):
    """Close the connection with this code and reason (PROTOCOL.md section 6)."""

    code: int
    reason: str = ""

    @classmethod
    def because(cls, code: int, reason: str) -> Close:
        """Return a Close whose reason is cut to what a close frame can carry."""
        return cls(code, reason.encode()[:_LONGEST_REASON].decode(errors="ignore"))


class Refusal(Struct, frozen=True):
    """Why a message is not taken.

    Attributes:
        code: the client's word for it; this version of the protocol knows busy, rate, invalid, too_large, forbidden and
            unknown_topic (PROTOCOL.md section 2).
        reason: text for people.
        retry: seconds after which the client should try again; None refuses for good, as a dead letter.
    """

    code: str = "invalid"
    reason: str | None = None
    retry: float | None = None


class Reply(Struct, frozen=True):
    """Send this frame; nothing else is to be done."""

    frame: Wire


class StateLost(Exception):
    """The client names a predecessor that this server acknowledged and no longer knows (S3)."""

    def __init__(self, priority: int, after: int, number: int) -> None:
        super().__init__(
            f"the store has lost what it acknowledged: in priority {priority} the client names {after} as applied, "
            f"the store knows {number}"
        )
        self.priority = priority


class Session:
    """What the server knows about one connection.

    Args:
        codec: the encoding that the subprotocol names.
        window: the most messages that the client may have unanswered; 0 pauses it.
        max_bytes: the largest frame that the client may send, at least 65 536 (PROTOCOL.md C5).
    """

    def __init__(self, codec: Codec, *, window: int, max_bytes: int) -> None:
        self.codec = codec
        self.window = window
        self.max_bytes = max_bytes
        #: The hello that was welcomed last; None before.
        self.hello: Hello | None = None
        #: Whether messages are taken now.
        self.open = False
        self._rewound = False
        self._broken: set[int] = set()  # priorities in which this connection saw a nack or a failure (S3)

    def receive(self, data: Wire) -> Hello | Msgs | Reply | None:
        """Return what a frame asks for; None when nothing is to be done.

        Raises:
            ProtocolError: it is malformed or out of turn: close with its `close_code` (S7).
        """
        frame = self.codec.decode_client(data)
        if frame is None:
            return None
        if isinstance(frame, Hello):
            # A second one is the answer to a rewound welcome, and to nothing else (PROTOCOL.md section 5).
            if self.open:
                raise ProtocolError("hello on a connection that was welcomed already")
            return frame
        if self.hello is None:
            raise ProtocolError("the first frame must be hello")
        if isinstance(frame, Ping):
            return Reply(self._wire(Pong(frame.n)))
        if isinstance(frame, Pong):
            return None
        if not self.open:
            raise ProtocolError("msgs after a rewound welcome, before the new stream's hello")
        if frame.items[0].seq < 1:
            # 0 is "no number": it would look like a repeat and be acked without having been applied.
            raise ProtocolError("malformed msgs frame: sequences start at 1")
        return frame

    def welcome(self, hello: Hello, *, rewound: bool) -> Wire:
        """Return the answer to a hello that the ledger has taken; from now on messages are taken unless it is rewound.

        Raises:
            ProtocolError: the second rewound running (PROTOCOL.md section 5).
        """
        if rewound and self._rewound:
            raise ProtocolError("rewound twice: the new stream is not new")
        self.hello = hello
        self.open = not rewound
        self._rewound = rewound
        self._broken.clear()  # a new stream, if any: nothing of it was nacked yet
        return self._wire(Welcome(self.window, self.max_bytes, rewound))

    def judge(self, frame: Msgs, number: int) -> list[Item] | None:
        """Return the messages to apply, none when all are repeats; None to ignore the frame in silence (S2, S3).

        Args:
            number: the highest sequence applied in this priority, 0 for none, as of the running transaction.

        Raises:
            StateLost: the client names a predecessor that was applied, and the number says that it was not.
        """
        if frame.after is not None and frame.after > number:
            if frame.priority in self._broken:
                return None
            raise StateLost(frame.priority, frame.after, number)
        if frame.items[0].seq > number:
            return frame.items
        return [item for item in frame.items if item.seq > number]

    def settled(self, frame: Msgs, number: int, refused: tuple[int, Refusal] | None = None) -> list[Wire]:
        """Return the answers to a frame whose transaction has committed.

        Args:
            number: as committed.
            refused: the sequence that was refused, and why; what came after it was not applied.
        """
        answers: list[Wire] = []
        if frame.items[0].seq <= number:
            answers.append(self._wire(Ack(frame.priority, number)))
        if refused is not None:
            seq, refusal = refused
            answers.append(self._nack(frame.priority, seq, refusal))
        return answers

    def failed(self, frame: Msgs, number: int | None, reason: str | None = None) -> list[Wire] | Close:
        """Return what follows from a transaction that was rolled back (S4).

        Args:
            number: as it stands now; None when that cannot be known.
            reason: text for people.
        """
        known = number is not None and (frame.after is None or frame.after <= number)
        if number is None or not known or frame.items[0].seq <= number:
            self._broken.add(frame.priority)
            return Close(1013, "the transaction failed")
        return [self._nack(frame.priority, frame.items[0].seq, Refusal("busy", reason, FAILURE_RETRY))]

    def flow(self, window: int) -> Wire:
        """Return the frame that announces a new window; 0 pauses."""
        self.window = window
        return self._wire(Flow(window))

    def push(self, payload: str | bytes) -> Wire:
        """Return the frame that carries stored `payload` to the client's application."""
        data = self.codec.encode_push(payload)
        return data.decode() if self.codec.text else data

    def _nack(self, priority: int, seq: int, refusal: Refusal) -> Wire:
        self._broken.add(priority)
        if refusal.retry is None:
            return self._wire(Nack(priority, seq, True, refusal.code, refusal.reason))
        retry = max(0, round(refusal.retry * 1000))
        return self._wire(Nack(priority, seq, False, refusal.code, refusal.reason, retry))

    def _wire(self, frame: Welcome | Ack | Nack | Flow | Pong) -> Wire:
        data = self.codec.encode(frame)
        return data.decode() if self.codec.text else data
