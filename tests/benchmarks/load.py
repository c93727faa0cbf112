"""Clients that cost next to nothing and check every answer: `python -m tests.benchmarks.load`. It prints one JSON object.

    requests    each connection asks for a whole answer, and again when it has it
    streams     each connection reads a stream, and opens another when it is at its end

Nothing counts before all connections are at work, but `answers`. `--cpu NAME=PID,…` measures what other processes use
meanwhile; our own CPU is `cpu_us.load`. All times are microseconds.
"""

import argparse
import asyncio
import gc
import json
import os
from array import array
from collections.abc import Mapping
from time import monotonic
from typing import Any

import uvloop

from tests.benchmarks.client import Client, Figures, Plan
from tests.benchmarks.processes import cpu_us, used_us
from tests.benchmarks.wire import DIALECTS, OPENAI

_WARM_UP = 0.3  # seconds
_GRACE = 10.0  # seconds for answers that are still open


async def run(chosen: argparse.Namespace) -> dict[str, Any]:
    plan, figures, clients = _plan(chosen), Figures(), list[Client]()
    loop = asyncio.get_running_loop()

    def connect() -> Client:
        clients.append(Client(plan, figures))
        return clients[-1]

    for _ in range(chosen.connections):
        await loop.create_connection(connect, "127.0.0.1", chosen.port)
    gc.freeze()
    gc.disable()  # a pause of ours would be taken for one of the subject's
    await _start(clients, _spread(plan, chosen.spread))
    await _until_at_work(clients)
    watched = _watched(chosen.cpu)
    before, started = {name: cpu_us(pids) for name, pids in watched.items()}, monotonic()
    figures.counting = True
    await asyncio.sleep(chosen.seconds)
    figures.counting = False
    seconds, used = monotonic() - started, {name: used_us(before[name], cpu_us(watched[name])) for name in watched}
    await _stop(clients)
    return _report(figures, seconds, used)


def _plan(chosen: argparse.Namespace) -> Plan:
    """The request is in the provider's dialect, or for a gateway in OpenAI's with a model of the provider's."""
    dialect = DIALECTS[chosen.dialect]
    events = chosen.events if chosen.mode == "streams" else 0
    spoken = OPENAI if chosen.translated else dialect
    body = spoken.request(events, chosen.pace).replace(
        b'"%b-' % spoken.family.encode(), b'"%b-' % dialect.family.encode()
    )
    given = "".join(line + "\r\n" for line in chosen.header)
    head = (
        f"POST {spoken.path} HTTP/1.1\r\nHost: 127.0.0.1:{chosen.port}\r\nAccept: application/json\r\n"
        f"User-Agent: bench\r\nContent-Type: application/json\r\n{spoken.headers}"
        f"Authorization: Bearer {chosen.token}\r\n{given}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return Plan(head.encode() + body, events, chosen.pace, spoken.last_word)


def _spread(plan: Plan, spread: str) -> float:
    """Seconds over which the connections begin: streams that began at once would bring all their events at once."""
    return plan.pace * (plan.events if spread == "stream" else 1) / 1000 if plan.events else 0.0


async def _start(clients: list[Client], seconds: float) -> None:
    began = monotonic()
    for number, client in enumerate(clients):
        wait = began + seconds * number / len(clients) - monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        if not client.stopping:
            client.ask()


async def _until_at_work(clients: list[Client]) -> None:
    """A while, and until each has read something, or will not."""
    deadline = monotonic() + _GRACE
    await asyncio.sleep(_WARM_UP)
    while monotonic() < deadline and not all(client.served or client.stopping for client in clients):
        await asyncio.sleep(0.02)


async def _stop(clients: list[Client]) -> None:
    """Every answer that was begun is read to its end."""
    for client in clients:
        client.stopping = True
    deadline = monotonic() + _GRACE + max(client.plan.events * client.plan.pace / 1000 for client in clients)
    while any(client.busy for client in clients):
        if monotonic() > deadline:
            for client in clients:
                if client.busy:
                    client.fail("no end")
            return
        await asyncio.sleep(0.02)


def _watched(named: list[str]) -> Mapping[str, list[int]]:
    """The processes of each `NAME=PID,PID`, and our own."""
    found = {"load": [os.getpid()]}
    for text in named:
        name, _, pids = text.partition("=")
        found[name] = [int(pid) for pid in pids.split(",")]
    return found


def _report(figures: Figures, seconds: float, cpu: Mapping[str, float]) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "answers": figures.answers,
        "requests": figures.requests,
        "chunks": figures.chunks,
        "stalls": figures.stalls,
        "errors": figures.errors,
        "cpu_us": {name: round(used) for name, used in cpu.items()},
        "latency_us": _quantiles(figures.latency),
        "first_us": _quantiles(figures.first),
        "gap_us": _quantiles(figures.gap),
        "transit_us": _quantiles(figures.transit),
    }


def _quantiles(times: "array[int]") -> dict[str, float]:
    """Microseconds, of nanoseconds; nothing of nothing."""
    if not times:
        return {}
    found = sorted(times)
    last = len(found) - 1
    return {name: found[round(last * part)] / 1000 for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("requests", "streams"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token", default="none", help="key of the gateway's")
    parser.add_argument("--header", action="append", default=[], metavar="NAME: VALUE", help="sent with each request")
    parser.add_argument("--dialect", choices=tuple(DIALECTS), default="openai", help="of the provider")
    parser.add_argument("--translated", action="store_true", help="ask in OpenAI's dialect")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2, help="that count")
    parser.add_argument("--events", type=int, default=64, help="deltas of a stream")
    parser.add_argument("--pace", type=int, default=20, help="milliseconds between two deltas")
    parser.add_argument("--spread", choices=("pace", "stream"), default="pace", help="over which the streams begin")
    parser.add_argument("--cpu", action="append", default=[], metavar="NAME=PID,PID")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
