"""The onion around every request, outermost first: errors, authenticate, limit, record_usage.

`errors` is for all requests, the others are for those to /v1: `authenticate` looks, and its principal tells the next. A
middleware regains control when the handler returns, which for a stream is its end. An exit never awaits: it may be
running because the request was cancelled.
"""

import asyncio
import logging
import math
import socket
import struct
from time import monotonic
from typing import TYPE_CHECKING

from aiohttp import HttpVersion10, HttpVersion11, hdrs, web
from aiohttp.typedefs import Handler, Middleware
from multidict import istr

from gateway.appkeys import APP, EXCHANGE, PARTS, SPAN, Parts
from gateway.exchange import Exchange
from gateway.identity import API_KEY, MAX_LABEL, identify, lent_key, session_token
from gateway.protocol.errors import (
    GatewayError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    RateLimited,
    ShuttingDown,
    Unauthenticated,
    Unavailable,
)
from gateway.report import report
from gateway.stores.grants import Admission
from gateway.stores.tokens import PREFIX

if TYPE_CHECKING:  # it imports OpenTelemetry
    from gateway.tracing import Tracing

log = logging.getLogger("gateway.access")

_QUIET = ("/health", "/metrics")  # asked every few seconds by machines
# What goes on to a provider: handlers.chat, handlers.passthrough.
_TO_PROVIDERS = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings",
    "/v1/images/", "/v1/audio/", "/v1/moderations", "/v1/files", "/v1/batches",
)  # fmt: skip
_REQUEST_ID, _USER_ID, _APP_ID = istr("X-Request-Id"), istr("X-User-Id"), istr("X-App-Id")


async def on_prepare(request: web.Request, response: web.StreamResponse) -> None:
    """Puts headers of ours on a response of aiohttp's; what providers answered has them from client.py."""
    exchange = request.get(EXCHANGE)
    if exchange is None:
        return
    exchange.prepared = True
    response.headers.update(exchange.response_headers())
    if request[APP].pulse.closing:
        response.force_close()
        response.headers[hdrs.CONNECTION] = "close"  # aiohttp has made its headers already


