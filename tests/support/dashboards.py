"""The dashboards as Grafana reads them, and their queries as it sends them."""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

import promql_parser

from tests.support.programs import ROOT

FOLDER = ROOT / "grafana" / "dashboards"
NAMES = ("tokens", "operations", "spend")

# What Grafana puts in, with all of a variable chosen and a scrape every second.
_FOR_PROMQL = {"$__rate_interval": "10s", "$__range": "1m", "$model": ".*", "$provider": ".*"}
_COMPARED = {">", "<", ">=", "<=", "==", "!="}
_EITHER = {"and", "or", "unless"}


class Asked(NamedTuple):
    """A query, and where it stands."""

    dashboard: str
    panel: str  # its title
    text: str
    legend: str = ""

    @property
    def where(self) -> str:
        return f"{self.dashboard}: {self.panel}: {self.text}"


def read(name: str) -> Mapping[str, Any]:
    dashboard: Mapping[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return dashboard


def panels(name: str) -> list[Mapping[str, Any]]:
    """Without the rows."""
    return [panel for panel in read(name)["panels"] if panel["type"] != "row"]


def variables(name: str) -> list[Mapping[str, Any]]:
    return list(read(name)["templating"]["list"])


def asked_of(source: str) -> Iterator[Asked]:
    """Every query of every panel that asks the data source of this uid, as it stands in the file."""
    for name in NAMES:
        for panel in panels(name):
            for target in panel["targets"]:
                if target["datasource"]["uid"] == source:
                    text = target.get("expr") or target["rawSql"]
                    yield Asked(name, panel["title"], text, target.get("legendFormat", ""))


# --- PromQL -------------------------------------------------------------------------------------------------------


def as_promql(text: str) -> str:
    """As Prometheus is asked. Raises ValueError when it does not parse, or a variable is left."""
    for variable, value in _FOR_PROMQL.items():
        text = text.replace(variable, value)
    promql_parser.parse(text)
    if "$" in text:
        raise ValueError(f"a variable that nobody knows in {text}")
    return text


def measured(text: str) -> list[str]:
    """What an alert looks at: its expression without the comparison, which leaves nothing while all is well. Of several
    that `and` or `or` join each alone, and of `absent(x)` the x."""
    return [expr.prettify() for expr in _measured(promql_parser.parse(text))]


def _measured(expr: Any) -> list[Any]:
    if isinstance(expr, promql_parser.ParenExpr):
        return _measured(expr.expr)
    if isinstance(expr, promql_parser.BinaryExpr) and str(expr.op) in _EITHER:
        return _measured(expr.lhs) + _measured(expr.rhs)
    if isinstance(expr, promql_parser.BinaryExpr) and str(expr.op) in _COMPARED:
        return _measured(expr.lhs)
    if isinstance(expr, promql_parser.Call) and expr.func.name == "absent":
        return [expr.args[0]]
    return [expr]


def metrics_in(text: str) -> set[str]:
    """Names of all series that an expression selects."""
    found: set[str] = set()

    def visit(expr: Any) -> None:
        selector = expr.vector_selector if isinstance(expr, promql_parser.MatrixSelector) else expr
        if isinstance(selector, promql_parser.VectorSelector) and selector.name:
            found.add(selector.name)

    promql_parser.walk(promql_parser.parse(text), visit)
    return found


# --- SQL ----------------------------------------------------------------------------------------------------------


def as_sql(text: str, begin: datetime, end: datetime, constants: Mapping[str, str]) -> str:
    """As Postgres is asked, with all of a variable chosen, by the hour.

    Variables first, then macros, as Grafana does
    (https://grafana.com/docs/grafana/latest/datasources/postgres/#macros). Raises ValueError when one is left.
    """
    first, last = (f"'{moment.isoformat().replace('+00:00', 'Z')}'" for moment in (begin, end))
    text = re.sub(r"\$\{\w+:sqlstring\}", "'*'", text).replace("$__interval", "1h")
    for name, value in constants.items():
        text = text.replace(f"${{{name}:raw}}", value)
    text = re.sub(r"\$__timeFilter\((.+?)\)", rf"\1 BETWEEN {first} AND {last}", text)
    text = re.sub(r"\$__timeGroupAlias\((.+?), *1h\)", r'floor(extract(epoch from \1)/3600)*3600 AS "time"', text)
    text = text.replace("$__timeFrom()", first).replace("$__timeTo()", last)
    if "$" in text:
        raise ValueError(f"a variable or a macro that nobody knows in {text}")
    return text
