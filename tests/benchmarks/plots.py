"""Two plots of a run, as SVG: CPU beside nginx as bars, and latency over the number of streams as lines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path

from tests.benchmarks.report import shown

_WIDTH, _ROW, _LEFT, _RIGHT = 760, 30, 250, 90  # pixels
_HEIGHT, _TOP, _BOTTOM = 400, 60, 60
_COLOURS = {"nginx": "#888888", "ours": "#1f6feb", "goal": "#d1242f"}
_STYLE = "font-family: system-ui, sans-serif; font-size: 13px"

_BARS = (
    ("request", "request_cpu_x_nginx", 6.0),
    ("chunk, OpenAI", "chunk_cpu_x_nginx", 1.3),
    ("chunk, from Anthropic", "chunk_cpu_x_nginx_anthropic", 1.6),
    ("chunk, from Ollama", "chunk_cpu_x_nginx_ollama", 1.6),
    ("chunk, OpenAI, under a budget", "chunk_cpu_x_nginx_budget", None),
)
_CROWDS = (1, 100, 1000)


def save_plots(figures: Mapping[str, float], folder: Path) -> None:
    """cpu.svg and latency.svg; one whose figures were not measured is left as it is."""
    folder.mkdir(exist_ok=True)
    bars = [(words, figures[key], goal) for words, key, goal in _BARS if key in figures]
    if bars:
        (folder / "cpu.svg").write_text(_bars(bars))
    if "added_gap_p99_us_1000" in figures:
        lines = [
            _Line(
                f"{words}, {whose}", _COLOURS[whose], dashed, [figures[f"added_{key}_p99_us_{n}{end}"] for n in _CROWDS]
            )
            for key, words, dashed in (("gap", "gap between chunks", False), ("ttft", "first token", True))
            for whose, end in (("ours", ""), ("nginx", "_nginx"))
        ]
        (folder / "latency.svg").write_text(_lines(lines))


def _bars(bars: Sequence[tuple[str, float, float | None]]) -> str:
    most = max(max(value, goal or 1.0) for _, value, goal in bars)
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    drawn = [_text(10, 28, "CPU of the gateway beside nginx (1), and the goal")]
    for number, (words, value, goal) in enumerate(bars):
        y = _TOP + number * _ROW
        drawn.append(_text(_LEFT - 10, y + 15, words, anchor="end"))
        drawn.append(f'<rect x="{_LEFT}" y="{y}" width="{value * scale:.1f}" height="20" fill="{_COLOURS["ours"]}"/>')
        drawn.append(_text(_LEFT + value * scale + 6, y + 15, shown(value)))
        if goal is not None:
            drawn.append(_stroke(_LEFT + goal * scale, y - 3, _LEFT + goal * scale, y + 23, _COLOURS["goal"]))
    bottom = _TOP + len(bars) * _ROW
    drawn.append(_stroke(_LEFT + scale, _TOP - 6, _LEFT + scale, bottom, _COLOURS["nginx"]))
    return _svg(bottom + 20, drawn)


@dataclass(frozen=True, slots=True)
class _Line:
    words: str
    colour: str
    dashed: bool
    values: Sequence[float]  # microseconds


def _lines(lines: Sequence[_Line]) -> str:
    most = max(1.0, *(value for line in lines for value in line.values if isfinite(value)))
    bottom, left = _HEIGHT - _BOTTOM, 90
    steps = [left + number * 180 for number in range(len(_CROWDS))]
    drawn = [_text(10, 28, "Added by the proxy at p99, in ms, by the number of streams at once (a chunk every 20 ms)")]
    for part in (0.0, 0.5, 1.0):
        y = bottom - part * (bottom - _TOP)
        drawn.append(_stroke(left, y, steps[-1], y, "#dddddd"))
        drawn.append(_text(left - 10, y + 4, shown(most * part / 1000), anchor="end"))
    drawn += [_text(x, bottom + 22, f"{n:,}", anchor="middle") for x, n in zip(steps, _CROWDS, strict=True)]
    for number, line in enumerate(lines):
        # What never came leaves the plot at its upper edge.
        heights = [bottom - min(max(value, 0.0), most) / most * (bottom - _TOP) for value in line.values]
        points = " ".join(f"{x},{y:.1f}" for x, y in zip(steps, heights, strict=True))
        dash = ' stroke-dasharray="6 4"' * line.dashed
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="2"{dash}/>')
        y = _TOP + number * 24
        key = f'<polyline points="500,{y - 4} 530,{y - 4}" stroke="{line.colour}" stroke-width="2"{dash}/>'
        drawn += [key, _text(538, y, line.words)]
    return _svg(_HEIGHT, drawn)


def _svg(height: float, drawn: Sequence[str]) -> str:
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height:.0f}" style="{_STYLE}">'
    return "\n".join([opening, '<rect width="100%" height="100%" fill="white"/>', *drawn, "</svg>\n"])


def _text(x: float, y: float, words: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _stroke(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    line = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {line} stroke="{colour}" stroke-width="2"/>'
