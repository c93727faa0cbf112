"""What Anthropic is asked for, given what a client of OpenAI's API asks for."""

import base64
import re
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from gateway.protocol.dialects.anthropic.models import traits_of
from gateway.protocol.dialects.anthropic.names import legal_name
from gateway.protocol.dialects.anthropic.request import messages_body
from gateway.protocol.dialects.anthropic.schema import plain_schema
from gateway.protocol.dialects.anthropic.thinking import MAX_TOKENS_UNSTREAMED
from gateway.protocol.dialects.anthropic.tools import offered_tools
from gateway.protocol.errors import InvalidRequest, UnsupportedParameter
from gateway.protocol.request import parse_chat

pytestmark = pytest.mark.unit

Json = dict[str, Any]
OLD, MIDDLE, NEW, ALWAYS = "claude-sonnet-4-5", "claude-opus-4-6", "claude-opus-4-8", "claude-opus-5-5"
STAND_IN = "mock-claude"
USER = {"role": "user", "content": "Hi."}
HI = {"role": "user", "content": [{"type": "text", "text": "Hi."}]}


def sent(model: str = OLD, **fields: Any) -> Json:
    chat = parse_chat(orjson.dumps({"model": model, "messages": [USER], **fields}))
    return messages_body(chat, model)


def turns(*messages: Json, model: str = OLD) -> list[Json]:
    conversation: list[Json] = sent(model, messages=list(messages))["messages"]
    return conversation


def refused(model: str = OLD, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        sent(model, **fields)
    return caught.value


def function(name: str = "get_weather", **more: Any) -> Json:
    return {"type": "function", "function": {"name": name, **more}}


def call(call_id: str, name: str = "get_weather", arguments: str = "{}") -> Json:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*made: Json, **more: Any) -> Json:
    return {"role": "assistant", "content": None, "tool_calls": list(made), **more}


def result(call_id: str, content: Any = "17 degrees") -> Json:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def user_part(part: Json) -> Any:
    return turns({"role": "user", "content": [part]})[0]["content"]


# --- parameters ---------------------------------------------------------------------------------------------------


def test_a_plain_request_has_only_what_anthropic_requires() -> None:
    assert sent() == {"model": OLD, "max_tokens": MAX_TOKENS_UNSTREAMED, "messages": [HI], "stream": False}


