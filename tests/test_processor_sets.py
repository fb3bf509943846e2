"""What instruction sets a processor runs, from what the kernel says of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.backends import available_isas

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from kernel_flags import ARM_FLAGS, X86_FLAGS  # noqa: E402
from processor_sets import features, runnable  # noqa: E402

ZEN3 = "processor : 0\nflags\t\t: fpu sse2 fma f16c avx avx2\nprocessor : 1\nflags : fpu avx512f\n"
ZEN4 = "flags : avx2 fma f16c avx512f avx512dq avx512bw avx512vl avx512_vnni avx512_bf16\n"
SAPPHIRE_RAPIDS = ZEN4.strip() + " amx_bf16 amx_tile amx_int8\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("", ["portable"]),
        (ZEN3, ["portable", "avx2"]),
        (ZEN3.replace(" fma", ""), ["portable"]),
        (ZEN4, ["portable", "avx2", "avx512", "avx512_bf16"]),
        (ZEN4.replace(" avx512vl", ""), ["portable", "avx2"]),
        (SAPPHIRE_RAPIDS, list(X86_FLAGS)),
        (SAPPHIRE_RAPIDS.replace(" amx_tile", ""), ["portable", "avx2", "avx512", "avx512_bf16"]),
    ],
)
def test_sets_of_x86(cpuinfo: str, expected: list[str]) -> None:
    assert runnable(X86_FLAGS, features(cpuinfo)) == expected


def test_sets_of_arm() -> None:
    assert runnable(ARM_FLAGS, features("Features\t: fp asimd asimddp\n")) == ["portable", "neon"]
    assert runnable(ARM_FLAGS, features("Features\t: fp asimd bf16\n")) == list(ARM_FLAGS)


@pytest.mark.kernels
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks the kernel")
def test_the_extension_finds_no_more_than_the_kernel_says() -> None:
    command = [sys.executable, str(ROOT / "tools/processor_sets.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(available_isas()) - {"reference"} <= set(printed.strip().split(","))
