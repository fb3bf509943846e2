"""Who takes part on a GPU: the fused layers, cuDNN (torch.nn), and FlashRNN and haste where they can be imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fused_rnn

from .gpu_cases import DTYPES, NUM_GATES, GpuCase

# Runs the pass once: outputs, then gradients where they were asked for.
Run = Callable[[], list[Tensor]]


class Problem:
    """Weights, input and gradient of one case, on the GPU; the same numbers for all.

    Args:
        case: sizes and dtype.
        values: weights, input and gradient are those of this problem, in the dtype of `case`; else random.
    """

    def __init__(self, case: GpuCase, values: Problem | None = None) -> None:
        self.case = case
        self.dtype = DTYPES[case.dtype]
        torch.manual_seed(0)
        self.twin = self.layer(nn)
        if values is None:
            self.input = self._random(case.input_size)
            self.grad = self._random(case.num_directions * case.state_size)
        else:
            self.twin.load_state_dict(values.twin.state_dict())
            self.input, self.grad = values.input.to(self.dtype), values.grad.to(self.dtype)

    def _random(self, width: int) -> Tensor:
        """Normal numbers that all dtypes hold."""
        return torch.randn(self.case.seq_length, self.case.batch_size, width, device="cuda").bfloat16().to(self.dtype)

    def layer(self, library: Any) -> nn.Module:
        case = self.case
        made: nn.Module = getattr(library, case.cell.upper())(
            case.input_size,
            case.hidden_size,
            num_layers=case.num_layers,
            bidirectional=case.bidirectional,
            dtype=self.dtype,
            device="cuda",
            **({"proj_size": case.proj_size} if case.proj_size else {}),
        )
        return made

    def run_of(self, module: Callable[[Tensor], Any], leaves: list[Tensor], training: bool) -> Run:
        """The pass of a module that takes (T, B, I) and returns its output first."""
        sequence = self.input.detach().requires_grad_(training)

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [module(sequence)[0]]

        def both() -> list[Tensor]:
            output = module(sequence)[0]
            return [output.detach(), *torch.autograd.grad(output, [sequence, *leaves], self.grad)]

        return both if training else forward


def fused(problem: Problem, training: bool) -> Run:
    layer = problem.layer(fused_rnn)
    layer.load_state_dict(problem.twin.state_dict())
    return problem.run_of(layer, list(layer.parameters()), training)


def cudnn(problem: Problem, training: bool) -> Run:
    """torch.nn as fast as it can be: weights in one piece, and without gradients as a program would infer, in eval().

    In training mode cuDNN saves what a backward pass needs, whether one can follow or not.
    """
    module = problem.twin
    flatten_weights(module)
    module.train(training)
    return problem.run_of(module, list(module.parameters()), training)


def flatten_weights(module: nn.Module) -> None:
    """Weights in one piece of memory, in bfloat16 too: torch.nn leaves those as they are, and copies them each call."""
    known = torch.backends.cudnn.CUDNN_TENSOR_DTYPES
    added = {torch.bfloat16} - known
    known |= added
    try:
        module.flatten_parameters()  # type: ignore[operator]
    except RuntimeError as error:
        print(f"  weights stay in pieces: {error}", file=sys.stderr)
    finally:
        known -= added


def runs_on_cudnn(problem: Problem) -> bool:
    """Whether torch.nn takes cuDNN for this problem: what its gradients come from says so."""
    waiting = [problem.twin(problem.input[:1].detach().requires_grad_())[0].grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and "cudnn" in node.name().lower():
            return True
        waiting += [] if node is None else [before for before, _ in node.next_functions]
    return False


def flashrnn(problem: Problem, training: bool) -> Run:
    """https://github.com/NX-AI/flashrnn: the recurrence by its fused CUDA kernel, the projection by a matrix product.

    It has weights of its own: its numbers are not compared, only timed. It compiles a kernel for each shape.
    """
    case = problem.case
    if case.cell != "lstm" or case.num_layers > 1 or case.bidirectional or case.proj_size:
        raise NotImplementedError("one LSTM layer in one direction")
    kernel = importlib.import_module("flashrnn.flashrnn").flashrnn
    gates, hidden = NUM_GATES[case.cell], case.hidden_size
    options = {"device": "cuda", "dtype": problem.dtype, "requires_grad": training}
    w_ih = torch.randn(gates * hidden, case.input_size, **options)  # type: ignore[call-overload]
    recurrent = torch.randn(gates, 1, hidden, hidden, **options)  # type: ignore[call-overload]
    bias = torch.zeros(gates, 1, hidden, **options)  # type: ignore[call-overload]

    def module(sequence: Tensor) -> Any:
        projected = nn.functional.linear(sequence.transpose(0, 1), w_ih)
        projected = projected.reshape(case.batch_size, case.seq_length, gates, 1, hidden)
        states = kernel(projected, recurrent, bias, function="lstm", backend="cuda_fused", dtype=case.dtype)[0]
        return (states[0].reshape(case.batch_size, case.seq_length, hidden).transpose(0, 1),)

    return problem.run_of(module, [w_ih, recurrent, bias], training)


def haste(problem: Problem, training: bool) -> Run:
    """https://github.com/lmnt-com/haste: float32 and float64. It has weights of its own: timed, not compared."""
    case = problem.case
    has_more = case.num_layers > 1 or case.bidirectional or case.proj_size
    if case.cell not in ("lstm", "gru") or has_more or case.dtype != "float32":
        raise NotImplementedError("one LSTM or GRU layer in one direction, float32")
    library = importlib.import_module("haste_pytorch")
    layer = getattr(library, case.cell.upper())(input_size=case.input_size, hidden_size=case.hidden_size).cuda()
    return problem.run_of(layer, list(layer.parameters()), training)


FUSED, CUDNN = "fused", "cuDNN"
PEERS: dict[str, Callable[[Problem, bool], Run]] = {CUDNN: cudnn, FUSED: fused, "FlashRNN": flashrnn, "haste": haste}


def importable() -> list[str]:
    """Names of the contestants that are installed here."""
    needed = {"FlashRNN": "flashrnn", "haste": "haste_pytorch"}
    found = []
    for name in PEERS:
        try:
            if name in needed:
                importlib.import_module(needed[name])
        except Exception:  # an extension that was built for another PyTorch fails in many ways
            continue
        found.append(name)
    return found
