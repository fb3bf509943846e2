"""`lengths=` and `mask=`: a step that does not count carries the state on, and nothing that stands there leaks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, Data, detached, run, with_gradients
from support.compare import assert_close_to_twin, assert_same, assert_within
from support.pairwise import Row, pairwise
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn.settings import Controls

F64 = torch.float64
DTYPES = (torch.float32, F64, torch.bfloat16, torch.float16)
FACTORS = {
    "cell": CELLS,
    "input_size": (1, 5, 33),
    "hidden_size": (1, 7, 17, 65),
    "num_layers": (1, 2, 3),
    "bidirectional": (False, True),
    "bias": (True, False),
    "proj": (False, True),
    "batch_first": (False, True),
    "batch": (1, 2, 5, 33),
    "steps": (1, 2, 5, 16),
    "hx": (False, True),
    "dtype": DTYPES,
}


def _has_projection(row: Row) -> bool:
    return not row["proj"] or (row["cell"] == "LSTM" and row["hidden_size"] > 1)


CASES = [Case(**row) for row in pairwise(FACTORS, allowed=_has_projection)]
# One of each kind, for what needs no design.
SOME = [
    *(Case(cell=cell, num_layers=2, bidirectional=True, hx=True) for cell in CELLS),
    Case(proj=True, num_layers=2, batch_first=True),
    Case(cell="GRU", batch=70, steps=20, dtype=torch.bfloat16, batch_first=True),
]


def random_mask(case: Case, *, seed: int = 5) -> Tensor:
    """(T, B): about half of the steps count; all of the last row, and of more than two rows none of the first."""
    mask = torch.rand(case.steps, case.batch, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[:, -1] = True
    if case.batch > 2:
        mask[:, 0] = False
    return mask


def random_lengths(case: Case, *, least: int = 0) -> Tensor:
    lengths = torch.randint(least, case.steps + 1, (case.batch,), generator=torch.Generator().manual_seed(5))
    lengths[-1] = case.steps
    return lengths


def as_argument(case: Case, mask: Tensor) -> Tensor:
    return mask.T if case.batch_first else mask


def prefixes(case: Case, lengths: Tensor) -> Tensor:
    """The mask (T, B) of `lengths`."""
    return torch.arange(case.steps).unsqueeze(1) < lengths


# ---- numbers ------------------------------------------------------------------------------------------------------


def step_by_step(twin: nn.Module, data: Data, mask: Tensor) -> dict[str, Tensor]:
    """The definition: torch.nn's layers one step at a time, and the old state wherever the mask (T, B) says so."""
    case = data.case
    operator = getattr(torch, case.cell.lower())
    inputs = list(torch.where(mask.unsqueeze(2), data.sequence, 0))
    directions = 2 if case.bidirectional else 1
    sizes = [case.proj_size or case.hidden_size, case.hidden_size][: 2 if case.has_cell_state else 1]
    final: list[list[Tensor]] = []
    for layer in range(case.num_layers):
        sides = []
        for direction in range(directions):
            suffix = f"_l{layer}" + "_reverse" * direction
            params = [parameter for name, parameter in twin.named_parameters() if name.endswith(suffix)]
            index = layer * directions + direction
            states = [state[index] for state in data.states] or [inputs[0].new_zeros(case.batch, n) for n in sizes]
            outputs: dict[int, Tensor] = {}
            for t in reversed(range(case.steps)) if direction else range(case.steps):
                hx = tuple(state.unsqueeze(0) for state in states)
                _, *new = operator(
                    inputs[t].unsqueeze(0),
                    hx if case.has_cell_state else hx[0],
                    params,
                    case.bias,
                    1,
                    0.0,
                    False,
                    False,
                    False,
                )
                counts = mask[t].unsqueeze(1)
                outputs[t] = torch.where(counts, new[0][0], 0)
                states = [torch.where(counts, after[0], before) for after, before in zip(new, states, strict=True)]
            sides.append([outputs[t] for t in range(case.steps)])
            final.append(states)
        inputs = [torch.cat(both, dim=-1) for both in zip(*sides, strict=True)]
    output = torch.stack(inputs)
    results = [torch.stack(states) for states in zip(*final, strict=True)]
    return {"output": output.transpose(0, 1) if case.batch_first else output} | dict(
        zip(("h_n", "c_n"), results, strict=False)
    )


