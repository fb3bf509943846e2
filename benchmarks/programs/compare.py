"""Whether a program computes the same with fused layers: values, steps of training, checkpoints both ways.

float32 everywhere, as the packages have it. Both sides add up in different orders, so a layer's results differ by some
units in the last place, 6e-8 of a value each. What steps of training make of that is the program's own: Adam, for one,
divides a gradient by its own magnitude, and so makes a full step of one that is nothing but rounding; a ReLU or a
pooled maximum near a tie goes the other way, and a part of the gradient with it. So the yardstick for what comes after
training is measured: torch.nn some times more, each time from first values that are off by one unit in the last place,
up or down as drawn. Whether something tips over is chance in each: of eight draws of one program the results were 9e-6
to 6e-4 apart. So the farthest of a few counts, and fused layers may be ten times as far off as that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_rnn.bench.runner import Deviation, deviation_of
from fused_rnn.twin import HasTwin

from .program import CONTESTANTS, FUSED, TORCH_NN, Program, Running, seed_everything

SEED = 0
ULP = 2.0**-23

# Where the same values are computed with, a share of the largest magnitude in the tensor: hundreds of float32 steps and
# layers come to 3e-6.
ROUNDING = 2e-5
# As often as the largest deviation that one unit in the last place of the first values makes in so many draws, but at
# least ROUNDING.
MARGIN = 10.0
DRAWS = 4
# Where one unit in the last place makes more than this of a difference, nothing can be told by comparing.
MOST = 0.02

STEPS = 3


class CannotCompareError(Exception):
    """A program that would compare something with itself, or does not give the same twice."""


def recurrent_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (nn.RNNBase, nn.RNNCellBase))]


def compare(program: Program) -> tuple[dict[str, Running], list[Deviation]]:
    """Set the program up on both sides and compare them.

    Returns:
        the two, which have made the program's first steps, and how far they were apart.

    Raises:
        CannotCompareError: the fused side has layers of torch.nn or none, or the other has fused ones.
    """
    running = {name: program.set_up(name, SEED) for name in CONTESTANTS}
    _check_layers(running)
    found = [
        # drawn from the same seed in the same order
        Deviation("first values", _apart(_values(running[FUSED].model), _values(running[TORCH_NN].model)), 0.0),
        Deviation("outputs", _apart(_outputs(running[FUSED]), _outputs(running[TORCH_NN])), ROUNDING),
    ]
    steps = STEPS if program.trains else 1
    ours, theirs = (_train(running[name], steps) for name in (FUSED, TORCH_NN))
    yardsticks = [_train(_moved(program, draw), steps) for draw in range(DRAWS)]
    _check_layers(running)  # a package may build its model anew
    if program.trains != any(tensor.any() for tensor in theirs["learned"]):
        raise CannotCompareError(f"its steps {'do not ' if program.trains else ''}change parameters of its model")
    for what, measure in (("steps", _apart), ("learned", _apart_in_norm), ("outputs after", _apart)):
        sensitivity = max(measure(yardstick[what], theirs[what]) for yardstick in yardsticks)
        if not sensitivity <= MOST:
            raise CannotCompareError(f"{what}: one unit in the last place makes {sensitivity:.1g} of a difference")
        found.append(Deviation(what, measure(ours[what], theirs[what]), max(ROUNDING, MARGIN * sensitivity)))
    for saved, loaded, what in (
        (TORCH_NN, FUSED, "torch.nn's checkpoint in fused layers"),
        (FUSED, TORCH_NN, "fused layers' checkpoint in torch.nn"),
    ):
        other = program.set_up(loaded, SEED)
        with torch.no_grad():  # so that what was loaded is what computes
            for parameter in other.model.parameters():
                parameter.zero_()
        other.model.load_state_dict(copy.deepcopy(running[saved].model.state_dict()))
        found.append(Deviation(what, _apart(_outputs(other), _outputs(running[saved])), ROUNDING))
    return running, found


def _check_layers(running: Mapping[str, Running]) -> None:
    theirs, ours = (recurrent_layers(running[name].model) for name in (TORCH_NN, FUSED))
    if not theirs or len(theirs) != len(ours):
        raise CannotCompareError(f"{len(theirs)} recurrent layers of torch.nn, {len(ours)} on the fused side")
    left = [type(layer).__name__ for layer in ours if not isinstance(layer, HasTwin)]
    if left or any(isinstance(layer, HasTwin) for layer in theirs):
        raise CannotCompareError(f"not fused on the fused side: {', '.join(left) or 'none, but fused on the other'}")


def _moved(program: Program, draw: int) -> Running:
    """torch.nn's side, with first values that are one unit in the last place off."""
    one = program.set_up(TORCH_NN, SEED)
    signs = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for parameter in one.model.parameters():
            up = torch.randint(2, parameter.shape, generator=signs)
            parameter.mul_(1 + ULP * (2 * up - 1))
    _outputs(one)  # as the others: a package may draw from a generator of its own
    return one


def _train(one: Running, steps: int) -> dict[str, list[Tensor]]:
    """Make the first steps; return what they returned, how far each parameter has moved, and the outputs then."""
    before = _values(one.model)
    returned = []
    for step in range(steps):
        seed_everything(SEED + step)
        returned += _detached(one.step())
    learned = [after - start for after, start in zip(_values(one.model), before)]
    return {"steps": returned, "learned": learned, "outputs after": _outputs(one)}


def _values(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in model.parameters()]


def _outputs(one: Running) -> list[Tensor]:
    training = one.model.training
    seed_everything(SEED)
    with torch.no_grad():
        results = _detached(one.outputs())
    one.model.train(training)
    return results


def _apart_in_norm(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference of all tensors together, as a share of the norm of what is expected."""
    ours, theirs = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (found, expected))
    size, difference = theirs.norm().item(), (ours - theirs).norm().item()
    return difference / size if size else difference


def _apart(found: Any, expected: Any) -> float:
    """Largest deviation of the tensors in two results; infinite if they are built differently."""
    ours, theirs = list(tensors_in(found)), list(tensors_in(expected))
    if len(ours) != len(theirs) or not theirs:
        return math.inf
    # A tensor of integers (labels, lengths) is the same or is not.
    return max(
        (
            deviation_of(a, b)
            if b.is_floating_point()
            else (0.0 if a.shape == b.shape and torch.equal(a, b) else math.inf)
        )
        if b.numel()
        else (0.0 if a.shape == b.shape else math.inf)
        for a, b in zip(ours, theirs)
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Return the tensors of a nested result; numbers and arrays become tensors, anything else is passed by."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        yield torch.from_numpy(np.ascontiguousarray(value))
    elif isinstance(value, (bool, int, float, np.number)):
        yield torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, Mapping):
        for key in value:
            yield from tensors_in(value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_in(item)


def _detached(value: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors_in(value)]
