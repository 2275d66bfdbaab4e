"""The error tree. Each class is one thing that a caller can act upon.

DurablewsError
├── ConfigError              a setting is unknown, missing or out of its range
├── PayloadError             a message cannot be stored as it is; nothing was written
├── OutboxError              something about one outbox file (`path`)
│   ├── OutboxMissing        there is no such file
│   ├── NotAnOutbox          the file is something else: text, another program's database, empty
│   ├── OutboxTooNew         written by a newer durablews; left untouched
│   ├── OutboxInUse          another process drains it (`holder`)
│   ├── OutboxLocked         another program held its write lock for longer than the busy timeout
│   ├── OutboxClosed         used after it was closed
│   ├── OutboxFull           its caps, or the disk, have no room; the message was not stored
│   │   └── MessageTooLarge  the message alone is over the byte cap: it will never fit
│   └── StorageFailed        the disk failed (`stored`: False, or None when that cannot be known)
│       └── OutboxDamaged    the file makes no sense to SQLite: `durablews doctor --salvage`
├── ProtocolError            the other side sent what its protocol does not allow (`close_code`)
└── Undelivered              a receipt's message left the outbox without an ack (`seq`)
    ├── Rejected             the server refused it for good: it is a dead letter (`code`, `reason`)
    ├── Expired              it grew older than its ttl or the age cap
    └── Dropped              it made room for newer ones, or found none itself
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "Dropped",
    "DurablewsError",
    "Expired",
    "MessageTooLarge",
    "NotAnOutbox",
    "OutboxClosed",
    "OutboxDamaged",
    "OutboxError",
    "OutboxFull",
    "OutboxInUse",
    "OutboxLocked",
    "OutboxMissing",
    "OutboxTooNew",
    "PayloadError",
    "ProtocolError",
    "Rejected",
    "StorageFailed",
    "Undelivered",
]


class DurablewsError(Exception):
    """The root of every error that durablews raises on purpose."""


class ConfigError(DurablewsError):
    """A setting is unknown, missing or out of its range."""


class PayloadError(DurablewsError):
    """A message cannot be stored as it is; nothing was written."""


class OutboxError(DurablewsError):
    """Something about one outbox file.

    Attributes:
        path: the outbox, as it was named by the caller.
    """

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path, what)
        self.path = path
        self.what = what

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


class OutboxMissing(OutboxError):
    """There is no such file."""


class NotAnOutbox(OutboxError):
    """The file is something else: a text, another program's database, empty."""


class OutboxTooNew(OutboxError):
    """A newer durablews wrote the file; it was left untouched."""


class OutboxInUse(OutboxError):
    """Another client drains this outbox.

    Attributes:
        holder: who, as far as it can be told: ``"pid 812 on charger-7 since 2026-11-22 20:24:01"``.
    """

    def __init__(self, path: str, holder: str) -> None:
        super().__init__(path, f"already in use by {holder}; one client drains an outbox, any number may write to it")
        self.holder = holder

    def __reduce__(self) -> tuple[type[OutboxInUse], tuple[str, str]]:
        return type(self), (self.path, self.holder)


class OutboxLocked(OutboxError):
    """Another program held the file's write lock for longer than the busy timeout; nothing was written."""


class OutboxClosed(OutboxError):
    """The outbox was used after it was closed, or by a forked child of the process that opened it."""


class OutboxFull(OutboxError):
    """The caps of the outbox, or the disk, have no room; the message was not stored."""

    #: Whether what is just on its way kept the overflow policy from making room.
    droppable = False


class MessageTooLarge(OutboxFull):
    """The message alone is over the byte cap: waiting will not make it fit."""


class StorageFailed(OutboxError):
    """The disk or the file failed.

    Attributes:
        stored: False when nothing was stored; None when that cannot be known: a commit whose sync failed may or may
            not be there after a restart. Send again with the same ``id`` to be certain of one.
    """

    def __init__(self, path: str, what: str, stored: bool | None = False) -> None:
        super().__init__(path, what)
        self.stored = stored

    def __reduce__(self) -> tuple[type[StorageFailed], tuple[str, str, bool | None]]:
        return type(self), (self.path, self.what, self.stored)


class OutboxDamaged(StorageFailed):
    """The file makes no sense to SQLite. ``durablews doctor --salvage`` carries over what can be read."""


class ProtocolError(DurablewsError):
    """The other side sent what its protocol does not allow.

    Attributes:
        close_code: the WebSocket close code that answers it (PROTOCOL.md section 6).
    """

    def __init__(self, what: str, close_code: int = 4400) -> None:
        super().__init__(what)
        self.close_code = close_code


class Undelivered(DurablewsError):
    """A receipt's message left the outbox without an ack.

    Attributes:
        seq: its sequence; None when it was never stored.
        unknown: True when it had been transmitted, so that the server may have applied it all the same.
    """

    def __init__(self, what: str, seq: int | None = None, *, unknown: bool = False) -> None:
        super().__init__(what)
        self.seq = seq
        self.unknown = unknown


class Rejected(Undelivered):
    """The server refused it for good: it is a dead letter.

    Attributes:
        code: the server's word for why (``"invalid"``), or ours (``"too_large"``, ``"poison"``).
        reason: the server's text for people, or None.
    """

    def __init__(
        self, what: str, seq: int | None = None, *, code: str, reason: str | None = None, unknown: bool = False
    ) -> None:
        super().__init__(what, seq, unknown=unknown)
        self.code = code
        self.reason = reason


class Expired(Undelivered):
    """It grew older than its ttl or than the outbox's age cap."""


class Dropped(Undelivered):
    """It made room for newer messages, or found none itself (overflow policy)."""
