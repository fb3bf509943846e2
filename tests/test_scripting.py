"""torch.jit.script takes torch.nn's modules for the fused ones: the file needs nothing of ours where it is loaded."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.cases import CELLS, Case, CellCase
from support.compare import assert_close_to_twin, assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore:LSTM with projections")

CASES = [
    *(Case(cell=cell, num_layers=2, bidirectional=True, batch_first=True) for cell in CELLS),
    Case(proj=True, bias=False),
    *(CellCase(cell=cell) for cell in CELLS),
]


class Around(nn.Module):
    """TorchScript compiles a layer of torch.nn for what its caller passes: by itself it has no forward there."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sequence: Tensor):  # the layers differ in what they return, so nothing is declared here
        return self.layer(sequence)


class Tagger(nn.Module):
    """Layers and a cell at several depths, one module in two places, states handed over by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = fused_rnn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5)
        self.decoders = nn.ModuleList([fused_rnn.GRU(8, 8, batch_first=True)])
        self.by_name = nn.ModuleDict({"rnn": fused_rnn.RNN(8, 8, batch_first=True)})
        self.again = self.by_name
        self.cell = fused_rnn.LSTMCell(8, 5)

    def forward(self, sequence: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden, states = self.encoder(sequence, states)
        for decoder in self.decoders:
            hidden, _ = decoder(hidden)
        hidden, _ = self.by_name["rnn"](hidden)
        hidden, _ = self.again["rnn"](hidden)
        return self.cell(hidden[:, -1])[0], states


def arguments() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return torch.randn(2, 5, 3), (torch.randn(4, 2, 4), torch.randn(4, 2, 4))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scripted_module_gives_the_numbers_of_torch_nn(case: Case | CellCase) -> None:
    module, twin = case.twins()
    sequence = case.data().sequence.detach()
    found = case.outputs(torch.jit.script(Around(module))(sequence))
    assert_same(found, case.outputs(twin(sequence)))
    assert_close_to_twin(found, case.outputs(module(sequence)))


def test_module_that_is_scripted_by_itself_stays_what_it_is() -> None:
    cell, given = fused_rnn.GRUCell(3, 4), torch.randn(2, 3)
    torch.testing.assert_close(torch.jit.script(cell)(given), cell(given))
    assert type(cell) is fused_rnn.GRUCell


def test_scripted_module_holds_the_very_parameters() -> None:
    model = Tagger()
    before = dict(model.named_parameters())
    scripted = torch.jit.script(model)
    after = dict(scripted.named_parameters())
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    scripted(*arguments())[0].sum().backward()
    assert all(parameter.grad is not None for name, parameter in before.items() if "_reverse" not in name)


def test_model_that_was_scripted_has_torch_nn_in_it_and_convert_brings_the_fused_ones_back() -> None:
    model = Tagger().eval()
    parameters, given = dict(model.named_parameters()), arguments()
    expected = model(*given)[0]
    torch.jit.script(model)
    assert type(model.encoder) is nn.LSTM
    assert type(model.decoders[0]) is nn.GRU
    assert type(model.cell) is nn.LSTMCell
    assert not model.encoder.training
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    torch.testing.assert_close(model(*given)[0], expected)
    fused_rnn.convert(model)
    assert type(model.encoder) is fused_rnn.LSTM
    assert torch.equal(model(*given)[0], expected)


def test_log_says_what_scripting_put_into_the_model(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="fused_rnn"):
        torch.jit.script(nn.Sequential(fused_rnn.LSTMCell(3, 4)))
    assert "torch.jit.script takes torch.nn's LSTMCell(3, 4)" in caplog.text
    assert "fused_rnn.convert" in caplog.text


def test_hooks_and_attributes_of_the_layer_stay_with_what_takes_its_place() -> None:
    seen: list[str] = []
    model = nn.Sequential(fused_rnn.GRU(3, 4))
    handle = model[0].register_full_backward_hook(lambda module, before, after: seen.append("backward"))
    model[0].note = "mine"
    torch.jit.script(model)
    sequence = torch.randn(5, 2, 3, requires_grad=True)
    model(sequence)[0].sum().backward()
    assert (seen, model[0].note) == (["backward"], "mine")
    handle.remove()
    model(sequence)[0].sum().backward()
    assert seen == ["backward"]


def test_training_flag_and_dropout_are_those_of_the_layer() -> None:
    layer = fused_rnn.LSTM(3, 4, num_layers=2, dropout=0.5)
    sequence = torch.randn(5, 2, 3)
    scripted = torch.jit.script(Around(layer))
    results = []
    for module in (scripted, layer):
        torch.manual_seed(1)
        results.append(module(sequence)[0])
    torch.testing.assert_close(*results)
    scripted.eval()
    assert torch.equal(scripted(sequence)[0], scripted(sequence)[0])
    assert layer.training
    layer.eval()
    assert torch.equal(torch.jit.script(Around(layer))(sequence)[0], scripted(sequence)[0])


def test_tied_parameters_stay_tied_in_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(fused_rnn.GRUCell(4, 4), fused_rnn.GRUCell(4, 4))
    model[1].weight_hh = model[0].weight_hh
    path = tmp_path / "model.pt"
    torch.jit.script(model).save(path)
    loaded = dict(torch.jit.load(path).named_parameters(remove_duplicate=False))
    assert loaded["0.weight_hh"].data_ptr() == loaded["1.weight_hh"].data_ptr()


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = fused_rnn.LSTM(3, 4, bidirectional=True)

    def forward(self, padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
        output, (h_n, _) = self.layer(packed)
        return pad_packed_sequence(output)[0], h_n


def test_packed_sequences_work_in_a_scripted_model() -> None:
    model, padded, lengths = Packed(), torch.randn(5, 3, 3), torch.tensor([2, 5, 1])
    expected = model(padded, lengths)
    found = torch.jit.script(model)(padded, lengths)
    assert_close_to_twin(dict(zip("on", found, strict=True)), dict(zip("on", expected, strict=True)))


def test_recompute_which_changes_no_numbers_is_taken() -> None:
    layer = fused_rnn.GRU(3, 4, recompute=True)
    sequence = torch.randn(5, 2, 3)
    torch.testing.assert_close(torch.jit.script(Around(layer))(sequence)[0], layer(sequence)[0])
    assert layer.recompute


def test_weights_assigned_past_the_parameters_are_scripted() -> None:
    layer, sequence = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    layer._flat_weights[1] = layer.weight_hh_l0.detach() * 2
    expected = layer(sequence)[0]
    torch.testing.assert_close(torch.jit.script(Around(layer))(sequence)[0], expected)
    assert torch.equal(layer(sequence)[0], expected)


@pytest.fixture
def _patched() -> Iterator[None]:
    fused_rnn.patch()
    yield
    fused_rnn.unpatch()


@pytest.mark.usefixtures("_patched")
def test_scripting_works_while_torch_nn_is_patched() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    sequence = torch.randn(5, 2, 3)
    expected = model(sequence)[0]
    torch.testing.assert_close(torch.jit.script(model)(sequence)[0], expected)


BLOCKED = """
    import sys, torch

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "fused_rnn":
                raise ImportError(name)

    sys.meta_path.insert(0, Blocked())
    torch.set_num_threads(1)
    module = torch.jit.load(sys.argv[1])
    given = torch.load(sys.argv[2])
    torch.save(module(*given), sys.argv[3])
    assert not any(name.partition(".")[0] == "fused_rnn" for name in sys.modules)
