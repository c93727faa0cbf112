"""Programs that the tests take from the machine, or that `make test` has unpacked beside the environment."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_UNPACKED = ROOT / ".venv" / "prometheus" / "usr" / "bin"


def program(*names: str) -> str:
    """The path of the first that is there. Where none is, the test is skipped; continuous integration fails instead."""
    for name in names:
        if found := shutil.which(name) or shutil.which(name, path=str(_UNPACKED)):
            return found
    reason = f"{' or '.join(names)} is not on this machine"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
