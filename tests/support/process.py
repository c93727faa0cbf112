"""`gateway serve` as a process of its own."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import aiohttp


@dataclass
class Served:
    process: asyncio.subprocess.Process
    root_url: str
    seconds_to_ready: float

    @property
    def base_url(self) -> str:
        return f"{self.root_url}/v1"

    def rss_mb(self) -> float:
        """Resident memory, in 2^20 bytes."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("the process is gone")

    async def terminate(self, seconds: float = 20) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), seconds)


@asynccontextmanager
async def serving(
    environ: Mapping[str, str], *, port: int = 0, coverage: bool = True, log: Path | None = None
) -> AsyncIterator[Served]:
    """Runs until the block ends. What the tests' own environment sets for providers does not reach it.

    `port`: 0 for one that is free. `coverage=False` where time or memory is measured: what measures coverage costs
    both. `log`: a file to which its log lines are added; without one they are the test's own.
    """
    passed = ["PATH", "HOME", "TMPDIR", *(["COVERAGE_PROCESS_CONFIG"] if coverage else [])]
    kept = {name: os.environ[name] for name in passed if name in os.environ}
    data_dir = TemporaryDirectory()
    started = monotonic()
    with log.open("ab") if log else nullcontext() as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", "serve", "--port", str(port),
            env={**kept, "GATEWAY_DATA_DIR": data_dir.name, **environ}, stdout=asyncio.subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
        assert "ready on http" in line, f"gateway serve printed {line!r}"
        yield Served(process, line.split("ready on ")[1].strip().removesuffix("/v1"), monotonic() - started)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 20)
            except TimeoutError:
                process.kill()
                await process.wait()
        data_dir.cleanup()


async def new_key(served: Served, **limits: Any) -> str:
    login = {"email": "admin@example.com", "password": "correct horse battery"}
    async with aiohttp.ClientSession() as client:
        async with client.post(f"{served.root_url}/auth/register", json=login) as response:
            assert response.status in (201, 409)
        body = {**login, "key_name": "test", "requests_per_minute": 0, "concurrent_requests": 0, **limits}
        async with client.post(f"{served.root_url}/auth/keys", json=body) as response:
            assert response.status == 201, await response.text()
            key: str = (await response.json())["api_key"]
            return key


async def until(true: Callable[[], object], seconds: float = 60) -> None:
    """Waits for what other processes bring about. Raises AssertionError when they do not within `seconds`."""
    deadline = monotonic() + seconds
    while not true():
        assert monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.01)
