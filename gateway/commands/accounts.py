"""`gateway users` and `gateway keys`."""

import argparse
import getpass
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from gateway.commands.database import Rows, Stores, add_json, print_rows, with_database
from gateway.protocol.errors import InvalidRequest
from gateway.settings import Settings
from gateway.stores.key_limits import BUDGET_NAMES, RANGES, BudgetLimits, KeyLimits, budget_limits, parse_limit, shown

if TYPE_CHECKING:
    from datetime import datetime

    from gateway.stores.accounts import Account
    from gateway.stores.key_rows import Key, KeyChanges

# Of each limit: what its option takes, what it says, and how a table shows it.
_WORDS: Mapping[str, tuple[str, str, str]] = {
    "requests_per_minute": ("N", "in a window of 60 seconds", "{}/min"),
    "requests_per_second": ("RATE", "that flow into a bucket", "{}/s"),
    "burst": ("N", "requests that the bucket holds; 0: what flows in a second", "burst {}"),
    "concurrent_requests": ("N", "in flight at once", "{} at once"),
    "tokens_per_minute": ("N", "of prompts and completions", "{} tokens/min"),
    "tokens_per_day": ("N", "of prompts and completions, a day of UTC", "{} tokens/day"),
    "cost_per_day": ("USD", "dollars, a day of UTC", "${}/day"),
    "cost_per_month": ("USD", "dollars, a month of UTC", "${}/month"),
    "drain_seconds": ("N", "that a provider is read on for a client that left; 0: it is closed at once", "drain {} s"),
    "cache_ttl": ("N", "seconds that answers are kept and shared; 0: only when a request asks for it", "cache {} s"),
}


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
    limit = actions.add_parser(
        "limit",
        help="limit an account",
        description="Limit what all keys of an account may use together, in all processes. 0: no limit.",
    )
    limit.add_argument("email")
    _add_limits(limit, BUDGET_NAMES)
    add_json(limit)
    limit.set_defaults(run=_users_limit)


def _users_list(arguments: argparse.Namespace, settings: Settings) -> int:
    async def work(stores: Stores) -> Rows:
        return [_account(account, arguments.json) for account in await stores.accounts.list()]

    return print_rows(with_database(settings, work), arguments.json)


def _users_create(arguments: argparse.Namespace, settings: Settings) -> int:
    password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")

    async def work(stores: Stores) -> Rows:
        # Who can run this command can write to the database: registration may be closed for them.
        account = await stores.accounts.register(arguments.email, password, registration="open")
        return [_account(account, arguments.json)]

    return print_rows(with_database(settings, work), arguments.json)


def _users_limit(arguments: argparse.Namespace, settings: Settings) -> int:
    async def work(stores: Stores) -> Rows:
        account = await stores.accounts.find(arguments.email)
        limits = cast("BudgetLimits", _given(arguments, BUDGET_NAMES))
        account = await stores.accounts.change(account.id, limits, stores.keys.announce_account)
        return [_account(account, arguments.json)]

    return print_rows(with_database(settings, work), arguments.json)


def _account(account: "Account", whole: bool) -> dict[str, Any]:
    limits = shown(budget_limits(account.budget))
    row = {"id": account.id, "email": account.email, "role": account.role}
    return {**row, **(limits if whole else {"limits": _summary(limits)}), "created_at": account.created_at}


def describe_keys(parser: argparse.ArgumentParser) -> None:
    parser.description = "Keys of the gateway's clients."
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="all keys, never a secret", description="List all keys, never a secret.")
    add_json(listing)
    listing.set_defaults(run=_keys_list)
    create = actions.add_parser(
        "create", help="create a key", description="Create a key; it is shown this once. A limit of 0 is none."
    )
    create.add_argument("email", help="the account that owns it")
    create.add_argument("name", help="what it is for")
    _add_key_limits(create)
    _add_expiry(create)
    add_json(create)
    create.set_defaults(run=_keys_create)
    change = actions.add_parser(
        "change", help="change a key", description="Change what is given of a key, in all processes. 0: no limit."
    )
    change.add_argument("id", help="the id, or the prefix aig_…")
    change.add_argument("--name", help="what it is for")
    _add_key_limits(change)
    _add_expiry(change)
    add_json(change)
    change.set_defaults(run=_keys_change)
    revoke = actions.add_parser("revoke", help="revoke a key", description="Revoke a key by its id, in all processes.")
    revoke.add_argument("id", help="the id, or the prefix aig_…")
    add_json(revoke)
    revoke.set_defaults(run=_keys_revoke)


