"""patch as a statement for the whole process, as a block and as a decorator; unpatch undoes all of them."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fused_rnn

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
ORIGINALS = {name: getattr(nn, name) for name in NAMES}


@pytest.fixture(autouse=True)
def _nothing_stays_patched() -> Iterator[None]:
    yield
    fused_rnn.unpatch()


def is_patched() -> bool:
    places = (nn, nn.modules, nn.modules.rnn)
    found = {getattr(place, name) is getattr(fused_rnn, name) for place in places for name in NAMES}
    unpatched = {getattr(place, name) is ORIGINALS[name] for place in places for name in NAMES}
    assert (found, unpatched) in (({True}, {False}), ({False}, {True})), "all names at once, or none"
    return found == {True}


def test_statement_patches_at_once_and_stays_until_unpatch() -> None:
    fused_rnn.patch()
    assert is_patched()
    model = nn.Sequential(nn.LSTM(3, 4))
    assert type(model[0]) is fused_rnn.LSTM
    assert isinstance(model[0], nn.LSTM)  # one class is seen everywhere
    fused_rnn.unpatch()
    assert not is_patched()
    assert type(model[0]) is fused_rnn.LSTM


def test_statement_stays_after_a_block_that_opens_and_ends_meanwhile() -> None:
    fused_rnn.patch()
    with fused_rnn.patch():
        assert is_patched()
    assert is_patched()


def test_statement_inside_a_block_stays_after_it() -> None:
    with fused_rnn.patch():
        fused_rnn.patch()
    assert is_patched()


def test_several_statements_are_undone_by_one_unpatch() -> None:
    fused_rnn.patch()
    fused_rnn.patch()
    fused_rnn.unpatch()
    assert not is_patched()


def test_unpatch_is_harmless_where_nothing_is_patched() -> None:
    fused_rnn.unpatch()
    fused_rnn.unpatch()
    assert not is_patched()
    with fused_rnn.patch():
        assert is_patched()
    assert not is_patched()


def test_unpatch_inside_a_block_ends_it_and_its_end_changes_nothing() -> None:
    with fused_rnn.patch(), fused_rnn.patch():
        fused_rnn.unpatch()
        assert not is_patched()
        assert type(nn.LSTM(3, 4)) is ORIGINALS["LSTM"]
        fused_rnn.patch()
        assert is_patched()
    # neither of the two blocks takes the later statement with it
    assert is_patched()


def test_block_opened_after_unpatch_inside_a_block_counts_alone() -> None:
    with fused_rnn.patch():
        fused_rnn.unpatch()
        with fused_rnn.patch():
            assert is_patched()
        assert not is_patched()
    assert not is_patched()


def test_block_in_another_thread_holds_the_patch_when_this_one_ends() -> None:
    opened, close = threading.Event(), threading.Event()

    def other() -> None:
        with fused_rnn.patch():
            opened.set()
            close.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    opened.wait(60)
    with fused_rnn.patch():
        pass
    held = is_patched()
    close.set()
    thread.join()
    assert held
    assert not is_patched()


def test_object_that_is_made_before_its_with_statement_is_a_block() -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(fused_rnn.patch())
        assert is_patched()
    assert not is_patched()
    block = fused_rnn.patch()
    for _ in range(2):
        with block:
            assert is_patched()
        assert not is_patched()


def test_decorator_patches_during_each_call_only() -> None:
    @fused_rnn.patch()
    def build() -> nn.Module:
        return nn.GRU(3, 4)

    assert not is_patched()
    for _ in range(2):
        assert type(build()) is fused_rnn.GRU
        assert not is_patched()


def test_what_somebody_else_put_there_since_is_left_to_them() -> None:
    class Theirs(nn.LSTM):
        pass

    fused_rnn.patch()
    nn.LSTM = Theirs
    try:
        fused_rnn.unpatch()
        assert nn.LSTM is Theirs
    finally:
        nn.LSTM = ORIGINALS["LSTM"]
    assert not is_patched()


def test_classes_derived_meanwhile_are_fused() -> None:
    with fused_rnn.patch():

        class Mine(nn.LSTM):
            pass

    assert issubclass(Mine, fused_rnn.LSTM)


def test_whole_models_saved_with_torch_nn_load_as_fused_ones_meanwhile() -> None:
    layer = nn.LSTM(3, 4, num_layers=2)
    buffer, sequence = io.BytesIO(), torch.randn(5, 2, 3)
    torch.save(layer, buffer)
    expected = layer(sequence)[0]
    buffer.seek(0)
    fused_rnn.patch()
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is fused_rnn.LSTM
    torch.testing.assert_close(loaded(sequence)[0], expected)


@pytest.mark.slow
def test_compiler_goes_on_tracing_fused_layers_without_a_graph_break() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4)

        def forward(self, sequence: torch.Tensor) -> torch.Tensor:
            return self.lstm(sequence)[0]

    fused_rnn.patch()
    model, sequence = Model(), torch.randn(5, 2, 3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(sequence), model(sequence))
    fused_rnn.unpatch()
    torch.testing.assert_close(compiled(sequence), model(sequence))
    assert not sys.modules["torch._dynamo.config"].allow_rnn


def test_block_does_not_wait_for_the_compiler_to_load() -> None:
    program = """
        import sys, fused_rnn
        with fused_rnn.patch():
            assert "torch._dynamo" not in sys.modules
        assert "torch._dynamo" not in sys.modules
        fused_rnn.patch()
        assert sys.modules["torch._dynamo.config"].allow_rnn
        fused_rnn.unpatch()
        assert not sys.modules["torch._dynamo.config"].allow_rnn
        with fused_rnn.patch():
            assert sys.modules["torch._dynamo.config"].allow_rnn
        assert not sys.modules["torch._dynamo.config"].allow_rnn
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_statement_whose_object_is_kept_stays_too() -> None:
    kept = fused_rnn.patch()
    assert is_patched()
    with kept:
        assert is_patched()
    assert not is_patched()
    kept = fused_rnn.patch()
    fused_rnn.unpatch()
    with kept:
        assert is_patched()
    assert not is_patched()
