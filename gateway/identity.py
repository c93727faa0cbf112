"""Who asks: the gateway's key in the headers, and the provider credential that a caller may bring beside it; or a
person who signed in with a browser, by a cookie."""

from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from typing import NoReturn

from aiohttp import hdrs, web
from multidict import CIMultiDictProxy, istr

from gateway.appkeys import KEYS, SESSIONS, SETTINGS
from gateway.exchange import Principal
from gateway.protocol.errors import InvalidRequest, PermissionDenied, RateLimited, Unauthenticated
from gateway.stores.tokens import PREFIX

API_KEY = istr("X-API-Key")
LENT_KEY = istr("X-Gateway-Key")  # beside the cookie: as which of the account's keys, by its id or prefix
SESSION_COOKIE = "aig_session"
SEC_FETCH_SITE = istr("Sec-Fetch-Site")
_FORWARDED_FOR = istr("X-Forwarded-For")
_FORWARDED_PROTO = istr("X-Forwarded-Proto")
_BEARER = "Bearer "
_BEARER_KEY = _BEARER + PREFIX
MAX_LABEL = 128  # characters of X-User-Id, X-App-Id and a client's X-Request-Id
MAX_CREDENTIAL = 4096  # characters; some providers' are signed tokens of two thousand
MAX_KEY_ID = 64  # characters


async def identify(request: web.Request) -> tuple[Principal, str | None]:
    """Who pays, and the caller's own provider credential if one came along. Without a key in the headers, whose the
    session in the cookie is: then there is no key, and `key_id` is empty.

    Raises Unauthenticated; from an address with too many wrong keys, RateLimited for wrong ones alone; PermissionDenied
    (`cross_site`) for a cookie that a page of somebody else's sent; Unavailable.
    """
    token, own_credential = find_key(request.headers)
    if token is None:
        return await _signed_in(request), None
    keys = request.app[KEYS]
    try:
        return await keys.verify(token), own_credential
    except Unauthenticated:
        address = client_address(request)
        wait = keys.failures.wait(address)
        if wait:
            raise RateLimited(
                "too many wrong keys from this address; wait a minute", code="too_many_failures", retry_after=wait
            ) from None
        keys.failures.add(address)
        raise


async def _signed_in(request: web.Request) -> Principal:
    token = session_token(request)
    if not token:
        raise Unauthenticated(f"no API key provided: send 'Authorization: Bearer {PREFIX}…' or '{API_KEY}: {PREFIX}…'")
    refuse_cross_site(request)
    session = await request.app[SESSIONS].find(token)
    return Principal("", "", "", session.account_id, session.role)


async def lent_key(request: web.Request, signed_in: Principal) -> Principal:
    """The key that a person who signed in names in X-Gateway-Key: one of the account's own, whatever its role.

    Raises Unauthenticated when none is named; PermissionDenied (`key_not_usable`) and no 401 for one that will not do,
    since who signed in still is; InvalidRequest; Unavailable.
    """
    key_id = _one(LENT_KEY, request.headers.getall(LENT_KEY, ())).removeprefix(PREFIX)
    if not key_id:
        raise Unauthenticated(f"a session alone pays for nothing: name a key of yours by '{LENT_KEY}: {PREFIX}…'")
    if not key_id.isascii() or not key_id.isalnum() or len(key_id) > MAX_KEY_ID:
        words = f"invalid {LENT_KEY}: the id of a key or its prefix {PREFIX}… is required, never the key itself"
        raise InvalidRequest(words, param=LENT_KEY)
    return await request.app[KEYS].lend(key_id, signed_in.account_id)


def session_token(request: web.Request) -> str:
    """What the session's cookie holds, RFC 6265 4.2.1; empty without one.

    Two that differ are none: one of them is another host's of the same domain, and which is not said. We read them
    ourselves because aiohttp takes the last one, and logs names that it does not like.
    """
    tokens = session_tokens(request)
    return tokens.pop() if len(tokens) == 1 else ""


def session_tokens(request: web.Request) -> set[str]:
    """What every cookie of the session's name holds; how many there can be, the limit on headers says."""
    pairs = [pair.strip().partition("=") for pair in ";".join(request.headers.getall(hdrs.COOKIE, ())).split(";")]
    return {value for name, _, value in pairs if name == SESSION_COOKIE}


