"""The operator's file: what it can say, what is refused and where, and what ships beside it."""

import argparse
import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import orjson
import pytest
from msgspec import structs

from gateway.commands.config import describe_config
from gateway.config import load_config, with_mock
from gateway.config_file import ConfigError
from gateway.protocol.dialects.openai import OpenAITranslator
from gateway.protocol.errors import ModelNotFound
from gateway.protocol.pricing import cost_micros
from gateway.protocol.routing import Provider, Routes, Target
from gateway.protocol.usage import Usage
from gateway.settings import SettingsError, load_settings
from tests.support.streams import make_call

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def operators_file(tmp_path: Path, text: str) -> dict[str, str]:
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    return {"GATEWAY_CONFIG": str(path)}


def routes(environ: dict[str, str]) -> Routes:
    return load_config(load_settings(environ), environ).routes


def provider(name: str, **environ: str) -> Provider:
    return routes(environ).providers[name]


def answers(known: Routes, model: str, own_credential: str | None = None) -> list[list[str]]:
    """The route of a model: names of targets, group by group."""
    route = known.resolve(model, own_credential)
    return [[f"{target.provider.name}/{target.model}" for target in group] for group in route]


# --- providers ----------------------------------------------------------------------------------------------------


def test_a_provider_is_on_when_it_has_a_key_or_an_address_of_its_own() -> None:
    def enabled(**environ: str) -> set[str]:
        return {name for name, provider in routes(environ).providers.items() if provider.enabled}

    assert enabled() == set()
    assert enabled(OPENAI_API_KEY="k") == {"openai"}
    assert enabled(ANTHROPIC_BASE_URL="http://127.0.0.1:1") == {"anthropic"}
    assert enabled(OLLAMA_BASE_URL="http://127.0.0.1:1") == {"ollama"}
    assert enabled(MISTRAL_API_KEY="k", VLLM_BASE_URL="http://vllm:8000/v1") == {"mistral", "vllm"}
    assert enabled(AZURE_OPENAI_API_KEY="k", VLLM_API_KEY="k") == set(), "nobody said where they are"


@pytest.mark.parametrize(
    ("name", "variable", "given", "expected"),
    [
        ("openai", "OPENAI_BASE_URL", "http://h:1/v1", "http://h:1/v1"),
        ("openai", "OPENAI_BASE_URL", "http://h:1/v1/", "http://h:1/v1"),
        ("openai", "OPENAI_BASE_URL", "http://h:1", "http://h:1/v1"),
        ("openai", "OPENAI_BASE_URL", "http://h:1/openai/v3", "http://h:1/openai/v3"),
        ("anthropic", "ANTHROPIC_BASE_URL", "http://h:1", "http://h:1"),
        ("anthropic", "ANTHROPIC_BASE_URL", "http://h:1/v1", "http://h:1"),
        ("ollama", "OLLAMA_BASE_URL", "http://ollama:11434/", "http://ollama:11434"),
        ("ollama", "OLLAMA_BASE_URL", "http://h:1/v1", "http://h:1"),
        ("azure", "AZURE_OPENAI_ENDPOINT", "https://x.openai.azure.com/", "https://x.openai.azure.com/openai/v1"),
        ("lmstudio", "LMSTUDIO_BASE_URL", "http://localhost:1234", "http://localhost:1234/v1"),
        ("llamacpp", "LLAMACPP_BASE_URL", "http://10.0.0.7:8080/v1", "http://10.0.0.7:8080/v1"),
    ],
)
def test_addresses_are_taken_as_people_write_them(name: str, variable: str, given: str, expected: str) -> None:
    found = provider(name, **{variable: given})
    assert (found.base_url, found.enabled) == (expected, True)


