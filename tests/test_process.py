"""`gateway serve` as a process of its own: start, memory, SIGTERM."""

import asyncio
import fcntl
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import aiohttp
import asyncpg
import pytest

from gateway.stores import migrations
from tests.support.gateway import chat_body
from tests.support.process import Served, new_key, serving

pytestmark = pytest.mark.integration


async def test_sigterm_lets_open_streams_finish_flushes_usage_and_exits_0(database_url: str, redis_url: str) -> None:
    environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_DRAIN_DELAY": "0.5"}
    async with serving(environ) as served:
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        async with aiohttp.ClientSession(headers=headers) as client:
            body = chat_body("mock-gpt?pace_ms=50&tokens=50", stream=True)
            async with client.post(f"{served.base_url}/chat/completions", json=body) as response:
                await response.content.readany()
                told = monotonic()
                stopping = asyncio.create_task(served.terminate())
                await asyncio.sleep(0.1)
                async with client.get(f"{served.root_url}/health/ready") as health:
                    assert health.status == 503
                async with client.get(f"{served.root_url}/health/live") as health:
                    assert health.status == 200
                rest = (await response.read()).decode()
        assert rest.endswith("data: [DONE]\n\n")
        assert await stopping == 0
        assert 1.0 < monotonic() - told < 10
    connection = await asyncpg.connect(database_url)
    try:
        rows = await connection.fetch("select outcome, completion_tokens from usage")
    finally:
        await connection.close()
    assert [row["outcome"] for row in rows] == ["ok"]
    assert rows[0]["completion_tokens"] > 0


async def test_a_stream_that_outlasts_the_drain_ends_with_an_error_event_and_a_row(
    database_url: str, redis_url: str
) -> None:
    environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_DRAIN_TIMEOUT": "0.5"}
    async with serving(environ) as served:
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        async with aiohttp.ClientSession(headers=headers) as client:
            body = chat_body("mock-claude?pace_ms=50&case=long", stream=True)
            async with client.post(f"{served.base_url}/chat/completions", json=body) as response:
                await response.content.readany()
                stopping = asyncio.create_task(served.terminate())
                rest = (await response.read()).decode()
        assert "server_shutting_down" in rest
        assert "[DONE]" not in rest
        assert await stopping == 0
    connection = await asyncpg.connect(database_url)
    try:
        assert await connection.fetchval("select outcome from usage") == "interrupted"
    finally:
        await connection.close()


async def test_a_second_sigterm_ends_open_streams_with_an_error_event_at_once(
    database_url: str, redis_url: str
) -> None:
    async with serving({"DATABASE_URL": database_url, "REDIS_URL": redis_url}) as served:
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        async with aiohttp.ClientSession(headers=headers) as client:
            body = chat_body("mock-gpt?pace_ms=50&case=long", stream=True)
            async with client.post(f"{served.base_url}/chat/completions", json=body) as response:
                await response.content.readany()
                stopping = asyncio.create_task(served.terminate())
                async with asyncio.timeout(5):
                    while await status_of(client, f"{served.root_url}/health/ready") != 503:
                        await asyncio.sleep(0.02)
                told = monotonic()
                served.process.send_signal(signal.SIGTERM)
                rest = (await response.read()).decode()
        assert "server_shutting_down" in rest
        assert "[DONE]" not in rest
        assert await stopping == 0
        assert monotonic() - told < 5
    connection = await asyncpg.connect(database_url)
    try:
        assert await connection.fetchval("select outcome from usage") == "interrupted"
    finally:
        await connection.close()


async def status_of(client: aiohttp.ClientSession, url: str) -> int:
    async with client.get(url) as response:
        return response.status


