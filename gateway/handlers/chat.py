"""POST /v1/chat/completions, /v1/completions and /v1/embeddings: the body is read and checked here before anything is
sent anywhere, and the route is found; the rest is `remember`'s."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from time import monotonic

from aiohttp import web

from gateway.appkeys import APP, EXCHANGE
from gateway.body import leave_expectation, read_body
from gateway.owned import Owned, named_files
from gateway.protocol.errors import ModelNotFound
from gateway.protocol.request import PARSE_HERE, ModelRequest, parse_chat, parse_completion, parse_embedding
from gateway.protocol.routing import Route
from gateway.remember import answer

Parse = Callable[[bytes], ModelRequest]

_PARSERS: Mapping[str, Parse] = {
    "/v1/chat/completions": parse_chat,
    "/v1/completions": parse_completion,
    "/v1/embeddings": parse_embedding,
}


def routes() -> list[web.RouteDef]:
    return [
        web.post(path, partial(complete, parse), expect_handler=leave_expectation) for path, parse in _PARSERS.items()
    ]


async def complete(parse: Parse, request: web.Request) -> web.StreamResponse:
    exchange, app, before = request[EXCHANGE], request[APP], monotonic()
    body = await read_body(request, app.settings.gateway_max_body)
    exchange.upload_ms = (monotonic() - before) * 1000
    # A large body takes its time, which others' streams must not wait for.
    asked = exchange.asked = parse(body) if len(body) <= PARSE_HERE else await asyncio.to_thread(parse, body)
    exchange.model = asked.model
    assert exchange.principal is not None
    allowed = exchange.principal.allowed_models
    route = app.catalogue.resolve(asked.model, exchange.own_credential, allowed)
    exchange.route = route if exchange.own_credential is None else _own(route, asked.model)
    if asked.kind == "chat" and (b"file_id" in asked.body or b"\\u" in asked.body):
        await _check_files(request, asked, exchange.route)
    return await answer(request, exchange)


async def _check_files(request: web.Request, asked: ModelRequest, route: Route) -> None:
    """A message may name files of the provider's (`{"type": "file", "file": {"file_id": …}}`): the caller's alone."""
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
