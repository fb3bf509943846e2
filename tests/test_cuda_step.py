"""The step-wise CUDA kernels against the reference in float64, executed on the CPU (docs/cuda.md)."""

from __future__ import annotations

import dataclasses
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import cuda_host
from support.compare import assert_within
from torch import Tensor

from fused_rnn import formulas
from fused_rnn.check import random_values
from fused_rnn.settings import NOTHING_WITHIN, Activation, CellKind, Settings, Within

pytestmark = pytest.mark.compiles

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CELLS = list(CellKind)
# Of the gradients that the kernels give per unit, by index: those of the gates of w_ih, and of w_hh. Of a GRU with the
# reset gate after the product; of one before it those of r, z and n for both, and then none.
GRAD_GATES = {CellKind.LSTM: 4, CellKind.GRU: 4, CellKind.RNN_TANH: 1, CellKind.RNN_RELU: 1}
INPUT_GATES = {CellKind.GRU: [1, 2, 0]}
HIDDEN_GATES = {CellKind.GRU: [1, 2, 3]}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer and the way it is run; the names are those of `Problem` in tests/cuda_host/step.cpp."""

    kind: CellKind
    dtype: torch.dtype
    B: int = 5
    H: int = 11
    directions: int = 1
    lengths: tuple[int, ...] = (4,)  # rows of each step are counted from them; one number: all rows have it
    packed: bool = False
    biases: bool = True
    initial: bool = True
    vectors: bool = False
    in_place: bool = False
    few_blocks: bool = False
    masked: bool = False
    seed: int = 0
    within: Within = NOTHING_WITHIN
    dropout: bool = False  # recurrent
    resets: bool = False
    reset_state: bool = False
    state_gradients: bool = False  # gradients that come to h and c of every step, beside those of y
    proj_size: int = 0

    @property
    def has_options(self) -> bool:
        return self.within != NOTHING_WITHIN or any((self.dropout, self.resets, self.state_gradients, self.proj_size))

    @property
    def P(self) -> int:
        return self.proj_size or self.H

    @property
    def input_gates(self) -> list[int]:
        return INPUT_GATES[self.kind] if self.has_parts_of_n else list(range(self.kind.num_gates))

    @property
    def hidden_gates(self) -> list[int]:
        return HIDDEN_GATES[self.kind] if self.has_parts_of_n else list(range(self.kind.num_gates))

    @property
    def has_parts_of_n(self) -> bool:
        """Whether what W_ih and W_hh give to n have gradients of their own."""
        return self.kind == CellKind.GRU and self.within.reset_after

    @property
    def zones(self) -> tuple[bool, bool]:
        """Whether bits are drawn for h, and for c."""
        within = self.within
        return within.training and within.zoneout > 0, within.training and within.zoneout_cell > 0

    @property
    def marks(self) -> Tensor:
        """(T, B), True where a row begins anew."""
        return torch.rand(len(self.batch_sizes), self.B, generator=torch.Generator().manual_seed(self.seed)) > 0.7

    @property
    def batch_sizes(self) -> list[int]:
        lengths = self.lengths * self.B if len(self.lengths) == 1 else self.lengths
        assert len(lengths) == self.B
        return [sum(length > t for length in lengths) for t in range(max(lengths))]

    @property
    def mask(self) -> Tensor:
        """(T, B), True where a step counts: of every three rows one has no step and one has all."""
        mask = torch.rand(len(self.batch_sizes), self.B, generator=torch.Generator().manual_seed(self.seed)) < 0.5
        mask[:, 1::3], mask[:, 2::3] = False, True
        return mask if self.masked else torch.ones_like(mask)

    def tensors(self) -> list[dict[str, Tensor]]:
        """For each direction the arguments in float64, exact in the dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        G, N, exact = self.kind.num_gates, sum(self.batch_sizes), self.kind == CellKind.RNN_RELU

        def values(*shape: int, scale: float = 1.0) -> Tensor:
            v = random_values(shape, integers=exact, generator=generator)
            return v if exact else (v * scale).bfloat16().half().double()

        directions = []
        for _ in range(self.directions):
            # Small enough that no gate saturates, where 1 - tanh^2 cancels and gradients of few units have no scale.
            t = {"x": values(N, G * self.H, scale=0.5)}
            if exact:  # as `fill_with_small_integers_`: h stays an integer that every dtype holds
                t["w_hh"] = -torch.eye(self.H, dtype=torch.float64)[torch.randperm(self.H, generator=generator)]
            else:
                t["w_hh"] = values(G * self.H, self.P, scale=self.P**-0.5)
            if self.biases:
                t |= {"b_ih": values(G * self.H, scale=0.5), "b_hh": values(G * self.H, scale=0.5)}
            if self.initial:
                t |= {"h0": values(self.B, self.P), "c0": values(self.B, self.H)}
            t |= {"grad_y": values(N, self.P), "grad_h_n": values(self.B, self.P), "grad_c_n": values(self.B, self.H)}
            if self.has_options:
                t |= self.tensors_of_options(values, generator)
                for name in ("grad_y", "grad_h", "grad_cells"):  # the operator lets none in there
                    if self.masked and name in t:
                        t[name][~self.mask.flatten()] = 0
            directions.append(t)
        return directions

    def tensors_of_options(self, values: Callable[..., Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        N, t = sum(self.batch_sizes), {}
        if self.proj_size:
            t["w_hr"] = values(self.P, self.H, scale=self.H**-0.5)
        if self.within.peephole:
            t["peephole"] = values(3 * self.H, scale=0.5)
        if self.reset_state:
            t |= {"reset_h": values(self.B, self.P), "reset_c": values(self.B, self.H)}
        if self.dropout:
            t["dropout"] = 2 * torch.randint(2, (self.B, self.P), generator=generator).double()
        if self.state_gradients:
            t |= {"grad_h": values(N, self.P), "grad_cells": values(N, self.H)}
        for name, size, drawn in zip(("zoneout", "zoneout_cell"), (self.P, self.H), self.zones, strict=True):
            if drawn:
                t[name] = torch.randint(256, (N, -(-size // 8)), generator=generator).to(torch.uint8)
        if self.within.layer_norm:
            sizes = {"norm_ih": self.kind.num_gates * self.H, "norm_hh": self.kind.num_gates * self.H}
            sizes |= {"norm_c": self.H} if self.kind == CellKind.LSTM else {}
            # as fused_rnn.check.draw_gains_, exact in every dtype
            t |= {
                name: torch.randint(13, 52, (size,), generator=generator).double() / 128 for name, size in sizes.items()
            }
            if self.kind == CellKind.LSTM:
                t["b_norm_c"] = values(self.H, scale=0.5)
        return t

    def write(self, path: Path, schedule: int | None = None) -> None:
        sizes = self.batch_sizes
        numbers = [self.kind, DTYPES[self.dtype], len(sizes), self.B, self.H, self.directions, self.packed, self.biases]
        numbers += [self.initial, self.vectors, self.in_place, self.few_blocks, self.masked]
        numbers += [self.seed if schedule is None else schedule, self.has_options, self.P]
        within = self.within
        numbers += [Activation[name.upper()] for name in (within.activation, within.recurrent_activation)]
        numbers += [within.peephole, within.coupled_gates, within.bptt_steps or 0, self.dropout, *self.zones]
        numbers += [self.resets, self.reset_state, self.state_gradients, within.layer_norm]
        numbers += [within.reset_after]
        with path.open("wb") as file:
            file.write(struct.pack(f"{len(numbers)}q4d{len(sizes)}q", *map(int, numbers), *within.numbers(), *sizes))
            for given, marks in ((self.masked, self.mask), (self.resets, self.marks)):
                if given:
                    file.write(bytes(marks.numpy()))
            for direction in self.tensors():
                if self.masked:
                    direction["x"][~self.mask.flatten()] = torch.nan
                for name, tensor in direction.items():
                    dtype = self.sum_dtype if name == "grad_cells" else self.dtype
                    stored = tensor if tensor.dtype == torch.uint8 else tensor.to(dtype)
                    file.write(bytes(stored.contiguous().view(torch.uint8).numpy()))

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def read(self, path: Path) -> list[dict[str, Tensor]]:
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=self.sum_dtype)
        N, of_h, of_c = sum(self.batch_sizes), (self.B, self.P), (self.B, self.H)
        has_cell, grad_gates = self.kind == CellKind.LSTM, GRAD_GATES[self.kind]
        shapes: dict[str, tuple[int, ...]] = {"y": (N, self.P), "h_n": of_h}
        shapes |= {"c_n": of_c} if has_cell else {}
        shapes |= {"grad_gates": (N, grad_gates, self.H), "grad(h0)": of_h}
        shapes |= {"grad(c0)": of_c} if has_cell else {}
        shapes |= {"sums": (grad_gates, self.H)}
        shapes |= {"grad(peephole)": (3 * self.H,)} if self.within.peephole else {}
        shapes |= {"grad(reset_h)": of_h} if self.reset_state else {}
        shapes |= {"grad(reset_c)": of_c} if self.reset_state and has_cell else {}
        shapes |= {"hidden": (N, self.H), "grad_projected": (N, self.P)} if self.proj_size else {}
        if self.within.layer_norm:
            shapes["grad_gates"] = (N, grad_gates + 2 * self.kind.num_gates, self.H)
            shapes["sums"] = shapes["grad_gates"][1:]
            shapes |= {"normal_c": (N, self.H), "grad_c": (N, self.H)} if has_cell else {}
        results, at = [], 0
        for _ in range(self.directions):
            result = {}
            for name, shape in shapes.items():
                count = torch.Size(shape).numel()
                # Rounded to the dtype, whose epsilon is the unit of the comparison.
                result[name] = data[at : at + count].reshape(shape).to(self.dtype)
                at += count
            results.append(self.named(result))
        assert at == data.numel()
        return results

    def named(self, result: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the gates as those of the arguments that they are the gradient of."""
        gates, sums = result.pop("grad_gates"), result.pop("sums")
        first = GRAD_GATES[self.kind] if self.within.layer_norm else 0  # of those of what is normalised
        result["grad(x)"] = gates[:, [first + k for k in self.input_gates]].flatten(1)
        if "normal_c" in result:
            normal_c, grad_c = result.pop("normal_c").double(), result.pop("grad_c").double()
            result["grad(norm_c)"] = (normal_c * grad_c).sum(0).to(self.dtype)
            result["grad(b_norm_c)"] = grad_c.sum(0).to(self.dtype)
        if self.biases:
            result["grad(b_ih)"] = sums[self.input_gates].flatten()
            result["grad(b_hh)"] = sums[self.hidden_gates].flatten()
        if not self.initial:
            result.pop("grad(h0)")
            result.pop("grad(c0)", None)
        if self.proj_size:
            product = result.pop("grad_projected").double().T @ result.pop("hidden").double()
            result["grad(w_hr)"] = product.to(self.dtype)
        if self.masked and self.has_options:  # what the row carries on there is nobody's output
            result["y"] = result["y"] * self.mask.flatten().unsqueeze(1)
        return result

    def expected(self) -> list[dict[str, Tensor]]:
        """The same by `fused_rnn.formulas` and automatic differentiation, in float64.

        The reference multiplies its input by w_ih; the identity makes the projections its input.
        """
        results = []
        for d, t in enumerate(self.tensors()):
            names = ("x", "w_hh", "b_ih", "b_hh", "h0", "c0", "w_hr", "peephole", "reset_h", "reset_c")
            names += ("norm_c", "b_norm_c")
            for name in names:
                if name in t:
                    t[name].requires_grad_()
            run = self._run_masked if self.masked and not self.has_options else self._run
            result = run(t, reverse=d == 1)
            scalar = (result["y"] * t["grad_y"]).sum() + (result["h_n"] * t["grad_h_n"]).sum()
            if "c_n" in result:
                scalar = scalar + (result["c_n"] * t["grad_c_n"]).sum()
            if self.state_gradients:
                scalar = scalar + (result["y"] * t["grad_h"]).sum()
            cells = result.pop("cells", None)
            if self.state_gradients and cells is not None:
                scalar = scalar + (cells * t["grad_cells"]).sum()
            scalar.backward()
            for name in names:
                if name in t and name != "w_hh" and (t[name].grad is not None or name.startswith("reset")):
                    result[f"grad({name})"] = torch.zeros_like(t[name]) if t[name].grad is None else t[name].grad
            results.append({name: value.detach() for name, value in result.items()})
        return results

    def _layer(self, t: dict[str, Tensor], steps: list[Tensor], h0: Tensor, c0: Tensor | None, reverse: bool) -> Any:
        identity = torch.eye(self.kind.num_gates * self.H, dtype=torch.float64)
        weights = [identity, t["w_hh"], t.get("b_ih"), t.get("b_hh"), t.get("w_hr"), t.get("peephole")]
        weights += [t[name] for name in ("norm_ih", "norm_hh", "norm_c", "b_norm_c") if name in t]
        within = formulas.within_of(Settings(0, self.H, self.P, self.kind, within=self.within))
        course = formulas._Course(steps, None, None, None, None)
        if not self.has_options:
            return formulas._layer(self.kind, course, (h0, c0), weights, reverse, within)
        course = course._replace(
            live=self.mask.unsqueeze(2).unbind() if self.masked else None,
            reset=self.marks.unsqueeze(2).unbind() if self.resets else None,
            **{
                name: formulas.unpack_bits(t[name], size).split(self.batch_sizes)
                for name, size in (("zoneout", self.P), ("zoneout_cell", self.H))
                if name in t
            },
        )
        anew = (t.get("reset_h", 0), t.get("reset_c", 0))
        return formulas._layer(self.kind, course, (h0, c0), weights, reverse, within, anew, t.get("dropout"))

    def _run(self, t: dict[str, Tensor], *, reverse: bool) -> dict[str, Tensor]:
        h0, c0 = self._initial(t)
        outputs, cells, h_n, c_n = self._layer(t, list(t["x"].split(self.batch_sizes)), h0, c0, reverse)
        result = {"y": torch.cat(outputs), "h_n": h_n}
        return result if c_n is None else result | {"c_n": c_n, "cells": torch.cat(cells)}

    def _initial(self, t: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        of_h, of_c = (torch.zeros(self.B, size, dtype=torch.float64) for size in (self.P, self.H))
        return t.get("h0", of_h), t.get("c0", of_c) if self.kind == CellKind.LSTM else None

    def _run_masked(self, t: dict[str, Tensor], *, reverse: bool) -> dict[str, Tensor]:
        """Row by row: the steps that count alone, and between them the state that they left."""
        h0, c0 = self._initial(t)
        x, mask = t["x"].unflatten(0, self.mask.shape), self.mask
        y, h_n, c_n = [], [], []
        for b in range(self.B):
            live = mask[:, b]
            c = None if c0 is None else c0[b : b + 1]
            outputs, _, h, c = self._layer(t, list(x[live, b].split(1)), h0[b : b + 1], c, reverse)
            # The states in this direction's order, and how many steps have counted after each.
            states = torch.cat([h0[b : b + 1], *(outputs[::-1] if reverse else outputs)])
            y.append(states[live.flip(0).cumsum(0).flip(0) if reverse else live.cumsum(0)])
            h_n.append(h)
            c_n.append(c)
        result = {"y": torch.stack(y, 1).flatten(0, 1), "h_n": torch.cat(h_n)}
        return result if c0 is None else result | {"c_n": torch.cat(c_n)}


def run(problem: Problem, folder: Path, variant: str = "address", **options: Any) -> Any:
    """Runs the program; its result is beside `problem.read(folder / "out")`."""
    problem.write(folder / "in")
    return cuda_host.run(cuda_host.build("step", variant), folder / "in", folder / "out", **options)


def check(problem: Problem, folder: Path, variant: str = "address") -> None:
    result = run(problem, folder, variant)
    check_result(problem, folder, result)


def check_result(problem: Problem, folder: Path, result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr
    for d, (actual, expected) in enumerate(zip(problem.read(folder / "out"), problem.expected())):
        assert_within(actual, {name: expected[name] for name in actual})
        if problem.masked and not problem.has_options:
            check_what_is_masked(problem, d, actual)


def check_what_is_masked(problem: Problem, d: int, actual: dict[str, Tensor]) -> None:
    """A masked step leaves the bits of its state alone and has no gradient."""
    masked = ~problem.mask
    y = actual["y"].unflatten(0, masked.shape)
    initial = problem.tensors()[d].get("h0", torch.zeros(problem.B, problem.H)).to(y)[None]
    before = torch.cat([initial, y[:-1]] if d == 0 else [y[1:], initial])
    assert torch.equal(y[masked], before[masked])
    assert not actual["grad(x)"][masked.flatten()].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directions": 2, "seed": 1},
        {"packed": True, "lengths": (5, 5, 3, 1, 1), "directions": 2, "seed": 2},
        {"H": 16, "vectors": True, "packed": True, "lengths": (4, 3, 3, 2, 1), "directions": 2, "seed": 3},
        {"H": 24, "vectors": True, "in_place": True, "initial": False, "seed": 4},
        {"biases": False, "initial": False, "in_place": True, "directions": 2, "few_blocks": True, "B": 7, "seed": 5},
        {"H": 150, "B": 20, "lengths": (2,), "directions": 2, "seed": 6},
        {"H": 1, "B": 1, "seed": 7},
        {"H": 9, "B": 30, "lengths": (12,), "seed": 8},  # sums over rows in several chunks
        {"masked": True, "B": 7, "lengths": (6,), "directions": 2, "in_place": True, "seed": 9},
        {"masked": True, "H": 16, "vectors": True, "initial": False, "directions": 2, "seed": 10},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_step_kernels_match_the_reference(
    kind: CellKind, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    check(Problem(kind, dtype, **options), tmp_path)


LSTM_OPTIONS: dict[str, Any] = {"peephole": True, "coupled_gates": True, "cell_clip": 0.5}
ZONED: dict[str, Any] = {"zoneout": 0.3, "zoneout_cell": 0.2}
# Each option is here alone or with others that act elsewhere in a step; the drawn pairs are test_cuda_options.py's.
WITH_OPTIONS: list[tuple[CellKind, dict[str, Any], dict[str, Any]]] = [
    (CellKind.LSTM, {"activation": "softsign", "recurrent_activation": "hard_sigmoid"}, {"directions": 2}),
    (CellKind.LSTM, LSTM_OPTIONS, {"packed": True, "lengths": (5, 5, 3, 1, 1), "directions": 2, "in_place": True}),
    (CellKind.LSTM, {"peephole": True, "training": True, **ZONED}, {"resets": True, "reset_state": True}),
    (CellKind.LSTM, ZONED, {"proj_size": 5, "directions": 2, "resets": True, "reset_state": True, "dropout": True}),
    (CellKind.LSTM, {"training": True, **ZONED}, {"proj_size": 9, "masked": True, "B": 7, "state_gradients": True}),
    (CellKind.LSTM, {"recurrent_grad_clip": 0.3}, {"dropout": True, "packed": True, "lengths": (4, 3, 3, 2, 1)}),
    (CellKind.LSTM, {"bptt_steps": 2}, {"state_gradients": True, "few_blocks": True, "B": 7}),
    (CellKind.LSTM, {"layer_norm": True, "peephole": True}, {"directions": 2, "in_place": True, "H": 300, "B": 3}),
    (
        CellKind.LSTM,
        {"layer_norm": True, "training": True, **ZONED},
        {"proj_size": 5, "masked": True, "B": 7, "resets": True, "reset_state": True, "state_gradients": True},
    ),
    (
        CellKind.GRU,
        {"layer_norm": True},
        {"dropout": True, "packed": True, "lengths": (3, 2, 2, 2, 1), "in_place": True},
    ),
    (CellKind.RNN_TANH, {"layer_norm": True, "zoneout": 0.2, "training": True}, {"resets": True, "directions": 2}),
    (CellKind.GRU, {"activation": "identity", "recurrent_activation": "tanh"}, {"resets": True, "directions": 2}),
    (
        CellKind.GRU,
        {"training": True, "zoneout": 0.4},
        {"dropout": True, "directions": 2, "packed": True, "lengths": (3, 2, 2, 2, 1)},
    ),
    (
        CellKind.GRU,
        {"recurrent_grad_clip": 0.3},
        {"resets": True, "reset_state": True, "biases": False, "initial": False},
    ),
    (
        CellKind.GRU,
        {"zoneout": 0.4, "bptt_steps": 3},
        {"masked": True, "B": 7, "lengths": (6,), "state_gradients": True},
    ),
    (
        CellKind.RNN_TANH,
        {"activation": "sigmoid"},
        {"resets": True, "reset_state": True, "in_place": True, "directions": 2},
    ),
    (CellKind.RNN_TANH, {"training": True, "zoneout": 0.4}, {"dropout": True, "H": 150, "B": 20, "lengths": (2,)}),
    (CellKind.RNN_TANH, {"recurrent_grad_clip": 0.3}, {"state_gradients": True, "directions": 2, "H": 1, "B": 1}),
    *[
        (CellKind.GRU, {"reset_after": False, **within}, options)
        for within, options in (
            (
                {"activation": "softsign"},
                {"directions": 2, "in_place": True, "packed": True, "lengths": (4, 3, 3, 2, 1)},
            ),
            (
                {"recurrent_grad_clip": 0.3},
                {"dropout": True, "resets": True, "reset_state": True, "directions": 2},
            ),
            ({"training": True, "zoneout": 0.4}, {"masked": True, "B": 7, "lengths": (6,), "state_gradients": True}),
            (
                {"recurrent_activation": "hard_sigmoid", "bptt_steps": 2},
                {"dropout": True, "initial": False, "few_blocks": True, "biases": False},
            ),
        )
    ],
]


def with_options(dtype: torch.dtype, case: tuple[CellKind, dict[str, Any], dict[str, Any]], seed: int) -> Problem:
    kind, within, options = case
    return Problem(kind, dtype, seed=seed, within=Within(**within), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(WITH_OPTIONS)), ids=lambda index: str(WITH_OPTIONS[index]))
def test_step_kernels_with_options_match_the_reference(index: int, dtype: torch.dtype, tmp_path: Path) -> None:
    check(with_options(dtype, WITH_OPTIONS[index], 20 + index), tmp_path)


# Few rows: with layer normalisation each is a block, and ThreadSanitizer has only so many threads.
@pytest.mark.parametrize("index", [3, 7, 9, 12, 15, 19, 20])
def test_no_thread_of_a_step_with_options_races_with_another(index: int, tmp_path: Path) -> None:
    problem = with_options(torch.float32, WITH_OPTIONS[index], 20 + index)
    if problem.within.layer_norm:
        problem = dataclasses.replace(problem, B=2, H=24, lengths=(2,), directions=1)
    check(problem, tmp_path, "thread")


def test_every_wait_of_layer_normalisation_is_missed_where_it_is_taken_out(tmp_path: Path) -> None:
    problem = with_options(torch.float32, WITH_OPTIONS[7], 27)
    problem = dataclasses.replace(problem, B=1, H=24, lengths=(2,), directions=1)
    sites = [line.split()[1] for line in run(problem, tmp_path, "thread").stdout.splitlines()]
    of_norm = sorted({site for site in sites if "step_norm" in site})
    assert len(of_norm) == 3
    for site in of_norm:
        assert run(problem, tmp_path, "thread", skip_site=site).returncode == cuda_host.RACE, site


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32, "B": 9, "packed": True, "lengths": (2, 2, 2, 1, 1, 1, 1, 1, 1), "directions": 2},
        {"dtype": torch.bfloat16, "B": 9, "H": 8, "lengths": (2,), "vectors": True, "in_place": True},
        {"dtype": torch.float64, "B": 9, "lengths": (2,), "few_blocks": True},
        {"dtype": torch.float16, "B": 9, "H": 8, "lengths": (3,), "vectors": True, "directions": 2, "masked": True},
    ],
    ids=lambda options: str(options["dtype"]),
)
@pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.name)
def test_no_thread_of_a_step_races_with_another(kind: CellKind, options: dict[str, Any], tmp_path: Path) -> None:
    check(Problem(kind, **options), tmp_path, "thread")


def test_the_order_of_threads_changes_no_bit(tmp_path: Path) -> None:
    problem = Problem(CellKind.LSTM, torch.float32, B=20, lengths=(12,), directions=2)
    results = set()
    for schedule in range(12):
        problem.write(tmp_path / "in", schedule)
        result = cuda_host.run(cuda_host.build("step", "address"), tmp_path / "in", tmp_path / "out")
        assert result.returncode == 0, result.stderr
        results.add((tmp_path / "out").read_bytes())
    assert len(results) == 1


def test_every_wait_is_missed_where_it_is_taken_out(tmp_path: Path) -> None:
    problem = Problem(CellKind.LSTM, torch.float32, B=9, lengths=(2,))
    listed = run(problem, tmp_path, "thread").stdout.splitlines()
    sites = [line.split()[1] for line in listed]
    assert sites, "the sums over rows meet at a barrier"
    for site in sites:
        assert run(problem, tmp_path, "thread", skip_site=site).returncode == cuda_host.RACE, site
