"""The operators ``torch.ops.fused_rnn.*`` as functions of the records in :mod:`fused_rnn.settings`.

Every operator's kernels are behind ``csrc/ops.cpp`` and ``csrc/ops_cuda.cpp``, its gradient behind
``csrc/autograd.cpp``; its shapes (the fake kernels), its batching rule and the formulas of its further derivatives are
here. Letters as in ``csrc/problem.h``: T steps, B batch rows, I input size, H hidden size, P size of h (``proj_size``
or H), L layers, D directions, N rows of all steps (T * B, or the sum of ``batch_sizes``), S values saved per unit and
step.

========================= =============================================================================================
``rnn_forward``           output (T, B, D * P), (B, T, D * P) or (N, D * P); h_n (L * D, B, P); c_n (L * D, B, H), or
                          (0,) without a cell state; and, with ``save``, what the backward pass needs: gates
                          (L * D, N, S, H) in the input's dtype (with ``layer_norm`` 2 * G more than S, W_ih x and
                          W_hh h less their means), or (0,) with ``recompute``, cells (L * D, N, H) in
                          float32 (float64 for float64), hidden (L - 1, N, D * P), the outputs of the lower layers.
                          With a ``mask`` (T, B), on the CPU: what is saved is of the live steps alone, at the front of
                          memory for all, zeros behind it; on CUDA hidden is (L, N, D * P), the states of all layers at
                          every step
                          With ``return_states``, whether it saves or not, cells and hidden (L, N, D * P) are results
                          with a gradient: c and h of all rows after every step, before dropout. In masked steps they
                          are 0 on the CPU and what the row carries on on CUDA, and nobody reads them
``rnn_backward``          gradients of input, h0, c0 and params; (0,) for those that ``needs`` does not ask for. With
                          ``reuse_gates`` it may write over ``gates``, which its schema does not say (as PyTorch's own
                          for cuDNN with its reserve): only for a tensor that nobody reads afterwards
``cell_forward``          one step: h (B, H), c (B, H) or (0,), gates (1, B, S, H), cells (1, B, H); gates of a cell
                          that saves none (S = 0) are (1, B, 1, H), a copy of h, which callers change in place
``cell_backward``         its gradients
``rnn_tangent``           how output, h_n and c_n change with input, h0, c0 and params: what forward mode wants. In
                          float32 and float64 on the CPU, of dense calls without options or a projection. In
                          ``params_t`` (0,) stands for none; an empty list for none at all
``rnn_backward_tangent``  the same, and how the gradients that ``rnn_backward`` gives change, with those and with its
                          seeds. The gradient of a backward pass is this, too: of the seeds, which it is linear in, how
                          the results change, and of all else, how the gradients do
``rnn_backward_each``     the gradients of ``groups`` examples, row b * groups + g of the batch being of example g:
                          those of params are (groups, ...). Rows of a packed batch may end at different steps. In
                          float32 and float64 on the CPU, of the cells that are built in
``rnn_forward_stacked``,  ``rnn_forward`` and ``rnn_backward`` of models of one shape, without controls: tensors have
``rnn_backward_stacked``  the models as their first dimension
``rnn_quantized``         ``rnn_forward`` of layers whose matrices are int8, bfloat16 or float16 and the rest float32,
                          on the CPU, without derivatives. Behind the other params of a layer and direction stand the
                          scales of the rows of int8 matrices, of w_ih, of w_hh and of w_hr
``draw_bits``             uint8 (entries, rows, ceil(units / 8)), each bit 1 with probability ``rate``, those behind the
                          last unit 0, from the int64 in ``seed`` alone, on whose device they are. Of several seeds
                          each gives its share of the entries, in their order, as a call with it alone would
========================= =============================================================================================

Forward mode, and the gradient of a backward pass, are ``rnn_tangent`` and ``rnn_backward_tangent`` where these take the
call and no further derivative is asked for; else they go through :mod:`fused_rnn.formulas`: the Autograd kernels of the
operators call :func:`forward_by_formulas` and :func:`second_derivative`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten, tree_unflatten

# Before those that look for its operators: where it is missing, that is the error.
from ._C import (
    StreamBase,
    StreamPoolBase,
    clear_packed,
    forget_quantized,
    pack_stack,
    packed_bytes_held,
    packed_bytes_limit,
    set_packed_bytes_limit,
)

# isort: split
from . import _C, _checks, batching, formulas
from . import flops as _flops  # noqa: F401, which registers them for the operators that _C has
from .settings import (
    NO_CONTROLS,
    NOTHING_WITHIN,
    AnyCellKind,
    CellKind,
    Controls,
    Settings,
    Within,
)

__all__ = [
    "StreamBase",
    "StreamPoolBase",
    "clear_packed",
    "forget_quantized",
    "pack_stack",
    "packed_bytes_held",
    "packed_bytes_limit",
    "plan",
    "run_stack",
    "run_step",
    "set_packed_bytes_limit",
    "try_stack",
    "try_step",
    "why_not_fused",
    "why_not_within",
]

# The usual call, without the way through torch.ops, for which every argument is described anew: eager, of plain
# tensors, without a mode or a transform of torch.func that wants to see it. Each returns None for any other call, and
# for one that is not valid, which is no loss of time where it matters. They are opaque to torch.compile.
try_stack = _C.run_layers  # with one more argument, True, also cells and hidden, as with return_states
try_step = _C.run_cell


def trace_stack(settings: Settings, input: Any, hx: Any, params: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """What :data:`try_stack` is in eager mode, for the compiler's tracer: the usual call as the operator alone.

    A compiled call asks each time whether all still holds that its trace has seen, and the checks of arguments would be
    most of it. The operator's fake kernel makes them, once, when the call is traced.
    """
    if not isinstance(input, Tensor) or input.dim() != 3 or not _is_traced_alone(input):
        return None
    h, c = hx if settings.kind == CellKind.LSTM and isinstance(hx, tuple) and len(hx) == 2 else (hx, None)
    if (h is not None and not isinstance(h, Tensor)) or (c is None) != (h is None or settings.kind != CellKind.LSTM):
        return None
    result = _rnn_forward(input, h, c, list(params), *_lists(settings, NO_CONTROLS, input), False)
    return result[:3]


def trace_step(settings: Settings, input: Any, hx: Any, params: Sequence[Any]) -> tuple[Tensor, Tensor | None] | None:
    """:func:`trace_stack` for a cell; states that are not given are for the long way."""
    if not isinstance(input, Tensor) or input.dim() != 2 or not _is_traced_alone(input):
        return None
    h, c = hx if settings.kind == CellKind.LSTM and isinstance(hx, tuple) and len(hx) == 2 else (hx, None)
    if not isinstance(h, Tensor) or (settings.kind == CellKind.LSTM) != isinstance(c, Tensor):
        return None
    h_next, c_next = _cell_forward(input, h, c, list(params), *_lists_of_step(settings), False)[:2]
    return h_next, c_next if c is not None else None


def _lists(settings: Settings, controls: Controls, input: Tensor) -> tuple[list[Tensor], list[int], list[float]]:
    """The arguments ``controls``, ``settings`` and ``numbers`` of an operator.

    In a program that is exported none is empty: the runtime of AOTInductor hands on None in place of an empty list.
    """
    tensors = controls.flatten(input)
    if not tensors and torch.compiler.is_exporting():
        tensors = [input.new_empty(0)] * len(controls)
    return tensors, *_lists_of_step(settings)


def _lists_of_step(settings: Settings) -> tuple[list[int], list[float]]:
    """The last two of :func:`_lists`."""
    if settings.within is None and torch.compiler.is_exporting():
        settings = settings._replace(within=NOTHING_WITHIN)
    return settings.flatten()


def _is_traced_alone(input: Tensor) -> bool:
    device = input.device.type
    return device in ("cpu", "cuda") and not torch.is_autocast_enabled(device) and why_not_fused(input) is None


_rnn_forward = torch.ops.fused_rnn.rnn_forward.default
_rnn_backward = torch.ops.fused_rnn.rnn_backward.default
_cell_forward = torch.ops.fused_rnn.cell_forward.default
_cell_backward = torch.ops.fused_rnn.cell_backward.default
_draw_bits = torch.ops.fused_rnn.draw_bits.default
_rnn_quantized = torch.ops.fused_rnn.rnn_quantized.default
_rnn_tangent = torch.ops.fused_rnn.rnn_tangent.default
_rnn_backward_each = torch.ops.fused_rnn.rnn_backward_each.default
_rnn_backward_stacked = torch.ops.fused_rnn.rnn_backward_stacked.default
_rnn_forward_stacked = torch.ops.fused_rnn.rnn_forward_stacked.default
_rnn_backward_tangent = torch.ops.fused_rnn.rnn_backward_tangent.default


_isa = os.environ.get("FUSED_RNN_ISA")
if _isa and _isa not in _C.isa_supported():
    raise ValueError(f"FUSED_RNN_ISA: expected one of {', '.join(_C.isa_supported())} on this machine, got {_isa}")


def _num_saved(settings: Settings) -> int:
    """With layer normalisation, what is normalised of the input's side and of the state's is saved as well."""
    return settings.kind.num_saved + (2 * settings.kind.num_gates if settings.num_norms else 0)


# Of the kernels: csrc/problem.h, DType.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


# Whether this build has CUDA kernels, and the oldest compute capability that they run on.
_HAS_CUDA: bool = _C.build_info()["cuda"]
_OLDEST_CAPABILITY = (8, 0)

# Custom cells: fused_rnn/compiling.py and custom.py.
add_custom_cell = _C.add_custom_cell
add_custom_kernels = _C.add_custom_kernels
add_custom_cuda_kernels = _C.add_custom_cuda_kernels
available_processors = _C.available_processors
instruction_set = _C.isa_used


def set_custom_compiler(
    add_kernels: Callable[[int, torch.dtype], None], add_cuda_kernels: Callable[[int, torch.dtype, int], None]
) -> None:
    """What an operator calls that finds no kernels of a custom cell, with the number of its kind.

    It adds them or raises RuntimeError. On CUDA it also gets :func:`cuda_architecture`.
    """
    dtypes = {number: dtype for dtype, number in _DTYPES.items()}

    def problem(add: Callable[..., None], kind: int, dtype: int, *arch: int) -> str:
        try:
            add(kind, dtypes[dtype], *arch)
        except RuntimeError as error:
            return str(error)
        return ""

    _C.set_custom_compiler(functools.partial(problem, add_kernels))
    _C.set_custom_cuda_compiler(functools.partial(problem, add_cuda_kernels))


def extension_path() -> str:
    """The file that the kernels' symbols are in."""
    assert _C.__file__ is not None
    return _C.__file__


