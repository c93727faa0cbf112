"""Write grafana/metrics.md anew, from the metrics as the code declares them: `python -m scripts.make_metrics_table`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.breaker import STATES
from gateway.labels import TOKEN_KINDS
from gateway.metrics import MAX_PROVIDERS, Metrics
from gateway.series import MAX_SERIES, GaugeSeries, HistogramSeries, Labelled

FILE = Path(__file__).parents[1] / "grafana" / "metrics.md"

HEAD = f"""# Metrics

What `GET /metrics` shows, in Prometheus's text format 0.0.4. This file is written by
`python -m scripts.make_metrics_table`, and a test compares it with the code.

`provider` is a name from the configuration, at most {MAX_PROVIDERS} of them and `other` for the rest; `model` one that
the operator or a provider named, and `other` for what clients make up. A metric has at most {MAX_SERIES:,} series, and
a page less than 5,000. Of several workers any shows all: counters and histograms are added up, and gauges as the column
`workers` says. What is in a closed set (below) is there from the start, at zero.

| name | type | unit | labels | workers | meaning |
|---|---|---|---|---|---|
"""

_UNITS = {"_seconds": "seconds", "_ms": "milliseconds", "_bytes": "bytes", "_micros": "micro-dollars"}
_TOGETHER = {4.0: "sum", 3.0: "largest", 1.0: "smallest"}  # of 1 and 3
# Closed sets whose series come with the first model or the first provider.
_COME_LATER: Mapping[tuple[str, str], Sequence[str]] = {
    ("gateway_tokens_total", "kind"): TOKEN_KINDS,
    ("gateway_provider_state", "state"): STATES,
}
_OPEN = ("model", "provider", "status", "version", "python")


def table() -> str:
    """The whole file."""
    metrics = sorted(declared(Metrics(providers=["any"])), key=lambda metric: metric.name)
    closed = [line for metric in metrics for line in _closed_sets(metric)]  # before a series of ours is among them
    rows = [_row(metric) for metric in metrics]
    buckets = [_buckets(metric) for metric in metrics if isinstance(_series(metric), HistogramSeries)]
    return f"{HEAD}{''.join(rows)}\n## Closed sets\n\n{''.join(closed)}\n## Buckets\n\n{''.join(buckets)}"


def declared(metrics: Metrics) -> Iterator[Labelled[Any]]:
    """All of them, also those that have no series yet."""
    return (metric for metric in metrics._registry.get_all() if isinstance(metric, Labelled))


def _row(metric: Labelled[Any]) -> str:
    labels = ", ".join(f"`{name}`" for name in metric.label_names)
    cells = (f"`{metric.name}`", metric.kind.name, _unit(metric.name), labels, _together(metric), metric.doc)
    return f"| {' | '.join(cells)} |\n"


def _unit(name: str) -> str:
    base = name.removesuffix("_total")
    return next((unit for ending, unit in _UNITS.items() if base.endswith(ending)), "count")


def _together(metric: Labelled[Any]) -> str:
    series = _series(metric)
    if not isinstance(series, GaugeSeries):
        return "sum"
    series.join([1.0])
    series.join([3.0])
    return _TOGETHER[series.sample()]


def _series(metric: Labelled[Any]) -> Any:
    return metric.labels(*("any" for _ in metric.label_names))


def _closed_sets(metric: Labelled[Any]) -> Iterator[str]:
    for position, label in enumerate(metric.label_names):
        if label not in _OPEN:
            known = dict.fromkeys(values[position] for values in metric.numbers())
            values = _COME_LATER.get((metric.name, label)) or known
            yield f"- `{metric.name}`, `{label}`: {', '.join(f'`{value}`' for value in values)}\n"


def _buckets(metric: Labelled[Any]) -> str:
    bounds = [f"{bound:.6f}".rstrip("0").rstrip(".") for bound in _series(metric).sample() if isinstance(bound, float)]
    return f"- `{metric.name}`: {', '.join(bounds[:-1])}\n"


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(table())
