"""What is refused before anything is sent anywhere, and how."""

import asyncio
import json
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import aiohttp
import pytest

from gateway import appkeys
from tests.support.gateway import MODELS, Gateway, chat_body, running_gateway

pytestmark = pytest.mark.integration

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url, {"GATEWAY_MAX_BODY": "100000"}) as gateway:
        yield gateway


def with_fields(**fields: Any) -> bytes:
    return json.dumps({"model": "openai/mock-gpt", "messages": HELLO, **fields}).encode()


def with_message(message: Any) -> bytes:
    return with_fields(messages=[message])


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"model=gpt-4o",
    "half": b'{"model":"openai/mock-gpt","messages":[{"role":"user"',
    "trailing data": with_fields() + b"{}",
    "array": b"[]",
    "string": b'"hello"',
    "null": b"null",
    "invalid UTF-8": b'{"model":"openai/mock-gpt","messages":[{"role":"user","content":"\xff\xfe"}]}',
    "byte order mark": b"\xef\xbb\xbf" + with_fields(),
    "lone surrogate": b'{"model":"openai/mock-gpt","messages":[{"role":"user","content":"\\ud800"}]}',
    "NaN": b'{"model":"openai/mock-gpt","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
    "Infinity": b'{"model":"openai/mock-gpt","messages":[{"role":"user","content":"x"}],"temperature":Infinity}',
    "5,000 digits": b'{"model":"openai/mock-gpt","messages":[{"role":"user","content":"x"}],"seed":'
    + b"1" * 5000
    + b"}",
    "duplicate key": b'{"model":"openai/mock-gpt","model":"gpt-4o","messages":[{"role":"user","content":"x"}]}',
    "duplicate key behind an escape": b'{"model":"openai/mock-gpt","\\u006dodel":"gpt-4o","messages":[{"role":"user","content":"x"}]}',
    "nested duplicate key": b'{"model":"openai/mock-gpt","messages":[{"role":"user","role":"system","content":"x"}]}',
    "depth": with_fields(metadata=json.loads('{"a":' * 80 + "1" + "}" * 80)),
    "depth beyond any parser": b"[" * 20000,
    "no model": json.dumps({"messages": HELLO}).encode(),
    "model null": with_fields(model=None),
    "model number": with_fields(model=4),
    "model empty": with_fields(model=""),
    "model with NUL": with_fields(model="gpt\u0000"),
    "model with newline": with_fields(model="gpt\n4"),
    "model long": with_fields(model="m" * 300),
    "no messages": b'{"model":"openai/mock-gpt"}',
    "messages empty": with_fields(messages=[]),
    "messages object": with_fields(messages={}),
    "messages string": with_fields(messages="hello"),
    "message string": with_message("hello"),
    "message without role": with_message({"content": "x"}),
    "message role unknown": with_message({"role": "wizard", "content": "x"}),
    "message role list": with_message({"role": ["user"], "content": "x"}),
    "content number": with_message({"role": "user", "content": 1}),
    "content missing": with_message({"role": "user"}),
    "content part string": with_message({"role": "user", "content": ["x"]}),
    "content part untyped": with_message({"role": "user", "content": [{"text": "x"}]}),
    "text part number": with_message({"role": "user", "content": [{"type": "text", "text": 1}]}),
    "image without url": with_message({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
    "tool without id": with_message({"role": "tool", "content": "x"}),
    "tool_calls object": with_message({"role": "assistant", "tool_calls": {}}),
    "tool_call without id": with_message({"role": "assistant", "tool_calls": [{"type": "function"}]}),
    "tool_call arguments object": with_message(
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}],
        }
    ),
    "stream string": with_fields(stream="yes"),
    "stream number": with_fields(stream=1),
    "stream_options string": with_fields(stream=True, stream_options="x"),
    "stream_options without stream": with_fields(stream_options={"include_usage": True}),
    "include_usage string": with_fields(stream=True, stream_options={"include_usage": "yes"}),
    "max_tokens string": with_fields(max_tokens="10"),
    "max_tokens float": with_fields(max_tokens=1.5),
    "max_tokens zero": with_fields(max_tokens=0),
    "max_tokens negative": with_fields(max_tokens=-1),
    "max_tokens bool": with_fields(max_tokens=True),
    "temperature string": with_fields(temperature="hot"),
    "temperature 3": with_fields(temperature=3),
    "top_p 2": with_fields(top_p=2),
    "n 0": with_fields(n=0),
    "n string": with_fields(n="two"),
    "stop number": with_fields(stop=1),
    "stop list of numbers": with_fields(stop=[1]),
    "tools object": with_fields(tools={}),
    "tool string": with_fields(tools=["f"]),
    "tool without name": with_fields(tools=[{"type": "function", "function": {}}]),
    "tool parameters list": with_fields(tools=[{"type": "function", "function": {"name": "f", "parameters": []}}]),
    "tool_choice number": with_fields(tool_choice=1),
    "tool_choice without name": with_fields(tool_choice={"type": "function"}),
    "response_format string": with_fields(response_format="json"),
    "response_format without schema": with_fields(response_format={"type": "json_schema"}),
    "logit_bias list": with_fields(logit_bias=[]),
    "metadata string": with_fields(metadata="x"),
    "parallel_tool_calls string": with_fields(parallel_tool_calls="no"),
    "reasoning_effort number": with_fields(reasoning_effort=3),
}


