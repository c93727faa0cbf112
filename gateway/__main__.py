"""The `gateway` command."""

import argparse
import asyncio
import dataclasses
import getpass
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from gateway import __version__
from gateway.protocol.errors import GatewayError
from gateway.settings import Settings, SettingsError, change, load_settings

if TYPE_CHECKING:
    import asyncpg

    from gateway.stores.accounts import Account, AccountStore
    from gateway.stores.keys import KeyStore
    from gateway.stores.stats import Figures

# The server's modules are imported by the commands that need them: `gateway --help` answers at once.


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    arguments = _parser(words).parse_args(words)
    try:
        settings = load_settings(os.environ)
        result: int = arguments.run(arguments, settings)
        return result
    except SettingsError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2
    except GatewayError as error:
        return _failed(error.message)
    except KeyboardInterrupt:
        return 130


def _failed(words: str) -> int:
    print(f"gateway: {words}", file=sys.stderr)
    return 1


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gateway",
        description="One OpenAI-compatible base URL in front of OpenAI, Anthropic, Ollama and every compatible server.",
        epilog="Settings are environment variables; the README lists them. `gateway COMMAND --help` says more.",
    )
    parser.add_argument("--version", action="version", version=f"gateway {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    asked = next((word for word in argv if not word.startswith("-")), "")
    for name, (words, describe) in _commands().items():
        command = commands.add_parser(name, help=words)
        if name == asked:  # what the others would say is not read, and would have to be imported
            describe(command)
    return parser


def _commands() -> dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]]:
    return {
        "serve": ("run the gateway", _describe_serve),
        "mock": ("run a provider that answers without the internet", _describe_mock),
        "users": ("list and create accounts", _describe_users),
        "keys": ("list, create and revoke keys", _describe_keys),
        "usage": ("what was used", _describe_usage),
        "migrate": ("bring the database's tables up to date", _describe_migrate),
    }


Rows = Sequence[dict[str, Any]]


# --- serve and mock -----------------------------------------------------------------------------------------------


def _describe_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run the gateway in the foreground. Without DATABASE_URL and REDIS_URL it starts a Postgres and a Valkey of "
        "its own in GATEWAY_DATA_DIR. SIGTERM lets open streams finish."
    )
    parser.add_argument("--host", help="address to listen on (HOST)")
    parser.add_argument("--port", help="port to listen on (PORT)")
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.logs import setup
    from gateway.serve import StartError, serve

    given = {name: value for name in ("host", "port") if (value := getattr(arguments, name)) is not None}
    settings = change(settings, given)
    setup(settings.log_level, settings.environment)
    try:
        serve(settings, os.environ, lambda address: print(f"gateway: ready on {address}/v1", flush=True))
    except StartError as error:
        return _failed(str(error))
    return 0


def _describe_mock(parser: argparse.ArgumentParser) -> None:
    from gateway.mock import HELP

    parser.description = "Run the mock provider: it speaks OpenAI's, Anthropic's and Ollama's wire formats."
    parser.epilog = HELP
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8100, help="port to listen on (8100)")
    parser.add_argument("--pace-ms", type=float, default=0.0, help="milliseconds between two tokens (0)")
    parser.set_defaults(run=_mock)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError("a number from 0 to 65535 is required")
    return int(text)


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

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())
    except OSError as error:
        return _failed(f"the mock provider cannot start: {error}")
    return 0


# --- commands on the database -------------------------------------------------------------------------------------


def _with_servers(settings: Settings, work: Callable[[str, str], Awaitable[Rows]]) -> Rows:
    """What `work(database_url, redis_url)` gives, on the servers of the settings, of a gateway that runs, or embedded
    ones. Ends the command when they cannot be had."""
    import asyncpg

    from gateway.app import open_database
    from gateway.embedded import EmbeddedError
    from gateway.serve import reason
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
        raise SystemExit(_failed(reason(error))) from None
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise SystemExit(_failed(f"the database cannot be used: {reason(error)}")) from None


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
class _Stores:
    pool: "asyncpg.Pool"
    accounts: "AccountStore"
    keys: "KeyStore"


