"""What the gateway costs, beside nginx: `make bench`, or `make bench QUICK=1` for the CPU ratios alone.

    python -m tests.benchmarks.bench [--quick] [--peers] [--soak MINUTES]

The gateway runs with everything on: a real Postgres and Valkey, a key with limits, journal, metrics, logs. Each subject
has a core for itself; provider, load generator and stores share the others. All subjects run at once and take turns, so
that what else the machine does meets them alike; each figure is the median of the rounds, and each ratio is made within
its round. The table goes to standard output, figures and plots to tests/benchmarks/results/.
"""

import argparse
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.benchmarks import figures
from tests.benchmarks.figures import Rounds, say
from tests.benchmarks.measure import Load, MeasurementError, measure
from tests.benchmarks.peers import PEERS, PeerMissing
from tests.benchmarks.plots import save_plots
from tests.benchmarks.report import RESULTS, footer, save, table
from tests.benchmarks.subjects import Bench, Subject, share_cores

ROUNDS = 3
SHORT_SOAK = 20.0  # seconds


def quick(bench: Bench, rounds: Rounds) -> None:
    """The CPU ratios alone."""
    with bench.nginx() as nginx, bench.gateway() as gateway:
        _warm_up(bench, nginx, gateway)
        for _ in range(ROUNDS):
            figures.cpu_of_a_request(bench, rounds, nginx, gateway, 0.8)
            figures.cpu_of_a_chunk(bench, rounds, nginx, gateway, 0.8)


def full(bench: Bench, rounds: Rounds, *, peers: bool, soak: float) -> None:
    """`soak`: seconds."""
    with bench.nginx() as nginx, bench.gateway() as gateway:
        _warm_up(bench, nginx, gateway)
        for _ in range(ROUNDS):
            for measured, seconds in _IN_ROUNDS:
                with _left_out(measured.__name__):
                    measured(bench, rounds, nginx, gateway, seconds)
            with _left_out("start"):
                rounds.add("start_s", bench.start_seconds(gateway.token))
        with _left_out("streams_20ms"):
            figures.most_streams(bench, rounds, nginx, gateway)
        for name, peer in PEERS.items() if peers else ():
            with _left_out(name), peer.start(bench) as subject:
                _warm_up(bench, subject)
                figures.cpu_of_a_peer(bench, rounds, subject, gateway, peer.connections, peer.streams)
        with _left_out("soak"):
            figures.slope(bench, rounds, gateway, soak)
    with _left_out("observability"):
        figures.observability(bench, rounds)
    with _left_out("memory"):
        figures.memory(bench, rounds)
    with _left_out("workers"):
        figures.workers(bench, rounds)


_IN_ROUNDS = (  # and for how many seconds of each load
    (figures.cpu_of_a_request, 2.0),
    (figures.cpu_of_a_chunk, 1.5),
    (figures.cpu_under_a_budget, 1.5),
    (figures.latency, 1.5),
    (figures.crowds, 2.0),
)


@contextmanager
def _left_out(name: str) -> Iterator[None]:
    """Minutes of measurements are not lost for one that fails: it is named."""
    try:
        yield
    except (PeerMissing, MeasurementError, RuntimeError) as error:
        print(f"{name} is left out: {error}\n", flush=True)


def _warm_up(bench: Bench, *subjects: Subject) -> None:
    """First calls open connections, verify the key and fill caches."""
    for subject in subjects:
        measure(bench, subject, Load(seconds=0.1))


def about(chosen: argparse.Namespace) -> Mapping[str, Any]:
    """When, what, and on which machine."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    nginx = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=False, env=_with_sbin())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "kind": "quick" if chosen.quick else "full",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),  # what else the machine does is in every latency
        "kernel": platform.release(),
        "python": platform.python_version(),
        "aiohttp": version("aiohttp"),
        "uvloop": version("uvloop"),
        "nginx": nginx.stderr.strip().rpartition("/")[2],
    }


def _with_sbin() -> dict[str, str]:
    return {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin"}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the CPU ratios alone")
    parser.add_argument("--peers", action="store_true", help="others too, which are installed into .bench/")
    parser.add_argument("--soak", type=float, default=SHORT_SOAK / 60, help="minutes that memory is watched for")
    chosen = parser.parse_args()
    machine, rounds = about(chosen), Rounds()
    with ExitStack() as opened:
        root = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        bench = opened.enter_context(Bench(root, share_cores()))
        if chosen.quick:
            quick(bench, rounds)
        else:
            full(bench, rounds, peers=chosen.peers, soak=chosen.soak * 60)
    found = rounds.medians()
    print(f"{table(found)}\n\n{footer(found, machine)}")
    save(found, machine)
    save_plots(found, RESULTS)
    say(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
