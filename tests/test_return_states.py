"""`return_states=True`: h and c of every layer and direction at every step, with gradients."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, Data, detached, incoming_gradients
from support.compare import assert_close_to_twin, assert_same, assert_within
from support.pairwise import pairwise
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

import fused_rnn
from fused_rnn.check import random_values
from fused_rnn.diagnostics import gradient_flow

F64 = torch.float64


@pytest.fixture(params=["reference", pytest.param("fused", marks=pytest.mark.kernels)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fused_rnn.use_backend(request.param):
        yield request.param


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a layer, which of its steps count, and where its rows begin anew."""

    case: Case
    counts: str = "all"  # or "lengths" or "mask"
    resets: bool = False
    has_state: bool = False  # reset_state=
    recompute: bool = False
    seed: int = 0

    def __str__(self) -> str:
        options = [name for name in ("resets", "has_state", "recompute") if getattr(self, name)]
        return "-".join([str(self.case), self.counts, *options, str(self.seed)])

    @functools.cached_property
    def live(self) -> Tensor:
        """bool (T, B): of the first row all steps, of the second of three or more none."""
        case, generator = self.case, torch.Generator().manual_seed(self.seed)
        if case.packing != "padded":
            lengths = torch.tensor(case.lengths)
            if case.packing == "unsorted":
                lengths = lengths.roll(-(case.batch // 3 + 1))
            return torch.arange(case.steps).unsqueeze(1) < lengths
        if self.counts == "all":
            return torch.ones(case.steps, case.batch, dtype=torch.bool)
        if self.counts == "lengths":
            lengths = torch.randint(0, case.steps + 1, (case.batch,), generator=generator)
            live = torch.arange(case.steps).unsqueeze(1) < lengths
        else:
            live = torch.rand(case.steps, case.batch, generator=generator) < 0.5
        live[:, 0] = True
        if case.batch > 2:
            live[:, 1] = False
        return live

    @functools.cached_property
    def marks(self) -> Tensor:
        """bool (T, B)."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        marked = torch.rand(self.case.steps, self.case.batch, generator=generator) < 0.3
        return marked if self.resets else torch.zeros_like(marked)

    def data(self) -> tuple[Data, tuple[Tensor, ...]]:
        """Leaves of the call, and those of reset_state."""
        case, generator = self.case, torch.Generator().manual_seed(self.seed + 2)
        shapes = case.replace(hx=True).state_shapes if self.has_state else []
        states = [random_values(shape, integers=case.integers, generator=generator) for shape in shapes]
        return case.data(seed=self.seed), tuple(state.to(case.dtype).requires_grad_() for state in states)

    def as_argument(self, steps: Tensor) -> Tensor:
        return steps.T if self.case.batch_first else steps

    def options(self, states: tuple[Tensor, ...]) -> dict[str, Any]:
        """Keywords of the call beside return_states."""
        given: dict[str, Any] = {}
        if self.resets:
            given["reset"] = self.as_argument(self.marks)
        if states:
            given["reset_state"] = states if self.case.has_cell_state else states[0]
        if self.counts == "lengths":
            given["lengths"] = self.live.sum(0)
        elif self.counts == "mask":
            given["mask"] = self.as_argument(self.live)
        return given

    def build(self) -> Any:
        module: Any = self.case.build(fused_rnn)
        module.recompute = self.recompute
        return module

    def outputs(self, result: Any) -> dict[str, Tensor]:
        """The tensors of a result with return_states by name."""
        output, final, states = result
        of_steps = states if isinstance(states, tuple) else (states,)
        return self.case.outputs((output, final)) | dict(zip(("h", "c"), of_steps, strict=False))


def with_gradients(
    module: nn.Module, data: Data, states: tuple[Tensor, ...], outputs: dict[str, Tensor], **more: Tensor
) -> dict[str, Tensor]:
    """Outputs, and the gradient of every leaf, of reset_state and of every parameter; zeros where none arrives."""
    leaves = data.leaves | dict(zip(("reset_h", "reset_c"), states, strict=False)) | dict(module.named_parameters())
    incoming = incoming_gradients(list(outputs.values()), integers=data.case.integers)
    found = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), incoming, allow_unused=True, materialize_grads=True
    )
    return detached(outputs) | {f"grad({name})": gradient for name, gradient in zip(leaves, found, strict=True)}


def result_of(call: Call, module: nn.Module, data: Data, states: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return call.outputs(module(data.input, data.hx, **call.options(states), return_states=True))


def run_call(call: Call, module: nn.Module | None = None) -> dict[str, Tensor]:
    module = module or call.build()
    data, states = call.data()
    return with_gradients(module, data, states, result_of(call, module, data, states))


# ---- the definition ------------------------------------------------------------------------------------------------


def one_step(case: Case, params: dict[str, Tensor], x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A step of torch.nn's cell, or of a layer of one step where the cell would have a projection."""
    hx: Any = state if case.has_cell_state else state[0]
    if case.proj:
        layer = nn.LSTM(x.shape[1], case.hidden_size, bias=case.bias, proj_size=case.proj_size, dtype=F64)
        given = {f"{name}_l0": value for name, value in params.items()}
        states = tuple(s.unsqueeze(0) for s in hx)
        new = torch.func.functional_call(layer, given, (x.unsqueeze(0), states))[1]
        return tuple(s.squeeze(0) for s in new)
    cell_type, keywords = nn.LSTMCell, {}
    if not case.has_cell_state:
        name, _, nonlinearity = case.cell.partition("_")
        cell_type = getattr(nn, f"{name}Cell")
        keywords = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
    cell = cell_type(x.shape[1], case.hidden_size, bias=case.bias, dtype=F64, **keywords)
    new = torch.func.functional_call(cell, params, (x, hx))
    return tuple(new) if case.has_cell_state else (new,)


def by_hand(call: Call) -> dict[str, Tensor]:
    """A loop over steps of torch.nn's cells in float64, whose states are kept."""
    case = call.case
    twin = copy.deepcopy(call.build()).double()
    data, reset_states = call.data()
    data, reset_states = data.to(F64), tuple(state.detach().double().requires_grad_() for state in reset_states)
    shapes = case.replace(hx=True).state_shapes
    old = data.states or [torch.zeros(shape, dtype=F64) for shape in shapes]
    anew = reset_states or [torch.zeros(shape, dtype=F64) for shape in shapes]
    live, marks = call.live.unsqueeze(-1), call.marks.unsqueeze(-1)
    x, of_all, ends = data.sequence, [], []
    for layer in range(case.num_layers):
        of_directions = []
        for direction in range(2 if case.bidirectional else 1):
            index = len(ends)
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            params = {n.removesuffix(suffix): p for n, p in twin.named_parameters() if n.endswith(suffix)}
            state = tuple(s[index] for s in old)
            steps: list[Any] = [None] * case.steps
            for t in reversed(range(case.steps)) if direction else range(case.steps):
                mark = t + 1 if direction else t
                if mark < case.steps:
                    state = tuple(torch.where(marks[mark], n[index], s) for n, s in zip(anew, state, strict=True))
                new = one_step(case, params, x[t], state)
                state = tuple(torch.where(live[t], n, s) for n, s in zip(new, state, strict=True))
                steps[t] = state
            ends.append(state)
            of_all.append([torch.stack(of_steps) for of_steps in zip(*steps, strict=True)])
            of_directions.append(torch.where(live, of_all[-1][0], 0))
        x = torch.cat(of_directions, -1)
    final = [torch.stack(s) for s in zip(*ends, strict=True)]
    states = [torch.stack(s) for s in zip(*of_all, strict=True)]  # (L*D, T, B, .)
    if case.packing != "padded":
        packed: Any = data.input
        rows = range(case.batch) if packed.sorted_indices is None else packed.sorted_indices.tolist()
        place = [(t, b) for t, size in enumerate(packed.batch_sizes.tolist()) for b in list(rows)[:size]]
        t, b = torch.tensor(place).T
        x, states = x[t, b], [s[:, t, b] for s in states]
    elif case.batch_first:
        x, states = x.transpose(0, 1), [s.transpose(1, 2) for s in states]
    found = {"output": x} | dict(zip(("h_n", "c_n"), final, strict=False)) | dict(zip(("h", "c"), states, strict=False))
    return with_gradients(twin, data, reset_states, found)


FACTORS: dict[str, tuple[Any, ...]] = {
    "cell": CELLS,
    "hidden_size": (2, 7, 17, 33),
    "num_layers": (1, 2, 3),
    "bidirectional": (False, True),
    "bias": (True, False),
    "proj": (False, True),
    "batch_first": (False, True),
    "packing": ("padded", "sorted", "unsorted"),
    "batch": (1, 2, 5, 9),
    "steps": (1, 2, 6, 13),
    "hx": (False, True),
    "dtype": (torch.float32, F64, torch.bfloat16, torch.float16),
    "counts": ("all", "lengths", "mask"),
    "resets": (False, True),
    "has_state": (False, True),
    "recompute": (False, True),
}


def makes_sense(row: dict[str, Any]) -> bool:
    is_padded = row["packing"] == "padded"
    return (
        (row["cell"] == "LSTM" or not row["proj"])
        and (is_padded or (row["counts"] == "all" and not row["resets"]))
        and (row["resets"] or not row["has_state"])
    )


def designed(seed: int) -> list[Call]:
    calls = []
    for index, row in enumerate(pairwise(FACTORS, seed=seed, allowed=makes_sense)):
        of_call = {name: row.pop(name) for name in ("counts", "resets", "has_state", "recompute")}
        calls.append(Call(Case(**row), **of_call, seed=index))
    return calls


DESIGNED = [call for seed in range(3) for call in designed(seed)]
# One of each kind, for what needs no design.
SOME = [
    *(Call(Case(cell=cell, num_layers=2, bidirectional=True, hx=True)) for cell in CELLS),
    Call(Case(proj=True, num_layers=2, batch_first=True, hx=True), "mask", resets=True, has_state=True),
    Call(Case("GRU", bidirectional=True, hx=True), "lengths", resets=True),
    Call(Case(num_layers=2, bidirectional=True, batch=1, steps=12, hx=True), resets=True, has_state=True),
    Call(Case("GRU", num_layers=2, packing="unsorted", hx=True)),
    Call(Case(num_layers=3), recompute=True),
]


# ---- numbers -------------------------------------------------------------------------------------------------------


@functools.cache
def expected_of(index: int) -> dict[str, Tensor]:
    return by_hand(DESIGNED[index])


@pytest.mark.parametrize("index", range(len(DESIGNED)), ids=lambda index: str(DESIGNED[index]))
def test_numbers_and_gradients_of_a_loop_over_torch_nn_cells(index: int, backend: str) -> None:
    found = run_call(DESIGNED[index])
    assert {found[name].dtype for name in found} == {DESIGNED[index].case.dtype}
    assert_within(found, expected_of(index))


@pytest.mark.asan
@pytest.mark.kernels
@pytest.mark.parametrize("index", range(0, len(DESIGNED), 8), ids=lambda index: str(DESIGNED[index]))
def test_every_instruction_set_gives_them(index: int, isa: str) -> None:
    with fused_rnn.use_backend("fused"):
        assert_within(run_call(DESIGNED[index]), expected_of(index))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("call", [*SOME, *DESIGNED[::5]], ids=str)
def test_output_and_final_states_have_the_bits_of_a_call_without(call: Call, gradients: bool, backend: str) -> None:
    module, (data, states) = call.build(), call.data()
    with torch.set_grad_enabled(gradients):
        expected = call.case.outputs(module(data.input, data.hx, **call.options(states)))
        found = result_of(call, module, data, states)
    assert_same({name: found[name].detach() for name in expected}, detached(expected))
    assert [found[name].stride() for name in expected] == [tensor.stride() for tensor in expected.values()]
    off = module(data.input, data.hx, **call.options(states), return_states=False)
    assert len(off) == 2


@pytest.mark.parametrize("call", SOME, ids=str)
def test_inference_gives_the_bits_of_training(call: Call, backend: str) -> None:
    module, (data, states) = call.build(), call.data()
    expected = result_of(call, module, data, states)
    with torch.no_grad():
        found = result_of(call, module, data, states)
    assert not any(tensor.requires_grad for tensor in found.values())
    assert_within(found, {name: tensor.double() for name, tensor in detached(expected).items()})


@pytest.mark.parametrize("call", [call for call in SOME if call.case.packing == "padded"], ids=str)
def test_the_last_states_are_the_final_ones_and_the_output_is_the_top_layers(call: Call, backend: str) -> None:
    module, (data, states) = call.build(), call.data()
    found = detached(result_of(call, module, data, states))
    case, directions = call.case, 2 if call.case.bidirectional else 1
    for name in ("h", "c")[: 2 if case.has_cell_state else 1]:
        of_steps = found[name].transpose(1, 2) if case.batch_first else found[name]
        assert torch.equal(found[f"{name}_n"][::directions], of_steps[::directions, -1])
        if case.bidirectional:
            assert torch.equal(found[f"{name}_n"][1::2], of_steps[1::2, 0])
    top = torch.cat(list(found["h"][-directions:]), -1)
    assert torch.equal(found["output"], torch.where(call.as_argument(call.live).unsqueeze(-1), top, 0))


@pytest.mark.parametrize("cell", CELLS)
def test_unbatched(cell: str, backend: str) -> None:
    call = Call(Case(cell=cell, batch=1, num_layers=2, bidirectional=True, steps=9, hx=True), "mask", resets=True)
    module, data = call.build(), call.data()[0]
    live, marks = call.live.clone(), call.marks
    live[2::3] = False
    expected = detached(call.outputs(module(data.input, data.hx, mask=live, reset=marks, return_states=True)))
    hx: Any = tuple(s.squeeze(1) for s in data.states)
    given = {"mask": live.squeeze(1), "reset": marks.squeeze(1), "return_states": True}
    found = detached(call.outputs(module(data.sequence.squeeze(1), hx if len(hx) == 2 else hx[0], **given)))
    places = {"output": 1, "h_n": 1, "c_n": 1, "h": 2, "c": 2}
    assert_same(found, {name: tensor.squeeze(places[name]) for name, tensor in expected.items()})


def test_a_batch_of_no_rows(backend: str) -> None:
    layer = fused_rnn.LSTM(3, 4, num_layers=2, bidirectional=True)
    for given in ({}, {"mask": torch.zeros(5, 0, dtype=torch.bool)}):
        h, c = layer(torch.zeros(5, 0, 3), **given, return_states=True)[2]
        assert h.shape == c.shape == (4, 5, 0, 4)


@pytest.mark.parametrize("cell", CELLS)
def test_rows_without_a_step_that_counts_keep_their_initial_state(cell: str, backend: str) -> None:
    """Whatever that is: nothing is computed with it."""
    case = Case(cell=cell, num_layers=2, bidirectional=True, hx=True)
    module, data = case.build(fused_rnn), case.data()
    with torch.no_grad():
        for state in data.states:
            state[:, 2] = float("nan")
    mask = torch.ones(case.steps, case.batch, dtype=torch.bool)
    mask[:, 2] = False
    output, _, states = module(data.input, data.hx, mask=mask, return_states=True)
    of_steps = states if case.has_cell_state else (states,)
    assert output.isfinite().all() and not output[:, 2].count_nonzero()
    for state in of_steps:
        assert state[:, :, 2].isnan().all() and state[:, :, [0, 1, 3]].isfinite().all()
    for gradient in torch.autograd.grad(sum(s.sum() for s in of_steps), [data.sequence, *module.parameters()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
def test_a_mask_of_nothing(cell: str, backend: str) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=True, hx=True)
    module, data = case.build(fused_rnn), case.data()
    mask = torch.zeros(case.steps, case.batch, dtype=torch.bool)
    states = module(data.input, data.hx, mask=mask, return_states=True)[2]
    of_steps = states if case.has_cell_state else (states,)
    for state, initial in zip(of_steps, data.states, strict=True):
        assert torch.equal(state, initial.unsqueeze(1).expand_as(state))
    gradients = torch.autograd.grad(sum(s.sum() for s in of_steps), data.states)
    for gradient in gradients:
        assert torch.equal(gradient, torch.full_like(gradient, case.steps))


def test_states_are_no_view_of_the_output(backend: str) -> None:
    """A program may change its output in place, without gradients."""
    layer, x = fused_rnn.LSTM(3, 4, num_layers=2), torch.randn(5, 2, 3)
    with torch.no_grad():
        output, _, (h, _) = layer(x, return_states=True)
        before = h.clone()
        output.zero_()
    assert torch.equal(h, before)


@pytest.mark.kernels
def test_states_that_were_changed_before_backward_are_refused() -> None:
    """They are what the kernels have kept for it."""
    layer, x = fused_rnn.LSTM(3, 4), torch.randn(5, 2, 3)
    for index in range(2):
        output, _, states = layer(x, return_states=True)
        states[index].mul_(2)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*change a copy"):
            output.sum().backward()


# ---- the use cases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_a_later_call_from_a_stored_state_goes_on_as_the_whole(cell: str, backend: str) -> None:
    """Burn-in: a window of a stored sequence, from the state that its first step began with."""
    case = Case(cell=cell, num_layers=2, steps=9, dtype=F64)
    module, data = case.build(fused_rnn), case.data()
    output, _, states = module(data.input, return_states=True)
    of_steps = states if case.has_cell_state else (states,)
    for k in range(1, 9):
        stored = tuple(s[:, k - 1].detach() for s in of_steps)
        window, _, later = module(data.input[k:], stored if case.has_cell_state else stored[0], return_states=True)
        torch.testing.assert_close(window, output[k:])
        for part, whole in zip(later if case.has_cell_state else (later,), of_steps, strict=True):
            torch.testing.assert_close(part, whole[:, k:])


@pytest.mark.parametrize("cell", CELLS)
def test_a_loss_of_one_state_alone(cell: str, backend: str) -> None:
    """Of c of a lower layer at one step: nothing comes from above it, or from later steps."""
    case = Case(cell=cell, num_layers=2, hx=True, dtype=F64)
    module, data = case.build(fused_rnn), case.data()
    states = module(data.input, data.hx, return_states=True)[2]
    last = states[-1] if case.has_cell_state else states
    leaves = [data.sequence, *module.parameters()]
    found = torch.autograd.grad(last[0, 2].sum(), leaves, allow_unused=True, materialize_grads=True)
    short = module(data.input[:3], data.hx)[1]
    expected = torch.autograd.grad(
        (short[-1] if case.has_cell_state else short)[0].sum(), leaves, allow_unused=True, materialize_grads=True
    )
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right)
    assert found[0][3:].count_nonzero() == 0 and found[0][:3].count_nonzero() > 0


# ---- options of the layer ------------------------------------------------------------------------------------------

WITHIN: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"peephole": True, "coupled_gates": True, "cell_clip": 0.5}),
    ("LSTM", {"zoneout": 0.2, "zoneout_cell": 0.1, "recurrent_dropout": 0.3, "proj_size": 3}),
    ("LSTM", {"recurrent_bias": False, "recurrent_grad_clip": 0.1, "activation": "softsign"}),
    ("LSTM", {"num_heads": 3, "dropout": 0.4, "weight_dropout": 0.2, "input_dropout": 0.3}),
    ("LSTM", {"zoneout_cell": 0.3, "recompute": True, "dropout": 0.4}),
    ("LSTM", {"proj_size": 2, "recurrent_grad_clip": 0.2}),
    ("GRU", {"zoneout": 0.2, "recurrent_dropout": 0.3, "recurrent_grad_clip": 0.1}),
    ("GRU", {"reset_after": False, "activation": "softsign", "recurrent_activation": "hard_sigmoid"}),
    ("GRU", {"num_heads": 2, "dropout": 0.4, "weight_dropout": 0.2, "recompute": True}),
    ("RNN", {"zoneout": 0.2, "recurrent_dropout": 0.3, "recurrent_bias": False, "dropout": 0.2}),
    ("RNN", {"nonlinearity": "softsign", "recurrent_grad_clip": 0.1}),
    ("LSTM", {"layer_norm": True, "recurrent_grad_clip": 0.1, "zoneout": 0.2}),
    ("GRU", {"layer_norm": True, "num_heads": 2}),
]


