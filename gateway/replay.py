"""An answer that is kept, sent once more: at once, or at the pace at which it once came."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from time import monotonic

import orjson
from aiohttp import web

from gateway.appkeys import PULSE
from gateway.client import PIECE, Client
from gateway.exchange import Exchange, Outcome, Source
from gateway.protocol.errors import GatewayError, UpstreamRejected
from gateway.protocol.routing import Target
from gateway.stores.answers import Kept


async def replay(
    request: web.Request, exchange: Exchange, kept: Kept, source: Source, *, paced: bool = False
) -> web.StreamResponse:
    """No provider is asked, and nothing is charged. Raises GatewayError only while no byte was sent."""
    _describe(exchange, kept, source)
    if kept.whole is not None and kept.status != 200:
        refusal = _refusal(kept.status, kept.whole)
        _note(exchange, "rejected", refusal)
        raise refusal
    pulse = request.app[PULSE]
    client = Client(request, exchange, draining=lambda: pulse.closing)
    pulse.watch(client)
    try:
        if kept.whole is not None:
            response = await client.send_whole(kept.whole, _nothing)
            exchange.outcome = "ok"
            return response
        return await _stream(exchange, client, kept.pieces or (), paced=paced)
    except (asyncio.CancelledError, ConnectionError):
        if exchange.outcome != "ok":  # else it left with everything
            exchange.outcome = "client_abort"
        raise
    finally:
        pulse.forget(client)
        exchange.status = 200 if client.prepared else exchange.status


def _describe(exchange: Exchange, kept: Kept, source: Source) -> None:
    exchange.source, exchange.source_id, exchange.saved = source, kept.exchange_id, kept.usage
    exchange.target = _target(exchange, kept)
    exchange.headers["X-Gateway-Provider"] = kept.provider
    if kept.model:  # a file has none
        exchange.headers["X-Gateway-Model"] = kept.model.encode("ascii", "replace").decode()  # as the relay says it


def _target(exchange: Exchange, kept: Kept) -> Target:
    """Who once answered; it may not be configured any more."""
    for group in exchange.route:
        for target in group:
            if (target.provider.name, target.model) == (kept.provider, kept.model):
                return target
    first = exchange.route[0][0]
    return replace(first, provider=replace(first.provider, name=kept.provider), model=kept.model)


def _refusal(status: int, body: bytes) -> GatewayError:
    """What a provider once said, with its status."""
    said = orjson.loads(body)["error"]
    return UpstreamRejected(said["message"], status=status, type=said["type"], param=said["param"], code=said["code"])


async def _stream(
    exchange: Exchange, client: Client, pieces: Sequence[tuple[int, bytes]], *, paced: bool
) -> web.StreamResponse:
    interrupted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    client.on_interrupt = partial(_set, interrupted)
    begun, waiting, size = monotonic(), list[bytes](), 0
    for number, (at, events) in enumerate(pieces):
        waiting.append(events)
        size += len(events)
        last = number + 1 == len(pieces)
        if not (paced or last or size >= PIECE):
            continue
        if paced and (early := begun + at / 1000 - monotonic()) > 0:
            await asyncio.wait({interrupted}, timeout=early)
        if client.interrupted is not None:
            return await _break(exchange, client, client.interrupted)
        exchange.first_byte = exchange.first_byte or monotonic()
        client.write_pieces(waiting)
        client.sent = monotonic()
        if last:
            exchange.outcome = "ok"
        await client.drain()
        waiting, size = [], 0
    return await client.end()


async def _break(exchange: Exchange, client: Client, error: GatewayError) -> web.StreamResponse:
    _note(exchange, "interrupted", error)
    if not client.prepared:
        raise error
    client.write(error.event())
    return await client.end()


def _note(exchange: Exchange, outcome: Outcome, error: GatewayError) -> None:
    """Its row is written before the error is answered."""
    exchange.outcome, exchange.status, exchange.error_code = outcome, error.http_status, error.error_code or ""


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _nothing() -> None:
    pass
