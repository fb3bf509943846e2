"""What derivatives beyond the first cost: each over the call that it is compared with, in turns, in one run.

python -m benchmarks.derivatives                         # 2 threads, about three minutes
python -m benchmarks.derivatives --only double-backward

double-backward    the gradient of the squares of all gradients, over a forward and a backward pass; and over torch.nn's
forward-mode       torch.func.jvp in the input, over the forward pass; and that in the input and all parameters
hessian            in the input, torch.func.hessian over torch.autograd.functional.hessian of torch.nn
per-example        gradients of the parameters for each of 32 examples, over those of the whole batch
ensemble           16 models by vmap over the loop over them
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap

import fused_rnn
from fused_rnn.bench import environment
from fused_rnn.bench.peers import FUSED
from fused_rnn.bench.runner import Plan, Rounds, interleave

CELLS = ("LSTM", "GRU", "RNN")
# T, B, I, H
SHAPES = ((40, 16, 32, 64), (100, 64, 64, 96))
PLAN = Plan(min_rounds=9, max_rounds=41, seconds=5.0, precision=0.02, sample_seconds=0.02)

Calls = dict[str, Callable[[], Any]]


def layer_of(library: Any, cell: str, sizes: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = getattr(library, cell)(*sizes[2:])
    return layer


def first_and_second(layer: nn.Module, x: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    leaves = [x, *layer.parameters()]
    seed = torch.randn_like(layer(x)[0])

    def first() -> Any:
        return torch.autograd.grad(layer(x)[0], leaves, seed)

    def second() -> None:
        gradients = torch.autograd.grad(layer(x)[0], leaves, seed, create_graph=True)
        torch.autograd.grad(gradients, leaves, [g.detach() for g in gradients])

    return first, second


def double_backward(cell: str, shape: tuple[int, ...]) -> Calls:
    x = torch.randn(*shape[:3], requires_grad=True)
    first, second = first_and_second(layer_of(fused_rnn, cell, shape), x)
    return {"first": first, "both": second, "torch.nn": first_and_second(layer_of(nn, cell, shape), x)[1]}


def forward_mode(cell: str, shape: tuple[int, ...]) -> Calls:
    layer = layer_of(fused_rnn, cell, shape).requires_grad_(False)
    x, along = torch.randn(2, *shape[:3])
    parameters = dict(layer.named_parameters())
    change = {name: torch.randn_like(p) for name, p in parameters.items()}

    def output(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(layer, parameters, (x,))[0]
        return result

    return {
        "forward": lambda: layer(x),
        "input": lambda: jvp(lambda x: layer(x)[0], (x,), (along,)),
        "all": lambda: jvp(output, (x, parameters), (along, change)),
    }


def hessians(cell: str) -> Calls:
    x = torch.randn(10, 1, 16)
    own, theirs = (layer_of(library, cell, (10, 1, 16, 16)).requires_grad_(False) for library in (fused_rnn, nn))
    return {
        "torch.nn": lambda: torch.autograd.functional.hessian(lambda x: theirs(x)[0].square().sum(), x),
        "torch.func": lambda: hessian(lambda x: own(x)[0].square().sum())(x),
        "functional": lambda: torch.autograd.functional.hessian(lambda x: own(x)[0].square().sum(), x),
    }


def per_example(cell: str) -> Calls:
    layer, x = layer_of(fused_rnn, cell, (40, 32, 32, 64)), torch.randn(40, 32, 32)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = functional_call(layer, parameters, (x,))[0].square().sum()
        return result

    each = vmap(grad(lambda parameters, x: loss(parameters, x.unsqueeze(1))), in_dims=(None, 1))
    return {"whole": lambda: grad(loss)(parameters, x), "each": lambda: each(parameters, x)}


def ensemble(shape: tuple[int, ...]) -> Calls:
    models = [fused_rnn.LSTM(*shape[2:]).requires_grad_(False) for _ in range(16)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(*shape[:3])
    together = vmap(lambda p, b: functional_call(models[0], (p, b), (x,))[0])
    return {"loop": lambda: [model(x) for model in models], "vmap": lambda: together(parameters, buffers)}


def medians(first: str, calls: Calls) -> dict[str, float]:
    """Time of each other call over that of ``first``, calls in turns, medians of the rounds."""
    rounds = Rounds()
    interleave(
        {FUSED.name: calls[first], **{name: call for name, call in calls.items() if name != first}}, PLAN, rounds
    )
    return {name: rounds.ratio(name).median for name in calls if name != first}


def rows(kind: str) -> Iterator[tuple[str, float, str]]:
    """What was measured, the ratio, and the bar."""
    for cell, shape in itertools.product(CELLS, SHAPES):
        name = f"{cell} T{shape[0]} B{shape[1]} I{shape[2]} H{shape[3]}"
        if kind == "double-backward":
            found = medians("first", double_backward(cell, shape))
            yield f"{name}: the second pass over the first forward and backward", found["both"] - 1, "4"
            yield f"{name}: both over torch.nn's both", found["both"] / found["torch.nn"], "1"
        if kind == "forward-mode":
            found = medians("forward", forward_mode(cell, shape))
            yield f"{name}: along the input, over a forward call", found["input"], "3"
            yield f"{name}: along input and parameters", found["all"], ""
    for cell in CELLS:
        if kind == "hessian":
            found = medians("torch.nn", hessians(cell))
            yield (
                f"{cell} T10 B1 I16 H16: torch.func.hessian over torch.nn's autograd.functional.hessian",
                found["torch.func"],
                "0.1",
            )
            yield f"{cell}: autograd.functional.hessian over torch.nn's", found["functional"], "0.1"
        if kind == "per-example":
            found = medians("whole", per_example(cell))
            yield f"{cell} T40 B32 I32 H64: 32 examples over the whole batch", found["each"], "3"
    for shape, bar in (((32, 4, 64, 64), "0.6"), ((1, 1, 32, 32), "0.15")):
        if kind == "ensemble":
            found = medians("loop", ensemble(shape))
            yield f"LSTM T{shape[0]} B{shape[1]} H{shape[3]}: 16 models by vmap over a loop", found["vmap"], bar


def main() -> None:
    kinds = ("double-backward", "forward-mode", "hessian", "per-example", "ensemble")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=kinds, nargs="+", default=list(kinds))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    environment.keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    print("| | ratio | bar |\n| --- | ---: | ---: |")
    for kind in arguments.only:
        for name, ratio, bar in rows(kind):
            print(f"| {name} | {ratio:.2f} | {bar} |", flush=True)


if __name__ == "__main__":
    main()
