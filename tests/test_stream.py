"""Streams and pools: the numbers of the layers, and nothing lost, whatever is called in which order."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.apart import run_apart
from support.compare import assert_close_to_twin, assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fused_rnn
from fused_rnn import Stream, StreamPool, settings
from fused_rnn import stream as streams

pytestmark = pytest.mark.kernels

# Layers pack their weights for as many steps, and sum as streams do.
STEPS = 16
B, F, H = 3, 5, 20

MODULES: dict[str, Callable[..., nn.Module]] = {
    "lstm": lambda **k: fused_rnn.LSTM(F, H, **k),
    "gru": lambda **k: fused_rnn.GRU(F, H, **k),
    "rnn": lambda **k: fused_rnn.RNN(F, H, **k),
    "rnn relu, narrow": lambda **k: fused_rnn.RNN(F, 7, nonlinearity="relu", **k),
    "rnn, an odd number of vectors": lambda **k: fused_rnn.RNN(F, 40, nonlinearity="softsign", **k),
    "three layers": lambda **k: fused_rnn.LSTM(F, H, 3, dropout=0.5, **k),
    "projection": lambda **k: fused_rnn.LSTM(F, H, 2, proj_size=6, bias=False, **k),
    "lstm options": lambda **k: fused_rnn.LSTM(
        F, H, 2, peephole=True, coupled_gates=True, cell_clip=0.3, zoneout=0.2, zoneout_cell=0.1, **k
    ),
    "activations": lambda **k: fused_rnn.LSTM(F, H, activation="relu", recurrent_activation="hard_sigmoid", **k),
    "dropouts": lambda **k: fused_rnn.GRU(F, H, input_dropout=0.3, recurrent_dropout=0.3, weight_dropout=0.3, **k),
    "heads": lambda **k: fused_rnn.GRU(F, H, 2, num_heads=4, **k),
    "layer_norm": lambda **k: fused_rnn.LSTM(F, H, 2, layer_norm=True, proj_size=6, **k),
    "layer_norm, heads": lambda **k: fused_rnn.GRU(F, 64, layer_norm=True, num_heads=4, **k),
    "one bias": lambda **k: fused_rnn.RNN(F, H, recurrent_bias=False, **k),
    "indrnn": lambda **k: fused_rnn.IndRNN(F, H, 2, **k),
    "torch.nn": lambda **k: nn.LSTM(F, H, 2, batch_first=True, **k),
    "wide": lambda **k: fused_rnn.LSTM(F, 130, **k),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A module in training mode, as it comes from its constructor; a stream is of eval mode in any case."""
    module = MODULES[name](dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@torch.no_grad()
def expected(module: Any, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
    """What the fused layer of the module's weights says of a sequence (T, B, F), in eval mode."""
    layer = copy.deepcopy(module).eval()
    layer = layer if not type(module).__module__.startswith("torch") else fused_rnn.convert(layer)
    batch_first = layer.batch_first
    output, hx = layer(x.transpose(0, 1) if batch_first else x, hx)
    return output.transpose(0, 1) if batch_first else output, hx


def steps(stream: Any, x: Tensor) -> Tensor:
    return torch.stack([stream.step(row).clone() for row in x])


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_steps_are_bit_for_bit_those_of_a_layers_call(name: str, dtype: torch.dtype, isa: str) -> None:
    module = made(name, dtype)
    x = torch.randn(STEPS, B, F).to(dtype)
    stream = Stream(module, B)
    output, hx = expected(module, x)
    assert_same(steps(stream, x[:7]), output[:7])
    first, rest = stream.chunk(x[7:9]), stream.chunk(x[9:])
    assert_same(torch.cat([first, rest]), output[7:])
    assert_same(stream.state, hx)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "three layers", "wide"])
def test_a_thousand_steps_of_many_rows_and_one(name: str) -> None:
    module = made(name)
    x = torch.randn(1000, 1, F)
    assert_same(steps(Stream(module), x), expected(module, x)[0])
    many = torch.randn(STEPS, 150, F)  # more than one block of rows
    stream = Stream(module, 150)
    output = expected(module, many)[0]
    assert_same(torch.cat([steps(stream, many[:5]), stream.chunk(many[5:])]), output)


