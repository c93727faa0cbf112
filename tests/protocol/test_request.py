import sys
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.protocol.errors import InvalidJSON, InvalidRequest
from gateway.protocol.json_object import MAX_DEPTH, edit_object, parse_object
from gateway.protocol.request import ModelRequest, max_output, parse_chat, prompt_of

pytestmark = pytest.mark.unit

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> ModelRequest:
    return parse_chat(orjson.dumps({"model": "gpt-4o", "messages": HELLO, **fields}))


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    return caught.value


# --- what is accepted ---------------------------------------------------------------------------------------------


def test_a_plain_request_is_read() -> None:
    body = b'{"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}'
    assert parse_chat(body) == ModelRequest(
        body=body, fields={"model": "gpt-4o", "messages": HELLO}, model="gpt-4o", stream=False, wants_usage=False
    )


def test_a_stream_may_ask_for_usage() -> None:
    assert chat(stream=True).wants_usage is False
    assert chat(stream=True, stream_options=None).wants_usage is False
    assert chat(stream=True, stream_options={}).wants_usage is False
    assert chat(stream=True, stream_options={"include_usage": False}).wants_usage is False
    assert chat(stream=True, stream_options={"include_usage": True}).wants_usage is True


def test_null_is_as_good_as_nothing() -> None:
    names = (
        "stream",
        "temperature",
        "tools",
        "stop",
        "n",
        "max_tokens",
        "response_format",
        "logit_bias",
        "tool_choice",
    )
    assert chat(**dict.fromkeys(names)).stream is False


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "top_p": 1, "frequency_penalty": -2, "presence_penalty": 2.0},
        {"max_tokens": 1, "max_completion_tokens": 2**40, "n": 128, "seed": -(2**63), "top_logprobs": 20},
        {"stop": "END"},
        {"stop": ["a", "b"]},
        {"tools": []},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}, "description": "d"}}]},
        {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
        {"tool_choice": "auto"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}},
        {"top_k": 40, "reasoning": {"effort": "low"}, "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_fields_of_openai_and_unknown_ones_are_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields).fields.items() >= fields.items()


@pytest.mark.parametrize(
    "message",
    [
        {"role": "developer", "content": "d"},
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "custom", "custom": {}}]},
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "content": "a", "tool_calls": None},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
        {"role": "function", "name": "f", "content": None},
    ],
)
def test_every_kind_of_message_is_accepted(message: dict[str, Any]) -> None:
    assert chat(messages=[message]).messages == [message]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("model", {"model": ""}),
        ("model", {"model": None}),
        ("model", {"model": ["gpt-4o"]}),
        ("model", {"model": "x" * 257}),
        ("model", {"model": "gpt\n4o"}),
        ("model", {"model": "gpt\u0000"}),
        ("stream", {"stream": "yes"}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("stream_options", {"stream_options": {}, "stream": False}),
        ("stream_options", {"stream_options": [], "stream": True}),
        ("stream_options.include_usage", {"stream_options": {"include_usage": 1}, "stream": True}),
        ("temperature", {"temperature": 2.1}),
        ("temperature", {"temperature": "1"}),
        ("temperature", {"temperature": True}),
        ("top_p", {"top_p": -0.1}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 1.5}),
        ("max_tokens", {"max_tokens": True}),
        ("max_completion_tokens", {"max_completion_tokens": -1}),
        ("n", {"n": 0}),
        ("n", {"n": 129}),
        ("top_logprobs", {"top_logprobs": 21}),
        ("stop", {"stop": 1}),
        ("stop", {"stop": ["a", 1]}),
        ("tools", {"tools": {}}),
        ("tools[0]", {"tools": ["f"]}),
        ("tools[0]", {"tools": [{"function": {}}]}),
        ("tools[0].function.name", {"tools": [{"type": "function"}]}),
        ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": ""}}]}),
        ("tools[0].function.parameters", {"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}),
        (
            "tools[0].function.description",
            {"tools": [{"type": "function", "function": {"name": "f", "description": 1}}]},
        ),
        ("tool_choice", {"tool_choice": 1}),
        ("tool_choice.type", {"tool_choice": {}}),
        ("tool_choice.function.name", {"tool_choice": {"type": "function"}}),
        ("response_format", {"response_format": "json"}),
        ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
        ("logit_bias", {"logit_bias": []}),
        ("user", {"user": 1}),
        ("messages", {"messages": []}),
        ("messages", {"messages": None}),
        ("messages", {"messages": "Hello"}),
        ("messages[0]", {"messages": ["Hello"]}),
        ("messages[1].role", {"messages": [*HELLO, {"role": "robot", "content": "x"}]}),
        ("messages[0].role", {"messages": [{"role": ["user"], "content": "x"}]}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": 1}]}),
        ("messages[0].content[0]", {"messages": [{"role": "user", "content": ["x"]}]}),
        ("messages[0].content[0].text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
        (
            "messages[0].content[0].image_url.url",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
        ),
        ("messages[0].tool_call_id", {"messages": [{"role": "tool", "content": "x"}]}),
        ("messages[0].tool_calls", {"messages": [{"role": "assistant", "tool_calls": {}}]}),
        ("messages[0].tool_calls[0].id", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}),
        (
            "messages[0].tool_calls[0].function.name",
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {}}]}]},
        ),
        (
            "messages[0].tool_calls[0].function.arguments",
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}]},
        ),
    ],
)
def test_a_wrong_field_is_refused_by_name(param: str, fields: dict[str, Any]) -> None:
    error = refusal(**fields)
    assert (error.param, error.http_status) == (param, 400)
    assert error.message.startswith(f"invalid {param}: ")


