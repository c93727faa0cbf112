"""What is particular to OpenAI's dialect; what all dialects promise is in tests/protocol/test_streams.py."""

import json
import re
import sys
from typing import Any

import orjson
import pytest

from gateway.protocol.dialects.openai import OpenAITranslator, models_listed
from gateway.protocol.errors import (
    EventTooLarge,
    GatewayError,
    ProviderAuth,
    UpstreamBadBody,
    UpstreamError,
    UpstreamOverloaded,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTruncated,
)
from gateway.protocol.refusals import HIDDEN
from gateway.protocol.request import Chunk
from gateway.protocol.sse import DONE, MAX_EVENT, data_event
from gateway.protocol.usage import Usage
from tests.support.streams import make_call, play

pytestmark = pytest.mark.unit

ASKING = {"stream_options": {"include_usage": True}}
USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}


def translator(request: dict[str, Any] | None = None, **more: Any) -> OpenAITranslator:
    return OpenAITranslator(make_call("openai", request, **more))


def sent(request: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = orjson.loads(translator(request, **more).request().body)
    return body


def chunk(delta: Any = None, finish_reason: Any = None, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **fields}


def event(value: Any) -> bytes:
    return data_event(json.dumps(value).encode())


def fed(value: Any, request: dict[str, Any] | None = None) -> Chunk:
    (only,) = translator(request).feed(event(value))
    return only


def text_of(delta: Any) -> str:
    return fed(chunk(delta)).text


# --- the request --------------------------------------------------------------------------------------------------


def test_a_request_goes_to_chat_completions() -> None:
    assert translator().request().path == "/chat/completions"


def test_a_body_that_needs_no_change_is_sent_byte_for_byte() -> None:
    body = b'{ "messages":[{"role":"user","content":"\\u0041"}],\n "top_k": 4.0e1, "model":"gpt-4o" }'
    assert translator(body=body).request().body == body


def test_a_stream_that_asks_for_usage_is_sent_byte_for_byte() -> None:
    body = b'{"stream": true, "stream_options": {"include_usage" :true}, "model": "m", "messages": [{"role": "user", "content": ""}]}'
    assert translator(body=body).request().body == body


def test_the_providers_own_model_name_is_the_only_change() -> None:
    body = b'{ "model":"groq/llama" ,"messages":[{"role":"user","content":"x"}]}'
    changed = translator(body=body, target={"model": "llama"}).request().body
    assert changed == b'{ "model":"llama" ,"messages":[{"role":"user","content":"x"}]}'


@pytest.mark.parametrize("options", [None, {}, {"include_usage": None}, {"include_usage": False}])
def test_usage_is_asked_for_when_the_client_did_not(options: dict[str, Any] | None) -> None:
    assert sent({"stream_options": options})["stream_options"] == {"include_usage": True}


def test_the_clients_other_stream_options_are_kept() -> None:
    options = {"include_obfuscation": False, "include_usage": False}
    assert sent({"stream_options": options})["stream_options"] == {"include_obfuscation": False, "include_usage": True}


def test_usage_is_not_asked_for_where_that_is_an_error() -> None:
    assert "stream_options" not in sent(provider={"asks_usage": False})
    assert "stream_options" not in sent({"stream": False})


def test_unknown_fields_and_limits_are_not_touched() -> None:
    fields = {"max_tokens": 5, "max_completion_tokens": 6, "chat_template_kwargs": {"enable_thinking": False}}
    assert sent(fields).items() >= fields.items()


# What providers know by another name is a row of theirs, as in providers.toml.


def test_nothing_is_changed_for_a_provider_whose_quirks_the_request_does_not_meet() -> None:
    body = b'{ "model" : "test-model", "messages":[{"role":"user","content":"hi","n":1.0}], "temperature":1e0 }'
    row = {"renames": {"seed": "random_seed"}, "drops": ["user"], "roles": {"developer": "system"}, "tool_id_length": 9}
    asked = OpenAITranslator(make_call("openai", body=body, provider={**row, "asks_usage": False})).request()
    assert asked.body == body


def test_a_parameter_goes_by_the_providers_name_for_it() -> None:
    row = {"renames": {"max_completion_tokens": "max_tokens", "seed": "random_seed"}}
    asked = sent({"max_completion_tokens": 5, "seed": 7, "top_k": 3}, provider=row)
    assert (asked["max_tokens"], asked["random_seed"], asked["top_k"]) == (5, 7, 3)
    assert asked.keys().isdisjoint(row["renames"])
    assert asked["stream_options"] == {"include_usage": True}
    both = sent({"max_completion_tokens": 5, "max_tokens": 6}, provider=row)
    assert (both["max_tokens"], "max_completion_tokens" in both) == (6, False), "who says both is taken at that word"
    assert sent({"max_completion_tokens": 5, "max_tokens": None}, provider=row)["max_tokens"] == 5


def test_what_a_provider_refuses_is_left_out() -> None:
    row = {"drops": ["store", "stream_options"], "asks_usage": False}
    asked = sent({"store": True, **ASKING}, provider=row, target={"model": "theirs"})
    assert asked.keys() == {"model", "messages", "stream"}
    assert asked["model"] == "theirs"


def test_roles_and_ids_of_tool_calls_are_the_providers_and_still_belong_together() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_abc123", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                {"id": "Ab3dEf6h9", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_abc123", "content": "sun"},
        {"role": "tool", "tool_call_id": "Ab3dEf6h9", "content": "rain"},
    ]
    asked = sent({"messages": messages}, provider={"roles": {"developer": "system"}, "tool_id_length": 9})["messages"]
    assert [message["role"] for message in asked] == ["system", "user", "assistant", "tool", "tool"]
    first, second = (call["id"] for call in asked[2]["tool_calls"])
    assert (first, second) == (asked[3]["tool_call_id"], asked[4]["tool_call_id"])
    assert re.fullmatch("[A-Za-z0-9]{9}", first), "what Mistral demands of an id"
    assert second == "Ab3dEf6h9", "one that fits is kept"
    assert asked[2]["tool_calls"][0]["function"] == messages[2]["tool_calls"][0]["function"]  # type: ignore[index]
    assert sent({"messages": messages})["messages"] == messages


