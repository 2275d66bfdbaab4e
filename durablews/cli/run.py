"""`durablews run`: drain an outbox to its server."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from durablews.visible import printable

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "run",
        help="keep a link to the server and deliver what waits in an outbox",
        description="Keep a link to the server and deliver what waits, and what other processes add, until stopped. "
        "SIGTERM drains for drain_timeout and stops. A flag counts more than a DURABLEWS_ variable, and that more than "
        "CONFIG.",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a TOML or JSON file with the settings")
    parser.add_argument("--url", help="the server: ws:// or wss://")
    parser.add_argument("--outbox", metavar="FILE", help="the outbox; created when there is none")
    parser.add_argument("--until-empty", action="store_true", help="stop with exit code 0 once nothing waits any more")
    parser.add_argument(
        "--timeout",
        metavar="DURATION",
        help='with --until-empty: give up with exit code 4 after this long, such as "5m"',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run until stopped, or until the outbox is empty."""
    from durablews.config import merge, parse_duration, read_environment
    from durablews.configfile import load

    timeout = parse_duration(args.timeout) if args.timeout is not None else None
    flags = {name: value for name in ("url", "outbox") if (value := getattr(args, name)) is not None}
    layers = merge(load(args.config) if args.config else {}, read_environment(os.environ), flags)

    import asyncio

    return asyncio.run(_run(layers, until_empty=args.until_empty, timeout=timeout))


async def _run(layers: dict[str, Any], *, until_empty: bool, timeout: float | None) -> int:
    import asyncio
    import signal

    from durablews.client import connect

    stopped = asyncio.Event()
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        stopped.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, stop, number)
        except NotImplementedError:  # Windows: the signal arrives in the main thread instead
            signal.signal(number, lambda received, _: loop.call_soon_threadsafe(stop, received))
    client = connect(config=layers)
    # They listen before the client does anything, so that they miss nothing.
    talk, exhausted = asyncio.create_task(_talk(client)), asyncio.create_task(_exhausted(client))
    await asyncio.sleep(0)
    try:
        return await _until_done(client, stopped, received, exhausted, until_empty=until_empty, timeout=timeout)
    finally:
        for task in (talk, exhausted):
            task.cancel()
        await asyncio.gather(talk, exhausted, return_exceptions=True)


async def _until_done(
    client: Any, stopped: Any, received: list[int], exhausted: Any, *, until_empty: bool, timeout: float | None
) -> int:
    import asyncio
    import signal

    async with client:
        waits: set[asyncio.Task[Any]] = {asyncio.create_task(stopped.wait()), exhausted}
        if until_empty:
            waits.add(asyncio.create_task(client.flush(timeout)))
        done, left = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if stopped.is_set():
            return 130 if received[0] == signal.SIGINT else 0
        emptied = all(task.result() for task in done)
        if not emptied:
            counts = await client.stats()
            why = printable(counts.reason or counts.state)
            print(f"durablews: gave up with {counts.pending} waiting: {why}", file=sys.stderr)
            await client.close(drain=False)
        return 0 if emptied else 4


async def _exhausted(client: Any) -> bool:
    """Return False once the client has given up, which only `max_retries` lets it."""
    from durablews.events import Exhausted

    async for event in client.events():
        if isinstance(event, Exhausted):
            return False
    return False


async def _talk(client: Any) -> None:
    """Tell a person on standard error what changes, once each."""
    from durablews.events import (
        Connected,
        Disconnected,
        Exhausted,
        Failed,
        MessageRejected,
        MessagesDropped,
        MessagesExpired,
    )

    last = ""
    async for event in client.events():
        line = ""
        if isinstance(event, Connected):
            line = f"connected to {event.url}"
        elif isinstance(event, Disconnected):
            line = f"disconnected: {event.code} {event.reason}"
        elif isinstance(event, Failed):
            line = event.reason
        elif isinstance(event, MessageRejected):
            line = f"message {event.seq} was rejected: {event.code}"
        elif isinstance(event, MessagesExpired | MessagesDropped):
            line = f"{event.messages} {event.kind}"
        elif isinstance(event, Exhausted):
            line = f"gave up after {event.attempts} attempts; everything is kept"
        if line and line != last:
            # Close reasons come from the network: no control characters on somebody's terminal.
            print(f"durablews: {printable(line)}", file=sys.stderr, flush=True)
            last = line
