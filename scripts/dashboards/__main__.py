"""Write grafana/dashboards anew: `.venv/bin/python -m scripts.dashboards`. A test compares the files with this."""

import json
from pathlib import Path

from scripts.dashboards.operations import operations
from scripts.dashboards.panels import Json
from scripts.dashboards.spend import spend
from scripts.dashboards.tokens import tokens

FOLDER = Path(__file__).parents[2] / "grafana" / "dashboards"
DASHBOARDS = {"tokens": tokens, "operations": operations, "spend": spend}


def as_file(made: Json) -> str:
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, make in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(as_file(make()))
