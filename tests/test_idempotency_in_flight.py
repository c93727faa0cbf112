"""`Idempotency-Key` on what is passed on by path, while its answer is being made: one upload, whoever leaves or dies."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import aiohttp
import asyncpg
import pytest

from gateway import appkeys, idempotency
from tests.support.asking import settled
from tests.support.by_hand import BOUNDARY, FILE, OK, UPLOAD, Far, answer_all, far_away, form, in_front, send_head
from tests.support.gateway import running_gateway
from tests.support.process import new_key, serving, until

pytestmark = pytest.mark.integration

Start = Callable[..., Any]
KEY = {"Idempotency-Key": "order-1"}
HEAD = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'.encode()
END = f"\r\n--{BOUNDARY}--\r\n".encode()


@pytest.fixture
def start(database_url: str, redis_url: str) -> Start:
    """A gateway in front of a provider by hand, and a client of it."""
    return partial(in_front, database_url, redis_url)


async def upload(client: aiohttp.ClientSession, url: str, size: int, last: bytes = b"x") -> tuple[int, bytes, bool]:
    """Status, answer, and whether it was replayed; of a form with a file of so many bytes, which ends in `last`."""
    headers = {**UPLOAD, **KEY, "Content-Length": str(len(HEAD) + size + len(END))}

    async def body() -> AsyncIterator[bytes]:
        yield HEAD
        for at in range(0, size - 1, 1 << 16):
            yield bytes(min(1 << 16, size - 1 - at))
        yield last + END

    async with client.post(f"{url}/files", data=body(), headers=headers) as response:
        return response.status, await response.read(), "Idempotency-Replayed" in response.headers


class Later:
    """A provider that reads all of a body, and answers when it may."""

    def __init__(self, answers: dict[int, bytes] | None = None) -> None:
        self.may_answer = asyncio.Event()
        self.read: list[int] = []  # bytes of each body
        self._answers = answers or {}

    async def __call__(self, far: Far) -> None:
        self.read.append(len(await far.read_body()))
        number = len(self.read)
        await self.may_answer.wait()
        await far.send(self._answers.get(number, OK.replace(b"file-1", b"file-%d" % number)))


async def test_many_uploads_at_once_are_one(start: Start) -> None:
    provider = Later()
    async with start(provider) as (gateway, _far, client):
        asking = [asyncio.create_task(upload(client, gateway.base_url, 1 << 20)) for _ in range(8)]
        await until(lambda: provider.read, 10)
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in asking)
        provider.may_answer.set()
        answers = await asyncio.gather(*asking)
        assert {(status, body) for status, body, _ in answers} == {(200, answers[0][1])}
        assert sorted(replayed for *_, replayed in answers) == [False] + [True] * 7
        assert provider.read == [len(HEAD) + (1 << 20) + len(END)]
        assert sorted(row["source"] for row in await gateway.rows()) == ["provider"] + ["replay"] * 7


async def test_who_waits_for_another_body_gets_a_409(start: Start) -> None:
    provider = Later()
    async with start(provider) as (gateway, _far, client):
        first = asyncio.create_task(upload(client, gateway.base_url, 1 << 20))
        await until(lambda: provider.read, 10)
        other = asyncio.create_task(upload(client, gateway.base_url, 1 << 20, last=b"y"))
        await asyncio.sleep(0.2)
        provider.may_answer.set()
        assert (await first)[0] == 200
        status, body, _ = await other
        assert (status, b"idempotency_mismatch" in body, len(provider.read)) == (409, True, 1)


async def test_who_waits_for_an_answer_that_fails_asks_by_itself(start: Start) -> None:
    """Its body is still all there to be sent."""
    provider = Later({1: b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"})
    async with start(provider) as (gateway, _far, client):
        first = asyncio.create_task(upload(client, gateway.base_url, 4 << 20))
        await until(lambda: provider.read, 10)
        second = asyncio.create_task(upload(client, gateway.base_url, 4 << 20))
        await asyncio.sleep(0.2)
        provider.may_answer.set()
        assert (await first)[0] == 502
        status, body, replayed = await second
        assert (status, b"file-2" in body, replayed) == (200, True, False)
        assert provider.read == [len(HEAD) + (4 << 20) + len(END)] * 2


async def test_json_that_differs_is_refused_while_the_other_is_in_flight(start: Start) -> None:
    provider = Later()
    async with start(provider) as (gateway, _far, client):
        url = f"{gateway.base_url}/moderations"
        first = asyncio.create_task(client.post(url, json={"input": "x"}, headers=KEY))
        await until(lambda: provider.read, 10)
        async with client.post(url, json={"input": "y"}, headers=KEY) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (409, "idempotency_mismatch")
        provider.may_answer.set()
        assert (await first).status == 200


async def test_another_node_waits_but_not_for_ever(
    start: Start, database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = Later()
    async with start(provider) as (gateway, far, client):
        environ = {"OPENAI_BASE_URL": far.address}
        async with running_gateway(database_url, redis_url, environ, account=gateway.account_id) as second:
            asking = asyncio.create_task(upload(client, gateway.base_url, 1 << 20))
            await until(lambda: provider.read, 10)
            monkeypatch.setattr(idempotency, "WAIT", 0.3)
            async with client.post(
                f"{second.base_url}/files", **form(FILE) | {"headers": {**UPLOAD, **KEY}}
            ) as response:
                assert response.status == 409
                assert b"idempotency_in_progress" in await response.read()
                assert int(response.headers["Retry-After"]) >= 1
            monkeypatch.setattr(idempotency, "WAIT", 30)
            there = asyncio.create_task(upload(client, second.base_url, 1 << 20))
            await asyncio.sleep(0.2)
            provider.may_answer.set()
            assert (await asking)[2] is False
            assert (await there)[1:] == ((await asking)[1], True)
            assert len(provider.read) == 1


# --- who leaves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/files", "/batches"])
async def test_who_leaves_while_its_file_or_batch_is_made_gets_it_when_it_comes_again(start: Start, path: str) -> None:
    provider = Later()
    async with start(provider) as (gateway, _far, client):
        more: dict[str, Any] = form(FILE) if path == "/files" else {"json": {"input_file_id": "file-1"}}
        more["headers"] = {**more.get("headers", {}), **KEY}
        asking = asyncio.create_task(client.post(f"{gateway.base_url}{path}", **more))
        await until(lambda: provider.read, 10)
        asking.cancel()
        await asyncio.wait({asking})
        again = asyncio.create_task(client.post(f"{gateway.base_url}{path}", **more))
        await asyncio.sleep(0.2)
        provider.may_answer.set()
        response = await again
        assert (response.status, response.headers.get("Idempotency-Replayed")) == (200, "true")
        assert (await response.json())["id"] == "file-1"
        assert len(provider.read) == 1
        left, replayed = await gateway.rows()
        assert (left["outcome"], replayed["outcome"], replayed["source_id"]) == (
            "client_abort",
            "ok",
            left["request_id"],
        )


async def test_who_leaves_before_the_provider_has_it_all_frees_the_key(start: Start) -> None:
    async with start(answer_all) as (gateway, far, client):
        _, writer = await send_head(gateway, 1000, "Idempotency-Key: order-1\r\n")
        writer.write(bytes(500))
        await until(lambda: far.heads, 10)
        writer.transport.abort()
        assert (await upload(client, gateway.base_url, 1000))[::2] == (200, False)


async def test_who_leaves_while_a_picture_is_made_frees_the_key(start: Start) -> None:
    provider = Later()
    async with start(provider) as (gateway, _far, client):
        url, more = f"{gateway.base_url}/images/generations", {"json": {"model": "openai/x", "prompt": "a"}}
        asking = asyncio.create_task(client.post(url, headers=KEY, **more))
        await until(lambda: provider.read, 10)
        asking.cancel()
        await settled(gateway)
        provider.may_answer.set()
        async with client.post(url, headers=KEY, **more) as response:
            assert (response.status, "Idempotency-Replayed" in response.headers) == (200, False)
        assert len(provider.read) == 2


async def test_who_waits_and_leaves_holds_nothing(start: Start) -> None:
    provider = Later()
    async with start(provider) as (gateway, _far, client):
        first = asyncio.create_task(upload(client, gateway.base_url, 1000))
        await until(lambda: provider.read, 10)
        second = asyncio.create_task(upload(client, gateway.base_url, 1000))
        await asyncio.sleep(0.2)
        second.cancel()
        await asyncio.wait({second})
        provider.may_answer.set()
        assert (await first)[0] == 200
        await settled(gateway)
        assert not gateway.app[appkeys.KEEPER]._claims
        assert (await upload(client, gateway.base_url, 1000))[2]


async def test_a_node_that_is_killed_frees_the_key_when_its_lease_is_over(database_url: str, redis_url: str) -> None:
    async def hangs_once(far: Far) -> None:
        await far.read_body()
        await (far.hang() if len(far.heads) == 1 else far.send(OK))

    async with far_away(hangs_once) as far, aiohttp.ClientSession() as client:
        environ = {
            "DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_MOCK": "off", "OPENAI_API_KEY": "sk-test",
            "OPENAI_BASE_URL": far.address,
        }  # fmt: skip
        async with serving(environ) as doomed, serving(environ) as other:
            client.headers["Authorization"] = f"Bearer {await new_key(doomed)}"
            asking = asyncio.create_task(upload(client, doomed.base_url, 1000))
            await until(lambda: far.heads, 10)
            os.kill(doomed.process.pid, signal.SIGKILL)
            await asyncio.wait({asking})
            assert isinstance(asking.exception(), aiohttp.ClientError)
            connection = await asyncpg.connect(database_url)
            assert await connection.fetchval("select asked = '' and status is null from answers")
            await connection.execute("update answers set expires_at = now() + interval '1 s'")  # it takes 20
            await connection.close()
            assert (await upload(client, other.base_url, 1000))[::2] == (200, False)
            assert len(far.heads) == 2


async def test_a_claim_is_renewed_while_its_body_passes(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.stores.keeper.RENEW", 0.1)
    async with in_front(database_url, redis_url, answer_all) as (gateway, far, _client):
        _reader, writer = await send_head(gateway, 1000, "Idempotency-Key: order-1\r\n")
        await until(lambda: far.heads, 10)
        pool = gateway.app[appkeys.POOL]
        await pool.execute("update answers set expires_at = now() + interval '0.5 s'")
        await asyncio.sleep(0.7)
        assert await pool.fetchval("select expires_at > now() + interval '10 s' from answers")
        writer.close()
