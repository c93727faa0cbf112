"""One timer looks at all that is open."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.client import Client
from gateway.connection import Connections
from gateway.metrics import Metrics
from gateway.pulse import Pulse
from gateway.settings import Settings

pytestmark = pytest.mark.unit

LIMITS = ("heartbeat", "first_byte_timeout", "idle_timeout", "total_timeout", "write_timeout", "header_timeout")
TIMES = dict.fromkeys(LIMITS, 0.05)


class Looked:
    """At; the first look at it may fail."""

    request_id = "01"

    def __init__(self, *, fails: bool = False, stalls: bool = False) -> None:
        self.looks = 0
        self.stalled = False
        self._stalls = stalls
        self._fails = fails

    def attach(self) -> None:
        """It has no connection."""

    def check(self, now: float, settings: Any) -> None:
        self.looks += 1
        self.stalled = self._stalls
        if self._fails:
            raise RuntimeError("a bug")


async def test_a_bug_in_one_exchange_does_not_stop_the_time_for_the_others() -> None:
    failing, other = Looked(fails=True), Looked()
    metrics = await looked_at(failing, other)
    assert metrics.internal_errors.labels("task").value >= 3


async def test_a_reader_that_is_dropped_is_counted_once() -> None:
    metrics = await looked_at(Looked(stalls=True))
    assert metrics.slow_clients.labels("read").value == 1


async def looked_at(*clients: Looked) -> Metrics:
    """Three times each."""
    settings = SimpleNamespace(**{f"gateway_{name}": seconds for name, seconds in TIMES.items()})
    metrics = Metrics()
    pulse = Pulse(cast(Settings, settings), Connections(metrics, header_timeout=1, write_timeout=1), metrics)
    for client in clients:
        pulse.watch(cast(Client, client))
    task = asyncio.create_task(pulse.run())
    async with asyncio.timeout(5):
        while min(client.looks for client in clients) < 3:
            await asyncio.sleep(0.005)
    task.cancel()
    return metrics
