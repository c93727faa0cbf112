"""`gateway serve --workers N`: crashes, replacements and the end, under load; and one page of metrics."""

import asyncio
import fcntl
import os
import pty
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp
import asyncpg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.gateway import chat_body
from tests.support.process import Served, new_key, serving, until
from tests.support.visitors import Visitors

pytestmark = pytest.mark.integration


@pytest.fixture
def environ(database_url: str, redis_url: str) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_WORKERS": "2"}


def workers(served: Served) -> set[int]:
    """Process ids; with given stores a supervisor has no other children."""
    pid = served.process.pid
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:  # it is gone
        return set()


def alive(pid: int) -> bool:
    """Not so once it is a zombie that its new parent has not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def ended(database_url: str, expected: set[str]) -> dict[str, str]:
    """Outcomes by request id, once those that are expected are among them."""
    connection = await asyncpg.connect(database_url)
    try:
        found: dict[str, str] = {}
        async with asyncio.timeout(60):
            while not expected <= found.keys():
                await asyncio.sleep(0.05)
                rows = await connection.fetch("select request_id::text, outcome from usage")
                found = {row["request_id"]: row["outcome"] for row in rows}
        return found
    finally:
        await connection.close()


async def counted(served: Served, name: str) -> float:
    """On the page of whichever worker takes a new connection: all series of a metric together."""
    async with aiohttp.ClientSession() as client, client.get(f"{served.root_url}/metrics") as response:
        page = await response.text()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    return sum(sample.value for sample in families[name].samples)


async def never_goes_down(served: Served, seen: list[float]) -> None:
    while True:
        seen.append(await counted(served, "gateway_requests"))
        await asyncio.sleep(0.02)


async def readiness(served: Served, seen: set[int]) -> None:
    """As a load balancer asks for it, on a connection that it keeps."""
    async with aiohttp.ClientSession() as client:
        while True:
            async with client.get(f"{served.root_url}/health/ready") as response:
                seen.add(response.status)
            await asyncio.sleep(0.02)


async def test_workers_are_replaced_under_load_and_nobody_is_refused_cut_or_uncounted(
    environ: dict[str, str], figure: Callable[[str], None]
) -> None:
    async with serving(environ, coverage=False) as served:
        visitors, seen = Visitors(served, await new_key(served)), list[float]()
        scraping = asyncio.create_task(never_goes_down(served, seen))
        statuses = set[int]()
        asking = asyncio.create_task(readiness(served, statuses))
        async with visitors.at_work(whole=10, streams=10):
            await until(lambda: len(visitors.ended) > 100)
            before = workers(served)
            served.process.send_signal(signal.SIGUSR2)
            await until(lambda: len(workers(served)) == 2 and not before & workers(served))
            during = len(visitors.ended)
            await until(lambda: len(visitors.ended) > during + 100)
        assert not visitors.faults
        asking.cancel()
        assert statuses == {200}
        scraping.cancel()
        assert len(seen) > 10 and seen == sorted(seen)
        async with asyncio.timeout(60):
            while {await counted(served, "gateway_requests") for _ in range(10)} != {len(visitors.ended)}:
                await asyncio.sleep(0.05)
        rows = await ended(environ["DATABASE_URL"], visitors.ended)
        assert rows == dict.fromkeys(visitors.ended, "ok")
        assert len(before) == 2
        figure(f"two workers replaced under load: {len(rows)} requests, 0 refused, 0 cut, 0 failed, all counted")


async def test_a_worker_that_retires_waits_for_a_stream_as_long_as_a_drain_takes(environ: dict[str, str]) -> None:
    async with serving({**environ, "GATEWAY_DRAIN_TIMEOUT": "1"}) as served:
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        before = workers(served)
        async with aiohttp.ClientSession(headers=headers) as client:
            body = chat_body("mock-gpt?case=long&pace_ms=50", stream=True)
            async with client.post(f"{served.base_url}/chat/completions", json=body) as response:
                await response.content.readany()
                served.process.send_signal(signal.SIGUSR2)
                text = (await response.read()).decode()
                assert "server_shutting_down" in text and "[DONE]" not in text
                identity = response.headers["X-Request-Id"]
        await until(lambda: not before & workers(served))
        assert await ended(environ["DATABASE_URL"], {identity}) == {identity: "interrupted"}


async def test_a_killed_worker_costs_its_own_connections_alone_and_no_usage(
    environ: dict[str, str], figure: Callable[[str], None]
) -> None:
    async with serving(environ, coverage=False) as served:
        visitors, seen = Visitors(served, await new_key(served)), list[float]()
        scraping = asyncio.create_task(never_goes_down(served, seen))
        async with visitors.at_work(whole=10, streams=10):
            await until(lambda: len(visitors.ended) > 50)
            killed, other = workers(served)
            os.kill(killed, signal.SIGKILL)
            await until(lambda: len(workers(served) - {killed}) == 2)
            during = len(visitors.ended)
            await until(lambda: len(visitors.ended) > during + 50)
        assert other in workers(served)
        assert [fault for fault in visitors.faults if not fault.startswith("cut")] == []
        assert sum(visitors.faults.values()) < 20
        with pytest.raises((asyncio.CancelledError, aiohttp.ClientError)):  # it may have asked the one that was killed
            scraping.cancel()
            await scraping
        assert seen == sorted(seen)
        rows = await ended(environ["DATABASE_URL"], visitors.ended | visitors.cut)
        assert {rows[identity] for identity in visitors.ended} == {"ok"}
        figure(f"a worker killed under load: {len(visitors.ended)} answers, {len(visitors.cut)} cut, {len(rows)} rows")


async def test_sigterm_drains_all_workers_and_a_second_one_hurries_them(environ: dict[str, str]) -> None:
    async with serving(environ) as served:
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        pids = workers(served)
        async with aiohttp.ClientSession(headers=headers) as client:
            url = f"{served.base_url}/chat/completions"
            short = [
                await client.post(url, json=chat_body("mock-gpt?tokens=40&pace_ms=25", stream=True)) for _ in range(8)
            ]
            long = await client.post(url, json=chat_body("mock-gpt?case=long&pace_ms=50", stream=True))
            for response in (*short, long):
                await response.content.readany()
            served.process.send_signal(signal.SIGTERM)
            texts = [(await response.read()).decode() for response in short]
            assert [text[-14:] for text in texts] == ["data: [DONE]\n\n"] * 8
            stopping = asyncio.create_task(served.terminate())
            assert "server_shutting_down" in (await long.read()).decode()
        assert await stopping == 0
        assert not any(map(alive, pids))


async def test_workers_of_a_killed_supervisor_end_what_they_have_and_go(
    environ: dict[str, str], tmp_path: Path
) -> None:
    async with serving({**environ, "TMPDIR": str(tmp_path)}) as served:
        await until(lambda: len(list(tmp_path.glob("aig-workers-*/[12]"))) == 2)
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        pids = workers(served)
        async with aiohttp.ClientSession(headers=headers) as client:
            body = chat_body("mock-gpt?tokens=20&pace_ms=25", stream=True)
            async with client.post(f"{served.base_url}/chat/completions", json=body) as response:
                await response.content.readany()
                served.process.kill()
                await served.process.wait()
                assert (await response.text()).endswith("data: [DONE]\n\n")
        await until(lambda: not any(map(alive, pids)))
        assert list(tmp_path.glob("aig-workers-*")) == []
        with pytest.raises(aiohttp.ClientConnectorError):
            async with aiohttp.ClientSession() as client, client.get(f"{served.root_url}/health/live"):
                pass


async def test_three_crashes_within_ten_seconds_end_it(environ: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with serving(environ, coverage=False, log=log) as served:
        killed = set[int]()
        async with asyncio.timeout(60):
            while served.process.returncode is None:
                for pid in workers(served) - killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                await asyncio.sleep(0.01)
        assert served.process.returncode == 1
    lines = log.read_text()
    assert len(re.findall(r"killed by SIGKILL: another starts in 0\.[12] s", lines)) >= 2
    assert "3 in its place in 10 s, we give up" in lines


async def test_workers_share_one_embedded_pair_of_stores_and_leave_none_running(tmp_path: Path) -> None:
    async with serving({"GATEWAY_WORKERS": "2", "GATEWAY_DATA_DIR": str(tmp_path)}) as served:
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        for _ in range(8):  # each on a connection of its own, and so at either worker
            async with aiohttp.ClientSession(headers=headers) as client:
                async with client.post(f"{served.base_url}/chat/completions", json=chat_body("mock-gpt")) as response:
                    assert response.status == 200
        assert await served.terminate() == 0
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # every server holds it as long as it lives


@pytest.mark.parametrize("processes", [1, 2])
async def test_sighup_has_every_process_read_its_configuration_again(environ: dict[str, str], processes: int) -> None:
    async with serving({**environ, "GATEWAY_WORKERS": str(processes)}) as served:
        assert await counted(served, "gateway_config_reloads") == 0
        served.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(60):
            while await counted(served, "gateway_config_reloads") < processes:
                await asyncio.sleep(0.05)
        assert await counted(served, "gateway_config_reloads") == processes


async def test_sigusr2_does_nothing_to_a_single_process(environ: dict[str, str], tmp_path: Path) -> None:
    async with serving({**environ, "GATEWAY_WORKERS": "1"}, log=tmp_path / "log") as served:
        served.process.send_signal(signal.SIGUSR2)
        await until(lambda: "SIGUSR2 replaces workers; this is a single process" in (tmp_path / "log").read_text())
        assert await counted(served, "gateway_requests") == 0


@pytest.mark.parametrize("processes", [1, 2])
async def test_a_terminal_that_is_closed_stops_it(environ: dict[str, str], processes: int) -> None:
    """Its SIGHUP is none that asks for another look at the configuration."""
    ours, its = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", "--port", "0", "--workers", str(processes),
        env={"PATH": os.environ["PATH"], **environ}, stdin=its, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        os.close(its)
        assert process.stdout is not None
        assert b"ready" in await asyncio.wait_for(process.stdout.readline(), 60)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def run(environ: dict[str, str], *arguments: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", *arguments,
        env={"PATH": os.environ["PATH"], **environ}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode()


async def test_what_keeps_a_worker_from_starting_is_said_once(environ: dict[str, str], tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    status, out = await run({**environ, "GATEWAY_CONFIG": str(missing)}, "--port", "0")
    assert (status, out.count("gateway: ")) == (2, 1)
    assert str(missing) in out


async def test_a_second_gateway_on_the_port_does_not_start(environ: dict[str, str]) -> None:
    """The kernel would give it a part of the clients without a word."""
    async with serving(environ) as served:
        port = served.root_url.rpartition(":")[2]
        status, out = await run(environ, "--port", port)
        assert (status, out) == (
            1,
            f"gateway: cannot start: [Errno 98] cannot listen on 127.0.0.1 port {port}: Address already in use\n",
        )
