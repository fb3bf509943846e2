"""`reset=` and `reset_state=`: rows begin anew within a sequence, as if it had been split into episodes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, CellCase, Data, detached, incoming_gradients, run
from support.compare import assert_close_to_twin, assert_same, assert_within
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.overrides import TorchFunctionMode

import fused_rnn
from fused_rnn.check import random_values
from fused_rnn.diagnostics import gate_statistics, gradient_flow

F64 = torch.float64


@pytest.fixture(params=["reference", pytest.param("fused", marks=pytest.mark.kernels)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fused_rnn.use_backend(request.param):
        yield request.param


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a layer, where its rows begin anew, from what, and which steps count."""

    case: Case
    pattern: str = "some"  # which steps are marked: see resets
    has_state: bool = True  # reset_state=
    counts: str = "all"  # or "lengths" or "mask"
    recompute: bool = False
    seed: int = 0

    def __str__(self) -> str:
        options = [name for name in ("has_state", "recompute") if getattr(self, name)]
        return "-".join([str(self.case), self.pattern, self.counts, *options, str(self.seed)])

    @functools.cached_property
    def live(self) -> Tensor:
        """bool (T, B): of the first row all steps, of the second of three or more none."""
        case, generator = self.case, torch.Generator().manual_seed(self.seed)
        if self.counts == "lengths":
            live = torch.arange(case.steps).unsqueeze(1) < torch.randint(
                0, case.steps + 1, (case.batch,), generator=generator
            )
        elif self.counts == "mask":
            live = torch.rand(case.steps, case.batch, generator=generator) < 0.6
        else:
            return torch.ones(case.steps, case.batch, dtype=torch.bool)
        live[:, 0] = True
        if case.batch > 2:
            live[:, 1] = False
        return live

    @functools.cached_property
    def resets(self) -> Tensor:
        """bool (T, B)."""
        case, generator = self.case, torch.Generator().manual_seed(self.seed + 1)
        marked = torch.rand(case.steps, case.batch, generator=generator) < 0.3
        if self.pattern == "first":
            marked[0] = True
        elif self.pattern == "last":
            marked[-1] = True
        elif self.pattern == "ends":
            marked[1:-1] = False
            marked[0] = marked[-1] = True
        elif self.pattern == "all":
            marked[:] = True
        elif self.pattern == "none":
            marked[:] = False
        elif self.pattern == "masked" and not self.live.all():
            marked = ~self.live
        return marked

    def data(self) -> tuple[Data, tuple[Tensor, ...]]:
        """Leaves of the call, and those of reset_state."""
        case, generator = self.case, torch.Generator().manual_seed(self.seed + 2)
        shapes = case.replace(hx=True).state_shapes if self.has_state else []
        states = [random_values(shape, integers=case.integers, generator=generator) for shape in shapes]
        return case.data(seed=self.seed), tuple(state.to(case.dtype).requires_grad_() for state in states)

    def as_argument(self, steps: Tensor) -> Tensor:
        return steps.T if self.case.batch_first else steps

    def options(self, states: tuple[Tensor, ...]) -> dict[str, Any]:
        """Keywords of the call."""
        given: dict[str, Any] = {"reset": self.as_argument(self.resets)}
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


