"""What a provider's error means for the client, whichever dialect said it."""

import re
from typing import Any

from gateway.protocol.error_object import ErrorObject, read_error_object
from gateway.protocol.errors import (
    ProviderAuth,
    UpstreamBadBody,
    UpstreamError,
    UpstreamOverloaded,
    UpstreamRateLimited,
    UpstreamRejected,
)
from gateway.protocol.routing import Target

MIN_RETRY_AFTER = 1.0  # seconds; after a 429 with 0, or with none, a client would be back at once
HIDDEN = "the provider's message is hidden, because it may quote a credential"

_CODES = {404: "model_not_found", 413: "request_too_large"}  # ours, for a provider that gives none
_PARAMS = {"model_not_found": "model", "context_length_exceeded": "messages"}
# Codes that say no more than the status does: Gemini's, Azure's, and types that stand in the code's place.
_GENERAL = frozenset(
    {"invalid_request_error", "INVALID_ARGUMENT", "NOT_FOUND", "DeploymentNotFound", "too_many_prompt_tokens"}
)
_TOO_LONG = re.compile(
    r"prompt is too long|context (?:length|window)|exceed[^.]{0,40} context limit"
    r"|exceeds the maximum number of tokens|total length of all messages is too long",
    re.IGNORECASE,
)
# Gemini and xAI say so with a 400 (https://ai.google.dev/gemini-api/docs/troubleshooting).
_BAD_KEY = re.compile(r"\b(?:incorrect|invalid) api key\b|\bapi key (?:not valid|expired)\b", re.IGNORECASE)

# The status that would have come with an error, had it not come in an answer with 200
# (https://platform.claude.com/docs/en/api/errors; OpenAI's types that have the same name mean the same).
_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "overloaded_error": 529,
}


def refusal(
    status: int, parsed: Any, target: Target, retry_after: float | None = None, *, of_model: bool = True
) -> UpstreamError:
    """The error of an answer with another status than 200. `parsed` is its JSON or its text; anything will do.

    `of_model`: a messages' model was asked, so that what the provider leaves unsaid can be guessed.
    """
    said = read_error_object(parsed).without(target.credential)
    if status in (401, 403) or (status < 500 and said.word == "invalid_api_key"):
        return _refused_credential(status, target)
    if status == 400 and _BAD_KEY.search(said.message):
        return _refused_credential(401, target)
    message = _message(said, target) or f"the provider answered {status}"
    if status == 402 and not target.own_credential:  # the operator's account is to be paid, as with OpenAI's 429
        return UpstreamRateLimited(message, code="insufficient_quota", retry_after=MIN_RETRY_AFTER)
    if status == 429:
        quota = "insufficient_quota" if "insufficient_quota" in (said.code, said.type) else None
        return UpstreamRateLimited(message, code=quota, retry_after=max(MIN_RETRY_AFTER, retry_after or 0))
    if status in (503, 529):
        return UpstreamOverloaded(message, retry_after=retry_after)
    if status >= 500:
        return UpstreamError(message, code=said.word, retry_after=retry_after)
    if status >= 400:
        return _rejected(status, said, message) if of_model else _as_said(status, said, message)
    if status >= 300:
        return UpstreamError(f"the provider answered {status}", kind="redirect", retry_after=retry_after)
    return UpstreamBadBody(f"the provider answered {status}")


def reported(parsed: Any, target: Target) -> UpstreamError:
    """The error of an answer with status 200, in a stream or as its whole body."""
    said = read_error_object(parsed).without(target.credential)
    if said.refuses_credential:
        error = _refused_credential(401, target)
    elif said.type in _STATUSES:
        error = refusal(_STATUSES[said.type], parsed, target)
    else:
        error = UpstreamError(_message(said, target), code=said.code or None)
    if not said.message:
        error.message = "the provider failed and gave no reason"
    if not isinstance(error, ProviderAuth):  # that one wakes somebody up
        error.kind = "error_event"
    return error


def _rejected(status: int, said: ErrorObject, message: str) -> UpstreamRejected:
    code, param = said.word, said.param or None
    if code is None or code in _GENERAL:
        code = "context_length_exceeded" if _TOO_LONG.search(message) else _CODES.get(status, code)
    if code in _PARAMS:
        param = param or _PARAMS[code]
    kind = said.type or "invalid_request_error"
    return UpstreamRejected(message, status=status, type=kind, param=param, code=code or kind)


def _as_said(status: int, said: ErrorObject, message: str) -> UpstreamRejected:
    kind = said.type or "invalid_request_error"
    return UpstreamRejected(message, status=status, type=kind, param=said.param or None, code=said.word or kind)


def _refused_credential(status: int, target: Target) -> UpstreamError:
    """The provider's own words may quote the key, so nobody sees them."""
    if not target.own_credential:
        return ProviderAuth("the provider refused the gateway's credential")
    if status == 403:
        words = "the provider does not let your credential do this"
        return UpstreamRejected(words, status=403, type="permission_error", code="permission_denied")
    words = "the provider refused your credential"
    return UpstreamRejected(words, status=401, type="authentication_error", code="invalid_api_key")


def _message(said: ErrorObject, target: Target) -> str:
    return HIDDEN if said.quotes_key(target.credential) else said.message
