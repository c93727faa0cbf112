"""The `gateway` command."""

import argparse
import asyncio
import dataclasses
import getpass
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from gateway import __version__
from gateway.protocol.errors import GatewayError
from gateway.settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    import asyncpg
    from redis.asyncio import Redis

    from gateway.stores.accounts import Account
    from gateway.stores.keys import KeyStore
    from gateway.stores.stats import Figures

# The server's modules are imported by the commands that need them: `gateway --help` answers at once.


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        settings = load_settings(os.environ)
        result: int = arguments.run(arguments, settings)
        return result
    except SettingsError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2
    except GatewayError as error:
        print(f"gateway: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gateway",
        description="One OpenAI-compatible base URL in front of OpenAI, Anthropic, Ollama and every compatible server.",
        epilog="Settings are environment variables; the README lists them. `gateway COMMAND --help` says more.",
    )
    parser.add_argument("--version", action="version", version=f"gateway {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_mock(commands)
    _add_users(commands)
    _add_keys(commands)
    _add_usage(commands)
    _add_migrate(commands)
    return parser


Rows = Sequence[dict[str, Any]]
Commands = Any  # argparse gives the object that add_subparsers returns no public type


# --- serve and mock -----------------------------------------------------------------------------------------------


def _add_serve(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="run the gateway",
        description="Run the gateway in the foreground. Without DATABASE_URL and REDIS_URL it starts a Postgres and a "
        "Valkey of its own in GATEWAY_DATA_DIR. SIGTERM lets open streams finish.",
    )
    parser.add_argument("--host", help="address to listen on (HOST)")
    parser.add_argument("--port", type=int, help="port to listen on (PORT)")
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace, settings: Settings) -> int:
    import msgspec

    from gateway.app import StartError, serve
    from gateway.logs import setup

    changes = {name: value for name in ("host", "port") if (value := getattr(arguments, name)) is not None}
    settings = msgspec.structs.replace(settings, **changes)
    setup(settings.log_level, settings.environment)
    try:
        serve(settings, os.environ, lambda address: print(f"gateway: ready on {address}/v1", flush=True))
    except StartError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 1
    return 0


