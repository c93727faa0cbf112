"""OpenAI's own dialect, and that of every server that speaks it."""

from gateway.protocol.dialects.openai.embedding import EmbeddingTranslator
from gateway.protocol.dialects.openai.reading import models_listed
from gateway.protocol.dialects.openai.translator import COMPLETION, OpenAITranslator

__all__ = ["COMPLETION", "EmbeddingTranslator", "OpenAITranslator", "models_listed"]
