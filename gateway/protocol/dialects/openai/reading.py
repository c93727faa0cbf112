"""What an OpenAI-shaped server says in a chunk or in a whole answer; where one differs, the line says so."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gateway.protocol.json_object import read_json
from gateway.protocol.request import Listed
from gateway.protocol.usage import Usage

# A chunk without choices that has one of these is more than the usage chunk we asked for: OpenAI's moderation, Azure's
# verdict on the prompt, the sources of a search.
_MORE_THAN_USAGE = ("moderation", "prompt_filter_results", "citations", "search_results")


# OpenRouter and Together, Groq, Mistral, vLLM. OpenAI says nothing of it.
_WINDOWS = ("context_length", "context_window", "max_context_length", "max_model_len")


def models_listed(parsed: Any) -> Sequence[Listed]:
    """From the answer of `GET /models`; Together answers with the bare list."""
    rows = parsed.get("data") if isinstance(parsed, dict) else parsed
    models = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [Listed(name, _window(row)) for row in models if isinstance(name := row.get("id"), str) and name]


def _window(row: Mapping[str, Any]) -> int | None:
    return next((tokens for name in _WINDOWS if type(tokens := row.get(name)) is int and tokens > 0), None)


def json_or_text(data: bytes) -> Any:
    parsed = read_json(data)
    return data.decode("utf-8", "replace") if parsed is None else parsed


def error_in(parsed: Any) -> Any:
    """Where an event or an answer with status 200 says that it failed; None when it does not."""
    if isinstance(parsed, list) and parsed:
        parsed = parsed[0]
    if not isinstance(parsed, dict):
        return None
    if parsed.get("error") or parsed.get("object") == "error":
        return parsed
    groq = parsed.get("x_groq")
    if isinstance(groq, dict) and groq.get("error"):
        return groq
    choices = parsed.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and (choice.get("error") or choice.get("finish_reason") == "error"):
            return choice
    return None


def choices_of(parsed: Mapping[str, Any]) -> list[dict[str, Any]]:
    choices = parsed.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def finish_reason_of(choice: Mapping[str, Any]) -> str | None:
    reason = choice.get("finish_reason")
    return reason if isinstance(reason, str) and reason else None  # Snowflake's is always ""


def usage_of(parsed: Mapping[str, Any]) -> Usage | None:
    usage = Usage.from_openai(parsed.get("usage"))
    if usage is not None:
        return usage
    groq = parsed.get("x_groq")
    return Usage.from_openai(groq.get("usage")) if isinstance(groq, dict) else None


def is_usage_alone(parsed: Mapping[str, Any]) -> bool:
    return parsed.get("usage") is not None and not any(parsed.get(name) for name in _MORE_THAN_USAGE)


# --- text ---------------------------------------------------------------------------------------------------------


def text_of(choices: Iterable[Mapping[str, Any]], part: str) -> str:
    """All that the model wrote in the choices' `delta`, `message` or `text`."""
    texts: list[str] = []
    for choice in choices:
        message = choice.get(part)
        if isinstance(message, dict):
            _add_texts(message, texts)
        elif part == "text" and isinstance(message, str):
            texts.append(message)
    return "".join(texts)


def _add_texts(message: Mapping[str, Any], texts: list[str]) -> None:
    content = message.get("content")
    if isinstance(content, str):
        texts.append(content)
    elif isinstance(content, list):
        for part in content:
            _add_part(part, texts)
    if message.get("reasoning_content") or message.get("reasoning") or message.get("reasoning_details"):
        _add_reasoning(message, texts)
    if isinstance(refusal := message.get("refusal"), str):
        texts.append(refusal)
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict):
            _add_call(call.get("function") or call.get("custom"), texts)
    if message.get("function_call"):
        _add_call(message["function_call"], texts)


def _add_part(part: Any, texts: list[str]) -> None:
    """Mistral streams a list: `{type: text, text}` and `{type: thinking, thinking: [{type: text, text}]}`."""
    thinking = part.get("thinking") if isinstance(part, dict) else None
    for piece in thinking if isinstance(thinking, list) else [part]:
        if isinstance(piece, dict):
            texts += [text for name in ("text", "thinking", "refusal") if isinstance(text := piece.get(name), str)]


def _add_reasoning(message: Mapping[str, Any], texts: list[str]) -> None:
    """Reasoning once: OpenRouter and vLLM send the same text under two names."""
    text = message.get("reasoning_content")
    if not text or not isinstance(text, str):
        text = message.get("reasoning")
    if text and isinstance(text, str):
        texts.append(text)
        return
    details = message.get("reasoning_details")
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict):
            texts += [text for name in ("text", "summary") if isinstance(text := detail.get(name), str)]


def _add_call(function: Any, texts: list[str]) -> None:
    if not isinstance(function, dict):
        return
    for name in ("name", "arguments", "input"):
        value = function.get(name)
        if isinstance(value, str):
            texts.append(value)
        elif value is not None:  # a string by OpenAI's word, an object by some others'
            texts.append(dump(value))


def dump(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        return ""
