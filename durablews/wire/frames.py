"""The frames of durablews.v1 in both encodings (PROTOCOL.md sections 1 and 2), for clients and servers.

Whatever arrives, `Codec` returns a frame, None for a type of a later version, or raises ProtocolError: never anything
else. Sizes are checked by whoever reads the socket, before a frame gets here.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from durablews.errors import ProtocolError

__all__ = [
    "JSON",
    "MSGPACK",
    "SUBPROTOCOLS",
    "Ack",
    "Bye",
    "ClientFrame",
    "Codec",
    "Flow",
    "Hello",
    "Item",
    "ItemMeta",
    "Msgs",
    "Nack",
    "Ping",
    "Pong",
    "Push",
    "ServerFrame",
    "Welcome",
]

JSON: Final = "durablews.v1.json"
MSGPACK: Final = "durablews.v1.msgpack"
#: What a client offers. JSON first: a careless server that takes the first name gets the encoding it can read.
SUBPROTOCOLS: Final = (JSON, MSGPACK)
#: The smallest frame limit that a server may announce (PROTOCOL.md C5).
SMALLEST_MAX_BYTES: Final = 65_536

# "Integers of the frame are below 2^53" (PROTOCOL.md section 1).
_Int = Annotated[int, Meta(ge=0, lt=2**53)]
_Priority = Annotated[int, Meta(ge=-100, le=100)]


class Hello(Struct, frozen=True, tag_field="t", tag="hello"):
    """The client's first frame: who it is and the highest sequence that it ever gave out."""

    stream: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    instance: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    last: _Int
    max_bytes: _Int
    agent: str = ""


class Welcome(Struct, frozen=True, tag_field="t", tag="welcome", omit_defaults=True):
    """The server's answer: how much it takes at a time. `rewound`: it has seen a sequence above `last`."""

    window: _Int
    max_bytes: Annotated[int, Meta(ge=SMALLEST_MAX_BYTES, lt=2**53)]
    rewound: bool = False


class ItemMeta(Struct, frozen=True, omit_defaults=True):
    """What stands beside a payload: base64 mark, topic, enqueued at (ms UTC), transmission number, headers."""

    b: int = 0
    topic: str | None = None
    ts: _Int | None = None
    n: _Int = 0
    h: dict[str, str] | None = None


class Item(Struct, frozen=True):
    """One message as it arrived: `payload` is JSON text, or bytes."""

    seq: int
    payload: str | bytes
    meta: ItemMeta

    def outgoing(self) -> OutItem:
        """Return it as `Codec.encode_msgs` takes it."""
        meta = {name: value for name, value in msgspec.to_builtins(self.meta).items() if name != "b"}
        return (self.seq, self.payload, meta) if meta else (self.seq, self.payload)


class Msgs(Struct, frozen=True):
    """Messages of one priority in increasing sequence, and the predecessor that the client names (None: the first)."""

    priority: int
    after: int | None
    items: list[Item]


class Ack(Struct, frozen=True, tag_field="t", tag="ack"):
    """Everything of priority `p` in flight up to `s` is safe."""

    p: _Priority
    s: _Int


class Nack(Struct, frozen=True, tag_field="t", tag="nack", omit_defaults=True):
    """`s` and everything sent after it in this priority was not taken; `final`: `s` never will be."""

    p: _Priority
    s: _Int
    final: bool = False
    code: str | UnsetType = UNSET
    reason: str | None = None
    retry: _Int | None = None


class Flow(Struct, frozen=True, tag_field="t", tag="flow"):
    """A new window."""

    window: _Int


class Push(Struct, frozen=True):
    """A message to the application: JSON text, or bytes."""

    payload: str | bytes


class Ping(Struct, frozen=True, tag_field="t", tag="ping"):
    """Must be answered by a pong with the same number."""

    n: _Int


class Pong(Struct, frozen=True, tag_field="t", tag="pong"):
    """The answer to a ping."""

    n: _Int


class Bye(Struct, frozen=True, tag_field="t", tag="bye", omit_defaults=True):
    """The server is about to close; come back after `retry` milliseconds."""

    retry: _Int | None = None


ServerFrame = Welcome | Ack | Nack | Flow | Push | Ping | Pong | Bye
ClientFrame = Hello | Msgs | Ping | Pong


# The shapes on the wire whose payload is still in its encoding.


