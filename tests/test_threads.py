"""Threads: the same bits from run to run, from several Python threads, and in forked processes."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, CellCase, run
from support.compare import assert_same, assert_within
from support.pairwise import pairwise
from torch import Tensor, nn

import fused_rnn

# Long enough to be split over threads in every way: by rows, by units and by directions.
SPLIT_CASES = [
    *(Case(cell=cell, input_size=20, hidden_size=48, batch=16, steps=12, bidirectional=True) for cell in CELLS),
    *(Case(cell=cell, input_size=64, hidden_size=128, batch=1, steps=20) for cell in CELLS),
    Case(input_size=33, hidden_size=65, batch=7, steps=9, num_layers=2, packing="unsorted", dtype=torch.bfloat16),
    Case(input_size=33, hidden_size=65, batch=7, steps=9, num_layers=2, proj=True, dtype=torch.float64),
]
SECONDS = 60  # a process that takes longer hangs; the work itself takes well under one


@pytest.mark.asan
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_same_thread_count_gives_the_same_bits_from_run_to_run(case: Case, count: int, threads: None) -> None:
    torch.set_num_threads(count)
    module = case.build(fused_rnn)
    expected = run(module, case.data())
    for _ in range(3):
        assert_same(run(module, case.data()), expected)


@pytest.mark.asan
@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_any_thread_count_gives_results_within_rounding(case: Case, threads: None) -> None:
    # sums over rows and steps are taken in another order with another count: not promised to be bit-identical
    torch.set_num_threads(1)
    module = case.build(fused_rnn)
    expected = {name: tensor.double() for name, tensor in run(module, case.data()).items()}
    for count in (2, 5, 8):
        torch.set_num_threads(count)
        assert_within(run(module, case.data()), expected)


def _operating_system_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _threads_started_by(count: int) -> int:
    """Run in a fresh process: threads that appear when a large call runs with `count` threads."""
    torch.set_num_threads(count)
    case = Case(input_size=64, hidden_size=128, batch=32, steps=10)
    module, data = case.build(fused_rnn), case.data()
    before = _operating_system_threads()
    with torch.no_grad():
        module(data.input)
    return _operating_system_threads() - before


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux' list of threads")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_set_num_threads_bounds_the_threads_that_work(count: int) -> None:
    with _spawned() as pool:
        assert pool.submit(_threads_started_by, count).result(SECONDS) <= count - 1


def _spawned() -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


# ---- several Python threads ---------------------------------------------------------------------------------------


def _run_together(jobs: list[Callable[[], dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """All jobs at the same time, each in a thread of its own, several rounds."""
    gate = threading.Barrier(len(jobs))

    def wait_and_run(job: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        gate.wait(SECONDS)
        results = [job() for _ in range(5)]
        for result in results[1:]:
            assert_same(result, results[0])
        return results[0]

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(SECONDS) for future in [pool.submit(wait_and_run, job) for job in jobs]]


@pytest.mark.asan
@pytest.mark.parametrize("count", [1, 2])
def test_several_python_threads_get_the_results_of_a_serial_run(count: int, threads: None) -> None:
    torch.set_num_threads(count)
    cases = [*SPLIT_CASES, CellCase(hidden_size=33), CellCase("GRU", hidden_size=65)]
    modules = [case.build(fused_rnn) for case in cases]
    expected = [run(module, case.data()) for module, case in zip(modules, cases, strict=True)]

    def job(module: nn.Module, case: Any) -> Callable[[], dict[str, Tensor]]:
        return lambda: run(module, case.data())

    found = _run_together([job(module, case) for module, case in zip(modules, cases, strict=True)])
    for result, serial in zip(found, expected, strict=True):
        # another thread's team may be smaller than the main one's: sums in another order
        assert_within(result, {name: tensor.double() for name, tensor in serial.items()})


@pytest.mark.asan
def test_one_module_called_from_several_threads_gives_the_same_bits(threads: None) -> None:
    torch.set_num_threads(2)
    case = Case("GRU", input_size=20, hidden_size=48, batch=8, num_layers=2)
    module = case.build(fused_rnn).requires_grad_(False)
    sequences = [case.data(seed=seed).sequence.detach() for seed in range(4)]

    def job(sequence: Tensor) -> Callable[[], dict[str, Tensor]]:
        return lambda: {"output": module(sequence)[0]}

    expected = [{"output": module(sequence)[0]} for sequence in sequences]
    for result, serial in zip(_run_together([job(sequence) for sequence in sequences]), expected, strict=True):
        assert_within(result, {name: tensor.double() for name, tensor in serial.items()})


def test_backward_may_run_in_another_thread_than_forward() -> None:
    case = Case(num_layers=2, bidirectional=True, hx=True)
    module, data = case.build(fused_rnn), case.data()
    expected = run(module, data)
    loss = module(data.input, data.hx)[0].sum()
    reference = torch.autograd.grad(module(data.input, data.hx)[0].sum(), data.sequence)[0]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: torch.autograd.grad(loss, data.sequence)[0]).result(SECONDS)
    assert_within({"input": found}, {"input": reference.double()})
    assert_same(run(module, data), expected)


# ---- a busy machine -----------------------------------------------------------------------------------------------


@pytest.fixture
def judged() -> Iterator[Callable[[int, float, float], bool]]:
    """Says how long a team took and its first thread worked; returns whether the next call does without a team."""
    from fused_rnn import _C

    def judge(threads: int, wall_us: float, own_us: float) -> bool:
        _C.judge_team(threads, wall_us, own_us)
        return _C.team_is_late()

    _C.expect_teams_in_time()
    yield judge
    _C.expect_teams_in_time()


# A call of a crowded machine: the time slice of another process, in which its first thread waits. And one in time.
LATE = (2, 12_000, 50)
IN_TIME = (2, 1_000, 980)
# Of a team whose threads have just been started, which says nothing, and as many as are evidence.
LATE_UNTIL_ALONE = 5


@pytest.mark.kernels
def test_calls_do_without_a_team_while_many_late_ones_stand_against_none_in_time(
    judged: Callable[[int, float, float], bool],
) -> None:
    assert [judged(*LATE) for _ in range(LATE_UNTIL_ALONE)] == [False] * (LATE_UNTIL_ALONE - 1) + [True]


@pytest.mark.kernels
def test_a_few_teams_in_time_between_late_ones_do_not_hide_a_crowd(judged: Callable[[int, float, float], bool]) -> None:
    found = [judged(*team) for _ in range(10) for team in (LATE, IN_TIME)]
    assert any(found)


@pytest.mark.kernels
def test_the_first_calls_of_a_process_may_be_late(judged: Callable[[int, float, float], bool]) -> None:
    """Threads are started, memory is touched for the first time, and something comes in between once."""
    assert not any(judged(*LATE) for _ in range(3))
    assert not any(judged(*IN_TIME) for _ in range(400))


@pytest.mark.kernels
@pytest.mark.parametrize("together", [1, 2, 3])
def test_interruptions_of_a_process_alone_on_its_machine_are_no_reason(
    together: int, judged: Callable[[int, float, float], bool]
) -> None:
    for _ in range(50):
        assert not any(judged(*IN_TIME) for _ in range(20))
        assert not any(judged(*LATE) for _ in range(together))


@pytest.mark.kernels
def test_one_very_late_team_is_no_reason(judged: Callable[[int, float, float], bool]) -> None:
    judged(*IN_TIME)
    assert not judged(2, 60e6, 50)  # the process was stopped, and went on


@pytest.mark.kernels
def test_the_first_team_of_another_size_says_nothing(judged: Callable[[int, float, float], bool]) -> None:
    assert not any(judged(threads, 12_000, 50) for threads in (2, 3) * 20)


@pytest.mark.kernels
def test_unequal_shares_of_the_work_are_no_reason(judged: Callable[[int, float, float], bool]) -> None:
    assert not any(judged(2, 1_000, 400) for _ in range(1000))


def _wait_for_teams() -> None:
    from fused_rnn import _C

    end = time.monotonic() + SECONDS
    while _C.team_is_late():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.kernels
def test_a_crowd_that_lasts_is_seen_by_one_team_and_one_that_has_gone_is_forgotten(
    judged: Callable[[int, float, float], bool],
) -> None:
    assert any(judged(*LATE) for _ in range(LATE_UNTIL_ALONE))
    _wait_for_teams()
    assert judged(*LATE)
    _wait_for_teams()
    assert not any(judged(*IN_TIME) for _ in range(100))
    assert not any(judged(*LATE) for _ in range(3))


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("threads", "wall_us", "own_us"),
    [
        (2, 10_000, 10_000),
        (2, 10_000, 5_000),  # half of the work was the other thread's
        (8, 10_000, 2_000),  # alone it would have taken 16 ms
        (2, 150, 10),  # waking a thread takes that long
    ],
)
def test_teams_in_time_are_kept(
    threads: int, wall_us: float, own_us: float, judged: Callable[[int, float, float], bool]
) -> None:
    assert not any(judged(threads, wall_us, own_us) for _ in range(50))


@pytest.mark.kernels
def test_rare_late_teams_are_no_reason(judged: Callable[[int, float, float], bool]) -> None:
    for _ in range(10):
        assert not judged(2, 12_000, 50)
        assert not any(judged(2, 12_000, 11_900) for _ in range(4))


@pytest.mark.kernels
def test_every_thread_judges_its_own_teams(judged: Callable[[int, float, float], bool]) -> None:
    from fused_rnn import _C

    assert any(judged(*LATE) for _ in range(LATE_UNTIL_ALONE))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert not pool.submit(_C.team_is_late).result(SECONDS)


# Sums that are taken in several blocks, over rows that are one tile in a team of two and two tiles alone.
LONG_SUMS = [Case(cell=cell, input_size=3, hidden_size=1100, batch=10, steps=3) for cell in ("LSTM", "GRU", "RNN_TANH")]


@pytest.mark.kernels
@pytest.mark.parametrize("case", [*SPLIT_CASES, *LONG_SUMS], ids=str)
def test_without_a_team_the_bits_are_the_same(
    case: Case, judged: Callable[[int, float, float], bool], threads: None
) -> None:
    """Calls with and without one alternate while a machine is busy, and the same thread count gives the same bits."""
    from fused_rnn import _C

    torch.set_num_threads(2)
    previous = _C.set_processors(2)
    try:
        module = case.build(fused_rnn)
        expected = run(module, case.data())
        _C.set_processors(0)
        for _ in range(LATE_UNTIL_ALONE):
            judged(2, 1e9, 0)
        assert _C.team_is_late()
        assert_same(run(module, case.data()), expected)
    finally:
        _C.set_processors(previous)


# ---- forked processes ---------------------------------------------------------------------------------------------


def _fork_and_run(work: Callable[[], Any]) -> Any:
    """The result of `work` in a forked child; a child that hangs is killed and fails the test."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        sender.send(work())

    process = context.Process(target=child)
    process.start()
    try:
        assert receiver.poll(SECONDS), "the forked worker hangs"
        return receiver.recv()
    finally:
        process.kill()
        process.join()


