"""The conversation: the client's messages as Anthropic's turns."""

from collections.abc import Sequence

import orjson

from gateway.protocol.dialects.anthropic.errors import unsupported
from gateway.protocol.dialects.anthropic.models import Traits
from gateway.protocol.dialects.anthropic.names import MAX_NAME, legal_name
from gateway.protocol.dialects.anthropic.objects import Json
from gateway.protocol.dialects.anthropic.parts import (
    ASSISTANT_PARTS,
    TEXT_ONLY,
    USER_PARTS,
    cache_control,
    content_blocks,
    message_blocks,
    text_blocks,
)
from gateway.protocol.errors import InvalidRequest, UnsupportedParameter

# An empty text block is refused, and so is a turn without a block.
_NOTHING = "(empty)"

_SYSTEM_PREFIX = "System message: "


def system_and_turns(messages: Sequence[Json], traits: Traits) -> tuple[list[Json], list[Json]]:
    """The leading system messages as blocks, and all others as turns."""
    system: list[Json] = []
    start = 0
    while start < len(messages) and messages[start]["role"] in ("system", "developer"):
        system += message_blocks(f"messages[{start}]", messages[start], TEXT_ONLY)
        start += 1
    conversation = Conversation(traits)
    for index in range(start, len(messages)):
        conversation.add(f"messages[{index}]", messages[index])
    return system, conversation.end()


class Conversation:
    """Builds strictly alternating turns. It is mutable: what a message becomes depends on its neighbours.

    Rule 1: everything between two assistant turns is one user turn, and tool results come first in it.
    Rule 2: each tool call has exactly one result, in the turn after it.
    Rule 3: nothing depends on what comes after the next assistant turn, so that a longer conversation begins with the
    same bytes: prompt caches and the signatures of thinking blocks rest on that.
    """

    def __init__(self, traits: Traits) -> None:
        self._traits = traits
        self._turns: list[Json] = []
        self._results: list[Json] = []
        self._said: list[tuple[str, list[Json]]] = []  # role and blocks, since the last assistant turn
        self._awaited: dict[str, str] = {}  # tool calls without a result yet: the client's id -> the id sent
        self._ids: set[str] = set()  # all tool ids sent

    def add(self, where: str, message: Json) -> None:
        role = message["role"]
        if role == "user":
            self._said.append(("user", message_blocks(where, message, USER_PARTS)))
        elif role in ("system", "developer"):
            self._said.append(("system", message_blocks(where, message, TEXT_ONLY)))
        elif role == "assistant":
            self._assistant(where, message)
        elif role == "tool":
            self._result(where, message)
        else:
            raise unsupported(f"{where}.role", "function messages are said with the role tool")

    def end(self) -> list[Json]:
        """The turns, with the conversation checked to the end."""
        self._close_user_turn()
        if not self._turns:
            self._turns.append(_turn("user", []))
        if self._turns[-1]["role"] == "assistant":
            self._check_prefill()
        return self._turns

    def _assistant(self, where: str, message: Json) -> None:
        self._close_user_turn()
        blocks = _thinking_blocks(message) if self._traits.thinking != "never" else []
        blocks += message_blocks(where, message, ASSISTANT_PARTS)
        if isinstance(message.get("refusal"), str):
            blocks += text_blocks(message["refusal"])
        if message.get("function_call") or message.get("audio"):
            name = "function_call" if message.get("function_call") else "audio"
            raise unsupported(f"{where}.{name}", "no such thing in a conversation")
        for index, call in enumerate(message.get("tool_calls") or ()):
            blocks.append(self._tool_use(f"{where}.tool_calls[{index}]", call))
        if self._turns and self._turns[-1]["role"] == "assistant":
            self._turns[-1]["content"] += blocks
            return
        if not self._turns:
            self._turns.append(_turn("user", []))  # the first turn must be the user's
        self._turns.append(_turn("assistant", blocks))

    def _tool_use(self, where: str, call: Json) -> Json:
        if call["id"] in self._awaited:
            raise InvalidRequest(f"invalid {where}.id: it is used twice in one turn", param=f"{where}.id")
        sent = self._awaited[call["id"]] = self._fresh_id(call["id"])
        name, arguments = _called(where, call)
        return {"type": "tool_use", "id": sent, "name": legal_name(name), "input": arguments}

    def _fresh_id(self, given: str) -> str:
        """A legal id that was not sent before. Other vendors' ids have dots and colons, or begin anew in every turn."""
        base = sent = legal_name(given) if given else "call"
        while sent in self._ids:
            sent = f"{base[: MAX_NAME - 7]}_{len(self._ids)}"
        self._ids.add(sent)
        return sent

    def _result(self, where: str, message: Json) -> None:
        sent = self._awaited.pop(message["tool_call_id"], None)
        if sent is None:
            raise InvalidRequest(
                f"invalid {where}.tool_call_id: the turn before has no such tool call without a result",
                param=f"{where}.tool_call_id",
            )
        content = message["content"]
        result: Json = {"type": "tool_result", "tool_use_id": sent}
        if isinstance(content, str) and content.strip():
            result["content"] = content
        elif blocks := content_blocks(where, content, USER_PARTS):
            result["content"] = blocks
        self._results.append(result | cache_control(message))

    def _close_user_turn(self) -> None:
        if self._awaited:
            missing = ", ".join(call_id[:64] for call_id in self._awaited)
            raise InvalidRequest(f"invalid messages: tool calls without a result: {missing}", param="messages")
        said, self._said = self._said, []
        results, self._results = self._results, []
        if not said and not results:
            return
        last: list[Json] = []
        if self._traits.later_system and (results or any(role == "user" for role, _ in said)):
            # A system message may stand after a user turn and before an assistant's; one only, so they are joined.
            while said and said[-1][0] == "system":
                last = said.pop()[1] + last
        content = results + [block for role, blocks in said for block in _as_user(role, blocks)]
        self._turns.append(_turn("user", content))
        if last:
            self._turns.append({"role": "system", "content": last})

    def _check_prefill(self) -> None:
        if not self._traits.prefill:
            raise UnsupportedParameter(
                "messages must not end with an assistant message: this model cannot continue one",
                param="messages",
            )
        block = self._turns[-1]["content"][-1]
        if block["type"] == "text":
            block["text"] = block["text"].rstrip()