def _add_mock(commands: Commands) -> None:
    from gateway.mock import HELP

    parser = commands.add_parser(
        "mock",
        help="run a provider that answers without the internet",
        description="Run the mock provider: it speaks OpenAI's, Anthropic's and Ollama's wire formats.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8100, help="port to listen on (8100)")
    parser.add_argument("--pace-ms", type=float, default=0.0, help="milliseconds between two tokens (0)")
    parser.set_defaults(run=_mock)


def _mock(arguments: argparse.Namespace, settings: Settings) -> int:
    import signal

    import uvloop

    from gateway.mock import serve

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(
            arguments.host,
            arguments.port,
            arguments.pace_ms,
            stop,
            lambda address: print(f"gateway: mock provider on {address}", flush=True),
        )

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    return 0


# --- commands on the database -------------------------------------------------------------------------------------


def _with_servers(settings: Settings, work: Callable[[str, str], Awaitable[int]]) -> int:
    """Run `work(database_url, redis_url)` on the servers of the settings, of a gateway that runs, or embedded ones."""
    import asyncpg

    from gateway.app import open_database
    from gateway.embedded import EmbeddedError, running

    async def run() -> int:
        found = None if settings.database_url else running(Path(settings.gateway_data_dir))
        if found is not None:
            return await work(*found)
        async with open_database(settings) as urls:
            return await work(*urls)

    try:
        return asyncio.run(run())
    except EmbeddedError as error:
        raise SettingsError(str(error)) from None
    except (OSError, asyncpg.PostgresError) as error:
        print(f"gateway: the database cannot be used: {error}", file=sys.stderr)
        return 1


def _with_database(settings: Settings, work: Callable[["asyncpg.Pool", "Redis"], Awaitable[Rows]]) -> Rows:
    """What `work(pool, redis)` gives, on a database that is up to date."""
    from gateway.app import connect_database
    from gateway.stores.limits import connect_redis

    rows: list[dict[str, Any]] = []

    async def use(database_url: str, redis_url: str) -> int:
        pool, redis = await connect_database(database_url, wait=0), connect_redis(redis_url)
        try:
            rows.extend(await work(pool, redis))
            return 0
        finally:
            await redis.aclose()
            await pool.close()

    status = _with_servers(settings, use)
    if status:
        raise SystemExit(status)
    return rows


def _print(rows: Rows, as_json: bool) -> int:
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


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for a script")


def _add_migrate(commands: Commands) -> None:
    parser = commands.add_parser(
        "migrate",
        help="bring the database's tables up to date",
        description="Apply the migrations that are missing, as `gateway serve` does. Several at once are safe.",
    )
    _add_json(parser)
    parser.set_defaults(run=_migrate)


def _migrate(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.stores.migrations import migrate

    async def work(database_url: str, redis_url: str) -> int:
        return _print([{"applied": name} for name in await migrate(database_url)], arguments.json)

    return _with_servers(settings, work)


def _add_users(commands: Commands) -> None:
    parser = commands.add_parser("users", help="list and create accounts", description="Accounts: people who own keys.")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="all accounts", description="List all accounts.")
    _add_json(listing)
    listing.set_defaults(run=_users_list)
    create = actions.add_parser(
        "create",
        help="create an account",
        description="Create an account. The first one is the admin. The password is read from standard input.",
    )
    create.add_argument("email")
    _add_json(create)
    create.set_defaults(run=_users_create)


def _users_list(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.stores.accounts import AccountStore

    async def work(pool: "asyncpg.Pool", redis: "Redis") -> Rows:
        return [_account(account) for account in await AccountStore(pool).list()]

    return _print(_with_database(settings, work), arguments.json)


def _users_create(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.stores.accounts import AccountStore

    password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")

    async def work(pool: "asyncpg.Pool", redis: "Redis") -> Rows:
        # Who can run this command can write to the database: registration may be closed for them.
        return [_account(await AccountStore(pool).register(arguments.email, password, registration="open"))]

    return _print(_with_database(settings, work), arguments.json)


def _account(account: "Account") -> dict[str, Any]:
    return {"id": account.id, "email": account.email, "role": account.role, "created_at": account.created_at}


def _add_keys(commands: Commands) -> None:
    parser = commands.add_parser(
        "keys", help="list, create and revoke keys", description="Keys of the gateway's clients."
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="all keys, never a secret", description="List all keys, never a secret.")
    _add_json(listing)
    listing.set_defaults(run=_keys_list)
    create = actions.add_parser("create", help="create a key", description="Create a key; it is shown this once.")
    create.add_argument("email", help="the account that owns it")
    create.add_argument("name", help="what it is for")
    create.add_argument("--requests-per-minute", type=_count, metavar="N", help="0: no limit")
    create.add_argument("--concurrent-requests", type=_count, metavar="N", help="0: no limit")
    create.add_argument("--model", action="append", default=[], metavar="PATTERN", help="allow only these (repeatable)")
    _add_json(create)
    create.set_defaults(run=_keys_create)
    revoke = actions.add_parser("revoke", help="revoke a key", description="Revoke a key by its id, in all processes.")
    revoke.add_argument("id", help="the id, or the prefix aig_…")
    _add_json(revoke)
    revoke.set_defaults(run=_keys_revoke)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 7:
        raise argparse.ArgumentTypeError("a whole number from 0 to 9999999 is required")
    return int(text)


async def _key_store(settings: Settings, pool: "asyncpg.Pool", redis: "Redis") -> "KeyStore":
    from gateway.stores.keys import KeyStore, load_pepper

    return KeyStore(
        pool,
        redis,
        pepper=await load_pepper(pool, settings.gateway_key_pepper),
        cache_seconds=settings.gateway_key_cache,
        stale_seconds=settings.gateway_key_stale,
    )


def _keys_list(arguments: argparse.Namespace, settings: Settings) -> int:
    async def work(pool: "asyncpg.Pool", redis: "Redis") -> Rows:
        keys = await _key_store(settings, pool, redis)
        return [dataclasses.asdict(key) for key in await keys.list(None)]

    return _print(_with_database(settings, work), arguments.json)


def _keys_create(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.stores.accounts import AccountStore

    rpm, concurrent = arguments.requests_per_minute, arguments.concurrent_requests

    async def work(pool: "asyncpg.Pool", redis: "Redis") -> Rows:
        owner = await AccountStore(pool).find(arguments.email)
        made = await (await _key_store(settings, pool, redis)).create(
            owner.id,
            arguments.name,
            requests_per_minute=settings.gateway_requests_per_minute if rpm is None else rpm,
            concurrent_requests=settings.gateway_concurrent_requests if concurrent is None else concurrent,
            allowed_models=tuple(arguments.model),
        )
        return [{"api_key": made.token, "prefix": made.prefix, "id": made.id}]

    return _print(_with_database(settings, work), arguments.json)


def _keys_revoke(arguments: argparse.Namespace, settings: Settings) -> int:
    async def work(pool: "asyncpg.Pool", redis: "Redis") -> Rows:
        key_id = arguments.id.removeprefix("aig_")
        await (await _key_store(settings, pool, redis)).revoke(key_id, None)
        return [{"id": key_id, "revoked": True}]

    return _print(_with_database(settings, work), arguments.json)


# --- usage --------------------------------------------------------------------------------------------------------


def _add_usage(commands: Commands) -> None:
    parser = commands.add_parser(
        "usage", help="what was used", description="Tokens and requests of a time range, as a table or JSON."
    )
    parser.add_argument("--since", choices=("1h", "24h", "7d", "30d", "all"), default="24h", help="how far back (24h)")
    parser.add_argument("--group-by", choices=("user", "app", "model", "provider", "key"), default="model")
    _add_json(parser)
    parser.set_defaults(run=_usage)


def _usage(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.stores.stats import Scope, read_stats

    async def work(pool: "asyncpg.Pool", redis: "Redis") -> Rows:
        stats = await read_stats(pool, Scope(None, arguments.since), arguments.group_by)
        return [{arguments.group_by: group.name, **_figures(group)} for group in stats.groups]

    return _print(_with_database(settings, work), arguments.json)


def _figures(group: "Figures") -> dict[str, Any]:
    return {
        "requests": group.requests,
        "errors": group.errors,
        "prompt_tokens": group.prompt_tokens,
        "completion_tokens": group.completion_tokens,
        "total_tokens": group.total_tokens,
        "cached_tokens": group.cached_tokens,
    }


if __name__ == "__main__":
    sys.exit(main())
