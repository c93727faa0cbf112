"""What terraform/ says, read by a parser, and the program where it and its AWS provider are on this machine."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hcl2

from tests.support.programs import ROOT

FOLDER = ROOT / "terraform"
EXAMPLES = ("staging", "production")
# As `terraform providers mirror` fills one.
PLUGINS = Path(os.environ.get("TF_PLUGIN_DIR", "/opt/tf-plugins"))
_LEFT_BEHIND = shutil.ignore_patterns(".terraform", ".terraform.lock.hcl", "*.tfstate*")
# Text stays text, and what is an expression begins with `${`.
_PLAIN = hcl2.SerializationOptions(strip_string_quotes=True, explicit_blocks=False, with_comments=False)


# --- the files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    kind: str  # resource, data, variable, output
    address: str  # of a resource its type and name
    body: Mapping[str, Any]
    file: Path

    def value(self, path: str) -> Any:
        """`health_check.interval`: of repeated blocks the first. None where there is nothing."""
        found: Any = self.body
        for name in path.split("."):
            found = found[0] if isinstance(found, list) and found else found
            found = found.get(name) if isinstance(found, Mapping) else None
        return found


def blocks(folder: Path = FOLDER) -> Iterator[Block]:
    for file in sorted(folder.glob("*.tf")):
        for kind, found in parsed(file).items():
            if kind in ("resource", "data"):
                for block in found:
                    for of, named in block.items():
                        yield from (Block(kind, f"{of}.{name}", body, file) for name, body in named.items())
            elif kind in ("variable", "output", "provider", "module"):
                yield from (Block(kind, name, body, file) for block in found for name, body in block.items())


def parsed(file: Path) -> Mapping[str, Any]:
    read: Mapping[str, Any] = hcl2.loads(file.read_text(), serialization_options=_PLAIN)
    return read


# --- the program --------------------------------------------------------------------------------------------------


def missing() -> str:
    """Why the program cannot be run on this machine, and what to run elsewhere; empty where it can."""
    if shutil.which("terraform") and PLUGINS.is_dir():
        return ""
    return (
        "terraform or its AWS provider is not on this machine; where it is: "
        "terraform -chdir=terraform providers mirror FOLDER && TF_PLUGIN_DIR=FOLDER .venv/bin/pytest tests/test_terraform.py"
    )


def copied(to: Path) -> Path:
    """A copy of the module and its examples, so that nothing is left behind in the tree."""
    return Path(shutil.copytree(FOLDER, to / "terraform", ignore=_LEFT_BEHIND))


def terraform(
    folder: Path, *arguments: str, seconds: float = 300, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Its output, errors among it. Raises TimeoutExpired; its exit status is the caller's to look at."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TF_", "AWS_"))}
    command = ["terraform", *arguments, "-no-color"]
    process = subprocess.Popen(
        command, cwd=folder, env={**kept, "CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1", **(environ or {})},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the provider's process
            process.wait()
    return subprocess.CompletedProcess(command, process.returncode, said)


def init(folder: Path) -> None:
    done = terraform(folder, "init", "-input=false", f"-plugin-dir={PLUGINS.resolve()}")
    assert done.returncode == 0, done.stdout