def test_hints_that_anthropic_does_not_know_are_left_out() -> None:
    hints = {
        "seed": 1,
        "frequency_penalty": 1,
        "presence_penalty": 1,
        "logit_bias": {"1": 5},
        "verbosity": "low",
        "store": True,
        "prediction": {"type": "content", "content": "x"},
        "logprobs": False,
        "n": 1,
        "modalities": ["text"],
        "metadata": {"a": "b"},
        "prompt_cache_key": "k",
        "min_p": 0.1,
        "provider": {"order": []},
        "stream_options": {"include_usage": True},
        "stream": True,
    }
    for model in (OLD, NEW, STAND_IN):
        assert sent(model, **hints) == sent(model, stream=True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"modalities": 5}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, calls(function_call={"name": "f"})]}, "messages[1].function_call"),
        ({"messages": [USER, calls(audio={"id": "a"})]}, "messages[1].audio"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(fields: Json, param: str) -> None:
    error = refused(**fields)
    assert isinstance(error, UnsupportedParameter)
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize(
    ("model", "stream", "given", "expected"),
    [
        (NEW, True, {}, 128_000),
        (NEW, False, {}, MAX_TOKENS_UNSTREAMED),
        (NEW, True, {"max_tokens": 7}, 7),
        (NEW, True, {"max_tokens": 7, "max_completion_tokens": 9}, 9),
        (NEW, True, {"max_tokens": 1_000_000}, 128_000),
        ("claude-opus-4-1", True, {"max_tokens": 64_000}, 32_000),
        ("claude-3-haiku-20240307", True, {}, 4_096),
        ("claude-3-haiku-20240307", False, {}, 4_096),
        ("claude-sonnet-9", True, {}, 32_000),
        ("claude-sonnet-9", True, {"max_tokens": 1_000_000}, 1_000_000),
        (STAND_IN, True, {}, 8_192),
        (STAND_IN, True, {"max_tokens": 1_000_000}, 1_000_000),
    ],
)
def test_max_tokens_is_always_said_and_never_above_the_cap(
    model: str, stream: bool, given: Json, expected: int
) -> None:
    assert sent(model, stream=stream, **given)["max_tokens"] == expected


def test_models_that_sample_get_temperature_up_to_1() -> None:
    assert sent(OLD, temperature=1.7)["temperature"] == 1
    assert sent(MIDDLE, temperature=0.2)["temperature"] == 0.2
    assert sent(STAND_IN, temperature=0)["temperature"] == 0


def test_claude_gets_temperature_or_top_p_and_a_stand_in_both() -> None:
    assert "top_p" not in sent(OLD, temperature=0.2, top_p=0.9)
    assert sent(OLD, top_p=0.9)["top_p"] == 0.9
    assert sent(STAND_IN, temperature=0.2, top_p=0.9)["top_p"] == 0.9


@pytest.mark.parametrize("model", [NEW, ALWAYS, "claude-sonnet-5", "claude-sonnet-9", "claude-opus-5-6"])
def test_models_that_refuse_sampling_parameters_do_not_get_them(model: str) -> None:
    assert sent(model, temperature=1, top_p=1, top_k=5) == sent(model)


def test_top_k_reaches_the_models_that_take_it() -> None:
    assert sent(OLD, top_k=5)["top_k"] == 5
    assert sent(STAND_IN, top_k=5)["top_k"] == 5
    assert refused(top_k="5").param == "top_k"


def test_stop_sequences_of_white_space_are_left_out() -> None:
    assert sent(stop="END")["stop_sequences"] == ["END"]
    assert sent(stop=["\n", "a", " "])["stop_sequences"] == ["a"]
    assert "stop_sequences" not in sent(stop=["\n\n"])


def test_the_service_tier_is_translated_or_left_out() -> None:
    assert sent(service_tier="auto")["service_tier"] == "auto"
    assert sent(service_tier="default")["service_tier"] == "standard_only"
    assert "service_tier" not in sent(service_tier="flex")


def test_the_user_is_passed_on_and_the_safety_identifier_goes_before_it() -> None:
    assert sent(user="u-1")["metadata"] == {"user_id": "u-1"}
    assert sent(user="u-1", safety_identifier="s-1")["metadata"] == {"user_id": "s-1"}


@pytest.mark.parametrize("user", ["ada@example.org", "+49 151 2345678", "x" * 257])
def test_a_user_that_names_a_person_is_sent_as_a_digest(user: str) -> None:
    user_id = sent(user=user)["metadata"]["user_id"]
    assert re.fullmatch("[0-9a-f]{64}", user_id)
    assert user_id == sent(user=user)["metadata"]["user_id"]


def test_top_level_cache_control_is_passed_on() -> None:
    assert sent(cache_control={"type": "ephemeral"})["cache_control"] == {"type": "ephemeral"}
    assert "cache_control" not in sent(cache_control="yes")


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "as_model"),
    [
        ("claude-opus-4-5-20251101", "claude-opus-4-5"),
        ("claude-opus-4-20250514", "claude-opus-4-0"),
        ("claude-sonnet-4@20250514", "claude-sonnet-4-0"),
        ("claude-3-7-sonnet-latest", "claude-3-7-sonnet"),
        ("claude-opus-5-20260401", "claude-opus-5"),
        ("claude-opus-5-5-20261001", "claude-opus-5-5"),
        ("claude-fable-5-1", "claude-fable-5"),
        ("claude-opus-5-6", "claude-sonnet-9"),
        ("claude-haiku-5", "claude-sonnet-9"),
        ("anthropic.claude-opus-5", STAND_IN),
    ],
)
def test_a_date_belongs_to_a_model_and_another_version_does_not(model: str, as_model: str) -> None:
    assert traits_of(model) == traits_of(as_model)
    assert traits_of("claude-opus-5") != traits_of("claude-opus-5-5")


# --- thinking -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "effort", "thinking", "output"),
    [
        (NEW, "minimal", {"type": "adaptive", "display": "summarized"}, {"effort": "low"}),
        (NEW, "xhigh", {"type": "adaptive", "display": "summarized"}, {"effort": "xhigh"}),
        (NEW, "none", {"type": "disabled"}, None),
        (MIDDLE, "xhigh", {"type": "adaptive", "display": "summarized"}, {"effort": "high"}),
        (MIDDLE, "max", {"type": "adaptive", "display": "summarized"}, {"effort": "max"}),
        (ALWAYS, "none", None, {"effort": "low"}),
        ("claude-sonnet-5", "none", {"type": "disabled"}, None),
        ("claude-sonnet-9", "medium", {"type": "adaptive", "display": "summarized"}, {"effort": "medium"}),
        ("claude-sonnet-9", "none", None, {"effort": "low"}),
        (OLD, "low", {"type": "enabled", "budget_tokens": 1_024}, None),
        (OLD, "max", {"type": "enabled", "budget_tokens": 16_384}, None),
        (STAND_IN, "none", {"type": "disabled"}, None),
        ("claude-3-5-haiku-latest", "high", None, None),
    ],
)
def test_an_effort_becomes_what_the_model_understands(
    model: str, effort: str, thinking: Json | None, output: Json | None
) -> None:
    body = sent(model, reasoning_effort=effort)
    assert body.get("thinking") == thinking
    assert body.get("output_config") == output


