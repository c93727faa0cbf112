"""The server's side of a connection, where aiohttp's own words would reach a client.

What the HTTP parser refuses never gets to a middleware. aiohttp answers it in text/plain and quotes the bytes it
stumbled over: a prompt, or a key in a header. Here it is an OpenAI error object that quotes nothing.
"""

import logging
from typing import Any

from aiohttp import web

from gateway.exchange import new_id
from gateway.protocol.errors import GatewayError, InternalError, InvalidRequest

log = logging.getLogger("gateway.connection")


class Connection(web.RequestHandler):
    __slots__ = ()

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


class _Server(web.Server):
    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """aiohttp's, with our connections."""

    async def _make_server(self) -> Any:
        made = await super()._make_server()
        return _Server(made.request_handler, request_factory=made.request_factory, **self._kwargs)
