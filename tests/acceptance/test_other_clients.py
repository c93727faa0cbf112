"""aiohttp-sse-client and `curl -N`: two readers of event streams that share no code with the SDKs or with us."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from itertools import pairwise
from time import monotonic
from typing import Any

import aiohttp
import pytest
from aiohttp_sse_client.client import EventSource

from tests.support.gateway import MODELS, Gateway, chat_body, read_events, running_gateway

pytestmark = pytest.mark.integration

DIALECTS = list(MODELS)


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


async def by_sse_client(gateway: Gateway, body: dict[str, Any]) -> list[str]:
    events = []
    async with EventSource(
        f"{gateway.base_url}/chat/completions",
        option={"method": "POST"},
        json=body,
        headers=gateway.headers,
        max_connect_retry=0,
    ) as source:
        async for event in source:
            events.append(event.data)
            if event.data == "[DONE]":
                break  # at the end of the body it would send the request again
    return events


async def by_curl(gateway: Gateway, body: dict[str, Any]) -> list[str]:
    process = await asyncio.create_subprocess_exec(
        curl(), "-sSN", f"{gateway.base_url}/chat/completions",
        "-H", f"Authorization: Bearer {gateway.api_key}", "-H", "Content-Type: application/json",
        "-d", json.dumps(body),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    return [line.removeprefix("data: ") for line in out.decode().split("\n") if line.startswith("data: ")]


def curl() -> str:
    found = shutil.which("curl")
    assert found, "curl is needed: `make test` installs it"
    return found


async def by_aiohttp(gateway: Gateway, body: dict[str, Any]) -> list[str]:
    async with (
        aiohttp.ClientSession(headers=gateway.headers) as client,
        client.post(f"{gateway.base_url}/chat/completions", json=body) as response,
    ):
        return await read_events(response)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_every_reader_sees_the_same_events(gateway: Gateway, dialect: str) -> None:
    body = chat_body(f"{MODELS[dialect]}?case=multibyte", stream=True, stream_options={"include_usage": True})
    seen = [await read(gateway, body) for read in (by_aiohttp, by_sse_client, by_curl)]
    meanings = [[_without_ids(event) for event in events] for events in seen]
    assert meanings[0] == meanings[1] == meanings[2]
    assert seen[0][-1] == "[DONE]"
    assert len(seen[0]) > 5


def _without_ids(event: str) -> Any:
    if event == "[DONE]":
        return event
    chunk = json.loads(event)
    return {name: value for name, value in chunk.items() if name not in ("id", "created", "obfuscation")}


async def test_curl_shows_tokens_as_they_come(gateway: Gateway) -> None:
    body = chat_body("openai/mock-gpt?pace_ms=100&tokens=8", stream=True)
    process = await asyncio.create_subprocess_exec(
        curl(), "-sSN", f"{gateway.base_url}/chat/completions",
        "-H", f"Authorization: Bearer {gateway.api_key}", "-H", "Content-Type: application/json",
        "-d", json.dumps(body),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    arrived = []
    while line := await process.stdout.readline():
        if b'"content":"' in line.replace(b'"content":""', b""):
            arrived.append(monotonic())
    await process.wait()
    gaps = [later - earlier for earlier, later in pairwise(arrived)]
    assert len(gaps) >= 7
    assert max(gaps) < 0.3, "tokens came in bursts"
    assert arrived[-1] - arrived[0] > 0.5, "tokens came all at once"
