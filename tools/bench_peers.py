"""Runs the same work through durablews and its peers, and prints one table: durablews first.

The work: messages of 256 bytes are put, delivered, and all of them acknowledged. A peer that only queues on a disk
gives them out in the same process, without a network, which favours it. What a peer promises for a message that was
put stands beside its figures. Each peer has an environment of its own below .cache/bench-peers; one that cannot be
installed or started is skipped with a word. Servers and libraries of the system (Debian: mosquitto, nats-server,
libpaho-mqtt-dev) are yours to install.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench_servers import serving
from bench_table import Progress, Spread, machine, print_table
from bench_work import drain_file, store_concurrently

_ROOT = Path(__file__).resolve().parents[1]
_ENVIRONMENTS = _ROOT / ".cache" / "bench-peers"
_FIGURES = ("put_per_second", "drain_per_second", "through_per_second")


class Skipped(Exception):
    """This peer has no figures; the text says why."""


class Peer(NamedTuple):
    """One line of the table.

    Attributes:
        packages: for its environment; none where it needs no Python package.
        durable: whether a message that was put survives a kill of the process that put it.
        durability: what it promises, in words.
        work: what is done.
        run: only where it is not `bench_peer_work.py` that does it.
    """

    name: str
    packages: tuple[str, ...]
    durable: bool
    durability: str
    work: str
    run: Callable[[Path, int], dict[str, Any]] | None = None


def _durablews(folder: Path, messages: int, *args: str, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Put by 1000 callers while offline, then drain to another process."""
    path = folder / "agent.db"
    put = asyncio.run(store_concurrently(path, messages))
    with serving(*args, command=command) as server:
        drained = asyncio.run(drain_file(server.url, path, messages))
    through = 1 / (1 / put + 1 / drained)
    return dict(zip(("messages", *_FIGURES), (messages, put, drained, through), strict=True))


def _to_memory(folder: Path, messages: int) -> dict[str, Any]:
    return _durablews(folder, messages, "receiver")


def _to_serve(folder: Path, messages: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "durablews", "serve", "--port", "0", "--store", str(folder / "inbox.db")]
    return _durablews(folder, messages, command=command)


