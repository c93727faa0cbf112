import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis import Redis

from gateway import embedded
from gateway.embedded import Embedded, EmbeddedError, open_database, running
from gateway.settings import load_settings

pytestmark = pytest.mark.integration

# Only root has a choice, and in most containers only one.
IDENTITIES = sorted({"nobody", embedded._identity()}) if os.geteuid() == 0 else ["self"]

POSTGRES, VALKEY = embedded._find_postgres(), embedded._find_valkey()

# A gateway as far as the servers are concerned: starts them, says so, and waits to be killed.
GATEWAY = """
import json, sys, time
from pathlib import Path
from gateway import embedded
embedded._KERNEL_TIES = sys.argv[2] == "kernel"
servers = embedded.Embedded(Path(sys.argv[1]), postgres=True, redis=True)
servers.start()
print(json.dumps([servers.database_url, servers.redis_url]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    if (tmp_path / "lock").exists():
        wait_until_unlocked(tmp_path)
        embedded._forget(tmp_path)  # sockets of a killed gateway that was not started again
    shutil.rmtree(tmp_path)  # pytest keeps the folders of three runs, and a database is 40 MB


@contextlib.contextmanager
def gateway(data: Path, ties: str = "kernel") -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    command = [sys.executable, "-c", GATEWAY, str(data), ties]
    root = Path(embedded.__file__).parents[1]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout
            database_url, redis_url = json.loads(process.stdout.readline())
            yield process, database_url, redis_url
        finally:
            process.kill()


@contextlib.contextmanager
def servers(data: Path, *, postgres: bool = True, redis: bool = True) -> Iterator[Embedded]:
    pair = Embedded(data, postgres=postgres, redis=redis)
    pair.start()
    try:
        yield pair
    finally:
        pair.stop()


def query(database_url: str, *statements: str) -> Any:
    """Value of the last of the statements."""

    async def run() -> Any:
        connection = await asyncpg.connect(database_url)
        try:
            return [await connection.fetchval(statement) for statement in statements][-1]
        finally:
            await connection.close()

    return asyncio.run(run())


def wait_until_unlocked(data: Path, seconds: float = 10) -> None:
    """Each server holds the lock: when it is free, none of them is left."""
    deadline = time.monotonic() + seconds
    with (data / "lock").open() as lock:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            assert time.monotonic() < deadline, "a server is still running"
            time.sleep(0.01)


def test_both_servers_answer_and_keep_their_data(folder: Path) -> None:
    with servers(folder) as pair, Redis.from_url(pair.redis_url) as client:
        query(pair.database_url, "create table fruit (name text)", "insert into fruit values ('apple')")
        client.set("fruit", "pear")
    with servers(folder) as pair, Redis.from_url(pair.redis_url) as client:
        assert query(pair.database_url, "select name from fruit") == "apple"
        assert client.get("fruit") == b"pear"


def test_an_existing_folder_starts_in_under_a_second_and_a_half(folder: Path) -> None:
    with servers(folder):
        pass
    started = time.monotonic()
    with servers(folder):
        assert time.monotonic() - started < 1.5


def test_a_folder_deeper_than_a_socket_path_may_be_works(folder: Path) -> None:
    with servers(folder / ("deep" * 30) / ("deeper" * 30)) as pair:
        assert query(pair.database_url, "select 1") == 1


def test_only_what_was_asked_for_runs(folder: Path) -> None:
    with servers(folder, postgres=False) as pair:
        assert (pair.database_url, bool(pair.redis_url)) == ("", True)
        assert not (folder / "postgres").exists()


def test_nothing_listens_on_the_network(folder: Path) -> None:
    with servers(folder) as pair, Redis.from_url(pair.redis_url) as client:
        assert query(pair.database_url, "show listen_addresses") == ""
        assert client.config_get("port") == {"port": "0"}
        sockets = Path(pair.redis_url.removeprefix("unix://")).parent
        assert sockets.stat().st_mode & 0o777 == 0o700


def test_durability_is_on_and_redis_never_evicts(folder: Path) -> None:
    with servers(folder) as pair, Redis.from_url(pair.redis_url) as client:
        assert query(pair.database_url, "show fsync") == "on"
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


async def test_postgres_takes_the_connections_of_all_workers_also_while_they_are_replaced(folder: Path) -> None:
    environ = {"GATEWAY_DATA_DIR": str(folder), "GATEWAY_WORKERS": "24", "REDIS_URL": "redis://elsewhere"}
    async with open_database(load_settings(environ)) as (database_url, _):
        most = await asyncio.to_thread(query, database_url, "show max_connections")
    assert int(most) >= 24 * 2 * 10


def test_our_credentials_are_not_in_the_servers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert embedded._environment().keys() <= {"PATH", "LD_LIBRARY_PATH", "LC_ALL", "TZ"}


def test_another_process_finds_the_running_servers(folder: Path) -> None:
    assert running(folder) is None
    with gateway(folder) as (_, database_url, redis_url):
        assert running(folder) == (database_url, redis_url)
        assert query(database_url, "select 1") == 1
        assert (folder / "servers.json").stat().st_mode & 0o777 == 0o600


def test_servers_that_stopped_are_not_found(folder: Path) -> None:
    with servers(folder):
        pass
    assert running(folder) is None


def test_a_second_gateway_on_the_folder_is_refused_with_the_firsts_number(folder: Path) -> None:
    with gateway(folder) as (process, database_url, _):
        with pytest.raises(EmbeddedError, match=f"in use by another gateway .process {process.pid}."):
            Embedded(folder, postgres=True, redis=True).start()
        assert query(database_url, "select 1") == 1


@pytest.mark.parametrize("ties", ["kernel", "pipe"] if sys.platform == "linux" else ["pipe"])
def test_a_killed_gateway_takes_its_servers_along_and_loses_nothing(folder: Path, ties: str) -> None:
    with gateway(folder, ties) as (process, database_url, redis_url):
        query(database_url, "create table fruit (name text)", "insert into fruit values ('apple')")
        with Redis.from_url(redis_url) as client:
            client.set("fruit", "pear")
        process.send_signal(signal.SIGKILL)
    wait_until_unlocked(folder)
    with servers(folder) as pair, Redis.from_url(pair.redis_url) as client:
        assert query(pair.database_url, "select name from fruit") == "apple"
        assert client.get("fruit") == b"pear"
    assert not Path(redis_url.removeprefix("unix://")).parent.exists()


def test_a_killed_gateway_can_be_started_again_at_once(folder: Path) -> None:
    with gateway(folder) as (process, _, _):
        process.send_signal(signal.SIGKILL)
        process.wait()
        with servers(folder) as pair:
            assert query(pair.database_url, "select 1") == 1


def test_a_gateway_that_ends_without_a_word_takes_its_servers_along(folder: Path) -> None:
    with gateway(folder) as (process, _, _):
        process.communicate("")
        assert process.returncode == 0
    wait_until_unlocked(folder)


def test_killed_servers_start_again_with_what_was_committed(folder: Path) -> None:
    pair = Embedded(folder, postgres=True, redis=True)
    pair.start()
    query(pair.database_url, "create table fruit (name text)", "insert into fruit values ('apple')")
    for server in pair._servers:
        server.process.kill()
    pair.stop()
    with servers(folder) as pair:
        assert query(pair.database_url, "select name from fruit") == "apple"


def test_a_stale_pid_that_another_program_has_by_now_does_not_stop_a_start(folder: Path) -> None:
    with servers(folder):
        lines = (folder / "postgres" / "postmaster.pid").read_text().split("\n")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        lines[0] = str(other.pid)
        (folder / "postgres" / "postmaster.pid").write_text("\n".join(lines))
        with servers(folder) as pair:
            assert query(pair.database_url, "select 1") == 1
        other.kill()


def test_the_folder_stays_locked_until_the_last_server_is_gone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_LOCK", 0.05)
    with gateway(folder) as (process, _, _):
        postgres = int((folder / "postgres" / "postmaster.pid").read_text().split("\n")[0])
        os.kill(postgres, signal.SIGSTOP)
        try:
            process.kill()
            process.wait()
            with pytest.raises(EmbeddedError, match="in use"):
                Embedded(folder, postgres=True, redis=True).start()
        finally:
            os.kill(postgres, signal.SIGCONT)
    wait_until_unlocked(folder)


def test_ctrl_c_reaches_the_gateway_only(folder: Path) -> None:
    with servers(folder) as pair:
        groups = {os.getpgid(server.process.pid) for server in pair._servers}
        assert os.getpgrp() not in groups


def test_an_interrupted_initdb_is_done_again(folder: Path) -> None:
    (folder / "postgres.new").mkdir()
    (folder / "postgres.new" / "PG_VERSION").write_text("half")
    with servers(folder) as pair:
        assert query(pair.database_url, "select 1") == 1


def test_a_start_that_is_told_to_stop_ends_and_leaves_none_running(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_postgres_is_ready", lambda data, pid: False)
    pair = Embedded(folder, postgres=True, redis=True)
    with ThreadPoolExecutor(1) as thread:
        starting = thread.submit(pair.start)
        deadline = time.monotonic() + 20
        while not (folder / "postgres.log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pair.stop()
        with pytest.raises(EmbeddedError, match="told to stop before Postgres was ready"):
            starting.result(10)
    wait_until_unlocked(folder, 0.5)


def test_a_server_that_cannot_start_says_why_and_leaves_none_running(folder: Path) -> None:
    with servers(folder):
        pass
    (folder / "postgres" / "postgresql.conf").write_text("no_such_setting = 1\n")
    with pytest.raises(EmbeddedError, match=r"Postgres did not start.*no_such_setting"):
        Embedded(folder, postgres=True, redis=True).start()
    wait_until_unlocked(folder, seconds=0)


def test_a_failing_initdb_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bin").mkdir()
    for name in ("postgres", "initdb"):
        (folder / "bin" / name).write_text("#!/bin/sh\necho no room; exit 1\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setattr(embedded, "_find_postgres", lambda: folder / "bin")
    with pytest.raises(EmbeddedError, match="initdb failed: no room"):
        Embedded(folder / "data", postgres=True, redis=False).start()


@pytest.mark.parametrize("identity", IDENTITIES)
def test_servers_run_as_whoever_postgres_accepts(folder: Path, identity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_identity", lambda: identity)
    folder.chmod(0o700)
    with servers(folder / "data") as pair:
        assert query(pair.database_url, "select 1") == 1


def test_a_folder_moves_from_one_identity_to_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for identity in [*IDENTITIES, *IDENTITIES]:
        monkeypatch.setattr(embedded, "_identity", lambda now=identity: now)
        with servers(folder) as pair, Redis.from_url(pair.redis_url) as client:
            query(pair.database_url, "create table if not exists fruit ()")
            assert client.incr("starts")


def test_root_without_namespaces_runs_the_servers_as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(embedded, "_child", lambda *_: [sys.executable, "-c", "raise OSError(1, 'unshare')"])
    assert embedded._identity() == "nobody"


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """The one folder that is on the PATH of a machine without the two wheels."""
    path = folder / "path"
    path.mkdir()
    monkeypatch.setattr(embedded, "_wheel_files", lambda *_: [])
    monkeypatch.setattr(embedded, "_DEBIAN", folder)
    monkeypatch.setenv("PATH", str(path))
    return path


def test_without_wheels_the_programs_on_path_are_used(folder: Path, path: Path) -> None:
    (path / "postgres").symlink_to(POSTGRES / "postgres")
    (path / "redis-server").symlink_to(VALKEY)
    assert embedded._find_postgres() == POSTGRES
    with servers(folder / "data") as pair:
        assert query(pair.database_url, "select 1") == 1


def test_without_wheels_debians_postgres_is_found_off_path(folder: Path, path: Path) -> None:
    for version in ("15", "16"):
        (folder / version / "bin").mkdir(parents=True)
        for name in ("postgres", "initdb"):
            (folder / version / "bin" / name).touch()
    assert embedded._find_postgres() == folder / "16" / "bin"


def test_a_machine_with_nothing_is_told_what_to_install(folder: Path, path: Path) -> None:
    with pytest.raises(EmbeddedError, match=r'pip install "ai-gateway\[embedded\]", or set REDIS_URL'):
        Embedded(folder / "data", postgres=False, redis=True).start()


def test_a_postgres_without_initdb_does_not_count(folder: Path, path: Path) -> None:
    (path / "postgres").touch(0o755)
    with pytest.raises(EmbeddedError, match=r'pip install "ai-gateway\[embedded\]", or set DATABASE_URL'):
        Embedded(folder / "data", postgres=True, redis=False).start()
