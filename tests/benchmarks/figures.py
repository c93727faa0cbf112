"""What is measured, a function for each group of figures. Each adds what one round found, and the median is the figure."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import linear_regression, median

from tests.benchmarks.measure import Load, Measured, measure, renewed, settled, steady
from tests.benchmarks.processes import cpu_us, rss_mb, used_us
from tests.benchmarks.subjects import Bench, Subject, new_key

STREAMS = 200  # at once, where the CPU of a chunk is measured: at 20 ms 10,000 chunks a second, below a core's limit
CROWDS = (1, 100, 1000)  # streams at once, where latency is measured
LADDER = (250, 500, 1000, 1500, 2000, 3000, 4000)  # streams at once, until one is late
OBSERVED_PAIRS = 8  # of what differs by a few percent from one to the next
WORKERS_ROUNDS = 3  # each with new processes, whose connections the kernel shares out anew
DIALECT_ENDINGS = {"openai": "", "anthropic": "_anthropic", "ollama": "_ollama"}


class Rounds:
    """What the rounds found, by the figure's name."""

    def __init__(self) -> None:
        self._found: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        self._found[name].append(value)
        say(f"{name:36} {value:12,.2f}")

    def medians(self) -> dict[str, float]:
        return {name: median(values) for name, values in self._found.items()}


def say(words: str) -> None:
    """Progress, apart from the table on standard output."""
    print(words, file=sys.stderr, flush=True)


# --- CPU ----------------------------------------------------------------------------------------------------------


def cpu_of_a_request(bench: Bench, rounds: Rounds, nginx: Subject, gateway: Subject, seconds: float) -> None:
    load = Load(connections=64, seconds=seconds)
    beside, ours = measure(bench, nginx, load), measure(bench, gateway, load)
    rounds.add("request_cpu_us_nginx", beside.request_cpu_us)
    rounds.add("request_cpu_us", ours.request_cpu_us)
    rounds.add("request_cpu_x_nginx", ours.request_cpu_us / beside.request_cpu_us)
    rounds.add("requests_per_s_one_core_nginx", beside.per_second)
    rounds.add("requests_per_s_one_core", ours.per_second)
    rounds.add("request_cpu_us_stores", ours.cpu_us("stores") / ours.requests)
    for tool in ("provider", "load"):  # beside nginx they are as busy as they will be
        rounds.add(f"request_cpu_us_{tool}", beside.cpu_us(tool) / beside.requests)


def cpu_of_a_chunk(bench: Bench, rounds: Rounds, nginx: Subject, gateway: Subject, seconds: float) -> None:
    """Of each dialect, beside nginx that passes the provider's own events."""
    for dialect, ending in DIALECT_ENDINGS.items():
        load = steady(STREAMS, seconds, dialect)
        beside = _compare_chunks(bench, rounds, nginx, gateway, load, ending)
        if dialect == "openai":
            for tool in ("provider", "load"):
                rounds.add(f"chunk_cpu_us_{tool}", beside.cpu_us(tool) / beside.chunks)


def cpu_under_a_budget(bench: Bench, rounds: Rounds, nginx: Subject, gateway: Subject, seconds: float) -> None:
    """The same with a key whose tokens are budgeted, and never used up."""
    budgeted = replace(gateway, token=new_key(gateway.port, tokens_per_day=10**12))
    _compare_chunks(bench, rounds, nginx, budgeted, steady(STREAMS, seconds), "_budget")


def _compare_chunks(
    bench: Bench, rounds: Rounds, nginx: Subject, gateway: Subject, load: Load, ending: str
) -> Measured:
    beside, ours = measure(bench, nginx, load), measure(bench, gateway, load)
    rounds.add(f"chunk_cpu_us_nginx{ending}", beside.chunk_cpu_us)
    rounds.add(f"chunk_cpu_us{ending}", ours.chunk_cpu_us)
    rounds.add(f"chunk_cpu_x_nginx{ending}", ours.chunk_cpu_us / beside.chunk_cpu_us)
    return beside


