"""What happens when memory, connections or the event loop's time run out, and that it ends by itself."""

import asyncio
import json
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic

import aiohttp
import pytest

from gateway import appkeys
from gateway.metrics import Metrics
from gateway.pressure import LAG_WINDOW, Memory, Pressure
from tests.support.gateway import MODELS, Gateway, chat_body, running_gateway
from tests.support.process import new_key, serving

pytestmark = pytest.mark.integration

MIB = 1 << 20


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def container(root: Path, *, used: float, cache: float = 0.0) -> None:
    """A container with cgroups of version 2 and a gigabyte: what of it is in use, and what of that is file cache."""
    write(
        root,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
            "sys/fs/cgroup/memory.max": f"{1024 * MIB}\n",
            "sys/fs/cgroup/memory.current": f"{round(used * 1024 * MIB)}\n",
            "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {round(cache * 1024 * MIB)}\n",
        },
    )


# --- memory: what is read -----------------------------------------------------------------------------------------


def test_a_containers_limit_counts_without_what_the_kernel_gives_back(tmp_path: Path) -> None:
    container(tmp_path, used=0.5, cache=0.2)
    memory = Memory(tmp_path)
    assert memory.used() == pytest.approx(0.5, abs=0.01)
    container(tmp_path, used=0.95, cache=0.2)
    assert memory.used() == pytest.approx(0.75, abs=0.01)


def test_of_nested_groups_the_tightest_counts(tmp_path: Path) -> None:
    container(tmp_path, used=0.1)
    own = "sys/fs/cgroup/system.slice/gateway.service/memory"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system.slice/gateway.service\n",
            f"{own}.max": str(100 * MIB),
            f"{own}.current": str(80 * MIB),
            "sys/fs/cgroup/system.slice/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/memory.current": str(900 * MIB),
        },
    )
    assert Memory(tmp_path).used() == pytest.approx(0.8)


def test_the_older_cgroups_are_read_too_and_no_limit_is_none(tmp_path: Path) -> None:
    container(tmp_path, used=0.99)
    memory = "sys/fs/cgroup/memory/docker/1f/memory"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu:/docker/1f\n4:memory:/docker/1f\n",
            f"{memory}.limit_in_bytes": str(200 * MIB),
            f"{memory}.usage_in_bytes": str(190 * MIB),
            f"{memory}.stat": f"total_inactive_file {30 * MIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(190 * MIB),
        },
    )
    assert Memory(tmp_path).used() == pytest.approx(0.8)


def test_without_a_limit_it_is_our_part_of_what_the_machine_has_for_us(tmp_path: Path) -> None:
    """Another's hunger is no reason to refuse: it would free nothing."""
    pages = 300 * MIB // os.sysconf("SC_PAGE_SIZE")
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "proc/self/statm": f"9 {pages} 1\n"})
    write(tmp_path, {"proc/meminfo": f"MemTotal: 16777216 kB\nMemAvailable: {700 * 1024} kB\n"})
    assert Memory(tmp_path).used() == pytest.approx(0.3, abs=0.01)
    assert Memory(tmp_path / "nothing").used() == 0.0


def test_what_this_machine_says_is_a_share() -> None:
    assert 0.0 < Memory().used() < 1.0


# --- memory: what is done -----------------------------------------------------------------------------------------


