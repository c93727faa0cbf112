"""A time limit that somebody else's clock calls out."""

import asyncio
from time import monotonic

import pytest

from gateway.deadline import Deadline

pytestmark = pytest.mark.unit


async def test_what_is_awaited_ends_with_a_timeout_when_it_expires() -> None:
    async def wait(deadline: Deadline) -> None:
        with deadline:
            await asyncio.sleep(60)

    deadline = Deadline(5)
    assert 4 < deadline.at - monotonic() <= 5
    task = asyncio.create_task(wait(deadline))
    await asyncio.sleep(0)
    deadline.expire()
    deadline.expire()  # the pulse may look again before the task has run
    with pytest.raises(TimeoutError):
        await task
    assert task.cancelling() == 0


async def test_a_cancellation_by_somebody_else_goes_on() -> None:
    async def wait() -> None:
        with Deadline(5):
            await asyncio.sleep(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_that_comes_with_the_end_of_the_time_is_not_lost() -> None:
    async def wait(deadline: Deadline) -> None:
        with deadline:
            await asyncio.sleep(60)

    deadline = Deadline(5)
    task = asyncio.create_task(wait(deadline))
    await asyncio.sleep(0)
    task.cancel()
    deadline.expire()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_ends_in_time_knows_nothing_of_it_and_errors_pass() -> None:
    deadline = Deadline(5)
    with deadline:
        await asyncio.sleep(0)
    with pytest.raises(ValueError, match="other"), Deadline(5):
        raise ValueError("other")
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]
