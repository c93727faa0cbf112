"""The mock's HTTP server: which request gets which answer."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from weakref import WeakSet

import orjson
from aiohttp import web

from gateway.mock import anthropic, embeddings, ollama, ollama_generate, openai, openai_completion
from gateway.mock.answers import Ask
from gateway.mock.formats import Format
from gateway.mock.log import Log, Received
from gateway.mock.passed import Passed
from gateway.mock.plays import Play, prepare
from gateway.mock.script import ProviderError
from gateway.mock.stage import UNANSWERED, Performance, break_off

MAX_BODY = 64 << 20  # bytes; the largest body that one of the providers takes is 32 MiB
PREPARED = 64  # answers kept ready
SMALL = 64 << 10  # bytes of a request that is remembered with its answer
FORMATS: Mapping[str, Format] = {
    form.NAME: form for form in (openai, openai_completion, anthropic, ollama, ollama_generate)
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Mock:
    """The provider in this process. `start` opens it; `stop` closes it and every connection it has.

    `models` are names beside its own three: listed in every format, and known to Ollama's, which refuses all others.
    """

    def __init__(self, *, pace_ms: float = 0, models: Sequence[str] = ()) -> None:
        self._pace_ms = pace_ms
        self._models = tuple(models)
        self._known = frozenset(models)
        self._log = Log()
        self._read = lru_cache(maxsize=PREPARED)(self._read_anew)
        self._prepare = lru_cache(maxsize=PREPARED)(_prepare)
        self._struck: Counter[str] = Counter()  # how often a script's fault was asked for, by model name
        self._doomed: WeakSet[asyncio.BaseTransport] = WeakSet()  # connections that their next request resets
        self._runner: web.AppRunner | None = None
        self._answered = 0
        self._stopping = False

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """The base URL, once it answers there."""
        self._runner = web.AppRunner(
            self.make_app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1, handle_signals=False
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, backlog=1024).start()
        shown = "127.0.0.1" if host in ("", "0.0.0.0") else f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        self._stopping = True
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def received(self) -> list[Received]:
        """The last requests, oldest first; those to `/_mock` are not among them."""
        return self._log.received

    @property
    def open_connections(self) -> int:
        """Clients' connections, idle ones included."""
        server = self._runner.server if self._runner is not None else None
        return len(server.connections) if server is not None else 0

    def make_app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY)
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._noting(self._chat(openai))),
                web.post("/v1/messages", self._noting(self._chat(anthropic))),
                web.post("/api/chat", self._noting(self._chat(ollama))),
                web.post("/v1/completions", self._noting(self._chat(openai_completion))),
                web.post("/api/generate", self._noting(self._chat(ollama_generate))),
                web.post("/v1/embeddings", self._noting(self._embed(openai))),
                web.post("/api/embed", self._noting(self._embed(ollama))),
                web.get("/v1/models", self._noting(self._list_models)),
                web.get("/api/tags", self._noting(self._list_tags)),
                web.get("/api/version", self._noting(self._show_version)),
                *(
                    web.route(method, path, self._noting(answer, reads=False))
                    for method, path, answer in Passed(lambda problem: _refuse(openai, problem, {})).routes()
                ),
                web.get("/_mock/log", self._show_log),
                web.delete("/_mock/log", self._clear_log),
                web.route("*", "/{path:.*}", self._noting(self._refuse_path)),
            ]
        )
        return app

    def _noting(
        self, answer: Callable[[web.Request, Received], Awaitable[web.StreamResponse]], *, reads: bool = True
    ) -> Handler:
        """A handler that keeps the log: what came, and whether the client stayed to the end."""

        async def handle(request: web.Request) -> web.StreamResponse:
            received = self._log.open(request.method, request.path, request.headers)
            try:
                self._log.keep(received, await request.read() if reads else b"")
                response = await answer(request, received)
            except (asyncio.CancelledError, ConnectionError):
                if not self._stopping and not received.finished:
                    received.client_gone_at = time.monotonic()
                raise
            received.phase, received.finished = "ended", True
            return response

        return handle

    # --- chat ---

    def _chat(self, form: Format) -> Callable[[web.Request, Received], Awaitable[web.StreamResponse]]:
        async def answer(request: web.Request, received: Received) -> web.StreamResponse:
            if request.transport in self._doomed:
                return break_off(request, received, "reset_before_headers")
            self._answered += 1
            headers = form.headers(f"req_mock{self._answered:016d}")
            try:
                ask = self._heal(self._read_known(form, received))
                return await self._answer(request, received, form, ask, headers)
            except ProviderError as problem:
                return _refuse(form, problem, headers)

        return answer

    def _read_known(self, form: Format, received: Received) -> Ask:
        """The request read; one that came before, word for word, is not read again (a benchmark sends few others)."""
        headers = tuple((name, value) for name, value in received.headers.items() if name.startswith("anthropic-"))
        if len(received.body) > SMALL:
            return self._read_anew(form.NAME, received.body, headers)
        return self._read(form.NAME, received.body, headers)

    def _read_anew(self, format_name: str, body: bytes, headers: tuple[tuple[str, str], ...]) -> Ask:
        return FORMATS[format_name].read(body, dict(headers), self._known)

    def _heal(self, ask: Ask) -> Ask:
        """The same request without its fault, when that has struck as often as the script wants."""
        if not ask.script.times:
            return ask
        self._struck[ask.model] += 1
        if self._struck[ask.model] <= ask.script.times:
            return ask
        return replace(ask, script=replace(ask.script, fault="", status=0))

    async def _answer(
        self, request: web.Request, received: Received, form: Format, ask: Ask, headers: dict[str, str]
    ) -> web.StreamResponse:
        script = ask.script
        received.model = ask.model
        if script.headers_ms:
            await asyncio.sleep(script.headers_ms / 1000)
        if script.fault in UNANSWERED:
            return break_off(request, received, script.fault)
        if script.status:
            return _refuse(form, form.failure(script.status), headers, script.retry_after)
        if script.fault == "reset_on_reuse" and request.transport is not None:
            self._doomed.add(request.transport)
        performance = Performance(
            request=request,
            received=received,
            play=self._prepare(form.NAME, ask),
            pace=(self._pace_ms if script.pace_ms is None else script.pace_ms) / 1000,
            pause=script.ttft_ms / 1000,
            split=script.split,
        )
        return await performance.run(headers)

    # --- all else ---

    def _embed(self, form: Format) -> Callable[[web.Request, Received], Awaitable[web.StreamResponse]]:
        async def answer(request: web.Request, received: Received) -> web.StreamResponse:
            self._answered += 1
            headers = form.headers(f"req_mock{self._answered:016d}")
            try:
                script = embeddings.script_of(received.body)
                await asyncio.sleep(script.headers_ms / 1000)
                if script.fault in UNANSWERED:
                    return break_off(request, received, script.fault)
                if script.status:
                    return _refuse(form, form.failure(script.status), headers, script.retry_after)
                ollamas = form is ollama
                body = embeddings.ollama(received.body, self._known) if ollamas else embeddings.openai(received.body)
            except ProviderError as problem:
                return _refuse(form, problem, headers)
            return web.Response(body=body, headers=headers | {"Content-Type": form.JSON_TYPE})

        return answer

    async def _list_models(self, request: web.Request, received: Received) -> web.StreamResponse:
        """OpenAI and Anthropic have the same path; only Anthropic's clients send a version."""
        if "anthropic-version" in request.headers:
            return _json(anthropic.models(("mock-claude", *self._models)))
        return _json(openai.models(("mock-gpt", *self._models)))

    async def _list_tags(self, request: web.Request, received: Received) -> web.StreamResponse:
        return _json(ollama.models(("mock-llama", *self._models)))

    async def _show_version(self, request: web.Request, received: Received) -> web.StreamResponse:
        return _json(orjson.dumps({"version": ollama.VERSION}))

    async def _refuse_path(self, request: web.Request, received: Received) -> web.StreamResponse:
        problem = ProviderError(f"Invalid URL ({request.method} {request.path})", status=404)
        return _refuse(openai, problem, {})

    async def _show_log(self, request: web.Request) -> web.StreamResponse:
        entries = [received.to_json() for received in self.received]
        return _json(orjson.dumps({"received": entries, "open_connections": self.open_connections}))

    async def _clear_log(self, request: web.Request) -> web.StreamResponse:
        """Forget the requests, and with them how often each script's fault has struck."""
        self._log.clear()
        self._struck.clear()
        return web.Response(status=204)


def _prepare(format_name: str, ask: Ask) -> Play:
    return prepare(FORMATS[format_name], ask)


def _refuse(
    form: Format, problem: ProviderError, headers: dict[str, str], retry_after: float | None = None
) -> web.StreamResponse:
    request_id = headers.get("x-request-id") or headers.get("request-id") or ""
    headers = headers | {"Content-Type": form.JSON_TYPE}
    if retry_after is not None:
        headers["Retry-After"] = f"{retry_after:g}"
    return web.Response(status=problem.status, headers=headers, body=form.error(problem, request_id))


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


async def serve(host: str, port: int, pace_ms: float, stop: asyncio.Event, ready: Callable[[str], None]) -> None:
    """Run a mock until `stop` is set; `ready` is told its base URL."""
    mock = Mock(pace_ms=pace_ms)
    ready(await mock.start(host, port))
    try:
        await stop.wait()
    finally:
        await mock.stop()
