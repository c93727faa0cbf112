"""Panels and dashboards as Grafana's JSON: one way to make each, so that all of them look alike.

The model is Grafana's own, as 11 and 12 read it
(https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/).
"""

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]
Steps = list[Json]  # of a threshold: a colour, and from which value on

PROMETHEUS = {"type": "prometheus", "uid": "prometheus"}
POSTGRES = {"type": "grafana-postgresql-datasource", "uid": "postgres"}
SCHEMA_VERSION = 39
COLUMNS = 24  # of Grafana's grid
TAG = "ai-gateway"


# --- what is asked ------------------------------------------------------------------------------------------------


def query(expr: str, legend: str = "") -> Json:
    """PromQL over the time range. `legend` has labels in it: `{{model}}`."""
    return {"datasource": PROMETHEUS, "editorMode": "code", "expr": expr, "legendFormat": legend, "range": True}


def instant(expr: str) -> Json:
    """PromQL at the end of the time range, for a table."""
    return {"datasource": PROMETHEUS, "editorMode": "code", "expr": expr, "format": "table", "instant": True}


def sql(text: str, *, over_time: bool = False) -> Json:
    """SQL; over time it has a column `time`, one of text that names the series, and one number."""
    form = "time_series" if over_time else "table"
    return {
        "datasource": POSTGRES,
        "editorMode": "code",
        "format": form,
        "rawQuery": True,
        "rawSql": text.strip(),
    }


# --- what is good, and what is not --------------------------------------------------------------------------------


def worse_above(warning: float, bad: float | None = None) -> Steps:
    colours = [("green", None), ("orange", warning), *([("red", bad)] if bad is not None else [])]
    return [{"color": colour, "value": value} for colour, value in colours]


def worse_below(good: float, warning: float | None = None) -> Steps:
    colours = [("red", None), *([("orange", warning)] if warning is not None else []), ("green", good)]
    return [{"color": colour, "value": value} for colour, value in colours]


NEUTRAL: Steps = [{"color": "blue", "value": None}]


# --- panels -------------------------------------------------------------------------------------------------------


def stat(title: str, unit: str, asked: Json, why: str, steps: Steps = NEUTRAL) -> Json:
    """One number, with its course behind it when it was asked over time."""
    options = {
        "colorMode": "value",
        "graphMode": "area" if asked.get("range") else "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
        "wideLayout": True,
    }
    defaults = {"color": {"mode": "thresholds"}, "noValue": "none yet", **_scale(unit, steps)}
    return _panel("stat", title, why, [asked], defaults, options) | _size(4, 4)


def graph(title: str, unit: str, asked: Sequence[Json], why: str, steps: Steps = NEUTRAL) -> Json:
    """Lines over time. Thresholds are dashed lines in it."""
    return _over_time(title, unit, asked, why, steps)


def stacked(title: str, unit: str, asked: Sequence[Json], why: str) -> Json:
    """Areas over time that add up to their sum."""
    panel = _over_time(title, unit, asked, why, NEUTRAL)
    custom = panel["fieldConfig"]["defaults"]["custom"]
    custom |= {"fillOpacity": 30, "stacking": {"mode": "normal", "group": "A"}}
    return panel


def bars(title: str, unit: str, asked: Sequence[Json], why: str) -> Json:
    """Bars over time, one an hour at least: what the sums in Postgres are of."""
    panel = stacked(title, unit, asked, why)
    panel["fieldConfig"]["defaults"]["custom"] |= {"drawStyle": "bars", "fillOpacity": 80, "lineWidth": 0}
    return panel | {"interval": "1h"}


def states(title: str, asked: Json, names: Mapping[int, tuple[str, str]], why: str) -> Json:
    """Which state each series was in, over time; `names`: of each value its word and colour."""
    mapping = {str(value): {"text": text, "color": colour, "index": value} for value, (text, colour) in names.items()}
    defaults = {
        "color": {"mode": "thresholds"},
        "custom": {"fillOpacity": 80, "lineWidth": 0},
        "mappings": [{"type": "value", "options": mapping}],
        **_scale("none", NEUTRAL),
    }
    options = {
        "alignValue": "center",
        "legend": _LEGEND,
        "mergeValues": True,
        "rowHeight": 0.9,
        "showValue": "auto",
        "tooltip": _TOOLTIP,
    }
    return _panel("state-timeline", title, why, [asked], defaults, options) | _size(12, 8)