@pytest.mark.parametrize("model", [OLD, NEW, ALWAYS, STAND_IN])
def test_nothing_is_said_of_thinking_unless_the_client_does(model: str) -> None:
    assert not {"thinking", "output_config"} & sent(model).keys()


def test_a_budget_raises_the_clients_max_tokens_and_stays_below_the_cap() -> None:
    assert sent(OLD, reasoning_effort="high", max_tokens=100)["max_tokens"] == 100 + 4_096
    body = sent("claude-opus-4-1", reasoning_effort="max", max_tokens=30_000)
    assert (body["max_tokens"], body["thinking"]["budget_tokens"]) == (32_000, 16_384)
    body = sent(STAND_IN, reasoning_effort="max")
    assert (body["max_tokens"], body["thinking"]["budget_tokens"]) == (8_192, 8_191)


def test_a_model_that_thinks_gets_no_sampling_parameters() -> None:
    assert "temperature" not in sent(OLD, temperature=0.5, reasoning_effort="low")
    assert "temperature" not in sent(MIDDLE, temperature=0.5, reasoning_effort="low")
    assert sent(OLD, temperature=0.5, reasoning_effort="none")["temperature"] == 0.5


def test_an_unknown_effort_is_refused() -> None:
    assert refused(reasoning_effort="huge").param == "reasoning_effort"


def test_anthropics_own_thinking_goes_as_it_is() -> None:
    given = {"type": "enabled", "budget_tokens": 5_000}
    body = sent(OLD, thinking=given, temperature=0.5)
    assert body["thinking"] == given
    assert "temperature" not in body
    assert sent(NEW, thinking={"type": "disabled"}, reasoning_effort="max")["output_config"] == {"effort": "high"}
    assert refused(thinking="on").param == "thinking"


def test_a_forced_tool_excludes_thinking() -> None:
    forced = {"tools": [function()], "tool_choice": "required", "reasoning_effort": "max"}
    assert "thinking" not in sent(OLD, **forced)
    assert "thinking" not in sent(NEW, **forced)
    body = sent("claude-opus-5", **forced)
    assert body["thinking"] == {"type": "disabled"}
    assert body["output_config"] == {"effort": "high"}
    assert body["tool_choice"] == {"type": "any"}


def test_a_forced_tool_is_refused_where_thinking_cannot_be_switched_off() -> None:
    forced = {"tools": [function()], "tool_choice": "required"}
    assert refused(ALWAYS, **forced).param == "tool_choice"
    assert refused(NEW, thinking={"type": "adaptive"}, **forced).param == "tool_choice"
    assert sent("claude-sonnet-9", **forced)["tool_choice"] == {"type": "any"}


def test_a_tool_loop_goes_on_without_a_budget_when_its_thinking_did_not_come_back() -> None:
    signed = [{"type": "reasoning.text", "text": "Hm.", "signature": "s"}]
    bare = [USER, calls(call("c1")), result("c1")]
    whole = [USER, calls(call("c1"), reasoning_details=signed), result("c1")]
    later = [*bare, {"role": "assistant", "content": "17."}, USER]
    assert "thinking" not in sent(OLD, messages=bare, tools=[function()], reasoning_effort="low")
    assert "thinking" in sent(OLD, messages=whole, tools=[function()], reasoning_effort="low")
    assert "thinking" in sent(OLD, messages=later, tools=[function()], reasoning_effort="low")
    assert "thinking" in sent(NEW, messages=bare, tools=[function()], reasoning_effort="low")


# --- thinking that comes back -------------------------------------------------------------------------------------


def replayed(model: str = OLD, **message: Any) -> list[Json]:
    blocks: list[Json] = turns(USER, {"role": "assistant", "content": "A.", **message}, USER, model=model)[1]["content"]
    return blocks


ANSWER = {"type": "text", "text": "A."}


def test_reasoning_details_come_back_first_and_byte_for_byte() -> None:
    details = [
        {"type": "reasoning.text", "text": " Hm…\n", "signature": "sig==", "index": 0, "format": "anthropic-claude-v1"},
        {"type": "reasoning.encrypted", "data": "Zm9v", "index": 1},
    ]
    assert replayed(reasoning_details=details) == [
        {"type": "thinking", "thinking": " Hm…\n", "signature": "sig=="},
        {"type": "redacted_thinking", "data": "Zm9v"},
        ANSWER,
    ]


