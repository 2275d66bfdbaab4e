"""What is released is what is here: one version, three dependencies, the agreed files, migrations in a row."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

import durablews

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MIGRATIONS = sorted((ROOT / "migrations").iterdir())

REQUIRED = {"CHANGELOG.md", "LICENSE", "README.md", "durablews", "migrations", "pyproject.toml", "tests", "tools"}
# pip and build put it into an unpacked sdist.
OPTIONAL = {"PKG-INFO"}

# The runner owns the transaction and the settings of the file: a migration that touches either escapes it.
NOT_IN_A_MIGRATION = set("ATTACH BEGIN COMMIT DETACH END PRAGMA RELEASE ROLLBACK SAVEPOINT VACUUM".split())


def statements(script: str) -> Iterator[str]:
    """Split as SQLite does: the semicolons inside a trigger, a string or a comment end nothing."""
    statement = ""
    for piece in re.split(r"(?<=;)", script):
        statement += piece
        if sqlite3.complete_statement(statement):
            yield statement.strip()
            statement = ""
    if statement.strip():
        yield statement.strip()


def first_word(statement: str) -> str:
    """Return the keyword that a statement starts with, comments left out."""
    bare = re.sub(r"--[^\n]*(\n|\Z)|/\*.*?\*/", " ", statement, flags=re.DOTALL)
    return next(iter(bare.split()), "").rstrip(";").upper()


def top_level() -> set[str]:
    """What the repository holds: tracked, or new and not ignored. Outside of git, what the folder holds."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        return {path.name for path in ROOT.iterdir()}
    # A file that was deleted and not yet committed is no longer there.
    return {name.partition("/")[0] for name in listed if name and (ROOT / name).exists()}


def test_the_top_level_is_the_agreed_one() -> None:
    """Beside what users were promised to find there, only dot-files are at the top of the repository."""
    found = {name for name in top_level() if not name.startswith(".")}
    assert found - OPTIONAL == REQUIRED


def test_the_version_is_written_once() -> None:
    """The version is `durablews.__version__`, from which the build reads it."""
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"] == {"path": "durablews/__init__.py"}
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", durablews.__version__)


def test_the_installed_version_is_this_one() -> None:
    """What is installed says that it is the version that runs."""
    try:
        installed = version("durablews")
    except PackageNotFoundError:
        return  # run from the checkout, not installed; tools/check_wheel.py asks a wheel
    assert installed == durablews.__version__


def test_the_dependencies_are_three_and_not_pinned() -> None:
    """Nobody who installs durablews gets a fourth package, or is kept from the newest of the three."""
    parsed = [re.fullmatch(r"([a-z]+)>=([\d.]+)", line) for line in PROJECT["project"]["dependencies"]]
    assert sorted(match[1] for match in parsed if match) == ["aiosqlite", "msgspec", "websockets"]
    assert all(parsed)


def test_both_ways_to_ask_for_the_test_tools_are_one_list() -> None:
    """The extra and the dependency group cannot drift apart."""
    assert set(PROJECT["project"]["optional-dependencies"]) == {"fuzz", "socks", "test"}
    assert PROJECT["dependency-groups"]["test"] == ["durablews[test]"]


def test_migrations_are_numbered_in_a_row() -> None:
    """A migration's number is the schema that it makes, so there is no gap and no second file for one."""
    names = [path.name for path in MIGRATIONS]
    assert [name for name in names if not re.fullmatch(r"\d{4}_[a-z][a-z0-9_]*\.sql", name)] == []
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))


@pytest.mark.parametrize("path", MIGRATIONS, ids=lambda path: path.name)
def test_a_migration_leaves_transaction_and_settings_alone(path: Path) -> None:
    """A migration is all or nothing, and in an application's database changes nothing of the application's."""
    words = [first_word(statement) for statement in statements(path.read_text(encoding="utf-8"))]
    assert NOT_IN_A_MIGRATION.isdisjoint(words)
    assert set(words) <= {"ALTER", "CREATE", "DELETE", "DROP", "INSERT", "REINDEX", "UPDATE", "WITH", ""}


def test_a_planted_statement_is_found() -> None:
    """The test above sees a COMMIT behind a comment and a PRAGMA behind a trigger, and not the trigger's own BEGIN."""
    script = """
    CREATE TABLE t (a TEXT DEFAULT ';'); -- BEGIN; is only said here
    CREATE TRIGGER r AFTER INSERT ON t BEGIN UPDATE t SET a = 'PRAGMA x;'; END;
    /* and
       now; */ pragma user_version = 2;
    -- so
    COMMIT;
    """
    assert [first_word(statement) for statement in statements(script)] == ["CREATE", "CREATE", "PRAGMA", "COMMIT"]