# --- a stream -----------------------------------------------------------------------------------------------------


def test_an_event_passes_verbatim_as_soon_as_it_is_whole() -> None:
    raw = b': hi\ndata:{"choices" : [ {"delta":{"content":"a"}} ] }\r\n\r\n'
    openai = translator()
    assert openai.feed(raw[:-1]) == []
    assert openai.feed(raw[-1:]) == [Chunk(raw, "a")]


def test_comments_pass_and_are_no_text() -> None:
    assert translator().feed(b": OPENROUTER PROCESSING\n\n") == [Chunk(b": OPENROUTER PROCESSING\n\n")]


@pytest.mark.parametrize(
    "nothing", [b"event: ping\n\n", b"id: 1\n\n", b"retry: 10\n\n", b"data:\n\n", b"data: \ndata:\n\n"]
)
def test_an_event_without_data_is_dropped(nothing: bytes) -> None:
    assert translator().feed(nothing) == []


def test_an_event_with_an_id_is_sent_on_as_its_data() -> None:
    (only,) = translator().feed(b'id: 7\nevent: e\ndata: {"choices":\ndata: []}\n\n')
    assert only.data == b'data: {"choices": []}\n\n'


def test_a_byte_order_mark_does_not_reach_the_client() -> None:
    assert translator().feed(b"\xef\xbb\xbfdata: [DONE]\n\n") == [Chunk(DONE)]


def test_done_ends_the_stream_and_what_follows_is_ignored() -> None:
    openai = translator()
    assert openai.feed(b"data:[DONE]\n\n" + event(chunk({"content": "late"}))) == [Chunk(b"data:[DONE]\n\n")]
    assert openai.done
    assert openai.feed(event(chunk({"content": "later"}))) == []
    assert openai.flush() == []


def test_half_an_emoji_passes_verbatim() -> None:
    raw = b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n'
    assert translator().feed(raw) == [Chunk(raw, "\ud83d")]


def test_two_broken_events_are_dropped_and_the_third_ends_the_stream() -> None:
    good = event(chunk({"content": "a"}))
    openai = translator()
    chunks = openai.feed(b"data: {\n\n" + good + b'data: {"a": "\xff"}\n\n' + good + b'data: "text"\n\n' + good)
    assert [each.data for each in chunks] == [good, good]
    assert openai.done
    with pytest.raises(UpstreamBadBody, match="3 events of broken JSON") as caught:
        openai.flush()
    assert caught.value.kind == "bad_event"


@pytest.mark.parametrize("size", [1 << 16, MAX_EVENT * 2])
def test_an_event_without_end_ends_the_stream_and_keeps_what_came_before(size: int) -> None:
    good = event(chunk({"content": "a"}))
    data = good + b"data: " + b"x" * MAX_EVENT
    played = play(make_call("openai"), [data[at : at + size] for at in range(0, len(data), size)])
    assert isinstance(played.error, EventTooLarge)
    assert played.sent == good


