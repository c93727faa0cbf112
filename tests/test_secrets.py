"""Nothing that is secret is where others read: logs at their most talkative, metrics, health, errors, headers, arguments.

Canaries, texts that stand nowhere else, are sent through every kind of request and fault, and then looked for.
"""

import asyncio
import json
import random
import string
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gateway.settings import SECRETS, load_settings
from gateway.stores.tokens import make_token
from tests.support.gateway import Gateway, running_gateway
from tests.support.process import Served, serving
from tests.support.proxy import proxied_postgres, proxied_redis

pytestmark = pytest.mark.integration

Figure = Callable[[str], None]

# None has the shape of a credential, which the log would mask whoever wrote it.
CANARIES = {
    "operator's key": "kanarie.operator.1",
    "caller's own credential": "kanarie.own.2",
    "password": "kanarie.password.3",
    "prompt": "kanarie.prompt.4",
    "completion": "kanarie.completion.5",
    "pepper": "kanarie.pepper.6",
    "audit key": "kanarie.audit.7",
    "database password": "kanarie.database.8",
    "proxy password": "kanarie.proxy.9",
}
PROMPT, COMPLETION, PASSWORD = CANARIES["prompt"], CANARIES["completion"], CANARIES["password"]
EMAIL = "ada@example.com"


# --- a provider that says too much --------------------------------------------------------------------------------


def _event(**choice: Any) -> bytes:
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return (
        b"data: " + json.dumps({**chunk, "choices": [{"index": 0, "finish_reason": None, **choice}]}).encode() + b"\n\n"
    )


FIRST = _event(delta={"role": "assistant", "content": COMPLETION})
STREAMS: dict[str, bytes] = {
    "good": FIRST + _event(delta={}, finish_reason="stop") + b"data: [DONE]\n\n",
    "cut": FIRST,
    "broken": FIRST + b"data: {" + COMPLETION.encode() + b"\n\n" * 2,
    "first-broken": b"data: " + COMPLETION.encode() + b"\n\n",
    "error-event": FIRST + b'data: {"error":{"message":"%s","code":"x"}}\n\n' % CANARIES["operator's key"].encode(),
}
STATUSES = {"status-401": 401, "status-403": 403, "status-500": 500, "status-302": 302}


SEEN = web.AppKey("SEEN", list[str])


async def too_much(request: web.Request) -> web.StreamResponse:
    """What the model's name asks for. Its errors quote the credential and the prompt, as some providers' do."""
    body = await request.json()
    request.app[SEEN].append(f"{request.headers.get('Authorization')} {body}")
    model = body["model"]
    quoted = f"{request.headers.get('Authorization')} {COMPLETION} {body['messages']}"
    if model in STATUSES:
        error = {"error": {"message": quoted, "type": quoted, "code": quoted, "param": quoted}}
        headers = {"Location": f"http://{quoted.replace(' ', '')}/"} if model == "status-302" else {}
        return web.json_response(
            error, status=STATUSES[model], headers={**headers, "X-Debug": CANARIES["operator's key"]}
        )
    if model == "html":
        return web.Response(text=f"<html>{quoted}</html>", content_type="text/html")
    if model == "silent":
        await asyncio.sleep(30)
    if not body.get("stream"):
        return web.Response(text=quoted, content_type="application/json")
    return web.Response(body=STREAMS[model], headers={"Content-Type": "text/event-stream"})


@asynccontextmanager
async def provider() -> AsyncIterator[tuple[str, list[str]]]:
    """Its address, and what it was sent."""
    app = web.Application()
    app[SEEN] = []
    app.router.add_post("/{path:.*}", too_much)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", app[SEEN]
    finally:
        await runner.cleanup()


# --- everything that is said --------------------------------------------------------------------------------------


@dataclass
class Said:
    """What a gateway said, by where it said it."""

    served: Served
    client: aiohttp.ClientSession
    texts: list[tuple[str, str]] = field(default_factory=list)

    async def ask(self, what: str, method: str, path: str, token: str = "", **options: Any) -> str:
        """The body. What a client is told of its own completion or new key is left out of `texts`."""
        headers = {"Content-Type": "application/json", **({"X-API-Key": token} if token else {})}
        headers |= options.pop("headers", {})
        kept = options.pop("kept", True)
        try:
            async with self.client.request(
                method, f"{self.served.root_url}{path}", headers=headers, allow_redirects=False, **options
            ) as response:
                body = (await response.read()).decode(errors="replace")
                head = f"{response.status} {response.reason} {dict(response.headers)}"
        except aiohttp.ClientError as error:
            body, head = "", type(error).__name__
        self.texts.append((f"{method} {path}, {what}: head", head))
        if kept:
            self.texts.append((f"{method} {path}, {what}: body", body))
        return body

    async def chat(self, what: str, token: str, body: Mapping[str, Any] | bytes, **options: Any) -> str:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.ask(what, "POST", "/v1/chat/completions", token, data=data, **options)


# A provider for each way to ask for each: one that fails is not asked again at once.
MODELS = (*STREAMS, *STATUSES, "html", "silent")
WAYS = ("stream", "whole", "own")


