"""A page of metrics: how each is made, and how they are shown, by one process alone or by several together."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from operator import add
from typing import Any

from aioprometheus.collectors import Registry
from aioprometheus.renderer import render

from gateway.series import (
    MAX_SERIES,
    CounterSeries,
    GaugeSeries,
    HistogramSeries,
    Labelled,
    LabelledCounter,
    LabelledGauge,
    LabelledHistogram,
)
from gateway.tally import Snapshot, Tally

log = logging.getLogger("gateway.metrics")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Page:
    """What is declared on it is on it. Each instance has a registry of its own."""

    def __init__(self) -> None:
        self.tally: Tally | None = None  # serve: where the numbers of the other workers are
        self._registry = Registry()
        self._written = True  # the last time that we tried

    def render(self) -> bytes:
        """The page, in Prometheus's text format 0.0.4 (CONTENT_TYPE); of several workers it is the sum of them all.

        About 5 µs a line, so a thread is the place for it; series that are added meanwhile do it no harm.
        """
        shown = self if self.tally is None else self.together(self.workers())
        page, _ = render(shown._registry, ())
        return page

    # --- several workers ------------------------------------------------------------------------------------------

    def workers(self) -> Mapping[int, Snapshot]:
        """What each worker has counted, ours as of now and the others' of their last second; alone, we are number 1.

        Those that ended are together number 0, and have no gauges.
        """
        tally = self.tally
        if tally is None:
            return {1: self.snapshot()}
        return {tally.worker: self.publish() or self.snapshot(), **tally.others()}

    def together(self, found: Mapping[int, Snapshot]) -> "Page":
        """A sum of its own, made anew for each page. In the workers' order: at a cap all pages name the same series."""
        total = self._like_it()
        for worker in sorted(found):
            total.join(found[worker])
        return total

    def _like_it(self) -> "Page":
        """One with the same metrics, and nothing counted."""
        raise NotImplementedError

    def publish(self) -> Snapshot | None:
        """Write our numbers down for the other workers. None when that is not possible, which is said once."""
        if self.tally is None:
            return None
        try:
            snapshot = self.tally.publish(self.snapshot)
        except OSError as error:
            if self._written:
                log.warning("metrics cannot be written for the other workers: %s", error.strerror or error)
            self._written = False
            return None
        self._written = True
        return snapshot

    def snapshot(self) -> Snapshot:
        snapshot = Snapshot({}, {})
        for metric in self._labelled():
            kind = snapshot.gauges if isinstance(metric, LabelledGauge) else snapshot.counts
            kind[metric.name] = metric.numbers()
        return snapshot

    def join(self, snapshot: Snapshot) -> None:
        """Add what another process counted."""
        numbers = {**snapshot.counts, **snapshot.gauges}
        for metric in self._labelled():
            metric.join(numbers.get(metric.name, {}))

    def _labelled(self) -> Iterator[Labelled[Any]]:
        return (metric for metric in self._registry.get_all() if isinstance(metric, Labelled))

    # --- how a metric is made -------------------------------------------------------------------------------------

    def _counter(
        self, name: str, doc: str, labels: Sequence[str] = (), *closed_sets: Sequence[str], cap: int = MAX_SERIES
    ) -> LabelledCounter:
        """A counter; when every label is a closed set, all its series are there from the start, at zero, but for those
        beyond `cap`.

        A series that appears with its first error hides that error from `rate()`
        (https://prometheus.io/docs/practices/instrumentation/#avoid-missing-metrics).
        """
        counter = LabelledCounter(self._registry, name, doc, labels, CounterSeries)
        counter.cap = cap
        if closed_sets:
            for values in product(*closed_sets):
                counter.labels(*values)
        return counter

    def _gauge(
        self, name: str, doc: str, labels: Sequence[str] = (), *, together: Callable[[float, float], float] = add
    ) -> LabelledGauge:
        """`together`: what the values of two workers make: `add`, `max` or `min`."""
        return LabelledGauge(self._registry, name, doc, labels, lambda: GaugeSeries(together))

    def _histogram(self, name: str, doc: str, labels: Sequence[str], bounds: Sequence[float]) -> LabelledHistogram:
        return LabelledHistogram(self._registry, name, doc, labels, lambda: HistogramSeries(bounds))
