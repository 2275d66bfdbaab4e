"""The house: every module imports only from floors below it, and touches only the part of the world that is its own.

To add a module, add a line to `HOUSE`: its floor, and the fenced modules that it may import.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "durablews"

LONGEST_FILE = 400
NAMES_THAT_SAY_NOTHING = {"common", "helper", "helpers", "misc", "shared", "util", "utils"}

# Values in, values out: no files, no clock, no randomness, no threads. Every module may import these.
PLAIN = frozenset(
    """
    __future__ abc array base64 binascii bisect collections contextlib copy dataclasses decimal difflib email.utils
    enum fractions functools hashlib heapq hmac html inspect io ipaddress itertools json keyword logging math numbers
    operator re reprlib shlex string struct sys textwrap traceback types typing unicodedata urllib.parse weakref zlib
    """.split()
)

# What a shell that meets files, processes and people needs. A module asks for all of it with the word "system".
SYSTEM = frozenset(
    """
    atexit datetime errno getpass gettext importlib.metadata importlib.resources locale os pathlib platform shutil
    signal socket stat subprocess tempfile threading warnings
    """.split()
)


class Room(NamedTuple):
    """Where a module lives: its floor, the fenced imports it may have, and those it may have in functions only."""

    floor: int
    fenced: str = ""
    in_functions: str = ""


# "wire.*" is the package durablews.wire with everything in it; the longest matching name counts.
HOUSE: dict[str, Room] = {
    "errors": Room(0),
    "backoff": Room(0),
    "clock": Room(0, "time uuid"),
    "netlink": Room(0),
    "process": Room(0, "system"),
    "visible": Room(0),
    "lifecycle": Room(1),
    "messages": Room(1, "msgspec"),
    "config": Room(1, "msgspec"),
    "places": Room(1, "tomllib"),
    "addresses": Room(1),
    "schema": Room(1, "system sqlite3"),
    "ownership": Room(1, "system fcntl msvcrt time"),
    "walindex": Room(1, "system fcntl"),
    "reservefile": Room(2, "system"),
    "jobs": Room(1, "system aiosqlite asyncio sqlite3"),
    "connecting": Room(2, "aiosqlite asyncio"),
    "page": Room(2, "msgspec sqlite3"),
    "entries": Room(3, "msgspec sqlite3"),
    "reserve": Room(4, "system sqlite3"),
    "database": Room(3, "system secrets sqlite3"),
    "wire.*": Room(2, "msgspec"),
    "heartbeat": Room(2),
    "network": Room(2, "system asyncio"),
    "providers": Room(2, "asyncio contextvars threading"),
    "configfile": Room(2, "system msgspec tomllib"),
    "trust": Room(2, "ssl"),
    "analysis.surroundings": Room(2, "system time"),
    "analysis.profiles": Room(2, "system msgspec tomllib"),
    "analysis.fleet": Room(2, "msgspec"),
    "analysis.judging": Room(4, "system msgspec"),
    "analysis.*": Room(3, "msgspec"),
    "endpoint": Room(3, "msgspec"),
    "events": Room(2, "asyncio msgspec"),
    "settlement": Room(4, "msgspec sqlite3"),
    "work": Room(4, "asyncio sqlite3"),
    "snapshot": Room(3, "msgspec"),
    "identity": Room(5, "system sqlite3 winreg"),
    "inspection": Room(4, "system msgspec sqlite3"),
    "committing": Room(5, "sqlite3"),
    "storage": Room(6, "system aiosqlite asyncio sqlite3"),
    "upkeep": Room(5, "system sqlite3"),
    "delivery.*": Room(5, "msgspec"),
    "writeahead": Room(1),
    "btree": Room(1),
    "remains": Room(2, "msgspec statistics"),
    "carryover": Room(5, "system msgspec sqlite3 time"),
    "salvage": Room(6, "system fcntl msgspec sqlite3 time"),
    "diagnosis": Room(7, "system msgspec sqlite3"),
    "outbox": Room(7, "system aiosqlite asyncio msgspec sqlite3"),
    "reconnection": Room(7, "msgspec"),
    "closing": Room(7, "asyncio websockets"),
    "failures": Room(8, "system msgspec ssl websockets"),
    "dialling": Room(9, "system asyncio ssl websockets"),
    "draining": Room(8, "system asyncio msgspec secrets sqlite3"),
    "housekeeping": Room(9, "asyncio"),
    "writing": Room(7, "fcntl websockets"),
    "link": Room(9, "asyncio websockets"),
    "attempt": Room(10, "asyncio msgspec secrets websockets"),
    "manager": Room(11, "asyncio random"),
    "client": Room(12, "system asyncio"),
    "receiver.ledger": Room(11, "msgspec sqlite3"),
    "receiver.session": Room(11, "msgspec"),
    "receiver.messages": Room(11, "msgspec"),
    "receiver.exchange": Room(11, "msgspec secrets sqlite3"),
    "receiver.*": Room(11, "system aiosqlite asyncio msgspec sqlite3"),
    "cli": Room(14, "system argparse importlib", in_functions="asyncio websockets"),
    "cli.doctor": Room(13, "system argparse msgspec"),
    "cli.send": Room(13, "system argparse sqlite3"),
    "cli.evidence": Room(13, "system argparse sqlite3"),
    "cli.check": Room(13, "system argparse", in_functions="random"),
    "cli.*": Room(13, "system argparse", in_functions="asyncio websockets"),
    "__init__": Room(14, "importlib"),
    "__main__": Room(15),
}


class Import(NamedTuple):
    """One imported name, and where the statement stands."""

    name: str
    line: int
    in_function: bool
    for_types_only: bool


def room_of(module: str, house: Mapping[str, Room] = HOUSE) -> Room | None:
    """Return the longest line of the table that covers the module."""
    parts = module.split(".")
    lines = [module, *(".".join([*parts[:length], "*"]) for length in range(len(parts), 0, -1))]
    return next((house[line] for line in lines if line in house), None)


def imports_of(source: str) -> Iterator[Import]:
    """Yield every import of a module; `from x import y` counts as `x.y`."""

    def visit(node: ast.AST, in_function: bool, for_types_only: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(alias.name, node.lineno, in_function, for_types_only)
            case ast.ImportFrom(module=module, names=names, level=level):
                for alias in names:
                    yield Import(f"{'.' * level}{module or ''}.{alias.name}", node.lineno, in_function, for_types_only)
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body, orelse=orelse):
                for statement in body:
                    yield from visit(statement, in_function, True)
                for statement in orelse:
                    yield from visit(statement, in_function, for_types_only)
            case _:
                inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                for child in ast.iter_child_nodes(node):
                    yield from visit(child, inside, for_types_only)

    yield from visit(ast.parse(source), False, False)


def violations(module: str, source: str, modules: Collection[str], house: Mapping[str, Room] = HOUSE) -> Iterator[str]:
    """Yield what a module does that its place in the house does not allow.

    Args:
        module: its name without the package, such as ``"wire.frames"``.
        source: its text.
        modules: the names of every module of the package, to tell a module from a name inside one.
        house: the table.
    """
    if (room := room_of(module, house)) is None:
        yield f"durablews.{module} has no floor: add it to HOUSE in tests/test_layers.py"
        return
    fenced = _spelled_out(room.fenced)
    lazily = _spelled_out(room.in_functions)
    for found in imports_of(source):
        where = f"durablews.{module} line {found.line}"
        if found.name.startswith("."):
            yield f"{where}: a relative import; write the whole name"
        elif found.name.split(".")[0] == "durablews":
            target = _module_in(found.name, modules)
            if target is None:
                if found.name != "durablews.__version__":
                    yield f"{where}: {found.name} is loaded lazily for users; import it from the module it lives in"
            # Inside one package the direction is test_no_two_modules_need_each_other's.
            elif target.split(".")[0] != module.split(".")[0]:
                there = room_of(target, house)
                if there is not None and there.floor >= room.floor:
                    yield f"{where}: floor {room.floor} imports durablews.{target} from floor {there.floor}"
        elif not found.for_types_only and not _allowed(found.name, PLAIN | fenced):
            if not _allowed(found.name, lazily):
                yield f"{where}: {found.name} is not for this module"
            elif not found.in_function:
                yield f"{where}: {found.name} may be imported inside functions only"


def cycle_in(graph: Mapping[str, Collection[str]]) -> list[str]:
    """Return a path of modules that ends where it starts, or nothing."""
    finished: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in finished:
            for target in sorted(graph.get(module, ())):
                if found := walk(target, [*path, module]):
                    return found
            finished.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def _spelled_out(names: str) -> frozenset[str]:
    words = set(names.split())
    return frozenset(words - {"system"} | (SYSTEM if "system" in words else frozenset()))


def _allowed(name: str, allowed: Collection[str]) -> bool:
    """Say whether the name, or a package that it is part of, is allowed."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in allowed for length in range(1, len(parts) + 1))