def test_the_pieces_of_a_stream_may_come_back_unjoined() -> None:
    details = [
        {"type": "reasoning.text", "text": "Two", "index": 0},
        {"type": "reasoning.text", "text": " plus", "index": 0},
        {"type": "reasoning.text", "text": "", "index": 0, "signature": "s1"},
        {"type": "reasoning.text", "text": "Next.", "index": 1},
        {"type": "reasoning.text", "text": "", "index": 1, "signature": "s2"},
    ]
    assert replayed(reasoning_details=details)[:2] == [
        {"type": "thinking", "thinking": "Two plus", "signature": "s1"},
        {"type": "thinking", "thinking": "Next.", "signature": "s2"},
    ]


def test_a_thinking_block_with_a_signature_and_no_text_is_kept() -> None:
    details = [{"type": "reasoning.text", "text": "", "signature": "only"}]
    assert replayed(reasoning_details=details)[0] == {"type": "thinking", "thinking": "", "signature": "only"}


def test_litellms_thinking_blocks_are_understood() -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "redacted_thinking", "data": "Zm9v"},
    ]
    assert replayed(thinking_blocks=blocks) == [*blocks, ANSWER]


@pytest.mark.parametrize(
    "details",
    [
        [{"type": "reasoning.text", "text": "unsigned"}],
        [{"type": "reasoning.encrypted", "data": "x", "format": "openai-responses-v1"}],
        [{"type": "reasoning.text", "text": "x", "signature": "s", "format": "google-gemini-v1"}],
        [{"type": "reasoning.summary", "summary": "x"}, 5, None, {}],
        "text",
    ],
)
def test_thinking_that_is_not_anthropics_is_left_out(details: Any) -> None:
    assert replayed(reasoning_details=details, reasoning_content="x") == [ANSWER]


def test_a_model_that_cannot_think_gets_no_thinking_blocks() -> None:
    details = [{"type": "reasoning.text", "text": "Hm.", "signature": "s"}]
    assert replayed("claude-3-5-haiku-latest", reasoning_details=details) == [ANSWER]


# --- structured output --------------------------------------------------------------------------------------------


def test_a_json_schema_becomes_an_output_format() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema, "description": "D"}}
    body = sent(OLD, response_format=wanted)
    assert body["output_config"] == {
        "format": {
            "type": "json_schema",
            "schema": {**schema, "additionalProperties": False, "description": "D"},
        }
    }
    assert "system" not in body


def test_the_output_format_and_the_effort_travel_together() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    body = sent(NEW, response_format=wanted, reasoning_effort="low")
    assert body["output_config"].keys() == {"format", "effort"}


def test_a_schema_is_refused_by_a_model_that_cannot_be_held_to_one() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    assert refused("claude-3-haiku-20240307", response_format=wanted).param == "response_format"


@pytest.mark.parametrize(
    "wanted", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "anything"}}]
)
def test_json_without_a_schema_is_asked_for_in_words_after_the_clients_own(wanted: Json) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    system = sent(NEW, response_format=wanted, messages=messages)["system"]
    assert [block["text"][:9] for block in system] == ["Be brief.", "Answer wi"]
    assert "JSON" in system[1]["text"]


def test_a_text_format_changes_nothing() -> None:
    assert sent(response_format={"type": "text"}) == sent()


def test_keywords_that_constrained_output_lacks_become_words() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "age": {"type": "integer", "minimum": 0, "maximum": 150, "description": "In years"},
            "mail": {"type": "string", "format": "email", "pattern": "@"},
            "phone": {"type": "string", "format": "phone"},
            "tags": {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 5},
            "either": {"oneOf": [{"type": "null"}, {"type": "object", "properties": {}}]},
            "any": {"type": "object", "additionalProperties": {"type": "string"}},
            "odd": {"type": ["object", "null"], "format": ["x"], "description": 5},
        },
        "required": ["age"],
    }
    assert plain_schema(schema) == {
        "type": "object",
        "properties": {
            "age": {"type": "integer", "description": "In years (minimum: 0, maximum: 150)"},
            "mail": {"type": "string", "format": "email", "description": '(pattern: "@")'},
            "phone": {"type": "string", "description": '(format: "phone")'},
            "tags": {
                "type": "array",
                "items": {"type": "string", "description": "(minLength: 1)"},
                "description": "(maxItems: 5)",
            },
            "either": {
                "anyOf": [{"type": "null"}, {"type": "object", "properties": {}, "additionalProperties": False}]
            },
            "any": {
                "type": "object",
                "additionalProperties": False,
                "description": '(additionalProperties: {"type":"string"})',
            },
            "odd": {"type": ["object", "null"], "additionalProperties": False, "description": '(format: ["x"])'},
        },
        "required": ["age"],
        "additionalProperties": False,
    }


def test_a_reference_stands_alone_with_the_definitions() -> None:
    schema = {
        "$ref": "#/$defs/a",
        "title": "x",
        "$defs": {"a": {"type": "object", "properties": {"n": {"type": "number", "multipleOf": 2}}}},
    }
    inner = {"n": {"type": "number", "description": "(multipleOf: 2)"}}
    assert plain_schema(schema) == {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"type": "object", "properties": inner, "additionalProperties": False}},
    }


