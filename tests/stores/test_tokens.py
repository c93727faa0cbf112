import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stores.tokens import TOKEN_LENGTH, Token, join_token, make_token, parse_token

pytestmark = pytest.mark.unit

BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def test_a_new_key_has_the_documented_form() -> None:
    token = make_token()
    assert re.fullmatch(r"aig_[0-9A-Za-z]{12}_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}", token)
    assert len(token) == TOKEN_LENGTH


def test_no_two_keys_are_the_same() -> None:
    assert len({make_token() for _ in range(1000)}) == 1000


def test_the_form_of_a_key_never_changes() -> None:
    """A key made by an older release is still one."""
    assert join_token("0" * 12, "z" * 43) == "aig_000000000000_zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz_2w0jaY"


@given(st.text(BASE62, min_size=12, max_size=12), st.text(BASE62, min_size=43, max_size=43))
def test_a_key_is_read_back_as_its_parts(key_id: str, secret: str) -> None:
    assert parse_token(join_token(key_id, secret)) == Token(key_id, secret)


def test_one_wrong_character_anywhere_is_seen_without_a_look_up() -> None:
    token = make_token()
    for at in range(TOKEN_LENGTH):
        other = "A" if token[at] != "A" else "B"
        assert parse_token(token[:at] + other + token[at + 1 :]) is None


def test_two_swapped_characters_are_seen() -> None:
    token = make_token()
    for at in range(4, TOKEN_LENGTH - 1):
        swapped = token[:at] + token[at + 1] + token[at] + token[at + 2 :]
        assert swapped == token or parse_token(swapped) is None


@pytest.mark.parametrize(
    "text", ["", "aig_", "sk-proj-1", "aig_" + "_" * 63, "é" * TOKEN_LENGTH, "\udcff" * TOKEN_LENGTH]
)
def test_what_is_no_key_is_none(text: str) -> None:
    assert parse_token(text) is None


def test_a_key_cut_short_or_with_more_behind_it_is_none() -> None:
    token = make_token()
    assert parse_token(token[:-1]) is None
    assert parse_token(token + "0") is None


@given(st.text(max_size=TOKEN_LENGTH + 1))
def test_no_text_makes_the_parser_fail(text: str) -> None:
    assert parse_token("aig_" + text) is None


def test_a_digit_of_another_script_is_no_digit() -> None:
    assert parse_token(join_token("١" * 12, "0" * 43)) is None
