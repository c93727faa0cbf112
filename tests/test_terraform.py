"""What terraform/ says, on every machine; `terraform` itself and its AWS provider where they are.

What a plan of it would be is asked by terraform/tests/*.tftest.hcl, which run here, too.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

import hcl2
import pytest

from gateway.handlers import health
from gateway.settings import SECRETS, Settings, load_settings
from tests.support.programs import ROOT
from tests.support.terraform import EXAMPLES, FOLDER, Block, blocks, copied, init, missing, parsed, terraform

pytestmark = pytest.mark.unit

BLOCKS = list(blocks())
RESOURCES = {block.address: block for block in BLOCKS if block.kind == "resource"}
VARIABLES = {block.address: block for block in BLOCKS if block.kind == "variable"}
OUTPUTS = {block.address: block for block in BLOCKS if block.kind == "output"}
README = (FOLDER / "README.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
MODULES = [FOLDER, *(FOLDER / "examples" / name for name in EXAMPLES)]

# Without these it would be another deployment than the README, and faults.md, promise.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "aws_lb.gateway": {
        "idle_timeout": 120,
        "desync_mitigation_mode": "strictest",
        "drop_invalid_header_fields": True,
        "xff_header_processing_mode": "append",
        "enable_deletion_protection": "${var.deletion_protection}",
        "access_logs.enabled": True,
    },
    "aws_lb_target_group.gateway": {
        "target_type": "ip",
        "port": 3000,
        "protocol_version": "HTTP1",
        "load_balancing_algorithm_type": "least_outstanding_requests",
        "deregistration_delay": 120,
        "health_check.path": "/health/ready",
        "health_check.interval": 5,
        "health_check.unhealthy_threshold": 2,
    },
    "aws_lb_listener.https": {"port": 443, "protocol": "HTTPS", "default_action.type": "forward"},
    "aws_lb_listener.http": {
        "port": 80,
        "default_action.type": "redirect",
        "default_action.redirect.protocol": "HTTPS",
        "default_action.redirect.status_code": "HTTP_301",
    },
    "aws_ecs_task_definition.gateway": {"requires_compatibilities": ["FARGATE"], "network_mode": "awsvpc"},
    "aws_ecs_service.gateway": {
        "deployment_minimum_healthy_percent": 100,
        "deployment_maximum_percent": 200,
        "deployment_circuit_breaker.enable": True,
        "deployment_circuit_breaker.rollback": True,
        "network_configuration.assign_public_ip": False,
        "enable_execute_command": False,
    },
    "aws_appautoscaling_policy.cpu": {
        "target_tracking_scaling_policy_configuration.predefined_metric_specification.predefined_metric_type": "ECSServiceAverageCPUUtilization",
    },
    "aws_appautoscaling_policy.requests": {
        "target_tracking_scaling_policy_configuration.predefined_metric_specification.predefined_metric_type": "ALBRequestCountPerTarget",
    },
    "aws_db_instance.gateway": {
        "engine": "postgres",
        "engine_version": "16",
        "multi_az": "${var.database_multi_az}",
        "storage_encrypted": True,
        "publicly_accessible": False,
        "backup_retention_period": "${var.database_backup_days}",
        "deletion_protection": "${var.deletion_protection}",
        "skip_final_snapshot": "${!var.deletion_protection}",
        "password": None,
    },
    "aws_elasticache_replication_group.gateway": {
        "at_rest_encryption_enabled": True,
        "transit_encryption_enabled": True,
        "transit_encryption_mode": "required",
        "automatic_failover_enabled": "${var.cache_replicas > 0}",
        "multi_az_enabled": "${var.cache_replicas > 0}",
    },
    "aws_elasticache_parameter_group.gateway": {"parameter.name": "maxmemory-policy", "parameter.value": "noeviction"},
    "aws_ecr_repository.gateway": {
        "image_tag_mutability": "IMMUTABLE",
        "image_scanning_configuration.scan_on_push": True,
    },
    "aws_cloudwatch_log_group.gateway": {"retention_in_days": "${var.log_retention_days}"},
    "aws_wafv2_web_acl.gateway": {"count": "${local.has_firewall ? 1 : 0}"},
}
DEFAULTS = {
    "deletion_protection": True, "nat_gateway_per_zone": True, "cpu": 512, "memory": 1024, "min_tasks": 2, "spot": False,
    "database_multi_az": True, "cache_replicas": 1, "waf_requests_per_5_minutes": None,
}  # fmt: skip


# --- the files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", SETTINGS)
def test_what_is_promised_is_set(address: str) -> None:
    set_here = {path: RESOURCES[address].value(path) for path in SETTINGS[address]}
    assert set_here == SETTINGS[address]


def test_what_is_not_said_is_made_for_production() -> None:
    assert {name: VARIABLES[name].body["default"] for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("folder", MODULES, ids=lambda folder: folder.name)
def test_every_variable_is_typed_described_and_used(folder: Path) -> None:
    text = "".join(re.sub(r'(?ms)^variable ".*?^}', "", file.read_text()) for file in folder.glob("*.tf"))
    variables = [block for block in blocks(folder) if block.kind == "variable"]
    assert [one.address for one in variables if not one.body.get("type") or not one.body.get("description")] == []
    assert [one.address for one in variables if not re.search(rf"\bvar\.{one.address}\b", text)] == []


def test_what_may_be_wrong_is_validated() -> None:
    free = {"tags", "zone_id", "alarm_email"}  # AWS takes or refuses them
    unchecked = {
        name for name, one in VARIABLES.items() if "validation" not in one.body and one.value("type") != "bool"
    }
    assert unchecked == free


@pytest.mark.parametrize("folder", MODULES, ids=lambda folder: folder.name)
def test_every_output_is_described(folder: Path) -> None:
    assert [one.address for one in blocks(folder) if one.kind == "output" and not one.body.get("description")] == []


def test_an_example_gives_variables_that_there_are_and_all_that_are_required() -> None:
    required = {name for name, one in VARIABLES.items() if "default" not in one.body}
    for folder in MODULES[1:]:
        [module] = [one for one in blocks(folder) if one.kind == "module"]
        assert module.body["source"] == "../.."
        assert required <= set(module.body) - {"source"} <= set(VARIABLES)


# --- who may do what ----------------------------------------------------------------------------------------------


def test_only_the_load_balancer_is_open_to_addresses_all_else_to_security_groups() -> None:
    rules = [one for name, one in RESOURCES.items() if name.startswith("aws_vpc_security_group_ingress_rule.")]
    by_address = [one for one in rules if any(name.startswith(("cidr_", "prefix_")) for name in one.body)]
    assert {one.value("security_group_id") for one in by_address} == {"${aws_security_group.load_balancer.id}"}
    assert {one.value("cidr_ipv4") for one in by_address} == {"${each.key}"}
    assert {one.value("for_each") for one in by_address} == {"${toset(var.allowed_cidrs)}"}
    assert len(rules) > len(by_address)
    groups = [one for name, one in RESOURCES.items() if "security_group." in name]
    assert [one.address for one in groups if {"ingress", "egress"} & set(one.body)] == []


def test_no_secret_is_written_here() -> None:
    """What is secret is an expression, and nothing looks like a key."""
    secret = ("password", "password_wo", "auth_token", "secret_string", "secret_string_wo")
    written = [(one.address, one.body[name]) for one in BLOCKS for name in secret if name in one.body]
    assert len(written) >= 5
    assert [address for address, value in written if "${" not in value] == []
    texts = {file: file.read_text() for file in FOLDER.rglob("*.tf*")}
    assert [
        file.name
        for file, text in texts.items()
        if re.search(r"\bAKIA|-----BEGIN|\baig_\w{12}_|\bsk-[a-zA-Z0-9]{20}", text)
    ] == []


def test_the_task_has_no_rights() -> None:
    """Its role has no policy, neither of ours nor attached; the execution role is what reads secrets."""
    policies = [one for name, one in RESOURCES.items() if name.startswith("aws_iam_role_policy")]
    assert policies
    assert [one.address for one in policies if "aws_iam_role.task" in str(one.body)] == []
    assert set(RESOURCES["aws_iam_role.task"].body) <= {"name", "description", "assume_role_policy", "tags"}


# --- the container and the gateway --------------------------------------------------------------------------------


def _local(name: str) -> Any:
    [found] = [local[name] for local in parsed(FOLDER / "service.tf")["locals"] if name in local]
    return found


def _environment() -> dict[str, str]:
    """The object in `merge({…}, var.settings)`: numbers that are computed are 2, and the folder is the one there is."""
    text = re.fullmatch(r"\$\{merge\((\{.*\}), *var\.settings\)\}", _local("environment"), re.DOTALL)
    assert text, "settings that are given come last, and win"
    options = hcl2.SerializationOptions(strip_string_quotes=True, with_comments=False)
    values = hcl2.loads(f"x = {text[1]}\n", serialization_options=options)["x"]
    folder = {name: value.replace("${local.data_folder}", _local("data_folder")) for name, value in values.items()}
    return {name: re.sub(r"^\$\{tostring\(.*\)\}$", "2", value) for name, value in folder.items()}


ENVIRONMENT = _environment()
CONTAINER: Mapping[str, Any] = _local("container")


def test_the_environment_is_of_settings_that_the_gateway_knows_with_values_it_takes() -> None:
    known = {field.upper() for field in Settings.__struct_fields__}
    assert set(ENVIRONMENT) - known == {"TMPDIR"}
    settings = load_settings(ENVIRONMENT)
    assert (settings.host, settings.environment) == ("0.0.0.0", "production")
    assert (settings.gateway_trusted_proxies, settings.gateway_registration) == (1, "closed")
    assert settings.gateway_usage_copy == "redis", "the volume is the task's, and dies with it"


def test_its_secrets_are_settings_and_none_is_in_the_environment() -> None:
    [secrets] = [local["secrets"] for local in parsed(FOLDER / "secrets.tf")["locals"] if "secrets" in local]
    assert set(secrets) <= {name.upper() for name in SECRETS}
    assert {"DATABASE_URL", "REDIS_URL", "GATEWAY_KEY_PEPPER", "GATEWAY_AUDIT_KEY"} <= set(secrets)
    assert not {name.lower() for name in ENVIRONMENT} & SECRETS


def test_streams_end_before_the_container_is_killed() -> None:
    """The drain is part of what the time-out counts; last words and rows take up to ten seconds more."""
    settings = load_settings(ENVIRONMENT)
    checks = RESOURCES["aws_lb_target_group.gateway"]
    unseen = checks.value("health_check.interval") * checks.value("health_check.unhealthy_threshold")
    assert unseen <= settings.gateway_drain_delay < settings.gateway_drain_timeout
    assert settings.gateway_drain_timeout + 10 < CONTAINER["stopTimeout"] == 120
    assert checks.value("deregistration_delay") >= settings.gateway_drain_timeout


def test_the_container_is_the_image_s() -> None:
    [port] = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE)
    [user] = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    [volume] = re.findall(r"^VOLUME (\S+)$", DOCKERFILE, re.MULTILINE)
    mapped = CONTAINER["portMappings"][0]["containerPort"]
    assert {int(port), mapped, int(ENVIRONMENT["PORT"])} == {RESOURCES["aws_lb_target_group.gateway"].value("port")}
    assert CONTAINER["user"].partition(":")[0] == user.partition(":")[0]
    assert (_local("data_folder"), CONTAINER["mountPoints"][0]["containerPath"]) == (volume, "${local.data_folder}")
    assert ENVIRONMENT["GATEWAY_DATA_DIR"].startswith(f"{volume}/")
    assert CONTAINER["mountPoints"][0]["sourceVolume"] == RESOURCES["aws_ecs_task_definition.gateway"].value(
        "volume.name"
    )


def test_the_container_is_small_for_who_gets_in_and_is_started_again() -> None:
    assert CONTAINER["readonlyRootFilesystem"] is True
    assert CONTAINER["linuxParameters"]["capabilities"]["drop"] == ["ALL"]
    assert CONTAINER["ulimits"] == [{"name": "nofile", "softLimit": 65536, "hardLimit": 65536}]
    assert CONTAINER["restartPolicy"]["enabled"] is True
    assert CONTAINER["healthCheck"]["command"][0] == "CMD", "there is no shell"


def test_what_is_asked_for_health_is_answered() -> None:
    answered = {route.path for route in health.routes()}
    asked = RESOURCES["aws_lb_target_group.gateway"].value("health_check.path")
    assert {asked, *re.findall(r"/health/\w+", " ".join(CONTAINER["healthCheck"]["command"]))} <= answered


# --- README.md ----------------------------------------------------------------------------------------------------


def _rows(*columns: str) -> list[list[str]]:
    """Of the table with this head."""
    table = re.search(rf"^\| {re.escape(' | '.join(columns))} \|\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert table
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[1].splitlines()]


def test_the_readme_lists_the_variables_and_outputs_that_there_are() -> None:
    assert _rows("name", "type", "default", "meaning") == [list(_row(one)) for one in VARIABLES.values()]
    assert _rows("name", "meaning") == [[f"`{name}`", one.body["description"]] for name, one in OUTPUTS.items()]


def _row(variable: Block) -> Iterator[str]:
    kind = re.sub(r"^\$\{(.*)\}$", r"\1", variable.body["type"])
    default = f"`{json.dumps(variable.body['default'])}`" if "default" in variable.body else "required"
    yield from (f"`{variable.address}`", f"`{kind}`", default, variable.body["description"])


def test_the_readme_names_what_there_is() -> None:
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    folders = re.findall(r"^cd (\S+)", commands, re.MULTILINE)
    assert folders
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []
    targets = re.findall(r"-target=module\.gateway\.(\w+\.\w+)", commands)
    assert targets
    assert [one for one in targets if one not in RESOURCES] == []
    assert set(re.findall(r"terraform output -raw (\w+)", commands)) <= set(OUTPUTS)
    linked = re.findall(r"\]\((?!http|#)([^)]+)\)", README)
    assert [path for path in linked if not (FOLDER / path.partition("#")[0]).exists()] == []


def test_what_terraform_leaves_behind_is_not_kept_in_git() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {".terraform/", ".terraform.lock.hcl", "*.tfstate", "*.tfstate.*", "*.tfvars"} <= set(ignored)


# --- checkov ------------------------------------------------------------------------------------------------------

CHECKOV = ROOT / ".venv" / "infra" / "bin" / "checkov"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("framework", "what"),
    [("terraform", ("-d", "terraform")), ("dockerfile", ("-f", "Dockerfile")), ("kubernetes", ("-d", "kubernetes"))],
)
def test_checkov_finds_nothing_that_is_not_excused_in_place(
    framework: str, what: tuple[str, str], figure: Callable[[str], None]
) -> None:
    if not CHECKOV.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("checkov is not in .venv/infra: make test installs it")
    done = subprocess.run(
        [CHECKOV, *what, "--framework", framework, "--compact", "--skip-download", "-o", "json"],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    report = json.loads(done.stdout)
    failed, skipped = report["results"]["failed_checks"], report["results"]["skipped_checks"]
    assert [f"{one['check_id']} {one['resource']}: {one['check_name']}" for one in failed] == []
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 20
    reasons = {f"{one['check_id']} {one['resource']}": one["check_result"]["suppress_comment"] or "" for one in skipped}
    assert {where: reason for where, reason in reasons.items() if len(reason) < 20} == {}
    figure(f"checkov {framework}: {report['summary']['passed']} checks passed, {len(skipped)} excused in place")


# --- terraform ----------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path) -> Path:
    if reason := missing():
        pytest.skip(reason)
    return copied(tmp_path)


def test_terraform_has_nothing_to_format(module: Path) -> None:
    done = terraform(module, "fmt", "-check", "-recursive")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("folder", MODULES, ids=lambda folder: folder.name)
def test_terraform_finds_the_module_and_its_examples_valid(module: Path, folder: Path) -> None:
    copy = module / folder.relative_to(FOLDER)
    init(copy)
    done = terraform(copy, "validate", "-json")
    said = json.loads(done.stdout)
    assert (said["valid"], said["diagnostics"]) == (True, [])


@pytest.mark.timeout(900)
def test_terraform_plans_what_its_tests_ask_for(module: Path, figure: Callable[[str], None]) -> None:
    init(module)
    began = monotonic()
    done = terraform(module, "test", seconds=880)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"Success! (\d+) passed, 0 failed\.", done.stdout)
    assert passed, done.stdout
    asserted = sum(file.read_text().count("\n  assert {") for file in (FOLDER / "tests").glob("*.tftest.hcl"))
    figure(f"terraform test: {passed[1]} runs, {asserted} assertions, {monotonic() - began:.0f} s")
