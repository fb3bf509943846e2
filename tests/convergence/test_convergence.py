"""A small model learns the same with fused layers as with torch.nn's: 200 steps, loss beside loss."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import CELLS, constructor_of
from torch import Tensor, nn

import fused_rnn

pytestmark = pytest.mark.slow

STEPS = 200
SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"

# A float64 run differs by rounding alone, which 200 steps of Adam magnify by some orders: far from visible.
FLOAT64_TOLERANCE = 1e-6
# Rounding in float32 sends the two runs on paths that part slowly. Compared are means of 20 steps, whose own spread
# from batch to batch is some hundredths.
FLOAT32_TOLERANCE = 0.02
WINDOW = 20


class Model(nn.Module):
    """Embedding, recurrent layers, linear: predicts the next token at every step."""

    def __init__(self, library: Any, cell: str, tokens: int, hidden_size: int, **options: Any) -> None:
        super().__init__()
        layer_type, keywords = constructor_of(library, cell)
        self.embedding = nn.Embedding(tokens, 16)
        self.layers = layer_type(16, hidden_size, batch_first=True, **keywords, **options)
        self.head = nn.Linear(options.get("proj_size") or hidden_size, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens))[0])


def counting_batches() -> Iterator[Tensor]:
    """Sequences of 8 symbols that repeat with a period of 2 to 5: what comes next needs memory."""
    generator = torch.Generator().manual_seed(0)
    while True:
        rows = []
        for _ in range(16):
            period = int(torch.randint(2, 6, (), generator=generator))
            pattern = torch.randint(0, 8, (period,), generator=generator)
            rows.append(pattern.repeat(16 // period + 1)[:17])
        yield torch.stack(rows)


def text_batches(path: Path) -> Iterator[Tensor]:
    """Pieces of 33 characters of a text, as bytes."""
    text = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(0, len(text) - 33, (16,), generator=generator)
        yield torch.stack([text[start : start + 33] for start in starts.tolist()])


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One model and its data; `run` trains it with the layers of a library."""

    cell: str
    tokens: int
    batches: Callable[[], Iterator[Tensor]]
    dtype: torch.dtype = torch.float32
    hidden_size: int = 32
    options: tuple[tuple[str, Any], ...] = ()

    def run(self, library: Any) -> Tensor:
        torch.manual_seed(0)
        model = Model(library, self.cell, self.tokens, self.hidden_size, **dict(self.options)).to(self.dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        losses = []
        for batch in itertools.islice(self.batches(), STEPS):
            optimizer.zero_grad()
            scores = model(batch[:, :-1])
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)


def assert_curves_agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        found.view(-1, WINDOW).mean(1), expected.view(-1, WINDOW).mean(1), rtol=0, atol=FLOAT32_TOLERANCE
    )
    # it learned something, else agreement says little
    assert expected[-WINDOW:].mean() < 0.8 * expected[:WINDOW].mean()


@pytest.mark.parametrize("cell", CELLS)
def test_loss_curve_in_float64_is_that_of_torch_nn(cell: str) -> None:
    experiment = Experiment(cell, 8, counting_batches, torch.float64)
    found, expected = experiment.run(fused_rnn), experiment.run(nn)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64_TOLERANCE)
    assert expected[-WINDOW:].mean() < 0.8 * expected[:WINDOW].mean()


@pytest.mark.parametrize("cell", CELLS)
def test_loss_curve_in_float32_is_that_of_torch_nn(cell: str) -> None:
    experiment = Experiment(cell, 8, counting_batches)
    assert_curves_agree(experiment.run(fused_rnn), experiment.run(nn))


def test_two_layers_with_dropout_and_projection_learn_as_in_torch_nn() -> None:
    options = (("num_layers", 2), ("dropout", 0.2), ("proj_size", 12))
    experiment = Experiment("LSTM", 8, counting_batches, options=options)
    # the same seed before each: the same masks in both runs
    assert_curves_agree(experiment.run(fused_rnn), experiment.run(nn))


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"{SHAKESPEARE.name} is not here")
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_loss_curve_on_text_is_that_of_torch_nn(cell: str) -> None:
    experiment = Experiment(cell, 128, lambda: text_batches(SHAKESPEARE), hidden_size=64)
    assert_curves_agree(experiment.run(fused_rnn), experiment.run(nn))