def build_flags() -> str:
    """Compiler flags of all kernels."""
    return str(_C.build_info()["flags"])


def instruction_set_flags(name: str) -> list[str]:
    """And of those for one instruction set."""
    pairs = (entry.partition(":") for entry in _C.build_info()["instruction_set_flags"].split(";"))
    return next(flags.split() for known, _, flags in pairs if known == name)


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


# On what devices a step has two products with W_hh, the second of what the reset gate has left of h.
_RESETS_BEFORE_PRODUCT = {"cuda"}


def why_not_within(kind: AnyCellKind, within: Within, input: Tensor, recorded: bool) -> str | None:
    """Why no fused kernel has these options; None when one does.

    Args:
        recorded: whether the call keeps what a backward pass needs.
    """
    if not within.reset_after and input.device.type not in _RESETS_BEFORE_PRODUCT:
        return (
            f"no fused kernel has reset_after=False for {input.device.type} tensors: the product with W_hn has to wait "
            "for the reset gate, as it does on CUDA alone"
        )
    if kind.num_saved == 0 and within.zoneout and not within.training and recorded:
        return (
            "no fused kernel has zoneout of an RNN with gradients in eval mode: it keeps h alone, and h is a mean there"
        )
    return None


# Of the fields of Within those that kernels of all steps in one launch need not know: heads are zeros in W_hh, and what
# concerns the backward pass alone is nothing to the forward pass.
_NOTHING_TO_LAUNCHES = {"num_heads", "training"}
_NOTHING_TO_FORWARD = _NOTHING_TO_LAUNCHES | {"bptt_steps", "recurrent_grad_clip", "return_states"}
# What these kernels have where warps can hand registers to others, besides resets.
_IN_LAUNCHES = {"zoneout", "zoneout_cell", "recurrent_dropout", "reset_state", "cell_clip"}
_IN_BACKWARD_LAUNCHES = _IN_LAUNCHES | {"recurrent_grad_clip", "bptt_steps"}


def _has_options_in_launches(settings: Settings, has_reset: bool, backward: bool) -> bool:
    within, names = settings.within or NOTHING_WITHIN, _IN_BACKWARD_LAUNCHES if backward else _IN_LAUNCHES
    return has_reset or any(getattr(within, name) != getattr(NOTHING_WITHIN, name) for name in names)


