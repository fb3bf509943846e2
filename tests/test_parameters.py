"""Parameters are read anew at every call: whatever replaces, ties, parametrizes or rewrites them takes effect."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from support.cases import CELLS, Case, CellCase, run
from support.compare import assert_close_to_twin, assert_same
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

import fused_rnn

TWO_LAYERS = [Case(cell=cell, num_layers=2, bidirectional=True) for cell in CELLS]
STEPS = [CellCase(cell=cell) for cell in CELLS]


def _name_of_recurrent_weight(case: Case | CellCase) -> str:
    return "weight_hh" if isinstance(case, CellCase) else "weight_hh_l0"


# ---- changes that reach the next call -----------------------------------------------------------------------------


def _write_in_place(module: nn.Module, name: str) -> None:
    with torch.no_grad():
        getattr(module, name).mul_(0.5)


def _write_through_data(module: nn.Module, name: str) -> None:
    getattr(module, name).data.mul_(0.5)


def _copy_into_data(module: nn.Module, name: str) -> None:
    weight = getattr(module, name)
    weight.data.copy_(weight.detach() * 0.5)


def _give_new_data(module: nn.Module, name: str) -> None:
    weight = getattr(module, name)
    weight.data = weight.detach() * 0.5


def _write_through_numpy(module: nn.Module, name: str) -> None:
    pytest.importorskip("numpy")
    array = getattr(module, name).detach().numpy()
    array *= 0.5


def _write_through_storage(module: nn.Module, name: str) -> None:
    weight = getattr(module, name)
    values = weight.detach() * 0.5
    weight.untyped_storage().copy_(values.untyped_storage())


def _assign_parameter(module: nn.Module, name: str) -> None:
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * 0.5))


def _write_parameters_dict(module: nn.Module, name: str) -> None:
    module._parameters[name] = nn.Parameter(getattr(module, name).detach() * 0.5)


def _set_plain_tensor(module: nn.Module, name: str) -> None:
    values = getattr(module, name).detach() * 0.5
    delattr(module, name)
    setattr(module, name, values)


def _load_state_dict(module: nn.Module, name: str) -> None:
    module.load_state_dict({key: value * (0.5 if key == name else 1) for key, value in module.state_dict().items()})


def _load_state_dict_by_assignment(module: nn.Module, name: str) -> None:
    state = {key: value * (0.5 if key == name else 1) for key, value in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


CHANGES = [
    _write_in_place,
    _write_through_data,
    _copy_into_data,
    _give_new_data,
    _write_through_numpy,
    _write_through_storage,
    _assign_parameter,
    _write_parameters_dict,
    _set_plain_tensor,
    _load_state_dict,
    _load_state_dict_by_assignment,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", [*TWO_LAYERS, *STEPS], ids=str)
def test_changed_weight_is_used_by_the_next_call(
    case: Case | CellCase, change: Callable[[nn.Module, str], None]
) -> None:
    name = _name_of_recurrent_weight(case)
    module, twin = case.twins()
    data = case.data()
    # several calls before the change, with and without grad: whatever could be cached is
    for grad in (True, False, True):
        with torch.set_grad_enabled(grad):
            before = run(module, data, gradients=False)
    change(module, name)
    change(twin, name)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            after, expected = run(module, data, gradients=False), run(twin, data, gradients=False)
        assert_close_to_twin(after, expected)
    assert any(not torch.equal(after[key], before[key]) for key in after)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    ],
    ids=["sgd-fused", "adam-fused", "adamw-fused", "adagrad-fused", "adam-foreach"],
)
@pytest.mark.parametrize("case", [Case(num_layers=2), Case(cell="GRU"), CellCase()], ids=str)
def test_step_of_an_optimizer_is_seen_though_it_does_not_bump_versions(
    case: Case | CellCase, optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    module, twin = (m.double() for m in case.twins())
    results = []
    for layer in (module, twin):
        stepper, data = optimizer(layer.parameters()), case.data().to(torch.float64)
        for _ in range(4):
            stepper.zero_grad()
            outputs = case.outputs(layer(data.input, data.hx))
            sum(output.square().sum() for output in outputs.values()).backward()
            stepper.step()
        results.append(run(layer, data, gradients=False))
    # relative to float64's epsilon: the optimizers divide by square roots of small sums
    for name, tensor in results[1].items():
        torch.testing.assert_close(results[0][name], tensor, rtol=1e-9, atol=1e-11)


# ---- parameters that are functions of others ----------------------------------------------------------------------


@pytest.mark.parametrize("case", [*TWO_LAYERS, *STEPS], ids=str)
def test_functional_call_uses_the_given_parameters_and_differentiates_them(case: Case | CellCase) -> None:
    gradients = []
    for module in case.twins():
        given = {name: (p.detach() * 0.7).requires_grad_() for name, p in module.named_parameters()}
        data = case.data()
        outputs = case.outputs(functional_call(module, given, (data.input, data.hx)))
        sum(output.square().sum() for output in outputs.values()).backward()
        assert all(parameter.grad is None for parameter in module.parameters())
        gradients.append({name: value.grad for name, value in given.items()})
    assert_close_to_twin(*gradients)


@pytest.mark.parametrize("cell", CELLS)
def test_weight_norm_parametrization_trains_as_in_torch_nn(cell: str) -> None:
    # float64 also keeps ReLU on real values
    case = Case(cell=cell, dtype=torch.float64)
    results = []
    for module in case.twins():
        parametrizations.weight_norm(module, "weight_hh_l0")
        data = case.data()
        results.append(run(module, data))
    assert "grad(parametrizations.weight_hh_l0.original0)" in results[0]
    assert_close_to_twin(*results)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_old_weight_norm_that_sets_plain_tensors_works() -> None:
    case = Case(cell="GRU")
    results = []
    for module in case.twins():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(module, "weight_hh_l0")
        results.append(run(module, case.data()))
    assert "grad(weight_hh_l0_g)" in results[0]
    assert_close_to_twin(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_pruned_weight_is_masked_in_outputs_and_gradients(cell: str) -> None:
    case = Case(cell=cell, num_layers=2)
    results = []
    for module in case.twins():
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
        prune.ln_structured(module, "weight_ih_l1", amount=0.3, n=2, dim=1)
        results.append(run(module, case.data()))
    assert_close_to_twin(*results)
    assert (results[0]["grad(weight_hh_l0_orig)"] == 0).sum() >= module.weight_hh_l0.numel() // 2


@pytest.mark.parametrize("cell", CELLS)
def test_tied_weights_share_one_gradient(cell: str) -> None:
    case = Case(cell=cell, input_size=7, hidden_size=7, num_layers=2, dtype=torch.float64)
    results = []
    for module in case.twins():
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_hh_l0
        results.append(run(module, case.data()))
    assert "grad(weight_hh_l1)" not in results[0]
    assert_close_to_twin(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_non_contiguous_weights_and_expanded_biases_work(cell: str) -> None:
    case = Case(cell=cell)
    results = []
    for module in case.twins():
        for name, parameter in list(module.named_parameters()):
            values = parameter.detach()
            if values.dim() == 2:
                values = values.t().contiguous().t()
            else:
                values = values[:1].expand(values.shape)
            setattr(module, name, nn.Parameter(values))
        results.append(run(module, case.data()))
    assert_close_to_twin(*results)


# ---- inputs that are views ----------------------------------------------------------------------------------------


def _transposed(leaf: Tensor) -> Tensor:
    return leaf.transpose(0, 1)


def _every_other(leaf: Tensor) -> Tensor:
    return leaf[::2, :, ::2]


def _expanded(leaf: Tensor) -> Tensor:
    return leaf[:1, :1].expand(6, 4, leaf.shape[2])


def _flipped_storage(leaf: Tensor) -> Tensor:
    return leaf.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def _offset(leaf: Tensor) -> Tensor:
    return torch.cat([leaf.flatten()[:1], leaf.flatten()])[1:].view(leaf.shape)


@pytest.mark.parametrize("view", [_transposed, _every_other, _expanded, _flipped_storage, _offset])
@pytest.mark.parametrize("cell", CELLS)
def test_view_as_input_gives_the_gradient_of_its_base(cell: str, view: Callable[[Tensor], Tensor], isa: str) -> None:
    case = Case(cell=cell, input_size=8, num_layers=2)
    leaf = case.data().sequence
    case = case.replace(input_size=view(leaf).shape[-1])
    results = []
    for module in case.twins():
        output, _ = module(view(leaf))
        results.append({"output": output, "grad": torch.autograd.grad(output.square().sum(), leaf)[0]})
    assert_close_to_twin(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_views_as_states_give_the_gradient_of_their_base(cell: str, isa: str) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=True)
    base = torch.randn(case.hidden_size, case.batch, 4, requires_grad=True)
    # relu's exact data are integers
    values = base.detach().round().requires_grad_() if case.integers else base
    results = []
    for module in case.twins():
        state = values.permute(2, 1, 0)
        hx = (state, state[:, :1].expand_as(state)) if case.has_cell_state else state
        outputs = case.outputs(module(case.data().input, hx))
        outputs["grad"] = torch.autograd.grad(sum(x.square().sum() for x in outputs.values()), values)[0]
        results.append(outputs)
    assert_close_to_twin(*results)


# ---- copies -------------------------------------------------------------------------------------------------------


def _by_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def _by_torch_save(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _by_pickle, _by_torch_save])
@pytest.mark.parametrize("case", [*TWO_LAYERS, *STEPS], ids=str)
def test_copy_gives_the_same_bits_and_shares_nothing(
    case: Case | CellCase, copied: Callable[[nn.Module], nn.Module]
) -> None:
    module = case.build(fused_rnn)
    expected = run(module, case.data())
    twin = copied(module)
    assert type(twin) is type(module)
    assert repr(twin) == repr(module)
    assert_same(run(twin, case.data()), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(run(module, case.data()), expected)


@pytest.mark.parametrize("case", [*TWO_LAYERS, *STEPS], ids=str)
def test_state_dict_moves_both_ways_between_torch_nn_and_fused(case: Case | CellCase) -> None:
    fused, twin = case.build(fused_rnn, seed=0), case.build(nn, seed=5)
    expected = twin.state_dict()
    assert list(fused.state_dict()) == list(expected)
    fused.load_state_dict(expected)
    assert_same(fused.state_dict(), expected)
    back = case.build(nn, seed=9)
    back.load_state_dict(fused.state_dict())
    assert_same(back.state_dict(), expected)


def test_saved_state_dict_loads_with_weights_only() -> None:
    module = Case(num_layers=2, proj=True).build(fused_rnn)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=True), module.state_dict())