# --- the end of a stream ------------------------------------------------------------------------------------------


def test_a_stream_without_a_word_is_truncated() -> None:
    with pytest.raises(UpstreamTruncated):
        translator().flush()


@pytest.mark.parametrize("choices", [1, 2])
def test_done_is_added_when_every_choice_that_was_asked_for_has_its_finish_reason(choices: int) -> None:
    openai = translator({"n": choices})
    openai.feed(event(chunk({"content": "a"}, "stop")))
    if choices == 1:
        assert openai.flush() == [Chunk(DONE)]
        assert openai.done
    else:
        with pytest.raises(UpstreamTruncated):
            openai.flush()


def test_a_choice_that_goes_on_keeps_the_stream_open() -> None:
    openai = translator()
    openai.feed(event({"choices": [{"index": 0, "finish_reason": "stop"}, {"index": 1, "delta": {"content": "a"}}]}))
    with pytest.raises(UpstreamTruncated):
        openai.flush()


def test_choices_without_an_index_are_told_apart_by_their_place() -> None:
    openai = translator({"n": 2})
    openai.feed(event({"choices": [{"finish_reason": "stop"}, {"index": None, "finish_reason": "stop"}]}))
    assert openai.flush() == [Chunk(DONE)]


def test_a_finish_reason_that_comes_twice_or_is_followed_by_more_still_counts() -> None:
    openai = translator()
    openai.feed(event(chunk({}, "stop")) * 2 + event(chunk({"content": ""}, None)))
    assert openai.flush() == [Chunk(DONE)]


def test_an_empty_finish_reason_is_none() -> None:
    openai = translator()
    assert openai.feed(event(chunk({}, "")))[0].finish_reason is None
    with pytest.raises(UpstreamTruncated):
        openai.flush()


@pytest.mark.parametrize("end", [b"", b"\n", b"\r", b"\r\n", b"\n\r"])
def test_a_whole_event_that_was_not_closed_is_closed_and_counted(end: bytes) -> None:
    raw = event(chunk({"content": "b"}, "stop", usage=USAGE)).removesuffix(b"\n\n") + end
    played = play(make_call("openai"), [event(chunk({"content": "a"})) + raw])
    assert [each.text for each in played.chunks] == ["a", "b", ""]
    assert played.chunks[1].usage == Usage(12, 3)
    assert played.sent.endswith(b"\n\n" + DONE)


def test_done_that_was_not_closed_is_closed() -> None:
    assert translator().feed(b"data: [DONE]") == []
    openai = translator()
    openai.feed(b"data: [DONE]")
    assert openai.flush() == [Chunk(DONE)]


@pytest.mark.parametrize("half", [b'data: {"choices":[{"index":0,"del', b"data: [DO", b": comm", b"event: x\n", b"da"])
def test_half_an_event_at_the_end_is_dropped(half: bytes) -> None:
    whole = event(chunk({"content": "a"}, "stop"))
    assert play(make_call("openai"), [whole + half]).sent == whole + DONE


def test_an_error_that_was_not_closed_is_an_error() -> None:
    openai = translator()
    openai.feed(event(chunk({}, "stop")) + b'error: {"message": "out of memory"}')
    with pytest.raises(UpstreamError, match="out of memory"):
        openai.flush()


def test_half_an_event_at_the_end_is_no_broken_event() -> None:
    openai = translator()
    openai.feed(b"data: {\n\ndata: {\n\n" + event(chunk({"content": "a"}, "stop")) + b'data: {"choi')
    assert openai.flush() == [Chunk(DONE)]


def test_what_was_left_open_after_done_is_ignored() -> None:
    openai = translator()
    openai.feed(DONE + b'data: {"choices":[]}')
    assert openai.flush() == []


# --- an end of ours -----------------------------------------------------------------------------------------------


def cut_of(openai: OpenAITranslator) -> list[Any]:
    """The chunks of the last bytes; the `[DONE]` after them is left out."""
    *chunks, done, end = openai.cut(Usage(7, 5)).split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    return [orjson.loads(each.removeprefix(b"data: ")) for each in chunks]


def test_the_end_of_a_stream_that_we_cut_has_the_head_of_the_chunks_before_it() -> None:
    openai = translator()
    openai.feed(event(chunk({"content": "a"}, service_tier="flex", system_fingerprint="fp_1")))
    assert cut_of(openai) == [
        {
            **chunk(service_tier="flex", system_fingerprint="fp_1"),
            "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}],
        }
    ]


