"""What every dialect promises, on every stream under tests/streams/.

The network may cut anywhere and a server may end its lines as it likes: what the client gets, and what is billed, must
not depend on it. And a stream that broke never looks whole.
"""

import json
import re
from collections.abc import Iterator
from random import Random

import httpx2
import openai
import orjson
import pytest
from openai.types.chat import ChatCompletionChunk

from gateway.protocol.chat import Call, prompt_text
from gateway.protocol.dialects import DIALECTS
from gateway.protocol.meter import Meter
from gateway.protocol.usage import Usage
from tests.support.streams import (
    Answer,
    Case,
    Played,
    assemble,
    client_events,
    counts,
    expected_choices,
    in_pieces,
    load_cases,
    play,
)

pytestmark = pytest.mark.unit

CASES = load_cases()
REQUIRED = ("text", "tools", "parallel_tools", "thinking", "refusal", "usage", "error_midway", "cut", "multibyte")
NOT_SPOKEN = {("ollama", "refusal")}
LINE_ENDS = {"CRLF": b"\r\n", "CR": b"\r"}

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
# A line of NDJSON ends with \n; a \r before it is white space, and alone it ends nothing.
every_line_end = pytest.mark.parametrize(
    ("case", "line_end"),
    [
        pytest.param(case, line_end, id=f"{case.id}-{line_end}")
        for case in CASES
        for line_end in LINE_ENDS
        if case.is_sse or line_end == "CRLF"
    ],
)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", REQUIRED)
def test_every_dialect_has_a_stream_of_each_kind(dialect: str, kind: str) -> None:
    names = [case.name for case in CASES if case.dialect == dialect and case.name.startswith(kind)]
    assert names or (dialect, kind) in NOT_SPOKEN


@every_case
def test_the_answer_is_what_the_case_says(case: Case) -> None:
    played = play(case.call(), [case.data])
    answer = read(case, played)
    expected = expected_choices(case.expect)
    assert played.code == case.expect.get("error")
    assert answer.choices == expected
    assert answer.done == (not case.expect.get("error"))


@every_case
def test_what_is_counted_is_what_the_client_gets(case: Case) -> None:
    played = play(case.call(), [case.data])
    sent = "".join(choice.generated() for choice in read(case, played).choices.values())
    assert sorted(played.text) == sorted(sent)


@every_case
def test_the_meter_ends_with_the_usage_that_the_provider_gave(case: Case) -> None:
    played = play(case.call(), [case.data])
    usage, source = metered(case, played)
    expected = case.expect.get("usage") or {}
    if expected.get("prompt_tokens") and expected.get("completion_tokens") is not None:
        assert (counts(expected), "provider") == (counts(usage.to_openai()), source)
    else:  # no prompt is empty: 0 stands for a count that the provider left out
        assert source == "estimated"
        assert expected.get("completion_tokens") in (None, usage.completion_tokens)


@every_case
def test_the_client_gets_the_usage_chunk_when_it_asked(case: Case) -> None:
    answer = read(case, play(case.call(), [case.data]))
    if case.call().chat.wants_usage and not case.expect.get("error"):
        assert answer.usage is not None
        assert counts(answer.usage) == counts(case.expect["usage"])


@every_case
def test_the_chunks_are_the_same_wherever_the_network_cuts(case: Case) -> None:
    cut_everywhere(case.call(), case.data)


@every_line_end
def test_a_stream_means_the_same_with_other_line_ends(case: Case, line_end: str) -> None:
    data = case.data.replace(b"\n", LINE_ENDS[line_end])
    plain, played = play(case.call(), [case.data]), play(case.call(), [data])
    assert read(case, played) == read(case, plain)
    assert metered(case, played) == metered(case, plain)
    cut_everywhere(case.call(), data)


@every_case
def test_a_stream_that_was_cut_short_never_looks_whole(case: Case) -> None:
    for prefix in unfinished(case):
        played = play(case.call(), [prefix])
        assert played.error is not None, f"cut after {prefix[-60:]!r}"
        assert b"[DONE]" not in played.sent
        assert not read(case, played).done


@every_case
def test_nothing_is_read_after_the_last_word(case: Case) -> None:
    translator = DIALECTS[case.dialect].translator(case.call())
    translator.feed(case.data)
    if translator.done:
        assert translator.feed(case.data) == []


