"""The only file that sends to providers: builds a request, hands back the answer, says what went wrong.

Rule 1: what goes wrong with a connection leaves this file as an UpstreamError.
Rule 2: a redirect is never followed: the prompt and the credential would go with it.
Rule 3: headers are built here from an allow-list; nothing that a client sent reaches a provider by itself.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from functools import lru_cache
from time import monotonic
from typing import NamedTuple, Protocol
from urllib.parse import quote, urlsplit

from gateway import __version__
from gateway.answer import Answer, Broken, Sink
from gateway.http1 import Connection
from gateway.pool import Origin, Pool, Unreachable, parse_proxy
from gateway.protocol.errors import Overloaded, UpstreamError, UpstreamTimeout, UpstreamUnreachable
from gateway.protocol.request import UpstreamRequest
from gateway.protocol.routing import Provider, Target
from gateway.settings import Settings

__all__ = ["MAX_ERROR_BODY", "Answer", "Body", "Passed", "Sink", "Upstream"]

MAX_ERROR_BODY = 1 << 20  # bytes of an error answer that are read
MAX_DOCUMENT = 8 << 20  # bytes of a list of models
PIECE = 1 << 16  # bytes of a body that are written at a time: one read of it may give ten times as many
_PASSED_ON = ("traceparent", "tracestate")  # https://www.w3.org/TR/trace-context/
# Whatever an operator's file says: with these the head and its connection have to agree (RFC 9112 6 and 9.3).
_FRAMING = ("content-length", "transfer-encoding", "connection")


CLOSED_UNREAD = 1.0  # seconds within which a connection that was closed in the pool says so: some round trips


class Body(Protocol):
    """Of a request, as it comes from the client."""

    @property
    def length(self) -> int | None:
        """Bytes; None: nobody knows before its end."""
        ...

    async def read(self) -> bytes:
        """The next bytes; b"" at the end. What it raises is none of the provider's."""
        ...


class Passed(NamedTuple):
    """A request that is passed on by its path, which is joined to the provider's base URL."""

    method: str
    path: str  # safe as it is: nothing in it is quoted
    body: bytes | Body = b""
    headers: Mapping[str, str] = {}
    query: str = ""


