"""Builds csrc/ops_cuda.cpp for the CPU: the CUDA operators on CPU tensors, their kernels on the engine of cuda_host."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

from . import cuda_host
from .compiled import Step

CSRC = cuda_host.ROOT / "csrc"


@functools.cache
def load() -> None:
    """Makes torch.ops.fused_rnn_host.* known; compiled when a source is newer."""
    import fused_rnn.ops  # noqa: F401  (the schemas are copied from its operators)

    folder = cuda_host.BUILD / f"ops-{sysconfig.get_config_var('SOABI')}-torch-{torch.__version__}"
    with_torch = ["-O1", "-std=c++20"]
    with_torch += [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]

    def step(source: Path, name: str, flags: list[str]) -> Step:
        return cuda_host.compile_step(folder / f"{name}.o", [*flags, str(source)])

    objects = [
        step(cuda_host.SOURCES / "ops_on_host.cpp", "ops_on_host", with_torch),
        step(CSRC / "ops_cuda.cpp", "ops_cuda", with_torch),
        *cuda_host.persistent_kernels(),
        *(step(CSRC / name / "plan.cpp", f"{name}_plan", ["-O1"]) for name in ("cuda", "cpu")),
        cuda_host.engine(),
    ]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch", "-ltorch_cpu"]
    torch.ops.load_library(str(cuda_host.link(folder / "ops.so", ["-shared", *libraries], objects)))
