"""The mock provider speaks its three formats as their owners do, and breaks in every way it says it does."""

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import jsonschema  # type: ignore[import-untyped]
import openai
import pytest

from gateway.mock import HELP, Mock, Received, serve
from gateway.mock.log import Log
from gateway.mock.samples import sample
from gateway.mock.script import _PARAMETERS, CASES, FAULTS

pytestmark = pytest.mark.mock

PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages", "ollama": "/api/chat"}
MODELS = {"openai": "mock-gpt", "anthropic": "mock-claude", "ollama": "mock-llama"}
FORMATS = tuple(PATHS)
VERSION = {"anthropic-version": "2023-06-01"}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 3, "maximum": 5}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time"}},
]
CLAUDE_TOOLS = [
    {"name": "get_weather", "input_schema": WEATHER},
    {"name": "get_time", "input_schema": {"type": "object", "properties": {}}},
]


@pytest.fixture
async def mock() -> AsyncIterator[Mock]:
    mock = Mock()
    yield mock
    await mock.stop()


@pytest.fixture
async def url(mock: Mock) -> str:
    return await mock.start()


@pytest.fixture
async def session(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(url, headers=VERSION, auto_decompress=False) as session:
        yield session


@pytest.fixture
async def sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-any", max_retries=0) as client:
        yield client


def ask(form: str, query: str = "", *, text: str = "Hello", **fields: Any) -> dict[str, Any]:
    """The body of a request in a format, with everything that the format requires."""
    model = MODELS[form] + (f"?{query}" if query else "")
    own = {"openai": {}, "anthropic": {"max_tokens": 5_000}, "ollama": {}}[form]
    return {"model": model, "messages": [{"role": "user", "content": text}], "stream": False, **own, **fields}


async def post(session: aiohttp.ClientSession, form: str, body: dict[str, Any]) -> tuple[int, bytes]:
    async with session.post(PATHS[form], json=body, allow_redirects=False) as response:
        return response.status, await response.read()


async def stream(session: aiohttp.ClientSession, form: str, query: str = "", **fields: Any) -> list[Any]:
    """The JSON of every event of a stream, `[DONE]` left out."""
    status, body = await post(session, form, ask(form, query, stream=True, **fields))
    assert status == 200, body
    return events(form, body)


def events(form: str, body: bytes) -> list[Any]:
    if form == "ollama":
        return [json.loads(line) for line in body.split(b"\n") if line]
    found = []
    for block in body.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if line)
        if lines and lines["data"] != "[DONE]":
            found.append(json.loads(lines["data"]))
            assert lines.get("event", found[-1].get("type")) == found[-1].get("type")
    return found


def said(form: str, found: list[Any]) -> str:
    """The text that a stream's events carry."""
    if form == "openai":
        deltas = [choice["delta"] for event in found for choice in event.get("choices", ()) if choice["index"] == 0]
        return "".join(delta.get("content") or "" for delta in deltas)
    if form == "anthropic":
        return "".join(event["delta"].get("text", "") for event in found if event["type"] == "content_block_delta")
    return "".join(event["message"]["content"] for event in found if "message" in event)


async def until(claim: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.005)


# --- OpenAI -------------------------------------------------------------------------------------------------------


async def test_the_sdk_reads_a_whole_answer(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(model="mock-gpt", messages=[{"role": "user", "content": "Hello"}])
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content is not None and "I am not a model" in choice.message.content
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_the_sdk_reads_the_same_words_from_a_stream(sdk: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    whole = await sdk.chat.completions.create(model="mock-gpt", messages=messages)
    options: Any = {"include_usage": True}
    chunks = [
        chunk
        async for chunk in await sdk.chat.completions.create(
            model="mock-gpt", messages=messages, stream=True, stream_options=options
        )
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(text) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == len(text) - 2
    assert len({chunk.id for chunk in chunks}) == 1


async def test_usage_appears_in_an_openai_stream_only_when_asked_for(session: aiohttp.ClientSession) -> None:
    without = await stream(session, "openai")
    assert all("usage" not in event and event["choices"] for event in without)
    asked = await stream(session, "openai", stream_options={"include_usage": True})
    assert [event["usage"] for event in asked[:-1]] == [None] * (len(asked) - 1)
    assert asked[-1]["choices"] == [] and asked[-1]["usage"]["completion_tokens"] > 0


async def test_obfuscation_can_be_switched_off(session: aiohttp.ClientSession) -> None:
    assert all("obfuscation" in event for event in await stream(session, "openai"))
    plain = await stream(session, "openai", stream_options={"include_obfuscation": False})
    assert all("obfuscation" not in event for event in plain)


async def test_choices_interleave_and_are_counted_together(session: aiohttp.ClientSession) -> None:
    found = await stream(session, "openai", "tokens=3", n=2, stream_options={"include_usage": True})
    order = [event["choices"][0]["index"] for event in found[:-1]]
    assert order == [0, 1] * 5  # role, three deltas, finish
    assert found[-1]["usage"]["completion_tokens"] == 6


async def test_the_sdk_assembles_a_tool_call_that_fits_its_schema(sdk: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Use a tool, please"}]
    tools: Any = TOOLS
    async with sdk.chat.completions.stream(model="mock-gpt", messages=messages, tools=tools) as running:
        choice = (await running.get_final_completion()).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]
    jsonschema.validate(json.loads(choice.message.tool_calls[0].function.arguments), WEATHER)


async def test_both_tools_are_called_when_both_are_asked_for(session: aiohttp.ClientSession) -> None:
    found = await stream(session, "openai", text="Use both tools", tools=TOOLS)
    deltas = [call for event in found for call in event["choices"][0]["delta"].get("tool_calls", ())]
    first = [delta for delta in deltas if "id" in delta]
    assert [(delta["index"], delta["function"]["name"]) for delta in first] == [(0, "get_weather"), (1, "get_time")]
    assert all(delta["function"]["arguments"] == "" for delta in first)
    assert all(set(delta) == {"index", "function"} for delta in deltas if "id" not in delta)


@pytest.mark.parametrize(
    ("fields", "called", "finish"),
    [
        ({"tool_choice": "none", "text": "Use a tool"}, [], "stop"),
        ({"text": "Hello"}, [], "stop"),
        ({"tool_choice": "required"}, ["get_weather"], "tool_calls"),
        ({"tool_choice": {"type": "function", "function": {"name": "get_time"}}}, ["get_time"], "stop"),
        ({"text": "both tools", "parallel_tool_calls": False}, ["get_weather"], "tool_calls"),
        ({"query": "case=text", "text": "Use a tool"}, [], "stop"),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [TOOLS[1]]},
                }
            },
            ["get_time"],
            "tool_calls",
        ),
        ({"query": "case=parallel_tools"}, ["get_weather", "get_time"], "tool_calls"),
    ],
)
async def test_tool_choice_decides_what_is_called(
    session: aiohttp.ClientSession, fields: dict[str, Any], called: list[str], finish: str
) -> None:
    _, body = await post(session, "openai", ask("openai", tools=TOOLS, **fields))
    choice = json.loads(body)["choices"][0]
    calls = choice["message"].get("tool_calls", ())
    assert ([call["function"]["name"] for call in calls], choice["finish_reason"]) == (called, finish)


