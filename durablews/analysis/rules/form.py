"""DWS0xx: whether the configuration can be used at all."""

from __future__ import annotations

from collections.abc import Iterator

from durablews.addresses import url_fault
from durablews.analysis.findings import Problem, Rule
from durablews.analysis.subject import Subject

__all__ = ["RULES", "UNUSABLE"]

# Types of file systems, as proc(5) names them.
_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_NETWORK = frozenset({"9p", "afs", "ceph", "cifs", "fuse.sshfs", "glusterfs", "nfs", "nfs4", "smb3", "smbfs"})
_MEMORY_FOLDERS = ("/dev/shm", "/run", "/var/run", "/tmp")


def _nothing(subject: Subject) -> Iterator[Problem]:
    """Find nothing: `judging` reports what no other rule has spoken of."""
    return iter(())


def _place_of_outbox(subject: Subject) -> Iterator[Problem]:
    path = subject.settings.outbox
    if path is None:
        return
    kind = subject.surroundings.file_system(path)
    folder = next((each for each in _MEMORY_FOLDERS if path.startswith(each + "/")), None)
    if not path or subject.surroundings.is_folder(path):
        yield Problem(("outbox",), "outbox must name a file, not a folder")
    elif folder is not None or kind in _MEMORY:
        where = folder or f"a file system of type {kind} (on this machine)"
        yield Problem(
            ("outbox",), f"outbox {path} is on {where}, which is empty after a power cut; use a folder such as /var/lib"
        )
    elif kind in _NETWORK:
        what = f"outbox {path} is on a network file system (on this machine: {kind}), where a write-ahead log fails"
        yield Problem(("outbox",), f"{what}; use a disk of this machine")
    elif subject.surroundings.writable_folder(path) is False:
        what = f"on this machine, this user may not write to the folder of outbox {path}"
        yield Problem(("outbox",), f"{what}; who runs the agent must", "warning")


def _url(subject: Subject) -> Iterator[Problem]:
    url = subject.settings.url
    if url is None:
        if ("url",) not in subject.rejected:
            yield Problem(("url",), "url is missing: where are the messages to go? give ws:// or wss:// and a host")
        return
    fault = url_fault(url)
    if fault is not None:
        yield Problem(("url",), f"{subject.name('url')} {fault}")


def _outbox(subject: Subject) -> Iterator[Problem]:
    if subject.settings.outbox is None and ("outbox",) not in subject.rejected:
        yield Problem(("outbox",), "outbox is missing: name it with `durablews run --outbox FILE`, or here")


UNUSABLE = Rule(
    code="DWS001",
    severity="error",
    title="not a setting, or a value that cannot be used",
    why="A name that is not known is nearly always a slip of the pen for one that is, and the setting that was meant"
    " keeps its default in silence. durablews therefore refuses to start with one, and so does this check.",
    source="The settings of durablews, with their types and ranges.",
    judge=_nothing,
)

RULES = (
    UNUSABLE,
    Rule(
        code="DWS002",
        severity="error",
        title="the outbox is where it cannot last",
        why="A file in memory is gone after the power cut that the outbox is there for. SQLite's write-ahead log needs"
        " memory that all processes share, which a network file system does not have. And a folder that cannot be"
        " written to holds no outbox.",
        source="sqlite.org/wal.html (all processes on the same host; not over a network file system); file systems by"
        " /proc/self/mounts of the machine that checks, and by the usual names of folders in memory.",
        judge=_place_of_outbox,
    ),
    Rule(
        code="DWS003",
        severity="error",
        title="there is no usable url",
        why="Without one nothing is ever sent, and the outbox fills up.",
        source="RFC 6455 section 3: a WebSocket has a ws or wss URI with a host.",
        judge=_url,
    ),
    Rule(
        code="DWS004",
        severity="info",
        title="the outbox is not named",
        why="A configuration without it can be shared by several agents, each of which is told its outbox otherwise.",
        source="`durablews run` takes it as a flag, or as DURABLEWS_OUTBOX.",
        judge=_outbox,
    ),
)
