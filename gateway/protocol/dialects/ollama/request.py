"""An OpenAI request in the words of Ollama's API (https://github.com/ollama/ollama/blob/main/docs/api.md).

A field is mapped, refused or dropped. Refused, naming the parameter, is what Ollama cannot do and what would change the
answer; all that is not named here is a hint (`user`, `metadata`, `verbosity`, `prompt_cache_key` …) and is dropped.
Sampling parameters that the client left out are left out here too: the model's own file has better defaults than we do.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import orjson

from gateway.protocol.errors import InvalidRequest, UnsupportedParameter
from gateway.protocol.request import ModelRequest

# Ollama's options (https://github.com/ollama/ollama/blob/main/docs/modelfile.md#valid-parameters-and-values) by the
# client's name for them. The last four are no parameters of OpenAI's; Ollama checks their values itself.
_OPTIONS = {
    "max_tokens": "num_predict",
    "max_completion_tokens": "num_predict",  # the newer name, so it comes second and wins
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "num_ctx": "num_ctx",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repeat_penalty",
}

# https://docs.ollama.com/capabilities/thinking
_THINK: Mapping[str, bool | str] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "max",
    "max": "max",
}

# Which values, other than null, ask for something that Ollama has not.
_UNSUPPORTED: Mapping[str, Callable[[Any], bool]] = {
    "n": lambda value: value != 1,
    "tool_choice": lambda value: value not in ("auto", "none"),
    "parallel_tool_calls": lambda value: value is False,
    "logit_bias": bool,
    "functions": bool,
    "modalities": lambda value: value not in ([], ["text"]),
    "audio": lambda value: True,
    "web_search_options": lambda value: True,
}

_NO_PARAMETERS = {"type": "object", "properties": {}}  # some templates fail without any


def build_body(chat: ModelRequest, model: str) -> bytes:
    """The body to send. Raises InvalidRequest naming the parameter that Ollama cannot take."""
    fields = chat.fields
    for name, unsupported in _UNSUPPORTED.items():
        if fields.get(name) is not None and unsupported(fields[name]):
            _refuse(name, "Ollama has no such thing")
    body = {
        "model": model,
        "messages": _messages(chat.messages),
        "stream": chat.stream,  # absent means true
        "options": _options(fields) or None,
        "tools": _tools(fields) or None,
        "format": _format(fields.get("response_format")),
        "think": _think(fields.get("reasoning_effort")),
        "logprobs": fields.get("logprobs") or None,
        "top_logprobs": fields.get("top_logprobs") if fields.get("logprobs") else None,
        "keep_alive": fields.get("keep_alive"),
    }
    return orjson.dumps({name: value for name, value in body.items() if value is not None})


# As above, of a completion. One prompt, one answer; logprobs have another form there.
_NOT_GENERATED: Mapping[str, Callable[[Any], bool]] = {
    "n": lambda value: value != 1,
    "best_of": lambda value: value not in (0, 1),
    "echo": bool,
    "logprobs": lambda value: True,
    "logit_bias": bool,
    "prompt": lambda value: not isinstance(value, str) and not (len(value) == 1 and isinstance(value[0], str)),
}


def generate_body(asked: ModelRequest, model: str) -> bytes:
    """The body of a completion for /api/generate. Raises InvalidRequest naming the parameter that it cannot take."""
    fields = asked.fields
    for name, unsupported in _NOT_GENERATED.items():
        if fields.get(name) is not None and unsupported(fields[name]):
            _refuse(name, "Ollama takes one text, and gives one" if name == "prompt" else "Ollama has no such thing")
    prompt = fields["prompt"]
    body = {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else prompt[0],
        "suffix": fields.get("suffix"),
        "stream": asked.stream,  # absent means true
        "options": _options(fields) or None,
        "keep_alive": fields.get("keep_alive"),
    }
    return orjson.dumps({name: value for name, value in body.items() if value is not None})


def _refuse(param: str, words: str) -> NoReturn:
    raise UnsupportedParameter(f"unsupported {param}: {words}", param=param)


def _options(fields: Mapping[str, Any]) -> dict[str, Any]:
    options = {theirs: fields[ours] for ours, theirs in _OPTIONS.items() if fields.get(ours) is not None}
    if stop := fields.get("stop"):
        options["stop"] = [stop] if isinstance(stop, str) else stop
    return options


def _tools(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    if fields.get("tool_choice") == "none":
        return []
    tools = []
    for index, tool in enumerate(fields.get("tools") or ()):
        if tool["type"] != "function":
            _refuse(f"tools[{index}]", "Ollama takes functions only")
        function = {**tool["function"], "parameters": tool["function"].get("parameters") or _NO_PARAMETERS}
        tools.append({"type": "function", "function": function})
    return tools


def _format(wanted: Mapping[str, Any] | None) -> Any:
    if wanted is None or wanted["type"] == "text":
        return None
    if wanted["type"] == "json_schema":
        return wanted["json_schema"].get("schema") or "json"
    if wanted["type"] == "json_object":
        return "json"
    _refuse("response_format", "Ollama takes text, json_object and json_schema")


def _think(effort: str | None) -> bool | str | None:
    if effort is None:
        return None
    if effort not in _THINK:
        _refuse("reasoning_effort", f"one of {', '.join(_THINK)} is required")
    return _THINK[effort]


# --- messages -----------------------------------------------------------------------------------------------------


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of functions, by the id of their call: templates ask for the name with the result
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message["role"] == "function" or message.get("function_call"):
            _refuse(where, "functions are called by tool_calls")
        for call in message.get("tool_calls") or ():
            names[call["id"]] = (call.get("function") or {}).get("name", "")
        sent.append(_message(where, message, names))
    return sent


def _message(where: str, message: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    role = message["role"]
    text, images = _content(where, message.get("content"))
    sent: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": text}
    if images:
        sent["images"] = images
    if role == "assistant":
        sent.update(_assistant(where, message))
    elif role == "tool":
        sent["tool_call_id"] = message["tool_call_id"]
        if name := names.get(message["tool_call_id"]) or _text(message, "name"):
            sent["tool_name"] = name
    return sent


def _assistant(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """What only the assistant's messages have: its thinking, its calls, a refusal in the place of content."""
    said: dict[str, Any] = {}
    if not message.get("content") and (refusal := _text(message, "refusal")):
        said["content"] = refusal
    if thinking := _text(message, "reasoning_content") or _text(message, "reasoning"):
        said["thinking"] = thinking
    if calls := message.get("tool_calls"):
        said["tool_calls"] = [_call(f"{where}.tool_calls[{index}]", call) for index, call in enumerate(calls)]
    return said


