"""The official Python SDK's files, batches, images, audio and moderations, which are passed on by path."""

from collections.abc import AsyncIterator
from hashlib import sha256
from io import BytesIO
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from gateway import appkeys
from gateway.mock.openai_files import PATTERN
from tests.support.gateway import Gateway, running_gateway

pytestmark = pytest.mark.integration

CONTENT = b'{"custom_id":"1","method":"POST","url":"/v1/chat/completions","body":{}}\n'


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


async def member(gateway: Gateway, name: str, **limits: Any) -> AsyncOpenAI:
    """A client of an account of its own."""
    made = await gateway.app[appkeys.ACCOUNTS].register(f"{name}@example.com", "correct horse", registration="open")
    unlimited: Any = {"requests_per_minute": 0, "concurrent_requests": 0, "allowed_models": ()}
    key = await gateway.app[appkeys.KEYS].create(made.id, name, **{**unlimited, **limits})
    return AsyncOpenAI(base_url=gateway.base_url, api_key=key.token, max_retries=0)


@pytest.fixture
async def ada(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with await member(gateway, "ada") as client:
        yield client


@pytest.fixture
async def bob(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with await member(gateway, "bob") as client:
        yield client


# --- files --------------------------------------------------------------------------------------------------------


async def test_a_file_is_uploaded_listed_shown_read_and_deleted(gateway: Gateway, ada: AsyncOpenAI) -> None:
    made = await ada.files.create(file=("batch.jsonl", CONTENT), purpose="batch")
    assert (made.bytes, made.filename, made.purpose) == (len(CONTENT), "batch.jsonl", "batch")
    assert [file.id async for file in ada.files.list()] == [made.id]
    assert await ada.files.retrieve(made.id) == made
    content = await ada.files.content(made.id)
    assert content.content == CONTENT
    assert content.response.headers["Content-Disposition"] == 'attachment; filename="content"'
    assert (await ada.files.delete(made.id)).deleted
    assert [file.id async for file in ada.files.list()] == []
    with pytest.raises(openai.NotFoundError, match=f"No such File object: {made.id}"):
        await ada.files.retrieve(made.id)
    rows = await gateway.rows()
    assert len(rows) == 6  # the last was not asked of the provider
    assert {(row["provider"], row["model"], row["outcome"], row["status"]) for row in rows} == {
        ("openai", "", "ok", 200)
    }
    assert {(row["prompt_tokens"], row["completion_tokens"], row["cost_micros"]) for row in rows} == {(0, 0, None)}


async def test_a_large_file_arrives_as_it_was_sent(gateway: Gateway, ada: AsyncOpenAI) -> None:
    data = PATTERN * 80 + b"end"
    made: Any = await ada.files.create(file=("large.bin", BytesIO(data)), purpose="user_data")
    assert (made.bytes, made.sha256) == (len(data), sha256(data).hexdigest())
    assert (await ada.files.content(made.id)).content == (PATTERN * 81)[: len(data)]


# --- batches ------------------------------------------------------------------------------------------------------


async def test_a_batch_is_made_followed_and_its_output_read(gateway: Gateway, ada: AsyncOpenAI) -> None:
    file = await ada.files.create(file=("batch.jsonl", CONTENT), purpose="batch")
    made = await ada.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
    )
    assert made.status == "validating"
    done = await ada.batches.retrieve(made.id)
    assert (done.status, done.input_file_id) == ("completed", file.id)
    assert done.output_file_id is not None
    assert b"custom_id" in (await ada.files.content(done.output_file_id)).content
    assert [batch.id async for batch in ada.batches.list()] == [made.id]
    assert (await ada.batches.cancel(made.id)).status == "cancelling"
    assert sum(row["prompt_tokens"] for row in await gateway.rows()) == 0  # what it used is none of these requests'


# --- images, audio, moderations -----------------------------------------------------------------------------------


async def test_an_image_is_generated_and_its_tokens_are_counted(gateway: Gateway, ada: AsyncOpenAI) -> None:
    for quality in ("low", "high"):  # a high one is more than anybody holds
        made: Any = await ada.images.generate(model="openai/mock-gpt", prompt="a fox", quality=quality)
        assert made.data[0].b64_json.startswith("AAECAwQF")
        assert made.usage.output_tokens == 272
    rows = await gateway.rows()
    assert [(row["model"], row["upstream_model"], row["completion_tokens"], row["stream"]) for row in rows] == [
        ("openai/mock-gpt", "mock-gpt", 272, False)
    ] * 2
    assert {row["usage_source"] for row in rows} == {"provider"}
    assert all(row["prompt_tokens"] > 0 for row in rows)


async def test_a_streamed_image_comes_as_events(gateway: Gateway, ada: AsyncOpenAI) -> None:
    stream: Any = await ada.images.generate(model="openai/mock-gpt", prompt="a fox", stream=True, partial_images=1)
    kinds = [event.type async for event in stream]
    assert kinds == ["image_generation.partial_image", "image_generation.completed"]
    [row] = await gateway.rows()
    assert (row["stream"], row["completion_tokens"]) == (True, 272)


async def test_an_image_is_edited_in_a_form_whose_model_is_the_providers_own(
    gateway: Gateway, ada: AsyncOpenAI
) -> None:
    picture = PATTERN * 3
    made: Any = await ada.images.edit(model="openai/mock-gpt", image=("a.png", picture), prompt="blue")
    assert made.data[0].seen == [{"bytes": len(picture), "sha256": sha256(picture).hexdigest()}]
    assert gateway.calls[-1].model == "mock-gpt"
    assert (await gateway.rows())[0]["model"] == "openai/mock-gpt"


async def test_speech_is_streamed(gateway: Gateway, ada: AsyncOpenAI) -> None:
    asked: Any = {"model": "openai/mock-gpt?pace_ms=1", "voice": "alloy", "input": "one two"}
    async with ada.audio.speech.with_streaming_response.create(**asked) as response:
        pieces = [piece async for piece in response.iter_bytes()]
    assert b"".join(pieces) == PATTERN[:1024] * 7
    assert response.headers["Content-Type"] == "audio/mpeg"
    assert response.headers["openai-processing-ms"] == "7"
    assert response.headers["X-Upstream-Request-Id"] == "req_mock_passed"
    assert "Set-Cookie" not in response.headers
    assert "openai-organization" not in response.headers
    [row] = await gateway.rows()
    assert (row["outcome"], row["cost_micros"]) == ("ok", None)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
async def test_speech_is_transcribed_and_translated(gateway: Gateway, ada: AsyncOpenAI) -> None:
    sound = PATTERN * 5
    heard = f"{len(sound)} bytes, {sha256(sound).hexdigest()}"
    made = await ada.audio.transcriptions.create(model="openai/mock-gpt", file=("a.mp3", sound))
    assert made.text == heard
    text = await ada.audio.transcriptions.create(model="openai/mock-gpt", file=("a.mp3", sound), response_format="text")
    assert text == f"{heard}\n"
    stream: Any = await ada.audio.transcriptions.create(model="openai/mock-gpt", file=("a.mp3", sound), stream=True)
    assert [event.type async for event in stream] == ["transcript.text.delta", "transcript.text.done"]
    assert (await ada.audio.translations.create(model="openai/mock-gpt", file=("a.mp3", sound))).text == heard
    rows = await gateway.rows()
    assert [row["completion_tokens"] for row in rows] == [5, 0, 5, 5]
    assert [row["usage_source"] for row in rows] == ["provider", "estimated", "provider", "provider"]


async def test_moderations_need_no_model(gateway: Gateway, ada: AsyncOpenAI) -> None:
    made = await ada.moderations.create(input=["I will kill them", "hello"])
    assert [row.flagged for row in made.results] == [True, False]
    named = await ada.moderations.create(model="omni-moderation-latest", input="hello")
    assert named.model == "omni-moderation-latest"
    assert [row["model"] for row in await gateway.rows()] == ["", "omni-moderation-latest"]


# --- whose they are -----------------------------------------------------------------------------------------------


async def test_an_account_does_not_know_of_the_files_of_another(
    gateway: Gateway, ada: AsyncOpenAI, bob: AsyncOpenAI
) -> None:
    hers = await ada.files.create(file=("a.jsonl", CONTENT), purpose="batch")
    his = await bob.files.create(file=("b.jsonl", CONTENT), purpose="batch")
    calls = len(gateway.mock.received)
    for ask in (bob.files.retrieve, bob.files.content, bob.files.delete):
        with pytest.raises(openai.NotFoundError) as refused:
            await ask(hers.id)
        with pytest.raises(openai.NotFoundError) as unknown:
            await ask("file-nowhere")
        assert str(refused.value) == str(unknown.value).replace("file-nowhere", hers.id)
    with pytest.raises(openai.NotFoundError, match="No such File object"):
        await bob.batches.create(input_file_id=hers.id, endpoint="/v1/embeddings", completion_window="24h")
    with pytest.raises(openai.NotFoundError, match="No such File object"):
        await bob.files.list(after=hers.id)
    body = {"images": [{"file_id": hers.id}], "prompt": "x", "model": "openai/mock-gpt"}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {bob.api_key}"}) as client:
        async with client.post(f"{gateway.base_url}/images/edits", json=body) as response:
            assert response.status == 404
    assert len(gateway.mock.received) == calls
    assert [file.id async for file in bob.files.list()] == [his.id]
    assert (await ada.files.retrieve(hers.id)).id == hers.id


async def test_an_account_does_not_know_of_the_batches_of_another(
    gateway: Gateway, ada: AsyncOpenAI, bob: AsyncOpenAI
) -> None:
    file = await ada.files.create(file=("a.jsonl", CONTENT), purpose="batch")
    hers = await ada.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    output = (await ada.batches.retrieve(hers.id)).output_file_id
    assert output is not None
    for ask in (bob.batches.retrieve, bob.batches.cancel):
        with pytest.raises(openai.NotFoundError, match="No batch found with id"):
            await ask(hers.id)
    with pytest.raises(openai.NotFoundError):
        await bob.files.content(output)
    assert [batch.id async for batch in bob.batches.list()] == []
    assert (await ada.files.content(output)).content


async def test_an_admin_sees_the_files_of_all(gateway: Gateway, ada: AsyncOpenAI, bob: AsyncOpenAI) -> None:
    made = [await client.files.create(file=("a", CONTENT), purpose="batch") for client in (ada, bob)]
    async with AsyncOpenAI(base_url=gateway.base_url, api_key=gateway.api_key, max_retries=0) as admin:
        assert [file.id async for file in admin.files.list()] == [file.id for file in made[::-1]]
        assert (await admin.files.retrieve(made[0].id)).id == made[0].id
        assert (await admin.files.delete(made[0].id)).deleted
    with pytest.raises(openai.NotFoundError):
        await ada.files.retrieve(made[0].id)
    assert (await bob.files.retrieve(made[1].id)).id == made[1].id


async def test_a_list_is_ones_own_page_after_page(gateway: Gateway, ada: AsyncOpenAI, bob: AsyncOpenAI) -> None:
    hers = []
    for number in range(7):
        hers.append((await ada.files.create(file=("a", CONTENT), purpose="batch")).id)
        for _ in range(number):
            await bob.files.create(file=("b", CONTENT), purpose="batch")
    page = await ada.files.list(limit=3)
    assert ([file.id for file in page.data], page.has_more) == (hers[:3:-1], True)
    assert [file.id async for file in ada.files.list(limit=3)] == hers[::-1]
    assert [file.id async for file in ada.files.list(limit=2, order="asc")] == hers
    page = await ada.files.list(limit=7)
    assert (len(page.data), page.has_more) == (7, False)
    assert [file.id async for file in ada.files.list(purpose="vision")] == []


async def test_a_list_has_one_to_ten_thousand_objects(ada: AsyncOpenAI) -> None:
    for limit in ("0", "x", "10001", "-1"):
        with pytest.raises(openai.BadRequestError, match="limit: an integer from 1 to 10000 is required"):
            await ada.files.list(extra_query={"limit": limit})


async def test_who_brings_a_credential_is_in_an_account_of_theirs(gateway: Gateway, ada: AsyncOpenAI) -> None:
    made = await ada.files.create(file=("a", CONTENT), purpose="batch")
    own = {"X-API-Key": str((await member(gateway, "eve")).api_key), "Authorization": "Bearer sk-eve-0001"}
    async with aiohttp.ClientSession(headers=own) as client:
        async with client.get(f"{gateway.base_url}/files/{made.id}") as response:
            assert response.status == 200
    assert gateway.mock.received[-1].headers["authorization"] == "Bearer sk-eve-0001"
    assert await gateway.app[appkeys.POOL].fetchval("select count(*) from belongings") == 1
