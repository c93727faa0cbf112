"""From a provider to the client, one request: errors before the first byte, error events after it.

Rule 1: once a byte was sent there is one status line and no other; what goes wrong then is an error event, no `[DONE]`.
Rule 2: until the provider's first chunk nothing is sent for one heartbeat interval, so that an error keeps its status.
Rule 3: whatever happens, the provider's connection is ended here, and the exchange says how it ended.
Rule 4: what no budget pays for is not sent on: a stream ends in the middle as one that reached its maximum.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from time import monotonic, time

from aiohttp import web

from gateway.appkeys import METRICS, PULSE, RECORDER, SETTINGS, UPSTREAM
from gateway.client import Client
from gateway.exchange import Exchange, Outcome
from gateway.protocol.chat import (
    PARSE_HERE,
    Call,
    ChatRequest,
    Chunk,
    Translator,
    UpstreamRequest,
    prompt_text,
)
from gateway.protocol.dialects import DIALECTS
from gateway.protocol.errors import (
    GatewayError,
    InternalError,
    ShuttingDown,
    UpstreamBadBody,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
)
from gateway.protocol.meter import Meter
from gateway.protocol.usage import Usage
from gateway.protocol.whole import Whole
from gateway.reserve import reserve
from gateway.upstream import MAX_ERROR_BODY, Answer

log = logging.getLogger("gateway.relay")

# The provider refused or died before it generated anything: nothing is billed.
_NOTHING_BILLED = frozenset({"reset", "protocol", "redirect", "auth", "http_429", "http_4xx", "http_5xx"})


async def relay(request: web.Request, exchange: Exchange) -> web.StreamResponse:
    """Answer a chat request whose target is set. Raises GatewayError only while no byte was sent."""
    assert exchange.chat is not None
    assert exchange.target is not None
    meter = Meter(prompt_text(exchange.chat))
    chat = await reserve(request, exchange, meter)
    call = Call(chat, exchange.target, f"chatcmpl-{exchange.id.replace('-', '')}", int(time()))
    attempt = _Attempt(request, exchange, call, meter)
    to_send = await _request_of(attempt.translator, chat)
    await attempt.begin()
    exchange.outcome = "interrupted"  # until we know better
    started = monotonic()
    try:
        return await attempt.run(to_send)
    except GatewayError as error:
        attempt.note(error)
        raise
    except (asyncio.CancelledError, ConnectionError):
        attempt.note_left(draining=request.config_dict[PULSE].draining)
        raise
    except Exception:
        bug = InternalError("")
        exchange.outcome, exchange.status, exchange.error_code = "gateway_error", bug.http_status, bug.error_code or ""
        raise
    finally:
        exchange.upstream_ms = (monotonic() - started) * 1000


async def _request_of(translator: Translator, chat: ChatRequest) -> UpstreamRequest:
    """Raises InvalidRequest for what the dialect cannot express: nothing was sent yet."""
    if len(chat.body) <= PARSE_HERE:
        return translator.request()
    return await asyncio.to_thread(translator.request)


class _Attempt:
    """One try at one target. Its exchange's outcome, status, error_code and meter are written here alone."""

    def __init__(self, request: web.Request, exchange: Exchange, call: Call, meter: Meter) -> None:
        assert exchange.principal is not None and exchange.chat is not None
        self._request = request
        self._exchange = exchange
        self._target = call.target
        self._stream = call.chat.stream
        # The provider streams, and the client wants a whole answer.
        self._gathered = Whole() if call.chat.stream and not exchange.chat.stream else None
        self._drain_seconds = exchange.principal.drain_seconds
        self._client = Client(request, stream=exchange.chat.stream, outlived=self._drain_seconds > 0)
        self._dialect = DIALECTS[call.target.provider.dialect]
        self.translator = self._dialect.translator(call)
        self._meter = meter
        self._reservation = exchange.reservation
        self._recorder = request.config_dict[RECORDER]
        self._settings = request.config_dict[SETTINGS]
        self._metrics = request.config_dict[METRICS]
        self._live = self._metrics.tokens_live(exchange.model, call.target.provider.name)

    async def begin(self) -> None:
        """Raises JournalFull: what cannot be accounted is not sent."""
        self._exchange.meter = self._meter
        await self._recorder.begin(self._exchange)

    async def run(self, to_send: UpstreamRequest) -> web.StreamResponse:
        client = self._client
        with self._request.config_dict[PULSE].watch(client):
            try:
                answering = self._answer(to_send)
                return await (self._outlive(answering) if self._drain_seconds else answering)
            finally:
                if client.prepared:
                    self._exchange.status = 200
                if client.stalled:
                    self._exchange.error_code = "client_stalled"

    async def _answer(self, to_send: UpstreamRequest) -> web.StreamResponse:
        if not self._stream:
            return await self._answer_whole(to_send)
        if self._gathered is None:
            return await self._answer_stream(to_send)
        return await self._answer_gathered(to_send, self._gathered)

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
            if not task.cancelled():
                task.exception()  # nobody is left to hear of it

    # --- a stream

    async def _answer_stream(self, to_send: UpstreamRequest) -> web.StreamResponse:
        self._metrics.streams_open.inc()
        try:
            await self._send_stream(to_send)
            return await self._client.end()
        finally:
            self._metrics.streams_open.dec()

    async def _send_stream(self, to_send: UpstreamRequest) -> None:
        """All of the stream but its end. Raises GatewayError only while no byte was sent."""
        try:
            self._client.answer = await self._open(to_send)
            last = await self._pump(self._client.answer)
            await self._recorder.settle(self._exchange)
            await self._client.send(last)
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

    async def _break(self, error: GatewayError) -> None:
        self.note(error)
        self._exchange.status = 200
        await self._recorder.settle(self._exchange)
        await self._client.send(error.event())

    async def _open(self, to_send: UpstreamRequest) -> Answer:
        """The provider's answer, once it is one that streams. Raises UpstreamError."""
        limit = self._settings.gateway_first_byte_timeout
        with self._within(limit, f"sent no answer within {limit:g} s", "timeout_headers"):
            async with asyncio.timeout(limit) as self._client.deadline:
                answer = await self._post(to_send)
                if answer.status != 200:
                    raise await self._refusal(answer)
        if answer.content_type in ("text/html", "application/json") and answer.content_type != self._dialect.media_type:
            answer.close()
            raise UpstreamBadBody(f"{self._target.provider.name} answered with {answer.content_type}, not a stream")
        return answer

    async def _pump(self, answer: Answer) -> bytes:
        """One read, one feed, one write, until the dialect's last word, which is held back and given."""
        translator, client = self.translator, self._client
        try:
            while True:
                client.reading_since = monotonic()
                data = await answer.read()
                client.reading_since = 0.0
                for piece in self._pieces(data):
                    chunks = translator.feed(piece) if piece else []
                    if translator.done or not piece:
                        last = await self._last_words(chunks)
                        answer.finish()
                        self._done("ok")
                        return last
                    if not await self._forward(chunks):
                        answer.close()
                        return await self._cut()
                self._recorder.tick(self._exchange)
        except BaseException:
            answer.close()
            raise

    def _pieces(self, data: bytes) -> list[bytes]:
        """What is fed at once: under a budget a line, so that the translator knows no more than was passed on."""
        if self._reservation is None or not data:
            return [data]
        return data.splitlines(keepends=True)

    async def _last_words(self, chunks: list[Chunk]) -> bytes:
        """Sends all but the last chunk, which it gives. Raises UpstreamError, with all before the fault sent."""
        try:
            chunks = [*chunks, *self.translator.flush()]
        except GatewayError:
            await self._send(chunks)
            raise
        await self._send(chunks[:-1])
        return self._take(chunks[-1:])

    async def _forward(self, chunks: list[Chunk]) -> bool:
        """False: it is paid for up to a chunk, which is sent, and for no more."""
        if self._reservation is None:
            await self._send(chunks)
            return True
        for chunk in chunks:
            await self._send([chunk])
            if not chunk.text:
                continue  # the last ones of a stream that ended well may bring a higher count
            count = self._meter.completion_tokens
            if not self._reservation.used(count) and not await self._reservation.more(count):
                return False
        return True

    async def _cut(self) -> bytes:
        """The last words of a stream that nothing is left to pay for: those of one that reached its maximum."""
        self._meter.finish_reason = "length"
        self._done("budget_exhausted")
        await self._recorder.counted(self._exchange)
        usage, _ = self._meter.result()
        return self.translator.cut(usage)

    async def _send(self, chunks: list[Chunk]) -> None:
        if not (data := self._take(chunks)):
            return
        if self._gathered is None:
            await self._client.send(data)
            return
        self._gathered.add(data)
        if self._gathered.size > (limit := self._settings.gateway_max_reply):
            raise UpstreamBadBody(f"{self._target.provider.name} answered with more than {limit} bytes")

    def _take(self, chunks: list[Chunk]) -> bytes:
        # Counted before it is sent: the provider bills what the client did not wait for.
        for chunk in chunks:
            self._count(chunk.text, chunk.usage, chunk.finish_reason)
        return b"".join([chunk.data for chunk in chunks])

    # --- a whole answer

    async def _answer_whole(self, to_send: UpstreamRequest) -> web.StreamResponse:
        limit = self._settings.gateway_total_timeout
        with self._within(limit, f"did not finish its answer within {limit:g} s", "timeout_total"):
            async with asyncio.timeout(limit) as self._client.deadline:
                answer = await self._post(to_send)
                if answer.status != 200:
                    raise await self._refusal(answer)
                body = await self._whole(answer, self._settings.gateway_max_reply)
        reply = self.translator.reply(body)
        self._count(reply.text, reply.usage, reply.finish_reason)
        return await self._client.send_whole(reply.body, self._before_last)

    async def _before_last(self) -> None:
        """The last byte of a whole answer."""
        self._done("ok")
        await self._settle()

    async def _answer_gathered(self, to_send: UpstreamRequest, whole: Whole) -> web.StreamResponse:
        """Made of a stream, which a budget may have ended in the middle."""
        limit = self._settings.gateway_total_timeout
        with self._within(limit, f"did not finish its answer within {limit:g} s", "timeout_total"):
            async with asyncio.timeout(limit):
                self._client.answer = await self._open(to_send)
                last = await self._pump(self._client.answer)
        whole.add(last)
        return await self._client.send_whole(whole.body(), self._settle)

    async def _settle(self) -> None:
        await self._recorder.settle(self._exchange)

    # --- both

    def _done(self, outcome: Outcome) -> None:
        """All is there that will come, whether the client is or not."""
        self._exchange.outcome = "client_abort" if self._client.left else outcome
        self._exchange.status = 0 if self._client.left and not self._client.prepared else 200

    @contextmanager
    def _within(self, limit: float, words: str, kind: str) -> Iterator[None]:
        """Says what a time-out means: an interruption, a connection that never was, or a provider that is too slow."""
        try:
            yield
        except TimeoutError:
            if self._client.interrupted is not None:
                raise self._client.interrupted from None
            if not self._exchange.connected:
                words, kind = f"could not be connected to within {limit:g} s", "timeout_connect"
            raise UpstreamTimeout(f"{self._target.provider.name} {words}", kind=kind) from None
        finally:
            self._client.deadline = None

    async def _post(self, to_send: UpstreamRequest) -> Answer:
        upstream = self._request.config_dict[UPSTREAM]
        named = to_send._replace(headers={**to_send.headers, "X-Request-Id": self._exchange.id})
        answer = await upstream.post(self._target, named, self._request.headers, self._connected)
        if answer.request_id:
            self._exchange.headers["X-Upstream-Request-Id"] = answer.request_id
        return answer

    def _connected(self) -> None:
        """From here on the provider may bill: a usage row is due."""
        self._exchange.connected = True

    async def _refusal(self, answer: Answer) -> GatewayError:
        return self.translator.error(answer.status, await self._whole(answer, MAX_ERROR_BODY), answer.retry_after)

    async def _whole(self, answer: Answer, limit: int) -> bytes:
        try:
            body = await answer.body(limit)
        except BaseException:
            answer.close()
            raise
        answer.finish()
        return body

    def _count(self, text: str, usage: Usage | None, finish_reason: str | None) -> None:
        added = self._meter.see(text, usage, finish_reason)
        if text and not self._exchange.first_byte:
            self._exchange.first_byte = monotonic()
        if added:
            self._live.inc(added)
            self._exchange.counted_live += added

    def note_left(self, *, draining: bool) -> None:
        """The client is gone, or we are going; a client that leaves when it has everything leaves nothing to note."""
        if self._exchange.outcome not in ("ok", "budget_exhausted"):
            self._exchange.outcome = "interrupted" if draining else "client_abort"

    def note(self, error: GatewayError) -> None:
        """How the exchange ended, from what ended it."""
        exchange = self._exchange
        exchange.status, exchange.error_code = error.http_status, error.error_code or ""
        if isinstance(error, ShuttingDown):
            exchange.outcome = "interrupted"
        elif isinstance(error, UpstreamTimeout):
            exchange.outcome = "upstream_timeout"
        elif isinstance(error, UpstreamRejected | UpstreamRateLimited):
            exchange.outcome = "rejected"
        elif isinstance(error, UpstreamError):
            exchange.outcome = "upstream_error"
        else:
            exchange.outcome = "gateway_error"
        if self._client.left:
            exchange.outcome = "client_abort"
        if not isinstance(error, UpstreamError):
            return
        self._metrics.upstream_errors.labels(self._target.provider.name, error.kind).inc()
        if error.kind in _NOTHING_BILLED and not self._meter.bytes_out and self._meter.usage is None:
            self._meter.usage = Usage(0, 0)