async def test_malformed_bodies_are_4xx_with_a_clear_message_and_reach_no_provider(gateway: Gateway) -> None:
    async with aiohttp.ClientSession(headers={**gateway.headers, "Content-Type": "application/json"}) as client:
        for name, body in MALFORMED.items():
            async with client.post(f"{gateway.base_url}/chat/completions", data=body) as response:
                assert response.status == 400, (name, response.status, await response.text())
                error = (await response.json())["error"]
                assert set(error) == {"message", "type", "param", "code"}, name
                assert error["type"] == "invalid_request_error", name
                assert len(error["message"]) > 10, name
    assert gateway.calls == []
    assert await gateway.rows() == []


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Content-Type": "text/xml"}, b"<x/>", 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, with_fields(), 415),
        ({"Content-Type": "application/json; charset=utf-16"}, with_fields(), 415),
        ({"Content-Type": "application/json; charset=zzz"}, with_fields(), 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, b"\x1f\x8b\x08\x00", 415),
        ({"Content-Type": "application/json"}, b'{"x":"' + b"a" * 200_000 + b'"}', 413),
        ({"Content-Type": "application/json", "X-User-Id": "u" * 200}, with_fields(), 400),
        ({"Content-Type": "application/json", "X-App-Id": "caf\xe9"}, with_fields(), 400),
    ],
)
async def test_a_request_that_cannot_be_read_is_refused(
    gateway: Gateway, headers: dict[str, str], body: bytes, status: int
) -> None:
    async with (
        aiohttp.ClientSession(headers=gateway.headers) as client,
        client.post(f"{gateway.base_url}/chat/completions", data=body, headers=headers) as response,
    ):
        assert response.status == status
        assert (await response.json())["error"]["type"] == "invalid_request_error"
    assert gateway.calls == []


async def test_a_body_without_a_content_type_is_read_as_json(gateway: Gateway) -> None:
    async with aiohttp.ClientSession(headers=gateway.headers, skip_auto_headers=["Content-Type"]) as client:
        async with client.post(f"{gateway.base_url}/chat/completions", data=with_fields()) as response:
            assert response.status == 200


async def test_a_chunked_body_over_the_limit_is_refused_at_the_limit(gateway: Gateway) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 10_000

    headers = {**gateway.headers, "Content-Type": "application/json"}
    async with aiohttp.ClientSession(headers=headers) as client:
        async with client.post(f"{gateway.base_url}/chat/completions", data=endless()) as response:
            assert response.status == 413


async def test_a_body_that_dribbles_is_cut_by_a_timer(database_url: str, redis_url: str) -> None:
    async with running_gateway(database_url, redis_url, {"GATEWAY_BODY_TIMEOUT": "0.3"}) as gateway:
        port = int(gateway.root_url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n"
            "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{".encode()
        )
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 3)
        writer.close()


async def test_no_key_a_wrong_key_and_a_key_in_the_wrong_place_are_401(gateway: Gateway) -> None:
    wrong = gateway.api_key[:-1] + ("a" if gateway.api_key[-1] != "a" else "b")
    for headers in (
        {},
        {"Authorization": f"Bearer {wrong}"},
        {"Authorization": "Bearer sk-123"},
        {"Cookie": gateway.api_key},
    ):
        async with (
            aiohttp.ClientSession(headers=headers) as client,
            client.post(f"{gateway.base_url}/chat/completions", data=b"{}") as response,
        ):
            assert response.status == 401
            assert (await response.json())["error"]["code"] == "invalid_api_key"


