"""OpenAI's Chat Completions (https://platform.openai.com/docs/api-reference/chat).

What of a request is refused stands in `openai_rules`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from gateway.mock.answers import Answer, Ask, Counts, Ending, Tool
from gateway.mock.formats import CREATED, FAKE_KEY, Wire, count_prompt, read_object
from gateway.mock.openai_rules import check, parts
from gateway.mock.script import ProviderError, parse_model

NAME = "openai"
STREAM_TYPE = "text/event-stream; charset=utf-8"
JSON_TYPE = "application/json"
BAD_EVENT = b'data: {"id":"chatcmpl-mock","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"cont\n\n'

_FINISH: Mapping[Ending, str] = {
    "stop": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "tools": "tool_calls",
    "refused": "stop",
    "filtered": "content_filter",
}
_NOISE = b"mNq3vRz8LkXw2TgY"  # what `obfuscation` holds: OpenAI evens out the size of its events with it


# --- reading ------------------------------------------------------------------------------------------------------


def read(body: bytes, headers: Mapping[str, str], models: frozenset[str]) -> Ask:
    fields = read_object(body, "We could not parse the JSON body of your request.")
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise ProviderError("you must provide a model parameter")
    _, script = parse_model(model)
    check(fields)
    messages = fields["messages"]
    options = fields.get("stream_options") or {}
    prompt = count_prompt(messages, fields.get("tools"))
    tools, choice, named = _tools(fields)
    return Ask(
        model=model,
        script=script,
        stream=bool(fields.get("stream")),
        question=_question(messages),
        prompt_tokens=prompt if script.prompt_tokens is None else script.prompt_tokens,
        tools=tools,
        choice=choice,
        named=named,
        parallel=fields.get("parallel_tool_calls") is not False,
        results=_results(messages),
        images=sum(part.get("type") == "image_url" for message in messages for part in parts(message)),
        schema=_schema(fields.get("response_format") or {}),
        # OpenAI thinks without showing it; only the count tells.
        thinking="hidden" if fields.get("reasoning_effort") not in (None, "none", "minimal") else "no",
        max_tokens=fields.get("max_completion_tokens") or fields.get("max_tokens"),
        stop=_stop(fields.get("stop")),
        copies=fields.get("n") or 1,
        wants_usage=bool(options.get("include_usage")),
        padded=options.get("include_obfuscation") is not False,
    )


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in parts(message)).strip()


def _question(messages: list[dict[str, Any]]) -> str:
    return next((_text(message) for message in reversed(messages) if message["role"] == "user"), "")


def _results(messages: list[dict[str, Any]]) -> tuple[str, ...]:
    """What tools said after the user's last message."""
    last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    return tuple(_text(message) for message in messages[last + 1 :] if message["role"] == "tool")


def _tools(fields: Mapping[str, Any]) -> tuple[tuple[Tool, ...], Any, str]:
    """The functions, whether one must be called, and the one that must."""
    functions = [tool.get("function") or {} for tool in fields.get("tools") or () if tool.get("type") == "function"]
    tools = tuple(
        Tool(str(function.get("name")), orjson.dumps(function.get("parameters") or {})) for function in functions
    )
    choice = fields.get("tool_choice") or "auto"
    if isinstance(choice, str):
        return tools, choice, ""
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools") or {}
        names = [(tool.get("function") or tool).get("name") for tool in allowed.get("tools") or ()]
        return tuple(tool for tool in tools if tool.name in names), allowed.get("mode", "auto"), ""
    return tools, "required", str((choice.get("function") or {}).get("name", ""))


def _schema(wanted: Mapping[str, Any]) -> bytes | None:
    if wanted.get("type") == "json_schema":
        return orjson.dumps((wanted.get("json_schema") or {}).get("schema") or {})
    return b"{}" if wanted.get("type") == "json_object" else None


def _stop(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


# --- answering ----------------------------------------------------------------------------------------------------


def stream(ask: Ask, said: Answer) -> Wire:
    events = _Events(ask, said)
    role = {"role": "assistant", "content": None if said.calls else "", "refusal": None}
    finish = _finish(ask, said)
    copies = range(ask.copies)
    return Wire(
        head=b"".join(events.choice(index, role) for index in copies),
        deltas=tuple(events.choice(index, delta) for delta in _deltas(said) for index in copies),
        tail=b"".join(events.choice(index, {}, finish) for index in copies) + events.usage(said.counts),
        done=b"data: [DONE]\n\n",
    )


def delta(ask: Ask, said: Answer, text: str) -> bytes:
    return _Events(ask, said).choice(0, {"content": text})


def _deltas(said: Answer) -> Iterator[dict[str, Any]]:
    if not said.hidden_thoughts:
        yield from ({"reasoning_content": piece} for piece in said.thoughts)
    field = "refusal" if said.ending == "refused" else "content"
    yield from ({field: piece} for piece in said.text)
    for index, call in enumerate(said.calls):
        function = {"name": call.name, "arguments": ""}
        yield {"tool_calls": [{"index": index, "id": f"call_{call.id}", "type": "function", "function": function}]}
        for piece in call.arguments:
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}


