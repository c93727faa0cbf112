"""Who tried how often lately: the brake on guessing keys and passwords, and on making accounts."""

import time
from collections import OrderedDict, deque
from collections.abc import Callable

MAX_NAMES = 10_000  # addresses or accounts remembered; beyond it the one that has been quiet longest is forgotten


class Attempts:
    """At most `limit` attempts a name in any `seconds`. Kept in this process: N processes allow N times as many."""

    def __init__(
        self,
        limit: int,
        *,
        seconds: float = 60.0,
        names: int = MAX_NAMES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._seconds = seconds
        self._names = names
        self._clock = clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()  # by name, the quietest first

    def add(self, name: str) -> None:
        times = self._times.setdefault(name, deque(maxlen=self._limit))
        times.append(self._clock())
        self._times.move_to_end(name)
        if len(self._times) > self._names:
            self._times.popitem(last=False)

    def wait(self, name: str) -> float:
        """Seconds until `name` may try again; 0.0: it may now."""
        times = self._times.get(name)
        if times is None or len(times) < self._limit:
            return 0.0
        return max(0.0, times[0] + self._seconds - self._clock())
