"""The stage of the demo: processes that can be killed, a link that can be cut, a timeline that people read."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from durablews.cli.formats import Palette, columns, count, shorten
from durablews.clock import SystemClock
from durablews.visible import printable

if TYPE_CHECKING:
    import asyncio

__all__ = ["Actor", "Relay", "Timeline"]

_HOST = "127.0.0.1"
_CHUNK = 64 * 1024
# Seconds whose bytes go together on a slow link.
_SLICE = 0.02
# Seconds between lines about the backlog where there is no terminal to draw on.
_NEWS_INTERVAL = 2.0
_BAR = 24


def _append(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


class Actor:
    """A child process. Its standard input is its life: it ends when that is closed."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log
        self.greeting = ""

    @classmethod
    async def start(cls, folder: Path, part: str, *words: str) -> Actor:
        """Start a part of `actors` and return once it has said its first line, which is `greeting`."""
        import asyncio

        log = folder / f"{part}.log"
        errors = _append(log)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "durablews.cli.actors",
                part,
                *words,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                # Ctrl-C is for the demo, which ends them in order.
                start_new_session=True,
            )
        finally:
            os.close(errors)
        actor = cls(part, process, log)
        try:
            actor.greeting = await actor.hear()
        except BaseException:
            await actor.kill()
            raise
        return actor

    async def hear(self) -> str:
        """Return the next line of its standard output; nothing when there is no more."""
        assert self.process.stdout is not None
        return (await self.process.stdout.readline()).decode().strip()

    def tell(self, data: bytes) -> None:
        """Write to its standard input. What a dead one was told is lost, as it should be."""
        assert self.process.stdin is not None
        if not self.process.stdin.is_closing():
            self.process.stdin.write(data)

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    async def kill(self) -> None:
        """End it with SIGKILL and wait until it is gone."""
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()

    async def leave(self, *, terminate: bool = False) -> int:
        """Let it end, by SIGTERM or by the end of its input; return its exit code. Killed after 5 s."""
        import asyncio

        assert self.process.stdin is not None
        if terminate:
            with suppress(ProcessLookupError):
                self.process.terminate()
        else:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(5):
                return await self.process.wait()
        except TimeoutError:
            await self.kill()
            return await self.process.wait()

    def last_words(self, lines: int = 8) -> list[str]:
        """Return the end of what it wrote to standard error."""
        with suppress(OSError):
            return [printable(line) for line in self.log.read_text(errors="replace").splitlines()[-lines:]]
        return []


