import base64
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from gateway.protocol.dialects.ollama import OllamaTranslator
from gateway.protocol.errors import InvalidRequest, UnsupportedParameter
from tests.support.streams import make_call

pytestmark = pytest.mark.unit

PNG = base64.b64encode(b"\x89PNG not much of one").decode()


def translator(request: Mapping[str, Any] | None = None, **target: Any) -> OllamaTranslator:
    return OllamaTranslator(make_call("ollama", request, target=target))


def sent(**request: Any) -> dict[str, Any]:
    """The body that Ollama gets for a request."""
    parsed: dict[str, Any] = orjson.loads(translator(request).request().body)
    return parsed


def test_a_plain_request_becomes_a_native_one_that_says_whether_it_streams() -> None:
    request = translator({"stream": False}, model="llama3").request()
    assert request.path == "/api/chat"
    assert orjson.loads(request.body) == {
        "model": "llama3",
        "messages": [{"role": "user", "content": "Say hello."}],
        "stream": False,
    }
    assert sent(stream=True)["stream"] is True


def test_sampling_parameters_become_options() -> None:
    options = sent(
        temperature=0.5,
        top_p=0.9,
        seed=7,
        frequency_penalty=0.1,
        presence_penalty=-0.2,
        stop="END",
        max_tokens=50,
    )["options"]
    assert options == {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "frequency_penalty": 0.1,
        "presence_penalty": -0.2,
        "stop": ["END"],
        "num_predict": 50,
    }


def test_max_completion_tokens_wins_over_the_older_name() -> None:
    assert sent(max_completion_tokens=9, max_tokens=50)["options"] == {"num_predict": 9}


def test_ollamas_own_options_travel_as_extension_fields() -> None:
    body = sent(num_ctx=16384, top_k=20, min_p=0.05, repeat_penalty=1.1, keep_alive=0)
    assert body["options"] == {"num_ctx": 16384, "top_k": 20, "min_p": 0.05, "repeat_penalty": 1.1}
    assert body["keep_alive"] == 0


def test_parameters_that_are_only_hints_are_dropped() -> None:
    body = sent(
        user="u1",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        verbosity="low",
        prompt_cache_key="k",
        n=1,
        tool_choice="auto",
        parallel_tool_calls=True,
        logit_bias={},
        modalities=["text"],
        top_logprobs=3,
        temperature=None,
        stop=[],
    )
    assert body.keys() == {"model", "messages", "stream"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "now"}}),
        ("parallel_tool_calls", False),
        ("logit_bias", {"50256": -100}),
        ("functions", [{"name": "now"}]),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "mp3"}),
        ("web_search_options", {}),
        ("response_format", {"type": "grammar"}),
        ("reasoning_effort", "enormous"),
    ],
)
def test_what_ollama_cannot_do_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        sent(**{name: value})
    assert refused.value.param == name


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}, ".image_url"),
        ({"type": "image_url", "image_url": {"url": "data:image/svg+xml,%3Csvg/%3E"}}, ".image_url"),
        ({"type": "image_url", "image_url": {"url": "data:application/pdf;base64,JVBERi0="}}, ".image_url"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, ""),
        ({"type": "file", "file": {"file_id": "f"}}, ""),
    ],
)
def test_a_part_that_ollama_cannot_read_is_refused_by_its_place(part: Any, param: str) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        sent(messages=[{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}])
    assert refused.value.param == f"messages[0].content[1]{param}"


def test_a_custom_tool_is_refused_by_its_place() -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        sent(tools=[{"type": "custom", "custom": {"name": "shell"}}])
    assert refused.value.param == "tools[0]"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "function", "name": "now", "content": "12:00"},
        {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": "{}"}},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "x"}}]},
    ],
)
def test_calls_of_a_kind_that_ollama_has_not_are_refused(message: Any) -> None:
    with pytest.raises(UnsupportedParameter, match=r"messages\[1\]"):
        sent(messages=[{"role": "user", "content": "Time?"}, message])


