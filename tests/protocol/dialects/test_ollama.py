import json
from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.protocol.dialects.ollama import OllamaTranslator, models_listed
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
from gateway.protocol.sse import DONE, MAX_EVENT
from gateway.protocol.usage import Usage
from tests.support.streams import Case, assemble, in_pieces, load_cases, make_call, play

pytestmark = pytest.mark.unit

CASES = [case for case in load_cases() if case.dialect == "ollama"]
HELLO = b'{"message":{"role":"assistant","content":"Hello"},"done":false}\n'
END = b'{"message":{"content":""},"done":true,"done_reason":"stop","prompt_eval_count":5,"eval_count":2}\n'
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda below: (
        st.lists(below, max_size=2) | st.dictionaries(st.sampled_from(["name", "id", "function", "token"]), below)
    ),
    max_leaves=4,
)
FIELDS = ["error", "message", "done", "done_reason", "logprobs", "eval_count", "prompt_eval_count"]
MESSAGE = st.fixed_dictionaries({}, optional=dict.fromkeys(("content", "thinking", "tool_calls"), JSON))


def translator(request: Mapping[str, Any] | None = None, **target: Any) -> OllamaTranslator:
    return OllamaTranslator(make_call("ollama", request, target=target))


def received(*lines: bytes, **request: Any) -> bytes:
    return play(make_call("ollama", request), lines).sent


def line(**fields: Any) -> bytes:
    return orjson.dumps(fields) + b"\n"


# --- a stream -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_stream_means_the_same_wherever_it_is_cut_in_two(case: Case) -> None:
    for data in (case.data, case.data.replace(b"\n", b"\r\n")):
        whole = play(case.call(), [data])
        assert assemble(whole.sent).choice.text == case.expect.get("text", "")
        for cut in range(len(data)):
            halves = play(case.call(), [data[:cut], data[cut:]])
            assert halves.chunks == whole.chunks
            assert halves.code == whole.code == case.expect.get("error")