def test_calls_that_read_weights_in_place_agree_to_rounding(isa: str) -> None:
    """Layers and cells called for a step sum in another order (docs/serving.md)."""
    for module in (made("lstm"), made("wide"), fused_rnn.GRUCell(F, H)):
        x = torch.randn(B, F)
        is_cell = isinstance(module, nn.RNNCellBase)
        with torch.no_grad():
            result = module(x) if is_cell else module(x[None])[0][0]
        assert_close_to_twin({"h": Stream(module, B).step(x)}, {"h": result})


@pytest.mark.parametrize("cell, layer", [("LSTMCell", "LSTM"), ("GRUCell", "GRU"), ("RNNCell", "RNN")])
@pytest.mark.parametrize("package", [fused_rnn, nn], ids=["fused_rnn", "torch.nn"])
def test_a_cell_is_a_layer_of_its_weights(cell: str, layer: str, package: Any) -> None:
    module = getattr(package, cell)(F, H)
    twin = getattr(fused_rnn, layer)(F, H)
    twin.load_state_dict({f"{name}_l0": value for name, value in module.state_dict().items()})
    of_cell, of_layer = Stream(module, B), Stream(twin, B)
    x = torch.randn(4, B, F)
    assert_same(steps(of_cell, x), steps(of_layer, x))
    state = of_cell.state
    assert [tuple(t.shape) for t in (state if isinstance(state, tuple) else (state,))] == [(B, H)] * (
        2 if cell == "LSTMCell" else 1
    )
    of_cell.state = None
    of_cell.state = state
    assert_same(of_cell.step(x[0]).clone(), of_layer.step(x[0]))


def test_weights_are_rounded_to_the_dtype_of_the_stream() -> None:
    module = made("gru")
    x = torch.randn(STEPS, B, F)
    stream = Stream(module, B, dtype=torch.bfloat16)
    assert_same(stream.chunk(x.bfloat16()), expected(copy.deepcopy(module).bfloat16(), x.bfloat16())[0])
    assert_same(Stream(module, B, dtype=torch.float64).chunk(x.double()), expected(module.double(), x.double())[0])


def test_chunks_with_lengths_leave_ended_rows_as_they_are() -> None:
    for name in ("three layers", "projection", "layer_norm"):
        module = made(name)
        x, lengths = torch.randn(STEPS, 4, F), [STEPS, 0, 5, 16]
        x[5:, 2] = float("nan")  # nobody looks at what is behind the end
        stream = Stream(module, 4)
        stream.chunk(torch.randn(2, 4, F))
        before = stream.state
        single = [Stream(module) for _ in lengths]
        for row, one in enumerate(single):
            one.state = tuple(t[:, row : row + 1] for t in before)
        output = stream.chunk(x, lengths)
        for row, (one, length) in enumerate(zip(single, lengths, strict=True)):
            assert_same(output[:length, row : row + 1], one.chunk(x[:length, row : row + 1]))
            assert not output[length:, row].any()
            assert_same(tuple(t[:, row : row + 1] for t in stream.state), one.state)


# ---- states and results ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "gru", "lstm options"])
def test_states_are_read_set_and_reset(name: str) -> None:
    module, x = made(name), torch.randn(STEPS, B, F)
    stream = Stream(module, B)
    steps(stream, x[:3])
    kept = stream.state
    after = steps(stream, x[3:])
    stream.state = kept
    assert_same(steps(stream, x[3:]), after)
    assert_same(expected(module, x[3:], kept)[0], after)

    stream.state = kept
    stream.reset([1])
    for now, then in zip(*((s if isinstance(s, tuple) else (s,)) for s in (stream.state, kept)), strict=True):
        assert not now[:, 1].any() and now[:, ::2].equal(then[:, ::2])
    stream.reset(torch.tensor([True, False, True]))
    assert_same(steps(stream, x), steps(Stream(module, B), x))
    stream.reset(-1)
    stream.reset()
    assert_same(steps(stream, x), steps(Stream(module, B), x))


