"""A Prometheus that scrapes a gateway every second, with the rules that ship."""

import asyncio
import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
from ruamel.yaml import YAML

from tests.support.programs import ROOT, program

FOLDER = ROOT / "grafana" / "prometheus"


@dataclass
class Prometheus:
    url: str
    client: aiohttp.ClientSession

    async def ask(self, path: str, **parameters: str) -> Any:
        """`data` of its answer. Raises AssertionError with its own words when it refuses."""
        async with self.client.get(f"{self.url}/api/v1/{path}", params=parameters) as response:
            answer = await response.json()
            assert answer["status"] == "success", answer.get("error")
            return answer["data"]

    async def numbers(self, expression: str) -> list[float]:
        """The values of an expression now; those that are no number are none."""
        data = await self.ask("query", query=expression)
        found = [data["result"]] if data["resultType"] == "scalar" else [one["value"] for one in data["result"]]
        return [value for _, text in found if not math.isnan(value := float(text))]

    async def labels(self, expression: str) -> set[str]:
        """Names of labels of the series that it answers with."""
        data = await self.ask("query", query=expression)
        return {label for one in data["result"] if data["resultType"] == "vector" for label in one["metric"]}


@asynccontextmanager
async def scraping(address: str, folder: Path) -> AsyncIterator[Prometheus]:
    """`address`: host and port of the gateway. Ready when this begins."""
    _write_config(address, folder / "prometheus.yml")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        async with aiohttp.ClientSession() as client:
            prometheus = Prometheus(f"http://127.0.0.1:{port}", client)
            await _until_ready(prometheus, process, folder / "log")
            yield prometheus
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _write_config(address: str, file: Path) -> None:
    """The one that ships, quicker."""
    config = YAML(typ="safe").load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    [job] = config["scrape_configs"]
    job["static_configs"] = [{"targets": [address]}]
    YAML(typ="safe").dump(config, file)


async def _until_ready(prometheus: Prometheus, process: asyncio.subprocess.Process, log: Path) -> None:
    deadline = monotonic() + 30
    while True:
        try:
            async with prometheus.client.get(f"{prometheus.url}/-/ready") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientConnectionError:
            pass
        assert process.returncode is None, log.read_text()
        assert monotonic() < deadline, log.read_text()
        await asyncio.sleep(0.05)