def why_step_by_step(settings: Settings, backward: bool) -> str | None:
    """What of a call on a CUDA device only the kernels of one step have; None where all of it has others, too."""
    within, known = settings.within or NOTHING_WITHIN, _NOTHING_TO_LAUNCHES if backward else _NOTHING_TO_FORWARD
    names = [name for name, value in within._asdict().items() if value != getattr(NOTHING_WITHIN, name)]
    names = [name for name in names if name not in known and name not in _IN_BACKWARD_LAUNCHES]
    if backward and names == ["return_states"]:
        return "gradients of return_states, where any come, are for the kernels of one step alone"
    return f"{', '.join(names)}: for the kernels of one step alone" if names else None


# A capability is asked for once: the question takes as long as a small kernel's launch.
_capabilities: dict[torch.device, tuple[int, int]] = {}


def _capability(device: torch.device) -> tuple[int, int]:
    if torch.compiler.is_compiling():
        return torch.cuda.get_device_capability(device)
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device)
    return _capabilities[device]


def cuda_architecture(device: torch.device) -> int:
    """90 for compute capability 9.0."""
    major, minor = _capability(device)
    return 10 * major + minor


def _why_not_cuda(device: torch.device) -> str | None:
    if not _HAS_CUDA:
        return "no fused kernel for cuda tensors in this build: it was compiled without CUDA"
    capability = _capability(device)
    if capability < _OLDEST_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, _OLDEST_CAPABILITY))
        return f"{device} has compute capability {found}: the fused kernels need {needed} or newer"
    return None


