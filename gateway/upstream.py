"""The only file that talks to providers: sends a request, hands back the answer, maps what went wrong, closes.

Rule 1: nothing of aiohttp's client leaves this file; what goes wrong leaves it as an UpstreamError.
Rule 2: a redirect is never followed: the prompt and the credential would go with it.
Rule 3: headers are built here from an allow-list; nothing that a client sent reaches a provider by itself.
"""

import asyncio
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from math import isfinite
from time import time
from typing import Any

import aiohttp
from yarl import URL

from gateway import __version__
from gateway.protocol.chat import UpstreamRequest
from gateway.protocol.errors import (
    GatewayError,
    UpstreamBadBody,
    UpstreamError,
    UpstreamTimeout,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from gateway.protocol.routing import Provider, Target
from gateway.settings import Settings

MAX_ERROR_BODY = 1 << 20  # bytes of an error answer that are read
_PASSED_ON = ("traceparent", "tracestate")  # https://www.w3.org/TR/trace-context/


class Answer:
    """A provider's answer whose headers are in. Ended by whoever opened it: `finish` or `close`, once."""

    def __init__(self, response: aiohttp.ClientResponse, provider: str, drain: "_Drain") -> None:
        self._response = response
        self._provider = provider
        self._drain = drain
        self.status = response.status
        self.content_type = response.content_type

    @property
    def retry_after(self) -> float | None:
        """Seconds, from `retry-after-ms` or `Retry-After` (seconds or a date, RFC 9110 10.2.3)."""
        return _retry_after(self._response.headers)

    @property
    def request_id(self) -> str:
        """The provider's own id of the request, for its support; empty when it gave none."""
        headers = self._response.headers
        found = headers.get("x-request-id") or headers.get("request-id") or ""
        return found if found.isprintable() and found.isascii() and len(found) <= 128 else ""

    async def read(self) -> bytes:
        """The next bytes as they come, at once; b"" at the end. Raises UpstreamError."""
        with _map_read_errors(self._provider):
            return await self._response.content.readany()

    async def body(self, limit: int) -> bytes:
        """All of it. Raises UpstreamError, also when it is longer than `limit` bytes."""
        parts, size = [], 0
        while data := await self.read():
            size += len(data)
            if size > limit:
                raise UpstreamBadBody(f"{self._provider} answered with more than {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    @property
    def broken(self) -> bool:
        """The connection is gone before the end. aiohttp does not tell a reader that waits of every fault it found."""
        connection = self._response.connection
        if self._response.content.is_eof():
            return False
        return connection is None or connection.transport is None or connection.transport.is_closing()

    def interrupt(self, error: GatewayError) -> None:
        """Let the read that is waiting, or the next one, raise `error`."""
        self._response.content.set_exception(error)

    def finish(self) -> None:
        """The last word was read: keep the connection for the next request, as soon as the body is at its end."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._drain.start(self._response)

    def close(self) -> None:
        """Cut the connection: the provider stops generating."""
        self._response.close()


class _Drain:
    """Reads what is between a stream's last word and the end of its body, so that the connection can be reused."""

    LIMIT = 0.1  # seconds; a provider that keeps the body open longer loses the connection

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, response: aiohttp.ClientResponse) -> None:
        task = asyncio.create_task(self._run(response))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, response: aiohttp.ClientResponse) -> None:
        try:
            async with asyncio.timeout(self.LIMIT):
                while await response.content.readany():
                    pass
        except (TimeoutError, aiohttp.ClientError, OSError, RuntimeError):
            pass
        finally:
            if response.content.at_eof():
                response.release()
            else:
                response.close()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Upstream:
    """The pool of connections to all providers. Opened and closed by app.py."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._urls: dict[str, URL] = {}
        self._drain = _Drain()
        # Our own limits bound the streams; aiohttp's 100 connections would queue them in silence.
        self._pooled = self._session(aiohttp.TCPConnector(limit=0, ttl_dns_cache=60, keepalive_timeout=30))
        self._fresh = self._session(aiohttp.TCPConnector(limit=0, ttl_dns_cache=60, force_close=True))

    def _session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(_note_connected)
        trace.on_connection_reuseconn.append(_note_reused)
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.gateway_connect_timeout),
            headers={"User-Agent": f"ai-gateway/{__version__}"},
            trust_env=False,
            trace_configs=[trace],
        )

    async def close(self) -> None:
        await self._drain.close()
        await self._pooled.close()
        await self._fresh.close()

    async def post(
        self, target: Target, request: UpstreamRequest, headers: Mapping[str, str], on_connected: Callable[[], None]
    ) -> Answer:
        """Send one request; the answer once its headers are in. Raises UpstreamError.

        `headers` is what the client sent: what may pass is picked here. `on_connected` is called when there is a
        connection, just before anything is sent on it.
        """
        provider = target.provider
        sent = {
            "Content-Type": "application/json",
            # A compressed stream would be held back by the compressor.
            "Accept-Encoding": "identity",
            **provider.headers,
            **request.headers,
            **_credential(provider, target.credential),
            **{name: headers[name] for name in _PASSED_ON if name in headers},
        }
        return await self._send("POST", provider, request.path, sent, request.body, on_connected)

    async def get(self, provider: Provider, path: str, timeout: float) -> bytes:
        """A small document of the provider's, such as its list of models. Raises UpstreamError."""
        headers = {**provider.headers, **_credential(provider, provider.api_key)}
        try:
            async with asyncio.timeout(timeout):
                answer = await self._send("GET", provider, path, headers)
                try:
                    if answer.status != 200:
                        raise UpstreamError(f"{provider.name} answered {answer.status}")
                    return await answer.body(8 << 20)
                finally:
                    answer.finish()
        except TimeoutError:
            raise UpstreamTimeout(f"{provider.name} did not answer in {timeout:g} s") from None

    async def _send(
        self,
        method: str,
        provider: Provider,
        path: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        on_connected: Callable[[], None] = lambda: None,
    ) -> Answer:
        url, progress = self._url(provider.base_url + path), _Progress(on_connected)
        send: dict[str, Any] = {
            "data": body,
            "headers": headers,
            "allow_redirects": False,
            "trace_request_ctx": progress,
        }
        with _map_open_errors(provider.name):
            try:
                response = await self._pooled.request(method, url, **send)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # A pooled connection that the provider closed under us: no byte of an answer came, so it is tried
                # once more on a fresh one. aiohttp does so by itself for idempotent methods alone.
                if not progress.reused:
                    raise
                response = await self._fresh.request(method, url, **send)
        if 300 <= response.status < 400:
            response.close()
            raise UpstreamError(f"{provider.name} answered with a redirect, which is not followed", kind="redirect")
        return Answer(response, provider.name, self._drain)

    def _url(self, address: str) -> URL:
        url = self._urls.get(address)
        if url is None:
            url = self._urls[address] = URL(address, encoded=True)
        return url


