"""vmap of the operators: examples as rows of one batch, models of an ensemble stacked, or one call after the other.

:mod:`fused_rnn.ops` imports this once the extension has brought the operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_map

from .settings import INTEGER_SETTINGS, kind_of

__all__ = ["register", "row_dim", "take_derivatives", "transforms"]

HasKernels = Callable[[Tensor, list[Tensor], list[Tensor], list[int], list[float]], bool]

_rnn_forward = torch.ops.fused_rnn.rnn_forward.default
_rnn_backward = torch.ops.fused_rnn.rnn_backward.default
_cell_forward = torch.ops.fused_rnn.cell_forward.default
_cell_backward = torch.ops.fused_rnn.cell_backward.default
_rnn_backward_each = torch.ops.fused_rnn.rnn_backward_each.default
_rnn_forward_stacked = torch.ops.fused_rnn.rnn_forward_stacked.default
_rnn_backward_stacked = torch.ops.fused_rnn.rnn_backward_stacked.default


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
        """All examples of t at once, whose dimension ``rows`` is that of its rows."""
        if t is None:
            return None
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


def _shares_weights(params: Sequence[int | None], controls: Sequence[Tensor]) -> bool:
    return not controls and all(dim is None for dim in params)


def _has_gradients_each(
    has_kernels: HasKernels,
    input: Tensor,
    params: Sequence[Tensor],
    integers: Sequence[int],
    numbers: Sequence[float],
) -> bool:
    """Whether ``rnn_backward_each`` takes a call without controls."""
    if _is_forward_mode() or take_derivatives(transforms()):
        return False
    return has_kernels(input, list(params), [], list(integers), list(numbers))


def row_dim(integers: Sequence[int]) -> int:
    """Of an input (T, B, I), or (B, T, I) with ``batch_first``."""
    return 0 if integers[INTEGER_SETTINGS.index("batch_first")] else 1


def _batched_rnn_forward(  # type: ignore[no-untyped-def]
    info, in_dims, input, h0, c0, params, controls, integers, numbers, save,
):  # fmt: skip
    if _are_models(input, in_dims[3], controls):
        given = (input, h0, c0, params)
        records = torch.is_grad_enabled() and any(t.requires_grad for t in tree_flatten(given)[0] if t is not None)
        stacked = (_stack(info, t, dim) for t, dim in zip(given, in_dims, strict=False))
        return _with_dims_of_models(_rnn_forward_stacked(*stacked, integers, numbers, save or records))
    if not _shares_weights(in_dims[3], controls):
        return None
    examples, rows = _Examples(info.batch_size), row_dim(integers)
    output, h_n, c_n, gates, cells, hidden = _rnn_forward(
        examples.fold(input, in_dims[0], rows), examples.fold(h0, in_dims[1], 1), examples.fold(c0, in_dims[2], 1),
        params, controls, integers, numbers, save,
    )  # fmt: skip
    saved = (examples.unfold(t, 1) for t in (h_n, c_n, gates, cells, hidden))
    return _with_dims([examples.unfold(output, rows), *saved])


def _batched_rnn_backward(  # type: ignore[no-untyped-def]
    has_kernels, info, in_dims, grad_output, grad_h_n, grad_c_n, grad_cells, grad_hidden, input, h0, c0, params,
    controls, output, gates, cells, hidden, integers, numbers, needs, reuse_gates,
):  # fmt: skip
    if grad_cells is not None or grad_hidden is not None:
        return None
    if _are_models(input, in_dims[8], controls):
        seeds = (grad_output, grad_h_n, grad_c_n)
        of_models = (*seeds, input, h0, c0, params, output, gates, cells, hidden)
        dims = (*in_dims[:3], *in_dims[5:9], *in_dims[10:14])
        stacked = (_stack(info, t, dim) for t, dim in zip(of_models, dims, strict=True))
        return _with_dims_of_models(_rnn_backward_stacked(*stacked, integers, numbers, needs))
    if not _shares_weights(in_dims[8], controls):
        return None
    if any(needs[3:]) and not _has_gradients_each(has_kernels, input, params, integers, numbers):
        return None
    examples, rows = _Examples(info.batch_size), row_dim(integers)

    def fold(index: int, t: Tensor | None, dim: int = 1) -> Tensor | None:
        if t is not None and t.dim() == 1 and t.numel() == 0:  # none
            return t
        return examples.fold(t, in_dims[index], dim)

    seeds = (fold(0, grad_output, rows), fold(1, grad_h_n), fold(2, grad_c_n))
    given = (fold(5, input, rows), fold(6, h0), fold(7, c0), params)
    saved = (fold(10, output, rows), fold(11, gates), fold(12, cells), fold(13, hidden))
    if any(needs[3:]):
        grad_input, grad_h0, grad_c0, grad_params = _rnn_backward_each(
            *seeds, *given, *saved, integers, numbers, needs, info.batch_size
        )
    else:
        grad_input, grad_h0, grad_c0, grad_params = _rnn_backward(
            *seeds, None, None, *given, controls, *saved, integers, numbers, needs, False
        )
    of_params = [0 if needed else None for needed in needs[3:]]
    inputs = [examples.unfold(grad_input, rows), examples.unfold(grad_h0, 1), examples.unfold(grad_c0, 1)]
    return _with_dims([*inputs, (grad_params, of_params)])


def _batched_cell_forward(  # type: ignore[no-untyped-def]
    info, in_dims, input, h, c, params, integers, numbers, save,
):  # fmt: skip
    if not _shares_weights(in_dims[3], ()):
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
    if not _shares_weights(in_dims[5], ()):
        return None
    if any(needs[3:]) and not _has_gradients_each(has_kernels, input, params, integers, numbers):
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
            expand(grad_h), None, expand(grad_c), expand(input), expand(h), expand(c), params, output,
            nothing if keeps_h else gates, cells, nothing, integers, numbers, needs, info.batch_size,
        )  # fmt: skip
        grad_input, grad_h, grad_c = (t.squeeze(0) if t.dim() == 3 else t for t in (grad_input, grad_h, grad_c))
    of_params = [0 if needed else None for needed in needs[3:]]
    return _with_dims([*(examples.unfold(t, 0) for t in (grad_input, grad_h, grad_c)), (grad_params, of_params)])


def register(has_kernels: HasKernels) -> None:
    """The rules of all operators.

    Args:
        has_kernels: whether the operators of derivatives take a call, from its input, params, controls, settings and
            numbers.
    """
    _register_batching_rule(_rnn_forward, _batched_rnn_forward)
    _register_batching_rule(_rnn_backward, functools.partial(_batched_rnn_backward, has_kernels))
    _register_batching_rule(_cell_forward, _batched_cell_forward)
    _register_batching_rule(_cell_backward, functools.partial(_batched_cell_backward, has_kernels))
    operators = torch.ops.fused_rnn
    for operator in (
        operators.draw_bits, operators.rnn_tangent, operators.rnn_backward_tangent, operators.rnn_backward_each,
        operators.rnn_forward_stacked, operators.rnn_backward_stacked,
    ):  # fmt: skip
        _register_batching_rule(operator.default)
