"""The arithmetic of recurrent layers by hand, in numpy, beside the layers: every state and every gradient.

    python examples/by_hand.py

A tanh RNN of 2 units over 3 steps of 5 numbers, a step of an LSTM, a step of a GRU, and backpropagation through time of
an RNN, each formula written out. The result is what the layer says, to the last digits of float64; the exit status is 1
if not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from common import options
from common.options import DTYPES, ExampleError
from torch import nn

import fused_rnn

Array = np.ndarray[Any, np.dtype[np.float64]]
Pair = tuple[str, Array, torch.Tensor]  # what it is, by hand, the layer's


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


# ---------------------------------------------------------------------------------------------------------------------
# Steps. x (B, I), h and c (B, H); the rows of W_ih (G * H, I), W_hh (G * H, H) and of the biases are those of torch.nn.


def rnn_step(x: Array, h: Array, w_ih: Array, w_hh: Array, b_ih: Array, b_hh: Array) -> Array:
    """h' = tanh(x W_ih^T + b_ih + h W_hh^T + b_hh) (Elman 1990)."""
    return np.tanh(x @ w_ih.T + b_ih + h @ w_hh.T + b_hh)


def lstm_step(x: Array, h: Array, c: Array, w_ih: Array, w_hh: Array, b_ih: Array, b_hh: Array) -> tuple[Array, Array]:
    """Hochreiter and Schmidhuber 1997, with the forget gate of Gers 2000."""
    sums = x @ w_ih.T + b_ih + h @ w_hh.T + b_hh
    i, f, g, o = np.split(sums, 4, axis=1)
    new_c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(new_c), new_c


def gru_step(x: Array, h: Array, w_ih: Array, w_hh: Array, b_ih: Array, b_hh: Array) -> Array:
    """Cho 2014, the reset gate behind the product, as cuDNN and torch.nn have it."""
    of_x, of_h = np.split(x @ w_ih.T + b_ih, 3, axis=1), np.split(h @ w_hh.T + b_hh, 3, axis=1)
    r, z = sigmoid(of_x[0] + of_h[0]), sigmoid(of_x[1] + of_h[1])
    n = np.tanh(of_x[2] + r * of_h[2])
    return (1 - z) * n + z * h


# ---------------------------------------------------------------------------------------------------------------------
# Backpropagation through time


class Rnn:
    """One step, which remembers what its backward pass needs."""

    def __init__(self, w_ih: Array, w_hh: Array, b_ih: Array, b_hh: Array) -> None:
        self.weights = w_ih, w_hh, b_ih, b_hh

    def forward(self, x: Array, h: Array) -> Array:
        self.x, self.h = x, h
        self.new_h = rnn_step(x, h, *self.weights)
        return self.new_h

    def backward(self, gradient: Array) -> tuple[Array, Array, list[Array]]:
        """From the gradient of the new state those of x, of h, and of W_ih, W_hh, b_ih, b_hh."""
        w_ih, w_hh, _, _ = self.weights
        sums = gradient * (1 - self.new_h**2)  # tanh' = 1 - tanh^2
        bias = sums.sum(0)
        return sums @ w_ih, sums @ w_hh, [sums.T @ self.x, sums.T @ self.h, bias, bias]


class TimeRnn:
    """Steps one after the other with the same weights: x (T, B, I) -> h of every step (T, B, H)."""

    def __init__(self, *weights: Array) -> None:
        self.weights = weights

    def forward(self, x: Array, h: Array) -> Array:
        self.steps = []
        outputs = []
        for row in x:
            step = Rnn(*self.weights)
            h = step.forward(row, h)
            self.steps.append(step)
            outputs.append(h)
        return np.stack(outputs)

    def backward(self, gradients: Array) -> tuple[Array, Array, list[Array]]:
        """From the gradient of every step's output those of x, of the first state, and of the weights: their sums."""
        of_h = np.zeros_like(gradients[0])
        of_x = []
        totals = [np.zeros_like(weight) for weight in self.weights]
        for step, gradient in zip(reversed(self.steps), gradients[::-1], strict=True):
            # A state is used twice: as an output, and by the step that follows.
            x, of_h, of_weights = step.backward(gradient + of_h)
            of_x.append(x)
            totals = [total + part for total, part in zip(totals, of_weights, strict=True)]
        return np.stack(of_x[::-1]), of_h, totals


# ---------------------------------------------------------------------------------------------------------------------
# Beside the layers


