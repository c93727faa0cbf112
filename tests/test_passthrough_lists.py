"""Lists of files and batches that many accounts have in one account of the operator's: whole, or an error."""

from collections.abc import AsyncIterator
from itertools import count
from typing import Any
from urllib.parse import parse_qs

import aiohttp
import openai
import orjson
import pytest
from openai import AsyncOpenAI

from gateway import appkeys, owned
from tests.support.asking import other_account
from tests.support.by_hand import Far, in_front
from tests.support.gateway import Gateway, running_gateway

pytestmark = pytest.mark.integration

CONTENT = b"{}\n"
BATCH: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owned, "PAGE_OF", {"file": 2, "batch": 2})


async def member(gateway: Gateway, name: str) -> AsyncOpenAI:
    """A client of an account of its own."""
    made = await gateway.app[appkeys.ACCOUNTS].register(f"{name}@example.com", "correct horse", registration="open")
    unlimited: Any = {"requests_per_minute": 0, "concurrent_requests": 0, "allowed_models": ()}
    key = await gateway.app[appkeys.KEYS].create(made.id, name, **unlimited)
    return AsyncOpenAI(base_url=gateway.base_url, api_key=key.token, max_retries=0)


async def upload(client: AsyncOpenAI, times: int = 1) -> list[str]:
    """Ids, the newest first."""
    files = [await client.files.create(file=("a", CONTENT), purpose="batch") for _ in range(times)]
    return [file.id for file in files][::-1]


async def listed(client: AsyncOpenAI, **query: Any) -> list[str]:
    """Page after page, as the SDK asks for them."""
    return [file.id async for file in client.files.list(**query)]


def lists_of(gateway: Gateway) -> int:
    """Pages that the provider was asked for."""
    return sum(received.path == "/v1/files" and received.method == "GET" for received in gateway.mock.received)


def time_flies(monkeypatch: pytest.MonkeyPatch) -> None:
    """With each look at the clock the time for a whole list is over."""
    clock = count(step=1000)
    monkeypatch.setattr(owned, "monotonic", lambda: float(next(clock)))


# --- whole --------------------------------------------------------------------------------------------------------


async def test_three_tenants_among_one_another_get_all_of_their_own_and_nothing_else(gateway: Gateway) -> None:
    clients = [await member(gateway, name) for name in ("ada", "bob", "cy")]
    files: list[list[str]] = [[], [], []]
    batches: list[list[str]] = [[], [], []]
    for number in (0, 1, 2, 2, 2, 0, 0, 1, 1, 0, 2, 0, 1, 1, 0, 2, 2, 2, 2, 2, 2, 0):
        client = clients[number]
        files[number] += await upload(client)
        batches[number].append((await client.batches.create(input_file_id=files[number][-1], **BATCH)).id)
    for client, theirs, batch_ids in zip(clients, files, batches, strict=True):
        queries: list[dict[str, Any]] = [{}, {"limit": 1}, {"limit": 3}, {"limit": len(theirs)}]
        for more in queries:
            assert await listed(client, **more) == theirs[::-1]
            assert await listed(client, **more, order="asc") == theirs
            assert [batch.id async for batch in client.batches.list(**more)] == batch_ids[::-1]
        await client.close()


async def test_what_is_older_than_all_that_others_have_is_found(gateway: Gateway) -> None:
    async with await member(gateway, "ada") as ada, await member(gateway, "bob") as bob:
        first = await upload(ada)
        await upload(bob, 45)
        page = await ada.files.list()
        assert ([file.id for file in page.data], page.has_more) == (first, False)
        last = await upload(ada, 2)
        assert await listed(ada, limit=1) == last + first


async def test_a_list_goes_no_further_than_its_last_object(gateway: Gateway) -> None:
    async with await member(gateway, "ada") as ada, await member(gateway, "bob") as bob:
        await upload(bob, 9)
        hers = await upload(ada, 2)
        await upload(bob, 1)
        before = lists_of(gateway)
        assert await listed(ada) == hers
        assert lists_of(gateway) - before == 2  # of 6
        async with await member(gateway, "cy") as cy:
            before = lists_of(gateway)
            page = await cy.files.list()
            assert (page.data, page.has_more, lists_of(gateway) - before) == ([], False, 1)


async def test_what_the_provider_lost_hides_nothing(gateway: Gateway) -> None:
    """The gateway believes to the end that there is another one."""
    async with await member(gateway, "ada") as ada, await member(gateway, "bob") as bob:
        first = await upload(ada)
        lost = await upload(ada)
        await upload(bob, 3)
        account = await gateway.app[appkeys.POOL].fetchval("select account_id from belongings where id = $1", lost[0])
        await ada.files.delete(lost[0])
        await gateway.app[appkeys.BELONGINGS].add("openai", "file", lost, str(account))
        assert await listed(ada) == first
        assert await listed(ada, limit=1) == first


