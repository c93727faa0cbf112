"""Every recorded answer of a real provider, through the translator of its dialect.

The recordings are other people's text and not part of the project: they are read where they lie beside it. How many ran
is printed, so that their absence shows.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.protocol.dialects import DIALECTS
from gateway.protocol.errors import GatewayError, ProviderAuth, UpstreamRejected
from gateway.protocol.json_object import edit_object
from gateway.protocol.meter import Meter
from gateway.protocol.request import Call, parse_chat, prompt_of
from gateway.protocol.usage import Usage
from tests.support.streams import Played, assemble, counts, in_pieces, load_cases, make_call, play

pytestmark = pytest.mark.unit

RECORDINGS = Path(__file__).parents[2].parent / "shared" / "recordings"
DIALECT_OF = {"chat": "openai", "messages": "anthropic", "api_chat": "ollama"}

# Answers with status 200 that are errors all the same: the code that the client gets, and what happened.
BROKEN = {
    # Groq ends the stream with `event: error` when the model's tool call does not fit the schema, or is missing.
    "groq/chat_openai-gpt-oss-120b_error+reasoning-field_25e98858.sse": "tool_use_failed",
    "groq/chat_openai-gpt-oss-120b_error+reasoning-field_952e74de.sse": "tool_use_failed",
    # llama.cpp under gpustack ran out of context and says so in a field named `error:`.
    "gpustack/chat_qwen3_reasoning-conten+text_0cc39fcd.sse": "upstream_error",
    # OpenRouter: "Token limit reached", in a chunk.
    "openrouter/chat_minimax-minimax-m2-free_error+reasoning-field_baafd4cb.sse": "400",
}


@dataclass(frozen=True, slots=True)
class Recording:
    file: str
    dialect: str
    provider: str
    status: int
    stream: bool
    body: bytes

    def call(self, *, wants_usage: bool = False) -> Call:
        options = {"stream_options": {"include_usage": True}} if wants_usage else {}
        return make_call(self.dialect, {"stream": self.stream, **options})


def index() -> list[dict[str, Any]]:
    path = RECORDINGS / "index.json"
    rows: list[dict[str, Any]] = orjson.loads(path.read_bytes())["bodies"] if path.exists() else []
    return rows


def recordings() -> Iterator[Recording]:
    for row in index():
        if row["fidelity"] == "raw" and row["kind"] in DIALECT_OF:
            body = (RECORDINGS / row["file"]).read_bytes()
            yield Recording(row["file"], DIALECT_OF[row["kind"]], row["provider"], row["status"], row["stream"], body)


def test_every_recording_means_what_its_provider_meant(figure: Callable[[str], None]) -> None:
    failures, ran = [], 0
    for recording in recordings():
        ran += 1
        try:
            check(recording)
        except Exception as error:  # any failure of any recording is reported, with its file
            failures.append(f"{recording.file}: {type(error).__name__}: {error}")
    figure(f"recordings: {ran} ran" if ran else "recordings: not present, 0 ran")
    assert not failures, "\n".join(failures)
    assert ran or load_cases()


def check(recording: Recording) -> None:
    if recording.status != 200:
        check_error(recording)
    elif recording.stream:
        check_stream(recording, wants_usage=False)
        check_stream(recording, wants_usage=True)
    else:
        check_reply(recording)


def test_every_recorded_request_is_accepted_and_edited_in_place() -> None:
    for body in requests():
        changes = {"model": "another", "stream_options": {"include_usage": True}}
        assert orjson.loads(edit_object(parse_chat(body).body, changes)) == {**orjson.loads(body), **changes}


def requests() -> Iterator[bytes]:
    """What real clients sent to OpenAI-compatible servers, and what our own streams were asked with."""
    for row in index():
        if row["kind"] == "chat" and row.get("request_file"):
            yield (RECORDINGS / row["request_file"]).read_bytes()
    for case in load_cases():
        yield case.call().asked.body


# --- streams ------------------------------------------------------------------------------------------------------


def check_stream(recording: Recording, *, wants_usage: bool) -> None:
    call = recording.call(wants_usage=wants_usage)
    played, again = play(call, [recording.body]), play(call, in_pieces(recording.body, 7))
    assert again.chunks == played.chunks
    assert again.code == played.code == BROKEN.get(recording.file), played.error
    strict = recording.dialect != "openai" or recording.provider == "openai"
    answer = assemble(played.received, strict=strict, wants_usage=wants_usage)
    assert answer.done == (played.error is None)
    assert sorted(played.text) == sorted("".join(choice.generated() for choice in answer.choices.values()))
    check_usage(recording, *metered(call, played))
    if wants_usage and recorded_usage(recording) and recording.dialect != "openai":
        assert answer.usage is not None
        assert counts(answer.usage) == tuple(count or 0 for count in recorded_usage(recording) or ())


def metered(call: Call, played: Played) -> tuple[Usage, str]:
    meter = Meter(prompt_of(call.asked).texts)
    for chunk in played.chunks:
        meter.see(chunk.text, chunk.usage, chunk.finish_reason)
    return meter.result()


# --- whole answers ------------------------------------------------------------------------------------------------


def check_reply(recording: Recording) -> None:
    call = recording.call()
    reply = DIALECTS[recording.dialect].translator(call).reply(recording.body)
    answer = orjson.loads(reply.body)
    # Azure leaves the message out when its filter stopped the answer.
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant" if "message" in choice else "content_filter_results" in choice
    assert reply.finish_reason == answer["choices"][-1]["finish_reason"]
    if recording.dialect == "openai":
        assert reply.body == recording.body
    meter = Meter(prompt_of(call.asked).texts)
    meter.see(reply.text, reply.usage, reply.finish_reason)
    check_usage(recording, *meter.result())


# --- errors -------------------------------------------------------------------------------------------------------


def check_error(recording: Recording) -> None:
    error = DIALECTS[recording.dialect].translator(recording.call()).error(recording.status, recording.body)
    assert isinstance(error, expected_error(recording.status))
    assert error.http_status == (502 if recording.status == 401 else recording.status)
    if recording.status != 401:
        said = orjson.loads(recording.body)["error"]
        assert error.message == (said if isinstance(said, str) else said["message"])
    else:
        assert "key" not in error.message.lower()


def expected_error(status: int) -> type[GatewayError]:
    return ProviderAuth if status in (401, 403) else UpstreamRejected


# --- usage, read a second time ------------------------------------------------------------------------------------


def check_usage(recording: Recording, usage: Usage, source: str) -> None:
    recorded = recorded_usage(recording)
    if recorded is None or None in recorded:
        assert source == "estimated"
        assert recorded is None or usage.completion_tokens == recorded[1]
    else:
        assert (counts(usage.to_openai()), source) == (recorded, "provider")


def recorded_usage(recording: Recording) -> tuple[int | None, ...] | None:
    """Prompt, completion, cached, cache-write and reasoning tokens as the provider's documentation defines them."""
    return {"openai": openai_usage, "anthropic": anthropic_usage, "ollama": ollama_usage}[recording.dialect](
        list(payloads(recording))
    )


