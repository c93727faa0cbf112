"""The gateway in containers: what compose.yaml describes, by the `docker compose` of this machine."""

import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from gateway.local_process import LocalError

_COMMAND = ["docker", "compose"]


def answers() -> bool:
    if not shutil.which("docker"):
        return False
    # Needs both the daemon and the compose plugin, which `docker info` does not.
    asked = subprocess.run([*_COMMAND, "ls"], capture_output=True, check=False)  # noqa: S603
    return asked.returncode == 0


def runs(environ: Mapping[str, str], *services: str) -> bool:
    """Whether all of them run; without a name, the gateway."""
    asked = services or ("gateway",)
    return len(_compose(environ, "ps", "--status", "running", "--quiet", *asked).split()) >= len(asked)


def start(environ: Mapping[str, str]) -> None:
    """Returns when all of them are healthy."""
    if not environ.get("POSTGRES_PASSWORD"):
        environ = {**environ, "POSTGRES_PASSWORD": _add_password(Path(".env"))}
    _compose(environ, "up", "--detach", "--build", "--wait")


def stop(environ: Mapping[str, str]) -> None:
    _compose(environ, "down")


def url(environ: Mapping[str, str], service: str, port: int) -> str:
    """Where a service's port is published on this machine; empty: it is not."""
    command = [*_COMMAND, "port", service, str(port)]
    asked = subprocess.run(command, capture_output=True, env=_known(environ), text=True, check=False)  # noqa: S603
    host, _, published = asked.stdout.strip().rpartition(":")
    if asked.returncode != 0 or not published.isdecimal() or published == "0":
        return ""
    return f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0', '[::]') else host}:{published}"


def log_lines(environ: Mapping[str, str]) -> Iterator[str]:
    command = [*_COMMAND, "logs", "--no-log-prefix", "gateway"]
    with subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, env=_known(environ), text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        yield from process.stdout


def _add_password(file: Path) -> str:
    """For Postgres, and for the gateway to reach it. Made once: the database keeps its first one."""
    file.touch(0o600)
    text = file.read_text()
    separator = "\n" if text and not text.endswith("\n") else ""
    password = secrets.token_hex(24)
    file.write_text(f"{text}{separator}POSTGRES_PASSWORD={password}\n")
    return password


def _compose(environ: Mapping[str, str], *arguments: str) -> str:
    """Its output; its progress and complaints go to the terminal."""
    command = [*_COMMAND, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=_known(environ), text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise LocalError(f"`{' '.join(command)}` failed, as said above.")
    return done.stdout


def _known(environ: Mapping[str, str]) -> dict[str, str]:
    """compose.yaml asks for a password; any will do to ask or to stop."""
    return {"POSTGRES_PASSWORD": "unknown", **environ}
