"""Traces: a span for each request of /v1, to the end of its stream, and one in it for each try at a provider.

Imported only where GATEWAY_TRACES asks for it: OpenTelemetry takes a third of a second and 26 MB. Sampling, batches,
the collector's address and its headers are the SDK's own variables, OTEL_…
(https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/).

Names are those of https://opentelemetry.io/docs/specs/semconv/http/http-spans/ and of
https://github.com/open-telemetry/semantic-conventions-genai/blob/main/docs/gen-ai/gen-ai-spans.md, which are still
being developed; what begins with `gateway.` is ours.

Rule 1: no prompt, no completion and no key is in a span. What a client or a provider chose is short, and masked.
Rule 2: nobody waits for the collector. A thread sends; what it cannot send is dropped, the oldest first.
"""

import asyncio
import logging
import os
import re
import threading
from collections.abc import Mapping
from functools import lru_cache
from time import monotonic, time_ns
from urllib.parse import urlsplit
from uuid import uuid4

from aiohttp import hdrs, web
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from gateway import __version__
from gateway.exchange import Exchange
from gateway.masking import harmless, safe
from gateway.protocol.errors import GatewayError, UpstreamError
from gateway.protocol.meter import Meter
from gateway.protocol.request import Chunk, Kind
from gateway.protocol.routing import Target
from gateway.settings import SettingsError
from gateway.stream import Tally

log = logging.getLogger("gateway.traces")

FLUSH = 3.0  # seconds that the last spans may take to reach the collector when we stop
# Spans that are sent together, where OTEL_BSP_MAX_EXPORT_BATCH_SIZE does not say. One takes 0.06 ms to encode, so they
# are done within the 5 ms for which CPython lets a thread go on while the event loop waits; the SDK's 512 are not.
BATCH = 64
MAX_TEXT = 256  # characters of what a client or a provider chose
NOISE = 60.0  # seconds between two lines about a collector that does not answer

_W3C = TraceContextTextMapPropagator()
_CONTEXT = ("traceparent", "tracestate")  # https://www.w3.org/TR/trace-context/
_MODEL = re.compile(rb'"model" ?: ?"([^"\\]{1,256})"')  # in a text of JSON's each of these quotes has a backslash
# https://opentelemetry.io/docs/specs/semconv/registry/attributes/gen-ai/#gen-ai-operation-name
_OPERATIONS: Mapping[Kind, str] = {
    "chat": "chat",
    "completion": "text_completion",
    "embedding": "embeddings",
    "passthrough": "passthrough",  # a name of ours
}
_FAILED = ("upstream_error", "upstream_timeout", "interrupted", "gateway_error")  # outcomes that are a server's errors


class Tracing:
    """Makes this process's spans. Opened and closed by app.py."""

    tally: type[Tally]  # what counts a stream that has a span

    def __init__(self) -> None:
        """Raises SettingsError."""
        self.tally = NamedTally
        _hush()
        _check_endpoint()
        try:
            self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        except ValueError as error:
            raise _refused(error) from None
        self._tracer = self._provider.get_tracer("gateway", __version__)

    def open(self) -> None:
        """From here on spans are sent. Raises SettingsError."""
        batch = None if "OTEL_BSP_MAX_EXPORT_BATCH_SIZE" in os.environ else BATCH
        try:
            self._provider.add_span_processor(BatchSpanProcessor(make_exporter(), max_export_batch_size=batch))
        except (ValueError, RuntimeError) as error:
            raise _refused(error) from None

    async def close(self) -> None:
        """Sends what is left, within FLUSH seconds; who waits longer is a thread that ends with the process."""
        ending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, FLUSH)

    def begin(self, request: web.Request) -> "ServerSpan":
        """The span of a request; its parent is what the client's `traceparent` names.

        https://opentelemetry.io/docs/specs/semconv/http/http-spans/#http-server-span, without what tells of the client:
        its address and its User-Agent.
        """
        method = request.method if request.method in hdrs.METH_ALL else "_OTHER"
        attributes: dict[str, AttributeValue] = {
            "http.request.method": method,
            "url.path": _text(request.path),
            "url.scheme": request.scheme,
        }
        name = method if method != "_OTHER" else "HTTP"
        if (resource := request.match_info.route.resource) is not None:
            attributes["http.route"] = resource.canonical
            name = f"{name} {resource.canonical}"
        parent = _parent(request) if _CONTEXT[0] in request.headers else Context()
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        return ServerSpan(self._tracer, span, parent)


