"""GET /v1/streams/{id}: a stream goes on where its connection broke."""

from aiohttp import web

from gateway.appkeys import EXCHANGE
from gateway.protocol.errors import InvalidRequest
from gateway.resume import resume


def routes() -> list[web.RouteDef]:
    return [web.get("/v1/streams/{id}", go_on, allow_head=False)]  # the answer is written by ourselves, body and all


async def go_on(request: web.Request) -> web.StreamResponse:
    """`after`: how many bytes of its body the client has."""
    if unknown := request.query.keys() - {"after"}:
        raise InvalidRequest(f"unknown parameter {min(unknown)[:32]!r}", param=min(unknown)[:32])
    given = request.query.getall("after", ["0"])
    if len(given) > 1 or not (given[0].isascii() and given[0].isdigit() and len(given[0]) <= 15):
        raise InvalidRequest("after: the number of bytes that there are already, once", param="after")
    return await resume(request, request[EXCHANGE], request.match_info["id"], int(given[0]))
