"""The network of namespaces does what the tests on it believe: packets flow, vanish without a word, and crawl."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from namespaces import Network, NoNetwork, network_fixture  # noqa: F401 - pytest looks for the fixture here
from servers import wait_for

#: ioctl: the bytes that a socket was given and the other side has not acknowledged.
SIOCOUTQ = 0x5411
#: Where Linux' struct tcp_info counts the segments that were sent again.
TOTAL_RETRANS = slice(100, 104)


@contextmanager
def connected(network: Network) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection through the router: the client's socket and the server's."""
    with network.server_socket() as listener:
        listener.listen()
        address = listener.getsockname()
        with network.in_client(lambda: socket.create_connection(address, 10)) as client:
            server, _ = listener.accept()
            with server:
                client.setblocking(False)
                server.setblocking(False)
                yield client, server


def unacknowledged(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, SIOCOUTQ, b"\0" * 4))[0])


def sent_again(sock: socket.socket) -> int:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack("I", info[TOTAL_RETRANS])[0])


def error(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def arrived(sock: socket.socket) -> bytes:
    with suppress(BlockingIOError):
        return sock.recv(1 << 20)
    return b""


def namespaces(network: Network) -> set[str]:
    """Return which of its namespaces the machine knows."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines()} & set(network.names)


def test_data_flows_both_ways(network: Network) -> None:
    """A socket of each end is where it was made, and what one writes the other reads."""
    with connected(network) as (client, server):
        assert client.getsockname()[0] == network.client_address == server.getpeername()[0]
        assert server.getsockname()[0] == network.server_address
        client.send(b"question")
        wait_for(lambda: arrived(server) == b"question")
        server.send(b"answer")
        wait_for(lambda: arrived(client) == b"answer")


def test_commands_run_at_their_end(network: Network) -> None:
    """A process behind `client_exec` reaches one behind `server_exec`, and nothing else reaches either."""
    serve = "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True);"
    serve += "s.accept()[0].send(b'hello')"
    ask = "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 10).recv(9).decode())"
    with subprocess.Popen([*network.server_exec, sys.executable, "-c", serve], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().decode().strip()
            command = [*network.client_exec, sys.executable, "-c", ask, network.server_address, port]
            assert subprocess.run(command, capture_output=True, text=True, timeout=20).stdout == "hello\n"
        finally:
            server.kill()


def test_an_event_loop_runs_at_an_end(network: Network) -> None:
    """``asyncio.run`` in the client's network is there with the threads that it starts; the test itself is not."""

    def where() -> str:
        return os.readlink("/proc/thread-self/ns/net")

    async def both() -> tuple[str, str]:
        return where(), await asyncio.to_thread(where)

    there, in_executor = network.in_client(lambda: asyncio.run(both()))
    assert there == in_executor == network.in_client(where)
    assert len({there, network.in_server(where), where()}) == 3


def test_vanished_packets_are_no_error_to_anybody(network: Network) -> None:
    """Both ends send again and again, hear nothing and get no error; once packets pass again all of it arrives."""
    with connected(network) as (client, server):
        network.vanish()
        client.send(b"question")
        server.send(b"answer")
        # Each end's own word that nothing came through: it has sent again because no acknowledgement came.
        wait_for(lambda: sent_again(client) >= 2 and sent_again(server) >= 2)
        assert (unacknowledged(client), unacknowledged(server)) == (8, 6)
        assert (arrived(client), arrived(server)) == (b"", b"")
        assert (error(client), error(server)) == (0, 0)
        assert network.router_counter("Ip", "InAddrErrors") >= 4
        assert network.router_counter("Icmp", "OutMsgs") == 0
        network.restore()
        wait_for(lambda: unacknowledged(client) == unacknowledged(server) == 0)
        assert (arrived(client), arrived(server)) == (b"answer", b"question")


def test_datagrams_vanish_without_an_error(network: Network) -> None:
    """UDP, which tells its socket of every ICMP, is told of none."""

    def datagrams(address: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, 0))
        sock.setblocking(False)
        return sock

    with (
        network.in_client(lambda: datagrams(network.client_address)) as client,
        network.in_server(lambda: datagrams(network.server_address)) as server,
    ):
        client.connect(server.getsockname())
        server.connect(client.getsockname())
        client.send(b"before")
        wait_for(lambda: arrived(server) == b"before")
        network.vanish()
        for sender in (client, server):
            lost = network.router_counter("Ip", "InAddrErrors")
            sender.send(b"lost")
            wait_for(lambda lost=lost: network.router_counter("Ip", "InAddrErrors") == lost + 1)
        network.restore()
        client.send(b"after")
        received: list[bytes] = []
        wait_for(lambda: received.append(arrived(server)) or b"after" in received)
        assert b"".join(received) == b"after"
        assert (arrived(client), error(client), error(server)) == (b"", 0, 0)


def test_a_connection_cannot_be_made_through_the_void(network: Network) -> None:
    """While packets vanish a connect is neither refused nor unreachable: it waits."""
    with network.server_socket() as listener:
        listener.listen()
        address = listener.getsockname()
        network.vanish()

        def connect() -> socket.socket:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.setblocking(False)
            with suppress(BlockingIOError):
                sock.connect(address)
            return sock

        with network.in_client(connect) as client:
            wait_for(lambda: sent_again(client) >= 1)
            assert error(client) == 0
            network.restore()
            wait_for(lambda: client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x01")  # established
            listener.accept()[0].close()


def test_a_limit_limits(network: Network) -> None:
    """At 128 kbit/s no more has arrived, ever, than the rate allows; the rest waits at the sender."""
    with connected(network) as (client, server):
        network.limit("128kbit")
        left, received = memoryview(b"x" * (64 << 10)), 0
        began = time.monotonic()

        def moves() -> bool:
            nonlocal left, received
            with suppress(BlockingIOError):
                left = left[client.send(left) :]
            received += len(arrived(server))
            return received > 24 << 10

        def moves_slowly() -> bool:
            done = moves()
            # A bound from above: however slow the machine is, no more than this can have come.
            assert received <= 4096 + 16_000 * (time.monotonic() - began)
            assert unacknowledged(client) + len(left) > 0
            return done

        wait_for(moves_slowly)
        network.unlimit()
        wait_for(lambda: moves() and received == 64 << 10, 60)
        wait_for(lambda: unacknowledged(client) == 0)


def test_nothing_is_left_of_a_network(network: Network) -> None:
    """Also when the block fails, and while a socket of it is still open, its names and its links go."""
    another, kept = Network(), []

    def fails() -> None:
        with another:
            assert namespaces(another) == set(another.names)
            kept.append(another.server_socket())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert namespaces(another) == set()
    with kept[0] as sock, pytest.raises(OSError, match="unreachable"):
        sock.connect((another.client_address, 1))
    assert namespaces(network) == set(network.names)


def test_what_a_killed_process_left_is_removed(network: Network) -> None:
    """A process that is killed with its network up leaves it to the next one to remove."""
    script = "import os, signal; from namespaces import Network; n = Network(); n.__enter__()\n"
    script += "print(*n.names, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    left = set(killed.stdout.split())
    assert len(left) == 3
    with Network():
        listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
        assert not left & {line.split()[0] for line in listed.splitlines()}


def test_without_rights_there_is_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is not root is told so before anything is made."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoNetwork, match=r"root|Linux"), Network():
        pass
