"""The wire formats. A new one is a module or package here, a line in DIALECTS, and its streams in tests/streams/."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.protocol.chat import Call, Translator
from gateway.protocol.dialects import anthropic, ollama, openai


@dataclass(frozen=True, slots=True)
class Dialect:
    translator: Callable[[Call], Translator]
    media_type: str  # of its streams
    models_path: str  # GET, relative to the base URL
    models: Callable[[Any], Sequence[str]]  # model names from the parsed answer of `models_path`


DIALECTS = {
    "openai": Dialect(openai.OpenAITranslator, "text/event-stream", "/models", openai.model_names),
    "anthropic": Dialect(anthropic.AnthropicTranslator, "text/event-stream", "/v1/models", anthropic.model_names),
    "ollama": Dialect(ollama.OllamaTranslator, "application/x-ndjson", "/api/tags", ollama.model_names),
}
