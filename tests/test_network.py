"""The kernel's news reaches the watcher, once, and nothing is left of it; on networks of the kernel's own."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
from servers import until, wait_for

from durablews import network
from durablews.netlink import NetworkNews
from durablews.network import NetworkWatcher

T = TypeVar("T")

CLONE_NEWNET = 0x40000000

# -- a network of the kernel's own, for one test


def ip(*arguments: str, batch: str = "") -> str:
    """Run iproute2's ``ip`` in the network of the calling thread; when it returns, the kernel has told of it."""
    return subprocess.run(
        ["ip", *arguments], check=True, input=batch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout


def in_new_network(job: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in a thread that is in a network of its own, and the commands that it starts are there too.

    The network is gone with the thread. Raises OSError where we may not make one.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")
            results.append(asyncio.run(job()))
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=run, name="in a network of its own")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@pytest.fixture(scope="module")
def kernel() -> None:
    """Networks can be made; the test is skipped where they cannot, except in CI, which must be able to."""
    reason = ""
    if not sys.platform.startswith("linux"):
        reason = "network namespaces are Linux's"
    elif os.geteuid() != 0:
        reason = "only root can make network namespaces"
    else:

        async def try_it() -> None:
            cable()

        try:
            in_new_network(try_it)
        except (OSError, subprocess.CalledProcessError) as exc:
            reason = f"no network can be made: {getattr(exc, 'stdout', None) or exc}"
    if reason and os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and CI must make one: no other tells what a kernel says")
    if reason:
        pytest.skip(reason)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each piece of news be told by itself, as soon as the loop has turned round: so that they can be counted."""
    for name in ("_TOGETHER", "_QUIET", "_LATEST"):
        monkeypatch.setattr(network, name, 0.0)


def cable() -> None:
    """Make two interfaces, `near` and `far`, with a cable between them, and switch them on; `near` carries."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "near", "type", "veth", "peer", "name", "far")
    for end in ("far", "near"):
        # Else the kernel gives them addresses of its own, seconds later.
        ip("link", "set", end, "addrgenmode", "none")
        ip("link", "set", end, "up")
    wait_for(carries)


def carries() -> bool:
    """Say whether `near` does: a thread of the kernel's finds that out a moment after the ends are switched on."""
    return "state UP" in ip("link", "show", "near")


async def turned() -> None:
    """Let the loop read what the kernel has said, and run what follows from it."""
    for _ in range(10):
        await asyncio.sleep(0)


class Watching:
    """A watcher that runs, has heard what is there, and whose calls are counted; at each it may have a look."""

    def __init__(self, look: Callable[[], object] = lambda: None) -> None:
        self.look = look
        self.looks: list[object] = []
        self.calls = 0
        self.expected = 0
        self.watcher = NetworkWatcher(self._called)

    def _called(self) -> None:
        self.calls += 1
        self.looks.append(self.look())

    async def __aenter__(self) -> Watching:
        self.watcher.start()
        assert self.watcher.absent is None
        await turned()
        await self.told(0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.watcher.close()

    async def told(self, times: int, *commands: str) -> None:
        """Run commands of ``ip``; so many calls come of them, and no other has come since the last time."""
        self.expected += times
        for command in commands:
            ip(*command.split())
            await turned()
        # IPv6 settles its addresses in a thread of the kernel's, also those that it asks nobody about.
        await until(lambda: self.calls >= self.expected)
        await turned()
        assert self.calls == self.expected


def test_the_kernel_tells_of_an_address_once(kernel: None, at_once: None) -> None:
    """An address calls once; the same again with another lifetime, as a renewed lease, does not; nor does its end."""

    async def job() -> None:
        cable()
        async with Watching() as watching:
            for address, device in [("192.0.2.1/24", "near"), ("192.0.2.9/32", "lo"), ("2001:db8::9/128", "lo")]:
                await watching.told(1, f"address add {address} dev {device}")
                refresh = f"address change {address} dev {device} valid_lft 900 preferred_lft"
                await watching.told(0, f"{refresh} 300", f"{refresh} 600")
                await watching.told(0, f"address del {address} dev {device}")
                await watching.told(1, f"address add {address} dev {device}")
            await watching.told(0, "address add 127.0.0.2/8 dev lo scope host")
            await watching.told(0, "address add 169.254.1.1/16 dev near scope link")
            await watching.told(1, "address add 192.0.2.3/24 dev near")

    in_new_network(job)


def test_an_address_of_ipv6_calls_when_it_is_known_to_be_ours(kernel: None, at_once: None) -> None:
    """Not while another host may have it: the kernel asks round for a second or two (RFC 4862) and then says so."""

    async def job() -> None:
        cable()
        async with Watching(lambda: "tentative" in ip("-6", "address", "show", "dev", "near")) as watching:
            await watching.told(1, "address add 2001:db8::1/64 dev near")
            assert watching.looks == [False]
            await watching.told(0, "address change 2001:db8::1/64 dev near valid_lft 900 preferred_lft 300")
            await watching.told(1, "address add 192.0.2.1/24 dev near")

    in_new_network(job)


def test_what_is_there_at_the_start_and_repeated_is_no_news(kernel: None, at_once: None) -> None:
    """However much it is: the first renewal of a lease after a start undoes no backoff."""

    async def job() -> None:
        cable()
        ip("-batch", "-", batch="".join(f"address add 10.0.{n // 250}.{n % 250}/32 dev lo\n" for n in range(900)))
        ip("address", "add", "192.0.2.1/24", "dev", "near")
        ip("route", "add", "default", "via", "192.0.2.254")
        async with Watching() as watching:
            await watching.told(0, "address change 192.0.2.1/24 dev near valid_lft 900 preferred_lft 300")
            await watching.told(0, "address change 10.0.2.7/32 dev lo valid_lft 900 preferred_lft 300")
            # The route as it is, and as it is but for a lifetime's worth of difference.
            await watching.told(0, "route replace default via 192.0.2.254")
            await watching.told(0, "route replace default via 192.0.2.254 mtu 1400")
            await watching.told(1, "address add 192.0.2.2/24 dev near")

    in_new_network(job)


@pytest.mark.parametrize(
    ("address", "gateway", "other"),
    [("192.0.2.1/24", "192.0.2.254", "192.0.2.253"), ("2001:db8::1/64 nodad", "2001:db8::fe", "fe80::fd")],
)
def test_the_kernel_tells_of_a_default_route_once(
    kernel: None, at_once: None, address: str, gateway: str, other: str
) -> None:
    """A default route calls, and again once it was gone or replaced; other routes and tables do not."""
    version, elsewhere = ("-6", "2001:db8:1::/48") if ":" in address else ("-4", "198.51.100.0/24")

    async def job() -> None:
        cable()
        ip(*f"address add {address} dev near".split())
        # IPv6 announces it from a thread of the kernel's, and then makes this route.
        wait_for(lambda: f"local {address.partition('/')[0]} " in ip(version, "route", "show", "table", "local"))
        async with Watching() as watching:
            await watching.told(0, f"{version} route add {elsewhere} via {gateway} dev near")
            await watching.told(0, f"{version} route add default via {gateway} dev near table 7")
            await watching.told(1, f"{version} route add default via {gateway} dev near metric 5")
            await watching.told(1, f"{version} route replace default via {other} dev near metric 5")
            await watching.told(1, f"{version} route replace default via {gateway} dev near metric 5")
            await watching.told(0, f"{version} route del default")
            await watching.told(1, f"{version} route add default via {gateway} dev near metric 5")

    in_new_network(job)


def test_a_route_that_went_without_a_word_calls_when_it_returns(kernel: None, at_once: None) -> None:
    """Linux removes IPv4's with their link or their address and says nothing; here it truly does not."""

    async def job() -> None:
        cable()
        ip("address", "add", "192.0.2.1/24", "dev", "near")
        ip("route", "add", "default", "via", "192.0.2.254")
        async with Watching() as watching:
            await watching.told(0, "link set near down", "link set near up")
            await until(carries)
            await watching.told(0)
            assert ip("route", "show", "default") == ""
            await watching.told(1, "route add default via 192.0.2.254")
            await watching.told(0, "address del 192.0.2.1/24 dev near")
            assert ip("route", "show", "default") == ""
            await watching.told(1, "address add 192.0.2.1/24 dev near")
            await watching.told(1, "route add default via 192.0.2.254")

    in_new_network(job)


def test_a_cable_that_is_plugged_in_again_calls(kernel: None, at_once: None) -> None:
    """Address and route stay where they are meanwhile: the link that carries again is all that the kernel says."""

    async def job() -> None:
        cable()
        ip("address", "add", "192.0.2.1/24", "dev", "near")
        ip("route", "add", "default", "via", "192.0.2.254")
        async with Watching() as watching:
            await watching.told(0, "link set far down")
            await until(lambda: not carries())
            await watching.told(0)
            await watching.told(1, "link set far up")
            await watching.told(1, "address add 192.0.2.2/24 dev near")

    in_new_network(job)


def test_messages_that_the_kernel_had_to_drop_count_as_a_change(
    kernel: None, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the loop is busy its socket overflows: that calls, and afterwards the watcher knows what is there."""
    losses: list[int] = []

    class News(NetworkNews):
        def lost(self) -> None:
            super().lost()
            losses.append(1)

    subscribe = network._subscribe

    def with_little_room() -> socket.socket:
        sock = subscribe()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        return sock

    monkeypatch.setattr(network, "NetworkNews", News)
    monkeypatch.setattr(network, "_subscribe", with_little_room)

    async def job() -> None:
        cable()
        ip("address", "add", "192.0.2.1/24", "dev", "near")
        async with Watching() as watching:
            losses.clear()
            many = [f"10.0.0.{n}/32 dev lo\n" for n in range(1, 250)]
            lines = [f"address add {each}" for each in many] + [f"address del {each}" for each in many]
            ip("-batch", "-", batch="".join([*lines, "address add 192.0.2.2/24 dev near\n"]))
            await until(lambda: watching.calls)
            await turned()
            assert losses == [1]
            watching.expected = watching.calls  # the loss, and what was put by before it
            assert watching.watcher.absent is None
            # The last address was among what was dropped: it is known all the same.
            await watching.told(0, "address change 192.0.2.2/24 dev near valid_lft 900 preferred_lft 300")
            await watching.told(1, "address add 10.0.0.1/32 dev lo")

    in_new_network(job)


def test_an_address_and_its_route_are_told_once(kernel: None) -> None:
    """With the times as they are: what comes within half a second is one piece of news, what comes later another."""

    async def job() -> None:
        cable()
        async with Watching() as watching:
            ip("address", "add", "192.0.2.1/24", "dev", "near")
            ip("route", "add", "default", "via", "192.0.2.254")
            ip("address", "add", "2001:db8::1/64", "dev", "near", "nodad")
            await watching.told(1)
            await watching.told(1, "-6 route add default via 2001:db8::fe")

    in_new_network(job)


def test_a_closed_watcher_leaves_nothing(kernel: None) -> None:
    """No descriptor, no reader, no call that was due: also when it is closed twice, or while it has news."""

    def descriptors() -> set[int]:
        return {int(name) for name in os.listdir("/proc/self/fd")}

    async def job() -> None:
        cable()
        calls: list[str] = []
        before = descriptors()
        watcher = NetworkWatcher(lambda: calls.append("late"))
        watcher.start()
        watcher.start()
        (descriptor,) = descriptors() - before
        ip("address", "add", "192.0.2.1/24", "dev", "near")
        await turned()
        watcher.close()
        watcher.close()
        assert watcher.absent == "it is closed"
        assert descriptors() == before
        assert not asyncio.get_running_loop().remove_reader(descriptor)
        async with Watching() as another:
            ip("address", "add", "192.0.2.2/24", "dev", "near")
            await until(lambda: another.calls)
        assert calls == []
        watcher.start()
        assert watcher.absent is None
        ip("address", "add", "192.0.2.3/24", "dev", "near")
        await until(lambda: calls)
        watcher.close()
        assert descriptors() == before

    in_new_network(job)


# -- a kernel and a loop that do as they are told


class Loop:
    """A loop whose time the test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[Timer] = []
        self.reader: Callable[[], None] | None = None
        self.closed = False

    def add_reader(self, sock: object, reader: Callable[[], None]) -> None:
        self.reader = reader

    def remove_reader(self, sock: object) -> None:
        assert not self.closed, "asyncio's loop refuses this"
        self.reader = None

    def is_closed(self) -> bool:
        return self.closed

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(when, callback))
        return self.timers[-1]

    def until(self, now: float) -> None:
        """Let time pass to `now`."""
        while due := [timer for timer in self.timers if not timer.cancelled and timer.when <= now]:
            first = min(due, key=lambda timer: timer.when)
            self.timers.remove(first)
            self.now = max(self.now, first.when)
            first.callback()
        self.now = now


class Timer:
    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when, self.callback, self.cancelled = when, callback, False

    def cancel(self) -> None:
        self.cancelled = True


class Kernel:
    """A netlink socket that gives what a test puts in, then has nothing to say."""

    def __init__(self) -> None:
        self.says: list[bytes | OSError] = []
        self.port = 0
        self.asked = 0
        self.unread = 0
        self.closed = False
        self.deaf: OSError | None = None

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        assert not self.closed
        what = self.says.pop(0) if self.says else BlockingIOError(errno.EAGAIN, "nothing more")
        if isinstance(what, OSError):
            raise what
        return what, (self.port, 0)

    def send(self, question: bytes) -> None:
        if self.deaf is not None:
            raise self.deaf
        self.asked += 1
        self.unread += len(self.says)
        (sequence,) = struct.unpack_from("=I", question, 8)
        self.says.append(struct.pack("=IHHIIi", 20, 3, 2, sequence, 1, 0))  # NLMSG_DONE

    def close(self) -> None:
        self.closed = True


def an_address(last: int) -> bytes:
    """Return the kernel's words for an address that appears."""
    return struct.pack("=IHHIIBBBBIHH4B", 32, 20, 0, 0, 0, 2, 24, 0, 0, 2, 8, 2, 192, 0, 2, last)


class Bench:
    """A watcher between such a loop and such a kernel, and when it called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop, self.kernel = Loop(), Kernel()
        self.calls: list[float] = []
        monkeypatch.setattr(network, "_subscribe", lambda: self.kernel)
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self.loop)
        self.watcher = NetworkWatcher(lambda: self.calls.append(self.loop.now - 100))

    def started(self) -> Bench:
        self.watcher.start()
        self.read()
        assert self.kernel.asked == 3
        return self

    def read(self) -> None:
        """Run the reader for as long as there is something to read."""
        while self.kernel.says and self.loop.reader is not None:
            self.loop.reader()

    def hear(self, after: float, *said: bytes | OSError) -> None:
        """Let the kernel say something some seconds after the start."""
        self.loop.until(100 + after)
        self.kernel.says += said
        self.read()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


@pytest.mark.parametrize(
    ("pieces", "calls"),
    [
        ([0.0], [0.5]),
        ([0.0, 0.25], [0.5]),
        ([0.0, 0.25, 0.4375], [0.6375]),
        ([0.0, 0.4375, 0.625, 0.75, 0.875], [1.0]),
        ([0.0, 0.5], [0.5, 1.0]),
        ([0.0, 0.125, 5.0, 5.125], [0.5, 5.5]),
        ([number / 8 for number in range(24)], [1.0, 2.0, 3.0]),
    ],
)
def test_what_comes_together_is_told_once(bench: Bench, pieces: list[float], calls: list[float]) -> None:
    """Half a second after the first piece, later while more comes, and a second after it however much comes."""
    bench.started()
    for number, after in enumerate(pieces):
        bench.hear(after, an_address(number))
    bench.loop.until(200.0)
    assert bench.calls == pytest.approx(calls)


def test_a_loss_calls_and_asks_for_everything_again(bench: Bench) -> None:
    """But only when all that was put by is read: the kernel drops more until then. The watcher goes on."""
    lost = OSError(errno.ENOBUFS, "No buffer space available")
    bench.started().hear(0.0, lost, an_address(1), an_address(2))
    assert bench.kernel.asked == 6
    assert bench.kernel.unread == 0
    bench.loop.until(110.0)
    assert bench.calls == [0.5]
    assert bench.watcher.absent is None
    bench.hear(20.0, an_address(1))
    bench.loop.until(130.0)
    assert bench.calls == [0.5, 20.5]


def test_what_another_process_writes_is_not_believed(bench: Bench) -> None:
    """Only the kernel's port is 0."""
    bench.kernel.port = 4711
    bench.watcher.start()
    bench.hear(0.0, an_address(1))
    bench.kernel.port = 0
    bench.hear(1.0, an_address(2))
    bench.loop.until(200.0)
    assert bench.calls == [1.5]


def test_an_interrupted_look_is_no_error(bench: Bench) -> None:
    """A signal is not the end of the watch."""
    bench.started().hear(0.0, InterruptedError(errno.EINTR, "Interrupted system call"), an_address(1))
    bench.loop.until(200.0)
    assert bench.calls == [0.5]


def test_an_error_of_the_socket_ends_the_watch_and_is_told(bench: Bench) -> None:
    """It raises nothing into the loop and is not met again; what was heard before it is told."""
    bench.started().hear(0.0, an_address(1), OSError(errno.ENOTCONN, "Transport endpoint is not connected"))
    assert bench.loop.reader is None
    assert bench.kernel.closed
    assert bench.watcher.absent == "the kernel ended it: Transport endpoint is not connected"
    bench.loop.until(200.0)
    assert bench.calls == [0.5]
    bench.watcher.close()
    assert bench.watcher.absent == "the kernel ended it: Transport endpoint is not connected"


def test_a_kernel_that_takes_no_question_ends_the_watch_and_is_told(bench: Bench) -> None:
    """At the start as later."""
    bench.kernel.deaf = PermissionError(errno.EPERM, "Operation not permitted")
    bench.watcher.start()
    assert bench.watcher.absent == "the kernel does not answer: Operation not permitted"
    assert bench.kernel.closed
    assert bench.loop.reader is None


def test_a_watcher_gives_the_loop_back(bench: Bench) -> None:
    """However much the kernel says, the loop's other work has its turn."""
    bench.started()
    bench.kernel.says = [an_address(1)] * 1000
    assert bench.loop.reader is not None
    bench.loop.reader()
    assert 900 < len(bench.kernel.says) < 1000


def test_news_that_was_not_told_before_the_close_never_is(bench: Bench) -> None:
    """Whoever closes wants no more calls."""
    bench.started().hear(0.0, an_address(1))
    bench.watcher.close()
    bench.loop.until(200.0)
    assert bench.calls == []
    assert bench.loop.reader is None
    assert bench.kernel.closed


def test_a_watcher_may_be_closed_after_its_loop(bench: Bench) -> None:
    """The descriptor is closed all the same."""
    bench.started()
    bench.loop.closed = True
    bench.watcher.close()
    assert bench.kernel.closed


def test_a_watcher_that_never_started_closes() -> None:
    """It has nothing to close, and says why it watches nothing."""
    watcher = NetworkWatcher(lambda: None)
    assert watcher.absent == "it has not started"
    watcher.close()
    assert watcher.absent == "it has not started"


# -- where it cannot be


@pytest.mark.parametrize("platform", ["win32", "darwin", "freebsd14"])
async def test_elsewhere_than_on_linux_it_says_so(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    """It does nothing there, and raises nothing."""
    watcher = NetworkWatcher(lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        watcher.start()
    assert watcher.absent == "only Linux tells a program about its network"
    watcher.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sandboxes that refuse netlink are Linux's")
@pytest.mark.parametrize("call", ["socket", "bind"])
async def test_a_sandbox_that_refuses_netlink_is_told(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """With the kernel's own reason, and no descriptor is left."""
    before = len(os.listdir("/proc/self/fd"))

    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    class Refusing(socket.socket):
        bind = refuse  # type: ignore[assignment]

    watcher = NetworkWatcher(lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(network.socket, "socket", refuse if call == "socket" else Refusing)
        watcher.start()
    assert watcher.absent == "the kernel refuses: Permission denied"
    assert len(os.listdir("/proc/self/fd")) == before
    watcher.close()


@pytest.mark.parametrize(
    ("error", "absent"),
    [
        (NotImplementedError(), "this event loop cannot watch a socket"),
        (OSError(errno.ENOSPC, "No space left on device"), "the kernel refuses: No space left on device"),
    ],
)
def test_a_loop_that_cannot_watch_a_socket_is_told(bench: Bench, error: Exception, absent: str) -> None:
    """Windows' own loop, or a kernel that gives no more watches: the socket is closed and nothing is raised."""

    def refuse(*args: object) -> None:
        raise error

    bench.loop.add_reader = refuse  # type: ignore[method-assign]
    bench.watcher.start()
    assert bench.watcher.absent == absent
    assert bench.kernel.closed
