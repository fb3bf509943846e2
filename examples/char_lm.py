"""Train a character language model on a fused LSTM, GRU or RNN, beside the same model on `torch.nn`'s.

Both models begin with the same weights and take the same batches, step by step in turns. Their loss curves must agree
(exit status 1 if not), and the times of their steps are compared. The fused model then goes on alone, and writes some
text in the end.

    python examples/char_lm.py                          # under 3 minutes on 2 cores
    python examples/char_lm.py --cell gru --text FILE
    python examples/char_lm.py --resume --steps 6000    # goes on where the last run ended or was interrupted
    python examples/char_lm.py --resume --temperature 0.5 --prompt "The class"

The text is cut into parallel streams; a batch is the next piece of each, and the state is carried from batch to batch
without its gradient (truncated backpropagation through time; Mikolov 2010, Graves 2013).
"""

import argparse
import copy
import dataclasses
import hashlib
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rnn
from fused_rnn import info
from fused_rnn.bench.environment import keep_freed_memory

FUSED_LAYERS = {"lstm": fused_rnn.LSTM, "gru": fused_rnn.GRU, "rnn": fused_rnn.RNN}
TORCH_LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}

# When loss curves agree. The two sides round differently in the last place, and every optimizer step magnifies that: to
# some 1e-6 of the loss in 30 steps, some 1e-3 after 300, where training is chaotic and only the means over a window of
# steps can be held together. A wrong gradient shows in the strict early steps: one bias gradient left out, noise of 2 %
# on one weight gradient, or a gradient cut in the middle of the sequence makes 1e-3 and more.
EARLY_STEPS = 30
EARLY_TOLERANCE = 1e-4  # of the loss, in each of the early steps
LATE_TOLERANCE = 1e-2  # of the loss, in means over LATE_WINDOW steps
LATE_WINDOW = 20

# Steps of a run that are left out when times are compared: buffers and threads are still being set up.
WARM_UP_STEPS = 5

HELD_OUT_SHARE = 0.05
CONSTANT_RATE_STEPS = 1000  # afterwards the learning rate falls with the inverse square root of the step


# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclasses.dataclass(frozen=True)
class Settings:
    """What defines a run: a checkpoint holds them, and a resumed run keeps them."""

    cell: str = "lstm"
    text: str = ""  # file name; empty is the default text
    embedding_size: int = 64
    hidden_size: int = 256
    layers: int = 1
    dropout: float = 0.0
    batch_size: int = 32
    seq_length: int = 64
    learning_rate: float = 3e-3
    compare_steps: int = 300
    seed: int = 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a character language model on fused layers, beside the same model on torch.nn's."
    )
    model = parser.add_argument_group("the run (a resumed run keeps the values it began with)")
    model.add_argument("--cell", choices=list(FUSED_LAYERS), help="recurrent layer (default: lstm)")
    model.add_argument(
        "--text", metavar="FILE", help="text to learn, UTF-8 (default: pydoc_data.topics, tables left out)"
    )
    for option, kind, words in (
        ("--embedding-size", positive_int, "numbers for each character"),
        ("--hidden-size", positive_int, "units of a recurrent layer"),
        ("--layers", positive_int, "recurrent layers"),
        ("--dropout", probability, "dropout between recurrent layers"),
        ("--batch-size", positive_int, "parallel streams of text"),
        ("--seq-length", positive_int, "characters of each stream in a step"),
        ("--learning-rate", positive_float, "of Adam, for the first 1000 steps; it falls afterwards"),
        ("--compare-steps", natural_int, "steps that torch.nn trains along; 0 leaves it out"),
        ("--seed", natural_int, "of weights, dropout and the sample"),
    ):
        default = getattr(Settings, option[2:].replace("-", "_"))
        model.add_argument(option, type=kind, metavar="N", help=f"{words} (default: {default})")
    length = parser.add_argument_group("how long")
    length.add_argument("--steps", type=natural_int, default=3000, metavar="N", help="in all (default: %(default)s)")
    length.add_argument(
        "--minutes", type=positive_float, default=2.5, metavar="N", help="stop training then (default: %(default)s)"
    )
    sample = parser.add_argument_group("the sample of text")
    sample.add_argument(
        "--temperature",
        type=natural_float,
        default=0.7,
        metavar="N",
        help="0 takes the likeliest (default: %(default)s)",
    )
    sample.add_argument("--prompt", default="The ", metavar="TEXT", help="what it begins with (default: %(default)r)")
    sample.add_argument(
        "--length", type=natural_int, default=600, metavar="N", help="characters (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive_int, metavar="N", help="default: PyTorch's")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/char_lm"), metavar="FOLDER", help="for results (default: %(default)s)"
    )
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="FILE", help="go on from a checkpoint (default: the cell's in --out)"
    )
    return parser.parse_args(argv)


