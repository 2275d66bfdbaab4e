"""The server's rules of PROTOCOL.md section 4, without socket or database."""

from __future__ import annotations

import json
from typing import Any

import pytest

from durablews.errors import ProtocolError
from durablews.receiver.session import Close, Refusal, Reply, Session, StateLost
from durablews.wire.frames import JSON, MSGPACK, Codec, Hello, Item, ItemMeta, Msgs

STREAM = "ab" * 16
HELLO = Hello(STREAM, "0123456789abcdef", 0, 1 << 20)


def fresh() -> Session:
    return Session(Codec(JSON), window=8, max_bytes=65_536)


def welcomed() -> Session:
    session = fresh()
    session.welcome(HELLO, rewound=False)
    return session


def msgs(*seqs: int, after: int | None = None, priority: int = 0) -> Msgs:
    return Msgs(priority, after, [Item(seq, "1", ItemMeta()) for seq in seqs])


def told(frames: Any) -> list[dict[str, Any]]:
    assert isinstance(frames, list)
    return [json.loads(frame) for frame in frames]


def test_hello_is_answered_with_window_and_limit() -> None:
    """The welcome names the window and the largest frame."""
    session = fresh()
    data = Codec(JSON).encode(HELLO).decode()
    assert session.receive(data) == HELLO
    assert json.loads(session.welcome(HELLO, rewound=False)) == {"t": "welcome", "window": 8, "max_bytes": 65_536}


def test_frames_are_bytes_in_messagepack() -> None:
    """In MessagePack every answer is a binary message, in JSON a text message."""
    session = Session(Codec(MSGPACK), window=8, max_bytes=65_536)
    assert isinstance(session.welcome(HELLO, rewound=False), bytes)
    assert isinstance(session.push('{"a":1}'), bytes)
    assert isinstance(welcomed().push('{"a":1}'), str)


@pytest.mark.parametrize("data", ['{"t":"msgs","p":0,"m":[[1,1]]}', '{"t":"ping","n":1}'], ids=["msgs", "ping"])
def test_s7_the_first_frame_must_be_hello(data: str) -> None:
    """S7: anything that is known and comes before hello is a protocol error, 4400."""
    with pytest.raises(ProtocolError) as refused:
        fresh().receive(data)
    assert refused.value.close_code == 4400


@pytest.mark.parametrize(
    "data",
    [
        '{"t":"msgs","p":101,"m":[[1,1]]}',
        '{"t":"msgs","p":0,"m":[]}',
        '{"t":"msgs","p":0,"m":[[2,1],[1,1]]}',
        '{"t":"msgs","p":0,"m":[[0,1]]}',
        "nonsense",
        b"\x81",
    ],
    ids=["priority out of range", "empty", "descending", "sequence zero", "no JSON", "binary"],
)
def test_s7_what_makes_no_sense_is_a_protocol_error(data: Any) -> None:
    """S7: p out of range, an empty m, sequences out of order or a malformed frame are refused with 4400."""
    with pytest.raises(ProtocolError) as refused:
        welcomed().receive(data)
    assert refused.value.close_code == 4400


def test_frames_of_a_later_version_are_ignored() -> None:
    """An unknown type is ignored, before hello too."""
    assert fresh().receive('{"t":"later"}') is None
    assert welcomed().receive('{"t":"later"}') is None


def test_a_ping_is_answered() -> None:
    """A client's ping is answered by a pong with its number."""
    assert welcomed().receive('{"t":"ping","n":7}') == Reply('{"t":"pong","n":7}')


def test_a_second_hello_needs_a_rewound_welcome() -> None:
    """Section 5: hello comes again after a rewound welcome only, and messages wait for it."""
    data = Codec(JSON).encode(HELLO).decode()
    with pytest.raises(ProtocolError):
        welcomed().receive(data)
    session = fresh()
    assert json.loads(session.welcome(HELLO, rewound=True))["rewound"] is True
    with pytest.raises(ProtocolError):
        session.receive('{"t":"msgs","p":0,"m":[[1,1]]}')
    assert session.receive(data) == HELLO
    session.welcome(HELLO, rewound=False)
    assert isinstance(session.receive('{"t":"msgs","p":0,"m":[[1,1]]}'), Msgs)