def _keys_list(arguments: argparse.Namespace, settings: Settings) -> int:
    async def work(stores: Stores) -> Rows:
        return [_key(key, arguments.json) for key in await stores.keys.list(None)]

    return print_rows(with_database(settings, work), arguments.json)


def _keys_create(arguments: argparse.Namespace, settings: Settings) -> int:
    limits: KeyLimits = {
        "requests_per_minute": settings.gateway_requests_per_minute,
        "concurrent_requests": settings.gateway_concurrent_requests,
        **_given_key_limits(arguments),
    }

    async def work(stores: Stores) -> Rows:
        owner = await stores.accounts.find(arguments.email)
        made = await stores.keys.create(owner.id, arguments.name, getattr(arguments, "expires_at", None), **limits)
        return [{"api_key": made.token, "prefix": made.prefix, "id": made.id}]

    return print_rows(with_database(settings, work), arguments.json)


def _keys_change(arguments: argparse.Namespace, settings: Settings) -> int:
    changes = cast("KeyChanges", {**_given_key_limits(arguments), "name": arguments.name})
    if "expires_at" in arguments:
        changes["expires_at"] = arguments.expires_at

    async def work(stores: Stores) -> Rows:
        return [_key(await stores.keys.change(_key_id(arguments), None, changes), arguments.json)]

    return print_rows(with_database(settings, work), arguments.json)


def _keys_revoke(arguments: argparse.Namespace, settings: Settings) -> int:
    async def work(stores: Stores) -> Rows:
        key_id = _key_id(arguments)
        await stores.keys.revoke(key_id, None)
        return [{"id": key_id, "revoked": True}]

    return print_rows(with_database(settings, work), arguments.json)


def _key_id(arguments: argparse.Namespace) -> str:
    key_id: str = arguments.id.removeprefix("aig_")
    return key_id


def _key(key: "Key", whole: bool) -> dict[str, Any]:
    limits = shown(key.limits)
    row: dict[str, Any]
    if not whole:
        until = f"until {key.expires_at:%Y-%m-%d %H:%M} UTC" if key.expires_at is not None else ""
        summary = ", ".join(filter(None, [_summary(limits), until]))
        row = {"id": key.id, "name": key.name, "email": key.email, "limits": summary}
    else:
        row = {"id": key.id, "prefix": key.prefix, "name": key.name, "account_id": key.account_id, "email": key.email}
        row = {**row, **limits, "expires_at": key.expires_at}
    return {**row, "created_at": key.created_at, "revoked_at": key.revoked_at}


# --- limits -------------------------------------------------------------------------------------------------------


def _add_limits(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    for name in names:
        metavar, words, _ = _WORDS[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=partial(_limit, name), metavar=metavar, help=words)


def _add_key_limits(parser: argparse.ArgumentParser) -> None:
    _add_limits(parser, RANGES)
    parser.add_argument("--model", action="append", metavar="PATTERN", help="allow only these (repeatable); '*': all")


def _add_expiry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expires-at",
        type=_expiry,
        default=argparse.SUPPRESS,
        metavar="WHEN",
        help="when it is refused: 30d from now, 2027-01-01, 2027-01-01T12:00:00Z, or never",
    )


def _expiry(text: str) -> "datetime | None":
    from gateway.stores.key_rows import parse_expiry

    try:
        return None if text == "never" else parse_expiry(text)
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _limit(name: str, text: str) -> int | float:
    try:
        return parse_limit(name, text)
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _given_key_limits(arguments: argparse.Namespace) -> KeyLimits:
    models = {} if arguments.model is None else {"allowed_models": tuple(arguments.model)}
    return cast("KeyLimits", {**_given(arguments, RANGES), **models})


def _summary(limits: Mapping[str, Any]) -> str:
    """What is set, in one cell of a table."""
    parts = [words.format(_number(limits[name])) for name, (_, _, words) in _WORDS.items() if limits.get(name)]
    return ", ".join([*parts, *limits.get("allowed_models", ())])


def _number(value: float) -> str:
    """All its digits, and none that say nothing."""
    return str(value) if isinstance(value, int) else f"{value:.6f}".rstrip("0").rstrip(".")
