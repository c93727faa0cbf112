"""Who pays for an exchange, what it costs them by its output, and what they may use while Redis is gone."""

from collections import OrderedDict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

from gateway.exchange import Budget, Principal
from gateway.protocol.pricing import PICO, Price
from gateway.stores.grants import Buckets

DEPLOYMENT = "all"
MAX_SHARES = 10_000  # payers whose remainders are remembered: 2 MB
# Of one exchange: what a client asks for or a provider reports beyond that is nonsense, and would break sums in Redis.
MOST_TOKENS = 10**9
_MOST = 2**53 - 1  # what Lua counts exactly
_NO_LIMIT = 2**62


class Payer:
    """A key (`k:` and its id), an account (`a:` and its id) or the deployment (`all`), with its budget."""

    __slots__ = ("budget", "counted", "has_cost", "subject")

    def __init__(self, subject: str, budget: Budget) -> None:
        self.subject = subject
        self.budget = budget
        self.has_cost = bool(budget.cost_per_day or budget.cost_per_month)
        # Whether what it spends must be known; a limit of tokens a minute alone needs no more than its bucket.
        self.counted = bool(budget.tokens_per_day or self.has_cost)


class Payers:
    """Those who pay for what one key asks, and have a budget; made once for each key. Never changed."""

    __slots__ = ("all", "binding", "covered", "has_cost", "hold_words", "principal", "words")

    def __init__(self, principal: Principal, deployment: Budget) -> None:
        self.principal = principal
        payers = (
            Payer(f"k:{principal.key_id}", principal.budget),
            Payer(f"a:{principal.account_id}", principal.account_budget),
            Payer(DEPLOYMENT, deployment),
        )
        self.all = tuple(payer for payer in payers if payer.budget)
        self.covered = bool(self.all)
        self.has_cost = any(payer.has_cost for payer in self.all)
        self.binding = any(payer.counted for payer in self.all)  # not only by limits of tokens a minute
        # As budgets.lua reads them of a "reserve", and of a hold.
        self.words = " ".join([_words(payer) for payer in self.all])
        self.hold_words = " ".join([_hold_words(payer) for payer in self.all])


def _words(payer: Payer) -> str:
    budget = payer.budget
    limits = (budget.tokens_per_minute, budget.tokens_per_day, budget.cost_per_day, budget.cost_per_month)
    return f"{payer.subject} {' '.join([str(min(limit, _MOST)) for limit in limits])}"


def _hold_words(payer: Payer) -> str:
    return f"{payer.subject} {min(payer.budget.tokens_per_minute, _MOST)} {payer.counted:d}"


