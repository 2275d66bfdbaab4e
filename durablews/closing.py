"""The end of a WebSocket: closed in bounded time, and how it ended."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from durablews.delivery.suspicion import Closed

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

__all__ = ["close_in_time", "how_closed"]

# The close handshake has a timeout of its own; this one is for a socket that does not even take the frame. Who did not
# answer pings or messages will not answer a close frame either: it gets the frame if it can, and no time.
_LONGEST_CLOSE, _LONGEST_CLOSE_UNHEARD = 5.0, 0.5
_UNHEARD = 4408


async def close_in_time(websocket: ClientConnection, code: int, reason: str) -> None:
    """Close a connection, and cut it when that takes long: who reads nothing must not hold up the next try."""
    try:
        async with asyncio.timeout(_LONGEST_CLOSE_UNHEARD if code == _UNHEARD else _LONGEST_CLOSE):
            await websocket.close(code, reason.encode()[:120].decode(errors="ignore"))
    except TimeoutError:
        websocket.transport.abort()


def how_closed(websocket: ClientConnection) -> Closed:
    """Say how a connection ended that this side did not want to end."""
    received, sent = websocket.protocol.close_rcvd, websocket.protocol.close_sent
    if received is not None:
        return Closed(code=received.code, reason=received.reason, received=True)
    # What websockets itself found wrong with the other side's frames, such as 1009.
    return Closed(code=sent.code, reason=sent.reason) if sent else Closed(code=1006, reason="the link was lost")
