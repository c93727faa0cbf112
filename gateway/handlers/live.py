"""What happens now, told once a second to the admins who watch: `GET /api/live`, server-sent events.

Rule 1: while nobody watches nothing is made. One task makes each event, once for all who watch.
Rule 2: nothing is kept for a watcher: who reads slowly misses events, who does not read is dropped.
Rule 3: a watcher holds up nobody's end: all are let go when the gateway begins to.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic, time
from typing import Any

import orjson
from aiohttp import hdrs, web

from gateway.appkeys import METRICS, PULSE
from gateway.identity import identify
from gateway.labels import NONE
from gateway.metrics import Metrics
from gateway.protocol.errors import GatewayError, PermissionDenied, ShuttingDown, Unavailable
from gateway.pulse import Pulse
from gateway.tally import Snapshot

log = logging.getLogger("gateway.live")

TICK = 1.0  # seconds between two events
LOOK = 0.1  # seconds between two looks at whether the gateway goes
MAX_WATCHERS = 32  # at one process
PATIENCE = 5.0  # seconds that a watcher may not read
IDENTIFY = 5.0  # seconds between two looks at whether a watcher is an admin still
MAX_MODELS = 20  # of one event
STALE = 3  # ticks after which a worker that wrote nothing new is taken to do nothing

_HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-store",
    "X-Accel-Buffering": "no",  # https://nginx.org/en/docs/http/ngx_http_proxy_module.html#proxy_buffering
}
_RETRY = b"retry: 1000\n\n"  # milliseconds until a browser comes again: it asks another worker, or the next gateway


def routes() -> list[web.RouteDef]:
    return [web.get("/api/live", partial(watch, Live()))]


async def watch(live: "Live", request: web.Request) -> web.StreamResponse:
    """An event `figures` a second, of all workers together, until the watcher goes or is no admin any more."""
    await _identify_admin(request)
    app = request.app
    if app[PULSE].draining:
        raise ShuttingDown("the gateway is shutting down; please try again", retry_after=1)
    if live.watchers >= MAX_WATCHERS:
        raise Unavailable("too many watch already", code="live_busy", retry_after=10)
    with live.watched(app[METRICS], app[PULSE]):
        response = web.StreamResponse(headers=_HEADERS)
        await response.prepare(request)
        if request.method != hdrs.METH_HEAD:
            await _tell(live, request, response)
    return response


async def _tell(live: "Live", request: web.Request, response: web.StreamResponse) -> None:
    identified = monotonic()
    await _write(request, response, _RETRY)
    while event := await live.next():
        if monotonic() - identified >= IDENTIFY:
            if not await _is_still_admin(request):
                return
            identified = monotonic()
        await _write(request, response, event)
    response.force_close()  # who comes again is another's


async def _identify_admin(request: web.Request) -> None:
    """Raises as `identify` does, and PermissionDenied."""
    principal, _ = await identify(request)
    if principal.role != "admin":
        raise PermissionDenied("only an admin watches: these are everybody's figures")


async def _is_still_admin(request: web.Request) -> bool:
    try:
        await _identify_admin(request)
    except Unavailable:
        return True  # who watches an outage would like to see its end
    except GatewayError:
        return False
    return True


async def _write(request: web.Request, response: web.StreamResponse, event: bytes) -> None:
    """Raises ConnectionError when nobody reads."""
    try:
        async with asyncio.timeout(PATIENCE):
            await response.write(event)
    except TimeoutError:
        request.app[METRICS].slow_clients.labels("read").inc()
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("a watcher that does not read") from None


# --- the task -----------------------------------------------------------------------------------------------------


class Live:
    """Who watches one application. Its task lives from the first of them to the last."""

    def __init__(self) -> None:
        self.watchers = 0
        self._task: asyncio.Task[None] | None = None
        self._next: asyncio.Future[bytes]  # there while the task is

    @contextmanager
    def watched(self, metrics: Metrics, pulse: Pulse) -> Iterator[None]:
        """For as long as somebody watches, who calls `next` within. The drain does not wait for such a request."""
        if self._task is None:
            self._next = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._run(metrics, pulse))
        self.watchers += 1
        pulse.leave()
        try:
            yield
        finally:
            pulse.enter()
            self.watchers -= 1
            if not self.watchers:
                self._task.cancel()
                self._task = None

    async def next(self) -> bytes:
        """The next event; empty when there is none, because the gateway goes."""
        return await asyncio.shield(self._next)  # it is everybody's: a watcher that goes must not cancel it

    async def _run(self, metrics: Metrics, pulse: Pulse) -> None:
        figures = Figures()
        due = monotonic()
        while await _until(due, pulse):
            try:
                # With thousands of series it takes milliseconds, which streams would feel.
                made = await asyncio.to_thread(figures.event, metrics)
            except Exception:  # one event less; without this task nobody would ever see another
                metrics.internal_errors.labels("task").inc()
                log.exception("live figures cannot be made")
            else:
                if made is not None:
                    told, self._next = self._next, asyncio.get_running_loop().create_future()
                    told.set_result(made)
            due = max(due + TICK, monotonic())
        self._next.set_result(b"")


async def _until(due: float, pulse: Pulse) -> bool:
    """Whether the gateway stays at least until then; it is looked at often, so that its end is not held up."""
    while not (pulse.draining or pulse.retiring):
        left = due - monotonic()
        if left <= 0:
            return True
        await asyncio.sleep(min(left, LOOK))
    return False


# --- the figures --------------------------------------------------------------------------------------------------

# By model, provider, and what is counted: requests, errors, prompt, completion, cost_micros.
Key = tuple[str, str, str]
Counts = dict[Key, float]


def _rounded(number: float) -> float:
    return round(number, 3)


_GAUGES: Mapping[str, tuple[str, Callable[[float], float]]] = {
    "streams_open": ("gateway_streams_open", int),
    "usage_queue": ("gateway_usage_queue", int),
    "usage_lag_seconds": ("gateway_usage_lag_seconds", _rounded),
    "journal_bytes": ("gateway_journal_bytes", int),
    "event_loop_lag_seconds": ("gateway_event_loop_lag_seconds", _rounded),
    "resident_bytes": ("process_resident_memory_bytes", int),
}


class Figures:
    """What the workers have counted, and how fast, from one look at them to the next."""

    def __init__(self) -> None:
        self._seen: dict[int, Seen] = {}  # by worker

    def event(self, metrics: Metrics) -> bytes | None:
        """None at the first look: speed is the difference of two."""
        found, first = metrics.workers(), not self._seen
        rates, totals = self.look(found)
        if first:
            return None
        # Two workers' gauges make one as their metric says.
        gauges = metrics.together({worker: Snapshot({}, one.gauges) for worker, one in found.items()}).snapshot().gauges
        told = {"at": round(time(), 3), **_speeds(rates), **_totals(totals), "models": _models(rates, totals)}
        told.update({name: kind(_number(gauges, metric)) for name, (metric, kind) in _GAUGES.items()})
        return b"event: figures\ndata: " + orjson.dumps(told) + b"\n\n"

    def look(self, found: Mapping[int, Snapshot]) -> tuple[Counts, Counts]:
        """What all count a second, and what they have counted since they started."""
        rates, totals = Counts(), Counts()
        seen: dict[int, Seen] = {}
        for worker, snapshot in found.items():
            counts = counts_of(snapshot)
            _add(totals, counts)
            if _UPTIME in snapshot.gauges:  # those that ended have none: what they did is no speed any more
                seen[worker] = follow(self._seen.get(worker), _number(snapshot.gauges, _UPTIME), counts)
                _add(rates, seen[worker].rates)
        self._seen = seen
        return rates, totals


@dataclass(frozen=True, slots=True)
class Seen:
    """One worker's numbers when they last changed."""

    uptime: float  # the worker's own, seconds
    counts: Counts
    rates: Counts  # a second, against the numbers before
    age: int = 0  # looks since then


