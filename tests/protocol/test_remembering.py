"""Which answers may be remembered, and which requests may have the same."""

import json
import random
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.errors import InvalidRequest
from gateway.protocol.remembering import MAX_TTL, Wish, digest, fingerprint, wish_of, worth_keeping
from gateway.protocol.request import ModelRequest, parse_chat, parse_completion, parse_embedding
from gateway.protocol.routing import Provider, Target

pytestmark = pytest.mark.unit

OPENAI = Target(Provider("openai", "openai", "https://api.openai.com/v1"), "gpt-4o")
ACCOUNT = "00000000-0000-7000-a000-000000000001"

# https://platform.openai.com/docs/api-reference/chat/create: what shapes an answer, with two values of each.
SHAPING: dict[str, tuple[str, str]] = {
    "messages": ('[{"role":"user","content":"a"}]', '[{"role":"user","content":"b"}]'),
    "stream": ("true", "false"),
    "stream_options": ('{"include_usage":true}', '{"include_usage":false}'),
    "temperature": ("0.1", "0.10000000000000001"),
    "top_p": ("1", "1.0"),
    "n": ("1", "2"),
    "stop": ('["a","b"]', '["b","a"]'),
    "max_tokens": ("10", "11"),
    "max_completion_tokens": ("10", "11"),
    "presence_penalty": ("0", "-0"),
    "frequency_penalty": ("0.5", "5e-1"),
    "logit_bias": ('{"1":1,"2":2}', '{"1":2,"2":1}'),
    "logprobs": ("true", "false"),
    "top_logprobs": ("1", "2"),
    "seed": ("9007199254740992", "9007199254740993"),
    "response_format": ('{"type":"text"}', '{"type":"json_object"}'),
    "tools": (
        '[{"type":"function","function":{"name":"f","parameters":{"properties":{"x":{"type":"string","enum":["a"]}}}}}]',
        '[{"type":"function","function":{"name":"f","parameters":{"properties":{"x":{"type":"string","enum":["A"]}}}}}]',
    ),
    "tool_choice": ('"auto"', '"none"'),
    "parallel_tool_calls": ("true", "false"),
    "functions": ('[{"name":"f"}]', '[{"name":"g"}]'),
    "function_call": ('"auto"', '{"name":"f"}'),
    "modalities": ('["text"]', '["text","audio"]'),
    "audio": ('{"voice":"alloy","format":"mp3"}', '{"voice":"alloy","format":"wav"}'),
    "prediction": ('{"type":"content","content":"a"}', '{"type":"content","content":"b"}'),
    "reasoning_effort": ('"low"', '"high"'),
    "verbosity": ('"low"', '"high"'),
    "service_tier": ('"flex"', '"default"'),
    "web_search_options": ("{}", '{"search_context_size":"low"}'),
    "a_vendors_own": ('{"a":[1]}', '{"a":["1"]}'),
}
LABELS = ("user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention", "store")


def asked(members: dict[str, str], *, kind: Any = "chat") -> ModelRequest:
    """Of members whose values are JSON already, so that a number stands as it is written."""
    body = "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in members.items()) + "}"
    return ModelRequest(body.encode(), {}, "gpt-4o", stream=False, wants_usage=False, kind=kind)


def of(members: dict[str, str]) -> bytes:
    return digest(ACCOUNT, [OPENAI], asked(members))


MEMBERS = {"model": '"gpt-4o"', **{name: values[0] for name, values in SHAPING.items()}}


@pytest.mark.parametrize("name", SHAPING)
def test_each_parameter_that_shapes_the_answer_makes_another(name: str) -> None:
    without = {other: value for other, value in MEMBERS.items() if other != name}
    assert len({of(MEMBERS), of({**MEMBERS, name: SHAPING[name][1]}), of(without)}) == 3


@pytest.mark.parametrize("name", LABELS)
def test_what_only_says_who_asks_makes_no_difference(name: str) -> None:
    assert of(MEMBERS) == of({**MEMBERS, name: '"a"'}) == of({**MEMBERS, name: '{"b":1}'})


def test_inside_of_a_parameter_a_labels_name_is_none() -> None:
    inside = [json.dumps({"properties": {"user": kind}}) for kind in ("string", "number")]
    assert of({**MEMBERS, "tools": inside[0]}) != of({**MEMBERS, "tools": inside[1]})


@pytest.mark.parametrize("made_up", ['"1"', "true", '{"":"1"}', '{"\\u0000":"1"}', '{".":"1"}', "[1]", '["1"]'])
def test_nothing_that_a_client_makes_up_is_taken_for_a_number(made_up: str) -> None:
    assert of({"seed": made_up}) != of({"seed": "1"})


