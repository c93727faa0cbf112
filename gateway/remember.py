"""What a request may have beyond an answer of its own: one that is kept, or one that is being made for another."""

import asyncio
from collections.abc import Coroutine
from functools import partial
from time import monotonic

from aiohttp import hdrs, web
from multidict import istr

from gateway.appkeys import KEEPER, METRICS
from gateway.exchange import Exchange
from gateway.idempotency import IDEMPOTENCY_KEY, idempotent
from gateway.protocol.errors import NotCached, Unavailable
from gateway.protocol.remembering import Wish, digest, wish_of
from gateway.protocol.request import PARSE_HERE
from gateway.relay import relay
from gateway.replay import replay
from gateway.resume import RESUMABLE, resumable, wants_resuming
from gateway.sharing import SHARING, Generation
from gateway.stores.answers import Ended, Kept
from gateway.stores.postgres import kind_of

CACHE = istr("X-Gateway-Cache")


def answer(request: web.Request, exchange: Exchange) -> Coroutine[None, None, web.StreamResponse]:
    """Answer a request to a model whose route is set. Raises GatewayError only while no byte was sent."""
    resumes = RESUMABLE in request.headers and wants_resuming(request, exchange)
    if IDEMPOTENCY_KEY in request.headers:
        return idempotent(request, exchange)
    wish = _wish(request, exchange)
    if resumes and (wish is None or not wish.only_cached):
        exchange.headers |= {} if wish is None else {"X-Gateway-Cache": "bypass"}
        return resumable(request, exchange)
    if wish is None:
        return relay(request, exchange)
    if not wish.ttl or exchange.own_credential is not None:
        if wish.only_cached:
            raise _not_cached()
        exchange.headers["X-Gateway-Cache"] = "bypass"
        return relay(request, exchange)
    return _remembered(request, exchange, wish)


def _wish(request: web.Request, exchange: Exchange) -> Wish | None:
    headers, principal = request.headers, exchange.principal
    assert principal is not None
    if not (principal.cache_ttl or CACHE in headers or hdrs.CACHE_CONTROL in headers):
        return None
    # Several lines of one name are one list, RFC 9110 5.3.
    cache, control = (",".join(headers.getall(name, ())) for name in (CACHE, hdrs.CACHE_CONTROL))
    return wish_of(cache, control, principal.cache_ttl)


async def _remembered(request: web.Request, exchange: Exchange, wish: Wish) -> web.StreamResponse:
    assert exchange.asked is not None and exchange.principal is not None
    asked, of = exchange.asked, (exchange.principal.account_id, exchange.route[0], exchange.asked)
    key = digest(*of) if len(asked.body) <= PARSE_HERE else await asyncio.to_thread(digest, *of)
    sharing, budget = request.app[SHARING], exchange.principal.budget
    # What a key's own budget ends, or refuses, is nobody else's answer.
    name = key + exchange.principal.key_id.encode() if budget else key
    generation = sharing.find(key) or sharing.find(name) if wish.read else None
    if generation is None and wish.read:
        kept = await _find(request, key, wish.max_age)
        if kept is not None:
            exchange.headers |= {"X-Gateway-Cache": "hit", "Age": str(int(kept.age))}
            return await replay(request, exchange, kept, "cache", paced=wish.paced)
        generation = sharing.find(key) or sharing.find(name)  # others looked as well, and one of them has begun
    if generation is not None:
        exchange.headers |= {"X-Gateway-Cache": "hit", "Age": "0"}
        return await generation.listen(request, exchange, "shared")
    if wish.only_cached:
        raise _not_cached()
    exchange.headers["X-Gateway-Cache"] = "miss"
    generation = sharing.begin(name, request, exchange, done=partial(_keep, request, key, wish.ttl))
    return await generation.listen(request, exchange, "provider")


def _not_cached() -> NotCached:
    return NotCached("no answer to this request is kept, and `only-if-cached` asks for no other")


async def _find(request: web.Request, key: bytes, max_age: float) -> Kept | None:
    """None also while Postgres does not say."""
    try:
        return await request.app[KEEPER].answers.find(key, max_age)
    except Unavailable as error:
        request.app[METRICS].dependency_errors.labels("postgres", kind_of(error)).inc()
    return None


def _keep(request: web.Request, key: bytes, ttl: int, generation: Generation) -> None:
    """Whatever a fallback said is not what the model says: it is not kept."""
    exchange = generation.exchange
    assert exchange.asked is not None and exchange.principal is not None
    if generation.whole and exchange.target in exchange.route[0]:
        account_id = exchange.principal.account_id
        ended = Ended("cache", key, account_id, generation.kept(), ttl, exchange.started, monotonic())
        request.app[KEEPER].keep(ended, exchange.asked.kind)
