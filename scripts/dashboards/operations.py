"""Operations: whether the gateway keeps its promises, and if it does not, where to look."""

from scripts.dashboards.panels import (
    Json,
    dashboard,
    graph,
    label_variable,
    query,
    stacked,
    stat,
    states,
    wide,
    worse_above,
    worse_below,
)
from scripts.dashboards.tokens import percentiles, quantile, rate

PROVIDER = 'provider=~"$provider"'
STATES = {0: ("closed", "green"), 1: ("cooling", "yellow"), 2: ("half open", "orange"), 3: ("open", "red")}


def operations() -> Json:
    return dashboard(
        "aig-operations",
        "AI Gateway: operations",
        "Whether the gateway keeps its promises, and if not, where to look. What to do: grafana/runbooks.md.",
        [
            ("Does it keep its promises?", _promises()),
            ("What fails, and whose fault is it?", _failures()),
            ("Who is turned away?", _refusals()),
            ("How are the providers?", _providers()),
            ("How much does the gateway itself take?", _gateway()),
            ("Is every request in the books?", _books()),
            ("Do Postgres and Redis answer?", _dependencies()),
        ],
        [
            label_variable("provider", "Provider", "gateway_requests_total"),
            label_variable("model", "Model", "gateway_requests_total"),
        ],
        ("1h", "10s"),
    )


def _promises() -> list[Json]:
    failed, all_ = (f"sum(increase(gateway_requests_total{{{where}}}[$__range]))" for where in ('status=~"5.."', ""))
    return [
        stat(
            "Availability",
            "percentunit",
            query(f"1 - ({failed} or vector(0)) / ({all_} > 0)"),
            "Requests of the time shown that were not answered by a 5xx. The objective is 99.9 %.",
            worse_below(0.999, 0.99),
        ),
        stat(
            "Error budget burned, last hour",
            "suffix: x",
            query("gateway:requests_failed:ratio_rate1h / 0.001"),
            "1: at this pace the 0.1 % of a month is used up in a month. From 14.4 on somebody is woken.",
            worse_above(1, 14.4),
        ),
        stat(
            "Overhead, p99",
            "s",
            query(quantile(0.99, "gateway_overhead_seconds", where="")),
            "What the gateway adds to what the provider takes. The objective is 5 ms.",
            worse_above(0.003, 0.005),
        ),
        stat(
            "Requests",
            "reqps",
            query(rate("gateway_requests_total")),
            "Requests a second that were answered, also with an error.",
        ),
        stat(
            "Gateways that are scraped",
            "short",
            query('sum(up{job="gateway"})'),
            "Addresses that answer Prometheus. All workers of one are one.",
            worse_below(1),
        ),
        stat(
            "Alerts",
            "short",
            query('count(ALERTS{alertstate="firing"}) or vector(0)'),
            "Alerts that are firing. grafana/runbooks.md has a paragraph for each.",
            worse_above(1, 2),
        ),
    ]


def _failures() -> list[Json]:
    return [
        stacked(
            "Requests by status",
            "reqps",
            [query(rate("gateway_requests_total", by="status"), "{{status}}")],
            "As the client saw it; 0: it had left before there was one.",
        ),
        graph(
            "Failed calls of providers by cause",
            "reqps",
            [
                query(rate("gateway_upstream_errors_total", where=PROVIDER), "all"),
                query(
                    rate("gateway_upstream_errors_total", by="provider, kind", where=PROVIDER) + " > 0",
                    "{{provider}}: {{kind}}",
                ),
            ],
            "A failed call is not a failed request when another one answers.",
        ),
        graph(
            "Share of calls that failed, by provider",
            "percentunit",
            [query(f"provider:gateway_upstream_errors:ratio_rate5m{{{PROVIDER}}}", "{{provider}}")],
            "Over five minutes. From 5 % on there is an alert.",
            worse_above(0.05, 0.25),
        ),
        graph(
            "Retries and fallbacks",
            "reqps",
            [
                query(rate("gateway_retries_total", by="provider", where=PROVIDER), "{{provider}}, once more"),
                query(rate("gateway_fallbacks_total", by="provider", where=PROVIDER), "to {{provider}}"),
            ],
            "What clients did not notice: requests sent again, and requests that another provider was asked.",
        ),
        graph(
            "Clients that left",
            "reqps",
            [query(rate("gateway_client_aborts_total", by="phase", where=""), "{{phase}}")],
            "Within their own request (body), before the first token (ttft), or after it (stream).",
        ),
        graph(
            "The gateway's own faults",
            "reqps",
            [
                query(rate("gateway_internal_errors_total", by="where", where=""), "bug in a {{where}}"),
                query(rate("gateway_http_parse_errors_total", where=""), "not HTTP"),
            ],
            "Each bug has a traceback in the log. What is not HTTP came from outside.",
            worse_above(0.001),
        ),
    ]


