"""Which target next: weights, requests in flight, cool-downs, breakers. All of it is what requests met, and no more.

Two kinds of state. A provider has a breaker: when it fails again and again nobody asks it for a while, then one request
at a time finds out whether it is back. A target (a provider's model) has a cool-down: the provider asked to be left
alone, and is. What is said of a caller's own credential counts for neither.

Rule 1: whoever began a turn ends it, once, whatever happens; the first word counts.
Rule 2: a client that left says nothing of a provider.
Rule 3: what is kept is bounded: breakers by the providers there are, targets by MAX_TARGETS, because clients choose
the names of models.
"""

import asyncio
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

from gateway.breaker import PROBE, REFUSED, SHORTEST, Breaker, Health, State
from gateway.protocol.errors import (
    AnswerTooLarge,
    GatewayError,
    ProviderAuth,
    UpstreamError,
    UpstreamOverloaded,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTooLong,
    UpstreamUnavailable,
)
from gateway.protocol.routing import Provider, Route, Target
from gateway.stores.outages import Cause, Outage, mark_of

LONGEST_COOLING = 300.0  # seconds, whatever a provider asks for
NO_QUOTA = 60.0  # seconds: the operator's account has to be paid, which no Retry-After says
TOLD = 2.0  # seconds: what is over sooner is not worth telling the other processes
SLOW, OUTLIER = 2.0, 4  # passed over: more seconds to the first text, and so many times those of the fastest
AGAIN = 10.0  # seconds after which a slow one is asked again
MAX_TARGETS = 4096
RETRIES, RETRY_SHARE = 3, 0.2  # retries at a time, or of what is in flight (Envoy's min_retry_concurrency and 20 %)
LOOK = 2.0  # seconds between two looks at providers whose breaker is open

# It answers; what was asked, or who asked, was the matter.
_BLAMELESS = (AnswerTooLarge, UpstreamRejected, UpstreamRateLimited, UpstreamTooLong, ProviderAuth)

# Whom not to ask: targets by their provider's name and model, or providers by name.
Excluded = Collection[str | tuple[str, str]]


class Turn:
    """One attempt's place at a target, from its choice to its end. Made by `Balancer.begin`."""

    __slots__ = ("_balancer", "_health", "_over", "_probes", "again", "started", "target")

    def __init__(self, balancer: "Balancer", target: Target, health: Health, now: float) -> None:
        self._balancer = balancer
        self._health = health
        self._over = False
        self.again = False  # its exchange has failed at this provider before: a failure that repeats itself counts once
        self.target = target
        self.started = health.begun = now
        breaker = health.breaker
        health.in_flight += 1
        breaker.in_flight += 1
        self._probes = False
        if breaker.open_until and breaker.probes(target):
            self._probes, breaker.probing_until = True, now + PROBE

    @property
    def finds_out(self) -> bool:
        """It probes, and the breaker was neither closed nor opened again since it began."""
        breaker = self._health.breaker
        return self._probes and bool(breaker.open_until) and breaker.opened <= self.started

    def answered(self) -> None:
        """The provider's answer has begun well: whoever waits for a probe need not wait for its end."""
        if self.finds_out:
            self._health.breaker.close()

    def ok(self, first_text: float = 0.0) -> None:
        """It ended well. `first_text` is when that came in a stream, seconds, monotonic; 0: it did not."""
        if self._over:
            return
        if self._probes:
            self.answered()
        self._health.breaker.successes += 1
        if first_text:
            self._health.note_first_text(first_text - self.started)
        self.left()

    def failed(self, error: GatewayError, status: int = 0, wait: float | None = None) -> None:
        """`status` is the provider's, 0 without an answer; `wait` how long it asks to be left alone, in seconds."""
        if self._over:
            return
        if isinstance(error, UpstreamError):
            self._balancer._note(self, error, status, wait)
        self.left()

    def left(self) -> None:
        """It ended, and that says nothing of the provider. Once more, or after the others, is nothing."""
        if self._over:
            return
        self._over = True
        health = self._health
        health.in_flight -= 1
        health.breaker.in_flight -= 1
        if self._probes:
            health.breaker.probing_until = 0.0


