"""The bars: what the fused layers are meant to reach, as data, and how far a result is from them.

Judged are the records of a result file (`report.to_json`), so that a kept result can be judged again.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cases import CELLS
from .peers import FUSED, ONNX_RUNTIME, ONNX_RUNTIME_INT8, OPENVINO, TORCH_NN
from .serving import FUSED_FLOAT32, LOOP
from .serving_cases import POOL_SIZE, pool_name

Record = Mapping[str, Any]

ENGINES = (TORCH_NN.name, ONNX_RUNTIME.name, OPENVINO.name)


def ratio_to_torch(record: Record) -> float | None:
    """Time of `torch.nn` over ours."""
    return _ratio(record, TORCH_NN.name)


def ratio_to_best(record: Record) -> float | None:
    """Time of the fastest of `ENGINES` over ours; `None` if one of them was not measured."""
    ratios = [_ratio(record, name) for name in ENGINES]
    return None if None in ratios else min(ratio for ratio in ratios if ratio is not None)


def time_share_of_torch(record: Record) -> float | None:
    """Our time over that of `torch.nn`."""
    ratio = ratio_to_torch(record)
    return None if ratio is None else 1 / ratio


def time_share_of_best(record: Record) -> float | None:
    """Our time over that of the fastest of `ENGINES`; `None` if one of them was not measured."""
    ratio = ratio_to_best(record)
    return None if ratio is None else 1 / ratio


def time_share_of_int8(record: Record) -> float | None:
    """Our time over that of ONNX Runtime's int8."""
    ratio = _ratio(record, ONNX_RUNTIME_INT8.name)
    return None if ratio is None else 1 / ratio


def time_share_of_float32(record: Record) -> float | None:
    """Time of our int8 over that of our own float32."""
    ratio = _ratio(record, FUSED_FLOAT32)
    return None if ratio is None else 1 / ratio


def ratio_to_loop(record: Record) -> float | None:
    """Time of as many streams in a loop over that of a pool."""
    return _ratio(record, LOOP)


def share_of_peak(record: Record) -> float | None:
    """Our rate over that of the multiply-add units."""
    found = record.get("share_of_peak", {}).get(FUSED.name)
    return None if found is None else float(found["median"])


def saved_share_of_torch(record: Record) -> float | None:
    """Bytes that we save for backward over those of `torch.nn`."""
    return float(record["bytes_saved"][FUSED.name] / record["bytes_saved"][TORCH_NN.name])


def slowdown_beyond_loss(record: Record) -> float | None:
    """How many times slower than alone, over what the processors lost explain."""
    found = record["beyond_loss"].get(FUSED.name)
    return None if found is None else float(found)


