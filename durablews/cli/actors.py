"""The two programs that the demo starts and kills, as processes of their own: ``python -m durablews.cli.actors``.

Both end when their standard input does. That is how they never outlive the demo, however it died.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

__all__ = ["main"]

# So many lines are on their way into the outbox at once: they share a transaction.
_TOGETHER = 256


def main(argv: list[str]) -> int:
    """Play the part named first: ``server PORT STORE`` or ``agent URL OUTBOX``."""
    part, *words = argv
    return _server(*words) if part == "server" else _agent(*words)


def _server(port: str, store: str) -> int:
    """Be `durablews serve`, nothing else."""
    import durablews.cli as command

    threading.Thread(target=_read, args=(lambda _: None, lambda: os._exit(0)), daemon=True).start()
    return command.main(["serve", "--port", port, "--store", store])


def _agent(url: str, outbox: str) -> int:
    import asyncio

    return asyncio.run(_send(url, outbox))


async def _send(url: str, outbox: str) -> int:
    """Send what standard input brings, and say on standard output how far it is stored.

    A line of input is a number, a priority and the text, with a space between. A line of output is the number up to
    which every `send` has returned: what a kill leaves unsaid may be stored or not, and is sent again with the same id.
    """
    import asyncio

    from durablews.client import connect

    arrived: asyncio.Queue[list[bytes] | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    settings: dict[str, Any] = {
        # Impatient, so that an audience does not wait.
        "reconnect": {"base_delay": 0.1, "max_delay": 0.4, "connect_timeout": 5},
        # Nothing to wait for at the end: what is left stays on disk, and the demo looks whether anything is.
        "delivery": {"drain_timeout": 0},
    }
    async with connect(url, outbox, **settings) as client:

        async def send(line: bytes) -> None:
            number, priority, text = line.split(b" ", 2)
            name = number.decode()
            await client.send(_text_or_bytes(text), priority=int(priority), topic=name, id=name)

        _say("ready")
        reader = _Lines(loop, arrived)
        threading.Thread(target=_read, args=(reader.feed, reader.end), daemon=True).start()
        while (lines := await arrived.get()) is not None:
            for start in range(0, len(lines), _TOGETHER):
                together = lines[start : start + _TOGETHER]
                await asyncio.gather(*map(send, together))
                _say(together[-1].split(b" ", 1)[0].decode())
    return 0


class _Lines:
    """Cuts what a thread reads into lines, for the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, arrived: asyncio.Queue[list[bytes] | None]) -> None:
        self._loop = loop
        self._arrived = arrived
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines:
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, lines)

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, None)


def _read(feed: Callable[[bytes], None], end: Callable[[], None]) -> None:
    while data := os.read(0, 64 * 1024):
        feed(data)
    end()


def _say(what: str) -> None:
    os.write(1, f"{what}\n".encode())


def _text_or_bytes(line: bytes) -> str | bytes:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
