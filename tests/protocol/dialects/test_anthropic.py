"""What a client of OpenAI's API gets from Anthropic: streams, whole answers and errors."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.protocol.dialects.anthropic import AnthropicTranslator, models_listed
from gateway.protocol.errors import (
    EventTooLarge,
    ProviderAuth,
    UpstreamBadBody,
    UpstreamError,
    UpstreamOverloaded,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTruncated,
)
from gateway.protocol.meter import Meter
from gateway.protocol.request import Chunk
from gateway.protocol.sse import DONE, MAX_EVENT, PING
from gateway.protocol.usage import Usage
from tests.support.streams import assemble, make_call

pytestmark = pytest.mark.unit

Json = dict[str, Any]
STREAMS = Path(__file__).parent.parent.parent / "streams" / "anthropic"
KEY = "sk-ant-api03-abcdef"

# --- making streams -----------------------------------------------------------------------------------------------


def event(kind: str, **data: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + orjson.dumps({"type": kind, **data}) + b"\n\n"


def start(**message: Any) -> bytes:
    usage = {"input_tokens": 12, "output_tokens": 1}
    return event("message_start", message={"id": "msg_1", "model": "claude-x-20260101", "usage": usage, **message})


def block(index: int, **content_block: Any) -> bytes:
    return event("content_block_start", index=index, content_block=content_block)


def delta(index: int, kind: str, **fields: Any) -> bytes:
    return event("content_block_delta", index=index, delta={"type": kind, **fields})


def text(piece: str) -> bytes:
    return delta(0, "text_delta", text=piece)


def stop(index: int) -> bytes:
    return event("content_block_stop", index=index)


def finish(reason: str | None = "end_turn", **usage: Any) -> bytes:
    counted = {"output_tokens": 5, **usage}
    return event("message_delta", delta={"stop_reason": reason}, usage=counted)


END = event("message_stop")


def translator(target: Json | None = None, **request: Any) -> AnthropicTranslator:
    return AnthropicTranslator(make_call("anthropic", request, target=target))


def received(*events: bytes, **request: Any) -> list[Json]:
    """The chunks that the client of a whole stream reads, without `[DONE]`."""
    anthropic = translator(**request)
    chunks = anthropic.feed(b"".join(events))
    assert anthropic.flush() == []
    assert chunks[-1].data == DONE
    return chunks_read(chunks[:-1])


def chunks_read(chunks: list[Chunk]) -> list[Json]:
    return [orjson.loads(chunk.data.removeprefix(b"data: ")) for chunk in chunks if chunk.data.startswith(b"data: ")]


def deltas(*events: bytes, **request: Any) -> list[Json]:
    """The deltas between the role and the finish reason."""
    return [chunk["choices"][0]["delta"] for chunk in received(*events, **request)][1:-1]


def failure(*events: bytes, **target: Any) -> UpstreamError:
    anthropic = translator(target)
    anthropic.feed(b"".join(events))
    with pytest.raises(UpstreamError) as caught:
        anthropic.flush()
    return caught.value


# --- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(STREAMS.glob("*.sse")), ids=lambda path: path.stem)
def test_the_chunks_are_the_same_wherever_a_stream_is_cut(path: Path) -> None:
    data, request = path.read_bytes(), orjson.loads(path.with_suffix(".json").read_bytes())["request"]
    whole = translator(**request).feed(data)
    for at in range(1, len(data)):
        anthropic = translator(**request)
        assert anthropic.feed(data[:at]) + anthropic.feed(data[at:]) == whole, f"cut at byte {at}"


def test_the_request_goes_to_messages_as_json() -> None:
    request = translator(model="claude-sonnet-4-5").request()
    assert request.path == "/v1/messages"
    assert orjson.loads(request.body)["model"] == "claude-sonnet-4-5"
    assert orjson.loads(request.body)["stream"] is True


def test_the_request_names_the_targets_model_and_not_the_alias() -> None:
    request = translator({"model": "claude-sonnet-4-5"}, model="clever").request()
    assert orjson.loads(request.body)["model"] == "claude-sonnet-4-5"


def test_every_chunk_has_the_same_id_time_and_model() -> None:
    chunks = received(start(), text("a"), finish(), END)
    heads = {(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in chunks}
    assert heads == {("chatcmpl-test", "chat.completion.chunk", 1_700_000_000, "claude-x-20260101")}


def test_each_delta_comes_at_once() -> None:
    anthropic = translator()
    anthropic.feed(start())
    (chunk,) = anthropic.feed(text("Hel"))
    assert (chunk.text, chunks_read([chunk])[0]["choices"][0]["delta"]) == ("Hel", {"content": "Hel"})


def test_other_chunks_say_that_usage_is_null_when_the_client_asked_for_it() -> None:
    chunks = received(start(), text("a"), finish(), END, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None, None, None]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 17


def test_no_chunk_speaks_of_usage_when_the_client_did_not_ask() -> None:
    assert all("usage" not in chunk for chunk in received(start(), text("a"), finish(), END))


def test_a_stream_that_was_cut_still_knows_its_prompt() -> None:
    anthropic, meter = translator(), Meter(["never read"])
    for chunk in anthropic.feed(start() + text("12345678")):
        meter.see(chunk.text, chunk.usage, chunk.finish_reason)
    assert meter.result() == (Usage(12, 3), "estimated")


def test_the_last_usage_overwrites_field_by_field() -> None:
    usage = {"input_tokens": 3, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 20, "output_tokens": 2}
    (chunk,) = [
        chunk
        for chunk in translator().feed(
            start(usage=usage) + finish(input_tokens=40, cache_read_input_tokens=None, output_tokens=9)
        )
        if chunk.finish_reason
    ]
    assert chunk.usage == Usage(160, 9, cached_tokens=100, cache_write_tokens=20)


def test_usage_in_a_second_message_delta_is_the_one_that_counts() -> None:
    chunks = translator().feed(start() + finish(output_tokens=3) + finish("end_turn", output_tokens=8))
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [None, 3, 8]
    assert len([chunk for chunk in chunks if chunk.finish_reason]) == 1


def test_a_provider_without_counts_has_none_made_up() -> None:
    ask = {"stream_options": {"include_usage": True}}
    bare = event("message_start", message={}) + text("a") + event("message_delta", delta={"stop_reason": "end_turn"})
    assert all(chunk["choices"] for chunk in received(bare, END, **ask))
    assert all(chunk.usage is None for chunk in translator(**ask).feed(bare + END))


def test_a_tool_call_comes_with_its_name_first_and_its_arguments_as_they_come() -> None:
    events = (
        start(),
        block(0, type="tool_use", id="toolu_1", name="look", input={}),
        delta(0, "input_json_delta", partial_json=""),
        delta(0, "input_json_delta", partial_json='{"a"'),
        delta(0, "input_json_delta", partial_json=":1}"),
        stop(0),
        finish("tool_use"),
        END,
    )
    assert deltas(*events) == [
        {
            "tool_calls": [
                {"index": 0, "id": "toolu_1", "type": "function", "function": {"name": "look", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]},
    ]


def test_a_call_without_arguments_has_an_empty_object_even_if_its_block_is_never_closed() -> None:
    opened = (start(), block(0, type="tool_use", id="toolu_1", name="now", input={}))
    for events in ((*opened, stop(0), finish("tool_use"), END), (*opened, finish("tool_use"), END)):
        assert deltas(*events)[-1] == {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}


def test_an_input_that_came_with_the_start_of_its_block_is_not_lost() -> None:
    whole = block(0, type="tool_use", id="toolu_1", name="look", input={"a": 1})
    assert deltas(start(), whole, stop(0), finish("tool_use"), END)[-1] == {
        "tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]
    }


def test_a_call_without_an_id_gets_one_that_is_always_the_same() -> None:
    events = (start(), block(0, type="tool_use", name="look"), stop(0), finish("tool_use"), END)
    ids = {deltas(*events)[0]["tool_calls"][0]["id"] for _ in range(2)}
    assert ids == {"call_chatcmpl-test_0"}


def test_a_tool_with_an_illegal_name_is_called_by_the_name_that_the_client_gave() -> None:
    tools = [{"type": "function", "function": {"name": "clock.now"}}]
    sent = orjson.loads(translator(tools=tools).request().body)["tools"][0]["name"]
    events = (start(), block(0, type="tool_use", id="toolu_1", name=sent), stop(0), finish("tool_use"), END)
    assert sent != "clock.now"
    assert deltas(*events, tools=tools)[0]["tool_calls"][0]["function"]["name"] == "clock.now"


CUSTOM = [{"type": "custom", "custom": {"name": "run"}}]


@pytest.mark.parametrize(
    ("pieces", "given"),
    [
        (['{"inp', 'ut": "ls -l"}'], "ls -l"),
        (['{"input": "ls'], '{"input": "ls'),
        (['{"other": 1}'], '{"other": 1}'),
        ([], ""),
    ],
)
def test_a_custom_tool_is_called_with_its_text(pieces: list[str], given: str) -> None:
    events = [delta(0, "input_json_delta", partial_json=piece) for piece in pieces]
    opened = block(0, type="tool_use", id="toolu_1", name="run", input={})
    assert deltas(start(), opened, *events, stop(0), finish("tool_use"), END, tools=CUSTOM) == [
        {"tool_calls": [{"index": 0, "id": "toolu_1", "type": "custom", "custom": {"name": "run", "input": ""}}]},
        {"tool_calls": [{"index": 0, "custom": {"input": given}}]},
    ]


def test_the_input_of_a_custom_tool_is_not_held_without_end() -> None:
    anthropic = translator(tools=CUSTOM)
    anthropic.feed(start() + block(0, type="tool_use", id="toolu_1", name="run"))
    piece = delta(0, "input_json_delta", partial_json="x" * 100_000)
    for _ in range(MAX_EVENT // 100_000 + 1):
        anthropic.feed(piece)
    assert anthropic.done
    with pytest.raises(EventTooLarge):
        anthropic.flush()


@pytest.mark.parametrize("tools", [[], CUSTOM])
def test_a_call_that_is_open_when_we_cut_stays_as_far_as_it_came(tools: list[Json]) -> None:
    anthropic = translator(tools=tools)
    opened = block(0, type="tool_use", id="toolu_1", name="run", input={})
    anthropic.feed(start() + opened + delta(0, "input_json_delta", partial_json='{"inp'))
    choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    chunk, done = anthropic.cut(Usage(12, 3)).removesuffix(b"\n\n").split(b"\n\n")
    assert orjson.loads(chunk.removeprefix(b"data: "))["choices"] == [choice]
    assert done == b"data: [DONE]"


def test_a_message_that_has_its_finish_reason_keeps_it_when_we_cut() -> None:
    anthropic = translator(stream_options={"include_usage": True})
    anthropic.feed(start() + text("a") + finish())
    usage, done, _ = anthropic.cut(Usage(12, 3)).split(b"\n\n")
    read = orjson.loads(usage.removeprefix(b"data: "))
    assert (read["choices"], read["usage"]) == ([], Usage(12, 3).to_openai())
    assert done == b"data: [DONE]"


def test_server_tools_take_no_index_of_the_clients() -> None:
    events = (
        start(),
        block(0, type="server_tool_use", id="srvtoolu_1", name="web_search", input={}),
        delta(0, "input_json_delta", partial_json='{"query":"x"}'),
        stop(0),
        block(1, type="web_search_tool_result", tool_use_id="srvtoolu_1", content=[]),
        stop(1),
        block(2, type="tool_use", id="toolu_1", name="look", input={}),
        delta(2, "input_json_delta", partial_json='{"a":1}'),
        stop(2),
        finish("tool_use"),
        END,
    )
    assert [call["index"] for delta in deltas(*events) for call in delta["tool_calls"]] == [0, 0]


@pytest.mark.parametrize(
    ("reason", "with_tool", "expected"),
    [
        ("end_turn", False, "stop"),
        ("stop_sequence", False, "stop"),
        ("max_tokens", False, "length"),
        ("model_context_window_exceeded", False, "length"),
        ("pause_turn", False, "length"),
        ("compaction", False, "length"),
        ("refusal", False, "content_filter"),
        ("something_new", False, "stop"),
        (None, False, "stop"),
        ("tool_use", True, "tool_calls"),
        ("tool_use", False, "stop"),
        ("end_turn", True, "tool_calls"),
        ("max_tokens", True, "length"),
    ],
)
def test_each_stop_reason_has_a_finish_reason(reason: str | None, with_tool: bool, expected: str) -> None:
    tool = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
    call = (block(0, **tool), stop(0)) if with_tool else ()
    assert received(start(), *call, finish(reason), END)[-1]["choices"][0]["finish_reason"] == expected
    whole = {"content": [tool] if with_tool else [], "stop_reason": reason}
    assert translator(stream=False).reply(orjson.dumps(whole)).finish_reason == expected


def test_a_refusal_is_told_in_the_providers_words() -> None:
    details = {"type": "refusal", "category": "cyber", "explanation": "Blocked."}
    refused = event("message_delta", delta={"stop_reason": "refusal", "stop_details": details}, usage={})
    assert deltas(start(), refused, END) == [{"refusal": "Blocked."}]
    assert deltas(start(), finish("refusal"), END) == []


THINKING = (
    start(),
    block(0, type="thinking", thinking="", signature=""),
    delta(0, "thinking_delta", thinking="Two plus"),
    delta(0, "thinking_delta", thinking=" two."),
    delta(0, "signature_delta", signature="sig=="),
    stop(0),
    block(1, type="redacted_thinking", data="Zm9v"),
    stop(1),
    block(2, type="tool_use", id="toolu_1", name="look", input={}),
    stop(2),
    finish("tool_use"),
    END,
)


def test_thinking_is_reasoning_content() -> None:
    assert [delta.get("reasoning_content") for delta in deltas(*THINKING)[:3]] == ["Two plus", " two.", None]


def test_what_the_client_collected_of_the_thinking_can_be_sent_back() -> None:
    """A client that merges `reasoning_details` by index, and one that only lists them, get the same blocks back."""
    listed = [detail for delta in deltas(*THINKING) for detail in delta.get("reasoning_details", [])]
    merged = [
        {"type": "reasoning.text", "index": 0, "text": "Two plus two.", "signature": "sig=="},
        {"type": "reasoning.encrypted", "index": 1, "data": "Zm9v"},
    ]
    call = {"id": "toolu_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    for details in (listed, merged):
        messages = [
            {"role": "user", "content": "Go."},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_details": details},
            {"role": "tool", "tool_call_id": "toolu_1", "content": "done"},
        ]
        body = orjson.loads(translator(model="claude-opus-5-5", messages=messages).request().body)
        assert body["messages"][1]["content"][:2] == [
            {"type": "thinking", "thinking": "Two plus two.", "signature": "sig=="},
            {"type": "redacted_thinking", "data": "Zm9v"},
        ]


def test_a_signature_without_a_text_is_carried() -> None:
    events = (start(), block(0, type="thinking", thinking="", signature="sig=="), stop(0), finish(), END)
    (carrier,) = deltas(*events)
    assert carrier["reasoning_details"][0]["signature"] == "sig=="
    assert "reasoning_content" not in carrier


def test_a_ping_and_a_proxys_comment_keep_the_client_awake() -> None:
    chunks = translator().feed(event("ping") + start() + b": keep-alive\n\n" + event("ping"))
    assert [chunk.data for chunk in chunks if not chunk.data.startswith(b"data")] == [PING] * 3


def test_what_is_new_or_the_providers_own_is_ignored() -> None:
    events = (
        event("message_start_v2"),
        start(),
        block(0, type="compaction", content="x"),
        delta(0, "compaction_delta", content="y"),
        block(1, type="fallback"),
        delta(1, "citations_delta", citation={}),
        event("content_block_audio", index=1),
        b"event: nothing\n\n",
        b"data: {}\n\n",
        text("a"),
        finish(),
        END,
    )
    assert deltas(*events) == [{"content": "a"}]


def test_fields_of_another_type_are_as_if_they_were_not_there() -> None:
    events = (
        event("message_start", message={"id": 5, "model": None, "usage": [], "content": 5}),
        event("content_block_start", index=None, content_block=5),
        event("content_block_delta", index={}, delta={"type": ["x"]}),
        event("content_block_delta", delta={"type": "text_delta", "text": 5}),
        event("content_block_stop", index="0"),
        event("message_delta", delta=5, usage={"output_tokens": "7", "input_tokens": True}),
        event("error_v2", error=[]),
        text("a"),
        finish(output_tokens=None),
        END,
    )
    assert deltas(*events) == [{"content": "a"}]


def test_text_that_comes_before_the_message_start_is_not_lost() -> None:
    chunks = received(text("a"), finish(), END)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {},
    ]


def test_a_message_that_starts_twice_is_one() -> None:
    assert deltas(start(), start(), text("a"), finish(), END) == [{"content": "a"}]


def test_a_second_message_in_the_first_is_an_error() -> None:
    error = failure(start(), text("a"), start(id="msg_2"), text("b"), END)
    assert isinstance(error, UpstreamBadBody)
    assert error.kind == "bad_event"


def test_events_are_known_by_their_name_when_they_do_not_say_their_type() -> None:
    def named(kind: str, **data: Any) -> bytes:
        return f"event: {kind}\ndata: ".encode() + orjson.dumps(data) + b"\n\n"

    piece = {"type": "text_delta", "text": "a"}
    events = (
        named("message_start", message={"id": "msg_1"}),
        named("content_block_delta", index=0, delta=piece),
        named("message_delta", delta={"stop_reason": "end_turn"}),
        named("message_stop"),
    )
    assert deltas(*events) == [{"content": "a"}]


def test_a_lone_surrogate_is_passed_on_as_it_was_written() -> None:
    broken = text("?").replace(b'"?"', b'"\\ud83d"')
    anthropic = translator()
    (chunk,) = anthropic.feed(start() + broken)[1:]
    assert b'"content":"\\ud83d"' in chunk.data
    meter = Meter([])
    meter.see(chunk.text, None, None)
    assert meter.completion_tokens == 1


def test_a_message_start_that_comes_too_late_is_a_second_message() -> None:
    assert isinstance(failure(text("a"), start(), finish(), END), UpstreamBadBody)


def deep(levels: int) -> bytes:
    whole = block(0, type="tool_use", id="toolu_1", name="look", input="?")
    return whole.replace(b'"?"', b'{"a":' * levels + b"1" + b"}" * levels)


@pytest.mark.parametrize("levels", [300, 1_000])
def test_a_deep_input_arrives_whole_or_ends_the_stream(levels: int) -> None:
    """How deep Python writes JSON differs between its versions."""
    anthropic = translator()
    chunks = anthropic.feed(start() + deep(levels) + stop(0) + finish("tool_use") + END)
    arguments = "".join(chunk.text for chunk in chunks).removeprefix("look")
    try:
        anthropic.flush()
    except UpstreamBadBody as error:
        assert (error.kind, arguments, levels) == ("bad_event", "", 1_000)
    else:
        assert arguments.count("a") == levels


@pytest.mark.parametrize("count", ["-5", "true", "1e300", "Infinity", "NaN", '"7"', "null", "[]"])
def test_a_count_that_is_none_is_not_counted(count: str) -> None:
    counted = finish(output_tokens=8).replace(b"8", count.encode())
    (usage,) = [chunk.usage for chunk in translator().feed(start() + counted) if chunk.finish_reason]
    assert usage == Usage(12, None)


def test_bytes_after_the_last_word_are_not_read() -> None:
    anthropic = translator()
    chunks = anthropic.feed(start() + finish() + END + text("a") + b"data: [DONE]\n\n")
    assert chunks[-1].data == DONE
    assert anthropic.done
    assert anthropic.feed(text("b")) == anthropic.flush() == []


def test_a_last_event_without_its_blank_line_counts() -> None:
    anthropic = translator()
    anthropic.feed(start() + finish() + END.rstrip(b"\n"))
    assert not anthropic.done
    assert [chunk.data for chunk in anthropic.flush()] == [DONE]


# --- streams that break -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"", text("b")[:40], text("b").rstrip(b"\n"), finish()[:60]])
def test_a_stream_without_its_stop_reason_is_truncated(end: bytes) -> None:
    assert isinstance(failure(start(), text("a"), end), UpstreamTruncated)


def test_a_stream_that_ends_after_its_stop_reason_is_whole() -> None:
    anthropic = translator()
    anthropic.feed(start() + text("a") + finish())
    assert [chunk.data for chunk in anthropic.flush()] == [DONE]
    assert anthropic.done


@pytest.mark.parametrize(
    ("kind", "error_class", "status", "code"),
    [
        ("overloaded_error", UpstreamOverloaded, 503, "overloaded"),
        ("rate_limit_error", UpstreamRateLimited, 429, "rate_limit_exceeded"),
        ("api_error", UpstreamError, 502, "upstream_error"),
        ("timeout_error", UpstreamError, 502, "upstream_error"),
        ("a_new_error", UpstreamError, 502, "upstream_error"),
        ("invalid_request_error", UpstreamRejected, 400, "invalid_request_error"),
        ("not_found_error", UpstreamRejected, 404, "model_not_found"),
    ],
)
def test_an_error_event_ends_the_stream_with_what_it_says(
    kind: str, error_class: type[UpstreamError], status: int, code: str
) -> None:
    error = failure(start(), text("a"), event("error", error={"type": kind, "message": "Says why."}), text("b"), END)
    assert type(error) is error_class
    assert (error.http_status, error.error_code, error.message) == (status, code, "Says why.")
    assert error.kind == "error_event"


def test_what_came_before_the_error_reaches_the_client_and_nothing_after_it() -> None:
    anthropic = translator()
    chunks = anthropic.feed(start() + text("a") + event("error", error={"type": "api_error"}) + text("b") + END)
    assert anthropic.done
    assert [chunk.text for chunk in chunks] == ["", "a"]


@pytest.mark.parametrize(
    "data", [b'data: {"error": {"message": "Says why."}}\n\n', b'error: {"error": {"message": "Says why."}}\n\n']
)
def test_errors_in_other_servers_forms_are_errors(data: bytes) -> None:
    error = failure(start(), data, END)
    assert (error.message, error.kind) == ("Says why.", "error_event")


def test_an_error_event_without_words_has_some() -> None:
    assert failure(start(), event("error")).message == "the provider failed and gave no reason"
    assert failure(start(), b"error: boom\n\n").message == "the provider failed and gave no reason"


def test_a_credential_that_is_refused_in_mid_stream_is_not_quoted() -> None:
    refused = event("error", error={"type": "authentication_error", "message": f"invalid key {KEY}"})
    error = failure(start(), refused)
    assert isinstance(error, ProviderAuth)
    assert error.kind == "auth"
    assert KEY not in error.message


@pytest.mark.parametrize("bad", [b"data: {broken\n\n", b"data: [DONE]\n\n", b"data: \xff\n\n", b"data: 5\n\n"])
def test_the_third_event_that_is_not_json_ends_the_stream(bad: bytes) -> None:
    assert deltas(start(), bad, text("a"), bad, finish(), END) == [{"content": "a"}]
    error = failure(start(), bad, text("a"), bad, bad, END)
    assert isinstance(error, UpstreamBadBody)
    assert error.kind == "bad_event"


@pytest.mark.parametrize("deep", [b"data: " + b"[" * 100_000, b"data: " + b'{"a":' * 100_000])
def test_deep_json_is_a_bad_event_like_any_other(deep: bytes) -> None:
    assert deltas(start(), deep + b"\n\n", text("a"), finish(), END) == [{"content": "a"}]


def test_an_event_that_is_too_large_does_not_eat_the_good_ones_before_it() -> None:
    anthropic = translator()
    chunks = anthropic.feed(start() + text("a") + b"data: " + b"x" * (MAX_EVENT + 1))
    assert anthropic.done
    assert [chunk.text for chunk in chunks] == ["", "a"]
    with pytest.raises(EventTooLarge):
        anthropic.flush()


def test_an_event_of_a_quarter_megabyte_passes() -> None:
    assert deltas(start(), text("x" * 262_144), finish(), END) == [{"content": "x" * 262_144}]


# --- whole answers ------------------------------------------------------------------------------------------------


def reply(content: list[Json], **message: Any) -> Json:
    request = message.pop("request", {})
    body = {"type": "message", "model": "claude-x-20260101", "content": content, "stop_reason": "end_turn", **message}
    completion: Json = orjson.loads(translator(stream=False, **request).reply(orjson.dumps(body)).body)
    return completion


USAGE = {"input_tokens": 3, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 20, "output_tokens": 9}


def test_a_whole_message_is_a_chat_completion() -> None:
    completion = reply([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}], usage=USAGE)
    assert completion == {
        "id": "chatcmpl-test",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "claude-x-20260101",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": Usage(123, 9, cached_tokens=100, cache_write_tokens=20).to_openai(),
    }


def test_a_whole_message_keeps_every_tool_call() -> None:
    content: list[Json] = [
        {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"a": "é"}},
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}},
        {"type": "tool_use", "id": "toolu_2", "name": "now", "input": None},
    ]
    choice = reply(content, stop_reason="tool_use")["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {"id": "toolu_1", "type": "function", "function": {"name": "look", "arguments": '{"a":"é"}'}},
        {"id": "toolu_2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]


def test_a_whole_message_calls_a_custom_tool_with_its_text() -> None:
    content = [{"type": "tool_use", "id": "toolu_1", "name": "run", "input": {"input": "ls"}}]
    message = reply(content, stop_reason="tool_use", request={"tools": CUSTOM})["choices"][0]["message"]
    assert message["tool_calls"] == [{"id": "toolu_1", "type": "custom", "custom": {"name": "run", "input": "ls"}}]


def test_a_whole_message_carries_its_thinking() -> None:
    content = [
        {"type": "thinking", "thinking": "Hm.", "signature": "sig=="},
        {"type": "redacted_thinking", "data": "Zm9v"},
        {"type": "text", "text": "A."},
    ]
    message = reply(content)["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm."
    assert [detail["type"] for detail in message["reasoning_details"]] == ["reasoning.text", "reasoning.encrypted"]
    body = translator(
        model="claude-opus-5-5",
        messages=[{"role": "user", "content": "Go."}, message, {"role": "user", "content": "On."}],
    ).request()
    assert orjson.loads(body.body)["messages"][1]["content"] == content


def test_a_whole_refusal_has_no_content() -> None:
    choice = reply([], stop_reason="refusal", stop_details={"explanation": "Blocked."})["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": "Blocked."}
    assert choice["finish_reason"] == "content_filter"


def test_an_empty_answer_is_an_empty_text() -> None:
    assert reply([])["choices"][0]["message"]["content"] == ""


def test_the_meter_reads_the_text_and_the_usage_of_a_whole_message() -> None:
    content = [{"type": "text", "text": "ab"}, {"type": "tool_use", "id": "t", "name": "look", "input": {}}]
    body = {"content": content, "stop_reason": "tool_use", "usage": USAGE}
    whole = translator(stream=False).reply(orjson.dumps(body))
    assert (whole.text, whole.finish_reason) == ("ablook{}", "tool_calls")
    assert whole.usage == Usage(123, 9, cached_tokens=100, cache_write_tokens=20)


def test_the_usage_of_a_whole_message_is_null_when_the_provider_gave_none() -> None:
    assert reply([])["usage"] is None


@pytest.mark.parametrize(
    "body", [b"", b"<html></html>", b"[]", b"5", b"{}", b'{"content": "x"}', b"\xff", b"[" * 100_000]
)
def test_an_answer_that_is_no_message_is_a_bad_body(body: bytes) -> None:
    with pytest.raises(UpstreamBadBody):
        translator(stream=False).reply(body)


@pytest.mark.parametrize(
    "body", [b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}', b'{"error":"Overloaded"}']
)
def test_an_error_with_status_200_is_an_error(body: bytes) -> None:
    with pytest.raises(UpstreamError) as caught:
        translator(stream=False).reply(body)
    assert (caught.value.kind, caught.value.message) == ("error_event", "Overloaded")


# --- errors -------------------------------------------------------------------------------------------------------


def problem(kind: str, message: str = "Says why.", **more: Any) -> bytes:
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": message, **more}, "request_id": "req_1"})


@pytest.mark.parametrize(
    ("status", "kind", "error_class", "seen", "code"),
    [
        (400, "invalid_request_error", UpstreamRejected, 400, "invalid_request_error"),
        (402, "billing_error", UpstreamRateLimited, 429, "insufficient_quota"),
        (404, "not_found_error", UpstreamRejected, 404, "model_not_found"),
        (413, "request_too_large", UpstreamRejected, 413, "request_too_large"),
        (422, "invalid_request_error", UpstreamRejected, 422, "invalid_request_error"),
        (429, "rate_limit_error", UpstreamRateLimited, 429, "rate_limit_exceeded"),
        (500, "api_error", UpstreamError, 502, "upstream_error"),
        (503, "api_error", UpstreamOverloaded, 503, "overloaded"),
        (504, "timeout_error", UpstreamError, 502, "upstream_error"),
        (529, "overloaded_error", UpstreamOverloaded, 503, "overloaded"),
        (599, "api_error", UpstreamError, 502, "upstream_error"),
    ],
)
def test_each_status_has_its_error(
    status: int, kind: str, error_class: type[UpstreamError], seen: int, code: str
) -> None:
    error = translator().error(status, problem(kind))
    assert type(error) is error_class
    assert (error.http_status, error.error_code, error.message) == (seen, code, "Says why.")


def test_an_error_has_the_label_of_its_cause() -> None:
    kinds = [translator().error(status, b"").kind for status in (302, 400, 401, 429, 500, 204)]
    assert kinds == ["redirect", "http_4xx", "auth", "http_429", "http_5xx", "bad_body"]


@pytest.mark.parametrize(
    "message",
    [
        "prompt is too long: 208310 tokens > 200000 maximum",
        "input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000",
    ],
)
def test_a_prompt_that_is_too_long_has_openais_code(message: str) -> None:
    error = translator().error(400, problem("invalid_request_error", message))
    assert (error.error_code, error.http_status, error.message) == ("context_length_exceeded", 400, message)


def test_the_providers_own_code_is_passed_on() -> None:
    error = translator().error(400, problem("invalid_request_error", details={"error_code": "credits_exhausted"}))
    assert (error.error_code, error.error_type) == ("credits_exhausted", "invalid_request_error")


@pytest.mark.parametrize("status", [401, 403])
def test_the_gateways_credential_is_not_the_clients_business(status: int) -> None:
    error = translator().error(status, problem("authentication_error", f"invalid key {KEY}"))
    assert isinstance(error, ProviderAuth)
    assert error.http_status == 502
    assert KEY not in error.message


@pytest.mark.parametrize(("status", "code"), [(401, "invalid_api_key"), (403, "permission_denied")])
def test_the_clients_own_credential_is_and_is_not_quoted(status: int, code: str) -> None:
    own = translator({"own_credential": True})
    error = own.error(status, problem("authentication_error", f"invalid key {KEY}"))
    assert isinstance(error, UpstreamRejected)
    assert (error.http_status, error.error_code) == (status, code)
    assert KEY not in error.message


def test_patience_is_at_least_a_second_and_as_long_as_the_provider_says() -> None:
    assert translator().error(429, b"").retry_after == 1.0
    assert translator().error(429, b"", 0.2).retry_after == 1.0
    assert translator().error(429, b"", 30.0).retry_after == 30.0
    assert translator().error(529, b"", 5.0).retry_after == 5.0


@pytest.mark.parametrize("status", [100, 204, 301, 400, 401, 404, 418, 429, 500, 529])
@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": 5}', b'{"error": {"message": {}}}', b"\xff"])
def test_an_error_is_made_of_any_body(status: int, body: bytes) -> None:
    error = translator().error(status, body)
    assert error.message
    assert orjson.loads(error.body())["error"]["code"]


def test_an_error_with_a_lone_surrogate_can_be_sent() -> None:
    body = b'{"error": {"message": "a\\ud800", "type": "\\ud800", "details": {"error_code": "\\ud800"}}}'
    assert orjson.loads(translator().error(400, body).body())["error"]["message"] == "a?"


def test_an_error_that_is_a_string_is_read_and_a_long_one_is_cut() -> None:
    assert translator().error(400, b'{"error": "Says why."}').message == "Says why."
    assert len(translator().error(400, problem("invalid_request_error", "x" * 5_000)).message) == 2_000


# --- models -------------------------------------------------------------------------------------------------------


def test_models_listed_are_read_from_the_list_of_models() -> None:
    listed = {"data": [{"type": "model", "id": "claude-a"}, {"id": "claude-b"}, {"id": 5}, "x"], "has_more": False}
    assert [model.name for model in models_listed(listed)] == ["claude-a", "claude-b"]


@pytest.mark.parametrize("parsed", [None, [], {}, {"data": 5}, "x"])
def test_no_model_is_read_from_anything_else(parsed: Any) -> None:
    assert models_listed(parsed) == []


def test_a_strict_client_reads_the_whole_of_a_stream() -> None:
    chunks = translator(stream_options={"include_usage": True}).feed(b"".join(THINKING))
    answer = assemble(b"".join(chunk.data for chunk in chunks), wants_usage=True)
    assert answer.done
    assert answer.choice.reasoning == "Two plus two."
    assert answer.choice.tool_calls == [{"id": "toolu_1", "name": "look", "arguments": "{}"}]
