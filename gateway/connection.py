"""The server's side of a connection: what aiohttp's own would say otherwise, or for more than it is worth.

What the HTTP parser refuses never gets to a middleware. aiohttp answers it in text/plain and quotes the bytes it
stumbled over: a prompt, or a key in a header. Here it is an OpenAI error object that quotes nothing.

The answers of providers are written to the connection by ourselves (client.py), head and all: by `web.StreamResponse`
they would cost half as much again as all else that aiohttp does for a request.
"""

import asyncio
import logging
import resource
from collections.abc import Callable, Mapping
from email.utils import formatdate
from functools import lru_cache
from time import monotonic, time
from typing import Any, cast

from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong

from gateway.exchange import new_id
from gateway.metrics import Metrics
from gateway.protocol.errors import (
    GatewayError,
    HeadersTooLarge,
    InternalError,
    InvalidRequest,
    Overloaded,
    URITooLong,
)

log = logging.getLogger("gateway.connection")

LAST_READ = 1.0  # seconds that a connection which was refused has to read why
# Of the time that a client may not read. Its progress is seen here when it has emptied our buffer, and the kernel takes
# a megabyte from that at a time; of a chat's the pulse knows better.
PATIENCE = 4
RESERVED = 64  # descriptors for the stores, the journal, and whatever else is open


