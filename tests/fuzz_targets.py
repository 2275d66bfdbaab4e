"""What is fed with arbitrary bytes: every decoder, and the two state machines behind them. `fuzz` drives it.

A target takes bytes and returns; whatever it raises is a finding. Nothing here knows of a fuzzer: the plain tests
replay the committed corpus through the same functions.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

from fuzz_delivery import delivery

from durablews.config import ReconnectConfig, Settings, read_environment, read_settings
from durablews.configfile import load
from durablews.delivery.suspicion import Closed
from durablews.dialling import server_date
from durablews.endpoint import check_url
from durablews.errors import ConfigError, ProtocolError
from durablews.netlink import NetworkNews
from durablews.receiver import ledger
from durablews.receiver.exchange import Exchange, Outcome
from durablews.receiver.messages import Message
from durablews.receiver.session import Refusal, Session, StateLost
from durablews.reconnection import Reconnection, closed_outcome, refused_outcome
from durablews.wire.frames import JSON, MSGPACK, Ack, Codec, Hello, Item, ItemMeta, Msgs, Nack, Push

__all__ = ["TARGETS", "Script"]


class Script:
    """Bytes as a list of decisions; when they are used up, all further ones are 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def piece(self) -> bytes:
        """Return as many bytes as the next one says."""
        length = self.byte()
        self._at += length
        return self._data[self._at - length : self._at]


# -- the wire


def _text(data: bytes) -> str:
    # What websockets gives for a text message is UTF-8; a lone surrogate shows what a careless shell would pass on.
    return data.decode(errors="surrogateescape" if data[:1] == b"\xff" else "replace")


def _decode(codec: Codec, data: str | bytes) -> None:
    for decoder in (codec.decode_server, codec.decode_client):
        try:
            frame = decoder(data)
        except ProtocolError as exc:
            _look_at(exc)
            continue
        if isinstance(frame, Msgs):
            assert frame.items
            again = codec.encode_msgs(frame.priority, frame.after, [item.outgoing() for item in frame.items])
            second = codec.decode_client(again.decode() if codec.text else again)
            assert isinstance(second, Msgs)
            assert [(item.seq, item.payload) for item in second.items] == [(i.seq, i.payload) for i in frame.items]
        elif isinstance(frame, Push):
            codec.encode_push(frame.payload)
        elif frame is not None:
            again = codec.encode(frame)
            assert decoder(again.decode() if codec.text else again) == frame


def _look_at(error: ProtocolError) -> None:
    assert 4000 <= error.close_code < 5000
    assert len(str(error).encode(errors="replace")) < 500, "it quotes the frame"


def json_frames(data: bytes) -> None:
    """Whatever text a peer sends: a frame, None, or ProtocolError; what was understood survives the round trip."""
    _decode(Codec(JSON), _text(data))


def msgpack_frames(data: bytes) -> None:
    """The same for bytes."""
    _decode(Codec(MSGPACK), data)


# -- the receiver


@cache
def _new_ledger() -> bytes:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    ledger.install(connection)
    connection.execute("CREATE TABLE applied (id INTEGER PRIMARY KEY, stream, priority, seq)")
    image = connection.serialize()
    connection.close()
    return image


class _Injected(Exception):
    """The application failed, because the script says so."""


