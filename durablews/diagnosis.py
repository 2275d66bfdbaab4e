"""What ails an outbox: reads, never writes. Each finding says what to do about it."""

from __future__ import annotations

import os
import sqlite3
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

from durablews.analysis.surroundings import Surroundings, ThisMachine
from durablews.carryover import Progress
from durablews.database import SALVAGE_HINT, require_file, wal_bytes, wal_stamp
from durablews.errors import NotAnOutbox, OutboxDamaged, OutboxError, OutboxTooNew
from durablews.inspection import look
from durablews.messages import checksum
from durablews.ownership import holder_of
from durablews.remains import Remains
from durablews.salvage import open_source, reference_layout
from durablews.schema import APPLICATION_ID, migrations, schema_of
from durablews.writeahead import Log, read_log

__all__ = ["Diagnosis", "Finding", "diagnose"]

#: "damage": a salvage is needed. "warning": something to mend. "note": to be known, and no reason for an exit code.
Level = Literal["damage", "warning", "note"]

# The bug that two connections which reset a log at once can meet (sqlite.org/wal.html, "the WAL-reset bug"): from 3.7.0
# on, gone in 3.51.3, and in these of the older lines.
_RESET_BUG_FROM, _RESET_BUG_UNTIL = (3, 7, 0), (3, 51, 3)
_RESET_BUG_BACKPORTS = ((3, 44, 6), (3, 50, 7))
_NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "fuse.sshfs")
# The year of the first release: a clock before it has not been set. 2026-01-01 UTC, in seconds.
_BEFORE_US = 1_767_225_600
_DAY = 86_400
_LONG_LOG = 16 * 1024 * 1024
# Faults of SQLite's own check that are shown, and rows whose checksums are compared in one look.
_FAULTS, _PAGE, _NAMED = 10, 2000, 10
_NEWEST = "SELECT created_at FROM durablews_entries ORDER BY seq DESC LIMIT 100"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is to be known about an outbox. `remedy` says what to do; None where nothing is to be done."""

    name: str
    level: Level
    what: str
    remedy: str | None = None


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        schema: of the file; None when it cannot be read.
        owner: who drains it now, or None.
        sqlite: the version that this Python has.
    """

    outbox: str
    schema: int | None
    owner: str | None
    sqlite: str
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        return all(finding.level == "note" for finding in self.findings)

    @property
    def damaged(self) -> bool:
        return any(finding.level == "damage" for finding in self.findings)


class _Looks(msgspec.Struct):
    """What one look into the database has shown."""

    schema: int
    ours: bool
    page_size: int
    check: list[str]
    kept: tuple[Any, ...]
    counted: tuple[Any, ...]
    newest: int | None
    draining: bool
    salvage: str | None


def diagnose(
    path: str, *, surroundings: Surroundings | None = None, progress: Progress = lambda what, done, whole: None
) -> Diagnosis:
    """Look at everything about an outbox that may be wrong. Works beside a running drainer.

    Raises:
        OutboxMissing, NotAnOutbox, OutboxTooNew, OutboxLocked: there is nothing to look at.
    """
    surroundings = surroundings or ThisMachine()
    require_file(path)
    owner = holder_of(path)
    found: list[Finding] = []
    looks: _Looks | None = None
    try:
        progress("checking the pages", 0, 1)
        looks = look(path, _look_at_database)
        found += _of_database(looks)
        found += _of_payloads(path, progress)
    except OutboxTooNew:
        raise
    except (NotAnOutbox, OutboxDamaged) as exc:
        if not _was_outbox(path):
            raise
        found.append(Finding(name="damaged", level="damage", what=exc.what.split("; ")[0], remedy=SALVAGE_HINT))
    if owner is None:
        found += _of_log(path, looks)
    found += _of_surroundings(path, surroundings, looks, owner)
    found += _of_sqlite(sqlite3.sqlite_version_info)
    return Diagnosis(
        outbox=os.fsencode(path).decode(errors="replace"),
        schema=looks.schema if looks else None,
        owner=owner,
        sqlite=sqlite3.sqlite_version,
        findings=found,
    )


def _was_outbox(path: str) -> bool:
    """Whether anything in a file that SQLite cannot read says that it was an outbox."""
    final = Path(os.path.realpath(path))
    try:
        with ExitStack() as stack:
            # Its size first: whether this process has it open is asked there.
            file, log = open_source(stack, path, final), open_source(stack, path, final.with_name(final.name + "-wal"))
            remains = Remains(file, log, reference_layout())
            return remains.is_outbox or remains.is_application
    except (OSError, OutboxError):
        return False


