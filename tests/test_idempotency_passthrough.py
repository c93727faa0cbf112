"""`Idempotency-Key` on what is passed on by path: made once, paid once, and given again as it was."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from gateway import appkeys
from gateway.mock import Mock
from tests.support.asking import Got, other_account, settled
from tests.support.by_hand import BOUNDARY, FILE, OK, UPLOAD, Far, answer_all, form, in_front, part, send_head, trickle
from tests.support.gateway import Gateway, running_gateway
from tests.support.proxy import proxied_postgres

pytestmark = pytest.mark.integration

Start = Callable[..., Any]
PURPOSE = part("purpose", "user_data")
BATCH = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
PICTURE = {"model": "openai/mock-gpt", "prompt": "a cat"}
CONFIG = '[providers.other]\nbase_url = "{}"\nneeds_key = false\n'


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(headers=gateway.headers) as client:
        yield client


@pytest.fixture
def start(database_url: str, redis_url: str) -> Start:
    """A gateway in front of a provider by hand, and a client of it."""
    return partial(in_front, database_url, redis_url)


async def send(
    client: aiohttp.ClientSession,
    gateway: Gateway,
    path: str,
    *,
    key: str = "order-1",
    method: str = "POST",
    **more: Any,
) -> Got:
    headers = {**more.pop("headers", {}), "Idempotency-Key": key}
    async with client.request(method, f"{gateway.base_url}{path}", headers=headers, **more) as response:
        return Got(response.status, response.headers, await response.read(), [])


async def ask(client: aiohttp.ClientSession, gateway: Gateway, path: str, **more: Any) -> Got:
    """Its answer, which has been kept, or not, when it is given."""
    got = await send(client, gateway, path, **more)
    await settled(gateway)
    return got


def file(content: str = "some text", name: str = "a.txt", boundary: str = "b1") -> dict[str, Any]:
    """Arguments of its upload."""
    made = form(PURPOSE, part("file", content, f'; filename="{name}"'))
    data = made["data"].replace(b"boundary-of-the-test", boundary.encode())
    return {"data": data, "headers": {"Content-Type": f"multipart/form-data; boundary={boundary}"}}


def speech(**fields: str) -> dict[str, Any]:
    """Arguments of a transcription."""
    return form(*(part(name, value) for name, value in {"model": "openai/mock-gpt", **fields}.items()), FILE)


async def files_at(gateway: Gateway) -> int:
    """How many the provider has."""
    url = gateway.app[appkeys.CATALOGUE].routes.providers["openai"].base_url
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer sk-operator-openai"}) as operator:
        async with operator.get(f"{url}/files") as response:
            return len((await response.json())["data"])


async def claims(gateway: Gateway) -> int:
    return int(await gateway.app[appkeys.POOL].fetchval("select count(*) from answers"))


# --- again --------------------------------------------------------------------------------------------------------


async def test_a_file_that_the_sdk_sends_twice_is_one_file(gateway: Gateway) -> None:
    """With each try it makes another boundary."""
    async with openai.AsyncOpenAI(base_url=gateway.base_url, api_key=gateway.api_key) as client:
        made = []
        for _ in range(2):
            made.append(
                await client.files.create(
                    file=("a.jsonl", b"{}\n" * 50_000), purpose="batch", extra_headers={"Idempotency-Key": "order-1"}
                )
            )
            await settled(gateway)
        assert made[0] == made[1]
        with pytest.raises(openai.ConflictError):
            await client.files.create(
                file=("a.jsonl", b"[]\n" * 50_000), purpose="batch", extra_headers={"Idempotency-Key": "order-1"}
            )
    assert await files_at(gateway) == 1
    paid, free = await gateway.rows()
    assert (paid["source"], free["source"], free["source_id"]) == ("provider", "replay", paid["request_id"])
    assert (free["status"], free["outcome"], free["prompt_tokens"], free["cost_micros"]) == (200, "ok", 0, 0)


async def test_the_same_form_with_another_boundary_is_replayed(gateway: Gateway, client: aiohttp.ClientSession) -> None:
    first = await ask(client, gateway, "/files", **file())
    second = await ask(client, gateway, "/files", **file(boundary="something-else"))
    assert (first.status, first.replayed, second.status, second.replayed) == (200, False, 200, True)
    assert second.body == first.body
    assert (second.headers["X-Gateway-Provider"], second.headers["Cache-Control"]) == ("openai", "no-store")
    assert "X-Gateway-Model" not in second.headers
    assert second.headers["X-Request-Id"] != first.headers["X-Request-Id"]
    assert await files_at(gateway) == 1


@pytest.mark.parametrize(
    "other", [file("some tex2"), file("some text and more"), file(name="b.txt"), form(PURPOSE)], ids=str
)
async def test_another_form_is_refused_and_not_retried(
    gateway: Gateway, client: aiohttp.ClientSession, other: dict[str, Any]
) -> None:
    await ask(client, gateway, "/files", **file())
    refused = await ask(client, gateway, "/files", **other)
    assert refused.status == 409
    assert b"idempotency_mismatch" in refused.body
    assert refused.headers["x-should-retry"] == "false"
    assert await files_at(gateway) == 1
    assert (await ask(client, gateway, "/files", **file())).replayed, "the key is as good as before"


async def test_whole_json_is_replayed_on_every_endpoint(gateway: Gateway, client: aiohttp.ClientSession) -> None:
    made = await ask(client, gateway, "/files", key="file", **file())
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/moderations", {"json": {"input": "x"}}),
        ("/images/generations", {"json": PICTURE}),
        ("/images/edits", speech(prompt="a cat")),
        ("/audio/transcriptions", speech()),
        ("/audio/translations", speech()),
        ("/batches", {"json": {"input_file_id": openai_id(made), **BATCH}}),
    ]
    for path, request in requests:
        before = len(gateway.calls)
        first, second = await ask(client, gateway, path, **request), await ask(client, gateway, path, **request)
        assert (first.status, first.replayed, second.status, second.replayed) == (200, False, 200, True), path
        assert second.body == first.body
        assert second.headers.get("X-Gateway-Model") == first.headers.get("X-Gateway-Model")
        assert len(gateway.calls) == before + 1, "the same key on another path is another key"
    picture = [row for row in await gateway.rows() if row["source"] == "replay"][1]
    assert picture["saved_tokens"] > 0, "what the provider counted is what is saved"


def openai_id(got: Got) -> str:
    return got.body.split(b'"id":"')[1].split(b'"')[0].decode()


async def test_json_written_otherwise_is_the_same_and_other_json_is_not(
    gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    body = {"model": "openai/mock-gpt", "prompt": "a cat", "n": 1}
    await ask(client, gateway, "/images/generations", json=body)
    assert (await ask(client, gateway, "/images/generations", json=dict(reversed(body.items())))).replayed
    for other in ({**body, "n": 2}, {**body, "model": "openai/mock-other"}):
        assert (await ask(client, gateway, "/images/generations", json=other)).status == 409
    large = {**body, "user": "a" * (2 << 20)}  # passes unread
    for content, expected in ((large, False), (large, True)):
        got = await ask(client, gateway, "/images/generations?a=b", json=content)
        assert (got.status, got.replayed) == (200, expected), "another query is another request"
    assert (await ask(client, gateway, "/images/generations?a=b", json={**large, "n": 2})).status == 409
    assert len(gateway.calls) == 2


async def test_what_is_deleted_or_cancelled_twice_is_so_once(gateway: Gateway) -> None:
    """The second time there is no such file any more, and the answer is the first one all the same."""
    async with aiohttp.ClientSession(headers=await other_account(gateway)) as client:
        made = await ask(client, gateway, "/files", **file())
        batch = await ask(client, gateway, "/batches", json={"input_file_id": openai_id(made), **BATCH})
        one, other = f"/files/{openai_id(made)}", f"/batches/{openai_id(batch)}/cancel"
        for method, path in (("POST", other), ("DELETE", one)):
            first = await ask(client, gateway, path, method=method)
            second = await ask(client, gateway, path, method=method)
            assert (first.status, first.replayed, second.replayed) == (200, False, True)
            assert second.body == first.body
            assert len([call for call in gateway.mock.received if call.path.endswith(path)]) == 1
        async with client.delete(f"{gateway.base_url}{one}") as response:
            assert response.status == 404, "without a key"
        async with client.get(f"{gateway.base_url}{one}", headers={"Idempotency-Key": "order-1"}) as response:
            assert response.status == 404, "who only looks is not given what was"


async def test_a_key_is_its_accounts_alone(gateway: Gateway, client: aiohttp.ClientSession) -> None:
    mine = await ask(client, gateway, "/files", **file())
    async with aiohttp.ClientSession(headers=await other_account(gateway)) as other:
        theirs = await ask(other, gateway, "/files", **file())
        assert (theirs.status, theirs.replayed, openai_id(theirs) != openai_id(mine)) == (200, False, True)
        assert openai_id(await ask(other, gateway, "/files", **file())) == openai_id(theirs)
        path = f"/files/{openai_id(mine)}"
        assert (await ask(client, gateway, path, method="DELETE")).status == 200
        gone = await ask(other, gateway, path, method="DELETE")
        assert (gone.status, gone.replayed) == (404, False)
    second_key = {"Authorization": f"Bearer {await gateway.new_key()}"}
    assert (await ask(client, gateway, path, method="DELETE", headers=second_key)).replayed
    own = {"X-API-Key": gateway.api_key, "Authorization": "Bearer sk-of-the-callers-own"}
    assert not (await ask(client, gateway, path, method="DELETE", headers=own)).replayed
    narrow = {"Authorization": f"Bearer {await gateway.new_key(allowed_models=('gpt-*',))}"}
    await ask(client, gateway, "/images/generations", json=PICTURE)
    assert (await ask(client, gateway, "/images/generations", json=PICTURE, headers=narrow)).status == 403


async def test_another_provider_is_another_request(database_url: str, redis_url: str, tmp_path: Path) -> None:
    provider, config = Mock(), tmp_path / "gateway.toml"
    config.write_text(CONFIG.format(f"{await provider.start()}/v1"))
    environ = {"GATEWAY_CONFIG": str(config)}
    try:
        async with running_gateway(database_url, redis_url, environ) as gateway:
            async with aiohttp.ClientSession(headers=gateway.headers) as client:
                await ask(client, gateway, "/moderations", json={"input": "x"})
                there = {"X-Gateway-Provider": "other"}
                refused = await ask(client, gateway, "/moderations", json={"input": "x"}, headers=there)
                assert (refused.status, [call for call in provider.received if call.method == "POST"]) == (409, [])
    finally:
        await provider.stop()


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_a_key_that_is_none_is_refused_before_the_body_is_read(
    gateway: Gateway, client: aiohttp.ClientSession, key: str
) -> None:
    refused = await ask(client, gateway, "/files", key=key, **file())
    assert refused.status == 400
    assert b"Idempotency-Key" in refused.body
    assert gateway.calls == []


# --- what is not kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        ("/audio/speech", {"json": {"model": "openai/mock-gpt", "input": "hello"}}),
        ("/audio/transcriptions", speech(response_format="text")),
        ("/audio/transcriptions", speech(stream="true")),
        ("/images/generations", {"json": {**PICTURE, "stream": True}}),
        ("/images/generations", {"json": {**PICTURE, "quality": "high"}}),
        ("/images/generations", {"json": {**PICTURE, "model": "openai/mock-gpt?status=500"}}),
        ("/images/generations", {"json": {**PICTURE, "model": "openai/mock-gpt?status=429"}}),
        ("/images/generations", {"json": {**PICTURE, "model": "openai/mock-gpt?status=401"}}),
        ("/images/generations", {"json": {**PICTURE, "model": "openai/mock-gpt?fault=reset_before_headers"}}),
        ("/images/generations", {"json": {**PICTURE, "model": "anthropic/mock-claude"}}),
        ("/files", form(PURPOSE)),
        ("/files/file-of-nobody", {"method": "DELETE"}),
    ],
    ids=["sound", "text", "events", "more events", "large", "500", "429", "401", "reset", "no such", "400", "404"],
)
async def test_what_is_no_small_json_or_may_be_mended_leaves_the_key_free(
    gateway: Gateway, path: str, request_: dict[str, Any]
) -> None:
    """But for what the provider refuses for good."""
    final = path == "/files"
    async with aiohttp.ClientSession(headers=await other_account(gateway)) as client:
        before = await ask(client, gateway, path, **request_)
        gateway.forget_faults()
        again = await ask(client, gateway, path, **request_)
    assert (again.status, again.replayed) == (before.status, final)
    assert len(gateway.calls) == 1 if final else len(gateway.calls) != 1
    assert (await claims(gateway)) == final
    assert not gateway.app[appkeys.KEEPER]._claims


async def test_a_providers_refusal_is_replayed_with_its_status(gateway: Gateway, client: aiohttp.ClientSession) -> None:
    request = {"json": {**PICTURE, "model": "openai/mock-gpt?status=422"}}
    first = await ask(client, gateway, "/images/generations", **request)
    second = await ask(client, gateway, "/images/generations", **request)
    assert (first.status, second.status, second.replayed, second.body) == (422, 422, True, first.body)
    assert len(gateway.calls) == 1
    assert [row["outcome"] for row in await gateway.rows()] == ["rejected", "rejected"]


async def test_an_answer_that_breaks_leaves_the_key_free(start: Start) -> None:
    async def breaks(far: Far) -> None:
        await far.read_body()
        await far.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        far.writer.close()

    async with start(breaks) as (gateway, _far, client):
        for _ in range(2):
            with pytest.raises(aiohttp.ClientPayloadError):
                await send(client, gateway, "/moderations", json={"input": "x"})
        await settled(gateway)
        assert await claims(gateway) == 0


async def test_an_answer_before_the_bodys_end_leaves_the_key_free(start: Start) -> None:
    """What that request would have said in all, nobody knows."""

    async def is_early(far: Far) -> None:
        if len(far.heads) > 2:
            await answer_all(far)
            return
        await far.reader.readexactly(10)
        await far.send(OK)
        await far.hang()

    async with start(is_early) as (gateway, far, client):
        reader, writer = await send_head(gateway, 1000, "Idempotency-Key: early\r\n")
        writer.write(bytes(500))
        assert b" 200 " in await reader.readline()
        writer.close()

        async def half() -> AsyncIterator[bytes]:
            yield bytes(1 << 16)
            await asyncio.sleep(60)

        as_json = {"Content-Type": "application/json", "Content-Length": str(2 << 20)}
        assert (await send(client, gateway, "/moderations", key="early", data=half(), headers=as_json)).status == 200
        await settled(gateway)
        assert await claims(gateway) == 0
        assert not (await ask(client, gateway, "/files", key="early", **file())).replayed
        assert len(far.heads) == 3


@pytest.mark.haste
async def test_without_postgres_no_promise_is_made(database_url: str, redis_url: str) -> None:
    async with proxied_postgres(database_url) as (proxy, url), running_gateway(url, redis_url) as gateway:
        async with aiohttp.ClientSession(headers=gateway.headers) as client:
            await ask(client, gateway, "/moderations", json={"input": "x"})
            proxy.stall()
            refused = await send(client, gateway, "/moderations", key="other", json={"input": "x"})
            assert (refused.status, len(gateway.calls)) == (503, 1)
            assert b"idempotency_unavailable" in refused.body
            async with client.post(f"{gateway.base_url}/moderations", json={"input": "x"}) as response:
                assert response.status == 200, "without a key nobody needs it"
            proxy.resume()


async def test_a_body_that_trickles_is_not_read_for_ever_to_be_compared(start: Start) -> None:
    async with start(answer_all, GATEWAY_MAX_STREAM="1") as (gateway, _far, client):
        assert (await send(client, gateway, "/files", key="k", **form(FILE))).status == 200
        await settled(gateway)
        reader, writer = await send_head(gateway, 10_000, "Idempotency-Key: k\r\n")
        writer.write(f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"\r\n\r\n'.encode())
        trickling = asyncio.create_task(trickle(writer))
        async with asyncio.timeout(4):
            assert b" 408 " in await reader.readline()
        trickling.cancel()


async def test_a_form_is_the_same_however_its_bytes_came(start: Start) -> None:
    """Its model stands behind the part in which it is looked for."""
    end = f"--{BOUNDARY}--\r\n".encode()
    body = part("file", "x" * 70_000, '; filename="a.mp3"') + part("model", "openai/whisper-1") + end

    async def pieces() -> AsyncIterator[bytes]:
        yield body[:66_000]
        await asyncio.sleep(0.3)
        yield body[66_000:]

    async with start(answer_all) as (gateway, far, client):
        headers = {**UPLOAD, "Content-Length": str(len(body)), "Idempotency-Key": "k"}
        for data, replayed in ((pieces(), False), (body, True)):
            async with client.post(f"{gateway.base_url}/audio/transcriptions", data=data, headers=headers) as response:
                assert (response.status, "Idempotency-Replayed" in response.headers) == (200, replayed)
            await settled(gateway)
        assert len(far.heads) == 1
