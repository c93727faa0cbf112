"""One Chromium for the tests of a file, and a gateway of its own for each of them."""

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest_asyncio
from playwright.async_api import Browser, async_playwright, expect

from tests.browser.person import PATIENCE, Person, at_the_page
from tests.support.gateway import Gateway, running_gateway
from tests.support.programs import program

# Debian's Chromium asks its maker for news; a test is no reason to. There is no sandbox for root.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# Models that take their time, so that there is something to see; and prices, so that they cost something.
CONFIG = """
[aliases]
"gpt-4o" = "openai/mock-gpt?pace_ms=25&tokens=120"
"gpt-4o-mini" = "openai/mock-gpt?tokens=20"
"claude-sonnet-4-5" = "anthropic/mock-claude?pace_ms=25&tokens=240"
"llama3.2" = "ollama/mock-llama?pace_ms=25&tokens=2400"

[prices.openai]
"mock-*" = { input = 2.5, output = 10 }

[prices.anthropic]
"mock-*" = { input = 3, output = 15 }
"""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Browser]:
    expect.set_options(timeout=PATIENCE * 1000)
    async with async_playwright() as playwright:
        chromium = program("chromium", "chromium-browser", "google-chrome")
        browser = await playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def gateway(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    config = tmp_path / "gateway.toml"
    config.write_text(CONFIG)
    async with running_gateway(database_url, redis_url, {"GATEWAY_CONFIG": str(config)}) as gateway:
        yield gateway


@pytest_asyncio.fixture(loop_scope="module")
async def admin(browser: Browser, gateway: Gateway) -> AsyncIterator[Person]:
    """Signed in, before the overview."""
    async with at_the_page(browser, gateway.root_url) as person:
        await person.open()
        await person.sign_in()
        yield person


@pytest_asyncio.fixture(loop_scope="module")
async def client(gateway: Gateway) -> AsyncIterator[aiohttp.ClientSession]:
    """Not a browser: what uses the API beside the page."""
    async with aiohttp.ClientSession(gateway.root_url) as client:
        yield client