class Upstream:
    """Opened and closed by app.py."""

    def __init__(self, settings: Settings) -> None:
        self._pool = Pool(settings.gateway_connect_timeout, parse_proxy(settings.gateway_proxy))
        self._patience = settings.gateway_idle_timeout  # seconds that a provider may read nothing of a body

    async def close(self) -> None:
        await self._pool.close()

    def post(
        self, target: Target, request: UpstreamRequest, headers: Mapping[str, str], on_connected: Callable[[], None]
    ) -> Coroutine[None, None, Answer]:
        """Send one request; the answer once its head is in. Raises UpstreamError; a cancellation leaves nothing open.

        `headers` is what the client sent: what may pass is picked here. `on_connected` is called when there is a
        connection, just before anything is sent on it.
        """
        own = {**request.headers, "Content-Length": str(len(request.body))}
        _pass_on(headers, own)
        origin, head = _head("POST", target, request.path, own)
        name = target.provider.name
        return self._send(name, self._exchange(name, origin, head, request.body, on_connected))

    async def pass_on(
        self, target: Target, passed: Passed, headers: Mapping[str, str], on_connected: Callable[[], None]
    ) -> Answer:
        """As `post`, of any method. Raises what the body's `read` does, too: then the provider has a part of it.

        A body that comes in pieces is sent once, and no further than to the answer, which may come before its end.
        """
        name, body, own = target.provider.name, passed.body, dict(passed.headers)
        if not isinstance(body, bytes) and body.length is None:
            own["Transfer-Encoding"] = "chunked"
        elif body or passed.method == "POST":
            own["Content-Length"] = str(len(body) if isinstance(body, bytes) else body.length)
        _pass_on(headers, own)
        path = f"{passed.path}?{passed.query}" if passed.query else passed.path
        origin, head = _head(passed.method, target, path, own, remembered=False)
        if isinstance(body, bytes):
            return await self._send(name, self._exchange(name, origin, head, body, on_connected))
        return await self._send(name, self._stream(name, origin, head, body, on_connected))

    async def get(self, provider: Provider, path: str, timeout: float) -> bytes:
        """A small document of the provider's, such as its list of models. Raises UpstreamError."""
        origin, head = _head("GET", Target(provider, "", provider.api_key), path, {})
        try:
            async with asyncio.timeout(timeout):
                answer = await self._send(provider.name, self._exchange(provider.name, origin, head, b"", lambda: None))
                try:
                    if answer.status != 200:
                        raise UpstreamError(f"{provider.name} answered {answer.status}")
                    return await answer.body(MAX_DOCUMENT)
                finally:
                    answer.close()  # nothing is left to be read, or it is not wanted
        except TimeoutError:
            raise UpstreamTimeout(f"{provider.name} did not answer in {timeout:g} s") from None

    async def _send(self, name: str, exchange: Awaitable[Answer]) -> Answer:
        """`name` is the provider's."""
        try:
            answer = await exchange
        except Unreachable as error:
            if error.kind == "exhausted":
                raise Overloaded(error.words.format(name), retry_after=1) from None
            failure = UpstreamTimeout if error.kind == "timeout_connect" else UpstreamUnreachable
            raise failure(error.words.format(name), kind=error.kind) from None
        except Broken as broken:
            if broken.fault == "protocol":
                raise UpstreamUnreachable(f"{name} did not answer in HTTP", kind="protocol") from None
            raise UpstreamUnreachable(f"{name} closed the connection before it answered", kind="reset") from None
        if 300 <= answer.status < 400:
            answer.close()
            raise UpstreamError(f"{name} answered with a redirect, which is not followed", kind="redirect")
        return answer

    async def _exchange(
        self, name: str, origin: Origin, head: bytes, body: bytes, on_connected: Callable[[], None]
    ) -> Answer:
        kept = self._pool.take(origin)
        sent = monotonic()
        while True:
            connection = kept or await self._pool.connect(origin)
            answer = Answer(connection, name)
            try:
                on_connected()
                connection.send(head, body, answer)
                await answer.head()
            except BaseException as error:
                answer.close()
                # The provider closed it while nobody used it, and has not read the request: it is sent once more. One
                # that closes it later may have worked on it (RFC 9110 9.2.2).
                unread = isinstance(error, Broken) and error.fault == "unanswered"
                if kept is None or not unread or monotonic() - sent > CLOSED_UNREAD:
                    raise
                kept = None
            else:
                return answer

    async def _stream(
        self, name: str, origin: Origin, head: bytes, body: Body, on_connected: Callable[[], None]
    ) -> Answer:
        """On a fresh connection: what is written to one that was closed meanwhile cannot be sent again."""
        connection = await self._pool.connect(origin)
        answer = Answer(connection, name)
        try:
            on_connected()
            connection.begin(head, answer)
            await _answered(answer, _send_body(connection, name, body, self._patience))
        except BaseException:
            answer.close()
            raise
        return answer


async def _answered(answer: Answer, sending: Coroutine[None, None, None]) -> None:
    """Returns when the answer's head is there, whether all was sent or not. Raises what either of them does."""
    tasks = [asyncio.create_task(sending), asyncio.create_task(answer.head())]
    sent, heard = tasks
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not heard.done():
            sent.result()
        await heard
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _send_body(connection: Connection, name: str, body: Body, patience: float) -> None:
    """To its end, or to the connection's, of which the answer hears."""
    chunked = body.length is None
    while data := await body.read():
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            connection.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            await _taken(connection, name, patience)
            if not connection.is_open:
                return
    if chunked:
        connection.write(b"0\r\n\r\n")
    connection.sent()