def observability(bench: Bench, rounds: Rounds, pairs: int = OBSERVED_PAIRS, seconds: float = 3.0) -> None:
    """Percent of the CPU of a streamed request of 64 chunks that metrics and logs take, beside a gateway without them.

    Both are asked at the same time and share a core: a few percent are less than what one and the same gateway takes
    from one second to the next on a machine that others use, too. No page of metrics is asked for meanwhile.
    """
    load = renewed(25, seconds, pace=5)
    with bench.gateway() as gateway, bench.gateway(program=("-m", "tests.benchmarks.unobserved")) as unobserved:
        with ThreadPoolExecutor(2) as at_once:
            for _ in range(pairs):
                cost, without = at_once.map(lambda subject: _stream_cpu_us(bench, subject, load), (gateway, unobserved))
                rounds.add("stream_cpu_us", cost)
                rounds.add("observability_share", 100 * (1 - without / cost))


def _stream_cpu_us(bench: Bench, subject: Subject, load: Load) -> float:
    """Microseconds of a streamed request, from its first byte to the row in the database."""
    before = cpu_us(subject.pids)
    answers = int(measure(bench, subject, load).fields["answers"])
    return used_us(before, settled(subject)) / answers


def cpu_of_a_peer(
    bench: Bench, rounds: Rounds, peer: Subject, gateway: Subject, connections: int, streams: int
) -> None:
    """How often ours goes into theirs, at a load that the peer can bear, for whole answers and for chunks."""
    whole, chunks = Load(connections=connections, seconds=3), steady(streams, 3, slack=3)
    theirs, ours = measure(bench, peer, whole), measure(bench, gateway, whole)
    rounds.add(f"request_cpu_us_{peer.name}", theirs.request_cpu_us)
    rounds.add(f"request_cpu_x_{peer.name}", theirs.request_cpu_us / ours.request_cpu_us)
    theirs, ours = measure(bench, peer, chunks), measure(bench, gateway, chunks)
    rounds.add(f"chunk_cpu_us_{peer.name}", theirs.chunk_cpu_us)
    rounds.add(f"chunk_cpu_x_{peer.name}", theirs.chunk_cpu_us / ours.chunk_cpu_us)


# --- latency ------------------------------------------------------------------------------------------------------


def latency(bench: Bench, rounds: Rounds, nginx: Subject, gateway: Subject, seconds: float) -> None:
    """What each adds to a whole answer, beside the provider without a proxy."""
    for connections, ending in ((1, ""), (64, "_64")):
        load = Load(connections=connections, seconds=seconds)
        _add_latency(rounds, load, "latency", "added", ending, *_each(bench, load, nginx, gateway))


def crowds(bench: Bench, rounds: Rounds, nginx: Subject, gateway: Subject, seconds: float) -> None:
    """What each adds to the first token and to the gap between two."""
    for streams in CROWDS:
        # One stream of 64 gives one first token in 1.3 s: alone it is short, and there are more of them.
        load = renewed(streams, seconds, events=64 if streams > 1 else 4)
        found = _each(bench, load, nginx, gateway)
        _add_latency(rounds, load, "first", "added_ttft", f"_{streams}", *found)
        _add_latency(rounds, load, "gap", "added_gap", f"_{streams}", *found)


def _each(bench: Bench, load: Load, nginx: Subject, gateway: Subject) -> tuple[Measured, Measured, Measured]:
    """Ours may be beyond its limit here, which is a figure too: infinite."""
    direct, beside = measure(bench, bench.direct, load), measure(bench, nginx, load)
    return direct, beside, measure(bench, gateway, load, strict=False)


def _add_latency(
    rounds: Rounds, load: Load, what: str, name: str, ending: str, direct: Measured, nginx: Measured, ours: Measured
) -> None:
    for part in ("p50", "p99"):
        base = direct.quantile(what, part)
        rounds.add(f"{name}_{part}_us{ending}_nginx", nginx.quantile(what, part) - base)
        rounds.add(f"{name}_{part}_us{ending}", ours.quantile(what, part) - base)


