"""What every dialect promises, on every stream under tests/streams/.

The network may cut anywhere and a server may end its lines as it likes: what the client gets, and what is billed, must
not depend on it. And a stream that broke never looks whole.
"""

import json
import re
from collections.abc import Iterator
from itertools import accumulate
from random import Random
from typing import Any

import httpx2
import openai
import orjson
import pytest
from openai.types.chat import ChatCompletionChunk

from gateway.protocol.dialects import DIALECTS
from gateway.protocol.meter import Meter
from gateway.protocol.request import Call, prompt_of
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
    make_call,
    play,
)

pytestmark = pytest.mark.unit

CASES = load_cases()
REQUIRED = ("text", "tools", "parallel_tools", "thinking", "refusal", "usage", "error_midway", "cut", "multibyte")
NOT_SPOKEN = {("ollama", "refusal")}
HEAD = ("id", "created", "model", "system_fingerprint")  # of a chunk
CUT_AT = Usage(21, 13, cached_tokens=5)
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
    if case.call().asked.wants_usage and not case.expect.get("error"):
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


@every_case
def test_a_stream_that_we_cut_is_whole_wherever_it_is_cut(case: Case) -> None:
    """A budget that is used up ends a stream as its `max_tokens` would: every choice that began has one finish reason,
    the usage is there when it was asked for, and `[DONE]` is the last word."""
    every_byte, after_events = range(len(case.data)), [0, *accumulate(map(len, case.events()))][:-1]
    for include_usage, places in ((True, every_byte), (False, after_events)):
        call = make_call(case.dialect, {**case.request, "stream_options": {"include_usage": include_usage}})
        before = None
        for at in places:
            sent, last = cut_after(call, case.data[:at])
            if (sent, last) != before:
                before = sent, last
                check_cut(case, sent, last, wants_usage=include_usage)


@every_case
def test_a_stream_that_we_cut_is_one_to_the_official_sdk(case: Case) -> None:
    events = case.events()
    for number in range(len(events)):
        sent, last = cut_after(case.call(), b"".join(events[:number]))
        reasons = finish_reasons(sent + last)
        seen: dict[int, list[str]] = {index: [] for index in reasons}
        for chunk in sdk_chunks(sent + last):
            for position, choice in enumerate(chunk.choices or ()):
                index = choice.index if isinstance(choice.index, int) else position
                seen[index] += [choice.finish_reason] if choice.finish_reason else []
        assert seen == reasons


@every_case
def test_the_last_bytes_of_a_cut_are_like_those_before(case: Case) -> None:
    """Id, time and model do not change, and `usage` is null in all chunks but its own."""
    call = make_call(case.dialect, {**case.request, "stream_options": {"include_usage": True}})
    sent, last = cut_after(call, b"".join(case.events()[:2]))
    before, after = parsed_chunks(sent), parsed_chunks(last)
    heads = [tuple(chunk.get(name) for name in HEAD) for chunk in (*before[-1:], *after)]
    if before and all(before[-1].get(name) for name in ("id", "created", "model")):
        assert len(set(heads)) == 1
    assert [chunk["usage"] for chunk in after if chunk["choices"]] == [None] * (len(after) - 1)


@every_case
def test_nothing_follows_a_cut_and_nothing_follows_done(case: Case) -> None:
    translator = DIALECTS[case.dialect].translator(case.call())
    translator.feed(case.data[: len(case.data) // 2])
    translator.cut(CUT_AT)
    assert translator.done
    assert (translator.feed(case.data), translator.cut(CUT_AT)) == ([], b"")
    whole = DIALECTS[case.dialect].translator(case.call())
    sent = b"".join(chunk.data for chunk in whole.feed(case.data))
    assert (whole.cut(CUT_AT) == b"") == (b"[DONE]" in sent)


def cut_after(call: Call, data: bytes) -> tuple[bytes, bytes]:
    """What the client has after `data` of the provider's, and its last bytes if we end the stream there."""
    translator = DIALECTS[call.target.provider.dialect].translator(call)
    sent = b"".join(chunk.data for chunk in translator.feed(data))
    return sent, translator.cut(CUT_AT)


def check_cut(case: Case, sent: bytes, last: bytes, *, wants_usage: bool) -> None:
    answer = assemble(sent + last, strict=case.dialect != "openai", wants_usage=None)
    assert answer.done
    assert answer.error is None
    # What a provider says twice is its own; we say it once, and only where it did not.
    reasons, before = finish_reasons(sent + last), finish_reasons(sent)
    assert all(reasons.values())
    assert reasons == {index: before.get(index) or ["length"] for index in reasons}
    assert reasons.keys() == (before or {0: []}).keys()
    assert (sent + last).endswith(b"\n\n") and (sent + last).count(b"[DONE]") == 1
    alone = [chunk["usage"] for chunk in parsed_chunks(sent + last) if not chunk.get("choices") and chunk.get("usage")]
    assert len(alone) == wants_usage
    if wants_usage and not any(not chunk.get("choices") and chunk.get("usage") for chunk in parsed_chunks(sent)):
        assert alone == [CUT_AT.to_openai()]


def finish_reasons(stream: bytes) -> dict[int, list[str]]:
    """What is said of each choice that began."""
    reasons: dict[int, list[str]] = {}
    for chunk in parsed_chunks(stream):
        for position, choice in enumerate(chunk.get("choices") or ()):
            index = choice.get("index")
            said = reasons.setdefault(index if isinstance(index, int) else position, [])
            said += [choice["finish_reason"]] if choice.get("finish_reason") else []
    return reasons


def parsed_chunks(stream: bytes) -> list[dict[str, Any]]:
    return [json.loads(payload) for payload in client_events(stream) if payload.strip() != "[DONE]"]


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
    return assemble(played.received, strict=case.dialect != "openai", wants_usage=call.asked.wants_usage)


def metered(case: Case, played: Played) -> tuple[Usage, str]:
    meter = Meter(prompt_of(case.call().asked).texts)
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
        return re.search(rb'"(stop_reason": ?"[a-z]|type": ?"error")', data) is not None
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
