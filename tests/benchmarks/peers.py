"""Other gateways, each installed on its own into a folder of this project when it is asked for.

A peer that cannot be had, without a network or without Node, is named in the output and left out.

LiteLLM and Portkey are gateways like this one. The routers of vLLM and SGLang, in Rust, pick one of several engines by
turns: they check no key, count nothing and limit nothing, and are what forwarding with a parsed request costs.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.processes import tree
from tests.benchmarks.subjects import Bench, Subject, ask, free_port

FOLDER = Path(__file__).parents[2] / ".bench"
_INSTALL = 900.0  # seconds
_READY = 30.0  # seconds until a router has looked at its engine


class PeerMissing(Exception):
    """One line that says why it cannot be measured."""


@contextmanager
def litellm(bench: Bench) -> Iterator[Subject]:
    """Its proxy with one worker and a master key, without a database: it counts and limits nothing."""
    program = _installed("litellm", "litellm[proxy]==1.106.2")
    port, key = free_port(), "sk-bench"
    config = bench.root / "litellm.yaml"
    config.write_text(_LITELLM % {"provider": bench.direct.port, "key": key})
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    # Its prices would be fetched from the network.
    with bench.answering(command, "litellm", port, {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}) as process:
        yield Subject("litellm", port, tree(process.pid), key, translated=True)


@contextmanager
def portkey(bench: Bench) -> Iterator[Subject]:
    """Its open gateway, told by headers where the provider is: it checks no key, and counts and limits nothing."""
    folder = FOLDER / "portkey"
    script = folder / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    node, npm = shutil.which("node", path=path), shutil.which("npm", path=path)
    if node is None or npm is None:
        raise PeerMissing("there is no Node")
    if not script.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text(json.dumps(_PORTKEY))
        _install([npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder)])
    port = free_port()
    headers = ("x-portkey-provider: openai", f"x-portkey-custom-host: http://127.0.0.1:{bench.direct.port}/v1")
    with bench.answering([node, str(script), f"--port={port}", "--headless"], "portkey", port) as process:
        yield Subject("portkey", port, tree(process.pid), translated=True, headers=headers)


def vllm_router(bench: Bench) -> AbstractContextManager[Subject]:
    return _router(bench, "vllm_router", "vllm-router==0.1.17", "warning")


def sglang_router(bench: Bench) -> AbstractContextManager[Subject]:
    return _router(bench, "sglang_router", "sglang-router==0.3.2", "warn")


@contextmanager
def _router(bench: Bench, name: str, requirement: str, quiet: str) -> Iterator[Subject]:
    """The provider is its only engine; `quiet` is the level at which it logs no requests."""
    program = _installed(name, requirement).with_name("python")
    port, provider = free_port(), f"http://127.0.0.1:{bench.direct.port}"
    command = [str(program), "-m", f"{name}.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", provider, "--policy", "round_robin", "--log-level", quiet]
    command += ["--prometheus-port", str(free_port())]
    with bench.answering(command, name, port) as process:
        _wait_for_engine(name, port)
        yield Subject(name, port, tree(process.pid), translated=True)


def _wait_for_engine(name: str, port: int) -> None:
    """One listens before it has looked at its engine, and refuses what comes until then."""
    deadline = time.monotonic() + _READY
    while True:
        try:
            ask(port)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not serve: {error}") from None
            time.sleep(0.1)
        else:
            return


class Peer(NamedTuple):
    """How to start it, and the load that it can bear."""

    start: Callable[[Bench], AbstractContextManager[Subject]]
    connections: int  # with whole answers
    streams: int


PEERS: Mapping[str, Peer] = {
    "litellm": Peer(litellm, 8, 10),
    "portkey": Peer(portkey, 8, 10),
    "vllm_router": Peer(vllm_router, 64, 100),
    "sglang_router": Peer(sglang_router, 64, 100),
}


def _installed(name: str, requirement: str) -> Path:
    """The program of that name in an environment of its own."""
    program = FOLDER / name / "bin" / name.replace("_", "-")
    if not program.exists():
        _install([sys.executable, "-m", "venv", str(FOLDER / name)])
        _install([str(program.with_name("pip")), "install", "--quiet", requirement])
    return program


def _install(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_INSTALL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerMissing(f"it cannot be installed: {error}") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["the installer failed"]
        raise PeerMissing(f"it cannot be installed: {said[-1]}")


# It takes the newest node-server by itself, with which every stream is a 500 (headers are immutable).
_PORTKEY = {
    "private": True,
    "dependencies": {"@portkey-ai/gateway": "1.15.2"},
    "overrides": {"@hono/node-server": "1.13.7"},
}

_LITELLM = """
model_list:
  - model_name: "gpt-*"
    litellm_params:
      model: "openai/gpt-*"
      api_base: "http://127.0.0.1:%(provider)d/v1"
      api_key: "sk-bench-openai"
general_settings:
  master_key: "%(key)s"
"""