def test_results_stand_in_the_streams_own_memory_or_in_out() -> None:
    stream, twin = Stream(made("lstm"), B), None
    twin = copy.copy(stream)
    x = torch.randn(B, F)
    first = stream.step(x)
    assert stream.step(x) is first
    assert_same(first, steps(twin, x.expand(2, B, F))[1])
    for out in (torch.empty(B, H), torch.empty(B, 2 * H)[:, H:], np.empty((B, H), "f")):
        assert stream.step(x, out=out) is out
        assert_same(torch.as_tensor(out), twin.step(x))
        assert stream.step(x, out) is out
        twin.step(x)
    out = np.empty((STEPS, B, H), "f")
    assert stream.chunk(x.expand(STEPS, B, F), out=out) is out
    assert_same(torch.as_tensor(out), twin.chunk(x.expand(STEPS, B, F)))


def test_arrays_and_strided_inputs_are_read_where_they_stand() -> None:
    stream = Stream(made("gru"), B)
    x = torch.randn(B, F)
    result = stream.step(x).clone()
    wide = torch.randn(B, 3 * F)
    wide[:, F : 2 * F] = x
    read_only = x.numpy().copy()
    read_only.flags.writeable = False
    inputs: list[Any] = [
        x.numpy(),
        wide[:, F : 2 * F],
        wide.numpy()[:, F : 2 * F],
        x.numpy()[::-1].copy()[::-1],
        x.t().contiguous().t(),
        np.asfortranarray(x.numpy()),
        memoryview(x.numpy()),
        read_only,
        nn.Parameter(x, requires_grad=False),
        torch._neg_view(-x),
    ]
    for given in inputs:
        stream.reset()
        found = stream.step(given)
        assert isinstance(found, Tensor) == isinstance(given, Tensor)
        assert_same(torch.as_tensor(found), result)
    assert stream.step(x.numpy()) is stream.step(x.numpy())
    with torch.no_grad():
        stream.reset()
        assert_same(stream.step(x.clone().requires_grad_()), result)


def test_modes_of_pytorch_do_not_matter() -> None:
    module, x = made("lstm"), torch.randn(STEPS, B, F)
    output = expected(module, x)[0]
    with torch.device("meta"):
        stream, pool = Stream(module, B), StreamPool(module, B)
    with torch.inference_mode():
        other = Stream(module, B)
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert_same(torch.cat([stream.step(x[0])[None].clone(), stream.chunk(x[1:])]), output)
        slots = [pool.open() for _ in range(B)]
        assert_same(pool.step(x[0], np.array(slots, "int32")), output[0])
    other.step(x[0]).mul_(2)  # an ordinary tensor
    assert_same(other.chunk(x[1:]), output[1:])


@pytest.mark.parametrize("batch", [B, 150])
def test_a_result_may_be_the_next_input(batch: int) -> None:
    stream = Stream(fused_rnn.LSTM(H, H), batch)
    twin = copy.copy(stream)
    y, z = torch.randn(batch, H), None
    z = y.clone()
    for _ in range(4):
        y, z = stream.step(y), twin.step(z).clone()
        assert_same(y, z)
    out = y.clone()
    assert_same(stream.step(out, out=out), twin.step(z))


# ---- weights --------------------------------------------------------------------------------------------------------


def test_weights_are_packed_once_for_all_streams_and_read_anew_when_asked() -> None:
    module = made("three layers")
    first, second, pool = Stream(module, 2), Stream(module, 4), StreamPool(module, 4)
    assert first._packed is second._packed is pool._packed
    bytes_of_weights = sum(p.nbytes for p in module.parameters())
    assert first.packed_bytes > bytes_of_weights
    x = torch.randn(STEPS, 2, F)
    old = expected(module, x)[0]
    assert_same(first.chunk(x[:4]), old[:4])
    state = first.state
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.5)
    assert_same(first.chunk(x[4:]), old[4:])

    first.state = state
    first.refresh()
    assert_same(first.state, state)
    assert_same(first.chunk(x[4:]), expected(module, x[4:], state)[0])
    assert first._packed is Stream(module)._packed is not second._packed
    second.refresh()
    assert second._packed is first._packed


