"""What `gateway keys` says of a key that expires; the rest of the commands is in tests/test_main.py."""

import io
import json
from datetime import UTC, datetime, timedelta

import pytest

from gateway.__main__ import main

pytestmark = pytest.mark.integration


@pytest.fixture
def on_stores(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(list(arguments))
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.usefixtures("on_stores")
def test_a_key_is_made_to_expire_and_told_when(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("correct horse battery\n"))
    assert run(capsys, "users", "create", "ada@example.com")[0] == 0
    [made] = json.loads(run(capsys, "keys", "create", "ada@example.com", "lent", "--expires-at", "30d", "--json")[1])
    [key] = json.loads(run(capsys, "keys", "list", "--json")[1])
    left = datetime.fromisoformat(key["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < left <= timedelta(days=30)
    assert f"until {key['expires_at'][:10]}" in run(capsys, "keys", "list")[1]

    [named] = json.loads(run(capsys, "keys", "change", made["prefix"], "--name", "kept", "--json")[1])
    assert named["expires_at"] == key["expires_at"]
    [changed] = json.loads(run(capsys, "keys", "change", made["prefix"], "--expires-at", "2999-01-01", "--json")[1])
    assert changed["expires_at"].startswith("2999-01-01T00:00:00")
    [changed] = json.loads(run(capsys, "keys", "change", made["prefix"], "--expires-at", "never", "--json")[1])
    assert changed["expires_at"] is None


@pytest.mark.parametrize("when", ["yesterday", "2020-01-01", "0d"])
def test_an_expiry_that_is_none_or_has_passed_is_told_before_anything_is_asked(
    capsys: pytest.CaptureFixture[str], when: str
) -> None:
    status, _, err = run(capsys, "keys", "create", "ada@example.com", "lent", "--expires-at", when)
    assert status == 2
    assert "invalid expires_at" in err
