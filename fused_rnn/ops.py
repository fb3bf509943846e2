"""The operators ``torch.ops.fused_rnn.*`` as differentiable functions.

Every operator's kernels are behind ``csrc/ops.cpp`` and ``csrc/ops_cuda.cpp``; its shapes (the fake kernels) and its
gradient are here. Letters as in ``csrc/problem.h``: T steps, B batch rows, I input size, H hidden size, P size of h
(``proj_size`` or H), L layers, D directions, N rows of all steps (T * B, or the sum of ``batch_sizes``), S values saved
per unit and step.

========================= =============================================================================================
``rnn_forward``           output (T, B, D * P), (B, T, D * P) or (N, D * P); h_n (L * D, B, P); c_n (L * D, B, H), or
                          (0,) without a cell state; and, with ``save``, what the backward pass needs: gates
                          (L * D, N, S, H) in the input's dtype, or (0,) with ``recompute``, cells (L * D, N, H) in
                          float32 (float64 for float64), hidden (L - 1, N, D * P), the outputs of the lower layers.
                          With a ``mask`` (T, B), on the CPU: what is saved is of the live steps alone, at the front of
                          memory for all; on CUDA hidden is (L, N, D * P), the states of all layers at every step
``rnn_backward``          gradients of input, h0, c0 and params; (0,) for those that ``needs`` does not ask for. With
                          ``reuse_gates`` it may write over ``gates``, which its schema does not say (as PyTorch's own
                          for cuDNN with its reserve): only for a tensor that nobody reads afterwards
``cell_forward``          one step: h (B, H), c (B, H) or (0,), gates (1, B, S, H), cells (1, B, H)
``cell_backward``         its gradients
========================= =============================================================================================

In plain eager mode the gradient of the two forward operators is that of ``csrc/autograd.cpp``; the functions here are
for ``torch.func``, forward mode and the compiler. The second derivative goes through the formulas of
:mod:`fused_rnn.reference`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C
from ._C import clear_packed, packed_bytes_held, packed_bytes_limit, set_packed_bytes_limit
from .reference import CellKind

__all__ = [
    "CellKind",
    "cell_step",
    "clear_packed",
    "packed_bytes_held",
    "packed_bytes_limit",
    "plan",
    "rnn",
    "set_packed_bytes_limit",
    "try_cell_step",
    "try_rnn",
    "why_not_fused",
]

# The usual call, without the way through torch.ops, for which every argument is described anew: eager, of plain
# tensors, without a mode or a transform of torch.func that wants to see it. Each returns None for any other call, and
# for one that is not valid, which is no loss of time where it matters. They are opaque to torch.compile.
try_rnn = _C.run_layers
try_cell_step = _C.run_cell

_rnn_forward = torch.ops.fused_rnn.rnn_forward.default
_rnn_backward = torch.ops.fused_rnn.rnn_backward.default
_cell_forward = torch.ops.fused_rnn.cell_forward.default
_cell_backward = torch.ops.fused_rnn.cell_backward.default


_isa = os.environ.get("FUSED_RNN_ISA")
if _isa and _isa not in _C.isa_supported():
    raise ValueError(f"FUSED_RNN_ISA: expected one of {', '.join(_C.isa_supported())} on this machine, got {_isa}")

# Values per unit and step that the forward pass saves: csrc/cells.
_NUM_SAVED = {CellKind.RNN_TANH: 0, CellKind.RNN_RELU: 0, CellKind.LSTM: 4, CellKind.GRU: 4}

# Of the kernels: csrc/problem.h, DType.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


# Whether this build has CUDA kernels, and the oldest compute capability that they run on.
_HAS_CUDA: bool = _C.build_info()["cuda"]
_OLDEST_CAPABILITY = (8, 0)

_TIMES = ("predicted_us", "serial_us", "bound_us")


def peak_flops(dtype: torch.dtype, seconds: float) -> float:
    """Floating-point operations a second that the multiply-add units reach, measured for about `seconds` (at most 1).

    On as many threads as a call would use, with the instructions that products of `dtype` are made of, from registers.
    """
    return _C.peak_flops(_DTYPES[dtype], seconds)


def why_not_fused(*tensors: Tensor | None) -> str | None:
    """Why no fused kernel takes tensors of this device and dtype; None when one does."""
    for t in tensors:
        if t is None:
            continue
        if t.dtype not in _DTYPES:
            return f"no fused kernel for {t.dtype}: float32, float64, bfloat16 and float16 have one"
        if t.device.type == "cuda":
            reason = _why_not_cuda(t.device)
            if reason is not None:
                return reason
        elif t.device.type not in ("cpu", "meta"):
            return f"no fused kernel for {t.device.type} tensors: the CPU and CUDA devices have them"
        if t.layout is not torch.strided:
            return f"no fused kernel for tensors of layout {t.layout}"
    return None


# A capability is asked for once: the question takes as long as a small kernel's launch.
_capabilities: dict[torch.device, tuple[int, int]] = {}


def _why_not_cuda(device: torch.device) -> str | None:
    if not _HAS_CUDA:
        return "no fused kernel for cuda tensors in this build: it was compiled without CUDA"
    if torch.compiler.is_compiling():
        capability = torch.cuda.get_device_capability(device)
    else:
        if device not in _capabilities:
            _capabilities[device] = torch.cuda.get_device_capability(device)
        capability = _capabilities[device]
    if capability < _OLDEST_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, _OLDEST_CAPABILITY))
        return f"{device} has compute capability {found}: the fused kernels need {needed} or newer"
    return None


def plan(
    kind: CellKind,
    *,
    T: int,
    B: int,
    batch_sizes: Sequence[int] | None,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
    recompute: bool = False,
) -> dict[str, Any]:
    """What would run for such a call.

    Returns:
        on the CPU a dict with ``isa`` (the instruction set), ``threads``, how they divide the work of a layer
        (``direction_groups``, ``row_groups``, ``unit_groups``; their product is ``threads``), and times of the whole
        call's forward pass in microseconds by the planner's cost model: ``predicted_us``, ``serial_us`` (on one
        thread), ``bound_us``, below which these threads cannot get, and ``bound_by``, what that is the time of. With
        ``training`` also ``backward``, the same for the backward pass, which has ``recomputes``: whether it computes
        the gates again.

        On a CUDA device ``variant`` (``"none"``: a launch a step), ``reason`` (why no better one), ``layers`` (how many
        a launch runs; more than one: in a wavefront, and what is left over one by one), and of a persistent variant
        ``blocks``, ``teams``, ``team_blocks``, ``register_bytes``, ``weight_bytes`` and ``shared_bytes`` (of W_hh
        in registers and in shared memory, and all shared memory, per block), ``predicted_step_us`` and
        ``predicted_us``; ``backward`` as above.
    """
    state_size = proj_size or hidden_size
    directions = 2 if bidirectional else 1
    sizes = None if batch_sizes is None else list(batch_sizes)

    def one_layer(size: int, backward: bool) -> dict[str, Any]:
        layer = (size, hidden_size, state_size, directions, _DTYPES[dtype], backward)
        if device.type == "cuda":
            return _C.cuda_plan(kind, T, B, *layer, _cuda_index(device))
        return _C.plan(kind, T, B, sizes, *layer)

    def wavefronts(backward: bool) -> tuple[list[dict[str, Any]], str]:
        """Of the groups of layers that run at once; none, and why, where each runs by itself."""
        if device.type != "cuda" or num_layers == 1:
            return [], ""
        if recompute and training:
            return [], "layers whose gates are computed again run one by one"
        layer = (directions * state_size, hidden_size, state_size, directions, _DTYPES[dtype], backward)
        group = _C.cuda_plan(kind, T, B, *layer, _cuda_index(device), num_layers)
        if group["layers"] == 1:
            return [], group["reason"]
        return [group] * (num_layers // group["layers"]), ""

    def stack(backward: bool) -> dict[str, Any]:
        launches, why_none = wavefronts(backward)
        first = sum(group["layers"] for group in launches)
        for layer in range(first, num_layers):
            launches.append(one_layer(input_size if layer == 0 else directions * state_size, backward))
        result = dict(launches[0])
        if why_none:
            result["reason"] = "; ".join(filter(None, (result["reason"], f"a wavefront: {why_none}")))
        for other in launches[1:]:
            for key in _TIMES:
                if key in result:
                    result[key] += other[key]
        return result

    result = stack(backward=False)
    if training:
        backward = stack(backward=True)
        backward["recomputes"] = recompute and _NUM_SAVED[kind] > 0
        if backward["recomputes"]:
            for key in _TIMES:
                if key in backward:
                    backward[key] += result[key]
        result["backward"] = backward
    return result


def _cuda_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _needs_function(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the call goes through a Function here: for torch.func, forward mode, or recorded by the compiler."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if not torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return False


def rnn(
    kind: CellKind,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    dropout_masks: Sequence[Tensor],
    batch_sizes: Tensor | None,
    *,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    recompute: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of recurrent layers over a whole sequence, in one operator.

    Args:
        kind: the recurrence.
        input: (T, B, I), (B, T, I) with ``batch_first``, or (N, I) with ``batch_sizes``.
        h0: (L * D, B, P), or None for zeros.
        c0: (L * D, B, H), or None for zeros; only with ``CellKind.LSTM``.
        params: per layer and direction ``w_ih (G * H, I), w_hh (G * H, P)[, b_ih, b_hh (G * H)][, w_hr (P, H)]``.
        dropout_masks: none, or L - 1 factors of the layers' outputs, (T, B, D * P) or (N, D * P).
        batch_sizes: int64 on the CPU, rows of each step of a packed batch, never increasing.
        has_biases, num_layers, bidirectional, batch_first: as in :class:`torch.nn.LSTM`.
        recompute: a backward pass computes the gates again instead of finding them in memory.
        mask: bool (T, B), False where a row has no step: it keeps its state there, its output and the gradient of its
            input are 0, and what stands in its input has no effect. Not with batch_sizes.

    Returns:
        output (shaped like the input, D * P features), h_n (L * D, B, P), c_n (L * D, B, H) or, without a cell state,
        an empty tensor.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    if _needs_function((input, h0, c0, *params, *dropout_masks)):
        results = _apply(
            _Rnn,
            _ForwardModeRnn,
            kind,
            has_biases,
            num_layers,
            bidirectional,
            batch_first,
            len(dropout_masks),
            batch_sizes,
            recompute,
            mask,
            input,
            h0,
            c0,
            *dropout_masks,
            *params,
        )
        return results[:3]
    return _rnn_forward(
        input,
        h0,
        c0,
        params,
        dropout_masks,
        batch_sizes,
        kind,
        has_biases,
        num_layers,
        bidirectional,
        batch_first,
        False,
        recompute,
        mask,
    )[:3]


def cell_step(
    kind: CellKind,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One step of a cell: input (B, I), h (B, H), c (B, H) for an LSTM, weights as in :func:`rnn`.

    Returns:
        h (B, H), and c (B, H) for an LSTM, else None.
    """
    if _needs_function((input, h, c, w_ih, w_hh, b_ih, b_hh)):
        h_next, c_next = _apply(_Cell, _ForwardModeCell, kind, input, h, c, w_ih, w_hh, b_ih, b_hh)[:2]
    else:
        h_next, c_next = _cell_forward(input, h, c, w_ih, w_hh, b_ih, b_hh, kind, False)[:2]
    return h_next, c_next if kind == CellKind.LSTM else None


