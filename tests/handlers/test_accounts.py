import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import asyncpg
import msgspec
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.typedefs import Handler
from argon2 import PasswordHasher

from gateway.appkeys import ACCOUNTS, BUDGETS, KEYS, METRICS, SETTINGS
from gateway.exchange import Budget, new_id
from gateway.handlers import accounts
from gateway.handlers.accounts import Grant
from gateway.metrics import Metrics
from gateway.protocol.errors import GatewayError, PermissionDenied
from gateway.settings import Settings, SettingsError, load_settings
from gateway.stores.accounts import REGISTRATIONS_PER_ADDRESS, AccountStore
from gateway.stores.budgets import Budgets
from gateway.stores.keys import KeyStore
from gateway.stores.passwords import HashingPool
from gateway.stores.script import RedisScript, connect_redis

pytestmark = pytest.mark.integration

PASSWORD = "correct horse"
JSON = {"Content-Type": "application/json"}


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except GatewayError as error:
        retry_after = error.retry_after
        headers = {} if retry_after is None else {"Retry-After": str(round(retry_after))}
        return web.json_response(error.object(), status=error.http_status, headers=headers)


@dataclasses.dataclass
class Answer:
    status: int
    body: Any

    @property
    def error(self) -> tuple[int, str | None, str | None]:
        return self.status, self.body["error"]["code"], self.body["error"]["param"]


class Api:
    """The endpoints, and the shortest way to ask them."""

    def __init__(self, client: TestClient[web.Request, web.Application], pool: asyncpg.Pool) -> None:
        self.client = client
        self.pool = pool
        self.keys: KeyStore = client.server.app[KEYS]  # type: ignore[attr-defined]

    async def ask(self, method: str, path: str, key: str | None = None, **body: Any) -> Answer:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with self.client.request(method, path, json=body or None, headers=headers) as response:
            assert response.content_type == "application/json"
            return Answer(response.status, await response.json())

    async def add_account(self, name: str) -> str:
        """The account's id; the first one is the admin's."""
        answer = await self.ask("POST", "/auth/register", email=f"{name}@example.com", password=PASSWORD)
        assert answer.status == 201
        user_id: str = answer.body["user_id"]
        return user_id

    async def add_key(self, name: str, **more: Any) -> Any:
        """A key of the account; the whole answer."""
        fields = {"email": f"{name}@example.com", "password": PASSWORD, "key_name": "laptop", **more}
        answer = await self.ask("POST", "/auth/keys", **fields)
        assert answer.status == 201, answer.body
        return answer.body


Start = Callable[..., Awaitable[Api]]