def with_gradients(
    module: nn.Module, data: Data, states: tuple[Tensor, ...], outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs, and the gradient of every leaf, of reset_state and of every parameter; zeros where none arrives."""
    leaves = data.leaves | dict(zip(("reset_h", "reset_c"), states, strict=False)) | dict(module.named_parameters())
    incoming = incoming_gradients(list(outputs.values()), integers=data.case.integers)
    found = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), incoming, allow_unused=True, materialize_grads=True
    )
    return detached(outputs) | {f"grad({name})": gradient for name, gradient in zip(leaves, found, strict=True)}


def run_call(call: Call, module: nn.Module | None = None) -> dict[str, Tensor]:
    module = module or call.build()
    data, states = call.data()
    return with_gradients(module, data, states, call.case.outputs(module(data.input, data.hx, **call.options(states))))


def by_hand(call: Call) -> dict[str, Tensor]:
    """The definition in float64: every episode of every row is a call of torch.nn's layer of its own.

    Steps that do not count are left out. Forward, the first episode begins from hx (unless its first step is marked)
    and the others from reset_state; in reverse the last one begins from hx. hx is that of the row.
    """
    case = call.case
    twin, (data, reset_states) = copy.deepcopy(case.build(nn)).double(), call.data()
    twin.batch_first = False
    data, reset_states = data.to(F64), tuple(state.detach().double().requires_grad_() for state in reset_states)
    shapes = case.replace(hx=True).state_shapes
    old = data.states or [torch.zeros(shape, dtype=F64) for shape in shapes]
    anew = reset_states or [torch.zeros(shape, dtype=F64) for shape in shapes]
    is_reverse = (torch.arange(shapes[0][0]) % 2 == 1 if case.bidirectional else torch.zeros(shapes[0][0])).bool()
    width = (case.proj_size or case.hidden_size) * (2 if case.bidirectional else 1)
    outputs, ends = [], []
    for row in range(case.batch):
        marks = [t for t in range(1, case.steps) if call.resets[t, row]]
        episodes = list(zip([0, *marks], [*marks, case.steps], strict=True))
        output = [torch.zeros(width, dtype=F64)] * case.steps
        final: list[Tensor] = []
        for index, (begin, end) in enumerate(episodes):
            forward_from_hx = index == 0 and not call.resets[0, row]
            from_hx = torch.where(is_reverse, index == len(episodes) - 1, forward_from_hx)[:, None, None]
            states = [
                torch.where(from_hx, s_old[:, row : row + 1], s_new[:, row : row + 1])
                for s_old, s_new in zip(old, anew, strict=True)
            ]
            steps = [t for t in range(begin, end) if call.live[t, row]]
            if steps:
                hx = tuple(states) if case.has_cell_state else states[0]
                of_episode, new = twin(data.sequence[steps, row : row + 1], hx)
                states = list(new) if case.has_cell_state else [new]
                for t, values in zip(steps, of_episode[:, 0], strict=True):
                    output[t] = values
            is_last = is_reverse if index == 0 else torch.zeros_like(is_reverse)
            is_last = is_last | (~is_reverse if index == len(episodes) - 1 else torch.zeros_like(is_reverse))
            final = [
                torch.where(is_last[:, None, None], state, before)
                for state, before in zip(states, final or states, strict=True)
            ]
        outputs.append(torch.stack(output))
        ends.append(final)
    output = torch.stack(outputs, 0 if case.batch_first else 1)
    states = [torch.cat(of_rows, 1) for of_rows in zip(*ends, strict=True)]
    found = {"output": output} | dict(zip(("h_n", "c_n"), states, strict=False))
    return with_gradients(twin, data, reset_states, found)


LEVELS: dict[str, tuple[Any, ...]] = {
    "cell": ("LSTM", *CELLS),  # the LSTM twice as often: half of them have a projection
    "input_size": (1, 5),
    "hidden_size": (2, 7, 17, 33),
    "num_layers": (1, 2, 2, 3),
    "bidirectional": (False, True),
    "bias": (True, True, False),
    "proj": (False, True),
    "batch_first": (False, True),
    "batch": (1, 2, 5, 9),
    "steps": (1, 2, 6, 13),
    "hx": (False, True, True),
    "dtype": (torch.float32, torch.float32, F64, torch.bfloat16, torch.float16),
}


def draw(seed: int) -> Call:
    generator = random.Random(seed)
    row = {name: generator.choice(levels) for name, levels in LEVELS.items()}
    row["proj"] = row["proj"] and row["cell"] == "LSTM"
    return Call(
        Case(**row),
        generator.choice(("some", "some", "first", "last", "ends", "all", "none", "masked", "masked")),
        generator.choice((False, True, True)),
        generator.choice(("all", "lengths", "mask")),
        generator.choice((False, True)),
        seed,
    )


DRAWN = [draw(seed) for seed in range(200)]
# One of each kind, for what needs no design.
SOME = [
    *(Call(Case(cell=cell, num_layers=2, bidirectional=True, hx=True)) for cell in CELLS),
    Call(Case(proj=True, num_layers=2, batch_first=True, hx=True), counts="lengths"),
    Call(Case(cell="GRU", batch=70, steps=20, dtype=torch.bfloat16, batch_first=True, hx=True), counts="mask"),
    Call(Case(hx=True), has_state=False, recompute=True),
]


# ---- numbers ------------------------------------------------------------------------------------------------------


@functools.cache
def expected_of(index: int) -> dict[str, Tensor]:
    return by_hand(DRAWN[index])


@pytest.mark.parametrize("index", range(len(DRAWN)), ids=lambda index: str(DRAWN[index]))
def test_numbers_of_torch_nn_on_every_episode_by_itself(index: int, backend: str) -> None:
    assert_within(run_call(DRAWN[index]), expected_of(index))


@pytest.mark.asan
@pytest.mark.kernels
@pytest.mark.parametrize("index", range(0, len(DRAWN), 8), ids=lambda index: str(DRAWN[index]))
def test_every_instruction_set_gives_them(index: int, isa: str) -> None:
    with fused_rnn.use_backend("fused"):
        assert_within(run_call(DRAWN[index]), expected_of(index))


@pytest.mark.parametrize("call", SOME, ids=str)
def test_inference_gives_the_numbers_of_training(call: Call, backend: str) -> None:
    module, (data, states) = call.build(), call.data()
    expected = detached(call.case.outputs(module(data.input, data.hx, **call.options(states))))
    with torch.no_grad():
        found = call.case.outputs(module(data.input, data.hx, **call.options(states)))
    assert_within(found, {name: tensor.double() for name, tensor in expected.items()})


@pytest.mark.parametrize("call", SOME, ids=str)
def test_marks_of_false_change_no_bit(call: Call, backend: str) -> None:
    call = dataclasses.replace(call, pattern="none", counts="all")
    found, expected = run_call(call), run(call.build(), call.data()[0])
    for name in list(found):
        if name in ("grad(reset_h)", "grad(reset_c)"):
            assert found.pop(name).count_nonzero() == 0
    assert_same(found, expected)


@pytest.mark.parametrize("call", SOME, ids=str)
def test_without_reset_state_rows_begin_from_zeros(call: Call, backend: str) -> None:
    module, (data, states) = call.build(), dataclasses.replace(call, has_state=True).data()
    zeros = tuple(torch.zeros_like(state) for state in states)
    options = dataclasses.replace(call, has_state=False).options(())
    assert_same(
        run(module, data, **options),
        run(module, data, **options, reset_state=zeros if call.case.has_cell_state else zeros[0]),
    )


@pytest.mark.parametrize("call", SOME, ids=str)
def test_output_has_the_strides_of_a_call_without_a_reset(call: Call, backend: str) -> None:
    module, (data, states) = call.build(), call.data()
    assert module(data.input, **call.options(states))[0].stride() == module(data.input)[0].stride()


@pytest.mark.parametrize("cell", CELLS)
def test_a_row_whose_resets_no_live_step_follows_ends_in_the_fresh_state(cell: str, backend: str) -> None:
    call = Call(Case(cell=cell, num_layers=2, hx=True), counts="lengths")
    module, (data, states) = call.build(), call.data()
    reset, lengths = torch.zeros(6, 4, dtype=torch.bool), torch.tensor([3, 3, 0, 6])
    reset[4, :3] = True
    reset_state = states if call.case.has_cell_state else states[0]
    found = call.case.outputs(module(data.input, data.hx, lengths=lengths, reset=reset, reset_state=reset_state))
    for name, fresh in zip(("h_n", "c_n"), states, strict=False):
        assert torch.equal(found[name][:, :3], fresh[:, :3])
        assert not torch.equal(found[name][:, 3], fresh[:, 3])


@pytest.mark.parametrize("cell", CELLS)
def test_unbatched(cell: str, backend: str) -> None:
    call = Call(Case(cell=cell, batch=1, num_layers=2, bidirectional=True, steps=9, hx=True))
    module, (data, states) = call.build(), call.data()
    expected = detached(call.case.outputs(module(data.input, data.hx, **call.options(states))))
    hx, anew = (tuple(s.squeeze(1) for s in of) for of in (data.states, states))
    if not call.case.has_cell_state:
        hx, anew = hx[0], anew[0]
    found = module(data.sequence.squeeze(1), hx, reset=call.resets.squeeze(1), reset_state=anew)
    assert_same(detached(call.case.outputs(found)), {name: tensor.squeeze(1) for name, tensor in expected.items()})


def test_a_batch_of_no_rows(backend: str) -> None:
    layer = fused_rnn.LSTM(3, 4)
    reset, state = torch.zeros(5, 0, dtype=torch.bool), torch.zeros(1, 0, 4)
    output, (h_n, c_n) = layer(torch.zeros(5, 0, 3), reset=reset, reset_state=(state, state))
    assert output.shape == (5, 0, 4) and h_n.shape == c_n.shape == (1, 0, 4)


@pytest.mark.parametrize("call", SOME[:1], ids=str)
def test_marks_of_other_bytes_than_0_and_1_and_of_other_strides(call: Call, backend: str) -> None:
    module, (data, states) = call.build(), call.data()
    options = call.options(states)
    expected = run(module, data, **options)
    bytes_of_true = (call.resets.to(torch.uint8) * 255).view(torch.bool)
    assert_same(run(module, data, **options | {"reset": bytes_of_true}), expected)
    assert_same(run(module, data, **options | {"reset": call.resets.T.contiguous().T}), expected)
    one_row = call.resets[:, :1].expand(-1, call.case.batch)
    assert_same(
        run(module, data, **options | {"reset": one_row}), run(module, data, **options | {"reset": one_row.clone()})
    )
    shared = tuple(state.detach()[:, :1].expand_as(state) for state in states)  # one learned state for all rows
    assert_same(
        run(module, data, **options | {"reset_state": shared}),
        run(module, data, **options | {"reset_state": tuple(state.clone() for state in shared)}),
    )


# ---- what is thrown away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", SOME, ids=str)
def test_no_gradient_crosses_a_reset(call: Call, backend: str) -> None:
    """Exactly: of the outputs from step 3 on, of which all rows are marked, none comes to what was before."""
    case = call.case.replace(bidirectional=False)
    call = dataclasses.replace(call, case=case, counts="all")
    module, (data, states) = call.build(), call.data()
    reset = torch.zeros(case.steps, case.batch, dtype=torch.bool)
    reset[3] = True
    options = call.options(states) | {"reset": call.as_argument(reset)}
    output = module(data.input, data.hx, **options)[0]
    output = output.transpose(0, 1) if case.batch_first else output
    after = torch.autograd.grad(output[3:].sum(), [data.sequence, *data.states, *states], retain_graph=True)
    assert after[0][:3].count_nonzero() == 0 and after[0][3:].count_nonzero() > 0
    for old in after[1 : 1 + len(data.states)]:
        assert old.count_nonzero() == 0
    for fresh in after[1 + len(data.states) :]:
        assert fresh.count_nonzero() > 0
    before = torch.autograd.grad(output[:3].sum(), [data.sequence, *data.states, *states], allow_unused=True)
    assert before[0][3:].count_nonzero() == 0
    for fresh in before[1 + len(data.states) :]:
        assert fresh is None or fresh.count_nonzero() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", SOME, ids=str)
def test_what_a_row_of_a_marked_first_step_was_given_leaks_nowhere(call: Call, backend: str, value: float) -> None:
    call = dataclasses.replace(call, case=call.case.replace(bidirectional=False), pattern="first")
    module, (data, states) = call.build(), call.data()
    spoilt = copy.deepcopy(data)
    with torch.no_grad():
        for state in spoilt.states:
            state.fill_(value)
    options = call.options(states)
    found, expected = run(module, spoilt, **options), run(module, data, **options)
    assert_same(found, expected)
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("call", [call for call in SOME if call.has_state], ids=str)
def test_what_reset_state_has_for_rows_without_a_mark_leaks_nowhere(call: Call, backend: str) -> None:
    module, (data, states) = call.build(), call.data()
    reset = call.resets.clone()
    reset[:, 0] = False
    options = call.options(states) | {"reset": call.as_argument(reset)}
    expected = run(module, data, **options)
    spoilt = tuple(state.detach().clone() for state in states)
    for state in spoilt:
        state[:, 0] = float("nan")
    found = run(module, data, **options | {"reset_state": spoilt if call.case.has_cell_state else spoilt[0]})
    assert_same(found, expected)


@pytest.mark.parametrize("call", SOME[:1], ids=str)
def test_marks_that_were_written_to_before_backward_are_refused(call: Call, backend: str) -> None:
    module, (data, states) = call.build(), call.data()
    options = call.options(states)
    loss = module(data.input, data.hx, **options)[0].sum()
    options["reset"][0] = ~options["reset"][0]
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


# ---- derivatives and transforms -----------------------------------------------------------------------------------

DERIVATIVE_CALLS = [
    dataclasses.replace(call, case=call.case.replace(input_size=3, hidden_size=4, batch=3, steps=4, dtype=F64))
    for call in (*SOME[:4], Call(Case(cell="GRU", bias=False, batch_first=True, hx=True), counts="mask"), SOME[4])
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
        options = call.options(values[count:end])
        result = torch.func.functional_call(module, parameters, (call.case.argument(values[0]), hx), options)
        return tuple(call.case.outputs(result).values())

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


@pytest.mark.parametrize("call", DERIVATIVE_CALLS, ids=str)
def test_forward_mode_equals_finite_differences(call: Call, backend: str) -> None:
    function, values = as_function(call)
    assert torch.autograd.gradcheck(function, values, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


@pytest.mark.parametrize("call", DERIVATIVE_CALLS, ids=str)
def test_vmap_over_marks_and_states_equals_a_loop(call: Call, backend: str) -> None:
    module = call.build()
    calls = [dataclasses.replace(call, seed=seed) for seed in range(3)]
    marks = torch.stack([other.as_argument(other.resets) for other in calls])
    states = tuple(torch.stack(of_calls) for of_calls in zip(*(other.data()[1] for other in calls), strict=True))
    x = call.data()[0].input.detach()

    def gradient(marks: Tensor, *states: Tensor) -> Any:
        def loss(*states: Tensor) -> Tensor:
            reset_state = states if call.case.has_cell_state else states[0]
            return module(x, reset=marks, reset_state=reset_state)[0].square().sum()

        return torch.func.grad(loss, tuple(range(len(states))))(*states)

    for in_dims in ((0, *(0 for _ in states)), (0, *(None for _ in states)), (None, *(0 for _ in states))):
        given = [v if dim == 0 else v[0] for v, dim in zip((marks, *states), in_dims, strict=True)]
        found = torch.func.vmap(gradient, in_dims)(*given)
        rows = [gradient(*(v[i] if dim == 0 else v for v, dim in zip(given, in_dims, strict=True))) for i in range(3)]
        for index, of_state in enumerate(found):
            assert_close_to_twin({"gradient": of_state}, {"gradient": torch.stack([row[index] for row in rows])})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "backend"), [(SOME[0], "reference"), *((c, "fused") for c in SOME[:5])], ids=str, indirect=["backend"]
)
def test_compiled_without_a_graph_break_gives_the_same(call: Call, backend: str) -> None:
    call = dataclasses.replace(call, counts="all")
    module, (data, states) = call.build(), call.data()

    def loss(sequence: Tensor, reset: Tensor, *states: Tensor) -> Tensor:
        reset_state = states if call.case.has_cell_state else states[0]
        result = module(call.case.argument(sequence), reset=reset, reset_state=reset_state)
        return sum(output.square().sum() for output in call.case.outputs(result).values())

    leaves = [data.sequence, *states, *module.parameters()]
    names = ["input", *("reset_h", "reset_c")[: len(states)], *dict(module.named_parameters())]
    torch._dynamo.reset()  # it counts the compilations of one function over all calls
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for steps in (call.case.steps, call.case.steps - 1):  # the second with sizes that the compiler takes as unknown
        given = (data.sequence[:steps], call.as_argument(call.resets[:steps]), *states)
        expected = torch.autograd.grad(loss(*given), leaves)
        found = torch.autograd.grad(compiled(*given), leaves)
        assert_close_to_twin(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_compiled_cells_give_the_same(cell: str, backend: str) -> None:
    case = CellCase(cell=cell)
    module, data, other = case.build(fused_rnn), case.data(), case.data(seed=8)
    reset = torch.tensor([True, False, True, False])

    def step(x: Tensor, reset: Tensor) -> Any:
        return module(x, data.hx, reset=reset, reset_state=other.hx)

    torch._dynamo.reset()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(data.sequence, reset)
    assert_close_to_twin(detached(case.outputs(found)), detached(case.outputs(step(data.sequence, reset))))


class _WithReset(nn.Module):
    """A layer whose reset is an argument by position, which is all that torch.jit.trace records."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, reset: Tensor, h: Tensor) -> Any:
        return self.layer(x, reset=reset, reset_state=h)[0]


def test_jit_trace_records_marks_for_other_values_and_sizes(backend: str) -> None:
    call = Call(Case(cell="GRU", num_layers=2, bidirectional=True))
    module = _WithReset(call.build())
    arguments = [
        (other.data()[0].sequence.detach(), other.resets, other.data()[1][0].detach())
        for other in (call, dataclasses.replace(call, case=call.case.replace(batch=2), seed=3))
    ]
    traced = torch.jit.trace(module, arguments[0])
    for given in arguments:
        assert_same({"output": traced(*given)}, {"output": module(*given)})


@pytest.mark.kernels
@pytest.mark.parametrize(
    "call", [SOME[0], SOME[1], SOME[4], Call(Case(cell="RNN_TANH", num_layers=3), has_state=False)], ids=str
)
def test_operators_pass_opcheck(call: Call) -> None:
    from test_operators import _Recorder

    with fused_rnn.use_backend("fused"), _Recorder() as recorder:
        run_call(call)
    assert [op[0].overloadpacket.__name__ for op in recorder.calls] == ["rnn_forward", "rnn_backward"]
    for operator, args, kwargs in recorder.calls:
        torch.library.opcheck(operator, args, kwargs)


# ---- options of the call and of the layer -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_stateful_layer_goes_on_where_it_ended_unless_a_step_is_marked(name: str, backend: str) -> None:
    torch.manual_seed(0)
    layer = getattr(fused_rnn, name)(3, 4, num_layers=2, stateful=True, dtype=F64)
    plain = getattr(fused_rnn, name)(3, 4, num_layers=2, dtype=F64)
    plain.load_state_dict(layer.state_dict())
    x, reset = torch.randn(12, 5, 3, dtype=F64), torch.rand(12, 5) < 0.2
    reset[4, 0] = reset[8, 1] = True  # at the first step of a call
    expected = plain(x, reset=reset)[0]
    found = torch.cat([layer(x[k : k + 4], reset=reset[k : k + 4])[0] for k in (0, 4, 8)])
    assert_close_to_twin({"output": found.detach()}, {"output": expected.detach()})


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_bptt_steps_are_slices_by_hand(name: str, has_state: bool, backend: str) -> None:
    """What reset_state gets, too, of a reset at the first step of a slice."""
    torch.manual_seed(0)
    layer = getattr(fused_rnn, name)(3, 4, num_layers=2, bptt_steps=3, batch_first=True, dtype=F64)
    plain = getattr(fused_rnn, name)(3, 4, num_layers=2, batch_first=True, dtype=F64)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 8, 3, dtype=F64, requires_grad=True)
    reset, lengths = torch.rand(5, 8) < 0.2, torch.tensor([8, 5, 3, 0, 7])
    reset[0, 3] = reset[1, 6] = True
    states = tuple(torch.randn(2, 5, 4, dtype=F64, requires_grad=True) for _ in range(2 if name == "LSTM" else 1))
    options = {"reset_state": states if name == "LSTM" else states[0]} if has_state else {}
    hx, outputs = None, []
    for k in (0, 3, 6):
        count = min(3, 8 - k)
        of_slice = {"lengths": (lengths - k).clamp(0, count), "reset": reset[:, k : k + count]}
        output, hx = plain(x[:, k : k + count], hx, **of_slice, **options)
        outputs.append(output)
        hx = tuple(s.detach() for s in hx) if name == "LSTM" else hx.detach()
    expected = torch.cat(outputs, 1)
    found = layer(x, lengths=lengths, reset=reset, **options)[0]
    assert_close_to_twin({"output": found.detach()}, {"output": expected.detach()})
    leaves = [x, *(states if has_state else ())]
    gradients = [
        torch.autograd.grad(output.square().sum(), [*leaves, *module.parameters()])
        for output, module in ((found, layer), (expected, plain))
    ]
    for ours, right in zip(*gradients, strict=True):
        assert_close_to_twin({"gradient": ours}, {"gradient": right})


