from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.errors import ModelNotFound
from gateway.protocol.routing import Plan, Provider, Routes, Share, Target

pytestmark = pytest.mark.unit


def provider(name: str, **fields: Any) -> Provider:
    given: dict[str, Any] = {"dialect": "openai", "base_url": f"https://{name}.example/v1", "api_key": f"key of {name}"}
    return Provider(name=name, **{**given, **fields})


def routes(*providers: Provider, **fields: Any) -> Routes:
    return Routes(providers={each.name: each for each in providers}, **fields)


def first(known: Routes, model: str, own_credential: str | None = None) -> Target:
    return known.resolve(model, own_credential)[0][0]


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
    target = first(USUAL, model)
    assert (target.provider.name, target.model) == (name, upstream)


def test_the_longest_rule_wins() -> None:
    assert first(USUAL, "gpt-oss-20b").provider.name == "groq"


def test_rules_match_case_and_patterns_in_a_name_mean_nothing() -> None:
    assert first(USUAL, "GPT-4o").provider.name == "ollama"
    assert first(USUAL, "[g]pt-4o").provider.name == "ollama"


def test_an_alias_is_replaced_once() -> None:
    aliased = routes(
        *USUAL.providers.values(), aliases={"fast": "groq/llama-3.1-8b", "smart": "claude-opus-5", "loop": "fast"}
    )
    assert (first(aliased, "fast").provider.name, first(aliased, "fast").model) == ("groq", "llama-3.1-8b")
    assert first(aliased, "smart").provider.name == "anthropic"
    assert (first(aliased, "loop").provider.name, first(aliased, "loop").model) == ("ollama", "fast")


def test_the_operators_credential_goes_with_the_target() -> None:
    target = first(USUAL, "gpt-4o")
    assert (target.credential, target.own_credential) == ("key of openai", False)


def test_a_callers_own_credential_replaces_the_operators() -> None:
    target = first(USUAL, "gpt-4o", own_credential="sk-mine")
    assert (target.credential, target.own_credential) == ("sk-mine", True)


def test_a_provider_without_a_credential_answers_only_for_a_caller_who_brings_one() -> None:
    off = routes(provider("openai", rules=("gpt-*",), api_key=None, enabled=False), provider("ollama"))
    with pytest.raises(ModelNotFound, match="belongs to openai, which has no credential here") as caught:
        first(off, "gpt-4o")
    assert caught.value.param == "model"
    assert first(off, "gpt-4o", own_credential="sk-mine").credential == "sk-mine"


def test_a_model_of_nobody_names_the_providers_that_answer() -> None:
    off = routes(provider("openai", rules=("gpt-*",)), provider("ollama", enabled=False))
    with pytest.raises(ModelNotFound, match="'llama3' does not exist here; providers that answer: openai"):
        first(off, "llama3")


def test_without_a_default_provider_unknown_models_do_not_exist() -> None:
    with pytest.raises(ModelNotFound, match="providers that answer: none"):
        first(routes(), "llama3")


def test_a_local_server_that_came_is_switched_on_and_the_rest_stays() -> None:
    before = routes(provider("openai", rules=("gpt-*",)), provider("ollama", enabled=False), aliases={"a": "gpt-4o"})
    after = before.with_enabled("ollama", True)
    assert first(after, "llama3").provider.name == "ollama"
    assert first(after, "a").provider.name == "openai"
    with pytest.raises(ModelNotFound):
        first(before, "llama3")


def test_a_callers_own_credential_is_used_for_his_request_alone() -> None:
    assert first(USUAL, "gpt-4o", own_credential="sk-mine").credential == "sk-mine"
    assert first(USUAL, "gpt-4o").credential == "key of openai"


def test_credentials_are_not_printed() -> None:
    target = first(USUAL, "gpt-4o", own_credential="sk-mine")
    assert "sk-mine" not in repr(target)
    assert "key of openai" not in repr(target)
    assert "key of openai" not in repr(USUAL)


# --- plans --------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "d"])
MODELS = st.sampled_from(["m", "n", "o", "a/m", "b/n", "c/x", "d/y", "m-1"])


def any_provider(name: str) -> st.SearchStrategy[Provider]:
    return st.builds(
        lambda key, on, rules: Provider(name, "openai", f"https://{name}.example", key, on, rules=rules),
        st.sampled_from([None, "key"]),
        st.booleans(),
        st.lists(st.sampled_from(["m*", "n*", "m", "*"]), max_size=2),
    )


PLANS = st.builds(
    Plan,
    st.lists(st.builds(Share, NAMES, st.sampled_from(["m", "n", "*"]), st.integers(1, 9)), max_size=3),
    st.lists(MODELS, max_size=3),
)


@given(
    st.tuples(*map(any_provider, "abcd")),
    st.dictionaries(st.sampled_from(["m", "n", "m*", "*", "a/m", "a/*"]), PLANS, max_size=4),
    st.dictionaries(st.sampled_from(["o", "m"]), MODELS, max_size=2),
    MODELS,
    st.sampled_from([None, "sk-mine"]),
)
def test_no_plan_sends_a_credential_to_another_provider_or_asks_one_that_is_off(
    providers: tuple[Provider, ...], plans: dict[str, Plan], aliases: dict[str, str], model: str, own: str | None
) -> None:
    known = routes(*providers, plans=plans, aliases=aliases, default="a")
    try:
        route = known.resolve(model, own)
    except ModelNotFound:
        return
    assert route
    assert all(route)
    targets = [target for group in route for target in group]
    assert len({target.provider.name for target in targets if target.own_credential}) <= 1
    for target in targets:
        assert target.provider is known.providers[target.provider.name]
        assert target.credential == (own if target.own_credential else target.provider.api_key)
        assert target.own_credential or target.provider.enabled
        assert target.model != "*"
    assert len(route) <= 1 + max((len(plan.fallbacks) for plan in plans.values()), default=0)
