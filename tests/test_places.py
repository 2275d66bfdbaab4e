"""Where keys stand: the line and the column of each, in every way that TOML and JSON allow to write it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durablews.places import Path, Place, scan_json, scan_toml

TOML = '''\
# url = "in a comment"
url = "wss://example.com/#not-a-comment"  # a comment
"quoted key" = 'literal # string'
dotted . "key".three = 1
text = """
url = "in a string" ""\\
"""
raw = \'\'\'
[not.a.table]\'\'\'

[heartbeat]   # durablews: ignore
interval = "30s"
list = [ 1, "]", # ] in a comment
  { inner = 2 } ]
[auth . headers]
X-Site = "a\\"b#c"
point = { x = 1, "y.z" = [ { deep = true } ] }
[[many]]
one = 1979-05-27T07:32:00
'''


def test_every_way_to_write_a_key_in_toml() -> None:
    """Comments, strings of four kinds, quoted and dotted keys, inline tables and lists hide and invent nothing."""
    tomllib.loads(TOML)
    scan = scan_toml(TOML)
    assert scan.places == {
        ("url",): Place(2, 1),
        ("quoted key",): Place(3, 1),
        ("dotted",): Place(4, 1),
        ("dotted", "key"): Place(4, 1),
        ("dotted", "key", "three"): Place(4, 1),
        ("text",): Place(5, 1),
        ("raw",): Place(8, 1),
        ("heartbeat",): Place(11, 1),
        ("heartbeat", "interval"): Place(12, 1),
        ("heartbeat", "list"): Place(13, 1),
        ("heartbeat", "list", "[]"): Place(14, 5),
        ("heartbeat", "list", "[]", "inner"): Place(14, 5),
        ("auth",): Place(15, 1),
        ("auth", "headers"): Place(15, 1),
        ("auth", "headers", "X-Site"): Place(16, 1),
        ("auth", "headers", "point"): Place(17, 1),
        ("auth", "headers", "point", "x"): Place(17, 11),
        ("auth", "headers", "point", "y.z"): Place(17, 18),
        ("auth", "headers", "point", "y.z", "[]"): Place(17, 30),
        ("auth", "headers", "point", "y.z", "[]", "deep"): Place(17, 30),
        ("many",): Place(18, 1),
        ("many", "one"): Place(19, 1),
    }
    assert scan.comments == {
        1: '# url = "in a comment"',
        2: "# a comment",
        11: "# durablews: ignore",
        13: "# ] in a comment",
    }


@pytest.mark.parametrize(
    "value",
    ['"""a"""""', '"""""a"""', "''''a'''''", '"""\\""" """', '"\\\\"', "'\\'", "[ ]", "{ }", "[[1], [2,],]", '""'],
)
def test_strings_and_lists_end_where_they_end(value: str) -> None:
    """What follows an awkward value on the next line is found there."""
    text = f"a = {value}\nb = 1\n"
    tomllib.loads(text)
    assert scan_toml(text).places[("b",)] == Place(2, 1)


def paths(document: Any, prefix: Path = ()) -> Iterator[Path]:
    """Yield the path of each key of a parsed document."""
    if isinstance(document, dict):
        for name, value in document.items():
            yield (*prefix, name)
            yield from paths(value, (*prefix, name))
    elif isinstance(document, list):
        for value in document:
            yield from paths(value, (*prefix, "[]"))


documents = st.dictionaries(
    st.text(max_size=6),
    st.recursive(
        st.one_of(st.integers(), st.booleans(), st.text(), st.floats(allow_nan=False)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
        max_leaves=8,
    ),
    max_size=4,
)


@given(documents, st.sampled_from([None, 0, 2]), st.booleans())
def test_every_key_of_any_json_is_found_where_it_stands(document: Any, indent: int | None, ascii_only: bool) -> None:
    """At the place of each key there is that key."""
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    scan = scan_json(text)
    assert set(scan.places) == {path for path in paths(document) if path[-1] != "[]" or path in scan.places}
    assert scan.twice is None
    lines = text.split("\n")
    for path, place in scan.places.items():
        rest = lines[place.line - 1][place.column - 1 :]
        assert rest.startswith(json.dumps(path[-1], ensure_ascii=ascii_only))


def test_a_key_that_stands_twice_is_seen() -> None:
    """JSON allows it and keeps the last; whoever wrote it meant one of them."""
    assert scan_json('{"a": {"b": 1}, "c": [], "a": {}}').twice == ("a",)
    assert scan_json('{"a": {"b": 1}, "c": {"b": 2}}').twice is None


keys = st.one_of(st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True), st.text(max_size=5).map(json.dumps)).filter(
    lambda key: "\x7f" not in key and not any(0xD800 <= ord(c) < 0xE000 for c in key)
)
values = st.sampled_from(['"x"', "1", "true", "[1, 2]", "'#'", '"""\n#\n"""', "{ a = 1 }", "1.5e3"])


@given(st.lists(st.tuples(keys, values), max_size=6), st.lists(st.tuples(keys, keys, values), max_size=4))
def test_any_toml_that_python_reads_is_scanned(
    pairs: list[tuple[str, str]], tables: list[tuple[str, str, str]]
) -> None:
    """Whatever tomllib accepts has all of its keys found."""
    text = "".join(f"{key} = {value}\n" for key, value in pairs)
    text += "".join(f"[{name}]\n{key} = {value} # c\n" for name, key, value in tables)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    assert set(paths(document)) == set(scan_toml(text).places)