async def test_as_memory_runs_out_connections_are_not_kept_then_requests_are_refused_then_all_is_as_before(
    gateway: Gateway, tmp_path: Path
) -> None:
    pressure = gateway.app[appkeys.PRESSURE]
    container(tmp_path, used=0.5)
    pressure.memory = Memory(tmp_path)
    url = f"{gateway.base_url}/chat/completions"
    async with aiohttp.ClientSession(headers=gateway.headers) as client:

        async def ask() -> aiohttp.ClientResponse:
            pressure.look()
            async with client.post(url, json=chat_body(MODELS["openai"])) as response:
                await response.read()
                return response

        assert (await ask()).status == 200
        container(tmp_path, used=0.87)
        pressure.look()
        async with client.get(f"{gateway.base_url}/models") as response:
            assert (response.status, response.headers["Connection"]) == (200, "close")
        container(tmp_path, used=0.92)
        pressure.look()
        async with client.post(url, json=chat_body(MODELS["openai"]), headers={"Authorization": "x"}) as response:
            assert response.status == 503, "before the key is looked at"
            assert response.headers["Retry-After"] == "1"
            assert (await response.json())["error"]["code"] == "overloaded"
        for path, status in (("/health/live", 200), ("/health", 200), ("/metrics", 200), ("/health/ready", 503)):
            async with client.get(gateway.root_url + path) as response:
                assert response.status == status, path
                page = await response.text()
            if path == "/metrics":
                assert 'gateway_shed_total{reason="memory"} 1' in page
        container(tmp_path, used=0.5)
        again = await ask()
        assert (again.status, again.headers.get("Connection")) == (200, None)
    assert len(gateway.calls) == 2


async def test_when_memory_is_nearly_gone_readers_that_do_not_read_are_dropped_and_others_go_on(
    gateway: Gateway, tmp_path: Path
) -> None:
    pressure = gateway.app[appkeys.PRESSURE]
    container(tmp_path, used=0.5)
    pressure.memory = Memory(tmp_path)
    stopped = [await stopped_reader(gateway) for _ in range(3)]
    async with aiohttp.ClientSession(headers=gateway.headers) as client:
        body = chat_body("openai/mock-gpt?tokens=60&pace_ms=20", stream=True)
        async with client.post(f"{gateway.base_url}/chat/completions", json=body) as response:
            await response.content.readany()
            connections = gateway.app[appkeys.CONNECTIONS]
            async with asyncio.timeout(20):
                while sum(one.blocked for one in connections._open) < 3:
                    await asyncio.sleep(0.02)
            container(tmp_path, used=0.97)
            pressure.look()
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
    assert gateway.app[appkeys.METRICS].shed.labels("memory").value == 3
    for writer in stopped:
        writer.close()


async def stopped_reader(gateway: Gateway) -> asyncio.StreamWriter:
    """A client that asked for an endless stream and reads no more than the first line."""
    host, port = gateway.root_url.removeprefix("http://").split(":")
    return await stop_reading(host, int(port), gateway.api_key, "openai/mock-gpt?fault=endless&after=1")


