"""`durablews serve`: a receiver to try things against. What it applied is in the table `durablews_inbox` of its store.

Promises: the first line of stdout is its address; SIGTERM and Ctrl-C close every connection with 1001. Payloads are
never printed. It knows no passwords: whoever reaches the port may send.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from durablews.visible import printable

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection

    from durablews.wire.frames import Hello

__all__ = ["add_parser", "run"]

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `serve`."""
    parser = subparsers.add_parser(
        "serve",
        help="receive messages into a SQLite file: a server to try things against",
        description="Listen for durablews clients and keep every message, once, in the table durablews_inbox of a "
        "SQLite file. Prints its address as the first line of stdout. Anyone who reaches the port may send: it is "
        "for trying things, or for behind a proxy that authenticates.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=_port, default=8765, help="the port to listen on; 0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--store",
        default="inbox.db",
        metavar="FILE",
        help="the SQLite file that keeps the messages; created when it is missing (default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        type=_window,
        default=1024,
        metavar="N",
        help="how many messages one client may have unanswered; 0 pauses them all (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bytes",
        type=_size,
        default=1024 * 1024,
        metavar="SIZE",
        help='the largest frame that is accepted, from 64KiB: a number of bytes, or "500KB", "1MiB" (default: 1MiB)',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM (0) or Ctrl-C (130); 2 when it cannot listen, 3 when the store cannot be used."""
    import asyncio

    from durablews.errors import OutboxError

    try:
        return asyncio.run(_serve(args))
    except OutboxError as exc:
        _talk(f"durablews serve: {exc}")
        return 3


async def _serve(args: argparse.Namespace) -> int:
    import asyncio

    from websockets.asyncio.server import serve
    from websockets.typing import Subprotocol

    from durablews.receiver import SUBPROTOCOLS, Receiver, Store, select_subprotocol
    from durablews.receiver.inbox import inbox_tables, keeper

    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def end(code: int) -> None:
        if not ended.done():
            ended.set_result(code)

    keep = keeper()
    async with Receiver(
        Store(args.store, prepare=inbox_tables(args.store)), window=args.window, max_bytes=args.max_bytes
    ) as receiver:

        async def handle(websocket: ServerConnection) -> None:
            talk = _Talk(websocket)
            served = await receiver.serve(websocket, keep, on_hello=talk.opened, on_error=talk.failed)
            talk.closed(f"{served.applied} applied, {served.frames} frames")

        try:
            server = await serve(
                handle,
                args.host,
                args.port,
                subprotocols=[Subprotocol(name) for name in SUBPROTOCOLS],
                select_subprotocol=select_subprotocol,
                max_size=args.max_bytes,
                compression=None,
            )
        except OSError as exc:
            _talk(f"durablews serve: cannot listen on {_address(args.host, args.port)}: {exc.strerror or exc}")
            return 2
        async with server:  # closes with 1001 and waits for the handlers
            with _signals({signal.SIGTERM: 0, signal.SIGINT: 130}, end):
                print(f"ws://{_address(args.host, server.sockets[0].getsockname()[1])}", flush=True)
                code = await ended
    return code


@contextmanager
def _signals(codes: Mapping[signal.Signals, int], end: Callable[[int], None]) -> Iterator[None]:
    """Call `end` with a signal's exit code when it arrives."""
    import asyncio

    loop = asyncio.get_running_loop()
    for number, code in codes.items():
        try:
            loop.add_signal_handler(number, end, code)
        except NotImplementedError:  # Windows: the plain handler, carried over to the loop
            signal.signal(number, lambda *_, code=code: loop.call_soon_threadsafe(end, code))
    try:
        yield
    finally:
        for number in codes:
            try:
                loop.remove_signal_handler(number)
            except NotImplementedError:
                signal.signal(number, signal.SIG_DFL)


class _Talk:
    """One line on stderr when a connection opens, one when it closes."""

    def __init__(self, websocket: ServerConnection) -> None:
        self._websocket = websocket
        peer = websocket.remote_address
        self._peer = _address(*peer[:2]) if isinstance(peer, tuple) else "a client"
        self._stream = ""

    def opened(self, hello: Hello) -> None:
        self._stream = hello.stream[:8]
        _talk(f"{self._stream} opened from {self._peer}")

    def failed(self, error: Exception) -> None:
        _talk(f"{self._stream or self._peer} failed: {error}")

    def closed(self, what: str) -> None:
        reason = f" {self._websocket.close_reason}" if self._websocket.close_reason else ""
        _talk(f"{self._stream or self._peer} closed {self._websocket.close_code}{reason}: {what}")


def _talk(line: str) -> None:
    # Close reasons come from the network: no control characters on somebody's terminal.
    print(printable(line), file=sys.stderr, flush=True)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {text!r}")
    return int(text)


def _window(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**53:
        raise argparse.ArgumentTypeError(f"a window is a number of messages, 0 or more, not {text!r}")
    return int(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise argparse.ArgumentTypeError(f'a size is a number of bytes or like "500KB" and "1MiB", not {text!r}')
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if not 65_536 <= size < 2**53:
        raise argparse.ArgumentTypeError(f"the largest frame must be at least 64KiB (65536 bytes), not {text!r}")
    return size
