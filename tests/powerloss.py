"""Power loss, replayed: records lives of an agent, and looks at every image that a loss of power may leave of them."""

from __future__ import annotations

import os
import pickle
import random
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from powerloss_disk import MODES, Change, Disk, Record, restore
from powerloss_life import AGENT
from powerloss_promises import Ledger, broken_promises
from servers import ENVIRONMENT

__all__ = ["Moment", "Recording", "Verdict", "compile_recorder", "judge", "judge_together", "moments", "record"]

_HEAD = struct.Struct("<IIqq")


@dataclass(frozen=True)
class Recording:
    """One life: what lay in its folder before, what had been promised by then, and what it did."""

    home: Path
    log: Path
    seed: str
    before: dict[str, bytes]
    ledger: Ledger

    def records(self) -> Iterator[Record]:
        data, offset = self.log.read_bytes(), 0
        while offset < len(data):
            kind, length, file, number = _HEAD.unpack_from(data, offset)
            offset += _HEAD.size
            yield Record(chr(kind), file, number, data[offset : offset + length])
            offset += length


def compile_recorder(folder: Path) -> Path:
    """Build the recorder.

    Raises:
        FileNotFoundError: there is no C compiler (apt install gcc).
    """
    library = folder / "powerloss_recorder.so"
    source = Path(__file__).with_name("powerloss_recorder.c")
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run(["cc", *flags, "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


def contents(home: Path) -> dict[str, bytes]:
    """Return what lies in a folder, but for the shared memory, which no file system has to keep."""
    return {path.name: path.read_bytes() for path in home.iterdir() if not path.name.endswith(("-shm", "-reserve"))}


def record(
    recorder: Path,
    home: Path,
    *,
    number: int,
    seed: str,
    durability: str = "power",
    broken: str = "",
    ledger: Ledger | None = None,
) -> Recording:
    """Let an agent live once in `home`, on what lies there; `broken` is one of `powerloss_life.BROKEN`."""
    log = home.with_name(f"{home.name}-{number}.log")
    made = Recording(home, log, seed, contents(home), ledger or Ledger())
    script = str(Path(__file__).with_name("powerloss_life.py"))
    environment = {"LD_PRELOAD": str(recorder), "POWERLOSS_FOLDER": str(home), "POWERLOSS_LOG": str(log)}
    done = subprocess.run(
        [sys.executable, script, str(home), str(number), seed, durability, broken],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, ""), f"seed {seed}: the recorded life ended badly: {done.stderr}"
    disk = Disk(made.before)
    for step in made.records():
        disk.step(step)
    assert disk.image(disk.pending) == contents(home), f"seed {seed}: something was written and not recorded"
    return made


# -- the replay


class Moment(NamedTuple):
    """A loss of power before call `number` of the log: what survives, and what had been promised.

    Disk and ledger go on with the replay: use them before the next moment, or copy them.
    """

    number: int
    mode: str
    disk: Disk
    ledger: Ledger
    kept: Sequence[Change]


#: Every call of any log.
ALL = range(2**31)


def moments(recording: Recording, share: int = 0, shares: int = 1, calls: range = ALL) -> Iterator[Moment]:
    """Yield every moment of a life in every mode; of several `shares` only one, and only before these `calls`."""
    disk, ledger = Disk(recording.before), recording.ledger.copy()
    for number, step in enumerate([*recording.records(), None]):
        if step is not None and disk.lasts(step):
            disk.step(step)
            if disk.is_mark(step):
                ledger.note(step.data)
            continue
        if number in calls and number % shares == share:
            chance = random.Random(f"{recording.seed} {number}")
            for mode in MODES:
                if _is_new(mode, disk.pending, step):
                    yield Moment(number, mode, disk, ledger, disk.keep(mode, chance))
        if step is not None:
            disk.step(step)


def _is_new(mode: str, pending: Sequence[Change], step: Record | None) -> bool:
    """Whether a mode gives an image that no other has, and no later one at which more was promised."""
    if mode == "everything":
        return step is None or step.kind != "S"
    if mode == "nothing":
        return bool(pending) and (step is None or step.kind == "S")
    return len(pending) > (mode == "prefix")


@dataclass
class Verdict:
    """What became of the promises. `images` counts those that differ, by mode; `broken` the faults, by promise."""

    images: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, other: Verdict) -> None:
        """Count another one in."""
        self.images.update(other.images)
        self.broken.update(other.broken)
        self.examples += other.examples


def judge(recording: Recording, scratch: Path, share: int, shares: int, calls: range) -> Verdict:
    """Look at the images of a life, one `share` of them."""
    verdict, known = Verdict(), set[tuple[int, int]]()
    path = scratch / AGENT
    for moment in moments(recording, share, shares, calls):
        image = {name: data for name, data in moment.disk.image(moment.kept).items() if name.startswith(AGENT)}
        key = hash(frozenset(image.items())), moment.ledger.notes
        if key in known:
            continue
        known.add(key)
        verdict.images[moment.mode] += 1
        restore(image, scratch)
        for promise, what in broken_promises(path, moment.ledger):
            verdict.broken[promise] += 1
            if verdict.broken[promise] <= 3:
                verdict.examples.append(f"{promise}: {what} (seed {recording.seed}, {moment.number}, {moment.mode})")
    return verdict


def judge_together(recordings: Sequence[Recording], scratch: Path, calls: range = ALL) -> Verdict:
    """Look at the images of several lives, in as many processes as there are processors."""
    shares = os.cpu_count() or 1
    workers = []
    for share in range(shares):
        folder = scratch / f"worker{share}"
        folder.mkdir(parents=True)
        work = pickle.dumps((list(recordings), folder, share, shares, calls))
        worker = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
        )
        assert worker.stdin is not None
        worker.stdin.write(work)
        worker.stdin.close()
        workers.append(worker)
    verdict = Verdict()
    for worker in workers:
        assert worker.stdout is not None
        with worker.stdout as said:
            part: Verdict = pickle.load(said)
        assert worker.wait() == 0
        verdict.add(part)
    return verdict


def main() -> None:
    # Pickled by name: the module that was run and the one that the test imported must be the same.
    import powerloss

    recordings, scratch, share, shares, calls = pickle.load(sys.stdin.buffer)
    verdict = powerloss.Verdict()
    for recording in recordings:
        verdict.add(powerloss.judge(recording, scratch, share, shares, calls))
    sys.stdout.buffer.write(pickle.dumps(verdict))


if __name__ == "__main__":
    main()