def _module_in(name: str, modules: Collection[str]) -> str | None:
    """Return the module that an imported name is, or lives in; None for the package itself."""
    parts = name.split(".")[1:]
    return next(
        (".".join(parts[:length]) for length in range(len(parts), 0, -1) if ".".join(parts[:length]) in modules), None
    )


def _modules() -> dict[str, Path]:
    """Every module of the package; a package's own `__init__` has the name of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = _modules()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_floors_below(module: str) -> None:
    """No module knows of what is built on top of it, or reaches for a part of the world that is another's."""
    assert list(violations(module, MODULES[module].read_text(encoding="utf-8"), MODULES)) == []


def test_no_two_modules_need_each_other() -> None:
    """Inside one package, too, the imports have a direction."""
    graph = {}
    for module, path in MODULES.items():
        names = [found.name for found in imports_of(path.read_text(encoding="utf-8")) if not found.for_types_only]
        targets = {_module_in(name, MODULES) for name in names if name.startswith("durablews.")}
        graph[module] = {target for target in targets if target not in (None, module)}
    assert cycle_in(graph) == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short_and_its_name_says_something(module: str) -> None:
    """A file has one subject: at most 400 lines, and a name that is not a drawer."""
    length = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert length <= LONGEST_FILE
    assert NAMES_THAT_SAY_NOTHING.isdisjoint(module.split("."))


