"""The C library (include/fused_rnn.h): the numbers of streams, and no call that it does not survive."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.c_library import (
    BEST,
    ERRORS,
    GRU_FILE,
    MODULES,
    STEPS,
    TESTED,
    B,
    Description,
    F,
    Guarded,
    H,
    Layer,
    Library,
    address,
    described,
    made,
)
from support.compare import assert_same
from torch import Tensor

import fused_rnn
from fused_rnn import Stream
from fused_rnn.check import instruction_set

pytestmark = pytest.mark.kernels

# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.parametrize("isa", TESTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_a_saved_layer_says_bit_for_bit_what_its_stream_says(
    name: str, dtype: torch.dtype, isa: str, c: Library, tmp_path: Path
) -> None:
    module = made(name)
    fused_rnn.save_weights(module, tmp_path / "weights", dtype)
    weights = c.load(tmp_path / "weights", isa)
    own = c.stream(weights, B)
    x = torch.randn(STEPS, B, F).to(dtype)
    with instruction_set(isa):
        stream = Stream(module, B, dtype)
        P = stream.output_size
        for row in x[:3]:
            assert_same(c.step(own, row, P), stream.step(row))
        lengths = [4, 0, 2]
        assert_same(c.chunk(own, x[3:7], P, lengths), stream.chunk(x[3:7], lengths))
        assert_same(c.chunk(own, x[7:], P), stream.chunk(x[7:]))
        h, cell = stream._states(None, True)
        twin = c.stream(weights, 2)
        for layer in range(h.shape[0]):
            for row in range(B):
                read_h = torch.empty(P, dtype=dtype)
                read_c = None if cell is None else torch.empty_like(cell[layer, row])
                to_c = None if read_c is None else address(read_c)
                c.call("read_state", own, ctypes.c_int64(layer), ctypes.c_int64(row), address(read_h), to_c)
                assert_same(read_h, h[layer, row])
                if cell is not None:
                    assert_same(read_c, cell[layer, row])
                # Into another row of another stream, which goes on from there.
                if row == 0:
                    c.call("write_state", twin, ctypes.c_int64(layer), ctypes.c_int64(1), address(read_h), to_c)
        c.call("reset", own, ctypes.c_int64(1))
        stream.reset([1])
        last = stream.step(x[0])
        assert_same(c.step(own, x[0], P), last)
        assert_same(c.step(twin, x[0, :2].flip(0), P)[1], last[0])
    for one in (own, twin):
        c.c.fused_rnn_stream_destroy(one)
    c.c.fused_rnn_weights_destroy(weights)


@pytest.mark.compiles
@pytest.mark.parametrize("isa", TESTED)
@pytest.mark.parametrize("weights", ["int8", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["lstm", "gru", "rnn", "projection", "lstm options", "heads", "layer_norm", "cell", "wide"]
)
def test_a_saved_quantized_layer_says_what_its_stream_says(
    name: str, weights: str, isa: str, c: Library, tmp_path: Path
) -> None:
    module = fused_rnn.quantize(made(name).eval(), weights=weights)
    fused_rnn.save_weights(module, tmp_path / "weights")
    held = c.load(tmp_path / "weights", isa)
    own, x = c.stream(held, B), torch.randn(STEPS, B, F)
    with instruction_set(isa):
        stream = Stream(module, B)
        assert_same(c.step(own, x[0], stream.output_size), stream.step(x[0]))
        assert_same(c.chunk(own, x[1:], stream.output_size), stream.chunk(x[1:]))
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(held)


@pytest.mark.parametrize("isa", TESTED)
def test_many_rows_long_sequences_and_resets(isa: str, c: Library, tmp_path: Path) -> None:
    module = made("gru")
    fused_rnn.save_weights(module, tmp_path / "weights")
    weights = c.load(tmp_path / "weights", isa)
    rows = 150  # more than one block
    own = c.stream(weights, rows)
    x = torch.randn(100, rows, F)
    with instruction_set(isa):
        stream = Stream(module, rows)
        assert_same(c.step(own, x[0], H), stream.step(x[0]))
        assert_same(c.chunk(own, x, H), stream.chunk(x))
        c.call("reset", own, ctypes.c_int64(149))
        stream.reset([149])
        assert_same(c.step(own, x[0], H), stream.step(x[0]))
        c.call("reset", own, ctypes.c_int64(-1))
        stream.reset()
        assert_same(c.step(own, x[0], H), stream.step(x[0]))
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


@pytest.mark.parametrize("isa", TESTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_memory_of_the_caller_is_as_much_as_was_said_and_no_more(
    rows: int, dtype: torch.dtype, isa: str, c: Library
) -> None:
    module = fused_rnn.LSTM(7, 19, 2, dtype=dtype)
    description, held = described(module, isa)
    size = ctypes.c_size_t()
    c.call("weights_memory_size", ctypes.byref(description), ctypes.byref(size))
    assert size.value > sum(t.nbytes for t in held) and size.value % 64 == 0
    memory, weights = Guarded(size.value), ctypes.c_void_p()
    c.call("weights_create", ctypes.byref(description), ctypes.c_void_p(memory.address), size, ctypes.byref(weights))
    assert weights.value == memory.address
    c.call("stream_memory_size", weights, ctypes.c_int64(rows), ctypes.byref(size))
    own_memory, own = Guarded(size.value), ctypes.c_void_p()
    c.call(
        "stream_create",
        weights,
        ctypes.c_int64(rows),
        ctypes.c_void_p(own_memory.address),
        size,
        ctypes.byref(own),
    )
    x = torch.randn(9, rows, 7).to(dtype)
    with instruction_set(isa):
        stream = Stream(module, rows)
        assert_same(c.step(own, x[0], 19), stream.step(x[0]))
        assert_same(c.chunk(own, x, 19), stream.chunk(x))
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


def test_a_recurrent_bias_of_null_is_zeros(c: Library) -> None:
    module = fused_rnn.LSTM(F, H)
    with torch.no_grad():
        module.bias_hh_l0.zero_()
    description, held = described(module)
    description.layers[0].bias_hh = None
    weights = ctypes.c_void_p()
    c.call("weights_create", ctypes.byref(description), None, ctypes.c_size_t(0), ctypes.byref(weights))
    own, x = c.stream(weights, B), torch.randn(B, F)
    assert_same(c.step(own, x, H), Stream(module, B).step(x))
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


def test_steps_of_some_rows_are_those_of_a_pool(c: Library, tmp_path: Path) -> None:
    module, rows = made("gru"), 100
    fused_rnn.save_weights(module, tmp_path / "weights")
    weights = c.load(tmp_path / "weights")
    own, pool = c.stream(weights, rows), fused_rnn.StreamPool(module, rows)
    slots = [pool.open() for _ in range(rows)]
    assert slots == list(range(rows))

    def step(chosen: list[int], x: Tensor, y: Tensor) -> int:
        given = (ctypes.c_int64 * len(chosen))(*chosen)
        return c.code("step_rows", own, ctypes.c_int64(len(chosen)), given, address(x), address(y))

    for count in (1, 3, 90, 100):
        for _ in range(3):
            chosen, x, y = torch.randperm(rows)[:count].tolist(), torch.randn(count, F), torch.empty(count, H)
            assert step(chosen, x, y) == 0
            assert_same(y, pool.step(x, chosen))
    x, y, last = torch.randn(rows, F), torch.empty(rows, H), torch.empty(rows, H)
    for wrong in ([3, 3], [0, rows], [-1], list(range(rows)) + [0], []):
        assert step(wrong, torch.randn(rows + 1, F), torch.empty(rows + 1, H)) == ERRORS["chosen"]
    assert c.code("step_rows", own, ctypes.c_int64(1), None, address(x), address(y)) == ERRORS["chosen"]
    assert step(slots, x, y) == 0 and c.code("step", own, address(x), address(last)) == 0
    assert_same(y, pool.step(x, slots))
    assert_same(last, pool.step(x, slots))
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


def test_streams_of_the_same_weights_know_nothing_of_each_other(c: Library, tmp_path: Path) -> None:
    module = fused_rnn.GRU(F, H)
    fused_rnn.save_weights(module, tmp_path / "weights")
    weights = c.load(tmp_path / "weights")
    streams, x = [c.stream(weights) for _ in range(2)], torch.randn(2, 50, 1, F)
    results = [c.step(own, x[i % 2, i // 2], H) for i in range(100) for own in [streams[i % 2]]]
    for i in range(2):
        assert_same(torch.stack(results[i::2]), Stream(module).chunk(x[i]))

    description = Description()
    c.call("weights_describe", weights, ctypes.byref(description))
    assert (description.cell, description.dtype, description.num_layers) == (3, 1, 1)
    assert (description.input_size, description.hidden_size, description.proj_size) == (F, H, 0)
    assert description.instruction_set.decode() == BEST and not description.layers
    for own in streams:
        c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_every_error_has_a_text_of_its_own(c: Library) -> None:
    texts = {name: c.text(number) for name, number in ERRORS.items()}
    assert len(set(texts.values())) == len(ERRORS) == len(set(ERRORS.values()))
    assert "unknown error" not in texts.values() and c.text(0) == "no error"
    assert {c.text(number) for number in (-1, 30, 99, 1 << 20)} == {"unknown error"}
    assert c.c.fused_rnn_abi_version() == 1


def wrong_fields() -> list[tuple[str, Any, str]]:
    wrong: list[tuple[str, Any, str]] = [
        ("struct_size", 0, "struct_size"),
        ("struct_size", 1 << 31, "struct_size"),
        ("layer_size", 72, "struct_size"),
        ("layer_size", 84, "struct_size"),
        ("matrix_format", 1, "scales"),
        ("matrix_format", 4, "matrix_format"),
        ("matrix_format", -1, "matrix_format"),
        ("layers", None, "layers_null"),
        ("instruction_set", b"sse9", "instruction_set"),
        ("zoneout", float("nan"), "zoneout"),
        ("cell_clip", float("nan"), "cell_clip"),
        ("cell_clip", -1.0, "cell_clip"),
        ("zoneout", 1.5, "zoneout"),
        ("zoneout_cell", -0.1, "zoneout_cell"),
        ("num_heads", 3, "num_heads"),
        ("num_heads", -1, "num_heads"),
        ("num_heads", 1 << 62, "num_heads"),
        ("proj_size", H, "proj_size"),
        ("proj_size", 3, "weight_hr"),
        ("peephole", 1, "weight_peephole"),
        ("layer_norm", 1, "norm"),
    ]
    for name, values in {
        "cell": (0, 4, -1),
        "dtype": (0, 4, -5),
        "num_layers": (0, 65, -1, 1 << 62),
        "input_size": (0, -1, (1 << 20) + 1, 1 << 62),
        "hidden_size": (0, -1, (1 << 20) + 1, 1 << 62),
        "activation": (-1, 7),
        "recurrent_activation": (-1, 7),
        "peephole": (2, -1),
        "coupled_gates": (2, -1),
        "layer_norm": (2, -1),
    }.items():
        wrong += [(name, value, name) for value in values]
    return wrong


@pytest.mark.parametrize("field, value, error", wrong_fields())
def test_a_wrong_field_of_a_description_is_an_error_that_names_it(
    field: str, value: Any, error: str, c: Library
) -> None:
    description, held = described(fused_rnn.LSTM(F, H))
    setattr(description, field, value)
    weights, size = ctypes.c_void_p(7), ctypes.c_size_t(7)
    asked = c.code("weights_create", ctypes.byref(description), None, ctypes.c_size_t(0), ctypes.byref(weights))
    assert asked == ERRORS[error] and weights.value == 7
    if error not in ("layers_null", "weight_hr", "weight_peephole", "norm", "scales"):  # sizes do not ask for weights
        assert c.code("weights_memory_size", ctypes.byref(description), ctypes.byref(size)) == ERRORS[error]
        assert size.value == 7
    if error not in ("struct_size", "newer"):
        assert error.split("_")[0] in c.text(ERRORS[error])


def test_options_of_an_lstm_are_errors_of_others(c: Library) -> None:
    for field in ("peephole", "coupled_gates", "cell_clip", "zoneout_cell", "proj_size"):
        description, held = described(fused_rnn.GRU(F, H))
        setattr(description, field, 1)
        error = c.code("weights_memory_size", ctypes.byref(description), ctypes.byref(ctypes.c_size_t()))
        assert error == ERRORS[field]
    description, held = described(fused_rnn.GRU(F, H))
    description.cell, description.recurrent_activation = 1, 2
    error = c.code("weights_memory_size", ctypes.byref(description), ctypes.byref(ctypes.c_size_t()))
    assert error == ERRORS["recurrent_activation"]


def test_missing_unwanted_and_misaligned_weights_are_errors(c: Library) -> None:
    def error(module: Any, layer: int, name: str, value: int | None, shift: int = 0) -> int:
        description, held = described(module)
        of = description.layers[layer]
        setattr(of, name, getattr(of, name) + shift if shift else value)
        arguments = ctypes.byref(description), None, ctypes.c_size_t(0), ctypes.byref(ctypes.c_void_p())
        return c.code("weights_create", *arguments)

    for name in ("weight_ih", "weight_hh"):
        assert error(fused_rnn.LSTM(F, H, 2), 1, name, None) == ERRORS[name]
    assert error(fused_rnn.LSTM(F, H), 0, "bias_ih", None) == ERRORS["bias"]
    assert error(fused_rnn.GRU(F, H), 0, "bias_hh", None) == ERRORS["bias"]
    assert error(fused_rnn.LSTM(F, H, 2), 1, "bias_hh", None) == ERRORS["bias"]
    for name in Layer.NAMES[4:] + Layer.NORMS:
        expected = {"weight_hr": "weight_hr", "weight_peephole": "weight_peephole"}.get(name, "norm")
        assert error(fused_rnn.LSTM(F, H), 0, name, 64) == ERRORS[expected]
    for name in Layer.NAMES[:4]:
        assert error(fused_rnn.LSTM(F, H), 0, name, None, shift=2) == ERRORS["weight_alignment"]


def test_a_description_of_a_newer_program_is_read_if_its_new_fields_are_zero(c: Library) -> None:
    description, held = described(fused_rnn.LSTM(F, H))
    longer = ctypes.create_string_buffer(bytes(description) + bytes(24))
    Description.from_buffer(longer).struct_size = len(longer.raw) - 1
    size = ctypes.c_size_t()
    assert c.code("weights_memory_size", longer, ctypes.byref(size)) == 0 and size.value > 0
    longer[len(longer.raw) - 2] = 1
    assert c.code("weights_memory_size", longer, ctypes.byref(size)) == ERRORS["newer"]


@pytest.mark.parametrize("dtype", [1, 2, 3])
@pytest.mark.parametrize("cell", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 1 << 20])
def test_sizes_of_the_largest_layers_do_not_overflow(heads: int, cell: int, dtype: int, c: Library) -> None:
    most = 1 << 20
    one = torch.zeros(8, dtype=torch.float64)
    layers = (Layer * 64)(*[Layer(weight_ih=one.data_ptr(), weight_hh=one.data_ptr())] * 64)
    description = Description(
        cell=cell, dtype=dtype, num_layers=64, input_size=most, hidden_size=most, num_heads=heads, layers=layers
    )
    size, weights = ctypes.c_size_t(), ctypes.c_void_p()
    c.call("weights_memory_size", ctypes.byref(description), ctypes.byref(size))
    elements = 64 * {1: 1, 2: 4, 3: 3}[cell] * most * (most + most // heads)
    least = elements * {1: 4, 2: 8, 3: 2}[dtype]
    assert least < size.value < 4 * least
    asked = c.code("weights_create", ctypes.byref(description), None, ctypes.c_size_t(0), ctypes.byref(weights))
    assert asked == ERRORS["out_of_memory"] and not weights.value


def test_a_prime_number_of_heads_is_one_block(c: Library, tmp_path: Path) -> None:
    module = fused_rnn.RNN(1, 1009, num_heads=1009)
    fused_rnn.save_weights(module, tmp_path / "weights")
    weights = c.load(tmp_path / "weights")
    own, x = c.stream(weights), torch.randn(1, 1)
    assert_same(c.step(own, x, 1009), Stream(module).step(x))
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


def test_descriptions_are_written_as_long_as_a_program_has_them(c: Library, tmp_path: Path) -> None:
    """A program of a later header has longer records: what it knows beyond the library's is zero."""
    file = GRU_FILE.read_bytes()
    held = ctypes.create_string_buffer(file, len(file) + 8)
    at = (ctypes.addressof(held) + 7) // 8 * 8
    ctypes.memmove(at, file, len(file))
    own, layer_size = ctypes.sizeof(Description), ctypes.sizeof(Layer)
    n = layer_size // 8 + 1  # words of a longer record
    longer, layers = (
        ctypes.create_string_buffer(b"\xff" * (own + 24)),
        (ctypes.c_uint64 * (2 * n + 1))(*[7] * (2 * n + 1)),
    )
    description = Description.from_buffer(longer)
    description.struct_size, description.layer_size = own + 16, layer_size + 8
    given = ctypes.c_void_p(at), ctypes.c_size_t(len(file)), layers, ctypes.c_int64(2)
    c.call("describe_file", *given, longer)
    assert (description.struct_size, description.layer_size, description.num_layers) == (own + 16, layer_size + 8, 2)
    assert longer.raw[own : own + 24] == bytes(16) + b"\xff" * 8
    assert layers[0] and layers[n - 1] == 0 and layers[n] and layers[2 * n - 1] == 0 and layers[2 * n] == 7
    size, weights = ctypes.c_size_t(), ctypes.c_void_p()
    c.call("weights_memory_size", longer, ctypes.byref(size))
    c.call("weights_create", longer, None, ctypes.c_size_t(0), ctypes.byref(weights))
    c.call("weights_describe", weights, longer)
    assert longer.raw[own : own + 24] == bytes(16) + b"\xff" * 8 and not description.layers
    for short in (0, own - 8):
        description.struct_size = short
        assert c.code("weights_describe", weights, longer) == ERRORS["struct_size"]
        assert c.code("describe_file", *given, longer) == ERRORS["struct_size"]
    c.c.fused_rnn_weights_destroy(weights)


