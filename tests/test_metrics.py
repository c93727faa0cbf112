import asyncio
import random
import re
import timeit
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from gateway import labels
from gateway.breaker import STATES
from gateway.exchange import Exchange, Source
from gateway.labels import INTER_TOKEN_SECONDS
from gateway.metrics import Metrics
from gateway.protocol.errors import UPSTREAM_ERROR_KINDS
from gateway.protocol.request import ModelRequest
from gateway.protocol.routing import Provider, Target
from gateway.protocol.usage import Usage
from gateway.series import MAX_HISTOGRAMS, MAX_SERIES, OTHER, HistogramSeries, escape
from gateway.tally import Tally
from scripts import make_metrics_table

pytestmark = pytest.mark.unit

HOSTILE_NAMES = [
    'x"} 1\nforged_total{a="b',
    'quote " inside',
    "back\\slash",
    "ends in a backslash\\",
    '\\"',
    "line\nfeed",
    "# TYPE forged_total counter",
    "{}=,",
    "Ünïcodé 模型 🦙",
    "",
]


def metrics_that_know(models: Iterable[str], providers: Iterable[str] = ()) -> Metrics:
    metrics = Metrics(providers=providers)
    metrics.known_models.update(models)
    return metrics


def samples(metrics: Metrics) -> Iterator[Sample]:
    for family in text_string_to_metric_families(metrics.render().decode()):
        yield from family.samples


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = [s.value for s in samples(metrics) if s.name == name and s.labels == labels]
    assert len(found) == 1, f"{name}{labels} is on the page {len(found)} times"
    return found[0]


def exchange(*, stream: bool = True, model: str = "gpt-4o", status: int = 200) -> Exchange:
    """One that arrived ten seconds ago: 2 s to the first text, 3 s at the provider, 3.5 s in all."""
    provider = Provider(name="openai", dialect="openai", base_url="http://localhost/v1")
    started = monotonic() - 10
    return Exchange(
        started=started,
        ended=started + 3.5,
        first_byte=started + 2,
        upstream_ms=3000,
        asked=ModelRequest(body=b"{}", fields={}, model=model, stream=stream, wants_usage=False),
        target=Target(provider, model),
        model=model,
        outcome="ok",
        status=status,
    )


# --- the page -----------------------------------------------------------------------------------------------------


def test_every_metric_is_in_the_table_that_operators_read() -> None:
    """`python -m scripts.make_metrics_table` writes it anew."""
    assert make_metrics_table.FILE.read_text() == make_metrics_table.table()


def test_every_metric_of_the_table_is_on_the_page_with_its_type_and_a_sentence() -> None:
    families = {f.name: f for f in text_string_to_metric_families(Metrics().render().decode())}
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", make_metrics_table.FILE.read_text(), re.MULTILINE)
    assert {name.removesuffix("_total"): kind for name, kind in rows} == {n: f.type for n, f in families.items()}
    assert all(family.documentation.endswith(".") for family in families.values())


def test_two_instances_share_nothing() -> None:
    one, two = Metrics(), Metrics()
    one.streams_open.inc()
    assert [value(m, "gateway_streams_open") for m in (one, two)] == [1, 0]


def test_the_page_says_how_long_and_how_large_the_process_is() -> None:
    metrics = Metrics()
    by_name = {s.name: s.value for s in samples(metrics)}
    assert 0 <= by_name["gateway_uptime_seconds"] < 60
    assert by_name.get("process_resident_memory_bytes", 1 << 22) > 1 << 20
    assert by_name["gateway_build_info"] == 1


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_label_value_comes_back_as_it_was_and_plants_nothing(name: str) -> None:
    quiet = {s.name for s in samples(Metrics())}
    metrics = metrics_that_know([name])
    metrics.requests.labels(metrics.model_label(name), "openai", "200").inc(7)
    assert value(metrics, "gateway_requests_total", model=name, provider="openai", status="200") == 7
    assert {s.name for s in samples(metrics)} - quiet == {"gateway_requests_total"}


