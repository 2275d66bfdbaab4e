"""Watches the machine's network, so that a link need not wait for its backoff once the network is back."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import Callable

from durablews.netlink import NetworkNews

__all__ = ["NetworkWatcher"]

# RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR and _IPV6_ROUTE of <linux/rtnetlink.h>.
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
# The kernel fills a datagram of an answer up to 32 KiB.
_DATAGRAM = 65536
# Datagrams to read before others have their turn on the event loop.
_READS = 64

# An address comes a moment before its route. In seconds: what comes within the first is told together, and what follows
# is waited for until nothing has come for the second, or the third has passed since the first piece.
_TOGETHER, _QUIET, _LATEST = 0.5, 0.2, 1.0


class NetworkWatcher:
    """Calls `on_change` when an address, a default route or a link with one appears. `durablews.netlink` says which.

    What comes together is told once: half a second after the first piece, a second after it at the latest. What was
    there at the start is not told. Where the network cannot be watched nothing is ever told, and `absent` says why:
    the link then finds the network by its backoff.

    Args:
        on_change: called from the running loop. That messages were lost counts as a change.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._news = NetworkNews()
        self._loop: asyncio.AbstractEventLoop
        self._socket: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._first = 0.0
        self._absent: str | None = "it has not started"

    @property
    def absent(self) -> str | None:
        """Why nothing watches the network, as a sentence; None while it is watched."""
        return self._absent

    def start(self) -> None:
        """Watch the network from now on; call it in the running loop. What the system refuses is told by `absent`."""
        if self._socket is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._news = NetworkNews()
        try:
            sock = _subscribe()
            try:
                self._loop.add_reader(sock, self._read)
            except BaseException:
                sock.close()
                raise
        except OSError as exc:
            self._absent = f"the kernel refuses: {exc.strerror or exc}"
        except NotImplementedError as exc:  # asyncio's own, from Windows' loop, says nothing
            self._absent = str(exc) or "this event loop cannot watch a socket"
        else:
            self._socket, self._absent = sock, None
            self._ask()

    def close(self) -> None:
        """Stop watching; news that has not been told never is. Nothing to do where it does not watch."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            self._hang_up("it is closed")

    def _hang_up(self, why: str) -> None:
        self._absent = why
        if self._socket is not None:
            sock, self._socket = self._socket, None
            if not self._loop.is_closed():
                self._loop.remove_reader(sock)
            sock.close()

    def _read(self) -> None:
        for _ in range(_READS):
            if self._socket is None:
                return
            try:
                data, (port, _) = self._socket.recvfrom(_DATAGRAM)
            except BlockingIOError:
                self._ask()
                return
            except InterruptedError:
                return
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:  # netlink(7): the kernel had no room for a message, and dropped it
                    self._hang_up(f"the kernel ended it: {exc.strerror or exc}")
                    return
                self._news.lost()
                self._changed()
            else:
                # Other processes may write to a netlink socket too, and only the kernel's port is 0 (netlink(7)).
                if port == 0 and self._news.feed(data):
                    self._changed()

    def _ask(self) -> None:
        if self._socket is not None and (question := self._news.ask()) is not None:
            try:
                self._socket.send(question)
            except OSError as exc:
                self._hang_up(f"the kernel does not answer: {exc.strerror or exc}")

    def _changed(self) -> None:
        now = self._loop.time()
        if self._timer is None:
            self._first = now
        else:
            self._timer.cancel()
        when = min(max(self._first + _TOGETHER, now + _QUIET), self._first + _LATEST)
        self._timer = self._loop.call_at(when, self._tell)

    def _tell(self) -> None:
        self._timer = None
        self._on_change()


def _subscribe() -> socket.socket:
    """Return a socket that hears of links, addresses and routes.

    Raises:
        OSError: the kernel has none for us, as in a sandbox that allows no netlink.
        NotImplementedError: there is no such thing here.
    """
    if sys.platform != "linux":
        raise NotImplementedError("only Linux tells a program about its network")
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    sock = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
    try:
        sock.bind((0, _GROUPS))
    except OSError:
        sock.close()
        raise
    return sock
