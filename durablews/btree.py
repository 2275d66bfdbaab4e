"""Reads the tables of a damaged SQLite file page by page, without SQLite. Pure: pages in, records out.

SQLite gives up at the first page of a tree that makes no sense, and what is below it cannot be reached. Here a page
that makes no sense is passed over, and pages that nothing leads to any more are found by what they are. The format:
sqlite.org/fileformat2.html, section 1.6.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

__all__ = ["Cell", "Damaged", "Text", "Tree", "decode_record", "numbered", "page_kinds", "table_cells"]

INTERIOR_INDEX, INTERIOR_TABLE, LEAF_INDEX, LEAF_TABLE = 0x02, 0x05, 0x0A, 0x0D
_KINDS = (INTERIOR_INDEX, INTERIOR_TABLE, LEAF_INDEX, LEAF_TABLE)
#: The depth of a tree of 2^32 pages is far below this.
_DEEPEST = 40
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
#: Above this an outbox takes a new stream and numbers from 1 (PROTOCOL.md section 5).
_LAST_SEQUENCE = 2**52

Pages = Callable[[int], bytes]


class Damaged(Exception):
    """A page, a cell or a record makes no sense."""


class Text(bytes):
    """A value of type TEXT, which may be no UTF-8."""


class Cell(NamedTuple):
    """An entry of a table's leaf: its rowid, and its record or None when that cannot be read."""

    rowid: int
    record: list[Any] | None


class Tree:
    """A walk through one tree.

    Attributes:
        leaves: the leaves of a table in their order.
        damaged: the pages that could not be read, and those that were led to from two places.
        seen: every page of the walk.
    """

    def __init__(self, pages: Pages, root: int, *, index: bool = False) -> None:
        self._pages = pages
        self._interior, self._leaf = (INTERIOR_INDEX, LEAF_INDEX) if index else (INTERIOR_TABLE, LEAF_TABLE)
        self._root = root
        self.leaves: list[int] = []
        self.damaged: list[int] = []
        self.seen: set[int] = set()

    def walk(self) -> Iterator[list[Any]]:
        """Go through the tree; of an index yield the records in their order, of a table none."""
        yield from self._visit(self._root, 0)

    def _visit(self, number: int, depth: int) -> Iterator[list[Any]]:
        if number in self.seen or depth > _DEEPEST:
            self.damaged.append(number)
            return
        self.seen.add(number)
        try:
            page = self._pages(number)
            kind, starts, right = _layout(page, number)
            if kind not in (self._interior, self._leaf):
                raise Damaged
        except Damaged:
            self.damaged.append(number)
            return
        if kind == LEAF_TABLE:
            self.leaves.append(number)
            return
        for start in starts:
            try:
                if kind == self._interior:
                    yield from self._visit(_u32(page, start), depth + 1)
                    start += 4
                record = None if kind == INTERIOR_TABLE else _index_record(self._pages, page, start)
            except Damaged:
                self.damaged.append(number)
                continue
            if record is not None:
                yield record
        if right:
            yield from self._visit(right, depth + 1)


