"""A Prometheus beside a gateway that runs as a process, where its program is found; compose.yaml has one of its own."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

from gateway.local_client import Address, is_ready
from gateway.local_process import POLL, Background, LocalError, listen_error, say

CONFIG = Path("grafana/prometheus/prometheus.yml")
UNPACKED = Path(".venv/prometheus/usr/bin")  # by `make test`

_HOST = "127.0.0.1"  # it has no password
_PORTS = 10  # how many are tried
_READY = 20.0  # seconds
_STOP = 20.0  # seconds
_KEPT = ("--storage.tsdb.retention.time=15d", "--storage.tsdb.retention.size=1GB")


def ensure(state: Path, data: Path, gateway: Address, port: int) -> str:
    """The address of a Prometheus that scrapes this gateway, started if it does not run; empty: there is none.

    `state` is the folder of pid files and logs; it listens on `port` or the next free one. Never raises: a gateway is a
    gateway without it, too.
    """
    program = shutil.which("prometheus") or shutil.which("prometheus", path=str(UNPACKED))
    if not program or not CONFIG.exists():
        return ""
    background = _background(state)
    try:
        changed = _write_config(state / "prometheus.yml", gateway)
        running = background.running()
        if running is None:
            port = _free_port(port)
            background.start(_command(program, state, data, port), {}, port)
            _wait_until_ready(background, port)
            return f"http://localhost:{port}"
        if changed:
            os.kill(running.pid, signal.SIGHUP)  # it reads its configuration again
        return f"http://localhost:{running.port}"
    except (LocalError, OSError) as error:
        say(f"No Prometheus: {error}")
        return ""


def stop(state: Path) -> None:
    background = _background(state)
    if running := background.running():
        background.stop(running, _STOP, "Waiting for Prometheus to write what it has.")


def _background(state: Path) -> Background:
    return Background("Prometheus", state / "prometheus.pid", state / "prometheus.log")


def _write_config(file: Path, gateway: Address) -> bool:
    """The one of compose.yaml's Prometheus with this gateway's address. True: it is another one than before."""
    text = CONFIG.read_text().replace("gateway:3000", json.dumps(gateway.authority))
    text = text.replace("- rules.yml", f"- {json.dumps(str(CONFIG.with_name('rules.yml').resolve()))}")
    if file.exists() and file.read_text() == text:
        return False
    file.write_text(text)
    return True


def _free_port(first: int) -> int:
    for port in range(first, min(first + _PORTS, 65536)):
        if listen_error(_HOST, port) is None:
            return port
    raise LocalError(f"no port from {first} on is free; try another PROMETHEUS_PORT.")


def _command(program: str, state: Path, data: Path, port: int) -> list[str]:
    command = [program, f"--config.file={state / 'prometheus.yml'}", f"--storage.tsdb.path={data / 'prometheus'}"]
    command += [*_KEPT, f"--web.listen-address={_HOST}:{port}", "--log.level=warn"]
    # Debian's has its page's files beside it, wherever it was unpacked; nobody else's knows this flag.
    assets = Path(program).parents[1] / "share" / "prometheus" / "web"
    return [*command, f"--web.local-assets={assets}"] if assets.exists() else command


def _wait_until_ready(background: Background, port: int) -> None:
    started = time.monotonic()
    while not is_ready(Address(_HOST, port), "/-/ready"):
        if background.has_died() or time.monotonic() - started > _READY:
            raise LocalError(f"it did not become ready. The end of {background.log}:\n{background.last_words()}")
        time.sleep(POLL)