@pytest.mark.parametrize("address", ["ftp://h", "h:1", "http://", "http://user:pw@h", "http://h/?x=1", "http://h/ v1"])
@pytest.mark.parametrize("variable", ["OPENAI_BASE_URL", "AZURE_OPENAI_ENDPOINT"])
def test_an_address_that_is_none_stops_the_start(variable: str, address: str) -> None:
    environ = {variable: address}
    with pytest.raises(SettingsError, match=f"^{variable}: "):
        load_config(load_settings(environ), environ)


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "169.254.170.2", "[fe80::1]", "[fd00:ec2::254]", "[::ffff:169.254.169.254]"]
)
def test_where_clouds_keep_credentials_no_provider_stands(host: str) -> None:
    with pytest.raises(SettingsError, match=r"^VLLM_BASE_URL: .*credentials"):
        provider("vllm", VLLM_BASE_URL=f"http://{host}/v1")


@pytest.mark.parametrize(
    ("url", "key", "taken"),
    [
        ("http://ollama:11434", "k", True),
        ("http://llm.models.svc:8000", "k", True),
        ("http://127.0.0.1:1", "k", True),
        ("http://10.1.2.3:1", "k", True),
        ("http://[fd00::1]:1", "k", True),
        ("https://8.8.8.8", "k", True),
        ("http://8.8.8.8", "", True),
        ("http://8.8.8.8", "k", False),
        ("http://api.openai.com/v1", "k", False),
    ],
)
def test_a_key_goes_over_plain_http_to_no_public_address(url: str, key: str, taken: bool, tmp_path: Path) -> None:
    environ = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key}
    if taken:
        assert provider("openai", **environ).base_url.startswith(url)
    else:
        with pytest.raises(SettingsError, match=r"^OPENAI_BASE_URL: https is required"):
            provider("openai", **environ)
        allowed = operators_file(tmp_path, "[providers.openai]\ninsecure = true\n")
        assert provider("openai", **environ, **allowed).base_url.startswith(url)


def test_ollama_is_looked_for_where_the_setting_says_unless_the_operator_gave_its_address(tmp_path: Path) -> None:
    def ollama(**environ: str) -> tuple[str, bool, bool]:
        found = provider("ollama", **environ)
        return found.base_url, found.enabled, found.probed

    probe = {"GATEWAY_OLLAMA_PROBE": "http://elsewhere:11434/"}
    assert ollama() == ("http://localhost:11434", False, True)
    assert ollama(**probe) == ("http://elsewhere:11434", False, True)
    assert ollama(**probe, OLLAMA_BASE_URL="http://given:1") == ("http://given:1", True, False)
    own = operators_file(tmp_path, '[providers.ollama]\ndialect = "ollama"\nbase_url = "http://own:1"\n')
    assert ollama(**probe, **own) == ("http://own:1", False, True)


def test_a_shipped_provider_is_changed_by_what_a_table_says_and_replaced_by_one_with_an_address(tmp_path: Path) -> None:
    changed = operators_file(tmp_path, '[providers.mistral]\nlabel = "Mistral"\nmodels = ["mistral-large"]\n')
    mistral = provider("mistral", **changed, MISTRAL_API_KEY="k")
    assert (mistral.label, mistral.models, mistral.tool_id_length) == ("Mistral", ("mistral-large",), 9)
    assert mistral.base_url == "https://api.mistral.ai/v1"
    replaced = operators_file(tmp_path, '[providers.mistral]\nbase_url = "https://eu.example/v1"\nneeds_key = false\n')
    mistral = provider("mistral", **replaced, MISTRAL_API_KEY="k")
    assert (mistral.base_url, mistral.api_key, mistral.tool_id_length) == ("https://eu.example/v1", None, 0)


def test_the_operators_rule_comes_before_one_that_ships(tmp_path: Path) -> None:
    own = '[providers.mine]\nbase_url = "https://mine.example"\nneeds_key = false\nrules = ["gpt-*"]\n'
    known = routes({**operators_file(tmp_path, own), "OPENAI_API_KEY": "k"})
    assert answers(known, "gpt-4o") == [["mine/gpt-4o"]]
    assert answers(known, "o3") == [["openai/o3"]]


