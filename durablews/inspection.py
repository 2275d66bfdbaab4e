"""A look into an outbox file from outside: reads, never writes, and leaves nothing behind.

Every look is one short transaction on a connection of its own, so that a slow reader never keeps the drainer from
moving its log. No look counts rows: the counts stand in `durablews_totals`, and the queue is walked along its index.
"""

from __future__ import annotations

import base64
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, TypeVar

import msgspec

from durablews.clock import Clock, SystemClock
from durablews.database import BUSY_TIMEOUT, SALVAGE_HINT, require_file, room_to_open, uri, wal_bytes
from durablews.entries import read_caps
from durablews.errors import NotAnOutbox, OutboxDamaged, OutboxError, OutboxLocked, StorageFailed
from durablews.messages import Refusal
from durablews.ownership import holder_of
from durablews.schema import require_outbox, schema_of
from durablews.snapshot import Departures, EntrySummary, Limits, Link, Snapshot

__all__ = ["inspect", "look", "stream_entries", "summarize"]

T = TypeVar("T")

_STATES = ("pending", "unanswered", "refused", "aside")
# What one look of a long walk takes: it holds a snapshot of the file for that long, and so many bytes in memory.
_PAGE = 2000
_PAGE_BYTES = 4 * 1024 * 1024
_LAST_PRIORITY = 101

# Both read along an index, one priority at a time: the cost does not depend on how much waits.
_WAITING = "ack_state < 2"
_ASIDE = "ack_state > 0 AND ack_state = 3"
# Dead letters are at most ten thousand, found through their own index and put in order of age.
_DEAD = "ack_state > 0 AND ack_state = 2"

_COLUMNS = "seq, priority, topic, created_at, born, bytes, transmissions, ack_state, refusal"


class _Which(msgspec.Struct, frozen=True, kw_only=True):
    """Which entries to show, as `inspect` was asked."""

    limit: int
    topic: str | None
    priority: int | None
    dead: bool
    payload: bool
    seq: int | None


class _Place(msgspec.Struct, frozen=True):
    """Where a walk stands: after this sequence of this priority in this part of the outbox."""

    where: str
    priority: int
    seq: int


def inspect(
    path: str,
    *,
    limit: int = 20,
    topic: str | None = None,
    priority: int | None = None,
    dead: bool = False,
    payload: bool = False,
    seq: int | None = None,
    clock: Clock | None = None,
) -> Snapshot:
    """Return what an outbox holds, in sending order, all of it from one moment.

    Works beside a running drainer and never waits for a writer.

    Args:
        limit: at most so many entries; 0 for all, which holds all of them in memory (`stream_entries` does not).
        topic: only those of this topic. There is no index for it: everything is read until `limit` are found.
        priority: only those of this priority.
        dead: dead letters, oldest first, instead of what waits.
        payload: with their payload.
        seq: this entry alone.

    Raises:
        OutboxMissing, NotAnOutbox, OutboxTooNew, OutboxLocked, StorageFailed: it cannot be read; nothing was touched.
    """
    which = _Which(limit=limit, topic=topic, priority=priority, dead=dead, payload=payload, seq=seq)
    clock = clock or SystemClock()

    def job(connection: sqlite3.Connection) -> Snapshot:
        snapshot = _summary(connection, path, clock)
        return msgspec.structs.replace(snapshot, entries=list(_walk(connection, which, clock)))

    return look(path, job)


def summarize(path: str, *, clock: Clock | None = None) -> Snapshot:
    """Return the snapshot of an outbox without its entries. Raises as `inspect` does."""
    return look(path, lambda connection: _summary(connection, path, clock or SystemClock()))


def stream_entries(
    path: str,
    *,
    limit: int = 0,
    topic: str | None = None,
    priority: int | None = None,
    dead: bool = False,
    payload: bool = False,
    clock: Clock | None = None,
) -> Iterator[EntrySummary]:
    """Yield entries as `inspect` lists them, in bounded memory and without holding the file's state.

    It looks again every few thousand entries: what came or left meanwhile may be in it or not. Raises as `inspect`.
    """
    clock = clock or SystemClock()
    place: _Place | None = None
    left = limit or sys.maxsize
    while left:
        which = _Which(limit=min(left, _PAGE), topic=topic, priority=priority, dead=dead, payload=payload, seq=None)
        page, ended = look(path, partial(_page, which=which, clock=clock, place=place))
        yield from page
        if ended:
            return
        left -= len(page)
        last = page[-1]
        place = _Place(_ASIDE if last.state == "aside" else _WAITING, last.priority, last.seq)


def _page(
    connection: sqlite3.Connection, *, which: _Which, clock: Clock, place: _Place | None
) -> tuple[list[EntrySummary], bool]:
    """Return the entries that follow `place`, and whether they are the last."""
    page: list[EntrySummary] = []
    size = 0
    for entry in _walk(connection, which, clock, place):
        page.append(entry)
        size += entry.bytes if which.payload else 0
        if size >= _PAGE_BYTES:
            return page, False
    return page, len(page) < which.limit


