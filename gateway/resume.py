"""Streams that are continued after a dropped connection, from the byte on that the client does not have.

Rule 1: what is sent is what was missed, byte for byte, and then what comes; heartbeats and error events are part of it.
Rule 2: where a stream runs it is joined; elsewhere, and when it is over, it is read from Redis.
Rule 3: a stream that is not all there is cut, or refused, so that it can be asked for again; it never looks whole.
"""

import asyncio
import math
from time import monotonic

from aiohttp import web
from multidict import istr

from gateway.appkeys import METRICS, PULSE, SETTINGS, STREAMS
from gateway.client import Client
from gateway.exchange import Exchange
from gateway.protocol.errors import GatewayError, InvalidRequest, KeyEnded, NotFound, StreamGone, Unavailable
from gateway.relay import relay
from gateway.sharing import SHARING, Generation
from gateway.stores.streams import Part, name_of

RESUMABLE = istr("X-Gateway-Resumable")
CATCH_UP = 17.0  # seconds that Redis may be behind what a client has: until it is sure that nobody writes any more
GRACE = 5.0  # seconds that a stream without a maker is watched: when Redis was gone, leases ended that will be renewed
PATIENCE = 10.0  # seconds that Redis may be gone while it is read; then the client may try another process


def wants_resuming(request: web.Request, exchange: Exchange) -> bool:
    """The answer says whether it is: until then, no."""
    value = request.headers[RESUMABLE].strip().lower()
    if value not in ("true", "false"):
        raise InvalidRequest(f"{RESUMABLE}: `true` or `false`", param=RESUMABLE)
    exchange.headers[RESUMABLE] = "false"
    return value == "true" and exchange.asked is not None and exchange.asked.stream


async def resumable(request: web.Request, exchange: Exchange) -> web.StreamResponse:
    """Answer a request whose stream can be continued, if Redis takes it. Raises GatewayError while no byte was sent."""
    assert exchange.principal is not None
    key_id, streams, settings = exchange.principal.key_id, request.app[STREAMS], request.app[SETTINGS]
    name = name_of(key_id, exchange.id)
    if not await streams.begin(key_id, name):
        return await relay(request, exchange)
    exchange.headers[RESUMABLE] = "true"
    generation = request.app[SHARING].begin(
        name.encode(),
        request,
        exchange,
        linger=settings.gateway_resume_linger,
        keep=settings.gateway_resume_max_bytes,
        done=lambda generation: streams.finish(name, void=not generation.recording.prepared),
    )
    streams.write(name, generation.recording)
    generation.recording.on_piece = lambda at, events: streams.changed(name)
    generation.wanted_at = lambda: streams.read_at(name)
    try:
        return await generation.listen(request, exchange, "provider")
    finally:
        if not exchange.prepared and generation.recording.alone:
            generation.task.cancel()  # nobody knows its id


async def resume(request: web.Request, exchange: Exchange, stream_id: str, after: int) -> web.StreamResponse:
    """Continue a stream of the same key `after` so many bytes of it. Raises GatewayError while no byte was sent."""
    assert exchange.principal is not None
    name = name_of(exchange.principal.key_id, stream_id)
    results = request.app[METRICS].resumed_streams
    generation = request.app[SHARING].running(name.encode())
    if generation is not None and _has(generation, after):
        results.labels("joined").inc()
        exchange.headers["X-Gateway-Stream"] = stream_id
        return await generation.listen(request, exchange, None, after)
    following = _Following(request, exchange, name, after)
    try:
        part = await following.begin()
    except GatewayError as error:
        result = "unknown" if isinstance(error, NotFound) else "failed" if isinstance(error, Unavailable) else "refused"
        results.labels(result).inc()
        raise
    results.labels("followed").inc()
    exchange.headers["X-Gateway-Stream"] = stream_id
    return await following.run(part)


def _has(generation: Generation, after: int) -> bool:
    """False: of what was missed a part is not kept here. Raises InvalidRequest."""
    if after > generation.recording.size:
        raise _beyond(generation.recording.size)
    return generation.recording.locate(after) is not None