def test_vendors_take_no_name_from_a_local_server_until_their_key_is_set() -> None:
    names = ["mistral-nemo", "deepseek-r1:8b", "grok-1", "codestral", "llama3.2"]
    local = {"OLLAMA_BASE_URL": "http://localhost:11434"}
    assert [answers(routes(local), name) for name in names] == [[[f"ollama/{name}"]] for name in names]
    known = routes({**local, "MISTRAL_API_KEY": "k", "DEEPSEEK_API_KEY": "k", "XAI_API_KEY": "k"})
    assert answers(known, "mistral-large-latest") == [["mistral/mistral-large-latest"]]
    assert answers(known, "deepseek-chat") == [["deepseek/deepseek-chat"]]
    assert answers(known, "grok-4") == [["xai/grok-4"]]
    with pytest.raises(ModelNotFound, match="belongs to openai, which has no credential here"):
        answers(known, "gpt-4o")


def test_what_embeds_is_openais_by_its_names_and_ollamas_by_all_others() -> None:
    known = routes({"OPENAI_API_KEY": "k", "OLLAMA_BASE_URL": "http://localhost:11434"})
    for name in ("text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002", "babbage-002"):
        assert answers(known, name) == [[f"openai/{name}"]]
    for name in ("nomic-embed-text", "mxbai-embed-large", "bge-m3:567m", "text-embedding-nomic-embed-text-v1.5"):
        assert answers(known, name) == [[f"ollama/{name}"]]


def test_every_vendor_that_ships_is_data_alone() -> None:
    """No branch of the code knows a vendor: names of dialects are compared with dialects, and nothing else is."""
    vendors = tomllib.loads((ROOT / "gateway" / "providers.toml").read_text())["providers"].keys()
    dialects = {"openai", "anthropic", "ollama"}
    found = []
    for path in (ROOT / "gateway").rglob("*.py"):
        if "mock" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                names = {side.value for side in ast.walk(node) if isinstance(side, ast.Constant)} & vendors
                of_dialect = any(getattr(side, "attr", getattr(side, "id", "")) == "dialect" for side in sides)
                if names - dialects or (names and not of_dialect):
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []
    assert {"azure", "groq", "mistral", "deepseek", "openrouter", "together", "xai", "fireworks"} <= vendors
    assert {"vllm", "lmstudio", "llamacpp"} <= vendors


# Every parameter of https://docs.mistral.ai/api/#tag/chat; another one is a 422.
MISTRALS = {
    "model", "messages", "stream", "temperature", "top_p", "max_tokens", "stop", "random_seed", "response_format", "tools",
    "tool_choice", "presence_penalty", "frequency_penalty", "n", "prediction", "parallel_tool_calls", "prompt_mode",
    "safe_prompt", "reasoning_effort",
}  # fmt: skip


def test_what_a_client_of_openai_asks_for_reaches_a_strict_vendor_in_words_that_it_knows() -> None:
    request = {
        "messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 9, "seed": 1, "user": "u", "store": False, "metadata": {}, "service_tier": "auto",
        "stream_options": {"include_usage": True}, "prompt_cache_key": "k", "safety_identifier": "s",
        "verbosity": "low", "temperature": 0.5, "top_p": 1, "n": 1, "stop": ["x"], "reasoning_effort": "high",
        "presence_penalty": 0, "frequency_penalty": 0, "response_format": {"type": "text"},
    }  # fmt: skip
    call = make_call("openai", request)
    row = provider("mistral", MISTRAL_API_KEY="k")
    sent = orjson.loads(OpenAITranslator(structs.replace(call, target=Target(row, "mistral-large"))).request().body)
    assert sent.keys() <= MISTRALS
    assert (sent["model"], sent["max_tokens"], sent["random_seed"]) == ("mistral-large", 9, 1)
    assert [message["role"] for message in sent["messages"]] == ["system", "user"]
    azure = provider("azure", AZURE_OPENAI_API_KEY="k", AZURE_OPENAI_ENDPOINT="https://x.openai.azure.com")
    same = structs.replace(call, target=Target(azure, call.asked.model))
    assert OpenAITranslator(same).request().body == call.asked.body, "who knows all of it gets the client's bytes"