def most_streams(bench: Bench, rounds: Rounds, nginx: Subject, gateway: Subject) -> None:
    """nginx goes on where ours ended: what it cannot do either, the tools on the other core cannot."""
    ours = _climb(bench, gateway, LADDER)
    rounds.add("streams_20ms", ours)
    rounds.add("streams_20ms_nginx", _climb(bench, nginx, [streams for streams in LADDER if streams >= ours]))


def _climb(bench: Bench, subject: Subject, ladder: Sequence[int]) -> int:
    """The most streams at 20 ms of which every delta came, none after a gap of ten times the pace; 0: not the fewest."""
    most = 0
    for streams in ladder:
        tries = (measure(bench, subject, renewed(streams, 3), strict=False) for _ in range(2))
        if not any(_is_smooth(measured, streams) for measured in tries):
            break
        most = streams
    return most


def _is_smooth(measured: Measured, streams: int) -> bool:
    """All connections were served, all the time."""
    expected = 0.9 * streams * 50 * float(measured.fields["seconds"])
    return not measured.fields["errors"] and not measured.fields["stalls"] and measured.chunks > expected


# --- memory -------------------------------------------------------------------------------------------------------


def memory(bench: Bench, rounds: Rounds) -> None:
    """Of a new gateway: after its first answers, with a thousand streams open, and when they are gone; 2^20 bytes."""
    with bench.gateway() as gateway:
        measure(bench, gateway, Load(connections=1, seconds=0.1))
        idle = rss_mb(gateway.pids)
        crowd = measure(bench, gateway, renewed(1000, 2), strict=False).rss_mb
        settled(gateway)
        rounds.add("rss_idle_mb", idle)
        rounds.add("rss_per_1000_streams_mb", crowd - idle)
        rounds.add("rss_after_mb", rss_mb(gateway.pids))


def slope(bench: Bench, rounds: Rounds, gateway: Subject, seconds: float) -> None:
    """By how much resident memory grows while short streams come and go; 2^10 bytes a minute."""
    load = renewed(50, seconds, events=16)
    measure(bench, gateway, replace(load, seconds=min(60.0, seconds)))  # until every pool has its size
    found = measure(bench, gateway, load).memory
    fitted = linear_regression([at / 60 for at, _ in found], [size * 1024 for _, size in found])
    rounds.add("rss_slope_kb_per_min", fitted.slope)


# --- processes ----------------------------------------------------------------------------------------------------


def workers(bench: Bench, rounds: Rounds) -> None:
    """Requests a second of two workers on two cores, to those of one on one, with all the tools on the same cores.

    So twice the work, with load, provider and stores, is done on twice the cores, and all of them are busy: what two
    workers lose to each other is missing from 2. If the tools had cores of their own, the slowest of them would be
    measured; and each worker has 64 connections, because what a turn of its loop shares is shared by its own alone.
    Where neighbours take a part of the cores, the CPU of a request says more than how many there were.
    """
    if len(bench.cores.all) < 2:
        say("two workers: there is one core")
        return
    for _ in range(WORKERS_ROUNDS):
        one, two = (_busy(bench, processes) for processes in (1, 2))
        rounds.add("workers_2_x", two.per_second / one.per_second)
        rounds.add("workers_2_cpu_x", _all_cpu_us(two) / _all_cpu_us(one))


def _busy(bench: Bench, processes: int) -> Measured:
    with bench.gateway(workers=processes) as gateway, bench.confined(processes):
        measure(bench, gateway, Load(seconds=0.5))  # each worker has seen the key, and has its connections
        return measure(bench, gateway, Load(connections=64 * processes, seconds=3))


def _all_cpu_us(measured: Measured) -> float:
    """Of a request, in the gateway and in all that serves it: what a neighbour on the machine does not change much."""
    return sum(measured.cpu_us(of) for of in ("subject", "provider", "stores", "load")) / measured.requests
