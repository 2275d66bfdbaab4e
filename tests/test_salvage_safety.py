"""What a salvage leaves alone, whose sequences it gives out, and that it can be killed at any step.

``DURABLEWS_TEST_SEED`` repeats a run.
"""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from servers import ENVIRONMENT
from support import FakeClock, application_database, in_child, integrity, new_outbox, store
from wreckage import (  # noqa: F401 - pytest looks for the fixtures here
    SEED,
    Wreck,
    closed_fixture,
    crashed_fixture,
    judge,
    noise_on_a_leaf,
    rows,
    say_seed,
)

from durablews import cli, database, entries
from durablews.errors import (
    NotAnOutbox,
    OutboxInUse,
    OutboxLocked,
    OutboxMissing,
    OutboxTooNew,
    StorageFailed,
)
from durablews.inspection import inspect
from durablews.jobs import transaction
from durablews.messages import draft
from durablews.ownership import Ownership
from durablews.salvage import salvage

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files and processes")


# -- what is not salvaged


def test_an_empty_file_is_not_made_an_outbox(tmp_path: Path) -> None:
    """P10: of a file of no bytes nothing is salvaged, and nothing is put in its place."""
    path = tmp_path / "agent.db"
    path.touch()
    for use in (database.open_outbox, inspect, salvage):
        with pytest.raises(NotAnOutbox):
            use(str(path))
    assert path.stat().st_size == 0
    assert sorted(file.name for file in tmp_path.iterdir()) in (["agent.db"], ["agent.db", "agent.db-lock"])


@pytest.mark.parametrize("outbox", [False, True], ids=["without an outbox", "with an outbox"])
def test_an_applications_database_is_left_to_its_owner(tmp_path: Path, outbox: bool) -> None:
    """P10: a database with other tables is never moved, damaged or not."""
    path = application_database(tmp_path)
    if outbox:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            durablews_install(connection)
    before = path.read_bytes()
    with pytest.raises((NotAnOutbox, StorageFailed), match="nothing was touched"):
        salvage(str(path))
    assert path.read_bytes() == before


def durablews_install(connection: sqlite3.Connection) -> None:
    from durablews.schema import apply_migrations

    with transaction(connection):
        apply_migrations(connection, "application.db")


def test_a_newer_outbox_is_left_alone(tmp_path: Path) -> None:
    """P9, P10: what a newer version wrote is not salvaged by an older one."""
    connection = new_outbox(tmp_path)
    connection.execute("UPDATE durablews_meta SET schema = 99")
    connection.close()
    path = tmp_path / "agent.db"
    before = path.read_bytes()
    for use in (database.open_outbox, inspect, salvage):
        with pytest.raises(OutboxTooNew):
            use(str(path))
    assert path.read_bytes() == before
    assert cli.main(["doctor", str(path)]) == 3


def test_what_is_missing_is_said_so(tmp_path: Path) -> None:
    """Where there is neither a file nor a log, nothing is made."""
    with pytest.raises(OutboxMissing):
        salvage(str(tmp_path / "agent.db"))
    assert cli.main(["doctor", str(tmp_path / "agent.db"), "--salvage"]) == 3
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith("-lock")] == []


