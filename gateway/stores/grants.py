"""What this process granted by itself: the answer to a request, and enough to give it without Redis."""

import math
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from gateway.exchange import Principal

Reason = Literal[
    "",
    "requests_per_minute",
    "concurrent_requests",
    "global_requests_per_minute",
    "requests_per_second",
    "route_requests_per_second",
    "unavailable",
]
Rates = Mapping[str, tuple[float, int]]  # by route: requests a second, and how many its bucket holds

MAX_KEYS = 10_000  # whose requests are remembered here: 20 MB if each had 60
CONCURRENT_RETRY = 1  # seconds; nobody knows when a request ends


class Admission(NamedTuple):
    """The answer to one request. The window is that of the limit that refused it, else of its key's requests."""

    granted: bool
    reason: Reason = ""  # which limit refused it
    limit: int = 0  # requests that the window has room for, or that the bucket holds; 0: there is no limit
    remaining: int = 0
    # Seconds until the window is empty again, or the bucket full: what OpenAI's `x-ratelimit-reset-requests` says
    # (https://platform.openai.com/docs/guides/rate-limits).
    reset_after: float = 0.0
    retry_after: int = 0  # whole seconds until the window has room for one more; 0: granted
    local: bool = False  # Redis is gone, and this process answered by itself


UNLIMITED = Admission(granted=True)


class SlidingWindow:
    """When requests were granted, seconds, oldest first."""

    __slots__ = ("_span", "_times")

    def __init__(self, span: float) -> None:
        self._span = span  # seconds
        self._times: deque[float] = deque()

    def has_room(self, limit: int, now: float, slack: float = 0.0) -> bool:
        """Whether one more fits; `slack` seconds before its time a request counts as gone."""
        return len(self._times) < limit or now - self._times[-limit] >= self._span - slack

    def add(self, now: float) -> None:
        times = self._times
        times.append(now)
        if now - times[0] >= self._span:
            self._trim(now)

    def count(self, now: float) -> int:
        self._trim(now)
        return len(self._times)

    def room_after(self, limit: int, now: float) -> float:
        """Seconds until one more fits."""
        return 0.0 if self.has_room(limit, now) else self._times[-limit] + self._span - now

    def empty_after(self, now: float) -> float:
        return max(self._times[-1] + self._span - now, 0.0) if self._times else 0.0

    def _trim(self, now: float) -> None:
        while self._times and now - self._times[0] >= self._span:
            self._times.popleft()


class Buckets:
    """Token buckets, each of which is one number: when it will be full again, seconds.

    https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm. Whoever asks says what the bucket's rate is (tokens a
    second) and how many it holds, so that a change of them counts at once.
    """

    def __init__(self) -> None:
        self._full_at: OrderedDict[str, float] = OrderedDict()  # the least recently used first

    def room_after(self, name: str, rate: float, burst: int, now: float, tokens: int = 1) -> float:
        """Seconds until it holds so many; not above 0: it does."""
        return max(self._full_at.get(name, now), now) + (tokens - burst) / rate - now - 1e-6  # what floats round

    def full_after(self, name: str, now: float) -> float:
        return max(self._full_at.get(name, now) - now, 0.0)

    def take(self, name: str, rate: float, now: float, tokens: int = 1) -> None:
        """Also what is not there, and less than nothing: then some is put back."""
        self._full_at[name] = max(self._full_at.get(name, now), now) + tokens / rate
        self._full_at.move_to_end(name)
        if len(self._full_at) > MAX_KEYS:
            self._full_at.popitem(last=False)

    def forget_full(self, now: float) -> None:
        for name in [name for name, full_at in self._full_at.items() if full_at <= now]:
            del self._full_at[name]