@pytest.fixture
async def start(pool: asyncpg.Pool, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Starts the endpoints under these settings."""
    monkeypatch.setattr("gateway.stores.accounts.PASSWORD_HASHER", PasswordHasher(1, 8, 1))
    clients = []
    for_keys, for_passwords = HashingPool(), HashingPool()
    redis = connect_redis(redis_url)
    script = RedisScript(redis)

    async def flushed() -> None:
        """No usage is under way here."""

    async def start(**settings: Any) -> Api:
        app = web.Application(middlewares=[errors])
        app[SETTINGS] = msgspec.convert(settings, Settings)
        app[ACCOUNTS] = AccountStore(pool, hashing=for_passwords)
        app[KEYS] = KeyStore(pool, None, pepper=b"pepper", cache_seconds=60, stale_seconds=900, hashing=for_keys)
        app[BUDGETS] = Budgets(script, pool, flushed=flushed)
        app[METRICS] = Metrics(providers=())
        app.add_routes(accounts.routes())
        client = TestClient(TestServer(app))
        await client.start_server()
        clients.append(client)
        return Api(client, pool)

    yield start
    for client in clients:
        await client.close()
    for hashing in (for_keys, for_passwords):
        hashing.close()
    await script.close()
    await redis.aclose()


@pytest.fixture
async def api(start: Start) -> Api:
    """With an admin, `boss`, and a member, `ada`."""
    api = await start()
    await api.add_account("boss")
    await api.add_account("ada")
    return api


# --- registration -------------------------------------------------------------------------------------------------


async def test_whoever_registers_learns_an_id_and_the_first_that_it_is_the_admin(start: Start) -> None:
    api = await start()
    answers = [await api.ask("POST", "/auth/register", email=f"{name}@example.com", password=PASSWORD) for name in "ab"]
    assert [answer.status for answer in answers] == [201, 201]
    assert [answer.body.keys() for answer in answers] == [{"user_id", "message"}] * 2
    assert ["admin" in answer.body["message"] for answer in answers] == [True, False]


async def test_a_known_email_is_409(api: Api) -> None:
    answer = await api.ask("POST", "/auth/register", email="ADA@example.com", password="another password")
    assert answer.error == (409, "email_taken", "email")


async def test_a_crowd_that_registers_is_told_to_wait_and_shuts_out_no_good_key(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = await api.add_key("ada")  # not proven yet: its first request takes Argon2
    monkeypatch.setattr("gateway.stores.accounts.PASSWORD_HASHER", PasswordHasher())  # what it costs in earnest

    async def register(name: str) -> int:
        answer = await api.ask("POST", "/auth/register", email=f"{name}@example.com", password=PASSWORD)
        return answer.status

    crowd = asyncio.gather(*(register(f"user{number}") for number in range(60)))
    await asyncio.sleep(0.05)
    assert not crowd.done()
    assert (await api.ask("GET", "/auth/keys", created["api_key"])).status == 200
    passed = REGISTRATIONS_PER_ADDRESS - 2  # the two of the fixture came from this address as well
    assert Counter(await crowd) == {201: passed, 429: 60 - passed}


async def test_a_gateway_for_a_domain_registers_its_addresses_and_no_others(start: Start) -> None:
    api = await start(gateway_registration="example.com")
    await api.add_account("boss")
    answer = await api.ask("POST", "/auth/register", email="boss@example.org", password=PASSWORD)
    assert answer.error == (403, "registration_closed", None)
    answer = await api.ask("POST", "/auth/register", email="ada@example.com", password="qwerty123")
    assert answer.error == (400, "weak_password", "password")


@pytest.mark.parametrize("text", ["opne", "example", "example.com,", "@example.com", "*.example.com", "a b.com", "all"])
async def test_a_registration_that_is_no_word_and_no_domain_stops_the_start(text: str) -> None:
    """A slip must neither close the door nor open it."""
    with pytest.raises(SettingsError, match="GATEWAY_REGISTRATION"):
        load_settings({"GATEWAY_REGISTRATION": text})
    for good in ("open", "closed", "example.com", "Example.com, sub.example.org"):
        assert load_settings({"GATEWAY_REGISTRATION": good}).gateway_registration == good


async def test_a_closed_gateway_registers_its_admin_and_nobody_else(start: Start) -> None:
    api = await start(gateway_registration="closed")
    await api.add_account("boss")
    answer = await api.ask("POST", "/auth/register", email="ada@example.com", password=PASSWORD)
    assert answer.error == (403, "registration_closed", None)


async def test_nobody_makes_itself_an_admin(api: Api) -> None:
    answer = await api.ask("POST", "/auth/register", email="eve@example.com", password=PASSWORD, role="admin")
    assert answer.error == (400, "unknown_parameter", "role")


# --- a new key ----------------------------------------------------------------------------------------------------


async def test_a_new_key_is_shown_once_and_works(api: Api) -> None:
    created = await api.add_key("ada")
    assert created.keys() == {"api_key", "prefix", "id", "message", "expires_at", *LIMITS}
    assert created["api_key"].startswith(created["prefix"] + "_")
    answer = await api.ask("GET", "/auth/keys", created["api_key"])
    assert answer.status == 200
    secret = created["api_key"].split("_")[2]
    assert secret not in str(answer.body)


async def test_a_new_key_has_the_deployments_limits(start: Start) -> None:
    api = await start(gateway_requests_per_minute=33, gateway_concurrent_requests=4)
    await api.add_account("boss")
    created = await api.add_key("boss")
    answer = await api.ask("GET", f"/auth/keys/{created['id']}", created["api_key"])
    limits = {**dict.fromkeys(LIMITS, 0), "requests_per_minute": 33, "concurrent_requests": 4, "allowed_models": []}
    assert [{name: body[name] for name in LIMITS} for body in (created, answer.body)] == [limits, limits]


async def test_a_wrong_password_makes_no_key(api: Api) -> None:
    fields = {"email": "ada@example.com", "password": "wrong password", "key_name": "x"}
    assert (await api.ask("POST", "/auth/keys", **fields)).error == (401, "invalid_credentials", None)
    assert await api.pool.fetchval("select count(*) from keys") == 0


async def test_after_five_wrong_passwords_an_account_is_told_to_wait(api: Api) -> None:
    wrong = {"email": "ada@example.com", "password": "wrong password", "key_name": "x"}
    answers = [await api.ask("POST", "/auth/keys", **wrong) for _ in range(6)]
    assert [answer.status for answer in answers] == [401] * 5 + [429]


async def test_a_password_is_not_overruled_by_a_key_in_the_headers(api: Api) -> None:
    boss = (await api.add_key("boss"))["api_key"]
    fields = {"email": "ada@example.com", "password": "wrong password", "key_name": "x"}
    assert (await api.ask("POST", "/auth/keys", boss, **fields)).status == 401


async def test_neither_password_nor_key_is_401_with_the_way_in(api: Api) -> None:
    answer = await api.ask("POST", "/auth/keys", key_name="x")
    assert answer.status == 401
    assert "email and password" in answer.body["error"]["message"]


async def test_an_admins_key_makes_keys_for_itself_and_for_others(api: Api) -> None:
    boss = (await api.add_key("boss"))["api_key"]
    own = await api.ask("POST", "/auth/keys", boss, key_name="own")
    given = await api.ask("POST", "/auth/keys", boss, key_name="given", email="Ada@example.com", requests_per_minute=0)
    assert [own.status, given.status] == [201, 201]
    listed = (await api.ask("GET", "/auth/keys", boss)).body["keys"]
    owners = {key["key_name"]: key["email"] for key in listed}
    assert owners == {"laptop": "boss@example.com", "own": "boss@example.com", "given": "ada@example.com"}
    answer = await api.ask("POST", "/auth/keys", boss, key_name="x", email="nobody@example.com")
    assert answer.error == (404, "account_not_found", "email")


async def test_a_members_key_makes_no_keys(api: Api) -> None:
    ada = (await api.add_key("ada"))["api_key"]
    assert (await api.ask("POST", "/auth/keys", ada, key_name="x")).error == (403, "permission_denied", None)


# --- limits -------------------------------------------------------------------------------------------------------

LIMITS: dict[str, Any] = {
    "requests_per_minute": 50,
    "requests_per_second": 2.5,
    "burst": 10,
    "concurrent_requests": 5,
    "allowed_models": ["gpt-*"],
    "tokens_per_minute": 10_000,
    "tokens_per_day": 1_000_000,
    "cost_per_day": 4.35,
    "cost_per_month": 20.000001,
    "drain_seconds": 30,
    "cache_ttl": 3600,
}
BUDGET_FIELDS = ("tokens_per_minute", "tokens_per_day", "cost_per_day", "cost_per_month")


async def test_a_member_sets_every_limit_of_its_key_and_is_shown_what_it_wrote(api: Api) -> None:
    created = await api.add_key("ada", **LIMITS)
    path, token = f"/auth/keys/{created['id']}", created["api_key"]
    shown = (await api.ask("GET", path, token)).body
    [listed] = (await api.ask("GET", "/auth/keys", token)).body["keys"]
    assert [{name: body[name] for name in LIMITS} for body in (created, shown, listed)] == [LIMITS] * 3


async def test_each_limit_is_changed_alone(api: Api) -> None:
    ada, boss = await api.add_key("ada", **LIMITS), await api.add_key("boss")
    path, expected = f"/auth/keys/{ada['id']}", dict(LIMITS)
    for name, value in {**LIMITS, "requests_per_second": 0.5, "cost_per_day": 0.000001, "drain_seconds": 600}.items():
        expected[name] = value
        answer = await api.ask("PATCH", path, boss["api_key"], **{name: value})
        assert {name: answer.body[name] for name in LIMITS} == expected


async def test_dollars_are_stored_as_whole_micro_dollars(api: Api) -> None:
    ada = await api.add_key("ada", cost_per_day=4.35, cost_per_month=1_000_000_000)
    [row] = await api.pool.fetch("select cost_micros_per_day, cost_micros_per_month from keys where id = $1", ada["id"])
    assert tuple(row) == (4_350_000, 10**15)


async def test_a_rate_without_a_burst_holds_what_flows_in_a_second(api: Api) -> None:
    ada = await api.add_key("ada", requests_per_second=2.5)
    assert ada["burst"] == 3
    path, token = f"/auth/keys/{ada['id']}", ada["api_key"]
    assert (await api.ask("PATCH", path, token, burst=0)).error == (403, "permission_denied", "burst")
    for limits in ({"requests_per_second": 1.5}, {"requests_per_second": 0.1, "burst": 0}):
        answer = await api.ask("PATCH", path, token, **limits)
        expected = (limits["requests_per_second"], 2 if "burst" not in limits else 1)
        assert (answer.body["requests_per_second"], answer.body["burst"]) == expected


@pytest.mark.parametrize(
    ("field", "value"), [("requests_per_minute", 0), ("requests_per_minute", 61), ("concurrent_requests", 21)]
)
async def test_a_member_gets_no_more_than_the_deployments_defaults(api: Api, field: str, value: int) -> None:
    fields: dict[str, Any] = {"email": "ada@example.com", "password": PASSWORD, "key_name": "x", field: value}
    assert (await api.ask("POST", "/auth/keys", **fields)).error == (403, "permission_denied", field)
    ada = await api.add_key("ada")
    answer = await api.ask("PATCH", f"/auth/keys/{ada['id']}", ada["api_key"], **{field: fields[field]})
    assert answer.error == (403, "permission_denied", field)


async def test_an_admin_may_lift_every_limit(api: Api) -> None:
    boss = await api.add_key("boss", requests_per_minute=0, concurrent_requests=0)
    ada = await api.add_key("ada", **LIMITS)
    none = {**dict.fromkeys(LIMITS, 0), "allowed_models": []}
    answer = await api.ask("PATCH", f"/auth/keys/{ada['id']}", boss["api_key"], **none)
    assert answer.status == 200
    assert {name: answer.body[name] for name in LIMITS} == none


@pytest.mark.parametrize("name", sorted(LIMITS.keys() - {"allowed_models", "drain_seconds", "cache_ttl"}))
async def test_a_key_in_the_hand_grants_up_to_what_it_has_and_no_limit_is_more_than_any(api: Api, name: str) -> None:
    ada, least = await api.add_key("ada", **LIMITS), 0.000001 if isinstance(LIMITS[name], float) else 1
    path, token = f"/auth/keys/{ada['id']}", ada["api_key"]
    for beyond in (round(LIMITS[name] + least, 6), 0):
        answer = await api.ask("PATCH", path, token, **{name: beyond})
        assert answer.error == (403, "permission_denied", name)
    for within in (LIMITS[name], least):
        answer = await api.ask("PATCH", path, token, **{name: within})
        assert (answer.status, answer.body[name]) == (200, within)


async def test_a_key_whose_bucket_is_small_for_its_rate_lends_no_larger_one(api: Api) -> None:
    """A rate brings a burst of its own to a key that has none."""
    narrow = await api.add_key("ada", requests_per_second=50, burst=5)
    other = await api.add_key("ada", requests_per_second=1)
    path = f"/auth/keys/{other['id']}"
    answer = await api.ask("PATCH", path, narrow["api_key"], requests_per_second=50)
    assert answer.error == (403, "permission_denied", "burst")
    answer = await api.ask("PATCH", path, narrow["api_key"], requests_per_second=50, burst=5)
    assert (answer.status, answer.body["burst"]) == (200, 5)


@pytest.mark.parametrize(("name", "most"), [("drain_seconds", 600), ("cache_ttl", 30 * 86400)])
async def test_how_long_a_provider_is_read_on_and_an_answer_is_kept_is_free_to_choose(
    api: Api, name: str, most: int
) -> None:
    ada = await api.add_key("ada", **{name: 5})
    for seconds in (most, 0):
        answer = await api.ask("PATCH", f"/auth/keys/{ada['id']}", ada["api_key"], **{name: seconds})
        assert (answer.status, answer.body[name]) == (200, seconds)


async def test_where_there_is_no_limit_a_member_needs_none(start: Start) -> None:
    api = await start(gateway_requests_per_minute=0)
    await api.add_account("boss")
    await api.add_account("ada")
    await api.add_key("ada", requests_per_minute=0)
    await api.add_key("ada", requests_per_minute=10_000)


async def test_a_key_given_away_cannot_widen_itself(api: Api) -> None:
    key = await api.add_key("ada", requests_per_minute=5, allowed_models=["gpt-4o*", "claude-haiku"])
    path, token = f"/auth/keys/{key['id']}", key["api_key"]
    wider: list[dict[str, Any]] = [
        {"requests_per_minute": 6},
        {"requests_per_minute": 0},
        {"allowed_models": []},
        {"allowed_models": ["gpt-*"]},
        {"allowed_models": ["gpt-4o", "claude-opus"]},
    ]
    answers = [await api.ask("PATCH", path, token, **changes) for changes in wider]
    assert [answer.error for answer in answers] == [
        (403, "permission_denied", next(iter(changes))) for changes in wider
    ]
    narrower: dict[str, Any] = {
        "requests_per_minute": 4,
        "allowed_models": ["gpt-4o-mini", "gpt-4o-2024*"],
        "key_name": "lent",
    }
    answer = await api.ask("PATCH", path, token, **narrower)
    assert answer.status == 200
    assert {name: answer.body[name] for name in narrower} == narrower


async def test_a_key_that_expires_gives_itself_and_others_no_more_time(api: Api) -> None:
    lent, kept = await api.add_key("ada", expires_at="7d"), await api.add_key("ada")
    for key, less in ((lent, "6d"), (kept, "5d")):
        path = f"/auth/keys/{key['id']}"
        for wanted in (None, "8d", "2999-01-01"):
            answer = await api.ask("PATCH", path, lent["api_key"], expires_at=wanted)
            assert answer.error == (403, "permission_denied", "expires_at"), wanted
        assert (await api.ask("PATCH", path, lent["api_key"], expires_at=less)).status == 200
    assert (await api.ask("PATCH", f"/auth/keys/{kept['id']}", kept["api_key"], expires_at=None)).error[0] == 403
    boss = await api.add_key("boss")
    assert (await api.ask("PATCH", f"/auth/keys/{kept['id']}", boss["api_key"], expires_at=None)).status == 200
    assert (await api.ask("PATCH", f"/auth/keys/{lent['id']}", kept["api_key"], expires_at=None)).status == 200


async def test_a_key_expires_when_it_was_told_to_and_only_a_change_of_that_changes_it(api: Api) -> None:
    created = await api.add_key("ada", expires_at="2999-01-02T03:04:05+01:00")
    assert created["expires_at"] == "2999-01-02T02:04:05+00:00"
    path = f"/auth/keys/{created['id']}"
    assert (await api.ask("PATCH", path, created["api_key"], key_name="new")).body["expires_at"] == created[
        "expires_at"
    ]
    sooner = (await api.ask("PATCH", path, created["api_key"], expires_at="30d")).body["expires_at"]
    days = (datetime.fromisoformat(sooner) - datetime.now(UTC)).total_seconds() / 86_400
    assert 29.9 < days <= 30


@pytest.mark.parametrize("wanted", ["", "never", "2020-01-01", "0d", "99999999d", "3000-01-01", 5, [], {}, True])
async def test_an_expiry_that_is_none_or_has_passed_is_400_and_named(api: Api, wanted: Any) -> None:
    fields = {"email": "ada@example.com", "password": PASSWORD, "key_name": "x", "expires_at": wanted}
    assert (await api.ask("POST", "/auth/keys", **fields)).error == (400, "invalid_value", "expires_at")


@pytest.mark.parametrize(
    ("mine", "wanted", "may"),
    [
        (["gpt-*"], ["gpt-*"], True),
        (["gpt-*"], ["gpt-4*"], True),
        (["gpt-*"], ["gpt-4o"], True),
        (["gpt-*"], ["gpt*"], False),
        (["gpt-*"], ["*"], False),
        (["gpt-*"], [], False),
        (["*"], ["anything", "x*"], True),
        (["gpt-?"], ["gpt-4"], True),
        (["gpt-?"], ["gpt-*"], False),  # by its characters it would match
        (["gpt-[*]"], ["gpt-*"], False),
        (["gpt-?"], ["gpt-[45]"], False),
        (["gpt-[45]*"], ["gpt-4*"], False),  # it is narrower, and refused all the same: the caller can be exact
        (["*-mini"], ["gpt-*"], False),
        (["a", "b*"], ["a", "b", "bc*"], True),
        (["a", "b*"], ["a", "c"], False),
    ],
)
async def test_models_are_granted_only_when_surely_within_ones_own(
    mine: list[str], wanted: list[str], may: bool
) -> None:
    granted = True
    try:
        Grant(allowed_models=mine).check({"allowed_models": wanted})
    except PermissionDenied:
        granted = False
    assert granted is may


# --- list, change, revoke -----------------------------------------------------------------------------------------


async def test_a_member_sees_its_own_keys_and_an_admin_all(api: Api) -> None:
    boss, ada = await api.add_key("boss"), await api.add_key("ada")
    mine = (await api.ask("GET", "/auth/keys", ada["api_key"])).body["keys"]
    everybodys = (await api.ask("GET", "/auth/keys", boss["api_key"])).body["keys"]
    assert [key["id"] for key in mine] == [ada["id"]]
    assert {key["id"] for key in everybodys} == {boss["id"], ada["id"]}
    assert mine[0].keys() == {
        "id",
        "prefix",
        "key_name",
        "user_id",
        "email",
        *LIMITS,
        "created_at",
        "expires_at",
        "revoked_at",
    }


async def test_a_change_holds_at_once(api: Api) -> None:
    ada = await api.add_key("ada")
    answer = await api.ask("PATCH", f"/auth/keys/{ada['id']}", ada["api_key"], key_name="new", requests_per_minute=7)
    assert (answer.status, answer.body["key_name"], answer.body["requests_per_minute"]) == (200, "new", 7)
    shown = (await api.ask("GET", f"/auth/keys/{ada['id']}", ada["api_key"])).body
    assert shown == answer.body


async def test_a_revoked_key_is_dead_at_once_and_revoking_it_again_is_no_error(api: Api) -> None:
    boss, ada = await api.add_key("boss"), await api.add_key("ada")
    for key in (ada["api_key"], boss["api_key"]):
        answer = await api.ask("DELETE", f"/auth/keys/{ada['id']}", key)
        assert (answer.status, answer.body) == (200, {"id": ada["id"], "revoked": True})
    assert (await api.ask("GET", "/auth/keys", ada["api_key"])).status == 401
    assert (await api.ask("GET", f"/auth/keys/{ada['id']}", boss["api_key"])).body["revoked_at"]


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
async def test_a_foreign_key_does_not_exist(api: Api, method: str) -> None:
    boss, ada = await api.add_key("boss"), await api.add_key("ada")
    body = {"key_name": "mine"} if method == "PATCH" else {}
    foreign = await api.ask(method, f"/auth/keys/{boss['id']}", ada["api_key"], **body)
    missing = await api.ask(method, f"/auth/keys/{'0' * 12}", ada["api_key"], **body)
    assert foreign.error == missing.error == (404, "key_not_found", None)


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
async def test_nothing_is_shown_or_changed_without_a_key(api: Api, method: str) -> None:
    key = await api.add_key("ada")
    paths = [f"/auth/keys/{key['id']}", *(["/auth/keys"] if method == "GET" else [])]
    for path in paths:
        assert (await api.ask(method, path)).error == (401, "invalid_api_key", None)
        assert (await api.ask(method, path, "aig_wrong")).error == (401, "invalid_api_key", None)


async def test_an_id_that_no_key_can_have_is_404(api: Api) -> None:
    boss = await api.add_key("boss")
    for text in ("%00", "a%2Fb", "%ED%A0%80", "a" * 65):
        async with api.client.get(f"/auth/keys/{text}", headers={"X-API-Key": boss["api_key"]}) as response:
            assert response.status == 404


# --- users --------------------------------------------------------------------------------------------------------

BUDGET: dict[str, Any] = {name: LIMITS[name] for name in BUDGET_FIELDS}


async def test_a_member_sees_its_own_account_and_an_admin_all(api: Api) -> None:
    boss, ada = await api.add_key("boss"), await api.add_key("ada")
    mine = (await api.ask("GET", "/auth/users", ada["api_key"])).body["users"]
    everybodys = (await api.ask("GET", "/auth/users", boss["api_key"])).body["users"]
    assert [user["email"] for user in mine] == ["ada@example.com"]
    assert [(user["email"], user["role"]) for user in everybodys] == [
        ("boss@example.com", "admin"),
        ("ada@example.com", "member"),
    ]
    assert mine[0].keys() == {"id", "email", "role", "created_at", *BUDGET_FIELDS}
    assert {name: mine[0][name] for name in BUDGET_FIELDS} == dict.fromkeys(BUDGET_FIELDS, 0)


ROLES = ["admin", "member", "nobody"]
WHO_MAY = [  # method, whose account, status for each of ROLES
    ("GET", "own", (200, 200, 401)),
    ("GET", "other", (200, 404, 401)),
    ("GET", "missing", (404, 404, 401)),
    ("PATCH", "own", (200, 403, 401)),
    ("PATCH", "other", (200, 404, 401)),
    ("PATCH", "missing", (404, 404, 401)),
]


@pytest.mark.parametrize(("method", "whose", "statuses"), WHO_MAY)
async def test_an_account_is_shown_to_its_owner_and_changed_by_an_admin_alone(
    api: Api, method: str, whose: str, statuses: tuple[int, ...]
) -> None:
    keys = {"admin": (await api.add_key("boss"))["api_key"], "member": (await api.add_key("ada"))["api_key"]}
    users = (await api.ask("GET", "/auth/users", keys["admin"])).body["users"]
    ids = {user["role"]: user["id"] for user in users}
    for role, status in zip(ROLES, statuses, strict=True):
        others = {"admin": ids["member"], "member": ids["admin"], "nobody": ids["admin"]}
        wanted = {"own": ids.get(role, ids["member"]), "other": others[role], "missing": new_id()}[whose]
        body = {"cost_per_day": 5} if method == "PATCH" else {}
        answer = await api.ask(method, f"/auth/users/{wanted}", keys.get(role), **body)
        assert answer.status == status, role
        if status == 404:
            assert answer.error == (404, "account_not_found", None)
    changed = await api.pool.fetchval("select count(*) from accounts where cost_micros_per_day > 0")
    assert changed == (1 if method == "PATCH" and whose != "missing" else 0)


async def test_a_change_of_an_account_holds_for_all_its_keys_at_once(api: Api) -> None:
    boss, keys = await api.add_key("boss"), [await api.add_key("ada") for _ in range(2)]
    users = (await api.ask("GET", "/auth/users", keys[0]["api_key"])).body["users"]
    verify = api.keys.verify
    assert not any([(await verify(key["api_key"])).account_budget for key in keys])
    answer = await api.ask("PATCH", f"/auth/users/{users[0]['id']}", boss["api_key"], **BUDGET)
    assert answer.status == 200
    assert {name: answer.body[name] for name in BUDGET_FIELDS} == BUDGET
    expected = Budget(10_000, 1_000_000, 4_350_000, 20_000_001)
    assert [(await verify(key["api_key"])).account_budget for key in keys] == [expected] * 2
    assert not (await verify(boss["api_key"])).account_budget
    assert not (await verify(keys[0]["api_key"])).budget


async def test_an_account_is_changed_by_its_budget_only(api: Api) -> None:
    boss = (await api.add_key("boss"))["api_key"]
    [user, _] = (await api.ask("GET", "/auth/users", boss)).body["users"]
    for field in (
        "role",
        "id",
        "email",
        "password_hash",
        "requests_per_minute",
        "drain_seconds",
        "cost_micros_per_day",
    ):
        answer = await api.ask("PATCH", f"/auth/users/{user['id']}", boss, **{field: 1})
        assert answer.error == (400, "unknown_parameter", field)
    answer = await api.ask("PATCH", f"/auth/users/{user['id']}", boss, cost_per_day=-1)
    assert answer.error == (400, "invalid_value", "cost_per_day")


async def test_an_id_that_no_account_can_have_is_404(api: Api) -> None:
    boss = await api.add_key("boss")
    for text in ("x", "0" * 36, "%00" * 36, "0" * 32):
        async with api.client.get(f"/auth/users/{text}", headers={"X-API-Key": boss["api_key"]}) as response:
            assert response.status == 404


# --- bodies -------------------------------------------------------------------------------------------------------

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"email": 1}, "email"),
    ({"email": "no email"}, "email"),
    ({"email": None}, "email"),
    ({"password": ["x"]}, "password"),
    ({"password": "short"}, "password"),
    ({"password": "x" * 129}, "password"),
    ({"password": "nul\0inside"}, "password"),
    ({"key_name": ""}, "key_name"),
    ({"key_name": "   "}, "key_name"),
    ({"key_name": "x" * 101}, "key_name"),
    ({"key_name": "line\nbreak"}, "key_name"),
    ({"key_name": "nul\0"}, "key_name"),
    ({"key_name": 1}, "key_name"),
    ({"requests_per_minute": -1}, "requests_per_minute"),
    ({"requests_per_minute": 1.5}, "requests_per_minute"),
    ({"requests_per_minute": True}, "requests_per_minute"),
    ({"requests_per_minute": "60"}, "requests_per_minute"),
    ({"requests_per_minute": None}, "requests_per_minute"),
    ({"requests_per_minute": 2**31}, "requests_per_minute"),
    ({"concurrent_requests": 10**30}, "concurrent_requests"),
    ({"requests_per_second": -0.5}, "requests_per_second"),
    ({"requests_per_second": "5"}, "requests_per_second"),
    ({"requests_per_second": 1e-7}, "requests_per_second"),
    ({"requests_per_second": 1_000_001}, "requests_per_second"),
    ({"burst": 1.5}, "burst"),
    ({"burst": None}, "burst"),
    ({"tokens_per_minute": -1}, "tokens_per_minute"),
    ({"tokens_per_day": 10**12 + 1}, "tokens_per_day"),
    ({"tokens_per_day": 1.5}, "tokens_per_day"),
    ({"cost_per_day": -1}, "cost_per_day"),
    ({"cost_per_day": "5"}, "cost_per_day"),
    ({"cost_per_day": True}, "cost_per_day"),
    ({"cost_per_day": 0.0000001}, "cost_per_day"),
    ({"cost_per_month": 1.2345678}, "cost_per_month"),
    ({"cost_per_month": 10**9 + 1}, "cost_per_month"),
    ({"drain_seconds": 601}, "drain_seconds"),
    ({"drain_seconds": 0.5}, "drain_seconds"),
    ({"cache_ttl": 30 * 86400 + 1}, "cache_ttl"),
    ({"cache_ttl": -1}, "cache_ttl"),
    ({"cost_micros_per_day": 5}, "cost_micros_per_day"),
    ({"allowed_models": "gpt-*"}, "allowed_models"),
    ({"allowed_models": [""]}, "allowed_models"),
    ({"allowed_models": [1]}, "allowed_models"),
    ({"allowed_models": ["nul\0"]}, "allowed_models"),
    ({"allowed_models": ["x" * 257]}, "allowed_models"),
    ({"allowed_models": ["x"] * 101}, "allowed_models"),
    ({"requests_per_minutes": 5}, "requests_per_minutes"),
    ({"account_id": "someone else"}, "account_id"),
    ({"role": "admin"}, "role"),
]


async def test_a_bad_field_is_400_and_named(api: Api) -> None:
    good = {"email": "ada@example.com", "password": PASSWORD, "key_name": "x"}
    for bad, param in BAD_FIELDS:
        answer = await api.ask("POST", "/auth/keys", **{**good, **bad})
        assert (answer.status, answer.body["error"]["param"]) == (400, param), bad
    assert await api.pool.fetchval("select count(*) from keys") == 0


@pytest.mark.parametrize("missing", ["email", "key_name"])
async def test_a_missing_field_is_400_and_named(api: Api, missing: str) -> None:
    fields = {"email": "ada@example.com", "password": PASSWORD, "key_name": "x"}
    del fields[missing]
    assert (await api.ask("POST", "/auth/keys", **fields)).error == (400, "missing_required_parameter", missing)


async def test_a_key_is_changed_by_known_fields_only(api: Api) -> None:
    boss = await api.add_key("boss")
    for field in ("id", "account_id", "revoked_at", "role", "email", "digest"):
        answer = await api.ask("PATCH", f"/auth/keys/{boss['id']}", boss["api_key"], **{field: "x"})
        assert answer.error == (400, "unknown_parameter", field)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"email": NaN}',
        b'{"email": "a", "email": "b"}',
        b'{"email": "\\ud800"}',
        b"\xff\xfe",
        b'{"a":' * 100 + b"1" + b"}" * 100,
    ],
)
async def test_what_is_no_json_object_is_400(api: Api, body: bytes) -> None:
    for path in ("/auth/register", "/auth/keys"):
        async with api.client.post(path, data=body, headers=JSON) as response:
            assert response.status == 400
            assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_a_body_of_more_than_16_kib_is_413_declared_or_not(api: Api) -> None:
    body = b" " * (16 * 1024 + 1)

    async def undeclared() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 1024):
            yield body[at : at + 1024]

    for data in (body, undeclared()):
        async with api.client.post("/auth/register", data=data, headers=JSON) as response:
            assert response.status == 413


@pytest.mark.parametrize("headers", [{**JSON, "Content-Encoding": "gzip"}, {"Content-Type": "text/plain"}], ids=str)
async def test_a_compressed_body_and_one_that_says_it_is_no_json_are_415(api: Api, headers: dict[str, str]) -> None:
    async with api.client.post("/auth/register", data=b"{}", headers=headers) as response:
        assert response.status == 415


async def test_a_body_that_never_comes_is_408(start: Start) -> None:
    api = await start(gateway_body_timeout=0.05)

    async def stuck() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    async with (
        ClientSession() as session,
        session.post(api.client.make_url("/auth/register"), data=stuck(), headers=JSON) as response,
    ):
        assert response.status == 408


async def test_no_answer_is_kept_by_a_cache(api: Api) -> None:
    fields = {"email": "ada@example.com", "password": PASSWORD, "key_name": "x"}
    async with api.client.post("/auth/keys", json=fields) as response:
        assert response.headers["Cache-Control"] == "no-store"


async def test_without_postgres_it_is_503_and_says_when_to_come_back(api: Api) -> None:
    await api.pool.close()
    fields = {"email": "ada@example.com", "password": PASSWORD, "key_name": "x"}
    async with api.client.post("/auth/keys", json=fields) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
