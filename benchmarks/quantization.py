"""What fewer bits of the weights do to the numbers: errors after many steps, and trained models before and after.

python -m benchmarks.quantization                                    # random weights and Silero's, a minute
python -m benchmarks.quantization --data FOLDER                      # and models of examples/, trained here: minutes
python -m benchmarks.quantization --data FOLDER --json benchmarks/results/quantization-NAME.json
python benchmarks/tables.py benchmarks/results/quantization-NAME.json    # into docs/quantization.md

An error is the largest difference from the float32 layer, in float64 arithmetic, among the outputs of the last tenth of
so many steps. ONNX Runtime's int8 is its quantize_dynamic of the same weights, one scale a tensor and, `per_channel`,
one a row; with `reduce_range`, 7 bits, where the processor has no instructions that multiply bytes: it adds two
products in 16 bits there, which 8 bits overflow.

Models are trained in float32 by the examples' own code, from seed 0, for a fixed number of steps. --data has the files
that the examples read: tinyshakespeare.txt, and small parts of aclImdb and of AG's corpus.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_rnn
from benchmarks.tables import accuracy
from fused_rnn import _C
from fused_rnn.bench import environment, onnx_model
from fused_rnn.bench.cases import Case, Shape
from fused_rnn.demo import EXAMPLES

STEPS = (10, 100, 1000, 10000)
FORMATS = ("int8", "bfloat16", "float16")

Runner = Callable[[Tensor], Tensor]  # (T, 1, I) to (T, 1, H)


def onnxruntime_int8(layer: Any, steps: int, per_channel: bool) -> Runner:
    """An LSTM's outputs by ONNX Runtime, its weights quantized by quantize_dynamic."""
    import logging

    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it recommends a preprocessing that is for other models
    shape = Shape("quantization", 1, steps, layer.input_size, layer.hidden_size)
    model = onnx_model.build(Case(shape, "lstm", "inference", "float32"), layer)
    with tempfile.TemporaryDirectory() as folder:
        import onnx

        plain, small = Path(folder) / "plain.onnx", Path(folder) / "small.onnx"
        onnx.save(model, str(plain))
        quantize_dynamic(
            plain, small, per_channel=per_channel, weight_type=QuantType.QInt8, reduce_range=not _C.multiplies_bytes()
        )
        if "DynamicQuantizeLSTM" not in {node.op_type for node in onnx.load(str(small)).graph.node}:
            raise RuntimeError("quantize_dynamic left the LSTM as it was")
        session = onnxruntime.InferenceSession(str(small), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["output"], {"input": x.numpy()})[0]).view(len(x), 1, -1)


def by_onnxruntime(layer: Any, steps: int) -> dict[str, Runner]:
    return {
        "ONNX Runtime int8": onnxruntime_int8(layer, steps, False),
        "ONNX Runtime int8, per_channel": onnxruntime_int8(layer, steps, True),
    }


def contestants(layer: Any, steps: int) -> dict[str, Runner]:
    def of(module: Any) -> Runner:
        return lambda x: module(x)[0]

    found: dict[str, Runner] = {name: of(fused_rnn.quantize(layer, weights=name)) for name in FORMATS}
    return found | (by_onnxruntime(layer, steps) if type(layer).__name__ == "LSTM" else {})