# --- tools --------------------------------------------------------------------------------------------------------


def tool(**more: Any) -> Json:
    tools: list[Json] = sent(tools=[function(**more)])["tools"]
    return tools[0]


def test_a_function_becomes_a_tool() -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "minLength": 1}}}
    assert tool(description="Weather.", parameters=parameters) == {
        "name": "get_weather",
        "description": "Weather.",
        "input_schema": parameters,
    }


@pytest.mark.parametrize("parameters", [None, {}, {"type": "string"}])
def test_the_root_of_a_tool_is_an_object(parameters: Json | None) -> None:
    assert tool(parameters=parameters)["input_schema"] == {"type": "object", "properties": {}}


def test_a_strict_tool_stays_strict_with_a_schema_that_can_be_enforced() -> None:
    parameters = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}}
    strict = tool(parameters=parameters, strict=True)
    assert strict["strict"] is True
    assert strict["input_schema"] == plain_schema(parameters)
    assert "strict" not in sent("claude-3-haiku-20240307", tools=[function(strict=True)])["tools"][0]


def test_illegal_names_become_legal_and_different_and_are_known_again() -> None:
    names = ["a.b", "a:b", "a b", "ä" * 200, "a_b", "x" * 129, "get-weather_2"]
    sent_names = [tool["name"] for tool in sent(tools=[function(name) for name in names])["tools"]]
    assert all(re.fullmatch("[a-zA-Z0-9_-]{1,128}", name) for name in sent_names)
    assert len(set(sent_names)) == len(names)
    assert sent_names[-1] == "get-weather_2"
    known = offered_tools({"tools": [function(name) for name in names]})
    assert [known[name].name for name in sent_names] == names


def test_a_call_in_the_history_has_the_name_that_its_tool_has() -> None:
    body = sent(messages=[USER, calls(call("c1", "a.b")), result("c1")], tools=[function("a.b")])
    assert body["messages"][1]["content"][0]["name"] == body["tools"][0]["name"] == legal_name("a.b")


def test_a_custom_tool_takes_its_text_as_the_one_member_of_an_object() -> None:
    custom = {"type": "custom", "custom": {"name": "run", "description": "Runs it."}}
    body = sent(tools=[custom], tool_choice={"type": "custom", "custom": {"name": "run"}})
    assert body["tools"] == [
        {
            "name": "run",
            "input_schema": {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]},
            "description": "Runs it.",
        }
    ]
    assert body["tool_choice"] == {"type": "tool", "name": "run"}


def test_a_custom_call_in_the_history_keeps_its_text() -> None:
    made = {"id": "c1", "type": "custom", "custom": {"name": "run", "input": "ls"}}
    custom = {"type": "custom", "custom": {"name": "run", "format": {"type": "text"}}}
    body = sent(messages=[USER, calls(made), result("c1")], tools=[custom])
    assert body["messages"][1]["content"][0]["input"] == {"input": "ls"}


def test_a_custom_tool_with_a_grammar_is_refused() -> None:
    custom = {"type": "custom", "custom": {"name": "run", "format": {"type": "grammar", "grammar": {}}}}
    error = refused(tools=[custom])
    assert isinstance(error, UnsupportedParameter)
    assert error.param == "tools[0].custom.format"


def test_a_custom_tool_without_a_name_is_refused() -> None:
    assert refused(tools=[{"type": "custom", "custom": 5}]).param == "tools[0].custom.name"
    assert offered_tools({"tools": [{"type": "custom", "custom": 5}]}) == {}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None),
        ("auto", None),
        ("none", {"type": "none"}),
        ("required", {"type": "any"}),
        ({"type": "function", "function": {"name": "get_weather"}}, {"type": "tool", "name": "get_weather"}),
    ],
)
def test_a_tool_choice_is_translated(choice: Any, expected: Json | None) -> None:
    assert sent(tools=[function()], tool_choice=choice).get("tool_choice") == expected


def test_calls_one_at_a_time_need_a_tool_choice_to_say_so() -> None:
    one = {"disable_parallel_tool_use": True}
    assert sent(tools=[function()], parallel_tool_calls=False)["tool_choice"] == {"type": "auto", **one}
    assert sent(tools=[function()], parallel_tool_calls=False, tool_choice="required")["tool_choice"] == {
        "type": "any",
        **one,
    }
    assert sent(tools=[function()], parallel_tool_calls=False, tool_choice="none")["tool_choice"] == {"type": "none"}
    assert "tool_choice" not in sent(tools=[function()], parallel_tool_calls=True)
    assert "tool_choice" not in sent(parallel_tool_calls=False)