@pytest.mark.parametrize("char", ["\0", "\r", "\ud800", "\x1b", "\u2028"])
def test_what_has_no_place_in_a_label_becomes_a_replacement_character(char: str) -> None:
    metrics = metrics_that_know([f"a{char}b"])
    metrics.requests.labels(f"a{char}b", "openai", "200").inc()
    assert value(metrics, "gateway_requests_total", model="a\ufffdb", provider="openai", status="200") == 1


def test_a_model_that_a_client_made_up_is_counted_as_other() -> None:
    metrics = metrics_that_know(["gpt-4o"])
    metrics.exchange_ended(exchange(model="canary-model"), Usage(5, 6), "provider")
    metrics.tokens_live("canary-model", "openai").tokens.inc(3)
    assert b"canary" not in metrics.render()
    assert value(metrics, "gateway_requests_total", model=OTHER, provider="openai", status="200") == 1
    assert value(metrics, "gateway_tokens_total", model=OTHER, provider="openai", kind="completion") == 9


def test_a_model_that_becomes_known_while_we_run_gets_its_own_label() -> None:
    metrics = Metrics()
    assert metrics.model_label("llama3") == OTHER
    metrics.known_models.add("llama3")
    assert metrics.model_label("llama3") == "llama3"


def test_series_beyond_the_cap_are_counted_together_as_other() -> None:
    metrics = Metrics()
    for number in range(MAX_SERIES + 500):
        metrics.requests.labels(f"model-{number}", "openai", "200").inc()
    of_requests = [s for s in samples(metrics) if s.name == "gateway_requests_total"]
    assert len(of_requests) == MAX_SERIES + 1
    assert sum(s.value for s in of_requests) == MAX_SERIES + 500
    assert value(metrics, "gateway_requests_total", model=OTHER, provider=OTHER, status=OTHER) == 500


def fullest_page() -> Metrics:
    """As many models and providers as there can be, and more, in every metric that names them."""
    names = [f"model-{number}" for number in range(2000)]
    metrics = metrics_that_know(names, providers=names)
    for metric in make_metrics_table.declared(metrics):
        if {"model", "provider"} & {*metric.label_names}:
            for name in names:
                for state in STATES if "state" in metric.label_names else ("any",):
                    metric.labels(*(state if label == "state" else name for label in metric.label_names))
    return metrics


def test_the_page_stays_under_five_thousand_lines_whatever_is_asked(figure: Callable[[str], None]) -> None:
    metrics = fullest_page()
    seconds = min(timeit.repeat(metrics.render, number=1, repeat=5))
    page = metrics.render()
    lines = page.count(b"\n")
    figure(f"metrics: the largest page has {lines} lines, {len(page) / 1000:.0f} KB, {seconds * 1000:.1f} ms")
    assert lines <= 5000


@pytest.mark.parametrize("workers", [1, 4])
def test_streams_go_on_while_a_page_is_made(workers: int, tmp_path: Path, figure: Callable[[str], None]) -> None:
    """It is made in a thread. A loop that has something to do each millisecond is late by less than a page takes."""
    pages = [fullest_page() for _ in range(workers)]
    if workers > 1:
        for number, page in enumerate(pages, 1):
            page.tally = Tally(tmp_path, number)
            page.publish()

    async def pause() -> tuple[float, float]:
        """The longest that the loop was held up while a page was made, and how long that took, in seconds."""
        rendering, longest = asyncio.create_task(asyncio.to_thread(pages[0].render)), 0.0
        began = before = monotonic()
        while not rendering.done():
            await asyncio.sleep(0.001)
            now = monotonic()
            longest, before = max(longest, now - before - 0.001), now
        return longest, before - began

    async def pauses() -> list[tuple[float, float]]:
        return [await pause() for _ in range(10)]

    found = asyncio.run(pauses())
    figure(
        f"metrics: 5,000 series of {workers} worker(s) are made in {median(whole for _, whole in found) * 1e3:.0f} ms"
        f" beside the event loop, and hold it up for {median(longest for longest, _ in found) * 1e3:.1f} ms at a time"
    )
    assert median(longest / whole for longest, whole in found) < 0.6


# --- series -------------------------------------------------------------------------------------------------------


