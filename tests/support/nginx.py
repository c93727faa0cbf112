"""The nginx of the machine in front of two addresses, with the configuration that ships: nginx/gateway.conf."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.subjects import free_port
from tests.support.programs import ROOT, program

CONFIG = ROOT / "nginx" / "gateway.conf"
SERVED_BY = "X-Served-By"  # added here: the addresses that were tried, the one that answered last

# What Debian's nginx.conf has around it. As root the workers would be somebody else, who may not see a test's folder.
_MAIN = """
daemon off;
%(user)s
worker_processes 2;
worker_rlimit_nofile 20000;
pid nginx.pid;
events { worker_connections 9000; }
http {
    access_log off;
    client_body_temp_path client;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    add_header %(header)s $upstream_addr always;
    include gateway.conf;
}
"""


@dataclass(frozen=True, slots=True)
class Nginx:
    root_url: str
    folder: Path

    @property
    def base_url(self) -> str:
        return f"{self.root_url}/v1"

    def take_out(self, name: str) -> None:
        """New requests go to the other one."""
        (self.folder / f"{name}.draining").touch()

    def put_back(self, name: str) -> None:
        (self.folder / f"{name}.draining").unlink(missing_ok=True)


@asynccontextmanager
async def running_nginx(ports: Sequence[int], folder: Path) -> AsyncIterator[Nginx]:
    """In front of gateways a and b at these ports of loopback, whether or not they are there yet."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    _write_config(port, ports, folder)
    command = [program("nginx", "/usr/sbin/nginx"), "-p", str(folder), "-e", "error.log", "-c", "nginx.conf"]
    process = await asyncio.create_subprocess_exec(*command)
    try:
        async with asyncio.timeout(20):
            while not _listens(port):
                assert process.returncode is None, (folder / "error.log").read_text()
                await asyncio.sleep(0.01)
        yield Nginx(f"http://127.0.0.1:{port}", folder)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def _write_config(port: int, ports: Sequence[int], folder: Path) -> None:
    """As it ships, but for addresses and the folder of notes."""
    text = CONFIG.read_text()
    ours = {"listen 8080;": f"listen 127.0.0.1:{port};", "/run/gateway/": f"{folder}/"}
    ours |= {f"127.0.0.1:{3001 + number};": f"127.0.0.1:{own};" for number, own in enumerate(ports)}
    ours |= {f"127.0.0.1:{3001 + number} ": f"127.0.0.1:{own} " for number, own in enumerate(ports)}
    for shipped, here in ours.items():
        assert shipped in text, f"{CONFIG.name} has no {shipped!r}"
        text = text.replace(shipped, here)
    (folder / "gateway.conf").write_text(text)
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(_MAIN % {"user": user, "header": SERVED_BY})


def _listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0
