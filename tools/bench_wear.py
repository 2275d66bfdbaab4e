"""What a message costs the disk: bytes that this process causes to be written, as Linux counts them.

`write_bytes` of /proc/self/io counts pages when they are made dirty, so it holds what SQLite writes to the log and, by
checkpoints, to the database; what the file system adds to that (its journal) is nobody's here.
"""

from __future__ import annotations

import asyncio
import os

from bench_servers import serving
from bench_work import PAYLOAD, Failed, Work

import durablews

__all__ = [
    "appended_alone",
    "appended_together",
    "at_a_hundred_a_second",
    "at_a_hundred_in_company",
    "at_one_a_second",
    "in_bulk",
]

_LIMIT = 60.0


def _written() -> int:
    with open("/proc/self/io") as counters:
        return next(int(line.split()[1]) for line in counters if line.startswith("write_bytes"))


def _delivered(work: Work, pace: float, **settings: object) -> float:
    """Return the bytes a message that is sent and acknowledged, one each `pace` seconds; in one transaction for 0."""

    async def run(url: str) -> float:
        async with durablews.connect(url, work.folder / "wear.db", **settings) as client:  # type: ignore[arg-type]
            await (await client.send(b"warm")).acked(_LIMIT)
            before = _written()
            if pace:
                sends = []
                for _ in range(work.messages):
                    sends.append(asyncio.ensure_future(client.send(PAYLOAD)))
                    await asyncio.sleep(pace)
                await asyncio.gather(*sends)
            else:
                for done in range(0, work.messages, 1000):
                    await client.send_many([PAYLOAD] * min(1000, work.messages - done))
            if not await client.flush(_LIMIT):
                raise Failed(f"the outbox did not empty in {_LIMIT:.0f} s")
            return (_written() - before) / work.messages

    with serving("receiver") as server:
        return asyncio.run(run(server.url))


def at_one_a_second(work: Work) -> float:
    """Bytes a message at one a second."""
    return _delivered(work, 1.0)


def at_a_hundred_a_second(work: Work) -> float:
    """Bytes a message at a hundred a second."""
    return _delivered(work, 0.01)


def at_a_hundred_in_company(work: Work) -> float:
    """The same with a commit each 50 ms."""
    return _delivered(work, 0.01, commit_interval=0.05)


def in_bulk(work: Work) -> float:
    """Bytes a message by `send_many`, a thousand at a time."""
    return _delivered(work, 0.0)


def _appended(work: Work, at_once: int) -> float:
    descriptor = os.open(work.folder / "appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        before = _written()
        for done in range(0, work.messages, at_once):
            os.write(descriptor, PAYLOAD * min(at_once, work.messages - done))
            os.fdatasync(descriptor)
        return (_written() - before) / work.messages
    finally:
        os.close(descriptor)


def appended_alone(work: Work) -> float:
    """Bytes a message that is appended to a file by itself and synced."""
    return _appended(work, 1)


def appended_together(work: Work) -> float:
    """Bytes a message of a thousand that are appended and synced together."""
    return _appended(work, 1000)
