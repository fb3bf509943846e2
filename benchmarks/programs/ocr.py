"""Text in pictures: EasyOCR, docTR, kraken."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .program import CONVERT, PATCH, Program, Running, training_step

FIELD = "OCR"


def easyocr() -> Running:
    from easyocr.model.vgg_model import Model

    # the sizes of its recogniser for English; reading a batch of lines
    model = Model(input_channel=1, output_channel=256, hidden_size=256, num_class=97).eval()
    lines, text = torch.rand(4, 1, 64, 256), torch.zeros(4, 26, dtype=torch.long)

    def step() -> Tensor:
        with torch.no_grad():
            return model(lines, text)

    return Running(model, step, step)


def doctr() -> Running:
    from doctr.models import crnn_mobilenet_v3_small

    model = crnn_mobilenet_v3_small(pretrained=False, pretrained_backbone=False)
    words, written = torch.rand(16, 3, 32, 128), ["recurrent"] * 16

    def outputs() -> Tensor:
        return model.eval()(words, return_model_output=True)["out_map"]

    def loss() -> Tensor:
        return model.train()(words, written)["loss"]

    return Running(model, training_step(model, loss), outputs)


def kraken() -> Running:
    from kraken.lib.vgsl import TorchVGSLModel

    # the default network of its recogniser, as `ketos train` writes it down
    spec = (
        "[1,120,0,1 Cr3,13,32 Do0.1,2 Mp2,2 Cr3,13,32 Do0.1,2 Mp2,2 Cr3,9,64 Do0.1,2 Mp2,2 Cr3,9,64 Do0.1,2 "
        "S1(1x0)1,3 Lbx200 Do0.1,2 Lbx200 Do0.1,2 Lbx200 Do O1c80]"
    )
    model = TorchVGSLModel(vgsl=spec)
    lines, widths = torch.rand(2, 1, 120, 240), torch.tensor([240, 200])
    labels, lengths = torch.randint(1, 80, (2, 12)), torch.tensor([12, 10])

    def loss() -> Tensor:
        model.nn.train()
        scores, steps = model(lines, widths)
        scores = nn.functional.log_softmax(scores.squeeze(2), dim=1).permute(2, 0, 1)
        return nn.functional.ctc_loss(scores, labels, steps, lengths)

    def outputs() -> Tensor:
        model.nn.eval()
        return model(lines, widths)[0]

    return Running(model, training_step(model, loss), outputs)


PROGRAMS = (
    Program(
        name="EasyOCR recogniser",
        field=FIELD,
        requires=("easyocr",),
        way=CONVERT,
        timed="reading 4 lines of 64 x 256 pixels",
        build=easyocr,
        trains=False,
        note=(
            "`Reader(...).recognizer` is such a model: convert it. On the CPU `Reader` quantizes it by default; "
            "pass `quantize=False`, since `quantize_dynamic` knows `torch.nn`'s layers only."
        ),
    ),
    Program(
        name="docTR crnn_mobilenet_v3_small",
        field=FIELD,
        requires=("python-doctr",),
        way=CONVERT,
        timed="a training step on 16 words",
        build=doctr,
        note=("A plain model; predictors hold it as `predictor.reco_predictor.model`."),
    ),
    Program(
        name="kraken VGSL",
        field=FIELD,
        requires=("kraken",),
        way=PATCH,
        timed="a training step on 2 lines of 120 x 240 pixels",
        build=kraken,
        note=(
            "Built under the patch, because its initialisation asks `isinstance(m, nn.LSTM)`: layers that are not "
            "get other first values."
        ),
    ),
)
