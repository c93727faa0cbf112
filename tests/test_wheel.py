"""What is installed from the wheel is what runs from the checkout."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # The build backend is in the environment: nothing is fetched.
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [built] = folder.glob("*.whl")
    return built


@pytest.mark.parametrize(
    ("folder", "inside", "least"),
    [
        ("gateway/web", "gateway/web", "index.html"),
        ("sql", "gateway/sql", "schema.sql"),
        ("gateway", "gateway", "app.py"),
    ],
)
def test_the_wheel_has_every_file_as_it_is_here(wheel: Path, folder: str, inside: str, least: str) -> None:
    here = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}": path.read_bytes()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert f"{inside}/{least}" in here
    with ZipFile(wheel) as archive:
        assert {name: archive.read(name) for name in archive.namelist() if name in here} == here
