"""Two gateways on one database and one Valkey, the provider between them and the test, and keys with budgets."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import asyncpg
import pytest

from gateway.mock import Mock
from tests.support.gateway import chat_body
from tests.support.process import Served, serving

ADMIN = {"email": "admin@example.com", "password": "correct horse battery"}
PRICE = 100  # micro-dollars, of a token of the prompt as of the completion
CONFIG = "\n".join(
    f'[prices.{provider}]\n"mock-*" = {{ input = {PRICE}, output = {PRICE} }}'
    for provider in ("openai", "anthropic", "ollama")
)
MANY = 1_000_000  # max_tokens of a client that does not care


@dataclass
class Streamed:
    """One stream as its client saw it."""

    status: int
    id: str
    finish_reason: str = ""
    usage: tuple[int, int] | None = None
    error: str = ""
    done_at: float = 0.0  # when `[DONE]` was read, seconds, monotonic; 0: never
    headers: Any = None


@dataclass
class Key:
    token: str
    id: str


@dataclass
class Deployment:
    """Two gateways on one database and one Valkey, and what stands around them."""

    gateways: Sequence[Served]
    mock: Mock
    pool: asyncpg.Pool
    client: aiohttp.ClientSession

    async def new_key(self, *, number: int = 0, login: dict[str, str] = ADMIN, **limits: Any) -> Key:
        body = {**login, "key_name": "budget", "requests_per_minute": 0, "concurrent_requests": 0, **limits}
        async with self.client.post(f"{self.gateways[number].root_url}/auth/keys", json=body) as response:
            assert response.status == 201, await response.text()
            made = await response.json()
            return Key(made["api_key"], made["id"])

    async def stream(self, key: Key, model: str, *, number: int = 0, **more: Any) -> Streamed:
        """At the gateway of that number, to its end."""
        body = chat_body(model, stream=True, stream_options={"include_usage": True}, **more)
        url, headers = f"{self.gateways[number].base_url}/chat/completions", {"Authorization": f"Bearer {key.token}"}
        async with self.client.post(url, json=body, headers=headers) as response:
            seen = Streamed(response.status, response.headers["X-Request-Id"], headers=response.headers)
            if response.status != 200:
                seen.error = (await response.json())["error"]["code"]
                return seen
            async for line in response.content:
                if line.startswith(b"data: "):
                    _hear(line[6:].strip(), seen)
            return seen

    async def race(self, keys: Sequence[Key], model: str, count: int, **more: Any) -> list[Streamed]:
        """All at once, in turn at each gateway and with each key."""
        calls = (self.stream(keys[one // 2 % len(keys)], model, number=one % 2, **more) for one in range(count))
        return await asyncio.gather(*calls)

    async def use_up(self, key: Key, model: str) -> list[Streamed]:
        """One stream after the other until one is refused, which is the last of them."""
        seen: list[Streamed] = []
        while not seen or seen[-1].status == 200:
            assert len(seen) < 50, "the budget never ends"
            seen.append(await self.stream(key, model, number=len(seen) % 2, max_tokens=MANY))
        return seen

    async def rows(self) -> list[asyncpg.Record]:
        rows: list[asyncpg.Record] = await self.pool.fetch("select * from usage order by request_id")
        return rows

    async def used(self) -> tuple[int, int]:
        """Tokens and micro-dollars of all rows."""
        rows = await self.rows()
        tokens = sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
        return tokens, sum(row["cost_micros"] for row in rows)

    async def budget(self, key: Key, what: str, of: str = "key") -> dict[str, Any]:
        url, headers = f"{self.gateways[0].root_url}/auth/keys/{key.id}", {"Authorization": f"Bearer {key.token}"}
        async with self.client.get(url, headers=headers) as response:
            assert response.status == 200, await response.text()
            budgets = (await response.json())["budgets"]
        [found] = [one for one in budgets if (one["what"], one["of"]) == (what, of)]
        return dict(found)

    async def assert_it_shows_what_rows_sum_up_to(self, key: Key, what: str, of: str = "key") -> None:
        """`spent` is exact once all has been settled and shipped, and nothing before."""
        deadline = monotonic() + 15
        while True:
            tokens, micros = await self.used()
            spent = (await self.budget(key, what, of))["spent"]
            if spent == pytest.approx(tokens if what.startswith("tokens") else micros / 1e6, abs=1e-9):
                return
            assert monotonic() < deadline, f"it shows {spent}; the rows are {tokens} tokens, {micros} micro-dollars"
            await asyncio.sleep(0.1)


def _hear(data: bytes, seen: Streamed) -> None:
    if data == b"[DONE]":
        seen.done_at = monotonic()
        return
    event = json.loads(data)
    seen.error = event.get("error", {}).get("code", "")
    if usage := event.get("usage"):
        seen.usage = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in event.get("choices", []):
        seen.finish_reason = choice["finish_reason"] or seen.finish_reason


@asynccontextmanager
async def deployed(
    database_url: str, redis_url: str, data: Path, config: str = "", **environ: str
) -> AsyncIterator[Deployment]:
    """With the mock in this process, so that its log can be read, and an admin's account; `config` is added TOML."""
    config_file = data / "gateway.toml"
    config_file.write_text(f"{CONFIG}\n{config}")
    mock = Mock()
    address = await mock.start()
    shared = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "OPENAI_BASE_URL": f"{address}/v1",
        "OPENAI_API_KEY": "sk-operator-openai",
        "ANTHROPIC_BASE_URL": address,
        "ANTHROPIC_API_KEY": "sk-operator-anthropic",
        "OLLAMA_BASE_URL": address,
        "GATEWAY_MOCK": "off",
        "GATEWAY_CONFIG": str(config_file),
        "GATEWAY_DATA_DIR": str(data / "gateway"),
        **environ,
    }
    async with AsyncExitStack() as opened:
        opened.push_async_callback(mock.stop)
        pool = await opened.enter_async_context(asyncpg.create_pool(database_url, min_size=1, max_size=2))
        connector = aiohttp.TCPConnector(limit=0)
        client = await opened.enter_async_context(aiohttp.ClientSession(connector=connector))
        gateways = [await opened.enter_async_context(serving(shared)) for _ in range(2)]
        async with client.post(f"{gateways[0].root_url}/auth/register", json=ADMIN) as response:
            assert response.status == 201, await response.text()
        yield Deployment(gateways, mock, pool, client)
