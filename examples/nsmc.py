"""Tell good Korean film reviews from bad ones: the same small model on an RNN, an LSTM, a GRU and two layers of GRU.

    python examples/nsmc.py --data FOLDER                   # nsmc_train*.tsv.gz and nsmc_test*.tsv.gz, or ratings_*.txt
    python examples/nsmc.py --data FOLDER --tokens morphemes    # pip install kiwipiepy
    python examples/nsmc.py --sample --epochs 2

Reviews of Naver (https://github.com/e9t/nsmc). A vocabulary of 10,000, embedding 50, the last 20 tokens of a review,
50 recurrent units with one bias for each gate, dense 32 with ReLU, dense 1. The published figures are those of a model
on morphemes; without an analyser words are cut here into the longest pieces of up to four syllables that are frequent
in the training part.
"""

from __future__ import annotations

import argparse
import collections
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import data, options, report, training
from common.options import ExampleError
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_SIZE = 64
LAST_TOKENS = 20
VOCABULARY = 10_000
EXPECTED = "a folder with nsmc_train*.tsv* and nsmc_test*.tsv*, or ratings_train.txt and ratings_test.txt"

MODELS: dict[str, tuple[type[nn.RNNBase], int, str]] = {
    "rnn": (nn.RNN, 1, "0.821"),
    "lstm": (nn.LSTM, 1, "0.839"),
    "gru": (nn.GRU, 1, "0.841"),
    "gru-2-layers": (nn.GRU, 2, "0.837"),
}


def read_folder(folder: Path, part: str) -> tuple[list[str], list[int]]:
    files = sorted([*folder.glob(f"nsmc_{part}*.tsv*"), *folder.glob(f"ratings_{part}.txt")])
    if len(files) != 1:
        raise ExampleError(f"--data: expected {EXPECTED}, got {folder} with {len(files)} files of the {part}ing part")
    return data.read_tsv(files[0], "document")


class Pieces:
    """Words cut into the longest pieces that are frequent in a training part."""

    longest = 4  # syllables

    def __init__(self, texts: Sequence[str], most: int) -> None:
        counts: collections.Counter[str] = collections.Counter()
        for text in texts:
            for word in self.words_of(text):
                for size in range(1, self.longest + 1):
                    counts.update(word[i : i + size] for i in range(len(word) - size + 1))
        # A long piece says more than what it is made of, and there are fewer of each.
        ranked = sorted(counts, key=lambda piece: (-counts[piece] * len(piece), piece))
        self.known = set(ranked[:most])

    @staticmethod
    def words_of(text: str) -> list[str]:
        return re.findall(r"[\w]+|[^\w\s]", text)

    def __call__(self, text: str) -> list[str]:
        pieces = []
        for word in self.words_of(text):
            start = 0
            while start < len(word):
                size = next(
                    (n for n in range(self.longest, 1, -1) if word[start : start + n] in self.known), 1
                )  # a single syllable in any case
                pieces.append(word[start : start + size])
                start += size
        return pieces


def make_tokeniser(name: str, texts: Sequence[str]) -> Callable[[str], list[str]]:
    if name == "pieces":
        return Pieces(texts, VOCABULARY)
    if name == "words":
        return lambda text: Pieces.words_of(text)
    try:
        from kiwipiepy import Kiwi
    except ImportError:
        raise ExampleError("--tokens morphemes: kiwipiepy is not installed (pip install kiwipiepy)") from None
    analyser = Kiwi()
    return lambda text: [token.form for token in analyser.tokenize(text)]


class Classifier(nn.Module):
    """Embedding, recurrent layers, and two dense ones on the last output.

    Shape:
        tokens (B, T) -> logits (B)
    """

    def __init__(self, words: int, layer: type[nn.RNNBase], num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 50)
        self.recurrent = layer(50, 50, num_layers, batch_first=True)
        self.hidden = nn.Linear(50, 32)
        self.output = nn.Linear(32, 1)
        for name, parameter in self.recurrent.named_parameters():
            if name.startswith("bias_hh") and layer is not nn.GRU:
                nn.init.zeros_(parameter).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        output, _ = self.recurrent(self.embedding(tokens))
        result: Tensor = self.output(F.relu(self.hidden(output[:, -1]))).squeeze(1)
        return result


