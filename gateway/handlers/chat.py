"""POST /v1/chat/completions: the target is chosen here, the rest is the relay's."""

from aiohttp import web

from gateway.appkeys import BALANCER, CATALOGUE, EXCHANGE, root
from gateway.body import leave_expectation
from gateway.relay import relay


def routes() -> list[web.RouteDef]:
    return [web.post("/chat/completions", complete, expect_handler=leave_expectation)]


async def complete(request: web.Request) -> web.StreamResponse:
    exchange = request[EXCHANGE]
    chat, principal = exchange.chat, exchange.principal
    assert chat is not None
    assert principal is not None
    catalogue = root(request)[CATALOGUE]
    exchange.model = chat.model
    exchange.route = catalogue.resolve(chat.model, exchange.own_credential, principal.allowed_models)
    exchange.target = root(request)[BALANCER].choose(exchange.route)
    exchange.headers["X-Gateway-Provider"] = exchange.target.provider.name
    exchange.headers["X-Gateway-Model"] = _header_safe(exchange.target.model)
    return await relay(request, exchange)


def _header_safe(text: str) -> str:
    """A model name may hold any printable character; a header only ASCII."""
    return text.encode("ascii", "replace").decode()
