"""Series: the numbers of one metric, held by their label values.

aioprometheus keeps the registry and writes the page. Three things it does not do are done here, once:

Rule 1: label values are escaped. Its formatter writes them as they are, so a quote in one could plant a series.
Rule 2: a metric has at most so many series; what comes after is counted under the label values `other`.
Rule 3: the hot path holds a bound series (`metric.labels("a", "b")`, cached) and adds to a plain number.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from operator import add
from time import sleep
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from aioprometheus.collectors import Collector, Counter, Gauge, Histogram, Registry

OTHER = "other"  # a label value beyond the cap, or one that a client made up

# Series that one metric may have. Prometheus asks for labels whose values number fewer than ten, with few exceptions
# (https://prometheus.io/docs/practices/instrumentation/#do-not-overuse-labels); `model` is our exception.
MAX_SERIES = 1000
MAX_HISTOGRAMS = 24  # of one metric; each is about twenty lines of the page
GIVE_WAY = 0.0001  # seconds


class Sampled(Protocol):
    def sample(self) -> Any:
        """What aioprometheus's formatter prints for the series: a number, or a histogram's lines by name."""
        ...

    def numbers(self) -> list[float]:
        """All that makes up the series, for `join` in another process."""
        ...

    def join(self, numbers: Sequence[float]) -> None:
        """Join in what a series of the same name counted in another process. What does not fit is left out."""
        ...


class CounterSeries:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, n: float = 1) -> None:
        """Add `n`. What is not positive adds nothing: a counter never goes down, and counting never raises."""
        if n > 0:
            self.value += n

    def sample(self) -> float:
        return self.value

    def numbers(self) -> list[float]:
        return [self.value]

    def join(self, numbers: Sequence[float]) -> None:
        self.inc(sum(numbers))


class GaugeSeries:
    """`together`: what the values of two processes make: their sum, the larger or the smaller one."""

    __slots__ = ("_joined", "_read", "_together", "value")

    def __init__(self, together: Callable[[float, float], float] = add) -> None:
        self.value: float = 0
        self._together = together
        self._joined = False
        self._read: Callable[[], float] | None = None

    def set(self, value: float) -> None:
        self.value = value

    def inc(self, n: float = 1) -> None:
        self.value += n

    def dec(self, n: float = 1) -> None:
        self.value -= n

    def follow(self, read: Callable[[], float]) -> None:
        """From now on the page asks `read`, which must not raise."""
        self._read = read

    def sample(self) -> float:
        return self.value if self._read is None else float(self._read())

    def numbers(self) -> list[float]:
        return [self.sample()]

    def join(self, numbers: Sequence[float]) -> None:
        for number in numbers:
            self.value = self._together(self.value, number) if self._joined else number  # at first ours is none of them
            self._joined, self._read = True, None


class HistogramSeries:
    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # of each bucket alone; the page adds them up
        self.sum = 0.0

    @property
    def count(self) -> int:
        return sum(self._counts)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def observe_gaps(self, times: Sequence[float]) -> None:
        """Each difference of two neighbours in `times`, which never go down and are at least one.

        The gaps of a stream are alike, so the bucket of the one before is tried first: it costs half of a search.
        """
        bounds, counts = self._bounds, self._counts
        lowest = highest = -1.0  # no gap is in between
        bucket = found = 0
        before = times[0]
        for time in times[1:]:
            gap = time - before
            before = time
            if not lowest < gap <= highest:
                counts[bucket] += found
                bucket, found = bisect_left(bounds, gap), 0
                lowest = bounds[bucket - 1] if bucket else -1.0
                highest = bounds[bucket] if bucket < len(bounds) else inf
            found += 1
        counts[bucket] += found
        self.sum += before - times[0]

    def sample(self) -> dict[float | str, float]:
        lines: dict[float | str, float] = {}
        total = 0
        for bound, count in zip((*self._bounds, inf), self._counts, strict=True):
            total += count
            lines[bound] = total
        return {**lines, "count": total, "sum": self.sum}

    def numbers(self) -> list[float]:
        return [*self._counts, self.sum]

    def join(self, numbers: Sequence[float]) -> None:
        if len(numbers) == len(self._counts) + 1:  # else of a version with other buckets
            self._counts = [ours + int(theirs) for ours, theirs in zip(self._counts, numbers, strict=False)]
            self.sum += numbers[-1]


class Live(NamedTuple):
    """What moves while a stream runs."""

    tokens: CounterSeries  # of the completion
    gaps: HistogramSeries  # between two texts, in seconds


S = TypeVar("S", bound=Sampled)


class Labelled(Collector, Generic[S]):
    """A collector of aioprometheus's that holds its series itself, by their label values."""

    cap = MAX_SERIES
    pieces = 50  # series that are shown, in half a millisecond, before other threads are let in

    def __init__(
        self, registry: Registry, name: str, doc: str, label_names: Sequence[str], new: Callable[[], S]
    ) -> None:
        super().__init__(name, doc, registry=registry)
        self.label_names = tuple(label_names)
        self._new = new
        self._series: dict[tuple[str, ...], S] = {}

    def labels(self, *values: str) -> S:
        """The series with these label values, the same object every time; beyond the cap the one named `other`."""
        series = self._series.get(values)
        return series if series is not None else self._add(values)

    def _add(self, values: tuple[str, ...]) -> S:
        if len(values) != len(self.label_names):
            raise ValueError(f"{self.name} has {len(self.label_names)} labels, {len(values)} were given")
        if len(self._series) >= self.cap:
            values = (OTHER,) * len(values)
        series = self._series[values] = self._series.get(values) or self._new()
        return series

    def numbers(self) -> dict[tuple[str, ...], list[float]]:
        """Of each series, by its label values; these have UTF-8."""
        return {
            values if "".join(values).isprintable() else tuple(map(clean, values)): series.numbers()
            for values, series in list(self._series.items())
        }

    def join(self, numbers: Mapping[tuple[str, ...], Sequence[float]]) -> None:
        """Join in what `numbers` gave in another process."""
        for values, theirs in numbers.items():
            if len(values) == len(self.label_names):  # else of a version with other labels
                self.labels(*values).join(theirs)

    def get_all(self) -> Iterator[tuple[dict[str, str], Any]]:  # type: ignore[override]  # one at a time will do
        """What aioprometheus's formatter asks for. It writes label values as they are, so here they are escaped.

        It is for a thread: the loop's is let in now and then, or streams would pause for Python's 5 ms, several times.
        """
        for number, (values, series) in enumerate(list(self._series.items()), 1):
            if number % self.pieces == 0:
                sleep(GIVE_WAY)
            yield dict(zip(self.label_names, map(escape, values), strict=True)), series.sample()


class LabelledCounter(Labelled[CounterSeries], Counter):
    """`Counter` is what the formatter looks at: it prints `# TYPE … counter`."""


class LabelledGauge(Labelled[GaugeSeries], Gauge):
    pass


class LabelledHistogram(Labelled[HistogramSeries], Histogram):
    cap = MAX_HISTOGRAMS
    pieces = 3


def clean(value: str) -> str:
    """A lone surrogate has no UTF-8, and control characters have no place in a name: each becomes a replacement."""
    if value.isprintable():
        return value
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in value)


# "label_value can be any sequence of UTF-8 characters, but the backslash, double-quote, and line feed characters have
# to be escaped" (https://prometheus.io/docs/instrumenting/exposition_formats/).
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


def escape(value: str) -> str:
    return clean(value).translate(_ESCAPES)
