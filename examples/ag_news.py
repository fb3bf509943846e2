"""Sort news into four topics: small recurrent layers with and without lengths, and one block of a transformer.

    python examples/ag_news.py --download                   # the corpus, 31 MB, into runs/data
    python examples/ag_news.py --data FILE_OR_FOLDER        # train.csv and test.csv, or one file, a fifth held out
    python examples/ag_news.py --sample --epochs 2

A vocabulary of 20,000 and embedding 64 (Zhang 2015 has the corpus): an RNN of 16 units over titles; the same over title
and text, padded, with the steps behind each end masked; an LSTM of 8 units; two bidirectional LSTMs of 64 units with
embedding 128; and self-attention, one encoder block of PyTorch's own with 2 heads. The masked model is then run once
more over batches of like length, and both ways' words a second are printed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import data, options, report, training
from common.options import ExampleError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

BATCH_SIZE = 32
VOCABULARY = 20_000
MOST_WORDS = 128
EXPECTED = "AG's corpus: a folder with train.csv and test.csv, or one such file"
_FOLDER = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv"
SOURCES = (
    (f"{_FOLDER}/train.csv", "md5:b1a00f826fdfbd249f79597b59e1dc12"),
    (f"{_FOLDER}/test.csv", "md5:d52ea96a97a2d943681189a97654912d"),
)
Rows = tuple[list[str], list[str], list[int]]  # titles, texts, topics


class Recurrent(nn.Module):
    """Embedding, recurrent layers, and a dense one on the last states.

    Shape:
        tokens (B, T), lengths (B) on the CPU -> logits (B, 4)
    """

    def __init__(
        self,
        words: int,
        layer: type[nn.RNNBase],
        hidden_size: int,
        *,
        embedding_size: int = 64,
        num_layers: int = 1,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding_size, padding_idx=data.PADDING)
        self.recurrent = layer(embedding_size, hidden_size, num_layers, batch_first=True, bidirectional=bidirectional)
        self.output = nn.Linear(hidden_size * (2 if bidirectional else 1), 4)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, state = self.recurrent(packed)
        h = state[0] if isinstance(state, tuple) else state
        last = torch.cat([h[-2], h[-1]], dim=1) if self.recurrent.bidirectional else h[-1]
        logits: Tensor = self.output(last)
        return logits


class Attention(nn.Module):
    """Embedding with the words' places, an encoder block, and a dense layer on the mean over words."""

    def __init__(self, words: int, size: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, size, padding_idx=data.PADDING)
        place = torch.arange(MOST_WORDS).unsqueeze(1)
        turn = place * torch.exp(torch.arange(0, size, 2) * (-math.log(10_000.0) / size))
        self.register_buffer("places", torch.stack([turn.sin(), turn.cos()], dim=2).flatten(1), persistent=False)
        self.block = nn.TransformerEncoderLayer(size, 2, dim_feedforward=2 * size, batch_first=True)
        self.output = nn.Linear(size, 4)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        behind = tokens == data.PADDING
        behind[:, 0] = False  # a row without a word attends to its padding
        words = self.block(self.embedding(tokens) + self.places[: tokens.shape[1]], src_key_padding_mask=behind)
        kept = (~behind).unsqueeze(2)
        logits: Tensor = self.output((words * kept).sum(1) / kept.sum(1))
        return logits


MODELS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "rnn-titles": ("titles", lambda words: Recurrent(words, nn.RNN, 16)),
    "rnn-masked": ("all", lambda words: Recurrent(words, nn.RNN, 16)),
    "lstm": ("all", lambda words: Recurrent(words, nn.LSTM, 8)),
    "bilstm-2-layers": (
        "all",
        lambda words: Recurrent(words, nn.LSTM, 64, embedding_size=128, num_layers=2, bidirectional=True),
    ),
    "attention": ("all", Attention),
}


