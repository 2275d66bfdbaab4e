"""A TCP proxy on loopback that treats connections as bad networks do, and a schedule of faults that a seed repeats.

    async with ChaosProxy(lambda: server.port) as proxy:
        ...                                              # connect to proxy.port
        proxy.newest.behave(Manner(swallow=True))        # half-open: both ends stand, nothing arrives
        proxy.newest.cut("reset", Direction.DOWN)        # the client learns that it is over, the server does not

Ends with no task and no descriptor left. One limit of any proxy: its kernel acknowledges what it receives, so a test of
the system's own timers (TCP_USER_TIMEOUT, keepalive) needs a packet filter instead.
"""

from __future__ import annotations

import asyncio
import enum
import random
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias, cast

__all__ = ["CLEAN", "DECK", "SWALLOW", "ChaosProxy", "Cut", "Direction", "Door", "Fault", "Manner", "Tunnel", "chaos"]

#: How a connection ends: it is forgotten at once, or the end is told that nothing more comes.
Cut: TypeAlias = Literal["reset", "fin"]
#: What becomes of a new connection: carried, refused by the system, accepted and reset, accepted and never answered.
Door: TypeAlias = Literal["open", "shut", "reset", "silent"]

#: The most that is read at a time, and the most that is read and not yet handed on, in bytes.
CHUNK, ROOM = 16 * 1024, 64 * 1024
# A rate-limited direction may catch up on so many seconds for which the loop was late: the average is what was asked.
_CATCH_UP = 0.05
# A reset throws away what its receiver has not read: after the last bytes before a cut it is given so many seconds.
_LAST_READ = 0.005
#: So many of the first bytes of a connection can be said again, on another one.
REMEMBERED = 64 * 1024
# So long an end that was told FIN may go on talking before its socket is closed under it (seconds).
_FAREWELL = 1.0