async def test_a_key_is_asked_for_all_below_v1_and_for_nothing_else(gateway: Gateway) -> None:
    """Whatever is there: an encoded slash is none, an encoded letter is that letter."""
    asking = {}
    below = ("/v1", "/v1/", "/v1/no-such", "/v1/chat%2Fcompletions", "/%76%31/models", "/v1/files/f/content")
    for path in (*below, "/v1x", "/v1x/models", "/v1%2Fchat/completions", "/x/v1/models"):
        request = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        asking[path] = int((await answer_to(gateway, request.encode())).split()[1])
    assert asking == {path: 401 if path in below else 404 for path in asking}


async def test_unknown_models_and_models_that_a_key_may_not_use_are_named(gateway: Gateway) -> None:
    key = await gateway.new_key(allowed_models=("openai/mock-gpt*",))
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client:
        for model, status, code in (
            ("openai/mock-gpt", 200, None),
            ("ollama/mock-llama", 403, "model_not_allowed"),
            ("anthropic/mock-claude", 403, "model_not_allowed"),
        ):
            async with client.post(f"{gateway.base_url}/chat/completions", json=chat_body(model)) as response:
                assert response.status == status
                if code:
                    assert (await response.json())["error"]["code"] == code
        await gateway.app[appkeys.CATALOGUE].refresh()
        async with client.get(f"{gateway.base_url}/models") as response:
            assert {model["id"] for model in (await response.json())["data"]} == {"openai/mock-gpt"}