def payloads(recording: Recording) -> Iterator[dict[str, Any]]:
    if not recording.stream:
        yield orjson.loads(recording.body)
        return
    for line in re.split(rb"\r\n|\n|\r", recording.body):
        payload = line.removeprefix(b"data:").strip()
        if payload.startswith(b"{"):
            yield orjson.loads(payload)


def openai_usage(payloads: list[dict[str, Any]]) -> tuple[int | None, ...] | None:
    """The last usage that is not null, https://platform.openai.com/docs/api-reference/chat-streaming/streaming.

    Groq's older streams have it in `x_groq` only.
    """
    usages = [payload.get("usage") or (payload.get("x_groq") or {}).get("usage") for payload in payloads]
    said = [usage for usage in usages if usage]
    if not said:
        return None
    prompt, completion, cached, written, reasoning = counts(said[-1])
    cached = cached or said[-1].get("prompt_cache_hit_tokens") or said[-1].get("cached_tokens") or 0
    surplus = said[-1]["total_tokens"] - (prompt or 0) - (completion or 0)
    audio = (said[-1].get("prompt_tokens_details") or {}).get("audio_tokens")
    return ((prompt or 0) + (surplus if surplus == audio else 0), completion, cached, written, reasoning)


def anthropic_usage(payloads: list[dict[str, Any]]) -> tuple[int | None, ...] | None:
    """The start's usage with what `message_delta` says written over it; input excludes what the cache served and took.

    https://platform.claude.com/docs/en/build-with-claude/prompt-caching#tracking-cache-performance
    """
    usage: dict[str, Any] = {}
    for payload in payloads:
        said: Mapping[str, Any] = payload.get("usage") or (payload.get("message") or {}).get("usage") or {}
        usage.update({name: value for name, value in said.items() if value is not None})
    read, written = usage.get("cache_read_input_tokens", 0), usage.get("cache_creation_input_tokens", 0)
    thinking = usage.get("output_tokens_details", {}).get("thinking_tokens", 0)
    return (usage["input_tokens"] + read + written, usage["output_tokens"], read, written, thinking)


def ollama_usage(payloads: list[dict[str, Any]]) -> tuple[int | None, ...] | None:
    """The counts of the last line, https://github.com/ollama/ollama/blob/main/docs/api.md; a missing one is unknown."""
    return (payloads[-1].get("prompt_eval_count"), payloads[-1].get("eval_count"), 0, 0, 0)
