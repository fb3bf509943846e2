"""`python -m fused_rnn`: what info prints, what check finds, and their exit statuses."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from support.backends import available_isas
from torch.utils._pytree import tree_leaves

import fused_rnn
from fused_rnn import backend, check, formulas, info


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fused_rnn", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )


@pytest.mark.kernels
def test_info_names_versions_and_instruction_sets() -> None:
    result = command("info")
    assert result.returncode == 0, result.stderr
    for word in (fused_rnn.__version__, torch.__version__, *available_isas(), "int8 products:"):
        assert word in result.stdout


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("dots", "tiles", "said"),
    [
        (False, False, "without dot products"),
        (True, False, "dot products of bytes"),
        (True, True, "AMX tiles from 16 rows on"),
    ],
)
def test_info_says_how_int8_is_multiplied(monkeypatch: pytest.MonkeyPatch, dots: bool, tiles: bool, said: str) -> None:
    monkeypatch.setattr("fused_rnn._C.multiplies_bytes", lambda: dots)
    monkeypatch.setattr("fused_rnn._C.multiplies_bytes_on_tiles", lambda: tiles)
    found = info.collect()["int8_products"]
    assert said in found and ("AMX" in found) == tiles


def test_unknown_command_is_refused_with_the_known_ones() -> None:
    result = command("nonsense")
    assert result.returncode == 2
    for word in ("info", "check", "bench"):
        assert word in result.stderr


@pytest.mark.kernels
def test_check_passes_here_and_shows_every_instruction_set_cell_option_and_dtype() -> None:
    result = command("check")
    assert result.returncode == 0, result.stdout + result.stderr
    for word in (*available_isas(), *check.CELLS, *check.OPTIONS, "float32", "float64", "bfloat16", "float16"):
        assert word in result.stdout
    assert "cuda" not in result.stdout or torch.cuda.is_available()
    assert "all within their limits" in result.stdout


@pytest.mark.kernels
def test_check_of_one_instruction_set_refuses_unknown_ones() -> None:
    result = command("check", "--isa", "abacus")
    assert result.returncode == 2
    assert "--isa: expected one of" in result.stderr
    assert "got abacus" in result.stderr


# The extension reads the variable when it is loaded; PyTorch, which takes long, is loaded once for all processes.
FORCED = """
import os, sys, torch
for isa in sys.argv[1:]:
    if os.fork() == 0:
        os.environ["FUSED_RNN_ISA"] = isa
        from fused_rnn import _C
        print(_C.isa_used(), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.kernels
def test_environment_forces_the_instruction_set() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FORCED, *available_isas()], capture_output=True, text=True, timeout=300
    )
    assert tuple(result.stdout.split()) == available_isas(), result.stderr


@pytest.mark.kernels
def test_unknown_instruction_set_is_refused_with_the_known_ones() -> None:
    from fused_rnn import _C

    before = _C.isa_used()
    with pytest.raises(ValueError, match=r"isa: expected one of .*portable.*got abacus"):
        _C.set_isa("abacus")
    assert _C.isa_used() == before


@pytest.mark.parametrize("variable", ["FUSED_RNN_BACKEND", pytest.param("FUSED_RNN_ISA", marks=pytest.mark.kernels)])
def test_unknown_name_in_the_environment_is_an_error_that_shows_it(variable: str) -> None:
    program = "import torch, fused_rnn; fused_rnn.GRU(2, 2)(torch.zeros(1, 1, 2))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {variable: "abacus"},
    )
    assert result.returncode != 0
    assert "abacus" in result.stderr
    assert "expected one of" in result.stderr


