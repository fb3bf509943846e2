"""convert, revert and patch swap layers in place of torch.nn's and back without a trace; use_backend and explain."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, CellCase, run
from support.compare import assert_close_to_twin, assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fused_rnn

CONVERTIBLE = [
    *(Case(cell=cell, num_layers=2, bidirectional=True, batch_first=True, hx=True) for cell in CELLS),
    Case(proj=True, bias=False),
    Case("GRU", num_layers=3, dropout=0.25, dtype=torch.float64),
    *(CellCase(cell=cell) for cell in CELLS),
    CellCase("RNN_RELU", bias=False),
]


class Tagger(nn.Module):
    """A small model of several kinds of layers, for training before and after a conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.encoder = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.decoder = nn.ModuleDict({"gru": nn.GRU(16, 7, batch_first=True)})
        self.cell = nn.RNNCell(7, 5, nonlinearity="relu")
        self.head = nn.Linear(5, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.encoder(self.embedding(tokens))
        hidden, _ = self.decoder["gru"](hidden)
        state = None
        for step in hidden.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


def tagger(dtype: torch.dtype = torch.float64) -> Tagger:
    torch.manual_seed(0)
    return Tagger().to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Losses of some steps; the data and dropout of a step depend on its number alone."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        tokens = torch.randint(0, 11, (4, 6))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), tokens[:, 0])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- convert ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONVERTIBLE, ids=str)
def test_converted_module_keeps_parameters_options_and_results(case: Case | CellCase) -> None:
    original = case.build(nn)
    before = dict(original.named_parameters())
    expected_repr, expected_state = repr(original), copy.deepcopy(original.state_dict())
    torch.manual_seed(5)
    expected = run(original, case.data())
    fused = fused_rnn.convert(original)
    assert type(fused) is type(case.build(fused_rnn))
    after = dict(fused.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert repr(fused) == expected_repr
    assert_same(fused.state_dict(), expected_state)
    torch.manual_seed(5)
    assert_close_to_twin(run(fused, case.data()), expected)


@pytest.mark.parametrize("case", CONVERTIBLE, ids=str)
def test_revert_gives_torch_nn_back_with_the_same_parameters(case: Case | CellCase) -> None:
    original = case.build(nn)
    before, nn_type, expected_repr = dict(original.named_parameters()), type(original), repr(original)
    torch.manual_seed(5)
    expected = run(original, case.data())
    back = fused_rnn.revert(fused_rnn.convert(original))
    assert type(back) is nn_type
    assert repr(back) == expected_repr
    assert all(parameter is before[name] for name, parameter in back.named_parameters())
    torch.manual_seed(5)
    assert_same(run(back, case.data()), expected)


def test_every_layer_in_a_model_is_converted_and_nothing_else() -> None:
    model = tagger()
    others = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Embedding, nn.Linear))}
    result = fused_rnn.convert(model)
    assert result is model
    assert type(model.encoder) is fused_rnn.LSTM
    assert type(model.decoder["gru"]) is fused_rnn.GRU
    assert type(model.cell) is fused_rnn.RNNCell
    assert [name for name, _ in model.named_modules()] == [name for name, _ in tagger().named_modules()]
    assert all(dict(model.named_modules())[name] is module for name, module in others.items())


def test_conversion_out_of_place_leaves_the_model_alone() -> None:
    model = tagger()
    parameters = dict(model.named_parameters())
    fused = fused_rnn.convert(model, inplace=False)
    assert fused is not model
    assert type(model.encoder) is nn.LSTM
    assert type(fused.encoder) is fused_rnn.LSTM
    assert all(p is parameters[name] for name, p in model.named_parameters())
    back = fused_rnn.revert(fused, inplace=False)
    assert type(back.encoder) is nn.LSTM
    assert type(fused.encoder) is fused_rnn.LSTM
    assert_same(back.state_dict(), model.state_dict())


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.Adam])
def test_training_goes_on_after_convert_and_revert_as_if_nothing_had_happened(
    optimizer_type: type[torch.optim.Optimizer],
) -> None:
    twin, model = tagger(), tagger()
    twin_optimizer = optimizer_type(twin.parameters(), lr=0.05)
    # made before the conversion and never told of it
    optimizer = optimizer_type(model.parameters(), lr=0.05)
    expected = train(twin, twin_optimizer, range(15))
    losses = train(model, optimizer, range(5))
    assert fused_rnn.convert(model) is model
    losses += train(model, optimizer, range(5, 10))
    assert fused_rnn.revert(model) is model
    losses += train(model, optimizer, range(10, 15))
    # float64 losses of order 1: what remains is rounding, which fifteen steps of training magnify a little
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-9, atol=1e-9)
    assert expected[-1] != expected[0]


