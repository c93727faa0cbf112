"""POST /v1/chat/completions, /v1/completions and /v1/embeddings: the route is found here, the rest is the relay's."""

from aiohttp import web

from gateway.appkeys import CATALOGUE, EXCHANGE, root
from gateway.body import leave_expectation
from gateway.protocol.errors import ModelNotFound
from gateway.protocol.routing import Route
from gateway.relay import relay


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
    return await relay(request, exchange)


def _own(route: Route, model: str) -> Route:
    """For whoever brings a credential: nobody else is asked, and billed, in its place. Raises ModelNotFound."""
    own = tuple(target for group in route for target in group if target.own_credential)
    if not own:
        raise ModelNotFound(f"no provider of {model!r} can be asked with a credential of yours", param="model")
    return (own,)
