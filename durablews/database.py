"""Opens outbox files: creates one whole or not at all, asks each PRAGMA for what it did, names every fault.

Never `open()` an outbox in the process that may own it: closing that descriptor drops SQLite's locks (sqlite.org,
"How to corrupt", section 2.2). Everything here goes through SQLite or `os.stat`.
"""

from __future__ import annotations

import errno
import os
import secrets
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from durablews.errors import (
    NotAnOutbox,
    OutboxDamaged,
    OutboxError,
    OutboxFull,
    OutboxLocked,
    OutboxMissing,
    StorageFailed,
)
from durablews.jobs import UncertainCommit, transaction
from durablews.reservefile import DISK_FULL, fill, free_bytes, make_room, reserve_path
from durablews.schema import APPLICATION_ID, apply_migrations, migrations, require_outbox
from durablews.walindex import close_gone, opening

__all__ = [
    "BUSY_TIMEOUT",
    "SALVAGE_HINT",
    "create",
    "file_id",
    "is_ours",
    "open_outbox",
    "prepare",
    "require_file",
    "require_same_file",
    "room_to_open",
    "set_synchronous",
    "storage_errors",
    "unallocated",
    "uri",
    "wal_bytes",
    "wal_stamp",
]

#: Seconds that a write waits for another program's transaction.
BUSY_TIMEOUT = 5.0
#: Pages in the log before the drainer moves them into the file: 4 MiB, far below the 4062 frames at which the shared
#: memory needs its second block.
_CHECKPOINT_PAGES = 1000
# Bytes that SQLite's shared memory and a first page of the log take, with a margin.
_ROOM_TO_OPEN = 128 * 1024
#: What to do about a damaged file.
SALVAGE_HINT = "`durablews doctor --salvage` carries over what can be read"
_JOURNAL_SIZE_LIMIT = 4 * 1024 * 1024
# STRICT tables came with 3.37.0 (sqlite.org/stricttables.html).
_OLDEST_SQLITE = (3, 37, 0)

SYNCHRONOUS = {"power": 2, "process": 1}  # FULL, NORMAL


def uri(path: str, mode: str) -> str:
    """Return the URI of a database file; a path with ``?``, ``#`` or ``%`` in it stays one path."""
    return f"{Path(os.path.realpath(path)).as_uri()}?mode={mode}"


def require_file(path: str) -> None:
    """Check that there is a file that may be a database.

    Raises:
        OutboxMissing: there is none.
        NotAnOutbox: it is a folder, a device, or empty.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise OutboxMissing(path, "there is no such outbox") from None
    except OSError as exc:
        raise OutboxMissing(path, f"cannot be reached: {exc.strerror}") from exc
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
        raise NotAnOutbox(path, f"{what}, not an outbox")
    if status.st_size == 0 and not wal_bytes(path):
        # SQLite takes an empty file for an empty database: an outbox that was truncated would start anew in silence.
        raise NotAnOutbox(path, "an empty file, not an outbox; if nothing was lost in it, remove it to start a new one")


def file_id(path: str) -> tuple[int, int] | None:
    """Return what tells the file of this name from any other, as long as someone has it open; None: there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def require_same_file(path: str, opened: tuple[int, int] | None) -> None:
    """Check that an outbox still has the name under which it was opened.

    SQLite goes on with a file that was removed, or replaced by another, as if nothing were: what is stored then is
    gone with the last process that has it open.

    Args:
        opened: `file_id` when it was opened.

    Raises:
        StorageFailed: it was removed, moved away or replaced.
    """
    present = file_id(path)
    if present != opened:
        what = "removed or moved away" if present is None else "replaced by another file"
        raise StorageFailed(path, f"the file was {what} while it was open; nothing was stored, open it again")


def wal_bytes(path: str) -> int:
    """Return the size of the write-ahead log beside a database; 0 when there is none."""
    try:
        return os.stat(f"{os.path.realpath(path)}-wal").st_size
    except OSError:
        return 0