def test_the_client_gets_openais_events_as_lines_come() -> None:
    stream = translator({"stream_options": {"include_usage": True}}, model="llama3")
    chunks = stream.feed(HELLO)
    head = b'data: {"id":"chatcmpl-test","object":"chat.completion.chunk","created":1700000000,"model":"llama3",'
    assert [chunk.data for chunk in chunks] == [
        head
        + b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
        + b'"usage":null}\n\n'
        + head
        + b'"choices":[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    ]
    assert chunks[0].text == "Hello"
    assert not stream.done
    (last,) = stream.feed(END)
    assert stream.done
    assert last.data == (
        head
        + b'"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}\n\n'
        + head
        + b'"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7,'
        + b'"prompt_tokens_details":{"cached_tokens":0,"cache_write_tokens":0},'
        + b'"completion_tokens_details":{"reasoning_tokens":0}}}\n\n'
        + DONE
    )
    assert (last.usage, last.finish_reason) == (Usage(5, 2), "stop")
    assert stream.flush() == []


def test_a_client_that_did_not_ask_for_usage_sees_none_but_the_meter_does() -> None:
    played = play(make_call("ollama"), [HELLO, END])
    assert b"usage" not in played.sent
    assert played.chunks[-1].usage == Usage(5, 2)


def test_a_prompt_that_ollama_did_not_count_is_unknown_to_the_meter_and_zero_to_the_client() -> None:
    end = line(done=True, done_reason="stop", eval_count=2, prompt_eval_cached_count=3)
    played = play(make_call("ollama", {"stream_options": {"include_usage": True}}), [HELLO, end])
    assert played.chunks[-1].usage == Usage(None, 2)
    assert (assemble(played.sent).usage or {})["prompt_tokens"] == 0


def test_a_stream_without_any_count_shows_no_usage() -> None:
    end = line(done=True, done_reason="stop", prompt_eval_cached_count=3)
    played = play(make_call("ollama", {"stream_options": {"include_usage": True}}), [HELLO, end])
    assert played.chunks[-1].usage is None
    assert assemble(played.sent).usage is None


def test_a_tool_call_without_an_id_gets_the_same_one_every_time_and_no_other() -> None:
    calls = [{"function": {"name": "now"}}, {"function": {"name": "now", "arguments": None}}]
    lines = [line(message={"tool_calls": calls}), END]
    first, again = (assemble(received(*lines)).choice.tool_calls for _ in range(2))
    assert first == again
    assert len({call["id"] for call in first}) == 2
    assert all(call["id"].startswith("call_") and len(call["id"]) <= 40 for call in first)
    assert [call["arguments"] for call in first] == ["{}", "{}"]


def test_arguments_that_a_server_sends_as_text_stay_that_text() -> None:
    said = line(message={"tool_calls": [{"id": "c", "function": {"name": "now", "arguments": '{"a": 1}'}}]})
    assert assemble(received(said, END)).choice.tool_calls == [{"id": "c", "name": "now", "arguments": '{"a": 1}'}]


def test_all_that_the_model_generated_is_counted() -> None:
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    said = line(message={"thinking": "Hm. ", "content": "Yes. ", "tool_calls": calls})
    assert play(make_call("ollama"), [said, END]).text == 'Hm. Yes. add{"a":1}'


def test_half_an_emoji_passes_to_the_client() -> None:
    sent = received(b'{"message":{"content":"\\ud83d"},"done":false}\n', END)
    assert b'"content":"\\ud83d"' in sent


def test_what_follows_the_last_word_is_not_read() -> None:
    stream = translator()
    assert len(stream.feed(HELLO + END + HELLO)) == 2
    kept = len(stream._buffer)
    assert stream.feed(HELLO) == []
    assert len(stream._buffer) == kept
    assert stream.flush() == []


def test_a_last_line_without_its_line_end_still_counts() -> None:
    stream = translator()
    stream.feed(HELLO + END.rstrip())
    assert not stream.done
    assert stream.flush()[-1].finish_reason == "stop"
    assert stream.done


@pytest.mark.parametrize("rest", [b"", HELLO.rstrip(), HELLO[:30], b'{"done":tr'])
def test_a_stream_that_ends_before_its_last_word_was_cut(rest: bytes) -> None:
    stream = translator()
    stream.feed(HELLO + rest)
    with pytest.raises(UpstreamTruncated):
        stream.flush()


def test_a_stream_that_we_cut_ends_as_if_ollama_had_reached_its_limit() -> None:
    asking = {"stream_options": {"include_usage": True}}
    limited = b'{"message":{"content":""},"done":true,"done_reason":"length","prompt_eval_count":5,"eval_count":2}\n'
    for before in (b"", HELLO):
        ours, theirs = translator(asking), translator(asking)
        sent = b"".join(chunk.data for chunk in ours.feed(before + b'{"message":{"content":"hal'))
        assert sent + ours.cut(Usage(5, 2)) == b"".join(chunk.data for chunk in theirs.feed(before + limited))
        assert ours.flush() == []


def test_an_error_in_mid_stream_is_raised_after_what_came_before_it() -> None:
    stream = translator()
    chunks = stream.feed(HELLO + line(error="the model runner stopped") + END)
    assert [chunk.text for chunk in chunks] == ["Hello"]
    assert stream.done
    for _ in range(2):
        with pytest.raises(UpstreamError, match="the model runner stopped") as raised:
            stream.flush()
        assert raised.value.kind == "error_event"


@pytest.mark.parametrize("error", ["", {"message": ""}, 5, ["?"], {"message": {"deep": []}}])
def test_an_error_that_says_nothing_is_an_error_all_the_same(error: Any) -> None:
    stream = translator()
    stream.feed(HELLO + line(error=error))
    with pytest.raises(UpstreamError) as raised:
        stream.flush()
    assert raised.value.message
    raised.value.event()


def test_an_error_that_quotes_the_credential_is_hidden() -> None:
    stream = translator(credential="secret-of-the-operator")
    stream.feed(line(error="bad token secret-of-the-operator"))
    with pytest.raises(UpstreamError) as raised:
        stream.flush()
    assert "secret-of" not in raised.value.message


@pytest.mark.parametrize(
    "broken",
    [
        b"<html>\n",
        b"[]\n",
        b"null\n",
        b'{"message":{"content":5}}\n',
        b'{"message":"text"}\n',
        b'{"message":{"tool_calls":{}}}\n',
        b'{"message":{"tool_calls":[{"function":{}}]}}\n',
        b'{"message":{"content":"x"},"logprobs":[{"token":"x","bytes":["y"]}]}\n',
        b'{"message":{"content":"\xff"}}\n',
        b"[" * 5000 + b"\n",
        b'{"done":true,"eval_count":1' + b"0" * 5000 + b',"x":"\\ud83d"}\n',
    ],
)
def test_two_bad_lines_are_dropped_and_the_third_ends_the_stream(broken: bytes) -> None:
    stream = translator()
    assert [chunk.text for chunk in stream.feed(broken + HELLO + broken)] == ["Hello"]
    assert not stream.done
    assert [chunk.text for chunk in stream.feed(HELLO + broken + HELLO)] == ["Hello"]
    assert stream.done
    with pytest.raises(UpstreamBadBody) as raised:
        stream.flush()
    assert raised.value.kind == "bad_event"


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional={**dict.fromkeys(FIELDS, JSON), "message": MESSAGE | JSON}), st.binary())
def test_no_line_breaks_the_translator(fields: dict[str, Any], noise: bytes) -> None:
    data = json.dumps(fields).encode() + b"\n" + noise + b"\n"
    played = play(make_call("ollama"), [*in_pieces(data, 7), HELLO])
    assert played.error is None or played.error.event()
    if played.error is None:
        assert assemble(played.sent).done
    try:
        orjson.loads(translator().reply(data.partition(b"\n")[0]).body)
    except UpstreamError as error:
        assert error.event()


