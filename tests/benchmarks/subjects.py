"""What is measured: each a way to start it in front of the provider, on a core of its own, and to know its processes."""

import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.embedded import Embedded
from tests.benchmarks.processes import tree
from tests.benchmarks.wire import OPENAI

_READY = 60.0  # seconds
_MUCH = 1_000_000  # of a limit that counts and never refuses


@dataclass(frozen=True, slots=True)
class Subject:
    """What runs and answers. `cpu` is measured of all processes in `pids`."""

    name: str
    port: int
    pids: Sequence[int] = ()
    token: str = "none"
    translated: bool = False  # it is asked in OpenAI's dialect, whatever the provider's
    headers: Sequence[str] = ()  # `Name: value`, sent with every request


@dataclass(frozen=True, slots=True)
class Cores:
    """The subject has one for itself, when there are two; provider, load and stores share the others."""

    subject: frozenset[int]
    tools: frozenset[int]

    @property
    def all(self) -> list[int]:
        return sorted(self.subject | self.tools)


def share_cores() -> Cores:
    """Moves us, and so all that we start, to the tools' cores."""
    first, *others = sorted(os.sched_getaffinity(0))
    cores = Cores(frozenset({first}), frozenset(others or {first}))
    os.sched_setaffinity(0, cores.tools)
    return cores


class Bench:
    """Starts and ends everything: the stores and the provider once, subjects by their names."""

    def __init__(self, root: Path, cores: Cores) -> None:
        self.root = root
        self.cores = cores
        self._opened = ExitStack()
        self._stores = Embedded(root / "stores", postgres=True, redis=True)

    def __enter__(self) -> "Bench":
        self._stores.start()
        self._opened.callback(self._stores.stop)
        self._servers = tree(os.getpid())[1:]
        provider = self._opened.enter_context(
            self._running([sys.executable, "-m", "tests.benchmarks.provider"], "provider")
        )
        self.direct = Subject("direct", _printed_port(provider), (provider.pid,))
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    @property
    def store_pids(self) -> list[int]:
        """Postgres has a process for each connection, and so others from time to time."""
        return sorted({pid for server in self._servers for pid in tree(server)})

    @contextmanager
    def confined(self, cores: int) -> Iterator[None]:
        """All that runs, tools and subjects, shares that many cores; afterwards subjects that run still do."""
        _move(tree(os.getpid()), self.cores.all[:cores])
        try:
            yield
        finally:
            _move([os.getpid(), *self.store_pids, *self.direct.pids], self.cores.tools)

    @contextmanager
    def nginx(self) -> Iterator[Subject]:
        """One worker, unbuffered, with connections kept on both sides, and no log."""
        folder, port = self.root / "nginx", free_port()
        folder.mkdir(exist_ok=True)
        (folder / "nginx.conf").write_text(_NGINX % {"port": port, "provider": self.direct.port})
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None:
            raise FileNotFoundError("nginx")
        command = [program, "-p", str(folder), "-e", "error.log", "-c", "nginx.conf"]
        with self.answering(command, "nginx", port) as process:
            while len(pids := tree(process.pid)) < 2:  # it listens before its worker is there
                time.sleep(0.002)
            yield Subject("nginx", port, pids)

    @contextmanager
    def relay(self) -> Iterator[Subject]:
        """The yardstick of relay.py."""
        command = [sys.executable, "-m", "tests.benchmarks.relay", str(self.direct.port)]
        with self._running(command, "relay", cores=self.cores.subject) as process:
            yield Subject("relay", _printed_port(process), tree(process.pid))

    @contextmanager
    def gateway(self, *, program: Sequence[str] = ("-m", "gateway"), workers: int = 0) -> Iterator[Subject]:
        """Everything on: keys, limits, journal, metrics, logs. `workers`: processes, 0 for the default, which is one.
        More than one have a supervisor; its CPU and memory are counted as theirs."""
        port = free_port()
        command = [
            sys.executable,
            *program,
            "serve",
            "--port",
            str(port),
            *(["--workers", str(workers)] * (workers > 0)),
        ]
        with self.answering(command, "gateway", port, self._gateway_environ()) as process:
            assert process.stdout is not None
            process.stdout.readline()  # it says that all are ready: before, one of several workers may listen alone
            yield Subject("gateway", port, tree(process.pid), new_key(port), translated=True)

    def start_seconds(self, token: str) -> float:
        """From the start of a gateway's process to the end of its first answer to a chat request, 200.

        The stores are up, their tables made, and the key is one of theirs.
        """
        port = free_port()
        command = [sys.executable, "-m", "gateway", "serve", "--port", str(port)]
        began = time.monotonic()
        with self.answering(command, "gateway", port, self._gateway_environ()):
            ask(port, token)
            return time.monotonic() - began

    def _gateway_environ(self) -> dict[str, str]:
        address = f"http://127.0.0.1:{self.direct.port}"
        return {
            "DATABASE_URL": self._stores.database_url,
            "REDIS_URL": self._stores.redis_url,
            "OPENAI_BASE_URL": f"{address}/v1",
            "OPENAI_API_KEY": "sk-bench-openai",
            "ANTHROPIC_BASE_URL": address,
            "ANTHROPIC_API_KEY": "sk-bench-anthropic",
            "OLLAMA_BASE_URL": address,
            "ENVIRONMENT": "production",
            # Each has a journal of its own: two gateways at once may not share one.
            "GATEWAY_DATA_DIR": tempfile.mkdtemp(dir=self.root),
        }

    @contextmanager
    def answering(
        self, command: Sequence[str], name: str, port: int, environ: Mapping[str, str] | None = None
    ) -> Iterator["subprocess.Popen[str]"]:
        """A subject's process, once it listens on its port. Raises RuntimeError with its last words when it does not."""
        with self._running(command, name, environ, self.cores.subject) as process:
            deadline = time.monotonic() + _READY
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log = (self.root / f"{name}.log").read_text(errors="replace").strip()
                    raise RuntimeError(f"{name} does not answer: {log[-500:]}")
                time.sleep(0.002)
            yield process

    @contextmanager
    def _running(
        self,
        command: Sequence[str],
        name: str,
        environ: Mapping[str, str] | None = None,
        cores: frozenset[int] | None = None,
    ) -> Iterator[subprocess.Popen[str]]:
        """A process that writes its errors to a file of its name, told to end when the block does."""
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
        with (self.root / f"{name}.log").open("ab") as log:
            with _on(cores or self.cores.tools):
                process = subprocess.Popen(
                    command, env={**kept, **(environ or {})}, stdout=subprocess.PIPE, stderr=log, text=True
                )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _move(pids: Iterable[int], cores: Iterable[int]) -> None:
    """Every thread of these processes, but of those that are gone."""
    for pid in pids:
        with suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores)


