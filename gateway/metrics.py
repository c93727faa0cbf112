"""Every metric of the gateway: its name with its unit, its labels, one sentence.

Text that a client chose is never a label: a model is named only when the operator or a provider named it.
"""

import time
from collections.abc import Iterable
from functools import cached_property

from gateway import labels
from gateway.breaker import STATES
from gateway.exchange import Exchange
from gateway.protocol.errors import UPSTREAM_ERROR_KINDS
from gateway.protocol.usage import Usage
from gateway.savings import Savings
from gateway.series import MAX_HISTOGRAMS, MAX_SERIES, OTHER, CounterSeries, HistogramSeries, Live
from gateway.vitals import Vitals

MAX_PROVIDERS = MAX_HISTOGRAMS  # that have series of their own; the rest is counted together
MAX_PAIRS = MAX_SERIES // len(labels.TOKEN_KINDS)  # of a model and a provider: as many as tokens have series for


class Metrics(Savings, Vitals):
    """The metrics of one process. Each instance has a registry of its own.

    `known_models` grows while the gateway runs: what is in it becomes a label, so only an operator's file or a
    provider's list may add to it.
    """

    def __init__(self, *, providers: Iterable[str] = ()) -> None:
        super().__init__()
        self.known_models: set[str] = set()
        self._providers = tuple(providers)
        self._bound: dict[tuple[str, str], _Bound] = {}  # by model and provider
        self._declare_traffic()
        self._declare_refusals()
        self._declare_providers()
        self._declare_clients()
        self._declare_failures()
        self._declare_usage()

    def _declare_traffic(self) -> None:
        self.requests = self._counter(
            "gateway_requests_total",
            "Requests by model, provider that was asked (or none), HTTP status that the client saw (0: it had left).",
            ("model", "provider", "status"),
        )
        self.request_duration_ms = self._histogram(
            "gateway_request_duration_ms",
            "Milliseconds from a request's arrival to the last byte of its answer, but of those that were remembered.",
            ("provider",),
            labels.DURATION_MS,
        )
        self.time_to_first_token_seconds = self._histogram(
            "gateway_time_to_first_token_seconds",
            "Seconds from a streamed request's arrival to the first text of the model.",
            ("provider",),
            labels.FIRST_TOKEN_SECONDS,
        )
        self.inter_token_seconds = self._histogram(
            "gateway_inter_token_seconds",
            "Seconds from one text of a provider's stream to the next, without those in which its client did not read.",
            ("provider",),
            labels.INTER_TOKEN_SECONDS,
        )
        self.overhead_seconds = self._histogram(
            "gateway_overhead_seconds",
            "Seconds of a request that were neither its provider's nor spent waiting for its body.",
            (),
            labels.OVERHEAD_SECONDS,
        ).labels()
        self.tokens = self._counter(
            "gateway_tokens_total",
            "Tokens; cached and cache_write are parts of prompt, reasoning is a part of completion.",
            ("model", "provider", "kind"),
        )
        self.streams_open = self._gauge("gateway_streams_open", "Streams that are open to clients now.").labels()
        for provider in self._providers:
            self._declare_times(provider)

    def _declare_times(self, provider: str) -> None:
        for histogram in (self.request_duration_ms, self.time_to_first_token_seconds, self.inter_token_seconds):
            histogram.labels(provider)

    def _declare_refusals(self) -> None:
        self.rate_limited = self._counter(
            "gateway_rate_limited_total",
            "Requests that a limit or a budget refused, by which it was.",
            ("reason",),
            labels.RATE_LIMITED_REASONS,
        )
        self.budget_cuts = self._counter(
            "gateway_budget_cuts_total", "Streams ended in the middle because no budget was left for them."
        ).labels()
        self.limiter_local = self._gauge(
            "gateway_limiter_local",
            "1 while limits are kept by this process alone, because Redis is gone.",
            together=max,
        ).labels()
        self.clock_skew_seconds = self._gauge(
            "gateway_clock_skew_seconds",
            "Seconds between this node's clock and Redis's when it was connected to; limits go by Redis's.",
            together=max,
        ).labels()
        self.auth_failures = self._counter(
            "gateway_auth_failures_total",
            "Requests without a valid key, by what was wrong.",
            ("reason",),
            labels.AUTH_FAILURE_REASONS,
        )

        self.key_lookups = self._counter(
            "gateway_key_lookups_total",
            "Keys whose row was read, because this process had not seen them or no longer trusted what it had seen.",
        ).labels()

    def _declare_providers(self) -> None:
        self.upstream_errors = self._counter(
            "gateway_upstream_errors_total",
            "Failed calls of a provider, by kind.",
            ("provider", "kind"),
            self._providers,
            UPSTREAM_ERROR_KINDS,
            cap=MAX_PROVIDERS * len(UPSTREAM_ERROR_KINDS),
        )
        self.retries = self._counter(
            "gateway_retries_total",
            "Requests sent to a provider once more, before anything of an answer had come, by what had gone wrong.",
            ("provider", "kind"),
            self._providers,
            labels.RETRIED_KINDS,
            cap=MAX_PROVIDERS * len(labels.RETRIED_KINDS),
        )
        self.fallbacks = self._counter(
            "gateway_fallbacks_total",
            "Requests that another provider than the first of their route was asked for, by who was asked.",
            ("provider",),
            self._providers,
            cap=MAX_PROVIDERS,
        )
        self.provider_in_flight = self._gauge(
            "gateway_provider_in_flight", "Requests that a provider is answering now.", ("provider",)
        )
        self.provider_state = self._gauge(
            "gateway_provider_state",
            "1 for what a provider is to this process: closed (asked), open (left alone because it failed), half_open"
            " (one request finds out), cooling (it asked that a model be left alone).",
            ("provider", "state"),
            together=max,
        )
        self.provider_in_flight.cap, self.provider_state.cap = MAX_PROVIDERS, MAX_PROVIDERS * len(STATES)

    def _declare_clients(self) -> None:
        self.client_aborts = self._counter(
            "gateway_client_aborts_total",
            "Clients that left: within their own request (body), before the first token (ttft), or after it (stream).",
            ("phase",),
            labels.CLIENT_ABORT_PHASES,
        )
        self.slow_clients = self._counter(
            "gateway_slow_clients_total",
            "Clients that were dropped because they took too long to send their headers or body, or did not read.",
            ("phase",),
            labels.SLOW_PHASES,
        )
        self.http_parse_errors = self._counter(
            "gateway_http_parse_errors_total", "What came in as a request and was none of HTTP's."
        ).labels()
        self.shed = self._counter(
            "gateway_shed_total",
            "Requests and connections turned away, and readers dropped, because memory or connections were short.",
            ("reason",),
            labels.SHED_REASONS,
        )

    def _declare_failures(self) -> None:
        self.internal_errors = self._counter(
            "gateway_internal_errors_total",
            "Bugs of the gateway's own: unexpected exceptions, each with a traceback in the log, by where they rose.",
            ("where",),
            labels.INTERNAL_ERRORS,
        )
        self.dependency_errors = self._counter(
            "gateway_dependency_errors_total",
            "Failed calls of a dependency of the gateway's own, by what was wrong.",
            ("dependency", "kind"),
        )
        for dependency, kinds in labels.DEPENDENCY_ERROR_KINDS.items():
            for kind in kinds:
                self.dependency_errors.labels(dependency, kind)
        self.fail_mode = self._counter(
            "gateway_fail_mode_total",
            "Decisions on limits and budgets without Redis: by this process's share, by letting all pass, or none.",
            ("what", "mode"),
            labels.FAILING,
            labels.FAIL_MODES,
        )

    def _declare_usage(self) -> None:
        self.usage_rows = self._counter(
            "gateway_usage_rows_total",
            "Usage rows by what became of them: written, or failed (refused by the database or damaged on disk).",
            ("result",),
            labels.USAGE_ROW_RESULTS,
        )
        self.usage_queue = self._gauge("gateway_usage_queue", "Usage rows not yet in the database.").labels()
        self.usage_lag_seconds = self._gauge(
            "gateway_usage_lag_seconds", "Age of the oldest usage row that is not in the database yet.", together=max
        ).labels()
        self.journal_bytes = self._gauge("gateway_journal_bytes", "Bytes of the usage journal on disk.").labels()
        self.journal_dropped = self._gauge(
            "gateway_journal_dropped_rows", "Usage rows lost since the start, because neither disk nor memory had room."
        ).labels()
        self.copy_behind = self._gauge(
            "gateway_usage_copy_behind", "Usage rows whose second copy is not up to date; 0 also where none is kept."
        ).labels()
        self.cost_micros = self._counter(
            "gateway_cost_micros_total",
            "Micro-dollars of exchanges whose price is known.",
            ("model", "provider"),
            cap=MAX_PAIRS,
        )
        self.unpriced = self._counter(
            "gateway_unpriced_total",
            "Exchanges with usage whose model has no known price.",
            ("provider",),
            self._providers,
            cap=MAX_PROVIDERS,
        )
        self.usage_sources = self._counter(
            "gateway_usage_source_total",
            "Exchanges with usage, by who counted: the provider, or the gateway because it did not say.",
            ("source",),
            labels.USAGE_SOURCES,
        )

    def add_providers(self, names: Iterable[str]) -> None:
        """Series for these are there from now on, at zero: an operator switched them on."""
        added = [name for name in names if name not in self._providers]
        self._providers += tuple(added)
        for provider in added:
            self._declare_times(provider)
            self.unpriced.labels(provider)
            self.fallbacks.labels(provider)
            for kind in UPSTREAM_ERROR_KINDS:
                self.upstream_errors.labels(provider, kind)
            for kind in labels.RETRIED_KINDS:
                self.retries.labels(provider, kind)

    # --- what is counted ------------------------------------------------------------------------------------------

    def model_label(self, name: str) -> str:
        return name if name in self.known_models else OTHER

    def tokens_live(self, model: str, provider: str) -> Live:
        """Where a stream is counted while it runs; tell `exchange_ended` how many tokens were."""
        return self._series_of(model, provider).live

    def exchange_ended(
        self, exchange: Exchange, usage: Usage | None = None, source: str = "", *, counted_live: int = 0
    ) -> None:
        """Count a finished exchange: request, times, tokens, and a client that left.

        `usage` and `source` are the meter's result, None when no provider was called. Upstream errors, refusals and
        failed keys are not in the record: who raises them counts them.
        """
        if exchange.source != "provider":
            self._count_remembered(exchange)
            return
        cached = exchange.headers.get("X-Gateway-Cache")
        if cached in ("miss", "bypass"):
            self.cache_requests.labels(cached).inc()
        provider = exchange.target.provider.name if exchange.target is not None else labels.NONE
        series = self._series_of(exchange.model, provider)
        series.request(exchange.status).inc()
        seconds = (exchange.ended or time.monotonic()) - exchange.started
        series.duration_ms.observe(seconds * 1000)
        if exchange.upstream_ms:
            waited = (exchange.upload_ms + exchange.upstream_ms) / 1000
            self.overhead_seconds.observe(max(0.0, seconds - waited))
        if exchange.first_byte and exchange.asked is not None and exchange.asked.stream:
            series.first_token_seconds.observe(exchange.first_byte - exchange.started)
        if exchange.outcome == "client_abort":
            self.client_aborts.labels("stream" if exchange.first_byte else "ttft").inc()
        elif exchange.outcome == "budget_exhausted":
            self.budget_cuts.inc()
        if usage is not None:
            self._count_usage(series, exchange, usage, source, counted_live)

    def _count_remembered(self, exchange: Exchange) -> None:
        """No provider was asked: it is in none's figures, so that many good ones do not hide what fails, nor how
        long it takes."""
        self._series_of(exchange.model, labels.NONE).request(exchange.status).inc()
        self.cache_requests.labels(labels.CACHE_HITS[exchange.source]).inc()
        if exchange.outcome == "client_abort":
            self.client_aborts.labels("stream" if exchange.first_byte else "ttft").inc()
        if exchange.saved is not None and exchange.target is not None:
            model, provider = self.model_label(exchange.model), exchange.target.provider.name
            self.saved_tokens.labels(model, provider).inc(exchange.saved.total_tokens)
            self.saved_cost_micros.labels(model, provider).inc(exchange.saved_micros or 0)

    def _count_usage(self, series: "_Bound", exchange: Exchange, usage: Usage, source: str, counted_live: int) -> None:
        self.usage_sources.labels(source).inc()
        if exchange.cost_micros is None:
            self.unpriced.labels(series.provider).inc()
        else:
            series.cost_micros.inc(exchange.cost_micros)
        prompt, completion, cached, cache_write, reasoning = series.tokens
        prompt.inc(usage.prompt_tokens or 0)
        # A live count above the provider's stays: a counter never goes down.
        completion.inc((usage.completion_tokens or 0) - counted_live)
        if usage.cached_tokens or usage.cache_write_tokens or usage.reasoning_tokens:
            cached.inc(usage.cached_tokens)
            cache_write.inc(usage.cache_write_tokens)
            reasoning.inc(usage.reasoning_tokens)

    def _series_of(self, model: str, provider: str) -> "_Bound":
        if model not in self.known_models:
            model = OTHER
        series = self._bound.get((model, provider))
        if series is None:
            series = self._bound[model, provider] = _Bound(self, model, provider)
        return series

    def _like_it(self) -> "Metrics":
        return Metrics(providers=self._providers)


