"""`make up`, `make down`, `make logs`: a gateway on this machine, with an account, a key and a first stream to look at.

In containers where Docker answers, else as one background process with the embedded Postgres and Valkey, and a
Prometheus beside it where there is one. Nothing but the standard library is used, here and in what this imports, so
that the Docker way needs no environment. All state is in `.gateway`:

  gateway.pid, gateway.log         the process, as local_process.py says, and what it writes
  prometheus.pid, .log, .yml       the same of Prometheus, and its configuration
  dev.env                          base URL, key and account, for shells and scripts to source
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from gateway import local_docker as docker
from gateway import local_prometheus as prometheus
from gateway.local_client import Address, Login, is_ready, stream, working_login
from gateway.local_process import POLL, Background, LocalError, listen_error, say

STATE = Path(".gateway")
GATEWAY = Background("the gateway", STATE / "gateway.pid", STATE / "gateway.log")
LOGIN = STATE / "dev.env"

_READY = 60.0  # seconds; a first start makes a database, Docker's first one also pulls and builds before this counts
_STOP = 130.0  # seconds; open streams may go on for GATEWAY_DRAIN_TIMEOUT, by default 110
_DEMO_MODEL = "mock-gpt?pace_ms=30"  # slow enough to see each token come
_USAGE = "usage: python -m gateway.local up|down|logs [ID]"


@dataclass(frozen=True, slots=True)
class _Urls:
    """For a browser; empty: there is none."""

    page: str
    grafana: str = ""
    prometheus: str = ""


def main(argv: Sequence[str]) -> int:
    commands: dict[tuple[str, int], Callable[..., None]] = {
        ("up", 0): up,
        ("down", 0): down,
        ("logs", 0): follow_logs,
        ("logs", 1): show_request,
    }
    command = commands.get((argv[0] if argv else "", len(argv) - 1))
    if command is None:
        say(_USAGE)
        return 2
    try:
        command(*argv[1:])
    except LocalError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def up() -> None:
    STATE.mkdir(exist_ok=True)
    environ = _environment()
    running = GATEWAY.running()
    in_docker = running is None and docker.answers()
    # All that it shows: a port that was taken may have kept Prometheus and Grafana from starting beside a gateway.
    was_running = running is not None or (in_docker and docker.runs(environ, "gateway", "prometheus", "grafana"))
    address = Address(_client_host(environ), running.port if running else _port(environ, "PORT", 3000))
    if was_running:
        where = f"(process {running.pid})" if running else "in Docker"
        say(f"The gateway is already running {where}; nothing was changed.")
    elif in_docker:
        _start_containers(environ)
    else:
        _start_process(environ, address.port)
    _wait_until_ready(address)
    login = _login(address)
    if not was_running:
        _show_stream(address, login)
    _show_examples(login)
    _show_addresses(login, _urls(environ, address, in_docker=in_docker))


def down() -> None:
    running = GATEWAY.running()
    if running:
        GATEWAY.stop(running, _STOP, "Waiting for open streams to end.")
        say(f"Stopped. The data is kept in {STATE}/data.")
    elif docker.answers() and docker.runs(_environment()):
        docker.stop(_environment())
        say("Stopped. The data is kept in Docker's volumes.")
    else:
        say("The gateway is not running.")
    prometheus.stop(STATE)  # also one whose gateway was killed


def follow_logs() -> None:
    if _is_in_docker():
        os.execvp("docker", ["docker", "compose", "logs", "--follow", "gateway"])  # noqa: S606, S607
    _need_log()
    os.execvp("tail", ["tail", "-n", "100", "-F", str(GATEWAY.log)])  # noqa: S606, S607


def show_request(request_id: str) -> None:
    """Every line of the log that concerns a request, by its id or the one that its client gave it."""
    if _is_in_docker():
        found = _print_lines(docker.log_lines(_environment()), request_id)
    else:
        _need_log()
        with GATEWAY.log.open(errors="replace") as log:
            found = _print_lines(log, request_id)
    if not found:
        raise LocalError(f"No line of the log has {request_id}.")


def _print_lines(lines: Iterable[str], request_id: str) -> bool:
    found = wanted = False
    for line in lines:
        # An exception's places follow its line in development, indented.
        wanted = request_id in line or (wanted and line.startswith("    "))
        if wanted:
            found = True
            say(line.rstrip("\n"))
    return found


def _is_in_docker() -> bool:
    return not GATEWAY.running() and docker.answers() and docker.runs(_environment())


def _need_log() -> None:
    if not GATEWAY.log.exists():
        raise LocalError("There is no log yet: `make up` starts the gateway.")


# --- starting -----------------------------------------------------------------------------------------------------


def _start_process(environ: Mapping[str, str], port: int) -> None:
    say("No Docker here: starting the gateway as a process, with a Postgres and a Valkey of its own.")
    if error := listen_error(environ.get("HOST", "").strip() or "127.0.0.1", port):
        raise LocalError(f"Port {port} cannot be used ({error.strerror}); try PORT={port + 1} make up.")
    GATEWAY.start([sys.executable, "-m", "gateway", "serve"], environ, port)


def _start_containers(environ: Mapping[str, str]) -> None:
    say("Docker answers: starting the gateway, Postgres, Redis, Prometheus and Grafana with docker compose.")
    GATEWAY.pid_file.unlink(missing_ok=True)  # of a process that is gone
    docker.start(environ)


def _wait_until_ready(address: Address) -> None:
    started = time.monotonic()
    while not is_ready(address):
        if GATEWAY.has_died() or time.monotonic() - started > _READY:
            raise LocalError(f"The gateway did not become ready. The end of {GATEWAY.log}:\n{GATEWAY.last_words()}")
        time.sleep(POLL)


def _urls(environ: Mapping[str, str], address: Address, *, in_docker: bool) -> _Urls:
    by_name = Address("localhost", address.port) if address.host == "127.0.0.1" else address
    page = f"http://{by_name.authority}/dashboard"
    if in_docker:
        return _Urls(page, docker.url(environ, "grafana", 3000), docker.url(environ, "prometheus", 9090))
    data = Path(environ.get("GATEWAY_DATA_DIR", "").strip() or STATE / "data")
    port = _port(environ, "PROMETHEUS_PORT", 9090)
    return _Urls(page, prometheus=prometheus.ensure(STATE, data, address, port))


# --- the login ----------------------------------------------------------------------------------------------------


def _login(address: Address) -> Login:
    known = _read_env(LOGIN)
    login = Login(
        base_url=f"http://{address.authority}/v1",
        api_key=known.get("GATEWAY_API_KEY", ""),
        email=known.get("DEV_EMAIL", ""),
        password=known.get("DEV_PASSWORD", ""),
    )
    login = working_login(address, login)
    _write_login(login)
    return login


def _write_login(login: Login) -> None:
    text = f"""\