def test_allowed_tools_are_the_only_ones_offered() -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "b"}}]}
    body = sent(tools=[function("a"), function("b")], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert [tool["name"] for tool in body["tools"]] == ["b"]
    assert body["tool_choice"] == {"type": "any"}


@pytest.mark.parametrize(
    "choice",
    [
        "sometimes",
        {"type": "function", "function": {"name": "unknown"}},
        {"type": "custom"},
        {"type": "mcp"},
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "allowed_tools": {"tools": [{"type": "function", "function": {"name": "x"}}, 5]}},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "never", "tools": [{"type": "function", "function": {"name": "get_weather"}}]},
        },
    ],
)
def test_a_tool_choice_that_means_nothing_is_refused(choice: Any) -> None:
    assert refused(tools=[function()], tool_choice=choice).param == "tool_choice"


def test_a_forced_tool_needs_tools() -> None:
    assert refused(tool_choice="required").param == "tool_choice"
    assert sent(tool_choice="none") == sent(tool_choice="auto", tools=[]) == sent()


def test_a_conversation_that_used_tools_defines_them_even_if_none_is_offered() -> None:
    body = sent(messages=[USER, calls(call("c1"), call("c2")), result("c1"), result("c2")])
    assert [tool["name"] for tool in body["tools"]] == ["get_weather"]
    assert body["tool_choice"] == {"type": "none"}


# --- the conversation ---------------------------------------------------------------------------------------------


def test_leading_system_messages_become_blocks_in_order() -> None:
    messages = [
        {"role": "system", "content": "One."},
        {"role": "developer", "content": [{"type": "text", "text": "Two.", "cache_control": {"type": "ephemeral"}}]},
        {"role": "system", "content": " "},
        USER,
    ]
    body = sent(messages=messages)
    assert body["system"] == [
        {"type": "text", "text": "One."},
        {"type": "text", "text": "Two.", "cache_control": {"type": "ephemeral"}},
    ]
    assert body["messages"] == [HI]


def test_messages_of_one_role_are_one_turn() -> None:
    assistant = {"role": "assistant", "content": "A."}
    conversation = turns(USER, {"role": "user", "content": "You?"}, assistant, assistant, USER)
    assert [turn["role"] for turn in conversation] == ["user", "assistant", "user"]
    assert [block["text"] for block in conversation[0]["content"]] == ["Hi.", "You?"]
    assert [block["text"] for block in conversation[1]["content"]] == ["A.", "A."]


def test_empty_texts_are_left_out_and_an_empty_turn_says_so() -> None:
    empty = {"role": "user", "content": [{"type": "text", "text": " \n"}, {"type": "text", "text": ""}]}
    conversation = turns(empty, {"role": "assistant", "content": None}, USER)
    assert [turn["content"][0]["text"] for turn in conversation] == ["(empty)", "(empty)", "Hi."]


def test_the_first_turn_is_the_users() -> None:
    conversation = turns({"role": "assistant", "content": "Welcome."}, USER)
    assert [turn["role"] for turn in conversation] == ["user", "assistant", "user"]
    assert [turn["role"] for turn in turns({"role": "system", "content": "Only this."})] == ["user"]


def test_a_refusal_in_the_history_is_text() -> None:
    as_field = {"role": "assistant", "content": None, "refusal": "No."}
    as_part = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    for message in (as_field, as_part):
        assert turns(USER, message, USER)[1]["content"] == [{"type": "text", "text": "No."}]


def test_the_result_of_each_call_comes_first_in_one_user_turn() -> None:
    conversation = turns(
        USER,
        {"role": "assistant", "content": "Looking.", "tool_calls": [call("c1", arguments='{"a":1}'), call("c2")]},
        result("c2", "two"),
        {"role": "user", "content": "Quick!"},
        result("c1", [{"type": "text", "text": "one"}]),
    )
    assert conversation[1]["content"] == [
        {"type": "text", "text": "Looking."},
        {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"a": 1}},
        {"type": "tool_use", "id": "c2", "name": "get_weather", "input": {}},
    ]
    assert conversation[2]["content"] == [
        {"type": "tool_result", "tool_use_id": "c2", "content": "two"},
        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "one"}]},
        {"type": "text", "text": "Quick!"},
    ]


def test_an_empty_result_has_no_content() -> None:
    assert turns(USER, calls(call("c1")), result("c1", ""))[2]["content"] == [
        {"type": "tool_result", "tool_use_id": "c1"}
    ]


@pytest.mark.parametrize("arguments", ["{broken", "[1]", '"x"', '{"a": "\\ud800"}', "[" * 300 + "]" * 300, "[" * 5000])
def test_arguments_that_are_no_object_go_as_they_are(arguments: str) -> None:
    block = turns(USER, calls(call("c1", arguments=arguments)), result("c1"))[1]["content"][0]
    assert block["input"] == {"_raw": arguments}


