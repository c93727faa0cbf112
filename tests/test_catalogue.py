from typing import Any, cast

import orjson
import pytest

from gateway import catalogue as catalogue_module
from gateway.catalogue import Catalogue
from gateway.protocol.errors import ModelNotFound, PermissionDenied, UpstreamUnreachable
from gateway.protocol.routing import Provider, Routes
from gateway.upstream import Upstream

pytestmark = pytest.mark.unit

OPENAI = Provider("openai", "openai", "https://openai.example/v1", "key of openai", rules=("gpt-*",))
OLLAMA = Provider("ollama", "ollama", "http://ollama.example")


class Lists:
    """What each provider lists; one that is not here does not answer."""

    def __init__(self) -> None:
        self.of: dict[str, list[str]] = {}

    async def get(self, provider: Provider, path: str, timeout: float) -> bytes:
        if provider.name not in self.of:
            raise UpstreamUnreachable("no answer")
        names = self.of[provider.name]
        return orjson.dumps({"models": [{"name": name} for name in names], "data": [{"id": name} for name in names]})


def catalogue(lists: Any = None, *providers: Provider) -> Catalogue:
    routes = Routes({provider.name: provider for provider in providers or (OPENAI, OLLAMA)}, {"fast": "gpt-5-mini"})
    return Catalogue(routes, cast(Upstream, lists), probed=("ollama",), on_models=lambda names: None)


# --- targets ------------------------------------------------------------------------------------------------------


def test_a_model_that_was_asked_for_before_has_the_target_that_it_had() -> None:
    known = catalogue()
    first = known.resolve("fast", None, ())
    assert (first.provider, first.model, first.credential) == (OPENAI, "gpt-5-mini", "key of openai")
    assert known.resolve("fast", None, ()) is first


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
    assert not any(target.credential in ("sk-one", "sk-two") for target in known._targets.values())
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
    monkeypatch.setattr(catalogue_module, "MAX_TARGETS", 10)
    known = catalogue()
    for number in range(25):
        assert known.resolve(f"model-{number}", None, ())[0][0].model == f"model-{number}"
        assert len(known._targets) <= 10


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
