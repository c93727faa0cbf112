"""The dashboards' files: that they are whole. Whether their queries answer is asked in test_grafana.py."""

import itertools
import re

import pytest
from ruamel.yaml import YAML

from gateway.metrics import Metrics
from scripts.dashboards.__main__ import DASHBOARDS, as_file
from scripts.dashboards.list_prices import list_prices
from tests.support import dashboards
from tests.support.programs import ROOT

pytestmark = pytest.mark.unit

# Of Grafana's units (packages/grafana-data/src/valueFormats/categories.ts); `suffix:` is any word.
UNITS = {"short", "none", "reqps", "s", "ms", "bytes", "percentunit", "currencyUSD"}
TYPES = {"stat", "timeseries", "table", "state-timeline"}
PROVISIONING = ROOT / "grafana" / "provisioning"
EVERY = pytest.mark.parametrize("name", dashboards.NAMES)


def test_the_files_are_what_the_script_writes() -> None:
    """Else: `.venv/bin/python -m scripts.dashboards`."""
    assert sorted(DASHBOARDS) == sorted(dashboards.NAMES)
    for name, make in DASHBOARDS.items():
        assert (dashboards.FOLDER / f"{name}.json").read_text() == as_file(make()), name


@EVERY
def test_ids_are_unique_and_the_grid_has_no_overlaps(name: str) -> None:
    every = dashboards.read(name)["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    covered: set[tuple[int, int]] = set()
    for panel in every:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not cells & covered, panel["title"]
        covered |= cells


def test_dashboards_are_told_apart_and_lead_to_each_other() -> None:
    every = [dashboards.read(name) for name in dashboards.NAMES]
    assert len({dashboard["uid"] for dashboard in every}) == len({dashboard["title"] for dashboard in every}) == 3
    assert all(dashboard["links"][0]["tags"] == dashboard["tags"] for dashboard in every)
    assert {dashboard["schemaVersion"] for dashboard in every} == {39}


@EVERY
def test_every_row_asks_a_question_and_has_panels_that_answer_it(name: str) -> None:
    every = dashboards.read(name)["panels"]
    assert every[0]["type"] == "row"
    assert every[-1]["type"] != "row"
    rows = [panel for panel in every if panel["type"] == "row"]
    assert [row["title"] for row in rows if not row["title"].endswith("?")] == []
    assert not any(one["type"] == other["type"] == "row" for one, other in itertools.pairwise(every))


@EVERY
def test_every_panel_says_what_it_is_and_in_which_unit(name: str) -> None:
    titles = [panel["title"] for panel in dashboards.panels(name)]
    assert len(set(titles)) == len(titles)
    for panel in dashboards.panels(name):
        assert panel["type"] in TYPES, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        properties = [one for override in panel["fieldConfig"]["overrides"] for one in override["properties"]]
        units = {panel["fieldConfig"]["defaults"].get("unit", ""), *(one["value"] for one in properties)} - {""}
        assert units, panel["title"]
        assert {unit for unit in units if not re.fullmatch(r"suffix:.+", unit)} <= UNITS, panel["title"]


@EVERY
def test_thresholds_rise_from_a_colour_that_holds_for_all_below(name: str) -> None:
    for panel in dashboards.panels(name):
        first, *others = [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]
        assert first is None, panel["title"]
        assert others == sorted(others), panel["title"]


@EVERY
def test_every_data_source_is_one_that_is_provisioned(name: str) -> None:
    file = YAML(typ="safe").load((PROVISIONING / "datasources" / "datasources.yaml").read_text())
    known = {(source["type"], source["uid"]) for source in file["datasources"]}
    sources = [variable["datasource"] for variable in dashboards.variables(name) if "datasource" in variable]
    for panel in dashboards.panels(name):
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]), panel["title"]
        sources += [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
    assert {(source["type"], source["uid"]) for source in sources} <= known


@EVERY
def test_every_variable_is_declared_and_used(name: str) -> None:
    texts = [target.get("expr") or target["rawSql"] for panel in dashboards.panels(name) for target in panel["targets"]]
    used = {variable for text in texts for variable in re.findall(r"\$\{?(?!__)(\w+)", text)}
    assert used == {variable["name"] for variable in dashboards.variables(name)}


def test_every_series_that_is_asked_for_is_one_of_the_gateway_of_the_rules_or_of_prometheus() -> None:
    metrics = {metric.name for metric in Metrics()._labelled()}
    histograms = {f"{name}_{part}" for name in metrics for part in ("bucket", "count", "sum")}
    groups = YAML(typ="safe").load((ROOT / "grafana" / "prometheus" / "rules.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    known = metrics | histograms | {rule["record"] for rule in rules if "record" in rule} | {"up", "ALERTS"}
    texts = [*(dashboards.as_promql(one.text) for one in dashboards.asked_of("prometheus"))]
    texts += [rule["expr"] for rule in rules]
    assert {name for text in texts for name in dashboards.metrics_in(text)} - known == set()


def test_the_provisioned_folder_is_the_one_that_is_mounted() -> None:
    [provider] = YAML(typ="safe").load((PROVISIONING / "dashboards" / "dashboards.yaml").read_text())["providers"]
    mounts = YAML(typ="safe").load((ROOT / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts


def test_of_an_alert_every_side_is_measured_and_no_comparison_is_left() -> None:
    text = '(a > 0.1 and b > 1) or absent(up{job="gateway"}) or sum by (c) (d) / e < 2'
    assert dashboards.measured(text) == ["a", "b", 'up{job="gateway"}', "sum by (c) (d) / e"]


def test_list_prices_are_those_of_the_gateway_each_once() -> None:
    rows = list_prices().splitlines()
    assert "('openai','gpt-4o',2.5,1.25,2.5)," in rows
    assert "('anthropic','claude-3-5-sonnet%',3,0.3,3.75)," in rows
    assert len({row.split(",")[1] + row.split(",")[0] for row in rows}) == len(rows)