class Direction(enum.Flag):
    """Which way bytes go. As an end: UP leads to the server, DOWN to the client."""

    UP = enum.auto()
    DOWN = enum.auto()
    BOTH = UP | DOWN


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How one direction of a connection carries bytes.

    Attributes:
        delay: seconds that everything takes, in order.
        rate: bytes a second; None for as fast as it goes.
        piece: the most bytes handed on at a time; 1 is the smallest of drips.
        swallow: read everything, its end included, and hand on nothing. Such a connection can only be cut.
        stall: read nothing, so that the sender's buffers fill.
        cut_after: cut it after so many more bytes, in the way of `cut`.
    """

    delay: float = 0.0
    rate: float | None = None
    piece: int = CHUNK
    swallow: bool = False
    stall: bool = False
    cut_after: int | None = None
    cut: Cut = "reset"

    @property
    def step(self) -> int:
        """How many bytes are taken at a time: of a slow link never more than it carries in 20 ms."""
        return self.piece if self.rate is None else max(1, min(self.piece, int(self.rate / 50)))


CLEAN, SWALLOW = Manner(), Manner(swallow=True)


class Pipe(asyncio.BufferedProtocol):
    """Reads one end of a connection and hands on to the other. `received`, `carried`, `swallowed` count bytes.

    `said` holds the first of those received.
    """

    back: Pipe  # the other direction: what it reads from is what this one writes to

    def __init__(self, tunnel: Tunnel, manner: Manner) -> None:
        self._tunnel, self._loop = tunnel, asyncio.get_running_loop()
        self._buffer = bytearray()
        # When each item is due at the other end: bytes, or how this end has ended.
        self._queue: deque[tuple[float, bytes | Cut]] = deque()
        self._queued = 0
        self._timer: asyncio.TimerHandle | None = None
        self._farewell: asyncio.TimerHandle | None = None
        self._free_at = self._last_due = 0.0
        self._full = False
        self._told: Cut | None = None
        self.manner, self._left = manner, manner.cut_after
        self.end: asyncio.Transport | None = None
        self.received = self.carried = self.swallowed = 0
        self.said = bytearray()
        #: Whether its end has ended by itself, and whether that was handed on.
        self.ended = self.finished = False
        self.closed = asyncio.Event()

    def behave(self, manner: Manner) -> None:
        self.manner, self._left = manner, manner.cut_after
        if manner.swallow:
            self.swallowed += self._queued
            self._queue.clear()
            self._queued = 0
        self.steer()

    def tell(self, how: Cut) -> None:
        """End what this direction reads from."""
        if self._told == how or self.end is None:
            return
        self._told = how
        with suppress(OSError):  # it may have ended just now
            if how == "reset":
                sock = self.end.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self.end.write_eof()
        if how == "reset":
            self.end.abort()
        elif self.ended:
            self.end.close()
        else:
            # Closed now, with bytes unread, it would be reset: what comes is swallowed, up to its own end.
            self._farewell = self._loop.call_later(_FAREWELL, self.end.abort)

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.end = cast(asyncio.Transport, transport)
        self.end.pause_reading()

    def get_buffer(self, sizehint: int) -> bytearray:
        self._buffer = bytearray(min(self.manner.step, CHUNK))
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self.received += count
        self.said += self._buffer[: min(count, REMEMBERED - len(self.said))]
        if self.manner.swallow:
            self.swallowed += count
            return
        arrives = now = self._loop.time()
        if self.manner.rate is not None:  # the link is busy with it for so long, and takes nothing else
            arrives = self._free_at = max(self._free_at, now - _CATCH_UP) + count / self.manner.rate
        self._put(arrives, bytes(self._buffer[:count]))

    def eof_received(self) -> bool:
        self._has_ended("fin")
        return self._told is None  # stay, and be written to

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_ended("reset")
        self.closed.set()
        if self._farewell is not None:
            self._farewell.cancel()

    def pause_writing(self) -> None:
        self.back._full = True
        self.back.steer()

    def resume_writing(self) -> None:
        self.back._full = False
        self.back.steer()

    # -- from one end to the other

    def _has_ended(self, how: Cut) -> None:
        if not self.ended and not self.manner.swallow:
            self._put(self._loop.time(), how)  # behind all bytes
        self.ended = True

    def _put(self, arrives: float, item: bytes | Cut) -> None:
        self._last_due = max(self._last_due, arrives + self.manner.delay)
        self._queue.append((self._last_due, item))
        self._queued += len(item) if isinstance(item, bytes) else 0
        self._deliver()

    def _deliver(self) -> None:
        while self._queue and self._queue[0][0] <= self._loop.time():
            item = self._queue.popleft()[1]
            if isinstance(item, bytes):
                self._queued -= len(item)
                self._write(item[: self._left])
            else:
                self.finished = True
                self._tunnel.ended(self, item)
        self.steer()

    def _write(self, piece: bytes) -> None:
        end = self.back.end
        if end is None or end.is_closing():
            self.swallowed += len(piece)
            return
        end.write(piece)
        self.carried += len(piece)
        if self._left is not None:
            self._left -= len(piece)
            if self._left == 0:
                self._loop.call_later(_LAST_READ, self._tunnel.cut, self.manner.cut)
                self.behave(SWALLOW)

    def steer(self) -> None:
        """Read or do not, and look again when something is due."""
        if self.end is None or (self.back.end is None and not self.manner.swallow):
            return
        busy = self._free_at > self._loop.time()
        if self.manner.swallow or not (self.manner.stall or busy or self._full or self._queued >= ROOM):
            self.end.resume_reading()
        else:
            self.end.pause_reading()
        due = min([*([self._queue[0][0]] if self._queue else []), *([self._free_at] if busy else [])], default=None)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if due is None else self._loop.call_at(due, self._deliver)


class Tunnel:
    """One connection through the proxy. `over` is set when it has ended or was cut, towards one end at least."""

    def __init__(self, manner: Mapping[Direction, Manner]) -> None:
        self.over = asyncio.Event()
        self.up, self.down = Pipe(self, manner[Direction.UP]), Pipe(self, manner[Direction.DOWN])
        self.up.back, self.down.back = self.down, self.up

    def behave(self, manner: Manner, direction: Direction = Direction.BOTH) -> None:
        """Carry bytes in this manner from now on."""
        if not self.over.is_set():
            for way, pipe in ((Direction.UP, self.up), (Direction.DOWN, self.down)):
                if way in direction:
                    pipe.behave(manner)

    def cut(self, how: Cut = "reset", to: Direction = Direction.BOTH) -> None:
        """End it for the client (DOWN), the server (UP) or both.

        An end that is spared stays half-open: whatever it says is swallowed, until another cut ends it too.
        """
        self.over.set()
        for pipe in (self.up, self.down):
            pipe.behave(SWALLOW)
        for way, pipe in ((Direction.DOWN, self.up), (Direction.UP, self.down)):
            if way in to:
                pipe.tell(how)

    def ended(self, pipe: Pipe, how: Cut) -> None:
        """Hand on that the end that `pipe` reads from has ended by itself."""
        if how == "reset" or pipe.back.finished:
            self.cut(how)
        elif pipe.back.end is not None:
            with suppress(OSError):
                pipe.back.end.write_eof()

    async def closed(self) -> None:
        for pipe in (self.up, self.down):
            if pipe.end is not None:
                await pipe.closed.wait()


class ChaosProxy:
    """Carries connections from a port of its own to a server on loopback, as well or as badly as it is told.

    Args:
        target: the server's port, or what gives it, asked for each connection.
        receive_buffer: bytes of SO_RCVBUF and SO_SNDBUF on both sides: without it the kernel takes megabytes of what a
            slow or stalled link would leave with the sender.
    """

    newest: Tunnel  # the connection that was carried last, also when it has ended since

    def __init__(self, target: int | Callable[[], int], *, receive_buffer: int | None = None) -> None:
        self._target = target if callable(target) else lambda: target
        self._receive_buffer = receive_buffer
        self._manner = {Direction.UP: CLEAN, Direction.DOWN: CLEAN}
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self.port = 0
        #: Connections that came, whatever became of them, and those that are still there, oldest first.
        self.accepted = 0
        self.tunnels: list[Tunnel] = []

    async def __aenter__(self) -> Self:
        await self.set_door("open")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stop_listening()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def behave(self, manner: Manner, direction: Direction = Direction.BOTH) -> None:
        """Carry bytes in this manner from now on, on every connection and on those to come."""
        self._manner.update({way: manner for way in self._manner if way in direction})
        for tunnel in self.tunnels:
            tunnel.behave(manner, direction)

    def cut(self, how: Cut = "reset", to: Direction = Direction.BOTH) -> None:
        """End every connection, those included that were left half-open or unanswered."""
        for tunnel in self.tunnels:
            tunnel.cut(how, to)

    async def repeat(self, tunnel: Tunnel, lasting: float) -> None:
        """Say to the server, on a connection of its own, all that a client has said, and swallow what it answers.

        So does a retrying proxy, or a packet that comes late. It stands for so many seconds, and is reset.
        """
        loop = asyncio.get_running_loop()
        with suppress(OSError, TimeoutError), self._socket() as far:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            async with asyncio.timeout(lasting):
                await loop.sock_connect(far, ("127.0.0.1", self._target()))
                await loop.sock_sendall(far, bytes(tunnel.up.said))
                while await loop.sock_recv(far, CHUNK):
                    pass

    async def set_door(self, door: Door) -> None:
        """Do this with new connections from now on."""
        await self._stop_listening()
        # Bound also while it is shut, so that the port stays ours: a socket that does not listen refuses.
        self._listener = self._socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        if door != "shut":
            self._listener.listen(128)
            self._accepting = asyncio.create_task(self._accept(self._listener, door), name="chaos door")

    async def _stop_listening(self) -> None:
        accepting, self._accepting = self._accepting, None
        if accepting is not None:
            # asyncio loses what comes in just when an accept is cancelled: a last connection ends it instead.
            with self._socket() as bell:
                await asyncio.get_running_loop().sock_connect(bell, ("127.0.0.1", self.port))
                await accepting
        if self._listener is not None:
            self._listener.close()

    def _socket(self) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        if self._receive_buffer is not None:  # what accept() gives inherits them
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._receive_buffer)
        return sock

    async def _accept(self, listener: socket.socket, door: Door) -> None:
        while True:
            with suppress(ConnectionError):
                near, _ = await asyncio.get_running_loop().sock_accept(listener)
                if self._accepting is None:
                    near.close()
                    return
                self.accepted += 1
                task = asyncio.create_task(self._serve(near, door), name="chaos tunnel")
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)

    async def _serve(self, near: socket.socket, door: Door) -> None:
        loop, tunnel = asyncio.get_running_loop(), Tunnel(self._manner)
        with near, self._socket() as far:
            try:
                if door == "open":
                    try:
                        await loop.sock_connect(far, ("127.0.0.1", self._target()))
                    except OSError:
                        door = "reset"
                await loop.connect_accepted_socket(lambda: tunnel.up, near)
                if door == "open":
                    await loop.create_connection(lambda: tunnel.down, sock=far)
                self.newest = tunnel
                self.tunnels.append(tunnel)
                for pipe in (tunnel.up, tunnel.down):
                    pipe.steer()
                if door != "reset":
                    await tunnel.closed()
            finally:
                tunnel.cut()
                await tunnel.closed()
                if tunnel in self.tunnels:
                    self.tunnels.remove(tunnel)


# -- what happens when


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to one connection: `after` seconds of peace, at most `lasting` in a manner, then a cut.

    With `repeat` another connection says to the server meanwhile what this one has said. And to those that follow, for
    `next_for` seconds: a door, and a manner.
    """

    kind: str
    after: float
    manner: Manner = CLEAN
    direction: Direction = Direction.BOTH
    lasting: float = 0.0
    repeat: bool = False
    cut: Cut = "reset"
    to: Direction = Direction.BOTH
    door: Door = "open"
    next_manner: Manner = CLEAN
    next_direction: Direction = Direction.BOTH
    next_for: float = 0.0

    async def strike(self, proxy: ChaosProxy, tunnel: Tunnel) -> bool:
        """Let it happen; return False when the connection had ended before."""
        with suppress(TimeoutError):
            await asyncio.wait_for(tunnel.over.wait(), self.after)
            return False
        tunnel.behave(self.manner, self.direction)
        if self.repeat:
            await proxy.repeat(tunnel, self.lasting)
        else:
            with suppress(TimeoutError):
                await asyncio.wait_for(tunnel.over.wait(), self.lasting)
        if self.next_for:  # before the cut: a client may be back at once
            await proxy.set_door(self.door)
            proxy.behave(self.next_manner, self.next_direction)
        if not tunnel.over.is_set():
            tunnel.cut(self.cut, self.to)
        if self.next_for:
            await asyncio.sleep(self.next_for)
            await proxy.set_door("open")
            proxy.behave(CLEAN)
            proxy.cut()  # who was not answered would wait for it
        return True