def _look_at_database(connection: sqlite3.Connection) -> _Looks:
    def one(sql: str) -> Any:
        return connection.execute(sql).fetchone()

    check = [row[0] for row in connection.execute(f"PRAGMA integrity_check({_FAULTS})")]
    meta = connection.execute("SELECT * FROM durablews_meta")
    columns = [name for name, *_ in meta.description]
    facts = dict(zip(columns, meta.fetchone(), strict=True))
    return _Looks(
        schema=schema_of(connection),
        ours=one("PRAGMA application_id")[0] == APPLICATION_ID,
        page_size=one("PRAGMA page_size")[0],
        check=[] if check == ["ok"] else check,
        kept=one("SELECT messages, bytes, dead_messages, dead_bytes FROM durablews_totals"),
        counted=one(
            "SELECT count(*) FILTER (WHERE ack_state <> 2), coalesce(sum(bytes) FILTER (WHERE ack_state <> 2), 0),"
            " count(*) FILTER (WHERE ack_state = 2), coalesce(sum(bytes) FILTER (WHERE ack_state = 2), 0)"
            " FROM durablews_entries"
        ),
        newest=one(
            "SELECT max(created_at) FROM (SELECT created_at FROM durablews_entries ORDER BY seq DESC LIMIT 100)"
        )[0],
        draining=bool(facts["draining"]),
        salvage=facts.get("salvage"),
    )


def _of_database(looks: _Looks) -> list[Finding]:
    found: list[Finding] = []
    if looks.check:
        what = f"SQLite finds {_some(looks.check)}"
        remedy = SALVAGE_HINT if looks.ours else "it is an application's database: its owner has to mend it"
        found.append(Finding(name="damaged", level="damage", what=what, remedy=remedy))
    elif looks.kept != looks.counted:
        what = f"its counts (messages, bytes, dead letters, their bytes) say {looks.kept}, and it holds {looks.counted}"
        found.append(Finding(name="counts", level="damage", what=what, remedy=SALVAGE_HINT))
    if looks.schema < migrations()[-1][0]:
        what = f"its schema is {looks.schema}, and this durablews knows {migrations()[-1][0]}"
        found.append(
            Finding(name="schema", level="note", what=what, remedy="whoever writes to it next brings it up to date")
        )
    if looks.salvage is not None:
        found.append(_of_salvage(looks.salvage))
    return found


def _some(faults: list[str]) -> str:
    more = " and more" if len(faults) == _FAULTS else f" and {len(faults) - 2} more" if len(faults) > 2 else ""
    return "; ".join(fault.replace("\n", " ") for fault in faults[:2]) + more


def _of_salvage(text: str) -> Finding:
    try:
        note = msgspec.json.decode(text, type=dict[str, Any])
        lost = "an unknown number" if note["lost"] is None else note["lost"]
        what = f"it was made from {note['damaged']}: {note['carried']} entries came over, lost: {lost}"
    except (ValueError, KeyError, RecursionError):
        what = "it was made from a damaged file"
    return Finding(name="salvaged", level="note", what=what, remedy="remove the damaged file once nobody needs it")


def _of_payloads(path: str, progress: Progress) -> list[Finding]:
    """Compare each payload with its checksum, a page in each look."""
    after, wrong, first = 0, 0, list[int]()
    last = look(path, lambda connection: connection.execute("SELECT max(seq) FROM durablews_entries").fetchone()[0])
    while rows := look(path, partial(_checksums, after=after)):
        for seq, kept, payload in rows:
            after = seq
            if kept is not None and checksum(payload) != kept:
                wrong += 1
                first += [seq] if len(first) < _NAMED else []
        progress("comparing checksums", after, max(last or 0, after))
    if not wrong:
        return []
    named = ", ".join(map(str, first)) + (", …" if wrong > len(first) else "")
    what = f"{wrong} of the payloads do not match their checksum: sequence {named}"
    remedy = "nothing: they are never sent, and become dead letters (durablews inspect --dead)"
    return [Finding(name="payloads", level="warning", what=what, remedy=remedy)]


