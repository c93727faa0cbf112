"""What `gateway usage show` says of one request; the rest of `gateway usage` is in tests/test_main.py."""

import asyncio
import json
from dataclasses import fields
from uuid import uuid4

import asyncpg
import pytest

from gateway.__main__ import main
from gateway.exchange import new_id
from gateway.stores.ledger import write_rows
from gateway.stores.usage import UsageRow
from tests.support.journal_writer import row

pytestmark = pytest.mark.integration


@pytest.fixture
def one(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> UsageRow:
    """A request with a row, of which there is another."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    one = row(user_id="", model="gpt-4o", latency_ms=1234, ttft_ms=None, account_id=str(uuid4()))

    async def write() -> None:
        async with asyncpg.create_pool(database_url, min_size=1) as pool:
            await write_rows(pool, [one, row()])

    asyncio.run(write())
    return one


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        status = main(["usage", *arguments])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    return (status, *capsys.readouterr())


COLUMNS = [field.name for field in fields(UsageRow)]


def test_every_column_of_a_request_is_on_a_line_of_its_own(one: UsageRow, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "show", one.request_id)
    head, *lines = out.splitlines()
    told = dict(line.split(maxsplit=1) for line in lines)
    assert (status, err, head.split()) == (0, "", ["column", "value"])
    assert list(told) == [*COLUMNS, "total_tokens"]
    assert (told["request_id"], told["latency_ms"], told["ttft_ms"]) == (one.request_id, "1234", "-")
    assert (told["user_id"], told["stream"], told["total_tokens"]) == ("-", "True", "150")


def test_a_script_gets_a_request_as_one_object(one: UsageRow, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "show", one.request_id.upper(), "--json")
    told = json.loads(out)
    assert (status, list(told)) == (0, [*COLUMNS, "total_tokens"])
    assert (told["account_id"], told["ttft_ms"], told["cost_micros"]) == (one.account_id, None, one.cost_micros)
    assert told["started_at"].endswith("Z")


def test_a_request_without_a_row_is_a_failure(one: UsageRow, capsys: pytest.CaptureFixture[str]) -> None:
    for unknown in (new_id(), "not-an-id", "' or true --"):
        status, out, err = run(capsys, "show", unknown)
        assert (status, out) == (1, "")
        assert err == f"gateway: there is no request {unknown!r} of yours with usage\n"


def test_show_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "show", "--help")
    assert (status, out.startswith("usage: gateway usage show")) == (0, True)
    assert "X-Request-Id" in out
    assert "show" in run(capsys, "--help")[1]
