"""Somebody who uses the page, and what the browser complained of meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import asyncpg
from playwright.async_api import Browser, ConsoleMessage, Locator, Page, Request, Response, expect

from gateway import appkeys
from tests.support.gateway import Gateway, chat_body, read_events

PATIENCE = 15  # seconds for what happens at once on a machine that does nothing else
SECTIONS = ("overview", "keys", "usage", "playground")
LOGIN = ("admin@example.com", "correct horse")  # of the account that `running_gateway` registers

# How Chromium says that a request was refused: `_heard_answer` knows which, and whether that was to be.
_REFUSED = "Failed to load resource: the server responded with a status of"


@dataclass
class Person:
    """At most one page. What was done to it is judged when `at_the_page` ends."""

    page: Page
    root_url: str
    complaints: list[str] = field(default_factory=list)
    # Whoever is not signed in learns it by a 401.
    expected: set[tuple[int, str]] = field(default_factory=lambda: {(401, "/auth/session")})

    def see(self, name: str) -> Locator:
        """What the page calls so (`data-testid`), where it shows: each section has what no other needs to know of."""
        return self.page.get_by_test_id(name).filter(visible=True)

    async def open(self, section: str = "") -> None:
        await self.page.goto(f"{self.root_url}/dashboard" + (f"#{section}" if section else ""))

    async def sign_in(self, email: str = LOGIN[0], password: str = LOGIN[1]) -> None:
        await self.see("email").fill(email)
        await self.see("password").fill(password)
        await self.see("sign-in").click()
        await expect(self.see("who")).to_contain_text(email)

    async def go_to(self, section: str) -> None:
        await self.see(f"nav-{section}").click()
        await expect(self.page).to_have_url(f"{self.root_url}/dashboard#{section}")

    async def tab_to(self, name: str) -> None:
        """By the keyboard alone."""
        for _ in range(80):
            if await self.has_focus() == name:
                return
            await self.page.keyboard.press("Tab")
        raise AssertionError(f"Tab never comes to {name}")

    async def has_focus(self) -> str:
        focused: str | None = await self.page.evaluate("document.activeElement?.getAttribute('data-testid')")
        return focused or ""

    async def number(self, name: str) -> float | None:
        """The figure behind what is shown, as `/api/stats` has it; None until there is one."""
        value = await self.see(name).get_attribute("data-value")
        return float(value) if value else None

    async def shows(self, name: str, figure: float) -> bool:
        return await self.number(name) == figure

    # --- what the browser says

    def listen(self) -> None:
        context = self.page.context
        context.on("console", self._heard_console)
        context.on("weberror", lambda error: self.complaints.append(f"thrown: {error.error}"))
        context.on("request", self._heard_request)
        context.on("response", self._heard_answer)

    def _heard_console(self, message: ConsoleMessage) -> None:
        """Broken content security policies are errors of the console, too."""
        if message.type in ("error", "warning") and not message.text.startswith(_REFUSED):
            self.complaints.append(f"{message.type}: {message.text}")

    def _heard_request(self, request: Request) -> None:
        if not request.url.startswith((f"{self.root_url}/", "data:", "blob:")):
            self.complaints.append(f"asked elsewhere: {request.url}")

    def _heard_answer(self, response: Response) -> None:
        path = urlsplit(response.url).path
        if response.status >= 400 and (response.status, path) not in self.expected:
            self.complaints.append(f"refused: {response.status} {response.request.method} {path}")


@asynccontextmanager
async def at_the_page(browser: Browser, root_url: str, script: str = "", **context: Any) -> AsyncIterator[Person]:
    """A person with a profile of its own; at the end the browser must have had nothing to complain of.

    `script` runs before the page's own. `context`: what playwright's `new_context` takes.
    """
    profile = await browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
    profile.set_default_timeout(PATIENCE * 1000)
    if script:
        await profile.add_init_script(script)
    try:
        person = Person(await profile.new_page(), root_url)
        person.listen()
        yield person
        await person.page.evaluate("1")  # what the browser said before this answer has been heard
        assert not person.complaints, "\n".join(person.complaints)
    finally:
        await profile.close()


async def until(claim: Callable[[], Awaitable[object]], what: str) -> None:
    """Waits for what no `expect` can wait for. Raises AssertionError when it does not come."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not await claim():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within {PATIENCE} s: {what}") from None


async def chat(client: aiohttp.ClientSession, key: str, model: str = "gpt-4o-mini", **more: Any) -> int:
    """The status, once the whole answer was read."""
    body, headers = chat_body(model, **more), {"Authorization": f"Bearer {key}"}
    async with client.post("/v1/chat/completions", json=body, headers=headers) as response:
        if response.status == 200 and more.get("stream"):
            assert (await read_events(response))[-1] == "[DONE]"
        await response.read()
        return response.status


async def rows_of(gateway: Gateway, count: int) -> list[asyncpg.Record]:
    """Usage rows, oldest first, once there are so many. `gateway.rows` would wait for the page's live figures to end."""
    rows: list[asyncpg.Record] = []

    async def are_written() -> bool:
        rows[:] = await gateway.app[appkeys.POOL].fetch("select * from usage order by request_id")
        return len(rows) >= count

    await until(are_written, f"{count} rows")
    assert len(rows) == count
    return rows