def asking(model: str, way: str = "stream", *, stream: bool = True) -> dict[str, Any]:
    return {"model": f"{model}-{way}/{model}", "messages": [{"role": "user", "content": PROMPT}], "stream": stream}


async def ask_everything(said: Said) -> str:
    """Accounts, keys, chats and faults of all kinds; the key that was used."""
    login = {"email": EMAIL, "password": PASSWORD}
    await said.ask("good", "POST", "/auth/register", json=login)
    await said.ask("twice", "POST", "/auth/register", json=login)
    await said.ask(
        "weak", "POST", "/auth/register", json={"email": PASSWORD + "@example.com", "password": PASSWORD[:4]}
    )
    await said.ask("unknown field", "POST", "/auth/register", json={**login, "x": PASSWORD})
    await said.ask("wrong password", "POST", "/auth/keys", json={**login, "password": PASSWORD + "x", "key_name": "x"})
    await said.ask("no JSON", "POST", "/auth/keys", data=b"{" + PASSWORD.encode())
    no_limits = {"requests_per_minute": 0, "concurrent_requests": 0}
    made = await said.ask("good", "POST", "/auth/keys", json={**login, "key_name": "x", **no_limits}, kept=False)
    token: str = json.loads(made)["api_key"]
    for wrong in (token[:-1] + ("a" if token[-1] != "a" else "b"), token + "x", make_token()):
        await said.ask("wrong key", "GET", "/v1/models", wrong)
    await said.ask("key in the path", "GET", f"/auth/keys/{token}", token)
    await said.ask("key in the query", "GET", f"/api/usage?key={token}", token)
    await said.ask("two keys", "GET", "/v1/models", token, headers={"Authorization": f"Bearer {make_token()}"})
    own = {"Authorization": "Bearer " + CANARIES["caller's own credential"]}
    for model in MODELS:
        kept = model not in STREAMS
        stream = await said.chat("stream", token, asking(model, "stream"), kept=kept)
        assert (COMPLETION in stream) == (model in STREAMS and model != "first-broken"), stream
        await said.chat("whole", token, asking(model, "whole", stream=False), kept=kept)
        await said.chat("own credential", token, asking(model, "own"), headers=own, kept=kept)
    for body in malformed():
        await said.chat("malformed", token, body)
    await said.chat("bad credential", token, asking("good"), headers={"Authorization": f"Bearer {PROMPT * 500}"})
    for path in (
        "/health",
        "/metrics",
        "/auth/keys",
        "/auth/users",
        "/api/stats",
        "/api/usage",
        f"/{token}",
        "/nowhere",
    ):
        await said.ask("page", "GET", path, token)
    return token


def malformed() -> list[dict[str, Any] | bytes]:
    messages = [{"role": "user", "content": PROMPT}]
    return [
        json.dumps(asking("good")).encode()[:-1],
        json.dumps(asking("good")).encode().replace(b'"stream"', b'"messages": "%s", "stream"' % PROMPT.encode()),
        PROMPT.encode(),
        b'{"model": "good-stream/good", "messages": "' + PROMPT.encode() + b'\xff"}',
        {"model": "good-stream/good", "messages": PROMPT},
        {"model": "good-stream/good", "messages": [PROMPT]},
        {"model": "good-stream/good", "messages": [{"role": PROMPT, "content": "x"}]},
        {"model": "good-stream/good", "messages": [{"role": "user", "content": [{"type": PROMPT}]}]},
        {"model": "good-stream/good", "messages": [{"role": "user", "content": {"text": PROMPT}}]},
        {"model": "good-stream/good", "messages": messages, "temperature": PROMPT},
        {"model": "good-stream/good", "messages": messages, "stream": PROMPT},
        {"model": "good-stream/good", "messages": messages, "stop": {"x": PROMPT}},
        {"model": "good-stream/good", "messages": messages, "tools": PROMPT},
        {"messages": messages},
    ]


