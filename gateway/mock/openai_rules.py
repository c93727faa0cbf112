"""What OpenAI refuses, in its words (https://platform.openai.com/docs/guides/error-codes).

Fields that OpenAI does not know are let through, because this format also stands for the servers that only resemble it.
"""

from collections.abc import Mapping
from typing import Any

from gateway.mock.script import ProviderError

ROLES = ("system", "assistant", "user", "function", "tool", "developer")


def check(fields: Mapping[str, Any]) -> None:
    """Raises ProviderError for the first rule that is broken."""
    messages = fields.get("messages")
    if messages is None:
        raise _invalid("Missing required parameter: 'messages'.", "messages", "missing_required_parameter")
    if not isinstance(messages, list):
        raise _invalid("Invalid type for 'messages': expected an array of objects.", "messages", "invalid_type")
    if not messages:
        raise _invalid(
            "Invalid 'messages': empty array. Expected an array with minimum length 1.", "messages", "empty_array"
        )
    if fields.get("stream_options") is not None and not fields.get("stream"):
        problem = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise _invalid(problem, "stream_options", None)
    for name, kind in _SHAPES.items():
        _check_shape(name, fields.get(name), kind)
    for name, low, high in (("max_tokens", 1, 2**31), ("max_completion_tokens", 1, 2**31), ("n", 1, 128)):
        _check_integer(name, fields.get(name), low, high)
    for name, low, high in (("temperature", 0, 2), ("top_p", 0, 1)):
        _check_number(name, fields.get(name), low, high)
    _check_allowed_tools(fields.get("tool_choice"))
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)
    _check_tool_order(messages)


_SHAPES: Mapping[str, type | tuple[type, ...]] = {
    "stream": bool,
    "stream_options": dict,
    "response_format": dict,
    "tools": list,
    "tool_choice": (str, dict),
    "stop": (str, list),
}


def _check_shape(name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    if value is not None and not isinstance(value, kind):
        raise _invalid(f"Invalid type for '{name}'.", name, "invalid_type")
    for index, item in enumerate(value if isinstance(value, list) else ()):
        if not isinstance(item, dict if name != "stop" else str):
            raise _invalid(f"Invalid type for '{name}[{index}]'.", f"{name}[{index}]", "invalid_type")


def _check_allowed_tools(choice: Any) -> None:
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return
    where = "tool_choice.allowed_tools"
    allowed = choice.get("allowed_tools") or {}
    _check_shape(where, allowed, dict)
    if allowed.get("mode", "auto") not in ("auto", "required"):
        raise _invalid(f"Invalid value: '{where}.mode'.", f"{where}.mode", "invalid_value")
    _check_shape(f"{where}.tools", allowed.get("tools"), list)
    for index, tool in enumerate(allowed.get("tools") or ()):
        _check_shape(f"{where}.tools[{index}].function", tool.get("function"), dict)


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid(f"Invalid type for '{name}': expected an integer.", name, "invalid_type")
    if value < low:
        problem = f"Invalid '{name}': integer below minimum value. Expected a value >= {low}, but got {value} instead."
        raise _invalid(problem, name, "integer_below_min_value")
    if value > high:
        problem = f"Invalid '{name}': integer above maximum value. Expected a value <= {high}, but got {value} instead."
        raise _invalid(problem, name, "integer_above_max_value")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid(f"Invalid type for '{name}': expected a decimal.", name, "invalid_type")
    if not low <= value <= high:
        problem = f"Invalid '{name}': expected a value from {low:g} to {high:g}, but got {value} instead."
        raise _invalid(problem, name, "decimal_above_max_value" if value > high else "decimal_below_min_value")


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise _invalid(f"Invalid type for '{where}': expected an object.", where, "invalid_type")
    role = message.get("role")
    if role not in ROLES:
        supported = ", ".join(f"'{name}'" for name in ROLES[:-1])
        problem = f"Invalid value: '{role}'. Supported values are: {supported}, and '{ROLES[-1]}'."
        raise _invalid(problem, f"{where}.role", "invalid_value")
    content = message.get("content")
    if content is None and not (role == "assistant" and message.get("tool_calls")) and role != "function":
        problem = f"Invalid value for 'content': expected a string, got null. ('{where}.content')"
        raise _invalid(problem, f"{where}.content", None)
    if not isinstance(content, str | list | None):
        problem = f"Invalid type for '{where}.content': expected one of a string or array of objects."
        raise _invalid(problem, f"{where}.content", "invalid_type")
    _check_shape(f"{where}.tool_calls", message.get("tool_calls"), list)
    for index, part in enumerate(parts(message)):
        if not isinstance(part, dict) or part.get("type") not in _PART_TYPES[role == "user"]:
            problem = f"Invalid value: '{part.get('type') if isinstance(part, dict) else part}'."
            raise _invalid(problem, f"{where}.content[{index}].type", "invalid_value")


_PART_TYPES = {True: ("text", "image_url", "input_audio", "file"), False: ("text", "refusal")}


def _check_tool_order(messages: list[dict[str, Any]]) -> None:
    """Every call is answered by the messages right after it, and nothing else is."""
    open_calls: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            if message.get("tool_call_id") not in open_calls:
                # The spelling is OpenAI's.
                rule = "must be a response to a preceeding message with 'tool_calls'."
                problem = f"Invalid parameter: messages with role 'tool' {rule}"
                raise _invalid(problem, f"messages.[{index}].role", None)
            open_calls.remove(message["tool_call_id"])
            continue
        if open_calls:
            break
        open_calls = [str(call.get("id")) for call in message.get("tool_calls") or ()]
    if open_calls:
        problem = (
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
            f"'tool_call_id'. The following tool_call_ids did not have response messages: {', '.join(open_calls)}"
        )
        raise _invalid(problem, "messages", None)


def _invalid(message: str, param: str, code: str | None) -> ProviderError:
    return ProviderError(message, param=param, code=code)


def parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []
