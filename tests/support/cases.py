"""Calls of layers and cells as data: what to build, what to feed it, and what comes back with all gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn.check import fill_with_small_integers_, random_values

CELLS = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")


def constructor_of(library: Any, cell: str, suffix: str = "") -> tuple[type[nn.Module], dict[str, Any]]:
    """Class of `cell` in `library` (torch.nn or fused_rnn) and the keyword that selects the nonlinearity."""
    name, _, nonlinearity = cell.partition("_")
    return getattr(library, name + suffix), {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}


class _AnyCase:
    """What layers and cells have in common: values, twins and how a call's arguments are made of leaves."""

    cell: str
    dtype: torch.dtype

    @property
    def integers(self) -> bool:
        """Values with which ReLU computes exactly; see `fill_with_small_integers_`."""
        return self.cell == "RNN_RELU" and self.dtype != torch.float64

    @property
    def has_cell_state(self) -> bool:
        return self.cell == "LSTM"

    @property
    def sequence_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def state_shapes(self) -> list[tuple[int, ...]]:
        """Of the states that the call is given: none, h_0, or h_0 and c_0."""
        raise NotImplementedError

    def construct(self, library: Any) -> nn.Module:
        raise NotImplementedError

    def argument(self, sequence: Tensor) -> Tensor | PackedSequence:
        """The `input` of the call, a differentiable function of the leaf."""
        raise NotImplementedError

    def outputs(self, result: Any) -> dict[str, Tensor]:
        """The tensors of a result by name."""
        raise NotImplementedError

    def replace(self, **changes: Any) -> Any:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def build(self, library: Any, *, seed: int = 0) -> nn.Module:
        """The module of torch.nn or fused_rnn, its parameters drawn from `seed`."""
        torch.manual_seed(seed)
        module = self.construct(library)
        return fill_with_small_integers_(module, seed=seed) if self.integers else module

    def twins(self, *, seed: int = 0) -> tuple[nn.Module, nn.Module]:
        """The fused module and torch.nn's, with equal parameters."""
        return self.build(fused_rnn, seed=seed), self.build(nn, seed=seed)

    def data(self, *, seed: int = 1) -> Data:
        """Random input and states, leaves that require gradients, in the case's dtype."""
        generator = torch.Generator().manual_seed(seed)

        def leaf(shape: tuple[int, ...]) -> Tensor:
            values = random_values(shape, integers=self.integers, generator=generator)
            return values.to(self.dtype).requires_grad_()

        return Data(self, leaf(self.sequence_shape), tuple(leaf(shape) for shape in self.state_shapes))


