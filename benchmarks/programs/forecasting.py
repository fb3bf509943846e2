"""Time series: Darts, NeuralForecast, PyTorch Forecasting, GluonTS."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .program import CONVERT, PATCH, Program, Running

FIELD = "forecasting"
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what is said at each `fit` about devices, about loaders without worker processes, about fine-tuning."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def hourly(days: int, series: int = 1) -> np.ndarray:
    """Series of daily and weekly waves with noise, (series, hours)."""
    hours = np.arange(24 * days)
    phases = np.random.rand(series, 1)
    waves = np.sin(2 * np.pi * (hours / 24 + phases)) + 0.5 * np.sin(2 * np.pi * (hours / 168 + phases))
    return (3 + waves + 0.1 * np.random.randn(series, len(hours))).astype(np.float32)


def darts_rnn() -> Running:
    from darts import TimeSeries
    from darts.models import RNNModel

    values = TimeSeries.from_values(hourly(14)[0])
    model = RNNModel(
        input_chunk_length=72,
        training_length=96,
        model="GRU",
        hidden_dim=64,
        batch_size=32,
        n_epochs=0,
        random_state=0,
        pl_trainer_kwargs=QUIET,
    )
    with quietly():
        model.fit(values)  # builds the network

    def step() -> dict[str, Tensor]:
        with quietly():
            model.fit(values, epochs=1)
        return dict(model.trainer.callback_metrics)

    def outputs() -> np.ndarray:
        with quietly():
            return model.predict(48, series=values).values()

    return Running(model.model, step, outputs)


def neuralforecast_gru() -> Running:
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import GRU

    values = hourly(21, series=8)
    times = pd.date_range("2024-01-01", periods=values.shape[1], freq="h")
    frame = pd.concat([pd.DataFrame({"unique_id": str(i), "ds": times, "y": row}) for i, row in enumerate(values)])
    with quietly():
        model = GRU(
            h=24, input_size=96, encoder_hidden_size=128, max_steps=3, batch_size=8, windows_batch_size=32, **QUIET
        )
        forecast = NeuralForecast(models=[model], freq="h")
    network = forecast.models[0]  # a copy of the model
    nothing: dict[str, Tensor | None] = dict.fromkeys(("futr_exog", "hist_exog", "stat_exog"))
    window = nothing | {"insample_y": torch.from_numpy(values[:, -96:, None].copy())}

    def step() -> float:
        with quietly():
            forecast.fit(frame)
        return network.train_trajectories[-1][1]

    return Running(network, step, lambda: network.eval()(window))


def pytorch_forecasting_deepar() -> Running:
    import lightning
    import pandas as pd
    from pytorch_forecasting import DeepAR, TimeSeriesDataSet

    values = hourly(14, series=8)
    frame = pd.concat(
        [pd.DataFrame({"series": str(i), "hour": np.arange(len(row)), "value": row}) for i, row in enumerate(values)]
    )
    data = TimeSeriesDataSet(
        frame.reset_index(drop=True),
        time_idx="hour",
        target="value",
        group_ids=["series"],
        max_encoder_length=72,
        max_prediction_length=24,
        time_varying_unknown_reals=["value"],
    )
    batches = data.to_dataloader(train=True, batch_size=64, num_workers=0)
    with quietly():
        model = DeepAR.from_dataset(data, cell_type="LSTM", hidden_size=64, rnn_layers=2)
    inputs, _ = next(iter(data.to_dataloader(train=False, batch_size=64, num_workers=0)))

    def step() -> dict[str, Tensor]:
        with quietly():
            trainer = lightning.Trainer(max_steps=3, **QUIET)
            trainer.fit(model, batches)
        return dict(trainer.callback_metrics)

    def outputs() -> Tensor:
        model.eval()
        return model(inputs, n_samples=None)["prediction"]

    return Running(model, step, outputs)


def gluonts_deepar() -> Running:
    import pandas as pd
    from gluonts.dataset.pandas import PandasDataset
    from gluonts.torch.model.deepar import DeepAREstimator

    with quietly():
        estimator = DeepAREstimator(
            freq="h", prediction_length=24, context_length=72, hidden_size=64, num_layers=2, trainer_kwargs=QUIET
        )
        values = hourly(60, series=8)
        times = pd.date_range("2024-01-01", periods=values.shape[1], freq="h")
        data = PandasDataset({str(i): pd.Series(row, index=times) for i, row in enumerate(values)})
        module = estimator.create_lightning_module()
        predictor = estimator.create_predictor(estimator.create_transformation(), module)

    def step() -> list[Any]:
        with quietly(), torch.no_grad():
            return [forecast.samples for forecast in predictor.predict(data)]

    return Running(module, step, step)


PROGRAMS = (
    Program(
        name="Darts RNNModel",
        field=FIELD,
        requires=("darts",),
        way=PATCH,
        timed="`fit()`: an epoch over 2 weeks of hours, GRU",
        build=darts_rnn,
        note=("The network is built in the first `fit`, so that call is under the patch; later ones need not be."),
    ),
    Program(
        name="NeuralForecast GRU",
        field=FIELD,
        requires=("neuralforecast",),
        way=PATCH,
        timed="`fit()`: 3 steps on 32 windows of 96 hours",
        build=neuralforecast_gru,
        note=(
            "The model is built under the patch. `NeuralForecast` trains copies of the models it is given: "
            "`forecast.models` has them."
        ),
    ),
    Program(
        name="PyTorch Forecasting DeepAR",
        field=FIELD,
        requires=("pytorch-forecasting", "lightning"),
        way=CONVERT,
        timed="`Trainer.fit()`: 3 steps on 64 windows of 96 hours, LSTM",
        build=pytorch_forecasting_deepar,
        note=(
            "Its `LSTM` and `GRU` are subclasses of `torch.nn`'s that end in `super().forward`, so `convert` "
            "takes the model. Under the patch instead, import the package inside the block, before anything else "
            "imports it."
        ),
    ),
    Program(
        name="GluonTS DeepAR",
        field=FIELD,
        requires=("gluonts", "lightning"),
        way=CONVERT,
        timed="`predict()`: 100 paths of a day for 8 series, LSTM",
        build=gluonts_deepar,
        trains=False,
        note=(
            "`train` builds a new network each time: patch, or convert what is in the predictor. The time is that "
            "of sampling, step by step."
        ),
    ),
)
