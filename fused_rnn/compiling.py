"""Compiling custom cells on the user's machine: a header's trace, and kernels, both kept by content."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import backend
from .expressions import Step

__all__ = ["add_cuda_kernels", "add_kernels", "compile_cuda_kernels", "compile_kernels", "cuda_source", "trace_of"]

_log = logging.getLogger("fused_rnn")

_PACKAGE = Path(__file__).resolve().parent
# Beside the package where it is installed, else in the checkout that it is used from.
HEADERS = next((f for f in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if f.is_dir()), _PACKAGE / "csrc")

_TRACE = '#include <initializer_list>\n#include "cells/trace.h"\n#include "cell.h"\n'
_TRACE += "int main() {{ return fused_rnn::trace::run<{name}>(); }}\n"

_KERNELS = """#define FRNN_ISA custom_{isa}
#define FRNN_ISA_TEXT "{isa}"
#define FRNN_VECTOR_BYTES {bytes}
{defined}#include "cpu/custom_kernels.h"

namespace fused_rnn {{
{struct}
}}  // namespace fused_rnn

{passes}
"""
_PASSES = {
    "forward": "FRNN_CUSTOM_FORWARD({name}, {element}, {number}, {dtype})",
    "backward": "FRNN_CUSTOM_BACKWARD({name}, {element})",
}
_CUDA_KERNELS = """#include "cuda/custom_kernels.cuh"

namespace fused_rnn {{
{struct}
}}  // namespace fused_rnn

