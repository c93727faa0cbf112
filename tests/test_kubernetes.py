"""kubernetes/, read as a cluster would. `kubectl apply` itself needs one: kubernetes/README.md."""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
from aiohttp import web
from ruamel.yaml import YAML

from gateway import __version__
from gateway.config import load_config
from gateway.handlers import accounts, chat, dashboard, health, live, models, sessions, stats
from gateway.settings import SECRETS, Settings, load_settings

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
README = (FOLDER / "README.md").read_text()
PROVIDERS = tomllib.loads((ROOT / "gateway" / "providers.toml").read_text())["providers"].values()
VERSIONS = ("1.29", kubernetes_validate.latest_version())  # oldest and newest
NAME = "ai-gateway"

Manifest = Mapping[str, Any]


def read(name: str) -> Any:
    return YAML(typ="safe").load((FOLDER / name).read_text())


def variables(name: str) -> dict[str, str]:
    lines = [line for line in (FOLDER / name).read_text().splitlines() if line and not line.startswith("#")]
    return {variable: value for variable, _, value in (line.partition("=") for line in lines)}


KUSTOMIZATION: Manifest = read("kustomization.yaml")
MANIFESTS: Mapping[str, Manifest] = {
    file.name: read(file.name) for file in sorted(FOLDER.glob("*.yaml")) if file.name != "kustomization.yaml"
}
DEPLOYMENT = MANIFESTS["deployment.yaml"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
[CONTAINER] = POD["containers"]
SETTINGS, SECRET = variables("settings.env"), variables("secrets.env.example")
GENERATED = {generated["name"]: generated for generated in KUSTOMIZATION["configMapGenerator"]}


def texts(value: object, name: str) -> Iterator[Any]:
    """Every value of this name, however deep."""
    if isinstance(value, Mapping):
        if name in value:
            yield value[name]
        for each in value.values():
            yield from texts(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from texts(each, name)


# --- what a cluster would refuse ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_each_manifest_is_what_the_cluster_expects(name: str, version: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_what_kustomize_makes_of_them_is_what_the_cluster_expects() -> None:
    kubectl = shutil.which("kubectl")
    if not kubectl:
        pytest.skip("kubectl is not on this machine: `kubectl kustomize kubernetes` was not run")
    made = subprocess.run([kubectl, "kustomize", str(FOLDER)], capture_output=True, text=True, check=True)
    manifests = [manifest for manifest in YAML(typ="safe").load_all(made.stdout) if manifest]
    for manifest in manifests:
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    assert len(manifests) == len(KUSTOMIZATION["resources"]) + len(GENERATED)
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    made_of = {manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "ConfigMap"}
    assert {each["name"] for each in texts(pod, "configMapRef")} | {
        each["name"] for each in texts(pod, "configMap")
    } == (made_of)
    [image] = KUSTOMIZATION["images"]
    assert pod["containers"][0]["image"] == f"{image['newName']}:{image['newTag']}"


def test_every_manifest_is_applied_but_the_one_that_has_to_be_filled_in() -> None:
    assert set(KUSTOMIZATION["resources"]) == set(MANIFESTS) - {"ingress.yaml"}


def test_everything_is_in_one_namespace() -> None:
    """Each file says so itself, so that it can be applied alone."""
    manifests = [manifest for manifest in MANIFESTS.values() if manifest["kind"] != "Namespace"]
    assert {manifest["metadata"]["namespace"] for manifest in manifests} == {NAME}
    assert {generated["namespace"] for generated in GENERATED.values()} == {NAME}
    assert MANIFESTS["namespace.yaml"]["metadata"]["name"] == NAME


# --- one refers to another ----------------------------------------------------------------------------------------


def test_whatever_selects_gateways_selects_these() -> None:
    labels = DEPLOYMENT["template"]["metadata"]["labels"]
    selected = [found for manifest in MANIFESTS.values() for found in texts(manifest, "matchLabels")]
    assert len(selected) == 5  # deployment, two spreads, disruption budget, network policy
    assert [found for found in [*selected, MANIFESTS["service.yaml"]["spec"]["selector"]] if found != labels] == []
    target = MANIFESTS["autoscaler.yaml"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", MANIFESTS["deployment.yaml"]["metadata"]["name"])
    assert POD["serviceAccountName"] == MANIFESTS["serviceaccount.yaml"]["metadata"]["name"]


def test_the_port_is_the_images_from_the_ingress_to_the_probes() -> None:
    [port] = CONTAINER["ports"]
    assert port["containerPort"] == Settings().port
    assert f"\nEXPOSE {port['containerPort']}\n" in DOCKERFILE
    [served] = MANIFESTS["service.yaml"]["spec"]["ports"]
    assert served["targetPort"] == port["name"]
    backends = [backend["service"] for backend in texts(MANIFESTS["ingress.yaml"], "backend")]
    assert {(backend["name"], backend["port"]["name"]) for backend in backends} == {(NAME, served["name"])}
    assert {probe["port"] for probe in texts(CONTAINER, "httpGet")} == {port["name"]}
    [entry] = MANIFESTS["networkpolicy.yaml"]["spec"]["ingress"]
    assert [each["port"] for each in entry["ports"]] == [port["name"]]
    assert DEPLOYMENT["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])


def test_every_path_that_is_asked_is_served() -> None:
    paths = {route.path for route in health.routes()}
    asked = {probe["path"] for probe in texts(CONTAINER, "httpGet")}
    asked.add(DEPLOYMENT["template"]["metadata"]["annotations"]["prometheus.io/path"])
    assert asked == {"/health/live", "/health/ready", "/metrics"}
    assert asked <= paths


def test_the_ingress_shows_all_that_asks_for_a_key_and_nothing_else() -> None:
    of_v1 = [f"/v1{route.path}" for route in (*chat.routes(), *models.routes())]
    rooms: list[list[web.RouteDef]] = [
        accounts.routes(), sessions.routes(), stats.routes(), dashboard.routes(), live.routes(), health.routes()
    ]  # fmt: skip
    served = [*of_v1, *(route.path for room in rooms for route in room)]
    prefixes = [path["path"] for rule in MANIFESTS["ingress.yaml"]["spec"]["rules"] for path in rule["http"]["paths"]]
    inside = {path for path in served if not any(re.match(rf"{prefix}(/|$)", path) for prefix in prefixes)}
    assert inside == {"/", "/health", "/health/live", "/health/ready", "/metrics"}


def test_settings_and_secrets_come_from_where_they_are_made() -> None:
    [settings, secret] = CONTAINER["envFrom"]
    assert GENERATED[settings["configMapRef"]["name"]]["envs"] == ["settings.env"]
    assert f"kubectl create secret generic {secret['secretRef']['name']} --namespace {NAME}" in README
    mounted = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    [file] = GENERATED[POD["volumes"][1]["configMap"]["name"]]["files"]
    assert SETTINGS["GATEWAY_CONFIG"] == f"{mounted[POD['volumes'][1]['name']]}/{file}"


# --- the gateway in it --------------------------------------------------------------------------------------------


def test_the_gateway_takes_its_settings_and_its_file() -> None:
    given = {**SETTINGS, **SECRET, "GATEWAY_CONFIG": str(FOLDER / "gateway.toml")}
    known = {name.upper() for name in Settings.__struct_fields__}
    of_providers = {value for row in PROVIDERS for name, value in row.items() if name.endswith("_env")}
    assert given.keys() <= known | of_providers
    settings = load_settings(given)
    load_config(settings, given)
    assert (settings.environment, settings.gateway_usage_copy) == ("production", "redis")


def test_secrets_are_asked_for_and_not_here() -> None:
    secrets = {name.upper() for name in SECRETS}
    assert SETTINGS.keys() & secrets == set()
    assert SECRET.keys() <= secrets
    examples = {"DATABASE_URL", "REDIS_URL"}
    assert {name for name, value in SECRET.items() if value} == examples
    assert [name for name in examples if ".example.com:" not in SECRET[name]] == []
    assert "secrets.env" in (FOLDER / ".gitignore").read_text().split()
    assert [kind for kind in (manifest["kind"] for manifest in MANIFESTS.values()) if kind == "Secret"] == []


def test_streams_have_time_to_end_before_the_pod_is_killed() -> None:
    settings = load_settings(SETTINGS)
    assert 0 < settings.gateway_drain_delay < settings.gateway_drain_timeout < POD["terminationGracePeriodSeconds"]
    # The cluster has to have seen that it is not ready, or that it ends, before it refuses.
    readiness = CONTAINER["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= settings.gateway_drain_delay


def test_a_rolling_update_never_has_fewer_gateways_than_before() -> None:
    assert DEPLOYMENT["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert "replicas" not in DEPLOYMENT  # the autoscaler's
    scaler = MANIFESTS["autoscaler.yaml"]["spec"]
    assert scaler["minReplicas"] >= 2
    assert int(SETTINGS["GATEWAY_NODES"]) == scaler["maxReplicas"]
    assert MANIFESTS["disruptionbudget.yaml"]["spec"]["maxUnavailable"] < scaler["minReplicas"]


def test_it_runs_as_the_images_user_with_all_that_the_restricted_profile_asks_for() -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    labels = MANIFESTS["namespace.yaml"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    pod, container = POD["securityContext"], CONTAINER["securityContext"]
    [user] = re.findall(r"^USER (\d+)", DOCKERFILE, re.MULTILINE)
    assert {pod["runAsUser"], pod["runAsGroup"], pod["fsGroup"]} == {int(user)}
    assert (pod["runAsNonRoot"], pod["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
    assert container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (POD["automountServiceAccountToken"], POD["enableServiceLinks"]) == (False, False)


def test_the_one_folder_that_it_writes_is_a_volume_with_room_for_a_full_journal() -> None:
    [volume] = re.findall(r"^VOLUME (\S+)", DOCKERFILE, re.MULTILINE)
    [writable] = [mount for mount in CONTAINER["volumeMounts"] if not mount.get("readOnly")]
    assert writable["mountPath"] == volume
    [data] = [each["emptyDir"] for each in POD["volumes"] if each["name"] == writable["name"]]
    room = int(data["sizeLimit"].removesuffix("Gi"))
    assert 2 < room < int(CONTAINER["resources"]["limits"]["ephemeral-storage"].removesuffix("Gi"))


def test_the_image_is_of_this_version() -> None:
    [image] = KUSTOMIZATION["images"]
    assert (image["name"], image["newTag"]) == (NAME, __version__)
    assert CONTAINER["image"] == f"{NAME}:{__version__}"
    assert f"docker build --tag {image['newName']}:{__version__} " in README


def test_a_service_by_the_gateways_name_would_stop_it() -> None:
    """Why there are no service links: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables"""
    with pytest.raises(Exception, match="unknown setting GATEWAY_PORT"):
        load_settings({"GATEWAY_PORT": "tcp://10.0.0.1:80"})


def test_a_gateway_reaches_providers_and_stores_and_not_the_nodes_credentials() -> None:
    egress = MANIFESTS["networkpolicy.yaml"]["spec"]["egress"]
    assert {each["port"] for rule in egress for each in rule["ports"]} == {53, 443, 5432, 6379}
    [internet] = [rule["to"][0]["ipBlock"] for rule in egress if rule["ports"][0]["port"] == 443]
    assert (internet["cidr"], "169.254.0.0/16" in internet["except"]) == ("0.0.0.0/0", True)


# --- the README beside them ---------------------------------------------------------------------------------------


def test_the_readme_names_files_that_exist() -> None:
    named = set(re.findall(r"kubernetes/([\w.-]+)", README)) - {"secrets.env"}
    assert named
    assert [name for name in named if not (FOLDER / name).exists()] == []


def test_every_check_that_is_not_followed_is_excused_by_a_reason() -> None:
    annotations = [
        value
        for manifest in MANIFESTS.values()
        for name, value in manifest["metadata"].get("annotations", {}).items()
        if name.startswith("checkov.io/skip")
    ]
    assert annotations
    assert [text for text in annotations if not re.fullmatch(r"CKV_K8S_\d+=.{20,}", text)] == []
