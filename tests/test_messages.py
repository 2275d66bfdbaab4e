"""What a user sends: checked and measured before anything is written."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import math
import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from durablews.errors import PayloadError
from durablews.messages import (
    HIGH,
    LOW,
    NORMAL,
    checksum,
    decode_payload,
    draft,
    encode_payload,
    priority_name,
    priority_number,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)


@given(JSON)
def test_what_is_json_comes_back_as_it_was(payload: Any) -> None:
    """Any JSON value is stored as JSON text that every language reads, and decodes to itself."""
    stored = encode_payload(payload)
    assert isinstance(stored, str)
    assert "\0" not in stored
    assert decode_payload(stored) == payload == json.loads(stored)


@given(st.binary())
def test_bytes_are_stored_as_they_are(payload: bytes) -> None:
    """bytes, bytearray and memoryview are stored as bytes, copied where the caller could change them."""
    assert encode_payload(payload) == decode_payload(encode_payload(payload)) == payload
    changing = bytearray(payload)
    for kind in (changing, memoryview(changing)):
        stored = encode_payload(kind)
        assert type(stored) is bytes
        assert stored == payload


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Reading:
    celsius: float
    at: datetime.date


@pytest.mark.parametrize(
    ("payload", "stored"),
    [
        (Reading(21.5, datetime.date(2026, 11, 22)), '{"celsius":21.5,"at":"2026-11-22"}'),
        (Colour.RED, '"red"'),
        ({1: "a"}, '{"1":"a"}'),
        ("ä\0", '"ä\\u0000"'),
        (math.nan, "null"),
    ],
)
def test_what_msgspec_encodes_is_a_payload(payload: Any, stored: str) -> None:
    """Structs, dataclasses, enums and dates are stored as msgspec writes them."""
    assert encode_payload(payload) == stored


NESTED: list[Any] = []
for _ in range(100_000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    "payload", [object(), "\ud800", {"a": "\udfff"}, {(1, 2): 3}, 1j, NESTED], ids=lambda p: type(p).__name__
)
def test_what_cannot_be_stored_is_said_before_it_is_written(payload: Any) -> None:
    """Every value that has no JSON raises `PayloadError` that names its type and keeps the cause."""
    with pytest.raises(PayloadError, match=f"a payload of type {type(payload).__name__} cannot be stored") as caught:
        encode_payload(payload)
    assert caught.value.__cause__ is not None


def test_no_error_shows_what_was_sent() -> None:
    """An error about a payload says what kind of thing it was, not what stood in it."""
    for payload in ({"password": "geheim", "x": object()}, ["geheim", "\ud800"], {("geheim", 1): 2}):
        with pytest.raises(PayloadError) as caught:
            draft(payload)
        assert "geheim" not in str(caught.value)


# -- priorities


@pytest.mark.parametrize(("name", "number"), [("low", LOW), ("normal", NORMAL), ("high", HIGH)])
def test_a_priority_has_a_name_and_a_number(name: str, number: int) -> None:
    """low, normal and high are -1, 0 and 1, in both directions."""
    assert priority_number(name) == priority_number(number) == number == ["low", "normal", "high"].index(name) - 1
    assert priority_name(number) == name
    assert draft(1, priority=name).priority == number


@given(st.integers(-100, 100))
def test_every_number_in_range_is_a_priority(number: int) -> None:
    """-100 to 100 are taken as they are; a number without a name is its own."""
    assert priority_number(number) == draft(1, priority=number).priority == number
    assert priority_name(number) in ("low", "normal", "high", str(number))


@pytest.mark.parametrize(
    "bad", [101, -101, 10**30, True, False, 0.0, 1.0, 0.5, math.nan, "urgent", "HIGH", "1", "", None, b"high", []]
)
def test_what_is_no_priority_is_refused(bad: Any) -> None:
    """Neither a number out of range nor a word that is not one of the three passes for a priority."""
    for check in (priority_number, lambda priority: draft(1, priority=priority)):
        with pytest.raises(PayloadError, match="priority must be low, normal, high or an integer from -100 to 100"):
            check(bad)


# -- drafts


@given(
    st.binary() | JSON,
    st.none() | TEXT,
    st.dictionaries(TEXT, TEXT),
)
def test_a_message_is_measured_in_bytes(payload: Any, topic: str | None, headers: dict[str, str]) -> None:
    """The size is that of payload, topic and headers in UTF-8, and the checksum is the payload's CRC-32."""
    one = draft(payload, topic=topic, headers=headers)
    raw = one.payload if isinstance(one.payload, bytes) else one.payload.encode()
    assert one.checksum == zlib.crc32(raw) == checksum(one.payload)
    assert one.bytes == len(raw) + len((topic or "").encode()) + len((one.headers or "").encode())
    assert (json.loads(one.headers) if one.headers else {}) == headers


def test_a_message_needs_nothing_but_its_payload() -> None:
    """The defaults: normal priority, no topic, no headers, no ttl, no id."""
    one = draft({"a": 1})
    assert (one.priority, one.topic, one.headers, one.ttl, one.id) == (0, None, None, None, None)
    assert draft(1, headers={}).headers is None
    with pytest.raises(AttributeError):
        one.priority = 1  # type: ignore[misc]


@pytest.mark.parametrize(("ttl", "milliseconds"), [(1, 1000), (0.001, 1), (2.5, 2500), (1e11, 10**14), (None, None)])
def test_a_ttl_is_kept_in_milliseconds(ttl: float | None, milliseconds: int | None) -> None:
    """Seconds in, whole milliseconds kept, from one millisecond to three thousand years."""
    assert draft(1, ttl=ttl).ttl == milliseconds


@pytest.mark.parametrize("ttl", [0, -1, 0.0009, math.nan, math.inf, -math.inf, 1e12, "5s", b"5", [], 10**400])
def test_what_is_no_ttl_is_refused(ttl: Any) -> None:
    """Zero, negative, endless and not a number are errors, not messages that expire at once or never."""
    with pytest.raises(PayloadError, match="ttl must be a number of seconds"):
        draft(1, ttl=ttl)


@pytest.mark.parametrize("what", ["topic", "id"])
@pytest.mark.parametrize("bad", [5, b"text", ["a"], "\ud800"])
def test_what_is_no_text_is_refused(what: str, bad: Any) -> None:
    """A topic or an id that is not valid Unicode text is an error that names which."""
    with pytest.raises(PayloadError, match=f"^{what} "):
        draft(1, **{what: bad})


@pytest.mark.parametrize(
    "bad", [{"a": 1}, {1: "a"}, {"a": None}, {"a": "\ud800"}, ["ab"], [], 0, 5, "", "text", {"a": b"b"}]
)
def test_what_are_no_headers_are_refused(bad: Any) -> None:
    """Headers are a mapping of strings to strings and nothing else."""
    with pytest.raises(PayloadError, match="headers must be a mapping of strings to strings"):
        draft(1, headers=bad)


def test_headers_may_be_any_mapping() -> None:
    """What behaves like a dict of strings is taken, in its order."""
    import types

    assert draft(1, headers=types.MappingProxyType({"b": "1", "a": "2"})).headers == '{"b":"1","a":"2"}'


def test_an_encoder_error_of_a_type_of_its_own_is_ours() -> None:
    """msgspec's own errors come out as `PayloadError` too."""

    class Strange(msgspec.Struct):
        inner: Any

    with pytest.raises(PayloadError):
        encode_payload(Strange(object()))