def number_type(kind: type, minimum: float, maximum: float, words: str, *, exclusive: bool = False) -> Any:
    """Return an argparse type for numbers from `minimum` (or above it, if exclusive) to `maximum`."""

    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not minimum <= number <= maximum or (exclusive and number == minimum):
            raise argparse.ArgumentTypeError(f"expected {words}, got {text!r}")
        return number

    return parse


positive_int = number_type(int, 1, 2**31, "a whole number of at least 1")
natural_int = number_type(int, 0, 2**62, "a whole number of at least 0")
positive_float = number_type(float, 0, sys.float_info.max, "a number above 0", exclusive=True)
natural_float = number_type(float, 0, sys.float_info.max, "a number of at least 0")
probability = number_type(float, 0, 1, "a number from 0 to 1")


class DemoError(Exception):
    """Something the user can mend; shown as one line."""


def settle(arguments: argparse.Namespace, checkpoint: dict[str, Any] | None) -> Settings:
    """Merge the command line with the checkpoint's settings, which may not be contradicted."""
    given = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(Settings)
        if getattr(arguments, field.name) is not None
    }
    if checkpoint is None:
        return Settings(**given)
    settings = Settings(**checkpoint["settings"])
    for name, value in given.items():
        if value != getattr(settings, name):
            option = "--" + name.replace("_", "-")
            raise DemoError(f"{option}: expected {getattr(settings, name)!r} as in the checkpoint, got {value!r}")
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# Text


