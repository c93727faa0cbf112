"""`make up`, `make down`, `make logs`: a gateway on this machine, with an account, a key and a first stream to look at.

In containers where Docker answers, else as one background process with the embedded Postgres and Valkey. Nothing but
the standard library is used, so that the Docker way needs no environment. All state is in `.gateway`:

  gateway.pid   number and port of the process, which inherits our lock on the file: locked means running
  gateway.log   what it writes
  dev.env       base URL, key and account, for shells and scripts to source
"""

import fcntl
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

STATE = Path(".gateway")
PID, LOG, LOGIN = STATE / "gateway.pid", STATE / "gateway.log", STATE / "dev.env"

_READY = 60.0  # seconds; a first start makes a database, Docker's first one also pulls and builds before this counts
_STOP = 130.0  # seconds; open streams may go on for GATEWAY_DRAIN_TIMEOUT, by default 110
_POLL = 0.05  # seconds
_DEMO_MODEL = "mock-gpt?pace_ms=30"  # slow enough to see each token come
_TIMEOUT = 30.0  # seconds for an answer


class LocalError(Exception):
    """What is wrong and what helps, for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Login:
    base_url: str
    api_key: str
    email: str
    password: str


def main(argv: Sequence[str]) -> int:
    commands = {"up": up, "down": down, "logs": logs}
    if len(argv) != 1 or argv[0] not in commands:
        _say(f"usage: python -m gateway.local {'|'.join(commands)}")
        return 2
    try:
        commands[argv[0]]()
    except LocalError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def up() -> None:
    STATE.mkdir(exist_ok=True)
    environ = _environment()
    address, was_running = _Address(_client_host(environ), _port(environ)), True
    if running := _running():
        _say(f"The gateway is already running (process {running.pid}); nothing was changed.")
        address = _Address(address.host, running.port)
    elif not _docker_answers():
        was_running = False
        _start_process(environ, address.port)
    elif _containers_run(environ):
        _say("The gateway is already running in Docker; nothing was changed.")
    else:
        was_running = False
        _start_containers(environ)
    _wait_until_ready(address)
    login = _login(address)
    if not was_running:
        _show_stream(address, login)
    _show_lines(login)


def down() -> None:
    running = _running()
    if running:
        _stop_process(running)
    elif _docker_answers() and _containers_run(_environment()):
        _compose(_environment(), "down")
        _say("Stopped. The data is kept in Docker's volumes.")
    else:
        _say("The gateway is not running.")


def logs() -> None:
    if not _running() and _docker_answers() and _containers_run(_environment()):
        os.execvp("docker", ["docker", "compose", "logs", "--follow", "gateway"])  # noqa: S606, S607
    if not LOG.exists():
        raise LocalError("There is no log yet: `make up` starts the gateway.")
    os.execvp("tail", ["tail", "-n", "100", "-F", str(LOG)])  # noqa: S606, S607


# --- as a process -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Running:
    pid: int
    port: int


@dataclass(frozen=True, slots=True)
class _Address:
    host: str
    port: int


def _running() -> _Running | None:
    try:
        file = PID.open()
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, _, port = file.read().partition(" ")
            if not port:
                raise LocalError("Another `make up` is starting the gateway right now.") from None
            return _Running(int(pid), int(port))
    return None


def _start_process(environ: Mapping[str, str], port: int) -> None:
    _say("No Docker here: starting the gateway as a process, with a Postgres and a Valkey of its own.")
    _refuse_busy_port(environ.get("HOST", "").strip() or "127.0.0.1", port)
    PID.unlink(missing_ok=True)  # nobody holds the old one
    lock = os.open(PID, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with LOG.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "serve"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ,
            pass_fds=(lock,),
            start_new_session=True,
        )
    os.write(lock, f"{process.pid} {port}".encode())
    os.close(lock)


def _refuse_busy_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise LocalError(f"Port {port} cannot be used ({error.strerror}); try PORT={port + 1} make up.") from None


def _wait_until_ready(address: _Address) -> None:
    started = time.monotonic()
    while not _is_ready(address):
        died = PID.exists() and not _running()
        if died or time.monotonic() - started > _READY:
            raise LocalError(f"The gateway did not become ready. The end of {LOG}:\n{_end_of_log()}")
        time.sleep(_POLL)


def _is_ready(address: _Address) -> bool:
    try:
        return _request(address, "GET", "/health/ready").status == 200
    except (OSError, http.client.HTTPException):
        return False


def _end_of_log() -> str:
    lines = LOG.read_text(errors="replace").splitlines() if LOG.exists() else []
    return "\n".join(f"  {line}" for line in lines[-15:]) or "  (it is empty)"


def _stop_process(running: _Running) -> None:
    os.kill(running.pid, signal.SIGTERM)
    started, patient = time.monotonic(), False
    while _running():
        waited = time.monotonic() - started
        if waited > _STOP:
            os.kill(running.pid, signal.SIGKILL)
        if waited > 2 and not patient:
            _say("Waiting for open streams to end.")
            patient = True
        time.sleep(_POLL)
    PID.unlink()
    _say(f"Stopped. The data is kept in {STATE}/data.")


# --- in containers ------------------------------------------------------------------------------------------------


def _docker_answers() -> bool:
    if not shutil.which("docker"):
        return False
    # Needs both the daemon and the compose plugin, which `docker info` does not.
    asked = subprocess.run(["docker", "compose", "ls"], capture_output=True, check=False)  # noqa: S607
    return asked.returncode == 0


def _containers_run(environ: Mapping[str, str]) -> bool:
    return bool(_compose(environ, "ps", "--status", "running", "--quiet", "gateway").strip())


def _start_containers(environ: Mapping[str, str]) -> None:
    _say("Docker answers: starting the gateway, Postgres and Redis with docker compose.")
    PID.unlink(missing_ok=True)  # of a process that is gone
    if not environ.get("POSTGRES_PASSWORD"):
        _add_password(Path(".env"))
    _compose(_environment(), "up", "--detach", "--build", "--wait")


def _add_password(file: Path) -> None:
    """For Postgres, and for the gateway to reach it. Made once: the database keeps its first one."""
    file.touch(0o600)
    text = file.read_text()
    separator = "\n" if text and not text.endswith("\n") else ""
    file.write_text(f"{text}{separator}POSTGRES_PASSWORD={secrets.token_hex(24)}\n")


def _compose(environ: Mapping[str, str], *arguments: str) -> str:
    """Its output; its progress and complaints go to the terminal. Any password will do to ask or to stop."""
    command = ["docker", "compose", *arguments]
    known = {"POSTGRES_PASSWORD": "unknown", **environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=known, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise LocalError(f"`{' '.join(command)}` failed, as said above.")
    return done.stdout


# --- account and key ----------------------------------------------------------------------------------------------


def _login(address: _Address) -> Login:
    """The login of dev.env if its key still works, else a new key, for a new account if need be."""
    known = _read_env(LOGIN)
    login = Login(
        base_url=f"http://{address.host}:{address.port}/v1",
        api_key=known.get("GATEWAY_API_KEY", ""),
        email=known.get("DEV_EMAIL", ""),
        password=known.get("DEV_PASSWORD", ""),
    )
    if not login.api_key or _request(address, "GET", "/v1/models", api_key=login.api_key).status != 200:
        email, password = _account(address, login.email, login.password)
        login = replace(login, api_key=_make_key(address, email, password), email=email, password=password)
    _write_login(login)
    return login


def _account(address: _Address, email: str, password: str) -> tuple[str, str]:
    """An account that exists: the given one, made if it does not, or another if there was none to give."""
    for candidate in (email or "dev@example.com", f"dev-{secrets.token_hex(4)}@example.com"):
        login = {"email": candidate, "password": password or secrets.token_urlsafe(18)}
        registered = _request(address, "POST", "/auth/register", login)
        if registered.status == 201 or (registered.status == 409 and password):
            return login["email"], login["password"]
        if registered.status != 409:
            break
    raise LocalError(f"The gateway made no account: {registered.message}")


def _make_key(address: _Address, email: str, password: str) -> str:
    wanted: dict[str, Any] = {"email": email, "password": password, "key_name": "make up"}
    unlimited = {"requests_per_minute": 0, "concurrent_requests": 0}
    made = _request(address, "POST", "/auth/keys", {**wanted, **unlimited})
    if made.status == 403:  # somebody else is the admin; then the deployment's limits are ours too
        made = _request(address, "POST", "/auth/keys", wanted)
    if made.status != 201:
        raise LocalError(f"The gateway made no key: {made.message} Remove {LOGIN} to begin with a new account.")
    return str(json.loads(made.body)["api_key"])


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


def _show_stream(address: _Address, login: Login) -> None:
    """One completion of the built-in mock provider, each token printed when it comes."""
    question = {"role": "user", "content": "Hello! What are you?"}
    body = {"model": _DEMO_MODEL, "messages": [question], "stream": True}
    connection, answer = _send(address, "POST", "/v1/chat/completions", body, login.api_key)
    if answer.status != 200:
        _say(f"No first stream: {_Answer(answer.status, answer.read()).message}")
        connection.close()
        return
    _say("\nA first stream, from the built-in mock-gpt:\n")
    while line := answer.readline():
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                sys.stdout.write(choice["delta"].get("content") or "")
                sys.stdout.flush()
    connection.close()
    _say("")


def _show_lines(login: Login) -> None:
    body = '{"model": "mock-gpt", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'
    messages = '[{"role": "user", "content": "Hello"}]'
    _say(
        f"""
