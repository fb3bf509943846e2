"""Builds `fused_rnn._C`, and in a checkout beside it `libfused_rnn.so`, the operators for programs without Python. The
metadata is in pyproject.toml.

Three kinds of sources go into the one extension:

- `csrc/*.cpp` include PyTorch's headers; `torch.utils.cpp_extension` compiles them.
- `csrc/cpu/*.cpp`, the kernels, include none. Every instruction set is a source of its own with its own flags (and
  nothing is built for "this machine": the choice is made at run time), which setuptools cannot express, so this file
  writes a small ninja file for them and hands the objects to the linker.
- `csrc/cuda/*.cu` include none either and are compiled by nvcc, by the same ninja file, where PyTorch is a build with
  CUDA and nvcc is of the same major version (`tools/cuda_build.py` has the architectures and flags).

Environment:

    FUSED_RNN_CUDA=0|1       without it: CUDA kernels when they can be built. 1: an error when they cannot
    FUSED_RNN_CUDA_ARCHS=... machine code for these alone, e.g. `90a`: a quarter of the time to compile
    FUSED_RNN_ISAS=...       kernels for these instruction sets alone (tools/kernel_flags.py), e.g. `avx512,avx2`,
                             and portable ones where not every processor has one of them
    FUSED_RNN_NVCC_FLAGS=... further flags of nvcc, e.g. `-lineinfo`, or a limit of clock cycles to every wait in a
                             kernel, `-DFRNN_WAIT_LIMIT=4000000000` (csrc/cuda/device.h)
    FUSED_RNN_LIBRARY=1      libfused_rnn.so in a wheel, too, which is then twice as large
    FUSED_RNN_SANITIZE=...   instrument everything, e.g. `address,undefined` (see `make test-asan`)
    CUDA_HOME                where nvcc is, if not on PATH or in /usr/local/cuda
    CXX, MAX_JOBS            the compiler (g++), parallel compilations (the processors this process may use)
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_build  # noqa: E402
import prerequisites  # noqa: E402
from kernel_flags import ALL_SETS, BFLOAT16_ALONE, MATH_FLAGS, choose_sets  # noqa: E402

OLDEST_TORCH = (2, 11)
LIBRARY = "libfused_rnn.so"

KERNEL_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", *MATH_FLAGS]
KERNEL_FLAGS += ["-Wall", "-Wextra"]


def fail(message: str) -> None:
    raise SystemExit(f"error: {message}")


def instruction_sets() -> dict[str, list[str]]:
    """Instruction sets to compile for this architecture and the flags of each."""
    try:
        return choose_sets(platform.machine(), os.environ.get("FUSED_RNN_ISAS"), "FUSED_RNN_ISAS")
    except ValueError as error:
        fail(str(error))


def sanitizers() -> str:
    return os.environ.get("FUSED_RNN_SANITIZE", "")


def optimisation_flags() -> list[str]:
    if not sanitizers():
        # The debug information that some Pythons ask for makes the objects ten times larger.
        return ["-O3", "-g0"]
    return [
        "-O1",
        "-g1",
        "-fno-omit-frame-pointer",
        # Without it -O1 fuses no product with a sum, and the accuracy that tests ask for is that of fused ones.
        "-fexpensive-optimizations",
        *sanitizer_flags(),
        "-fno-sanitize-recover=all",
        # vptr needs the type information of libtorch's hidden classes. The other four are the bulk of the time to
        # compile, and something else finds most of what they find: the address sanitizer, and aligned instructions.
        "-fno-sanitize=vptr,null,object-size,alignment,pointer-overflow",
        # Checks as calls: code in place takes twice as long to compile.
        "--param=asan-instrumentation-with-call-threshold=0",
    ]


def sanitizer_flags() -> list[str]:
    return [f"-fsanitize={sanitizers()}"] if sanitizers() else []


def usable_processors() -> int:
    return int(os.environ.get("MAX_JOBS", len(os.sched_getaffinity(0))))


def import_torch():
    """The installed PyTorch, after checking that everything a build needs is here."""
    if sys.platform != "linux":
        fail(f"fused_rnn builds on Linux only (this is {sys.platform})")
    for problem in prerequisites.build_problems():
        fail(problem)
    needed = f"fused_rnn needs PyTorch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer"
    try:
        import torch
    except ImportError as error:
        fail(
            f"{needed} to build against, and cannot import it ({error}): install it, then run pip with "
            "--no-build-isolation so that the build sees it"
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        fail(f"{needed}, got {torch.__version__}")
    return torch


def put_ninja_on_path() -> None:
    """pip's ninja sits beside this Python, which is not on PATH when a virtual environment is not activated."""
    if shutil.which("ninja"):
        return
    try:
        import ninja
    except ImportError:
        fail("ninja is missing: pip install ninja")
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]])


