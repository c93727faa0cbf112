"""Other gateways, each installed on its own into a folder of this project when it is asked for.

A peer that cannot be had, without a network or without Node, is named in the output and left out.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.benchmarks.processes import tree
from tests.benchmarks.subjects import Bench, Subject, free_port

FOLDER = Path(__file__).parents[2] / ".bench"
_INSTALL = 900.0  # seconds


class PeerMissing(Exception):
    """One line that says why it cannot be measured."""


@contextmanager
def litellm(bench: Bench) -> Iterator[Subject]:
    """Its proxy with one worker and a master key, without a database: it counts and limits nothing."""
    program = FOLDER / "litellm" / "bin" / "litellm"
    if not program.exists():
        _install([sys.executable, "-m", "venv", str(FOLDER / "litellm")])
        _install([str(program.with_name("pip")), "install", "--quiet", "litellm[proxy]==1.106.2"])
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


PEERS: Mapping[str, Callable[[Bench], AbstractContextManager[Subject]]] = {"litellm": litellm, "portkey": portkey}


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
