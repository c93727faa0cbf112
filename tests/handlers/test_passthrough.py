"""Who is asked for what is passed on by path, who may, and what becomes of it without the stores."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from gateway import appkeys
from tests.support.by_hand import FILE, UPLOAD, error_code, form, part, post
from tests.support.gateway import Gateway, running_gateway
from tests.support.proxy import proxied_postgres, proxied_redis

pytestmark = pytest.mark.integration


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


# --- who is asked -------------------------------------------------------------------------------------------------


CONFIG = """
[aliases]
draw = "openai/mock-gpt"
"""


async def test_an_alias_is_the_providers_own_name_in_json_and_in_a_form(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text(CONFIG)
    async with running_gateway(database_url, redis_url, {"GATEWAY_CONFIG": str(config)}) as gateway:
        async with aiohttp.ClientSession(headers=gateway.headers) as client:
            assert (await post(client, gateway, "/images/generations", json={"model": "draw", "prompt": "a"}))[0] == 200
            assert (await post(client, gateway, "/audio/transcriptions", **form(part("model", "draw"), FILE)))[0] == 200
        assert [call.model for call in gateway.calls] == ["mock-gpt"] * 2
        assert [row["model"] for row in await gateway.rows()] == ["draw"] * 2


@pytest.mark.parametrize("name", ["anthropic", "ollama"])
async def test_a_provider_of_another_shape_is_a_clear_400(gateway: Gateway, name: str) -> None:
    model = {"anthropic": "anthropic/mock-claude", "ollama": "ollama/mock-llama"}[name]
    async with aiohttp.ClientSession(headers=gateway.headers) as client:
        for path, more in (
            ("/images/generations", {"json": {"model": model, "prompt": "a"}}),
            ("/audio/transcriptions", form(part("model", model), FILE)),
            ("/files", {**form(FILE), "headers": {**UPLOAD, "X-Gateway-Provider": name}}),
        ):
            status, answer = await post(client, gateway, path, **more)
            assert (status, error_code(answer)) == (400, "unsupported_endpoint")
            assert f"{name} has no /v1{path}" in answer["error"]["message"]
        status, answer = await post(client, gateway, "/files", headers={"X-Gateway-Provider": "acme"})
        assert (status, error_code(answer)) == (400, "unknown_provider")
    assert gateway.calls == []


async def test_a_key_of_some_models_is_refused_what_it_may_not_use_or_what_cannot_be_told(gateway: Gateway) -> None:
    key = await gateway.new_key(allowed_models=("openai/mock-gpt",))
    good, bad, late = part("model", "openai/mock-gpt"), part("model", "mock-other"), bytes(70_000)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client:
        for path, more in (
            ("/images/generations", {"json": {"prompt": "a"}}),
            ("/images/generations", {"json": {"model": "gpt-image-1", "prompt": "a"}}),
            ("/moderations", {"json": {"input": "a"}}),
            ("/batches", {"json": {"input_file_id": "file-1"}}),
            ("/batches", {"json": {"input_file_id": "file-1", "model": "openai/mock-gpt"}}),
            ("/audio/transcriptions", form(FILE)),
            ("/audio/transcriptions", form(bad, FILE)),
            ("/audio/transcriptions", form(part("file", "x", '; filename="a"').replace(b"x\r\n", late), good)),
        ):
            status, answer = await post(client, gateway, path, **more)
            assert (status, error_code(answer)) in ((403, "model_not_allowed"), (400, "invalid_multipart")), path
        status, answer = await post(client, gateway, "/audio/transcriptions", **form(good, FILE, bad))
        assert (status, error_code(answer)) == (400, "invalid_multipart")
        assert [call for call in gateway.calls if call.finished] == []
        assert (await post(client, gateway, "/audio/transcriptions", **form(good, FILE)))[0] == 200
        assert (await post(client, gateway, "/images/generations", json={"model": "openai/mock-gpt"}))[0] == 200
        assert (await post(client, gateway, "/files", **form(part("purpose", "batch"), FILE)))[0] == 200
        async with client.get(f"{gateway.base_url}/files") as response:
            assert response.status == 200


async def test_what_has_no_price_before_it_is_over_cannot_be_held_to_a_budget(gateway: Gateway) -> None:
    key = await gateway.new_key(tokens_per_day=1_000_000)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client:
        for path in ("/images/generations", "/images/edits", "/audio/speech", "/audio/transcriptions", "/batches"):
            status, answer = await post(client, gateway, path, json={"model": "openai/mock-gpt"})
            assert (status, error_code(answer)) == (403, "price_unknown")
        assert gateway.calls == []
        assert (await post(client, gateway, "/moderations", json={"input": "a"}))[0] == 200
        assert (await post(client, gateway, "/files", **form(part("purpose", "batch"), FILE)))[0] == 200
        async with client.get(f"{gateway.base_url}/batches") as response:
            assert response.status == 200


async def test_tokens_of_an_answer_are_priced_where_a_price_is_known(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text("[prices.openai]\nmock-gpt = { input = 1.0, output = 10.0 }\n")
    async with running_gateway(database_url, redis_url, {"GATEWAY_CONFIG": str(config)}) as gateway:
        async with aiohttp.ClientSession(headers=gateway.headers) as client:
            await post(client, gateway, "/images/generations", json={"model": "openai/mock-gpt", "prompt": "a"})
            asked = {"model": "openai/mock-gpt", "input": "abc", "voice": "alloy"}
            async with client.post(f"{gateway.base_url}/audio/speech", json=asked) as response:
                await response.read()
        image, speech = await gateway.rows()
        assert image["cost_micros"] == image["prompt_tokens"] + 10 * 272
        assert speech["cost_micros"] is None  # nobody said what it used: that is not nothing


async def test_limits_count_what_is_passed_on(gateway: Gateway) -> None:
    key = await gateway.new_key(requests_per_minute=2)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client:
        assert (await post(client, gateway, "/moderations", json={"input": "a"}))[0] == 200
        async with client.get(f"{gateway.base_url}/files") as response:
            assert response.status == 200
            assert response.headers["x-ratelimit-remaining-requests"] == "0"
        status, answer = await post(client, gateway, "/files", **form(FILE))
        assert (status, error_code(answer)) == (429, "rate_limit_exceeded")
    async with aiohttp.ClientSession() as stranger:
        assert (await post(stranger, gateway, "/files", **form(FILE)))[0] == 401


@pytest.mark.parametrize(
    ("kind", "body"),
    [("text/plain", b"{}"), ("application/x-www-form-urlencoded", b"model=a"), ("application/octet-stream", b"a")],
)
async def test_a_body_in_which_no_model_can_be_told_is_a_415(gateway: Gateway, kind: str, body: bytes) -> None:
    async with aiohttp.ClientSession(headers=gateway.headers) as client:
        arguments: Any = {"data": body, "headers": {"Content-Type": kind}}
        assert (await post(client, gateway, "/images/generations", **arguments))[0] == 415
        arguments = {"data": b"{}", "headers": {"Content-Type": "application/json", "Content-Encoding": "gzip"}}
        assert (await post(client, gateway, "/images/generations", **arguments))[0] == 415
    assert gateway.calls == []


async def test_json_that_is_too_large_to_be_read_passes_unless_it_may_name_files(gateway: Gateway) -> None:
    large = {"model": "openai/mock-gpt", "input": "a" * (1 << 20)}
    assert len(orjson.dumps(large)) > 1 << 20
    async with aiohttp.ClientSession(headers=gateway.headers) as client:
        assert (await post(client, gateway, "/moderations", json=large))[0] == 200
        status, answer = await post(client, gateway, "/images/edits", json=large)
        assert (status, error_code(answer)) == (413, "request_too_large")


# --- without the stores -------------------------------------------------------------------------------------------


async def member_key(gateway: Gateway, name: str) -> dict[str, str]:
    """The headers of an account that is no admin's."""
    made = await gateway.app[appkeys.ACCOUNTS].register(f"{name}@example.com", "correct horse", registration="open")
    limits: Any = {"requests_per_minute": 0, "concurrent_requests": 0, "allowed_models": ()}
    return {"Authorization": f"Bearer {(await gateway.app[appkeys.KEYS].create(made.id, name, **limits)).token}"}


