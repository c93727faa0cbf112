"""POST /v1/chat/completions, /v1/completions and /v1/embeddings: the route is found here, the rest is `remember`'s."""

import asyncio
from functools import partial

from aiohttp import web

from gateway.appkeys import CATALOGUE, EXCHANGE, root
from gateway.body import leave_expectation
from gateway.owned import Owned, named_files
from gateway.protocol.errors import ModelNotFound
from gateway.protocol.request import PARSE_HERE, ModelRequest
from gateway.protocol.routing import Route
from gateway.remember import answer


def routes() -> list[web.RouteDef]:
    paths = ("/chat/completions", "/completions", "/embeddings")
    return [web.post(path, complete, expect_handler=leave_expectation) for path in paths]


async def complete(request: web.Request) -> web.StreamResponse:
    exchange = request[EXCHANGE]
    asked, principal = exchange.asked, exchange.principal
    assert asked is not None
    assert principal is not None
    exchange.model = asked.model
    route = root(request)[CATALOGUE].resolve(asked.model, exchange.own_credential, principal.allowed_models)
    exchange.route = route if exchange.own_credential is None else _own(route, asked.model)
    await _check_files(request, asked, exchange.route)
    return await answer(request, exchange)


async def _check_files(request: web.Request, asked: ModelRequest, route: Route) -> None:
    """A message may name files of the provider's (`{"type": "file", "file": {"file_id": …}}`): the caller's alone."""
    if asked.kind != "chat" or not (b"file_id" in asked.body or b"\\u" in asked.body):
        return
    named = partial(_named, asked)
    ids = named() if len(asked.body) <= PARSE_HERE else await asyncio.to_thread(named)
    if not ids:
        return
    for target in {target.provider.name: target for group in route for target in group}.values():
        await Owned(request, target).check("file", ids)


def _named(asked: ModelRequest) -> list[str]:
    return list(dict.fromkeys(named_files(asked.messages)))


def _own(route: Route, model: str) -> Route:
    """For whoever brings a credential: nobody else is asked, and billed, in its place. Raises ModelNotFound."""
    own = tuple(target for group in route for target in group if target.own_credential)
    if not own:
        raise ModelNotFound(f"no provider of {model!r} can be asked with a credential of yours", param="model")
    return (own,)