Base URL  {login.base_url}
API key   {login.api_key}
Both are in {LOGIN}, with the account.

A shell:
  curl -N {login.base_url}/chat/completions -H "Authorization: Bearer {login.api_key}" \\
    -H "Content-Type: application/json" -d '{body}'

Python:
  from openai import OpenAI
  client = OpenAI(base_url="{login.base_url}", api_key="{login.api_key}")
  print(client.chat.completions.create(model="mock-gpt", messages={messages}).choices[0].message.content)
"""
    )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


# --- requests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes

    @property
    def message(self) -> str:
        try:
            return str(json.loads(self.body)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return f"HTTP {self.status}"


def _request(
    address: _Address, method: str, path: str, body: Mapping[str, Any] | None = None, api_key: str = ""
) -> _Answer:
    connection, answer = _send(address, method, path, body, api_key)
    try:
        return _Answer(answer.status, answer.read())
    finally:
        connection.close()


def _send(
    address: _Address, method: str, path: str, body: Mapping[str, Any] | None, api_key: str
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    headers = {"Content-Type": "application/json"} if body else {}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    connection = http.client.HTTPConnection(address.host, address.port, timeout=_TIMEOUT)
    connection.request(method, path, json.dumps(body) if body else None, headers)
    return connection, connection.getresponse()


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


def _port(environ: Mapping[str, str]) -> int:
    text = environ.get("PORT", "").strip() or "3000"
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise LocalError(f"PORT={text} is not a port.")
    return int(text)


def _client_host(environ: Mapping[str, str]) -> str:
    host = environ.get("HOST", "").strip()
    return host if host not in ("", "0.0.0.0", "::") else "127.0.0.1"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
