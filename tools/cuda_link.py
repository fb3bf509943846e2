"""`make cuda-link`: compiles and links the whole extension against a CUDA build of PyTorch, on a machine without a GPU.

What cannot run here is at least accepted by compiler and linker: ops_cuda.cpp by PyTorch's headers for CUDA, and every
symbol of the extension by PyTorch's libraries. An unresolved symbol is an error here, while an ordinary build of a
shared library leaves it for the import to find. A CUDA build of PyTorch cannot be imported without all its libraries,
so this does by itself what setup.py does with torch.utils.cpp_extension.

Downloads once, into build/cuda-link: PyTorch, cuBLAS (to link), cuSPARSE and cuSOLVER (headers that PyTorch's own
include): 1.4 GB, of which 1.1 GB are unpacked.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_build

FOLDER = cuda_build.ROOT / "build" / "cuda-link"
TORCH = "2.13.0"
# What the wheel of that PyTorch asks for.
TOOLKIT = "cuda-toolkit[cublas,cusolver,cusparse]==13.0.3"


def run(command: list[str]) -> float:
    """Seconds of processor that the command and its children took."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"error: {shlex.join(command)}\n{output}")
    return usage.ru_utime + usage.ru_stime


def fetch() -> Path:
    """Downloads and unpacks what is needed; the folder that holds `torch` and `nvidia`."""
    site = FOLDER / "site"
    stamp = FOLDER / f".unpacked-{TORCH}-{sys.implementation.cache_tag}"
    if stamp.exists():
        return site
    wheels = FOLDER / "wheels"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(wheels), "--only-binary=:all:"]
    print(f"downloading PyTorch {TORCH} and {TOOLKIT} ...", flush=True)
    # Three =: not 2.13.0+cpu, which two would take as well.
    run([*download, "--no-deps", f"torch==={TORCH}"])
    run([*download, TOOLKIT])
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            # Only what a compiler or a linker reads: the largest libraries are none of it.
            names = [n for n in archive.namelist() if "/include/" in n or _is_linked(Path(n).name)]
            archive.extractall(site, names)
    if not (site / "torch/lib/libtorch_cuda.so").exists():
        raise SystemExit(f"error: what pip found as torch=={TORCH} in its indices is a build without CUDA")
    stamp.touch()
    return site


def _is_linked(name: str) -> bool:
    stems = ("libtorch", "libc10", "libcublas.so", "libcudart.so", "libgomp")
    return name.startswith(stems) and not name.startswith("libtorch_nvshmem")


def compile_sources(site: Path, nvcc: str, architectures: list[str], jobs: int) -> list[str]:
    """All objects of the extension but those of single instruction sets, which need no PyTorch of any kind."""
    csrc = cuda_build.ROOT / "csrc"
    toolkit = cuda_build.toolkit(nvcc)
    includes = [site / "torch/include", site / "torch/include/torch/csrc/api/include", toolkit / "include"]
    includes += [*sorted((site / "nvidia").glob("*/include")), Path(sysconfig.get_path("include"))]
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    isas = ["PORTABLE"]
    common = [*compiler, "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{csrc}"]
    common += [f"-DFRNN_ISA_{name}=1" for name in isas]
    torch = ["-std=c++20", "-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    torch += ['-DFRNN_CUDA="nvcc"', f'-DFRNN_CUDA_ARCHS="{",".join(architectures)}"']
    torch += [part for folder in includes for part in ("-isystem", str(folder))]
    kernels = ["-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
    cuda = cuda_build.command(nvcc, compiler, architectures)

    objects = FOLDER / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    work: list[tuple[list[str], Path]] = [([*cuda], source) for source in cuda_build.sources()]
    work += [([*common, *torch], source) for source in sorted(csrc.glob("*.cpp"))]
    for source in (file for part in ("cuda", "cpu", "stream") for file in sorted((csrc / part).glob("*.cpp"))):
        if not source.stem.startswith("isa_") or source.stem[4:].upper() in isas:
            work.append(([*common, *kernels], source))

    seconds: dict[str, float] = {}

    def build(job: tuple[list[str], Path]) -> str:
        command, source = job
        output = objects / f"{source.parent.name}_{source.name}.o"
        dependencies = output.with_suffix(".d")
        if not _is_current(output, dependencies):
            name = str(source.relative_to(cuda_build.ROOT))
            seconds[name] = run([*command, "-MD", "-MF", str(dependencies), "-c", str(source), "-o", str(output)])
            print(f"{name}: {seconds[name]:.0f} s of processor", flush=True)
        return str(output)

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(build, work))
    if seconds:
        longest = max(seconds, key=lambda name: seconds[name])
        print(
            f"{len(seconds)} of {len(work)} sources compiled: {sum(seconds.values()) / 60:.1f} minutes of processor, "
            f"the longest {seconds[longest] / 60:.1f} ({longest})"
        )
    return results


def _is_current(output: Path, dependencies: Path) -> bool:
    """Whether the object is newer than every file that its compiler read."""
    if not (output.exists() and dependencies.exists()):
        return False
    _, _, files = dependencies.read_text().replace("\\\n", " ").partition(":")
    built = output.stat().st_mtime
    return all(Path(name).exists() and Path(name).stat().st_mtime <= built for name in files.split())


def link(site: Path, nvcc: str, objects: list[str]) -> Path:
    """The extension, with every symbol resolved."""
    libraries = site / "torch/lib"
    toolkit = cuda_build.toolkit(nvcc)
    folders = [toolkit / "lib64", toolkit / "lib", *sorted((site / "nvidia").glob("*/lib"))]
    needed = {name: cuda_build.find_library(name, folders) for name in ("cudart", "cublas")}
    if missing := [name for name, path in needed.items() if path is None]:
        raise SystemExit(f"error: lib{missing[0]}.so is in none of {', '.join(map(str, folders))}")
    python = Path(sysconfig.get_config_var("LIBDIR")) / sysconfig.get_config_var("LDLIBRARY")
    if python.suffix == ".a":
        raise SystemExit(f"error: this Python has no shared library to link with ({python}); use another")
    output = FOLDER / "_C.so"
    command = [*shlex.split(os.environ.get("CXX") or "g++"), "-shared", "-Wl,-z,defs", *objects, "-o", str(output)]
    command += [f"-L{libraries}", "-lc10", "-lc10_cuda", "-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-ltorch_python"]
    # What the libraries themselves need is not this link's concern.
    command += [str(needed["cudart"]), str(needed["cublas"]), str(python), str(next(libraries.glob("libgomp*")))]
    run([*command, "-Wl,--allow-shlib-undefined"])
    return output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilations at once")
    parser.add_argument("--arch", action="append", help="machine code for this alone, e.g. 90a (may be repeated)")
    arguments = parser.parse_args()
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        print("cuda-link: skipped, nvcc is not found in CUDA_HOME, on PATH or in /usr/local/cuda/bin")
        return 0
    site = fetch()
    architectures = arguments.arch or cuda_build.supported(nvcc)
    output = link(site, nvcc, compile_sources(site, nvcc, architectures, arguments.jobs))
    size = output.stat().st_size / 2**20
    print(f"{output.relative_to(cuda_build.ROOT)}: linked against PyTorch {TORCH} with CUDA, {size:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
