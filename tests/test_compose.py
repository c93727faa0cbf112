import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from gateway.config import load_config
from gateway.settings import Settings, load_settings

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE: Mapping[str, Any] = YAML(typ="safe").load(TEXT)
SERVICES: Mapping[str, Any] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
ROWS = tomllib.loads((ROOT / "gateway" / "providers.toml").read_text())["providers"].values()
OF_COMPOSE = {"POSTGRES_PASSWORD", "GRAFANA_PORT", "PROMETHEUS_PORT"}  # variables that are no settings of the gateway
ONE_SHOT = {"reader"}  # services that do one thing and end
PROVIDERS_VARIABLES = {value for row in ROWS for name, value in row.items() if name.endswith("_env")}


def variables_of_env_example() -> dict[str, str]:
    lines = (line.removeprefix("# ") for line in (ROOT / ".env.example").read_text().splitlines())
    pairs = (re.fullmatch(r"([A-Z_]+)=(.*)", line) for line in lines)
    return {pair[1]: pair[2] for pair in pairs if pair}


def mounts() -> list[tuple[str, str]]:
    return [(name, mount) for name, service in SERVICES.items() for mount in service.get("volumes", [])]


def needs() -> list[tuple[str, str]]:
    """Which service is waited for, and what it has to be."""
    return [
        (name, need["condition"])
        for service in SERVICES.values()
        for name, need in service.get("depends_on", {}).items()
    ]


def test_compose_yaml_follows_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(ROOT / "compose.yaml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_volume_is_declared_and_used() -> None:
    named = {mount.split(":")[0] for _, mount in mounts() if not mount.startswith(".")}
    assert named == set(COMPOSE["volumes"])


def test_every_file_that_is_mounted_exists() -> None:
    missing = [mount for _, mount in mounts() if mount.startswith(".") and not (ROOT / mount.split(":")[0]).exists()]
    assert missing == []


def test_every_service_keeps_its_data_in_a_volume_and_can_be_asked_for_its_health() -> None:
    assert {name for name, mount in mounts() if not mount.startswith(".")} == set(SERVICES) - ONE_SHOT
    asked = {name for name, service in SERVICES.items() if service["healthcheck"].get("test")}
    assert asked == set(SERVICES) - ONE_SHOT


def test_what_ends_by_itself_is_waited_for_and_not_started_again() -> None:
    """`docker compose up --wait` fails when a service ends that nobody waits for like this."""
    awaited = {name for name, condition in needs() if condition == "service_completed_successfully"}
    assert awaited == ONE_SHOT == {name for name, service in SERVICES.items() if service.get("restart") == "no"}


def test_what_is_mounted_from_here_is_mounted_to_be_read() -> None:
    assert [mount for _, mount in mounts() if mount.startswith(".") and not mount.endswith(":ro")] == []


def test_a_service_waits_until_those_it_needs_are_healthy() -> None:
    assert {name for name, _ in needs()} <= set(SERVICES)
    assert [name for name, condition in needs() if name not in ONE_SHOT and condition != "service_healthy"] == []


def test_the_gateway_waits_until_its_stores_are_healthy() -> None:
    needs = SERVICES["gateway"]["depends_on"]
    assert {name: need["condition"] for name, need in needs.items()} == {
        "postgres": "service_healthy",
        "redis": "service_healthy",
    }
    assert set(needs) <= set(SERVICES)


def test_addresses_name_services_of_this_file() -> None:
    environment = SERVICES["gateway"]["environment"]
    addresses = [environment[name] for name in ("DATABASE_URL", "REDIS_URL")]
    hosts = [re.search(r"(?:@|//)([a-z]+):\d+", address) for address in addresses]
    assert [host[1] for host in hosts if host] == ["postgres", "redis"]
    assert set(SERVICES) == {"gateway", "postgres", "redis", "ollama", "prometheus", "reader", "grafana"}


def test_an_ollama_is_looked_for_on_the_machine_and_none_is_given() -> None:
    """An address that is given is used whether it answers or not: every misspelt model would be routed to it."""
    gateway = SERVICES["gateway"]
    environ = {name: re.sub(r"\$\{[A-Z_]+:[-?](.*)\}", r"\1", value) for name, value in gateway["environment"].items()}
    given = {name: environ[name] for name in ("OLLAMA_BASE_URL", "GATEWAY_OLLAMA_PROBE")}
    assert given == {"OLLAMA_BASE_URL": "", "GATEWAY_OLLAMA_PROBE": "http://host.docker.internal:11434"}
    ollama = load_config(load_settings(given), given).routes.providers["ollama"]
    assert (ollama.base_url, ollama.enabled) == ("http://host.docker.internal:11434", False)
    assert gateway["extra_hosts"] == ["host.docker.internal:host-gateway"]


def test_the_port_is_the_same_everywhere() -> None:
    gateway = SERVICES["gateway"]
    published = gateway["ports"][0].rpartition(":")[2]
    assert {published, gateway["environment"]["PORT"], str(Settings().port)} == {"3000"}
    assert ":3000/health/ready" in " ".join(gateway["healthcheck"]["test"])
    assert "EXPOSE 3000\n" in DOCKERFILE
    assert "PORT=3000" in DOCKERFILE


def test_what_is_published_is_published_to_this_machine_only_and_stores_are_not() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "gateway": ["${HOST:-127.0.0.1}:${PORT:-3000}:3000"],
        "prometheus": ["127.0.0.1:${PROMETHEUS_PORT:-9090}:9090"],
        "grafana": ["127.0.0.1:${GRAFANA_PORT:-3002}:3000"],
    }


