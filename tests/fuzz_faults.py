"""One fault for each target of `fuzz_targets`, put into the library on purpose.

What finds none of them finds nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

import durablews.configfile as configfile
import durablews.dialling as dialling
import durablews.netlink as netlink
import durablews.receiver.session as session
import durablews.wire.frames as frames
from durablews.delivery.lane import Lane
from durablews.errors import ProtocolError
from durablews.messages import Entry, Run

__all__ = ["FAULTS", "plant_fault"]

Put = Callable[[Any, str, Any], None]


def _json_frames(put: Put) -> None:
    def careless(raw: Any, base64_mark: int) -> str | bytes:
        return base64.b64decode(str(raw, "utf-8"), validate=True) if base64_mark else str(raw, "utf-8")

    put(frames, "_json_payload", careless)


def _msgpack_frames(put: Put) -> None:
    def trusting(payload: object) -> str | bytes:
        if not isinstance(payload, str | bytes):
            raise ProtocolError("neither a str nor a bin")
        return payload if isinstance(payload, bytes) else str(msgspec.json.decode(payload))

    put(frames, "_json_text", trusting)


def _receiver(put: Put) -> None:
    genuine = session.Session.judge

    def deaf(self: session.Session, frame: frames.Msgs, number: int) -> list[frames.Item] | None:
        """Apply a repeat again when a frame begins with it."""
        return frame.items if frame.items[0].seq == number else genuine(self, frame, number)

    put(session.Session, "judge", deaf)


def _delivery(put: Put) -> None:
    genuine = Lane.settle

    def generous(self: Lane, seq: int, now: float) -> Run | None:
        """Let an ack for what is in flight settle what was read behind it as well."""
        run = genuine(self, seq, now)
        if run is None or not self.ready or seq < self.ready[0].seq:
            return run
        more: Sequence[Entry] = [entry for entry in self.ready if entry.seq <= seq]
        return Run(run.priority, run.first, more[-1].seq, run.messages + len(more), run.bytes)

    put(Lane, "settle", generous)


def _configuration(put: Put) -> None:
    put(configfile, "_kind", lambda value: {"list": "a list", "dict": "a table"}[type(value).__name__])


def _netlink(put: Put) -> None:
    put(
        netlink,
        "_number",
        lambda attributes, kind, otherwise: netlink._NUMBER.unpack(attributes.get(kind, bytes(4)))[0],
    )


def _headers(put: Put) -> None:
    def quick(websocket: Any) -> int:
        return int(parsedate_to_datetime(websocket.response.headers.get("Date", "")).timestamp())

    put(dialling, "server_date", quick)


FAULTS: dict[str, Callable[[Put], None]] = {
    "json_frames": _json_frames,
    "msgpack_frames": _msgpack_frames,
    "receiver": _receiver,
    "delivery": _delivery,
    "configuration": _configuration,
    "netlink": _netlink,
    "headers": _headers,
}


def plant_fault(target: str) -> None:
    """Break what `target` is about, in this process and for good; before `fuzz_targets` imports it by its name."""
    FAULTS[target](setattr)
