"""The files by which workers know each other's numbers."""

import asyncio
import json
import os
import threading
import timeit
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway import serve, tally
from gateway.metrics import Metrics
from gateway.supervisor import Handover
from gateway.tally import Snapshot, Tally

pytestmark = pytest.mark.mock

NAME = "gateway_budget_cuts_total"


def worker(folder: Path, number: int, count: int = 0) -> Metrics:
    metrics = Metrics()
    metrics.tally = Tally(folder, number)
    metrics.budget_cuts.inc(count)
    return metrics


def shown(metrics: Metrics) -> float:
    (line,) = [line for line in metrics.render().decode().splitlines() if line.startswith(f"{NAME} ")]
    return float(line.split()[1])


def test_any_worker_shows_the_sum_of_all(tmp_path: Path) -> None:
    workers = [worker(tmp_path, number, count) for number, count in ((1, 5), (2, 7), (3, 11))]
    for each in workers:
        each.publish()
    assert [shown(each) for each in workers] == [23, 23, 23]


def test_what_a_worker_shows_of_itself_is_no_older_than_now_and_in_its_file_first(tmp_path: Path) -> None:
    """Else a sum could be smaller at the next worker that is asked."""
    one, other = worker(tmp_path, 1, 5), worker(tmp_path, 2, 7)
    other.publish()
    one.budget_cuts.inc(100)
    assert shown(one) == 112
    assert shown(other) == 112


def test_counts_of_workers_that_ended_stay_and_gauges_go(tmp_path: Path) -> None:
    one, other, last = worker(tmp_path, 1, 5), worker(tmp_path, 2, 7), worker(tmp_path, 3, 11)
    for each in (one, other, last):
        each.streams_open.set(4)
        each.publish()
    tally.end(tmp_path, 1)
    tally.end(tmp_path, 2)
    assert shown(last) == 23
    assert b"\ngateway_streams_open 4\n" in last.render()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "ended"]


def test_who_ended_while_the_files_were_read_is_not_counted_twice(tmp_path: Path) -> None:
    """A reader has a worker's file, and then finds it among those that ended."""
    one, other = worker(tmp_path, 1, 5), worker(tmp_path, 2, 7)
    one.publish()
    last_words = (tmp_path / "1").read_bytes()
    tally.end(tmp_path, 1)
    (tmp_path / "1").write_bytes(last_words)
    assert shown(other) == 12


def test_a_worker_that_never_wrote_anything_ends_without_a_trace(tmp_path: Path) -> None:
    tally.end(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_histograms_of_ended_workers_are_added_and_begin_anew_when_a_version_changed_their_buckets(
    tmp_path: Path,
) -> None:
    for number, counts in ((1, [1.0, 2.0, 30.0]), (2, [1.0, 1.0, 20.0]), (3, [4.0, 40.0])):
        Tally(tmp_path, number).publish(lambda counts=counts: Snapshot({"h": {("openai",): counts}}, {}))  # type: ignore[misc]
        tally.end(tmp_path, number)
        expected = {2: [2.0, 3.0, 50.0], 3: [4.0, 40.0]}.get(number, counts)
        assert tally.read_all(tmp_path)[0].counts == {"h": {("openai",): expected}}


@pytest.mark.parametrize("content", [b"", b"\xff\xff", json.dumps({"counts": {}}).encode()])
def test_a_file_that_cannot_be_understood_is_left_out(tmp_path: Path, content: bytes) -> None:
    metrics = worker(tmp_path, 1, 5)
    (tmp_path / "2").write_bytes(content)
    (tmp_path / "ended").write_bytes(content)
    assert shown(metrics) == 5


def test_without_the_folder_a_worker_shows_what_it_has_itself(tmp_path: Path) -> None:
    assert shown(worker(tmp_path / "gone", 1, 5)) == 5


def test_a_label_without_utf_8_is_written_as_it_is_shown(tmp_path: Path) -> None:
    one, other = worker(tmp_path, 1), worker(tmp_path, 2)
    one.requests.labels("broken \ud800", "openai", "200").inc()
    one.publish()
    assert 'model="broken \N{REPLACEMENT CHARACTER}"'.encode() in other.render()


def test_that_nothing_can_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = worker(tmp_path / "gone", 1)
    for _ in range(3):
        metrics.publish()
    assert len(caplog.records) == 1


def test_one_process_alone_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = Metrics()
    assert metrics.publish() is None
    metrics.render()
    assert os.listdir(tmp_path) == []


def test_a_file_is_never_read_half_nor_followed_by_an_older_one(tmp_path: Path) -> None:
    metrics, over, seen = worker(tmp_path, 1), threading.Event(), list[float]()

    def publish() -> None:
        while not over.is_set():
            metrics.budget_cuts.inc()
            metrics.publish()

    writers = [threading.Thread(target=publish) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        while len(seen) < 200:
            found = tally.read_all(tmp_path)
            seen += [snapshot.counts[NAME][()][0] for snapshot in found.values()]
    finally:
        over.set()
        for writer in writers:
            writer.join()
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]


def test_a_file_a_second_costs_little(tmp_path: Path, figure: Callable[[str], None]) -> None:
    metrics = worker(tmp_path, 1)
    for number in range(1000):
        metrics.requests.labels(f"model-{number}", "openai", "200").inc()
    cost = min(timeit.repeat(metrics.publish, number=5, repeat=10)) / 5
    yardstick = min(timeit.repeat(lambda: json.dumps(list(range(1000))), number=5, repeat=10)) / 5
    page = min(timeit.repeat(metrics.render, number=1, repeat=5))
    figure(
        f"metrics: 1,000 series are written for the other workers in {cost * 1e3:.2f} ms, a page takes {page * 1e3:.1f}"
    )
    assert cost < 50 * yardstick


async def test_a_page_that_could_not_be_published_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[float] = []

    def odd() -> float:
        pages.append(0.0)
        if len(pages) == 1:
            raise RuntimeError("dictionary changed size during iteration")
        return 0.0

    monkeypatch.setattr(serve, "EVERY", 0.01)
    metrics = Metrics(providers=["openai"])
    metrics.provider_state.labels("openai", "open").follow(odd)
    async with serve._counted_together(metrics, Handover(1, [], -1, str(tmp_path))):
        async with asyncio.timeout(30):
            while len(pages) < 3:
                await asyncio.sleep(0.01)
    assert metrics.internal_errors.labels("task").value == 1
