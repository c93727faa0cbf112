"""One coarse timer for all open streams: heartbeats, silent providers, readers that stopped.

A timer for every read would cost more than the read. One tick looks at every open stream instead, at least ten times
in the shortest interval and at least once a second, so that a limit of 60 s holds to within a second.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic

from aiohttp import web

from gateway.protocol.errors import GatewayError, ShuttingDown, UpstreamTimeout
from gateway.protocol.sse import PING
from gateway.settings import Settings
from gateway.upstream import Answer

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx would hold the stream back
}


class Client:
    """The client's side of one stream. Headers are held back until there is a byte to send.

    Two may send: the relay, and the pulse for a heartbeat. Both send whole events, and neither is interrupted between
    the first and the last byte of one, so their events never mix.
    """

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response = web.StreamResponse(headers=_HEADERS)
        self.answer: Answer | None = None  # relay: once the provider's headers are in
        self.closed = False  # relay: nothing more is sent
        self.stalled = False  # pulse: dropped because it stopped reading
        self.reading_since = 0.0  # relay: waiting for the provider, seconds, monotonic; 0: not waiting
        self._writing_since = 0.0  # waiting for the client
        self._sent = monotonic()

    @property
    def prepared(self) -> bool:
        """The status line is out (or about to be): what goes wrong from now on is an event."""
        return self._response.prepared

    async def send(self, data: bytes) -> None:
        """Raises ConnectionError when the client is gone; waits while it does not read."""
        if not self._response.prepared:
            await self._response.prepare(self._request)
        self._sent = self._writing_since = monotonic()
        await self._response.write(data)
        self._writing_since = 0.0

    async def end(self) -> web.StreamResponse:
        self.closed = True
        self._writing_since = monotonic()
        await self._response.write_eof()
        self._writing_since = 0.0
        return self._response

    async def ping(self) -> None:
        if self.closed or self._writing_since:
            return
        with suppress(ConnectionError):  # the relay is told by its own write, or by its cancellation
            await self.send(PING)

    def check(self, now: float, settings: Settings) -> bool:
        """Enforce the limits; true when a heartbeat is due."""
        if self._writing_since:
            if now - self._writing_since > settings.gateway_write_timeout and self._request.transport is not None:
                self.stalled = True
                self._request.transport.abort()
            return False
        if self.answer is not None and self.reading_since and now - self.reading_since > settings.gateway_idle_timeout:
            self.answer.interrupt(
                UpstreamTimeout(
                    f"the provider was silent for {settings.gateway_idle_timeout:g} s in the middle of its answer",
                    kind="timeout_idle",
                )
            )
            return False
        return not self.closed and now - self._sent >= settings.gateway_heartbeat

    def interrupt(self, error: GatewayError) -> None:
        if self.answer is not None:
            self.answer.interrupt(error)


class Pulse:
    """All open streams. Opened and closed by app.py; each stream enters and leaves by `watch`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._clients: set[Client] = set()
        self._pings: set[asyncio.Task[None]] = set()
        self.in_flight = 0  # requests of any kind being answered; middlewares.errors
        self.draining = False  # app: SIGTERM came, we are no longer ready
        self.refusing = False  # app: no new exchange is begun

    @contextmanager
    def watch(self, client: Client) -> Iterator[None]:
        self._clients.add(client)
        try:
            yield
        finally:
            client.closed = True
            self._clients.discard(client)

    @property
    def open_streams(self) -> int:
        return len(self._clients)

    async def run(self) -> None:
        settings = self._settings
        shortest = min(settings.gateway_heartbeat, settings.gateway_idle_timeout, settings.gateway_write_timeout)
        interval = min(1.0, shortest / 10)
        while True:
            await asyncio.sleep(interval)
            now = monotonic()
            for client in list(self._clients):
                if client.check(now, settings):
                    # A task of its own: one client that does not read must not hold up the others' heartbeats.
                    task = asyncio.create_task(client.ping())
                    self._pings.add(task)
                    task.add_done_callback(self._pings.discard)

    async def drain(self, timeout: float) -> None:
        """Let what is open finish; after `timeout` seconds end the streams with an error event that says why."""
        await self._until(lambda: not self.in_flight, timeout)
        for client in list(self._clients):
            client.interrupt(ShuttingDown("the gateway is shutting down; please try again"))
        await self._until(lambda: not self._clients, 1.0)

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = monotonic() + seconds
        while not condition() and monotonic() < deadline:  # noqa: ASYNC110 - what it waits for changes in many places
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        for task in list(self._pings):
            task.cancel()
        await asyncio.gather(*self._pings, return_exceptions=True)