_UPTIME = "gateway_uptime_seconds"


def follow(before: Seen | None, uptime: float, counts: Counts) -> Seen:
    """By the worker's own clock: others write their numbers once a second, as we read them, so that one look may meet
    a file that the last one met, and the next two seconds' worth. What is smaller than before, began anew: 0."""
    if before is None:
        return Seen(uptime, counts, {})
    seconds = uptime - before.uptime
    if seconds <= 0:
        age = before.age + 1
        return replace(before, age=age, rates=before.rates if age < STALE else {})
    more = {key: count - before.counts.get(key, 0) for key, count in counts.items()}
    return Seen(uptime, counts, {key: count / seconds for key, count in more.items() if count > 0})


def counts_of(snapshot: Snapshot) -> Counts:
    counts: Counts = defaultdict(float)
    for (model, provider, status), count in _series(snapshot, "gateway_requests_total", 3):
        counts[model, provider, "requests"] += count
        if status.isdigit() and int(status) >= 400:
            counts[model, provider, "errors"] += count
    for (model, provider, kind), count in _series(snapshot, "gateway_tokens_total", 3):
        if kind in ("prompt", "completion"):
            counts[model, provider, kind] += count
    for (model, provider), count in _series(snapshot, "gateway_cost_micros_total", 2):
        counts[model, provider, "cost_micros"] += count
    return dict(counts)


