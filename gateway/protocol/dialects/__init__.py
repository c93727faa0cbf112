"""The wire formats. A new one is a module or package here, a line in DIALECTS, and its streams in tests/streams/."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from gateway.protocol.dialects import anthropic, ollama, openai
from gateway.protocol.errors import UnsupportedEndpoint
from gateway.protocol.request import Call, Kind, Listed, Translator


@dataclass(frozen=True, slots=True)
class Dialect:
    translators: Mapping[Kind, Callable[[Call], Translator]]  # of what it can be asked
    media_type: str  # of its streams
    models_path: str  # GET, relative to the base URL
    models: Callable[[Any], Sequence[Listed]]  # from the parsed answer of `models_path`

    def translator(self, call: Call) -> Translator:
        """Raises UnsupportedEndpoint."""
        kind, target = call.asked.kind, call.target
        if kind not in self.translators:
            raise UnsupportedEndpoint(f"{target.provider.name} has no {kind}s: {target.model!r} is for chat")
        return self.translators[kind](call)


DIALECTS = {
    "openai": Dialect(
        {
            "chat": openai.OpenAITranslator,
            "completion": partial(openai.OpenAITranslator, form=openai.COMPLETION),
            "embedding": openai.EmbeddingTranslator,
        },
        "text/event-stream",
        "/models",
        openai.models_listed,
    ),
    "anthropic": Dialect(
        {"chat": anthropic.AnthropicTranslator}, "text/event-stream", "/v1/models", anthropic.models_listed
    ),
    "ollama": Dialect(
        {
            "chat": ollama.OllamaTranslator,
            "completion": ollama.CompletionTranslator,
            "embedding": ollama.EmbeddingTranslator,
        },
        "application/x-ndjson",
        "/api/tags",
        ollama.models_listed,
    ),
}
