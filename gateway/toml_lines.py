"""On which line of a TOML file each key stands: the standard library's parser does not say.

We read only what tomllib has taken, so this is no parser: it walks headers, keys and brackets, and steps over values.
In a text that is not TOML it finds what it finds, and raises nothing. https://toml.io/en/v1.0.0
"""

import json
import re
import tomllib
from collections.abc import Iterator
from typing import NamedTuple

KeyPath = tuple[str | int, ...]  # of keys, and of positions in arrays

_TOKEN = re.compile(
    r"""
    (?P<space>[ \t\r]+|\#[^\n]*)
    |(?P<newline>\n)
    |(?P<string>"{3}(?:[^\\]|\\.)*?"{3,5}|'{3}.*?'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')
    |(?P<mark>[\[\]{}=,.])
    |(?P<word>[^\s\[\]{}=,.#"']+|.)
    """,
    re.DOTALL | re.VERBOSE,
)
_MAX_DEPTH = 50  # of arrays and inline tables; what is deeper stands on the line of what it is in


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, from 1, of every table, key and item of an array. A table without a header has its first key's."""
    return _Walk(text).lines


def line_of(lines: dict[KeyPath, int], path: KeyPath) -> int | None:
    """Of the key, or of the nearest that it is in; None when nothing of it is there."""
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            return lines[path[:end]]
    return None


def dotted(path: KeyPath) -> str:
    """As an operator would write it: `models."gpt-4o".targets[1].to`."""
    words = ""
    for step in path:
        if isinstance(step, int):
            words += f"[{step}]"
        else:
            plain = re.fullmatch(r"\w+", step, re.ASCII)
            words += ("." if words else "") + (step if plain else json.dumps(step, ensure_ascii=False))
    return words


class _Walk:
    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._items: dict[KeyPath, int] = {}  # of `[[arrays]]`, how many so far
        self._tokens = list(_tokens(text))
        self._at = 0
        self._document()

    def _document(self) -> None:
        table: KeyPath = ()
        while self._at < len(self._tokens):
            token = self._tokens[self._at]
            if token.kind == "newline":
                self._at += 1
            elif token.text == "[":
                table = self._header(token.line)
            else:
                self._pair(table, 0)
                self._to_line_end()

    def _header(self, line: int) -> KeyPath:
        self._at += 1
        is_item = self._is("[")
        self._at += is_item
        keys = self._keys()
        self._to_line_end()
        path: KeyPath = ()
        for number, key in enumerate(keys, 1):
            path = (*path, key)
            if is_item and number == len(keys):
                self._items[path] = self._items.get(path, -1) + 1
            self.lines.setdefault(path, line)
            if path in self._items:
                path = (*path, self._items[path])
                self.lines.setdefault(path, line)
        if path:
            self.lines[path] = line  # it may have been named before, as the home of another table
        return path

    def _pair(self, table: KeyPath, depth: int) -> None:
        """`key = value`, or as much of it as there is."""
        line = self._tokens[self._at].line
        path = table
        for key in self._keys():
            path = (*path, key)
            self.lines.setdefault(path, line)
        if self._is("="):
            self._at += 1
            self._value(path, depth)
        elif path == table:
            self._at += 1  # not TOML: on to the next

    def _keys(self) -> list[str]:
        keys: list[str] = []
        while self._at < len(self._tokens):
            token = self._tokens[self._at]
            if token.kind in ("string", "word"):
                keys.append(_key(token))
            elif token.text != ".":
                break
            self._at += 1
        return keys

    def _value(self, path: KeyPath, depth: int) -> None:
        if self._is("[") and depth < _MAX_DEPTH:
            self._array(path, depth + 1)
        elif self._is("{") and depth < _MAX_DEPTH:
            self._inline_table(path, depth + 1)
        else:
            self._step_over()

    def _array(self, path: KeyPath, depth: int) -> None:
        self._at += 1
        number = 0
        while self._at < len(self._tokens):
            token = self._tokens[self._at]
            if token.text == "]" and token.kind == "mark":
                self._at += 1
                return
            if token.kind == "newline" or token.text == ",":
                self._at += 1
                continue
            self.lines.setdefault((*path, number), token.line)
            self._value((*path, number), depth)
            number += 1

    def _inline_table(self, path: KeyPath, depth: int) -> None:
        self._at += 1
        while self._at < len(self._tokens):
            token = self._tokens[self._at]
            if token.text == "}" and token.kind == "mark":
                self._at += 1
                return
            if token.kind == "newline" or token.text == ",":
                self._at += 1
            else:
                self._pair(path, depth)

    def _step_over(self) -> None:
        """A value that has no keys, or is too deep to be told about."""
        open_brackets = 0
        first = self._at
        while self._at < len(self._tokens):
            token = self._tokens[self._at]
            closes = token.kind == "mark" and token.text in "]}"
            if open_brackets == 0 and self._at > first and (closes or token.kind == "newline" or token.text == ","):
                return
            if token.kind == "mark":
                open_brackets += (token.text in "[{") - closes
            self._at += 1
            if open_brackets < 0:
                return

    def _to_line_end(self) -> None:
        while self._at < len(self._tokens) and self._tokens[self._at].kind != "newline":
            self._at += 1

    def _is(self, mark: str) -> bool:
        return self._at < len(self._tokens) and self._tokens[self._at][:2] == ("mark", mark)


def _tokens(text: str) -> Iterator[_Token]:
    line = 1
    for match in _TOKEN.finditer(text):
        kind, found = match.lastgroup or "", match.group()
        if kind != "space":
            yield _Token(kind, found, line)
        line += found.count("\n")


def _key(token: _Token) -> str:
    """What a bare or quoted key says."""
    if token.kind == "word":
        return token.text
    try:
        return next(iter(tomllib.loads(f"{token.text} = 0")))
    except tomllib.TOMLDecodeError:
        return token.text
