"""What is said of a request when it is over: its log line, and what it adds to the metrics."""

from aiohttp import web

from gateway.appkeys import METRICS
from gateway.exchange import Exchange
from gateway.logs import log_exchange


def report(request: web.Request, exchange: Exchange) -> None:
    usage, source = exchange.meter.result() if exchange.meter is not None and exchange.connected else (None, "")
    if usage is not None and source == "estimated" and not usage.total_tokens:
        usage, source = None, ""  # it was passed on, and nobody counted anything
    log_exchange(request.method, _route(request), exchange, usage, source)
    if request.path.startswith("/v1/"):
        request.app[METRICS].exchange_ended(exchange, usage, source, counted_live=exchange.counted_live)


def _route(request: web.Request) -> str:
    """The route's template: a path that nobody routes may hold anything."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "(unknown)"
