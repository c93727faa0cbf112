"""A whole gateway on loopback, in front of the mock provider: what the relay's and the SDKs' tests talk to."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import asyncpg
from aiohttp import web

from gateway import appkeys
from gateway.app import make_app
from gateway.mock import Mock, Received
from gateway.serve import make_runner
from gateway.settings import load_settings

MODELS = {"openai": "openai/mock-gpt", "anthropic": "anthropic/mock-claude", "ollama": "ollama/mock-llama"}


@dataclass
class Gateway:
    base_url: str  # ends in /v1
    root_url: str
    api_key: str
    account_id: str
    app: web.Application
    mock: Mock

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}

    @property
    def calls(self) -> list[Received]:
        """What the provider was asked to generate; not the looks at its list of models."""
        return [request for request in self.mock.received if request.method == "POST"]

    def forget_faults(self) -> None:
        """All providers are asked again, whatever they did."""
        self.app[appkeys.BALANCER].forget()

    async def new_key(self, **limits: Any) -> str:
        limits = {"requests_per_minute": 0, "concurrent_requests": 0, "allowed_models": (), **limits}
        made = await self.app[appkeys.KEYS].create(self.account_id, "test", **limits)
        return made.token

    async def rows(self) -> list[asyncpg.Record]:
        """Usage rows, oldest first, once all that are due are written."""
        async with asyncio.timeout(5):
            while (
                not self.app[appkeys.PULSE].idle
                or self.app[appkeys.RECORDER].counting
                or self.app[appkeys.SHIPPER].queued
            ):
                await asyncio.sleep(0.01)
        rows: list[asyncpg.Record] = await self.app[appkeys.POOL].fetch("select * from usage order by request_id")
        return rows


@asynccontextmanager
async def running_gateway(
    database_url: str, redis_url: str, environ: Mapping[str, str] | None = None, account: str = ""
) -> AsyncIterator[Gateway]:
    """The application as `gateway serve` runs it, with a mock provider of its own behind all three dialects.

    `account`: of another gateway on the same stores, whose keys this one serves too.
    """
    mock = Mock()
    address = await mock.start()
    data_dir = TemporaryDirectory()
    given = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "OPENAI_BASE_URL": f"{address}/v1",
        "OPENAI_API_KEY": "sk-operator-openai",
        "ANTHROPIC_BASE_URL": address,
        "ANTHROPIC_API_KEY": "sk-operator-anthropic",
        "OLLAMA_BASE_URL": address,
        "GATEWAY_MOCK": "off",
        "GATEWAY_DATA_DIR": data_dir.name,  # of the journal; the stores are given
        **(environ or {}),
    }
    app = make_app(load_settings(given), given)
    runner = make_runner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    root = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        if not account:
            admin = await app[appkeys.ACCOUNTS].register("admin@example.com", "correct horse", registration="open")
            account = admin.id
        gateway = Gateway(f"{root}/v1", root, "", account, app, mock)
        gateway.api_key = await gateway.new_key()
        yield gateway
    finally:
        await runner.cleanup()
        await mock.stop()
        data_dir.cleanup()


def chat_body(model: str, text: str = "Say hello.", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


async def read_events(response: aiohttp.ClientResponse) -> list[str]:
    """The `data:` payloads of a stream, to its end; fails when the body ends in the middle of an event."""
    body = (await response.read()).decode()
    assert body == "" or body.endswith("\n\n"), body[-200:]
    return [line[6:] for line in body.replace("\r\n", "\n").split("\n") if line.startswith("data: ")]
