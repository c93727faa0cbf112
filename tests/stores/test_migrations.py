import asyncio
from pathlib import Path

import asyncpg
import pytest

from gateway.stores import migrations
from gateway.stores.migrations import MigrationError, migrate, read_migrations
from tests.support.stores import SCHEMA, dump_schema

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "0001_fruit.sql").write_text("-- migrate:up\ncreate table fruit (name text);\n-- migrate:down\ndrop;\n")
    (tmp_path / "0002_apple.sql").write_text("-- migrate:up\ninsert into fruit values ('apple');\n")
    return tmp_path


async def fetch(database_url: str, query: str) -> list[str]:
    connection = await asyncpg.connect(database_url)
    try:
        return [row[0] for row in await connection.fetch(query)]
    finally:
        await connection.close()


FRUIT = "select name from fruit order by name"
VERSIONS = "select version from schema_migrations order by version"


async def test_an_empty_database_gets_every_file_in_order(empty_database_url: str, folder: Path) -> None:
    assert await migrate(empty_database_url, folder) == ["0001_fruit", "0002_apple"]
    assert await fetch(empty_database_url, FRUIT) == ["apple"]
    assert await fetch(empty_database_url, VERSIONS) == ["0001", "0002"]


async def test_a_second_run_applies_nothing(empty_database_url: str, folder: Path) -> None:
    await migrate(empty_database_url, folder)
    assert await migrate(empty_database_url, folder) == []
    assert await fetch(empty_database_url, FRUIT) == ["apple"]


async def test_four_starts_at_once_apply_each_file_once(empty_database_url: str, folder: Path) -> None:
    (folder / "0003_slow.sql").write_text("-- migrate:up\nselect pg_sleep(0.2); insert into fruit values ('slow');\n")
    applied = await asyncio.gather(*(migrate(empty_database_url, folder) for _ in range(4)))
    assert sorted(applied) == [[], [], [], ["0001_fruit", "0002_apple", "0003_slow"]]
    assert await fetch(empty_database_url, FRUIT) == ["apple", "slow"]


async def test_a_lock_that_never_comes_ends_the_wait_with_words(
    empty_database_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "_PATIENCE", 0.2)
    holder = await asyncpg.connect(empty_database_url)
    try:
        await holder.execute("select pg_advisory_lock($1)", migrations._LOCK)
        with pytest.raises(MigrationError, match=r"another process has been migrating this database for 0\.2 s"):
            await asyncio.wait_for(migrate(empty_database_url, folder), 5)
    finally:
        await holder.close()
    assert await migrate(empty_database_url, folder) == ["0001_fruit", "0002_apple"]


async def test_versions_of_a_newer_release_are_left_alone(empty_database_url: str, folder: Path) -> None:
    (folder / "0003_newer.sql").write_text("-- migrate:up\ninsert into fruit values ('newer');\n")
    await migrate(empty_database_url, folder)
    (folder / "0003_newer.sql").unlink()
    assert await migrate(empty_database_url, folder) == []
    assert await fetch(empty_database_url, VERSIONS) == ["0001", "0002", "0003"]


async def test_an_earlier_file_that_was_missed_is_still_applied(empty_database_url: str, folder: Path) -> None:
    await migrate(empty_database_url, folder)
    (folder / "0000_late.sql").write_text("-- migrate:up\ninsert into fruit values ('late');\n")
    assert await migrate(empty_database_url, folder) == ["0000_late"]
    assert await fetch(empty_database_url, FRUIT) == ["apple", "late"]


async def test_a_file_that_fails_leaves_no_trace_and_is_named(empty_database_url: str, folder: Path) -> None:
    (folder / "0003_bad.sql").write_text("-- migrate:up\ninsert into fruit values ('half'); select 1/0;\n")
    with pytest.raises(MigrationError, match="0003_bad: division by zero"):
        await migrate(empty_database_url, folder)
    assert await fetch(empty_database_url, FRUIT) == ["apple"]
    assert await fetch(empty_database_url, VERSIONS) == ["0001", "0002"]


async def test_a_file_may_opt_out_of_its_transaction(empty_database_url: str, folder: Path) -> None:
    text = "-- migrate:up transaction:false\ncreate index concurrently fruit_name on fruit (name);\n"
    (folder / "0003_index.sql").write_text(text)
    await migrate(empty_database_url, folder)
    assert await fetch(
        empty_database_url, "select indexname from pg_indexes where tablename = 'fruit' and schemaname = 'public'"
    ) == ["fruit_name"]
    assert await fetch(empty_database_url, VERSIONS) == ["0001", "0002", "0003"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("words.sql", "-- migrate:up\nselect 1;\n"),
        ("0001_words.sql", "select 1;\n"),
        ("0001_empty.sql", "-- migrate:up\n"),
    ],
)
def test_a_file_that_is_no_migration_is_refused_by_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(MigrationError, match=name):
        read_migrations(tmp_path)


def test_shipped_migrations_have_a_version_each() -> None:
    shipped = read_migrations(SCHEMA.parent / "migrations")
    assert len(shipped) == len({migration.version for migration in shipped}) > 0


def test_the_schema_file_is_the_sum_of_all_migrations(database_url: str) -> None:
    assert SCHEMA.read_text() == dump_schema(database_url), "run `make schema`"


async def test_every_table_has_a_comment(database_url: str) -> None:
    query = """
        select relname::text from pg_class
        where relnamespace = 'public'::regnamespace and relkind in ('r', 'p') and not relispartition
          and relname <> 'schema_migrations' and obj_description(oid, 'pg_class') is null
    """
    assert await fetch(database_url, query) == []
