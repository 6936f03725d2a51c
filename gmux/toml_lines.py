"""The line of each key in a TOML file, which tomllib does not tell.

The text is cut into statements, each a header or a key with its value, and tomllib reads each alone. So all that is
known here of how TOML is written is what hides the end of a line: strings, comments and brackets.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

#: The keys that lead to a value, and places in arrays: ("route", 0, "pool-size").
Path = tuple[str | int, ...]

_TOKENS = re.compile(
    r'''
    """ (?: [^"\\] | \\. | ""?(?!") )*+ "{3,5}
    | \'\'\' (?: [^'] | ''?(?!') )*+ '{3,5}
    | " (?: [^"\\\n] | \\. )*+ "
    | ' [^'\n]*+ '
    | \# [^\n]*+
    | [\[\]{}\n]
    ''',
    re.VERBOSE | re.DOTALL,
)


def find_lines(text: str) -> dict[Path, int]:
    """The first line of each table, key and item of a text that tomllib takes."""
    lines: dict[Path, int] = {}
    last: dict[Path, int] = {}
    table: Path = ()
    for number, statement in _statements(text):
        parsed = tomllib.loads(statement)
        if statement.lstrip(" \t").startswith("["):
            table = _find_table(parsed, last)
            found = (table[:length] for length in range(1, len(table) + 1))
        else:
            found = (table + path for path in paths(parsed))
        for path in found:
            lines.setdefault(path, number)
    return lines


def paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """The ways to all that is inside of a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Each with the number of its first line. Empty lines and comments are statements too."""
    number = 1
    begin = depth = 0
    for token in _TOKENS.finditer(text + "\n"):
        if token[0] in ("[", "{"):
            depth += 1
        elif token[0] in ("]", "}"):
            depth -= 1
        elif token[0] == "\n" and not depth:
            yield number, text[begin : token.end()]
            number += text.count("\n", begin, token.end())
            begin = token.end()


def _find_table(header: dict[str, Any], last: dict[Path, int]) -> Path:
    """The table that a header begins. `last` has the place of the last one of each array of tables so far."""
    path: Path = ()
    while header:
        ((key, inner),) = header.items()
        path = (*path, key)
        if isinstance(inner, list):
            last[path] = last.get(path, -1) + 1
            inner = {}
        if path in last:
            path = (*path, last[path])
        header = inner
    return path
