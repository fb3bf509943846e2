"""The CUDA kernels, executed on the CPU by tests/cuda_host (docs/cuda.md says how and what that can show)."""

from __future__ import annotations

import pytest
from support import cuda_host

pytestmark = pytest.mark.compiles


@pytest.mark.parametrize("variant", ["plain", "thread"])
def test_every_device_function_does_what_its_comment_says(variant: str) -> None:
    result = cuda_host.run(cuda_host.build("test_engine", variant), "instructions")
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_misuse_of_the_device_is_reported() -> None:
    result = cuda_host.run(cuda_host.build("test_engine"), "misuse")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("race", ["barrier", "shuffle", "cluster", "overwrite", "grid"])
def test_a_race_between_cuda_threads_is_found(race: str) -> None:
    result = cuda_host.run(cuda_host.build("test_engine", "thread"), "race", race)
    assert result.returncode == cuda_host.RACE, result.stdout + result.stderr
    assert "data race" in result.stderr


def test_no_race_is_reported_where_there_is_none() -> None:
    result = cuda_host.run(cuda_host.build("test_engine", "thread"), "race", "none")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("variant", ["plain", "thread"])
def test_what_only_waits_for_others_ends_and_hears_them(variant: str) -> None:
    result = cuda_host.run(cuda_host.build("barrier", variant))
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_exchange_whose_wait_is_missing_is_noticed() -> None:
    lines = (cuda_host.KERNELS / "barrier.cuh").read_text().splitlines()
    (wait,) = [number for number, line in enumerate(lines, 1) if "mbarrier_wait(" in line]
    result = cuda_host.run(cuda_host.build("barrier"), skip_site=f"barrier.cuh:{wait}")
    assert result.returncode != 0, result.stdout + result.stderr
