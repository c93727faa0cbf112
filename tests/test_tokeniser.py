import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import pytest
from rs_bpe.bpe import openai

from gateway import tokeniser as tokeniser_module
from gateway.protocol.vocabulary import Vocabulary
from gateway.tokeniser import MAX_QUEUED, Tokeniser
from gateway.vitals import resident_bytes

pytestmark = pytest.mark.integration

LONG = 30.0  # seconds: enough on any machine, so that what is not in time is broken
O200K: Vocabulary = "o200k_base"
ENGLISH = "The quick brown fox jumps over the lazy dog, and 日本 does not mind. "


@pytest.fixture
async def tokeniser() -> AsyncIterator[Tokeniser]:
    async with opened() as tokeniser:
        yield tokeniser


@asynccontextmanager
async def opened(*, idle: float = LONG, program: Path | None = None) -> AsyncIterator[Tokeniser]:
    made = Tokeniser(idle=idle) if program is None else Tokeniser(idle=idle, program=str(program))
    try:
        yield made
    finally:
        await made.close()
    assert not children()


def children() -> list[int]:
    """Processes of this one that count tokens."""
    return [int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat") if _is_child(stat)]


def _is_child(stat: Path) -> bool:
    try:
        state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        return int(parent) == os.getpid() and state != "Z" and b"child" in (stat.parent / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until(true: Callable[[], object], seconds: float = LONG) -> None:
    deadline = monotonic() + seconds
    while not true():
        assert monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.01)


# --- what it counts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", ["o200k_base", "cl100k_base"])
async def test_it_counts_as_the_vocabulary_does(tokeniser: Tokeniser, vocabulary: Vocabulary) -> None:
    exact = getattr(openai, vocabulary)()
    chance = random.Random(7)
    alphabets = [
        "abc de",
        " \n\t",
        "0123456789",
        "{}[]\":,'",
        "äöüß",
        "жизнь ",
        "日本語",
        "🦙👍🏽👨‍👩‍👧",
        "\0\x7f\u2028",
        ENGLISH,
    ]
    texts = ["".join(chance.choices(chance.choice(alphabets), k=chance.randrange(400))) for _ in range(500)]
    texts += ["", "<|endoftext|>", "\0", ENGLISH * 3000]
    assert await tokeniser.count(texts, vocabulary, LONG) == [exact.count(text) for text in texts]


async def test_halves_of_a_pair_are_joined_and_others_replaced(tokeniser: Tokeniser) -> None:
    exact = openai.o200k_base()
    halves = ["\ud83d\ude00", "a\ud83db", "\ude00\ud83d", "x" * 65535 + "\ud83d\ude00"]
    whole = ["😀", "a\N{REPLACEMENT CHARACTER}b", "\N{REPLACEMENT CHARACTER}" * 2, "x" * 65535 + "😀"]
    assert await tokeniser.count(halves, O200K, LONG) == [exact.count(text) for text in whole]


async def test_many_who_ask_at_once_get_their_own_answers(tokeniser: Tokeniser) -> None:
    exact, one = openai.o200k_base(), openai.cl100k_base()
    texts = [ENGLISH * (number * 37 % 100) for number in range(100)]
    vocabularies: list[Vocabulary] = ["o200k_base", "cl100k_base"]
    asked = [tokeniser.count([text], vocabularies[number % 2], LONG) for number, text in enumerate(texts)]
    assert await asyncio.gather(*asked) == [[(one if n % 2 else exact).count(text)] for n, text in enumerate(texts)]


async def test_nothing_to_count_is_no_work(tokeniser: Tokeniser) -> None:
    assert await tokeniser.count([], O200K, LONG) == []


# --- what it costs ------------------------------------------------------------------------------------------------


async def test_the_event_loop_goes_on_while_two_megabytes_are_counted(
    tokeniser: Tokeniser, figure: Callable[[str], None]
) -> None:
    exact = openai.o200k_base()
    text = ENGLISH * (2_000_000 // len(ENGLISH))
    assert await tokeniser.count(["warm"], O200K, LONG) == [1]
    begun = perf_counter()
    expected = exact.count(text)
    here = perf_counter() - begun
    stalls, idle = [], []
    for _ in range(5):
        counting = asyncio.create_task(tokeniser.count([text], O200K, LONG))
        stalls.append(await longest_stall(counting))
        assert counting.result() == [expected]
        idle.append(await longest_stall(asyncio.create_task(asyncio.sleep(here))))
    figure(
        f"tokeniser, 2 MB: longest stall of the loop {min(stalls) * 1e3:.1f} ms, "
        f"without work {min(idle) * 1e3:.1f} ms; counted in the loop it is {here * 1e3:.0f} ms"
    )
    assert min(stalls) < 0.020


async def longest_stall(work: "asyncio.Task[Any]") -> float:
    """Until it is done: how long the loop did not come back, at most, in seconds."""
    longest = 0.0
    while not work.done():
        begun = perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, perf_counter() - begun - 0.001)
    return longest


async def test_a_hundred_and_twenty_abandoned_streams_leave_our_memory_as_it_was(
    tokeniser: Tokeniser, figure: Callable[[str], None]
) -> None:
    texts = [ENGLISH * 60 + str(number) for number in range(120)]  # 4 KB each
    before = resident_bytes()
    counts = await asyncio.gather(*[tokeniser.count([text], O200K, LONG) for text in texts])
    grown = (resident_bytes() - before) / 2**20
    figure(f"tokeniser, 120 texts of 4 KB: the gateway grew by {grown:.1f} MiB")
    assert None not in counts
    assert grown < 20


async def test_no_secret_and_no_text_is_in_its_environment_or_its_arguments(
    tokeniser: Tokeniser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    assert await tokeniser.count(["canary prompt"], O200K, LONG) is not None
    (child,) = children()
    for name in ("environ", "cmdline"):
        assert b"canary" not in Path(f"/proc/{child}/{name}").read_bytes()


# --- how long it lives --------------------------------------------------------------------------------------------


async def test_it_ends_when_nobody_needs_it_and_comes_back_when_somebody_does() -> None:
    async with opened(idle=0.2) as tokeniser:
        assert not children()
        for _ in range(2):
            assert await tokeniser.count(["hello"], O200K, LONG) == [1]
            assert len(children()) == 1
            await until(lambda: not children())


async def test_a_limit_that_is_too_short_gives_no_count_but_starts_it(tokeniser: Tokeniser) -> None:
    assert await tokeniser.count(["hello"], O200K, 0) is None
    await until(children)
    assert await tokeniser.count(["hello"], O200K, LONG) == [1]


async def test_it_dies_with_a_gateway_that_is_killed() -> None:
    program = (
        "import asyncio, os\n"
        "from gateway.tokeniser import Tokeniser\n"
        "async def main():\n"
        "    tokeniser = Tokeniser()\n"
        f"    await tokeniser.count(['hello'], 'o200k_base', {LONG})\n"
        "    print(*[p for p in os.listdir('/proc') if p.isdigit() and _parent(p) == os.getpid()], flush=True)\n"
        "    await asyncio.sleep(100)\n"
        "def _parent(pid):\n"
        "    try:\n"
        "        return int(open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1])\n"
        "    except OSError:\n"
        "        return 0\n"
        "asyncio.run(main())\n"
    )
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert gateway.stdout is not None
    child = int(await asyncio.wait_for(gateway.stdout.readline(), LONG))
    assert Path(f"/proc/{child}").exists()
    gateway.kill()
    await gateway.wait()
    await until(lambda: not _runs(child))


def _runs(process: int) -> bool:
    """Not when it is dead and only waits for whoever inherited it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_whoever_waits_when_it_is_closed_gets_no_count() -> None:
    tokeniser = Tokeniser()
    asked = [asyncio.create_task(tokeniser.count([ENGLISH * 1000], O200K, LONG)) for _ in range(20)]
    await until(children)
    await tokeniser.close()
    await until(lambda: not children())  # one that was just being started ends with its standard input
    assert None in await asyncio.gather(*asked)
    assert await tokeniser.count(["hello"], O200K, LONG) is None
    assert not children()


# --- when it cannot count -----------------------------------------------------------------------------------------


async def test_without_rs_bpe_nothing_is_counted_and_nothing_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokeniser_module, "find_spec", lambda name: None)
    async with opened() as tokeniser:
        assert await tokeniser.count(["hello"], O200K, LONG) is None
        assert not children()


async def test_too_much_text_is_not_counted(tokeniser: Tokeniser) -> None:
    assert await tokeniser.count(["a" * MAX_QUEUED], O200K, LONG) is None
    assert await tokeniser.count([""] * MAX_QUEUED, O200K, LONG) is None
    assert not children()


async def test_text_that_waits_is_bounded_and_what_was_answered_waits_no_more(tokeniser: Tokeniser) -> None:
    half = "a" * (MAX_QUEUED // 2)
    for _ in range(2):
        first = asyncio.create_task(tokeniser.count([half], O200K, LONG))
        await asyncio.sleep(0)
        assert await tokeniser.count([half], O200K, LONG) is None
        assert await tokeniser.count(["hello"], O200K, LONG) == [1]
        assert await first is not None


async def test_a_process_that_is_killed_is_replaced_and_nobody_notices(tokeniser: Tokeniser) -> None:
    exact = openai.o200k_base()
    assert await tokeniser.count(["hello"], O200K, LONG) == [1]
    texts = [ENGLISH * 2000 + str(number) for number in range(10)]
    asked = [asyncio.create_task(tokeniser.count([text], O200K, LONG)) for text in texts]
    await asyncio.sleep(0)
    for child in children():
        os.kill(child, signal.SIGKILL)
    assert await asyncio.gather(*asked) == [[exact.count(text)] for text in texts]


POISONED = """
import os, sys
from gateway import tokeniser_child
with open({log!r}, "a") as log:
    log.write("x")
readable = tokeniser_child._readable
def poisoned(text):
    {deed}
    return readable(text)
tokeniser_child._readable = poisoned
tokeniser_child.serve(sys.stdin.buffer, sys.stdout.buffer)
"""


def a_child(tmp_path: Path, deed: str) -> tuple[Path, Callable[[], int]]:
    """A process that does something before it counts, and how often it was started."""
    log, program = tmp_path / "log", tmp_path / "child.py"
    program.write_text(POISONED.format(log=str(log), deed=deed))
    return program, lambda: len(log.read_text())


async def test_a_text_that_kills_it_twice_is_given_up_and_the_others_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program, starts = a_child(tmp_path, "if b'poison' in text: os._exit(11)")
    async with opened(program=program) as tokeniser:
        texts = ["one", "poison", "three"]
        asked = [tokeniser.count([text], O200K, LONG) for text in texts]
        assert await asyncio.gather(*asked) == [[1], None, [1]]
        assert starts() == 3
    assert "died" in caplog.text
    assert "poison" not in caplog.text


async def test_a_process_that_hangs_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokeniser_module, "STUCK", 0.5)
    program, starts = a_child(tmp_path, "if b'poison' in text: import time; time.sleep(100)")
    async with opened(program=program) as tokeniser:
        assert await tokeniser.count(["one"], O200K, LONG) == [1]
        assert await tokeniser.count(["poison"], O200K, LONG) is None
        assert await tokeniser.count(["three"], O200K, LONG) == [1]
        assert starts() == 3


async def test_a_process_that_cannot_start_is_left_alone_for_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, program = tmp_path / "log", tmp_path / "child.py"
    program.write_text(f"open({str(log)!r}, 'a').write('x')\nimport rs_bpe_that_is_not_there")
    async with opened(program=program) as tokeniser:
        asked = [tokeniser.count(["hello"], O200K, LONG) for _ in range(3)]
        assert await asyncio.gather(*asked) == [None] * 3
        assert await tokeniser.count(["hello"], O200K, LONG) is None
        assert log.read_text() == "x"
    assert "cannot be started" in caplog.text