def _as_lists(results: dict[str, Tensor]) -> dict[str, Any]:
    # plain lists: tensors would go through shared memory, which is not what is tested
    return {name: tensor.double().tolist() for name, tensor in results.items()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "workers_threads",
    # PyTorch's own products, which the reference is made of, hang in a forked child that uses several threads
    [1, pytest.param(None, marks=pytest.mark.kernels)],
    ids=["one thread", "as many threads"],
)
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_forked_worker_computes_after_use_in_the_parent(
    workers_threads: int | None, gradients: bool, threads: None
) -> None:
    torch.set_num_threads(2)
    case = Case(input_size=20, hidden_size=48, batch=16, steps=12, num_layers=2)
    module = case.build(fused_rnn)
    expected = run(module, case.data())

    def work() -> dict[str, Any]:
        if workers_threads is not None:
            torch.set_num_threads(workers_threads)
        return _as_lists(run(module, case.data(), gradients=gradients))

    found = _fork_and_run(work)
    for name, values in found.items():
        got = torch.tensor(values, dtype=torch.float64).reshape(expected[name].shape).float()
        assert_within({name: got}, {name: expected[name].double()})
    # and the parent is none the worse for it
    assert_same(run(module, case.data()), expected)


class _EncodedSequences(torch.utils.data.Dataset[list[float]]):
    """A data set that runs a fused layer in the worker, as feature extractors do."""

    def __init__(self) -> None:
        self.layer = Case("GRU", input_size=8, hidden_size=32).build(fused_rnn).requires_grad_(False)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> list[float]:
        return self.layer(torch.full((10, 4, 8), float(index)))[0].flatten()[:5].tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_data_loader_workers_compute_after_use_in_the_parent(threads: None) -> None:
    torch.set_num_threads(2)
    data = _EncodedSequences()
    expected = [data[index] for index in range(len(data))]
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, timeout=SECONDS, multiprocessing_context="fork", collate_fn=list
    )
    torch.testing.assert_close(torch.tensor(list(loader)), torch.tensor(expected))