@pytest.mark.parametrize(
    "head", [{}, {"id": "", "created": 0, "model": ""}, {"id": None, "created": None, "model": []}]
)
def test_what_the_providers_chunks_do_not_say_is_our_own(head: dict[str, Any]) -> None:
    openai = translator(target={"model": "m"})
    openai.feed(event({**head, "choices": [{"index": 0, "delta": {"content": "a"}}]}))
    (last,) = cut_of(openai)
    assert (last["id"], last["created"], last["model"]) == ("chatcmpl-test", 1_700_000_000, "m")


def test_a_stream_that_we_cut_before_its_first_chunk_has_a_role_and_an_end() -> None:
    first, second = cut_of(translator())
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [each["choices"][0]["finish_reason"] for each in (first, second)] == [None, "length"]


def test_only_choices_that_go_on_are_ended_by_us() -> None:
    openai = translator({"n": 3})
    openai.feed(event({"choices": [{"index": 2}, {"index": 0, "finish_reason": "stop"}]}))
    assert [each["choices"][0]["index"] for each in cut_of(openai)] == [2]


def test_a_client_has_the_usage_once() -> None:
    early, late = translator(ASKING), translator(ASKING)
    for openai in (early, late):
        openai.feed(event(chunk({"content": "a"}, "stop", usage=USAGE)))
    late.feed(event({"choices": [], "usage": USAGE}))
    assert [each["usage"] for each in cut_of(early)] == [Usage(7, 5).to_openai()]
    assert cut_of(late) == []


def test_a_chunk_of_ours_is_json_whatever_the_provider_calls_itself() -> None:
    openai = translator()
    openai.feed(b'data: {"id":"\\ud83d\\u65e5","choices":[{"index":0,"delta":{}}]}\n\n')
    assert json.loads(openai.cut(Usage(1, 1)).split(b"\n\n")[0][6:])["id"] == "\ud83d日"


def test_an_event_that_is_half_there_is_dropped_when_we_cut() -> None:
    openai = translator()
    openai.feed(event(chunk({"content": "a"})) + b'data: {"choices":[{"index":1')
    assert [each["choices"][0]["index"] for each in cut_of(openai)] == [0]
    assert openai.flush() == []


# --- usage --------------------------------------------------------------------------------------------------------

ALONE = {"id": "c1", "object": "chat.completion.chunk", "choices": [], "usage": USAGE}


@pytest.mark.parametrize("choices", [{"choices": []}, {"choices": None}, {}])
def test_a_usage_chunk_that_the_client_did_not_ask_for_is_counted_and_kept_from_it(choices: dict[str, Any]) -> None:
    value = {"id": "c1", "obfuscation": "x", **choices, "usage": USAGE}
    assert fed(value) == Chunk(b"", usage=Usage(12, 3))


def test_a_usage_chunk_that_was_asked_for_passes() -> None:
    assert fed(ALONE, ASKING) == Chunk(event(ALONE), usage=Usage(12, 3))


@pytest.mark.parametrize("more", ["moderation", "prompt_filter_results", "citations"])
def test_a_usage_chunk_with_something_else_in_it_passes(more: str) -> None:
    assert fed({**ALONE, more: [{"x": 1}]}).data
    assert not fed({**ALONE, more: None}).data


def test_a_chunk_without_choices_and_usage_passes() -> None:
    value: dict[str, Any] = {"choices": [], "usage": None, "prompt_filter_results": []}
    assert fed(value) == Chunk(event(value))


def test_usage_beside_choices_passes_with_them() -> None:
    value = chunk({"content": "a"}, "stop", usage=USAGE)
    assert fed(value) == Chunk(event(value), "a", Usage(12, 3), "stop")


def test_usage_of_nulls_is_none_and_groqs_own_place_is_read() -> None:
    assert fed(chunk({}, usage={"prompt_tokens": None, "completion_tokens": None})).usage is None
    groq = chunk({}, x_groq={"id": "r", "usage": USAGE})
    assert fed(groq) == Chunk(event(groq), usage=Usage(12, 3))
    assert fed(chunk({}, x_groq="r")).usage is None