def read_text(file_name: str) -> str:
    if file_name:
        try:
            return Path(file_name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DemoError(f"--text: expected a readable UTF-8 file, got {file_name!r}: {error}") from None
    try:
        from pydoc_data import topics
    except ImportError:
        raise DemoError("--text: this Python has no pydoc_data.topics to learn from; give a text FILE") from None
    lines = "\n\n".join(topics.topics.values()).splitlines(keepends=True)
    # Tables are mostly blanks, and a sample that strays into one shows nothing else.
    return "".join(line for line in lines if not line.lstrip().startswith(("|", "+-", "+=")))


class Text:
    """A text as numbers.

    Attributes:
        vocabulary: its distinct characters, sorted; the token of a character is its place here.
        training: tokens, int64 (N,).
        held_out: the tokens at the end that are not trained on.
    """

    def __init__(self, text: str) -> None:
        self.length = len(text)
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        self.vocabulary = "".join(sorted(set(text)))
        tokens = self.encode(text)
        end = len(tokens) - int(len(tokens) * HELD_OUT_SHARE)
        self.training, self.held_out = tokens[:end], tokens[end:]

    def encode(self, text: str) -> Tensor:
        place = {character: token for token, character in enumerate(self.vocabulary)}
        return torch.tensor([place[character] for character in text], dtype=torch.int64)


class Streams:
    """Tokens as `batch_size` parallel streams, read `seq_length` at a time and from the start again at their end."""

    def __init__(self, tokens: Tensor, batch_size: int, seq_length: int) -> None:
        needed = batch_size * (seq_length + 1)
        if len(tokens) < needed:
            raise DemoError(
                f"--text: expected at least {needed:,} characters to train on ({batch_size} streams of {seq_length}), "
                f"got {len(tokens):,}"
            )
        per_stream = len(tokens) // batch_size
        self._streams = tokens[: batch_size * per_stream].view(batch_size, per_stream).t().contiguous()
        self.seq_length = seq_length
        self.steps_per_pass = (per_stream - 1) // seq_length

    def batch(self, step: int) -> tuple[Tensor, Tensor, bool]:
        """Return inputs (T, B), the characters that follow them (T, B), and whether the streams begin here."""
        turn = step % self.steps_per_pass
        start = turn * self.seq_length
        end = start + self.seq_length
        return self._streams[start:end], self._streams[start + 1 : end + 1], turn == 0


# ---------------------------------------------------------------------------------------------------------------------
# Model


class CharLM(nn.Module):
    """Embedding, recurrent layers, linear.

    Shape:
        tokens (T, B) -> logits (T, B, vocabulary)
    """

    def __init__(self, vocabulary_size: int, embedding_size: int, recurrent: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.recurrent = recurrent
        self.decoder = nn.Linear(hidden_size, vocabulary_size)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.recurrent(self.embedding(tokens), state)
        return self.decoder(output), state


def make_models(settings: Settings, vocabulary_size: int) -> tuple[CharLM, CharLM]:
    """Return the fused model and its twin on `torch.nn`, with equal weights."""
    torch.manual_seed(settings.seed)
    options: dict[str, Any] = {
        "num_layers": settings.layers,
        "dropout": settings.dropout if settings.layers > 1 else 0.0,
    }
    recurrent = FUSED_LAYERS[settings.cell](settings.embedding_size, settings.hidden_size, **options)
    model = CharLM(vocabulary_size, settings.embedding_size, recurrent, settings.hidden_size)
    twin = copy.deepcopy(model)
    twin.recurrent = TORCH_LAYERS[settings.cell](settings.embedding_size, settings.hidden_size, **options)
    twin.load_state_dict(model.state_dict())
    return model, twin


def detached(state: Any) -> Any:
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()


class Learner:
    """A model with all that training it needs, and the record of its steps.

    Attributes:
        losses: of every step, in nats a character.
        seconds: of every step: forward, backward, clipping and the optimizer.
    """

    def __init__(self, name: str, model: CharLM, settings: Settings) -> None:
        self.name = name
        self.model = model
        self.rate = settings.learning_rate
        self.optimizer = torch.optim.Adam(model.parameters(), lr=self.rate, fused=True)
        self.state: Any = None
        # A random stream of its own: dropout masks do not depend on who else draws.
        self.random_state = torch.get_rng_state()
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, inputs: Tensor, targets: Tensor, begins: bool) -> None:
        """Train on one batch, inputs and targets (T, B); `begins` starts from the zero state."""
        if begins:
            self.state = None
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, math.sqrt(CONSTANT_RATE_STEPS / (len(self.losses) + 1)))
        torch.set_rng_state(self.random_state)
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        logits, state = self.model(inputs, self.state)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self.state = detached(state)
        self.random_state = torch.get_rng_state()

    def characters_per_second(self, settings: Settings) -> float:
        """Return the rate over the last steps."""
        return settings.batch_size * settings.seq_length / statistics.median(self.seconds[-25:])

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": self.state,
            "random_state": self.random_state,
            "losses": self.losses,
            "seconds": self.seconds,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = saved["state"]
        self.random_state = saved["random_state"]
        self.losses = saved["losses"]
        self.seconds = saved["seconds"]


# ---------------------------------------------------------------------------------------------------------------------
# Training


@contextmanager
def interrupt_flag() -> Iterator[list[bool]]:
    """Turn Ctrl-C into a flag, so that a step is never cut in two; a second Ctrl-C stops at once."""
    raised: list[bool] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if raised:
            raise KeyboardInterrupt
        raised.append(True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield raised
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    fused: Learner, twin: Learner | None, streams: Streams, settings: Settings, *, steps: int, minutes: float
) -> str:
    """Train up to `steps` steps in all, the twin along for the first `compare_steps`.

    Returns:
        why it ended: "done", "interrupted", "out of time" or "curves disagree".
    """
    deadline = time.monotonic() + 60 * minutes
    begin = len(fused.losses)
    with interrupt_flag() as interrupted, Progress(settings.cell, begin, steps) as progress:
        for step in range(begin, steps):
            batch = streams.batch(step)
            learners = [fused]
            if twin and step < settings.compare_steps:
                # In turns, and the order turns round: a busy machine and warm caches favour neither.
                learners = [fused, twin] if step % 2 else [twin, fused]
            for learner in learners:
                learner.step(*batch)
            progress.show(fused, twin if len(learners) == 2 else None, settings)
            if twin and step + 1 in (EARLY_STEPS, settings.compare_steps) and not Comparison(fused, twin).curves_agree:
                return "curves disagree"
            if interrupted:
                return "interrupted"
            if time.monotonic() > deadline and step + 1 < steps:
                return "out of time"
    return "done"


