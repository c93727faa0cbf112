"""OpenAI's own dialect, and that of every server that speaks it."""

from gateway.protocol.dialects.openai.reading import model_names
from gateway.protocol.dialects.openai.translator import OpenAITranslator

__all__ = ["OpenAITranslator", "model_names"]