@every_case
def test_a_damaged_stream_ends_in_an_error_or_in_valid_json(case: Case) -> None:
    """Whatever a provider sends, `feed` does not raise and the client's parser never meets broken JSON."""
    random = Random(case.id)
    for _ in range(60):
        received = play(case.call(), [damaged(case.data, random)]).received
        for payload in client_events(received):
            assert payload == "[DONE]" or isinstance(json.loads(payload), dict)


def damaged(data: bytes, random: Random) -> bytes:
    at, size = random.randrange(len(data)), random.choice([1, 1, 2, 8, 64])
    instead = random.choice(
        [b"", b"\n", b"\r", b"\xff", b"\x00", b"}", b"null", b'"', random.randbytes(4), data[:size]]
    )
    return data[:at] + instead + data[at + size :]


@every_case
def test_the_official_sdk_reads_the_same_answer(case: Case) -> None:
    played = play(case.call(), [case.data])
    texts = dict.fromkeys(read(case, played).choices, "")
    error = None
    try:
        for chunk in sdk_chunks(played.received):
            for choice in chunk.choices or ():
                content = choice.delta.content if choice.delta else None
                texts[choice.index] += content if isinstance(content, str) else ""
    except openai.APIError as raised:
        error = raised
    whole_texts = {index: choice.text for index, choice in expected_choices(case.expect).items()}
    if "list" not in case.name:  # Mistral's lists pass verbatim; the SDK takes them as they are
        assert texts == whole_texts
    assert (error.code if error else None) == case.expect.get("error")


def sdk_chunks(stream: bytes) -> Iterator[ChatCompletionChunk]:
    """What openai-python makes of a stream, without a socket."""
    answer = httpx2.Response(200, content=stream, headers={"content-type": "text/event-stream"})
    http = httpx2.Client(transport=httpx2.MockTransport(lambda _: answer))
    sdk = openai.OpenAI(api_key="k", base_url="https://gateway.example/v1", max_retries=0, http_client=http)
    yield from sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=True)


def cut_everywhere(call: Call, data: bytes) -> None:
    whole = outcome(play(call, [data]))
    assert outcome(play(call, in_pieces(data, 1))) == whole
    assert outcome(play(call, in_pieces(data, 7))) == whole
    for at in range(1, len(data)):
        assert outcome(play(call, [data[:at], data[at:]])) == whole, f"cut at byte {at}"


# --- reading a case -----------------------------------------------------------------------------------------------


def read(case: Case, played: Played) -> Answer:
    """The client's answer. Other servers' habits reach it verbatim in OpenAI's dialect, and in no other."""
    call = case.call()
    return assemble(played.received, strict=case.dialect != "openai", wants_usage=call.chat.wants_usage)


def metered(case: Case, played: Played) -> tuple[Usage, str]:
    meter = Meter(prompt_text(case.call().chat))
    for chunk in played.chunks:
        meter.see(chunk.text, chunk.usage, chunk.finish_reason)
    return meter.result()


def outcome(played: Played) -> tuple[object, ...]:
    """What must be equal for equal bytes: chunks, and the error by what a client sees of it."""
    return (played.chunks, played.error.body() if played.error else None)


def unfinished(case: Case) -> Iterator[bytes]:
    """The stream up to every event, and into every event, that comes before its last word."""
    events = case.events()
    for number, event in enumerate(events):
        head = b"".join(events[:number])
        if is_whole(case, head):
            return
        yield head
        if not is_whole(case, head + event):
            yield head + event[: len(event) // 2]


def is_whole(case: Case, data: bytes) -> bool:
    """Has the dialect's last word been said? Read here a second time, in the plainest way."""
    if case.dialect == "anthropic":
        return b'"message_stop"' in data or b'"type":"error"' in data or b'"type": "error"' in data
    if case.dialect == "ollama":
        return any(line.endswith(b"}\n") and _ends_ollama(line) for line in data.splitlines(keepends=True))
    return openai_is_whole(case, data)


def _ends_ollama(line: bytes) -> bool:
    parsed = orjson.loads(line)
    return "error" in parsed or bool(parsed.get("done"))


def openai_is_whole(case: Case, data: bytes) -> bool:
    finished = [event for event in data.split(b"\n\n") if re.search(rb'"finish_reason":"[a-z]', event)]
    expected = [f'"index":{index}'.encode() for index in range(case.request.get("n", 1))]
    return b"[DONE]" in data or all(any(index in event for event in finished) for index in expected)
