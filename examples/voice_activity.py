"""Says when somebody speaks in a recording: Silero's detector, its LSTM on a Stream, a chunk of 32 ms after the other.

    pip install silero-vad safetensors                           # the weights; of the package nothing is imported
    python examples/voice_activity.py recording.wav
    python examples/voice_activity.py                            # a minute of speech that espeak-ng makes
    python examples/voice_activity.py --weights silero_vad_16k.safetensors

The network is in examples/common/silero.py: an encoder in plain PyTorch, an LSTM cell of 128 units on fused_rnn.Stream.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from common import options, silero
from common.options import ExampleError
from common.silero import CHUNK, SAMPLE_RATE
from torch import Tensor

# Speech begins where the probability reaches the first and ends where it stays below the second for the pause; shorter
# speech is none. What is found is widened by the margin, for beginnings and ends that are soft.
BEGINS, ENDS = 0.5, 0.35
LEAST_PAUSE, LEAST_SPEECH, MARGIN = 0.1, 0.25, 0.03

SENTENCES = (
    "The detector listens to thirty two milliseconds at a time, and remembers what it has heard.",
    "A kettle, a door and a passing train are not speech.",
    "She had been waiting at the station since early in the morning.",
    "Most of a conversation is silence, and nobody wants to send that over a network.",
    "Please say the number of your room after the tone.",
    "Rain is expected in the north, and some sun towards the evening.",
    "When both of them talk at once, neither is understood.",
    "That was the last question for today. Thank you, and good night.",
)
VOICES = (("en-us", 150, 40), ("en-gb", 170, 60), ("en-us", 130, 75))  # of espeak-ng, words a minute, pitch
PAUSE = 1.5  # seconds around every sentence


def read_wav(path: Path) -> Tensor:
    """Return a recording as (samples) of 16 kHz from -1 to 1: a WAV file of 16 bits, of any rate, its channels' mean.

    Raises:
        ExampleError: it is no such file, or has no sample.
    """
    try:
        with wave.open(str(path)) as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise ExampleError(f"recording: expected a WAV file, got {path}: {error}") from None
    if width != 2:
        raise ExampleError(f"recording: expected a WAV file of 16 bits, got {path} of {8 * width}")
    data = data[: len(data) // (2 * channels) * 2 * channels]
    if not data:
        raise ExampleError(f"recording: expected sound, got {path} without a sample")
    samples = torch.frombuffer(bytearray(data), dtype=torch.int16).view(-1, channels).float().mean(1) / 2**15
    return resampled(samples, rate)


def resampled(samples: Tensor, rate: int) -> Tensor:
    """Return (samples) of any rate at 16 kHz: frequencies that both have stay as they are, the others are left out."""
    length = max(1, round(len(samples) * SAMPLE_RATE / rate))
    if rate == SAMPLE_RATE:
        return samples
    return torch.fft.irfft(torch.fft.rfft(samples), length) * (length / len(samples))


def speak(seconds: float, seed: int = 0) -> tuple[Tensor, list[tuple[float, float]]]:
    """Let espeak-ng speak for so many seconds, with pauses and faint noise.

    Returns:
        (samples) of 16 kHz, and where the sentences are: begin and end in seconds.

    Raises:
        ExampleError: it is not installed, or fails.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise ExampleError("espeak-ng: expected the program on the PATH (apt-get install espeak-ng), or a recording")
    silence = torch.zeros(round(PAUSE * SAMPLE_RATE))
    parts, places, length = [silence], [], len(silence)
    number = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sentence.wav"
        while length < seconds * SAMPLE_RATE:
            language, speed, pitch = VOICES[number % len(VOICES)]
            command = [program, "-v", language, "-s", str(speed), "-p", str(pitch), "-w", str(path)]
            try:
                subprocess.run([*command, SENTENCES[number % len(SENTENCES)]], check=True, capture_output=True)
            except subprocess.CalledProcessError as error:
                raise ExampleError(f"espeak-ng: {error.stderr.decode(errors='replace').strip()}") from None
            sentence = 0.7 * read_wav(path)
            loud = (sentence.abs() > 0.01).nonzero()
            first, last = loud[0].item(), loud[-1].item()
            places.append(((length + first) / SAMPLE_RATE, (length + last) / SAMPLE_RATE))
            parts += [sentence, silence]
            length += len(sentence) + len(silence)
            number += 1
    return _noisy(torch.cat(parts), seed), places