class _JSONItem(Struct, array_like=True, frozen=True):
    seq: _Int
    payload: Raw
    meta: ItemMeta = ItemMeta()


class _JSONMsgs(Struct, frozen=True, tag_field="t", tag="msgs"):
    p: _Priority
    m: Annotated[list[_JSONItem], Meta(min_length=1)]
    a: _Int | UnsetType = UNSET


class _JSONPush(Struct, frozen=True, tag_field="t", tag="push"):
    d: Raw
    b: int = 0


class _PackItem(Struct, array_like=True, frozen=True):
    seq: _Int
    payload: Any  # str or bytes: msgspec takes no union of these two
    meta: ItemMeta = ItemMeta()


class _PackMsgs(Struct, frozen=True, tag_field="t", tag="msgs"):
    p: _Priority
    m: Annotated[list[_PackItem], Meta(min_length=1)]
    a: _Int | UnsetType = UNSET


class _PackPush(Struct, frozen=True, tag_field="t", tag="push"):
    d: Any


class _Typed(Struct, frozen=True):
    """Just the type of a frame, to tell one of a later version from a malformed one."""

    t: str


class _OutMsgs(Struct, frozen=True, tag_field="t", tag="msgs"):
    """As it is sent. `m` holds tuples, so that msgspec encodes a batch in one call: 39 ns a message."""

    p: int
    a: int | UnsetType
    m: Sequence[Any]


#: A message as it is sent: sequence, payload (JSON text, or bytes), and the meta of `ItemMeta` as a mapping.
OutItem = tuple[int, str | bytes] | tuple[int, str | bytes, Mapping[str, object]]


class _OutPush(Struct, frozen=True, tag_field="t", tag="push", omit_defaults=True):
    d: Any
    b: int = 0


_KNOWN: Final = frozenset({"hello", "welcome", "msgs", "ack", "nack", "flow", "push", "ping", "pong", "bye"})

# What msgspec raises on hostile bytes: its DecodeError is a ValueError, as Unicode errors are; deep nesting recurses.
_MALFORMED = (ValueError, RecursionError, OverflowError)


