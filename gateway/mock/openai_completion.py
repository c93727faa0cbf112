"""OpenAI's completions of a bare prompt (https://platform.openai.com/docs/api-reference/completions)."""

from collections.abc import Mapping
from typing import Any

import orjson

from gateway.mock import openai
from gateway.mock.answers import Answer, Ask
from gateway.mock.formats import CREATED, Wire, count_prompt, read_object
from gateway.mock.openai import usage_object
from gateway.mock.script import ProviderError, parse_model

NAME = "openai_completion"
STREAM_TYPE, JSON_TYPE, ERROR_EVENT = openai.STREAM_TYPE, openai.JSON_TYPE, openai.ERROR_EVENT
error, failure, headers = openai.error, openai.failure, openai.headers
BAD_EVENT = b'data: {"id":"cmpl-mock","object":"text_completion","choices":[{"index":0,"te\n\n'


def read(body: bytes, headers: Mapping[str, str], models: frozenset[str]) -> Ask:
    fields = read_object(body, "We could not parse the JSON body of your request.")
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise ProviderError("you must provide a model parameter")
    _, script = parse_model(model)
    prompts = prompts_of(fields.get("prompt"))
    stop = fields.get("stop") or ()
    most = fields.get("max_tokens")
    return Ask(
        model=model,
        script=script,
        stream=bool(fields.get("stream")),
        question=prompts[-1],
        prompt_tokens=count_inputs(fields.get("prompt")) if script.prompt_tokens is None else script.prompt_tokens,
        max_tokens=16 if most is None else most,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        copies=len(prompts) * (fields.get("n") or 1),
        wants_usage=bool((fields.get("stream_options") or {}).get("include_usage")),
        echoed=prompts[-1] if fields.get("echo") else "",
    )


def prompts_of(value: Any) -> list[str]:
    """One text a prompt; tokens are shown as their numbers. Raises ProviderError for what is none."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ProviderError("'$.input' is invalid. Please check the API reference.")
    if all(isinstance(item, int) for item in value):
        return [" ".join(map(str, value))]
    return [item if isinstance(item, str) else " ".join(map(str, item)) for item in value]


def count_inputs(value: Any) -> int:
    """Tokens of a prompt or of an embedding's input."""
    return sum(map(_count, value)) if isinstance(value, list) else _count(value)


def _count(item: Any) -> int:
    if isinstance(item, str):
        return max(1, count_prompt(item))
    return len(item) if isinstance(item, list) else 1


def stream(ask: Ask, said: Answer) -> Wire:
    pieces = [ask.echoed, *said.text] if ask.echoed else said.text
    copies = range(ask.copies)
    last = b"".join(_event(ask, said, index, "", _finish(said)) for index in copies)
    if ask.wants_usage and said.counts is not None:
        last += _data({**_head(ask, said), "choices": [], "usage": usage_object(said.counts)})
    return Wire(
        head=b"",
        deltas=tuple(_event(ask, said, index, piece) for piece in pieces for index in copies),
        tail=last,
        done=b"data: [DONE]\n\n",
    )


def delta(ask: Ask, said: Answer, text: str) -> bytes:
    return _event(ask, said, 0, text)


def _event(ask: Ask, said: Answer, index: int, text: str, finish: str | None = None) -> bytes:
    choice = {"text": text, "index": index, "logprobs": None, "finish_reason": finish}
    usage: dict[str, Any] = {"usage": None} if ask.wants_usage else {}
    return _data({**_head(ask, said), "choices": [choice], **usage})


def _data(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _head(ask: Ask, said: Answer) -> dict[str, Any]:
    return {"id": f"cmpl-{said.id}", "object": "text_completion", "created": CREATED, "model": ask.model}


def _finish(said: Answer) -> str:
    return "length" if said.ending == "length" else "stop"


def reply(ask: Ask, said: Answer) -> bytes:
    text = ask.echoed + "".join(said.text)
    choices = [
        {"text": text, "index": index, "logprobs": None, "finish_reason": _finish(said)} for index in range(ask.copies)
    ]
    usage = {"usage": usage_object(said.counts)} if said.counts is not None else {}
    return orjson.dumps({**_head(ask, said), "choices": choices, **usage}, option=orjson.OPT_INDENT_2)
