"""One timer looks at all that is open."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.client import Client
from gateway.pulse import Pulse
from gateway.settings import Settings

pytestmark = pytest.mark.unit

TIMES = dict.fromkeys(("heartbeat", "first_byte_timeout", "idle_timeout", "total_timeout", "write_timeout"), 0.05)


class Looked:
    """At; the first look at it may fail."""

    def __init__(self, *, fails: bool) -> None:
        self.looks = 0
        self._fails = fails

    def attach(self) -> None:
        """It has no connection."""

    def check(self, now: float, settings: Any) -> None:
        self.looks += 1
        if self._fails:
            raise RuntimeError("a bug")


async def test_a_bug_in_one_exchange_does_not_stop_the_time_for_the_others() -> None:
    bugs: list[int] = []
    settings = SimpleNamespace(**{f"gateway_{name}": seconds for name, seconds in TIMES.items()})
    pulse = Pulse(cast(Settings, settings), on_bug=lambda: bugs.append(1))
    failing, other = Looked(fails=True), Looked(fails=False)
    pulse.watch(cast(Client, failing))
    pulse.watch(cast(Client, other))
    task = asyncio.create_task(pulse.run())
    async with asyncio.timeout(5):
        while min(failing.looks, other.looks) < 3:
            await asyncio.sleep(0.005)
    task.cancel()
    assert len(bugs) >= 3
