"""Signing in with a browser, and what its cookie may do: nothing more than its account, and only from our own pages."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from argon2 import PasswordHasher

from gateway import appkeys
from gateway.stores.accounts import FAILURES_PER_MINUTE
from gateway.stores.tokens import make_token, parse_token
from tests.support.gateway import Gateway, chat_body, read_events, running_gateway
from tests.support.process import serving
from tests.support.proxy import proxied_postgres

pytestmark = pytest.mark.integration

PASSWORD = "correct horse"
ONE_TOKEN = "openai/mock-gpt?tokens=1"
OURS = {"Sec-Fetch-Site": "same-origin"}  # what a browser says of a request of our own page


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: Any  # None when it is no JSON

    @property
    def code(self) -> str:
        code: str = self.body["error"]["code"]
        return code


@dataclass
class Browser:
    """Keeps the cookie, and says where a request came from."""

    gateway: Gateway
    client: aiohttp.ClientSession
    token: str = ""
    sent: Mapping[str, str] = field(default_factory=lambda: OURS)

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        given = {**self.sent, **({"Cookie": f"aig_session={self.token}"} if self.token else {})}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"{self.gateway.root_url}{path}"
        async with self.client.request(method, url, json=body, headers={**given, **named}) as response:
            is_json = response.content_type == "application/json"
            return Answer(response.status, response.headers, await response.json() if is_json else None)

    async def sign_in(self, name: str, password: str = PASSWORD) -> Answer:
        answer = await self.ask("POST", "/auth/session", {"email": f"{name}@example.com", "password": password})
        if answer.status == 200:
            self.token = answer.headers["Set-Cookie"].partition("=")[2].partition(";")[0]
        return answer

    async def chat(self, key: str, model: str = ONE_TOKEN) -> Answer:
        return await self.ask("POST", "/v1/chat/completions", chat_body(model), X_Gateway_Key=key)


@dataclass
class World:
    """The admin (`admin`) and two members (`ada`, `ben`), each with a key."""

    gateway: Gateway
    client: aiohttp.ClientSession
    ids: dict[str, str] = field(default_factory=dict)  # of accounts, by name
    keys: dict[str, str] = field(default_factory=dict)  # tokens, by the name of their account

    async def signed_in(self, name: str) -> Browser:
        browser = Browser(self.gateway, self.client)
        assert (await browser.sign_in(name)).status == 200
        return browser

    async def add_key(self, name: str, expires_at: datetime | None = None, **limits: Any) -> str:
        made = await self.gateway.app[appkeys.KEYS].create(self.ids[name], f"key of {name}", expires_at, **limits)
        return made.token


@asynccontextmanager
async def open_world(database_url: str, redis_url: str, **environ: str) -> AsyncIterator[World]:
    async with running_gateway(database_url, redis_url, environ) as gateway, aiohttp.ClientSession() as client:
        world = World(gateway, client, {"admin": gateway.account_id}, {"admin": gateway.api_key})
        for name in ("ada", "ben"):
            account = await gateway.app[appkeys.ACCOUNTS].register(f"{name}@example.com", PASSWORD, registration="open")
            world.ids[name] = account.id
            world.keys[name] = await world.add_key(name)
        yield world


@pytest.fixture(autouse=True)
def fast_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("accounts.PASSWORD_HASHER", "keys.KEY_HASHER"):
        monkeypatch.setattr(f"gateway.stores.{name}", PasswordHasher(1, 8, 1))


@pytest.fixture
async def world(database_url: str, redis_url: str) -> AsyncIterator[World]:
    async with open_world(database_url, redis_url) as world:
        yield world


def id_of(token: str) -> str:
    parsed = parse_token(token)
    assert parsed is not None
    return parsed.id


# --- signing in ---------------------------------------------------------------------------------------------------


async def test_signing_in_answers_who_it_is_and_sets_a_cookie_that_is_nobody_elses(world: World) -> None:
    browser = Browser(world.gateway, world.client)
    answer = await browser.sign_in("ada")
    assert answer.status == 200
    expires_at = datetime.fromisoformat(answer.body.pop("expires_at"))
    assert answer.body == {"user_id": world.ids["ada"], "email": "ada@example.com", "role": "member"}
    assert abs(expires_at - datetime.now(UTC) - timedelta(hours=12)) < timedelta(minutes=5)
    cookie, *flags = answer.headers["Set-Cookie"].split("; ")
    assert re.fullmatch(r"aig_session=[\w-]{43}", cookie)
    assert set(flags) == {"HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=43200"}
    assert answer.headers["Cache-Control"] == "no-store"
    shown = await browser.ask("GET", "/auth/session")
    assert (shown.status, shown.body) == (200, {**answer.body, "expires_at": shown.body["expires_at"]})
    assert shown.headers["Cache-Control"] == "no-store"
    assert "Set-Cookie" not in shown.headers


async def test_the_first_account_is_told_that_it_is_the_admin(world: World) -> None:
    assert (await (await world.signed_in("admin")).ask("GET", "/auth/session")).body["role"] == "admin"


@pytest.mark.parametrize(
    ("proxies", "told", "secure"), [("0", "https", False), ("1", "https", True), ("1", "http", False)]
)
async def test_the_cookie_is_for_https_alone_where_a_trusted_proxy_says_that_it_is_used(
    database_url: str, redis_url: str, proxies: str, told: str, *, secure: bool
) -> None:
    async with open_world(database_url, redis_url, GATEWAY_TRUSTED_PROXIES=proxies) as world:
        browser = await world.signed_in("ada")
        login = {"email": "ada@example.com", "password": PASSWORD}
        for method, body in (("POST", login), ("DELETE", None)):
            answer = await browser.ask(method, "/auth/session", body, X_Forwarded_Proto=told)
            assert ("Secure" in answer.headers["Set-Cookie"].split("; ")) is secure


async def test_a_wrong_password_and_an_unknown_email_are_told_in_the_same_words_until_neither_is_checked(
    world: World,
) -> None:
    browser = Browser(world.gateway, world.client)
    for name, password in (("ada", "wrong horse"), ("nobody", PASSWORD)):
        answers = [await browser.sign_in(name, password) for _ in range(FAILURES_PER_MINUTE + 1)]
        assert [answer.status for answer in answers] == [401] * FAILURES_PER_MINUTE + [429]
        assert {answer.code for answer in answers} == {"invalid_credentials", "too_many_failures"}
        assert {answer.body["error"]["message"] for answer in answers[:-1]} == {"wrong email or password"}
        assert all("Set-Cookie" not in answer.headers for answer in answers)
        assert int(answers[-1].headers["Retry-After"]) <= 60
    assert (await browser.sign_in("ada")).status == 429, "whoever guessed does not learn that it was right"
    assert (await browser.sign_in("ben")).status == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"email": "ada@example.com"}, "missing_required_parameter"),
        ({"password": PASSWORD}, "missing_required_parameter"),
        ({"email": "ada@example.com", "password": PASSWORD, "role": "admin"}, "unknown_parameter"),
        ({"email": 5, "password": PASSWORD}, "invalid_value"),
        ({"email": "ada@example.com", "password": None}, "invalid_value"),
        ([], "invalid_json"),
    ],
)
async def test_what_is_no_sign_in_is_refused(world: World, body: Any, code: str) -> None:
    answer = await Browser(world.gateway, world.client).ask("POST", "/auth/session", body)
    assert (answer.status, answer.code) == (400, code)


async def test_no_other_site_signs_its_visitor_in(world: World) -> None:
    """It would be in to an account of that site's owner, who then reads along."""
    foreign = [{"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "https://evil.example"}]
    for sent in (*foreign, {"Origin": "null"}):
        answer = await Browser(world.gateway, world.client, sent=sent).sign_in("ada")
        assert (answer.status, answer.code) == (403, "cross_site")
        assert "Set-Cookie" not in answer.headers
    for sent in ({}, OURS, {"Origin": world.gateway.root_url}):
        assert (await Browser(world.gateway, world.client, sent=sent).sign_in("ada")).status == 200


# --- signing out --------------------------------------------------------------------------------------------------


async def test_who_signs_out_is_out_everywhere_at_once_and_others_are_not(
    world: World, database_url: str, redis_url: str
) -> None:
    ada, elsewhere = await world.signed_in("ada"), await world.signed_in("ada")
    async with running_gateway(database_url, redis_url, account=world.ids["admin"]) as two:
        there = Browser(two, world.client, ada.token)
        assert (await there.ask("GET", "/auth/session")).status == 200
        answer = await ada.ask("DELETE", "/auth/session")
        assert (answer.status, answer.body) == (204, None)
        cookie, *flags = answer.headers["Set-Cookie"].split("; ")
        assert cookie == 'aig_session=""'
        assert {"Max-Age=0", "Path=/", "HttpOnly", "SameSite=Strict"} <= set(flags)
        assert [(await browser.ask("GET", "/auth/session")).status for browser in (ada, there, elsewhere)] == [
            401,
            401,
            200,
        ]
        assert (await ada.ask("GET", "/auth/keys")).code == "invalid_session"
    assert (await ada.ask("DELETE", "/auth/session")).status == 204, "once more is no error"
    assert (await Browser(world.gateway, world.client).ask("DELETE", "/auth/session")).status == 204
    assert await world.gateway.app[appkeys.POOL].fetchval("select count(*) from sessions") == 1


async def test_a_session_that_has_expired_is_none(world: World) -> None:
    ada = await world.signed_in("ada")
    await world.gateway.app[appkeys.POOL].execute("update sessions set expires_at = now()")
    for path in ("/auth/session", "/auth/keys", "/auth/users", "/api/stats", "/api/usage", "/v1/models"):
        answer = await ada.ask("GET", path)
        assert (answer.status, answer.code) == (401, "invalid_session"), path
    assert (await ada.chat(id_of(world.keys["ada"]))).status == 401
    assert (await ada.sign_in("ada")).status == 200
    assert (await ada.ask("GET", "/auth/keys")).status == 200


async def test_a_key_is_no_session(world: World) -> None:
    answer = await Browser(world.gateway, world.client).ask(
        "GET", "/auth/session", Authorization=f"Bearer {world.keys['ada']}"
    )
    assert (answer.status, answer.code) == (401, "invalid_session")


async def test_a_role_that_is_taken_away_is_gone_with_the_next_request(world: World) -> None:
    admin = await world.signed_in("admin")
    assert len((await admin.ask("GET", "/auth/users")).body["users"]) == 3
    await world.gateway.app[appkeys.POOL].execute("update accounts set role = 'member'")
    assert len((await admin.ask("GET", "/auth/users")).body["users"]) == 1


# --- pages of others ----------------------------------------------------------------------------------------------


async def test_no_page_of_others_does_anything_with_the_cookie(world: World, figure: Callable[[str], None]) -> None:
    """Of every route: the strictest browser, one that says where a request came from, and one that says too little."""
    admin = await world.signed_in("admin")
    key = id_of(world.keys["admin"])
    routes = [
        ("GET", "/auth/session"), ("DELETE", "/auth/session"), ("GET", "/auth/keys"), ("POST", "/auth/keys"),
        ("GET", f"/auth/keys/{key}"), ("PATCH", f"/auth/keys/{key}"), ("DELETE", f"/auth/keys/{key}"),
        ("GET", "/auth/users"), ("PATCH", f"/auth/users/{world.ids['ada']}"), ("GET", "/api/stats"),
        ("GET", "/api/usage"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions"),
    ]  # fmt: skip
    foreign = [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": world.gateway.root_url},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ]
    silent: dict[str, str] = {}  # what is neither GET nor HEAD always has an Origin, so a browser did not send it
    asked = 0
    for method, path in routes:
        for sent in (*foreign, *([silent, {"Sec-Fetch-Site": "none"}] if method != "GET" else [])):
            body = {"key_name": "x"} if method in ("POST", "PATCH") else None
            page = Browser(world.gateway, world.client, admin.token, sent)
            answer = await page.ask(method, path, body, X_Gateway_Key=key)
            assert (answer.status, answer.code) == (403, "cross_site"), (method, path, sent)
            assert answer.body["error"]["type"] == "permission_error"
            asked += 1
    assert (await admin.ask("GET", f"/auth/keys/{key}")).body["revoked_at"] is None
    assert len((await admin.ask("GET", "/auth/keys")).body["keys"]) == 3
    figure(f"sessions: {asked} requests of other sites' pages on {len(routes)} routes, every one refused")


# --- tenants ------------------------------------------------------------------------------------------------------


async def test_a_member_sees_its_own_and_an_admin_everybodys(world: World) -> None:
    ada, admin = await world.signed_in("ada"), await world.signed_in("admin")
    for name in ("ada", "ben"):
        assert (await (await world.signed_in(name)).chat(id_of(world.keys[name]))).status == 200
    assert len(await world.gateway.rows()) == 2
    for browser, keys, users, requests in ((ada, 1, 1, 1), (admin, 3, 3, 2)):
        assert len((await browser.ask("GET", "/auth/keys")).body["keys"]) == keys
        assert len((await browser.ask("GET", "/auth/users")).body["users"]) == users
        assert (await browser.ask("GET", "/api/stats")).body["totals"]["requests"] == requests
        assert len((await browser.ask("GET", "/api/usage")).body["data"]) == requests
    own, bens = id_of(world.keys["ada"]), id_of(world.keys["ben"])
    assert (await ada.ask("GET", f"/api/usage?key={bens}")).body["data"] == []
    for method, path in (
        ("GET", f"/auth/keys/{bens}"),
        ("PATCH", f"/auth/keys/{bens}"),
        ("DELETE", f"/auth/keys/{bens}"),
        ("GET", f"/auth/users/{world.ids['ben']}"),
    ):
        assert (await ada.ask(method, path, {"key_name": "x"} if method == "PATCH" else None)).status == 404
    assert (await ada.ask("PATCH", f"/auth/users/{world.ids['ada']}", {"tokens_per_day": 5})).status == 403
    assert (await ada.ask("PATCH", f"/auth/keys/{own}", {"key_name": "renamed"})).body["key_name"] == "renamed"
    assert (await admin.ask("DELETE", f"/auth/keys/{bens}")).status == 200
    assert (await ada.ask("DELETE", f"/auth/keys/{own}")).status == 200


async def test_a_key_in_the_headers_wins_over_the_cookie(world: World) -> None:
    admin = await world.signed_in("admin")
    bearer = {"Authorization": f"Bearer {world.keys['ada']}"}
    assert len((await admin.ask("GET", "/auth/keys", **bearer)).body["keys"]) == 1
    admin.sent = {"Sec-Fetch-Site": "cross-site"}
    assert (await admin.ask("GET", "/v1/models", X_API_Key=world.keys["ada"])).status == 200
    assert (await admin.ask("GET", "/auth/keys", X_API_Key=make_token())).code == "invalid_api_key"


# --- keys are made and changed ------------------------------------------------------------------------------------


async def test_a_member_makes_keys_for_itself_within_the_defaults(world: World) -> None:
    ada = await world.signed_in("ada")
    made = await ada.ask("POST", "/auth/keys", {"key_name": "laptop", "cost_per_day": 1.5})
    assert made.status == 201
    shown = (await ada.ask("GET", f"/auth/keys/{made.body['id']}")).body
    assert (shown["user_id"], shown["requests_per_minute"], shown["cost_per_day"]) == (world.ids["ada"], 60, 1.5)
    for method, path in (("POST", "/auth/keys"), ("PATCH", f"/auth/keys/{made.body['id']}")):
        beyond = await ada.ask(method, path, {"key_name": "x", "requests_per_minute": 61})
        assert (beyond.status, beyond.body["error"]["param"]) == (403, "requests_per_minute")
        assert (await ada.ask(method, path, {"key_name": "x", "requests_per_minute": 59})).status in (200, 201)
    for name in ("ben", "ada", "nobody"):
        others = await ada.ask("POST", "/auth/keys", {"key_name": "x", "email": f"{name}@example.com"})
        assert (others.status, others.body["error"]["param"]) == (403, "email")
    async with world.client.get(
        f"{world.gateway.base_url}/models", headers={"Authorization": f"Bearer {made.body['api_key']}"}
    ) as response:
        assert response.status == 200


async def test_an_admin_makes_keys_for_itself_and_for_others_without_bounds(world: World) -> None:
    admin = await world.signed_in("admin")
    for email, owner in ((None, "admin"), ("ben@example.com", "ben")):
        fields = {"key_name": "x", "requests_per_minute": 0, **({"email": email} if email else {})}
        made = await admin.ask("POST", "/auth/keys", fields)
        assert made.status == 201
        assert (await admin.ask("GET", f"/auth/keys/{made.body['id']}")).body["user_id"] == world.ids[owner]
    unknown = await admin.ask("POST", "/auth/keys", {"key_name": "x", "email": "nobody@example.com"})
    assert (unknown.status, unknown.code) == (404, "account_not_found")


async def test_an_email_and_its_password_win_over_the_cookie(world: World) -> None:
    fields = {"key_name": "x", "email": "ben@example.com", "password": PASSWORD}
    made = await (await world.signed_in("ada")).ask("POST", "/auth/keys", fields)
    keys = (await (await world.signed_in("ben")).ask("GET", "/auth/keys")).body["keys"]
    assert made.body["id"] in {key["id"] for key in keys}


# --- the playground -----------------------------------------------------------------------------------------------


async def test_who_signed_in_asks_a_model_as_a_key_of_theirs_which_pays(world: World) -> None:
    ada, key = await world.signed_in("ada"), id_of(world.keys["ada"])
    assert [(await ada.chat(name)).status for name in (key, f"aig_{key}")] == [200, 200]
    rows = await world.gateway.rows()
    assert [(row["key_id"], str(row["account_id"])) for row in rows] == [(key, world.ids["ada"])] * 2
    body = chat_body("openai/mock-gpt?tokens=3", stream=True)
    headers = {**OURS, "Cookie": f"aig_session={ada.token}", "X-Gateway-Key": key}
    url = f"{world.gateway.base_url}/chat/completions"
    async with world.client.post(url, json=body, headers=headers) as response:
        assert (await read_events(response))[-1] == "[DONE]"
    assert all("cookie" not in {name.lower() for name in call.headers} for call in world.gateway.calls)


async def test_without_a_key_of_its_own_in_use_nobody_asks_a_model(world: World) -> None:
    ada, admin = await world.signed_in("ada"), await world.signed_in("admin")
    revoked, expired = await world.add_key("ada"), await world.add_key("ada")
    await world.gateway.app[appkeys.KEYS].revoke(id_of(revoked), None)
    past = "update keys set expires_at = now() where id = $1"
    await world.gateway.app[appkeys.POOL].execute(past, id_of(expired))
    bad = [id_of(token) for token in (revoked, expired, world.keys["ben"], make_token())]
    answers = [await ada.chat(key) for key in bad]
    answers += [await admin.chat(id_of(world.keys["ada"]))]  # an admin, too, spends its own
    for path in ("/v1/models", "/v1/models/openai/mock-gpt"):
        answers += [await ada.ask("GET", path, X_Gateway_Key=key) for key in bad]
        assert (await ada.ask("GET", path)).status == 401
    assert {(answer.status, answer.code) for answer in answers} == {(403, "key_not_usable")}
    assert len({answer.body["error"]["message"] for answer in answers}) == 1
    others = [(await ada.chat(key)).status for key in ("", "aig_", world.keys["ada"])]
    assert others == [401, 401, 400]
    assert (await ada.ask("GET", "/v1/models", X_Gateway_Key=id_of(world.keys["ada"]))).status == 200
    assert world.gateway.calls == []
    assert (await Browser(world.gateway, world.client).chat(id_of(world.keys["ada"]))).status == 401


async def test_a_lent_key_keeps_its_limits_its_models_and_its_budget(world: World) -> None:
    ada = await world.signed_in("ada")
    once = id_of(await world.add_key("ada", requests_per_minute=1))
    assert [(await ada.chat(once)).status for _ in range(2)] == [200, 429]
    narrow = id_of(await world.add_key("ada", allowed_models=("openai/other*",)))
    assert (await ada.chat(narrow)).code == "model_not_allowed"
    poor = id_of(await world.add_key("ada", tokens_per_day=1))
    spent = await ada.chat(poor)
    assert (spent.status, spent.code) == (429, "insufficient_quota")


async def test_a_change_of_a_lent_key_holds_for_the_next_request(world: World) -> None:
    ada, key = await world.signed_in("ada"), id_of(world.keys["ada"])
    assert (await ada.chat(key)).status == 200
    assert (await ada.ask("PATCH", f"/auth/keys/{key}", {"allowed_models": ["nothing"]})).status == 200
    assert (await ada.chat(key)).code == "model_not_allowed"
    assert (await ada.ask("DELETE", f"/auth/keys/{key}")).status == 200
    assert (await ada.chat(key)).code == "key_not_usable"


async def test_the_open_stream_of_a_lent_key_is_cut_when_it_is_revoked(world: World) -> None:
    ada, key = await world.signed_in("ada"), id_of(world.keys["ada"])
    body = chat_body("openai/mock-gpt?tokens=2000&pace_ms=20", stream=True)
    headers = {**OURS, "Cookie": f"aig_session={ada.token}", "X-Gateway-Key": key}
    url = f"{world.gateway.base_url}/chat/completions"
    async with world.client.post(url, json=body, headers=headers) as response:
        assert response.status == 200
        await response.content.readany()
        assert (await ada.ask("DELETE", f"/auth/keys/{key}")).status == 200
        events = await asyncio.wait_for(read_events(response), 30)
    assert json.loads(events[-1])["error"]["code"] == "key_ended"
    (row,) = await world.gateway.rows()
    assert (row["key_id"], row["outcome"], row["error_code"]) == (key, "interrupted", "key_ended")


# --- in bad times -------------------------------------------------------------------------------------------------


async def test_without_postgres_nobody_is_signed_out_and_keys_go_on(database_url: str, redis_url: str) -> None:
    async with proxied_postgres(database_url) as (proxy, url), open_world(url, redis_url) as world:
        ada, key = await world.signed_in("ada"), id_of(world.keys["ada"])
        assert (await ada.ask("GET", "/v1/models", X_API_Key=world.keys["ada"])).status == 200
        await proxy.cut()
        answers = [
            await ada.sign_in("ada"),
            await ada.ask("GET", "/auth/session"),
            await ada.ask("DELETE", "/auth/session"),
            await ada.ask("GET", "/auth/keys"),
            await ada.chat(key),
        ]
        assert {answer.status for answer in answers} == {503}
        assert all("Set-Cookie" not in answer.headers for answer in answers)
        assert (await ada.ask("GET", "/v1/models", X_API_Key=world.keys["ada"])).status == 200
        await proxy.start()
        async with asyncio.timeout(30):
            while (await ada.ask("GET", "/auth/session")).status != 200:
                await asyncio.sleep(0.05)


async def test_what_a_cookie_does_not_pay_for_is_counted_as_what_it_is(world: World) -> None:
    ada = await world.signed_in("ada")
    assert [(await ada.chat(key)).status for key in (id_of(world.keys["ben"]), "")] == [403, 401]
    assert (await Browser(world.gateway, world.client).chat("")).status == 401
    async with world.client.get(f"{world.gateway.root_url}/metrics") as response:
        page = await response.text()
    assert 'gateway_auth_failures_total{reason="invalid"} 2' in page
    assert 'gateway_auth_failures_total{reason="missing"} 1' in page


@pytest.mark.parametrize("environment", ["production", "development"])
async def test_the_cookie_and_the_password_are_in_no_log_no_metric_and_no_error(
    database_url: str, redis_url: str, tmp_path: Path, environment: str
) -> None:
    log = tmp_path / "log"
    environ = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "ENVIRONMENT": environment,
        "LOG_LEVEL": "debug",
        "GATEWAY_MOCK": "off",
    }
    login = {"email": "ada@example.com", "password": "kanarie.password"}
    texts = []
    async with serving(environ, log=log) as served, aiohttp.ClientSession() as client:

        async def ask(method: str, path: str, body: Any = None, **headers: str) -> str:
            named = {**OURS, **{name.replace("_", "-"): value for name, value in headers.items()}}
            async with client.request(method, f"{served.root_url}{path}", json=body, headers=named) as response:
                texts.append(f"{await response.text()} {response.reason}")
                return str(response.headers.get("Set-Cookie", ""))

        await ask("POST", "/auth/register", login)
        await ask("POST", "/auth/session", {**login, "password": "kanarie.wrong"})
        token = (await ask("POST", "/auth/session", login)).partition("=")[2].partition(";")[0]
        assert len(token) == 43
        cookie = f"aig_session={token}"
        odd = (f'ключ={token}; "{token}"; {cookie}', f"{cookie}x", f"{cookie}; {cookie[:-1]}", f"{cookie}\t;")
        for sent in (cookie, *odd):
            for path in (
                "/auth/session",
                "/auth/keys",
                "/api/stats",
                "/v1/models",
                "/nowhere",
                f"/{token}",
                "/metrics",
            ):
                await ask("GET", path, Cookie=sent)
                await ask("GET", path, Cookie=sent, Sec_Fetch_Site="cross-site")
                await ask("GET", path, Cookie=sent, X_Gateway_Key=token)
        await ask("DELETE", "/auth/session", Cookie=cookie)
    said = log.read_text() + "\n".join(texts)
    assert log.read_text().count("/auth/session") > 10
    for canary in (token, "kanarie"):
        lines = [line for line in said.split("\n") if canary in line and f"/{token}" not in line]
        assert lines == []