# --- models -------------------------------------------------------------------------------------------------------

KEYS = {
    "OPENAI_API_KEY": "o",
    "ANTHROPIC_API_KEY": "a",
    "OLLAMA_BASE_URL": "http://ollama:11434",
    "AZURE_OPENAI_API_KEY": "z",
    "AZURE_OPENAI_ENDPOINT": "https://x.openai.azure.com",
}
CHAIN = """
[aliases]
best = "gpt-4o"
[models."gpt-4o"]
targets = [{ to = "openai/gpt-4o", weight = 3 }, { to = "azure/gpt-4o-eu" }]
fallbacks = ["claude-sonnet-4-5", "ollama/llama3.2", "best-of-mine"]
[models."claude-*"]
fallbacks = ["gpt-4o"]
[models."gpt-4*"]
fallbacks = ["claude-opus-5"]
[models.best-of-mine]
targets = [{ to = "ollama/qwen3" }]
"""


def test_a_model_has_the_targets_and_the_fallbacks_that_the_file_says(tmp_path: Path) -> None:
    known = routes({**operators_file(tmp_path, CHAIN), **KEYS})
    chain = [
        ["openai/gpt-4o", "azure/gpt-4o-eu"],
        ["anthropic/claude-sonnet-4-5"],
        ["ollama/llama3.2"],
        ["ollama/qwen3"],
    ]
    assert answers(known, "gpt-4o") == answers(known, "best") == chain
    assert [target.weight for target in known.resolve("gpt-4o")[0]] == [3, 1]
    assert answers(known, "claude-haiku-4-5") == [["anthropic/claude-haiku-4-5"], chain[0]], "no fallback's fallback"
    assert answers(known, "gpt-4.1") == [["openai/gpt-4.1"], ["anthropic/claude-opus-5"]], "the pattern that fits"
    assert answers(known, "openai/gpt-4.1") == [["openai/gpt-4.1"]], "who says the provider means it"


def test_providers_that_are_off_are_left_out_and_a_route_of_none_is_no_model(tmp_path: Path) -> None:
    text = operators_file(tmp_path, CHAIN)
    without_openai = {name: value for name, value in KEYS.items() if name != "OPENAI_API_KEY"}
    assert answers(routes({**text, **without_openai}), "gpt-4o")[0] == ["azure/gpt-4o-eu"]
    only_ollama = routes({**text, "OLLAMA_BASE_URL": "http://ollama:11434"})
    assert answers(only_ollama, "gpt-4o") == [["ollama/llama3.2"], ["ollama/qwen3"]]
    with pytest.raises(ModelNotFound, match="belongs to openai"):
        answers(routes(text), "gpt-4o")


def test_a_callers_own_credential_goes_to_the_provider_named_first_and_to_no_other(tmp_path: Path) -> None:
    known = routes({**operators_file(tmp_path, CHAIN), **KEYS, "OPENAI_API_KEY": ""})
    route = known.resolve("gpt-4o", "sk-mine")
    credentials = {target.provider.name: target.credential for group in route for target in group}
    assert credentials == {"openai": "sk-mine", "azure": "z", "anthropic": "a", "ollama": None}
    assert [target.provider.name for group in route for target in group if target.own_credential] == ["openai"]
    nowhere = routes({**operators_file(tmp_path, CHAIN), "ANTHROPIC_API_KEY": "a"})
    with pytest.raises(ModelNotFound):
        nowhere.resolve("azure/gpt-4o", "sk-mine")