# --- what is counted as text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delta", "text"),
    [
        ({"content": "a"}, "a"),
        ({"content": ""}, ""),
        ({"content": None}, ""),
        ({"content": 5}, ""),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c", None]}, "ab"),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "a"}]}]}, "a"),
        ({"content": [{"type": "thinking", "thinking": "a"}, {"type": "refusal", "refusal": "b"}]}, "ab"),
        ({"content": [{"type": "reference", "reference_ids": [1]}]}, ""),
        ({"reasoning_content": "r", "reasoning": "r"}, "r"),
        ({"reasoning": "r", "reasoning_details": [{"type": "reasoning.text", "text": "r"}]}, "r"),
        ({"reasoning": "", "reasoning_details": [{"text": "r"}, {"summary": "s"}, {"data": "x"}, 1]}, "rs"),
        ({"reasoning_content": None, "content": "a"}, "a"),
        ({"refusal": "no"}, "no"),
        ({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "{}"}}]}, "f{}"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {"a": "ü"}}}]}, 'f{"a":"ü"}'),
        ({"tool_calls": [{"type": "custom", "custom": {"name": "f", "input": "i"}}]}, "fi"),
        ({"tool_calls": None}, ""),
        ({"tool_calls": [None, {}, {"function": None}, {"function": "f"}]}, ""),
        ({"tool_calls": {"0": {}}}, ""),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "f{}"),
        ({"content": "a", "reasoning_content": "r", "tool_calls": [{"function": {"name": "f"}}]}, "arf"),
        (None, ""),
        ("delta", ""),
    ],
)
def test_what_the_model_wrote_is_counted_once(delta: Any, text: str) -> None:
    assert text_of(delta) == text


def test_every_choice_is_counted() -> None:
    choices = [
        {"index": 1, "delta": {"content": "b"}, "finish_reason": "length"},
        {"index": 0, "delta": {"content": "a"}},
    ]
    assert fed({"choices": choices}) == Chunk(event({"choices": choices}), "ba", None, "length")


@pytest.mark.parametrize("reason", ["eos", "end_turn", "COMPLETE", "sensitive", "network_error", "model_length"])
def test_other_vendors_finish_reasons_are_finish_reasons(reason: str) -> None:
    assert fed(chunk({}, reason)).finish_reason == reason


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"choices": "x"},
        {"choices": {"0": {}}},
        {"choices": [None, 1, []]},
        {"choices": [{"index": "0", "delta": [], "finish_reason": 3}]},
        {"choices": [{}], "usage": "x", "x_groq": []},
        {"choices": [{"delta": {"content": [[[]]], "tool_calls": [[]], "reasoning_details": "x", "refusal": {}}}]},
        {"error": None, "choices": []},
        {"error": {}, "choices": []},
    ],
)
def test_shapes_that_nobody_promised_pass(value: Any) -> None:
    assert fed(value) == Chunk(event(value))


def test_arguments_too_deep_to_write_are_no_failure() -> None:
    deep = "[" * 1000 + "]" * 1000
    raw = b'{"choices":[{"delta":{"tool_calls":[{"function":{"name":"f","arguments":%b}}]}}]}' % deep.encode()
    (only,) = translator().feed(data_event(raw))
    assert only.text == ("f" + deep if sys.version_info >= (3, 12) else "f")  # later ones can write it


# --- an error in the stream ---------------------------------------------------------------------------------------


def broken_by(raw: bytes, **more: Any) -> tuple[list[Chunk], UpstreamError]:
    openai = translator(**more)
    chunks = openai.feed(event(chunk({"content": "a"})) + raw + DONE)
    assert openai.done
    with pytest.raises(UpstreamError) as caught:
        openai.flush()
    return chunks[1:], caught.value


@pytest.mark.parametrize(
    ("raw", "message", "code"),
    [
        (event({"error": {"message": "no", "type": "server_error", "code": "oops"}}), "no", "oops"),
        (event({"error": {"message": "no", "code": 502}}), "no", "502"),
        (event({"error": "no", "code": "oops"}), "no", "oops"),
        (event({"error": "no"}), "no", "upstream_error"),
        (event({"error": True}), "the provider failed and gave no reason", "upstream_error"),
        (event([{"error": {"code": 500, "message": "no", "status": "INTERNAL"}}]), "no", "INTERNAL"),
        (event({"object": "error", "message": "no", "code": 400}), "no", "400"),
        (event(chunk({"content": ""}, "error", error={"code": 502, "message": "no"})), "no", "502"),
        (event(chunk({}, "error")), "the provider failed and gave no reason", "upstream_error"),
        (event({"choices": [{"index": 0, "error": {"code": 429, "message": "no"}}]}), "no", "429"),
        (event(chunk({}, x_groq={"error": "no"})), "no", "upstream_error"),
        (b'event: error\ndata: {"error":{"message":"no","code":"oops"}}\n\n', "no", "oops"),
        (b'event: error\ndata: {"message":"no","code":"oops"}\n\n', "no", "oops"),
        (b"event: error\ndata: no\n\n", "no", "upstream_error"),
        (b"event: error\n\n", "the provider failed and gave no reason", "upstream_error"),
        (b'error: {"detail":"x","error":{"message":"no"}}\n\n', "no", "upstream_error"),
        (b"error: no\n\n", "no", "upstream_error"),
    ],
)
def test_an_error_in_the_stream_is_kept_for_the_end_and_never_forwarded(raw: bytes, message: str, code: str) -> None:
    chunks, error = broken_by(raw)
    assert chunks == []
    assert (error.message, error.error_code, error.kind, error.http_status) == (message, code, "error_event", 502)