def plan(
    settings: Settings,
    *,
    T: int,
    B: int,
    batch_sizes: Sequence[int] | None,
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
    has_reset: bool = False,
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
        ``merged`` (a layer with a projection runs as one without: W_hh W_hr is its W_hh), ``blocks``, ``teams``,
        ``team_blocks``, ``register_bytes``, ``weight_bytes`` and ``shared_bytes`` (of W_hh in registers and in
        shared memory, and all shared memory, per block), ``predicted_step_us`` and
        ``predicted_us``; ``backward`` as above.
    """
    kind, num_layers = settings.kind, settings.num_layers
    input_size, hidden_size, state_size = settings.input_size, settings.hidden_size, settings.state_size
    directions = settings.num_directions
    sizes = None if batch_sizes is None else list(batch_sizes)

    def one_layer(size: int, backward: bool) -> dict[str, Any]:
        if device.type == "cuda" and (why := why_step_by_step(settings, backward)):
            return {"variant": "none", "layers": 1, "reason": why}
        layer = (size, hidden_size, state_size, directions, _DTYPES[dtype], backward)
        if device.type == "cuda":
            options = _has_options_in_launches(settings, has_reset, backward)
            return _C.cuda_plan(kind, T, B, *layer, _cuda_index(device), options=options)
        return _C.plan(kind, T, B, sizes, *layer, settings.num_heads, settings.num_norms > 0)

    def wavefronts(backward: bool) -> tuple[list[dict[str, Any]], str]:
        """Of the groups of layers that run at once; none, and why, where each runs by itself."""
        if device.type != "cuda" or num_layers == 1:
            return [], ""
        if why_step_by_step(settings, backward):
            return [], ""
        if _has_options_in_launches(settings, has_reset, backward):
            return [], "layers with options within the recurrence run one by one"
        if settings.recompute and training:
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
        backward["recomputes"] = settings.recompute and _num_saved(settings) > 0
        if backward["recomputes"]:
            for key in _TIMES:
                if key in backward:
                    backward[key] += result[key]
        result["backward"] = backward
    return result


def _cuda_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def run_stack(
    settings: Settings,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    controls: Controls,
) -> tuple[Tensor, ...]:
    """A stack of recurrent layers over a whole sequence, in one operator.

    Args:
        input: (T, B, I), (B, T, I) with ``batch_first``, or (N, I) with ``batch_sizes``.
        h0: (L * D, B, P), or None for zeros.
        c0: (L * D, B, H), or None for zeros; only with ``CellKind.LSTM``.
        params: per layer and direction ``w_ih (G * H, I), w_hh (G * H, P)[, b_ih, b_hh (G * H)][, w_hr (P, H)]``
            ``[, w_peephole (3 * H)][, w_norm_ih, w_norm_hh (G * H)[, w_norm_c[, b_norm_c] (H)]]``.
        controls: with a mask, a row keeps its state in a step that is False, its output and the gradient of its input
            are 0, and what stands in its input has no effect. Not with batch_sizes.

    Returns:
        output (shaped like the input, D * P features), h_n (L * D, B, P), c_n (L * D, B, H) or, without a cell state,
        an empty tensor. With ``return_states`` also c (L * D, N, H), in float32 (float64 for float64), and h
        (L, N, D * P) after every step, 0 where a step is masked.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    result = _rnn_forward(input, h0, c0, list(params), *_lists(settings, controls, input), False)
    returns_states = settings.within is not None and settings.within.return_states
    return result[:3] + result[4:] if returns_states else result[:3]


def run_quantized(
    settings: Settings,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`run_stack` of layers whose matrices are stored in fewer bits; ``mask`` (T, B), or ``None``."""
    result: tuple[Tensor, Tensor, Tensor] = _rnn_quantized(input, h0, c0, list(params), mask, *_lists_of_step(settings))
    return result


# --- A backward pass taken apart: fused_rnn/opacus.py -----------------------------------------------------------------


def forward_for_backward(
    settings: Settings, input: Tensor, h0: Tensor, c0: Tensor | None, params: Sequence[Tensor], controls: Controls
) -> tuple[Tensor, ...]:
    """All results of ``rnn_forward``: those of :func:`run_stack`, gates, cells and hidden. No gradient is recorded."""
    results: tuple[Tensor, ...] = _rnn_forward(
        input, h0, c0, list(params), controls.flatten(input), *settings.flatten(), True
    )
    return results


def backward_of_saved(
    settings: Settings,
    seeds: Sequence[Tensor],
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    params: Sequence[Tensor],
    controls: Controls,
    results: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of input, h0, c0 and params, (0,) for those that ``needs`` does not ask for.

    Args:
        seeds: gradients of output, h_n and c_n. results: of :func:`forward_for_backward`.
    """
    output, _, _, gates, cells, hidden = results
    grad_c_n = seeds[2] if settings.kind.num_states else None
    gradients: tuple[Tensor, Tensor, Tensor, list[Tensor]] = _rnn_backward(
        seeds[0], seeds[1], grad_c_n, None, None, input, h0, c0, list(params), controls.flatten(input), output, gates,
        cells, hidden, *settings.flatten(), list(needs), False,
    )  # fmt: skip
    return gradients


def gradients_of_examples(
    settings: Settings,
    seeds: Sequence[Tensor],
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    params: Sequence[Tensor],
    controls: Controls,
    results: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of the parameters of one layer for each row of its batch, (B, ...); others are (0,).

    With options or a projection only where :func:`has_gradients_of_examples`.

    Args:
        seeds, results: as of :func:`backward_of_saved`. controls: no more than ``batch_sizes``.
        needs: for each parameter whether its gradient is wanted.
    """
    if not has_gradients_of_examples(input, settings.kind):
        return _products_of_gate_gradients(settings, seeds, input, h0, c0, params, controls, results, needs)
    batch = h0.shape[1]
    if batch == 0:  # the operator has one group at least
        return [p.new_zeros(0, *p.shape) if needed else p.new_empty(0) for p, needed in zip(params, needs)]
    output, _, _, gates, cells, hidden = results
    grad_c_n = seeds[2] if settings.kind.num_states else None
    found: list[Tensor] = _rnn_backward_each(
        seeds[0], seeds[1], grad_c_n, None, None, input, h0, c0, list(params), controls.flatten(input), output, gates,
        cells, hidden, *settings.flatten(), [False, False, False, *needs], batch,
    )[3]  # fmt: skip
    return found


def _products_of_gate_gradients(
    settings: Settings,
    seeds: Sequence[Tensor],
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    params: Sequence[Tensor],
    controls: Controls,
    results: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """:func:`gradients_of_examples` where no kernel gives them: on CUDA, and of 16-bit numbers."""
    directions, H = settings.num_directions, settings.hidden_size
    per_direction = len(params) // directions
    sizes = controls.batch_sizes

    def steps(data: Tensor) -> Tensor:
        """(T, B, .) of all rows, zeros behind the ends of packed ones."""
        return data if sizes is None else pad_packed_sequence(PackedSequence(data, sizes))[0]

    def states_before(direction: int) -> Tensor:
        """h before each step, (T, B, H); behind the ends of packed rows anything."""
        states, initial = steps(results[0])[..., direction * H : (direction + 1) * H], h0[direction]
        if direction == 0:
            return torch.cat([initial[None], states[:-1]])
        after = torch.cat([states[1:], initial[None]])
        if sizes is not None:
            lengths = (sizes.unsqueeze(1) > torch.arange(initial.shape[0])).sum(0)
            is_last = torch.arange(len(sizes)).unsqueeze(1) == lengths - 1
            after = torch.where(is_last.to(after.device).unsqueeze(2), initial, after)
        return after

    of_input, unwanted = steps(input), input.new_empty(0)
    found: list[Tensor] = []
    of_gates = _gate_gradients(settings, seeds, h0, c0, params, controls, results)
    for direction, (of_ih, of_hh) in enumerate(of_gates):
        of_ih, of_hh = steps(of_ih), steps(of_hh)
        needs_ih, needs_hh, *needs_biases = needs[direction * per_direction : (direction + 1) * per_direction]
        found.append(torch.einsum("tbg,tbi->bgi", of_ih, of_input) if needs_ih else unwanted)
        found.append(torch.einsum("tbg,tbh->bgh", of_hh, states_before(direction)) if needs_hh else unwanted)
        found += [g.sum(0) if needed else unwanted for g, needed in zip((of_ih, of_hh), needs_biases)]
    return found


def _gate_gradients(
    settings: Settings,
    seeds: Sequence[Tensor],
    h0: Tensor,
    c0: Tensor | None,
    params: Sequence[Tensor],
    controls: Controls,
    results: Sequence[Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """Of one layer, for each direction the gradients of W_ih x + b_ih and of W_hh h + b_hh.

    Each is (T, B, G * H), or (N, G * H). They differ for a GRU, whose reset gate acts on the second alone.

    Args:
        seeds, results: as of :func:`backward_of_saved`.
    """
    directions, H = settings.num_directions, settings.hidden_size
    rows = settings.kind.num_gates * H
    output, gates = results[0], results[3]
    # Of an input that is what W_ih x was, whose own W_ih is the identity. Its values are needed for nothing.
    as_input = output.new_empty(*output.shape[:-1], directions * rows)
    per_direction = len(params) // directions
    replaced = list(params)
    for direction in range(directions):
        identity = output.new_zeros(rows, directions * rows)
        identity[:, direction * rows : (direction + 1) * rows].fill_diagonal_(1)
        replaced[direction * per_direction] = identity
    needs = [True] + [False] * (2 + len(params))
    found = backward_of_saved(settings, seeds, as_input, h0, c0, replaced, controls, results, needs)[0]
    pairs = []
    for direction, of_input in enumerate(found.split(rows, -1)):
        of_state = of_input
        if settings.kind == CellKind.GRU:
            reset = gates[direction, :, 0].view(*output.shape[:-1], H)
            of_state = torch.cat([of_input[..., : 2 * H], of_input[..., 2 * H :] * reset], -1)
        pairs.append((of_input, of_state))
    return pairs


def run_step(
    settings: Settings, input: Tensor, h: Tensor, c: Tensor | None, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """One step of a cell: input (B, I), h (B, H), c (B, H) for an LSTM, params as in :func:`run_stack`.

    Returns:
        h (B, H), and c (B, H) for an LSTM, else None.
    """
    h_next, c_next = _cell_forward(input, h, c, list(params), *_lists_of_step(settings), False)[:2]
    return h_next, c_next if settings.kind == CellKind.LSTM else None


# --- Formulas: what csrc/autograd.cpp calls --------------------------------------------------------------------------


def _formulas_of(
    cell: bool, integers: list[int], numbers: list[float], controls: list[Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    """A call of an operator in differentiable tensor operations, a function of input, h, c, params.

    Its results are those that have a gradient: output, h_n, c_n[, cells, hidden], or h[, c] of a cell. Without a cell
    state c_n and cells stand for nothing.
    """

    def run(input: Tensor, h: Tensor | None, c: Tensor | None, *params: Tensor) -> tuple[Tensor, ...]:
        settings = Settings.restore(integers, numbers, input, params)
        if cell:
            assert h is not None
            h_next, c_next = formulas.run_step(settings, input, h, c, params)
            return (h_next,) if c_next is None else (h_next, c_next)
        return formulas.run_stack(settings, input, h, c, params, Controls.restore(controls))

    return run


def is_derived_again() -> bool:
    """Whether torch.func takes derivatives around the transform at work, whose results then want some of their own."""
    return batching.take_derivatives(batching.transforms()[:-1])


def forward_by_formulas(
    cell: bool,
    integers: list[int],
    numbers: list[float],
    controls: list[Tensor],
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    params: list[Tensor],
) -> Sequence[Tensor]:
    """The results of ``rnn_forward`` (of ``cell_forward`` with ``cell``) that have a gradient."""
    return _formulas_of(cell, integers, numbers, controls)(input, h, c, *params)


def second_derivative(
    cell: bool,
    integers: list[int],
    numbers: list[float],
    controls: list[Tensor],
    needs: list[bool],
    seeds: list[Tensor | None],
    primals: list[Tensor | None],
    grad_grads: list[Tensor | None],
) -> list[Tensor | None]:
    """The gradient of a backward pass, itself differentiable.

    Args:
        needs: which gradients the backward pass computed, of input, h, c and params.
        seeds: the gradients of the results that it started from; None for zeros.
        primals: input, h, c and params; None for one that is missing.
        grad_grads: gradients of its results; None for zeros.

    Returns:
        gradients of seeds and of primals, None where the argument is None.
    """
    function = _formulas_of(cell, integers, numbers, controls)
    given = [i for i, t in enumerate(primals) if t is not None]
    seeded = [i for i, t in enumerate(seeds) if t is not None]
    wanted = [i for i in given if needs[i] and grad_grads[i] is not None]
    result: list[Tensor | None] = [None] * (len(seeds) + len(primals))
    if not wanted:
        return result

    def gradients(*arguments: Tensor) -> tuple[Tensor | None, ...]:
        values, cotangents = list(primals), list(seeds)
        for i, t in zip(given, arguments, strict=False):
            values[i] = t
        for i, t in zip(seeded, arguments[len(given) :], strict=True):
            cotangents[i] = t
        grads = _pull_back(function, values, cotangents)
        return tuple(grads[i] for i in wanted)

    arguments = [primals[i] for i in given] + [seeds[i] for i in seeded]
    grads = torch.func.vjp(gradients, *arguments)[1](tuple(grad_grads[i] for i in wanted))
    places = [len(seeds) + i for i in given] + seeded
    for place, grad in zip(places, grads, strict=True):
        result[place] = grad
    return result


def _pull_back(
    function: Callable[..., tuple[Tensor, ...]], primals: Sequence[Tensor | None], seeds: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of the primals of ``function``, None for one that is None; a seed that is None stands for zeros."""
    given = [i for i, t in enumerate(primals) if t is not None]
    seeded = [i for i, t in enumerate(seeds) if t is not None]

    def seeded_outputs(*arguments: Tensor) -> tuple[Tensor, ...]:
        values = list(primals)
        for i, t in zip(given, arguments, strict=True):
            values[i] = t
        outputs = function(*values)
        return tuple(outputs[i] for i in seeded)

    pullback = torch.func.vjp(seeded_outputs, *(primals[i] for i in given))[1]
    grads: list[Tensor | None] = [None] * len(primals)
    for i, grad in zip(given, pullback(tuple(seeds[i] for i in seeded)), strict=True):
        grads[i] = grad
    return grads


# --- Derivatives of the operators of derivatives ----------------------------------------------------------------------
# Their Autograd kernels, which torch.func reaches where what it differentiates holds tensors of plain autograd.


def _given(primals: Sequence[Tensor | None], tangents: Sequence[Tensor | None]) -> list[Tensor]:
    """Tangents of the primals that there are, zeros for None and for (0,)."""
    pairs = zip(primals, tangents, strict=True)
    return [torch.zeros_like(p) if t is None or t.shape != p.shape else t for p, t in pairs if p is not None]


def _tangents_by_formulas(  # type: ignore[no-untyped-def]
    input_t, h0_t, c0_t, params_t, input, h0, c0, params, controls, output, gates, cells, hidden, integers, numbers,
):  # fmt: skip
    function = _formulas_of(False, integers, numbers, controls)
    primals = [input, h0, c0, *params]
    given = [i for i, p in enumerate(primals) if p is not None]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = list(primals)
        for i, value in zip(given, values, strict=True):
            arguments[i] = value
        return function(*arguments)

    tangents = _given(primals, [input_t, h0_t, c0_t, *(params_t or [None] * len(params))])
    return torch.func.jvp(outputs, tuple(primals[i] for i in given), tuple(tangents))[1]


def _backward_tangents_by_formulas(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, grad_output_t, grad_h_n_t, grad_c_n_t, input_t, h0_t, c0_t, params_t, input, h0,
    c0, params, controls, output, gates, cells, hidden, integers, numbers, needs,
):  # fmt: skip
    function = _formulas_of(False, integers, numbers, controls)
    like = function(input, h0, c0, *params)
    primals = [input, h0, c0, *params]
    seeds = [
        torch.zeros_like(y) if t is None else t for t, y in zip((grad_output, grad_h_n, grad_c_n), like, strict=True)
    ]
    given = [i for i, p in enumerate(primals) if p is not None]

    def results(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = list(primals)
        for i, value in zip(given, values, strict=False):
            arguments[i] = value
        grads = _pull_back(function, arguments, values[len(given) :])
        own: list[Any] = [grads[i] for i in given]
        return (*function(*arguments), *own)

    tangents = _given(primals, [input_t, h0_t, c0_t, *(params_t or [None] * len(params))])
    tangents += _given(seeds, [grad_output_t, grad_h_n_t, grad_c_n_t])
    values = (*(primals[i] for i in given), *seeds)
    output_t, h_n_t, c_n_t, *changes = torch.func.jvp(results, values, tuple(tangents))[1]
    found = dict(zip(given, changes, strict=True))
    grads = [found[i] if i in found and needed else input.new_empty(0) for i, needed in enumerate(needs)]
    return output_t, h_n_t, c_n_t, *grads[:3], grads[3:]


def _backward_each_by_formulas(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, grad_cells, grad_hidden, input, h0, c0, params, controls, output, gates, cells,
    hidden, integers, numbers, needs, groups,
):  # fmt: skip
    batch_sizes, *steering = Controls.restore(controls) if controls else NO_CONTROLS
    packed = batch_sizes is not None
    if batch_sizes is not None:
        if _checks._values_can_be_read(batch_sizes) and (batch_sizes % groups).any():
            raise RuntimeError(
                "groups: expected a number that divides each of batch_sizes, for derivatives of such gradients, got "
                f"{groups}"
            )
        batch_sizes = batch_sizes // groups
    rows, num_weights = batching.row_dim(integers, packed), len(params) - batching.num_states_behind(integers, numbers)
    weights, anew = params[:num_weights], params[num_weights:]
    given = [grad_output, grad_h_n, grad_c_n, grad_cells, grad_hidden, input, h0, c0, *anew, *steering]
    row_dims = [rows, 1, 1, 1, 1, rows, 1, 1, *([1] * len(anew)), *batching.row_dims_of_controls(packed).values()]
    dims = [None if t is None else dim + 1 for t, dim in zip(given, row_dims, strict=True)]
    split = [t if t is None else t.unflatten(dim, (-1, groups)) for t, dim in zip(given, row_dims, strict=True)]

    def gradients(*of_example):  # type: ignore[no-untyped-def]
        seeds, primals = list(of_example[:5]), of_example[5 : 8 + len(anew)]
        own = Controls(batch_sizes, *of_example[8 + len(anew) :])
        x, h, c, *states = primals
        function = _formulas_of(False, integers, numbers, own.flatten(x))
        grads = _pull_back(function, [x, h, c, *weights, *states], seeds)
        return [x.new_empty(0) if g is None or not needed else g for g, needed in zip(grads, needs, strict=True)]

    outs = [rows + 1, 2, 2, *([0] * num_weights), *([2] * len(anew))]
    kept = [needed and (i != 1 or h0 is not None) and (i != 2 or c0 is not None) for i, needed in enumerate(needs)]
    out_dims: Any = [dim if keep else 0 for dim, keep in zip(outs, kept, strict=True)]
    found = torch.func.vmap(gradients, in_dims=tuple(dims), out_dims=out_dims)(*split)
    joined = [
        input.new_empty(0) if not keep else g.flatten(dim - 1, dim) if dim else g
        for g, dim, keep in zip(found, outs, kept, strict=True)
    ]
    return *joined[:3], joined[3:]


def _backward_stacked_by_formulas(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, input, h0, c0, params, output, gates, cells, hidden, integers, numbers, needs,
):  # fmt: skip
    function = _formulas_of(False, integers, numbers, [])
    all_of: list[list[Tensor]] = []
    for i in range(input.shape[0]):
        primals = [None if t is None else t[i] for t in (input, h0, c0, *params)]
        seeds = [None if t is None else t[i] for t in (grad_output, grad_h_n, grad_c_n)]
        grads = zip(_pull_back(function, primals, seeds), needs, strict=True)
        all_of.append([input.new_empty(0) if g is None or not needed else g for g, needed in grads])
    stacked = [torch.stack(each) if each[0].numel() else each[0] for each in map(list, zip(*all_of, strict=True))]
    return *stacked[:3], stacked[3:]


def _register_gradient_of_models() -> None:
    """The gradient of ``rnn_forward_stacked``."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, h0, c0, params, *ctx.settings, _ = inputs
        ctx.given = [h0 is not None, c0 is not None]
        y, _, _, gates, cells, hidden = output
        ctx.mark_non_differentiable(gates, cells, hidden)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, gates, cells, hidden, input, *(t for t in (h0, c0) if t is not None), *params)

    def backward(ctx: Any, grad_y: Any, grad_h_n: Any, grad_c_n: Any, *_: Any) -> Any:
        *saved, input = ctx.saved_tensors[:5]
        states = list(ctx.saved_tensors[5 : 5 + sum(ctx.given)])
        params = list(ctx.saved_tensors[5 + len(states) :])
        h0, c0 = (states.pop(0) if given else None for given in ctx.given)
        integers, numbers = ctx.settings
        settings = Settings.restore(integers, numbers, input[0], [p[0] for p in params])
        if not settings.kind.num_states:
            grad_c_n = None
        needs = [True, h0 is not None, c0 is not None, *([True] * len(params))]
        arguments = (grad_y, grad_h_n, grad_c_n, input, h0, c0, params, *saved, *ctx.settings, needs)
        kept = settings.recompute or _num_saved(settings) == 0 or saved[1].numel() > 0
        kept = kept and (saved[2].numel() > 0 or not settings.kind.num_states)
        found = _rnn_backward_stacked(*arguments) if kept else _backward_stacked_by_formulas(*arguments)
        grad_input, grad_h0, grad_c0, grad_params = found
        return (
            grad_input, None if h0 is None else grad_h0, None if c0 is None else grad_c0, list(grad_params), None,
            None if ctx.settings[1] else [], None,
        )  # fmt: skip

    torch.library.register_autograd(_rnn_forward_stacked.name(), backward, setup_context=setup)


def _register_derivative(operator: torch._ops.OpOverload, formula: Callable[..., Any]) -> None:
    """The gradient of an operator as that of ``formula``, which takes its arguments and gives its results."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values, ctx.structure = tree_flatten(inputs)
        ctx.others = [None if isinstance(value, Tensor) else value for value in values]
        ctx.places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(values[i] for i in ctx.places))

    def backward(ctx: Any, *grads: Any) -> Any:
        values = list(ctx.others)
        for i, value in zip(ctx.places, ctx.saved_tensors, strict=True):
            values[i] = value
        wanted = [i for i in ctx.places if values[i].requires_grad]

        def results(*given: Tensor) -> list[Tensor]:
            arguments = list(values)
            for i, value in zip(wanted, given, strict=True):
                arguments[i] = value
            return tree_flatten(formula(*tree_unflatten(arguments, ctx.structure)))[0]

        found, pullback, *_ = torch.func.vjp(results, *(values[i] for i in wanted))
        seeds = [torch.zeros_like(y) if g is None else g for g, y in zip(tree_flatten(grads)[0], found, strict=True)]
        gradients: list[Any] = [None] * len(values)
        for i, gradient in zip(wanted, pullback(seeds), strict=True):
            gradients[i] = gradient
        # None stands for a list without tensors.
        arguments = tree_unflatten(values, ctx.structure)
        of_arguments = tree_unflatten(gradients, ctx.structure)
        is_other = [isinstance(a, list) and not all(isinstance(v, Tensor) for v in a) for a in arguments]
        return tuple(None if other else g for other, g in zip(is_other, of_arguments, strict=True))

    torch.library.register_autograd(operator.name(), backward, setup_context=setup)


_register_derivative(_rnn_tangent, _tangents_by_formulas)
_register_derivative(_rnn_backward_tangent, _backward_tangents_by_formulas)
_register_derivative(_rnn_backward_each, _backward_each_by_formulas)
_register_derivative(_rnn_backward_stacked, _backward_stacked_by_formulas)
_register_gradient_of_models()


def has_gradients_of_examples(input: Tensor, kind: int) -> bool:
    """Whether ``rnn_backward_each`` takes a call of this kind of cell that ``rnn_backward`` takes."""
    return input.device.type == "cpu" and input.dtype in (torch.float32, torch.float64) and kind <= CellKind.GRU


batching.register(has_gradients_of_examples)


# --- Fake kernels ----------------------------------------------------------------------------------------------------


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_devices(input: Tensor, batch_sizes: Tensor | None = None, **given: Any) -> None:
    """A fake kernel is called wherever one tensor is on the meta device, whatever the others are on."""
    if batch_sizes is not None and batch_sizes.device.type != "cpu":
        raise RuntimeError(f"batch_sizes: expected a 1-D int64 tensor on the CPU, got one on {batch_sizes.device}")
    for name, value in given.items():
        for index, t in enumerate(value if isinstance(value, (list, tuple)) else (value,)):
            if t is not None and t.device != input.device:
                label = f"{name}[{index}]" if isinstance(value, (list, tuple)) else name
                raise RuntimeError(f"{label}: expected a tensor on {input.device}, got {t.device}")


def _gradient_like(input: Tensor, t: Tensor | None, needed: bool) -> Tensor:
    return input.new_empty(t.shape if needed and t is not None else 0)


def _check_sizes(
    settings: Settings, input: Tensor, h: Tensor | None, c: Tensor | None, params: Sequence[Tensor], packed: bool
) -> None:
    """What the tracer's short way leaves to the operator, in the words of a user."""
    params = formulas.split_params(settings, params)[0]
    if params[0].dim() == 2:  # a layer's own size, where the input's may be wrong
        settings = settings._replace(input_size=params[0].shape[1])
    if settings.is_cell:
        _checks.check_cell_input(settings, input, h, c)
    elif not packed:
        batch = _checks.check_layer_input(settings, input, None)[1]
        if h is not None:
            _checks.check_layer_states(settings, h, c, batch)
    _checks.check_params(settings, params, input)
    if h is not None:
        _checks.check_states_like_input(input, h, c)


def _on_device(controls: Controls) -> dict[str, Tensor | None]:
    """Those that have to be on the input's device."""
    return {name: tensor for name, tensor in controls._asdict().items() if name != "batch_sizes"}


def has_draw_bits(device: torch.device) -> bool:
    """Whether :func:`draw_bits` draws there."""
    return device.type == "cpu" or (device.type == "cuda" and _why_not_cuda(device) is None)


def draw_bits(seed: Tensor, entries: int, rows: int, units: int, rate: float) -> Tensor:
    """uint8 (entries, rows, ceil(units / 8)): bit u % 8 of byte u / 8 is 1 with probability ``rate``.

    The same for the same seed, int64 of one element, whatever the number of threads and whichever device. Of several
    seeds each gives its share of the entries.
    """
    result: Tensor = _draw_bits(seed, entries, rows, units, rate)
    return result


@torch.library.register_fake("fused_rnn::draw_bits")
def _(seed, entries, rows, units, rate):  # type: ignore[no-untyped-def]
    return seed.new_empty(entries, rows, (units + 7) // 8, dtype=torch.uint8)


@torch.library.register_fake("fused_rnn::rnn_forward")
def _(input, h0, c0, params, controls, integers, numbers, save):  # type: ignore[no-untyped-def]
    settings = Settings.restore(integers, numbers, input, params)
    given = Controls.restore(controls)
    batch_sizes, mask = given.batch_sizes, given.mask
    _check_sizes(settings, input, h0, c0, params, batch_sizes is not None)
    _check_devices(input, batch_sizes, h0=h0, c0=c0, params=params, **_on_device(given))
    kind, L, D = settings.kind, settings.num_layers, settings.num_directions
    H, P = settings.hidden_size, settings.state_size
    if batch_sizes is not None:
        N = input.shape[0]
        # The number of rows of the first step is data; a state, where given, has it as a size.
        state = h0 if h0 is not None else c0
        B = state.shape[1] if state is not None else torch.library.get_ctx().new_dynamic_size()
        output = input.new_empty(N, D * P)
    else:
        B, T = (input.shape[0], input.shape[1]) if settings.batch_first else (input.shape[1], input.shape[0])
        N = T * B
        output = input.new_empty(T, B, D * P)
        output = output.transpose(0, 1) if settings.batch_first else output
    C = kind.num_states * H
    rows = (L * D, N)
    returns_states = settings.within is not None and settings.within.return_states
    num_hidden = L if returns_states or (mask is not None and input.device.type == "cuda") else L - 1
    saved = _num_saved(settings) if save and not settings.recompute else 0
    keeps = save or returns_states
    return (
        output,
        input.new_empty(L * D, B, P),
        input.new_empty((L * D, B, C) if C else 0),
        input.new_empty((*rows, saved, H) if saved else 0),
        input.new_empty((*rows, C) if keeps and C else 0, dtype=_accumulation_dtype(input.dtype)),
        input.new_empty((num_hidden, N, D * P) if keeps and num_hidden else 0),
    )


@torch.library.register_fake("fused_rnn::rnn_backward")
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, grad_cells, grad_hidden, input, h0, c0, params, controls, output, gates, cells,
    hidden, integers, numbers, needs, reuse_gates,
):  # fmt: skip
    settings = Settings.restore(integers, numbers, input, params)
    given = Controls.restore(controls)
    gradients = {"grad_output": grad_output, "grad_h_n": grad_h_n, "grad_c_n": grad_c_n}
    gradients |= {"grad_cells": grad_cells, "grad_hidden": grad_hidden}
    saved = {"output": output, "gates": gates, "cells": cells, "hidden": hidden}
    _check_devices(input, given.batch_sizes, **gradients, h0=h0, c0=c0, params=params, **_on_device(given), **saved)
    grad_input = _gradient_like(input, input, needs[0])
    if needs[0] and settings.batch_first and given.batch_sizes is None:
        grad_input = input.new_empty(input.shape[1], input.shape[0], input.shape[2]).transpose(0, 1)
    return (
        grad_input,
        _gradient_like(input, h0, needs[1]),
        _gradient_like(input, c0, needs[2]),
        [_gradient_like(input, p, needed) for p, needed in zip(params, needs[3:], strict=True)],
    )


@torch.library.register_fake("fused_rnn::rnn_quantized")
def _(input, h0, c0, params, mask, integers, numbers):  # type: ignore[no-untyped-def]
    settings = Settings.restore(integers, numbers, input, params)
    _check_devices(input, h0=h0, c0=c0, params=params, mask=mask)
    B, T = (input.shape[0], input.shape[1]) if settings.batch_first else (input.shape[1], input.shape[0])
    output = input.new_empty(T, B, settings.num_directions * settings.state_size)
    states = (settings.num_layers * settings.num_directions, B)
    return (
        output.transpose(0, 1) if settings.batch_first else output,
        input.new_empty(*states, settings.state_size),
        input.new_empty((*states, settings.hidden_size) if settings.kind.num_states else 0),
    )


@torch.library.register_fake("fused_rnn::cell_forward")
def _(input, h, c, params, integers, numbers, save):  # type: ignore[no-untyped-def]
    settings = Settings.restore(integers, numbers, input, params)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: len(params)]
    _check_sizes(settings._replace(cell_names=names), input, h, c, params, False)
    _check_devices(input, h=h, c=c, params=params)
    B, H = h.shape
    has_cell = settings.kind == CellKind.LSTM
    saved = max(settings.kind.num_saved, 1) if save else 0
    return (
        h.new_empty(B, H),
        h.new_empty((B, H) if has_cell else 0),
        h.new_empty((1, B, saved, H) if saved else 0),
        h.new_empty((1, B, H) if save and has_cell else 0, dtype=_accumulation_dtype(h.dtype)),
    )


@torch.library.register_fake("fused_rnn::cell_backward")
def _(  # type: ignore[no-untyped-def]
    grad_h, grad_c, input, h, c, params, gates, cells, integers, numbers, needs,
):  # fmt: skip
    gradients = {"grad_h": grad_h, "grad_c": grad_c}
    _check_devices(input, **gradients, h=h, c=c, params=params, gates=gates, cells=cells)
    return (
        _gradient_like(input, input, needs[0]),
        _gradient_like(input, h, needs[1]),
        _gradient_like(input, c, needs[2]),
        [_gradient_like(input, p, needed) for p, needed in zip(params, needs[3:], strict=True)],
    )


def _final_states(settings: Settings, input: Tensor) -> tuple[Tensor, Tensor]:
    """Empty h_n and c_n of a dense call without options."""
    batch = input.shape[0 if settings.batch_first else 1]
    shape = (settings.num_layers * settings.num_directions, batch, settings.hidden_size)
    return input.new_empty(shape), input.new_empty(shape if settings.kind.num_states else 0)


@torch.library.register_fake("fused_rnn::rnn_tangent")
def _(  # type: ignore[no-untyped-def]
    input_t, h0_t, c0_t, params_t, input, h0, c0, params, controls, output, gates, cells, hidden, integers, numbers,
):  # fmt: skip
    settings = Settings.restore(integers, numbers, input, params)
    changes = {"input_t": input_t, "h0_t": h0_t, "c0_t": c0_t, "params_t": params_t}
    saved = {"output": output, "gates": gates, "cells": cells, "hidden": hidden}
    on_device = _on_device(Controls.restore(controls))
    _check_devices(input, **changes, h0=h0, c0=c0, params=params, **on_device, **saved)
    return (_like_output(settings, output), *_final_states(settings, input))


@torch.library.register_fake("fused_rnn::rnn_backward_tangent")
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, grad_output_t, grad_h_n_t, grad_c_n_t, input_t, h0_t, c0_t, params_t, input, h0,
    c0, params, controls, output, gates, cells, hidden, integers, numbers, needs,
):  # fmt: skip
    settings = Settings.restore(integers, numbers, input, params)
    seeds = {"grad_output": grad_output, "grad_h_n": grad_h_n, "grad_c_n": grad_c_n}
    seeds |= {"grad_output_t": grad_output_t, "grad_h_n_t": grad_h_n_t, "grad_c_n_t": grad_c_n_t}
    changes = {"input_t": input_t, "h0_t": h0_t, "c0_t": c0_t, "params_t": params_t}
    saved = {"output": output, "gates": gates, "cells": cells, "hidden": hidden}
    on_device = _on_device(Controls.restore(controls))
    _check_devices(input, **seeds, **changes, h0=h0, c0=c0, params=params, **on_device, **saved)
    return (
        _like_output(settings, output),
        *_final_states(settings, input),
        _like_output(settings, input) if needs[0] else input.new_empty(0),
        _gradient_like(input, h0, needs[1]),
        _gradient_like(input, c0, needs[2]),
        [_gradient_like(input, p, needed) for p, needed in zip(params, needs[3:], strict=True)],
    )


@torch.library.register_fake("fused_rnn::rnn_backward_each")
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, grad_cells, grad_hidden, input, h0, c0, params, controls, output, gates, cells,
    hidden, integers, numbers, needs, groups,
):  # fmt: skip
    *of_inputs, of_params = _rnn_backward(
        grad_output, grad_h_n, grad_c_n, grad_cells, grad_hidden, input, h0, c0, params, controls, output, gates, cells,
        hidden, integers, numbers, needs, False,
    )  # fmt: skip
    num_weights = len(params) - batching.num_states_behind(integers, numbers)
    of_weights = [
        input.new_empty((groups, *p.shape) if needed else 0) for p, needed in zip(params[:num_weights], needs[3:])
    ]
    return *of_inputs, [*of_weights, *of_params[num_weights:]]