def test_a_bad_line_leaves_no_gap_in_the_tool_calls() -> None:
    good = {"id": "c", "function": {"name": "now"}}
    data = received(line(message={"tool_calls": [good, {}]}), line(message={"tool_calls": [good]}), END)
    assert [call["id"] for call in assemble(data).choice.tool_calls] == ["c"]


def test_two_bad_lines_do_not_spoil_a_stream_that_ends_well() -> None:
    assert received(b"?\n", HELLO, b"!\n", END).endswith(DONE)


def test_a_line_of_just_under_a_megabyte_passes() -> None:
    content = "x" * (MAX_EVENT - 100)
    said = line(message={"content": content})
    assert len(said) <= MAX_EVENT
    assert assemble(received(*in_pieces(said, 65536), END)).choice.text == content


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_over_a_megabyte_ends_the_stream_and_is_not_kept(end: bytes) -> None:
    stream = translator()
    long = b'{"message":{"content":"' + b"x" * MAX_EVENT
    chunks = [chunk for piece in [HELLO, *in_pieces(long + end, 100_000)] for chunk in stream.feed(piece)]
    assert [chunk.text for chunk in chunks] == ["Hello"]
    assert stream.done
    assert not stream._buffer
    with pytest.raises(EventTooLarge):
        stream.flush()


@pytest.mark.parametrize("reason", ["load", "unload"])
def test_a_model_that_was_only_loaded_is_no_empty_answer(reason: str) -> None:
    stream = translator({"messages": [{"role": "system", "content": "Be brief."}]})
    assert stream.feed(line(message={"content": ""}, done=True, done_reason=reason)) == []
    with pytest.raises(UpstreamRejected) as raised:
        stream.flush()
    assert (raised.value.http_status, raised.value.param) == (400, "messages")


def test_an_empty_answer_is_a_whole_one() -> None:
    answer = assemble(received(END))
    assert (answer.choice.text, answer.choice.finish_reason, answer.done) == ("", "stop", True)


def test_a_server_that_gives_no_reason_stopped() -> None:
    assert assemble(received(HELLO, line(done=True))).choice.finish_reason == "stop"


# --- logprobs -----------------------------------------------------------------------------------------------------


