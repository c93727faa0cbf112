"""Ollama's native chat API behind an OpenAI chat."""

from gateway.protocol.dialects.ollama.translator import OllamaTranslator, model_names

__all__ = ["OllamaTranslator", "model_names"]
