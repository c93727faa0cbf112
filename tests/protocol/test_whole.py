"""A whole answer that is made of a stream is what the provider would have sent whole."""

import json
from typing import Any

import orjson
import pytest

from gateway.protocol.request import parse_chat
from gateway.protocol.whole import Whole, streamed

pytestmark = pytest.mark.unit

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1767225600, "model": "m"}


def gathered(*chunks: dict[str, Any]) -> dict[str, Any]:
    whole = Whole()
    for chunk in chunks:
        whole.add(b"data: " + json.dumps({**HEAD, **chunk}).encode() + b"\n\n")
    whole.add(b": ping\n\ndata: [DONE]\n\n")
    return dict(orjson.loads(whole.body()))


def delta(finish_reason: str | None = None, index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": fields, "logprobs": None, "finish_reason": finish_reason}]}


def test_text_reasoning_and_refusals_are_joined() -> None:
    answer = gathered(
        delta(role="assistant", content="", refusal=None),
        delta(reasoning_content="because "),
        delta(reasoning_content="of it"),
        delta(content="Hello"),
        delta(content=" you"),
        delta("stop"),
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}},
    )
    assert answer == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1767225600,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello you",
                    "refusal": None,
                    "reasoning_content": "because of it",
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def call(index: int, **fields: Any) -> dict[str, Any]:
    return delta(tool_calls=[{"index": index, **fields}])


def test_parallel_tool_calls_are_joined_by_their_index_and_lose_it() -> None:
    answer = gathered(
        delta(role="assistant", content=None),
        call(0, id="a", type="function", function={"name": "look", "arguments": ""}),
        call(0, function={"arguments": '{"x"'}),
        call(1, id="b", type="function", function={"name": "find", "arguments": "{}"}),
        call(0, function={"arguments": ":1}"}),
        delta("tool_calls"),
    )
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"x":1}'}},
            {"id": "b", "type": "function", "function": {"name": "find", "arguments": "{}"}},
        ],
    }
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


def test_choices_are_in_their_order_and_log_probabilities_follow_each_other() -> None:
    def token(text: str) -> dict[str, Any]:
        return {"index": 1, "delta": {"content": text}, "logprobs": {"content": [{"token": text, "logprob": -1.0}]}}

    answer = gathered({"choices": [token("b")]}, delta(content="a"), {"choices": [token("c")]}, delta("stop"))
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["a", "bc"]
    assert [one["token"] for one in answer["choices"][1]["logprobs"]["content"]] == ["b", "c"]


def test_half_an_emoji_passes() -> None:
    whole = Whole()
    whole.add(b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n')
    assert json.loads(whole.body())["choices"][0]["message"]["content"] == "\ud83d"


def test_the_request_is_the_same_but_for_the_stream() -> None:
    body = b'{ "model":"m", "stream":false, "top_p": 1.0e0, "messages":[{"role":"user","content":"\\u0041"}] }'
    asked = streamed(parse_chat(body), asks_usage=True)
    assert (asked.stream, asked.wants_usage) == (True, True)
    assert orjson.loads(asked.body) == {
        **orjson.loads(body), "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert b'"top_p": 1.0e0' in asked.body
    assert b"stream_options" not in streamed(parse_chat(body), asks_usage=False).body
