"""Streams whose connections break, and how they are continued."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from gateway.sharing import SHARING
from gateway.stores.streams import name_of
from gateway.stores.tokens import parse_token
from tests.support.gateway import Gateway, chat_body, running_gateway

WISH = {"X-Gateway-Resumable": "true"}
SLOW = "openai/mock-gpt?pace_ms=20"
SHORT = "openai/mock-gpt?tokens=24&pace_ms=2"
LONG = "openai/mock-gpt?case=long&pace_ms=10"


@asynccontextmanager
async def two_nodes(
    database_url: str, redis_url: str, other_redis_url: str = ""
) -> AsyncIterator[tuple[Gateway, Gateway]]:
    """`other_redis_url`: how the second one gets to the same Redis."""
    async with running_gateway(database_url, redis_url) as one:
        async with running_gateway(database_url, other_redis_url or redis_url, account=one.account_id) as other:
            other.api_key = one.api_key
            yield one, other


def client() -> aiohttp.ClientSession:
    """With a connection a request, so that one can be cut."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60))


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def eventually(condition: Callable[[], Awaitable[Any]], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


async def begin(
    gateway: Gateway, http: aiohttp.ClientSession, model: str = SLOW, **more: Any
) -> aiohttp.ClientResponse:
    body = chat_body(model, **{"stream": True, **more})
    response = await http.post(f"{gateway.base_url}/chat/completions", json=body, headers={**gateway.headers, **WISH})
    assert response.status == 200, await response.text()
    return response


async def read(response: aiohttp.ClientResponse, size: int) -> bytes:
    """So many bytes of it, or more."""
    data = b""
    while len(data) < size and (more := await response.content.readany()):
        data += more
    return data


async def cut(gateway: Gateway, http: aiohttp.ClientSession, size: int, model: str = SLOW) -> tuple[str, bytes]:
    """A stream whose connection broke when its client had so many bytes: its id, and the bytes."""
    response = await begin(gateway, http, model)
    assert response.headers["X-Gateway-Resumable"] == "true"
    data = (await read(response, size))[:size]
    response.close()
    return response.headers["X-Request-Id"], data


def go_on(gateway: Gateway, http: aiohttp.ClientSession, stream: str, after: int | str = 0) -> Any:
    return http.get(f"{gateway.base_url}/streams/{stream}", params={"after": after}, headers=gateway.headers)


async def rest(gateway: Gateway, http: aiohttp.ClientSession, stream: str, after: int = 0) -> bytes:
    async with go_on(gateway, http, stream, after) as response:
        assert response.status == 200, await response.text()
        return bytes(await response.read())


async def refusal(gateway: Gateway, http: aiohttp.ClientSession, stream: str, after: int | str = 0) -> tuple[int, str]:
    async with go_on(gateway, http, stream, after) as response:
        return response.status, (await response.json())["error"]["code"]


def name(gateway: Gateway, stream: str) -> str:
    token = parse_token(gateway.api_key)
    assert token is not None
    return name_of(token.id, stream)


def runs(gateway: Gateway, stream: str) -> bool:
    return gateway.app[SHARING].running(name(gateway, stream).encode()) is not None
