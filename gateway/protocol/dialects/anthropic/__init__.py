"""Anthropic's Messages API behind an OpenAI chat."""

from gateway.protocol.dialects.anthropic.models import model_names
from gateway.protocol.dialects.anthropic.translator import AnthropicTranslator

__all__ = ["AnthropicTranslator", "model_names"]
