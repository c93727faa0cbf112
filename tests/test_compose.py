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
# Variables that are no settings of the gateway.
OF_COMPOSE = {"POSTGRES_PASSWORD", "GRAFANA_PORT", "PROMETHEUS_PORT", "CPUS", "OLLAMA_MEMORY", "COMPOSE_PROFILES"}
ONE_SHOT = {"reader"}  # services that do one thing and end
# Shown in .env.example as somebody might have them, not as they are without it.
EXAMPLES = {
    "AZURE_OPENAI_ENDPOINT", "VLLM_BASE_URL", "LMSTUDIO_BASE_URL", "LLAMACPP_BASE_URL", "OLLAMA_BASE_URL",
    "DATABASE_URL", "REDIS_URL", "COMPOSE_PROFILES",
}  # fmt: skip
MIB = 1 << 20
PROVIDERS_VARIABLES = {value for row in ROWS for name, value in row.items() if name.endswith("_env")}


def variables_of_env_example() -> dict[str, str]:
    lines = (line.removeprefix("# ") for line in (ROOT / ".env.example").read_text().splitlines())
    pairs = (re.fullmatch(r"([A-Z_]+)=(.*)", line) for line in lines)
    return {pair[1]: pair[2] for pair in pairs if pair}


def mounts() -> list[tuple[str, str]]:
    """Of each service, `source:target` and `:ro` of what is mounted to be read only."""
    return [(name, as_text(mount)) for name, service in SERVICES.items() for mount in service.get("volumes", [])]


def as_text(mount: str | Mapping[str, Any]) -> str:
    if isinstance(mount, str):
        return mount
    return f"{substituted(mount['source'], {})}:{mount['target']}{':ro' if mount.get('read_only') else ''}"


def substituted(text: str, environ: Mapping[str, str]) -> str:
    """With the values of variables (https://docs.docker.com/reference/compose-file/interpolation/)."""

    def value(found: re.Match[str]) -> str:
        name, operator, word = found.groups()
        given = environ.get(name, "")
        return (word if given else "") if operator == ":+" else given or (word if operator == ":-" else "")

    return re.sub(r"\$\{([A-Z_]+)(:[-+?])([^}]*)\}", value, text)


def size(text: str) -> int:
    """Bytes; Compose and Redis both mean powers of 1024 by these units."""
    found = re.fullmatch(r"(\d+)([mg])b?", substituted(text, {}))
    assert found, text
    return int(found[1]) * {"m": MIB, "g": MIB << 10}[found[2]]


def limits(service: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = SERVICES[service]["deploy"]["resources"]["limits"]
    return found


def redis_options() -> dict[str, str]:
    _, *words = SERVICES["redis"]["command"]
    return dict(zip(words[::2], words[1::2], strict=True))


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
    environ = gateway["environment"]
    given = {name: substituted(environ[name], {}) for name in ("OLLAMA_BASE_URL", "GATEWAY_OLLAMA_PROBE")}
    assert given == {"OLLAMA_BASE_URL": "", "GATEWAY_OLLAMA_PROBE": "http://host.docker.internal:11434"}
    ollama = load_config(load_settings(given), given).routes.providers["ollama"]
    assert (ollama.base_url, ollama.enabled) == ("http://host.docker.internal:11434", False)
    assert gateway["extra_hosts"] == ["host.docker.internal:host-gateway"]


def test_the_port_is_the_same_everywhere() -> None:
    gateway = SERVICES["gateway"]
    published = gateway["ports"][0].rpartition(":")[2]
    assert {published, gateway["environment"]["PORT"], str(Settings().port)} == {"3000"}
    assert '("127.0.0.1", 3000)' in gateway["healthcheck"]["test"][-1]


def test_what_is_published_is_published_to_this_machine_only_and_stores_are_not() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "gateway": ["${HOST:-127.0.0.1}:${PORT:-3000}:3000"],
        "prometheus": ["127.0.0.1:${PROMETHEUS_PORT:-9090}:9090"],
        "grafana": ["127.0.0.1:${GRAFANA_PORT:-3002}:3000"],
    }


def test_images_have_a_version_that_does_not_change_its_data_by_itself() -> None:
    images = {name: service["image"] for name, service in SERVICES.items() if "build" not in service}
    assert [name for name, image in images.items() if not re.search(r":v?\d", image)] == []
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


def test_env_example_shows_every_setting_and_every_variable_of_a_provider() -> None:
    settings = {name.upper() for name in Settings.__struct_fields__}
    assert set(variables_of_env_example()) == settings | PROVIDERS_VARIABLES | OF_COMPOSE