def test_memory_that_is_missing_misaligned_or_too_small_is_an_error(c: Library) -> None:
    description, held = described(fused_rnn.GRU(F, H))
    size = ctypes.c_size_t()
    c.call("weights_memory_size", ctypes.byref(description), ctypes.byref(size))
    memory = Guarded((size.value + 63) // 64 * 64 + 4096)
    weights = ctypes.c_void_p()

    def create(at: int | None, bytes_: int) -> int:
        return c.code(
            "weights_create",
            ctypes.byref(description),
            ctypes.c_void_p(at),
            ctypes.c_size_t(bytes_),
            ctypes.byref(weights),
        )

    assert create(None, size.value) == ERRORS["memory_null"]
    assert create(memory.address + 8, size.value) == ERRORS["memory_alignment"]
    assert create(memory.address, size.value - 1) == create(memory.address, 0) == ERRORS["memory_size"]
    assert not weights.value and create(memory.address, size.value) == 0
    rows = ctypes.c_int64(2)
    c.call("stream_memory_size", weights, rows, ctypes.byref(size))
    own, at = ctypes.c_void_p(), Guarded(size.value)
    for address_, bytes_, error in (
        (None, size.value, "memory_null"),
        (at.address + 32, size.value, "memory_alignment"),
        (at.address, size.value - 1, "memory_size"),
    ):
        arguments = weights, rows, ctypes.c_void_p(address_), ctypes.c_size_t(bytes_), ctypes.byref(own)
        assert c.code("stream_create", *arguments) == ERRORS[error] and not own.value


def test_every_argument_of_a_call_is_checked(c: Library, tmp_path: Path) -> None:
    fused_rnn.save_weights(fused_rnn.GRU(F, H), tmp_path / "gru")
    weights = c.load(tmp_path / "gru")
    own, none = c.stream(weights, B), ctypes.c_void_p(0)
    size, result = ctypes.byref(ctypes.c_size_t()), ctypes.byref(ctypes.c_void_p())
    x, y = torch.randn(4, B, F), torch.empty(4, B, H)
    at, to, row, most = address(x), address(y), ctypes.c_int64, ctypes.c_int64
    before = c.step(own, x[0], H)
    state = torch.empty(H)
    c.call("read_state", own, row(0), row(1), address(state), None)

    cases = {
        "description_null": [("weights_memory_size", None, size), ("weights_create", None, None, most(0), result)],
        "weights": [
            ("weights_describe", none, result),
            ("stream_memory_size", none, most(1), size),
            ("stream_create", own, most(1), None, most(0), result),  # is another object
        ],
        "rows": [
            *(("stream_memory_size", weights, most(n), size) for n in (0, -1, (1 << 24) + 1)),
            *(("stream_create", weights, most(n), None, most(0), result) for n in (0, -1, 1 << 62)),
        ],
        "result_null": [
            ("weights_memory_size", ctypes.byref(Description()), None),
            ("stream_memory_size", weights, most(1), None),
            ("stream_create", weights, most(1), None, most(0), None),
            ("weights_describe", weights, None),
            ("weights_load", b"x", None, None),
        ],
        "stream": [
            ("step", none, at, to),
            ("step", weights, at, to),
            ("step", ctypes.c_void_p(own.value + 8), at, to),
            ("chunk", none, most(1), None, at, to),
            ("reset", none, row(0)),
            ("read_state", none, row(0), row(0), None, None),
            ("write_state", none, row(0), row(0), None, None),
        ],
        "x_null": [("step", own, none, to), ("chunk", own, most(2), None, none, to)],
        "y_null": [("step", own, at, none), ("chunk", own, most(2), None, at, none)],
        "alignment": [
            ("step", own, ctypes.c_void_p(at.value + 2), to),
            ("step", own, at, ctypes.c_void_p(to.value + 1)),
            ("chunk", own, most(2), None, at, ctypes.c_void_p(to.value + 2)),
            ("chunk", own, most(2), ctypes.c_void_p(to.value + 4), at, to),
            ("read_state", own, row(0), row(0), ctypes.c_void_p(to.value + 2), None),
        ],
        "overlap": [
            ("chunk", own, most(2), None, to, to),
            ("chunk", own, most(2), None, ctypes.c_void_p(to.value + 8), to),
        ],
        "steps": [("chunk", own, most(n), None, at, to) for n in (0, -1, 1 << 33, 1 << 62)],
        "lengths": [
            ("chunk", own, most(2), (ctypes.c_int64 * B)(*lengths), at, to)
            for lengths in ([1, 3, 0], [-1, 0, 0], [0, 0, 1 << 62])
        ],
        "layer": [("read_state", own, row(n), row(0), None, None) for n in (-1, 1, 1 << 62)],
        "row": [
            *(("write_state", own, row(0), row(n), None, None) for n in (-1, B, 1 << 62)),
            *(("reset", own, row(n)) for n in (-2, B)),
        ],
        "state": [("read_state", own, row(0), row(0), None, to), ("write_state", own, row(0), row(0), None, to)],
        "path_null": [("weights_load", None, None, result)],
        "file_open": [("weights_load", str(tmp_path / "nothing").encode(), None, result)],
        "file_read": [("weights_load", str(tmp_path).encode(), None, result)],
        "instruction_set": [("weights_load", str(tmp_path / "gru").encode(), b"", result)],
    }
    for error, calls in cases.items():
        for name, *arguments in calls:
            assert c.text(c.code(name, *arguments)) == c.text(ERRORS[error]), (error, name)
    # Whatever was asked has changed nothing.
    now = torch.empty(H)
    c.call("read_state", own, row(0), row(1), address(now), None)
    assert_same(now, state)
    assert_same(now, before[1])
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)
    c.c.fused_rnn_stream_destroy(none)
    c.c.fused_rnn_weights_destroy(none)