def test_usage_on_an_error_is_counted() -> None:
    chunks, _ = broken_by(event(chunk({}, "error", error={"code": 502, "message": "no"}, usage=USAGE)))
    assert chunks == [Chunk(b"", usage=Usage(12, 3))]


@pytest.mark.parametrize(
    "said", [{"code": 401}, {"code": "403"}, {"code": "invalid_api_key"}, {"type": "authentication_error"}]
)
def test_an_error_about_the_credential_hides_what_the_provider_said(said: dict[str, Any]) -> None:
    raw = event({"error": {"message": "bad key sk-live-123", **said}})
    error = broken_by(raw)[1]
    assert (error.message, error.error_code) == ("the provider refused the gateway's credential", "provider_auth")
    assert broken_by(raw, target={"own_credential": True})[1].error_code == "invalid_api_key"


def test_a_lone_surrogate_in_an_error_can_be_sent() -> None:
    error = broken_by(b'data: {"error":{"message":"a\\ud83d\\u0000b","code":"\\ud83d"}}\n\n')[1]
    assert orjson.loads(error.body())["error"]["message"] == "a?b"


# --- a whole answer -----------------------------------------------------------------------------------------------


def test_a_whole_answer_passes_verbatim_and_is_counted() -> None:
    message = {
        "role": "assistant",
        "content": "a",
        "reasoning": "r",
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    }
    body = (
        b"\n"
        + json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": USAGE}).encode()
    )
    reply = translator({"stream": False}).reply(body)
    assert (reply.body, reply.text, reply.usage, reply.finish_reason) == (body, "arf{}", Usage(12, 3), "stop")


def test_an_answer_without_choices_usage_or_text_is_an_answer() -> None:
    assert translator({"stream": False}).reply(b'{"choices":[]}').usage is None
    assert translator({"stream": False}).reply(b'{"choices":[{"finish_reason":"content_filter"}]}').text == ""


def test_a_byte_order_mark_before_an_answer_is_dropped() -> None:
    assert translator({"stream": False}).reply(b'\xef\xbb\xbf{"choices":[]}').body == b'{"choices":[]}'


@pytest.mark.parametrize(
    "body", [b"", b"<html></html>", b"null", b"[]", b'"x"', b"{}", b'{"choices":null}', b'{"choices":[}']
)
def test_what_is_no_answer_is_a_bad_body(body: bytes) -> None:
    with pytest.raises(UpstreamBadBody) as caught:
        translator({"stream": False}).reply(body)
    assert caught.value.kind == "bad_body"


@pytest.mark.parametrize(
    "value",
    [
        {"error": {"message": "no", "code": 502}},
        {"error": {"message": "no", "code": 502}, "choices": []},
        {"choices": [{"index": 0, "message": {}, "error": {"message": "no", "code": 502}, "finish_reason": "error"}]},
    ],
)
def test_an_error_with_status_200_is_an_error(value: Any) -> None:
    with pytest.raises(UpstreamError, match="no") as caught:
        translator({"stream": False}).reply(json.dumps(value).encode())
    assert (caught.value.error_code, caught.value.http_status) == ("502", 502)


# --- an answer with another status --------------------------------------------------------------------------------


def error(status: int, body: Any = b"", retry_after: float | None = None, **target: Any) -> GatewayError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return translator(target=target).error(status, raw, retry_after)


REJECTED = {
    "message": "too long",
    "type": "invalid_request_error",
    "param": "messages",
    "code": "context_length_exceeded",
}


