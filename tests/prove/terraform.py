"""Applies terraform/ to a stand-in for AWS, sees that a second plan is empty, and destroys what was made.

`make prove-terraform` does it with both examples at once. The stand-in is moto (https://docs.getmoto.org), which knows
the calls and none of the machines: what is proved is that the files agree with each other, with the provider and with
the forms that AWS asks for, not that a task serves. What moto lacks is lent to it by moto.py; the files are as they are.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.prove.moto import LENT
from tests.support.programs import ROOT
from tests.support.terraform import EXAMPLES, copied, init, missing, terraform

INFRA = ROOT / ".venv" / "infra" / "bin"
ZONE = "example.com"
SECONDS = 600  # that an apply may take; it took four minutes on two slow cores, most of them waiting


class Failed(Exception):
    """What was not as it should be, with the program's own words."""


# --- the stand-in -------------------------------------------------------------------------------------------------


class StandIn(NamedTuple):
    url: str
    log: Path

    @property
    def environ(self) -> Mapping[str, str]:
        """By which the provider, and boto3, speak to it and to nobody else."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def ask(self, service: str, action: str, **arguments: Any) -> Any:
        """By the boto3 that moto brings, in its environment."""
        script = (
            "import boto3, json, sys; service, action, arguments = json.load(sys.stdin);"
            " print(json.dumps(getattr(boto3.client(service), action)(**arguments), default=str))"
        )
        done = subprocess.run(
            [INFRA / "python", "-c", script], input=json.dumps([service, action, arguments]),
            env={"PATH": os.environ["PATH"], **self.environ}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if done.returncode:
            raise Failed(done.stderr)
        return json.loads(done.stdout)

    def make_zone(self) -> str:
        zone = self.ask("route53", "create_hosted_zone", Name=ZONE, CallerReference="proof")
        return str(zone["HostedZone"]["Id"].rpartition("/")[2])

    def secrets(self) -> Mapping[str, str]:
        """All that Secrets Manager holds, by name."""
        listed = self.ask("secretsmanager", "list_secrets")["SecretList"]
        return {
            secret["Name"]: self.ask("secretsmanager", "get_secret_value", SecretId=secret["ARN"])["SecretString"]
            for secret in listed
        }

    def database_password(self) -> str:
        """The digest of the one that the database was given last."""
        return str(re.findall(r"password ([0-9a-f]{64})", self.log.read_text())[-1])


@contextmanager
def stand_in(log: Path) -> Iterator[StandIn]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as written:
        process = subprocess.Popen(
            [INFRA / "python", "-m", "tests.prove.moto", "-H", "127.0.0.1", "-p", str(port)], cwd=ROOT,
            env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
            stdout=written, stderr=written, start_new_session=True,
        )  # fmt: skip
    try:
        _await(f"http://127.0.0.1:{port}/moto-api/data.json", process)
        yield StandIn(f"http://127.0.0.1:{port}", log)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = monotonic() + 60
    while process.poll() is None and monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            sleep(0.2)
    raise Failed("moto_server did not start")


# --- the proof ----------------------------------------------------------------------------------------------------


def prove(example: str, folder: Path) -> None:
    root = copied(folder / example) / "examples" / example
    init(root)
    with stand_in(folder / f"{example}.log") as aws:
        environ = {**aws.environ, **_inputs(aws.make_zone())}

        took = _run(root, environ, "apply", "-auto-approve")
        _tell(f"{example}: apply made {len(_state(root))} resources in {took:.0f} s")
        took = _run(root, environ, "plan", "-detailed-exitcode")
        _tell(f"{example}: a second plan says No changes, after {took:.0f} s")
        _tell(f"{example}: {_check_secrets(aws, root)}")

        if example == "production":
            return  # it is protected from what follows

        main = root / "main.tf"
        main.write_text(main.read_text().replace('"../.."\n', '"../.."\n  database_password_version = 2\n', 1))
        before = aws.database_password()
        took = _run(root, environ, "apply", "-auto-approve")
        if aws.database_password() == before:
            raise Failed("the database has the password that it had")
        _tell(f"{example}: database_password_version = 2 took {took:.0f} s; {_check_secrets(aws, root)}")

        took = _run(root, environ, "destroy", "-auto-approve")
        _tell(f"{example}: destroy left {len(_state(root))} resources, after {took:.0f} s")


def _inputs(zone: str) -> Mapping[str, str]:
    given = {
        "domain_name": f"gateway.{ZONE}",
        "zone_id": zone,
        "image_tag": "0.1.0",
        "allowed_cidrs": json.dumps(["203.0.113.7/32"]),
        "alarm_email": f"ada@{ZONE}",
        "provider_secrets": json.dumps(
            {"OPENAI_API_KEY": "arn:aws:secretsmanager:us-east-1:123456789012:secret:openai-AbCdEf"}
        ),
    }
    return {f"TF_VAR_{name}": value for name, value in given.items()}


def _run(root: Path, environ: Mapping[str, str], *arguments: str) -> float:
    """Seconds. Of a plan the exit status 2 is one of changes."""
    began = monotonic()
    done = terraform(root, *arguments, "-input=false", seconds=SECONDS, environ=environ)
    if done.returncode or (arguments[0] == "plan" and "No changes." not in done.stdout):
        raise Failed(f"terraform {arguments[0]} ended with {done.returncode}:\n{done.stdout}")
    return monotonic() - began


def _state(root: Path) -> list[str]:
    return [line for line in terraform(root, "state", "list").stdout.splitlines() if ".data." not in line]


def _check_secrets(aws: StandIn, root: Path) -> str:
    """The cache's is known to be in the state: secrets.tf says why."""
    secrets = {name.rpartition("/")[2]: value for name, value in aws.secrets().items()}
    password = urlsplit(secrets["database-url"]).password or ""
    if sha256(password.encode()).hexdigest() != aws.database_password():
        raise Failed("the database has another password than its address says")
    parts = {name: urlsplit(value).password or value for name, value in secrets.items()}
    kept = [file.read_text() for file in root.glob("*.tfstate*")]
    known = {name for name, part in parts.items() if any(part in text for text in kept)}
    if known != {"redis-url"} or not all(len(part) >= 32 for part in parts.values()):
        raise Failed(f"of the secrets {sorted(secrets)} the state knows {sorted(known)}")
    return f"the database has the password of DATABASE_URL; of {len(secrets)} secrets the state knows the cache's alone"


def _tell(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    # What was started is ended by `finally`, which a signal must not pass by.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if reason := missing():
        _tell(reason)
        return 1
    if example := "".join(sys.argv[1:]):
        return _prove_alone(example)
    _tell(f"lent to moto: {LENT}")
    proofs = [subprocess.Popen([sys.executable, "-m", "tests.prove.terraform", example]) for example in EXAMPLES]
    try:
        ended = [proof.wait() for proof in proofs]
        return int(any(ended))
    finally:
        for proof in proofs:
            proof.terminate()
            proof.wait()


def _prove_alone(example: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        try:
            prove(example, Path(folder))
        except (Failed, AssertionError, subprocess.TimeoutExpired) as failure:
            _tell(f"{example} FAILED: {failure}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
