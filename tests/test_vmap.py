"""vmap over layers with masks, resets, packed batches and what is drawn at random: one call for all examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compare import assert_same, assert_within
from support.mutations import Recorder
from support.values import with_small_gains
from torch import Tensor
from torch.func import functional_call, grad, vjp, vmap
from torch.utils._pytree import tree_leaves

import fused_rnn
from fused_rnn import functional, ops
from fused_rnn.settings import Controls

pytestmark = pytest.mark.kernels

F64 = torch.float64
V, T, B, INPUT, HIDDEN = 3, 6, 4, 3, 4


def of_seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def real(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=of_seed(seed), dtype=F64)


def marks(rate: float, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=of_seed(seed)) < rate


def names(recorder: Recorder) -> list[str]:
    return [operator.overloadpacket.__name__ for operator, _ in recorder.calls]


def named(tensors: Any) -> dict[str, Tensor]:
    return {str(i): t for i, t in enumerate(tree_leaves(tensors))}


def build(cell: str, **options: Any) -> Any:
    torch.manual_seed(1)
    layer = getattr(fused_rnn, cell)(INPUT, HIDDEN, **({"num_layers": 2, "bidirectional": True} | options)).double()
    return with_small_gains(layer) if options.get("layer_norm") else layer


class Call:
    """A layer with what each of V examples is called with, by name, and the parameters."""

    def __init__(self, cell: str, *given: str, **options: Any) -> None:
        self.layer = build(cell, **options)
        states = 1 if cell != "LSTM" else 2
        cells = self.layer.num_layers * (2 if self.layer.bidirectional else 1)
        x, time = ((V, B, T, INPUT), (V, B, T)) if self.layer.batch_first else ((V, T, B, INPUT), (V, T, B))
        self.given: dict[str, Any] = {"x": real(*x, seed=2), "hx": real(V, states, cells, B, HIDDEN, seed=3)}
        if "mask" in given:
            self.given["mask"] = marks(0.7, *time, seed=4)
            self.given["mask"][0] = True
            self.given["mask"].movedim(1 if self.layer.batch_first else 2, 0)[1] = False  # a row without any step
        if "lengths" in given:
            self.given["lengths"] = torch.randint(0, T + 1, (V, B), generator=of_seed(5))
        if "reset" in given:
            self.given["reset"] = marks(0.3, *time, seed=6)
        if "reset_state" in given:
            self.given["reset_state"] = real(V, states, cells, B, HIDDEN, seed=7)
        if self.layer.proj_size:  # h and c of their own sizes
            for seed, (name, h, c) in enumerate((("hx", "h", "c"), ("reset_state", "anew_h", "anew_c"))):
                if self.given.pop(name, None) is not None:
                    self.given[h] = real(V, cells, B, self.layer.proj_size, seed=8 + seed)
                    self.given[c] = real(V, cells, B, HIDDEN, seed=10 + seed)
        self.returns_states = "return_states" in given
        self.parameters = {name: p.detach() for name, p in self.layer.named_parameters()}

    def __call__(self, parameters: dict[str, Tensor], given: dict[str, Any]) -> list[Tensor]:
        keywords = dict(given)
        for name, h, c in (("hx", "h", "c"), ("reset_state", "anew_h", "anew_c")):
            if h in keywords:
                keywords[name] = [keywords.pop(h), keywords.pop(c)]
        for name in {"hx", "reset_state"} & keywords.keys():
            state = keywords[name]
            keywords[name] = tuple(state) if len(state) == 2 else state[0]
        x, hx = keywords.pop("x"), keywords.pop("hx")
        if self.returns_states:
            keywords["return_states"] = True
        return tree_leaves(functional_call(self.layer, parameters, (x, hx), keywords))

    def batch(self, shared: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, int | None]]:
        """What vmap is called with, of which those in ``shared`` are of the first example, and in_dims."""
        dims = {name: None if name in shared else 0 for name in self.given}
        return {name: t[0] if name in shared else t for name, t in self.given.items()}, dims

    def gradients(self, wanted: str) -> Callable[..., Any]:
        """Of the parameters, or of the floats that an example is called with, or of both."""

        def found(parameters: dict[str, Tensor], given: dict[str, Any]) -> Any:
            floats = {name: t for name, t in given.items() if t.dtype == F64}
            others = {name: t for name, t in given.items() if t.dtype != F64}

            def loss(parameters: dict[str, Tensor], floats: dict[str, Tensor]) -> Tensor:
                return sum(t.sin().square().sum() for t in self(parameters, floats | others))

            argnums: Any = {"parameters": 0, "inputs": 1, "both": (0, 1)}[wanted]
            return grad(loss, argnums)(parameters, floats)

        return found

    def check(
        self, function: Callable[..., Any], expected_names: list[str] | None, shared: tuple[str, ...] = ()
    ) -> None:
        """The results of examples are those of a loop, and of these calls."""
        given, dims = self.batch(shared)
        with Recorder() as recorder:
            found = vmap(function, in_dims=(None, dims))(self.parameters, given)
        if expected_names is not None:
            assert names(recorder) == expected_names
        one_by_one = [
            function(self.parameters, {name: t if dims[name] is None else t[i] for name, t in given.items()})
            for i in range(V)
        ]
        stacked = [torch.stack(of_all) for of_all in zip(*map(tree_leaves, one_by_one), strict=True)]
        assert_within(named(found), named(stacked))


STEPS: list[tuple[str, ...]] = [
    ("mask",),
    ("lengths",),
    ("reset",),
    ("mask", "reset"),
    ("mask", "reset", "reset_state"),
    ("reset", "reset_state", "return_states"),
    ("lengths", "reset", "return_states"),
]


@pytest.mark.parametrize("given", STEPS, ids="-".join)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_examples_with_masks_and_marks_are_one_call(cell: str, given: tuple[str, ...]) -> None:
    call = Call(cell, *given)
    with torch.no_grad():
        for shared in ((), ("x", "hx"), given):
            call.check(call, ["rnn_forward"], tuple(name for name in shared if name in call.given))


@pytest.mark.parametrize("given", STEPS, ids="-".join)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_gradients_of_such_examples_are_two_calls(cell: str, given: tuple[str, ...]) -> None:
    call = Call(cell, *given, batch_first=cell == "GRU")
    call.check(call.gradients("both"), ["rnn_forward", "rnn_backward_each"])
    call.check(call.gradients("inputs"), ["rnn_forward", "rnn_backward"])
    shared = tuple(name for name in given if name in call.given)
    call.check(call.gradients("parameters"), ["rnn_forward", "rnn_backward_each"], shared)


OPTIONS: list[dict[str, Any]] = [
    {"num_heads": 2},
    {"recompute": True},
    {"recurrent_grad_clip": 0.01, "bidirectional": False},
    {"bptt_steps": 2, "bidirectional": False},
    {"bias": False},
    {"activation": "relu", "recurrent_activation": "hard_sigmoid"},
    {"coupled_gates": True, "cell_clip": 0.2},
]


@pytest.mark.parametrize("given", [(), ("reset", "reset_state")], ids="-".join)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_examples_of_layers_with_options(options: dict[str, Any], given: tuple[str, ...]) -> None:
    for cell in ("LSTM",) if "coupled_gates" in options else ("LSTM", "GRU"):
        call = Call(cell, *given, **options)
        call.check(call.gradients("both"), ["rnn_forward", "rnn_backward_each"])


MORE_PARAMETERS: list[dict[str, Any]] = [
    {"layer_norm": True},
    {"layer_norm": True, "recompute": True, "bias": False},
    {"layer_norm": True, "num_heads": 2},
    {"peephole": True},
    {"peephole": True, "cell_clip": 0.2, "zoneout_cell": 0.3},
    {"peephole": True, "layer_norm": True, "coupled_gates": True},
    {"proj_size": 2},
    {"proj_size": 2, "layer_norm": True, "bias": False, "zoneout": 0.2},
    {"proj_size": 3, "peephole": True, "recompute": True, "bidirectional": False, "recurrent_grad_clip": 0.01},
]


@pytest.mark.parametrize("given", [(), ("mask", "reset"), ("reset", "reset_state", "return_states")], ids="-".join)
@pytest.mark.parametrize("options", MORE_PARAMETERS, ids=str)
def test_gradients_of_examples_of_norms_peepholes_and_projections(
    options: dict[str, Any], given: tuple[str, ...]
) -> None:
    for cell in ("LSTM", "GRU", "RNN"):
        if cell == "LSTM" or options.keys() <= {"layer_norm", "recompute", "bias", "num_heads"}:
            call = Call(cell, *given, **options)
            call.layer.eval()  # zoneout takes means
            call.check(call.gradients("both"), ["rnn_forward", "rnn_backward_each"])


def test_each_wanted_parameter_alone() -> None:
    call = Call("LSTM", "reset", peephole=True, layer_norm=True, proj_size=2, num_layers=1)
    given, dims = call.batch()
    every = vmap(call.gradients("parameters"), (None, dims))(call.parameters, given)
    for name, value in call.parameters.items():
        others = {other: p for other, p in call.parameters.items() if other != name}

        def loss(p: Tensor, given: Any, name: str = name, others: Any = others) -> Tensor:
            return sum(t.sin().square().sum() for t in call({**others, name: p}, given))

        found = vmap(grad(loss), (None, dims))(value, given)
        assert_same([found], [every[name]])


@pytest.mark.parametrize("batch_sizes", [[4, 4, 2], [4, 3, 1, 1], [4]], ids=str)
@pytest.mark.parametrize("options", [{}, {"layer_norm": True, "peephole": True, "proj_size": 2}], ids=str)
def test_rows_of_a_packed_batch_as_examples(options: dict[str, Any], batch_sizes: list[int]) -> None:
    """They may end at different steps: zeros behind the ends of some."""
    layer = build("LSTM", **options)
    params, sizes = [p.detach() for p in layer.parameters()], torch.tensor(batch_sizes)
    settings, controls = layer._settings(), Controls(sizes)
    x = real(sum(batch_sizes), INPUT)
    state = [real(4, 4, size, seed=2) for size in (options.get("proj_size", HIDDEN), HIDDEN)]
    results = ops.forward_for_backward(settings, x, *state, params, controls)
    seeds = [real(*t.shape, seed=5 + i) for i, t in enumerate(results[:3])]

    def gradients(groups: int, results: Any = results, seeds: Any = seeds, x: Any = x, **of: Any) -> list[Tensor]:
        output, _, _, *saved = results
        given = (
            *seeds,
            None,
            None,
            x,
            *of.get("state", state),
            params,
            of.get("controls", controls).flatten(x),
            output,
        )
        needs = [False] * 3 + [True] * len(params)
        found: list[Tensor] = torch.ops.fused_rnn.rnn_backward_each(*given, *saved, *settings.flatten(), needs, groups)[
            3
        ]
        return found

    each = gradients(4)
    first = torch.tensor([0, *sizes.cumsum(0).tolist()[:-1]])
    expected: list[list[Tensor]] = []
    for row in range(4):
        places = [int(f) + row for f, size in zip(first, batch_sizes) if row < size]
        own_state = [s[:, row : row + 1] for s in state]
        own = Controls(torch.ones(len(places), dtype=torch.int64))
        found = ops.forward_for_backward(settings, x[places], *own_state, params, own)
        own_seeds = [seeds[0][places], *(s[:, row : row + 1] for s in seeds[1:])]
        expected.append([g[0] for g in gradients(1, found, own_seeds, x[places], state=own_state, controls=own)])
    stacked = [torch.stack(of_all) for of_all in zip(*expected, strict=True)]
    assert_within(named(each), named(stacked))
    of_two = [g.unflatten(0, (2, 2)).sum(0) for g in each]  # rows 0 and 2, 1 and 3
    assert_within(named(gradients(2)), named(of_two))
    with pytest.raises(RuntimeError, match="groups: expected a number that divides the batch of 4, got 3"):
        gradients(3)


def test_float32_and_an_indrnn() -> None:
    layer = fused_rnn.IndRNN(INPUT, HIDDEN, 2)
    x, mask = real(V, T, B, INPUT).float(), marks(0.6, V, T, B)
    own = {name: p.detach() for name, p in layer.named_parameters()}
    gradient = grad(lambda own, x, mask: functional_call(layer, own, (x,), {"mask": mask})[0].square().sum())
    with Recorder() as recorder:
        found = vmap(gradient, (None, 0, 0))(own, x, mask)
    assert names(recorder) == ["rnn_forward", "rnn_backward_each"]
    expected = [gradient(own, one, counts) for one, counts in zip(x, mask, strict=True)]
    assert_within(dict(found), {name: torch.stack([g[name] for g in expected]) for name in own})


@pytest.mark.parametrize("batch", [0, B])
def test_examples_without_any_step(batch: int) -> None:
    """All masked, or of no rows: gradients are zeros."""
    call = Call("LSTM", "mask", "reset", "reset_state")
    for name, dim in (("x", 2), ("hx", 3), ("mask", 2), ("reset", 2), ("reset_state", 3)):
        call.given[name] = call.given[name].narrow(dim, 0, batch)
    call.given["mask"] = torch.zeros_like(call.given["mask"])
    call.check(call.gradients("both"), ["rnn_forward", "rnn_backward_each"])


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_packed_batches_are_one_call(cell: str) -> None:
    layer, sizes = build(cell), torch.tensor([4, 3, 3, 1])
    data, parameters = real(V, 11, INPUT), [p.detach() for p in layer.parameters()]
    call = getattr(functional, cell.lower())

    def gradients(data: Tensor, *parameters: Tensor) -> Any:
        def loss(data: Tensor, *parameters: Tensor) -> Tensor:
            results = call(data, None, parameters, num_layers=2, bidirectional=True, batch_sizes=sizes)
            return sum(t.sin().square().sum() for t in tree_leaves(results))

        return grad(loss, tuple(range(1 + len(parameters))))(data, *parameters)

    with Recorder() as recorder:
        found = vmap(gradients, (0, *([None] * len(parameters))))(data, *parameters)
    assert names(recorder) == ["rnn_forward", "rnn_backward_each"]
    expected = [gradients(one, *parameters) for one in data]
    assert_within(named(found), named([torch.stack(of_all) for of_all in zip(*expected, strict=True)]))


@pytest.mark.parametrize("given", [("mask",), ("mask", "reset", "reset_state")], ids="-".join)
def test_rows_of_a_jacobian_are_a_call_for_each_pass(given: tuple[str, ...]) -> None:
    """The forward pass is over, of one example; what it saved is in the order of its own live steps."""
    call = Call("LSTM", *given)
    one = {name: t[0] for name, t in call.given.items()}
    x = one.pop("x")
    _, pullback = vjp(lambda x, parameters: call(parameters, {"x": x, **one})[0], x, call.parameters)
    seeds = real(5, T, B, 2 * HIDDEN)
    with Recorder() as recorder:
        found = vmap(pullback)(seeds)
    assert names(recorder) == ["rnn_forward", "rnn_backward_each"]
    expected = [tree_leaves(pullback(seed)) for seed in seeds]
    assert_within(named(found), named([torch.stack(of_all) for of_all in zip(*expected, strict=True)]))


def test_vmap_of_vmap() -> None:
    """Inputs of the outer one, masks of the inner one, states of both."""
    call = Call("GRU", "mask", "reset")
    x, h = real(2, T, B, INPUT), real(2, V, 1, 4, B, HIDDEN)

    def gradients(x: Tensor, h: Tensor, mask: Tensor, reset: Tensor) -> Any:
        return call.gradients("both")(call.parameters, {"x": x, "hx": h, "mask": mask, "reset": reset})

    mask, reset = call.given["mask"], call.given["reset"]
    with Recorder() as recorder:
        found = vmap(vmap(gradients, (None, 0, 0, 0)), (0, 0, None, None))(x, h, mask, reset)
    assert names(recorder) == ["rnn_forward", "rnn_backward_each"]
    expected = [[tree_leaves(gradients(x[i], h[i, j], mask[j], reset[j])) for j in range(V)] for i in range(2)]
    stacked = [torch.stack([torch.stack([e[k] for e in row]) for row in expected]) for k in range(len(expected[0][0]))]
    assert_within(named(found), named(stacked))


def test_second_derivatives_through_examples() -> None:
    call = Call("LSTM", "mask", num_layers=1)
    mask, hx = call.given["mask"], call.given["hx"][0]

    def inner(x: Tensor, mask: Tensor) -> Tensor:
        gradient = call.gradients("parameters")(call.parameters, {"x": x, "hx": hx, "mask": mask})
        return sum(g.square().sum() for g in gradient.values())

    found = grad(lambda x: vmap(inner)(x, mask).sum())(call.given["x"])
    expected = grad(lambda x: sum(inner(one, counts) for one, counts in zip(x, mask, strict=True)))(call.given["x"])
    assert_within({"x": found}, {"x": expected})


def test_gradients_of_examples_are_differentiable_by_plain_autograd() -> None:
    call = Call("GRU", "mask", "reset", "reset_state", num_layers=1)
    parameters = {name: p.clone().requires_grad_() for name, p in call.parameters.items()}
    given, dims = call.batch()
    gradients = call.gradients("both")

    def second(results: Any) -> Any:
        return torch.autograd.grad(sum(t.square().sum() for t in tree_leaves(results)), list(parameters.values()))

    found = second(vmap(gradients, (None, dims))(parameters, given))
    expected = second([gradients(parameters, {name: t[i] for name, t in given.items()}) for i in range(V)])
    assert_within(named(found), named(expected))


def test_compiled_gradients_of_examples() -> None:
    call = Call("GRU", "mask", "reset", num_layers=1)
    given, dims = call.batch()
    function = vmap(call.gradients("parameters"), (None, dims))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_within(named(compiled(call.parameters, given)), named(function(call.parameters, given)))


# ---- What is drawn at random ----------------------------------------------------------------------------------------

DRAWN: list[dict[str, Any]] = [
    {"dropout": 0.5},
    {"input_dropout": 0.5},
    {"recurrent_dropout": 0.5},
    {"zoneout": 0.5},
    {"zoneout": 0.4, "zoneout_cell": 0.5, "recurrent_dropout": 0.3, "dropout": 0.2, "input_dropout": 0.2},
]
DRAWS_OF_BITS = ("zoneout", "zoneout_cell")


def calls_of_forward(options: dict[str, Any]) -> list[str]:
    return ["draw_bits"] * sum(name in options for name in DRAWS_OF_BITS) + ["rnn_forward"]


@pytest.mark.parametrize("given", [(), ("mask", "reset")], ids="-".join)
@pytest.mark.parametrize("options", DRAWN, ids=str)
def test_what_is_drawn_for_each_example_is_one_call(options: dict[str, Any], given: tuple[str, ...]) -> None:
    call = Call("LSTM", *given, **options)
    examples, dims = call.batch()
    examples["x"] = examples["x"][:1].expand(V, T, B, INPUT)

    def run(function: Callable[..., Any] = call, randomness: str = "different") -> tuple[Any, Recorder]:
        torch.manual_seed(3)
        with Recorder() as recorder:
            found = vmap(function, in_dims=(None, dims), randomness=randomness)(call.parameters, examples)
        return found, recorder

    found, recorder = run()
    assert names(recorder) == calls_of_forward(options)
    assert_same(list(run()[0]), list(found))  # drawn by the seed
    assert not torch.equal(found[0][0], found[0][1])

    # Each example as a call with what was drawn for it.
    input, h0, c0, params, controls, *settings = recorder.calls[-1][1]

    def of_example(t: Tensor, dim: int, i: int) -> Tensor:
        return t if t.shape == (0,) else t.unflatten(dim, (-1, V)).select(dim + 1, i).contiguous()

    row_dims = Controls(0, 1, 2, 1, 1, 1, 1)
    for i in range(V):
        own = [of_example(t, dim, i) for t, dim in zip(controls, row_dims, strict=False)]
        states = (of_example(t, 1, i) for t in (h0, c0))
        output = torch.ops.fused_rnn.rnn_forward(of_example(input, 1, i), *states, params, own, *settings)[0]
        assert_within({"output": found[0][i]}, {"output": output})

    # Gradients, which are of the same draws: along a direction they are how the outputs change.
    gradients, recorder = run(call.gradients("parameters"))
    assert names(recorder) == [*calls_of_forward(options), "rnn_backward_each"]
    along = {name: real(*p.shape, seed=9) for name, p in call.parameters.items()}

    def losses(step: float) -> Tensor:
        moved = {name: p + step * along[name] for name, p in call.parameters.items()}
        torch.manual_seed(3)
        outputs = vmap(call, in_dims=(None, dims), randomness="different")(moved, examples)
        return sum(t.sin().square().flatten(1).sum(1) for t in outputs)

    slope = (losses(1e-6) - losses(-1e-6)) / 2e-6
    expected = sum((gradients[name] * along[name]).flatten(1).sum(1) for name in along)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [*DRAWN, {"weight_dropout": 0.5}], ids=str)
def test_the_same_draws_for_all_examples_are_those_of_a_call(options: dict[str, Any]) -> None:
    call = Call("LSTM", "mask", **options)
    examples, dims = call.batch()
    for function in (call, call.gradients("both")):
        torch.manual_seed(3)
        with Recorder() as recorder:
            found = vmap(function, in_dims=(None, dims), randomness="same")(call.parameters, examples)
        backward = [] if function is call else ["rnn_backward_each"]
        assert names(recorder) == calls_of_forward(options) + backward
        for i in range(V):
            torch.manual_seed(3)
            expected = function(call.parameters, {name: t[i] for name, t in examples.items()})
            assert_within(named([t[i] for t in tree_leaves(found)]), named(expected))


@pytest.mark.parametrize("options", [*DRAWN, {"weight_dropout": 0.5}], ids=str)
def test_randomness_is_an_error_where_vmap_says_so(options: dict[str, Any]) -> None:
    """As torch.nn.Dropout has it."""
    call = Call("LSTM", **options)
    examples, dims = call.batch()
    message = "called random operation while in randomness error mode"
    with pytest.raises(RuntimeError, match=message):
        vmap(torch.nn.Dropout(0.5))(examples["x"])
    with pytest.raises(RuntimeError, match=message):
        vmap(call, in_dims=(None, dims))(call.parameters, examples)


def test_weights_dropped_for_each_example_are_an_ensemble() -> None:
    call = Call("LSTM", weight_dropout=0.5)
    examples, dims = call.batch()
    with Recorder() as recorder:
        vmap(call.gradients("parameters"), in_dims=(None, dims), randomness="different")(call.parameters, examples)
    assert names(recorder) == ["rnn_forward_stacked", "rnn_backward_stacked"]


@pytest.mark.parametrize("units", [1, 8, 37])
def test_bits_of_several_seeds_are_those_of_each(units: int, isa: str) -> None:
    seeds = torch.tensor([5, -9, 2**62])
    found = ops.draw_bits(seeds, 6, 700, units, 0.4)
    assert_same([found], [torch.cat([ops.draw_bits(seed[None], 2, 700, units, 0.4) for seed in seeds])])
    with pytest.raises(RuntimeError, match="seed: expected one int64, or a number of them that divides the 5 entries"):
        ops.draw_bits(seeds, 5, 1, units, 0.4)
