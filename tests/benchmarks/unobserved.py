"""The gateway with nobody to observe it, beside which the benchmark sees what being observed costs.

    python -m tests.benchmarks.unobserved serve …

No metric counts, no exchange has a log line. What money depends on stays: the meter, the journal, the limits.
"""

from gateway import middlewares
from gateway.__main__ import main
from gateway.series import CounterSeries, GaugeSeries, HistogramSeries
from gateway.stream import Tally


def _nothing(*_: object, **__: object) -> None:
    pass


def _add(tally: Tally, before: int, pieces: int) -> None:
    tally._exchange.counted_live += pieces


def _forget_gaps(tally: Tally) -> None:
    tally.heard.clear()


def switch_off() -> None:
    assert "report" in vars(middlewares), "it has another name: nothing would be switched off"
    setattr(middlewares, "report", _nothing)  # noqa: B010  # the log line, and all that is counted at an exchange's end
    for series, names in ((CounterSeries, ("inc",)), (GaugeSeries, ("inc", "dec")), (HistogramSeries, ("observe",))):
        for name in names:
            setattr(series, name, _nothing)
    setattr(Tally, "_add", _add)  # noqa: B010
    setattr(Tally, "settle_gaps", _forget_gaps)  # noqa: B010


if __name__ == "__main__":
    switch_off()
    main()