@posix
def test_a_file_in_use_is_not_moved(closed: Wreck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P10: while it is drained, or any program has it open, a salvage refuses and touches nothing."""
    monkeypatch.setattr("durablews.salvage._PATIENCE", 0.1)
    path = closed.lay(tmp_path / "box")
    ownership = Ownership(path)
    assert ownership.acquire() is None
    with pytest.raises(OutboxInUse):
        salvage(str(path))
    ownership.release()
    connection = database.open_outbox(str(path))
    with pytest.raises(OutboxLocked, match="this process has it open"):
        salvage(str(path))
    said = in_child(lambda: salvage(str(path)))  # the child has its parent's descriptors, but not its locks
    assert "OutboxLocked" in said
    connection.close()
    program = (
        "import sqlite3, sys\nconnection = sqlite3.connect(sys.argv[1])\n"
        "connection.execute('SELECT count(*) FROM durablews_entries').fetchone()\nprint('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(OutboxLocked, match="another program has it open"):
            salvage(str(path))
        holder.stdin.close()
        holder.wait(60)
    assert salvage(str(path)).lost == 0


# -- identity


def test_a_salvage_takes_a_new_stream_and_keeps_the_numbers(closed: Wreck, tmp_path: Path) -> None:
    """P4: no server knows the new stream, the entries keep their sequences, and no later one is below them."""
    path = closed.lay(tmp_path / "box")
    with closing(sqlite3.connect(path)) as connection:
        (stream,) = connection.execute("SELECT stream FROM durablews_meta").fetchone()
    found = salvage(str(path))
    assert found.stream != stream
    assert [row.seq for row in rows(path)] == [row.seq for row in closed.rows]
    with closing(database.open_outbox(str(path))) as connection:
        (new,) = store(connection, FakeClock(), draft("new"))
    assert new > max(row.seq for row in closed.rows)


def test_a_lost_message_can_be_sent_again_with_its_id(tmp_path: Path) -> None:
    """P2, P7: the id of what was lost is forgotten, or a second send would say that it is stored; others stay known."""
    (tmp_path / "box").mkdir()
    connection, clock = new_outbox(tmp_path / "box"), FakeClock()
    for number in range(200):
        store(connection, clock, draft({"number": number, "fill": "x" * 100}, id=f"id {number}"))
    connection.close()
    path = tmp_path / "box" / "agent.db"
    noise_on_a_leaf(path, random.Random(SEED))
    found = salvage(str(path))
    assert found.lost == found.missing_count == len(found.missing)
    with closing(database.open_outbox(str(path))) as connection:
        known = {seq for (seq,) in connection.execute("SELECT seq FROM durablews_ids")}
        assert known == set(range(1, 201)) - set(found.missing)
        last = entries.last_sequence(connection)
        (again,) = store(connection, clock, draft("again", id=f"id {found.missing[0] - 1}"))
        assert again > last
        (same,) = store(connection, clock, draft("again", id="id 0"))
        assert same == 1


@posix
def test_the_new_file_belongs_to_whom_the_old_one_did(closed: Wreck, tmp_path: Path) -> None:
    """An administrator's salvage leaves files that the agent's user can open."""
    if os.geteuid() != 0:
        assert os.environ.get("CI") != "true", "only root can give files away"
        pytest.skip("only root can give files away")
    path = closed.lay(tmp_path / "box")
    os.chown(path, 65534, 65534)
    salvage(str(path))
    for file in path.parent.iterdir():
        assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (65534, 0o600), file


# -- killed in the middle


@posix
@pytest.mark.parametrize("name", ["closed", "crashed"])
def test_a_salvage_killed_at_any_step_can_be_done_again(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """P10: killed before any change of a name, nothing takes the place for free, and a salvage finds everything."""
    wreck: Wreck = request.getfixturevalue(name)
    for step in range(40):
        path = wreck.lay(tmp_path / "box")
        said = in_child(partial(_salvage_until, path, step))
        assert said in ("", "done"), said
        refused = ""
        try:
            database.create(str(path))
        except StorageFailed as exc:
            refused = str(exc)
        if refused:
            assert "doctor --salvage" in refused
        else:
            assert len(rows(path)) == len(wreck.rows), f"at step {step} an outbox without its messages is in the place"
        found = salvage(str(path))
        assert (judge(wreck, path, found), found.lost) == (0, 0)
        assert integrity(path) == "ok"
        assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []
        if said == "done":
            break
    assert 3 < step < 39


def _salvage_until(path: Path, step: int) -> str:
    """Salvage, and die at the change of a name number `step`."""
    count = 0

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            if count == step:
                os._exit(0)
            count += 1
            return change(*arguments, **named)

        return changed

    for change in ("link", "replace", "unlink", "rename"):
        setattr(os, change, dying(getattr(os, change)))
    salvage(str(path))
    return "done"