FRNN_CUSTOM_CUDA({name}, {element}, {number}, {dtype}, {arch})
"""
# As in tools/cuda_build.py.
_NVCC_FLAGS: tuple[str, ...] = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xfatbin=-compress-all", "-w")
_NVCC_FLAGS += ("-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden")

# What a dtype is called in C++, as an element and in csrc/problem.h.
_ELEMENTS = {
    torch.float32: ("float", "float32"),
    torch.float64: ("double", "float64"),
    torch.bfloat16: ("BFloat16", "bfloat16"),
    torch.float16: ("Half", "float16"),
}

# Bytes of a vector of each instruction set; what another has beside AVX-512 concerns products of our own cells.
_VECTOR_BYTES = {"avx2": 32, "avx512": 64, "avx512_bf16": 64, "avx512_amx": 64}


def cache_folder() -> Path:
    """``FUSED_RNN_CACHE``, or ``fused_rnn`` in the user's folder for caches."""
    if given := os.environ.get("FUSED_RNN_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fused_rnn"


def compiler() -> list[str]:
    """``CXX``, or the first of g++, c++ and clang++ that there is.

    Raises:
        RuntimeError: there is none.
    """
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError(
        "load_cell: expected a C++ compiler, g++, c++ or clang++, on PATH or in the environment variable CXX, found "
        "none: install one (Debian, Ubuntu: apt install g++), or bring the folder FUSED_RNN_CACHE of a machine that has"
    )


@functools.cache
def _digest_of_headers(*further: str) -> str:
    """``further``: patterns of other headers than those of kernels for the CPU."""
    digest = hashlib.sha256()
    for pattern in ("problem.h", "cells/*.h", "cpu/*.h", *further):
        for path in sorted(HEADERS.glob(pattern)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _key(*parts: str, digest: str | None = None) -> str:
    digest = _digest_of_headers() if digest is None else digest
    return hashlib.sha256("\0".join((*parts, digest)).encode()).hexdigest()[:32]


def trace_of(source: str, name: str, origin: str) -> str:
    """The lines that ``csrc/cells/trace.h`` prints of the struct ``name`` in a header.

    Args:
        source: the header's text. origin: its path, for messages.

    Raises:
        RuntimeError: it does not compile, or there is no compiler.
    """
    if '#include "' in source:  # what is in there is no part of the key
        return _trace(source, name, origin)
    kept = cache_folder() / f"{_key('trace', source, name)}.trace"
    with _alone(kept):
        if not kept.is_file():
            _keep(kept, _trace(source, name, origin).encode())
    return kept.read_text()


def _trace(source: str, name: str, origin: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        main, program = Path(folder) / "trace.cpp", Path(folder) / "trace"
        # Its text as it was read; what it includes is looked for beside it.
        (Path(folder) / "cell.h").write_text(f"#line 1 {json.dumps(origin)}\n{source}")
        main.write_text(_TRACE.format(name=name))
        beside = ["-iquote", str(Path(origin).resolve().parent)]
        _compile([*compiler(), "-std=c++17", "-O0", f"-I{HEADERS}", *beside, str(main), "-o", str(program)], origin)
        result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{origin}: {result.stderr.strip() or 'the cell’s step did not run'}")
    return result.stdout


def compile_kernels(step: Step, number: int, isa: str, dtype: torch.dtype) -> Path:
    """The library with the kernels of a cell for one instruction set and dtype: that of the cache, or a new one.

    Args:
        number: the cell's kind.

    Raises:
        RuntimeError: it does not compile, or there is no compiler.
    """
    assert backend.ops is not None
    # Tiles are for products of our own cells.
    of_set = backend.ops.instruction_set_flags("avx512_bf16" if isa == "avx512_amx" else isa)
    # -O2 takes 0.6 to 0.8 of the time of -O3 here, and what vectors are there are written out.
    of_build = [flag for flag in shlex.split(backend.ops.build_flags()) if flag not in ("-O3", "-Wall", "-Wextra")]
    flags = [*of_build, "-O2", "-w", *of_set, *shlex.split(os.environ.get("FUSED_RNN_CELL_FLAGS", ""))]
    name = f"Cell{number}"  # so that the same cell by another name is the same library
    element, dtype_name = _ELEMENTS[dtype]
    given = {"name": name, "element": element, "number": number, "dtype": dtype_name}
    of_cell = {"isa": isa, "bytes": _VECTOR_BYTES.get(isa, 16), "struct": step.cpp(name)}
    of_cell["defined"] = "#define FRNN_NEON\n" if isa.startswith("neon") else ""
    sources = {one: _KERNELS.format(passes=text.format(**given), **of_cell) for one, text in _PASSES.items()}
    kept = cache_folder() / f"{_key('kernels', *sources.values(), *flags)}.so"
    with _alone(kept):
        if not kept.is_file():
            _log.info("compiling a custom cell's kernels for %s and %s, once: some seconds", dtype_name, isa)
            _compile_library(sources, flags, kept)
    return kept


def _compile_library(sources: Mapping[str, str], flags: Sequence[str], kept: Path) -> None:
    assert backend.ops is not None
    with tempfile.TemporaryDirectory() as folder:
        command = compiler()

        def compile_one(name: str) -> str:
            file = Path(folder) / f"{name}.cpp"
            file.write_text(sources[name])
            _compile([*command, *flags, f"-I{HEADERS}", "-c", str(file), "-o", f"{file}.o"], "load_cell")
            return f"{file}.o"

        with ThreadPoolExecutor(backend.ops.available_processors()) as pool:
            objects = list(pool.map(compile_one, sources))
        library = Path(folder) / "cell.so"
        _compile([*command, "-shared", *objects, "-o", str(library)], "load_cell")
        _keep(kept, library.read_bytes())


def add_kernels(library: Path) -> None:
    """Its kernels to those of the process."""
    _show_symbols()
    assert backend.ops is not None
    backend.ops.add_custom_kernels(str(library))


@functools.cache
def _show_symbols() -> None:
    """Python loads an extension for itself alone; kernels of custom cells call its team of threads."""
    assert backend.ops is not None
    ctypes.CDLL(backend.ops.extension_path(), mode=os.RTLD_NOW | os.RTLD_GLOBAL | os.RTLD_NOLOAD)


def nvcc() -> str:
    """That of ``CUDA_HOME``, of ``PATH``, or of the usual folder.

    Raises:
        RuntimeError: there is none, or it is of another CUDA than PyTorch.
    """
    home = os.environ.get("CUDA_HOME")
    folders = [os.path.join(home, "bin")] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    if found is None:
        raise RuntimeError(
            "load_cell: expected nvcc in CUDA_HOME, on PATH or in /usr/local/cuda/bin, found none: install the toolkit "
            f"of CUDA {torch.version.cuda or '13.0'}, or bring the folder FUSED_RNN_CACHE of a machine that has it"
        )
    wanted = torch.version.cuda
    release = re.search(r"release (\d+)", _output_of([found, "--version"]))
    if wanted is not None and (release is None or release[1] != wanted.split(".")[0]):
        version = release[1] if release else "an unknown version"
        raise RuntimeError(f"load_cell: expected nvcc of CUDA {wanted}, which PyTorch has, got {version} ({found})")
    return found


def _output_of(command: Sequence[str]) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return result.stdout


def cuda_source(step: Step, number: int, arch: int, dtype: torch.dtype) -> str:
    """The CUDA source of a cell's kernels for a GPU of one architecture, 90 for sm_90, and one dtype."""
    name, (element, dtype_name) = f"Cell{number}", _ELEMENTS[dtype]
    given = {"name": name, "element": element, "number": number, "dtype": dtype_name, "arch": arch}
    return _CUDA_KERNELS.format(struct=step.cpp(name), **given)


def compile_cuda_kernels(step: Step, number: int, arch: int, dtype: torch.dtype) -> Path:
    """As :func:`compile_kernels`, for GPUs.

    Args:
        arch: of the GPU, 90 for sm_90.

    Raises:
        RuntimeError: it does not compile, or nvcc or what it needs is not there.
    """
    source = cuda_source(step, number, arch, dtype)
    flags = [*_NVCC_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    digest = _digest_of_headers("cuda/*.h", "cuda/*.cuh")
    kept = cache_folder() / f"{_key('cuda', source, *flags, torch.version.cuda or '', digest=digest)}.so"
    with _alone(kept):
        if not kept.is_file():
            _log.info("compiling a custom cell's kernels for %s and sm_%d, once: some seconds", dtype, arch)
            command, host = nvcc(), compiler()
            to_host = [f"-ccbin={host[0]}", *(f"-Xcompiler={flag}" for flag in host[1:])]
            with tempfile.TemporaryDirectory() as folder:
                file, made, library = (Path(folder) / f"cell.{suffix}" for suffix in ("cu", "o", "so"))
                file.write_text(source)
                _compile([command, *flags, *to_host, f"-I{HEADERS}", "-c", str(file), "-o", str(made)], "load_cell")
                # The runtime library is found by its name alone: it is the one that PyTorch has loaded.
                runtime = str(_cuda_runtime(command))
                _compile([*host, "-shared", str(made), runtime, "-o", str(library)], "load_cell")
                _keep(kept, library.read_bytes())
    return kept


def _cuda_runtime(nvcc: str) -> Path:
    """The shared library, of the toolkit that nvcc belongs to or of the packages that PyTorch came with."""
    top = re.search(r"^#\$ TOP=(.*)$", _output_of([nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"]), re.MULTILINE)
    toolkit = Path(top[1]) if top else Path(nvcc).parent.parent
    packages = Path(torch.__file__).resolve().parent.parent / "nvidia"
    folders = [toolkit / "lib64", toolkit / "lib", *sorted(packages.glob("*/lib"))]
    for folder in folders:
        if found := sorted(folder.glob("libcudart.so*")):
            return found[0].resolve()
    raise RuntimeError(f"load_cell: expected libcudart.so in one of {', '.join(map(str, folders))}, found none")


def add_cuda_kernels(library: Path) -> None:
    """Its kernels to those of the process."""
    assert backend.ops is not None
    backend.ops.add_custom_cuda_kernels(str(library))


def _compile(command: Sequence[str], origin: str) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"load_cell: the C++ compiler does not run: {error}") from error
    if result.returncode != 0:
        raise RuntimeError(f"{origin}: does not compile ({shlex.join(command)}):\n{result.stderr.strip()}")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While one process makes this file, others wait for it: all ranks of a job load the same cells at once."""
    if path.is_file():
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_suffix(".lock"), "w")
    except OSError as error:
        raise RuntimeError(
            f"load_cell: cannot keep what it compiles in {path.parent}: {error}; set FUSED_RNN_CACHE to a folder that "
            "can be written"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _keep(path: Path, content: bytes) -> None:
    """All of it or nothing, whoever else writes the same."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o644 if path.suffix != ".so" else 0o755)
    os.replace(file.name, path)
