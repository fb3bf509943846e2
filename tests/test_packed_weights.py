"""Packed weights kept between inference calls: never those of another moment, never more than the limit."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import io
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case
from support.compare import assert_same
from torch import Tensor, nn

import fused_rnn
from fused_rnn import packed_weights

pytestmark = pytest.mark.kernels

SECONDS = 60
# Enough rows for both matrices to be packed, enough weights to be kept: 4 * 96 * (40 + 96) * 4 bytes are 204 KiB, and
# twice that for two directions.
CASE = Case(input_size=40, hidden_size=96, batch=60, steps=5, bidirectional=True)


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    before = packed_weights.limit()
    packed_weights.clear()
    yield
    packed_weights.set_limit(before)
    packed_weights.clear()


def outputs(module: nn.Module, sequence: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        output, states = module(sequence)
    return {"output": output, "h_n": states[0] if isinstance(states, tuple) else states}


def fresh(module: nn.Module, sequence: Tensor) -> dict[str, Tensor]:
    """The same results without anything kept: of a call that records gradients, which always packs."""
    with torch.enable_grad():
        output, states = module(sequence.clone().requires_grad_())
    return {"output": output.detach(), "h_n": (states[0] if isinstance(states, tuple) else states).detach()}


def kept(module: nn.Module, sequence: Tensor) -> None:
    """Call until the weights of the module are kept."""
    for _ in range(3):
        outputs(module, sequence)
    assert packed_weights.held() > 0


def module_and_input(case: Case = CASE) -> tuple[nn.Module, Tensor]:
    module, sequence = case.build(fused_rnn), case.data().sequence.detach()
    return module, sequence


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_kept_weights_give_the_bits_of_packed_ones(cell: str, dtype: torch.dtype, isa: str) -> None:
    case = CASE.replace(cell=cell, dtype=dtype, hidden_size=250, num_layers=2)
    module, sequence = module_and_input(case)
    expected = fresh(module, sequence)
    kept(module, sequence)
    assert_same(outputs(module, sequence), expected)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_of_few_rows_the_recurrent_weights_alone_are_kept(cell: str, dtype: torch.dtype, isa: str) -> None:
    """The others are read where they stand."""
    case = CASE.replace(cell=cell, dtype=dtype, input_size=200, hidden_size=300, batch=5)
    module, sequence = module_and_input(case)
    expected = fresh(module, sequence)
    kept(module, sequence)
    assert_same(outputs(module, sequence), expected)
    matrix = module.weight_hh_l0
    one = matrix.numel() * (8 if dtype == torch.float64 else 4)
    assert 2 * one <= packed_weights.held() < 2.5 * one
    with torch.no_grad():
        module.weight_ih_l0.data[3, 5] += 1
    assert_same(outputs(module, sequence), fresh(module, sequence))


def test_a_projection_is_kept_too() -> None:
    module, sequence = module_and_input(CASE.replace(proj=True))
    kept(module, sequence)
    with torch.no_grad():
        module.weight_hr_l0_reverse.data[3, 5] += 1
    assert_same(outputs(module, sequence), fresh(module, sequence))


# ---- every way in which a weight can change -----------------------------------------------------------------------


def _step(optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(module.parameters(), lr=0.1, **options).step()

    return change


def _data(module: nn.Module) -> None:
    module.weight_hh_l0.data.mul_(0.5)


def _one_bit(module: nn.Module) -> None:
    module.weight_ih_l0.data.view(torch.int32)[-1, -1] ^= 1 << 22  # a lower one may be lost in rounding


def _signs(module: nn.Module) -> None:
    module.weight_hh_l0.data.neg_()


def _swapped_rows(module: nn.Module) -> None:
    module.weight_hh_l0.data.copy_(module.weight_hh_l0.data.flip(0))


def _other_data(module: nn.Module) -> None:
    module.weight_hh_l0.data = torch.randn_like(module.weight_hh_l0)


def _no_grad(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight_hh_l0.add_(0.25)


def _copy(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight_ih_l0_reverse.copy_(torch.randn_like(module.weight_ih_l0_reverse))


def _load(module: nn.Module) -> None:
    module.load_state_dict({name: torch.randn_like(value) for name, value in module.state_dict().items()})


def _load_assigned(module: nn.Module) -> None:
    values = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
    module.load_state_dict(values, assign=True)


def _numpy(module: nn.Module) -> None:
    pytest.importorskip("numpy")
    module.weight_hh_l0.detach().numpy()[7, 7] = 2.0


def _set(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight_hh_l0.set_(torch.randn_like(module.weight_hh_l0))


def _new_parameter(module: nn.Module) -> None:
    module.weight_hh_l0 = nn.Parameter(torch.randn_like(module.weight_hh_l0))


def _storage(module: nn.Module) -> None:
    module.weight_hh_l0.untyped_storage().copy_(torch.randn_like(module.weight_hh_l0).untyped_storage())


def _inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        module.weight_hh_l0.mul_(1.5)


def _through_the_converted_twin(module: nn.Module) -> None:
    fused_rnn.revert(copy.copy(module), inplace=False)
    twin = fused_rnn.convert(nn.Sequential(nn.LSTM(2, 3)))  # unrelated: converting something must not matter
    assert twin is not None
    module.weight_ih_l0.data[0, 0] = -1.0


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "SGD": _step(torch.optim.SGD),
    "fused Adam": _step(torch.optim.Adam, fused=True),
    "foreach AdamW": _step(torch.optim.AdamW, foreach=True),
    "data": _data,
    "one bit": _one_bit,
    "signs": _signs,
    "rows exchanged": _swapped_rows,
    "other data": _other_data,
    "no_grad": _no_grad,
    "copy_": _copy,
    "load_state_dict": _load,
    "load_state_dict, assigned": _load_assigned,
    "NumPy": _numpy,
    "set_": _set,
    "new parameter": _new_parameter,
    "storage": _storage,
    "inference mode": _inference_mode,
    "convert": _through_the_converted_twin,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_is_packed_anew(change: Callable[[nn.Module], None]) -> None:
    module, sequence = module_and_input()
    kept(module, sequence)
    before = outputs(module, sequence)
    change(module)
    found = outputs(module, sequence)
    assert not torch.equal(found["output"], before["output"])
    assert_same(found, fresh(module, sequence))
    assert_same(outputs(module, sequence), found)


def test_weights_that_change_in_every_call_are_right_every_time() -> None:
    module, sequence = module_and_input()
    kept(module, sequence)
    for _ in range(40):
        module.weight_hh_l0.data.mul_(-1.01)
        assert_same(outputs(module, sequence), fresh(module, sequence))
    for _ in range(300):  # and once they stay, they are kept again
        outputs(module, sequence)
    assert packed_weights.held() > 0
    assert_same(outputs(module, sequence), fresh(module, sequence))


def test_weights_there_and_back_again() -> None:
    module, sequence = module_and_input()
    kept(module, sequence)
    first, saved = outputs(module, sequence), module.weight_hh_l0.detach().clone()
    module.weight_hh_l0.data.zero_()
    second = outputs(module, sequence)
    module.weight_hh_l0.data.copy_(saved)
    assert_same(outputs(module, sequence), first)
    assert not torch.equal(second["output"], first["output"])


def test_another_module_at_the_same_addresses() -> None:
    """Storage that is reused on purpose: what an allocator may do with freed weights."""
    module, sequence = module_and_input()
    pool = {name: value.detach().clone() for name, value in module.state_dict().items()}

    def build(seed: int) -> nn.Module:
        made = CASE.build(fused_rnn, seed=seed)
        for name, parameter in made.named_parameters():
            pool[name].copy_(parameter.detach())
            parameter.data = pool[name]
        return made

    for seed in range(4):
        made = build(seed)
        kept(made, sequence)
        assert_same(outputs(made, sequence), fresh(made, sequence))
        del made
        gc.collect()


def test_freed_and_allocated_again() -> None:
    sequence = CASE.data().sequence.detach()
    for seed in range(8):
        module = CASE.build(fused_rnn, seed=seed)
        for _ in range(3):
            assert_same(outputs(module, sequence), fresh(module, sequence))
        del module
        gc.collect()


def test_another_dtype_and_back() -> None:
    module, sequence = module_and_input()
    kept(module, sequence)
    module.to(torch.float64)
    kept(module, sequence.double())
    assert_same(outputs(module, sequence.double()), fresh(module, sequence.double()))
    module.to(torch.float32)
    assert_same(outputs(module, sequence), fresh(module, sequence))


def test_other_shapes_over_the_same_storage() -> None:
    pool = torch.randn(4 * 128 * 256)
    sequences = {size: torch.randn(5, 4, size) for size in (256, 128)}
    for size in (256, 128, 256, 128):
        params = [pool[: 4 * 128 * size].view(512, size), torch.randn(512, 128)]
        for _ in range(3):
            with torch.no_grad():
                found = fused_rnn.functional.lstm(sequences[size], None, params, bias=False)[0]
                packed_weights.clear()
                assert torch.equal(found, fused_rnn.functional.lstm(sequences[size], None, params, bias=False)[0])


@pytest.mark.parametrize("wrap", [fused_rnn.convert, fused_rnn.revert], ids=["convert", "revert"])
def test_modules_that_share_parameters(wrap: Any) -> None:
    module, sequence = module_and_input()
    kept(module, sequence)
    other = wrap(nn.Sequential(module), inplace=True)[0]
    with torch.no_grad():
        other.weight_hh_l0.add_(0.5)
    again = fused_rnn.convert(nn.Sequential(other))[0]
    assert again.weight_hh_l0 is other.weight_hh_l0
    assert_same(outputs(again, sequence), fresh(again, sequence))


def test_pickled_and_copied_modules_bring_nothing_along() -> None:
    module, sequence = module_and_input()
    kept(module, sequence)
    held = packed_weights.held()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    assert len(buffer.getvalue()) < 1.5 * sum(p.numel() * 4 for p in module.parameters())
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=False), copy.deepcopy(module)):
        twin.weight_hh_l0.data.neg_()
        assert_same(outputs(twin, sequence), fresh(twin, sequence))
    assert packed_weights.held() == held


# ---- threads and processes ----------------------------------------------------------------------------------------


def test_several_threads_while_weights_change_between_their_calls(threads: None) -> None:
    torch.set_num_threads(2)
    module, sequence = module_and_input()
    versions = [module.weight_hh_l0.detach() * factor for factor in (1.0, -0.5, 0.25)]
    expected = []
    for version in versions:
        module.weight_hh_l0.data.copy_(version)
        torch.set_num_threads(1)
        expected.append(fresh(module, sequence))
        torch.set_num_threads(2)
    rounds, count = 12, 4
    gate = threading.Barrier(count + 1)

    def worker() -> None:
        for i in range(rounds):
            gate.wait(SECONDS)
            found = [outputs(module, sequence) for _ in range(3)]
            gate.wait(SECONDS)
            for result in found:
                torch.testing.assert_close(result["output"], expected[i % 3]["output"], rtol=0, atol=1e-5)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(worker) for _ in range(count)]
        for i in range(rounds):
            module.weight_hh_l0.data.copy_(versions[i % 3])
            gate.wait(SECONDS)
            gate.wait(SECONDS)
        for future in futures:
            future.result(SECONDS)


def _child(module: nn.Module, sequence: Tensor, pipe: Any) -> None:
    module.weight_hh_l0.data.neg_()
    pipe.send((outputs(module, sequence)["output"].tolist(), fresh(module, sequence)["output"].tolist()))


def test_a_forked_child_changes_its_own_weights() -> None:
    module, sequence = module_and_input()
    kept(module, sequence)
    before = outputs(module, sequence)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(module, sequence, there))
    process.start()
    assert here.poll(SECONDS)
    found, expected = here.recv()
    process.join(SECONDS)
    assert found == expected != before["output"].tolist()
    assert_same(outputs(module, sequence), before)


def _write(weight: Tensor) -> None:
    weight.mul_(-1)


def test_another_process_writes_to_shared_weights() -> None:
    module, sequence = module_and_input()
    module.share_memory()
    kept(module, sequence)
    before = outputs(module, sequence)
    process = multiprocessing.get_context("fork").Process(target=_write, args=(module.weight_hh_l0.data,))
    process.start()
    process.join(SECONDS)
    found = outputs(module, sequence)
    assert not torch.equal(found["output"], before["output"])
    assert_same(found, fresh(module, sequence))


# ---- what is kept -------------------------------------------------------------------------------------------------


def test_training_calls_keep_nothing() -> None:
    module, sequence = module_and_input()
    for _ in range(4):
        module(sequence)[0].sum().backward()
    assert packed_weights.held() == 0


def test_small_weights_are_not_kept() -> None:
    module, sequence = module_and_input(CASE.replace(hidden_size=16))
    for _ in range(4):
        outputs(module, sequence)
    assert packed_weights.held() == 0


def test_the_limit_holds_and_clear_frees_everything() -> None:
    module, sequence = module_and_input()
    kept(module, sequence)
    one = packed_weights.held()
    assert one >= sum(p.numel() * 4 for name, p in module.named_parameters() if "weight" in name)
    packed_weights.set_limit(int(2.5 * one))
    modules = [CASE.build(fused_rnn, seed=seed) for seed in range(4)]
    for made in modules:
        kept(made, sequence)
    assert packed_weights.held() == 2 * one
    for made in modules:
        assert_same(outputs(made, sequence), fresh(made, sequence))
    packed_weights.set_limit(one // 2)
    assert packed_weights.held() == 0
    assert_same(outputs(module, sequence), fresh(module, sequence))
    packed_weights.set_limit(10 * one)
    kept(module, sequence)
    packed_weights.clear()
    assert packed_weights.held() == 0


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes: expected at least 0, got -1"):
        packed_weights.set_limit(-1)
