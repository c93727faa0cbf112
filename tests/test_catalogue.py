from dataclasses import replace
from typing import Any, cast

import orjson
import pytest

from gateway import catalogue as catalogue_module
from gateway.catalogue import Catalogue
from gateway.protocol.errors import ModelNotFound, PermissionDenied, UpstreamUnreachable
from gateway.protocol.pricing import price_table
from gateway.protocol.routing import Plan, Provider, Routes, Share
from gateway.upstream import Upstream

pytestmark = pytest.mark.unit

OPENAI = Provider("openai", "openai", "https://openai.example/v1", "key of openai", rules=("gpt-*",))
OLLAMA = Provider("ollama", "ollama", "http://ollama.example", probed=True)


PRICES = price_table(
    orjson.dumps(
        {
            "as_of": "2026-06-01",
            "source": "a test",
            "prices": {"openai": {"gpt-5": {"input": 1.25, "output": 10, "cached_input": 0.125, "context": 400_000}}},
        }
    )
)


class Lists:
    """What each provider lists; one that is not here does not answer."""

    def __init__(self) -> None:
        self.of: dict[str, list[str]] = {}
        self.windows: dict[str, int] = {}  # by model, what a provider says of it

    async def get(self, provider: Provider, path: str, timeout: float) -> bytes:
        if provider.name not in self.of:
            raise UpstreamUnreachable("no answer")
        names = self.of[provider.name]
        rows = [{"id": name, "context_length": self.windows.get(name)} for name in names]
        return orjson.dumps({"models": [{"name": name} for name in names], "data": rows})


def catalogue(lists: Any = None, *providers: Provider, **told: Any) -> Catalogue:
    routes = Routes({provider.name: provider for provider in providers or (OPENAI, OLLAMA)}, {"fast": "gpt-5-mini"})
    return Catalogue(routes, cast(Upstream, lists), PRICES, on_models=lambda names: None, **told)


# --- targets ------------------------------------------------------------------------------------------------------


def test_a_model_that_was_asked_for_before_has_the_target_that_it_had() -> None:
    known = catalogue()
    route = known.resolve("fast", None, ())
    first = route[0][0]
    assert (first.provider, first.model, first.credential) == (OPENAI, "gpt-5-mini", "key of openai")
    assert known.resolve("fast", None, ()) is route


def test_what_one_key_may_use_says_nothing_of_another() -> None:
    known = catalogue()
    assert known.resolve("gpt-5", None, ("gpt-*",)) == known.resolve("gpt-5", None, ())
    for _ in range(2):
        with pytest.raises(PermissionDenied):
            known.resolve("gpt-5", None, ("llama*",))
        assert known.resolve("llama3", None, ("llama*",))[0][0].provider is OLLAMA


def test_a_callers_own_credential_is_for_that_request_alone() -> None:
    known = catalogue()
    for credential in ("sk-one", "sk-two", "sk-two"):
        target = known.resolve("gpt-5", credential, ())[0][0]
        assert (target.provider, target.model) == (OPENAI, "gpt-5")
        assert (target.credential, target.own_credential) == (credential, True)
    assert not any(target.credential in ("sk-one", "sk-two") for ((target,),) in known._known.values())
    plain = known.resolve("gpt-5", None, ())[0][0]
    assert (plain.credential, plain.own_credential) == ("key of openai", False)


def test_a_provider_without_a_credential_answers_whoever_brings_one_and_nobody_else() -> None:
    known = catalogue(None, Provider("openai", "openai", "https://openai.example/v1", enabled=False, rules=("gpt-*",)))
    for _ in range(2):
        assert known.resolve("gpt-5", "sk-one", ())[0][0].credential == "sk-one"
        with pytest.raises(ModelNotFound):
            known.resolve("gpt-5", None, ())


async def test_a_provider_that_went_away_is_no_target_any_more() -> None:
    lists = Lists()
    lists.of = {"openai": ["gpt-5"], "ollama": ["llama3"]}
    known = catalogue(lists)
    await known.refresh()
    assert known.resolve("llama3", None, ())[0][0].provider.name == "ollama"
    del lists.of["ollama"]
    await known.refresh()
    with pytest.raises(ModelNotFound):
        known.resolve("llama3", None, ())
    lists.of["ollama"] = ["llama3"]
    await known.refresh()
    assert known.resolve("llama3", None, ())[0][0].provider.enabled


def test_names_that_clients_choose_fill_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "MAX_ROUTES", 10)
    known = catalogue()
    for number in range(25):
        assert known.resolve(f"model-{number}", None, ())[0][0].model == f"model-{number}"
        assert len(known._known) <= 10


# --- lists --------------------------------------------------------------------------------------------------------


