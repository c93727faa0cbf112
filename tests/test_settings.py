"""Settings: what is taken, what stops the start, and that the README says the same."""

from pathlib import Path

import pytest

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