async def test_a_model_that_no_provider_here_can_answer_for_is_a_404(database_url: str, redis_url: str) -> None:
    environ = {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": "", "OLLAMA_BASE_URL": ""}
    async with (
        running_gateway(database_url, redis_url, environ) as gateway,
        aiohttp.ClientSession(headers=gateway.headers) as client,
    ):
        for model in ("gpt-4o", "no-such-model", "openai/gpt-4o"):
            async with client.post(f"{gateway.base_url}/chat/completions", json=chat_body(model)) as response:
                assert response.status == 404
                error = (await response.json())["error"]
                assert (error["code"], error["param"]) == ("model_not_found", "model")
                assert model in error["message"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
async def test_other_methods_are_405_and_name_what_is_allowed(gateway: Gateway, method: str) -> None:
    async with (
        aiohttp.ClientSession(headers=gateway.headers) as client,
        client.request(method, f"{gateway.base_url}/chat/completions") as response,
    ):
        assert response.status == 405
        assert response.headers["Allow"] == "POST"


async def answer_to(gateway: Gateway, request: bytes) -> bytes:
    port = int(gateway.root_url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    received = b""
    try:
        async with asyncio.timeout(3):
            while data := await reader.read(1 << 16):
                received += data
    except (TimeoutError, ConnectionError):
        pass
    writer.close()
    return received


PROMPT = b'{"model":"m","messages":[{"role":"user","content":"CANARY prompt"}]}'


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + PROMPT + b"\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer CANARY\x00\r\nContent-Length: 0\r\n\r\n",
        b"GET /CANARY\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CANARY / HTTP/1.1\r\nHost x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: CANARY\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    ],
)
async def test_what_is_no_http_gets_an_error_object_that_quotes_nothing(
    gateway: Gateway, request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    received = await answer_to(gateway, request_bytes)
    status, _, rest = received.partition(b"\r\n")
    assert status.split()[1] in (b"400", b"401"), received
    assert b"CANARY" not in received
    assert "CANARY" not in caplog.text
    head, _, body = rest.partition(b"\r\n\r\n")
    assert b"X-Request-Id: " in head
    assert json.loads(body)["error"]["type"] in ("invalid_request_error", "authentication_error")
    assert gateway.calls == []


async def test_a_body_is_asked_for_only_after_key_and_size_were_looked_at(gateway: Gateway) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: %s\r\nContent-Type: application/json\r\n"
    key = b"Authorization: Bearer " + gateway.api_key.encode() + b"\r\n"
    size = b"Content-Length: %d\r\n\r\n"
    no_key = await answer_to(gateway, head % b"100-continue" + size % 10)
    assert no_key.startswith(b"HTTP/1.1 401 ")
    too_large = await answer_to(gateway, head % b"100-continue" + key + size % 99_000_000)
    assert too_large.startswith(b"HTTP/1.1 413 ")
    unknown = await answer_to(gateway, head % b"banana" + key + size % 10)
    assert unknown.startswith(b"HTTP/1.1 417 ")
    assert b'"expectation_failed"' in unknown
    body = with_fields()
    asked = await answer_to(gateway, head % b"100-continue" + key + b"Connection: close\r\n" + size % len(body) + body)
    assert asked.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


async def test_a_body_of_nothing_but_brackets_is_refused_at_once(database_url: str, redis_url: str) -> None:
    async with running_gateway(database_url, redis_url) as gateway:
        body = b'{"model":"m","x":[' + b"[]," * 3_000_000 + b"[]]}"
        started = monotonic()
        async with aiohttp.ClientSession(headers={**gateway.headers, "Content-Type": "application/json"}) as client:
            async with client.post(f"{gateway.base_url}/chat/completions", data=body) as response:
                assert response.status == 400
                assert "brackets" in (await response.json())["error"]["message"]
        assert monotonic() - started < 2


async def test_a_large_body_does_not_hold_up_the_loop(database_url: str, redis_url: str) -> None:
    messages = [{"role": "user", "content": f"number {number}"} for number in range(60_000)]
    # A model that no provider has: nothing but the gateway's own reading is measured.
    body = json.dumps({"model": "openai/gpt-none", "messages": messages}).encode()
    async with running_gateway(database_url, redis_url, {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}) as gateway:
        headers = {**gateway.headers, "Content-Type": "application/json"}
        async with aiohttp.ClientSession(headers=headers) as client:
            longest, done = 0.0, False

            async def tick() -> None:
                nonlocal longest
                while not done:
                    before = monotonic()
                    await asyncio.sleep(0.005)
                    longest = max(longest, monotonic() - before)

            ticking = asyncio.create_task(tick())
            async with client.post(f"{gateway.base_url}/chat/completions", data=body) as response:
                assert response.status == 502
            done = True
            await ticking
    assert longest < 0.5


async def test_refused_bodies_count_against_the_limit(gateway: Gateway) -> None:
    key = await gateway.new_key(requests_per_minute=3)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(headers=headers) as client:
        statuses = []
        for _ in range(5):
            async with client.post(f"{gateway.base_url}/chat/completions", data=b"{") as response:
                statuses.append(response.status)
    assert statuses == [400, 400, 400, 429, 429]


async def test_http_0_9_and_unknown_versions_are_not_served(gateway: Gateway) -> None:
    port = int(gateway.root_url.rsplit(":", 1)[1])
    for request in (b"GET /health\r\n\r\n", b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(200), 3)
        assert b" 200 " not in answer.split(b"\r\n", 1)[0]
        writer.close()


# --- limits -------------------------------------------------------------------------------------------------------


async def test_at_the_limit_exactly_the_limit_passes_on_two_gateways_at_four_times_the_load(
    database_url: str, redis_url: str
) -> None:
    async with (
        running_gateway(database_url, redis_url) as one,
        running_second_gateway(database_url, redis_url, one) as other,
    ):
        key = await one.new_key(requests_per_minute=25)
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client:

            async def call(base_url: str) -> tuple[int, str | None]:
                async with client.post(f"{base_url}/chat/completions", json=chat_body(MODELS["openai"])) as response:
                    await response.read()
                    return response.status, response.headers.get("Retry-After")

            answers = await asyncio.gather(*(call(gateway.base_url) for gateway in [one, other] * 50))
        assert sorted({status for status, _ in answers}) == [200, 429]
        assert sum(status == 200 for status, _ in answers) == 25
        assert all(1 <= int(after or 0) <= 60 for status, after in answers if status == 429)


def running_second_gateway(database_url: str, redis_url: str, first: Gateway) -> Any:
    return running_gateway(database_url, redis_url, account=first.account_id)


async def test_concurrent_requests_are_limited_until_a_stream_has_ended(gateway: Gateway) -> None:
    key = await gateway.new_key(concurrent_requests=2)
    url = f"{gateway.base_url}/chat/completions"
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client:
        body = chat_body("openai/mock-gpt?case=long&pace_ms=10", stream=True)
        first = await client.post(url, json=body)
        second = await client.post(url, json=body)
        async with client.post(url, json=body) as third:
            assert third.status == 429
            assert third.headers["Retry-After"] == "1"
            assert "in flight" in (await third.json())["error"]["message"]
        first.close()
        async with asyncio.timeout(2):
            while True:
                async with client.post(url, json=chat_body(MODELS["openai"])) as again:
                    if again.status == 200:
                        break
        second.close()


async def test_limits_are_told_in_the_headers_of_every_answer(gateway: Gateway) -> None:
    key = await gateway.new_key(requests_per_minute=3)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client:
        for remaining in ("2", "1", "0"):
            async with client.post(
                f"{gateway.base_url}/chat/completions", json=chat_body(MODELS["openai"])
            ) as response:
                assert response.status == 200
                assert response.headers["x-ratelimit-limit-requests"] == "3"
                assert response.headers["x-ratelimit-remaining-requests"] == remaining
                assert response.headers["x-ratelimit-reset-requests"].endswith("s")


async def test_a_key_that_its_bucket_refused_is_told_how_much_it_holds_and_when_it_is_full(gateway: Gateway) -> None:
    key = await gateway.new_key(requests_per_second=0.1, burst=2)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client:
        for status in (200, 200, 429):
            async with client.post(
                f"{gateway.base_url}/chat/completions", json=chat_body(MODELS["openai"])
            ) as response:
                assert response.status == status
        assert response.headers["x-ratelimit-limit-requests"] == "2"
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        assert 10 < float(response.headers["x-ratelimit-reset-requests"].rstrip("s")) <= 20


async def test_the_global_limit_counts_all_keys(database_url: str, redis_url: str) -> None:
    async with running_gateway(database_url, redis_url, {"GATEWAY_GLOBAL_REQUESTS_PER_MINUTE": "5"}) as gateway:
        statuses = []
        for key in [await gateway.new_key() for _ in range(2)] * 4:
            async with (
                aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client,
                client.post(f"{gateway.base_url}/chat/completions", json=chat_body(MODELS["openai"])) as response,
            ):
                statuses.append(response.status)
        assert statuses == [200] * 5 + [429] * 3


async def test_listing_models_costs_nothing_of_the_limit(gateway: Gateway) -> None:
    key = await gateway.new_key(requests_per_minute=1)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client:
        for _ in range(5):
            async with client.get(f"{gateway.base_url}/models") as response:
                assert response.status == 200


# --- models -------------------------------------------------------------------------------------------------------


async def test_models_are_merged_over_providers_and_aliases_are_listed(
    database_url: str, redis_url: str, tmp_path: Any
) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text('[aliases]\nfast = "openai/mock-gpt"\n')
    async with (
        running_gateway(database_url, redis_url, {"GATEWAY_CONFIG": str(config)}) as gateway,
        aiohttp.ClientSession(headers=gateway.headers) as client,
    ):
        await gateway.app[appkeys.CATALOGUE].refresh()
        async with client.get(f"{gateway.base_url}/models") as response:
            listed = await response.json()
        # A name that leads to its provider by itself is listed as it is.
        expected = {"fast", "openai/mock-gpt", "anthropic/mock-claude", "mock-llama"}
        assert expected == {model["id"] for model in listed["data"]}
        assert all(model["object"] == "model" and model["owned_by"] for model in listed["data"])
        async with client.get(f"{gateway.base_url}/models/openai/mock-gpt") as response:
            assert (await response.json())["id"] == "openai/mock-gpt"
        async with client.get(f"{gateway.base_url}/models/nothing") as response:
            assert response.status == 404
        async with client.post(f"{gateway.base_url}/chat/completions", json=chat_body("fast")) as response:
            assert response.status == 200
            assert response.headers["X-Gateway-Model"] == "mock-gpt"
        assert json.loads(gateway.calls[-1].body)["model"] == "mock-gpt"


async def test_a_body_that_is_too_large_ends_its_connection_also_when_it_came_with_the_head(
    database_url: str, redis_url: str
) -> None:
    async with running_gateway(database_url, redis_url, {"GATEWAY_MAX_BODY": "100"}) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.root_url.rsplit(":", 1)[1]))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 101\r\n\r\n".encode() + b" " * 101)
        async with asyncio.timeout(20):
            answer = await reader.read()  # to the end of the connection
        writer.close()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nConnection: close\r\n" in answer
