"""Budgets: what an exchange may use, reserved before it runs and while it does, settled when it ends.

They are charged as telecoms charge calls (RFC 8506 5.2: units are granted, used, reported): a reservation charges the
counters of all its payers at once, so that whoever asks next sees what is left; its settlement charges or gives back
the difference. A stream reserves a slice of output at a time, the next one while it goes on. The counters are in Redis;
what Redis does not have is made from the ledger in Postgres (budgets.lua).

Rule 1: all payers are charged or none, and never more than is left.
Rule 2: an exchange counts once. Its hold says what is charged for it: whoever settles first (its owner, or who found
the journal of an owner that was killed) takes the hold away, and the other finds none.
Rule 3: what Redis has not heard is said to it when it is back: what was used meanwhile, and what runs when it lost its
memory. Only what ends while counters are made anew, and is not in the ledger when they are read, is not counted.
"""

import asyncio
import logging
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from gateway.exchange import NO_BUDGET, Budget, Principal
from gateway.protocol.errors import PermissionDenied, QuotaExhausted, RateLimited, Unavailable
from gateway.protocol.pricing import Price
from gateway.stores.payers import MOST_TOKENS, Payer, Payers, Shares, Tariff, day_ends, day_of, month_ends
from gateway.stores.postgres import Pool
from gateway.stores.reservations import SLICE as SLICE
from gateway.stores.reservations import Ask, Keep, Look, Owe, Seed, Settle
from gateway.stores.reservations import Reservation as Reservation
from gateway.stores.script import OnRedisDown, RedisScript
from gateway.stores.spending import Spent, read_spent

log = logging.getLogger(__name__)

MAX_MICROS = 10**12  # of one exchange: a million dollars
MAX_PAYERS = 10_000  # keys whose payers are remembered: 10 MB if each had three
READERS = 2  # counters that are made from the ledger at once: a small part of the pool, which also looks up keys
ATTEMPTS = 3  # to reserve; after each one counters that were missing are made

# By their numbers in budgets.lua.
_GRANTED, _UNKNOWN, _EXHAUSTED = 0, 1, 2
_A_MONTH = 3