def test_packed_weights_end_with_the_last_stream() -> None:
    def alive() -> int:
        gc.collect()
        return sum(reference() is not None for references in streams._packed.values() for reference in references)

    before = alive()
    first = Stream(fused_rnn.GRU(F, 33))
    assert alive() == before + 1
    second = copy.copy(first)
    del first
    assert alive() == before + 1
    del second
    assert alive() == before


def test_refreshing_finds_replaced_parametrized_and_pruned_weights() -> None:
    module = nn.GRU(F, H)
    stream = Stream(module, B)
    x = torch.randn(STEPS, B, F)
    module.weight_hh_l0 = nn.Parameter(torch.randn(3 * H, H) / 4)
    parametrizations.weight_norm(module, "weight_ih_l0")
    prune.l1_unstructured(module, "bias_ih_l0", 0.5)
    stream.refresh()
    plain = fused_rnn.GRU(F, H)
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(plain, name).copy_(getattr(module, name))
    assert_same(stream.chunk(x), expected(plain, x)[0])


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_and_pickles_go_on_with_a_state_of_their_own(duplicate: Any, dtype: torch.dtype) -> None:
    module, x = made("lstm options", dtype), torch.randn(STEPS, B, F).to(dtype)
    stream, pool = Stream(module, B), StreamPool(module, 5)
    slots = [pool.open() for _ in range(4)]
    pool.close(slots.pop(1))
    for row in x[:3]:
        stream.step(row)
        pool.step(row, slots)
    for original, arguments in ((stream, ()), (pool, (slots,))):
        twin = duplicate(original)
        assert twin._packed is original._packed and (twin.module is module) == (duplicate is copy.copy)
        assert_same(
            torch.stack([twin.step(row, *arguments).clone() for row in x]),
            torch.stack([original.step(row, *arguments).clone() for row in x]),
        )
        assert repr(twin) == repr(original)
    twin = duplicate(pool)
    assert len(twin) == 3 and twin.open() == 1 and len(pool) == 3
    with pytest.raises(IndexError):
        pool.step(x[0][:1], [1])


# ---- errors ---------------------------------------------------------------------------------------------------------

