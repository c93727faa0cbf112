"""Every error that a client of the gateway can see, one tree, one file.

Each class answers: which HTTP status, which `type` and `code` of an OpenAI error object, and whose fault it was.
The status is chosen so that the official OpenAI SDK raises the exception class a reader expects
(https://github.com/openai/openai-python/blob/main/src/openai/_exceptions.py).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import orjson


class GatewayError(Exception):
    """An error with an OpenAI error object. `message` is for the client: it never quotes a secret or a prompt."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"
    should_retry: ClassVar[bool] = True  # False: the SDKs are told not to try again by themselves

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code if code is not None else self.code
        self.retry_after = retry_after  # seconds; becomes the Retry-After header

    @property
    def http_status(self) -> int:
        return self.status

    @property
    def error_type(self) -> str:
        return self.type

    def object(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.error_type,
                "param": self.param,
                "code": self.error_code,
            }
        }

    def body(self) -> bytes:
        """The whole answer, before the first byte of a stream was sent."""
        return orjson.dumps(self.object())

    def event(self) -> bytes:
        """The last event of a stream that broke. The OpenAI SDK raises on it; no `[DONE]` follows."""
        return b"data: " + self.body() + b"\n\n"


# --- the client's fault -------------------------------------------------------------------------------------------


class InvalidRequest(GatewayError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class InvalidJSON(InvalidRequest):
    code = "invalid_json"


class UnsupportedParameter(InvalidRequest):
    """The provider behind this model has no such thing; `param` names it."""

    code = "unsupported_parameter"


class UnsupportedEndpoint(InvalidRequest):
    """The provider behind this model, or this path, has no such thing."""

    code = "unsupported_endpoint"


class Unauthenticated(GatewayError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class KeyEnded(Unauthenticated):
    """The key was revoked, or has expired, while it was being answered."""

    code = "key_ended"


class PermissionDenied(GatewayError):
    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFound(GatewayError):
    status = 404
    type = "not_found_error"
    code = "not_found"


class NotCached(GatewayError):
    """`only-if-cached`, and nothing is. The status is RFC 9111 5.2.1.7's."""

    status = 504
    type = "invalid_request_error"
    code = "not_cached"
    should_retry = False


class ModelNotFound(NotFound):
    type = "invalid_request_error"
    code = "model_not_found"


class StreamGone(GatewayError):
    """A stream cannot be continued: whoever made it is gone, or what was missed is not kept any more."""

    status = 410
    code = "stream_interrupted"
    should_retry = False


class MethodNotAllowed(GatewayError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.allowed = allowed  # becomes the Allow header


class RequestTimeout(GatewayError):
    """The client was too slow with its body."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class Conflict(GatewayError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class IdempotencyMismatch(Conflict):
    code = "idempotency_mismatch"
    should_retry = False


class IdempotencyInProgress(Conflict):
    """`retry_after` is always set, and the SDKs try again by themselves."""

    code = "idempotency_in_progress"


class PayloadTooLarge(GatewayError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class URITooLong(GatewayError):
    status = 414
    type = "invalid_request_error"
    code = "uri_too_long"


class HeadersTooLarge(GatewayError):
    """One header is too long, or there are too many: RFC 6585 5."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class ExpectationFailed(GatewayError):
    status = 417
    type = "invalid_request_error"
    code = "expectation_failed"


class UnsupportedMediaType(GatewayError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class RateLimited(GatewayError):
    """A limit of ours; `retry_after` is always set."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class QuotaExhausted(GatewayError):
    """A budget is used up; `retry_after` is when it is renewed, and nobody should wait for that with a request open."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"
    should_retry = False


# --- ours ---------------------------------------------------------------------------------------------------------


class InternalError(GatewayError):
    """A bug. The message says nothing but that; the log has the rest under the request id."""


class Unavailable(GatewayError):
    """A dependency of ours is gone, or we are going: try again shortly."""

    status = 503
    code = "unavailable"


class ShuttingDown(Unavailable):
    code = "server_shutting_down"


class Overloaded(Unavailable):
    """Memory or connections are short."""

    code = "overloaded"


class UpstreamUnavailable(Unavailable):
    """No provider of the model is asked at the moment, because they failed; `retry_after` is when one is again."""

    code = "upstream_unavailable"


# --- the provider's -----------------------------------------------------------------------------------------------


class UpstreamError(GatewayError):
    """The provider failed. `kind` is the label of `gateway_upstream_errors_total`, one of UPSTREAM_ERROR_KINDS."""

    status = 502
    code = "upstream_error"
    kind: str = "http_5xx"

    def __init__(self, message: str, *, kind: str | None = None, **more: Any) -> None:
        super().__init__(message, **more)
        if kind is not None:
            self.kind = kind


class UpstreamUnreachable(UpstreamError):
    """No byte of an answer came: refused, DNS, TLS, reset, not HTTP."""

    code = "upstream_unreachable"
    kind = "connect"


class UpstreamTimeout(UpstreamError):
    status = 504
    code = "upstream_timeout"
    kind = "timeout_headers"


class UpstreamTooLong(UpstreamError):
    """A stream that does not end."""

    code = "upstream_too_long"
    kind = "too_long"


class UpstreamTruncated(UpstreamError):
    """The stream ended before the dialect's last word."""

    code = "upstream_truncated"
    kind = "truncated"


class UpstreamBadBody(UpstreamError):
    """An answer that is not what the dialect promises: HTML, broken JSON, a bad event."""

    kind = "bad_body"


class AnswerTooLarge(UpstreamError):
    """A document that is longer than what is read at once: that is up to those who fill it, not to the provider."""

    kind = "bad_body"


class EventTooLarge(UpstreamError):
    code = "event_too_large"
    kind = "event_too_large"


class UpstreamOverloaded(UpstreamError):
    """503, 529: the provider asks for patience. `retry_after` is passed on when it gave one."""

    status = 503
    code = "overloaded"


class ProviderAuth(UpstreamError):
    """The provider refused the operator's credential. Its text is hidden: it quotes the key."""

    code = "provider_auth"
    kind = "auth"
    should_retry = False  # somebody has to mend it


class UpstreamRateLimited(UpstreamError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    kind = "http_429"


class UpstreamRejected(UpstreamError):
    """A 4xx that the client caused (400, 404, 413, 422 …): passed on with its status, code, message and type."""

    kind = "http_4xx"

    def __init__(
        self,
        message: str,
        *,
        status: int,
        type: str = "invalid_request_error",  # noqa: A002 (the wire's name)
        **more: Any,
    ) -> None:
        super().__init__(message, **more)
        self._status = status
        self._type = type

    @property
    def http_status(self) -> int:
        return self._status

    @property
    def error_type(self) -> str:
        return self._type


UPSTREAM_ERROR_KINDS = (
    "connect",
    "dns",
    "tls",
    "reset",
    "protocol",
    "redirect",
    "timeout_connect",
    "timeout_headers",
    "timeout_idle",
    "timeout_total",
    "too_long",
    "truncated",
    "bad_event",
    "bad_body",
    "error_event",
    "event_too_large",
    "auth",
    "http_429",
    "http_4xx",
    "http_5xx",
)