def wal_stamp(path: str) -> tuple[int, int]:
    """Return what changes when anyone commits: time (ns) and size of the write-ahead log; zeros when there is none."""
    try:
        status = os.stat(f"{path}-wal")
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def create(path: str, *, with_reserve: bool = True) -> None:
    """Create an outbox at `path` unless something is there already.

    It is made whole under another name and then linked, so that nobody ever opens half an outbox, and the folder is
    synced, so that a power cut does not take the file with it.

    Args:
        with_reserve: whether to set room aside for its acknowledgements as well (`durablews.reserve`).
    """
    if os.path.lexists(path) and (os.path.exists(path) or not os.path.islink(path)):
        return
    final = Path(os.path.realpath(path))
    if not os.path.isdir(final.parent):
        raise OutboxMissing(path, f"the folder {final.parent} does not exist")
    if os.path.lexists(f"{final}-wal"):
        # Messages are in it. And SQLite would read it into a new file, and so damage that.
        raise StorageFailed(
            path, f"the file is gone but its log {final.name}-wal is here: put the file back, or {SALVAGE_HINT}"
        )
    made = final.with_name(f".{final.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        os.close(os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as exc:
        raise StorageFailed(path, f"cannot be created: {exc.strerror}") from exc
    try:
        with storage_errors(path), room_to_open(path, made):
            connection = sqlite3.connect(made, isolation_level=None)
            try:
                connection.execute("PRAGMA synchronous = FULL")
                # Before the first table, and before WAL, or it is silently ignored.
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                with transaction(connection):
                    apply_migrations(connection, path)
                    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    connection.execute(f"PRAGMA user_version = {migrations()[-1][0]}")
                _expect(connection, path, "journal_mode = WAL", "wal")
            finally:
                connection.close()
        _publish(made, final)
        if with_reserve:
            fill(path)
    except OSError as exc:
        raise StorageFailed(path, f"cannot be created: {exc.strerror}") from exc
    finally:
        for name in (made.name, f"{made.name}-shm"):
            made.with_name(name).unlink(missing_ok=True)
        close_gone()


def _publish(made: Path, final: Path) -> None:
    try:
        os.link(made, final)
    except FileExistsError:
        return  # someone else was quicker, and theirs counts
    except OSError:
        # A file system without hard links (FAT). A rename would replace, so look first.
        if final.exists():
            return
        os.rename(made, final)
    if os.name == "posix":
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def prepare(connection: sqlite3.Connection, path: str, *, durability: str = "power", drainer: bool = False) -> None:
    """Set up a connection to an outbox and bring its schema up to date.

    In an application's own database only what belongs to this connection is set.

    Args:
        durability: ``"power"`` syncs each commit, ``"process"`` leaves that to the next checkpoint.
        drainer: whether this connection checkpoints. Only the drainer does: SQLite 3.7.0 to 3.51.2 can corrupt a log
            that two connections reset at once (sqlite.org/wal.html, "the WAL-reset bug").

    Raises:
        NotAnOutbox, OutboxTooNew: it is not for us. Nothing was touched.
        StorageFailed: SQLite does not do what an outbox needs, here.
    """
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise StorageFailed(path, f"SQLite {sqlite3.sqlite_version} is too old; durablews needs 3.37")
    present = require_outbox(connection, path)
    ours = is_ours(connection)
    if ours:
        _expect(connection, path, "journal_mode = WAL", "wal")
        _expect(connection, path, "auto_vacuum", 2)
        _expect(connection, path, f"journal_size_limit = {_JOURNAL_SIZE_LIMIT}", _JOURNAL_SIZE_LIMIT)
    _expect(connection, path, "locking_mode = NORMAL", "normal")
    set_synchronous(connection, path, SYNCHRONOUS[durability])
    for pragma in ("fullfsync = 1", "checkpoint_fullfsync = 1"):  # macOS: fsync alone does not reach the medium
        connection.execute(f"PRAGMA {pragma}")
    pages = _CHECKPOINT_PAGES if drainer else 0
    _expect(connection, path, f"wal_autocheckpoint = {pages}", pages)
    # Debian's SQLite overwrites what is deleted with zeros; on flash that is wear without secrecy.
    _expect(connection, path, "secure_delete = OFF", 0)
    _expect(connection, path, "cell_size_check = ON", 1)
    if present < migrations()[-1][0]:
        with transaction(connection):
            apply_migrations(connection, path)
            if ours:
                connection.execute(f"PRAGMA user_version = {migrations()[-1][0]}")


def is_ours(connection: sqlite3.Connection) -> bool:
    """Say whether the whole file is an outbox, and not an application's database with one in it."""
    return bool(connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID)


@contextmanager
def room_to_open(path: str, made: Path | None = None, *, writes: bool = True) -> Iterator[None]:
    """Let an outbox be opened, and read from for the first time, inside: also on a full disk, and without SIGBUS.

    Args:
        path: the outbox.
        made: where it is just being made.
        writes: whether this process may take from its reserve.

    Raises:
        OutboxFull: there is not even the room that its opening takes.
        StorageFailed: the disk failed.
    """
    kept = os.path.exists(reserve_path(path))
    ours = made is not None or kept or bool(wal_bytes(path))  # in WAL mode
    if kept and writes:
        make_room(path)
    try:
        if not ours and free_bytes(path) < _ROOM_TO_OPEN:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with opening(str(made or path), ours=ours):
            yield
    except OSError as exc:
        raise unallocated(path, exc, "it cannot be opened") from exc


def unallocated(path: str, exc: OSError, what: str) -> OutboxFull | StorageFailed:
    """Return what to raise when room could not be allocated beside an outbox, before anything was stored."""
    if exc.errno in DISK_FULL:
        return OutboxFull(path, f"the disk is full: {what}; nothing was stored")
    return StorageFailed(path, f"the disk failed ({exc.strerror}): {what}; nothing was stored")


def set_synchronous(connection: sqlite3.Connection, path: str, level: int) -> None:
    """Set how commits are synced (2: each one) and check that it took."""
    _expect(connection, path, f"synchronous = {level}", level)


def open_outbox(path: str, *, durability: str = "power") -> sqlite3.Connection:
    """Open an existing outbox for one who writes to it and does not drain it."""
    require_file(path)
    with storage_errors(path):
        connection = sqlite3.connect(uri(path, "rw"), uri=True, isolation_level=None, timeout=BUSY_TIMEOUT)
        try:
            with room_to_open(path):
                prepare(connection, path, durability=durability)
        except BaseException:
            connection.close()
            raise
    return connection


def _expect(connection: sqlite3.Connection, path: str, pragma: str, value: object) -> None:
    """Run a PRAGMA and ask it what holds now: SQLite ignores in silence what it cannot do."""
    name = pragma.split(" ")[0]
    if pragma != name:
        connection.execute(f"PRAGMA {pragma}").fetchall()
    answer = connection.execute(f"PRAGMA {name}").fetchone()[0]
    if answer != value:
        why = " (a network file system?)" if name == "journal_mode" else ""
        raise StorageFailed(path, f"SQLite answers {answer!r} for {name}, and an outbox needs {value!r}{why}")


@contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Turn what SQLite raises into what a caller can act upon."""
    try:
        yield
    except UncertainCommit as exc:
        raise StorageFailed(
            path, f"the disk failed during the commit ({exc.name}): the message may or may not be stored", stored=None
        ) from exc
    except sqlite3.Error as exc:
        raise _translated(path, exc) from exc
    except UnicodeDecodeError as exc:  # text that is no UTF-8, where SQLite or the library had put it
        raise _damaged(path) from exc


def _damaged(path: str) -> OutboxDamaged:
    return OutboxDamaged(path, f"the file is damaged; nothing was stored; {SALVAGE_HINT}")


def _translated(path: str, exc: sqlite3.Error) -> OutboxError:
    name: str = getattr(exc, "sqlite_errorname", None) or type(exc).__name__
    if name in ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"):  # the second: of the shared memory beside the database
        return OutboxFull(path, "the disk is full; nothing was stored")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return OutboxLocked(
            path, f"another program held its write lock for more than {BUSY_TIMEOUT:g} s; nothing was stored"
        )
    if name == "SQLITE_NOTADB":
        return NotAnOutbox(path, f"not a SQLite database, so not an outbox; if it was one, {SALVAGE_HINT}")
    if name.startswith("SQLITE_READONLY"):
        return StorageFailed(path, "the file or its folder cannot be written; nothing was stored")
    if name.startswith("SQLITE_CANTOPEN"):
        return StorageFailed(path, "cannot be opened: check that its folder can be read and written")
    if name.startswith("SQLITE_CORRUPT"):
        return _damaged(path)
    return StorageFailed(path, f"the storage failed ({name}); nothing was stored")