X = torch.zeros(B, F)
WRONG_STEPS: list[tuple[Any, type[Exception], str]] = [
    (lambda s: s.step([[0.0] * F] * B), TypeError, "x: expected a Tensor or an array, got a list of 3"),
    (lambda s: s.step(None), TypeError, "x: expected a Tensor or an array, got None"),
    (lambda s: s.step(X.double()), ValueError, "x: expected torch.float32 as the stream has, got torch.float64"),
    (lambda s: s.step(X.double().numpy()), ValueError, "x: expected torch.float32 as the stream has"),
    (lambda s: s.step(X.numpy().astype(">f4")), TypeError, "x: expected a Tensor or an array"),
    (lambda s: s.step(X[:2]), RuntimeError, "x: expected (3, 5), got (2, 5)"),
    (lambda s: s.step(X[:, :4]), RuntimeError, "x: expected (3, 5), got (3, 4)"),
    (lambda s: s.step(X[0]), ValueError, "x: expected (3, 5), got (5,)"),
    (lambda s: s.step(X.clone().requires_grad_()), ValueError, "x: expected a tensor without a gradient"),
    (lambda s: s.step(X.to("meta")), RuntimeError, "x: expected a dense tensor on the CPU, got torch.strided on meta"),
    (lambda s: s.step(X.to_sparse()), RuntimeError, "x: expected a dense tensor on the CPU, got torch.sparse_coo"),
    (lambda s: s.step(freed(B, F)), RuntimeError, "x: expected a tensor with memory"),
    (lambda s: s.step(X, out=torch.empty(B, H + 1)), RuntimeError, "out: expected (3, 20), got (3, 21)"),
    (lambda s: s.step(X, out=torch.empty(B, H).double()), ValueError, "out: expected torch.float32"),
    (lambda s: s.step(X, out=torch.empty(1, H).expand(B, H)), ValueError, "out: expected rows of neighbouring"),
    (lambda s: s.step(X, out=torch.empty(H, B).t()), ValueError, "out: expected rows of neighbouring"),
    (lambda s: s.step(X, out=read_only(B, H)), ValueError, "out: expected an array that may be written to"),
    (lambda s: s.step(X, out=np.empty((B, 2 * H), "f")[:, ::-2]), ValueError, "out: expected an array whose strides"),
    (lambda s: s.step(X, out=freed(B, H)), RuntimeError, "out: expected a tensor with memory"),
    (lambda s: s.step(), TypeError, "step: expected x"),
    (lambda s: s.step(X, into=X), TypeError, "step: got an unexpected keyword argument 'into'"),
    (lambda s: s.step(X, X, X), TypeError, "step: expected at most 2 arguments, got 3"),
    (lambda s: s.step(X, x=X), TypeError, "step: got two values for x"),
    (lambda s: torch.vmap(s.step)(X.expand(2, B, F)), RuntimeError, "x, out: expected plain tensors"),
    (lambda s: s.chunk(X), ValueError, "x: expected (n, 3, 5), got (3, 5)"),
    (lambda s: s.chunk(X[None], [1, 1]), RuntimeError, "lengths: expected (3,), one for each row, got (2,)"),
    (lambda s: s.chunk(X[None], [1, 2, 0]), RuntimeError, "lengths: expected 0 to 1, the steps of the input, got 2"),
    (lambda s: s.chunk(X[None], [1.0, 1.0, 1.0]), RuntimeError, "lengths: expected an integer dtype"),
    (lambda s: s.chunk(X[None], "abc"), TypeError, "lengths: expected a Tensor or an array, got 'abc'"),
    (lambda s: s.chunk(X[None], out=torch.empty(2, B, H)), RuntimeError, "out: expected (1, 3, 20), got (2, 3, 20)"),
    (lambda s: setattr(s, "state", torch.zeros(1, B, H)), TypeError, "state: expected a tuple (h_0, c_0) of two"),
    (
        lambda s: setattr(s, "state", (torch.zeros(1, B, H), torch.zeros(1, B, H + 1))),
        RuntimeError,
        "state[1]: expected (1, 3, 20), got (1, 3, 21)",
    ),
    (lambda s: s.reset([3]), IndexError, "rows: expected indices of the 3 rows"),
    (lambda s: s.reset("all"), TypeError, "rows: expected a bool tensor, indices or None"),
]


def freed(*shape: int) -> Tensor:
    tensor = torch.empty(*shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def read_only(*shape: int) -> Any:
    array = np.empty(shape, "f")
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("call, error, message", WRONG_STEPS, ids=[message for _, _, message in WRONG_STEPS])
def test_wrong_arguments_are_named_and_change_nothing(call: Any, error: type[Exception], message: str) -> None:
    stream = Stream(made("lstm"), B)
    stream.step(torch.randn(B, F))
    before, twin = stream.state, copy.copy(stream)
    with pytest.raises(error) as raised:
        call(stream)
    assert str(raised.value).startswith(message)
    assert_same(stream.state, before)
    x = torch.randn(B, F)
    assert_same(stream.step(x), twin.step(x))


def test_out_of_a_chunk_is_no_part_of_its_input() -> None:
    stream = Stream(fused_rnn.GRU(H, H), B)
    memory = torch.zeros(STEPS + 1, B, H)
    with pytest.raises(ValueError, match="out: expected memory of its own, got some of x"):
        stream.chunk(memory[:-1], out=memory[1:])
    assert not stream.state.any()


def test_a_result_whose_memory_was_freed_is_not_written() -> None:
    stream, x = Stream(made("lstm", torch.bfloat16), B), X.bfloat16()  # of the others NumPy holds the memory
    output, before = stream.step(x), stream.state
    output.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="out: expected the tensor that step"):
        stream.step(x)
    assert_same(stream.state, before)