def look(path: str, job: Callable[[sqlite3.Connection], T]) -> T:
    """Run `job` in one read transaction on a connection that cannot write, and close it. Raises as `inspect`."""
    with _reading_errors(path):
        require_file(path)
        at_rest = _at_rest(path)
        if at_rest is not None:
            # `mode=ro` alone would leave a log and its index beside the file, or fail where it cannot make them.
            try:
                with closing(_open(path, "ro&immutable=1")) as connection:
                    result = _in_transaction(connection, path, job)
            except (sqlite3.Error, OutboxError):
                if _at_rest(path) == at_rest:
                    raise
            else:
                if _at_rest(path) == at_rest:
                    return result
        with closing(_open(path, "ro")) as connection, room_to_open(path, writes=False):
            return _in_transaction(connection, path, job)


def _in_transaction(connection: sqlite3.Connection, path: str, job: Callable[[sqlite3.Connection], T]) -> T:
    connection.execute("BEGIN")
    require_outbox(connection, path)
    return job(connection)


def _open(path: str, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri(path, mode), uri=True, isolation_level=None, timeout=BUSY_TIMEOUT)
    # SQLite does not check that text is UTF-8, and one bad row must not hide the others.
    connection.text_factory = lambda text: text.decode(errors="replace")
    return connection


def _at_rest(path: str) -> tuple[int, int, int] | None:
    """Return what tells this state of a file that nobody has open from any other; None when somebody may have it open.

    SQLite takes no locks on a file that it is told is immutable. So the file is read in that way only while there is
    no log, no journal and no owner, and what was read counts only if all of this is still so afterwards.
    """
    real = os.path.realpath(path)
    if any(os.path.lexists(real + suffix) for suffix in ("-wal", "-journal")) or holder_of(path) is not None:
        return None
    if os.access(os.path.dirname(real), os.W_OK) and not _is_ours_alone(real):
        return None
    status = os.stat(real)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_ours_alone(real: str) -> bool:
    """Say whether nothing else in this process can have the file open: closing ours would drop the locks of that."""
    if os.name != "posix":
        return True
    if threading.active_count() > 1:
        return False
    status = os.stat(real)
    try:
        descriptors = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        return False
    for descriptor in descriptors:
        try:
            if os.path.samestat(os.fstat(descriptor), status):
                return False
        except OSError:
            continue  # the one that listed them
    return True


