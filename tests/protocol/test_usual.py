"""The shortcut for usual events: what it knows, what it must not know, and that it changes nothing."""

import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Never

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.protocol.dialects.anthropic import AnthropicTranslator
from gateway.protocol.dialects.ollama import OllamaTranslator
from gateway.protocol.dialects.openai import OpenAITranslator
from gateway.protocol.errors import UpstreamError
from gateway.protocol.request import Call, Chunk
from gateway.protocol.sse import MAX_EVENT
from gateway.protocol.usage import Usage
from gateway.protocol.usual import MAX_LEARNED, PATIENCE, PROBE, Usual
from tests.support.streams import make_call

pytestmark = pytest.mark.unit

SAMPLE = b'{"id":"i","a":"x","n":null}'


def taught(event: bytes = SAMPLE, text: str = "a", other: str | None = None) -> Usual:
    usual = Usual()
    assert usual.learn(event, orjson.loads, (text,), (other,) if other else None)
    return usual


# --- what is known ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["y", "two words", '"', "\\", "\n", "日本", "🦙", "\u2028", "\x00", '"n":1', PROBE])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_an_event_that_differs_in_its_text_alone_is_read_by_its_bytes(text: str, ensure_ascii: bool) -> None:
    event = SAMPLE.replace(b'"x"', json.dumps(text, ensure_ascii=ensure_ascii).encode())
    assert taught().text_of(event) == text


@pytest.mark.parametrize(
    "event",
    [
        b"",
        SAMPLE[:-1],
        SAMPLE + b" ",
        SAMPLE.replace(b'"i"', b'"j"'),
        SAMPLE.replace(b"null", b"true"),
        SAMPLE.replace(b'"x"', b"1"),
        SAMPLE.replace(b'"x"', b'"'),
        SAMPLE.replace(b'"x"', b'"x","a":"y"'),
        SAMPLE.replace(b'"x"', b'"x\n"'),
        SAMPLE.replace(b'"x"', b'"\xff"'),
        SAMPLE.replace(b'"x"', b'"\\ud83d"'),
        SAMPLE.replace(b'"x"', b'"\xed\xa0\xbd"'),
        SAMPLE.replace(b'"x"', b'"\\x"'),
        SAMPLE.replace(b'"x"', b'"x\\"'),
        SAMPLE + SAMPLE,
    ],
)
def test_any_other_event_is_not_usual(event: bytes) -> None:
    assert taught().text_of(event) == ""


@pytest.mark.parametrize(
    "event",
    [
        b'{"a":"x","a":"x"}',  # a parser takes one of them, and not the one that was found
        b'{"b":{"a":"x"},"a":"x"}',
        b'{"b":"\\"a\\":\\"x\\"","\\u0061":"x"}',
        b'{"a" : "x"}',
        b'{"a":"probe"}',  # the proof would prove nothing
        b'{"a":"x"} ?',
        b'{"a":"x","b":"%s"}' % (b"b" * MAX_LEARNED),
    ],
)
def test_a_text_that_cannot_be_found_for_certain_is_not_learned(event: bytes) -> None:
    usual = Usual()
    assert not usual.learn(event, orjson.loads, ("a",))
    assert usual.text_of(event.replace(b"x", b"y")) == ""


def test_an_event_that_is_nested_too_deep_to_compare_is_no_failure() -> None:
    event = b'{"a":"x","b":%s1%s}' % (b"[" * 1000, b"]" * 1000)
    usual = Usual()
    learned = usual.learn(event, orjson.loads, ("a",))
    assert bool(learned) == (sys.version_info >= (3, 12)), "later ones can compare it"
    assert usual.text_of(event.replace(b"x", b"y")) == ("y" if learned else "")


@pytest.mark.parametrize(("first", "second"), [("t", "a"), ("a", "t")])
def test_a_second_string_may_differ_before_or_after_the_text(first: str, second: str) -> None:
    def event(text: str, time: str) -> bytes:
        value = {"a": text, "t": time}
        return orjson.dumps({first: value[first], "k": 0, second: value[second]})

    usual = taught(event("x", "12:01"), "a", "t")
    assert usual.text_of(event("y", "12:02:03")) == "y"
    assert usual.text_of(event('","k":0,"', '","k":0,"')) == '","k":0,"'
    assert usual.text_of(event("y", "12").replace(b'"12"', b"12")) == ""
    assert usual.text_of(event("y", "12").replace(b'"12"', b'"\xff"')) == ""


