"""What a completion and an embedding request may hold, and what it costs to look at a large one."""

from collections.abc import Callable
from time import thread_time
from typing import Any

import orjson
import pytest

from gateway.protocol.errors import InvalidRequest
from gateway.protocol.inputs import MAX_INPUTS, MAX_TOKENS
from gateway.protocol.json_object import parse_object
from gateway.protocol.meter import Meter
from gateway.protocol.request import ModelRequest, parse_completion, parse_embedding, prompt_of

pytestmark = pytest.mark.unit

Parse = Callable[[bytes], ModelRequest]
both = pytest.mark.parametrize(("parse", "name"), [(parse_embedding, "input"), (parse_completion, "prompt")])
WORDS = "a non-empty string, an array of strings, an array of tokens or an array of such arrays is required"


def parsed(parse: Parse, name: str, value: Any) -> ModelRequest:
    return parse(orjson.dumps({"model": "m", name: value}))


def refusal(parse: Parse, name: str, value: Any) -> str:
    with pytest.raises(InvalidRequest) as refused:
        parsed(parse, name, value)
    assert refused.value.param == name
    return str(refused.value)


@both
@pytest.mark.parametrize(
    ("value", "texts", "tokens"),
    [
        ("a", ["a"], 0),
        (["a", "b"], ["a", "b"], 0),
        ([0, 2**64 - 1], [], 2),
        ([[1, 2], [3]], [], 3),
        (["a"] * MAX_INPUTS, ["a"] * MAX_INPUTS, 0),
        ([[1]] * MAX_INPUTS, [], MAX_INPUTS),
        ([1] * MAX_TOKENS, [], MAX_TOKENS),
    ],
    ids=["text", "texts", "tokens", "arrays", "most texts", "most arrays", "most tokens"],
)
def test_texts_and_tokens_are_told_apart_and_counted(
    parse: Parse, name: str, value: Any, texts: list[str], tokens: int
) -> None:
    prompt = prompt_of(parsed(parse, name, value))
    assert (list(prompt.texts), prompt.tokens) == (texts, tokens)


@both
@pytest.mark.parametrize(
    "value",
    [
        None, 1, {}, [], [[]], [[1], []], [None], [{}], [-1], [1, -1], [[1, -1]], [1.0], [1, 2.5], [True],
        [1, False], [[True]], [1, "a"], ["a", 1], ["a", ["b"]], [["a"]], [[1], 1], [1, [1]], [[[1]]],
    ],
    ids=str,
)  # fmt: skip
def test_what_is_neither_is_refused(parse: Parse, name: str, value: Any) -> None:
    assert refusal(parse, name, value) == f"invalid {name}: {WORDS}"


def test_an_empty_text_can_be_completed_and_not_embedded() -> None:
    for value in ("", [""], ["a", ""]):
        assert parsed(parse_completion, "prompt", value).fields["prompt"] == value
        assert refusal(parse_embedding, "input", value) == f"invalid input: {WORDS}"


@both
def test_a_request_has_so_many_inputs_and_tokens_at_most(parse: Parse, name: str) -> None:
    many: Any
    for many in (["a"] * (MAX_INPUTS + 1), [[1]] * (MAX_INPUTS + 1)):
        assert refusal(parse, name, many) == f"invalid {name}: at most {MAX_INPUTS} inputs"
    half = [1] * (MAX_TOKENS // 2)
    for many in ([1] * (MAX_TOKENS + 1), [half, half, [1]]):
        assert refusal(parse, name, many) == f"invalid {name}: at most {MAX_TOKENS} tokens"


# --- what it costs ------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object]) -> float:
    """Of CPU, the best of three."""
    spent = []
    for _ in range(3):
        begun = thread_time()
        work()
        spent.append(thread_time() - begun)
    return min(spent)


@both
@pytest.mark.parametrize(
    "value",
    [
        [1] * MAX_TOKENS,
        [[1] * (MAX_TOKENS // 128)] * 128,
        [1] * 4 * MAX_TOKENS,
        ["a"] * 4 * MAX_TOKENS,
        "a" * 16 * MAX_TOKENS,
        ["a" * 8192] * MAX_INPUTS,
    ],
    ids=["tokens", "arrays", "too many tokens", "too many texts", "a long text", "long texts"],
)
def test_to_check_and_count_a_large_input_costs_little_beside_reading_its_json(
    parse: Parse, name: str, value: Any, figure: Callable[[str], None], request: pytest.FixtureRequest
) -> None:
    """The rest is the provider's to count: what it says in `usage` is billed."""
    body = orjson.dumps({"model": "m", name: value})

    def check_and_count() -> None:
        try:
            prompt = prompt_of(parse(body))
        except InvalidRequest:
            return
        Meter(prompt.texts, prompt.tokens, framed=prompt.messages).prompt_estimate()

    read, all_of_it = seconds_of(lambda: parse_object(body)), seconds_of(check_and_count)
    figure(
        f"{request.node.callspec.id}, {len(body) / 1e6:.1f} MB: to read its JSON {read * 1e3:.0f} ms of CPU, "
        f"to check and count it too {all_of_it * 1e3:.0f} ms"
    )
    assert all_of_it < 4 * read
