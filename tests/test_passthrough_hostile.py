"""Who means harm, and who is only careless, with what is passed on: other people's files, and models that a key may not use."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from gateway import appkeys
from gateway.protocol.errors import InvalidRequest
from gateway.protocol.multipart import Multipart
from gateway.protocol.request import parse_embedding, prompt_of
from gateway.protocol.tail import Tail
from tests.support.by_hand import FILE, OK, Far, answer_all, form, in_front, part, post, send_head, trickle
from tests.support.gateway import Gateway, running_gateway

pytestmark = pytest.mark.integration

CREDENTIAL = {"Authorization": "Bearer sk-operator-openai"}
DISPOSITION = "Content-Disposition: form-data; name="
BATCH = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
SPENT = json.dumps(
    {
        "id": "a", "object": "text_completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "text": "hi", "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 80_000, "total_tokens": 80_001},
    }
)  # fmt: skip


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


async def member(gateway: Gateway, name: str, **limits: Any) -> aiohttp.ClientSession:
    """A client of an account of its own."""
    account = await gateway.app[appkeys.ACCOUNTS].register(f"{name}@example.com", "correct horse", registration="open")
    limits = {"requests_per_minute": 0, "concurrent_requests": 0, "allowed_models": (), **limits}
    made = await gateway.app[appkeys.KEYS].create(account.id, "test", **limits)
    return aiohttp.ClientSession(headers={"Authorization": f"Bearer {made.token}"})


def provider_of(gateway: Gateway) -> str:
    return gateway.app[appkeys.CATALOGUE].routes.providers["openai"].base_url


async def of_the_operator(gateway: Gateway) -> str:
    """The id of a file that was made outside of the gateway."""
    made = form(part("purpose", "batch"), FILE)
    async with aiohttp.ClientSession(headers=CREDENTIAL) as operator:
        async with operator.post(f"{provider_of(gateway)}/files", **made) as response:
            return str((await response.json())["id"])


# --- files of others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data;\tboundary=b",
        "multipart/form-data; boundary=b",
        "multipart/form-data; boundary=b; x=" + "y" * 1024,
    ],
    ids=["tab", "form", "long"],
)
async def test_a_batch_names_its_file_in_json_alone(gateway: Gateway, kind: str) -> None:
    """Called a form, its JSON would not be looked at here, and would be by a provider."""
    theirs = await of_the_operator(gateway)
    async with await member(gateway, "eve") as eve:
        body = json.dumps({"input_file_id": theirs, **BATCH})
        status, _ = await post(eve, gateway, "/batches", data=body, headers={"Content-Type": kind})
        assert status == 415
        async with eve.get(f"{gateway.base_url}/files/{theirs}/content") as response:
            assert response.status == 404


async def test_a_chat_may_name_files_of_the_callers_own_account_alone(gateway: Gateway) -> None:
    async with await member(gateway, "eve") as eve, await member(gateway, "vic") as vic:
        _, made = await post(vic, gateway, "/files", **form(part("purpose", "user_data"), FILE))
        content = [{"type": "file", "file": {"file_id": made["id"]}}]
        body = {"model": "openai/mock-gpt", "messages": [{"role": "user", "content": content}]}
        assert (await post(eve, gateway, "/chat/completions", json=body))[0] == 404
        assert (await post(vic, gateway, "/chat/completions", json=body))[0] == 200


async def test_the_output_of_a_batch_that_was_only_listed_is_its_owners(gateway: Gateway) -> None:
    async with await member(gateway, "vic") as vic:
        _, made = await post(vic, gateway, "/files", **form(part("purpose", "batch"), FILE))
        _, batch = await post(vic, gateway, "/batches", json={"input_file_id": made["id"], **BATCH})
        async with aiohttp.ClientSession(headers=CREDENTIAL) as operator:  # with each look it is further
            await operator.get(f"{provider_of(gateway)}/batches/{batch['id']}")
        async with vic.get(f"{gateway.base_url}/batches") as response:
            output = (await response.json())["data"][0]["output_file_id"]
        async with vic.get(f"{gateway.base_url}/files/{output}/content") as response:
            assert response.status == 200


async def test_who_leaves_while_the_provider_answers_owns_what_was_made(database_url: str, redis_url: str) -> None:
    came = asyncio.Event()

    async def late(far: Any) -> None:
        await far.read_body()
        came.set()
        await asyncio.sleep(0.5)
        await far.send(OK)

    async with in_front(database_url, redis_url, late) as (gateway, _far, _client):
        async with await member(gateway, "vic") as vic:
            asking = asyncio.create_task(post(vic, gateway, "/files", **form(FILE)))
            await came.wait()
            asking.cancel()
            async with asyncio.timeout(10):
                while not (rows := await gateway.app[appkeys.POOL].fetch("select id from belongings")):
                    await asyncio.sleep(0.05)
        assert [row["id"] for row in rows] == ["file-1"]


# --- forms that others read differently -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", ["; boundary*=UTF-8''B", "; charset=utf-7", "; x=" + "y" * 1024], ids=["boundary", "charset", "long"]
)
async def test_the_type_of_a_form_is_sent_in_our_words(gateway: Gateway, more: str) -> None:
    async with aiohttp.ClientSession(headers=gateway.headers) as client:
        asked = form(part("model", "openai/mock-gpt"), FILE)
        asked["headers"]["Content-Type"] += more
        assert (await post(client, gateway, "/audio/transcriptions", **asked))[0] == 200
    sent = {name.lower(): value for name, value in gateway.calls[-1].headers.items()}["content-type"]
    assert sent == 'multipart/form-data; boundary="boundary-of-the-test"'


@pytest.mark.parametrize(
    "head",
    [
        DISPOSITION + '"x"; name*0="model"',
        DISPOSITION + "<model>",
        'Content-Disposition : form-data; name="model"\r\n' + DISPOSITION + '"x"',
        DISPOSITION + "\"model\"; filename*=UTF-8''a",
        DISPOSITION + '"image[0][file_id]"',
    ],
    ids=["continued", "brackets", "blank", "file", "file_id"],
)
async def test_a_part_that_another_reader_would_call_otherwise_is_refused(head: str) -> None:
    whole = f'--A\r\n{DISPOSITION}"y"\r\n\r\nallowed\r\n--A\r\n{head}\r\n\r\nforbidden\r\n--A--\r\n'
    with pytest.raises(InvalidRequest):
        Multipart(b"A").feed(whole.encode())


async def test_a_form_has_a_thousand_parts_at_most() -> None:
    """Each costs the loop a hundred times what a file's bytes do."""
    with pytest.raises(InvalidRequest):
        Multipart(b"A").feed(f"--A\r\n{DISPOSITION}a\r\n\r\n\r\n".encode() * 2600)