def test_what_was_forgotten_is_not_known() -> None:
    usual = taught()
    usual.forget()
    assert usual.text_of(SAMPLE) == ""


def test_nothing_more_is_learned_where_no_event_is_like_another() -> None:
    usual = Usual()
    numbered = [b'{"a":"x","n":%d}' % number for number in range(PATIENCE + 2)]
    assert [bool(usual.learn(event, orjson.loads, ("a",))) for event in numbered] == [True] * PATIENCE + [False] * 2
    assert not usual.patient


def test_one_event_that_was_like_another_is_worth_more_patience() -> None:
    usual = Usual()
    for number in range(PATIENCE * 2):
        event = b'{"a":"x","n":%d}' % number
        assert usual.learn(event, orjson.loads, ("a",))
        assert number % 3 or usual.text_of(event) == "x"


# --- the usual events of providers --------------------------------------------------------------------------------


class Shape(NamedTuple):
    dialect: str
    before: bytes  # what must have come
    event: bytes  # with TEXT for the literal of the text, and TIME for what differs as well


def chunk(delta: str, rest: str = "") -> bytes:
    head = '"id":"c1","object":"chat.completion.chunk","created":1700000000,"model":"m"'
    return f'data: {{{head},"choices":[{{"index":0,"delta":{delta},"finish_reason":null}}]{rest}}}\n\n'.encode()


def message(*blocks: str) -> bytes:
    start = '{"type":"message_start","message":{"id":"m1","model":"m","usage":{"input_tokens":5}}}'
    opened = [f'{{"type":"content_block_start","index":{n},"content_block":{block}}}' for n, block in enumerate(blocks)]
    return "".join(f"data: {data}\n\n" for data in [start, *opened]).encode()


def delta(content: str, index: int = 0, padding: str = "") -> bytes:
    data = f'{{"type":"content_block_delta","index":{index},"delta":{content}{padding}}}'
    return f"event: content_block_delta\ndata: {data}\n\n".encode()


CALLED = '{"type":"tool_use","id":"t1","name":"look","input":{}}'
SHAPES = {
    "openai": Shape("openai", b"", chunk('{"content":TEXT}', ',"usage":null')),
    "openai padded": Shape("openai", b"", chunk('{"content":TEXT}', ',"usage":null,"obfuscation":"TIME"')),
    "openai refusal": Shape("openai", b"", chunk('{"refusal":TEXT}')),
    "openai tool call": Shape("openai", b"", chunk('{"tool_calls":[{"index":0,"function":{"arguments":TEXT}}]}')),
    "mistral": Shape("openai", b"", chunk('{"content":TEXT}', ',"p":"TIME"')),
    "deepseek": Shape("openai", b"", chunk('{"content":null,"reasoning_content":TEXT}')),
    "together": Shape("openai", b"", chunk('{"role":"assistant","content":TEXT,"tool_calls":[]}')),
    "ollama /v1": Shape("openai", b"", chunk('{"content":"","reasoning":TEXT}')),
    "openrouter": Shape("openai", b"", chunk('{"content":"","reasoning":TEXT,"reasoning_details":[{"text":"TIME"}]}')),
    "dashscope": Shape("openai", b"", chunk('{"content":TEXT}').replace(b"data: ", b"data:")),
    "spaced": Shape("openai", b"", b'data: {"choices": [{"index": 0, "delta": {"content": TEXT}}], "id": "c"}\r\n\r\n'),
    "anthropic": Shape("anthropic", message(), delta('{"type":"text_delta","text":TEXT}', padding="  ")),
    "anthropic thinking": Shape("anthropic", message(), delta('{"type":"thinking_delta","thinking":TEXT}')),
    "anthropic call": Shape(
        "anthropic", message(CALLED, CALLED), delta('{"type":"input_json_delta","partial_json":TEXT}', 1)
    ),
    "anthropic spaced": Shape(
        "anthropic",
        message(),
        b'data: {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": TEXT}}\n\n',
    ),
    "ollama": Shape(
        "ollama",
        b"",
        b'{"model":"m","created_at":"TIME","message":{"role":"assistant","content":TEXT},"done":false}\n',
    ),
    "ollama thinking": Shape(
        "ollama",
        b"",
        b'{"model":"m","created_at":"TIME","message":{"role":"assistant","content":"","thinking":TEXT},"done":false}\n',
    ),
}

