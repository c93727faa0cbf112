from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import cast

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.appkeys import KEYS, SESSIONS, SETTINGS
from gateway.exchange import Principal
from gateway.identity import (
    MAX_CREDENTIAL,
    by_https,
    client_address,
    find_key,
    identify,
    lent_key,
    refuse_cross_site,
    session_token,
    tenant,
)
from gateway.protocol.errors import (
    GatewayError,
    InvalidRequest,
    PermissionDenied,
    RateLimited,
    Unauthenticated,
    Unavailable,
)
from gateway.settings import Settings
from gateway.stores.attempts import Attempts
from gateway.stores.keys import KeyStore
from gateway.stores.sessions import Session, SessionStore
from gateway.stores.tokens import join_token

pytestmark = pytest.mark.unit

KEY, OTHER = join_token("0" * 12, "1" * 43), join_token("0" * 12, "2" * 43)
TOKEN = "t" * 43
COOKIE = ("Cookie", f"aig_session={TOKEN}")
PRINCIPAL = Principal("0" * 12, "aig_" + "0" * 12, "laptop", "account", "member")


def headers(*pairs: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(pairs))


# --- where the key stands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair",
    [
        ("Authorization", f"Bearer {KEY}"),
        ("Authorization", f"Bearer {KEY} "),
        ("authorization", f"bearer {KEY}"),
        ("AUTHORIZATION", f"BEARER   {KEY}  "),
        ("X-API-Key", KEY),
        ("x-api-key", f" {KEY} "),
    ],
)
def test_the_key_is_found_in_either_header(pair: tuple[str, str]) -> None:
    assert find_key(headers(pair)) == (KEY, None)


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer ")],
        [("Authorization", KEY)],
        [("Authorization", f"Basic {KEY}")],
        [("Authorization", "Bearer sk-proj-1")],
        [("X-API-Key", "sk-ant-1")],
        [("X-API-Key", "")],
        [("X-API-Key", f"Bearer {KEY}")],
        [("Authorization", "Bearer sk-proj-1"), ("X-API-Key", "sk-ant-1")],
        [("Cookie", f"key={KEY}")],
    ],
)
def test_nothing_else_is_a_key_of_the_gateway(pairs: list[tuple[str, str]]) -> None:
    assert find_key(headers(*pairs)) == (None, None)


def test_beside_a_key_in_x_api_key_a_bearer_token_is_the_callers_own_credential() -> None:
    assert find_key(headers(("X-API-Key", KEY), ("Authorization", "bearer sk-proj-1"))) == (KEY, "sk-proj-1")


def test_beside_a_key_in_authorization_nothing_is_the_callers_own_credential() -> None:
    """A client library that sends both headers must not have one of them carried upstream."""
    assert find_key(headers(("Authorization", f"Bearer {KEY}"), ("X-API-Key", "sk-ant-1"))) == (KEY, None)


@pytest.mark.parametrize("authorization", ["", "Bearer ", "Basic dXNlcjpwYXNz", "sk-proj-1", f"Bearer {KEY}"])
def test_what_is_no_other_bearer_token_is_no_credential(authorization: str) -> None:
    assert find_key(headers(("X-API-Key", KEY), ("Authorization", authorization))) == (KEY, None)


