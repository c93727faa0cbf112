"""Settings: what is taken, what stops the start, and that the README says the same."""

import re
from pathlib import Path

import pytest

from gateway.config import load_config
from gateway.protocol.pricing import cost_micros
from gateway.protocol.usage import Usage
from gateway.settings import (
    SECRETS,
    Settings,
    SettingsError,
    change,
    describe,
    load_settings,
)

pytestmark = pytest.mark.unit

README = Path(__file__).parents[1] / "README.md"


def shown(value: object) -> str:
    if value == "":
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def test_the_readme_has_every_setting_with_its_default_and_meaning() -> None:
    table = README.read_text().split("<!-- settings -->")[1].split("<!-- /settings -->")[0].strip().splitlines()[2:]
    expected = [f"| `{row['name']}` | {shown(row['default'])} | {row['meaning']} |" for row in describe()]
    assert expected == table
    assert all(row["meaning"] for row in describe())


def test_the_defaults_are_the_documented_ones() -> None:
    settings = load_settings({})
    assert (settings.host, settings.port, settings.environment) == ("127.0.0.1", 3000, "development")
    times = settings.gateway_connect_timeout, settings.gateway_first_byte_timeout, settings.gateway_idle_timeout
    assert (*times, settings.gateway_total_timeout) == (60, 60, 60, 60)
    assert settings.gateway_heartbeat == 15
    assert settings.gateway_requests_per_minute == 60


def test_values_are_read_by_their_type() -> None:
    settings = load_settings(
        {"PORT": "8080", "GATEWAY_OWN_CREDENTIAL": "false", "GATEWAY_HEARTBEAT": "2.5", "LOG_LEVEL": "DEBUG"}
    )
    assert (settings.port, settings.gateway_own_credential, settings.gateway_heartbeat) == (8080, False, 2.5)
    assert settings.log_level == "debug"


def test_an_empty_value_is_as_good_as_none() -> None:
    assert load_settings({"PORT": "", "OPENAI_API_KEY": " "}) == load_settings({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "many"),
        ("PORT", "70000"),
        ("ENVIRONMENT", "staging"),
        ("GATEWAY_HEARTBEAT", "0"),
        ("GATEWAY_HEARTBEAT", "-1"),
        ("GATEWAY_MAX_BODY", "1.5"),
        ("GATEWAY_OWN_CREDENTIAL", "perhaps"),
        ("GATEWAY_NO_SUCH_THING", "1"),
        ("GATEWAY_HEARTBEAT", "inf"),
        ("GATEWAY_HEARTBEAT", "nan"),
        ("GATEWAY_DRAIN_DELAY", "inf"),
        ("GATEWAY_DRAIN_DELAY", "110.5"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name) as refused:
        load_settings({name: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://h/hunter22"),
        ("DATABASE_URL", "hunter22"),
        ("DATABASE_URL", "postgresql://u@h:hunter22/x"),
        ("DATABASE_URL", "postgresql://u@h:5432,h2:hunter22/x"),
        ("DATABASE_URL", "postgresql://u@h:0/x"),
        ("DATABASE_URL", "postgresql://u@/x?host=h:hunter22"),
        ("DATABASE_URL", "postgresql://u@h/x?port=hunter22"),
        ("DATABASE_URL", "postgresql://u@h/x?hunter22"),
        ("DATABASE_URL", "postgresql://u:hunter@22@h/x"),
        ("DATABASE_URL", "postgresql://u:hunter/22@h/x"),
        ("DATABASE_URL", "postgresql://u:hunter22@[::1/x"),
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "redis://h:hunter22"),
        ("REDIS_URL", "redis://h:99999"),
        ("REDIS_URL", "redis://:hunter@22@h"),
        ("REDIS_URL", "redis://:22/hunter@h"),
        ("REDIS_URL", "redis://[::1"),
        ("OPENAI_BASE_URL", "http://[::1/v1"),
        ("OPENAI_BASE_URL", "http://h:99999"),
        ("ANTHROPIC_BASE_URL", "http://h:hunter22"),
        ("OLLAMA_BASE_URL", "http://:hunter22@h"),
        ("GATEWAY_OLLAMA_PROBE", "localhost:11434"),
        ("GATEWAY_PROXY", "hunter22:3128"),
        ("GATEWAY_PROXY", "https://u:hunter22@h"),
        ("GATEWAY_PROXY", "http://u:hunter22@"),
        ("GATEWAY_PROXY", "http://u:hunter@22@h"),
        ("GATEWAY_PROXY", "http://u:hunter/22@h"),
        ("GATEWAY_PROXY", "http://u:hunter 22@h"),
        ("GATEWAY_PROXY", "http://u:pw@h:hunter22"),
        ("GATEWAY_PROXY", "http://u:pw@h/hunter22"),
    ],
)
def test_an_address_that_cannot_be_one_is_named_and_not_repeated(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: ") as refused:
        load_settings({name: value})
    assert "hunter" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "postgres://u:p%40w@db.example.org/x?sslmode=require"),
        ("DATABASE_URL", "postgresql://postgres@/postgres?host=/tmp/aig-x"),
        ("DATABASE_URL", "postgresql://u@h1:5432,h2:5433,[::1]:5434/x?target_session_attrs=primary"),
        ("DATABASE_URL", "postgresql:///x"),
        ("REDIS_URL", "redis://:p%40w@h:6379/15"),
        ("REDIS_URL", "rediss://[::1]:6379"),
        ("REDIS_URL", "unix:///tmp/valkey.sock?db=3"),
        ("OPENAI_BASE_URL", "http://[::1]:8100/v1"),
        ("GATEWAY_PROXY", "http://u:p%40w@proxy.example.org:3128"),
        ("GATEWAY_PROXY", "http://[::1]:3128/"),
    ],
)
def test_addresses_of_every_usual_form_are_taken(name: str, value: str) -> None:
    assert getattr(load_settings({name: value}), name.lower()) == value