def test_every_closed_set_is_on_the_page_before_anything_happened() -> None:
    metrics = Metrics(providers=["openai", "ollama"])
    for provider in ("openai", "ollama"):
        for kind in UPSTREAM_ERROR_KINDS:
            assert value(metrics, "gateway_upstream_errors_total", provider=provider, kind=kind) == 0
        assert value(metrics, "gateway_request_duration_ms_count", provider=provider) == 0
    assert value(metrics, "gateway_journal_dropped_rows") == 0
    for result in ("written", "failed"):
        assert value(metrics, "gateway_usage_rows_total", result=result) == 0
    for phase in ("ttft", "stream"):
        assert value(metrics, "gateway_client_aborts_total", phase=phase) == 0


def test_a_bound_series_is_the_same_object_every_time() -> None:
    metrics = Metrics()
    series = metrics.tokens.labels("gpt-4o", "openai", "prompt")
    assert metrics.tokens.labels("gpt-4o", "openai", "prompt") is series


def test_a_label_too_few_is_a_mistake_that_is_told() -> None:
    with pytest.raises(ValueError, match="gateway_tokens_total has 3 labels, 2 were given"):
        Metrics().tokens.labels("gpt-4o", "openai")


def test_a_counter_never_goes_down() -> None:
    metrics = Metrics()
    series = metrics.rate_limited.labels("unavailable")
    series.inc(2)
    series.inc(-1)
    assert value(metrics, "gateway_rate_limited_total", reason="unavailable") == 2


def test_a_gauge_goes_both_ways_or_follows_what_it_is_told_to() -> None:
    metrics = Metrics()
    metrics.streams_open.inc(3)
    metrics.streams_open.dec()
    queue = [1, 2]
    metrics.usage_queue.follow(lambda: len(queue))
    queue.append(3)
    assert value(metrics, "gateway_streams_open") == 2
    assert value(metrics, "gateway_usage_queue") == 3


def test_histogram_buckets_add_up_and_include_their_bound() -> None:
    metrics = Metrics(providers=["openai"])
    series = metrics.request_duration_ms.labels("openai")
    for milliseconds in (0, 10, 10.5, 20, 10**9):
        series.observe(milliseconds)
    buckets = {s.labels["le"]: s.value for s in samples(metrics) if s.name == "gateway_request_duration_ms_bucket"}
    assert (buckets["10.0"], buckets["20.0"], buckets["327680.0"], buckets["+Inf"]) == (2, 4, 4, 5)
    assert list(buckets.values()) == sorted(buckets.values())
    assert value(metrics, "gateway_request_duration_ms_count", provider="openai") == series.count == 5
    assert value(metrics, "gateway_request_duration_ms_sum", provider="openai") == 10**9 + 40.5


@pytest.mark.parametrize("like_the_one_before", [0.0, 0.5, 0.95])
def test_gaps_are_counted_as_one_by_one(like_the_one_before: float) -> None:
    seeded = random.Random(like_the_one_before)  # whoever sees it fail sees it again
    gap, times = 0.02, [100.0]
    for _ in range(1000):
        if seeded.random() >= like_the_one_before:
            gap = seeded.choice([0.0, *INTER_TOKEN_SECONDS, 10 ** seeded.uniform(-5, 2)])
        times.append(times[-1] + gap)
    many, one_by_one = HistogramSeries(INTER_TOKEN_SECONDS), HistogramSeries(INTER_TOKEN_SECONDS)
    many.observe_gaps(times)
    for before, after in pairwise(times):
        one_by_one.observe(after - before)
    assert many.numbers() == pytest.approx(one_by_one.numbers())
    many.observe_gaps([1.0])
    assert many.count == 1000


def test_histograms_beyond_the_cap_share_one() -> None:
    metrics = Metrics()
    for number in range(MAX_HISTOGRAMS + 5):
        metrics.request_duration_ms.labels(f"provider-{number}").observe(1)
    assert value(metrics, "gateway_request_duration_ms_count", provider=OTHER) == 5


