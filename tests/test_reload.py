"""SIGHUP's work: a new file is used whole from the next request on, a wrong one not at all."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import aiohttp
import pytest

from gateway.appkeys import BALANCER, CATALOGUE, LIMITER, PRICES
from gateway.exchange import Principal
from gateway.reload import reload
from gateway.stores.grants import UNLIMITED
from tests.support.gateway import Gateway, chat_body, read_events, running_gateway

pytestmark = pytest.mark.integration

NOBODY = Principal("k", "aig_k", "test", "a", "member")
BEFORE = """
[aliases]
fast = "openai/mock-gpt"
[prices.openai]
"mock-gpt" = { input = 1, output = 1 }
[limits."/v1/chat/completions"]
requests_per_second = 1000
burst = 1000
"""


def after(gateway: Gateway) -> str:
    return f"""
[providers.second]
base_url = "{mock_of(gateway)}/v1"
needs_key = false
[aliases]
quick = "second/mock-gpt"
[models.fast]
targets = [{{ to = "second/mock-gpt" }}]
[prices.second]
"mock-gpt" = {{ input = 2, output = 2 }}
"""


def mock_of(gateway: Gateway) -> str:
    return gateway.app[CATALOGUE].routes.providers["anthropic"].base_url


async def ask(gateway: Gateway, model: str) -> tuple[int, str]:
    """The status and who answered."""
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"{gateway.base_url}/chat/completions", json=chat_body(model), headers=gateway.headers) as response,
    ):
        await response.read()
        return response.status, response.headers.get("X-Gateway-Provider", "")


async def page(gateway: Gateway) -> str:
    async with aiohttp.ClientSession() as client, client.get(f"{gateway.root_url}/metrics") as response:
        return await response.text()


async def test_a_new_file_is_used_from_the_next_request_on(
    database_url: str, redis_url: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(BEFORE)
    async with running_gateway(database_url, redis_url, {"GATEWAY_CONFIG": str(file)}) as gateway:
        app = gateway.app
        assert await ask(gateway, "fast") == (200, "openai")
        assert (await ask(gateway, "quick"))[0] in (404, 502), "the default provider is asked for it"
        catalogue = app[CATALOGUE]
        await catalogue.refresh()
        reachable, listed = dict(catalogue.reachable), catalogue.models(())
        assert reachable["openai"] is True
        before = await page(gateway)
        assert 'provider="second"' not in before
        assert 'provider="mistral"' not in before, "vendors that are off have no series"

        file.write_text(after(gateway))
        started = perf_counter()
        assert reload(app) is True
        figure(f"reload: the configuration is read, checked and used in {(perf_counter() - started) * 1e3:.1f} ms")

        assert await ask(gateway, "fast") == (200, "second")
        assert await ask(gateway, "quick") == (200, "second")
        assert app[PRICES].price("second", "mock-gpt") is not None
        assert app[PRICES].price("openai", "mock-gpt") is None
        assert await app[LIMITER].admit(NOBODY, "e", "/v1/chat/completions") is UNLIMITED, "the route has none any more"
        assert catalogue.reachable.items() >= reachable.items(), "what was learned is known"
        assert {model.id for model in catalogue.models(())} >= {model.id for model in listed} | {"fast", "quick"}
        assert app[BALANCER].state("second") == "closed"
        shown = await page(gateway)
        assert 'gateway_config_reloads_total{result="ok"} 1' in shown
        assert "gateway_config_ok 1" in shown
        assert 'gateway_upstream_errors_total{provider="second",kind="connect"} 0' in shown.replace(
            'kind="connect",provider="second"', 'provider="second",kind="connect"'
        )


async def test_a_wrong_file_changes_nothing_and_is_named_in_one_line(
    database_url: str, redis_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(BEFORE)
    async with running_gateway(database_url, redis_url, {"GATEWAY_CONFIG": str(file)}) as gateway:
        routes = gateway.app[CATALOGUE].routes
        file.write_text('[aliases]\nfast = "azur/gpt-4o"\nslow = 1\n')
        assert reload(gateway.app) is False
        [record] = [record for record in caplog.records if record.levelname == "ERROR"]
        said = record.getMessage()
        assert "gateway.toml:2: aliases.fast: there is no provider 'azur'" in said
        assert "gateway.toml:3: aliases.slow" in said
        assert "\n" not in said
        assert gateway.app[CATALOGUE].routes is routes
        assert await ask(gateway, "fast") == (200, "openai")
        shown = await page(gateway)
        assert 'gateway_config_reloads_total{result="failed"} 1' in shown
        assert "gateway_config_ok 0" in shown

        file.write_text("a = " + "1" * 5_000)
        assert reload(gateway.app) is False, "what Python refuses to read is no reason to end"
        file.unlink()
        assert reload(gateway.app) is False, "a file that went away is no empty one"
        file.write_text(BEFORE)
        assert reload(gateway.app) is True
        assert "gateway_config_ok 1" in await page(gateway)


async def test_a_bug_in_reading_a_file_ends_nothing_that_is_served(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a bug")

    async with running_gateway(database_url, redis_url) as gateway:
        monkeypatch.setattr("gateway.reload.load_config", broken)
        assert reload(gateway.app) is False
        assert (await ask(gateway, "openai/mock-gpt"))[0] == 200
        shown = await page(gateway)
    assert 'gateway_config_reloads_total{result="failed"} 1' in shown
    assert "gateway_config_ok 0" in shown
    assert 'gateway_internal_errors_total{where="task"} 1' in shown


async def test_an_open_stream_keeps_the_target_that_it_began_with(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(BEFORE)
    async with running_gateway(database_url, redis_url, {"GATEWAY_CONFIG": str(file)}) as gateway:
        body = chat_body("openai/mock-gpt?pace_ms=50&tokens=10", stream=True)
        async with (
            aiohttp.ClientSession() as client,
            client.post(f"{gateway.base_url}/chat/completions", json=body, headers=gateway.headers) as response,
        ):
            await response.content.readline()
            file.write_text(after(gateway))
            assert reload(gateway.app) is True
            events = await read_events(response)
        assert events[-1] == "[DONE]"
        [row] = await gateway.rows()
        assert (row["provider"], row["outcome"]) == ("openai", "ok")


async def test_the_built_in_mock_and_an_ollama_that_answers_stay(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    environ = {"GATEWAY_MOCK": "on", "OLLAMA_BASE_URL": "", "GATEWAY_CONFIG": str(tmp_path / "gateway.toml")}
    (tmp_path / "gateway.toml").write_text("")
    async with running_gateway(database_url, redis_url, environ) as other:
        environ["GATEWAY_OLLAMA_PROBE"] = mock_of(other)
        async with running_gateway(database_url, redis_url, environ, other.account_id) as gateway:
            catalogue = gateway.app[CATALOGUE]
            await catalogue.refresh()
            assert catalogue.routes.providers["ollama"].enabled
            assert reload(gateway.app) is True
            assert catalogue.routes.providers["ollama"].enabled
            assert await ask(gateway, "mock-gpt") == (200, "mock-openai")