class Relay:
    """The link: forwards bytes between the agent and the server's port, as slowly as `rate` says, until it is cut.

    A cut resets every connection and refuses new ones. A mute, which comes before it, lets the agent's bytes through
    and loses the server's: so there is always something that was applied and not answered when the link goes.

    Args:
        port: the server's.
        rate: bytes a second towards the server; a link that is too fast is empty whenever it is cut.
    """

    def __init__(self, port: int, *, rate: float) -> None:
        self._rate = rate
        self._server_port = port
        self._cut = False
        self._listener: asyncio.Server | None = None
        self._muted: set[asyncio.StreamWriter] = set()
        self._towards_agent: set[asyncio.StreamWriter] = set()
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Relay:
        import asyncio

        # Two steps: an interruption in the middle of one would leave a socket that nobody knows of.
        self._listener = await asyncio.start_server(self._connected, _HOST, 0, start_serving=False)
        try:
            await self._listener.start_serving()
        except BaseException:
            self._listener.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        import asyncio

        assert self._listener is not None
        self._listener.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """Where the agent dials."""
        assert self._listener is not None
        return f"ws://{_HOST}:{self._listener.sockets[0].getsockname()[1]}"

    def mute(self) -> None:
        """Lose every answer of the connections that are open now."""
        self._muted |= self._towards_agent

    def cut(self) -> None:
        self._cut = True
        for writer in list(self._open):
            writer.transport.abort()

    def mend(self) -> None:
        self._cut = False

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        import asyncio

        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        self._towards_agent.add(writer)
        beyond: asyncio.StreamWriter | None = None
        try:
            if self._cut:
                return
            answers, beyond = await asyncio.open_connection(_HOST, self._server_port)
            self._open.add(beyond)
            if self._cut:
                return
            ways = [
                asyncio.create_task(self._forward(reader, beyond)),
                asyncio.create_task(self._answer(answers, writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass  # the server is down: so is the link
        except asyncio.CancelledError:
            pass  # the demo ends; asyncio would print the cancellation of a handler
        finally:
            for end in (writer, beyond):
                if end is not None:
                    end.transport.abort()
                    self._open.discard(end)
            self._towards_agent.discard(writer)
            self._muted.discard(writer)
            self._tasks.discard(task)

    async def _forward(self, source: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        free_at = loop.time()
        with suppress(OSError):
            while data := await source.read(max(512, int(self._rate * _SLICE))):
                server.write(data)
                await server.drain()
                free_at = max(free_at, loop.time() - _SLICE) + len(data) / self._rate
                await asyncio.sleep(free_at - loop.time())

    async def _answer(self, source: asyncio.StreamReader, agent: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(_CHUNK):
                if agent not in self._muted:
                    agent.write(data)
                    await agent.drain()


class Timeline:
    """Prints what happens, with the seconds since the start, above a bar of what waits."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self._began = self._clock.monotonic()
        self._paint = Palette(sys.stdout)
        self._terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._bar = ""
        self._news_at = 0.0
        full, empty, self._between = "█", "░", " · "
        try:
            f"{full}{empty}{self._between}".encode(sys.stdout.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            full, empty, self._between = "#", ".", ", "
        self._blocks = full, empty

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock.monotonic() - self._began

    def say(self, text: str = "", *styles: str) -> None:
        """Print a line that has no time."""
        self._write(f"{self._paint(text, *styles)}\n")

    def event(self, what: str, text: str, *styles: str, at: float | None = None) -> None:
        """Print a line of the timeline; the first words in colour."""
        seconds = self._paint(f"{self.elapsed if at is None else at:6.1f} s", "dim")
        self._write(f"{seconds}  {self._paint(what.ljust(15), *styles)} {text}\n")
        self._news_at = self.elapsed

    def more(self, text: str) -> None:
        """Print a line that belongs to the event above it."""
        self._write(f"{'':26}{self._paint(text, 'dim')}\n")

    def backlog(self, waiting: int, most: int, applied: int, of: int, *, flows: bool) -> None:
        """Redraw the bar; without a terminal print a line every two seconds."""
        text = f"{count(waiting):>6} waiting{self._between}{count(applied)} of {count(of)} acknowledged"
        if not self._terminal:
            if self.elapsed - self._news_at >= _NEWS_INTERVAL:
                self.event("backlog", text.lstrip(), "dim")
            return
        filled = min(_BAR, -(-waiting * _BAR // max(1, most)))
        full, empty = self._blocks
        room = (columns(sys.stdout) or 80) - _BAR - 13
        bar = self._paint(full * filled, "green" if flows else "red") + self._paint(empty * (_BAR - filled), "dim")
        self._bar = f"{'':10}{bar} {shorten(text, max(1, room))}"
        self._write("")

    def figures(self, figures: Mapping[str, str], *, good: bool) -> None:
        """Print the last line: names and numbers."""
        paint = self._paint
        style = "green" if good else "red"
        text = "  ".join(f"{paint(name, 'dim')} {paint(value, 'bold', style)}" for name, value in figures.items())
        self._write(f"\n{text}\n")

    def clear(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar = ""
            self._write("")

    def _write(self, text: str) -> None:
        """Print above the bar. Whoever reads may have seen enough: the exit code counts all the same."""
        try:
            sys.stdout.write(f"\r\x1b[K{text}{self._bar}" if self._terminal else text)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
