"""A request that is passed on by its path, and its answer: both as they come, neither of them held.

Rule 1: one target is asked, once: a body that has passed cannot be sent to another.
Rule 2: an answer that breaks in the middle breaks the client's connection: half a file must not look whole.
Rule 3: what is not a success is told in our words, as a chat's is: a provider's may quote the operator's key.
Rule 4: the usage row is as a chat's. Tokens are what the answer says in `usage`; nothing is estimated, and what nobody
counted has no cost.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from time import monotonic
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from msgspec.structs import replace

from gateway.appkeys import BALANCER, METRICS, PULSE, RECORDER, SETTINGS, SPAN, TRACING, UPSTREAM
from gateway.attempt import outcome_of
from gateway.balancer import Turn
from gateway.client import Client
from gateway.deadline import Deadline
from gateway.exchange import Exchange
from gateway.protocol.errors import AnswerTooLarge, GatewayError, InternalError, UpstreamError, UpstreamTimeout
from gateway.protocol.json_object import read_json
from gateway.protocol.meter import Meter
from gateway.protocol.refusals import refusal
from gateway.protocol.tail import Tail
from gateway.upload import Upload
from gateway.upstream import MAX_ERROR_BODY, Answer, Passed

if TYPE_CHECKING:  # it imports OpenTelemetry
    from gateway.tracing import ClientSpan

MAX_DOCUMENT = 1 << 20  # bytes of an answer that is read whole
EVENTS = "text/event-stream"
JSON = "application/json"
_TEXTUAL = (EVENTS, JSON)  # whose end may tell the usage
_PASSED_ON = ("Content-Type", "Content-Disposition", "openai-processing-ms")
Keep = Callable[[bytes], None]  # is told of an answer that is whole
_EVENT_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}  # as of a chat


@asynccontextmanager
async def passing(request: web.Request, exchange: Exchange) -> AsyncIterator["Passage"]:
    """The way to one target of its route, begun in the journal. Raises GatewayError for who cannot be asked."""
    pulse = request.app[PULSE]
    turn = request.app[BALANCER].begin(exchange.route[:1])
    client = Client(request, exchange, draining=lambda: pulse.closing)
    passage = Passage(request, exchange, turn, client)
    try:
        await passage.begin()
        pulse.watch(client)
        yield passage
        turn.ok()
    except (asyncio.CancelledError, ConnectionError) as error:
        passage.note_left(error)
        raise
    except GatewayError as error:
        passage.note(error)
        raise
    except Exception:
        passage.note(InternalError(""))
        raise
    finally:
        passage.end()
        turn.left()
        pulse.forget(client)


class Passage:
    """Its exchange's outcome, status and error_code are written here. Made by `passing`."""

    def __init__(self, request: web.Request, exchange: Exchange, turn: Turn, client: Client) -> None:
        app = request.app
        self._request = request
        self._exchange = exchange
        self._turn = turn
        self._client = client
        self._target = turn.target
        self._settings = app[SETTINGS]
        self._metrics = app[METRICS]
        self._recorder = app[RECORDER]
        self._upstream = app[UPSTREAM]
        self._pulse = app[PULSE]
        self._traced = app[TRACING] is not None
        self._span: ClientSpan | None = None  # where there are traces
        self._started = 0.0  # seconds, monotonic
        self._refused = 0  # the provider's status, when it was no success
        self._patience: float | None = None  # seconds that a provider which refused wants to be left alone
        self._answer: Answer | None = None  # the one that is read
        self._held: bytearray | None = None  # what has passed of an answer that may be kept

    async def begin(self) -> None:
        exchange, target = self._exchange, self._target
        exchange.target = target
        exchange.headers["X-Gateway-Provider"] = target.provider.name
        if target.model:
            exchange.headers["X-Gateway-Model"] = target.model.encode("ascii", "replace").decode()
        exchange.meter = Meter((), framed=False)
        exchange.meter.to_count()  # it holds no text that could be counted in the provider's place
        await self._recorder.begin(exchange)
        self._started = monotonic()
        exchange.outcome = "interrupted"  # until we know better
        if self._traced:
            self._span = self._request[SPAN].attempt(exchange, target, stream=False)

    async def ask(self, passed: Passed) -> Answer:
        """An answer that is a success; whoever asked reads it. Raises GatewayError."""
        limit, body = self._settings.gateway_total_timeout, passed.body
        # While a body passes its own limit holds; the provider's time begins at its end.
        deadline = Deadline(self._settings.gateway_max_stream + limit if isinstance(body, Upload) else limit)

        def sent() -> None:
            deadline.at = monotonic() + limit

        if isinstance(body, Upload):
            body.on_end = sent
        headers = {**passed.headers, "X-Request-Id": self._exchange.id}
        try:
            with deadline as self._client.deadline:
                answer = await self._upstream.pass_on(
                    self._target,
                    passed._replace(headers=headers),
                    self._request.headers if self._span is None else self._span.headers,
                    self._connected,
                )
                self._answer = answer
                if answer.request_id:
                    self._exchange.headers["X-Upstream-Request-Id"] = answer.request_id
                if answer.status >= 300:
                    raise await self._refusal(answer)
        except TimeoutError:
            raise self._late(limit) from None
        finally:
            self._client.deadline = None
        self._turn.answered()
        return answer

    def _connected(self) -> None:
        """From here on the provider may bill: a usage row is due."""
        self._exchange.connected = True

    def _late(self, limit: float) -> GatewayError:
        if self._client.interrupted is not None:
            return self._client.interrupted
        return UpstreamTimeout(f"{self._target.provider.name} sent no answer within {limit:g} s", kind="timeout_total")

    async def _refusal(self, answer: Answer) -> GatewayError:
        self._refused = answer.status
        self._patience = answer.retry_after if answer.retry_after is not None else answer.exhausted_for or None
        body = await answer.body(MAX_ERROR_BODY)
        answer.finish()
        return refusal(answer.status, read_json(body), self._target, answer.retry_after, of_model=False)

    async def document(self, passed: Passed) -> bytes:
        """All of an answer that is small. Raises GatewayError."""
        answer = await self.ask(passed)
        parts, size = [], 0
        while data := await self._read(answer):
            parts.append(data)
            size += len(data)
            if size > MAX_DOCUMENT:
                answer.close()
                raise AnswerTooLarge(f"{self._target.provider.name} answered with more than {MAX_DOCUMENT} bytes")
        answer.finish()
        return b"".join(parts)

    async def send_document(self, body: bytes) -> web.StreamResponse:
        """To the client, as JSON; the exchange is over."""
        await self._settle(200)
        return self._closing(web.Response(body=body, content_type="application/json", headers=_NO_STORE))

    async def send(self, answer: Answer, *, counted: bool, keep: Keep | None = None) -> web.StreamResponse:
        """To the client, as it comes. Raises GatewayError also when a part of it is out.

        `counted`: what it says of tokens was used by this request. `keep` is told of JSON that is not too large.
        """
        exchange, streamed = self._exchange, answer.content_type == EVENTS
        if streamed and exchange.asked is not None:
            exchange.asked = replace(exchange.asked, stream=True)
        response = self._closing(web.StreamResponse(status=answer.status, headers=_headers(answer)))
        response.content_length = answer.length
        tail = Tail() if counted and answer.content_type in _TEXTUAL else None
        self._held = bytearray() if keep is not None and answer.content_type == JSON else None
        left = answer.length
        exchange.status = answer.status
        await response.prepare(self._request)
        if self._request.method == hdrs.METH_HEAD:  # asked as a GET, whose body is not wanted
            await self._settle(answer.status)
            return response
        while data := await self._read(answer):
            if streamed:
                exchange.first_byte = exchange.first_byte or monotonic()
            if tail is not None:
                tail.add(data)
            if self._held is not None:
                self._hold(data)
            if left is not None:
                left -= len(data)
                if not left:  # the client's last byte waits for its row
                    await self._settle(answer.status, tail, keep)
            await response.write(data)
        answer.finish()
        await self._settle(answer.status, tail, keep)
        await response.write_eof()
        return response

    def _hold(self, data: bytes) -> None:
        if self._held is not None and len(self._held) + len(data) <= self._settings.gateway_cache_max_answer:
            self._held += data
        else:
            self._held = None

    async def _read(self, answer: Answer) -> bytes:
        client = self._client
        if client.interrupted is not None:  # while nothing was read
            raise client.interrupted
        client.answer, client.reading_since = answer, monotonic()
        try:
            return await answer.read()
        finally:
            client.answer, client.reading_since = None, 0.0

    def _closing(self, response: web.StreamResponse) -> web.StreamResponse:
        """When the provider did not wait for the whole request, its rest is not waited for either."""
        if not self._request.content.at_eof():
            response.force_close()
        return response

    async def _settle(self, status: int, tail: Tail | None = None, keep: Keep | None = None) -> None:
        exchange = self._exchange
        if exchange.recorded or exchange.meter is None:
            return
        if tail is not None:
            exchange.meter.usage = tail.usage()
        exchange.outcome, exchange.status = "ok", status
        if keep is not None and self._held is not None:
            keep(bytes(self._held))
        await self._recorder.settle(exchange)

    # --- the end

    def note_left(self, error: BaseException) -> None:
        """The client is gone, or we are going; a client that leaves when it has everything leaves nothing to note."""
        if self._span is not None:
            self._span.error = error
        if self._exchange.outcome not in ("", "ok"):
            self._exchange.outcome = "interrupted" if self._pulse.draining else "client_abort"

    def note(self, error: GatewayError) -> None:
        """How the exchange ended, from what ended it."""
        exchange = self._exchange
        exchange.error_code = error.error_code or ""
        if self._span is not None:
            self._span.error = error
        exchange.status = exchange.status if exchange.prepared else error.http_status
        if self._started:
            exchange.outcome = outcome_of(error) if _of_upstream(error) else "rejected"
        if isinstance(error, UpstreamError):
            self._turn.failed(error, self._refused, self._patience)
            self._metrics.upstream_errors.labels(self._target.provider.name, error.kind).inc()

    def end(self) -> None:
        if self._answer is not None:
            self._answer.close()  # nothing is left to be read, or it is not wanted
        if self._started:
            self._exchange.upstream_ms = (monotonic() - self._started) * 1000
        if self._span is not None:
            self._span.end(self._refused, None)
        if self._client.stalled:
            self._exchange.error_code = "client_stalled"


def _of_upstream(error: GatewayError) -> bool:
    """Whether it is not the client's, as a body that is too large is, or one that stops coming."""
    return isinstance(error, UpstreamError) or error.http_status >= 500 or error.http_status == 401


_NO_STORE = {"Cache-Control": "no-store"}  # whose it is, no cache knows


def _headers(answer: Answer) -> Mapping[str, str]:
    passed = {name: value for name in _PASSED_ON if (value := answer.field(name))}
    passed.setdefault(hdrs.CONTENT_TYPE, answer.content_type)
    return {**passed, **(_EVENT_HEADERS if answer.content_type == EVENTS else _NO_STORE)}
