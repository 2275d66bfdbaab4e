"""The work of one peer, run by the Python of the peer's own environment: ``bench_peer_work.py NAME FOLDER N SECONDS``.

Each puts N messages of 256 bytes and gets them acknowledged, in at most SECONDS for either, and prints one JSON object:
`messages` (how many it got through), `put_per_second` (null where putting and delivering are one), `drain_per_second`
and `through_per_second`: messages by the time from the first put to the last acknowledgement. Or `skipped`: why.
Nothing here imports durablews.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["PEERS", "Job", "Skipped"]

_TEXT = "x" * 256
_PAYLOAD = _TEXT.encode()
_HOST = "127.0.0.1"


class Skipped(Exception):
    """What is needed is not there."""


class Job(NamedTuple):
    """What one peer is to do. `folder` is empty, and gone afterwards."""

    folder: Path
    messages: int
    seconds: float


Figures = dict[str, float | None]


def _queue(job: Job, put: Callable[[], object], take: Callable[[], object]) -> Figures:
    """Time a queue without a network: all is put, then all is taken and acknowledged, one by one."""
    started = time.perf_counter()
    stored = 0
    while stored < job.messages and time.perf_counter() - started < job.seconds:
        put()
        stored += 1
    putting = time.perf_counter() - started
    started = time.perf_counter()
    taken = 0
    while taken < stored and time.perf_counter() - started < job.seconds:
        take()
        taken += 1
    taking = time.perf_counter() - started
    put_rate, drain_rate = stored / putting, taken / taking
    return {
        "messages": taken,
        "put_per_second": put_rate,
        "drain_per_second": drain_rate,
        "through_per_second": 1 / (1 / put_rate + 1 / drain_rate),
    }


def _through(messages: int, seconds: float) -> Figures:
    """Describe a client that puts nothing anywhere before it sends."""
    rate = messages / seconds
    return {"messages": messages, "put_per_second": None, "drain_per_second": rate, "through_per_second": rate}


# -- servers


def _program(name: str, package: str) -> str:
    # Debian keeps daemons where not everybody's PATH leads.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if found is None:
        raise Skipped(f"{name} is not installed (apt install {package})")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def _serving(command: list[str], port: int) -> Iterator[None]:
    """Run a server, wait until it listens, and end it."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection((_HOST, port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Skipped(f"{Path(command[0]).name} does not start") from None
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _mosquitto(folder: Path) -> Iterator[int]:
    port = _free_port()
    settings = folder / "mosquitto.conf"
    settings.write_text(
        f"listener {port} {_HOST}\nallow_anonymous true\npersistence false\nlog_type none\n"
        "max_queued_messages 0\nmax_inflight_messages 0\n"
    )
    with _serving([_program("mosquitto", "mosquitto"), "-c", str(settings)], port):
        yield port


# -- clients of a network


def paho_mqtt(job: Job) -> Figures:
    """Publish with QoS 1, 20 in flight (its default, and its fastest), until the last PUBACK."""
    mqtt: Any = import_module("paho.mqtt.client")
    with _mosquitto(job.folder) as port:
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        client.connect(_HOST, port)
        client.loop_start()
        started = time.perf_counter()
        infos = [client.publish("bench", _PAYLOAD, qos=1) for _ in range(job.messages)]
        infos[-1].wait_for_publish(job.seconds)
        took = time.perf_counter() - started
        acked = sum(info.is_published() for info in infos)
        client.disconnect()
        client.loop_stop()
    return _through(acked, took)


def paho_c(job: Job) -> Figures:
    """Publish with QoS 1 and file persistence, 1000 in flight, until the last PUBACK; see bench_paho.c."""
    program = job.folder / "bench_paho"
    source = Path(__file__).with_name("bench_paho.c")
    compiler = _program("cc", "gcc")
    compiled = subprocess.run(
        [compiler, "-O2", "-o", str(program), str(source), "-lpaho-mqtt3a"], capture_output=True, text=True
    )
    if compiled.returncode:
        raise Skipped("its C library is not installed (apt install libpaho-mqtt-dev)")
    (job.folder / "kept").mkdir()
    with _mosquitto(job.folder) as port:
        command = [str(program), f"tcp://{_HOST}:{port}", str(job.folder / "kept"), str(job.messages), str(job.seconds)]
        ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise Skipped(ran.stderr.strip() or f"it ended with {ran.returncode}")
    acked, took = ran.stdout.split()
    return _through(int(acked), float(took))