class Codec:
    """One encoding of durablews.v1.

    Args:
        subprotocol: `JSON` or `MSGPACK`.
    """

    def __init__(self, subprotocol: str) -> None:
        self.subprotocol = subprotocol
        #: Whether frames travel as WebSocket text messages.
        self.text: Final = subprotocol == JSON
        self._encoder: msgspec.json.Encoder | msgspec.msgpack.Encoder
        self._from_server: msgspec.json.Decoder[Any] | msgspec.msgpack.Decoder[Any]
        self._from_client: msgspec.json.Decoder[Any] | msgspec.msgpack.Decoder[Any]
        self._typed: msgspec.json.Decoder[_Typed] | msgspec.msgpack.Decoder[_Typed]
        if self.text:
            self._encoder = msgspec.json.Encoder()
            self._from_server = msgspec.json.Decoder(Welcome | Ack | Nack | Flow | Ping | Pong | Bye | _JSONPush)
            self._from_client = msgspec.json.Decoder(Hello | Ping | Pong | _JSONMsgs)
            self._typed = msgspec.json.Decoder(_Typed)
        else:
            self._encoder = msgspec.msgpack.Encoder()
            self._from_server = msgspec.msgpack.Decoder(Welcome | Ack | Nack | Flow | Ping | Pong | Bye | _PackPush)
            self._from_client = msgspec.msgpack.Decoder(Hello | Ping | Pong | _PackMsgs)
            self._typed = msgspec.msgpack.Decoder(_Typed)

    def encode(self, frame: Hello | Welcome | Ack | Nack | Flow | Ping | Pong | Bye) -> bytes:
        """Return one frame that carries no payload."""
        return self._encoder.encode(frame)

    def encode_push(self, payload: str | bytes) -> bytes:
        """Return a push of stored `payload` (JSON text, or bytes)."""
        if not self.text:
            return self._encoder.encode(_OutPush(payload))
        if isinstance(payload, bytes):
            return self._encoder.encode(_OutPush(base64.b64encode(payload).decode(), 1))
        return self._encoder.encode(_OutPush(Raw(payload)))

    def encode_msgs(self, priority: int, after: int | None, items: Sequence[OutItem]) -> bytes:
        """Return one frame of messages: sequence, payload, and meta where there is any.

        JSON payloads are spliced in as they are; the base64 mark is added here.
        """
        if self.text:
            items = [self._spliced(*item) for item in items]
        return self._encoder.encode(_OutMsgs(priority, UNSET if after is None else after, items))

    def decode_server(self, data: str | bytes) -> ServerFrame | None:
        """Return the frame that a server sent; None for a type that this version does not know.

        Raises:
            ProtocolError: it is malformed, or not in this connection's kind of WebSocket message.
        """
        frame = self._decode(self._from_server, data)
        if isinstance(frame, _JSONPush):
            return Push(_json_payload(frame.d, frame.b))
        if isinstance(frame, _PackPush):
            return Push(_json_text(frame.d))
        return frame  # type: ignore[no-any-return]

    def decode_client(self, data: str | bytes) -> ClientFrame | None:
        """Return the frame that a client sent; None for a type that this version does not know.

        Raises:
            ProtocolError: it is malformed, or not in this connection's kind of WebSocket message.
        """
        frame = self._decode(self._from_client, data)
        if isinstance(frame, _JSONMsgs):
            items = [Item(item.seq, _json_payload(item.payload, item.meta.b), item.meta) for item in frame.m]
        elif isinstance(frame, _PackMsgs):
            items = [Item(item.seq, _json_text(item.payload), item.meta) for item in frame.m]
        else:
            return frame  # type: ignore[no-any-return]
        after = None if frame.a is UNSET else frame.a
        previous = -1 if after is None else after
        for item in items:
            if item.seq <= previous:
                raise ProtocolError(f"malformed msgs frame: sequence {item.seq} after {previous}")
            previous = item.seq
        return Msgs(frame.p, after, items)

    def _decode(self, decoder: msgspec.json.Decoder[Any] | msgspec.msgpack.Decoder[Any], data: str | bytes) -> Any:
        if isinstance(data, str) is not self.text:
            kind = "text" if self.text else "binary"
            raise ProtocolError(f"{self.subprotocol} frames are {kind} messages")
        try:
            return decoder.decode(data)  # type: ignore[arg-type]
        except _MALFORMED as exc:
            if isinstance(exc, msgspec.ValidationError) and self._is_of_later_version(data):
                return None
            # The text of exc may quote the frame, and so a payload: say the kind of fault only.
            raise ProtocolError(f"malformed {self.subprotocol} frame: {_fault(exc)}") from None

    def _is_of_later_version(self, data: str | bytes) -> bool:
        try:
            return self._typed.decode(data).t not in _KNOWN  # type: ignore[arg-type]
        except _MALFORMED:
            return False

    @staticmethod
    def _spliced(seq: int, payload: str | bytes, meta: Mapping[str, object] | None = None) -> tuple[Any, ...]:
        """Return an item of the JSON encoding."""
        if isinstance(payload, bytes):
            return seq, base64.b64encode(payload).decode(), {"b": 1, **(meta or {})}
        return (seq, Raw(payload), meta) if meta else (seq, Raw(payload))


def _fault(exc: BaseException) -> str:
    if isinstance(exc, RecursionError):
        return "nested too deeply"
    if isinstance(exc, msgspec.ValidationError):
        # "Expected `int`, got `str` - at `$.s`": shapes and places, no content.
        text = str(exc)
        return text if text.startswith(("Expected", "Object missing")) else "a value is not allowed there"
    return "it cannot be decoded"


def _json_payload(raw: Raw, base64_mark: int) -> str | bytes:
    """Return a payload of the JSON encoding: its text as it stood there, or the bytes of its base64."""
    try:
        if not base64_mark:
            return str(raw, "utf-8")
        return base64.b64decode(msgspec.json.decode(raw, type=str), validate=True)
    except (ValueError, binascii.Error):
        raise ProtocolError("malformed payload: neither JSON nor base64 as marked") from None


def _json_text(payload: object) -> str | bytes:
    """Check a payload of the MessagePack encoding: a str of JSON text, or bytes."""
    if isinstance(payload, bytes):
        return payload
    if not isinstance(payload, str):
        raise ProtocolError("malformed payload: neither a str nor a bin")
    try:
        msgspec.json.decode(payload, type=Raw)
    except _MALFORMED:
        raise ProtocolError("malformed payload: a str must hold JSON text") from None
    return payload