class Cuda:
    """Where the CUDA toolkit and the libraries that PyTorch uses are."""

    def __init__(self, torch) -> None:
        self.problem = self.find(torch)

    def find(self, torch) -> str | None:
        """Sets the fields; or returns the first thing that keeps CUDA kernels from being built here."""
        if torch.version.cuda is None:
            return f"PyTorch {torch.__version__} is a build without CUDA"
        nvcc = cuda_build.find_nvcc()
        if nvcc is None:
            return "nvcc is not found in CUDA_HOME, on PATH or in /usr/local/cuda/bin"
        version = cuda_build.nvcc_version(nvcc)
        if version.split(".")[0] != torch.version.cuda.split(".")[0]:
            return f"nvcc is of CUDA {version}, PyTorch {torch.__version__} of CUDA {torch.version.cuda}"
        # The headers and libraries that PyTorch's own headers want stand in the toolkit, or in the packages that pip
        # installed with PyTorch.
        packages = sorted((Path(torch.__file__).parent.parent / "nvidia").glob("*"))
        toolkit = cuda_build.toolkit(nvcc)
        headers = [toolkit / "include", *(package / "include" for package in packages)]
        folders = [toolkit / "lib64", *(package / "lib" for package in packages)]
        self.include_dirs = []
        for name in ("cuda_runtime_api.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h"):
            folder = cuda_build.find_header(name, headers)
            if folder is None:
                return f"{name} is in none of {', '.join(map(str, headers))}"
            if str(folder) not in self.include_dirs:
                self.include_dirs.append(str(folder))
        self.libraries = []
        for name in ("cudart", "cublas"):
            library = cuda_build.find_library(name, folders)
            if library is None:
                return f"lib{name}.so is in none of {', '.join(map(str, folders))}"
            self.libraries.append(str(library))
        self.architectures = cuda_build.supported(nvcc)
        if wanted := os.environ.get("FUSED_RNN_CUDA_ARCHS"):
            unknown = set(wanted.split(",")) - set(self.architectures)
            if unknown:
                fail(f"FUSED_RNN_CUDA_ARCHS: expected some of {','.join(self.architectures)}, got {wanted}")
            self.architectures = wanted.split(",")
        self.command = cuda_build.command(nvcc, prerequisites.compiler(), self.architectures)
        self.description = f"nvcc {version}"
        return None


def usable_cuda(torch) -> Cuda | None:
    """The toolkit to build CUDA kernels with, None to build without."""
    request = os.environ.get("FUSED_RNN_CUDA", "")
    if request not in ("", "0", "1"):
        fail(f"FUSED_RNN_CUDA: expected 0, 1 or nothing, got {request!r}")
    if request == "0":
        return None
    cuda = Cuda(torch)
    if cuda.problem and request == "1":
        fail(f"FUSED_RNN_CUDA=1, but {cuda.problem}")
    return None if cuda.problem else cuda


