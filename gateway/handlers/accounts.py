"""Accounts: registered, listed, limited; and their keys: made, listed, changed, revoked.

Who may grant what: an admin, anything. A member who gives the password, or gave it to sign in, at most the deployment's
defaults for a new key; and with a key in the hand instead, at most what that key itself may do, so that a key given
away cannot widen itself. What all keys of an account may use together is for admins to say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any, cast

import orjson
from aiohttp import web

from gateway.appkeys import ACCOUNTS, KEYS, SETTINGS
from gateway.body import leave_expectation, read_body
from gateway.exchange import Principal
from gateway.handlers import budgets
from gateway.identity import client_address, find_key, identify, session_token, tenant
from gateway.protocol.checks import MAX_MODEL
from gateway.protocol.errors import (
    InvalidRequest,
    PermissionDenied,
    Unauthenticated,
)
from gateway.protocol.json_object import parse_object
from gateway.settings import Settings
from gateway.stores.accounts import Account
from gateway.stores.key_limits import (
    BUDGET_NAMES,
    NO_LIMITS,
    RANGES,
    BudgetLimits,
    KeyLimits,
    budget_limits,
    burst_of,
    complete,
    parse_limit,
    shown,
)
from gateway.stores.key_rows import Key, KeyChanges, parse_expiry

MAX_BODY = 16 << 10  # bytes; the largest list of models fits
MAX_NAME = 100  # characters of a key's name
MAX_MODELS = 100

# Any other text is no id, and some no database takes.
_KEY_PATH = "/auth/keys/{id:[0-9A-Za-z]{1,64}}"
_USER_PATH = "/auth/users/{id:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}}"


def routes() -> list[web.RouteDef]:
    return [
        web.post("/auth/register", register, expect_handler=leave_expectation),
        web.post("/auth/keys", create_key, expect_handler=leave_expectation),
        web.get("/auth/keys", list_keys),
        web.get(_KEY_PATH, show_key),
        web.patch(_KEY_PATH, change_key, expect_handler=leave_expectation),
        web.delete(_KEY_PATH, revoke_key),
        web.get("/auth/users", list_users),
        web.get(_USER_PATH, show_user),
        web.patch(_USER_PATH, change_user, expect_handler=leave_expectation),
    ]


# --- accounts -----------------------------------------------------------------------------------------------------


async def register(request: web.Request) -> web.Response:
    fields = await read_fields(request, {"email": text_field, "password": text_field}, required=("email", "password"))
    registration = request.app[SETTINGS].gateway_registration
    accounts = request.app[ACCOUNTS]
    account = await accounts.register(
        fields["email"], fields["password"], registration=registration, address=client_address(request)
    )
    message = "Account created: the first one, so it is the admin." if account.role == "admin" else "Account created."
    return answer({"user_id": account.id, "message": message}, status=201)


async def list_users(request: web.Request) -> web.Response:
    principal, _ = await identify(request)
    users = await request.app[ACCOUNTS].list(tenant(principal))
    return answer({"users": [_shown_user(user) for user in users]})


async def show_user(request: web.Request) -> web.Response:
    principal, _ = await identify(request)
    user = await request.app[ACCOUNTS].get(request.match_info["id"], tenant(principal))
    return answer({**_shown_user(user), "budgets": await budgets.of_account(request, user.id, user.budget)})


async def change_user(request: web.Request) -> web.Response:
    principal, _ = await identify(request)
    if principal.role != "admin":
        await request.app[ACCOUNTS].get(request.match_info["id"], tenant(principal))  # a foreign one is 404
        raise PermissionDenied("only an admin limits accounts")
    fields = await read_fields(request, dict.fromkeys(BUDGET_NAMES, _limit))
    announce = request.app[KEYS].announce_account
    user = await request.app[ACCOUNTS].change(request.match_info["id"], cast(BudgetLimits, fields), announce)
    return answer({**_shown_user(user), "budgets": await budgets.of_account(request, user.id, user.budget)})


def _shown_user(user: Account) -> dict[str, Any]:
    return {
        "id": user.id,
        "email": user.email,
        "role": user.role,
        **shown(budget_limits(user.budget)),
        "created_at": user.created_at,
    }


# --- keys ---------------------------------------------------------------------------------------------------------


async def create_key(request: web.Request) -> web.Response:
    checks = {"email": text_field, "password": text_field, **_KEY_FIELDS}
    fields = await read_fields(request, checks, required=("key_name",))
    account_id, grant = await _creator(request, fields.get("email"), fields.get("password"))
    limits: KeyLimits = {**_defaults(request.app[SETTINGS]), **_limits(fields)}
    grant.check(limits)
    expires_at = fields.get("expires_at")
    key = await request.app[KEYS].create(account_id, fields["key_name"], expires_at, **limits)
    body = {
        "api_key": key.token,
        "prefix": key.prefix,
        "id": key.id,
        **shown(complete(limits)),
        "expires_at": expires_at,
        "message": "Keep this key now: it is not shown again.",
    }
    return answer(body, status=201)


async def list_keys(request: web.Request) -> web.Response:
    principal, _ = await identify(request)
    keys = await request.app[KEYS].list(tenant(principal))
    return answer({"keys": [_shown(key) for key in keys]})


async def show_key(request: web.Request) -> web.Response:
    principal, _ = await identify(request)
    key = await request.app[KEYS].get(request.match_info["id"], tenant(principal))
    return answer({**_shown(key), "budgets": await budgets.of_key(request, key)})


async def change_key(request: web.Request) -> web.Response:
    principal, _ = await identify(request)
    fields = await read_fields(request, _KEY_FIELDS)
    names = {"key_name": "name"}
    changes = cast(KeyChanges, {names.get(name, name): value for name, value in fields.items()})
    _grant_of(principal, request.app[SETTINGS]).check(changes)
    key = await request.app[KEYS].change(request.match_info["id"], tenant(principal), changes)
    return answer({**_shown(key), "budgets": await budgets.of_key(request, key)})


async def revoke_key(request: web.Request) -> web.Response:
    principal, _ = await identify(request)
    key_id = request.match_info["id"]
    await request.app[KEYS].revoke(key_id, tenant(principal))
    return answer({"id": key_id, "revoked": True})


def _limits(fields: Mapping[str, Any]) -> KeyLimits:
    return cast(KeyLimits, {name: fields[name] for name in NO_LIMITS if name in fields})


def _defaults(settings: Settings) -> KeyLimits:
    """Of a new key; 0: no limit."""
    return {
        "requests_per_minute": settings.gateway_requests_per_minute,
        "concurrent_requests": settings.gateway_concurrent_requests,
    }


def _shown(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "prefix": key.prefix,
        "key_name": key.name,
        "user_id": key.account_id,
        "email": key.email,
        **shown(key.limits),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def answer(body: Mapping[str, Any], status: int = 200) -> web.Response:
    headers = {"Cache-Control": "no-store"}  # it may hold a key
    return web.Response(body=orjson.dumps(body), status=status, headers=headers, content_type="application/json")


# --- who may grant what -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grant:
    """The most that may be granted. 0, an empty list and what is missing are no limit, and so more than any."""

    most: Mapping[str, float] = field(default_factory=dict)  # of every limit that is a number, by its name
    allowed_models: Sequence[str] = ()
    expires_at: datetime | None = None  # None: no key has to

    def check(self, limits: KeyLimits | KeyChanges) -> None:
        """Raises PermissionDenied naming the first limit that goes beyond."""
        wanted: Mapping[str, Any] = {**limits, **_bucket(limits)}
        for name, most in self.most.items():
            if most and name in wanted and not 0 < wanted[name] <= most:
                raise PermissionDenied(f"{name} beyond {shown(self.most)[name]} is for an admin to grant", param=name)
        models = limits.get("allowed_models")
        if models is not None and self.allowed_models and not _covers(self.allowed_models, models):
            raise PermissionDenied("a key can only grant models that it may use itself", param="allowed_models")
        if self.expires_at is not None and "expires_at" in wanted:
            expires_at = wanted["expires_at"]
            if expires_at is None or expires_at > self.expires_at:
                raise PermissionDenied("a key that expires grants no more time than it has", param="expires_at")


def _bucket(limits: KeyLimits | KeyChanges) -> KeyLimits:
    """What a rate that comes without a burst has for one."""
    rate = limits.get("requests_per_second")
    return {} if rate is None else {"burst": burst_of(rate, limits.get("burst", 0))}


def _covers(patterns: Sequence[str], models: Sequence[str]) -> bool:
    """May nothing more be asked for with `models` than with `patterns`?"""
    return bool(models) and all(any(_within(model, pattern) for pattern in patterns) for model in models)


def _within(model: str, pattern: str) -> bool:
    if model == pattern:
        return True
    # A pattern that is narrower by its looks may still be wider; only `gpt-4*` within `gpt-*` is certain.
    plain = not set("*?[") & set(model.removesuffix("*"))
    simple = pattern.endswith("*") and not set("*?[") & set(pattern[:-1])
    return plain and (simple or not model.endswith("*")) and fnmatchcase(model, pattern)


async def _creator(request: web.Request, email: str | None, password: str | None) -> tuple[str, Grant]:
    """Whose the new key is, and what may be granted: by email and password, a session, or an admin's key."""
    settings, accounts = request.app[SETTINGS], request.app[ACCOUNTS]
    if password is not None:
        if email is None:
            raise InvalidRequest("email is missing", param="email", code="missing_required_parameter")
        account = await accounts.login(email, password, address=client_address(request))
        return account.id, Grant() if account.role == "admin" else _default_grant(settings)
    if find_key(request.headers)[0] is None and not session_token(request):
        raise Unauthenticated("send the account's email and password, or an admin's key in the headers")
    principal, _ = await identify(request)
    if principal.role != "admin":
        if principal.key_id:
            raise PermissionDenied("only an admin's key makes keys; others send email and password")
        if email is not None:
            raise PermissionDenied("only an admin says whose a key is", param="email")
    owner = principal.account_id if email is None else (await accounts.find(email)).id
    return owner, _grant_of(principal, settings)