WITHIN: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"peephole": True, "coupled_gates": True, "cell_clip": 0.5}),
    ("LSTM", {"zoneout": 0.2, "zoneout_cell": 0.1, "recurrent_dropout": 0.3, "proj_size": 3}),
    ("LSTM", {"recurrent_bias": False, "recurrent_grad_clip": 0.1, "activation": "softsign"}),
    ("GRU", {"reset_after": False, "activation": "softsign", "recurrent_activation": "hard_sigmoid"}),
    ("GRU", {"zoneout": 0.2, "recurrent_dropout": 0.3, "recurrent_grad_clip": 0.1}),
    ("RNN", {"zoneout": 0.2, "recurrent_dropout": 0.3, "recurrent_bias": False}),
]


def made_within(name: str, options: dict[str, Any], **more: Any) -> tuple[Any, Tensor, tuple[Tensor, ...]]:
    """A layer of both directions unless `more` says so, an input (8, 4, 3), and reset_state as a tuple."""
    torch.manual_seed(0)
    layer = getattr(fused_rnn, name)(3, 5, num_layers=2, dtype=F64, **{"bidirectional": True} | options | more)
    rows = 4 if layer.bidirectional else 2
    sizes = [layer.proj_size or 5, 5][: 2 if name == "LSTM" else 1]
    states = tuple(torch.randn(rows, 4, size, dtype=F64, requires_grad=True) for size in sizes)
    return layer, torch.randn(8, 4, 3, dtype=F64, requires_grad=True), states


