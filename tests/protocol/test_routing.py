from typing import Any

import pytest

from gateway.protocol.errors import ModelNotFound
from gateway.protocol.routing import Provider, Routes

pytestmark = pytest.mark.unit


def provider(name: str, **fields: Any) -> Provider:
    given: dict[str, Any] = {"dialect": "openai", "base_url": f"https://{name}.example/v1", "api_key": f"key of {name}"}
    return Provider(name=name, **{**given, **fields})


def routes(*providers: Provider, **fields: Any) -> Routes:
    return Routes(providers={each.name: each for each in providers}, **fields)


USUAL = routes(
    provider("openai", rules=("gpt-*", "chatgpt-*", "o1*", "o3*", "o4*")),
    provider("anthropic", dialect="anthropic", rules=("claude-*",)),
    provider("ollama", dialect="ollama", api_key=None),
    provider("groq", rules=("gpt-oss-*",)),
)


@pytest.mark.parametrize(
    ("model", "name", "upstream"),
    [
        ("gpt-4o", "openai", "gpt-4o"),
        ("o3-mini", "openai", "o3-mini"),
        ("claude-haiku-5", "anthropic", "claude-haiku-5"),
        ("llama3.2:1b", "ollama", "llama3.2:1b"),
        ("groq/llama-3.3-70b", "groq", "llama-3.3-70b"),
        ("openai/claude-like", "openai", "claude-like"),
        ("ollama/gpt-oss", "ollama", "gpt-oss"),
        ("groq/openai/gpt-oss-20b", "groq", "openai/gpt-oss-20b"),
        ("meta-llama/Llama-3", "ollama", "meta-llama/Llama-3"),
        ("groq/", "ollama", "groq/"),
    ],
)
def test_a_model_finds_its_provider(model: str, name: str, upstream: str) -> None:
    target = USUAL.resolve(model)
    assert (target.provider.name, target.model) == (name, upstream)


def test_the_longest_rule_wins() -> None:
    assert USUAL.resolve("gpt-oss-20b").provider.name == "groq"


def test_rules_match_case_and_patterns_in_a_name_mean_nothing() -> None:
    assert USUAL.resolve("GPT-4o").provider.name == "ollama"
    assert USUAL.resolve("[g]pt-4o").provider.name == "ollama"


def test_an_alias_is_replaced_once() -> None:
    aliased = routes(
        *USUAL.providers.values(), aliases={"fast": "groq/llama-3.1-8b", "smart": "claude-opus-5", "loop": "fast"}
    )
    assert (aliased.resolve("fast").provider.name, aliased.resolve("fast").model) == ("groq", "llama-3.1-8b")
    assert aliased.resolve("smart").provider.name == "anthropic"
    assert (aliased.resolve("loop").provider.name, aliased.resolve("loop").model) == ("ollama", "fast")


def test_the_operators_credential_goes_with_the_target() -> None:
    target = USUAL.resolve("gpt-4o")
    assert (target.credential, target.own_credential) == ("key of openai", False)


def test_a_callers_own_credential_replaces_the_operators() -> None:
    target = USUAL.resolve("gpt-4o", own_credential="sk-mine")
    assert (target.credential, target.own_credential) == ("sk-mine", True)


def test_a_provider_without_a_credential_answers_only_for_a_caller_who_brings_one() -> None:
    off = routes(provider("openai", rules=("gpt-*",), api_key=None, enabled=False), provider("ollama"))
    with pytest.raises(ModelNotFound, match="belongs to openai, which has no credential here") as caught:
        off.resolve("gpt-4o")
    assert caught.value.param == "model"
    assert off.resolve("gpt-4o", own_credential="sk-mine").credential == "sk-mine"


def test_a_model_of_nobody_names_the_providers_that_answer() -> None:
    off = routes(provider("openai", rules=("gpt-*",)), provider("ollama", enabled=False))
    with pytest.raises(ModelNotFound, match="'llama3' does not exist here; providers that answer: openai"):
        off.resolve("llama3")


def test_without_a_default_provider_unknown_models_do_not_exist() -> None:
    with pytest.raises(ModelNotFound, match="providers that answer: none"):
        routes().resolve("llama3")


def test_a_local_server_that_came_is_switched_on_and_the_rest_stays() -> None:
    before = routes(provider("openai", rules=("gpt-*",)), provider("ollama", enabled=False), aliases={"a": "gpt-4o"})
    after = before.with_enabled("ollama", True)
    assert after.resolve("llama3").provider.name == "ollama"
    assert after.resolve("a").provider.name == "openai"
    with pytest.raises(ModelNotFound):
        before.resolve("llama3")


def test_a_callers_own_credential_is_used_for_his_request_alone() -> None:
    assert USUAL.resolve("gpt-4o", own_credential="sk-mine").credential == "sk-mine"
    assert USUAL.resolve("gpt-4o").credential == "key of openai"


def test_credentials_are_not_printed() -> None:
    target = USUAL.resolve("gpt-4o", own_credential="sk-mine")
    assert "sk-mine" not in repr(target)
    assert "key of openai" not in repr(target)
    assert "key of openai" not in repr(USUAL)