class Progress:
    """A progress bar with loss and speed; without tqdm a line now and then."""

    def __init__(self, title: str, begin: int, steps: int) -> None:
        self._steps = steps
        self._bar: Any = None
        if begin >= steps:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            print("no progress bar: tqdm is not installed (pip install tqdm)")
            return
        self._bar = tqdm(
            initial=begin,
            total=steps,
            bar_format=title + " |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stdout.isatty() else 5,
            file=sys.stdout,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, fused: Learner, twin: Learner | None, settings: Settings) -> None:
        step = len(fused.losses)
        if self._bar is None and step % 50 and step != self._steps:
            return
        text = f"loss {fused.losses[-1]:.3f}, {fused.characters_per_second(settings) / 1e3:.1f}k char/s"
        if twin:
            text += f"; torch.nn {twin.losses[-1]:.3f}, {twin.characters_per_second(settings) / 1e3:.1f}k"
        if self._bar is None:
            print(f"step {step}/{self._steps}: {text}", flush=True)
        else:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update()


class Comparison:
    """The two learners over the steps both have taken.

    Attributes:
        differences: for each step |loss of one - loss of the other| / loss: of the losses themselves in the first
            `EARLY_STEPS`, then of their means over the last `LATE_WINDOW` steps.
        allowed: for each step the tolerance.
        ratio: median over the steps of time of torch.nn / time of the fused model.
    """

    def __init__(self, fused: Learner, twin: Learner) -> None:
        self.steps = min(len(fused.losses), len(twin.losses))
        ours, theirs = (
            learner.losses[: min(self.steps, EARLY_STEPS)] + windowed(learner.losses[: self.steps])[EARLY_STEPS:]
            for learner in (fused, twin)
        )
        self.differences = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
        self.allowed = [EARLY_TOLERANCE if step < EARLY_STEPS else LATE_TOLERANCE for step in range(self.steps)]
        skip = WARM_UP_STEPS if self.steps > 2 * WARM_UP_STEPS else 0
        self.fused_seconds, self.twin_seconds = fused.seconds[skip : self.steps], twin.seconds[skip : self.steps]
        self.ratio = statistics.median(b / a for a, b in zip(self.fused_seconds, self.twin_seconds, strict=True))

    @property
    def curves_agree(self) -> bool:
        # Written so that NaN disagrees.
        return all(found <= allowed for found, allowed in zip(self.differences, self.allowed, strict=True))

    def __str__(self) -> str:
        early = (
            f"largest difference {largest(self.differences[:EARLY_STEPS]):.0e} of the loss in the first {EARLY_STEPS}"
        )
        late = f", {largest(self.differences[EARLY_STEPS:]):.0e} later" if self.steps > EARLY_STEPS else ""
        limits = f"{EARLY_TOLERANCE:.0e} and {LATE_TOLERANCE:.0e} allowed"
        return (
            f"beside torch.nn for {self.steps} steps, from the same weights, on the same batches:\n"
            f"  loss curves {'agree' if self.curves_agree else 'DISAGREE'}: {early}{late} ({limits})\n"
            f"  time of a training step: fused {1e3 * statistics.median(self.fused_seconds):.1f} ms, "
            f"torch.nn {1e3 * statistics.median(self.twin_seconds):.1f} ms, ratio {self.ratio:.2f} "
            f"(median of {len(self.fused_seconds)} pairs)"
        )


def largest(differences: Sequence[float]) -> float:
    """Return the maximum; NaN if there is one."""
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def windowed(losses: Sequence[float]) -> list[float]:
    """Return for each step the mean of the last `LATE_WINDOW` losses, of fewer at the start."""
    return [statistics.fmean(losses[max(0, end - LATE_WINDOW) : end]) for end in range(1, len(losses) + 1)]