@pytest.mark.parametrize(("name", "options"), WITHIN, ids=str)
def test_options_within_the_recurrence_begin_anew_with_the_row(name: str, options: Any, backend: str) -> None:
    """Of all rows at two steps: as three calls. In eval mode, where nothing is drawn."""
    if backend == "fused" and ("reset_after" in options or name == "RNN"):
        pytest.skip("has no kernel, or none with gradients in eval mode")
    layer, x, states = made_within(name, options)
    layer.eval()
    reset = torch.zeros(8, 4, dtype=torch.bool)
    reset[0] = reset[2] = reset[5] = True
    anew: Any = states if name == "LSTM" else states[0]
    found = layer(x, anew, reset=reset, reset_state=anew)[0]
    expected = torch.cat([layer(x[begin:end], anew)[0] for begin, end in ((0, 2), (2, 5), (5, 8))])
    leaves = [x, *states, *layer.parameters()]
    gradient = torch.randn_like(found)
    pairs = [(found, expected)]
    pairs += zip(*(torch.autograd.grad(output, leaves, gradient) for output in (found, expected)), strict=True)
    for ours, right in pairs:
        assert_close_to_twin({"": ours.detach()}, {"": right.detach()})


@pytest.mark.kernels
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("more", [{}, {"bidirectional": False, "bptt_steps": 3}], ids=str)
@pytest.mark.parametrize(("name", "options"), [case for case in WITHIN if "reset_after" not in case[1]], ids=str)
def test_kernels_do_what_the_formulas_do_beside_options(name: str, options: Any, more: Any, recompute: bool) -> None:
    """In training, where both draw the same, with steps that do not count."""
    results = []
    for backend in ("reference", "fused"):
        layer, x, states = made_within(name, options, **more)
        layer.recompute = recompute
        anew: Any = states if name == "LSTM" else states[0]
        draws = torch.rand(2, 8, 4, generator=torch.Generator().manual_seed(4))
        torch.manual_seed(3)
        with fused_rnn.use_backend(backend):
            output, ends = layer(x, reset=draws[0] < 0.3, reset_state=anew, mask=draws[1] < 0.7)
        outputs = [output, *(ends if name == "LSTM" else (ends,))]
        leaves = [x, *states, *layer.parameters()]
        gradients = torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)
        results.append({str(i): tensor.detach() for i, tensor in enumerate((*outputs, *gradients))})
    assert_close_to_twin(results[1], results[0])


