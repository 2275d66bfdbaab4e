"""Power loss, replayed: every moment of recorded lives, with all that a disk may keep of what was not synced.

A life runs under a recorder of what it does to its files (`powerloss_recorder.c`), on the disk as the power loss of the
life before left it. ``DURABLEWS_TEST_SEED`` repeats a run but for the timing; ``DURABLEWS_TEST_LIVES`` makes it longer.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
from powerloss import Recording, compile_recorder, judge_together, moments, record
from powerloss_disk import MODES, restore
from powerloss_life import AGENT, BROKEN, FAST, SERVER, TAGS, is_refused, payload_of, serving, tag_of
from powerloss_promises import Ledger

import durablews

SEED = os.environ.get("DURABLEWS_TEST_SEED") or str(random.randrange(2**32))
LIVES = int(os.environ.get("DURABLEWS_TEST_LIVES", "2"))
LOG = f"{AGENT}-wal"
#: So many of the images are drained by the library, to the server as it was at that moment.
DRAINED = 40


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: nothing here depends on what a real disk keeps."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def recorder(scratch: Path) -> Path:
    """The compiled recorder; skipped where there is none to be had, except in CI, which must have one."""
    ci = os.environ.get("CI") == "true"
    if shutil.which("cc") is None and ci and shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "-y", "gcc", "libc6-dev"], check=True, capture_output=True)
    if not sys.platform.startswith("linux") or shutil.which("cc") is None:
        (pytest.fail if ci else pytest.skip)("recording what is written needs Linux and a C compiler (apt install gcc)")
    return compile_recorder(scratch)


@pytest.fixture(scope="module")
def lives(recorder: Path, scratch: Path) -> list[Recording]:
    """Lives of one agent, each cut off at some moment of its later half and followed by the next."""
    print(f"seed {SEED}")  # noqa: T201 - pytest -rP shows it
    chance, home, made, ledger = random.Random(SEED), scratch / "lives", list[Recording](), Ledger()
    home.mkdir()
    for number in range(LIVES):
        life = record(recorder, home, number=number, seed=f"{SEED}-{number}", ledger=ledger)
        made.append(life)
        count = sum(1 for _ in moments(life))
        cut = next(islice(moments(life), chance.randrange(count // 2, count), None))
        restore(cut.disk.image(cut.kept), home)
        ledger = cut.ledger.copy()
    return made


def test_no_loss_of_power_breaks_a_promise(lives: list[Recording], scratch: Path) -> None:
    """P1, P2, P4: whatever a disk kept, the outbox is whole, has what was stored, and nothing that had left."""
    verdict = judge_together(lives, scratch / "images")
    print(f"{verdict.images.total()} images {dict(verdict.images)}, seed {SEED}")  # noqa: T201
    assert not verdict.broken, (SEED, verdict.broken, verdict.examples)
    assert verdict.images.total() >= 2500 * LIVES
    assert set(verdict.images) == set(MODES)


def test_the_lives_hold_what_can_go_wrong(lives: list[Recording]) -> None:
    """Or nothing was proven: creation, checkpoints, logs begun anew, a file that shrinks, refusals, acks, repeats."""
    did = Counter[str]()
    for life in lives:
        files: dict[str, int] = {}
        sizes = Counter[int]()
        for kind, file, number, data in life.records():
            name, _, other = data.decode().partition("\0") if kind in "OCLU" else ("", "", "")
            if kind in "OC":
                files[name] = file
            elif kind == "L":
                files[other] = files[name]
                did["created"] += other == AGENT
            elif kind == "U":
                did["log removed"] += name == LOG
            elif kind == "S":
                did["folder synced"] += file == 0
            elif kind == "W":
                did["checkpoint"] += file == files.get(AGENT)
                did["log begun anew"] += file == files.get(LOG) and number == 0 and sizes[file] > 0
                sizes[file] = max(sizes[file], number + len(data))
            elif kind == "T":
                did["shrunk"] += file == files.get(AGENT) and number < sizes[file]
        last = list(moments(life))[-1].ledger
        did.update({name: len(getattr(last, name)) for name in ("sent", "seen", "acked", "refused")})
    print(dict(did))  # noqa: T201
    steps = {"created", "folder synced", "checkpoint", "log begun anew", "log removed", "shrunk"}
    assert steps | {"sent", "seen", "acked", "refused"} == {name for name, times in did.items() if times}


async def drained(home: Path, new: Sequence[int]) -> list[tuple[int, int, int]]:
    """Let the library open the outbox, send something more and deliver everything; return what the server then has."""
    async with (
        serving(home / SERVER, lambda *facts: None) as url,
        durablews.connect(url, home / AGENT, reconnect=FAST, proxy=None) as ws,
    ):
        for tag in new:
            await ws.send(payload_of(tag), priority=tag % 3 - 1)
        assert await ws.flush(60)
    with closing(sqlite3.connect(home / SERVER)) as connection:
        return list(connection.execute("SELECT priority, seq, tag FROM kept ORDER BY id"))


def dead_letters(home: Path) -> list[int]:
    """Return the tags of the dead letters."""
    with closing(sqlite3.connect(home / AGENT)) as connection:
        return [tag_of(payload) for (payload,) in connection.execute("SELECT payload FROM durablews_outbox")]


async def test_after_a_loss_of_power_the_outbox_goes_on(lives: list[Recording], scratch: Path) -> None:
    """P3, P4, P5: opened by the library it delivers once, and in order, what was stored and what is new."""
    for image, ledger, where in sample(lives, DRAINED):
        restore(image, scratch / "lives")
        tags = await delivered(scratch / "lives", ledger, where)
        assert {tag for tag in ledger.sent if not is_refused(tag)} <= tags, where
        dead = dead_letters(scratch / "lives")
        assert len(dead) == len(set(dead)), where
        assert {tag for tag in ledger.sent if is_refused(tag)} <= set(dead) <= ledger.begun, where


async def delivered(home: Path, ledger: Ledger, where: str) -> set[int]:
    """Let the library go on with an image; return what the server then has, all of which it must have once, in order.

    A sequence that had been given to something else would make the server take a new message for a repeat.
    """
    new = [9 * TAGS + 100 + offset for offset in range(12) if not is_refused(9 * TAGS + 100 + offset)]
    kept = await drained(home, new)
    tags = Counter(tag for _, _, tag in kept)
    assert max(tags.values()) == 1, (where, tags.most_common(3))
    assert set(new) <= set(tags) <= ledger.begun | set(new), where
    for priority in {row[0] for row in kept}:
        order = [seq for at, seq, _ in kept if at == priority]
        assert order == sorted(order), where
    return set(tags)


def sample(lives: Sequence[Recording], count: int) -> list[tuple[dict[str, bytes], Ledger, str]]:
    """Choose images, of each life also the one that lost most: what is there, what was promised, where it stands."""
    chance, chosen = random.Random(f"{SEED} sample"), list[tuple[dict[str, bytes], Ledger, str]]()
    for life in lives:
        lost = [len(moment.disk.pending) if moment.mode == "nothing" else 0 for moment in moments(life)]
        wanted = {*chance.sample(range(len(lost)), count // len(lives)), lost.index(max(lost))}
        for number, moment in enumerate(moments(life)):
            if number in wanted:
                where = f"seed {life.seed}, call {moment.number}, {moment.mode}"
                chosen.append((moment.disk.image(moment.kept), moment.ledger.copy(), where))
    # The file keeps its inode from image to image: by that an outbox knows that it is no copy. So those without one
    # come last.
    return sorted(chosen, key=lambda one: AGENT not in one[0])


async def test_process_durability_loses_to_a_power_loss_only_what_it_may(recorder: Path, scratch: Path) -> None:
    """P1, P4: it is found to lose, and to bring back what had left; never to be damaged, nor to use a number again."""
    home = scratch / "process"
    home.mkdir()
    life = record(recorder, home, number=0, seed=f"{SEED}-process", durability="process")
    verdict = judge_together([life], scratch / "process-images", calls=range(0, 2**31, 3))
    # Whether a deletion is among what was lost is the moment's to say.
    assert "lost" in verdict.broken, (SEED, verdict.broken)
    assert set(verdict.broken) <= {"lost", "resurrected"}, (SEED, verdict.broken, verdict.examples)
    lost = set[int]()
    for image, ledger, where in sample([life], DRAINED // 2):
        restore(image, home)
        tags = await delivered(home, ledger, where)
        assert ledger.seen <= tags | set(dead_letters(home)), where
        lost |= {tag for tag in ledger.sent if not is_refused(tag)} - tags
    assert lost, SEED


# Every eleventh moment shows what is broken all the time; a folder that is not synced forgets at the beginning only.
NOW_AND_THEN, AT_FIRST = range(0, 2**31, 11), range(150)


@pytest.mark.parametrize(
    ("broken", "durability", "calls", "promises"),
    [
        ("answer_early", "power", NOW_AND_THEN, {"lost"}),
        ("forget_the_folder", "power", AT_FIRST, {"lost"}),
        ("sync_nothing", "power", NOW_AND_THEN, {"lost", "resurrected", "corrupt"}),
        ("send_what_is_not_synced", "process", NOW_AND_THEN, {"reused"}),
    ],
)
def test_a_broken_build_is_found(
    recorder: Path, scratch: Path, broken: str, durability: str, calls: range, promises: set[str]
) -> None:
    """The harness proves itself: what is broken on purpose in the library breaks the promises that it must."""
    home = scratch / broken
    home.mkdir()
    seed = f"{SEED}-{broken}"
    life = record(recorder, home, number=0, seed=seed, durability=durability, broken=broken)
    verdict = judge_together([life], scratch / f"{broken}-images", calls)
    assert promises <= set(verdict.broken), (SEED, verdict.broken)


def test_every_broken_build_is_used() -> None:
    """A broken build that no test asks for would prove nothing."""
    (cases,) = (mark.args[1] for mark in test_a_broken_build_is_found.pytestmark)  # type: ignore[attr-defined]
    assert {broken for broken, *_ in cases} == set(BROKEN)