def test_images_are_sent_as_bare_base64_beside_the_text() -> None:
    parts = [
        {"type": "text", "text": "Compare"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"type": "text", "text": "with this."},
        {"type": "image_url", "image_url": {"url": f"DATA:;base64,{PNG}"}},
    ]
    assert sent(messages=[{"role": "user", "content": parts}])["messages"] == [
        {"role": "user", "content": "Compare\n\nwith this.", "images": [PNG, PNG]}
    ]


def test_a_tool_loop_is_sent_with_object_arguments_and_named_results() -> None:
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 12345678901234567890123}'}},
        {"id": "c2", "type": "function", "function": {"name": "now", "arguments": ""}},
    ]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "I add."},
        {"role": "tool", "tool_call_id": "c2", "content": "noon"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "3"}]},
    ]
    body = translator({"messages": messages}).request().body
    assert b'{"a": 12345678901234567890123}' in body  # no digit is lost
    assert orjson.loads(body)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {
            "role": "assistant",
            "content": "",
            "thinking": "I add.",
            "tool_calls": [
                {"id": "c1", "function": {"name": "add", "arguments": {"a": 12345678901234567890123.0}}},
                {"id": "c2", "function": {"name": "now", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "noon", "tool_call_id": "c2", "tool_name": "now"},
        {"role": "tool", "content": "3", "tool_call_id": "c1", "tool_name": "add"},
    ]


def test_a_result_is_named_by_the_last_call_of_its_id() -> None:
    def call(name: str) -> dict[str, Any]:
        function = {"name": name, "arguments": "{}"}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": function}],
        }

    result = {"role": "tool", "tool_call_id": "c", "content": "done"}
    messages = sent(messages=[call("first"), result, call("second"), result])["messages"]
    assert [messages[1]["tool_name"], messages[3]["tool_name"]] == ["first", "second"]


@pytest.mark.parametrize("arguments", ["[1]", "{", "null", '"text"', '{"a": NaN}'])
def test_arguments_that_are_no_object_are_refused_by_their_place(arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": arguments}}
    with pytest.raises(InvalidRequest) as refused:
        sent(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert refused.value.param == "messages[0].tool_calls[0].function.arguments"


def test_a_refusal_of_the_assistant_is_part_of_what_was_said() -> None:
    messages = sent(
        messages=[
            {"role": "assistant", "content": None, "refusal": "I must not."},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "Nor that."}]},
        ]
    )["messages"]
    assert [message["content"] for message in messages] == ["I must not.", "Nor that."]


def test_tools_are_sent_with_parameters_even_when_they_have_none() -> None:
    tools = [{"type": "function", "function": {"name": "now", "description": "The time."}}]
    assert sent(tools=tools)["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "now",
                "description": "The time.",
                "parameters": {"type": "object", "properties": {}},
            },
        }
    ]


def test_tool_choice_none_sends_no_tools() -> None:
    assert "tools" not in sent(tools=[{"type": "function", "function": {"name": "now"}}], tool_choice="none")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, "json"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "json"),
    ],
)
def test_a_response_format_becomes_a_format(wanted: Any, expected: Any) -> None:
    assert sent(response_format=wanted).get("format") == expected


@pytest.mark.parametrize(
    ("effort", "think"),
    [
        ("none", False),
        ("minimal", "low"),
        ("low", "low"),
        ("medium", "medium"),
        ("high", "high"),
        ("xhigh", "max"),
        ("max", "max"),
    ],
)
def test_a_reasoning_effort_becomes_think(effort: str, think: Any) -> None:
    body = sent(reasoning_effort=effort)
    assert body["think"] == think
    assert type(body["think"]) is type(think)


def test_logprobs_are_asked_for_by_ollamas_names() -> None:
    body = sent(logprobs=True, top_logprobs=2)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)