def _refusals() -> list[Json]:
    return [
        stacked(
            "Refused by a limit or a budget",
            "reqps",
            [query(rate("gateway_rate_limited_total", by="reason", where=""), "{{reason}}")],
            "429s by the limit that it was. `insufficient_quota` is a budget.",
        ),
        graph(
            "Refused without a valid key",
            "reqps",
            [query(rate("gateway_auth_failures_total", by="reason", where=""), "{{reason}}")],
            "`throttled`: an address that failed too often. `unavailable`: the database could not say.",
        ),
        graph(
            "Dropped, cut or shed",
            "reqps",
            [
                query(rate("gateway_shed_total", by="reason", where=""), "no {{reason}} left"),
                query(rate("gateway_slow_clients_total", by="phase", where=""), "slow {{phase}}"),
                query(rate("gateway_budget_cuts_total", where=""), "budget used up"),
            ],
            "Turned away for want of memory or connections, clients that were too slow, streams cut by a budget.",
        ),
    ]


def _providers() -> list[Json]:
    state = 'gateway_provider_state{{state="{}",' + PROVIDER + "}}"
    encoded = " or ".join(
        f"{value} * {state.format(name.replace(' ', '_'))}" for value, (name, _) in reversed(STATES.items())
    )
    return [
        states(
            "State of each provider",
            query(f"max by (provider) ({encoded})", "{{provider}}"),
            STATES,
            "closed: asked as usual. cooling: it asked that a model be left alone. open: left alone because it failed."
            " half open: one request finds out. The worst of all processes.",
        ),
        wide(
            graph(
                "Requests in flight by provider",
                "short",
                [query(f"sum by (provider) (gateway_provider_in_flight{{{PROVIDER}}})", "{{provider}}")],
                "Requests that each is answering now.",
            ),
            12,
        ),
        wide(
            graph(
                "Whole answer by provider, p95",
                "ms",
                [query(quantile(0.95, "gateway_request_duration_ms", by="provider"), "{{provider}}")],
                "From a request's arrival to the last byte of its answer.",
            ),
            12,
        ),
        wide(
            stacked(
                "Requests by provider",
                "reqps",
                [query(rate("gateway_requests_total", by="provider"), "{{provider}}")],
                "`none`: refused before there was one.",
            ),
            12,
        ),
    ]


def _gateway() -> list[Json]:
    return [
        graph(
            "Overhead",
            "s",
            percentiles("gateway_overhead_seconds", where=""),
            "Seconds of a request that were not spent on its provider: ours, and the waits for Redis and the disk.",
            worse_above(0.005),
        ),
        graph(
            "Event-loop lag",
            "s",
            [query("max by (instance) (gateway_event_loop_lag_seconds)", "{{instance}}")],
            "The longest that nothing moved, within the last 15 to 30 seconds.",
            worse_above(0.1, 0.25),
        ),
        graph(
            "Memory",
            "bytes",
            [query('process_resident_memory_bytes{job="gateway"}', "{{instance}}")],
            "Of all workers of an address together.",
        ),
        graph(
            "Connections and streams",
            "short",
            [
                query("sum(gateway_connections_open)", "connections"),
                query("sum(gateway_streams_open)", "streams"),
            ],
            "Connections of clients, idle ones too, and the streams on them.",
        ),
        graph(
            "Uptime",
            "s",
            [query("gateway_uptime_seconds", "{{instance}}")],
            "Since the oldest worker started. A fall to zero is a restart.",
        ),
        graph(
            "Configuration",
            "short",
            [
                query("min(gateway_config_ok)", "the file is in use"),
                query("sum by (result) (increase(gateway_config_reloads_total[$__rate_interval]))", "read: {{result}}"),
            ],
            "1 while the configuration on disk is the one in use; 0: it is wrong, and an older one is used.",
        ),
    ]