def test_formulas_keep_the_gradient_of_a_fresh_state_at_a_cut() -> None:
    from fused_rnn import formulas
    from fused_rnn.settings import NOTHING_WITHIN, Controls

    layer = fused_rnn.GRU(3, 4, dtype=F64)
    settings = layer._settings()._replace(within=NOTHING_WITHIN._replace(bptt_steps=3, reset_state=True))
    x, h = torch.randn(6, 2, 3, dtype=F64), torch.randn(1, 2, 4, dtype=F64, requires_grad=True)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3, 0] = True
    output = formulas.run_stack(settings, x, None, None, [*layer.parameters(), h], Controls(reset=reset))[0]
    (gradient,) = torch.autograd.grad(output.sum(), h)
    assert gradient[0, 0].count_nonzero() == 4 and gradient[0, 1].count_nonzero() == 0


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_dropouts_draw_what_a_call_without_a_reset_draws(name: str, backend: str) -> None:
    torch.manual_seed(0)
    options = {"dropout": 0.4, "input_dropout": 0.3, "weight_dropout": 0.2}
    layer = getattr(fused_rnn, name)(5, 7, num_layers=3, dtype=F64, **options)
    x, reset = torch.randn(6, 4, 5, dtype=F64), torch.rand(6, 4) < 0.3

    def output(backend: str, **given: Any) -> dict[str, Tensor]:
        torch.manual_seed(3)
        with fused_rnn.use_backend(backend):
            return {"output": layer(x, **given)[0].detach()}

    assert_close_to_twin(output(backend, reset=torch.zeros_like(reset)), output(backend))
    assert_close_to_twin(output(backend, reset=reset), output("reference", reset=reset))
    with pytest.raises(AssertionError):
        assert_close_to_twin(output(backend, reset=reset), output(backend))


