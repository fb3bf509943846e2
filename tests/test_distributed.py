"""Layers in PyTorch's own ways to train in several processes: the numbers of one process, as torch.nn's have them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.compare import assert_close_to_twin, assert_same, assert_within
from support.processes import Processes
from support.values import data
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fused_rnn

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # a checkpoint of one process
]

PROCESSES = 2
STEPS, BATCH, INPUT, HIDDEN = 7, 4, 5, 8
LIBRARIES = {"fused_rnn": fused_rnn, "torch.nn": nn}


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes(PROCESSES)
    yield started
    started.stop()


class Model(nn.Module):
    """Layers of every kind, and a cell that is called once a step."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.lower = library.LSTM(INPUT, HIDDEN, num_layers=2, bidirectional=True)
        self.middle = library.GRU(2 * HIDDEN, HIDDEN)
        self.upper = library.RNN(HIDDEN, HIDDEN)
        self.cell = library.LSTMCell(HIDDEN, HIDDEN)
        self.output = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.lower, self.middle, self.upper):
            x = layer(x)[0]
        state = None
        for step in x:
            state = self.cell(step, state)
        return self.output(state[0])


def make_model(library: str, dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return Model(LIBRARIES[library]).double().to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1).mean()  # over rows, so that the mean of the halves is that of the whole


def batch_of(step: int) -> Tensor:
    return data(STEPS, BATCH, INPUT, seed=step)


def own_part(x: Tensor, dim: int = 1) -> Tensor:
    return x.chunk(PROCESSES, dim)[dist.get_rank()].contiguous()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def name_in_model(name: str) -> str:
    return name.removeprefix("module.")


