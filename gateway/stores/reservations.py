"""One exchange's reservation of its payers' budgets, and what Redis is asked of it (budgets.lua)."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gateway.exchange import new_id
from gateway.protocol.errors import Unavailable
from gateway.stores.payers import Payers, Tariff, day_at
from gateway.stores.script import Operation, RedisScript
from gateway.stores.spending import Spent

if TYPE_CHECKING:
    from gateway.stores.budgets import Budgets

SLICE = 256  # output tokens of a stream that are reserved at a time


class Reservation:
    """What an exchange may still use. Made by `Budgets.reserve`, used by the relay, settled by the recorder."""

    __slots__ = (
        "_asked", "_budgets", "_mark", "_settled", "day", "epoch", "exchange_id", "granted", "headers", "local",
        "payers", "started_at", "tariff", "told",
    )  # fmt: skip

    def __init__(self, budgets: "Budgets", exchange_id: str, payers: Payers, started_at: float, tariff: Tariff) -> None:
        self._budgets = budgets
        self.exchange_id = exchange_id
        self.payers = payers
        self.started_at = started_at  # when the exchange began, seconds since the epoch
        self.day = day_at(started_at)
        self.tariff = tariff
        self.granted = 0  # output tokens that may pass, in all; grows
        self.headers: dict[str, str] = {}  # x-ratelimit-*-tokens, of the payer nearest to its tokens a minute
        self.epoch = 0  # of the memory of Redis that has a hold of it; 0: Redis has not said so
        self.told = False  # Redis may have a hold of it
        self.local = False  # some of it was granted without Redis
        self._mark = 0  # output tokens; from here on the next slice is asked for
        self._asked: asyncio.Task[None] | None = None  # for more; owned by `budgets`
        self._settled = False

    @property
    def tokens(self) -> int:
        """Reserved, of prompt and output."""
        return self.tariff.tokens(self.granted) if self.granted else 0

    @property
    def micros(self) -> int:
        return self.tariff.micros(self.granted) if self.granted else 0

    @property
    def binding(self) -> bool:
        """Whether there is a budget to hold it to, and not only a limit of tokens a minute."""
        return self.payers.binding

    @property
    def settled(self) -> bool:
        return self._settled

    def used(self, tokens: int) -> bool:
        """Called with the output so far, at every chunk. False: the end of what is granted is reached.

        When half a slice is left the next one is asked for, in the background.
        """
        if tokens < self._mark:
            return True
        if tokens < self.granted:
            self._mark = self.granted
            self._ask(self.granted + SLICE)
            return True
        return False

    async def more(self, tokens: int) -> bool:
        """After `used` said False: waits for the answer under way, or asks. False: nothing is left, cut the stream."""
        if self._asked is not None:
            await asyncio.wait({self._asked})
        if tokens >= self.granted:  # what was asked in the background may have been for less than has passed since
            await asyncio.wait({self._asked or self._ask(tokens + SLICE)})
        return tokens < self.granted

    def settle(self, tokens: int, micros: int) -> None:
        """What it used in the end, in all; the rest goes back. Never waits and never raises; once more is nothing."""
        if not self._settled:
            self._settled = True
            if self._asked is not None:
                self._asked.cancel()
            self._budgets.ended(self, tokens, micros)

    # --- written by `Budgets` ---

    def take(self, granted: int, wanted: int, epoch: int) -> None:
        """Redis granted so much, in all, and has a hold of it."""
        if granted >= self.granted:
            self.granted, self.epoch = granted, epoch
        self._mark = self._half_left() if granted >= wanted else self.granted

    def take_here(self, granted: int) -> None:
        self.local = True
        self.granted = granted
        self._mark = self._half_left()

    def _half_left(self) -> int:
        return self.granted - min(self.granted, SLICE) // 2

    def _ask(self, output: int) -> asyncio.Task[None]:
        self._asked = self._budgets.start(self._grow(output))
        return self._asked

    async def _grow(self, output: int) -> None:
        try:
            await self._budgets.grant(self, output)
        except Unavailable:  # Redis has lost its memory and the ledger cannot be read
            self._budgets.grant_here(self, output)
        finally:
            self._asked = None


# --- what Redis is asked ------------------------------------------------------------------------------------------


class _Question(Operation):
    """`answer` is the script's; None: Redis is gone."""

    __slots__ = ("answer",)

    def __init__(self) -> None:
        self.answer: asyncio.Future[Sequence[int] | None] = asyncio.get_running_loop().create_future()

    def wanted(self) -> bool:
        return not self.answer.done()

    def answered(self, answer: str) -> None:
        if not self.answer.done():
            self.answer.set_result(list(map(int, answer.split())))

    def lost(self) -> None:
        if not self.answer.done():
            self.answer.set_result(None)