def test_ids_of_other_vendors_become_legal_and_stay_together() -> None:
    conversation = turns(
        USER,
        calls(call("get:0"), call("get.0"), call("")),
        result("get.0"),
        result("get:0"),
        result(""),
    )
    made = [block["id"] for block in conversation[1]["content"]]
    answered = [block["tool_use_id"] for block in conversation[2]["content"]]
    assert all(re.fullmatch("[a-zA-Z0-9_-]+", call_id) for call_id in made)
    assert len(set(made)) == 3
    assert answered == [made[1], made[0], made[2]]


def test_an_id_that_comes_again_in_a_later_turn_is_made_different() -> None:
    conversation = turns(USER, calls(call("call_0")), result("call_0"), calls(call("call_0")), result("call_0"))
    first, second = conversation[1]["content"][0]["id"], conversation[3]["content"][0]["id"]
    assert first != second
    assert conversation[2]["content"][0]["tool_use_id"] == first
    assert conversation[4]["content"][0]["tool_use_id"] == second


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([USER, result("c1")], "messages[1].tool_call_id"),
        ([USER, calls(call("c1")), result("c1"), result("c1")], "messages[3].tool_call_id"),
        ([USER, calls(call("c1")), USER], "messages"),
        ([USER, calls(call("c1"))], "messages"),
        ([USER, calls(call("c1")), calls(call("c2"))], "messages"),
        ([USER, calls(call("c1"), call("c1"))], "messages[1].tool_calls[1].id"),
        ([USER, calls({"id": "c1", "type": "custom"})], "messages[1].tool_calls[0]"),
    ],
)
def test_calls_and_results_that_do_not_match_are_refused(messages: list[Json], param: str) -> None:
    assert refused(messages=messages).param == param


def test_the_missing_results_are_named() -> None:
    error = refused(messages=[USER, calls(call("c1"), call("c2")), result("c1")])
    assert error.message.endswith(": c2")


def test_a_model_that_can_continue_an_answer_gets_it_without_white_space_at_its_end() -> None:
    assert turns(USER, {"role": "assistant", "content": "The answer is \n"})[1]["content"] == [
        {"type": "text", "text": "The answer is"}
    ]


@pytest.mark.parametrize("model", [MIDDLE, NEW, "claude-sonnet-9"])
def test_a_model_that_cannot_continue_an_answer_refuses_one(model: str) -> None:
    error = refused(model, messages=[USER, {"role": "assistant", "content": "The answer is"}])
    assert isinstance(error, UnsupportedParameter)
    assert error.param == "messages"


SYSTEM = {"role": "system", "content": "Be brief."}
AS_SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
AS_USER = {"type": "text", "text": "System message: Be brief."}
ASSISTANT = {"role": "assistant", "content": "A."}


def test_a_later_system_message_stays_where_the_model_takes_one() -> None:
    assert turns(USER, SYSTEM, model=NEW) == [HI, AS_SYSTEM]
    assert turns(USER, SYSTEM, ASSISTANT, USER, model=NEW)[1] == AS_SYSTEM


def test_two_later_system_messages_are_one() -> None:
    assert turns(USER, SYSTEM, SYSTEM, model=NEW)[1]["content"] == [*AS_SYSTEM["content"], *AS_SYSTEM["content"]]


def test_a_system_message_between_calls_and_results_comes_after_them() -> None:
    conversation = turns(USER, calls(call("c1")), SYSTEM, result("c1"), model=NEW)
    assert [turn["role"] for turn in conversation] == ["user", "assistant", "user", "system"]


@pytest.mark.parametrize(
    ("model", "messages"),
    [
        (OLD, [USER, SYSTEM]),
        ("claude-opus-4-7", [USER, SYSTEM]),
        ("claude-sonnet-9", [USER, SYSTEM]),
        (STAND_IN, [USER, SYSTEM]),
        (NEW, [USER, SYSTEM, USER]),
        (NEW, [USER, ASSISTANT, SYSTEM]),
        (NEW, [USER, ASSISTANT, SYSTEM, USER]),
    ],
)
def test_elsewhere_a_later_system_message_is_a_users_that_says_so(model: str, messages: list[Json]) -> None:
    conversation = turns(*messages, model=model)
    assert all(turn["role"] != "system" for turn in conversation)
    assert AS_USER in conversation[-1]["content"]


def test_a_longer_conversation_begins_with_the_same_bytes() -> None:
    """Prompt caches and signatures of thinking blocks rest on it."""
    messages = [
        SYSTEM,
        USER,
        calls(call("call_0")),
        SYSTEM,
        result("call_0"),
        calls(call("call_0")),
        result("call_0"),
        SYSTEM,
        ASSISTANT,
        USER,
    ]
    whole = turns(*messages, model=NEW)
    shorter = turns(*messages[:8], model=NEW)
    assert whole[: len(shorter)] == shorter


