"""Prometheus's configuration, rules and alerts, by its own promtool."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.support.programs import ROOT, program

pytestmark = pytest.mark.integration

FOLDER = ROOT / "grafana" / "prometheus"
RUNBOOKS = ROOT / "grafana" / "runbooks.md"
RULES: Mapping[str, Any] = YAML(typ="safe").load((FOLDER / "rules.yml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}


def promtool(*arguments: str) -> tuple[int, str]:
    """Its exit status, and all that it said."""
    done = subprocess.run(
        [program("promtool"), *arguments], capture_output=True, text=True, timeout=60, cwd=FOLDER, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_the_configuration_and_its_rules_are_what_prometheus_takes() -> None:
    assert promtool("check", "config", "prometheus.yml")[0] == 0
    assert promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yml")[0] == 0


def test_every_alert_fires_when_it_should_and_is_silent_again() -> None:
    status, said = promtool("test", "rules", "rules_test.yml")
    assert status == 0, said


@pytest.mark.parametrize("expression", ["vector(0) > 1", "vector(1)"], ids=["never", "always"])
def test_an_alert_that_does_the_one_without_the_other_is_found_out(tmp_path: Path, expression: str) -> None:
    """Every alert has its part in rules_test.yml: with one that never fires, or never ends, the test of it fails."""
    text = (FOLDER / "rules.yml").read_text()
    changed = YAML(typ="safe").load(text)
    for group in changed["groups"]:
        for rule in group["rules"]:
            rule["expr"] = expression if "alert" in rule else "vector(0)"
            rule.pop("annotations", None)  # they take half of the time
    YAML(typ="safe").dump(changed, tmp_path / "rules.yml")
    (tmp_path / "rules_test.yml").write_text((FOLDER / "rules_test.yml").read_text())
    status, said = promtool("test", "rules", str(tmp_path / "rules_test.yml"))
    assert status == 1
    failed = {name for names in re.findall(r'expr: "(.*)", time', said) for name in re.findall(r"Gateway\w+", names)}
    assert set(ALERTS) - failed == set()


def test_every_alert_says_how_bad_it_is_what_it_is_and_what_to_do() -> None:
    headings = {heading.lower() for heading in re.findall(r"^### (\w+)$", RUNBOOKS.read_text(), re.MULTILINE)}
    for name, alert in ALERTS.items():
        assert alert["labels"]["severity"] in ("critical", "warning"), name
        annotations = alert["annotations"]
        assert set(annotations) == {"summary", "description", "runbook_url"}, name
        assert annotations["runbook_url"] == f"grafana/runbooks.md#{name.lower()}"
    assert headings == {name.lower() for name in ALERTS}


def test_a_label_that_an_alert_speaks_of_is_one_that_it_has() -> None:
    """Of `sum by (a)` only `a` is left; promtool takes any name, and shows nothing in its place."""
    own = {"GatewayDown": {"instance"}, "GatewayMemoryHigh": {"instance"}, "GatewayProviderFailing": {"provider"}}
    for name, alert in ALERTS.items():
        kept = own.get(name) or {label for by in re.findall(r"by \((.+?)\)", alert["expr"]) for label in by.split(", ")}
        spoken = set(re.findall(r"\$labels\.(\w+)", str(alert["annotations"])))
        assert spoken <= kept, name
