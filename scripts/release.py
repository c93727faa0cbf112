"""Build what is released into dist/: `python -m scripts.release`. With a tag: refuse it, or print what it brings.

How a release is made:

1. One commit: the new version in gateway/__init__.py, which all else takes it from, and in CHANGELOG.md a heading of
   the version and the day, `## 1.2.3 - 2027-01-31`, where "Unreleased" was. tests/test_release.py names the examples
   that still have the old one.
2. `git tag v1.2.3`, and push the tag. .github/workflows/release.yml refuses one that disagrees with those two
   (`python -m scripts.release v1.2.3`), runs all tests, builds, and publishes.

Equal sources give equal bytes: what is dated in the archives has the date of SOURCE_DATE_EPOCH, or one that is always
the same (https://reproducible-builds.org/specs/source-date-epoch/).
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gateway import __version__

# Of the standard library alone, so that a tag is refused before anything is installed: what builds are programs.

ROOT = Path(__file__).parents[1]


class ReleaseError(Exception):
    """What disagrees with what."""


def main(arguments: Sequence[str]) -> None:
    if arguments:
        [tag] = arguments
        sys.stdout.write(notes(tag, __version__, (ROOT / "CHANGELOG.md").read_text()))
    else:
        build(ROOT / "dist")


def notes(tag: str, version: str, changelog: str) -> str:
    """What the changelog says of a release. Raises ReleaseError when tag, version and changelog disagree."""
    if tag != f"v{version}":
        raise ReleaseError(f"the tag {tag} is not v{version}, which gateway/__init__.py asks for")
    newest = changelog.partition("\n## ")[2].partition("\n## ")[0]
    heading, _, text = newest.partition("\n")
    if not re.fullmatch(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d", heading):
        raise ReleaseError(f'the newest heading in CHANGELOG.md is "{heading}", not "{version} - " and its day')
    return f"{text.strip()}\n"


def build(folder: Path) -> None:
    """Fills the folder, which is emptied: wheel, source archive, bill of materials, and the checksums of the three."""
    shutil.rmtree(folder, ignore_errors=True)
    archive(folder)
    bill = folder / f"ai_gateway-{__version__}.cdx.json"
    bill.write_text(_bill_of_materials())
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums))


def archive(folder: Path) -> None:
    """Wheel and source archive. The build backend is in the environment: nothing is fetched."""
    _run("hatchling", "build", "--directory", str(folder))


def _bill_of_materials() -> str:
    """CycloneDX, of all that requirements.lock installs on any platform, each with its hashes."""
    options = ["--pyproject", "pyproject.toml", "--output-reproducible", "--validate"]
    bill = json.loads(_run("cyclonedx_py", "requirements", "requirements.lock", *options))
    # It reads no version that is found elsewhere.
    bill["metadata"]["component"] |= {"version": __version__, "purl": f"pkg:pypi/ai-gateway@{__version__}"}
    return json.dumps(bill, indent=1) + "\n"


def _run(module: str, *arguments: str) -> str:
    done = subprocess.run(  # noqa: S603 - our own arguments, no shell
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ReleaseError(f"{module} failed: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ReleaseError as error:
        sys.exit(f"release: {error}")