def record(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, and every gradient under `grad(name)`."""
    named = {name_in_model(name): parameter for name, parameter in model.named_parameters()}
    found = {name: whole(parameter) for name, parameter in named.items()}
    return found | {f"grad({name})": whole(parameter.grad) for name, parameter in named.items()}


def shard(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for part in model.children():
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


WAYS = (
    "DDP",
    "DDP static graph",
    "DDP no_sync",
    "DDP views",
    "FSDP2",
    "FSDP2 no sync",
    "FSDP2 kept",
    "FSDP2 root alone",
)


def train_together(library: str, way: str) -> dict[str, Tensor]:
    """Three steps of SGD in this process, on its part of the batches; the last step is in two parts."""
    model: Any = make_model(library)
    if way.startswith("DDP"):
        static, views = way == "DDP static graph", way == "DDP views"
        model = DistributedDataParallel(model, static_graph=static, gradient_as_bucket_view=views)
    elif way == "FSDP2 root alone":
        model = fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    else:
        model = shard(model, reshard_after_forward=way != "FSDP2 kept")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        parts = own_part(batch_of(step)).split(1, 1)
        if not way.lower().endswith(("no_sync", "no sync")):
            loss_of(model, torch.cat(parts, 1)).backward()
        else:
            for turn, part in enumerate(parts):
                last = turn == len(parts) - 1
                if way.startswith("FSDP2"):
                    model.set_requires_gradient_sync(last)
                with contextlib.nullcontext() if last or way.startswith("FSDP2") else model.no_sync():
                    (loss_of(model, part) / len(parts)).backward()
        optimizer.step()
    return record(model)


def train_alone(library: str) -> dict[str, Tensor]:
    model = make_model(library)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, batch_of(step)).backward()
        optimizer.step()
    return record(model)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_and_gradients_are_those_of_one_process(way: str, processes: Processes) -> None:
    alone = train_alone("torch.nn")
    for library in LIBRARIES:
        for found in processes(train_together, library, way):
            assert found.keys() == alone.keys()
            assert_within(found, alone)
    assert_within(train_alone("fused_rnn"), alone)


def convert_what_is_wrapped(way: str) -> dict[str, Tensor]:
    wrapped: Any = make_model("torch.nn")
    wrapped = DistributedDataParallel(wrapped) if way == "DDP" else shard(wrapped)
    fused_rnn.convert(wrapped)
    model = wrapped.module if way == "DDP" else wrapped
    assert isinstance(model.lower, fused_rnn.LSTM) and isinstance(model.cell, fused_rnn.LSTMCell)
    loss_of(wrapped, own_part(batch_of(0))).backward()
    return record(wrapped)


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_a_model_is_converted_after_it_was_wrapped(way: str, processes: Processes) -> None:
    alone = make_model("torch.nn")
    loss_of(alone, batch_of(0)).backward()
    for found in processes(convert_what_is_wrapped, way):
        assert_within(found, record(alone))


def penalty_of(model: nn.Module, x: Tensor) -> Tensor:
    """Of the gradient of each row's loss, which a second derivative has to pass."""
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return grad.square().sum((0, 2)).mean()


def penalize_together() -> dict[str, Tensor]:
    model = DistributedDataParallel(make_model("fused_rnn"))
    penalty_of(model, own_part(batch_of(0))).backward()
    return record(model)


def test_ddp_averages_the_gradient_of_a_gradient_penalty(processes: Processes) -> None:
    alone = make_model("torch.nn")
    penalty_of(alone, batch_of(0)).backward()
    expected = record(alone)
    for found in processes(penalize_together):
        assert_within(found, expected)


# ---- mixed precision


def one_step_in_bfloat16(library: str, way: str) -> dict[str, Tensor]:
    if way == "FSDP2":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = shard(make_model(library, torch.float32), mp_policy=policy)
        loss_of(model, own_part(batch_of(0)).float()).backward()
    else:
        model = DistributedDataParallel(make_model(library, torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, own_part(batch_of(0)).float())
        loss.backward()
    return {name: value for name, value in record(model).items() if name.startswith("grad")}


def halves_in_bfloat16(library: str, way: str) -> dict[str, Tensor]:
    """The mean of the gradients of both halves, one after the other in one process."""
    found: list[dict[str, Tensor]] = []
    for half in batch_of(0).float().chunk(PROCESSES, 1):
        model = make_model(library, torch.float32)
        if way == "FSDP2":
            model, half = model.bfloat16(), half.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way != "FSDP2"):
            loss = loss_of(model, half.contiguous())
        loss.backward()
        found.append({name: value.float() for name, value in record(model).items() if name.startswith("grad")})
    return {name: (value + found[1][name]) / 2 for name, value in found[0].items()}


@pytest.mark.parametrize("way", ["FSDP2", "DDP under autocast"])
def test_mixed_precision_gives_the_gradients_of_one_process_that_rounds_the_same(
    way: str, processes: Processes
) -> None:
    # On a processor without AVX-512 torch.nn's layers raise an error under autocast.
    has_twin = way == "FSDP2" or "AVX512" in torch.backends.cpu.get_cpu_capability()
    theirs = processes(one_step_in_bfloat16, "torch.nn", way)[0] if has_twin else {}
    for found in processes(one_step_in_bfloat16, "fused_rnn", way):
        assert_same(found, halves_in_bfloat16("fused_rnn", way))
        assert all(value.dtype is torch.float32 for value in found.values())
        if not has_twin:
            continue
        # numbers in bfloat16, though they are held in float32
        assert_close_to_twin(
            {name: value.bfloat16() for name, value in found.items()},
            {name: value.bfloat16() for name, value in theirs.items()},
        )


# ---- states that a layer carries


def outputs_of_a_stateful_layer(way: str) -> list[Tensor]:
    """Of calls with as many rows in this process as its rank + 2."""
    layer = stateful_layer(dist.get_rank())  # DDP is made of a layer that carries something
    wrapped = DistributedDataParallel(layer) if way == "DDP" else shard(nn.Sequential(layer))
    return [wrapped(rows_of(dist.get_rank(), call))[0].detach() for call in (1, 2, 3)]


def stateful_layer(rank: int) -> Any:
    """After one call, which was in float32."""
    torch.manual_seed(0)
    layer = fused_rnn.LSTM(INPUT, HIDDEN, stateful=True)
    layer(rows_of(rank, 0).float())
    layer.double()
    assert layer.carried_h.dtype is layer.carried_c.dtype is torch.float64
    return layer


def rows_of(rank: int, call: int) -> Tensor:
    return data(STEPS, 2 + rank, INPUT, seed=10 * rank + call)


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_every_process_carries_the_states_of_its_own_rows(way: str, processes: Processes) -> None:
    for rank, found in enumerate(processes(outputs_of_a_stateful_layer, way)):
        layer = stateful_layer(rank)
        assert_same(found, [layer(rows_of(rank, call))[0].detach() for call in (1, 2, 3)])


# ---- weights that are gathered, freed and gathered again


def outputs_of_gathered_weights() -> list[Tensor]:
    """Of inference calls, between which the weights change; the second of each pair finds weights packed."""
    layer = large_layer()
    sharded = shard(nn.Sequential(layer, nn.Identity()))
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    found = []
    for step in range(3):
        with torch.no_grad():
            found += [sharded[0](large_batch(step))[0] for _ in range(3)]
        sharded[0](large_batch(step))[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def large_layer() -> nn.Module:
    torch.manual_seed(0)
    return fused_rnn.GRU(256, 256)


def large_batch(step: int) -> Tensor:
    return data(3, 16, 256, seed=step, dtype=torch.float32)


def test_weights_gathered_anew_are_not_taken_for_those_before(processes: Processes) -> None:
    layer = large_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    expected = []
    for step in range(3):
        with torch.no_grad():
            expected += [layer(large_batch(step))[0] for _ in range(3)]
        layer(large_batch(step))[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in processes(outputs_of_gathered_weights):
        assert_same(found, expected)


# ---- checkpoints


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    found = get_state_dict(model, optimizer)
    return {"model": found[0], "optimizer": found[1]}


def put(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def go_on(library: str, kind: str, folder: Path | None, steps: range, written: Path | None = None) -> dict[str, Tensor]:
    """Take steps with Adam, after a checkpoint was read, before one is written."""
    model: Any = make_model(library)
    if kind != "alone":
        model = DistributedDataParallel(model) if kind == "DDP" else shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if folder is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        state = state_of(model, optimizer)
        load(state, checkpoint_id=folder, no_dist=kind == "alone")
        put(state, model, optimizer)
    for step in steps:
        optimizer.zero_grad()
        x = batch_of(step)
        loss_of(model, x if kind == "alone" else own_part(x)).backward()
        optimizer.step()
    if written is not None:
        save(state_of(model, optimizer), checkpoint_id=written, no_dist=kind == "alone")
    return record(model)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_a_checkpoint_goes_on_with_another_number_of_processes(kind: str, processes: Processes, tmp_path: Path) -> None:
    expected = go_on("torch.nn", "alone", None, range(4))
    assert_within(
        go_on("fused_rnn", "alone", None, range(2), tmp_path / "of one"), go_on("torch.nn", "alone", None, range(2))
    )
    processes(go_on, "fused_rnn", kind, None, range(2), tmp_path / "of two")
    for library in LIBRARIES:  # each reads what the other would
        assert_within(go_on(library, "alone", tmp_path / "of two", range(2, 4)), expected)
        for found in processes(go_on, library, kind, tmp_path / "of one", range(2, 4)):
            assert_within(found, expected)


# ---- first values in place


def first_values(init: str) -> dict[str, Tensor]:
    """Of a model that was made without memory, sharded, and only then given any."""
    with torch.device("meta"):
        model = nn.Sequential(fused_rnn.LSTM(INPUT, HIDDEN, init=init, forget_bias=2.0, peephole=True, layer_norm=True))
    shard(model)
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    return {name: whole(parameter) for name, parameter in model[0].named_parameters()}


@pytest.mark.parametrize("init", ["torch", "keras"])
def test_a_sharded_layer_gets_first_values(init: str, processes: Processes) -> None:
    for found in processes(first_values, init):
        found = {name: value.detach() for name, value in found.items()}
        bias = found["bias_ih_l0"] + found["bias_hh_l0"]
        assert_same(bias[HIDDEN : 2 * HIDDEN], torch.full((HIDDEN,), 2.0))
        assert_same(found["weight_norm_ih_l0"], torch.ones(4 * HIDDEN))
        w_hh = found["weight_hh_l0"]
        if init == "keras":
            torch.testing.assert_close(w_hh.t() @ w_hh, torch.eye(HIDDEN))
        else:
            assert 0.9 / HIDDEN**0.5 < w_hh.abs().max() <= 1 / HIDDEN**0.5