def token(text: str | bytes, *top: str) -> dict[str, Any]:
    raw = text if isinstance(text, bytes) else text.encode()
    entry: dict[str, Any] = {"token": raw.decode("utf-8", "replace"), "logprob": -0.5, "bytes": list(raw)}
    return {**entry, "top_logprobs": [token(other) for other in top]} if top else entry


def logprobs_of(data: bytes) -> list[Any]:
    events = [orjson.loads(event[6:]) for event in data.split(b"\n\n") if event and event != DONE.strip()]
    return [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["delta"].get("content")]


def test_logprobs_travel_with_the_content_that_they_are_of() -> None:
    data = received(
        line(message={"content": "Hi"}, logprobs=[token("Hi", "Hi", "Ho")]),
        line(message={"content": "!"}, logprobs=[{"token": "!", "logprob": -1}]),
        END,
    )
    first, second = logprobs_of(data)
    plain = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}
    other = {"token": "Ho", "logprob": -0.5, "bytes": [72, 111]}
    assert first == {"content": [{**plain, "top_logprobs": [plain, other]}], "refusal": None}
    assert second["content"] == [{"token": "!", "logprob": -1, "bytes": None, "top_logprobs": []}]


def test_logprobs_of_thinking_are_not_passed_for_those_of_the_content() -> None:
    emoji = "🚪".encode()
    listed = [token("Hm"), token("</think>"), token(emoji[:2]), token(emoji[2:]), token("ok")]
    (told,) = logprobs_of(received(line(message={"thinking": "Hm", "content": "🚪ok"}, logprobs=listed), END))
    assert [entry["bytes"] for entry in told["content"]] == [list(emoji[:2]), list(emoji[2:]), list(b"ok")]


def test_logprobs_that_cannot_be_told_apart_are_left_out() -> None:
    listed = [token("Hm"), token("!o"), token("k")]
    assert logprobs_of(received(line(message={"thinking": "Hm!", "content": "ok"}, logprobs=listed), END)) == [None]


def test_logprobs_of_content_alone_are_passed_though_the_spelling_differs() -> None:
    (told,) = logprobs_of(received(line(message={"content": "ok"}, logprobs=[token(" ok")]), END))
    assert [entry["token"] for entry in told["content"]] == [" ok"]


# --- a whole answer -----------------------------------------------------------------------------------------------


def test_a_whole_answer_becomes_a_completion() -> None:
    message = {"role": "assistant", "content": "Noon.", "thinking": "Look."}
    body = line(message=message, done=True, done_reason="length", prompt_eval_count=9, eval_count=4)
    reply = translator({"stream": False}, model="qwen3").reply(body)
    assert orjson.loads(reply.body) == {
        "id": "chatcmpl-test",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "qwen3",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Noon.",
                    "refusal": None,
                    "reasoning_content": "Look.",
                },
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": Usage(9, 4).to_openai(),
    }
    assert (reply.text, reply.usage, reply.finish_reason) == ("Look.Noon.", Usage(9, 4), "length")


def test_a_whole_answer_with_tool_calls_has_no_content() -> None:
    calls = [{"id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}]
    reply = translator().reply(line(message={"content": "", "tool_calls": calls}, done=True, done_reason="stop"))
    completion = orjson.loads(reply.body)
    assert completion["choices"][0]["message"]["content"] is None
    assert completion["choices"][0]["message"]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    ]
    assert (completion["choices"][0]["finish_reason"], "usage" in completion) == ("tool_calls", False)
    assert reply.usage is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html></html>",
        b"[]",
        HELLO,
        HELLO + END,
        b'{"message":[],"done":true}',
        b'{"message":{"content":7},"done":true}',
        b"[" * 5000,
    ],
)
def test_an_answer_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(UpstreamBadBody) as raised:
        translator().reply(body)
    assert raised.value.kind == "bad_body"


def test_an_error_with_status_200_is_an_error() -> None:
    with pytest.raises(UpstreamError, match="out of memory") as raised:
        translator().reply(b'{"error":"out of memory"}')
    assert raised.value.kind == "error_event"


