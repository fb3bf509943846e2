"""How many steps' projections are there at once in inference on CUDA (``projection_steps`` in csrc/cuda/plan.cpp).

That parts of a sequence give the numbers of the whole is tested in test_cuda_ops.py.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rnn.settings import CellKind

CSRC = Path(__file__).resolve().parents[1] / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "g++"))

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(not shutil.which(COMPILER[0]), reason=f"no compiler: {COMPILER[0]} is not on PATH"),
]

# Reads lines of kind, dtype, T, B, H and answers each.
PROGRAM = """
#include <cstdio>

#include "cuda/plan.cpp"

int main() {
  constexpr int gates[] = {1, 1, 4, 3};
  int kind, dtype;
  long T, B, H;
  while (scanf("%d %d %ld %ld %ld", &kind, &dtype, &T, &B, &H) == 5) {
    fused_rnn::LayerSizes sizes;
    sizes.kind = fused_rnn::CellKind(kind);
    sizes.dtype = fused_rnn::DType(dtype);
    sizes.hidden_size = sizes.state_size = H;
    fused_rnn::Steps steps;
    steps.T = T;
    steps.B = B;
    printf("%ld\\n", long(fused_rnn::cuda::projection_steps(sizes, gates[kind], steps)));
    fflush(stdout);
  }
}
"""
# Values of DType in csrc/problem.h, and bytes of an element.
DTYPES = {"float32": (0, 4), "float64": (1, 8), "bfloat16": (2, 2), "float16": (3, 2)}
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("projections")
    (folder / "program.cpp").write_text(PROGRAM)
    command = [*COMPILER, "-std=c++17", "-O1", f"-I{CSRC}", str(folder / "program.cpp"), "-o", str(folder / "program")]
    subprocess.run(command, check=True, timeout=300)
    return folder / "program"


def _steps(program: Path, kind: CellKind, dtype: str, T: int, B: int, H: int) -> int:
    line = f"{int(kind)} {DTYPES[dtype][0]} {T} {B} {H}\n"
    return int(subprocess.run([str(program)], input=line, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    ("kind", "dtype", "T", "B", "H", "steps"),
    [
        (CellKind.LSTM, "bfloat16", 1, 1, 1, 1),
        (CellKind.LSTM, "bfloat16", 1024, 16, 768, 512),  # 96 KiB a step: 682 steps have 64 MiB, two parts
        (CellKind.LSTM, "bfloat16", 682, 16, 768, 682),
        (CellKind.LSTM, "bfloat16", 683, 16, 768, 342),
        (CellKind.LSTM, "float32", 1024, 16, 768, 256),  # 192 KiB a step: three parts of 341 would leave one out
        (CellKind.GRU, "float16", 1024, 16, 768, 512),  # 72 KiB a step
        (CellKind.LSTM, "float64", 1000, 1024, 1024, 125),  # 32 MiB a step: the least, 128 steps, in parts of one size
        (CellKind.LSTM, "float64", 128, 1024, 1024, 128),
        (CellKind.RNN_TANH, "float32", 4096, 64, 1024, 256),  # 256 KiB a step
    ],
)
def test_steps_at_once(program: Path, kind: CellKind, dtype: str, T: int, B: int, H: int, steps: int) -> None:
    assert _steps(program, kind, dtype, T, B, H) == steps


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(CellKind)),
    dtype=st.sampled_from(sorted(DTYPES)),
    T=st.integers(1, 5000),
    B=st.integers(1, 2048),
    H=st.integers(1, 4096),
)
def test_parts_are_few_and_of_one_size(program: Path, kind: CellKind, dtype: str, T: int, B: int, H: int) -> None:
    steps = _steps(program, kind, dtype, T, B, H)
    most = max(128, 64 * MEBIBYTE // (B * kind.num_gates * H * DTYPES[dtype][1]))
    parts = -(-T // steps)
    assert 1 <= steps <= min(T, most)
    assert (parts - 1) * most < T  # one part less would not hold all steps
    assert parts * steps - T < parts  # the last part has hardly less than the others
