"""The step-wise CUDA kernels against the reference in float64, executed on the CPU (docs/cuda.md)."""

from __future__ import annotations

import dataclasses
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support import cuda_host
from support.compare import assert_within
from torch import Tensor

from fused_rnn import formulas
from fused_rnn.check import random_values
from fused_rnn.settings import CellKind, Settings

pytestmark = pytest.mark.compiles

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CELLS = list(CellKind)
# Of the gradients that the kernels give per unit, by index: those of the gates of w_ih, and of w_hh.
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
                t["w_hh"] = values(G * self.H, self.H, scale=self.H**-0.5)
            if self.biases:
                t |= {"b_ih": values(G * self.H, scale=0.5), "b_hh": values(G * self.H, scale=0.5)}
            if self.initial:
                t |= {"h0": values(self.B, self.H), "c0": values(self.B, self.H)}
            t |= {"grad_y": values(N, self.H), "grad_h_n": values(self.B, self.H), "grad_c_n": values(self.B, self.H)}
            directions.append(t)
        return directions

    def write(self, path: Path, schedule: int | None = None) -> None:
        sizes = self.batch_sizes
        numbers = [self.kind, DTYPES[self.dtype], len(sizes), self.B, self.H, self.directions, self.packed, self.biases]
        numbers += [self.initial, self.vectors, self.in_place, self.few_blocks, self.masked]
        numbers += [self.seed if schedule is None else schedule, *sizes]
        with path.open("wb") as file:
            file.write(struct.pack(f"{len(numbers)}q", *map(int, numbers)))
            if self.masked:
                file.write(bytes(self.mask.numpy()))
            for direction in self.tensors():
                if self.masked:
                    direction["x"][~self.mask.flatten()] = torch.nan
                for tensor in direction.values():
                    file.write(bytes(tensor.to(self.dtype).contiguous().view(torch.uint8).numpy()))

    def read(self, path: Path) -> list[dict[str, Tensor]]:
        sum_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=sum_dtype)
        N, state = sum(self.batch_sizes), (self.B, self.H)
        has_cell, grad_gates = self.kind == CellKind.LSTM, GRAD_GATES[self.kind]
        shapes: dict[str, tuple[int, ...]] = {"y": (N, self.H), "h_n": state}
        shapes |= {"c_n": state} if has_cell else {}
        shapes |= {"grad_gates": (N, grad_gates, self.H), "grad(h0)": state}
        shapes |= {"grad(c0)": state} if has_cell else {}
        shapes |= {"sums": (grad_gates, self.H)}
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
        everything = list(range(self.kind.num_gates))
        result["grad(x)"] = gates[:, INPUT_GATES.get(self.kind, everything)].flatten(1)
        if self.biases:
            result["grad(b_ih)"] = sums[INPUT_GATES.get(self.kind, everything)].flatten()
            result["grad(b_hh)"] = sums[HIDDEN_GATES.get(self.kind, everything)].flatten()
        if not self.initial:
            result.pop("grad(h0)")
            result.pop("grad(c0)", None)
        return result

    def expected(self) -> list[dict[str, Tensor]]:
        """The same by `fused_rnn.formulas` and automatic differentiation, in float64.

        The reference multiplies its input by w_ih; the identity makes the projections its input.
        """
        results = []
        for d, t in enumerate(self.tensors()):
            for name in ("x", "w_hh", "b_ih", "b_hh", "h0", "c0"):
                if name in t:
                    t[name].requires_grad_()
            run = self._run_masked if self.masked else self._run
            result = run(t, reverse=d == 1)
            scalar = (result["y"] * t["grad_y"]).sum() + (result["h_n"] * t["grad_h_n"]).sum()
            if "c_n" in result:
                scalar = scalar + (result["c_n"] * t["grad_c_n"]).sum()
            scalar.backward()
            for name in ("h0", "c0", "x", "b_ih", "b_hh"):
                if name in t and t[name].grad is not None:
                    result[f"grad({name})"] = t[name].grad
            results.append({name: value.detach() for name, value in result.items()})
        return results

    def _layer(self, t: dict[str, Tensor], steps: list[Tensor], h0: Tensor, c0: Tensor | None, reverse: bool) -> Any:
        identity = torch.eye(self.kind.num_gates * self.H, dtype=torch.float64)
        weights = [identity, t["w_hh"], t.get("b_ih"), t.get("b_hh"), None, None]
        within = formulas.within_of(Settings(0, self.H, self.H, self.kind))
        course = formulas._Course(steps, None, None, None, None)
        return formulas._layer(self.kind, course, (h0, c0), weights, reverse, within)

    def _run(self, t: dict[str, Tensor], *, reverse: bool) -> dict[str, Tensor]:
        h0, c0 = self._initial(t)
        outputs, _, h_n, c_n = self._layer(t, list(t["x"].split(self.batch_sizes)), h0, c0, reverse)
        return {"y": torch.cat(outputs), "h_n": h_n} | ({"c_n": c_n} if c_n is not None else {})

    def _initial(self, t: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        zeros = torch.zeros(self.B, self.H, dtype=torch.float64)
        return t.get("h0", zeros), t.get("c0", zeros) if self.kind == CellKind.LSTM else None

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
        if problem.masked:
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
