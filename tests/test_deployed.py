"""What compose.yaml and kubernetes/ say, given to the real programs that this machine has."""

import asyncio
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError
from ruamel.yaml import YAML

from tests.support.process import Served, new_key, serving
from tests.support.programs import ROOT, program
from tests.support.valkey import valkey_program

pytestmark = pytest.mark.integration

KUBERNETES = ROOT / "kubernetes"
SERVICES: Mapping[str, Any] = YAML(typ="safe").load((ROOT / "compose.yaml").read_text())["services"]


@asynccontextmanager
async def running(*command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@asynccontextmanager
async def redis_of(command: Iterable[str], folder: Path) -> AsyncIterator[Redis]:
    """A Valkey with all that compose.yaml tells Redis, its data in `folder`; on a unix socket."""
    _, *options = command
    address = ["--port", "0", "--unixsocket", str(folder / "socket"), "--dir", str(folder)]
    async with running(valkey_program(), *options, *address), Redis(unix_socket_path=str(folder / "socket")) as redis:
        deadline = monotonic() + 20
        while True:
            try:
                await redis.ping()
                break
            except (RedisConnectionError, OSError):
                assert monotonic() < deadline, "valkey did not start"
                await asyncio.sleep(0.01)
        yield redis


async def test_redis_takes_its_command_and_is_what_it_says() -> None:
    """Bounded, never evicting, with a log of every write and no snapshots beside it."""
    with tempfile.TemporaryDirectory() as folder:  # a short path: a unix socket's has at most about 100 bytes
        async with redis_of(SERVICES["redis"]["command"], Path(folder)) as redis:
            said = await redis.config_get("maxmemory*", "appendonly", "appendfsync", "save")
    wanted = {"maxmemory": str(256 << 20), "maxmemory-policy": "noeviction", "appendonly": "yes", "save": ""}
    assert {name: said[name] for name in wanted} == wanted
    assert said["appendfsync"] == "everysec"


async def test_a_full_redis_refuses_writes_and_a_restart_has_all_that_it_took() -> None:
    command = ["2mb" if word.endswith("mb") else word for word in SERVICES["redis"]["command"]]
    with tempfile.TemporaryDirectory() as folder:
        async with redis_of(command, Path(folder)) as redis:
            written = 0
            with pytest.raises(OutOfMemoryError):
                while written < 1000:
                    await redis.set(f"limit:{written}", "x" * 10_000)
                    written += 1
        async with redis_of(command, Path(folder)) as redis:
            assert await redis.dbsize() == written > 10


async def test_prometheus_takes_its_command_and_the_file_that_is_mounted(tmp_path: Path) -> None:
    service = SERVICES["prometheus"]
    mounted = {"/etc/prometheus": str(ROOT / "grafana" / "prometheus"), "/prometheus": str(tmp_path)}
    assert [mount.split(":")[1] for mount in service["volumes"]] == list(mounted)
    flags = [flag.partition("=") for flag in service["command"]]
    here = [f"{name}={placed(value, mounted)}" for name, _, value in flags]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    async with (
        running(program("prometheus"), *here, f"--web.listen-address={address}", "--log.level=error"),
        aiohttp.ClientSession(f"http://{address}") as client,
    ):
        await until_ready(client)
        said = await asked(client, "/api/v1/status/flags")
        config = YAML(typ="safe").load((await asked(client, "/api/v1/status/config"))["yaml"])
    assert (said["storage.tsdb.retention.time"], said["storage.tsdb.retention.size"]) == ("15d", "1GiB")
    assert config["scrape_configs"][0]["static_configs"] == [{"targets": ["gateway:3000"]}]


def placed(value: str, mounted: Mapping[str, str]) -> str:
    for there, here in mounted.items():
        if value == there or value.startswith(f"{there}/"):
            return value.replace(there, here, 1)
    return value


async def asked(client: aiohttp.ClientSession, path: str) -> Any:
    async with client.get(path) as response:
        return (await response.json())["data"]


async def until_ready(client: aiohttp.ClientSession) -> None:
    path = SERVICES["prometheus"]["healthcheck"]["test"][-1].partition(":9090")[2]
    deadline = monotonic() + 30
    while True:
        try:
            async with client.get(path) as response:
                if response.status == 200:
                    return
        except aiohttp.ClientConnectionError:
            pass
        assert monotonic() < deadline, "prometheus is not ready"
        await asyncio.sleep(0.05)


async def test_the_gateways_health_check_in_compose_is_passed_while_it_can_serve(
    database_url: str, redis_url: str
) -> None:
    _, _, *options = SERVICES["gateway"]["healthcheck"]["test"]
    async with serving({"DATABASE_URL": database_url, "REDIS_URL": redis_url}) as served:
        port = served.root_url.rpartition(":")[2]
        command = [sys.executable, *(option.replace("3000", port) for option in options)]
        assert await status_of(command) == 0
        await served.terminate()
        assert await status_of(command) == 1


async def status_of(command: Iterable[str]) -> int:
    # What a machine behind a proxy has in every container.
    environ = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    process = await asyncio.create_subprocess_exec(*command, env=environ, stderr=asyncio.subprocess.DEVNULL)
    return await asyncio.wait_for(process.wait(), 20)


async def test_a_gateway_with_the_settings_for_kubernetes_serves_until_the_cluster_knows_that_it_goes(
    database_url: str, redis_url: str
) -> None:
    lines = (line.partition("=") for line in (KUBERNETES / "settings.env").read_text().splitlines())
    settings = {name: value for name, _, value in lines if value and not name.startswith("#")}
    here = {
        "GATEWAY_CONFIG": str(KUBERNETES / "gateway.toml"), "GATEWAY_DRAIN_DELAY": "2", "GATEWAY_MOCK": "on",
        "DATABASE_URL": database_url, "REDIS_URL": redis_url,
    }  # fmt: skip
    assert here.keys() - settings.keys() == {"GATEWAY_MOCK", "DATABASE_URL", "REDIS_URL"}
    async with serving(settings | here) as served, aiohttp.ClientSession(served.root_url) as client:
        key = await new_key(served)
        assert await probed(client) == {"startupProbe": 200, "readinessProbe": 200, "livenessProbe": 200}
        stopped = asyncio.create_task(served.terminate())
        await asyncio.sleep(0.5)
        assert await probed(client) == {"startupProbe": 200, "readinessProbe": 503, "livenessProbe": 200}
        assert await streamed(served, key) == "data: [DONE]"
        assert await stopped == 0


async def probed(client: aiohttp.ClientSession) -> dict[str, int]:
    deployment = YAML(typ="safe").load((KUBERNETES / "deployment.yaml").read_text())
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    found = {}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        async with client.get(container[name]["httpGet"]["path"]) as response:
            found[name] = response.status
    return found


async def streamed(served: Served, key: str) -> str:
    """The last line of a stream."""
    body = {"model": "mock-gpt", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as client,
        client.post(f"{served.base_url}/chat/completions", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        return (await response.text()).strip().splitlines()[-1]
