"""Is it up, can it serve, what does it depend on; and the metrics."""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic

import orjson
from aiohttp import web

from gateway import __version__
from gateway.appkeys import BALANCER, CATALOGUE, LIMITER, METRICS, POOL, PRESSURE, PULSE, RECORDER, SHIPPER
from gateway.page import CONTENT_TYPE
from gateway.protocol.errors import Unavailable
from gateway.stores.postgres import HOT_ACQUIRE_TIMEOUT, HOT_COMMAND_TIMEOUT, Pool, connection

_STARTED = monotonic()


def routes() -> list[web.RouteDef]:
    return [
        web.get("/health", _as_written(report)),
        web.get("/health/live", live),
        web.get("/health/ready", ready),
        web.get("/metrics", _as_written(metrics)),
    ]


Handler = Callable[[web.Request], Awaitable[web.Response]]


def _as_written(handler: Handler) -> Handler:
    """Not by another spelling (`/%6detrics`), which a load balancer that hides the page would let through."""

    async def handle(request: web.Request) -> web.Response:
        if "%" in request.raw_path.partition("?")[0]:
            raise web.HTTPNotFound
        return await handler(request)

    return handle


async def live(request: web.Request) -> web.Response:
    """200 as long as the process answers at all, and in time."""
    if request.app[PRESSURE].stalled:
        return web.json_response({"status": "stalled"}, status=503)
    return web.json_response({"status": "live"})


async def ready(request: web.Request) -> web.Response:
    """200 only when it can serve. Postgres or Redis gone is no reason to say no: known keys are served without them."""
    if request.app[PULSE].draining:
        return web.json_response({"status": "draining"}, status=503)
    if request.app[PULSE].overloaded:
        return web.json_response({"status": "overloaded"}, status=503)
    if request.app[RECORDER].refusing:
        return web.json_response({"status": "usage_log_full"}, status=503)
    return web.json_response({"status": "ready"})


async def report(request: web.Request) -> web.Response:
    app = request.app
    postgres = await _postgres(app[POOL])
    catalogue = app[CATALOGUE]
    degraded = postgres != "up" or app[LIMITER].state != "redis" or app[RECORDER].refusing
    body = {
        "status": "draining" if app[PULSE].draining else "degraded" if degraded else "ok",
        "version": __version__,
        "uptime_seconds": round(monotonic() - _STARTED),
        "dependencies": {"postgres": postgres, "redis": "up" if app[LIMITER].state == "redis" else "down"},
        "limiter": app[LIMITER].state,
        "usage_rows_waiting": app[SHIPPER].queued,
        "usage_log_full": app[RECORDER].refusing,
        "open_exchanges": app[PULSE].open_exchanges,
        "providers": {
            name: {
                "enabled": provider.enabled,
                "reachable": catalogue.reachable.get(name),
                **app[BALANCER].report(name, app[METRICS].known_models),
            }
            for name, provider in catalogue.routes.providers.items()
        },
    }
    return web.Response(body=orjson.dumps(body), content_type="application/json")


async def _postgres(pool: Pool) -> str:
    try:
        async with connection(pool, HOT_ACQUIRE_TIMEOUT) as borrowed:
            await borrowed.fetchval("select 1", timeout=HOT_COMMAND_TIMEOUT)
    except Unavailable:
        return "down"
    return "up"


async def metrics(request: web.Request) -> web.Response:
    page = await asyncio.to_thread(request.app[METRICS].render)
    return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE})