class Grants:
    """What this process granted: its requests of the last window, and the leases of those that still run.

    Written by the limiter alone. Enough to go on without Redis, and to know without asking that a limit is used up.
    """

    def __init__(self, window: float, all_limit: int, rates: Rates) -> None:
        self._window = window
        self._all_limit = all_limit
        self._rates = rates
        self._all = SlidingWindow(window)
        self._buckets = Buckets()
        self._windows: OrderedDict[str, SlidingWindow] = OrderedDict()  # by key id, the least recently used first
        self._leases: dict[str, str] = {}  # exchange id -> key id
        self._concurrent: dict[str, int] = {}  # key id -> its leases; no zeros

    def refusal(
        self, who: Principal, route: str, now: float, *, nodes: int = 1, slack: float = 0.0
    ) -> Admission | None:
        """The answer when this process has granted a node's share of a limit by itself; None: there is room.

        A share is at least one, or its users would be locked out.
        """
        if limit := who.requests_per_minute:
            window, share = self._windows.get(who.key_id), limit // nodes or 1
            if window is not None and not window.has_room(share, now, slack):
                self._windows.move_to_end(who.key_id)
                return _full("requests_per_minute", limit, window, share, now)
        if (limit := who.concurrent_requests) and self._concurrent.get(who.key_id, 0) >= (limit // nodes or 1):
            return refused("concurrent_requests", limit, 0.0, 0.0)
        if (limit := self._all_limit) and not self._all.has_room(share := limit // nodes or 1, now, slack):
            return _full("global_requests_per_minute", limit, self._all, share, now)
        if not who.requests_per_second and route not in self._rates:
            return None
        for reason, name, rate, burst in self._buckets_of(who, route):
            wait = self._buckets.room_after(name, rate / nodes, burst // nodes or 1, now)
            if wait > slack:
                return refused(reason, burst, self._buckets.full_after(name, now), wait)
        return None

    def record(self, who: Principal, route: str, exchange_id: str, now: float, *, nodes: int = 1) -> None:
        if who.requests_per_minute:
            self._window_of(who.key_id).add(now)
        if self._all_limit:
            self._all.add(now)
        if who.concurrent_requests:
            self.hold(who.key_id, exchange_id)
        if who.requests_per_second or route in self._rates:
            for _, name, rate, _ in self._buckets_of(who, route):
                self._buckets.take(name, rate / nodes, now)

    def hold(self, key_id: str, exchange_id: str) -> None:
        if exchange_id not in self._leases:
            self._leases[exchange_id] = key_id
            self._concurrent[key_id] = self._concurrent.get(key_id, 0) + 1

    def give_back(self, exchange_id: str) -> bool:
        """False when there was nothing to give back."""
        key_id = self._leases.pop(exchange_id, None)
        if key_id is None:
            return False
        left = self._concurrent[key_id] - 1
        if left:
            self._concurrent[key_id] = left
        else:
            del self._concurrent[key_id]
        return True

    def granted(self, who: Principal, now: float, *, nodes: int) -> Admission:
        """What to say of a request that was just recorded without Redis."""
        if not who.requests_per_minute:
            return UNLIMITED._replace(local=True)
        window = self._window_of(who.key_id)
        left = max((who.requests_per_minute // nodes or 1) - window.count(now), 0)
        return Admission(True, "", who.requests_per_minute, left, window.empty_after(now), local=True)

    def leases(self) -> list[tuple[str, str]]:
        """Exchange id and key id of all that run."""
        return list(self._leases.items())

    def key_of(self, exchange_id: str) -> str | None:
        """The key that a running request holds a lease of."""
        return self._leases.get(exchange_id)

    def forget_idle(self, now: float) -> None:
        for key_id in [key_id for key_id, window in self._windows.items() if not window.count(now)]:
            del self._windows[key_id]
        self._buckets.forget_full(now)

    def _buckets_of(self, who: Principal, route: str) -> Sequence[tuple[Reason, str, float, int]]:
        """Which limit it is, its name, requests a second and burst."""
        buckets: list[tuple[Reason, str, float, int]] = []
        if who.requests_per_second:
            buckets.append(("requests_per_second", who.key_id, who.requests_per_second, max(who.burst, 1)))
        if route in self._rates:
            buckets.append(("route_requests_per_second", route, *self._rates[route]))
        return buckets

    def _window_of(self, key_id: str) -> SlidingWindow:
        window = self._windows.get(key_id)
        if window is None:
            window = self._windows[key_id] = SlidingWindow(self._window)
            if len(self._windows) > MAX_KEYS:
                self._windows.popitem(last=False)
        else:
            self._windows.move_to_end(key_id)
        return window


def _full(reason: Reason, limit: int, window: SlidingWindow, share: int, now: float) -> Admission:
    return refused(reason, limit, window.empty_after(now), window.room_after(share, now))


def refused(reason: Reason, limit: int, empty_after: float, room_after: float) -> Admission:
    if reason == "concurrent_requests":
        return Admission(False, reason, limit, 0, CONCURRENT_RETRY, CONCURRENT_RETRY)
    return Admission(False, reason, limit, 0, empty_after, max(math.ceil(room_after), 1))
