"""Streams whose connections break, and how they are continued."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from gateway.sharing import SHARING
from gateway.stores.streams import name_of
from gateway.stores.tokens import parse_token
from tests.support.gateway import Gateway, chat_body

WISH = {"X-Gateway-Resumable": "true"}
SLOW = "openai/mock-gpt?pace_ms=20"
SHORT = "openai/mock-gpt?tokens=24&pace_ms=2"
LONG = "openai/mock-gpt?case=long&pace_ms=10"


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
