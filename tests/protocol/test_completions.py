"""Completions of bare prompts: what holds for the streams of chats holds for theirs."""

from typing import Any

import orjson
import pytest

from gateway.mock import ollama_generate, openai_completion
from gateway.mock.answers import answer
from gateway.mock.formats import Format
from gateway.protocol.dialects import DIALECTS
from gateway.protocol.errors import UnsupportedEndpoint, UpstreamError
from gateway.protocol.meter import Meter
from gateway.protocol.request import Call, max_output, parse_completion, parse_embedding, prompt_of
from gateway.protocol.routing import Provider, Target
from gateway.protocol.usage import Usage
from tests.support.streams import Played, in_pieces, play

pytestmark = pytest.mark.unit

FORMATS: dict[str, Format] = {"openai": openai_completion, "ollama": ollama_generate}
ASKED = {"model": "mock-llama", "prompt": "Say hello.", "stream": True, "max_tokens": 30}
both = pytest.mark.parametrize("dialect", FORMATS)


def call_of(dialect: str, **more: Any) -> Call:
    asked = parse_completion(orjson.dumps({**ASKED, **more}))
    provider = Provider("example", dialect, "https://provider.example/v1")
    return Call(asked, Target(provider, asked.model, "a-credential"), "cmpl-test", 1_700_000_000)


def said_to(call: Call) -> bytes:
    """What the provider streams."""
    form = FORMATS[call.target.provider.dialect]
    translator = DIALECTS[call.target.provider.dialect].translator(call)
    ask = form.read(translator.request().body, {}, frozenset())
    wire = form.stream(ask, answer(ask))
    return b"".join([wire.head, *wire.deltas, wire.tail, wire.done])


def chunks_of(played: Played) -> list[dict[str, Any]]:
    events = [event.removeprefix(b"data: ") for event in played.sent.split(b"\n\n") if event]
    return [orjson.loads(event) for event in events if event != b"[DONE]"]


def texts_of(played: Played) -> str:
    return "".join(choice["text"] for chunk in chunks_of(played) for choice in chunk["choices"])


@both
def test_what_is_counted_is_what_the_client_gets(dialect: str) -> None:
    played = play(call_of(dialect), [said_to(call_of(dialect))])
    assert played.error is None
    assert played.sent.endswith(b"data: [DONE]\n\n")
    assert played.text == texts_of(played) != ""
    assert {chunk["object"] for chunk in chunks_of(played)} == {"text_completion"}


@both
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_the_chunks_are_the_same_wherever_the_network_cuts(dialect: str, line_end: bytes) -> None:
    call = call_of(dialect, stream_options={"include_usage": True})
    data = said_to(call).replace(b"\n", line_end)
    whole = play(call, [data])
    for size in (1, 2, 3, 7, 64, 1000):
        played = play(call, in_pieces(data, size))
        assert (played.sent, played.text) == (whole.sent, whole.text)
    for at in range(0, len(data), 5):
        assert play(call, [data[:at], data[at:]]).sent == whole.sent


@both
def test_a_stream_that_was_cut_short_never_looks_whole(dialect: str) -> None:
    call = call_of(dialect)
    data = said_to(call)
    end = data.rindex(b'"finish_reason":"' if dialect == "openai" else b'"done":true')
    for at in range(0, end, 11):
        played = play(call, [data[:at]])
        assert isinstance(played.error, UpstreamError)
        assert b"[DONE]" not in played.sent


@both
def test_a_stream_that_we_end_looks_like_one_that_reached_its_maximum(dialect: str) -> None:
    call = call_of(dialect, stream_options={"include_usage": True})
    data = said_to(call)
    translator = DIALECTS[dialect].translator(call)
    sent = b"".join(chunk.data for chunk in translator.feed(data[: len(data) // 2]))
    events = [event for event in (sent + translator.cut(Usage(3, 9))).split(b"\n\n") if event]
    assert events[-1] == b"data: [DONE]"
    parsed = [orjson.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    assert [choice["finish_reason"] for chunk in parsed for choice in chunk["choices"] if choice["finish_reason"]] == [
        "length"
    ]
    assert all("text" in choice for chunk in parsed for choice in chunk["choices"])
    assert parsed[-1]["usage"]["completion_tokens"] == 9


def test_an_echoed_prompt_and_several_choices_pass() -> None:
    call = call_of("openai", prompt=["one", "two"], echo=True, n=2)
    played = play(call, [said_to(call)])
    assert {choice["index"] for chunk in chunks_of(played) for choice in chunk["choices"]} == {0, 1, 2, 3}
    assert played.error is None


def test_what_a_model_thinks_is_counted_and_not_shown() -> None:
    lines = [
        {"response": "", "thinking": "Hm. ", "done": False},
        {"response": "Yes.", "done": False},
        {"response": "", "done": True, "done_reason": "stop"},
    ]
    played = play(call_of("ollama"), [orjson.dumps({"model": "m", **line}) + b"\n" for line in lines])
    assert (played.text, texts_of(played)) == ("Hm. Yes.", "Yes.")


@pytest.mark.parametrize(
    ("more", "param"),
    [({"prompt": ["a", "b"]}, "prompt"), ({"prompt": [1]}, "prompt"), ({"echo": True}, "echo"), ({"n": 2}, "n")],
)
def test_what_ollama_cannot_do_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    with pytest.raises(Exception, match="Ollama") as refused:
        DIALECTS["ollama"].translator(call_of("ollama", **more)).request()
    assert getattr(refused.value, "param", None) == param


def test_anthropic_has_neither() -> None:
    with pytest.raises(UnsupportedEndpoint):
        DIALECTS["anthropic"].translator(call_of("anthropic"))


def test_tokens_of_a_prompt_are_counted_as_they_are_and_a_bare_prompt_has_no_frame() -> None:
    def estimate(**more: Any) -> int:
        prompt = prompt_of(parse_completion(orjson.dumps({**ASKED, **more})))
        return Meter(prompt.texts, prompt.tokens, framed=prompt.messages).prompt_estimate()

    assert estimate(prompt=[1, 2, 3]) == 3
    assert estimate(prompt=[[1, 2], [3]]) == 3
    assert estimate(prompt="abcdefg") == 2


def test_the_tokens_of_a_large_input_are_counted_without_a_look_at_each() -> None:
    prompt = prompt_of(parse_embedding(b'{"model":"m","input":[' + b",".join([b"1"] * 100_000) + b"]}"))
    assert (prompt.tokens, list(prompt.texts)) == (100_000, [])
    prompt = prompt_of(parse_embedding(b'{"model":"m","input":[[1,2],[3]]}'))
    assert (prompt.tokens, list(prompt.texts)) == (3, [])


def test_all_that_is_generated_may_be_billed() -> None:
    assert max_output(parse_completion(orjson.dumps({**ASKED, "stream": False, "best_of": 4, "n": 2}))) == 120
    assert max_output(parse_embedding(b'{"model": "m", "input": "a"}')) == 0