@functools.cache
def float64_reference(case: Case) -> dict[str, Tensor]:
    twin, data = copy.deepcopy(case.build(nn)).double(), case.data().to(F64)
    return with_gradients(twin, data, step_by_step(twin, data, random_mask(case)))


def assert_masked_steps_are_empty(found: dict[str, Tensor], case: Case, mask: Tensor) -> None:
    """Zero output and zero gradient of the input in masked steps, and nothing infinite or NaN anywhere."""
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert found["grad(input)"][~mask].count_nonzero() == 0
    output = found["output"].transpose(0, 1) if case.batch_first else found["output"]
    assert output[~mask].count_nonzero() == 0


@pytest.mark.asan
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_matches_the_float64_definition(case: Case, isa: str) -> None:
    found = run(case.build(fused_rnn), case.data(), mask=as_argument(case, random_mask(case)))
    assert_within(found, float64_reference(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_matches_the_float64_definition(case: Case) -> None:
    with fused_rnn.use_backend("reference"):
        found = run(case.build(fused_rnn), case.data(), mask=as_argument(case, random_mask(case)))
    assert_within(found, float64_reference(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lengths_give_the_numbers_of_torch_nn_on_a_packed_sequence(case: Case) -> None:
    lengths = random_lengths(case, least=1)
    twin, data = copy.deepcopy(case.build(nn)).double(), case.data().to(F64)
    packed = pack_padded_sequence(data.input, lengths, batch_first=case.batch_first, enforce_sorted=False)
    output, states = twin(packed, data.hx)
    padded = pad_packed_sequence(output, batch_first=case.batch_first, total_length=case.steps)[0]
    expected = with_gradients(twin, data, case.outputs((padded, states)))
    assert_within(run(case.build(fused_rnn), case.data(), lengths=lengths), expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == F64], ids=str)
def test_inference_gives_the_numbers_of_training(case: Case) -> None:
    module, data, mask = case.build(fused_rnn), case.data(), as_argument(case, random_mask(case))
    expected = run(module, data, mask=mask, gradients=False)
    with torch.no_grad():
        found = run(module, data, mask=mask, gradients=False)
    assert_within(found, expected)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_lengths_are_the_mask_of_the_first_steps_in_any_integer_dtype(case: Case) -> None:
    module, data, lengths = case.build(fused_rnn), case.data(), random_lengths(case)
    expected = run(module, data, mask=as_argument(case, prefixes(case, lengths)))
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        assert_same(run(module, data, lengths=lengths.to(dtype)), expected)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_with_both_a_step_counts_where_both_say_so(case: Case) -> None:
    module, data, lengths, mask = case.build(fused_rnn), case.data(), random_lengths(case), random_mask(case)
    found = run(module, data, lengths=lengths, mask=as_argument(case, mask))
    assert_same(found, run(module, data, mask=as_argument(case, mask & prefixes(case, lengths))))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_mask_of_true_changes_no_bit(case: Case) -> None:
    module, data = case.build(fused_rnn), case.data()
    mask = torch.ones(case.steps, case.batch, dtype=torch.bool)
    assert_same(run(module, data, mask=as_argument(case, mask)), run(module, data))
    assert_same(run(module, data, lengths=torch.full((case.batch,), case.steps)), run(module, data))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_rows_without_a_step_end_in_their_initial_state(case: Case, backend: str, recompute: bool) -> None:
    case = case.replace(hx=True)
    module, data = case.build(fused_rnn), case.data()
    module.recompute = recompute
    with fused_rnn.use_backend(backend):
        found = run(module, data, lengths=torch.zeros(case.batch, dtype=torch.int64))
        without = run(module, case.replace(hx=False).data(), lengths=torch.zeros(case.batch, dtype=torch.int64))
    for name, state, initial in zip(("h_n", "c_n"), ("h_0", "c_0"), data.states, strict=False):
        assert torch.equal(found[name], initial)
        assert found[f"grad({state})"].count_nonzero() > 0
        assert without[name].count_nonzero() == 0
    for name in ("output", "grad(input)", "grad(weight_ih_l0)", "grad(weight_hh_l0)"):
        assert found[name].count_nonzero() == 0


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_step_that_does_not_count_might_as_well_not_be_there(case: Case) -> None:
    """To the bit, and in both directions: masked steps put between those that count change nothing."""
    module, data = case.build(fused_rnn).requires_grad_(False), case.data()
    counts = torch.arange(3 * case.steps) % 3 == 1
    stretched = data.sequence.detach().repeat_interleave(3, 0)
    mask = counts.unsqueeze(1).expand(-1, case.batch) & torch.ones(case.batch, dtype=torch.bool)
    found = case.outputs(module(case.argument(stretched), data.hx, mask=as_argument(case, mask)))
    expected = case.outputs(module(data.input, data.hx))
    output = found["output"].transpose(0, 1) if case.batch_first else found["output"]
    assert output[~counts].count_nonzero() == 0
    found["output"] = output[counts].transpose(0, 1) if case.batch_first else output[counts]
    # a packed batch may be divided over threads in another way: sums may be taken in another order
    assert_within(found, {name: tensor.double() for name, tensor in expected.items()})


@pytest.mark.parametrize("cell", CELLS)
def test_unbatched(cell: str) -> None:
    case = Case(cell=cell, batch=1, num_layers=2, bidirectional=True, steps=9)
    module, sequence, mask = case.build(fused_rnn), case.data().sequence.detach(), random_mask(case)
    mask[2:5] = False
    expected = case.outputs(module(sequence, mask=mask))
    found = case.outputs(module(sequence[:, 0], mask=mask[:, 0]))
    assert_same(detached(found), {name: tensor.squeeze(1) for name, tensor in detached(expected).items()})
    expected = case.outputs(module(sequence, lengths=torch.tensor([4])))
    found = case.outputs(module(sequence[:, 0], lengths=torch.tensor(4)))
    assert_same(detached(found), {name: tensor.squeeze(1) for name, tensor in detached(expected).items()})


def test_a_batch_of_no_rows() -> None:
    layer = fused_rnn.LSTM(3, 4)
    output, (h_n, c_n) = layer(torch.zeros(5, 0, 3), lengths=torch.zeros(0, dtype=torch.int64))
    assert output.shape == (5, 0, 4) and h_n.shape == c_n.shape == (1, 0, 4)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_output_has_the_strides_of_a_call_without_a_mask(case: Case) -> None:
    module, data = case.build(fused_rnn), case.data()
    for tensors in zip(module(data.input, mask=as_argument(case, random_mask(case)))[:1], module(data.input)[:1]):
        assert len({tensor.stride() for tensor in tensors}) == 1


def test_a_mask_of_other_bytes_than_0_and_1() -> None:
    case = Case()
    module, data, mask = case.build(fused_rnn), case.data(), random_mask(case)
    bytes_of_true = (mask.to(torch.uint8) * 255).view(torch.bool)
    assert_same(run(module, data, mask=bytes_of_true), run(module, data, mask=mask))


# ---- what stands in masked steps ----------------------------------------------------------------------------------


@pytest.mark.asan
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_what_stands_in_masked_steps_leaks_nowhere(case: Case, recompute: bool, value: float) -> None:
    module, data, mask = case.build(fused_rnn), case.data(), random_mask(case)
    module.recompute = recompute
    spoilt = copy.deepcopy(data)
    with torch.no_grad():
        spoilt.sequence[~mask] = value
    for backend in ("auto", "reference"):
        with fused_rnn.use_backend(backend):
            expected = run(module, data, mask=as_argument(case, mask))
            found = run(module, spoilt, mask=as_argument(case, mask))
        assert_same(found, expected)
        assert_masked_steps_are_empty(found, case, mask)


def assert_idle_state_stays(
    case: Case, run_layer: Callable[[Data], dict[str, Tensor]], data: Data, mask: Tensor, value: float
) -> None:
    """An initial state ``value`` of the row without a step is its final one, and changes nothing else to the bit."""
    assert not mask[:, 0].any()
    spoilt = copy.deepcopy(data)
    with torch.no_grad():
        for state in spoilt.states:
            state[:, 0] = value
    found, expected = run_layer(spoilt), run_layer(data)
    for name, initial, spoilt_initial in zip(("h_n", "c_n"), data.states, spoilt.states, strict=False):
        assert torch.equal(expected[name][:, 0], initial[:, 0])
        torch.testing.assert_close(found[name][:, 0], spoilt_initial[:, 0], rtol=0, atol=0, equal_nan=True)
        found[name] = torch.cat([expected[name][:, :1], found[name][:, 1:]], dim=1)
    assert_same(found, expected)


@pytest.mark.asan
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_the_initial_state_of_a_row_without_a_step_leaks_nowhere(case: Case, backend: str, value: float) -> None:
    case = case.replace(hx=True)
    module, mask = case.build(fused_rnn), random_mask(case)
    with fused_rnn.use_backend(backend):
        assert_idle_state_stays(
            case, lambda data: run(module, data, mask=as_argument(case, mask)), case.data(), mask, value
        )


@pytest.mark.parametrize("case", SOME[:4], ids=str)
def test_nan_in_masked_steps_leaks_into_no_second_derivative_or_tangent(case: Case) -> None:
    case = case.replace(dtype=F64)
    module, mask = case.build(fused_rnn), random_mask(case)
    argument = as_argument(case, mask)

    def derivatives(data: Data) -> dict[str, Tensor]:
        leaves = [*data.leaves.values(), *module.parameters()]
        outputs = case.outputs(module(data.input, data.hx, mask=argument))
        loss = sum(output.square().sum() for output in outputs.values())
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)
        at = data.sequence.detach()
        hx = None if data.hx is None else torch.utils._pytree.tree_map(Tensor.detach, data.hx)
        tangent = torch.func.jvp(lambda x: module(case.argument(x), hx, mask=argument)[0], (at,), (at.clone(),))[1]
        return {"tangent": tangent} | {f"{i}": gradient for i, gradient in enumerate(second)}

    data = case.data()
    spoilt = copy.deepcopy(data)
    with torch.no_grad():
        spoilt.sequence[~mask] = float("nan")
    found = derivatives(spoilt)
    assert found.pop("tangent").isfinite().all()
    expected = derivatives(data)
    del expected["tangent"]
    assert_within(found, expected)


@pytest.mark.parametrize("case", SOME[:4], ids=str)
def test_an_incoming_gradient_of_a_masked_step_has_no_effect(case: Case) -> None:
    module, data, mask = case.build(fused_rnn), case.data(), random_mask(case)
    leaves = [*data.leaves.values(), *module.parameters()]
    output = module(data.input, data.hx, mask=as_argument(case, mask))[0]
    gradient = torch.randn_like(output)
    spoilt = torch.where(as_argument(case, mask).unsqueeze(2), gradient, float("nan"))
    expected = torch.autograd.grad(output, leaves, gradient, retain_graph=True)
    for found, right in zip(torch.autograd.grad(output, leaves, spoilt), expected, strict=True):
        assert torch.equal(found, right)


# ---- derivatives and transforms -----------------------------------------------------------------------------------

DERIVATIVE_CASES = [
    case.replace(input_size=3, hidden_size=4, batch=3, steps=4, dtype=F64)
    for case in (*SOME[:4], Case(cell="GRU", bias=False, batch_first=True))
]


def as_function(case: Case, **options: Any) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The call as a function of all its leaves and parameters, and their values."""
    module, data = case.build(fused_rnn), case.data()
    names = [name for name, _ in module.named_parameters()]
    count = len(data.leaves)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        hx = Data(case, values[0], values[1:count]).hx
        parameters = dict(zip(names, values[count:], strict=True))
        result = torch.func.functional_call(module, parameters, (case.argument(values[0]), hx), options)
        return tuple(case.outputs(result).values())

    return function, (*data.leaves.values(), *(p.detach().clone().requires_grad_() for p in module.parameters()))


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_gradient_equals_finite_differences(case: Case) -> None:
    function, values = as_function(case, mask=as_argument(case, random_mask(case)))
    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_second_derivative_equals_finite_differences(case: Case) -> None:
    function, values = as_function(case, mask=as_argument(case, random_mask(case)))
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_forward_mode_equals_finite_differences(case: Case) -> None:
    function, values = as_function(case, lengths=random_lengths(case))
    assert torch.autograd.gradcheck(function, values, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_func_grad_and_vjp_equal_autograd(case: Case) -> None:
    module, data, mask = case.build(fused_rnn), case.data(), as_argument(case, random_mask(case))

    def loss(sequence: Tensor) -> Tensor:
        return sum(x.square().sum() for x in case.outputs(module(case.argument(sequence), mask=mask)).values())

    expected = torch.autograd.grad(loss(data.sequence), data.sequence)[0]
    at = data.sequence.detach()
    assert_close_to_twin({"input": torch.func.grad(loss)(at)}, {"input": expected})
    assert_close_to_twin({"input": torch.func.vjp(loss, at)[1](torch.ones((), dtype=F64))[0]}, {"input": expected})
    second = torch.func.jacrev(torch.func.grad(loss))(at)
    assert second.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_vmap_over_masks_lengths_and_inputs_equals_a_loop(case: Case, backend: str) -> None:
    module = case.build(fused_rnn)
    masks = torch.stack([as_argument(case, random_mask(case, seed=seed)) for seed in range(3)])
    lengths = torch.stack([torch.arange(case.batch) % (case.steps + 1 - k) for k in range(3)])
    inputs = torch.stack([case.argument(case.data(seed=seed).sequence.detach()) for seed in range(3)])

    def gradient(x: Tensor, mask: Tensor, length: Tensor) -> Tensor:
        return torch.func.grad(lambda x: module(x, mask=mask, lengths=length)[0].square().sum())(x)

    with fused_rnn.use_backend(backend):
        for in_dims in ((0, 0, 0), (None, 0, None), (None, None, 0), (0, None, None)):
            arguments = [
                values if dim == 0 else values[0] for values, dim in zip((inputs, masks, lengths), in_dims, strict=True)
            ]
            found = torch.func.vmap(gradient, in_dims)(*arguments)
            rows = [
                gradient(*(a[i] if dim == 0 else a for a, dim in zip(arguments, in_dims, strict=True)))
                for i in range(3)
            ]
            assert_close_to_twin({"gradient": found}, {"gradient": torch.stack(rows)})


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_backward_with_create_graph_gives_the_same_first_gradients(case: Case) -> None:
    module, data, mask = case.build(fused_rnn), case.data(), as_argument(case, random_mask(case))
    leaves = [*data.leaves.values(), *module.parameters()]
    plain = torch.autograd.grad(module(data.input, data.hx, mask=mask)[0].square().sum(), leaves)
    recorded = torch.autograd.grad(module(data.input, data.hx, mask=mask)[0].square().sum(), leaves, create_graph=True)
    for before, after in zip(plain, recorded, strict=True):
        assert torch.equal(before, after)


def test_a_mask_that_was_written_to_before_backward_is_refused() -> None:
    case = Case()
    module, data, mask = case.build(fused_rnn), case.data(), random_mask(case)
    loss = module(data.input, mask=mask)[0].sum()
    mask[0] = ~mask[0]
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("option", ["mask", "lengths"])
@pytest.mark.parametrize("case", SOME[:5], ids=str)
def test_compiled_without_a_graph_break_gives_the_same(case: Case, option: str) -> None:
    module, data = case.build(fused_rnn), case.data()
    values = as_argument(case, random_mask(case)) if option == "mask" else random_lengths(case)

    def loss(sequence: Tensor, values: Tensor) -> Tensor:
        outputs = case.outputs(module(case.argument(sequence), **{option: values}))
        return sum(output.square().sum() for output in outputs.values())

    leaves = [data.sequence, *module.parameters()]
    torch._dynamo.reset()  # it counts the compilations of one function over all cases
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for steps in (case.steps, case.steps - 1):  # the second with sizes that the compiler takes as unknown
        sequence, mask = data.sequence[:steps], values
        if option == "lengths":
            mask = values.clamp(max=steps)
        else:
            mask = values[:, :steps] if case.batch_first else values[:steps]
        expected = torch.autograd.grad(loss(sequence, mask), leaves)
        found = torch.autograd.grad(compiled(sequence, mask), leaves)
        names = ["input", *dict(module.named_parameters())]
        assert_close_to_twin(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))


class _WithOption(nn.Module):
    """A layer whose option is an argument by position, which is all that torch.jit.trace records."""

    def __init__(self, layer: nn.Module, option: str) -> None:
        super().__init__()
        self.layer, self.option = layer, option

    def forward(self, x: Tensor, value: Tensor) -> Any:
        return self.layer(x, **{self.option: value})[0]


@pytest.mark.parametrize("option", ["mask", "lengths"])
@pytest.mark.parametrize("cell", CELLS)
def test_jit_trace_records_what_counts_for_other_values_and_sizes(cell: str, option: str) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=True)
    module = _WithOption(case.build(fused_rnn), option)

    def arguments(case: Case, seed: int) -> tuple[Tensor, Tensor]:
        mask = random_mask(case, seed=seed)
        return case.data(seed=seed).sequence.detach(), mask if option == "mask" else mask.sum(0)

    traced = torch.jit.trace(module, arguments(case, 1))
    for other in (case, case.replace(batch=2, steps=9)):
        given = arguments(other, 2)
        assert_same({"output": traced(*given)}, {"output": module(*given)})
    with pytest.raises(NameError, match="valid arguments"):  # torch's own: keywords cannot be traced
        torch.jit.trace(module.layer, example_kwarg_inputs={"input": given[0], option: given[1]})


@pytest.mark.kernels
@pytest.mark.parametrize("case", [SOME[0], SOME[1], SOME[4], Case(cell="RNN_TANH", num_layers=3)], ids=str)
def test_operators_pass_opcheck(case: Case) -> None:
    from test_operators import _Recorder

    module, data = case.build(fused_rnn), case.data()
    with fused_rnn.use_backend("fused"), _Recorder() as recorder:
        run(module, data, mask=as_argument(case, random_mask(case)))
    assert [call[0].overloadpacket.__name__ for call in recorder.calls] == ["rnn_forward", "rnn_backward"]
    for operator, args, kwargs in recorder.calls:
        tensors = [t for argument in args if isinstance(argument, list) for t in argument if isinstance(t, Tensor)]
        assert any(t.dtype == torch.bool for t in tensors)
        torch.library.opcheck(operator, args, kwargs)


# ---- options of the call and of the layer -------------------------------------------------------------------------


@pytest.mark.parametrize("case", SOME, ids=str)
def test_recompute_gives_the_numbers_of_saved_gates(case: Case) -> None:
    module, data, mask = case.build(fused_rnn), case.data(), as_argument(case, random_mask(case))
    expected = run(module, data, mask=mask)
    module.recompute = True
    assert_within(run(module, data, mask=mask), {name: tensor.double() for name, tensor in expected.items()})


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_draws_what_a_call_without_a_mask_draws(cell: str) -> None:
    case = Case(cell=cell, num_layers=3, dropout=0.4, batch_first=True, dtype=F64)
    module, data, mask = case.build(fused_rnn), case.data(), as_argument(case, random_mask(case))

    def results(backend: str, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(3)
        with fused_rnn.use_backend(backend):
            return run(module, data, **options)

    assert_same(results("auto", mask=torch.ones_like(mask)), results("auto"))
    assert_within(results("auto", mask=mask), results("reference", mask=mask))


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell: str) -> None:
    case = Case(cell=cell, num_layers=2)
    module, data, mask = case.build(fused_rnn), case.data(), random_mask(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(module, data, mask=mask)
        whole = run(module, data)
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: t.dtype for name, t in whole.items()}
    expected = run(module, data, mask=mask)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=0.1, atol=0.1)
    assert found["output"][~mask].count_nonzero() == 0


@pytest.mark.parametrize("cell", CELLS)
def test_functions_take_them_too(cell: str) -> None:
    case = Case(cell=cell, num_layers=2)
    module, data = case.build(fused_rnn), case.data()
    name, _, nonlinearity = cell.lower().partition("_")
    options: dict[str, Any] = {"nonlinearity": nonlinearity} if nonlinearity else {}
    options |= {"num_layers": 2, "lengths": random_lengths(case), "mask": random_mask(case)}
    expected = run(module, data, gradients=False, lengths=options["lengths"], mask=options["mask"])
    for namespace in (fused_rnn.functional, fused_rnn.reference):
        found = case.outputs(getattr(namespace, name)(data.input, None, list(module.parameters()), **options))
        assert_within(detached(found), {name: tensor.double() for name, tensor in expected.items()})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_run_on_the_reference(dtype: torch.dtype) -> None:
    layer = fused_rnn.RNN(3, 4, dtype=dtype)
    mask = random_mask(Case())
    output, _ = layer(torch.randn(6, 4, 3, dtype=dtype), mask=mask)
    assert output[~mask].count_nonzero() == 0 and output[mask].count_nonzero() > 0


@pytest.mark.kernels
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("case", [SOME[0].replace(batch=40, hidden_size=65, steps=30, input_size=70)], ids=str)
def test_more_threads(case: Case, count: int, threads: None) -> None:
    from fused_rnn import _C

    mask = as_argument(case, random_mask(case))
    expected = run(case.build(fused_rnn), case.data(), mask=mask)
    previous = _C.set_processors(8)
    try:
        torch.set_num_threads(count)
        found = run(case.build(fused_rnn), case.data(), mask=mask)
    finally:
        _C.set_processors(previous)
    assert_within(found, {name: tensor.double() for name, tensor in expected.items()})


def test_explain_counts_the_steps() -> None:
    layer, x = fused_rnn.GRU(3, 4), torch.zeros(10, 2, 3)
    explained = fused_rnn.explain(layer, x, lengths=torch.tensor([3, 4]))
    assert explained.live_steps == 7
    assert "7 of 20 steps count: " in str(explained)
    assert fused_rnn.explain(layer, x, mask=torch.zeros(10, 2, dtype=torch.bool)).live_steps == 0
    assert "20 of 20 steps count: as without a mask" in str(fused_rnn.explain(layer, x, lengths=torch.tensor([10, 10])))
    assert fused_rnn.explain(layer, x).live_steps is None and "count" not in str(fused_rnn.explain(layer, x))
    with fused_rnn.use_backend("reference"):
        assert "carry the state on" in str(fused_rnn.explain(layer, x, lengths=torch.tensor([3, 4])))
    with pytest.raises(TypeError, match="^lengths: expected None for a cell"):
        fused_rnn.explain(fused_rnn.GRUCell(3, 4), x[0], lengths=torch.tensor([3, 4]))


# ---- errors -------------------------------------------------------------------------------------------------------

X = torch.zeros(5, 2, 3)
PACKED = pack_padded_sequence(X, torch.tensor([5, 3]))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    ("input", "options", "error", "message"),
    [
        (X, {"lengths": [5, 3]}, TypeError, "lengths: expected a Tensor or None, got a list of 2"),
        (X, {"lengths": torch.tensor([5.0, 3.0])}, RuntimeError, "lengths: expected an integer dtype, got torch.float"),
        (
            X,
            {"lengths": torch.tensor([True, True])},
            RuntimeError,
            "lengths: expected an integer dtype, got torch.bool",
        ),
        (X, {"lengths": torch.tensor([5])}, RuntimeError, r"lengths: expected \(2,\), one for each row, got \(1,\)"),
        (X, {"lengths": torch.tensor(5)}, RuntimeError, r"lengths: expected \(2,\), one for each row, got \(\)"),
        (
            X[:, 0],
            {"lengths": torch.tensor([5])},
            RuntimeError,
            r"lengths: expected \(\), one for each row, got \(1,\)",
        ),
        (X, {"lengths": torch.tensor([5, 6])}, RuntimeError, "lengths: expected 0 to 5, the steps of the input, got 6"),
        (
            X,
            {"lengths": torch.tensor([-1, 5])},
            RuntimeError,
            "lengths: expected 0 to 5, the steps of the input, got -1",
        ),
        (X, {"mask": [True] * 5}, TypeError, "mask: expected a Tensor or None, got a list of 5"),
        (X, {"mask": torch.ones(5, 2)}, RuntimeError, "mask: expected torch.bool, got torch.float32"),
        (X, {"mask": torch.ones(2, 5).bool()}, RuntimeError, r"mask: expected \(5, 2\), \(T, B\), got \(2, 5\)"),
        (X, {"mask": torch.ones(5).bool()}, RuntimeError, r"mask: expected \(5, 2\), \(T, B\), got \(5,\)"),
        (X[:, 0], {"mask": torch.ones(5, 1).bool()}, RuntimeError, r"mask: expected \(5,\), \(T\), got \(5, 1\)"),
        (X, {"mask": torch.ones(5, 2, device="meta").bool()}, RuntimeError, "mask: expected on cpu as the input is"),
        (PACKED, {"lengths": torch.tensor([5, 3])}, RuntimeError, "lengths: expected None with packed data"),
        (PACKED, {"mask": torch.ones(5, 2).bool()}, RuntimeError, "mask: expected None with packed data"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_wrong_arguments_are_named(name: str, input: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        getattr(fused_rnn, name)(3, 4)(input, **options)


def test_the_layout_that_an_error_names_is_that_of_batch_first() -> None:
    with pytest.raises(RuntimeError, match=r"^mask: expected \(2, 5\), \(B, T\), got \(5, 2\)"):
        fused_rnn.GRU(3, 4, batch_first=True)(X.transpose(0, 1), mask=torch.ones(5, 2).bool())


def test_they_are_keywords_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        fused_rnn.GRU(3, 4)(X, None, torch.tensor([5, 3]))


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 5, dtype=torch.bool), "mask: expected bool"),
        (torch.ones(5, 2), "mask: expected bool"),
    ],
)
def test_the_operator_checks_its_mask(mask: Tensor, message: str) -> None:
    layer = fused_rnn.GRU(3, 4)
    params, settings = list(layer.parameters()), layer._settings().flatten()[0]
    with pytest.raises(RuntimeError, match=message), torch.no_grad():
        torch.ops.fused_rnn.rnn_forward(X, None, None, params, Controls(mask=mask).flatten(X), settings, [], False)
    controls = Controls(PACKED.batch_sizes, mask).flatten(PACKED.data)
    with pytest.raises(RuntimeError, match="mask: expected none with batch_sizes"), torch.no_grad():
        torch.ops.fused_rnn.rnn_forward(PACKED.data, None, None, params, controls, settings, [], False)