class Topics(training.Shuffled):
    batch_size = BATCH_SIZE
    metric = "test accuracy"
    title = "Topics of news"

    def __init__(
        self, name: str, parts: tuple[Rows, Rows], arguments: argparse.Namespace, *, by_length: bool = False
    ) -> None:
        self.name = f"ag-news-{name}{'-bucketed' if by_length else ''}"
        which, self.make = MODELS[name]
        self.by_length = by_length
        self.seed, self.device = arguments.seed, arguments.device
        words = [
            [data.words_of(title if which == "titles" else f"{title} {body}")[:MOST_WORDS] for title, body in
             zip(titles, bodies, strict=True)]
            for titles, bodies, _ in parts
        ]  # fmt: skip
        self.vocabulary = data.Vocabulary(words[0], VOCABULARY)
        self.tokens = [[self.vocabulary.encode(text) for text in part] for part in words]
        self.labels = [torch.tensor(labels) for _, _, labels in parts]
        self.count = len(self.labels[0])

    def make_model(self) -> nn.Module:
        return self.make(len(self.vocabulary))

    def pick(self, places: Tensor, part: int = 0) -> Any:
        tokens, lengths = data.padded([self.tokens[part][i] for i in places.tolist()])
        return tokens, lengths, self.labels[part][places]

    def order_of(self, epoch: int) -> list[Tensor]:
        drawn = super().order_of(epoch)
        if not self.by_length:
            return drawn
        # Ordered by length within 50 batches that were drawn, then the batches in any order.
        lengths = torch.tensor([len(tokens) for tokens in self.tokens[0]])
        pools = torch.cat(drawn).split(50 * BATCH_SIZE)
        ordered = torch.cat([pool[lengths[pool].argsort(stable=True)] for pool in pools]).split(BATCH_SIZE)
        turns = torch.randperm(len(ordered), generator=torch.Generator().manual_seed(self.seed + epoch))
        return [ordered[int(turn)] for turn in turns]

    def loss(self, model: Any, batch: Any, memory: dict[str, Any]) -> Tensor:
        tokens, lengths, labels = batch
        return F.cross_entropy(model(tokens, lengths.cpu()), labels)

    def evaluate(self, model: Any) -> dict[str, float]:
        right = 0
        for places in data.by_length(self.tokens[1], 256):
            tokens, lengths, labels = self.pick(places, part=1)
            right += int((model(tokens.to(self.device), lengths).argmax(1).cpu() == labels).sum())
        return {self.metric: right / len(self.labels[1])}

    def identity(self) -> dict[str, Any]:
        return {"data": training.digest_of(*self.labels, self.vocabulary.words)}


def read_corpus(path: Path, seed: int) -> tuple[Rows, Rows]:
    if path.is_dir():
        train, test = path / "train.csv", path / "test.csv"
        if train.exists() and test.exists():
            return data.read_ag_news(train), data.read_ag_news(test)
        path = next(iter(sorted(path.glob("ag_news*.csv"))), path)
    if not path.is_file():
        raise ExampleError(f"--data: expected {EXPECTED}, got {path}")
    return halves(data.read_ag_news(path), seed)


def halves(rows: Rows, seed: int) -> tuple[Rows, Rows]:
    def pick(places: Sequence[int]) -> Rows:
        titles, bodies, labels = rows
        return [titles[i] for i in places], [bodies[i] for i in places], [labels[i] for i in places]

    first, rest = data.split(len(rows[2]), 0.2, seed)
    return pick(first), pick(rest)


def words_a_second(outcome: training.Outcome) -> float:
    """Words of real text that a training step took, over its time; medians of the steps after the first few."""
    learner, workload = outcome.learners[0], outcome.workload
    assert isinstance(workload, Topics)
    rates = [
        int(workload.batch(step)[1].sum()) / seconds
        for step, seconds in list(enumerate(learner.seconds))[training.WARM_UP_STEPS : 200]
    ]
    return statistics.median(rates) if rates else math.nan


def run(arguments: argparse.Namespace) -> int:
    options.prepare(arguments)
    if arguments.sample:
        texts, labels = data.made_up_texts(256, 4, seed=1, words=30)
        parts = halves((texts, texts, labels), arguments.seed)
    else:
        parts = read_corpus(options.data_path(arguments, EXPECTED, *SOURCES), arguments.seed)
    print(f"{len(parts[0][2]):,} pieces of news to train on, {len(parts[1][2]):,} to test")
    begin = time.perf_counter()
    workloads = [Topics(name, parts, arguments) for name in arguments.models]
    if "rnn-masked" in arguments.models:
        workloads.insert(
            arguments.models.index("rnn-masked") + 1, Topics("rnn-masked", parts, arguments, by_length=True)
        )
    print(f"read in {time.perf_counter() - begin:.1f} s")
    outcomes: list[training.Outcome] = []
    status = report.run_all("ag_news", workloads, arguments, outcomes)
    for outcome in outcomes:
        if "masked" in outcome.workload.name:
            print(f"{outcome.workload.name}: {words_a_second(outcome):,.0f} words a second")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status is that of `common.options.run_program`."""
    parser = options.make_parser("ag_news", str(__doc__).splitlines()[0], data=EXPECTED, epochs=8, download=True)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="(default: all)")
    return options.run_program("ag_news", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
