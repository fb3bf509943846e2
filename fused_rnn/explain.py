"""Say which implementation runs a call, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import backend, functional
from .cells import RecurrentCell
from .layers import Recurrent
from .settings import NOTHING_AROUND, NOTHING_WITHIN, Around, CellKind, ForwardOptions, Settings, Steps

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found out; ``str()`` of it is a report of a few lines."""

    module: str
    """The module's ``repr``."""
    backend: str
    """``"fused"`` or ``"reference"``: what computes the call."""
    reason: str | None
    """Why the kernels do not; ``None`` if they do."""
    dtype: torch.dtype
    """What the call is computed in, after the casts of autocast."""
    device: torch.device
    num_steps: int
    """T; 1 for a cell."""
    batch_size: int
    """B; 1 without a batch dimension."""
    training: bool
    """Whether the call keeps what a backward pass needs."""
    plan: dict[str, Any] | None
    """What the planner chose for these sizes, see :func:`fused_rnn.ops.plan`; ``None`` for the reference."""
    live_steps: int | None = None
    """Of T * B steps those that count; ``None`` without ``lengths`` and ``mask``."""
    reset_steps: int | None = None
    """Of T * B steps those that ``reset`` marks; ``None`` without it."""
    reset_from: str = "zeros"
    """What rows begin anew from there: ``"zeros"`` or ``"reset_state"``."""
    options: tuple[str, ...] = ()
    """A sentence for each option that this call has beside ``torch.nn``'s: what is done for it, and where."""

    def __str__(self) -> str:
        purpose = "with gradients" if self.training else "without gradients"
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"{self.module} on T={self.num_steps}, B={self.batch_size}, {dtype}, {self.device}, {purpose}",
            "  runs on: the fused kernels" if self.plan is not None else "  runs on: the reference, in plain PyTorch",
        ]
        if self.live_steps is not None:
            lines.append(
                f"  {self.live_steps} of {self.num_steps * self.batch_size} steps count: {self._of_the_others()}"
            )
        if self.reset_steps is not None:
            of = f"{self.reset_steps} of {self.num_steps * self.batch_size} steps"
            lines.append(f"  {of} are marked in reset: rows begin anew there from {self.reset_from}")
        if self.reason is not None:
            lines.append(f"  because: {self.reason}")
        lines += [f"  {option}" for option in self.options]
        if self.plan is not None:
            lines.append(f"  forward: {_describe_pass(self.plan)}")
            if "backward" in self.plan:
                lines.append(f"  backward: {_describe_pass(self.plan['backward'])}")
        return "\n".join(lines)

    def _of_the_others(self) -> str:
        if self.live_steps == self.num_steps * self.batch_size:
            return "as without a mask"
        if self.plan is not None and self.device.type == "cpu":
            return "they run as a packed batch, the others take no time"
        return "the others take their time and carry the state on"


def _describe_pass(plan: dict[str, Any]) -> str:
    return _describe_launches(plan) if "variant" in plan else _describe_threads(plan)


def _describe_launches(plan: dict[str, Any]) -> str:
    """On a CUDA device."""
    if plan["variant"] == "none":
        text = "a matrix product and a fused kernel a step"
    else:
        in_registers, in_shared = (plan[key] / 1024 for key in ("register_bytes", "weight_bytes"))
        layers = plan["layers"]
        steps = "all steps" if layers == 1 else f"all steps of {layers} layers, in a wavefront"
        weights = "the weights" if layers > 1 else "W_hh W_hr" if plan["merged"] else "W_hh"
        resident = f"{in_registers:.0f} KiB of {weights} in registers and {in_shared:.0f} in shared memory"
        text = (
            f"one launch for {steps} ({plan['variant']}): {plan['blocks']} blocks, {plan['team_blocks']} for one "
            f"copy of {weights}, each with {resident}; about {plan['predicted_step_us']:.3g} us a step expected"
        )
    if plan.get("recomputes"):
        text += ", after the forward pass's once more"
    return f"{text} (others: {plan['reason']})" if plan["reason"] else text


