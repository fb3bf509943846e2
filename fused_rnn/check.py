"""Parity self-test of this machine: `python -m fused_rnn check`.

Runs every cell in every dtype, and every option that kernels have within the recurrence, on every instruction set that
this processor has; on the CUDA device, where the kernels were built with CUDA, the cells without options. Holds outputs
and all gradients against the plain PyTorch reference in float64. The exit status is 0 when every error is within its
limit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn

from .initial import is_of_norm

CELLS = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Options that draw at random in training mode.
DRAWN = ("recurrent_dropout", "zoneout")

# Options that kernels have on CUDA alone.
CUDA_ALONE = ("reset_after",)

# What to check of each option that kernels have within the recurrence: a cell and its keywords.
OPTIONS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    # of 0 and 2: exact in every dtype
    "recurrent_dropout": tuple((cell, {"recurrent_dropout": 0.5}) for cell in ("LSTM", "GRU", "RNN_TANH")),
    "zoneout": (
        ("LSTM", {"zoneout": 0.25, "zoneout_cell": 0.5}),
        ("GRU", {"zoneout": 0.25}),
        ("RNN_TANH", {"zoneout": 0.25}),
    ),
    "activations": (
        ("LSTM", {"activation": "softsign", "recurrent_activation": "hard_sigmoid"}),
        ("LSTM", {"activation": "sigmoid", "recurrent_activation": "tanh"}),
        ("LSTM", {"activation": "relu"}),
        ("GRU", {"activation": "identity", "recurrent_activation": "softsign"}),
        ("GRU", {"activation": "relu", "recurrent_activation": "hard_sigmoid"}),
        ("RNN_SOFTSIGN", {}),
        ("RNN_SIGMOID", {}),
    ),
    "reset_after": (
        ("GRU", {"reset_after": False}),
        ("GRU", {"reset_after": False, "activation": "softsign", "recurrent_activation": "hard_sigmoid"}),
    ),
    "peephole": (("LSTM", {"peephole": True}),),
    "coupled_gates": (("LSTM", {"coupled_gates": True}), ("LSTM", {"coupled_gates": True, "peephole": True})),
    "layer_norm": (
        ("LSTM", {"layer_norm": True}),
        ("LSTM", {"layer_norm": True, "peephole": True, "activation": "softsign"}),
        ("GRU", {"layer_norm": True}),
        ("RNN_TANH", {"layer_norm": True}),
    ),
    "cell_clip": (("LSTM", {"cell_clip": 0.3}),),
    "recurrent_grad_clip": tuple((cell, {"recurrent_grad_clip": 0.25}) for cell in ("LSTM", "GRU", "RNN_TANH")),
    "bptt_steps": tuple((cell, {"bptt_steps": 5}) for cell in ("LSTM", "GRU", "RNN_TANH")),
    "reset": tuple((cell, {}) for cell in ("LSTM", "GRU", "RNN_TANH")),
    # no option, but a plain recurrence with heads
    "IndRNN": (("IndRNN", {"nonlinearity": "tanh"}), ("IndRNN", {"nonlinearity": "relu"})),
    "return_states": tuple((cell, {}) for cell in ("LSTM", "GRU", "RNN_TANH")),
}

# Largest of `scaled_errors`, in epsilons of the dtype, that a right result may have. The largest come from tensors of a
# few elements whose terms cancel: on the cases of the tests 13, 29, 2 and 13 here, 7 (float32), 2 (bfloat16) and 8
# (float16) in torch.nn.
# float32 and float64: sums over input, hidden units, batch and steps in another order than the reference, and tanh and
# sigmoid within a few ulp of the true value.
# bfloat16 and float16: h is rounded to the dtype at every step (half an epsilon each, carried on by the recurrence) and
# every result once more; sums are float32.
ERROR_LIMITS = {torch.float32: 32.0, torch.float64: 32.0, torch.bfloat16: 16.0, torch.float16: 16.0}


def scaled_error(actual: Tensor, reference: Tensor, *, least_scale: float = 0.0) -> float:
    """Largest difference over the reference's largest magnitude, in epsilons of `actual`'s dtype.

    Scaled by the whole tensor and not element by element: a gradient that is small because large terms cancel is known
    no better than those terms. NaN where either holds one; zero for empty tensors.

    Args:
        actual: result to judge, any shape and floating dtype.
        reference: the same shape, float64.
        least_scale: the difference is divided by this if it is larger.
    """
    if actual.shape != reference.shape:
        raise ValueError(f"actual: expected shape {tuple(reference.shape)}, got {tuple(actual.shape)}")
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - reference.double()).abs().max().item()
    if difference == 0.0:
        return 0.0
    scale = max(reference.double().abs().max().item(), least_scale, torch.finfo(actual.dtype).tiny)
    return difference / scale / torch.finfo(actual.dtype).eps


def scaled_errors(actual: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """`scaled_error` of the outputs and gradients of one call.

    A tensor of less than eight elements can cancel altogether and then tells no scale. For such a gradient the largest
    gradient of the call, a sum of the same terms, stands in; for an output 1, the range of h.

    Args:
        actual: results by name, gradients as `grad(name)`.
        reference: the same names and shapes, float64.
    """
    if actual.keys() != reference.keys():
        raise ValueError(f"actual: expected {', '.join(reference)}, got {', '.join(actual)}")
    gradients = {name: value for name, value in reference.items() if name.startswith("grad(") and value.numel() > 0}
    largest = max((value.abs().max().item() for value in gradients.values()), default=0.0)

    def least_scale(name: str) -> float:
        if reference[name].numel() >= 8:
            return 0.0
        return largest if name in gradients else 1.0

    return {name: scaled_error(actual[name], reference[name], least_scale=least_scale(name)) for name in reference}


def draw_gains_(module: nn.Module) -> None:
    """Gains of layer normalisation well below 1, and other biases than 0, in place.

    Gains of 1 make a recurrence in which what is rounded away grows from step to step, whatever the weights.
    """
    for name, parameter in module.named_parameters():
        if is_of_norm(name):
            nn.init.uniform_(parameter, 0.1, 0.4)


def fill_with_small_integers_(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """Parameters with which a ReLU layer computes exactly in every dtype, for integer inputs.

    ReLU's derivative jumps at 0: rounding that moves a sum across it changes gradients by any amount, and says nothing
    about the kernel. `weight_hh` is minus a permutation, so that h stays below the sums of the input and never leaves
    the integers that bfloat16 holds (up to 256).

    Args:
        module: layer or cell with torch.nn's parameter names; changed in place.
        seed: of a private generator.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            rows = parameter.shape[0]
            if name.startswith("bias"):
                parameter.copy_(torch.randint(-1, 2, (rows,), generator=generator))
                continue
            columns = parameter.shape[1]
            parameter.zero_()
            if name.startswith("weight_hh"):
                parameter[torch.arange(rows), torch.randperm(columns, generator=generator)[:rows]] = -1
            else:
                # three inputs a unit bound the growth from layer to layer
                chosen = torch.randint(0, columns, (rows, 3), generator=generator)
                signs = torch.randint(0, 2, (rows, 3), generator=generator) * 2 - 1
                parameter.scatter_(1, chosen, signs.to(parameter.dtype))
    return module