class _Events:
    """Writes the events of one stream. What they have in common is encoded once."""

    def __init__(self, ask: Ask, said: Answer) -> None:
        common = {
            "id": f"chatcmpl-{said.id}",
            "object": "chat.completion.chunk",
            "created": CREATED,
            "model": ask.model,
            "service_tier": "default",
            "system_fingerprint": "fp_mock",
        }
        self._common = orjson.dumps(common)[:-1]
        self._wants_usage = ask.wants_usage
        self._padded = ask.padded

    def choice(self, index: int, delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._event(orjson.dumps([choice]), b"null")

    def usage(self, counts: Counts | None) -> bytes:
        """The event that carries the counts, if it was asked for."""
        return self._event(b"[]", orjson.dumps(usage_object(counts))) if self._wants_usage and counts else b""

    def _event(self, choices: bytes, usage: bytes) -> bytes:
        data = b'%s,"choices":%s' % (self._common, choices)
        if self._wants_usage:
            data += b',"usage":' + usage
        if self._padded:
            data += b',"obfuscation":"%s"' % _NOISE[: 16 - len(data) % 16]
        return b"data: %s}\n\n" % data


def reply(ask: Ask, said: Answer) -> bytes:
    text = "".join(said.text)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if said.calls or said.ending == "refused" else text,
        "refusal": text if said.ending == "refused" else None,
        "annotations": [],
    }
    if said.thoughts and not said.hidden_thoughts:
        message["reasoning_content"] = "".join(said.thoughts)
    if said.calls:
        message["tool_calls"] = [
            {"id": f"call_{call.id}", "type": "function", "function": {"name": call.name, "arguments": call.json}}
            for call in said.calls
        ]
    finish = _finish(ask, said)
    choices = [
        {"index": index, "message": message, "logprobs": None, "finish_reason": finish} for index in range(ask.copies)
    ]
    whole: dict[str, Any] = {
        "id": f"chatcmpl-{said.id}",
        "object": "chat.completion",
        "created": CREATED,
        "model": ask.model,
        "choices": choices,
        "usage": usage_object(said.counts),
        "service_tier": "default",
        "system_fingerprint": "fp_mock",
    }
    if said.counts is None:
        del whole["usage"]
    return orjson.dumps(whole, option=orjson.OPT_INDENT_2)


def _finish(ask: Ask, said: Answer) -> str:
    """With a function that was named OpenAI says `stop` although it was called."""
    return "stop" if said.ending == "tools" and ask.named else _FINISH[said.ending]


def usage_object(counts: Counts | None) -> dict[str, Any] | None:
    if counts is None:
        return None
    return {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.completion,
        "total_tokens": counts.prompt + counts.completion,
        "prompt_tokens_details": {"cached_tokens": counts.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": counts.reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def models(names: tuple[str, ...]) -> bytes:
    data = [{"id": name, "object": "model", "created": CREATED, "owned_by": "mock"} for name in names]
    return orjson.dumps({"object": "list", "data": data}, option=orjson.OPT_INDENT_2)


# --- errors -------------------------------------------------------------------------------------------------------

_SORRY = "The server had an error while processing your request. Sorry about that!"
# Message, type, parameter and code by status (https://platform.openai.com/docs/guides/error-codes).
_FAILURES: Mapping[int, tuple[str, str | None, str | None, str | None]] = {
    401: (
        f"Incorrect API key provided: {FAKE_KEY}. You can find your API key at "
        "https://platform.openai.com/account/api-keys.",
        None,
        None,
        "invalid_api_key",
    ),
    403: ("Your project does not have access to this model.", None, None, "model_not_found"),
    404: ("The model does not exist or you do not have access to it.", None, "model", "model_not_found"),
    429: (
        "Rate limit reached on requests per min (RPM): Limit 3, Used 3, Requested 1. Please try again in 20s.",
        "requests",
        None,
        "rate_limit_exceeded",
    ),
    503: ("The engine is currently overloaded, please try again later", "server_error", None, None),
}


def failure(status: int) -> ProviderError:
    default: tuple[str, str | None, str | None, str | None]
    default = (f"This request was refused with status {status}.", None, None, "invalid_value")
    if status >= 500:
        default = (_SORRY, "server_error", None, None)
    message, kind, param, code = _FAILURES.get(status, default)
    return ProviderError(message, status=status, kind=kind, param=param, code=code)


def error(problem: ProviderError, request_id: str) -> bytes:
    fields = {
        "message": problem.message,
        "type": problem.kind or "invalid_request_error",
        "param": problem.param,
        "code": problem.code,
    }
    return orjson.dumps({"error": fields}, option=orjson.OPT_INDENT_2)


ERROR_EVENT = b"data: %s\n\n" % orjson.dumps(
    {"error": {"message": _SORRY, "type": "server_error", "param": None, "code": None}}
)


def headers(request_id: str) -> dict[str, str]:
    return {
        "x-request-id": request_id,
        "openai-version": "2020-10-01",
        "openai-organization": "mock",
        "openai-processing-ms": "7",
        "x-ratelimit-limit-requests": "10000",
        "x-ratelimit-remaining-requests": "9999",
        "x-ratelimit-reset-requests": "8.64s",
        "x-ratelimit-limit-tokens": "2000000",
        "x-ratelimit-remaining-tokens": "1999000",
        "x-ratelimit-reset-tokens": "30ms",
        "set-cookie": "__cf_bm=mock; path=/; HttpOnly; Secure",
    }
