"""What the commands on the database share: its servers, its stores, and how rows are printed.

The server's modules are imported where they are needed: `gateway --help` answers at once.
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from gateway.settings import Settings, SettingsError

if TYPE_CHECKING:
    import asyncpg

    from gateway.stores.accounts import AccountStore
    from gateway.stores.keys import KeyStore

Rows = Sequence[dict[str, Any]]


def failed(words: str) -> int:
    print(f"gateway: {words}", file=sys.stderr)
    return 1


def with_servers(settings: Settings, work: Callable[[str, str], Awaitable[Rows]]) -> Rows:
    """What `work(database_url, redis_url)` gives, on the servers of the settings, of a gateway that runs, or embedded
    ones. Ends the command when they cannot be had."""
    import asyncpg

    from gateway.databases import reason
    from gateway.embedded import EmbeddedError, open_database
    from gateway.stores.migrations import MigrationError

    async def run() -> Rows:
        if urls := _known_servers(settings):
            return await work(*urls)
        async with open_database(settings) as opened:
            return await work(*opened)

    try:
        return asyncio.run(run())
    except asyncpg.ClientConfigurationError as error:
        raise SettingsError(f"DATABASE_URL: {reason(error)}") from None
    except (EmbeddedError, MigrationError) as error:
        raise SystemExit(failed(reason(error))) from None
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise SystemExit(failed(f"the database cannot be used: {reason(error)}")) from None


def _known_servers(settings: Settings) -> tuple[str, str] | None:
    """Of the settings, and what they do not name of the gateway that runs; None: there are none that run."""
    from gateway.embedded import running

    if settings.database_url and settings.redis_url:
        return settings.database_url, settings.redis_url
    found = running(Path(settings.gateway_data_dir))
    if found is None:
        return None
    urls = settings.database_url or found[0], settings.redis_url or found[1]
    for name, url in zip(("DATABASE_URL", "REDIS_URL"), urls, strict=True):
        if not url:
            raise SettingsError(f"{name}: required, as the gateway on {settings.gateway_data_dir} was started with one")
    return urls


@dataclass(frozen=True, slots=True)
class Stores:
    pool: "asyncpg.Pool"
    accounts: "AccountStore"
    keys: "KeyStore"


def with_database(settings: Settings, work: Callable[[Stores], Awaitable[Rows]]) -> Rows:
    """What `work(stores)` gives, on a database that is up to date."""
    from gateway.databases import connect_database, open_redis
    from gateway.stores.accounts import AccountStore
    from gateway.stores.keys import KeyStore
    from gateway.stores.passwords import HashingPool
    from gateway.stores.secrets import load_pepper

    async def use(database_url: str, redis_url: str) -> Rows:
        async with AsyncExitStack() as opened:
            pool = await opened.enter_async_context(await connect_database(database_url, wait=0))
            redis = await opened.enter_async_context(open_redis(redis_url))
            hashing = HashingPool()
            opened.callback(hashing.close)
            keys = KeyStore(
                pool,
                redis,
                pepper=await load_pepper(pool, settings.gateway_key_pepper),
                cache_seconds=settings.gateway_key_cache,
                stale_seconds=settings.gateway_key_stale,
                hashing=hashing,
            )
            return await work(Stores(pool, AccountStore(pool, hashing=hashing), keys))

    return with_servers(settings, use)


def print_rows(rows: Rows, as_json: bool) -> int:
    """JSON, one array, for a script; a table for a person. The command's exit status."""
    if as_json:
        print(orjson.dumps(list(rows), option=orjson.OPT_INDENT_2).decode())
        return 0
    if not rows:
        print("(none)")
        return 0
    texts = [{name: _cell(value) for name, value in row.items()} for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in texts)) for name in texts[0]}
    print("  ".join(name.ljust(width) for name, width in widths.items()).rstrip())
    for row in texts:
        print("  ".join(row[name].ljust(width) for name, width in widths.items()).rstrip())
    return 0


def _cell(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "-"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for a script")
