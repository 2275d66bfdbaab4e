"""A durable outbox for WebSocket clients: nothing that was sent is lost to a bad link or a dead battery.

Names are loaded when they are first used, so that ``durablews inspect`` starts without asyncio or websockets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from durablews.analysis.findings import Finding as Finding
    from durablews.analysis.judging import check as check
    from durablews.client import Client as Client
    from durablews.client import Stats as Stats
    from durablews.client import connect as connect
    from durablews.config import Settings as Settings
    from durablews.errors import (
        ConfigError as ConfigError,
    )
    from durablews.errors import (
        Dropped as Dropped,
    )
    from durablews.errors import (
        DurablewsError as DurablewsError,
    )
    from durablews.errors import (
        Expired as Expired,
    )
    from durablews.errors import (
        MessageTooLarge as MessageTooLarge,
    )
    from durablews.errors import (
        NotAnOutbox as NotAnOutbox,
    )
    from durablews.errors import (
        OutboxClosed as OutboxClosed,
    )
    from durablews.errors import (
        OutboxDamaged as OutboxDamaged,
    )
    from durablews.errors import (
        OutboxError as OutboxError,
    )
    from durablews.errors import (
        OutboxFull as OutboxFull,
    )
    from durablews.errors import (
        OutboxInUse as OutboxInUse,
    )
    from durablews.errors import (
        OutboxLocked as OutboxLocked,
    )
    from durablews.errors import (
        OutboxMissing as OutboxMissing,
    )
    from durablews.errors import (
        OutboxTooNew as OutboxTooNew,
    )
    from durablews.errors import (
        PayloadError as PayloadError,
    )
    from durablews.errors import (
        ProtocolError as ProtocolError,
    )
    from durablews.errors import (
        Rejected as Rejected,
    )
    from durablews.errors import (
        StorageFailed as StorageFailed,
    )
    from durablews.errors import (
        Undelivered as Undelivered,
    )
    from durablews.lifecycle import State as State
    from durablews.outbox import Counts as Counts
    from durablews.outbox import Outbox as Outbox
    from durablews.outbox import Receipt as Receipt
    from durablews.receiver import Receiver as Receiver

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    "Client": "client",
    "Stats": "client",
    "connect": "client",
    "Finding": "analysis.findings",
    "check": "analysis.judging",
    "Settings": "config",
    "ConfigError": "errors",
    "Dropped": "errors",
    "DurablewsError": "errors",
    "Expired": "errors",
    "MessageTooLarge": "errors",
    "NotAnOutbox": "errors",
    "OutboxClosed": "errors",
    "OutboxDamaged": "errors",
    "OutboxError": "errors",
    "OutboxFull": "errors",
    "OutboxInUse": "errors",
    "OutboxLocked": "errors",
    "OutboxMissing": "errors",
    "OutboxTooNew": "errors",
    "PayloadError": "errors",
    "ProtocolError": "errors",
    "Rejected": "errors",
    "StorageFailed": "errors",
    "Undelivered": "errors",
    "State": "lifecycle",
    "Counts": "outbox",
    "Outbox": "outbox",
    "Receipt": "outbox",
    "Receiver": "receiver",
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'durablews' has no attribute {name!r}")
    return getattr(import_module(f"durablews.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
