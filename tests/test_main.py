"""The `gateway` command, as a person and as a script use it."""

import io
import json
from pathlib import Path

import pytest

from gateway import __version__
from gateway.__main__ import main

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