async def _taken(connection: Connection, name: str, patience: float) -> None:
    """Raises UpstreamTimeout when the provider reads nothing; one that reads slowly is waited for."""
    while True:
        unsent = connection.unsent
        try:
            async with asyncio.timeout(patience):
                return await connection.writable()
        except TimeoutError:
            if connection.unsent >= unsent:
                words = f"{name} read nothing of the request for {patience:g} s"
                raise UpstreamTimeout(words, kind="timeout_idle") from None


# --- heads --------------------------------------------------------------------------------------------------------


def _pass_on(headers: Mapping[str, str], own: dict[str, str]) -> None:
    """What cannot be sent is left out: a wrong trace is no reason to refuse a request."""
    for name in _PASSED_ON:
        value = headers.get(name)
        if value is not None and value.isascii() and value.isprintable():
            own[name] = value


def _head(
    method: str, target: Target, path: str, own: dict[str, str], *, remembered: bool = True
) -> tuple[Origin, bytes]:
    """Where a request goes, and its head; `own` are the headers that it does not share with others."""
    provider = target.provider
    if target.own_credential:
        own.update(_credential(provider.auth, target.credential))
    shared = None if target.own_credential else target.credential
    try:
        make = _fixed if remembered else _fixed.__wrapped__
        origin, fixed = make(
            method, _url(provider, path), tuple(provider.headers.items()), provider.auth, shared, tuple(own)
        )
        return origin, b"%b%b\r\n" % (fixed, _lines(own.items()))
    except ValueError:
        raise UpstreamUnreachable(f"a header for {provider.name} cannot be sent", kind="protocol") from None


def _url(provider: Provider, path: str) -> str:
    if not provider.query:
        return provider.base_url + path
    return f"{provider.base_url}{path}{'&' if '?' in path else '?'}{provider.query}"


def _credential(auth: str, credential: str | None) -> dict[str, str]:
    if credential is None:
        return {}
    if auth == "bearer":
        return {"Authorization": f"Bearer {credential}"}
    return {auth: credential}


@lru_cache(maxsize=256)
def _fixed(
    method: str,
    url: str,
    headers: tuple[tuple[str, str], ...],
    auth: str,
    credential: str | None,
    replaced: tuple[str, ...],
) -> tuple[Origin, bytes]:
    """Where requests go, and the part of their heads that is always the same. Raises ValueError.

    `headers` are the provider's and `credential` the operator's: a caller's own never comes here, because this is kept.
    `replaced` are the names of what a request has itself.
    """
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    host = host if host.isascii() else host.encode("idna").decode()
    usual = 443 if secure else 80
    origin = Origin(secure, host, parts.port or usual)
    # RFC 9110 7.2: without the port when it is the scheme's own
    authority = f"[{host}]" if ":" in host else host
    authority += f":{origin.port}" if origin.port != usual else ""
    given = {
        "Host": authority,
        "User-Agent": f"ai-gateway/{__version__}",
        "Accept": "*/*",
        # A compressed stream would be held back by the compressor.
        "Accept-Encoding": "identity",
        **({"Content-Type": "application/json"} if method == "POST" else {}),
    }
    every = [*given.items(), *headers, *_credential(auth, credential).items()]
    lines = {name.lower(): (name, value) for name, value in every}
    for name in (*_FRAMING, *map(str.lower, replaced)):
        lines.pop(name, None)
    place = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{parts.query}" if parts.query else "")
    return origin, f"{method} {place} HTTP/1.1\r\n".encode("ascii") + _lines(lines.values())


def _lines(headers: Collection[tuple[str, str]]) -> bytes:
    """Raises ValueError for what would end its line, or is not in Latin-1 (RFC 9110 5.5)."""
    text = "".join([f"{name}: {value}\r\n" for name, value in headers])
    if not text.count("\r") == text.count("\n") == len(headers) or "\0" in text:
        raise ValueError("a line break or NUL in a header")
    return text.encode("latin-1")
