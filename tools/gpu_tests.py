"""A pytest plugin for runs on a GPU that may end at any moment: `pytest -p gpu_tests --gpu-log FILE`.

Each failure is printed when it happens. Tests that were begun are written to FILE, and a run with a FILE that is there
goes on after them: one that hung, or that took the CUDA context with it, costs itself and not those behind it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

# Exit status: the process is of no more use, another may go on.
AGAIN = 75


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-log", type=Path, required=True, help="file with the tests that were begun")
    parser.addoption("--gpu-without", action="append", default=[], help="leave this persistent variant out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    log: Path = config.getoption("--gpu-log")
    begun = set(log.read_text().splitlines()) if log.exists() else set()
    without: list[str] = config.getoption("--gpu-without")
    if without:
        from fused_rnn import _C
        from fused_rnn.bench.gpu_cases import allowed_without

        _C.cuda_allow(**allowed_without(without))

    # A cluster without both of its exchanges is none.
    gone = {*without, *(["cluster"] if {"counted", "barriers"} <= set(without) else [])}

    def is_left_out(item: pytest.Item) -> bool:
        return item.nodeid in begun or not gone.isdisjoint(re.split(r"[^a-z]+", item.name))

    left_out = [item for item in items if is_left_out(item)]
    items[:] = [item for item in items if not is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_logstart(nodeid: str) -> None:
    with _log.open("a") as file:
        file.write(nodeid + "\n")


def pytest_configure(config: pytest.Config) -> None:
    global _log
    _log = config.getoption("--gpu-log")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not report.failed:
        return
    print(f"\nFAILED at once: {report.nodeid} ({report.when})\n{report.longreprtext}", flush=True)
    try:
        torch.cuda.synchronize()
    except Exception as error:
        pytest.exit(f"the CUDA context is lost: {error}", returncode=AGAIN)


_log = Path()
