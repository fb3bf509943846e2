"""Tell good film reviews from bad ones with bidirectional layers over words.

    python examples/imdb.py --download                      # aclImdb, 84 MB, into runs/data
    python examples/imdb.py --data FOLDER                   # aclImdb, or imdb_train*.tsv.gz and imdb_test*.tsv.gz
    python examples/imdb.py --sample --epochs 2             # made-up reviews, to see that it runs

The models of Raschka and Mirjalili, Python Machine Learning (3rd edition, 2019), chapter 16: words of the training part
and two more numbers, embedding 20, a bidirectional LSTM of 64 units over whole reviews or a bidirectional RNN over
their last 100 words, dense 64 with ReLU, dense 1; Adam 1e-3, batches of 32, 10 epochs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import data, options, report, training
from common.options import ExampleError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

BATCH_SIZE = 32
EXPECTED = "a folder with aclImdb's train/ and test/, or with imdb_train*.tsv.gz and imdb_test*.tsv.gz"
# https://ai.stanford.edu/~amaas/data/sentiment/ (Maas 2011)
SOURCE = ("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz", "md5:7c2ac02c03563afcf9b574c7e56c153a")

Part = tuple[list[str], list[int]]  # reviews, and 1 for good ones


def read_folder(folder: Path) -> tuple[Part, Part]:
    """Return the training and the test part."""
    if (folder / "aclImdb").is_dir():
        folder = folder / "aclImdb"
    parts: list[Part] = []
    for part in ("train", "test"):
        if (folder / part / "pos").is_dir():
            reviews, labels = [], []
            for label, name in enumerate(("neg", "pos")):
                files = sorted((folder / part / name).glob("*.txt"))
                reviews += [data.read_text(file) for file in files]
                labels += [label] * len(files)
            parts.append((reviews, labels))
            continue
        files = sorted(folder.glob(f"imdb_{part}*.tsv*"))
        if len(files) != 1:
            raise ExampleError(f"--data: expected {EXPECTED}, got {folder} with {len(files)} files imdb_{part}*.tsv*")
        parts.append(data.read_tsv(files[0], "review"))
    return parts[0], parts[1]


class Classifier(nn.Module):
    """Embedding, a bidirectional layer, and two dense ones on the last state of each direction.

    Shape:
        tokens (B, T), lengths (B) on the CPU -> logits (B)
    """

    def __init__(self, words: int, layer: type[nn.RNNBase], embedding_size: int = 20, hidden_size: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding_size, padding_idx=data.PADDING)
        self.recurrent = layer(embedding_size, hidden_size, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(2 * hidden_size, 64)
        self.output = nn.Linear(64, 1)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, state = self.recurrent(packed)
        h = state[0] if isinstance(state, tuple) else state
        result: Tensor = self.output(F.relu(self.hidden(torch.cat([h[0], h[1]], dim=1)))).squeeze(1)
        return result


class Sentiment(training.Shuffled):
    batch_size = BATCH_SIZE
    metric = "test accuracy"
    title = "Sentiment of film reviews"

    def __init__(
        self,
        name: str,
        layer: type[nn.RNNBase],
        parts: tuple[Part, Part],
        arguments: argparse.Namespace,
        *,
        last: int | None = None,
        published: str = "",
    ) -> None:
        self.name, self.layer, self.last, self.published = name, layer, last, published
        self.seed, self.device = arguments.seed, arguments.device
        words = [[data.words_of(text) for text in texts] for texts, _ in parts]
        self.vocabulary = data.Vocabulary(words[0])
        self.tokens = [[self.vocabulary.encode(text) for text in part] for part in words]
        self.labels = [torch.tensor(labels) for _, labels in parts]
        self.count = len(self.labels[0])
        if self.count < BATCH_SIZE:
            raise ExampleError(f"--data: expected at least {BATCH_SIZE} reviews to train on, got {self.count}")

    def make_model(self) -> nn.Module:
        return Classifier(len(self.vocabulary), self.layer)

    def pick(self, places: Tensor, part: int = 0) -> Any:
        tokens, lengths = data.padded([self.tokens[part][i] for i in places.tolist()], last=self.last)
        return tokens, lengths, self.labels[part][places]

    def loss(self, model: Any, batch: Any, memory: dict[str, Any]) -> Tensor:
        tokens, lengths, labels = batch
        logits = model(tokens, lengths.cpu())
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def evaluate(self, model: Any) -> dict[str, float]:
        right = 0
        for places in data.by_length(self.tokens[1], 128):
            tokens, lengths, labels = self.pick(places, part=1)
            right += int(((model(tokens.to(self.device), lengths) > 0).cpu() == (labels > 0)).sum())
        return {self.metric: right / len(self.labels[1])}

    def identity(self) -> dict[str, Any]:
        return {"data": training.digest_of(*self.labels, self.vocabulary.words)}


def run(arguments: argparse.Namespace) -> int:
    options.prepare(arguments)
    if arguments.sample:
        parts = data.made_up_texts(192, 2, seed=1), data.made_up_texts(64, 2, seed=2)
    else:
        parts = read_folder(options.data_path(arguments, EXPECTED, SOURCE))
    for part, (reviews, labels) in zip(("training", "test"), parts, strict=True):
        print(f"{part}: {len(reviews):,} reviews, {sum(labels):,} of them good")
    workloads = [
        Sentiment("imdb-lstm", nn.LSTM, parts, arguments, published="0.8515 (25,000 reviews)"),
        Sentiment("imdb-rnn", nn.RNN, parts, arguments, last=100, published="0.8070 (25,000 reviews)"),
    ]
    return report.run_all("imdb", workloads, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status is that of `common.options.run_program`."""
    parser = options.make_parser("imdb", str(__doc__).splitlines()[0], data=EXPECTED, epochs=10, download=True)
    return options.run_program("imdb", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