# Written by `make up`. Source it in a shell, or read it with the tools you have.
GATEWAY_BASE_URL={login.base_url}
GATEWAY_API_KEY={login.api_key}
# The account that owns the key.
DEV_EMAIL={login.email}
DEV_PASSWORD={login.password}
"""
    if LOGIN.exists() and LOGIN.read_text() == text:
        return
    LOGIN.touch(0o600)
    LOGIN.write_text(text)


# --- what is shown ------------------------------------------------------------------------------------------------


def _show_stream(address: Address, login: Login) -> None:
    """One completion of the built-in mock provider, each token printed when it comes."""
    pieces = stream(address, login.api_key, _DEMO_MODEL, "Hello! What are you?")
    try:
        first = next(pieces, "")
    except LocalError as error:
        say(f"No first stream: {error}")
        return
    say("\nA first stream, from the built-in mock-gpt:\n")
    for piece in chain([first], pieces):
        sys.stdout.write(piece)
        sys.stdout.flush()
    say("")


def _show_examples(login: Login) -> None:
    body = '{"model": "mock-gpt", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'
    messages = '[{"role": "user", "content": "Hello"}]'
    say(
        f"""
A shell:
  curl -N {login.base_url}/chat/completions -H "Authorization: Bearer {login.api_key}" \\
    -H "Content-Type: application/json" -d '{body}'

Python:
  from openai import OpenAI
  client = OpenAI(base_url="{login.base_url}", api_key="{login.api_key}")
  print(client.chat.completions.create(model="mock-gpt", messages={messages}).choices[0].message.content)
"""
    )


def _show_addresses(login: Login, urls: _Urls) -> None:
    account = f"sign in as {login.email} with {login.password}" if login.password else ""
    lines = [
        ("Base URL", login.base_url, ""),
        ("API key", login.api_key, ""),
        ("Page", urls.page, account),
        ("Grafana", urls.grafana, "admin, admin"),
        ("Prometheus", urls.prometheus, ""),
    ]
    for name, value, note in lines:
        if value:
            say(f"{name:<12}{value}{f'  ({note})' if note else ''}")
    say(f"Base URL, key and account are also in {LOGIN}.")


# --- settings -----------------------------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    """The settings of .env, as docker compose reads them too; what the shell says wins."""
    return {**_read_env(Path(".env")), **os.environ}


def _read_env(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    lines = (line.strip() for line in file.read_text().splitlines())
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip().strip("'\"") for name, _, value in pairs}


def _port(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "").strip() or str(default)
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise LocalError(f"{name}={text} is not a port.")
    return int(text)


def _client_host(environ: Mapping[str, str]) -> str:
    host = environ.get("HOST", "").strip()
    return host if host not in ("", "0.0.0.0", "::") else "127.0.0.1"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