@pytest.mark.parametrize("there", [fused_rnn.convert, lambda model: fused_rnn.revert(fused_rnn.convert(model))])
def test_training_flag_frozen_parameters_and_gradients_survive(there: Any) -> None:
    model = tagger()
    model.encoder.eval()
    model.decoder["gru"].weight_hh_l0.requires_grad_(False)
    model(torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    there(model)
    assert model.training
    assert not model.encoder.training
    assert model.cell.training
    assert not model.decoder["gru"].weight_hh_l0.requires_grad
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())


def test_hooks_of_every_kind_survive_there_and_back() -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.GRU(3, 4))
    layer = model[0]
    layer.register_forward_pre_hook(lambda m, args: seen.append("forward_pre"))
    layer.register_forward_hook(lambda m, args, out: seen.append("forward"))
    layer.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    layer.register_full_backward_pre_hook(lambda m, go: seen.append("backward_pre"))
    layer.register_state_dict_post_hook(lambda m, state, prefix, meta: seen.append("state_dict"))
    layer.register_load_state_dict_post_hook(lambda m, keys: seen.append("load_state_dict"))
    layer.weight_hh_l0.register_hook(lambda g: seen.append("parameter"))

    def use() -> list[str]:
        seen.clear()
        output, _ = model(torch.zeros(2, 1, 3, requires_grad=True))
        output.sum().backward()
        model.load_state_dict(model.state_dict())
        return sorted(seen)

    expected = use()
    assert len(expected) == 7
    fused_rnn.convert(model)
    assert type(model[0]) is fused_rnn.GRU
    assert use() == expected
    fused_rnn.revert(model)
    assert use() == expected


def test_hook_handles_taken_before_the_conversion_still_remove() -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.LSTM(3, 4))
    handle = model[0].register_forward_hook(lambda m, args, out: seen.append("forward"))
    fused_rnn.convert(model)
    handle.remove()
    model(torch.zeros(2, 1, 3))
    assert seen == []


def test_attributes_set_by_hand_and_buffers_survive() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    model[0].note = "mine"
    model[0].register_buffer("scale", torch.ones(2))
    model[0].extra = nn.Linear(2, 2)
    for there in (fused_rnn.convert, fused_rnn.revert):
        there(model)
        assert model[0].note == "mine"
        assert "0.scale" in model.state_dict()
        assert isinstance(model[0].extra, nn.Linear)


def test_module_in_two_places_stays_one_module() -> None:
    shared = nn.GRU(4, 4)
    model = nn.ModuleDict({"first": shared, "second": nn.ModuleList([shared, nn.LSTM(4, 4)])})
    for there, expected in ((fused_rnn.convert, fused_rnn.GRU), (fused_rnn.revert, nn.GRU)):
        there(model)
        assert type(model["first"]) is expected
        assert model["first"] is model["second"][0]