def make_exporter() -> SpanExporter:
    return OTLPSpanExporter()


def _parent(request: web.Request) -> Context:
    """No parent when the headers are not as they should be; two `traceparent` are not, by the comma between them."""
    carrier = {name: ",".join(request.headers.getall(name, ())) for name in _CONTEXT}
    return _W3C.extract(carrier, Context())


class ServerSpan:
    """One request, from its head to the last byte of its answer."""

    __slots__ = ("_attempts", "_inside", "_span", "_tracer")

    def __init__(self, tracer: Tracer, span: Span, parent: Context) -> None:
        self._tracer = tracer
        self._span = span
        self._inside = set_span_in_context(span, parent)
        self._attempts = 0

    def attempt(self, exchange: Exchange, target: Target, *, stream: bool) -> "ClientSpan":
        """The span of one try at a provider, which begins now."""
        self._attempts += 1
        model = _text(target.model)
        host, port = _address(target.provider.base_url)
        assert exchange.asked is not None
        operation = _OPERATIONS[exchange.asked.kind]
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": target.provider.name,
            "gen_ai.request.model": model,
            "gen_ai.request.stream": stream,
            "server.address": host,
            "server.port": port,
        }
        span = self._tracer.start_span(f"{operation} {model}".strip(), self._inside, SpanKind.CLIENT, attributes)
        return ClientSpan(span, self._inside, exchange, stream=stream)

    def end(self, exchange: Exchange | None) -> None:
        """The exchange is over, however it ended."""
        if exchange is not None and self._span.is_recording():
            self._span.set_attributes({**_of_exchange(exchange), "gateway.attempts": self._attempts})
            if exchange.status >= 500 or exchange.outcome in _FAILED:
                self._span.set_attribute("error.type", _text(exchange.error_code) or str(exchange.status))
                self._span.set_status(StatusCode.ERROR)
        self._span.end()


def _of_exchange(exchange: Exchange) -> dict[str, AttributeValue]:
    """What the exchange says at its end, of that which is known."""
    source = exchange.meter.result()[1] if exchange.meter is not None and exchange.connected else ""
    said: dict[str, AttributeValue | None] = {
        "http.response.status_code": exchange.status or None,  # 0: the client saw none
        "gateway.request_id": exchange.id,
        "gateway.outcome": exchange.outcome,
        "gateway.model": _text(exchange.model),
        "gateway.provider": exchange.target.provider.name if exchange.target is not None else None,
        "gateway.error_code": _text(exchange.error_code),
        "gateway.usage_source": source,
        "gateway.cost_micros": exchange.cost_micros,
        "gateway.user_id": _text(exchange.user_id),
        "gateway.app_id": _text(exchange.app_id),
    }
    return {name: value for name, value in said.items() if value is not None and value != ""}


class ClientSpan:
    """One try at a provider, from the call to the last byte of its answer."""

    __slots__ = ("_exchange", "_meter", "_model", "_span", "_started", "_stream", "error", "headers")

    def __init__(self, span: Span, inside: Context, exchange: Exchange, *, stream: bool) -> None:
        assert exchange.meter is not None
        self._span = span
        self._exchange = exchange
        self._meter = exchange.meter
        self._stream = stream
        self._model = ""  # as the provider names it
        self._started = monotonic()  # seconds
        self.error: BaseException | None = None  # attempt: what ended it
        self.headers: dict[str, str] = {}  # for the provider: this span is the parent of its own
        _W3C.inject(self.headers, set_span_in_context(span, inside))

    def read(self, body: bytes) -> None:
        """A whole answer."""
        self._model = _model_in(body)

    def end(self, status: int, tally: Tally | None) -> None:
        """`status`: of a provider that refused, else 0. `tally`: what counted its stream, if it is one of chunks."""
        span = self._span
        if span.is_recording():
            if isinstance(tally, NamedTally):
                self._model = self._model or tally.model
            if self._stream and self._exchange.first_byte:
                self._say_first_token(self._exchange.first_byte)
            span.set_attributes(_of_answer(self._meter, self._model, status))
            if isinstance(self.error, asyncio.CancelledError):
                span.add_event("cancelled")  # the client left, or we are going: no fault of the provider's
            elif kind := _error_type(self.error):
                span.set_attribute("error.type", kind)
                span.set_status(StatusCode.ERROR)
        span.end()

    def _say_first_token(self, at: float) -> None:
        self._span.set_attribute("gen_ai.response.time_to_first_chunk", at - self._started)
        self._span.add_event("first_token", timestamp=time_ns() - round((monotonic() - at) * 1e9))


