"""Fixtures and markers of the whole suite."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.backends import available_isas, fused_available, why_no_cuda
from support.c_library import c, library  # noqa: F401, fixtures of tests/test_c_library*.py

import fused_rnn
from fused_rnn.check import instruction_set

# Most calls here are small. torch.nn and the reference, with several threads on a machine that is busy with something
# else, take up to a hundred times as long for them; tests/test_threads.py is about more than one thread.
SUITE_THREADS = 1

# In files with tests that run alone (ALONE_TESTS in the Makefile).
ALONE = re.compile(r"mark[.]alone|\bthreads: None")


# Custom cells are compiled once for all processes and runs, and sooner than a user's: nothing here is timed.
os.environ.setdefault("FUSED_RNN_CELL_FLAGS", "-O1 -fexpensive-optimizations")
os.environ.setdefault("FUSED_RNN_CACHE", str(Path(__file__).parent.parent / "build" / "cells"))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(SUITE_THREADS)
    config.addinivalue_line("markers", "asan: the short subset that `make test-asan` runs under the sanitizers")
    config.addinivalue_line(
        "markers",
        "alone: for tests of several threads, which the suite does not run beside others (`make test`)",
    )
    config.addinivalue_line("markers", "compiles: runs what a compiler makes first; such tests begin before the others")
    config.addinivalue_line(
        "markers", "kernels: needs the compiled kernels (skipped under FUSED_RNN_BACKEND=reference)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    apart = set()
    for item in items:
        if "threads" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.alone)
        if item.get_closest_marker("alone"):
            apart.add(item.path)
    for path in apart:
        if not ALONE.search(path.read_text()):
            raise pytest.UsageError(f"{path}: the Makefile looks for tests that run alone by {ALONE.pattern!r}")
    # Several processes share the tests: the one that compiles is not to begin when the others have ended.
    items.sort(key=lambda item: item.get_closest_marker("compiles") is None)
    if why := why_no_cuda():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=why))
    if fused_available():
        return
    skip = pytest.mark.skip(reason="the fused backend is not in use")
    for item in items:
        if item.get_closest_marker("kernels"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    # Thousands of tests and all of PyTorch stay to the end: every full collection would look at them again.
    gc.freeze()


def pytest_report_header() -> str:
    return f"fused_rnn: instruction sets {', '.join(available_isas())}"


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine can run, in use during the test."""
    if not fused_available():
        yield request.param
        return
    with instruction_set(request.param):
        yield request.param


@pytest.fixture(params=["reference", "fused"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """By the formulas, or by what computes such a call by itself: the kernels, where they have the option."""
    if request.param == "fused" and not fused_available():
        pytest.skip("the kernels are not in use")
    with fused_rnn.use_backend("auto" if request.param == "fused" else "reference"):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives the suite's thread count back after a test that changes it, and teams to calls on a busy machine, too."""
    if not fused_available():
        yield
    else:
        from fused_rnn import _C

        previous = _C.set_processors(_C.available_processors())
        yield
        _C.set_processors(previous)
    torch.set_num_threads(SUITE_THREADS)
