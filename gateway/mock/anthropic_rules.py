"""What Anthropic refuses, in its words (https://docs.anthropic.com/en/api/errors).

The order of tool calls and results, signatures of thoughts, and fields that must not be there: what a translator from
another format gets wrong first.
"""

import re
from base64 import b64encode
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from gateway.mock.script import ProviderError

VERSIONS = ("2023-06-01", "2026-10-21")
SAMPLING = ("temperature", "top_p", "top_k")
FIELDS = frozenset(
    {
        *("model", "messages", "max_tokens", "system", "stream", *SAMPLING, "stop_sequences", "tools", "tool_choice"),
        *("metadata", "thinking", "output_config", "service_tier", "container", "cache_control", "inference_geo"),
    }
)
# Known only when an `anthropic-beta` header switches them on.
BETA_FIELDS = frozenset({"context_management", "mcp_servers", "output_format", "speed", "betas"})
BLOCKS = frozenset(
    {
        *("text", "image", "document", "search_result", "thinking", "redacted_thinking", "tool_use", "tool_result"),
        *("server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result"),
        *("bash_code_execution_tool_result", "text_editor_code_execution_tool_result", "mcp_tool_use"),
        *("mcp_tool_result", "container_upload", "compaction"),
    }
)
_MEDIA = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
_TOOL_ID = re.compile(r"[a-zA-Z0-9_-]+")
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")


def check(fields: Mapping[str, Any], headers: Mapping[str, str]) -> None:
    """Raises ProviderError for the first rule that is broken."""
    version = headers.get("anthropic-version")
    if version is None:
        raise ProviderError("anthropic-version: header is required")
    if version not in VERSIONS:
        raise ProviderError(f'anthropic-version: "{version}" is not a valid version')
    _check_fields(fields, "anthropic-beta" in headers)
    _check_sampling(fields, version)
    _check_tools(fields)
    _check_thinking(fields)
    _check_texts("system", fields.get("system") or ())
    messages = fields["messages"]
    for index, message in enumerate(messages):
        _check_message(f"messages.{index}", message)
    _check_turns(messages)
    _check_tool_order(messages)
    _check_replay(fields)


