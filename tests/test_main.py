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
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from gateway import __version__, appkeys, embedded
from gateway.__main__ import main
from gateway.embedded import Embedded
from gateway.stores import migrations
from gateway.stores.ledger import write_rows
from tests.support.gateway import running_gateway
from tests.support.journal_writer import row as usage_row

pytestmark = pytest.mark.integration

COMMANDS = [
    ["serve"], ["mock"], ["users"], ["users", "list"], ["users", "create"], ["users", "limit"], ["keys"],
    ["keys", "list"], ["keys", "create"], ["keys", "change"], ["keys", "revoke"], ["usage"], ["usage", "show"], ["migrate"], ["config"],
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


def test_the_server_is_imported_without_what_it_never_uses_and_all_of_it_is_there_afterwards() -> None:
    program = """
import ssl, sys
from gateway.__main__ import main
print(main(["serve"]))
import aiohttp.connector
print(aiohttp.connector._SSL_CONTEXT_VERIFIED.cert_store_stats()["x509"], "redis" in sys.modules)
print("opentelemetry" in sys.modules, "set_default_verify_paths" in vars(ssl.SSLContext))
"""
    environ = {"AIOHTTP_NO_EXTENSIONS": "1"}  # for which the start ends as soon as all is imported
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout == "2\n0 True\nFalse False\n"


def test_the_commands_on_the_database_do_not_import_the_server(database_url: str, redis_url: str) -> None:
    program = "import sys; from gateway.__main__ import main; main(['users', 'list']); print('aiohttp' in sys.modules)"
    environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.splitlines()[-1] == "False"


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


LIMITS = [
    "--requests-per-second", "2.5", "--burst", "10", "--concurrent-requests", "5", "--tokens-per-minute", "10000",
    "--tokens-per-day", "1000000", "--cost-per-day", "5", "--cost-per-month", "20.000001", "--drain-seconds", "30",
]  # fmt: skip
BUDGET = ["--tokens-per-minute", "1", "--tokens-per-day", "2", "--cost-per-day", "4.35", "--cost-per-month", "0.000001"]


def test_limits_are_set_changed_and_shown(
    on_stores: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("correct horse battery\n"))
    run(capsys, "users", "create", "ada@example.com")
    [made] = json.loads(run(capsys, "keys", "create", "ada@example.com", "laptop", *LIMITS, "--json")[1])
    [key] = json.loads(run(capsys, "keys", "list", "--json")[1])
    shown = {
        option[2:].replace("-", "_"): float(value) for option, value in zip(LIMITS[::2], LIMITS[1::2], strict=True)
    }
    assert {name: key[name] for name in shown} == shown
    assert key["requests_per_minute"] == 60

    status, out, _ = run(capsys, "keys", "list")
    assert status == 0
    assert (
        "60/min, 2.5/s, burst 10, 5 at once, 10000 tokens/min, 1000000 tokens/day, $5/day, $20.000001/month, drain 30 s"
    ) in out
    assert out.splitlines()[0].split() == ["id", "name", "email", "limits", "created_at", "revoked_at"]

    options = ["--name", "lent", "--cost-per-day", "0", "--model", "gpt-*", "--model", "o3", "--json"]
    [changed] = json.loads(run(capsys, "keys", "change", made["prefix"], *options)[1])
    expected = {**key, "name": "lent", "cost_per_day": 0, "allowed_models": ["gpt-*", "o3"]}
    assert changed == expected
    assert json.loads(run(capsys, "keys", "list", "--json")[1]) == [expected]

    [ada] = json.loads(run(capsys, "users", "limit", "Ada@example.com", *BUDGET, "--json")[1])
    assert json.loads(run(capsys, "users", "list", "--json")[1]) == [ada]
    assert [ada[name] for name in ("tokens_per_minute", "tokens_per_day", "cost_per_day", "cost_per_month")] == [
        1, 2, 4.35, 0.000001,
    ]  # fmt: skip
    assert "1 tokens/min, 2 tokens/day, $4.35/day, $0.000001/month" in run(capsys, "users", "list")[1]
    out = run(capsys, "users", "limit", "ada@example.com", "--tokens-per-day", "0", "--tokens-per-minute", "0")[1]
    assert "  $4.35/day, $0.000001/month  " in out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--cost-per-day", "0.0000001"), ("--cost-per-month", "five"), ("--tokens-per-day", "-1"), ("--burst", "1.5"),
        ("--requests-per-second", "nan"), ("--drain-seconds", "601"), ("--requests-per-minute", "1000001"),
    ],
)  # fmt: skip
def test_a_limit_that_means_nothing_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    status, out, err = run(capsys, "keys", "create", "ada@example.com", "laptop", f"{option}={value}")
    assert (status, out) == (2, "")
    assert f"argument {option}: invalid {option[2:].replace('-', '_')}: " in err


