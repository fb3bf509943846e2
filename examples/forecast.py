"""Forecast a day of hourly values with its uncertainty, from histories of different lengths.

    python examples/forecast.py
    python examples/forecast.py --data load.csv             # one number a line, hourly, or the last column of a CSV

Without data the series is made up: a daily and a weekly pattern, and noise that is known, so that the best error that
any forecast can have is known too. A GRU reads a week or less (`lengths`: histories begin where a meter was installed),
and says three quantiles of each of the next 24 hours (Koenker 1978; the pinball loss). Compared are the naive forecast,
the last value for all hours, and the seasonal one, the same hours a week ago.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import data, options, report, training
from common.options import ExampleError
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

HISTORY, HORIZON = 168, 24  # hours
QUANTILES = (0.1, 0.5, 0.9)
BATCH_SIZE = 32
NOISE = 0.05
WEEKS = 60


def made_up_series(seed: int) -> Tensor:
    """Hourly values: a day that is different on weekends, a slow swing over the year, and noise."""
    hours = torch.arange(WEEKS * 168, dtype=torch.float64)
    day, week, year = (2 * math.pi * hours / period for period in (24, 168, 8766))
    weekend = ((hours // 24) % 7 >= 5).double()
    series = 1 + 0.35 * torch.sin(day - 2) * (1 - 0.5 * weekend) + 0.15 * torch.sin(2 * day) - 0.2 * weekend
    series = series + 0.1 * torch.sin(week) + 0.2 * torch.sin(year)
    generator = torch.Generator().manual_seed(seed)
    return (series + NOISE * torch.randn(len(hours), generator=generator, dtype=torch.float64)).float()


def read_series(path: Path) -> Tensor:
    values = []
    for number, line in enumerate(data.read_text(path).splitlines(), start=1):
        cell = line.rpartition(",")[2].strip()
        try:
            values.append(float(cell))
        except ValueError:
            if number > 1 and cell:  # the first line may be a heading
                raise ExampleError(
                    f"--data: expected a number at the end of line {number} of {path}, got {cell!r}"
                ) from None
    if len(values) < 10 * (HISTORY + HORIZON):
        raise ExampleError(f"--data: expected at least {10 * (HISTORY + HORIZON)} values, got {len(values)} in {path}")
    series = torch.tensor(values)
    return (series - series.mean()) / series.std()


class Forecaster(nn.Module):
    """A GRU over the values and the hours of the day and of the week, and a dense layer on its last state.

    Shape:
        history (B, T, 5), lengths (B) on the CPU -> quantiles (B, 24, 3)
    """

    def __init__(self, hidden_size: int = 64) -> None:
        super().__init__()
        self.recurrent = nn.GRU(5, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, HORIZON * len(QUANTILES))

    def forward(self, history: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(history, lengths, batch_first=True, enforce_sorted=False)
        _, h = self.recurrent(packed)
        result: Tensor = self.output(h[-1]).view(-1, HORIZON, len(QUANTILES))
        return result


def pinball(said: Tensor, wanted: Tensor) -> Tensor:
    """Mean over everything of max(q e, (q - 1) e), e = wanted - said: least where said is the quantile q."""
    error = wanted.unsqueeze(2) - said
    q = torch.tensor(QUANTILES, device=said.device, dtype=said.dtype)
    return torch.maximum(q * error, (q - 1) * error).mean()


class Forecast(training.Workload):
    name = "forecast-gru"
    title = "Forecast of the next 24 hours"
    metric = "mean absolute error"
    unit = "pinball loss"
    learning_rate = 3e-3

    def __init__(self, series: Tensor, arguments: argparse.Namespace, *, known_noise: bool) -> None:
        hours = torch.arange(len(series), dtype=torch.float32)
        angles = [2 * math.pi * hours / period for period in (24, 168)]
        self.inputs = torch.stack([series, *(f(angle) for angle in angles for f in (torch.sin, torch.cos))], dim=1)
        self.series = series
        self.seed, self.device = arguments.seed, arguments.device
        # The last fifth is not trained on.
        self.last = int(0.8 * len(series))
        if known_noise:
            self.published = f"{NOISE * math.sqrt(2 / math.pi):.4f} at best (the noise alone)"
        generator = torch.Generator().manual_seed(self.seed)
        self.tests = torch.randint(self.last + HISTORY, len(series) - HORIZON, (512,), generator=generator)

    @property
    def steps_per_epoch(self) -> int:
        return 100

    def make_model(self) -> nn.Module:
        return Forecaster()

    def windows(self, ends: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Histories that end before `ends`, of `lengths` hours, zeros behind them; and the hours that follow."""
        steps = torch.arange(HISTORY)
        place = (ends - lengths).unsqueeze(1) + steps
        live = steps < lengths.unsqueeze(1)
        history = self.inputs[place.clamp(max=len(self.series) - 1)] * live.unsqueeze(2)
        return history, lengths, self.series[ends.unsqueeze(1) + torch.arange(HORIZON)]

    def batch(self, step: int) -> Any:
        generator = torch.Generator().manual_seed((self.seed << 24) + step)
        ends = torch.randint(HISTORY, self.last - HORIZON, (BATCH_SIZE,), generator=generator)
        lengths = torch.randint(HISTORY // 4, HISTORY + 1, (BATCH_SIZE,), generator=generator)
        return self.windows(ends, lengths)

    def loss(self, model: Any, batch: Any, memory: dict[str, Any]) -> Tensor:
        history, lengths, wanted = batch
        return pinball(model(history, lengths.cpu()), wanted)

    def predict(self, model: Any, ends: Tensor) -> tuple[Tensor, Tensor]:
        history, lengths, wanted = self.windows(ends, torch.full((len(ends),), HISTORY))
        dtype = next(model.parameters()).dtype
        return model(history.to(self.device, dtype), lengths).cpu().float(), wanted

    def evaluate(self, model: Any) -> dict[str, float]:
        said, wanted = self.predict(model, self.tests)
        inside = (said[..., 0] <= wanted) & (wanted <= said[..., 2])
        return {self.metric: (said[..., 1] - wanted).abs().mean().item(), "inside 80 %": inside.float().mean().item()}

    def baselines(self) -> dict[str, float]:
        hours = torch.arange(HORIZON)
        wanted = self.series[self.tests.unsqueeze(1) + hours]
        naive = self.series[self.tests - 1].unsqueeze(1)
        seasonal = self.series[self.tests.unsqueeze(1) + hours - 168]
        return {
            "naive": (naive - wanted).abs().mean().item(),
            "seasonal": (seasonal - wanted).abs().mean().item(),
        }

    def identity(self) -> dict[str, Any]:
        return {"data": training.digest_of(self.series)}


def draw_forecast(path: Path, workload: Forecast, model: Any) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    end = workload.tests[:1]
    with torch.no_grad():
        said, wanted = workload.predict(model.eval(), end)
    past = workload.series[int(end) - 72 : int(end)]
    figure = Figure(figsize=(8, 3.6), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    hours = range(HORIZON)
    axes.plot(range(-72, 0), past, color=report.INK, linewidth=1.2)
    axes.plot(hours, wanted[0], color=report.INK, linewidth=1.2, label="what came")
    axes.plot(hours, said[0, :, 1], color=report.FUSED_COLOR, linewidth=1.8, label="median")
    axes.fill_between(hours, said[0, :, 0], said[0, :, 2], color=report.FUSED_COLOR, alpha=0.25, label="80 %")
    axes.set(xlabel="hours from now", ylabel="value")
    axes.legend(frameon=False, fontsize=9)
    report.style(axes, "A day that was not trained on")
    figure.savefig(path)
    return True


def run(arguments: argparse.Namespace) -> int:
    options.prepare(arguments)
    given = arguments.data is not None
    series = read_series(options.data_path(arguments, "hourly values")) if given else made_up_series(arguments.seed)
    workload = Forecast(series, arguments, known_noise=not given)
    outcomes: list[training.Outcome] = []
    status = report.run_all("forecast", [workload], arguments, outcomes)
    for name, error in workload.baselines().items():
        print(f"{name} forecast: mean absolute error {error:.4f}")
    picture = arguments.out / "day.png"
    if draw_forecast(picture, workload, outcomes[0].learners[0].model):
        print(f"saved {picture}")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status is that of `common.options.run_program`."""
    parser = options.make_parser(
        "forecast", str(__doc__).splitlines()[0], data="hourly values (default: a made-up series)", epochs=10
    )
    return options.run_program("forecast", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