async def test_a_tool_result_is_quoted_in_the_answer(session: aiohttp.ClientSession) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Use a tool"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "half past nine"},
    ]
    found = await stream(session, "openai", messages=messages, tools=TOOLS)
    assert '"half past nine"' in said("openai", found)


async def test_a_refusal_comes_in_its_own_field(sdk: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    async with sdk.chat.completions.stream(model="mock-gpt?case=refusal", messages=messages) as running:
        message = (await running.get_final_completion()).choices[0].message
    assert message.refusal is not None and message.refusal.startswith("I'm sorry") and not message.content


async def test_thoughts_are_counted_and_shown_only_on_request(session: aiohttp.ClientSession) -> None:
    options = {"include_usage": True}
    shown = await stream(session, "openai", "case=thinking", stream_options=options)
    assert any("reasoning_content" in str(event) for event in shown)
    hidden = await stream(session, "openai", reasoning_effort="high", stream_options=options)
    assert not any("reasoning_content" in str(event) for event in hidden)
    details = [found[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] for found in (shown, hidden)]
    assert details[0] == details[1] > 0


async def test_structured_output_satisfies_the_schema(session: aiohttp.ClientSession) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    found = await stream(session, "openai", response_format=wanted)
    jsonschema.validate(json.loads(said("openai", found)), WEATHER)
    loose = await stream(session, "openai", response_format={"type": "json_object"})
    assert isinstance(json.loads(said("openai", loose)), dict)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", None),
        ({"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}, "messages.[0].role", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"temperature": 3}, "temperature", "decimal_above_max_value"),
        ({"tools": "all"}, "tools", "invalid_type"),
    ],
)
async def test_openai_refuses_a_bad_request_by_its_parameter(
    session: aiohttp.ClientSession, fields: dict[str, Any], param: str, code: str | None
) -> None:
    status, body = await post(session, "openai", ask("openai", **fields))
    error = json.loads(body)["error"]
    assert (status, error["type"], error["param"], error["code"]) == (400, "invalid_request_error", param, code)


async def test_a_call_without_its_result_is_refused_by_openai(session: aiohttp.ClientSession) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "user", "content": "Well?"}]
    status, body = await post(session, "openai", ask("openai", messages=messages))
    assert status == 400 and b"did not have response messages: call_1" in body


@pytest.mark.parametrize(
    ("status", "raised"),
    [
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
    ],
)
async def test_the_sdk_raises_what_a_status_stands_for(
    sdk: openai.AsyncOpenAI, status: int, raised: type[openai.APIStatusError]
) -> None:
    with pytest.raises(raised) as caught:
        await sdk.chat.completions.create(
            model=f"mock-gpt?status={status}&retry_after=7", messages=[{"role": "user", "content": "Hello"}]
        )
    assert caught.value.response.headers["retry-after"] == "7"
    assert ("sk-mock-" in caught.value.message) is (status == 401)


# --- Anthropic ----------------------------------------------------------------------------------------------------


def check_grammar(found: list[Any]) -> None:
    """message_start ( start delta* stop )* message_delta message_stop, with pings anywhere between; blocks never overlap."""
    kinds = [event["type"] for event in found if event["type"] != "ping"]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    opened = -1
    inside = False
    for event in found[1:-2]:
        if event["type"] == "content_block_start":
            opened += 1
            assert not inside and event["index"] == opened
            inside = True
        elif event["type"] == "content_block_delta":
            assert inside and event["index"] == opened
        elif event["type"] == "content_block_stop":
            assert inside and event["index"] == opened
            inside = False
    assert not inside


def assembled(found: list[Any]) -> list[dict[str, Any]]:
    """The content that Anthropic's own accumulator makes of a stream."""
    fields = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}
    blocks: list[dict[str, Any]] = []
    partial = ""
    for event in found:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
            partial = ""
        elif event["type"] == "content_block_delta" and event["delta"]["type"] == "input_json_delta":
            partial += event["delta"]["partial_json"]
        elif event["type"] == "content_block_delta":
            field = fields[event["delta"]["type"]]
            blocks[-1][field] += event["delta"][field]
        elif event["type"] == "content_block_stop" and partial:
            blocks[-1]["input"] = json.loads(partial)
    return blocks