# --- parts --------------------------------------------------------------------------------------------------------


def image(url: str) -> Json:
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def test_an_image_is_passed_on_by_address_or_by_its_bytes() -> None:
    address = "https://example.org/a.png"
    assert user_part(image(address)) == [{"type": "image", "source": {"type": "url", "url": address}}]
    assert user_part(image("data:image/jpg;charset=utf-8;base64,QUJD")) == [
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "QUJD"}}
    ]


@pytest.mark.parametrize(
    "url", ["data:image/tiff;base64,QUJD", "data:image/png,raw", "file:///etc/passwd", "data:", "gs://b/o", ""]
)
def test_an_image_of_another_kind_is_refused(url: str) -> None:
    messages = [{"role": "user", "content": [image(url)]}]
    assert refused(messages=messages).param == "messages[0].content[0].image_url.url"


def file(**fields: Any) -> Json:
    return {"type": "file", "file": fields}


def test_a_pdf_becomes_a_document() -> None:
    document = {
        "type": "document",
        "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="},
        "title": "a.pdf",
    }
    assert user_part(file(filename="a.pdf", file_data="data:application/pdf;base64,JVBERg==")) == [document]
    assert user_part(file(filename="a.pdf", file_data="JVBERg==")) == [document]


def test_a_text_file_becomes_a_document_of_text() -> None:
    data = base64.b64encode("naïve".encode()).decode()
    assert user_part(file(file_data=f"data:text/markdown;base64,{data}")) == [
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "naïve"}}
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"file_id": "file-1"}, "file_id"),
        ({"file_data": "data:application/zip;base64,QUJD"}, "file_data"),
        ({"file_data": "QUJD", "filename": "a.txt"}, "file_data"),
        ({"file_data": "data:text/plain;base64,%%%"}, "file_data"),
        ({"file_data": "data:text/plain;base64,/w=="}, "file_data"),
    ],
)
def test_a_file_of_another_kind_is_refused(fields: Mapping[str, Any], param: str) -> None:
    error = refused(messages=[{"role": "user", "content": [file(**fields)]}])
    assert error.param == f"messages[0].content[0].file.{param}"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "file", "file": 5}]}, "messages[0].content[0].file"),
        ({"role": "system", "content": [image("https://example.org/a.png")]}, "messages[0].content[0]"),
        ({"role": "assistant", "content": [image("https://example.org/a.png")]}, "messages[0].content[0]"),
    ],
)
def test_a_part_that_has_no_place_is_refused(message: Json, param: str) -> None:
    assert refused(messages=[message, USER]).param == param


def test_a_tool_result_may_hold_an_image() -> None:
    content = turns(USER, calls(call("c1")), result("c1", [image("https://example.org/a.png")]))[2]["content"]
    assert content[0]["content"][0]["type"] == "image"


def test_cache_breakpoints_stay_where_they_are() -> None:
    mark: Json = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    assert user_part({"type": "text", "text": "Long.", **mark}) == [{"type": "text", "text": "Long.", **mark}]
    assert sent(tools=[{**function(), **mark}])["tools"][0]["cache_control"] == mark["cache_control"]
    assert sent(tools=[function(**mark)])["tools"][0]["cache_control"] == mark["cache_control"]
    assert turns({**USER, **mark})[0]["content"] == [{"type": "text", "text": "Hi.", **mark}]
    assert turns(USER, calls(call("c1")), {**result("c1"), **mark})[2]["content"][0]["cache_control"] == {
        "type": "ephemeral",
        "ttl": "1h",
    }


def test_openais_cache_breakpoint_is_translated() -> None:
    def marked(**more: Any) -> Any:
        point = {"mode": "explicit", **more}
        return user_part({"type": "text", "text": "Long.", "prompt_cache_breakpoint": point})[0]["cache_control"]

    assert marked() == marked(ttl="30m") == {"type": "ephemeral"}
    assert marked(ttl="1h") == {"type": "ephemeral", "ttl": "1h"}


# --- nothing breaks it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [5, "x", [], [5], {}, {"type": 5}, True])
@pytest.mark.parametrize(
    "name",
    ["audio", "cache_control", "functions", "modalities", "moderation", "safety_identifier", "thinking", "top_k"],
)
def test_a_field_of_another_type_is_sent_left_out_or_refused(name: str, odd: Any) -> None:
    try:
        body = sent(**{name: odd})
    except InvalidRequest as error:
        assert error.param == name
    else:
        assert orjson.dumps(body)


def test_the_json_of_the_body_is_the_clients_text() -> None:
    text = "\u2028 é 😀 \u0000"
    assert turns({"role": "user", "content": text})[0]["content"][0]["text"] == text