DIVISION_FACTORS = {
    "cell": CELLS,
    "input_size": (3, 40),
    "hidden_size": (33, 70, 150),
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "bias": (True, False),
    "proj": (False, True),
    "packing": ("padded", "sorted", "unsorted"),
    "batch": (1, 2, 5, 23),
    "steps": (3, 9),
    "hx": (False, True),
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}
DIVISION_CASES = [
    Case(**row)
    for seed in (0, 1)
    for row in pairwise(DIVISION_FACTORS, seed=seed, allowed=lambda row: not row["proj"] or row["cell"] == "LSTM")
]


@pytest.mark.kernels
@pytest.mark.asan
@pytest.mark.parametrize("case", DIVISION_CASES, ids=str)
def test_every_division_of_the_work_matches_float64(case: Case, threads: None) -> None:
    """Teams larger than this machine: directions, rows, units and their combinations, as users' machines have them."""
    from fused_rnn import _C

    module = case.build(fused_rnn)
    expected = run(copy.deepcopy(case.build(nn)).double(), case.data().to(torch.float64))
    previous = _C.set_processors(8)
    try:
        for count in (2, 3, 4, 6, 8):
            torch.set_num_threads(count)
            found = run(module, case.data())
            assert_within(found, expected)
            assert_same(run(module, case.data()), found)
    finally:
        _C.set_processors(previous)
