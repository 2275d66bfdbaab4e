"""A real network of three namespaces of the kernel, client - router - server, on which packets vanish without a word.

Only root can make one. The kernel's own TCP runs over it, so what a test sees here is what a radio gap looks like:
nothing arrives, nothing is refused, and what was written waits in the socket.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Self, TypeVar

import pytest

__all__ = ["Network", "NoNetwork", "network_fixture"]

T = TypeVar("T")

_NETNS = "/var/run/netns"
_CLONE_NEWNET = 0x40000000

#: The router's two links, as the router calls them.
_TO_CLIENT, _TO_SERVER = "client", "server"
_CLIENT, _CLIENTS_ROUTER = "10.9.1.1", "10.9.1.2"
_SERVER, _SERVERS_ROUTER = "10.9.2.1", "10.9.2.2"


class NoNetwork(Exception):
    """This machine does not let us make one; the text says why."""


class Network:
    """Client, router and server; use it with ``with``. At the end nothing is left of it, whatever happened.

    Raises:
        NoNetwork: we are not root, or the machine lacks what it takes.
    """

    server_address = _SERVER
    client_address = _CLIENT

    def __init__(self) -> None:
        # The process is part of the names: tests run beside each other, and what a killed one left can be told.
        name = f"dws{os.getpid()}x{secrets.token_hex(3)}"
        self._client, self._router, self._server = self.names = [f"{name}{which}" for which in "arb"]
        #: What to put before a command to run it there.
        self.client_exec = ["ip", "netns", "exec", self._client]
        self.server_exec = ["ip", "netns", "exec", self._server]

    def __enter__(self) -> Self:
        if not sys.platform.startswith("linux"):
            raise NoNetwork("network namespaces are Linux's")
        if os.geteuid() != 0:
            raise NoNetwork("only root can make network namespaces")
        try:
            self._build()
        except BaseException as exc:
            self._remove()
            if isinstance(exc, FileNotFoundError | subprocess.CalledProcessError):
                said = str(getattr(exc, "stderr", "")).strip() or exc
                raise NoNetwork(f"no network of namespaces can be made: {said}") from exc
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._remove()

    # -- what can be done to it

    def vanish(self) -> None:
        """Let every packet vanish in the router, in both directions; nobody is told."""
        self._forward(False)

    def restore(self) -> None:
        """Let packets through again."""
        self._forward(True)

    def limit(self, rate: str = "16kbit", *, patience: str = "400ms") -> None:
        """Let no more than `rate` through to the server, after a first 4 KiB; what waits longer than that is lost."""
        bucket = ["tbf", "rate", rate, "burst", "4kb", "latency", patience]
        _run("tc", "-n", self._router, "qdisc", "replace", "dev", _TO_SERVER, "root", *bucket)

    def unlimit(self) -> None:
        """Take the limit away."""
        _run("tc", "-n", self._router, "qdisc", "del", "dev", _TO_SERVER, "root")

    # -- being there

    def in_client(self, job: Callable[[], T]) -> T:
        """Return what `job` returns in a thread that is in the client's network, and the threads that it starts too.

        ``asyncio.run`` may be such a job. A socket stays where it was made, whoever uses it later.
        """
        return _inside(self._client, job)

    def in_server(self, job: Callable[[], T]) -> T:
        """Return what `job` returns in a thread that is in the server's network."""
        return _inside(self._server, job)

    def server_socket(self, port: int = 0) -> socket.socket:
        """Return a TCP socket in the server's network, bound to its address: for ``start_server(sock=...)``."""

        def bound() -> socket.socket:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((_SERVER, port))
            except BaseException:
                sock.close()
                raise
            return sock

        return self.in_server(bound)

    def router_counter(self, protocol: str, name: str) -> int:
        """Return one of the router's counters from /proc/net/snmp: ("Ip", "InAddrErrors") counts what vanished."""

        def read() -> int:
            # Not /proc/net: that is the main thread's.
            with open("/proc/thread-self/net/snmp", encoding="ascii") as file:
                lines = [line.split() for line in file if line.startswith(f"{protocol}:")]
            return int(lines[1][lines[0].index(name)])

        return _inside(self._router, read)

    # -- making and removing

    def _build(self) -> None:
        for name in _leftovers():
            with suppress(subprocess.CalledProcessError):  # another process was quicker
                _run("ip", "netns", "del", name)
        for name in self.names:
            _run("ip", "netns", "add", name)
            # Else addresses come and go by themselves for a second, which who watches the network must not see.
            _inside(name, lambda: _set("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1", optional=True))
            _run("ip", "-n", name, "link", "set", "lo", "up")
        ends = [
            (self._client, _CLIENT, _TO_CLIENT, _CLIENTS_ROUTER),
            (self._server, _SERVER, _TO_SERVER, _SERVERS_ROUTER),
        ]
        for name, address, link, routers in ends:
            pair = ["up0", "netns", name, "type", "veth", "peer", "name", link, "netns", self._router]
            _run("ip", "link", "add", *pair)
            _run("ip", "-n", self._router, "address", "add", f"{routers}/24", "dev", link)
            _run("ip", "-n", self._router, "link", "set", link, "up")
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "up0")
            _run("ip", "-n", name, "link", "set", "up0", "up")
            _run("ip", "-n", name, "route", "add", "default", "via", routers)
        self._forward(True)

    def _remove(self) -> None:
        for link in (_TO_CLIENT, _TO_SERVER):
            # A process or a socket that is still inside keeps a namespace alive without its name; the links go now.
            with suppress(OSError, subprocess.CalledProcessError):
                _run("ip", "-n", self._router, "link", "del", link)
        for name in self.names:
            with suppress(OSError, subprocess.CalledProcessError):
                _run("ip", "netns", "del", name)

    def _forward(self, on: bool) -> None:
        # The kernel answers a packet that it must not forward with no ICMP: it counts it and throws it away.
        _inside(self._router, lambda: _set("/proc/sys/net/ipv4/ip_forward", "1" if on else "0"))


@pytest.fixture(name="network")
def network_fixture() -> Iterator[Network]:
    """A network for one test; skipped where none can be made, except in CI, which must be able to."""
    with ExitStack() as stack:
        try:
            network = stack.enter_context(Network())
        except NoNetwork as exc:
            if os.environ.get("CI") == "true":
                pytest.fail(f"{exc}, and CI must make one: packets vanish on no other")
            pytest.skip(str(exc))
        yield network


def _leftovers() -> list[str]:
    """Return the namespaces of processes that were killed before they could remove them."""
    left = []
    for name in os.listdir(_NETNS) if os.path.isdir(_NETNS) else []:
        match = re.fullmatch(r"dws(\d+)x[0-9a-f]+[arb]", name)
        if match and not os.path.exists(f"/proc/{match[1]}"):
            left.append(name)
    return left


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def _set(path: str, text: str, *, optional: bool = False) -> None:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except FileNotFoundError:
        if not optional:
            raise


def _inside(name: str, job: Callable[[], T]) -> T:
    """Run `job` in a new thread in a namespace. The thread ends there: it never has to find back."""
    results: list[T] = []
    errors: list[BaseException] = []

    def enter_and_run() -> None:
        try:
            with open(f"{_NETNS}/{name}", "rb") as namespace:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
            results.append(job())
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=enter_and_run, name=f"in {name}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
