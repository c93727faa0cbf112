"""Ollama's native API behind OpenAI's."""

from gateway.protocol.dialects.ollama.completion import CompletionTranslator
from gateway.protocol.dialects.ollama.embedding import EmbeddingTranslator
from gateway.protocol.dialects.ollama.translator import OllamaTranslator, models_listed

__all__ = ["CompletionTranslator", "EmbeddingTranslator", "OllamaTranslator", "models_listed"]
