"""`gateway users` and `gateway keys`."""

import argparse
import dataclasses
import getpass
import sys
from typing import TYPE_CHECKING, Any

from gateway.commands.database import Rows, Stores, add_json, print_rows, with_database
from gateway.settings import Settings

if TYPE_CHECKING:
    from gateway.stores.accounts import Account


def describe_users(parser: argparse.ArgumentParser) -> None:
    parser.description = "Accounts: people who own keys."
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="all accounts", description="List all accounts.")
    add_json(listing)
    listing.set_defaults(run=_users_list)
    create = actions.add_parser(
        "create",
        help="create an account",
        description="Create an account. The first one is the admin. The password is read from standard input.",
    )
    create.add_argument("email")
    add_json(create)
    create.set_defaults(run=_users_create)


def _users_list(arguments: argparse.Namespace, settings: Settings) -> int:
    async def work(stores: Stores) -> Rows:
        return [_account(account) for account in await stores.accounts.list()]

    return print_rows(with_database(settings, work), arguments.json)


def _users_create(arguments: argparse.Namespace, settings: Settings) -> int:
    password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")

    async def work(stores: Stores) -> Rows:
        # Who can run this command can write to the database: registration may be closed for them.
        return [_account(await stores.accounts.register(arguments.email, password, registration="open"))]

    return print_rows(with_database(settings, work), arguments.json)


def _account(account: "Account") -> dict[str, Any]:
    return {"id": account.id, "email": account.email, "role": account.role, "created_at": account.created_at}


def describe_keys(parser: argparse.ArgumentParser) -> None:
    parser.description = "Keys of the gateway's clients."
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="all keys, never a secret", description="List all keys, never a secret.")
    add_json(listing)
    listing.set_defaults(run=_keys_list)
    create = actions.add_parser("create", help="create a key", description="Create a key; it is shown this once.")
    create.add_argument("email", help="the account that owns it")
    create.add_argument("name", help="what it is for")
    create.add_argument("--requests-per-minute", type=_count, metavar="N", help="0: no limit")
    create.add_argument("--concurrent-requests", type=_count, metavar="N", help="0: no limit")
    create.add_argument("--model", action="append", default=[], metavar="PATTERN", help="allow only these (repeatable)")
    add_json(create)
    create.set_defaults(run=_keys_create)
    revoke = actions.add_parser("revoke", help="revoke a key", description="Revoke a key by its id, in all processes.")
    revoke.add_argument("id", help="the id, or the prefix aig_…")
    add_json(revoke)
    revoke.set_defaults(run=_keys_revoke)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 7:
        raise argparse.ArgumentTypeError("a whole number from 0 to 9999999 is required")
    return int(text)


def _keys_list(arguments: argparse.Namespace, settings: Settings) -> int:
    async def work(stores: Stores) -> Rows:
        return [dataclasses.asdict(key) for key in await stores.keys.list(None)]

    return print_rows(with_database(settings, work), arguments.json)


def _keys_create(arguments: argparse.Namespace, settings: Settings) -> int:
    rpm, concurrent = arguments.requests_per_minute, arguments.concurrent_requests

    async def work(stores: Stores) -> Rows:
        owner = await stores.accounts.find(arguments.email)
        made = await stores.keys.create(
            owner.id,
            arguments.name,
            requests_per_minute=settings.gateway_requests_per_minute if rpm is None else rpm,
            concurrent_requests=settings.gateway_concurrent_requests if concurrent is None else concurrent,
            allowed_models=tuple(arguments.model),
        )
        return [{"api_key": made.token, "prefix": made.prefix, "id": made.id}]

    return print_rows(with_database(settings, work), arguments.json)


def _keys_revoke(arguments: argparse.Namespace, settings: Settings) -> int:
    async def work(stores: Stores) -> Rows:
        key_id = arguments.id.removeprefix("aig_")
        await stores.keys.revoke(key_id, None)
        return [{"id": key_id, "revoked": True}]

    return print_rows(with_database(settings, work), arguments.json)
