"""Anthropic's Messages API behind an OpenAI chat."""

from gateway.protocol.dialects.anthropic.models import models_listed
from gateway.protocol.dialects.anthropic.translator import AnthropicTranslator

__all__ = ["AnthropicTranslator", "models_listed"]
