"""The `gateway` command, as a person and as a script use it."""

import asyncio
import fcntl
import io
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest

from gateway import __version__, embedded
from gateway.__main__ import main
from gateway.embedded import Embedded
from gateway.stores import migrations

pytestmark = pytest.mark.integration

COMMANDS = [
    ["serve"], ["mock"], ["users"], ["users", "list"], ["users", "create"], ["keys"], ["keys", "list"],
    ["keys", "create"], ["keys", "revoke"], ["usage"], ["migrate"],
]  # fmt: skip


@pytest.fixture
def on_stores(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        status = main(argv)
    except SystemExit as ended:
        status = int(ended.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    status, out, _ = run(capsys, *command, "--help")
    assert status == 0
    assert out.startswith(f"usage: gateway {' '.join(command)}")
    description = out.split("\n\n")[1]
    assert len(description.split()) >= 3, "a newcomer needs a sentence"


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"gateway {__version__}\n", "")


def test_without_a_command_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys)
    assert status == 2
    assert "COMMAND" in err
    status, out, _ = run(capsys, "--help")
    assert all(command[0] in out for command in COMMANDS)


def test_help_is_at_hand_without_importing_the_server() -> None:
    program = (
        "import sys; from gateway.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'aiohttp', 'asyncpg', 'redis', 'argon2'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: gateway")
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_account_and_a_key_are_made_listed_and_revoked(
    on_stores: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("correct horse battery\n"))
    status, out, _ = run(capsys, "users", "create", "Ada@Example.com", "--json")
    [ada] = json.loads(out)
    assert (status, ada["email"], ada["role"]) == (0, "ada@example.com", "admin")

    status, out, _ = run(capsys, "keys", "create", "ada@example.com", "laptop", "--requests-per-minute", "7", "--json")
    [made] = json.loads(out)
    assert status == 0
    assert made["api_key"].startswith(made["prefix"] + "_")

    status, out, _ = run(capsys, "keys", "list", "--json")
    [key] = json.loads(out)
    assert (key["name"], key["requests_per_minute"], key["revoked_at"]) == ("laptop", 7, None)
    assert made["api_key"].split("_")[2] not in out

    assert run(capsys, "keys", "revoke", made["prefix"])[0] == 0
    [key] = json.loads(run(capsys, "keys", "list", "--json")[1])
    assert key["revoked_at"]

    status, out, _ = run(capsys, "users", "list")
    assert status == 0
    assert out.splitlines()[0].split()[:2] == ["id", "email"]
    assert "ada@example.com" in out


def test_what_does_not_exist_is_said_in_one_line(on_stores: None, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["keys", "create", "nobody@example.com", "x"], ["keys", "revoke", "aig_000000000000"]):
        status, out, err = run(capsys, *argv)
        assert (status, out) == (1, "")
        assert err.startswith("gateway: ")
        assert err.count("\n") == 1


def test_usage_of_an_empty_deployment_is_empty(on_stores: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "usage", "--since", "7d", "--group-by", "app") == (0, "(none)\n", "")
    assert run(capsys, "usage", "--json") == (0, "[]\n", "")


def test_migrate_says_what_it_applied_and_applies_it_once(
    empty_database_url: str, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", empty_database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    status, out, _ = run(capsys, "migrate", "--json")
    assert status == 0
    files = sorted(file.stem for file in (Path(__file__).parents[1] / "sql" / "migrations").glob("*.sql"))
    assert [row["applied"] for row in json.loads(out)] == files
    assert json.loads(run(capsys, "migrate", "--json")[1]) == []


def test_a_database_that_is_not_there_is_said(
    redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:9/x")
    monkeypatch.setenv("REDIS_URL", redis_url)
    status, _, err = run(capsys, "users", "list")
    assert status == 1
    assert "database" in err
    assert "Traceback" not in err


def test_a_wrong_setting_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_HEARTBEET", "1")
    status, _, err = run(capsys, "users", "list")
    assert (status, err) == (2, "gateway: unknown setting GATEWAY_HEARTBEET\n")


@pytest.mark.parametrize("argv", [["serve", "--port", "99999"], ["serve", "--port", "many"]], ids=" ".join)
def test_a_wrong_port_is_said_whoever_gives_it(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("gateway: PORT: ")
    assert err.count("\n") == 1


def test_a_mock_that_cannot_listen_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, out, err = run(capsys, "mock", "--port", str(taken.getsockname()[1]))
    assert (status, out) == (1, "")
    assert "address already in use" in err
    assert run(capsys, "mock", "--port", "99999")[0] == 2


@pytest.mark.parametrize(
    ("name", "option"), [("DATABASE_URL", "sslmode=hunter22"), ("REDIS_URL", "db=hunter22"), ("REDIS_URL", "hunter=22")]
)
def test_an_option_of_an_address_that_nobody_knows_is_a_wrong_setting(
    on_stores: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    database_url: str,
    name: str,
    option: str,
) -> None:
    monkeypatch.setenv(name, f"{database_url}&{option}" if name == "DATABASE_URL" else f"redis://127.0.0.1:9/?{option}")
    status, out, err = run(capsys, "users", "list")
    assert (status, out) == (2, "")
    assert err.startswith(f"gateway: {name}: ")
    assert err.count("\n") == 1


# --- beside a gateway that runs -----------------------------------------------------------------------------------


@contextmanager
def embedded_servers(data: Path, *, postgres: bool, redis: bool) -> Iterator[None]:
    """As a gateway holds them; a lock of another descriptor is as good as one of another process."""
    servers = Embedded(data, postgres=postgres, redis=redis)
    servers.start()
    try:
        yield
    finally:
        servers.stop()


def test_the_database_of_a_gateway_whose_redis_was_given_is_found(
    tmp_path: Path, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_DATA_DIR", str(tmp_path))
    with embedded_servers(tmp_path, postgres=True, redis=False):
        status, _, err = run(capsys, "users", "list")
        assert (status, err.partition(": required")[0]) == (2, "gateway: REDIS_URL")
        monkeypatch.setenv("REDIS_URL", redis_url)
        assert run(capsys, "users", "list") == (0, "(none)\n", "")


def test_the_redis_of_a_gateway_whose_database_was_given_is_found(
    tmp_path: Path, database_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DATABASE_URL", database_url)
    with embedded_servers(tmp_path, postgres=False, redis=True):
        assert run(capsys, "users", "list") == (0, "(none)\n", "")


def test_a_data_folder_that_is_in_use_is_no_wrong_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(embedded, "_LOCK", 0.1)
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, out, err = run(capsys, "users", "list")
    assert (status, out) == (1, "")
    assert err == f"gateway: {tmp_path} is in use by another gateway (process unknown)\n"


def test_a_migration_that_cannot_be_made_is_said(
    on_stores: None, database_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "_PATIENCE", 0.1)
    with asyncio.Runner() as other:
        holder = other.run(asyncpg.connect(database_url))
        other.run(holder.execute("select pg_advisory_lock($1)", migrations._LOCK))
        status, out, err = run(capsys, "migrate")
        other.run(holder.close())
    assert (status, out) == (1, "")
    assert "another process has been migrating" in err
    assert err.count("\n") == 1
