"""The kernels' own tanh and sigmoid: error in ulp, exact limits, signs, NaN.

True values are computed in float64 for float32, and in extended precision (numpy's longdouble, a mantissa of 64 bits on
x86) for float64.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

np = pytest.importorskip("numpy")

pytestmark = [pytest.mark.kernels, pytest.mark.asan]

NAMES = ("tanh", "sigmoid")
ROOT = Path(__file__).resolve().parent.parent
COMPILER = shlex.split(os.environ.get("CXX", "g++"))

# Largest error in ulp of the result. float32: the bound that the project states for its kernels. float64: a division
# and a polynomial more than the C library's functions need; where longdouble is no wider than double (not on x86), one
# of the four is the comparison's own.
ULP_LIMITS = {torch.float32: 2.0, torch.float64: 4.0}
DTYPES = tuple(ULP_LIMITS)


def activate(name: str, values: Tensor) -> Tensor:
    from fused_rnn import _C

    return _C.test_activation(name, values)


def true_value(name: str, values: Tensor) -> np.ndarray:
    wide = values.numpy().astype(np.float64 if values.dtype == torch.float32 else np.longdouble)
    with np.errstate(over="ignore", under="ignore"):
        if name == "tanh":
            return np.tanh(wide)
        # the two forms keep all digits on their own side of zero
        return np.where(wide >= 0, 1 / (1 + np.exp(-np.abs(wide))), np.exp(-np.abs(wide)) / (1 + np.exp(-np.abs(wide))))


def ulp_error(found: Tensor, expected: np.ndarray) -> np.ndarray:
    numpy_type = found.numpy().dtype.type
    # spacing above the true value; below the smallest normal number the spacing of the denormals
    spacing = np.spacing(np.abs(expected).astype(numpy_type)).astype(expected.dtype)
    return np.abs(found.numpy().astype(expected.dtype) - expected) / spacing


def dense_samples(dtype: torch.dtype) -> Tensor:
    """Evenly through the range where the functions move, and at random within every binade."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(0)
    even = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    lowest, highest = (-126, 127) if dtype == torch.float32 else (-1022, 1023)
    exponents = torch.arange(lowest, highest + 1, dtype=torch.float64)
    mantissas = 1 + torch.rand(len(exponents), 64, generator=generator, dtype=torch.float64)
    binades = (mantissas.clamp(max=2 - info.eps) * torch.exp2(exponents)[:, None]).flatten()
    return torch.cat([even, binades, -binades]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_error_is_within_the_stated_ulp(name: str, dtype: torch.dtype, isa: str) -> None:
    values = dense_samples(dtype)
    # sigmoid is denormal below about -87 (-708): kernels may flush there, see the test below
    if name == "sigmoid":
        values = values[values > (-87.0 if dtype == torch.float32 else -708.0)]
    error = ulp_error(activate(name, values), true_value(name, values))
    assert error.max() <= ULP_LIMITS[dtype], f"{error.max():.2f} ulp at {values[int(error.argmax())].item()!r}"


def test_the_table_of_tanh_is_what_its_tool_writes() -> None:
    root = Path(__file__).parent.parent
    written = subprocess.run(
        [sys.executable, "tools/fit_tanh.py"], cwd=root, check=True, capture_output=True, text=True
    )
    assert written.stdout == (root / "csrc/cpu/tanh_table.h").read_text()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_far_below_zero_is_nonnegative_and_tiny(dtype: torch.dtype, isa: str) -> None:
    start = -87.0 if dtype == torch.float32 else -708.0
    values = torch.linspace(start, 2 * start, 1001, dtype=dtype)
    found = activate("sigmoid", values)
    # the result may be a denormal or zero: absolute error below the smallest normal number, never negative
    assert (found >= 0).all()
    assert (found <= 2 * torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_are_exact(dtype: torch.dtype, isa: str) -> None:
    infinity = float("inf")
    largest = torch.finfo(dtype).max
    values = torch.tensor([infinity, largest, 100.0, 20.0], dtype=dtype)
    assert activate("tanh", values).tolist() == [1.0] * 4
    assert activate("tanh", -values).tolist() == [-1.0] * 4
    values = torch.tensor([infinity, largest, 1e3], dtype=dtype)
    assert activate("sigmoid", values).tolist() == [1.0] * 3
    assert activate("sigmoid", -values).tolist() == [0.0] * 3
    assert activate("sigmoid", torch.zeros(1, dtype=dtype)).item() == 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_result_never_leaves_the_range_of_the_function(name: str, dtype: torch.dtype, isa: str) -> None:
    found = activate(name, dense_samples(dtype))
    assert found.max() <= 1
    assert found.min() >= (-1 if name == "tanh" else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 3, 8, 17, 33])
def test_nan_stays_in_its_lane(name: str, size: int, dtype: torch.dtype, isa: str) -> None:
    for place in range(size):
        values = torch.zeros(size, dtype=dtype)
        values[place] = float("nan")
        found = activate(name, values)
        assert found.isnan().tolist() == [i == place for i in range(size)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tanh_is_odd_and_keeps_the_sign_of_zero(dtype: torch.dtype, isa: str) -> None:
    values = dense_samples(dtype)
    assert torch.equal(activate("tanh", -values), -activate("tanh", values))
    zeros = activate("tanh", torch.tensor([0.0, -0.0], dtype=dtype))
    assert zeros.tolist() == [0.0, 0.0]
    assert torch.signbit(zeros).tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tanh_of_a_denormal_is_that_denormal(dtype: torch.dtype, isa: str) -> None:
    info = torch.finfo(dtype)
    values = torch.tensor(
        [info.smallest_normal * info.eps * k for k in (1, 3, 1000)] + [info.smallest_normal], dtype=dtype
    )
    assert torch.equal(activate("tanh", values), values)
    assert torch.equal(activate("tanh", -values), -values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_value_does_not_depend_on_its_place_in_the_vector(name: str, dtype: torch.dtype, isa: str) -> None:
    values = torch.linspace(-9, 9, 67, dtype=dtype)
    whole = activate(name, values)
    alone = torch.cat([activate(name, value[None]) for value in values])
    assert torch.equal(whole, alone)


@pytest.mark.parametrize("name", NAMES)
def test_gates_of_bfloat16_layers_have_more_bits_than_bfloat16(name: str, isa: str) -> None:
    from fused_rnn import _C

    values = dense_samples(torch.float32)
    values = values[values > -87.0] if name == "sigmoid" else values
    found = _C.test_activation(name, values, bfloat16=True).numpy().astype(np.float64)
    expected = true_value(name, values)
    error = np.abs(found - expected) / np.abs(expected).clip(min=np.finfo(np.float32).tiny)
    assert error.max() < 2.0**-13, f"{error.max():.2g} at {values[int(error.argmax())].item()!r}"
    assert np.abs(found).max() <= 1
    infinity = float("inf")
    ends = _C.test_activation(name, torch.tensor([infinity, -infinity, 0.0, float("nan")]), bfloat16=True)
    assert ends[:2].tolist() == [1.0, -1.0 if name == "tanh" else 0.0]
    assert ends[2].item() == pytest.approx(0.0 if name == "tanh" else 0.5, rel=2**-13, abs=0)
    assert ends[3].isnan()


SCALAR_PROGRAM = """
#include <cmath>

#include "cells/math.h"

template <class T>
bool right(T x) {
  const T bound = 8 * (sizeof(T) == 4 ? T(0x1p-24) : T(0x1p-53));
  return std::fabs(fused_rnn::tanh<T>(x) - std::tanh(x)) <= bound &&
         std::fabs(fused_rnn::sigmoid<T>(x) - 1 / (1 + std::exp(-x))) <= bound;
}

int main() {
  for (int i = -8000; i <= 8000; ++i)
    if (!right(float(i) / 10) || !right(double(i) / 10)) return 1;
}
"""


@pytest.mark.skipif(not shutil.which(COMPILER[0]), reason=f"no compiler: {COMPILER[0]} is not on PATH")
def test_scalar_functions_have_no_undefined_behaviour(tmp_path: Path) -> None:
    # The kernels use them on vectors alone; these are for CUDA, and for host execution of it.
    (tmp_path / "scalar.cpp").write_text(SCALAR_PROGRAM)
    program = tmp_path / "scalar"
    flags = ["-std=c++17", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*COMPILER, *flags, str(tmp_path / "scalar.cpp"), "-o", str(program)], check=True, timeout=300)
    # (Without what `make test-asan` preloads.)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run([str(program)], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
