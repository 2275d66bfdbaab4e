"""The client's half of durablews.v1."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from durablews.errors import ConfigError, ProtocolError
from durablews.messages import Entry
from durablews.wire.dialect import (
    Acked,
    Answer,
    Capabilities,
    Farewell,
    Flowed,
    Introduction,
    Nacked,
    Ponged,
    Pushed,
    Ready,
    Reply,
    Wire,
)
from durablews.wire.frames import (
    JSON,
    MSGPACK,
    SUBPROTOCOLS,
    Ack,
    Bye,
    Codec,
    Flow,
    Hello,
    Nack,
    Ping,
    Pong,
    Push,
    Welcome,
)

__all__ = ["NativeDialect", "dialect_named"]

_DEFAULT_RETRY_MS = 5000


class NativeDialect:
    """durablews.v1, in whichever of `subprotocols` the server selects."""

    name = "durablews.v1"
    capabilities = Capabilities(
        largest_window=None,
        ordered=True,
        deduplicates=True,
        names_refusals=True,
        ack_means="applied or stored so that it survives the server's own crash",
    )

    def __init__(self, subprotocols: tuple[str, ...] = SUBPROTOCOLS) -> None:
        self.subprotocols = subprotocols

    def connection(self, subprotocol: str | None) -> Wire:
        if subprotocol not in self.subprotocols:
            raise ProtocolError(
                "the server does not speak durablews: it selected no subprotocol of " + ", ".join(self.subprotocols)
            )
        return _NativeWire(Codec(subprotocol))


def dialect_named(name: str) -> NativeDialect:
    """Return the dialect that a setting names.

    Raises:
        ConfigError: there is none of this name.
    """
    known = {"durablews.v1": SUBPROTOCOLS, JSON: (JSON,), MSGPACK: (MSGPACK,)}
    if name not in known:
        raise ConfigError(f"dialect {name!r} is not known; there are {', '.join(known)}")
    return NativeDialect(known[name])


class _NativeWire:
    """durablews.v1 on one connection."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.text = codec.text

    def open(self, introduction: Introduction) -> list[bytes]:
        hello = Hello(
            stream=introduction.stream,
            instance=introduction.instance,
            last=introduction.last,
            max_bytes=introduction.max_bytes,
            agent=introduction.agent,
        )
        return [self._codec.encode(hello)]

    def encode(self, priority: int, after: int | None, entries: Sequence[Entry]) -> bytes:
        return self._codec.encode_msgs(
            priority,
            after,
            [
                (seq, payload, {"ts": created_at})
                if topic is None and headers is None and not transmissions
                else (seq, payload, _meta(topic, headers, created_at, transmissions))
                for seq, _, payload, topic, headers, created_at, _, transmissions, _ in entries
            ],
        )

    def ping(self, number: int) -> bytes | None:
        return self._codec.encode(Ping(number))

    def feed(self, data: str | bytes) -> list[Answer]:
        frame = self._codec.decode_server(data)
        if isinstance(frame, Ack):
            return [Acked(frame.p, frame.s)]
        if isinstance(frame, Nack):
            # `final` decides, not the code; `retry` is for the others only.
            retry = None if frame.final else (_DEFAULT_RETRY_MS if frame.retry is None else frame.retry) / 1000
            return [Nacked(frame.p, frame.s, frame.code or "busy", frame.final, retry, frame.reason)]
        if isinstance(frame, Push):
            return [Pushed(frame.payload)]
        if isinstance(frame, Flow):
            return [Flowed(frame.window)]
        if isinstance(frame, Welcome):
            return [Ready(frame.window, frame.max_bytes, frame.rewound)]
        if isinstance(frame, Ping):
            return [Reply(self._codec.encode(Pong(frame.n)))]
        if isinstance(frame, Pong):
            return [Ponged(frame.n)]
        if isinstance(frame, Bye):
            return [Farewell((_DEFAULT_RETRY_MS if frame.retry is None else frame.retry) / 1000)]
        return []  # a type of a later version


def _meta(topic: str | None, headers: str | None, created_at: int, transmissions: int) -> dict[str, object]:
    meta: dict[str, object] = {"ts": created_at}
    if topic is not None:
        meta = {"topic": topic, **meta}
    if transmissions:
        meta["n"] = transmissions + 1
    if headers is not None:
        meta["h"] = msgspec.json.decode(headers, type=dict[str, str])
    return meta
