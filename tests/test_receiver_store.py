"""The file behind a receiver, and the receiver's settings."""

from __future__ import annotations

import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from test_receiver import STREAM, applying, greeted, listening, path, receiver

from durablews.errors import (
    ConfigError,
    NotAnOutbox,
    OutboxMissing,
    OutboxTooNew,
    StorageFailed,
)
from durablews.receiver import Receiver, Store

__all__ = ["path", "receiver"]  # fixtures


async def test_a_new_store_is_private_durable_and_in_wal(path: Path) -> None:
    """A store is created with mode 0600, WAL and synchronous=FULL (S1)."""
    async with Store(path) as store:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2)):
            rows = await store.connection.execute_fetchall(f"PRAGMA {pragma}")
            assert [tuple(row) for row in rows] == [(value,)]


async def test_a_store_that_cannot_be_one_is_refused_and_left(tmp_path: Path) -> None:
    """A text file, a newer version's store and a missing folder raise their errors and are left as they were."""
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to have a header of a hundred bytes" * 3)
    before = text.read_bytes()
    with pytest.raises(NotAnOutbox):
        await Store(text).__aenter__()
    assert text.read_bytes() == before
    newer = tmp_path / "newer.db"
    async with Store(newer):
        pass
    with closing(sqlite3.connect(newer)) as connection:
        connection.execute("UPDATE durablews_receiver SET schema = 2")
        connection.commit()
    with pytest.raises(OutboxTooNew, match="version 2"):
        await Store(newer).__aenter__()
    with pytest.raises(OutboxMissing):
        await Store(tmp_path / "nowhere" / "s.db").__aenter__()
    with pytest.raises(StorageFailed, match="WAL"):
        await Store(":memory:").__aenter__()


def test_settings_out_of_range_are_refused(path: Path) -> None:
    """A frame limit that the protocol forbids, or a negative window, is a ConfigError."""
    with pytest.raises(ConfigError, match="65536"):
        Receiver(path, max_bytes=1000)
    with pytest.raises(ConfigError, match="window"):
        Receiver(path, window=-1)


async def test_forgetting_leaves_young_streams(receiver: Receiver, path: Path) -> None:
    """The receiver forgets what was not heard of for 90 days, and nothing younger."""
    async with listening(applying(receiver)) as url:
        for stream in (STREAM, "cd" * 16):
            async with greeted(url, stream):
                pass
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE durablews_streams SET last_seen_at = 0 WHERE stream = ?", (STREAM,))
        connection.commit()
    assert await receiver.forget() == [STREAM]
    assert await receiver.forget() == []
