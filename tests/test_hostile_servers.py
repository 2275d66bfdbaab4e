"""Servers that mean harm, against the real client in a process of its own: its memory stays bounded, nothing is deleted
that it did not deliver, and it delivers everything once the server has become sane.

The client is `durablews run`; what it may use is read off the kernel's own high-water mark (VmHWM in proc(5)). How much
a server throws at it is ``DURABLEWS_TEST_FRAMES``: 165 000 tiny frames unless it is set, 10 000 000 in the long form.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import struct
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from servers import COMMAND, ENVIRONMENT, PlainServer, Process, Trouble, running, until
from websockets.asyncio.server import ServerConnection

from durablews.outbox import Outbox

FRAMES = int(os.environ.get("DURABLEWS_TEST_FRAMES", "165000"))
#: Seconds for a client to get over it.
DEADLINE = 60.0 + FRAMES / 2_000_000 * 60
MESSAGES = 300
#: Bytes that a client's memory may grow while it is attacked. A frame of 1 MiB, which it must take, is there a few
#: times: in the socket's buffer, as bytes, as text and as a payload.
ROOM = 24 * 1024 * 1024
GIBIBYTE = 1 << 30

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="proc(5) tells the high-water mark")

TEXT, CONTINUATION, PING, PONG = 0x1, 0x0, 0x9, 0xA
FIN, COMPRESSED = 0x80, 0x40


def head(first: int, length: int) -> bytes:
    """Return the head of a server's frame (RFC 6455, section 5.2)."""
    if length < 126:
        return bytes([first, length])
    return struct.pack("!BBH", first, 126, length) if length < 1 << 16 else struct.pack("!BBQ", first, 127, length)


def frame(data: bytes | str, first: int = FIN | TEXT) -> bytes:
    data = data.encode() if isinstance(data, str) else data
    return head(first, len(data)) + data


def say(**said: object) -> bytes:
    return frame(json.dumps(said))


async def pour(ws: ServerConnection, pieces: Iterator[bytes]) -> int:
    """Write raw bytes for as long as the client is there and takes them; return how many the socket took."""
    poured = 0
    with contextlib.suppress(Exception):  # the client has hung up: how is its own affair
        for piece in pieces:
            if ws.transport.is_closing():
                break
            ws.transport.write(piece)
            poured += len(piece)
            await ws.drain()
            await asyncio.sleep(0)
    return poured - ws.transport.get_write_buffer_size()


