"""Files of weights of the C library: those of the package are read, and all that is wrong is refused."""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.c_library import (
    CORPUS,
    ERRORS,
    GRU_FILE,
    ROOT,
    SANITIZE,
    SOURCES,
    Description,
    Layer,
    Library,
    compiled,
    made,
    run,
)
from torch import nn

import fused_rnn
from fused_rnn import saving

pytestmark = pytest.mark.kernels


def contents(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def describe(c: Library, file: bytes, capacity: int = 64) -> tuple[int, Description]:
    held = ctypes.create_string_buffer(len(file) + 16)
    at = (ctypes.addressof(held) + 7) // 8 * 8
    ctypes.memmove(at, file, len(file))
    description, layers = Description(), (Layer * 64)()
    given = ctypes.c_void_p(at), ctypes.c_size_t(len(file)), layers, ctypes.c_int64(capacity)
    error = c.code("describe_file", *given, ctypes.byref(description))
    description.held = held
    return error, description


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    file = path.read_bytes()
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def test_files_are_those_that_the_package_writes_today(c: Library) -> None:
    assert len(CORPUS) == 5
    for path in CORPUS:
        header, data = parts(path)
        assert describe(c, path.read_bytes())[0] == describe(c, contents(header, data))[0] == 0
        metadata = header["__metadata__"]
        module = fused_rnn.LSTM(2, 3) if metadata["cell"] == "lstm" else fused_rnn.GRU(2, 3)
        assert set(metadata) == set(saving._metadata(fused_rnn.stream.StreamDescription(module, None)))
    error, description = describe(c, GRU_FILE.read_bytes())
    assert (description.cell, description.dtype, description.num_layers, description.num_heads) == (3, 3, 2, 2)
    assert error == 0 and bool(description.layers[1].bias_hh)


def changed_metadata(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["__metadata__"].update(values)


def changed_tensor(name: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[name].update(values)


def swapped(header: dict[str, Any]) -> None:
    """Two tensors of one size in one place; nothing in that of the second."""
    header["weight_hh_l0"]["data_offsets"] = header["weight_hh_l1"]["data_offsets"]


WRONG_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no metadata": (lambda h: h.pop("__metadata__"), "file_metadata"),
    "a key is missing": (lambda h: h["__metadata__"].pop("zoneout"), "file_metadata"),
    "a key too many": (changed_metadata(author="me"), "file_metadata"),
    "another format": (changed_metadata(format="pt"), "file_metadata"),
    "another version": (changed_metadata(format_version="2"), "file_version"),
    "no version": (changed_metadata(format_version="0"), "file_version"),
    "metadata that is no text": (changed_metadata(num_layers=2), "file_header"),
    "unknown cell": (changed_metadata(cell="sru"), "file_metadata"),
    "unknown dtype": (changed_metadata(dtype="float16"), "file_metadata"),
    "unknown activation": (changed_metadata(activation="elu"), "file_metadata"),
    "flag": (changed_metadata(layer_norm="2"), "file_metadata"),
    "negative": (changed_metadata(num_layers="-2"), "file_metadata"),
    "space": (changed_metadata(num_layers="2 "), "file_metadata"),
    "leading zero": (changed_metadata(num_layers="02"), "file_metadata"),
    "empty": (changed_metadata(num_layers=""), "file_metadata"),
    "overflow": (changed_metadata(num_layers="18446744073709551618"), "file_metadata"),
    "beyond 63 bits": (changed_metadata(num_layers="9223372036854775808"), "file_metadata"),
    "biases": (changed_metadata(biases="3"), "file_metadata"),
    "no recurrent bias of a GRU": (changed_metadata(biases="1"), "bias"),
    "decimal": (changed_metadata(zoneout="0.1"), "file_metadata"),
    "short": (changed_metadata(zoneout="0x1.8p-4"), "file_metadata"),
    "capitals": (changed_metadata(zoneout="0x1.999999999999Ap-4"), "file_metadata"),
    "infinite": (changed_metadata(zoneout="inf"), "file_metadata"),
    "exponent": (changed_metadata(zoneout="0x1.0000000000000p+1024"), "file_metadata"),
    "minus zero": (changed_metadata(zoneout="0x1.0000000000000p-0"), "file_metadata"),
    "too many layers": (changed_metadata(num_layers="65"), "num_layers"),
    "one layer less": (changed_metadata(num_layers="1"), "file_tensor_name"),
    "one layer more": (changed_metadata(num_layers="3"), "file_tensor_missing"),
    "huge": (changed_metadata(hidden_size="4611686018427387904"), "hidden_size"),
    "other heads": (changed_metadata(num_heads="4"), "file_tensor_shape"),
    "zoneout of c": (changed_metadata(zoneout_cell="0x1.0000000000000p-1"), "zoneout_cell"),
    "a tensor too many": (lambda h: h.update(other=h["bias_hh_l0"]), "file_tensor_name"),
    "a tensor of an option": (lambda h: h.update(weight_hr_l0=h["bias_hh_l0"]), "file_tensor_name"),
    "layer 00": (lambda h: h.update(weight_ih_l00=h.pop("weight_ih_l0")), "file_tensor_name"),
    "layer without number": (lambda h: h.update(weight_ih_l=h.pop("weight_ih_l0")), "file_tensor_name"),
    "a tensor is missing": (lambda h: h.pop("bias_ih_l1"), "file_tensor_missing"),
    "dtype of a tensor": (changed_tensor("weight_ih_l0", dtype="F16"), "file_tensor_dtype"),
    "one dimension more": (changed_tensor("bias_ih_l0", shape=[12, 1]), "file_tensor_shape"),
    "three dimensions": (changed_tensor("weight_ih_l0", shape=[12, 3, 1]), "file_tensor_shape"),
    "no dimension": (changed_tensor("bias_ih_l0", shape=[]), "file_tensor_shape"),
    "transposed": (changed_tensor("weight_ih_l0", shape=[3, 12]), "file_tensor_shape"),
    "shape that overflows": (changed_tensor("weight_ih_l0", shape=[12, (1 << 64) + 3]), "file_header"),
    "beyond the data": (changed_tensor("bias_ih_l0", data_offsets=[1 << 40, (1 << 40) + 24]), "file_offsets"),
    "offsets that wrap": (changed_tensor("bias_ih_l0", data_offsets=[(1 << 64) - 16, 8]), "file_offsets"),
    "backwards": (changed_tensor("bias_ih_l0", data_offsets=[24, 0]), "file_offsets"),
    "too short": (changed_tensor("bias_ih_l0", data_offsets=[0, 22]), "file_offsets"),
    "one offset": (changed_tensor("bias_ih_l0", data_offsets=[0]), "file_header"),
    "three offsets": (changed_tensor("bias_ih_l0", data_offsets=[0, 24, 24]), "file_header"),
    "offset of 65 bits": (changed_tensor("bias_ih_l0", data_offsets=[0, 1 << 64]), "file_header"),
    "negative offset": (changed_tensor("bias_ih_l0", data_offsets=[-24, 0]), "file_header"),
    "fraction": (changed_tensor("bias_ih_l0", data_offsets=[0.0, 24.0]), "file_header"),
    "a key of a tensor too many": (changed_tensor("bias_ih_l0", strides=[1]), "file_header"),
    "a key of a tensor is missing": (lambda h: h["bias_ih_l0"].pop("shape"), "file_header"),
    "two tensors in one place": (swapped, "file_offsets"),
    "deep": (changed_tensor("bias_ih_l0", shape=[[[[12]]]]), "file_header"),
    "a tensor that is none": (lambda h: h.update(bias_ih_l0=1), "file_header"),
}


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_a_wrong_header_is_an_error(name: str, c: Library) -> None:
    change, error = WRONG_HEADERS[name]
    header, data = parts(GRU_FILE)
    change(header)
    assert c.text(describe(c, contents(header, data))[0]) == c.text(ERRORS[error])


def test_bytes_that_are_no_header_are_errors(c: Library) -> None:
    header, data = parts(GRU_FILE)
    good = json.dumps(header).encode()
    tensor = b'"bias_ih_l0":' + json.dumps(header["bias_ih_l0"]).encode()
    metadata = b'"__metadata__":' + json.dumps(header["__metadata__"]).encode()
    for text in (
        b"",
        b" " + good,
        b"[" + good + b"]",
        b"{}",
        b"{" + metadata,
        b"{" + metadata + b",}",
        b"{" + metadata + b"}x",
        b"{" + metadata + b"}\0",
        b"{" + metadata + b"," + metadata + b"}",
        b"{" * 100000,
        b'{"a' + b"[" * 100000,
        good.replace(b'"gru"', b'"g\\u0072u"'),
        good.replace(b'"gru"', b'"gr\xc3"'),
        good.replace(b'"gru"', b'"gr\xff"'),
        good.replace(b'"gru"', b'"gr\n"'),
        good.replace(b'"gru"', b'"gru'),
        good.replace(b'"gru"', b"gru"),
        good.replace(b'"gru"', b"null"),
        good.replace(b'"cell":', b'"cell"'),
        good.replace(b'"dtype": "BF16"', b'"dtype": "BF16", "dtype": "BF16"', 1),
        good.replace(b"[12]", b"[012]"),
        good.replace(b"[12]", b"[12,]"),
        good.replace(b"[12]", b"[+12]"),
        good.replace(b"[12]", b"[1e1]"),
        good.replace(b"[12]", b"[12"),
    ):
        assert describe(c, contents(text, data))[0] in (ERRORS["file_header"], ERRORS["file_metadata"]), text[:80]
    twice = good[:-1] + b"," + tensor + b"}"
    assert describe(c, contents(twice, data))[0] == ERRORS["file_tensor_twice"]
    key_twice = good.replace(b'"cell": "gru"', b'"cell": "gru", "cell": "gru"')
    assert describe(c, contents(key_twice, data))[0] == ERRORS["file_metadata"]
    spread = good.replace(b",", b" ,\n\t").replace(b":", b" : ")
    assert describe(c, contents(spread, data))[0] == 0


def test_lengths_of_files_are_checked(c: Library) -> None:
    file = GRU_FILE.read_bytes()
    header, data = parts(GRU_FILE)
    for end in range(len(file)):
        assert describe(c, file[:end])[0] in (ERRORS["file_size"], ERRORS["file_offsets"])
    assert describe(c, file + b"\0")[0] == ERRORS["file_offsets"]
    for length in (0, 1, len(file) - 7, 1 << 22, (1 << 22) + 1, 1 << 63, (1 << 64) - 8, (1 << 64) - 1):
        assert describe(c, contents(header, data, length))[0] in (ERRORS["file_size"], ERRORS["file_header"])
    for capacity in (-1, 0, 1):
        assert describe(c, file, capacity)[0] == ERRORS["capacity"]
    assert describe(c, file, 2)[0] == 0
    result = ctypes.byref(Description())
    given = (Layer * 2)(), ctypes.c_int64(2), result
    buffer = ctypes.create_string_buffer(file)
    assert c.code("describe_file", None, ctypes.c_size_t(len(file)), *given) == ERRORS["data_null"]
    odd = ctypes.c_void_p(ctypes.addressof(buffer) // 8 * 8 + 4)
    assert c.code("describe_file", odd, ctypes.c_size_t(8), *given) == ERRORS["data_alignment"]


def test_modules_and_dtypes_that_cannot_be_saved_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, dtype, message in (
        (fused_rnn.LSTM(2, 3, bidirectional=True), None, "bidirectional"),
        (fused_rnn.GRU(2, 3, reset_after=False), None, "reset_after"),
        (fused_rnn.LSTM(2, 3), torch.float16, "dtype: expected one of"),
        (fused_rnn.RNN(1, 1, 65), None, "at most 64 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_rnn.save_weights(module, tmp_path / "file", dtype)
    with pytest.raises(TypeError, match="module"):
        fused_rnn.save_weights(nn.Linear(2, 3), tmp_path / "file")
    with pytest.raises(OSError):
        fused_rnn.save_weights(fused_rnn.LSTM(2, 3), tmp_path / "no" / "file")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        fused_rnn.save_weights(fused_rnn.LSTM(2, 3), tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.compiles
def test_changed_files_are_refused_or_right(tmp_path: Path) -> None:
    """Ten seconds of them under the sanitizers; `make fuzz` takes longer."""
    program = build_fuzz(tmp_path)
    result = run(program, 10, 1, *CORPUS)
    assert result.returncode == 0, result.stdout + result.stderr
    found = {int(number): int(count) for number, count in re.findall(r"^(\d+) (\d+) ", result.stdout, re.MULTILINE)}
    tried = int(re.search(r"tried (\d+)", result.stdout)[1])
    assert tried == sum(found.values()) and tried > 10000
    # Some stay right, and each kind of fault of a file is met.
    names = ("size", "header", "metadata", "tensor_name", "tensor_twice", "tensor_missing", "tensor_dtype", "offsets")
    assert {0, *(ERRORS[f"file_{name}"] for name in (*names, "tensor_shape", "version"))} <= set(found)


def build_fuzz(folder: Path) -> Path:
    library = [ROOT / f"csrc/library/{name}.cpp" for name in ("file", "description", "errors")]
    compiled(
        *("g++", "-std=c++17", *SANITIZE, f"-I{ROOT}/include", f"-I{ROOT}/csrc", SOURCES / "fuzz_file.cpp", *library),
        *("-o", folder / "fuzz_file"),
    )
    return folder / "fuzz_file"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda tensors, metadata: tensors.pop("scale_hh_l0"), "file_tensor_missing"),
        (lambda tensors, metadata: tensors.update(scale_ih_l0=torch.ones(3)), "file_tensor_shape"),
        (lambda tensors, metadata: tensors.update(scale_hr_l0=torch.ones(3)), "file_tensor_name"),
        (lambda tensors, metadata: tensors.update(weight_ih_l0=tensors["weight_ih_l0"].float()), "file_tensor_dtype"),
        (lambda tensors, metadata: metadata.update(matrices="same"), "file_tensor_name"),
        (lambda tensors, metadata: metadata.update(matrices="int4"), "file_metadata"),
        (lambda tensors, metadata: metadata.pop("matrices"), "file_metadata"),
        (lambda tensors, metadata: metadata.update(dtype="bfloat16"), "matrix_format"),
        (lambda tensors, metadata: tensors["weight_hh_l1"].view(-1)[-1:].fill_(-128), "int8_range"),
    ],
)
def test_files_of_quantized_layers_that_are_wrong(change: Any, error: str, c: Library, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    fused_rnn.save_weights(fused_rnn.quantize(made("gru").eval()), tmp_path / "weights")
    with safe_open(tmp_path / "weights", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, tmp_path / "changed", metadata)
    with pytest.raises(RuntimeError, match="^" + re.escape(c.text(ERRORS[error])) + "$"):
        c.load(tmp_path / "changed")


def test_the_version_of_the_format_is_the_same_on_both_sides() -> None:
    source = (ROOT / "csrc/library/file.cpp").read_text()
    assert f'value == "{saving.FORMAT}"' in source and f"metadata.version != {saving.FORMAT_VERSION}" in source
    header = (ROOT / "include/fused_rnn.h").read_text()
    assert f"FUSED_RNN_MOST_LAYERS {saving._MOST_LAYERS}\n" in header
    assert "FUSED_RNN_MOST_FEATURES (1 << 20)" in header and saving._MOST_FEATURES == 1 << 20