@torch.no_grad()
def errors(layer: Any, x: Tensor) -> dict[str, list[float]]:
    """By contestant: the largest error at the end of each number of steps."""
    plain = layer.double()(x.double())[0].float()
    layer.float()
    found = {}
    for name, run in contestants(layer, len(x)).items():
        difference = (run(x) - plain).abs().amax((1, 2))
        found[name] = [difference[steps - max(1, steps // 10) : steps].max().item() for steps in STEPS]
    return found


@contextmanager
def examples() -> Iterator[Callable[[str], ModuleType]]:
    """Give the function that imports an example: they find what they share in their own folder."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(EXAMPLES))


# Silero's detector ---------------------------------------------------------------------------------------------------


def of_silero(example: Callable[[str], ModuleType]) -> tuple[dict[str, list[float]], dict[str, Any]] | None:
    """Errors of the detector's LSTM on what its encoder makes of speech, and what they do to the probabilities.

    None where the package that has the weights is not installed.
    """
    silero, voice = example("common.silero"), example("voice_activity")
    path = silero.package_file(silero.WEIGHTS[0])
    if path is None:
        return None
    detector = silero.Detector.load(path)
    chunks, spoken = STEPS[-1], shutil.which("espeak-ng") is not None
    seconds = chunks * silero.CHUNK / silero.SAMPLE_RATE
    sound = (voice.speak(seconds)[0] if spoken else voice.hum(seconds + 1))[: chunks * silero.CHUNK]
    samples = nn.functional.pad(sound, (silero.CONTEXT, 0)).unfold(0, silero.CONTEXT + silero.CHUNK, silero.CHUNK)
    with torch.no_grad():
        x = detector.encode(samples).unsqueeze(1)
    layer = fused_rnn.LSTM(silero.FEATURES, silero.FEATURES).eval()
    layer.load_state_dict({f"{name}_l0": value for name, value in detector.lstm_cell.state_dict().items()})

    def heard(run: Runner) -> Tensor:
        with torch.no_grad():
            return detector.head(run(x).squeeze(1))

    plain = heard(lambda x: layer(x)[0])
    differences = {name: heard(run) - plain for name, run in contestants(layer, chunks).items()}
    probabilities = {
        "sound": f"{seconds:.0f} seconds of " + ("speech by espeak-ng" if spoken else "a made-up voice"),
        "chunks": chunks,
        "with_speech": int((plain >= voice.BEGINS).sum()),
        "largest_difference": {name: value.abs().max().item() for name, value in differences.items()},
        "other_decisions": {
            name: int(((plain + value >= voice.BEGINS) != (plain >= voice.BEGINS)).sum())
            for name, value in differences.items()
        },
    }
    return errors(layer, x), probabilities


# Trained models ------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A model of an example, and how it is measured.

    measure: of a model, as the example's workload calls it: a perplexity or an accuracy.
    """

    title: str
    quantity: str
    workload: Any
    steps: int  # of training
    measure: Callable[[Any], float]
    text: Tensor | None = None  # of a language model with one LSTM, which ONNX Runtime runs, too: held-out tokens (N)


def models(example: Callable[[str], ModuleType], folder: Path, arguments: argparse.Namespace) -> Iterator[Trained]:
    """Each as it is asked for: what is read for one need not stay for the others."""
    loss_of_stream = example("common.training").loss_of_stream

    def perplexity(tokens: Tensor) -> Callable[[Any], float]:
        return lambda model: math.exp(loss_of_stream(model, tokens, len(tokens)))

    def of_workload(workload: Any) -> Callable[[Any], float]:
        return lambda model: workload.evaluate(model)[workload.metric]

    char_lm = example("char_lm")
    text = char_lm.Text(example("common.data").read_text(folder / "tinyshakespeare.txt"))
    chars = char_lm.CharWorkload(text, char_lm.Settings(), arguments)
    title = f"characters, LSTM {chars.settings.hidden_size} (char_lm)"
    yield Trained(title, "perplexity", chars, 400, perplexity(chars.held_out), chars.held_out)

    imdb = example("imdb")
    reviews = imdb.Sentiment("imdb-lstm", nn.LSTM, imdb.read_folder(folder), arguments)
    yield Trained("film reviews, bidirectional LSTM 64 (imdb)", "accuracy", reviews, 310, of_workload(reviews))

    ag_news = example("ag_news")
    corpus = ag_news.read_corpus(folder, arguments.seed)
    for name, what, steps in (
        ("rnn-masked", "RNN 16", 950),
        ("bilstm-2-layers", "2 layers of bidirectional LSTM 64", 285),
    ):
        topics = ag_news.Topics(name, corpus, arguments)
        yield Trained(f"topics of news, {what} (ag_news)", "accuracy", topics, steps, of_workload(topics))


def trained(model: Trained, example: Callable[[str], ModuleType], arguments: argparse.Namespace) -> Any:
    """The model after its steps, in eval mode."""
    training = example("common.training")
    arguments.steps = model.steps
    arguments.epochs = -(-model.steps // model.workload.steps_per_epoch)
    learners = training.make_learners(model.workload, arguments)
    training.train(learners, arguments)
    return learners[0].model.eval()


class Decisions:
    """A model that remembers what it decides: the likeliest class, or whether a single logit is above 0."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.made: list[Tensor] = []

    def __call__(self, *arguments: Any) -> Any:
        result = self.model(*arguments)
        logits = result[0] if isinstance(result, tuple) else result
        self.made.append((logits > 0 if logits.dim() == 1 else logits.argmax(-1)).flatten())
        return result


class ByRunner(nn.Module):
    """A layer's outputs by a runner, from the zero state."""

    def __init__(self, run: Runner) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, None]:
        return self.run(x), None


@torch.no_grad()
def before_and_after(model: Trained, module: Any) -> dict[str, Any]:
    """What is measured of the float32 model and of those made of it, and how many of its decisions change."""
    others = {name: fused_rnn.quantize(module, weights=name) for name in FORMATS}
    if model.text is not None:
        for name, run in by_onnxruntime(module.recurrent, len(model.text) - 1).items():
            others[name] = copy_with(module, ByRunner(run))
    plain = Decisions(module)
    values = {"float32": model.measure(plain)}
    wanted, changed = torch.cat(plain.made), {}
    for name, other in others.items():
        decisions = Decisions(other)
        values[name] = model.measure(decisions)
        changed[name] = int((torch.cat(decisions.made) != wanted).sum())
    found = {"model": model.title, "steps": model.steps, "quantity": model.quantity, "values": values}
    return found | {"decisions": len(wanted), "other_decisions": changed}


def copy_with(module: Any, recurrent: nn.Module) -> Any:
    """The model with another layer in the place of its own; all else is shared."""
    other = module.__class__.__new__(module.__class__)
    other.__dict__ = module.__dict__ | {"_modules": module._modules | {"recurrent": recurrent}}
    return other


@torch.no_grad()
def errors_on_text(model: Trained, module: Any) -> dict[str, list[float]]:
    assert model.text is not None
    return errors(module.recurrent, module.embedding(model.text[: STEPS[-1]]).unsqueeze(1))


# The program ---------------------------------------------------------------------------------------------------------


def described() -> dict[str, Any]:
    import onnxruntime

    return environment.describe(freed_memory_kept=False, peers={"ONNX Runtime": onnxruntime.__version__})


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the examples' data; none: no model is trained")
    parser.add_argument("--steps", type=int, help="training steps at most, to see that everything runs")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(None if argv is None else list(argv))
    torch.manual_seed(1)
    result: dict[str, Any] = {"kind": "quantization", "environment": described(), "steps": STEPS, "errors": {}}
    result["reduce_range"] = not _C.multiplies_bytes()
    for name, layer in {
        "LSTM, I 128 H 128": fused_rnn.LSTM(128, 128),
        "LSTM, I 512 H 512": fused_rnn.LSTM(512, 512),
        "GRU, I 128 H 128": fused_rnn.GRU(128, 128),
        "RNN, I 128 H 128": fused_rnn.RNN(128, 128),
    }.items():
        found = errors(layer.eval(), torch.randn(STEPS[-1], 1, layer.input_size))
        result["errors"][f"{name}, torch.nn's first weights, normal input"] = found
    with examples() as example:
        if voices := of_silero(example):
            result["silero"] = voices[1]
            title = f"Silero's voice activity detector, LSTM 128, {voices[1]['sound']}"
            result["errors"][title] = voices[0]
        if given.data is not None:
            options = example("common.options").make_parser("quantization", "", data="", epochs=1)
            arguments = options.parse_args(["--compare-steps", "0"])
            result["trained"] = []
            for model in models(example, given.data, arguments):
                model = model._replace(steps=min(model.steps, given.steps or model.steps))
                module = trained(model, example, arguments)
                result["trained"].append(before_and_after(model, module))
                if model.text is not None:
                    result["errors"][f"Trained model of {model.title}, its text"] = errors_on_text(model, module)
    print(accuracy(result, str(given.json)))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