PEERS = [
    Peer(
        "durablews",
        (),
        True,
        "SQLite, FULL: synced before send() returns",
        "1000 callers offline, then drained to a receiver in another process that numbers them and stores nothing",
        _to_memory,
    ),
    Peer(
        "durablews-serve",
        (),
        True,
        "the same, and synced by the server too before it acknowledges",
        "the same, to `durablews serve`, which stores them",
        _to_serve,
    ),
    Peer(
        "paho-mqtt", ("paho-mqtt",), False, "client's memory", "QoS 1 to mosquitto, which keeps nothing; 20 in flight"
    ),
    Peer(
        "paho-c",
        (),
        True,
        "a file each, not synced: survives a kill",
        "Paho C, file persistence, QoS 1 to mosquitto, which keeps nothing; 1000 in flight",
    ),
    Peer(
        "nats-py",
        ("nats-py",),
        False,
        "client's memory; the server's stream lies in files",
        "JetStream publish to nats-server with an ack each, 256 in flight",
    ),
    Peer(
        "python-socketio",
        ("python-socketio", "aiohttp"),
        False,
        "client's memory",
        "emit over a WebSocket with an ack each, 256 in flight",
    ),
    Peer(
        "persist-queue",
        ("persist-queue",),
        True,
        "SQLite in WAL at SQLite's own default, FULL",
        "SQLiteAckQueue: put, then get and ack, one by one; no network",
    ),
    Peer(
        "litequeue",
        ("litequeue",),
        True,
        "SQLite, NORMAL: survives a kill",
        "put, then pop and done, one by one; no network",
    ),
    Peer(
        "localqueue",
        ("localqueue",),
        True,
        "SQLite by way of Rust, its DURABLE mode",
        "SimpleQueue: put, then get and ack, one by one; no network",
    ),
]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    peers = [peer for peer in PEERS if args.only is None or peer.name in args.only]
    found: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    skipped: dict[str, str] = {}
    progress = Progress(len(peers) * (args.rounds + 1))
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="durablews-bench-") as folder:
        on = machine(Path(folder))
        try:
            for round_number in range(-1, args.rounds):  # round -1 installs
                for peer in peers:
                    progress.say(f"{peer.name}{': installing' if round_number < 0 else ''}")
                    try:
                        if round_number < 0:
                            _install(peer)
                        elif peer.name not in skipped:
                            with tempfile.TemporaryDirectory(dir=folder) as own:
                                found[peer.name].append(_run(peer, Path(own), args.messages, args.seconds))
                    except Exception as exc:  # whatever ails one peer, the others have their figures
                        skipped[peer.name] = str(exc) or type(exc).__name__
                    progress.step()
        finally:
            progress.end()
    if args.json:
        print(json.dumps({"machine": on, "peers": _to_json(peers, found, skipped)}, indent=2))
    else:
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in on.items()))
        _print(peers, found, skipped)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/bench-peers", description=__doc__)
    names = [peer.name for peer in PEERS]
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME", help=f"run this one only: {', '.join(names)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all in turn (default: %(default)s)")
    parser.add_argument("--messages", type=int, default=20_000, help="how many each delivers (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="a peer that is slow stops putting, and taking, after so long (default: %(default)s)",
    )
    parser.add_argument("--folder", help="where the files lie; its disk is what is measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object with all figures")
    return parser


# -- one peer


def _python(peer: Peer) -> Path:
    return _ENVIRONMENTS / peer.name / "bin" / "python" if peer.packages else Path(sys.executable)


def _install(peer: Peer) -> None:
    """Make the peer's environment; one that is complete stays as it is, and is removed to get newer versions."""
    folder = _ENVIRONMENTS / peer.name
    stamp, wanted = folder / "installed", "\n".join([sys.version, *peer.packages])
    if not peer.packages or (stamp.is_file() and stamp.read_text() == wanted):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pip = [str(_python(peer)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages]
    for command in ([sys.executable, "-m", "venv", str(folder)], pip):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Skipped(f"it cannot be installed: {_last_line(done.stderr or done.stdout)}")
    stamp.write_text(wanted)  # last, so that what was interrupted is not taken for finished


def _run(peer: Peer, folder: Path, messages: int, seconds: float) -> dict[str, Any]:
    if peer.run is not None:
        return peer.run(folder, messages)
    script = str(Path(__file__).with_name("bench_peer_work.py"))
    # A session of its own, so that the server that it starts can be ended with it.
    process = subprocess.Popen(
        [str(_python(peer)), script, peer.name, str(folder), str(messages), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = process.communicate(timeout=seconds * 3 + 30)
    except subprocess.TimeoutExpired:
        raise Skipped("it did not end in time") from None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all of it has ended
        process.communicate()
    if process.returncode:
        raise Skipped(f"it failed: {_last_line(errors)}")
    figures: dict[str, Any] = json.loads(said)
    if "skipped" in figures:
        raise Skipped(figures["skipped"])
    return figures


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


# -- the table


def _spread(rounds: Sequence[dict[str, Any]], figure: str) -> Spread | None:
    """Return what the rounds gave; None for what this peer does not do by itself."""
    values = [each[figure] for each in rounds if each[figure] is not None]
    return Spread.of(values) if values else None


def _to_json(
    peers: Sequence[Peer], found: dict[str, list[dict[str, Any]]], skipped: dict[str, str]
) -> dict[str, dict[str, Any]]:
    shown: dict[str, dict[str, Any]] = {}
    for peer in peers:
        shown[peer.name] = {"durable": peer.durable, "durability": peer.durability, "work": peer.work}
        if peer.name in skipped:
            shown[peer.name]["skipped"] = skipped[peer.name]
            continue
        rounds = found[peer.name]
        shown[peer.name] |= {"messages": min(each["messages"] for each in rounds), "rounds": len(rounds)}
        for figure in _FIGURES:
            spread = _spread(rounds, figure)
            shown[peer.name][figure] = spread and spread._asdict()
    return shown


def _print(peers: Sequence[Peer], found: dict[str, list[dict[str, Any]]], skipped: dict[str, str]) -> None:
    shown = _to_json(peers, found, skipped)
    ours = shown.get("durablews", {}).get("through_per_second")
    lines = [
        ["", "messages", "put /s", "drain /s", "through /s", "(min..max)", "durablews is", "a message that was put"]
    ]
    for name, peer in shown.items():
        if "skipped" in peer:
            continue
        through = peer["through_per_second"]
        lines.append(
            [
                name,
                f"{peer['messages']:,.0f}",
                *("-" if peer[each] is None else f"{peer[each]['median']:,.0f}" for each in _FIGURES),
                f"({through['min']:,.0f}..{through['max']:,.0f})",
                f"x {ours['median'] / through['median']:.1f}" if ours and name != "durablews" else "",
                f"{'' if peer['durable'] else 'NOT DURABLE: '}{peer['durability']}",
            ]
        )
    if len(lines) > 1:
        print_table(lines, left=(0, 5, 7))
    for name, why in skipped.items():
        print(f"{name}  skipped: {why}")
    for durable, words in ((True, "best durable peer"), (False, "best peer without durability")):
        best = _best(shown, durable=durable)
        if ours and best is not None:
            times = ours["median"] / shown[best]["through_per_second"]["median"]
            print(f"durablews is {times:.1f} times the {words}, {best}")
    print("\nthrough: messages by the time from the first put to the last acknowledgement")
    for name, peer in shown.items():
        print(f"{name}: {peer['work']}")


def _best(shown: dict[str, dict[str, Any]], *, durable: bool) -> str | None:
    """Return the peer that gets most through, of those that keep a message over a kill or of those that do not."""
    rates = {
        name: peer["through_per_second"]["median"]
        for name, peer in shown.items()
        if peer["durable"] is durable and "skipped" not in peer and not name.startswith("durablews")
    }
    return max(rates, key=lambda name: rates[name], default=None)


if __name__ == "__main__":
    raise SystemExit(main())
