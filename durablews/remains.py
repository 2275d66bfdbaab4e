"""What is left in the damaged file of an outbox: its entries in their order, its counts, what is missing. Pure.

Nothing here trusts a single page. The page size, the places of the tables and the shape of their rows are known from a
fresh outbox, for where the file's own header or schema is damaged; rows that no tree leads to any more are found by
what they are; numbers that cannot be are put right by where they stand.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median_low
from typing import Any, NamedTuple

import msgspec

from durablews.btree import Cell, Damaged, Text, Tree, numbered, page_kinds, table_cells
from durablews.messages import Refusal
from durablews.schema import APPLICATION_ID
from durablews.writeahead import Log, read_log

__all__ = ["Layout", "Remains", "Row", "Source"]

_PAGE_SIZES = tuple(512 << shift for shift in range(8))
_USUAL_PAGE = 4096
_TREE_PAGE, _UNKNOWN_PAGE = 5, 0


class Source(NamedTuple):
    """A file to read from: bytes at an offset, and how many there are. A file that is missing has none."""

    read: Callable[[int, int], bytes]
    length: int


class Layout(NamedTuple):
    """Where a fresh outbox has its tables, and how they are made: name -> root page, name -> columns."""

    roots: Mapping[str, int]
    columns: Mapping[str, Sequence[str]]


class Row(NamedTuple):
    """An entry that can be read.

    Attributes:
        values: by column, as they go into a new outbox; `payload` is bytes whatever its kind.
        text: whether the payload is JSON text.
        fault: why it must not be sent, as a sentence; None when it is as it was stored, as far as that can be told.
    """

    seq: int
    values: dict[str, Any]
    text: bool
    fault: str | None


class Remains:
    """A damaged file, and the log beside it.

    Attributes:
        log: what the log holds.
        unreadable: the parts that could not be read, as words for people.
    """

    def __init__(self, file: Source, log: Source, layout: Layout) -> None:
        self._file = file
        self._log = log
        self._layout = layout
        header = file.read(0, 100) if file.length >= 100 else b""
        declared = int.from_bytes(header[16:18], "big")
        in_log = int.from_bytes(log.read(8, 4), "big") if log.length >= 32 else 0
        self.log = Log({}, None, 0, [], 0, set())
        self.roots: dict[str, int] = {}
        for size in dict.fromkeys((65536 if declared == 1 else declared, in_log, _USUAL_PAGE)):
            if size in _PAGE_SIZES or size == 65536:
                self._page_size = size
                self.log = read_log(log.read, log.length, size)
                self.roots = self._read_schema()
                if "durablews_meta" in self.roots:
                    break
        self.unreadable: list[str] = []
        if "durablews_entries" not in self.roots:
            self.unreadable.append("the schema")

    def page(self, number: int) -> bytes:
        """Return the newest image of a page.

        Raises:
            Damaged: there is none.
        """
        offset = self.log.pages.get(number)
        if offset is not None:
            return self._log.read(offset, self._page_size)
        data = self._file.read((number - 1) * self._page_size, self._page_size) if number > 0 else b""
        if len(data) != self._page_size:
            raise Damaged
        return data

    @property
    def pages(self) -> int:
        """How many pages there may be."""
        return max([self._file.length // self._page_size, *self.log.pages])

    @property
    def is_outbox(self) -> bool:
        """Whether anything says that this was an outbox in a file of its own."""
        if self._file.length >= 72 and int.from_bytes(self._file.read(68, 4), "big") == APPLICATION_ID:
            return True
        others = [name for name in self.roots if not name.startswith(("durablews_", "sqlite_"))]
        if self.roots:
            return "durablews_meta" in self.roots and not others
        return any(self._mentions(source) for source in (self._file, self._log))

    @property
    def is_application(self) -> bool:
        """Whether the outbox lives in a database with other tables."""
        return "durablews_meta" in self.roots and not self.is_outbox

    def _mentions(self, source: Source) -> bool:
        return b"durablews_entries" in source.read(0, min(source.length, 64 * self._page_size))

    def _read_schema(self) -> dict[str, int]:
        roots: dict[str, int] = {}
        for values in self._rows_below(1):
            if len(values) == 5 and isinstance(values[1], Text) and isinstance(values[3], int) and values[3] > 0:
                roots[values[1].decode(errors="replace")] = values[3]
        return roots

    def _root(self, name: str) -> int:
        return self.roots.get(name) or self._layout.roots[name]

    def _rows_below(self, root: int) -> Iterator[list[Any]]:
        """Yield the records of a small table; INTEGER PRIMARY KEY is in the record as None."""
        tree = Tree(self.page, root)
        for _ in tree.walk():
            pass
        for leaf in tree.leaves:
            for cell in table_cells(self.page, leaf):
                if cell.record is not None:
                    yield [cell.rowid, *cell.record[1:]] if cell.record[:1] == [None] else cell.record

    def table(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a small table by column; text that is not UTF-8 is left out with its row."""
        rows: list[dict[str, Any]] = []
        columns = self._layout.columns[name]
        for values in self._rows_below(self._root(name)):
            # One that was written before a column was added is shorter.
            if len(values) > len(columns):
                continue
            try:
                decoded = [value.decode() if isinstance(value, Text) else value for value in values]
            except UnicodeDecodeError:
                continue
            rows.append(dict(zip(columns, decoded, strict=False)))
        return rows

    def single(self, name: str, what: str) -> dict[str, Any]:
        """Return the row of a table that has one; nothing, noted as unreadable, when it cannot be."""
        rows = [row for row in self.table(name) if row.get("one") == 1]
        if len(rows) == 1:
            return rows[0]
        self.unreadable.append(what)
        return {}

    def last_sequence(self) -> int:
        """Return the highest sequence ever given out, as far as the file says."""
        found = [row[1] for row in self._rows_below(self._root("sqlite_sequence")) if len(row) == 2]
        return max([seq for seq in found if isinstance(seq, int) and 0 < seq <= 2**52], default=0)

    def ids(self) -> Iterator[tuple[str, int]]:
        """Yield the callers' own ids."""
        for record in Tree(self.page, self._root("durablews_ids"), index=True).walk():
            if len(record) == 2 and isinstance(record[0], Text) and isinstance(record[1], int):
                try:
                    yield record[0].decode(), record[1]
                except UnicodeDecodeError:
                    continue

    def listed(self, tree_damage: list[int]) -> Iterator[tuple[int, int]]:
        """Yield priority and sequence of what the index of the queue lists, where its neighbours vouch for it.

        Args:
            tree_damage: gets the pages of the index that could not be read, and a 0 for each doubtful entry.
        """
        tree = Tree(self.page, self._root("durablews_queue"), index=True)
        before: tuple[int, int] | None = None
        held: tuple[int, int] | None = None
        for record in tree.walk():
            if len(record) != 2 or not all(isinstance(value, int) for value in record):
                tree_damage.append(0)
                continue
            this = (record[0], record[1])
            if held is not None:
                if (before is None or before < held) and held < this:
                    yield held
                else:
                    tree_damage.append(0)
            before, held = held, this
        if held is not None and (before is None or before < held):
            yield held
        tree_damage.extend(tree.damaged)

    def entries(self, expected: int | None, note: Callable[[int, int], None]) -> Iterator[Row]:
        """Yield every entry that can be read, in its order.

        Args:
            expected: how many there should be; when fewer can be reached, pages that nothing leads to are looked at.
            note: called with how many entries were read, and how many there are.
        """
        leaves = self._entry_leaves(expected)
        found: list[int] = []
        for leaf in leaves:
            found += [cell.rowid for cell in self._entry_cells(leaf)]
        numbers = numbered(found)
        position = 0
        for leaf in leaves:
            for cell in self._entry_cells(leaf):
                assert cell.record is not None
                yield _row(numbers[position], dict(zip(self._entry_columns(), cell.record, strict=True)))
                position += 1
            note(position, len(numbers))

    def _entry_columns(self) -> Sequence[str]:
        return self._layout.columns["durablews_entries"]

    def _entry_cells(self, leaf: int) -> list[Cell]:
        """Return the cells of a leaf that hold an entry with a payload."""
        try:
            cells = table_cells(self.page, leaf)
        except Damaged:
            return []
        width = len(self._entry_columns())
        return [
            cell
            for cell in cells
            if cell.record is not None and len(cell.record) == width and isinstance(cell.record[-1], bytes)
        ]

    def _entry_leaves(self, expected: int | None) -> list[int]:
        """Return the leaves of the entries in the order of their sequences, whatever leads to them."""
        tree = Tree(self.page, self._root("durablews_entries"))
        for _ in tree.walk():
            pass
        order: dict[int, int] = {}  # leaf -> the sequence in its middle

        def add(leaf: int) -> int:
            cells = self._entry_cells(leaf)
            if cells:
                order[leaf] = median_low(cell.rowid for cell in cells)
            return len(cells)

        reached = sum(add(leaf) for leaf in tree.leaves)
        if tree.damaged or expected is None or reached < expected:
            for number, kind in page_kinds(self.page, self.pages, self._page_size):
                wanted = kind in (_TREE_PAGE, _UNKNOWN_PAGE) or number in tree.damaged
                if wanted and number not in order:
                    add(number)
        return sorted(order, key=lambda leaf: order[leaf])


