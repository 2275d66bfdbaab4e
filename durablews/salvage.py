"""Makes a new outbox of what can be read of a damaged one, which is moved aside whole (P10).

The new outbox takes a new stream (PROTOCOL.md section 5): a damaged file cannot vouch for the highest sequence that it
gave out, and a server may know numbers that it no longer does. Under a stream that no server has seen the entries keep
their numbers, so that what people and programs wrote down about them still holds; what was unanswered may be applied
twice, never not at all.

A crash leaves, at every moment, the damaged file and its log under one name or the other, and either the new outbox in
place or nothing that `database.create` would take for a free place.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from durablews import database
from durablews.carryover import Progress, Salvage, carry_over
from durablews.errors import NotAnOutbox, OutboxInUse, OutboxLocked, OutboxMissing, OutboxTooNew, StorageFailed
from durablews.ownership import Ownership, lock_path
from durablews.remains import Layout, Remains, Source
from durablews.schema import apply_migrations, migrations
from durablews.walindex import close_gone

if sys.platform != "win32":
    import fcntl

__all__ = ["is_interrupted", "open_source", "reference_layout", "salvage"]

# Where SQLite takes its locks in a database file (sqlite.org/fileformat2.html, "the lock-byte page").
_PENDING_BYTE, _LOCK_BYTES = 0x4000_0000, 512
# Seconds to wait for one who only looks, such as `durablews inspect`.
_PATIENCE, _LOOK = 5.0, 0.05


def salvage(path: str, *, progress: Progress = lambda what, done, whole: None) -> Salvage:
    """Move a damaged outbox aside and put a new one with everything that can be read in its place.

    For a process of its own: the file is opened without SQLite, and closing that would drop the locks of whoever has
    it open in this process.

    Args:
        progress: called with what is being done, how far it is, and how much there is.

    Raises:
        OutboxMissing, NotAnOutbox, OutboxTooNew: there is nothing to salvage here. Nothing was touched.
        OutboxInUse, OutboxLocked: someone has it open. Nothing was touched.
        StorageFailed: the disk failed, or the outbox is part of an application's database, which only its owner can
            mend. The damaged file is where it was, or whole under its new name.
    """
    final = Path(os.path.realpath(path))
    ownership = Ownership(final)
    try:
        holder = ownership.acquire()
    except OSError as exc:
        raise StorageFailed(path, f"its lock file cannot be written: {exc.strerror}") from exc
    if holder is not None:
        raise OutboxInUse(path, holder)
    try:
        with _failing_disk(path), ExitStack() as stack:
            damaged, source = _find(path, final)
            file = _locked(stack, path, source) if source is not None else open_source(stack, path, final)
            log = open_source(stack, path, _log_of(final if source is None else source))
            made = final.with_name(f".{final.name}.salvaging")
            stack.callback(_remove, made)
            for left in [made, *final.parent.glob(f".{_escaped(made.name)}.*")]:  # by a salvage that was killed
                _remove(left)
            database.create(str(made), with_reserve=False)
            owner = (source or _log_of(final)).stat()
            _belong_to(made, owner)
            remains = Remains(file, log, reference_layout())
            _check(path, remains)
            found = carry_over(path, str(made), remains, str(damaged), progress)
            progress("putting it in place", 1, 1)
            _swap(final, source, damaged, made)
            _belong_to(lock_path(final), owner)
            return found
    finally:
        ownership.release()
        close_gone()


# -- the files


def _log_of(file: Path) -> Path:
    return file.with_name(file.name + "-wal")


def is_interrupted(path: str) -> bool:
    """Whether the file is gone, and its log or what a salvage moved aside is there."""
    final = Path(os.path.realpath(path))
    return not os.path.lexists(final) and (_log_of(final).exists() or bool(_moved_aside(final)))


def _moved_aside(final: Path) -> list[Path]:
    found = final.parent.glob(f"{_escaped(final.name)}.damaged-*")
    return sorted((file for file in found if not file.name.endswith("-wal")), key=lambda file: file.name)


def _find(path: str, final: Path) -> tuple[Path, Path | None]:
    """Return where the damaged file goes, and where it is now; None when only its log is left.

    Where an earlier salvage was interrupted after it moved the file, that is its source.
    """
    earlier = _moved_aside(final)
    if final.exists():
        if not final.is_file():
            raise NotAnOutbox(path, "not a file, so not an outbox")
        again = [file for file in earlier if file.samefile(final)]
        return (again[0] if again else _free_name(final)), final
    if earlier:
        return earlier[-1], earlier[-1]
    if _log_of(final).exists():
        return _free_name(final), None
    raise OutboxMissing(path, "there is no such outbox")


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _free_name(final: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    for number in range(1, 1000):
        name = final.with_name(f"{final.name}.damaged-{stamp}" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(name) and not os.path.lexists(_log_of(name)):
            return name
    raise StorageFailed(str(final), "a thousand damaged files of this second are here already")


def open_source(stack: ExitStack, path: str, file: Path) -> Source:
    """Open a database or its log to be read without SQLite, until the stack is left. One that is missing is empty.

    Raises:
        OutboxLocked: this process has it open: to close it again would drop SQLite's locks.
    """
    if not file.exists():
        return Source(lambda offset, size: b"", 0)
    if _is_open_here(file):
        raise OutboxLocked(path, "this process has it open; close it first, nothing was touched")
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    stack.callback(os.close, descriptor)
    return _source(descriptor)


def _locked(stack: ExitStack, path: str, file: Path) -> Source:
    """Open the file under the lock that keeps every SQLite from it, also from reading.

    Raises:
        OutboxLocked: someone has it open, in this process or another.
    """
    if _is_open_here(file):
        raise OutboxLocked(path, "this process has it open; close it first, nothing was touched")
    descriptor = os.open(file, os.O_RDWR | getattr(os, "O_BINARY", 0))
    stack.callback(os.close, descriptor)
    deadline = time.monotonic() + _PATIENCE
    while sys.platform != "win32":  # there, a file that is open cannot be renamed
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, _LOCK_BYTES, _PENDING_BYTE)
            break
        except OSError:
            if time.monotonic() >= deadline:
                what = "another program has it open; end all that use it first, nothing was touched"
                raise OutboxLocked(path, what) from None
        time.sleep(_LOOK)
    return _source(descriptor)


def _is_open_here(file: Path) -> bool:
    status = file.stat()
    try:
        descriptors = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        return False
    for descriptor in descriptors:
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), status):
                return True
    return False


def _source(descriptor: int) -> Source:
    def read(offset: int, size: int) -> bytes:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)

    return Source(read, os.fstat(descriptor).st_size)


def reference_layout() -> Layout:
    """Ask a fresh outbox where its tables are: the same script has made the damaged one."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        apply_migrations(connection, ":memory:")
        names = connection.execute("SELECT name, rootpage FROM sqlite_schema WHERE rootpage > 0").fetchall()
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        columns = {
            name: [row[1] for row in connection.execute(f"SELECT * FROM pragma_table_info('{name}')")]
            for name in tables
        }
    return Layout(dict(names), columns)


