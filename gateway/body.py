"""The body of a JSON request, read within its bounds: of size, of time, of form."""

import asyncio

from aiohttp import HttpVersion11, hdrs, web

from gateway.appkeys import METRICS, SETTINGS
from gateway.protocol.errors import (
    ExpectationFailed,
    InvalidRequest,
    PayloadTooLarge,
    RequestTimeout,
    UnsupportedMediaType,
)


async def read_body(request: web.Request, limit: int) -> bytes:
    """Its bytes, not yet parsed. Raises GatewayError: 415; 413, from the declared length if there is one; 408; 400."""
    _check_form(request)
    content = request.content
    try:
        if content.is_eof() and content.total_bytes <= limit and hdrs.EXPECT not in request.headers:
            return content.read_nowait()  # it came with the head, as most do
        if (request.content_length or 0) > limit:
            raise _too_large(limit)
        await meet_expectation(request)
        return await _read_in_time(request, limit)
    except web.RequestPayloadError:
        raise InvalidRequest("the request body is not framed as HTTP demands") from None


async def leave_expectation(request: web.Request) -> None:
    """An `expect_handler` for routes: aiohttp's own says "100 Continue" before anybody looked at key and size."""


async def meet_expectation(request: web.Request) -> None:
    """RFC 9110 10.1.1, once the body is wanted."""
    expected = request.headers.get(hdrs.EXPECT, "").lower()
    if not expected or request.version < HttpVersion11:
        return
    if expected != "100-continue":
        raise ExpectationFailed("the only expectation known here is 100-continue")
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # this was not the answer


def _check_form(request: web.Request) -> None:
    headers = request.headers
    if hdrs.CONTENT_ENCODING not in headers and headers.get(hdrs.CONTENT_TYPE) == "application/json":
        return  # as nearly all say
    # Refused unread, so there is no bomb to inflate.
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed request bodies are not taken: send it without Content-Encoding")
    kind = request.content_type
    if hdrs.CONTENT_TYPE in request.headers and kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType("the Content-Type must be application/json")
    if (request.charset or "utf-8").lower().replace("-", "") not in ("utf8", "usascii"):
        raise UnsupportedMediaType("the charset must be utf-8")


async def _read_in_time(request: web.Request, limit: int) -> bytes:
    seconds = request.app[SETTINGS].gateway_body_timeout
    try:
        async with asyncio.timeout(seconds):
            return await _read(request, limit)
    except asyncio.CancelledError:
        if request.transport is None:  # it left; else it is we that end
            request.app[METRICS].client_aborts.labels("body").inc()
        raise
    except TimeoutError:
        request.app[METRICS].slow_clients.labels("body").inc()
        raise RequestTimeout(f"the request body did not arrive within {seconds:g} s") from None


async def _read(request: web.Request, limit: int) -> bytes:
    body = bytearray()
    async for data in request.content.iter_any():
        body += data
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"a request body may have at most {limit} bytes here")