@asynccontextmanager
async def starting(environ: Mapping[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", "--port", "0",
        env={"PATH": os.environ["PATH"], **environ}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


async def assert_it_stops(process: asyncio.subprocess.Process) -> None:
    process.terminate()
    out, err = await asyncio.wait_for(process.communicate(), 10)
    assert (process.returncode, out) == (0, b"")
    assert b"Traceback" not in err


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_sigterm_ends_a_start_that_waits_for_the_database(
    database_url: str, redis_url: str, workers: str
) -> None:
    holder = await asyncpg.connect(database_url)
    try:
        await holder.execute("select pg_advisory_lock($1)", migrations._LOCK)
        environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_WORKERS": workers}
        async with starting(environ) as process:

            async def waits() -> bool:
                query = "select count(*) from pg_stat_activity where query like '%pg_try_advisory_lock%' and pid <> $1"
                return bool(await holder.fetchval(query, holder.get_server_pid()))

            await until(waits)
            await assert_it_stops(process)
    finally:
        await holder.close()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_sigterm_ends_a_start_on_a_new_data_folder_and_leaves_no_server(tmp_path: Path, workers: str) -> None:
    async with starting({"GATEWAY_DATA_DIR": str(tmp_path), "GATEWAY_WORKERS": workers}) as process:

        async def makes_a_database() -> bool:
            return (tmp_path / "initdb.log").exists()

        await until(makes_a_database)
        await assert_it_stops(process)
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # every server holds it as long as it lives
    shutil.rmtree(tmp_path)  # pytest keeps the folders of three runs


async def test_idle_memory_and_start_on_an_existing_data_folder(tmp_path: Path, figure: Callable[[str], None]) -> None:
    """Under 70 MB without the embedded servers, ready in under 1.5 s with them."""
    environ = {"GATEWAY_DATA_DIR": str(tmp_path / "data")}
    async with serving(environ) as served:
        first = served.seconds_to_ready
        key = await new_key(served)
    starts = []
    for _ in range(3):
        async with serving(environ, coverage=False) as served:
            starts.append(served.seconds_to_ready)
            headers = {"Authorization": f"Bearer {key}"}
            async with (
                aiohttp.ClientSession(headers=headers) as client,
                client.post(f"{served.base_url}/chat/completions", json=chat_body("mock-gpt")) as response,
            ):
                assert response.status == 200, "the data of the first run must be there"
            await new_key(served)  # a password and a key were hashed: that memory is given back
            memory = served.rss_mb()
    best = min(starts)
    figure(f"serve: ready after {first:.2f} s on a new folder, {best:.2f} s on an existing one; {memory:.0f} MB")
    assert best < 1.5
    assert memory < 70


async def test_a_killed_gateway_loses_no_usage(
    database_url: str, redis_url: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """Finished requests that had not reached Postgres, and streams that were open: a row for each after a restart."""
    environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_DATA_DIR": str(tmp_path)}
    async with serving(environ, coverage=False) as served:
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        async with aiohttp.ClientSession(headers=headers) as client:
            url = f"{served.base_url}/chat/completions"
            open_streams = [
                await client.post(url, json=chat_body("mock-gpt?case=long&pace_ms=10", stream=True)) for _ in range(5)
            ]
            for response in open_streams:
                await response.content.readany()

            async def one() -> str:
                async with client.post(url, json=chat_body("mock-claude", stream=True)) as response:
                    assert (await response.text()).endswith("data: [DONE]\n\n")
                    return response.headers["X-Request-Id"]

            ended = set(await asyncio.gather(*(one() for _ in range(40))))
            served.process.kill()
            await served.process.wait()
            begun = ended | {response.headers["X-Request-Id"] for response in open_streams}
    async with serving(environ) as served:
        connection = await asyncpg.connect(database_url)
        try:
            async with asyncio.timeout(15):
                while await connection.fetchval("select count(*) from usage") < len(begun):
                    await asyncio.sleep(0.1)
            rows = await connection.fetch("select request_id::text, outcome, completion_tokens from usage")
        finally:
            await connection.close()
    assert sorted(row["request_id"] for row in rows) == sorted(begun)
    outcomes = {row["request_id"]: row["outcome"] for row in rows}
    assert {outcomes[request_id] for request_id in ended} == {"ok"}
    assert {outcomes[request_id] for request_id in begun - ended} == {"interrupted"}
    figure(f"kill -9: {len(ended)} ended and {len(begun - ended)} open, {len(rows)} rows after the restart")


async def test_what_was_meant_for_one_database_is_never_shipped_to_another(
    database_url: str, empty_database_url: str, redis_url: str, tmp_path: Path
) -> None:
    """Two deployments in one data folder: the first is killed, the second starts, the first comes back."""
    one = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_DATA_DIR": str(tmp_path)}
    other = {**one, "DATABASE_URL": empty_database_url}
    async with serving(one, coverage=False) as served:
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        async with aiohttp.ClientSession(headers=headers) as client:
            body = chat_body("mock-gpt?case=long&pace_ms=20", stream=True)
            async with client.post(f"{served.base_url}/chat/completions", json=body) as response:
                await response.content.readany()
                served.process.kill()
                await served.process.wait()
    for environ, expected in ((other, 0), (one, 1)):
        async with serving(environ):
            await asyncio.sleep(1)  # its first look at the folder is at once
            connection = await asyncpg.connect(environ["DATABASE_URL"])
            try:
                assert await connection.fetchval("select count(*) from usage") == expected
            finally:
                await connection.close()


async def test_two_processes_share_keys_limits_and_usage(database_url: str, redis_url: str) -> None:
    environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url}
    async with serving(environ) as one, serving(environ) as two:
        headers = {"Authorization": f"Bearer {await new_key(one, requests_per_minute=20)}"}
        async with aiohttp.ClientSession(headers=headers) as client:

            async def call(served: Served) -> int:
                async with client.post(f"{served.base_url}/chat/completions", json=chat_body("mock-gpt")) as response:
                    await response.read()
                    return response.status

            statuses = await asyncio.gather(*(call(served) for served in [one, two] * 40))
        assert (statuses.count(200), statuses.count(429)) == (20, 60)
        assert await one.terminate() == 0
        assert await two.terminate() == 0
    connection = await asyncpg.connect(database_url)
    try:
        assert await connection.fetchval("select count(*) from usage") == 20
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"PORT": "many"}, "PORT"),
        ({"GATEWAY_HEARTBEET": "3"}, "GATEWAY_HEARTBEET"),
        ({"GATEWAY_HEARTBEAT": "0"}, "GATEWAY_HEARTBEAT"),
        ({"OPENAI_BASE_URL": "ftp://x"}, "OPENAI_BASE_URL"),
        ({"GATEWAY_CONFIG": "/nowhere/gateway.toml"}, "GATEWAY_CONFIG"),
        ({"DATABASE_URL": "mysql://h/x"}, "DATABASE_URL"),
        ({"GATEWAY_DEFAULT_PROVIDER": "nosuch"}, "GATEWAY_DEFAULT_PROVIDER"),
    ],
)
async def test_a_wrong_setting_stops_the_start_with_one_line_that_names_it(environ: dict[str, str], words: str) -> None:
    async with starting(environ) as process:
        out, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 2
    assert out == b""
    assert words in err.decode()
    assert err.decode().count("\n") == 1
