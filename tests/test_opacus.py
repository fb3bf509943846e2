"""Differentially private training by Opacus: gradients per example are those of one example at a time."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from support.cases import CELLS, constructor_of
from support.compare import assert_within
from support.values import data, flat, with_small_gains
from test_docs import DOCS, run_page
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fused_rnn

opacus = pytest.importorskip("opacus", reason="opacus is not installed")

from opacus.validators import ModuleValidator  # noqa: E402
from opacus.validators.errors import UnsupportedModuleError  # noqa: E402

import fused_rnn.opacus  # noqa: E402

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # as for Opacus' own layers
    pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Optimal order"),
]

STEPS, BATCH, INPUT, HIDDEN = 6, 4, 5, 7


class Tagger(nn.Module):
    """Two uses of a layer's results: all outputs, and the states after the last step; from learned first states."""

    def __init__(self, cell: str, **options: Any) -> None:
        super().__init__()
        layer, keywords = constructor_of(fused_rnn, cell)
        self.recurrent = layer(INPUT, HIDDEN, **keywords, **options)

    def forward(self, x: Any, initial: tuple[Tensor, ...] = ()) -> Tensor:
        """Loss of each row, (B)."""
        hx = (initial if len(initial) > 1 else initial[0]) if initial else None
        output, states = self.recurrent(x, hx)
        if not isinstance(output, Tensor):
            output = nn.utils.rnn.pad_packed_sequence(output)[0]
        dim = 1 if self.recurrent.batch_first and isinstance(x, Tensor) else 0
        losses = [output.square().sum((dim, 2)), *(state.pow(3).sum((0, 2)) for state in flat(states))]
        return torch.stack(losses).sum(0)


def sampled(model: nn.Module, reduction: str = "sum", **options: Any) -> Any:
    return opacus.GradSampleModule(ModuleValidator.fix(model), loss_reduction=reduction, **options)


def grad_samples(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name.replace("_module.", ""): getattr(weight, "grad_sample", None) for name, weight in named}


def one_by_one(model: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    """By name, with a dimension for the examples in front."""
    named = dict(model.named_parameters())
    found = [torch.autograd.grad(loss, list(named.values()), allow_unused=True) for loss in losses]
    return {name: torch.stack([g[i] for g in found]) for i, name in enumerate(named)}


def without_parts(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names that weights have in a layer's state_dict."""
    return {name.rpartition(".")[2]: value for name, value in named.items()}


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("cell", CELLS)
def test_layers(cell: str, bidirectional: bool) -> None:
    for batch_first, opacus_batch_first, bias in itertools.product((False, True), (False, True), (False, True)):
        torch.manual_seed(0)
        options = {"num_layers": 2, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
        model = Tagger(cell, **options).double()
        private = sampled(model, batch_first=opacus_batch_first)
        x = data(*((BATCH, STEPS) if batch_first else (STEPS, BATCH)), INPUT)
        states = 2 if cell == "LSTM" else 1
        initial = [data(4 if bidirectional else 2, BATCH, HIDDEN, seed=9 + i).requires_grad_() for i in range(states)]
        losses = private(x, tuple(initial))
        losses.sum().backward()
        by_row = [
            model(x.narrow(0 if batch_first else 1, row, 1), tuple(s[:, row : row + 1] for s in initial))[0]
            for row in range(BATCH)
        ]
        assert_within({"loss": losses.detach()}, {"loss": torch.stack(by_row).detach()})
        expected = without_parts(one_by_one(model, by_row))
        assert_within(without_parts(grad_samples(private)), expected)
        # what goes back to those before, and the gradient of the batch, are there as well
        found = {f"state {i}": s.grad for i, s in enumerate(initial)}
        found |= without_parts({name: weight.grad for name, weight in private.named_parameters()})
        of_states = torch.autograd.grad(model(x, tuple(initial)).sum(), initial)
        of_batch = {f"state {i}": g for i, g in enumerate(of_states)} | {n: g.sum(0) for n, g in expected.items()}
        assert_within(found, of_batch)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"peephole": True, "cell_clip": 0.3}),
    ("LSTM", {"proj_size": 3, "coupled_gates": True}),
    ("LSTM", {"layer_norm": True, "proj_size": 3, "peephole": True, "recurrent_grad_clip": 0.05}),
    ("LSTM", {"layer_norm": True, "bias": False, "num_heads": 7}),
    ("GRU", {"layer_norm": True, "recurrent_activation": "hard_sigmoid"}),
    ("RNN_TANH", {"layer_norm": True, "nonlinearity": "softsign"}),
]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("cell", "options"), OPTIONS, ids=str)
def test_layers_with_options(cell: str, options: dict[str, Any], packed: bool) -> None:
    torch.manual_seed(0)
    model = Tagger(cell.partition("_")[0], num_layers=2, bidirectional=True, **options).double()
    if options.get("layer_norm"):
        with_small_gains(model)
    private, rows = (
        sampled(model),
        [data(length, INPUT, seed=length) for length in ((2, 6, 1, 4) if packed else [6] * 4)],
    )
    x = pack_sequence(rows, enforce_sorted=False) if packed else torch.stack(rows, 1)
    losses = private(x)
    losses.sum().backward()
    by_row = [model(x.unsqueeze(1))[0] for x in rows]
    assert_within({"loss": losses.detach()}, {"loss": torch.stack(by_row).detach()})
    assert_within(without_parts(grad_samples(private)), without_parts(one_by_one(model, by_row)))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_bfloat16_which_no_kernel_of_examples_takes(cell: str, packed: bool) -> None:
    """Products of the gradients of gates: to the rounding of that dtype."""
    torch.manual_seed(0)
    model = Tagger(cell, num_layers=2, bidirectional=True).bfloat16()
    x = data(STEPS, BATCH, INPUT).bfloat16()
    x = pack_sequence([x[: STEPS - row, row] for row in range(BATCH)]) if packed else x
    exact = copy.deepcopy(model).double()
    private, expected = sampled(model), sampled(exact)
    private(x).sum().backward()
    expected(x.double()).sum().backward()
    found = grad_samples(private)
    assert found and all(value.dtype is torch.bfloat16 for value in found.values())
    for name, value in grad_samples(expected).items():
        assert (found[name].double() - value).abs().max() <= 0.05 * value.abs().max()


