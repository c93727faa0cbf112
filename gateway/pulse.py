"""One coarse timer for all that is being answered: heartbeats, silent providers, readers that stopped; and the drain.

A timer for every read would cost more than the read. One tick looks at every open exchange instead, at least ten times
in the shortest interval and at least once a second, so that a limit of 60 s holds to within a second.
"""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from gateway.client import Client
from gateway.protocol.errors import ShuttingDown
from gateway.settings import Settings

log = logging.getLogger("gateway.pulse")

LAST_WORDS = 1.0  # seconds that streams have for their error event when the drain is over


class Pulse:
    """All open exchanges. Opened and closed by app.py; each is there from `watch` to `forget`."""

    def __init__(self, settings: Settings, on_bug: Callable[[], None] = lambda: None) -> None:
        self._settings = settings
        self._on_bug = on_bug  # counts exceptions that nobody expected
        self._clients: set[Client] = set()
        self._in_flight = 0  # requests of any kind
        self.draining = False  # app: SIGTERM came, we are no longer ready
        self.refusing = False  # app: no new exchange is begun

    def enter(self) -> None:
        """With every request, and `leave` at its end: the drain waits for it."""
        self._in_flight += 1

    def leave(self) -> None:
        self._in_flight -= 1

    def watch(self, client: Client) -> None:
        """Until `forget`."""
        client.attach()
        self._clients.add(client)

    def forget(self, client: Client) -> None:
        client.detach()
        self._clients.discard(client)

    @property
    def idle(self) -> bool:
        return not self._in_flight

    @property
    def open_exchanges(self) -> int:
        return len(self._clients)

    async def run(self) -> None:
        settings = self._settings
        shortest = min(
            settings.gateway_heartbeat,
            settings.gateway_first_byte_timeout,
            settings.gateway_idle_timeout,
            settings.gateway_total_timeout,
            settings.gateway_write_timeout,
        )
        interval = min(1.0, shortest / 10)
        while True:
            await asyncio.sleep(interval)
            now = monotonic()
            for client in list(self._clients):
                try:
                    client.check(now, settings)
                except Exception:  # whatever is wrong with one, the others' limits still hold; counted
                    self._on_bug()
                    log.exception("looking at an exchange failed")

    async def drain(self, timeout: float) -> None:
        """Let what is open finish; after `timeout` seconds end it with an error that says why."""
        await self._until(lambda: self.idle, timeout)
        self.interrupt_all()
        await self._until(lambda: self.idle, LAST_WORDS)

    def interrupt_all(self) -> None:
        for client in list(self._clients):
            client.interrupt(ShuttingDown("the gateway is shutting down; please try again", retry_after=1))

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = monotonic() + seconds
        while not condition() and monotonic() < deadline:  # noqa: ASYNC110 - what it waits for changes in many places
            await asyncio.sleep(0.02)