#: How many faults of each kind there are in every hundred.
DECK = {
    **{"reset": 22, "duplicate": 3, "fin": 20, "mid-frame": 22, "half-open": 10},
    **{"refused": 2, "slammed": 2, "unanswered": 2, "mid-handshake": 3},
    **{"swallow": 3, "stall": 3, "delay": 3, "drip": 3, "crumbs": 2},
}


def chaos(seed: int, *, peace: float = 0.02, patience: float = 10.0) -> Iterator[Fault]:
    """Yield faults without end: decks of them, shuffled. The same seed gives the same.

    Args:
        peace: the most seconds for which a connection is left alone first.
        patience: seconds for which one that swallows or stalls stands where the ends may find that out by themselves.
    """
    chance = random.Random(seed)
    while True:
        for kind in chance.sample(list(DECK), k=sum(DECK.values()), counts=DECK.values()):
            one_way = chance.choice((Direction.UP, Direction.DOWN))
            ways = chance.choice((one_way, Direction.BOTH))
            cut: Cut = chance.choice(("reset", "fin"))
            silence = patience if chance.random() < 0.3 else chance.uniform(0.05, 0.2)
            slowness = {"direction": ways, "lasting": chance.uniform(0.05, 0.2), "cut": cut}
            # Up go messages, down come acks.
            middle = Manner(cut_after=chance.randrange(2000 if one_way is Direction.UP else 40), cut=cut)
            following = {"next_for": chance.uniform(0.02, 0.06)}
            # Within the request and the hello, within the answer: before the client is welcomed.
            early = Manner(cut_after=chance.randrange(350 if one_way is Direction.UP else 200), cut=cut)
            rate, piece = chance.uniform(5e3, 5e4), chance.randint(50, 1500)
            more: dict[str, dict[str, Any]] = {
                "reset": {},
                "duplicate": {"repeat": True, "lasting": chance.uniform(0.05, 0.2)},
                "fin": {"cut": "fin"},
                # Nothing may come that way: it is cut all the same.
                "mid-frame": {"manner": middle, "direction": one_way, "lasting": 0.06},
                "half-open": {"to": Direction.DOWN},
                "refused": {"door": "shut", **following},
                "slammed": {"door": "reset", **following},
                "unanswered": {"door": "silent", **following},
                "mid-handshake": {"next_manner": early, "next_direction": one_way, **following},
                "swallow": {"manner": SWALLOW, "direction": ways, "lasting": silence},
                "stall": {"manner": Manner(stall=True), "direction": ways, "lasting": silence},
                "delay": {"manner": Manner(delay=chance.uniform(0.01, 0.1)), **slowness},
                "drip": {"manner": Manner(rate=rate, piece=piece), **slowness},
                "crumbs": {"manner": Manner(piece=1), **slowness},
            }
            yield Fault(kind=kind, after=chance.uniform(0, peace), **more[kind])
