"""A durable outbox for WebSocket clients: nothing that was sent is lost to a bad link or a dead battery.

Names are loaded when they are first used, so that ``durablews inspect`` starts without asyncio or websockets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from durablews.errors import DurablewsError as DurablewsError

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    "DurablewsError": "errors",
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'durablews' has no attribute {name!r}")
    return getattr(import_module(f"durablews.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
