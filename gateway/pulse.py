"""One coarse timer for all that is being answered: heartbeats, silent providers, readers that stopped; and the drain.

A timer for every read would cost more than the read. One tick looks at every open exchange instead, at least ten times
in the shortest interval and at least once a second, so that a limit of 60 s holds to within a second.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from time import monotonic

from gateway.client import Client
from gateway.connection import Connections
from gateway.metrics import Metrics
from gateway.protocol.errors import KeyEnded, ShuttingDown
from gateway.settings import Settings

log = logging.getLogger("gateway.pulse")

LAST_WORDS = 1.0  # seconds that streams have for their error event when the drain is over


class Pulse:
    """All open exchanges. Opened and closed by app.py; each is there from `watch` to `forget`."""

    def __init__(self, settings: Settings, connections: Connections, metrics: Metrics) -> None:
        self._settings = settings
        self._connections = connections
        self._metrics = metrics
        self._clients: set[Client] = set()
        self._in_flight = 0  # requests of any kind
        self.draining = False  # serve: we were told to stop, and are no longer ready
        self.retiring = False  # serve: another has our place; we answer who is connected, and are as ready as that one
        self.refusing = False  # app: no new exchange is begun
        self.tight = False  # pressure: so little memory is left that connections are not kept
        self.overloaded = False  # pressure: so little that requests are refused

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
    def closing(self) -> bool:
        """Connections are not kept after an answer."""
        return self.draining or self.retiring or self.tight

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
            settings.gateway_header_timeout,
        )
        interval = min(1.0, shortest / 10)
        while True:
            await asyncio.sleep(interval)
            now = monotonic()
            self._connections.check(now)
            for client in list(self._clients):
                self._check(client, now)

    def _check(self, client: Client, now: float) -> None:
        was_stalled = client.stalled
        try:
            client.check(now, self._settings)
        except Exception:  # whatever is wrong with one, the others' limits still hold; counted
            self._metrics.internal_errors.labels("task").inc()
            log.exception("looking at an exchange failed", extra={"fields": {"request_id": client.request_id}})
        if client.stalled and not was_stalled:
            self._metrics.slow_clients.labels("read").inc()

    async def drain(self, timeout: float) -> None:
        """Let what is open finish; after `timeout` seconds end it with an error that says why."""
        await self._until(lambda: self.idle, timeout)
        self.interrupt_all()
        await self._until(lambda: self.idle, LAST_WORDS)

    def interrupt_all(self) -> None:
        for client in list(self._clients):
            client.interrupt(ShuttingDown("the gateway is shutting down; please try again", retry_after=1))

    @property
    def open_keys(self) -> set[str]:
        """Ids of the keys that open exchanges are paid by."""
        return {client.key_id for client in self._clients}

    def end_keys(self, key_ids: Collection[str]) -> None:
        """Nothing more is sent to whom these pay for."""
        for client in list(self._clients):
            if client.key_id in key_ids:
                client.interrupt(KeyEnded("the API key was revoked, or has expired, while it was being answered"))

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = monotonic() + seconds
        while not condition() and monotonic() < deadline:  # noqa: ASYNC110 - what it waits for changes in many places
            await asyncio.sleep(0.02)
