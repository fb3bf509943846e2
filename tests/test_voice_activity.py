"""The example that listens for speech: the numbers of the detector's own programs, and speech where somebody speaks."""

from __future__ import annotations

import importlib
import importlib.util
import math
import shutil
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fused_rnn.demo import EXAMPLES

pytestmark = pytest.mark.kernels

RATE, CHUNK = 16000, 512

# Sums of up to 516 terms in another order, in float32, and what the state makes of it. Over a minute of speech the
# package's own two programs differ by 6e-6 from one another, and the example by no more from either.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("voice_activity")
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in [name for name in sys.modules if name.partition(".")[0] in ("common", "voice_activity")]:
            del sys.modules[name]


def of_package(example: Any, name: str) -> Path:
    path: Path | None = example.silero.package_file(name)
    if path is None:
        pytest.skip(f"silero-vad is not installed, which has {name}")
    return path


@pytest.fixture(scope="module")
def recording(example: Any) -> Tensor:
    """A minute: speech where there is espeak-ng, otherwise a made-up voice."""
    samples: Tensor = example.speak(60)[0] if shutil.which("espeak-ng") else example.hum(60)
    return samples[: len(samples) // CHUNK * CHUNK]


@pytest.fixture(scope="module")
def heard(example: Any, recording: Tensor) -> Tensor:
    """What a listener says of each chunk, with the weights that the package's programs have."""
    listener = example.silero.Listener(example.silero.Detector.load(of_package(example, "silero_vad.jit")))
    found = torch.tensor([listener.hear(chunk) for chunk in recording.split(CHUNK)])
    # it is a recording of which there is something to say, and what is said differs from chunk to chunk
    assert len(found) > 1800 and (found > 0.9).sum() > 100 and (found < 0.1).sum() > 100
    return found


@pytest.fixture
def of_no_package(example: Any) -> Any:
    """A detector with weights that are no one's."""
    torch.manual_seed(0)
    return example.silero.Detector().eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_a_minute_has_the_probabilities_of_the_torchscript(example: Any, recording: Tensor, heard: Tensor) -> None:
    script: Any = torch.jit.load(str(of_package(example, "silero_vad.jit"))).eval()
    with torch.no_grad():
        expected = torch.tensor([script(chunk[None], RATE).item() for chunk in recording.split(CHUNK)])
    torch.testing.assert_close(heard, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["silero_vad.onnx", "silero_vad_openvino_16k.onnx"])
def test_a_minute_has_the_probabilities_of_the_onnx_file(
    name: str, example: Any, recording: Tensor, heard: Tensor
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = runtime.InferenceSession(str(of_package(example, name)), options, providers=["CPUExecutionProvider"])
    rate = {"sr": torch.tensor(RATE).numpy()} if len(session.get_inputs()) == 3 else {}
    state, expected = torch.zeros(2, 1, 128).numpy(), []
    for samples in F.pad(recording, (64, 0)).unfold(0, 64 + CHUNK, CHUNK):
        probability, state = session.run(None, {"input": samples[None].numpy(), "state": state} | rate)
        expected.append(probability.item())
    torch.testing.assert_close(heard, torch.tensor(expected), rtol=0, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_weights_from_safetensors_are_of_the_same_network(example: Any, recording: Tensor) -> None:
    """They are others than in the package's programs: put into one of these, they say what the example says."""
    weights = pytest.importorskip("safetensors.torch").load_file(of_package(example, "silero_vad_16k.safetensors"))
    script: Any = torch.jit.load(str(of_package(example, "silero_vad.jit"))).eval()
    names = example.silero._IN_TORCHSCRIPT
    state = script.state_dict()
    assert set(names) == set(weights) and {n for n in state if n.startswith("_model.")} == set(names.values())
    for name, theirs in names.items():
        state[theirs].copy_(weights[name])
    some = recording[: 200 * CHUNK]
    with torch.no_grad():
        expected = torch.tensor([script(chunk[None], RATE).item() for chunk in some.split(CHUNK)])
    detector = example.silero.Detector.load(of_package(example, "silero_vad_16k.safetensors"))
    torch.testing.assert_close(detector.probabilities(some), expected, rtol=0, atol=TOLERANCE)


def test_a_whole_recording_has_the_numbers_of_its_chunks(example: Any, recording: Tensor, of_no_package: Any) -> None:
    some = recording[: 30 * CHUNK + 100]
    whole = of_no_package.probabilities(some)
    listener = example.silero.Listener(of_no_package)
    chunks = F.pad(some, (0, -len(some) % CHUNK)).split(CHUNK)
    torch.testing.assert_close(torch.tensor([listener.hear(c) for c in chunks]), whole, rtol=0, atol=TOLERANCE)
    listener.reset()
    assert listener.hear(chunks[0]) == pytest.approx(whole[0].item(), abs=TOLERANCE)


def test_matrices_of_the_encoder_are_its_convolutions(example: Any, of_no_package: Any) -> None:
    samples = torch.randn(3, 576)
    real, imaginary = of_no_package.stft_conv(F.pad(samples, (0, 64), mode="reflect")[:, None]).chunk(2, dim=1)
    x = (real**2 + imaginary**2).sqrt()
    for convolution in (of_no_package.conv1, of_no_package.conv2, of_no_package.conv3, of_no_package.conv4):
        x = convolution(x).relu()
    torch.testing.assert_close(of_no_package.encode(samples), x.squeeze(2))


def test_speech_is_found_where_it_was_spoken(example: Any) -> None:
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed, which speaks")
    samples, spoken = example.speak(20)
    detector = example.silero.Detector.load(of_package(example, "silero_vad.jit"))
    found = list(example.segments(detector.probabilities(samples).tolist()))
    for begin, end in spoken:
        inside = sum(max(0.0, min(end, e) - max(begin, b)) for b, e in found)
        assert inside > 0.85 * (end - begin)
    # and nothing is found further than a quarter of a second from it: pauses last 1.5
    assert all(any(b > begin - 0.25 and e < end + 0.25 for begin, end in spoken) for b, e in found)


def test_segments_begin_and_end_as_they_are_meant_to(example: Any) -> None:
    def found(*runs: tuple[float, int]) -> list[tuple[float, float]]:
        probabilities = [probability for probability, count in runs for _ in range(count)]
        return [(round(b / 0.032, 2), round(e / 0.032, 2)) for b, e in example.segments(probabilities)]

    margin = 0.03 / 0.032
    around = [(pytest.approx(10 - margin, abs=0.01), pytest.approx(30 + margin, abs=0.01))]
    assert found((0.1, 10), (0.9, 20), (0.1, 10)) == around
    # between the two levels it goes on as it is, and a pause shorter than 0.1 s is none
    assert found((0.4, 10), (0.9, 5), (0.4, 10), (0.9, 5), (0.1, 10)) == around
    assert found((0.1, 10), (0.9, 10), (0.1, 2), (0.9, 8), (0.1, 10)) == around
    assert len(found((0.1, 10), (0.9, 10), (0.1, 5), (0.9, 10))) == 2
    assert found((0.1, 10), (0.9, 5), (0.1, 10)) == []  # shorter than 0.25 s
    assert found((0.9, 20)) == [(0.0, 20.0)]  # to the end
    assert found() == []


def test_a_recording_of_another_rate_has_the_same_sound(example: Any) -> None:
    def tone(rate: int) -> Tensor:
        return torch.sin(2 * math.pi * 440 * torch.arange(rate, dtype=torch.float64) / rate).float()

    for rate in (8000, 22050, 44100):
        torch.testing.assert_close(example.resampled(tone(rate), rate), tone(RATE), rtol=0, atol=1e-4)


def write_wav(path: Path, samples: bytes, channels: int = 1, width: int = 2, rate: int = RATE) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples)
    return path


def test_channels_of_a_recording_are_averaged(example: Any, tmp_path: Path) -> None:
    both = torch.tensor([[100, 300], [-200, 0]], dtype=torch.int16)
    path = write_wav(tmp_path / "two.wav", both.numpy().tobytes(), channels=2)
    assert example.read_wav(path).tolist() == [200 / 2**15, -100 / 2**15]


def test_what_is_wrong_with_files_is_said_in_a_line(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    text.write_text("no sound")
    (tmp_path / "text.safetensors").write_text("no weights")
    weights = tmp_path / "weights.pt"
    torch.save({}, weights)
    with pytest.raises(example.ExampleError, match="recording: expected a WAV file, got .*text"):
        example.read_wav(text)
    with pytest.raises(example.ExampleError, match="of 16 bits, got .* of 8"):
        example.read_wav(write_wav(tmp_path / "8.wav", b"1234", width=1))
    with pytest.raises(example.ExampleError, match="without a sample"):
        example.read_wav(write_wav(tmp_path / "empty.wav", b""))
    has_safetensors = importlib.util.find_spec("safetensors") is not None
    for wrong in (text, weights, *([tmp_path / "text.safetensors"] if has_safetensors else [])):
        assert example.main(["--weights", str(wrong)]) == 2
        assert f"--weights: expected silero_vad.jit or silero_vad_16k.safetensors of silero-vad, got {wrong}" in (
            capsys.readouterr().err
        )
    assert example.main(["--weights", str(tmp_path / "none")]) == 2
    assert "--weights: expected a file, got" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert example.main([]) == 2
    assert "--weights: expected silero_vad.jit or" in capsys.readouterr().err


def test_a_chunk_of_another_length_is_refused(example: Any, of_no_package: Any) -> None:
    with pytest.raises(ValueError, match=r"chunk: expected \(512,\), got \(256,\)"):
        example.silero.Listener(of_no_package).hear(torch.zeros(256))