KNOWN = [
    "errors",
    "backoff",
    "clock",
    "messages",
    "wire",
    "wire.frames",
    "outbox",
    "manager",
    "client",
    "cli",
    "cli.run",
]


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("errors", "from durablews.messages import Entry", "floor 0 imports durablews.messages from floor 1"),
        ("errors", "from durablews import messages", "floor 0 imports durablews.messages from floor 1"),
        ("errors", "import durablews.messages as m", "floor 0 imports durablews.messages from floor 1"),
        ("errors", "from durablews import backoff", "floor 0 imports durablews.backoff from floor 0"),
        ("wire.frames", "from durablews.manager import Manager", "floor 2 imports durablews.manager from floor 11"),
        ("wire.frames", "from . import native", "a relative import"),
        (
            "messages",
            "if TYPE_CHECKING:\n    from durablews.client import Client",
            "line 2: floor 1 imports durablews.client from floor 12",
        ),
        ("messages", "def f():\n    from durablews.client import Client", "floor 1 imports durablews.client"),
        ("client", "from durablews import connect", "durablews.connect is loaded lazily"),
        ("backoff", "from random import uniform", "random.uniform is not for this module"),
        ("messages", "import os.path", "os.path is not for this module"),
        ("messages", "from urllib import request", "urllib.request is not for this module"),
        ("delivery.session", "import asyncio", "asyncio is not for this module"),
        ("delivery.session", "def f():\n    import time", "time is not for this module"),
        ("client", "import websockets.asyncio.client", "websockets.asyncio.client is not for this module"),
        ("manager", "import aiosqlite", "aiosqlite is not for this module"),
        ("messages", "import importlib", "importlib is not for this module"),
        ("cli.run", "import asyncio", "asyncio may be imported inside functions only"),
        ("cli.run", "class C:\n    import asyncio", "asyncio may be imported inside functions only"),
        ("cli.run", "try:\n    import asyncio\nexcept ImportError:\n    pass", "inside functions only"),
        ("attic", "", "has no floor"),
        ("attic.box", "", "has no floor"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str, complaint: str) -> None:
    """The test above can fail: it names each kind of thing that is not allowed."""
    (found,) = violations(module, source, KNOWN)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("messages", "import msgspec, math\nfrom durablews.errors import PayloadError\nfrom collections import abc"),
        ("wire", "from durablews.wire.frames import Codec"),
        ("errors", "if TYPE_CHECKING:\n    import asyncio"),
        ("clock", "from time import monotonic"),
        ("outbox", "import asyncio, aiosqlite, os.path\nfrom importlib import resources"),
        ("cli", "import argparse\nfrom durablews import __version__\ndef f():\n    import asyncio"),
        ("cli.run", "async def f():\n    from durablews.client import connect\n    from websockets import Close"),
    ],
)
def test_what_is_allowed_is_let_through(module: str, source: str) -> None:
    """The test above can pass: what the table allows is no violation."""
    assert list(violations(module, source, KNOWN)) == []


def test_a_planted_cycle_is_found() -> None:
    """Modules that need each other are found however long the way round is."""
    assert cycle_in({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}) == ["a", "b", "c", "a"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