def test_counting_costs_little(figure: Callable[[str], None]) -> None:
    metrics = metrics_that_know(["gpt-4o"], providers=["openai"])
    series = metrics.tokens.labels("gpt-4o", "openai", "prompt")
    histogram = metrics.request_duration_ms.labels("openai")
    ended, usage = exchange(), Usage(10, 20)
    costs = {
        "inc": _cost(series.inc),
        "look up and inc": _cost(lambda: metrics.tokens.labels("gpt-4o", "openai", "prompt").inc()),
        "observe": _cost(lambda: histogram.observe(33.0)),
    }
    costs["exchange_ended"] = _cost(lambda: metrics.exchange_ended(ended, usage, "provider"))
    figure("metrics: " + ", ".join(f"{what} {cost:.2f} µs" for what, cost in costs.items()))
    assert max(cost for what, cost in costs.items() if what != "exchange_ended") < 5


def _cost(call: object) -> float:
    """Microseconds, the best of five."""
    return min(timeit.repeat("call()", globals={"call": call}, number=10_000, repeat=5)) / 10_000 * 1e6


# --- an exchange --------------------------------------------------------------------------------------------------


def test_an_exchange_counts_its_request_its_times_and_its_tokens() -> None:
    metrics = metrics_that_know(["gpt-4o"])
    usage = Usage(100, 50, cached_tokens=40, cache_write_tokens=10, reasoning_tokens=30)
    metrics.exchange_ended(exchange(), usage, "provider")
    assert value(metrics, "gateway_requests_total", model="gpt-4o", provider="openai", status="200") == 1
    assert value(metrics, "gateway_request_duration_ms_sum", provider="openai") == pytest.approx(3500)
    assert value(metrics, "gateway_time_to_first_token_seconds_sum", provider="openai") == pytest.approx(2)
    assert value(metrics, "gateway_overhead_seconds_sum") == pytest.approx(0.5)
    assert value(metrics, "gateway_usage_source_total", source="provider") == 1
    expected = {"prompt": 100, "completion": 50, "cached": 40, "cache_write": 10, "reasoning": 30}
    for kind, count in expected.items():
        assert value(metrics, "gateway_tokens_total", model="gpt-4o", provider="openai", kind=kind) == count


@pytest.mark.parametrize(("live", "final", "counted"), [(0, 50, 50), (42, 50, 50), (50, 50, 50), (60, 50, 60)])
def test_tokens_counted_live_are_not_counted_again(live: int, final: int, counted: int) -> None:
    metrics = metrics_that_know(["gpt-4o"])
    metrics.tokens_live("gpt-4o", "openai").tokens.inc(live)
    metrics.exchange_ended(exchange(), Usage(100, final), "provider", counted_live=live)
    assert value(metrics, "gateway_tokens_total", model="gpt-4o", provider="openai", kind="completion") == counted


def test_an_answer_that_was_not_streamed_has_no_first_token() -> None:
    metrics = Metrics(providers=["openai"])
    metrics.exchange_ended(exchange(stream=False), Usage(1, 1), "provider")
    assert value(metrics, "gateway_time_to_first_token_seconds_count", provider="openai") == 0


def test_a_request_that_was_refused_has_no_provider_and_no_tokens() -> None:
    metrics = Metrics()
    metrics.exchange_ended(Exchange(status=401))
    assert value(metrics, "gateway_requests_total", model=OTHER, provider="none", status="401") == 1
    assert not [s for s in samples(metrics) if s.name == "gateway_tokens_total"]
    assert value(metrics, "gateway_overhead_seconds_count") == 0


def remembered(source: Source, **changes: Any) -> Exchange:
    """One that was answered without a provider, and that would have used 15 tokens."""
    made = replace(exchange(), source=source, saved=Usage(10, 5), saved_micros=70, upstream_ms=0.0)
    return replace(made, **changes)


