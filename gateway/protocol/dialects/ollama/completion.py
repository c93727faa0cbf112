"""Ollama's answer to a bare prompt, as an OpenAI completion.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md#generate-a-completion. As in Ollama's own /v1 the prompt
goes through the model's template, and what a model thinks is not shown.
"""

from collections.abc import Mapping
from typing import Any

import orjson

from gateway.protocol.dialects.ollama.lines import Said, dumps, typed
from gateway.protocol.dialects.ollama.request import generate_body
from gateway.protocol.dialects.ollama.translator import OllamaTranslator, finish_reason_of, usage_of
from gateway.protocol.request import Chunk, Reply, UpstreamRequest


class CompletionTranslator(OllamaTranslator):
    """One upstream attempt: the lines are read as those of a chat."""

    chunk = "text_completion"
    delta = b'"text":'
    nothing = ""

    def request(self) -> UpstreamRequest:
        return UpstreamRequest("/api/generate", generate_body(self._call.asked, self._call.target.model))

    def _said(self, line: Mapping[str, Any]) -> Said:
        thinking, content = typed(line, "thinking", str), typed(line, "response", str)
        return Said(thinking + content, thinking, content, (), None)

    def _chunk(self, said: Said) -> Chunk:
        self._started = True
        return Chunk(self._delta(said.content) if said.content else b"", said.text)

    def _learn(self, raw: bytes, line: Mapping[str, Any], said: Said) -> None:
        time = ("created_at",) if isinstance(line.get("created_at"), str) else None
        if said.text == said.content and self._usual.learn(raw, orjson.loads, ("response",), time):
            self._frame = (self._before, self._after)

    def _completion(self, answer: Mapping[str, Any], said: Said) -> Reply:
        finish_reason, usage = finish_reason_of(answer), usage_of(answer)
        choice = {"index": 0, "text": said.content, "logprobs": None, "finish_reason": finish_reason}
        completion = {**self._constant("text_completion"), "choices": [choice]}
        if usage is not None:
            completion["usage"] = usage.to_openai()
        return Reply(dumps(completion), said.text, usage, finish_reason)