def _row(seq: int, values: dict[str, Any]) -> Row:
    """Judge one entry: what does not touch its content gets a usual value where it makes no sense."""
    payload: bytes = values["payload"]
    text = isinstance(payload, Text)
    faults: list[str] = []
    if isinstance(values["checksum"], int):
        if zlib.crc32(payload) != values["checksum"]:
            faults.append("the payload does not match its checksum")
    elif values["checksum"] is not None or (text and not _is_json(payload)):
        faults.append("the payload is no JSON any more")
    topic, headers = _text(values["topic"]), _text(values["headers"])
    if (values["topic"] is None) != (topic is None):
        faults.append("the topic cannot be read")
    if (headers is None and values["headers"] is not None) or (headers is not None and not _is_strings(headers)):
        faults.append("the headers cannot be read")
        headers = None
    size = len(payload) + sum(len(part.encode()) for part in (topic, headers) if part is not None)
    if not faults and size != values["bytes"]:
        faults.append("its size is not what it was")
    priority = values["priority"]
    if not isinstance(priority, int) or not -100 <= priority <= 100:
        faults.append("the priority cannot be read")
        priority = 0
    refusal = _refusal(_text(values["refusal"]))
    state = values["ack_state"]
    if refusal is None and values["refusal"] is not None and state != 3:
        # Only what was refused has one: it does not come back to life because nobody can read why.
        refusal = Refusal(code="unreadable", reason="why it was refused cannot be read", unknown=True)
    if refusal is not None:
        state = 3 if refusal.needs is not None and state == 3 else 2
    elif state != 0:
        state = 1
    ttl = values["ttl"]
    kept = {
        "priority": priority,
        "ack_state": state,
        "transmissions": _count(values["transmissions"]),
        "nacks": _count(values["nacks"]),
        "sent_at": values["sent_at"] if isinstance(values["sent_at"], int) else None,
        "refusal": None if refusal is None else msgspec.json.encode(refusal).decode(),
        "created_at": values["created_at"] if isinstance(values["created_at"], int) else 0,
        "ttl": ttl if isinstance(ttl, int) and ttl > 0 else None,
        "topic": topic,
        "headers": headers,
        "bytes": size,
        "checksum": values["checksum"],
        "payload": bytes(payload),
    }
    return Row(seq, kept, text, "; ".join(faults) or None)


def _text(value: Any) -> str | None:
    if not isinstance(value, Text):
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**31 else 0


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
        text.decode()
    except (ValueError, RecursionError):
        return False
    return b"\0" not in text


def _is_strings(headers: str) -> bool:
    try:
        msgspec.json.decode(headers, type=dict[str, str])
    except (ValueError, RecursionError):
        return False
    return True


def _refusal(stored: str | None) -> Refusal | None:
    if stored is None:
        return None
    try:
        return msgspec.json.decode(stored, type=Refusal)
    except (ValueError, RecursionError):
        return Refusal(code="unreadable", reason=stored)