def test_the_order_of_a_schemas_properties_makes_another_and_that_of_parameters_does_not() -> None:
    """https://platform.openai.com/docs/guides/structured-outputs: the output has the order of its schema."""
    one, two = (
        json.dumps({"schema": {"properties": {name: {"type": "string"} for name in names}}})
        for names in (("reasons", "verdict"), ("verdict", "reasons"))
    )
    assert of({**MEMBERS, "response_format": one}) != of({**MEMBERS, "response_format": two})
    assert of(MEMBERS) == of({name: MEMBERS[name] for name in reversed(MEMBERS)})


def test_account_provider_address_model_and_endpoint_are_in_it() -> None:
    request = asked(MEMBERS)
    provider = OPENAI.provider
    targets = [
        OPENAI,
        replace(OPENAI, model="gpt-4o-mini"),
        replace(OPENAI, provider=replace(provider, name="azure")),
        replace(OPENAI, provider=replace(provider, base_url="https://example.com/v1")),
        replace(OPENAI, provider=replace(provider, query="api-version=2024-10-21")),
        replace(OPENAI, provider=replace(provider, headers={"OpenAI-Beta": "a=v1"})),
    ]
    found = [digest(ACCOUNT, group, request) for group in ([targets[0], targets[1]], *([one] for one in targets))]
    found += [digest("another", [OPENAI], request), digest(ACCOUNT, [OPENAI], asked(MEMBERS, kind="completion"))]
    assert len(set(found)) == len(found)


def test_a_credential_and_a_weight_are_not() -> None:
    other = replace(OPENAI, credential="sk-other", weight=3)
    assert digest(ACCOUNT, [other], asked(MEMBERS)) == digest(ACCOUNT, [OPENAI], asked(MEMBERS))


@pytest.mark.parametrize(
    ("parse", "body", "other"),
    [
        (
            parse_chat,
            {"messages": [{"role": "user", "content": "a"}]},
            {"messages": [{"role": "user", "content": "b"}]},
        ),
        (parse_completion, {"prompt": "a", "suffix": "b"}, {"prompt": "a", "suffix": "c"}),
        (parse_embedding, {"input": ["a", "b"]}, {"input": ["b", "a"]}),
        (parse_embedding, {"input": "a"}, {"input": "a", "dimensions": 3}),
        (parse_embedding, {"input": "a"}, {"input": "a", "encoding_format": "base64"}),
    ],
)
def test_it_is_of_whole_requests_of_every_kind(parse: Any, body: dict[str, Any], other: dict[str, Any]) -> None:
    one, two = (
        digest(ACCOUNT, [OPENAI], parse(json.dumps({"model": "m", **fields}).encode())) for fields in (body, other)
    )
    assert one != two


# --- any two requests ---------------------------------------------------------------------------------------------


class Number(str):
    """As it is written."""

    __slots__ = ()


# Few of each, so that the same come twice; and those which one might mistake for another.
_LEAVES = st.sampled_from(
    [None, True, False, "", "1", "a", ".a", "\0", "\u2028", "é", *map(Number, ("1", "1.0", "1e0", "10", "-0", "0"))]
)
_NAMES = st.sampled_from(["", "a", "b", ".a", "\0", "user", "1"])
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=6,
)
_FIELDS = st.dictionaries(
    st.sampled_from(["messages", "tools", "stop", "seed", "user", "metadata"]), _VALUES, max_size=4
)


def written(value: Any, order: random.Random) -> str:
    """JSON, with white space where it may be, and characters as they are or escaped."""
    space = order.choice(["", " ", "\n"])
    if isinstance(value, dict):
        members = [f"{json.dumps(name)}:{space}{written(inner, order)}" for name, inner in value.items()]
        return "{" + f",{space}".join(members) + "}"
    if isinstance(value, list):
        return "[" + f"{space},".join(written(inner, order) for inner in value) + "]"
    if isinstance(value, Number):
        return value
    return json.dumps(value, ensure_ascii=order.random() < 0.5)


def meaning(value: Any) -> Any:
    """Two values with the same say the same."""
    if isinstance(value, dict):
        return "object", tuple((name, meaning(inner)) for name, inner in value.items())
    if isinstance(value, list):
        return "array", tuple(meaning(inner) for inner in value)
    return type(value).__name__, value


def shaping(fields: dict[str, Any]) -> Any:
    return frozenset((name, meaning(value)) for name, value in fields.items() if name not in LABELS)


@given(_FIELDS, _FIELDS, st.randoms(use_true_random=False))
def test_two_requests_have_one_digest_when_they_say_the_same_and_only_then(
    one: dict[str, Any], two: dict[str, Any], order: random.Random
) -> None:
    digests = [of({name: written(value, order) for name, value in fields.items()}) for fields in (one, two)]
    assert (digests[0] == digests[1]) == (shaping(one) == shaping(two))


