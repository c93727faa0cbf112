"""What can be seen of the image without building it; `make prove-image` builds it and runs it."""

import asyncio
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from gateway import __version__
from gateway.settings import Settings, load_settings
from scripts.bill import bill
from tests.support.process import serving

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
FOLDER = Path(sys.executable).parent  # of the programs that `make test` installs
OF_PYTHON = {"PATH", "TMPDIR", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}  # variables that are no settings
WITHOUT_A_WHEEL = {"quantile-python"}  # 200 lines of Python; the lock has the hash of its source


def instructions(text: str = TEXT) -> list[tuple[str, str]]:
    """Name and argument of each, in their order."""
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in lines) if name]


def arguments(name: str) -> list[str]:
    return [argument for each, argument in instructions() if each == name]


def variables(name: str) -> Mapping[str, str]:
    """What the instructions of the last stage set, but what Docker itself puts in."""
    last = TEXT.rpartition("\nFROM ")[2]
    pairs = (pair for each, argument in instructions(last) if each == name for pair in argument.split(" "))
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def labels() -> Mapping[str, str]:
    [argument] = arguments("LABEL")
    return dict(re.findall(r'org\.opencontainers\.image\.(\w+)="(.*?)"', argument))


def health_command() -> list[str]:
    """With this environment's Python in the place of the image's."""
    [argument] = arguments("HEALTHCHECK")
    python, *rest = json.loads(argument.partition(" CMD ")[2])
    assert python == "python"
    return [sys.executable, *rest]


async def health(port: int | str) -> int:
    environ = {"PATH": os.environ["PATH"], "PORT": str(port)}
    process = await asyncio.create_subprocess_exec(*health_command(), env=environ, stderr=asyncio.subprocess.DEVNULL)
    return await process.wait()


def hadolint(text: str) -> str:
    program = shutil.which("hadolint", path=str(FOLDER))
    assert program, "hadolint is not in the environment: make test installs it"
    return subprocess.run([program, "--no-color", "-"], input=text, capture_output=True, text=True, check=False).stdout


# --- how it is built ----------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing_and_would() -> None:
    assert hadolint(TEXT) == ""
    assert "DL3007" in hadolint(TEXT.replace("FROM ${PYTHON}", "FROM python:latest"))


def test_both_stages_begin_with_one_base_that_a_digest_can_be_given_for() -> None:
    assert arguments("FROM") == ["${PYTHON} AS build", "${PYTHON}"]
    [base] = [argument for argument in arguments("ARG") if argument.startswith("PYTHON=")]
    minor = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert base == f"PYTHON=python:{minor}-slim-bookworm"


def test_what_the_image_copies_exists_and_is_sent_to_the_builder() -> None:
    copies = [argument.split(" ")[:-1] for argument in arguments("COPY") if not argument.startswith("--from")]
    sources = {source for copy in copies for source in copy}
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources == sent
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_nothing_is_fetched_that_no_lock_names_and_nothing_is_built_but_what_has_no_wheel() -> None:
    commands = [command for argument in arguments("RUN") for command in argument.split(" && ")]
    of_pip = [command for command in commands if re.search(r"\bpip\b.* (install|wheel|download)\b", command)]
    fetching = [command for command in of_pip if "--no-index" not in command]
    assert len(of_pip) > len(fetching) == 2
    assert [command for command in fetching if "--require-hashes --only-binary :all: " not in command] == []
    assert set(re.findall(r"--no-binary (\S+)", TEXT)) == WITHOUT_A_WHEEL
    isolated = [command for command in of_pip if "pip wheel" in command and "--no-build-isolation" not in command]
    assert isolated == []  # an isolated build fetches what it is built with
    assert re.findall(r"apt|curl|wget|https?:|^ADD", TEXT, re.MULTILINE) == []


