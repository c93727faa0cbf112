"""Whose turn it is to ask. The questions themselves are in test_usage.py, beside the rows that they are about."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from gateway.protocol.errors import Unavailable
from gateway.stores import stats as stats_module
from gateway.stores.stats import MAX_QUESTIONS, Turns

pytestmark = pytest.mark.unit


class Asker:
    """Takes a turn and keeps it until told to end."""

    def __init__(self, turns: Turns, account_id: str) -> None:
        self.asks = False
        self.end = asyncio.Event()
        self.task = asyncio.create_task(self._ask(turns, account_id))

    async def _ask(self, turns: Turns, account_id: str) -> None:
        async with turns.take(account_id):
            self.asks = True
            await self.end.wait()
            self.asks = False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def settle() -> None:
    """Everybody who can go on has gone on."""
    for _ in range(20):
        await asyncio.sleep(0)


async def end(*askers: Asker) -> None:
    for asker in askers:
        asker.end.set()
    await asyncio.gather(*(asker.task for asker in askers))


async def test_one_account_asks_one_question_at_a_time() -> None:
    turns = Turns()
    first, second = Asker(turns, "ann"), Asker(turns, "ann")
    await settle()
    assert (first.asks, second.asks) == (True, False)
    await end(first)
    await until(lambda: second.asks)
    await end(second)


async def test_an_account_in_a_hurry_is_not_in_the_way_of_another() -> None:
    turns = Turns()
    hurried = [Asker(turns, "ann") for _ in range(40)]
    other = Asker(turns, "ben")
    await until(lambda: other.asks)
    await end(other, *hurried)


async def test_all_accounts_together_ask_no_more_than_a_few_questions_at_once() -> None:
    turns = Turns()
    askers = [Asker(turns, f"account {number}") for number in range(10)]
    for served in range(10):
        await settle()
        assert sum(asker.asks for asker in askers) == min(MAX_QUESTIONS, 10 - served)
        await end(next(asker for asker in askers if asker.asks))


@pytest.mark.parametrize("account", ["ann", "somebody else"])
async def test_whose_turn_does_not_come_is_told_to_try_again(account: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_module, "TURN_TIMEOUT", 0.01)
    turns = Turns()
    async with AsyncExitStack() as held:
        for name in ("ann", *(f"account {number}" for number in range(MAX_QUESTIONS - 1))):
            await held.enter_async_context(turns.take(name))
        with pytest.raises(Unavailable) as caught:
            async with turns.take(account):
                raise AssertionError("it was its turn")
        assert (caught.value.error_code, caught.value.retry_after) == ("stats_busy", 1)
    async with turns.take(account):
        pass


async def test_who_leaves_the_queue_takes_no_turn_along() -> None:
    turns = Turns()
    holder, other = Asker(turns, "ann"), Asker(turns, "ben")
    await settle()
    leaving = [Asker(turns, name) for name in ("ann", "ben", "carol")]
    await settle()
    for asker in leaving:
        asker.task.cancel()
    await asyncio.gather(*(asker.task for asker in leaving), return_exceptions=True)
    await end(holder, other)
    last = [Asker(turns, name) for name in ("ann", "carol")]
    await until(lambda: all(asker.asks for asker in last))
    await end(*last)


async def test_accounts_that_asked_are_not_remembered() -> None:
    turns = Turns()
    for number in range(100):
        async with turns.take(f"account {number}"):
            pass
    assert len(turns._own) <= 1