def _describe_threads(plan: dict[str, Any]) -> str:
    groups = (("direction_groups", "directions"), ("row_groups", "batch rows"), ("unit_groups", "hidden units"))
    split = " and ".join(f"{what} in {plan[key]}" for key, what in groups if plan[key] > 1)
    threads = f"{plan['threads']} thread{'s' if plan['threads'] > 1 else ''}"
    again = ", gates computed again" if plan.get("recomputes") else ""
    where = f"{plan['isa']}, {threads}{f' ({split})' if split else ''}{again}"
    return (
        f"{where}, about {_time(plan['predicted_us'])} expected, "
        f"no less than {_time(plan['bound_us'])} for the {plan['bound_by']}"
    )


def _time(us: float) -> str:
    """Three digits in the unit that reads best."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} us"


def explain(
    module: nn.Module, input: Tensor | PackedSequence, hx: Any = None, **steps: Unpack[ForwardOptions]
) -> Explanation:
    """Which kernel ``module(input, hx)`` would run on, and why. Nothing is computed, and hooks do not run.

    Args:
        module: a layer or cell of this package.
        input, hx: what it would be called with. lengths, mask, reset, reset_state, return_states: the same; a cell has
            reset and reset_state of them.

    Returns:
        An :class:`Explanation`; print it.

    Raises:
        TypeError: ``module`` is no layer or cell of this package, or a cell with what only a layer has.
        Whatever the call itself would raise for these arguments.
    """
    data: Any = input
    batch_sizes = None
    params: Sequence[Any]
    if isinstance(module, Recurrent):
        hx, steps = module._for_operators(hx, steps)
        settings, params = module._settings(), module._params()
        if isinstance(input, PackedSequence):
            data, batch_sizes = input.data, input.batch_sizes
    elif isinstance(module, RecurrentCell):
        names = [name for name in ("lengths", "mask") if steps.get(name) is not None]
        if names:
            raise TypeError(f"{names[0]}: expected None for a cell, which takes one step")
        if steps.get("return_states"):
            raise TypeError("return_states: expected False for a cell, whose result is the state of its one step")
        hx, steps = module._for_operators(hx, steps)
        settings, params = module._settings(), module._params()
    else:
        hint = "; fused_rnn.convert makes one" if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) else ""
        raise TypeError(f"module: expected a layer or cell of fused_rnn, got a {type(module).__name__}{hint}")

    given_steps = functional.steps_of(batch_sizes, steps)
    region = functional.autocast_region(settings, data)
    if region is not None:
        data, hx, params = functional.autocast(settings, region, data, hx, params)
        given_steps = functional.cast_reset_state(given_steps, data)
    if isinstance(module, Recurrent):
        call = functional.prepare_layers(settings, data, hx, params, given_steps)
    else:
        call = functional.prepare_cell(settings, data, hx, params, given_steps)
    mask, reset = call.controls.mask, call.controls.reset

    tensors = (call.input, call.h, call.c, *params, *call.anew)
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors if tensor is not None)
    batch_size = 1 if call.batch is None else call.batch
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    live_steps = None if mask is None else int(mask.sum())
    if mask is not None and live_steps != mask.numel() and call.input.device.type == "cpu":
        sizes = _packed_sizes(mask)
    in_slices = functional.is_in_slices(settings, given_steps, call)
    plan = None
    if call.why_reference is None:
        assert backend.ops is not None
        num_steps = call.num_steps if sizes is None else len(sizes)
        if training and in_slices and sizes is None:
            assert settings.within is not None and settings.within.bptt_steps is not None
            num_steps = min(num_steps, settings.within.bptt_steps)
        plan = backend.ops.plan(
            functional.settings_of_operator(settings, given_steps, call.num_steps, in_slices),
            T=num_steps,
            B=batch_size if sizes is None else sizes[0],
            batch_sizes=sizes,
            dtype=call.input.dtype,
            device=call.input.device,
            training=training,
            has_reset=reset is not None and not settings.is_cell,
        )
    return Explanation(
        module=repr(module),
        backend="reference" if plan is None else "fused",
        reason=call.why_reference,
        dtype=call.input.dtype,
        device=call.input.device,
        num_steps=call.num_steps,
        batch_size=batch_size,
        training=training,
        plan=plan,
        live_steps=live_steps,
        reset_steps=None if reset is None else int(reset.sum()),
        reset_from="reset_state" if call.anew else "zeros",
        options=(
            *_options_around(settings.around or NOTHING_AROUND),
            *_options_within(settings, call, training, in_slices),
            *_option_states(settings, call, given_steps),
        ),
    )


def _options_around(around: Around) -> list[str]:
    sentences = []
    if around.input_dropout:
        sentences.append("input_dropout: the input is multiplied by a factor for each row and feature first")
    if around.weight_dropout:
        sentences.append("weight_dropout: every W_hh is multiplied by factors drawn once for the call first")
    if not around.recurrent_bias and not around.independent:
        sentences.append("recurrent_bias=False: the kernels get zeros")
    return sentences


def _options_within(settings: Settings, call: functional.Call, with_gradients: bool, in_slices: bool) -> list[str]:
    within = settings.within or NOTHING_WITHIN
    where = "the formulas" if call.why_reference is not None else "the kernels"
    sentences = []
    if within.recurrent_dropout:
        sentences.append(f"recurrent_dropout: factors for each row and unit are drawn once, {where} multiply h by them")
    for name, state in (("zoneout", "h"), ("zoneout_cell", "c")):
        if rate := getattr(within, name):
            mean = f"{where} take the mean of the new {state} and the old"
            drawn = f"bits are drawn first, {where} keep the {state} of units by them"
            sentences.append(f"{name}={rate}: {drawn if within.training else mean}")
    for name in _IN_EACH_STEP:
        if (value := getattr(within, name)) != getattr(NOTHING_WITHIN, name):
            sentences.append(f"{name}={value!r}: {where} have it in each step")
    if settings.is_independent:
        sentences.append(f"weight_hh: {where} take its {settings.hidden_size} weights for as many heads of one unit")
    elif within.num_heads > 1:
        product = "each head's part of h by its own block of W_hh"
        if call.why_reference is None and call.input.is_cuda:
            product = "h by W_hh as one matrix, with zeros between the heads"
        sentences.append(f"num_heads={within.num_heads}: {where} multiply {product}")
    if within.layer_norm:
        of_cell = ", W_hh h and c" if settings.kind == CellKind.LSTM else " and W_hh h"
        threads = (
            ", a block of threads each"
            if call.input.is_cuda
            else ", of which threads divide the rows and never the units"
        )
        threads = "" if call.why_reference is not None else threads
        sentences.append(f"layer_norm: {where} normalise W_ih x{of_cell} of each row in each step{threads}")
    if within.recurrent_grad_clip is not None and with_gradients:
        limit = within.recurrent_grad_clip
        sentences.append(f"recurrent_grad_clip={limit}: {where} clamp what comes back through time to each h")
    k = within.bptt_steps
    if k is not None and k < call.num_steps and with_gradients:
        if in_slices:
            calls = -(-call.num_steps // k)
            sentences.append(f"bptt_steps={k}: {calls} calls, the passes below are those of the longest")
        else:
            sentences.append(f"bptt_steps={k}: {where} stop the gradients of the states there")
    return sentences


def _option_states(settings: Settings, call: functional.Call, steps: Steps) -> list[str]:
    if not steps.return_states:
        return []
    where = "the formulas" if call.why_reference is not None else "the kernels"
    states = "h and c" if settings.kind == CellKind.LSTM else "h"
    return [f"return_states: {where} keep {states} of every layer at every step"]


_IN_EACH_STEP = ("activation", "recurrent_activation", "reset_after", "peephole", "coupled_gates", "cell_clip")


def _packed_sizes(mask: Tensor) -> list[int]:
    """``batch_sizes`` of the packed batch of the steps that count, of which there is one at least."""
    counts = mask.sum(0)
    sizes: list[int] = [int((counts > step).sum()) for step in range(int(counts.max()))]
    return sizes or [0]