@pytest.mark.parametrize(
    "pairs",
    [
        [("Authorization", f"Bearer {KEY}"), ("X-API-Key", OTHER)],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {OTHER}")],
        [("X-API-Key", KEY), ("X-API-Key", OTHER)],
        [("X-API-Key", KEY), ("x-api-key", "")],
    ],
)
def test_two_keys_that_differ_are_refused_rather_than_one_chosen(pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(Unauthenticated, match="different API keys"):
        find_key(headers(*pairs))


def test_the_same_key_twice_is_one_key() -> None:
    assert find_key(headers(("X-API-Key", KEY), ("X-API-Key", KEY))) == (KEY, None)


@pytest.mark.parametrize(
    "token", ["sk-é", "sk-\udcff", "sk-1 sk-2", "sk-\x7f", "sk-\t1", "x" * (MAX_CREDENTIAL + 1)], ids=ascii
)
def test_a_credential_that_could_not_stand_in_a_header_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        find_key(headers(("X-API-Key", KEY), ("Authorization", f"Bearer {token}")))
    assert token not in caught.value.message


def test_a_long_signed_token_is_a_credential() -> None:
    token = "x" * MAX_CREDENTIAL
    assert find_key(headers(("X-API-Key", KEY), ("Authorization", f"Bearer {token}"))) == (KEY, token)


# --- who it is ----------------------------------------------------------------------------------------------------


class Keys:
    """One good key; all others are wrong, or cannot be checked."""

    def __init__(self) -> None:
        self.failures = Attempts(20)
        self.error: GatewayError = Unauthenticated("incorrect API key provided")

    async def verify(self, token: str) -> Principal:
        if token != KEY:
            raise self.error
        return PRINCIPAL

    async def lend(self, key_id: str, account_id: str) -> Principal:
        if (key_id, account_id) != (PRINCIPAL.key_id, PRINCIPAL.account_id):
            raise PermissionDenied("there is no such key of this account", code="key_not_usable")
        return PRINCIPAL


class Sessions:
    """One good token, an admin's; how often any was looked up."""

    def __init__(self) -> None:
        self.asked = 0

    async def find(self, token: str) -> Session:
        self.asked += 1
        if token != TOKEN:
            raise Unauthenticated("nobody is signed in", code="invalid_session")
        return Session(PRINCIPAL.account_id, "ada@example.com", "admin", datetime.now(UTC))


@pytest.fixture
def keys() -> Keys:
    return Keys()


def asking(
    keys: Keys, *pairs: tuple[str, str], address: str = "10.0.0.1", proxies: int = 0, method: str = "GET"
) -> web.Request:
    app = web.Application()
    app[KEYS] = cast(KeyStore, keys)
    app[SESSIONS] = cast(SessionStore, Sessions())
    app[SETTINGS] = Settings(gateway_trusted_proxies=proxies)
    return make_mocked_request(method, "/v1/models", CIMultiDict(pairs), app=app).clone(remote=address)


async def test_a_good_key_names_its_principal(keys: Keys) -> None:
    request = asking(keys, ("X-API-Key", KEY), ("Authorization", "Bearer sk-proj-1"))
    assert await identify(request) == (PRINCIPAL, "sk-proj-1")


def test_a_member_is_a_tenant_and_an_admin_is_none() -> None:
    assert tenant(PRINCIPAL) == "account"
    assert tenant(replace(PRINCIPAL, role="admin")) is None


async def test_without_a_key_the_answer_says_how_to_send_one(keys: Keys) -> None:
    with pytest.raises(Unauthenticated, match=r"Authorization: Bearer aig_….*X-API-Key: aig_…"):
        await identify(asking(keys))


async def test_after_twenty_wrong_keys_an_address_is_told_to_wait_but_a_good_key_passes(keys: Keys) -> None:
    wrong = asking(keys, ("X-API-Key", OTHER))
    for _ in range(20):
        with pytest.raises(Unauthenticated):
            await identify(wrong)
    with pytest.raises(RateLimited) as caught:
        await identify(wrong)
    assert caught.value.retry_after is not None
    assert 55 < caught.value.retry_after <= 60
    assert (await identify(asking(keys, ("X-API-Key", KEY))))[0] is PRINCIPAL
    with pytest.raises(Unauthenticated):
        await identify(asking(keys, ("X-API-Key", OTHER), address="10.0.0.2"))


async def test_a_missing_key_and_an_outage_are_no_failures(keys: Keys) -> None:
    keys.error = Unavailable("keys cannot be checked now")
    for _ in range(30):
        with pytest.raises(Unavailable):
            await identify(asking(keys, ("X-API-Key", OTHER)))
        with pytest.raises(Unauthenticated):
            await identify(asking(keys))


# --- a browser that is signed in ----------------------------------------------------------------------------------


async def test_a_cookie_names_an_account_and_no_key(keys: Keys) -> None:
    principal, own_credential = await identify(asking(keys, COOKIE))
    assert (principal.account_id, principal.role, principal.key_id, own_credential) == ("account", "admin", "", None)


async def test_a_key_in_the_headers_wins_over_a_cookie_also_a_wrong_one(keys: Keys) -> None:
    assert (await identify(asking(keys, ("X-API-Key", KEY), COOKIE)))[0] is PRINCIPAL
    with pytest.raises(Unauthenticated, match="incorrect API key"):
        await identify(asking(keys, ("Authorization", f"Bearer {OTHER}"), COOKIE))


@pytest.mark.parametrize(
    ("lines", "token"),
    [
        ([], ""),
        ([f"aig_session={TOKEN}"], TOKEN),
        ([f"theme=dark; aig_session={TOKEN}; x"], TOKEN),
        ([f"theme=dark;aig_session={TOKEN}"], TOKEN),
        (["theme=dark", f"aig_session={TOKEN}"], TOKEN),
        ([f"aig_session={TOKEN}; aig_session={TOKEN}"], TOKEN),
        ([f"aig_session={TOKEN}; aig_session=another"], ""),
        ([f"aig_session={TOKEN}; aig_session"], ""),
        ([f"AIG_SESSION={TOKEN}"], ""),
        ([f"x-aig_session={TOKEN}"], ""),
        ([f'theme="; aig_session={TOKEN}"'], f'{TOKEN}"'),
        (["aig_session"], ""),
        (["=;=;;" * 1000], ""),
    ],
)
def test_the_token_is_what_the_one_cookie_of_its_name_holds(keys: Keys, lines: Sequence[str], token: str) -> None:
    assert session_token(asking(keys, *(("Cookie", line) for line in lines))) == token


READS, CHANGES = ("GET", "HEAD"), ("POST", "PATCH", "DELETE", "PUT", "OPTIONS")
HOST = ("Host", "gw.example:3000")


@pytest.mark.parametrize(
    ("pairs", "believed"),
    [
        ([], READS),
        ([("Sec-Fetch-Site", "same-origin")], READS + CHANGES),
        ([("Sec-Fetch-Site", "none")], READS),
        ([("Sec-Fetch-Site", "same-site")], ()),
        ([("Sec-Fetch-Site", "cross-site")], ()),
        ([("Sec-Fetch-Site", "Same-Origin")], ()),
        ([("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "cross-site")], ()),
        ([("Sec-Fetch-Site", "cross-site"), ("Origin", "http://gw.example:3000")], ()),
        ([("Sec-Fetch-Site", ""), ("Origin", "http://gw.example:3000")], READS + CHANGES),
        ([("Origin", "http://gw.example:3000")], READS + CHANGES),
        ([("Origin", "https://gw.example:3000")], READS + CHANGES),  # a proxy of which we are not told ends TLS
        ([("Origin", "http://gw.example")], ()),
        ([("Origin", "http://gw.example:3001")], ()),
        ([("Origin", "http://evil.example")], ()),
        ([("Origin", "http://gw.example:3000.evil.example")], ()),
        ([("Origin", "http://evil.example/http://gw.example:3000")], ()),
        ([("Origin", "ws://gw.example:3000")], ()),
        ([("Origin", "null")], ()),
        ([("Origin", "http://gw.example:3000"), ("Origin", "http://evil.example")], ()),
    ],
)
async def test_a_cookie_is_believed_when_a_page_of_ours_sent_it(
    keys: Keys, pairs: Sequence[tuple[str, str]], believed: Sequence[str]
) -> None:
    for method in READS + CHANGES:
        request = asking(keys, HOST, COOKIE, *pairs, method=method)
        if method in believed:
            assert (await identify(request))[0].account_id == "account", method
            continue
        with pytest.raises(PermissionDenied) as caught:
            await identify(request)
        assert caught.value.error_code == "cross_site"
        assert cast(Sessions, request.app[SESSIONS]).asked == 0, "foreign pages cost no look-up"


def test_without_a_host_no_origin_is_ours(keys: Keys) -> None:
    with pytest.raises(PermissionDenied):
        refuse_cross_site(asking(keys, ("Origin", "http://"), COOKIE, method="POST"))


def test_where_the_proxy_says_https_a_page_that_came_without_is_another_site(keys: Keys) -> None:
    told = (HOST, ("X-Forwarded-Proto", "https"))
    refuse_cross_site(asking(keys, *told, ("Origin", "https://gw.example:3000"), method="POST", proxies=1))
    with pytest.raises(PermissionDenied):
        refuse_cross_site(asking(keys, *told, ("Origin", "http://gw.example:3000"), method="POST", proxies=1))


@pytest.mark.parametrize(
    ("proxies", "told", "https"),
    [
        (0, [], False),
        (0, ["https"], False),
        (1, [], False),
        (1, ["https"], True),
        (1, [" HTTPS "], True),
        (1, ["http"], False),
        (1, ["https, http"], False),
        (1, ["http", "https"], True),
        (2, ["https, http"], True),
        (2, ["https"], True),
        (2, ["http, https, http"], True),
        (1, [""], False),
    ],
)
def test_https_is_what_the_outermost_proxy_of_ours_saw(
    keys: Keys, proxies: int, told: Sequence[str], https: bool
) -> None:
    assert by_https(asking(keys, *(("X-Forwarded-Proto", line) for line in told), proxies=proxies)) is https


@pytest.mark.parametrize("name", [PRINCIPAL.key_id, PRINCIPAL.key_prefix])
async def test_who_signed_in_names_a_key_by_its_id_or_prefix(keys: Keys, name: str) -> None:
    request = asking(keys, COOKIE, ("X-Gateway-Key", name))
    assert await lent_key(request, (await identify(request))[0]) is PRINCIPAL


@pytest.mark.parametrize(
    ("names", "status"),
    [
        ([], 401),
        ([""], 401),
        (["aig_"], 401),
        ([KEY], 400),
        (["0" * 65], 400),
        (["é" * 12], 400),
        (["1" * 12], 403),
        ([PRINCIPAL.key_id, "1" * 12], 401),
    ],
    ids=ascii,
)
async def test_who_signed_in_and_names_no_good_key_is_refused_and_not_quoted(
    keys: Keys, names: Sequence[str], status: int
) -> None:
    request = asking(keys, COOKIE, *(("X-Gateway-Key", name) for name in names))
    with pytest.raises(GatewayError) as caught:
        await lent_key(request, (await identify(request))[0])
    assert caught.value.http_status == status
    assert not any(name in caught.value.message for name in names if name.removeprefix("aig_"))


# --- where it comes from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("proxies", "told", "address"),
    [
        (0, ["203.0.113.9"], "10.0.0.1"),
        (1, [], "10.0.0.1"),
        (1, ["203.0.113.9"], "203.0.113.9"),
        (1, ["1.1.1.1, 203.0.113.9"], "203.0.113.9"),
        (1, ["1.1.1.1", "203.0.113.9"], "203.0.113.9"),
        (2, ["1.1.1.1, 203.0.113.9, 10.0.0.7"], "203.0.113.9"),
        (2, ["203.0.113.9"], "10.0.0.1"),
        (1, [" 203.0.113.9 "], "203.0.113.9"),
        (1, ["203.0.113.9:4711"], "203.0.113.9"),
        (1, ["2001:DB8::1"], "2001:db8::1"),
        (1, ["[2001:db8::1]:443"], "2001:db8::1"),
        (1, ["::ffff:203.0.113.9"], "203.0.113.9"),
        (1, [""], "10.0.0.1"),
        (1, ["unknown"], "10.0.0.1"),
        (1, ["203.0.113.9,"], "10.0.0.1"),
        (1, ["[2001:db8::1"], "2001:db8::1"),
        (1, ["1.2.3.4.5"], "10.0.0.1"),
        (1, ["x" * 4000], "10.0.0.1"),
    ],
)
def test_the_clients_address_is_what_the_outermost_proxy_of_ours_saw(
    keys: Keys, proxies: int, told: list[str], address: str
) -> None:
    request = asking(keys, *(("X-Forwarded-For", line) for line in told), proxies=proxies)
    assert client_address(request) == address


async def test_behind_a_proxy_wrong_keys_of_one_client_do_not_throttle_another_and_it_cannot_change_its_address(
    keys: Keys,
) -> None:
    def wrong(told: str) -> web.Request:
        return asking(keys, ("X-API-Key", OTHER), ("X-Forwarded-For", told), proxies=1)

    for number in range(20):
        with pytest.raises(Unauthenticated):
            await identify(wrong(f"198.51.100.{number}, 203.0.113.9"))
    with pytest.raises(RateLimited):
        await identify(wrong("198.51.100.77, 203.0.113.9"))
    with pytest.raises(Unauthenticated):
        await identify(wrong("203.0.113.10"))