Translator = OpenAITranslator | AnthropicTranslator | OllamaTranslator
TRANSLATORS: dict[str, type[Translator]] = {
    "openai": OpenAITranslator,
    "anthropic": AnthropicTranslator,
    "ollama": OllamaTranslator,
}


class Blind(Usual):
    """Knows nothing, so that every event is read in full."""

    def learn(self, *_: Any) -> None:
        return None


def exact(call: Call) -> Translator:
    translator: Translator = TRANSLATORS[call.target.provider.dialect](call)
    translator._usual = Blind()
    return translator


def spelled(shape: Shape, literal: bytes, time: int = 0) -> bytes:
    return shape.event.replace(b"TIME", b"t%dx" % time).replace(b"TEXT", literal)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_usual_event_of_each_provider_is_learned_from_one(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Never:
        raise AssertionError("was read in full")

    call = make_call(shape.dialect)
    translator, other = TRANSLATORS[shape.dialect](call), exact(call)
    for one in (translator, other):
        one.feed(shape.before + spelled(shape, b'"x"'))
    events = [spelled(shape, b'"\\u00e4 b"', 1), spelled(shape, '"ö"'.encode(), 22), spelled(shape, b'"\\"}\\n"', 3)]
    expected = [other.feed(event) for event in events]
    monkeypatch.setattr(translator, "_take", refuse)
    assert [translator.feed(event) for event in events] == expected
    assert [chunk.text for (chunk,) in expected] == ["ä b", "ö", '"}\n']


def test_a_usual_event_that_is_too_large_is_refused_like_any_other() -> None:
    for name in ("openai", "anthropic", "ollama"):
        shape, large = SHAPES[name], b'"' + b"x" * MAX_EVENT + b'"'
        chunks = same(make_call(shape.dialect), [shape.before + spelled(shape, b'"x"'), spelled(shape, large), b""])
        assert "".join(each.text for each in chunks) == "x"


def test_two_usual_events_in_one_read_are_two() -> None:
    for shape in SHAPES.values():
        pair = spelled(shape, b'"y"', 1) + spelled(shape, b'"z"', 2)
        pieces = [shape.before + spelled(shape, b'"x"'), pair, pair[:-1], pair[-1:] + pair, b"\n" + pair]
        texts = [each.text for each in same(make_call(shape.dialect), pieces)]
        assert "".join(texts).removeprefix("looklook") == "x" + "yz" * 4


def filled(*patterns: bytes) -> list[bytes]:
    """Events whose texts are a, b, c …"""
    return [pattern.replace(b"TEXT", b'"%c"' % (97 + number)) for number, pattern in enumerate(patterns)]


USUAL = SHAPES["openai"].event
THOUGHT, PIECE = SHAPES["anthropic thinking"].event, delta('{"type":"input_json_delta","partial_json":TEXT}')
LINE = SHAPES["ollama"].event
STOP = b'data: {"type":"content_block_stop","index":0}\n\n'
THINKING = b'data: {"type":"content_block_start","index":0,"content_block":{"type":"thinking"}}\n\n'
COUNTED = ',"usage":{"prompt_tokens":3,"completion_tokens":2}'
LISTED = LINE.replace(b'"done"', b'"logprobs":[{"token":"b"}],"done"')
# Where an event has the bytes of the usual one, and is more than its text or follows something that matters.
CASES = {
    "half a comment is before it": ("openai", [*filled(USUAL), b": half", *filled(USUAL, USUAL)]),
    "half a line is before it": ("ollama", [*filled(LINE), b"half", *filled(LINE, LINE)]),
    "half a name is before it": ("anthropic", [message(), *filled(THOUGHT), b"event", *filled(THOUGHT, THOUGHT)]),
    "a usage is beside the text": ("openai", filled(*[chunk('{"content":TEXT}', COUNTED)] * 3)),
    "it ends its choice": ("openai", filled(*[USUAL.replace(b"null}]", b'"stop"}]')] * 3)),
    "it has an id": ("openai", filled(*[b"id: 1\n" + USUAL] * 3)),
    "it has a text that is read elsewhere": (
        "openai",
        [chunk(f'{{"reasoning_content":"x","refusal":"y","reasoning":"{text}"}}') for text in ("xy", "z", "zz")],
    ),
    "a chunk with another head is before it": (
        "openai",
        filled(USUAL, USUAL, chunk('{"role":"assistant"}').replace(b'"c1"', b'"c2"'), USUAL),
    ),
    "another thinking block is before it": (
        "anthropic",
        [message(), THINKING, *filled(THOUGHT, THOUGHT), THINKING, *filled(THOUGHT)],
    ),
    "its block has ended": ("anthropic", [message(CALLED), *filled(PIECE, PIECE), STOP, *filled(PIECE)]),
    "it is for a custom tool": (
        "anthropic",
        [message(CALLED.replace("look", "free")), *filled(PIECE, PIECE, PIECE), STOP],
    ),
    "its tokens are listed": ("ollama", filled(*[LISTED] * 3)),
}
CUSTOM = {"tools": [{"type": "custom", "custom": {"name": "free"}}]}


@pytest.mark.parametrize(("dialect", "pieces"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("cut", [False, True])
def test_an_event_with_the_bytes_of_a_usual_one_is_read_in_full_when(
    dialect: str, pieces: list[bytes], cut: bool
) -> None:
    assert same(make_call(dialect, CUSTOM if dialect == "anthropic" else None), pieces, cut=cut)


# --- nothing changes ----------------------------------------------------------------------------------------------

# Literals that break the rules or look like something else, and values that are no strings.
LITERALS = [
    rb'""', rb'"\ud83d"', rb'"\ud83d\ude00"', b'"\xff"', b'"\xed\xa0\xbd"', b'"\x00"', rb'"\u0000"', b'"\n"', b'"\r\n"',
    rb'"\n\n"', b'"\xe2\x80\xa8"', rb'"\""', rb'"\\"', rb'"\\\""', rb'"\"', rb'"\x"', b'"', b'"x', b"null", b"1", b"true", b'["x"]',
    b'{"a":"x"}', b'"finish_reason"', rb'"\"finish_reason\":\"stop\""', b'"x","content":"y"', b'"x"},"finish_reason":"stop"',
    b'"x"},"logprobs":{"content":"y"', b'"x","text":"y"', b'"probe"', b'"\xc2\xa0 \xc2\x85"', b'"x" ', b' "x"', b'"x"/**/',
]  # fmt: skip
ODD = {
    "openai": [
        chunk('{"role":"assistant","content":TEXT,"refusal":null}'),
        chunk('{"content":TEXT}').replace(b"null}]", b'"stop"}]'),
        chunk('{"content":TEXT}').replace(b'"index":0', b'"index":1'),
        chunk('{"content":TEXT}').replace(b'"index":0,', b""),
        chunk('{"content":"a","content":TEXT}'),
        chunk('{"content":TEXT,"content":"a"}'),
        chunk('{"content":TEXT,"reasoning":TEXT}'),
        chunk('{"reasoning_content":TEXT,"reasoning":"a"}'),
        chunk('{"content":[{"type":"text","text":TEXT}]}'),
        chunk('{"content":TEXT}', ',"error":{"message":"m"}'),
        chunk('{"content":TEXT}', ',"error":null,"id":"c2","model":"other"'),
        chunk('{"content":TEXT}', ',"usage":{"prompt_tokens":3,"completion_tokens":2}'),
        chunk('{"content":TEXT},"logprobs":{"content":[{"token":TEXT}]}'),
        chunk('{"content":TEXT}},{"index":1,"delta":{"content":"b"}'),
        b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n',
        b": comment\n\n",
        b"data: {\n\n",
        b'data: "x"\n\n',
        b'data: {"choices":\ndata: []}\n\n',
        b'event: error\ndata: {"message":"m"}\n\n',
        b"id: 1\n" + chunk('{"content":TEXT}'),
        b": " + chunk('{"content":TEXT}')[:-2] + b"\n" + chunk('{"content":"a"}'),
        b"data: [DONE]\n\n",
    ],
    "anthropic": [
        *(
            b"event: x\ndata: " + data + b"\n\n"
            for data in (b'{"type":"ping"}', b'{"type":"message_stop"}', b"{", b"1")
        ),
        delta('{"type":"text_delta","text":TEXT}', 1),
        delta('{"type":"text_delta","text":"a","text":TEXT}'),
        delta('{"type":"signature_delta","signature":TEXT}'),
        delta('{"type":"thinking_delta","thinking":TEXT,"estimated_tokens":1}'),
        delta('{"type":"input_json_delta","partial_json":TEXT}'),
        delta('{"type":"text_delta","text":TEXT},"type":"ping"'),
        delta('{"type":"text_delta","text":TEXT},"error":{"message":"m"}'),
        message(),
        THINKING,
        STOP,
        b'data: {"type":"content_block_start","index":1,"content_block":%s}\n\n' % CALLED.encode(),
        message('{"type":"text","text":TEXT}', '{"type":"tool_use","id":"t2","name":"free"}'),
        b'data: {"type":"content_block_stop","index":0}\n\ndata: {"type":"content_block_stop","index":1}\n\n',
        b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":3}}\n\n',
        b'data: {"type":"error","error":{"type":"overloaded_error","message":TEXT}}\n\n',
        b": ping\n\n",
    ],
    "ollama": [
        b'{"message":{"content":TEXT,"thinking":TEXT},"done":false}\n',
        b'{"message":{"content":"a","content":TEXT},"created_at":"now","done":false}\n',
        b'{"message":{"content":TEXT},"created_at":TEXT,"done":false}\n',
        b'{"message":{"content":TEXT},"logprobs":[{"token":"x"}],"created_at":"now","done":false}\n',
        b'{"message":{"content":TEXT,"tool_calls":[{"function":{"name":"f"}}]},"created_at":"now"}\n',
        b'{"message":{"content":TEXT},"created_at":"now","done":true,"done_reason":"stop","eval_count":4}\n',
        b'{"created_at":"now","error":TEXT}\n',
        b'{"message":{"content":TEXT}}\r\n',
        b"\n",
        b"{\n",
    ],
}
DAMAGE = [
    b"",
    b"\n",
    b"\r",
    b"\xff",
    b"\x00",
    b'"',
    b"\\",
    b"}",
    b"{",
    b",",
    b" ",
    b"null",
    b'"error":1,',
    b'"content":"c",',
]

literals = st.one_of(
    st.text(max_size=6).map(lambda text: json.dumps(text).encode()),
    st.text(max_size=6).map(lambda text: json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.sampled_from(LITERALS),
)


@st.composite
def reads(draw: st.DrawFn, dialect: str) -> list[bytes]:
    """A stream as it comes in: mostly usual events of one provider, at times damaged, cut anywhere."""
    shape = draw(st.sampled_from([shape for shape in SHAPES.values() if shape.dialect == dialect]))
    patterns = st.one_of(st.just(shape.event), st.just(shape.event), st.sampled_from(ODD[dialect]))
    events = [shape.before]
    for number, pattern in enumerate(draw(st.lists(patterns, max_size=10))):
        events.append(pattern.replace(b"TIME", b"t%d" % number).replace(b"TEXT", draw(literals)))
    if draw(st.booleans()):
        events = [event.replace(b"\n", draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"]))) for event in events]
    if draw(st.booleans()):
        return events
    data = b"".join(events)
    if draw(st.booleans()):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.sampled_from(DAMAGE)) + data[at + draw(st.integers(0, 3)) :]
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[start:end] for start, end in pairwise([0, *cuts, len(data)])]


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "ollama"])
@given(data=st.data(), wants_usage=st.booleans(), cut=st.booleans())
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
def test_the_shortcut_changes_nothing(dialect: str, data: st.DataObject, wants_usage: bool, cut: bool) -> None:
    call = make_call(dialect, {"stream_options": {"include_usage": wants_usage}})
    same(call, data.draw(reads(dialect)), cut=cut)


def same(call: Call, pieces: Sequence[bytes], *, cut: bool = False) -> list[Chunk]:
    """The chunks, which are the same piece by piece with the shortcut and without, to the end."""
    usual, blind = TRANSLATORS[call.target.provider.dialect](call), exact(call)
    chunks: list[Chunk] = []
    for piece in pieces:
        chunks += (fed := usual.feed(piece))
        assert fed == blind.feed(piece)
        assert usual.done == blind.done
    assert ended(usual, cut) == ended(blind, cut)
    return chunks


def ended(translator: Translator, cut: bool) -> object:
    """All that is left to be told from outside: what was seen of choices, heads, errors and bad events."""
    if cut:
        return translator.cut(Usage(21, 13, cached_tokens=5))
    try:
        return translator.flush()
    except UpstreamError as error:
        return error.body()
