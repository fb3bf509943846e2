"""vmap of the operators: examples as rows of one batch, models of an ensemble stacked, or one call after the other.

:mod:`fused_rnn.ops` imports this once the extension has brought the operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_map

from .settings import INTEGER_SETTINGS, Controls, Within, kind_of

__all__ = ["num_states_behind", "register", "row_dim", "row_dims_of_controls", "take_derivatives", "transforms"]

HasKernels = Callable[[Tensor, int], bool]

_rnn_forward = torch.ops.fused_rnn.rnn_forward.default
_rnn_backward = torch.ops.fused_rnn.rnn_backward.default
_cell_forward = torch.ops.fused_rnn.cell_forward.default
_cell_backward = torch.ops.fused_rnn.cell_backward.default
_rnn_backward_each = torch.ops.fused_rnn.rnn_backward_each.default
_rnn_forward_stacked = torch.ops.fused_rnn.rnn_forward_stacked.default
_rnn_backward_stacked = torch.ops.fused_rnn.rnn_backward_stacked.default
_draw_bits = torch.ops.fused_rnn.draw_bits.default


def transforms() -> list[Any]:
    """Transforms of torch.func that are at work, the innermost last."""
    return torch._C._functorch.get_interpreter_stack() or []


def take_derivatives(transforms: Sequence[Any]) -> bool:
    kinds = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    return any(transform.key() in kinds for transform in transforms)


def _loop_over_examples(operator: Any, info: Any, in_dims: Any, args: Any) -> tuple[Any, Any]:
    """One call per example, results stacked."""

    def of_example(value: Any, dim: Any, index: int) -> Any:
        if dim is None:
            return value
        if isinstance(value, (list, tuple)):
            return [of_example(each, of_each, index) for each, of_each in zip(value, dim, strict=True)]
        return value.select(dim, index).contiguous()  # what was saved for several examples at once stands in between

    calls = [
        operator(*[of_example(value, dim, index) for value, dim in zip(args, in_dims, strict=True)])
        for index in range(info.batch_size)
    ]
    stacked = tree_map(lambda *results: torch.stack(results), *calls)
    return stacked, tree_map(lambda _: 0, stacked)


def _register_batching_rule(operator: torch._ops.OpOverload, rule: Callable[..., Any] | None = None) -> None:
    """vmap of an operator: by ``rule(info, in_dims, *args)``, or one call per example where that gives None."""

    def batched(info: Any, in_dims: Any, *args: Any) -> Any:
        result = None if rule is None else rule(info, in_dims, *args)
        return _loop_over_examples(operator, info, in_dims, args) if result is None else result

    torch.library.register_vmap(operator.name(), batched)


class _Examples:
    """Examples of vmap as neighbouring rows of a batch: row b * V + v is row b of example v."""

    def __init__(self, count: int) -> None:
        self.count = count

    def fold(self, t: Tensor | None, dim: int | None, rows: int) -> Tensor | None:
        """All examples of t at once, whose dimension ``rows`` is that of its rows; no tensor stays none."""
        if t is None:
            return None
        if _is_nothing(t, dim):
            return t.new_empty(0)
        if dim is None:
            t = t.unsqueeze(rows + 1).expand(*t.shape[: rows + 1], self.count, *t.shape[rows + 1 :])
        else:
            t = t.movedim(dim, rows + 1)
        return t.flatten(rows, rows + 1)

    def unfold(self, t: Tensor, rows: int) -> tuple[Tensor, int | None]:
        """t with a dimension of examples, and which that is; None for (0,), an operator's word for no tensor."""
        if t.dim() == 1:
            return t, None
        return t.unflatten(rows, (t.shape[rows] // self.count, self.count)), rows + 1


def _is_nothing(t: Tensor, dim: int | None = None) -> bool:
    """Whether it is (0,), an operator's word for no tensor, in each example."""
    shape = list(t.shape)
    if dim is not None:
        del shape[dim]
    return shape == [0]


def _with_dims(pairs: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    results, dims = zip(*pairs, strict=True)
    return results, dims


def _is_forward_mode() -> bool:
    """Whether some level takes tangents, for which the operators of models and of gradients per example have none."""
    return forward_ad._current_level >= 0


def _are_models(input: Tensor, params: Sequence[int | None], controls: Sequence[Tensor]) -> bool:
    """Whether examples have parameters of their own, and the operators of such models take the call."""
    stacked = any(dim is not None for dim in params)
    return stacked and not controls and input.device.type == "cpu" and not _is_forward_mode()


def _stack(info: Any, t: Any, dim: Any) -> Any:
    """Tensors, or a list of them, with the models as the first dimension; None and (0,) as they are."""
    if isinstance(t, (list, tuple)):
        return [_stack(info, each, of_each) for each, of_each in zip(t, dim, strict=True)]
    if t is None or (dim is None and t.dim() == 1 and t.numel() == 0):
        return t
    return t.unsqueeze(0).expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)


def _with_dims_of_models(results: Any) -> tuple[Any, Any]:
    return results, tree_map(lambda t: None if t.dim() == 1 and t.numel() == 0 else 0, results)


def _has_gradients_each(has_kernels: HasKernels, input: Tensor, integers: Sequence[int]) -> bool:
    """Whether ``rnn_backward_each`` takes a call."""
    return not _is_forward_mode() and not take_derivatives(transforms()) and has_kernels(input, integers[0])


def row_dim(integers: Sequence[int], packed: bool = False) -> int:
    """Of an input (T, B, I), (B, T, I) with ``batch_first``, or (N, I) of packed data."""
    return 0 if packed or integers[INTEGER_SETTINGS.index("batch_first")] else 1


def row_dims_of_controls(packed: bool) -> dict[str, int]:
    """The dimension of rows, or of rows of all steps, in each control but ``batch_sizes``, in their order."""
    return {name: 2 if name == "dropout" and not packed else 1 for name in Controls._fields[1:]}


def num_states_behind(integers: Sequence[int], numbers: Sequence[float]) -> int:
    """How many states that rows begin anew from follow the parameters."""
    if not numbers or not Within.restore(integers[len(INTEGER_SETTINGS) : -1], numbers).reset_state:
        return 0
    return 1 + kind_of(integers[0]).num_states


class _Rows(NamedTuple):
    """A call of examples that share their weights as one call of all their rows."""

    examples: _Examples
    dim: int  # of the rows of input and output
    params: list[Tensor | None]  # each is there
    num_weights: int  # of params, whose others are states
    controls: list[Tensor | None]
    # Whether what is saved may be of pieces of the batch (csrc/pieces.h), in an order that only a backward pass of the
    # same batch knows: examples cannot be told apart in it.
    in_pieces: bool

    @staticmethod
    def of(  # type: ignore[no-untyped-def]
        info, input, params, of_params, controls, of_controls, integers, numbers,
    ) -> _Rows | None:  # fmt: skip
        """None where weights are of one example each."""
        num_weights = len(params) - num_states_behind(integers, numbers)
        if any(dim is not None for dim in of_params[:num_weights]):
            return None
        examples = _Examples(info.batch_size)
        given = {
            name: (t, dim)
            for name, t, dim in zip(Controls._fields, controls, of_controls, strict=False)
            if not _is_nothing(t, dim)
        }
        packed = "batch_sizes" in given
        folded: dict[str, Tensor | None] = {}
        if packed:
            folded["batch_sizes"] = given["batch_sizes"][0] * examples.count
        for name, rows in row_dims_of_controls(packed).items():
            if name in given:
                folded[name] = examples.fold(*given[name], rows)
        states = zip(params[num_weights:], of_params[num_weights:], strict=True)
        return _Rows(
            examples,
            row_dim(integers, packed),
            [*params[:num_weights], *(examples.fold(t, dim, 1) for t, dim in states)],
            num_weights,
            [folded[name] if name in folded else input.new_empty(0) for name in Controls._fields] if controls else [],
            input.device.type == "cpu" and ("mask" in given or "reset" in given),
        )


def _batched_rnn_forward(  # type: ignore[no-untyped-def]
    info, in_dims, input, h0, c0, params, controls, integers, numbers, save,
):  # fmt: skip
    if _are_models(input, in_dims[3], controls):
        given = (input, h0, c0, params)
        records = torch.is_grad_enabled() and any(t.requires_grad for t in tree_flatten(given)[0] if t is not None)
        stacked = (_stack(info, t, dim) for t, dim in zip(given, in_dims, strict=False))
        return _with_dims_of_models(_rnn_forward_stacked(*stacked, integers, numbers, save or records))
    rows = _Rows.of(info, input, params, in_dims[3], controls, in_dims[4], integers, numbers)
    if rows is None:
        return None
    examples = rows.examples
    output, h_n, c_n, gates, cells, hidden = _rnn_forward(
        examples.fold(input, in_dims[0], rows.dim), examples.fold(h0, in_dims[1], 1), examples.fold(c0, in_dims[2], 1),
        rows.params, rows.controls, integers, numbers, save,
    )  # fmt: skip
    saved = (examples.unfold(t, 1) for t in (h_n, c_n, gates, cells, hidden))
    return _with_dims([examples.unfold(output, rows.dim), *saved])


def _backward_anew(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, grad_cells, grad_hidden, input, h0, c0, params, controls, output, gates, cells,
    hidden, integers, numbers, needs, reuse_gates,
):  # fmt: skip
    """``rnn_backward``, with what the forward pass saves computed once more."""
    output, _, _, *saved = _rnn_forward(input, h0, c0, params, controls, integers, numbers, True)
    seeds = (grad_output, grad_h_n, grad_c_n, grad_cells, grad_hidden)
    return _rnn_backward(*seeds, input, h0, c0, params, controls, output, *saved, integers, numbers, needs, False)


def _backward_of_rows(rows: _Rows, in_dims: Any, arguments: Any, groups: int | None = None) -> tuple[Any, Any]:
    """A backward pass of all rows at once.

    Args:
        arguments: of ``rnn_backward``, or of ``rnn_backward_each`` where ``groups`` of each example are given.
    """
    examples = rows.examples
    integers, numbers, needs = arguments[14:17]

    def fold(index: int, dim: int = 1) -> Tensor | None:
        return examples.fold(arguments[index], in_dims[index], dim)

    def unfold_weights(t: Tensor) -> tuple[Tensor, int | None]:
        if _is_nothing(t):
            return t, None
        return (t, 0) if groups is None else (t.unflatten(0, (groups, examples.count)), 1)

    seeds = (fold(0, rows.dim), fold(1), fold(2), fold(3), fold(4))
    given = (fold(5, rows.dim), fold(6), fold(7), rows.params, rows.controls)
    if rows.in_pieces and not _is_saved_of_all(in_dims):
        output, _, _, *saved = _rnn_forward(*given, integers, numbers, True)
    else:
        output, *saved = fold(10, rows.dim), fold(11), fold(12), fold(13)
    call = (*seeds, *given, output, *saved, integers, numbers, needs)
    if groups is None and not any(needs[3 : 3 + rows.num_weights]):
        grad_input, grad_h0, grad_c0, grad_params = _rnn_backward(*call, False)
    else:
        each = _rnn_backward_each(*call, (groups or 1) * examples.count)
        grad_input, grad_h0, grad_c0, grad_params = each
    of_params = [unfold_weights(t) for t in grad_params[: rows.num_weights]]
    of_params += [examples.unfold(t, 1) for t in grad_params[rows.num_weights :]]
    inputs = [examples.unfold(grad_input, rows.dim), examples.unfold(grad_h0, 1), examples.unfold(grad_c0, 1)]
    grads_of_params, dims_of_params = zip(*of_params, strict=True)
    return _with_dims([*inputs, (list(grads_of_params), list(dims_of_params))])


def _is_saved_of_all(in_dims: Any) -> bool:
    """Whether the output that a backward pass has is that of all examples; else it is of one, as all are."""
    return in_dims[10] is not None


def _batched_rnn_backward(has_kernels, info, in_dims, *arguments):  # type: ignore[no-untyped-def]
    input, h0, c0, params, controls, *saved = arguments[5:14]
    integers, numbers, needs = arguments[14:17]
    if _are_models(input, in_dims[8], controls):
        if arguments[3] is not None or arguments[4] is not None:
            return None
        of_models = (*arguments[:3], input, h0, c0, params, *saved)
        dims = (*in_dims[:3], *in_dims[5:9], *in_dims[10:14])
        stacked = (_stack(info, t, dim) for t, dim in zip(of_models, dims, strict=True))
        return _with_dims_of_models(_rnn_backward_stacked(*stacked, integers, numbers, needs))
    rows = _Rows.of(info, input, params, in_dims[8], controls, in_dims[9], integers, numbers)
    if rows is None:
        return None
    of_weights = any(needs[3 : 3 + rows.num_weights])
    if not of_weights or _has_gradients_each(has_kernels, input, integers):
        return _backward_of_rows(rows, in_dims, arguments)
    if rows.in_pieces and _is_saved_of_all(in_dims):
        return _loop_over_examples(_backward_anew, info, in_dims, arguments)
    return None


def _batched_rnn_backward_each(info, in_dims, *arguments):  # type: ignore[no-untyped-def]
    input, _, _, params, controls = arguments[5:10]
    integers, numbers, _, groups = arguments[14:]
    rows = _Rows.of(info, input, params, in_dims[8], controls, in_dims[9], integers, numbers)
    return None if rows is None else _backward_of_rows(rows, in_dims, arguments, groups)


def _batched_draw_bits(info, in_dims, seed, entries, rows, units, rate):  # type: ignore[no-untyped-def]
    seeds = seed.movedim(in_dims[0], 0).flatten()
    drawn = _draw_bits(seeds, info.batch_size * entries, rows, units, rate)
    return drawn.unflatten(0, (info.batch_size, entries)), 0


def _batched_cell_forward(  # type: ignore[no-untyped-def]
    info, in_dims, input, h, c, params, integers, numbers, save,
):  # fmt: skip
    if any(dim is not None for dim in in_dims[3]):
        return None
    examples = _Examples(info.batch_size)
    rows = (examples.fold(t, dim, 0) for t, dim in zip((input, h, c), in_dims, strict=False))
    h_next, c_next, gates, cells = _cell_forward(*rows, params, integers, numbers, save)
    return _with_dims(
        [*(examples.unfold(t, 0) for t in (h_next, c_next)), *(examples.unfold(t, 1) for t in (gates, cells))]
    )


def _batched_cell_backward(  # type: ignore[no-untyped-def]
    has_kernels, info, in_dims, grad_h, grad_c, input, h, c, params, gates, cells, integers, numbers, needs,
):  # fmt: skip
    if any(dim is not None for dim in in_dims[5]):
        return None
    if any(needs[3:]) and not _has_gradients_each(has_kernels, input, integers):
        return None
    examples = _Examples(info.batch_size)
    grad_h, grad_c, input, h, c = (
        examples.fold(t, dim, 0) for t, dim in zip((grad_h, grad_c, input, h, c), in_dims, strict=False)
    )
    gates = examples.fold(gates, in_dims[6], 1)
    cells = cells if cells.numel() == 0 else examples.fold(cells, in_dims[7], 1)
    if not any(needs[3:]):
        grads = _cell_backward(grad_h, grad_c, input, h, c, params, gates, cells, integers, numbers, needs)
        grad_input, grad_h, grad_c, grad_params = grads
    else:  # a stack of one layer over one step

        def expand(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.unsqueeze(0)

        keeps_h = kind_of(integers[0]).num_saved == 0  # in place of gates; of other cells nobody reads the output
        output = gates.squeeze(2) if keeps_h else expand(h)
        nothing = input.new_empty(0)
        grad_input, grad_h, grad_c, grad_params = _rnn_backward_each(
            expand(grad_h), None, expand(grad_c), None, None, expand(input), expand(h), expand(c), params, [], output,
            nothing if keeps_h else gates, cells, nothing, integers, numbers, needs, info.batch_size,
        )  # fmt: skip
        grad_input, grad_h, grad_c = (t.squeeze(0) if t.dim() == 3 else t for t in (grad_input, grad_h, grad_c))
    of_params = [0 if needed else None for needed in needs[3:]]
    return _with_dims([*(examples.unfold(t, 0) for t in (grad_input, grad_h, grad_c)), (grad_params, of_params)])


def register(has_kernels: HasKernels) -> None:
    """The rules of all operators.

    Args:
        has_kernels: whether ``rnn_backward_each`` takes a call, from its input and the number of its kind of cell.
    """
    _register_batching_rule(_rnn_forward, _batched_rnn_forward)
    _register_batching_rule(_rnn_backward, functools.partial(_batched_rnn_backward, has_kernels))
    _register_batching_rule(_cell_forward, _batched_cell_forward)
    _register_batching_rule(_cell_backward, functools.partial(_batched_cell_backward, has_kernels))
    _register_batching_rule(_rnn_backward_each, _batched_rnn_backward_each)
    _register_batching_rule(_draw_bits, _batched_draw_bits)
    operators = torch.ops.fused_rnn
    for operator in (
        operators.rnn_tangent, operators.rnn_backward_tangent, operators.rnn_forward_stacked,
        operators.rnn_backward_stacked,
    ):  # fmt: skip
        _register_batching_rule(operator.default)