def table_cells(pages: Pages, number: int) -> list[Cell]:
    """Return the entries of a table's leaf, those that cannot be read among them.

    A page whose own header is damaged is read as if it were such a leaf: what is none has no records that are whole.

    Raises:
        Damaged: there is no such page.
    """
    page = pages(number)
    try:
        kind, starts, _ = _layout(page, number)
        if kind != LEAF_TABLE:
            raise Damaged
    except Damaged:
        at = 100 if number == 1 else 0
        count, content = struct.unpack(">2H", page[at + 3 : at + 7])
        first = at + 8
        count = max(0, min(count, (min(content, len(page)) - first) // 2))
        starts = [start for start in struct.unpack(f">{count}H", page[first : first + 2 * count]) if start > first]
    cells: list[Cell] = []
    for start in dict.fromkeys(starts):  # one whose place is damaged may point at another's
        rowid = -1
        try:
            length, at = _varint(page, start)
            rowid, at = _varint(page, at)
            if rowid >= 2**63:
                rowid -= 2**64
            cells.append(Cell(rowid, decode_record(_payload(pages, page, at, length, len(page) - 35))))
        except Damaged:
            cells.append(Cell(rowid, None))
    return cells


def page_kinds(pages: Pages, count: int, page_size: int) -> Iterator[tuple[int, int]]:
    """Yield number and kind of each page, as the pointer map of an auto_vacuum file has it; 0: the map is damaged.

    The kinds: 1 root, 2 free, 3 and 4 overflow, 5 another page of a tree.
    """
    at, size = 2, page_size // 5
    while at <= count:
        try:
            page = pages(at)
        except Damaged:
            page = b""
        last = min(at + size, count)
        kinds = page[: 5 * (last - at) : 5]
        if 8 * sum(not 1 <= kind <= 5 for kind in kinds) > len(kinds):
            kinds = b""  # the map itself is noise
        for number in range(at + 1, last + 1):
            yield number, kinds[number - at - 1] if kinds else 0
        at += size + 1


def numbered(found: list[int]) -> list[int]:
    """Return rowids in the order in which they stand, with those put right that cannot be.

    They must increase. Of what is kept there is room between any two for all that stands between them: the longest
    non-decreasing run of (rowid - position). What is not kept gets the numbers after its predecessor's.
    """
    in_range = not found or (found[0] >= 1 and found[-1] <= _LAST_SEQUENCE)
    if in_range and all(one < other for one, other in pairwise(found)):
        return found
    kept = _longest_run([rowid - position for position, rowid in enumerate(found)])
    numbers: list[int] = []
    for position, rowid in enumerate(found):
        numbers.append(rowid if position in kept else (numbers[-1] if numbers else 0) + 1)
    return numbers


def _longest_run(values: list[int]) -> set[int]:
    """Return the positions of a longest non-decreasing subsequence of what is in range."""
    tails: list[int] = []  # values
    ends: list[int] = []  # positions
    before: list[int] = [-1] * len(values)
    for position, value in enumerate(values):
        if not 1 <= value <= _LAST_SEQUENCE:
            continue
        place = bisect_right(tails, value)
        before[position] = ends[place - 1] if place else -1
        if place == len(tails):
            tails.append(value)
            ends.append(position)
        else:
            tails[place], ends[place] = value, position
    kept: set[int] = set()
    position = ends[-1] if ends else -1
    while position >= 0:
        kept.add(position)
        position = before[position]
    return kept


def decode_record(payload: bytes) -> list[Any]:
    """Return the values of a record. TEXT comes as `Text`.

    Raises:
        Damaged: its header does not describe it to the byte.
    """
    head, at = _varint(payload, 0)
    if not at <= head <= len(payload):
        raise Damaged
    kinds: list[int] = []
    while at < head:
        kind, at = _varint(payload, at)
        kinds.append(kind)
    if at != head:
        raise Damaged
    values: list[Any] = []
    for kind in kinds:
        size = _size(kind)
        data = payload[at : at + size]
        if len(data) != size:
            raise Damaged
        values.append(_value(kind, data))
        at += size
    if at != len(payload):
        raise Damaged
    return values


def _size(kind: int) -> int:
    if kind in (0, 8, 9):
        return 0
    if kind in _INTEGERS:
        return _INTEGERS[kind]
    if kind == 7:
        return 8
    if kind < 12:
        raise Damaged
    return (kind - 12) // 2


def _value(kind: int, data: bytes) -> Any:
    if kind == 0:
        return None
    if kind in (8, 9):
        return kind - 8
    if kind in _INTEGERS:
        return int.from_bytes(data, "big", signed=True)
    if kind == 7:
        return struct.unpack(">d", data)[0]
    return Text(data) if kind % 2 else data


def _layout(page: bytes, number: int) -> tuple[int, list[int], int]:
    """Return the kind of a page of a tree, where its cells start, and its right-most child or 0."""
    at = 100 if number == 1 else 0
    kind = page[at]
    if kind not in _KINDS:
        raise Damaged
    count = int.from_bytes(page[at + 3 : at + 5], "big")
    interior = kind in (INTERIOR_INDEX, INTERIOR_TABLE)
    first = at + (12 if interior else 8)
    if first + 2 * count > len(page):
        raise Damaged
    starts = list(struct.unpack(f">{count}H", page[first : first + 2 * count]))
    return kind, starts, _u32(page, at + 8) if interior else 0


def _u32(page: bytes, at: int) -> int:
    if at + 4 > len(page):
        raise Damaged
    return int.from_bytes(page[at : at + 4], "big")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place in range(9):
        if at + place >= len(data):
            raise Damaged
        byte = data[at + place]
        if place == 8:
            return (value << 8) | byte, at + 9
        value = (value << 7) | (byte & 0x7F)
        if byte < 0x80:
            return value, at + place + 1
    raise Damaged


def _index_record(pages: Pages, page: bytes, at: int) -> list[Any]:
    length, at = _varint(page, at)
    return decode_record(_payload(pages, page, at, length, (len(page) - 12) * 64 // 255 - 23))


def _payload(pages: Pages, page: bytes, at: int, length: int, most: int) -> bytes:
    """Return a payload with what of it lies on pages of its own."""
    usable = len(page)
    if length > 2**31:
        raise Damaged
    local = length
    if length > most:
        least = (usable - 12) * 32 // 255 - 23
        local = least + (length - least) % (usable - 4)
        if local > most:
            local = least
    data = page[at : at + local]
    if len(data) != local:
        raise Damaged
    if local == length:
        return data
    parts, left, following = [data], length - local, _u32(page, at + local)
    while left > 0:
        more = pages(following)
        parts.append(more[4 : 4 + left])
        left -= len(parts[-1])
        following = _u32(more, 0)
    return b"".join(parts)