def nested(depth: int) -> bytes:
    return b'{"a": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"{} {}",
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud83d"}',
        b"\xef\xbb\xbf{}",
        b'{"a": ' + b"1" * 5000 + b"}",
        nested(MAX_DEPTH + 1),
        nested(100_000),
    ],
    ids=lambda body: body[:20].decode("ascii", "replace"),
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJSON):
        parse_object(body)


def test_nesting_is_accepted_up_to_its_limit() -> None:
    assert parse_object(nested(MAX_DEPTH - 1))


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "a", "model": "b"}',
        b'{"m": {"role": "user", "role": "system"}}',
        b'{"m": [{"a": 1, "a": 1}]}',
        b'{"model": "a:b", "model": "a"}',
        b'{"a": "\\u003a", "a": ":"}',
        b'{"a": "\\u003A", "b": 1, "b": 2}',
        b'{"a": 1, "\\u0061": 2}',
        b'{"a": {"x": 1}, "a": ":"}',
    ],
)
def test_a_key_that_is_there_twice_is_refused(body: bytes) -> None:
    """Two parsers may read two different requests in it: ours the one we allowed, the provider's another."""
    with pytest.raises(InvalidJSON, match="twice"):
        parse_object(body)


def test_depth_that_hides_behind_a_key_that_is_there_twice_is_refused() -> None:
    said = "twice in one object" if sys.version_info >= (3, 12) else "nested deeper than 64 levels"
    with pytest.raises(InvalidJSON, match=said):  # later ones parse it to its end
        parse_object(b'{"a": ' + b"[" * 1015 + b"]" * 1015 + b', "a": 1}')


def test_colons_inside_strings_and_keys_are_no_second_key() -> None:
    body = b'{"a:b": "http://x:1/", "t": "\\u003a", "u": ["12:30", {"::": ":"}]}'
    assert parse_object(body) == {"a:b": "http://x:1/", "t": ":", "u": ["12:30", {"::": ":"}]}


# --- how long the answer may be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({}, None),
        ({"max_tokens": None}, None),
        ({"max_tokens": 9}, 9),
        ({"max_completion_tokens": 7, "max_tokens": 9}, 7),
        ({"max_completion_tokens": 9, "max_tokens": 7, "n": 2}, 14),
        ({"max_tokens": 9, "n": None}, 9),
    ],
)
def test_the_most_that_an_answer_may_cost_is_its_limit_times_its_choices(
    fields: dict[str, Any], most: int | None
) -> None:
    assert max_output(chat(**fields)) == most


# --- the prompt's text --------------------------------------------------------------------------------------------


def test_all_text_of_the_prompt_is_counted() -> None:
    request = chat(
        messages=[
            {"role": "system", "content": "one"},
            {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "input_audio", "input_audio": {}}]},
            {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "three", "arguments": "four"}}]},
            {"role": "assistant", "tool_calls": [{"id": "d", "type": "custom"}]},
            {"role": "tool", "tool_call_id": "c", "content": "five"},
        ],
        tools=[{"type": "function", "function": {"name": "six"}}],
    )
    text = [piece for piece in prompt_of(request).texts if piece]
    assert text == ["one", "two", "three", "four", "five", '[{"type":"function","function":{"name":"six"}}]']


# --- changing a body ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "changes", "edited"),
    [
        ('{"model":"a","n":1}', {"model": "b"}, '{"model":"b","n":1}'),
        ('{ "model" : "a" , "n" : 1 }', {"model": "b"}, '{ "model" : "b" , "n" : 1 }'),
        ('{"model":"a"}', {"stream_options": {"include_usage": True}}, '{"stream_options":{"include_usage":true},"model":"a"}'),
        ('\n{\t}\n', {"model": "b"}, '\n{"model":"b"\t}\n'),
        ('{"x":{"model":"a"},"model":"a"}', {"model": "b"}, '{"x":{"model":"a"},"model":"b"}'),
        ('{"m\\u006fdel":"a"}', {"model": "b"}, '{"m\\u006fdel":"b"}'),
        ('{"t":"日本 \\"}{","model":"ä"}', {"model": "ü"}, '{"t":"日本 \\"}{","model":"ü"}'),
        ('{"f":1.0e2,"model":"a","g":0.10}', {"model": "b"}, '{"f":1.0e2,"model":"b","g":0.10}'),
        ('{"b":1,"a":2}', {"a": 3, "b": 4, "c": 5}, '{"c":5,"b":4,"a":3}'),
    ],
)  # fmt: skip
def test_only_the_changed_values_change(body: str, changes: dict[str, Any], edited: str) -> None:
    assert edit_object(body.encode(), changes).decode() == edited


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), values, max_size=5), values, st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_an_edited_object_is_the_object_with_the_change(fields: dict[str, Any], value: Any, indent: bool) -> None:
    body = orjson.dumps(fields, option=orjson.OPT_INDENT_2 if indent else 0)
    assert parse_object(edit_object(body, {"model": value})) == {**fields, "model": value}