@pytest.mark.kernels
def test_wrong_numbers_fail_the_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = list(itertools.islice(check.calls(), 2))
    monkeypatch.setattr(check, "calls", lambda: iter(few))
    honest = check.Call.run

    def wrong(self: check.Call, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        results = honest(self, module)
        if next(module.parameters()).dtype == torch.float32:
            results["grad(input)"] = results["grad(input)"] * 1.001
        return results

    monkeypatch.setattr(check.Call, "run", wrong)
    assert check.main(["--isa", available_isas()[0]]) == 1
    assert "grad(input)" in capsys.readouterr().out


def without_option(call: check.Call) -> Any:
    """A layer of the same parameters and arguments that does not look at the option."""
    cell = "RNN_TANH" if call.cell.startswith("RNN") else call.cell
    with_parameters = tuple(word for word in (("peephole", True), ("layer_norm", True)) if word in call.keywords)
    keywords = call.keywords if call.option == "IndRNN" else with_parameters
    layer: Any = dataclasses.replace(call, cell=cell, keywords=keywords).build()
    if call.option == "IndRNN":  # no unit sees its own h
        for name, parameter in layer.named_parameters():
            if "weight_hh" in name:
                torch.nn.init.zeros_(parameter)
    if call.option == "peephole":
        for name, parameter in layer.named_parameters():
            if "peephole" in name:
                torch.nn.init.zeros_(parameter)
    plain = layer.forward
    if call.option == "layer_norm":

        def forward(*args: Any, **steps: Any) -> Any:
            def gain_alone(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
                return x * gain if bias is None else x * gain + bias

            with mock.patch.object(formulas, "layer_norm", gain_alone), fused_rnn.use_backend("reference"):
                return plain(*args, **steps)

        layer.forward = forward
    if call.option == "reset":
        layer.forward = lambda x, reset, **steps: plain(x, reset=torch.zeros_like(reset), **steps)
    if call.option == "return_states":
        of_all_steps = layer.forward

        def of_the_last_alone(x: Any, **steps: Any) -> Any:
            output, final, states = of_all_steps(x, **steps)
            every = [f.unsqueeze(1).expand_as(s) for f, s in zip(*map(tree_leaves, (final, states)), strict=True)]
            return output, final, tuple(every)

        layer.forward = of_the_last_alone
    return layer


@pytest.mark.kernels
@pytest.mark.parametrize("option", [option for option in check.OPTIONS if option not in check.CUDA_ALONE])
def test_an_option_that_kernels_do_not_see_fails_every_call_of_it(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [call for call in check.calls() if call.option == option and call.dtype == torch.float32]
    assert {call.cell for call in chosen} == {cell for cell, _ in check.OPTIONS[option]}
    monkeypatch.setattr(check, "calls", lambda: iter(chosen))
    isa = available_isas()[0]
    worst, failures = check.check([isa])
    assert list(worst) == [(isa, option, torch.float32)] and not failures
    honest = check.Call.run

    def blind(self: check.Call, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return honest(self, without_option(self) if backend.current_backend() == "fused" else module)

    monkeypatch.setattr(check.Call, "run", blind)
    _, failures = check.check([isa])
    assert {failure.call for failure in failures} == set(chosen)
    assert all("is off by" in failure.what for failure in failures)


@pytest.mark.kernels
def test_check_leaves_out_on_cuda_what_is_drawn_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [call for call in check.calls() if call.dtype == torch.float32 and call.cell == "GRU"]
    chosen = [call for call in chosen if call.option not in check.CUDA_ALONE]  # the CPU stands in for a GPU here
    monkeypatch.setattr(check, "calls", lambda: iter(chosen))
    monkeypatch.setattr(check, "_kernels", lambda target: contextlib.nullcontext("cpu"))
    monkeypatch.setattr("fused_rnn._C.build_info", lambda: {"cuda": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check.main(["--isa", "cuda"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split()[1] for line in printed.splitlines() if line.startswith("cuda")]
    drawn = [call for call in chosen if call.training and call.option in ("recurrent_dropout", "zoneout")]
    assert drawn
    assert set(rows) == {call.option or "GRU" for call in chosen if call not in drawn}
    assert (
        "not on cuda, whose draws the reference does not have: recurrent_dropout, zoneout in training mode" in printed
    )
    assert f"{len(chosen) - len(drawn)} calls" in printed


def test_scaled_error_measures_in_epsilons_of_the_largest_value() -> None:
    reference = torch.tensor([1.0, -4.0, 0.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert check.scaled_error(reference.float(), reference) == 0.0
    off = (reference + torch.tensor([0.0, 0.0, 8 * eps], dtype=torch.float64)).float()
    assert check.scaled_error(off, reference) == pytest.approx(2.0)
    assert not check.scaled_error(torch.tensor([float("nan"), 0, 0]), reference) <= 1e9
    assert check.scaled_error(torch.ones(2), torch.zeros(2, dtype=torch.float64)) > 1e9
    assert check.scaled_error(torch.zeros(0), torch.zeros(0, dtype=torch.float64)) == 0.0
    with pytest.raises(ValueError, match=r"actual: expected shape \(3,\), got \(2,\)"):
        check.scaled_error(torch.zeros(2), reference)


def test_small_integers_compute_exactly_in_every_dtype() -> None:
    results = []
    for dtype in check.DTYPES:
        layer = check.fill_with_small_integers_(fused_rnn.RNN(5, 9, num_layers=3, nonlinearity="relu", dtype=dtype))
        sequence = check.random_values((12, 3, 5), integers=True, generator=torch.Generator().manual_seed(0))
        results.append(layer(sequence.to(dtype))[0].double())
    assert results[0].max() > 1
    for result in results[1:]:
        assert torch.equal(result, results[0])