@pytest.mark.parametrize(
    "module, error, message",
    [
        (nn.Linear(3, 4), TypeError, "module: expected a recurrent layer or cell, got an object of type"),
        ("lstm", TypeError, "module: expected a recurrent layer or cell, got 'lstm' (str)"),
        (nn.LSTM(3, 4, bidirectional=True), ValueError, "it has bidirectional=True, and a stream cannot look ahead"),
        (fused_rnn.GRU(3, 4, reset_after=False), ValueError, "no fused kernel has reset_after=False"),
        (fused_rnn.LSTM(3, 4, dtype=torch.complex64), ValueError, "dtype: expected one of torch.float32"),
        (fused_rnn.LSTM(3, 4, device="meta"), RuntimeError, "weight_ih_l0: expected on cpu"),
    ],
    ids=str,
)
def test_modules_that_cannot_be_streams_are_refused_with_the_reason(module: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as raised:
        Stream(module)
    assert message in str(raised.value)


def test_custom_cells_are_refused() -> None:
    module = fused_rnn.RNN(3, 4)
    # As one whose kernels were compiled, which takes a minute.
    module._custom = settings.add_kind("OfThisTest", (1 << 16) + 1, settings.CellShape(1, 0, 0))  # type: ignore[misc]
    with pytest.raises(ValueError, match="it is a custom cell"):
        Stream(module)


def test_other_arguments_of_the_constructor() -> None:
    module = nn.GRU(3, 4)
    for count, error in ((0, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="batch_size: expected"):
            Stream(module, count)  # type: ignore[arg-type]
        with pytest.raises(error, match="capacity: expected"):
            StreamPool(module, count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype: expected one of"):
        Stream(module, dtype=torch.int8)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        Stream(module.half())


def test_a_module_of_other_sizes_is_refused_by_refresh() -> None:
    holder = fused_rnn.GRU(F, H)
    stream = Stream(holder)
    stream.step(X[:1])
    state = stream.state
    stream.module = fused_rnn.GRU(F, H + 1)
    with pytest.raises(RuntimeError, match="module: expected the cell and sizes"):
        stream.refresh()
    assert_same(stream.state, state)


# ---- threads and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(F, H, 2), (64, 256, 4)], ids=["the lock kept", "the lock released"])
def test_streams_of_several_threads_do_not_meet(sizes: tuple[int, int, int]) -> None:
    input_size, hidden_size, batch = sizes
    module, x = fused_rnn.LSTM(input_size, hidden_size), torch.randn(40, batch, input_size)
    results: list[Tensor] = [torch.empty(0)] * 4

    def work(number: int) -> None:
        stream = Stream(module, batch)
        results[number] = torch.cat([steps(stream, x[:30] + number), stream.chunk(x[30:] + number)])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert_same(results[number], expected(module, x + number)[0])


def test_a_stream_that_two_threads_call_at_once_refuses_one_of_them() -> None:
    module = fused_rnn.LSTM(64, 256)
    stream, x = Stream(module, 16), torch.randn(16, 64)
    done, refused = [0, 0], []

    def work(number: int) -> None:
        for _ in range(150):
            try:
                stream.step(x)
                done[number] += 1
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(message.startswith("Stream: expected to be used by one thread at a time") for message in refused)
    twin = Stream(module, 16)
    for _ in range(sum(done)):
        twin.step(x)
    assert_same(stream.state, twin.state)


def test_long_calls_release_the_lock_of_the_interpreter() -> None:
    stream, x = Stream(fused_rnn.LSTM(256, 256), 8), torch.randn(100, 8, 256)
    counter, seen = [0], []

    def work() -> None:
        begin = counter[0]
        stream.chunk(x)
        seen.append(counter[0] - begin)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is made to hand the lock over
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while not seen:
            counter[0] += 1
            time.sleep(0)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen[0] > 0


COUNTER = """
#include <stddef.h>
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void*, size_t);
extern void *__libc_memalign(size_t, size_t);
static volatile long count;
long allocations(void) { return count; }
void* malloc(size_t n) { ++count; return __libc_malloc(n); }
void* calloc(size_t n, size_t m) { ++count; return __libc_calloc(n, m); }
void* realloc(void* p, size_t n) { ++count; return __libc_realloc(p, n); }
void* memalign(size_t a, size_t n) { ++count; return __libc_memalign(a, n); }
void* aligned_alloc(size_t a, size_t n) { ++count; return __libc_memalign(a, n); }
int posix_memalign(void** p, size_t a, size_t n) { ++count; *p = __libc_memalign(a, n); return *p == 0 ? 12 : 0; }
"""

ALLOCATES = """
import ctypes, itertools, sys
import numpy as np, torch
import fused_rnn
allocations = ctypes.CDLL(sys.argv[1]).allocations
torch.set_num_threads(2)
modules = [fused_rnn.LSTM(8, 8), fused_rnn.RNN(8, 9), fused_rnn.GRU(64, 64, 2)]
for module in (*modules, fused_rnn.LSTM(32, 300, proj_size=40)):
    for batch in (1, 20, 100):
        stream, pool = fused_rnn.Stream(module, batch), fused_rnn.StreamPool(module, 2 * batch)
        slots = [pool.open() for _ in range(batch)][::-1]
        x = torch.randn(batch, module.input_size)
        array, out, slots_of_array = x.numpy(), torch.empty(batch, stream.output_size), np.array(slots)
        for _ in range(2):
            before = allocations()
            for _ in itertools.repeat(None, 20):
                stream.step(x)
                stream.step(array)
                stream.step(x, out=out)
                pool.step(x, slots)
                pool.step(array, slots_of_array)
            made = allocations() - before
        before = allocations()
        bytearray(1 << 16)
        assert allocations() > before, "nothing is counted"
        print(made)
"""


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another library stands before the allocator's functions")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_steps_allocate_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, library = tmp_path / "counter.c", tmp_path / "counter.so"
    source.write_text(COUNTER)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-fno-builtin", "-o", library, source], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    assert run_apart("-c", ALLOCATES, str(library)) == ["0"] * 12


# ---- pools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "projection", "lstm options", "layer_norm", "heads", "wide"])
def test_a_pool_is_bit_for_bit_as_many_streams(name: str, isa: str) -> None:
    module, capacity = made(name), 90
    pool, single = StreamPool(module, capacity), {}
    for turn in range(12):
        while len(pool) < capacity and (turn == 0 or torch.rand(()) < 0.5):
            single[pool.open()] = Stream(module)
        for slot in [slot for slot in single if torch.rand(()) < 0.05]:
            pool.close(slot)
            del single[slot]
        for slot in [slot for slot in single if torch.rand(()) < 0.05]:
            pool.reset(slot)
            single[slot].reset()
        n = (1, 7, len(single))[turn % 3]
        slots = [list(single)[i] for i in torch.randperm(len(single))[:n]]
        if turn % 4 == 3:
            slots.sort()  # neighbours go through the gates together
        x = torch.randn(n, F)
        given: Any = (slots, tuple(slots), torch.tensor(slots), np.array(slots))[turn % 4]
        result = pool.step(x, given)
        assert_same(result, torch.cat([single[slot].step(x[i : i + 1]) for i, slot in enumerate(slots)]))
    for slot, stream in single.items():
        assert_same(pool.state(slot), stream.state)


def test_slots_are_opened_closed_and_opened_again_from_zeros() -> None:
    module = made("lstm")
    pool = StreamPool(module, 2)
    first, second = pool.open(), pool.open()
    assert {first, second} == {0, 1} and len(pool) == pool.capacity == 2
    with pytest.raises(RuntimeError, match="open: all 2 slots are open"):
        pool.open()
    x = torch.randn(1, F)
    pool.step(x, [first])
    state = pool.state(first)
    pool.close(first)
    assert pool.open() == first and not pool.state(first)[0].any()
    assert_same(pool.step(x, [first]).clone(), Stream(module).step(x))
    pool.close(second)
    moved = pool.open(state)
    stream = Stream(module)
    stream.step(x)
    assert_same(pool.step(x, [moved]), stream.step(x))


def test_results_of_a_pool_stand_in_its_own_memory_or_in_out() -> None:
    pool = StreamPool(made("gru"), 4)
    slots = [pool.open() for _ in range(3)]
    x = torch.randn(3, F)
    first = pool.step(x, slots)
    assert pool.step(x, slots) is first and pool.step(x.numpy(), slots) is pool.step(x.numpy(), slots)
    assert isinstance(pool.step(x.numpy(), np.array(slots)), np.ndarray)
    out = torch.empty(3, H)
    assert pool.step(x, slots, out) is out and pool.step(x, out=out, slots=slots) is out
    assert pool.step(x[:0], []).shape == (0, H)


POOL_X = torch.zeros(2, F)
WRONG_POOL: list[tuple[Any, type[Exception], str]] = [
    (lambda p: p.step(POOL_X, [0, 0]), RuntimeError, "slots: expected each slot once, got 0 twice"),
    (lambda p: p.step(POOL_X, [0, 2]), IndexError, "slots: expected slots that are open, got 2"),
    (lambda p: p.step(POOL_X, [0, -1]), IndexError, "slots: expected slots that are open, got -1"),
    (lambda p: p.step(POOL_X, [0, 1 << 70]), IndexError, "slots: expected slots that are open, got 11805"),
    (lambda p: p.step(POOL_X, [0]), RuntimeError, "slots: expected 2, one for each row of x, got 1"),
    (lambda p: p.step(POOL_X, [0, 1, 3]), RuntimeError, "slots: expected 2, one for each row of x, got 3"),
    (lambda p: p.step(POOL_X, [0.0, 1.0]), TypeError, "slots: expected ints, as open() returns them, got 0.0 (float)"),
    (lambda p: p.step(POOL_X, [False, True]), TypeError, "slots: expected ints"),
    (lambda p: p.step(POOL_X, 0), TypeError, "slots: expected a list of ints, or an int64 Tensor or array, got 0"),
    (lambda p: p.step(POOL_X, torch.tensor([[0], [1]])), TypeError, "slots: expected ints"),
    (lambda p: p.step(POOL_X), TypeError, "step: expected x and slots"),
    (lambda p: p.step(POOL_X[:, :3], [0, 1]), RuntimeError, "x: expected (n, 5), got (2, 3)"),
    (lambda p: p.close(2), IndexError, "slot: expected slots that are open, got 2"),
    (lambda p: p.close("0"), TypeError, "slot: expected ints"),
    (lambda p: p.reset(4), IndexError, "slot: expected slots that are open, got 4"),
    (lambda p: p.state(2), IndexError, "slot: expected slots that are open, got 2"),
    (lambda p: p.set_state(0, torch.zeros(1, 2, H)), RuntimeError, "state: expected (1, 1, 20), got (1, 2, 20)"),
    (lambda p: p.open(torch.zeros(1, H)), ValueError, "state: expected (1, 1, 20), got (1, 20)"),
]


@pytest.mark.parametrize("call, error, message", WRONG_POOL, ids=[message for _, _, message in WRONG_POOL])
def test_wrong_arguments_of_a_pool_are_named_and_change_nothing(call: Any, error: Any, message: str) -> None:
    pool = StreamPool(made("gru"), 4)
    for _ in range(4):
        pool.open()
    pool.close(2)
    pool.step(torch.randn(3, F), [3, 0, 1])
    before = [pool.state(slot) for slot in (0, 1, 3)]
    with pytest.raises(error) as raised:
        call(pool)
    assert str(raised.value).startswith(message)
    assert_same([pool.state(slot) for slot in (0, 1, 3)], before)
    assert len(pool) == 3 and pool.open() == 2