@pytest.mark.parametrize("case", CASES)
async def test_an_anthropic_stream_obeys_the_grammar_and_says_what_the_whole_answer_says(
    session: aiohttp.ClientSession, case: str
) -> None:
    fields: dict[str, Any] = {"tools": CLAUDE_TOOLS} if "tools" in case else {}
    found = await stream(session, "anthropic", f"case={case}", **fields)
    check_grammar(found)
    _, body = await post(session, "anthropic", ask("anthropic", f"case={case}", **fields))
    whole = json.loads(body)
    for block in (content := assembled(found)) + whole["content"]:
        block.pop("id", "")
    assert content == whole["content"]
    assert found[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert found[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


async def test_anthropic_pads_pings_and_misleads_as_the_real_one_does(session: aiohttp.ClientSession) -> None:
    status, body = await post(session, "anthropic", ask("anthropic", stream=True))
    assert status == 200
    assert b"  }\n\n" in body  # padding that only a byte comparison would trip over
    assert b'event: ping\ndata: {"type": "ping"}\n\n' in body
    found = events("anthropic", body)
    start, end = found[0]["message"]["usage"], found[-2]["usage"]
    assert start["output_tokens"] < end["output_tokens"]


async def test_anthropic_counts_cached_tokens_beside_the_input(session: aiohttp.ClientSession) -> None:
    found = await stream(session, "anthropic", "prompt_tokens=100&cached_tokens=60")
    assert (found[-2]["usage"]["input_tokens"], found[-2]["usage"]["cache_read_input_tokens"]) == (40, 60)


async def test_first_partial_json_is_empty_and_a_call_without_arguments_has_no_other(
    session: aiohttp.ClientSession,
) -> None:
    found = await stream(session, "anthropic", text="Use both tools", tools=CLAUDE_TOOLS)
    pieces: dict[int, list[str]] = {}
    for event in found:
        if event["type"] == "content_block_delta":
            pieces.setdefault(event["index"], []).append(event["delta"]["partial_json"])
    assert pieces[0][0] == "" and len(pieces[0]) > 2
    assert pieces[1] == [""]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"


async def test_thinking_is_shown_only_when_a_summary_is_asked_for(session: aiohttp.ClientSession) -> None:
    hidden = assembled(await stream(session, "anthropic", thinking={"type": "adaptive"}))[0]
    assert hidden["type"] == "thinking" and hidden["thinking"] == "" and hidden["signature"]
    shown = assembled(await stream(session, "anthropic", thinking={"type": "adaptive", "display": "summarized"}))[0]
    assert shown["thinking"].startswith("The question came")


async def test_thoughts_come_back_only_as_they_were_sent(session: aiohttp.ClientSession) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    question = {"role": "user", "content": "Use a tool"}
    content = assembled(await stream(session, "anthropic", messages=[question], tools=CLAUDE_TOOLS, thinking=thinking))
    assert [block["type"] for block in content] == ["thinking", "tool_use"]
    result = {"type": "tool_result", "tool_use_id": content[1]["id"], "content": "sunny"}

    async def replay(blocks: list[Any]) -> tuple[int, bytes]:
        messages = [question, {"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]
        return await post(
            session, "anthropic", ask("anthropic", messages=messages, tools=CLAUDE_TOOLS, thinking=thinking)
        )

    status, body = await replay(content)
    assert status == 200 and '\\"sunny\\"' in body.decode()
    status, body = await replay([{**content[0], "thinking": "Something else."}, content[1]])
    assert status == 400 and b"Invalid `signature` in `thinking` block" in body
    status, body = await replay(content[1:])
    assert status == 400 and b"Expected `thinking`" in body


async def test_anthropic_structures_its_output_by_the_schema(session: aiohttp.ClientSession) -> None:
    wanted = {"format": {"type": "json_schema", "schema": WEATHER}}
    found = await stream(session, "anthropic", output_config=wanted)
    jsonschema.validate(json.loads(said("anthropic", found)), WEATHER)


async def test_anthropic_names_the_stop_sequence_that_ended_the_answer(session: aiohttp.ClientSession) -> None:
    found = await stream(session, "anthropic", stop_sequences=["mock"])
    assert said("anthropic", found) == "Hello from the "
    assert found[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "mock", "stop_details": None}


def turn(role: str, *content: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


USER = {"role": "user", "content": "Hello"}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "get_time", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "nine"}
TEXT = {"type": "text", "text": "And?"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": ...}, "max_tokens: Field required"),
        ({"messages": ...}, "messages: Field required"),
        ({"messages": []}, "messages: at least one message is required"),
        ({"frequency_penalty": 1}, "frequency_penalty: Extra inputs are not permitted"),
        ({"context_management": {}}, "context_management: Extra inputs are not permitted"),
        ({"temperature": 1.5}, "temperature: range: 0..1"),
        ({"stop_sequences": [" "]}, "stop_sequences.0: each stop sequence must contain non-whitespace"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Input should be"),
        ({"messages": [{**USER, "name": "Ann"}]}, "messages.0.name: Extra inputs are not permitted"),
        ({"messages": [turn("assistant", TEXT)]}, 'first message must use the "user" role'),
        ({"messages": [USER, turn("assistant", TEXT)]}, "does not support assistant message prefill"),
        ({"messages": [turn("user", {"type": "text", "text": ""})]}, "text content blocks must be non-empty"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "must contain non-whitespace text"),
        ({"messages": [turn("user", {"type": "image_url"})]}, "Input tag 'image_url'"),
        ({"messages": [USER, {"role": "system", "content": "x"}, USER]}, "must follow a `user` message"),
        (
            {"messages": [USER, turn("assistant", CALL), USER]},
            "without `tool_result` blocks immediately after: toolu_1",
        ),
        ({"messages": [USER, turn("assistant", CALL), turn("user", TEXT, RESULT)]}, "immediately after: toolu_1"),
        ({"messages": [turn("user", RESULT)]}, "unexpected `tool_use_id` found in `tool_result` blocks: toolu_1"),
        ({"messages": [USER, turn("assistant", {**CALL, "input": ""}), turn("user", RESULT)]}, "a valid dictionary"),
        ({"messages": [USER, turn("assistant", {**CALL, "id": "a:1"}), USER]}, "String should match pattern"),
        ({"tools": [{"name": "a b", "input_schema": WEATHER}]}, "tools.0.custom.name: String should match pattern"),
        ({"tools": [{"name": "a"}]}, "tools.0.custom.input_schema: Field required"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: may only be specified while providing tools"),
        (
            {"tools": CLAUDE_TOOLS, "tool_choice": {"type": "any"}, "thinking": {"type": "adaptive"}},
            "Thinking may not be enabled when tool_choice forces tool use.",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 9_000}}, "must be greater than `thinking.budget_tokens`"),
    ],
)
async def test_anthropic_refuses_what_a_translator_gets_wrong(
    session: aiohttp.ClientSession, fields: dict[str, Any], message: str
) -> None:
    body = {name: value for name, value in ask("anthropic", **fields).items() if value is not ...}
    status, answer = await post(session, "anthropic", body)
    error = json.loads(answer)
    assert (status, error["type"], error["error"]["type"]) == (400, "error", "invalid_request_error")
    assert message in error["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "fields", "message"),
    [
        ({}, {}, "anthropic-version: header is required"),
        ({"anthropic-version": "2022-01-01"}, {}, 'anthropic-version: "2022-01-01" is not a valid version'),
        ({"anthropic-version": "2026-10-21"}, {"temperature": 1}, "temperature: this parameter is not supported"),
    ],
)
async def test_the_anthropic_version_decides_what_is_taken(
    url: str, headers: dict[str, str], fields: dict[str, Any], message: str
) -> None:
    async with aiohttp.ClientSession(url, headers=headers) as session:
        status, body = await post(session, "anthropic", ask("anthropic", **fields))
    assert status == 400 and message in json.loads(body)["error"]["message"]


async def test_a_beta_field_is_known_with_its_header(session: aiohttp.ClientSession) -> None:
    beta = {"anthropic-beta": "context-management-2025-06-27"}
    async with session.post(PATHS["anthropic"], json=ask("anthropic", context_management={}), headers=beta) as response:
        assert response.status == 200


async def test_anthropic_types_its_errors_by_status(session: aiohttp.ClientSession) -> None:
    for status, kind in ((401, "authentication_error"), (429, "rate_limit_error"), (529, "overloaded_error")):
        answered, body = await post(session, "anthropic", ask("anthropic", f"status={status}"))
        assert (answered, json.loads(body)["error"]["type"]) == (status, kind)


# --- Ollama -------------------------------------------------------------------------------------------------------


async def test_ollama_streams_lines_unless_told_not_to(session: aiohttp.ClientSession) -> None:
    body = {name: value for name, value in ask("ollama", "tokens=4").items() if name != "stream"}
    async with session.post(PATHS["ollama"], json=body) as response:
        assert response.content_type == "application/x-ndjson"
        found = events("ollama", await response.read())
    assert [line["done"] for line in found] == [False] * 4 + [True]
    last = found[-1]
    assert (last["done_reason"], last["eval_count"], last["message"]["content"]) == ("stop", 4, "")
    assert last["total_duration"] > last["eval_duration"] > 0
    assert len({line["created_at"] for line in found}) == 5


async def test_ollama_leaves_out_the_count_of_a_fully_cached_prompt(session: aiohttp.ClientSession) -> None:
    partly = await stream(session, "ollama", "prompt_tokens=9&cached_tokens=8")
    assert partly[-1]["prompt_eval_count"] == 9
    fully = await stream(session, "ollama", "prompt_tokens=9&cached_tokens=9")
    assert "prompt_eval_count" not in fully[-1] and fully[-1]["eval_count"] > 0


async def test_ollama_calls_tools_whole_and_still_says_stop(session: aiohttp.ClientSession) -> None:
    found = await stream(session, "ollama", text="Use both tools", tools=TOOLS)
    calls = [call for line in found for call in line["message"].get("tool_calls", ())]
    assert [(call["function"]["index"], call["function"]["name"]) for call in calls] == [
        (0, "get_weather"),
        (1, "get_time"),
    ]
    jsonschema.validate(calls[0]["function"]["arguments"], WEATHER)
    assert found[-1]["done_reason"] == "stop"


async def test_ollama_thinks_formats_and_stops_as_asked(session: aiohttp.ClientSession) -> None:
    thought = await stream(session, "ollama", think=True)
    assert thought[0]["message"]["thinking"] == "The"
    _, body = await post(session, "ollama", ask("ollama", format=WEATHER))
    jsonschema.validate(json.loads(json.loads(body)["message"]["content"]), WEATHER)
    _, body = await post(session, "ollama", ask("ollama", options={"num_predict": 2}))
    assert (json.loads(body)["done_reason"], json.loads(body)["eval_count"]) == ("length", 2)


@pytest.mark.parametrize(
    ("fields", "status", "error"),
    [
        ({"model": "llama3"}, 404, "model 'llama3' not found"),
        ({"model": ""}, 400, "model is required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid role: robot, role must be one of"),
        ({"messages": [turn("user", TEXT)]}, 400, "json: cannot unmarshal array into Go struct field"),
        ({"messages": [{"role": "user", "content": "x", "images": ["data:image/png,"]}]}, 400, "illegal base64 data"),
        ({"think": "hard"}, 400, 'invalid think value: "hard"'),
        ({"format": "yaml"}, 400, 'invalid format: "yaml"'),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{}"}}]}]},
            400,
            "json: cannot unmarshal string into Go struct field ChatRequest.messages.tool_calls.function.arguments",
        ),
    ],
)
async def test_ollama_refuses_in_one_line(
    session: aiohttp.ClientSession, fields: dict[str, Any], status: int, error: str
) -> None:
    answered, body = await post(session, "ollama", ask("ollama", **fields))
    assert answered == status and error in json.loads(body)["error"]


async def test_a_name_that_the_operator_added_is_known_to_ollama() -> None:
    mock = Mock(models=["llama3"])
    async with aiohttp.ClientSession(await mock.start()) as session:
        status, _ = await post(session, "ollama", ask("ollama", model="llama3:latest"))
        async with session.get("/api/tags") as response:
            names = [model["name"] for model in (await response.json())["models"]]
    await mock.stop()
    assert (status, names) == (200, ["mock-llama", "llama3"])


# --- all formats --------------------------------------------------------------------------------------------------


async def test_models_are_listed_in_the_format_of_the_one_who_asks(url: str, sdk: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in sdk.models.list()] == ["mock-gpt"]
    async with aiohttp.ClientSession(url) as session:
        async with session.get("/v1/models", headers=VERSION) as response:
            assert (await response.json())["data"][0]["type"] == "model"
        async with session.get("/api/version") as response:
            assert "version" in await response.json()


@pytest.mark.parametrize("form", FORMATS)
async def test_the_same_request_gets_the_same_bytes(session: aiohttp.ClientSession, form: str) -> None:
    body = ask(form, "case=tools", stream=True)
    assert await post(session, form, body) == await post(session, form, body)


@pytest.mark.parametrize("form", FORMATS)
async def test_every_script_of_the_world_survives_a_stream(session: aiohttp.ClientSession, form: str) -> None:
    text = said(form, await stream(session, form, "case=multibyte"))
    assert "👩‍👩‍👧‍👦" in text and "\u2028" in text and text.endswith("data: that is no field.")


@pytest.mark.parametrize("form", FORMATS)
async def test_tokens_sets_the_number_of_deltas_and_the_count(session: aiohttp.ClientSession, form: str) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if form == "openai" else {}
    for tokens in (0, 1, 200):
        found = await stream(session, form, f"tokens={tokens}", **options)
        last = found[-2] if form == "anthropic" else found[-1]
        counts = last if form == "ollama" else last["usage"]
        count = counts[{"openai": "completion_tokens", "anthropic": "output_tokens", "ollama": "eval_count"}[form]]
        deltas = [event for event in found if said(form, [event])]
        assert len(deltas) == count == tokens


@pytest.mark.parametrize("form", FORMATS)
async def test_the_limit_of_the_request_ends_the_answer(session: aiohttp.ClientSession, form: str) -> None:
    limit = {"options": {"num_predict": 7}} if form == "ollama" else {"max_tokens": 7}
    found = await stream(session, form, **limit)
    assert len([event for event in found if said(form, [event])]) == 7
    reason = {"openai": "length", "anthropic": "max_tokens", "ollama": "length"}[form]
    assert reason in json.dumps(found[-2:])


async def test_the_limit_cuts_a_call_in_the_middle_of_its_arguments(session: aiohttp.ClientSession) -> None:
    _, body = await post(session, "openai", ask("openai", "case=tools", max_tokens=4))
    choice = json.loads(body)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city":'
    _, body = await post(session, "anthropic", ask("anthropic", "case=tools", max_tokens=4))
    assert (json.loads(body)["stop_reason"], json.loads(body)["content"][0]["input"]) == ("max_tokens", {})
    found = await stream(session, "ollama", "case=tools", options={"num_predict": 4})
    assert len(found) == 1 and found[0]["done_reason"] == "length"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "mock-gpt", "messages": "Hello"}', b"\xff"])
async def test_a_body_that_is_no_request_is_refused(session: aiohttp.ClientSession, form: str, body: bytes) -> None:
    async with session.post(PATHS[form], data=body) as response:
        assert response.status in (400, 404) and json.loads(await response.read())["error"]


@pytest.mark.parametrize("form", FORMATS)
async def test_images_are_seen_and_counted(session: aiohttp.ClientSession, form: str) -> None:
    pixel = "iVBORw0KGgo="
    source = {"type": "base64", "media_type": "image/png", "data": pixel}
    message = {
        "openai": turn(
            "user", TEXT, *[{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pixel}"}}] * 2
        ),
        "anthropic": turn("user", TEXT, *[{"type": "image", "source": source}] * 2),
        "ollama": {"role": "user", "content": "And?", "images": [pixel] * 2},
    }[form]
    assert said(form, await stream(session, form, messages=[message])).startswith("I see 2 images in your message.")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("speed=3", "unknown parameter 'speed'"),
        ("fault=sulk", "fault=sulk"),
        ("tokens=-1", "tokens=-1"),
        ("pace_ms=nan", "pace_ms=nan"),
        ("status=200", "status=200"),
        ("after=1&after=2", "'after' is given twice"),
    ],
)
async def test_a_slip_in_the_query_is_named(session: aiohttp.ClientSession, form: str, query: str, words: str) -> None:
    status, body = await post(session, form, ask(form, query))
    assert status == 400 and words in body.decode()