def nats_py(job: Job) -> Figures:
    """Publish to a JetStream stream that is kept in files, 256 in flight, until the last ack."""
    nats: Any = import_module("nats")

    async def run(port: int) -> Figures:
        connection = await nats.connect(f"nats://{_HOST}:{port}")
        stream = connection.jetstream()
        await stream.add_stream(name="bench", subjects=["bench"], storage="file")
        started = time.perf_counter()
        remaining, acked = job.messages, 0

        async def publish() -> None:
            nonlocal remaining, acked
            while remaining > 0 and time.perf_counter() - started < job.seconds:
                remaining -= 1
                await stream.publish("bench", _PAYLOAD)
                acked += 1

        await asyncio.gather(*(publish() for _ in range(256)))
        took = time.perf_counter() - started
        await connection.close()
        return _through(acked, took)

    port = _free_port()
    store = job.folder / "jetstream"
    command = [_program("nats-server", "nats-server"), "-a", _HOST, "-p", str(port), "-js", "-sd", str(store)]
    with _serving(command, port):
        return asyncio.run(run(port))


def python_socketio(job: Job) -> Figures:
    """Emit over a WebSocket with an ack for each, 256 in flight, to a server of the same package."""
    socketio: Any = import_module("socketio")

    async def run(port: int) -> Figures:
        client = socketio.AsyncClient()
        await client.connect(f"http://{_HOST}:{port}", transports=["websocket"])
        places, acked = asyncio.Semaphore(256), 0

        def answered(*args: object) -> None:
            nonlocal acked
            acked += 1
            places.release()

        started = time.perf_counter()
        sent = 0
        while sent < job.messages and time.perf_counter() - started < job.seconds:
            await places.acquire()
            await client.emit("put", _PAYLOAD, callback=answered)
            sent += 1
        while acked < sent:
            await places.acquire()
        took = time.perf_counter() - started
        await client.disconnect()
        return _through(acked, took)

    port = _free_port()
    with _serving([sys.executable, __file__, "socketio-server", str(port)], port):
        return asyncio.run(run(port))


def _socketio_server(port: int) -> None:
    socketio: Any = import_module("socketio")
    web: Any = import_module("aiohttp.web")
    server = socketio.AsyncServer(async_mode="aiohttp")

    async def put(sid: str, data: bytes) -> int:
        return len(data)

    server.on("put", put)
    application = web.Application()
    server.attach(application)
    web.run_app(application, host=_HOST, port=port, print=None)


# -- queues on a disk


def persist_queue(job: Job) -> Figures:
    """Use SQLiteAckQueue: put, then get and ack, each committed by itself."""
    persistqueue: Any = import_module("persistqueue")
    queue = persistqueue.SQLiteAckQueue(str(job.folder), auto_commit=True)
    return _queue(job, lambda: queue.put(_PAYLOAD), lambda: queue.ack(queue.get(block=False)))


def litequeue(job: Job) -> Figures:
    """Use LiteQueue: put, then pop and done."""
    queue: Any = import_module("litequeue").LiteQueue(str(job.folder / "queue.db"))
    return _queue(job, lambda: queue.put(_TEXT), lambda: queue.done(queue.pop().message_id))


def localqueue(job: Job) -> Figures:
    """Use SimpleQueue with DURABLE: put, then get and ack."""
    module: Any = import_module("localqueue")
    queue = module.SimpleQueue(str(job.folder / "queue.db"), durability=module.DurabilityMode.DURABLE)
    return _queue(job, lambda: queue.put(_TEXT), lambda: queue.ack(queue.get_nowait()))


PEERS: dict[str, Callable[[Job], Figures]] = {
    "paho-mqtt": paho_mqtt,
    "paho-c": paho_c,
    "nats-py": nats_py,
    "python-socketio": python_socketio,
    "persist-queue": persist_queue,
    "litequeue": litequeue,
    "localqueue": localqueue,
}


def main(argv: list[str]) -> None:
    if argv[0] == "socketio-server":
        _socketio_server(int(argv[1]))
        return
    name, folder, messages, seconds = argv
    try:
        print(json.dumps(PEERS[name](Job(Path(folder), int(messages), float(seconds)))))
    except Skipped as exc:
        print(json.dumps({"skipped": str(exc)}))


if __name__ == "__main__":
    main(sys.argv[1:])