@pytest.mark.parametrize("environment", ["production", "development"])
async def test_no_canary_is_in_anything_that_others_read(
    database_url: str, redis_url: str, tmp_path: Path, figure: Figure, environment: str
) -> None:
    log, config = tmp_path / "log", tmp_path / "gateway.toml"
    async with (
        provider() as (address, seen),
        proxied_postgres(database_url) as (postgres, postgres_url),
        proxied_redis(redis_url) as (redis, behind_url),
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as client,
    ):
        names = [f"{model}-{way}" for model in MODELS for way in WAYS]
        table = '[providers.{}]\nbase_url = "{}/v1"\napi_key_env = "FAR_API_KEY"\n'
        config.write_text("".join(table.format(name, address) for name in names))
        user, _, rest = postgres_url.removeprefix("postgresql://").partition("@")
        environ = {
            "DATABASE_URL": f"postgresql://{user.partition(':')[0]}:{CANARIES['database password']}@{rest}",
            "REDIS_URL": behind_url,
            "ENVIRONMENT": environment,
            "LOG_LEVEL": "debug",
            "FAR_API_KEY": CANARIES["operator's key"],
            "OPENAI_API_KEY": CANARIES["operator's key"],
            "GATEWAY_CONFIG": str(config),
            "GATEWAY_KEY_PEPPER": CANARIES["pepper"],
            "GATEWAY_AUDIT_KEY": CANARIES["audit key"],
            "GATEWAY_PROXY": f"http://proxy:{CANARIES['proxy password']}@127.0.0.1:9",
            "GATEWAY_FIRST_BYTE_TIMEOUT": "1",
            "GATEWAY_TOTAL_TIMEOUT": "1",
            "GATEWAY_KEY_CACHE": "1",
            "GATEWAY_MOCK": "off",
        }
        async with serving(environ, log=log) as served:
            said = Said(served, client)
            token = await ask_everything(said)
            await postgres.cut()
            await redis.cut()
            for path in ("/v1/models", "/auth/keys", "/api/stats", "/health"):
                await said.ask("no stores", "GET", path, make_token())
                await said.ask("no stores", "GET", path, token)
            await said.ask(
                "no stores", "POST", "/auth/keys", json={"email": EMAIL, "password": PASSWORD, "key_name": "x"}
            )
            await said.chat("no stores", token, asking("good"), kept=False)
            await said.ask("at the end", "GET", "/metrics")
            said.texts.append(("arguments", Path(f"/proc/{served.process.pid}/cmdline").read_text()))
            await postgres.start()
            await redis.start()
        lines = log.read_text()
    assert lines.count("/v1/chat/completions") > 3 * len(MODELS)
    said.texts.append(("log", lines))
    for name in ("operator's key", "caller's own credential", "prompt"):
        assert any(CANARIES[name] in text for text in seen)
    canaries = {**CANARIES, "gateway key": token.split("_")[2]}
    found = [(name, where) for name, canary in canaries.items() for where, text in said.texts if canary in text]
    figure(
        f"P13 {environment}: {len(canaries)} canaries in {len(said.texts)} texts, the log at debug: {len(found)} found"
    )
    assert found == []


# --- settings -----------------------------------------------------------------------------------------------------


def test_neither_the_repr_of_the_settings_nor_a_complaint_shows_a_secret() -> None:
    given = {
        "DATABASE_URL": f"postgresql://u:{CANARIES['database password']}@h/db",
        "REDIS_URL": f"redis://:{CANARIES['database password']}@h/0",
        "OPENAI_API_KEY": CANARIES["operator's key"],
        "ANTHROPIC_API_KEY": CANARIES["operator's key"],
        "GATEWAY_PROXY": f"http://u:{CANARIES['proxy password']}@h:1",
        "GATEWAY_KEY_PEPPER": CANARIES["pepper"],
        "GATEWAY_AUDIT_KEY": CANARIES["audit key"],
    }
    assert {name.upper() for name in SECRETS} == given.keys()
    settings = load_settings(given)
    assert "kanarie" not in f"{settings!r} {settings} {[settings]}"


# --- labels -------------------------------------------------------------------------------------------------------


async def test_two_thousand_names_of_a_clients_are_no_label_and_no_series(
    database_url: str, redis_url: str, figure: Figure
) -> None:
    names = random.Random(4)  # whoever sees it fail sees it again

    def name() -> str:
        return "kanarie-" + "".join(names.choices(string.ascii_lowercase, k=10))

    async with running_gateway(database_url, redis_url) as gateway, aiohttp.ClientSession() as client:
        before = await metrics_page(client, gateway)
        labelled = {**gateway.headers, "X-User-Id": name(), "X-App-Id": name()}
        requests: list[tuple[str, str, dict[str, Any]]] = []
        for number in range(500):
            body = {"model": name(), "messages": [{"role": "user", "content": "x"}]}
            if number % 5 == 0:
                body["model"] = f"openai/{name()}"  # goes upstream: the provider is known, the model is not
            who = {**labelled, "X-User-Id": name(), "X-App-Id": name(), "X-Request-Id": name()}
            requests += [
                ("POST", "/v1/chat/completions", {"json": body, "headers": who}),
                ("GET", f"/v1/models/{name()}", {"headers": who}),
                ("GET", f"/{name()}", {}),
                (name().upper(), "/v1/models", {"headers": {"Authorization": f"Bearer {make_token()}"}}),
            ]
        queue = iter(requests)

        async def ask() -> None:
            for method, path, options in queue:
                async with client.request(method, f"{gateway.root_url}{path}", **options) as response:
                    await response.read()
                    assert response.status < 500 or response.status == 502, (method, path)

        await asyncio.gather(*(ask() for _ in range(8)))
        page = await metrics_page(client, gateway)
    series = [line for line in page if not line.startswith("#")]
    figure(
        f"P13 {len(requests)} requests with names of the client's own: {len(series)} series, {len(before)} lines before"
    )
    assert [line for line in page if "kanarie" in line.lower()] == []
    assert len(series) <= 5000


async def metrics_page(client: aiohttp.ClientSession, gateway: Gateway) -> list[str]:
    async with client.get(f"{gateway.root_url}/metrics") as response:
        return (await response.text()).splitlines()