def blocks(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def signature(thoughts: str) -> str:
    """What proves that thoughts come back as they were sent."""
    return b64encode(blake2b(thoughts.encode(), digest_size=48, person=b"mock").digest()).decode()


# --- fields -------------------------------------------------------------------------------------------------------


def _check_fields(fields: Mapping[str, Any], beta: bool) -> None:
    known = FIELDS | BETA_FIELDS if beta else FIELDS
    for name in fields:
        if name not in known:
            raise ProviderError(f"{name}: Extra inputs are not permitted")
    for name, kind, words in _REQUIRED:
        if name not in fields:
            raise ProviderError(f"{name}: Field required")
        _check_type(name, fields[name], kind, words)
    for name, kind, words in _OPTIONAL:
        if fields.get(name) is not None:
            _check_type(name, fields[name], kind, words)
    if fields["max_tokens"] < 0:
        raise ProviderError("max_tokens: Input should be greater than or equal to 0")
    if not fields["messages"]:
        raise ProviderError("messages: at least one message is required")


_LIST, _DICT = "a valid list", "a valid dictionary"
_REQUIRED: tuple[tuple[str, Any, str], ...] = (
    ("model", str, "a valid string"),
    ("messages", list, _LIST),
    ("max_tokens", int, "a valid integer"),
)
_OPTIONAL: tuple[tuple[str, Any, str], ...] = (
    ("stream", bool, "a valid boolean"),
    ("system", (str, list), _LIST),
    ("tools", list, _LIST),
    ("tool_choice", dict, _DICT),
    ("stop_sequences", list, _LIST),
    ("thinking", dict, _DICT),
    ("output_config", dict, _DICT),
    ("metadata", dict, _DICT),
)


def _check_type(where: str, value: Any, kind: Any, words: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ProviderError(f"{where}: Input should be {words}")


def _check_sampling(fields: Mapping[str, Any], version: str) -> None:
    for name in SAMPLING:
        value = fields.get(name)
        if value is None:
            continue
        if version != VERSIONS[0]:
            raise ProviderError(f"{name}: this parameter is not supported in version {version}")
        high = 1 if name != "top_k" else 500
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
            raise ProviderError(f"{name}: range: 0..{high}")
    for index, sequence in enumerate(fields.get("stop_sequences") or ()):
        if not isinstance(sequence, str) or not sequence.strip():
            raise ProviderError(f"stop_sequences.{index}: each stop sequence must contain non-whitespace")


def _check_tools(fields: Mapping[str, Any]) -> None:
    names = []
    for index, tool in enumerate(fields.get("tools") or ()):
        _check_type(f"tools.{index}", tool, dict, _DICT)
        names.append(tool.get("name"))
        if tool.get("type", "custom") == "custom":
            _check_tool(f"tools.{index}.custom", tool)
    choice = fields.get("tool_choice") or {"type": "auto"}
    if choice.get("type") not in ("auto", "any", "tool", "none"):
        raise ProviderError(
            "tool_choice: Input tag does not match any of the expected tags: 'auto', 'any', 'tool', 'none'"
        )
    if choice["type"] == "none" and "disable_parallel_tool_use" in choice:
        raise ProviderError("tool_choice.none.disable_parallel_tool_use: Extra inputs are not permitted")
    if choice["type"] != "auto" and not names:
        raise ProviderError("tool_choice: may only be specified while providing tools")
    if choice["type"] == "tool" and choice.get("name") not in names:
        raise ProviderError(f"tool_choice.tool.name: Tool '{choice.get('name')}' not found in provided tools")


def _check_tool(where: str, tool: Mapping[str, Any]) -> None:
    name, schema = tool.get("name"), tool.get("input_schema")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise ProviderError(f"{where}.name: String should match pattern '^[a-zA-Z0-9_-]{{1,128}}$'")
    if not isinstance(schema, dict):
        raise ProviderError(f"{where}.input_schema: Field required")
    if schema.get("type") != "object":
        raise ProviderError(f"{where}.input_schema.type: Input should be 'object'")


def _check_thinking(fields: Mapping[str, Any]) -> None:
    thinking = fields.get("thinking") or {"type": "disabled"}
    kind, budget = thinking.get("type"), thinking.get("budget_tokens")
    if kind not in ("adaptive", "enabled", "disabled"):
        raise ProviderError(
            "thinking: Input tag does not match any of the expected tags: 'adaptive', 'enabled', 'disabled'"
        )
    if kind == "enabled":
        if not isinstance(budget, int) or budget < 1024:
            raise ProviderError("thinking.enabled.budget_tokens: Input should be greater than or equal to 1024")
        if budget >= fields["max_tokens"]:
            raise ProviderError("`max_tokens` must be greater than `thinking.budget_tokens`")
    if kind != "disabled" and (fields.get("tool_choice") or {}).get("type") in ("any", "tool"):
        raise ProviderError("Thinking may not be enabled when tool_choice forces tool use.")


# --- messages -----------------------------------------------------------------------------------------------------


def _check_message(where: str, message: Any) -> None:
    _check_type(where, message, dict, _DICT)
    if message.get("role") not in ("user", "assistant", "system"):
        raise ProviderError(f"{where}.role: Input should be 'user', 'assistant' or 'system'")
    for name in message:
        if name not in ("role", "content"):
            raise ProviderError(f"{where}.{name}: Extra inputs are not permitted")
    content = message.get("content")
    if not isinstance(content, str | list):
        raise ProviderError(f"{where}.content: Field required")
    if not content:
        raise ProviderError(
            f"{where}: all messages must have non-empty content except for the optional final assistant message"
        )
    _check_texts(where, content)
    for index, block in enumerate(blocks(message)):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in BLOCKS:
            raise ProviderError(f"{where}.content.{index}: Input tag '{kind}' does not match any of the expected tags")
        if rule := _BLOCK_RULES.get(kind):
            rule(f"{where}.content.{index}.{kind}", block)


def _check_texts(where: str, content: Any) -> None:
    texts = (
        [content]
        if isinstance(content, str)
        else [block.get("text", "x") for block in content if isinstance(block, dict)]
    )
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ProviderError(f"{where}: text content blocks must be non-empty")
        if not text.strip():
            raise ProviderError(f"{where}: text content blocks must contain non-whitespace text")


def _check_tool_use(where: str, block: Mapping[str, Any]) -> None:
    if not isinstance(block.get("id"), str) or not _TOOL_ID.fullmatch(block["id"]):
        raise ProviderError(f"{where}.id: String should match pattern '^[a-zA-Z0-9_-]+$'")
    if not isinstance(block.get("name"), str) or not _TOOL_NAME.fullmatch(block["name"]):
        raise ProviderError(f"{where}.name: String should match pattern '^[a-zA-Z0-9_-]{{1,128}}$'")
    if not isinstance(block.get("input"), dict):
        raise ProviderError(f"{where}.input: Input should be a valid dictionary")


def _check_tool_result(where: str, block: Mapping[str, Any]) -> None:
    if not isinstance(block.get("tool_use_id"), str):
        raise ProviderError(f"{where}.tool_use_id: Field required")
    if not isinstance(block.get("content", ""), str | list):
        raise ProviderError(f"{where}.content: Input should be a valid list")


def _check_image(where: str, block: Mapping[str, Any]) -> None:
    source = block.get("source")
    if not isinstance(source, dict) or source.get("type") not in ("base64", "url", "file"):
        raise ProviderError(
            f"{where}.source: Input tag does not match any of the expected tags: 'base64', 'url', 'file'"
        )
    if source["type"] == "base64" and source.get("media_type") not in _MEDIA:
        media = ", ".join(f"'{name}'" for name in sorted(_MEDIA))
        raise ProviderError(f"{where}.source.base64.media_type: Input should be one of {media}")


def _check_thoughts(where: str, block: Mapping[str, Any]) -> None:
    for name in ("thinking", "signature"):
        if not isinstance(block.get(name), str):
            raise ProviderError(f"{where}.{name}: Field required")
    if block["signature"] != signature(block["thinking"]):
        raise ProviderError(f"{where.removesuffix('.thinking')}: Invalid `signature` in `thinking` block")


_BLOCK_RULES = {
    "tool_use": _check_tool_use,
    "tool_result": _check_tool_result,
    "image": _check_image,
    "thinking": _check_thoughts,
}


def _check_turns(messages: list[dict[str, Any]]) -> None:
    roles = [message["role"] for message in messages]
    if roles[0] != "user":
        raise ProviderError('messages: first message must use the "user" role')
    if roles[-1] == "assistant":
        raise ProviderError(
            "This model does not support assistant message prefill. The conversation must end with a user message."
        )
    for index, role in enumerate(roles):
        before, after = roles[index - 1], roles[index + 1] if index + 1 < len(roles) else "assistant"
        if role == "system" and (before != "user" or after != "assistant"):
            raise ProviderError(
                f"messages.{index}: a `system` message must follow a `user` message and precede an `assistant` message"
            )


def _check_tool_order(messages: list[dict[str, Any]]) -> None:
    """The results of a turn open the very next message, all of them, and no other results do."""
    called: list[str] = []
    for index, message in enumerate(messages):
        answered = [block["tool_use_id"] for block in blocks(message) if block["type"] == "tool_result"]
        leading = _leading_results(message)
        missing = [call for call in called if call not in leading]
        if missing:
            raise ProviderError(
                f"messages.{index - 1}: `tool_use` ids were found without `tool_result` blocks immediately after: "
                f"{', '.join(missing)}. Each `tool_use` block must have a corresponding `tool_result` block in the "
                "next message."
            )
        for place, call in enumerate(answered):
            if call not in called:
                raise ProviderError(
                    f"messages.{index}.content.{place}: unexpected `tool_use_id` found in `tool_result` blocks: "
                    f"{call}. Each `tool_result` block must have a corresponding `tool_use` block in the previous "
                    "message."
                )
        called = [block["id"] for block in blocks(message) if block["type"] == "tool_use"]


def _leading_results(message: Mapping[str, Any]) -> list[str]:
    leading = []
    for block in blocks(message):
        if block["type"] != "tool_result":
            break
        leading.append(block["tool_use_id"])
    return leading


def _check_replay(fields: Mapping[str, Any]) -> None:
    """With a thinking budget the turn that called the tools comes back with its thoughts first."""
    messages = fields["messages"]
    budgeted = (fields.get("thinking") or {}).get("type") == "enabled"
    if not budgeted or len(messages) < 2 or not _leading_results(messages[-1]):
        return
    first = blocks(messages[-2])[0]["type"]
    if first not in ("thinking", "redacted_thinking"):
        raise ProviderError(
            f"messages.{len(messages) - 2}.content.0.type: Expected `thinking` or `redacted_thinking`, but found "
            f"`{first}`. When `thinking` is enabled, a final `assistant` message must start with a thinking block."
        )
