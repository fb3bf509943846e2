"""Sound: torchaudio, SpeechBrain, Asteroid, pyannote.audio, Demucs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .program import CONVERT, Program, Running, training_step

FIELD = "speech"


def wavernn() -> Running:
    from torchaudio.models import WaveRNN

    # a short hop, so that a batch norm over the frames has many of them to average
    model = WaveRNN(upsample_scales=[2, 2, 5], n_classes=256, hop_length=20)
    spectrogram, waveform = torch.randn(2, 1, 128, 4 + 20), torch.rand(2, 1, 20 * 20) * 2 - 1
    classes = torch.randint(256, (2, 400))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(waveform, spectrogram).squeeze(1).transpose(1, 2), classes)

    return Running(model, training_step(model, loss), lambda: model.eval()(waveform, spectrogram))


def tacotron2() -> Running:
    from torchaudio.models import Tacotron2

    model = Tacotron2()
    tokens, lengths = torch.randint(148, (2, 12)), torch.full((2,), 12)
    spectrogram, frames = torch.randn(2, 80, 12), torch.full((2,), 12)

    def loss() -> Tensor:
        before, after, _, _ = model(tokens, lengths, spectrogram, frames)
        return nn.functional.mse_loss(before, spectrogram) + nn.functional.mse_loss(after, spectrogram)

    return Running(model, training_step(model, loss), lambda: model.eval()(tokens, lengths, spectrogram, frames)[:2])


def crdnn() -> Running:
    from speechbrain.lobes.models.CRDNN import CRDNN
    from speechbrain.nnet.losses import ctc_loss
    from speechbrain.nnet.RNN import LSTM

    features, lengths = torch.randn(4, 200, 40), torch.ones(4)
    encoder = CRDNN(
        input_shape=[4, 200, 40],
        cnn_blocks=1,
        cnn_channels=[32],
        inter_layer_pooling_size=[2],
        rnn_class=LSTM,
        rnn_layers=3,
        rnn_neurons=256,
        dnn_blocks=1,
        dnn_neurons=256,
    )
    model = nn.Sequential(encoder, nn.Linear(256, 40), nn.LogSoftmax(-1))
    targets = torch.randint(1, 40, (4, 30))

    def loss() -> Tensor:
        return ctc_loss(model(features), targets, lengths, lengths, blank_index=0)

    return Running(model, training_step(model, loss), lambda: model.eval()(features))


def dprnn() -> Running:
    from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
    from asteroid.models import DPRNNTasNet

    model = DPRNNTasNet(n_src=2, n_repeats=2, bn_chan=64, hid_size=64, chunk_size=50)
    sources = torch.randn(2, 2, 8000)
    separation = PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")

    def loss() -> Tensor:
        return separation(model(sources.sum(1)), sources)

    return Running(model, training_step(model, loss), lambda: model.eval()(sources.sum(1)))


def pyannet() -> Running:
    from pyannote.audio.core.task import Problem, Resolution, Specifications
    from pyannote.audio.models.segmentation import PyanNet

    model = PyanNet()
    model.specifications = Specifications(
        problem=Problem.MULTI_LABEL_CLASSIFICATION, resolution=Resolution.FRAME, duration=5.0, classes=["a", "b", "c"]
    )
    model.build()
    model.eval()
    sound = torch.randn(2, 1, 5 * 16000)

    def step() -> Tensor:
        with torch.inference_mode():
            return model(sound)

    return Running(model, step, step)


def demucs() -> Running:
    from demucs.demucs import Demucs

    model = Demucs(sources=["drums", "rest"], channels=16, depth=4, dconv_mode=0, lstm_layers=2, resample=False).eval()
    mixture = torch.randn(1, 2, 44100)

    def step() -> Tensor:
        with torch.inference_mode():
            return model(mixture)

    return Running(model, step, step)


PROGRAMS = (
    Program(
        name="torchaudio WaveRNN",
        field=FIELD,
        requires=("torchaudio",),
        way=CONVERT,
        timed="a training step, 2 x 400 samples",
        build=wavernn,
        note=(
            "A plain model. With a PyTorch without CUDA, the wheel's compiled library does not load; "
            "`benchmarks/programs/wheels.py` does without it."
        ),
    ),
    Program(
        name="torchaudio Tacotron2",
        field=FIELD,
        requires=("torchaudio",),
        way=CONVERT,
        timed="a training step, 2 x 12 frames, two LSTM cells a frame",
        build=tacotron2,
        note=("Two `LSTMCell`s a frame in the decoder, an LSTM in the encoder; the convolutions are most of the rest."),
    ),
    Program(
        name="SpeechBrain CRDNN",
        field=FIELD,
        requires=("speechbrain",),
        way=CONVERT,
        timed="a training step with CTC, 4 x 2 s, LSTM",
        build=crdnn,
        note=(
            "`rnn_class=speechbrain.nnet.RNN.LSTM`, which holds a `torch.nn.LSTM`; converted after the model has "
            "inferred its sizes. Its default, LiGRU, is a cell of its own."
        ),
    ),
    Program(
        name="Asteroid DPRNN-TasNet",
        field=FIELD,
        requires=("asteroid",),
        way=CONVERT,
        timed="a training step, 2 x 1 s, two speakers",
        build=dprnn,
        note=("A plain model; many short sequences (chunks and across chunks)."),
    ),
    Program(
        name="pyannote.audio PyanNet",
        field=FIELD,
        requires=("pyannote.audio",),
        way=CONVERT,
        timed="who speaks when in 2 x 5 s",
        build=pyannet,
        trains=False,
        note=(
            "A Lightning module; converted after `build()`. Pipelines hold their models as attributes: convert these."
        ),
    ),
    Program(
        name="Demucs",
        field=FIELD,
        requires=("demucs",),
        way=CONVERT,
        timed="separating 1 s of music, small model",
        build=demucs,
        trains=False,
        note=("The time-domain network, with an LSTM between encoder and decoder."),
    ),
)
