"""The bill of materials of the environment that runs this, as CycloneDX: `python scripts/bill.py > sbom.cdx.json`.

Of the standard library alone: the image is built by nothing that its locks do not name. The same environment gives the
same bytes. The format: https://cyclonedx.org/docs/1.6/json/
"""

import json
import platform
import re
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions

ROOT = "ai-gateway"


def bill(found: Iterable[Distribution]) -> str:
    installed = {_name(each): each for each in sorted(found, key=_name)}
    python = {"type": "platform", "name": "cpython", "version": platform.python_version(), "bom-ref": "cpython"}
    whole = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": _component("application", installed[ROOT])},
        "components": [python] + [_component("library", each) for name, each in installed.items() if name != ROOT],
        "dependencies": [{"ref": _purl(each), "dependsOn": _needs(each, installed)} for each in installed.values()],
    }
    return json.dumps(whole, indent=1) + "\n"


def _component(kind: str, each: Distribution) -> dict[str, object]:
    purl, licence = _purl(each), each.metadata.json.get("license_expression")
    component = {"type": kind, "name": _name(each), "version": each.version, "purl": purl, "bom-ref": purl}
    return component | ({"licenses": [{"expression": licence}]} if licence else {})


def _needs(each: Distribution, installed: dict[str, Distribution]) -> list[str]:
    """Whatever it may want that is there; an extra that was not asked for is not."""
    wanted = {_normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in each.requires or []}
    return sorted(_purl(installed[name]) for name in wanted & installed.keys())


def _purl(each: Distribution) -> str:
    return f"pkg:pypi/{_name(each)}@{each.version}"


def _name(each: Distribution) -> str:
    return _normal(each.metadata["Name"])


def _normal(name: str) -> str:
    """https://packaging.python.org/en/latest/specifications/name-normalization/"""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.stdout.write(bill(distributions()))
