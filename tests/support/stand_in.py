"""The CPU in the place of a GPU: what programs for a GPU ask of PyTorch, so that every line of them runs without one.

Tensors for "cuda" are made on the CPU, events read its clock, plans are those for an H200. What is computed and how
long it takes says nothing of a GPU. `pytest -p support.stand_in -m cuda` runs the tests for a GPU in this way; those of
graphs, of TF32 and of what a device is called cannot pass.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fused_rnn import _C, ops

H200 = {
    "arch": 90,
    "sms": 132,
    "shared_per_block": 232448,
    "shared_per_sm": 233472,
    "registers_per_sm": 65536,
    "l2_bytes": 50 << 20,
    "max_cluster": 16,
    "cooperative": True,
    "clock_khz": 1980000,
}


def _on_cpu(value: Any) -> Any:
    """The CPU for a CUDA device, everything else as it is."""
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **kwargs)


class Event:
    """torch.cuda.Event, on the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.seconds - self.seconds) * 1e3


class Stream:
    """torch.cuda.Stream: everything is done when it is asked for."""

    def wait_stream(self, stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Graph:
    """torch.cuda.CUDAGraph: what was captured has run, a replay is nothing."""

    def replay(self) -> None:
        pass


class Memory:
    """What the allocator would count: nothing of it is measured."""

    allocated = 1 << 20

    def peak(self, *device: Any) -> int:
        return self.allocated + 4096


def _plan_of_h200(
    kind: int, T: int, B: int, input_size: int, hidden_size: int, state_size: int, directions: int, dtype: int,
    backward: bool, device: int, layers: int = 1, options: bool = False,
) -> dict[str, Any]:  # fmt: skip
    assert device == 0 and not options
    return _C.cuda_plan_for(
        kind, T, B, input_size, hidden_size, state_size, directions, dtype, backward, H200,
        torch.backends.cudnn.allow_tf32, layers,
    )  # fmt: skip


class _Allowed:
    """What `_C.cuda_allow` was told last; the plans here do not follow it."""

    def __init__(self) -> None:
        self.now: dict[str, Any] = dict.fromkeys(("block", "cluster", "grid", "none", "counted", "barriers"), True) | {
            "layers": 0
        }

    def __call__(self, **changes: Any) -> dict[str, Any]:
        before, self.now = self.now, self.now | changes
        return before


def _nothing(*args: Any, **keywords: Any) -> None:
    pass


@contextlib.contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, PyTorch and fused_rnn say that there is a GPU, and what is sent to it stays on the CPU."""
    memory = Memory()
    cuda: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "Event": Event,
        "memory_allocated": lambda *device: memory.allocated,
        "max_memory_allocated": memory.peak,
        "reset_peak_memory_stats": _nothing,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": lambda graph: contextlib.nullcontext(),
        "set_sync_debug_mode": _nothing,
        "_sleep": _nothing,
        "mem_get_info": lambda *device: (1 << 30, 1 << 30),
        "get_device_name": lambda *device: "a stand-in",
        "get_device_capability": lambda *device: (9, 0),
        "get_device_properties": lambda *device: SimpleNamespace(
            name="a stand-in", multi_processor_count=132, total_memory=1 << 37
        ),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    plan = ops.plan
    monkeypatch.setattr(ops, "plan", lambda *args, **keywords: plan(*args, **keywords | {"device": _DEVICE}))
    monkeypatch.setattr(_C, "cuda_plan", _plan_of_h200, raising=False)
    monkeypatch.setattr(_C, "cuda_barrier", _nothing, raising=False)
    monkeypatch.setattr(_C, "cuda_allow", _Allowed(), raising=False)
    build = {**_C.build_info(), "cuda": True, "cuda_compiler": "nvcc", "cuda_architectures": "90a"}
    monkeypatch.setattr(_C, "build_info", lambda: build)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda module, *device: module)
    to = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module,
        "to",
        lambda module, *args, **keywords: to(
            module, *map(_on_cpu, args), **{name: _on_cpu(value) for name, value in keywords.items()}
        ),
    )
    with _OnCpu():
        yield


_DEVICE = torch.device("cuda:0")
_until_the_end = contextlib.ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin: from here to the end of the process."""
    _until_the_end.enter_context(gpu(pytest.MonkeyPatch()))