def _text(message: Mapping[str, Any], name: str) -> str:
    """A field that OpenAI's clients send as text, and that nobody checked."""
    value = message.get(name)
    return value if isinstance(value, str) else ""


def _call(where: str, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if function is None:
        _refuse(where, "Ollama takes functions only")
    arguments = function["arguments"].strip() or "{}"
    try:
        parsed = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        param = f"{where}.function.arguments"
        raise InvalidRequest(f"invalid {param}: Ollama takes a JSON object", param=param)
    # As the client wrote it: what we parsed has lost the digits of a long number.
    return {"id": call["id"], "function": {"name": function["name"], "arguments": orjson.Fragment(arguments)}}


def _content(where: str, content: Any) -> tuple[str, list[str]]:
    """A message's text, and its images in base64. Text parts are joined as Ollama's templates join two messages."""
    if not isinstance(content, list):
        return content or "", []
    texts, images = [], []
    for index, part in enumerate(content):
        kind, at = part["type"], f"{where}.content[{index}]"
        if kind == "text":
            texts.append(part["text"])
        elif kind == "image_url":
            images.append(_image(f"{at}.image_url", part["image_url"]["url"]))
        elif kind == "refusal":
            texts.append(_text(part, "refusal"))
        else:
            _refuse(at, "Ollama takes parts of type text and image_url")
    return "\n\n".join(texts), images


def _image(where: str, url: str) -> str:
    """The base64 of a data URL (RFC 2397)."""
    head, _, data = url.partition(",")
    scheme, _, media_type = head.lower().partition(":")
    if scheme != "data" or not media_type.endswith(";base64") or not media_type.startswith(("image/", ";")):
        _refuse(where, "Ollama takes images as base64 data URLs, it fetches none")
    return data