def _checksums(connection: sqlite3.Connection, *, after: int) -> list[tuple[int, int | None, bytes]]:
    return connection.execute(
        "SELECT seq, checksum, CAST(payload AS BLOB) FROM durablews_entries WHERE seq > ? AND ack_state <> 2"
        f" ORDER BY seq LIMIT {_PAGE}",
        (after,),
    ).fetchall()


def _of_log(path: str, looks: _Looks | None) -> list[Finding]:
    """Look into the log for what SQLite ignores in silence; while somebody writes there is no telling."""
    final = os.path.realpath(path)
    stamp = wal_stamp(final)
    log = _read(f"{final}-wal", looks.page_size if looks else 4096)
    if log is None:
        if looks is not None and looks.draining and looks.ours:
            what = "whoever drained it last died, and the log that it must have left is not here"
            remedy = "put the log back if there is one somewhere; else what was in it is gone, or came over already"
            return [Finding(name="log", level="note", what=what, remedy=remedy)]
        return []
    if wal_stamp(final) != stamp or not log.hidden:
        return []
    where = f"at frame {log.broken[0]} of {log.frames}" if log.broken else "in its header"
    what = f"its log is damaged {where}: SQLite does not see the {log.hidden} commits"
    return [Finding(name="log", level="damage", what=f"{what} from there on", remedy=SALVAGE_HINT)]


def _read(name: str, page_size: int) -> Log | None:
    """Read a log as it is. SQLite takes no locks on this file, so that closing it drops none."""
    try:
        with open(name, "rb") as file:
            length = os.fstat(file.fileno()).st_size

            def read(offset: int, size: int) -> bytes:
                file.seek(offset)
                return file.read(size)

            return read_log(read, length, page_size)
    except FileNotFoundError:
        return None


def _of_surroundings(path: str, surroundings: Surroundings, looks: _Looks | None, owner: str | None) -> list[Finding]:
    found: list[Finding] = []
    final = os.path.realpath(path)
    if owner is None:
        found.append(Finding(name="drainer", level="note", what="nobody drains it now"))
    if (log := wal_bytes(final)) > _LONG_LOG:
        remedy = "end the program that keeps reading it" if owner else "let something drain it, which empties the log"
        found.append(Finding(name="log size", level="warning", what=f"its log has {log} bytes", remedy=remedy))
    mode = surroundings.mode(final)
    if looks is not None and looks.ours and mode is not None and mode & 0o077:
        what = f"others may read or write it (mode {mode:o})"
        found.append(Finding(name="mode", level="warning", what=what, remedy=f"chmod 600 {path}"))
    kind = surroundings.file_system(final)
    if kind in _NETWORK_FILE_SYSTEMS:
        what = f"it is on a network file system ({kind}), where SQLite's log is not safe"
        found.append(
            Finding(name="file system", level="warning", what=what, remedy="move it to a disk of this machine")
        )
    if surroundings.writable_folder(final) is False:
        what = "its folder cannot be written by this user"
        remedy = "if an agent runs as this user, let it write there: the log lies beside the file"
        found.append(Finding(name="folder", level="warning", what=what, remedy=remedy))
    now = surroundings.now()
    if now < _BEFORE_US:
        what, remedy = "the clock of this machine has not been set", "nothing for durablews, whose ages do not need it"
        found.append(Finding(name="clock", level="warning", what=what, remedy=f"{remedy}; TLS does"))
    elif looks is not None and looks.newest is not None and looks.newest / 1000 > now + _DAY:
        what = "messages were stored more than a day in the future: the clock of this machine was wrong, or is"
        found.append(Finding(name="clock", level="warning", what=what, remedy="set the clock; ages do not need it"))
    return found


def _of_sqlite(version: tuple[int, int, int]) -> list[Finding]:
    """Say whether this SQLite can corrupt a log that two connections reset at once."""
    fixed = version >= _RESET_BUG_UNTIL or any(
        version[:2] == line[:2] and version >= line for line in _RESET_BUG_BACKPORTS
    )
    if fixed or version < _RESET_BUG_FROM:
        return []
    what = (
        f"SQLite {'.'.join(map(str, version))} has the WAL-reset bug; durablews avoids it: only the drainer checkpoints"
    )
    remedy = "let no other program run checkpoints on the file, or update SQLite to 3.51.3, 3.50.7 or 3.44.6"
    return [Finding(name="sqlite", level="note", what=what, remedy=remedy)]