def receiver(data: bytes) -> None:
    """Whatever frames a client sends, on however many connections: each message is applied once, in order, before it is
    acked, and nothing but ProtocolError is raised inside."""
    script = Script(data)
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        connection.deserialize(_new_ledger())
        exchanges = [_exchange(script)]
        while script:
            choice = script.byte()
            if choice % 8 == 0 and len(exchanges) < 3:
                exchanges.append(_exchange(script))
            exchange = exchanges[choice // 8 % len(exchanges)]
            outcome = exchange.handle(connection, _client_frame(script, exchange.session.codec), _apply(script))
            _judge(connection, exchange, outcome)
    finally:
        connection.close()


def _exchange(script: Script) -> Exchange:
    choice = script.byte()
    codec = Codec(JSON if choice % 2 else MSGPACK)
    owner = (None, "one", "two")[choice // 2 % 3]
    return Exchange(Session(codec, window=choice, max_bytes=65_536), owner=owner, connection_id=f"c{choice}")


def _client_frame(script: Script, codec: Codec) -> str | bytes:
    kind = script.byte() % 6
    frame: bytes
    if kind == 0:
        frame = script.piece()
        return _text(frame) if codec.text else frame
    if kind == 1:
        frame = codec.encode(Hello(f"{script.byte() % 2:032x}", "0" * 16, script.byte(), 1 << 20))
    else:
        first, after = script.byte(), script.byte()
        items = [Item(first + n, "1", ItemMeta()) for n in range(1 + script.byte() % 4)]
        frame = codec.encode_msgs(first % 2, after or None, [item.outgoing() for item in items])
    return frame.decode() if codec.text else frame


def _apply(script: Script) -> Callable[[sqlite3.Connection, Message], Refusal | None]:
    def apply(connection: sqlite3.Connection, message: Message) -> Refusal | None:
        connection.execute(
            "INSERT INTO applied (stream, priority, seq) VALUES (?, ?, ?)",
            (message.stream, message.priority, message.seq),
        )
        mood = script.byte()
        if mood == 1:
            raise _Injected
        return Refusal("no", "n" * mood, mood / 10 if mood % 2 else None) if mood % 8 == 2 else None

    return apply


def _judge(connection: sqlite3.Connection, exchange: Exchange, outcome: Outcome) -> None:
    assert not connection.in_transaction
    assert outcome.error is None or isinstance(outcome.error, StateLost | _Injected), outcome.error
    numbers = {
        (stream, priority): seq
        for stream, priority, seq in connection.execute("SELECT stream, priority, seq FROM durablews_seen")
    }
    last: dict[tuple[str, int], int] = {}
    for stream, priority, seq in connection.execute("SELECT stream, priority, seq FROM applied ORDER BY id"):
        assert seq > last.get((stream, priority), 0), "applied twice, or out of order"
        last[stream, priority] = seq
    assert numbers == last, "the number is not what was applied"
    for data in outcome.frames:
        answer = exchange.session.codec.decode_server(data)
        if isinstance(answer, Ack):
            assert answer.s <= numbers.get((exchange.stream, answer.p), 0), "acked and not applied (S1)"
        elif isinstance(answer, Nack):
            assert answer.s > numbers.get((exchange.stream, answer.p), 0), "a repeat was nacked (S2)"


# -- files and headers


_FILES = ("agent.toml", "agent.json", "pyproject.toml", "agent")


@cache
def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="durablews-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def configuration(data: bytes) -> None:
    """Whatever stands in a configuration file or a variable: settings, or ConfigError."""
    kind, rest = (data[0], data[1:]) if data else (0, b"")
    try:
        settings = _read_variables(rest) if kind & 8 else _read_file(_FILES[kind % len(_FILES)], rest)
        if settings.url is not None:
            check_url(settings.url)
    except ConfigError:
        pass


def _read_file(name: str, data: bytes) -> Settings:
    path = os.path.join(_folder(), name)
    with open(path, "wb") as file:
        file.write(data)
    return read_settings(load(path), Settings, "")


def _read_variables(data: bytes) -> Settings:
    pairs = (line.partition("=") for line in data.decode(errors="surrogateescape").splitlines())
    return read_settings(read_environment({f"DURABLEWS_{name}": text for name, _, text in pairs}), Settings, "")


def _pieces(data: bytes) -> Iterator[bytes]:
    script = Script(data)
    while script:
        yield script.piece()


def netlink(data: bytes) -> None:
    """Whatever bytes come over a netlink socket: news or none, and a memory that ends."""
    news = NetworkNews()
    for piece in _pieces(data):
        assert news.feed(piece) in (True, False)
        question = news.ask()
        assert question is None or len(question) >= 16
        assert len(news._known) <= 1024


def headers(data: bytes) -> None:
    """Whatever a server says in its headers and close reasons: a delay from 0 to an hour, a date or none."""
    status, *said = [piece.decode("latin-1") for piece in _pieces(data)] or [""]
    given: dict[str, str] = dict(zip(("Retry-After", "Date"), said, strict=False))
    response: Any = SimpleNamespace(response=SimpleNamespace(headers=given))
    date = server_date(response)
    assert date is None or abs(date) < 2**62
    code = sum(status.encode("latin-1"))
    refused = refused_outcome("wss://x/", code, given)
    closed = Closed(code=code, reason="".join(said)[:120], received=True)
    ended = closed_outcome(closed, progressed=False, connected_for=0.0, asked=0.0, renewal=False)
    for outcome in (refused, ended):
        assert 0.0 <= outcome.at_least <= 3600.0
        _, pause = Reconnection(ReconnectConfig(), lambda: 0.5).ended(outcome)
        assert pause is not None
        assert 0.0 <= pause.delay <= 3600.0 + 30.0 * 11


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (json_frames, msgpack_frames, receiver, delivery, configuration, netlink, headers)
}