@dataclasses.dataclass(frozen=True)
class Case(_AnyCase):
    """A call of a layer. Sizes are those of a (T, B, I) input, whatever `batch_first` says."""

    cell: str = "LSTM"
    input_size: int = 5
    hidden_size: int = 7
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj: bool = False
    batch_first: bool = False
    packing: str = "padded"
    batch: int = 4
    steps: int = 6
    hx: bool = False
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        options = [name for name in ("proj", "batch_first", "hx") if getattr(self, name)]
        options += [] if self.bias else ["nobias"]
        options += [] if self.packing == "padded" else [self.packing]
        sizes = f"T{self.steps}B{self.batch}I{self.input_size}H{self.hidden_size}"
        stack = f"L{self.num_layers}" + ("x2" if self.bidirectional else "")
        return "-".join([self.cell, str(self.dtype).removeprefix("torch."), sizes, stack, *options])

    @property
    def proj_size(self) -> int:
        return max(1, self.hidden_size // 2) if self.proj else 0

    @property
    def sequence_shape(self) -> tuple[int, ...]:
        return self.steps, self.batch, self.input_size

    @property
    def state_shapes(self) -> list[tuple[int, ...]]:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        shapes = [(rows, self.batch, self.proj_size or self.hidden_size)]
        if self.has_cell_state:
            shapes.append((rows, self.batch, self.hidden_size))
        return shapes if self.hx else []

    @property
    def lengths(self) -> list[int]:
        """Valid steps of each row when packed: the longest first, the shortest is one step."""
        return [max(1, self.steps - (self.steps * row) // self.batch) for row in range(self.batch)]

    def construct(self, library: Any) -> nn.Module:
        layer_type, keywords = constructor_of(library, self.cell)
        if self.proj:
            keywords["proj_size"] = self.proj_size
        return layer_type(
            self.input_size,
            self.hidden_size,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            dtype=self.dtype,
            **keywords,
        )

    def argument(self, sequence: Tensor) -> Tensor | PackedSequence:
        if self.batch_first:
            sequence = sequence.transpose(0, 1)
        if self.packing == "padded":
            return sequence
        lengths = self.lengths
        if self.packing == "unsorted":
            # a rotation is not its own inverse: mixing up sorted and unsorted indices shows
            shift = self.batch // 3 + 1
            lengths = lengths[shift:] + lengths[:shift]
        return pack_padded_sequence(
            sequence, torch.tensor(lengths), batch_first=self.batch_first, enforce_sorted=self.packing == "sorted"
        )

    def outputs(self, result: Any) -> dict[str, Tensor]:
        output, states = result
        states = states if isinstance(states, tuple) else (states,)
        data = output.data if isinstance(output, PackedSequence) else output
        return {"output": data} | dict(zip(("h_n", "c_n"), states, strict=False))


@dataclasses.dataclass(frozen=True)
class CellCase(_AnyCase):
    """One step of a cell. `batch` None is an unbatched call."""

    cell: str = "LSTM"
    input_size: int = 5
    hidden_size: int = 7
    bias: bool = True
    batch: int | None = 4
    hx: bool = True
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        options = ["hx"] if self.hx else []
        options += [] if self.bias else ["nobias"]
        sizes = ("" if self.batch is None else f"B{self.batch}") + f"I{self.input_size}H{self.hidden_size}"
        return "-".join([self.cell + "Cell", str(self.dtype).removeprefix("torch."), sizes, *options])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return () if self.batch is None else (self.batch,)

    @property
    def sequence_shape(self) -> tuple[int, ...]:
        return *self.batch_shape, self.input_size

    @property
    def state_shapes(self) -> list[tuple[int, ...]]:
        count = 2 if self.has_cell_state else 1
        return [(*self.batch_shape, self.hidden_size)] * count if self.hx else []

    def construct(self, library: Any) -> nn.Module:
        cell_type, keywords = constructor_of(library, self.cell, "Cell")
        return cell_type(self.input_size, self.hidden_size, bias=self.bias, dtype=self.dtype, **keywords)

    def argument(self, sequence: Tensor) -> Tensor:
        return sequence

    def outputs(self, result: Any) -> dict[str, Tensor]:
        return dict(zip(("h", "c"), result if isinstance(result, tuple) else (result,), strict=False))


@dataclasses.dataclass(frozen=True)
class Data:
    """Leaves of one call and the arguments made of them."""

    case: Any
    sequence: Tensor
    states: tuple[Tensor, ...]

    def to(self, target: torch.dtype | str) -> Data:
        """The very same values (no rounding when a dtype is wider) as new leaves, of a dtype or on a device."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(target, copy=True).requires_grad_()

        return Data(self.case, copy(self.sequence), tuple(copy(state) for state in self.states))

    @property
    def input(self) -> Tensor | PackedSequence:
        return self.case.argument(self.sequence)

    @property
    def hx(self) -> Tensor | tuple[Tensor, ...] | None:
        if not self.states:
            return None
        return self.states if self.case.has_cell_state else self.states[0]

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"input": self.sequence} | dict(zip(("h_0", "c_0"), self.states, strict=False))


def incoming_gradients(outputs: Sequence[Tensor], *, integers: bool = False, seed: int = 2) -> list[Tensor]:
    """A gradient of its own for every output element: the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [random_values(x.shape, integers=integers, generator=generator).to(x) for x in outputs]


def run(module: nn.Module, data: Data, *, gradients: bool = True, **options: Any) -> dict[str, Tensor]:
    """Outputs, and the gradient of every leaf and parameter under `grad(name)`; `options` are the call's."""
    outputs = data.case.outputs(module(data.input, data.hx, **options))
    return with_gradients(module, data, outputs) if gradients else detached(outputs)


def detached(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: output.detach() for name, output in outputs.items()}


def with_gradients(module: nn.Module, data: Data, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of a call, and the gradients that `run` gives."""
    leaves = data.leaves | dict(module.named_parameters())
    incoming = incoming_gradients(list(outputs.values()), integers=data.case.integers)
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), incoming)
    return detached(outputs) | {f"grad({name})": gradient for name, gradient in zip(leaves, found, strict=True)}
