"""Build durablews as it is released and use the wheel the way a stranger would: installed, from another folder.

A checkout works with files that a wheel lacks (the migrations live beside the package there), so nothing here may find
the checkout: no editable install, no PYTHONPATH, no working directory in it. Everything is written below the scratch
folder that is the only argument.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Printed by the installed package, so that it is asked about itself.
ASK = """
import json
from importlib.metadata import metadata, requires
from pathlib import Path
import durablews
print(json.dumps({
    "folder": str(Path(durablews.__file__).parent),
    "version": durablews.__version__,
    "metadata": metadata("durablews")["Version"],
    "requires": [line for line in requires("durablews") if "extra ==" not in line],
}))
"""


class Failed(Exception):
    """What was promised about the wheel and is not so."""


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: check_wheel.py SCRATCH_FOLDER", file=sys.stderr)
        return 2
    scratch = Path(argv[0]).resolve()
    try:
        wheel = _build(scratch / "dist")
        _look_inside(wheel)
        _use(wheel, scratch)
    except Failed as failure:
        print(f"check_wheel: {failure}", file=sys.stderr)
        return 1
    return 0


def _build(dist: Path) -> Path:
    """Build the sdist from the checkout and the wheel from that sdist, so that both are proven."""
    _run([sys.executable, "-m", "build", "--outdir", str(dist), str(ROOT)], cwd=ROOT)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "tools/test", "tests/test_packaging.py"]
    _expect(not (missing := set(wanted) - packed), f"the sdist lacks {sorted(missing)}")
    print(f"built {sdist.name} and {wheel.name}")
    return wheel


def _look_inside(wheel: Path) -> None:
    """The wheel holds the package, every migration and the licence, and nothing that is not durablews."""
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    tops = {name.partition("/")[0] for name in packed}
    strangers = {top for top in tops if top != "durablews" and not top.endswith(".dist-info")}
    _expect(not strangers, f"the wheel would install {sorted(strangers)} beside the package")
    migrations = {path.name for path in (ROOT / "migrations").iterdir() if path.suffix == ".sql"}
    installed = {Path(name).name for name in packed if name.startswith("durablews/_migrations/")}
    _expect(installed == migrations, f"the wheel's migrations are {sorted(installed)}, not {sorted(migrations)}")
    _expect("durablews/py.typed" in packed, "the wheel lacks py.typed")
    _expect(any(name.endswith("/licenses/LICENSE") for name in packed), "the wheel lacks the licence")


def _use(wheel: Path, scratch: Path) -> None:
    """Install the wheel alone and let it make, fill and read an outbox."""
    home = scratch / "venv"
    venv.create(home, with_pip=True)
    folder = home / ("Scripts" if os.name == "nt" else "bin")
    python, command = str(folder / "python"), str(folder / "durablews")
    _run([python, "-m", "pip", "install", "--quiet", str(wheel)], cwd=scratch)

    elsewhere = scratch / "elsewhere"
    elsewhere.mkdir()
    facts = json.loads(_run([python, "-c", ASK], cwd=elsewhere))
    _expect(Path(facts["folder"]).is_relative_to(home), f"imported {facts['folder']}, which is not the wheel's")
    _expect(facts["version"] == facts["metadata"], f"{facts['version']} says it is {facts['metadata']}")
    names = sorted(line.split(">")[0].strip() for line in facts["requires"])
    _expect(names == ["aiosqlite", "msgspec", "websockets"], f"the wheel requires {facts['requires']}")

    said = _run([command, "--version"], cwd=elsewhere)
    _expect(facts["version"] in said.split(), f"durablews --version says {said!r}")
    _expect(_run([python, "-m", "durablews", "--version"], cwd=elsewhere) == said, "python -m durablews differs")
    _run([command, "send", "x.db", '{"a":1}'], cwd=elsewhere)
    snapshot = json.loads(_run([command, "inspect", "x.db", "--json"], cwd=elsewhere))
    _expect(snapshot["pending"] == 1, f"one message was sent and {snapshot['pending']} are pending")
    profiles = _run([command, "check", "--list-profiles"], cwd=elsewhere)  # from a data file
    _expect("aws-alb" in profiles, f"durablews check knows no aws-alb, but {profiles!r}")
    print(f"durablews {facts['version']} works from its wheel")


def _run(command: list[str], *, cwd: Path) -> str:
    """Run a command out of reach of the caller's Python settings; return what it printed, or fail with all of it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip()
        raise Failed(f"exit code {done.returncode} from {' '.join(command)}\n{said}")
    return done.stdout


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