class Tariff(NamedTuple):
    """What an exchange costs by its output, rounded up."""

    prompt_tokens: int
    prompt_micros: int = 0
    rate: int = 0  # pico-dollars a token of output

    @classmethod
    def of(cls, prompt_tokens: int, price: Price | None) -> "Tariff":
        """The dearest that it can be: all of the prompt written to the provider's cache, all of the output thought."""
        if prompt_tokens > MOST_TOKENS:
            prompt_tokens = MOST_TOKENS
        if price is None:
            return cls(prompt_tokens)
        if price.tiers:
            price = price.for_prompt(prompt_tokens)
        prompt_micros = -(-prompt_tokens * max(price.input, price.cache_write) // PICO)
        return cls(prompt_tokens, prompt_micros, max(price.output, price.reasoning))

    def tokens(self, output: int) -> int:
        return self.prompt_tokens + output

    def micros(self, output: int) -> int:
        return self.prompt_micros + self.output_micros(output)

    def output_micros(self, output: int) -> int:
        return -(-output * self.rate // PICO)

    def output_for(self, micros: int) -> int:
        """Tokens of output that this much money pays for; below 0 when it does not pay for the prompt."""
        left = micros - self.prompt_micros
        if not self.rate:
            return _NO_LIMIT if left >= 0 or not self.prompt_micros else -1
        return left * PICO // self.rate


class _Share:
    __slots__ = ("day", "micros", "own", "tokens")

    def __init__(self) -> None:
        self.day = 0
        self.tokens = 0
        self.micros = 0
        self.own = False  # divided among the nodes


class Shares:
    """What is left of budgets as Redis said last, and each node's share of that while Redis is gone.

    Written by `Budgets` alone.
    """

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._shares: OrderedDict[str, _Share] = OrderedDict()  # by subject, the least recently used first
        self._buckets = Buckets()  # of tokens a minute; only in use without Redis

    def note(self, payer: Payer, day: int, tokens: int, micros: int) -> None:
        """What Redis said; below 0: no limit."""
        if not payer.counted:
            return
        share = self._shares.get(payer.subject)
        if share is None:
            share = self._shares[payer.subject] = _Share()
            if len(self._shares) > MAX_SHARES:
                self._shares.popitem(last=False)
        elif share.day > day:
            return  # of a stream that began yesterday
        else:
            self._shares.move_to_end(payer.subject)
        share.day, share.own = day, False
        share.tokens = tokens if tokens >= 0 else _NO_LIMIT
        share.micros = micros if micros >= 0 else _NO_LIMIT

    def affordable(self, payers: Sequence[Payer], day: int, tariff: Tariff, granted: int) -> int | None:
        """Tokens of output, in all, when so many were granted before (0: none, nor the prompt).

        None when a payer's remainder is not known for that day.
        """
        tokens, micros = (tariff.tokens(granted), tariff.micros(granted)) if granted else (0, 0)
        most = _NO_LIMIT
        for payer in payers:
            if payer.counted:
                share = self._own_share(payer.subject, day)
                if share is None:
                    return None
                most = min(most, share.tokens + tokens - tariff.prompt_tokens)
                most = min(most, tariff.output_for(share.micros + micros))
        return most

    def take(self, payers: Sequence[Payer], tokens: int, micros: int, now: float) -> None:
        """Less than nothing: it is put back."""
        for payer in payers:
            share = self._shares.get(payer.subject)
            if share is not None:
                share.tokens -= tokens
                share.micros -= micros
            if payer.budget.tokens_per_minute:
                rate, _ = self._pace(payer)
                self._buckets.take(payer.subject, rate, now, tokens)

    def too_fast(self, payers: Sequence[Payer], tokens: int, now: float) -> tuple[Payer, float] | None:
        """Who uses its tokens too fast for so many more, and for how many seconds."""
        for payer in payers:
            if payer.budget.tokens_per_minute:
                rate, burst = self._pace(payer)
                wait = self._buckets.room_after(payer.subject, rate, burst, now, min(tokens, burst))
                if wait > 0:
                    return payer, wait
        return None

    def _own_share(self, subject: str, day: int) -> _Share | None:
        share = self._shares.get(subject)
        if share is None or share.day != day:
            return None
        if not share.own:
            share.own = True
            share.tokens //= self._nodes
            share.micros //= self._nodes
        return share

    def _pace(self, payer: Payer) -> tuple[float, int]:
        """Tokens a second, and how many there are at once."""
        burst = max(payer.budget.tokens_per_minute // self._nodes, 1)
        return burst / 60, burst


# --- days and months ----------------------------------------------------------------------------------------------


def day_of(at: datetime) -> int:
    """YYYYMMDD of an aware time in UTC."""
    return (at.year * 100 + at.month) * 100 + at.day


def day_at(seconds: float) -> int:
    """The same of a time in seconds since the epoch."""
    return _day(int(seconds // 86400))


@lru_cache(2)
def _day(number: int) -> int:
    """Of the day that comes so many days after 1970-01-01."""
    return day_of(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(number))


def day_ends(at: datetime) -> datetime:
    return at.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)


def month_ends(at: datetime) -> datetime:
    first = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + timedelta(days=32)).replace(day=1)
