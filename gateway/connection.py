"""The server's side of a connection: what aiohttp's own would say otherwise, or for more than it is worth.

What the HTTP parser refuses never gets to a middleware. aiohttp answers it in text/plain and quotes the bytes it
stumbled over: a prompt, or a key in a header. Here it is an OpenAI error object that quotes nothing.

The answers of providers are written to the connection by ourselves (client.py), head and all: by `web.StreamResponse`
they would cost half as much again as all else that aiohttp does for a request.
"""

import logging
from collections.abc import Callable, Mapping
from email.utils import formatdate
from functools import lru_cache
from time import time
from typing import Any

from aiohttp import HttpVersion11, web

from gateway.exchange import new_id
from gateway.protocol.errors import GatewayError, InternalError, InvalidRequest

log = logging.getLogger("gateway.connection")


class Connection(web.RequestHandler):
    __slots__ = ("blocked", "on_flow")

    def __init__(self, manager: web.Server, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self.blocked = False  # its buffer is full, because the client does not read
        self.on_flow: Callable[[], None] | None = None  # client: called when that changes

    def pause_writing(self) -> None:
        super().pause_writing()
        self.blocked = True
        if self.on_flow is not None:
            self.on_flow()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.blocked = False
        if self.on_flow is not None:
            self.on_flow()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Raises ConnectionError when there is nobody to answer, or an answer has begun."""
        if isinstance(exc, ConnectionError) or request.writer.output_size > 0:
            raise ConnectionResetError("the client is gone")
        error: GatewayError = InvalidRequest("this is not an HTTP request that can be served", code="http_parse_error")
        if status >= 500:
            error = InternalError("the gateway failed")
            log.error("unhandled in the server: %s", type(exc).__name__)
        headers = {"Cache-Control": "no-store", "X-Request-Id": new_id()}
        response = web.Response(body=error.body(), status=status, headers=headers, content_type="application/json")
        response.force_close()
        return response


class Written(web.StreamResponse):
    """An answer that was written by `Connection`'s user; it tells aiohttp's server whether the connection stays."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._stays = keep_alive

    @property
    def prepared(self) -> bool:
        return True

    @property
    def keep_alive(self) -> bool:
        return self._stays

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to be written."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to be written."""


def head(request: web.BaseRequest, headers: Mapping[str, str], *, keep_alive: bool) -> bytes:
    """Status line and headers of a 200, RFC 9112 4 and 5. Raises ValueError for what would be two lines."""
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    text = "".join(lines)
    if text.count("\r") != len(lines) or text.count("\n") != len(lines):
        raise ValueError("a line end in a header")
    version = request.version
    if keep_alive != (version >= HttpVersion11):  # else it is what the version says anyway, RFC 9112 9.3
        text += "Connection: keep-alive\r\n" if keep_alive else "Connection: close\r\n"
    return f"HTTP/1.{version.minor} 200 OK\r\n{text}Date: {_date(int(time()))}\r\n\r\n".encode()


@lru_cache(maxsize=1)
def _date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)


class _Server(web.Server):
    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """aiohttp's, with our connections."""

    async def _make_server(self) -> Any:
        made = await super()._make_server()
        return _Server(made.request_handler, request_factory=made.request_factory, **self._kwargs)
