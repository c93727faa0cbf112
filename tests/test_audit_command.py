"""`gateway usage verify` and `gateway usage head`, as a person and as a script use them."""

import argparse
import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import asyncpg
import pytest

from gateway.commands.audit import describe_audit
from gateway.settings import load_settings
from gateway.stores.chain import load_audit_key
from gateway.stores.ledger import write_rows
from gateway.stores.usage import UsageRow
from tests.support.journal_writer import row

pytestmark = pytest.mark.integration

Outcome = tuple[int, str, str]  # exit status, standard output, standard error
Run = Callable[..., Outcome]


@pytest.fixture
def run(database_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str, **environ: str) -> Outcome:
        parser = argparse.ArgumentParser(prog="gateway usage")
        describe_audit(parser.add_subparsers(required=True))
        settings = load_settings({"DATABASE_URL": database_url, "REDIS_URL": redis_url, **environ})
        capsys.readouterr()
        try:
            arguments = parser.parse_args(argv)
            status = arguments.run(arguments, settings)
        except SystemExit as ended:
            status = int(ended.code or 0)
        return (status, *capsys.readouterr())

    return run


def on(database_url: str, work: Callable[[asyncpg.Pool], Coroutine[Any, Any, object]]) -> None:
    async def open_and_work() -> None:
        async with asyncpg.create_pool(database_url, min_size=1) as pool:
            await work(pool)

    asyncio.run(open_and_work())


def write(database_url: str, *rows: UsageRow, secret: str = "") -> None:
    async def work(pool: asyncpg.Pool) -> None:
        await write_rows(pool, rows, await load_audit_key(pool, secret))

    on(database_url, work)


def test_a_deployment_without_usage_is_whole_and_has_no_head(run: Run) -> None:
    assert run("verify") == (0, "0 links, 0 rows, whole; no head yet\n", "")
    assert run("head") == (1, "", "gateway: the audit chain has no link yet\n")


def test_a_head_that_was_noted_verifies_later(run: Run, database_url: str) -> None:
    write(database_url, row(), row())
    status, out, _ = run("head")
    assert status == 0
    head = out.strip()
    assert head.startswith("1:")
    assert run("verify") == (0, f"1 links, 2 rows, whole; head {head}\n", "")
    write(database_url, row())
    assert run("verify", "--anchor", head)[0] == 0
    status, out, err = run("verify", "--anchor", head, "--anchor", "9:" + "0" * 64)
    assert (status, out, err) == (1, "", "gateway: link 3 is missing: an anchor names link 9\n")


def test_the_first_fault_is_named_for_people_and_for_scripts(run: Run, database_url: str) -> None:
    victim = row()
    write(database_url, victim)
    on(database_url, lambda pool: pool.execute("update usage set cost_micros = 1"))
    status, out, err = run("verify")
    assert (status, out) == (1, "")
    assert err == f"gateway: row {victim.request_id} of {victim.started_at.isoformat()} was altered (link 1)\n"
    status, out, err = run("verify", "--json")
    report = json.loads(out)
    assert (status, err) == (1, "")
    assert report["fault"]["request_id"] == victim.request_id
    assert (report["fault"]["what"], report["fault"]["link"]) == ("was altered", 1)


def test_a_report_for_scripts_has_its_figures(run: Run, database_url: str) -> None:
    write(database_url, row())
    status, out, _ = run("verify", "--json")
    report = json.loads(out)
    assert status == 0
    assert (report["links"], report["rows"], report["fault"], report["covers_from"]) == (1, 1, None, None)
    assert report["head"] == run("head")[1].strip()


def test_from_when_on_rows_are_covered_is_said(run: Run, database_url: str) -> None:
    on(database_url, lambda pool: pool.execute("update usage_chain set covers_from = '2026-03-01Z'"))
    write(database_url, row())
    status, out, _ = run("verify")
    assert status == 0
    assert out.splitlines()[1] == "rows that arrived before 2026-03-01T00:00:00+00:00 are not covered"


def test_the_key_of_the_setting_is_the_one_that_seals(run: Run, database_url: str) -> None:
    write(database_url, row(), secret="a secret of the operator's")
    assert run("verify", GATEWAY_AUDIT_KEY="a secret of the operator's")[0] == 0
    status, _, err = run("verify")
    assert (status, err) == (1, "gateway: link 1 was altered, or the key is not the one of this chain\n")


@pytest.mark.parametrize("anchor", ["", "1", "1:", "x:" + "0" * 64, "0:" + "0" * 64, "1:" + "g" * 64, "-1:" + "0" * 64])
def test_what_is_no_head_is_no_anchor(run: Run, anchor: str) -> None:
    status, _, err = run("verify", f"--anchor={anchor}")
    assert status == 2
    assert "head" in err
