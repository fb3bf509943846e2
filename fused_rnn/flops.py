"""Floating-point operations of the operators, as :mod:`torch.utils.flop_counter` counts them.

Those of matrix products, a multiply-add is 2. The arguments are shapes; masked steps count. :mod:`fused_rnn.ops`
imports this once the extension has brought the operators, which registers the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from .settings import INTEGER_SETTINGS, Within, kind_of

__all__: list[str] = []


def _forward_flops(input: Sequence[int], params: Sequence[Sequence[int]]) -> int:
    return 2 * math.prod(input[:-1]) * sum(math.prod(shape) for shape in params if len(shape) == 2)


# The place of layer_norm in the list of a call that has something within.
_LAYER_NORM = len(INTEGER_SETTINGS) + Within._fields.index("layer_norm")


def _backward_flops(
    input: Sequence[int],
    params: Sequence[Sequence[int]],
    gates: Sequence[int],
    integers: Sequence[int],
    needs: Sequence[bool],
) -> int:
    """For each matrix a product for the gradient of what it multiplied, and one for its own where that is asked for."""
    matrices = [(i, math.prod(shape)) for i, shape in enumerate(params) if len(shape) == 2]
    sum_of_products = sum(elements * (1 + needs[3 + i]) for i, elements in matrices)
    kind = kind_of(integers[0])
    if not needs[0]:  # the input's gradient is that of the lowest W_ih, in each direction
        directions = 2 if integers[INTEGER_SETTINGS.index("bidirectional")] else 1
        sum_of_products -= directions * math.prod(params[0])
    saves = kind.num_saved > 0 or (len(integers) > _LAYER_NORM + 1 and integers[_LAYER_NORM] > 0)
    again = saves and math.prod(gates) == 0
    return 2 * math.prod(input[:-1]) * sum_of_products + (_forward_flops(input, params) if again else 0)


@register_flop_formula([torch.ops.fused_rnn.rnn_forward, torch.ops.fused_rnn.cell_forward])
def _(input, h, c, params, *_, **__):  # type: ignore[no-untyped-def]
    return _forward_flops(input, params)


@register_flop_formula([torch.ops.fused_rnn.rnn_backward, torch.ops.fused_rnn.rnn_backward_each])
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, grad_cells, grad_hidden, input, h0, c0, params, controls, output, gates, cells,
    hidden, integers, numbers, needs, *_, **__,
):  # fmt: skip
    return _backward_flops(input, params, gates, integers, needs)


@register_flop_formula(torch.ops.fused_rnn.cell_backward)
def _(  # type: ignore[no-untyped-def]
    grad_h, grad_c, input, h, c, params, gates, cells, integers, numbers, needs, *_, **__,
):  # fmt: skip
    return _backward_flops(input, params, gates, integers, needs)


def _products(
    params: Sequence[Sequence[int]], integers: Sequence[int], of_input: bool
) -> tuple[list[tuple[int, int, bool]], int]:
    """Of each matrix its place, its elements and whether it is a W_ih of the lowest layer.

    And the elements of all that a pass of a stack multiplies by, where those of that W_ih count if ``of_input``.
    """
    directions = 2 if integers[INTEGER_SETTINGS.index("bidirectional")] else 1
    matrices = [(i, math.prod(shape)) for i, shape in enumerate(params) if len(shape) == 2]
    lowest = {i for i, _ in matrices[: 2 * directions : 2]}
    marked = [(i, elements, i in lowest) for i, elements in matrices]
    return marked, sum(elements for _, elements, is_lowest in marked if of_input or not is_lowest)


def _tangent_flops(input, input_t, params, params_t, integers) -> int:  # type: ignore[no-untyped-def]
    """A scan of the changes, and a product for each matrix that changes."""
    through_time = _products(params, integers, input_t is not None)[1]
    changes = sum(math.prod(shape) for shape in params_t if len(shape) == 2)
    return 2 * math.prod(input[:-1]) * (through_time + changes)


@register_flop_formula(torch.ops.fused_rnn.rnn_tangent)
def _(  # type: ignore[no-untyped-def]
    input_t, h0_t, c0_t, params_t, input, h0, c0, params, controls, output, gates, cells, hidden, integers, *_, **__,
):  # fmt: skip
    return _tangent_flops(input, input_t, params, params_t, integers)


@register_flop_formula(torch.ops.fused_rnn.rnn_backward_tangent)
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, grad_output_t, grad_h_n_t, grad_c_n_t, input_t, h0_t, c0_t, params_t, input, h0,
    c0, params, controls, output, gates, cells, hidden, integers, numbers, needs, *_, **__,
):  # fmt: skip
    matrices, base = _products(params, integers, False)
    elements = base + _products(params, integers, needs[0])[1]
    for i, size, is_lowest in matrices:
        if needs[3 + i]:  # with what it multiplied, and with how that changes
            elements += size * (2 if not is_lowest or input_t is not None else 1)
        if params_t and len(params_t[i]) == 2 and (needs[0] or not is_lowest):
            elements += size
    return _tangent_flops(input, input_t, params, params_t, integers) + 2 * math.prod(input[:-1]) * elements


@register_flop_formula(torch.ops.fused_rnn.rnn_forward_stacked)
def _(input, h0, c0, params, *_, **__):  # type: ignore[no-untyped-def]
    return input[0] * _forward_flops(input[1:], [shape[1:] for shape in params])


@register_flop_formula(torch.ops.fused_rnn.rnn_backward_stacked)
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, input, h0, c0, params, output, gates, cells, hidden, integers, numbers, needs, *_,
    **__,
):  # fmt: skip
    of_one = _backward_flops(input[1:], [shape[1:] for shape in params], gates, integers, needs)
    return input[0] * of_one
