"""Copies of an outbox, end to end: a real client, a real receiver with its SQLite store, which keeps what it applied.

A backup is restored in place, a file is copied, a disk is cloned with its inodes and its machine's id, power goes under
``durability="process"`` (PROTOCOL.md section 5). Whatever `send` confirmed, and no restore erased, is applied; nothing
is taken for a repeat of something else; what is applied twice is so under a new stream.

``DURABLEWS_TEST_SEED`` repeats a run, ``DURABLEWS_TEST_HISTORIES`` makes it longer: 40 unless it is set.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from copies import HISTORIES, SEED, Disk, cloned, lose_power, play_many

from durablews import identity
from durablews.delivery.suspicion import Suspicion, Verdict


@pytest.mark.parametrize(("kind", "share"), [("restored", 0.6), ("copied", 0.25), ("kept", 0.15)])
async def test_no_copy_of_an_outbox_loses_what_was_confirmed(tmp_path: Path, kind: str, share: float) -> None:
    """P4: restored with more and with fewer sent since, copied, or left alone: all that is owed is applied."""
    repeats = await play_many(tmp_path, kind, int(HISTORIES * share))
    print(f"seed {SEED}: {len(repeats)} histories, {sum(repeats)} repeats under a new stream")  # noqa: T201
    if kind != "restored":  # which may happen to have nothing to repeat
        assert (sum(repeats) > 0) == (kind == "copied")


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """A disk; skipped where none can be mounted, except in CI, which must be able to."""
    made = Disk(tmp_path / "disk.img", tmp_path / "disk")
    try:
        made.image.write_bytes(b"")
        os.truncate(made.image, 32 << 20)
        subprocess.run(["mkfs.ext4", "-q", str(made.image)], check=True, capture_output=True)
        with made.mounted():
            pass
    except (OSError, subprocess.CalledProcessError) as exc:
        reason = f"no disk can be mounted here: {getattr(exc, 'stderr', b'').decode() or exc}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return made


@pytest.mark.parametrize(("sends", "waiting"), [(0, 0), (5, 0), (5, 5)])
async def test_two_clients_on_one_stream_part(disk: Disk, tmp_path: Path, sends: int, waiting: int) -> None:
    """P4: a disk and its clone have one machine id and the same inodes: one takes a new stream, and both deliver."""
    await cloned(disk, tmp_path, sends=sends, waiting=waiting)


async def test_power_loss_without_syncs_confuses_nothing(disk: Disk, tmp_path: Path) -> None:
    """P4: with ``durability="process"`` a cut may cost what was sent last, and never what is sent after it."""
    await lose_power(disk, tmp_path, cuts=3)


# -- broken builds


def _no_raise(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(identity, "_set_last_sequence", lambda connection, last: None)


def _same_stream(patched: pytest.MonkeyPatch) -> None:
    genuine = identity.take_over

    def forgetful(connection: sqlite3.Connection, *arguments: Any, **options: Any) -> Any:
        connection.execute("UPDATE durablews_meta SET file = NULL, machine = NULL")
        return genuine(connection, *arguments, **options)

    patched.setattr(identity, "take_over", forgetful)


def _claim(what: Callable[[sqlite3.Connection], int]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patched: patched.setattr(identity, "claimed_last", what)


def _given_out_since(connection: sqlite3.Connection) -> int:
    """Claim a number that was given out after the last raise, as durablews did once."""
    last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'durablews_entries'").fetchone()[0]
    raised_from, raised_to = connection.execute("SELECT raised_from, raised_to FROM durablews_meta").fetchone()
    return int(raised_from if last == raised_to else last)


MUTANTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "a copied file keeps its stream": ("copied", _same_stream),
    "last is claimed too high": ("restored", _claim(lambda connection: 2**52)),
    "last is claimed from before a welcome": ("restored", _claim(_given_out_since)),
    "last is claimed too low": ("kept", _claim(lambda connection: 0)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_a_guard_that_is_gone_is_found(tmp_path: Path, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is proven: without any one of the guards of section 5 some history goes wrong."""
    kind, switch_off = MUTANTS[mutant]
    switch_off(monkeypatch)
    with pytest.raises(AssertionError, match=r"lost|without a reason"):
        await play_many(tmp_path, kind, 300)


async def test_a_clone_without_the_raise_is_found(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is proven: two clients that give out the same numbers lose messages to one another."""
    _no_raise(monkeypatch)
    with pytest.raises(AssertionError, match="lost"):
        await cloned(disk, tmp_path, sends=5)


async def test_clones_that_never_part_are_found(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is proven: without the fourth guard they close one another's connections for ever."""
    monkeypatch.setattr(Suspicion, "_taken_over", lambda self, closed, now: Verdict.NOTHING)
    with pytest.raises(AssertionError, match="without end"):
        await cloned(disk, tmp_path, sends=0)


async def test_a_lost_tail_without_guards_is_found(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is proven: what is sent unsynced, lost, and numbered again is taken for a repeat."""
    _no_raise(monkeypatch)
    MUTANTS["last is claimed too high"][1](monkeypatch)
    with pytest.raises(AssertionError, match="lost"):
        await lose_power(disk, tmp_path, cuts=3, DURABLEWS_TEST_UNSYNCED="1")