@pytest.mark.parametrize(("source", "result"), [("cache", "hit"), ("shared", "shared"), ("replay", "replay")])
def test_an_answer_without_a_provider_counts_what_it_saved_and_is_in_no_providers_figures(
    source: Source, result: str
) -> None:
    metrics = metrics_that_know(["gpt-4o"], ["openai"])
    metrics.exchange_ended(remembered(source))
    assert value(metrics, "gateway_cache_requests_total", result=result) == 1
    assert sum(s.value for s in samples(metrics) if s.name == "gateway_cache_requests_total") == 1
    assert value(metrics, "gateway_saved_tokens_total", model="gpt-4o", provider="openai") == 15
    assert value(metrics, "gateway_saved_cost_micros_total", model="gpt-4o", provider="openai") == 70
    assert value(metrics, "gateway_requests_total", model="gpt-4o", provider="none", status="200") == 1
    for name in ("gateway_request_duration_ms_count", "gateway_time_to_first_token_seconds_count"):
        assert value(metrics, name, provider="openai") == 0
    assert not [s for s in samples(metrics) if s.name in ("gateway_tokens_total", "gateway_cost_micros_total")]
    assert not [s for s in samples(metrics) if s.labels.get("provider") == "openai" and "status" in s.labels]


def test_what_was_saved_of_a_model_without_a_price_is_tokens_alone() -> None:
    metrics = metrics_that_know(["gpt-4o"])
    metrics.exchange_ended(remembered("cache", saved_micros=None))
    assert value(metrics, "gateway_saved_tokens_total", model="gpt-4o", provider="openai") == 15
    assert value(metrics, "gateway_saved_cost_micros_total", model="gpt-4o", provider="openai") == 0


def test_a_client_that_left_a_shared_answer_left_and_saved_nothing() -> None:
    metrics = metrics_that_know(["gpt-4o"])
    metrics.exchange_ended(remembered("shared", saved=None, saved_micros=None, outcome="client_abort"))
    assert value(metrics, "gateway_client_aborts_total", phase="stream") == 1
    assert not [s for s in samples(metrics) if s.name == "gateway_saved_tokens_total"]


@pytest.mark.parametrize(("header", "counted"), [("miss", 1), ("bypass", 1), ("hit", 0), ("", 0), ("canary", 0)])
def test_what_a_provider_was_asked_for_is_a_miss_or_a_bypass_where_a_cache_was_spoken_of(
    header: str, counted: int
) -> None:
    metrics = metrics_that_know(["gpt-4o"])
    asked = exchange()
    asked.headers.update({"X-Gateway-Cache": header} if header else {})
    metrics.exchange_ended(asked, Usage(10, 5), "provider")
    counts = {s.labels["result"]: s.value for s in samples(metrics) if s.name == "gateway_cache_requests_total"}
    assert counts == {**dict.fromkeys(labels.CACHE_RESULTS, 0), **({header: 1} if counted else {})}
    assert value(metrics, "gateway_requests_total", model="gpt-4o", provider="openai", status="200") == 1


def test_a_status_that_is_none_is_no_label() -> None:
    metrics = Metrics()
    for status in (0, 99, 1_000_000):
        metrics.exchange_ended(Exchange(status=status))
    assert value(metrics, "gateway_requests_total", model=OTHER, provider="none", status="0") == 1
    assert value(metrics, "gateway_requests_total", model=OTHER, provider="none", status=OTHER) == 2


@pytest.mark.parametrize(("first_byte", "phase"), [(0.0, "ttft"), (1.0, "stream")])
def test_a_client_that_left_is_counted_by_what_it_had_seen(first_byte: float, phase: str) -> None:
    metrics = Metrics()
    left = exchange()
    left.outcome, left.first_byte = "client_abort", first_byte
    metrics.exchange_ended(left, Usage(1, 0), "estimated")
    assert value(metrics, "gateway_client_aborts_total", phase=phase) == 1


def test_escaping_leaves_plain_names_alone() -> None:
    assert escape("claude-sonnet-4-5@20250929") == "claude-sonnet-4-5@20250929"


# --- several workers ----------------------------------------------------------------------------------------------


def joined(*parts: Metrics, providers: Iterable[str] = ()) -> Metrics:
    total = Metrics(providers=providers)
    for part in parts:
        total.join(part.snapshot())
    return total


def series_of(metrics: Metrics) -> set[tuple[object, ...]]:
    return {(sample.name, *sample.labels.items()) for sample in samples(metrics)}


