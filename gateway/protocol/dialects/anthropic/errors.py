"""Errors: what a request cannot say here, and what the provider's errors mean."""

import re

from gateway.protocol.dialects.anthropic.objects import Json, object_of, text_of
from gateway.protocol.errors import (
    ProviderAuth,
    UnsupportedParameter,
    UpstreamBadBody,
    UpstreamError,
    UpstreamOverloaded,
    UpstreamRateLimited,
    UpstreamRejected,
)


def unsupported(param: str, reason: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"{param} is not supported by this model's provider: {reason}", param=param)


# --- what the provider says ---------------------------------------------------------------------------------------

MAX_MESSAGE = 2_000  # characters of the provider's words that are passed on

_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}

_TOO_LONG = re.compile(r"prompt is too long|exceed[^.]{0,40} context (?:window|limit)", re.IGNORECASE)


def failure(status: int, body: Json, retry_after: float | None = None, *, own_credential: bool) -> UpstreamError:
    """What a status means. https://platform.claude.com/docs/en/api/errors"""
    message = _words(body) or f"the provider answered with status {status}"
    if status in (401, 403):
        return _refused_credential(status, own_credential=own_credential)
    if status == 429:
        return UpstreamRateLimited(message, retry_after=max(retry_after or 0.0, 1.0))
    if status in (503, 529):
        return UpstreamOverloaded(message, retry_after=retry_after)
    if status >= 500:
        return UpstreamError(message, kind="http_5xx", retry_after=retry_after)
    if status >= 400:
        return _rejected(status, object_of(body, "error"), message)
    if status >= 300:
        return UpstreamError("the provider redirected the request", kind="redirect")
    return UpstreamBadBody(f"the provider answered with status {status}")


def _refused_credential(status: int, *, own_credential: bool) -> UpstreamError:
    """The provider's own words may quote the key, so nobody sees them."""
    if own_credential:
        words = "refused the credential" if status == 401 else "does not allow this with the credential"
        return UpstreamRejected(
            f"the provider {words} that came with the request",
            status=status,
            type="authentication_error" if status == 401 else "permission_error",
            code="invalid_api_key",
        )
    return ProviderAuth("the provider refused the gateway's credential")


def reported(body: Json, *, own_credential: bool) -> UpstreamError:
    """The error of an answer whose status was 200."""
    status = _STATUS.get(text_of(object_of(body, "error"), "type"), 500)
    error = failure(
        status,
        body if _words(body) else {"error": "the provider reported an error"},
        own_credential=own_credential,
    )
    if not isinstance(error, ProviderAuth):
        error.kind = "error_event"
    return error


def _words(body: Json) -> str:
    """What the provider, or a proxy before it, says of an error."""
    words = text_of(object_of(body, "error"), "message") or text_of(body, "error") or text_of(body, "message")
    return _encodable(words[:MAX_MESSAGE])


def _encodable(text: str) -> str:
    """Without lone surrogates, which an error object cannot hold."""
    return text.encode("utf-8", "replace").decode()


def _rejected(status: int, problem: Json, message: str) -> UpstreamRejected:
    """A 4xx that the request caused, in OpenAI's words."""
    kind = _encodable(text_of(problem, "type")) or "invalid_request_error"
    code = _encodable(text_of(object_of(problem, "details"), "error_code")) or kind
    if status == 404:
        return UpstreamRejected(message, status=404, code="model_not_found", param="model")
    if _TOO_LONG.search(message):
        return UpstreamRejected(message, status=400, code="context_length_exceeded", param="messages")
    if status == 413:
        return UpstreamRejected(message, status=413, code="request_too_large")
    return UpstreamRejected(message, status=status, type=kind, code=code)