async def stop_reading(host: str, port: int, key: str, model: str) -> asyncio.StreamWriter:
    reader, writer = await asyncio.open_connection(host, port, limit=1024)
    body = json.dumps(chat_body(model, stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    line = await asyncio.wait_for(reader.readline(), 20)
    assert b" 200 " in line, line
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    return writer


# --- the event loop -----------------------------------------------------------------------------------------------


async def test_a_stall_of_the_loop_is_measured_and_a_long_one_is_not_live(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    pressure = gateway.app[appkeys.PRESSURE]
    async with aiohttp.ClientSession() as client:
        for lag, status in ((0.0, 200), (11.0, 503)):
            await asyncio.sleep(0)
            pressure.note_lag(monotonic(), lag)
            assert pressure.stalled == (status == 503)
        async with client.get(f"{gateway.root_url}/health/live") as response:
            live = response.status
        async with asyncio.timeout(10):
            while live != 200:  # the loop is in time again, which the probe sees
                async with client.get(f"{gateway.root_url}/health/live") as response:
                    live = response.status
        async with client.get(f"{gateway.root_url}/metrics") as response:
            page = await response.text()
    assert "the event loop was held up for 11.0 s" in caplog.text
    [line] = [line for line in page.splitlines() if line.startswith("gateway_event_loop_lag_seconds ")]
    assert float(line.split()[1]) >= 11


async def test_the_longest_lag_is_forgotten_after_two_windows(gateway: Gateway) -> None:
    metrics = Metrics()
    pressure = Pressure(gateway.app[appkeys.PULSE], gateway.app[appkeys.CONNECTIONS], metrics)
    now = monotonic()
    pressure.note_lag(now, 0.5)
    for windows, longest in ((1, 0.5), (2, 0.1)):
        pressure.note_lag(now + windows * (LAG_WINDOW + 1), 0.1)
        assert metrics.event_loop_lag_seconds.sample() == longest


# --- connections --------------------------------------------------------------------------------------------------


async def test_above_the_cap_a_connection_is_told_503_and_below_it_all_is_as_before(gateway: Gateway) -> None:
    connections = gateway.app[appkeys.CONNECTIONS]
    assert connections.most == (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 64) // 2
    connections.most = 4
    port = int(gateway.root_url.rsplit(":", 1)[1])
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
    async with asyncio.timeout(10):
        while len(connections._open) < 4:
            await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"\r\nRetry-After: 1\r\n" in head
    assert b"\r\nConnection: close" in head
    assert json.loads(body)["error"]["code"] == "overloaded"
    metrics = gateway.app[appkeys.METRICS]
    assert metrics.shed.labels("connections").value == 1
    assert metrics.connections_open.sample() == 4
    for _, other in idle:
        other.close()
    async with asyncio.timeout(10), aiohttp.ClientSession() as client:
        while len(connections._open) > 0:
            await asyncio.sleep(0.01)
        async with client.get(f"{gateway.root_url}/health/live") as response:
            assert response.status == 200


async def test_without_descriptors_it_waits_without_spinning_and_goes_on_when_there_are_some(
    database_url: str, redis_url: str, figure: Callable[[str], None]
) -> None:
    async with serving({"DATABASE_URL": database_url, "REDIS_URL": redis_url}) as served:
        host, port = served.root_url.removeprefix("http://").split(":")
        in_use = len(os.listdir(f"/proc/{served.process.pid}/fd"))
        _, hard = resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (in_use + 10, hard))
        clients = [await asyncio.open_connection(host, int(port)) for _ in range(60)]
        before, started = cpu_seconds(served.process.pid), monotonic()
        await asyncio.sleep(2)  # what is measured: the CPU of two seconds in which nothing can be done
        share = (cpu_seconds(served.process.pid) - before) / (monotonic() - started)
        figure(f"no descriptors left: {share * 100:.0f} % of a core")
        assert share < 0.5
        for _, writer in clients:
            writer.close()
        async with asyncio.timeout(20), aiohttp.ClientSession() as client:
            while True:
                try:
                    async with client.get(f"{served.root_url}/health/live") as response:
                        assert response.status == 200
                        break
                except aiohttp.ClientError:
                    await asyncio.sleep(0.05)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, fields 14 and 15 of proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- slow clients -------------------------------------------------------------------------------------------------


async def test_headers_that_dribble_are_cut_on_a_new_connection_and_on_a_kept_one(
    database_url: str, redis_url: str
) -> None:
    async with running_gateway(database_url, redis_url, {"GATEWAY_HEADER_TIMEOUT": "0.5"}) as gateway:
        port = int(gateway.root_url.rsplit(":", 1)[1])
        slow = gateway.app[appkeys.METRICS].slow_clients.labels("headers")

        async def dribble(before: bytes) -> float:
            """Seconds until the connection is closed, of a client that never stops sending."""
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if before:
                writer.write(before)
                await asyncio.wait_for(reader.readuntil(b"}"), 10)
            started = monotonic()
            writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n")
            ended = asyncio.create_task(reader.read())
            async with asyncio.timeout(20):
                while not ended.done():
                    writer.write(b"X-Slow: a\r\n")
                    await asyncio.sleep(0.05)
            writer.close()
            with suppress(ConnectionResetError):  # something of ours was on its way
                assert await ended == b""
            return monotonic() - started

        whole = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
        for number, before in enumerate((b"", whole), 1):
            assert await dribble(before) >= 0.4
            assert slow.value == number


async def test_an_idle_connection_that_was_used_and_a_long_answer_outlive_the_time_for_headers(
    database_url: str, redis_url: str
) -> None:
    async with running_gateway(database_url, redis_url, {"GATEWAY_HEADER_TIMEOUT": "0.3"}) as gateway:
        async with aiohttp.ClientSession(headers=gateway.headers) as client:
            body = chat_body("openai/mock-gpt?tokens=30&pace_ms=50", stream=True)
            async with client.post(f"{gateway.base_url}/chat/completions", json=body) as response:
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
            await asyncio.sleep(1)  # what is tested: nothing happens in it
            assert gateway.app[appkeys.METRICS].connections_open.sample() == 1
        assert gateway.app[appkeys.METRICS].slow_clients.labels("headers").value == 0


async def test_a_body_that_dribbles_and_a_client_that_leaves_within_it_are_counted(
    database_url: str, redis_url: str
) -> None:
    async with running_gateway(database_url, redis_url, {"GATEWAY_BODY_TIMEOUT": "1"}) as gateway:
        port = int(gateway.root_url.rsplit(":", 1)[1])
        metrics = gateway.app[appkeys.METRICS]
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n"
        part = f"{head}Content-Type: application/json\r\nContent-Length: 5000\r\n\r\n{{".encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(part)
        ended = asyncio.create_task(reader.readline())
        async with asyncio.timeout(20):
            while not ended.done():
                writer.write(b" ")
                await asyncio.sleep(0.05)
        assert b" 408 " in await ended
        writer.close()
        assert metrics.slow_clients.labels("body").value == 1
        _, leaving = await asyncio.open_connection("127.0.0.1", port)
        leaving.write(part)
        async with asyncio.timeout(20):
            while gateway.app[appkeys.PULSE].idle:
                await asyncio.sleep(0.01)
            leaving.close()
            while not gateway.app[appkeys.PULSE].idle:
                await asyncio.sleep(0.01)
        assert metrics.client_aborts.labels("body").value == 1
        assert gateway.calls == []
        assert await gateway.rows() == []


async def test_twenty_readers_that_stop_cost_little_and_hold_up_nobody(
    database_url: str, redis_url: str, figure: Callable[[str], None]
) -> None:
    environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_WRITE_TIMEOUT": "4", "GATEWAY_MOCK": "on"}
    async with serving(environ, coverage=False) as served:
        host, port = served.root_url.removeprefix("http://").split(":")
        key = await new_key(served)
        url = f"{served.base_url}/chat/completions"
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client:

            async def ask() -> float:
                started = monotonic()
                async with client.post(url, json=chat_body("mock-gpt")) as response:
                    assert response.status == 200
                    await response.read()
                return monotonic() - started

            for _ in range(20):
                await ask()
            before = served.rss_mb()
            stopped = [await stop_reading(host, int(port), key, "mock-gpt?fault=endless&after=1") for _ in range(20)]
            took, most = [], before
            async with asyncio.timeout(60):
                while await dropped(client, served.root_url) < 20:
                    took.append(await ask())
                    most = max(most, served.rss_mb())
            for writer in stopped:
                writer.close()
    p95 = sorted(took)[int(len(took) * 0.95)]
    figure(f"P5 20 readers that stop: {most - before:.0f} MiB more, others' p95 {p95 * 1000:.0f} ms, all dropped")
    assert most - before <= 64
    assert p95 < 1.0


async def test_whoever_asks_for_pages_without_a_key_and_reads_none_is_dropped_too(
    database_url: str, redis_url: str
) -> None:
    environ = {"GATEWAY_WRITE_TIMEOUT": "0.3", "GATEWAY_HEADER_TIMEOUT": "30"}
    async with running_gateway(database_url, redis_url, environ) as gateway:
        port = int(gateway.root_url.rsplit(":", 1)[1])
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        ask = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(connection, ask * 1000)
        metrics = gateway.app[appkeys.METRICS]
        async with asyncio.timeout(60):
            while not metrics.slow_clients.labels("read").value:
                await asyncio.sleep(0.05)
            while metrics.connections_open.sample():
                await asyncio.sleep(0.01)
        connection.close()


async def dropped(client: aiohttp.ClientSession, root_url: str) -> int:
    """Readers that were dropped so far."""
    async with client.get(f"{root_url}/metrics") as response:
        page = await response.text()
    [line] = [line for line in page.splitlines() if line.startswith('gateway_slow_clients_total{phase="read"}')]
    return int(float(line.split()[1]))