def _default_grant(settings: Settings) -> Grant:
    return Grant(cast(Mapping[str, float], _defaults(settings)))


def _grant_of(principal: Principal, settings: Settings) -> Grant:
    if principal.role == "admin":
        return Grant()
    # Who signed in has no limits of their own: the defaults are left, as with the password.
    own: Mapping[str, float] = {
        "requests_per_minute": principal.requests_per_minute,
        "requests_per_second": principal.requests_per_second,
        "burst": principal.burst,
        "concurrent_requests": principal.concurrent_requests,
        **cast(Mapping[str, int], budget_limits(principal.budget)),
    }
    default = _default_grant(settings).most
    most = {name: _lower(default.get(name, 0), most) for name, most in own.items()}
    return Grant(most, principal.allowed_models, principal.expires_at)


def _lower(one: float, other: float) -> float:
    return min(one, other) if one and other else one or other


# --- bodies -------------------------------------------------------------------------------------------------------

Check = Callable[[str, Any], Any]


async def read_fields(
    request: web.Request, checks: Mapping[str, Check], required: Sequence[str] = ()
) -> dict[str, Any]:
    """The checked fields of the body. A field that is not in `checks` is refused: a slip would be a limit not set."""
    fields = parse_object(await read_body(request, MAX_BODY))
    for name in fields:
        if name not in checks:
            raise InvalidRequest(f"unknown parameter {name[:64]!r}", param=name[:64], code="unknown_parameter")
    for name in required:
        if name not in fields:
            raise InvalidRequest(f"{name} is missing", param=name, code="missing_required_parameter")
    return {name: checks[name](name, value) for name, value in fields.items()}


def text_field(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"invalid {name}: a string is required", param=name)
    return value


def _name(name: str, value: Any) -> str:
    text = text_field(name, value).strip()
    if not 0 < len(text) <= MAX_NAME or not text.isprintable():
        raise InvalidRequest(f"invalid {name}: 1 to {MAX_NAME} printable characters are required", param=name)
    return text


def _limit(name: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"invalid {name}: a number is required", param=name)
    return parse_limit(name, value)


def _models(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_MODELS:
        raise InvalidRequest(f"invalid {name}: an array of at most {MAX_MODELS} models is required", param=name)
    for model in value:
        if not isinstance(model, str) or not 0 < len(model) <= MAX_MODEL or not model.isprintable():
            raise InvalidRequest(
                f"invalid {name}: each is a model or a pattern of 1 to {MAX_MODEL} printable characters", param=name
            )
    return tuple(value)


def _expiry(name: str, value: Any) -> datetime | None:
    return None if value is None else parse_expiry(text_field(name, value))


_KEY_FIELDS: Mapping[str, Check] = {
    "key_name": _name,
    "allowed_models": _models,
    "expires_at": _expiry,
    **dict.fromkeys(RANGES, _limit),
}
