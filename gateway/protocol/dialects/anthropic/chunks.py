"""The chunks of a stream, in OpenAI's words."""

from collections.abc import Mapping

from gateway.protocol.dialects.anthropic.answer import ToolCall, encrypted, envelope, finish_reason, signed
from gateway.protocol.dialects.anthropic.counts import is_whole
from gateway.protocol.dialects.anthropic.objects import Json, dump
from gateway.protocol.dialects.anthropic.tools import Tool
from gateway.protocol.errors import EventTooLarge
from gateway.protocol.request import Call, Chunk
from gateway.protocol.sse import DONE, MAX_EVENT, data_event
from gateway.protocol.usage import Usage

# What stands around a text, which may be in it more than once: the text's literal joins the pieces.
Frame = tuple[bytes, ...]
_CONTENT: Frame = (b'{"content":', b"}")


class Chunks:
    """Makes the chunks of one stream. It is mutable: what comes next depends on what the client has."""

    def __init__(self, call: Call, tools: Mapping[str, Tool]) -> None:
        self._call = call
        self._tools = tools
        self.model = call.target.model  # what the provider calls it, once it has said so
        self.out: list[Chunk] = []  # of one `feed`; the translator begins a new list for each
        self.role_sent = False
        self.finish_reason: str | None = None
        self._before = self._after = b""  # an event around its delta; known with the role
        self._calls: dict[int, ToolCall] = {}  # open tool_use blocks by their index
        self._call_count = 0
        self._reasoning = -1  # number of the current thinking block

    def send_role(self, usage: Usage | None = None) -> None:
        self.role_sent = True
        # Inside a string the quotes would be escaped, so the first place is the right one.
        before, name, after = self._choice({}).partition(b'"delta":')
        self._before, self._after = before + name, after.removeprefix(b"{}")
        self._send({"role": "assistant", "content": ""}, usage=usage)

    def _send(self, delta: Json, text: str = "", usage: Usage | None = None) -> None:
        if not self.role_sent:
            self.send_role()
        self.out.append(Chunk(self._before + dump(delta) + self._after, text, usage))

    def _say(self, delta: Frame, text: str) -> None:
        """A delta that is no more than `text`."""
        if not self.role_sent:
            self.send_role()
        self.out.append(Chunk(dump(text).join(self._framed(delta)), text))

    def _framed(self, delta: Frame) -> Frame:
        first, *others, last = delta
        return (self._before + first, *others, last + self._after)

    def frame(self, kind: str, index: int) -> Frame | None:
        """The client's event around the text of such a delta to this block; None when there is more to it than that.

        It holds until another block begins or one ends.
        """
        if kind == "text_delta":
            return self._framed(_CONTENT)
        if kind == "thinking_delta":
            return self._framed(self._reasoning_frame())
        call = self._calls.get(index) if kind == "input_json_delta" else None
        return None if call is None or call.tool.custom else self._framed(_arguments_frame(call))

    def send_content(self, text: str) -> None:
        if text:
            self._say(_CONTENT, text)

    def send_refusal(self, text: str) -> None:
        if text:
            self._send({"refusal": text}, text)

    def open_thinking(self) -> None:
        self._reasoning += 1

    def send_reasoning(self, text: str) -> None:
        if text:
            self._say(self._reasoning_frame(), text)

    def _reasoning_frame(self) -> Frame:
        details = b',"reasoning_details":[{"type":"reasoning.text","text":'
        return (b'{"reasoning_content":', details, b',"index":%d}]}' % max(self._reasoning, 0))

    def send_signature(self, signature: str) -> None:
        """The signature ends a thinking block; with it the client can send the block back, which tool loops need."""
        if signature:
            self._send({"reasoning_details": [signed("", signature, max(self._reasoning, 0))]})

    def send_encrypted(self, data: str) -> None:
        self._send({"reasoning_details": [encrypted(data, self._reasoning)]})

    def open_call(self, index: int, block: Json) -> None:
        call = ToolCall.opened(block, self._call_count, self._tools, self._call.completion_id)
        self._call_count += 1
        self._calls[index] = call
        self._send({"tool_calls": [{"index": call.number} | call.described("")]}, call.tool.name)

    def send_arguments(self, index: int, piece: str) -> None:
        """Raises EventTooLarge when an input that must be kept whole is too large to keep."""
        call = self._calls.get(index)
        if call is None or not piece:
            return
        call.begun = True
        if call.tool.custom:
            self._hold(call, piece)
        else:
            self._say(_arguments_frame(call), piece)

    def _hold(self, call: ToolCall, piece: str) -> None:
        call.pieces.append(piece)
        call.held += len(piece)
        if call.held > MAX_EVENT:
            raise EventTooLarge(f"the provider sent an input of more than {MAX_EVENT} characters for a custom tool")

    def close_call(self, index: int) -> None:
        if call := self._calls.pop(index, None):
            self._close(call)

    def _close(self, call: ToolCall) -> None:
        """Without a piece of input a call has the input of its start, or none, which is `{}`."""
        if call.tool.custom:
            text = call.custom_input()
            self._send({"tool_calls": [{"index": call.number, "custom": {"input": text}}]}, text)
        elif not call.begun:
            text = dump(call.input).decode()
            self._send({"tool_calls": [{"index": call.number, "function": {"arguments": text}}]}, text)

    def finish(self, reason: str | None, usage: Usage | None) -> None:
        while self._calls:
            self._close(self._calls.pop(next(iter(self._calls))))
        if not self.role_sent:
            self.send_role()
        self.finish_reason = finish_reason(reason, self._call_count)
        data = self._choice({}, self.finish_reason)
        self.out.append(Chunk(data, usage=usage, finish_reason=self.finish_reason))

    def end(self, usage: Usage | None) -> None:
        if self._call.asked.wants_usage and is_whole(usage):
            self.out.append(Chunk(self._event([], usage), usage=usage))
        self.out.append(Chunk(DONE))

    def cut(self, usage: Usage) -> None:
        """An end of ours. Calls stay open, as they are where `max_tokens` ends them."""
        if not self.role_sent:
            self.send_role()
        if self.finish_reason is None:
            self.out.append(Chunk(self._choice({}, "length")))
        self.end(usage)

    def _choice(self, delta: Json, finish_reason: str | None = None) -> bytes:
        return self._event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    def _event(self, choices: list[Json], usage: Usage | None = None) -> bytes:
        chunk = envelope(self._call, "chat.completion.chunk", self.model, choices)
        if self._call.asked.wants_usage:
            chunk["usage"] = usage.to_openai() if usage is not None else None
        return data_event(dump(chunk))


def _arguments_frame(call: ToolCall) -> Frame:
    return (b'{"tool_calls":[{"index":%d,"function":{"arguments":' % call.number, b"}}]}")
