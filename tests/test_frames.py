"""The wire is exactly PROTOCOL.md's: `vectors.json` is a copy of the protocol's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durablews.errors import ProtocolError
from durablews.wire.frames import JSON, MSGPACK, Codec, Item, Msgs, Push

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
FROM_CLIENT = ("hello", "msgs", "ping", "pong")


def decode(codec: Codec, data: str | bytes, kind: str) -> Any:
    return codec.decode_client(data) if kind in FROM_CLIENT else codec.decode_server(data)


def encode(codec: Codec, frame: Any) -> bytes:
    if isinstance(frame, Msgs):
        return codec.encode_msgs(frame.priority, frame.after, [item.outgoing() for item in frame.items])
    if isinstance(frame, Push):
        return codec.encode_push(frame.payload)
    return codec.encode(frame)


@pytest.mark.parametrize("vector", VECTORS["frames"], ids=lambda v: v["name"])
def test_both_encodings_of_a_vector_mean_the_same(vector: dict[str, str]) -> None:
    """A frame of vectors.json decodes to the same thing from JSON and from MessagePack."""
    kind = json.loads(vector["json"])["t"]
    from_json = decode(Codec(JSON), vector["json"], kind)
    from_msgpack = decode(Codec(MSGPACK), bytes.fromhex(vector["msgpack_hex"]), kind)
    if kind == "msgs":  # the base64 mark is JSON's own
        assert [(i.seq, i.payload, i.meta.topic, i.meta.ts, i.meta.n, i.meta.h) for i in from_json.items] == [
            (i.seq, i.payload, i.meta.topic, i.meta.ts, i.meta.n, i.meta.h) for i in from_msgpack.items
        ]
        assert (from_json.priority, from_json.after) == (from_msgpack.priority, from_msgpack.after)
    else:
        assert from_json == from_msgpack
    if vector["name"] == "unknown_type_is_ignored":
        assert from_json is None


@pytest.mark.parametrize("vector", VECTORS["frames"], ids=lambda v: v["name"])
def test_a_vector_is_encoded_as_it_stands(vector: dict[str, str]) -> None:
    """What we send is byte for byte what vectors.json shows, in both encodings."""
    if vector["name"].startswith("unknown_"):
        return  # nothing that this version sends
    kind = json.loads(vector["json"])["t"]
    frame = decode(Codec(JSON), vector["json"], kind)
    assert encode(Codec(JSON), frame).decode() == vector["json"]
    from_msgpack = decode(Codec(MSGPACK), bytes.fromhex(vector["msgpack_hex"]), kind)
    assert encode(Codec(MSGPACK), from_msgpack).hex() == vector["msgpack_hex"]


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=lambda v: v["name"])
def test_a_refused_vector_raises_the_one_error(vector: dict[str, str]) -> None:
    """What vectors.json refuses is refused with ProtocolError, whichever side reads it."""
    kind = (
        json.loads(vector["json"])["t"] if vector["json"].startswith('{"t":"') and vector["json"][-1] == "}" else "ack"
    )
    with pytest.raises(ProtocolError) as refused:
        decode(Codec(JSON), vector["json"], kind)
    assert refused.value.close_code == 4400


@given(st.binary(max_size=300), st.sampled_from([JSON, MSGPACK]))
def test_noise_raises_the_one_error(data: bytes, subprotocol: str) -> None:
    """Whatever the bytes, a decoder returns a frame or None, or raises ProtocolError."""
    codec = Codec(subprotocol)
    text: str | bytes = data.decode(errors="surrogateescape") if codec.text else data
    for decoder in (codec.decode_client, codec.decode_server):
        try:
            decoder(text)
        except ProtocolError:
            pass


@pytest.mark.parametrize("wrong", [b'{"t":"ping","n":1}', "\x82"], ids=["binary for JSON", "text for MessagePack"])
def test_a_frame_in_the_wrong_kind_of_message_is_refused(wrong: str | bytes) -> None:
    """JSON travels in text messages and MessagePack in binary ones; the other way round is malformed."""
    with pytest.raises(ProtocolError):
        Codec(JSON if isinstance(wrong, bytes) else MSGPACK).decode_server(wrong)


def test_deep_nesting_raises_the_one_error() -> None:
    """A payload nested a hundred thousand deep is a malformed frame, not a crash."""
    deep = "[" * 100_000 + "]" * 100_000
    with pytest.raises(ProtocolError, match="nested too deeply"):
        Codec(JSON).decode_client(f'{{"t":"msgs","p":0,"m":[[1,{deep}]]}}')


def test_an_error_does_not_quote_the_payload() -> None:
    """The text of a ProtocolError never shows what the frame carried."""
    with pytest.raises(ProtocolError) as refused:
        Codec(JSON).decode_client('{"t":"msgs","p":0,"m":[["secret-token",1]]}')
    assert "secret" not in str(refused.value)


@given(
    st.lists(
        st.tuples(st.integers(1, 2**53 - 1), st.one_of(st.binary(max_size=50), st.from_type(str).map(json.dumps))),
        min_size=1,
        max_size=20,
        unique_by=lambda pair: pair[0],
    ),
    st.sampled_from([JSON, MSGPACK]),
)
def test_messages_survive_the_round_trip(pairs: list[tuple[int, str | bytes]], subprotocol: str) -> None:
    """Payloads arrive as they were sent, byte for byte, in both encodings."""
    from durablews.wire.frames import ItemMeta

    items = [Item(seq, payload, ItemMeta()) for seq, payload in sorted(pairs)]
    codec = Codec(subprotocol)
    data = codec.encode_msgs(3, None, [item.outgoing() for item in items])
    frame = codec.decode_client(data.decode() if codec.text else data)
    assert isinstance(frame, Msgs)
    assert [(i.seq, i.payload) for i in frame.items] == [(i.seq, i.payload) for i in items]
