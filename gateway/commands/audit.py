"""`gateway usage verify` and `gateway usage head`."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import orjson

from gateway.commands.database import Rows, Stores, add_json, failed, with_database
from gateway.settings import Settings

if TYPE_CHECKING:
    from gateway.stores.chain import Report


def describe_audit(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verify = actions.add_parser(
        "verify",
        help="check that no usage row was altered, removed or added",
        description="Walk the audit chain and name the first row or link that was altered, removed or added.",
    )
    verify.add_argument(
        "--anchor",
        type=_anchor,
        action="append",
        default=[],
        metavar="SEQ:HEX",
        help="a head that was noted earlier and must be in the chain (repeatable)",
    )
    add_json(verify)
    verify.set_defaults(run=_verify)
    head = actions.add_parser(
        "head",
        help="print the head of the audit chain",
        description="Print the head of the audit chain, to be kept where nobody who can write to the database can.",
    )
    head.set_defaults(run=_head)


def _anchor(text: str) -> tuple[int, bytes]:
    seq, _, head = text.partition(":")
    if not (seq.isascii() and seq.isdigit() and int(seq[:19]) and len(head) == 64):
        raise argparse.ArgumentTypeError("a head as `gateway usage head` prints it is required")
    try:
        return int(seq), bytes.fromhex(head)
    except ValueError:
        raise argparse.ArgumentTypeError("a head is written in hexadecimal digits") from None


def _verify(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.stores.chain import load_audit_key, verify

    async def work(stores: Stores) -> Rows:
        key = await load_audit_key(stores.pool, settings.gateway_audit_key)
        return [_figures(await verify(stores.pool, key, dict(arguments.anchor)))]

    [report] = with_database(settings, work)
    if arguments.json:
        print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
        return 1 if report["fault"] else 0
    if report["fault"]:
        return failed(report["says"])
    print(report["says"])
    return 0


def _figures(report: "Report") -> dict[str, Any]:
    return {
        "links": report.links,
        "rows": report.rows,
        "head": report.anchor if report.links else None,
        "covers_from": report.covers_from,
        "fault": asdict(report.fault) if report.fault else None,
        "says": _sentence(report),
    }


def _sentence(report: "Report") -> str:
    if report.fault:
        return str(report.fault)
    head = f"head {report.anchor}" if report.links else "no head yet"
    words = f"{report.links} links, {report.rows} rows, whole; {head}"
    if report.covers_from:
        words += f"\nrows that arrived before {report.covers_from.isoformat()} are not covered"
    return words


def _head(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.stores.chain import read_head

    async def work(stores: Stores) -> Rows:
        return [{"head": await read_head(stores.pool)}]

    [row] = with_database(settings, work)
    if row["head"] is None:
        return failed("the audit chain has no link yet")
    print(row["head"])
    return 0
