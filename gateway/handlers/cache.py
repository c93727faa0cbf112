"""DELETE /api/cache: whoever owns the answers that are kept may empty it."""

from uuid import UUID

from aiohttp import web

from gateway.appkeys import KEEPER
from gateway.exchange import Principal
from gateway.handlers.accounts import answer
from gateway.identity import identify
from gateway.protocol.errors import InvalidRequest, PermissionDenied


def routes() -> list[web.RouteDef]:
    return [web.delete("/api/cache", clear)]


async def clear(request: web.Request) -> web.Response:
    """Of the caller's account; an admin's `account` names another by its id, or `all`. How many answers there were."""
    principal, _ = await identify(request)
    return answer({"deleted": await request.app[KEEPER].answers.clear(_account(request, principal))})


def _account(request: web.Request, principal: Principal) -> str | None:
    if unknown := request.query.keys() - {"account"}:
        raise InvalidRequest(f"unknown parameter {min(unknown)[:32]!r}", param=min(unknown)[:32])
    named = request.query.getall("account", [principal.account_id])
    if len(named) > 1:
        raise InvalidRequest("account is given twice", param="account")
    try:
        account_id = None if named[0] == "all" else str(UUID(named[0]))
    except ValueError:
        raise InvalidRequest("account: the id of an account, or `all`", param="account") from None
    if account_id != principal.account_id and principal.role != "admin":
        raise PermissionDenied("only an admin empties the cache of others")
    return account_id
