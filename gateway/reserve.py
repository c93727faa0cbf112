"""What a request may use of its budgets, before it is sent."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial

from aiohttp import web

from gateway.appkeys import APP
from gateway.exchange import Exchange
from gateway.protocol.errors import (
    GatewayError,
    InvalidRequest,
    PermissionDenied,
    QuotaExhausted,
    RateLimited,
    Unavailable,
)
from gateway.protocol.meter import Meter
from gateway.protocol.request import PARSE_HERE, ModelRequest, max_output
from gateway.protocol.routing import Target
from gateway.protocol.usage import Usage
from gateway.protocol.whole import streamed
from gateway.stores.budgets import SLICE, Reservation

# The label of `gateway_rate_limited_total`.
_REFUSALS: Mapping[type[GatewayError], str] = {
    QuotaExhausted: "insufficient_quota",
    RateLimited: "tokens_per_minute",
    PermissionDenied: "price_unknown",
    Unavailable: "unavailable",
}


async def reserve(request: web.Request, exchange: Exchange, target: Target, meter: Meter) -> ModelRequest:
    """The request as its budgets let it be sent to `target`; what they hold for it is the exchange's `reservation`.

    What was held for another target that it was sent to before is given back. Raises what `Budgets.reserve` does.
    """
    asked, principal = exchange.asked, exchange.principal
    assert asked is not None and principal is not None
    if not request[APP].budgets.covers(principal):
        return asked
    if exchange.reservation is not None:
        exchange.reservation.settle(0, 0)
        if exchange.meter is not None:  # so its row, if nobody else can be asked, says the same
            exchange.meter.usage = Usage(0, 0)
    if asked.kind == "completion" and (asked.fields.get("best_of") or 1) > 1:
        # It cannot be streamed, so it cannot be ended in the middle; what is not the best is never seen.
        raise InvalidRequest("best_of: unsupported with a budget", param="best_of", code="unsupported_parameter")
    large = len(asked.body) > PARSE_HERE
    prompt_tokens = await asyncio.to_thread(meter.prompt_estimate) if large else meter.prompt_estimate()
    most = max_output(asked)
    output_tokens = SLICE if most is None else min(most, SLICE)
    try:
        reservation = await _ask(request, exchange, target, prompt_tokens, output_tokens)
    except GatewayError as error:
        request[APP].metrics.rate_limited.labels(_REFUSALS[type(error)]).inc()
        raise
    exchange.reservation = reservation
    exchange.headers.update(reservation.headers)
    if asked.stream or not reservation.binding or asked.kind == "embedding":
        return asked
    # Only a stream can be ended in the middle.
    ask = partial(streamed, asked, asks_usage=target.provider.asks_usage)
    return await asyncio.to_thread(ask) if large else ask()


async def _ask(
    request: web.Request, exchange: Exchange, target: Target, prompt_tokens: int, output_tokens: int
) -> Reservation:
    principal, app = exchange.principal, request[APP]
    assert principal is not None
    return await app.budgets.reserve(
        principal,
        exchange.id,
        exchange.started_at,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        price=app.prices.price(target.provider.name, target.model, datetime.now(UTC)),
    )
