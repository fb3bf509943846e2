"""Silero's voice activity detector for 16 kHz: an encoder of convolutions, an LSTM cell, and one number a chunk.

Its weights come with the package silero-vad (MIT licence), which is not imported: in data/silero_vad.jit those that its
TorchScript and its ONNX files compute with, in data/silero_vad_16k.safetensors others (of 6.2.3, at least) for the same
network. The names of the modules here are those of the second.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rnn

SAMPLE_RATE = 16000
# A chunk of 32 ms; the encoder looks back at the end of the one before.
CHUNK, CONTEXT = 512, 64
FEATURES = 128

WEIGHTS = ("silero_vad.jit", "silero_vad_16k.safetensors")
# Names in the first of them, of the half for 16 kHz.
_IN_TORCHSCRIPT = {
    "stft_conv.weight": "_model.stft.forward_basis_buffer",
    **{
        f"conv{i + 1}.{part}": f"_model.encoder.{i}.reparam_conv.{part}"
        for i in range(4)
        for part in ("weight", "bias")
    },
    **{f"lstm_cell.{part}": f"_model.decoder.rnn.{part}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    **{f"final_conv.{part}": f"_model.decoder.decoder.2.{part}" for part in ("weight", "bias")},
}

# Of the Fourier transform: frames of 16 ms every 8 ms, of which four cover a chunk and its context. The last frame is
# filled up with the mirrored end of the chunk.
_FRAME, _HOP, _MIRRORED = 256, 128, 64
_FREQUENCIES = _FRAME // 2 + 1
_FRAMES = (CONTEXT + CHUNK + _MIRRORED - _FRAME) // _HOP + 1


def package_file(name: str) -> Path | None:
    """Return the path of a file in the data of the installed silero-vad; ``None`` where there is none."""
    spec = importlib.util.find_spec("silero_vad")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "data" / name
        if path.is_file():
            return path
    return None


def _read(path: Path) -> dict[str, Tensor]:
    """Return the weights in a file by the names that :class:`Detector` has for them."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise RuntimeError(str(error)) from None
    with warnings.catch_warnings():  # TorchScript is deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        found = torch.jit.load(str(path), map_location="cpu").state_dict()
    return {name: found[theirs] for name, theirs in _IN_TORCHSCRIPT.items()}


class Detector(nn.Module):
    """The network: probabilities of speech, of a chunk after the other (:class:`Listener`) or of all chunks at once."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 2 * _FREQUENCIES, _FRAME, stride=_HOP, bias=False)
        self.conv1 = nn.Conv1d(_FREQUENCIES, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, FEATURES, 3, padding=1)
        self.lstm_cell = fused_rnn.LSTMCell(FEATURES, FEATURES)
        self.final_conv = nn.Conv1d(FEATURES, 1, 1)
        self.prepare()

    @classmethod
    def load(cls, path: Path) -> Detector:
        """Read the weights from a file of the package, a .safetensors or the TorchScript.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: the file is not that of this network.
            OSError: there is none.
        """
        if not path.is_file():
            raise FileNotFoundError(f"expected a file, got {path}")
        detector = cls()
        try:
            detector.load_state_dict(_read(path))
        except (KeyError, RuntimeError) as error:
            words = f"expected {' or '.join(WEIGHTS)} of silero-vad, got {path}"
            raise ValueError(f"{words}: {str(error).strip().splitlines()[0]}") from None
        detector.prepare()
        return detector.eval().requires_grad_(False)

    @torch.no_grad()
    def prepare(self) -> None:
        """Take over changed weights: over the four frames of a chunk each convolution is one product with a matrix."""
        frames, self._matrices = _FRAMES, []
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            channels = convolution.in_channels
            basis = torch.eye(frames * channels).view(-1, frames, channels).transpose(1, 2)
            bias = convolution(torch.zeros(1, channels, frames))
            columns = (convolution(basis) - bias).transpose(1, 2)
            frames = columns.shape[1]
            self._matrices.append((columns.flatten(1).t().contiguous(), bias.transpose(1, 2).flatten()))
        self._waves, self._of_head = self.stft_conv.weight.squeeze(1), self.final_conv.weight.squeeze(-1)

    def encode(self, samples: Tensor) -> Tensor:
        """Return what the LSTM reads, (N, 128), of N chunks, each behind its context: (N, 576)."""
        frames = F.pad(samples, (0, _MIRRORED), mode="reflect").unfold(1, _FRAME, _HOP)
        waves = F.linear(frames, self._waves)  # (N, 4, 258): cosines, then sines
        real, imaginary = waves.split(_FREQUENCIES, dim=2)
        x = torch.hypot(real, imaginary).flatten(1)
        for weight, bias in self._matrices:
            x = F.linear(x, weight, bias).relu_()
        return x

    def head(self, h: Tensor) -> Tensor:
        """Return the probability that a chunk has speech, (N), from h of its step, (N, 128)."""
        return F.linear(h.relu(), self._of_head, self.final_conv.bias).sigmoid().squeeze(-1)

    @torch.inference_mode()
    def probabilities(self, recording: Tensor) -> Tensor:
        """Return the probability of speech for each chunk of a whole recording, (samples), the last one filled up."""
        samples = F.pad(recording, (CONTEXT, -len(recording) % CHUNK)).unfold(0, CONTEXT + CHUNK, CHUNK)
        steps = self.encode(samples)
        return self.head(fused_rnn.Stream(self.lstm_cell).chunk(steps.unsqueeze(1)).squeeze(1))


class Listener:
    """One microphone: hears a chunk after the other, as they come."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self.stream = fused_rnn.Stream(detector.lstm_cell)
        self._samples = torch.zeros(1, CONTEXT + CHUNK)
        self._context, self._chunk, self._end = (
            self._samples[0, begin:end] for begin, end in ((0, CONTEXT), (CONTEXT, None), (CHUNK, None))
        )

    @torch.inference_mode()
    def hear(self, chunk: Tensor) -> float:
        """Return the probability that the next chunk, (512) of 16 kHz from -1 to 1, has speech.

        Raises:
            ValueError: it has another shape.
        """
        if chunk.shape != (CHUNK,):
            raise ValueError(f"chunk: expected ({CHUNK},), got {tuple(chunk.shape)}")
        self._context.copy_(self._end)
        self._chunk.copy_(chunk)
        return self._detector.head(self.stream.step(self._detector.encode(self._samples))).item()

    def reset(self) -> None:
        """Begin with another recording."""
        self.stream.reset()
        self._samples.zero_()