def test_a_whole_answer_of_a_model_that_was_only_loaded_is_refused() -> None:
    with pytest.raises(UpstreamRejected, match="generated nothing"):
        translator().reply(line(message={"content": ""}, done=True, done_reason="load"))


# --- errors -------------------------------------------------------------------------------------------------------


def failed(status: int, body: bytes = b"", retry_after: float | None = None, **target: Any) -> GatewayError:
    error = translator(**target).error(status, body, retry_after)
    assert orjson.loads(error.body())["error"]["message"]
    return error


def test_an_unknown_model_is_passed_on_as_openais_model_not_found() -> None:
    error = failed(404, b'{"error":"model \'nope\' not found"}')
    assert isinstance(error, UpstreamRejected)
    assert (error.http_status, error.error_code, error.message) == (404, "model_not_found", "model 'nope' not found")


@pytest.mark.parametrize("status", [401, 403])
def test_the_operators_refused_credential_is_the_gateways_fault_and_its_text_is_hidden(status: int) -> None:
    error = failed(status, b'{"error":"unauthorized: key abc"}')
    assert isinstance(error, ProviderAuth)
    assert (error.http_status, "abc" in error.message) == (502, False)


@pytest.mark.parametrize(("status", "code"), [(401, "invalid_api_key"), (403, "permission_denied")])
def test_the_callers_own_refused_credential_is_told_to_the_caller(status: int, code: str) -> None:
    error = failed(status, b'{"error":"unauthorized: key abc"}', own_credential=True)
    assert isinstance(error, UpstreamRejected)
    assert (error.http_status, error.error_code, "abc" in error.message) == (status, code, False)


@pytest.mark.parametrize(("given", "expected"), [(None, 1.0), (0.0, 1.0), (0.2, 1.0), (7.0, 7.0)])
def test_a_rate_limit_asks_for_a_second_at_least(given: float | None, expected: float) -> None:
    error = failed(429, b'{"error":{"message":"slow down"}}', given)
    assert isinstance(error, UpstreamRateLimited)
    assert (error.message, error.retry_after) == ("slow down", expected)


def test_a_busy_server_is_overloaded() -> None:
    error = failed(503, b'{"error":"server busy, please try again"}', 3.0)
    assert isinstance(error, UpstreamOverloaded)
    assert (error.http_status, error.retry_after) == (503, 3.0)


@pytest.mark.parametrize("status", [500, 502, 504, 599])
def test_a_failing_server_is_a_bad_gateway(status: int) -> None:
    error = failed(status, b'{"error":"llama runner process has terminated"}')
    assert (error.http_status, error.error_code) == (502, "upstream_error")
    assert isinstance(error, UpstreamError)
    assert error.kind == "http_5xx"


def test_a_request_that_ollama_refuses_is_passed_on_in_its_words() -> None:
    error = failed(400, b'{"error":"gemma does not support tools"}')
    assert isinstance(error, UpstreamRejected)
    assert (error.http_status, error.message) == (400, "gemma does not support tools")


def test_a_prompt_that_is_too_long_has_openais_code() -> None:
    error = failed(400, b'{"error":"prompt too long; exceeded max context length by 9 tokens"}')
    assert error.error_code == "context_length_exceeded"


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"null", b'{"error":', b'{"error":{"message":5}}', b"[" * 5000])
@pytest.mark.parametrize("status", [302, 400, 404, 418, 429, 500, 503])
def test_no_error_answer_breaks_the_translator(status: int, body: bytes) -> None:
    assert isinstance(failed(status, body), UpstreamError)


# --- models -------------------------------------------------------------------------------------------------------


def test_models_listed_are_those_of_the_local_models() -> None:
    models = [
        {"name": "llama3:latest", "model": "llama3:latest"},
        {"name": 5},
        "?",
        {},
        {"name": ""},
        {"name": "qwen3"},
    ]
    assert [model.name for model in models_listed({"models": models})] == ["llama3:latest", "qwen3"]


@pytest.mark.parametrize("parsed", [None, [], {}, {"models": None}, {"models": {}}, "x"])
def test_an_answer_without_models_has_no_names(parsed: Any) -> None:
    assert models_listed(parsed) == []
