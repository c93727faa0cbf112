"""Settings: what is taken, what stops the start, and that the README says the same."""

import re
from pathlib import Path

import pytest

from gateway.settings import SECRETS, Settings, SettingsError, describe, load_routes, load_settings

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
    ],
)
def test_a_wrong_setting_is_named_in_one_line(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name) as refused:
        load_settings({name: value})
    assert "\n" not in str(refused.value)


def test_what_make_up_writes_for_scripts_may_be_in_the_environment() -> None:
    load_settings({"GATEWAY_BASE_URL": "http://localhost:3000/v1", "GATEWAY_API_KEY": "aig_x"})


def test_secrets_are_settings_and_no_secret_has_a_default() -> None:
    assert set(Settings.__struct_fields__) >= SECRETS
    assert all(getattr(Settings(), name) == "" for name in SECRETS)


# --- providers ----------------------------------------------------------------------------------------------------


def test_a_provider_is_on_when_it_has_a_key_or_an_address_of_its_own() -> None:
    def enabled(**environ: str) -> set[str]:
        routes = load_routes(load_settings(environ), environ)
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
    assert load_routes(load_settings(environ), environ).providers[name].base_url == expected


@pytest.mark.parametrize("address", ["ftp://h", "h:1", "http://", "http://user:pw@h", "http://h/?x=1", "http://h/ v1"])
def test_an_address_that_is_none_stops_the_start(address: str) -> None:
    environ = {"OPENAI_BASE_URL": address}
    with pytest.raises(SettingsError, match="OPENAI_BASE_URL"):
        load_routes(load_settings(environ), environ)


def operators_file(tmp_path: Path, text: str) -> dict[str, str]:
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    return {"GATEWAY_CONFIG": str(path)}


def test_the_readmes_example_of_another_provider_works(tmp_path: Path) -> None:
    [example] = re.findall(r"```toml\n(.*?)```", README.read_text(), re.DOTALL)
    environ = {**operators_file(tmp_path, example), "GROQ_API_KEY": "gsk"}
    routes = load_routes(load_settings(environ), environ)
    target = routes.resolve("fast")
    assert (target.provider.name, target.model, target.credential) == ("groq", "llama-3.3-70b-versatile", "gsk")
    assert routes.resolve("llama-3.3-anything").provider.name == "groq"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[providers.x]\nbase_url = 1\n", "base_url"),
        ("[providers.x]\n", "base_url"),
        ('[providers.x]\nbase_url = "http://h"\ndialekt = "openai"\n', "dialekt"),
        ('[providers.x]\nbase_url = "nowhere"\n', "providers.x.base_url"),
        ("[aliases]\nfast = 1\n", "aliases"),
        ('[aliases]\nfast = "fast"\n', "aliases.fast"),
        ("[providers\n", "line 1"),
        ("[chains]\n", "chains"),
    ],
)
def test_a_wrong_file_is_named_with_the_key(tmp_path: Path, text: str, words: str) -> None:
    environ = operators_file(tmp_path, text)
    with pytest.raises(SettingsError, match=words) as refused:
        load_routes(load_settings(environ), environ)
    assert "gateway.toml" in str(refused.value) or "providers." in str(refused.value)