def traced(tracing: "Tracing") -> Middleware:
    """Around `errors`, where there are traces: a span of each request of /v1."""

    @web.middleware
    async def trace(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith("/v1/"):
            return await handler(request)
        span = request[SPAN] = tracing.begin(request)
        try:
            return await handler(request)
        finally:
            span.end(request.get(EXCHANGE))

    return trace


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns what was raised into an OpenAI error object, and writes the log line of every request."""
    exchange = request[EXCHANGE] = Exchange()
    app = request[APP] = request.app[PARTS]
    app.pulse.enter()
    try:
        if _REQUEST_ID in request.headers:
            exchange.client_request_id = _label(request, _REQUEST_ID, strict=False)
        try:
            _check_request(request, app)
            response = await handler(request)
        except ConnectionError:
            raise  # the client is gone: nobody is left to answer
        except Exception as error:
            response = _error_response(request, _told(request, error))
        exchange.status = exchange.status or response.status
        return response
    finally:
        app.pulse.leave()
        exchange.ended = exchange.ended or monotonic()
        if not request.path.startswith(_QUIET) and not exchange.delegated:
            report(request, exchange)


def _told(request: web.Request, error: Exception) -> GatewayError:
    """What the client is told of it."""
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, web.HTTPException):
        return _from_http(request, error)
    # A bug. Counted and logged with its id; the client learns the id and nothing else.
    request[APP].metrics.internal_errors.labels("request").inc()
    log.error("unhandled", exc_info=error, extra={"fields": {"request_id": request[EXCHANGE].id}})
    return InternalError("the gateway failed; quote the request id to its operator")


def _check_request(request: web.Request, app: Parts) -> None:
    """Whether it is for us, in our language, and at a time when there is memory for it."""
    if request._version not in ((1, 0), (1, 1)):
        # aiohttp would answer in the client's own: we send none that we do not speak (RFC 9110 2.5).
        request._version = HttpVersion10
        raise InvalidRequest("HTTP/1.0 and HTTP/1.1 are spoken here", code="http_version")
    if not request.raw_path.startswith("/"):
        # The absolute form is for proxies (RFC 9112 3.2.2): what is asked for is on another host than this one.
        raise InvalidRequest("the request target must be a path: this is no proxy", code="not_a_proxy")
    if app.pulse.overloaded and not request.path.startswith(_QUIET):
        app.metrics.shed.labels("memory").inc()
        raise Overloaded("memory is short; please try again", retry_after=1)


def _error_response(request: web.Request, error: GatewayError) -> web.Response:
    """Raises ConnectionResetError when an answer has begun: a second status line would be read as a part of it."""
    exchange = request[EXCHANGE]
    if exchange.prepared:
        if request.transport is not None:
            _break(request.transport, chunked=request.version >= HttpVersion11)
        raise ConnectionResetError("an error after the first byte")
    exchange.status, exchange.error_code = error.http_status, error.error_code or ""
    headers = {"Cache-Control": "no-store"}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if not error.should_retry:
        # https://github.com/openai/openai-python/blob/main/src/openai/_base_client.py, `_should_retry`
        headers["x-should-retry"] = "false"
    if isinstance(error, Unauthenticated):
        headers[hdrs.WWW_AUTHENTICATE] = "Bearer"  # RFC 9110 11.6.1
    if isinstance(error, MethodNotAllowed) and error.allowed:
        headers[hdrs.ALLOW] = ", ".join(error.allowed)
    response = web.Response(
        body=error.body(), status=error.http_status, headers=headers, content_type="application/json", charset="utf-8"
    )
    if request.can_read_body and not request.content.at_eof():
        response.force_close()  # a body that was refused is not waited for
    return response


def _break(transport: asyncio.Transport, *, chunked: bool) -> None:
    """Nobody is to take this for the end of a body. Who knows no chunks needs a RST: RFC 9112 6.3, socket(7)."""
    if not chunked:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _from_http(request: web.Request, error: web.HTTPException) -> GatewayError:
    if isinstance(error, web.HTTPMethodNotAllowed):
        return MethodNotAllowed(f"{request.method} is not allowed here", allowed=sorted(error.allowed_methods))
    if isinstance(error, web.HTTPNotFound):
        path = request.path[:128].partition(PREFIX)[0]  # whoever puts a key there is not told it again
        return NotFound(f"there is no {request.method} {path!r} here", code="unknown_url")
    return InvalidRequest(error.reason) if error.status < 500 else InternalError("the gateway failed")


def _label(request: web.Request, name: str, *, strict: bool = True) -> str:
    """A header that names who asked: at most 128 printable characters; refused, or ignored, when it is more."""
    value = request.headers[name]
    if len(value) <= MAX_LABEL and value.isprintable() and value.isascii():
        return value
    if strict:
        raise InvalidRequest(f"{name}: at most {MAX_LABEL} printable ASCII characters", param=name)
    return ""


# --- /v1 ----------------------------------------------------------------------------------------------------------


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    path = request.rel_url.path_safe  # as it is routed: in `request.path` an encoded slash looks like any other
    if not path.startswith("/v1/") and path != "/v1":
        return await handler(request)
    exchange, app = request[EXCHANGE], request[APP]
    if app.pulse.refusing:
        raise ShuttingDown("the gateway is shutting down; please try again", retry_after=1)
    try:
        principal, own_credential = await identify(request)
        if not principal.key_id:  # a person who signed in: a key of theirs pays, and says what it may
            principal = await lent_key(request, principal)
    except GatewayError as error:
        app.metrics.auth_failures.labels(_auth_failure(request, error)).inc()
        raise
    exchange.principal = principal
    if app.settings.gateway_own_credential:
        exchange.own_credential = own_credential
    headers = request.headers
    if _USER_ID in headers:
        exchange.user_id = _label(request, _USER_ID)
    if _APP_ID in headers:
        exchange.app_id = _label(request, _APP_ID)
    return await handler(request)


def _auth_failure(request: web.Request, error: GatewayError) -> str:
    if isinstance(error, Unavailable):
        return "unavailable"
    if isinstance(error, RateLimited):
        return "throttled"
    sent = hdrs.AUTHORIZATION in request.headers or API_KEY in request.headers or session_token(request)
    return "invalid" if sent else "missing"


@web.middleware
async def limit(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Only what goes on to a provider is counted; listing models is free. The body is read once it was admitted."""
    exchange, resource = request[EXCHANGE], request.match_info.route.resource
    principal = exchange.principal
    if principal is None or resource is None or not resource.canonical.startswith(_TO_PROVIDERS):
        return await handler(request)
    app = request[APP]
    admission = await app.limiter.admit(principal, exchange.id, resource.canonical)
    _rate_headers(exchange, admission)
    if not admission.granted:
        app.metrics.rate_limited.labels(admission.reason).inc()
        raise _refused(admission)
    try:
        return await handler(request)
    finally:
        if not exchange.delegated:
            app.limiter.release(principal, exchange.id)


def _rate_headers(exchange: Exchange, admission: Admission) -> None:
    # The key's own window or bucket alone: what others are granted is not for it to know.
    if admission.limit and admission.reason in ("", "requests_per_minute", "requests_per_second"):
        headers = exchange.headers
        headers["x-ratelimit-limit-requests"] = str(admission.limit)
        headers["x-ratelimit-remaining-requests"] = str(admission.remaining)
        headers["x-ratelimit-reset-requests"] = f"{admission.reset_after:.3f}s"


_REASONS = {
    "requests_per_minute": "this key may send {limit} requests a minute",
    "requests_per_second": "this key may send {limit} requests at once, and then as many a second as its rate says",
    "route_requests_per_second": "this gateway takes {limit} requests here at once, and then as many as its rate says",
    "concurrent_requests": "this key may have {limit} requests in flight at once",
    "global_requests_per_minute": "this gateway takes {limit} requests a minute",
}


def _refused(admission: Admission) -> GatewayError:
    words = _REASONS.get(admission.reason)
    if words is None:
        return Unavailable("the limits cannot be checked at the moment", code="limits_unavailable", retry_after=1)
    return RateLimited(
        f"{words.format(limit=admission.limit)}; try again in {admission.retry_after:g} s",
        retry_after=admission.retry_after,
    )


@web.middleware
async def record_usage(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A row for every request that reached a provider, on every way it can end."""
    exchange = request[EXCHANGE]
    try:
        return await handler(request)
    finally:
        request[APP].recorder.end(exchange)


V1 = (authenticate, limit, record_usage)
