import asyncio
from collections.abc import Callable
from time import monotonic, perf_counter
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.stores import syncing
from gateway.stores.syncing import Alarm, SyncThread, Waiting

pytestmark = pytest.mark.integration


@pytest.fixture(params=["timerfd", "the loop's timer"])
def timer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "timerfd":
        monkeypatch.setattr(syncing, "_LIBC", SimpleNamespace())
    return str(request.param)


async def until(true: Callable[[], object], seconds: float = 20) -> None:
    deadline = monotonic() + seconds
    while not true():
        assert monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.001)


async def test_an_alarm_rings_once_and_not_when_it_was_set_off(timer: str) -> None:
    rung: list[float] = []
    alarm = Alarm(lambda: rung.append(perf_counter()))
    started = perf_counter()
    alarm.set(0.0005)
    await until(lambda: rung)
    assert rung[0] - started >= 0.0005
    alarm.set(0.005)
    alarm.set(0)
    alarm.set(0.01)
    alarm.set(30)
    await asyncio.sleep(0.05)
    assert len(rung) == 1
    alarm.close()


async def test_an_alarm_waits_for_what_is_left_when_the_loop_is_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syncing, "_LIBC", SimpleNamespace())
    loop, rung, asked = asyncio.get_running_loop(), list[float](), list[float]()

    def early(seconds: float, *call: Any) -> asyncio.TimerHandle:
        asked.append(seconds)
        return loop.call_later(seconds / 2, *call)

    alarm = Alarm(lambda: rung.append(perf_counter()))
    monkeypatch.setattr(alarm, "_loop", SimpleNamespace(call_later=early))
    started = perf_counter()
    alarm.set(0.02)
    await until(lambda: rung)
    assert rung[0] - started >= 0.02
    assert len(asked) > 1
    alarm.close()


async def test_who_waits_is_released_by_the_disk_or_by_the_clock_each_for_himself(timer: str) -> None:
    waiting = Waiting()
    short, long, reached = (
        asyncio.create_task(waiting.wait(records, seconds)) for records, seconds in ((2, 0.001), (2, 30), (1, 30))
    )
    await asyncio.sleep(0)
    waiting.reached(1)
    await asyncio.wait_for(reached, 20)
    await asyncio.wait_for(short, 20)
    assert not long.done()
    waiting.reached(2)
    await asyncio.wait_for(long, 20)
    waiting.close()


async def test_one_who_leaves_is_no_trouble_to_the_others() -> None:
    waiting = Waiting()
    leaves, stays = (asyncio.create_task(waiting.wait(1, 30)) for _ in range(2))
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.sleep(0)
    waiting.reached(1)
    await asyncio.wait_for(stays, 20)
    waiting.close()


async def test_the_thread_does_one_thing_after_the_other_and_tells_what_they_raised() -> None:
    thread = SyncThread()
    done: list[object] = []

    def fail() -> None:
        raise OSError("no disk")

    thread.start(fail, done.append)
    thread.start(lambda: None, done.append)
    await until(lambda: len(done) == 2)
    assert str(done[0]) == "no disk" and done[1] is None
    thread.shutdown()
    thread.shutdown()
