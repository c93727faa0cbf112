"""The label values that are closed sets, and the bounds of the histograms' buckets."""

NONE = "none"  # the provider of a request that had none: it was refused before, or its answer was there already

UNAVAILABLE = (502, 503, 504)  # the status of what failed through no fault of the client's
TOKEN_KINDS = ("prompt", "completion", "cached", "cache_write", "reasoning")
USAGE_SOURCES = ("provider", "counted", "estimated")
# By who made the answer (exchange.Source); what a provider made is told by its X-Gateway-Cache.
CACHE_HITS = {"cache": "hit", "shared": "shared", "replay": "replay"}
KEPT_RESULTS = ("kept", "unfit", "too_large", "full", "failed")
CACHE_RESULTS = ("hit", "miss", "bypass", "shared", "replay")
RATE_LIMITED_REASONS = (
    "requests_per_minute",
    "requests_per_second",
    "concurrent_requests",
    "global_requests_per_minute",
    "route_requests_per_second",
    "tokens_per_minute",
    "insufficient_quota",
    "price_unknown",
    "unavailable",
)
AUTH_FAILURE_REASONS = ("missing", "invalid", "throttled", "unavailable")
RETRIED_KINDS = ("connect", "dns", "timeout_connect", "reset", "protocol", "http_429", "http_5xx", "error_event")
CLIENT_ABORT_PHASES = ("body", "ttft", "stream")
SLOW_PHASES = ("headers", "body", "read")
SHED_REASONS = ("memory", "connections")
USAGE_ROW_RESULTS = ("written", "failed")
RESUMABLE_RESULTS = ("held", "refused", "failed", "lost")  # as stores/streams.py says them
RESUMED_RESULTS = ("joined", "followed", "unknown", "refused", "failed", "broken")
CONFIG_RELOADS = ("ok", "failed")
INTERNAL_ERRORS = ("request", "stream", "task")
# As stores/postgres.py and stores/script_connection.py say them; `unavailable`: a look-up of a key had no answer.
DEPENDENCY_ERROR_KINDS = {
    "postgres": ("timeout", "connection", "shutdown", "readonly", "resources", "conflict", "unavailable", "error"),
    "redis": ("timeout", "connection", "loading", "readonly", "oom", "misconf", "moved", "error"),
}
FAIL_MODES = ("local", "open", "closed")
FAILING = ("limits", "budget")
POOL_STATES = ("idle", "used")

# OpenTelemetry's buckets for gen_ai.client.operation.duration, in milliseconds, and two more for answers of minutes;
# for gen_ai.server.time_to_first_token; and for gen_ai.server.time_per_output_token, with finer ones for a model beside
# us and coarser ones for a stream that has stalled (https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/).
DURATION_MS = tuple(10.0 * 2**power for power in range(16))
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0,
)  # fmt: skip
INTER_TOKEN_SECONDS = (
    0.001, 0.0025, 0.005,
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0, 30.0,
)  # fmt: skip
OVERHEAD_SECONDS = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0,
)  # fmt: skip
