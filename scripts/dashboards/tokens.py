"""Tokens: how fast models answer now, how long people wait for it, and what it costs."""

from scripts.dashboards.panels import (
    Json,
    dashboard,
    graph,
    instant,
    label_variable,
    query,
    stacked,
    stat,
    table,
    wide,
    worse_above,
)

CHOSEN = 'model=~"$model",provider=~"$provider"'
TOKENS = "suffix: tok/s"


def tokens() -> Json:
    return dashboard(
        "aig-tokens",
        "AI Gateway: tokens",
        "How fast models answer, how long people wait for them, and what it costs: live, while streams run.",
        [
            ("How much is being generated right now?", _now()),
            ("Which models generate it?", _models()),
            ("How long do people wait?", _waits()),
            ("What does it cost?", _costs()),
            ("What do remembered answers save?", _savings()),
        ],
        [
            label_variable("provider", "Provider", "gateway_requests_total"),
            label_variable("model", "Model", "gateway_requests_total"),
        ],
        ("30m", "5s"),
    )


def rate(metric: str, *, by: str = "", where: str = CHOSEN) -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{where}}}[$__rate_interval]))"


def quantile(q: float, metric: str, *, by: str = "", where: str = 'provider=~"$provider"') -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{{{where}}}[$__rate_interval])))"


def percentiles(metric: str, *, where: str = 'provider=~"$provider"') -> list[Json]:
    return [query(quantile(q, metric, where=where), f"p{q * 100:.0f}") for q in (0.5, 0.95, 0.99)]


def of_kind(kind: str) -> str:
    return f'kind="{kind}",{CHOSEN}'


def _now() -> list[Json]:
    return [
        stat(
            "Completion tokens",
            TOKENS,
            query(rate("gateway_tokens_total", where=of_kind("completion"))),
            "Tokens a second that models write. They are counted while a stream runs, not at its end.",
        ),
        stat(
            "Prompt tokens",
            TOKENS,
            query(rate("gateway_tokens_total", where=of_kind("prompt"))),
            "Tokens a second that models read, cached ones included. Counted when an answer ends.",
        ),
        stat("Streams open", "short", query("sum(gateway_streams_open)"), "Streams that clients are reading now."),
        stat(
            "First token, p95",
            "s",
            query(quantile(0.95, "gateway_time_to_first_token_seconds")),
            "Of twenty people who ask for a stream, nineteen see its first text sooner.",
            worse_above(2, 5),
        ),
        stat(
            "Between tokens, p95",
            "s",
            query(quantile(0.95, "gateway_inter_token_seconds")),
            "Of twenty gaps within streams, nineteen are shorter. A fast reader takes in a token in 0.1 s.",
            worse_above(0.1, 0.5),
        ),
        stat(
            "Cost per hour",
            "currencyUSD",
            query(f"{rate('gateway_cost_micros_total')} * 3600 / 1e6"),
            "US dollars that an hour of this costs. Models without a price add nothing.",
        ),
    ]


def _models() -> list[Json]:
    completion = of_kind("completion")
    ranged = f'(increase(gateway_tokens_total{{{{kind="{{}}",{CHOSEN}}}}}[$__range]))'
    by_model = "sum by (model, provider) "
    return [
        stacked(
            "Completion tokens by model",
            TOKENS,
            [query(rate("gateway_tokens_total", by="model", where=completion), "{{model}}")],
            "Models that no provider lists and no operator named are together in `other`.",
        ),
        stacked(
            "Completion tokens by provider",
            TOKENS,
            [query(rate("gateway_tokens_total", by="provider", where=completion), "{{provider}}")],
            "Who wrote them.",
        ),
        graph(
            "Tokens by kind",
            TOKENS,
            [query(rate("gateway_tokens_total", by="kind"), "{{kind}}")],
            "`cached` and `cache_write` are parts of `prompt`, `reasoning` is a part of `completion`.",
        ),
        table(
            "Models, over the time shown",
            [
                instant(f"{by_model}(increase(gateway_requests_total{{{CHOSEN}}}[$__range]))"),
                instant(f"{by_model}{ranged.format('prompt')}"),
                instant(f"{by_model}{ranged.format('completion')}"),
                instant(f"{by_model}(increase(gateway_cost_micros_total{{{CHOSEN}}}[$__range])) / 1e6"),
            ],
            {
                "Model": "",
                "Provider": "",
                "Requests": "short",
                "Prompt": "short",
                "Completion": "short",
                "Cost": "currencyUSD",
            },
            "Requests, tokens and US dollars, busiest first. Estimated from samples; the spend dashboard is exact.",
            width=24,
        ),
    ]


def _waits() -> list[Json]:
    return [
        graph(
            "Time to first token",
            "s",
            percentiles("gateway_time_to_first_token_seconds"),
            "From a streamed request's arrival to the first text of the model.",
            worse_above(2, 5),
        ),
        graph(
            "Between tokens",
            "s",
            percentiles("gateway_inter_token_seconds"),
            "Gaps between two pieces of text of one stream.",
            worse_above(0.1, 0.5),
        ),
        graph(
            "Whole answer",
            "ms",
            percentiles("gateway_request_duration_ms"),
            "From a request's arrival to the last byte of its answer, streamed or not.",
        ),
        wide(
            graph(
                "Time to first token by provider, p95",
                "s",
                [query(quantile(0.95, "gateway_time_to_first_token_seconds", by="provider"), "{{provider}}")],
                "Who keeps people waiting.",
                worse_above(2, 5),
            ),
            12,
        ),
        wide(
            graph(
                "Between tokens by provider, p95",
                "s",
                [query(quantile(0.95, "gateway_inter_token_seconds", by="provider"), "{{provider}}")],
                "Who stutters.",
                worse_above(0.1, 0.5),
            ),
            12,
        ),
    ]


def _costs() -> list[Json]:
    cached, prompt = (rate("gateway_tokens_total", by="provider", where=of_kind(k)) for k in ("cached", "prompt"))
    return [
        stacked(
            "Cost per hour by model",
            "currencyUSD",
            [query(f"{rate('gateway_cost_micros_total', by='model')} * 3600 / 1e6", "{{model}}")],
            "US dollars an hour. A stream is priced when it ends.",
        ),
        graph(
            "Prompt tokens that came from the cache",
            "percentunit",
            [query(f"{cached} / ({prompt} > 0)", "{{provider}}")],
            "Share of the prompt that the provider's prompt cache had. The spend dashboard says what that saved.",
        ),
        graph(
            "Who counted the tokens",
            "reqps",
            [query(rate("gateway_usage_source_total", by="source", where=""), "{{source}}")],
            "`provider` is exact. `counted` and `estimated`: the provider did not say, mostly because the client left.",
        ),
    ]


def _savings() -> list[Json]:
    return [
        stacked(
            "Requests that may be remembered",
            "reqps",
            [query(rate("gateway_cache_requests_total", by="result", where=""), "{{result}}")],
            "`hit`, `shared` and `replay` were answered without a provider; it was asked for a `miss` and a `bypass`.",
        ),
        stacked(
            "Tokens saved by model",
            TOKENS,
            [query(rate("gateway_saved_tokens_total", by="model"), "{{model}}")],
            "Of prompts and completions, which those answers would have used.",
        ),
        stacked(
            "Saved per hour by model",
            "currencyUSD",
            [query(f"{rate('gateway_saved_cost_micros_total', by='model')} * 3600 / 1e6", "{{model}}")],
            "US dollars that an hour of them would have cost. Models without a price add nothing.",
        ),
    ]