def test_what_the_command_line_changes_is_checked_like_the_environment() -> None:
    settings = load_settings({"LOG_LEVEL": "debug"})
    changed = change(settings, {"host": "::1", "port": "8080"})
    assert (changed.host, changed.port, changed.log_level) == ("::1", 8080, "debug")
    for port in ("99999", "many", "-1"):
        with pytest.raises(SettingsError, match=r"^PORT: "):
            change(settings, {"port": port})


def test_the_repr_shows_settings_and_no_secret() -> None:
    secrets = {name.upper(): "hunter22" for name in SECRETS}
    secrets |= {"DATABASE_URL": "postgresql://u:hunter22@h/x", "REDIS_URL": "redis://:hunter22@h"}
    secrets["GATEWAY_PROXY"] = "http://u:hunter22@h:3128"
    shown = repr(load_settings({**secrets, "PORT": "8080"}))
    assert "hunter22" not in shown
    assert "port=8080" in shown
    assert "openai_api_key='***'" in shown
    assert "openai_api_key=''" in repr(load_settings({})), "whether there is one is worth knowing"


def test_what_make_up_writes_for_scripts_may_be_in_the_environment() -> None:
    load_settings({"GATEWAY_BASE_URL": "http://localhost:3000/v1", "GATEWAY_API_KEY": "aig_x"})


def test_secrets_are_settings_and_no_secret_has_a_default() -> None:
    assert set(Settings.__struct_fields__) >= SECRETS
    assert all(getattr(Settings(), name) == "" for name in SECRETS)


# --- providers ----------------------------------------------------------------------------------------------------


def test_a_provider_is_on_when_it_has_a_key_or_an_address_of_its_own() -> None:
    def enabled(**environ: str) -> set[str]:
        routes = load_config(load_settings(environ), environ).routes
        return {name for name, provider in routes.providers.items() if provider.enabled}

    assert enabled() == set()
    assert enabled(OPENAI_API_KEY="k") == {"openai"}
    assert enabled(ANTHROPIC_BASE_URL="http://127.0.0.1:1") == {"anthropic"}
    assert enabled(OLLAMA_BASE_URL="http://127.0.0.1:1") == {"ollama"}


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("openai", "http://h:1/v1", "http://h:1/v1"),
        ("openai", "http://h:1/v1/", "http://h:1/v1"),
        ("openai", "http://h:1", "http://h:1/v1"),
        ("openai", "http://h:1/openai/v3", "http://h:1/openai/v3"),
        ("anthropic", "http://h:1", "http://h:1"),
        ("anthropic", "http://h:1/v1", "http://h:1"),
        ("ollama", "http://h:1/", "http://h:1"),
        ("ollama", "http://h:1/v1", "http://h:1"),
    ],
)
def test_addresses_are_taken_as_people_write_them(name: str, given: str, expected: str) -> None:
    environ = {f"{name.upper()}_BASE_URL": given}
    assert load_config(load_settings(environ), environ).routes.providers[name].base_url == expected


