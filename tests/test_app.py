"""What is opened is closed, also when a start fails half-way; and which providers a set of settings gives."""

import asyncio
import gc
from typing import Any, NoReturn

import aiohttp
import asyncpg
import pytest
from aiohttp import web

from gateway import app as application
from gateway import appkeys, databases
from gateway.app import make_app
from gateway.mock import Mock
from gateway.protocol.errors import Unavailable
from gateway.serve import make_runner
from gateway.settings import SettingsError, load_settings
from gateway.stores.passwords import HashingPool
from gateway.upstream import Upstream
from tests.support.gateway import Gateway, chat_body, running_gateway

pytestmark = pytest.mark.integration


class Boom(Exception):
    pass


def boom(*arguments: Any, **keywords: Any) -> NoReturn:
    raise Boom


async def fails_to_start(database_url: str, redis_url: str) -> None:
    environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_MOCK": "on"}
    runner = make_runner(make_app(load_settings(environ), environ))
    with pytest.raises(Boom):
        await runner.setup()
    await runner.cleanup()


async def connections(database_url: str) -> int:
    connection = await asyncpg.connect(database_url)
    try:
        query = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        return int(await connection.fetchval(query))
    finally:
        await connection.close()


async def test_a_start_that_fails_at_the_stores_leaves_no_connection(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, "load_pepper", boom)
    await fails_to_start(database_url, redis_url)
    async with asyncio.timeout(5):  # Postgres notices within a moment
        while await connections(database_url):
            await asyncio.sleep(0.02)


async def test_a_start_that_fails_at_the_providers_closes_the_mock_and_the_client(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    class WatchedMock(Mock):
        async def stop(self) -> None:
            await super().stop()
            ended.append("mock")

    class WatchedUpstream(Upstream):
        async def close(self) -> None:
            await super().close()
            ended.append("upstream")

    monkeypatch.setattr("gateway.mock.Mock", WatchedMock)
    monkeypatch.setattr(application, "Upstream", WatchedUpstream)
    monkeypatch.setattr(application, "Catalogue", boom)
    await fails_to_start(database_url, redis_url)
    assert ended == ["upstream", "mock"]


async def test_keys_and_passwords_are_hashed_apart_and_both_pools_are_closed(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While passwords are guessed, keys are still verified."""
    made: list[HashingPool] = []
    closed: list[HashingPool] = []

    class Watched(HashingPool):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

        def close(self) -> None:
            super().close()
            closed.append(self)

    monkeypatch.setattr(application, "HashingPool", Watched)
    async with running_gateway(database_url, redis_url) as gateway:
        used = gateway.app[appkeys.KEYS]._hashing, gateway.app[appkeys.ACCOUNTS]._hashing
        assert used[0] is not used[1]
    assert set(used) == set(made) == set(closed)


async def test_memory_is_settled_only_for_a_process_that_serves_and_before_its_tasks(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = gc.get_freeze_count()
    async with running_gateway(database_url, redis_url):
        assert gc.get_freeze_count() == frozen
    environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_MOCK": "off"}
    app = make_app(load_settings(environ), environ, settle=True)
    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(
        application, "_settle_memory", lambda: seen.append((appkeys.CATALOGUE in app, appkeys.PULSE in app))
    )
    runner = make_runner(app)
    await runner.setup()
    await runner.cleanup()
    assert seen == [(True, False)]


# --- providers ----------------------------------------------------------------------------------------------------


def made(**environ: str) -> web.Application:
    return make_app(load_settings(environ), environ)


def test_a_default_provider_that_does_not_exist_stops_the_start() -> None:
    with pytest.raises(SettingsError, match=r"^GATEWAY_DEFAULT_PROVIDER: .*openai, anthropic, ollama"):
        made(GATEWAY_DEFAULT_PROVIDER="nosuch")
    made(GATEWAY_DEFAULT_PROVIDER="anthropic")
    made(GATEWAY_DEFAULT_PROVIDER="mock-openai")
    with pytest.raises(SettingsError, match="GATEWAY_DEFAULT_PROVIDER"):
        made(GATEWAY_DEFAULT_PROVIDER="mock-openai", GATEWAY_MOCK="off")


async def ask(gateway: Gateway, model: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession(headers=gateway.headers) as client,
        client.post(f"{gateway.base_url}/chat/completions", json=chat_body(model)) as response,
    ):
        body = await response.json()
        return response.status, body.get("error", {}).get("code", "")


async def test_an_ollama_that_is_looked_for_is_used_while_it_answers(database_url: str, redis_url: str) -> None:
    ollama = Mock()
    environ = {"OLLAMA_BASE_URL": "", "GATEWAY_OLLAMA_PROBE": await ollama.start()}
    try:
        async with running_gateway(database_url, redis_url, environ) as gateway:
            async with asyncio.timeout(5):
                while not gateway.app[appkeys.CATALOGUE].reachable.get("ollama"):
                    await asyncio.sleep(0.01)
            await gateway.app[appkeys.CATALOGUE].refresh()
            assert (await ask(gateway, "mock-llama"))[0] == 200
            await ollama.stop()
            await gateway.app[appkeys.CATALOGUE].refresh()
            assert await ask(gateway, "mistyped") == (404, "model_not_found")
    finally:
        await ollama.stop()


async def test_an_ollama_that_was_given_is_used_whether_it_answers_or_not(database_url: str, redis_url: str) -> None:
    async with running_gateway(database_url, redis_url, {"OLLAMA_BASE_URL": "http://127.0.0.1:9"}) as gateway:
        await gateway.app[appkeys.CATALOGUE].refresh()
        assert await ask(gateway, "llama3.2") == (502, "upstream_unreachable")


async def test_a_start_waits_for_a_postgres_that_goes_away_in_the_middle_of_it(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[Exception] = [
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.AdminShutdownError("terminating connection due to administrator command"),
        Unavailable("the database cannot be reached"),
    ]

    async def migrate(url: str) -> None:
        if faults:
            raise faults.pop()

    monkeypatch.setattr(databases, "migrate", migrate)
    pool = await databases.connect_database(database_url)
    assert not faults
    assert await pool.fetchval("select 1") == 1
    await pool.close()


async def test_a_background_task_that_fails_is_said_counted_and_begun_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateway.app.BEGIN_ANEW", 0.0)
    begun: list[None] = []

    async def work() -> None:
        begun.append(None)
        if len(begun) < 3:
            raise ValueError("a bug")

    counted: list[None] = []
    await application._forever("counting", work, lambda: counted.append(None))
    assert (len(begun), len(counted)) == (3, 2)
    assert "background task failed: counting" in caplog.text


async def test_a_task_that_loses_a_cancellation_is_cancelled_again() -> None:
    """As asyncio.wait_for makes it do before Python 3.12, in the moment in which what it waits for is done."""
    lost: list[None] = []

    async def work() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if lost:
                    raise
                lost.append(None)

    tasks = [asyncio.create_task(work()), asyncio.create_task(asyncio.sleep(60))]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await application._end(tasks)
    assert lost == [None]
    assert all(task.cancelled() for task in tasks)