def made_within(name: str, options: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(0)
    return getattr(fused_rnn, name)(3, 6, num_layers=2, dtype=F64, **options, **more)


def tensors_of(result: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


@pytest.mark.parametrize("steps", ["all", "mask", "reset"])
@pytest.mark.parametrize(("name", "options"), WITHIN, ids=str)
def test_kernels_and_formulas_agree_with_every_option(name: str, options: Any, steps: str) -> None:
    """With what is drawn at random, the same by its seed: states and all gradients."""
    if not fused_rnn.backend.ops:
        pytest.skip("the fused backend is not in use")
    layer = made_within(name, options, bidirectional=True)
    if "layer_norm" in options:  # sums that hardly differ from one another are divided by next to nothing
        with torch.no_grad():
            for parameter_name, parameter in layer.named_parameters():
                if "weight_ih" in parameter_name or "weight_hh" in parameter_name:
                    parameter.mul_(4)
    x = torch.randn(8, 5, 3, dtype=F64, requires_grad=True)
    chosen = torch.rand(8, 5) < 0.6
    given = {"all": {}, "mask": {"mask": chosen}, "reset": {"reset": ~chosen, "mask": chosen.roll(1, 0)}}[steps]
    found = []
    for backend in ("auto", "reference"):
        with fused_rnn.use_backend(backend):
            torch.manual_seed(3)
            outputs = tensors_of(layer(x, **given, return_states=True))
            torch.manual_seed(3)
            without = tensors_of(layer(x, **given))
        for ours, plain in zip(outputs, without, strict=False):
            assert torch.equal(ours, plain)
        gradients = torch.autograd.grad(outputs, [x, *layer.parameters()], incoming_gradients(outputs))
        found.append({str(i): t.detach() for i, t in enumerate((*outputs, *gradients))})
    assert_close_to_twin(*found)


@pytest.mark.parametrize(("name", "options"), WITHIN, ids=str)
def test_each_state_is_what_a_call_up_to_that_step_ends_in(name: str, options: Any, backend: str) -> None:
    """In eval mode, where nothing is drawn."""
    if backend == "fused" and ("reset_after" in options or (name == "RNN" and "zoneout" in options)):
        pytest.skip("has no kernel, or none with gradients in eval mode")
    layer = made_within(name, options).eval()
    x = torch.randn(6, 4, 3, dtype=F64, requires_grad=True)
    states = layer(x, return_states=True)[2]
    of_steps = states if name == "LSTM" else (states,)
    weights = incoming_gradients(of_steps)
    total: Any = 0
    for t in range(6):
        final = layer(x[: t + 1])[1]
        for whole, end, weight in zip(of_steps, final if name == "LSTM" else (final,), weights, strict=True):
            torch.testing.assert_close(whole[:, t], end)
            total = total + (end * weight[:, t]).sum()
    if layer.recurrent_grad_clip is not None:
        return  # clips a sum: not the sum of what is clipped
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(of_steps, leaves, weights, allow_unused=True, materialize_grads=True)
    for gradient, right in zip(
        found, torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(gradient, right)


@pytest.mark.parametrize("lengths", [None, [8, 5, 3, 0, 7]])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_bptt_steps_are_slices_by_hand(name: str, lengths: list[int] | None, backend: str) -> None:
    layer = made_within(name, {"bptt_steps": 3, "batch_first": True})
    plain = made_within(name, {"batch_first": True})
    x = torch.randn(5, 8, 3, dtype=F64, requires_grad=True)
    given = torch.tensor([8] * 5 if lengths is None else lengths)
    hx, of_slices = None, []
    for k in (0, 3, 6):
        count = min(3, 8 - k)
        output, hx, states = plain(x[:, k : k + count], hx, lengths=(given - k).clamp(0, count), return_states=True)
        of_slices.append(tensors_of((output, states)))
        hx = tuple(s.detach() for s in hx) if name == "LSTM" else hx.detach()
    expected = [torch.cat(parts, parts[0].dim() - 2) for parts in zip(*of_slices, strict=True)]
    output, _, states = layer(x, **({} if lengths is None else {"lengths": given}), return_states=True)
    found = tensors_of((output, states))
    gradients = [
        torch.autograd.grad(outputs, [x, *module.parameters()], incoming_gradients(outputs))
        for outputs, module in ((found, layer), (expected, plain))
    ]
    for ours, right in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(ours, right)
    with torch.no_grad():
        torch.testing.assert_close(tensors_of(layer(x, return_states=True)), tensors_of(plain(x, return_states=True)))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_stateful_layer(name: str, backend: str) -> None:
    layer, plain = made_within(name, {"stateful": True}), made_within(name, {})
    x = torch.randn(12, 5, 3, dtype=F64)
    expected = tensors_of(plain(x, return_states=True)[2])
    found = [tensors_of(layer(x[k : k + 4], return_states=True)[2]) for k in (0, 4, 8)]
    for parts, whole in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("packing", ["padded", "unsorted"])
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_gives_states_of_the_outputs_dtype(cell: str, packing: str, backend: str) -> None:
    call = Call(Case(cell=cell, num_layers=2, hx=True, packing=packing))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_call(call)
    assert {found[name].dtype for name in ("h", "c") if name in found} == {found["output"].dtype}
    for name, expected in run_call(call).items():
        torch.testing.assert_close(found[name].float(), expected, rtol=0.1, atol=0.1)


def test_converted_and_patched_layers_have_it(backend: str) -> None:
    x = torch.randn(5, 2, 3)
    converted = fused_rnn.convert(nn.LSTM(3, 4))
    with fused_rnn.patch():
        patched = nn.LSTM(3, 4)
    patched.load_state_dict(converted.state_dict())
    for layer in (converted, patched):
        output, (h_n, c_n), (h, c) = layer(x, return_states=True)
        assert torch.equal(h[0], output) and torch.equal(c[:, -1], c_n) and torch.equal(h[:, -1], h_n)
    assert type(fused_rnn.revert(converted)) is nn.LSTM


@pytest.mark.parametrize("cell", CELLS)
def test_functions_have_it(cell: str, backend: str) -> None:
    call = Call(Case(cell=cell, num_layers=2, hx=True), "mask")
    module, (data, states) = call.build(), call.data()
    name, _, nonlinearity = cell.lower().partition("_")
    options = call.options(states) | {"num_layers": 2} | ({"nonlinearity": nonlinearity} if nonlinearity else {})
    expected = detached(result_of(call, module, data, states))
    for namespace in (fused_rnn.functional, fused_rnn.reference):
        function = getattr(namespace, name)
        result = function(data.input, data.hx, list(module.parameters()), **options, return_states=True)
        assert_within(detached(call.outputs(result)), {name: tensor.double() for name, tensor in expected.items()})


def test_complex_numbers_run_by_the_formulas() -> None:
    layer = fused_rnn.LSTM(3, 4, dtype=torch.complex64)
    output, (h_n, c_n), (h, c) = layer(torch.randn(6, 2, 3, dtype=torch.complex64), return_states=True)
    assert torch.equal(h[0], output) and torch.equal(h[:, -1], h_n) and torch.equal(c[:, -1], c_n)


@pytest.mark.parametrize("call", SOME, ids=str)
def test_diagnostics_of_a_model_that_asks_for_states(call: Call) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = call.build()
            self.found: Any = None

        def forward(self, data: Data, states: tuple[Tensor, ...]) -> Tensor:
            self.found = result_of(call, self.layer, data, states)
            return sum(t.square().sum() for t in self.found.values())  # type: ignore[return-value]

    model, (data, states) = Model(), call.data()
    expected = detached(result_of(call, model.layer, data, states))
    (flow,) = gradient_flow(model, lambda: model(data, states))
    assert flow.h.isfinite().all()
    assert_close_to_twin(detached(model.found), expected)


@pytest.mark.kernels
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("counts", ["all", "mask"])
@pytest.mark.parametrize("proj", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_more_threads(cell: str, proj: bool, counts: str, count: int, threads: None) -> None:
    from fused_rnn import _C

    if proj and cell != "LSTM":
        pytest.skip("only an LSTM has a projection")
    expected, found = [], []
    for batch, bidirectional in ((40, True), (1, False), (3, False)):  # rows, units and directions are divided
        case = Case(cell, 70, 65, 2, bidirectional, proj=proj, hx=True, batch=batch, steps=30)
        call = Call(case, counts)
        with fused_rnn.use_backend("fused"):
            expected.append(run_call(call))
            previous = _C.set_processors(8)
            try:
                torch.set_num_threads(count)
                found.append(run_call(call))
            finally:
                _C.set_processors(previous)
                torch.set_num_threads(1)
    for ours, right in zip(found, expected, strict=True):
        assert_within(ours, {name: tensor.double() for name, tensor in right.items()})


# ---- derivatives and transforms ------------------------------------------------------------------------------------

DERIVATIVE_CALLS = [
    dataclasses.replace(
        call, case=call.case.replace(input_size=3, hidden_size=4, batch=min(3, call.case.batch), steps=4, dtype=F64)
    )
    for call in SOME
]


def as_function(call: Call) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The call as a function of its leaves, reset_state and parameters, and their values."""
    module, (data, states) = call.build(), call.data()
    names = [name for name, _ in module.named_parameters()]
    count = len(data.leaves)
    end = count + len(states)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        hx = Data(call.case, values[0], values[1:count]).hx
        parameters = dict(zip(names, values[end:], strict=True))
        options = call.options(values[count:end]) | {"return_states": True}
        result = torch.func.functional_call(module, parameters, (call.case.argument(values[0]), hx), options)
        return tuple(call.outputs(result).values())

    parameters = (p.detach().clone().requires_grad_() for p in module.parameters())
    return function, (*data.leaves.values(), *states, *parameters)


@pytest.mark.parametrize("call", DERIVATIVE_CALLS, ids=str)
def test_gradient_equals_finite_differences(call: Call, backend: str) -> None:
    function, values = as_function(call)
    assert torch.autograd.gradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("call", DERIVATIVE_CALLS, ids=str)
def test_second_derivative_equals_finite_differences(call: Call, backend: str) -> None:
    function, values = as_function(call)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


# pack_padded_sequence has no forward mode
@pytest.mark.parametrize("call", [call for call in DERIVATIVE_CALLS if call.case.packing == "padded"], ids=str)
def test_forward_mode_equals_finite_differences(call: Call, backend: str) -> None:
    function, values = as_function(call)
    assert torch.autograd.gradcheck(function, values, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


@pytest.mark.parametrize("call", DERIVATIVE_CALLS[:6], ids=str)
def test_torch_func_nests_as_autograd_does(call: Call, backend: str) -> None:
    """jvp of a vjp, and a third derivative, of the sum of all states."""
    function, values = as_function(call)
    x, others = values[0].detach(), [v.detach() for v in values[1:]]

    def loss(x: Tensor) -> Tensor:
        return sum(t.square().sum() for t in function(x, *others)[1:])  # type: ignore[return-value]

    tangent = torch.randn_like(x)
    found = torch.func.jvp(torch.func.grad(loss), (x,), (tangent,))[1]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad((gradient * tangent).sum(), leaf, create_graph=True)
    torch.testing.assert_close(found, expected.detach())
    (third,) = torch.autograd.grad((expected * tangent).sum(), leaf)
    again = torch.func.grad(lambda x: (torch.func.jvp(torch.func.grad(loss), (x,), (tangent,))[1] * tangent).sum())(x)
    torch.testing.assert_close(again, third)


@pytest.mark.parametrize("call", [*DERIVATIVE_CALLS[:5], DERIVATIVE_CALLS[5]], ids=str)
def test_vmap_equals_a_loop(call: Call, backend: str) -> None:
    """Over inputs, and over masks where there are some."""
    module = call.build()
    inputs = torch.stack([call.case.data(seed=seed).sequence.detach() for seed in range(3)])
    masks = torch.stack([dataclasses.replace(call, counts="mask", seed=seed).live for seed in range(3)])

    def run(x: Tensor, mask: Tensor) -> Any:
        def loss(x: Tensor) -> Any:
            given = {} if call.counts == "all" else {"mask": call.as_argument(mask)}
            states = module(call.case.argument(x), **given, return_states=True)[2]
            return sum(s.square().sum() for s in tensors_of(states)), states

        return torch.func.grad(loss, has_aux=True)(x)

    found = tensors_of(torch.func.vmap(run)(inputs, masks))
    rows = [tensors_of(run(inputs[i], masks[i])) for i in range(3)]
    for index, tensor in enumerate(found):
        torch.testing.assert_close(tensor, torch.stack([row[index] for row in rows]))


@pytest.mark.parametrize("call", DERIVATIVE_CALLS[:5], ids=str)
def test_several_gradients_at_once(call: Call, backend: str) -> None:
    function, values = as_function(call)
    outputs = function(*values)
    grads = [torch.randn(3, *t.shape, dtype=t.dtype) for t in outputs]
    found = torch.autograd.grad(outputs, values, grads, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(outputs, values, [g[i] for g in grads], retain_graph=True)
        for gradient, right in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient[i], right)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "backend"),
    [(SOME[0], "reference"), (SOME[4], "reference"), *((call, "fused") for call in SOME)],
    ids=str,
    indirect=["backend"],
)
def test_compiled_without_a_graph_break_gives_the_same(call: Call, backend: str) -> None:
    if call.case.packing != "padded":
        pytest.skip("a packed batch has no sizes that may change")
    module, (data, states) = call.build(), call.data()
    mask = call.live if call.counts != "all" else None

    def loss(sequence: Tensor, mask: Tensor | None, reset: Tensor, *states: Tensor) -> Tensor:
        given: dict[str, Any] = {} if mask is None else {"mask": call.as_argument(mask)}
        if call.resets:
            given["reset"] = call.as_argument(reset)
        if states:
            given["reset_state"] = states if call.case.has_cell_state else states[0]
        result = module(call.case.argument(sequence), **given, return_states=True)
        return sum(t.square().sum() for t in call.outputs(result).values())  # type: ignore[return-value]

    leaves = [data.sequence, *states, *module.parameters()]
    torch._dynamo.reset()  # it counts the compilations of one function over all calls
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for steps in (call.case.steps, call.case.steps - 1):  # the second with sizes that the compiler takes as unknown
        given = (data.sequence[:steps], None if mask is None else mask[:steps], call.marks[:steps], *states)
        expected = torch.autograd.grad(loss(*given), leaves)
        found = torch.autograd.grad(compiled(*given), leaves)
        for gradient, right in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, right)


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize("call", SOME[:2], ids=str)
def test_compiled_autograd_traces_the_backward_pass(call: Call) -> None:
    from torch._dynamo import compiled_autograd

    module, (data, states) = call.build(), call.data()
    parameters = dict(module.named_parameters())

    def loss() -> Tensor:
        return sum(t.square().sum() for t in result_of(call, module, data, states).values())  # type: ignore[return-value]

    expected = torch.autograd.grad(loss(), list(parameters.values()))
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss().backward()
    found = {name: parameter.grad for name, parameter in parameters.items()}
    assert_close_to_twin(found, dict(zip(parameters, expected, strict=True)))  # type: ignore[arg-type]


class _Asks(nn.Module):
    """A layer's states as a function of its input alone, which is all that tracers record."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        _, _, states = self.layer(x, return_states=True)
        return states


def test_tracers_record_it(backend: str) -> None:
    model, x = _Asks(fused_rnn.LSTM(3, 4, num_layers=2)), torch.randn(5, 2, 3)
    expected = model(x)
    graph = fx.symbolic_trace(model)
    assert "return_states = True" in graph.code
    for traced in (graph, torch.jit.trace(model, x), torch.export.export(model, (x,)).module()):
        for ours, right in zip(traced(x), expected, strict=True):
            torch.testing.assert_close(ours, right)


def test_a_mode_sees_the_keyword(backend: str) -> None:
    class Watch(TorchFunctionMode):
        seen: list[Any] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__module__", "").startswith("fused_rnn"):
                self.seen.append(kwargs)
            return func(*args, **(kwargs or {}))

    layer, x = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    with Watch() as watch:
        h = layer(x, return_states=True)[2]
        layer(x)
    assert [kwargs.get("return_states", False) for kwargs in watch.seen] == [True, False]
    assert torch.equal(h[0], layer(x)[0])


@pytest.mark.kernels
@pytest.mark.parametrize("call", SOME, ids=str)
def test_operators_pass_opcheck(call: Call) -> None:
    from test_operators import _Recorder

    with fused_rnn.use_backend("fused"), _Recorder() as recorder:
        run_call(call)
        with torch.no_grad():
            module, (data, states) = call.build(), call.data()
            result_of(call, module, data, states)
    names = [op[0].overloadpacket.__name__ for op in recorder.calls]
    assert names == ["rnn_forward", "rnn_backward", "rnn_forward"]
    for operator, args, kwargs in recorder.calls:
        torch.library.opcheck(operator, args, kwargs)


@pytest.mark.kernels
def test_a_call_without_it_keeps_no_states() -> None:
    from test_operators import _Recorder

    layer, x = fused_rnn.LSTM(3, 4, num_layers=2), torch.randn(5, 2, 3)
    with fused_rnn.use_backend("fused"), torch.no_grad(), _Recorder() as recorder:
        layer(x)
        layer(x, return_states=True)
    kept = [[t.numel() for t in result[3:]] for result in recorder.results]
    assert kept == [[0, 0, 0], [0, 80, 80]]


# ---- errors, and what runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, None, "yes", torch.tensor(True)], ids=repr)
def test_what_is_no_bool_is_refused_by_name(value: Any, backend: str) -> None:
    layer, x = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    with pytest.raises(TypeError, match="^return_states: expected a bool, got "):
        layer(x, return_states=value)
    with pytest.raises(TypeError, match="^return_states: expected a bool, got "):
        fused_rnn.functional.gru(x, None, list(layer.parameters()), return_states=value)
    with pytest.raises(TypeError, match="^return_states: expected a bool, got "):
        fused_rnn.explain(layer, x, return_states=value)


def test_cells_do_not_have_it() -> None:
    cell, x = fused_rnn.GRUCell(3, 4), torch.randn(2, 3)
    with pytest.raises(TypeError, match="return_states"):
        cell(x, return_states=True)
    with pytest.raises(TypeError, match="return_states"):
        fused_rnn.functional.gru_cell(x, None, *cell.parameters(), return_states=True)
    with pytest.raises(TypeError, match="^return_states: expected False for a cell"):
        fused_rnn.explain(cell, x, return_states=True)


def test_explain_says_where_the_states_are_kept(backend: str) -> None:
    where = "the kernels" if backend == "fused" else "the formulas"
    for layer, states in ((fused_rnn.LSTM(3, 4), "h and c"), (fused_rnn.GRU(3, 4), "h")):
        with torch.no_grad():
            text = str(fused_rnn.explain(layer, torch.randn(5, 2, 3), return_states=True))
        assert f"return_states: {where} keep {states} of every layer at every step" in text
        assert "return_states" not in str(fused_rnn.explain(layer, torch.randn(5, 2, 3)))


def test_packed_input_gives_packed_output_beside_the_states(backend: str) -> None:
    call = Call(Case(num_layers=2, bidirectional=True, packing="unsorted"))
    data = call.data()[0]
    packed: Any = data.input
    output, (h_n, _), (h, c) = call.build()(packed, return_states=True)
    assert isinstance(output, PackedSequence) and h.shape == c.shape == (4, len(packed.data), 7)
    assert torch.equal(torch.cat([h[2], h[3]], -1), output.data)
    assert h_n.shape == (4, 4, 7)


def test_drawn_calls(backend: str) -> None:
    """Sizes beyond those of the design, without a loop by hand: kernels and formulas in float64."""
    for seed in range(12):
        generator = random.Random(seed)
        case = Case(
            generator.choice(CELLS),
            generator.randint(1, 40),
            generator.randint(1, 40),
            generator.randint(1, 4),
            generator.choice((False, True)),
            batch=generator.randint(1, 20),
            steps=generator.randint(1, 30),
            batch_first=generator.choice((False, True)),
            hx=True,
            dtype=F64,
        )
        call = Call(case, generator.choice(("all", "lengths", "mask")), generator.choice((False, True)), seed=seed)
        assert_within(run_call(call), by_hand(call))
