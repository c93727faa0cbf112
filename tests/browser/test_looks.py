"""How the page looks and whom it serves: axe-core, phones, layout shift, and pictures of every section.

Pictures are written to `screenshots/latest`, which git ignores. With SCREENSHOTS=1 the README's own are taken anew.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, expect

from gateway import appkeys
from tests.browser.history import write_history
from tests.browser.person import SECTIONS, Person, at_the_page, chat, until
from tests.support.gateway import Gateway

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

FOLDER = Path(__file__).parent / "screenshots"
ASKED = bool(os.environ.get("SCREENSHOTS"))  # for those of the README, with a chart that has something in it
LARGEST = 250_000  # bytes of a picture in the README

PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {**PHONE, "device_scale_factor": 2},
}

KEYS: dict[str, dict[str, Any]] = {
    "support chat": {"cost_per_month": 25_000_000, "requests_per_minute": 600},
    "code review": {"tokens_per_day": 400_000, "cost_per_day": 2_000_000},
    "search, staging": {"cost_per_day": 1_500_000, "allowed_models": ("gpt-4o*", "claude-*", "llama3.2")},
}

# The sum of what moved without anybody having touched anything: https://web.dev/articles/cls
_SHIFT = """
window.shift = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shift += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""


@asynccontextmanager
async def traffic(client: aiohttp.ClientSession, *keys: str) -> AsyncIterator[None]:
    """Streams that come and go until the block ends."""

    async def begin() -> None:
        models = ("gpt-4o", "claude-sonnet-4-5", "gpt-4o", "gpt-4o-mini")
        for number in range(10_000):
            key, model = keys[number % len(keys)], models[number % 4]
            tasks.append(asyncio.create_task(chat(client, key, model, stream=True)))
            await asyncio.sleep(0.3 if number // 16 % 2 else 0.6)

    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(begin())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def show(person: Person, section: str) -> None:
    """Until it has what it shows."""
    await person.go_to(section)
    match section:
        case "overview":
            await until(lambda: _has_requests(person), "the totals")
            await expect(person.see("models-table")).to_contain_text("llama3.2")
            await expect(person.see("dependencies")).to_contain_text("ok", ignore_case=True)
        case "keys":
            await expect(person.see("keys-table")).to_contain_text("aig_")
        case "usage":
            await expect(person.see("usage-table")).to_contain_text("gpt-4o")
        case "playground":
            await expect(person.see("play-key")).not_to_have_value("")


async def _has_requests(person: Person) -> bool:
    return bool(await person.number("total-requests"))


async def new_key(gateway: Gateway, name: str, **limits: Any) -> str:
    made = await gateway.app[appkeys.KEYS].create(gateway.account_id, name, **limits)
    return made.token


@pytest.mark.parametrize("look", LOOKS)
async def test_axe_finds_nothing_serious_in_any_section(look: str, browser: Browser, gateway: Gateway) -> None:
    await write_history(gateway, gateway.api_key[4:16])
    # What fades in would be judged by a colour that it has for a moment.
    async with at_the_page(browser, gateway.root_url, **LOOKS[look], reduced_motion="reduce") as person:
        await person.open()
        await expect(person.see("email")).to_be_visible()
        findings = await _findings(person, "sign-in")
        await person.sign_in()
        for section in SECTIONS:
            await show(person, section)
            findings += await _findings(person, section)
        await person.go_to("keys")
        await person.see("new-key").click()
        await expect(person.see("key-name")).to_be_visible()
        findings += await _findings(person, "new key")
    assert findings == []


async def _findings(person: Person, where: str) -> list[str]:
    results = await Axe().run(person.page)
    assert results.response["testEngine"]["name"] == "axe-core"
    return [
        f"{where}: {found['id']} ({found['impact']}): {node['html'][:200]}: {node['failureSummary']}"
        for found in results.response["violations"]
        for node in found["nodes"]
        if found["impact"] in ("serious", "critical")
    ]


async def test_nothing_is_wider_than_a_phone(browser: Browser, gateway: Gateway) -> None:
    await write_history(gateway, gateway.api_key[4:16])
    async with at_the_page(browser, gateway.root_url, **PHONE) as person:
        await person.open()
        await expect(person.see("email")).to_be_visible()
        widths = {"sign-in": await _width(person)}
        await person.sign_in()
        for section in SECTIONS:
            await show(person, section)
            widths[section] = await _width(person)
        await person.go_to("keys")
        await person.see("new-key").click()
        await person.see("key-name").fill("x" * 60)
        widths["new key"] = await _width(person)
        await person.see("key-create").click()
        await expect(person.see("key-secret")).to_be_visible()
        widths["secret"] = await _width(person)
    assert widths == dict.fromkeys(widths, PHONE["viewport"]["width"])


async def _width(person: Person) -> int:
    """CSS pixels that one would have to scroll through."""
    width: int = await person.page.evaluate("document.documentElement.scrollWidth")
    return width


async def test_nothing_jumps_while_live_numbers_run(
    browser: Browser, gateway: Gateway, client: aiohttp.ClientSession, figure: Callable[[str], None]
) -> None:
    await write_history(gateway, gateway.api_key[4:16])
    async with at_the_page(browser, gateway.root_url, _SHIFT) as person, traffic(client, gateway.api_key):
        await person.open()
        await person.sign_in()
        await person.page.reload()  # a load that no click excuses
        await show(person, "overview")
        rate = person.see("live-completion-rate")
        for _ in range(4):
            await expect(rate).not_to_have_text(await rate.inner_text())
        shifted = await _shift(person)
        figure(f"layout shift of the page, from its load until its live numbers changed four times: {shifted:.3f}")
        assert shifted < 0.1
        push = "document.body.prepend(Object.assign(document.createElement('div'), { textContent: 'x' }))"
        await until(lambda: _jumps(person, push, shifted + 0.02), "that what jumps is seen")


async def _shift(person: Person) -> float:
    shift: float = await person.page.evaluate("window.shift")
    return shift


async def _jumps(person: Person, push: str, beyond: float) -> bool:
    await person.page.evaluate(push)
    return await _shift(person) > beyond


@pytest.mark.timeout(300)
async def test_pictures_of_every_section_are_taken(
    browser: Browser, gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    await gateway.app[appkeys.KEYS].revoke(gateway.api_key[4:16], None)
    keys = [await new_key(gateway, name, **limits) for name, limits in KEYS.items()]
    await write_history(gateway, *(key[4:16] for key in keys))
    folder = FOLDER if ASKED else FOLDER / "latest"
    folder.mkdir(parents=True, exist_ok=True)
    async with traffic(client, *keys), AsyncExitStack() as opened:
        people: dict[str, Person] = {}
        for look, context in LOOKS.items():
            people[look] = await opened.enter_async_context(at_the_page(browser, gateway.root_url, **context))
            await people[look].open()
            await people[look].sign_in()
        await asyncio.sleep(80 if ASKED else 2)  # as much of it as the chart shall show
        for look, person in people.items():
            for section in SECTIONS:
                await show(person, section)
                await _dress(person, section)
                await person.page.screenshot(path=folder / f"{section}-{look}.png")
            await show(person, "overview")
            await person.page.screenshot(path=folder / f"overview-whole-{look}.png", full_page=True)
    for scheme in ("light", "dark"):
        picture = folder / f"overview-{scheme}.png"
        assert 20_000 < picture.stat().st_size < LARGEST


async def _dress(person: Person, section: str) -> None:
    """What comes a moment after the rest, and an answer where somebody has to ask first."""
    match section:
        case "overview":
            await expect(person.see("live-completion-rate")).not_to_have_text("0")
        case "keys":
            await expect(person.see("keys-table")).to_contain_text(re.compile("left.*left.*left"))
        case "playground":
            await person.see("play-prompt").fill("Say hello.")
            await person.see("play-send").click()
            await expect(person.see("play-stop")).to_be_disabled()
            await expect(person.see("play-meta")).to_contain_text("$")  # its row is in the audit trail