def random_values(shape: Sequence[int], *, integers: bool, generator: torch.Generator) -> Tensor:
    """Normal values that every dtype holds exactly, or the integers -2..2, as float64 of `shape`."""
    if integers:
        return torch.randint(-2, 3, tuple(shape), generator=generator).double()
    # values of bfloat16, which are values of float16 too but for the last bits of the tiniest
    return torch.randn(tuple(shape), generator=generator).bfloat16().half().double()


@dataclasses.dataclass(frozen=True)
class Call:
    """One comparison: a two-layer stack, or a single cell's step when `steps` is 0."""

    cell: str
    dtype: torch.dtype
    bidirectional: bool = False
    packed: bool = False
    masked: bool = False
    option: str = ""  # one of OPTIONS
    keywords: tuple[tuple[str, Any], ...] = ()  # of the constructor, beside torch.nn's
    training: bool = True
    steps: int = 13
    batch: int = 9
    input_size: int = 19
    hidden_size: int = 33

    @property
    def integers(self) -> bool:
        return self.cell == "RNN_RELU"

    def runs_on(self, target: str) -> bool:
        """Whether the target, an instruction set or "cuda", has kernels for this call, and the reference its draws."""
        if target != "cuda":
            return self.option not in CUDA_ALONE
        return not (self.training and self.option in DRAWN)  # a GPU has a generator of its own

    def build(self) -> nn.Module:
        name, _, nonlinearity = self.cell.partition("_")
        keywords = dict(self.keywords)
        if nonlinearity:
            keywords["nonlinearity"] = nonlinearity.lower()
        if self.steps:
            keywords |= {"num_layers": 2, "bidirectional": self.bidirectional}
        else:
            name += "Cell"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module: nn.Module = getattr(fused_rnn, name)(
                self.input_size, self.hidden_size, dtype=self.dtype, **keywords
            ).train(self.training)
            draw_gains_(module)
        return fill_with_small_integers_(module) if self.integers else module

    def run(self, module: nn.Module) -> dict[str, Tensor]:
        """Outputs and gradients by name, on the CPU, in the module's dtype."""
        like = next(module.parameters())
        generator = torch.Generator().manual_seed(1)
        shape = (self.steps, self.batch, self.input_size) if self.steps else (self.batch, self.input_size)
        values = random_values(shape, integers=self.integers, generator=generator).to(like).requires_grad_()
        sequence: Tensor | PackedSequence = values
        if self.packed:
            lengths = torch.arange(self.batch) % self.steps + 1
            sequence = pack_padded_sequence(values, lengths, enforce_sorted=False)
        options: dict[str, Any] = {}
        leaves = {"input": values} | dict(module.named_parameters())
        # drawn from a generator of its own: values are the same in every call of these sizes
        others = torch.Generator().manual_seed(2)
        if self.masked:
            draws = torch.rand(shape[:2], generator=others)
            options["mask"] = (draws < torch.linspace(0, 1, self.batch)).to(like.device)
        if self.option == "reset":
            options["reset"] = (torch.rand(shape[:2], generator=others) < 0.2).to(like.device)
            states = ("h", "c") if self.cell == "LSTM" else ("h",)
            sizes = (2 * (1 + self.bidirectional), self.batch, self.hidden_size)
            anew = [random_values(sizes, integers=False, generator=others).to(like).requires_grad_() for _ in states]
            options["reset_state"] = tuple(anew) if self.cell == "LSTM" else anew[0]
            leaves |= {f"reset_state[{name}]": state for name, state in zip(states, anew, strict=True)}
        if self.option == "return_states":
            options["return_states"] = True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            outputs = _tensors(module(sequence, **options))
        incoming = [random_values(x.shape, integers=self.integers, generator=generator).to(like) for x in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming)
        named = {f"output[{i}]": output.detach() for i, output in enumerate(outputs)}
        named |= {f"grad({name})": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {name: tensor.cpu() for name, tensor in named.items()}

    def reference(self) -> dict[str, Tensor]:
        """The same call in float64 by the plain PyTorch formulas."""
        module = copy.deepcopy(self.build()).double()
        threads = torch.get_num_threads()
        # its products are too small to share: on a busy machine threads would wait for each other
        torch.set_num_threads(1)
        try:
            with fused_rnn.use_backend("reference"):
                return self.run(module)
        finally:
            torch.set_num_threads(threads)

    def __str__(self) -> str:
        kind = "layer" if self.steps else "cell"
        options = [name for name in ("bidirectional", "packed", "masked") if getattr(self, name)]
        if self.option in ("reset", "return_states"):
            options.append(self.option)
        options += [f"{name}={value!r}" for name, value in self.keywords]
        if not self.training:
            options.append("in eval mode")
        return " ".join([self.cell, kind, str(self.dtype).removeprefix("torch."), *options])


def _tensors(result: object) -> list[Tensor]:
    """All floating tensors of a layer's or cell's result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    if not isinstance(result, tuple):
        raise TypeError(f"result: expected tensors, got {type(result).__name__}")
    return [tensor for part in result for tensor in _tensors(part)]


def _derivative_jumps(keywords: Mapping[str, Any]) -> bool:
    """Whether a derivative jumps at values that states or sums of gates come close to.

    What 16 bits round moves some of them across, and changes gradients by any amount. Those of hard_sigmoid jump at 3,
    which no sum reaches.
    """
    return "cell_clip" in keywords or "relu" in keywords.values()


def calls() -> Iterator[Call]:
    """Every comparison of one instruction set."""
    for cell, dtype in itertools.product(CELLS, DTYPES):
        for bidirectional, packed in itertools.product((False, True), repeat=2):
            yield Call(cell, dtype, bidirectional, packed)
        yield Call(cell, dtype, bidirectional=True, masked=True)
        yield Call(cell, dtype, steps=0)
    for option, given in OPTIONS.items():
        for (cell, keywords), dtype in itertools.product(given, DTYPES):
            if dtype.itemsize == 2 and _derivative_jumps(keywords):
                continue
            call = Call(cell, dtype, option=option, keywords=tuple(keywords.items()))
            if option == "IndRNN":  # units in blocks of vectors
                call = dataclasses.replace(call, hidden_size=48)
            if option == "bptt_steps":  # not for both directions
                yield call
                continue
            yield dataclasses.replace(call, bidirectional=True)
            # an RNN's means over zoneout have their gradients by the formulas
            if option == "zoneout" and cell != "RNN_TANH":
                yield dataclasses.replace(call, bidirectional=True, training=False)


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Kernels of the instruction set `name` inside the block, those in use before it afterwards.

    Raises:
        ValueError: if this machine or this build lacks it.
    """
    from fused_rnn import _C

    previous = _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(previous)


@contextlib.contextmanager
def _kernels(target: str) -> Iterator[str]:
    """The device to run on, with the kernels of `target` in use there: an instruction set, or "cuda"."""
    if target != "cuda":
        with instruction_set(target):
            yield "cpu"
        return
    # TF32 would be right to be allowed, and off by more than float32's limit.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield "cuda"
    finally:
        torch.backends.cudnn.allow_tf32 = before


@dataclasses.dataclass(frozen=True)
class Failure:
    """A result outside its limit, or a call that raised."""

    isa: str
    call: Call
    what: str

    def __str__(self) -> str:
        return f"{self.isa}: {self.call}: {self.what}"


def check(
    isas: Sequence[str], *, progress: Callable[[str], None] = lambda line: None
) -> tuple[dict[tuple[str, str, torch.dtype], float], list[Failure]]:
    """Compare all `calls()` on each instruction set with the float64 reference.

    Args:
        isas: names out of `_C.isa_supported()`, and "cuda".
        progress: called with one line before each instruction set.

    Returns:
        the worst error in epsilons for each (isa, cell or option, dtype), and everything that failed. On CUDA there are
        no calls in which something is drawn.
    """
    references = {call: call.reference() for call in calls() if any(map(call.runs_on, isas))}
    worst: dict[tuple[str, str, torch.dtype], float] = {}
    failures: list[Failure] = []
    for isa in isas:
        progress(f"{isa} ...")
        with _kernels(isa) as device, fused_rnn.use_backend("fused"):
            for call, expected in references.items():
                if not call.runs_on(isa):
                    continue
                key = (isa, call.option or call.cell, call.dtype)
                try:
                    found = call.run(call.build().to(device))
                except Exception as error:
                    worst[key] = float("inf")
                    failures.append(Failure(isa, call, f"{type(error).__name__}: {error}"))
                    continue
                for name, size in scaled_errors(found, expected).items():
                    # written so that a NaN counts as worst and fails
                    if not size <= worst.get(key, 0.0):
                        worst[key] = size
                    if not size <= ERROR_LIMITS[call.dtype]:
                        failures.append(
                            Failure(isa, call, f"{name} is off by {size:.3g} epsilons of its largest value")
                        )
                worst.setdefault(key, 0.0)
    return worst, failures


def table(worst: dict[tuple[str, str, torch.dtype], float]) -> str:
    """The worst errors as text: a row for each instruction set and cell or option, a column for each dtype."""
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    lines = [f"{'kernels':14}{'cell, option':20}" + "".join(f"{dtype:>14}" for dtype in dtypes)]
    lines.append(f"{'':14}{'limit':20}" + "".join(f"{ERROR_LIMITS[dtype]:>11.0f}   " for dtype in DTYPES))
    for isa, cell in dict.fromkeys((isa, cell) for isa, cell, _ in worst):
        entries = []
        for dtype in DTYPES:
            error = worst.get((isa, cell, dtype))
            verdict = "ok" if error is not None and error <= ERROR_LIMITS[dtype] else "NO"
            entries.append(f"{'-':>11}   " if error is None else f"{error:>11.2f} {verdict}")
        lines.append(f"{isa:14}{cell:20}" + "".join(entries))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `python -m fused_rnn check`.

    Returns:
        exit status: 0 if every comparison is within its limit, 1 if not, 2 if the kernels cannot be loaded.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fused_rnn check", description="Compare the kernels on this machine with the float64 reference."
    )
    parser.add_argument("--isa", action="append", help="check this instruction set, or cuda, only (may be repeated)")
    arguments = parser.parse_args(argv)
    try:
        from fused_rnn import _C
    except ImportError as error:
        print(f"the kernels cannot be loaded: {error}", file=sys.stderr)
        return 2

    supported = list(_C.isa_supported())
    if _C.build_info()["cuda"] and torch.cuda.is_available():
        supported.append("cuda")
    isas = arguments.isa or supported
    for isa in isas:
        if isa not in supported:
            parser.error(f"--isa: expected one of {', '.join(supported)}, got {isa}")

    start = time.monotonic()
    print(f"fused_rnn {fused_rnn.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("worst error of outputs and gradients against the float64 reference,")
    print("in epsilons of the dtype, relative to each tensor's largest value\n")
    worst, failures = check(isas, progress=lambda line: print(line, file=sys.stderr, flush=True))
    print(table(worst))
    print()
    for failure in failures:
        print(f"FAILED {failure}")
    if any(isa != "cuda" for isa in isas):
        print(f"not on a CPU, where the formulas compute it: {', '.join(CUDA_ALONE)}")
    if "cuda" in isas:
        print(f"not on cuda, whose draws the reference does not have: {', '.join(DRAWN)} in training mode")
    count = sum(call.runs_on(isa) for call in calls() for isa in isas)
    verdict = f"{len(failures)} failures" if failures else "all within their limits"
    print(f"{count} calls, forward and backward, in {time.monotonic() - start:.1f} s: {verdict}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
