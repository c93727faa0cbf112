"""One try at one target: its provider's answer, on its way to the client.

Rule 1: once a byte was sent there is one status line and no other; what goes wrong then is an error event, no `[DONE]`.
Rule 2: until the provider's first chunk nothing is sent for one heartbeat interval, so that an error keeps its status.
Rule 3: whatever happens, the provider's connection is ended here, and the exchange and the turn say how it ended.
Rule 4: what no budget pays for is not sent on: a stream ends in the middle as one that reached its maximum.
"""

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.appkeys import APP, SPAN
from gateway.balancer import Turn
from gateway.client import Client
from gateway.deadline import Deadline
from gateway.exchange import Exchange, Outcome
from gateway.protocol.dialects import DIALECTS
from gateway.protocol.errors import (
    GatewayError,
    InternalError,
    KeyEnded,
    ShuttingDown,
    UpstreamBadBody,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
)
from gateway.protocol.meter import Meter
from gateway.protocol.request import PARSE_HERE, Call, UpstreamRequest
from gateway.protocol.usage import Usage
from gateway.protocol.whole import Whole
from gateway.stream import Stream, Tally
from gateway.upstream import MAX_ERROR_BODY, Answer

if TYPE_CHECKING:  # it imports OpenTelemetry
    from gateway.tracing import ClientSpan

log = logging.getLogger("gateway.relay")

ASKED, OK = "asked", "ok"  # of who is asked, in X-Gateway-Attempts: a heartbeat may send it before there is an answer

# It was not reached, or refused or died before it generated anything: nothing is billed.
_NOTHING_BILLED = frozenset(
    {
        "connect", "dns", "tls", "timeout_connect", "reset", "protocol", "redirect", "auth", "http_429", "http_4xx",
        "http_5xx",
    }
)  # fmt: skip