@pytest.mark.parametrize("status", [400, 404, 408, 409, 413, 422])
def test_a_rejection_is_passed_on_with_all_it_says(status: int) -> None:
    rejected = error(status, {"error": REJECTED})
    assert isinstance(rejected, UpstreamRejected)
    assert (rejected.http_status, rejected.object()["error"]) == (status, REJECTED)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "no", "code": 400}}, "no"),
        ({"error": {"code": "400", "message": "no"}}, "no"),  # Azure
        ({"code": "invalid-argument", "error": "no"}, "no"),  # xAI
        ([{"error": {"code": 400, "message": "no", "status": "INVALID_ARGUMENT"}}], "no"),  # Gemini
        ({"detail": "no"}, "no"),  # Mistral
        ({"detail": [{"loc": ["body", "messages", 0], "msg": "no", "type": "missing"}]}, "no"),  # FastAPI
        ({"object": "error", "message": "no", "type": "BadRequestError", "param": None, "code": 400}, "no"),  # vLLM
        ({"object": "error", "message": {"detail": [{"msg": "no"}]}, "type": "x"}, "no"),  # Mistral
        ({"errors": [{"code": 5006, "message": "no"}], "success": False}, "no"),  # Cloudflare
        ({"error": {"message": "bad", "metadata": {"raw": '{"error":{"message":"no"}}'}}}, "bad: no"),  # OpenRouter
        ({"error": {"message": "bad", "metadata": {"raw": "no"}}}, "bad: no"),
        ({"error": {"message": "bad", "metadata": {"raw": ""}}}, "bad"),
        ({"error": {"message": "bad", "metadata": {"raw": {"error": "no"}}}}, "bad"),
        ({"error": {"message": "x" * 5000}}, "x" * 2000),
        ({"error": {"message": "a\nb"}}, "a\nb"),
        ({"error": {"message": "  a\u0000b\n"}}, "ab"),
        ({"error": {}}, "the provider answered 400"),
        ({"error": {"error": {"error": {"error": {"error": {"message": "no"}}}}}}, "the provider answered 400"),
        (b"<html>Bad Request</html>", "the provider answered 400"),
        (b"", "the provider answered 400"),
        (b"[]", "the provider answered 400"),
        (b"\xff\xfe", "the provider answered 400"),
        (b"[" * 100_000, "the provider answered 400"),
    ],
)
def test_every_vendors_error_is_understood(body: Any, message: str) -> None:
    assert error(400, body).message == message


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"error": {"code": "RateLimitReached"}}, "RateLimitReached"),
        ({"error": {"code": 400, "status": "INVALID_ARGUMENT"}}, "INVALID_ARGUMENT"),
        ({"error": {"code": None, "status": "INVALID_ARGUMENT"}}, "INVALID_ARGUMENT"),
        ({"error": {"code": "too_long", "status": "INVALID_ARGUMENT"}}, "too_long"),
        ({"error": {"code": "x" * 200}}, "x" * 128),
        ({"code": "invalid-argument", "error": "no"}, "invalid-argument"),
        ({"error": {"code": "400"}}, "invalid_request_error"),
        ({"error": {"code": True}}, "invalid_request_error"),
        ({"error": {"code": ["x"]}}, "invalid_request_error"),
    ],
)
def test_a_code_is_a_word_and_never_a_number(body: Any, code: str) -> None:
    assert error(400, body).error_code == code


def test_the_providers_type_is_passed_on_and_what_it_left_out_is_filled_in() -> None:
    typed = error(400, {"object": "error", "message": "no", "type": "BadRequestError"})
    assert (typed.error_type, typed.param) == ("BadRequestError", None)
    assert error(400, {"error": {"message": "no"}}).error_type == "invalid_request_error"


def test_the_field_that_fastapi_names_is_the_param() -> None:
    assert error(422, {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "no"}]}).param == "messages.0.role"


def test_a_missing_model_has_a_code_of_ours_when_the_provider_gives_none() -> None:
    assert error(404, {"error": {"message": "no such model", "code": None}}).error_code == "model_not_found"
    assert error(404, b"404 page not found").error_code == "model_not_found"
    assert error(404, {"error": {"code": "DeploymentNotFound"}}).error_code == "model_not_found"
    assert error(413).error_code == "request_too_large"


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_of_the_operators_credential_is_ours_and_hides_the_text(status: int) -> None:
    refused = error(
        status, {"error": {"message": "Incorrect API key provided: sk-proj-abc", "code": "invalid_api_key"}}
    )
    assert isinstance(refused, ProviderAuth)
    assert (refused.http_status, refused.error_code, refused.kind) == (502, "provider_auth", "auth")
    assert b"sk-" not in refused.body()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [(401, "invalid_api_key", "authentication_error"), (403, "permission_denied", "permission_error")],
)
def test_a_refusal_of_the_callers_own_credential_is_the_callers(status: int, code: str, kind: str) -> None:
    refused = error(status, {"error": {"message": "Incorrect API key provided: sk-mine"}}, own_credential=True)
    assert isinstance(refused, UpstreamRejected)
    assert (refused.http_status, refused.error_code, refused.error_type) == (status, code, kind)
    assert b"sk-" not in refused.body()


