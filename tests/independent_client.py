"""A durablews.v1 client written from PROTOCOL.md alone: plain `websockets` and `json`, nothing of durablews.

For tests of servers: it shows that a server speaks the page and not just our own client's habits.
"""

from __future__ import annotations

import json
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

__all__ = ["IndependentClient", "dial", "hello_frame", "msgs_frame", "read"]


def dial(url: str) -> connect:
    """Return a connection that offers JSON only."""
    return connect(url, subprotocols=[Subprotocol("durablews.v1.json")])


def hello_frame(stream: str, last: int = 0, instance: str = "0123456789abcdef", max_bytes: int = 1 << 20) -> str:
    frame = {"t": "hello", "stream": stream, "instance": instance, "last": last, "max_bytes": max_bytes}
    return json.dumps(frame | {"agent": "independent/1"})


def msgs_frame(priority: int, after: int | None, *items: Any) -> str:
    frame = {"t": "msgs", "p": priority, "m": list(items)}
    return json.dumps(frame if after is None else frame | {"a": after})


async def read(ws: ClientConnection) -> dict[str, Any]:
    """Return the next frame that the server sends."""
    frame = json.loads(await ws.recv())
    assert isinstance(frame, dict)
    return frame


class IndependentClient:
    """One outbox in memory; it outlives its connections."""

    def __init__(self, url: str, stream: str) -> None:
        self.url, self.stream = url, stream
        self.last = 0
        self.waiting: dict[int, dict[int, Any]] = {}  # priority -> sequence -> payload
        self.dead: dict[int, Any] = {}  # what was refused for good
        self.nacks = 0

    def enqueue(self, payload: Any, priority: int = 0) -> int:
        self.last += 1
        self.waiting.setdefault(priority, {})[self.last] = payload
        return self.last

    async def drain(self, *, batch: int = 10, cut_after: int | None = None) -> None:
        """Send until everything is answered; `cut_after`: break the connection after so many frames, answers unread."""
        async with dial(self.url) as ws:
            assert ws.subprotocol == "durablews.v1.json"
            await ws.send(hello_frame(self.stream, self.last))
            welcome = await read(ws)
            assert welcome["t"] == "welcome"
            assert not welcome.get("rewound")
            frames = 0
            for priority in sorted(self.waiting, reverse=True):
                waiting = self.waiting[priority]
                sent: list[int] = []  # on this connection, answered or not, that no nack took back: its last is `a`
                while waiting:
                    # All that the window allows goes out before answers are read.
                    ready = sorted(waiting)[: welcome["window"]]
                    for start in range(0, len(ready), batch):
                        part = ready[start : start + batch]
                        after = sent[-1] if sent else None
                        await ws.send(msgs_frame(priority, after, *([seq, waiting[seq]] for seq in part)))
                        sent += part
                        frames += 1
                        if frames == cut_after:
                            ws.transport.abort()
                            return
                    while set(ready) & set(waiting):
                        answer = await read(ws)
                        assert answer["p"] == priority
                        if answer["t"] == "ack":
                            for seq in [s for s in ready if s <= answer["s"]]:
                                waiting.pop(seq, None)
                            continue
                        assert answer["t"] == "nack"
                        self.nacks += 1
                        if answer.get("final"):
                            self.dead[answer["s"]] = waiting.pop(answer["s"])
                        sent = [seq for seq in sent if seq < answer["s"]]
                        break