# --- Gradients -------------------------------------------------------------------------------------------------------


def _apply(function: type[torch.autograd.Function], forward_mode: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, or that of its version with a forward-mode derivative, where that can be.

    In eager mode without ``apply``'s inspection of the signature, some 20 us a call.
    """
    if torch.compiler.is_compiling():
        # The tracer refuses one tensor in two places: tied weights, or the zeros of both states.
        distinct: list[Any] = []
        for a in args:
            again = isinstance(a, Tensor) and any(a is b for b in distinct)
            distinct.append(a.view_as(a) if again else a)
        return function.apply(*distinct)
    if torch._C._are_functorch_transforms_active():
        return forward_mode.apply(*args)
    return super(torch.autograd.Function, forward_mode).apply(*args)  # type: ignore[misc]


def differentiable_rnn_backward(
    settings: tuple[Any, ...], needs: tuple[bool, ...], tensors: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The backward pass of ``csrc/autograd.cpp`` when it is recorded itself, or under ``vmap``.

    Args:
        settings: the first seven arguments of :class:`_Rnn`.
        needs: whether input, h0, c0, each dropout mask and each parameter need a gradient.
        tensors: the gradients of output, h_n, c_n; output, gates, cells, hidden; mask; input, h0, c0, dropout masks,
            params.

    Returns:
        the gradients of input, h0, c0, dropout masks, params.
    """
    grads = _RnnBackward.apply(CellKind(settings[0]), *settings[1:], needs, *tensors)
    return _none_for_unneeded(grads, needs)


def differentiable_cell_backward(
    settings: tuple[Any, ...], needs: tuple[bool, ...], tensors: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """As :func:`differentiable_rnn_backward`, with the tensors of :class:`_CellBackward`."""
    return _none_for_unneeded(_CellBackward.apply(CellKind(settings[0]), needs, *tensors), needs)


def _none_for_unneeded(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


def _second_derivative(
    function: Callable[..., tuple[Tensor, ...]],
    primals: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of ``vjp(function)(primals)(cotangents)``, of which ``needs`` were asked for, times ``grad_grads``.

    ``function`` is written in differentiable operators, so this can be differentiated again. None stands for an
    argument that is missing, a cotangent of zeros, a gradient that nobody uses.

    Returns:
        gradients of the cotangents and of the primals, None where the argument is None.
    """
    given = [i for i, t in enumerate(primals) if t is not None]
    seeded = [i for i, t in enumerate(cotangents) if t is not None]
    wanted = [i for i, t in enumerate(given) if needs[t] and grad_grads[t] is not None]

    if not wanted:
        return [None] * len(cotangents), [None] * len(primals)

    def gradients(*arguments: Tensor) -> tuple[Tensor, ...]:
        values = list(primals)
        for i, t in zip(given, arguments[: len(given)], strict=True):
            values[i] = t

        def seeded_outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
            for i, t in zip(given, tensors, strict=True):
                values[i] = t
            outputs = function(*values)
            return tuple(outputs[i] for i in seeded)

        pullback = torch.func.vjp(seeded_outputs, *(t for t in values if t is not None))[1]
        grads = pullback(tuple(arguments[len(given) :]))
        return tuple(grads[i] for i in wanted)

    arguments = [primals[i] for i in given] + [cotangents[i] for i in seeded]
    pullback = torch.func.vjp(gradients, *arguments)[1]
    results = pullback(tuple(grad_grads[given[i]] for i in wanted))
    primal_grads: list[Tensor | None] = [None] * len(primals)
    for i, grad in zip(given, results, strict=False):
        primal_grads[i] = grad
    cotangent_grads: list[Tensor | None] = [None] * len(cotangents)
    for i, grad in zip(seeded, results[len(given) :], strict=True):
        cotangent_grads[i] = grad
    return cotangent_grads, primal_grads


def _reference_stack(settings: tuple[Any, ...], mask: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
    """The stack in differentiable operators, a function of input, h0, c0, dropout masks, params."""
    from . import reference

    kind, has_biases, num_layers, bidirectional, batch_first, num_masks, batch_sizes = settings

    def stack(input: Tensor, h0: Tensor | None, c0: Tensor | None, *rest: Tensor) -> tuple[Tensor, ...]:
        return reference.rnn(
            kind,
            input,
            h0,
            c0,
            rest[num_masks:],
            rest[:num_masks],
            batch_sizes,
            has_biases=has_biases,
            num_layers=num_layers,
            bidirectional=bidirectional,
            batch_first=batch_first,
            mask=mask,
        )

    return stack


def _reference_step(kind: CellKind) -> Callable[..., tuple[Tensor, ...]]:
    """One step in differentiable operators, a function of the tensors of :class:`_Cell`."""
    from . import reference

    def step(*tensors: Any) -> tuple[Tensor, ...]:
        h, c = reference.cell_step(kind, *tensors)
        return (h,) if c is None else (h, c)

    return step


def _forward_derivative(
    function: Callable[..., tuple[Tensor, ...]],
    primals: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Tangents of the results of ``function``; None stands for a missing argument, and for a tangent of zeros."""
    given = [i for i, t in enumerate(primals) if t is not None]

    def results(*arguments: Tensor) -> tuple[Tensor, ...]:
        values = list(primals)
        for i, t in zip(given, arguments, strict=True):
            values[i] = t
        return function(*values)

    at = tuple(t for t in primals if t is not None)
    along = tuple(
        torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True) if p is not None
    )
    # torch.func.jvp cannot stand inside of forward-mode differentiation. The pullback is linear in the cotangents, and
    # the pullback of a linear map, J^T here, is its transpose: J.
    values, pullback = torch.func.vjp(results, *at)[:2]
    pushforward = torch.func.vjp(pullback, tuple(torch.zeros_like(value) for value in values))[1]
    return tuple(pushforward(along)[0])


class _Rnn(torch.autograd.Function):
    """``rnn_forward`` with its gradient.

    The arguments: kind, has_biases, num_layers, bidirectional, batch_first; the number of dropout masks; batch_sizes;
    recompute; mask; and the tensors input, h0, c0, dropout masks, params.
    """

    @staticmethod
    def forward(*args):  # type: ignore[no-untyped-def]
        stack, (num_masks, batch_sizes, recompute, mask), (input, h0, c0, *rest) = args[:5], args[5:9], args[9:]
        return _rnn_forward(
            input, h0, c0, rest[num_masks:], rest[:num_masks], batch_sizes, *stack, True, recompute, mask
        )

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.settings = inputs[:7]
        y, _, c_n, *saved = output
        ctx.mark_non_differentiable(*saved, *(() if inputs[0] == CellKind.LSTM else (c_n,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, *saved, *inputs[8:])
        ctx.save_for_forward(*inputs[8:])

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, *_):  # type: ignore[no-untyped-def]
        grad_c_n = grad_c_n if ctx.settings[0] == CellKind.LSTM else None
        needs = ctx.needs_input_grad[9:]
        run = _RnnBackward.apply if torch.is_grad_enabled() else _RnnBackward.forward
        grads = run(*ctx.settings, needs, grad_output, grad_h_n, grad_c_n, *ctx.saved_tensors)
        return *(None,) * 9, *_none_for_unneeded(grads, needs)

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        return _vmap_loop(_ForwardModeRnn.apply, info, in_dims, args)


class _ForwardModeRnn(_Rnn):
    """With the forward-mode derivative, which torch.compile refuses to see on a function that it traces."""

    @staticmethod
    def jvp(ctx, *tangents):  # type: ignore[no-untyped-def]
        mask, *primals = ctx.saved_tensors
        y, h_n, c_n = _forward_derivative(_reference_stack(ctx.settings, mask), primals, tangents[9:])
        return y, h_n, c_n if ctx.settings[0] == CellKind.LSTM else None, None, None, None


class _RnnBackward(torch.autograd.Function):
    """``rnn_backward`` with its gradient; returns a gradient for each tensor.

    The arguments: the first seven of :class:`_Rnn`; needs; the gradients of output, h_n, c_n; output, gates, cells,
    hidden; mask; and the tensors input, h0, c0, dropout masks, params.
    """

    @staticmethod
    def forward(*args):  # type: ignore[no-untyped-def]
        stack, (num_masks, batch_sizes, needs), seeds, saved = args[:5], args[5:8], args[8:11], args[11:15]
        mask, input, h0, c0, *rest = args[15:]
        masks, params = rest[:num_masks], rest[num_masks:]
        asked = (*needs[:3], *needs[3 + num_masks :])
        grad_input, grad_h0, grad_c0, grad_params = _rnn_backward(
            *seeds, input, h0, c0, params, masks, batch_sizes, *saved, *stack, asked, False, mask
        )
        # Dropout masks are drawn, not learned: their gradient is never asked for.
        return grad_input, grad_h0, grad_c0, *(input.new_empty(0) for _ in masks), *grad_params

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.settings, ctx.needs = inputs[:7], inputs[7]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t, needed in zip(output, ctx.needs, strict=True) if not needed))
        ctx.save_for_backward(*inputs[8:11], *inputs[15:])

    @staticmethod
    def backward(ctx, *grad_grads):  # type: ignore[no-untyped-def]
        *seeds, mask = ctx.saved_tensors[:4]
        stack, primals = _reference_stack(ctx.settings, mask), ctx.saved_tensors[4:]
        cotangents, grads = _second_derivative(stack, primals, seeds, ctx.needs, grad_grads)
        return *(None,) * 8, *cotangents, *(None,) * 5, *grads

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        return _vmap_loop(_RnnBackward.apply, info, in_dims, args)


class _Cell(torch.autograd.Function):
    """``cell_forward`` with its gradient."""

    @staticmethod
    def forward(kind, input, h, c, w_ih, w_hh, b_ih, b_hh):  # type: ignore[no-untyped-def]
        return _cell_forward(input, h, c, w_ih, w_hh, b_ih, b_hh, kind, True)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.kind, *tensors = inputs
        h_next, c_next, *saved = output
        ctx.mark_non_differentiable(*saved, *(() if ctx.kind == CellKind.LSTM else (c_next,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h_next, *saved, *tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad_h, grad_c, *_):  # type: ignore[no-untyped-def]
        grad_c = grad_c if ctx.kind == CellKind.LSTM else None
        needs = ctx.needs_input_grad[1:]
        run = _CellBackward.apply if torch.is_grad_enabled() else _CellBackward.forward
        grads = run(ctx.kind, needs, grad_h, grad_c, *ctx.saved_tensors)
        return None, *_none_for_unneeded(grads, needs)

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        return _vmap_loop(_ForwardModeCell.apply, info, in_dims, args)


class _ForwardModeCell(_Cell):
    """As :class:`_ForwardModeRnn`."""

    @staticmethod
    def jvp(ctx, *tangents):  # type: ignore[no-untyped-def]
        h, *c = _forward_derivative(_reference_step(ctx.kind), ctx.saved_tensors, tangents[1:])
        return h, c[0] if c else None, None, None


class _CellBackward(torch.autograd.Function):
    """``cell_backward`` with its gradient; returns a gradient for each tensor of the step."""

    @staticmethod
    def forward(kind, needs, grad_h, grad_c, h_next, gates, cells, *tensors):  # type: ignore[no-untyped-def]
        b_ih = tensors[5]
        grad_input, grad_h0, grad_c0, grad_params = _cell_backward(
            grad_h, grad_c, *tensors, h_next, gates, cells, kind, needs if b_ih is not None else needs[:5]
        )
        missing = () if b_ih is not None else (grad_h0.new_empty(0), grad_h0.new_empty(0))
        return grad_input, grad_h0, grad_c0, *grad_params, *missing

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.kind, ctx.needs = inputs[:2]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t, needed in zip(output, ctx.needs, strict=True) if not needed))
        ctx.save_for_backward(*inputs[2:4], *inputs[7:])

    @staticmethod
    def backward(ctx, *grad_grads):  # type: ignore[no-untyped-def]
        grad_h, grad_c, *primals = ctx.saved_tensors
        cotangents, grads = _second_derivative(
            _reference_step(ctx.kind), primals, (grad_h, grad_c), ctx.needs, grad_grads
        )
        return None, None, *cotangents, None, None, None, *grads

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        return _vmap_loop(_CellBackward.apply, info, in_dims, args)


def _vmap_loop(apply, info, in_dims, args):  # type: ignore[no-untyped-def]
    """The batching rule of every function here: one call per example, results stacked."""

    def example(index: int) -> list[Any]:
        return [a.select(dim, index) if isinstance(dim, int) else a for a, dim in zip(args, in_dims, strict=True)]

    results = [apply(*example(i)) for i in range(info.batch_size)]
    stacked = tuple(torch.stack(values) for values in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


# --- Fake kernels ----------------------------------------------------------------------------------------------------


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("fused_rnn::rnn_forward")
def _(  # type: ignore[no-untyped-def]
    input, h0, c0, params, dropout_masks, batch_sizes, kind, has_biases, num_layers, bidirectional, batch_first, save,
    recompute, mask=None,
):  # fmt: skip
    kind = CellKind(kind)
    D = 2 if bidirectional else 1
    H, P = params[1].shape[0] // kind.num_gates, params[1].shape[1]
    if batch_sizes is not None:
        N = input.shape[0]
        # The number of rows of the first step is data; a state, where given, has it as a size.
        state = h0 if h0 is not None else c0
        B = state.shape[1] if state is not None else torch.library.get_ctx().new_dynamic_size()
        output = input.new_empty(N, D * P)
    else:
        B, T = (input.shape[0], input.shape[1]) if batch_first else (input.shape[1], input.shape[0])
        N = T * B
        output = input.new_empty(T, B, D * P)
        output = output.transpose(0, 1) if batch_first else output
    has_cell = kind == CellKind.LSTM
    accumulation = _accumulation_dtype(input.dtype)
    rows = (num_layers * D, N)
    num_hidden = num_layers if mask is not None and input.device.type == "cuda" else num_layers - 1
    return (
        output,
        input.new_empty(num_layers * D, B, P),
        input.new_empty((num_layers * D, B, H) if has_cell else 0),
        input.new_empty((*rows, _NUM_SAVED[kind], H) if save and not recompute and _NUM_SAVED[kind] else 0),
        input.new_empty((*rows, H) if save and has_cell else 0, dtype=accumulation),
        input.new_empty((num_hidden, N, D * P) if save and num_hidden else 0),
    )


@torch.library.register_fake("fused_rnn::rnn_backward")
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, input, h0, c0, params, dropout_masks, batch_sizes, output, gates, cells, hidden,
    kind, has_biases, num_layers, bidirectional, batch_first, needs, reuse_gates,
    mask=None,
):  # fmt: skip
    def like(t, needed):  # type: ignore[no-untyped-def]
        return input.new_empty(t.shape if needed and t is not None else 0)

    grad_input = like(input, needs[0])
    if needs[0] and batch_first and batch_sizes is None:
        grad_input = input.new_empty(input.shape[1], input.shape[0], input.shape[2]).transpose(0, 1)
    return (
        grad_input,
        like(h0, needs[1]),
        like(c0, needs[2]),
        [like(p, needed) for p, needed in zip(params, needs[3:], strict=True)],
    )


@torch.library.register_fake("fused_rnn::cell_forward")
def _(input, h, c, w_ih, w_hh, b_ih, b_hh, kind, save):  # type: ignore[no-untyped-def]
    kind = CellKind(kind)
    B, H = h.shape
    has_cell = kind == CellKind.LSTM
    return (
        h.new_empty(B, H),
        h.new_empty((B, H) if has_cell else 0),
        h.new_empty((1, B, _NUM_SAVED[kind], H) if save and _NUM_SAVED[kind] else 0),
        h.new_empty((1, B, H) if save and has_cell else 0, dtype=_accumulation_dtype(h.dtype)),
    )


@torch.library.register_fake("fused_rnn::cell_backward")
def _(grad_h, grad_c, input, h, c, w_ih, w_hh, b_ih, b_hh, h_next, gates, cells, kind, needs):  # type: ignore[no-untyped-def]
    tensors = [t for t in (w_ih, w_hh, b_ih, b_hh) if t is not None]

    def like(t, needed):  # type: ignore[no-untyped-def]
        return input.new_empty(t.shape if needed and t is not None else 0)

    return (
        like(input, needs[0]),
        like(h, needs[1]),
        like(c, needs[2]),
        [like(t, needed) for t, needed in zip(tensors, needs[3:], strict=True)],
    )