@pytest.mark.parametrize("cell", CELLS)
def test_packed_rows_in_any_order(cell: str) -> None:
    torch.manual_seed(0)
    model = Tagger(cell, num_layers=2, bidirectional=True).double()
    rows = [data(length, INPUT, seed=length) for length in (2, 6, 1, 4)]
    initial = tuple(data(4, len(rows), HIDDEN, seed=9 + i) for i in range(2 if cell == "LSTM" else 1))
    private = sampled(model)
    losses = private(pack_sequence(rows, enforce_sorted=False), initial)
    losses.sum().backward()
    by_row = [model(x.unsqueeze(1), tuple(s[:, row : row + 1] for s in initial))[0] for row, x in enumerate(rows)]
    assert_within({"loss": losses.detach()}, {"loss": torch.stack(by_row).detach()})
    assert_within(without_parts(grad_samples(private)), without_parts(one_by_one(model, by_row)))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_dropout_between_layers_draws_the_numbers_of_the_layer(packed: bool) -> None:
    model = Tagger("GRU", num_layers=3, dropout=0.5, batch_first=True).double()
    private = sampled(model)
    x = data(BATCH, STEPS, INPUT)
    if packed:
        x = pack_sequence([x[row, : STEPS - row] for row in range(BATCH)])
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    assert_within({"loss": private(x).detach()}, {"loss": expected.detach()})


class Stepper(nn.Module):
    def __init__(self, cell: str, bias: bool) -> None:
        super().__init__()
        kind, keywords = constructor_of(fused_rnn, cell, "Cell")
        self.cell = kind(INPUT, HIDDEN, bias=bias, **keywords)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x:
            state = self.cell(step, state)
        return torch.stack([s.pow(3).sum(1) for s in flat(state)]).sum(0)


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"layer_norm": True, "peephole": True}], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["", "no bias"])
@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell: str, bias: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    options = {name: value for name, value in options.items() if name != "peephole" or cell == "LSTM"}
    model = Stepper(cell, bias).double()
    for name, value in options.items():
        setattr(model.cell, name, value)
    if options:
        with_small_gains(model)
    private = sampled(model)
    x = data(STEPS, BATCH, INPUT)
    private(x).sum().backward()
    by_row = [model(x[:, row : row + 1])[0] for row in range(BATCH)]
    assert_within(without_parts(grad_samples(private)), without_parts(one_by_one(model, by_row)))


def test_weights_that_are_not_trained_have_no_gradients() -> None:
    torch.manual_seed(0)
    model = Tagger("LSTM", num_layers=2).double()
    for name, weight in model.named_parameters():
        weight.requires_grad_("l1" in name and "bias" not in name)
    private = sampled(model)
    x = data(STEPS, BATCH, INPUT)
    private(x).sum().backward()
    found = {name: value for name, value in grad_samples(private).items() if value is not None}
    for weight in model.parameters():
        weight.requires_grad_()
    expected = without_parts(one_by_one(model, [model(x[:, row : row + 1])[0] for row in range(BATCH)]))
    assert sorted(without_parts(found)) == ["weight_hh_l1", "weight_ih_l1"]
    assert_within(without_parts(found), {name: expected[name] for name in without_parts(found)})


class Classifier(nn.Module):
    def __init__(self, library: Any, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, INPUT)
        self.recurrent = library.LSTM(INPUT, HIDDEN, num_layers=2, batch_first=True, **options)
        self.output = nn.Linear(HIDDEN, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.recurrent(self.embedding(tokens))[1][0][-1])


