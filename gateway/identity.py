"""Who asks: the gateway's key in the headers, and the provider credential that a caller may bring beside it."""

from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from typing import NoReturn

from aiohttp import hdrs, web
from multidict import CIMultiDictProxy, istr

from gateway.appkeys import KEYS, SETTINGS, root
from gateway.exchange import Principal
from gateway.protocol.errors import InvalidRequest, RateLimited, Unauthenticated
from gateway.stores.tokens import PREFIX

API_KEY = istr("X-API-Key")
_FORWARDED_FOR = istr("X-Forwarded-For")
_BEARER = "Bearer "
_BEARER_KEY = _BEARER + PREFIX
MAX_LABEL = 128  # characters of X-User-Id, X-App-Id and a client's X-Request-Id
MAX_CREDENTIAL = 4096  # characters; some providers' are signed tokens of two thousand


async def identify(request: web.Request) -> tuple[Principal, str | None]:
    """Who pays, and the caller's own provider credential if one came along.

    Raises Unauthenticated; from an address with too many wrong keys, RateLimited for wrong ones alone; Unavailable.
    """
    token, own_credential = find_key(request.headers)
    if token is None:
        raise Unauthenticated(f"no API key provided: send 'Authorization: Bearer {PREFIX}…' or '{API_KEY}: {PREFIX}…'")
    keys = root(request)[KEYS]
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


def client_address(request: web.Request) -> str:
    """Where a request comes from, as far as one can know: what failures and registrations are counted by.

    Each proxy of the operator's adds the address that it saw at the right end of X-Forwarded-For, so the client's is as
    many from there as there are proxies; what stands before it is the client's own word. Without that, the peer's.
    """
    proxies = root(request)[SETTINGS].gateway_trusted_proxies
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
