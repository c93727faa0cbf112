"""Who is at the page, tried in a real Chromium: signing in and out, sessions that end, whose figures these are."""

import re

import aiohttp
import pytest
from aiohttp import web
from playwright.async_api import Browser, expect

from gateway import appkeys
from tests.browser.person import LOGIN, Person, at_the_page, chat, rows_of, until
from tests.support.gateway import Gateway

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

MEMBER = ("ann@example.com", "battery staple correct")


async def register(gateway: Gateway, email: str, password: str) -> tuple[str, str]:
    """A member's account, and a key of it."""
    account = await gateway.app[appkeys.ACCOUNTS].register(email, password, registration="open")
    key = await gateway.app[appkeys.KEYS].create(account.id, "member's", requests_per_minute=0)
    return account.id, key.token


# --- the harness --------------------------------------------------------------------------------------------------


async def test_whatever_a_browser_complains_of_is_heard(browser: Browser) -> None:
    """Else all that follows could not fail."""

    async def page(request: web.Request) -> web.Response:
        text = '<p style="color: red">x</p><img src="http://127.0.0.2:9/x.png"><script src="/gone.js"></script>'
        headers = {"Content-Security-Policy": "default-src 'self'; img-src *"}
        return web.Response(text=f"<!doctype html>{text}", content_type="text/html", headers=headers)

    app = web.Application()
    app.router.add_get("/dashboard", page)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        with pytest.raises(AssertionError):
            async with at_the_page(browser, f"http://127.0.0.1:{runner.addresses[0][1]}") as person:
                await person.open()
                await person.page.evaluate("setTimeout(() => { console.warn('a warning'); gone() })")
                await until(lambda: _said(person, "thrown"), "the exception")
    finally:
        await runner.cleanup()
    heard = "\n".join(person.complaints)
    for part in ("Content Security Policy", "asked elsewhere: http://127.0.0.2:9", "refused: 404 GET /gone.js",
                 "warning: a warning", "thrown: gone is not defined"):  # fmt: skip
        assert part in heard


async def _said(person: Person, word: str) -> bool:
    return any(word in complaint for complaint in person.complaints)


# --- who is there -------------------------------------------------------------------------------------------------


async def test_a_wrong_password_is_told_and_the_right_one_opens_the_page(browser: Browser, gateway: Gateway) -> None:
    async with at_the_page(browser, gateway.root_url) as person:
        await person.open()
        await person.see("email").fill(LOGIN[0])
        await person.see("password").fill("wrong horse")
        await person.see("sign-in").click()
        await expect(person.see("sign-in-error")).to_contain_text("password", ignore_case=True)
        await expect(person.see("nav-overview")).to_be_hidden()
        await person.sign_in()
        await expect(person.see("nav-overview")).to_be_visible()
        await expect(person.see("email")).to_be_hidden()


async def test_who_signed_in_still_is_after_a_reload_and_nothing_of_it_is_for_scripts(admin: Person) -> None:
    await admin.page.reload()
    await expect(admin.see("who")).to_contain_text(LOGIN[0])
    [cookie] = await admin.page.context.cookies()
    assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == ("aig_session", True, "Strict")
    kept = await admin.page.evaluate("JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}])")
    assert cookie["value"] not in kept
    assert LOGIN[1] not in kept


async def test_after_signing_out_the_cookie_is_worth_nothing(
    admin: Person, gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    [cookie] = await admin.page.context.cookies()
    await admin.see("sign-out").click()
    await expect(admin.see("email")).to_be_visible()
    assert await admin.page.context.cookies() == []
    await admin.page.reload()
    await expect(admin.see("email")).to_be_visible()
    await expect(admin.see("who")).to_be_hidden()
    async with client.get("/api/stats", headers={"Cookie": f"aig_session={cookie['value']}"}) as response:
        assert response.status == 401


async def test_a_session_that_expires_asks_for_the_password_and_goes_on_where_it_was(
    admin: Person, gateway: Gateway
) -> None:
    await admin.go_to("usage")
    await gateway.app[appkeys.POOL].execute("delete from sessions")
    admin.expected |= {(401, path) for path in ("/api/usage", "/api/stats", "/api/latency", "/api/live", "/auth/keys")}
    await admin.see("usage-apply").click()
    await expect(admin.see("email")).to_be_visible()
    await admin.sign_in()
    await expect(admin.page).to_have_url(re.compile("#usage$"))
    await expect(admin.see("usage-apply")).to_be_visible()


async def test_a_member_sees_its_own_and_nothing_of_others(
    browser: Browser, gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    _, key = await register(gateway, *MEMBER)
    assert await chat(client, key, "gpt-4o-mini") == 200
    for _ in range(3):
        assert await chat(client, gateway.api_key, "openai/mock-gpt?case=empty") == 200
    await rows_of(gateway, 4)
    async with at_the_page(browser, gateway.root_url) as person:
        await person.open()
        await person.sign_in(*MEMBER)
        await until(lambda: person.shows("total-requests", 1), "its one request")
        await expect(person.see("live-completion-rate")).to_be_hidden()
        await person.go_to("keys")
        await expect(person.see(f"key-row-{key[4:16]}")).to_be_visible()
        await expect(person.see(f"key-row-{gateway.api_key[4:16]}")).to_have_count(0)
        await person.go_to("usage")
        await expect(person.see("usage-table")).to_contain_text("gpt-4o-mini")
        await expect(person.see("usage-table")).not_to_contain_text("mock-gpt")


async def test_the_keyboard_alone_signs_in_and_makes_a_key(browser: Browser, gateway: Gateway) -> None:
    async with at_the_page(browser, gateway.root_url) as person:
        await person.open()
        await expect(person.see("email")).to_be_visible()
        keyboard = person.page.keyboard
        await person.tab_to("email")
        await keyboard.type(LOGIN[0])
        await person.tab_to("password")
        await keyboard.type(LOGIN[1])
        await keyboard.press("Enter")
        await expect(person.see("who")).to_contain_text(LOGIN[0])
        await person.tab_to("nav-keys")
        outline = await person.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none"  # where the focus is can be seen
        await keyboard.press("Enter")
        await expect(person.see("new-key")).to_be_visible()
        await person.tab_to("new-key")
        await keyboard.press("Enter")
        await person.tab_to("key-name")
        await keyboard.type("by hand")
        await keyboard.press("Enter")
        await expect(person.see("key-secret")).to_be_visible()
        await person.tab_to("key-secret-done")
        await keyboard.press("Enter")
        await expect(person.see("key-secret")).to_be_hidden()
        await expect(person.see("keys-table")).to_contain_text("by hand")
        await expect(person.see("new-key")).to_be_focused()