def _with_database(settings: Settings, work: Callable[[_Stores], Awaitable[Rows]]) -> Rows:
    """What `work(stores)` gives, on a database that is up to date."""
    from gateway.app import connect_database, open_redis
    from gateway.stores.accounts import AccountStore
    from gateway.stores.keys import KeyStore, load_pepper
    from gateway.stores.passwords import HashingPool

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
            return await work(_Stores(pool, AccountStore(pool, hashing=hashing), keys))

    return _with_servers(settings, use)


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


def _describe_migrate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Apply the migrations that are missing, as `gateway serve` does. Several at once are safe."
    _add_json(parser)
    parser.set_defaults(run=_migrate)


def _migrate(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.stores.migrations import migrate

    async def work(database_url: str, redis_url: str) -> Rows:
        return [{"applied": name} for name in await migrate(database_url)]

    return _print(_with_servers(settings, work), arguments.json)


def _describe_users(parser: argparse.ArgumentParser) -> None:
    parser.description = "Accounts: people who own keys."
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
    async def work(stores: _Stores) -> Rows:
        return [_account(account) for account in await stores.accounts.list()]

    return _print(_with_database(settings, work), arguments.json)


def _users_create(arguments: argparse.Namespace, settings: Settings) -> int:
    password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")

    async def work(stores: _Stores) -> Rows:
        # Who can run this command can write to the database: registration may be closed for them.
        return [_account(await stores.accounts.register(arguments.email, password, registration="open"))]

    return _print(_with_database(settings, work), arguments.json)


def _account(account: "Account") -> dict[str, Any]:
    return {"id": account.id, "email": account.email, "role": account.role, "created_at": account.created_at}


def _describe_keys(parser: argparse.ArgumentParser) -> None:
    parser.description = "Keys of the gateway's clients."
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


def _keys_list(arguments: argparse.Namespace, settings: Settings) -> int:
    async def work(stores: _Stores) -> Rows:
        return [dataclasses.asdict(key) for key in await stores.keys.list(None)]

    return _print(_with_database(settings, work), arguments.json)


def _keys_create(arguments: argparse.Namespace, settings: Settings) -> int:
    rpm, concurrent = arguments.requests_per_minute, arguments.concurrent_requests

    async def work(stores: _Stores) -> Rows:
        owner = await stores.accounts.find(arguments.email)
        made = await stores.keys.create(
            owner.id,
            arguments.name,
            requests_per_minute=settings.gateway_requests_per_minute if rpm is None else rpm,
            concurrent_requests=settings.gateway_concurrent_requests if concurrent is None else concurrent,
            allowed_models=tuple(arguments.model),
        )
        return [{"api_key": made.token, "prefix": made.prefix, "id": made.id}]

    return _print(_with_database(settings, work), arguments.json)


def _keys_revoke(arguments: argparse.Namespace, settings: Settings) -> int:
    async def work(stores: _Stores) -> Rows:
        key_id = arguments.id.removeprefix("aig_")
        await stores.keys.revoke(key_id, None)
        return [{"id": key_id, "revoked": True}]

    return _print(_with_database(settings, work), arguments.json)


# --- usage --------------------------------------------------------------------------------------------------------


def _describe_usage(parser: argparse.ArgumentParser) -> None:
    from gateway.stores.stats import GROUP_BY, RANGES

    parser.description = "Tokens and requests of a time range, as a table or JSON."
    parser.add_argument("--since", choices=tuple(RANGES), default="24h", help="how far back (24h)")
    parser.add_argument("--group-by", choices=GROUP_BY, default="model")
    _add_json(parser)
    parser.set_defaults(run=_usage)


def _usage(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.stores.stats import Scope, read_stats

    async def work(stores: _Stores) -> Rows:
        stats = await read_stats(stores.pool, Scope(None, arguments.since), arguments.group_by)
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
        "cost_usd": f"{group.cost_micros / 1e6:.6f}",
        "unpriced": group.unpriced,
    }


if __name__ == "__main__":
    sys.exit(main())