class Budgets:
    """One a process, on the script of that process; closed before it.

    `deployment` is the budget of all keys together. `nodes` is how many processes share what is left while Redis is
    gone. `flushed` returns when all usage that this process has ended by now is in the ledger, or raises Unavailable.
    """

    def __init__(
        self,
        script: RedisScript,
        pool: Pool,
        *,
        flushed: Callable[[], Awaitable[object]],
        deployment: Budget = NO_BUDGET,
        nodes: int = 1,
        on_redis_down: OnRedisDown = "local",
        clock: Callable[[], float] = time.time,
        on_local: Callable[[OnRedisDown], None] = lambda mode: None,
    ) -> None:
        self._script = script
        self._pool = pool
        self._flushed = flushed
        self._deployment = deployment
        self._on_redis_down = on_redis_down
        self._on_local = on_local  # hears of every first decision without Redis, and of what made it; must not raise
        self._clock = clock  # seconds since the epoch
        self._shares = Shares(nodes)
        self._payers: dict[str, Payers] = {}  # by key id
        self._running: dict[str, Reservation] = {}  # by exchange id; until they are settled
        # What Redis is to be charged, without a hold: epoch, subject and day -> tokens, micros.
        self._owed: defaultdict[tuple[int, str, int], list[int]] = defaultdict(lambda: [0, 0])
        self._making: dict[tuple[str, int], asyncio.Task[bool]] = {}  # counters, by subject and day
        self._reading = asyncio.Semaphore(READERS)
        self._tasks: set[asyncio.Task[Any]] = set()  # these, and extensions; ended by close
        script.beats.append(self._beat)

    def covers(self, principal: Principal) -> bool:
        """Whether the key, its account or the deployment has a budget."""
        return self._payers_of(principal).covered

    def _payers_of(self, principal: Principal) -> Payers:
        """Known since the key was changed last."""
        payers = self._payers.get(principal.key_id)
        if payers is None or payers.principal is not principal:
            if len(self._payers) >= MAX_PAYERS:
                self._payers.clear()
            payers = self._payers[principal.key_id] = Payers(principal, self._deployment)
        return payers

    async def reserve(
        self,
        principal: Principal,
        exchange_id: str,
        started_at: float,
        *,
        prompt_tokens: int,
        output_tokens: int,
        price: Price | None,
    ) -> Reservation:
        """The prompt and at most `output_tokens`: less when less is left, but one token at least.

        `started_at` is when the exchange began, seconds since the epoch: its day and its month are charged, as in the
        ledger. Raises QuotaExhausted (a budget), RateLimited (tokens a minute), PermissionDenied (a model without a
        price, where money is limited) and Unavailable. Then, and after a cancellation, nothing is charged.
        """
        payers = self._payers_of(principal)
        if price is None and payers.has_cost:
            raise PermissionDenied(
                "no price is known for this model, so it cannot be held to a budget of dollars; the operator of this"
                " gateway sets one under [prices]",
                code="price_unknown",
            )
        reservation = Reservation(self, exchange_id, payers, started_at, Tariff.of(prompt_tokens, price))
        try:
            await self.grant(reservation, output_tokens)
        except BaseException:
            reservation.settle(0, 0)
            raise
        self._running[exchange_id] = reservation
        return reservation

    def settle(self, exchange_id: str, tokens: int, micros: int) -> None:
        """Of an exchange that a process which is dead now reserved for, when its row was found. Never waits."""
        self._script.send_later(Settle(self._script, exchange_id, *_plausible(tokens, micros)))

    async def spent(self, subject: str) -> Spent:
        """Today and this month by `k:<key id>`, `a:<account id>` or `all`; what runs counts as it is reserved.

        Raises Unavailable.
        """
        now = self._now()
        if not self._script.gone:
            look = Look(subject, day_of(now))
            self._script.send(look)
            if numbers := await look.answer:
                return Spent(*numbers)
        return await read_spent(self._pool, subject, now)

    async def close(self) -> None:
        """Ends what is asked in the background. What runs stays charged until it is settled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)

    # --- what a reservation asks ---

    async def grant(self, reservation: Reservation, output: int) -> None:
        """Makes of what is granted, in all, as much of `output` as all can pay for. Raises as `reserve` does.

        A reservation that has been granted something is never refused: it keeps that.
        """
        output = min(max(output, 1), MOST_TOKENS)
        for _ in range(ATTEMPTS):
            if self._script.gone:
                break
            ask = Ask(reservation, output)
            self._script.send(ask)
            numbers = await ask.answer
            if numbers is None:
                break
            which, *rest = numbers
            if which == _GRANTED:
                self._take(reservation, output, rest)
                return
            if which != _UNKNOWN:
                self._refuse(reservation, which, *rest)
            started_at = datetime.fromtimestamp(reservation.started_at, UTC)
            await self._make([reservation.payers.all[number - 1] for number in rest], started_at)
        else:
            raise _unavailable()
        self.grant_here(reservation, output)

    def _take(self, reservation: Reservation, output: int, numbers: Sequence[int]) -> None:
        granted, who, left, full_after, *remainders = numbers
        remainder = iter(remainders)
        for payer in reservation.payers.all:
            self._shares.note(payer, reservation.day, next(remainder), next(remainder))
        if who and not reservation.granted:
            limit = reservation.payers.all[who - 1].budget.tokens_per_minute
            # https://platform.openai.com/docs/guides/rate-limits
            reservation.headers["x-ratelimit-limit-tokens"] = str(limit)
            reservation.headers["x-ratelimit-remaining-tokens"] = str(left)
            reservation.headers["x-ratelimit-reset-tokens"] = f"{full_after / 1e6:.3f}s"
        reservation.take(granted, output, self._script.epoch)

    def _refuse(self, reservation: Reservation, which: int, number: int, detail: int) -> NoReturn:
        """`detail` is the budget that is exhausted, or µs until the payer's bucket has room."""
        reservation.told = False  # nothing was charged
        payer = reservation.payers.all[number - 1]
        if which == _EXHAUSTED:
            raise self._exhausted(payer, detail)
        raise _too_fast(payer, detail / 1e6)

    def _exhausted(self, payer: Payer, which: int) -> QuotaExhausted:
        budget, now = payer.budget, self._now()
        ends = month_ends(now) if which == _A_MONTH else day_ends(now)
        amount = (
            f"{budget.tokens_per_day} tokens a day",
            f"{_dollars(budget.cost_per_day)} a day",
            f"{_dollars(budget.cost_per_month)} a month",
        )[which - 1]
        wait = max((ends - now) // timedelta(seconds=1), 1)
        return QuotaExhausted(
            f"the budget of {_whose(payer)} is used up: {amount}; it is renewed at {ends:%Y-%m-%dT%H:%MZ}",
            retry_after=wait,
        )

    # --- counters that Redis does not have ---

    async def _make(self, payers: Sequence[Payer], at: datetime) -> None:
        """Raises Unavailable."""
        tasks = [self._making.get((payer.subject, day_of(at))) or self._start_making(payer, at) for payer in payers]
        await asyncio.wait(tasks)  # they go on when we are cancelled: others wait as well
        if any(task.cancelled() or not task.result() for task in tasks):
            raise _unavailable()

    def _start_making(self, payer: Payer, at: datetime) -> asyncio.Task[bool]:
        task: asyncio.Task[bool] = self.start(self._make_one(payer.subject, at))
        self._making[payer.subject, day_of(at)] = task
        return task

    async def _make_one(self, subject: str, at: datetime) -> bool:
        try:
            await self._flushed()
            async with self._reading:
                spent = await read_spent(self._pool, subject, at)
        except Unavailable:
            log.warning("the counters of a budget cannot be made from the ledger")
            return False
        finally:
            del self._making[subject, day_of(at)]
        if not self._script.gone:  # when it is back this is old
            self._script.send(Seed(subject, day_of(at), spent))
            self._keep_all(held=False)
        return True

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that `close` ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- what Redis is told later ---

    def _beat(self) -> None:
        self._send_owed()
        self._keep_all(held=True)

    def _keep_all(self, *, held: bool) -> None:
        """Of those that run; without `held` only those that Redis has not confirmed since its memory began."""
        for reservation in self._running.values():
            if held or not self._holds(reservation):
                self._script.send_later(Keep(self._script, reservation))

    def _holds(self, reservation: Reservation) -> bool:
        return reservation.epoch == self._script.epoch and reservation.epoch != 0

    def ended(self, reservation: Reservation, tokens: int, micros: int) -> None:
        """It is settled; whether or not Redis has a hold of it."""
        self._running.pop(reservation.exchange_id, None)
        tokens, micros = _plausible(tokens, micros)
        if reservation.local and self._script.gone:
            more = tokens - reservation.tokens, micros - reservation.micros
            self._shares.take(reservation.payers.all, *more, self._script.clock())
        if reservation.epoch:
            owner = None if self._script.gone else reservation  # by then the ledger has it
            self._script.send(Settle(self._script, reservation.exchange_id, tokens, micros, owner))
            return
        if reservation.told:  # Redis may have charged it and could not say so
            self._script.send(Settle(self._script, reservation.exchange_id, 0, 0))
        for payer in reservation.payers.all:
            if payer.counted and (tokens or micros):
                owed = self._owed[self._script.epoch, payer.subject, reservation.day]
                owed[0] += tokens
                owed[1] += micros
        if not self._script.gone:
            self._send_owed()

    def _send_owed(self) -> None:
        for (epoch, subject, day), (tokens, micros) in self._owed.items():
            self._script.send(Owe(self._script, epoch, subject, day, tokens, micros))
        self._owed.clear()

    # --- without Redis ---

    def grant_here(self, reservation: Reservation, output: int) -> None:
        """From this node's share of what was left when Redis was heard last."""
        first = not reservation.granted
        if first and self._on_redis_down == "closed":
            self._on_local("closed")
            raise self._down()
        if self._on_redis_down == "open":
            if first:
                self._on_local("open")
            reservation.take_here(output)
            return
        now, payers, tariff = self._script.clock(), reservation.payers.all, reservation.tariff
        affordable = self._shares.affordable(payers, reservation.day, tariff, reservation.granted)
        granted = min(output, affordable or 0)
        if first and granted < 1:
            self._on_local("closed")
            raise self._down()
        if first:
            self._on_local("local")
        if first and (slow := self._shares.too_fast(payers, tariff.tokens(1), now)):
            raise _too_fast(*slow)
        if granted > reservation.granted:
            tokens, micros = reservation.tokens, reservation.micros
            reservation.take_here(granted)
            self._shares.take(payers, reservation.tokens - tokens, reservation.micros - micros, now)

    def _down(self) -> Unavailable:
        return _unavailable(self._script.pause)


def _plausible(tokens: int, micros: int) -> tuple[int, int]:
    return min(tokens, MOST_TOKENS), min(micros, MAX_MICROS)


# --- what a client reads ------------------------------------------------------------------------------------------


def _unavailable(retry_after: float = 1.0) -> Unavailable:
    return Unavailable(
        "the budgets cannot be checked at the moment", code="budget_unavailable", retry_after=retry_after
    )


def _too_fast(payer: Payer, wait: float) -> RateLimited:
    seconds = max(math.ceil(wait), 1)
    return RateLimited(
        f"{_whose(payer)} may use {payer.budget.tokens_per_minute} tokens a minute; try again in {seconds} s",
        retry_after=seconds,
    )


def _whose(payer: Payer) -> str:
    return {"k": "this key", "a": "this account"}.get(payer.subject.partition(":")[0], "this gateway")


def _dollars(micros: int) -> str:
    return "$" + f"{micros / 1e6:.6f}".rstrip("0").rstrip(".")