def test_images_have_a_version_that_does_not_change_its_data_by_itself() -> None:
    images = {name: service["image"] for name, service in SERVICES.items() if "build" not in service}
    assert [name for name, image in images.items() if not re.search(r":v?\d", image)] == ["ollama"]
    assert images["reader"] == images["postgres"]


def test_grafana_finds_its_data_sources_where_this_file_has_them() -> None:
    yaml = (ROOT / "grafana" / "provisioning" / "datasources" / "datasources.yaml").read_text()
    sources = {source["uid"]: source for source in YAML(typ="safe").load(yaml)["datasources"]}
    assert sources["prometheus"]["url"] == "http://prometheus:9090"
    postgres, environment = sources["postgres"], SERVICES["postgres"]["environment"]
    assert (postgres["url"], postgres["jsonData"]["database"]) == ("postgres:5432", environment["POSTGRES_DB"])
    assert postgres["secureJsonData"]["password"] == "$POSTGRES_PASSWORD"
    reader = SERVICES["reader"]["environment"]
    passwords = [
        SERVICES["grafana"]["environment"]["POSTGRES_PASSWORD"], reader["PGPASSWORD"], environment["POSTGRES_PASSWORD"],
    ]  # fmt: skip
    assert len(set(passwords)) == 1
    assert (reader["PGHOST"], reader["PGUSER"], reader["PGDATABASE"]) == ("postgres", "gateway", "gateway")


def test_prometheus_scrapes_the_gateway_of_this_file() -> None:
    [job] = YAML(typ="safe").load((ROOT / "grafana" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert (job["job_name"], job["static_configs"]) == ("gateway", [{"targets": ["gateway:3000"]}])


def test_no_secret_is_in_the_file() -> None:
    values = re.findall(r"(?i)(?:password|secret|key)\w*: *(\S.*)|://\w+:(\$\{.*?\}|\S+?)@", TEXT)
    secrets = [first or second for first, second in values]
    assert secrets
    assert [secret for secret in secrets if not secret.startswith("${")] == []


def test_every_variable_that_is_asked_for_is_explained() -> None:
    asked = set(re.findall(r"\$\{([A-Z_]+)", TEXT))
    assert asked <= set(variables_of_env_example())


def test_env_example_holds_settings_that_the_gateway_knows_with_values_it_takes() -> None:
    variables = variables_of_env_example()
    known = {name.upper() for name in Settings.__struct_fields__}
    assert set(variables) - known - PROVIDERS_VARIABLES == OF_COMPOSE
    load_config(load_settings(variables), variables)


def test_env_example_names_what_switches_each_shipped_provider_on() -> None:
    optional = {"VLLM_API_KEY", "LLAMACPP_API_KEY"}  # most people's servers have none
    assert set(variables_of_env_example()) >= PROVIDERS_VARIABLES - optional


def test_env_example_shows_the_real_defaults() -> None:
    examples = (PROVIDERS_VARIABLES | OF_COMPOSE) - {"OLLAMA_BASE_URL"}  # their addresses are nobody's default
    shown = {
        name.lower(): value for name, value in variables_of_env_example().items() if value and name not in examples
    }
    ports = re.findall(r"\$\{([A-Z]+_PORT):-(\d+)\}", TEXT)
    assert {name: variables_of_env_example()[name] for name, _ in ports} == dict(ports)
    elsewhere = {"database_url", "redis_url", "ollama_base_url"}  # examples of addresses
    defaults = {name: str(getattr(Settings(), name)) for name in shown}
    assert {name: shown[name] for name in shown.keys() - elsewhere} == {
        name: defaults[name] for name in shown.keys() - elsewhere
    }


def test_redis_never_evicts_a_limit_and_keeps_its_data() -> None:
    command = " ".join(SERVICES["redis"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes" in command


def test_containers_have_longer_to_stop_than_streams_to_drain() -> None:
    assert int(SERVICES["gateway"]["stop_grace_period"].removesuffix("s")) > Settings().gateway_drain_timeout


def test_what_the_image_copies_exists_and_is_sent_to_the_builder() -> None:
    copies = re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for copy in copies for source in copy.split()}
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources == sent
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_image_installs_by_hash_and_does_not_run_as_root() -> None:
    installs = re.findall(r"pip install (.+?)(?: \\)?$", DOCKERFILE, re.MULTILINE)
    assert [line for line in installs if "--require-hashes" not in line and "--no-index" not in line] == []
    assert "\nUSER 10001\n" in DOCKERFILE