def hum(seconds: float, seed: int = 0) -> Tensor:
    """Return a made-up signal, (samples): a buzzing voice that says "a" and "i" in turns, and pauses."""
    time_of = torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = 120 + 15 * torch.sin(2 * torch.pi * 0.7 * time_of)
    phase = 2 * torch.pi * torch.cumsum(pitch, 0) / SAMPLE_RATE
    is_a = (time_of * 3 % 2 < 1).float()
    signal = torch.zeros_like(time_of)
    for harmonic in range(1, 30):
        frequency = 120 * harmonic
        formants = [(700, 300), (1200, 2300), (2500, 3000)]
        loud = sum(torch.exp(-(((frequency - (is_a * a + (1 - is_a) * i)) / 150) ** 2)) for a, i in formants)
        signal += loud * torch.sin(harmonic * phase)
    syllables = torch.sin(torch.pi * (time_of * 3 % 1)).sqrt()
    speaks = (time_of % 5 >= 1.5).float()
    return _noisy(0.1 * signal * syllables * speaks, seed)


def _noisy(samples: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return samples + 1e-3 * torch.randn(len(samples), generator=generator)


def segments(probabilities: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Yield where there is speech: begin and end in seconds, from the probability of each chunk."""
    of_chunk = CHUNK / SAMPLE_RATE
    whole = len(probabilities) * of_chunk
    begin, quiet_since = None, None
    for number, probability in enumerate([*probabilities, *[0.0] * (1 + math.ceil(LEAST_PAUSE / of_chunk))]):
        now = number * of_chunk
        if probability >= BEGINS:
            begin, quiet_since = now if begin is None else begin, None
        elif probability < ENDS and begin is not None:
            quiet_since = now if quiet_since is None else quiet_since
            if now - quiet_since >= LEAST_PAUSE:
                if quiet_since - begin >= LEAST_SPEECH:
                    yield max(0.0, begin - MARGIN), min(whole, quiet_since + MARGIN)
                begin, quiet_since = None, None


def load(path: Path | None) -> silero.Detector:
    """Return the detector with the weights of a file, or with those of the installed package.

    Raises:
        ExampleError: there are none.
    """
    if path is None:
        path = silero.package_file(silero.WEIGHTS[0])
    if path is None:
        raise ExampleError(
            f"--weights: expected {' or '.join(silero.WEIGHTS)}, or the package that has them (pip install silero-vad)"
        )
    try:
        return silero.Detector.load(path)
    except (OSError, ValueError) as error:
        raise ExampleError(f"--weights: {error}") from None
    except ImportError:
        raise ExampleError("--weights: a .safetensors file takes the package safetensors to read") from None


def recording_of(arguments: argparse.Namespace) -> Tensor:
    if arguments.recording is not None:
        return read_wav(arguments.recording)
    if arguments.made_up or shutil.which("espeak-ng") is None:
        print(f"{arguments.seconds:g} s of a made-up buzzing voice" + ("" if arguments.made_up else ": no espeak-ng"))
        return hum(arguments.seconds, arguments.seed)
    print(f"{arguments.seconds:g} s of speech by espeak-ng")
    return speak(arguments.seconds, arguments.seed)[0]


def run(arguments: argparse.Namespace) -> int:
    options.prepare(arguments)
    detector = load(arguments.weights)
    recording = recording_of(arguments)
    listener = silero.Listener(detector)
    listener.hear(torch.zeros(CHUNK))  # the first call of anything takes long
    listener.reset()
    probabilities, seconds = [], []
    for chunk in torch.nn.functional.pad(recording, (0, -len(recording) % CHUNK)).split(CHUNK):
        begin = time.perf_counter()
        probabilities.append(listener.hear(chunk))
        seconds.append(time.perf_counter() - begin)
    found = list(segments(probabilities))
    rows = [["speech", "from, s", "to, s"]]
    rows += [[str(i), f"{begin:.2f}", f"{end:.2f}"] for i, (begin, end) in enumerate(found, 1)]
    print(options.table(rows))
    spoken = sum(end - begin for begin, end in found)
    print(f"\n{spoken:.1f} s of speech in {len(recording) / SAMPLE_RATE:.1f} s")
    median = statistics.median(seconds)
    print(
        f"{1e6 * median:.0f} us a chunk of {1e3 * CHUNK / SAMPLE_RATE:.0f} ms (the median of {len(seconds)}, "
        f"the longest {1e6 * max(seconds):.0f}); threads: {torch.get_num_threads()}"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status is that of `common.options.run_program`."""
    parser = argparse.ArgumentParser(prog="voice_activity", description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "recording", nargs="?", type=Path, help="a WAV file of 16 bits; otherwise speech is made by espeak-ng"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="PATH",
        help="a file of the package silero-vad; otherwise that of the installed one",
    )
    parser.add_argument("--made-up", action="store_true", help="a buzzing voice in place of espeak-ng's")
    parser.add_argument(
        "--seconds", type=options.positive_float, default=60.0, metavar="N", help="of made-up speech (default: 60)"
    )
    parser.add_argument(
        "--threads", type=options.positive_int, default=1, metavar="N", help="of the encoder (default: 1)"
    )
    parser.add_argument("--seed", type=options.natural_int, default=0, metavar="N", help="of noise (default: 0)")
    return options.run_program("voice_activity", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
