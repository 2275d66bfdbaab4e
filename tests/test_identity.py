"""Whose sequences these are: the stream, and the raise that keeps an old number from new content."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import FakeClock, column, departed, enqueue, new_outbox, open_again, run_of, sized, store, totals, waiting

from durablews import identity
from durablews.entries import last_sequence
from durablews.identity import claimed_last, confirm_raise, leave, machine_id, renew_stream, take_over
from durablews.jobs import transaction
from durablews.messages import draft
from durablews.settlement import settle

LARGEST_RAISE = 2**32


def drain(
    connection: sqlite3.Connection,
    folder: Path,
    *,
    machine: str = "m",
    window: int = 4,
    draw: Callable[[int], int] = lambda most: 99,
    name: str = "agent.db",
) -> str:
    """Do what a drainer does first when it opens an outbox."""
    with transaction(connection):
        return take_over(connection, str(folder / name), machine=machine, window=window, draw=draw)


def claim(connection: sqlite3.Connection) -> int:
    return claimed_last(connection)


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = new_outbox(tmp_path)
    yield connection
    connection.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


# -- the stream


def test_the_same_place_keeps_its_stream(outbox: sqlite3.Connection, tmp_path: Path) -> None:
    """The same file on the same machine is the same stream, opened however often; `take_over` returns it."""
    streams = {drain(outbox, tmp_path) for _ in range(5)}
    assert streams == set(column(outbox, "SELECT stream FROM durablews_meta"))
    assert all(len(stream) == 32 and int(stream, 16) >= 0 for stream in streams)


def test_a_copied_file_takes_a_new_stream(outbox: sqlite3.Connection, tmp_path: Path, clock: FakeClock) -> None:
    """A copy beside the original is another outbox from its first opening on, and the original keeps its own (P4)."""
    stream = drain(outbox, tmp_path)
    seqs = store(outbox, clock, sized(1), sized(2))
    outbox.close()
    shutil.copy(tmp_path / "agent.db", tmp_path / "copy.db")
    copy = open_again(tmp_path / "copy.db")
    other = drain(copy, tmp_path, name="copy.db")
    assert other != stream
    assert drain(copy, tmp_path, name="copy.db") == other
    assert waiting(copy) == seqs
    copy.close()
    original = open_again(tmp_path / "agent.db")
    assert drain(original, tmp_path) == stream
    original.close()


def test_a_file_on_another_machine_takes_a_new_stream(outbox: sqlite3.Connection, tmp_path: Path) -> None:
    """A cloned disk has the same inodes; the machine's id tells it apart."""
    stream = drain(outbox, tmp_path, machine="one")
    other = drain(outbox, tmp_path, machine="two")
    assert other != stream
    assert drain(outbox, tmp_path, machine="two") == other


def test_a_machine_without_an_id_keeps_its_stream(outbox: sqlite3.Connection, tmp_path: Path) -> None:
    """Where the system offers no id, the file alone decides; an id that comes later is no other machine."""
    stream = drain(outbox, tmp_path, machine="")
    assert drain(outbox, tmp_path, machine="") == stream
    assert drain(outbox, tmp_path, machine="one") == stream


def test_a_file_that_was_never_drained_takes_the_place_it_is_found_in(tmp_path: Path, clock: FakeClock) -> None:
    """What producers wrote on one machine and was then moved keeps its stream: no server knows it yet."""
    connection = new_outbox(tmp_path, "made.db")
    store(connection, clock, sized(1))
    stream = column(connection, "SELECT stream FROM durablews_meta")[0]
    connection.close()
    shutil.copy(tmp_path / "made.db", tmp_path / "agent.db")
    connection = open_again(tmp_path / "agent.db")
    assert drain(connection, tmp_path) == stream
    connection.close()


def test_a_renewed_stream_is_a_new_one_and_durable(outbox: sqlite3.Connection, tmp_path: Path) -> None:
    """`renew_stream` gives a fresh 128-bit id that the next opening finds."""
    first = drain(outbox, tmp_path)
    with transaction(outbox):
        second = renew_stream(outbox)
    assert second != first
    assert drain(outbox, tmp_path) == second


def test_the_id_of_this_machine_stays_and_is_not_the_id_itself() -> None:
    """`machine_id` answers the same each time and does not show what machine-id(5) asks to keep."""
    assert machine_id() == machine_id()
    assert len(machine_id()) in (0, 32)
    for file in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        if file.exists():
            assert file.read_text().strip() not in machine_id() or machine_id() == ""


