"""What fewer bits of the weights do to the numbers: errors after many steps, and a trained model before and after.

python -m benchmarks.quantization                          # random weights, and a character model it trains
python -m benchmarks.quantization --train-seconds 240 --vad silero_vad_16k.safetensors
python -m benchmarks.quantization --json benchmarks/results/quantization-NAME.json

An error is the largest difference from the float32 layer among the outputs of the last tenth of so many steps. ONNX
Runtime's int8 is its quantize_dynamic of the same weights, one scale a tensor and, `per_channel`, one a row.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_rnn
from fused_rnn.bench import environment, onnx_model
from fused_rnn.bench.cases import Case, Shape

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
        quantize_dynamic(plain, small, per_channel=per_channel, weight_type=QuantType.QInt8)
        if "DynamicQuantizeLSTM" not in {node.op_type for node in onnx.load(str(small)).graph.node}:
            raise RuntimeError("quantize_dynamic left the LSTM as it was")
        session = onnxruntime.InferenceSession(str(small), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["output"], {"input": x.numpy()})[0]).view(len(x), 1, -1)


def contestants(layer: Any, steps: int) -> dict[str, Runner]:
    def of(module: Any) -> Runner:
        return lambda x: module(x)[0]

    found: dict[str, Runner] = {name: of(fused_rnn.quantize(layer, weights=name)) for name in FORMATS}
    if type(layer).__name__ == "LSTM":
        found["ONNX Runtime int8"] = onnxruntime_int8(layer, steps, False)
        found["ONNX Runtime int8, per_channel"] = onnxruntime_int8(layer, steps, True)
    return found


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


class CharacterModel(nn.Module):
    def __init__(self, symbols: int, features: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, features)
        self.rnn: Any = fused_rnn.LSTM(features, hidden)
        self.linear = nn.Linear(hidden, symbols)

    def forward(self, text: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        output, hx = self.rnn(self.embedding(text), hx)
        return self.linear(output), hx


def trained(text: Tensor, symbols: int, seconds: float) -> CharacterModel:
    torch.manual_seed(0)
    model = CharacterModel(symbols)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    streams = text[: len(text) // 32 * 32].view(32, -1).T.contiguous()
    begin, position, hx = time.monotonic(), 0, None
    while time.monotonic() - begin < seconds:
        if position + 65 > len(streams):
            position, hx = 0, None
        piece = streams[position : position + 65]
        position += 64
        logits, hx = model(piece[:-1], hx)
        hx = tuple(state.detach() for state in hx)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), piece[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: CharacterModel, text: Tensor) -> float:
    logits, _ = model(text[:-1].unsqueeze(1))
    return math.exp(nn.functional.cross_entropy(logits.squeeze(1), text[1:]).item())


def character_model(path: Path, seconds: float) -> dict[str, Any]:
    characters = path.read_text()
    alphabet = sorted(set(characters))
    index = {c: i for i, c in enumerate(alphabet)}
    text = torch.tensor([index[c] for c in characters])
    test = text[-20001:]
    model = trained(text[:-20001], len(alphabet), seconds)
    perplexities = {"float32": perplexity(model, test)}
    for name in FORMATS:
        perplexities[name] = perplexity(fused_rnn.quantize(model, weights=name), test)
    plain = model.rnn
    for per_channel in (False, True):
        run = onnxruntime_int8(plain, len(test) - 1, per_channel)

        class ByOnnxRuntime(nn.Module):
            def forward(self, x: Tensor, hx: Any, run: Runner = run) -> tuple[Tensor, Any]:
                return run(x), None

        model.rnn = ByOnnxRuntime()
        perplexities["ONNX Runtime int8" + ", per_channel" * per_channel] = perplexity(model, test)
    model.rnn = plain
    with torch.no_grad():
        x = model.embedding(test[: STEPS[-1]]).unsqueeze(1)
    return {"perplexity": perplexities, "errors": errors(plain, x)}


def silero(path: Path) -> Any:
    """The LSTM of Silero's voice activity detector, from its safetensors file."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    names = {
        kind: name for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for name in tensors if kind in name
    }
    hidden = tensors[names["weight_hh"]].shape[1]
    layer = fused_rnn.LSTM(tensors[names["weight_ih"]].shape[1], hidden).eval()
    layer.load_state_dict({f"{kind}_l0": tensors[name] for kind, name in names.items()})
    return layer


def described() -> dict[str, Any]:
    import onnxruntime

    return environment.describe(freed_memory_kept=False, peers={"ONNX Runtime": onnxruntime.__version__})


def print_errors(title: str, found: dict[str, list[float]]) -> None:
    print(f"\n{title}\n\n| | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |")
    print("| --- |" + " ---: |" * len(STEPS))
    for name, values in found.items():
        print(f"| {name} | " + " | ".join(f"{value:.1e}" for value in values) + " |")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="of the character model; none: that table is left out")
    parser.add_argument("--train-seconds", type=float, default=120.0)
    parser.add_argument("--vad", type=Path, help="silero_vad_16k.safetensors of the package silero-vad")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(None if arguments is None else list(arguments))
    torch.manual_seed(1)
    result: dict[str, Any] = {"environment": described(), "steps": STEPS, "errors": {}}
    for name, layer in {
        "LSTM, I 128 H 128": fused_rnn.LSTM(128, 128),
        "LSTM, I 512 H 512": fused_rnn.LSTM(512, 512),
        "GRU, I 128 H 128": fused_rnn.GRU(128, 128),
        "RNN, I 128 H 128": fused_rnn.RNN(128, 128),
    }.items():
        found = errors(layer.eval(), torch.randn(STEPS[-1], 1, layer.input_size))
        result["errors"][f"{name}, torch.nn's first weights, normal input"] = found
    if given.vad is not None:
        layer = silero(given.vad)
        found = errors(layer, torch.randn(STEPS[-1], 1, layer.input_size).relu())
        result["errors"]["Silero's VAD, LSTM 128, input as after a ReLU"] = found
    if given.text is not None:
        of_text = character_model(given.text, given.train_seconds)
        result["errors"]["Trained character model, LSTM 256, its text"] = of_text.pop("errors")
        result |= of_text
    for title, found in result["errors"].items():
        print_errors(title, found)
    if "perplexity" in result:
        print("\n| | perplexity of 20,000 characters |\n| --- | ---: |")
        for name, value in result["perplexity"].items():
            print(f"| {name} | {value:.4f} |")
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