def write_kernels_ninja(folder: Path, macros: list[str], cuda: Cuda | None) -> list[str]:
    """Writes folder/build.ninja for csrc/cpu/*.cpp, csrc/stream/*.cpp and csrc/cuda/* and returns its objects."""
    flags_of = {ROOT / f"csrc/cpu/isa_{name}.cpp": flags for name, flags in instruction_sets().items()}
    known = {f"isa_{name}.cpp" for name in ALL_SETS}
    others = [file for file in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if file.name not in known]
    others += sorted((ROOT / "csrc/stream").glob("*.cpp"))
    # Of an inline function that several objects hold the linker keeps the first copy: the objects that every processor
    # can run come first, the widest instruction set last. The planner for CUDA is plain C++ and is always there.
    sources = [*others, *sorted((ROOT / "csrc/cuda").glob("*.cpp")), *flags_of]

    common = [*KERNEL_FLAGS, *optimisation_flags(), *macros, f"-I{ROOT / 'csrc'}"]
    lines = [
        "ninja_required_version = 1.3",
        "rule kernel",
        f"  command = {shlex.join(prerequisites.compiler())} {shlex.join(common)} $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in",
    ]
    objects = {source: str(folder / f"{source.parent.name}_{source.stem}.o") for source in sources}
    if cuda:
        # nvcc compiles for one architecture after the other unless it is told how many at once.
        threads = max(1, usable_processors() // len(cuda_build.sources()))
        lines += [
            "rule cuda",
            f"  command = {shlex.join(cuda.command)} --threads {threads} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $in",
        ]
        for source in cuda_build.sources():
            objects[source] = str(folder / f"cuda_{source.name}.o")
            lines.append(f"build {ninja_path(objects[source])}: cuda {ninja_path(source)}")
    # ninja starts them in this order: what takes longest first, lest one processor be busy with it alone in the end.
    all_dtypes = [ROOT / f"csrc/cpu/isa_{name}.cpp" for name in instruction_sets() if name not in BFLOAT16_ALONE]
    for source in reversed([*(source for source in sources if source not in all_dtypes), *all_dtypes]):
        lines.append(f"build {ninja_path(objects[source])}: kernel {ninja_path(source)}")
        lines.append(f"  isa = {shlex.join(flags_of.get(source, []))}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    return list(objects.values())


def ninja_path(path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def build_configuration(torch) -> dict:
    """`ext_modules` and `cmdclass` for setup()."""
    from setuptools.command.build_py import build_py
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    cuda = usable_cuda(torch)
    put_ninja_on_path()
    os.environ["CXX"] = shlex.join(prerequisites.compiler())
    os.environ["MAX_JOBS"] = str(usable_processors())
    macros = {f"FRNN_ISA_{name.upper()}": "1" for name in instruction_sets()}
    described = " ".join([*KERNEL_FLAGS, *optimisation_flags()])

    class BuildWithKernels(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # One folder for every way to build (pip gives each call a temporary one), so that every second build is
            # incremental; another for another Python, PyTorch or set of sanitizers, whose objects differ.
            variant = f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
            if cuda:
                variant += "-cuda-" + "-".join(cuda.architectures)
                if further := cuda_build.further_flags():
                    variant += "-" + hashlib.sha256(shlex.join(further).encode()).hexdigest()[:8]
            if sanitizers():
                variant += "-" + sanitizers().replace(",", "-")
            if "FUSED_RNN_ISAS" in os.environ:
                variant += "-" + "-".join(instruction_sets())
            self.build_temp = str(ROOT / "build" / "objects" / variant)

        def build_extensions(self):
            folder = Path(self.build_temp) / "kernels"
            objects = write_kernels_ninja(folder, [f"-D{name}={value}" for name, value in macros.items()], cuda)
            # stdout by its number: setuptools may have replaced sys.stdout by something without a file behind it.
            result = subprocess.run(["ninja", "-C", str(folder), "-j", str(usable_processors())], stdout=1, check=False)
            if result.returncode != 0:
                fail("compiling the kernels failed; the compiler's messages are above")
            self.extensions[0].extra_objects = objects
            try:
                super().build_extensions()
            except RuntimeError as error:
                fail(f"{error}; the compiler's messages are above")

        def run(self):
            super().run()
            if not self.inplace and os.environ.get("FUSED_RNN_LIBRARY") != "1":
                return
            folder = ROOT / "fused_rnn" if self.inplace else Path(self.build_lib) / "fused_rnn"
            sources = ["ops", "derivatives", "ensembles", "examples", "quantized", *(["ops_cuda"] if cuda else [])]
            objects = [str(Path(self.build_temp) / "csrc" / f"{source}.o") for source in sources]
            link_library(folder / LIBRARY, [*objects, *self.extensions[0].extra_objects], link)

    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")}
    of_sets = ";".join(f"{name}:{' '.join(flags)}" for name, flags in instruction_sets().items())
    definitions = [
        *macros.items(),
        ("FRNN_KERNEL_FLAGS", f'"{described}"'),
        ("FRNN_INSTRUCTION_SET_FLAGS", f'"{of_sets}"'),
    ]
    link = sanitizer_flags() or ["-Wl,--strip-debug"]
    if cuda:
        definitions += [
            ("FRNN_CUDA", f'"{" ".join([cuda.description, *cuda_build.further_flags()])}"'),
            ("FRNN_CUDA_ARCHS", f'"{",".join(cuda.architectures)}"'),
        ]
        # PyTorch has loaded these libraries when the extension is: no run path is needed.
        link = [*link, "-lc10_cuda", "-ltorch_cuda", *cuda.libraries]
    else:
        sources.remove("csrc/ops_cuda.cpp")
    extension = CppExtension(
        "fused_rnn._C",
        sorted(sources),
        include_dirs=[str(ROOT / "csrc"), *(cuda.include_dirs if cuda else [])],
        define_macros=definitions,
        # No -fopenmp here or at the link: libgomp must come from PyTorch, so that both share one pool of threads.
        extra_compile_args=["-fvisibility=hidden", *optimisation_flags()],
        extra_link_args=link,
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()),
    )

    class BuildWithHeaders(build_py):
        """Kernels of custom cells are compiled where the package is used (fused_rnn/compiling.py)."""

        def run(self):
            super().run()
            if getattr(self, "editable_mode", False):
                return
            for header in kernel_headers():
                target = Path(self.build_lib) / "fused_rnn" / header.relative_to(ROOT)
                self.mkpath(str(target.parent))
                self.copy_file(str(header), str(target))

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildWithKernels, "build_py": BuildWithHeaders}}


def link_library(result: Path, objects: list[str], flags: list[str]) -> None:
    """The same objects without those that use Python: what they leave out is gradients."""
    from torch.utils.cpp_extension import library_paths

    folders = [f"-L{folder}" for folder in library_paths()]
    libraries = ["-lc10", "-ltorch_cpu", "-ltorch", *flags, f"-Wl,-soname,{LIBRARY}"]
    command = [*prerequisites.compiler(), "-shared", "-o", str(result), *objects, *folders, *libraries]
    if subprocess.run(command, check=False).returncode != 0:
        fail(f"linking {LIBRARY} failed; the linker's messages are above")


def kernel_headers() -> list[Path]:
    return [
        ROOT / "csrc/problem.h",
        *sorted((ROOT / "csrc/cells").glob("*.h")),
        *sorted((ROOT / "csrc/cpu").glob("*.h")),
        *sorted((ROOT / "csrc/cuda").glob("*.h")),
        *sorted((ROOT / "csrc/cuda").glob("*.cuh")),
        *sorted((ROOT / "csrc/stream").glob("*.h")),
    ]


def main() -> None:
    metadata = {"license": "BSD-3-Clause", "install_requires": ["torch>={}.{}".format(*OLDEST_TORCH)]}
    # Source archives and metadata need neither a compiler nor PyTorch.
    if not {"sdist", "egg_info", "clean", "--version", "--help"} & set(sys.argv):
        torch = import_torch()
        # libtorch's C++ interface changes with every minor version: a binary works with the one it was built against.
        major, minor = torch.__version__.split(".")[:2]
        metadata |= {"install_requires": [f"torch=={major}.{minor}.*"], **build_configuration(torch)}
    setup(**metadata)


main()
