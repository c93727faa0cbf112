import fcntl
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from gateway import local, local_process, local_prometheus
from gateway.local_client import Address
from tests.support.programs import program

pytestmark = pytest.mark.integration

ROOT = Path(local.__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def checkout(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run in, on a machine without Docker; what was started in it is stopped."""
    (tmp_path / "bin").mkdir()
    for name in ("DATABASE_URL", "REDIS_URL", "HOST", "ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(local, "_DEMO_MODEL", "mock-gpt")  # at once
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PORT", str(port))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield tmp_path
    local.main(["down"])
    shutil.rmtree(tmp_path)  # pytest keeps the folders of three runs, and a database is 40 MB


def status_with(login: dict[str, str]) -> int:
    """What a client gets that uses the base URL and the key of dev.env."""
    address = re.fullmatch(r"http://127.0.0.1:(\d+)/v1", login["GATEWAY_BASE_URL"])
    assert address
    return get(int(address[1]), "/v1/models", {"Authorization": f"Bearer {login['GATEWAY_API_KEY']}"})[0]


def get(port: int, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def login() -> dict[str, str]:
    return local._read_env(local.LOGIN)


def pid() -> int:
    running = local.GATEWAY.running()
    assert running
    return running.pid


# --- as a process -------------------------------------------------------------------------------------------------


def test_up_leaves_a_running_gateway_a_working_key_and_shows_how_to_use_it(
    checkout: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert local.main(["up"]) == 0
    shown = capsys.readouterr().out
    assert "No Docker here" in shown
    assert "A first stream, from the built-in mock-gpt:" in shown
    assert f"Base URL    http://127.0.0.1:{port}/v1\n" in shown
    assert f"API key     {login()['GATEWAY_API_KEY']}\n" in shown
    account = f"sign in as {login()['DEV_EMAIL']} with {login()['DEV_PASSWORD']}"
    assert f"Page        http://localhost:{port}/dashboard  ({account})\n" in shown
    assert "Prometheus" not in shown, "there is none here"
    assert "curl -N http" in shown
    assert "from openai import OpenAI" in shown
    assert status_with(login()) == 200
    assert local.LOGIN.stat().st_mode & 0o777 == 0o600


def test_the_first_stream_arrives_token_by_token(checkout: Path) -> None:
    command = [sys.executable, "-m", "gateway.local", "up"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        pieces = []
        while piece := os.read(process.stdout.fileno(), 4096):
            pieces.append((time.monotonic(), piece))
    heading = next(i for i, (_, piece) in enumerate(pieces) if b"A first stream" in piece)
    examples = next(i for i, (_, piece) in enumerate(pieces) if b"A shell:" in piece)
    tokens = pieces[heading + 1 : examples]
    assert len(tokens) > 10
    assert tokens[-1][0] - tokens[0][0] > 0.02 * len(tokens)


def test_a_second_up_changes_nothing_and_says_so(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local.main(["up"])
    before, files = pid(), {file: file.stat().st_mtime_ns for file in (local.GATEWAY.pid_file, local.LOGIN)}
    capsys.readouterr()
    assert local.main(["up"]) == 0
    shown = capsys.readouterr().out
    assert f"already running (process {before}); nothing was changed" in shown
    assert "first stream" not in shown
    assert f"API key     {login()['GATEWAY_API_KEY']}" in shown
    assert (pid(), {file: file.stat().st_mtime_ns for file in files}) == (before, files)


def test_the_python_that_is_shown_runs(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local.main(["up"])
    code = textwrap.dedent(capsys.readouterr().out.partition("Python:\n")[2].partition("\n\n")[0])
    assert len(code.strip().splitlines()) == 3
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Hello from the mock provider.")


def test_down_stops_it_and_the_next_up_finds_account_and_key_again(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local.main(["up"])
    before = login()
    assert local.main(["down"]) == 0
    assert "Stopped. The data is kept in .gateway/data." in capsys.readouterr().out
    assert local.GATEWAY.running() is None
    local.main(["up"])
    assert login() == before
    assert status_with(before) == 200


def test_down_without_a_gateway_says_so(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(["down"]) == 0
    assert capsys.readouterr().out == "The gateway is not running.\n"


def test_a_killed_gateway_is_not_taken_for_a_running_one(checkout: Path) -> None:
    local.main(["up"])
    killed = pid()
    os.kill(killed, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while local.GATEWAY.running():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert local.main(["up"]) == 0
    assert pid() != killed
    assert status_with(login()) == 200


def test_a_lost_dev_env_is_made_anew_with_another_account(checkout: Path) -> None:
    local.main(["up"])
    first = login()
    local.LOGIN.unlink()
    assert local.main(["up"]) == 0
    assert login()["DEV_EMAIL"] != first["DEV_EMAIL"]
    assert status_with(login()) == 200


def test_lost_data_is_made_anew_with_the_account_of_dev_env(checkout: Path) -> None:
    local.main(["up"])
    first = login()
    local.main(["down"])
    shutil.rmtree(checkout / ".gateway" / "data")
    assert local.main(["up"]) == 0
    assert login()["DEV_PASSWORD"] == first["DEV_PASSWORD"]
    assert login()["GATEWAY_API_KEY"] != first["GATEWAY_API_KEY"]
    assert status_with(login()) == 200


def test_a_busy_port_is_named_with_a_way_out(checkout: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert local.main(["up"]) == 1
    shown = capsys.readouterr().out
    assert f"Port {port} cannot be used (Address already in use); try PORT={port + 1} make up." in shown


@pytest.mark.parametrize("value", ["web", "0", "70000"])
def test_what_is_no_port_is_refused(
    checkout: Path, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORT", value)
    assert local.main(["up"]) == 1
    assert capsys.readouterr().out == f"PORT={value} is not a port.\n"


def test_a_gateway_that_does_not_start_shows_the_end_of_its_log(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / ".env").write_text("GATEWAY_NONSENSE='1'\n")
    assert local.main(["up"]) == 1
    shown = capsys.readouterr().out
    assert "The gateway did not become ready." in shown
    assert "unknown setting GATEWAY_NONSENSE" in shown


def test_an_address_of_ipv6_stands_in_brackets() -> None:
    assert [Address(host, 3000).authority for host in ("::1", "10.0.0.1")] == ["[::1]:3000", "10.0.0.1:3000"]


def test_settings_of_the_env_file_reach_the_gateway(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / ".env").write_text("# no mock models\nENVIRONMENT=production\n")
    assert local.main(["up"]) == 0
    shown = capsys.readouterr().out
    assert "No first stream: " in shown
    assert status_with(login()) == 200


def test_two_starts_at_once_do_not_get_in_each_others_way(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local.STATE.mkdir()
    with local.GATEWAY.pid_file.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert local.main(["up"]) == 1
    assert capsys.readouterr().out == "Another `make up` is starting the gateway right now.\n"


def test_logs_follow_what_the_gateway_writes(checkout: Path) -> None:
    tail = shutil.which("tail", path="/usr/bin:/bin")
    assert tail
    (checkout / "bin" / "tail").symlink_to(tail)
    local.STATE.mkdir()
    local.GATEWAY.log.write_text("first\n")
    command = [sys.executable, "-m", "gateway.local", "logs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "first\n"
        with local.GATEWAY.log.open("a") as log:
            log.write("second\n")
        assert process.stdout.readline() == "second\n"
        process.terminate()


def test_logs_before_the_first_start_say_so(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(["logs"]) == 1
    assert "There is no log yet" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["sideways"], ["up", "down"], ["logs", "one", "two"]])
def test_an_unknown_command_gets_the_known_ones(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(arguments) == 2
    assert capsys.readouterr().out == "usage: python -m gateway.local up|down|logs [ID]\n"


STORY = """\
08:00:00.000  200        9 ms  POST /v1/chat/completions  id 0001
08:00:00.001  error    access  unhandled  request_id=0002
    ValueError: no
      gateway/x.py:1 x
08:00:00.002  500        9 ms  POST /v1/chat/completions  internal_error  client id mine  id 0002
08:00:00.003  warning  script  Redis is gone
"""


@pytest.mark.parametrize("request_id", ["0002", "mine"])
def test_the_log_of_one_request_is_all_lines_with_its_id_and_what_belongs_to_them(
    checkout: Path, request_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    local.STATE.mkdir()
    local.GATEWAY.log.write_text(STORY)
    assert local.main(["logs", request_id]) == 0
    lines = STORY.splitlines(keepends=True)
    assert capsys.readouterr().out == "".join(lines[1:5] if request_id == "0002" else lines[4:5])


def test_an_id_that_is_not_in_the_log_is_said_to_be_missing(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local.STATE.mkdir()
    local.GATEWAY.log.write_text(STORY)
    assert local.main(["logs", "0003"]) == 1
    assert capsys.readouterr().out == "No line of the log has 0003.\n"


def test_a_requests_id_finds_its_line_in_the_log(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local.main(["up"])
    request = Request(f"{login()['GATEWAY_BASE_URL']}/models", headers={"X-API-Key": login()["GATEWAY_API_KEY"]})
    with urlopen(request) as response:
        request_id = response.headers["X-Request-Id"]
    capsys.readouterr()
    until(lambda: local.main(["logs", request_id]) == 0)
    assert "GET /v1/models" in capsys.readouterr().out.splitlines()[-1]


def test_the_password_is_in_no_log_and_in_a_file_for_its_owner_only(checkout: Path) -> None:
    local.main(["up"])
    logs = [file.read_text(errors="replace") for file in checkout.rglob("*.log")]
    assert logs
    assert [log for log in logs if login()["DEV_PASSWORD"] in log or login()["GATEWAY_API_KEY"] in log] == []
    assert local.LOGIN.stat().st_mode & 0o777 == 0o600


def test_nothing_that_must_be_installed_is_needed() -> None:
    code = (
        "import gateway.local, sys; print([name for name in sys.modules if 'site-packages' in str(sys.modules[name])])"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout == "[]\n"


# --- with a Prometheus --------------------------------------------------------------------------------------------


@pytest.fixture
def prometheus(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine that has one. Answers the port that it should get."""
    (checkout / "bin" / "prometheus").symlink_to(program("prometheus"))
    (checkout / "grafana").symlink_to(ROOT / "grafana")
    port = free_port()
    monkeypatch.setenv("PROMETHEUS_PORT", str(port))
    return port


def running_prometheus() -> local_process.Running | None:
    return local_prometheus._background(local.STATE).running()


def until(true: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def targets(prometheus: int) -> dict[str, str]:
    """The health of each address that it scrapes."""
    found = json.loads(get(prometheus, "/api/v1/targets")[1])["data"]["activeTargets"]
    return {one["labels"]["instance"]: one["health"] for one in found}


def test_where_there_is_a_prometheus_it_scrapes_the_gateway_and_has_the_rules(
    checkout: Path, port: int, prometheus: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert local.main(["up"]) == 0
    shown = capsys.readouterr().out
    assert f"Prometheus  http://localhost:{prometheus}\n" in shown
    until(lambda: targets(prometheus) == {f"127.0.0.1:{port}": "up"})
    assert json.loads(get(prometheus, "/api/v1/rules")[1])["data"]["groups"]
    before, files = running_prometheus(), {file: file.stat().st_mtime_ns for file in local.STATE.glob("prometheus.*")}

    assert local.main(["up"]) == 0, "a second time it changes nothing"
    assert f"Prometheus  http://localhost:{prometheus}\n" in capsys.readouterr().out
    assert running_prometheus() == before
    assert {file: file.stat().st_mtime_ns for file in files} == files

    assert local.main(["down"]) == 0
    assert running_prometheus() is None
    with pytest.raises(ConnectionRefusedError):
        get(prometheus, "/-/ready")


def test_a_prometheus_that_outlived_its_gateway_follows_the_next_one_to_its_port(
    checkout: Path, port: int, prometheus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.main(["up"])
    before = running_prometheus()
    os.kill(pid(), signal.SIGKILL)
    until(lambda: local.GATEWAY.running() is None)
    other = free_port()
    monkeypatch.setenv("PORT", str(other))
    assert local.main(["up"]) == 0
    until(lambda: targets(prometheus) == {f"127.0.0.1:{other}": "up"})
    assert running_prometheus() == before


def ensure_prometheus(checkout: Path, prometheus: int) -> str:
    """Without a gateway, which these tests do not need."""
    local.STATE.mkdir(exist_ok=True)
    return local_prometheus.ensure(local.STATE, checkout / "data", Address("127.0.0.1", 1), prometheus)


def test_a_prometheus_whose_gateway_is_gone_is_stopped_too(checkout: Path, prometheus: int) -> None:
    ensure_prometheus(checkout, prometheus)
    assert running_prometheus()
    assert local.main(["down"]) == 0
    assert running_prometheus() is None


def test_a_busy_port_of_prometheus_is_passed_over(checkout: Path, prometheus: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", prometheus))
        other.listen()
        url = ensure_prometheus(checkout, prometheus)
    found = int(url.rpartition(":")[2])
    assert prometheus < found < prometheus + 10
    assert get(found, "/-/ready")[0] == 200


def test_what_it_keeps_is_bounded_and_only_this_machine_reaches_it(checkout: Path, prometheus: int) -> None:
    ensure_prometheus(checkout, prometheus)
    flags = json.loads(get(prometheus, "/api/v1/status/flags")[1])["data"]
    assert (flags["storage.tsdb.retention.time"], flags["storage.tsdb.retention.size"]) == ("15d", "1GiB")
    assert flags["web.listen-address"] == f"127.0.0.1:{prometheus}"
    assert (checkout / "data" / "prometheus").is_dir()


def test_a_prometheus_that_does_not_start_is_said_and_harms_nobody(
    checkout: Path, prometheus: int, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = checkout / "bin" / "prometheus"
    broken.unlink()
    broken.write_text("#!/bin/sh\necho no room left\nexit 1\n")
    broken.chmod(0o755)
    assert ensure_prometheus(checkout, prometheus) == ""
    shown = capsys.readouterr().out
    assert "No Prometheus: it did not become ready." in shown
    assert "  no room left" in shown


# --- in containers, as far as that goes without Docker ------------------------------------------------------------


class Stub(BaseHTTPRequestHandler):
    """A gateway that says yes."""

    def do_GET(self) -> None:
        self._answer(200, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/chat/completions":
            self._answer(200, None)
        else:
            self._answer(201, {"api_key": "aig_of_the_stub"})

    def _answer(self, status: int, body: object) -> None:
        chunk = {"choices": [{"delta": {"content": "Hello from the stub."}}]}
        text = json.dumps(body) if body is not None else f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
        pass


@pytest.fixture
def docker(checkout: Path, port: int) -> Iterator[Path]:
    """A `docker` that writes down what it is told; its gateway runs once there was an `up`. Answers the record."""
    record = checkout / "docker.txt"
    program = checkout / "bin" / "docker"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {record}\n'
        f'case "$2" in up) echo 1 > {checkout}/runs;; down) /bin/rm {checkout}/runs;;\n'
        f'ps) shift 5; [ ! -e {checkout}/runs ] || for name; do [ $name = "$LACKING" ] || echo 0123abcd; done;;\n'
        "logs) echo a line of the log;;\n"
        "port) case $3 in grafana) echo 127.0.0.1:3002;; prometheus) echo 0.0.0.0:9090;; esac;; esac\nexit 0\n"
    )
    program.chmod(0o755)
    with ThreadingHTTPServer(("127.0.0.1", port), Stub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield record
        server.shutdown()
        thread.join()


def test_where_docker_answers_compose_starts_it_with_a_password_of_its_own(
    checkout: Path, docker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / ".env").write_text("OPENAI_API_KEY=sk-mine")
    assert local.main(["up"]) == 0
    assert "compose up --detach --build --wait" in docker.read_text().splitlines()
    assert re.fullmatch(r"OPENAI_API_KEY=sk-mine\nPOSTGRES_PASSWORD=[0-9a-f]{48}\n", (checkout / ".env").read_text())
    shown = capsys.readouterr().out
    assert "starting the gateway, Postgres, Redis, Prometheus and Grafana with docker compose" in shown
    assert "Hello from the stub." in shown
    assert login()["GATEWAY_API_KEY"] == "aig_of_the_stub"
    assert "Page        http://localhost:" in shown
    assert "Grafana     http://localhost:3002  (admin, admin)\nPrometheus  http://localhost:9090\n" in shown


def test_a_second_up_with_docker_changes_nothing(
    checkout: Path, docker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local.main(["up"])
    before = (checkout / ".env").read_text()
    docker.write_text("")
    capsys.readouterr()
    assert local.main(["up"]) == 0
    assert " up " not in docker.read_text()
    assert "already running in Docker; nothing was changed" in capsys.readouterr().out
    assert (checkout / ".env").read_text() == before


def test_what_did_not_start_beside_the_gateway_is_started_by_the_next_up(
    checkout: Path, docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.main(["up"])
    docker.write_text("")
    monkeypatch.setenv("LACKING", "prometheus")  # its port was taken, and Grafana waits for it
    assert local.main(["up"]) == 0
    assert "compose up --detach --build --wait" in docker.read_text().splitlines()


def test_down_with_docker_keeps_the_volumes(checkout: Path, docker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local.main(["up"])
    assert local.main(["down"]) == 0
    assert docker.read_text().splitlines()[-1] == "compose down"
    assert "kept in Docker's volumes" in capsys.readouterr().out


def test_a_new_env_file_is_for_its_owner_only(checkout: Path, docker: Path) -> None:
    local.main(["up"])
    assert (checkout / ".env").stat().st_mode & 0o777 == 0o600


def test_logs_come_from_docker_when_it_runs_there(checkout: Path, docker: Path) -> None:
    local.main(["up"])
    command = [sys.executable, "-m", "gateway.local", "logs"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "a line of the log\n"
    assert docker.read_text().splitlines()[-1] == "compose logs --follow gateway"


def test_a_requests_lines_come_from_docker_when_it_runs_there(
    checkout: Path, docker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local.main(["up"])
    capsys.readouterr()
    assert local.main(["logs", "line of"]) == 0
    assert capsys.readouterr().out == "a line of the log\n"
    assert docker.read_text().splitlines()[-1] == "compose logs --no-log-prefix gateway"
    assert local.main(["logs", "0003"]) == 1


def test_a_service_that_publishes_no_port_is_not_shown(
    checkout: Path, docker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = checkout / "bin" / "docker"
    program.write_text(
        program.read_text().replace("echo 127.0.0.1:3002", "echo :0").replace("0.0.0.0:9090", "no such port; exit 1")
    )
    assert local.main(["up"]) == 0
    shown = capsys.readouterr().out
    assert "Grafana  " not in shown and "Prometheus  " not in shown


def test_a_compose_that_fails_is_reported(checkout: Path, docker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = checkout / "bin" / "docker"
    program.write_text('#!/bin/sh\n[ "$2" != up ]\n')
    assert local.main(["up"]) == 1
    assert "`docker compose up --detach --build --wait` failed, as said above." in capsys.readouterr().out
