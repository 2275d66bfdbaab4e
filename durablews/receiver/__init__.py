"""The server side of durablews: receive what clients' outboxes send, and apply each message once.

Start at `Receiver`. Everything below it works without sockets (`exchange`), and below that without a database
(`session`).
"""

from __future__ import annotations

from durablews.receiver.batch import Batch
from durablews.receiver.deliveries import Delivery
from durablews.receiver.link import WebSocket, select_subprotocol
from durablews.receiver.messages import Message
from durablews.receiver.receiver import Receiver, Served
from durablews.receiver.session import Refusal
from durablews.receiver.store import Store
from durablews.wire.frames import SUBPROTOCOLS

__all__ = [
    "SUBPROTOCOLS",
    "Batch",
    "Delivery",
    "Message",
    "Receiver",
    "Refusal",
    "Served",
    "Store",
    "WebSocket",
    "select_subprotocol",
]
