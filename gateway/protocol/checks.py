"""What a chat request may hold: the types and ranges of OpenAI's fields, and the form of its messages.

Source: the OpenAI API's `CreateChatCompletionRequest` (https://github.com/openai/openai-openapi). A field that is not
named here passes to OpenAI-shaped providers as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from gateway.protocol.errors import InvalidRequest

MAX_MODEL = 256  # characters
ROLES = frozenset({"developer", "system", "user", "assistant", "tool", "function"})


def check_chat(fields: Mapping[str, Any]) -> None:
    """Raises InvalidRequest, naming the parameter."""
    check_model(fields)
    check_fields(fields, _FIELDS)
    _check_messages(fields.get("messages"))
    check_stream_options(fields)


def check_model(fields: Mapping[str, Any]) -> None:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        refuse("model", "a non-empty string is required")
    if len(model) > MAX_MODEL or not model.isprintable():
        refuse("model", f"at most {MAX_MODEL} printable characters")


def check_stream_options(fields: Mapping[str, Any]) -> None:
    if fields.get("stream_options") is not None and not fields.get("stream"):
        refuse("stream_options", "only allowed when stream is true")


Check = Callable[[str, Any], None]  # a field's name and its value, which is not null


def check_fields(fields: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    try:
        for name, value in fields.items():
            if name in checks and value is not None:
                checks[name](name, value)
    except InvalidRequest:
        # Of several wrong ones the first in our order is named, and not in the client's.
        for name, check in checks.items():
            if fields.get(name) is not None:
                check(name, fields[name])


def refuse(param: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"invalid {param}: {problem}", param=param)


# --- fields -------------------------------------------------------------------------------------------------------

type_ = type


def number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            refuse(name, f"a number from {low:g} to {high:g} is required")

    return check


def integer(low: int, high: int = 2**53) -> Check:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            upto = f" to {high}" if high < 2**53 else ""
            refuse(name, f"an integer from {low}{upto} is required")

    return check


def is_a(kind: type_ | tuple[type_, ...], words: str) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            refuse(name, f"{words} is required")

    return check


def user(name: str, value: Any) -> None:
    if not isinstance(value, str) or "\0" in value:
        refuse(name, "a string without NUL is required")


def stop(name: str, value: Any) -> None:
    if isinstance(value, str):
        return
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        refuse(name, "a string or an array of strings is required")


def stream_options(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        refuse(name, "an object is required")
    wanted = value.get("include_usage")
    if wanted is not None and not isinstance(wanted, bool):
        refuse(f"{name}.include_usage", "a boolean is required")


def _tools(name: str, value: Any) -> None:
    if not isinstance(value, list):
        refuse(name, "an array is required")
    for index, tool in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
            refuse(where, "an object with a type is required")
        if tool["type"] != "function":
            continue
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            refuse(f"{where}.function.name", "a non-empty string is required")
        for field, kind, words in (("parameters", dict, "an object"), ("description", str, "a string")):
            if function.get(field) is not None and not isinstance(function[field], kind):
                refuse(f"{where}.function.{field}", f"{words} is required")


def _tool_choice(name: str, value: Any) -> None:
    if isinstance(value, dict):
        if not isinstance(value.get("type"), str):
            refuse(f"{name}.type", "a string is required")
        if value["type"] == "function" and not (
            isinstance(value.get("function"), dict) and isinstance(value["function"].get("name"), str)
        ):
            refuse(f"{name}.function.name", "a string is required")
    elif not isinstance(value, str):
        refuse(name, "a string or an object is required")


def _response_format(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        refuse(name, "an object with a type is required")
    if value["type"] == "json_schema":
        schema = value.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema", {}), dict):
            refuse(f"{name}.json_schema", "an object with a schema is required")


_FIELDS: Mapping[str, Check] = {
    "stream": is_a(bool, "a boolean"),
    "stream_options": stream_options,
    "max_tokens": integer(1),
    "max_completion_tokens": integer(1),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "n": integer(1, 128),
    "seed": integer(-(2**63), 2**63),
    "stop": stop,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "parallel_tool_calls": is_a(bool, "a boolean"),
    "response_format": _response_format,
    "reasoning_effort": is_a(str, "a string"),
    "logprobs": is_a(bool, "a boolean"),
    "top_logprobs": integer(0, 20),
    "logit_bias": is_a(dict, "an object"),
    "user": user,
    "metadata": is_a(dict, "an object"),
    "service_tier": is_a(str, "a string"),
}

# --- messages -----------------------------------------------------------------------------------------------------


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        refuse("messages", "a non-empty array is required")
    for index, message in enumerate(messages):
        is_text = (  # what most are, and nothing can be wrong with it
            isinstance(message, dict)
            and isinstance(message.get("content"), str)
            and message.get("role") in ("system", "user", "assistant", "developer")
            and message.get("tool_calls") is None
        )
        if not is_text:
            _check_message(f"messages[{index}]", message)


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, dict):
        refuse(where, "an object is required")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        refuse(f"{where}.role", f"one of {', '.join(sorted(ROLES))} is required")
    content = message.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(f"{where}.content[{index}]", part)
    elif content is None:
        if role not in ("assistant", "function"):
            refuse(f"{where}.content", "a string or an array of parts is required")
    elif not isinstance(content, str):
        refuse(f"{where}.content", "a string or an array of parts is required")
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        refuse(f"{where}.tool_call_id", "a string is required")
    if message.get("tool_calls") is not None:
        _check_tool_calls(f"{where}.tool_calls", message["tool_calls"])


def _check_part(where: str, part: Any) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        refuse(where, "an object with a type is required")
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        refuse(f"{where}.text", "a string is required")
    if part["type"] == "image_url":
        image = part.get("image_url")
        if not isinstance(image, dict) or not isinstance(image.get("url"), str):
            refuse(f"{where}.image_url.url", "a string is required")


def _check_tool_calls(where: str, calls: Any) -> None:
    if not isinstance(calls, list):
        refuse(where, "an array is required")
    for index, call in enumerate(calls):
        if not isinstance(call, dict) or not isinstance(call.get("id"), str):
            refuse(f"{where}[{index}].id", "a string is required")
        function = call.get("function")
        if function is None:
            continue
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            refuse(f"{where}[{index}].function.name", "a string is required")
        if not isinstance(function.get("arguments"), str):
            refuse(f"{where}[{index}].function.arguments", "a string is required")
