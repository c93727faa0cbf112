from dataclasses import replace
from typing import cast

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.appkeys import KEYS, SETTINGS
from gateway.exchange import Principal
from gateway.identity import MAX_CREDENTIAL, client_address, find_key, identify, tenant
from gateway.protocol.errors import GatewayError, InvalidRequest, RateLimited, Unauthenticated, Unavailable
from gateway.settings import Settings
from gateway.stores.attempts import Attempts
from gateway.stores.keys import KeyStore
from gateway.stores.tokens import join_token

pytestmark = pytest.mark.unit

KEY, OTHER = join_token("0" * 12, "1" * 43), join_token("0" * 12, "2" * 43)
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


@pytest.fixture
def keys() -> Keys:
    return Keys()


def asking(keys: Keys, *pairs: tuple[str, str], address: str = "10.0.0.1", proxies: int = 0) -> web.Request:
    app = web.Application()
    app[KEYS] = cast(KeyStore, keys)
    app[SETTINGS] = Settings(gateway_trusted_proxies=proxies)
    return make_mocked_request("GET", "/v1/models", CIMultiDict(pairs), app=app).clone(remote=address)


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
