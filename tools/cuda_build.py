"""How the CUDA kernels are compiled, for setup.py, `make cuda-compile` and `make cuda-link`. Standard library only."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Machine code for these: Ampere and Ada (8.0 runs on 8.6 and 8.9), Hopper, data centre Blackwell, consumer Blackwell.
ARCHITECTURES = ("80", "90a", "100", "120")
# And intermediate code, which drivers compile for what is in none of the families above.
PTX = "100"

FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xfatbin=-compress-all", f"-I{ROOT / 'csrc'}"]
# -Xcompiler: what applies to the host's half of a source.
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


def sources() -> list[Path]:
    """What the extension is made of."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def programs() -> list[Path]:
    """Programs of their own, which need no PyTorch."""
    return sorted((ROOT / "csrc" / "cuda" / "programs").glob("*.cu"))


def further_flags() -> list[str]:
    """Of FUSED_RNN_NVCC_FLAGS."""
    return shlex.split(os.environ.get("FUSED_RNN_NVCC_FLAGS", ""))


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of the usual folder; None when there is none."""
    home = os.environ.get("CUDA_HOME")
    folders = [os.path.join(home, "bin")] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def nvcc_version(nvcc: str) -> str:
    """Like "13.0"."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else "?"


def supported(nvcc: str) -> list[str]:
    """Those of ARCHITECTURES that this nvcc knows: the two Blackwells since 12.8."""
    text = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", text))
    return [arch for arch in ARCHITECTURES if arch.rstrip("a") in known]


def code_flags(architectures: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX where PTX's own is among them."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    return flags + ([f"-gencode=arch=compute_{PTX},code=compute_{PTX}"] if PTX in architectures else [])


def command(nvcc: str, compiler: list[str], architectures: list[str]) -> list[str]:
    """nvcc with everything but the files."""
    host = [f"-Xcompiler={flag}" for flag in [*compiler[1:], *HOST_FLAGS]]
    return [nvcc, f"-ccbin={compiler[0]}", *FLAGS, *further_flags(), *host, *code_flags(architectures)]


def toolkit(nvcc: str) -> Path:
    """The folder with bin, include and lib64 that nvcc belongs to."""
    text = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True)
    match = re.search(r"^#\$ TOP=(.*)$", text.stderr, re.MULTILINE)
    return Path(match.group(1)).resolve() if match else Path(nvcc).resolve().parent.parent


def find_header(name: str, folders: list[Path]) -> Path | None:
    """The first folder that has the header."""
    return next((folder for folder in folders if (folder / name).exists()), None)


def find_library(name: str, folders: list[Path]) -> Path | None:
    """lib<name>.so, or the newest lib<name>.so.<major>, in the first folder that has one."""
    for folder in folders:
        found = sorted(folder.glob(f"lib{name}.so")) or sorted(folder.glob(f"lib{name}.so.*"))
        if found:
            return found[-1]
    return None