def test_the_help_names_every_parameter_case_and_fault() -> None:
    assert HELP is not None
    words = set(HELP.replace("=", " ").split())
    assert {*_PARAMETERS, *CASES, *FAULTS} - words == set()


@pytest.mark.parametrize(
    "schema",
    [
        WEATHER,
        {
            "type": "object",
            "properties": {"a": {"enum": ["x", "y"]}, "b": {"const": 4}, "c": {"type": ["null", "boolean"]}},
        },
        {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "number"}, "minItems": 2}}},
        {"type": "object", "properties": {"a": {"anyOf": [{"type": "string", "minLength": 40}, {"type": "null"}]}}},
        {"type": "object", "properties": {"a": {"type": "integer", "exclusiveMinimum": 7, "multipleOf": 4}}},
        {"type": "object", "properties": {"a": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}}},
        {"type": "object", "properties": {"a": {"type": "string", "format": "date-time"}}, "required": ["a", "b"]},
        {
            "allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"required": ["b"]}],
            "type": "object",
        },
        {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                }
            },
            "$ref": "#/$defs/node",
        },
        {"type": "object", "properties": {"child": {"$ref": "#"}}},
    ],
)
def test_a_sample_satisfies_its_schema(schema: dict[str, Any]) -> None:
    jsonschema.validate(sample(schema), schema)