def test_what_two_workers_counted_is_added_up() -> None:
    one, other = (metrics_that_know(["gpt-4o"], ["openai"]) for _ in range(2))
    for metrics, times in ((one, 2), (other, 3)):
        for _ in range(times):
            metrics.exchange_ended(exchange(), Usage(10, 20), "provider")
    total = joined(one, other, providers=["openai"])
    assert value(total, "gateway_requests_total", model="gpt-4o", provider="openai", status="200") == 5
    assert value(total, "gateway_tokens_total", model="gpt-4o", provider="openai", kind="prompt") == 50
    assert value(total, "gateway_request_duration_ms_count", provider="openai") == 5
    assert value(total, "gateway_request_duration_ms_sum", provider="openai") == pytest.approx(5 * 3500)
    assert value(total, "gateway_request_duration_ms_bucket", provider="openai", le="2560.0") == 0
    assert value(total, "gateway_request_duration_ms_bucket", provider="openai", le="5120.0") == 5


def test_gauges_are_added_up_where_that_means_something_and_the_largest_elsewhere() -> None:
    one, other = Metrics(), Metrics()
    one.streams_open.set(4)
    other.streams_open.set(3)
    one.usage_lag_seconds.follow(lambda: 2.5)
    other.usage_lag_seconds.follow(lambda: 9.5)
    other.limiter_local.set(1)
    other.config_ok.set(0)
    total = joined(one, other)
    assert value(total, "gateway_streams_open") == 7
    assert value(total, "gateway_usage_lag_seconds") == 9.5
    assert value(total, "gateway_limiter_local") == 1
    assert value(total, "gateway_config_ok") == 0
    builds = [sample.value for sample in samples(total) if sample.name == "gateway_build_info"]
    assert builds == [1]
    (memory,) = [sample.value for sample in samples(total) if sample.name == "process_resident_memory_bytes"]
    (alone,) = [sample.value for sample in samples(one) if sample.name == "process_resident_memory_bytes"]
    assert 1.5 * alone < memory < 2.5 * alone


def test_a_sum_has_the_same_series_as_each_of_its_parts() -> None:
    """Also those that are zero, and those that no other worker has."""
    one, other = (metrics_that_know(HOSTILE_NAMES, ["openai"]) for _ in range(2))
    for name in HOSTILE_NAMES:
        one.requests.labels(name, "openai", "200").inc()
    other.requests.labels("gpt-4o", "openai", "429").inc()
    found = series_of(joined(one, other, providers=["openai"]))
    assert series_of(one) | series_of(other) == found


def test_a_sum_keeps_to_the_caps_and_names_no_series_twice() -> None:
    parts = [Metrics() for _ in range(3)]
    for number, part in enumerate(parts):
        for model in range(MAX_SERIES // 2 + 1000 * (number == 2)):  # the last is beyond the cap by itself
            part.requests.labels(f"model-{number}-{model}", "openai", "200").inc()
        for provider in range(MAX_HISTOGRAMS):
            part.request_duration_ms.labels(f"provider-{number}-{provider}").observe(1)
    total = joined(*parts)
    found = [(s.name, *s.labels.items()) for s in samples(total)]
    assert len(found) == len(set(found))
    of_requests = [s.value for s in samples(total) if s.name == "gateway_requests_total"]
    assert len(of_requests) == MAX_SERIES + 1
    assert sum(of_requests) == 3 * (MAX_SERIES // 2) + 1000
    counts = [s.value for s in samples(total) if s.name == "gateway_request_duration_ms_count"]
    assert (len(counts), sum(counts)) == (MAX_HISTOGRAMS + 1, 3 * MAX_HISTOGRAMS)


def test_what_a_worker_of_another_version_has_and_we_have_not_is_left_out() -> None:
    total = Metrics(providers=["openai"])
    theirs = Metrics(providers=["openai"]).snapshot()
    theirs.counts["gateway_requests_total"] = {("a label too few",): [7]}
    theirs.counts["gateway_request_duration_ms"] = {("openai",): [1, 2, 3]}
    theirs.counts["gateway_forgotten_total"] = {(): [7]}
    theirs.counts["gateway_budget_cuts_total"] = {(): [7]}
    total.join(theirs)
    assert [s for s in samples(total) if s.name == "gateway_requests_total"] == []
    assert value(total, "gateway_request_duration_ms_count", provider="openai") == 0
    assert value(total, "gateway_budget_cuts_total") == 7
