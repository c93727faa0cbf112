"""A chat request in the words of Anthropic's Messages API.

The API answers 400 to what it does not know (https://platform.claude.com/docs/en/api/messages), so the body is built
field by field and nothing passes by default. Three kinds of OpenAI parameter: what has a counterpart is mapped; a hint
without one (seed, penalties, logit_bias, verbosity, store, prediction …) is left out; what would change the answer the
client waits for is refused by name.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from gateway.protocol.dialects.anthropic.errors import unsupported
from gateway.protocol.dialects.anthropic.messages import system_and_turns
from gateway.protocol.dialects.anthropic.models import Traits, traits_of
from gateway.protocol.dialects.anthropic.objects import Json
from gateway.protocol.dialects.anthropic.schema import output_format, wants_json_instruction
from gateway.protocol.dialects.anthropic.thinking import max_tokens, set_thinking, thinks
from gateway.protocol.dialects.anthropic.tools import tools_and_choice
from gateway.protocol.errors import InvalidRequest
from gateway.protocol.request import ModelRequest

_JSON_INSTRUCTION = "Answer with one valid JSON object and nothing else: no prose before or after it, no code fence."


def messages_body(chat: ModelRequest, model: str) -> Json:
    """The body of `POST /v1/messages`. Raises InvalidRequest or UnsupportedParameter, naming the parameter."""
    fields, traits = chat.fields, traits_of(model)
    _refuse_what_has_no_counterpart(fields)
    system, turns = system_and_turns(chat.messages, traits)
    body: Json = {"model": model, "max_tokens": max_tokens(chat, traits), "messages": turns}
    body |= tools_and_choice(fields, traits, turns)
    output = output_format(fields, traits)
    if wants_json_instruction(fields):
        system.append({"type": "text", "text": _JSON_INSTRUCTION})
    if system:
        body["system"] = system
    set_thinking(body, output, fields, traits)
    if output:
        body["output_config"] = output
    if not thinks(body):
        body |= _sampling(fields, traits)
    body |= _plain_parameters(fields)
    body["stream"] = chat.stream
    return body


def _refuse_what_has_no_counterpart(fields: Mapping[str, Any]) -> None:
    if (fields.get("n") or 1) > 1:
        raise unsupported("n", "one answer a request")
    if fields.get("logprobs") or fields.get("top_logprobs"):
        name = "logprobs" if fields.get("logprobs") else "top_logprobs"
        raise unsupported(name, "no log probabilities")
    if fields.get("audio") is not None:
        raise unsupported("audio", "no audio")
    if fields.get("modalities") not in (None, [], ["text"]):
        raise unsupported("modalities", "text only")
    if fields.get("functions"):
        raise unsupported("functions", "say it with tools")
    if fields.get("web_search_options") is not None:
        raise unsupported("web_search_options", "no sources in an answer")
    if fields.get("moderation") is not None:
        raise unsupported("moderation", "no moderation result")


def _sampling(fields: Mapping[str, Any], traits: Traits) -> Json:
    """Temperature ends at 1, as in Anthropic's own OpenAI layer (https://platform.claude.com/docs/en/api/openai-sdk)."""
    sampling: Json = {}
    if not traits.sampling:
        return sampling
    if fields.get("temperature") is not None:
        sampling["temperature"] = min(fields["temperature"], 1)
    if fields.get("top_p") is not None and (traits.both_samplers or not sampling):
        sampling["top_p"] = fields["top_p"]
    top_k = fields.get("top_k")
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise InvalidRequest("invalid top_k: an integer is required", param="top_k")
        sampling["top_k"] = top_k
    return sampling


_SERVICE_TIERS = {"auto": "auto", "default": "standard_only"}


def _plain_parameters(fields: Mapping[str, Any]) -> Json:
    plain: Json = {}
    stop = fields.get("stop") or []
    # White space alone is refused as a stop sequence.
    if sequences := [text for text in ([stop] if isinstance(stop, str) else stop) if text.strip()]:
        plain["stop_sequences"] = sequences
    if tier := _SERVICE_TIERS.get(fields.get("service_tier") or ""):
        plain["service_tier"] = tier
    user = fields.get("safety_identifier") or fields.get("user")
    if isinstance(user, str) and user:
        plain["metadata"] = {"user_id": _opaque(user)}
    if isinstance(fields.get("cache_control"), dict):
        plain["cache_control"] = fields["cache_control"]
    return plain


_NAMES_A_PERSON = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+|\+?[\d\s().-]{7,}")


def _opaque(user: str) -> str:
    """`metadata.user_id` must not identify a person and has 256 characters at most; a digest serves as well."""
    if len(user) > 256 or _NAMES_A_PERSON.fullmatch(user):
        return hashlib.sha256(user.encode()).hexdigest()
    return user