def test_a_pattern_may_send_every_name_to_a_provider_of_its_own(tmp_path: Path) -> None:
    text = '[models."gpt-*"]\ntargets = [{ to = "azure/*" }]\n[models."openai/*"]\ntargets = [{ to = "azure/*" }]\n'
    known = routes({**operators_file(tmp_path, text), **KEYS})
    assert answers(known, "gpt-4o") == answers(known, "openai/gpt-4o") == [["azure/gpt-4o"]]


def test_the_built_in_mock_may_be_named(tmp_path: Path) -> None:
    text = '[models.demo]\ntargets = [{ to = "mock-openai/mock-gpt" }]\nfallbacks = ["mock-claude"]\n'
    environ = operators_file(tmp_path, text)
    known = with_mock(routes(environ), "http://127.0.0.1:1")
    assert answers(known, "demo") == [["mock-openai/mock-gpt"], ["mock-anthropic/mock-claude"]]
    with pytest.raises(ConfigError, match="there is no provider 'mock-openai'"):
        routes({**environ, "ENVIRONMENT": "production"})


# --- what is refused ----------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_said_with_file_line_and_key(tmp_path: Path) -> None:
    text = """\
[providers.x]
base_url = "https://x.example"
api_key = "sk-secret"

[providers.y]
base_url = "https://y.example"
rules = ["a-*",
  "b-*"]
[providers.z]
base_url = "nowhere"
rules = ["b-*"]

[models."gpt-4o"]
targets = [
  { to = "openai/gpt-4o", weight = 0 },
]
[models."gpt-4.1"]
targets = [
  { to = "openai/gpt-4.1" },
  { to = "azur/gpt-4.1" },
]
fallbacks = ["azure/gpt-4.1", "anthropik/claude", "gpt-4.1"]
[aliases]
fast = "gpt-4o-mini"
"quick.est" = "fast"
slow = "gorq/llama"
[limits."/v1/chat/completions"]
requests_per_second = 0
[prices.openai]
"gpt-4o" = { input = -1, output = 2 }
"""
    with pytest.raises(ConfigError) as refused:
        routes({**operators_file(tmp_path, text)})
    problems = [problem.removeprefix(f"{tmp_path}/") for problem in refused.value.problems]
    beginnings = [
        "gateway.toml:3: providers.x.api_key: there is no such key; no secret belongs in this file: api_key_env",
        "gateway.toml:10: providers.z.base_url: an http or https address is required",
        "gateway.toml:11: providers.z.rules[0]: y has the rule 'b-*', too",
        'gateway.toml:15: models."gpt-4o".targets[0].weight: Expected `int` >= 1',
        "gateway.toml:20: models.\"gpt-4.1\".targets[1].to: there is no provider 'azur'; there are openai, anthropic,",
        "gateway.toml:22: models.\"gpt-4.1\".fallbacks[1]: there is no provider 'anthropik'; there are openai,",
        'gateway.toml:22: models."gpt-4.1".fallbacks[2]: falls back to itself',
        "gateway.toml:25: aliases.\"quick.est\": 'fast' is an alias itself, and they do not chain",
        "gateway.toml:26: aliases.slow: there is no provider 'gorq'; there are openai,",
        'gateway.toml:28: limits."/v1/chat/completions".requests_per_second: Expected `float` > 0',
        'gateway.toml:30: prices.openai."gpt-4o": input: -1 is not between 0 and',
    ]
    assert [problem[: len(start)] for problem, start in zip(problems, beginnings, strict=True)] == beginnings
    assert "sk-secret" not in str(refused.value)
    assert "A model of ollama is written ollama/gorq/llama" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[providers.x]\nbase_url = 1\n", "gateway.toml:2: providers.x.base_url: Expected `str`"),
        ("\n[providers.x]\n", "gateway.toml:2: providers.x.base_url: this key is required"),
        ('[providers.x]\nbase_url = "http://h"\ndialekt = "openai"\n', "gateway.toml:3: providers.x.dialekt: there is"),
        ('[providers.x]\nbase_url = "http://h:99999"\n', "gateway.toml:2: providers.x.base_url: a port is"),
        ('[providers.x]\nbase_url = "http://169.254.169.254"\n', "gateway.toml:2: providers.x.base_url: this is where"),
        ('[providers."a/b"]\nbase_url = "http://h"\n', 'gateway.toml:1: providers."a/b": a provider\'s name has no'),
        ('[providers.x]\nbase_url = "http://h"\nquery = "a b"\n', "gateway.toml:3: providers.x.query: "),
        ("providers = 1\n", "gateway.toml:1: providers: a table is required"),
        ("[providers]\nx = 1\n", "gateway.toml:2: providers.x: Expected `object`"),
        ("[aliases]\nfast = 1\n", "gateway.toml:2: aliases.fast: the name of a model is required"),
        ('[aliases]\nfast = ""\n', "gateway.toml:2: aliases.fast: the name of a model is required"),
        ('[aliases]\nfast = "fast"\n', "gateway.toml:2: aliases.fast: points to itself"),
        ("[providers\n", "gateway.toml:1: "),
        ('a = """', "gateway.toml:1: "),
        ("a = " + "[" * 100_000, "gateway.toml"),
        ("[prices]\nopenai = 1\n", "gateway.toml:2: prices.openai: a table of models is required"),
        ('[limits."/v1/nowhere"]\nrequests_per_second = 1\n', "there are /v1/chat/completions"),
        ("\n[chains]\n", "gateway.toml:2: chains: there is no such table; there are aliases, limits, models, prices"),
        ('[models.m]\nfallbacks = [""]\n', "gateway.toml:2: models.m.fallbacks[0]: "),
        ('[models.m]\ntargets = [{ to = "openai" }]\n', "models.m.targets[0].to: `provider/model` is required"),
        ('[models.m]\ntargets = [{ to = "openai/gpt-*" }]\n', "models.m.targets[0].to: a `*` stands alone"),
        ("[models.m]\ntargets = [{}]\n", "gateway.toml:2: models.m.targets[0]: Object missing required field `to`"),
        (
            '[aliases]\nm = "gpt-4o"\n[models.m]\nfallbacks = ["gpt-4o"]\n',
            "gateway.toml:3: models.m: an alias has this",
        ),
        ('[aliases]\n"gpt-*" = "claude-x"\n', 'gateway.toml:2: aliases."gpt-*": an alias is one name'),
        ("[models.m]\n", "gateway.toml:1: models.m: `targets` or `fallbacks` are required"),
        ('[models.""]\nfallbacks = ["gpt-4o"]\n', 'gateway.toml:1: models."": the name of a model'),
        ("a = " + "1" * 5_000, "gateway.toml: a number has too many digits"),
        ('[providers."größe"]\nbase_url = "http://h"\n', 'gateway.toml:1: providers."größe": a provider\'s name is of'),
        ('[providers."a\\r\\nX-Y: 1"]\nbase_url = "http://h"\n', "a provider's name is of ASCII"),
        (
            '[providers.x]\nbase_url = "http://h"\nheaders = { "X Y" = "1" }\n',
            'gateway.toml:3: providers.x.headers."X Y": this cannot be sent',
        ),
        (
            '[providers.x]\nbase_url = "http://h"\nheaders = { X-Y = "1\\r\\nZ: 2" }\n',
            'gateway.toml:3: providers.x.headers."X-Y": this cannot be sent',
        ),
        ("[models.m]\ntarget = []\n", "gateway.toml:2: models.m.target: there is no such key"),
    ],
)
def test_a_wrong_file_is_named_with_line_and_key(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        routes(operators_file(tmp_path, text))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_may_begin_with_the_mark_that_windows_editors_write(tmp_path: Path) -> None:
    assert "smart" in routes(operators_file(tmp_path, '\ufeff[aliases]\nsmart = "gpt-4o"\n')).aliases


def test_an_operators_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"^GATEWAY_CONFIG: .*gateway\.toml is not UTF-8"):
        routes({"GATEWAY_CONFIG": str(path)})
    with pytest.raises(SettingsError, match=r"^GATEWAY_CONFIG: cannot read .*none\.toml"):
        routes({"GATEWAY_CONFIG": str(tmp_path / "none.toml")})


