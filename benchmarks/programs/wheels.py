"""torchvision and torchaudio beside a CPU build of PyTorch.

Their wheels on PyPI hold libraries that are linked to PyTorch's CUDA build; beside another one these do not load, and
neither package can be imported. No program here calls what is in them, so both are imported without.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_defined: list[torch.library.Library] = []  # an operator is gone with the library object that defined it


@functools.cache
def import_without_libraries() -> None:
    """Import torchvision and torchaudio, as far as they are installed, whether their libraries load or not."""
    for package, do_without in (("torchvision", _torchvision_without), ("torchaudio", _torchaudio_without)):
        import_or_do_without(package, do_without)


def import_or_do_without(package: str, do_without: Callable[[], None]) -> None:
    """Import a package if it is installed; if its library does not load, do without and import it again."""
    if importlib.util.find_spec(package) is None:
        return
    try:
        importlib.import_module(package)
    except (OSError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        do_without()
        importlib.import_module(package)


def _torchvision_without() -> None:
    # It registers a formula of these operators' shapes, and for that they have to exist.
    _defined.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        _defined[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _torchaudio_without() -> None:
    # It goes without its library where there is none, but not where there is one that does not load.
    none: Any = ModuleType("torchaudio._extension")
    none._IS_TORCHAUDIO_EXT_AVAILABLE = none._IS_ALIGN_AVAILABLE = False
    none.fail_if_no_align = lambda function: function
    none._check_cuda_version = lambda: None
    sys.modules["torchaudio._extension"] = none
