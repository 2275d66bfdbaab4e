"""Reads SQLite's write-ahead log past a damaged place. Pure: bytes in, places of pages out.

SQLite ends at the first frame whose checksum is wrong and ignores all that was committed after it, without an error.
But each frame's checksum continues the one that stands in the frame before it, so that every frame can be checked
against its predecessor: what follows a damaged frame is as good as it ever was. The format:
sqlite.org/fileformat2.html, section 4.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

__all__ = ["Log", "read_log"]

_HEADER = struct.Struct(">8I")  # magic, version, page size, checkpoint, two salts, two checksums
_FRAME = struct.Struct(">6I")  # page number, size of the database after a commit or 0, two salts, two checksums
_MAGIC, _VERSION = 0x377F0682, 3_007_000
#: SQLite's largest page, and the number above which no page of an outbox can be.
_LARGEST_PAGE, _MOST_PAGES = 65536, 2**31


class Log(NamedTuple):
    """What a log holds.

    Attributes:
        pages: page number -> offset of its newest committed image in the log.
        size: the pages of the database after the last commit; None when the log holds no commit.
        frames: how many frames belong to the log's transactions.
        broken: the frames, from 1 on, whose checksum is wrong.
        hidden: how many commits SQLite does not see, because they are at or behind a damaged place.
        doubtful: pages whose newest image is one that does not match its checksum.
    """

    pages: dict[int, int]
    size: int | None
    frames: int
    broken: list[int]
    hidden: int
    doubtful: set[int]


class _Frame(NamedTuple):
    number: int
    page: int
    size: int  # not 0: the transaction ends here
    image: int  # offset
    good: bool


def read_log(read: Callable[[int, int], bytes], length: int, page_size: int) -> Log:
    """Read a log with everything that was committed in it, damaged places passed over.

    A damaged frame counts with the image that it has, unless a later one replaces it: most of it is good, and a
    message that is not matches its checksum no more. What was never committed is left out.

    Args:
        read: returns the bytes of the log at an offset, as many as are asked for.
        length: the size of the log in bytes.
        page_size: that of the database, for a log whose header is damaged.
    """
    pages: dict[int, int] = {}
    doubtful: set[int] = set()
    size: int | None = None
    broken: list[int] = []
    hidden = last = 0
    headless = length >= _HEADER.size and not _header(read)[0]
    pending: list[_Frame] = []
    for frame in _frames(read, length, page_size):
        pending.append(frame)
        if not frame.size:
            continue
        broken += [one.number for one in pending if not one.good]
        hidden += bool(broken) or headless
        for one in pending:
            if not one.page:
                continue
            pages[one.page] = one.image
            (doubtful.discard if one.good else doubtful.add)(one.page)
        size, last, pending = frame.size, frame.number, []
    return Log(pages, size, last, broken, hidden, doubtful)


def _frames(read: Callable[[int, int], bytes], length: int, page_size: int) -> Iterator[_Frame]:
    """Yield the frames of this log's generation; those that it has overwritten only in part are of another."""
    if length < _HEADER.size + _FRAME.size:
        return
    intact, big, declared, kept = _header(read)
    sums = (kept[2], kept[3])
    if intact:
        page_size = declared
    step = _FRAME.size + page_size
    count = (length - _HEADER.size) // step
    heads = [_FRAME.unpack(read(_HEADER.size + n * step, _FRAME.size)) for n in range(count)]
    salts = (kept[0], kept[1]) if intact else _salts(heads)
    ours = [n for n, head in enumerate(heads) if head[2:4] == salts]
    if not ours:
        return
    if not intact:
        big = _is_big_endian(read, heads, step)
    for n in range(ours[-1] + 1):
        start = _HEADER.size + n * step
        page, size, *salt, first, second = heads[n]
        data = read(start + _FRAME.size, page_size)
        good = tuple(salt) == salts
        if n or intact:  # the first continues the header's
            good = good and _checksum(data, _checksum(read(start, 8), sums, big), big) == (first, second)
        sums = (first, second)
        if not 0 < page < _MOST_PAGES:  # damaged where it says which page it is
            yield _Frame(n + 1, 0, size, start + _FRAME.size, False)
        else:
            yield _Frame(n + 1, page, size, start + _FRAME.size, good)


def _header(read: Callable[[int, int], bytes]) -> tuple[bool, bool, int, list[int]]:
    """Return whether the header is whole, whether checksums are big-endian, the page size, salts and checksums."""
    header = read(0, _HEADER.size)
    magic, version, page_size, _, *kept = _HEADER.unpack(header)
    big = magic == _MAGIC + 1
    known = magic in (_MAGIC, _MAGIC + 1) and version == _VERSION
    return known and _checksum(header[:24], (0, 0), big) == (kept[2], kept[3]), big, page_size, kept


def _salts(heads: list[tuple[int, ...]]) -> tuple[int, int]:
    """Return the salts of the newest generation, which begins at the first frame, by the majority of the first few."""
    found = Counter(head[2:4] for head in heads[:5])
    salts = found.most_common(1)[0][0]
    return salts[0], salts[1]


def _is_big_endian(read: Callable[[int, int], bytes], heads: list[tuple[int, ...]], step: int) -> bool:
    """Tell the byte order of the checksums from the first frames, for a log whose header is damaged."""
    for n in range(1, min(len(heads), 6)):
        start = _HEADER.size + n * step
        head, data = read(start, 8), read(start + _FRAME.size, step - _FRAME.size)
        before = (heads[n - 1][4], heads[n - 1][5])
        for big in (False, True):
            if _checksum(data, _checksum(head, before, big), big) == heads[n][4:6]:
                return big
    return False


def _checksum(data: bytes, sums: tuple[int, int], big: bool) -> tuple[int, int]:
    first, second = sums
    words = struct.unpack(f"{'>' if big else '<'}{len(data) // 4}I", data)
    for one, other in zip(words[::2], words[1::2], strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second