class Ask(_Question):
    """For so much output, in all."""

    __slots__ = ("_output", "_reservation")

    def __init__(self, reservation: Reservation, output: int) -> None:
        super().__init__()
        self._reservation = reservation
        self._output = output

    def line(self) -> str:
        reservation, tariff = self._reservation, self._reservation.tariff
        reservation.told = True
        return (
            f"{'extend' if reservation.granted else 'reserve'} {reservation.exchange_id} {reservation.day}"
            f" {tariff.prompt_tokens} {self._output} {tariff.prompt_micros} {tariff.output_micros(self._output)}"
            f" {reservation.payers.words}"
        )


class Keep(Operation):
    """It still runs. A hold that Redis does not have is made again."""

    __slots__ = ("_reservation", "_script")

    def __init__(self, script: RedisScript, reservation: Reservation) -> None:
        self._script = script
        self._reservation = reservation

    def line(self) -> str:
        reservation = self._reservation
        reservation.told = True
        return (
            f"keep {reservation.exchange_id} {reservation.day} {reservation.tokens} {reservation.micros}"
            f" {reservation.payers.hold_words}"
        )

    def wanted(self) -> bool:
        return not self._reservation.settled

    def answered(self, answer: str) -> None:
        if int(answer):
            self._reservation.epoch = self._script.epoch


class Settle(Operation):
    """What an exchange used. `reservation`: of its owner, who knows what to charge when its hold was lost."""

    __slots__ = ("_exchange_id", "_micros", "_reservation", "_script", "_tokens")

    def __init__(
        self, script: RedisScript, exchange_id: str, tokens: int, micros: int, reservation: Reservation | None = None
    ) -> None:
        self._script = script
        self._exchange_id = exchange_id
        self._tokens = tokens
        self._micros = micros
        self._reservation = reservation

    def line(self) -> str:
        words = f"settle {self._exchange_id} {self._tokens} {self._micros}"
        held = self._reservation
        return f"{words} {held.epoch} {held.day} {held.payers.hold_words}" if held else words

    def lost(self) -> None:
        self._reservation = None  # when Redis is back without its memory, the ledger has it
        self._script.send(self)


class Owe(Operation):
    """What a payer used while Redis was gone."""

    __slots__ = ("_script", "_words")

    def __init__(self, script: RedisScript, epoch: int, subject: str, day: int, tokens: int, micros: int) -> None:
        self._script = script
        self._words = f"owe {new_id()} {epoch} {subject} {day} {tokens} {micros}"

    def line(self) -> str:
        return self._words

    def lost(self) -> None:
        self._script.send(self)


class Seed(Operation):
    """The counters of a payer, from the ledger."""

    __slots__ = ("_words",)

    def __init__(self, subject: str, day: int, spent: Spent) -> None:
        self._words = f"seed {subject} {day} {spent.tokens_day} {spent.micros_day} {spent.micros_month}"

    def line(self) -> str:
        return self._words


class Look(_Question):
    """What a payer spent; nothing: Redis does not know."""

    __slots__ = ("_words",)

    def __init__(self, subject: str, day: int) -> None:
        super().__init__()
        self._words = f"spent {subject} {day}"

    def line(self) -> str:
        return self._words