@dataclass(frozen=True)
class Bar:
    """One requirement.

    Attributes:
        name: what the table of bars calls it.
        required: the value to reach, in the bar's own quantity.
        quantity: takes it from a record; `None` where the record lacks it.
        where: the values that fields of a record must have to belong to the bar.
        table: the list of the result that holds the records.
        mean: the geometric mean counts; otherwise every record does, so the worst.
        at_most: `required` is an upper limit.
        noise: a worst value short of `required` by no more than this is put down to noise.
    """

    name: str
    required: float
    quantity: Callable[[Record], float | None]
    where: Mapping[str, tuple[str, ...]]
    table: str = "cases"
    mean: bool = False
    at_most: bool = False
    noise: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What a result says about a bar.

    Attributes:
        threads: of the cases judged; `None` where the bar is not about a thread count.
        measured: `None` if no case of the bar, or not every one, was measured.
        worst: name of the case that is furthest from the bar.
        count: number of cases.
        at_peak: what `measured` would be if our multiply-adds ran at their measured peak and all else took no time: a
            ratio of times beyond it is out of reach of this arithmetic. `None` where no such bound is known.
    """

    bar: Bar
    threads: int | None
    measured: float | None
    worst: str
    count: int
    at_peak: float | None = None

    @property
    def met(self) -> bool:
        if self.measured is None:
            return False
        if self.bar.at_most:
            return self.measured <= self.bar.required + self.bar.noise
        return self.measured >= self.bar.required - self.bar.noise


def _cases(**where: str) -> dict[str, tuple[str, ...]]:
    """Return a condition; several values of a field are separated by commas."""
    return {"dtype": ("float32",)} | {name: tuple(values.split(",")) for name, values in where.items()}


def _per_cell(name: str, required: tuple[float, float, float], **options: Any) -> list[Bar]:
    """Return the same bar for LSTM, GRU and RNN."""
    where = options.pop("where")
    return [
        Bar(f"{name}, {cell.upper()}", value, where=where | {"cell": (cell,)}, **options)
        for cell, value in zip(("lstm", "gru", "rnn"), required)
    ]


_INFERENCE = _cases(part="table", mode="inference", group="large,small")
_CALLS = ("B1 T1 I8 H8", "B1 I8 H8 cell")
_FEW_ROWS = "B64 I256 H256 cell,B3 I1024 H1024 cell,B64 I1024 H1024 cell,B3 T1 I1536 H1024,B32 T1 I1536 H1024"

BARS: tuple[Bar, ...] = (
    Bar("inference, best peer / fused, each", 1.0, ratio_to_best, _INFERENCE, noise=0.03),
    Bar("inference, best peer / fused, mean", 1.2, ratio_to_best, _INFERENCE, mean=True),
    *(
        bar
        for mode, group, required in (
            ("inference", "large", (1.0, 2.6, 2.6)),
            ("inference", "small", (1.6, 4.5, 3.0)),
            ("training", "large", (1.05, 2.5, 2.4)),
            ("training", "small", (1.6, 5.0, 4.0)),
        )
        for bar in _per_cell(
            f"{mode}, torch.nn / fused, mean, {group}",
            required,
            quantity=ratio_to_torch,
            where=_cases(part="table", mode=mode, group=group),
            mean=True,
        )
    ),
    *(
        Bar(f"{mode}, share of the FMA peak, large, each", required, share_of_peak, _cases(group="large", mode=mode))
        for mode, required in (("inference", 0.85), ("training", 0.80))
    ),
    *(
        bar
        for mode, required in (("inference", (1.0, 1.5, 1.5)), ("training", (1.3, 2.0, 2.0)))
        for bar in _per_cell(
            f"bfloat16 {mode}, torch.nn / fused, each",
            required,
            quantity=ratio_to_torch,
            where=_cases(part="table", mode=mode, dtype="bfloat16", group="large,small"),
        )
    ),
    *(
        Bar(f"{name}, fused / torch.nn, each", 0.75, time_share_of_torch, where, at_most=True)
        for name, where in (
            ("tiny call", _cases(mode="inference", shape_name=_CALLS[0])),
            ("a cell's step", _cases(mode="inference", shape_name=_CALLS[1])),
            ("tiny call, forward and backward", _cases(mode="training", shape_name=_CALLS[0])),
        )
    ),
    *(
        Bar(
            f"few rows, large weights, {mode}, torch.nn / fused, each",
            1.0,
            ratio_to_torch,
            _cases(mode=mode, dtype="float32,bfloat16", shape_name=_FEW_ROWS),
        )
        for mode in ("inference", "training")
    ),
    *(
        Bar(f"sweeps, {mode}, torch.nn / fused, each", 0.95, ratio_to_torch, _cases(part="sweeps", mode=mode))
        for mode in ("inference", "training")
    ),
    *(
        Bar(
            f"crowded, {scenario}: slowdown / processors lost, each",
            3.0,
            slowdown_beyond_loss,
            {"scenario": (scenario,)},
            table="crowded",
            at_most=True,
        )
        for scenario in ("pinned", "four processes", "64 threads")
    ),
    *_per_cell(
        "saved for backward, fused / torch.nn",
        (0.75, 1.0, 1.0),
        quantity=saved_share_of_torch,
        where={},
        table="memory",
        at_most=True,
    ),
)

# Of the part "serving", which has bars of its own; each is judged by the case that is furthest from it.
SERVING: tuple[Bar, ...] = (
    Bar(
        "a Stream's step, fused / best peer",
        0.7,
        time_share_of_best,
        {"group": ("step",)},
        table="serving",
        at_most=True,
    ),
    Bar(
        "StreamPool, 256 sessions of H128, loop of Streams / pool",
        4.0,
        ratio_to_loop,
        {"name": tuple(pool_name(cell, POOL_SIZE) for cell in CELLS)},
        table="serving",
    ),
    *(
        Bar(
            f"few rows, large weights, {mode}, fused / {of}",
            1.0,
            quantity,
            _cases(part="serving", group="weights", mode=mode),
            at_most=True,
        )
        for mode, of, quantity in (
            ("inference", "best peer", time_share_of_best),
            ("training", "torch.nn", time_share_of_torch),
        )
    ),
    Bar(
        "int8, LSTM, fused / ONNX Runtime int8",
        0.8,
        time_share_of_int8,
        {"group": ("int8",), "cell": ("lstm",)},
        table="serving",
        at_most=True,
    ),
    *(
        Bar(
            f"int8, {cell.upper()}, fused / fused float32",
            0.5,
            time_share_of_float32,
            {"group": ("int8",), "cell": (cell,)},
            table="serving",
            at_most=True,
        )
        for cell in ("gru", "rnn")
    ),
)


def evaluate(result: Mapping[str, Any], bars: Sequence[Bar] = BARS) -> list[Verdict]:
    """Judge a result, bar by bar, and each for every thread count that was measured.

    Args:
        result: as `report.to_json` returns it. Lists that it lacks count as not measured.
        bars: which to judge, `BARS` or `SERVING`.
    """
    counts = sorted({record["threads"] for record in result.get("cases", ())}, reverse=True)
    verdicts = []
    for bar in bars:
        records = [record for record in result.get(bar.table, ()) if _belongs(record, bar)]
        if bar.table == "cases":
            for threads in counts or (None,):  # where no case was measured, that is said of each bar
                verdicts.append(_judge(bar, threads, [record for record in records if record["threads"] == threads]))
        else:
            verdicts.append(_judge(bar, None, records))
    return verdicts


def _belongs(record: Record, bar: Bar) -> bool:
    return all(record[field] in values for field, values in bar.where.items())


def _judge(bar: Bar, threads: int | None, records: Sequence[Record]) -> Verdict:
    values = {record["name"]: bar.quantity(record) for record in records}
    missing = [name for name, value in values.items() if value is None]
    if missing or not values:
        return Verdict(bar, threads, None, missing[0] if missing else "", len(values))
    found = {name: value for name, value in values.items() if value is not None}
    worst = (max if bar.at_most else min)(found, key=lambda name: found[name])
    measured = statistics.geometric_mean(found.values()) if bar.mean else found[worst]
    return Verdict(bar, threads, measured, worst, len(found), _at_peak(bar, records))


def _at_peak(bar: Bar, records: Sequence[Record]) -> float | None:
    if bar.quantity not in (ratio_to_torch, ratio_to_best):
        return None
    bounds = []
    for record in records:
        ratio, share = bar.quantity(record), share_of_peak(record)
        if ratio is None or not share:
            return None
        bounds.append(ratio / share)
    return statistics.geometric_mean(bounds) if bar.mean else min(bounds)


def _ratio(record: Record, peer: str) -> float | None:
    found = record.get("ratio", {}).get(peer)
    return None if found is None else float(found["median"])
