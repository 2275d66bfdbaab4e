"""Whose sequences these are: the stream, and the guards against giving an old number to new content.

PROTOCOL.md section 5: a restored backup, a cloned disk or a lost tail of the log must not reuse what a server has seen.
Everything here runs in one synced transaction when the drainer opens the outbox, before it gives out a number.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import sys
from collections.abc import Callable

from durablews.entries import last_sequence
from durablews.settlement import mark_first_as_sent

__all__ = ["claimed_last", "confirm_raise", "leave", "machine_id", "renew_stream", "sendable_last", "take_over"]

#: The raise of the sequence at each opening is uniform in 1 to this.
_LARGEST_RAISE = 2**32
#: Above this a stream ends and a new one numbers from 1: integers of a frame are below 2^53.
_LAST_OF_A_STREAM = 2**52


def take_over(
    connection: sqlite3.Connection, path: str, *, machine: str, window: int, draw: Callable[[int], int]
) -> str:
    """Make this file safe to drain from here, and return its stream.

    A file that was opened elsewhere before (another inode, another machine) takes a new stream. The sequence is raised
    by a random amount, so that what this process gives out lies above all that any life of this file gave out.

    Args:
        machine: `machine_id()`.
        window: how many entries of one priority may come to lie first in the file although they were sent; so many
            count as transmitted when this process dies.
        draw: returns a uniform integer in 0 to its argument, exclusive.
    """
    inode = str(os.stat(path).st_ino)
    stream, file, where, raised_from, raised_to, draining, largest_window = connection.execute(
        "SELECT stream, file, machine, raised_from, raised_to, draining, largest_window FROM durablews_meta"
    ).fetchone()
    if draining:
        mark_first_as_sent(connection, largest_window)
    if (file or inode) != inode or (where or machine) != machine:
        stream = renew_stream(connection)
    last = last_sequence(connection)
    given_out = last if raised_to is None else raised_from
    raised = last + 1 + draw(_LARGEST_RAISE)
    if raised > _LAST_OF_A_STREAM:
        stream = renew_stream(connection)
        given_out = _renumber(connection)
        raised = given_out + 1 + draw(_LARGEST_RAISE)
    _set_last_sequence(connection, raised)
    connection.execute(
        "UPDATE durablews_meta SET file = ?, machine = ?, raised_from = ?, raised_to = ?,"
        " largest_window = max(largest_window, ?), draining = 1",
        (inode, machine, given_out, raised, window),
    )
    return str(stream)


def claimed_last(connection: sqlite3.Connection) -> int:
    """Return `last` for a hello: the highest sequence given out before the first raise that no welcome has followed.

    What came after that raise was never sent, so no server has seen a number above it, unless it knows another life of
    this file. To claim more could hide that: of what was given out between several openings, the first may lie below
    what the server has seen, and the last above.
    """
    raised_from, raised_to = connection.execute("SELECT raised_from, raised_to FROM durablews_meta").fetchone()
    return last_sequence(connection) if raised_to is None else int(raised_from)


def sendable_last(connection: sqlite3.Connection) -> int | None:
    """Return the highest sequence that may be sent now; None when all may.

    While the file does not say that a welcome has followed its raise, because the disk fails, nothing from above it may
    be sent: after a crash a hello would claim less than the server has seen, and the stream would end for nothing.
    """
    (raised_from,) = connection.execute("SELECT raised_from FROM durablews_meta").fetchone()
    return None if raised_from is None else int(raised_from)


def confirm_raise(connection: sqlite3.Connection) -> None:
    """Note that a server has welcomed this stream after its raise; before anything is sent on that connection."""
    connection.execute("UPDATE durablews_meta SET raised_from = NULL, raised_to = NULL WHERE raised_to IS NOT NULL")


def leave(connection: sqlite3.Connection) -> None:
    """Note that the drainer closes with everything said about what was in flight."""
    connection.execute("UPDATE durablews_meta SET draining = 0")


def renew_stream(connection: sqlite3.Connection) -> str:
    """Give this outbox a new stream and return it. What was unanswered may then be applied twice, never not at all."""
    stream = os.urandom(16).hex()
    connection.execute("UPDATE durablews_meta SET stream = ?", (stream,))
    return stream


def machine_id() -> str:
    """Return a digest that tells this machine from others; "" where the system has no id to offer.

    A digest, because machine-id(5) asks not to show the id itself to others, and an outbox may be copied.
    """
    for name in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            with open(name, encoding="ascii") as file:
                return hashlib.sha256(b"durablews " + file.read().strip().encode()).hexdigest()[:32]
        except (OSError, UnicodeError):
            continue
    if sys.platform == "win32":
        import winreg

        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SOFTWARE\Microsoft\Cryptography") as key:
            value = str(winreg.QueryValueEx(key, "MachineGuid")[0])
            return hashlib.sha256(b"durablews " + value.encode()).hexdigest()[:32]
    return ""


def _renumber(connection: sqlite3.Connection) -> int:
    """Number everything from 1 in its order, and return the last. Happens once in a million openings."""
    number = 0
    # What has left would be taken for whoever gets its number next.
    connection.execute("DELETE FROM durablews_ids WHERE seq NOT IN (SELECT seq FROM durablews_entries)")
    connection.execute("DELETE FROM durablews_departed")
    rows = connection.execute("SELECT seq FROM durablews_entries ORDER BY seq").fetchall()
    for number, (seq,) in enumerate(rows, start=1):
        # Ascending, and a new number is never above its old one: none is taken.
        connection.execute("UPDATE durablews_entries SET seq = ? WHERE seq = ?", (number, seq))
        connection.execute("UPDATE durablews_ids SET seq = ? WHERE seq = ?", (number, seq))
    return number


def _set_last_sequence(connection: sqlite3.Connection, last: int) -> None:
    changed = connection.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'durablews_entries'", (last,))
    if changed.rowcount == 0:
        connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('durablews_entries', ?)", (last,))
