"""A clock that stands still until a test moves it, and one that goes on only while nobody else has our core."""

from pathlib import Path
from time import perf_counter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0  # seconds

    def __call__(self) -> float:
        return self.now


_SCHEDULED = Path("/proc/thread-self/schedstat")


def on_a_core() -> float:
    """Seconds, without those in which this thread could have run and others did: what a busy machine adds to a time.

    The kernel counts them (https://docs.kernel.org/scheduler/sched-stats.html); where it does not, none are left out.
    """
    waited = int(_SCHEDULED.read_text().split()[1]) if _SCHEDULED.exists() else 0  # nanoseconds
    return perf_counter() - waited / 1e9
