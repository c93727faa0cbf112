"""The limiter: which request may go on now, exact over any number of processes.

One round trip to Redis checks a request against all of its limits and records it in all or in none. Requests are kept
one by one in sorted sets: that is exact, and costs Redis about 100 bytes for each request in the window. A token bucket
is one number. A request in flight holds a lease, which is renewed while it lives and ends by itself when its process
was killed.

Rule 1: without Redis the limits are kept here, by what this process granted itself.
Rule 2: a slot is never lost. Whatever Redis may have recorded for a request that does not go on is given back.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Literal

from gateway.exchange import Principal
from gateway.stores.grants import MAX_KEYS, UNLIMITED, Admission, Grants, Reason, refused
from gateway.stores.script import TIMEOUT, OnRedisDown, Operation, RedisScript

State = Literal["redis", "local", "open", "closed"]

_REASONS: tuple[Reason, ...] = (  # by their numbers in limits.lua
    "",
    "requests_per_minute",
    "concurrent_requests",
    "global_requests_per_minute",
    "requests_per_second",
    "route_requests_per_second",
)


class Limiter:
    """One a process, on the script of that process, and closed before it.

    `rates` are token buckets for all requests to a route: requests a second, and how many the bucket holds. `nodes` is
    how many processes share the limits; `window` is seconds. `on_local` hears of every decision without Redis, with the
    setting that made it; it must not raise.
    """

    def __init__(
        self,
        script: RedisScript,
        *,
        global_per_minute: int = 0,
        rates: Mapping[str, tuple[float, int]] = {},
        nodes: int = 1,
        on_redis_down: OnRedisDown = "local",
        window: float = 60.0,
        on_local: Callable[[OnRedisDown], None] = lambda mode: None,
    ) -> None:
        self._script = script
        self._on_local = on_local
        self._all_limit = global_per_minute
        self._rates = rates
        self._nodes = nodes
        self._on_redis_down = on_redis_down
        self._window = window
        self._grants = Grants(window, global_per_minute, rates)
        self._words: dict[tuple[str, str], tuple[Principal, str]] = {}  # by key id and route: `words_of`
        script.beats.append(self._renew_leases)

    @property
    def state(self) -> State:
        """Where limits are kept now: "redis", or what the setting says for a Redis that is gone."""
        return self._on_redis_down if self._script.gone else "redis"

    async def admit(self, principal: Principal, exchange_id: str, route: str = "") -> Admission:
        """Raises nothing but its own cancellation, after which no slot is held.

        What it granted is held until `release`.
        """
        of_key = principal.requests_per_minute or principal.concurrent_requests or principal.requests_per_second
        if not (of_key or self._all_limit or route in self._rates):
            return UNLIMITED
        now = self._script.clock()
        if self._script.gone:
            return self._decide(principal, route, exchange_id, now)
        # Redis learns of what we grant at most TIMEOUT later, so what is refused here it would refuse as well. A key
        # far over its limit costs no round trip, and a Redis that lost its data gives nobody a second helping.
        refusal = self._grants.refusal(principal, route, now, slack=TIMEOUT)
        if refusal is not None:
            return refusal
        ask = _Admit(self, principal, route, exchange_id, now)
        self._script.send(ask)
        try:
            return await ask.answer
        except asyncio.CancelledError:
            # Between the answer and its reader. Cancelled earlier than that, and the answer will find nobody waiting.
            if not ask.answer.cancelled():
                self.release(principal, exchange_id)
            raise

    def release(self, principal: Principal, exchange_id: str) -> None:
        """Gives back what `admit` granted. Never waits and never raises; after a refusal, or again, it does nothing."""
        if self._grants.give_back(exchange_id):
            self._release_lease(principal.key_id, exchange_id)

    def rates_changed(self) -> None:
        """The mapping that was given as `rates` says something else now."""
        self._words.clear()

    async def close(self) -> None:
        """Gives back all that is still held; the script's own `close` sees to it that Redis hears of it."""
        for exchange_id, key_id in self._grants.leases():
            self._grants.give_back(exchange_id)
            self._release_lease(key_id, exchange_id)

    # --- with Redis ---

    def words_of(self, who: Principal, route: str) -> str:
        """What limits.lua reads of an "admit" after its exchange: the same for all that one key asks of one route."""
        known = self._words.get((who.key_id, route))
        if known is not None and known[0] is who:
            return known[1]
        if len(self._words) >= MAX_KEYS:
            self._words.clear()
        route_rate, route_burst = self._rates.get(route, (0.0, 0))
        words = (
            f"{who.key_id} {self._window * 1e6:.0f} {self._script.lease * 1e6:.0f}"
            f" {who.requests_per_minute} {who.concurrent_requests} {self._all_limit}"
            f" {_interval(who.requests_per_second)} {max(who.burst, 1)}"
            f" {route or '-'} {_interval(route_rate)} {max(route_burst, 1)}"
        )
        self._words[who.key_id, route] = (who, words)
        return words

    def settle(self, ask: "_Admit", answer: str) -> None:
        """Redis's answer to it: 0, and what is left of its key's window, when it was granted; else which limit refused
        it, by its number in limits.lua, and µs until the window is empty and until it has room."""
        if ask.answer.done():
            self._abandon(ask)
        elif answer.startswith("0 "):
            limit = ask.who.requests_per_minute
            self._grants.record(ask.who, ask.route, ask.exchange_id, ask.asked)
            ask.answer.set_result(Admission(True, "", limit, int(answer[2:]), self._window if limit else 0.0))
        else:
            which, empty_after, room_after = map(int, answer.split())
            limit = self._limit(ask.who, ask.route, which)
            ask.answer.set_result(refused(_REASONS[which], limit, empty_after / 1e6, room_after / 1e6))

    def _limit(self, who: Principal, route: str, which: int) -> int:
        of_route = self._rates[route][1] if route in self._rates else 0
        limits = who.requests_per_minute, who.concurrent_requests, self._all_limit, max(who.burst, 1), of_route
        return limits[which - 1]

    def _renew_leases(self) -> None:
        for exchange_id, _ in self._grants.leases():
            self._script.send_later(_Renew(self._grants, exchange_id, self._script.lease))
        self._grants.forget_idle(self._script.clock())

    def _release_lease(self, key_id: str, exchange_id: str) -> None:
        release = _Release(self._script, key_id, exchange_id)
        if release.wanted():
            self._script.send(release)

    def _abandon(self, ask: "_Admit") -> None:
        """Nobody goes on with it here, whatever Redis recorded or will."""
        if ask.who.concurrent_requests:
            self._release_lease(ask.who.key_id, ask.exchange_id)

    # --- without Redis ---

    def decide(self, ask: "_Admit") -> None:
        """Redis went away while it was asked."""
        admission = None
        if not ask.answer.done():
            admission = self._decide(ask.who, ask.route, ask.exchange_id, self._script.clock())
            ask.answer.set_result(admission)
        if admission is None or not admission.granted:
            self._abandon(ask)

    def _decide(self, who: Principal, route: str, exchange_id: str, now: float) -> Admission:
        self._on_local(self._on_redis_down)
        if self._on_redis_down == "closed":
            return Admission(False, "unavailable", retry_after=math.ceil(self._script.pause), local=True)
        if self._on_redis_down == "open":
            if who.concurrent_requests:
                self._grants.hold(who.key_id, exchange_id)
            return UNLIMITED._replace(local=True)
        refusal = self._grants.refusal(who, route, now, nodes=self._nodes)
        if refusal is not None:
            return refusal._replace(local=True)
        self._grants.record(who, route, exchange_id, now, nodes=self._nodes)
        return self._grants.granted(who, now, nodes=self._nodes)


