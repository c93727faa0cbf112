"""The line of every key, whatever form its author chose: in a written file each key's line is known."""

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.toml_lines import KeyPath, dotted, key_lines, line_of

pytestmark = pytest.mark.unit


def test_keys_of_every_form_have_the_line_they_stand_on() -> None:
    text = '''# providers
[aliases]
fast = "a"
"slow.est" = "b"  # a comment with = and [brackets]

[models."gpt-4o"]
targets = [
  { to = "openai/gpt-4o", weight = 3 },
  { to = "azur/gpt-4o" },
]
fallbacks = ["x",
  "y"]
[models]
small.fallbacks = []
[[models.'big'.targets]]
to = """
[not.a.header]
to = 1"""
[[models.big.targets]]
to = "z"
[prices.openai]
"gpt-*" = { input = 2.5, output = 10 }
'''
    lines = key_lines(text)
    expected: dict[KeyPath, int] = {
        ("aliases",): 2,
        ("aliases", "slow.est"): 4,
        ("models", "gpt-4o"): 6,
        ("models", "gpt-4o", "targets", 0, "weight"): 8,
        ("models", "gpt-4o", "targets", 1, "to"): 9,
        ("models", "gpt-4o", "fallbacks", 1): 12,
        ("models", "small", "fallbacks"): 14,
        ("models", "big", "targets", 0, "to"): 16,
        ("models", "big", "targets", 1, "to"): 20,
        ("prices", "openai", "gpt-*", "output"): 22,
    }
    assert {path: line_of(lines, path) for path in expected} == expected
    assert ("not", "a", "header") not in lines


def test_a_key_that_is_not_there_has_the_line_of_what_it_would_be_in() -> None:
    lines = key_lines("\n[providers.x]\nauth = 1\n")
    assert line_of(lines, ("providers", "x", "base_url")) == 2
    assert line_of(lines, ("aliases", "x")) is None
    assert line_of(lines, ()) is None


def test_a_path_is_shown_as_it_would_be_written() -> None:
    assert dotted(("models", "gpt-4o", "targets", 1, "to")) == 'models."gpt-4o".targets[1].to'
    assert dotted(("models", "gpt-4.1", 'a"b')) == 'models."gpt-4.1"."a\\"b"'


# --- any file -----------------------------------------------------------------------------------------------------

KEYS = st.one_of(
    st.sampled_from(["a", "to", "gpt-4o", "1"]), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
)
SCALARS = st.one_of(st.integers(0, 99), st.booleans(), st.text("]}[{,=#.\"'\\\n ab", max_size=12))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


class Writer:
    """Writes tables in every form that TOML has for them, and notes the line of each key."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.text = ""
        self.lines: dict[KeyPath, int] = {}

    def here(self, path: KeyPath) -> None:
        self.lines[path] = self.text.count("\n") + 1

    def key(self, key: str) -> str:
        return (
            key
            if key and key.isascii() and key.replace("-", "a").isalnum()
            else json.dumps(key, ensure_ascii=False).replace("\x7f", "\\u007f")
        )

    def table(self, path: KeyPath, table: dict[str, Any]) -> None:
        below = {key for key, value in table.items() if isinstance(value, dict) and self.draw(st.booleans())}
        for key, value in table.items():
            if key not in below:
                self.here((*path, key))
                self.text += f"{self.key(key)} = "
                self.value((*path, key), value)
                self.text += self.draw(st.sampled_from(["\n", " # [x]\n", "\n\n"]))
        for key in below:
            self.here((*path, key))
            self.text += f"[{'.'.join(self.key(str(step)) for step in (*path, key))}]\n"
            self.table((*path, key), table[key])

    def value(self, path: KeyPath, value: Any) -> None:
        if isinstance(value, dict):
            self.text += "{"
            for number, (key, inner) in enumerate(value.items()):
                self.text += ", " if number else " "
                self.here((*path, key))
                self.text += f"{self.key(key)} = "
                self.value((*path, key), inner)
            self.text += "}"
        elif isinstance(value, list):
            self.text += "["
            for number, inner in enumerate(value):
                self.text += self.draw(st.sampled_from(["", "\n  ", " # x ]\n"]))
                self.here((*path, number))
                self.value((*path, number), inner)
                self.text += ","
            self.text += "]"
        elif isinstance(value, str):
            self.text += self.string(value)
        else:
            self.text += json.dumps(value)

    def string(self, value: str) -> str:
        forms = [json.dumps(value)]
        if "\\" not in value and '"""' not in value and not value.endswith('"'):
            forms.append(f'"""\n{value}"""')
        if "'" not in value:
            forms.append(f"'''\n{value}'''")
        return str(self.draw(st.sampled_from(forms)))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=5), st.data())
def test_every_key_of_any_file_has_its_line(tables: dict[str, Any], data: st.DataObject) -> None:
    writer = Writer(data.draw)
    writer.table((), tables)
    assert tomllib.loads(writer.text) == tables, "the file says what was to be written"
    found = key_lines(writer.text)
    assert {path: found.get(path) for path in writer.lines} == writer.lines
    assert found.keys() == writer.lines.keys(), "and nothing is a key that is none"


@settings(max_examples=300, deadline=None)
@given(st.text("[]{}=.,#\"'\\\n ab1") | st.text())
def test_no_text_is_too_strange(text: str) -> None:
    for line in key_lines(text).values():
        assert 1 <= line <= text.count("\n") + 1


def test_a_value_nested_beyond_reason_is_stepped_over() -> None:
    lines = key_lines(f"a = {'[' * 100_000}{']' * 100_000}\nb = 1\n")
    assert (lines["a",], lines["b",]) == (1, 2)