class Balancer:
    """The health of this process's targets. Opened and closed by app.py, which gives `follow` the providers there are.

    `tell` hears of what other processes should know, and must not raise; what they tell comes to `hear`.
    """

    def __init__(
        self, *, clock: Callable[[], float] = monotonic, tell: Callable[[Outage], None] = lambda outage: None
    ) -> None:
        self._clock = clock
        self._tell = tell
        self._breakers: dict[str, Breaker] = {}  # by provider
        self._healths: OrderedDict[tuple[str, str], Health] = OrderedDict()  # the least recently used first
        self._marks: dict[str, str] = {}  # of providers, by name
        self._listed: set[str] = set()  # providers whose list of models could be had once
        self.retrying = 0  # exchanges that ask a provider once more

    def follow(self, providers: Mapping[str, Provider]) -> None:
        """These are all. One with a new address or credential is a new one; refused credentials are forgiven."""
        marks = {name: mark_of(name, p.base_url, p.api_key or "") for name, p in providers.items()}
        same = {name for name, mark in marks.items() if self._marks.get(name) == mark}
        self._marks = marks
        self._listed &= same
        self._breakers = {name: breaker for name, breaker in self._breakers.items() if name in same}
        for breaker in self._breakers.values():
            if breaker.refused:
                breaker.close()
        for key in [key for key in self._healths if key[0] not in same]:
            del self._healths[key]

    def forget(self) -> None:
        """All that was met: everybody is asked again. What is under way ends as it would have."""
        self._breakers.clear()
        self._healths.clear()

    # --- who is asked -------------------------------------------------------------------------------------------------

    def begin(self, route: Route, excluded: Excluded = (), said: list[str] | None = None) -> Turn:
        """A turn at the target to ask next: of the first group that has one that is ready.

        Raises UpstreamUnavailable, or UpstreamRateLimited when it is all because providers asked for it. Those that are
        passed over are added to `said`, as `openai=open`.
        """
        now, first = self._clock(), route[0]
        if len(first) == 1 and not excluded:
            target = first[0]
            health = self._health(target)
            if health.ready(target, now):
                return Turn(self, target, health, now)
        return self._choose(route, excluded, [] if said is None else said, now)

    def _choose(self, route: Route, excluded: Excluded, said: list[str], now: float) -> Turn:
        for group in route:
            ready = []
            for target, health in self._known(group, excluded):
                if health.ready(target, now):
                    ready.append((target, health))
                else:
                    _say(said, target, health, now)
            if ready:
                target, health = ready[0] if len(ready) == 1 else _pick(ready, now)
                return Turn(self, target, health, now)
        raise self._out(route, excluded, now)

    def _known(self, group: Sequence[Target], excluded: Excluded) -> Iterator[tuple[Target, Health]]:
        for target in group:
            if target.provider.name not in excluded and (target.provider.name, target.model) not in excluded:
                yield target, self._health(target)

    def _health(self, target: Target) -> Health:
        key = target.provider.name, target.model
        health = self._healths.get(key)
        if health is None:
            return self._add(key)
        self._healths.move_to_end(key)
        return health

    def _add(self, key: tuple[str, str]) -> Health:
        health = self._healths[key] = Health(self._breaker(key[0]), key[1])
        if len(self._healths) > MAX_TARGETS:
            self._healths.popitem(last=False)
        return health

    def _breaker(self, name: str) -> Breaker:
        return self._breakers.get(name) or self._breakers.setdefault(name, Breaker(name))

    def _out(self, route: Route, excluded: Excluded, now: float) -> GatewayError:
        every = [pair for group in route for pair in self._known(group, excluded)]
        wait = max(min((health.wait(target, now) for target, health in every), default=0.0), SHORTEST)
        names = ", ".join(dict.fromkeys(target.provider.name for target, _ in every))
        if every and all(
            health.limited_until > max(now, health.busy_until) and health.breaker.admits(target, now)
            for target, health in every
        ):
            words = f"{names} takes no more requests for this model at the moment; try again in {wait:.0f} s"
            return UpstreamRateLimited(words, retry_after=wait)
        if every and all(health.breaker.refused and not health.breaker.admits(target, now) for target, health in every):
            return ProviderAuth(f"{names} refused this gateway's credential; its operator has to mend it")
        words = f"no provider of this model can be asked at the moment ({names}); try again in {wait:.0f} s"
        return UpstreamUnavailable(words, retry_after=wait)

    def wait(self, route: Route, excluded: Excluded) -> float | None:
        """Seconds until one of these is ready; None when there is none."""
        now = self._clock()
        every = [pair for group in route for pair in self._known(group, excluded)]
        return min((health.wait(target, now) for target, health in every), default=None)

    @property
    def may_retry(self) -> bool:
        """Whether one more exchange may ask a provider once more."""
        in_flight = sum(breaker.in_flight for breaker in self._breakers.values())
        return self.retrying < max(RETRIES, RETRY_SHARE * in_flight)

    # --- what became of it --------------------------------------------------------------------------------------------

    def _note(self, turn: Turn, error: UpstreamError, status: int, wait: float | None) -> None:
        now, health, own = self._clock(), turn._health, turn.target.own_credential
        breaker = health.breaker
        if isinstance(error, ProviderAuth) and status in (400, 401):  # a 403 may be for what was asked
            breaker.refuse(now)
            self._announce(health, "refused", REFUSED)
        elif isinstance(error, _BLAMELESS):
            turn.answered()
        elif turn.finds_out:
            breaker.fail_probe(now)
        elif not (turn.again or (own and status)):  # what it answers to a caller's credential is between those two
            breaker.fail(now)
        if isinstance(error, UpstreamRateLimited) and not own:
            seconds = NO_QUOTA if error.error_code == "insufficient_quota" else _cooling(wait)
            health.limit(now + seconds)
            self._announce(health, "limited", seconds)
        elif isinstance(error, UpstreamOverloaded) and wait is not None:
            health.leave_alone(now + _cooling(wait))
            self._announce(health, "busy", _cooling(wait))

    def _announce(self, health: Health, cause: Cause, seconds: float) -> None:
        mark = self._marks.get(health.breaker.name)
        if mark is not None and seconds >= TOLD:
            self._tell(Outage(mark, "" if cause == "refused" else health.model, cause, seconds))

    def hear(self, outage: Outage) -> None:
        """What another process met."""
        name = next((name for name, mark in self._marks.items() if mark == outage.mark), None)
        if name is None:
            return
        now = self._clock()
        if outage.cause == "refused":
            breaker = self._breaker(name)
            if not breaker.open_until:
                breaker.refuse(now, min(outage.seconds, REFUSED))
            return
        health = self._healths.get((name, outage.model)) or self._add((name, outage.model))
        until = now + _cooling(outage.seconds)
        if outage.cause == "limited":
            health.limit(until)
        else:
            health.leave_alone(until)

    # --- the active look ----------------------------------------------------------------------------------------------

    async def run(self, look: Callable[[Collection[str]], Awaitable[object]]) -> None:
        """While a breaker is open, `look` is asked every few seconds to fetch the provider's list of models.

        Whoever fetches it, and whenever, says so to `looked`. Never returns.
        """
        while True:
            await asyncio.sleep(LOOK)
            if names := [b.name for b in self._breakers.values() if b.open_until and not b.refused]:
                await look(names)

    def looked(self, name: str, listed: bool) -> None:
        """A provider's list of models was asked for; a failure counts where it was to be had before."""
        breaker = self._breakers.get(name)
        if breaker is not None and (listed or name in self._listed):
            breaker.looked(self._clock(), listed=listed)
        if listed and name in self._marks:
            self._listed.add(name)

    # --- what people look at ------------------------------------------------------------------------------------------

    def state(self, name: str) -> State:
        """A provider's; `cooling`: some of its models are left alone, because it asked for that."""
        breaker, now = self._breakers.get(name), self._clock()
        if breaker is None:
            return "closed"
        state = breaker.state(now)
        return "cooling" if state == "closed" and now < breaker.cooling_until else state

    def is_in(self, name: str, state: State) -> bool:
        return self.state(name) == state

    def in_flight(self, name: str) -> int:
        breaker = self._breakers.get(name)
        return breaker.in_flight if breaker is not None else 0

    def report(self, name: str, known: Collection[str]) -> Mapping[str, Any]:
        """For /health: a provider's state, its requests in flight, and for how many seconds it is left alone.

        Models are named when `known` has them: other names were made up by clients.
        """
        now, breaker = self._clock(), self._breakers.get(name)
        return {
            "state": self.state(name),
            "in_flight": self.in_flight(name),
            "left_alone_seconds": round(breaker.wait(now), 1) if breaker is not None else 0.0,
            "cooling_models": {
                model if model in known else "other": round(left, 1) for model, left in self._cooling_models(name, now)
            },
        }

    def _cooling_models(self, name: str, now: float) -> Iterator[tuple[str, float]]:
        breaker = self._breakers.get(name)
        if breaker is None or now >= breaker.cooling_until:
            return  # clients make up thousands of names, and most of the time none of them is left alone
        for (provider, model), health in self._healths.items():
            if provider == name and (left := health.cooling(now)):
                yield model, left


def _pick(ready: Sequence[tuple[Target, Health]], now: float) -> tuple[Target, Health]:
    """At random by weight among those that have less than their share of what is in flight.

    Idle targets are asked exactly by their weights, a tenth of a load never goes to a target of a hundredth, and one
    that is stuck gets no more than its share.
    """
    fastest = min((health.first_text for _, health in ready if health.first_text), default=0.0)
    bound = max(SLOW, OUTLIER * fastest)
    quick = [pair for pair in ready if pair[1].first_text <= bound or now - pair[1].begun >= AGAIN] or ready
    weight = sum(target.weight for target, _ in quick)
    load = 1 + sum(health.in_flight for _, health in quick)
    free = [pair for pair in quick if pair[1].in_flight * weight < pair[0].weight * load]
    return random.choices(free, [target.weight for target, _ in free])[0]  # noqa: S311 (nobody guesses it for gain)


def _say(said: list[str], target: Target, health: Health, now: float) -> None:
    word = f"{target.provider.name}={'cooling' if health.breaker.admits(target, now) else 'open'}"
    if word not in said:
        said.append(word)


def _cooling(wait: float | None) -> float:
    return min(max(wait or 0.0, SHORTEST), LONGEST_COOLING)
