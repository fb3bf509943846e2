"""Builds of the extension for `make gpu`, side by side, each put in its place before a phase that needs it.

- plain: what is measured, with line numbers for the profiler.
- limited: every wait in a kernel gives up after some two seconds and says where (FRNN_WAIT_LIMIT in device.h). It takes
  a few registers and is not measured; the first calls and the tests run on it.
- cpu: without CUDA, with the kernels of all instruction sets, for what a run shows of the processor.

One file of the first two, built.tar.gz, spares the next call on the same sources the build. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from gpu_phases import ROOT, Phase, python

FOLDER = ROOT / "build" / "gpu"
# Some two seconds of clock cycles: a thousand times what any wait of a call in the tests takes.
WAIT_LIMIT = 4_000_000_000


@dataclass(frozen=True)
class Kind:
    name: str
    environment: dict[str, str]

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    def library(self) -> Path | None:
        """The extension of this kind, if it was built."""
        found = sorted((self.folder / "fused_rnn").glob("_C*.so"))
        return found[-1] if found else None


# Of the kernels for the CPU the portable ones alone: a GPU run needs none, and the others take longest to build.
_GPU = {"FUSED_RNN_CUDA": "1", "FUSED_RNN_ISAS": "portable"}
KINDS = {
    kind.name: kind
    for kind in (
        Kind("plain", _GPU | {"FUSED_RNN_NVCC_FLAGS": "-lineinfo"}),
        Kind("limited", _GPU | {"FUSED_RNN_NVCC_FLAGS": f"-DFRNN_WAIT_LIMIT={WAIT_LIMIT}"}),
        Kind("cpu", {"FUSED_RNN_CUDA": "0"}),
    )
}
# What takes the place of one that could not be built. Times of the limited one are upper bounds.
INSTEAD = {"limited": "plain", "plain": "limited"}


def build_phase(name: str, budget: float, **options: object) -> Phase:
    """Leaves nothing of an older build behind where it fails."""
    kind = KINDS[name]
    command = python("setup.py", "build_ext", "--build-lib", str(kind.folder))
    phase = Phase(f"build {name}", command, budget, environment=kind.environment)
    for option, value in options.items():
        setattr(phase, option, value)
    return phase


def sources_key() -> str:
    """Of everything that a build is made from, and of the Python, the PyTorch and the GPU that it is for."""
    digest = hashlib.sha256()
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    for path in [*sorted(files), ROOT / "setup.py", ROOT / "tools" / "cuda_build.py"]:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    digest.update(f"{sys.version} {_torch_version()} {os.environ.get('FUSED_RNN_CUDA_ARCHS')}".encode())
    return digest.hexdigest()


def _torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none"


def pack(path: Path) -> None:
    """Those for a GPU that are there, and what they were built from."""
    found = [(kind, kind.library()) for kind in KINDS.values() if kind.name != "cpu"]
    if not any(library for _, library in found):
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "key.txt").write_text(sources_key())
    new = path.with_name(path.name + ".new")
    with tarfile.open(new, "w:gz") as archive:
        archive.add(FOLDER / "key.txt", "key.txt")
        for kind, library in found:
            if library:
                archive.add(library, f"{kind.name}/fused_rnn/{library.name}")
    new.replace(path)


def unpack(path: Path) -> str:
    """Puts what `pack` wrote in its place; says why not, or "" if it is there."""
    try:
        with tarfile.open(path) as archive:
            members = {member.name: archive.extractfile(member) for member in archive.getmembers() if member.isfile()}
            read = {name: file.read() for name, file in members.items() if file}
    except (OSError, tarfile.TarError, EOFError) as error:
        return f"{path}: {error}"
    if read.pop("key.txt", b"").decode(errors="replace") != sources_key():
        return f"{path}: built from other sources, or for another Python, PyTorch or GPU"
    for name, data in read.items():
        kind, _, file = name.partition("/fused_rnn/")
        if kind not in KINDS or "/" in file or not file.startswith("_C"):
            return f"{path}: {name} is none of its files"
        target = KINDS[kind].folder / "fused_rnn" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return ""


def forget() -> None:
    """Removes what earlier runs have built, but for the compiler's objects."""
    for kind in KINDS.values():
        shutil.rmtree(kind.folder, ignore_errors=True)


def install(name: str, package: Path = ROOT / "fused_rnn") -> str:
    """Makes this build the package's, or the one that takes its place; returns which it is, "" if there is none."""
    for candidate in (name, INSTEAD.get(name, "")):
        library = KINDS[candidate].library() if candidate else None
        if library:
            new = package / f"{library.name}.new"
            shutil.copyfile(library, new)
            os.replace(new, package / library.name)
            return candidate
    return ""
