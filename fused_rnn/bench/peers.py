"""Who is measured: one small adapter for each implementation.

A new peer is a class with the four members of `Peer`, listed in `PEERS`. It imports its library inside its methods, so
that every peer stays optional.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .cases import DTYPES, Case

if TYPE_CHECKING:
    from ..explain import Explanation

Run = Callable[[], Any]

_TORCH_LAYERS: dict[str, type[nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
_TORCH_CELLS: dict[str, type[nn.Module]] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


class Problem:
    """The tensors of a case: the same numbers for every peer.

    Attributes:
        module: the `torch.nn` layer or cell that holds the weights.
        inputs: what its forward takes: (T, B, I); for a cell (B, I) and the state, (B, H) or a pair of them.
        grad_output: dL/d output for training, shaped like the first result.
        options: keyword arguments with which `module` was made.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        shape = case.shape
        self.case = case
        self.options: dict[str, Any] = {"input_size": shape.input_size, "hidden_size": shape.hidden_size}
        if not shape.single_step:
            self.options |= {"num_layers": shape.num_layers, "bidirectional": shape.bidirectional}
        dtype = DTYPES[case.dtype]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            table = _TORCH_CELLS if shape.single_step else _TORCH_LAYERS
            self.module = table[case.cell](**self.options).to(dtype)
            if shape.single_step:
                state = tuple(
                    torch.randn(shape.batch_size, shape.hidden_size).to(dtype)
                    for _ in range(2 if case.cell == "lstm" else 1)
                )
                features = torch.randn(shape.batch_size, shape.input_size).to(dtype)
                self.inputs: tuple[Any, ...] = (features, state if case.cell == "lstm" else state[0])
                outputs: tuple[int, ...] = (shape.batch_size, shape.hidden_size)
            else:
                self.inputs = (torch.randn(shape.seq_length, shape.batch_size, shape.input_size).to(dtype),)
                outputs = (shape.seq_length, shape.batch_size, shape.num_directions * shape.hidden_size)
            self.grad_output = torch.randn(outputs).to(dtype)
        self.module.train(case.training)
        for tensor in self.input_tensors():
            tensor.requires_grad_(case.training)

    def input_tensors(self) -> list[Tensor]:
        return list(tensors_of(self.inputs))

    def result_names(self) -> list[str]:
        """Name what `tensors_of` finds in the result of a run, in its order."""
        lstm = self.case.cell == "lstm"
        if self.case.shape.single_step:
            names = ["h", "c"] if lstm else ["h"]
            inputs = ["input", "h_0", "c_0"] if lstm else ["input", "h_0"]
        else:
            names = ["output", "h_n", "c_n"] if lstm else ["output", "h_n"]
            inputs = ["input"]
        if self.case.training:
            weights = [name for name, _ in self.module.named_parameters()]
            names += [f"gradient of {name}" for name in (*inputs, *weights)]
        return names

    def to(self, dtype: torch.dtype) -> "Problem":
        """Return the same numbers in another dtype."""
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module).to(dtype)
        flat = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self.input_tensors()]
        state = () if len(flat) == 1 else (tuple(flat[1:]) if len(flat) == 3 else flat[1],)
        other.inputs = (flat[0], *state)
        other.grad_output = self.grad_output.to(dtype)
        return other


def tensors_of(nested: Any) -> Iterator[Tensor]:
    """Walk the tensors of nested tuples in order."""
    if isinstance(nested, Tensor):
        yield nested
    else:
        for item in nested:
            yield from tensors_of(item)


class Peer(Protocol):
    """An implementation to measure."""

    name: str

    def available(self) -> bool:
        """Tell whether it can be used on this machine."""

    def supports(self, case: Case) -> bool:
        """Tell whether it can do what the case asks."""

    def make(self, problem: Problem) -> Run:
        """Return a call without arguments that computes the case once.

        Its result, nested as it likes, holds the tensors that `problem.result_names()` names, in that order. Grad mode
        is set by the caller, the thread count by `torch.set_num_threads`.
        """


def module_run(module: nn.Module, problem: Problem) -> Run:
    """Return the run of a module that is called as `torch.nn` calls it."""
    forward = functools.partial(module, *problem.inputs)
    if not problem.case.training:
        return forward
    wanted = [*problem.input_tensors(), *module.parameters()]

    def forward_backward() -> tuple[Any, ...]:
        results = forward()
        first = next(tensors_of(results))
        return results, torch.autograd.grad(first, wanted, problem.grad_output)

    return forward_backward


class TorchNN:
    name = "torch.nn"

    def available(self) -> bool:
        return True

    def supports(self, case: Case) -> bool:
        return True

    def make(self, problem: Problem) -> Run:
        return module_run(problem.module, problem)


class FusedRNN:
    name = "fused"

    def available(self) -> bool:
        return True

    def supports(self, case: Case) -> bool:
        return True

    def make(self, problem: Problem) -> Run:
        return module_run(self.module(problem), problem)

    def module(self, problem: Problem) -> nn.Module:
        """Return the fused layer with the problem's weights."""
        import fused_rnn

        name = type(problem.module).__name__
        module: nn.Module = getattr(fused_rnn, name)(**problem.options, dtype=DTYPES[problem.case.dtype])
        module.load_state_dict(problem.module.state_dict())
        return module.train(problem.case.training)

    def explain(self, problem: Problem) -> "Explanation":
        """Say which kernel runs the case, in the grad mode that holds."""
        import fused_rnn

        return fused_rnn.explain(self.module(problem), *problem.inputs)


FUSED = FusedRNN()
TORCH_NN = TorchNN()
PEERS: tuple[Peer, ...] = (FUSED, TORCH_NN)