@torch.no_grad()
def evaluate(model: CharLM, tokens: Tensor) -> float:
    """Return the loss on held-out tokens (N,), read as one stream from the zero state, in nats a character."""
    model.eval()
    total, state, piece = 0.0, None, 1024
    for start in range(0, len(tokens) - 1, piece):
        inputs = tokens[start : min(start + piece, len(tokens) - 1)]
        logits, state = model(inputs.unsqueeze(1), state)
        targets = tokens[start + 1 : start + 1 + len(inputs)]
        total += F.cross_entropy(logits.squeeze(1), targets, reduction="sum").item()
    model.train()
    return total / (len(tokens) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint


def save_checkpoint(path: Path, learners: Sequence[Learner], settings: Settings, text: Text) -> None:
    """Write all that going on exactly needs; an interruption leaves the file before intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "settings": dataclasses.asdict(settings),
            "text_digest": text.digest,
            "threads": torch.get_num_threads(),
            "learners": {learner.name: learner.state_dict() for learner in learners},
        },
        partial,
    )
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any]
    try:
        loaded = torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise DemoError(f"--resume: expected a checkpoint, got no file {path}") from None
    except Exception:  # torch.load raises many types for a file that is damaged or something else
        loaded = {}
    if "learners" not in loaded:
        raise DemoError(f"--resume: expected a checkpoint of this program, got {path}")
    return loaded


# ---------------------------------------------------------------------------------------------------------------------
# Sample


def check_prompt(prompt: str, text: Text) -> None:
    if not prompt:
        raise DemoError("--prompt: expected at least one character, got none")
    unknown = sorted(set(prompt) - set(text.vocabulary))
    if unknown:
        raise DemoError(f"--prompt: expected characters of the text, got {''.join(unknown)!r}")


@torch.no_grad()
def sample(model: CharLM, text: Text, *, prompt: str, length: int, temperature: float, seed: int) -> Iterator[str]:
    """Yield `length` characters that follow the prompt, one by one."""
    model.eval()
    # A generator of its own: a sample neither changes the training's random stream nor depends on it.
    generator = torch.Generator().manual_seed(seed)
    logits, state = model(text.encode(prompt).unsqueeze(1))
    for _ in range(length):
        last = logits[-1, 0]
        if temperature > 0:
            token = torch.multinomial(F.softmax(last / temperature, 0), 1, generator=generator)
        else:
            token = last.argmax().unsqueeze(0)
        yield text.vocabulary[int(token)]
        logits, state = model(token.view(1, 1), state)
    model.train()


def show_sample(model: CharLM, text: Text, arguments: argparse.Namespace, settings: Settings, path: Path) -> None:
    if not arguments.length:
        return
    print(f"\nsample at temperature {arguments.temperature:g}:\n\n{arguments.prompt}", end="")
    written = [arguments.prompt]
    start = time.perf_counter()
    for character in sample(
        model,
        text,
        prompt=arguments.prompt,
        length=arguments.length,
        temperature=arguments.temperature,
        seed=settings.seed,
    ):
        print(character, end="", flush=True)
        written.append(character)
    rate = arguments.length / (time.perf_counter() - start)
    path.write_text("".join(written) + "\n", encoding="utf-8")
    print(f"\n\nwritten at {rate:,.0f} characters a second, one step of the model each")


# ---------------------------------------------------------------------------------------------------------------------
# Picture

INK, GRID, FUSED_COLOR, TORCH_COLOR = "#222222", "#e4e4e4", "#0b6e99", "#e58a2b"


def draw(path: Path, fused: Learner, twin: Learner | None, both: Comparison | None, settings: Settings) -> bool:
    """Draw loss curves, their difference and the times of a step; tell whether matplotlib was there to do it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return False
    # A row of its own for the title, which then stands over the left edge of everything.
    figure = Figure(figsize=(11, 5.2), dpi=130, facecolor="white")
    panels = figure.add_gridspec(
        2, 2, width_ratios=(1.5, 1), left=0.06, right=0.985, top=0.84, bottom=0.1, wspace=0.2, hspace=0.5
    )
    layers = f"{settings.layers} x " if settings.layers > 1 else ""
    count = torch.get_num_threads()
    heading = f"Character language model: {layers}{settings.cell.upper()} of {settings.hidden_size} units"
    machine = (
        f"batches of {settings.batch_size} x {settings.seq_length} characters, PyTorch {torch.__version__}, "
        f"{info.collect()['processor']}, {count} thread{'s' if count > 1 else ''}"
    )
    figure.text(0.012, 0.945, heading, color=INK, fontsize=13, fontweight="bold")
    figure.text(0.012, 0.908, machine, color="#666666", fontsize=9)
    if both is None:
        draw_losses(figure.add_subplot(panels[:, :]), fused, None)
    else:
        draw_losses(figure.add_subplot(panels[:, 0]), fused, twin)
        draw_times(figure.add_subplot(panels[0, 1]), both)
        draw_differences(figure.add_subplot(panels[1, 1]), both)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=8)
    axes.xaxis.label.set(color="#555555", fontsize=9)
    axes.yaxis.label.set(color="#555555", fontsize=9)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def draw_losses(axes: Any, fused: Learner, twin: Learner | None) -> None:
    if twin:
        # Wide and below: where the curves agree the fused line lies inside this band.
        axes.plot(
            range(1, len(twin.losses) + 1), twin.losses, color=TORCH_COLOR, linewidth=5, alpha=0.6, label="torch.nn"
        )
    steps = range(1, len(fused.losses) + 1)
    axes.plot(
        steps, fused.losses, color=FUSED_COLOR, linewidth=0.9, alpha=0.55 if len(steps) > 600 else 1, label="fused"
    )
    if len(steps) > 600:
        # At the middle of each window; at the very start the mean would lag behind the steep fall.
        centred = [step - LATE_WINDOW / 2 for step in steps]
        begin = 2 * LATE_WINDOW
        means = windowed(fused.losses)
        axes.plot(
            centred[begin:], means[begin:], color=FUSED_COLOR, linewidth=1.8, label=f"fused, mean of {LATE_WINDOW}"
        )
    axes.set(xlabel="training step", ylabel="loss, nats a character")
    axes.margins(x=0.01)
    axes.legend(frameon=False, fontsize=9)
    style(axes, "Training loss")


