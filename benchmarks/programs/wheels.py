"""torchvision and torchaudio beside a CPU build of PyTorch.

Their wheels on PyPI hold libraries that are linked to PyTorch's CUDA build; beside another one these do not load, and
neither package can be imported. No program here calls what is in them, so both are imported without.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

_defined: list[torch.library.Library] = []  # an operator is gone with the library object that defined it


def import_without_cuda() -> None:
    """Let torchvision and torchaudio be imported where PyTorch is built without CUDA; harmless elsewhere."""
    if torch.version.cuda is not None or _defined:
        return
    # torchvision registers a formula of these operators' shapes, and for that they have to exist.
    _defined.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        _defined[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # torchaudio goes without its library where there is none, but not where there is one that does not load.
    none: Any = ModuleType("torchaudio._extension")
    none._IS_TORCHAUDIO_EXT_AVAILABLE = none._IS_ALIGN_AVAILABLE = False
    none.fail_if_no_align = lambda function: function
    none._check_cuda_version = lambda: None
    sys.modules["torchaudio._extension"] = none