# --- time ---------------------------------------------------------------------------------------------------------


async def arrivals(session: aiohttp.ClientSession, form: str, query: str) -> list[float]:
    """Seconds from the request to the headers and to each read of the body."""
    began = time.monotonic()
    async with session.post(PATHS[form], json=ask(form, query, stream=True)) as response:
        times = [time.monotonic() - began]
        times += [time.monotonic() - began async for _ in response.content.iter_any()]
    return times


@pytest.mark.parametrize("form", FORMATS)
async def test_deltas_keep_to_their_beat_without_drift(session: aiohttp.ClientSession, form: str) -> None:
    _, first, *rest = await arrivals(session, form, "tokens=20&pace_ms=20")
    assert len(rest) >= 10  # a busy machine joins some
    assert 0.38 <= rest[-1] - first <= 0.7  # twenty beats


async def test_silence_comes_before_the_headers_and_after_them(session: aiohttp.ClientSession) -> None:
    headers, first, *_ = await arrivals(session, "openai", "tokens=1&headers_ms=100&ttft_ms=150")
    # From the request on: when the client saw the headers is no time of the mock's.
    assert 0.1 <= headers < 0.5
    assert 0.25 <= first < 1.0


async def test_split_writes_small_pieces_and_the_same_bytes(session: aiohttp.ClientSession, url: str) -> None:
    _, whole = await post(session, "openai", ask("openai", "tokens=3&split=7", stream=True))
    assert [event["choices"][0]["finish_reason"] for event in events("openai", whole)][-1] == "stop"
    raw = await raw_exchange(url, "openai", ask("openai", "tokens=3&split=7", stream=True), until=b"0\r\n\r\n")
    assert raw.body.count(b"7\r\n") > 100