def _check(path: str, remains: Remains) -> None:
    """Refuse what is not ours to replace."""
    if remains.is_application:
        what = "the outbox is part of an application's own database: only its owner can mend that, nothing was touched"
        raise StorageFailed(path, what)
    if not remains.is_outbox:
        raise NotAnOutbox(path, "nothing in it says that it was an outbox; nothing was touched")
    newest = migrations()[-1][0]
    schema = remains.single("durablews_meta", "what it is").get("schema")
    if isinstance(schema, int) and newest < schema < 10_000:
        raise OutboxTooNew(
            path,
            f"its schema is {schema} and this durablews knows up to {newest}; nothing was touched, update durablews",
        )
    remains.unreadable.clear()


def _swap(final: Path, source: Path | None, damaged: Path, made: Path) -> None:
    """Put the new outbox where the damaged one is, which keeps its content and its log under another name.

    With a log the place cannot be taken in one step: SQLite would read an old log into a new file. So the file goes
    first, and a place with a log and no file is one that `database.create` refuses; then an empty log takes the place
    of the old one; then the new file comes.
    """
    if source == final:
        _second_name(final, damaged)
    log, kept = _log_of(final), _log_of(damaged)
    if log.exists():
        if not kept.exists():
            _second_name(log, kept)
        _sync(final.parent)
        _remove(final)
        empty = final.with_name(f".{final.name}.nothing")
        os.close(os.open(empty, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        _belong_to(empty, log.stat())
        os.replace(empty, log)
    _sync(final.parent)
    os.replace(made, final)
    _remove(final.with_name(final.name + "-shm"))
    _sync(final.parent)


def _belong_to(file: Path, owner: os.stat_result) -> None:
    """Let a file that an administrator made belong to whom the old one belonged to, who could not open it else."""
    if os.name == "posix" and file.exists() and file.stat().st_uid != owner.st_uid:
        os.chown(file, owner.st_uid, owner.st_gid)
    if os.name == "posix" and file.exists():
        os.chmod(file, owner.st_mode & 0o777)


def _second_name(file: Path, name: Path) -> None:
    if name.exists():
        return
    try:
        os.link(file, name)
    except OSError:  # a file system without hard links (FAT)
        half = name.with_name(f".{name.name}.copying")
        shutil.copyfile(file, half)
        with half.open("r+b") as copied:
            os.fsync(copied.fileno())
        os.replace(half, name)


def _sync(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(file: Path) -> None:
    for name in (file, _log_of(file), file.with_name(file.name + "-shm")) if file.name.startswith(".") else (file,):
        name.unlink(missing_ok=True)


@contextmanager
def _failing_disk(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StorageFailed(path, f"the salvage failed: {exc.strerror}; what was there is kept") from exc