@given(_FIELDS, st.data(), st.randoms(use_true_random=False))
def test_any_change_anywhere_in_a_parameter_is_another_digest(
    fields: dict[str, Any], data: st.DataObject, order: random.Random
) -> None:
    fields = {
        "messages": [{"content": fields}],
        **{name: value for name, value in fields.items() if name not in LABELS},
    }
    changed = _changed(fields, data)
    same = of({name: written(value, order) for name, value in fields.items()})
    assert same == of({name: written(fields[name], order) for name in reversed(fields)})
    assert (same == of({name: written(value, order) for name, value in changed.items()})) == (
        meaning(changed) == meaning(fields)
    )


def _changed(value: Any, data: st.DataObject) -> Any:
    """The same with one leaf, somewhere, replaced."""
    if isinstance(value, dict) and value:
        name = data.draw(st.sampled_from(sorted(value)))
        return {**value, name: _changed(value[name], data)}
    if isinstance(value, list) and value:
        index = data.draw(st.integers(0, len(value) - 1))
        return [*value[:index], _changed(value[index], data), *value[index + 1 :]]
    return data.draw(_LEAVES)


def test_a_fingerprint_is_of_all_that_a_body_says_and_of_no_more() -> None:
    one, same, other = (b'{"a":1,"user":"b"}', b'{ "user": "\\u0062", "a": 1 }', b'{"a":1,"user":"c"}')
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


# --- what a request wants -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "standard", "default", "wish"),
    [
        ("", "", 0, None),
        ("", "no-cache", 0, None),
        ("", "stale-while-revalidate=3", 0, None),
        ("ttl=60", "", 0, Wish(60, 60)),
        (" TTL = 60 ", "", 0, Wish(60, 60)),
        ("ttl=60, pace=recorded", "", 0, Wish(60, 60, paced=True)),
        ("", "", 300, Wish(300, 300)),
        ("ttl=60", "", 300, Wish(60, 60)),
        ("refresh", "", 300, Wish(300, 300, read=False)),
        ("ttl=60", "no-cache", 0, Wish(60, 60, read=False)),
        ("bypass", "", 300, Wish(0, 0, read=False)),
        ("ttl=60", "no-store", 300, Wish(0, 0, read=False)),
        ("", "max-age=60", 0, Wish(60, 60)),
        ("", "max-age=10", 300, Wish(300, 10)),
        ("", "max-age=900", 300, Wish(300, 300)),
        ("", "max-age=0", 300, Wish(300, 0)),
        ("", "only-if-cached", 300, Wish(300, 300, only_cached=True)),
        ("", f"max-age={'9' * 30}", 0, Wish(MAX_TTL, MAX_TTL)),
    ],
)
def test_the_headers_and_the_key_say_what_is_wanted(ours: str, standard: str, default: int, wish: Wish | None) -> None:
    assert wish_of(ours, standard, default) == wish


@pytest.mark.parametrize(
    "ours",
    ["ttl=0", "ttl=-1", "ttl=x", "ttl=1.5", f"ttl={MAX_TTL + 1}", f"ttl={1:012}{9:0<12}", "ttl", "pace=fast", "on"],
)
def test_a_word_of_ours_that_is_not_understood_is_refused(ours: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wish_of(ours, "", 300)
    assert caught.value.param == "X-Gateway-Cache"


# --- what is worth it ---------------------------------------------------------------------------------------------


def choice(finish: Any, **message: Any) -> dict[str, Any]:
    return {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("choices", "worth"),
    [
        ([choice("stop", content="a")], True),
        ([{"index": 0, "text": "a", "finish_reason": "stop"}], True),
        ([choice("tool_calls", tool_calls=[call('{"a":1}'), call("")])], True),
        ([choice("tool_calls", tool_calls=[call('{"a":1}'), call('{"a":')])], False),
        ([choice("tool_calls", tool_calls=[call("[1]")])], False),
        ([choice("length", content="a")], False),
        ([choice("content_filter", content="a")], False),
        ([choice(None, content="a")], False),
        ([choice("stop", content="a"), choice("length", content="b")], False),
        ([], False),
        (None, False),
        (["stop"], False),
    ],
)
def test_only_an_answer_that_ended_by_itself_with_calls_that_can_be_made_is_kept(choices: Any, worth: bool) -> None:
    assert worth_keeping({"choices": choices}) is worth


def test_a_broken_call_of_the_older_kind_is_not_worth_keeping_either() -> None:
    def answer(arguments: str) -> dict[str, Any]:
        message = {"function_call": {"name": "f", "arguments": arguments}}
        return {"choices": [{"message": message, "finish_reason": "function_call"}]}

    assert worth_keeping(answer('{"a": 1}'))
    assert not worth_keeping(answer('{"a": '))


def test_a_body_of_nothing_but_numbers_takes_little_memory() -> None:
    body = b'{"model":"m","x":[' + b"1," * (1 << 17) + b"1]}"
    tracemalloc.start()
    fingerprint(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * len(body), "110 times as much, with an object for each"
