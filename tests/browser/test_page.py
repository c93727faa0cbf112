"""What people do at the page, done in a real Chromium: figures, keys, the audit trail, the playground."""

import asyncio
import csv
import re
from functools import partial
from typing import Any

import aiohttp
import pytest
from playwright.async_api import Browser, expect

from gateway import appkeys
from tests.browser.history import HISTORY, write_history
from tests.browser.person import SECTIONS, Person, at_the_page, chat, rows_of, until
from tests.support.gateway import Gateway

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

SHOWN = {  # totals of the page: their figure in /api/stats
    "total-requests": "requests",
    "total-tokens": "total_tokens",
    "total-cost": "cost_micros",
    "total-error-rate": "error_rate",
    "total-saved": "saved_micros",
}


# --- figures ------------------------------------------------------------------------------------------------------


async def test_live_numbers_move_while_streams_run_and_totals_are_those_of_stats_at_the_end(
    admin: Person, gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    await write_history(gateway, gateway.api_key[4:16])
    before = await _totals(client, gateway, "all")
    await expect(admin.see("live-state")).to_have_text("live")
    await expect(admin.see("live-completion-rate")).to_have_text("0")
    models = ["claude-sonnet-4-5", "claude-sonnet-4-5", "gpt-4o"]  # 6 s, 6 s, 3 s
    streams = [asyncio.create_task(chat(client, gateway.api_key, model, stream=True)) for model in models]
    try:
        await expect(admin.see("live-streams")).to_have_text("3")
        await expect(admin.see("live-completion-rate")).not_to_have_text("0")
        first = await admin.see("live-completion-rate").inner_text()
        await expect(admin.see("live-completion-rate")).not_to_have_text(first)
        await expect(admin.see("live-completion-rate")).not_to_have_text("0")
    finally:
        assert await asyncio.gather(*streams) == [200, 200, 200]
    await expect(admin.see("live-streams")).to_have_text("0")
    await expect(admin.see("live-completion-rate")).to_have_text("0")
    await rows_of(gateway, HISTORY + 3)
    after = await _totals(client, gateway, "all")
    assert after["completion_tokens"] - before["completion_tokens"] == 120 + 240 + 240
    for within in ("1h", "24h", "all"):
        await admin.see(f"range-{within}").click()
        await until(partial(_agree, admin, client, gateway, within), f"the totals of {within}")
    assert (await _totals(client, gateway, "1h"))["requests"] < after["requests"]  # the ranges are not all the same


async def _agree(person: Person, client: aiohttp.ClientSession, gateway: Gateway, within: str) -> bool:
    """Asked for each time: what is an hour old is in the last hour no more a moment later."""
    totals = await _totals(client, gateway, within)
    return {name: await person.number(name) for name in SHOWN} == {name: totals[of] for name, of in SHOWN.items()}


async def _totals(client: aiohttp.ClientSession, gateway: Gateway, within: str) -> dict[str, Any]:
    async with client.get(f"/api/stats?range={within}", headers=gateway.headers) as response:
        totals: dict[str, Any] = (await response.json())["totals"]
        return totals


async def test_totals_follow_by_themselves(admin: Person, gateway: Gateway, client: aiohttp.ClientSession) -> None:
    await until(lambda: admin.shows("total-requests", 0), "that there is nothing yet")
    assert await chat(client, gateway.api_key) == 200
    await until(lambda: admin.shows("total-requests", 1), "the request that was made meanwhile")
    await expect(admin.see("models-table")).to_contain_text("gpt-4o-mini")
    await admin.see("range-1h").click()  # the other tables follow twice a minute
    await expect(admin.see("providers-table")).to_contain_text("openai")
    await expect(admin.see("dependencies")).to_contain_text(re.compile("postgres|database", re.IGNORECASE))


async def test_a_live_stream_of_figures_that_breaks_is_taken_up_again(browser: Browser, gateway: Gateway) -> None:
    async with at_the_page(browser, gateway.root_url) as person:
        await person.page.route("**/api/live", lambda route: route.abort())
        await person.open()
        await person.sign_in()
        await expect(person.see("live-state")).to_have_text("reconnecting")
        await person.page.unroute("**/api/live")
        await expect(person.see("live-state")).to_have_text("live")
        person.complaints = [one for one in person.complaints if "net::ERR_FAILED" not in one]


async def test_who_has_nothing_yet_is_told_what_to_do_next(admin: Person) -> None:
    await expect(admin.see("empty-overview")).to_contain_text("/v1/chat/completions")
    await admin.go_to("usage")
    await expect(admin.see("empty-usage")).to_be_visible()


# --- keys ---------------------------------------------------------------------------------------------------------


async def test_a_key_is_made_shown_once_changed_and_revoked(
    admin: Person, gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    await admin.go_to("keys")
    secret = await _make_key(admin, "laptop")
    key_id = secret[4:16]
    assert await chat(client, secret) == 200
    assert secret not in await admin.page.content()
    await admin.page.reload()
    row = admin.see(f"key-row-{key_id}")
    await expect(row).to_contain_text("laptop")
    assert secret not in await admin.page.content()

    await admin.see(f"key-edit-{key_id}").click()
    await admin.see("key-name").fill("desk")
    await admin.page.get_by_label("Requests per minute").fill("1")
    await admin.see("key-save").click()
    await expect(row).to_contain_text("desk")
    assert [await chat(client, secret) for _ in range(2)][-1] == 429  # the window may have been begun before

    await admin.see(f"key-revoke-{key_id}").click()
    await admin.see("cancel").click()
    assert await chat(client, secret) == 429
    await admin.see(f"key-revoke-{key_id}").click()
    await admin.see("confirm").click()
    await expect(row).to_contain_text("revoked", ignore_case=True)
    assert await chat(client, secret) == 401


async def _make_key(person: Person, name: str) -> str:
    await person.see("new-key").click()
    await person.see("key-name").fill(name)
    await person.see("key-create").click()
    secret = (await person.see("key-secret").inner_text()).strip()
    assert re.fullmatch(r"aig_\w{12}_\w+", secret)
    await person.page.keyboard.press("Escape")  # or a slip of the hand would lose it for good
    await expect(person.see("key-secret")).to_be_visible()
    await person.see("key-secret-done").click()
    await expect(person.see("key-secret")).to_be_hidden()
    return secret


# --- usage --------------------------------------------------------------------------------------------------------


async def test_the_audit_trail_is_filtered_paged_downloaded_and_opened(admin: Person, gateway: Gateway) -> None:
    await write_history(gateway, gateway.api_key[4:16])
    await admin.go_to("usage")
    table = admin.see("usage-table")
    rows = table.locator("tbody tr")
    await expect(table).to_contain_text("claude-sonnet-4-5")
    await admin.see("usage-filter-model").fill("gpt-4o-mini")
    await admin.see("usage-apply").click()
    await expect(table).not_to_contain_text("claude-sonnet-4-5")
    await expect(rows.first).to_contain_text("gpt-4o-mini")
    page = await rows.count()
    await admin.see("usage-more").click()
    await expect(rows).to_have_count(2 * page)
    async with admin.page.expect_download() as download:
        await admin.see("usage-csv").click()
    downloaded = list(csv.DictReader((await (await download.value).path()).read_text().splitlines()))
    assert {row["model"] for row in downloaded} == {"gpt-4o-mini"}
    await rows.first.get_by_role("button").click()
    await expect(admin.see("detail-id")).to_have_text(downloaded[0]["request_id"])


# --- playground ---------------------------------------------------------------------------------------------------

# Notes how long the answer is each time that it changes.
_LENGTHS = """() => {
  window.lengths = [];
  new MutationObserver(() => {
    const answer = document.querySelector('[data-testid="play-answer"]');
    if (answer && answer.textContent.length !== window.lengths.at(-1)) window.lengths.push(answer.textContent.length);
  }).observe(document.body, { childList: true, characterData: true, subtree: true });
}"""


async def _ask(person: Person, model: str) -> None:
    await person.go_to("playground")
    await expect(person.see("play-key")).not_to_have_value("")
    await person.see("play-model").select_option(model)
    await person.see("play-prompt").fill("Say hello.")
    await person.see("play-send").click()


async def test_the_playground_streams_token_by_token_and_is_in_the_audit_trail(admin: Person, gateway: Gateway) -> None:
    await admin.page.evaluate(_LENGTHS)
    await _ask(admin, "gpt-4o")
    await expect(admin.see("play-answer")).to_contain_text("Hello from the mock provider.")
    await expect(admin.see("play-stop")).to_be_disabled()
    [row] = await rows_of(gateway, 1)
    assert (row["model"], row["outcome"], row["completion_tokens"], row["stream"]) == ("gpt-4o", "ok", 120, True)
    assert row["key_id"] == gateway.api_key[4:16]
    lengths = await admin.page.evaluate("window.lengths")
    assert len(lengths) >= 10, lengths  # 120 tokens in three seconds, drawn at most once a frame
    await expect(admin.see("play-meta")).to_contain_text(str(row["request_id"]))
    await expect(admin.see("play-meta")).to_contain_text("120")
    await admin.go_to("usage")
    await expect(admin.see("usage-table")).to_contain_text("gpt-4o")


async def test_stopping_an_answer_closes_the_provider_and_is_billed(admin: Person, gateway: Gateway) -> None:
    await _ask(admin, "llama3.2")  # 50 s
    await expect(admin.see("play-answer")).to_contain_text("Hello from")
    await admin.see("play-stop").click()
    await expect(admin.see("play-send")).to_be_enabled()
    [row] = await rows_of(gateway, 1)
    assert (row["outcome"], row["completion_tokens"] > 0) == ("client_abort", True)
    assert gateway.calls[-1].client_gone_at is not None


async def test_an_error_in_the_playground_is_told_in_words(admin: Person, gateway: Gateway) -> None:
    await gateway.app[appkeys.KEYS].revoke(gateway.api_key[4:16], None)
    await gateway.new_key(allowed_models=("gpt-4o",), requests_per_minute=1)
    admin.expected |= {(429, "/v1/chat/completions")}
    await admin.page.reload()
    await _ask(admin, "gpt-4o")
    await expect(admin.see("play-answer")).to_contain_text("Hello from")
    await expect(admin.see("play-send")).to_be_enabled()
    await admin.see("play-send").click()
    await expect(admin.see("play-error")).to_contain_text("1 requests a minute; try again")


# --- everything at once -------------------------------------------------------------------------------------------


async def test_a_walk_through_all_sections_asks_nobody_but_the_gateway(admin: Person, gateway: Gateway) -> None:
    asked: list[str] = []
    admin.page.on("request", lambda request: asked.append(request.url))
    for section in SECTIONS:
        await admin.open(section)
        await admin.page.reload()
        await expect(admin.see(f"nav-{section}")).to_have_attribute("aria-current", "page")
    await admin.open("overview")
    for path in ("/dashboard", "/api/stats", "/api/latency", "/api/live", "/auth/keys", "/api/usage", "/v1/models"):
        await until(partial(_was_asked, asked, f"{gateway.root_url}{path}"), f"a request to {path}")


async def _was_asked(asked: list[str], url: str) -> bool:
    return any(one.startswith(url) for one in asked)