def _turn(role: str, blocks: list[Json]) -> Json:
    return {"role": role, "content": blocks or [{"type": "text", "text": _NOTHING}]}


def _as_user(role: str, blocks: list[Json]) -> list[Json]:
    if role == "user":
        return blocks
    return [block | {"text": _SYSTEM_PREFIX + block["text"]} for block in blocks]


def _called(where: str, call: Json) -> tuple[str, Json]:
    """Name and input of one tool call."""
    if isinstance(call.get("function"), dict):
        return call["function"]["name"], _arguments(call["function"]["arguments"])
    custom = call.get("custom")
    if not isinstance(custom, dict) or not isinstance(custom.get("name"), str):
        raise InvalidRequest(f"invalid {where}: a function or a custom call is required", param=where)
    return custom["name"], {"input": custom.get("input") or ""}


def _arguments(text: str) -> Json:
    """The object in `arguments`. What is none goes as it is under `_raw`: a model wrote it, and it may be told so."""
    try:
        parsed = orjson.loads(text or "{}")
        orjson.dumps(parsed)  # less deep than what it reads
    except (orjson.JSONDecodeError, TypeError):
        return {"_raw": text}
    return parsed if isinstance(parsed, dict) else {"_raw": text}


# --- thinking blocks that come back -------------------------------------------------------------------------------


def _thinking_blocks(message: Json) -> list[Json]:
    """The thinking that an earlier answer carried, byte for byte: in our `reasoning_details`, which are OpenRouter's
    (https://openrouter.ai/docs/use-cases/reasoning-tokens), or in LiteLLM's `thinking_blocks`. Without a signature it
    is not Anthropic's, and would be refused; an empty text with one is kept."""
    details = message.get("reasoning_details") or message.get("thinking_blocks")
    if not isinstance(details, list):
        return []
    blocks: list[Json] = []
    for detail in details:
        if isinstance(detail, dict):
            _join(blocks, detail)
    for block in blocks:
        block.pop("index", None)
    return [block for block in blocks if block["type"] == "redacted_thinking" or block["signature"]]


def _join(blocks: list[Json], detail: Json) -> None:
    """Add one detail. A stream's pieces may come back unjoined: a block goes on until its signature."""
    foreign = not str(detail.get("format") or "anthropic").startswith("anthropic")
    if foreign:
        return
    if detail.get("type") in ("reasoning.encrypted", "redacted_thinking"):
        if isinstance(detail.get("data"), str) and detail["data"]:
            blocks.append({"type": "redacted_thinking", "data": detail["data"]})
    elif detail.get("type") in ("reasoning.text", "thinking"):
        text = detail.get("text", detail.get("thinking")) or ""
        last = blocks[-1] if blocks else {"type": ""}
        if last["type"] != "thinking" or last["signature"] or last["index"] != detail.get("index"):
            last = {"type": "thinking", "thinking": "", "signature": "", "index": detail.get("index")}
            blocks.append(last)
        last["thinking"] += text if isinstance(text, str) else ""
        signature = detail.get("signature")
        last["signature"] = signature if isinstance(signature, str) else ""