def test_a_default_provider_that_is_none_stops_the_start() -> None:
    with pytest.raises(SettingsError, match=r"^GATEWAY_DEFAULT_PROVIDER: .*openai"):
        routes({"GATEWAY_DEFAULT_PROVIDER": "nobody"})
    assert routes({"GATEWAY_DEFAULT_PROVIDER": "mock-openai"}).default == "mock-openai"


# --- what the README says -----------------------------------------------------------------------------------------


def test_the_readmes_example_of_another_provider_works(tmp_path: Path) -> None:
    example = "\n".join(re.findall(r"```toml\n(.*?)```", README.read_text(), re.DOTALL))
    keys = {"GROQ_API_KEY": "gsk", "NEBIUS_API_KEY": "nbs", "OPENAI_API_KEY": "sk", "ANTHROPIC_API_KEY": "sk-ant"}
    environ: dict[str, Any] = {**operators_file(tmp_path, example), **keys, "OLLAMA_BASE_URL": "http://localhost:11434"}
    config = load_config(load_settings(environ), environ)
    target = config.routes.resolve("fast")[0][0]
    assert (target.provider.name, target.model, target.credential) == ("groq", "llama-3.3-70b-versatile", "gsk")
    assert config.routes.resolve("Qwen/Qwen3-32B")[0][0].credential == "nbs"
    asked = [
        [f"{target.provider.name}/{target.model}" for target in group] for group in config.routes.resolve("gpt-4o")
    ]
    assert asked == [["openai/gpt-4o"], ["anthropic/claude-sonnet-4-5"], ["ollama/llama3.2"]]  # no key of Azure's here
    own, local = config.prices.price("openai", "gpt-4o-2024-08-06"), config.prices.price("ollama", "llama3.2")
    assert own is not None
    assert local is not None
    assert cost_micros(own, Usage(1_000_000, 0)) == 2_500_000
    assert cost_micros(local, Usage(1_000_000, 1_000_000)) == 0