def many(piece: bytes, count: int | None = None) -> Iterator[bytes]:
    """Yield a frame so many times, some 64 KiB of them at once."""
    together = max(1, (1 << 16) // len(piece))
    for _ in range((FRAMES if count is None else count) // together + 1):
        yield piece * together


class Client:
    """`durablews run` on an outbox with messages in it."""

    def __init__(self, folder: Path, process: Process) -> None:
        self.folder = folder
        self.process = process

    def memory(self) -> int:
        """Return the most memory that it ever had, in bytes."""
        for line in Path(f"/proc/{self.process.popen.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the client is gone")

    def left(self) -> set[int]:
        """Return which messages are no longer in the file at all; dead letters are."""
        with closing(sqlite3.connect(self.folder / "agent.db", timeout=10)) as connection:
            there = {int(row[0]) for row in connection.execute("SELECT payload FROM durablews_entries")}
        return set(range(MESSAGES)) - there

    def dead(self) -> int:
        with closing(sqlite3.connect(self.folder / "agent.db", timeout=10)) as connection:
            return int(connection.execute("SELECT dead_messages FROM durablews_totals").fetchone()[0])

    def error(self) -> str:
        return self.process.err.read_text()


class Attacks:
    """Troubles, one for each connection; when they are over the server is sane. What each cost in memory is kept."""

    def __init__(self, attacks: Sequence[Trouble], client: Callable[[], Client]) -> None:
        self._attacks = deque(attacks)
        self._client = client
        self._before = 0
        self.over = asyncio.Event()
        #: Bytes by which each attack raised what the client ever used.
        self.costs: list[tuple[str, int]] = []

    async def __call__(self, server: PlainServer, ws: ServerConnection) -> None:
        if not self._attacks:
            self.over.set()
            await server.behave(ws)
            return
        self._before = self._before or self._client().memory()
        attack = self._attacks.popleft()
        try:
            await attack(server, ws)
        finally:
            ws.transport.abort()
            self.costs.append((getattr(attack, "name", ""), self._client().memory() - self._before))


async def fight(
    folder: Path,
    *attacks: Trouble,
    compression: str | None = None,
    kept: Callable[[Client], set[int]],
) -> PlainServer:
    """Let one client meet all attacks, and then a sane server; return that when everything has arrived.

    Args:
        kept: called when the attacks are over: judges what is left in the outbox, and returns which messages are not.
    """
    async with Outbox(folder / "agent.db") as outbox:
        await outbox.send_many(range(MESSAGES))
    clients: list[Client] = []
    judged = asyncio.Event()

    async def wait(server: PlainServer, ws: ServerConnection) -> None:
        await judged.wait()

    trouble = Attacks([*attacks, wait], lambda: clients[0])
    server = PlainServer(trouble)
    server.compression = compression
    async with server:
        (folder / "agent.toml").write_text(
            f'url = "{server.url}"\noutbox = "{folder / "agent.db"}"\n'
            + (f'compression = "{compression}"\n' if compression else "")
            + "[reconnect]\nbase_delay = 0.02\nmax_delay = 0.05\n"
        )
        with running(folder, "run", [*COMMAND, "run", str(folder / "agent.toml")]) as process:
            clients.append(client := Client(folder, process))
            try:
                await until(lambda: len(trouble.costs) == len(attacks), DEADLINE)
                gone = kept(client)
            finally:
                judged.set()
            await until(lambda: len(set(server.payloads)) + client.dead() == MESSAGES - len(gone), DEADLINE)
            assert process.running, client.error()
            assert process.end(signal.SIGTERM, DEADLINE)[0] == 0, client.error()
        assert "Traceback" not in client.error()
        assert "defect" not in client.error()
    assert max(cost for _, cost in trouble.costs) < ROOM, f"bytes more: {trouble.costs}"
    return server


def keeps_all(client: Client) -> set[int]:
    assert (client.left(), client.dead()) == (set(), 0)
    return set()


# -- too much


def heads_of_a_gigabyte(poured: list[int]) -> Trouble:
    async def one_frame(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        poured.append(await pour(ws, iter([head(FIN | TEXT, GIBIBYTE), *[bytes(1 << 16)] * (GIBIBYTE >> 16)])))

    return one_frame


def fragments_of_a_gigabyte(poured: list[int]) -> Trouble:
    async def fragments(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        ws.transport.write(frame(bytes(1000), TEXT))
        poured.append(await pour(ws, many(frame(bytes(1 << 15), CONTINUATION), GIBIBYTE >> 15)))

    return fragments


async def test_a_gigabyte_is_not_taken(tmp_path: Path) -> None:
    """P6: what is larger than `max_message_size`, by its head or the sum of its fragments, is not read on."""
    poured: list[int] = []
    await fight(tmp_path, heads_of_a_gigabyte(poured), fragments_of_a_gigabyte(poured), kept=keeps_all)
    assert len(poured) == 2
    assert max(poured) < GIBIBYTE // 8


async def test_what_was_compressed_is_not_inflated_beyond_the_limit(tmp_path: Path) -> None:
    """P6: the limit counts what comes out of the compression: here 64 MiB out of 64 KiB."""

    async def bomb(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        deflate = zlib.compressobj(wbits=-12)
        data = b"".join(deflate.compress(bytes(1 << 20)) for _ in range(64)) + deflate.flush(zlib.Z_SYNC_FLUSH)
        assert 50_000 < len(data) < 1 << 20
        await pour(ws, iter([frame(data[:-4], FIN | COMPRESSED | TEXT)]))
        await ws.wait_closed()

    await fight(tmp_path, bomb, compression="deflate", kept=keeps_all)


TINY = {
    "a type of a later version": say(t="later"),
    "stray acks": say(t="ack", p=7, s=1),
    "stray nacks": say(t="nack", p=0, s=2**53 - 1, final=True),
    "pushes": say(t="push", d=1),
    "windows": say(t="flow", window=0) + say(t="flow", window=1),
    "welcomes": say(t="welcome", window=5, max_bytes=1 << 20),
    "rewound welcomes": say(t="welcome", window=5, max_bytes=1 << 20, rewound=True),
    "pongs": say(t="pong", n=1),
    "pings": say(t="ping", n=1),
    "pings of the WebSocket": frame(b"x" * 125, FIN | PING),
    "pongs of the WebSocket": frame(b"x", FIN | PONG),
}


def flood(kind: str) -> Trouble:
    async def attack(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws, window=1)
        reading = asyncio.create_task(_read_on(ws))
        await pour(ws, many(TINY[kind], FRAMES // len(TINY)))
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    attack.name = kind  # type: ignore[attr-defined]
    return attack


async def _read_on(ws: ServerConnection) -> None:
    while True:
        await ws.recv()


async def test_tiny_frames_without_end_fill_nothing(tmp_path: Path) -> None:
    """P6: however many frames a server sends, nothing of what they say is gathered, and the client outlives them."""
    await fight(tmp_path, *(flood(kind) for kind in TINY), kept=keeps_all)


def pour_unread(piece: bytes, first: bytes = b"") -> Trouble:
    async def attack(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        ws.transport.pause_reading()
        await pour(ws, iter([first]))
        await pour(ws, many(piece, 2 * FRAMES))

    return attack


async def test_a_server_that_pours_and_does_not_read_fills_nothing(tmp_path: Path) -> None:
    """P6: neither the empty fragments of a message that never ends, nor the pongs that nobody takes."""
    fragments = pour_unread(frame(b"", CONTINUATION), frame(b"", TEXT))
    await fight(tmp_path, pour_unread(frame(b"x" * 125, FIN | PING)), fragments, kept=keeps_all)


async def test_a_client_that_gathers_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is proven: without the bound on pongs the same flood shows in the client's memory."""
    (tmp_path / "sitecustomize.py").write_text("import durablews.dialling\ndurablews.dialling._MOST_UNREAD = 1 << 40\n")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}")
    with pytest.raises(AssertionError, match="bytes more"):
        await fight(tmp_path, pour_unread(frame(b"x" * 125, FIN | PING)), kept=keeps_all)


# -- lies


def acknowledge_everything(received: set[int]) -> Trouble:
    everything = [say(t="ack", p=priority, s=2**53 - 1) for priority in range(-100, 101)]

    async def acks(server: PlainServer, ws: ServerConnection) -> None:
        ws.transport.write(b"".join(everything))  # before the hello, before the welcome
        await server.greet(ws, window=8)
        for _ in range(3):
            received.update(payload for _, payload, *_ in (await server.hear(ws))["m"])
            ws.transport.write(b"".join(everything))
        with contextlib.suppress(TimeoutError):
            while True:  # what is on its way
                frame_ = await asyncio.wait_for(server.hear(ws), 0.5)
                received.update(payload for _, payload, *_ in frame_["m"])

    return acks


async def test_acks_for_everything_settle_only_what_is_in_flight(tmp_path: Path) -> None:
    """P2, C4: nothing leaves the outbox that was not sent to whoever acknowledged it."""
    received: set[int] = set()

    def kept(client: Client) -> set[int]:
        left = client.left()
        assert left
        assert left <= received
        assert client.dead() == 0
        return left

    await fight(tmp_path, acknowledge_everything(received), kept=kept)


def nack_everything(**said: object) -> Trouble:
    async def nacks(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws)
        for _ in range(5):
            for seq, *_ in (await server.hear(ws))["m"]:
                for wrong in (seq + 1000, seq, seq):
                    await server.say(ws, t="nack", p=0, s=wrong, **said)
        await asyncio.sleep(0)

    return nacks


async def test_nacks_for_everything_delete_nothing(tmp_path: Path) -> None:
    """P2: what is refused for good is a dead letter and kept whole; what is to be tried again waits; both are there."""
    dead = 0

    def kept(client: Client) -> set[int]:
        nonlocal dead
        assert client.left() == set()
        dead = client.dead()
        return set()

    server = await fight(tmp_path, nack_everything(retry=0), nack_everything(final=True), kept=kept)
    assert 0 < dead <= MESSAGES
    with closing(sqlite3.connect(tmp_path / "agent.db")) as connection:
        states = connection.execute("SELECT payload FROM durablews_entries WHERE ack_state = 2").fetchall()
    assert {int(row[0]) for row in states} | set(server.payloads) == set(range(MESSAGES))


async def test_answers_out_of_turn_confuse_nobody(tmp_path: Path) -> None:
    """P8: a welcome twice, one that is always rewound, a pause without end, nonsense and nesting: then all arrives."""

    async def twice(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws, window=2)
        await server.say(ws, t="welcome", window=1024, max_bytes=1 << 20)
        await server.say(ws, t="welcome", window=0, max_bytes=65_536, rewound=True)
        # The first counts: two at a time, one place of them kept for what is more urgent.
        assert len((await server.hear(ws))["m"]) == 1

    async def rewound(server: PlainServer, ws: ServerConnection) -> None:
        for _ in range(2):
            await server.greet(ws, rewound=True)
        await ws.wait_closed()
        assert ws.protocol.close_rcvd is not None
        assert ws.protocol.close_rcvd.code == 4400

    async def paused(server: PlainServer, ws: ServerConnection) -> None:
        await server.greet(ws, window=0)
        for _ in range(100):
            await server.say(ws, t="flow", window=0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(server.hear(ws), 0.5)

    def nested(text: str) -> Trouble:
        async def attack(server: PlainServer, ws: ServerConnection) -> None:
            await server.greet(ws)
            await ws.send(text)
            await ws.wait_closed()
            assert ws.protocol.close_rcvd is not None
            assert ws.protocol.close_rcvd.code == 4400

        return attack

    deep = "[" * 100_000 + "]" * 100_000
    nonsense = ["", "null", '{"t":"ack"', f'{{"t":"push","d":{deep}}}', f'{{"t":{deep}}}', '{"d":' * 100_000]
    await fight(tmp_path, twice, rewound, rewound, paused, *(nested(text) for text in nonsense), kept=keeps_all)