@contextmanager
def _reading_errors(path: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as exc:  # in what SQLite says about a damaged schema
        raise OutboxDamaged(path, f"the file is damaged; {SALVAGE_HINT}") from exc
    except sqlite3.Error as exc:
        name: str = getattr(exc, "sqlite_errorname", None) or type(exc).__name__
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise OutboxLocked(path, f"another program has kept it locked for more than {BUSY_TIMEOUT:g} s") from exc
        if name == "SQLITE_NOTADB":
            what = f"not a SQLite database, so not an outbox; if it was one, {SALVAGE_HINT}"
            raise NotAnOutbox(path, what) from exc
        if name.startswith("SQLITE_CORRUPT"):
            raise OutboxDamaged(path, f"the file is damaged; {SALVAGE_HINT}") from exc
        if not os.access(path, os.R_OK):
            raise StorageFailed(path, "you are not allowed to read it") from exc
        if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY")):
            what = "cannot be read here: its log needs a folder that can be written; copy it with its -wal file to one"
            raise StorageFailed(path, what) from exc
        raise StorageFailed(path, f"cannot be read ({name}: {exc})") from exc


def _summary(connection: sqlite3.Connection, path: str, clock: Clock) -> Snapshot:
    cursor = connection.execute("SELECT * FROM durablews_totals")  # a file that nobody has migrated yet has fewer
    counts = dict(zip([name for name, *_ in cursor.description], cursor.fetchone(), strict=True))
    state, since, reason, next_attempt, blocked = connection.execute(
        "SELECT state, since, reason, next_attempt, blocked FROM durablews_link"
    ).fetchone()
    caps = read_caps(connection)
    owner = holder_of(path)
    return Snapshot(
        # A name that is not UTF-8 cannot stand in JSON.
        outbox=os.fsencode(path).decode(errors="replace"),
        schema=schema_of(connection),
        stream=connection.execute("SELECT stream FROM durablews_meta").fetchone()[0],
        owner=owner,
        pending=counts["messages"],
        pending_bytes=counts["bytes"],
        caps=Limits(
            max_messages=caps.max_messages,
            max_bytes=caps.max_bytes,
            max_age=None if caps.max_age is None else caps.max_age / 1000,
            overflow=caps.overflow,
        ),
        oldest_age=_oldest_age(connection, _now(connection, clock)),
        dead=counts["dead_messages"],
        departed=Departures(**{name: counts.get(name, 0) for name in Departures.__struct_fields__}),
        enqueued=counts["enqueued"],
        redelivered=counts["redelivered"],
        file_bytes=os.stat(path).st_size + wal_bytes(path),
        # A drainer that was killed could not write that its link is gone.
        link=Link(
            state=state if owner else "DISCONNECTED",
            since=since,
            reason=reason,
            next_attempt=next_attempt if owner else None,
            blocked=blocked,
        ),
        entries=[],
    )


def _now(connection: sqlite3.Connection, clock: Clock) -> int:
    """Return the outbox clock as `entries.outbox_time` would, without writing where this boot's clock stood."""
    saved, boot, boot_clock = connection.execute("SELECT clock, boot, boot_clock FROM durablews_meta").fetchone()
    if boot == clock.boot_id:
        return int(saved + max(0, clock.boot() - boot_clock))
    # Nobody has written since the machine started. What came last shows how far the clock had come before.
    newest = connection.execute(
        "SELECT max(born) FROM (SELECT born FROM durablews_entries ORDER BY seq DESC LIMIT 100)"
    ).fetchone()
    return max(int(saved), newest[0] or 0)


def _oldest_age(connection: sqlite3.Connection, now: int) -> float | None:
    """Return the age of the lowest sequence that waits: one seek for each priority, not a walk past dead letters."""
    lowest: list[int] = []
    for where in (_WAITING, _ASIDE):
        for priority in _priorities(connection, where):
            row = connection.execute(
                f"SELECT min(seq) FROM durablews_entries WHERE priority = ? AND {where}", (priority,)
            ).fetchone()
            lowest.append(row[0])
    if not lowest:
        return None
    row = connection.execute("SELECT born FROM durablews_entries WHERE seq = ?", (min(lowest),)).fetchone()
    return _age(now, row[0])


def _age(now: int, born: int | None) -> float | None:
    return None if born is None else max(0, now - born) / 1000


def _priorities(connection: sqlite3.Connection, where: str, below: int = _LAST_PRIORITY) -> Iterator[int]:
    sql = f"SELECT max(priority) FROM durablews_entries WHERE priority < ? AND {where}"
    while (row := connection.execute(sql, (below,)).fetchone())[0] is not None:
        below = row[0]
        yield below


def _walk(
    connection: sqlite3.Connection, which: _Which, clock: Clock, place: _Place | None = None
) -> Iterator[EntrySummary]:
    """Yield the entries that follow `place`, at most `which.limit`."""
    now = _now(connection, clock)
    columns = f"{_COLUMNS}, payload" if which.payload else _COLUMNS
    for number, row in enumerate(_rows(connection, which, columns, place), start=1):
        yield _entry(row, now)
        if number == which.limit:
            return


def _rows(
    connection: sqlite3.Connection, which: _Which, columns: str, place: _Place | None
) -> Iterator[tuple[Any, ...]]:
    if which.seq is not None:
        yield from connection.execute(f"SELECT {columns} FROM durablews_entries WHERE seq = ?", (which.seq,))
        return
    topic = "" if which.topic is None else " AND topic = :topic"
    select = f"SELECT {columns} FROM durablews_entries"
    if which.dead:
        priority = "" if which.priority is None else " AND priority = :priority"
        found = (
            f"SELECT seq FROM durablews_entries INDEXED BY durablews_answered"
            f" WHERE {_DEAD}{priority}{topic} AND seq > :after ORDER BY seq"
        )
        names = {"priority": which.priority, "topic": which.topic, "after": place.seq if place else 0}
        for (seq,) in connection.execute(found, names):
            yield from connection.execute(f"{select} WHERE seq = ?", (seq,))
        return
    for where in (_WAITING, _ASIDE):
        if place and where == _WAITING and place.where == _ASIDE:
            continue
        start = place if place and place.where == where else None
        if which.priority is not None:
            wanted = iter([which.priority])
        else:
            wanted = _priorities(connection, where, start.priority + 1 if start else _LAST_PRIORITY)
        for number in wanted:
            after = start.seq if start and number == start.priority else 0
            yield from connection.execute(
                f"{select} WHERE priority = :priority AND seq > :after AND {where}{topic} ORDER BY seq",
                {"priority": number, "after": after, "topic": which.topic},
            )


def _entry(row: tuple[Any, ...], now: int) -> EntrySummary:
    seq, priority, topic, created_at, born, size, transmissions, ack_state, refusal, *payload = row
    return EntrySummary(
        seq=seq,
        priority=priority,
        topic=topic,
        created_at=created_at,
        age=_age(now, born),
        bytes=size,
        transmissions=transmissions,
        state=_STATES[ack_state],
        refusal=msgspec.UNSET if refusal is None else _refusal(refusal),
        payload=_payload(payload[0]) if payload else msgspec.UNSET,
    )


def _refusal(stored: str) -> Refusal:
    try:
        return msgspec.json.decode(stored, type=Refusal)
    except (ValueError, RecursionError):
        return Refusal(code="unreadable", reason=stored)


def _payload(stored: object) -> msgspec.Raw:
    if isinstance(stored, bytes):
        return msgspec.Raw(msgspec.json.encode({"base64": base64.b64encode(stored).decode()}))
    try:
        # Not decoded and encoded: a number with many digits stays as it was written. Formatting also checks.
        return msgspec.Raw(msgspec.json.format(str(stored).encode(), indent=-1))
    except (ValueError, RecursionError):
        return msgspec.Raw(msgspec.json.encode({"text": str(stored)}))