# --- money and time -------------------------------------------------------------------------------------------------


async def test_the_tokens_of_a_large_input_are_counted_without_a_look_at_each() -> None:
    asked = parse_embedding(b'{"model":"m","input":[' + b",".join([b"1"] * 100_000) + b"]}")
    prompt = prompt_of(asked)
    assert (prompt.tokens, list(prompt.texts)) == (100_000, [])
    nested = parse_embedding(b'{"model":"m","input":[[1,2],[3]]}')
    assert prompt_of(nested).tokens == 3


async def test_best_of_cannot_be_held_to_a_budget(database_url: str, redis_url: str) -> None:
    """It cannot be streamed, so it cannot be ended in the middle."""

    async def one_event(far: Any) -> None:
        await far.read_body()
        event = f"data: {SPENT}\n\ndata: [DONE]\n\n".encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(event)
        await far.send(head + event)

    async with in_front(database_url, redis_url, one_event) as (gateway, far, _client):
        async with await member(gateway, "eve", tokens_per_day=1000) as eve:
            body = {"model": "openai/m", "prompt": "a", "best_of": 20, "max_tokens": 4000}
            status, error = await post(eve, gateway, "/completions", json=body)
            assert (status, error["error"]["param"], far.heads) == (400, "best_of", [])


async def test_a_text_that_is_the_word_usage_hides_none() -> None:
    tail = Tail()
    tail.add(b'{"usage":{"input_tokens":5,"output_tokens":7,"total_tokens":12},"words":[{"word":"usage"}]}')
    assert tail.usage() is not None


# --- the wire -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/files", "/files/{}", "/files/{}/content", "/batches"])
async def test_a_head_is_a_get_without_the_body(gateway: Gateway, path: str) -> None:
    """Else the next answer on its connection would begin with it."""
    async with aiohttp.ClientSession(headers=gateway.headers) as client:
        data = aiohttp.FormData({"purpose": "batch"})
        data.add_field("file", b"{}\n" * 100, filename="a")
        file_id = (await post(client, gateway, "/files", data=data))[1]["id"]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.root_url.rsplit(":", 1)[1]))
    for method in ("HEAD", "HEAD", "GET"):
        head = (
            f"{method} /v1{path.format(file_id)} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n\r\n"
        )
        writer.write(head.encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()


async def test_a_broken_answer_breaks_the_connection_of_a_client_that_knows_no_chunks(
    database_url: str, redis_url: str
) -> None:
    """RFC 9112 6.3: to HTTP/1.0 an orderly end of the connection is the end of the body."""

    async def breaks(far: Far) -> None:
        await far.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        await asyncio.sleep(0.2)
        raise ConnectionResetError

    async with in_front(database_url, redis_url, breaks) as (gateway, _far, _client):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.root_url.rsplit(":", 1)[1]))
        writer.write(
            b"GET /v1/files/file-1/content HTTP/1.0\r\nAuthorization: Bearer %b\r\n\r\n" % gateway.api_key.encode()
        )
        assert (await reader.readuntil(b"half")).startswith(b"HTTP/1.0 200")
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


async def test_a_body_that_trickles_is_the_clients_fault_and_not_the_providers(
    database_url: str, redis_url: str
) -> None:
    async with in_front(database_url, redis_url, answer_all, GATEWAY_MAX_STREAM="1") as (gateway, _far, client):
        slow = [await send_head(gateway, 10_000) for _ in range(8)]  # more than a provider may fail
        trickling = [asyncio.create_task(trickle(writer)) for _, writer in slow]
        async with asyncio.timeout(10):
            assert [(await reader.readline())[:12] for reader, _ in slow] == [b"HTTP/1.1 408"] * 8
        for task in trickling:
            task.cancel()
        assert (await post(client, gateway, "/moderations", json={"input": "x"}))[0] == 200
        assert {row["outcome"] for row in await gateway.rows()} == {"rejected", "ok"}
