"""Where the gateway's CPU goes: `python -m tests.benchmarks.profile requests|streams [--dialect D]`.

Runs it under cProfile, which makes small functions look twice as dear as they are: what it shows is where to look, what
a change has brought `make bench QUICK=1` tells.
"""

import argparse
import pstats
import tempfile
from pathlib import Path

from tests.benchmarks.measure import Load, measure, steady
from tests.benchmarks.subjects import Bench, share_cores
from tests.benchmarks.wire import DIALECTS

# By the CPU's clock: by the wall's, whoever ran before an idle moment would seem to have taken it. Without the imports.
_PROFILED = """
import cProfile, sys, time
import gateway.app, gateway.serve
from gateway.__main__ import main
file, profile = sys.argv.pop(1), cProfile.Profile(time.thread_time)
try:
    profile.runcall(main)
finally:
    profile.dump_stats(file)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("requests", "streams"))
    parser.add_argument("--dialect", choices=tuple(DIALECTS), default="openai")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--streams", type=int, default=100, help="at once, a chunk every 20 ms each")
    parser.add_argument("--lines", type=int, default=45)
    parser.add_argument("--sort", default="tottime", help="tottime, cumtime, ncalls")
    chosen = parser.parse_args()
    if chosen.mode == "requests":
        load = Load(dialect=chosen.dialect, seconds=chosen.seconds)
    else:
        load = steady(chosen.streams, chosen.seconds, chosen.dialect)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = Path(folder) / "profile"
        with Bench(Path(folder), share_cores()) as bench:
            with bench.gateway(program=("-c", _PROFILED, str(found))) as gateway:
                measured = measure(bench, gateway, load)
        answers, chunks = measured.fields["answers"], measured.fields["chunks"]
        print(f"{answers} answers; {chunks} chunks in {measured.fields['seconds']:.1f} s of the whole time")
        pstats.Stats(str(found)).sort_stats(chosen.sort).print_stats(chosen.lines)


if __name__ == "__main__":
    main()