def _add(sums: Counts, more: Counts) -> None:
    for key, count in more.items():
        sums[key] = sums.get(key, 0) + count


def _series(snapshot: Snapshot, name: str, labels: int) -> Iterator[tuple[tuple[str, ...], float]]:
    for values, numbers in snapshot.counts.get(name, {}).items():
        if len(values) == labels:  # else of a version with other labels
            yield values, sum(numbers)


# --- an event -----------------------------------------------------------------------------------------------------


def _speeds(rates: Counts) -> dict[str, Any]:
    return {
        "requests_per_second": _rounded(_sum(rates, "requests")),
        "errors_per_second": _rounded(_sum(rates, "errors")),
        "tokens_per_second": {kind: _rounded(_sum(rates, kind)) for kind in ("prompt", "completion")},
    }


def _totals(totals: Counts) -> dict[str, Any]:
    names = {
        "requests": "requests",
        "prompt_tokens": "prompt",
        "completion_tokens": "completion",
        "cost_micros": "cost_micros",
    }
    return {"totals": {name: int(_sum(totals, what)) for name, what in names.items()}}


def _models(rates: Counts, totals: Counts) -> list[dict[str, Any]]:
    """All that were asked since the start, so that one that pauses does not leave a table; busiest first."""
    pairs = {(model, provider) for model, provider, _ in totals if provider != NONE}

    def order(pair: tuple[str, str]) -> tuple[float | str, ...]:
        now, ever = (
            [-counts.get((*pair, what), 0) for what in ("completion", "requests")] for counts in (rates, totals)
        )
        return (*now, *ever, *pair)

    return [
        {
            "model": model,
            "provider": provider,
            "completion_tokens_per_second": _rounded(rates.get((model, provider, "completion"), 0)),
            "requests_per_second": _rounded(rates.get((model, provider, "requests"), 0)),
        }
        for model, provider in sorted(pairs, key=order)[:MAX_MODELS]
    ]


def _sum(counts: Counts, what: str) -> float:
    return sum(count for (_, _, counted), count in counts.items() if counted == what)


def _number(gauges: Mapping[str, Mapping[tuple[str, ...], list[float]]], name: str) -> float:
    return sum(number for numbers in gauges.get(name, {}).values() for number in numbers)