@torch.library.register_fake("fused_rnn::rnn_forward_stacked")
def _(input, h0, c0, params, integers, numbers, save):  # type: ignore[no-untyped-def]
    _check_devices(input, h0=h0, c0=c0, params=params)
    one = _rnn_forward(input[0], None if h0 is None else h0[0], None if c0 is None else c0[0],
                       [p[0] for p in params], [], integers, numbers, save)  # fmt: skip
    return tuple(_of_models(input, t) for t in one)


@torch.library.register_fake("fused_rnn::rnn_backward_stacked")
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, input, h0, c0, params, output, gates, cells, hidden, integers, numbers, needs,
):  # fmt: skip
    seeds = {"grad_output": grad_output, "grad_h_n": grad_h_n, "grad_c_n": grad_c_n}
    saved = {"output": output, "gates": gates, "cells": cells, "hidden": hidden}
    _check_devices(input, **seeds, h0=h0, c0=c0, params=params, **saved)
    return (
        input.new_empty(input.shape) if needs[0] else input.new_empty(0),
        _gradient_like(input, h0, needs[1]),
        _gradient_like(input, c0, needs[2]),
        [_gradient_like(input, p, needed) for p, needed in zip(params, needs[3:], strict=True)],
    )


def _of_models(input: Tensor, t: Tensor) -> Tensor:
    """An empty tensor of t for each model of the input."""
    if t.dim() == 1:
        return t.new_empty(0)
    return t.new_empty((input.shape[0], *t.shape))


def _like_output(settings: Settings, t: Tensor) -> Tensor:
    """An empty tensor of t's shape, in order of time."""
    if not settings.batch_first:
        return t.new_empty(t.shape)
    return t.new_empty(t.shape[1], t.shape[0], t.shape[2]).transpose(0, 1)