class NamedTally(Tally):
    """Of a stream, beside what it counts: which model the provider says it is, if its first chunks do."""

    looks = 3  # at most
    model = ""

    def take(self, chunks: list[Chunk]) -> bytes:
        data = super().take(chunks)
        if self.looks and data:
            self.model = _model_in(data)
            self.looks = 0 if self.model else self.looks - 1
        return data


def _model_in(data: bytes) -> str:
    """The name in an answer or a chunk of one, near its beginning; "" where there is none."""
    found = _MODEL.search(data, 0, 4096)
    return found[1].decode("utf-8", "replace") if found else ""


def _of_answer(meter: Meter, model: str, status: int) -> dict[str, AttributeValue]:
    said: dict[str, AttributeValue] = {}
    if status:
        said["http.response.status_code"] = status
    if model:
        said["gen_ai.response.model"] = _text(model)
    if meter.finish_reason:
        said["gen_ai.response.finish_reasons"] = [_text(meter.finish_reason)]
    if meter.usage is not None or meter.bytes_out:
        usage, _ = meter.result()
        said["gen_ai.usage.input_tokens"] = usage.prompt_tokens or 0
        said["gen_ai.usage.output_tokens"] = usage.completion_tokens or 0
        if usage.cached_tokens:
            said["gen_ai.usage.cache_read.input_tokens"] = usage.cached_tokens
        if usage.cache_write_tokens:
            said["gen_ai.usage.cache_creation.input_tokens"] = usage.cache_write_tokens
        if usage.reasoning_tokens:
            said["gen_ai.usage.reasoning.output_tokens"] = usage.reasoning_tokens
    return said


def _error_type(error: BaseException | None) -> str:
    """Of a closed set: a provider's own code may be anything."""
    if error is None or isinstance(error, ConnectionError):
        return ""  # that is the client's connection
    if isinstance(error, UpstreamError):
        return error.kind
    return type(error).code or "" if isinstance(error, GatewayError) else type(error).__name__


@lru_cache(maxsize=256)
def _address(base_url: str) -> tuple[str, int]:
    parts = urlsplit(base_url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _text(text: str) -> str:
    """What somebody else chose. Half an emoji in it would be the end of the whole batch: Protobuf has none."""
    text = text[:MAX_TEXT]
    return text if harmless(text) else safe(text)


# --- how it is set up ---------------------------------------------------------------------------------------------


def _resource() -> Resource:
    """Who makes the spans (https://opentelemetry.io/docs/specs/semconv/resource/#service); the environment wins."""
    ours = {"service.name": "ai-gateway", "service.version": __version__, "service.instance.id": str(uuid4())}
    return Resource.create(Resource(ours).merge(OTELResourceDetector().detect()).attributes)


def _refused(error: Exception) -> SettingsError:
    return SettingsError(f"GATEWAY_TRACES: OpenTelemetry refuses what its variables say: {error}")


def _check_endpoint() -> None:
    """The SDK finds it out with the first batch, and again with each. A part of it may be a secret: none is told."""
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        given = os.environ.get(name, "")
        if given and not given.startswith(("http://", "https://")):
            raise SettingsError(f"{name}: an http or https address is required")


def _hush() -> None:
    """The SDK's complaints, one line a minute: a collector that is gone fails for every batch."""
    theirs = logging.getLogger("opentelemetry")
    theirs.propagate = False
    theirs.handlers = [_OnceAMinute(logging.WARNING)]
    # They quote headers that are not as they should be: of clients, and of ours to the collector, with the key to it.
    for quoting in ("opentelemetry.trace", "opentelemetry.util.re"):
        logging.getLogger(quoting).setLevel(logging.CRITICAL)


class _OnceAMinute(logging.Handler):
    """Passes a line on, and counts what comes in the minute after it."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._next = 0.0  # when the next line may be written, seconds, monotonic
        self._held = 0  # lines since the last

    def emit(self, record: logging.LogRecord) -> None:
        now = monotonic()
        if now < self._next:
            self._held += 1
            return
        held = f" (and {self._held} lines more since the last)" if self._held else ""
        log.warning("%s%s", record.getMessage()[:500], held)
        self._next, self._held = now + NOISE, 0