class _Bound:
    """The series that count the exchanges of one model of one provider: each is there from its first use on."""

    def __init__(self, metrics: Metrics, model: str, provider: str) -> None:
        self._metrics = metrics
        self._model = model
        self._requests: dict[int, CounterSeries] = {}  # by status
        self.provider = provider
        self.duration_ms = metrics.request_duration_ms.labels(provider)
        for status in labels.UNAVAILABLE:  # the first failure would make its series, and `rate()` not see it
            self.request(status)

    def request(self, status: int) -> CounterSeries:
        series = self._requests.get(status)
        if series is None:
            label = _status_label(status)
            series = self._requests[status] = self._metrics.requests.labels(self._model, self.provider, label)
        return series

    @cached_property
    def live(self) -> Live:
        _, completion, *_ = self.tokens
        return Live(completion, self._metrics.inter_token_seconds.labels(self.provider))

    @cached_property
    def first_token_seconds(self) -> HistogramSeries:
        return self._metrics.time_to_first_token_seconds.labels(self.provider)

    @cached_property
    def cost_micros(self) -> CounterSeries:
        return self._metrics.cost_micros.labels(self._model, self.provider)

    @cached_property
    def tokens(self) -> tuple[CounterSeries, ...]:
        """In the order of labels.TOKEN_KINDS."""
        return tuple(self._metrics.tokens.labels(self._model, self.provider, kind) for kind in labels.TOKEN_KINDS)


def _status_label(status: int) -> str:
    return str(status) if status == 0 or 100 <= status <= 599 else OTHER