def table(title: str, asked: Sequence[Json], units: Mapping[str, str], why: str, width: int = 12) -> Json:
    """Rows. `units`: of each column, in the order they stand in; queries of one number each are given their names."""
    overrides = [
        {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "unit", "value": unit}]}
        for name, unit in units.items()
        if unit
    ]
    defaults = {"custom": {"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False}, **_scale("", NEUTRAL)}
    options = {"cellHeight": "sm", "showHeader": True, "footer": {"show": False, "reducer": ["sum"], "fields": ""}}
    panel = _panel("table", title, why, asked, defaults, options) | _size(width, 9)
    panel["fieldConfig"]["overrides"] = overrides
    if asked[0]["datasource"] is PROMETHEUS:
        panel["transformations"] = _side_by_side(list(units), [target["refId"] for target in panel["targets"]])
    return panel


_LEGEND = {"calcs": [], "displayMode": "list", "placement": "bottom", "showLegend": True}
_TOOLTIP = {"mode": "multi", "sort": "desc"}


def _over_time(title: str, unit: str, asked: Sequence[Json], why: str, steps: Steps) -> Json:
    custom = {
        "drawStyle": "line",
        "fillOpacity": 8,
        "lineWidth": 1,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if len(steps) > 1 else "off"},
    }
    defaults = {"color": {"mode": "palette-classic"}, "custom": custom, "min": 0, **_scale(unit, steps)}
    options = {"legend": _LEGEND, "tooltip": _TOOLTIP}
    return _panel("timeseries", title, why, asked, defaults, options) | _size(8, 8)


def _side_by_side(names: Sequence[str], queries: Sequence[str]) -> list[Json]:
    """Several queries as one table: what they have in common, then a column of each, under our names."""
    labels, values = names[: -len(queries)], names[-len(queries) :]
    renamed = dict(zip([label.lower() for label in labels], labels, strict=True))
    renamed |= {
        f"Value #{query}" if len(queries) > 1 else "Value": name for query, name in zip(queries, values, strict=True)
    }
    order = {column: index for index, column in enumerate(renamed)}
    organize = {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": renamed}
    sort = {"fields": {}, "sort": [{"field": values[0], "desc": True}]}
    return [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": organize},
        {"id": "sortBy", "options": sort},
    ]


def _panel(kind: str, title: str, why: str, asked: Sequence[Json], defaults: Json, options: Json) -> Json:
    return {
        "type": kind,
        "title": title,
        "description": why,
        "datasource": asked[0]["datasource"],
        "targets": [{"refId": "ABCDEFGH"[index], **target} for index, target in enumerate(asked)],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }


def _scale(unit: str, steps: Steps) -> Json:
    return {**({"unit": unit} if unit else {}), "thresholds": {"mode": "absolute", "steps": steps}}


def _size(width: int, height: int) -> Json:
    return {"gridPos": {"w": width, "h": height}}


def wide(panel: Json, width: int) -> Json:
    """The same panel, so many of the grid's columns wide."""
    return panel | _size(width, panel["gridPos"]["h"])


# --- variables ----------------------------------------------------------------------------------------------------


def label_variable(name: str, title: str, metric: str) -> Json:
    """The values of a label, to choose from; all of them at first."""
    text = f"label_values({metric}, {name})"
    return _choice(name, title, PROMETHEUS, {"query": text, "refId": name}, ".*") | {"definition": text}


def sql_variable(name: str, title: str, text: str) -> Json:
    """What a query finds, to choose from. Where all are chosen, `'*'` is the one that is."""
    return _choice(name, title, POSTGRES, text.strip(), "'*'") | {"definition": text.strip()}


def constant(name: str, value: str) -> Json:
    """Text that queries use as `${name:raw}`; nobody sees or changes it."""
    return {
        "name": name,
        "type": "constant",
        "hide": 2,
        "skipUrlSync": True,
        "query": value,
    }


def _choice(name: str, title: str, source: Json, asked: Json | str, everything: str) -> Json:
    return {
        "name": name,
        "label": title,
        "type": "query",
        "datasource": source,
        "query": asked,
        "refresh": 2,  # when the time range changes
        "multi": True,
        "includeAll": True,
        "allValue": everything,
        "sort": 1,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


# --- a dashboard --------------------------------------------------------------------------------------------------

Row = tuple[str, Sequence[Json]]  # a question, and the panels that answer it


def dashboard(
    uid: str, title: str, why: str, rows: Sequence[Row], variables: Sequence[Json], span: tuple[str, str]
) -> Json:
    """`span`: how far back it looks at first, and how often it looks again (empty: when it is told to)."""
    links = {"asDropdown": False, "icon": "external link", "keepTime": True, "includeVars": False, "targetBlank": False}
    return {
        "uid": uid,
        "title": title,
        "description": why,
        "tags": [TAG],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # the same moment is pointed at in all panels
        "time": {"from": f"now-{span[0]}", "to": "now"},
        "timezone": "browser",
        "refresh": span[1],
        "links": [{"title": "AI Gateway", "type": "dashboards", "tags": [TAG], **links}],
        "templating": {"list": list(variables)},
        "annotations": {"list": []},
        "panels": _placed(rows),
    }


def _placed(rows: Sequence[Row]) -> list[Json]:
    """Rows one below the other; the panels of each from left to right, and on where the grid ends."""
    placed: list[Json] = []
    top = 0
    for question, panels in rows:
        placed.append(
            {
                "type": "row",
                "title": question,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1},
            }
        )
        top, left, lowest = top + 1, 0, 0
        for panel in panels:
            size = panel["gridPos"]
            if left + size["w"] > COLUMNS:
                top, left, lowest = top + lowest, 0, 0
            placed.append(panel | {"gridPos": {"x": left, "y": top, **size}})
            left, lowest = left + size["w"], max(lowest, size["h"])
        top += lowest
    return [{"id": number, **panel} for number, panel in enumerate(placed, start=1)]
