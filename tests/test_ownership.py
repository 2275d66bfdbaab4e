"""Who drains an outbox: one client per file, named, and free again the moment it dies."""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import answer, fork, in_child

from durablews.ownership import Ownership, holder_of, lock_path

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.db"


@pytest.fixture
def owned(path: Path) -> Iterator[Ownership]:
    ownership = Ownership(path)
    assert ownership.acquire() is None
    yield ownership
    ownership.release()


def try_to_own(path: Path) -> str:
    """Say in another process who is in the way, and let go again."""

    def life() -> str:
        ownership = Ownership(path)
        holder = ownership.acquire()
        ownership.release()
        return str(holder)

    return in_child(life)


def me() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()} since "


def test_a_second_drainer_is_refused_and_told_who(path: Path, owned: Ownership) -> None:
    """In the same process and in another one, `acquire` names the holder by pid, host and time, and takes nothing."""
    assert str(Ownership(path).acquire()).startswith(me())
    assert try_to_own(path).startswith(me())
    assert try_to_own(path).startswith(me()), "and the tries above have not freed it"


def test_a_refused_drainer_can_let_go_without_harm(path: Path, owned: Ownership) -> None:
    """Releasing what was never acquired changes nothing."""
    second = Ownership(path)
    assert second.acquire() is not None
    second.release()
    assert try_to_own(path).startswith(me())


def test_the_right_can_be_given_back(path: Path, owned: Ownership) -> None:
    """After `release` anyone may own it, this process too, and a second release is no error."""
    owned.release()
    owned.release()
    assert try_to_own(path) == "None"
    again = Ownership(path)
    assert again.acquire() is None
    owned.release()
    assert try_to_own(path).startswith(me())
    again.release()


@pytest.mark.parametrize("name", ["link.db", "folder/agent.db", "./agent.db"])
def test_every_name_of_a_file_is_one_right(
    path: Path, owned: Ownership, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Links, and other ways to write the path, lead to the same lock, in this process and in others."""
    (path.parent / "link.db").symlink_to(path)
    (path.parent / "folder").symlink_to(path.parent)
    monkeypatch.chdir(path.parent)
    assert str(Ownership(name).acquire()).startswith(me())
    assert try_to_own(Path(name)).startswith(me())
    assert str(holder_of(name)).startswith(me())
    assert lock_path(name) == path.parent / "agent.db-lock"


def test_the_right_of_a_killed_holder_is_free(path: Path) -> None:
    """The kernel frees the lock with the process: nothing stale is in the way of the next one."""
    stays, never = os.pipe()

    def life() -> None:
        assert Ownership(path).acquire() is None
        os.write(said, b"owned")
        os.close(never)
        os.read(stays, 1)  # until it is killed

    hears, said = os.pipe()
    pid, reader = fork(life)
    assert os.read(hears, 5) == b"owned"
    holder = holder_of(path)
    assert holder is not None
    assert holder.startswith(f"pid {pid} on ")
    mine = Ownership(path)
    assert mine.acquire() == holder
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert holder_of(path) is None, "its name in the file is only a name"
    assert mine.acquire() is None
    mine.release()
    for descriptor in (stays, never, hears, said, reader):
        os.close(descriptor)


def test_a_forked_child_has_no_right(path: Path, owned: Ownership) -> None:
    """The child of a holder does not own the file, cannot release it, and its end does not free its parent's right."""

    def life() -> str:
        owned.release()
        seen = holder_of(path)
        refused = Ownership(path).acquire()
        return f"{seen} / {refused}"

    parent = me()
    seen, refused = answer(fork(life)).split(" / ")
    assert seen.startswith(parent)
    assert refused.startswith(parent)
    assert try_to_own(path).startswith(parent)
    assert str(Ownership(path).acquire()).startswith(parent)


def test_a_child_that_outlives_the_holder_keeps_nothing(path: Path) -> None:
    """When the holder is killed, a forked child of its own that lives on does not keep the outbox from anyone."""
    stays, never = os.pipe()
    hears, said = os.pipe()

    def life() -> None:
        assert Ownership(path).acquire() is None
        os.close(never)
        if os.fork():
            os.write(said, b"owned")
        os.read(stays, 1)  # the holder until it is killed, its child until the test is over

    pid, reader = fork(life)
    assert os.read(hears, 5) == b"owned"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert holder_of(path) is None
    mine = Ownership(path)
    assert mine.acquire() is None
    mine.release()
    for descriptor in (stays, never, hears, said):
        os.close(descriptor)
    os.read(reader, 10)  # ends with the child
    os.close(reader)


def test_a_child_may_own_what_its_parent_gave_back(path: Path, owned: Ownership) -> None:
    """What the parent held once is no longer in the child's way."""
    owned.release()

    def life() -> str:
        mine = Ownership(path)
        taken = mine.acquire() is None and str(holder_of(path)).startswith(me())
        mine.release()
        return f"{taken} {holder_of(path)}"

    assert in_child(life) == "True None"


def test_asking_for_the_holder_frees_nothing(path: Path, owned: Ownership) -> None:
    """`holder_of`, in the owning process and in others, leaves the lock where it is."""
    for _ in range(3):
        assert str(holder_of(path)).startswith(me())
        assert in_child(lambda: holder_of(path)).startswith(me())
    assert try_to_own(path).startswith(me())


def test_asking_for_the_holder_creates_nothing(path: Path) -> None:
    """Nobody holds what has no lock file, and asking makes none."""
    assert holder_of(path) is None
    assert holder_of(path.parent / "nowhere" / "agent.db") is None
    assert list(path.parent.iterdir()) == []


def test_the_lock_is_a_file_of_its_own(path: Path, owned: Ownership) -> None:
    """The outbox itself is never opened for the lock, and only its owner may read who drains it."""
    assert [file.name for file in path.parent.iterdir()] == ["agent.db-lock"]
    assert stat.S_IMODE(lock_path(path).stat().st_mode) == 0o600


def test_a_folder_that_is_not_there_is_an_error(path: Path) -> None:
    """Where no lock file can be made, `acquire` raises instead of letting two drain."""
    with pytest.raises(FileNotFoundError):
        Ownership(path.parent / "nowhere" / "agent.db").acquire()


def test_a_full_disk_does_not_keep_an_outbox_from_being_drained(path: Path) -> None:
    """Without room for the holder's name the right is given all the same: only draining makes room again."""

    def life() -> str:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        mine = Ownership(path)
        return f"{mine.acquire()} {in_child(lambda: Ownership(path).acquire())}"

    assert in_child(life) == "None another process"


def test_of_many_threads_one_gets_the_right(path: Path) -> None:
    """A record lock belongs to the process: threads that ask at once, or ask for the holder, do not share it."""
    threads = 8
    start = threading.Barrier(threads)
    for _ in range(30):
        rights = [Ownership(path) for _ in range(threads)]
        got: list[object] = []

        def life(mine: Ownership, got: list[object] = got) -> None:
            start.wait()
            holder_of(path)
            got.append(mine.acquire())
            holder_of(path)

        running = [threading.Thread(target=life, args=(mine,)) for mine in rights]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert [holder is None for holder in got].count(True) == 1
        assert str(holder_of(path)).startswith(me())
        for mine in rights:
            mine.release()
        assert holder_of(path) is None