def test_parameters_tied_between_layers_stay_tied() -> None:
    model = nn.ModuleList([nn.GRU(4, 4), nn.GRU(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    fused_rnn.convert(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    output = model[1](model[0](torch.ones(3, 2, 4))[0])[0]
    output.sum().backward()
    assert model[0].weight_hh_l0.grad is not None


def test_parametrized_layer_is_converted_right_or_left_alone_and_named() -> None:
    def parametrized() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.GRU(3, 4))
        parametrizations.weight_norm(model[0], "weight_hh_l0")
        return model

    sequence = torch.randn(5, 2, 3)
    expected = parametrized()(sequence)[0]
    model = parametrized()
    fused_rnn.convert(model)
    assert_close_to_twin({"output": model(sequence)[0]}, {"output": expected})
    assert any(name.endswith("original0") for name, _ in model.named_parameters())


def test_pruned_layer_keeps_its_mask() -> None:
    def pruned() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.LSTM(3, 4))
        prune.l1_unstructured(model[0], "weight_hh_l0", amount=0.5)
        return model

    sequence = torch.randn(5, 2, 3)
    expected, model = pruned()(sequence)[0], pruned()
    fused_rnn.convert(model)
    assert_close_to_twin({"output": model(sequence)[0]}, {"output": expected})
    assert "0.weight_hh_l0_mask" in model.state_dict()


class MyLSTM(nn.LSTM):
    """A subclass, whose own forward a conversion would lose."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return input.cumsum(0), hx


def test_subclass_is_left_alone_and_named_with_the_reason() -> None:
    model = nn.ModuleDict({"mine": MyLSTM(3, 4), "plain": nn.LSTM(3, 4)})
    with pytest.warns(UserWarning, match="mine.*MyLSTM|MyLSTM.*mine"):
        fused_rnn.convert(model)
    assert type(model["mine"]) is MyLSTM
    assert type(model["plain"]) is fused_rnn.LSTM


def test_converting_twice_or_nothing_is_harmless(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Sequential(nn.LSTM(3, 4), nn.Linear(2, 2))
    layer = fused_rnn.convert(model)[0]
    assert fused_rnn.convert(model)[0] is layer
    linear = nn.Linear(2, 2)
    assert fused_rnn.convert(linear) is linear
    assert fused_rnn.revert(linear) is linear
    assert not recwarn.list


def test_argument_that_is_no_module_is_refused() -> None:
    for function in (fused_rnn.convert, fused_rnn.revert):
        with pytest.raises(TypeError, match=r"^model: expected .*Module.*got"):
            function({"a": nn.LSTM(3, 4)})


class MyFused(fused_rnn.GRU):
    """A subclass of a fused layer: torch.nn has nothing to express it."""


def test_revert_refuses_by_name_what_torch_nn_cannot_express() -> None:
    model = nn.ModuleDict({"odd": MyFused(3, 4), "plain": fused_rnn.GRU(3, 4)})
    with pytest.raises((TypeError, ValueError, RuntimeError), match="odd"):
        fused_rnn.revert(model)
    # refused as a whole: nothing half done
    assert type(model["plain"]) is fused_rnn.GRU


def test_layers_born_fused_revert_to_torch_nn() -> None:
    case = Case("RNN_RELU", num_layers=2, bidirectional=True)
    model = nn.Sequential(case.build(fused_rnn))
    expected = run(case.build(nn), case.data())
    fused_rnn.revert(model)
    assert type(model[0]) is nn.RNN
    assert_same(run(model[0], case.data()), expected)


# ---- patch --------------------------------------------------------------------------------------------------------

PATCHED = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")


def test_patch_makes_torch_nn_mean_the_fused_layers_and_only_inside() -> None:
    originals = {name: getattr(nn, name) for name in PATCHED}
    with fused_rnn.patch():
        for name in PATCHED:
            assert getattr(nn, name) is getattr(fused_rnn, name)
            assert getattr(torch.nn, name) is getattr(fused_rnn, name)
        model = Tagger()
    assert type(model.encoder) is fused_rnn.LSTM
    assert {name: getattr(nn, name) for name in PATCHED} == originals


def test_patch_is_undone_after_an_error_and_may_be_nested() -> None:
    original = nn.LSTM
    with pytest.raises(KeyError), fused_rnn.patch():
        raise KeyError("x")
    assert nn.LSTM is original
    with fused_rnn.patch():
        with fused_rnn.patch():
            assert nn.LSTM is fused_rnn.LSTM
        assert nn.LSTM is fused_rnn.LSTM
    assert nn.LSTM is original


def test_model_built_under_patch_has_the_weights_of_the_plain_one() -> None:
    expected = tagger().state_dict()
    with fused_rnn.patch():
        found = tagger().state_dict()
    assert_same(found, expected)


def test_revert_and_convert_work_under_patch() -> None:
    model = tagger()
    nn_type = type(model.encoder)
    with fused_rnn.patch():
        fused_rnn.convert(model)
        assert type(model.encoder) is fused_rnn.LSTM
        fused_rnn.revert(model)
    assert type(model.encoder) is nn_type


# ---- use_backend --------------------------------------------------------------------------------------------------


@pytest.mark.kernels
def test_reference_and_fused_backends_give_the_same_numbers() -> None:
    case = Case(num_layers=2, bidirectional=True, packing="unsorted", hx=True)
    results = []
    for name in ("fused", "reference", "auto"):
        with fused_rnn.use_backend(name):
            results.append(run(case.build(fused_rnn), case.data()))
    assert_close_to_twin(results[0], results[1])
    assert_same(results[2], results[0])


@pytest.mark.kernels
def test_fused_backend_refuses_with_the_reason_what_kernels_do_not_take() -> None:
    layer = fused_rnn.GRU(3, 4, dtype=torch.complex64)
    sequence = torch.randn(5, 2, 3, dtype=torch.complex64)
    with fused_rnn.use_backend("auto"):
        assert layer(sequence)[0].dtype == torch.complex64
    with fused_rnn.use_backend("fused"), pytest.raises(RuntimeError, match="complex64"):
        layer(sequence)


def test_backend_of_a_block_ends_with_it_also_after_an_error() -> None:
    layer, sequence = fused_rnn.GRU(3, 4), torch.zeros(2, 1, 3)
    before = str(fused_rnn.explain(layer, sequence))
    with pytest.raises(KeyError), fused_rnn.use_backend("reference"):
        assert "reference" in str(fused_rnn.explain(layer, sequence))
        raise KeyError("x")
    assert str(fused_rnn.explain(layer, sequence)) == before


def test_backend_of_a_block_is_not_seen_by_other_threads() -> None:
    layer, sequence = fused_rnn.GRU(3, 4), torch.zeros(2, 1, 3)
    before = str(fused_rnn.explain(layer, sequence))
    seen = []
    with fused_rnn.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(str(fused_rnn.explain(layer, sequence))))
        thread.start()
        thread.join()
    assert seen == [before]


def test_backend_set_as_a_statement_holds_until_the_next() -> None:
    layer, sequence = fused_rnn.GRU(3, 4), torch.zeros(2, 1, 3)
    default = str(fused_rnn.explain(layer, sequence))
    try:
        fused_rnn.use_backend("reference")
        assert "reference" in str(fused_rnn.explain(layer, sequence))
        with fused_rnn.use_backend("auto"):
            pass
        assert "reference" in str(fused_rnn.explain(layer, sequence))
    finally:
        fused_rnn.use_backend("auto" if "reference" not in default else "reference")
    assert str(fused_rnn.explain(layer, sequence)) == default


# ---- explain ------------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("case", CONVERTIBLE[:6], ids=str)
def test_explain_says_which_kernels_run_and_computes_nothing(case: Case) -> None:
    from fused_rnn import _C

    module, data = case.build(fused_rnn), case.data()
    state = torch.random.get_rng_state()
    text = str(fused_rnn.explain(module, data.input, data.hx))
    assert "fused" in text
    assert _C.isa_used() in text
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "steps", "size"), [(1, 1, 8), (1, 100, 256), (64, 40, 512), (16, 40, 16)])
def test_explain_expects_no_less_than_the_bound(batch: int, steps: int, size: int, dtype: torch.dtype) -> None:
    for name in ("LSTM", "GRU", "RNN"):
        layer = getattr(fused_rnn, name)(size, size, num_layers=2, bidirectional=True, dtype=dtype)
        plan = fused_rnn.explain(layer, torch.zeros(steps, batch, size, dtype=dtype)).plan
        assert plan is not None
        for one in (plan, plan["backward"]):
            assert 0 < one["bound_us"] <= one["predicted_us"] <= one["serial_us"], (name, one)


@pytest.mark.kernels
def test_explain_counts_the_real_rows_of_a_packed_batch() -> None:
    layer, padded = fused_rnn.GRU(16, 16), torch.zeros(100, 8, 16)
    lengths = torch.tensor([100, 20, 20, 20, 20, 20, 10, 10])
    packed = nn.utils.rnn.pack_padded_sequence(padded, lengths)
    plans = [fused_rnn.explain(layer, x).plan for x in (padded, packed)]
    assert plans[0] is not None and plans[1] is not None
    assert plans[1]["bound_us"] == pytest.approx(plans[0]["bound_us"] * 220 / 800)


def test_explain_gives_the_reason_for_the_reference() -> None:
    layer = fused_rnn.LSTM(3, 4, dtype=torch.complex64)
    with fused_rnn.use_backend("auto"):
        text = str(fused_rnn.explain(layer, torch.zeros(2, 1, 3, dtype=torch.complex64)))
    assert "reference" in text
    assert "complex64" in text or "backend" in text


def test_explain_refuses_wrong_calls_as_the_call_does() -> None:
    with pytest.raises(RuntimeError, match="^input: "):
        fused_rnn.explain(fused_rnn.LSTM(3, 4), torch.zeros(2, 1, 7))
    with pytest.raises(TypeError, match=r"^module: expected .*got"):
        fused_rnn.explain(nn.Linear(3, 4), torch.zeros(2, 3))