class Attempt:
    """Its exchange's outcome, status and error_code are written here, and by the relay when all is over."""

    __slots__ = (
        "_client",
        "_dialect",
        "_drain_seconds",
        "_exchange",
        "_gathered",
        "_meter",
        "_metrics",
        "_reached",
        "_recorder",
        "_request",
        "_settings",
        "_span",
        "_status",
        "_stream",
        "_tally",
        "_target",
        "_traced",
        "_turn",
        "_upstream",
        "asked_for",
        "to_send",
        "translator",
    )

    def __init__(
        self, request: web.Request, exchange: Exchange, client: Client, turn: Turn, call: Call, meter: Meter
    ) -> None:
        assert exchange.principal is not None and exchange.asked is not None
        app = request[APP]
        self._request = request
        self._exchange = exchange
        self._client = client
        self._turn = turn
        self._target = call.target
        self._stream = call.asked.stream
        # The provider streams, and the client wants a whole answer.
        self._gathered = Whole(call.asked.kind) if call.asked.stream and not exchange.asked.stream else None
        self._drain_seconds = exchange.principal.drain_seconds
        self._dialect = DIALECTS[call.target.provider.dialect]
        self.translator = self._dialect.translator(call)
        self.to_send: UpstreamRequest | None = None  # relay; None again once it is sent: it is as large as a prompt
        self._meter = meter
        self._upstream = app.upstream
        self._recorder = app.recorder
        self._settings = app.settings
        self._metrics = app.metrics
        self._traced = (tracing := app.tracing) is not None
        live = self._metrics.tokens_live(exchange.model, call.target.provider.name)
        self._tally = (Tally if tracing is None else tracing.tally)(exchange, self._meter, live)
        self._span: ClientSpan | None = None  # `_trace`: where there are traces
        self._reached = False  # there is a connection to the provider
        self._status = 0  # of a refusal of the provider's
        self.asked_for: float | None = None  # seconds that it wants to be left alone

    def run(self) -> Coroutine[None, None, web.StreamResponse]:
        """Send `to_send`. Raises GatewayError only while no byte was sent."""
        if not self._stream:
            answering = self._answer_whole()
        elif self._gathered is None:
            answering = self._answer_stream()
        else:
            answering = self._answer_gathered(self._gathered)
        if self._traced:
            answering = self._trace(answering)
        return self._outlive(answering) if self._drain_seconds else answering

    async def _trace(self, answering: Coroutine[None, None, web.StreamResponse]) -> web.StreamResponse:
        """With a span around it, which the provider is told of."""
        self._span = span = self._request[SPAN].attempt(self._exchange, self._target, stream=self._stream)
        try:
            return await answering
        except BaseException as error:
            span.error = error
            raise
        finally:
            span.end(self._status, self._tally)

    async def _outlive(self, answering: Coroutine[None, None, web.StreamResponse]) -> web.StreamResponse:
        """The client may leave: the provider is read on for a while, so that its own figures come."""
        task = asyncio.create_task(answering)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._client.leave()
            await asyncio.wait({task}, timeout=self._drain_seconds)
            raise
        finally:
            task.cancel()
            await asyncio.wait({task})
            error = None if task.cancelled() else task.exception()
            if self._client.left and isinstance(error, GatewayError):
                self.note(error)  # nobody else hears of it, and what a provider refused is not billed
                self._exchange.status = 0
            elif self._client.left and error is not None and not isinstance(error, ConnectionError):
                self._metrics.internal_errors.labels("stream").inc()  # nobody else is left to hear of it
                log.error(
                    "an outlived exchange failed",
                    exc_info=error,
                    extra={"fields": {"request_id": self._exchange.id}},
                )

    # --- a stream

    async def _answer_stream(self) -> web.StreamResponse:
        self._metrics.streams_open.inc()
        try:
            try:
                last = await self._pump(await self._open())
                await self._recorder.settle(self._exchange)
                if last:
                    self._client.write(last)
            except GatewayError as error:
                if not self._client.prepared:
                    raise
                await self._break(error)
            except Exception as error:
                # A bug of ours must not leave the client with half an answer that looks whole.
                if isinstance(error, ConnectionError) or not self._client.prepared:
                    raise
                self._metrics.internal_errors.labels("stream").inc()
                log.exception("stream failed", extra={"fields": {"request_id": self._exchange.id}})
                await self._break(InternalError("the gateway failed in the middle of the answer"))
            return await self._client.end()
        finally:
            self._metrics.streams_open.dec()

    async def _break(self, error: GatewayError) -> None:
        self.note(error)
        self._exchange.status = 200
        await self._recorder.settle(self._exchange)
        self._client.write(error.event())

    async def _open(self) -> Answer:
        """The provider's answer, once it is one that streams. Raises UpstreamError."""
        limit = self._settings.gateway_first_byte_timeout
        try:
            with Deadline(limit) as self._client.deadline:
                answer = await self._post()
                if answer.status != 200:
                    raise await self._refusal(answer)
        except TimeoutError:
            raise self._late(limit, f"sent no answer within {limit:g} s", "timeout_headers") from None
        finally:
            self._client.deadline = None
        if answer.content_type in ("text/html", "application/json") and answer.content_type != self._dialect.media_type:
            answer.close()
            raise UpstreamBadBody(f"{self._target.provider.name} answered with {answer.content_type}, not a stream")
        self._turn.answered()
        self._tell_ok()
        return answer

    async def _pump(self, answer: Answer) -> bytes:
        """All of the stream but its last chunk, which it gives."""
        stream = Stream(
            self._exchange,
            self.translator,
            self._tally,
            self._client,
            self._recorder,
            gathered=self._gathered,
            limit=self._settings.gateway_max_reply,
        )
        self._client.answer = answer
        try:
            last = await stream.run(answer)
        except BaseException:
            answer.close()
            raise
        finally:
            self._client.answer = None
            stream.settle()
        if last is None:
            answer.close()
            return await self._cut()
        answer.finish()
        self._done("ok")
        return last

    async def _cut(self) -> bytes:
        """The last words of a stream that nothing is left to pay for: those of one that reached its maximum."""
        self._meter.finish_reason = "length"
        self._done("budget_exhausted")
        await self._recorder.counted(self._exchange)
        usage, _ = self._meter.result()
        return self.translator.cut(usage)

    # --- a whole answer

    async def _answer_whole(self) -> web.StreamResponse:
        limit = self._settings.gateway_total_timeout
        try:
            with Deadline(limit) as self._client.deadline:
                answer = await self._post()
                if answer.status != 200:
                    raise await self._refusal(answer)
                body = await self._whole(answer, self._settings.gateway_max_reply)
        except TimeoutError:
            raise self._late(limit, f"did not finish its answer within {limit:g} s", "timeout_total") from None
        finally:
            self._client.deadline = None
        read = self.translator.reply
        reply = read(body) if len(body) <= PARSE_HERE else await asyncio.to_thread(read, body)
        self._tell_ok()
        if self._span is not None:
            self._span.read(reply.body)
        self._tally.count(reply.text, reply.usage, reply.finish_reason)
        return await self._client.send_whole(reply.body, self._before_last)

    def _before_last(self) -> Awaitable[None]:
        """The last byte of a whole answer."""
        self._done("ok")
        return self._recorder.settle(self._exchange)

    async def _answer_gathered(self, whole: Whole) -> web.StreamResponse:
        """Made of a stream, which a budget may have ended in the middle."""
        limit = self._settings.gateway_total_timeout
        try:
            async with asyncio.timeout(limit):
                last = await self._pump(await self._open())
        except TimeoutError:
            raise self._late(limit, f"did not finish its answer within {limit:g} s", "timeout_total") from None
        whole.add(last)
        return await self._client.send_whole(whole.body(), self._settle)

    def _settle(self) -> Awaitable[None]:
        return self._recorder.settle(self._exchange)

    # --- both

    def _done(self, outcome: Outcome) -> None:
        """All is there that will come, whether the client is or not."""
        self._exchange.outcome = "client_abort" if self._client.left else outcome
        self._exchange.status = 0 if self._client.left and not self._client.prepared else 200
        self._exchange.held = self._client.behind

    def _late(self, limit: float, words: str, kind: str) -> GatewayError:
        """What a time-out means: an interruption, a connection that never was, or a provider that is too slow."""
        if self._client.interrupted is not None:
            return self._client.interrupted
        if not self._reached:
            words, kind = f"could not be connected to within {limit:g} s", "timeout_connect"
        return UpstreamTimeout(f"{self._target.provider.name} {words}", kind=kind)

    async def _post(self) -> Answer:
        to_send, self.to_send = self.to_send, None
        assert to_send is not None
        named = UpstreamRequest(to_send.path, to_send.body, {**to_send.headers, "X-Request-Id": self._exchange.id})
        headers = self._request.headers if self._span is None else self._span.headers
        answer = await self._upstream.post(self._target, named, headers, self._connected)
        if request_id := answer.request_id:
            self._exchange.headers["X-Upstream-Request-Id"] = request_id
        return answer

    def _connected(self) -> None:
        """From here on the provider may bill: a usage row is due."""
        self._reached = self._exchange.connected = True

    def _tell_ok(self) -> None:
        headers = self._exchange.headers
        headers["X-Gateway-Attempts"] = headers["X-Gateway-Attempts"].removesuffix(ASKED) + OK

    async def _refusal(self, answer: Answer) -> GatewayError:
        self._status = answer.status
        self.asked_for = answer.retry_after if answer.retry_after is not None else answer.exhausted_for or None
        return self.translator.error(answer.status, await self._whole(answer, MAX_ERROR_BODY), answer.retry_after)

    async def _whole(self, answer: Answer, limit: int) -> bytes:
        try:
            body = await answer.body(limit)
        except BaseException:
            answer.close()
            raise
        answer.finish()
        return body

    @property
    def untouched(self) -> bool:
        """Nothing of an answer was sent or counted: another may be asked in its place."""
        return not (self._client.prepared or self._client.left or self._meter.bytes_out)

    def note(self, error: GatewayError) -> None:
        """How the exchange ended, from what ended it."""
        exchange = self._exchange
        exchange.status, exchange.error_code = error.http_status, error.error_code or ""
        exchange.outcome = outcome_of(error)
        if self._client.left:
            exchange.outcome = "client_abort"
        if self._span is not None:
            self._span.error = error
        if not isinstance(error, UpstreamError):
            return
        self._turn.failed(error, self._status, self.asked_for)
        self._metrics.upstream_errors.labels(self._target.provider.name, error.kind).inc()
        if error.kind in _NOTHING_BILLED and not self._meter.bytes_out and self._meter.usage is None:
            self._meter.usage = Usage(0, 0)


def outcome_of(error: GatewayError) -> Outcome:
    if isinstance(error, ShuttingDown | KeyEnded):
        return "interrupted"
    if isinstance(error, UpstreamTimeout):
        return "upstream_timeout"
    if isinstance(error, UpstreamRejected | UpstreamRateLimited):
        return "rejected"
    return "upstream_error" if isinstance(error, UpstreamError) else "gateway_error"