def test_a_credential_refused_with_another_status_is_refused_all_the_same() -> None:
    body = {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}
    assert isinstance(error(400, body), ProviderAuth)
    assert error(400, body, own_credential=True).http_status == 401
    assert not isinstance(error(500, body), ProviderAuth)


@pytest.mark.parametrize(
    "message",
    [
        "Incorrect API key provided: xa***cd.",
        "API key not valid. Please pass a valid API key.",
        "Authentication Fails, Your api key: ****-key is invalid",
        "no access for sk-proj-a1b2",
        "token a-credential is unknown",
    ],
)
def test_a_message_that_may_quote_a_key_is_hidden_whatever_the_status(message: str) -> None:
    for status in (404, 429, 500, 503):
        assert error(status, {"error": {"message": message}}).message == HIDDEN
    assert message not in error(400, {"error": {"message": message}}).message


@pytest.mark.parametrize(
    "message",
    ["Invalid schema for function 'get_api_key'", "ask-me is no tool", "the task-id is missing", "rate limit"],
)
def test_a_message_about_something_else_is_shown(message: str) -> None:
    assert error(400, {"error": {"message": message}}).message == message


@pytest.mark.parametrize(("given", "passed_on"), [(None, 1.0), (0.0, 1.0), (0.2, 1.0), (20.0, 20.0)])
def test_a_providers_rate_limit_is_passed_on_with_a_second_at_least(given: float | None, passed_on: float) -> None:
    limited = error(429, {"error": {"message": "slower", "type": "tokens", "code": "rate_limit_exceeded"}}, given)
    assert isinstance(limited, UpstreamRateLimited)
    assert (limited.retry_after, limited.error_code, limited.error_type) == (
        passed_on,
        "rate_limit_exceeded",
        "rate_limit_error",
    )


@pytest.mark.parametrize("said", [{"code": "insufficient_quota"}, {"type": "insufficient_quota", "code": None}])
def test_an_exhausted_quota_is_told_from_a_rate_limit(said: dict[str, Any]) -> None:
    assert error(429, {"error": {"message": "pay", **said}}).error_code == "insufficient_quota"


@pytest.mark.parametrize("status", [503, 529])
def test_an_overloaded_provider_asks_for_patience(status: int) -> None:
    overloaded = error(status, b"", 7.0)
    assert isinstance(overloaded, UpstreamOverloaded)
    assert (overloaded.http_status, overloaded.error_code, overloaded.retry_after) == (503, "overloaded", 7.0)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(500, "http_5xx"), (502, "http_5xx"), (504, "http_5xx"), (520, "http_5xx"), (599, "http_5xx"), (307, "redirect")],
)
def test_any_other_failure_is_the_providers(status: int, kind: str) -> None:
    failed = error(status, b"<html>oops</html>", 3.0)
    assert isinstance(failed, UpstreamError)
    assert (failed.http_status, failed.message) == (502, f"the provider answered {status}")
    assert (failed.kind, failed.retry_after) == (kind, 3.0)


def test_what_a_failing_provider_says_in_json_is_passed_on() -> None:
    assert error(500, {"error": {"message": "The server had an error"}}).message == "The server had an error"


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parsed", "names"),
    [
        ({"object": "list", "data": [{"id": "gpt-4o", "object": "model"}, {"id": "o3"}]}, ["gpt-4o", "o3"]),
        ([{"id": "meta-llama/Llama-3"}], ["meta-llama/Llama-3"]),  # Together
        ({"data": [{"id": ""}, {"id": 5}, {}, None, "x"]}, []),
        ({"data": None}, []),
        ({"error": {"message": "no"}}, []),
        (None, []),
        ("x", []),
    ],
)
def test_models_listed_are_the_ids_of_the_list(parsed: Any, names: list[str]) -> None:
    assert [model.name for model in models_listed(parsed)] == names


@pytest.mark.parametrize("field", ["context_length", "context_window", "max_context_length", "max_model_len"])
def test_a_context_window_is_read_by_each_of_its_names(field: str) -> None:
    rows = [{"id": "a", field: 8192}, {"id": "b", field: "8192"}, {"id": "c", field: 0}, {"id": "d", field: True}]
    assert [model.context_length for model in models_listed({"data": rows})] == [8192, None, None, None]
