"""Drain so many messages of an outbox, in a process that holds nothing else: ``python bench_drainer.py URL PATH N``.

Prints one JSON object: `per_second`, from the opening of the file to the N-th acknowledgement, and `peak`, the most
memory that was ever resident, in MB (of 1024 KB). With ``imports`` alone it imports what durablews stands on, does
nothing, and prints its `peak`.
"""

from __future__ import annotations

import asyncio
import sys
import time

_LIMIT = 300.0


def peak() -> float:
    """Return the most memory that this process ever had resident, in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


async def drain(url: str, path: str, messages: int) -> float:
    """Drain at least `messages`, or all if there are fewer, and return how many went a second."""
    import durablews

    started = time.perf_counter()
    async with durablews.connect(url, path) as client:
        stats = await client.stats()
        before = stats.acked
        while stats.pending and stats.acked - before < messages:
            if time.perf_counter() - started > _LIMIT:
                raise SystemExit(f"only {stats.acked - before} of {messages} were acknowledged in {_LIMIT:.0f} s")
            # Rare enough to cost nothing: what goes meanwhile is counted with the time that it took.
            await asyncio.sleep(0.02)
            stats = await client.stats()
        took = time.perf_counter() - started
        await client.close(drain=False)
    return (stats.acked - before) / took


def main() -> None:
    # json is no part of what is measured, and msgspec is there anyway.
    import msgspec

    if sys.argv[1] == "imports":
        import sqlite3  # noqa: F401

        import aiosqlite  # noqa: F401
        import websockets.asyncio.client  # noqa: F401

        figures = {"peak": peak()}
    else:
        rate = asyncio.run(drain(sys.argv[1], sys.argv[2], int(sys.argv[3])))
        figures = {"per_second": rate, "peak": peak()}
    print(msgspec.json.encode(figures).decode())


if __name__ == "__main__":
    main()