def test_a_result_may_be_the_next_input_of_a_few_rows(c: Library, tmp_path: Path) -> None:
    module = fused_rnn.GRU(H, H)
    fused_rnn.save_weights(module, tmp_path / "weights")
    weights = c.load(tmp_path / "weights")
    for rows in (64, 65):
        own, twin, x = c.stream(weights, rows), Stream(module, rows), torch.randn(rows, H)
        expected = twin.step(x)
        error = c.code("step", own, address(x), address(x))
        assert error == (0 if rows == 64 else ERRORS["overlap"])
        if rows == 64:
            assert_same(x, expected)
        c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


def test_a_second_thread_in_a_stream_gets_an_error(c: Library, tmp_path: Path) -> None:
    fused_rnn.save_weights(fused_rnn.LSTM(64, 256), tmp_path / "weights")
    weights = c.load(tmp_path / "weights")
    own = c.stream(weights, 4)
    x = torch.randn(2000, 4, 64)
    y, long_y, codes = torch.empty(4, 256), torch.empty(2000, 4, 256), set()

    def until_it_had_its_turn() -> None:
        while c.code("chunk", own, ctypes.c_int64(2000), None, address(x), address(long_y)):
            pass

    long = threading.Thread(target=until_it_had_its_turn)
    long.start()
    while long.is_alive():
        codes.add(c.code("step", own, address(x), address(y)))
    long.join()
    assert ERRORS["in_use"] in codes and codes <= {0, ERRORS["in_use"]}
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)
