"""The figures of a run: their names, units and goals, as a table and as a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table; `goal` is the most that ours may be, or the least when it is `least`."""

    key: str
    words: str
    goal: float | None = None
    least: bool = False
    above_nginx: bool = False  # the goal is the most that ours may be above nginx's

    @property
    def nginx(self) -> str:
        """Key of the figure beside it; there may be none."""
        return f"{self.key}_nginx"


_ROUTERS = (("vllm", "vLLM"), ("sglang", "SGLang"))

ROWS = (
    Row("request_cpu_us", "CPU of a request, µs"),
    Row("request_cpu_x_nginx", "CPU of a request, x nginx", 6),
    Row("request_cpu_x_litellm", "LiteLLM's CPU of a request, x ours", 100, least=True),
    Row("request_cpu_x_portkey", "Portkey's CPU of a request, x ours"),
    *(
        Row(f"request_cpu_x_{package}_router", f"CPU of a request of {name}'s router, x ours", 0.67, least=True)
        for package, name in _ROUTERS
    ),
    Row("requests_per_s_one_core", "requests/s on one core, 64 connections"),
    Row("chunk_cpu_us", "CPU of a chunk, µs"),
    Row("chunk_cpu_x_nginx", "CPU of a chunk, OpenAI, x nginx", 1.3),
    Row("chunk_cpu_x_nginx_anthropic", "CPU of a chunk, from Anthropic, x nginx", 1.6),
    Row("chunk_cpu_x_nginx_ollama", "CPU of a chunk, from Ollama, x nginx", 1.6),
    Row("chunk_cpu_x_nginx_budget", "CPU of a chunk, OpenAI, under a budget, x nginx"),
    Row("chunk_cpu_x_litellm", "LiteLLM's CPU of a chunk, x ours", 20, least=True),
    Row("chunk_cpu_x_portkey", "Portkey's CPU of a chunk, x ours"),
    *(Row(f"chunk_cpu_x_{package}_router", f"CPU of a chunk of {name}'s router, x ours") for package, name in _ROUTERS),
    Row("stream_cpu_us", "CPU of a stream of 64 chunks, µs"),
    Row("observability_share", "of which metrics and logs take, %", 5),
    Row("added_p50_us", "added to an answer, one connection, p50, µs"),
    Row("added_p99_us", "added to an answer, one connection, p99, µs", 300),
    Row("added_p50_us_64", "added to an answer, 64 connections at full speed, p50, µs"),
    Row("added_p99_us_64", "added to an answer, 64 connections at full speed, p99, µs"),
    *(
        Row(
            f"added_{what}_{part}_us_{streams}",
            f"added to the {words}, {streams} at once, {part}, µs",
            goal,
            above_nginx=True,
        )
        for streams in (1, 100, 1000)
        for what, words in (("ttft", "first token"), ("gap", "gap between chunks"))
        for part in ("p50", "p99")
        for goal in [1000.0 if (what, part, streams) == ("gap", "p99", 1000) else None]
    ),
    Row("streams_20ms", "streams at 20 ms on one core, none late", 1000, least=True),
    Row("rss_idle_mb", "RSS when idle, MB", 60),
    Row("rss_per_1000_streams_mb", "RSS of 1,000 open streams, MB", 16),
    Row("rss_after_mb", "RSS when they are gone, MB"),
    Row("rss_slope_kb_per_min", "RSS under streams that come and go, KB a minute", 100),
    Row("start_s", "start to the first answer, s", 0.5),
    Row("workers_2_x", "requests/s of two workers on two cores, x one on one", 1.8, least=True),
    Row("workers_2_cpu_x", "CPU of a request with two workers, x with one"),
)


def table(figures: Mapping[str, float]) -> str:
    """In markdown. What misses its goal is bold; figures that were not measured are left out."""
    lines = ["| figure | goal | nginx | ours |", "|---|---|---|---|"]
    for row in ROWS:
        if (value := figures.get(row.key)) is not None:
            beside = figures.get(row.nginx)
            ours = shown(value) if _met(row, value, beside or 0.0) else f"**{shown(value)}**"
            lines.append(f"| {row.words} | {_goal(row)} | {'' if beside is None else shown(beside)} | {ours} |")
    return "\n".join(lines)


def _met(row: Row, value: float, beside: float) -> bool:
    if row.goal is None:
        return True
    if row.above_nginx:
        return value - beside <= row.goal
    return value >= row.goal if row.least else value <= row.goal


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    return f"{'≥' if row.least else '≤'} {'nginx + ' * row.above_nginx}{row.goal:g}"


def shown(value: float) -> str:
    """Three digits, as far as they say something."""
    if not isfinite(value):
        return "never"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def footer(figures: Mapping[str, float], about: Mapping[str, Any]) -> str:
    """What the tools cost themselves, and what it was measured on."""
    lines = []
    for what in ("request", "chunk"):
        costs = [
            f"{words} {shown(figures[key])}"
            for name, words in (("provider", "provider"), ("load", "clients"), ("stores", "Postgres and Valkey"))
            if (key := f"{what}_cpu_us_{name}") in figures
        ]
        lines += [f"Beside it, µs of CPU a {what}: {', '.join(costs)}."] * bool(costs)
    machine = f"{about['date'][:10]}, {about['cores']} cores of {about['cpu']} (load before: {about['load_before']})"
    versions = f"Python {about['python']}, nginx {about['nginx']}, commit {about['commit'] or 'unknown'}"
    return "\n".join([*lines, f"{machine}, {versions}."])


def save(figures: Mapping[str, float], about: Mapping[str, Any]) -> Path:
    """The figures with what they were measured on, one flat object."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "latest.json"
    rounded = {name: round(value, 3) if isfinite(value) else None for name, value in figures.items()}
    path.write_text(json.dumps({**about, **rounded}, indent=2) + "\n")
    return path
