"""The facade: `connect` and the client it gives."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from durablews.attempt import OnOpen
from durablews.config import Settings, merge, read_settings
from durablews.configfile import load
from durablews.draining import DrainedOutbox
from durablews.endpoint import Endpoint, check_url
from durablews.errors import ConfigError, OutboxClosed
from durablews.events import Disconnected, EventLog, Events, Failed
from durablews.lifecycle import State
from durablews.manager import ConnectionManager
from durablews.messages import decode_payload
from durablews.outbox import Counts, Receipt
from durablews.process import same_process, this_process
from durablews.providers import Provided
from durablews.wire.native import dialect_named

__all__ = ["Client", "Stats", "connect"]

# Pushes wait for the application in a buffer of so many messages or bytes; the oldest goes, counted.
_MOST_PUSHES, _MOST_PUSH_BYTES = 1000, 1024 * 1024


class Stats(Counts, frozen=True, kw_only=True):
    """How a client is doing: the counts of its outbox, and its link.

    Attributes:
        reason: why the link is as it is, as a sentence.
        blocked: what only the owner can mend.
        trouble: what ails the disk.
        next_attempt: when the next try is due, in ms since 1970 UTC; None when none is waited for.
        connects: welcomes so far.
        latency: seconds from a ping to its answer, averaged over the last ten; None before the first.
        heartbeat_interval: seconds of silence before a ping; it changes when it is adaptive.
        network_watch: why no change of the network wakes this client; None when it does.
    """

    state: str
    reason: str | None
    blocked: str | None
    trouble: str | None
    next_attempt: int | None
    connects: int
    latency: float | None
    heartbeat_interval: float
    network_watch: str | None
    pushes_dropped: int
    stray_answers: int


def connect(
    url: Provided = None,
    outbox: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | Settings | None = None,
    dialect: str | None = None,
    headers: Provided = None,
    token: Provided = None,
    on_open: OnOpen | None = None,
    veto: Callable[[Failed | Disconnected], Any] | None = None,
    **settings: Any,
) -> Client:
    """Return a client for ``async with``: it drains `outbox` to the server at `url` for as long as the block runs.

    Never raises because of the network and never waits for it.

    Args:
        url: ``ws://`` or ``wss://``; or a callable that gives it, sync or async, asked on every attempt. This and the
            other callables may take `auth.provider_timeout` seconds; one that is not async runs in a thread.
        outbox: the file; created when there is none.
        config: a TOML or JSON file, a mapping, or `Settings`; keywords count more.
        dialect: what the server speaks; ``"durablews.v1"``.
        headers: a mapping for the handshake, or a callable that gives one.
        token: a bearer token, or a callable that gives one. When the server does not accept it, the callable is asked
            again at once, and an answer that differs is tried at once.
        on_open: an async function that gets each new WebSocket (a `websockets` connection, with `send` and `recv`)
            before anything else is said on it, within `connect_timeout`: for an authentication message. Raising
            PermissionError says that the server does not accept the credentials.
        veto: a callable that gets each `events.Failed` and `events.Disconnected`; if it returns true, the link stops
            for good and everything is kept.
        settings: any table or setting of `Settings`: ``heartbeat={"interval": 20}``, ``durability="process"``.

    Raises:
        ConfigError: a setting is unknown, missing or out of its range.
    """
    layer = load(os.fspath(config)) if isinstance(config, str | os.PathLike) else merge({}, _fields(config))
    given: dict[str, Any] = {"url": url if isinstance(url, str) else None, "dialect": dialect}
    given["outbox"] = os.fspath(outbox) if outbox is not None else None
    explicit = {name: value for name, value in given.items() if value is not None}
    known = read_settings(merge(layer, settings, explicit), Settings, "")
    address = url if callable(url) else known.url
    if address is None:
        raise ConfigError("url is missing")
    if known.outbox is None:
        raise ConfigError("outbox is missing: name the file that keeps the messages")
    check_url(address)
    for name, hook in (("on_open", on_open), ("veto", veto)):
        if hook is not None and not callable(hook):
            raise ConfigError(f"{name} must be a callable, not {type(hook).__name__}")
    return Client(known, Endpoint(known, url=address, headers=headers, token=token), on_open=on_open, veto=veto)


def _fields(config: Mapping[str, Any] | Settings | None) -> Mapping[str, Any] | None:
    if isinstance(config, Settings):
        return {name: getattr(config, name) for name in config.__struct_fields__}
    return config


class Client:
    """A durable connection. Use it with ``async with``; iterate it for what the server pushes."""

    def __init__(
        self,
        settings: Settings,
        endpoint: Endpoint,
        *,
        on_open: OnOpen | None = None,
        veto: Callable[[Failed | Disconnected], Any] | None = None,
    ) -> None:
        assert settings.outbox is not None
        self._settings = settings
        self._outbox = DrainedOutbox(
            settings.outbox,
            durability=settings.durability,
            caps=settings.caps,
            commit_interval=settings.commit_interval,
        )
        self._outbox.window = settings.delivery.window
        self._events = EventLog()
        self._endpoint = endpoint
        self._on_open = on_open
        self._veto = veto
        self._dialect = dialect_named(settings.dialect)
        self._manager: ConnectionManager | None = None
        self._running: asyncio.Task[None] | None = None
        self._pushes: deque[str | bytes] = deque()
        self._push_bytes = self._pushes_dropped = 0
        self._pushed = asyncio.Event()
        self._closed = False
        self._stopping: asyncio.Task[None] | None = None
        self._process = this_process()

    async def __aenter__(self) -> Client:
        if self._manager is not None:
            raise OutboxClosed(self._outbox.path, "a client is used once; call connect again")
        manager = ConnectionManager(
            self._settings,
            self._endpoint,
            self._outbox,
            self._dialect,
            events=self._events,
            on_push=self._push,
            on_open=self._on_open,
            veto=self._veto,
        )
        await self._outbox.open()
        self._manager = manager
        self._outbox.storage.on_stored = manager.stored
        settled = self._outbox.storage.on_settled

        def on_settled(runs: Any) -> None:
            settled(runs)
            manager.moved()

        self._outbox.storage.on_settled = on_settled
        self._running = asyncio.create_task(manager.run(), name=f"durablews {self._outbox.path}")
        self._running.add_done_callback(lambda _: manager.moved())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close(drain=exc_type is None)

    @property
    def state(self) -> State:
        """Where the link stands."""
        return State.DISCONNECTED if self._manager is None else self._manager.state

    @property
    def reason(self) -> str | None:
        """Why the link is as it is, as a sentence."""
        return self._open().reason

    async def send(
        self,
        payload: Any,
        *,
        priority: int | str = "normal",
        topic: str | None = None,
        headers: Mapping[str, str] | None = None,
        ttl: float | None = None,
        id: str | None = None,
    ) -> Receipt:
        """Store one message and return when it is on the medium; it is delivered when the link allows.

        Arguments and errors are those of `Outbox.send`.
        """
        return await self._outbox.send(payload, priority=priority, topic=topic, headers=headers, ttl=ttl, id=id)

    async def send_many(
        self,
        payloads: Iterable[Any],
        *,
        priority: int | str = "normal",
        topic: str | None = None,
        headers: Mapping[str, str] | None = None,
        ttl: float | None = None,
    ) -> list[Receipt]:
        """Store several messages in one transaction. Arguments and errors are those of `Outbox.send_many`."""
        return await self._outbox.send_many(payloads, priority=priority, topic=topic, headers=headers, ttl=ttl)

    async def flush(self, timeout: float | None = None) -> bool:
        """Wait until the outbox is empty and return True; False when that is not to be.

        Args:
            timeout: seconds; None waits until it is empty, the client is closed, or no more tries are made.
        """
        manager = self._open()
        try:
            async with asyncio.timeout(timeout):
                while True:
                    moves = manager.moves  # taken before the look, so that nothing between the two is missed
                    if (await self._outbox.counts()).pending == 0:
                        return True
                    if self._running is None or self._running.done() or manager.given_up:
                        return False
                    await moves.wait()
        except (TimeoutError, OutboxClosed):
            return False

    async def stats(self) -> Stats:
        """Return what waits, what has left, and how the link stands."""
        manager, counts = self._open(), await self._outbox.counts()
        return Stats(
            **{name: getattr(counts, name) for name in counts.__struct_fields__},
            state=manager.state.value,
            reason=manager.reason,
            blocked=manager.blocked,
            trouble=self._outbox.storage.trouble or manager.housekeeping.log_held,
            next_attempt=manager.next_attempt,
            connects=manager.connects,
            latency=manager.heartbeat.latency,
            heartbeat_interval=manager.heartbeat.interval,
            network_watch=manager.housekeeping.network.absent,
            pushes_dropped=self._pushes_dropped,
            stray_answers=manager.stray_answers,
        )

    def wake(self) -> None:
        """Dial now instead of waiting for the next try; a link that stands is pinged at once.

        For an operating system's word that the network is back. On Linux the client hears of new addresses and default
        routes, and of the end of a sleep, by itself. After `max_retries` were used up it begins anew.
        """
        self._open().wake()

    def events(self) -> Events:
        """Yield what happens to this client from now on. Who does not read loses the oldest, never memory.

        See `durablews.events`.
        """
        return self._events.read()

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Yield what the server pushes: JSON values, or bytes. Ends when the client is closed.

        A value that Python cannot hold (``1e400``) is left out and counted in `Stats.pushes_dropped`.
        """
        while True:
            while self._pushes:
                payload = self._pushes.popleft()
                self._push_bytes -= len(payload)
                try:
                    message = decode_payload(payload)
                except ValueError:  # valid JSON that Python cannot hold, such as 1e400
                    self._pushes_dropped += 1
                    continue
                yield message
            if self._closed:
                return
            self._pushed.clear()
            await self._pushed.wait()

    async def close(self, *, drain: bool = True) -> None:
        """Wait up to `drain_timeout` for the outbox to empty, leave the rest on disk, and stop. Safe to call twice."""
        if self._manager is None or self._running is None or not same_process(self._process):
            return  # not open; or in a forked child, which must not touch its parent's connections
        try:
            wanted = drain and not self._closed and not self._running.done()
            if wanted and self._settings.delivery.drain_timeout > 0:
                await self._drain(self._settings.delivery.drain_timeout)
        finally:
            self._closed = True
            if self._stopping is None:
                self._stopping = asyncio.create_task(self._stop(self._running), name="durablews stop")
            await asyncio.shield(self._stopping)

    async def _drain(self, timeout: float) -> None:
        try:
            await self.flush(timeout)
        except OutboxClosed:
            pass  # another call of close was quicker

    async def _stop(self, running: asyncio.Task[None]) -> None:
        assert self._manager is not None
        try:
            await self._manager.leave()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            # Not awaited: on a full disk it would be tried for ever. Then the next opening takes this for a crash.
            self._outbox.leave().add_done_callback(lambda left: left.cancelled() or left.exception())
        finally:
            try:
                await self._outbox.close()
            finally:
                self._events.close()
                self._pushed.set()

    def _push(self, payload: str | bytes) -> None:
        self._pushes.append(payload)
        self._push_bytes += len(payload)
        while len(self._pushes) > _MOST_PUSHES or (self._push_bytes > _MOST_PUSH_BYTES and len(self._pushes) > 1):
            self._push_bytes -= len(self._pushes.popleft())
            self._pushes_dropped += 1
        self._pushed.set()

    def _open(self) -> ConnectionManager:
        if self._manager is None or self._closed:
            raise OutboxClosed(self._outbox.path, "the client is not open; use it with async with")
        return self._manager