def train_privately(model: nn.Module, tokens: Tensor, labels: Tensor, **options: Any) -> list[dict[str, Tensor]]:
    """Three steps without noise: the weights after each, by the names of a state_dict."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, labels), batch_size=4)
    criterion = nn.CrossEntropyLoss()
    options |= {"module": model, "optimizer": optimizer, "data_loader": loader, "criterion": criterion}
    made = opacus.PrivacyEngine().make_private(**options, noise_multiplier=0.0, max_grad_norm=0.3)
    private, optimizer, *rest = made
    criterion = rest[0] if len(rest) > 1 else criterion  # of ghost clipping, which goes back twice
    after = []
    for _ in range(3):
        optimizer.zero_grad()
        criterion(private(tokens), labels).backward()
        optimizer.step()
        after.append({name.removeprefix("_module."): t.clone() for name, t in private.state_dict().items()})
    return after


def test_ghost_clipping_is_clipping() -> None:
    tokens, labels = torch.randint(20, (8, STEPS)), torch.randint(3, (8,))
    start = ModuleValidator.fix(Classifier(fused_rnn).double())
    expected = train_privately(copy.deepcopy(start), tokens, labels)
    found = train_privately(start, tokens, labels, grad_sample_mode="ghost")
    assert_within(found[-1], expected[-1])


def test_private_training_is_that_of_opacus_own_layers() -> None:
    tokens = torch.randint(20, (8, STEPS))
    labels = torch.randint(3, (8,))
    start = Classifier(nn).double()
    theirs = ModuleValidator.fix(start).double()
    assert type(theirs.recurrent).__name__ == "DPLSTM"
    ours = ModuleValidator.fix(fused_rnn.convert(start))
    assert not ModuleValidator.validate(ours)
    expected = train_privately(theirs, tokens, labels)
    for found, right in zip(train_privately(ours, tokens, labels), expected, strict=True):
        assert found.keys() == start.state_dict().keys()
        assert_within(found, {name: right[name] for name in found})
    start.load_state_dict(expected[-1], strict=False)
    ours.load_state_dict(start.state_dict())  # names are those of the layer that it was
    ours.eval()
    assert_within({"output": ours(tokens).detach()}, {"output": start(tokens).detach()})


def test_an_empty_batch_has_no_gradients() -> None:
    """As Poisson sampling draws now and then."""
    private = sampled(Tagger("GRU"))
    private(torch.zeros(STEPS, 0, INPUT)).sum().backward()
    assert all(value.shape[0] == 0 for value in grad_samples(private).values())


@pytest.mark.parametrize("options", [{"zoneout": 0.1}, {"recurrent_bias": False}, {"stateful": True}], ids=str)
def test_what_has_no_gradients_of_examples_is_refused_by_name(options: dict[str, Any]) -> None:
    layer = fused_rnn.LSTM(INPUT, HIDDEN, **options)
    (name,) = options
    for independent in (fused_rnn.IndRNN(INPUT, HIDDEN), fused_rnn.IndRNNCell(INPUT, HIDDEN)):
        assert isinstance(ModuleValidator.validate(independent)[0], UnsupportedModuleError)
    (error,) = ModuleValidator.validate(layer)
    assert isinstance(error, UnsupportedModuleError) and f"it has {name}=" in str(error)
    with pytest.raises(UnsupportedModuleError, match=f"it has {name}="):
        ModuleValidator.fix(layer)


def test_a_call_that_has_no_gradients_of_examples_is_refused_by_name() -> None:
    private = sampled(fused_rnn.GRU(INPUT, HIDDEN))
    x = torch.zeros(STEPS, BATCH, INPUT)
    for steps in ({"lengths": torch.ones(BATCH, dtype=torch.int64)}, {"return_states": True}):
        with pytest.raises(RuntimeError, match=f"^{next(iter(steps))}: expected "):
            private(x, **steps)
    with pytest.raises(RuntimeError, match="^input: expected a batch"):
        private(x[:, 0])
    with pytest.raises(RuntimeError, match="^autocast: expected none"), torch.autocast("cpu", torch.bfloat16):
        private(x)
    private = sampled(fused_rnn.GRU(INPUT, HIDDEN, layer_norm=True).bfloat16())
    with pytest.raises(
        RuntimeError, match=r"^input: expected float32 or float64 on the CPU .* got torch.bfloat16 on cpu"
    ):
        private(x.bfloat16())


def test_code_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = run_page(DOCS / "private-training.md", monkeypatch)
    name = "recurrent.weight_hh_l0"
    assert not torch.equal(page.model._module.state_dict()[name], page.Classifier().state_dict()[name])
    assert dict(page.model.named_parameters())["_module.recurrent.parts.0.weight_hh_l0"].grad is not None