async def test_without_postgres_nobody_sees_a_file_and_none_is_made(database_url: str, redis_url: str) -> None:
    async with (
        proxied_postgres(database_url) as (postgres, url),
        running_gateway(url, redis_url) as gateway,
        aiohttp.ClientSession(headers=await member_key(gateway, "ada")) as client,
    ):
        status, file = await post(client, gateway, "/files", **form(part("purpose", "batch"), FILE))
        assert status == 200
        calls = len([call for call in gateway.mock.received if "/files" in call.path])
        await postgres.cut()
        for path in (f"/files/{file['id']}", f"/files/{file['id']}/content", "/batches/batch_1", "/files?after=file-1"):
            async with client.get(f"{gateway.base_url}{path}") as response:
                assert (response.status, error_code(await response.json())) == (503, "database_unavailable")
        status, answer = await post(client, gateway, "/files", **form(part("purpose", "batch"), FILE))
        assert (status, error_code(answer)) == (503, "database_unavailable")
        assert len([call for call in gateway.mock.received if "/files" in call.path]) == calls
        async with client.get(f"{gateway.base_url}/files") as response:
            assert (response.status, "data" in await response.json()) == (503, False)
        assert (await post(client, gateway, "/moderations", json={"input": "a"}))[0] == 200
        await postgres.mend()
        async with client.get(f"{gateway.base_url}/files/{file['id']}") as response:
            assert response.status == 200
        await gateway.rows()


async def test_without_redis_all_is_served(database_url: str, redis_url: str) -> None:
    async with (
        proxied_redis(redis_url) as (redis, url),
        running_gateway(database_url, url) as gateway,
        aiohttp.ClientSession(headers=await member_key(gateway, "ada")) as client,
    ):
        await redis.cut()
        assert (await post(client, gateway, "/files", **form(part("purpose", "batch"), FILE)))[0] == 200
        assert (await post(client, gateway, "/moderations", json={"input": "a"}))[0] == 200
        await redis.mend()