def refuse_cross_site(request: web.Request) -> None:
    """Raises PermissionDenied (`cross_site`) unless a page of ours asks, or, for what changes nothing, the person.

    SameSite=Strict keeps the cookie at home already, but not from other hosts of our domain, nor in old browsers.
    Browsers send Sec-Fetch-Site to https and localhost, and Origin with all that is neither GET nor HEAD:
    https://www.w3.org/TR/fetch-metadata/#sec-fetch-site-header, https://fetch.spec.whatwg.org/#origin-header
    """
    changes_nothing = request.method in (hdrs.METH_GET, hdrs.METH_HEAD)
    site, origin = (",".join(request.headers.getall(name, ())) for name in (SEC_FETCH_SITE, hdrs.ORIGIN))
    if site:
        ours = site == "same-origin" or (changes_nothing and site == "none")  # none: an address that was typed
    elif origin:
        ours = origin in _own_origins(request)
    else:
        ours = changes_nothing
    if not ours:
        raise PermissionDenied("a session is for the pages of this gateway alone", code="cross_site")


def _own_origins(request: web.Request) -> Sequence[str]:
    """As far as one can know: a proxy that ends TLS need not say so, but where it does, http is another origin."""
    host = request.headers.get(hdrs.HOST, "").lower()
    schemes = ("https",) if by_https(request) else ("https", "http")
    return [f"{scheme}://{host}" for scheme in schemes if host]


def by_https(request: web.Request) -> bool:
    """Whether the client speaks TLS, to us or to the outermost proxy of the operator's that says so."""
    proxies = request.app[SETTINGS].gateway_trusted_proxies
    if proxies and (lines := request.headers.getall(_FORWARDED_PROTO, ())):
        told = ",".join(lines).split(",")
        return told[-min(proxies, len(told))].strip().lower() == "https"  # most proxies replace it, some add to it
    return request.secure


def client_address(request: web.Request) -> str:
    """Where a request comes from, as far as one can know: what failures and registrations are counted by.

    Each proxy of the operator's adds the address that it saw at the right end of X-Forwarded-For, so the client's is as
    many from there as there are proxies; what stands before it is the client's own word. Without that, the peer's.
    """
    proxies = request.app[SETTINGS].gateway_trusted_proxies
    if proxies:
        told = ",".join(request.headers.getall(_FORWARDED_FOR, ())).split(",")
        if len(told) >= proxies and (address := _address(told[-proxies].strip())):
            return address
    return request.remote or ""


def _address(text: str) -> str:
    """An IP address in its usual form, with or without a port after it; empty when it is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return ""
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(address)


def tenant(principal: Principal) -> str | None:
    """The account whose keys and usage are all that this caller sees; None: everybody's."""
    return None if principal.role == "admin" else principal.account_id


def find_key(headers: CIMultiDictProxy[str]) -> tuple[str | None, str | None]:
    """The gateway's key and the caller's own provider credential, each None when it is not there.

    The gateway's key is the value that starts with `aig_`, in `Authorization: Bearer` or in `X-API-Key`. Only with the
    key in `X-API-Key` is another bearer token the caller's own credential; all else in these headers is ignored.
    Raises Unauthenticated when two keys contradict each other, InvalidRequest for a credential that cannot be one.
    """
    authorizations, plains = headers.getall(hdrs.AUTHORIZATION, ()), headers.getall(API_KEY, ())
    if not plains and len(authorizations) == 1 and authorizations[0].startswith(_BEARER_KEY):
        return authorizations[0][len(_BEARER) :].strip(), None  # what nearly all send, at a third of the price
    bearer = _bearer(_one(hdrs.AUTHORIZATION, authorizations))
    plain = _one(API_KEY, plains)
    if not plain.startswith(PREFIX):
        return (bearer, None) if bearer.startswith(PREFIX) else (None, None)
    if bearer.startswith(PREFIX) and bearer != plain:
        _contradiction(f"{hdrs.AUTHORIZATION} and {API_KEY}")
    if not bearer or bearer == plain:
        return plain, None
    return plain, _credential(bearer)


def _one(name: str, values: Sequence[str]) -> str:
    """The header's value; empty when it was not sent."""
    different = {value.strip() for value in values}
    if len(different) > 1:
        _contradiction(f"two {name} headers")
    return next(iter(different), "")


def _bearer(authorization: str) -> str:
    """The token, RFC 6750 2.1; the scheme's case does not matter, RFC 9110 11.1."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _credential(token: str) -> str:
    """It will stand in a header of ours to the provider."""
    if len(token) > MAX_CREDENTIAL or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidRequest(
            f"invalid {hdrs.AUTHORIZATION}: a credential has at most {MAX_CREDENTIAL} visible ASCII characters",
            param=hdrs.AUTHORIZATION,
        )
    return token


def _contradiction(where: str) -> NoReturn:
    raise Unauthenticated(f"{where} hold different API keys: send one")