# -- the raise


@pytest.mark.parametrize(("drawn", "raise_"), [(0, 1), (LARGEST_RAISE - 1, LARGEST_RAISE), (12345, 12346)])
def test_each_opening_raises_the_sequence_by_one_to_two_to_the_32(
    outbox: sqlite3.Connection, tmp_path: Path, clock: FakeClock, drawn: int, raise_: int
) -> None:
    """The raise is drawn uniformly from 1 to 2^32, and the next message lies above it (P4)."""
    store(outbox, clock, sized(1))
    asked = []

    def draw(most: int) -> int:
        asked.append(most)
        return drawn

    drain(outbox, tmp_path, draw=draw)
    assert asked == [LARGEST_RAISE]
    assert last_sequence(outbox) == 1 + raise_
    assert store(outbox, clock, sized(1)) == [2 + raise_]


def test_an_outbox_that_never_had_a_message_is_raised_too(
    outbox: sqlite3.Connection, tmp_path: Path, clock: FakeClock
) -> None:
    """The first opening of an empty file already raises, and claims nothing given out."""
    drain(outbox, tmp_path)
    assert (claim(outbox), last_sequence(outbox)) == (0, 100)
    assert store(outbox, clock, sized(1)) == [101]


def test_hello_claims_no_raise_before_a_welcome(outbox: sqlite3.Connection, tmp_path: Path, clock: FakeClock) -> None:
    """Through several openings without a server, `last` stays what was really given out; a welcome makes it count."""
    (seq,) = store(outbox, clock, sized(1))
    for opening in range(1, 5):
        drain(outbox, tmp_path)
        assert claim(outbox) == seq
        assert last_sequence(outbox) == seq + 100 * opening
    with transaction(outbox):
        confirm_raise(outbox)
    assert claim(outbox) == seq + 400
    drain(outbox, tmp_path)
    assert claim(outbox) == seq + 400
    assert last_sequence(outbox) == seq + 500


def test_what_was_given_out_since_the_raise_counts_from_the_welcome_on(
    outbox: sqlite3.Connection, tmp_path: Path, clock: FakeClock
) -> None:
    """Until a welcome `last` stays below the first raise, through any number of openings; then it is all given out."""
    (seq,) = store(outbox, clock, sized(1))
    for opening in range(1, 4):
        drain(outbox, tmp_path)
        (given,) = store(outbox, clock, sized(1))
        assert given == seq + 101 * opening
        assert claim(outbox) == seq
    with transaction(outbox):
        confirm_raise(outbox)
    assert claim(outbox) == seq + 303
    (given,) = store(outbox, clock, sized(1))
    assert claim(outbox) == given
    drain(outbox, tmp_path)
    assert claim(outbox) == given


def test_a_restored_backup_shows_in_last_or_writes_above_everything(tmp_path: Path) -> None:
    """Whatever was given out after a backup, its restored file either claims less, or numbers new messages above it."""
    dice = random.Random(4)
    clock = FakeClock()
    for life in range(20):
        folder = tmp_path / str(life)
        folder.mkdir()
        connection = new_outbox(folder)
        drain(connection, folder, draw=dice.randrange)
        store(connection, clock, *(sized(1) for _ in range(dice.randrange(1, 5))))
        with transaction(connection):
            confirm_raise(connection)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        backup = (folder / "agent.db").read_bytes()
        given: list[int] = []
        for _ in range(dice.randrange(1, 3)):
            given += store(connection, clock, sized(1))
            if dice.random() < 0.5:
                drain(connection, folder, draw=dice.randrange)
        connection.close()
        (folder / "agent.db").write_bytes(backup)  # in place: the inode stays, nothing else tells
        connection = open_again(folder / "agent.db")
        new: list[int] = []
        for _ in range(dice.randrange(1, 4)):
            drain(connection, folder, draw=dice.randrange)
            assert claim(connection) < max(given), "the server says rewound"
            new += store(connection, clock, sized(1))
        assert not set(new) & set(given)
        assert min(new) > max(given) or claim(connection) < max(given)
        connection.close()


def test_the_largest_window_only_grows(outbox: sqlite3.Connection, tmp_path: Path) -> None:
    """The window that is marked after a crash is the largest that any process used."""
    for window, largest in ((4, 4), (100, 100), (1, 100), (101, 101)):
        drain(outbox, tmp_path, window=window)
        assert column(outbox, "SELECT largest_window FROM durablews_meta") == [largest]


