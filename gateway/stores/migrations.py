"""Brings a database's tables up to date: applies the files of sql/migrations that it has not seen, each exactly once.

The files and the table `schema_migrations` are dbmate's, so its command line works on the same database:
https://github.com/amacneil/dbmate#creating-migrations. Versions in the table that we have no file for are left
alone: during a rolling deploy an older process starts beside a newer one.
"""

import asyncio
import re
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import asyncpg

_LOCK = 0x6169675F6D696772  # "aig_migr": the advisory lock of whoever migrates
_PATIENCE = 60.0  # seconds for somebody else's migrations; a start that hangs for ever is never started again
_POLL = 0.05  # seconds
_CLOSE = 5.0  # seconds for an orderly end of the connection

_UP = re.compile(r"^--\s*migrate:up(?P<options>[^\n]*)$(?P<sql>.*?)(?=^--\s*migrate:down|\Z)", re.MULTILINE | re.DOTALL)


class MigrationError(Exception):
    """A file that cannot be understood, the statement of one that the database refused, or a lock that never came."""


class Migration(NamedTuple):
    version: str  # the digits that its file's name starts with
    name: str
    sql: str
    in_transaction: bool  # False for what Postgres refuses there; such a file holds one statement


async def migrate(database_url: str, folder: Path | None = None) -> list[str]:
    """Names of the migrations applied, in order. Any number of processes may call it at once; all return when done."""
    migrations = read_migrations(folder or _shipped())
    connection = await asyncpg.connect(database_url)
    try:
        await _lock(connection)
        return [migration.name for migration in await _apply_missing(connection, migrations)]
    finally:
        with suppress(TimeoutError):  # then it was cut, which is enough
            await connection.close(timeout=_CLOSE)  # and with it the lock


async def _lock(connection: asyncpg.Connection) -> None:
    """Polls, because a session that waits inside Postgres holds a snapshot, and CREATE INDEX CONCURRENTLY of the one
    that has the lock would wait for it in turn. Raises MigrationError after _PATIENCE."""
    deadline = monotonic() + _PATIENCE
    while not await connection.fetchval("select pg_try_advisory_lock($1)", _LOCK):
        if monotonic() > deadline:
            raise MigrationError(f"another process has been migrating this database for {_PATIENCE:g} s")
        await asyncio.sleep(_POLL)


async def _apply_missing(connection: asyncpg.Connection, migrations: list[Migration]) -> list[Migration]:
    await connection.execute("create table if not exists schema_migrations (version varchar primary key)")
    rows = await connection.fetch("select version from schema_migrations")
    applied = {row["version"] for row in rows}
    missing = [migration for migration in migrations if migration.version not in applied]
    for migration in missing:
        try:
            await _apply(connection, migration)
        except asyncpg.PostgresError as error:
            raise MigrationError(f"migration {migration.name}: {error}") from error
    return missing


async def _apply(connection: asyncpg.Connection, migration: Migration) -> None:
    if not migration.in_transaction:
        await connection.execute(migration.sql)
        await _record(connection, migration)
        return
    async with connection.transaction():
        await connection.execute(migration.sql)
        await _record(connection, migration)


async def _record(connection: asyncpg.Connection, migration: Migration) -> None:
    await connection.execute("insert into schema_migrations (version) values ($1)", migration.version)


def read_migrations(folder: Path) -> list[Migration]:
    return [_read(file) for file in sorted(folder.glob("*.sql"))]


def _read(file: Path) -> Migration:
    version = re.match(r"\d+", file.name)
    up = _UP.search(file.read_text("utf-8"))
    if not version or not up or not up["sql"].strip():
        raise MigrationError(f"{file}: its name starts with digits, and statements follow a line `-- migrate:up`")
    return Migration(version[0], file.stem, up["sql"].strip(), "transaction:false" not in up["options"])


def _shipped() -> Path:
    """In a wheel the files lie in the package, in a checkout beside it."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "sql/migrations", package.parent / "sql/migrations") if path.is_dir())
