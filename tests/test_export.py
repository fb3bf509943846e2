"""torch.export of layers and cells, and what AOTInductor compiles of it, run from Python and from C++."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support import compiled
from support.compare import assert_same
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated"),
]

SIZE, UNITS = 3, 4
ROOT = Path(__file__).parents[1]


class Model(nn.Module):
    """Layers of every kind, plain and with what the operators take besides, and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = fused_rnn.LSTM(SIZE, UNITS, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5)
        self.gru = fused_rnn.GRU(2 * UNITS, UNITS, batch_first=True, zoneout=0.1, layer_norm=True)
        self.rnn = fused_rnn.RNN(UNITS, UNITS, batch_first=True)
        self.independent = fused_rnn.IndRNN(UNITS, UNITS, batch_first=True)
        self.cell = fused_rnn.LSTMCell(UNITS, UNITS)

    def forward(self, x: Tensor, lengths: Tensor, mask: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
        output, states = self.lstm(x, (h, c), lengths=lengths)
        output, h_n, of_steps = self.gru(output, mask=mask, return_states=True)
        output, _ = self.rnn(output, reset=mask)
        output, _ = self.independent(output)
        return [output, *states, h_n, of_steps, *self.cell(output[:, -1], (h[0], c[0]))]


def arguments(batch: int = 2, steps: int = 5) -> tuple[Tensor, ...]:
    torch.manual_seed(batch)
    h, c = torch.randn(2, 4, batch, UNITS)
    lengths = torch.randint(0, steps + 1, (batch,))
    return torch.randn(batch, steps, SIZE), lengths, torch.rand(batch, steps) < 0.7, h, c


BATCH, TIME = Dim("batch"), Dim("time")
SHAPES = ({0: BATCH, 1: TIME}, {0: BATCH}, {0: BATCH, 1: TIME}, {1: BATCH}, {1: BATCH})
OTHER_SIZES = ((3, 7), (1, 1))


def export(model: nn.Module, args: tuple[Any, ...], shapes: Any, strict: bool = False) -> ExportedProgram:
    return torch.export.export(model, args, dynamic_shapes=shapes, strict=strict)


def calls(program: ExportedProgram) -> list[torch.fx.Node]:
    """Nodes that are calls of our operators."""
    nodes = program.graph.nodes
    return [n for n in nodes if n.op == "call_function" and getattr(n.target, "namespace", "") == "fused_rnn"]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_program_holds_for_every_batch_and_time(strict: bool) -> None:
    model = Model().eval()
    program = export(model, arguments(), SHAPES, strict)
    names = [node.target.overloadpacket.__name__ for node in calls(program)]
    assert names == ["rnn_forward"] * 4 + ["cell_forward"]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    run = torch.export.load(file).module()
    for sizes in ((2, 5), *OTHER_SIZES):
        with torch.no_grad():
            assert_same(run(*arguments(*sizes)), model(*arguments(*sizes)))


def test_no_list_is_empty_in_an_exported_program() -> None:
    """AOTInductor's runtime hands on None in place of one. Nor is anything saved for a backward pass."""
    for node in calls(export(Model().eval(), arguments(), SHAPES)):
        assert not any(isinstance(argument, (list, tuple)) and len(argument) == 0 for argument in node.args)
        assert node.args[-1] is False


def test_a_stateful_layer_is_refused_and_keeps_what_it_has() -> None:
    layer, x = fused_rnn.GRU(SIZE, UNITS, stateful=True), torch.randn(5, 2, SIZE)
    with pytest.raises(RuntimeError, match="^stateful: expected False in torch.export"):
        torch.export.export(layer, (x,))
    assert layer.carried_h is None and layer(x)[0].shape == (5, 2, UNITS)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = fused_rnn.LSTM(SIZE, UNITS, num_layers=2, bidirectional=True)

    def forward(self, data: Tensor, batch_sizes: Tensor, states: tuple[Tensor, Tensor] | None) -> Any:
        output, states = self.lstm(PackedSequence(data, batch_sizes), states)
        return output.data, states


def packed_arguments(lengths: list[int], with_states: bool) -> tuple[Any, ...]:
    data, batch_sizes, *_ = pack_padded_sequence(torch.randn(max(lengths), len(lengths), SIZE), torch.tensor(lengths))
    states = torch.randn(2, 4, len(lengths), UNITS)
    return data, batch_sizes, tuple(states) if with_states else None


@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_packed_input_is_exported(strict: bool, with_states: bool) -> None:
    """Its batch sizes are data: of a call without states not even the number of rows is known."""
    model = Packed().eval()
    rows: Any = ({1: BATCH}, {1: BATCH}) if with_states else None
    shapes = ({0: Dim("rows")}, {0: TIME}, rows)
    program = export(model, packed_arguments([5, 3, 1], with_states), shapes, strict)
    for lengths in ([5, 3, 1], [7, 7, 2, 2]):
        args = packed_arguments(lengths, with_states)
        with torch.no_grad():
            assert_same(program.module()(*args), model(*args))


# ---- AOTInductor -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, str]:
    model = Model().eval()
    path = str(tmp_path_factory.mktemp("aoti") / "model.pt2")
    return model, torch._inductor.aoti_compile_and_package(export(model, arguments(), SHAPES), package_path=path)


NEEDS_COMPILER = pytest.mark.skipif(shutil.which(compiled.COMPILER[0]) is None, reason="there is no C++ compiler")


@NEEDS_COMPILER
@pytest.mark.compiles
def test_a_package_runs_from_python(package: tuple[nn.Module, str]) -> None:
    model, path = package
    run = torch._inductor.aoti_load_package(path)
    for sizes in OTHER_SIZES:
        with torch.no_grad():
            assert_same(run(*arguments(*sizes)), model(*arguments(*sizes)))


@NEEDS_COMPILER
@pytest.mark.compiles
def test_a_package_runs_in_a_program_without_python(package: tuple[nn.Module, str], tmp_path: Path) -> None:
    from fused_rnn import ops

    model, path = package
    torch_folder = Path(torch.__file__).parent
    library = Path(ops.extension_path()).parent / "libfused_rnn.so"
    source = ROOT / "examples" / "cpp" / "run_package.cpp"
    flags = ["-std=c++20", "-O0", f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    flags += [f"-Wl,-rpath,{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
    (program,) = compiled.make(
        [compiled.Step(compiled.BUILD / "run_package", (*compiled.COMPILER, str(source), *flags))]
    )
    args = arguments(3, 7)
    inputs = [tmp_path / f"{i}.pt" for i in range(len(args))]
    for file, tensor in zip(inputs, args, strict=True):
        torch.save(tensor, file)
    result = tmp_path / "output.pt"
    done = subprocess.run([program, library, path, result, *inputs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    linked = subprocess.run(["ldd", program, library], capture_output=True, text=True, check=True).stdout
    assert "libpython" not in linked and "libtorch_python" not in linked
    with torch.no_grad():
        assert_same(list(torch.load(result)), model(*args))