async def test_names_of_any_length_hide_nobodys_files_and_are_no_fault_of_the_provider(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of which is longer than what is read at once."""
    monkeypatch.setattr(owned, "PAGE_OF", {"file": 100, "batch": 100})
    all_ = [{"id": f"file-{number}", "filename": "n" * 50_000} for number in range(30)]
    limits: list[int] = []

    async def lists(far: Far) -> None:
        query = parse_qs(far.heads[-1].split(b" ")[1].decode().partition("?")[2])
        limits.append(int(query["limit"][0]))
        start = int(query["after"][0].partition("-")[2]) + 1 if "after" in query else 0
        page = all_[start : start + limits[-1]]
        body = orjson.dumps({"data": page, "has_more": start + limits[-1] < len(all_)})
        await far.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async with in_front(database_url, redis_url, lists) as (gateway, _far, _client):
        async with await member(gateway, "ada") as ada:
            account = await gateway.app[appkeys.POOL].fetchval("select id from accounts where email like 'ada%'")
            await gateway.app[appkeys.BELONGINGS].add("openai", "file", ["file-3", "file-29"], str(account))
            for _ in range(6):  # more than a provider may fail
                assert await listed(ada) == ["file-3", "file-29"]
            assert limits[:3] == [100, 10, 10], "what fits is not found out again with every page"


async def test_a_list_holds_a_bounded_number_of_bytes_and_the_sdk_goes_on(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owned, "MAX_LIST", 1 << 20)
    monkeypatch.setattr(owned, "PAGE_OF", {"file": 1000, "batch": 1000})
    all_ = [{"id": f"file-{number}", "filename": "n" * 8000} for number in range(500)]

    async def lists(far: Far) -> None:
        query = parse_qs(far.heads[-1].split(b" ")[1].decode().partition("?")[2])
        first = int(query["after"][0].partition("-")[2]) + 1 if "after" in query else 0
        end = first + int(query["limit"][0])
        body = orjson.dumps({"data": all_[first:end], "has_more": end < len(all_)})
        await far.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async with in_front(database_url, redis_url, lists) as (gateway, _far, _client):
        async with aiohttp.ClientSession(headers=await other_account(gateway)) as client:
            account = await gateway.app[appkeys.POOL].fetchval("select id from accounts where email like 'other%'")
            await gateway.app[appkeys.BELONGINGS].add("openai", "file", [one["id"] for one in all_], str(account))
            got: list[str] = []
            more, sizes = True, []
            while more:
                after = {"after": got[-1]} if got else {}
                async with client.get(f"{gateway.base_url}/files", params=after) as response:
                    sizes.append(len(await response.read()))
                    page = await response.json()
                got += [one["id"] for one in page["data"]]
                more = page["has_more"]
            assert got == [one["id"] for one in all_]
            assert max(sizes) < 2.1 * (1 << 20), "a document more than the bound"


# --- or an error --------------------------------------------------------------------------------------------------


async def test_when_the_time_is_over_a_list_is_short_and_the_sdk_goes_on(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await member(gateway, "ada") as ada, await member(gateway, "bob") as bob:
        hers = []
        for _ in range(5):
            hers += await upload(ada)
            await upload(bob)
        hers = hers[::-1]
        time_flies(monkeypatch)
        page = await ada.files.list()
        assert ([file.id for file in page.data], page.has_more) == (hers[:1], True)
        assert await listed(ada) == hers


async def test_when_the_time_is_over_and_nothing_was_found_it_is_an_error_of_ours(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty list would be taken for a whole one, whatever its `has_more` says."""
    async with await member(gateway, "ada") as ada, await member(gateway, "bob") as bob:
        hers = await upload(ada)
        await upload(bob, 4)
        time_flies(monkeypatch)
        for _ in range(10):  # more than a provider may fail
            with pytest.raises(openai.InternalServerError, match="none of yours is among the 2 files") as refused:
                await ada.files.list()
            assert (refused.value.status_code, refused.value.code) == (503, "list_incomplete")
        monkeypatch.undo()
        assert await listed(ada) == hers
        rows = [row for row in await gateway.rows() if row["error_code"]]
        assert {(row["status"], row["outcome"], row["error_code"]) for row in rows} == {
            (503, "gateway_error", "list_incomplete")
        }


async def test_a_provider_that_always_gives_the_same_page_is_asked_no_more(database_url: str, redis_url: str) -> None:
    async def knows_no_after(far: Far) -> None:
        body = orjson.dumps({"data": [{"id": "file-1"}, {"id": "file-2"}], "has_more": True})
        await far.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async with in_front(database_url, redis_url, knows_no_after) as (gateway, far, _client):
        async with await member(gateway, "ada") as ada:
            account = await gateway.app[appkeys.POOL].fetchval("select id from accounts where email like 'ada%'")
            await gateway.app[appkeys.BELONGINGS].add("openai", "file", ["file-0", "file-2"], str(account))
            with pytest.raises(openai.InternalServerError, match="the provider's list begins again") as refused:
                await ada.files.list()
            assert (refused.value.status_code, len(far.heads)) == (502, 2)
