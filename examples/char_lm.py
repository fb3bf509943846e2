"""Train a character language model on a fused LSTM, GRU or RNN, beside the same model on `torch.nn`'s.

Both models begin with the same weights and take the same batches, step by step in turns. Their loss curves must agree
(exit status 1 if not), and the times of their steps are compared. The fused model then goes on alone, and writes some
text in the end.

    python examples/char_lm.py                          # under 3 minutes on 2 cores
    python examples/char_lm.py --cell gru --data FILE
    python examples/char_lm.py --resume --epochs 20     # goes on where the last run ended or was interrupted
    python examples/char_lm.py --resume --temperature 0.5 --prompt "The class"
    python examples/char_lm.py --textbook --data mysterious_island.txt

The text is cut into parallel streams; a batch is the next piece of each, and the state is carried from batch to batch
without its gradient (truncated backpropagation through time; Mikolov 2010, Graves 2013). With --textbook pieces of 40
characters are drawn in any order, each from the zero state, as in Raschka and Mirjalili, Python Machine Learning
(3rd edition, 2019), chapter 16: embedding 256, LSTM of 512 units with one bias for each gate, batches of 64, 20 epochs.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import data, options, report, training
from common.options import ExampleError
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
HELD_OUT_SHARE = 0.05
CONSTANT_RATE_STEPS = 1000  # afterwards the learning rate falls with the inverse square root of the step


@dataclasses.dataclass(frozen=True)
class Settings:
    """What defines the model and its training."""

    cell: str = "lstm"
    embedding_size: int = 64
    hidden_size: int = 256
    layers: int = 1
    dropout: float = 0.0
    batch_size: int = 32
    seq_length: int = 64
    learning_rate: float = 3e-3


TEXTBOOK = Settings(embedding_size=256, hidden_size=512, batch_size=64, seq_length=40, learning_rate=1e-3)
TEXTBOOK_RESULT = "loss 1.765 after epoch 2, 1.048 after epoch 20"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.make_parser(
        "char_lm",
        "Train a character language model on fused layers, beside the same model on torch.nn's.",
        data="text to learn, UTF-8 (default: pydoc_data.topics, tables left out)",
        epochs=10,
    )
    model = parser.add_argument_group("the model")
    model.add_argument("--textbook", action="store_true", help="the model and training of a textbook, 20 epochs")
    model.add_argument("--cell", choices=list(LAYERS), help="recurrent layer (default: lstm)")
    for option, kind, words in (
        ("--embedding-size", options.positive_int, "numbers for each character"),
        ("--hidden-size", options.positive_int, "units of a recurrent layer"),
        ("--layers", options.positive_int, "recurrent layers"),
        ("--dropout", options.probability, "dropout between recurrent layers"),
        ("--batch-size", options.positive_int, "parallel streams of text"),
        ("--seq-length", options.positive_int, "characters of each stream in a step"),
        ("--learning-rate", options.positive_float, "of Adam"),
    ):
        name = option[2:].replace("-", "_")
        defaults = f"{getattr(Settings, name)}, with --textbook {getattr(TEXTBOOK, name)}"
        model.add_argument(option, type=kind, metavar="N", help=f"{words} (default: {defaults})")
    sample = parser.add_argument_group("the sample of text")
    sample.add_argument(
        "--temperature",
        type=options.natural_float,
        nargs="+",
        default=[0.7],
        metavar="N",
        help="0 takes the likeliest; several write several (default: 0.7)",
    )
    sample.add_argument("--prompt", default="The ", metavar="TEXT", help="what it begins with (default: %(default)r)")
    sample.add_argument(
        "--length", type=options.natural_int, default=600, metavar="N", help="characters (default: %(default)s)"
    )
    parser.set_defaults(compare_steps=300)
    arguments = parser.parse_args(argv)
    if arguments.textbook and arguments.epochs == parser.get_default("epochs"):
        arguments.epochs = 20
    if not arguments.textbook and arguments.minutes is None:
        arguments.minutes = 2.5
    return arguments


def read_text(arguments: argparse.Namespace) -> str:
    if arguments.sample:
        return "".join(f"the {n} and {n + 1} make {2 * n + 1}.\n" for n in range(400))
    if arguments.data is not None:
        text = data.read_text(options.data_path(arguments, "a text, UTF-8"))
        # The book itself, without Project Gutenberg's words before and after it.
        begin, end = text.find("THE MYSTERIOUS ISLAND"), text.find("End of the Project Gutenberg")
        return text[begin:end] if 0 <= begin < end else text
    try:
        from pydoc_data import topics
    except ImportError:
        raise ExampleError("--data: this Python has no pydoc_data.topics to learn from; give a text") from None
    lines = "\n\n".join(topics.topics.values()).splitlines(keepends=True)
    # Tables are mostly blanks, and a sample that strays into one shows nothing else.
    return "".join(line for line in lines if not line.lstrip().startswith(("|", "+-", "+=")))


class Text:
    """A text as numbers: the token of a character is its place in `vocabulary`, its distinct characters, sorted."""

    def __init__(self, text: str) -> None:
        self.vocabulary = "".join(sorted(set(text)))
        self._token = {character: token for token, character in enumerate(self.vocabulary)}
        self.tokens = self.encode(text)

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self._token[character] for character in text], dtype=torch.int64)


class CharLM(nn.Module):
    """Embedding, recurrent layers, linear.

    Shape:
        tokens (T, B) -> logits (T, B, vocabulary)
    """

    def __init__(self, vocabulary_size: int, settings: Settings, *, one_bias: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, settings.embedding_size)
        self.recurrent = LAYERS[settings.cell](
            settings.embedding_size,
            settings.hidden_size,
            settings.layers,
            dropout=settings.dropout if settings.layers > 1 else 0.0,
        )
        self.decoder = nn.Linear(settings.hidden_size, vocabulary_size)
        if one_bias:
            begin_as_keras(self.recurrent)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.recurrent(self.embedding(tokens), state)
        return self.decoder(output), state


def begin_as_keras(layer: nn.RNNBase) -> None:
    """One bias for each gate, and first weights as Keras draws them (Glorot 2010, Saxe 2014, Jozefowicz 2015)."""
    for name, parameter in layer.named_parameters():
        with torch.no_grad():
            if name.startswith("weight_ih"):
                nn.init.xavier_uniform_(parameter)
            elif name.startswith("weight_hh"):
                nn.init.orthogonal_(parameter)
            else:
                parameter.zero_()
                if name.startswith("bias_ih") and layer.mode == "LSTM":
                    parameter[layer.hidden_size : 2 * layer.hidden_size] = 1  # the forget gate begins open
        if name.startswith("bias_hh"):
            parameter.requires_grad_(False)


class CharWorkload(training.Continued):
    """The text in parallel streams, read a piece at a time; the state is carried from piece to piece."""

    clip = 1.0
    metric = "held-out loss"

    def __init__(self, text: Text, settings: Settings, arguments: argparse.Namespace) -> None:
        self.settings, self.text, self.seed = settings, text, arguments.seed
        self.device = arguments.device
        self.name = settings.cell
        layers = f"{settings.layers} x " if settings.layers > 1 else ""
        self.title = f"Character language model: {layers}{settings.cell.upper()} of {settings.hidden_size} units"
        self.learning_rate = settings.learning_rate
        end = len(text.tokens) - int(len(text.tokens) * HELD_OUT_SHARE)
        self.held_out = text.tokens[end:]
        self.streams = training.Streams(text.tokens[:end], settings.batch_size, settings.seq_length)

    def make_model(self) -> nn.Module:
        return CharLM(len(self.text.vocabulary), self.settings)

    def rate(self, step: int) -> float:
        return self.learning_rate * min(1.0, math.sqrt(CONSTANT_RATE_STEPS / (step + 1)))

    def evaluate(self, model: Any) -> dict[str, float]:
        """The loss on held-out text, read as one stream from the zero state, in nats a character."""
        tokens = self.held_out.to(self.device)
        if len(tokens) < 2:
            return {}
        return {self.metric: training.loss_of_stream(model, tokens, 1024)}

    def identity(self) -> dict[str, Any]:
        return dataclasses.asdict(self.settings) | {"data": training.digest_of(self.text.tokens)}


class TextbookWorkload(training.Shuffled, CharWorkload):
    """Pieces of the text in any order, each from the zero state; all of it is trained on."""

    clip = None
    metric = "loss"
    published = TEXTBOOK_RESULT

    def __init__(self, text: Text, settings: Settings, arguments: argparse.Namespace) -> None:
        super().__init__(text, settings, arguments)
        self.name = f"{settings.cell}-textbook"
        piece = settings.seq_length + 1
        self.pieces = text.tokens[: len(text.tokens) // piece * piece].view(-1, piece)
        self.count, self.batch_size = len(self.pieces), settings.batch_size

    def make_model(self) -> nn.Module:
        return CharLM(len(self.text.vocabulary), self.settings, one_bias=True)

    def pick(self, places: Tensor) -> Any:
        pieces = self.pieces[places].t()
        return pieces[:-1], pieces[1:], True

    def rate(self, step: int) -> float:
        return self.learning_rate

    def evaluate(self, model: Any) -> dict[str, float]:
        return {}


def check_prompt(prompt: str, text: Text) -> None:
    if not prompt:
        raise ExampleError("--prompt: expected at least one character, got none")
    unknown = sorted(set(prompt) - set(text.vocabulary))
    if unknown:
        raise ExampleError(f"--prompt: expected characters of the text, got {''.join(unknown)!r}")


@torch.no_grad()
def sample(model: nn.Module, text: Text, *, prompt: str, length: int, temperature: float, seed: int) -> Iterator[str]:
    """Yield `length` characters that follow the prompt, one by one."""
    model.eval()
    device = next(model.parameters()).device
    # A generator of its own: a sample neither changes the training's random stream nor depends on it.
    generator = torch.Generator().manual_seed(seed)
    logits, state = model(text.encode(prompt).unsqueeze(1).to(device))
    for _ in range(length):
        last = logits[-1, 0].float().cpu()
        if temperature > 0:
            token = torch.multinomial(F.softmax(last / temperature, 0), 1, generator=generator)
        else:
            token = last.argmax().unsqueeze(0)
        yield text.vocabulary[int(token)]
        logits, state = model(token.view(1, 1).to(device), state)
    model.train()


def show_samples(model: nn.Module, text: Text, arguments: argparse.Namespace, path: Path) -> None:
    written = []
    for temperature in arguments.temperature:
        print(f"\nsample at temperature {temperature:g}:\n\n{arguments.prompt}", end="")
        characters = [arguments.prompt]
        start = time.perf_counter()
        for character in sample(
            model,
            text,
            prompt=arguments.prompt,
            length=arguments.length,
            temperature=temperature,
            seed=arguments.seed,
        ):
            print(character, end="", flush=True)
            characters.append(character)
        rate = arguments.length / (time.perf_counter() - start)
        print(f"\n\nwritten at {rate:,.0f} characters a second, one step of the model each")
        written.append(f"temperature {temperature:g}\n\n{''.join(characters)}\n")
    path.write_text("\n".join(written), encoding="utf-8")


def run(arguments: argparse.Namespace) -> int:
    options.prepare(arguments)
    begun = TEXTBOOK if arguments.textbook else Settings()
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings)}
    settings = dataclasses.replace(begun, **{name: value for name, value in given.items() if value is not None})
    text = Text(read_text(arguments))
    if arguments.length:
        check_prompt(arguments.prompt, text)
    workload = (TextbookWorkload if arguments.textbook else CharWorkload)(text, settings, arguments)
    print(f"{len(text.tokens):,} characters, {len(text.vocabulary)} different")
    outcomes: list[training.Outcome] = []
    status = report.run_all("char_lm", [workload], arguments, outcomes)
    if status or not arguments.length:
        return status
    written = arguments.out / f"{workload.name}.txt"
    show_samples(outcomes[0].learners[0].model, text, arguments, written)
    print(f"saved {written}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status is that of `common.options.run_program`."""
    return options.run_program("char_lm", lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
