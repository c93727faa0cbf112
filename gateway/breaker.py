"""What is known of providers and their targets: a provider's breaker, a target's cool-down. Changed by the balancer."""

from collections import deque
from typing import Literal

from gateway.protocol.routing import Target

FAILURES, WINDOW = 5, 10.0  # failures within so many seconds open it, unless as many requests went well
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0  # seconds that it is open; each probe that fails doubles it
REFUSED = 60.0  # seconds without a provider that refused the operator's credential
PROBE = 5.0  # seconds that one request finds out alone; an answer that is not streamed may take minutes
SHORTEST = 1.0  # seconds; nobody is told to come back sooner
LOOKED = 4.0  # seconds that a look which failed keeps it open

State = Literal["closed", "half_open", "open", "cooling"]
STATES: tuple[State, ...] = ("closed", "half_open", "open", "cooling")


class Breaker:
    """One provider's: when it fails again and again nobody asks it for a while, then one request at a time does.

    Closed while `open_until` is 0, then open until that time, then half-open.
    """

    __slots__ = (
        "_failures", "_misled", "_pause", "_shown", "cooling_until", "in_flight", "name", "open_until", "opened",
        "probing_until", "refused", "successes",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.in_flight = 0
        self.successes = 0
        self._failures: deque[tuple[float, int]] = deque(maxlen=FAILURES)  # when, and after how many successes
        self.cooling_until = 0.0  # when the last of its targets has cooled down, seconds, monotonic
        self.open_until = 0.0  # likewise
        self.opened = 0.0  # likewise
        self._pause = FIRST_PAUSE  # of the next opening
        self.refused = False  # it is open because the operator's credential was refused
        self.probing_until = 0.0  # a request is finding out, and no other till then
        self._shown = False  # its list of models could be had, so it was made half-open
        self._misled = False  # and yet the request failed: its list says nothing

    def admits(self, target: Target, now: float) -> bool:
        if not self.open_until or (self.refused and target.own_credential):
            return True
        return now >= max(self.open_until, self.probing_until)

    def probes(self, target: Target) -> bool:
        """Whether a request that was admitted is the one that finds out."""
        return bool(self.open_until) and not (self.refused and target.own_credential)

    def fail(self, now: float) -> None:
        if self.open_until:
            return  # it was under way when the others failed
        failures = self._failures
        failures.append((now, self.successes))
        since, successes = failures[0]
        if len(failures) == FAILURES and now - since <= WINDOW and self.successes - successes <= FAILURES:
            self._open(now, self._pause)

    def fail_probe(self, now: float) -> None:
        self._misled = self._misled or self._shown
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._open(now, self._pause)

    def refuse(self, now: float, seconds: float = REFUSED) -> None:
        self._open(now, seconds)
        self.refused = True

    def _open(self, now: float, seconds: float) -> None:
        self.opened, self.open_until, self.probing_until = now, now + seconds, 0.0
        self.refused = self._shown = False

    def close(self) -> None:
        self._failures.clear()
        self.open_until, self.probing_until, self._pause = 0.0, 0.0, FIRST_PAUSE
        self.refused = self._shown = self._misled = False

    def looked(self, now: float, *, listed: bool) -> None:
        """Its list of models was asked for, and could be had or not."""
        if not self.open_until or self.refused or self._misled:
            return
        if listed:
            self.open_until, self._shown = min(now, self.open_until), True
        elif now < self.open_until:
            self.open_until = max(self.open_until, min(now + LOOKED, self.opened + LONGEST_PAUSE))

    def state(self, now: float) -> State:
        if not self.open_until:
            return "closed"
        return "open" if now < self.open_until else "half_open"

    def wait(self, now: float) -> float:
        """Seconds until it may be asked."""
        return max(self.open_until - now, min(self.probing_until - now, SHORTEST), 0.0)


class Health:
    """One target's. Times in seconds, monotonic."""

    __slots__ = ("begun", "breaker", "busy_until", "first_text", "in_flight", "limited_until", "model")

    def __init__(self, breaker: Breaker, model: str) -> None:
        self.breaker = breaker
        self.model = model
        self.in_flight = 0
        self.limited_until = 0.0  # the operator's credential has used up a limit of the provider's
        self.busy_until = 0.0  # it has too much to do, whoever asks
        self.first_text = 0.0  # seconds from the request to it, on average; 0: not known
        self.begun = 0.0  # the last turn

    def ready(self, target: Target, now: float) -> bool:
        if self.breaker.open_until and not self.breaker.admits(target, now):
            return False
        return self.busy_until <= now and (self.limited_until <= now or target.own_credential)

    def wait(self, target: Target, now: float) -> float:
        """Seconds until it is ready."""
        breaker = 0.0 if self.breaker.admits(target, now) else self.breaker.wait(now)
        return max(breaker, self.cooling(now, own=target.own_credential))

    def cooling(self, now: float, *, own: bool = False) -> float:
        """Seconds that are left of it."""
        return max(self.busy_until - now, 0.0 if own else self.limited_until - now, 0.0)

    def limit(self, until: float) -> None:
        self.limited_until = max(self.limited_until, until)
        self.breaker.cooling_until = max(self.breaker.cooling_until, until)

    def leave_alone(self, until: float) -> None:
        self.busy_until = max(self.busy_until, until)
        self.breaker.cooling_until = max(self.breaker.cooling_until, until)

    def note_first_text(self, seconds: float) -> None:
        self.first_text = 0.7 * self.first_text + 0.3 * seconds if self.first_text else seconds