@contextmanager
def _on(cores: frozenset[int]) -> Iterator[None]:
    """What is started here runs on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def free_port() -> int:
    """Below the range of outgoing connections (ip(7)): in it, one that waits for the port may connect to itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def _printed_port(process: "subprocess.Popen[str]") -> int:
    """What it prints when it listens."""
    assert process.stdout is not None
    return int(process.stdout.readline())


def _listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def ask(port: int, token: str = "") -> None:
    """For a whole answer. Raises RuntimeError for any status but 200, OSError."""
    _post(port, OPENAI.path, json.loads(OPENAI.request(0, 0)), status=200, token=token)


def new_key(port: int, **limits: Any) -> str:
    """A key with limits that count every request and refuse none; the account is made when it is the first."""
    login = {"email": "admin@example.com", "password": "correct horse battery"}
    with suppress(RuntimeError):  # there is one
        _post(port, "/auth/register", login)
    limits = {"requests_per_minute": _MUCH, "concurrent_requests": _MUCH, **limits}
    key: str = _post(port, "/auth/keys", {**login, "key_name": "bench", **limits})["api_key"]
    return key


def _post(port: int, path: str, fields: Mapping[str, Any], *, status: int = 201, token: str = "") -> dict[str, Any]:
    """The answer's fields. Raises RuntimeError for any other status."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST", path, json.dumps(fields), headers)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != status:
        raise RuntimeError(f"{path}: {response.status} {body.decode()}")
    answer: dict[str, Any] = json.loads(body)
    return answer


_NGINX = """
daemon off;
worker_processes 1;
worker_rlimit_nofile 20000;
pid nginx.pid;
error_log error.log;
events { worker_connections 9000; }
http {
    access_log off;
    client_body_temp_path client;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    upstream provider {
        server 127.0.0.1:%(provider)d;
        keepalive 4096;
        keepalive_requests 1000000000;
    }
    server {
        listen 127.0.0.1:%(port)d backlog=4096;
        keepalive_requests 1000000000;
        client_body_buffer_size 64k;
        location / {
            proxy_pass http://provider;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }
    }
}
"""
