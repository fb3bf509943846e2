"""IndRNN against the paper's formula (Li, Li, Cook, Zhu and Gao 2018), written out here as a loop in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compare import assert_same, assert_within
from support.values import data
from torch import Tensor, fx, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import fused_rnn
from fused_rnn import formulas, functional, reference
from fused_rnn.settings import ACTIVATIONS, INDRNN_OPTIONS

F64 = torch.float64
T, B, INPUT, H = 6, 3, 4, 16

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": lambda x: x.clamp(min=0),
    "hard_sigmoid": lambda x: (x / 6 + 0.5).clamp(0, 1),
    "softsign": lambda x: x / (1 + x.abs()),
    "identity": lambda x: x,
}


def make(hidden_size: int = H, dtype: torch.dtype = F64, **keywords: Any) -> Any:
    torch.manual_seed(0)
    layer = fused_rnn.IndRNN(INPUT, hidden_size, dtype=dtype, **keywords)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("weight_hh"):
                parameter.sub_(0.4).mul_(1.5)  # weights of both signs
    return layer


def by_hand(
    layer: Any,
    x: Tensor,
    h_0: Tensor,
    *,
    live: Tensor | None = None,
    reset: Tensor | None = None,
    anew: Tensor | None = None,
    dropped: dict[str, Tensor] | None = None,
    read: Callable[[Tensor, int], Tensor] = lambda h, t: h,
    after: Callable[[Tensor, Tensor, int], Tensor] = lambda new, old, t: new,
) -> tuple[Tensor, Tensor]:
    """Output (T, B, D*H) and h_n (L*D, B, H).

    ``dropped``: weights in place of the layer's. ``read``: h as step t sees it. ``after``: what step t leaves.
    """
    activation, ends = FUNCTIONS[layer.nonlinearity], []
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    for k in range(layer.num_layers):
        sides = []
        for d, suffix in enumerate(directions):

            def weight(name: str, of_layer: str = f"_l{k}{suffix}") -> Tensor:
                return (dropped or {}).get(name + of_layer, getattr(layer, name + of_layer))

            w_ih, u = weight("weight_ih"), weight("weight_hh")
            b = weight("bias_ih") if layer.bias else 0
            index = k * len(directions) + d
            h, outputs = h_0[index], [x.new_zeros(())] * T
            for t in reversed(range(T)) if suffix else range(T):
                mark = t + 1 if suffix else t
                if reset is not None and mark < T:
                    h = torch.where(reset[mark, :, None], 0 if anew is None else anew[index], h)
                new = after(activation(x[t] @ w_ih.T + b + u * read(h, t)), h, t)
                counts = torch.ones(B, 1, dtype=torch.bool) if live is None else live[t, :, None]
                outputs[t] = torch.where(counts, new, 0)
                h = torch.where(counts, new, h)
            sides.append(torch.stack(outputs))
            ends.append(h)
        x = torch.cat(sides, dim=-1)
    return x, torch.stack(ends)


def check(layer: Any, call: Any = None, expected: Any = None, seed: int = 7, **steps: Any) -> None:
    """Output, h_n and all gradients of ``call(x, h_0)`` are those of ``expected(x, h_0)``."""
    call = call or layer
    expected = expected or (lambda x, h_0: by_hand(layer, x, h_0, **steps))
    D = 2 if layer.bidirectional else 1
    leaves = [data(T, B, INPUT).requires_grad_(), data(layer.num_layers * D, B, layer.hidden_size, seed=2)]
    leaves[1].requires_grad_()
    found = []
    for run in (call, expected):
        torch.manual_seed(seed)
        results = run(*leaves)
        incoming = [data(*t.shape, seed=4 + k) for k, t in enumerate(results)]
        gradients = torch.autograd.grad(results, [*leaves, *layer.parameters()], incoming)
        found.append((*results, *gradients))
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


# ---- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonlinearity", ACTIVATIONS)
@pytest.mark.parametrize("hidden_size", [16, 48, 7, 1])
def test_steps_are_those_of_the_paper(backend: str, nonlinearity: str, hidden_size: int) -> None:
    check(make(hidden_size, nonlinearity=nonlinearity))


@pytest.mark.parametrize("keywords", [{}, {"bias": False}, {"bidirectional": True}], ids=str)
def test_layers_above_each_other(backend: str, keywords: dict[str, Any]) -> None:
    check(make(num_layers=3, **keywords))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size", [16, 64, 20, 33])
def test_every_instruction_set(isa: str, hidden_size: int, dtype: torch.dtype) -> None:
    layer = make(hidden_size, dtype, num_layers=2, bidirectional=True, nonlinearity="tanh")
    results = []
    for module, cast in ((layer, dtype), (copy.deepcopy(layer).double(), F64)):
        x, h_0 = data(T, B, INPUT, dtype=dtype).to(cast), data(4, B, hidden_size, seed=2, dtype=dtype).to(cast)
        x.requires_grad_()
        output, h_n = module(x, h_0) if cast is dtype else by_hand(module, x, h_0)
        incoming = data(*output.shape, seed=3, dtype=dtype).to(cast)
        names = ["x", *(name for name, _ in module.named_parameters())]
        gradients = torch.autograd.grad(output, [x, *module.parameters()], incoming)
        results.append({"output": output, "h_n": h_n} | dict(zip(names, gradients, strict=True)))
        if dtype is F64:
            assert output.dtype is F64
    assert_within(*({key: t.detach() for key, t in found.items()} for found in results))


@pytest.mark.parametrize("hidden_size", [16, 5])
def test_it_is_an_rnn_with_a_head_for_each_unit_and_one_bias(backend: str, hidden_size: int) -> None:
    layer = make(hidden_size, num_layers=2)
    rnn = fused_rnn.RNN(
        INPUT, hidden_size, 2, nonlinearity="relu", num_heads=hidden_size, recurrent_bias=False, dtype=F64
    )
    rnn.load_state_dict({k: v.unsqueeze(1) if "weight_hh" in k else v for k, v in layer.state_dict().items()})
    assert_same(layer(data(T, B, INPUT)), rnn(data(T, B, INPUT)))


# ---- shapes of a call -----------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([4, T, 0])


@pytest.mark.parametrize("keywords", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_lengths_masks_and_resets(backend: str, keywords: dict[str, Any]) -> None:
    layer, marks, mask = make(**keywords), data(T, B, seed=8) > 0.5, data(T, B, seed=9) > 0
    until = torch.arange(T).unsqueeze(1) < LENGTHS
    check(layer, lambda x, h: layer(x, h, lengths=LENGTHS), live=until)
    check(layer, lambda x, h: layer(x, h, mask=mask), live=mask)
    check(layer, lambda x, h: layer(x, h, reset=marks), reset=marks)
    check(layer, lambda x, h: layer(x, h, mask=mask, reset=marks), reset=marks, live=mask)
    anew = data(*layer(data(T, B, INPUT))[1].shape, seed=10)
    check(layer, lambda x, h: layer(x, h, reset=marks, reset_state=anew), reset=marks, anew=anew)


def test_packed_batch_first_and_no_batch(backend: str) -> None:
    layer, x, h_0 = make(num_layers=2), data(T, B, INPUT), data(2, B, H, seed=2)
    expected, h_n = layer(x, h_0)
    output, last = layer(x[:, 0], h_0[:, 0])
    assert_close((output, last), (expected[:, 0], h_n[:, 0]))
    assert layer(x[:, :0])[0].shape == (T, 0, H)
    lengths = torch.tensor([2, T, 4])
    packed, last = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), h_0)
    padded, wanted = layer(x, h_0, lengths=lengths)
    assert_close(last, wanted)
    assert_close(nn.utils.rnn.pad_packed_sequence(packed)[0], padded)
    first = make(num_layers=2, batch_first=True)
    assert_close(first(x.transpose(0, 1), h_0), (expected.transpose(0, 1), h_n))


# ---- options --------------------------------------------------------------------------------------------------------


def test_zoneout(backend: str) -> None:
    layer = make(zoneout=0.3)
    torch.manual_seed(7)
    keeps = formulas.unpack_bits(functional._draw_bits(torch.zeros(1), (1, T * B), H, 0.3)[0], H).split(B)
    assert 0 < int(torch.stack(keeps).sum()) < T * B * H
    check(layer, after=lambda new, old, t: torch.where(keeps[t], old, new))
    check(layer.eval(), after=lambda new, old, t: 0.7 * new + 0.3 * old)


def test_recurrent_and_input_dropout(backend: str) -> None:
    torch.manual_seed(7)
    of_h = dropout(torch.ones(1, B, H, dtype=F64), 0.4)[0]
    layer = make(recurrent_dropout=0.4)
    check(layer, read=lambda h, t: h * of_h)
    check(layer.eval())
    torch.manual_seed(7)
    of_x = dropout(torch.ones(B, INPUT, dtype=F64), 0.4)
    layer = make(input_dropout=0.4)
    check(layer, expected=lambda x, h: by_hand(layer, x * of_x, h))
    for factors in (of_h, of_x):
        assert 0 < int((factors == 0).sum()) < factors.numel()


def test_weight_dropout_is_of_the_vectors(backend: str) -> None:
    layer = make(weight_dropout=0.5)
    torch.manual_seed(7)
    factors = dropout(torch.ones(H, dtype=F64), 0.5)
    assert 0 < int((factors == 0).sum()) < H
    check(layer, expected=lambda x, h: by_hand(layer, x, h, dropped={"weight_hh_l0": layer.weight_hh_l0 * factors}))


def test_recurrent_grad_clip(backend: str) -> None:
    clamped = []

    def read(h: Tensor, t: int) -> Tensor:
        if t == 0:
            return h
        h = h.clone()
        h.register_hook(lambda gradient: clamped.append((gradient.abs() > 0.3).double().mean()))
        h.register_hook(lambda gradient: gradient.clamp(-0.3, 0.3))
        return h

    check(make(recurrent_grad_clip=0.3, nonlinearity="tanh"), read=read)
    assert 0.05 < torch.stack(clamped).mean() < 0.95


def test_bptt_steps(backend: str) -> None:
    layer = make(bptt_steps=2)
    check(layer, read=lambda h, t: h.detach() if t > 0 and t % 2 == 0 else h)


def test_a_stateful_layer_goes_on_where_it_ended(backend: str) -> None:
    layer, whole, x = make(num_layers=2, stateful=True), make(num_layers=2), data(T, B, INPUT)
    parts = [layer(part)[0] for part in x.split([2, 4])]
    assert_close(torch.cat(parts), whole(x)[0])
    layer.reset_state()
    assert_same(layer(x)[0], whole(x)[0])


# ---- derivatives, compilers, modes ----------------------------------------------------------------------------------


def function_of(layer: Any, **steps: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, h: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        result: Any = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, h), steps)
        return result

    return call


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3, "recurrent_dropout": 0.3, "weight_dropout": 0.3}], ids=str)
def test_derivatives(backend: str, options: dict[str, Any]) -> None:
    layer = make(3, nonlinearity="tanh", num_layers=2, bidirectional=True, **options)
    call = function_of(layer, mask=torch.tensor([[True, True], [False, True], [True, False]]))
    arguments = [data(3, 2, INPUT), data(4, 2, 3, seed=2), *(p.detach().clone() for p in layer.parameters())]
    leaves = [t.requires_grad_() for t in arguments]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_forward_mode_and_vmap(backend: str) -> None:
    layer = make(num_layers=2, nonlinearity="tanh")
    call, x, h_0 = function_of(layer), data(T, B, INPUT), data(2, B, H, seed=2)
    values = [p.detach() for p in layer.parameters()]
    tangents = [data(*t.shape, seed=9) for t in (x, h_0, *values)]
    names = [name for name, _ in layer.named_parameters()]

    def expected(x: Tensor, h: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return by_hand(layer, x, h, dropped=dict(zip(names, values, strict=True)))

    found, wanted = (torch.func.jvp(f, (x, h_0, *values), tuple(tangents)) for f in (call, expected))
    assert_close(found, wanted)
    several = [torch.stack([value, 0.5 * value]) for value in values]
    outputs = torch.vmap(call, in_dims=(None, None, *[0] * len(several)))(x, h_0, *several)
    for k in range(2):
        assert_close((outputs[0][k], outputs[1][k]), call(x, h_0, *(value[k] for value in several)))


@pytest.mark.compiles
@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3, "stateful": True}], ids=str)
def test_torch_compile_has_it_in_one_graph(backend: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    results = []
    for compiles in (False, True):
        layer = make(num_layers=2, **options)
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiles else layer
        torch.manual_seed(3)
        output = run(data(2, B, INPUT))[0]
        results.append((output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))))
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


def test_autocast(backend: str) -> None:
    layer, x = make(dtype=torch.float32), data(T, B, INPUT, dtype=torch.float32)
    expected = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)[0]
    assert output.dtype is torch.bfloat16
    assert_close(output.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "options", [{}, {"zoneout": 0.2, "nonlinearity": "tanh"}, {"nonlinearity": "softsign"}], ids=str
)
def test_a_mode_sees_a_call_of_the_function(backend: str, options: dict[str, Any]) -> None:
    seen: list[Any] = []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__module__", "") == functional.__name__:
                seen.append((func, args[2], dict(kwargs)))
            return func(*args, **(kwargs or {}))

    layer, x = make(num_layers=2, **options), data(T, B, INPUT)
    torch.manual_seed(0)
    with Seen():
        result = layer(x)
    ((function, params, given),) = seen
    assert function is functional.indrnn and all(a is b for a, b in zip(params, layer.parameters(), strict=True))
    assert {"nonlinearity": "relu"} | given == {"nonlinearity": "relu", "num_layers": 2} | options | (
        {"training": True} if "zoneout" in options else {}
    )
    torch.manual_seed(0)
    assert_same(result, layer(x))


def test_a_traced_layer_trains_its_own_parameters() -> None:
    model, x = nn.Sequential(make(num_layers=2)), data(T, B, INPUT)
    traced = fx.symbolic_trace(model)
    assert functional.indrnn in {node.target for node in traced.graph.nodes}
    assert_same(traced(x), model(x))
    traced(x)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- functions ------------------------------------------------------------------------------------------------------


def test_functions(backend: str) -> None:
    options = {"zoneout": 0.2, "recurrent_dropout": 0.3, "bptt_steps": 4}
    layer, x = make(num_layers=2, bidirectional=False, nonlinearity="tanh", **options), data(T, B, INPUT)
    params = list(layer.parameters())
    for training in (True, False):
        for function in (functional.indrnn, reference.indrnn):
            torch.manual_seed(2)
            expected = layer.train(training)(x, lengths=LENGTHS)
            torch.manual_seed(2)
            given = {"nonlinearity": "tanh", "num_layers": 2, "training": training, "lengths": LENGTHS}
            assert_close(function(x, None, params, **given, **options), expected)
    without = make(bias=False, bidirectional=True)
    assert_same(functional.indrnn(x, None, list(without.parameters()), bias=False, bidirectional=True), without(x))


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_size", [400, 1])
def test_shapes_and_first_values(hidden_size: int) -> None:
    torch.manual_seed(0)
    layer = fused_rnn.IndRNN(INPUT, hidden_size, 2, bidirectional=True, recurrent_range=(0.9, 1.1))
    names = [f"{n}_l{k}{s}" for k in (0, 1) for s in ("", "_reverse") for n in ("weight_ih", "weight_hh", "bias_ih")]
    assert list(layer.state_dict()) == names == [n for n, _ in layer.named_parameters()]
    assert layer.all_weights == [[getattr(layer, n) for n in names[k : k + 3]] for k in range(0, 12, 3)]
    for name, value in layer.named_parameters():
        columns = (INPUT if "l0" in name else 2 * hidden_size,) if "weight_ih" in name else ()
        assert value.shape == (hidden_size, *columns) and value.requires_grad
        if "weight_hh" in name:
            assert 0.9 <= value.min() and value.max() <= 1.1
        else:
            assert value.abs().max() <= hidden_size**-0.5
        if hidden_size > 1:
            assert value.max() - value.min() > (0.18 if "weight_hh" in name else 0.09)
    torch.manual_seed(0)
    again = copy.deepcopy(layer)
    again.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))


def test_the_first_values_of_the_authors_are_from_0_to_1() -> None:
    u = fused_rnn.IndRNN(INPUT, 400).weight_hh_l0
    assert 0 <= u.min() < 0.02 and 0.98 < u.max() <= 1


def test_copies_state_dict_and_repr(backend: str) -> None:
    options = {"nonlinearity": "tanh", "recurrent_range": (0.5, 1.0), "zoneout": 0.2, "recurrent_grad_clip": 1.5}
    layer, x = make(num_layers=2, **options), data(T, B, INPUT)
    assert repr(layer) == (
        "IndRNN(4, 16, num_layers=2, nonlinearity='tanh', recurrent_range=(0.5, 1.0), zoneout=0.2, "
        "recurrent_grad_clip=1.5)"
    )
    assert repr(fused_rnn.IndRNN(4, 16)) == "IndRNN(4, 16)"
    other = fused_rnn.IndRNN(INPUT, H, 2, dtype=F64, **options)
    other.load_state_dict(layer.state_dict())
    results = []
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        torch.manual_seed(0)
        results.append(module(x))
        assert {name: getattr(module, name) for name in options} == options
    for result in results[1:]:
        assert_same(result, results[0])


def test_weights_that_were_assigned_and_parametrized(backend: str) -> None:
    layer, x = make(), data(T, B, INPUT)
    expected = by_hand(layer, x, torch.zeros(1, B, H, dtype=F64), dropped={"weight_hh_l0": layer.weight_hh_l0.tanh()})
    weights = layer._flat_weights
    assert weights[1] is layer.weight_hh_l0
    bounded = copy.deepcopy(layer)
    nn.utils.parametrize.register_parametrization(bounded, "weight_hh_l0", nn.Tanh())
    assert_close(bounded(x), expected)
    weights[1] = layer.weight_hh_l0.detach().tanh()
    assert_close(layer(x), expected)


# ---- insight, whole models, bad input -------------------------------------------------------------------------------


def test_explain_and_diagnostics() -> None:
    layer, x = make(num_layers=2, zoneout=0.2), data(T, B, INPUT)
    with fused_rnn.use_backend("reference"):
        assert fused_rnn.explain(layer, x).options == (
            "zoneout=0.2: bits are drawn first, the formulas keep the h of units by them",
            "weight_hh: the formulas take its 16 weights for as many heads of one unit",
        )
    layer = make()
    h, outputs = torch.zeros(B, H, dtype=F64), []
    for t in range(T):
        h = (x[t] @ layer.weight_ih_l0.T + layer.bias_ih_l0 + layer.weight_hh_l0 * h).clamp(min=0)
        outputs.append(h)
    wanted = torch.autograd.grad(torch.stack(outputs).square().sum(), outputs)
    (flow,) = fused_rnn.diagnostics.gradient_flow(layer, lambda: layer(x)[0].square().sum())
    assert_close(flow.h[0, 0], torch.stack([gradient.norm(dim=-1).mean() for gradient in wanted]))
    (gates,) = fused_rnn.diagnostics.gate_statistics(layer, lambda: layer(x))
    assert_close(gates.low["h"].item(), float((torch.stack(outputs) == 0).double().mean()))


@pytest.mark.kernels
def test_the_kernels_take_it() -> None:
    with fused_rnn.use_backend("fused"):
        explanation = fused_rnn.explain(make(), data(T, B, INPUT))
        assert explanation.backend == "fused"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_convert_revert_and_script() -> None:
    model = nn.Sequential(make())
    assert fused_rnn.convert(model)[0] is model[0] and type(model[0]) is fused_rnn.IndRNN
    with pytest.raises(ValueError, match="'0': torch.nn has no IndRNN"):
        fused_rnn.revert(model)
    with pytest.raises(RuntimeError, match=r"torch.jit.script: .*: torch.nn has no IndRNN"):
        torch.jit.script(model[0])


def test_attributes_are_read_and_set_and_checked() -> None:
    layer = make()
    layer.zoneout, layer.recurrent_grad_clip = 0.1, 2.0
    assert (layer.zoneout, layer.recurrent_grad_clip, layer.num_heads, layer.recurrent_bias) == (0.1, 2.0, H, False)
    layer.zoneout, layer.recurrent_grad_clip = 0.0, None
    assert layer._around.independent
    layer.num_heads, layer.recurrent_bias, layer.peephole = H, False, False  # what they are
    for name, value, message in (
        ("num_heads", 4, "num_heads: expected 16 for an IndRNN, got 4"),
        ("recurrent_bias", True, "recurrent_bias: expected False for an IndRNN, got True"),
        ("peephole", True, "peephole: expected False for an IndRNN, got True"),
        ("activation", "relu", "activation: expected 'tanh' for an IndRNN, got 'relu'"),
        ("zoneout", 2.0, "zoneout: expected a number from 0 to 1, got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            setattr(layer, name, value)


KNOWN = ", ".join(INDRNN_OPTIONS)
PAIR = r"recurrent_range: expected two numbers \(low, high\), got"
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(
        (
            {name: value},
            TypeError,
            f"{name}: unexpected keyword argument of an IndRNN, which has {', '.join(INDRNN_OPTIONS)}",
        )
        for name, value in (("num_heads", 2), ("recurrent_bias", True), ("peephole", True), ("init", "keras"))
    ),
    ({"proj_size": 2}, TypeError, "proj_size: unexpected keyword argument of an IndRNN"),
    ({"nonlinearity": "elu"}, ValueError, "nonlinearity: expected one of 'tanh', .* got 'elu'"),
    ({"recurrent_range": 1.0}, TypeError, rf"{PAIR} 1.0 \(float\)"),
    (
        {"recurrent_range": (0, 1, 2)},
        TypeError,
        f"{PAIR} a tuple of 3",
    ),
    (
        {"recurrent_range": (0, "1")},
        TypeError,
        f"{PAIR} a tuple of 2",
    ),
    (
        {"recurrent_range": (1.0, 0.5)},
        ValueError,
        "recurrent_range: expected finite numbers, the lower first",
    ),
    ({"recurrent_range": (0.0, float("nan"))}, ValueError, "recurrent_range: expected finite numbers, the lower first"),
    ({"hidden_size": 0}, ValueError, "hidden_size: expected at least 1, got 0"),
    ({"hidden_size": 2.0}, TypeError, r"hidden_size: expected an int, got 2.0 \(float\)"),
    ({"zoneout": 1.5}, ValueError, "zoneout: expected a number from 0 to 1, got 1.5"),
    ({"bidirectional": True, "stateful": True}, ValueError, "stateful: expected False with bidirectional=True"),
]


@pytest.mark.parametrize(("keywords", "error", "message"), REFUSED, ids=lambda v: str(v)[:60])
def test_the_constructor_refuses(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_rnn.IndRNN(**{"input_size": INPUT, "hidden_size": H} | keywords)


def test_calls_refuse() -> None:
    layer, x = make(), data(T, B, INPUT)
    params = list(layer.parameters())
    with pytest.raises(RuntimeError, match=r"weight_hh_l0: expected \(16,\), got \(16, 1\)"):
        functional.indrnn(x, None, [params[0], params[1].unsqueeze(1), params[2]])
    with pytest.raises(RuntimeError, match=r"params: expected 3 tensors \(weight_ih_l0, .*, bias_ih_l0\), got 2"):
        functional.indrnn(x, None, params[:2])
    with pytest.raises(TypeError, match="num_heads: unexpected keyword argument of this function"):
        functional.indrnn(x, None, params, num_heads=2)  # type: ignore[call-arg]
    with pytest.raises(RuntimeError, match=r"hx: expected \(1, 3, 16\), got \(3, 16\)"):
        layer(x, data(B, H))
    with pytest.raises(TypeError, match="only an LSTM takes a pair"):
        layer(x, (data(1, B, H), data(1, B, H)))
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        layer.load_state_dict(fused_rnn.RNN(INPUT, H, recurrent_bias=False).state_dict())
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"weight_hh_l0: expected \(16,\), got \(16, 16\)"):
        layer.weight_hh_l0 = nn.Parameter(torch.zeros(H, H, dtype=F64))
        layer(x)