def test_env_example_shows_the_real_defaults() -> None:
    shown = {name: value for name, value in variables_of_env_example().items() if value and name not in EXAMPLES}
    assert load_settings(shown) == Settings()
    defaults = dict(re.findall(r"\$\{([A-Z_]+):-([\w.]+)\}", TEXT))
    assert {name: shown[name] for name in OF_COMPOSE & shown.keys()} == {
        name: value for name, value in defaults.items() if name in OF_COMPOSE
    }


def test_env_example_holds_no_secret() -> None:
    shown = variables_of_env_example()
    secrets = {name for name in shown if re.search(r"_KEY$|PASSWORD|PEPPER|PROXY", name)}
    assert {name: shown[name] for name in secrets if shown[name]} == {}


def test_an_operators_file_is_mounted_where_the_gateway_reads_it() -> None:
    gateway = SERVICES["gateway"]
    [mount] = [mount for mount in gateway["volumes"] if not isinstance(mount, str)]
    for environ, path in (({}, ""), ({"GATEWAY_CONFIG": "mine.toml"}, mount["target"])):
        assert substituted(gateway["environment"]["GATEWAY_CONFIG"], environ) == path
    assert substituted(mount["source"], {"GATEWAY_CONFIG": "mine.toml"}) == "mine.toml"


def test_every_service_has_limits_of_memory_processes_and_cores() -> None:
    wanted = {"memory", "pids", "cpus"}
    assert {name: set(limits(name)) for name in SERVICES} == dict.fromkeys(SERVICES, wanted) | {
        "ollama": wanted - {"cpus"}  # it computes, and gives way to the others
    }
    assert SERVICES["ollama"]["cpu_shares"] < 1024  # what all others have


def test_no_service_wants_more_cores_than_the_smallest_machine_has() -> None:
    """Docker refuses to start a container with a limit above the number of the machine's cores."""
    cores = {name: substituted(limits(name)["cpus"], {}) for name in SERVICES if "cpus" in limits(name)}
    assert [name for name, number in cores.items() if float(number) > 1] == []


def test_all_services_together_fit_a_laptop_of_8_gb() -> None:
    memory = {name: size(limits(name)["memory"]) for name in SERVICES}
    usual = sum(limit for name, limit in memory.items() if "profiles" not in SERVICES[name])
    assert usual <= 4096 * MIB
    assert sum(memory.values()) <= 8192 * MIB


def test_redis_has_room_to_rewrite_its_log_below_its_limit_of_memory() -> None:
    assert 2 * size(redis_options()["--maxmemory"]) < size(limits("redis")["memory"])


def test_redis_never_evicts_a_limit_and_keeps_its_data() -> None:
    options = redis_options()
    assert (options["--maxmemory-policy"], options["--appendonly"]) == ("noeviction", "yes")


def test_what_may_not_write_has_a_volume_for_what_it_writes() -> None:
    sealed = {name for name, service in SERVICES.items() if service.get("read_only")}
    writable = {name for name, mount in mounts() if not mount.endswith(":ro")}
    assert sealed == {"gateway", "redis", "prometheus"}
    assert sealed <= writable


def test_the_gateway_writes_where_its_volume_is() -> None:
    [volume] = [mount.split(":")[1] for name, mount in mounts() if name == "gateway" and not mount.endswith(":ro")]
    assert SERVICES["gateway"]["environment"]["GATEWAY_DATA_DIR"].startswith(f"{volume}/")
    assert f"VOLUME {volume}\n" in DOCKERFILE


def test_the_gateway_has_no_right_that_it_does_not_need() -> None:
    gateway = SERVICES["gateway"]
    assert (gateway["user"], gateway["cap_drop"]) == ("10001", ["ALL"])
    assert re.findall(r"^USER (\d+)", DOCKERFILE, re.MULTILINE) == [gateway["user"]]
    assert gateway["ulimits"] == {"nofile": 65536}


def test_no_service_can_gain_rights_or_fill_the_disk_with_its_log() -> None:
    for service in SERVICES.values():
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}}
        assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service)


def test_what_serves_is_started_again_and_what_is_done_is_not() -> None:
    policies = {name: service["restart"] for name, service in SERVICES.items()}
    assert policies == {name: "no" if name in ONE_SHOT else "unless-stopped" for name in SERVICES}


def test_containers_have_longer_to_stop_than_streams_to_drain() -> None:
    assert int(SERVICES["gateway"]["stop_grace_period"].removesuffix("s")) > Settings().gateway_drain_timeout
