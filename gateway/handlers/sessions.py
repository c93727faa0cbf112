"""Signing in and out with a browser. What its cookie is believed for, gateway/identity.py says."""

from typing import Any

from aiohttp import hdrs, web

from gateway.appkeys import ACCOUNTS, SESSIONS
from gateway.body import leave_expectation
from gateway.handlers.accounts import answer, read_fields, text_field
from gateway.identity import (
    SEC_FETCH_SITE,
    SESSION_COOKIE,
    by_https,
    client_address,
    refuse_cross_site,
    session_token,
    session_tokens,
)
from gateway.stores.sessions import SESSION_SECONDS, Session


def routes() -> list[web.RouteDef]:
    return [
        web.post("/auth/session", sign_in, expect_handler=leave_expectation),
        web.get("/auth/session", show_session),
        web.delete("/auth/session", sign_out),
    ]


async def sign_in(request: web.Request) -> web.Response:
    """A session for an email and its password, which are checked, and limited, as for a new key."""
    if SEC_FETCH_SITE in request.headers or hdrs.ORIGIN in request.headers:  # a program sends neither
        refuse_cross_site(request)  # or a foreign page signs its visitor in to an account of its own
    fields = await read_fields(request, {"email": text_field, "password": text_field}, required=("email", "password"))
    account = await request.app[ACCOUNTS].login(fields["email"], fields["password"], address=client_address(request))
    opened = await request.app[SESSIONS].open(account.id)
    response = answer(_shown(opened.session))
    _set_cookie(request, response, opened.token, SESSION_SECONDS)
    return response


async def show_session(request: web.Request) -> web.Response:
    """Who is signed in; 401 when nobody is. A key in the headers is no session."""
    if session_token(request):
        refuse_cross_site(request)
    return answer(_shown(await request.app[SESSIONS].find(session_token(request))))


async def sign_out(request: web.Request) -> web.Response:
    """Done also when nobody was signed in."""
    tokens = session_tokens(request)
    if tokens:
        refuse_cross_site(request)
    for token in tokens:  # of two that differ one is ours, and it ends
        await request.app[SESSIONS].end(token)
    response = web.Response(status=204, headers={hdrs.CACHE_CONTROL: "no-store"})
    _set_cookie(request, response, "", 0)
    return response


def _set_cookie(request: web.Request, response: web.Response, token: str, seconds: int) -> None:
    """No script reads it, no other site sends it: https://www.rfc-editor.org/rfc/rfc6265#section-4.1 and
    https://datatracker.ietf.org/doc/html/draft-ietf-httpbis-rfc6265bis#name-the-samesite-attribute-2."""
    response.set_cookie(
        SESSION_COOKIE,
        token,
        max_age=seconds,
        path="/",
        httponly=True,
        samesite="Strict",
        secure=by_https(request) or None,
    )


def _shown(session: Session) -> dict[str, Any]:
    return {
        "user_id": session.account_id,
        "email": session.email,
        "role": session.role,
        "expires_at": session.expires_at,
    }
