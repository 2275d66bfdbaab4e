"""What a module offers stands in its `__all__`, and importing the package costs next to nothing."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import durablews

PACKAGE = Path(durablews.__file__).parent
# Without the package itself, whose names are lazy, and without __main__, which is a command and not a module.
MODULES = sorted(
    ".".join(("durablews", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.relative_to(PACKAGE).as_posix() not in ("__init__.py", "__main__.py")
)
# asyncio alone takes longer to load than `durablews inspect` takes to answer.
SLOW = ["aiosqlite", "asyncio", "websockets"]


def in_order(names: list[str]) -> list[str]:
    """CONSTANTS, Classes, functions; each by the alphabet."""
    return sorted(names, key=lambda name: (0 if name.isupper() else 1 if name[0].isupper() else 2, name))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_offers(name: str) -> None:
    """Every name of `__all__` is there, in order, and every public class and function is among them."""
    module = import_module(name)
    offered = getattr(module, "__all__", [])
    assert offered == in_order(offered)
    assert len(offered) == len(set(offered))
    assert [name for name in offered if not hasattr(module, name)] == []
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]
    assert [name for name in defined if name not in offered] == []
    # Only a package that is nothing but a folder needs no list.
    assert offered or all(name.startswith("_") or inspect.ismodule(value) for name, value in vars(module).items())


@pytest.mark.parametrize("name", durablews.__all__)
def test_a_public_name_of_the_package_is_there(name: str) -> None:
    """Each name that the package promises can be had from it, and is the one of the module it lives in."""
    value = getattr(durablews, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__name__ == name
        assert value is getattr(sys.modules[value.__module__], name)


def test_the_package_lists_its_names() -> None:
    """`dir(durablews)` shows the public names before any of them was used."""
    assert sorted(durablews.__all__) == durablews.__all__
    assert set(durablews.__all__) <= set(dir(durablews))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = durablews.no_such_name


@pytest.mark.parametrize("name", ["durablews", "durablews.cli"])
def test_importing_is_cheap(name: str) -> None:
    """Neither the package nor its command loads asyncio, websockets or aiosqlite before somebody needs them."""
    program = f"import sys, {name}; print(*sorted(set(sys.modules) & set({SLOW})))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")