def _interval(rate: float) -> str:
    """µs between two requests of a token bucket; 0: there is none."""
    return f"{1e6 / rate:.3f}" if rate else "0"


# --- what Redis is asked ------------------------------------------------------------------------------------------


class _Admit(Operation):
    __slots__ = ("_limiter", "answer", "asked", "exchange_id", "route", "who")

    def __init__(self, limiter: Limiter, who: Principal, route: str, exchange_id: str, asked: float) -> None:
        self._limiter = limiter
        self.who = who
        self.route = route
        self.exchange_id = exchange_id
        self.asked = asked  # seconds, by the script's clock
        self.answer: asyncio.Future[Admission] = asyncio.get_running_loop().create_future()

    def line(self) -> str:
        return f"admit {self.exchange_id} {self._limiter.words_of(self.who, self.route)}"

    def wanted(self) -> bool:
        """Not when who asked has left meanwhile."""
        return not self.answer.done()

    def answered(self, answer: str) -> None:
        self._limiter.settle(self, answer)

    def lost(self) -> None:
        self._limiter.decide(self)


class _Renew(Operation):
    __slots__ = ("_exchange_id", "_grants", "_lease")

    def __init__(self, grants: Grants, exchange_id: str, lease: float) -> None:
        self._grants = grants
        self._exchange_id = exchange_id
        self._lease = lease  # seconds

    def line(self) -> str:
        return f"renew {self._grants.key_of(self._exchange_id)} {self._exchange_id} {self._lease * 1e6:.0f}"

    def wanted(self) -> bool:
        return self._grants.key_of(self._exchange_id) is not None


class _Release(Operation):
    __slots__ = ("_exchange_id", "_key_id", "_script")

    def __init__(self, script: RedisScript, key_id: str, exchange_id: str) -> None:
        self._script = script
        self._key_id = key_id
        self._exchange_id = exchange_id

    def line(self) -> str:
        return f"release {self._key_id} {self._exchange_id}"

    def wanted(self) -> bool:
        """After an outage as long as a lease Redis holds none."""
        return not self._script.gone or self._script.gone_for < self._script.lease

    def lost(self) -> None:
        self._script.send(self)
