"""The only file that sends to providers: builds a request, hands back the answer, says what went wrong.

Rule 1: what goes wrong with a connection leaves this file as an UpstreamError.
Rule 2: a redirect is never followed: the prompt and the credential would go with it.
Rule 3: headers are built here from an allow-list; nothing that a client sent reaches a provider by itself.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from time import monotonic
from urllib.parse import quote, urlsplit

from gateway import __version__
from gateway.answer import Answer, Broken, Sink
from gateway.http1 import Connection
from gateway.pool import Origin, Pool, Unreachable, parse_proxy
from gateway.protocol.errors import Overloaded, UpstreamError, UpstreamTimeout, UpstreamUnreachable
from gateway.protocol.request import UpstreamRequest
from gateway.protocol.routing import Provider, Target
from gateway.settings import Settings

__all__ = ["MAX_ERROR_BODY", "Answer", "Sink", "Upstream"]

MAX_ERROR_BODY = 1 << 20  # bytes of an error answer that are read
MAX_DOCUMENT = 8 << 20  # bytes of a list of models
_PASSED_ON = ("traceparent", "tracestate")  # https://www.w3.org/TR/trace-context/
# Whatever an operator's file says: with these the head and its connection have to agree (RFC 9112 6 and 9.3).
_FRAMING = ("content-length", "transfer-encoding", "connection")


CLOSED_UNREAD = 1.0  # seconds within which a connection that was closed in the pool says so: some round trips


class Upstream:
    """Opened and closed by app.py."""

    def __init__(self, settings: Settings) -> None:
        self._pool = Pool(settings.gateway_connect_timeout, parse_proxy(settings.gateway_proxy))

    async def close(self) -> None:
        await self._pool.close()

    async def post(
        self, target: Target, request: UpstreamRequest, headers: Mapping[str, str], on_connected: Callable[[], None]
    ) -> Answer:
        """Send one request; the answer once its head is in. Raises UpstreamError; a cancellation leaves nothing open.

        `headers` is what the client sent: what may pass is picked here. `on_connected` is called when there is a
        connection, just before anything is sent on it.
        """
        own = {**request.headers, "Content-Length": str(len(request.body))}
        _pass_on(headers, own)
        origin, head = _head("POST", target, request.path, own)
        return await self._send(target.provider.name, origin, head, request.body, on_connected)

    async def get(self, provider: Provider, path: str, timeout: float) -> bytes:
        """A small document of the provider's, such as its list of models. Raises UpstreamError."""
        origin, head = _head("GET", Target(provider, "", provider.api_key), path, {})
        try:
            async with asyncio.timeout(timeout):
                answer = await self._send(provider.name, origin, head)
                try:
                    if answer.status != 200:
                        raise UpstreamError(f"{provider.name} answered {answer.status}")
                    return await answer.body(MAX_DOCUMENT)
                finally:
                    answer.close()  # nothing is left to be read, or it is not wanted
        except TimeoutError:
            raise UpstreamTimeout(f"{provider.name} did not answer in {timeout:g} s") from None

    async def _send(
        self,
        name: str,
        origin: Origin,
        head: bytes,
        body: bytes = b"",
        on_connected: Callable[[], None] = lambda: None,
    ) -> Answer:
        """`name` is the provider's."""
        try:
            answer = await self._exchange(name, origin, head, body, on_connected)
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
        connection = self._pool.take(origin)
        if connection is not None:
            sent = monotonic()
            try:
                return await _ask(Answer(connection, name), connection, head, body, on_connected)
            except Broken as broken:
                # The provider closed it while nobody used it, and has not read the request: it is sent once more. One
                # that closes it later may have worked on it (RFC 9110 9.2.2).
                if broken.fault != "unanswered" or monotonic() - sent > CLOSED_UNREAD:
                    raise
        connection = await self._pool.connect(origin)
        return await _ask(Answer(connection, name), connection, head, body, on_connected)


async def _ask(
    answer: Answer, connection: Connection, head: bytes, body: bytes, on_connected: Callable[[], None]
) -> Answer:
    try:
        on_connected()
        connection.send(head, body, answer)
        await answer.head()
    except BaseException:
        answer.close()
        raise
    return answer


# --- heads --------------------------------------------------------------------------------------------------------


def _pass_on(headers: Mapping[str, str], own: dict[str, str]) -> None:
    """What cannot be sent is left out: a wrong trace is no reason to refuse a request."""
    for name in _PASSED_ON:
        value = headers.get(name)
        if value is not None and value.isascii() and value.isprintable():
            own[name] = value


def _head(method: str, target: Target, path: str, own: dict[str, str]) -> tuple[Origin, bytes]:
    """Where a request goes, and its head; `own` are the headers that it does not share with others."""
    provider = target.provider
    if target.own_credential:
        own.update(_credential(provider.auth, target.credential))
    shared = None if target.own_credential else target.credential
    try:
        origin, fixed = _fixed(
            method, _url(provider, path), tuple(provider.headers.items()), provider.auth, shared, tuple(own)
        )
        return origin, b"%b%b\r\n" % (fixed, _lines(own.items()))
    except ValueError:
        raise UpstreamUnreachable(f"a header for {provider.name} cannot be sent", kind="protocol") from None


def _url(provider: Provider, path: str) -> str:
    return f"{provider.base_url}{path}?{provider.query}" if provider.query else provider.base_url + path


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