def test_no_package_of_the_lock_runs_code_when_python_starts() -> None:
    """A .pth file needs no import to run: https://docs.python.org/3/library/site.html"""
    locked = re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    installed = {each.metadata["Name"].lower().replace("_", "-"): each for each in importlib.metadata.distributions()}
    found = {name: installed[name].files or [] for name in locked if name in installed}
    assert len(found) > 20
    assert [path for files in found.values() for path in files if path.suffix == ".pth"] == []


def test_the_bill_of_materials_names_all_that_is_installed() -> None:
    found = list(importlib.metadata.distributions())
    text = bill(found)
    assert text == bill(reversed(found))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    parts = json.loads(text)
    named = {(part["name"], part["version"]) for part in [parts["metadata"]["component"], *parts["components"]]}
    expected = {(re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower(), each.version) for each in found}
    assert expected < named
    [gateway] = [each for each in parts["dependencies"] if each["ref"] == f"pkg:pypi/ai-gateway@{__version__}"]
    assert f"pkg:pypi/aiohttp@{importlib.metadata.version('aiohttp')}" in gateway["dependsOn"]


# --- how it runs --------------------------------------------------------------------------------------------------


def test_the_image_runs_as_a_user_of_a_fixed_number_who_is_not_root() -> None:
    [user] = arguments("USER")
    assert user.isdecimal() and int(user) > 0
    assert f"groupadd --gid {user} " in TEXT
    assert f"useradd --uid {user} --gid gateway " in TEXT


def test_nothing_that_runs_needs_a_shell() -> None:
    commands = [json.loads(argument) for name in ("ENTRYPOINT", "CMD") for argument in arguments(name)]
    assert [*commands, health_command()[1]] == [["gateway"], ["serve"], "-ISc"]


def test_all_that_is_written_is_in_the_one_volume() -> None:
    [volume] = arguments("VOLUME")
    assert f"--owner gateway --group gateway --mode 0700 {volume} " in " ".join(arguments("RUN"))
    environ = variables("ENV")
    assert [environ[name] for name in ("GATEWAY_DATA_DIR", "TMPDIR")] == [f"{volume}/data", volume]
    assert arguments("WORKDIR")[-1] == volume


def test_its_variables_are_settings_with_values_that_the_gateway_takes() -> None:
    settings = {name: value for name, value in variables("ENV").items() if name not in OF_PYTHON}
    loaded = load_settings(settings)
    assert loaded.host == "0.0.0.0"
    assert arguments("EXPOSE") == [str(loaded.port)] == [str(Settings().port)]


def test_labels_say_what_it_is_and_of_which_source() -> None:
    description = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["description"]
    assert labels() == {
        "title": "AI Gateway",
        "description": description.partition(":")[0],
        "version": "$VERSION",
        "revision": "$REVISION",
        "source": "$SOURCE",
    }


def test_the_version_is_the_sources_own_and_another_one_is_refused() -> None:
    assert variables("ARG")["VERSION"] == '""'
    [check] = re.findall(r'test -z "\$VERSION" \|\| test .*?(?= ; )', " ".join(arguments("RUN")).replace(";", " ;"))
    environ = {"PATH": f"{FOLDER}:{os.environ['PATH']}"}
    for version, status in (("", 0), (__version__, 0), ("0.0.0", 1)):
        done = subprocess.run(["sh", "-c", check], env={**environ, "VERSION": version}, check=False)
        assert (version, done.returncode) == (version, status)


async def test_its_health_check_sees_whether_a_gateway_lives(database_url: str, redis_url: str) -> None:
    environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "LOG_LEVEL": "error"}
    async with serving(environ) as served:
        port = served.root_url.rpartition(":")[2]
        assert await health(port) == 0
    assert await health(port) == 1


async def test_its_health_check_fails_where_the_answer_is_not_200() -> None:
    async def stalled(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readuntil(b"\r\n\r\n") == b"GET /health/live HTTP/1.0\r\n\r\n"
        writer.write(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(stalled, "127.0.0.1", 0) as server:
        assert await health(server.sockets[0].getsockname()[1]) == 1
