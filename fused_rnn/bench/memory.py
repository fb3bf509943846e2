"""What autograd keeps between forward and backward."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cases import CELLS, Case, Shape
from .peers import FUSED, TORCH_NN, Problem

SHAPE = Shape("memory", 32, 512, 256, 256, part="memory")
CASES = tuple(Case(SHAPE, cell, "training", "float32") for cell in CELLS)


@dataclass(frozen=True)
class Saved:
    """Bytes saved for the backward pass by contestant, without input and parameters."""

    case: Case
    bytes_saved: dict[str, int]

    @property
    def share(self) -> float:
        """Bytes of the fused layer over those of `torch.nn`."""
        return self.bytes_saved[FUSED.name] / self.bytes_saved[TORCH_NN.name]


def measure(case: Case) -> Saved:
    problem = Problem(case)
    modules = {FUSED.name: FUSED.module(problem), TORCH_NN.name: problem.module}
    return Saved(case, {name: _bytes_saved(module, problem) for name, module in modules.items()})


def _bytes_saved(module: nn.Module, problem: Problem) -> int:
    given = {_address(tensor) for tensor in (*problem.input_tensors(), *module.parameters())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor  # kept by the graph, so that no other tensor gets its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = module(*problem.inputs)
    del results
    return sum(size for address, size in found.items() if address not in given)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
