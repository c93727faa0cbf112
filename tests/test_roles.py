"""Who may do what: every route that there is, asked by everybody; and what is nobody's business but the owner's."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from argon2 import PasswordHasher

from gateway import appkeys
from gateway.stores.tokens import make_token, parse_token
from tests.support.gateway import Gateway, chat_body, running_gateway

pytestmark = pytest.mark.integration

PASSWORD = "correct horse"
ASKERS = (
    *("nobody", "wrong key", "revoked key", "member, own", "member, another's", "admin", "password"),
    *("session, own", "session, another's", "session, admin", "session and key", "session, from another site"),
)
OPEN = [200] * 12
KEY = [401, 401, 401, 200, 200, 200, 401, 401, 401, 401, 200, 403]
ANY = [401, 401, 401, 200, 200, 200, 401, 200, 200, 200, 200, 403]
KEY_OWN = [401, 401, 401, 200, 404, 200, 401, 401, 401, 401, 200, 403]
# A key gets as far as the body, which is none.
KEY_BODY = [401, 401, 401, 400, 400, 400, 401, 401, 401, 401, 400, 403]
OWN = [401, 401, 401, 200, 404, 200, 401, 200, 404, 200, 200, 403]
ADMIN = [401, 401, 401, 403, 403, 200, 401, 403, 403, 200, 403, 403]

# Of every route what each of ASKERS is answered. A new route is a line here.
MATRIX: dict[tuple[str, str], list[int]] = {
    ("POST", "/v1/chat/completions"): KEY,
    ("POST", "/v1/completions"): KEY,
    ("POST", "/v1/embeddings"): KEY,
    ("POST", "/v1/images/generations"): KEY_BODY,
    ("POST", "/v1/images/edits"): KEY_BODY,
    ("POST", "/v1/images/variations"): KEY_BODY,
    ("POST", "/v1/audio/speech"): KEY_BODY,
    ("POST", "/v1/audio/transcriptions"): KEY_BODY,
    ("POST", "/v1/audio/translations"): KEY_BODY,
    ("POST", "/v1/moderations"): KEY,
    ("POST", "/v1/files"): KEY_BODY,
    ("GET", "/v1/files"): KEY,
    ("GET", "/v1/files/{id}"): KEY_OWN,
    ("GET", "/v1/files/{id}/content"): KEY_OWN,
    ("DELETE", "/v1/files/{id}"): KEY_OWN,
    ("POST", "/v1/batches"): [401, 401, 401, 404, 404, 404, 401, 401, 401, 401, 404, 403],
    ("GET", "/v1/batches"): KEY,
    ("GET", "/v1/batches/{id}"): KEY_OWN,
    ("POST", "/v1/batches/{id}/cancel"): KEY_OWN,
    ("GET", "/v1/streams/{id}"): [401, 401, 401, 404, 404, 404, 401, 401, 401, 401, 404, 403],
    ("GET", "/v1/models"): KEY,
    ("GET", "/v1/models/{id}"): KEY,
    ("GET", "/health"): OPEN,
    ("GET", "/health/live"): OPEN,
    ("GET", "/health/ready"): OPEN,
    ("GET", "/metrics"): OPEN,
    ("GET", "/"): [302] * 12,
    ("GET", "/dashboard"): OPEN,
    ("GET", "/dashboard/{name}"): OPEN,
    ("POST", "/auth/register"): [201] * 12,
    ("POST", "/auth/session"): [200] * 11 + [403],
    ("GET", "/auth/session"): [401] * 7 + [200] * 4 + [403],
    ("DELETE", "/auth/session"): [204] * 11 + [403],
    ("POST", "/auth/keys"): [401, 401, 401, 403, 403, 201, 201, 201, 403, 201, 201, 403],
    ("GET", "/auth/keys"): ANY,
    ("GET", "/auth/keys/{id}"): OWN,
    ("PATCH", "/auth/keys/{id}"): OWN,
    ("DELETE", "/auth/keys/{id}"): OWN,
    ("GET", "/auth/users"): ANY,
    ("GET", "/auth/users/{id}"): OWN,
    ("PATCH", "/auth/users/{id}"): [401, 401, 401, 403, 404, 200, 401, 403, 404, 200, 403, 403],
    ("GET", "/api/stats"): ANY,
    ("GET", "/api/latency"): ANY,
    ("DELETE", "/api/cache"): ANY,
    ("GET", "/api/live"): ADMIN,
    ("GET", "/api/usage"): ANY,
    ("GET", "/api/usage/{id}"): OWN,
}


@dataclass
class Person:
    name: str
    account_id: str
    token: str

    @property
    def email(self) -> str:
        return f"{self.name}@example.com"


@dataclass
class World:
    """An admin, two members, and somebody who asks as any of them."""

    gateway: Gateway
    client: aiohttp.ClientSession
    people: dict[str, Person] = field(default_factory=dict)
    revoked: str = ""
    answered: dict[str, str] = field(default_factory=dict)  # request ids in the audit trail, by their account
    count: int = 0  # of accounts that were registered on the way

    async def key_of(self, account_id: str) -> str:
        made = await self.gateway.app[appkeys.KEYS].create(account_id, "laptop")
        return made.token

    async def session_of(self, account_id: str) -> str:
        return (await self.gateway.app[appkeys.SESSIONS].open(account_id)).token

    async def ask(
        self, method: str, path: str, token: str | None, body: dict[str, Any] | None = None, **more: str
    ) -> Any:
        """Status and JSON, None when the answer is none. `more`: headers."""
        headers = {**({"Authorization": f"Bearer {token}"} if token else {}), **more}
        url = f"{self.gateway.root_url}{path}"
        asked = self.client.request(method, url, json=body, headers=headers, allow_redirects=False)
        async with asked as response:
            is_json = response.content_type == "application/json" and method != "HEAD"
            return response.status, await response.json() if is_json else None


@pytest.fixture
async def world(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    for name in ("accounts.PASSWORD_HASHER", "keys.KEY_HASHER"):
        monkeypatch.setattr(f"gateway.stores.{name}", PasswordHasher(1, 8, 1))
    monkeypatch.setattr("gateway.stores.keys.FAILURES_PER_MINUTE", 10**9)
    async with running_gateway(database_url, redis_url) as gateway, aiohttp.ClientSession() as client:
        world = World(gateway, client)
        world.people["admin"] = Person("admin", gateway.account_id, gateway.api_key)
        for name in ("ada", "ben"):
            account = await gateway.app[appkeys.ACCOUNTS].register(f"{name}@example.com", PASSWORD, registration="open")
            world.people[name] = Person(name, account.id, await world.key_of(account.id))
        world.revoked = await world.key_of(world.people["ada"].account_id)
        await gateway.app[appkeys.KEYS].revoke(id_of(world.revoked), None)
        yield world


def id_of(token: str) -> str:
    parsed = parse_token(token)
    assert parsed is not None
    return parsed.id


# --- every route, everybody ---------------------------------------------------------------------------------------


def all_routes(gateway: Gateway) -> set[tuple[str, str]]:
    routes = {(route.method, route.resource.canonical) for route in gateway.app.router.routes() if route.resource}
    return {(method, path) for method, path in routes if method != "HEAD"}  # aiohttp's, beside every GET


async def answer_to(world: World, asker: str, method: str, template: str) -> int:
    """The status. What is asked about is the asker's own, but for `another's` and the admin's."""
    about = world.people["ben" if "another's" in asker or "admin" in asker else "ada"]
    path = template.replace("{name}", "")
    if template.startswith(("/v1/files/", "/v1/batches/")):
        path = template.replace("{id}", await _object_of(world, template.split("/")[2], about))
    elif template.endswith("/{id}"):
        known = {
            "streams": "none",
            "models": "openai/mock-gpt",
            "users": about.account_id,
            "usage": world.answered[about.account_id],
        }
        name = template.split("/")[2]
        path = template.replace("{id}", known[name] if name in known else id_of(await world.key_of(about.account_id)))
    body = _body(world, asker, method, template, about)
    status, _ = await world.ask(method, path, _token(world, asker), body, **await _session(world, asker))
    return int(status)


async def _object_of(world: World, kind: str, owner: Person) -> str:
    """The id of a new file or batch."""
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", b"{}", filename="a.jsonl")
    headers = {"Authorization": f"Bearer {owner.token}"}
    async with world.client.post(f"{world.gateway.base_url}/files", data=form, headers=headers) as response:
        made: dict[str, Any] = await response.json()
    if kind == "files":
        return str(made["id"])
    body = {"input_file_id": made["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    _, made = await world.ask("POST", "/v1/batches", owner.token, body)
    return str(made["id"])


def _token(world: World, asker: str) -> str | None:
    tokens = {"wrong key": make_token(), "revoked key": world.revoked, "admin": world.people["admin"].token}
    return tokens.get(asker, world.people["ada"].token if asker.startswith("member") else None)


async def _session(world: World, asker: str) -> dict[str, str]:
    """A new one each time: signing out ends it."""
    if not asker.startswith("session"):
        return {}
    person = world.people["admin" if asker == "session, admin" else "ada"]
    site = "same-site" if asker == "session, from another site" else "same-origin"
    key = {"X-Gateway-Key": id_of(person.token)} if asker == "session and key" else {}
    cookie = f"aig_session={await world.session_of(person.account_id)}"
    return {"Cookie": cookie, "Sec-Fetch-Site": site, **key}


def _body(world: World, asker: str, method: str, template: str, about: Person) -> dict[str, Any] | None:
    if method in ("GET", "DELETE"):
        return None
    world.count += 1
    login = {"email": about.email, "password": PASSWORD}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": chat_body("openai/mock-gpt?tokens=1"),
        "/v1/completions": {"model": "openai/mock-gpt", "prompt": "a", "max_tokens": 1},
        "/v1/embeddings": {"model": "openai/mock-gpt", "input": "a"},
        "/auth/register": {"email": f"user{world.count}@example.com", "password": PASSWORD},
        "/auth/session": login,
        "/auth/keys": {"key_name": "x", **({"email": about.email} if about.name == "ben" else {})},
        "/auth/keys/{id}": {"key_name": "y"},
        "/auth/users/{id}": {"tokens_per_day": 5},
    }
    body = bodies.get(template, {})
    return {**login, **body} if asker == "password" else body


async def test_every_route_answers_everybody_as_the_matrix_says(world: World, figure: Callable[[str], None]) -> None:
    assert all_routes(world.gateway) == MATRIX.keys()
    for person in world.people.values():
        await world.ask("POST", "/v1/chat/completions", person.token, chat_body("openai/mock-gpt?tokens=1"))
    world.answered = {str(row["account_id"]): str(row["request_id"]) for row in await world.gateway.rows()}
    answers = {
        (method, path): [await answer_to(world, asker, method, path) for asker in ASKERS] for method, path in MATRIX
    }
    told = {route: dict(zip(ASKERS, statuses, strict=True)) for route, statuses in answers.items()}
    assert told == {route: dict(zip(ASKERS, statuses, strict=True)) for route, statuses in MATRIX.items()}
    figure(f"roles: {len(MATRIX)} routes x {len(ASKERS)} askers, every answer as the matrix says")


async def test_head_is_answered_like_get(world: World) -> None:
    for method, path in MATRIX:
        if method == "GET" and "{" not in path:
            for token in (None, make_token(), world.people["ada"].token):
                statuses = [(await world.ask(name, path, token))[0] for name in ("GET", "HEAD")]
                assert statuses[0] == statuses[1], path


# --- tenants ------------------------------------------------------------------------------------------------------


async def test_what_does_not_exist_and_what_is_anothers_are_told_in_the_same_words(world: World) -> None:
    """404, and never 403: that would say that it is there."""
    ada, ben = world.people["ada"], world.people["ben"]
    kinds = [
        (("GET", "PATCH", "DELETE"), f"/auth/keys/{id_of(ben.token)}", f"/auth/keys/{id_of(make_token())}"),
        (("GET", "PATCH"), f"/auth/users/{ben.account_id}", "/auth/users/01890000-0000-7000-8000-000000000000"),
    ]
    for methods, foreign, missing in kinds:
        for method in methods:
            body = {"tokens_per_day": 5} if method == "PATCH" else None
            answers = [await world.ask(method, path, ada.token, body) for path in (foreign, missing)]
            told = [
                (status, str(answer).replace(path.rpartition("/")[2], "ID"))
                for (status, answer), path in zip(answers, (foreign, missing), strict=True)
            ]
            assert told[0] == told[1]
            assert told[0][0] == 404
    status, _ = await world.ask("GET", "/v1/models", ben.token)
    assert status == 200


async def test_figures_and_rows_are_the_tenants_own_whatever_is_asked_for(world: World) -> None:
    people = {name: world.people[name] for name in ("ada", "ben")}
    for name, person in people.items():
        headers = {"Authorization": f"Bearer {person.token}", "X-User-Id": f"user-of-{name}", "X-App-Id": name}
        body = chat_body("openai/mock-gpt?tokens=1")
        url = f"{world.gateway.base_url}/chat/completions"
        async with world.client.post(url, json=body, headers=headers) as response:
            assert response.status == 200
    assert len(await world.gateway.rows()) == 2
    ada, ben, admin = world.people["ada"], world.people["ben"], world.people["admin"]
    questions = {"": 1, "?user=user-of-ben": 0, "?app=ben": 0, f"?key={id_of(ben.token)}": 0, "?user=user-of-ada": 1}
    for question, count in questions.items():
        _, stats = await world.ask("GET", f"/api/stats{question}", ada.token)
        _, usage = await world.ask("GET", f"/api/usage{question}", ada.token)
        assert (stats["totals"]["requests"], len(usage["data"])) == (count, count), question
        assert "ben" not in str(usage)
    _, everybodys = await world.ask("GET", "/api/stats?user=user-of-ben", admin.token)
    assert everybodys["totals"]["requests"] == 1
    for query in (f"account_id={ben.account_id}", f"tenant={ben.account_id}"):
        assert (await world.ask("GET", f"/api/stats?{query}", ada.token))[0] == 400
    _, keys = await world.ask("GET", "/auth/keys", ada.token)
    _, users = await world.ask("GET", "/auth/users", ada.token)
    assert {key["user_id"] for key in keys["keys"]} == {user["id"] for user in users["users"]} == {ada.account_id}


# --- nobody makes itself more -------------------------------------------------------------------------------------


async def test_no_field_of_any_body_changes_a_role_or_an_owner(world: World) -> None:
    ada, ben = world.people["ada"], world.people["ben"]
    login = {"email": ada.email, "password": PASSWORD}
    wishes: list[dict[str, Any]] = [
        {"role": "admin"}, {"user_role": "admin"}, {"is_admin": True}, {"account_id": ben.account_id},
        {"user_id": ben.account_id}, {"owner": ben.email}, {"allowed_routes": ["*"]}, {"permissions": ["*"]},
    ]  # fmt: skip
    for wish in wishes:
        asked = [
            await world.ask("POST", "/auth/register", None, {"email": "eve@example.com", "password": PASSWORD, **wish}),
            await world.ask("POST", "/auth/keys", None, {**login, "key_name": "x", **wish}),
            await world.ask("PATCH", f"/auth/keys/{id_of(ada.token)}", ada.token, wish),
            await world.ask("PATCH", f"/auth/users/{ada.account_id}", world.gateway.api_key, wish),
        ]
        assert {(status, answer["error"]["code"]) for status, answer in asked} == {(400, "unknown_parameter")}
        status, _ = await world.ask("PATCH", f"/auth/users/{ada.account_id}", ada.token, wish)
        assert status == 403
    pool = world.gateway.app[appkeys.POOL]
    assert await pool.fetchval("select count(*) from accounts where role = 'admin'") == 1
    assert await pool.fetchval("select count(*) from accounts") == 3


async def test_a_role_that_the_database_takes_away_is_gone_with_the_next_look_at_the_key(world: World) -> None:
    admin = world.people["admin"]
    assert len((await world.ask("GET", "/auth/users", admin.token))[1]["users"]) == 3
    await world.gateway.app[appkeys.POOL].execute("update accounts set role = 'member'")
    await world.gateway.app[appkeys.KEYS].announce_account(admin.account_id)
    assert len((await world.ask("GET", "/auth/users", admin.token))[1]["users"]) == 1
