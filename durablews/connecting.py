"""Opens a SQLite file on a thread of its own, and leaves nothing behind when that is cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import aiosqlite

from durablews.jobs import JobConnection
from durablews.walindex import close_gone

__all__ = ["open_connection"]


class _Connection(JobConnection):
    """Lets go of the shared memory with the file, on the thread that closes it: whatever becomes of who asked."""

    def close(self) -> None:
        super().close()
        close_gone()


async def open_connection(path: str, **options: Any) -> aiosqlite.Connection:
    """Open `path`, with the options of `sqlite3.connect`, for `run_job`.

    aiosqlite forgets a connection that its thread opened just when the caller was cancelled: the file stays open until
    the garbage collector comes by. Here it is opened to the end, and closed at once when nobody wants it any more.
    """
    opening = asyncio.ensure_future(_open(path, options))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close)
        raise


async def _open(path: str, options: dict[str, Any]) -> aiosqlite.Connection:
    return await aiosqlite.connect(path, factory=_Connection, isolation_level=None, **options)


def _close(opening: asyncio.Future[aiosqlite.Connection]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().stop()