class Connections:
    """All that are open in this process, and how many may be. Opened by app.py; each enters and leaves by itself."""

    def __init__(self, metrics: Metrics, *, header_timeout: float, write_timeout: float) -> None:
        # A stream has two descriptors, its client's and its provider's: half of what may be used is clients'.
        self.most = max((_descriptors() - RESERVED) // 2, 1)
        self._header_timeout = header_timeout  # seconds
        self._write_timeout = write_timeout  # seconds
        self._metrics = metrics
        self._open: set[Connection] = set()
        self._refused = 0  # that are reading why
        metrics.connections_open.follow(lambda: len(self._open))

    def enter(self, connection: "Connection") -> bool:
        """False: there are too many."""
        if len(self._open) >= self.most:
            return False
        self._open.add(connection)
        return True

    def leave(self, connection: "Connection") -> None:
        self._open.discard(connection)

    def refuse(self, transport: asyncio.Transport) -> None:
        """503 without a look at what it wants, and the end. Those that are told so are bounded as well."""
        self._metrics.shed.labels("connections").inc()
        if self._refused > self.most // 4:
            transport.abort()
            return
        transport.write(_overfull())
        transport.write_eof()  # closed at once, it would be reset by what it sent and we never read: RFC 9112 9.6
        self._refused += 1
        asyncio.get_running_loop().call_later(LAST_READ, self._end_refused, transport)

    def _end_refused(self, transport: asyncio.Transport) -> None:
        self._refused -= 1
        transport.abort()

    def not_http(self) -> None:
        """Another request that the parser refused."""
        self._metrics.http_parse_errors.inc()

    def check(self, now: float) -> None:
        """Closes those whose headers take too long, and those that do not read; `now` in seconds, monotonic."""
        for connection in list(self._open):
            if connection.head_since and now - connection.head_since > self._header_timeout:
                if connection.awaits_request:
                    self._drop(connection, "headers")
            elif not connection.holds_unread:
                connection.unread_since = 0.0
            elif not connection.unread_since:
                connection.unread_since = now
            elif now - connection.unread_since > PATIENCE * self._write_timeout:
                self._drop(connection, "read")

    def _drop(self, connection: "Connection", phase: str) -> None:
        self._metrics.slow_clients.labels(phase).inc()
        connection.wire.abort()

    def drop_slowest(self) -> int:
        """Drops a quarter of those whose clients do not read, and eight at least: most unread first. How many."""
        waiting = [connection for connection in self._open if connection.blocked]
        waiting.sort(key=lambda connection: connection.wire.get_write_buffer_size(), reverse=True)
        dropped = waiting[: max(8, len(waiting) // 4)]
        for connection in dropped:
            self._metrics.shed.labels("memory").inc()
            connection.wire.abort()
        return len(dropped)


def _descriptors() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


def _overfull() -> bytes:
    body = Overloaded("too many connections are open; please try again", retry_after=1).body()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n"
        f"Retry-After: 1\r\nX-Request-Id: {new_id()}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class Connection(web.RequestHandler):
    __slots__ = ("_connections", "blocked", "head_since", "on_flow", "unread_since", "wire")

    wire: asyncio.Transport  # to the end: aiohttp forgets its own when it begins to close it

    def __init__(self, manager: web.Server, connections: Connections, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self._connections = connections
        self.blocked = False  # its buffer is full, because the client does not read
        self.on_flow: Callable[[], None] | None = None  # client: called when that changes
        # Since when a request is to come, or is coming, whose headers are not all there: seconds, monotonic. 0: none.
        self.head_since = 0.0
        self.unread_since = 0.0  # connections: since when `holds_unread` was true at each look, seconds, monotonic

    @property
    def holds_unread(self) -> bool:
        """There is something that its client has not read, and nobody else who watches that."""
        return (self.blocked and self.on_flow is None) or self.wire.is_closing()

    @property
    def awaits_request(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.wire = cast(asyncio.Transport, transport)
        if not self._connections.enter(self):
            self._force_close = True  # what it sends is not looked at
            self._manager = None  # and aiohttp never hears of it
            self._connections.refuse(self.wire)
            return
        self.head_since = monotonic()
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        requests = self._request_count
        super().data_received(data)
        if self._request_count != requests:
            self.head_since = 0.0
        elif not self.head_since and self.awaits_request:
            self.head_since = monotonic()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.blocked = True
        if self.on_flow is not None:
            self.on_flow()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.blocked = False
        self.unread_since = 0.0
        if self.on_flow is not None:
            self.on_flow()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Raises ConnectionError when there is nobody to answer, or an answer has begun."""
        if isinstance(exc, ConnectionError) or request.writer.output_size > 0:
            raise ConnectionResetError("the client is gone")
        request_id = new_id()
        if status >= 500:
            error: GatewayError = InternalError("the gateway failed")
            fields = {"request_id": request_id}
            log.error("unhandled in the server: %s", type(exc).__name__, extra={"fields": fields})
        else:
            error = _refusal(exc)
            self._connections.not_http()
        headers = {"Cache-Control": "no-store", "X-Request-Id": request_id}
        response = web.Response(
            body=error.body(), status=error.http_status, headers=headers, content_type="application/json"
        )
        response.force_close()
        return response


def _refusal(exc: BaseException | None) -> GatewayError:
    """What the HTTP parser stumbled over."""
    if isinstance(exc, LineTooLong):
        # Of the request line the parser still has its own buffer in hand; a header's name or value is bytes.
        if isinstance(exc.args[0], bytearray):
            return URITooLong("the request line is too long")
        return HeadersTooLarge("a header is too long")
    if isinstance(exc, BadHttpMessage) and exc.message.startswith("Too many headers"):
        return HeadersTooLarge("there are too many headers")
    return InvalidRequest("this is not an HTTP request that can be served", code="http_parse_error")


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


# One of each is enough: they hold nothing of any answer.
STAYS, ENDS = Written(keep_alive=True), Written(keep_alive=False)


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
    known: Connections

    def __call__(self) -> Connection:
        return Connection(self, self.known, loop=self._loop, **self._kwargs)


CONNECTIONS = web.AppKey("CONNECTIONS", Connections)


class Runner(web.AppRunner):
    """aiohttp's, with our connections: those that the application holds once it has started."""

    async def _make_server(self) -> Any:
        made = await super()._make_server()
        server = _Server(made.request_handler, request_factory=made.request_factory, **self._kwargs)
        server.known = self.app[CONNECTIONS]
        return server