class Sentiment(training.Shuffled):
    batch_size = BATCH_SIZE
    metric = "validation accuracy"
    title = "Sentiment of Korean film reviews"

    def __init__(self, name: str, parts: dict[str, tuple[Tensor, Tensor]], words: int, arguments: Any) -> None:
        self.layer, self.num_layers, published = MODELS[name]
        self.name, self.published = f"nsmc-{name}", f"{published} (150,000 reviews, morphemes)"
        self.parts, self.words = parts, words
        self.seed, self.device = arguments.seed, arguments.device
        self.count = len(parts["training"][1])

    def make_model(self) -> nn.Module:
        return Classifier(self.words, self.layer, self.num_layers)

    def pick(self, places: Tensor) -> Any:
        tokens, labels = self.parts["training"]
        return tokens[places], labels[places]

    def loss(self, model: Any, batch: Any, memory: dict[str, Any]) -> Tensor:
        tokens, labels = batch
        logits = model(tokens)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def evaluate(self, model: Any) -> dict[str, float]:
        found = {}
        for part in ("validation", "test"):
            tokens, labels = self.parts[part]
            right = [
                (model(rows.to(self.device)).cpu() > 0) == (wanted > 0)
                for rows, wanted in zip(tokens.split(1024), labels.split(1024), strict=True)
            ]
            found[f"{part} accuracy"] = torch.cat(right).float().mean().item()
        return found

    def identity(self) -> dict[str, Any]:
        return {"data": training.digest_of(*(tensor for part in self.parts.values() for tensor in part))}


def run(arguments: argparse.Namespace) -> int:
    options.prepare(arguments)
    if arguments.sample:
        texts, labels = data.made_up_texts(320, 2, seed=1)
        test_texts, test_labels = data.made_up_texts(64, 2, seed=2)
    else:
        folder = options.data_path(arguments, EXPECTED)
        texts, labels = read_folder(folder, "train")
        test_texts, test_labels = read_folder(folder, "test")
    first, rest = data.split(len(texts), 0.2, arguments.seed)
    cut = make_tokeniser(arguments.tokens, [texts[i] for i in first])
    words = [cut(text) for text in texts]
    vocabulary = data.Vocabulary((words[i] for i in first), VOCABULARY)

    def part(of: Sequence[Sequence[str]], right: Sequence[int]) -> tuple[Tensor, Tensor]:
        return data.padded_before([vocabulary.encode(text) for text in of], LAST_TOKENS), torch.tensor(right)

    parts = {
        "training": part([words[i] for i in first], [labels[i] for i in first]),
        "validation": part([words[i] for i in rest], [labels[i] for i in rest]),
        "test": part([cut(text) for text in test_texts], test_labels),
    }
    unknown = (parts["validation"][0] == data.UNKNOWN).sum() / (parts["validation"][0] != data.PADDING).sum()
    print(
        ", ".join(f"{len(right):,} {name}" for name, (_, right) in parts.items())
        + f" reviews; {arguments.tokens}: {len(vocabulary):,} different, {float(unknown):.1%} unknown in validation"
    )
    workloads = [Sentiment(name, parts, len(vocabulary), arguments) for name in arguments.models]
    return report.run_all("nsmc", workloads, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status is that of `common.options.run_program`."""
    parser = options.make_parser("nsmc", str(__doc__).splitlines()[0], data=EXPECTED, epochs=5)
    parser.add_argument(
        "--tokens",
        choices=("pieces", "words", "morphemes"),
        default="pieces",
        help="how a review is cut (default: pieces)",
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="(default: all)")
    return options.run_program("nsmc", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
