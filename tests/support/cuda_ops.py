"""Builds csrc/ops_cuda.cpp for the CPU: the CUDA operators on CPU tensors, their kernels on the engine of cuda_host."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

from . import cuda_host

CSRC = cuda_host.ROOT / "csrc"


@functools.cache
def load() -> None:
    """Makes torch.ops.fused_rnn_host.* known; compiled when a source is newer."""
    import fused_rnn.ops  # noqa: F401  (the schemas are copied from its operators)

    folder = cuda_host.BUILD / f"ops-{sysconfig.get_config_var('SOABI')}-torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    shared = ["-fPIC", "-O1"]
    with_torch = [*shared, "-std=c++20"]
    with_torch += [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]
    objects: list[Path] = []

    def compile(source: Path, flags: list[str]) -> None:
        objects.append(cuda_host._compile(folder / f"{source.stem}.o", [*flags, "-c", str(source)]))

    compile(cuda_host.SOURCES / "engine.cpp", ["-fPIC", "-O2", "-fno-tree-loop-distribute-patterns"])
    compile(cuda_host.SOURCES / "ops_on_host.cpp", with_torch)
    compile(CSRC / "ops_cuda.cpp", with_torch)
    for kernels in sorted((CSRC / "cuda").glob("persistent_*.cu")):
        compile(kernels, [*shared, "-x", "c++"])
    for name in ("cuda", "cpu"):
        source = CSRC / name / "plan.cpp"
        objects.append(cuda_host._compile(folder / f"{name}_plan.o", [*shared, "-c", str(source)]))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    library = cuda_host._compile(
        folder / "ops.so",
        ["-shared", *map(str, objects), *libraries, "-lc10", "-ltorch", "-ltorch_cpu"],
        objects,
    )
    torch.ops.load_library(str(library))
