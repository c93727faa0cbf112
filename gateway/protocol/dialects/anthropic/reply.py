"""A whole message as a completion."""

from collections.abc import Mapping

from gateway.protocol.dialects.anthropic.answer import ToolCall, encrypted, envelope, finish_reason, signed
from gateway.protocol.dialects.anthropic.counts import Counts, is_whole
from gateway.protocol.dialects.anthropic.objects import Json, dump, json_object, object_of, text_of
from gateway.protocol.dialects.anthropic.tools import Tool
from gateway.protocol.errors import UpstreamBadBody
from gateway.protocol.refusals import reported
from gateway.protocol.request import Call, Reply


def read_reply(call: Call, tools: Mapping[str, Tool], body: bytes) -> Reply:
    """The completion that a message is. Raises UpstreamBadBody when it is none, and the error that it reports."""
    message = json_object(body)
    if message is None:
        raise UpstreamBadBody("the provider's answer is not a JSON object")
    if message.get("type") == "error" or (message.get("error") and "content" not in message):
        raise reported(message, call.target)
    if not isinstance(message.get("content"), list):
        raise UpstreamBadBody("the provider's answer has no content")
    counts = Counts()
    counts.merge(message.get("usage"), final=True)
    usage = counts.usage()
    answer = _Answer(tools, call.completion_id)
    for block in message["content"]:
        if isinstance(block, dict):
            answer.add(block)
    if message.get("stop_reason") == "refusal":
        answer.refusal = text_of(object_of(message, "stop_details"), "explanation")
    reason = finish_reason(message.get("stop_reason"), len(answer.calls))
    choice = {"index": 0, "message": answer.message(), "logprobs": None, "finish_reason": reason}
    completion = envelope(call, "chat.completion", text_of(message, "model") or call.target.model, [choice])
    completion["usage"] = usage.to_openai() if usage is not None and is_whole(usage) else None
    return Reply(dump(completion), answer.text(), usage, reason)


class _Answer:
    """Collects the blocks of a whole message."""

    def __init__(self, tools: Mapping[str, Tool], completion_id: str) -> None:
        self._tools, self._completion_id = tools, completion_id
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._details: list[Json] = []
        self._called: list[str] = []  # names and arguments, for the meter
        self.calls: list[Json] = []
        self.refusal = ""

    def add(self, block: Json) -> None:
        kind = block.get("type")
        if kind == "text":
            self._content.append(text_of(block, "text"))
        elif kind == "thinking":
            self._reasoning.append(text_of(block, "thinking"))
            self._details.append(signed(self._reasoning[-1], text_of(block, "signature"), len(self._details)))
        elif kind == "redacted_thinking":
            self._details.append(encrypted(text_of(block, "data"), len(self._details)))
        elif kind == "tool_use":
            call = ToolCall.opened(block, len(self.calls), self._tools, self._completion_id)
            content = call.arguments()
            self.calls.append(call.described(content))
            self._called += [call.tool.name, content]

    def message(self) -> Json:
        content = "".join(self._content)
        message: Json = {
            "role": "assistant",
            "content": content if content or not (self.calls or self.refusal) else None,
            "refusal": self.refusal or None,
        }
        if reasoning := "".join(self._reasoning):
            message["reasoning_content"] = reasoning
        if self._details:
            message["reasoning_details"] = self._details
        if self.calls:
            message["tool_calls"] = self.calls
        return message

    def text(self) -> str:
        return "".join([*self._content, *self._reasoning, self.refusal, *self._called])