@pytest.mark.parametrize("address", ["ftp://h", "h:1", "http://", "http://user:pw@h", "http://h/?x=1", "http://h/ v1"])
def test_an_address_that_is_none_stops_the_start(address: str) -> None:
    environ = {"OPENAI_BASE_URL": address}
    with pytest.raises(SettingsError, match="OPENAI_BASE_URL"):
        load_config(load_settings(environ), environ)


def test_ollama_is_looked_for_where_the_setting_says_unless_the_operator_gave_its_address(tmp_path: Path) -> None:
    def ollama(**environ: str) -> tuple[str, bool]:
        provider = load_config(load_settings(environ), environ).routes.providers["ollama"]
        return provider.base_url, provider.enabled

    probe = {"GATEWAY_OLLAMA_PROBE": "http://elsewhere:11434/"}
    assert ollama() == ("http://localhost:11434", False)
    assert ollama(**probe) == ("http://elsewhere:11434", False)
    assert ollama(**probe, OLLAMA_BASE_URL="http://given:1") == ("http://given:1", True)
    own = operators_file(tmp_path, '[providers.ollama]\ndialect = "ollama"\nbase_url = "http://own:1"\n')
    assert ollama(**probe, **own) == ("http://own:1", False)


def test_an_operators_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_bytes(b"\xff\xfe")
    environ = {"GATEWAY_CONFIG": str(path)}
    with pytest.raises(SettingsError, match=r"^GATEWAY_CONFIG: .*gateway\.toml is not UTF-8"):
        load_config(load_settings(environ), environ)


def operators_file(tmp_path: Path, text: str) -> dict[str, str]:
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    return {"GATEWAY_CONFIG": str(path)}


def test_the_readmes_example_of_another_provider_works(tmp_path: Path) -> None:
    example = "\n".join(re.findall(r"```toml\n(.*?)```", README.read_text(), re.DOTALL))
    environ = {**operators_file(tmp_path, example), "GROQ_API_KEY": "gsk"}
    routes = load_config(load_settings(environ), environ).routes
    target = routes.resolve("fast")[0][0]
    assert (target.provider.name, target.model, target.credential) == ("groq", "llama-3.3-70b-versatile", "gsk")
    assert routes.resolve("llama-3.3-anything")[0][0].provider.name == "groq"
    prices = load_config(load_settings(environ), environ).prices
    own, local = prices.price("openai", "gpt-4o-2024-08-06"), prices.price("ollama", "llama3.2")
    assert own is not None
    assert local is not None
    assert cost_micros(own, Usage(1_000_000, 0)) == 2_500_000
    assert cost_micros(local, Usage(1_000_000, 1_000_000)) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[providers.x]\nbase_url = 1\n", "base_url"),
        ("[providers.x]\n", "base_url"),
        ('[providers.x]\nbase_url = "http://h"\ndialekt = "openai"\n', "dialekt"),
        ('[providers.x]\nbase_url = "nowhere"\n', "providers.x.base_url"),
        ('[providers.x]\nbase_url = "http://h:99999"\n', "providers.x.base_url"),
        ("[aliases]\nfast = 1\n", "aliases"),
        ('[aliases]\nfast = "fast"\n', "aliases.fast"),
        ("[providers\n", "line 1"),
        ('[prices.openai]\n"gpt-4o" = { input = -1, output = 2 }\n', "prices.openai"),
        ('[limits."/v1/nowhere"]\nrequests_per_second = 1\n', "/v1/chat/completions"),
        ('[limits."/v1/chat/completions"]\nrequests_per_second = 0\n', "requests_per_second"),
        ("[chains]\n", "chains"),
    ],
)
def test_a_wrong_file_is_named_with_the_key(tmp_path: Path, text: str, words: str) -> None:
    environ = operators_file(tmp_path, text)
    with pytest.raises(SettingsError, match=words) as refused:
        load_config(load_settings(environ), environ)
    assert "gateway.toml" in str(refused.value) or "providers." in str(refused.value)