async def test_a_change_by_the_command_reaches_gateways_that_run(
    on_stores: None, database_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_gateway(database_url, redis_url) as gateway:
        keys = gateway.app[appkeys.KEYS]
        key_id = (await keys.verify(gateway.api_key)).key_id
        for argv in (
            ["keys", "change", key_id, "--requests-per-minute", "7", "--cost-per-day", "5"],
            ["users", "limit", "admin@example.com", "--tokens-per-day", "9"],
        ):
            assert (await asyncio.to_thread(run, capsys, *argv))[0] == 0
        async with asyncio.timeout(5):
            while not (await keys.verify(gateway.api_key)).account_budget:
                await asyncio.sleep(0.01)
        principal = await keys.verify(gateway.api_key)
    assert (principal.requests_per_minute, principal.budget.cost_per_day) == (7, 5_000_000)
    assert principal.account_budget.tokens_per_day == 9


def test_what_does_not_exist_is_said_in_one_line(on_stores: None, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        ["keys", "create", "nobody@example.com", "x"], ["keys", "revoke", "aig_000000000000"],
        ["keys", "change", "aig_000000000000", "--burst", "1"], ["users", "limit", "nobody@example.com"],
    ):  # fmt: skip
        status, out, err = run(capsys, *argv)
        assert (status, out) == (1, "")
        assert err.startswith("gateway: ")
        assert err.count("\n") == 1


def test_usage_of_an_empty_deployment_is_empty(on_stores: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "usage", "--since", "7d", "--group-by", "app") == (0, "(none)\n", "")
    assert run(capsys, "usage", "--json") == (0, "[]\n", "")


@pytest.fixture
def used(on_stores: None, database_url: str) -> None:
    """Two requests of an app three days ago, and one of another now."""

    async def write() -> None:
        ago = datetime.now(UTC) - timedelta(days=3)
        app = {"started_at": ago, "app_id": "web", "prompt_tokens": 30, "cached_tokens": 10, "cost_micros": 1_500_000}
        async with asyncpg.create_pool(database_url, min_size=1) as pool:
            await write_rows(pool, [usage_row(**app), usage_row(**app), usage_row(app_id="cli", cost_micros=None)])

    asyncio.run(write())


def test_usage_is_a_table_of_requests_tokens_and_cost(used: None, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "usage", "--since", "90h", "--group-by", "app")
    head, web, cli = (line.split() for line in out.splitlines())
    assert status == 0
    told = dict(zip(head, web, strict=True))
    assert (told["app"], told["requests"], told["errors"], told["prompt_tokens"]) == ("web", "2", "0", "60")
    assert (told["cached_percent"], told["cost_usd"], told["unpriced"]) == ("33.3", "3.000000", "0")
    assert (cli[0], cli[1], cli[-1]) == ("cli", "1", "1")


def test_usage_of_a_range_is_asked_for_by_durations_or_dates(used: None, capsys: pytest.CaptureFixture[str]) -> None:
    day = f"{datetime.now(UTC) - timedelta(days=4):%Y-%m-%d}"

    def apps(*argv: str) -> set[str]:
        return {row["app"] for row in json.loads(run(capsys, "usage", "--group-by", "app", "--json", *argv)[1])}

    assert (
        apps()
        == apps("--since", "2d")
        == apps("--since", f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}")
        == {"cli"}
    )
    assert apps("--since", "1w") == apps("--since", day) == apps("--since", "all") == {"web", "cli"}
    assert apps("--since", day, "--until", "1d") == apps("--since", "all", "--until", "1d") == {"web"}


def test_a_range_that_means_nothing_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "usage", "--since", "yesterday")
    assert (status, out) == (2, "")
    assert "a duration such as 36h, 7d or 2w" in err


def test_usage_whose_reader_has_seen_enough_ends_quietly(used: None) -> None:
    command = [sys.executable, "-m", "gateway", "usage", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


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
