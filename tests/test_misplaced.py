"""A file that is removed or replaced while it is open; what `durablews doctor` says of files that are merely odd."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest
from servers import FAST, PlainServer, until, until_true
from support import FakeClock, new_outbox, store

import durablews
from durablews import cli, diagnosis, schema
from durablews.database import create
from durablews.errors import StorageFailed
from durablews.inspection import inspect
from durablews.messages import draft
from durablews.outbox import Outbox

posix = pytest.mark.skipif(os.name != "posix", reason="a file that is open cannot be removed here")


@posix
@pytest.mark.parametrize("how", ["removed", "replaced"])
async def test_a_send_into_a_file_that_is_gone_is_an_error(tmp_path: Path, how: str) -> None:
    """P1: SQLite would store into nothing without a word; a send says so, and works once it is back."""
    path, away = tmp_path / "agent.db", tmp_path / "away.db"
    async with Outbox(path) as box:
        await box.send("before")
        os.rename(path, away)
        if how == "replaced":
            shutil.copyfile(away, path)
        with pytest.raises(StorageFailed, match=how) as caught:
            await box.send("into nothing")
        assert caught.value.stored is False
        os.replace(away, path)
        await box.send("after")
        assert (await box.counts()).pending == 2


@posix
async def test_a_client_shows_that_its_file_is_gone(tmp_path: Path) -> None:
    """P8: within a second or so it stands in `blocked`, also when nothing is sent; and goes when the file is back."""
    path, away = tmp_path / "agent.db", tmp_path / "away.db"
    async with PlainServer() as server:
        async with durablews.connect(server.url, path, reconnect=FAST, proxy=None) as ws:
            await until(lambda: ws.state.value == "CONNECTED")
            os.rename(path, away)

            async def shown() -> bool:
                return "removed or moved away" in ((await ws.stats()).blocked or "")

            async def gone() -> bool:
                return (await ws.stats()).blocked is None

            await until_true(shown)
            os.rename(away, path)
            await until_true(gone)
            await ws.send("back")
            assert await ws.flush(20)
        assert server.payloads == ["back"]


def test_a_place_with_a_log_and_no_file_is_not_free(tmp_path: Path) -> None:
    """P10: a file that is gone is not silently made anew beside its log, which holds messages."""
    path = tmp_path / "agent.db"
    connection = new_outbox(tmp_path)
    store(connection, FakeClock(), draft("x"))
    log = path.with_name("agent.db-wal").read_bytes()
    connection.close()
    path.unlink()
    path.with_name("agent.db-wal").write_bytes(log)
    with pytest.raises(StorageFailed, match="doctor --salvage"):
        create(str(path))
    assert not path.exists()


async def test_headers_that_the_disk_changed_do_not_stop_the_others(tmp_path: Path) -> None:
    """P8, P10: headers have no checksum; what is no JSON any more becomes a dead letter, and the rest is sent."""
    path = tmp_path / "agent.db"
    connection = new_outbox(tmp_path)
    store(connection, FakeClock(), draft("first"), draft("second", headers={"name": "value"}), draft("third"))
    connection.close()
    path.write_bytes(path.read_bytes().replace(b'{"name":"value"}', b'{"name":"value"\x7f'))
    async with PlainServer() as server:
        async with durablews.connect(server.url, path, reconnect=FAST, proxy=None) as ws:
            assert await ws.flush(20)
            assert (await ws.stats()).dead == 1
        assert server.payloads == ["first", "third"]


def test_a_file_of_an_older_schema_can_be_inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P9: looking migrates nothing, and does not need the newest columns; the doctor says so."""
    known = schema.migrations()
    monkeypatch.setattr(schema, "migrations", lambda: known[:1])
    monkeypatch.setattr("durablews.database.migrations", lambda: known[:1])
    connection = new_outbox(tmp_path)
    store(connection, FakeClock(), draft("x"))
    connection.close()
    monkeypatch.undo()
    found = inspect(str(tmp_path / "agent.db"))
    assert (found.schema, found.pending, found.departed.lost) == (1, 1, 0)
    assert any(finding.name == "schema" for finding in diagnosis.diagnose(str(tmp_path / "agent.db")).findings)
    with closing(sqlite3.connect(tmp_path / "agent.db")) as connection:
        assert connection.execute("SELECT schema FROM durablews_meta").fetchone() == (1,)


class Odd:
    """A machine with everything that can be odd."""

    def __init__(self) -> None:
        self.environment: Mapping[str, str] = {}

    def now(self) -> float:
        return 1000.0

    def mode(self, path: str) -> int | None:
        return 0o644

    def is_folder(self, path: str) -> bool:
        return False

    def file_system(self, path: str) -> str | None:
        return "nfs4"

    def writable_folder(self, path: str) -> bool | None:
        return False


def test_the_doctor_says_what_is_odd_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mode, file system, folder and clock are warnings with a remedy each; a healthy file ends with 0."""
    connection = new_outbox(tmp_path)
    store(connection, FakeClock(), draft("x"))
    connection.close()
    path = str(tmp_path / "agent.db")
    found = diagnosis.diagnose(path, surroundings=Odd())
    warnings = {finding.name: finding.remedy for finding in found.findings if finding.level == "warning"}
    assert set(warnings) == {"mode", "file system", "folder", "clock"}
    assert all(warnings.values())
    assert (found.healthy, found.damaged) == (False, False)
    os.chmod(path, 0o644)
    assert cli.main(["doctor", path, "--json"]) == 1
    assert [f["name"] for f in json.loads(capsys.readouterr().out)["findings"] if f["level"] == "warning"] == ["mode"]
    assert cli.main(["doctor", path, "--salvage"]) == 1  # nothing that a salvage would mend
    os.chmod(path, 0o600)
    assert cli.main(["doctor", path]) == 0
    assert not list(tmp_path.glob("*.damaged-*"))


@pytest.mark.parametrize(
    ("version", "bug"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 53, 0), False),
    ],
)
def test_the_doctor_knows_which_sqlite_has_the_reset_bug(version: tuple[int, int, int], bug: bool) -> None:
    """The versions are those of sqlite.org/wal.html, backports among them."""
    assert bool(diagnosis._of_sqlite(version)) == bug
