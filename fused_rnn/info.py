"""`python -m fused_rnn info`: what a bug report needs to say about the machine, the build and the choices made here."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# From the widest to the narrowest of each architecture: the first that is compiled in and the processor has is used.
_ARM = ("neon_bf16", "neon", "portable")
_X86 = ("avx512_amx", "avx512_bf16", "avx512", "avx2", "portable")
INSTRUCTION_SETS = _ARM if platform.machine().lower() in ("aarch64", "arm64") else _X86
ENVIRONMENT_VARIABLES = ("FUSED_RNN_BACKEND", "FUSED_RNN_ISA", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def collect() -> dict[str, Any]:
    """Everything that `info` prints, as plain dicts, lists, strings and numbers. Works without the compiled module."""
    kernels, reason = _load_kernels()
    build = kernels.build_info() if kernels else None
    sets, set_notes = _instruction_sets(kernels, build)
    cuda = _cuda(build)
    off = [f"CPU kernels: {reason}"] if reason else []
    off += _backend_notes() + _build_notes(build) + set_notes + _thread_notes()
    if cuda["why_off"]:
        off.append(f"CUDA: {cuda['why_off']}")
    return {
        "fused_rnn": {"version": _version(), "folder": str(Path(__file__).parent)},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "processor": processor_name(),
        "build": {key: _plain(value) for key, value in build.items()} if build else None,
        "instruction_sets": sets,
        "int8_products": _int8_products(kernels),
        "threads": {"torch": torch.get_num_threads(), "processors": usable_processors(), "machine": os.cpu_count()},
        "environment": {name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ},
        "cuda": cuda,
        "off": off,
    }


def render(report: dict[str, Any]) -> str:
    """`report`, as `collect` returns it, for reading: one `name: value` a line."""
    build, sets, threads, cuda = (report[key] for key in ("build", "instruction_sets", "threads", "cuda"))
    lines = [
        ("fused_rnn", f"{report['fused_rnn']['version']} in {report['fused_rnn']['folder']}"),
        ("Python", report["python"]),
        ("PyTorch", report["torch"]),
        ("system", report["system"]),
        ("processor", report["processor"]),
    ]
    if build:
        abi = "new" if build["cxx11_abi"] else "old"
        lines.append(("built", f"by {build['compiler']} for PyTorch {build['torch_version']}, {abi} C++ ABI"))
        lines.append(("flags", str(build["flags"])))
    else:
        lines.append(("built", "no"))
    lines += [
        ("instruction sets", f"compiled {_listed(sets['compiled'])}; on this processor {_listed(sets['supported'])}"),
        ("in use", sets["used"] or "none"),
        ("int8 products", report["int8_products"] or "none"),
        ("threads", f"{threads['torch']} (torch.get_num_threads()) on {threads['processors']} usable processors"),
        ("environment", _listed(f"{name}={value}" for name, value in report["environment"].items())),
        ("CUDA", f"kernels {_built_for(cuda)}; PyTorch's CUDA {cuda['torch'] or 'none'}"),
    ]
    lines += [("device", name) for name in cuda["devices"]]
    lines += [("off", note) for note in report["off"]]
    return "\n".join(f"{name + ':':18}{value}" for name, value in lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the report and returns the exit status: 0, whatever is off."""
    parser = argparse.ArgumentParser(prog="python -m fused_rnn info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return 0


def _load_kernels() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or None and the reason."""
    try:
        return importlib.import_module("fused_rnn._C"), None
    except ModuleNotFoundError:
        return None, "fused_rnn._C is not built; run `make build`, or pip install --no-build-isolation ."
    except ImportError as error:
        return None, f"fused_rnn._C does not load ({error}); was it built for another PyTorch? Build it again"


def _version() -> str:
    import fused_rnn

    return getattr(fused_rnn, "__version__", "unknown")


def _instruction_sets(kernels: ModuleType | None, build: dict[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """Instruction sets compiled, supported and used, and a note for each that is off."""
    if kernels is None or build is None:
        return {"compiled": [], "supported": [], "used": None}, []
    compiled, supported = list(build["isa_compiled"]), list(kernels.isa_supported())
    used, notes = None, []
    try:
        used = kernels.isa_used()
    except (RuntimeError, ValueError) as error:
        notes.append(f"CPU kernels: {error}")
    for name in INSTRUCTION_SETS:
        if name not in compiled:
            notes.append(f"{name}: not compiled in on {platform.machine()}")
        elif name not in supported:
            notes.append(f"{name}: this processor lacks it")
    best = next((name for name in INSTRUCTION_SETS if name in supported), None)
    if used is not None and used != best:
        notes.append(f"{best}: {used} is chosen by FUSED_RNN_ISA or set_isa")
    return {"compiled": compiled, "supported": supported, "used": used}, notes


def _int8_products(kernels: ModuleType | None) -> str | None:
    """By what instructions quantized layers multiply."""
    if kernels is None:
        return None
    if not kernels.multiplies_bytes():
        return "without dot products of bytes, which this processor or the set in use lacks"
    return f"dot products of bytes{', AMX tiles from 16 rows on' if kernels.multiplies_bytes_on_tiles() else ''}"


def _backend_notes() -> list[str]:
    if os.environ.get("FUSED_RNN_BACKEND") == "reference":
        return ["fused kernels: FUSED_RNN_BACKEND=reference"]
    return []


def _build_notes(build: dict[str, Any] | None) -> list[str]:
    def minor(version: str) -> list[str]:
        return version.split(".")[:2]

    if build and minor(build["torch_version"]) != minor(torch.__version__):
        return [f"built for PyTorch {build['torch_version']}, running with {torch.__version__}: build again"]
    return []


def _thread_notes() -> list[str]:
    threads, processors = torch.get_num_threads(), usable_processors()
    if threads > processors:
        return [
            f"full speed: {threads} threads share {processors} processors; call torch.set_num_threads({processors})"
        ]
    return []


def _cuda(build: dict[str, Any] | None) -> dict[str, Any]:
    kernels = bool(build and build["cuda"])
    available = torch.cuda.is_available()
    if not kernels:
        why_off = "the kernels were built without CUDA; tensors on a GPU run through the reference"
    elif not available:
        why_off = "PyTorch sees no CUDA device"
    else:
        why_off = None
    devices = [_device_name(index) for index in range(torch.cuda.device_count())] if available else []
    return {
        "kernels": kernels,
        "compiler": build["cuda_compiler"] if build else "",
        "architectures": build["cuda_architectures"].split(",") if build and kernels else [],
        "torch": torch.version.cuda,
        "devices": devices,
        "why_off": why_off,
    }


def _built_for(cuda: dict[str, Any]) -> str:
    """In words: which GPUs the kernels were compiled for, and by what."""
    if not cuda["kernels"]:
        return "not built"
    return f"built by {cuda['compiler']} for {_listed('sm_' + arch for arch in cuda['architectures'])}"


def _device_name(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_processors() -> int:
    """Processors this process may run on: fewer than the machine's under taskset or in some containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _listed(items: Any) -> str:
    return ", ".join(items) or "none"


if __name__ == "__main__":
    sys.exit(main())