def _books() -> list[Json]:
    return [
        graph(
            "Usage rows not in Postgres yet",
            "short",
            [
                query("sum(gateway_usage_queue)", "rows"),
                query("sum(gateway_usage_copy_behind)", "without their second copy"),
            ],
            "They are in the journal on disk, and are shipped when Postgres answers.",
        ),
        graph(
            "Age of the oldest of them",
            "s",
            [query("max(gateway_usage_lag_seconds)", "lag")],
            "How far the figures of the page and of the spend dashboard are behind.",
            worse_above(60, 300),
        ),
        graph(
            "Journal on disk",
            "bytes",
            [query("sum(gateway_journal_bytes)", "bytes")],
            "It grows while Postgres is gone.",
            worse_above(256 * 2**20, 2**30),
        ),
        wide(
            graph(
                "Usage rows written",
                "suffix: rows/s",
                [query(rate("gateway_usage_rows_total", by="result", where=""), "{{result}}")],
                "`failed`: refused by the database or damaged on disk, and kept as dead letters.",
            ),
            12,
        ),
        wide(
            graph(
                "Usage rows lost",
                "short",
                [query("sum(gateway_journal_dropped_rows)", "lost")],
                "Since the start, because neither disk nor memory had room. It is always zero, or somebody is woken.",
                worse_above(1),
            ),
            12,
        ),
    ]


def _dependencies() -> list[Json]:
    return [
        graph(
            "Postgres connections",
            "short",
            [
                query("sum by (state) (gateway_pg_pool_connections)", "{{state}}"),
                query("sum(gateway_pg_pool_size_max)", "at most"),
            ],
            "Of all pools. `used` that stays at the most: look-ups of keys and figures wait.",
        ),
        graph(
            "Failed calls of Postgres and Redis",
            "reqps",
            [
                query(
                    rate("gateway_dependency_errors_total", by="dependency, kind", where=""), "{{dependency}}: {{kind}}"
                )
            ],
            "By what was wrong.",
            worse_above(0.1),
        ),
        graph(
            "Decisions without Redis",
            "reqps",
            [query(rate("gateway_fail_mode_total", by="what, mode", where=""), "{{what}}: {{mode}}")],
            "Limits and budgets by this process's share (local), by letting all pass (open) or none (closed).",
        ),
        graph(
            "Limits without Redis",
            "short",
            [query("max by (instance) (gateway_limiter_local)", "{{instance}}")],
            "1 while each process keeps limits by itself, because Redis is gone.",
            worse_above(1),
        ),
        graph(
            "Streams that can be resumed",
            "reqps",
            [
                query(rate("gateway_resumable_streams_total", by="result", where=""), "begun: {{result}}"),
                query(rate("gateway_resumed_streams_total", by="result", where=""), "continued: {{result}}"),
            ],
            "Begun: `held` by Redis; `failed` and `lost` when it was gone, `refused` to a key that has too many."
            " Continued: `joined` where it runs, `followed` from Redis; what else there is was refused or cut.",
        ),
        graph(
            "Clock skew",
            "s",
            [query("max by (instance) (gateway_clock_skew_seconds)", "{{instance}}")],
            "Between this machine's clock and Redis's. Limits go by Redis's, expiry of keys by this one.",
            worse_above(1, 5),
        ),
    ]