def draw_times(axes: Any, both: Comparison) -> None:
    rows = (("torch.nn", both.twin_seconds, TORCH_COLOR), ("fused", both.fused_seconds, FUSED_COLOR))
    longest = 0.0
    for row, (_, seconds, color) in enumerate(rows):
        milliseconds = sorted(1e3 * s for s in seconds)
        median = statistics.median(milliseconds)
        longest = max(longest, 1.4 * median, milliseconds[int(0.97 * (len(milliseconds) - 1))])
        axes.barh(row, median, height=0.55, color=color, alpha=0.9)
        axes.text(0, row, f"  {median:.1f} ms", va="center", fontsize=10, fontweight="bold", color="white")
        # Every step as a tick, so that the spread can be seen.
        axes.plot(milliseconds, [row] * len(milliseconds), "|", color=INK, markersize=13, alpha=0.12)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, longest)
    axes.set(xlabel="milliseconds: median, and each step as a tick")
    style(axes, f"Time of a training step: ratio {both.ratio:.2f}")
    axes.grid(axis="y", visible=False)


def draw_differences(axes: Any, both: Comparison) -> None:
    # A difference of zero has no place on a logarithmic axis; float32 resolves about 1e-7.
    shown = [max(difference, 1e-8) for difference in both.differences]
    highest = max((difference for difference in shown if math.isfinite(difference)), default=0.0)
    axes.semilogy(range(1, len(shown) + 1), shown, color=INK, linewidth=1.2)
    axes.step(
        range(1, len(both.allowed) + 1), both.allowed, color="#b3261e", linewidth=1.2, linestyle="--", where="mid"
    )
    axes.annotate(
        "allowed",
        (1, both.allowed[-1]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="#b3261e",
    )
    axes.set_ylim(5e-9, max(15 * both.allowed[-1], 2 * highest))
    axes.minorticks_off()
    axes.set(xlabel="training step", ylabel="share of the loss")
    axes.margins(x=0.01)
    style(axes, "Difference of the two loss curves")


# ---------------------------------------------------------------------------------------------------------------------
# Program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0 when done, 1 if the loss curves disagree, 2 for a wrong option, 130 if interrupted.
    """
    arguments = parse_arguments(argv)
    try:
        return run(arguments)
    except DemoError as error:
        print(f"char_lm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace) -> int:
    checkpoint = None
    if arguments.resume is not None:
        checkpoint = load_checkpoint(Path(arguments.resume or arguments.out / f"{arguments.cell or Settings.cell}.pt"))
    settings = settle(arguments, checkpoint)
    # As in the benchmarks: without this torch.nn's LSTM pays page faults in each step, which would flatter the ratio.
    keep_freed_memory()
    threads = arguments.threads or (checkpoint["threads"] if checkpoint else None)
    if threads:
        torch.set_num_threads(threads)

    text = Text(read_text(settings.text))
    if checkpoint and checkpoint["text_digest"] != text.digest:
        raise DemoError("--text: expected the text that the checkpoint was trained on, got another")
    check_prompt(arguments.prompt, text)
    streams = Streams(text.training, settings.batch_size, settings.seq_length)
    model, twin_model = make_models(settings, len(text.vocabulary))
    fused = Learner("fused", model, settings)
    twin = Learner("torch.nn", twin_model, settings) if settings.compare_steps else None
    learners = [learner for learner in (fused, twin) if learner]
    if checkpoint:
        for learner in learners:
            learner.load_state_dict(checkpoint["learners"][learner.name])
    print_heading(settings, text, model, fused, arguments)

    path = arguments.out / f"{settings.cell}.pt"
    ended = train(fused, twin, streams, settings, steps=arguments.steps, minutes=arguments.minutes)
    save_checkpoint(path, learners, settings, text)
    both = Comparison(fused, twin) if twin and twin.losses else None
    print(f"\n{both}" if both else "")
    picture = path.with_suffix(".png")
    drawn = bool(fused.losses) and draw(picture, fused, twin, both, settings)
    if both and not both.curves_agree:
        print(
            "char_lm: the fused model did not learn as torch.nn's does; this is a bug, please report it",
            file=sys.stderr,
        )
        return 1
    if ended == "interrupted":
        print(f"interrupted after step {len(fused.losses)}; go on with: {resume_command(arguments)}")
        return 130
    if ended == "out of time":
        print(f"stopped by --minutes {arguments.minutes:g} after step {len(fused.losses)} of {arguments.steps}")
    if len(text.held_out) > 1:
        loss = evaluate(model, text.held_out)
        print(f"loss on held-out text: {loss:.3f} nats, {loss / math.log(2):.3f} bits a character")
    written = path.with_suffix(".txt")
    show_sample(model, text, arguments, settings, written)
    files = [path, *([picture] if drawn else []), *([written] if arguments.length else [])]
    print(f"saved {', '.join(map(str, files))}")
    return 0


def print_heading(settings: Settings, text: Text, model: CharLM, fused: Learner, arguments: argparse.Namespace) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = f"{settings.layers} x " if settings.layers > 1 else ""
    steps = max(arguments.steps, len(fused.losses))
    begun = f", {len(fused.losses):,} done" if fused.losses else ""
    beside = f", the first {settings.compare_steps} beside torch.nn" if settings.compare_steps else ""
    print(
        f"character language model on fused_rnn {fused_rnn.__version__}, PyTorch {torch.__version__}, "
        f"threads {torch.get_num_threads()}\n"
        f"  text   {settings.text or 'pydoc_data.topics'}: {text.length:,} characters, "
        f"{len(text.vocabulary)} different\n"
        f"  model  embedding {settings.embedding_size}, {layers}{settings.cell.upper()} {settings.hidden_size}, "
        f"linear {len(text.vocabulary)}: {parameters:,} parameters\n"
        f"  steps  {steps:,} of {settings.batch_size} x {settings.seq_length} characters{begun}{beside}\n"
    )


def resume_command(arguments: argparse.Namespace) -> str:
    command = ["python", "examples/char_lm.py", "--resume"]
    parser_defaults = parse_arguments([])
    for name in ("cell", "out", "steps"):
        value = getattr(arguments, name)
        if value != getattr(parser_defaults, name):
            command += [f"--{name}", str(value)]
    return " ".join(command)


if __name__ == "__main__":
    sys.exit(main())
