"""What is passed on by path: what gets out to a provider and back, and what never does."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
import pytest

from tests.support.by_hand import FILE, Far, answer_all, form, in_front, post, the_row

pytestmark = pytest.mark.integration

Start = Callable[..., Any]


@pytest.fixture
def start(database_url: str, redis_url: str) -> Start:
    """A gateway in front of a provider by hand, and a client of it."""
    return partial(in_front, database_url, redis_url)


# --- what gets out, and what does not -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "GET /v1/files/..%2f..", "GET /v1/files/../models", "GET /v1/files//x", "GET /v1/files/%2e%2e/content",
        "POST /v1/images/%2e%2e/chat/completions", "POST /v1/images/../chat/completions", "GET /v1/files/a%00b",
        "GET /v1/files/a%0d%0aX:y", "GET /v1/files/a/b/content", "GET /v1/files/a%2fcontent", "GET /v1/files/", "PUT /v1/files/x",
        "POST /v1/images/other", "GET /v1/batches/../files", "GET /v1/files/a%3fb", "GET /v1/files/a;b", "GET /v1/files/ä",
        "POST /v1//files", "DELETE /v1/batches/x", "GET /v1/files/x/content/",
    ],
)  # fmt: skip
async def test_a_hostile_path_never_reaches_the_provider(start: Start, target: str) -> None:
    async with start(answer_all) as (gateway, far, _client):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.root_url.rsplit(":", 1)[1]))
        head = f"{target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        status = int((await asyncio.wait_for(reader.read(), 5)).split(b" ")[1])
        writer.close()
        assert status in (400, 404, 405)
        assert far.heads == []


@pytest.mark.parametrize("query", ["?a=\x7f", "?a=b\xa0", "?a=%0d%0aX:y", "?a=%00"])
async def test_a_query_that_could_be_more_is_refused(start: Start, query: str) -> None:
    async with start(answer_all) as (gateway, far, _client):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.root_url.rsplit(":", 1)[1]))
        head = f"GET /v1/files{query} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n\r\n"
        writer.write(head.encode("latin-1"))
        assert b" 400 " in await reader.readline()
        writer.close()
        assert far.heads == []


async def test_these_headers_get_out_and_no_others(start: Start) -> None:
    async with start(answer_all) as (gateway, far, client):
        given = form(FILE)
        given["headers"] |= {
            "Accept": "audio/*", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "Cookie": "a=b",
            "OpenAI-Organization": "org-of-somebody", "X-Forwarded-For": "1.2.3.4", "Range": "bytes=0-1",
        }  # fmt: skip
        assert (await post(client, gateway, "/files?a=b%20c", **given))[0] == 200
    first, *lines = far.heads[0].decode().strip().split("\r\n")
    fields = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines}
    assert first == "POST /v1/files?a=b%20c HTTP/1.1"
    assert fields.keys() == {
        "Host", "User-Agent", "Accept-Encoding", "Authorization", "Content-Type", "Accept", "Content-Length", "X-Request-Id",
        "traceparent",
    }  # fmt: skip
    assert (fields["Accept"], fields["Authorization"]) == ("audio/*", "Bearer sk-operator-openai")


@pytest.mark.parametrize(
    ("status", "words", "told"),
    [
        (401, "Incorrect API key provided: sk-operator-openai", (502, "provider_auth")),
        (403, "no", (502, "provider_auth")),
        (400, "what is sk-operator-openai", (400, "bad")),
        (404, "nothing here", (404, "bad")),
        (500, "sk-operator-openai failed", (502, "bad")),
    ],
)
async def test_a_refusal_is_told_without_the_operators_key(
    start: Start, status: int, words: str, told: tuple[int, str]
) -> None:
    async def refuses(far: Far) -> None:
        await far.read_body()
        body = orjson.dumps({"error": {"message": words, "type": "t", "param": None, "code": "bad"}})
        head = (
            f"HTTP/1.1 {status} No\r\nContent-Type: application/json\r\nSet-Cookie: a=b\r\nContent-Length: {len(body)}"
        )
        await far.send(head.encode() + b"\r\n\r\n" + body)

    async with start(refuses) as (gateway, _far, client):
        async with client.post(f"{gateway.base_url}/moderations", json={"input": "x"}) as response:
            answer = await response.text()
            assert (response.status, orjson.loads(answer)["error"]["code"]) == told
            assert "Set-Cookie" not in response.headers
        assert "sk-operator" not in answer
        assert (await the_row(gateway))["status"] == told[0]