class _Progress:
    """How far a request came."""

    def __init__(self, on_connected: Callable[[], None]) -> None:
        self.on_connected = on_connected
        self.reused = False  # a pooled connection carries it


async def _note_connected(session: Any, context: Any, params: Any) -> None:
    context.trace_request_ctx.on_connected()


async def _note_reused(session: Any, context: Any, params: Any) -> None:
    context.trace_request_ctx.reused = True
    context.trace_request_ctx.on_connected()


def _credential(provider: Provider, credential: str | None) -> dict[str, str]:
    if credential is None:
        return {}
    if provider.auth == "bearer":
        return {"Authorization": f"Bearer {credential}"}
    return {provider.auth: credential}


@contextmanager
def _map_open_errors(provider: str) -> Iterator[None]:
    try:
        yield
    except aiohttp.ClientConnectorDNSError:
        raise UpstreamUnreachable(f"the address of {provider} cannot be resolved", kind="dns") from None
    except (aiohttp.ClientSSLError, ssl.SSLError):
        raise UpstreamUnreachable(f"TLS with {provider} failed", kind="tls") from None
    except aiohttp.ServerTimeoutError:
        raise UpstreamTimeout(f"{provider} could not be connected to in time", kind="timeout_connect") from None
    except aiohttp.ClientConnectorError:
        raise UpstreamUnreachable(f"{provider} cannot be reached", kind="connect") from None
    except aiohttp.ClientConnectionError:
        raise UpstreamUnreachable(f"{provider} closed the connection before it answered", kind="reset") from None
    except (aiohttp.ClientError, ValueError):
        raise UpstreamUnreachable(f"{provider} did not answer in HTTP", kind="protocol") from None


@contextmanager
def _map_read_errors(provider: str) -> Iterator[None]:
    try:
        yield
    except aiohttp.ClientPayloadError as error:
        if isinstance(error.__cause__, ConnectionError):
            raise UpstreamTruncated(f"{provider} reset the connection", kind="reset") from None
        raise UpstreamTruncated(f"{provider} ended its answer in the middle") from None
    except (aiohttp.ClientError, OSError, RuntimeError):  # the last: aiohttp's word for a reader without a connection
        raise UpstreamTruncated(f"{provider} reset the connection", kind="reset") from None


MAX_RETRY_AFTER = 86_400.0  # seconds; what is longer is a slip of the provider's


def _retry_after(headers: Mapping[str, str]) -> float | None:
    milliseconds, seconds = headers.get("retry-after-ms", ""), headers.get("retry-after", "").strip()
    for text, read in (
        (milliseconds, lambda text: float(text) / 1000),
        (seconds, float),
        (seconds, lambda text: parsedate_to_datetime(text).timestamp() - time()),
    ):
        with suppress(ValueError, OverflowError, TypeError):
            value = read(text)
            if isfinite(value):
                return min(max(0.0, value), MAX_RETRY_AFTER)
    return None
