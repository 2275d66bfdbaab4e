"""Where the settings stand in a file: line and column of each key of a TOML or JSON text. Pure.

`tomllib` and `json` keep no positions. Both functions here take a text that one of these has accepted, and only look
for keys in it; values are passed over.
"""

from __future__ import annotations

import json
import re
import tomllib
from bisect import bisect_right
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Path", "Place", "Scan", "scan_json", "scan_toml"]

#: The names of a setting, from the outermost table inwards.
Path = tuple[str, ...]


class Place(NamedTuple):
    """A position in a text, both from 1 on."""

    line: int
    column: int


class Scan(NamedTuple):
    """What a text holds besides its values.

    Attributes:
        places: where each key, and each table's header, begins.
        comments: the comments, by line.
        twice: a key that stands in one object twice, which JSON allows, if there is one.
    """

    places: Mapping[Path, Place]
    comments: Mapping[int, str]
    twice: Path | None = None


class _Lines:
    def __init__(self, text: str) -> None:
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def place(self, offset: int) -> Place:
        line = bisect_right(self._starts, offset)
        return Place(line, offset - self._starts[line - 1] + 1)


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


def scan_json(text: str) -> Scan:
    """Find the keys of a valid JSON text."""
    lines, places, twice = _Lines(text), dict[Path, Place](), None
    # One entry for each open bracket: the path of what is in it, and whether that has keys.
    stack: list[tuple[Path, bool]] = []
    path: Path = ()  # of the value that comes next
    wants_key = False
    for match in _JSON_TOKEN.finditer(text):
        token = match[0]
        if token in "{[":
            wants_key = token == "{"
            stack.append((path, wants_key))
            path = (*path, "[]")
        elif token in "}]":
            stack.pop()
            wants_key = False
        elif token == ",":
            inside, wants_key = stack[-1]
            path = (*inside, "[]")
        elif wants_key:
            path = (*stack[-1][0], json.loads(token))
            wants_key = False
            if path in places and "[]" not in path:  # two objects in a list may have the same keys
                twice = twice or path
            places[path] = lines.place(match.start())
    return Scan(places, {}, twice)


_BLANK = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BASIC_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
# Up to two quotes may stand before the three that end it (TOML 1.0, strings).
_LONG_STRING = re.compile(r'"""(?:[^\\]|\\.)*?"""(?:"{1,2}(?!"))?' + "|'''.*?'''(?:'{1,2}(?!'))?", re.DOTALL)
_LITERAL_STRING = re.compile(r"'[^'\n]*'")
_BARE_VALUE = re.compile(r"[^,\]}#\n]*")


def scan_toml(text: str) -> Scan:
    """Find the keys and the comments of a valid TOML text."""
    return _TOMLScanner(text).scan()


class _TOMLScanner:
    def __init__(self, text: str) -> None:
        # As tomllib does: a line may end with CR LF, and no other way.
        self._text = text
        self._at = 0
        self._lines = _Lines(text)
        self._places: dict[Path, Place] = {}
        self._comments: dict[int, str] = {}

    def scan(self) -> Scan:
        table: Path = ()
        while self._skip_lines():
            start = self._at
            if self._peek() == "[":
                brackets = 2 if self._text.startswith("[[", start) else 1
                self._at += brackets
                table = self._key()
                self._at += brackets
                self._note(table, start)
            else:
                self._pair(table)
        return Scan(self._places, self._comments)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise ValueError(f"not TOML at character {self._at}")
        self._at = match.end()
        return match[0]

    def _skip_lines(self) -> bool:
        """Pass white space, line ends and comments; return whether anything follows."""
        while self._at < len(self._text):
            if self._peek() == "#":
                start = self._at
                end = self._text.find("\n", start)
                self._at = len(self._text) if end < 0 else end
                self._comments[self._lines.place(start).line] = self._text[start : self._at]
            elif self._peek() in " \t\r\n":
                self._at += 1
            else:
                return True
        return False

    def _pair(self, table: Path) -> None:
        start = self._at
        path = (*table, *self._key())
        self._note(path, start)
        self._at += 1  # the equals sign
        self._match(_BLANK)
        self._value(path)

    def _key(self) -> Path:
        """Pass a key with its dots, and the blanks around it."""
        names: list[str] = []
        while True:
            self._match(_BLANK)
            if self._peek() == '"':
                names.append(tomllib.loads(f"key = {self._match(_BASIC_STRING)}")["key"])
            elif self._peek() == "'":
                names.append(self._match(_LITERAL_STRING)[1:-1])
            else:
                names.append(self._match(_BARE_KEY))
            self._match(_BLANK)
            if self._peek() != ".":
                return tuple(names)
            self._at += 1

    def _note(self, path: Path, offset: int) -> None:
        place = self._lines.place(offset)
        for length in range(1, len(path)):
            self._places.setdefault(path[:length], place)
        self._places[path] = place

    def _value(self, path: Path) -> None:
        if self._text.startswith(('"""', "'''"), self._at):
            self._match(_LONG_STRING)
        elif self._peek() == '"':
            self._match(_BASIC_STRING)
        elif self._peek() == "'":
            self._match(_LITERAL_STRING)
        elif self._peek() in "[{":
            self._collection(path, keyed=self._peek() == "{")
        else:
            self._match(_BARE_VALUE)

    def _collection(self, path: Path, *, keyed: bool) -> None:
        self._at += 1
        while self._skip_lines() and self._peek() not in "]}":
            if self._peek() == ",":
                self._at += 1
            elif keyed:
                self._pair(path)
            else:
                self._value((*path, "[]"))
        self._at += 1