"""


@pytest.mark.slow
def test_saved_file_loads_where_fused_rnn_is_not_installed(tmp_path: Path) -> None:
    model, given = Tagger().eval(), arguments()
    expected = model(*given)
    paths = [str(tmp_path / name) for name in ("model.pt", "given.pt", "results.pt")]
    torch.jit.script(copy.deepcopy(model)).save(paths[0])
    torch.save(given, paths[1])
    program = textwrap.dedent(BLOCKED)
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(paths[2])
    torch.testing.assert_close(found, expected)


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_parametrized_layer_is_refused_with_the_way_out() -> None:
    model = nn.Sequential(fused_rnn.GRU(3, 4))
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    with pytest.raises(RuntimeError, match=r"GRU\((.|\n)*weight_hh_l0.*remove_parametrizations"):
        torch.jit.script(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    sequence = torch.randn(5, 2, 3)
    torch.testing.assert_close(torch.jit.script(model)(sequence)[0], model(sequence)[0])


class Renamed(fused_rnn.GRU):
    """A subclass without a forward of its own."""


class Own(fused_rnn.GRUCell):
    def forward(self, input: Tensor, hx: Tensor) -> Tensor:
        return torch.tanh(input @ self.weight_ih.t()[:, :4] + hx)


def test_subclass_is_refused_with_the_reason_unless_it_has_a_forward_of_its_own() -> None:
    with pytest.raises(RuntimeError, match=r"torch.jit.script.*Renamed\(3, 4\).*subclass of a fused_rnn module"):
        torch.jit.script(Renamed(3, 4))
    cell, step = Own(3, 4), (torch.randn(2, 3), torch.randn(2, 4))
    assert torch.equal(torch.jit.script(cell)(*step), cell(*step))


def test_forward_replaced_on_the_object_is_refused_with_the_reason() -> None:
    layer = fused_rnn.GRU(3, 4)
    layer.forward = lambda *given: None
    with pytest.raises(RuntimeError, match="its forward was replaced on the object"):
        torch.jit.script(layer)


def test_class_that_torch_nn_has_no_counterpart_of_says_so() -> None:
    new = type("Minimal", (fused_rnn.GRU,), {"__module__": "fused_rnn.layers"})
    for function in (torch.jit.script, fused_rnn.revert):
        with pytest.raises((RuntimeError, ValueError), match="torch.nn has no Minimal"):
            function(nn.Sequential(new(3, 4)))