def test_a_second_rewound_running_is_a_protocol_error() -> None:
    """Section 5: a client whose new stream was seen before is closed with 4400."""
    session = fresh()
    session.welcome(HELLO, rewound=True)
    with pytest.raises(ProtocolError) as refused:
        session.welcome(HELLO, rewound=True)
    assert refused.value.close_code == 4400


def test_s2_repeats_are_left_out() -> None:
    """S2: what lies at or below the number is not applied again."""
    assert [item.seq for item in welcomed().judge(msgs(3, 5, 9), 5) or []] == [9]
    assert welcomed().judge(msgs(3, 5), 5) == []


def test_s3_a_frame_behind_a_nack_is_ignored() -> None:
    """S3: after a nack, frames whose predecessor was not taken are ignored until the client repeats."""
    session = welcomed()
    session.settled(msgs(1, 2), 1, (2, Refusal("invalid")))
    assert session.judge(msgs(3, after=2), 1) is None
    assert [item.seq for item in session.judge(msgs(3, after=1), 1) or []] == [3]


def test_s3_a_frame_behind_a_failure_is_ignored() -> None:
    """S3: so it is after a failed transaction."""
    session = welcomed()
    session.failed(msgs(1, 2), 0)
    assert session.judge(msgs(3, after=2), 0) is None


def test_s3_an_unknown_predecessor_means_that_state_was_lost() -> None:
    """S3: without a nack or failure in this priority, a missing predecessor is the server's loss."""
    session = welcomed()
    session.settled(msgs(1, priority=1), 0, (1, Refusal("invalid")))
    with pytest.raises(StateLost):
        session.judge(msgs(3, after=2), 0)


def test_s1_only_what_is_applied_is_acked() -> None:
    """S1: a frame of which nothing was applied gets no ack; one of which a part was gets ack, then nack."""
    assert told(welcomed().settled(msgs(4, 5), 3, (4, Refusal("invalid", "no")))) == [
        {"t": "nack", "p": 0, "s": 4, "final": True, "code": "invalid", "reason": "no"}
    ]
    assert [f["t"] for f in told(welcomed().settled(msgs(4, 5), 4, (5, Refusal("busy", retry=0.5))))] == ["ack", "nack"]


def test_a_retry_is_in_milliseconds() -> None:
    """A refusal for now carries its delay in ms and is not final."""
    (nack,) = told(welcomed().settled(msgs(4), 3, (4, Refusal("rate", retry=0.25))))
    assert nack == {"t": "nack", "p": 0, "s": 4, "code": "rate", "retry": 250}


def test_s4_a_failure_is_nacked_or_closed() -> None:
    """S4: a failed frame's first sequence is nacked when it is above the number; else, or unknown, 1013."""
    (nack,) = told(welcomed().failed(msgs(4, 5), 3))
    assert (nack["t"], nack["s"], nack["retry"], nack.get("final")) == ("nack", 4, 5000, None)
    for number in (4, 9, None):
        assert isinstance(close := welcomed().failed(msgs(4, 10), number), Close)
        assert close.code == 1013


def test_s4_an_ignored_frame_is_not_nacked_when_it_fails() -> None:
    """S4: a frame whose predecessor was not taken is never nacked."""
    session = welcomed()
    session.failed(msgs(1), 0)
    assert isinstance(session.failed(msgs(3, after=2), 0), Close)


def test_a_close_reason_fits_into_its_frame() -> None:
    """However long a reason is, the close frame can carry it, cut at a character."""
    assert len(Close.because(4400, "ä" * 200).reason.encode()) == 122