def _beyond(size: int) -> InvalidRequest:
    # Not 416: that answers a Range (RFC 9110 15.5.17), and there is none.
    return InvalidRequest(f"after: this stream has {size} bytes", param="after")


class _Following:
    """One client of a stream that is in Redis. `begin` finds it, `run` sends it."""

    def __init__(self, request: web.Request, exchange: Exchange, name: str, after: int) -> None:
        self._request = request
        self._name = name
        self._after = after  # bytes that the client has, or was sent
        self._streams = request.app[STREAMS]
        self._pulse = pulse = request.app[PULSE]
        self._client = Client(request, exchange, draining=lambda: pulse.closing, stream=True)
        self._client.sent = math.inf  # heartbeats are part of the stream
        self._unmade_since = 0.0  # seconds, monotonic; 0: somebody makes it, or made it to its end
        self._failing_since = 0.0  # likewise: Redis is gone

    async def begin(self) -> Part:
        """The first part. Raises GatewayError when there is none to be sent."""
        deadline = monotonic() + CATCH_UP
        part = await self._look(at_once=True)
        while part.size < self._after and not part.ended and monotonic() < deadline:
            part = await self._look()
        if part.size < self._after:
            raise _gone() if part.ended == "interrupted" else _beyond(part.size)
        self._check(part)
        return part

    async def run(self, part: Part) -> web.StreamResponse:
        """All that there is and will be."""
        client, pulse = self._client, self._pulse
        pulse.watch(client)
        try:
            while not (part.ended and self._after >= part.size):
                await self._send(part)
                if client.interrupted is not None:
                    return await self._stop(client.interrupted)
                if not part.ended or self._after < part.size:
                    part = await self._next(at_once=self._after < part.size)
            if not client.prepared:
                client.write_pieces(())
            if part.ended == "interrupted":
                client.write(_gone().event())
            return await client.end()
        except GatewayError as error:
            return await self._stop(error)
        finally:
            pulse.forget(client)

    async def _send(self, part: Part) -> None:
        """Raises StreamGone when something is missing in between, and ConnectionError when the client is gone."""
        self._check(part)
        data = b"".join([events[max(self._after - first, 0) :] for first, events in part.pieces])
        if data:
            self._after += len(data)
            self._client.write(data)
            await self._client.drain()

    def _check(self, part: Part) -> None:
        """Raises StreamGone unless all of it follows what the client has."""
        end = self._after
        for first, events in part.pieces:
            if first > end:
                raise StreamGone("the bytes that were missed are not kept any more", code="stream_trimmed")
            end = first + len(events)

    async def _next(self, *, at_once: bool) -> Part:
        """Raises GatewayError when there will be none."""
        while True:
            try:
                part = await self._look(at_once=at_once)
            except Unavailable:
                self._unmade_since = 0.0
                self._failing_since = self._failing_since or monotonic()
                if monotonic() - self._failing_since > PATIENCE or self._client.interrupted is not None:
                    raise
                await asyncio.sleep(1)
                continue
            self._failing_since = 0.0
            return part

    async def _look(self, *, at_once: bool = False) -> Part:
        """Raises NotFound and Unavailable."""
        part = await self._streams.read(self._name, self._after, at_once=at_once)
        if part is None:
            raise NotFound("there is no such stream, or it is not kept any more", code="stream_not_found")
        if part.made or part.ended:
            self._unmade_since = 0.0
        elif not self._unmade_since:
            self._unmade_since = monotonic()
        elif monotonic() - self._unmade_since > GRACE:
            await self._streams.interrupt(self._name, part.size)
        return part

    async def _stop(self, error: GatewayError) -> web.StreamResponse:
        """An end that is not the stream's. Raises the error while no byte was sent, else ConnectionResetError."""
        self._request.app[METRICS].resumed_streams.labels("broken").inc()
        if not self._client.prepared:
            raise error
        if isinstance(error, KeyEnded):
            self._client.write(error.event())
            return await self._client.end()
        if self._request.transport is not None:
            self._request.transport.abort()  # so that it is continued elsewhere, or refused
        raise ConnectionResetError("a stream that was continued broke")


def _gone() -> StreamGone:
    return StreamGone("whoever made this answer is gone: there is no more of it")
