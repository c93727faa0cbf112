"""A request's body on its way to a provider: bounded in size and in time, held nowhere but for its beginning."""

import asyncio
from collections.abc import Callable
from hashlib import sha256
from time import monotonic

from aiohttp import web

from gateway.appkeys import METRICS, SETTINGS
from gateway.body import meet_expectation
from gateway.protocol.errors import InvalidRequest, PayloadTooLarge, RequestTimeout


class Upload:
    """Read once, by whoever sends it on. While nobody reads, the client waits: aiohttp takes 128 KiB, and no more.

    `open` and `read` raise PayloadTooLarge (from the declared length, if there is one), RequestTimeout when nothing
    comes for GATEWAY_BODY_TIMEOUT, or not all of it within GATEWAY_MAX_STREAM, InvalidRequest, and what `checked`
    raises, which hears all that comes.
    """

    def __init__(self, request: web.Request) -> None:
        settings = request.app[SETTINGS]
        self._request = request
        self._limit = settings.gateway_max_upload
        self._seconds = settings.gateway_body_timeout
        # For all of it: who sends a byte now and then keeps to the other. It is the client's fault, not the provider's.
        self._most = settings.gateway_max_stream
        self._until = monotonic() + self._most
        self._held = b""  # came, and was not read
        self._came = 0  # bytes
        self._longer = 0  # bytes; than what comes
        self.checked: Callable[[bytes], None] | None = None
        self.digest: Callable[[], bytes | None] = lambda: None  # of what it says; None: it has not all come, or unasked
        self.ended = False  # all of it was read
        self.on_end: Callable[[], None] = lambda: None

    @property
    def length(self) -> int | None:
        declared = self._request.content_length
        return None if declared is None else declared + self._longer

    def hash(self) -> None:
        """Have a `digest` of its bytes, before the first of them is read."""
        whole = sha256()
        self.checked = whole.update
        self.digest = lambda: whole.digest() if self.ended or self._came == self._request.content_length else None

    async def open(self) -> None:
        """Before anything of it is read: the client may be waiting for a word."""
        if (self._request.content_length or 0) > self._limit:
            raise self._too_large()
        await meet_expectation(self._request)

    async def peek(self, size: int, enough: Callable[[], bool] = lambda: False) -> bytes:
        """Its beginning, until it is longer than `size`, all there is, or `enough`. It is still to be read."""
        try:
            while len(self._held) <= size and not enough():
                data = await self._next()
                if not data:
                    break
                self._held += data
        except asyncio.CancelledError:
            if self._request.transport is None:  # it left; else it is we that end
                self._request.app[METRICS].client_aborts.labels("body").inc()
            raise
        return self._held

    def replace(self, start: int, end: int, by: bytes) -> None:
        """A part of what `peek` gave."""
        self._held = self._held[:start] + by + self._held[end:]
        self._longer += len(by) - (end - start)

    async def read(self) -> bytes:
        data, self._held = self._held, b""
        data = data or await self._next()
        if not data:
            self.ended = True
            self.on_end()
        return data

    async def _next(self) -> bytes:
        try:
            async with asyncio.timeout(min(self._seconds, self._until - monotonic())):
                data = await self._request.content.readany()
        except TimeoutError:
            self._request.app[METRICS].slow_clients.labels("body").inc()
            if monotonic() < self._until:
                raise RequestTimeout(f"nothing of the request body came for {self._seconds:g} s") from None
            raise RequestTimeout(f"the request body did not come within {self._most:g} s") from None
        except web.RequestPayloadError:
            raise InvalidRequest("the request body is not framed as HTTP demands") from None
        self._came += len(data)
        if self._came > self._limit:
            raise self._too_large()
        if self.checked is not None:
            self.checked(data)
        return data

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"a request body may have at most {self._limit} bytes here")