@pytest.mark.parametrize("cell", CELLS)
def test_autocast_casts_reset_state_as_hx(cell: str, backend: str) -> None:
    call = Call(Case(cell=cell, num_layers=2, hx=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_call(call)
        whole = run(call.build(), call.data()[0])
    assert {name: found[name].dtype for name in whole} == {name: tensor.dtype for name, tensor in whole.items()}
    assert found["grad(reset_h)"].dtype == torch.float32
    for name, expected in run_call(call).items():
        torch.testing.assert_close(found[name].float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("cell", CELLS)
def test_functions_take_them_too(cell: str, backend: str) -> None:
    call = Call(Case(cell=cell, num_layers=2, hx=True), counts="mask")
    module, (data, states) = call.build(), call.data()
    name, _, nonlinearity = cell.lower().partition("_")
    options = call.options(states) | {"num_layers": 2} | ({"nonlinearity": nonlinearity} if nonlinearity else {})
    expected = call.case.outputs(module(data.input, data.hx, **call.options(states)))
    for namespace in (fused_rnn.functional, fused_rnn.reference):
        found = call.case.outputs(getattr(namespace, name)(data.input, data.hx, list(module.parameters()), **options))
        assert_within(detached(found), {name: tensor.double() for name, tensor in detached(expected).items()})


def test_complex_numbers_run_by_the_formulas() -> None:
    layer = fused_rnn.RNN(3, 4, dtype=torch.complex64)
    x, reset = torch.randn(6, 2, 3, dtype=torch.complex64), torch.zeros(6, 2, dtype=torch.bool)
    reset[2] = True
    expected = torch.cat([layer(x[:2])[0], layer(x[2:])[0]])
    torch.testing.assert_close(layer(x, reset=reset)[0], expected)


@pytest.mark.kernels
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("counts", ["all", "mask"])
@pytest.mark.parametrize("cell", CELLS)
def test_more_threads(cell: str, counts: str, count: int, threads: None) -> None:
    from fused_rnn import _C

    case = Case(cell=cell, bidirectional=True, hx=True, batch=40, hidden_size=65, steps=30, input_size=70)
    call = Call(case, counts=counts)
    with fused_rnn.use_backend("fused"):
        expected = run_call(call)
        previous = _C.set_processors(8)
        try:
            torch.set_num_threads(count)
            found = run_call(call)
        finally:
            _C.set_processors(previous)
    assert_within(found, {name: tensor.double() for name, tensor in expected.items()})


def test_convert_and_repr_are_as_before() -> None:
    layer = fused_rnn.convert(nn.GRU(3, 4))
    layer(torch.randn(5, 2, 3), reset=torch.ones(5, 2, dtype=torch.bool))
    assert repr(layer) == "GRU(3, 4)" and type(fused_rnn.revert(layer)) is nn.GRU


# ---- cells --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_cells_step_from_the_fresh_state(cell: str, hx: bool, batch: int | None, has_state: bool, backend: str) -> None:
    case = CellCase(cell=cell, batch=batch, hx=hx, dtype=F64)
    module, twin = case.twins()
    data, other = case.data(), case.replace(hx=True).data(seed=8)
    reset = torch.tensor(True) if batch is None else torch.tensor([True, False, True, False])
    options: dict[str, Any] = {"reset": reset} | ({"reset_state": other.hx} if has_state else {})
    shape = case.replace(hx=True).state_shapes[0]
    old = data.states or [torch.zeros(shape, dtype=F64)] * len(other.states)
    anew = other.states if has_state else [torch.zeros(shape, dtype=F64)] * len(other.states)
    begin = tuple(torch.where(reset.unsqueeze(-1), fresh, before) for fresh, before in zip(anew, old, strict=True))
    expected = case.outputs(twin(data.input, begin if case.has_cell_state else begin[0]))
    states = other.states if has_state else ()
    right = with_gradients(twin, data, states, expected)
    assert_within(with_gradients(module, data, states, case.outputs(module(data.input, data.hx, **options))), right)
    name, _, nonlinearity = cell.lower().partition("_")
    also = {"nonlinearity": nonlinearity} if nonlinearity else {}
    for namespace in (fused_rnn.functional, fused_rnn.reference):
        function = getattr(namespace, f"{name}_cell")
        found = case.outputs(function(data.input, data.hx, *module.parameters(), **also, **options))
        assert_within(detached(found), {name: right[name] for name in found})


@pytest.mark.parametrize("cell", CELLS)
def test_a_loop_over_a_cell_is_a_layer(cell: str, backend: str) -> None:
    call = Call(Case(cell=cell, hx=True, dtype=F64))
    layer, (data, states) = call.build(), call.data()
    module = CellCase(cell=cell, dtype=F64).build(fused_rnn)
    module.load_state_dict({name.removesuffix("_l0"): tensor for name, tensor in layer.state_dict().items()})
    has_cell_state = call.case.has_cell_state
    state: Any = tuple(s[0] for s in data.states) if has_cell_state else data.states[0][0]
    anew: Any = tuple(s[0] for s in states) if has_cell_state else states[0][0]
    outputs = []
    for x, reset in zip(data.sequence, call.resets, strict=True):
        state = module(x, state, reset=reset, reset_state=anew)
        outputs.append(state[0] if has_cell_state else state)
    expected = layer(data.input, data.hx, **call.options(states))[0]
    assert_close_to_twin({"output": torch.stack(outputs).detach()}, {"output": expected.detach()})


@pytest.mark.parametrize("cell", CELLS)
def test_autocast_casts_reset_state_of_a_cell_as_hx(cell: str, backend: str) -> None:
    case = CellCase(cell=cell)
    module, data, other = case.build(fused_rnn), case.data(), case.data(seed=8)
    reset = torch.ones(4, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.outputs(module(data.input, data.hx, reset=reset, reset_state=other.hx))
        expected = case.outputs(module(data.input, other.hx))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


# ---- what else looks at calls -------------------------------------------------------------------------------------


class _Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", "") == "fused_rnn.functional":
            self.calls.append((function, dict(kwargs or {})))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", SOME[:4], ids=str)
def test_a_torch_function_mode_sees_them_as_keywords(call: Call, backend: str) -> None:
    module, (data, states) = call.build(), call.data()
    options = call.options(states)
    expected = detached(call.case.outputs(module(data.input, data.hx, **options)))
    with _Seen() as seen:
        found = detached(call.case.outputs(module(data.input, data.hx, **options)))
    ((function, keywords),) = seen.calls
    assert function.__name__ == call.case.cell.partition("_")[0].lower()
    assert keywords["reset"] is options["reset"] and keywords["reset_state"] is options["reset_state"]
    assert_same(found, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_a_torch_function_mode_sees_them_of_a_cell(cell: str, backend: str) -> None:
    case = CellCase(cell=cell)
    module, data, reset = case.build(fused_rnn), case.data(), torch.ones(4, dtype=torch.bool)
    with _Seen() as seen:
        module(data.input, data.hx, reset=reset)
    ((_, keywords),) = seen.calls
    assert keywords.pop("reset") is reset and "reset_state" not in keywords


def test_explain_counts_the_marks(backend: str) -> None:
    layer, x, reset = fused_rnn.GRU(3, 4), torch.zeros(10, 2, 3), torch.zeros(10, 2, dtype=torch.bool)
    reset[3] = True
    explained = fused_rnn.explain(layer, x, reset=reset)
    assert explained.reset_steps == 2 and explained.backend == backend
    assert "2 of 20 steps are marked in reset: rows begin anew there from zeros" in str(explained)
    state = torch.zeros(1, 2, 4, requires_grad=True)
    layer.requires_grad_(False)
    explained = fused_rnn.explain(layer, x, reset=reset, reset_state=state, lengths=torch.tensor([3, 4]))
    assert explained.training and explained.live_steps == 7
    assert "from reset_state" in str(explained)
    assert "reset" not in str(fused_rnn.explain(layer, x))
    cell = fused_rnn.LSTMCell(3, 4)
    assert "2 of 2 steps are marked" in str(fused_rnn.explain(cell, x[0], reset=reset[3]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair = (torch.zeros(1, 2, 4),) * 2
        explained = fused_rnn.explain(fused_rnn.LSTM(3, 4), x, reset=reset, reset_state=pair)
    assert explained.dtype == torch.bfloat16


@pytest.mark.parametrize("call", [*SOME[:5], SOME[6]], ids=str)
def test_diagnostics_take_rows_that_begin_anew(call: Call, backend: str) -> None:
    """The numbers of a call, and gradients of states that do not come from beyond a reset."""
    call = dataclasses.replace(call, case=call.case.replace(dtype=F64), recompute=False)
    module, (data, states) = call.build(), call.data()
    options = call.options(states)
    results = []

    def loss() -> Tensor:
        outputs = call.case.outputs(module(data.input, data.hx, **options))
        results.append(detached(outputs))
        return sum(output.square().sum() for output in outputs.values())

    loss()
    gradient_flow(module, loss)
    gate_statistics(module, loss)
    for found in results[1:]:
        assert_close_to_twin(found, results[0])

    layer = fused_rnn.LSTM(3, 4, dtype=F64)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3] = True
    x = torch.randn(6, 2, 3, dtype=F64)
    (flow,) = gradient_flow(layer, lambda: layer(x, reset=reset)[0][-1].sum())
    (whole,) = gradient_flow(layer, lambda: layer(x[3:])[0][-1].sum())
    assert flow.h[..., :3].count_nonzero() == 0 and flow.c is not None and flow.c[..., :3].count_nonzero() == 0
    torch.testing.assert_close(flow.h[..., 3:], whole.h)


# ---- errors -------------------------------------------------------------------------------------------------------

X = torch.zeros(5, 2, 3)
R = torch.zeros(5, 2, dtype=torch.bool)
H = torch.zeros(1, 2, 4)
PACKED = pack_padded_sequence(X, torch.tensor([5, 3]))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    ("input", "options", "error", "message"),
    [
        (X, {"reset": [True] * 5}, TypeError, "reset: expected a Tensor or None, got a list of 5"),
        (X, {"reset": R.float()}, RuntimeError, "reset: expected torch.bool, got torch.float32"),
        (X, {"reset": R.T}, RuntimeError, r"reset: expected \(5, 2\), \(T, B\), got \(2, 5\)"),
        (X, {"reset": R[:, 0]}, RuntimeError, r"reset: expected \(5, 2\), \(T, B\), got \(5,\)"),
        (X[:, 0], {"reset": R}, RuntimeError, r"reset: expected \(5,\), \(T\), got \(5, 2\)"),
        (X, {"reset": R.to("meta")}, RuntimeError, "reset: expected on cpu as the input is, got meta"),
        (PACKED, {"reset": R}, RuntimeError, "reset: expected None with packed data; pad it, torch.nn.utils.rnn.pad"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_wrong_marks_are_named(name: str, input: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        getattr(fused_rnn, name)(3, 4)(input, **options)


@pytest.mark.parametrize(
    ("name", "states", "error", "message"),
    [
        ("GRU", [0.0], TypeError, "reset_state: expected a Tensor or None, got a list of 1"),
        ("GRU", (H, H), TypeError, "reset_state: expected a Tensor or None, got a tuple of 2; only an LSTM"),
        ("LSTM", H, TypeError, r"reset_state: expected a tuple \(h_0, c_0\) of two Tensors or None, got a Tensor"),
        ("LSTM", (H,), RuntimeError, r"reset_state: expected a tuple \(h_0, c_0\) of two Tensors or None, got a tuple"),
        ("LSTM", (H, None), TypeError, r"reset_state\[1\]: expected a Tensor, got None"),
        ("RNN", H[0], RuntimeError, r"reset_state: expected \(1, 2, 4\), got \(2, 4\)"),
        ("LSTM", (H, H[..., :3]), RuntimeError, r"reset_state\[1\]: expected \(1, 2, 4\), got \(1, 2, 3\)"),
        ("GRU", H.double(), RuntimeError, "reset_state: expected torch.float32 as the input has, got torch.float64"),
        ("LSTM", (H, H.to("meta")), RuntimeError, r"reset_state\[1\]: expected on cpu as the input is, got meta"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_wrong_states_are_named(name: str, states: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        getattr(fused_rnn, name)(3, 4)(X, reset=R, reset_state=states)
    cell = getattr(fused_rnn, f"{name}Cell")(3, 4)
    of_cell = H if name == "RNN" else states  # of which each is wrong for a cell in the same way
    with pytest.raises(error, match=r"^reset_state"):
        cell(X[0], reset=R[0], reset_state=of_cell)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_states_without_marks_and_with_packed_data_are_refused(name: str) -> None:
    states = (H, H) if name == "LSTM" else H
    layer, cell = getattr(fused_rnn, name)(3, 4), getattr(fused_rnn, f"{name}Cell")(3, 4)
    message = "^reset_state: expected None without reset, which says where rows begin anew from it"
    with pytest.raises(RuntimeError, match=message):
        layer(X, reset_state=states)
    with pytest.raises(RuntimeError, match=message):
        cell(X[0], reset_state=states)
    with pytest.raises(RuntimeError, match="^reset_state: expected None with packed data"):
        layer(PACKED, reset_state=states)
    with pytest.raises(RuntimeError, match="^reset: expected None with packed data"):
        gradient_flow(layer, lambda: layer(PACKED, reset=R)[0].data.sum())
    function = getattr(fused_rnn.functional, name.lower())
    with pytest.raises(RuntimeError, match="^reset: expected None with packed data"):
        function(PACKED.data, None, list(layer.parameters()), batch_sizes=PACKED.batch_sizes, reset=R)


def test_wrong_marks_of_a_cell_are_named() -> None:
    cell = fused_rnn.GRUCell(3, 4)
    with pytest.raises(TypeError, match="^reset: expected a Tensor or None, got True"):
        cell(X[0], reset=True)
    with pytest.raises(RuntimeError, match="^reset: expected torch.bool, got torch.int64"):
        cell(X[0], reset=R[0].long())
    with pytest.raises(RuntimeError, match=r"^reset: expected \(2,\), \(B\), got \(5, 2\)"):
        cell(X[0], reset=R)
    with pytest.raises(RuntimeError, match=r"^reset: expected \(\), without a batch, got \(1,\)"):
        cell(X[0, 0], reset=R[0, :1])


def test_memory_that_is_gone_is_named() -> None:
    state = torch.zeros(1, 2, 4)
    state.untyped_storage().resize_(0)
    reset = torch.zeros(5, 2, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="^reset_state: expected a tensor with memory"):
        fused_rnn.GRU(3, 4)(X, reset=reset, reset_state=state)
    of_cell = torch.zeros(2, 4)
    of_cell.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"^reset_state\[1\]: expected a tensor with memory"):
        fused_rnn.LSTMCell(3, 4)(X[0], reset=reset[0], reset_state=(H[0], of_cell))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match="^reset_state: expected a tensor with memory"),
    ):
        fused_rnn.RNN(3, 4)(X, reset=reset, reset_state=state)
    reset.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="^reset: expected a tensor with memory"):
        fused_rnn.GRU(3, 4)(X, reset=reset)


def test_they_are_keywords_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        fused_rnn.GRUCell(3, 4)(X[0], None, R[0])
    with pytest.raises(TypeError, match="positional"):
        fused_rnn.LSTM(3, 4)(X, None, R)


# ---- from packed batches ------------------------------------------------------------------------------------------


def test_a_packed_batch_padded_gives_the_same(backend: str) -> None:
    layer = fused_rnn.GRU(3, 4, dtype=F64)
    packed = pack_padded_sequence(torch.randn(5, 2, 3, dtype=F64), torch.tensor([3, 5]), enforce_sorted=False)
    assert isinstance(packed, PackedSequence)
    expected, h_expected = layer(packed)
    x, lengths = nn.utils.rnn.pad_packed_sequence(packed)
    output, h_n = layer(x, lengths=lengths, reset=torch.zeros(5, 2, dtype=torch.bool))
    found = nn.utils.rnn.pack_padded_sequence(output, lengths, enforce_sorted=False)
    torch.testing.assert_close(found.data, expected.data)
    torch.testing.assert_close(h_n, h_expected)