@pytest.mark.parametrize(("name", "newline"), [("crlf", b"\r\n"), ("cr", b"\r")])
@pytest.mark.parametrize("form", ["openai", "anthropic"])
async def test_line_ends_are_as_asked(session: aiohttp.ClientSession, form: str, name: str, newline: bytes) -> None:
    _, body = await post(session, form, ask(form, f"newline={name}", stream=True))
    assert body.endswith(newline * 2)
    assert said(form, events(form, body.replace(newline, b"\n"))).endswith("in your client.")


# --- faults -------------------------------------------------------------------------------------------------------


class Raw:
    """What a bare socket saw of one answer."""

    def __init__(self) -> None:
        self.data = b""
        self.end = ""  # eof, reset, silence, enough

    @property
    def body(self) -> bytes:
        return self.data.partition(b"\r\n\r\n")[2]


async def raw_exchange(url: str, form: str, body: dict[str, Any], *, until: bytes = b"", silence: float = 5) -> Raw:
    """Send a request and read until the connection ends, `until` was read, or nothing comes for `silence` seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    content = json.dumps(body).encode()
    head = f"POST {PATHS[form]} HTTP/1.1\r\nHost: mock\r\nanthropic-version: 2023-06-01\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    raw = Raw()
    try:
        while not (until and raw.data.endswith(until)):
            async with asyncio.timeout(silence):
                piece = await reader.read(1 << 16)
            if not piece:
                raw.end = "eof"
                return raw
            raw.data += piece
        raw.end = "enough"
    except ConnectionResetError:
        raw.end = "reset"
    except TimeoutError:
        raw.end = "silence"
    finally:
        writer.close()
    return raw


def texts(form: str, raw: Raw) -> int:
    """How many deltas came, however the stream ended."""
    marker = {"openai": b'"content":"', "anthropic": b'"text_delta"', "ollama": b'"content":"'}[form]
    return raw.body.count(marker) - raw.body.count(b'"content":"",')


SILENCE = {"silence": 0.5, "reset": 5, "eof": 5, "enough": 5}  # seconds that an ending may take to show itself
LAST_WORD = {"openai": b"data: [DONE]", "anthropic": b'"message_stop"', "ollama": b'"done":true'}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("fault", "end", "closed"),
    [("reset", "reset", False), ("truncate", "eof", False), ("stall", "silence", False), ("cut", "enough", True)],
)
async def test_a_stream_breaks_after_as_many_deltas_as_asked(
    url: str, form: str, fault: str, end: str, closed: bool
) -> None:
    body = ask(form, f"fault={fault}&after=2", stream=True)
    raw = await raw_exchange(url, form, body, until=b"\r\n0\r\n\r\n", silence=SILENCE[end])
    assert (raw.end, raw.body.endswith(b"\r\n0\r\n\r\n")) == (end, closed)
    assert texts(form, raw) == 2 and LAST_WORD[form] not in raw.body


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("fault", "end"), [("reset", "reset"), ("truncate", "eof"), ("cut", "eof"), ("stall", "silence")]
)
async def test_a_whole_answer_breaks_in_the_middle(url: str, form: str, fault: str, end: str) -> None:
    raw = await raw_exchange(url, form, ask(form, f"fault={fault}"), silence=SILENCE[end])
    declared = int(raw.data.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    assert raw.end == end and 0 < len(raw.body) < declared


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("fault", "end"), [("close_before_headers", "eof"), ("reset_before_headers", "reset"), ("garbage", "eof")]
)
async def test_a_connection_ends_without_an_answer(mock: Mock, url: str, form: str, fault: str, end: str) -> None:
    raw = await raw_exchange(url, form, ask(form, f"fault={fault}"))
    assert raw.end == end and not raw.data.startswith(b"HTTP/")
    assert (raw.data != b"") is (fault == "garbage")
    assert mock.received[0].finished and mock.received[0].client_gone_at is None


@pytest.mark.parametrize("form", FORMATS)
async def test_the_providers_own_error_ends_a_stream(session: aiohttp.ClientSession, form: str) -> None:
    found = await stream(session, form, "fault=error_event&after=2")
    assert found[-1]["error"] and len([event for event in found if said(form, [event])]) == 2
    status, body = await post(session, form, ask(form, "fault=error_event"))
    assert status == 500 and json.loads(body)["error"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("fault", "count"), [("bad_json", 1), ("bad_json_3", 3)])
async def test_events_that_are_no_json_stand_between_good_ones(
    session: aiohttp.ClientSession, form: str, fault: str, count: int
) -> None:
    _, body = await post(session, form, ask(form, f"fault={fault}&after=1", stream=True))
    blank = b"\n" if form == "ollama" else b"\n\n"
    broken = [block for block in body.split(blank) if block and not is_json(block.partition(b"data: ")[2] or block)]
    assert len([block for block in broken if b"[DONE]" not in block]) == count
    assert LAST_WORD[form] in body


def is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("fault", "low", "high"), [("event_256k", 250 << 10, 256 << 10), ("huge_event", 2 << 20, 3 << 20)]
)
async def test_large_answers_have_their_size(
    session: aiohttp.ClientSession, form: str, fault: str, low: int, high: int
) -> None:
    _, body = await post(session, form, ask(form, f"fault={fault}", stream=True))
    assert low <= max(len(line) for line in body.split(b"\n")) <= high
    assert LAST_WORD[form] in body
    _, body = await post(session, form, ask(form, f"fault={fault}"))
    assert low <= len(body) <= high


@pytest.mark.parametrize("form", FORMATS)
async def test_the_last_word_or_the_counts_may_be_missing(session: aiohttp.ClientSession, form: str) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if form == "openai" else {}
    _, silent = await post(session, form, ask(form, "fault=no_done", stream=True, **options))
    assert LAST_WORD[form] not in silent
    _, uncounted = await post(session, form, ask(form, "fault=no_usage", stream=True, **options))
    _, whole = await post(session, form, ask(form, "fault=no_usage"))
    assert LAST_WORD[form] in uncounted and is_json(whole)
    assert b"_tokens" not in uncounted + whole and b"eval_count" not in uncounted + whole


@pytest.mark.parametrize("form", FORMATS)
async def test_answers_that_are_none(session: aiohttp.ClientSession, form: str) -> None:
    async with session.post(PATHS[form], json=ask(form, "fault=html", stream=True)) as response:
        assert (response.status, response.content_type) == (200, "text/html")
    assert await post(session, form, ask(form, "fault=empty", stream=True)) == (200, b"")
    status, body = await post(session, form, ask(form, "fault=broken_json"))
    assert status == 200 and body and not is_json(body)


async def test_a_redirect_that_is_followed_shows_in_the_log(mock: Mock, url: str) -> None:
    async with aiohttp.ClientSession(url) as session:
        status, _ = await post(session, "openai", ask("openai", "fault=redirect"))
        assert status == 307 and len(mock.received) == 1
        async with session.post(PATHS["openai"], json=ask("openai", "fault=redirect")) as response:
            assert response.status == 404
    assert mock.received[-1].path == "/elsewhere"


@pytest.mark.parametrize("streamed", [True, False])
async def test_the_body_stays_open_after_the_last_word(mock: Mock, url: str, streamed: bool) -> None:
    body = ask("openai", "fault=hang_open", stream=streamed)
    raw = await raw_exchange(url, "openai", body, silence=SILENCE["silence"])
    assert raw.end == "silence" and (b"[DONE]" if streamed else b'"usage"') in raw.body
    await until(lambda: mock.received[0].client_gone_at is not None, 0.5)


@pytest.mark.parametrize("streamed", [True, False])
async def test_gzip_comes_unasked(session: aiohttp.ClientSession, streamed: bool) -> None:
    headers = {"Accept-Encoding": "identity"}
    body = ask("anthropic", "fault=gzip&pace_ms=1&tokens=9", stream=streamed)
    async with session.post(PATHS["anthropic"], json=body, headers=headers) as response:
        assert response.headers["Content-Encoding"] == "gzip"
        plain = gzip.decompress(await response.read())
    assert (LAST_WORD["anthropic"] if streamed else b'"end_turn"') in plain


async def test_an_answered_connection_is_reset_at_once(url: str) -> None:
    raw = await raw_exchange(url, "openai", ask("openai", "fault=reset_after_reply"))
    assert raw.end == "reset" and is_json(raw.body)


async def test_a_kept_connection_is_reset_by_its_next_request(mock: Mock, url: str) -> None:
    async with aiohttp.ClientSession(url) as session:
        assert (await post(session, "openai", ask("openai", "fault=reset_on_reuse")))[0] == 200
        with pytest.raises(aiohttp.ClientConnectionError):
            await post(session, "openai", ask("openai"))
        assert (await post(session, "openai", ask("openai")))[0] == 200
    assert len(mock.received) == 3


async def test_a_fault_strikes_as_often_as_asked(session: aiohttp.ClientSession) -> None:
    statuses = [(await post(session, "openai", ask("openai", "status=503&times=2")))[0] for _ in range(4)]
    assert statuses == [503, 503, 200, 200]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("pace", [0, 1])
async def test_an_endless_answer_waits_for_a_client_that_does_not_read(
    mock: Mock, url: str, pace: int, streamed: bool
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), limit=1024)
    content = json.dumps(ask("openai", f"fault=endless&pace_ms={pace}", stream=streamed)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: mock\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await until(lambda: bool(mock.received) and mock.received[0].sent > (1 << 20 if not pace else 2_000), 5)
    if not pace:
        await settled(mock.received[0])
    writer.transport.abort()
    await until(lambda: mock.received[0].client_gone_at is not None, 0.5)


async def settled(received: Received) -> None:
    """Nothing more is sent: what the kernel takes for a client that reads nothing is bounded."""
    deadline, before = time.monotonic() + 5, -1
    while received.sent != before:
        assert time.monotonic() < deadline, "it goes on sending"
        before = received.sent
        await asyncio.sleep(0.1)
    assert received.sent < 32 << 20


# --- clients that leave, and the log ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("query", "phase"),
    [
        ("headers_ms=60000", "headers"),
        ("ttft_ms=60000", "first_token"),
        ("fault=stall&after=1", "stall"),
        ("pace_ms=60000", "stream"),
    ],
)
async def test_a_client_that_leaves_in_silence_is_noticed_at_once(
    mock: Mock, url: str, form: str, query: str, phase: str
) -> None:
    asking = asyncio.create_task(raw_exchange(url, form, ask(form, query, stream=True), silence=60))
    await until(lambda: bool(mock.received) and mock.received[0].phase == phase, 2)
    assert mock.open_connections == 1
    left = time.monotonic()
    asking.cancel()
    await until(lambda: mock.received[0].client_gone_at is not None, 0.5)
    received = mock.received[0]
    assert received.client_gone_at is not None and received.client_gone_at - left < 0.5
    assert (received.phase, received.finished) == (phase, False)
    await until(lambda: mock.open_connections == 0, 0.5)


async def test_a_client_that_leaves_inside_its_body_is_noticed(mock: Mock, url: str) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(b"POST /api/chat HTTP/1.1\r\nHost: mock\r\nContent-Length: 100\r\n\r\n{")
    await until(lambda: len(mock.received) == 1, 2)
    writer.close()
    await until(lambda: mock.received[0].client_gone_at is not None, 0.5)
    assert mock.received[0].phase == "body"


@pytest.mark.parametrize("query", ["", "pace_ms=2&tokens=5", "split=50&tokens=5"])
async def test_a_client_that_leaves_after_the_last_byte_has_had_all(mock: Mock, url: str, query: str) -> None:
    raw = await raw_exchange(url, "openai", ask("openai", query, stream=True), until=b"\r\n0\r\n\r\n")
    assert raw.end == "enough"
    await until(lambda: mock.open_connections == 0, 2)
    received = mock.received[0]
    assert (received.phase, received.finished, received.client_gone_at) == ("ended", True, None)
    assert received.sent > 1_000


async def test_the_log_is_read_and_cleared_over_http_and_hides_credentials(session: aiohttp.ClientSession) -> None:
    headers = {"Authorization": "Bearer sk-secret-1234", "X-Api-Key": "sk-other-5678", "X-Trace": "kept"}
    async with session.post(PATHS["openai"], json=ask("openai", "tokens=1"), headers=headers) as response:
        await response.read()
    async with session.get("/_mock/log") as response:
        text = await response.text()
    log = json.loads(text)
    (entry,) = log["received"]
    assert (entry["path"], entry["model"], entry["finished"]) == (PATHS["openai"], "mock-gpt?tokens=1", True)
    assert entry["body"]["messages"][0]["content"] == "Hello" and entry["headers"]["x-trace"] == "kept"
    assert (entry["headers"]["authorization"], entry["headers"]["x-api-key"]) == ("…1234", "…5678")
    assert "secret" not in text and log["open_connections"] == 1
    async with session.delete("/_mock/log") as response:
        assert response.status == 204
    async with session.get("/_mock/log") as response:
        assert (await response.json())["received"] == []


async def test_the_log_keeps_what_the_client_sent(mock: Mock, session: aiohttp.ClientSession) -> None:
    body = ask("anthropic", "case=text")
    await post(session, "anthropic", body)
    received = mock.received[0]
    assert json.loads(received.body) == body
    assert received.headers["anthropic-version"] == "2023-06-01"


def test_the_log_forgets_the_oldest_first() -> None:
    log = Log()
    for number in range(5_000):
        log.keep(log.open("POST", f"/{number}", {}), b"x")
    assert len(log.received) <= 2_000 and log.received[-1].path == "/4999"
    for number in range(200):
        log.keep(log.open("POST", f"/large/{number}", {}), bytes(1 << 20))
    assert sum(len(received.body) for received in log.received) <= 64 << 20
    assert log.received[-1].path == "/large/199"


async def test_stopping_does_not_wait_for_a_stalled_stream(url: str, mock: Mock) -> None:
    asking = asyncio.create_task(raw_exchange(url, "openai", ask("openai", "fault=stall", stream=True), silence=60))
    await until(lambda: bool(mock.received) and mock.received[0].phase == "stall", 2)
    began = time.monotonic()
    await mock.stop()
    assert time.monotonic() - began < 1
    assert (await asking).end in ("eof", "reset")
    assert mock.received[0].client_gone_at is None


async def test_serve_tells_its_address_and_ends_when_told() -> None:
    stop, told = asyncio.Event(), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve("127.0.0.1", 0, 5.0, stop, told.set_result))
    async with aiohttp.ClientSession(await told, headers=VERSION) as session:
        _, first, *rest = await arrivals(session, "openai", "tokens=10")
    assert rest[-1] - first >= 0.045  # the pace it was started with
    stop.set()
    await asyncio.wait_for(serving, 2)