async def test_the_list_has_the_names_to_ask_for_that_a_key_may_use() -> None:
    lists = Lists()
    lists.of = {"openai": ["gpt-5", "dall-e-3"], "ollama": ["llama3"]}
    known = catalogue(lists)
    await known.refresh()
    assert [model.id for model in known.models(())] == ["fast", "gpt-5", "openai/dall-e-3", "llama3"]
    assert [model.id for model in known.models(("gpt-*", "openai/*"))] == ["fast", "gpt-5", "openai/dall-e-3"]
    lists.of["openai"] = ["gpt-6"]
    await known.refresh()
    assert [model.id for model in known.models(("gpt-*",))] == ["gpt-6"]


async def test_names_with_a_plan_are_listed_with_who_answers_first_and_patterns_are_not() -> None:
    plans = {
        "smart": Plan((Share("openai", "gpt-5"), Share("ollama", "llama3"))),
        "gpt-*": Plan(fallbacks=("ollama/llama3",)),
        "nobody": Plan((Share("off", "x"),)),
    }
    providers = {p.name: p for p in (OPENAI, OLLAMA, Provider("off", "openai", "https://off.example", enabled=False))}
    labels: set[str] = set()
    known = Catalogue(Routes(providers, {}, plans), cast(Upstream, Lists()), PRICES, on_models=labels.update)
    assert [(model.id, model.owned_by) for model in known.models(())] == [("smart", OPENAI.label)]
    assert known.models(("claude-*",)) == []
    assert labels == {"smart", "nobody"}


async def test_a_model_shows_its_window_and_price_where_they_are_known() -> None:
    """The provider's own word on the window comes before the table's; the shapes are OpenRouter's."""
    lists = Lists()
    lists.of = {"openai": ["gpt-5", "gpt-unknown"]}
    known = catalogue(lists)
    await known.refresh()
    shown = {model.id: model.object() for model in known.models(())}
    assert shown["gpt-5"] == {
        "id": "gpt-5",
        "object": "model",
        "created": 0,
        "owned_by": OPENAI.label,
        "context_length": 400_000,
        "pricing": {"prompt": "0.00000125", "completion": "0.00001", "input_cache_read": "0.000000125"},
    }
    assert shown["gpt-unknown"].keys() == {"id", "object", "created", "owned_by"}
    lists.windows = {"gpt-5": 128_000}
    await known.refresh()
    assert next(model.context_length for model in known.models(()) if model.id == "gpt-5") == 128_000


# --- looks --------------------------------------------------------------------------------------------------------


async def test_each_look_is_told_and_a_look_at_some_asks_no_others() -> None:
    lists, looks = Lists(), list[tuple[str, bool]]()
    lists.of = {"openai": ["gpt-5"]}
    known = catalogue(lists, on_look=lambda name, listed: looks.append((name, listed)))
    await known.refresh()
    assert sorted(looks) == [("ollama", False), ("openai", True)]
    looks.clear()
    lists.of["ollama"] = ["llama3"]
    await known.look_now(["ollama", "gone"])
    assert looks == [("ollama", True)]
    assert [model.id for model in known.models(())] == ["fast", "gpt-5", "llama3"]


# --- other routes -------------------------------------------------------------------------------------------------


async def test_other_routes_keep_what_was_learned_of_providers_that_stay() -> None:
    lists = Lists()
    lists.of = {"openai": ["gpt-5"], "ollama": ["llama3"]}
    known = catalogue(lists)
    await known.refresh()
    moved = replace(OPENAI, base_url="https://elsewhere.example/v1")
    off = replace(OLLAMA, enabled=False)  # as a file that says nothing of it is read
    known.follow(Routes({"openai": moved, "ollama": off}))
    assert known.reachable == {"ollama": True}
    assert known.resolve("llama3", None, ())[0][0].provider.enabled
    assert [model.id for model in known.models(())] == ["llama3"], "nobody asked the new address yet"
    known.follow(Routes({"ollama": replace(off, base_url="http://other.example")}))
    assert known.reachable == {}
    with pytest.raises(ModelNotFound):
        known.resolve("llama3", None, ())


async def test_an_answer_that_comes_after_its_provider_moved_is_not_believed() -> None:
    class Slow(Lists):
        async def get(self, provider: Provider, path: str, timeout: float) -> bytes:
            if provider is OPENAI:
                known.follow(Routes({"openai": replace(OPENAI, base_url="https://elsewhere.example/v1")}))
            return await super().get(provider, path, timeout)

    lists = Slow()
    lists.of = {"openai": ["gpt-5"]}
    known = catalogue(lists, OPENAI)
    await known.look_now(["openai"])
    assert known.reachable == {}
    assert known.models(()) == []