def test_after_a_crash_the_old_window_counts_as_sent(
    outbox: sqlite3.Connection, tmp_path: Path, clock: FakeClock
) -> None:
    """A drainer that did not leave may have sent a window of each priority's first; one that left said so (P4)."""
    store(outbox, clock, *(sized(1) for _ in range(5)))
    drain(outbox, tmp_path, window=3)
    assert column(outbox, "SELECT ack_state FROM durablews_entries") == [0] * 5
    with transaction(outbox):
        leave(outbox)
    drain(outbox, tmp_path, window=3)
    assert column(outbox, "SELECT ack_state FROM durablews_entries") == [0] * 5
    drain(outbox, tmp_path, window=100)
    assert column(outbox, "SELECT ack_state FROM durablews_entries") == [1, 1, 1, 0, 0]


# -- the end of a stream


def test_above_two_to_the_52_a_new_stream_numbers_from_one(
    outbox: sqlite3.Connection, tmp_path: Path, clock: FakeClock
) -> None:
    """What waits keeps its order, ids and standing under numbers from 1; new messages lie above the usual raise."""
    stream = drain(outbox, tmp_path)
    early = store(outbox, clock, draft("gone", id="gone"))[0]
    old = store(outbox, clock, *(draft(number, id=f"id {number}", priority=number % 3) for number in range(6)))
    with transaction(outbox):
        settle(outbox, [run_of(outbox, 0, early, early)])
        identity._set_last_sequence(outbox, 2**52 - 200)
    late = store(outbox, clock, draft("late", id="late"))[0]
    assert late == 2**52 - 199
    payloads = column(outbox, "SELECT payload FROM durablews_entries ORDER BY seq")
    counts = totals(outbox)
    other = drain(outbox, tmp_path, draw=lambda most: 1000)
    assert other != stream
    assert column(outbox, "SELECT stream FROM durablews_meta") == [other]
    assert waiting(outbox) == list(range(1, 8))
    assert column(outbox, "SELECT payload FROM durablews_entries ORDER BY seq") == payloads
    assert totals(outbox) == counts
    assert (claim(outbox), last_sequence(outbox)) == (7, 7 + 1001)
    for number in range(6):
        assert store(outbox, clock, draft("again", id=f"id {number}")) == [number + 1]
    assert store(outbox, clock, draft("again", id="late")) == [7]
    assert store(outbox, clock, sized(1)) == [1009]
    assert len(old) == 6


def test_numbers_of_the_old_stream_mean_nothing_in_the_new_one(
    outbox: sqlite3.Connection, tmp_path: Path, clock: FakeClock
) -> None:
    """Ids and departures of what left before the renumbering are not taken for whoever has its number now."""
    (one, two) = store(outbox, clock, draft(1, id="left"), sized(1))
    (kept,) = store(outbox, clock, draft("kept", id="kept"))
    with transaction(outbox):
        settle(outbox, [run_of(outbox, 0, one, one)])
        outbox.execute("INSERT INTO durablews_departed (seq, reason, at) VALUES (1, 'expired', 0)")
        outbox.execute("UPDATE durablews_totals SET messages = messages - 1, bytes = bytes - 1")
        outbox.execute("DELETE FROM durablews_entries WHERE seq = ?", (two,))
        identity._set_last_sequence(outbox, 2**52)
    drain(outbox, tmp_path)
    assert waiting(outbox) == [1]
    assert store(outbox, clock, draft("kept", id="kept")) == [1]
    assert departed(outbox) == []
    (result,) = enqueue(outbox, clock, [draft(1, id="left")])
    assert result == [102]
    assert kept == 3


def test_a_stream_ends_only_when_it_must(outbox: sqlite3.Connection, tmp_path: Path, clock: FakeClock) -> None:
    """Up to 2^52 itself the stream goes on: integers of a frame stay below 2^53 with room to spare."""
    stream = drain(outbox, tmp_path)
    identity._set_last_sequence(outbox, 2**52 - 100)
    assert drain(outbox, tmp_path, draw=lambda most: 99) == stream
    assert last_sequence(outbox) == 2**52
    assert drain(outbox, tmp_path, draw=lambda most: 0) != stream
    assert last_sequence(outbox) == 1