# --- gateway config check -----------------------------------------------------------------------------------------


def check(*argv: str, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> int:
    parser = argparse.ArgumentParser()
    describe_config(parser)
    monkeypatch.setattr("os.environ", environ)
    arguments = parser.parse_args(["check", *argv])
    status: int = arguments.run(arguments, load_settings(environ))
    return status


def test_a_right_file_is_shown_as_who_answers_for_which_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {**KEYS, "GATEWAY_MOCK": "off", **operators_file(tmp_path, CHAIN)}
    assert check(environ=environ, monkeypatch=monkeypatch) == 0
    first, second, *models = capsys.readouterr().out.splitlines()
    assert first.endswith("gateway.toml: right")
    assert second == "providers: openai, anthropic, ollama, azure"
    chain = (
        "openai/gpt-4o x3 | azure/gpt-4o-eu, then anthropic/claude-sonnet-4-5, then ollama/llama3.2, then ollama/qwen3"
    )
    assert models == [f"best: {chain}", f"gpt-4o: {chain}", "best-of-mine: ollama/qwen3"]
    (tmp_path / "other.toml").write_text('[models.m]\ntargets = [{ to = "xai/grok-4" }]\n')
    assert check(str(tmp_path / "other.toml"), environ=environ, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "m: nobody, because the model 'm' belongs to xai, which has no credential here"
    ]


def test_a_wrong_file_is_refused_by_the_check_as_by_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = operators_file(tmp_path, "[models.m]\nfallback = []\n")
    with pytest.raises(ConfigError, match=r"gateway\.toml:2: models\.m\.fallback: there is no such key"):
        check(environ=environ, monkeypatch=monkeypatch)