class Programs:
    """Makes layers as the command line says, and what numpy needs of them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.package: Any = fused_rnn if arguments.backend == "fused" else nn
        self.dtype, self.device = DTYPES[arguments.dtype], arguments.device
        self.generator = torch.Generator().manual_seed(arguments.seed)

    def layer(self, kind: str, inputs: int, units: int) -> Any:
        torch.manual_seed(self.arguments.seed)
        layer = getattr(self.package, kind)(inputs, units).to(self.device, self.dtype)
        return layer

    def call(self, layer: Any) -> Callable[..., Any]:
        return torch.compile(layer) if self.arguments.compile else layer

    def draw(self, *shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.device, self.dtype).requires_grad_()


def arrays(*tensors: torch.Tensor) -> list[Array]:
    return [tensor.detach().double().cpu().numpy() for tensor in tensors]


def rnn_over_three_steps(programs: Programs) -> list[Pair]:
    layer = programs.layer("RNN", 5, 2)
    x = programs.draw(3, 1, 5)
    output, _ = programs.call(layer)(x)
    h = np.zeros((1, 2))
    pairs = []
    for t, row in enumerate(arrays(x)[0]):
        h = rnn_step(row, h, *arrays(*layer.parameters()))
        pairs.append((f"h of step {t + 1}", h, output[t]))
    return pairs


def step_of_lstm(programs: Programs) -> list[Pair]:
    cell = programs.layer("LSTMCell", 3, 2)
    x, h, c = programs.draw(1, 3), programs.draw(1, 2), programs.draw(1, 2)
    new_h, new_c = programs.call(cell)(x, (h, c))
    by_hand = lstm_step(*arrays(x, h, c, *cell.parameters()))
    return [("h", by_hand[0], new_h), ("c", by_hand[1], new_c)]


def step_of_gru(programs: Programs) -> list[Pair]:
    cell = programs.layer("GRUCell", 3, 2)
    x, h = programs.draw(1, 3), programs.draw(1, 2)
    return [("h", gru_step(*arrays(x, h, *cell.parameters())), programs.call(cell)(x, h))]


def through_time(programs: Programs) -> list[Pair]:
    layer = programs.layer("RNN", 3, 2)
    x, h, gradient = programs.draw(4, 2, 3), programs.draw(1, 2, 2), programs.draw(4, 2, 2)
    output, _ = programs.call(layer)(x, h)
    leaves = [x, h, *layer.parameters()]
    found = torch.autograd.grad(output, leaves, gradient)
    by_hand = TimeRnn(*arrays(*layer.parameters()))
    outputs = by_hand.forward(arrays(x)[0], arrays(h)[0][0])
    of_x, of_h, of_weights = by_hand.backward(arrays(gradient)[0])
    names = ("x", "h0", "W_ih", "W_hh", "b_ih", "b_hh")
    return [
        ("outputs", outputs, output),
        *(
            (f"dL/d{name}", value, tensor)
            for name, value, tensor in zip(names, (of_x, of_h[None], *of_weights), found, strict=True)
        ),
    ]


PARTS = {
    "a tanh RNN of 2 units over 3 steps of 5 numbers": rnn_over_three_steps,
    "a step of an LSTM of 2 units": step_of_lstm,
    "a step of a GRU of 2 units": step_of_gru,
    "an RNN over 4 steps of 2 rows, backwards through time": through_time,
}


def run(arguments: argparse.Namespace) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.dtype in ("bfloat16", "float16"):
        raise ExampleError(
            f"--dtype: expected float64 or float32 for a comparison to the last digit, got {arguments.dtype}"
        )
    programs = Programs(arguments)
    tolerance = 8 * torch.finfo(programs.dtype).eps  # a few roundings of numbers about 1
    digits = 15 if programs.dtype == torch.float64 else 7
    right = True
    for title, part in PARTS.items():
        print(f"\n{title}")
        rows = [["", "by hand", "the layer", "difference"]]
        for name, by_hand, tensor in part(programs):
            theirs = arrays(tensor)[0]
            difference = float(np.abs(by_hand - theirs).max())
            right &= difference <= tolerance * max(1.0, float(np.abs(theirs).max()))
            shown = [f"{value.flat[0]:.{digits}f}" for value in (by_hand, theirs)]
            more = f" and {theirs.size - 1} more" if theirs.size > 1 else ""
            rows.append([name + more, *shown, f"{difference:.0e}"])
        print(options.table(rows))
    print("\nevery number agrees" if right else "\nDIFFERENT: this is a bug, please report it")
    return 0 if right else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status is that of `common.options.run_program`."""
    parser = argparse.ArgumentParser(prog="by_hand", description=str(__doc__).splitlines()[0])
    options.add_layer_options(parser, dtype="float64")
    return options.run_program("by_hand", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
